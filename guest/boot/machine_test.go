package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/testenv/vm"
	"cal/nucleus"
	"cal/wire"
)

// The tests of this file boot a real kernel with this test program as its first process, and with
// it as the proxy.

func TestMain(m *testing.M) {
	switch {
	case IsInit():
		switch {
		case commandLineHas("cal.asked"):
			serveAsked()
		case commandLineHas("cal.loopback"):
			serveLoopback()
		}
		Main()
	case len(os.Args) > 1 && os.Args[1] == "init":
		what, say := vm.Asked()
		if what == "hold" {
			say("held")
			for { // the host ends the machine
				unix.Pause()
			}
		}
		os.Args = []string{os.Args[0], "-test.run=^TestInside$", "-test.v"}
		code := m.Run()
		fmt.Printf("inside: exit code %d\n", code)
		os.Exit(code)
	case len(os.Args) > 1 && os.Args[1] == "attach":
		what, say := vm.Asked()
		switch what {
		case "proof":
			say("taken")
		case "write": // a file that nobody syncs
			if err := os.WriteFile(nucleus.MachineWorkspace+"/written", []byte("by the guest"), 0o644); err != nil {
				panic(err)
			}
			say("written")
		default:
			fmt.Fprintln(os.Stderr, "no proof, but", what)
			os.Exit(1)
		}
		os.Exit(0)
	case len(os.Args) > 1 && os.Args[1] == "parent": // of an orphan
		orphan := exec.Command("/proc/self/exe", "-test.run=^$")
		if err := orphan.Start(); err != nil {
			panic(err)
		}
		fmt.Println(orphan.Process.Pid)
		os.Exit(0)
	}
	code := m.Run()
	os.RemoveAll(built.dir)
	os.Exit(code)
}

// mutants take a wall away before the machine's root is made, or what reads it back.
var mutants = map[string]struct {
	change func()
	reason string // with which such a machine refuses; "": it serves
}{
	"nothing": {func() {}, ""},
	"modules": {func() { settings = settings[:len(settings)-1] }, "the kernel still takes modules"},
	"a switch": {func() {
		settings = slices.Insert(settings, len(settings)-1, setting{"kernel/kptr_restrict", "1", true})
	}, `kernel/kptr_restrict is "1", and should be "2"`},
	"sys":     {func() { kernelMounts[1].flags &^= unix.MS_RDONLY }, "mount at /sys: it can be written"},
	"hidepid": {func() { kernelMounts[0].data = "" }, "mount at /proc: it shows everybody's processes"},
	"tmp":     {func() { kernelMounts[3].flags &^= unix.MS_NODEV }, "mount at /tmp: it takes devices"},
	"a mount": {func() {
		kernelMounts = append(kernelMounts, kernelMounts[4])
		kernelMounts[5].place, kernelMounts[5].fstype, kernelMounts[5].data = "/var", "tmpfs", ""
	}, "mount at /var: it is tmpfs"},
}

// commandLineHas reads the kernel's command line before anything is mounted.
func commandLineHas(word string) bool {
	unix.Mkdir("/proc", 0o755)
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		panic(err)
	}
	defer unix.Unmount("/proc", 0)
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		panic(err)
	}
	return slices.Contains(strings.Fields(string(line)), word)
}

// program is this test program as a static one, built once.
func program(t *testing.T) string {
	vm.Kernel(t) // or skip
	built.Do(func() {
		dir, err := os.MkdirTemp("", "cal-boot-")
		if err != nil {
			t.Fatal(err)
		}
		built.dir, built.path = dir, vm.Build(t, "cal/guest/boot", dir)
	})
	return built.path
}

var built struct {
	sync.Once
	dir, path string
}

// TestMachine boots a machine that is as it should be; TestInside goes on in it.
func TestMachine(t *testing.T) {
	m := vm.Start(t, vm.Config{Init: program(t), Line: "cal.tasks=200"})
	conn, err := wire.Greet(m.Dial("cal.wire"), time.Now().Add(vm.Patience))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("test\n")); err != nil {
		t.Fatal(err)
	}
	m.Ended()
	if said := m.Console(); !strings.Contains(said, "inside: exit code 0") || !strings.Contains(said, "--- PASS: TestInside") || !strings.Contains(said, "the proxy ended (exit code 0") {
		t.Error("what was tried inside did not pass")
	}
}

// TestEnd: a host that asks for the end finds on the disk what was written, though nobody synced.
func TestEnd(t *testing.T) {
	vm.Kernel(t) // or skip
	store := vm.Store(t)
	workspace := filepath.Join(t.TempDir(), "workspace")
	if err := store.Blank(t.Context(), workspace, 64<<20); err != nil {
		t.Fatal(err)
	}
	m := vm.Start(t, vm.Config{Init: program(t), Workspace: workspace})
	vm.Wait(t, m.Greet("hold"), "held")
	laterWires(t, m)
	last := m.Wire("cal.wire2")
	if _, err := io.WriteString(last, "write\n"); err != nil {
		t.Fatal(err)
	}
	vm.Wait(t, bufio.NewReader(last), "written")
	if got := vm.ReadFile(t, workspace, "/written"); got != "" { // control: it is the end that flushes
		t.Errorf("on the disk already: %q", got)
	}
	if err := wire.SayEnd(m.Dial("cal.wire"), time.Now().Add(vm.Patience)); err != nil {
		t.Fatal(err)
	}
	m.Ended()
	if got := vm.ReadFile(t, workspace, "/written"); got != "by the guest" {
		t.Errorf("after the end: %q", got)
	}
}

// laterWires: a new wire is handed to the proxy on either port, again and again, and where the
// proxy does not take it the host learns why.
func laterWires(t *testing.T, m *vm.Machine) {
	if _, err := wire.Greet(dying{m.Dial("cal.wire2")}, time.Now().Add(vm.Patience)); err == nil {
		t.Error("a host that died was heard")
	}
	for i, port := range []string{"cal.wire2", "cal.wire2", "cal.wire2", "cal.wire"} {
		wired := m.Wire(port)
		said, want := "proof", "taken\n"
		if i == 1 {
			said, want = "nonsense", "the proxy did not take the new wire: no proof, but nonsense"
		}
		if _, err := io.WriteString(wired, said+"\n"); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 100)
		n, err := wired.Read(line)
		if got := string(line[:n]); i == 1 && (err == nil || err.Error() != want) || i != 1 && got != want {
			t.Errorf("wire %d: %q, %v, want %q", i, got, err, want)
		}
		if i == 2 {
			m.HangUp() // the first wire, in whose place the last comes
		}
		wired.Close()
	}
}

// dying is a host that dies when it has told the machine to go: what it greeted on goes nowhere, and the
// machine takes the next.
type dying struct{ net.Conn }

func (d dying) Write(p []byte) (int, error) {
	n, err := d.Conn.Write(p)
	if bytes.Contains(p, []byte(" go ")) {
		d.Close()
	}
	return n, err
}

// TestRefuses takes the promises away one after the other: such a machine serves nobody, and
// the host is told why.
func TestRefuses(t *testing.T) {
	init := program(t)
	for name, test := range map[string]struct {
		config vm.Config
		reason string
	}{
		"a network interface":             {vm.Config{NIC: true}, "a device that it should not have: virtio number 0x0001"},
		"a root disk that can be written": {vm.Config{Writable: []string{"root"}}, "the root disk vda can be written"},
		"a missing disk":                  {vm.Config{Without: []string{"scratch"}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			test.config.Init = init
			m := vm.Start(t, test.config)
			if test.reason != "" {
				refuses(t, m, test.reason)
				return
			}
			m.Ended() // before it has a wire
			if said := m.Console(); !strings.Contains(said, "lacks scratch") || strings.Contains(said, "inside:") {
				t.Error("it does not end for that it lacks scratch")
			}
		})
	}
}

// TestMutants is the same of what the machine makes itself. The mutant that is none serves.
func TestMutants(t *testing.T) {
	config := remembered(t)
	for name, mutant := range mutants {
		t.Run(name, func(t *testing.T) {
			m := vm.Start(t, config)
			asked(t, m, "without "+name, "without "+name)
			if mutant.reason != "" {
				refuses(t, m, mutant.reason)
				return
			}
			vm.Wait(t, m.Greet("hold"), "held")
		})
	}
}

func refuses(t *testing.T, m *vm.Machine, reason string) {
	t.Helper()
	_, err := wire.Greet(m.Dial("cal.wire"), time.Now().Add(vm.Patience))
	if err == nil {
		t.Fatal("it serves")
	}
	m.Ended()
	if !strings.Contains(err.Error(), reason) {
		t.Errorf("host: %v, want %q", err, reason)
	}
	if strings.Contains(m.Console(), "inside:") {
		t.Error("the proxy was started")
	}
}

// TestInside runs in a machine, as the proxy.
func TestInside(t *testing.T) {
	if os.Args[0] != nucleus.MachineProxy {
		t.Skip("runs in a machine that TestMachine boots")
	}
	t.Run("promises hold, and are seen to be broken", insidePromises)
	t.Run("files", insideFiles)
	t.Run("limits", insideLimits)
	t.Run("rights", insideRights)
	t.Run("orphans are reaped", insideOrphans)
}

func mountsHold() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	return checkMounts(string(mounts))
}

// insidePromises breaks what this process can, being the machine's root, and looks whether that is
// noticed.
func insidePromises(t *testing.T) {
	sound := func() error {
		return errors.Join(mountsHold(), checkWrites(), checkDevices("/sys/bus/virtio/devices"), checkInterfaces("/sys/class/net"))
	}
	if err := sound(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(on bool) error{
		"/sys can be written": func(on bool) error { return remount("/sys", noPrograms, on) },
		"/dev can be written": func(on bool) error { return remount("/dev", noSetuid|unix.MS_NOEXEC, on) },
		"something more is mounted": func(on bool) error {
			if on {
				return unix.Mount("tmpfs", "/var", "tmpfs", noPrograms, "")
			}
			return unix.Unmount("/var", 0)
		},
	} {
		if err := change(true); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if sound() == nil {
			t.Errorf("%s: not noticed", name)
		}
		if err := errors.Join(change(false), sound()); err != nil {
			t.Errorf("%s, mended: %v", name, err)
		}
	}
	for _, s := range settings {
		if err := s.check(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat("/proc/sys/" + s.name); err != nil {
			continue // a door that this kernel does not have
		}
		if (setting{s.name, s.value + "9", s.must}).check() == nil {
			t.Errorf("%s: %s9 is taken for %s", s.name, s.value, s.value)
		}
	}
}

func remount(place string, flags uintptr, writable bool) error {
	if !writable {
		flags |= unix.MS_RDONLY
	}
	return unix.Mount("", place, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
}

func insideFiles(t *testing.T) {
	writable := func(dir string) error {
		name := filepath.Join(dir, "intruder")
		defer os.Remove(name)
		return os.WriteFile(name, []byte("x"), 0o600)
	}
	for _, dir := range []string{"/", "/usr", "/usr/bin", "/etc", "/dev", "/sys", "/.nucleus", nucleus.MachineAgent, "/var", "/root"} {
		if err := writable(dir); !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	for _, dir := range []string{"/tmp", "/run", "/dev/shm", nucleus.MachineHome, nucleus.MachineWorkspace} { // control
		if err := writable(dir); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT, ""); err == nil {
		if err := writable("/"); err == nil {
			t.Error("the root was made writable")
		}
	}
	if err := unix.Mount("", nucleus.MachineProxy, "", unix.MS_REMOUNT|unix.MS_BIND, ""); err != nil {
		t.Errorf("control: the machine's root cannot remount: %v", err)
	}
	insideDisks(t)
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		t.Fatal(err)
	}
	most := map[string]uint64{"/tmp": 41, "/dev/shm": 21, "/run": 11}
	for place, percent := range most {
		var fs unix.Statfs_t
		if err := unix.Statfs(place, &fs); err != nil || fs.Blocks*uint64(fs.Bsize) > memory.Totalram*percent/100 {
			t.Errorf("%s holds %d of %d bytes of memory, %v", place, fs.Blocks*uint64(fs.Bsize), memory.Totalram, err)
		}
	}
	err := os.WriteFile(nucleus.MachineHome+"/large", make([]byte, 65<<20), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("65 MiB on a scratch disk of 64: %v", err)
	}
	if err := os.Remove(nucleus.MachineHome + "/large"); err != nil {
		t.Error(err)
	}
	// Programs run from where they may only.
	for dir, want := range map[string]error{"/run": unix.EACCES, "/dev/shm": unix.EACCES, "/tmp": nil, nucleus.MachineWorkspace: nil} {
		if err := runCopy(dir); !errors.Is(err, want) {
			t.Errorf("a program in %s: %v, want %v", dir, err, want)
		}
	}
}

// insideDisks: not even the machine's root, with a device of its own making, writes to the disk
// that its root file system lies on.
func insideDisks(t *testing.T) {
	if err := unix.Mount("tmpfs", "/var", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount("/var", 0)
	for role, want := range map[string]bool{diskRoot: false, diskScratch: true} {
		name := diskOf(t, role)
		numbers, err := os.ReadFile("/sys/block/" + name + "/dev")
		if err != nil {
			t.Fatal(err)
		}
		var major, minor uint32
		fmt.Sscanf(string(numbers), "%d:%d", &major, &minor)
		if err := unix.Mknod("/var/"+name, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
			t.Fatal(err)
		}
		if err := writeSame("/var/" + name); (err == nil) != want {
			t.Errorf("writing to the %s disk: %v", role, err)
		}
	}
}

func diskOf(t *testing.T, role string) string {
	names, err := diskNames()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if serial, _ := os.ReadFile("/sys/block/" + name + "/serial"); string(serial) == role {
			return name
		}
	}
	t.Fatalf("no %s disk among %v", role, names)
	return ""
}

// writeSame writes a disk's first block as it is.
func writeSame(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 512)
	if _, err := f.ReadAt(block, 0); err != nil {
		return err
	}
	if _, err := f.WriteAt(block, 0); err != nil {
		return err
	}
	return f.Sync()
}

func runCopy(dir string) error {
	name := filepath.Join(dir, "program")
	defer os.Remove(name)
	program, err := os.ReadFile(nucleus.MachineProxy)
	if err == nil {
		err = os.WriteFile(name, program, 0o700)
	}
	if err != nil {
		return err
	}
	return exec.Command(name, "-test.run=^$").Run()
}

func insideLimits(t *testing.T) {
	for what, want := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NPROC: 200, unix.RLIMIT_NOFILE: 1 << 20} {
		var limit unix.Rlimit
		if err := unix.Getrlimit(what, &limit); err != nil || limit.Max != want {
			t.Errorf("limit %d: %+v, %v, want %d", what, limit, err, want)
		}
	}
}

// insideRights: the proxy is the machine's root and can still not reach the kernel itself.
func insideRights(t *testing.T) {
	mask := uint64(0)
	for _, c := range kept {
		mask |= 1 << c
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("CapEff:\t%016x", mask), fmt.Sprintf("CapBnd:\t%016x", mask), "CapInh:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in %s", want, status)
		}
	}
	now := unix.NsecToTimeval(time.Now().UnixNano())
	for what, err := range map[string]error{
		"reboot":            unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART),
		"setting the clock": unix.Settimeofday(&now),
		"loading a module":  unix.InitModule(nil, ""),
		"loading a kernel":  kexec(),
	} {
		if err != unix.EPERM {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, name := range []string{"/dev/mem", "/dev/kmem", "/dev/port", "/dev/console", "/dev/vda", "/dev/vport0p1", "/dev/kmsg"} {
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	child := exec.Command("/proc/self/exe", "-test.run=^$")
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
	if err := child.Run(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a user namespace: %v", err)
	}
	if err := exec.Command("/proc/self/exe", "-test.run=^$").Run(); err != nil { // control
		t.Errorf("without one: %v", err)
	}
}

func kexec() error {
	_, _, errno := unix.Syscall6(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0, 0, 0)
	return errno
}

// insideOrphans: what nobody waits for is reaped by the first process.
func insideOrphans(t *testing.T) {
	said, err := exec.Command("/proc/self/exe", "parent").Output()
	if err != nil {
		t.Fatal(err)
	}
	orphan := "/proc/" + strings.TrimSpace(string(said))
	if err := await(vm.Patience, func() (bool, error) {
		_, err := os.Stat(orphan)
		return errors.Is(err, fs.ErrNotExist), nil
	}); err != nil {
		t.Errorf("%s: %v", orphan, err)
	}
}
