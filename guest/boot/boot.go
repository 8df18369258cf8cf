// Package boot is the first process of a machine that has a Linux kernel of its own.
//
// The kernel was made for any purpose and starts with all doors open. Before anything
// of the machine's user runs, boot shuts them, and it promises that it serves no machine
// in which one that it knows of is open: a file system other than scratch and workspace that
// can be written, a network interface, a kernel that still takes modules. It reads each
// promise back from the kernel; one that does not hold ends the machine, and the host is told.
//
// What the person's pod is arrives over the wire, from the host, not over the kernel's
// command line. Until the first wire has been greeted no disk is read, so that a
// machine can be snapshotted there and be restored as another's.
//
// The program is the tool-proxy's own. It starts the proxy as it is started in every machine,
// as `init` with the wire on descriptor 3, and hands later wires to it by `attach`; it reaps
// what is orphaned, and flushes the disks at the end.
package boot

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cal/nucleus"
	"cal/wire"
)

// IsInit reports whether this process is the first of a machine's kernel.
func IsInit() bool { return os.Getpid() == 1 && os.Args[0] == "/init" }

// Main boots the machine and serves it until it ends; it does not return.
func Main() {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(50)
	reason := serve()
	slog.Error("the machine ends", "reason", reason)
	end()
}

// first is the machine's first process.
type first struct {
	line     commandLine
	children *children
	stop     chan error // why the machine ends
	random   func(entropy []byte) error

	mu       sync.Mutex
	prepared bool
	init     string // nonce of the greeting of the first wire; "": none was taken
}

// begin makes what the first process needs to take wires.
func begin() (*first, []transport, error) {
	if err := earlyMounts(); err != nil {
		return nil, nil, err
	}
	line, err := readCommandLine()
	if err != nil {
		return nil, nil, err
	}
	loadModules()
	ports, err := line.wires()
	return &first{line: line, children: newChildren(), stop: make(chan error, 8), random: addEntropy}, ports, err
}

func serve() error {
	f, ports, err := begin()
	if err != nil {
		return err
	}
	for _, p := range ports {
		go func() { f.stop <- p.serve(f.answer, f.take) }()
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	debug.FreeOSMemory()
	select {
	case err := <-f.stop:
		return err
	case s := <-asked:
		return fmt.Errorf("it was asked to, by %s", s)
	}
}

// answer answers the greeting of a new wire. A machine that refuses to serve, or is asked to,
// ends.
func (f *first) answer(conn io.ReadWriter) (wire.Greeting, error) {
	g, err := wire.AnswerGreeting(conn, f.greet, f.taken)
	var refused errRefused
	switch {
	case errors.As(err, &refused):
		time.Sleep(lastWords)
		f.stop <- err
	case errors.Is(err, wire.ErrEnd):
		f.stop <- err
	}
	return g, err
}

// lastWords is how long the device may take to hand over why the machine refuses.
const lastWords = 200 * time.Millisecond

// errRefused is a promise that does not hold.
type errRefused struct{ error }

func (e errRefused) Unwrap() error { return e.error }

// greet is what the machine owes before it says that it serves: random numbers that no
// other has, the time, and once, everything else.
func (f *first) greet(g wire.Greeting) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.random(g.Entropy[:]); err != nil {
		return err
	}
	if err := setClock(g.Time); err != nil {
		return err
	}
	if f.prepared {
		return nil
	}
	if err := f.prepare(); err != nil {
		return errRefused{err}
	}
	f.prepared = true
	return nil
}

func (f *first) prepare() error {
	disks, err := findDisks(f.line.disks)
	if err != nil {
		return err
	}
	if err := enterRoot(disks); err != nil {
		return err
	}
	if err := shutDoors(f.line.tasks); err != nil {
		return err
	}
	return checkPromises(disks)
}

// taken makes a wire the first one where none was. The host greets on no other before it has heard that:
// a wire that comes later is never taken for the first, in whatever order their bytes are read.
func (f *first) taken(g wire.Greeting) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.init == "" {
		f.init = g.Nonce
	}
}

func (f *first) isFirst(g wire.Greeting) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.init == g.Nonce
}

// take starts the proxy on the first wire, and hands every later one to it. It returns when the wire
// has been handed over, or why it was not.
func (f *first) take(g wire.Greeting, conn *os.File) error {
	if err := setClock(g.Time); err != nil { // the greeting may have waited for the boot
		return err
	}
	if !f.isFirst(g) {
		return f.children.run(conn, nucleus.MachineProxy, "attach")
	}
	slog.Info("the machine serves", "uptime", uptime())
	ended, err := f.children.start(conn, os.Stderr, nucleus.MachineProxy, "init")
	if err != nil {
		f.stop <- err
		return err
	}
	go func() {
		status := <-ended
		f.stop <- fmt.Errorf("the proxy ended (exit code %d, signal %d)", status.ExitStatus(), status.Signal())
	}()
	debug.FreeOSMemory()
	return nil
}

// end ends every process, writes what the disks are owed and stops the machine.
func end() {
	unix.Kill(-1, unix.SIGKILL)
	for range 100 { // their mounts go with them
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	unix.Sync()
	for _, place := range []string{nucleus.MachineWorkspace, nucleus.MachineHome} {
		if err := unix.Unmount(place, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			slog.Error("unmounting", "place", place, "error", err)
		}
	}
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	slog.Error("the machine does not end", "error", err)
	select {}
}
