package tools

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cal/nucleus"
	"cal/wire"
)

func newRepository(t testing.TB, dir string) {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o755))
	hostGit(t, dir, "init", "-q", "-b", "main", ".")
	put(t, filepath.Join(dir, "a.txt"), "one\n")
	hostGit(t, dir, "add", "-A")
	hostGit(t, dir, "commit", "-q", "-m", "first")
}

func TestCommit(t *testing.T) {
	b := newBench(t, nil)
	repo := b.path("app")
	newRepository(t, repo)
	// The repository would sign, under another name.
	hostGit(t, repo, "config", "user.name", "Mallory")
	hostGit(t, repo, "config", "user.email", "m@example.org")
	hostGit(t, repo, "config", "commit.gpgsign", "true")
	hostGit(t, repo, "config", "gpg.program", "/bin/false")
	put(t, filepath.Join(repo, ".git/hooks/pre-commit"), "#!/bin/sh\necho the hook ran\n")
	check(t, os.Chmod(filepath.Join(repo, ".git/hooks/pre-commit"), 0o755))

	wantKind(t, b.do(nucleus.GitCommit, CommitArgs{Message: "m"}, nil), nucleus.KindFailed, "nothing to commit")

	b.write("app/a.txt", "two\n")
	b.write("app/new file.txt", "x")
	b.write("app/other.txt", "x")
	b.write("app/*", "x")
	var r CommitResult
	message := "Subject -m \"quoted\" $HOME\n\nBody\n"
	b.must(nucleus.GitCommit, CommitArgs{Message: message, Paths: []string{"app/a.txt", "app/new file.txt", "app/*"}}, &r)
	if r.Repo != "app" || r.Branch != "main" || r.Commit != hostGit(t, repo, "rev-parse", "HEAD") || !strings.Contains(r.Stat, "3 files changed") {
		t.Errorf("%+v", r)
	}
	if got := hostGit(t, repo, "log", "-1", "--format=%an|%ae|%cn|%ce|%G?|%B"); got != "Ada L|ada@example.org|Ada L|ada@example.org|N|"+strings.TrimSpace(message) {
		t.Errorf("commit is %q", got)
	}
	if got := hostGit(t, repo, "status", "--porcelain"); got != "?? other.txt" {
		t.Errorf("status %q", got)
	}
	// What is staged, and only that; then everything.
	b.write("app/a.txt", "three\n")
	hostGit(t, repo, "add", "a.txt")
	b.must(nucleus.GitCommit, CommitArgs{Message: "staged", Repo: "app"}, nil)
	if got := hostGit(t, repo, "status", "--porcelain"); got != "?? other.txt" {
		t.Errorf("status %q", got)
	}
	b.must(nucleus.GitCommit, CommitArgs{Message: "all"}, nil)
	if got := hostGit(t, repo, "status", "--porcelain"); got != "" {
		t.Errorf("status %q", got)
	}
	check(t, os.Remove(b.path("app/a.txt")))
	b.must(nucleus.GitCommit, CommitArgs{Message: "removed", Paths: []string{"app/a.txt"}}, nil)

	wantKind(t, b.do(nucleus.GitCommit, CommitArgs{Message: "m", Paths: []string{"none.txt"}}, nil), nucleus.KindNotFound, "in no git repository")
	wantKind(t, b.do(nucleus.GitCommit, CommitArgs{Message: "m", Repo: "app", Paths: []string{"a.txt"}}, nil), nucleus.KindInvalid, "relative to the workspace")
	wantKind(t, b.do(nucleus.GitCommit, CommitArgs{Message: "m", Repo: "none"}, nil), nucleus.KindNotFound, "not a git repository")
	newRepository(t, b.path("lib"))
	wantKind(t, b.do(nucleus.GitCommit, CommitArgs{Message: "m"}, nil), nucleus.KindInvalid, "2 repositories (app, lib)")
	b.identity = nucleus.Identity{}
	wantKind(t, b.do(nucleus.GitCommit, CommitArgs{Message: "m", Repo: "app"}, nil), nucleus.KindInvalid, "user.name")
}

func (b *bench) bundleOut(header Bundle) ([]byte, Result) {
	b.t.Helper()
	stream := b.open(StreamBundle, header)
	defer stream.Close()
	var data []byte
	ended := false
	for {
		kind, payload, err := stream.Recv(1 << 25)
		if err != nil {
			b.t.Fatal(err)
		}
		if kind == wire.FrameData {
			data, ended = append(data, payload...), len(payload) == 0
			continue
		}
		var result Result
		check(b.t, jsonInto(payload, &result))
		if ended != (result.Error == nil) {
			b.t.Errorf("data ended: %v, error %v", ended, result.Error)
		}
		return data, result
	}
}

func (b *bench) bundleIn(header Unbundle, data []byte) Result {
	b.t.Helper()
	stream := b.open(StreamUnbundle, header)
	for len(data) > 0 {
		n := min(len(data), 1000)
		if stream.Send(wire.FrameData, data[:n]) != nil {
			break // refused already
		}
		data = data[n:]
	}
	stream.Send(wire.FrameData, nil)
	return b.finish(stream).result
}

func TestBundleRoundTrip(t *testing.T) {
	b := newBench(t, nil)
	origin := filepath.Join(t.TempDir(), "origin")
	newRepository(t, origin)
	hostGit(t, origin, "tag", "v1")
	// Content that would run a filter, were one configured.
	put(t, filepath.Join(origin, ".gitattributes"), "*.txt filter=evil\n")
	hostGit(t, origin, "add", "-A")
	hostGit(t, origin, "commit", "-q", "-m", "second")
	base := hostGit(t, origin, "rev-parse", "HEAD")
	file := filepath.Join(t.TempDir(), "b")
	hostGit(t, origin, "bundle", "create", "-q", file, "--all")
	data, err := os.ReadFile(file)
	check(t, err)

	in := Unbundle{
		Repo: "app", Branch: "agent/work", Commit: base,
		Remotes: map[string]string{"origin": "https://user:token@example.org/x.git", "up": "ssh://git:pw@example.org/x"},
		Config:  map[string]string{"user.name": "Ada", "core.untrackedCache": "true"},
	}
	bad := in
	bad.Commit = strings.Repeat("0", 40)
	if r := b.bundleIn(bad, data); r.Error == nil {
		t.Error("a commit that the bundle does not hold was checked out")
	}
	if r := b.bundleIn(in, data[:len(data)-10]); r.Error == nil {
		t.Error("a bundle that was cut off was taken")
	}
	if left, _ := os.ReadDir(b.workspace); len(left) != 0 {
		t.Fatalf("failed calls left %v", left)
	}
	if r := b.bundleIn(in, data); r.Error != nil {
		t.Fatal(r.Error)
	}
	repo := b.path("app")
	for want, args := range map[string][]string{
		base:                        {"rev-parse", "HEAD", "--"},
		"agent/work":                {"symbolic-ref", "--short", "HEAD"},
		"https://example.org/x.git": {"config", "remote.origin.url"},
		"ssh://git@example.org/x":   {"config", "remote.up.url"},
		"Ada":                       {"config", "user.name"},
		"v1":                        {"tag"},
		"":                          {"status", "--porcelain"},
	} {
		if got := strings.TrimSuffix(hostGit(t, repo, args...), "\n--"); got != want {
			t.Errorf("git %v: %q, want %q", args, got, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(repo, ".git/*.bundle")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if r := b.bundleIn(in, data); r.Error == nil || r.Error.Kind != nucleus.KindConflict {
		t.Errorf("a second time: %+v", r)
	}

	// Nothing new yet.
	if data, r := b.bundleOut(Bundle{Repo: "app", Ref: "agent/work", Base: base}); r.Error != nil || len(data) != 0 || !strings.Contains(string(r.Value), `"empty":true`) {
		t.Errorf("%d bytes, %+v", len(data), r)
	}
	b.write("app/a.txt", "changed\n")
	var c CommitResult
	b.must(nucleus.GitCommit, CommitArgs{Message: "work"}, &c)
	for _, from := range []string{base, "", strings.Repeat("1", 40)} {
		data, r := b.bundleOut(Bundle{Repo: "app", Ref: "refs/heads/agent/work", Base: from})
		if r.Error != nil {
			t.Fatal(r.Error)
		}
		put(t, file, string(data))
		hostGit(t, origin, "bundle", "verify", "-q", file)
		hostGit(t, origin, "fetch", "-q", file, "+refs/heads/agent/work:refs/heads/back")
		if got := hostGit(t, origin, "rev-parse", "back"); got != c.Commit {
			t.Errorf("base %q: came back as %s, want %s", from, got, c.Commit)
		}
	}
	for _, b2 := range []Bundle{{Repo: "app", Ref: "none"}, {Repo: "none", Ref: "main"}} {
		if _, r := b.bundleOut(b2); r.Error == nil || r.Error.Kind != nucleus.KindNotFound {
			t.Errorf("%+v: %+v", b2, r)
		}
	}
}

func (b *bench) incoming(header Incoming, data []byte) Result {
	b.t.Helper()
	stream := b.open(StreamIncoming, header)
	if len(data) > 0 {
		stream.Send(wire.FrameData, data)
	}
	stream.Send(wire.FrameData, nil)
	return b.finish(stream).result
}

// A branch of another machine arrives beside what is checked out, and takes nothing away.
func TestIncoming(t *testing.T) {
	b := newBench(t, nil)
	repo := b.path("app")
	newRepository(t, repo)
	base := hostGit(t, repo, "rev-parse", "HEAD")
	other := filepath.Join(t.TempDir(), "other")
	hostGit(t, repo, "clone", "-q", repo, other)
	commit := func(name string) (id string, pack []byte) {
		put(t, filepath.Join(other, name), name+"\n")
		hostGit(t, other, "add", "-A")
		hostGit(t, other, "commit", "-q", "-m", name)
		id = hostGit(t, other, "rev-parse", "HEAD")
		cmd := exec.Command("git", "pack-objects", "-q", "--revs", "--stdout", "--thin")
		cmd.Dir, cmd.Stdin = other, strings.NewReader(id+"\n^"+base+"\n")
		pack, err := cmd.Output()
		check(t, err)
		return id, pack
	}
	// A trap that a plain update-ref springs.
	trap := filepath.Join(repo, ".git/hooks/reference-transaction")
	put(t, trap, "#!/bin/sh\ntouch "+b.path("sprung")+"\n")
	check(t, os.Chmod(trap, 0o755))
	first, pack := commit("one")
	in := Incoming{Repo: "app", Branch: "cal/sub/p-x", Commit: first, Base: base}
	put(t, filepath.Join(repo, "mine.txt"), "not committed")
	status := hostGit(t, repo, "status", "--porcelain")
	for name, bad := range map[string]Incoming{
		"no branch": {Repo: "app", Branch: "--x", Commit: first, Base: base}, "no commit": {Repo: "app", Branch: "b", Commit: "HEAD", Base: base},
		"no repository": {Repo: "none", Branch: "b", Commit: first, Base: base}, "a lost base": {Repo: "app", Branch: "b", Commit: first, Base: strings.Repeat("1", 40)},
		"a commit that is not there": {Repo: "app", Branch: "b", Commit: strings.Repeat("1", 40), Base: base},
	} {
		if r := b.incoming(bad, pack); r.Error == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if r := b.incoming(in, pack[:len(pack)-9]); r.Error == nil {
		t.Error("a pack that was cut off was taken")
	}
	if r := b.incoming(in, pack); r.Error != nil {
		t.Fatal(r.Error)
	}
	at := func() string { return hostGit(t, repo, "rev-parse", "cal/sub/p-x") }
	if at() != first || hostGit(t, repo, "rev-parse", "HEAD") != base || hostGit(t, repo, "status", "--porcelain") != status {
		t.Error("the branch is not there, or what is checked out has changed")
	}
	second, pack := commit("two")
	in.Commit = second
	if r := b.incoming(in, pack); r.Error != nil || at() != second {
		t.Errorf("further commits: %+v", r)
	}
	in.Commit = first
	if r := b.incoming(in, pack); r.Error == nil || r.Error.Kind != nucleus.KindConflict || at() != second {
		t.Errorf("fewer commits: %+v", r)
	}
	if _, err := os.Stat(b.path("sprung")); err == nil {
		t.Error("a hook of the repository ran")
	}
	hostGit(t, repo, "stash", "-q", "-u")
	hostGit(t, repo, "checkout", "-q", "cal/sub/p-x")
	check(t, os.Remove(trap))
	third, pack := commit("three")
	in.Commit = third
	if r := b.incoming(in, pack); r.Error == nil || !strings.Contains(r.Error.Message, "checked out") || at() != second {
		t.Errorf("into the checked-out branch: %+v", r)
	}
	hostGit(t, repo, "checkout", "-q", "-")
	hostGit(t, repo, "worktree", "add", "-q", filepath.Join(t.TempDir(), "tree"), "cal/sub/p-x")
	if r := b.incoming(in, pack); r.Error == nil || !strings.Contains(r.Error.Message, "checked out") {
		t.Errorf("into the branch of another working tree: %+v", r)
	}
}

// A hostile repository's configuration runs nothing when this program reads it.
// The control shows that each trap works when git is called plainly.
func TestPlumbingRunsNothing(t *testing.T) {
	b := newBench(t, nil)
	repo := b.path("app")
	newRepository(t, repo)
	traps := t.TempDir()
	trap := func(name string) string {
		file := filepath.Join(traps, name+".sh")
		put(t, file, fmt.Sprintf("#!/bin/sh\ntouch %s/sprung-%s\nexit 1\n", traps, name))
		check(t, os.Chmod(file, 0o755))
		return file
	}
	sprung := func() []string {
		list, _ := filepath.Glob(filepath.Join(traps, "sprung-*"))
		for _, f := range list {
			os.Remove(f)
		}
		return list
	}
	hooks := filepath.Join(traps, "hooks")
	check(t, os.Mkdir(hooks, 0o755))
	for _, hook := range []string{"post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"} {
		check(t, os.Symlink(trap("hook-"+hook), filepath.Join(hooks, hook)))
	}
	for key, value := range map[string]string{
		"core.hooksPath": hooks, "core.fsmonitor": trap("fsmonitor"), "core.pager": trap("pager"), "core.editor": trap("editor"),
		"core.sshCommand": trap("ssh"), "core.alternateRefsCommand": trap("alternates"), "diff.external": trap("diff"), "gpg.program": trap("gpg"),
		"credential.helper": trap("credential"), "filter.evil.smudge": trap("smudge"), "filter.evil.clean": trap("clean"), "filter.a=b.c.clean": trap("clean2"), "filter.evil.required": "true",
		"protocol.ext.allow": "always", "remote.origin.url": "ext::" + trap("ext"), "uploadpack.packObjectsHook": trap("pack"),
		"remote.origin.promisor": "true", "remote.origin.partialclonefilter": "blob:none", "extensions.partialClone": "origin", "core.repositoryformatversion": "1",
	} {
		hostGit(t, repo, "config", key, value)
	}
	put(t, filepath.Join(repo, ".gitattributes"), "* filter=evil\nb.txt filter=a=b.c\n")
	put(t, filepath.Join(repo, "b.txt"), "not committed")
	blob := hostGit(t, repo, "rev-parse", "HEAD:a.txt")
	object := filepath.Join(repo, ".git/objects", blob[:2], blob[2:])
	kept := filepath.Join(t.TempDir(), "object")
	data, err := os.ReadFile(object)
	check(t, err)
	put(t, kept, string(data))

	b.bundleOut(Bundle{Repo: "app", Ref: "main"})
	if _, r := b.bundleOut(Bundle{Repo: "app", Ref: WorktreeRef}); r.Error != nil {
		t.Errorf("the working tree: %v", r.Error)
	}
	check(t, os.Remove(object)) // now it is a promised object that is missing
	b.bundleOut(Bundle{Repo: "app", Ref: "main"})
	b.bundleOut(Bundle{Repo: "app", Ref: "main", Base: strings.Repeat("2", 40)})
	box, err := OpenSandbox(b.workspace, nil)
	check(t, err)
	defer box.Close()
	x, err := newExecutor(box, Config{}.withDefaults())
	check(t, err)
	defer x.close()
	if out, err := x.plumbing("app").run(t.Context(), "", "cat-file", "-p", blob); err == nil {
		t.Errorf("a missing object was read: %q", out)
	}
	if list := sprung(); len(list) > 0 {
		t.Errorf("traps sprung: %v", list)
	}
	// The control: the same repository under plain git.
	b.sh("cd app; git add .gitattributes; git status; git cat-file -p " + blob + "; git update-ref refs/heads/x HEAD")
	control := strings.Join(sprung(), " ")
	for _, name := range []string{"fsmonitor", "ext", "hook-reference-transaction", "clean"} {
		if !strings.Contains(control, "sprung-"+name) {
			t.Errorf("the trap %s does not work, so its silence proves nothing (sprung: %s)", name, control)
		}
	}
	put(t, object, "")
	check(t, os.Rename(kept, object))
}

// The repository's directory may lie: a .git that leads elsewhere is found to
// be what it is, and a socket in the workspace is no repository.
func TestRepositoryIsWhatItIs(t *testing.T) {
	b := newBench(t, nil)
	outside := filepath.Join(t.TempDir(), "outside")
	newRepository(t, outside)
	check(t, os.Symlink(outside, b.path("linked")))
	check(t, os.Mkdir(b.path("plain"), 0o755))
	check(t, os.Mkdir(b.path("odd"), 0o755))
	check(t, os.Symlink(filepath.Join(outside, ".git"), b.path("odd/.git")))
	listener, err := net.Listen("unix", b.path("s"))
	check(t, err)
	defer listener.Close()
	for _, repo := range []string{"linked", "plain", "odd", "s", "."} {
		if _, r := b.bundleOut(Bundle{Repo: repo, Ref: "main"}); r.Error == nil {
			t.Errorf("%s was bundled", repo)
		}
		if err := b.do(nucleus.GitCommit, CommitArgs{Message: "m", Repo: repo}, nil); err == nil {
			t.Errorf("%s was committed to", repo)
		}
	}
}

// TestUnbundleKinds takes in a shallow history, a submodule's place, and again what was cut off.
func TestUnbundleKinds(t *testing.T) {
	b := newBench(t, nil)
	origin := filepath.Join(t.TempDir(), "origin")
	newRepository(t, origin)
	first := hostGit(t, origin, "rev-parse", "HEAD")
	put(t, filepath.Join(origin, "b.txt"), "second\n")
	hostGit(t, origin, "add", "-A")
	hostGit(t, origin, "commit", "-q", "-m", "second")
	head := hostGit(t, origin, "rev-parse", "HEAD")
	put(t, filepath.Join(origin, ".git", "shallow"), head+"\n")
	file := filepath.Join(t.TempDir(), "b")
	hostGit(t, origin, "bundle", "create", "-q", file, "HEAD")
	data, err := os.ReadFile(file)
	check(t, err)
	in := Unbundle{Repo: "app", Branch: "agent/work", Commit: head, Shallow: []string{head}}

	bad := in
	bad.Shallow = []string{"../../x"}
	if r := b.bundleIn(bad, data); r.Error == nil || r.Error.Kind != nucleus.KindInvalid {
		t.Errorf("%+v", r)
	}
	check(t, os.MkdirAll(b.path(".cal-CUTOFF.making/.git"), 0o755)) // of a machine that was ended
	if r := b.bundleIn(in, data); r.Error != nil {
		t.Fatal(r.Error)
	}
	if got := hostGit(t, b.path("app"), "log", "--format=%s"); got != "second" {
		t.Errorf("history %q, want the one commit; %s was not handed over", got, first)
	}
	hostGit(t, b.path("app"), "fsck", "--connectivity-only")
	if left, _ := filepath.Glob(b.path(".cal-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	// A submodule's place is an empty directory; one with something in it is not touched.
	sub := in
	sub.Repo = "app/lib/in"
	check(t, os.MkdirAll(b.path("app/lib/in"), 0o755))
	put(t, b.path("app/lib/in/mine"), "mine\n")
	if r := b.bundleIn(sub, data); r.Error == nil || r.Error.Kind != nucleus.KindConflict {
		t.Errorf("a directory that is not empty: %+v", r)
	}
	check(t, os.Remove(b.path("app/lib/in/mine")))
	if r := b.bundleIn(sub, data); r.Error != nil {
		t.Error(r.Error)
	}
	if got := hostGit(t, b.path("app/lib/in"), "rev-parse", "HEAD"); got != head {
		t.Errorf("submodule at %s", got)
	}

	put(t, b.path("app/half"), "of a call that was cut off\n")
	in.Replace = true
	if r := b.bundleIn(in, data); r.Error != nil {
		t.Fatal(r.Error)
	}
	if _, err := os.Stat(b.path("app/half")); !os.IsNotExist(err) {
		t.Errorf("what was cut off is still there: %v", err)
	}
}
