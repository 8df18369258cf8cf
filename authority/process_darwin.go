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

// stopOthers has a job in the background stopped when it writes to the terminal.
func stopOthers(fd int) error {
	modes, err := unix.IoctlGetTermios(fd, unix.TIOCGETA)
	if err != nil {
		return err
	}
	modes.Lflag |= unix.TOSTOP
	return unix.IoctlSetTermios(fd, unix.TIOCSETA, modes)
}

// dropTyped throws away what was typed before a question was asked.
func dropTyped(fd int) error { return unix.IoctlSetPointerInt(fd, unix.TIOCFLUSH, 1) } // FREAD
