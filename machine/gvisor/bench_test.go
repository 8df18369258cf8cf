package gvisor

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// benchSpec returns a machine of the host image.
func benchSpec(b *testing.B, resources nucleus.Resources) machine.Spec {
	b.Helper()
	base, err := os.MkdirTemp(shared.dir, "m")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(base) })
	spec := machine.Spec{ID: filepath.Base(base), Dir: base + "/d", Workspace: base + "/ws", Proxy: shared.guest, Image: nucleus.Image{Kind: "host"},
		Resources: resources, Watched: []string{"memory"}}
	for _, dir := range []string{spec.Dir, spec.Workspace} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
	}
	return spec
}

// answer waits for the guest's first word.
func answer(b *testing.B, conn net.Conn) {
	b.Helper()
	if err := json.NewEncoder(conn).Encode(script.Action{Do: "echo", UID: -1}); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 2)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkStart compares a machine from Create to its first answer with what
// `runsc run` alone takes for the same bundle.
func BenchmarkStart(b *testing.B) {
	need(b)
	driver := New(Config{Runsc: shared.runsc, Screen: &screen})
	for name, resources := range map[string]nucleus.Resources{"unlimited": {}, "limited": {CPU: 2, MemoryMB: 4096, Pids: 4096}} {
		b.Run(name, func(b *testing.B) { benchStart(b, driver, resources) })
	}
}

func benchStart(b *testing.B, driver *Driver, resources nucleus.Resources) {
	b.Run("create", func(b *testing.B) {
		for range b.N {
			b.StopTimer()
			spec := benchSpec(b, resources)
			b.StartTimer()
			m, err := driver.Create(b.Context(), spec)
			if err != nil {
				b.Fatal(err)
			}
			conn := m.Wire()
			answer(b, conn)
			b.StopTimer()
			conn.Close()
			if err := m.Destroy(context.Background()); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	b.Run("runsc", func(b *testing.B) {
		for range b.N {
			b.StopTimer()
			spec := benchSpec(b, resources)
			rec, err := driver.begin(b.Context(), spec)
			if err != nil {
				b.Fatal(err)
			}
			if err := driver.assemble(b.Context(), spec, &rec); err != nil {
				b.Fatal(err)
			}
			host, guest, err := socketPair()
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if err := driver.run(b.Context(), place(spec.Dir), rec, guest); err != nil {
				b.Fatal(err)
			}
			answer(b, host)
			b.StopTimer()
			host.Close()
			guest.Close()
			if err := driver.Remove(context.Background(), spec.Dir); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}
