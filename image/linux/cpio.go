package linux

import (
	"fmt"
	"io"
	"io/fs"
)

// Archive writes the newc format of cpio (Documentation/driver-api/early-userspace/
// buffer-format.rst), from which a kernel fills its first root. All entries belong to
// root and have no time, so that the same entries give the same bytes.
type Archive struct {
	out    io.Writer
	inode  int
	at     int64
	failed error
}

// NewArchive begins an archive; Close ends it.
func NewArchive(out io.Writer) *Archive { return &Archive{out: out} }

// The types of a Unix mode.
const (
	typeDir    = 0o040000
	typeFile   = 0o100000
	typeDevice = 0o020000
)

// Dir adds a directory. Directories come before what is in them.
func (a *Archive) Dir(name string) { a.header(name, typeDir|0o755, 2, 0, 0, 0) }

// Device adds a character device.
func (a *Archive) Device(name string, perm fs.FileMode, major, minor uint32) {
	a.header(name, typeDevice|uint32(perm.Perm()), 1, 0, major, minor)
}

// File adds a file of exactly size bytes.
func (a *Archive) File(name string, perm fs.FileMode, size int64, content io.Reader) {
	if size >= 1<<32 {
		a.fail(fmt.Errorf("%s: %d bytes are more than the format knows", name, size))
		return
	}
	a.header(name, typeFile|uint32(perm.Perm()), 1, size, 0, 0)
	if a.failed != nil {
		return
	}
	n, err := io.CopyN(a.out, content, size)
	if a.at += n; err != nil {
		a.fail(fmt.Errorf("%s: %w", name, err))
		return
	}
	a.pad()
}

// Close ends the archive and returns the first error.
func (a *Archive) Close() error {
	a.inode = -1 // the end has none
	a.header("TRAILER!!!", 0, 1, 0, 0, 0)
	return a.failed
}

func (a *Archive) fail(err error) {
	if a.failed == nil {
		a.failed = err
	}
}

func (a *Archive) write(p []byte) {
	if a.failed != nil {
		return
	}
	n, err := a.out.Write(p)
	a.at += int64(n)
	a.failed = err
}

func (a *Archive) header(name string, mode, links uint32, size int64, major, minor uint32) {
	a.inode++
	a.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name))
	a.pad()
}

// pad fills up to a multiple of four.
func (a *Archive) pad() { a.write(make([]byte, -a.at&3)) }
