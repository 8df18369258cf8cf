package boot

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/wire"
)

// transport is where wires come from.
type transport interface {
	// serve has wire after wire greeted and gives each to take, with a socket for its
	// bytes, which take does not close. It returns when there can be no more.
	serve(answer answerer, take taker) error
}

type (
	answerer func(io.ReadWriter) (wire.Greeting, error)
	taker    func(wire.Greeting, *os.File) error
)

func (l commandLine) wires() ([]transport, error) {
	if l.wire == wireVsock {
		v, err := listenVsock(vsockPort)
		return []transport{v}, err
	}
	var names []string
	err := await(deviceDeadline, func() (there bool, err error) {
		names, there, err = findPorts("/sys/class/virtio-ports")
		return there, err
	})
	if err != nil {
		return nil, fmt.Errorf("serial ports %s: there are %q: %w", strings.Join(portNames, " and "), names, err)
	}
	var ports []transport
	for _, name := range names {
		port, err := openPort(name)
		if err != nil {
			return nil, fmt.Errorf("serial port: %w", err)
		}
		ports = append(ports, port)
	}
	return ports, nil
}

const vsockPort = 1024

// portNames are the wires of a machine that has serial ports: a new wire comes to the one while that
// at the other is in use.
var portNames = []string{"cal.wire", "cal.wire2"}

// vsock is a socket that only the host reaches.
type vsock struct {
	fd   int
	host uint32 // the host's address
}

func listenVsock(port uint32) (vsock, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return vsock{}, fmt.Errorf("vsock: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		return vsock{}, fmt.Errorf("vsock: bind: %w", err)
	}
	if err := unix.Listen(fd, 4); err != nil {
		return vsock{}, fmt.Errorf("vsock: listen: %w", err)
	}
	return vsock{fd, unix.VMADDR_CID_HOST}, nil
}

// greetPatience is how long a connection that says nothing is held.
const greetPatience = time.Minute

func (v vsock) serve(answer answerer, take taker) error {
	for {
		fd, from, err := unix.Accept4(v.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err == unix.EINTR || err == unix.ECONNABORTED {
			continue
		}
		if err != nil {
			return fmt.Errorf("vsock: accept: %w", err)
		}
		// A program of this machine could dial its own kernel.
		if peer, ok := from.(*unix.SockaddrVM); !ok || peer.CID != v.host {
			slog.Warn("a connection that is not the host's was closed")
			unix.Close(fd)
			continue
		}
		go func() {
			conn := os.NewFile(uintptr(fd), "wire")
			defer conn.Close()
			_ = conn.SetReadDeadline(time.Now().Add(greetPatience))
			g, err := answer(conn)
			if err != nil {
				slog.Warn("greeting", "error", err)
				return
			}
			_ = conn.SetReadDeadline(time.Time{})
			if err := take(g, conn); err != nil {
				refuse(conn, g, err)
			}
		}()
	}
}

func refuse(conn io.Writer, g wire.Greeting, err error) {
	slog.Warn("new wire refused", "error", err)
	if err := wire.SayRefusal(conn, g.Nonce, err.Error()); err != nil {
		slog.Warn("saying so", "error", err)
	}
}

// findPorts returns the devices of the wires as far as they are there. The kernel makes one port after the other.
func findPorts(class string) (devices []string, all bool, err error) {
	entries, err := os.ReadDir(class)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, false, err
	}
	for _, entry := range entries {
		name, _ := os.ReadFile(filepath.Join(class, entry.Name(), "name")) // one that is being made has none yet
		if slices.Contains(portNames, strings.TrimSpace(string(name))) {
			devices = append(devices, entry.Name())
		}
	}
	return devices, len(devices) == len(portNames), nil
}

// port is a serial port whose other end is the host's; while nobody is there it reads
// end after end.
type port struct {
	file *os.File
	raw  syscall.RawConn
}

func openPort(name string) (*port, error) {
	file, err := os.OpenFile("/dev/"+name, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	raw, err := file.SyscallConn()
	return &port{file, raw}, err
}

func (p *port) Write(b []byte) (int, error) { return p.file.Write(b) }

// Read waits while nobody is at the other end.
func (p *port) Read(b []byte) (int, error) { return p.read(b, true) }

func (p *port) read(b []byte, wait bool) (n int, err error) {
	waited := p.raw.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), b)
		again := err == unix.EAGAIN || err == unix.EINTR
		return !again && (n > 0 || err != nil || !wait)
	})
	if waited != nil {
		return 0, waited
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (p *port) serve(answer answerer, take taker) error {
	for {
		g, err := answer(p)
		if err != nil {
			return fmt.Errorf("serial port: %w", err)
		}
		if err := p.relay(func(conn *os.File) error { return take(g, conn) }); err != nil {
			refuse(p, g, err)
		}
	}
}

// relay moves bytes between the port and a socket that it gives to take, until either side ends.
func (p *port) relay(take func(*os.File) error) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "relay"), os.NewFile(uintptr(fds[1]), "wire")
	defer ours.Close()
	taken := make(chan error, 1)
	go func() {
		taken <- take(theirs)
		theirs.Close()
	}()
	gone := make(chan struct{})
	go func() { // to the proxy, until the host has gone or the proxy reads no more
		defer close(gone)
		defer unix.Shutdown(fds[0], unix.SHUT_RDWR) //nolint:errcheck // ends the other direction
		for buf := make([]byte, relayBuffer); ; {
			n, err := p.read(buf, false)
			if _, werr := ours.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}()
	_, _ = io.CopyBuffer(struct{ io.Writer }{p}, struct{ io.Reader }{ours}, make([]byte, relayBuffer))
	_ = p.file.SetReadDeadline(time.Now()) // ends the other direction
	<-gone
	_ = p.file.SetReadDeadline(time.Time{})
	if refused := <-taken; refused != nil {
		return refused
	}
	return nil
}

const relayBuffer = 32 << 10
