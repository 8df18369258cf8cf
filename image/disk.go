package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"cal/image/tree"
	"cal/nucleus"
)

// mountPoints are the directories that every root of a microVM has, because nothing can be made
// in it; an image's links there would lead a mount elsewhere, and are replaced. The usual ones an
// image may have as links.
var (
	mountPoints = []string{"/proc", "/sys", "/dev", "/tmp", "/run", nucleus.MachineAgent, nucleus.MachineHome, nucleus.MachineWorkspace}
	usual       = []string{"/root", "/var", "/opt"}
)

// Root returns an EROFS image of an image's root file system, without its layers.
func (s *Store) Root(ctx context.Context, image nucleus.Image, host string, progress Progress) (Disk, error) {
	return s.rootDisk(ctx, image, host, s.made, progress)
}

// RenewRoot is Renew and Root. What there is and is corrupt is made again.
func (s *Store) RenewRoot(ctx context.Context, image nucleus.Image, host string, progress Progress) (tree string, root Disk, err error) {
	if tree, err = s.Renew(ctx, image, progress); err == nil {
		root, err = s.rootDisk(ctx, image, host, s.mended, progress)
	}
	return tree, root, err
}

func (s *Store) rootDisk(ctx context.Context, image nucleus.Image, host string, made maker, progress Progress) (Disk, error) {
	image.Layers = nil
	if unpacked(image) {
		return s.rootOfTree(ctx, image, host, made, progress)
	}
	return s.disk(ctx, "root", made, func() (*tree.Tree, Object, error) {
		root, err := Resolve(image, host)
		if err != nil {
			return nil, Object{}, err
		}
		t, err := root.tree(ctx)
		return t, Object{What: image.String(), Env: root.Env}, err
	}, progress)
}

// factTree is of a disk: what it was made of.
const factTree = "tree"

// rootOfTree finds the disk of what was unpacked without looking at it: a tree is what its
// digest says. The tree may be gone.
func (s *Store) rootOfTree(ctx context.Context, image nucleus.Image, host string, made maker, progress Progress) (Disk, error) {
	digest, err := s.madeOf(treeKey(image))
	if err == nil && digest == "" {
		var root Root
		root, err = s.Resolve(ctx, image, host, progress)
		digest = root.Digest
	}
	if err != nil {
		return Disk{}, err
	}
	o, err := made(ctx, rootKey(digest), func(dir string) (Object, error) {
		root, err := s.Resolve(ctx, image, host, progress)
		if err == nil && root.Digest != digest {
			err = fmt.Errorf("it is %s now, and was %s", root.Digest, digest)
		}
		if err != nil {
			return Object{}, err
		}
		t, err := root.tree(ctx)
		if err != nil {
			return Object{}, err
		}
		o := Object{What: image.String(), Env: root.Env, Facts: map[string]string{factTree: digest}}
		return s.building(ctx, "root", o, t, progress)(dir)
	})
	if err != nil {
		return Disk{}, fmt.Errorf("image %s: %w", image, err)
	}
	return s.asDisk(o), nil
}

// rootKey names the disk of a tree, with all that is added to it.
func rootKey(tree string) string {
	return keyOf("root of tree", tree, fmt.Sprint(generated(nil, nil), mountPoints, usual))
}

// HasRoot says whether Root would have to make nothing, for an image that has to be unpacked.
func (s *Store) HasRoot(image nucleus.Image) bool {
	digest, err := s.madeOf(treeKey(image))
	if err != nil || digest == "" {
		return false
	}
	o, err := s.known(rootKey(digest))
	return err == nil && o.Digest != ""
}

// Layers returns an EROFS image of layers: their files and directories by number, and
// layers.json, a list of LayerAt.
func (s *Store) Layers(ctx context.Context, layers []nucleus.Layer, progress Progress) (Disk, error) {
	return s.disk(ctx, "layers", s.made, func() (*tree.Tree, Object, error) {
		t := tree.New()
		sources, at, err := placed(layers)
		if err != nil {
			return nil, Object{}, err
		}
		for i, source := range sources {
			if err := t.Copy(ctx, source, fmt.Sprint(i)); err != nil {
				return nil, Object{}, err
			}
		}
		index, err := json.Marshal(at)
		if err == nil {
			err = t.File(layersFile, index, false)
		}
		return t, Object{What: fmt.Sprintf("%d layers", len(layers))}, err
	}, progress)
}

// tree is the root as one file system.
func (r Root) tree(ctx context.Context) (*tree.Tree, error) {
	t := tree.New()
	for name, target := range r.Links {
		if err := t.Link(name, target); err != nil {
			return nil, err
		}
	}
	for name, data := range r.Files {
		if err := t.File(name, data, false); err != nil {
			return nil, err
		}
	}
	for _, bind := range r.Binds { // an outer one comes first
		if err := t.Copy(ctx, bind.Host, bind.Guest); err != nil {
			return nil, err
		}
	}
	for _, name := range mountPoints {
		if err := t.RealDir(name); err != nil {
			return nil, fmt.Errorf("the machine needs a directory: %w", err)
		}
	}
	for _, name := range usual {
		if !t.Has(name) {
			if err := t.Dir(name); err != nil {
				return nil, err
			}
		}
	}
	return t, t.File(nucleus.MachineProxy, nil, true) // a place for the program
}

// attempts to copy files of which one changes meanwhile, as in an upgrade of the host.
const attempts = 3

// disk returns the EROFS image of a tree, made at need.
func (s *Store) disk(ctx context.Context, kind string, made maker, look func() (*tree.Tree, Object, error), progress Progress) (Disk, error) {
	var o Object
	var err error
	for range attempts {
		var t *tree.Tree
		if t, o, err = look(); err != nil {
			return Disk{}, fmt.Errorf("%s image: %w", kind, err)
		}
		o, err = made(ctx, keyOf(kind, t.Fingerprint(), o.What, fmt.Sprint(o.Env)), s.building(ctx, kind, o, t, progress))
		if !errors.Is(err, tree.ErrChanged) {
			break
		}
	}
	if err != nil {
		return Disk{}, fmt.Errorf("%s image: %w", kind, err)
	}
	return s.asDisk(o), nil
}

const diskFile = "disk.erofs"

// building writes a tree as a disk.
func (s *Store) building(ctx context.Context, kind string, o Object, t *tree.Tree, progress Progress) func(string) (Object, error) {
	return func(dir string) (Object, error) {
		progress.say("building the %s image of %s: %d MiB in %d files", kind, o.What, t.Size()>>20, t.Entries())
		o.Kind, o.Files = kind, []File{{Name: diskFile}}
		return o, s.writeDisk(ctx, t, filepath.Join(dir, diskFile))
	}
}

func (s *Store) asDisk(o Object) Disk {
	return Disk{Path: filepath.Join(s.object(o.Digest), o.Files[0].Name), Digest: o.Digest, Size: o.Files[0].Size, Env: o.Env}
}

func (s *Store) writeDisk(ctx context.Context, t *tree.Tree, name string) error {
	if err := s.room(t.Size()); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := t.WriteEROFS(interruptible{f, ctx}); err != nil {
		return err
	}
	return f.Close()
}

// room refuses at once what will not fit.
func (s *Store) room(size int64) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(s.dir, &stat); err != nil {
		return err
	}
	if free := int64(stat.Bavail) * stat.Bsize; size > free {
		return fmt.Errorf("%d MiB are wanted: %w", size>>20, unix.ENOSPC)
	}
	return nil
}

// interruptible ends a long copy with its context.
type interruptible struct {
	*os.File
	ctx context.Context
}

func (i interruptible) Write(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.File.Write(p)
}
