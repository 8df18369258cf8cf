// Package process finds, watches and ends programs of this host by an argument
// that says to what they belong.
//
// Claim: what End returns from without an error runs no more. Threat: process
// numbers are used anew; a program that is being started shows up late; a program
// that was killed is a zombie for a while; another user reads an argument in /proc and starts
// something that has it too. Promise: each is held by a descriptor before its arguments are
// believed, so no signal reaches another; another user's is not found.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// EndTimeout bounds how long killed processes may take to go.
const EndTimeout = 15 * time.Second

// Process is one that runs or ran, held so that its number cannot be taken by
// another meanwhile. The holder closes it.
type Process struct {
	PID  int
	Name string   // argv[0]
	file *os.File // pidfd; readable when the process has ended
}

// LowestMachineID is the first of the host's user ids that belong to machines of root, above what is
// given to users, services and containers.
const LowestMachineID = 0x50000000

// Find returns all of this user, and of its machines, that have this argument, open. Zombies
// have no arguments and are not among them.
func Find(argument string) ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if _, ok := belongs(pid, argument); !ok {
			continue
		}
		if p, ok := Open(pid, argument); ok {
			found = append(found, p)
		}
	}
	return found, nil
}

// belongs reads a process's arguments.
func belongs(pid int, argument string) (name string, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "", false
	}
	args := strings.Split(string(data), "\x00")
	return args[0], slices.Contains(args[1:], argument)
}

// Open holds a process that has this argument; false: it has not, or has ended.
func Open(pid int, argument string) (Process, bool) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return Process{}, false
	}
	file := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd %d", pid))
	// Only now is it certain that the arguments belong to the process held.
	name, ok := belongs(pid, argument)
	p := Process{pid, name, file}
	if !ok || !p.ours() {
		file.Close()
		return Process{}, false
	}
	return p, true
}

// ours says whether a process is this user's: what an ordinary user may not signal is
// another's; root may signal all, and its own run as root or as ids of machines. Who started
// a set-user-id program stays its real user.
func (p Process) ours() bool {
	if err := p.Signal(0); errors.Is(err, unix.EPERM) {
		return false
	}
	if os.Geteuid() != 0 {
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		return false // it has ended
	}
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			fields := strings.Fields(ids)
			real, err := strconv.ParseUint(fields[0], 10, 32)
			return err == nil && (real == 0 || real >= LowestMachineID)
		}
	}
	return false
}

// Close gives the process up; a wait for its end fails.
func (p Process) Close() error { return p.file.Close() }

// Control runs do with the descriptor.
func (p Process) Control(do func(pidfd int) error) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// Signal sends a signal; os.ErrProcessDone says that the process has ended.
func (p Process) Signal(sig syscall.Signal) error {
	err := p.Control(func(pidfd int) error { return unix.PidfdSendSignal(pidfd, sig, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// Ended waits until the process has ended; its closing ends the wait with an error.
func (p Process) Ended() error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, 0)
		return err == nil && n == 1
	})
}

// Sweep ends what has the argument, calls clean to delete what it used, and does both again while
// more appear: a start that was caught between fork and exec shows up late.
func Sweep(ctx context.Context, argument string, clean func() error) error {
	for {
		if err := End(ctx, argument); err != nil {
			return err
		}
		if err := clean(); err != nil {
			return err
		}
		left, err := Find(argument)
		for _, p := range left {
			p.Close()
		}
		if err != nil || len(left) == 0 {
			return err
		}
	}
}

// End kills all that have this argument and waits until they are gone.
func End(ctx context.Context, argument string) error {
	deadline := time.Now().Add(EndTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		running, err := Find(argument)
		if err != nil || len(running) == 0 {
			return err
		}
		if err := kill(running, deadline); err != nil {
			return err
		}
	}
}

func kill(running []Process, deadline time.Time) (err error) {
	for _, p := range running {
		defer p.Close()
		if failed := p.Signal(unix.SIGKILL); failed != nil && !errors.Is(failed, os.ErrProcessDone) {
			err = errors.Join(err, fmt.Errorf("killing %s (%d): %w", p.Name, p.PID, failed))
		}
	}
	if err != nil {
		return err
	}
	for _, p := range running {
		if err := p.file.SetReadDeadline(deadline); err != nil {
			return err
		}
		if err := p.Ended(); err != nil {
			return fmt.Errorf("%s (%d) does not end: %w", p.Name, p.PID, err)
		}
	}
	return nil
}
