package firecracker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	b.ReportMetric(besideGuest(b, m.(*Machine)), "MB-beside-guest")
	must(b, m.Destroy(context.Background()))
	b.StartTimer()
}

// besideGuest is what the process of a machine holds in MB that is not the guest's memory.
func besideGuest(b *testing.B, m *Machine) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", m.vmm.process.PID))
	must(b, err)
	guest, total, size := int64(m.rec.Shape.MemoryMB)<<10, int64(0), int64(0)
	for line := range strings.Lines(string(data)) {
		var kilobytes int64
		if n, _ := fmt.Sscanf(line, "Size: %d kB", &kilobytes); n == 1 {
			size = kilobytes
		}
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &kilobytes); n == 1 && size < guest {
			total += kilobytes
		}
	}
	return float64(total) / 1024
}
