package authority

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Harden keeps key and passphrase out of the reach of other processes of the
// same user: no ptrace, no /proc/PID/mem, no core file.
func Harden() error {
	return errors.Join(
		unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0),
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}),
	)
}

// stopOthers has a job in the background stopped when it writes to the terminal.
func stopOthers(fd int) error {
	modes, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	modes.Lflag |= unix.TOSTOP
	return unix.IoctlSetTermios(fd, unix.TCSETS, modes)
}

// dropTyped throws away what was typed before a question was asked.
func dropTyped(fd int) error { return unix.IoctlSetInt(fd, unix.TCFLSH, unix.TCIFLUSH) }
