package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// smallDisk is a file system of so many KiB.
func smallDisk(t *testing.T, kib int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%dk,mode=700", kib)); err != nil {
		t.Skipf("a file system of its own cannot be mounted here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// A disk that fills while an image is built: an error that says so and what to do, and
// nothing that could be taken for an image.
func TestDiskFull(t *testing.T) {
	ctx := context.Background()
	root := homeDir(t)
	plant(t, root, map[string]string{"usr/bin/sh": "#!"})
	for i := range 150 { // each takes two blocks and looks like one
		must(t, os.WriteFile(filepath.Join(root, "usr", fmt.Sprintf("f%d", i)), bytes.Repeat([]byte{byte(i)}, 4097), 0o644))
	}
	tarball := filepath.Join(t.TempDir(), "root.tar")
	must(t, os.WriteFile(tarball, tarOf(t, map[string]string{"usr/a": strings.Repeat("a", 300<<10), "usr/b": strings.Repeat("b", 300<<10), "usr/c": strings.Repeat("c", 300<<10)}), 0o600))
	directory := nucleus.Image{Kind: nucleus.ImageDirectory, Path: root}
	for name, c := range map[string]struct {
		kib  int
		make func(*Store) error
	}{
		"refused at once":      {400, func(s *Store) error { _, err := s.Root(ctx, directory, "/", nil); return err }},
		"full while it writes": {1000, func(s *Store) error { _, err := s.Root(ctx, directory, "/", nil); return err }},
		"too large for the disk": {700, func(s *Store) error {
			_, err := s.Resolve(ctx, nucleus.Image{Kind: nucleus.ImageTarball, Path: tarball}, "/", nil)
			return err
		}},
		"no room for an initramfs": {200, func(s *Store) error { _, err := s.Initramfs(ctx, Kernel{Digest: "sha256:x"}, tarball); return err }},
	} {
		disk := smallDisk(t, c.kib)
		s, err := Open(filepath.Join(disk, "images"))
		must(t, err)
		if err := c.make(s); err == nil || !strings.Contains(err.Error(), "hint:") || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", name, err)
		}
		nothingLeft(t, s, name)
		must(t, unix.Mount("", disk, "", unix.MS_REMOUNT, "size=100m"))
		if err := c.make(s); err != nil {
			t.Errorf("%s: with room: %v", name, err)
		}
	}
}

const buildsForTest = "CAL_TEST_BUILDS"

// TestBuilds is no test: it is the process that TestKilledBuild kills.
func TestBuilds(t *testing.T) {
	place := os.Getenv(buildsForTest)
	if place == "" {
		t.Skip("for TestKilledBuild")
	}
	store, root, _ := strings.Cut(place, ":")
	s, err := Open(store)
	must(t, err)
	fmt.Println("building")
	disk, err := s.Root(context.Background(), nucleus.Image{Kind: nucleus.ImageDirectory, Path: root}, "/", nil)
	must(t, err)
	fmt.Println("built", disk.Digest)
}

// A build that is killed, wherever it is, leaves no image, and the next one makes the same
// as if nothing had been.
func TestKilledBuild(t *testing.T) {
	root := homeDir(t)
	plant(t, root, map[string]string{"usr/bin/sh": "#!"})
	for i := range 40 {
		must(t, os.WriteFile(filepath.Join(root, "usr", fmt.Sprintf("f%d", i)), bytes.Repeat([]byte{byte(i)}, 1<<20), 0o644))
	}
	image := nucleus.Image{Kind: nucleus.ImageDirectory, Path: root}
	want, err := testStore(t).Root(context.Background(), image, "/", nil)
	must(t, err)
	for _, written := range []int64{-1, 0, 1, 20 << 20, want.Size} {
		store := filepath.Join(t.TempDir(), "images")
		killAt(t, store, root, written)
		s, err := Open(store)
		must(t, err)
		if left, err := os.ReadDir(s.unfinished()); err != nil || len(left) > 0 {
			t.Errorf("killed at %d: left %v, %v", written, left, err)
		}
		disk, err := s.Root(context.Background(), image, "/", nil)
		if err != nil || disk.Digest != want.Digest {
			t.Errorf("killed at %d: %+v, %v", written, disk, err)
			continue
		}
		if digest, err := digestFile(disk.Path); err != nil || digest != want.Digest {
			t.Errorf("killed at %d: %s, %v", written, digest, err)
		}
	}
}

// killAt starts a build and kills it when so many bytes of the image are there; -1: as soon
// as it has begun.
func killAt(t *testing.T, store, root string, written int64) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestBuilds$", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), buildsForTest+"="+store+":"+root)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "building" {
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		for lines.Scan() {
		}
	}()
	for deadline := time.Now().Add(30 * time.Second); written >= 0; {
		if time.Now().After(deadline) {
			t.Fatal("the build did not come so far: " + strconv.FormatInt(written, 10))
		}
		select {
		case <-over: // it was faster
			return
		default:
		}
		found, err := filepath.Glob(filepath.Join(store, "unfinished/*", diskFile))
		must(t, err)
		if len(found) == 0 {
			continue
		}
		if info, err := os.Stat(found[0]); err == nil && info.Size() >= written {
			return
		} else if errors.Is(err, os.ErrNotExist) {
			continue
		}
	}
}
