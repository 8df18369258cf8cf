package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/keyfile"
	"cal/internal/testenv"
	"cal/nucleus"
	"cal/wire"
)

// TestExitCodes tries what a person gets wrong: one line of fact, one hint, the exit
// code of doc/cli.md, and nothing left running.
func TestExitCodes(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	empty := filepath.Join(e.Dir, "empty")
	e.Write(filepath.Join(e.Dir, "no-repo", "file"), "")
	if out, err := e.Command("git", "init", "--quiet", empty).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	e.Vars["ANTHROPIC_API_KEY"] = "key"
	e.Vars["PATH"] = "/usr/local/bin:/usr/bin:/bin" // no agent
	for _, c := range []struct {
		name string
		args []string
		code int
		says []string
	}{
		{"unknown flag", []string{"run", "--no-such-flag"}, 2, []string{"--no-such-flag"}},
		{"unknown command", []string{"no-such-command"}, 2, []string{"no-such-command"}},
		{"nothing to run", []string{"run"}, 2, []string{"--agent"}},
		{"agent and command", []string{"run", "--agent", "codex", "--", "true"}, 2, []string{"--agent"}},
		{"argument without dashes", []string{"run", "true"}, 2, []string{`"--"`}},
		{"prompt without agent", []string{"run", "--prompt", "x", "--", "true"}, 2, []string{"--prompt"}},
		{"screen without terminal", []string{"run", "--agent", "codex"}, 2, []string{"terminal"}},
		{"unknown mode", []string{"run", "--mode", "free", "--", "true"}, 2, []string{"free"}},
		{"unknown tier", []string{"run", "--require", "moon", "--", "true"}, 2, []string{"moon"}},
		{"unknown agent", []string{"run", "--agent", "nobody", "--prompt", "x"}, 2, []string{"nobody", "claude-code, codex"}},
		{"no such agent installed", []string{"run", "--agent", "claude-code", "--prompt", "x"}, 1, []string{"hint:", "npm"}},
		{"unknown policy", []string{"run", "--policy", "lax", "--", "true"}, 2, []string{"lax", "local-dev"}},
		{"no such repository", []string{"run", "--repo", filepath.Join(e.Dir, "nowhere"), "--", "true"}, 1, []string{"nowhere"}},
		{"not a repository", []string{"run", "--repo", filepath.Join(e.Dir, "no-repo"), "--", "true"}, 1, []string{"no-repo"}},
		{"no commit", []string{"run", "--repo", empty, "--", "true"}, 1, []string{"no commit yet", "git commit"}},
		{"a tier that is not here", []string{"run", "--require", "vm", "--", "true"}, 1, []string{"vm"}},
		{"unknown driver", []string{"run", "--driver", "moon", "--", "true"}, 2, []string{"moon"}},
		{"no such image", []string{"run", "--image", filepath.Join(e.Dir, "nowhere"), "--", "true"}, 1, []string{"nowhere"}},
		{"bad environment file", []string{"run", "--env-file", filepath.Join(repo.Dir, "greet.sh"), "--", "true"}, 1, []string{"NAME=VALUE"}},
		{"denied by policy", []string{"run", "--policy", "edit-only", "--", "true"}, 3, []string{"run_bash"}},
		{"no such command in the machine", []string{"run", "--", "no-such-program"}, 127, []string{"no-such-program"}},
		{"the command's own", []string{"run", "--", "sh", "-c", "exit 42"}, 42, nil},
		{"false", []string{"run", "--", "false"}, 1, nil},
		{"killed by a signal", []string{"run", "--", "sh", "-c", "kill -TERM $$"}, 128 + 15, nil},
		{"true", []string{"run", "--", "true"}, 0, nil},
		{"nothing came back", []string{"repo", "diff", "--repo", repo.Dir}, 1, []string{"no workspace holds"}},
		{"no such pod", []string{"vm", "stop", "p-nosuchpod0"}, 1, []string{"p-nosuchpod0"}},
		{"no such entry", []string{"audit", "show", "99999999"}, 1, []string{"99999999"}},
		{"no number", []string{"audit", "show", "x"}, 2, []string{`"x"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := e.Cal(c.args...).Want(t, c.code, c.says...)
			if c.code != 0 && len(c.says) > 0 {
				if got := lines(r.Stderr); len(got) > 3 {
					t.Errorf("%d lines, want a fact and a hint\n%v", len(got), r)
				}
			}
			for _, path := range []string{"goroutine ", "panic"} {
				if strings.Contains(r.Stderr, path) {
					t.Errorf("a crash\n%v", r)
				}
			}
		})
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// TestWithoutRunsc starts CAL from a directory that lacks gVisor.
func TestWithoutRunsc(t *testing.T) {
	e := testenv.New(t)
	bin := filepath.Join(e.Dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cal", "nucleus-node", "nucleus-authority", "nucleus-tool-proxy"} {
		if out, err := exec.Command("cp", filepath.Join(e.Bin, name), bin).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	e.Bin = bin
	e.Vars["PATH"] = "/usr/bin:/bin"
	e.Cal("run", "--", "true").Want(t, 1, "runsc")
	e.Cal("doctor").Want(t, 1, "runsc")
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// TestApplyRefusesDirty brings a change back: a working tree with changes of its
// own is left alone, a clean one takes it.
func TestApplyRefusesDirty(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "sed -i s/Helo/Hello/ greet.sh; echo new > new.txt").Want(t, 0)
	e.Write(filepath.Join(repo.Dir, "greet.sh"), "mine\n")
	before := repo.State()
	e.Cal("repo", "apply", "--repo", repo.Dir).Want(t, 1, "greet.sh", "git stash")
	if after := repo.State(); after != before {
		t.Errorf("a dirty tree was changed\nbefore:\n%s\nafter:\n%s", before, after)
	}
	repo.Git("checkout", "--", "greet.sh")
	e.Cal("repo", "apply", "--repo", repo.Dir).Want(t, 0, "greet.sh", "new.txt")
	if raw, err := os.ReadFile(filepath.Join(repo.Dir, "greet.sh")); err != nil || !strings.Contains(string(raw), "Hello") {
		t.Errorf("greet.sh is %q, %v", raw, err)
	}
}

// TestTwoOnOneWorkspace starts a second command while one runs: it says which machine
// holds the workspace, and works when that has ended.
func TestTwoOnOneWorkspace(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	first := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sh", "-c", "echo begun; exec sleep 300"))
	first.Until("begun")
	e.Cal("run", "--repo", repo.Dir, "--", "true").Want(t, 1, `"greeter" is in use by pod `+e.Pods()[0])
	// Without the workspace nothing stands in the way.
	e.Cal("run", "--", "true").Want(t, 0)
	first.Cmd.Process.Signal(syscall.SIGINT)
	if r := first.Wait(); r.Code != 130 {
		t.Errorf("want 130\n%v", r)
	}
	e.Cal("run", "--repo", repo.Dir, "--", "true").Want(t, 0)
}

// TestInterrupt presses Ctrl-C at many moments of a run; other signals are as good.
func TestInterrupt(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	e.Cal("node", "start").Want(t, 0)
	run := func() *testenv.Running {
		return e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sh", "-c", "echo begun; exec sleep 300"))
	}
	end := func(moment string, r *testenv.Running, sig syscall.Signal) {
		t.Helper()
		started := time.Now()
		r.Cmd.Process.Signal(sig)
		if got := r.Wait(); got.Code != 130 {
			t.Errorf("%s: want 130\n%v", moment, got)
		}
		if took := time.Since(started); took > 20*time.Second {
			t.Errorf("%s: cal took %s to end", moment, took)
		}
		testenv.Eventually(t, 10*time.Second, moment+": nothing is left", func() bool { return len(e.LeftOfMachines()) == 0 })
	}
	interrupt := func(moment string, r *testenv.Running) {
		t.Helper()
		end(moment, r, syscall.SIGINT)
	}
	for _, after := range []int{15, 40, 80, 120, 180, 250, 400} {
		r := run()
		time.Sleep(time.Duration(after) * time.Millisecond) // the moment is what varies
		interrupt(fmt.Sprintf("after %d ms", after), r)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP} {
		r := run()
		r.Until("begun")
		end(fmt.Sprintf("%v while the command runs", sig), r, sig)
	}

	r := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sh", "-c", "trap '' INT TERM; echo begun; while :; do sleep 1; done"))
	r.Until("begun")
	interrupt("a command that ignores it", r)

	// The command hears it and may clean up.
	r = e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sh", "-c", "trap 'echo cleaned > cleaned.txt; exit 1' INT; echo begun; sleep 300 & wait"))
	r.Until("begun")
	interrupt("a command that cleans up", r)
	e.Cal("run", "--repo", repo.Dir, "--", "cat", "cleaned.txt").Want(t, 0, "cleaned")
	e.Verify()
}

// pod starts a machine for a test that speaks to the node itself.
func pod(t *testing.T, e *testenv.Env, policy string, resources nucleus.Resources) nucleus.PodStatus {
	t.Helper()
	e.Cal("node", "start").Want(t, 0)
	node := e.Client()
	status, err := node.CreatePod(e.Context(), nucleus.PodSpec{
		Mode: nucleus.Mediated, Policy: json.RawMessage(strconv.Quote(policy)), Image: nucleus.Image{Kind: "host"}, Resources: resources,
	})
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// TestTooLarge sends what is too large: it is refused in words, and the pod still serves.
func TestTooLarge(t *testing.T) {
	e := testenv.New(t)
	p := pod(t, e, "local-dev", nucleus.Resources{})
	node, ctx := e.Client(), e.Context()
	serves := func() {
		t.Helper()
		if _, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"argv": []string{"true"}}); err != nil {
			t.Errorf("the pod does not serve: %v", err)
		}
	}
	before := rss(t, e)
	for name, args := range map[string]map[string]any{
		"body of 100 MB": {"path": "x", "content": strings.Repeat("x", 100<<20)},
		"body of 17 MB":  {"path": "x", "content": strings.Repeat("x", 17<<20)},
	} {
		_, err := node.Tool(ctx, p.ID, nucleus.WriteFiles, args)
		if err == nil || nucleus.AsError(err).Kind != nucleus.KindTooLarge {
			t.Errorf("%s: %.300v, want too_large", name, err)
		}
		serves()
	}
	if grown := rss(t, e) - before; grown > 64<<20 {
		t.Errorf("the node grew by %d MB", grown>>20)
	}
	// A signed body that is declared small and sent large is cut off, too.
	if code := rawPost(t, e, p.ID, 100<<20); code != http.StatusRequestEntityTooLarge && code != http.StatusUnauthorized && code != 0 {
		t.Errorf("an endless body: status %d", code)
	}
	serves()
	// An argv of 1 MB is carried whole or refused in words, by every program on its way.
	arg := strings.Repeat("a", 100<<10)
	argv := []string{"printf", "%s", arg, arg, arg, arg, arg, arg, arg, arg, arg, arg}
	value, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"argv": argv})
	if err != nil {
		if e := nucleus.AsError(err); e.Kind != nucleus.KindTooLarge && e.Kind != nucleus.KindInvalid {
			t.Errorf("argv of 1 MB: %.300v", err)
		}
	} else if len(value) < 1000 {
		t.Errorf("argv of 1 MB: %.300s", value)
	}
	if _, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"argv": append(argv, argv...)}); err == nil || len(err.Error()) > 4096 {
		t.Errorf("argv of 2 MB: %.300v, want a short refusal", err)
	}
	serves()
	if r := e.Cal(append([]string{"run", "--"}, argv...)...); r.Code != 0 || len(r.Stdout) != 10*len(arg) {
		r.Want(t, 2) // refused in words
	}
	if err := node.DeletePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
	e.Verify()
}

// rawPost signs a small request and sends a body of many bytes with it.
func rawPost(t *testing.T, e *testenv.Env, pod string, size int64) int {
	t.Helper()
	key, err := keyfile.Load(filepath.Join(e.CAL, "keys", "operator.key"))
	if err != nil {
		t.Fatal(err)
	}
	path := "/v1/pods/" + pod + "/tools/write_files"
	req, err := http.NewRequest(http.MethodPost, "http://nucleus"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	signer := &wire.Signer{KeyID: "operator", Ed25519: key, Now: time.Now}
	if err := signer.Sign(req, pod, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	req.Body, req.ContentLength = io.NopCloser(io.LimitReader(zeros{}, size)), -1
	resp, err := wire.UnixClient(e.Socket()).Do(req)
	if err != nil {
		return 0 // hung up on
	}
	resp.Body.Close()
	return resp.StatusCode
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// rss is the node's resident memory in bytes.
func rss(t *testing.T, e *testenv.Env) int64 {
	t.Helper()
	pid, err := e.NodePID()
	if err != nil {
		t.Fatal(err)
	}
	return rssOf(t, pid)
}

func rssOf(t *testing.T, pid int) int64 {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatalf("no VmRSS of %d", pid)
	return 0
}

// TestEndlessOutput lets commands print without end: to a caller that collects, to a
// terminal that reads, to one that does not. Memory of the host stays bounded.
func TestEndlessOutput(t *testing.T) {
	e := testenv.New(t)
	p := pod(t, e, "local-dev", nucleus.Resources{})
	node, ctx := e.Client(), e.Context()
	const most = 160 << 20
	value, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"argv": []string{"sh", "-c", "yes | head -c 200000000"}})
	if err != nil || len(value) > 8<<20 || !strings.Contains(string(value), "cut") {
		t.Errorf("collected: %d bytes, %v: %.100s, want it cut and said so", len(value), err, value)
	}
	if now := rss(t, e); now > most {
		t.Errorf("the node has %d MB after an output of 200 MB", now>>20)
	}
	// A reader that reads everything.
	read := e.Start(e.Command("cal", "run", "--", "sh", "-c", "yes | head -c 60000000"))
	if r := read.Wait(); r.Code != 0 || read.Stdout.Total() != 60000000 {
		t.Errorf("read: exit code %d, %d bytes of 60000000", r.Code, read.Stdout.Total())
	}
	// A reader that stops reading: everything behind it waits.
	cmd := e.Command("cal", "run", "--", "yes")
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	cmd.Stdout = pw
	stalled := e.Start(cmd)
	pw.Close()
	if _, err := io.ReadFull(pr, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"argv": []string{"sleep", "0.5"}}); err != nil {
			t.Errorf("beside a stalled reader: %v", err)
		}
	}
	if node, cal := rss(t, e), rssOf(t, stalled.Cmd.Process.Pid); node > most || cal > most {
		t.Errorf("with a stalled reader the node has %d MB, cal %d MB", node>>20, cal>>20)
	}
	pr.Close()
	stalled.Cmd.Process.Signal(syscall.SIGINT)
	if r := stalled.Wait(); r.Code != 130 && r.Code != 128+int(syscall.SIGPIPE) {
		t.Errorf("a stalled run that is interrupted: exit code %d", r.Code)
	}
	if err := node.DeletePod(ctx, p.ID); err != nil {
		t.Error(err)
	}
}

// TestForkBomb lets commands multiply: in a machine for which nobody stated a limit, and, in
// other ways, in one with a small one.
func TestForkBomb(t *testing.T) {
	e := testenv.New(t)
	testForkBomb(t, e, nucleus.Resources{}, map[string]string{"doubling": "bomb() { bomb | bomb & }; bomb; sleep 100"})
	testForkBomb(t, e, nucleus.Resources{Pids: 400}, map[string]string{
		"one parent":  "while :; do sleep 100 & done",
		"new session": "bomb() { setsid sh -c 'sleep 100 & sleep 100 &' & }; while :; do bomb; done",
	})
}

func testForkBomb(t *testing.T, e *testenv.Env, limits nucleus.Resources, bombs map[string]string) {
	t.Helper()
	p := pod(t, e, "local-dev", limits)
	node, ctx := e.Client(), e.Context()
	how := map[string]string{}
	for _, l := range p.Limits {
		how[l.Resource] = l.How
	}
	if how["pids"] != "enforced" || how["memory"] == "none" || how["memory"] == "" {
		t.Fatalf("limits %+v: want pids enforced, memory at least watched", p.Limits)
	}
	before := available(t)
	for name, script := range bombs {
		least, stop := make(chan int64, 1), make(chan struct{})
		go func() { least <- leastAvailable(stop) }()
		started := time.Now()
		value, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{
			"argv": []string{"sh", "-c", script}, "timeout_s": 60, // a plain sh: bash waits and tries again
		})
		close(stop)
		taken := before - <-least
		t.Logf("%s: after %s, %d MB: %.300s %v", name, time.Since(started), taken>>20, value, err)
		if said := fmt.Sprintf("%s %v", value, err); !strings.Contains(said, "processes") && !strings.Contains(said, "annot fork") {
			t.Errorf("%s: nobody says that there are too many processes: %.300s", name, said)
		}
		if taken > 2<<30 {
			t.Errorf("%s: the host gave %d MB for it", name, taken>>20)
		}
		testenv.Eventually(t, 20*time.Second, "the pod serves", func() bool {
			value, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"script": "ps -e | wc -l"})
			return err == nil && strings.Contains(string(value), `"exit_code":0`)
		})
	}
	// Control: what stays below the limit works.
	value, err := node.Tool(ctx, p.ID, nucleus.RunBash, map[string]any{"script": "n=0; while [ $n -lt 200 ]; do sleep 30 & n=$((n+1)); done; echo made $n"})
	if err != nil || !strings.Contains(string(value), "made 200") {
		t.Errorf("200 processes: %s %v", value, err)
	}
	if err := node.DeletePod(e.Context(), p.ID); err != nil {
		t.Error(err)
	}
}

// available is the host's memory that programs can still have.
func available(t *testing.T) int64 {
	t.Helper()
	free, err := memAvailable()
	if err != nil {
		t.Fatal(err)
	}
	return free
}

func memAvailable() (int64, error) {
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for _, line := range lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

// leastAvailable looks until it is told to stop.
func leastAvailable(stop <-chan struct{}) (least int64) {
	least = 1 << 62
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return least
		case <-tick.C:
			if free, err := memAvailable(); err == nil {
				least = min(least, free)
			}
		}
	}
}

// TestFullDisk fills the disk under CAL_HOME: what cannot be recorded is not done, and
// the error says so.
func TestFullDisk(t *testing.T) {
	if !isRoot() {
		t.Skip("needs root: mounts a small tmpfs for CAL_HOME")
	}
	e := testenv.New(t)
	if err := os.MkdirAll(e.CAL, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", e.CAL, "tmpfs", 0, "size=24m,mode=700"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(e.CAL, unix.MNT_DETACH) })
	p := pod(t, e, "local-dev", nucleus.Resources{})
	node, ctx := e.Client(), e.Context()
	write := func(name string) error {
		_, err := node.Tool(ctx, p.ID, nucleus.WriteFiles, map[string]any{"path": name, "content": "x"})
		return err
	}
	if err := write("before"); err != nil {
		t.Fatal(err)
	}
	size := len(e.Log())
	filler := filepath.Join(e.CAL, "filler")
	if err := fill(filler); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for i := range 200 { // the log may have room in its last page, and so may the salts
		err := write(fmt.Sprintf("full-%d", i))
		if err == nil {
			continue
		}
		refused++
		if !strings.Contains(err.Error(), "no space left") && !strings.Contains(err.Error(), "log") {
			t.Errorf("on a full disk: %v", err)
		}
	}
	if refused < 100 {
		t.Errorf("%d of 200 operations on a full disk were refused", refused)
	}
	if r := e.Cal("run", "--", "true"); r.Code == 0 {
		t.Errorf("a machine started on a full disk\n%v", r)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	// The node goes on by itself, and nothing was done without a record.
	testenv.Eventually(t, 5*time.Second, "the node writes again", func() bool { return write("after") == nil })
	e.Verify()
	if now := len(e.Log()); now <= size {
		t.Errorf("the log has %d entries, before the disk was full %d", now, size)
	}
	files, err := filepath.Glob(filepath.Join(e.CAL, "run", "pods", p.ID, "workspace", "files", "*"))
	if err != nil {
		t.Fatal(err)
	}
	recorded := len(e.Entries(func(entry nucleus.Entry) bool {
		return entry.Kind == nucleus.KindIntent && entry.Op == nucleus.WriteFiles && entry.Verdict == nucleus.Allow
	}))
	if len(files) == 0 || len(files) > recorded {
		t.Errorf("%d files were written, %d writes recorded", len(files), recorded)
	}
	// What ends effects goes on a full disk too; the record of it follows.
	if err := fill(filler); err != nil {
		t.Fatal(err)
	}
	for write("full") == nil { // until there is no room in the log's last page
	}
	if err := node.DeletePod(ctx, p.ID); err != nil {
		t.Errorf("on a full disk a pod cannot be ended: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 5*time.Second, "the end of the pod is recorded", func() bool {
		return len(e.Entries(func(entry nucleus.Entry) bool {
			return entry.Pod == p.ID && (entry.Kind == nucleus.KindPodStop || entry.Kind == nucleus.KindPodEnd)
		})) == 2
	})
	e.Verify()
	e.Cal("node", "stop").Want(t, 0)
	testenv.Eventually(t, 5*time.Second, "the node has ended", func() bool { return len(e.Processes()) == 0 })
	// The kernel lets go of a dead process's files a moment after its end.
	testenv.Eventually(t, 10*time.Second, "CAL_HOME can be unmounted", func() bool { return unix.Unmount(e.CAL, 0) == nil })
}

// fill writes until the disk is full.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, piece := range []int{1 << 20, 4096, 1} {
		block := bytes.Repeat([]byte{1}, piece)
		for {
			if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

// TestApprovalExitCode is a command that an approval stands before.
func TestApprovalExitCode(t *testing.T) {
	e := testenv.New(t)
	e.Write(filepath.Join(e.CAL, "policies", "asking.yaml"), "name: asking\noperations: {run_bash: ask}\n")
	e.Cal("run", "--policy", "asking", "--", "true").Want(t, 4, "approv")
	e.Approver()
	stop := e.DenyAll("no")
	e.Cal("run", "--policy", "asking", "--", "true").Want(t, 4, "cal: an approval is wanted: cal approve a-", "the person said no: no")
	stop()
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}
