package firecracker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/site"
)

// TestJailerArguments are golden: they are the wall.
func TestJailerArguments(t *testing.T) {
	j := jail{Dir: "/cal/run/m-1", ID: "cal-0123456789abcdef0123456789abcdef", Exec: "firecracker", UID: 0x50000001, FileSize: 1 << 30}
	const golden = `--id cal-0123456789abcdef0123456789abcdef --exec-file /opt/firecracker --uid 1342177281 --gid 1342177281 --chroot-base-dir /cal/run/m-1
--resource-limit no-file=1024 --resource-limit fsize=1073741824 --cgroup-version %d --parent-cgroup cal-firecracker %s
--new-pid-ns --daemonize -- --log-path /log --level Info --show-level`
	for version, cgroup := range map[int]string{
		1: "--cgroup memory.limit_in_bytes=603979776 --cgroup memory.memsw.limit_in_bytes=603979776 --cgroup cpu.shares=2048 --cgroup cpu.cfs_quota_us=200000 --cgroup pids.max=34",
		2: "--cgroup memory.max=603979776 --cgroup memory.swap.max=0 --cgroup cpu.weight=200 --cgroup cpu.max=200000 100000 --cgroup pids.max=34",
	} {
		j.Limits = limits{Version: version, Memory: (512 + overheadMB) << 20, NoSwap: true, CPUs: 2, Tasks: 2 + vmmTasks}
		want := fmt.Sprintf(strings.ReplaceAll(golden, "\n", " "), version, cgroup)
		if got := strings.Join(j.args("/opt/firecracker"), " "); got != want {
			t.Errorf("cgroup version %d:\n got %s\nwant %s", version, got, want)
		}
	}
}

// TestSwap: a snapshot is taken only where nothing of a guest can be swapped out.
func TestSwap(t *testing.T) {
	table := func(text string) string {
		path := filepath.Join(t.TempDir(), "swaps")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	const heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	none, some := table(heading), table(heading+"/dev/vdb                                partition\t999420\t\t0\t\t-2\n")
	for name, c := range map[string]struct {
		noSwap bool
		swaps  string
		want   error
	}{
		"forbidden":                {true, some, nil},
		"no swap":                  {false, none, nil},
		"a kernel that knows none": {false, none + "-missing", nil},
		"swap":                     {false, some, errSwap},
	} {
		if err := (jail{Limits: limits{NoSwap: c.noSwap}}).unswapped(c.swaps); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	must(t, jail{Limits: limits{NoSwap: true}}.unswapped(swaps))
}

// jailAt is a jail that nobody runs in.
func jailAt(t *testing.T) jail {
	t.Helper()
	dir, err := os.MkdirTemp("", "j") // short: sockets are bound in it by their paths
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	j := jail{Dir: dir, ID: newInstance(), Exec: "firecracker", UID: uint32(os.Getuid())}
	must(t, j.make())
	return j
}

// TestHostileJail: a Firecracker that was taken over turns what it owns into links to
// what belongs to others. Nothing is followed.
func TestHostileJail(t *testing.T) {
	j := jailAt(t)
	elsewhere := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(elsewhere, "s"))
	must(t, err)
	defer listener.Close()
	must(t, unix.Mkfifo(filepath.Join(elsewhere, "p"), 0o600))
	must(t, os.Mkdir(j.path("run"), 0o700))
	own, err := net.Listen("unix", j.path(vsockSocket))
	must(t, err)
	defer own.Close()

	conn, err := j.dialSocket(t.Context(), vsockSocket) // control
	must(t, err)
	conn.Close()
	pipe, err := j.openPipe(consolePipe) // control
	must(t, err)
	pipe.Close()

	for name, spoil := range map[string]func(){
		"a link to a socket":         func() { must(t, os.Symlink(filepath.Join(elsewhere, "s"), j.path(apiSocket))) },
		"a hard way out":             func() { must(t, os.Symlink("../../../../../.."+elsewhere+"/s", j.path(apiSocket))) },
		"a link through a directory": func() { must(t, os.Remove(j.path("run"))); must(t, os.Symlink(elsewhere, j.path("run"))) },
		"a file":                     func() { must(t, os.WriteFile(j.path(apiSocket), nil, 0o600)) },
		"a pipe":                     func() { must(t, unix.Mkfifo(j.path(apiSocket), 0o600)) },
		"a magic link":               func() { must(t, os.Symlink("/proc/self/fd/0", j.path(apiSocket))) },
		"nothing":                    func() {},
		"a socket of the same name": func() {
			must(t, os.Remove(j.path("run")))
			must(t, os.Symlink(elsewhere, j.path("run")))
			must(t, os.Link(filepath.Join(elsewhere, "s"), filepath.Join(elsewhere, "firecracker.socket")))
		},
		"a jail whose root is a link": func() { must(t, os.Rename(j.root(), j.root()+"-")); must(t, os.Symlink(elsewhere, j.root())) },
	} {
		t.Run(name, func(t *testing.T) {
			spoil()
			if conn, err := j.dialSocket(t.Context(), apiSocket); err == nil {
				conn.Close()
				t.Error("it was followed")
			}
			if info, err := os.Lstat(j.root()); err == nil && info.Mode()&os.ModeSymlink != 0 {
				must(t, os.Remove(j.root()))
				must(t, os.Rename(j.root()+"-", j.root()))
			}
			must(t, os.RemoveAll(j.path("run")))
			must(t, os.Mkdir(j.path("run"), 0o700))
		})
	}
	must(t, os.Remove(j.path(consolePipe)))
	must(t, os.Symlink(filepath.Join(elsewhere, "p"), j.path(consolePipe)))
	if pipe, err := j.openPipe(consolePipe); err == nil {
		pipe.Close()
		t.Error("a link to a pipe was followed")
	}
	must(t, os.Remove(j.path(consolePipe)))
	must(t, os.WriteFile(j.path(consolePipe), []byte("without end"), 0o600))
	if pipe, err := j.openPipe(consolePipe); err == nil {
		pipe.Close()
		t.Error("a file was taken for a pipe")
	}
}

// TestStranger: who has read a Firecracker's arguments can use them, but is another user.
func TestStranger(t *testing.T) {
	j := jail{Dir: t.TempDir(), ID: newInstance(), Exec: "firecracker", UID: lowestID}
	shell, err := exec.LookPath("sh")
	must(t, err)
	cmd := &exec.Cmd{Path: shell, Args: []string{"/firecracker", "-c", "read x", j.ID}}
	stdin, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { stdin.Close(); cmd.Wait() }()
	running, err := process.Find(j.ID)
	must(t, err)
	if len(running) != 1 || running[0].Name != "/firecracker" { // control
		t.Fatalf("found %+v", running)
	}
	running[0].Close()
	if p, err := j.find(); !errors.Is(err, machine.ErrGone) {
		p.Close()
		t.Errorf("a stranger is taken for the Firecracker: %v", err)
	}
}

// TestStopped: a thread that is traced and does not stop is not waited for without end.
func TestStopped(t *testing.T) {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command("sleep", "60")
	must(t, cmd.Start())
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	if err := unix.PtraceSeize(cmd.Process.Pid); err != nil {
		t.Skipf("this user may not trace its own child: %v", err)
	}
	traced := thread{id: cmd.Process.Pid}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if signal, err := traced.stopped(ctx); !errors.Is(err, errTrying) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a thread that runs: %v, %v", signal, err)
	}
	must(t, unix.PtraceInterrupt(cmd.Process.Pid)) // control
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if signal, err := traced.stopped(ctx); err != nil || signal != unix.SIGTRAP {
		t.Errorf("a thread that is stopped: %v, %v", signal, err)
	}
}

// TestLongPath: the path of a jail's socket may be longer than an address can be.
func TestLongPath(t *testing.T) {
	j := jail{Dir: filepath.Join(t.TempDir(), strings.Repeat("long/", 60)), ID: newInstance(), Exec: "firecracker", UID: uint32(os.Getuid())}
	must(t, j.make())
	must(t, os.Chdir(j.root()))
	t.Cleanup(func() { must(t, os.Chdir("/")) })
	listener, err := net.Listen("unix", vsockSocket)
	must(t, err)
	defer listener.Close()
	conn, err := j.dialSocket(t.Context(), vsockSocket)
	must(t, err)
	conn.Close()
}

// TestConnectPort: what answers on a vsock may be in the guest's hands.
func TestConnectPort(t *testing.T) {
	for name, c := range map[string]struct{ answer, want string }{
		"nobody listens":     {"", "EOF"},
		"a refusal":          {"NO\n", `answers "NO"`},
		"a line without end": {strings.Repeat("O", 100), "longer than"},
		"somebody listens":   {"OK 1073741824\nfirst bytes", ""},
	} {
		t.Run(name, func(t *testing.T) {
			j := jailAt(t)
			listener, err := net.Listen("unix", j.path(vsockSocket))
			must(t, err)
			defer listener.Close()
			heard := make(chan string, 1)
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				line, _ := bufio.NewReader(conn).ReadString('\n')
				heard <- line
				fmt.Fprint(conn, c.answer)
			}()
			conn, err := j.dialPort(t.Context(), wirePort)
			if got := <-heard; got != "CONNECT 1024\n" {
				t.Errorf("firecracker heard %q", got)
			}
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
				return
			}
			must(t, err)
			defer conn.Close()
			rest := make([]byte, 11)
			if _, err := conn.Read(rest); err != nil || string(rest) != "first bytes" {
				t.Errorf("the guest's first bytes: %q, %v", rest, err)
			}
		})
	}
	t.Run("silence", func(t *testing.T) {
		j := jailAt(t)
		listener, err := net.Listen("unix", j.path(vsockSocket))
		must(t, err)
		defer listener.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if conn, err := j.dialPort(ctx, wirePort); err == nil {
			conn.Close()
			t.Error("connected to silence")
		}
	})
}

// TestConsoleIsBounded: a guest that prints while nobody reads fills one pipe, and one
// that prints for ever is kept to its last words.
func TestConsoleIsBounded(t *testing.T) {
	j := jailAt(t)
	writer, err := os.OpenFile(j.path(consolePipe), os.O_RDWR|unix.O_NONBLOCK, 0)
	must(t, err)
	defer writer.Close()
	must(t, writer.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
	n, err := writer.Write(make([]byte, 1<<20))
	if err == nil || n > 64<<10 {
		t.Errorf("with no reader %d bytes were taken, %v", n, err)
	}
	var console pipe
	console.file, err = j.openPipe(consolePipe)
	must(t, err)
	done := make(chan struct{})
	go func() { console.record(); close(done) }()
	must(t, writer.SetWriteDeadline(time.Now().Add(10*time.Second)))
	for range 64 {
		_, err := writer.Write([]byte(strings.Repeat("x", 4095) + "\n"))
		must(t, err)
	}
	_, err = writer.WriteString("last words")
	must(t, err)
	for deadline := time.Now().Add(10 * time.Second); !strings.HasSuffix(console.String(), "last words"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the last words are not kept")
		}
	}
	if got := len(console.String()); got > 16<<10 {
		t.Errorf("%d bytes are kept", got)
	}
	console.file.Close()
	<-done
}

// TestDamagedRecord: what a record names is deleted, so it must not name anything else.
func TestDamagedRecord(t *testing.T) {
	whole := record{Driver: name, Jail: jail{ID: newInstance(), Exec: "firecracker", UID: lowestID}}
	whole.Template = whole.Jail
	for what, spoil := range map[string]func(*record){
		"a way up":              func(r *record) { r.Jail.Exec = ".." },
		"a path":                func(r *record) { r.Jail.Exec = "../../etc" },
		"no program":            func(r *record) { r.Jail.Exec = "" },
		"an instance of others": func(r *record) { r.Jail.ID = "" },
		"a guessable instance":  func(r *record) { r.Jail.ID = "1" },
		"the host's root":       func(r *record) { r.Jail.UID = 0 },
		"another driver":        func(r *record) { r.Driver = "gvisor" },
		"nothing":               nil,
	} {
		t.Run(what, func(t *testing.T) {
			dir, rec := t.TempDir(), whole
			if spoil != nil {
				spoil(&rec)
			}
			must(t, durable.Store(filepath.Join(dir, site.RecordFile), rec))
			if _, err := loadRecord(dir); (err == nil) != (spoil == nil) {
				t.Errorf("%+v: %v", rec, err)
			}
		})
	}
}

// TestCheckFS: a jail needs devices and programs.
func TestCheckFS(t *testing.T) {
	must(t, checkFS(jailDir(t)))
	for flags, want := range map[int64]string{unix.ST_NODEV: "nodev", unix.ST_NOEXEC | unix.ST_NODEV | unix.ST_NOSUID: "nodev and noexec", unix.ST_NOSUID: ""} {
		if got := strings.Join(hindering(flags), " and "); got != want {
			t.Errorf("flags %#x: %q, want %q", flags, got, want)
		}
	}
}

// TestRates: each processor adds to what a machine's disks may do.
func TestRates(t *testing.T) {
	one, four := limit(1), limit(4)
	if one.Bandwidth.Size != 20<<20 || four.Bandwidth.Size != 80<<20 || four.Ops.Size != 4*one.Ops.Size || one.Bandwidth.Refill != 100 {
		t.Errorf("%+v, %+v", *one.Bandwidth, *four.Bandwidth)
	}
}

var _ machine.Driver = (*Driver)(nil)
