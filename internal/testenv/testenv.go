// Package testenv is the whole product in one temporary directory, for tests: the
// real programs, a CAL_HOME and a HOME of their own, a person's repository with a
// remote.
//
// Nothing in it stands in for a part of the product, and nothing of the settings or
// the environment of whoever runs the tests takes part. It promises that what a test started
// ends with the test, and that a test fails which leaves a process, a mount or a pod behind.
package testenv

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/audit"
	"cal/internal/idmap"
	"cal/internal/keyfile"
	"cal/node/client"
	"cal/nucleus"
)

// patience bounds every command of a test.
const patience = 2 * time.Minute

// Env is one person on one host.
type Env struct {
	Dir  string            // removed at the end; everything below lies in it
	Home string            // HOME
	CAL  string            // CAL_HOME
	Bin  string            // the programs
	Vars map[string]string // the environment of every command; tests may change it

	// Credential is whom commands run as; nil: whoever runs the test.
	Credential *syscall.Credential

	// As, where set, runs the commands given to it as Credential; see SubIDs.
	As []string

	patience time.Duration
	t        *testing.T
}

// Programs are what a run needs, in $CAL_BIN or the module's bin.
var programs = []string{"cal", "nucleus-node", "nucleus-authority", "nucleus-tool-proxy", "runsc"}

// New returns a person who has never used CAL. The test is skipped where a program has
// not been built.
func New(t *testing.T) *Env {
	t.Helper()
	bin := binaries(t)
	// Short: the path of a socket far below it has 107 bytes at most.
	dir, err := os.MkdirTemp("", "cal-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	e := &Env{Dir: dir, Home: filepath.Join(dir, "home"), CAL: filepath.Join(dir, "cal"), Bin: bin, patience: patience, t: t}
	e.Vars = map[string]string{
		"PATH": os.Getenv("PATH"), "HOME": e.Home, "CAL_HOME": e.CAL, "LC_ALL": "C.UTF-8", "TERM": "xterm", "GIT_CONFIG_NOSYSTEM": "1",
	}
	if err := os.MkdirAll(e.Home, 0o700); err != nil {
		t.Fatal(err)
	}
	e.Write(filepath.Join(e.Home, ".gitconfig"), "[user]\n\tname = Test Person\n\temail = person@example.org\n[init]\n\tdefaultBranch = main\n")
	t.Cleanup(e.close)
	return e
}

func binaries(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("CAL_BIN")
	if bin == "" {
		bin = filepath.Join(root(t), "bin")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range programs {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			t.Skipf("%v (make builds it; CAL_BIN names another directory)", err)
		}
	}
	return bin
}

// root is the module's directory: the nearest above the test's that holds go.mod.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatal("no go.mod above the test")
	return ""
}

// Agents puts the real coding agents of $CAL_TEST_AGENTS in front of PATH, or skips.
func (e *Env) Agents() {
	e.t.Helper()
	e.Vars["PATH"] = e.Package(".bin") + ":" + e.Vars["PATH"]
}

// Package returns the directory of an npm package that tests drive, or skips.
func (e *Env) Package(name string) string {
	e.t.Helper()
	dir := os.Getenv("CAL_TEST_AGENTS")
	if dir == "" {
		dir = filepath.Join(root(e.t), ".cache", "agents", "node_modules")
	}
	dir = filepath.Join(dir, filepath.FromSlash(name))
	if _, err := os.Stat(dir); err != nil {
		e.t.Skipf("no %s: %v (make agents installs what tests take from npm; CAL_TEST_AGENTS names another node_modules)", name, err)
	}
	return dir
}

// Build compiles a program of this module as a static one that runs in a machine.
func (e *Env) Build(pkg string) string {
	e.t.Helper()
	program := filepath.Join(e.Dir, filepath.Base(pkg)+"-program")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, pkg)
	cmd.Dir = root(e.t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		e.t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
	return program
}

// Write makes a file of the person's, with its directories.
func (e *Env) Write(path, content string) {
	e.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		e.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		e.t.Fatal(err)
	}
}

// Result is what a program did.
type Result struct {
	Args           []string
	Stdout, Stderr string
	Code           int
}

func (r Result) String() string {
	return fmt.Sprintf("%s\nexit code %d\nstdout: %s\nstderr: %s", strings.Join(r.Args, " "), r.Code, clip(r.Stdout), clip(r.Stderr))
}

func clip(s string) string {
	const most = 6000
	if len(s) > most {
		return s[:most/2] + fmt.Sprintf("\n... %d bytes ...\n", len(s)-most) + s[len(s)-most/2:]
	}
	return s
}

// Want fails the test unless the exit code is this one and every text stands in
// what was printed.
func (r Result) Want(t *testing.T, code int, texts ...string) Result {
	t.Helper()
	if r.Code != code {
		t.Fatalf("want exit code %d\n%v", code, r)
	}
	for _, text := range texts {
		if !strings.Contains(r.Stdout+r.Stderr, text) {
			t.Fatalf("want %q in the output\n%v", text, r)
		}
	}
	return r
}

// Cal runs cal to its end.
func (e *Env) Cal(args ...string) Result {
	e.t.Helper()
	return e.Start(e.Command("cal", args...)).Wait()
}

// Command is a program of CAL, or of PATH, in the person's environment and HOME.
func (e *Env) Command(name string, args ...string) *exec.Cmd {
	if slices.Contains(programs, name) {
		name = filepath.Join(e.Bin, name)
	}
	if e.As != nil {
		name, args = e.As[0], slices.Concat(e.As[1:], []string{name}, args)
	}
	cmd := exec.Command(name, args...)
	cmd.Dir = e.Home
	for _, key := range slices.Sorted(maps.Keys(e.Vars)) {
		cmd.Env = append(cmd.Env, key+"="+e.Vars[key])
	}
	if e.Credential != nil && e.As == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: e.Credential}
	}
	return cmd
}

// Running is a program that has been started.
type Running struct {
	Cmd            *exec.Cmd
	Stdout, Stderr *Output
	t              *testing.T
	ended          chan struct{}
}

// Start starts a command; one that outlives the test's patience is killed.
func (e *Env) Start(cmd *exec.Cmd) *Running {
	e.t.Helper()
	r := &Running{Cmd: cmd, Stdout: newOutput(), Stderr: newOutput(), t: e.t, ended: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = r.Stdout
	}
	cmd.Stderr = r.Stderr
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	killer := time.AfterFunc(e.patience, func() { cmd.Process.Kill() })
	go func() {
		defer close(r.ended)
		defer killer.Stop()
		cmd.Wait()
	}()
	e.t.Cleanup(func() { cmd.Process.Kill(); <-r.ended })
	return r
}

// Wait returns when the program has ended.
func (r *Running) Wait() Result {
	<-r.ended
	state := r.Cmd.ProcessState
	code := state.ExitCode()
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		code = 128 + int(status.Signal())
	}
	return Result{r.Cmd.Args, r.Stdout.String(), r.Stderr.String(), code}
}

// Ended is closed when the program has ended.
func (r *Running) Ended() <-chan struct{} { return r.ended }

// Until waits for a text on standard output, and UntilError on standard error.
func (r *Running) Until(text string) {
	r.t.Helper()
	r.until(r.Stdout, text)
}

func (r *Running) UntilError(text string) {
	r.t.Helper()
	r.until(r.Stderr, text)
}

func (r *Running) until(out *Output, text string) {
	r.t.Helper()
	for {
		has, changed := out.look(text)
		if has {
			return
		}
		select {
		case <-changed:
		case <-r.ended:
			if has, _ := out.look(text); !has {
				r.t.Fatalf("ended before %q\n%v", text, r.Wait())
			}
		}
	}
}

// Log reads the whole log.
func (e *Env) Log() []nucleus.Entry {
	e.t.Helper()
	var entries []nucleus.Entry
	for entry, err := range audit.Read(filepath.Join(e.CAL, "log"), 0) {
		if err != nil {
			e.t.Fatal(err)
		}
		entries = append(entries, entry)
	}
	return entries
}

// Entries are those of the log that want says yes to.
func (e *Env) Entries(want func(nucleus.Entry) bool) []nucleus.Entry {
	e.t.Helper()
	return slices.DeleteFunc(e.Log(), func(entry nucleus.Entry) bool { return !want(entry) })
}

// Verify checks the log as a stranger does, with directory and key alone.
func (e *Env) Verify() *audit.Report {
	e.t.Helper()
	key, err := keyfile.Load(filepath.Join(e.CAL, "keys", "log.key"))
	if err != nil {
		e.t.Fatal(err)
	}
	report, err := audit.Verify(filepath.Join(e.CAL, "log"), audit.VerifyOptions{Key: audit.VerifierKey(nucleus.LogOrigin, key.Public().(ed25519.PublicKey))})
	if err != nil {
		e.t.Fatal(err)
	}
	if !report.OK() {
		e.t.Errorf("the log does not verify: %v", report.Problems)
	}
	return report
}

// Client speaks to the running node as the person.
func (e *Env) Client() *client.Client {
	e.t.Helper()
	key, err := keyfile.Load(filepath.Join(e.CAL, "keys", "operator.key"))
	if err != nil {
		e.t.Fatal(err)
	}
	return client.New(e.Socket(), "operator", key)
}

// Socket is the node's.
func (e *Env) Socket() string { return filepath.Join(e.CAL, "run", "node.sock") }

// Context ends with the test, or when its patience does.
func (e *Env) Context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), e.patience)
	e.t.Cleanup(cancel)
	return ctx
}

// Eventually asks until ready says yes, at most for limit.
func Eventually(t *testing.T, limit time.Duration, what string, ready func() bool) {
	t.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("after %s: not so: %s", limit, what)
		}
	}
}

// close ends the node, whatever the test did to it, and looks at what is left.
func (e *Env) close() {
	for _, p := range e.Pods() {
		e.Command("cal", "vm", "stop", p).Run()
	}
	if out, err := e.Command("cal", "node", "stop", "--all").CombinedOutput(); err != nil && !bytes.Contains(out, []byte("no node runs")) {
		e.t.Errorf("cal node stop: %v: %s", err, out)
	}
	left := e.Left()
	for end := time.Now().Add(15 * time.Second); len(left) > 0 && time.Now().Before(end); left = e.Left() {
		time.Sleep(10 * time.Millisecond) // daemons answer before they have ended
	}
	if len(left) > 0 {
		log, _ := os.ReadFile(filepath.Join(e.CAL, "run", "node.log"))
		e.t.Errorf("left behind:\n%s\nthe node says:\n%s", strings.Join(left, "\n"), log)
	}
	e.reap()
	if err := idmap.RemoveAll(context.Background(), e.Dir); err != nil {
		e.t.Error(err)
	}
}

// reap kills what a failed test left, so that it does not hurt the next one.
func (e *Env) reap() {
	for _, p := range e.Processes() {
		syscall.Kill(p.PID, syscall.SIGKILL)
	}
	for _, m := range e.mounts() {
		syscall.Unmount(m, syscall.MNT_DETACH)
	}
}

var errNoNode = errors.New("no node of this CAL_HOME runs")

// NodePID is the process id of the node that serves: the kernel names it as the other
// end of its socket. Others may wait for its place.
func (e *Env) NodePID() (int, error) {
	conn, err := net.DialTimeout("unix", e.Socket(), time.Second)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errNoNode, err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) { peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if peerErr != nil {
		return 0, peerErr
	}
	return int(peer.Pid), nil
}
