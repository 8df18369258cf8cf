package boot

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

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

func role(f *first, g wire.Greeting) string {
	if f.isFirst(g) {
		return "init"
	}
	return "attach"
}
