package authority

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Harden keeps key and passphrase out of the reach of other processes of the
// same user: no debugger attaches, no core file is written.
func Harden() error {
	return errors.Join(
		unix.PtraceDenyAttach(),
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}),
	)
}

// dropTyped throws away what was typed before a question was asked.
func dropTyped(fd int) error { return unix.IoctlSetPointerInt(fd, unix.TIOCFLUSH, 1) } // FREAD
