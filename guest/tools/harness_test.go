package tools

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/nucleus"
	"cal/wire"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) {
	if workspace := os.Getenv("TEST_TOOLS_WORKSPACE"); workspace != "" {
		runTestWorker(workspace)
		return
	}
	os.Exit(m.Run())
}

// runTestWorker is the worker as a program of its own: process 1 of its pid
// namespace, as in a machine.
func runTestWorker(workspace string) {
	if os.Getenv("TEST_TOOLS_MOUNTED") == "" {
		// A /proc of the new namespace; then again without the rights for that.
		runtime.LockOSThread()
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		unix.Mount("proc", "/proc", "proc", 0, "")
		unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
		err := unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), "TEST_TOOLS_MOUNTED=1"))
		println("exec:", err.Error())
		os.Exit(1)
	}
	c := Config{Workspace: workspace, Home: workspace, Env: map[string]string{"PATH": os.Getenv("PATH")}, MaxTasks: 400}
	conn, err := Inherit(3)
	if err == nil {
		var session *wire.Session
		if session, err = wire.Guest(conn); err == nil {
			err = Serve(context.Background(), session, c)
		}
	}
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	// What is left in this namespace now was left behind.
	if os.Getpid() == 1 {
		var status unix.WaitStatus
		if pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil); err != unix.ECHILD {
			println("process left behind:", pid)
			os.Exit(3)
		}
	}
	os.Exit(0)
}

// socketPair returns both ends of a stream socket.
func socketPair(t testing.TB) (net.Conn, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "host")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	return conn, os.NewFile(uintptr(fds[1]), "guest")
}

// bench is a worker with its caller.
type bench struct {
	t         testing.TB
	workspace string
	session   *wire.Session
	identity  nucleus.Identity
	served    chan error
}

func newBench(t testing.TB, change func(*Config)) *bench {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := Config{Workspace: filepath.Join(dir, "workspace"), Home: dir, Env: map[string]string{"PATH": os.Getenv("PATH")}}
	if err := os.Mkdir(c.Workspace, 0o755); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&c)
	}
	hostConn, guestFile := socketPair(t)
	guestConn, err := net.FileConn(guestFile)
	guestFile.Close()
	if err != nil {
		t.Fatal(err)
	}
	guest, err := wire.Guest(guestConn)
	if err != nil {
		t.Fatal(err)
	}
	host, err := wire.Host(hostConn)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, workspace: c.Workspace, session: host, served: make(chan error, 1), identity: nucleus.Identity{Name: "Ada L", Email: "ada@example.org"}}
	go func() { b.served <- Serve(context.Background(), guest, c) }()
	t.Cleanup(b.end)
	return b
}

// end closes the session and waits for Serve.
func (b *bench) end() {
	b.session.Close()
	select {
	case err := <-b.served:
		if err != nil {
			b.t.Errorf("Serve: %v", err)
		}
		b.served <- nil // end may run twice
	case <-time.After(patience):
		b.t.Error("Serve does not return after the session's end")
	}
}

func (b *bench) path(rel string) string { return filepath.Join(b.workspace, rel) }

func (b *bench) write(rel, content string) {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Dir(b.path(rel)), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(b.path(rel), []byte(content), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) read(rel string) string {
	b.t.Helper()
	data, err := os.ReadFile(b.path(rel))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(data)
}

func marshal(t testing.TB, v any) json.RawMessage {
	t.Helper()
	if raw, ok := v.(string); ok {
		return json.RawMessage(raw)
	}
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func (b *bench) open(kind string, header any) *wire.Stream {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := b.session.Open(ctx, kind, header)
	if err != nil {
		b.t.Fatal(err)
	}
	stream.SetDeadline(time.Now().Add(2 * patience))
	return stream
}

func (b *bench) resolve(call Call, args any) (nucleus.Action, error) {
	b.t.Helper()
	call.Identity = b.identity
	if raw := marshal(b.t, args); len(raw) < wire.MaxCall/2 {
		result, _ := b.brief(call, nil, raw)
		if result.Error != nil {
			return nucleus.Action{}, result.Error
		}
		return *result.Action, nil
	}
	stream := b.open(StreamResolve, call)
	defer stream.Close()
	if err := stream.SendJSON(wire.FrameJSON, Args{Args: marshal(b.t, args)}); err != nil {
		b.t.Fatal(err)
	}
	var resolved Resolved
	if err := stream.RecvJSON(wire.FrameResult, 1<<25, &resolved); err != nil {
		b.t.Fatal(err)
	}
	if resolved.Error != nil {
		return nucleus.Action{}, resolved.Error
	}
	return *resolved.Action, nil
}

// brief makes a brief call; without an action it only resolves.
func (b *bench) brief(call Call, action *nucleus.Action, args []byte) (BriefResult, []byte) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	var permitted []byte
	if action != nil {
		var err error
		if permitted, err = nucleus.Canonical(action); err != nil {
			b.t.Fatal(err)
		}
	}
	reply, err := b.session.Call(ctx, Join(marshal(b.t, call), permitted, args), 1<<25)
	if err != nil {
		b.t.Fatal(err)
	}
	parts, err := Split(reply, 2)
	if err != nil {
		b.t.Fatal(err)
	}
	var result BriefResult
	if err := nucleus.Strict(parts[0], &result); err != nil {
		b.t.Fatal(err)
	}
	return result, parts[1]
}

// begin resolves a call and starts to carry it out.
func (b *bench) begin(call Call, args any) (*wire.Stream, error) {
	b.t.Helper()
	action, err := b.resolve(call, args)
	if err != nil {
		return nil, err
	}
	return b.beginAs(call, args, action), nil
}

func (b *bench) beginAs(call Call, args any, action nucleus.Action) *wire.Stream {
	b.t.Helper()
	call.Identity = b.identity
	stream := b.open(StreamDo, call)
	if err := stream.SendJSON(wire.FrameJSON, Args{Args: marshal(b.t, args), Action: &action}); err != nil {
		b.t.Fatal(err)
	}
	return stream
}

// output is what a call sent before its result.
type output struct {
	stdout, stderr string
	result         Result
}

func (b *bench) finish(stream *wire.Stream) output {
	b.t.Helper()
	defer stream.Close()
	var out output
	for {
		kind, payload, err := stream.Recv(1 << 25)
		if err != nil {
			b.t.Fatalf("waiting for the result: %v (stdout so far %q)", err, out.stdout)
		}
		switch kind {
		case wire.FrameStdout:
			out.stdout += string(payload)
		case wire.FrameStderr:
			out.stderr += string(payload)
		case wire.FrameResult:
			if err := json.Unmarshal(payload, &out.result); err != nil {
				b.t.Fatal(err)
			}
			return out
		}
	}
}

// do carries a call out and decodes its result into value.
func (b *bench) do(op nucleus.Op, args, value any) error {
	b.t.Helper()
	action, err := b.resolve(Call{Op: op}, args)
	if err != nil {
		return err
	}
	var out output
	if raw := marshal(b.t, args); Brief(op) && len(raw) < wire.MaxCall/2 {
		var header BriefResult
		header, out.result.Value = b.brief(Call{Op: op, Identity: b.identity}, &action, raw)
		out.result.Error = header.Error
	} else {
		out = b.finish(b.beginAs(Call{Op: op}, args, action))
	}
	if out.result.Error != nil {
		return out.result.Error
	}
	if value == nil {
		return nil
	}
	reflect.ValueOf(value).Elem().SetZero()
	if err := json.Unmarshal(out.result.Value, value); err != nil {
		b.t.Fatal(err)
	}
	return nil
}

// must is do that has to succeed.
func (b *bench) must(op nucleus.Op, args, value any) {
	b.t.Helper()
	if err := b.do(op, args, value); err != nil {
		b.t.Fatalf("%s %s: %v", op, marshal(b.t, args), err)
	}
}

// sh runs a shell script as run_bash.
func (b *bench) sh(script string) RunResult {
	b.t.Helper()
	var r RunResult
	b.must(nucleus.RunBash, RunArgs{Script: script}, &r)
	return r
}

func wantKind(t testing.TB, err error, kind nucleus.Kind, part string) {
	t.Helper()
	var e *nucleus.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an error of kind %s", err, kind)
	}
	if e.Kind != kind || !strings.Contains(e.Message, part) {
		t.Fatalf("got %s: %q, want %s with %q", e.Kind, e.Message, kind, part)
	}
}

// eventually waits until f holds.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatalf("not within %v: %s", patience, what)
		case <-tick.C:
		}
	}
}

// gone reports whether a process is dead, or only waits to be reaped by others.
func gone(pid int) bool {
	p, err := readProcess(pid)
	return err != nil || p.state == 'Z' || p.state == 'X'
}

// hostGit runs git as the test itself would.
func hostGit(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=T", "GIT_AUTHOR_EMAIL=t@example.org", "GIT_COMMITTER_NAME=T", "GIT_COMMITTER_EMAIL=t@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// newWorkerProcess starts the worker as process 1 of a pid namespace.
func newWorkerProcess(t *testing.T) (*bench, *exec.Cmd) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	conn, guest := socketPair(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "TEST_TOOLS_WORKSPACE="+dir)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{guest}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		guest.Close()
		conn.Close()
		t.Skipf("no pid namespace here: %v", err)
	}
	guest.Close()
	session, err := wire.Host(conn)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, workspace: dir, session: session, served: make(chan error, 1)}
	go func() { b.served <- cmd.Wait() }()
	t.Cleanup(b.end)
	return b, cmd
}

func jsonInto(raw []byte, v any) error { return json.Unmarshal(raw, v) }
