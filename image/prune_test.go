package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

// aged makes an object that was wanted some time ago.
func aged(t *testing.T, s *Store, content string, ago time.Duration) string {
	t.Helper()
	o, err := s.made(context.Background(), keyOf("test", content), func(dir string) (Object, error) {
		return Object{Kind: "root", What: content, Files: []File{{Name: "disk"}}}, os.WriteFile(dir+"/disk", []byte(content), 0o600)
	})
	must(t, err)
	at := time.Now().Add(-ago)
	must(t, os.Chtimes(filepath.Join(s.object(o.Digest), objectFile), at, at))
	return o.Digest
}

func present(s *Store, digest string) bool {
	_, err := os.Stat(s.object(digest))
	return err == nil
}

func TestPrune(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	old, recent, now := aged(t, s, "old", 48*time.Hour), aged(t, s, "recent", time.Hour), aged(t, s, "now", 0)
	used, corrupt, gone := aged(t, s, "used", 48*time.Hour), aged(t, s, "corrupt", 0), aged(t, s, "of a machine that is gone", 48*time.Hour)
	machine, ended := t.TempDir(), t.TempDir()
	must(t, s.Hold(machine, used))
	must(t, s.Hold(ended, gone, recent))
	must(t, os.Remove(ended))
	must(t, flip(filepath.Join(s.object(corrupt), "disk"), 0))
	must(t, os.MkdirAll(filepath.Join(s.unfinished(), "left"), 0o700))

	list, err := s.List(ctx, false)
	must(t, err)
	for _, l := range list {
		if (l.Digest == used) != (len(l.UsedBy) == 1) || (l.Digest == corrupt) != (l.Wrong != "") || l.Size == 0 || l.Used.IsZero() {
			t.Errorf("%+v", l)
		}
	}
	done, err := s.Prune(ctx, 24*time.Hour, false, time.Now())
	must(t, err)
	for digest, want := range map[string]bool{old: false, recent: true, now: true, used: true, corrupt: false, gone: false} {
		if present(s, digest) != want {
			t.Errorf("%s: there is %v, want %v", digest, !want, want)
		}
	}
	for _, p := range done {
		if p.Removed == present(s, p.Digest) || p.Why == "" {
			t.Errorf("%+v", p)
		}
		if p.Digest == used && !strings.Contains(p.Why, machine) {
			t.Errorf("kept by a machine: %s", p.Why)
		}
	}
	if len(done) != 6 {
		t.Errorf("%+v", done)
	}
	if entries, err := os.ReadDir(s.inputs()); err != nil || len(entries) != 3 {
		t.Errorf("inputs %v, %v", entries, err)
	}
	if entries, err := os.ReadDir(s.unfinished()); err != nil || len(entries) > 0 {
		t.Errorf("unfinished %v, %v", entries, err)
	}
	_, err = s.Prune(ctx, 0, false, time.Now())
	must(t, err)
	if present(s, recent) || !present(s, now) || !present(s, used) {
		t.Error("with no time: what was wanted an hour ago stays, or what is used or was wanted now goes")
	}
	must(t, os.Remove(machine))
	_, err = s.Prune(ctx, 0, false, time.Now().Add(time.Hour))
	must(t, err)
	if present(s, used) || present(s, now) {
		t.Error("after the machine's end and an hour it is still there")
	}
}

// While any process builds, nothing is pruned.
func TestPruneWaits(t *testing.T) {
	s := testStore(t)
	old := aged(t, s, "old", 48*time.Hour)
	_, err := s.made(context.Background(), "key", func(dir string) (Object, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := s.Prune(ctx, 0, false, time.Now()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		return Object{Kind: "root", Files: []File{{Name: "disk"}}}, os.WriteFile(dir+"/disk", nil, 0o600)
	})
	must(t, err)
	if !present(s, old) {
		t.Error("pruned all the same")
	}
}

// What cannot be read of who uses what keeps everything.
func TestPruneFailsClosed(t *testing.T) {
	s := testStore(t)
	old := aged(t, s, "old", 48*time.Hour)
	must(t, os.WriteFile(filepath.Join(s.holds(), "bad.json"), []byte("{"), 0o600))
	if _, err := s.Prune(context.Background(), 0, false, time.Now()); err == nil || !present(s, old) {
		t.Errorf("%v", err)
	}
	if err := s.Hold(t.TempDir(), "no digest"); err == nil {
		t.Error("no digest was held")
	}
}

// A disk that was made of what was unpacked does without it.
func TestDiskOutlivesItsTree(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	file := filepath.Join(t.TempDir(), "root.tar")
	must(t, os.WriteFile(file, tarOf(t, map[string]string{"usr/bin/sh": "#!"}), 0o600))
	image := nucleus.Image{Kind: nucleus.ImageTarball, Path: file}
	disk, err := s.Root(ctx, image, "/", nil)
	must(t, err)
	tree, err := s.Unpacked(image)
	must(t, err)
	at := time.Now().Add(-time.Hour)
	must(t, os.Chtimes(filepath.Join(s.object(tree), objectFile), at, at))
	_, err = s.Prune(ctx, time.Hour-time.Minute, false, time.Now())
	must(t, err)
	if present(s, tree) {
		t.Fatal("the tree is still there")
	}
	again, err := s.Root(ctx, image, "/", func(line string) { t.Errorf("%s", line) })
	if err != nil || again.Digest != disk.Digest {
		t.Errorf("%+v, %v", again, err)
	}
	if root, err := s.Resolve(ctx, image, "/", nil); err != nil || root.Digest != tree {
		t.Errorf("unpacked again: %+v, %v", root, err)
	}
}

func TestInspect(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	one := aged(t, s, "one", 0)
	aged(t, s, "two", 0)
	for _, digest := range []string{one, one[:14], one[7:19]} {
		if l, err := s.Inspect(ctx, digest); err != nil || l.Digest != one || l.Wrong != "" {
			t.Errorf("%s: %+v, %v", digest, l, err)
		}
	}
	for _, digest := range []string{"", "sha256:", "zz", "../" + one} {
		if l, err := s.Inspect(ctx, digest); err == nil {
			t.Errorf("%q: %+v", digest, l)
		}
	}
	// A change that keeps size, time and inode is seen by who reads all.
	name := filepath.Join(s.object(one), "disk")
	info, err := os.Stat(name)
	must(t, err)
	must(t, flip(name, 0))
	must(t, os.Chtimes(name, info.ModTime(), info.ModTime()))
	if _, err := s.load(one); err != nil {
		t.Errorf("control: without reading it was seen: %v", err)
	}
	if l, err := s.Inspect(ctx, one); err != nil || l.Wrong == "" {
		t.Errorf("%+v, %v", l, err)
	}
}
