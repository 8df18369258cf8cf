package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

// hint is what follows "hint: " in an error.
func hint(err error) string {
	_, after, _ := strings.Cut(fmt.Sprint(err), "hint: ")
	return after
}

// A corrupt disk is made again while a machine uses it, which goes on with what it has open.
func TestCorruptDiskIsMended(t *testing.T) {
	ctx := context.Background()
	tarball := filepath.Join(t.TempDir(), "root.tar")
	must(t, os.WriteFile(tarball, tarOf(t, map[string]string{"usr/bin/sh": "#!/bin/x"}), 0o600))
	for name, image := range map[string]nucleus.Image{
		"directory": {Kind: nucleus.ImageDirectory, Path: smallRoot(t)}, "tarball": {Kind: nucleus.ImageTarball, Path: tarball},
	} {
		for _, way := range []string{"prune", "build"} {
			s := testStore(t)
			disk, err := s.Root(ctx, image, "/", nil)
			must(t, err)
			machine := t.TempDir()
			must(t, s.Hold(machine, disk.Digest))
			open, err := os.Open(disk.Path)
			must(t, err)
			defer open.Close()
			must(t, flip(disk.Path, 2000))
			if _, err := s.Root(ctx, image, "/", nil); !errors.Is(err, ErrCorrupt) || !strings.Contains(hint(err), "cal image prune removes it") {
				t.Errorf("%s: %v", name, err)
			}
			if way == "prune" {
				done, err := s.Prune(ctx, 7*24*time.Hour, false, time.Now())
				must(t, err)
				if present(s, disk.Digest) || len(done) == 0 || !strings.Contains(fmt.Sprint(done), machine) {
					t.Errorf("%s: after prune: %+v", name, done)
				}
			} else if _, _, err := s.RenewRoot(ctx, image, "/", nil); err != nil {
				t.Errorf("%s: built: %v", name, err)
			}
			again, err := s.Root(ctx, image, "/", nil)
			if err != nil || again.Digest != disk.Digest {
				t.Fatalf("%s, %s: %+v, %v", name, way, again, err)
			}
			if digest, err := digestFile(again.Path); err != nil || digest != disk.Digest {
				t.Errorf("%s, %s: it has %s, %v", name, way, digest, err)
			}
			if n, err := io.Copy(io.Discard, open); err != nil || n != disk.Size {
				t.Errorf("%s, %s: what the machine has open: %d bytes, %v", name, way, n, err)
			}
			wantRetired(t, s, 1)
			must(t, os.Remove(machine))
			_, err = s.Prune(ctx, 0, false, time.Now())
			must(t, err)
			wantRetired(t, s, 0)
		}
	}
}

func wantRetired(t *testing.T, s *Store, want int) {
	t.Helper()
	if entries, err := os.ReadDir(s.retired()); err != nil || len(entries) != want {
		t.Errorf("retired: %v, %v; want %d", entries, err, want)
	}
}

// A machine that shows a tree goes on showing it.
func TestCorruptTreeIsMended(t *testing.T) {
	ctx, file := context.Background(), filepath.Join(t.TempDir(), "root.tar")
	must(t, os.WriteFile(file, tarOf(t, map[string]string{"usr/bin/sh": "#!/bin/x", "usr/y": "y"}), 0o600))
	image := nucleus.Image{Kind: nucleus.ImageTarball, Path: file}
	for _, way := range []string{"prune", "build"} {
		s := testStore(t)
		root, err := s.Resolve(ctx, image, "/", nil)
		must(t, err)
		machine := t.TempDir()
		must(t, s.Hold(machine, root.Digest))
		place := filepath.Join(s.object(root.Digest), treeDir)
		shown, err := os.OpenRoot(place)
		must(t, err)
		defer shown.Close()
		must(t, os.Remove(place+"/usr/y"))
		s, err = Open(s.dir) // as the next process
		must(t, err)
		if _, err := s.Resolve(ctx, image, "/", nil); !errors.Is(err, ErrCorrupt) || !strings.Contains(hint(err), "cal image prune removes it") {
			t.Errorf("%v", err)
		}
		if list, err := s.List(ctx, false); err != nil || len(list) != 1 || list[0].Wrong == "" {
			t.Errorf("listed: %+v, %v", list, err)
		}
		if way == "prune" {
			_, err = s.Prune(ctx, 7*24*time.Hour, false, time.Now())
		} else {
			_, err = s.Renew(ctx, image, nil)
		}
		must(t, err)
		again, err := s.Resolve(ctx, image, "/", nil)
		if err != nil || again.Digest != root.Digest {
			t.Errorf("%s: %+v, %v", way, again, err)
		}
		if got, err := os.ReadFile(place + "/usr/y"); err != nil || string(got) != "y" {
			t.Errorf("%s: %q, %v", way, got, err)
		}
		if got, err := shown.ReadFile("usr/bin/sh"); err != nil || string(got) != "#!/bin/x" {
			t.Errorf("%s: what the machine shows: %q, %v", way, got, err)
		}
		wantRetired(t, s, 1)
		must(t, os.Remove(machine))
		_, err = Open(s.dir) // the next process
		must(t, err)
		wantRetired(t, s, 0)
	}
}

// A change that nothing but the bytes tell of is found and mended by who reads all.
func TestPruneVerifies(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	file := filepath.Join(t.TempDir(), "root.tar")
	must(t, os.WriteFile(file, tarOf(t, map[string]string{"usr/bin/sh": "#!"}), 0o600))
	image := nucleus.Image{Kind: nucleus.ImageTarball, Path: file}
	disk, err := s.Root(ctx, image, "/", nil)
	must(t, err)
	info, err := os.Stat(disk.Path)
	must(t, err)
	must(t, flip(disk.Path, 2000))
	must(t, os.Chtimes(disk.Path, info.ModTime(), info.ModTime()))
	l, err := s.Inspect(ctx, disk.Digest)
	must(t, err)
	if !strings.Contains(l.Wrong, "hint: cal image prune --verify removes it") {
		t.Errorf("%+v", l)
	}
	if _, err := s.Prune(ctx, time.Hour, false, time.Now()); err != nil || !present(s, disk.Digest) {
		t.Errorf("control: who does not read all has removed it (%v)", err)
	}
	if _, err := s.Prune(ctx, time.Hour, true, time.Now()); err != nil || present(s, disk.Digest) {
		t.Errorf("it is still there (%v)", err)
	}
	if again, err := s.Root(ctx, image, "/", nil); err != nil || again.Digest != disk.Digest {
		t.Errorf("%+v, %v", again, err)
	}
}

// interrupted is a context that ends after so many looks at it.
type interrupted struct {
	context.Context
	looks int
}

func (i *interrupted) Err() error {
	if i.looks--; i.looks < 0 {
		return context.Canceled
	}
	return nil
}

// Who is interrupted has found nothing corrupt.
func TestInterruptIsNoCorruption(t *testing.T) {
	s := testStore(t)
	disk, err := s.Root(context.Background(), nucleus.Image{Kind: nucleus.ImageDirectory, Path: smallRoot(t)}, "/", nil)
	must(t, err)
	for looks := range 5 {
		_, err := s.Prune(&interrupted{context.Background(), looks}, time.Hour, true, time.Now())
		if looks == 0 && err == nil {
			t.Error("control: nothing was interrupted")
		}
		if err != nil && !errors.Is(err, context.Canceled) || !present(s, disk.Digest) {
			t.Fatalf("after %d looks: %v", looks, err)
		}
	}
}

// A kernel of a person's own is not replaced by another without a word.
func TestCorruptKernelIsMended(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	path := plantKernel(t, s, "6.1.0-test")
	k, err := s.RenewKernel(ctx, path, nil)
	must(t, err)
	must(t, s.Hold(t.TempDir(), k.Digest))
	must(t, flip(k.ELF, 70))
	if _, err := s.Kernel(ctx, "", nil); !errors.Is(err, ErrCorrupt) || !strings.Contains(hint(err), "cal image build kernel:"+path) {
		t.Errorf("%v", err)
	}
	list, err := s.List(ctx, false)
	must(t, err)
	if len(list) != 1 || list[0].Wrong == "" || list[0].Kind != kindKernel || list[0].What != path || len(list[0].UsedBy) != 1 {
		t.Errorf("it is listed as %+v", list)
	}
	if again, err := s.RenewKernel(ctx, path, nil); err != nil || again.Digest != k.Digest {
		t.Errorf("%+v, %v", again, err)
	}
	if again, err := s.Kernel(ctx, "", nil); err != nil || again.Digest != k.Digest {
		t.Errorf("%+v, %v", again, err)
	}
	wantRetired(t, s, 1)
}

// What a killed build of packages has left goes with the next Open, and nothing else of that name.
func TestAptDirsAreCleaned(t *testing.T) {
	s, shared := testStore(t), t.TempDir()
	mine, others := filepath.Join(shared, s.aptDirs()+"1"), filepath.Join(shared, "cal-apt-000000000000-1")
	link, away := filepath.Join(shared, s.aptDirs()+"2"), t.TempDir()
	must(t, errors.Join(os.MkdirAll(mine+"/archives", 0o755), os.Mkdir(others, 0o755), os.Symlink(away, link)))
	must(t, os.WriteFile(filepath.Join(away, "file"), nil, 0o600))
	foreign := filepath.Join(shared, s.aptDirs()+"3")
	must(t, os.Mkdir(foreign, 0o755))
	root := os.Geteuid() == 0
	if root {
		must(t, os.Chown(foreign, 12345, 12345))
	}
	must(t, s.cleanApt(shared))
	for name, want := range map[string]bool{mine: false, others: true, link: true, filepath.Join(away, "file"): true, foreign: root} {
		if _, err := os.Lstat(name); (err == nil) != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	if root { // whose builds use the shared directory
		dir, _, err := s.workspace()
		must(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
		_, err = Open(s.dir)
		must(t, err)
		if _, err := os.Lstat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}
