package tree

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plant makes a small host with all that must not get into a machine.
func plant(t *testing.T) string {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	for name, mode := range map[string]fs.FileMode{
		"bin/tool": 0o755, "bin/sudo": 0o755 | fs.ModeSetuid | fs.ModeSetgid, "bin/mine": 0o754, "etc/conf": 0o644, "etc/shadow": 0o640,
		"private/key": 0o644, "locked/key": 0o644, "empty": 0o644, "deep/a/b/c/file": 0o644,
	} {
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(strings.TrimSuffix(name, "empty")), 0o600))
		must(t, os.Chmod(file, mode))
	}
	must(t, os.Chmod(dir+"/private", 0o700))
	must(t, os.Chmod(dir+"/locked", 0o754))
	must(t, os.Symlink("/etc/shadow", dir+"/out"))
	must(t, os.Symlink("bin", dir+"/sbin"))
	must(t, unix.Mkfifo(dir+"/fifo", 0o666))
	return dir
}

func written(t *testing.T, tree *Tree) []byte {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	must(t, err)
	defer f.Close()
	must(t, tree.WriteEROFS(f))
	data, err := os.ReadFile(f.Name())
	must(t, err)
	return data
}

// listing is every entry of a file system with all that a machine sees of it.
func listing(t *testing.T, fsys fs.FS) map[string]string {
	t.Helper()
	found := map[string]string{}
	must(t, fs.WalkDir(fsys, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content := ""
		switch {
		case info.Mode().IsRegular():
			data, err := fs.ReadFile(fsys, name)
			if err != nil {
				return err
			}
			content = string(data)
		case info.Mode()&fs.ModeSymlink != 0:
			if content, err = fsys.(fs.ReadLinkFS).ReadLink(name); err != nil {
				return err
			}
		}
		found[name] = info.Mode().String() + " " + content
		return nil
	}))
	return found
}

var planted = map[string]string{
	".": "drwxr-xr-x ", "bin": "drwxr-xr-x ", "bin/tool": "-rwxr-xr-x bin/tool", "bin/sudo": "-rwxr-xr-x bin/sudo", "bin/mine": "-rw-r--r-- bin/mine",
	"etc": "drwxr-xr-x ", "etc/conf": "-rw-r--r-- etc/conf", "empty": "-rw-r--r-- ", "deep": "drwxr-xr-x ", "deep/a": "drwxr-xr-x ", "deep/a/b": "drwxr-xr-x ",
	"deep/a/b/c": "drwxr-xr-x ", "deep/a/b/c/file": "-rw-r--r-- deep/a/b/c/file", "out": "Lrwxrwxrwx /etc/shadow", "sbin": "Lrwxrwxrwx bin",
}

func same(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name, entry := range want {
		if got[name] != entry {
			t.Errorf("%s: %q, want %q", name, got[name], entry)
		}
	}
	for name, entry := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %q, want nothing", name, entry)
		}
	}
}

func TestImageHoldsWhatEverybodyMaySee(t *testing.T) {
	dir := plant(t)
	tree := New()
	must(t, tree.Copy(context.Background(), dir, "/"))
	data := written(t, tree)
	image, err := erofs.Open(bytes.NewReader(data))
	must(t, err)
	same(t, listing(t, image), planted)
	info, err := fs.Stat(image, "deep")
	must(t, err)
	if stat := info.Sys().(*erofs.Stat); stat.UID != 0 || stat.GID != 0 || stat.Nlink != 3 || len(stat.Xattrs) > 0 {
		t.Errorf("deep: %+v", stat)
	}
	again := New()
	must(t, again.Copy(context.Background(), dir, "/"))
	if !bytes.Equal(written(t, again), data) {
		t.Error("the same tree gave other bytes")
	}
}

// The other readers of the format: erofs-utils, and the kernel that runs here.
func TestOthersReadTheImage(t *testing.T) {
	dir := plant(t)
	tree := New()
	must(t, tree.Copy(context.Background(), dir, "/"))
	many := bytes.Repeat([]byte("0123456789abcdef"), 5000)
	for _, n := range []int{1, 4095, 4096, 4097, 80000} {
		must(t, tree.File("/sizes/"+strings.Repeat("n", 200)+"-"+string(rune('a'+n%26)), many[:n], false))
	}
	for i := range 600 { // a directory of several blocks
		must(t, tree.File("/many/"+strings.Repeat(string(rune('a'+i%26)), 20+i/26), many[:i], i%2 == 0))
	}
	for _, name := range []string{"new\nline", "back\\slash", "\xff\xfe no UTF-8", strings.Repeat("ä", 127) + "x", "...", " ", "-rf", "a:b*?"} {
		must(t, tree.File("/names/"+name, []byte(name), false))
	}
	must(t, tree.Link("/names/long", strings.Repeat("x/", 2047)))
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, written(t, tree), 0o600))
	t.Run("fsck", func(t *testing.T) {
		fsck, err := exec.LookPath("fsck.erofs")
		if err != nil {
			t.Skip("fsck.erofs is not installed (erofs-utils)")
		}
		if said, err := exec.Command(fsck, image).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, said)
		}
	})
	t.Run("kernel", func(t *testing.T) {
		at := t.TempDir()
		if said, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", image, at).CombinedOutput(); err != nil {
			t.Skipf("this host mounts no EROFS: %v: %s", err, said)
		}
		defer exec.Command("umount", at).Run()
		want, err := erofs.Open(bytes.NewReader(written(t, tree)))
		must(t, err)
		same(t, listing(t, mounted(at)), listing(t, want))
	})
}

// mounted is a directory as an fs.FS that takes names which are no UTF-8, too.
type mounted string

func (m mounted) Open(name string) (fs.File, error) { return os.Open(filepath.Join(string(m), name)) }
func (m mounted) ReadLink(name string) (string, error) {
	return os.Readlink(filepath.Join(string(m), name))
}
func (m mounted) Lstat(name string) (fs.FileInfo, error) {
	return os.Lstat(filepath.Join(string(m), name))
}
func (m mounted) ReadDir(name string) ([]fs.DirEntry, error) {
	return os.ReadDir(filepath.Join(string(m), name))
}

func TestCopyRefuses(t *testing.T) {
	dir := plant(t)
	for _, name := range []string{"/missing", "/private", "/etc/shadow", "/out", "/fifo"} {
		if err := New().Copy(context.Background(), dir+name, "/at"); err == nil {
			t.Errorf("%s was copied", name)
		}
	}
	if err := New().Copy(context.Background(), dir+"/etc/conf", "/"); err == nil {
		t.Error("a file became the root")
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := New().Copy(ended, dir, "/"); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
	tree := New()
	must(t, tree.File("/a", nil, false))
	for name, err := range map[string]error{
		"a directory in a file": tree.Dir("/a/b"), "a file in a file": tree.File("/a/b", nil, false), "a second file": tree.File("/a", nil, false),
		"a link in place of a file": tree.Link("/a", "x"), "an empty link": tree.Link("/b", ""), "a root file": tree.File("/", nil, false),
	} {
		if err == nil {
			t.Errorf("%s was made", name)
		}
	}
}

func TestCopyReplaces(t *testing.T) {
	dir := plant(t)
	tree := New()
	must(t, tree.Copy(context.Background(), dir, "/x"))
	must(t, tree.Copy(context.Background(), dir+"/etc", "/x/deep"))
	must(t, tree.Copy(context.Background(), dir+"/etc/conf", "/x/bin"))
	size, entries := int64(0), 0
	view, err := erofs.Open(bytes.NewReader(written(t, tree)))
	must(t, err)
	for _, entry := range listing(t, view) {
		entries++
		if strings.HasPrefix(entry, "-") {
			size += int64(len(entry) - len("-rw-r--r-- "))
		}
	}
	if tree.Entries() != entries-1 || tree.Size() != size {
		t.Errorf("%d entries, %d bytes counted; %d, %d in the image", tree.Entries(), tree.Size(), entries-1, size)
	}
	if tree.Has("/x/deep/a") || !tree.Has("/x/deep/conf") || tree.Has("/x/bin/tool") {
		t.Error("what was replaced is still there")
	}
}

// A link in the way of a directory that must be one is replaced, and nothing else is.
func TestRealDir(t *testing.T) {
	tree := New()
	must(t, tree.Link("/home", "/var/home"))
	must(t, tree.Link("/x/tmp", "../usr"))
	must(t, tree.File("/x/run", []byte("r"), false))
	if err := tree.Dir("/home/agent"); err == nil {
		t.Error("control: a directory was made below a link")
	}
	must(t, tree.RealDir("/home/agent"))
	must(t, tree.RealDir("/x/tmp"))
	must(t, tree.RealDir("/x/tmp"))
	if err := tree.RealDir("/x/run/y"); err == nil || !strings.Contains(err.Error(), "run is a file") {
		t.Errorf("below a file: %v", err)
	}
	view, err := erofs.Open(bytes.NewReader(written(t, tree)))
	must(t, err)
	got := listing(t, view)
	for name, want := range map[string]string{"home": "drwxr-xr-x ", "home/agent": "drwxr-xr-x ", "x/tmp": "drwxr-xr-x ", "x/run": "-rw-r--r-- r"} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if tree.Entries() != len(got)-1 { // without the root
		t.Errorf("%d entries counted: %v", tree.Entries(), got)
	}
}

// A file that changes between the look and the copy is never half in an image.
func TestChangedMeanwhile(t *testing.T) {
	for name, change := range map[string]func(file string) error{
		"shorter":           func(file string) error { return os.Truncate(file, 1) },
		"longer":            func(file string) error { return os.WriteFile(file, []byte("longer than it was"), 0o644) },
		"other bytes":       func(file string) error { return os.WriteFile(file, []byte("etc/CONF"), 0o644) },
		"gone":              os.Remove,
		"a link instead":    func(file string) error { return errors.Join(os.Remove(file), os.Symlink("/etc/passwd", file)) },
		"a FIFO instead":    func(file string) error { return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o644)) },
		"its directory too": func(file string) error { return os.RemoveAll(filepath.Dir(file)) },
	} {
		dir := plant(t)
		tree := New()
		must(t, tree.Copy(context.Background(), dir, "/"))
		must(t, change(dir+"/etc/conf"))
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		must(t, err)
		if err := tree.WriteEROFS(f); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: %v", name, err)
		}
		f.Close()
	}
}

func TestFingerprint(t *testing.T) {
	dir := plant(t)
	look := func() string {
		tree := New()
		must(t, tree.Copy(context.Background(), dir, "/"))
		must(t, tree.File("/etc/given", []byte("x"), false))
		return tree.Fingerprint()
	}
	before := look()
	if look() != before {
		t.Fatal("the same tree has another fingerprint")
	}
	if err := os.WriteFile(dir+"/etc/shadow", []byte("other"), 0o640); err != nil || look() != before {
		t.Errorf("a file that is not in the image counts: %v", err)
	}
	for _, change := range []struct {
		name string
		make func() error
	}{
		{"content of the same size", func() error {
			info, err := os.Stat(dir + "/etc/conf")
			return errors.Join(err, os.WriteFile(dir+"/etc/conf", []byte("etc/CONF"), 0o644), os.Chtimes(dir+"/etc/conf", info.ModTime(), info.ModTime()))
		}},
		{"a mode", func() error { return os.Chmod(dir+"/etc/conf", 0o755) }},
		{"a target", func() error { return errors.Join(os.Remove(dir+"/sbin"), os.Symlink("etc", dir+"/sbin")) }},
		{"a new file", func() error { return os.WriteFile(dir+"/new", nil, 0o644) }},
		{"a removed file", func() error { return os.Remove(dir + "/empty") }},
		{"another name", func() error { return os.Rename(dir+"/etc/conf", dir+"/etc/conf2") }},
	} {
		must(t, change.make())
		after := look()
		if after == before {
			t.Errorf("%s does not count", change.name)
		}
		before = after
	}
}

func TestNothingOpenMeanwhile(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	for i := range 300 {
		must(t, os.WriteFile(filepath.Join(dir, strings.Repeat("f", 1+i%50)+string(rune('a'+i/50))), []byte("content"), 0o644))
	}
	tree := New()
	must(t, tree.Copy(context.Background(), dir, "/"))
	few := limit
	few.Cur = 100
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &few))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	must(t, tree.WriteEROFS(&discard{}))
}

// discard is a file that keeps nothing.
type discard struct{ at int64 }

func (d *discard) Write(p []byte) (int, error) { d.at += int64(len(p)); return len(p), nil }

func (d *discard) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		d.at = offset
	}
	return d.at, nil
}

// changing is a writer on which a file changes while it is copied.
type changing struct {
	discard
	then func()
}

func (c *changing) Write(p []byte) (int, error) {
	if len(p) > 100_000 && c.then != nil {
		c.then()
		c.then = nil
	}
	return c.discard.Write(p)
}

func TestChangedWhileRead(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.WriteFile(dir+"/large", bytes.Repeat([]byte("x"), 1<<20), 0o644))
	tree := New()
	must(t, tree.Copy(context.Background(), dir, "/"))
	change := func() {
		f, err := os.OpenFile(dir+"/large", os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt([]byte("y"), 1<<20-1)
		must(t, errors.Join(err, f.Close()))
	}
	if err := tree.WriteEROFS(&changing{then: change}); !errors.Is(err, ErrChanged) {
		t.Errorf("%v", err)
	}
}
