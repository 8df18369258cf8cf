package e2e

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/internal/testenv"
	"cal/nucleus"
)

// quickAgent is an agent that does nothing: what is tried is what comes before it.
func quickAgent(e *testenv.Env) (key string) {
	key = "key-" + random()
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = "http://127.0.0.1:9", key
	ownAgent(e, "quick", "/bin/true")
	return key
}

var escapes = regexp.MustCompile(`\x1b\[[0-9;]*[A-Za-z]|\x1b\][^\x07]*\x07`)

// TestConfirmation reads what a person is shown before an agent starts, and answers.
func TestConfirmation(t *testing.T) {
	e := testenv.New(t)
	key := quickAgent(e)
	repo := e.Repo("greeter", greeter())
	base := repo.Git("rev-parse", "HEAD")[:12]
	env := filepath.Join(e.Dir, "tools.env")
	e.Write(env, "TOKEN=secret-of-the-tools\nDEBUG=1\n")
	e.Write(filepath.Join(repo.Dir, "new.txt"), "not committed\n")
	run := func(more ...string) *testenv.Terminal {
		return e.Terminal(e.Command("cal", append([]string{"run", "--repo", repo.Dir, "--agent", "quick", "--prompt", "x", "--env-file", env}, more...)...))
	}
	says := func(screen string, want ...string) {
		t.Helper()
		plain := strings.Join(strings.Fields(escapes.ReplaceAllString(screen, "")), " ")
		for _, w := range want {
			if !strings.Contains(plain, w) {
				t.Errorf("no %q on the screen:\n%s", w, screen)
			}
		}
		for _, secret := range []string{key, "secret-of-the-tools"} {
			if strings.Contains(screen, secret) {
				t.Errorf("the secret %q is shown:\n%s", secret, screen)
			}
		}
	}

	term := run()
	term.Until("q quits: ")
	asked := term.Screen.String()
	says(asked, "workspace greeter ", "machine not running; gvisor starts it", "environments host", "agent quick", "repo "+repo.Dir+" at "+base,
		"branch agent/quick", "label untrusted: remote file:"+strings.TrimSuffix(repo.Remote, ".git")+" is not in trusted_origins", "policy default", "mode Safe Mode", "tier kernel",
		"approvals none: nobody can approve", "handed over variables of "+env+": DEBUG, TOKEN", "model at http://127.0.0.1:9; its key, from ANTHROPIC_API_KEY, stays on the host",
		"not committed, stays here: 1 changed or new files")
	if strings.Contains(asked, "ISOLATION ACTIVE") || len(e.Pods()) > 0 {
		t.Errorf("something was started before the answer:\n%s", asked)
	}
	term.Type("what?\n")
	term.Until("q quits: ")
	term.Type("q\n")
	if code := term.Wait(); code != 130 || len(e.Pods()) > 0 {
		t.Errorf("q: exit code %d, pods %v", code, e.Pods())
	}

	for name, keys := range map[string]string{"Ctrl-C": "\x03", "end of input": "\x04"} {
		term = run()
		term.Until("q quits: ")
		term.Type(keys)
		if code := term.Wait(); code != 130 {
			t.Errorf("%s at the question: exit code %d, want 130\n%s", name, code, term.Screen)
		}
	}
	if len(e.Entries(of(nucleus.KindPodCreate, ""))) > 0 {
		t.Error("a pod was made without an answer")
	}

	e.Approver()
	e.Write(filepath.Join(e.CAL, "policies", "open.yaml"), "name: open\noperations: {net_connect: always, run_bash: always}\nhosts: {only: [{host: example.org, port: 443}]}\n")
	term = run("--trust", "--policy", "open")
	term.Until("q quits: ")
	says(term.Screen.String(), "label trusted: the person says so", "policy open", "mode mediated, network by policy", "approvals same user")
	term.Type("\r")
	term.Until("CAL ISOLATION ACTIVE")
	if code := term.Wait(); code != 0 {
		t.Errorf("Enter: exit code %d\n%s", code, term.Screen)
	}
	line := "CAL ISOLATION ACTIVE | greeter | quick | host"
	says(term.Screen.String(), line, "mediated, network by policy | tier kernel (gvisor)")
	if screen := term.Screen.String(); !strings.Contains(screen, "\x1b]0;\U0001F512 "+line) || !strings.Contains(screen, "\x1b[1;32m\U0001F512 "+line) ||
		!strings.Contains(screen, "\x1b[1;33m\U0001F512 CAL ISOLATION STARTING") {
		t.Errorf("title, green or yellow is missing: %q", screen)
	}

	e.Vars["NO_COLOR"] = "1"
	term = run("--yes")
	if code := term.Wait(); code != 0 {
		t.Errorf("--yes: exit code %d\n%s", code, term.Screen)
	}
	screen := term.Screen.String()
	says(screen, "workspace greeter, goes on at "+base, "mode Safe Mode", "| Safe Mode | tier kernel (gvisor)")
	if strings.Contains(screen, "q quits") || strings.Contains(screen, "\x1b[1;") {
		t.Errorf("--yes asks, or NO_COLOR is coloured: %q", screen)
	}
	// Without a terminal nobody can be asked; it is said all the same.
	e.Cal("run", "--repo", repo.Dir, "--agent", "quick", "--prompt", "x", "--mode", "contained").Want(t, 0, "approvals    same user", "mode         contained, no network", "CAL ISOLATION ACTIVE")
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// TestConfirmationOfHostileNames: what a stranger wrote into a configuration moves no cursor.
func TestConfirmationOfHostileNames(t *testing.T) {
	e := testenv.New(t)
	quickAgent(e)
	repo := e.Repo("greeter", greeter())
	repo.Git("remote", "set-url", "origin", "https://host.example/\x1b[2J\x1b[1;1H\u202etrusted")
	r := e.Cal("run", "--repo", repo.Dir, "--agent", "quick", "--prompt", "x", "--yes")
	r.Want(t, 0, "untrusted")
	if strings.ContainsAny(r.Stderr, "\x1b\u202e") {
		t.Errorf("a control character is shown: %q", r.Stderr)
	}
}

// otherVersion builds programs that say they are of another version, into a directory.
func otherVersion(t *testing.T, e *testenv.Env, version string) (bin string) {
	t.Helper()
	top, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(top, "nucleus", "version.go")
	raw, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Replace(string(raw), `"`+nucleus.Version+`"`, `"`+version+`"`, 1)
	if other == string(raw) {
		t.Fatalf("%s does not hold %q", source, nucleus.Version)
	}
	e.Write(filepath.Join(e.Dir, "version.go"), other)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{source: filepath.Join(e.Dir, "version.go")}})
	if err != nil {
		t.Fatal(err)
	}
	e.Write(filepath.Join(e.Dir, "overlay.json"), string(overlay))
	bin = filepath.Join(e.Dir, "other-bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-ldflags=-s -w", "-overlay", filepath.Join(e.Dir, "overlay.json"), "-o", bin+"/", "./cmd/cal", "./cmd/nucleus-node", "./cmd/nucleus-tool-proxy")
	build.Dir = top
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Symlink(filepath.Join(e.Bin, "runsc"), filepath.Join(bin, "runsc")); err != nil {
		t.Fatal(err)
	}
	return bin
}

// TestOtherVersion meets a node of another version with pods on it: that is said, nothing is
// replaced without the person's word, and the pods end, as was said. The control is a restart
// of the same version, through which they live.
func TestOtherVersion(t *testing.T) {
	e := testenv.New(t)
	ours, theirs := e.Bin, otherVersion(t, e, "0.0.1")
	e.Bin = theirs
	e.Cal("node", "start").Want(t, 0)
	spec := nucleus.PodSpec{Workspace: "kept", Mode: nucleus.Mediated, Policy: json.RawMessage(`"local-dev"`), Image: nucleus.Image{Kind: "host"}}
	node, ctx := e.Client(), e.Context()
	old, err := node.CreatePod(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Tool(ctx, old.ID, nucleus.WriteFiles, map[string]any{"path": "kept.txt", "content": "kept"}); err != nil {
		t.Fatal(err)
	}
	e.Cal("node", "restart").Want(t, 0)
	if status, err := e.Client().Pod(ctx, old.ID); err != nil || status.State != "running" {
		said, _ := os.ReadFile(filepath.Join(e.CAL, "run", "node.log"))
		t.Fatalf("a restart of the same version: %+v, %v; want the pod running; the node said\n%s", status, err, said)
	}
	pid, err := e.NodePID()
	if err != nil {
		t.Fatal(err)
	}

	e.Bin = ours
	const said = "version 0.0.1, this cal of " + nucleus.Version + "; 1 pod runs on it and ends when it is restarted"
	e.Cal("run", "--", "true").Want(t, 1, said, "cal node restart")
	e.Cal("run", "--yes", "--", "true").Want(t, 1, said, "cal node restart")
	e.Cal("vm", "list").Want(t, 1, said)
	for _, no := range []string{"q\n", "\x03"} {
		term := e.Terminal(e.Command("cal", "run", "--", "true"))
		term.Until("Enter restarts the node, q quits: ")
		if screen := strings.Join(strings.Fields(term.Screen.String()), " "); !strings.Contains(screen, said) {
			t.Errorf("it is not said what comes of the pod:\n%s", term.Screen)
		}
		term.Type(no)
		if code := term.Wait(); code != 130 {
			t.Errorf("%q: exit code %d, want 130\n%s", no, code, term.Screen)
		}
	}
	if now, err := e.NodePID(); err != nil || now != pid {
		t.Fatalf("node %d, %v; want %d, which nobody allowed to replace", now, err, pid)
	}
	term := e.Terminal(e.Command("cal", "run", "--", "echo", "served"))
	term.Until("q quits: ")
	term.Type("\n")
	term.Until("served")
	if code := term.Wait(); code != 0 {
		t.Errorf("exit code %d\n%s", code, term.Screen)
	}
	if status, err := e.Client().Pod(ctx, old.ID); err == nil {
		t.Errorf("the pod of the other version is %+v; it was said that it ends", status)
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	ended := e.Entries(func(entry nucleus.Entry) bool { return entry.Pod == old.ID && entry.Kind == nucleus.KindPodFail })
	if len(ended) != 1 || !strings.Contains(string(ended[0].Data), "0.0.1") {
		t.Errorf("in the log: %+v, want why it ended", ended)
	}
	e.Cal("run", "--workspace", "kept", "--", "cat", "kept.txt").Want(t, 0, "kept") // the named workspace stays
	e.Verify()
}

// TestInterruptedTransfer presses Ctrl-C while a large repository goes in, and while one comes
// back: 130, nothing left, and the next run works on a whole repository.
func TestInterruptedTransfer(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	large := make([]byte, 48<<20)
	if _, err := rand.Read(large); err != nil {
		t.Fatal(err)
	}
	e.Write(filepath.Join(repo.Dir, "large"), string(large))
	repo.Git("add", "-A")
	repo.Git("commit", "--quiet", "-m", "large")
	e.Cal("node", "start").Want(t, 0)
	interrupt := func(moment string, r *testenv.Running) {
		t.Helper()
		r.Cmd.Process.Signal(syscall.SIGINT)
		if got := r.Wait(); got.Code != 130 {
			t.Errorf("%s: want 130\n%v", moment, got)
		}
		if left := e.LeftOfMachines(); len(left) > 0 {
			t.Errorf("%s: left behind:\n%s", moment, strings.Join(left, "\n"))
		}
	}
	record := filepath.Join(e.CAL, "isolation", "vms", "greeter", "repos", "greeter.json")
	for i, more := range []time.Duration{0, 30 * time.Millisecond, 200 * time.Millisecond} {
		os.Remove(record) // each time a first one
		r := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sleep", "300"))
		testenv.Eventually(t, time.Minute, "the transfer has begun", func() bool {
			raw, err := os.ReadFile(record)
			return err == nil && strings.Contains(string(raw), `"pending"`)
		})
		<-time.After(more) // the moment is what varies
		interrupt(fmt.Sprintf("transfer %d", i), r)
	}
	e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "git status --porcelain && git log --oneline && wc -c < large && ls -A ..").Want(t, 0, "large", fmt.Sprint(len(large)), "\ngreeter\n")
	if found, _ := filepath.Glob(filepath.Join(e.CAL, "isolation", "vms", "greeter", "files", ".cal-*")); len(found) > 0 {
		t.Errorf("left in the workspace: %v", found)
	}
	// Cut off when all was in the machine but the record of it: it is handed over again.
	raw, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, []byte(strings.Replace(string(raw), "{", `{"pending":true,`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	e.Cal("run", "--repo", repo.Dir, "--", "git", "status").Want(t, 0, "working tree clean")

	// On its way back.
	r := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sh", "-c", "head -c 48000000 /dev/urandom > back && git add back && git -c user.name=a -c user.email=a@b commit -q -m back"))
	testenv.Eventually(t, time.Minute, "something comes back", func() bool {
		found, _ := filepath.Glob(filepath.Join(e.CAL, "isolation", "vms", "greeter", "repos", "*.work", "*.git", "objects", "pack", "tmp_pack_*"))
		return len(found) > 0
	})
	interrupt("coming back", r)
	e.Cal("run", "--repo", repo.Dir, "--", "true").Want(t, 0, "1 commit")
	e.Cal("repo", "fetch", "--repo", repo.Dir).Want(t, 0, "refs/heads/agent/work")
	repo.Git("rev-parse", "agent/work:back")
	e.Verify()
}

// TestKindsOfRepositories hands over what people have: each works, or says what is so and
// what to do.
func TestKindsOfRepositories(t *testing.T) {
	e := testenv.New(t)
	origin := e.Repo("origin", greeter())
	for _, n := range []string{"second", "third"} {
		e.Write(filepath.Join(origin.Dir, n), n)
		origin.Git("add", "-A")
		origin.Git("commit", "--quiet", "-m", n)
	}
	git := func(dir string, args ...string) string {
		t.Helper()
		r := e.Start(e.Command("git", append([]string{"-C", dir, "-c", "protocol.file.allow=always", "-c", "core.hooksPath=/dev/null"}, args...)...)).Wait()
		if r.Code != 0 {
			t.Fatal(r)
		}
		return strings.TrimSpace(r.Stdout)
	}
	place := func(name string) string { return filepath.Join(e.Dir, name) }
	clone := func(name string, args ...string) string {
		t.Helper()
		git(e.Dir, append(append([]string{"clone", "--quiet"}, args...), "file://"+origin.Dir, place(name))...)
		return place(name)
	}
	// work changes a file and commits in the machine, and says what history it sees there.
	const work = "git log --format=%s && echo changed > greet.sh && git commit -q -am 'in the machine' && git fsck --connectivity-only"
	// whole takes it back by both ways.
	whole := func(t *testing.T, dir string) {
		t.Helper()
		e.Cal("repo", "diff", "--repo", dir).Want(t, 0, "+changed")
		e.Cal("repo", "fetch", "--repo", dir).Want(t, 0, "refs/heads/agent/work")
		if got := git(dir, "log", "-1", "--format=%s", "agent/work"); got != "in the machine" {
			t.Errorf("fetched %q", got)
		}
		git(dir, "fsck", "--connectivity-only")
		e.Cal("repo", "apply", "--repo", dir).Want(t, 0, "greet.sh")
		if got := git(dir, "diff", "--name-only"); got != "greet.sh" {
			t.Errorf("applied %q", got)
		}
	}

	t.Run("shallow", func(t *testing.T) {
		dir := clone("shallow", "--depth", "2")
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "third\nsecond\n", "a shallow clone", "git fetch --unshallow")
		whole(t, dir)
	})
	t.Run("worktree", func(t *testing.T) {
		dir := place("tree of another")
		git(origin.Dir, "worktree", "add", "--quiet", "-b", "other", dir)
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "first")
		whole(t, dir)
		git(origin.Dir, "worktree", "remove", "--force", dir)
		git(origin.Dir, "branch", "--quiet", "-D", "agent/work", "other")
	})
	t.Run("detached", func(t *testing.T) {
		dir := clone("detached")
		git(dir, "checkout", "--quiet", "--detach", "HEAD~1")
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "second\nfirst\n")
		whole(t, dir)
	})
	t.Run("alternates", func(t *testing.T) {
		dir := clone("borrows", "--reference", origin.Dir)
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "first")
		whole(t, dir)
	})
	t.Run("odd path", func(t *testing.T) {
		dir := clone("a b \u00fcn\u00efcode \"'\u65e5\u672c")
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "first")
		whole(t, dir)
	})
	t.Run("sub-folder", func(t *testing.T) {
		dir := clone("folder")
		sub := filepath.Join(dir, "deep", "er")
		e.Write(filepath.Join(sub, "file"), "x")
		git(dir, "add", "-A")
		git(dir, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "deep")
		e.Cal("run", "--repo", sub, "--", "sh", "-c", work).Want(t, 0, "deep\nthird\n")
		whole(t, sub)
	})
	t.Run("of another user", func(t *testing.T) {
		if !isRoot() {
			t.Skip("only root can make one")
		}
		dir := clone("foreign")
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Lchown(path, 65534, 65534)
		})
		if err != nil {
			t.Fatal(err)
		}
		if plain := e.Start(e.Command("git", "-C", dir, "log")).Wait(); plain.Code == 0 {
			t.Log("git itself has nothing against it here")
		}
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "first")
		e.Cal("repo", "fetch", "--repo", dir).Want(t, 0, "refs/heads/agent/work")
	})
	t.Run("bare", func(t *testing.T) {
		dir := clone("bare.git", "--bare")
		e.Cal("run", "--repo", dir, "--", "sh", "-c", work).Want(t, 0, "first")
		e.Cal("repo", "fetch", "--repo", dir).Want(t, 0, "refs/heads/agent/work")
		e.Cal("repo", "apply", "--repo", dir).Want(t, 1, "no working tree", "cal repo fetch")
	})
	t.Run("inside .git", func(t *testing.T) {
		e.Cal("run", "--repo", filepath.Join(origin.Dir, ".git", "objects"), "--", "true").Want(t, 1, "inside of a .git directory")
	})
	t.Run("unborn", func(t *testing.T) {
		dir := place("unborn")
		git(e.Dir, "init", "--quiet", dir)
		e.Cal("run", "--repo", dir, "--", "true").Want(t, 1, "no commit yet on branch main", "git commit first")
	})
	t.Run("partial", func(t *testing.T) {
		origin.Git("config", "uploadpack.allowFilter", "true")
		dir := clone("partial", "--no-checkout", "--filter=blob:none")
		e.Cal("run", "--repo", dir, "--", "true").Want(t, 1, "partial clone", "git fetch --refetch")
	})
	t.Run("sha256", func(t *testing.T) {
		dir := place("sha256")
		git(e.Dir, "init", "--quiet", "--object-format=sha256", dir)
		git(dir, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "x")
		e.Cal("run", "--repo", dir, "--", "true").Want(t, 1, "SHA-256")
	})
	t.Run("submodules", func(t *testing.T) {
		dir := clone("outer")
		git(dir, "submodule", "--quiet", "add", "file://"+origin.Dir, "lib/in")
		git(dir, "submodule", "--quiet", "add", "file://"+origin.Dir, "out")
		git(dir, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "submodules")
		git(dir, "submodule", "--quiet", "deinit", "--force", "out")
		git(dir, "remote", "remove", "origin")
		git(filepath.Join(dir, "lib/in"), "remote", "set-url", "origin", "https://stranger.example/x")
		r := e.Cal("run", "--repo", dir, "--", "sh", "-c", "cat lib/in/third && ls out && git status --porcelain && git -C lib/in log --format=%s && echo clean")
		r.Want(t, 0, "third", "first\nclean\n", "stays in the machine: lib/in", "submodule out stays out: not checked out", "submodule update --init out")
		if strings.Contains(r.Stdout, "lib/in\n") {
			t.Errorf("the submodule is not as it is recorded\n%v", r)
		}
		// What comes in with it counts for its label.
		var labels []string
		for _, entry := range e.Entries(of(nucleus.KindPodStart, "")) {
			labels = append(labels, string(entry.Data))
		}
		if last := labels[len(labels)-1]; !strings.Contains(last, "remote stranger.example/x is not in trusted_origins") || !strings.Contains(last, `"untrusted":true`) {
			t.Errorf("label %s", last)
		}
		r = e.Cal("run", "--repo", dir, "--", "sh", "-c", "cd lib/in && echo x > third && git -c user.name=a -c user.email=a@b commit -qam moved && cd ../.. && echo changed > greet.sh && git commit -qam both")
		r.Want(t, 0, "1 commit")
		e.Cal("repo", "apply", "--repo", dir).Want(t, 0, "commits in submodules stay in the machine: lib/in")
		if got := git(dir, "status", "--porcelain"); got != "M greet.sh" {
			t.Errorf("applied: %q", got)
		}
	})
	t.Run("link in the place of a submodule", func(t *testing.T) {
		dir := clone("linked")
		git(dir, "submodule", "--quiet", "add", "file://"+origin.Dir, "lib")
		git(dir, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "submodule")
		if err := os.RemoveAll(filepath.Join(dir, "lib")); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(origin.Dir, filepath.Join(dir, "lib")); err != nil {
			t.Fatal(err)
		}
		e.Cal("run", "--repo", dir, "--", "sh", "-c", "ls -A lib; echo listed").Want(t, 0, "listed", "submodule lib stays out")
	})
	t.Run("large files", func(t *testing.T) {
		dir := clone("large")
		e.Write(filepath.Join(dir, ".gitattributes"), "*.bin filter=lfs diff=lfs merge=lfs -text\n")
		e.Write(filepath.Join(dir, "movie.bin"), "version https://git-lfs.github.com/spec/v1\noid sha256:"+strings.Repeat("0", 64)+"\nsize 5\n")
		git(dir, "add", "-A")
		git(dir, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "large")
		e.Cal("run", "--repo", dir, "--", "cat", "movie.bin").Want(t, 0, "git-lfs", "Git LFS go in as pointers", "movie.bin")
	})
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}
