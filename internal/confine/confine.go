// Package confine starts a program, a VMM, behind walls of the host's own kernel, so that
// whoever takes the program over from inside its machine finds nothing.
//
// Claim: the program sees a root that holds itself, its libraries and the files of its
// Plan, all read-only; no process, network, message queue or host name but its own; it is
// a user of the host that is nobody else's, or in a user namespace; it has no capability and
// can gain none. Threat: all that the program does, from the first byte that a guest
// sends it. Promise: every wall stands before the program's first instruction, and its limits
// before any of the child's; where one cannot be built the program does not run, and the error says which.
//
// A Go program cannot become another between fork and exec. So the child is this program
// once more, under the name childName, which Main recognises: it builds the walls and becomes
// the program. What it is to do comes over a socket, never in arguments.
package confine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/idmap"
	"cal/internal/process"
)

// Plan says what the program is and what it finds.
type Plan struct {
	Program string   `json:"program"` // absolute; shown at the same place
	Args    []string `json:"args"`    // all, the program's name first
	Env     []string `json:"env"`

	Files   []File   `json:"files"`   // shown read-only; the program and its libraries among them, see Libraries
	Devices []string `json:"devices"` // of the host, to read and write

	// ID is the user and group that the program becomes, an id where the child runs: of
	// the host, or of Map. 0: the only id of a namespace of its own, which is the caller's outside.
	ID uint32 `json:"id"`

	// Memory is the most bytes of address space; 0: any. It bounds what has no cgroup.
	Memory uint64 `json:"memory,omitempty"`

	// FileSize is the most bytes that a file may come to have; 0: any. It bounds what was handed
	// over open to be written.
	FileSize uint64 `json:"file_size,omitempty"`
}

// File is a file or directory of the host at a place in the program's root.
type File struct {
	Host  string `json:"host"`
	Guest string `json:"guest"`
}

// Child is how Start starts a Plan.
type Child struct {
	Plan  Plan
	Tag   string     // an argument of the child, by which process.Find finds it from its first moment; the program's own must have it too
	Map   *idmap.Map // of an ordinary user with subordinate ids; nil: none
	Files []*os.File // the program's descriptors from 3 on
	Out   *os.File   // what the program prints; nil: nowhere
	CPUs  int        // processors on which it may run; 0: all

	// Join puts the child, which has not begun, within its limits; nil: there are none.
	Join func(pid int) error
}

// childName is the child's first argument.
const childName = "cal-confined"

// namespaces of every child; an ordinary user's has a user namespace too.
const namespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS

// startTimeout is of a start whose context has no deadline.
const startTimeout = 20 * time.Second

// maxMessage bounds what parent and child say to each other.
const maxMessage = 128 << 10

// Start starts the child and returns when it has become the program; the caller waits for
// it. It lives in a session of its own and does not end with this process.
func Start(ctx context.Context, child Child) (*exec.Cmd, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	cmd, err := child.start(theirs)
	theirs.Close()
	if err != nil {
		return nil, err
	}
	if err := child.handOver(ctx, ours, cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	return cmd, nil
}

func (c Child) start(socket *os.File) (*exec.Cmd, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer self.Close()
	// By a descriptor: the file may have been replaced, and in between a shell may stand.
	cmd := &exec.Cmd{
		Path: "/proc/self/fd/4", Args: []string{"/proc/self/fd/4", childName, c.Tag}, Env: []string{}, Dir: "/",
		Stdout: c.Out, Stderr: c.Out, ExtraFiles: []*os.File{socket, self},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Cloneflags: namespaces},
	}
	start := cmd.Start
	switch {
	case c.Map != nil:
		start = func() error { return c.Map.Start(cmd) }
	case os.Geteuid() != 0:
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	if err := process.StartOn(start, c.CPUs); err != nil {
		return nil, fmt.Errorf("namespaces: %w", err)
	}
	return cmd, nil
}

// handOver puts the child within its limits, sends it the plan and the descriptors, and
// waits until it has become the program: then its end of the socket is closed.
func (c Child) handOver(ctx context.Context, socket *os.File, pid int) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := socket.SetDeadline(deadline); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = socket.SetDeadline(time.Now()) })
	defer stop()
	if c.Join != nil {
		if err := c.Join(pid); err != nil {
			return err
		}
	}
	message, err := json.Marshal(c.Plan)
	if err != nil {
		return err
	}
	if len(message) > maxMessage {
		return fmt.Errorf("plan of %d bytes", len(message))
	}
	if err := send(socket, message, c.Files); err != nil {
		return fmt.Errorf("handing over the plan: %w", err)
	}
	said := make([]byte, maxMessage)
	n, err := socket.Read(said)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("the confined child: %w", context.Cause(ctx))
	case n > 0:
		return errors.New(string(said[:n]))
	case err != nil && !isEOF(err):
		return fmt.Errorf("the confined child: %w", err)
	}
	return nil
}

// pair returns two ends of a socket that keeps messages apart.
func pair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "confined child"), os.NewFile(uintptr(fds[1]), "confined child's"), nil
}

func send(socket *os.File, message []byte, files []*os.File) error {
	var fds []int
	for _, file := range files {
		fds = append(fds, int(file.Fd()))
	}
	conn, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Write(func(fd uintptr) bool {
		failed = unix.Sendmsg(int(fd), message, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		return !errors.Is(failed, unix.EAGAIN)
	})
	return errors.Join(err, failed)
}
