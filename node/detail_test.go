package node

import (
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
				return ask.Detail
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
