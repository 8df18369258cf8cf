package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/testenv/vm"
	"cal/wire"
)

// late is a port, which holds what nobody has read yet, and of which the machine reads no more than the
// greeting until it is let.
type late struct {
	in    chan byte
	out   chan []byte
	let   <-chan struct{}
	lines int
}

func newLate(conn net.Conn, let <-chan struct{}) *late {
	l := &late{in: make(chan byte, 4096), out: make(chan []byte, 64), let: let}
	go func() {
		defer close(l.in)
		for one := make([]byte, 1); ; {
			if _, err := conn.Read(one); err != nil {
				return
			}
			l.in <- one[0]
		}
	}()
	go func() {
		for said := range l.out {
			if _, err := conn.Write(said); err != nil {
				return
			}
		}
	}()
	return l
}

func (l *late) Write(p []byte) (int, error) {
	l.out <- bytes.Clone(p)
	return len(p), nil
}

func (l *late) Read(p []byte) (int, error) {
	if l.lines == 2 { // an empty one, and the greeting
		<-l.let
	}
	var more bool
	if p[0], more = <-l.in; !more {
		return 0, io.EOF
	}
	if p[0] == '\n' {
		l.lines++
	}
	return 1, nil
}

// TestFirstWire: a host greets on two wires, one after the other, and the machine is slow to read
// the end of the first greeting, or to act on it. The first is for the proxy to start with all the same.
func TestFirstWire(t *testing.T) {
	for _, slow := range []string{"reads", "acts"} {
		t.Run("the machine "+slow+" late", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &first{prepared: true, random: func([]byte) error { return nil }}
				reads, acts, atOnce := make(chan struct{}), make(chan struct{}), make(chan struct{})
				close(atOnce)
				if slow == "reads" {
					close(acts)
				} else {
					close(reads)
				}
				host1, guest1 := net.Pipe()
				host2, guest2 := net.Pipe()
				defer host1.Close()
				defer host2.Close()
				port1, port2 := newLate(guest1, reads), newLate(guest2, atOnce)
				defer close(port1.out)
				defer close(port2.out)
				began := make(chan string, 2)
				go func() {
					g, err := f.answer(port1)
					<-acts
					began <- fmt.Sprintf("%s on the first, %v", role(f, g), err)
				}()
				go func() {
					g, err := f.answer(port2)
					began <- fmt.Sprintf("%s on the second, %v", role(f, g), err)
				}()
				go func() {
					for _, conn := range []net.Conn{host1, host2} {
						if _, err := wire.Greet(conn, time.Now().Add(time.Minute)); err != nil {
							t.Error(err)
						}
					}
				}()
				synctest.Wait() // all that can happen has happened
				if slow == "reads" {
					close(reads)
				} else {
					close(acts)
				}
				synctest.Wait()
				got := map[string]bool{}
				for len(began) > 0 {
					got[<-began] = true
				}
				if !got["init on the first, <nil>"] || !got["attach on the second, <nil>"] {
					t.Errorf("the machine starts %v", got)
				}
			})
		})
	}
}

// TestFindPorts: a machine waits until both its ports are there, else one is never listened at.
func TestFindPorts(t *testing.T) {
	class := filepath.Join(t.TempDir(), "virtio-ports")
	for _, step := range []struct {
		device, name string
		want         []string
		all          bool
	}{
		{"", "", nil, false}, // not even the class is there
		{"vport0p1", "cal.wire", []string{"vport0p1"}, false},
		{"vport0p0", "console", []string{"vport0p1"}, false},
		{"vport0p2", "", []string{"vport0p1"}, false}, // being made
		{"vport0p2", "cal.wire2", []string{"vport0p1", "vport0p2"}, true},
		{"vport0p3", "cal.wire3", []string{"vport0p1", "vport0p2"}, true},
	} {
		if step.device != "" {
			dir := filepath.Join(class, step.device)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if step.name != "" {
				if err := os.WriteFile(filepath.Join(dir, "name"), []byte(step.name+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got, all, err := findPorts(class); err != nil || !slices.Equal(got, step.want) || all != step.all {
			t.Errorf("with %s %q: %q, all %v, %v, want %q, %v", step.device, step.name, got, all, err, step.want, step.all)
		}
	}
}

func role(f *first, g wire.Greeting) string {
	if f.isFirst(g) {
		return "init"
	}
	return "attach"
}

// TestVsock is of the door through which Firecracker's host comes: in a machine whose kernel can also dial
// itself, which is what tries the door here.
func TestVsock(t *testing.T) {
	m := vm.Start(t, vm.Config{Init: program(t), Line: "cal.wire=vsock cal.loopback", Modules: []string{"vsock_loopback"}})
	m.Ended()
	said := m.Console()
	for _, step := range loopback {
		if !strings.Contains(said, "vsock: "+step.what+": <nil>") {
			t.Errorf("%s: not so", step.what)
		}
	}
	if !strings.Contains(said, wire.ErrEnd.Error()) {
		t.Error("the machine did not end because it was asked to")
	}
}

// The door at the second port takes for the host who dials from the machine itself: the control.
const loopbackPort = vsockPort + 1

// loopback is what somebody in the machine then tries, in this order.
var loopback = []struct {
	what string
	try  func() error
}{
	{"a program of the machine is not answered", func() error {
		conn, err := dialLoopback(vsockPort)
		for range 10 { // it may be closed before the kernel has told who dials that it was opened
			if err == nil {
				break
			}
			conn, err = dialLoopback(vsockPort)
		}
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = wire.Greet(conn, time.Now().Add(vm.Patience))
		for _, closed := range []error{io.EOF, unix.ECONNRESET, unix.EPIPE, unix.ENOTCONN} {
			if errors.Is(err, closed) {
				return nil
			}
		}
		return fmt.Errorf("greeted: %v", err)
	}},
	{"the first wire", func() error { return talk("hold", "held") }},
	{"a new wire", func() error { return talk("proof", "taken") }},
	{"a stranger's wire", func() error {
		err := talk("nonsense", "")
		if err == nil || err.Error() != "the proxy did not take the new wire: no proof, but nonsense" {
			return fmt.Errorf("it ends with: %w", err)
		}
		return nil
	}},
	{"another one", func() error { return talk("proof", "taken") }},
	{"the end", func() error {
		conn, err := dialLoopback(loopbackPort)
		if err != nil {
			return err
		}
		return wire.SayEnd(conn, time.Now().Add(vm.Patience))
	}},
}

// talk says something on a wire of its own, which stays open.
func talk(what, want string) error {
	conn, err := dialLoopback(loopbackPort)
	if err != nil {
		return err
	}
	wired, err := wire.Greet(conn, time.Now().Add(vm.Patience))
	if err != nil {
		return err
	}
	if _, err := io.WriteString(wired, what+"\n"); err != nil {
		return err
	}
	said, err := bufio.NewReader(wired).ReadString('\n')
	if err == nil && said != want+"\n" {
		err = fmt.Errorf("it says %q, want %q", said, want)
	}
	return err
}

// fileConn is a socket that package net does not know.
type fileConn struct{ *os.File }

func (fileConn) LocalAddr() net.Addr  { return nil }
func (fileConn) RemoteAddr() net.Addr { return nil }

func dialLoopback(port uint32) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_LOCAL, Port: port}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("dialling port %d: %w", port, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return fileConn{os.NewFile(uintptr(fd), "loopback")}, nil
}

// serveLoopback is Main with a second door, and somebody who tries both.
func serveLoopback() {
	f, doors, err := begin()
	door, errd := listenVsock(loopbackPort)
	door.host = unix.VMADDR_CID_LOCAL
	if err = errors.Join(err, errd); err == nil {
		for _, d := range append(doors, door) {
			go func() { f.stop <- d.serve(f.answer, f.take) }()
		}
		go func() {
			for _, step := range loopback {
				fmt.Printf("vsock: %s: %v\n", step.what, step.try())
			}
		}()
		err = <-f.stop
	}
	slog.Error("the machine ends", "reason", err)
	end()
}
