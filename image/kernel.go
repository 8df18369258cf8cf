package image

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cal/image/debian"
	"cal/image/linux"
	"cal/internal/durable"
	"cal/internal/fileid"
)

// Kernel is a kernel as the VMMs want it.
type Kernel struct {
	Image   string // the bzImage; of a kernel that was given as an ELF, that
	ELF     string // uncompressed
	Modules string // directory of the modules that a machine loads
	Version string // as uname -r says it
	Digest  string // "sha256:..." of Image
	Package string // Debian's package and version; "" for a kernel that was given by path
	Tried   bool   // CAL was tried with exactly this kernel

	object string   // digest of the store's object
	load   []string // files in Modules, in the order in which they have to be loaded
}

// The kernel that CAL was tried with.
const (
	triedPackage = "linux-image-6.1.0-56-cloud-amd64"
	triedVersion = "6.1.192-2"
	triedDigest  = "sha256:51349501a3d1ff83836437d2b365fd2d57f2feb8642d315e5181dec23d4c3275"

	newestPackage = "linux-image-cloud-amd64" // needs the newest of its kind
)

// kindKernel is the kind of an object that holds a kernel; factPackage is of one out of a
// package.
const (
	kindKernel  = "kernel"
	factPackage = "package"
)

// The files of a kernel's object.
const (
	kernelFile  = "vmlinuz"
	elfFile     = "vmlinux"
	modulesDir  = "modules"
	modulesFile = "modules/order"
)

// defaultKernel is the input of the kernel that nobody names; a release that needs other
// modules has another.
func defaultKernel() string { return "kernel-" + keyOf(linux.Wanted...) }

// largestKernel bounds a file that is read as a kernel.
const largestKernel = 512 << 20

// Kernel returns the kernel of a path, a bzImage or an uncompressed ELF whose modules lie in
// /lib/modules. "" is Debian's cloud kernel: it is fetched once, by the host's apt, the
// one that CAL was tried with where the archive still has it, and stays until it is pruned.
func (s *Store) Kernel(ctx context.Context, path string, progress Progress) (Kernel, error) {
	return s.kernel(ctx, path, s.made, progress)
}

// RenewKernel fetches Debian's kernel anew, or takes one of a path, and makes it the one that
// Kernel returns where no path is given.
func (s *Store) RenewKernel(ctx context.Context, path string, progress Progress) (Kernel, error) {
	k, err := s.kernel(ctx, path, s.madeAnew, progress)
	if err == nil && path != "" {
		err = s.full(durable.Store(filepath.Join(s.inputs(), defaultKernel()+".json"), input{k.object}))
	}
	return k, err
}

type maker func(ctx context.Context, key string, build func(dir string) (Object, error)) (Object, error)

func (s *Store) kernel(ctx context.Context, path string, made maker, progress Progress) (Kernel, error) {
	key, build := defaultKernel(), func(dir string) (Object, error) { return s.fetchKernel(ctx, dir, progress) }
	if path != "" {
		id, err := fileid.Of(path)
		if err != nil {
			return Kernel{}, fmt.Errorf("kernel: %w", err)
		}
		key = keyOf("kernel", path, fmt.Sprint(id, linux.Wanted))
		build = func(dir string) (Object, error) { return takeKernel(ctx, path, s.modules, dir, progress) }
	}
	o, err := made(ctx, key, build)
	if errors.Is(err, linux.ErrNoKernel) {
		err = fmt.Errorf("%w; the kernel is the one it was; hint: a bzImage, as /boot/vmlinuz-..., or its uncompressed ELF is wanted; cal image build kernel takes Debian's", err)
	}
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	return s.asKernel(o)
}

// HasKernel says whether Kernel would fetch nothing.
func (s *Store) HasKernel(path string) bool {
	if path != "" {
		return true
	}
	o, err := s.known(defaultKernel())
	return err == nil && o.Digest != ""
}

func (s *Store) asKernel(o Object) (Kernel, error) {
	dir := s.object(o.Digest)
	k := Kernel{
		Image: filepath.Join(dir, o.Files[0].Name), ELF: filepath.Join(dir, elfFile), Modules: filepath.Join(dir, modulesDir),
		Version: o.Facts["version"], Digest: o.Files[0].Digest, Package: o.Facts[factPackage], Tried: o.Files[0].Digest == triedDigest, object: o.Digest,
	}
	order, err := os.ReadFile(filepath.Join(dir, modulesFile))
	k.load = strings.Fields(string(order))
	return k, err
}

// fetchKernel takes a kernel out of Debian's package.
func (s *Store) fetchKernel(ctx context.Context, dir string, progress Progress) (Object, error) {
	work, remove, err := s.workspace()
	if err != nil {
		return Object{}, err
	}
	defer remove()
	progress.say("fetching Debian's cloud kernel")
	apt, err := debian.Open(ctx, work, "")
	if errors.Is(err, debian.ErrNoApt) {
		return Object{}, fmt.Errorf("%w; hint: name a kernel of your own: cal image build kernel:PATH", err)
	}
	if err != nil {
		return Object{}, err
	}
	deb, name, err := kernelPackage(ctx, apt, progress)
	if err != nil {
		return Object{}, err
	}
	root := filepath.Join(work, "kernel")
	if err := debian.Unpack(ctx, deb, root); err != nil {
		return Object{}, err
	}
	found, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(found) != 1 {
		return Object{}, fmt.Errorf("%s holds %d kernels (%v)", name, len(found), err)
	}
	modules := filepath.Join(root, "lib/modules")
	if _, err := os.Stat(modules); err != nil {
		modules = filepath.Join(root, "usr/lib/modules")
	}
	o, err := takeKernel(ctx, found[0], modules, dir, progress)
	if err != nil {
		return Object{}, err
	}
	o.What, o.Facts[factPackage] = name, name
	digest, err := digestFile(filepath.Join(dir, o.Files[0].Name))
	if err == nil && name == triedPackage+"="+triedVersion && digest != triedDigest {
		err = fmt.Errorf("%s holds a kernel with %s, want %s", name, digest, triedDigest)
	}
	return o, err
}

// kernelPackage fetches the package that CAL was tried with, or the newest.
func kernelPackage(ctx context.Context, apt *debian.Apt, progress Progress) (deb, name string, err error) {
	name = triedPackage + "=" + triedVersion
	files, err := apt.Download(ctx, name)
	if err == nil {
		return files[0], name, nil
	}
	if ctx.Err() != nil {
		return "", "", err
	}
	if files, err = apt.Download(ctx, newestPackage); err != nil {
		return "", "", err
	}
	needs, err := debian.Field(ctx, files[0], "Depends")
	if err != nil {
		return "", "", err
	}
	real, _, _ := strings.Cut(needs, " ")
	if files, err = apt.Download(ctx, real); err != nil {
		return "", "", err
	}
	version, err := debian.Field(ctx, files[0], "Version")
	if err != nil {
		return "", "", err
	}
	progress.say("%s %s is no longer in the archive; %s %s, with which CAL was not tried, is taken", triedPackage, triedVersion, real, version)
	return files[0], real + "=" + version, nil
}

// workspace is a directory for apt. As root apt fetches as a user of its own, who
// cannot reach what lies in a home.
func (s *Store) workspace() (dir string, remove func(), err error) {
	parent := s.unfinished()
	if os.Geteuid() == 0 {
		parent = sharedTemp
	}
	if dir, err = os.MkdirTemp(parent, s.aptDirs()); err != nil {
		return "", nil, err
	}
	return dir, func() { removeTree(dir) }, os.Chmod(dir, 0o711) //nolint:errcheck // it lies where what nobody needs is removed
}

// sharedTemp is where root's builds have packages fetched, by a user who cannot reach the store.
const sharedTemp = "/var/tmp"

// aptDirs is how the directories begin in which this store has packages fetched.
func (s *Store) aptDirs() string { return "cal-apt-" + keyOf(s.dir)[:12] + "-" }

// cleanApt removes the directories that builds of root's have left in dir, which anybody may
// write to: what is another user's is none. The caller is alone.
func (s *Store) cleanApt(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, s.aptDirs()+"*"))
	if err != nil {
		return err
	}
	for _, name := range left {
		var stat unix.Stat_t
		if err := unix.Lstat(name, &stat); err != nil || stat.Mode&unix.S_IFMT != unix.S_IFDIR || int(stat.Uid) != os.Geteuid() {
			continue
		}
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// takeKernel copies a kernel and the modules that a machine needs into dir.
func takeKernel(ctx context.Context, path, modules, dir string, progress Progress) (Object, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Object{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > largestKernel {
		return Object{}, fmt.Errorf("%s: %w: a file of at most %d MiB is wanted", path, linux.ErrNoKernel, largestKernel>>20)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Object{}, err
	}
	k, err := linux.Parse(data)
	if err != nil {
		return Object{}, fmt.Errorf("%s: %w", path, err)
	}
	o := Object{Kind: kindKernel, What: path, Facts: map[string]string{"version": k.Version}}
	put := func(name string, data []byte) error {
		o.Files = append(o.Files, File{Name: name})
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		return os.WriteFile(file, data, 0o600)
	}
	if k.BzImage != nil {
		if err := put(kernelFile, k.BzImage); err != nil {
			return Object{}, err
		}
	}
	if err := put(elfFile, k.ELF); err != nil {
		return Object{}, err
	}
	home := filepath.Join(modules, k.Version)
	var found []linux.Module
	if _, err := os.Stat(filepath.Join(home, "kernel")); k.Version == "" || err != nil {
		progress.say("%s: no modules in %s; a machine starts only if the kernel has all that it needs built in", path, home)
	} else if found, err = linux.Modules(ctx, home, linux.Wanted); err != nil {
		return Object{}, err
	}
	var order strings.Builder
	for _, m := range found {
		fmt.Fprintln(&order, m.Path)
		if err := put(filepath.Join(modulesDir, m.Path), m.Data); err != nil {
			return Object{}, err
		}
	}
	return o, put(modulesFile, []byte(order.String()))
}

// Initramfs returns the archive that a machine starts from: proxy, a static program, as
// /init; the kernel's modules below /lib/modules/VERSION; and /modules, their paths, one a
// line, in the order in which they have to be loaded. It is not compressed: unpacking
// takes longer than reading.
func (s *Store) Initramfs(ctx context.Context, kernel Kernel, proxy string) (Disk, error) {
	id, err := fileid.Of(proxy)
	if err != nil {
		return Disk{}, fmt.Errorf("initramfs: %w", err)
	}
	o, err := s.made(ctx, keyOf("initramfs 1", kernel.object, proxy, fmt.Sprint(id)), func(dir string) (Object, error) {
		o := Object{
			Kind: "initramfs", What: fmt.Sprintf("%s with kernel %s", filepath.Base(proxy), cmp.Or(kernel.Version, kernel.Digest)),
			Files: []File{{Name: initramfsFile}},
		}
		f, err := os.OpenFile(filepath.Join(dir, initramfsFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return o, err
		}
		return o, errors.Join(kernel.archive(f, proxy), f.Close())
	})
	if err != nil {
		return Disk{}, fmt.Errorf("initramfs: %w", err)
	}
	return s.asDisk(o), nil
}

const initramfsFile = "initramfs.cpio"

func (k Kernel) archive(out *os.File, proxy string) error {
	a := linux.NewArchive(out)
	for _, dir := range []string{"dev", "proc", "sys", "lib", "lib/modules"} {
		a.Dir(dir)
	}
	a.Device("dev/console", 0o600, 5, 1)
	home := "lib/modules/" + cmp.Or(k.Version, "kernel")
	made := map[string]bool{"lib/modules": true}
	var order bytes.Buffer
	for _, name := range k.load {
		place := home + "/" + filepath.ToSlash(name)
		addParents(a, made, place)
		if err := addFile(a, place, 0o644, filepath.Join(k.Modules, name)); err != nil {
			return err
		}
		fmt.Fprintf(&order, "/%s\n", place)
	}
	a.File("modules", 0o644, int64(order.Len()), &order)
	if err := addFile(a, "init", 0o755, proxy); err != nil {
		return err
	}
	return a.Close()
}

func addParents(a *linux.Archive, made map[string]bool, place string) {
	dir := filepath.Dir(place)
	if made[dir] {
		return
	}
	made[dir] = true
	addParents(a, made, dir)
	a.Dir(dir)
}

func addFile(a *linux.Archive, name string, perm os.FileMode, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", source)
	}
	a.File(name, perm, info.Size(), f)
	return nil
}
