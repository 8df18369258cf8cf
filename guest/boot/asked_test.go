package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/testenv/vm"
	"cal/wire"
)

// Tests that need many machines boot one, save its memory while it waits for a greeting, as a driver may, and
// go on from there. What is to be otherwise in a machine is then told it in a line before the greeting.

// remembered is what a machine that goes on from the memory is started with.
func remembered(t *testing.T) vm.Config {
	t.Helper()
	config := vm.Config{Init: program(t), CPUs: processors, Line: "cal.asked"}
	memory := filepath.Join(built.dir, "memory")
	if _, err := os.Stat(memory); errors.Is(err, os.ErrNotExist) {
		m := vm.Start(t, config)
		asked(t, m, "settle", "settled")
		m.Save(memory)
	}
	config.Memory = memory
	return config
}

// asked says a line to a machine and returns what follows the answer's first word.
func asked(t *testing.T, m *vm.Machine, what, word string) string {
	t.Helper()
	conn := m.Dial("cal.wire")
	defer conn.Close()
	if _, err := io.WriteString(conn, "\n"+what+"\n"); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(vm.Patience))
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if answer, ok := strings.CutPrefix(lines.Text(), word); ok {
			return answer
		}
	}
	t.Fatalf("the machine does not answer %q:\n%s", what, m.Console())
	return ""
}

// serveAsked is Main in a machine whose host may ask, or tell, something before it greets.
func serveAsked() {
	f, ports, err := begin()
	for _, p := range ports {
		go func() {
			f.stop <- p.serve(func(conn io.ReadWriter) (wire.Greeting, error) { return f.answer(&asking{conn, f, nil}) }, f.take)
		}()
	}
	if err == nil {
		err = <-f.stop
	}
	slog.Error("the machine ends", "reason", err)
	end()
}

// asking hears what the host asks on a wire: "settle"; "draw WAY", random numbers, and entropy is then taken in that
// way with nothing else before ok; "without NAME", a mutant. It draws too
// at the very moment at which ok is said.
type asking struct {
	io.ReadWriter
	f    *first
	line []byte // as far as it was read
}

func (a *asking) Read(p []byte) (int, error) {
	n, err := a.ReadWriter.Read(p)
	for _, b := range p[:n] {
		if a.line = append(a.line, b); b == '\n' {
			a.hear(strings.TrimSpace(string(a.line)))
			a.line = nil
		}
	}
	return n, err
}

func (a *asking) hear(line string) {
	switch what, of, _ := strings.Cut(line, " "); what {
	case "draw":
		a.f.random, a.f.prepared = ways[of].take, true
		a.draw()
	case "settle":
		settle()
		a.draw() // so that each processor's are the new ones
		fmt.Fprintf(a.ReadWriter, "\nsettled\n")
	case "without":
		mutants[of].change()
		fmt.Fprintf(a.ReadWriter, "\nwithout %s\n", of)
	}
}

// settle has the kernel's random numbers begin anew, at a time from which on it does so by itself
// after quietFor at the earliest: after half of the time since the boot (Linux 6.1, crng_reseed_interval).
func settle() {
	const quietFor = 8 * time.Second
	uptime := unix.NsecToTimespec(int64(2 * quietFor))
	for {
		err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &uptime, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			panic(err)
		}
	}
	pool, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err == nil {
		err = unix.IoctlSetInt(int(pool.Fd()), unix.RNDRESEEDCRNG, 0)
	}
	if err != nil {
		panic(err)
	}
	pool.Close()
}

func (a *asking) Write(p []byte) (int, error) {
	if bytes.HasSuffix(p, []byte(" ok\n")) && a.f.prepared {
		a.draw()
	}
	return a.ReadWriter.Write(p)
}

// draw draws on each processor: the kernel has random numbers for each.
func (a *asking) draw() {
	var drawn [processors * draws * drawSize]byte
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		panic(err)
	}
	defer unix.SchedSetaffinity(0, &all)
	for cpu := range processors {
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			panic(err)
		}
		for i := range draws {
			part := drawn[(cpu*draws+i)*drawSize:][:drawSize]
			if n, err := unix.Getrandom(part, 0); err != nil || n != len(part) {
				panic(fmt.Sprint(n, err))
			}
		}
	}
	fmt.Fprintf(a.ReadWriter, "\nrandom %x\n", drawn)
}

const (
	processors = 2
	draws      = 16 // on each: whoever else draws there meanwhile takes one from the same row
	drawSize   = 16 // bytes
)
