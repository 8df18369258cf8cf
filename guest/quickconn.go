package guest

import (
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
	"unsafe"
)

// quickConn is a socket whose reads and writes are made without telling Go's
// scheduler. The descriptor is non-blocking, so there is nothing to tell: a call
// returns at once. Told, the scheduler wakes its watcher thread at the first system call after
// each idle moment, which under gVisor costs more than the call.
type quickConn struct {
	socket
	raw syscall.RawConn
}

// socket is a *net.UnixConn, or an *os.File where Go knows no connection of the family.
type socket interface {
	syscall.Conn
	Close() error
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

func newQuickConn(s socket) (quickConn, error) {
	raw, err := s.SyscallConn()
	return quickConn{s, raw}, err
}

// wireConn takes over a stream socket of any family: a pair's end, or the machine's vsock. It
// closes what is none.
func wireConn(fd int) (quickConn, error) {
	kind, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	if err == nil && kind != syscall.SOCK_STREAM {
		err = fmt.Errorf("socket of type %d", kind)
	}
	if err == nil {
		err = syscall.SetNonblock(fd, true)
	}
	if err != nil {
		syscall.Close(fd)
		return quickConn{}, fmt.Errorf("descriptor %d is no wire: %w", fd, err)
	}
	syscall.CloseOnExec(fd)
	return newQuickConn(os.NewFile(uintptr(fd), "wire"))
}

func (c quickConn) Read(p []byte) (int, error) {
	n, err := transfer(c.raw.Read, syscall.SYS_READ, p)
	if n == 0 && err == nil && len(p) > 0 {
		err = io.EOF
	}
	return n, err
}

func (c quickConn) Write(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		n, err := transfer(c.raw.Write, syscall.SYS_WRITE, p[total:])
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// transfer makes one read or write as soon as the descriptor is ready.
func transfer(when func(func(fd uintptr) bool) error, call uintptr, p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	waitErr := when(func(fd uintptr) bool {
		for {
			done, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
			switch errno {
			case 0:
				n = int(done)
			case syscall.EINTR:
				continue
			case syscall.EAGAIN:
				return false
			default:
				err = os.NewSyscallError("socket", errno)
			}
			return true
		}
	})
	if err == nil {
		err = waitErr
	}
	return n, err
}
