package node

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cal/nucleus"
)

// A workspace is deleted by the node: not while a machine uses it, and not without a record
// that what its sessions had taken is forgotten.
func TestDeleteWorkspace(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := specOf("w", policyOf("read_files"))
	p := h.pod(spec, map[string]string{"a": "text"})
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	if err := h.node.DeleteWorkspace(h.context(), "operator", "w"); err == nil || nucleus.AsError(err).Kind != nucleus.KindConflict || !strings.Contains(err.Error(), p.record.ID) {
		t.Errorf("while it is used: %v", err)
	}
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	beside := filepath.Join(h.home, "isolation", "beside")
	if err := os.WriteFile(beside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", ".", "..", "../beside", "none", goneWorkspace + "x"} {
		if err := h.node.DeleteWorkspace(h.context(), "operator", name); err == nil {
			t.Errorf("%q was deleted", name)
		}
	}
	if len(h.entries(nucleus.KindSessionClear, "")) != 0 {
		t.Error("a deletion that was refused is recorded as one")
	}
	if err := h.node.DeleteWorkspace(h.context(), "operator", "w"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(beside); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(filepath.Join(h.home, "isolation", "vms"))
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	clears := h.entries(nucleus.KindSessionClear, "")
	var said struct {
		Workspace string
		Cleared   []string
	}
	if len(clears) != 1 || json.Unmarshal(clears[0].Data, &said) != nil || said.Workspace != "w" || !slices.Equal(said.Cleared, []string{"private"}) || clears[0].Actor != "operator" {
		t.Errorf("recorded %+v", clears)
	}
	if again := h.pod(spec, nil); again.root.legs() != 0 {
		t.Errorf("a new workspace begins with %v", again.root.legs().Names())
	}
}

// A node that ended while it removed a workspace: the next one goes on.
func TestDeleteWorkspaceGoesOn(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.pod(specOf("w", policyOf("read_files")), map[string]string{"a": "text"})
	gone := h.node.dirs.Workspace(goneWorkspace + "X")
	if err := os.MkdirAll(filepath.Join(gone, "files"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.restart()
	if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(h.node.dirs.Workspace("w"), "files", "a")); err != nil {
		t.Error(err)
	}
}

// A pod that was asked for and not made stands in the log, with the reason.
func TestPodRefusedIsRecorded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for _, c := range []struct {
		spec nucleus.PodSpec
		want string
	}{
		{specOf("", json.RawMessage(`"no-such-policy"`)), "no-such-policy"},
		{func() nucleus.PodSpec { s := specOf("", policyOf("read_files")); s.Require = nucleus.TierVM; return s }(), "vm"},
	} {
		if _, err := h.node.CreatePod(h.context(), "operator", c.spec); err == nil {
			t.Fatal("made")
		}
		refusals := h.entries(nucleus.KindPodRefuse, "")
		if last := refusals[len(refusals)-1]; !strings.Contains(string(last.Data), c.want) || last.Actor != "operator" || last.Status != nucleus.OutcomeRefused {
			t.Errorf("recorded %s", last.Data)
		}
	}
	if n := len(h.entries(nucleus.KindPodCreate, "")); n != 0 {
		t.Errorf("%d pods made", n)
	}
}
