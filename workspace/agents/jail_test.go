package agents

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"golang.org/x/sys/unix"

	"cal/internal/script"
	"cal/nucleus"
)

// The agent's world in the tests is what a machine gives it: a root that holds
// the listed layers, a few devices, /proc and a generated /etc; an unprivileged
// user; pid, mount, network and IPC namespaces of its own; and two loopback
// endpoints. The test program itself is the jail's first process.

const (
	guestHome  = "/home/agent"
	mcpAddr    = "127.0.0.1:7001"
	modelAddr  = "127.0.0.1:7002"
	agentUID   = 65534
	jailedEnv  = "CAL_TEST_JAIL"
	runTimeout = 60 * time.Second
)

type jailPlan struct {
	Agent   nucleus.Agent
	Dir     string
	Sockets map[string]string // TCP address in the jail -> unix socket outside
}

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		pretend(filepath.Base(os.Args[0]))
		return
	}
	if file := os.Getenv(jailedEnv); file != "" {
		code, err := jailed(file)
		if err != nil {
			fmt.Fprintln(os.Stderr, "jail:", err)
			code = 125
		}
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// jailed is the first process of the jail.
func jailed(file string) (int, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	var plan jailPlan
	if err := json.Unmarshal(raw, &plan); err != nil {
		return 0, err
	}
	if err := loopback(); err != nil {
		return 0, err
	}
	for addr, socket := range plan.Sockets {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return 0, err
		}
		go relay(l, socket)
	}
	dns, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		return 0, err
	}
	go noNames(dns)
	root, err := buildRoot(plan)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(plan.Agent.Argv[0], plan.Agent.Argv[1:]...)
	cmd.Path = plan.Agent.Argv[0] // of the new root
	cmd.Err = nil
	cmd.Dir = plan.Dir
	cmd.Env = []string{"HOME=" + guestHome, "PATH=/usr/local/bin:/usr/bin:/bin", "TMPDIR=/tmp", "USER=agent"}
	for name, value := range plan.Agent.Env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: agentUID, Gid: agentUID}}
	if err := cmd.Run(); cmd.ProcessState == nil {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req := struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: unix.IFF_UP}
	copy(req.name[:], "lo")
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&req))); e != 0 {
		return fmt.Errorf("raising lo: %w", e)
	}
	return nil
}

func relay(l net.Listener, socket string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("unix", socket)
			if err != nil {
				return
			}
			defer out.Close()
			go func() { _, _ = io.Copy(out, in); _ = out.(*net.UnixConn).CloseWrite() }()
			_, _ = io.Copy(in, out)
		}()
	}
}

// noNames answers every DNS question with NXDOMAIN.
func noNames(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n >= 12 {
			buf[2], buf[3] = buf[2]|0x80, 0x83
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}
}

func buildRoot(plan jailPlan) (string, error) {
	const root = "/mnt"
	type mount struct {
		source, target, fs string
		flags              uintptr
		data               string
	}
	const quiet = unix.MS_NOSUID | unix.MS_NODEV
	mounts := []mount{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"tmpfs", root, "tmpfs", quiet, "mode=755"},
		{"proc", root + "/proc", "proc", quiet | unix.MS_NOEXEC, ""},
		{"tmpfs", root + "/dev/shm", "tmpfs", quiet | unix.MS_NOEXEC, "mode=1777"},
		{"tmpfs", root + "/tmp", "tmpfs", quiet, "mode=1777"},
		{"/dev/pts", root + "/dev/pts", "", unix.MS_BIND, ""},
	}
	for _, dev := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		mounts = append(mounts, mount{"/dev/" + dev, root + "/dev/" + dev, "", unix.MS_BIND, ""})
	}
	for _, l := range plan.Agent.Root {
		mounts = append(mounts, mount{l.Host, root + l.Guest, "", unix.MS_BIND | unix.MS_REC, ""})
	}
	for _, m := range mounts {
		if info, err := os.Stat(m.source); err == nil && !info.IsDir() {
			if err := os.MkdirAll(filepath.Dir(m.target), 0o755); err != nil {
				return "", err
			}
			if err := os.WriteFile(m.target, nil, 0o644); err != nil {
				return "", err
			}
		} else if err := os.MkdirAll(m.target, 0o755); err != nil {
			return "", err
		}
		if err := unix.Mount(m.source, m.target, m.fs, m.flags, m.data); err != nil {
			return "", fmt.Errorf("mounting %s: %w", m.target, err)
		}
		if m.flags&unix.MS_BIND != 0 && filepath.Dir(m.target) != root+"/dev" {
			if err := unix.Mount("", m.target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID, ""); err != nil {
				return "", fmt.Errorf("making %s read-only: %w", m.target, err)
			}
		}
	}
	files := map[string][]byte{
		"/etc/passwd":        fmt.Appendf(nil, "agent:x:%d:%d:agent:%s:/none\n", agentUID, agentUID, guestHome),
		"/etc/group":         fmt.Appendf(nil, "agent:x:%d:\n", agentUID),
		"/etc/hosts":         []byte("127.0.0.1 localhost\n"),
		"/etc/resolv.conf":   []byte("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"),
		"/etc/nsswitch.conf": []byte("passwd: files\ngroup: files\nhosts: files dns\n"),
	}
	for name, data := range plan.Agent.Home {
		files[filepath.Join(guestHome, name)] = data
	}
	if err := os.MkdirAll(root+plan.Dir, 0o755); err != nil {
		return "", err
	}
	for name, data := range files {
		if err := os.MkdirAll(filepath.Dir(root+name), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(root+name, data, 0o644); err != nil {
			return "", err
		}
	}
	return root, filepath.WalkDir(root+guestHome, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, agentUID, agentUID)
	})
}

// world is one jail with its endpoints, before the agent starts.
type world struct {
	t     *testing.T
	model *script.Server
	plan  string // file
	wrote *files
}

// files is what write_files wrote: the stand-in for the machine's workspace.
type files struct {
	mu sync.Mutex
	m  map[string]string
}

func (f *files) get(path string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.m[path]
}

type writeArgs struct {
	Path    string `json:"path"`
	Content string `json:"content"`
}

// newWorld serves a scripted model and CAL's tools for an agent. Every socket
// lies in a directory of the test, so that worlds do not meet.
func newWorld(t *testing.T, model *script.Server, agent nucleus.Agent, dir string) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("an agent's root is built by mounts, which need root")
	}
	temp := t.TempDir()
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(temp, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	t.Cleanup(model.Serve(listen("model")))
	w := &world{t: t, model: model, plan: filepath.Join(temp, "plan"), wrote: &files{m: map[string]string{}}}

	server := mcp.NewServer(&mcp.Implementation{Name: "cal", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "write_files", Description: "Write a file of the workspace."}, func(_ context.Context, _ *mcp.CallToolRequest, a writeArgs) (*mcp.CallToolResult, any, error) {
		w.wrote.mu.Lock()
		defer w.wrote.mu.Unlock()
		w.wrote.m[a.Path] = a.Content
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "wrote " + a.Path}}}, nil, nil
	})
	tools := &http.Server{Handler: mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil)}
	served := make(chan struct{})
	l := listen("mcp")
	go func() { defer close(served); _ = tools.Serve(l) }()
	t.Cleanup(func() { _ = tools.Close(); <-served })

	raw, err := json.Marshal(jailPlan{Agent: agent, Dir: dir, Sockets: map[string]string{
		mcpAddr: filepath.Join(temp, "mcp"), modelAddr: filepath.Join(temp, "model"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.plan, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

// command starts the jail; environment of the test does not reach the agent.
func (w *world) command(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = []string{jailedEnv + "=" + w.plan, "GORACE=atexit_sleep_ms=0"}
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	return cmd
}

// run runs the agent to its end and returns what it printed and its exit code.
func (w *world) run() (string, int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), runTimeout)
	defer cancel()
	cmd := w.command(ctx)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		w.t.Fatalf("the agent did not end: %v\n%s", err, out)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
