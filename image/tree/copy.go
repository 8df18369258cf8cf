package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// identity tells a file that was looked at from what lies there later. A write
// changes its ctime, which no ordinary call sets.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // Unix time in nanoseconds
}

func identityOf(stat *unix.Stat_t) identity {
	//nolint:unconvert // not everywhere of these types
	return identity{uint64(stat.Dev), uint64(stat.Ino), stat.Size, unix.TimespecToNsec(stat.Mtim), unix.TimespecToNsec(stat.Ctim)}
}

// Copy puts a file or directory of the host at name, in place of what is there. host
// is an absolute path and no link. What is not for everybody to read is left out; that
// host itself is not is an error.
func (t *Tree) Copy(ctx context.Context, host, name string) error {
	var stat unix.Stat_t
	if err := unix.Lstat(host, &stat); err != nil {
		return &fs.PathError{Op: "lstat", Path: host, Err: err}
	}
	if !forAll(stat.Mode) {
		return fmt.Errorf("%s is not for everybody to read (mode %04o)", host, stat.Mode&0o7777)
	}
	parent, err := t.dir(path.Dir(inside(name)), false)
	if err != nil {
		return err
	}
	made := t.copied(host, &stat)
	if made == nil {
		return fmt.Errorf("%s is neither a file nor a directory", host)
	}
	made.name = path.Base(inside(name))
	if inside(name) == "" {
		if made.children == nil {
			return fmt.Errorf("%s is no directory", host)
		}
		t.entries, t.size = 0, 0
		t.root = made
	} else {
		t.forget(parent.children[made.name])
		if err := t.add(parent, made); err != nil {
			return err
		}
	}
	if made.children == nil {
		return nil
	}
	dir, err := unix.Open(host, walkFlags, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: host, Err: err}
	}
	walk := walk{ctx: ctx, tree: t, slots: make(chan struct{}, walkers-1)}
	walk.into(dir, host, made, make([]byte, 64<<10))
	walk.others.Wait()
	return walk.failed
}

// forget takes a subtree out of the counts.
func (t *Tree) forget(n *node) {
	if n == nil {
		return
	}
	t.entries--
	t.size -= n.size
	for _, child := range n.children {
		t.forget(child)
	}
}

// copied is the node of what lies on the host; nil: it is no part of an image.
func (t *Tree) copied(host string, stat *unix.Stat_t) *node {
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return &node{mode: fs.ModeDir | 0o755, children: map[string]*node{}}
	case unix.S_IFREG:
		return &node{
			mode: permissions(stat.Mode&0o001 != 0), mtime: max(0, stat.Mtim.Sec), size: stat.Size, source: host, seen: identityOf(stat),
		}
	}
	return nil
}

const walkFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// forAll says whether everybody may read what has this mode. Links have no
// permission of their own.
func forAll(mode uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return true
	case unix.S_IFDIR:
		return mode&0o005 == 0o005
	}
	return mode&0o004 != 0
}

// walk reads a tree of the host by descriptors: no element of a path is looked up
// twice, so none can be exchanged for a link on the way. A directory is read by one
// goroutine, which alone touches its node.
type walk struct {
	ctx    context.Context
	slots  chan struct{} // of goroutines beside the first
	others sync.WaitGroup

	mu     sync.Mutex // of tree's counts and what is below
	tree   *Tree
	failed error // the first
}

// walkers at once: reading names is work for the processor.
const walkers = 4

func (w *walk) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed == nil {
		w.failed = err
	}
}

func (w *walk) over() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed != nil
}

// into reads an open directory and closes it.
func (w *walk) into(dir int, host string, at *node, buffer []byte) {
	defer unix.Close(dir)
	if err := w.ctx.Err(); err != nil {
		w.fail(err)
		return
	}
	var names []string
	for {
		n, err := unix.ReadDirent(dir, buffer)
		if err != nil {
			w.fail(&fs.PathError{Op: "readdir", Path: host, Err: err})
			return
		}
		if n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(buffer[:n], -1, names)
	}
	for _, name := range names {
		if w.over() {
			return
		}
		if err := w.entry(dir, host+"/"+name, name, at, buffer); err != nil {
			w.fail(err)
			return
		}
	}
}

// descend reads a directory, beside this goroutine where there is a slot.
func (w *walk) descend(dir int, host string, at *node, buffer []byte) {
	select {
	case w.slots <- struct{}{}:
		w.others.Go(func() {
			defer func() { <-w.slots }()
			w.into(dir, host, at, make([]byte, 64<<10))
		})
	default:
		w.into(dir, host, at, buffer)
	}
}

func (w *walk) add(parent, n *node) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tree.add(parent, n)
}

func (w *walk) entry(dir int, host, name string, at *node, buffer []byte) error {
	var stat unix.Stat_t
	if err := unix.Fstatat(dir, name, &stat, unix.AT_SYMLINK_NOFOLLOW); errors.Is(err, unix.ENOENT) {
		return nil
	} else if err != nil {
		return &fs.PathError{Op: "lstat", Path: host, Err: err}
	}
	if !forAll(stat.Mode) {
		return nil
	}
	made := w.tree.copied(host, &stat)
	if stat.Mode&unix.S_IFMT == unix.S_IFLNK {
		target, err := readlink(dir, name)
		if err != nil {
			return &fs.PathError{Op: "readlink", Path: host, Err: err}
		}
		made = &node{mode: fs.ModeSymlink | 0o777, target: target}
	}
	if made == nil {
		return nil
	}
	made.name = strings.Clone(name)
	if made.children == nil {
		return w.add(at, made)
	}
	inner, err := unix.Openat(dir, name, walkFlags, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EACCES):
		return nil // gone, or not this user's to enter in spite of its mode
	case err != nil:
		return &fs.PathError{Op: "open", Path: host, Err: err}
	}
	if err := w.add(at, made); err != nil {
		unix.Close(inner)
		return err
	}
	w.descend(inner, host, made, buffer)
	return nil
}

func readlink(dir int, name string) (string, error) {
	var target [longestTarget + 1]byte
	n, err := unix.Readlinkat(dir, name, target[:])
	if err != nil {
		return "", err
	}
	if n > longestTarget {
		return "", unix.ENAMETOOLONG
	}
	return string(target[:n]), nil
}

// content reads a copied file, opened when the first byte is wanted: an image may
// have more files than a process may open.
type content struct {
	n    *node
	file *os.File
	left int64
}

func (c *content) Read(p []byte) (int, error) {
	if c.file == nil {
		if err := c.open(); err != nil {
			return 0, err
		}
	}
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.file.Read(p[:min(int64(len(p)), c.left)])
	if c.left -= int64(n); err == io.EOF && c.left > 0 {
		return n, fmt.Errorf("%s: %w: it is shorter", c.n.source, ErrChanged)
	}
	if c.left == 0 {
		// What was read is one state of the file, or it is none.
		if err := c.unchanged(); err != nil {
			return n, err
		}
	}
	return n, err
}

func (c *content) open() error {
	fd, err := unix.Open(c.n.source, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%s: %w: %w", c.n.source, ErrChanged, err)
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: c.n.source, Err: err}
	}
	c.file, c.left = os.NewFile(uintptr(fd), c.n.source), c.n.size
	return c.unchanged() // nothing is read of what was put in its place
}

func (c *content) unchanged() error {
	var stat unix.Stat_t
	if err := unix.Fstat(int(c.file.Fd()), &stat); err != nil {
		return &fs.PathError{Op: "stat", Path: c.n.source, Err: err}
	}
	if identityOf(&stat) != c.n.seen {
		return fmt.Errorf("%s: %w", c.n.source, ErrChanged)
	}
	return nil
}

func (c *content) Close() error {
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}
