// Package unpack writes tar archives that a stranger made into a directory, one over
// another.
//
// A hostile archive tries to write outside of the directory (by "..", an absolute
// name, a link that it made before), to keep a right (setuid, owners, capabilities,
// devices), or to fill the disk (sizes that compress well, a thousand hard links to
// one large file, endless directories). The package promises: every name and every
// link on the way to it is resolved inside the directory, as if that were the root; a
// name with ".." ends the work; owners, special bits, extended attributes, devices,
// FIFOs and sockets are not taken over; what all files together hold, hard links
// counted as files, and the number of entries are bounded before they are written.
//
// Nothing else may write to the directory meanwhile.
package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"
)

// Limits are of all archives that go into one directory.
type Limits struct {
	Bytes   int64 // of all files
	Entries int64
}

// ErrTooLarge is wrapped where the files hold more than Limits.Bytes.
var ErrTooLarge = errors.New("the files are too large")

// Into is a directory that is being filled.
type Into struct {
	root   *os.Root
	limits Limits
	bytes  int64
	count  int64
	hidden map[string]bool // directories that are not for everybody to read

	told  func(entries, bytes int64)
	since time.Time // nobody was told
}

// Open begins to fill an empty directory; Close ends it.
func Open(dir string, limits Limits) (*Into, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Into{root: root, limits: limits, hidden: map[string]bool{}}, nil
}

// tellEvery is how often who waits is told how far it is.
const tellEvery = 3 * time.Second

// Tell has told called now and then with what was unpacked so far.
func (u *Into) Tell(told func(entries, bytes int64)) { u.told, u.since = told, time.Now() }

func (u *Into) tell() {
	if now := time.Now(); u.told != nil && now.Sub(u.since) >= tellEvery {
		u.since = now
		u.told(u.count, u.bytes)
	}
}

// Close gives directories the modes that they were to have, which would have been in the
// way before.
func (u *Into) Close() error {
	var err error
	for name := range u.hidden {
		if chmodErr := u.root.Chmod(name, 0o700); !errors.Is(chmodErr, fs.ErrNotExist) {
			err = errors.Join(err, chmodErr)
		}
	}
	return errors.Join(err, u.root.Close())
}

// Way is how an archive is meant.
type Way int

// The ways of an archive.
const (
	Plain   Way = iota // of a whole root
	Layer              // an OCI layer: its whiteouts remove what is below it
	Package            // of Debian: what is there as a directory, or as a link to one, stays so
)

// Whiteouts of an OCI layer.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	reserved = ".wh..wh."
)

// Add unpacks one archive over what is there.
func (u *Into) Add(ctx context.Context, archive io.Reader, way Way) error {
	a := addition{Into: u, way: way, own: map[string]bool{}}
	defer a.forget()
	r := tar.NewReader(archive)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		header, err := r.Next()
		if err == io.EOF {
			return drain(archive)
		}
		if err != nil {
			return err
		}
		if err := a.entry(header, r); err != nil {
			return fmt.Errorf("%q: %w", header.Name, err)
		}
		u.tell()
	}
}

// mostBehind bounds what lies behind an archive's end; tar fills up a block of some kilobytes.
const mostBehind = 64 << 20

// drain reads to the end of a stream, where what was compressed says whether it was whole.
func drain(archive io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(archive, mostBehind))
	if err == nil && n == mostBehind {
		err = fmt.Errorf("more than %d MiB lie behind the archive's end", mostBehind>>20)
	}
	return err
}

// addition is one archive on its way in.
type addition struct {
	*Into
	way Way
	own map[string]bool // what a layer made itself: its whiteouts are for what is below it

	// The directory of the last entry, which is the next one's more often than not: its name
	// in the archive, and where that led to. Whoever removes a directory or a link forgets it.
	last  string
	place string
	dir   *os.Root // nil: none is known
}

// spot is where an entry goes: in a directory inside, which is open.
type spot struct {
	dir   *os.Root
	base  string
	place string // from the root
}

// find resolves the way to an entry.
func (a *addition) find(name string) (spot, error) {
	last := path.Dir(name)
	if a.dir == nil || a.last != last {
		a.forget()
		place, err := a.parent(name)
		if err != nil {
			return spot{}, err
		}
		dir, err := a.root.OpenRoot(place)
		if err != nil {
			return spot{}, err
		}
		a.last, a.place, a.dir = last, place, dir
	}
	base := path.Base(name)
	return spot{a.dir, base, path.Join(a.place, base)}, nil
}

func (a *addition) forget() {
	if a.dir != nil {
		a.dir.Close()
		a.dir = nil
	}
}

func (a *addition) entry(header *tar.Header, content io.Reader) error {
	if a.count++; a.count > a.limits.Entries {
		return fmt.Errorf("more than %d entries", a.limits.Entries)
	}
	name, err := clean(header.Name)
	if err != nil || name == "." {
		return err
	}
	to, err := a.find(name)
	if err != nil {
		return err
	}
	if a.way == Layer && strings.HasPrefix(to.base, whiteout) {
		a.forget()
		return a.white(path.Dir(to.place), to.base)
	}
	switch header.Typeflag {
	case tar.TypeDir:
		err = a.directory(to, header)
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont: // the last is a file to whoever does not know better (POSIX.1-2001, ustar)
		err = a.file(to, header, content)
	case tar.TypeSymlink:
		if a.way == Package {
			if info, statErr := to.dir.Lstat(to.base); statErr == nil && info.IsDir() {
				return nil // as dpkg has it: what is a directory stays one
			}
		}
		err = a.link(to, header.Linkname)
	case tar.TypeLink:
		err = a.hardLink(to, header.Linkname)
	default:
		return nil // a device, a FIFO: nothing that a machine has from an image
	}
	if a.way == Layer {
		a.mark(to.place)
	}
	return err
}

// mark takes down that the archive made a place, and those above it.
func (a *addition) mark(place string) {
	for ; place != "." && !a.own[place]; place = path.Dir(place) {
		a.own[place] = true
	}
}

// Bounds of a name: those of Linux, and a depth beyond which looking up names takes long.
const (
	longestName    = 4095
	longestElement = 255
	deepest        = 128
)

// clean makes a name relative. An absolute one is meant from the archive's root.
func clean(name string) (string, error) {
	if len(name) > longestName || strings.ContainsRune(name, 0) {
		return "", errors.New("no name of a file")
	}
	if strings.Count(path.Clean(name), "/") > deepest {
		return "", fmt.Errorf("deeper than %d directories", deepest)
	}
	for element := range strings.SplitSeq(name, "/") {
		if element == ".." {
			return "", errors.New("the name leads upwards")
		}
		if len(element) > longestElement {
			return "", errors.New("no name of a file")
		}
	}
	if name = strings.TrimPrefix(path.Clean("/"+name), "/"); name == "" {
		name = "."
	}
	return name, nil
}

// mostLinks on the way to one name; more lead in a circle.
const mostLinks = 40

// parent returns the directory in which name lies, with the links on the way resolved as
// a machine would that has the directory as its root. What is missing is made.
func (a *addition) parent(name string) (string, error) {
	at, links := ".", 0
	rest := strings.Split(path.Dir(name), "/")
	for len(rest) > 0 {
		element := rest[0]
		rest = rest[1:]
		switch element {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, element)
		if strings.Count(next, "/") > deepest {
			return "", fmt.Errorf("deeper than %d directories", deepest)
		}
		info, err := a.root.Lstat(next)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = makeDir(a.root, next)
			if a.count++; a.count > a.limits.Entries {
				return "", fmt.Errorf("more than %d entries", a.limits.Entries)
			}
		case err != nil:
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := a.root.Readlink(next)
			if err != nil {
				return "", err
			}
			if links++; links > mostLinks {
				return "", errors.New("links lead in a circle")
			}
			if strings.HasPrefix(target, "/") {
				at = "."
			}
			rest = append(strings.Split(target, "/"), rest...)
			continue
		case !info.IsDir():
			return "", fmt.Errorf("%s is no directory", next)
		}
		if err != nil {
			return "", err
		}
		at = next
	}
	return at, nil
}

func (a *addition) white(parent, base string) error {
	switch {
	case base == opaque:
		entries, err := fs.ReadDir(a.root.FS(), parent)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := a.removeBelow(path.Join(parent, entry.Name())); err != nil {
				return err
			}
		}
		return nil
	case strings.HasPrefix(base, reserved):
		return nil
	}
	gone := strings.TrimPrefix(base, whiteout)
	if gone == "" || gone == "." || gone == ".." {
		return errors.New("a whiteout of no name")
	}
	return a.removeBelow(path.Join(parent, gone))
}

// removeBelow removes what earlier archives have put at a place, and nothing of this one.
func (a *addition) removeBelow(place string) error {
	if !a.own[place] {
		return a.root.RemoveAll(place)
	}
	info, err := a.root.Lstat(place)
	if err != nil || !info.IsDir() {
		return err
	}
	entries, err := fs.ReadDir(a.root.FS(), place)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := a.removeBelow(path.Join(place, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (a *addition) directory(to spot, header *tar.Header) error {
	info, err := to.dir.Lstat(to.base)
	if err == nil && info.Mode()&fs.ModeSymlink != 0 && a.way == Package {
		return nil
	}
	if err == nil && !info.IsDir() {
		err = to.dir.Remove(to.base)
		info = nil
	}
	if info == nil && (err == nil || errors.Is(err, fs.ErrNotExist)) {
		if err = makeDir(to.dir, to.base); err == nil {
			defer a.forget() // what was there may have been a link on the way
		}
	}
	delete(a.hidden, to.place)
	if header.Mode&0o005 != 0o005 {
		a.hidden[to.place] = true
	}
	return err
}

// makeDir makes a directory that everybody may enter, whatever the umask of whoever unpacks.
func makeDir(dir *os.Root, name string) error {
	if err := dir.Mkdir(name, 0o755); err != nil {
		return err
	}
	return dir.Chmod(name, 0o755)
}

// over makes what is no directory, in place of what is there.
func (a *addition) over(to spot, make func(dir *os.Root, base string) error) error {
	err := make(to.dir, to.base)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := to.dir.Lstat(to.base)
	if err != nil {
		return err
	}
	if info.IsDir() {
		for name := range a.hidden {
			if name == to.place || strings.HasPrefix(name, to.place+"/") {
				delete(a.hidden, name)
			}
		}
	}
	if err := to.dir.RemoveAll(to.base); err != nil {
		return err
	}
	if err := make(to.dir, to.base); err != nil {
		return err
	}
	if !info.Mode().IsRegular() { // it may have been on the way
		a.forget()
	}
	return nil
}

func (a *addition) account(size int64) error {
	if size < 0 || size > a.limits.Bytes-a.bytes {
		return fmt.Errorf("%w: with its %d bytes they are more than %d", ErrTooLarge, size, a.limits.Bytes)
	}
	a.bytes += size
	return nil
}

func (a *addition) file(to spot, header *tar.Header, content io.Reader) error {
	if err := a.account(header.Size); err != nil {
		return err
	}
	return a.over(to, func(dir *os.Root, base string) error {
		f, err := dir.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return write(dir, base, f, header, content)
	})
}

// write fills a new file and closes it.
func write(dir *os.Root, base string, f *os.File, header *tar.Header, content io.Reader) error {
	n, err := io.Copy(f, content)
	if err == nil && n != header.Size {
		err = fmt.Errorf("%d bytes, want %d", n, header.Size)
	}
	if err = errors.Join(err, f.Chmod(permissions(header.Mode)), f.Close()); err != nil {
		return err
	}
	at := header.ModTime
	if at.Before(time.Unix(0, 0)) {
		at = time.Unix(0, 0)
	}
	return dir.Chtimes(base, at, at)
}

// permissions are those that a machine's images have; a file that is not for everybody
// stays so, and is then left out of them.
func permissions(mode int64) fs.FileMode {
	switch {
	case mode&0o004 == 0:
		return 0o600
	case mode&0o001 != 0:
		return 0o755
	}
	return 0o644
}

func (a *addition) link(to spot, target string) error {
	if target == "" || len(target) > longestName {
		return fmt.Errorf("a link to %d bytes", len(target))
	}
	return a.over(to, func(dir *os.Root, base string) error { return dir.Symlink(target, base) })
}

func (a *addition) hardLink(to spot, target string) error {
	name, err := clean(target)
	if err != nil {
		return fmt.Errorf("link to %q: %w", target, err)
	}
	parent, err := a.parent(name)
	if err != nil {
		return fmt.Errorf("link to %q: %w", target, err)
	}
	source := path.Join(parent, path.Base(name))
	info, err := a.root.Lstat(source)
	if err != nil {
		return fmt.Errorf("link to %q: %w", target, err)
	}
	if source == to.place {
		return nil
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0: // a second link to the same place
		where, err := a.root.Readlink(source)
		if err != nil {
			return err
		}
		return a.link(to, where)
	case !info.Mode().IsRegular():
		return fmt.Errorf("link to %q, which is no file", target)
	}
	if err := a.account(info.Size()); err != nil {
		return err
	}
	return a.over(to, func(*os.Root, string) error { return a.root.Link(source, to.place) })
}
