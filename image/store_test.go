package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"cal/nucleus"
)

func testStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "images"))
	must(t, err)
	return s
}

// smallRoot is a directory with a root file system.
func smallRoot(t *testing.T) string {
	dir := homeDir(t)
	plant(t, dir, map[string]string{"usr/bin/sh": "#!", "bin": "-> usr/bin", "etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/app.conf": "a", "var/lib/x": "x"})
	return dir
}

// counted is a progress that counts what was built.
func counted(n *int) Progress { return func(string) { *n++ } }

func TestRoot(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	image := nucleus.Image{Kind: "directory", Path: smallRoot(t)}
	built := 0
	disk, err := s.Root(ctx, image, "/", counted(&built))
	must(t, err)
	data, err := os.ReadFile(disk.Path)
	must(t, err)
	if int64(len(data)) != disk.Size || disk.Digest != "sha256:"+nucleus.SHA256(data) || disk.Env["PATH"] == "" {
		t.Errorf("%+v of %d bytes with %s", disk, len(data), nucleus.SHA256(data))
	}
	view, err := erofs.Open(bytes.NewReader(data))
	must(t, err)
	for _, name := range []string{"proc", "sys", "dev", "tmp", "run", "root", "var/lib", "opt", "home/agent/workspace", ".nucleus/agent"} {
		if info, err := fs.Stat(view, name); err != nil || !info.IsDir() {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, want := range map[string]string{"usr/bin/sh": "#!", ".nucleus/nucleus-tool-proxy": "", "etc/app.conf": "a"} {
		if got, err := fs.ReadFile(view, name); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	again, err := s.Root(ctx, image, "/", counted(&built))
	must(t, err)
	if built != 1 || again.Path != disk.Path {
		t.Errorf("built %d times", built)
	}
	must(t, os.WriteFile(image.Path+"/etc/app.conf", []byte("b"), 0o644))
	other, err := s.Root(ctx, image, "/", counted(&built))
	must(t, err)
	if built != 2 || other.Digest == disk.Digest {
		t.Errorf("changed content: built %d times, %s", built, other.Digest)
	}
}

func TestTwoStoresBuildTheSame(t *testing.T) {
	image := nucleus.Image{Kind: "directory", Path: smallRoot(t)}
	var digests [2]string
	defer unix.Umask(unix.Umask(0o022))
	for i, umask := range []int{0o022, 0o077} {
		unix.Umask(umask)
		disk, err := testStore(t).Root(context.Background(), image, "/", nil)
		must(t, err)
		digests[i] = disk.Digest
	}
	if digests[0] != digests[1] {
		t.Errorf("%v", digests)
	}
}

func TestManyBuildOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "images")
	image := nucleus.Image{Kind: "directory", Path: smallRoot(t)}
	var built sync.Map
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			s, err := Open(dir) // each as a process of its own would
			if err != nil {
				t.Error(err)
				return
			}
			disk, err := s.Root(context.Background(), image, "/", func(string) {
				if _, twice := built.LoadOrStore("root", true); twice {
					t.Error("built twice")
				}
			})
			if err != nil || disk.Path == "" {
				t.Errorf("%+v, %v", disk, err)
			}
		})
	}
	all.Wait()
}

func TestLayers(t *testing.T) {
	dir := homeDir(t)
	plant(t, dir, map[string]string{"go/bin/go": "g", "cache/x": "c", "agent": "a program", "link": "-> go"})
	disk, err := testStore(t).Layers(context.Background(), []nucleus.Layer{
		{Name: "inner", Host: dir + "/cache", Guest: "/opt/toolchains/go/cache"}, {Name: "go", Host: dir + "/link", Guest: "/opt/toolchains/go"},
		{Name: "again", Host: dir + "/go", Guest: "/.nucleus/agent/opt/go"}, {Name: "file", Host: dir + "/agent", Guest: "/.nucleus/agent/bin/agent"},
	}, nil)
	must(t, err)
	data, err := os.ReadFile(disk.Path)
	must(t, err)
	view, err := erofs.Open(bytes.NewReader(data))
	must(t, err)
	raw, err := fs.ReadFile(view, "layers.json")
	must(t, err)
	var at []LayerAt
	must(t, json.Unmarshal(raw, &at))
	content := map[string]string{"/.nucleus/agent/bin/agent": "", "/.nucleus/agent/opt/go": "/bin/go", "/opt/toolchains/go": "/bin/go", "/opt/toolchains/go/cache": "/x"}
	if len(at) != len(content) || at[2].Guest != "/opt/toolchains/go" || at[1].Source != at[2].Source {
		t.Errorf("%s", raw)
	}
	for _, layer := range at {
		if _, err := fs.Stat(view, layer.Source+content[layer.Guest]); err != nil {
			t.Errorf("%+v: %v", layer, err)
		}
	}
	if _, err := testStore(t).Layers(context.Background(), []nucleus.Layer{{Name: "none", Host: dir + "/none", Guest: "/x"}}, nil); err == nil {
		t.Error("a layer that is not there")
	}
}

// What is not as it was recorded is not used.
func TestCorrupt(t *testing.T) {
	image := nucleus.Image{Kind: "directory", Path: smallRoot(t)}
	for name, corrupt := range map[string]func(disk Disk) error{
		"a byte":    func(d Disk) error { return flip(d.Path, 2000) },
		"cut off":   func(d Disk) error { return errors.Join(os.Chmod(d.Path, 0o600), os.Truncate(d.Path, d.Size-1)) },
		"gone":      func(d Disk) error { return os.Remove(d.Path) },
		"a link":    func(d Disk) error { return errors.Join(os.Rename(d.Path, d.Path+"2"), os.Symlink(d.Path+"2", d.Path)) },
		"no record": func(d Disk) error { return os.Remove(filepath.Join(filepath.Dir(d.Path), objectFile)) },
		"half record": func(d Disk) error {
			return os.WriteFile(filepath.Join(filepath.Dir(d.Path), objectFile), []byte("{"), 0o600)
		},
		"another's record": func(d Disk) error {
			record := filepath.Join(filepath.Dir(d.Path), objectFile)
			raw, err := os.ReadFile(record)
			return errors.Join(err, os.WriteFile(record, bytes.ReplaceAll(raw, []byte(d.Digest), []byte("sha256:"+strings.Repeat("0", 64))), 0o600))
		},
	} {
		s := testStore(t)
		disk, err := s.Root(context.Background(), image, "/", nil)
		must(t, err)
		must(t, corrupt(disk))
		if again, err := s.Root(context.Background(), image, "/", nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %+v, %v", name, again, err)
		}
	}
	s := testStore(t)
	disk, err := s.Root(context.Background(), image, "/", nil)
	must(t, err)
	raw, err := os.ReadFile(disk.Path)
	must(t, err)
	must(t, errors.Join(os.Remove(disk.Path), os.WriteFile(disk.Path, raw, 0o444))) // as out of a backup
	if _, err := s.Root(context.Background(), image, "/", nil); err != nil {
		t.Errorf("control: the same bytes in another inode: %v", err)
	}
}

func flip(name string, at int) error {
	raw, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	raw[at] ^= 1
	return errors.Join(os.Chmod(name, 0o600), os.WriteFile(name, raw, 0o600))
}

func TestUnfinishedIsNoImage(t *testing.T) {
	s := testStore(t)
	failed := errors.New("failed")
	_, err := s.made(context.Background(), "key", func(dir string) (Object, error) {
		must(t, os.WriteFile(dir+"/disk.erofs", []byte("half"), 0o600))
		return Object{}, failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	// What a killed process leaves.
	left := filepath.Join(s.unfinished(), "left")
	must(t, os.MkdirAll(left+"/x", 0o700))
	must(t, os.Chmod(left+"/x", 0o500))
	_, err = s.made(context.Background(), "key", func(dir string) (Object, error) {
		if again, err := Open(s.dir); err != nil || again == nil {
			t.Errorf("while another builds: %v", err)
		}
		if _, err := os.Stat(left); err != nil {
			t.Errorf("removed while a build runs: %v", err)
		}
		return Object{Kind: "root", Files: []File{{Name: "f"}}}, os.WriteFile(dir+"/f", []byte("whole"), 0o600)
	})
	must(t, err)
	_, err = Open(s.dir)
	must(t, err)
	if entries, err := os.ReadDir(s.unfinished()); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
