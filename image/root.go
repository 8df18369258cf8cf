// Package image finds what a machine's root file system is made of: the host's
// programs or a directory, the toolchains and package caches of a person, and
// the few files that are written for the machine.
//
// A machine must see no secret of the host. The package promises that nothing of
// /home, /root, /var, /run or the host's own /etc is in a root but what is listed,
// and that a file which `other` cannot read is never in it: where the kernel
// would let it through because the driver runs as the file's owner, Unreadable
// finds it and the driver covers it. Credential files beside a cache are never
// part of a layer.
//
// The package starts nothing but `go env` and writes only where it is told.
package image

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"cal/nucleus"
)

// Root is a root file system as a driver must put it together. All keys and
// Guest paths are clean, absolute and of the machine.
type Root struct {
	Binds []Bind            // read-only, nosuid, nodev; an outer one before those inside it
	Links map[string]string // symbolic link -> target
	Files map[string][]byte // written for the machine, mode 0644
	Env   map[string]string // what the tools need to find programs

	Digest string // "sha256:..." of what was unpacked; "" for what lies on the host
}

// Bind shows Host, a directory or regular file, at Guest.
type Bind struct {
	Host  string
	Guest string
}

// DefaultPath is PATH in a machine before toolchains are put in front.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Resolve returns the root of an image that lies on the host, its layers included; a
// Store's Resolve takes the other kinds too. host is the directory in which the host's
// root is found: "/".
func Resolve(image nucleus.Image, host string) (Root, error) {
	var root Root
	var err error
	switch image.Kind {
	case nucleus.ImageHost:
		root, err = hostRoot(host)
	case nucleus.ImageDirectory:
		root, err = directoryRoot(image.Path)
	default:
		return Root{}, fmt.Errorf("image %q is neither host nor directory", image)
	}
	if err != nil {
		return Root{}, fmt.Errorf("%s image: %w", image.Kind, err)
	}
	for _, layer := range image.Layers {
		source, err := filepath.EvalSymlinks(layer.Host)
		if err != nil {
			return Root{}, fmt.Errorf("layer %q: %w", layer.Name, err)
		}
		root.Binds = append(root.Binds, Bind{source, layer.Guest})
	}
	root.Env = map[string]string{"PATH": DefaultPath}
	return root, root.settle()
}

// settle puts the binds into order and refuses one whose place does not exist
// inside another: it would have to be made on the host.
func (r *Root) settle() error {
	slices.SortStableFunc(r.Binds, func(a, b Bind) int { return strings.Compare(a.Guest, b.Guest) })
	for i, inner := range r.Binds {
		for _, outer := range r.Binds[:i] {
			below, ok := strings.CutPrefix(inner.Guest, outer.Guest+"/")
			if !ok {
				continue
			}
			if _, err := os.Lstat(filepath.Join(outer.Host, below)); err != nil {
				return fmt.Errorf("%s lies inside %s, which has no such place", inner.Guest, outer.Guest)
			}
		}
	}
	return nil
}

// Build writes the skeleton of the root into dir, an empty directory: links,
// files, and a place for every bind and every directory of extra. Nothing of
// the host is written to.
func (r Root) Build(dir string, extra ...string) error {
	skeleton, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer skeleton.Close()
	build := builder{skeleton, map[string]bool{".": true}}
	for _, name := range extra {
		if err := build.dir(name); err != nil {
			return err
		}
	}
	for name, target := range r.Links {
		if err := build.dir(path.Dir(name)); err != nil {
			return err
		}
		if err := skeleton.Symlink(target, inside(name)); err != nil {
			return err
		}
	}
	for name, data := range r.Files {
		if err := build.file(name, data); err != nil {
			return err
		}
	}
	for i, bind := range r.Binds {
		if nested(bind.Guest, r.Binds[:i]) {
			continue
		}
		if err := build.place(bind); err != nil {
			return err
		}
	}
	return nil
}

func nested(guest string, outer []Bind) bool {
	return slices.ContainsFunc(outer, func(b Bind) bool { return strings.HasPrefix(guest, b.Guest+"/") })
}

type builder struct {
	root *os.Root
	made map[string]bool
}

func inside(name string) string { return strings.TrimPrefix(path.Clean(name), "/") }

func (b builder) dir(name string) error {
	name = inside(name)
	if name == "" || b.made[name] {
		return nil
	}
	if err := b.root.MkdirAll(name, 0o755); err != nil {
		return err
	}
	b.made[name] = true
	return nil
}

func (b builder) file(name string, data []byte) error {
	if err := b.dir(path.Dir(name)); err != nil {
		return err
	}
	return b.root.WriteFile(inside(name), data, 0o644)
}

func (b builder) place(bind Bind) error {
	info, err := os.Stat(bind.Host)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return b.dir(bind.Guest)
	}
	return b.file(bind.Guest, nil)
}
