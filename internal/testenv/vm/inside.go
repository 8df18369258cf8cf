package vm

import (
	"bufio"
	"io"
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
	conn, err := wire.Greet(m.Dial("cal.wire"), time.Now().Add(Patience))
	if err == nil {
		_, err = io.WriteString(conn, what+"\n")
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return bufio.NewReader(conn)
}

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
