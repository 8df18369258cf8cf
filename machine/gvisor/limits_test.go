package gvisor

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

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
