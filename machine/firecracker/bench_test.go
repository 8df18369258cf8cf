package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
)

// BenchmarkStart measures a machine from Create to its first answer, booted and from a
// snapshot, and what Firecracker takes beside the guest's memory.
func BenchmarkStart(b *testing.B) {
	d := working(b)
	provedOnce(b, d)
	dir := jailDir(b)
	host := suiteHost(b, dir, nil)
	for name, snapshots := range map[string]string{"cold": "", "snapshot": filepath.Join(dir, "warm")} {
		b.Run(name, func(b *testing.B) {
			d.config.Snapshots = snapshots
			d.warm.Store(snapshots != "")
			if snapshots != "" { // the first machine of a shape makes it
				b.StopTimer()
				startOne(b, d, host)
				b.StartTimer()
			}
			for range b.N {
				startOne(b, d, host)
			}
		})
	}
}

func startOne(b *testing.B, d *Driver, host machinetest.Host) {
	b.StopTimer()
	spec := host.Spec(b)
	b.StartTimer()
	m, err := d.Create(context.Background(), spec)
	must(b, err)
	guest := machinetest.Talk(b, m.Wire())
	guest.Must(script.Action{Do: "echo", UID: -1})
	b.StopTimer()
	b.ReportMetric(float64(besideGuest(b, m.(*Machine)).processes)/(1<<20), "MB-beside-guest")
	must(b, m.Destroy(context.Background()))
	b.StartTimer()
}

// BenchmarkHost measures what this host does for a start from a snapshot, step by step, on
// any host: with the fake programs, which are larger than the real ones, and where these are
// named with them as far as they come without a guest.
func BenchmarkHost(b *testing.B) {
	b.Run("fake", func(b *testing.B) {
		d := faked(b, func(c *Config) { c.Snapshots = filepath.Join(jailDir(b), "snapshots") })
		benchmarkSteps(b, d, false)
	})
	b.Run("real", func(b *testing.B) {
		firecracker, jailer := programs(b)
		d := faked(b)
		var err error
		d.config.Firecracker, d.config.Jailer = firecracker, jailer
		d.proved, err = fileDigest(firecracker)
		must(b, err)
		benchmarkSteps(b, d, true)
	})
}

func benchmarkSteps(b *testing.B, d *Driver, guestless bool) {
	host := fakeHost(b, d)
	took := steps{}
	workspace := host.Spec(b).Workspace
	startInSteps(b, d, host, workspace, guestless, steps{}) // the first makes what the others find
	for b.Loop() {
		startInSteps(b, d, host, workspace, guestless, took)
	}
	for step, all := range took {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1e3, step+"-ms")
	}
	b.ReportMetric(0, "ns/op") // making a directory and removing all are in it
}

// steps are what each step of a start took, each time.
type steps map[string][]time.Duration

// startInSteps does what make does and notes what each step took, and "all". A guest that
// cannot run is not started.
func startInSteps(t testing.TB, d *Driver, host machinetest.Host, workspace string, guestless bool, took steps) {
	t.Helper()
	ctx, spec := machinetest.Context(t), host.Spec(t)
	spec.Workspace = workspace
	started := time.Now()
	last := started
	done := func(step string, err error) {
		t.Helper()
		must(t, err)
		now := time.Now()
		took[step] = append(took[step], now.Sub(last))
		last = now
	}
	digest, err := d.prove(ctx)
	done("proof", err)
	rec, err := d.begin(spec)
	defer func() { must(t, d.again().Remove(ctx, spec.Dir)) }()
	done("record", errors.Join(err, rec.Jail.make()))
	made, err := d.assemble(ctx, spec, rec)
	rec.Jail.FileSize = int64(made.Longest())
	rec.Template.FileSize = max(int64(made.Longest()), int64(rec.Shape.MemoryMB)<<20)
	done("parts", errors.Join(err, rec.save()))
	snapshot := ""
	if d.warm.Load() {
		if snapshot = d.snapshotOrNone(ctx, rec, made, digest); snapshot == "" {
			t.Fatal("no snapshot")
		}
		done("snapshot", nil)
	}
	v, err := d.launch(ctx, rec.Jail, digest)
	done("jail", err)
	defer v.letGo()
	switch {
	case guestless:
		took["all"] = append(took["all"], last.Sub(started))
		return
	case snapshot == "":
		done("boot", v.bootUp(ctx, made, rec))
	default:
		done("load", errors.Join(v.serial(ctx), v.restore(ctx, snapshot), filtered(v.process.PID)))
		done("resume", v.api.resume(ctx))
	}
	conn, err := v.greet(ctx)
	done("greeting", err)
	machinetest.Talk(t, conn).Must(script.Action{Do: "echo", UID: -1})
	done("answer", nil)
	conn.Close()
	took["all"] = append(took["all"], last.Sub(started))
}

// TestSteps says what each step of a start took, booted and from a snapshot. In an emulated
// host only what they are beside one another says something.
func TestSteps(t *testing.T) {
	d := working(t)
	provedOnce(t, d)
	dir := jailDir(t)
	host := suiteHost(t, dir, nil)
	d.config.Snapshots = filepath.Join(dir, "warm")
	for _, warm := range []bool{false, true} {
		d.warm.Store(warm)
		workspace, took := host.Spec(t).Workspace, steps{}
		for range 2 { // the first makes what the other finds
			took = steps{}
			startInSteps(t, d, host, workspace, false, took)
		}
		t.Logf("from a snapshot %v: %v", warm, took)
	}
}

// mostBeside is what a machine may take of the host's memory beside that of its guest.
const mostBeside = 8 << 20

// beside is what a machine takes of the host's memory that is not its guest's, in bytes.
type beside struct {
	processes int64 // all that are in its group
	kernel    int64 // for them: page tables, KVM's and others; 0 where the kernel does not say
}

func (b beside) String() string {
	return fmt.Sprintf("%.1f MB beside the guest's memory, and %.1f MB of the kernel's", float64(b.processes)/(1<<20), float64(b.kernel)/(1<<20))
}

func besideGuest(t testing.TB, m *Machine) (b beside) {
	t.Helper()
	mount := m.vmm.cgroups
	pids, err := m.rec.Jail.members(mount)
	must(t, err)
	guests := 0
	for _, pid := range pids {
		smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		must(t, err)
		bytes, found := besideMapping(string(smaps), int64(m.rec.Shape.MemoryMB)<<20)
		b.processes += bytes
		guests += found
	}
	if guests != 1 { // else something else was measured
		t.Fatalf("%d mappings in processes %v are of the guest's %d MB, want one", guests, pids, m.rec.Shape.MemoryMB)
	}
	stat, err := os.ReadFile(filepath.Join(mount, m.rec.Jail.group().Name, "memory.stat"))
	if err == nil {
		for line := range strings.Lines(string(stat)) {
			if n, _ := fmt.Sscanf(line, "kernel %d", &b.kernel); n == 1 {
				break
			}
		}
	}
	return b
}

// besideMapping sums up what a process's mappings hold in memory, but for those of one
// size, which it counts. A guest of less than 3 GB is one mapping.
func besideMapping(smaps string, guest int64) (held int64, found int) {
	isGuest := false
	for line := range strings.Lines(smaps) {
		var kilobytes int64
		if n, _ := fmt.Sscanf(line, "Size: %d kB", &kilobytes); n == 1 {
			if isGuest = kilobytes<<10 == guest; isGuest {
				found++
			}
		}
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &kilobytes); n == 1 && !isGuest {
			held += kilobytes << 10
		}
	}
	return held, found
}

// checkBeside says what a machine takes beside its guest's memory, and holds it to what
// it may.
func checkBeside(t *testing.T, how string, m machine.Machine) {
	t.Helper()
	b := besideGuest(t, m.(*Machine))
	t.Logf("a machine that was %s takes %v", how, b)
	if b.processes > mostBeside || b.processes < 1<<20 {
		t.Errorf("%s: %d bytes beside the guest's memory, want 1 MB to %d", how, b.processes, mostBeside)
	}
}

// TestBesideMapping: the guest's memory is not counted, all else is.
func TestBesideMapping(t *testing.T) {
	const smaps = `7f0000000000-7f0020000000 rw-p 00000000 00:00 0
Size:             524288 kB
Rss:               99000 kB
7f0030000000-7f0030100000 r-xp 00000000 fe:00 12 /firecracker
Size:               1024 kB
Rss:                 700 kB
7f0030100000-7f0030200000 rw-p 00000000 00:00 0 [heap]
Size:               1024 kB
Rss:                 300 kB
`
	if held, found := besideMapping(smaps, 512<<20); held != 1000<<10 || found != 1 {
		t.Errorf("%d bytes, %d mappings, want %d, 1", held, found, 1000<<10)
	}
	if held, found := besideMapping(smaps, 256<<20); held != 100000<<10 || found != 0 { // control
		t.Errorf("of another size: %d bytes, %d mappings", held, found)
	}
}
