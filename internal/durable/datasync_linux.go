package durable

import (
	"errors"
	"os"
	"syscall"
)

// Datasync puts the content of f on the disk, and of its metadata what is
// needed to read the content back.
func Datasync(f *os.File) error {
	for {
		err := syscall.Fdatasync(int(f.Fd()))
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		return os.NewSyscallError("fdatasync "+f.Name(), err)
	}
}
