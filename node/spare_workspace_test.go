package node

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cal/machine"
	"cal/machine/fake"
	"cal/nucleus"
)

// TestSpareOfAnotherShape: a machine that waits for a pod of a workspace does not
// outlast a pod that got another machine for the same workspace.
func TestSpareOfAnotherShape(t *testing.T) {
	home, layers := t.TempDir(), t.TempDir()
	driver := fake.New(fake.Config{Guest: func(ctx context.Context, _ fake.Inside) {
		<-ctx.Done()
		time.Sleep(200 * time.Millisecond) // as one whose guest flushes its disks
	}})
	s := &spares{dirs: Dirs{Home: home}, life: time.Hour}
	t.Cleanup(s.close)
	at := func(workspace, layer string) machine.Spec {
		dir := filepath.Join(home, workspace)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		return machine.Spec{
			Proxy: "/bin/sh", Image: nucleus.Image{Kind: "host", Layers: []nucleus.Layer{{Name: layer, Host: layers, Guest: "/opt/" + layer}}}, Workspace: dir,
		}
	}
	if err := os.MkdirAll(s.dirs.Spares(), 0o700); err != nil {
		t.Fatal(err)
	}
	s.prepare(driver, at("one", "a"), true)
	waiting := s.waiting
	<-waiting.ready
	if waiting.err != nil {
		t.Fatal(waiting.err)
	}
	if s.take(t.Context(), driver, at("two", "b"), true) != nil || s.status() != "ready" {
		t.Fatalf("another workspace's pod: the spare is %s, want ready", s.status())
	}
	if s.take(t.Context(), driver, at("one", "b"), true) != nil {
		t.Fatal("a machine of another shape was taken")
	}
	if s.status() != "none" {
		t.Errorf("the spare of the workspace is %s, want none", s.status())
	}
	select {
	case <-waiting.machine.Done():
	default:
		t.Error("its machine still has the workspace")
	}

	s.prepare(driver, at("one", "a"), true)
	second := s.waiting
	s.prepare(driver, at("two", "a"), true) // takes its place
	if s.take(t.Context(), driver, at("one", "a"), true) != nil {
		t.Fatal("a machine that is being discarded was taken")
	}
	if _, err := os.Lstat(second.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was discarded for another workspace's is still there: %v", err)
	}
}
