package vm

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/wire"
)

// Greet greets the machine and tells the program that is its proxy what to do; what it says is
// read from the wire.
func (m *Machine) Greet(what string) *bufio.Reader {
	m.t.Helper()
	m.first = m.Wire("cal.wire")
	if _, err := io.WriteString(m.first, what+"\n"); err != nil {
		m.t.Fatal(err)
	}
	return bufio.NewReader(m.first)
}

// Wire greets at a port, again where the machine has missed that the port was closed just before.
func (m *Machine) Wire(port string) net.Conn {
	m.t.Helper()
	deadline := time.Now().Add(Patience)
	for try := 2 * time.Second; ; try *= 2 {
		conn := m.Dial(port)
		wired, err := wire.Greet(conn, time.Now().Add(try))
		if err == nil {
			return wired
		}
		conn.Close()
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(deadline) {
			m.t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// HangUp closes the wire that Greet has made.
func (m *Machine) HangUp() { m.first.Close() }

// Wait reads until the machine says so.
func Wait(t testing.TB, from *bufio.Reader, want string) {
	t.Helper()
	if line, err := from.ReadString('\n'); err != nil || line != want+"\n" {
		t.Fatalf("the machine says %q, %v, want %q", line, err, want)
	}
}

// Kill does to the machine what kill -9 of its VMM does.
func (m *Machine) Kill() {
	m.t.Helper()
	if err := m.cmd.Process.Kill(); err != nil {
		m.t.Fatal(err)
	}
	<-m.ended
}

// Asked is called in a machine, by the program that is its proxy, before it does anything else:
// what the host said to Greet, and how to answer.
func Asked() (what string, say func(string)) {
	unix.CloseOnExec(3)
	if err := unix.SetNonblock(3, false); err != nil {
		panic(err)
	}
	wire := os.NewFile(3, "wire")
	line, err := bufio.NewReader(wire).ReadString('\n')
	if err != nil {
		panic(err)
	}
	return strings.TrimSpace(line), func(text string) {
		if _, err := io.WriteString(wire, text+"\n"); err != nil {
			panic(err)
		}
	}
}
