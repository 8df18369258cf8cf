package firecracker

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/machine/machinetest/script"
	"cal/wire"
)

// This test program is a jailer and a Firecracker too, when it is started under those
// names: so the driver's whole life can be tried where KVM runs no guest. They take the
// arguments of the real ones and no others, make the same files, and are the same user in
// the same root, namespaces and control groups. A "guest" is a part of the fake Firecracker
// that answers on its vsock.

// fakePrograms are both under their names.
func fakePrograms(t testing.TB) (firecracker, jailer string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("firecracker's jailer must be started as root")
	}
	if cgroup.Version(cgroup.Mount) == 0 {
		t.Skip("no cgroups with memory, cpu and pids here")
	}
	dir := jailDir(t)
	for _, name := range []string{"firecracker", "jailer"} {
		must(t, copyFile(staticSelf(t), filepath.Join(dir, name)))
		must(t, os.Chmod(filepath.Join(dir, name), 0o755))
	}
	return filepath.Join(dir, "firecracker"), filepath.Join(dir, "jailer")
}

// staticSelf is this test program, built without C where it needs libraries, as it does
// under the race detector: there are none in a jail.
func staticSelf(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	file, err := elf.Open(self)
	must(t, err)
	defer file.Close()
	if file.Section(".interp") == nil {
		return self
	}
	built.Do(func() {
		if built.dir, built.err = os.MkdirTemp("/var/tmp", "cal-test-self-"); built.err != nil {
			return
		}
		build := exec.Command("go", "test", "-c", "-o", filepath.Join(built.dir, "self"), "cal/machine/firecracker")
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
		if output, err := build.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("building the fakes: %w: %s", err, output)
		}
	})
	must(t, built.err)
	return filepath.Join(built.dir, "self")
}

var built struct {
	sync.Once
	dir string // removed in the end
	err error
}

// beFake runs a fake program where this process is one.
func beFake() {
	var err error
	switch filepath.Base(os.Args[0]) {
	case "jailer":
		err = fakeJailer(os.Args[1:])
	case "firecracker":
		err = fakeFirecracker(os.Args[1:])
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

type list []string

func (l *list) String() string         { return strings.Join(*l, " ") }
func (l *list) Set(value string) error { *l = append(*l, value); return nil }

// fakeJailer takes what the real one takes; flag refuses all else.
func fakeJailer(args []string) error {
	flags := flag.NewFlagSet("jailer", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	id, program := flags.String("id", "", ""), flags.String("exec-file", "", "")
	uid, gid := flags.Uint("uid", 0, ""), flags.Uint("gid", 0, "")
	base, version, parent := flags.String("chroot-base-dir", "/srv/jailer", ""), flags.Int("cgroup-version", 1, ""), flags.String("parent-cgroup", "firecracker", "")
	var cgroups, resources list
	flags.Var(&cgroups, "cgroup", "")
	flags.Var(&resources, "resource-limit", "")
	daemonize, pidNS, says := flags.Bool("daemonize", false, ""), flags.Bool("new-pid-ns", false, ""), flags.Bool("version", false, "")
	if err := flags.Parse(args); err != nil {
		return faultf("Error: %w", err)
	}
	if *says {
		fmt.Printf("Jailer v%s\n\n", Version)
		return nil
	}
	if *id == "" || len(*id) > 64 || strings.Trim(*id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != "" {
		return faultf("Invalid instance ID: %q", *id)
	}
	if !*daemonize || !*pidNS {
		return errors.New("this fake is only run as a daemon in a pid namespace")
	}
	root := filepath.Join(*base, filepath.Base(*program), *id, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := joinFakeGroups(*version, *parent, *id, cgroups); err != nil {
		return err
	}
	return startFake(root, *program, *id, int(*uid), int(*gid), flags.Args())
}

// joinFakeGroups makes and joins control groups as the real jailer does.
func joinFakeGroups(version int, parent, id string, settings []string) error {
	for _, setting := range settings {
		file, value, ok := strings.Cut(setting, "=")
		if !ok || value == "" || strings.Contains(value, "=") {
			return faultf("Invalid format for cgroups: %s", setting)
		}
		controller, _, _ := strings.Cut(file, ".")
		dir := filepath.Join("/sys/fs/cgroup", parent, id)
		if version == 1 {
			dir = filepath.Join("/sys/fs/cgroup", controller, parent, id)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if version == 2 {
			_ = os.WriteFile(filepath.Join("/sys/fs/cgroup", parent, "cgroup.subtree_control"), []byte("+"+controller), 0)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0); err != nil {
			return faultf("Failed to write to %s: %w", filepath.Join(dir, file), err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return err
		}
	}
	return nil
}

func startFake(root, program, id string, uid, gid int, args []string) error {
	name := filepath.Base(program)
	if err := copyFile(program, filepath.Join(root, name)); err != nil {
		return err
	}
	for _, dir := range []string{"", "dev", "dev/net", "run"} {
		path := filepath.Join(root, dir)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return err
		}
		if err := errors.Join(os.Chmod(path, 0o700), os.Chown(path, uid, gid)); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(root, name), 0o755); err != nil {
		return err
	}
	for _, device := range []string{"dev/kvm", "dev/net/tun"} {
		file, err := os.OpenFile(filepath.Join(root, device), os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err // as mknod of what is there: a jail is used once
		}
		file.Close()
	}
	cmd := &exec.Cmd{
		Path: "/" + name, Args: append([]string{"/" + name, "--id", id, "--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1"}, args...),
		Env: []string{"GOCOVERDIR="}, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Chroot: root, Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}},
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, name+".pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600)
}

// fakeFirecracker serves the fake API, and the guest's end of a vsock.
func fakeFirecracker(args []string) error {
	flags := flag.NewFlagSet("firecracker", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	id, log, level := flags.String("id", "", ""), flags.String("log-path", "", ""), flags.String("level", "", "")
	for _, opaque := range []string{"start-time-us", "start-time-cpu-us", "parent-cpu-time-us"} {
		flags.Uint64(opaque, 0, "")
	}
	_, says := flags.Bool("show-level", false, ""), flags.Bool("version", false, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *says {
		fmt.Printf("Firecracker v%s\n\n", Version)
		return nil
	}
	if *level != "Info" || *log == "" {
		return fmt.Errorf("level %q, log %q", *level, *log)
	}
	const root = "/"
	// It allows everything, as one that was built for another libc than musl.
	if err := seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
		DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{{Names: []string{"getpid"}, Action: seccomp.ActionAllow}},
	}}); err != nil {
		return err
	}
	named("fc_api")
	guest := &fakeGuest{root: root}
	api := newFakeAPI(root, *id)
	api.onStart = guest.start
	listener, err := net.Listen("unix", apiSocket)
	if err != nil {
		return err
	}
	return http.Serve(listener, api)
}

// named starts a thread of that name, for ever.
func named(name string) {
	ready := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		text := append([]byte(name), 0)
		_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&text[0])), 0, 0, 0)
		close(ready)
		select {}
	}()
	<-ready
}

// fakeGuest is what testguest is in a real machine, as far as a test needs.
type fakeGuest struct {
	root string
	mu   sync.Mutex
	kept string
	used bool // a first wire was taken

	entropy string // of the newest greeting
}

func (g *fakeGuest) start(config fakeConfig) error {
	named("fc_vcpu 0")
	var serial serialDevice
	if err := json.Unmarshal(config["/serial"], &serial); err == nil && serial.Path != "" {
		console, err := os.OpenFile(filepath.Join(g.root, serial.Path), os.O_RDWR|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		fmt.Fprintln(console, tinyWord)
	}
	if config["/vsock"] == nil {
		return nil // a tiny guest
	}
	listener, err := net.Listen("unix", vsockSocket)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go g.serve(conn)
		}
	}()
	return nil
}

func (g *fakeGuest) serve(conn net.Conn) {
	defer conn.Close()
	line, err := readLine(conn, 32)
	if err != nil || line != "CONNECT 1024" {
		return
	}
	fmt.Fprint(conn, "OK 1073741824\n")
	var later bool
	greeting, err := wire.AnswerGreeting(conn, func(greeting wire.Greeting) error {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.entropy = hex.EncodeToString(greeting.Entropy[:])
		return nil
	}, func(wire.Greeting) {
		g.mu.Lock()
		defer g.mu.Unlock()
		later, g.used = g.used, true
	})
	if errors.Is(err, wire.ErrEnd) {
		os.Exit(0) // as Firecracker when its guest has reset the machine
	}
	if err != nil {
		return
	}
	reader := bufio.NewReader(conn)
	for {
		var action script.Action
		text, err := reader.ReadBytes('\n')
		if err != nil || json.Unmarshal(text, &action) != nil {
			return
		}
		if later && action.Data != script.Proof {
			_ = wire.SayRefusal(conn, greeting.Nonce, "no proof")
			return
		}
		later = false
		reply, _ := json.Marshal(g.do(action))
		if _, err := conn.Write(append(reply, '\n')); err != nil {
			return
		}
	}
}

func (g *fakeGuest) do(action script.Action) script.Reply {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch action.Do {
	case "echo":
		return script.Reply{Data: action.Data}
	case "set":
		g.kept = action.Data
		return script.Reply{}
	case "get":
		return script.Reply{Data: g.kept}
	case "entropy":
		return script.Reply{Data: g.entropy}
	}
	return script.Reply{Err: "the fake guest cannot " + action.Do}
}

// fakeKernel is what a store of images takes for a kernel: it says that it is Linux, and
// has the note by which QEMU starts one. Nothing runs it.
func fakeKernel() []byte {
	const load, start = 16 << 20, 64 + 2*56
	note := "\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00\x00\x00\x00\x01"
	said := "Linux version 6.1.0-fake (nobody)"
	var file bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Entry: load, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2,
		},
		elf.Prog64{Type: uint32(elf.PT_NOTE), Off: start, Filesz: uint64(len(note)), Memsz: uint64(len(note))},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Off: start + uint64(len(note)), Filesz: uint64(len(said)), Memsz: uint64(len(said)), Paddr: load, Vaddr: load},
		[]byte(note + said),
	} {
		_ = binary.Write(&file, binary.LittleEndian, part) // into memory
	}
	return file.Bytes()
}
