package git

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// forgery is a pack of a machine that builds what it likes.
type forgery struct {
	objects [][]byte // as they stand in a pack
}

var packTypes = map[string]byte{"commit": 1, "tree": 2, "blob": 3}

// add puts an object into the pack and returns its id.
func (f *forgery) add(kind, content string) string {
	f.put(packTypes[kind], nil, []byte(content))
	sum := sha1.Sum([]byte(fmt.Sprintf("%s %d\x00%s", kind, len(content), content)))
	return hex.EncodeToString(sum[:])
}

func (f *forgery) put(kind byte, base, data []byte) {
	var out bytes.Buffer
	size := len(data)
	first := kind<<4 | byte(size&15)
	for size >>= 4; size > 0; size >>= 7 {
		out.WriteByte(first | 0x80)
		first = byte(size & 127)
	}
	out.WriteByte(first)
	out.Write(base)
	z := zlib.NewWriter(&out)
	z.Write(data)
	z.Close()
	f.objects = append(f.objects, out.Bytes())
}

// delta puts "the content of base, and more" into the pack: a thin pack, which git completes with base.
func (f *forgery) delta(base string, length int, more string) {
	raw, _ := hex.DecodeString(base)
	delta := []byte{byte(length), byte(length + len(more)), 0x90, byte(length), byte(len(more))}
	f.put(7, raw, append(delta, more...))
}

func (f *forgery) bundle(commit, ref string) string {
	var out bytes.Buffer
	out.WriteString("PACK")
	binary.Write(&out, binary.BigEndian, []uint32{2, uint32(len(f.objects))})
	for _, o := range f.objects {
		out.Write(o)
	}
	sum := sha1.Sum(out.Bytes())
	out.Write(sum[:])
	return "# v2 git bundle\n" + commit + " " + ref + "\n\n" + out.String()
}

func (f *forgery) commit(tree string, parents ...string) string {
	text := "tree " + tree + "\n"
	for _, p := range parents {
		text += "parent " + p + "\n"
	}
	return f.add("commit", text+"author A <a@example.org> 1 +0000\ncommitter A <a@example.org> 1 +0000\n\nforged\n")
}

func (f *forgery) tree(name, blob string) string {
	id, _ := hex.DecodeString(blob)
	return f.add("tree", "100644 "+name+"\x00"+string(id))
}

// What a machine sends leads to what it sent, and to the history that it was given: nothing else of
// the person's, though the quarantine borrows all of it and the machine knows its id.
func TestTakeOnlyWhatWasSent(t *testing.T) {
	h := newHostile(t)
	was := h.git("rev-parse", "HEAD~1:file.txt") // of the history, not of the last commit
	base := h.git("rev-parse", "HEAD")
	h.git("checkout", "--quiet", "-b", "hidden")
	const secret = "not handed over\n"
	h.write("hidden.txt", secret)
	h.commit()
	hidden, blob, tree := h.git("rev-parse", "HEAD"), h.git("rev-parse", "HEAD:hidden.txt"), h.git("rev-parse", "HEAD^{tree}")
	const ref = "refs/heads/agent/x"
	for name, c := range map[string]struct {
		forge func(f *forgery) string // returns the commit
		taken bool
	}{
		"control: its own":        {func(f *forgery) string { return f.commit(f.tree("a", f.add("blob", "a\n")), base) }, true},
		"control: what was given": {func(f *forgery) string { return f.commit(f.tree("a", was), base) }, true},
		"control: a thin pack": {func(f *forgery) string {
			f.delta(was, len("one\n"), "more\n")
			return f.commit(f.tree("a", f.idOf("one\nmore\n")), base)
		}, true},
		"a commit as parent": {func(f *forgery) string { return f.commit(f.tree("a", f.add("blob", "a\n")), base, hidden) }, false},
		"a tree":             {func(f *forgery) string { return f.commit(tree, base) }, false},
		"a file":             {func(f *forgery) string { return f.commit(f.tree("a", blob), base) }, false},
		"a file that git completes the pack with": {func(f *forgery) string {
			f.delta(blob, len(secret), "more\n")
			return f.commit(f.tree("a", blob), base)
		}, false},
		"a file as a copy of itself": {func(f *forgery) string {
			f.delta(blob, len(secret), "\n")
			raw, _ := hex.DecodeString(f.idOf(secret + "\n"))
			f.put(7, raw, []byte{byte(len(secret) + 1), byte(len(secret)), 0x90, byte(len(secret))})
			return f.commit(f.tree("a", blob), base)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			q, err := MakeQuarantine(t.Context(), filepath.Join(t.TempDir(), "q.git"), Repo{h.dir})
			if err != nil {
				t.Fatal(err)
			}
			f := &forgery{}
			commit := c.forge(f)
			got, err := q.Take(t.Context(), strings.NewReader(f.bundle(commit, ref)), ref, base)
			if taken := err == nil; taken != c.taken || taken && got != commit {
				t.Errorf("taken: %v, %v", got, err)
			}
			if refs, _ := q.Run(t.Context(), "for-each-ref"); (refs != "") != c.taken {
				t.Errorf("refs: %q", refs)
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Error("the error tells it")
			}
		})
	}
}

func (f *forgery) idOf(content string) string { return (&forgery{}).add("blob", content) }

// A machine's git sends no more than it must, and that is enough: also where a file is again what it
// was, where a branch is taken after another, and where the history is shallow.
func TestTakeWhatGitSends(t *testing.T) {
	h := newHostile(t)
	base := h.git("rev-parse", "HEAD")
	for _, shallow := range []bool{false, true} {
		t.Run(fmt.Sprintf("shallow %v", shallow), func(t *testing.T) {
			origin, guest := h.dir, filepath.Join(t.TempDir(), "guest")
			if shallow {
				origin = filepath.Join(t.TempDir(), "shallow")
				h.git("clone", "--quiet", "--depth=1", "file://"+h.dir, origin)
			}
			h.git("clone", "--quiet", "file://"+origin, guest)
			h.git("-C", guest, "checkout", "--quiet", "-b", "agent/x")
			q, err := MakeQuarantine(t.Context(), filepath.Join(t.TempDir(), "q.git"), Repo{origin})
			if err != nil {
				t.Fatal(err)
			}
			take := func(ref string) {
				t.Helper()
				cmd := exec.CommandContext(context.Background(), "git", "-C", guest, "bundle", "create", "--quiet", "-", ref, "^"+base)
				bundle, err := cmd.Output()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := q.Take(t.Context(), bytes.NewReader(bundle), ref, base); err != nil {
					t.Error(err)
				}
			}
			for _, content := range []string{"one\n", "two\n", strings.Repeat("long\n", 2000), strings.Repeat("long\n", 2000) + "er\n"} {
				h.write(filepath.Join(guest, "file.txt"), content)
				h.write(filepath.Join(guest, "deep", "er", content[:3]), content)
				h.git("-C", guest, "add", "-A")
				h.git("-C", guest, "commit", "--quiet", "-m", "x")
				take("refs/heads/agent/x")
			}
			h.write(filepath.Join(guest, "file.txt"), "one\n")
			h.git("-C", guest, "commit", "--quiet", "-am", "y")
			h.git("-C", guest, "update-ref", "refs/cal/worktree", "HEAD")
			take("refs/cal/worktree")
		})
	}
}

// A few trees stand for any number of files: what looks at them all is never begun.
func TestTakeCountsFiles(t *testing.T) {
	h := newHostile(t)
	base := h.git("rev-parse", "HEAD")
	const ref = "refs/heads/agent/x"
	// levels of ten entries each stand for ten to the power of levels files.
	tens := func(levels int) (commit, bundle string) {
		f := &forgery{}
		mode, id := "100644", f.add("blob", "x\n")
		for range levels {
			raw, _ := hex.DecodeString(id)
			var tree strings.Builder
			for i := range 10 {
				fmt.Fprintf(&tree, "%s %d\x00%s", mode, i, raw)
			}
			mode, id = "40000", f.add("tree", tree.String())
		}
		commit = f.commit(id)
		return commit, f.bundle(commit, ref)
	}
	for levels, want := range map[int]string{3: "", 7: "stands for more than 1048576 files", 12: "stands for more than 1048576 files"} {
		q, err := MakeQuarantine(context.Background(), filepath.Join(t.TempDir(), "q.git"), Repo{h.dir})
		if err != nil {
			t.Fatal(err)
		}
		commit, bundle := tens(levels)
		got, err := q.Take(context.Background(), strings.NewReader(bundle), ref, base)
		switch {
		case want == "" && (err != nil || got != commit):
			t.Errorf("10^%d files: %s, %v; want %s", levels, got, err, commit)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("10^%d files: %s, %v; want %q", levels, got, err, want)
		}
	}
}
