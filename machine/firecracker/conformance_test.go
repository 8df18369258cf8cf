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

	"cal/internal/process"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
)

// TestConformance runs the suite with the real programs.
func TestConformance(t *testing.T) {
	d := working(t)
	dir := jailDir(t)
	machinetest.Run(t, suiteHost(t, dir, func() machine.Driver {
		fresh := New(d.config)
		fresh.proved = provedOnce(t, d)
		return reporting{fresh}
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
	if strings.Contains(string(mounts), dir) {
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
