package boot

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// children starts processes, and reaps these and every orphan of the machine.
type children struct {
	mu   sync.Mutex // held from a fork to its entry
	live map[int]chan syscall.WaitStatus
}

func newChildren() *children {
	c := &children{live: map[int]chan syscall.WaitStatus{}}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	go func() {
		for range died {
			c.reap()
		}
	}()
	return c
}

func (c *children) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		c.mu.Lock()
		if over := c.live[pid]; over != nil {
			over <- status
			delete(c.live, pid)
		}
		c.mu.Unlock()
	}
}

// start starts the program with the wire on descriptor 3. What comes of it is sent once.
func (c *children) start(wire, said *os.File, program string, args ...string) (<-chan syscall.WaitStatus, error) {
	over := make(chan syscall.WaitStatus, 1)
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: what the thread gives up goes with it
		failed <- func() error {
			if err := boundThread(); err != nil {
				return err
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			process, err := os.StartProcess(program, append([]string{program}, args...), &os.ProcAttr{
				Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
				Files: []*os.File{nil, said, said, wire},
				Sys:   &syscall.SysProcAttr{Setsid: true},
			})
			if err != nil {
				return err
			}
			c.live[process.Pid] = over
			return process.Release()
		}()
	}()
	return over, <-failed
}

// run runs the program to its end; the error is what it said last.
func (c *children) run(wire *os.File, program string, args ...string) error {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ours.Close()
	over, err := c.start(wire, theirs, program, args...)
	theirs.Close()
	if err != nil {
		return err
	}
	var tail []byte
	for buf := make([]byte, 1024); ; {
		n, err := ours.Read(buf)
		tail = append(tail, buf[:n]...)
		tail = tail[max(0, len(tail)-1024):]
		if err != nil {
			break
		}
	}
	if status := <-over; status.ExitStatus() != 0 {
		lines := strings.Split(strings.TrimSpace(string(tail)), "\n")
		return errors.New(lines[len(lines)-1])
	}
	return nil
}

// kept are the capabilities of the proxy: it makes roots, namespaces and users for the
// others. It can neither load code into the kernel nor end it, nor set its clock.
var kept = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_KILL, unix.CAP_MKNOD, unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE,
	unix.CAP_SETGID, unix.CAP_SETPCAP, unix.CAP_SETUID, unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_SYS_PTRACE, unix.CAP_SYS_RESOURCE,
}

// boundThread takes from the thread, for what it starts, every capability that is not kept, and
// the way to get one back.
func boundThread() error {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if isKept(c) {
			continue
		}
		// EINVAL: a capability that this kernel does not know.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("dropping capability %d from the bounding set: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

func isKept(c uintptr) bool {
	for _, k := range kept {
		if c == k {
			return true
		}
	}
	return false
}
