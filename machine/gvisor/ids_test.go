package gvisor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cal/machine"
)

func ownerOf(t *testing.T, name string) uint32 {
	t.Helper()
	info, err := os.Lstat(name)
	must(t, err)
	return info.Sys().(*syscall.Stat_t).Uid
}

func TestGiveWorkspace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	base := t.TempDir()
	workspace, outside := filepath.Join(base, "ws"), filepath.Join(base, "outside")
	must(t, os.MkdirAll(filepath.Join(workspace, "repo/.git"), 0o755))
	must(t, os.WriteFile(filepath.Join(workspace, "repo/file"), nil, 0o644))
	must(t, os.WriteFile(outside, nil, 0o600))
	must(t, os.Symlink(outside, filepath.Join(workspace, "repo/link")))
	must(t, os.Symlink(base, filepath.Join(workspace, "repo/up")))
	first, err := idBase(workspace)
	must(t, err)
	if first < lowestID || first%idCount != 0 {
		t.Fatalf("base %#x", first)
	}
	must(t, giveWorkspace(workspace, first))
	for _, name := range []string{".", "repo", "repo/.git", "repo/file", "repo/link"} {
		if got := ownerOf(t, filepath.Join(workspace, name)); got != first+machine.ToolsID {
			t.Errorf("%s belongs to %d", name, got)
		}
	}
	for _, name := range []string{outside, base} {
		if got := ownerOf(t, name); got != 0 {
			t.Errorf("%s, outside, belongs to %d", name, got)
		}
	}
	if again, err := idBase(workspace); err != nil || again != first {
		t.Errorf("the workspace's next machine gets %#x, %v; want %#x", again, err, first)
	}
}

func TestGiveWorkspaceRefusesSecondNames(t *testing.T) {
	base := t.TempDir()
	workspace, theirs := filepath.Join(base, "ws"), filepath.Join(base, "object")
	must(t, os.Mkdir(workspace, 0o700))
	must(t, os.WriteFile(theirs, nil, 0o644))
	must(t, os.Link(theirs, filepath.Join(workspace, "object")))
	before := ownerOf(t, theirs)
	if err := giveWorkspace(workspace, lowestID); !errors.Is(err, machine.ErrRefused) {
		t.Errorf("got %v", err)
	}
	if got := ownerOf(t, theirs); got != before {
		t.Errorf("somebody's file now belongs to %d", got)
	}
}

func TestIDsMapped(t *testing.T) {
	for table, want := range map[string]bool{
		"         0          0 4294967295\n":           true,
		"0 100000 65536\n":                             false,
		"0 1000 1\n1 100000 65536\n":                   false,
		"0 0 1879048192\n1879048192 1879048192 1000\n": false,
		"0 0 1\n1879048192 1879048192 268435456\n":     true,
		"":         false,
		"nonsense": false,
	} {
		if got, _ := idsMapped(strings.NewReader(table)); got != want {
			t.Errorf("%q: %t", table, got)
		}
	}
}
