package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"cal/image"
	"cal/internal/confine"
	"cal/internal/kvm"
	"cal/machine"
	"cal/machine/machinetest"
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
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("QEMU is not installed: %v", err)
	}
	buildGuest.Do(func() {
		shared.guest = machinetest.TestGuest(t, shared.dir)
		shared.image = machinetest.SmallImage(t, shared.dir)
		store := os.Getenv("CAL_TEST_IMAGES")
		if store == "" {
			store = filepath.Join(shared.dir, "images")
		}
		var err error
		if shared.images, err = image.Open(store); err != nil {
			t.Fatal(err)
		}
	})
	return shared
}

func newDriver(b bench) *Driver {
	_, emulated := New(Config{Images: b.images, Proxy: b.guest, Usual: nucleus.Resources{CPU: 1, MemoryMB: 512, DiskMB: 256}})
	return emulated
}

func TestOne(t *testing.T) {
	b := need(t)
	d := newDriver(b)
	for range 3 {
		base, err := os.MkdirTemp(b.dir, "m")
		if err != nil {
			t.Fatal(err)
		}
		spec := machine.Spec{ID: "one", Dir: base + "/d", Workspace: base + "/w", Proxy: b.guest, Image: b.image}
		os.Mkdir(spec.Dir, 0o700)
		os.Mkdir(spec.Workspace, 0o700)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		began := time.Now()
		m, err := d.Create(ctx, spec)
		t.Log("create", time.Since(began))
		if err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		fmt.Println(m.Console())
		if err := m.Destroy(ctx); err != nil {
			t.Fatal(err)
		}
		t.Log("destroy", time.Since(began), m.Reason())
	}
}
