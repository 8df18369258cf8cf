package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"cal/image"
	"cal/internal/confine"
	"cal/internal/kvm"
	"cal/internal/process"
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
	confine.Main()
	kvm.Main()
	os.Exit(runMain(m))
}

func runMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "calq")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	shared = bench{dir: dir}
	return m.Run()
}

// need returns what a test of machines needs, or skips it.
func need(t testing.TB) bench {
	t.Helper()
	kernel.Do(func() { shared.images = vm.StoreIn(t, filepath.Join(shared.dir, "images")) }) // or skip
	if shared.images == nil {
		t.Skip("no kernel to boot")
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
	rec, err := loadRecord(place(dir))
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
	for _, name := range append(made, recordFile, site.LockFile) {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			found = append(found, name)
		}
	}
	return found
}

func TestConformance(t *testing.T) { machinetest.Run(t, host(t)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
