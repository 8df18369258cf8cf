// Package tree describes a file system for a machine and writes it as an EROFS
// image, which the guest's kernel mounts read-only and no VMM shares with the host.
//
// What is copied from the host must not carry a right or a secret of the host into
// the machine. The package promises: all entries belong to root; no setuid or setgid
// bit, no device, FIFO, socket or extended attribute is in an image; a file that
// `other` cannot read, and what lies below a directory that `other` cannot enter and
// list, is left out; a link is copied and never followed; a file that changed between
// the look at it and the copy is an error, not half a file. The same entries give the
// same bytes.
package tree

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// Tree is a file system that is not written yet. Names in it are slash-separated;
// they are cleaned and taken from its root.
type Tree struct {
	root    *node
	entries int
	size    int64
}

type node struct {
	name     string
	mode     fs.FileMode // type, and 0644 or 0755 for a file
	mtime    int64       // Unix time in seconds; only files have one
	children map[string]*node
	target   string // of a link
	size     int64
	data     []byte // of a file that is no copy
	source   string // path on the host, of a copied file
	seen     identity
}

// Bounds of an image: far above any that is of use, and below what an ordinary
// disk and memory hold.
const (
	mostEntries = 4 << 20
	mostBytes   = 256 << 30
)

// New returns an empty tree.
func New() *Tree {
	return &Tree{root: &node{name: ".", mode: fs.ModeDir | 0o755, children: map[string]*node{}}}
}

// Size is how many bytes the files hold.
func (t *Tree) Size() int64 { return t.size }

// Entries counts all but the root.
func (t *Tree) Entries() int { return t.entries }

// Dir makes a directory and those on the way to it. One that is there stays; a file
// or link in its place is an error.
func (t *Tree) Dir(name string) error {
	_, err := t.dir(name, false)
	return err
}

// RealDir is Dir, but for links: they are replaced by directories.
func (t *Tree) RealDir(name string) error {
	_, err := t.dir(name, true)
	return err
}

func (t *Tree) dir(name string, replace bool) (*node, error) {
	at := t.root
	for element := range strings.SplitSeq(inside(name), "/") {
		if element == "" {
			continue
		}
		next := at.children[element]
		if replace && next != nil && next.mode.Type() == fs.ModeSymlink {
			delete(at.children, element)
			t.entries--
			next = nil
		}
		if next == nil {
			next = &node{name: element, mode: fs.ModeDir | 0o755, children: map[string]*node{}}
			if err := t.add(at, next); err != nil {
				return nil, err
			}
		}
		if next.children == nil {
			return nil, fmt.Errorf("%s: %s is a %s, no directory", name, element, kindOf(next.mode))
		}
		at = next
	}
	return at, nil
}

// Link makes a symbolic link. What is there is an error.
func (t *Tree) Link(name, target string) error {
	if target == "" || len(target) > longestTarget {
		return fmt.Errorf("%s: a link to %d bytes", name, len(target))
	}
	return t.leaf(name, &node{mode: fs.ModeSymlink | 0o777, target: target})
}

const longestTarget = 4095

// File makes a file with this content. What is there is an error.
func (t *Tree) File(name string, data []byte, executable bool) error {
	return t.leaf(name, &node{mode: permissions(executable), size: int64(len(data)), data: data})
}

func permissions(executable bool) fs.FileMode {
	if executable {
		return 0o755
	}
	return 0o644
}

func (t *Tree) leaf(name string, n *node) error {
	parent, err := t.dir(path.Dir(inside(name)), false)
	if err != nil {
		return err
	}
	n.name = path.Base(inside(name))
	if n.name == "." {
		return fmt.Errorf("%q names no entry", name)
	}
	if have := parent.children[n.name]; have != nil {
		return fmt.Errorf("%s: there is a %s already", name, kindOf(have.mode))
	}
	return t.add(parent, n)
}

func (t *Tree) add(parent, n *node) error {
	if t.entries++; t.entries > mostEntries {
		return fmt.Errorf("more than %d entries", mostEntries)
	}
	if t.size += n.size; t.size > mostBytes {
		return fmt.Errorf("more than %d GiB", mostBytes>>30)
	}
	parent.children[n.name] = n
	return nil
}

// Has reports whether there is an entry of this name; links are not followed.
func (t *Tree) Has(name string) bool { return t.at(name) != nil }

func (t *Tree) at(name string) *node {
	at := t.root
	for element := range strings.SplitSeq(inside(name), "/") {
		if element == "" || element == "." {
			continue
		}
		if at = at.children[element]; at == nil {
			return nil
		}
	}
	return at
}

func inside(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func kindOf(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "directory"
	case mode&fs.ModeSymlink != 0:
		return "link"
	case mode.IsRegular():
		return "file"
	}
	return "special file"
}

// sorted are the children by name.
func (n *node) sorted() []*node {
	return slices.SortedFunc(maps.Values(n.children), func(a, b *node) int { return strings.Compare(a.name, b.name) })
}

// ErrChanged is wrapped where a file on the host was changed, replaced or taken away
// while it was copied.
var ErrChanged = errors.New("changed while it was copied")
