package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cal/internal/cgroup"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/machine/microvm"
	"cal/nucleus"
)

// TestClaims tries what the package promises, in two machines: the second has the
// workspace of the first.
func TestClaims(t *testing.T) {
	h := host(t)
	spec := h.Spec(t)
	spec.Resources = nucleus.Resources{CPU: 1, MemoryMB: 320, Pids: 100, DiskMB: 64}
	m, err := h.Driver().Create(machinetest.Context(t), spec)
	must(t, err)
	defer func() { must(t, m.Destroy(machinetest.Context(t))) }()
	guest := machinetest.Talk(t, m.Wire())
	rec := recordOf(t, spec.Dir)
	pid := processOf(t, spec.Dir).PID

	t.Run("walls of QEMU", func(t *testing.T) { tryWalls(t, rec, pid) })
	t.Run("no network", func(t *testing.T) { tryNetwork(t, guest) })
	t.Run("fixed disks", func(t *testing.T) { tryFixedDisks(t, m, guest) })
	t.Run("limits", func(t *testing.T) { tryLimits(t, m, guest) })

	home := nucleus.MachineHome
	guest.Must(script.Action{Do: "write", Path: home + "/left-in-scratch", UID: m.Facts().ToolsUID})
	guest.Must(script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/kept", Data: "kept", UID: m.Facts().ToolsUID})
	var next *machinetest.Guest
	t.Run("another machine", func(t *testing.T) {
		other := h.Spec(t)
		other.Workspace = spec.Workspace
		began := time.Now()
		if m, err := h.Driver().Create(machinetest.Context(t), other); err == nil || !errors.Is(err, machine.ErrRefused) || !strings.Contains(err.Error(), "another machine's") {
			if err == nil {
				m.Destroy(machinetest.Context(t))
			}
			t.Fatalf("a second machine of one workspace: %v", err)
		} else if took := time.Since(began); took > lockPatience+10*time.Second {
			t.Errorf("it took %s to say so", took)
		}
		tryMemory(t, m, guest) // and it ends
		must(t, m.Destroy(machinetest.Context(t)))
		second, err := h.Driver().Create(machinetest.Context(t), other)
		must(t, err)
		t.Cleanup(func() { must(t, second.Destroy(machinetest.Context(t))) })
		next = machinetest.Talk(t, second.Wire())
		if got := next.Must(script.Action{Do: "list", Path: home, UID: -1}); got != "workspace" {
			t.Errorf("scratch of the next machine holds %q", got)
		}
		if got := next.Must(script.Action{Do: "read", Path: nucleus.MachineWorkspace + "/kept", UID: -1}); got != "kept" { // control
			t.Errorf("the workspace's file: %q", got)
		}
		if theirs := recordOf(t, other.Dir); os.Geteuid() == 0 && theirs.User == rec.User {
			t.Errorf("two machines are user %d", rec.User)
		}
	})
}

func recordOf(t *testing.T, dir string) record {
	t.Helper()
	rec, err := loadRecord(dir)
	must(t, err)
	return rec
}

// tryWalls reads from the outside what the driver has checked, and that its check can fail.
func tryWalls(t *testing.T, rec record, pid int) {
	must(t, checkWalls(rec, pid))
	if err := checkWalls(rec, os.Getpid()); err == nil { // control
		t.Error("this process, which has no walls, passes for one that has")
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	if at := strings.Index(string(status), "Seccomp_filters:"); at >= 0 {
		if n := strings.Fields(string(status)[at:])[1]; n == "0" || n == "1" {
			t.Errorf("%s seccomp filters, want QEMU's beside ours", n)
		}
	}
	var files []string
	root := fmt.Sprintf("/proc/%d/root/", pid)
	must(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			files = append(files, "/"+strings.TrimPrefix(path, root))
		}
		return err
	}))
	for _, name := range files {
		known := strings.HasPrefix(name, "/machine/") || strings.Contains(name, ".so") || name == "/dev/null" || name == "/dev/urandom" || strings.HasPrefix(name, "/usr/") && strings.Contains(name, "qemu-system")
		if !known {
			t.Errorf("QEMU's root holds %s", name)
		}
	}
	if !slices.Contains(files, kernelPlace) { // control
		t.Errorf("its root shows no kernel: %q", files)
	}
	if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil {
		for _, entry := range entries {
			target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, entry.Name()))
			if strings.HasPrefix(target, "/") && !strings.HasPrefix(target, "/dev/") && !strings.HasPrefix(target, "/machine/") &&
				!strings.Contains(target, ".ext4") && !strings.Contains(target, ".erofs") && !strings.Contains(target, ".so") {
				t.Errorf("QEMU has %s open", target)
			}
		}
	}
	limited, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	must(t, err)
	for name, want := range map[string]int{
		"Max core file size": 0, "Max address space": (rec.Shape.MemoryMB + addressesMB) << 20, "Max file size": rec.Shape.DiskMB << 20, // both disks are new
	} {
		if !strings.Contains(string(limited), fmt.Sprintf("%-25s %-20d %-20[2]d ", name, want)) {
			t.Errorf("%s of QEMU is not %d:\n%s", name, want, limited)
		}
	}
	if os.Geteuid() != 0 {
		return
	}
	limits := rec.cgroupLimits("/nowhere", "/nowhere")
	possible, err := cgroup.Make(cgroup.Mount, nucleus.NewID("cal-test-"), limits)
	must(t, err)
	must(t, cgroup.Remove(t.Context(), cgroup.Mount, possible.Name))
	if member, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)); err != nil || possible.Name != "" && !strings.Contains(string(member), "/"+rec.Instance) {
		t.Errorf("QEMU is in no cgroup of its own, which this host can make: %q, %v", member, err)
	}
	must(t, rec.group().Check(cgroup.Mount, pid, limits))
	t.Logf("kept by its cgroup beside memory and processors: %v", rec.Kept)
}

// tryNetwork: no interface but the loopback, no route, nobody who knows names.
func tryNetwork(t *testing.T, guest *machinetest.Guest) {
	if got := guest.Must(script.Action{Do: "interfaces", UID: -1}); got != "lo" {
		t.Errorf("interfaces: %q", got)
	}
	routes := guest.Must(script.Action{Do: "read", Path: "/proc/net/route", UID: -1})
	if lines := strings.Count(strings.TrimSpace(routes), "\n"); lines > 0 {
		t.Errorf("routes: %q", routes)
	}
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer outside.Close()
	for _, address := range []string{"192.0.2.1:443", "192.0.2.53:53", outside.Addr().String(), "[fe80::1%lo]:80"} {
		guest.MustFail(script.Action{Do: "dial", Data: "tcp", Path: address, UID: -1})
	}
	guest.MustFail(script.Action{Do: "dial", Data: "tcp", Path: "example.com:443", UID: -1})
	// Control: the same words, outside.
	conn, err := net.Dial("tcp", outside.Addr().String())
	must(t, err)
	conn.Close()
	said, err := exec.Command(shared.guest, "act", `{"do":"read","path":"/proc/self/net/dev","uid":-1}`).Output()
	if err != nil || !strings.Contains(string(said), "lo") {
		t.Errorf("the guest's program outside: %q, %v", said, err)
	}
	if names := guest.Must(script.Action{Do: "list", Path: "/sys/class/virtio-ports", UID: -1}); len(strings.Fields(names)) != 2 {
		t.Errorf("ports of the machine: %q, want its own two wires", names)
	}
	guest.MustFail(script.Action{Do: "vsock", N: 1024, UID: -1})
}

// tryFixedDisks: what is read-only is so on the host's side, too.
func tryFixedDisks(t *testing.T, m machine.Machine, guest *machinetest.Guest) {
	const spoilt = "written over by the guest"
	guest.MustFail(script.Action{Do: "raw", Path: "vda", Data: spoilt, UID: -1})
	root := m.Facts().Digests[microvm.Root]
	object, err := filepath.Glob(filepath.Join(shared.dir, "images", "objects", strings.TrimPrefix(root, "sha256:"), "*.erofs"))
	if err != nil || len(object) != 1 {
		t.Fatalf("the root's image: %q, %v", object, err)
	}
	if got := digestOf(t, object[0]); got != root {
		t.Errorf("the root's image has %s, want %s", got, root)
	}
	guest.Must(script.Action{Do: "raw", Path: "vdc", Data: spoilt, UID: -1}) // control: scratch, of which 1 KiB is nobody's
	scratch, err := os.ReadFile(filepath.Join(string(m.(*Machine).vmm.place), scratchFile))
	if err != nil || !strings.HasPrefix(string(scratch), spoilt) {
		t.Errorf("the guest's write is not in the file of its scratch disk: %v", err)
	}
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	sum := sha256.New()
	_, err = io.Copy(sum, f)
	must(t, err)
	return "sha256:" + hex.EncodeToString(sum.Sum(nil))
}

// tryLimits tries processors, tasks and disks.
func tryLimits(t *testing.T, m machine.Machine, guest *machinetest.Guest) {
	tools := m.Facts().ToolsUID
	cpus := guest.Must(script.Action{Do: "read", Path: "/sys/devices/system/cpu/online", UID: -1})
	if strings.TrimSpace(cpus) != "0" {
		t.Errorf("processors: %q, want one", cpus)
	}
	reply := guest.Try(script.Action{Do: "fork", N: 200, UID: tools})
	if n, err := strconv.Atoi(reply.Data); err != nil || n >= 100 || reply.Err == "" {
		t.Errorf("200 tasks where 100 may be: %+v", reply)
	}
	guest.Must(script.Action{Do: "fork", N: 2, UID: tools}) // control
	for _, dir := range []string{nucleus.MachineHome, nucleus.MachineWorkspace} {
		full := dir + "/full"
		if reply := guest.Try(fill(full, 80<<20, tools)); !strings.Contains(reply.Data+reply.Err, "No space left") {
			t.Errorf("80 MB in %s of 64: %+v", dir, reply)
		}
		guest.Must(script.Action{Do: "remove", Path: full, UID: tools})
		guest.Must(fill(full, 20<<20, tools)) // control
		guest.Must(script.Action{Do: "remove", Path: full, UID: tools})
	}
}

func fill(path string, bytes int, uid int) script.Action {
	return script.Action{Do: "run", Path: "/", Args: []string{"sh", "-c", fmt.Sprintf("head -c %d /dev/zero > %s", bytes, path)}, UID: uid}
}

// tryMemory: a guest that wants more than it has ends by its own kernel, and QEMU has
// taken no more of the host than was stated.
func tryMemory(t *testing.T, m machine.Machine, guest *machinetest.Guest) {
	guest.Must(script.Action{Do: "fill", N: 20, UID: -1}) // control
	if _, err := guest.Send(script.Action{Do: "fill", N: 2000, UID: -1}); err == nil {
		t.Error("2000 MB were filled in a machine of 320")
	}
	select {
	case <-m.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the machine lives")
	}
	if reason := m.Reason(); !strings.Contains(reason, "the guest ended the machine") {
		t.Errorf("reason: %q; console: %s", reason, m.Console())
	}
	if os.Geteuid() != 0 {
		return
	}
	rec := m.(*Machine).vmm.rec
	if rec.group().OutOfMemory(cgroup.Mount) {
		t.Error("the host's kernel had to kill: the overhead is too small")
	}
	for _, name := range []string{"memory/" + rec.Instance + "/memory.max_usage_in_bytes", rec.Instance + "/memory.peak"} {
		if data, err := os.ReadFile(filepath.Join(cgroup.Mount, name)); err == nil {
			most, _ := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
			t.Logf("QEMU used %d MB with a guest of %d MB; at most %d are stated", most>>20, rec.Shape.MemoryMB, rec.Shape.MemoryMB+rec.overheadMB())
		}
	}
}

// TestKilledWhileCreating kills a process at moments of its Create: another removes all of it.
// In the end one is killed that has a machine, which lives on and is adopted.
func TestKilledWhileCreating(t *testing.T) {
	h := host(t)
	kills := 6
	if os.Getenv("CAL_LONG") != "" {
		kills = 40
	}
	for i := range kills + 1 {
		spec := h.Spec(t)
		child, said := creating(t, spec)
		if i < kills {
			// The moment is the attack: it is spread over what Create takes before the guest boots.
			time.Sleep(time.Duration(i) * 400 * time.Millisecond / time.Duration(kills))
		} else {
			var made struct{ Done bool }
			must(t, json.NewDecoder(said).Decode(&made))
		}
		must(t, child.Process.Kill())
		child.Wait()
		if i == kills {
			m, err := h.Driver().Adopt(machinetest.Context(t), spec.Dir)
			must(t, err)
			guest := machinetest.Talk(t, m.Wire())
			guest.Must(script.Action{Do: "echo", Data: script.Proof, UID: -1})
			if got := guest.Must(script.Action{Do: "echo", Data: "lives", UID: -1}); got != "lives" {
				t.Errorf("the machine of the dead says %q", got)
			}
			m.Release()
		}
		if err := h.Driver().Remove(machinetest.Context(t), spec.Dir); err != nil {
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

// creating starts a process that makes a machine and says so.
func creating(t *testing.T, spec machine.Spec) (*exec.Cmd, io.Reader) {
	t.Helper()
	text, err := json.Marshal(spec)
	must(t, err)
	child := exec.Command("/proc/self/exe", "-test.run=^TestHelperCreates$")
	child.Env = append(os.Environ(), "CAL_TEST_CREATE="+string(text), "CAL_TEST_DIR="+shared.dir)
	out, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	ready := make([]byte, 6)
	if _, err := io.ReadFull(out, ready); err != nil || string(ready) != "ready\n" {
		t.Fatalf("child: %q, %v", ready, err)
	}
	return child, out
}

// TestHelperCreates is the child of creating.
func TestHelperCreates(t *testing.T) {
	given := os.Getenv("CAL_TEST_CREATE")
	if given == "" {
		t.Skip("only as a child")
	}
	var spec machine.Spec
	must(t, json.Unmarshal([]byte(given), &spec))
	d := newDriver(need(t))
	fmt.Println("ready")
	if _, err := d.Create(context.Background(), spec); err != nil {
		t.Fatal(err)
	}
	fmt.Println(`{"Done":true}`)
	select {} // until it is killed
}
