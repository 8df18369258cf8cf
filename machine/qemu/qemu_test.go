package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"cal/image"
	"cal/internal/confine"
	"cal/internal/kvm"
	"cal/internal/process"
	"cal/internal/testenv/subids"
	"cal/internal/testenv/vm"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/site"
	"cal/nucleus"
)

// bench is what the tests of this package share; see TestMain.
type bench struct {
	dir    string // short
	guest  string
	image  nucleus.Image
	images *image.Store
}

var (
	shared     bench
	kernel     sync.Once
	buildGuest sync.Once
)

func TestMain(m *testing.M) {
	switch { // as the impostor of a test
	case len(os.Args) == 3 && os.Args[1] == "-L" && os.Args[2] == "help":
		said, _ := os.ReadFile(os.Args[0] + ".help")
		os.Stdout.Write(said)
		os.Exit(0)
	case os.Args[0] == "qemu-system-x86_64":
		fmt.Fprintln(os.Stderr, "I am no emulator")
		os.Exit(1)
	}
	confine.Main()
	kvm.Main()
	os.Exit(runMain(m))
}

func runMain(m *testing.M) int {
	if dir := os.Getenv("CAL_TEST_DIR"); dir != "" { // a child of a test uses its bench
		shared = bench{dir: dir, guest: filepath.Join(dir, "testguest"), image: nucleus.Image{Kind: nucleus.ImageDirectory, Path: filepath.Join(dir, "root")}}
		var err error
		if shared.images, err = image.Open(filepath.Join(dir, "images")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		kernel.Do(func() {})
		buildGuest.Do(func() {})
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "calq")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if os.Geteuid() == 0 { // groups that no QEMU may have, see checkWalls
		if err := syscall.Setgroups([]int{4, 27}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	shared = bench{dir: dir}
	return m.Run()
}

// need returns what a test of machines needs, or skips it.
func need(t testing.TB) bench {
	t.Helper()
	kernel.Do(func() { shared.images = vm.StoreIn(t, filepath.Join(shared.dir, "images")) }) // or skip
	if shared.images == nil {
		t.Skip("no kernel to boot: the first test that was skipped says why")
	}
	buildGuest.Do(func() {
		shared.guest = machinetest.TestGuest(t, shared.dir)
		shared.image = machinetest.SmallImage(t, shared.dir)
	})
	return shared
}

func newDriver(b bench) *Driver {
	_, emulated := New(Config{Images: b.images, Proxy: b.guest, Usual: nucleus.Resources{CPU: 1, MemoryMB: 512, DiskMB: 256}})
	return emulated
}

// host is this host with QEMU's emulated driver.
func host(t *testing.T) machinetest.Host {
	b := need(t)
	return machinetest.Host{
		Driver:  func() machine.Driver { return newDriver(b) },
		Proxy:   b.guest,
		Image:   b.image,
		Scratch: b.dir,
		Disk:    true,
		Kill:    killVMM,
		Left:    left,
	}
}

func processOf(t *testing.T, dir string) process.Process {
	t.Helper()
	rec, err := loadRecord(dir)
	must(t, err)
	running, err := process.Find(rec.tag(place(dir)))
	must(t, err)
	for _, p := range running {
		t.Cleanup(func() { p.Close() })
	}
	if len(running) != 1 {
		t.Fatalf("%d processes run for %s", len(running), dir)
	}
	return running[0]
}

func killVMM(t *testing.T, dir string) {
	t.Helper()
	must(t, processOf(t, dir).Signal(syscall.SIGKILL))
}

// left lists what a machine must not leave.
func left(t *testing.T, dir string) (found []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err == nil && filepath.IsAbs(dir) && strings.Contains(string(data), dir+"/") {
			found = append(found, "process "+entry.Name())
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if filepath.IsAbs(dir) && strings.Contains(string(mounts), dir) {
		found = append(found, "a mount")
	}
	id := filepath.Base(filepath.Dir(dir)) // as Host.Spec names machines
	for _, pattern := range []string{"/sys/fs/cgroup/cal-" + id + "-*", "/sys/fs/cgroup/*/cal-" + id + "-*"} {
		names, err := filepath.Glob(pattern)
		must(t, err)
		found = append(found, names...)
	}
	for _, name := range append(made, site.RecordFile, site.LockFile) {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			found = append(found, name)
		}
	}
	return found
}

// The tests of asUser run again as an ordinary user, by a copy of this program with
// this in its environment: the directory that holds what they need.
const (
	asOrdinary = "CAL_TEST_ORDINARY"
	ordinaryID = 64323
)

// TestOrdinaryUser runs some of the tests as a user without rights, and as one with
// subordinate ids.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this is the ordinary user")
	}
	need(t)
	t.Run("without rights", func(t *testing.T) {
		again := asUser(t, "user")
		again.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryID, Gid: ordinaryID}}
		runAgain(t, again)
	})
	t.Run("with subordinate ids", func(t *testing.T) {
		again := asUser(t, "sub")
		as, err := subids.As(again.Dir, ordinaryID, 300000, 400000)
		if err != nil {
			t.Skipf("no subordinate ids on this host: %v", err)
		}
		again.Args = slices.Concat(as, []string{again.Path}, again.Args[1:])
		again.Path, err = exec.LookPath(as[0])
		must(t, err)
		runAgain(t, again)
	})
}

// asUser prepares a directory and a command.
func asUser(t *testing.T, name string) *exec.Cmd {
	dir := filepath.Join(shared.dir, name)
	must(t, os.Chmod(shared.dir, 0o755))
	must(t, os.Mkdir(dir, 0o755))
	for name, source := range map[string]string{"testguest": shared.guest, "tests": "/proc/self/exe"} {
		data, err := os.ReadFile(source)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, name), data, 0o755))
	}
	must(t, os.CopyFS(filepath.Join(dir, "root"), os.DirFS(shared.image.Path)))
	vm.StoreIn(t, filepath.Join(dir, "images"))
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, ordinaryID, ordinaryID))
	}))
	again := exec.CommandContext(t.Context(), filepath.Join(dir, "tests"), "-test.v", "-test.timeout=5m", "-test.run=^(TestConformance|TestClaims)$/^(adopt|walls of QEMU|fixed disks)$")
	again.Dir = dir
	again.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir, asOrdinary + "=1", "CAL_TEST_DIR=" + dir}
	return again
}

func runAgain(t *testing.T, again *exec.Cmd) {
	t.Helper()
	output, err := again.CombinedOutput()
	t.Logf("%s", output)
	if err != nil || !strings.Contains(string(output), "--- PASS: TestClaims/walls_of_QEMU") {
		t.Errorf("as user %d: %v", ordinaryID, err)
	}
}

func TestConformance(t *testing.T) { machinetest.Run(t, host(t)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
