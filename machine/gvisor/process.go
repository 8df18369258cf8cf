package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// endTimeout bounds how long killed processes may take to go.
const endTimeout = 15 * time.Second

// process is one of runsc's, found by the root directory in its arguments, and
// held by a descriptor so that its number cannot be taken by another meanwhile.
type process struct {
	pid  int
	name string   // argv[0]: runsc-sandbox, runsc-gofer, or runsc's path
	file *os.File // pidfd; readable when the process has ended
}

// processes returns all that run for a runsc root, open. Zombies have no
// arguments and are not among them.
func processes(runscRoot string) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if _, ok := belongs(pid, runscRoot); !ok {
			continue
		}
		if p, ok := open(pid, runscRoot); ok {
			found = append(found, p)
		}
	}
	return found, nil
}

// belongs reads a process's arguments.
func belongs(pid int, runscRoot string) (name string, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "", false
	}
	args := strings.Split(string(data), "\x00")
	for _, arg := range args[1:] {
		if arg == "--root="+runscRoot {
			return args[0], true
		}
	}
	return "", false
}

func open(pid int, runscRoot string) (process, bool) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return process{}, false
	}
	file := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd %d", pid))
	// Only now is it certain that the arguments belong to the process held.
	name, ok := belongs(pid, runscRoot)
	if !ok {
		file.Close()
		return process{}, false
	}
	return process{pid, name, file}, true
}

func (p process) signal(sig syscall.Signal) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(failed, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return failed
}

// ended waits until the process has ended; a deadline on the file or its
// closing ends the wait with an error.
func (p process) ended() error {
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

// endProcesses kills all that run for a runsc root and waits until they are gone.
func endProcesses(ctx context.Context, runscRoot string) error {
	deadline := time.Now().Add(endTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		running, err := processes(runscRoot)
		if err != nil || len(running) == 0 {
			return err
		}
		if err := kill(running, deadline); err != nil {
			return err
		}
	}
}

func kill(running []process, deadline time.Time) (err error) {
	for _, p := range running {
		defer p.file.Close()
		if failed := p.signal(unix.SIGKILL); failed != nil && !errors.Is(failed, os.ErrProcessDone) {
			err = errors.Join(err, fmt.Errorf("killing %s (%d): %w", p.name, p.pid, failed))
		}
	}
	if err != nil {
		return err
	}
	for _, p := range running {
		if err := p.file.SetReadDeadline(deadline); err != nil {
			return err
		}
		if err := p.ended(); err != nil {
			return fmt.Errorf("%s (%d) does not end: %w", p.name, p.pid, err)
		}
	}
	return nil
}

// unmountBelow detaches every mount at or below dir that this process sees. Deleting
// through one would delete what is mounted.
func unmountBelow(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range bytes.Lines(table) {
		fields := strings.Fields(string(line))
		if len(fields) < 5 || !strings.HasPrefix(unescape(fields[4])+"/", dir+"/") {
			continue
		}
		if err := unix.Unmount(unescape(fields[4]), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmounting %s: %w", unescape(fields[4]), err)
		}
	}
	return nil
}

// unescape undoes the octal escapes of /proc/self/mountinfo.
func unescape(name string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(name)
}
