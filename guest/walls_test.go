package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cal/guest/boot"
	"cal/guest/tools"
	"cal/internal/testenv/vm"
	"cal/nucleus"
	"cal/wire"
)

// The walls inside a machine, on a real Linux kernel: this test program is booted as its first
// process, is the proxy there, and runs itself as the tools and as the agent, where it tries
// what it must not be able to do. Each attempt is also made outside of the jails, where it
// succeeds.

func TestMain(m *testing.M) {
	if boot.IsInit() {
		boot.Main()
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "init":
			what, say := vm.Asked()
			said = say
			os.Args = []string{os.Args[0], "-test.run=^" + what + "$", "-test.v"}
			code := m.Run()
			fmt.Printf("inside: exit code %d\n", code)
			os.Exit(code)
		case "jail":
			fmt.Fprintln(os.Stderr, RunJail())
			os.Exit(1)
		case "agent-init":
			code, err := AgentInit(os.Args[3:])
			fmt.Fprint(os.Stderr, err)
			os.Exit(code)
		case "try":
			attempt(os.Args[2:])
			os.Exit(0)
		}
	}
	code := m.Run()
	os.RemoveAll(built.dir)
	os.Exit(code)
}

// program is this test program as a static one, built once.
func program(t *testing.T) string {
	vm.Kernel(t) // or skip
	built.Do(func() {
		dir, err := os.MkdirTemp("", "cal-guest-")
		if err != nil {
			t.Fatal(err)
		}
		built.dir, built.path = dir, vm.Build(t, "cal/guest", dir)
	})
	return built.path
}

var built struct {
	sync.Once
	dir, path string
}

// TestWalls boots a machine in which TestInside goes on.
func TestWalls(t *testing.T) {
	m := vm.Start(t, vm.Config{Init: program(t), Line: fmt.Sprint("cal.tasks=", tasks), MemoryMB: 512})
	m.Greet("TestInside")
	m.Ended()
	if said := m.Console(); !strings.Contains(said, "inside: exit code 0") || !strings.Contains(said, "--- PASS: TestInside") {
		t.Error("what was tried inside did not pass")
	}
}

// TestSyncs: what a finished call wrote is there after kill -9 of the machine, and it is
// there because it was written out.
func TestSyncs(t *testing.T) {
	for what, want := range map[string]string{"TestInsideSyncs": "by a call", "TestInsideDoesNotSync": ""} {
		t.Run(what, func(t *testing.T) {
			if want == "" && os.Getenv("CAL_LONG") == "" {
				t.Skip("the control is a slow one: make test-long")
			}
			init := program(t)
			workspace := filepath.Join(t.TempDir(), "workspace")
			if err := vm.Store(t).Blank(t.Context(), workspace, 64<<20); err != nil {
				t.Fatal(err)
			}
			m := vm.Start(t, vm.Config{Init: init, Workspace: workspace})
			vm.Wait(t, m.Greet(what), "written")
			m.Kill()
			for _, name := range []string{"/file", "/by-command"} {
				if got := vm.ReadFile(t, workspace, name); got != want {
					t.Errorf("%s after kill -9: %q, want %q", name, got, want)
				}
			}
		})
	}
}

var said func(string) // to the host, in a machine

func TestInsideSyncs(t *testing.T)       { writeInside(t, true) }
func TestInsideDoesNotSync(t *testing.T) { writeInside(t, false) }

// writeInside has the tools write, as calls do, and waits for the machine's end.
func writeInside(t *testing.T, sync bool) {
	p := proxyInside(t, func(c *Config) { c.Sync = sync })
	args, err := json.Marshal(tools.WriteArgs{Path: "file", Content: "by a call"})
	if err != nil {
		t.Fatal(err)
	}
	if result := asCall(t, p, nucleus.WriteFiles, args); result.Error != nil {
		t.Fatal(result.Error)
	}
	if output, code := asTools(t, p, []string{"try", "leave " + nucleus.MachineWorkspace + "/by-command"}); code != 0 {
		t.Fatal(output)
	}
	said("written")
	time.Sleep(time.Hour) // the host ends the machine
}

// proxyInside starts the proxy's part in the machine that this process is in.
func proxyInside(t *testing.T, change func(*Config)) *Proxy {
	t.Helper()
	if os.Args[0] != nucleus.MachineProxy {
		t.Skip("runs in a machine that another test boots")
	}
	p := newLock(t).p
	_, p.session = sessions(t)
	change(&p.config)
	if err := p.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestInside(t *testing.T) {
	p := proxyInside(t, func(c *Config) { c.MaxPids = tasks })
	unix.Umask(0)
	if err := os.Mkdir("/run/open", 0o777); err != nil { // everybody may write there, but for Landlock
		t.Fatal(err)
	}
	t.Run("walls", func(t *testing.T) { insideWalls(t, p) })
	t.Run("neighbours", func(t *testing.T) { insideNeighbours(t, p) })
	t.Run("limits", func(t *testing.T) { insideLimits(t, p) })
}

const tasks = 100 // that each user of the machine may have

// wall is something that is tried by the tools, by the agent, and where no jail is: by the
// machine's root, or where the root may do anything, by the tools' user. What each must get
// is what it says, or the error that the kernel gave. "" is not tried.
type wall struct {
	try                      string
	tools, agent, root, user string
}

const (
	done                        = "done"
	eperm                       = "operation not permitted"
	eacces                      = "permission denied"
	enosys                      = "function not implemented"
	efault                      = "invalid argument" // it came to the kernel's own checks
	enoent                      = "no such file or directory"
	noFamily, refused, readOnly = "address family not supported by protocol", "connection refused", "read-only file system"
	killed                      = "signal: bad system call"

	toolsStatus = "Uid 1000 1000 1000 1000 CapInh 0 CapPrm 0 CapEff 0 CapBnd 0 CapAmb 0 NoNewPrivs 1 Seccomp 2 core 0"
	agentStatus = "Uid 1001 1001 1001 1001 CapInh 0 CapPrm 0 CapEff 0 CapBnd 0 CapAmb 0 NoNewPrivs 1 Seccomp 2 core 0"
)

var walls = []wall{
	{"status", toolsStatus, agentStatus, "", ""},
	// Calls that the filter refuses, and the kernel itself in other words.
	{"mount", eperm, eperm, enoent, ""},
	{"unshare", eperm, eperm, done, ""},
	{"userns", eperm, eperm, "no space left on device", ""},
	{"bpf", eperm, eperm, efault, ""},
	{"keyctl", eperm, eperm, done, ""},
	{"userfaultfd", eperm, eperm, done, ""},
	{"fanotify", eperm, eperm, done, ""},
	{"perf", eperm, eperm, enoent, ""},
	{"handle", eperm, eperm, done, ""},
	{"ldt", eperm, eperm, done, ""},
	{"io_uring", enosys, enosys, done, ""},
	{"newer than the filter", enosys, enosys, enosys, ""},
	{"memfd", done, eperm, done, ""},
	{"ptrace", done, eperm, done, ""},
	// The 32-bit ABI: getpid, socket(AF_VSOCK), unshare(CLONE_NEWUTS).
	{"child int80 20", killed, killed, done, ""},
	{"child int80 359 40", killed, killed, done, ""},
	{"child int80 310 67108864", killed, killed, done, ""},
	// Sockets: vsock, netlink generic and audit, packet, crypto; then what programs need; then raw ones.
	{"socket 40 1 0", noFamily, noFamily, done, ""},
	{"socket 16 3 16", noFamily, noFamily, done, ""},
	{"socket 16 3 9", noFamily, noFamily, done, ""},
	{"socket 17 3 768", noFamily, noFamily, eperm, ""},
	{"socket 38 5 0", noFamily, noFamily, noFamily, ""},
	{"socket 1 1 0", done, done, done, ""},
	{"socket 2 1 0", done, done, done, ""},
	{"socket 10 1 0", done, done, done, ""},
	{"socket 16 3 0", done, done, done, ""},
	{"socket 2 3 1", eperm, eperm, eperm, ""},
	{"interfaces", "lo up", "lo up", "lo 0", ""},
	{"dial tcp " + SOCKSAddr, done, refused, "", ""},
	{"dial tcp " + MCPAddr, refused, done, "", ""},
	{"dial unix " + attachAddr, refused, refused, done, ""},
	// Files.
	{"write /", readOnly, eacces, readOnly, readOnly},
	{"write /etc", readOnly, eacces, readOnly, readOnly},
	{"write /dev", readOnly, eacces, readOnly, readOnly},
	{"write /run", eacces, enoent, done, eacces},
	{"write /run/open", eacces, enoent, done, done}, // Landlock alone is in the way
	{"write /tmp", done, done, done, done},
	{"write /dev/shm", done, done, done, done},
	{"write " + nucleus.MachineHome, done, done, done, done},
	{"write " + nucleus.MachineWorkspace, done, enoent, done, done},
	{"list /dev", "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero", "full null pts random shm tty urandom zero", "", ""},
	{"list /", "", ".nucleus dev etc home proc tmp", "", ""},
	{"list /.nucleus", "agent nucleus-tool-proxy", "init", "", ""},
	{"list " + nucleus.MachineAgent, eacces, enoent, done, ""},
	{"list " + nucleus.MachineHome, "", "work", "", ""},
	{"list /usr", "bin", enoent, "bin", ""},
	{"list /sys", "", enoent, "", ""},
	// Processes: the jail's own, for a user without a jail himself, for the root all.
	{"processes", "few", "few", "many", "few"},
	{"read /proc/1/environ", eacces, "", "", ""},
}

func insideWalls(t *testing.T, p *Proxy) {
	var all []string
	for _, w := range walls {
		all = append(all, w.try)
	}
	places := []struct {
		name string
		run  func(t *testing.T, args ...string) (string, int)
		want func(w wall) string
	}{
		{"tools", func(t *testing.T, args ...string) (string, int) { return asTools(t, p, args) }, func(w wall) string { return w.tools }},
		{"agent", func(t *testing.T, args ...string) (string, int) { return asAgent(t, p, args) }, func(w wall) string { return w.agent }},
		{"control: root", func(t *testing.T, args ...string) (string, int) { return plainly(t, 0, args) }, func(w wall) string { return w.root }},
		{"control: user", func(t *testing.T, args ...string) (string, int) { return plainly(t, 1000, args) }, func(w wall) string { return w.user }},
	}
	for _, place := range places {
		output, code := place.run(t, append([]string{"try"}, all...)...)
		got := strings.Split(strings.TrimSpace(output), "\n")
		if len(got) != len(walls) || code != 0 {
			t.Errorf("%s: exit code %d: %s", place.name, code, output)
			continue
		}
		for i, w := range walls {
			if want := place.want(w); want != "" && got[i] != want {
				t.Errorf("%s: %s: %q, want %q", place.name, w.try, got[i], want)
			}
		}
	}
}

// plainly runs this program outside of the jails.
func plainly(t *testing.T, uid uint32, args []string) (string, int) {
	t.Helper()
	cmd := exec.Command(nucleus.MachineProxy, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: true}}
	output, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(output), cmd.ProcessState.ExitCode()
}

// asTools runs this program as a command of the tools.
func asTools(t *testing.T, p *Proxy, args []string) (string, int) {
	t.Helper()
	raw, err := json.Marshal(tools.RunArgs{Argv: append([]string{nucleus.MachineProxy}, args...)})
	if err != nil {
		t.Fatal(err)
	}
	result := asCall(t, p, nucleus.RunBash, raw)
	var run tools.RunResult
	if result.Error != nil {
		t.Fatalf("tools, %q: %v", args, result.Error)
	}
	if err := json.Unmarshal(result.Value, &run); err != nil {
		t.Fatal(err)
	}
	return run.Stdout, run.ExitCode
}

// asCall has the tools' worker do something.
func asCall(t *testing.T, p *Proxy, op nucleus.Op, args json.RawMessage) tools.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), vm.Patience)
	defer cancel()
	call := tools.Call{Op: op}
	action, err := p.resolveCommand(ctx, call, args)
	if err != nil {
		t.Fatalf("%s %s: %v", op, args, err)
	}
	stream, err := p.worker.Open(ctx, tools.StreamDo, call)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(vm.Patience))
	var result tools.Result
	if err = stream.SendJSON(wire.FrameJSON, tools.Args{Args: args, Action: action}); err == nil {
		err = stream.RecvJSON(wire.FrameResult, maxResult, &result)
	}
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// asAgent runs this program as the agent.
func asAgent(t *testing.T, p *Proxy, args []string) (string, int) {
	t.Helper()
	run, err := p.startAgent(AgentStart{}, AgentProgram{Argv: append([]string{agentInit}, args...)})
	if err != nil {
		t.Fatal(err)
	}
	run.mu.Lock()
	run.seated = true
	run.mu.Unlock()
	var output strings.Builder
	for {
		piece, state := run.take(0)
		if state != chunkReady {
			return output.String(), run.code
		}
		if piece.kind == wire.FrameStdout {
			output.Write(piece.data)
		}
	}
}

// attempt tries one thing after the other and says of each, in a line, what came of it, "done"
// where there is nothing else to say.
func attempt(all []string) {
	for _, one := range all {
		args := strings.Fields(one)
		trial := trials[args[0]]
		if trial == nil {
			trial = trials[one]
		}
		said, err := trial(args[1:])
		var errno syscall.Errno
		switch {
		case errors.As(err, &errno):
			said = errno.Error()
		case err != nil:
			said, _, _ = strings.Cut(err.Error(), " (")
		case said == "":
			said = done
		}
		fmt.Println(said)
	}
}

func call(trap uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(trap, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

var params [256]byte // zeros, for calls that want to be told something

var trials map[string]func(args []string) (string, error)

func init() {
	at := uintptr(unsafe.Pointer(&params))
	simple := map[string]func() error{
		"mount":       func() error { return unix.Mount("tmpfs", "/nowhere", "tmpfs", 0, "") },
		"unshare":     func() error { return unix.Unshare(unix.CLONE_NEWUTS) },
		"userns":      func() error { return childOf(syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}, "nothing") },
		"nothing":     func() error { return nil },
		"sleep":       func() error { time.Sleep(time.Minute); return nil },
		"io_uring":    func() error { return call(unix.SYS_IO_URING_SETUP, 4, at) },
		"bpf":         func() error { return call(unix.SYS_BPF, 0, 0, 0) },
		"keyctl":      func() error { return call(unix.SYS_KEYCTL, 0, ^uintptr(3), 1) }, // the user's keyring
		"userfaultfd": func() error { return call(unix.SYS_USERFAULTFD, unix.O_CLOEXEC) },
		"fanotify":    func() error { return call(unix.SYS_FANOTIFY_INIT, 0, 0) },
		"perf":        func() error { return call(unix.SYS_PERF_EVENT_OPEN, at, 0, ^uintptr(0), ^uintptr(0), 0) },
		"ldt":         func() error { return call(unix.SYS_MODIFY_LDT, 0, at, 16) },
		"handle": func() error {
			_, _, err := unix.NameToHandleAt(unix.AT_FDCWD, "/tmp", 0)
			return err
		},
		"leave behind": func() error {
			left := exec.Command("/proc/self/exe", "try", "sleep")
			left.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			return left.Start()
		},
		"memfd":                 func() error { _, err := unix.MemfdCreate("x", 0); return err },
		"ptrace":                traced,
		"newer than the filter": func() error { return call(newestCall + 1) },
		"eat": func() error {
			for {
				block := make([]byte, 16<<20)
				for i := 0; i < len(block); i += 4096 {
					block[i] = 1
				}
				eaten = append(eaten, block)
			}
		},
	}
	trials = map[string]func(args []string) (string, error){
		"int80":      func(args []string) (string, error) { return "", int80(args) },
		"status":     status,
		"interfaces": interfaces,
		"processes":  processesInSight,
		"fork":       fork,
		"neighbours": neighbours,
		"child": func(args []string) (string, error) { // in a process of its own, for what ends it
			return "", childOf(syscall.SysProcAttr{}, strings.Join(args, " "))
		},
		"socket": func(args []string) (string, error) {
			var family, kind, protocol int
			fmt.Sscan(strings.Join(args, " "), &family, &kind, &protocol)
			_, err := unix.Socket(family, kind, protocol)
			return "", err
		},
		"dial": func(args []string) (string, error) {
			conn, err := net.DialTimeout(args[0], args[1], 5*time.Second)
			if err == nil {
				conn.Close()
			}
			return "", err
		},
		"write": func(args []string) (string, error) {
			name := filepath.Join(args[0], "intruder")
			defer os.Remove(name)
			return "", os.WriteFile(name, []byte("x"), 0o666)
		},
		"leave": func(args []string) (string, error) { return "", os.WriteFile(args[0], []byte("by a call"), 0o600) },
		"fill": func(args []string) (string, error) {
			file, err := os.Create(args[0])
			for block := make([]byte, 1<<20); err == nil; {
				_, err = file.Write(block)
			}
			return "", err
		},
		"read": func(args []string) (string, error) {
			data, err := os.ReadFile(args[0])
			return string(data), err
		},
		"list": func(args []string) (string, error) {
			entries, err := os.ReadDir(args[0])
			var names []string
			for _, entry := range entries {
				names = append(names, entry.Name())
			}
			return strings.Join(names, " "), err
		},
		"score": func([]string) (string, error) { // it is set as soon as the process is there
			for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
				text, err := os.ReadFile("/proc/self/oom_score_adj")
				if string(text) != "0\n" || err != nil || time.Now().After(deadline) {
					return strings.TrimSpace(string(text)), err
				}
			}
		},
	}
	for name, f := range simple {
		trials[name] = func([]string) (string, error) { return "", f() }
	}
}

func childOf(attr syscall.SysProcAttr, what string) error {
	child := exec.Command("/proc/self/exe", "try", what)
	child.SysProcAttr = &attr
	output, err := child.Output()
	if said := strings.TrimSpace(string(output)); err == nil && said != done {
		err = errors.New(said)
	}
	return err
}

func traced() error {
	runtime.LockOSThread()
	child := exec.Command("/proc/self/exe", "try", "nothing")
	child.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := child.Start(); err != nil {
		return err
	}
	child.Process.Kill()
	child.Wait()
	return nil
}

// status is what the kernel says of this process's rights.
func status([]string) (string, error) {
	text, err := os.ReadFile("/proc/self/status")
	var said []string
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if strings.HasPrefix(name, "Cap") || name == "Uid" || name == "NoNewPrivs" || name == "Seccomp" {
			said = append(said, name)
			for _, field := range strings.Fields(value) {
				said = append(said, strings.ReplaceAll(field, noCapability, "0"))
			}
		}
	}
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
		return "", err
	}
	return strings.Join(append(said, "core", fmt.Sprint(core.Max)), " "), err
}

func interfaces([]string) (string, error) {
	list, err := net.Interfaces() // asks by netlink
	var said []string
	for _, i := range list {
		said = append(said, i.Name, (i.Flags & net.FlagUp).String())
	}
	return strings.Join(said, " "), err
}

func processesInSight([]string) (string, error) {
	entries, err := os.ReadDir("/proc")
	pids := 0
	for _, entry := range entries {
		if strings.Trim(entry.Name(), "0123456789") == "" {
			pids++
		}
	}
	if pids <= 3 {
		return "few", err
	}
	return "many", err
}

// neighbours counts the processes whose environment can be read, beside this one.
func neighbours([]string) (string, error) {
	names, err := filepath.Glob("/proc/[0-9]*/environ")
	n := 0
	for _, name := range names {
		env, err := os.ReadFile(name)
		if err == nil && len(env) > 0 && !strings.Contains(name, fmt.Sprintf("/%d/", os.Getpid())) {
			n++
		}
	}
	return fmt.Sprint(n), err
}

// fork starts processes until there can be no more.
func fork([]string) (string, error) {
	for n := 0; ; n++ {
		if err := exec.Command("/proc/self/exe", "try", "sleep").Start(); err != nil || n > 3*tasks {
			return fmt.Sprint(n), nil
		}
	}
}

var eaten [][]byte

// int80 makes a call by the 32-bit ABI, which every 64-bit program can: its number and first
// argument are in args.
func int80(args []string) error {
	var nr, arg uint32
	fmt.Sscan(strings.Join(args, " "), &nr, &arg)
	code := []byte{0xbb, 0, 0, 0, 0, 0xb9, 1, 0, 0, 0, 0x31, 0xd2, 0xb8, 0, 0, 0, 0, 0xcd, 0x80, 0xc3} // mov ebx, arg; mov ecx, 1; xor edx, edx; mov eax, nr; int 0x80; ret
	*(*uint32)(unsafe.Pointer(&code[1])), *(*uint32)(unsafe.Pointer(&code[13])) = arg, nr
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	copy(page, code)
	entry := unsafe.Pointer(&page[0])
	closure := unsafe.Pointer(&entry)
	if got := (*(*func() int32)(unsafe.Pointer(&closure)))(); got < 0 {
		return syscall.Errno(-got)
	}
	return nil
}

// insideNeighbours: one command can look at another, as a debugger does, and what a command leaves
// behind ends with it, for the worker can look at all.
func insideNeighbours(t *testing.T, p *Proxy) {
	raw, err := json.Marshal(tools.RunArgs{Argv: []string{nucleus.MachineProxy, "try", "sleep"}, Background: true})
	if err != nil {
		t.Fatal(err)
	}
	var background tools.RunResult
	result := asCall(t, p, nucleus.RunBash, raw)
	if result.Error != nil || json.Unmarshal(result.Value, &background) != nil {
		t.Fatalf("%+v", result)
	}
	if output, _ := asTools(t, p, []string{"try", "neighbours"}); output != "1\n" {
		t.Errorf("a command can look at %q others, want 1", output)
	}
	if raw, err = json.Marshal(tools.RunArgs{Stop: background.ID}); err != nil {
		t.Fatal(err)
	}
	if result := asCall(t, p, nucleus.RunBash, raw); result.Error != nil {
		t.Error(result.Error)
	}
	if output, _ := asTools(t, p, []string{"try", "leave behind"}); output != "done\n" {
		t.Errorf("leaving a process behind: %q", output)
	}
	if output, _ := asTools(t, p, []string{"try", "neighbours"}); output != "0\n" {
		t.Errorf("%q processes were left behind", output)
	}
}

// insideLimits: what is said, and who goes on, where limits are reached.
func insideLimits(t *testing.T, p *Proxy) {
	score, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil || string(score) != "-900\n" {
		t.Errorf("the proxy gives way with %q, %v", score, err)
	}
	if output, _ := asTools(t, p, []string{"try", "score"}); output != "500\n" {
		t.Errorf("a command gives way with %q", output)
	}
	if output, code := asTools(t, p, []string{"try", "eat"}); code != 128+int(unix.SIGKILL) {
		t.Errorf("a command that takes all memory: %q, exit code %d", output, code)
	}
	output, code := asTools(t, p, []string{"try", "fork"})
	var n int
	fmt.Sscan(output, &n)
	if code == 0 && (n < 10 || n > tasks) { // or it was ended as one that runs away
		t.Errorf("%q: %d processes where %d tasks are allowed", output, n, tasks)
	}
	if output, _ := asTools(t, p, []string{"try", "fill " + nucleus.MachineWorkspace + "/large"}); output != "no space left on device\n" {
		t.Errorf("filling a disk of 64 MiB: %q", output)
	}
	args, err := json.Marshal(tools.WriteArgs{Path: "small", Content: strings.Repeat("x", 100<<10)})
	if err != nil {
		t.Fatal(err)
	}
	if result := asCall(t, p, nucleus.WriteFiles, args); result.Error == nil || !strings.Contains(result.Error.Message, "no space left on the workspace's disk") {
		t.Errorf("a file on a full disk: %+v", result.Error)
	}
	if output, _ := asTools(t, p, []string{"try", "nothing"}); output != "done\n" {
		t.Errorf("after all that: %q", output)
	}
}
