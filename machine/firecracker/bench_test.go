package firecracker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	mount := m.driver.config.Cgroups
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
