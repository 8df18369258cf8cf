package machinetest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// testKill: what a finished call did to files is there after kill -9, in whatever way it
// was done. A driver that lets the guest's kernel write later fails here.
func testKill(t *testing.T, host Host) {
	spec := host.Spec(t)
	m, guest := host.Create(t, spec)
	tools := m.Facts().ToolsUID
	guest.Must(script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/kept", Data: "finished", UID: tools})
	guest.Must(script.Action{Do: "alter", Path: nucleus.MachineWorkspace + "/d", UID: tools})
	select {
	case <-m.Done():
		t.Fatal("dead before the kill")
	default:
	}
	host.Kill(t, spec.Dir)
	wait(t, "Done", m.Done())
	if m.Reason() == "" {
		t.Error("no reason for the death")
	}
	if data, err := host.read(spec.Workspace + "/kept"); err != nil || string(data) != "finished" {
		t.Errorf("after kill -9: %q, %v", data, err)
	}
	altered(t, filepath.Join(host.copy(t, spec.Workspace), "d"))
	if _, err := m.Rewire(Context(t)); !errors.Is(err, machine.ErrGone) {
		t.Errorf("rewire of the dead: %v", err)
	}
}

// altered checks what the guest's alter leaves.
func altered(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string]string{
		"overwritten": "new", "appended": "old content\nnew", "patched": "old NEWtent\n", "write-only": "old NEWtent\n", "mapped": "old NEWtent\n", "cut": "old",
		"after": "old content\n", "replaced": "new", "first-name": "old NEWtent\n", "second-name": "old NEWtent\n", "chmod": "old content\n", "dir/below/file": "new",
	} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != want {
			t.Errorf("after kill -9, %s: %q, %v, want %q", name, data, err, want)
		}
	}
	for _, name := range []string{"before", "replacing", "gone"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after kill -9, %s: %v", name, err)
		}
	}
	if target, err := os.Readlink(filepath.Join(dir, "symlink")); err != nil || target != "after" {
		t.Errorf("after kill -9, symlink: %q, %v", target, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "chmod")); err != nil {
		t.Error(err)
	} else if info.Mode().Perm() != 0o751 {
		t.Errorf("after kill -9, mode: %v, want 0751", info.Mode())
	}
	if info, err := os.Stat(filepath.Join(dir, "dated")); err != nil {
		t.Error(err)
	} else if !info.ModTime().Equal(script.AlterDate) {
		t.Errorf("after kill -9, time: %v, want %v", info.ModTime(), script.AlterDate)
	}
}
