package firecracker

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"cal/internal/kvm"
	"cal/machine"
)

func TestMain(m *testing.M) {
	kvm.Main()
	os.Exit(m.Run())
}

// programs are the real ones, as make test-firecracker or the PATH names them.
func programs(t testing.TB) (firecracker, jailer string) {
	t.Helper()
	for _, program := range []struct {
		name, variable string
		path           *string
	}{{"firecracker", "FIRECRACKER", &firecracker}, {"jailer", "JAILER", &jailer}} {
		*program.path = os.Getenv(program.variable)
		if *program.path == "" {
			found, err := exec.LookPath(program.name)
			if err != nil {
				t.Skipf("no %s on PATH, and %s does not name one; make test-firecracker runs this", program.name, program.variable)
			}
			*program.path = found
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("firecracker's jailer must be started as root")
	}
	return firecracker, jailer
}

// TestProof: the filter of the real Firecracker is proved, and nothing of the try is left.
func TestProof(t *testing.T) {
	firecracker, jailer := programs(t)
	d := New(Config{Firecracker: firecracker, Jailer: jailer, Scratch: jailDir(t)})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	digest, err := d.prove(ctx)
	if want, _ := fileDigest(firecracker); err != nil || digest != want {
		t.Fatalf("%q, %v", digest, err)
	}
	if entries, err := os.ReadDir(d.config.Scratch); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// TestProofOfNone: a Firecracker for another libc has a filter that stops nothing.
func TestProofOfNone(t *testing.T) {
	_, jailer := programs(t)
	unfiltered := os.Getenv("FIRECRACKER_UNFILTERED")
	if unfiltered == "" {
		t.Skip("FIRECRACKER_UNFILTERED names no Firecracker that was built for another libc than musl")
	}
	d := New(Config{Firecracker: unfiltered, Jailer: jailer, Scratch: jailDir(t)})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := d.prove(ctx)
	var failed *machine.ProbeError
	if !errors.As(err, &failed) || !errors.Is(err, errAllowed) || !strings.Contains(err.Error(), "seccomp") {
		t.Errorf("got %v, want %v", err, errAllowed)
	}
	if d.proved != "" {
		t.Error("taken for proved")
	}
}

// jailDir is a directory of this test's in which jails can be.
func jailDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "cal-test-")
	must(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
