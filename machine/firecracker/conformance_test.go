package firecracker

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/machine/site"
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
		Driver: driver, Proxy: machinetest.TestGuest(t, dir), Image: machinetest.SmallImage(t, dir), Scratch: dir, Disk: true, Kill: killVMM, Left: left,
	}
}

// reporting says on the standard error why a machine ended that nobody destroyed, which a
// test that lost its wire cannot know.
type reporting struct{ machine.Driver }

func (r reporting) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	m, err := r.Driver.Create(ctx, spec)
	noteInstances(spec.Dir)
	return report(m, err)
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
			if entry.Name() == "firecracker" || entry.Name() == site.RecordFile {
				found = append(found, entry.Name())
			}
		}
	}
	return append(found, instancesLeft(t, dir)...)
}

// instances are the jails of machines that tests made, by their directories, which say
// nothing of them when they are gone.
var instances struct {
	sync.Mutex
	of map[string][]jail
}

// noteInstances remembers the jails of the machine in dir.
func noteInstances(dir string) {
	rec, err := loadRecord(dir)
	if err != nil {
		return
	}
	instances.Lock()
	defer instances.Unlock()
	if instances.of == nil {
		instances.of = map[string][]jail{}
	}
	instances.of[dir] = append(instances.of[dir], rec.Jail, rec.Template)
}

// instancesLeft are processes and control groups of a machine.
func instancesLeft(t *testing.T, dir string) (found []string) {
	t.Helper()
	instances.Lock()
	defer instances.Unlock()
	for _, j := range instances.of[dir] {
		running, err := process.Find(j.ID)
		must(t, err)
		for _, p := range running {
			found = append(found, fmt.Sprintf("process %d %s", p.PID, p.Name))
			p.Close()
		}
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			groups, err := filepath.Glob(pattern + j.group().Name)
			must(t, err)
			for _, group := range groups {
				found = append(found, "cgroup "+group)
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
		checkBeside(t, "booted", m)
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
		checkBeside(t, "restored", m)
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

// TestDeaths: whatever is killed, nothing is left.
func TestDeaths(t *testing.T) {
	d := working(t)
	provedOnce(t, d)
	host := suiteHost(t, jailDir(t), func() machine.Driver { return reporting{d.again()} })
	t.Run("node", func(t *testing.T) { removeAtAnyMoment(t, d, host) })
	t.Run("jailer", func(t *testing.T) { killedJailer(t, d, host) })
}

// TestLimits: what a machine may have holds, and beside each limit something below it
// succeeds.
func TestLimits(t *testing.T) {
	d := working(t)
	provedOnce(t, d)
	host := suiteHost(t, jailDir(t), func() machine.Driver { return reporting{d} })
	spec := host.Spec(t)
	spec.Resources = nucleus.Resources{CPU: 1, MemoryMB: 300, Pids: 64, DiskMB: 80}
	m, guest := host.Create(t, spec)
	tools := m.Facts().ToolsUID
	shell := func(line string) script.Reply {
		return guest.Try(script.Action{Do: "run", Path: nucleus.MachineHome, Args: []string{"sh", "-c", line}, UID: tools})
	}
	if cpus := strings.Count(guest.Must(script.Action{Do: "read", Path: "/proc/cpuinfo", UID: -1}), "processor\t"); cpus != 1 {
		t.Errorf("%d processors, want 1", cpus)
	}
	var total int
	if _, err := fmt.Sscanf(guest.Must(script.Action{Do: "read", Path: "/proc/meminfo", UID: -1}), "MemTotal: %d kB", &total); err != nil || total > 300<<10 || total < 200<<10 {
		t.Errorf("%d kB of memory, %v", total, err)
	}
	if reply := guest.Try(script.Action{Do: "fill", N: 60, UID: tools}); reply.Err != "" { // control
		t.Errorf("60 MB of memory: %+v", reply)
	}
	if reply := guest.Try(script.Action{Do: "fill", N: 600, UID: tools}); reply.Err == "" {
		t.Errorf("600 MB of memory: %+v", reply)
	}
	for _, dir := range []string{nucleus.MachineHome, nucleus.MachineWorkspace} {
		if reply := shell("head -c 20000000 /dev/zero > " + dir + "/part"); reply.Err != "" { // control
			t.Errorf("20 MB in %s: %+v", dir, reply)
		}
		if reply := shell("head -c 200000000 /dev/zero > " + dir + "/full"); !strings.Contains(reply.Data, "No space left") {
			t.Errorf("200 MB in %s: %+v", dir, reply)
		}
	}
	guest.Must(script.Action{Do: "remove", Path: nucleus.MachineWorkspace + "/full", UID: tools})
	if reply := guest.Try(script.Action{Do: "fork", N: 20, UID: tools}); reply.Err != "" { // control
		t.Errorf("20 processes: %+v", reply)
	}
	if reply := guest.Try(script.Action{Do: "fork", N: 200, UID: tools}); reply.Err == "" {
		t.Errorf("200 processes: %+v", reply)
	}
	guest.Must(script.Action{Do: "echo", UID: -1})
	must(t, m.Destroy(machinetest.Context(t)))

	// The next machine with the workspace finds it as it was, and scratch blank.
	next := host.Spec(t)
	next.Workspace, next.Resources = spec.Workspace, spec.Resources
	_, guest = host.Create(t, next)
	if got := guest.Must(script.Action{Do: "list", Path: nucleus.MachineHome, UID: -1}); got != "workspace" {
		t.Errorf("scratch of the next machine holds %q", got)
	}
	if got := guest.Must(script.Action{Do: "list", Path: nucleus.MachineWorkspace, UID: -1}); got != "part" {
		t.Errorf("the workspace holds %q, want what was left in it", got)
	}
}

// TestCal runs commands as a person does, with the real proxy: cal, the node, a machine
// of Firecracker's, and what the first command wrote found by the second.
func TestCal(t *testing.T) {
	d := working(t)
	programs := os.Getenv("CAL_TEST_PROGRAMS")
	if programs == "" {
		t.Skip("CAL_TEST_PROGRAMS names no directory with CAL's programs; make test-firecracker does")
	}
	home := jailDir(t)
	if images := os.Getenv("CAL_TEST_IMAGES"); images != "" { // where no kernel can be fetched
		must(t, os.CopyFS(filepath.Join(home, "images"), os.DirFS(images)))
	}
	var said strings.Builder
	node := exec.Command(filepath.Join(programs, "nucleus-node"), "--home", home, "--firecracker", d.config.Firecracker, "--jailer", d.config.Jailer,
		"--probe-patience", "1m", "--spare", "0")
	node.Stdout, node.Stderr = &said, &said
	must(t, node.Start())
	t.Cleanup(func() {
		must(t, node.Process.Signal(os.Interrupt))
		must(t, node.Wait())
		if t.Failed() {
			t.Log(said.String())
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(home, "run", "node.sock")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the node does not come up")
		}
	}
	image := machinetest.SmallImage(t, jailDir(t))
	cal := func(command string) string {
		t.Helper()
		started := time.Now()
		cmd := exec.Command(filepath.Join(programs, "cal"), "run", "--driver", "firecracker", "--image", image.String(), "--workspace", "w", "--memory", "512", "--cpu", "1",
			"--yes", "--no-tty", "--", "/bin/sh", "-c", command)
		cmd.Env = append(os.Environ(), "CAL_HOME="+home)
		output, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("cal run: %v: %s", err, output)
		}
		t.Logf("%s: %v", command, time.Since(started))
		return string(output)
	}
	if got := cal("echo written > file && uname -r && echo in the machine"); !strings.Contains(got, "in the machine") || !strings.Contains(got, "cloud-amd64") {
		t.Errorf("the first command: %q", got)
	}
	if got := cal("cat file; echo > /usr/x || echo read-only"); !strings.Contains(got, "written") || !strings.Contains(got, "read-only") {
		t.Errorf("the second command: %q", got)
	}
}
