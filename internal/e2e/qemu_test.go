package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/internal/kvm"
	"cal/internal/testenv"
	"cal/internal/testenv/vm"
	"cal/machine/machinetest"
	"cal/nucleus"
)

// withQEMU is a person who has a kernel already, and what names QEMU and a small root.
func withQEMU(t *testing.T) (*testenv.Env, []string) {
	t.Helper()
	e := testenv.New(t)
	vm.StoreIn(t, filepath.Join(e.CAL, "images")) // or skip
	root := machinetest.SmallImage(t, e.Dir)
	return e, []string{"run", "--driver", "qemu", "--image", "directory:" + root.Path}
}

// TestQEMU runs commands in a machine with a kernel of its own, and kills it in the middle.
func TestQEMU(t *testing.T) {
	e, run := withQEMU(t)
	own, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	got := e.Cal(append(run, "--", "uname", "-r")...).Want(t, 0)
	if release := strings.TrimSpace(got.Stdout); release == strings.TrimSpace(string(own)) || !strings.Contains(release, "cloud") {
		t.Errorf("the machine's kernel is %q, the host's %q", release, own)
	}
	var tier nucleus.Tier
	for _, entry := range e.Entries(func(entry nucleus.Entry) bool { return entry.Kind == nucleus.KindPodCreate }) {
		if strings.Contains(string(entry.Data), `"tier":"emulated"`) {
			tier = nucleus.TierEmulated
		} else if strings.Contains(string(entry.Data), `"tier":"vm"`) {
			tier = nucleus.TierVM
		}
	}
	usable := new(kvm.Host).Probe(t.Context()) == nil
	if want := map[bool]nucleus.Tier{true: nucleus.TierVM, false: nucleus.TierEmulated}[usable]; tier != want {
		t.Errorf("the log says tier %q, want %q", tier, want)
	}
	if !usable {
		e.Cal(append(run, "--require", "kernel", "--", "true")...).Want(t, 1, "qemu is of tier emulated")
		e.Cal("run", "--require", "vm", "--", "true").Want(t, 1, "no machine of tier vm")
		e.Cal("run", "--", "true").Want(t, 0) // control: nobody is given an emulated machine who did not name it
		if n := len(e.Entries(func(entry nucleus.Entry) bool {
			return entry.Kind == nucleus.KindPodCreate && strings.Contains(string(entry.Data), `"emulated"`)
		})); n != 1 {
			t.Errorf("%d emulated machines, want the one that was named", n)
		}
	}

	running := e.Start(e.Command("cal", append(run, "--", "sh", "-c", "echo begun; sleep 600")...))
	running.Until("begun")
	machines := e.Sandboxes()
	if len(machines) != 1 {
		t.Fatalf("%d machines run", len(machines))
	}
	if err := syscall.Kill(machines[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := running.Wait(); r.Code != 1 || !strings.Contains(r.Stderr, "ended") {
		t.Errorf("of a machine that was killed in the middle\n%v", r)
	}
	failed := e.Entries(func(entry nucleus.Entry) bool { return entry.Kind == nucleus.KindPodFail })
	if len(failed) != 1 || !strings.Contains(string(failed[0].Data), "QEMU ended: signal: killed") || !strings.Contains(string(failed[0].Data), "console ends with") {
		t.Errorf("the log says of its end: %+v", failed)
	}
	testenv.Eventually(t, 20*time.Second, "nothing of the machine is left", func() bool { return len(e.LeftOfMachines()) == 0 })
	e.Verify()
}

// TestQEMUOrdinaryUser: neither root nor a right at KVM is needed.
func TestQEMUOrdinaryUser(t *testing.T) {
	if !isRoot() {
		t.Skip("this is an ordinary user; TestQEMU is the test")
	}
	e, run := withQEMU(t)
	asOrdinary(t, e)
	e.Cal("doctor").Want(t, 0, "emulated")
	e.Cal(append(run, "--", "uname", "-r")...).Want(t, 0, "cloud")
	e.Verify()
}
