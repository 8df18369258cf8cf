// Package fileid tells a file from another that has its path later.
package fileid

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

// ID is what a path leads to. The zero ID is of a path that leads nowhere. A
// directory is the same as long as it has its inode: what is put into it or taken out
// of it does not count. A file is another when it was written to.
type ID struct {
	Device, Inode uint64
	Size          int64 // bytes
	Modified      int64 // Unix time in nanoseconds
}

// Of follows symbolic links. Nothing at path is no error.
func Of(path string) (ID, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ID{}, nil
	}
	if err != nil {
		return ID{}, err
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ID{}, errors.New(path + ": the system tells no inode")
	}
	id := ID{Device: uint64(sys.Dev), Inode: sys.Ino} //nolint:unconvert // not everywhere of this type
	if !info.IsDir() {
		id.Size, id.Modified = info.Size(), info.ModTime().UnixNano()
	}
	return id, nil
}
