package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/machine/site"
	"cal/nucleus"
)

// TestLimitsHold tries each limit from the inside, in one machine.
func TestLimitsHold(t *testing.T) {
	t.Parallel()
	h := host(t)
	spec := h.Spec(t)
	spec.Resources = nucleus.Resources{CPU: 1, MemoryMB: 300, Pids: 100}
	spec.Watched = []string{"memory"}
	m, guest := h.Create(t, spec)
	tools := m.Facts().ToolsUID

	reply := guest.Try(script.Action{Do: "fork", N: 200, UID: tools})
	if n, err := strconv.Atoi(reply.Data); err != nil || n >= 100 || reply.Err == "" {
		t.Errorf("pids: %+v", reply)
	}
	guest.Must(script.Action{Do: "fork", N: 2, UID: tools}) // control: those that ended count no more
	if allowed, err := strconv.Atoi(processorsOf(t, sandboxOf(t, spec.Dir).PID)); os.Geteuid() != 0 && (err != nil || allowed != 1) {
		t.Errorf("the sandbox may run on %d processors: %v", allowed, err)
	}

	guest.Must(script.Action{Do: "fill", N: 20, UID: -1}) // control
	if os.Geteuid() == 0 {
		enforced(t, m, guest)
		return
	}
	watched(t, m, guest)
}

// enforced: the kernel kills what goes over a cgroup's limit.
func enforced(t *testing.T, m machine.Machine, guest *machinetest.Guest) {
	if _, err := guest.Send(script.Action{Do: "fill", N: 2000, UID: -1}); err == nil {
		t.Error("2000 MB were filled under a limit of 300")
	}
	select {
	case <-m.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the machine lives")
	}
	if !strings.Contains(m.Reason(), "memory limit of 300 MB") {
		t.Errorf("reason: %q", m.Reason())
	}
}

// watched: the machine is paused, and goes on when it is let.
func watched(t *testing.T, m machine.Machine, guest *machinetest.Guest) {
	must(t, guest.Begin(script.Action{Do: "fill", N: 400, UID: -1}))
	select {
	case reason := <-m.Paused():
		if !strings.Contains(reason, "above the watched limit of 300 MB") {
			t.Errorf("reason: %q", reason)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the machine was not paused")
	}
	pid := sandboxOf(t, string(m.(*Machine).place)).PID
	for deadline := time.Now().Add(10 * time.Second); stateOf(t, pid) != "T"; {
		if time.Now().After(deadline) {
			t.Fatalf("paused sandbox is in state %q", stateOf(t, pid))
		}
		must(t, site.Pause(t.Context(), 10*time.Millisecond))
	}
	released, resumed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(resumed)
		for {
			m.Resume(t.Context())
			select {
			case <-m.Paused(): // a slow host: it had not come to give back its memory
			case <-released:
				return
			}
		}
	}()
	_, err := guest.Finish()
	must(t, err)
	guest.Must(script.Action{Do: "release", UID: -1})
	close(released)
	<-resumed
	m.Resume(t.Context())
	select {
	case reason := <-m.Paused():
		t.Errorf("paused after the memory was given back: %s", reason)
	case <-time.After(resumeGrace + 4*watchEvery):
	}
}

// TestUsualLimits: a machine for which nobody stated a limit has some.
func TestUsualLimits(t *testing.T) {
	t.Parallel()
	h := host(t)
	h.Driver = func() machine.Driver {
		return New(Config{Runsc: shared.runsc, Screen: &screen, Usual: nucleus.Resources{MemoryMB: 300, Pids: 100}})
	}
	m, guest := h.Create(t, h.Spec(t))
	tools := m.Facts().ToolsUID
	if reply := guest.Try(script.Action{Do: "fork", N: 200, UID: tools}); reply.Err == "" {
		t.Errorf("200 processes where 100 are usual: %+v", reply)
	}
	// Files in memory end before the memory does, and nothing is paused for them.
	for _, dir := range []string{"/tmp", "/dev/shm", nucleus.MachineHome} {
		full := dir + "/full"
		if reply := guest.Try(script.Action{Do: "run", Path: "/", Args: []string{"sh", "-c", "head -c 200000000 /dev/zero > " + full}, UID: tools}); !strings.Contains(reply.Data+reply.Err, "No space left") {
			t.Errorf("200 MB in %s: %+v", dir, reply)
		}
		guest.Must(script.Action{Do: "remove", Path: full, UID: tools})
		guest.Must(script.Action{Do: "run", Path: "/", Args: []string{"sh", "-c", "head -c 50000000 /dev/zero > " + full}, UID: tools}) // control
		guest.Must(script.Action{Do: "remove", Path: full, UID: tools})
	}
	select {
	case reason := <-m.Paused():
		t.Errorf("paused: %s", reason)
	default:
	}
	watched(t, m, guest)
}

func processorsOf(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if list, ok := strings.CutPrefix(line, "Cpus_allowed_list:"); ok {
			if list = strings.TrimSpace(list); !strings.ContainsAny(list, ",-") {
				return "1"
			}
			return "several: " + list
		}
	}
	return ""
}

func stateOf(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if state, ok := strings.CutPrefix(line, "State:"); ok {
			return strings.Fields(state)[0]
		}
	}
	return ""
}

// cgroupTree is a pretended mount of version 2.
func cgroupTree(t *testing.T, files ...string) string {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte("cpu memory\n"), 0o644))
	for _, name := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o644))
	}
	return dir
}

func TestCgroupVersion2(t *testing.T) {
	mount := cgroupTree(t, "cal-x/memory.max", "cal-x/cpu.max")
	name, err := makeCgroup(mount, "cal-x")
	if err != nil || name != "cal-x" {
		t.Fatalf("%q, %v", name, err)
	}
	rec := record{Cgroup: name}
	rec.limit(nucleus.Resources{CPU: 2, MemoryMB: 512}, nucleus.Resources{})
	must(t, rec.setCgroup(mount))
	for file, want := range map[string]string{"memory.max": "536870912", "cpu.max": "200000 100000"} {
		if data, err := os.ReadFile(filepath.Join(mount, name, file)); err != nil || string(data) != want {
			t.Errorf("%s: %q, %v", file, data, err)
		}
	}
	for _, limit := range rec.Limits[:2] {
		if limit.How != machine.Enforced {
			t.Errorf("%+v", limit)
		}
	}
}

// TestCgroupWithoutControllers: a directory can be made, but limits nothing.
func TestCgroupWithoutControllers(t *testing.T) {
	mount := cgroupTree(t)
	name, err := makeCgroup(mount, "cal-x")
	if err != nil || name != "" {
		t.Errorf("%q, %v", name, err)
	}
	if _, err := os.Lstat(filepath.Join(mount, "cal-x")); !os.IsNotExist(err) {
		t.Errorf("the cgroup is left: %v", err)
	}
	rec := record{}
	rec.limit(nucleus.Resources{MemoryMB: 512}, nucleus.Resources{})
	if rec.Limits[1].How != machine.Watched || rec.MaxWatch != 512<<20 {
		t.Errorf("%+v", rec)
	}
}

// TestCgroupIsReadBack: what the kernel does not confirm is not called enforced.
func TestCgroupIsReadBack(t *testing.T) {
	rec := record{Cgroup: "cal-none", Memory: 1 << 30}
	if err := rec.checkCgroup("/sys/fs/cgroup", os.Getpid()); err == nil {
		t.Error("this process is said to be in a cgroup that does not exist")
	}
}

func TestProcessors(t *testing.T) {
	cmd := exec.Command("/usr/bin/grep", "Cpus_allowed_list", "/proc/self/status")
	output, err := cmd.StdoutPipe()
	must(t, err)
	must(t, startOn(cmd.Start, 1))
	line := make([]byte, 100)
	n, err := output.Read(line)
	must(t, err)
	must(t, cmd.Wait())
	if strings.ContainsAny(string(line[:n]), "-,") {
		t.Errorf("child runs on %s", line[:n])
	}
}

// TestCgroupVersion2Real takes a tree of the kernel's own. Where version 1 holds the
// controllers, as a hybrid host has it, nothing may be promised and nothing be left.
func TestCgroupVersion2Real(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root mounts a cgroup tree")
	}
	mount, ended := t.TempDir(), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for ever: the thread's mount namespace dies with it
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
			t.Errorf("mount namespace: %v", err)
			return
		}
		if err := unix.Mount("cgroup2", mount, "cgroup2", 0, ""); err != nil {
			t.Logf("no cgroup2 on this host: %v", err)
			return
		}
		name := nucleus.NewID("cal-test-")
		controllers, err := os.ReadFile(filepath.Join(mount, "cgroup.subtree_control"))
		has := strings.Fields(string(controllers))
		able := slices.Contains(has, "memory") && slices.Contains(has, "cpu")
		made, failed := makeCgroup(mount, name)
		t.Logf("the tree's root hands down %q; made %q", has, made)
		if err != nil || failed != nil || able != (made == name) {
			t.Errorf("controllers %q, %v: made %q, %v", controllers, err, made, failed)
		}
		rec := record{Cgroup: made}
		rec.limit(nucleus.Resources{CPU: 1, MemoryMB: 300}, nucleus.Resources{})
		if want := map[bool]string{true: machine.Enforced, false: machine.Watched}[able]; rec.Limits[1].How != want {
			t.Errorf("memory: %+v, want %s", rec.Limits[1], want)
		}
		if able {
			if err := errors.Join(rec.setCgroup(mount), holds(filepath.Join(mount, made, "memory.max"), 300<<20)); err != nil {
				t.Error(err)
			}
		}
		if err := removeCgroup(context.Background(), mount, made); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(filepath.Join(mount, name)); !os.IsNotExist(err) {
			t.Errorf("left: %v", err)
		}
	}()
	<-ended
}
