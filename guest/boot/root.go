package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// Places in the initial file system. The machine's root is laid over it, and nothing can
// name them any longer.
const (
	imagePlace    = "/mnt/root"
	layersPlace   = "/mnt/layers"
	skeletonPlace = "/mnt/skeleton"
	newRoot       = "/mnt/new"
)

const (
	noSetuid   = unix.MS_NOSUID
	noDevices  = unix.MS_NOSUID | unix.MS_NODEV
	noPrograms = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// layer is an entry of layers.json: where Source, a name at the layers' root, is shown.
type layer struct {
	Source string `json:"source"`
	Guest  string `json:"guest"`
}

// enterRoot makes the machine's root and enters it.
func enterRoot(disks map[string]disk) error {
	if err := mountDisk(disks[diskRoot], imagePlace, "erofs", unix.MS_RDONLY|noDevices); err != nil {
		return err
	}
	layers, err := openLayers(disks[diskLayers])
	if err != nil {
		return err
	}
	if err := layRoot(layers); err != nil {
		return err
	}
	// What is shown inside the root is taken hold of before the root is entered, and put
	// in place after: an image's links then lead to places of the image.
	program, err := cloneTree("/init")
	if err != nil {
		return err
	}
	for i := range layers {
		if layers[i].tree, err = cloneTree(filepath.Join(layersPlace, layers[i].Source)); err != nil {
			return fmt.Errorf("layer %s: %w", layers[i].Guest, err)
		}
	}
	workspace, scratch := disks[diskWorkspace], disks[diskScratch]
	if err := mountKernel(); err != nil {
		return err
	}
	if err := mountDisk(scratch, newRoot+nucleus.MachineHome, "ext4", noDevices); err != nil {
		return err
	}
	if err := makePlace(newRoot+nucleus.MachineHome, "workspace"); err != nil {
		return err
	}
	if err := mountDisk(workspace, newRoot+nucleus.MachineWorkspace, "ext4", noDevices); err != nil {
		return err
	}
	for _, place := range []string{nucleus.MachineHome, nucleus.MachineWorkspace} {
		if err := giveToTools(newRoot + place); err != nil {
			return err
		}
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if err := program.show(nucleus.MachineProxy); err != nil {
		return err
	}
	for _, l := range layers {
		if err := l.tree.show(l.Guest); err != nil {
			return fmt.Errorf("layer %s: %w", l.Guest, err)
		}
	}
	return nil
}

func mountDisk(d disk, place, fstype string, flags uintptr) error {
	if err := os.MkdirAll(place, 0o755); err != nil && !errors.Is(err, unix.EROFS) {
		return err
	}
	if err := mount(d.device(), place, fstype, flags, ""); err != nil {
		return fmt.Errorf("%s disk: %w", d.role, err)
	}
	return nil
}

type shownLayer struct {
	layer
	tree tree
}

func openLayers(d disk) ([]shownLayer, error) {
	if d.name == "" {
		return nil, nil
	}
	if err := mountDisk(d, layersPlace, "erofs", unix.MS_RDONLY|noDevices); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(layersPlace + "/layers.json")
	if err != nil {
		return nil, fmt.Errorf("layers disk: %w", err)
	}
	var layers []shownLayer
	if err := json.Unmarshal(text, &layers); err != nil {
		return nil, fmt.Errorf("layers disk: layers.json: %w", err)
	}
	for _, l := range layers {
		if path.Clean(l.Guest) != l.Guest || !path.IsAbs(l.Guest) || l.Guest == "/" || l.Source != filepath.Base(l.Source) {
			return nil, fmt.Errorf("layers disk: layer %q at %q", l.Source, l.Guest)
		}
	}
	return layers, nil
}

// layRoot shows the image, which has a directory for each mount that every machine has, and over
// it a skeleton of empty directories and files for layers that it has no place for. Two lower
// file systems and no upper one: there is nothing that could be written to.
func layRoot(layers []shownLayer) error {
	for _, place := range []string{skeletonPlace, newRoot} {
		if err := os.MkdirAll(place, 0o755); err != nil {
			return err
		}
	}
	if err := mount("tmpfs", skeletonPlace, "tmpfs", noPrograms, "mode=755,size=1m"); err != nil {
		return err
	}
	for _, l := range layers {
		if isBelow(l.Guest, nucleus.MachineHome) {
			continue // a place on the scratch disk
		}
		info, err := os.Stat(filepath.Join(layersPlace, l.Source))
		if err == nil {
			err = addPlace(l.Guest, info.IsDir())
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.Guest, err)
		}
	}
	if err := mount("", skeletonPlace, "", unix.MS_REMOUNT|unix.MS_RDONLY|noPrograms, ""); err != nil {
		return err
	}
	return mount("overlay", newRoot, "overlay", unix.MS_RDONLY|noDevices, "lowerdir="+skeletonPlace+":"+imagePlace)
}

// addPlace makes place in the skeleton unless the image has it. What the image has
// keeps its mode.
func addPlace(place string, dir bool) error {
	image, err := os.OpenRoot(imagePlace)
	if err != nil {
		return err
	}
	defer image.Close()
	name := strings.TrimPrefix(place, "/")
	info, err := image.Stat(name)
	switch {
	case err == nil && info.IsDir() == dir:
		return nil
	case err == nil:
		return fmt.Errorf("the image's %s is in the way", place)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("the image's %s: %w", place, err)
	}
	if parent := path.Dir(place); parent != "/" {
		if err := copyPlaces(image, parent); err != nil {
			return err
		}
	}
	if dir {
		return os.MkdirAll(skeletonPlace+place, 0o755)
	}
	return os.WriteFile(skeletonPlace+place, nil, 0o555) // as the program that is laid over it
}

// copyPlaces makes parent and what is above it in the skeleton, with the modes that they have in
// the image: the skeleton's are those that count.
func copyPlaces(image *os.Root, parent string) error {
	if above := path.Dir(parent); above != "/" {
		if err := copyPlaces(image, above); err != nil {
			return err
		}
	}
	mode := fs.FileMode(0o755)
	info, err := image.Lstat(strings.TrimPrefix(parent, "/"))
	switch {
	case err == nil && !info.IsDir():
		return fmt.Errorf("the image's %s is no directory", parent)
	case err == nil:
		mode = info.Mode().Perm()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := os.Mkdir(skeletonPlace+parent, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(skeletonPlace+parent, mode)
}

func isBelow(name, dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") }

// kernelMounts are what is made of memory and what the kernel shows.
var kernelMounts = []struct {
	place, fstype string
	flags         uintptr
	data          string
}{
	{"/proc", "proc", noPrograms, "hidepid=invisible"},
	{"/sys", "sysfs", noPrograms | unix.MS_RDONLY, ""},
	{"/dev", "tmpfs", noSetuid | unix.MS_NOEXEC, devOptions},
	// Files there are memory: together they leave a good part of it to programs.
	{"/tmp", "tmpfs", noDevices, "mode=1777,size=40%"},
	{"/run", "tmpfs", noPrograms, "mode=755,size=10%"},
}

const devOptions = "mode=755,size=64k,nr_inodes=64"

func mountKernel() error {
	for _, m := range kernelMounts {
		if err := mount(m.fstype, newRoot+m.place, m.fstype, m.flags, m.data); err != nil {
			return err
		}
	}
	return makeDevices(newRoot + "/dev")
}

// makeDevices makes the devices that programs expect, and no other: no disk, no console, no
// memory, no port of the wire.
func makeDevices(dev string) error {
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}} {
		place := filepath.Join(dev, d.name)
		if err := unix.Mknod(place, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("mknod %s: %w", place, err)
		}
		if err := os.Chmod(place, 0o666); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	for _, name := range []string{"pts", "shm"} {
		if err := os.Mkdir(filepath.Join(dev, name), 0o755); err != nil {
			return err
		}
	}
	if err := mount("devpts", dev+"/pts", "devpts", noSetuid|unix.MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"); err != nil {
		return err
	}
	if err := mount("tmpfs", dev+"/shm", "tmpfs", noPrograms, "mode=1777,size=20%"); err != nil {
		return err
	}
	return mount("", dev, "", unix.MS_REMOUNT|unix.MS_RDONLY|noSetuid|unix.MS_NOEXEC, devOptions)
}

// giveToTools makes a disk's root the tools' user's, as it is in every machine. What mkfs leaves
// there is nobody's; a check of the file system would make it again.
func giveToTools(place string) error {
	if err := os.Remove(place + "/lost+found"); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return os.Chown(place, nucleus.MachineToolsID, nucleus.MachineToolsID)
}

func makePlace(dir, name string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// switchRoot lays the new root over the initial file system, which cannot be left otherwise.
func switchRoot() error {
	for _, place := range []string{"/dev", "/sys", "/proc"} {
		if err := unix.Unmount(place, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmounting the first %s: %w", place, err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// tree is a mount that is nowhere yet.
type tree struct{ fd int }

func cloneTree(place string) (tree, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, place, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return tree{}, fmt.Errorf("taking %s: %w", place, err)
	}
	return tree{fd}, nil
}

// show mounts a tree read-only.
func (t tree) show(place string) error {
	defer unix.Close(t.fd)
	readOnly := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(t.fd, "", unix.AT_EMPTY_PATH, &readOnly); err != nil {
		return fmt.Errorf("making %s read-only: %w", place, err)
	}
	if isBelow(place, nucleus.MachineHome) {
		if err := t.placeInHome(place); err != nil {
			return err
		}
	}
	if err := unix.MoveMount(t.fd, "", unix.AT_FDCWD, place, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("showing %s: %w", place, err)
	}
	return nil
}

// placeInHome makes the place of a layer on the scratch disk, where the tools' user owns what
// is above it.
func (t tree) placeInHome(place string) error {
	var shown unix.Stat_t
	if err := unix.Fstat(t.fd, &shown); err != nil {
		return err
	}
	home, err := os.OpenRoot(nucleus.MachineHome)
	if err != nil {
		return err
	}
	defer home.Close()
	name := strings.TrimPrefix(place, nucleus.MachineHome+"/")
	if shown.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = home.MkdirAll(name, 0o755)
	} else if err = home.MkdirAll(path.Dir(name), 0o755); err == nil {
		err = home.WriteFile(name, nil, 0o644)
	}
	for above := path.Dir(name); err == nil && above != "."; above = path.Dir(above) {
		err = home.Chown(above, nucleus.MachineToolsID, nucleus.MachineToolsID)
	}
	return err
}

func mount(source, place, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, place, fstype, flags, data); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", source, place, err)
	}
	return nil
}
