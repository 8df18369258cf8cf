// Package vm starts a program as the first process of a real Linux kernel, in an emulated
// machine that no driver made: for tests of what such a program must refuse, a machine can
// have what a driver never gives it.
package vm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/image"
	"cal/image/linux"
	"cal/nucleus"
)

// Config is what a machine differs in from an ordinary one.
type Config struct {
	Init       string   // a static program
	Line       string   // more of the kernel's command line
	NIC        bool     // a network interface
	Writable   []string // roles of disks that the machine may write though it should not
	Without    []string // roles of disks that it does not get
	Modules    []string // of the kernel, beside those of every machine
	CPUs       int      // 0: 2
	MemoryMB   int
	Memory     string // as another machine like it has saved it, from which this one goes on; "": it boots
	Workspace  string // image file; "": a blank one
	LayersDisk string // "": none
}

// Machine is one that runs.
type Machine struct {
	t       testing.TB
	dir     string
	cmd     *exec.Cmd
	console *console
	first   net.Conn // by Greet
	ended   chan struct{}
}

// Patience bounds whatever is waited for; emulated machines are slow on a busy host.
const Patience = 2 * time.Minute

// Build makes the test program of a package a static binary in dir and returns its path.
func Build(t testing.TB, pkg, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "init.test")
	build := exec.Command("go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", path, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the tests of %s: %v\n%s", pkg, err, output)
	}
	return path
}

// Store returns a store of images that goes with the test.
func Store(t testing.TB) *image.Store {
	t.Helper()
	store, err := image.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// StoreIn makes a store in dir, which may be another user's in the end, that has the kernel
// of the tests. It skips as Kernel does.
func StoreIn(t testing.TB, dir string) *image.Store {
	t.Helper()
	kernel := Kernel(t)
	from := filepath.Dir(filepath.Dir(filepath.Dir(kernel.Image)))
	object := filepath.Join("objects", filepath.Base(filepath.Dir(kernel.Image)))
	if _, err := image.Open(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, object), os.DirFS(filepath.Join(from, object))); err != nil {
		t.Fatal(err)
	}
	inputs, err := filepath.Glob(filepath.Join(from, "inputs", "kernel-*"))
	if err != nil || len(inputs) == 0 {
		t.Fatalf("the store of the kernel does not say which it is: %v", err)
	}
	for _, name := range inputs {
		data, err := os.ReadFile(name)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "inputs", filepath.Base(name)), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	store, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// SharedStore is the one in which stays what was fetched once, and its directory.
func SharedStore(t testing.TB) (*image.Store, string) {
	t.Helper()
	dir := os.Getenv("CAL_TEST_IMAGES")
	if dir == "" {
		root, err := os.Getwd()
		for ; err == nil && !exists(filepath.Join(root, "go.mod")); root = filepath.Dir(root) {
			if root == "/" {
				t.Fatal("no module here")
			}
		}
		dir = filepath.Join(root, ".cache/images")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return store, dir
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// Kernel returns the kernel of the tests, or skips.
func Kernel(t testing.TB) image.Kernel {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("no QEMU here (apt install qemu-system-x86): nothing boots a kernel")
	}
	for _, tool := range []string{"mkfs.ext4", "/sbin/mkfs.ext4"} {
		if _, err := exec.LookPath(tool); err == nil {
			return kernelWith(t)
		}
	}
	t.Skip("no mkfs.ext4 here (apt install e2fsprogs): a machine has no disks")
	return image.Kernel{}
}

// kernelWith is the kernel with further modules, which is fetched apart and kept apart: the shared store is
// copied by who needs it.
func kernelWith(t testing.TB, modules ...string) image.Kernel {
	t.Helper()
	of := linux.Wanted
	defer func() { linux.Wanted = of }()
	linux.Wanted = slices.Concat(of, modules)
	store, dir := SharedStore(t)
	if len(modules) > 0 {
		var err error
		if store, err = image.Open(dir + "-" + strings.Join(modules, "-")); err != nil {
			t.Fatal(err)
		}
	}
	kernel, err := store.Kernel(context.Background(), "", nil)
	if err != nil {
		t.Skipf("no kernel to boot: %v", err)
	}
	return kernel
}

// Start starts a machine, which ends with the test.
func Start(t testing.TB, c Config) *Machine {
	t.Helper()
	kernel := Kernel(t)
	if len(c.Modules) > 0 {
		kernel = kernelWith(t, c.Modules...)
	}
	dir, err := os.MkdirTemp("", "cal-vm-") // the path of a socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	store := Store(t)
	initramfs, err := store.Initramfs(context.Background(), kernel, c.Init)
	if err != nil {
		t.Fatal(err)
	}
	m := &Machine{t: t, dir: dir, console: &console{}, ended: make(chan struct{})}
	args := []string{
		"-M", "microvm,acpi=on", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", fmt.Sprint(cmp.Or(c.CPUs, 2)), "-m", fmt.Sprint(max(c.MemoryMB, 512)),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", kernel.Image, "-initrd", initramfs.Path,
		"-device", "virtio-serial-device,max_ports=3", "-qmp", "unix:" + m.socket("qmp") + ",server=on,wait=off",
	}
	for _, name := range []string{"cal.wire", "cal.wire2"} {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,path=%s,server=on,wait=off", strings.ReplaceAll(name, ".", ""), m.socket(name)),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,name=%s", strings.ReplaceAll(name, ".", ""), name))
	}
	disks, roles := m.disks(store, c)
	args = append(args, disks...)
	if c.NIC {
		args = append(args, "-device", "virtio-net-device")
	}
	line := "console=ttyS0 quiet panic=-1 reboot=t lpj=4000000 no_timer_check tsc_early_khz=2000000 cal.wire=serial cal.disks=" + roles + " " + c.Line
	args = append(args, "-append", line)
	if c.Memory != "" {
		args = append(args, "-incoming", "exec:cat "+c.Memory)
	}
	m.run(args)
	if c.Memory != "" {
		m.goOn()
	}
	return m
}

func (m *Machine) socket(name string) string { return filepath.Join(m.dir, name) }

// disks makes the machine's disks.
func (m *Machine) disks(store *image.Store, c Config) (args []string, roles string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	root, err := store.Root(ctx, nucleus.Image{Kind: "directory", Path: smallRoot(m.t)}, "/", nil)
	if err != nil {
		m.t.Fatal(err)
	}
	scratch, workspace := filepath.Join(m.dir, "scratch"), c.Workspace
	if err := store.Blank(ctx, scratch, 64<<20); err != nil {
		m.t.Fatal(err)
	}
	if workspace == "" {
		workspace = filepath.Join(m.dir, "workspace")
		if err := store.Blank(ctx, workspace, 64<<20); err != nil {
			m.t.Fatal(err)
		}
	}
	var has []string
	for _, disk := range []struct{ role, path string }{{"root", root.Path}, {"layers", c.LayersDisk}, {"workspace", workspace}, {"scratch", scratch}} {
		if disk.path == "" || contains(c.Without, disk.role) {
			continue
		}
		how := ""
		switch {
		case disk.role == "workspace" || disk.role == "scratch":
		case contains(c.Writable, disk.role):
			how = ",snapshot=on"
		default:
			how = ",readonly=on"
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=%s,file=%s,format=raw%s", disk.role, disk.path, how),
			"-device", fmt.Sprintf("virtio-blk-device,drive=%s,serial=%s", disk.role, disk.role))
		has = append(has, disk.role)
	}
	return args, strings.Join(has, ",")
}

func contains(list []string, what string) bool {
	for _, one := range list {
		if one == what {
			return true
		}
	}
	return false
}

// smallRoot is a root file system without any program.
func smallRoot(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"usr/bin", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (m *Machine) run(args []string) {
	m.t.Helper()
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.Stdout, cmd.Stderr = m.console, m.console
	m.cmd = cmd
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(m.ended)
	}()
	m.t.Cleanup(func() {
		cmd.Process.Kill()
		<-m.ended
		if m.t.Failed() {
			m.t.Logf("console:\n%s", m.Console())
		}
	})
}

// Console is what the machine has printed.
func (m *Machine) Console() string { return m.console.String() }

// Ended waits for the machine's end, by itself.
func (m *Machine) Ended() {
	m.t.Helper()
	select {
	case <-m.ended:
	case <-time.After(Patience):
		m.t.Fatalf("the machine did not end within %s", Patience)
	}
}

// Dial connects to a serial port of the machine by its name.
func (m *Machine) Dial(name string) net.Conn {
	m.t.Helper()
	for deadline := time.Now().Add(Patience); ; time.Sleep(5 * time.Millisecond) { // until QEMU has made the socket
		conn, err := net.Dial("unix", m.socket(name))
		if err == nil {
			m.t.Cleanup(func() { conn.Close() })
			return conn
		}
		select {
		case <-m.ended:
			m.t.Fatalf("QEMU ended:\n%s", m.Console())
		default:
		}
		if time.Now().After(deadline) {
			m.t.Fatal(errors.Join(err, errors.New("QEMU made no socket")))
		}
	}
}

// console keeps what a machine prints.
type console struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

var _ io.Writer = (*console)(nil)

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buf.Len() > 1<<20 {
		return len(p), nil
	}
	return c.buf.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

// ReadFile reads a file of an ext4 image that no machine writes to; "" if it is not there.
func ReadFile(t testing.TB, disk, name string) string {
	t.Helper()
	debugfs := "debugfs"
	if _, err := exec.LookPath(debugfs); err != nil {
		debugfs = "/sbin/debugfs" // of e2fsprogs, as mkfs.ext4
	}
	content, err := exec.Command(debugfs, "-R", "cat "+name, disk).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	return string(content)
}
