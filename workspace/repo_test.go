package workspace

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cal/internal/git"
)

// bench is a person's repository and what an agent made of it.
type bench struct {
	t    *testing.T
	dir  string // the person's working tree
	work Work
}

func gitIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=T", "GIT_AUTHOR_EMAIL=t@example.org", "GIT_COMMITTER_NAME=T", "GIT_COMMITTER_EMAIL=t@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// newBench makes a repository with a few files, lets agent work on a copy of it, and brings
// that to a quarantine as a node does. What agent has committed is the branch.
func newBench(t *testing.T, agent func(dir string)) *bench {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: filepath.Join(base, "person")}
	gitIn(t, base, "init", "--quiet", "-b", "main", b.dir)
	write(t, filepath.Join(b.dir, "a.txt"), "one\ntwo\nthree\n")
	write(t, filepath.Join(b.dir, "b/inner.txt"), "inner\n")
	write(t, filepath.Join(b.dir, "run.sh"), "#!/bin/sh\n")
	gitIn(t, b.dir, "add", "-A")
	gitIn(t, b.dir, "commit", "--quiet", "-m", "first")
	b.bring(base, agent)
	return b
}

func (b *bench) bring(base string, agent func(dir string)) {
	t, ctx := b.t, b.t.Context()
	t.Helper()
	guest := filepath.Join(base, "guest")
	gitIn(t, base, "clone", "--quiet", b.dir, guest)
	gitIn(t, guest, "checkout", "--quiet", "-b", "agent/x")
	start := gitIn(t, guest, "rev-parse", "HEAD")
	agent(guest)
	head := gitIn(t, guest, "rev-parse", "HEAD")
	gitIn(t, guest, "add", "-A")
	gitIn(t, guest, "commit", "--quiet", "--allow-empty", "-m", "worktree")
	gitIn(t, guest, "update-ref", "refs/cal/worktree", "HEAD")
	q, err := git.MakeQuarantine(ctx, filepath.Join(base, "q.git"), git.Repo{Dir: b.dir})
	if err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(base, "bundle")
	gitIn(t, guest, "bundle", "create", "--quiet", bundle, "refs/cal/worktree", "^"+start)
	sent, err := os.Open(bundle)
	if err != nil {
		t.Fatal(err)
	}
	defer sent.Close()
	worktree, err := q.Take(ctx, sent, "refs/cal/worktree", start)
	if err != nil {
		t.Fatal(err)
	}
	b.work = Work{Workspace: "w", Repo: "person", Path: b.dir, Branch: "agent/x", Base: start, Head: head, Worktree: worktree, dir: q.Dir}
}

// state is every file of the working tree with mode and content, and what git says of it.
func (b *bench) state() string {
	b.t.Helper()
	var s strings.Builder
	err := filepath.WalkDir(b.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() == ".git" && d.IsDir() {
			return fs.SkipDir
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := ""
		if info.Mode().IsRegular() {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = string(raw)
		} else if info.Mode()&fs.ModeSymlink != 0 {
			text, _ = os.Readlink(path)
		}
		rel, _ := filepath.Rel(b.dir, path)
		s.WriteString(info.Mode().String() + " " + rel + " " + text + "\n")
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return s.String() + gitIn(b.t, b.dir, "status", "--porcelain") + gitIn(b.t, b.dir, "for-each-ref")
}

// tree is the id of what lies in the working tree.
func (b *bench) tree() string {
	b.t.Helper()
	index := filepath.Join(b.t.TempDir(), "index")
	b.t.Setenv("GIT_INDEX_FILE", index)
	defer os.Unsetenv("GIT_INDEX_FILE")
	gitIn(b.t, b.dir, "add", "-A")
	return gitIn(b.t, b.dir, "write-tree")
}

// TestApplyWhole brings back every kind of change; the person's working tree is then exactly
// the agent's.
func TestApplyWhole(t *testing.T) {
	odd := "with \"quotes\"\tand\nline breaks \\ \u00fc.txt"
	b := newBench(t, func(dir string) {
		write(t, filepath.Join(dir, "a.txt"), "one\nTWO\nthree\n")                                                // modified
		write(t, filepath.Join(dir, odd), "odd\n")                                                                // a name that has to be quoted
		write(t, filepath.Join(dir, "binary"), string([]byte{0, 1, 2, 255, 254, 0}))                              // binary
		write(t, filepath.Join(dir, "deep/er/new.txt"), "new\n")                                                  // in directories that are new
		write(t, filepath.Join(dir, "-dash"), "option\n")                                                         // like an option
		write(t, filepath.Join(dir, ":colon"), "pathspec\n")                                                      // like magic
		write(t, filepath.Join(dir, "no-newline"), "end")                                                         // no newline at its end
		err := errors.Join(os.Chmod(filepath.Join(dir, "run.sh"), 0o755), os.Symlink("/etc/passwd", dir+"/link")) // mode, link
		gitIn(t, dir, "mv", "b/inner.txt", "moved.txt")                                                           // rename; b goes
		if err = errors.Join(err, os.WriteFile(filepath.Join(dir, "empty"), nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	})
	left, err := b.work.Apply(t.Context())
	if err != nil || len(left) > 0 {
		t.Fatalf("left %q, %v", left, err)
	}
	want := gitIn(t, b.work.dir, "rev-parse", b.work.Worktree+"^{tree}")
	if got := b.tree(); got != want {
		t.Errorf("tree %s, want the agent's %s\n%s", got, want, b.state())
	}
	if staged := gitIn(t, b.dir, "diff", "--cached", "--name-only"); staged != "" {
		t.Errorf("staged: %s, want nothing", staged)
	}
	for _, f := range []string{b.dir, filepath.Join(b.dir, ".git")} {
		if found, _ := filepath.Glob(filepath.Join(f, ".cal-apply-*")); len(found) > 0 {
			t.Errorf("left behind: %v", found)
		}
	}
}

// TestApplyRefuses: a tree with changes of its own, or in which the patch does not fit, is left
// exactly as it was, and every reason is said.
func TestApplyRefuses(t *testing.T) {
	agent := func(t *testing.T) func(dir string) {
		return func(dir string) {
			write(t, filepath.Join(dir, "a.txt"), "one\nTWO\nthree\n")
			write(t, filepath.Join(dir, "new.txt"), "the agent's\n")
			write(t, filepath.Join(dir, "d/new.txt"), "the agent's\n")
		}
	}
	outside := t.TempDir()
	for name, c := range map[string]struct {
		person func(t *testing.T, b *bench)
		says   []string
	}{
		"unstaged": {func(t *testing.T, b *bench) { write(t, b.dir+"/run.sh", "mine\n") }, []string{"run.sh", "git stash"}},
		"staged": {func(t *testing.T, b *bench) {
			write(t, b.dir+"/run.sh", "mine\n")
			gitIn(t, b.dir, "add", "run.sh")
		}, []string{"run.sh", "git stash"}},
		"deleted":                   {func(t *testing.T, b *bench) { os.Remove(b.dir + "/run.sh") }, []string{"run.sh"}},
		"untracked file in the way": {func(t *testing.T, b *bench) { write(t, b.dir+"/new.txt", "mine\n") }, []string{"new.txt: already exists"}},
		"ignored file in the way": {func(t *testing.T, b *bench) {
			write(t, b.dir+"/.git/info/exclude", "new.txt\n")
			write(t, b.dir+"/new.txt", "mine\n")
		}, []string{"new.txt: already exists"}},
		"file where a directory has to be": {func(t *testing.T, b *bench) { write(t, b.dir+"/d", "mine\n") }, []string{"d"}},
		"link on the way": {func(t *testing.T, b *bench) {
			if err := os.Symlink(outside, b.dir+"/d"); err != nil {
				t.Fatal(err)
			}
		}, []string{"d/new.txt", "beyond a symbolic link"}},
		"two conflicts": {func(t *testing.T, b *bench) {
			write(t, b.dir+"/a.txt", "other\n")
			gitIn(t, b.dir, "commit", "--quiet", "-am", "mine")
			write(t, b.dir+"/new.txt", "mine\n")
		}, []string{"a.txt: patch does not apply", "new.txt: already exists", "nothing was changed", "cal repo fetch"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, agent(t))
			c.person(t, b)
			before := b.state()
			_, err := b.work.Apply(t.Context())
			if err == nil {
				t.Fatalf("applied:\n%s", b.state())
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("it says %q, want %q", err, want)
				}
			}
			if after := b.state(); after != before {
				t.Errorf("the tree was changed; before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("written behind a link: %v", left)
	}
	// The control: an untracked file elsewhere, and a HEAD that has gone on, are no hindrance.
	b := newBench(t, agent(t))
	write(t, b.dir+"/mine.txt", "mine\n")
	write(t, b.dir+"/run.sh", "committed\n")
	gitIn(t, b.dir, "commit", "--quiet", "-m", "mine", "--", "run.sh")
	if _, err := b.work.Apply(t.Context()); err != nil {
		t.Error(err)
	}
	if raw, _ := os.ReadFile(b.dir + "/new.txt"); string(raw) != "the agent's\n" {
		t.Errorf("new.txt is %q", raw)
	}
}

// TestApplyPutsBack lets git fail in the middle, where a check could not know it: what it had
// changed by then is as it was.
func TestApplyPutsBack(t *testing.T) {
	b := newBench(t, func(dir string) {
		write(t, filepath.Join(dir, "a.txt"), "changed\n")
		write(t, filepath.Join(dir, "new/one.txt"), "new\n")
		gitIn(t, dir, "rm", "--quiet", "-r", "b")
		write(t, filepath.Join(dir, "b"), "a file where a directory was\n")
		if err := errors.Join(os.Remove(filepath.Join(dir, "run.sh")), os.Symlink("a.txt", filepath.Join(dir, "run.sh"))); err != nil {
			t.Fatal(err)
		}
	})
	before := b.state()
	restore := otherGit(t, "\"$real\" \"$@\"; echo 'error: no room' >&2; exit 1")
	_, err := b.work.Apply(t.Context())
	restore()
	if err == nil || !strings.Contains(err.Error(), "no room") || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("it says %v", err)
	}
	if after := b.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := b.work.Apply(t.Context()); err != nil { // the control
		t.Error(err)
	}
	if after := b.state(); after == before {
		t.Error("nothing was applied")
	}
}

// otherGit puts a script in the place of the git that applies; $real is git itself.
func otherGit(t *testing.T, script string) (restore func()) {
	t.Helper()
	real, err := exec.LookPath("git")
	if err != nil {
		t.Fatal(err)
	}
	bin, path := t.TempDir(), os.Getenv("PATH")
	write(t, filepath.Join(bin, "git"), "#!/bin/sh\nreal="+real+"\ncase \"$1 $2\" in 'apply --whitespace=nowarn') "+script+";; *) exec $real \"$@\";; esac\n")
	if err := os.Chmod(filepath.Join(bin, "git"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+path)
	return func() { os.Setenv("PATH", path) }
}

// TestApplyIsNotCalledOff: a Ctrl-C before it begins leaves the tree as it was, one in the middle
// is heard when all has been written.
func TestApplyIsNotCalledOff(t *testing.T) {
	b := newBench(t, func(dir string) { write(t, filepath.Join(dir, "a.txt"), "changed\n") })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := b.state()
	if _, err := b.work.Apply(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was cancelled", err)
	}
	if after := b.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	begun, goOn := filepath.Join(t.TempDir(), "begun"), filepath.Join(t.TempDir(), "go-on")
	for _, fifo := range []string{begun, goOn} {
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	defer otherGit(t, "echo > "+begun+"; read -r line < "+goOn+"; exec \"$real\" \"$@\"")()
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := b.work.Apply(ctx)
		done <- err
	}()
	if _, err := os.ReadFile(begun); err != nil { // waits for it
		t.Fatal(err)
	}
	cancel()
	if err := os.WriteFile(goOn, []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("it was called off: %v", err)
	}
	if raw, _ := os.ReadFile(filepath.Join(b.dir, "a.txt")); string(raw) != "changed\n" {
		t.Errorf("a.txt is %q", raw)
	}
}

func TestFetch(t *testing.T) {
	commit := func(t *testing.T) func(dir string) {
		return func(dir string) {
			write(t, filepath.Join(dir, "a.txt"), "changed\n")
			gitIn(t, dir, "commit", "--quiet", "-am", "the agent's")
		}
	}
	for name, c := range map[string]struct {
		person func(t *testing.T, b *bench)
		says   string // "": it works
	}{
		"new branch":                {func(*testing.T, *bench) {}, ""},
		"branch that is behind":     {func(t *testing.T, b *bench) { gitIn(t, b.dir, "branch", "agent/x") }, ""},
		"branch below of that name": {func(t *testing.T, b *bench) { gitIn(t, b.dir, "branch", "agent/y") }, ""},
		"shallow":                   {func(t *testing.T, b *bench) { write(t, b.dir+"/.git/shallow", b.work.Base+"\n") }, ""},
		"other commits": {func(t *testing.T, b *bench) {
			gitIn(t, b.dir, "checkout", "--quiet", "-b", "agent/x")
			gitIn(t, b.dir, "commit", "--quiet", "--allow-empty", "-m", "mine")
			gitIn(t, b.dir, "checkout", "--quiet", "main")
		}, "has commits that the agent's has not"},
		"checked out": {func(t *testing.T, b *bench) { gitIn(t, b.dir, "checkout", "--quiet", "-b", "agent/x") }, "is checked out in"},
		"checked out elsewhere": {func(t *testing.T, b *bench) {
			gitIn(t, b.dir, "worktree", "add", "--quiet", "-b", "agent/x", b.dir+"-other")
		}, "is checked out in"},
		"unborn":                      {func(t *testing.T, b *bench) { gitIn(t, b.dir, "checkout", "--quiet", "--orphan", "agent/x") }, "is checked out in"},
		"a branch that is in the way": {func(t *testing.T, b *bench) { gitIn(t, b.dir, "branch", "agent") }, "'refs/heads/agent' exists"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, commit(t))
			c.person(t, b)
			before := b.state()
			ref, err := b.work.Fetch(t.Context())
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("it says %v, want %q", err, c.says)
				}
				if after := b.state(); after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := gitIn(t, b.dir, "rev-parse", ref); got != b.work.Head {
				t.Errorf("%s is at %s, want %s", ref, got, b.work.Head)
			}
			if out := gitIn(t, b.dir, "fsck", "--connectivity-only"); strings.Contains(out, "missing") {
				t.Error(out)
			}
			if status := gitIn(t, b.dir, "status", "--porcelain"); status != "" {
				t.Errorf("the working tree was changed: %s", status)
			}
		})
	}
	b := newBench(t, func(string) {})
	if _, err := b.work.Fetch(t.Context()); err == nil || !strings.Contains(err.Error(), "cal repo apply") {
		t.Errorf("without a commit it says %v", err)
	}
}

// TestFetchWithoutObjects: a quarantine that has lost what it should give moves no branch.
func TestFetchWithoutObjects(t *testing.T) {
	b := newBench(t, func(dir string) {
		write(t, filepath.Join(dir, "a.txt"), "changed\n")
		gitIn(t, dir, "commit", "--quiet", "-am", "the agent's")
	})
	if err := os.RemoveAll(filepath.Join(b.work.dir, "objects", "pack")); err != nil {
		t.Fatal(err)
	}
	before := b.state()
	if ref, err := b.work.Fetch(t.Context()); err == nil {
		t.Errorf("fetched %s", ref)
	}
	if after := b.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestBareRepository(t *testing.T) {
	b := newBench(t, func(dir string) {
		write(t, filepath.Join(dir, "a.txt"), "changed\n")
		gitIn(t, dir, "commit", "--quiet", "-am", "the agent's")
	})
	bare := b.dir + ".git"
	gitIn(t, b.dir, "clone", "--quiet", "--bare", b.dir, bare)
	b.work.Path = bare
	if _, err := b.work.Apply(t.Context()); err == nil || !strings.Contains(err.Error(), "no working tree") {
		t.Errorf("apply says %v", err)
	}
	ref, err := b.work.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := gitIn(t, bare, "rev-parse", ref); got != b.work.Head {
		t.Errorf("%s is at %s", ref, got)
	}
}

// TestSubmodulesStay: a submodule that the agent moved is named, and the rest applies.
func TestSubmodulesStay(t *testing.T) {
	b := &bench{t: t}
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b.dir = filepath.Join(base, "person")
	sub := filepath.Join(b.dir, "sub")
	gitIn(t, base, "init", "--quiet", "-b", "main", b.dir)
	write(t, filepath.Join(b.dir, "a.txt"), "one\n")
	gitIn(t, base, "init", "--quiet", sub)
	gitIn(t, sub, "commit", "--quiet", "--allow-empty", "-m", "first")
	gitIn(t, b.dir, "add", "-A")
	gitIn(t, b.dir, "commit", "--quiet", "-m", "first")
	b.bring(base, func(dir string) {
		write(t, filepath.Join(dir, "a.txt"), "two\n")
		gitIn(t, dir, "update-index", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+",sub")
		gitIn(t, dir, "commit", "--quiet", "-am", "both")
		gitIn(t, dir, "update-index", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+",sub")
	})
	if moved, err := b.work.Submodules(t.Context()); err != nil || len(moved) != 1 || moved[0] != "sub" {
		t.Errorf("moved %q, %v", moved, err)
	}
	left, err := b.work.Apply(t.Context())
	if err != nil || len(left) != 1 || left[0] != "sub" {
		t.Errorf("left %q, %v", left, err)
	}
	if raw, _ := os.ReadFile(filepath.Join(b.dir, "a.txt")); string(raw) != "two\n" {
		t.Errorf("a.txt is %q", raw)
	}
}

func TestDiff(t *testing.T) {
	b := newBench(t, func(dir string) { write(t, filepath.Join(dir, "a.txt"), "one\n\x1b[31mtwo\nthree\n") })
	var plain, colour, stat bytes.Buffer
	if err := errors.Join(b.work.Diff(t.Context(), &plain, false, false), b.work.Diff(t.Context(), &colour, true, false), b.work.Diff(t.Context(), &stat, false, true)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(plain.String(), "-two") || !strings.Contains(colour.String(), "\x1b[32m") || !strings.Contains(stat.String(), "1 file changed") {
		t.Errorf("plain %q, colour %q, stat %q", &plain, &colour, &stat)
	}
}

// TestApplyOnFullDisk runs out of room in the middle.
func TestApplyOnFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small disk")
	}
	b := newBench(t, func(dir string) {
		write(t, filepath.Join(dir, "a.txt"), "changed\n")
		if err := os.Remove(filepath.Join(dir, "run.sh")); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "z/large.txt"), strings.Repeat("large\n", 1<<20))
	})
	small := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("no small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	gitIn(t, small, "clone", "--quiet", "--no-local", b.dir, "person")
	b.dir = filepath.Join(small, "person")
	b.work.Path = b.dir
	before := b.state()
	if _, err := b.work.Apply(t.Context()); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("it says %v", err)
	}
	if after := b.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil { // the control
		t.Fatal(err)
	}
	if _, err := b.work.Apply(t.Context()); err != nil {
		t.Error(err)
	}
}
