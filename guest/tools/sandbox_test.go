package tools

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// forBothWalls runs a test with openat2 and with the walk that replaces it.
func forBothWalls(t *testing.T, test func(t *testing.T, box *Sandbox, dir, outside string)) {
	for _, wall := range []string{"openat2", "walk"} {
		t.Run(wall, func(t *testing.T) {
			base, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			dir, outside := filepath.Join(base, "workspace"), filepath.Join(base, "outside")
			for _, d := range []string{dir, outside, filepath.Join(dir, "sub")} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			put(t, filepath.Join(outside, "secret"), "SECRET")
			put(t, filepath.Join(dir, "plain"), "plain")
			put(t, filepath.Join(dir, "sub/inner"), "inner")
			box, err := OpenSandbox(dir, func(p string) bool { return p == "blocked" || strings.HasSuffix(p, ".pem") })
			if err != nil {
				t.Fatal(err)
			}
			defer box.Close()
			if wall == "openat2" && !box.openat2 {
				t.Skip("this kernel has no openat2")
			}
			box.openat2 = wall == "openat2"
			test(t, box, dir, outside)
		})
	}
}

func put(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// readAs reads as read_files does.
func readAs(box *Sandbox, name string) (string, error) {
	rel, err := box.Resolve(name)
	if err != nil {
		return "", err
	}
	w := &worker{box: box}
	result, err := w.read(rel, ReadArgs{Path: name})
	return result.Content, err
}

func writeAs(box *Sandbox, name, content string) error {
	rel, err := box.Resolve(name)
	if err != nil {
		return err
	}
	return box.Replace(rel, []byte(content), 0)
}

func TestSandboxEscapes(t *testing.T) {
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, outside string) {
		in := func(name string) string { return filepath.Join(dir, name) }
		check(t, os.Symlink("/etc/passwd", in("abs-link")))
		check(t, os.Symlink("../outside/secret", in("rel-link")))
		check(t, os.Symlink("../outside", in("dir-link")))
		check(t, os.Symlink("../outside/not-there", in("dangling-out")))
		check(t, os.Symlink("sub/../../outside/secret", in("winding")))
		check(t, os.Symlink("/proc/self/root/etc/passwd", in("proc-link")))
		check(t, os.Symlink("/proc/self/fd/0", in("fd-link")))
		check(t, os.Symlink(dir+"/../outside/secret", in("abs-winding")))
		check(t, os.Symlink("loop", in("loop")))
		check(t, os.Link(filepath.Join(outside, "secret"), in("hard")))
		check(t, unix.Mkfifo(in("fifo"), 0o644))
		listener, err := net.Listen("unix", in("socket"))
		check(t, err)
		defer listener.Close()
		put(t, in("blocked"), "BLOCKED")
		put(t, in("sub/key.pem"), "BLOCKED")
		check(t, os.Symlink("sub/key.pem", in("to-blocked")))

		// The benign twins.
		check(t, os.Symlink("sub/inner", in("good-link")))
		check(t, os.Symlink("../plain", in("sub/good-up")))
		check(t, os.Symlink(dir+"/sub", in("good-abs")))
		check(t, os.Symlink("sub/new", in("good-dangling")))

		cases := []struct {
			name string
			kind nucleus.Kind
			part string
		}{
			{"abs-link", nucleus.KindDenied, "out of the workspace"},
			{"rel-link", nucleus.KindDenied, "out of the workspace"},
			{"dir-link/secret", nucleus.KindDenied, "out of the workspace"},
			{"dir-link/new", nucleus.KindDenied, "out of the workspace"},
			{"dangling-out", nucleus.KindDenied, "out of the workspace"},
			{"winding", nucleus.KindDenied, "out of the workspace"},
			{"proc-link", nucleus.KindDenied, "out of the workspace"},
			{"fd-link", nucleus.KindDenied, "out of the workspace"},
			{"abs-winding", nucleus.KindDenied, "out of the workspace"},
			{"loop", nucleus.KindInvalid, "more than 40 links"},
			{"hard", nucleus.KindDenied, "2 hard links"},
			{"fifo", nucleus.KindDenied, "is a fifo"},
			{"socket", nucleus.KindDenied, "is a socket"},
			{"blocked", nucleus.KindDenied, "blocked by policy"},
			{"blocked/below", nucleus.KindDenied, "blocked by policy"},
			{"sub/key.pem", nucleus.KindDenied, "blocked by policy"},
			{"to-blocked", nucleus.KindDenied, "blocked by policy"},
			{"../outside/secret", nucleus.KindInvalid, `".." is not allowed`},
			{"sub/../plain", nucleus.KindInvalid, `".." is not allowed`},
			{"..", nucleus.KindInvalid, `".." is not allowed`},
			{"/etc/passwd", nucleus.KindDenied, "outside the workspace"},
			{outside + "/secret", nucleus.KindDenied, "outside the workspace"},
			{dir + "-twin/x", nucleus.KindDenied, "outside the workspace"},
			{dir + "/../outside/secret", nucleus.KindInvalid, `".." is not allowed`},
			{"plain\x00.txt", nucleus.KindInvalid, "NUL"},
			{"", nucleus.KindInvalid, "empty"},
			{strings.Repeat("x", 256), nucleus.KindInvalid, "256 bytes"},
		}
		for _, c := range cases {
			content, err := readAs(box, c.name)
			if err == nil {
				t.Errorf("reading %q gave %q", c.name, content)
				continue
			}
			wantKind(t, err, c.kind, c.part)
			if err := writeAs(box, c.name, "OVERWRITTEN"); err == nil {
				t.Errorf("writing %q succeeded", c.name)
			}
		}
		if entries, _ := os.ReadDir(outside); len(entries) != 1 {
			t.Errorf("outside holds %d entries, want 1", len(entries))
		}
		if data, _ := os.ReadFile(filepath.Join(outside, "secret")); string(data) != "SECRET" {
			t.Errorf("outside file is now %q", data)
		}

		for name, want := range map[string]string{
			"plain": "plain", "./plain": "plain", "sub//inner": "inner", dir + "/plain": "plain",
			"good-link": "inner", "sub/good-up": "plain", "good-abs/inner": "inner", "good-abs/good-up": "plain",
		} {
			if got, err := readAs(box, name); err != nil || got != want {
				t.Errorf("reading %q: %q, %v; want %q", name, got, err, want)
			}
		}
		for _, name := range []string{"plain", "new", "a/b/c/new", "good-link", "good-dangling", "a..b", "..a", "ünïcödé\u202e\n", "sub/inner"} {
			check(t, writeAs(box, name, "written "+name))
			if got, err := readAs(box, name); err != nil || got != "written "+name {
				t.Errorf("after writing %q: %q, %v", name, got, err)
			}
		}
		if info, err := os.Lstat(in("good-link")); err != nil || info.Mode()&os.ModeSymlink == 0 {
			t.Error("writing through a link replaced the link")
		}
	})
}

func TestSandboxUnicodeFormsAreTwoFiles(t *testing.T) {
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, _ string) {
		check(t, writeAs(box, "\u00e9", "composed"))
		check(t, writeAs(box, "e\u0301", "decomposed"))
		if got, _ := readAs(box, "\u00e9"); got != "composed" {
			t.Errorf("got %q", got)
		}
	})
}

func TestSandboxDevicesAndMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("devices and mounts need root")
	}
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, outside string) {
		node := filepath.Join(dir, "zero")
		if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))); err != nil {
			t.Skipf("no device nodes here: %v", err)
		}
		_, err := readAs(box, "zero")
		wantKind(t, err, nucleus.KindDenied, "is a device")
		wantKind(t, writeAs(box, "zero", "x"), nucleus.KindDenied, "is a device")

		mount := filepath.Join(dir, "mnt")
		check(t, os.Mkdir(mount, 0o755))
		put(t, filepath.Join(mount, "before"), "same device") // the twin
		if got, err := readAs(box, "mnt/before"); err != nil || got != "same device" {
			t.Fatalf("before the mount: %q, %v", got, err)
		}
		if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=64k"); err != nil {
			t.Skipf("no mounts here: %v", err)
		}
		defer unix.Unmount(mount, unix.MNT_DETACH)
		put(t, filepath.Join(mount, "x"), "foreign")
		_, err = readAs(box, "mnt/x")
		wantKind(t, err, nucleus.KindDenied, "another file system")
		wantKind(t, writeAs(box, "mnt/new", "x"), nucleus.KindDenied, "another file system")
		if _, err := box.OpenDir("mnt"); err == nil {
			t.Error("a directory of another file system was opened")
		}
	})
}

func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no mounts here: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	box, err := OpenSandbox(dir, nil)
	check(t, err)
	defer box.Close()
	check(t, writeAs(box, "a", "old"))
	wantKind(t, writeAs(box, "a", strings.Repeat("x", 1<<20)), nucleus.KindFailed, "no space left")
	if got, err := readAs(box, "a"); err != nil || got != "old" {
		t.Errorf("after the failed write: %q, %v; want the old content", got, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("%d entries are left, want 1", len(entries))
	}
	check(t, writeAs(box, "b", "small"))
}

// A directory and a file are swapped for links to the outside while they are
// read and written.
func TestSandboxRacedSwap(t *testing.T) {
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, outside string) {
		check(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		put(t, filepath.Join(dir, "d/secret"), "good")
		check(t, os.Symlink(outside, filepath.Join(dir, "evil")))
		stop := make(chan struct{})
		swapped := make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					swapped <- n
					return
				default:
				}
				if unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "d"), unix.AT_FDCWD, filepath.Join(dir, "evil"), unix.RENAME_EXCHANGE) == nil {
					n++
				}
			}
		}()
		good, refused := 0, 0
		for range 3000 {
			got, err := readAs(box, "d/secret")
			switch {
			case err != nil:
				refused++
			case got == "SECRET":
				t.Fatal("the outside was read")
			default:
				good++
			}
			writeAs(box, "d/secret", "good")
			writeAs(box, "d/dropped", "x")
		}
		close(stop)
		if n := <-swapped; n == 0 || good == 0 || refused == 0 {
			t.Errorf("%d swaps, %d reads, %d refusals: the race did not take place", n, good, refused)
		}
		if data, _ := os.ReadFile(filepath.Join(outside, "secret")); string(data) != "SECRET" {
			t.Errorf("outside file is now %q", data)
		}
		if entries, _ := os.ReadDir(outside); len(entries) != 1 {
			t.Errorf("outside holds %d entries, want 1", len(entries))
		}
	})
}

// What has been looked at is replaced before it is opened: each time the open
// itself must refuse.
func TestSandboxSwapBetweenLookAndOpen(t *testing.T) {
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, outside string) {
		victim := filepath.Join(dir, "victim")
		for name, swap := range map[string]func(){
			"link": func() { os.Symlink(filepath.Join(outside, "secret"), victim) },
			"fifo": func() { unix.Mkfifo(victim, 0o644) },
			"hard": func() { os.Link(filepath.Join(outside, "secret"), victim) },
			"dir":  func() { os.Mkdir(victim, 0o755) },
		} {
			os.RemoveAll(victim)
			put(t, victim, "good")
			if got, err := readAs(box, "victim"); err != nil || got != "good" {
				t.Fatalf("%s: before: %q, %v", name, got, err)
			}
			box.testOnlyBetween = func(string) { os.Remove(victim); swap() }
			if got, err := readAs(box, "victim"); err == nil {
				t.Errorf("%s: read %q", name, got)
			}
			box.testOnlyBetween = nil
		}
	})
}

func TestReplaceKeepsModeAndIsAtomic(t *testing.T) {
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, _ string) {
		script := filepath.Join(dir, "run.sh")
		put(t, script, "old")
		check(t, os.Chmod(script, 0o755))
		held, err := os.Open(script)
		check(t, err)
		defer held.Close()
		check(t, writeAs(box, "run.sh", "new"))
		info, err := os.Stat(script)
		check(t, err)
		if info.Mode().Perm() != 0o755 {
			t.Errorf("mode is %o, want 755", info.Mode().Perm())
		}
		old := make([]byte, 8)
		if n, _ := held.Read(old); string(old[:n]) != "old" {
			t.Errorf("who held the old file reads %q, want %q", old[:n], "old")
		}
		check(t, writeAs(box, "fresh", "x"))
		if info, _ := os.Stat(filepath.Join(dir, "fresh")); info.Mode().Perm() != 0o644 {
			t.Errorf("mode of a new file is %o, want 644", info.Mode().Perm())
		}
		check(t, os.Chmod(script, 0o444))
		wantKind(t, writeAs(box, "run.sh", "newer"), nucleus.KindFailed, "read-only")
		wantKind(t, writeAs(box, "sub", "x"), nucleus.KindInvalid, "is a directory")
		wantKind(t, writeAs(box, "plain/x", "x"), nucleus.KindNotFound, "a file stands")
		wantKind(t, writeAs(box, ".", "x"), nucleus.KindInvalid, "directory")
		if left, _ := filepath.Glob(filepath.Join(dir, ".*.cal-tmp")); len(left) > 0 {
			t.Errorf("temporary files are left: %v", left)
		}
	})
}

func TestWalkStaysInside(t *testing.T) {
	forBothWalls(t, func(t *testing.T, box *Sandbox, dir, outside string) {
		check(t, os.Symlink(outside, filepath.Join(dir, "sub/evil")))
		check(t, os.Symlink("..", filepath.Join(dir, "sub/up")))
		check(t, os.Mkdir(filepath.Join(dir, ".git"), 0o755))
		put(t, filepath.Join(dir, ".git/config"), "x")
		put(t, filepath.Join(dir, "sub/a.pem"), "x")
		put(t, filepath.Join(dir, "sub/bad\xff"), "x")
		var leftOut tally
		var seen []string
		check(t, box.walk(t.Context(), ".", &leftOut, func(rel string) error {
			seen = append(seen, rel)
			return nil
		}))
		if got := fmt.Sprint(seen); got != "[plain sub/inner]" {
			t.Errorf("walked %v", got)
		}
		if got := leftOut.String(); got != "left out: 1 blocked path, 1 name that is not UTF-8" {
			t.Errorf("notice %q", got)
		}
	})
}

// A policy that allows files but no commands is not evaded through git.
func TestGitFilesAreNotWritten(t *testing.T) {
	b := newBench(t, nil)
	newRepository(t, b.path("app"))
	check(t, os.Symlink("app/.git", b.path("alias")))
	for _, name := range []string{"app/.git/hooks/pre-commit", "app/.git/config", ".git/config", "sub/.git", "alias/config"} {
		wantKind(t, b.do(nucleus.WriteFiles, WriteArgs{Path: name, Content: "x", Mode: "0755"}, nil), nucleus.KindDenied, "belongs to git")
	}
	wantKind(t, b.do(nucleus.EditFiles, EditArgs{Path: "app/.git/config", Old: "bare", New: "x"}, nil), nucleus.KindDenied, "belongs to git")
	b.must(nucleus.ReadFiles, ReadArgs{Path: "app/.git/HEAD"}, nil)
	b.must(nucleus.WriteFiles, WriteArgs{Path: "app/.gitignore", Content: "x"}, nil)
	b.must(nucleus.WriteFiles, WriteArgs{Path: "app/.github/w.yaml", Content: "x"}, nil)
}

func TestOpenSandboxRefuses(t *testing.T) {
	for _, dir := range []string{"relative", "", "/not/there"} {
		if _, err := OpenSandbox(dir, nil); err == nil {
			t.Errorf("OpenSandbox(%q) succeeded", dir)
		}
	}
	real := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	check(t, os.Symlink(real, link))
	box, err := OpenSandbox(link, nil)
	check(t, err)
	defer box.Close()
	check(t, writeAs(box, link+"/x", "by the given name"))
	if got, err := readAs(box, filepath.Join(real, "x")); err != nil || got != "by the given name" {
		t.Errorf("%q, %v", got, err)
	}
}
