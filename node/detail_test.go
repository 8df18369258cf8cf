package node

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"cal/guest"
	"cal/nucleus"
)

// An ask for a change of a file shows the difference, made on the host from what the machine
// says it holds and what the requester signed: a machine that lies shows none.
func TestAskShowsDifference(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", policyOf("read_files write_files=ask edit_files=ask")), map[string]string{
		"old": "one\ntwo\nthree\n", "long": strings.Repeat("x\n", 600<<10),
	})
	detailOf := func(op nucleus.Op, args map[string]string) []nucleus.Detail {
		t.Helper()
		id := h.tool(p, op, args).want(t, nucleus.KindApproval).Ask
		for _, ask := range h.authority.asked() {
			if ask.ID == id {
				return slices.DeleteFunc(ask.Detail, func(d nucleus.Detail) bool { return strings.HasPrefix(d.Title, "what the session") })
			}
		}
		t.Fatalf("no ask %s", id)
		return nil
	}
	shows := func(what string, got []nucleus.Detail, text string) {
		t.Helper()
		if len(got) != 1 || got[0].Title != "diff of old" && got[0].Title != "diff of long" || !strings.Contains(got[0].Text, text) {
			t.Errorf("%s: %+v, want %q", what, got, text)
		}
	}
	shows("write", detailOf(nucleus.WriteFiles, map[string]string{"path": "old", "content": "one\n2\nthree\n"}), "@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n")
	shows("edit", detailOf(nucleus.EditFiles, map[string]string{"path": "old", "old": "three\n", "new": "3"}), " two\n-three\n+3\n\\ No newline at end of file\n")
	shows("long", detailOf(nucleus.WriteFiles, map[string]string{"path": "long", "content": "x"}), "cannot be shown: ")
	shows("long difference", detailOf(nucleus.WriteFiles, map[string]string{"path": "old", "content": strings.Repeat("line\n", 100<<10)}), "shown in part: the whole has ")
	if got := detailOf(nucleus.WriteFiles, map[string]string{"path": "new", "content": "x"}); len(got) != 0 {
		t.Errorf("a new file: %+v", got)
	}

	lie := func(change func(*guest.CallResult)) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.resolved = change
	}
	lie(func(r *guest.CallResult) {
		if r.Standing != nil {
			r.Standing = []byte("one\n2!\nthree\n")
		}
	})
	shows("another file", detailOf(nucleus.WriteFiles, map[string]string{"path": "old", "content": "one\n2!\nthree\n"}), "cannot be shown: the machine does not show what the file holds")
	lie(func(r *guest.CallResult) { r.Action.Files[0].After = nucleus.SHA256([]byte("nothing")) })
	shows("another end", detailOf(nucleus.WriteFiles, map[string]string{"path": "old", "content": "one\n2?\nthree\n"}), "cannot be shown: the machine says that the file will have the digest")
}

// An ask shows what the session has read and fetched, with the entries of the log that say so.
func TestAskShowsReads(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	files := map[string]string{}
	for i := range 30 {
		files[fmt.Sprint("f", i)] = "x"
	}
	p := h.pod(specOf("", policyOf("read_files write_files=ask")), files)
	read := func(name string) { h.tool(p, nucleus.ReadFiles, map[string]string{"path": name}).want(t, "") }
	detail := func(name string) string {
		t.Helper()
		h.tool(p, nucleus.WriteFiles, writeArgs(name)).want(t, nucleus.KindApproval)
		asks := h.authority.asked()
		for _, d := range asks[len(asks)-1].Detail {
			if d.Title == nucleus.DetailLately {
				return d.Text
			}
		}
		return ""
	}
	if got := detail("n0"); got != "" {
		t.Errorf("nothing was read: %s", got)
	}
	read("f0")
	read("f1")
	read("f0")
	lines := func(from, to int) (want []string) {
		var seqs []int64
		var paths []string
		for _, e := range h.entries(nucleus.KindIntent, nucleus.ReadFiles) {
			var a nucleus.Action
			if err := json.Unmarshal(e.Args, &a); err != nil {
				t.Fatal(err)
			}
			seqs, paths = append(seqs, e.Seq), append(paths, a.Files[0].Path)
		}
		for i := from; i < to; i++ {
			want = append(want, fmt.Sprintf("log entry %d takes private: read_files %s", seqs[i], paths[i]))
		}
		return want
	}
	if got, want := detail("n1"), strings.Join(lines(1, 3), "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for i := range 28 {
		read(fmt.Sprint("f", i+2))
	}
	if got, want := detail("n2"), strings.Join(append([]string{"(6 more before these)"}, lines(7, 31)...), "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
