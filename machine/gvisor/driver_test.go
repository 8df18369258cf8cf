package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/internal/process"
	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/machine/site"
	"cal/nucleus"
)

// TestKilledWhileCreating kills the process that creates, at moments spread
// over the whole of Create, and removes what it left.
func TestKilledWhileCreating(t *testing.T) {
	t.Parallel()
	h := host(t)
	kills := 8
	if testing.Short() {
		kills = 3
	}
	for i := range kills {
		spec := h.Spec(t)
		child := exec.Command("/proc/self/exe", "-test.run=^TestHelperCreates$")
		child.Env = append(os.Environ(), "CAL_TEST_CREATE="+spec.Dir+"\n"+spec.Workspace+"\n"+spec.Proxy+"\n"+shared.runsc)
		out, err := child.StdoutPipe()
		must(t, err)
		must(t, child.Start())
		ready := make([]byte, 6)
		if _, err := out.Read(ready); err != nil {
			t.Fatalf("child: %v", err)
		}
		// The moment is the attack: it is spread over what Create takes.
		time.Sleep(time.Duration(i) * 180 * time.Millisecond / time.Duration(kills))
		must(t, child.Process.Kill())
		child.Wait()
		if err := h.Driver().Remove(t.Context(), spec.Dir); err != nil {
			t.Errorf("kill %d: %v", i, err)
		}
		if found := left(t, spec.Dir); found != nil {
			t.Errorf("kill %d left %v", i, found)
		}
		if _, err := os.Lstat(spec.Dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("kill %d: the directory is left: %v", i, err)
		}
		if _, err := os.Lstat(spec.Workspace); err != nil {
			t.Errorf("kill %d: the workspace is gone: %v", i, err)
		}
	}
}

// TestHelperCreates is the child of TestKilledWhileCreating.
func TestHelperCreates(t *testing.T) {
	given := strings.Split(os.Getenv("CAL_TEST_CREATE"), "\n")
	if len(given) != 4 {
		t.Skip("only as a child")
	}
	fmt.Println("ready")
	spec := machine.Spec{ID: filepath.Base(filepath.Dir(given[0])), Dir: given[0], Workspace: given[1], Proxy: given[2], Image: nucleus.Image{Kind: "host"}}
	// An ordinary user's screening of /usr would take all the time there is.
	if os.Geteuid() != 0 {
		spec.Image = nucleus.Image{Kind: "directory", Path: smallImage(t)}
	}
	if _, err := New(Config{Runsc: given[3]}).Create(context.Background(), spec); err != nil {
		t.Fatal(err)
	}
	select {} // until it is killed
}

func smallImage(t *testing.T) string {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755))
	return dir
}

// TestNoRootOfTheHost: what runs for a machine has neither the host's uid 0 nor
// a capability in the host's user namespace.
func TestNoRootOfTheHost(t *testing.T) {
	h := host(t)
	spec := h.Spec(t)
	h.Create(t, spec)
	own, err := os.Readlink("/proc/self/ns/user")
	must(t, err)
	running, err := process.Find(place(spec.Dir).argument())
	must(t, err)
	if len(running) < 2 {
		t.Fatalf("found %d processes, want sandbox and gofer", len(running))
	}
	for _, p := range running {
		defer p.Close()
		var stat syscall.Stat_t
		must(t, syscall.Stat(fmt.Sprintf("/proc/%d", p.PID), &stat))
		if stat.Uid == 0 || os.Geteuid() == 0 && stat.Uid < lowestID {
			t.Errorf("%s runs as uid %d", p.Name, stat.Uid)
		}
		if space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", p.PID)); err != nil || space == own {
			t.Errorf("%s is in the host's user namespace: %q %v", p.Name, space, err)
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
		must(t, err)
		if !strings.Contains(string(status), "NoNewPrivs:\t1\n") {
			t.Errorf("%s may gain rights", p.Name)
		}
		if groups := strings.TrimSpace(statusValue(string(status), "Groups")); os.Geteuid() == 0 && groups != "" {
			t.Errorf("%s has supplementary groups %q", p.Name, groups)
		}
		if session := sessionOf(t, p.PID); session == sessionOf(t, os.Getpid()) {
			t.Errorf("%s is in this session", p.Name)
		}
	}
}

func sessionOf(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(data), ") ")
	return strings.Fields(rest)[3]
}

// TestWireIsNotInherited: a child of the node that kept an end would keep the
// wire open after the node's death.
func TestWireIsNotInherited(t *testing.T) {
	before := openFiles(t)
	conn, guest, err := socketPair()
	must(t, err)
	defer conn.Close()
	defer guest.Close()
	if during := openFiles(t); during != before {
		t.Errorf("a child sees %q, before %q", during, before)
	}
}

func openFiles(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("/bin/ls", "/proc/self/fd")
	output, err := cmd.Output()
	must(t, err)
	return string(output)
}

// TestConsoleIsBounded: what a guest prints without end is cut on disk, and its
// end can be read.
func TestConsoleIsBounded(t *testing.T) {
	t.Parallel()
	h := host(t)
	m, guest := h.Create(t, h.Spec(t))
	for range 3 {
		guest.Must(script.Action{Do: "stdout", Data: strings.Repeat("noise\n", 100_000), UID: -1})
	}
	guest.Must(script.Action{Do: "stdout", Data: "the last line\n", UID: -1})
	name := m.(*Machine).place.console()
	for deadline := time.Now().Add(10 * time.Second); ; {
		info, err := os.Stat(name)
		must(t, err)
		if info.Size() <= site.ConsoleMost {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the console has %d bytes", info.Size())
		}
		must(t, site.Pause(t.Context(), 50*time.Millisecond))
	}
	guest.Must(script.Action{Do: "stdout", Data: "and one more\n", UID: -1})
	if shown := m.Console(); len(shown) > site.ConsoleTail || !strings.HasSuffix(shown, "the last line\nand one more\n") {
		t.Errorf("console ends with %q", shown[max(0, len(shown)-60):])
	}
}

func TestRefusesLongDirectory(t *testing.T) {
	h := host(t)
	spec := h.Spec(t)
	long := filepath.Join(filepath.Dir(spec.Dir), strings.Repeat("d", 100))
	must(t, os.Rename(spec.Dir, long))
	spec.Dir = long
	if _, err := h.Driver().Create(t.Context(), spec); !errors.Is(err, machine.ErrRefused) || !strings.Contains(err.Error(), "too long") {
		t.Errorf("got %v", err)
	}
}

// TestDamagedRecord: a record that names places which are not a machine's
// deletes nothing there.
func TestDamagedRecord(t *testing.T) {
	h := host(t)
	precious := filepath.Join(h.Spec(t).Workspace, "precious")
	must(t, os.WriteFile(precious, nil, 0o600))
	for name, text := range map[string]string{
		"root elsewhere":    `{"driver":"gvisor","id":"x","created":"","facts":{"tools_uid":0,"tools_gid":0,"agent_uid":0,"agent_gid":0},"root":"` + filepath.Dir(precious) + `"}`,
		"root with dots":    `{"driver":"gvisor","id":"x","created":"","facts":{"tools_uid":0,"tools_gid":0,"agent_uid":0,"agent_gid":0},"root":"/run/cal/../../` + filepath.Dir(precious) + `"}`,
		"torn":              `{"driver":"gvi`,
		"of another driver": `{"driver":"fake","id":"x","created":"","facts":{"tools_uid":0,"tools_gid":0,"agent_uid":0,"agent_gid":0}}`,
	} {
		spec := h.Spec(t)
		must(t, os.WriteFile(place(spec.Dir).record(), []byte(text), 0o600))
		if err := h.Driver().Remove(t.Context(), spec.Dir); err == nil {
			t.Errorf("%s: removed", name)
		}
		if _, err := os.Lstat(precious); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := os.Lstat(place(spec.Dir).record()); err != nil {
			t.Errorf("%s: the record is gone: %v", name, err)
		}
	}
}
