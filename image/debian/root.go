package debian

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cal/image/unpack"
)

// Usual are the packages of every root: what a shell, git and an agent's commands take
// for granted. What they need comes along.
var Usual = []string{
	"base-files", "base-passwd", "bash", "bzip2", "ca-certificates", "coreutils", "curl", "dash", "debianutils", "diffutils", "file", "findutils",
	"git", "grep", "gzip", "hostname", "less", "libc-bin", "mawk", "ncurses-base", "ncurses-bin", "netbase", "openssl", "patch", "perl-base", "procps",
	"sed", "tar", "tzdata", "unzip", "util-linux", "xz-utils",
}

// Package is one of a root.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Digest  string `json:"digest"` // "sha256:..." of the package's file
}

// Fetch brings the files of packages, each NAME or NAME=VERSION, and of all that they need,
// sorted by name.
func (a *Apt) Fetch(ctx context.Context, names []string) ([]string, error) {
	if _, err := a.run(ctx, a.dir, "apt-get", append([]string{"--yes", "--download-only", "install", "--"}, names...)...); err != nil {
		for _, unknown := range []string{"Unable to locate package", "was not found", "no installation candidate"} {
			if strings.Contains(err.Error(), unknown) {
				return nil, fmt.Errorf("%w; hint: names and versions are those of the image's suite (packages.debian.org); another one is debian@SUITE", err)
			}
		}
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(a.dir, "archives", "*.deb"))
	if err == nil && len(files) == 0 {
		err = errors.New("apt-get fetched no package")
	}
	return files, err
}

// Root puts packages together to a root file system in dir, an empty directory. None of
// their scripts is run; what these would make and programs need is made here: the links of
// a merged /usr, users, the bundle of certificates, alternatives.
//
// BUG: what else a package's script makes is missing: caches of fonts and icons, kernel
// modules' lists, services' users. Java's and other alternatives that a script computes are not
// in the PATH.
func Root(ctx context.Context, debs []string, dir string, limits unpack.Limits) ([]Package, error) {
	if err := mergeUsr(dir); err != nil {
		return nil, err
	}
	into, err := unpack.Open(dir, limits)
	if err != nil {
		return nil, err
	}
	var packages []Package
	choices := alternatives{}
	for _, deb := range debs {
		p, err := packageOf(deb)
		if err == nil {
			err = add(ctx, deb, into)
		}
		if err == nil {
			err = choices.read(ctx, deb)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("package %s: %w", filepath.Base(deb), err), into.Close())
		}
		packages = append(packages, p)
	}
	if err := into.Close(); err != nil {
		return nil, err
	}
	return packages, finish(dir, choices)
}

func mergeUsr(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := errors.Join(makeDirs(root, "usr/"+name), root.Symlink("usr/"+name, name)); err != nil {
			return err
		}
	}
	return nil
}

// makeDirs makes a directory and those on the way to it, for everybody to enter, whatever the umask.
func makeDirs(root *os.Root, name string) error {
	if _, err := root.Stat(name); err == nil {
		return nil
	}
	if above := path.Dir(name); above != "." {
		if err := makeDirs(root, above); err != nil {
			return err
		}
	}
	return errors.Join(root.Mkdir(name, 0o755), root.Chmod(name, 0o755))
}

// packageOf reads a file's name, NAME_VERSION_ARCH.deb.
func packageOf(deb string) (Package, error) {
	parts := strings.Split(strings.TrimSuffix(filepath.Base(deb), ".deb"), "_")
	if len(parts) != 3 {
		return Package{}, errors.New("it is not named NAME_VERSION_ARCH.deb")
	}
	f, err := os.Open(deb)
	if err != nil {
		return Package{}, err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return Package{}, err
	}
	return Package{parts[0], strings.ReplaceAll(parts[1], "%3a", ":"), "sha256:" + hex.EncodeToString(sum.Sum(nil))}, nil
}

func add(ctx context.Context, deb string, into *unpack.Into) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	said := bounded{most: mostSaid}
	cmd.Stderr, cmd.Env = &said, environment()
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = into.Add(ctx, out, unpack.Package)
	if err == nil {
		_, err = io.Copy(io.Discard, out)
	} else { // its decompressor, a process of its own, would wait for a reader
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		out.Close()
	}
	if waitErr := cmd.Wait(); waitErr != nil && err == nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", waitErr, strings.TrimSpace(said.String()))
	}
	return err
}

// alternatives are what packages offer for one name, by the link's place.
type alternatives map[string]choice

type choice struct {
	target   string
	priority int
}

// A call in a package's script, on one line once those that go on are joined. What a
// script computes is not seen.
var (
	master = regexp.MustCompile(`--install\s+(/[\w./+-]+)\s+[\w.+-]+\s+(/[\w./+-]+)\s+(\d+)`)
	slave  = regexp.MustCompile(`--slave\s+(/[\w./+-]+)\s+[\w.+-]+\s+(/[\w./+-]+)`)
)

const largestScript = 1 << 20

// read takes what a package's script would say to update-alternatives from its text.
func (a alternatives) read(ctx context.Context, deb string) error {
	control, err := output(ctx, exec.CommandContext(ctx, "dpkg-deb", "--ctrl-tarfile", deb))
	if err != nil {
		return err
	}
	r := tar.NewReader(bytes.NewReader(control))
	for {
		header, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if path.Base(header.Name) != "postinst" {
			continue
		}
		script, err := io.ReadAll(io.LimitReader(r, largestScript))
		if err != nil {
			return err
		}
		a.parse(string(script))
	}
}

func (a alternatives) parse(script string) {
	script = strings.ReplaceAll(script, "\\\n", " ")
	for line := range strings.Lines(script) {
		if !strings.Contains(line, "update-alternatives") {
			continue
		}
		call := master.FindStringSubmatch(line)
		if call == nil {
			continue
		}
		priority, err := strconv.Atoi(call[3])
		if err != nil {
			continue
		}
		a.offer(call[1], choice{call[2], priority})
		for _, more := range slave.FindAllStringSubmatch(line, -1) {
			a.offer(more[1], choice{more[2], priority})
		}
	}
}

func (a alternatives) offer(link string, c choice) {
	if path.Clean(link) != link || path.Clean(c.target) != c.target {
		return
	}
	if have, ok := a[link]; !ok || c.priority > have.priority {
		a[link] = c
	}
}

const bundle = "etc/ssl/certs/ca-certificates.crt"

// finish makes what the scripts of packages would have made.
func finish(dir string, choices alternatives) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range []string{"passwd", "group"} {
		data, err := root.ReadFile("usr/share/base-passwd/" + name + ".master")
		if err == nil {
			err = write(root, "etc/"+name, data)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := certificates(root); err != nil {
		return err
	}
	for link, c := range choices {
		if _, err := root.Stat(strings.TrimPrefix(c.target, "/")); err != nil {
			continue // of a package that is not here, or by a link that only a machine can follow
		}
		if err := linkIfMissing(root, strings.TrimPrefix(link, "/"), c.target); err != nil {
			return err
		}
	}
	return linkIfMissing(root, "usr/bin/sh", "dash")
}

// certificates joins the authorities into the file that programs read, and shows it to
// OpenSSL, which looks for a directory of hashes or for this.
func certificates(root *os.Root) error {
	var names []string
	err := fs.WalkDir(root.FS(), "usr/share/ca-certificates", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && strings.HasSuffix(name, ".crt") {
			names = append(names, name)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	slices.Sort(names)
	var all bytes.Buffer
	for _, name := range names {
		data, err := root.ReadFile(name)
		if err != nil {
			return err
		}
		all.Write(bytes.TrimRight(data, "\n"))
		all.WriteByte('\n')
	}
	if err := makeDirs(root, path.Dir(bundle)); err != nil {
		return err
	}
	if err := write(root, bundle, all.Bytes()); err != nil {
		return err
	}
	return linkIfMissing(root, "usr/lib/ssl/cert.pem", "/"+bundle)
}

// write makes a file that has no time: the same packages give the same root.
func write(root *os.Root, name string, data []byte) error {
	if err := errors.Join(root.WriteFile(name, data, 0o644), root.Chmod(name, 0o644)); err != nil {
		return err
	}
	return root.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0))
}

func linkIfMissing(root *os.Root, name, target string) error {
	if err := makeDirs(root, path.Dir(name)); err != nil {
		return err
	}
	err := root.Symlink(target, name)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}
