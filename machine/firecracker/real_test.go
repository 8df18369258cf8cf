package firecracker

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/image"
	"cal/internal/kvm"
	"cal/machine"
)

func TestMain(m *testing.M) {
	kvm.Main()
	beFake()
	code := m.Run()
	for _, dir := range []string{storeMade, built.dir} {
		if dir != "" {
			os.RemoveAll(dir)
		}
	}
	os.Exit(code)
}

// programs are the real ones, as make test-firecracker or the PATH names them.
func programs(t testing.TB) (firecracker, jailer string) {
	t.Helper()
	for _, program := range []struct {
		name, variable string
		path           *string
	}{{"firecracker", "FIRECRACKER", &firecracker}, {"jailer", "JAILER", &jailer}} {
		*program.path = os.Getenv(program.variable)
		if *program.path == "" {
			found, err := exec.LookPath(program.name)
			if err != nil {
				t.Skipf("no %s on PATH, and %s does not name one; make test-firecracker runs this", program.name, program.variable)
			}
			*program.path = found
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("firecracker's jailer must be started as root")
	}
	return firecracker, jailer
}

// TestProbe: what the node asks before it starts a machine.
func TestProbe(t *testing.T) {
	d := working(t)
	d.config.Patience = emulated(d.config.Patience, time.Minute)
	started := time.Now()
	must(t, d.Probe(t.Context()))
	t.Logf("took %v", time.Since(started))
	if d.proved == "" {
		t.Error("the filter was not proved")
	}
}

// TestProbeWithoutKVM: where KVM is there and runs no guest, the probe says so in time.
func TestProbeWithoutKVM(t *testing.T) {
	firecracker, jailer := programs(t)
	if err := kvmHost.Probe(t.Context()); err == nil {
		t.Skip("KVM runs guests here")
	}
	started := time.Now()
	err := New(Config{Firecracker: firecracker, Jailer: jailer}).Probe(t.Context())
	var failed *machine.ProbeError
	if !errors.As(err, &failed) || !strings.Contains(err.Error(), "kvm") || failed.Mend == "" {
		t.Errorf("got %v", err)
	}
	if took := time.Since(started); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestProof: the filter of the real Firecracker is proved, and nothing of the try is left.
func TestProof(t *testing.T) {
	firecracker, jailer := programs(t)
	d := New(Config{Firecracker: firecracker, Jailer: jailer, Scratch: jailDir(t)})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	digest, err := d.prove(ctx)
	if want, _ := fileDigest(firecracker); err != nil || digest != want {
		t.Fatalf("%q, %v", digest, err)
	}
	if entries, err := os.ReadDir(d.config.Scratch); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// TestProofOfTheDead: what a process that died while it probed has left is removed by
// the next.
func TestProofOfTheDead(t *testing.T) {
	v := realFirecracker(t)
	d := New(Config{Firecracker: v.firecracker, Jailer: v.jailer, Scratch: v.scratch})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := d.prove(ctx)
	must(t, err)
	if !v.vmm.jail.ended(d.config.Cgroups) {
		t.Error("an earlier probe's Firecracker runs on")
	}
	if entries, err := os.ReadDir(v.scratch); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// realFirecracker is a jailed one that has not been configured.
func realFirecracker(t *testing.T) realVMM {
	t.Helper()
	firecracker, jailer := programs(t)
	d := New(Config{Firecracker: firecracker, Jailer: jailer})
	scratch := jailDir(t)
	dir := filepath.Join(scratch, "cal-probe-dead", "m") // as site.BeginTrial makes it
	must(t, os.MkdirAll(dir, 0o700))
	rec, err := d.begin(machine.Spec{ID: "test", Dir: dir})
	must(t, err)
	must(t, rec.Jail.make())
	t.Cleanup(func() { must(t, d.Remove(context.Background(), dir)) })
	for name, data := range map[string][]byte{"kernel": tinyKernel(), "initramfs": []byte("x"), "root.erofs": make([]byte, 4096), "scratch.ext4": make([]byte, 4096)} {
		must(t, os.WriteFile(rec.Jail.path(name), data, 0o600))
		must(t, rec.Jail.own(name))
	}
	digest, err := fileDigest(firecracker)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	v, err := d.launch(ctx, rec.Jail, digest)
	must(t, err)
	t.Cleanup(v.letGo)
	return realVMM{v, firecracker, jailer, scratch}
}

type realVMM struct {
	*vmm
	firecracker, jailer, scratch string
}

// TestRealRefuses: the real API refuses all that the fake one refuses, in the same words.
func TestRealRefuses(t *testing.T) {
	programs(t)
	for name, r := range refusals() {
		t.Run(name, func(t *testing.T) { r.try(t, realFirecracker(t).api) })
	}
}

// TestProofOfNone: a Firecracker whose filter stops nothing is refused, as one is that was built
// for another libc than musl.
func TestProofOfNone(t *testing.T) {
	_, jailer := programs(t)
	unfiltered := os.Getenv("FIRECRACKER_UNFILTERED")
	if unfiltered == "" {
		t.Skip("FIRECRACKER_UNFILTERED names no Firecracker whose filter stops nothing; make test-firecracker UNFILTERED=PATH does")
	}
	d := New(Config{Firecracker: unfiltered, Jailer: jailer, Scratch: jailDir(t)})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := d.prove(ctx)
	var failed *machine.ProbeError
	if !errors.As(err, &failed) || !errors.Is(err, errAllowed) || !strings.Contains(err.Error(), "seccomp") {
		t.Errorf("got %v, want %v", err, errAllowed)
	}
	if d.proved != "" {
		t.Error("taken for proved")
	}
}

// working is a driver on a host where it works, or the test is skipped.
func working(t testing.TB) *Driver {
	t.Helper()
	firecracker, jailer := programs(t)
	if err := kvmHost.Probe(t.Context()); err != nil {
		if emulated(false, true) {
			t.Fatal(err)
		}
		t.Skipf("KVM runs no guest here: %v; make test-firecracker emulates a host that has it", err)
	}
	return small(New(Config{Firecracker: firecracker, Jailer: jailer, Images: imageStore(t), KVM: &kvmHost}))
}

// small has machines that do not say otherwise take little of a host that is emulated.
func small(d *Driver) *Driver {
	d.usual.CPU, d.usual.MemoryMB = 1, 512
	return d
}

// kvmHost has all the time of a test where it is emulated.
var kvmHost = kvm.Host{Patience: emulated(0, time.Minute)}

// emulated is the second value in the host that make test-firecracker emulates.
func emulated[T any](usual, there T) T {
	if os.Getenv("CAL_TEST_PATIENCE") != "" {
		return there
	}
	return usual
}

// imageStore keeps images for all tests of this process, or for longer where one is named.
func imageStore(t testing.TB) *image.Store {
	t.Helper()
	storeOnce.Do(func() {
		dir := os.Getenv("CAL_TEST_IMAGES")
		if dir == "" {
			if dir, storeErr = os.MkdirTemp("/var/tmp", "cal-test-images-"); storeErr != nil {
				return
			}
			storeMade = dir
		}
		store, storeErr = image.Open(dir)
	})
	must(t, storeErr)
	return store
}

var (
	storeOnce sync.Once
	store     *image.Store
	storeErr  error
	storeMade string // to be removed
)

// jailDir is a directory of this test's in which jails can be.
func jailDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "cal-test-")
	must(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
