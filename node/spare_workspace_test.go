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
	flushed := make(chan struct{}) // by a guest that was asked to end
	driver := fake.New(fake.Config{Guest: func(ctx context.Context, _ fake.Inside) {
		<-ctx.Done()
		<-flushed
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
	took := make(chan *spare)
	go func() { took <- s.take(t.Context(), driver, at("one", "b"), true) }()
	select {
	case <-took:
		t.Error("a pod did not wait for the machine that has its workspace")
		close(flushed)
	case <-time.After(100 * time.Millisecond):
		close(flushed)
		if <-took != nil {
			t.Fatal("a machine of another shape was taken")
		}
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
