package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	images "cal/image"
	"cal/image/debian"
	"cal/image/linux"
)

// image is what qemu starts.
type image struct{ kernel, initrd, disk string }

// diskSize is what the emulated host has for machines, in a file with holes. Their disks must
// not lie in memory: what a machine writes would be taken from what it may have.
const diskSize = 32 << 30

// plan is what the emulated host does.
type plan struct {
	Modules []string // paths, in order
	Binary  string
	Tests   []string
	Env     []string
}

// hostPrograms are of this host: what the driver needs on its own, and what the tests
// run in a machine of the image "host".
var hostPrograms = []string{
	"/usr/sbin/mkfs.ext4", "/usr/sbin/debugfs", "/usr/sbin/e2fsck", "/bin/sh", "/usr/bin/cat", "/usr/bin/head", "/usr/bin/ls", "/usr/bin/true", "/usr/bin/sleep",
	"/usr/bin/dd", "/usr/bin/sync", "/usr/bin/stat", "/usr/bin/id", "/usr/bin/env", "/usr/bin/uname",
}

// hostModules give the emulated host its KVM and its disk.
var hostModules = []string{"kvm_amd", "virtio_pci", "virtio_blk", "ext4"}

const work = "work" // where the tests' files lie in the emulated host

func (b build) make(ctx context.Context, wanted *regexp.Regexp) (image, error) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return image{}, errors.New("no qemu-system-x86_64; hint: apt install qemu-system-x86")
	}
	p := plan{Binary: "/" + work + "/driver.test"}
	if err := os.MkdirAll(b.path("bin"), 0o755); err != nil {
		return image{}, err
	}
	for _, target := range [][]string{
		{"test", "-c", "-o", b.path("driver.test"), "cal/machine/firecracker"},
		{"build", "-o", b.path("testguest"), "cal/machine/machinetest/testguest"},
		{"build", "-o", b.path("init"), "cal/internal/nested"},
		{"build", "-o", b.path("bin") + "/", "cal/cmd/cal", "cal/cmd/nucleus-node", "cal/cmd/nucleus-authority", "cal/cmd/nucleus-tool-proxy"},
	} {
		cmd := exec.CommandContext(ctx, "go", target...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if output, err := cmd.CombinedOutput(); err != nil {
			return image{}, fmt.Errorf("go %s: %w\n%s", strings.Join(target, " "), err, output)
		}
	}
	var err error
	if p.Tests, err = tests(ctx, b.path("driver.test"), wanted); err != nil {
		return image{}, err
	}
	kernel, err := b.kernel(ctx)
	if err != nil {
		return image{}, err
	}
	modules, err := linux.Modules(ctx, b.modules(), hostModules)
	if err != nil {
		return image{}, err
	}
	for _, m := range modules { // they may lie compressed
		plain := b.path(filepath.Join("plain", m.Path))
		if err := os.MkdirAll(filepath.Dir(plain), 0o755); err != nil {
			return image{}, err
		}
		if err := os.WriteFile(plain, m.Data, 0o644); err != nil {
			return image{}, err
		}
		p.Modules = append(p.Modules, m.Path)
	}
	p.Env = []string{"FIRECRACKER=/" + work + "/firecracker", "JAILER=/" + work + "/jailer", "CAL_TESTGUEST=/" + work + "/testguest", "CAL_TEST_PROGRAMS=/" + work + "/bin", "HOME=/root",
		"CAL_TEST_IMAGES=" + machinesAt + "/images", "CAL_TEST_PATIENCE=240s", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if b.programs["unfiltered"] != "" {
		p.Env = append(p.Env, "FIRECRACKER_UNFILTERED=/"+work+"/unfiltered")
	}
	made := image{kernel, b.path("initrd"), b.path("disk")}
	if err := b.blankDisk(ctx, made.disk); err != nil {
		return image{}, err
	}
	return made, b.archive(made.initrd, p)
}

func (b build) modules() string {
	found, _ := filepath.Glob(b.path("kernel/lib/modules/*"))
	return strings.Join(found, "")
}

// kernel fetches Debian's cloud kernel, with all its modules, and puts it into the store
// of images that the tests in the emulated host use, which has no way to fetch it.
func (b build) kernel(ctx context.Context) (string, error) {
	store, err := images.Open(b.path("images"))
	if err != nil {
		return "", err
	}
	kernel, err := store.Kernel(ctx, "", func(line string) { fmt.Println("nested:", line) })
	if err != nil {
		return "", err
	}
	if b.modules() == "" {
		apt := b.path("apt")
		if err := os.MkdirAll(apt, 0o755); err != nil {
			return "", err
		}
		a, err := debian.Open(ctx, apt, "")
		if err != nil {
			return "", err
		}
		files, err := a.Download(ctx, kernel.Package)
		if err != nil {
			return "", err
		}
		if err := debian.Unpack(ctx, files[0], b.path("kernel")); err != nil {
			return "", err
		}
	}
	return kernel.Image, nil
}

// blankDisk makes the emulated host's disk anew.
func (b build) blankDisk(ctx context.Context, path string) error {
	store, err := images.Open(b.path("images"))
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return store.Blank(ctx, path, diskSize)
}

// archive writes the emulated host's files.
func (b build) archive(name string, p plan) error {
	files := map[string]string{"init": b.path("init")}
	for _, program := range []string{"driver.test", "testguest", "bin/cal", "bin/nucleus-node", "bin/nucleus-authority", "bin/nucleus-tool-proxy"} {
		files[work+"/"+program] = b.path(program)
	}
	for name, path := range b.programs {
		files[work+"/"+name] = path
	}
	for _, module := range p.Modules {
		files["modules/"+module] = b.path(filepath.Join("plain", module))
	}
	for _, program := range hostPrograms {
		if err := closure(files, program); err != nil {
			return err
		}
	}
	store := b.path("images")
	if err := filepath.WalkDir(store, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			files[work+"/images"+strings.TrimPrefix(path, store)] = path
		}
		return err
	}); err != nil {
		return err
	}
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(write(out, files, text), out.Close())
}

// closure adds a program and the libraries that it needs.
func closure(files map[string]string, path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	inside := strings.TrimPrefix(path, "/")
	if !strings.HasPrefix(inside, "usr/") { // /bin is a link to /usr/bin
		inside = "usr/" + inside
	}
	if files[inside] != "" {
		return nil
	}
	files[inside] = real
	f, err := elf.Open(real)
	if err != nil {
		return err
	}
	defer f.Close()
	needs, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	if section := f.Section(".interp"); section != nil {
		data, err := section.Data()
		if err != nil {
			return err
		}
		needs = append(needs, strings.TrimRight(string(data), "\x00"))
	}
	for _, need := range needs {
		at := slices.IndexFunc([]string{"", "/usr/lib/x86_64-linux-gnu/", "/usr/lib64/", "/usr/lib/"}, func(dir string) bool {
			_, err := os.Stat(dir + need)
			return err == nil
		})
		if at < 0 {
			return fmt.Errorf("%s needs %s, which is not found", path, need)
		}
		if err := closure(files, []string{"", "/usr/lib/x86_64-linux-gnu/", "/usr/lib64/", "/usr/lib/"}[at]+need); err != nil {
			return err
		}
	}
	return nil
}

// write writes the files and the directories that they are in.
func write(out io.Writer, files map[string]string, plan []byte) error {
	archive := linux.NewArchive(out)
	dirs := map[string]bool{".": true}
	var mkdir func(string)
	mkdir = func(dir string) {
		if !dirs[dir] {
			dirs[dir] = true
			mkdir(filepath.Dir(dir))
			archive.Dir(dir)
		}
	}
	for _, dir := range []string{"dev", "proc", "sys", "tmp", "run", "var/tmp", "var/lib", "etc/ssl/certs", "root", "home", "new", work} {
		mkdir(dir)
	}
	archive.Device("dev/console", 0o600, 5, 1)
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		mkdir(filepath.Dir(name))
		if err := addFile(archive, name, files[name]); err != nil {
			return err
		}
	}
	archive.File("plan.json", 0o644, int64(len(plan)), bytes.NewReader(plan))
	return archive.Close()
}

func addFile(archive *linux.Archive, name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	archive.File(name, info.Mode().Perm(), info.Size(), f)
	return nil
}
