package firecracker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// TestConformance runs the suite with the real programs.
func TestConformance(t *testing.T) {
	d := working(t)
	dir := jailDir(t)
	machinetest.Run(t, suiteHost(t, dir, func() machine.Driver {
		provedOnce(t, d)
		return reporting{d.again()}
	}))
}

// provedOnce spares each driver of a test the proof.
func provedOnce(t testing.TB, d *Driver) string {
	t.Helper()
	digest, err := d.prove(t.Context())
	must(t, err)
	return digest
}

func suiteHost(t testing.TB, dir string, driver func() machine.Driver) machinetest.Host {
	return machinetest.Host{
		Driver: driver, Proxy: machinetest.TestGuest(t, dir), Scratch: dir, Read: machinetest.ReadDisk, Copy: machinetest.CopyDisk, Kill: killVMM, Left: left,
	}
}

// reporting says on the standard error why a machine ended that nobody destroyed, which a
// test that lost its wire cannot know.
type reporting struct{ machine.Driver }

func (r reporting) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	return report(r.Driver.Create(ctx, spec))
}

func (r reporting) Adopt(ctx context.Context, dir string) (machine.Machine, error) {
	return report(r.Driver.Adopt(ctx, dir))
}

// dir of the machine.
func (m *Machine) dir() string { return m.rec.Jail.Dir }

func report(m machine.Machine, err error) (machine.Machine, error) {
	if err == nil {
		go func() {
			<-m.Done()
			if reason := m.Reason(); reason != "destroyed" {
				fmt.Fprintf(os.Stderr, "machine ended: %s\n%s\n", reason, m.Console())
			}
		}()
	}
	return m, err
}

// killVMM does what kill -9 of a machine's Firecracker does.
func killVMM(t *testing.T, dir string) {
	t.Helper()
	rec, err := loadRecord(dir)
	must(t, err)
	p, err := rec.Jail.find()
	must(t, err)
	defer p.Close()
	must(t, p.Signal(unix.SIGKILL))
	must(t, p.Ended())
}

// left lists what is left of a machine that was in dir.
func left(t *testing.T, dir string) (found []string) {
	t.Helper()
	running, err := process.Find(dir) // the jailer's --chroot-base-dir
	must(t, err)
	for _, p := range running {
		found = append(found, fmt.Sprintf("process %d %s", p.PID, p.Name))
		p.Close()
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(mounts), " "+dir+"/") {
		found = append(found, "a mount")
	}
	if entries, err := os.ReadDir(dir); err == nil {
		for _, entry := range entries {
			if entry.Name() == "firecracker" || entry.Name() == recordFile {
				found = append(found, entry.Name())
			}
		}
	}
	return append(found, instancesLeft(t, dir)...)
}

// instancesLeft are cgroups and processes whose machine's directory is gone.
func instancesLeft(t *testing.T, dir string) (found []string) {
	t.Helper()
	if _, err := os.Stat(dir); err == nil {
		return nil // others' machines may run; the suite destroys its own first
	}
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/memory"} {
		cgroups, err := filepath.Glob(filepath.Join(mount, parentCgroup, "cal-*"))
		must(t, err)
		for _, cgroup := range cgroups {
			procs, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
			if err == nil && len(procs) == 0 {
				found = append(found, "cgroup "+cgroup)
			}
		}
	}
	return found
}

// TestStart says what a start takes, the first and the next. Emulated it says nothing.
func TestStart(t *testing.T) {
	d := working(t)
	host := suiteHost(t, jailDir(t), func() machine.Driver { return reporting{d} })
	provedOnce(t, d)
	for range 2 {
		spec := host.Spec(t)
		started := time.Now()
		m, guest := host.Create(t, spec)
		created := time.Since(started)
		guest.Must(script.Action{Do: "echo", UID: -1})
		t.Logf("created in %v, first answer after %v", created, time.Since(started))
		must(t, m.Destroy(machinetest.Context(t)))
	}
}

// TestSnapshot: two machines start from one snapshot, and nothing that must be new is
// the same in both.
func TestSnapshot(t *testing.T) {
	d := working(t)
	dir := jailDir(t)
	d.config.Snapshots = filepath.Join(dir, "snapshots")
	d.warm.Store(true)
	host := suiteHost(t, dir, func() machine.Driver { return reporting{d} })
	provedOnce(t, d)
	var machines []machine.Machine
	var guests []*machinetest.Guest
	for range 2 {
		started := time.Now()
		m, guest := host.Create(t, host.Spec(t))
		guest.Must(script.Action{Do: "echo", UID: -1})
		t.Logf("first answer after %v", time.Since(started))
		machines, guests = append(machines, m), append(guests, guest)
	}
	if !d.warm.Load() {
		t.Fatal("no snapshot was made")
	}
	checkSnapshots(t, d.config.Snapshots, 1)
	for _, fact := range []script.Action{
		{Do: "random", UID: -1},
		{Do: "read", Path: "/proc/sys/kernel/random/uuid", UID: -1},
		{Do: "read", Path: "/proc/sys/kernel/random/boot_id", UID: -1},
		{Do: "hash", UID: -1},
	} {
		one, other := guests[0].Must(fact), guests[1].Must(fact)
		t.Logf("%s %s: %q, %q", fact.Do, fact.Path, one, other)
		if one == other || one == "" {
			t.Errorf("%s %s: both say %q", fact.Do, fact.Path, one)
		}
	}
	for i, guest := range guests { // each has its own disks, which the other does not see
		mine := nucleus.MachineWorkspace + "/mine"
		guest.MustFail(script.Action{Do: "read", Path: mine, UID: -1})
		guest.Must(script.Action{Do: "write", Path: mine, Data: fmt.Sprint(i), UID: machines[i].Facts().ToolsUID})
		clock := guest.Must(script.Action{Do: "clock", UID: -1})
		if at, err := time.Parse(time.RFC3339Nano, clock); err != nil || time.Since(at).Abs() > time.Minute {
			t.Errorf("the clock of a restored machine says %s (%v)", clock, err)
		}
	}
	killVMM(t, machines[0].(interface{ dir() string }).dir())
	<-machines[0].Done()
	guests[1].Must(script.Action{Do: "echo", UID: -1})

	// A snapshot that was changed is thrown away, and machines boot.
	memory, err := filepath.Glob(filepath.Join(d.config.Snapshots, "*", memoryFile))
	must(t, err)
	now := time.Now()
	must(t, os.Chtimes(memory[0], now, now))
	_, guest := host.Create(t, host.Spec(t))
	guest.Must(script.Action{Do: "echo", UID: -1})
	checkSnapshots(t, d.config.Snapshots, 0)
}

// checkSnapshots counts what is kept and sees that it is root's alone.
func checkSnapshots(t *testing.T, dir string, want int) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "*", manifestFile))
	must(t, err)
	if len(found) != want {
		t.Fatalf("snapshots: %v, want %d", found, want)
	}
	for _, name := range found {
		var m manifest
		must(t, durable.Load(name, &m))
		must(t, m.check(filepath.Dir(name)))
		info, err := os.Stat(filepath.Dir(name))
		must(t, err)
		if info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v", filepath.Dir(name), info.Mode())
		}
		var stat unix.Stat_t
		must(t, unix.Stat(filepath.Join(filepath.Dir(name), memoryFile), &stat))
		t.Logf("memory of %d MB takes up %d MB", stat.Size>>20, stat.Blocks>>11)
	}
}
