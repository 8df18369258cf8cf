package machinetest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestGuest builds the guest program into dir and returns its path.
func TestGuest(t testing.TB, dir string) string {
	t.Helper()
	if built := os.Getenv("CAL_TESTGUEST"); built != "" { // where there is no go
		return built
	}
	path := filepath.Join(dir, "testguest")
	build := exec.Command("go", "build", "-o", path, "cal/machine/machinetest/testguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the test guest: %v\n%s", err, output)
	}
	return path
}
