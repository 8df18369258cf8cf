package debian

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/image/unpack"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func needApt(t *testing.T) {
	t.Helper()
	for _, program := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(program + " is not installed")
		}
	}
}

// aptDir is a directory that apt's own user can reach.
func aptDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/var/tmp", "cal-test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}

// archive is a flat repository of packages in a directory.
type archive struct {
	t     *testing.T
	dir   string
	index strings.Builder
}

// add builds a package of files; DEBIAN/... are its control files.
func (a *archive) add(name, depends string, files map[string]string) {
	a.t.Helper()
	tree := a.t.TempDir()
	must(a.t, os.Chmod(tree, 0o755))
	control := fmt.Sprintf("Package: %s\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: nobody <n@example.com>\nDescription: test\n", name)
	if depends != "" {
		control += "Depends: " + depends + "\n"
	}
	files["DEBIAN/control"] = control
	for file, content := range files {
		place := filepath.Join(tree, file)
		must(a.t, os.MkdirAll(filepath.Dir(place), 0o755))
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			must(a.t, os.Symlink(target, place))
			continue
		}
		must(a.t, os.WriteFile(place, []byte(content), 0o755))
		if strings.HasSuffix(file, "setuid") {
			must(a.t, os.Chmod(place, 0o755|fs.ModeSetuid))
		}
	}
	deb := filepath.Join(a.dir, name+".deb")
	if said, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", tree, deb).CombinedOutput(); err != nil {
		a.t.Fatalf("%v: %s", err, said)
	}
	data, err := os.ReadFile(deb)
	must(a.t, err)
	fmt.Fprintf(&a.index, "%sFilename: ./%s.deb\nSize: %d\nSHA256: %x\n\n", control, name, len(data), sha256.Sum256(data))
	must(a.t, os.WriteFile(filepath.Join(a.dir, "Packages"), []byte(a.index.String()), 0o644))
}

func testArchive(t *testing.T) *archive {
	needApt(t)
	a := &archive{t: t, dir: aptDir(t)}
	a.add("base", "", map[string]string{
		"bin/sh": "a shell", "usr/bin/plain": "p", "usr/bin/setuid": "s", "etc/base.conf": "c", "usr/share/base-passwd/passwd.master": "root:*:0:0::/root:/bin/sh\n",
		"usr/share/ca-certificates/mozilla/b.crt": "B\n", "usr/share/ca-certificates/mozilla/a.crt": "A", "usr/lib/ssl/openssl.cnf": "x",
	})
	a.add("awk-one", "base", map[string]string{"usr/bin/one": "1", "DEBIAN/postinst": "#!/bin/sh\ntouch /var/tmp/cal-test-script-ran\nupdate-alternatives --install /usr/bin/awk awk /usr/bin/one 5 \\\n  --slave /usr/share/man/awk.1 awk.1 /usr/share/man/one.1\n"})
	a.add("awk-two", "base", map[string]string{"usr/bin/two": "2", "usr/share/man/two.1": "m", "lib/x/merged": "m", "DEBIAN/postinst": "#!/bin/sh\nfor i in 1; do update-alternatives --install /usr/bin/$i $i /usr/bin/two 9; done\nupdate-alternatives --install /usr/bin/awk awk /usr/bin/two 10 --slave /usr/share/man/awk.1 awk.1 /usr/share/man/two.1\nupdate-alternatives --install /usr/bin/gone gone /usr/bin/nowhere 1\nupdate-alternatives --install /usr/bin/../../escape e /usr/bin/two 1\n"})
	return a
}

func TestFetchAndRoot(t *testing.T) {
	a, ctx := testArchive(t), context.Background()
	apt, err := open(ctx, aptDir(t), "deb [trusted=yes] copy:"+a.dir+" ./\n")
	must(t, err)
	debs, err := apt.Fetch(ctx, []string{"awk-one", "awk-two=1:2.0-1"})
	must(t, err)
	dir := t.TempDir()
	before := unix.Umask(0o077) // of a careful person, whose machines read the root all the same
	packages, err := Root(ctx, debs, dir, unpack.Limits{Bytes: 1 << 20, Entries: 1000})
	unix.Umask(before)
	must(t, err)
	must(t, filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if info, err := entry.Info(); err == nil && name != dir && info.Mode().Perm()&0o004 == 0 {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
		return nil
	}))
	var names []string
	for _, p := range packages {
		names = append(names, p.Name+"="+p.Version)
		if len(p.Digest) != len("sha256:")+64 {
			t.Errorf("%+v", p)
		}
	}
	if want := []string{"awk-one=1:2.0-1", "awk-two=1:2.0-1", "base=1:2.0-1"}; !slices.Equal(names, want) {
		t.Errorf("packages %v, want %v", names, want)
	}
	for name, want := range map[string]string{
		"usr/bin/sh": "a shell", "bin/sh": "a shell", "usr/lib/x/merged": "m", "etc/passwd": "root:*:0:0::/root:/bin/sh\n",
		"etc/ssl/certs/ca-certificates.crt": "A\nB\n",
	} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for name, want := range map[string]string{"usr/bin/awk": "/usr/bin/two", "usr/share/man/awk.1": "/usr/share/man/two.1", "bin": "usr/bin", "usr/lib/ssl/cert.pem": "/etc/ssl/certs/ca-certificates.crt"} {
		if got, err := os.Readlink(filepath.Join(dir, name)); err != nil || got != want {
			t.Errorf("%s -> %q, %v; want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"usr/bin/gone", "escape", "usr/bin/1", "DEBIAN"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "usr/bin/setuid")); err != nil || info.Mode() != 0o755 {
		t.Errorf("setuid: %v, %v", info.Mode(), err)
	}
	if _, err := os.Stat("/var/tmp/cal-test-script-ran"); err == nil {
		t.Error("a package's script was run")
	}
}

// What a stranger on the way has put into the archive is not taken.
func TestFetchRefuses(t *testing.T) {
	a, ctx := testArchive(t), context.Background()
	if _, err := open(ctx, aptDir(t), "deb copy:"+a.dir+" ./\n"); err == nil {
		t.Error("an archive that nobody signed was taken")
	}
	apt, err := open(ctx, aptDir(t), "deb [trusted=yes] copy:"+a.dir+" ./\n")
	must(t, err)
	for name, packages := range map[string][]string{"unknown": {"none-such"}, "another version": {"base=3"}, "an option": {"--allow-unauthenticated"}} {
		debs, err := apt.Fetch(ctx, packages)
		if err == nil || name != "an option" && !strings.Contains(err.Error(), "hint: ") {
			t.Errorf("%s: %v, %v", name, debs, err)
		}
	}
	deb := filepath.Join(a.dir, "base.deb")
	data, err := os.ReadFile(deb)
	must(t, err)
	data[len(data)-1] ^= 1
	must(t, os.WriteFile(deb, data, 0o644))
	if debs, err := apt.Fetch(ctx, []string{"base"}); err == nil {
		t.Errorf("a changed package was taken: %v", debs)
	}
	if debs, err := apt.Download(ctx, "base"); err == nil {
		t.Errorf("a changed package was taken: %v", debs)
	}
	if files, err := apt.Download(ctx, "awk-one"); err != nil || len(files) != 1 {
		t.Errorf("control: %v, %v", files, err)
	} else if depends, err := Field(ctx, files[0], "Depends"); err != nil || depends != "base" {
		t.Errorf("field %q, %v", depends, err)
	}
	if _, err := open(ctx, aptDir(t), "deb [trusted=yes] http://127.0.0.1:1/debian bookworm main\n"); err == nil || !strings.Contains(err.Error(), "hint:") {
		t.Errorf("an archive that cannot be reached: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := apt.Fetch(ended, []string{"awk-two"}); err == nil {
		t.Error("an ended context was ignored")
	}
}

func TestRootRefuses(t *testing.T) {
	a, ctx := testArchive(t), context.Background()
	limits := unpack.Limits{Bytes: 1 << 20, Entries: 1000}
	must(t, os.WriteFile(a.dir+"/text_1_all.deb", []byte("no package"), 0o644))
	must(t, os.Rename(a.dir+"/base.deb", a.dir+"/base_1_all.deb"))
	for name, c := range map[string]struct {
		deb    string
		limits unpack.Limits
	}{
		"no package": {"text_1_all.deb", limits}, "no name": {"awk-one.deb", limits}, "missing": {"none_1_all.deb", limits}, "too much": {"base_1_all.deb", unpack.Limits{Bytes: 10, Entries: 1000}},
	} {
		if packages, err := Root(ctx, []string{filepath.Join(a.dir, c.deb)}, t.TempDir(), c.limits); err == nil {
			t.Errorf("%s: %v", name, packages)
		}
	}
	if _, err := Root(ctx, []string{filepath.Join(a.dir, "base_1_all.deb")}, t.TempDir(), limits); err != nil {
		t.Errorf("control: %v", err)
	}
}

// Of the host's configuration neither hooks nor state are apt's own.
func TestConfig(t *testing.T) {
	needApt(t)
	a := &Apt{t.TempDir()}
	must(t, os.WriteFile(a.configFile(), []byte(a.config(true)), 0o600))
	cmd := exec.Command("apt-config", "--config-file", a.configFile(), "dump")
	out, err := cmd.CombinedOutput()
	must(t, err)
	for line := range strings.Lines(string(out)) {
		for _, never := range []string{"Post-Invoke", "Pre-Invoke", "DPkg::", "/var/lib/apt", "/var/lib/dpkg", "/var/cache/apt"} {
			if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); strings.Contains(line, never) && value != `"";` && !strings.HasPrefix(name, "Binary::") {
				t.Errorf("%s %s", name, value)
			}
		}
	}
	if !strings.Contains(string(out), `Dir::State::status "`+a.dir) {
		t.Errorf("control: %s", out)
	}
}

// What does not fit ends the work: whoever unpacks the package does not wait for a reader.
func TestRootTooLargeEnds(t *testing.T) {
	a := &archive{t: t, dir: aptDir(t)}
	needApt(t)
	content := make([]byte, 4<<20)
	rand.Read(content)
	a.add("big", "", map[string]string{"usr/a": string(content), "usr/b": string(content)})
	deb := filepath.Join(a.dir, "big_1_all.deb")
	must(t, os.Rename(filepath.Join(a.dir, "big.deb"), deb))
	if _, err := Root(t.Context(), []string{deb}, t.TempDir(), unpack.Limits{Bytes: 64 << 20, Entries: 1000}); errors.Is(err, unpack.ErrTooLarge) {
		t.Fatalf("control: with room: %v", err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := Root(t.Context(), []string{deb}, t.TempDir(), unpack.Limits{Bytes: 1 << 20, Entries: 1000})
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, unpack.ErrTooLarge) {
			t.Errorf("%v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it hangs")
	}
}
