package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cal/internal/idmap"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// ownIDs skips where the person has no subordinate ids; TestSubordinateIDs is
// where it must not.
func ownIDs(t *testing.T) idmap.Map {
	t.Helper()
	if os.Geteuid() == 0 {
		t.Skip("tried by the ordinary user, see TestSubordinateIDs")
	}
	ids, err := (&subordinate{}).find(t.Context())
	if err != nil && os.Getenv(withSubIDs) != "" {
		t.Fatal(err)
	}
	if err != nil {
		t.Skip(err)
	}
	return ids
}

// TestOwnIDs: no process of a machine has the person's id, nor one of the
// person's groups; what the machine writes belongs to a subordinate id; a file of
// the person's own is closed to the machine by the host's kernel.
func TestOwnIDs(t *testing.T) {
	ids := ownIDs(t)
	h := host(t)
	spec := h.Spec(t)
	m, guest := h.Create(t, spec)
	if facts := m.Facts(); facts.OneID || facts.ToolsUID != machine.ToolsID {
		t.Fatalf("%+v", facts)
	}
	running, err := process.Find(place(spec.Dir).argument())
	must(t, err)
	if len(running) < 2 {
		t.Fatalf("found %d processes, want sandbox and gofer", len(running))
	}
	for _, p := range running {
		defer p.Close()
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
		must(t, err)
		for kind, first := range map[string]uint32{"Uid": ids.UID, "Gid": ids.GID} {
			for _, field := range strings.Fields(statusValue(string(status), kind)) {
				var id uint32
				fmt.Sscan(field, &id)
				if id < first || id >= first+ids.Count {
					t.Errorf("%s has %s %d, want one of %d-%d", p.Name, kind, id, first, first+ids.Count-1)
				}
			}
		}
		if groups := strings.TrimSpace(statusValue(string(status), "Groups")); groups != "" {
			t.Errorf("%s is in the groups %q", p.Name, groups)
		}
	}
	guest.Must(script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/file", Data: "1", UID: machine.ToolsID})
	if _, ok := ids.Inner(ownerOf(t, spec.Workspace)); !ok {
		t.Errorf("the workspace belongs to %d", ownerOf(t, spec.Workspace))
	}
	if _, err := os.ReadFile(filepath.Join(spec.Workspace, "file")); !errors.Is(err, os.ErrPermission) {
		t.Errorf("the person reads the machine's file without the map: %v", err) // else the map proves nothing below
	}
	if data, err := readWorkspace(filepath.Join(spec.Workspace, "file")); os.Getenv(withSubIDs) != "" && (err != nil || string(data) != "1") {
		t.Errorf("with the map: %q, %v", data, err)
	}
	t.Log("machines have ids of their own")
}

// TestWorkspaceBetweenMaps: files made under one map are the tools' under the
// other, or the start is refused with the mend.
func TestWorkspaceBetweenMaps(t *testing.T) {
	ids := ownIDs(t)
	h := host(t)
	without := New(Config{Runsc: shared.runsc, Screen: &screen})
	without.subordinate = func(context.Context) (idmap.Map, error) {
		return idmap.Map{}, &idmap.Missing{Cause: "they were taken away", Mend: "give them back"}
	}
	spec := h.Spec(t)
	spec.Image.Kind, spec.Image.Path = "directory", smallImage(t)
	life := func(driver *Driver, uid int, actions ...script.Action) {
		t.Helper()
		must(t, os.MkdirAll(spec.Dir, 0o700))
		again := h
		again.Driver = func() machine.Driver { return driver }
		m, guest := again.Create(t, spec)
		for _, action := range actions {
			action.UID = uid
			guest.Must(action)
		}
		must(t, m.Destroy(t.Context()))
	}
	write := func(name string) script.Action {
		return script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/" + name, Data: "1"}
	}
	life(without, 0, write("old"), script.Action{Do: "link", Path: nucleus.MachineWorkspace + "/away", Data: spec.Proxy})
	if owner := ownerOf(t, spec.Workspace); owner != uint32(os.Getuid()) {
		t.Fatalf("one id: the workspace belongs to %d", owner)
	}
	life(New(Config{Runsc: shared.runsc}), machine.ToolsID, write("old"), write("new"))
	first := ownerOf(t, spec.Workspace)
	life(New(Config{Runsc: shared.runsc}), machine.ToolsID, write("old"), write("new"))
	if again := ownerOf(t, spec.Workspace); again != first {
		t.Errorf("the next machine's workspace belongs to %d, before to %d", again, first)
	}
	if owner := ownerOf(t, spec.Proxy); owner == first {
		t.Error("a file outside changed its owner through a link")
	}

	must(t, os.MkdirAll(spec.Dir, 0o700))
	if _, err := without.Create(t.Context(), spec); !errors.Is(err, machine.ErrRefused) || !strings.Contains(err.Error(), "give them back") {
		t.Errorf("without the ids: %v", err)
	}
	if _, err := subBase(ids, 1); err == nil {
		t.Error("a stranger's workspace is taken")
	}
}

// TestSecondNamesStay: a file that has a second name outside is nobody's to give away.
func TestSecondNamesStay(t *testing.T) {
	ownIDs(t)
	h := host(t)
	spec := h.Spec(t)
	theirs := filepath.Join(h.Spec(t).Workspace, "object")
	must(t, os.WriteFile(theirs, nil, 0o644))
	must(t, os.Link(theirs, filepath.Join(spec.Workspace, "object")))
	if _, err := h.Driver().Create(t.Context(), spec); !errors.Is(err, machine.ErrRefused) || !strings.Contains(err.Error(), "other names") {
		t.Errorf("got %v", err)
	}
	if owner := ownerOf(t, theirs); owner != uint32(os.Getuid()) {
		t.Errorf("somebody's file now belongs to %d", owner)
	}
}

// TestRemoveHostile: a guest leaves what its person cannot enter; it can be removed.
func TestRemoveHostile(t *testing.T) {
	h := host(t)
	spec := h.Spec(t)
	outside := filepath.Join(filepath.Dir(spec.Dir), "outside")
	must(t, os.WriteFile(outside, nil, 0o600))
	spec.Image.Kind, spec.Image.Path = "directory", smallImage(t)
	m, guest := h.Create(t, spec)
	tools := m.Facts().ToolsUID
	for _, action := range []script.Action{
		{Do: "mkdir", Path: "a/b"}, {Do: "write", Path: "a/b/file", Data: "1"}, {Do: "link", Path: "a/link", Data: filepath.Dir(outside)},
		{Do: "close", Path: "a/b"}, {Do: "close", Path: "a"},
	} {
		action.Path, action.UID = nucleus.MachineWorkspace+"/"+action.Path, tools
		guest.Must(action)
	}
	must(t, m.Destroy(t.Context()))
	if err := os.RemoveAll(spec.Workspace); os.Geteuid() != 0 && !errors.Is(err, os.ErrPermission) {
		t.Errorf("it is not hostile: %v", err)
	}
	must(t, idmap.RemoveAll(t.Context(), spec.Workspace))
	if _, err := os.Lstat(spec.Workspace); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
	var stat syscall.Stat_t
	must(t, syscall.Lstat(outside, &stat))
	if stat.Mode&0o777 != 0o600 {
		t.Errorf("a file outside now has mode %o", stat.Mode)
	}
}

func statusValue(status, key string) string {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
