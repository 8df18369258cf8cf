package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/internal/confine"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
	"cal/nucleus"
	"cal/wire"
)

const (
	greetTimeout   = 10 * time.Second       // of a machine that has booted
	greetTry       = 3 * time.Second        // then it is greeted anew: it may have missed that the port was closed before
	greetPause     = 100 * time.Millisecond // in which it sees that
	endPatience    = 2 * time.Second        // with a guest that was asked to end
	settlePatience = time.Second
)

// vmm is a QEMU that runs, and the host's ends of its sockets.
type vmm struct {
	place   place
	rec     record
	cgroups string
	process process.Process
	exit    <-chan error // how it ended, once; nil: another process started it
	monitor *monitor
	console net.Conn
	errors  *os.File     // what QEMU says
	printed microvm.Tape // by the guest
	said    microvm.Tape // by QEMU
	work    sync.WaitGroup
	ports   [2]port

	patience time.Duration // with one greeting
}

// port is a serial port on which one wire can be at a time.
type port struct {
	socket string
	mu     sync.Mutex
	wire   *portWire // nil: it is free
}

// portWire is a connection to a port. Closing it frees the port.
type portWire struct {
	net.Conn
	port *port
	once sync.Once
}

func (w *portWire) Close() error {
	err := w.Conn.Close()
	w.once.Do(func() {
		w.port.mu.Lock()
		defer w.port.mu.Unlock()
		if w.port.wire == w {
			w.port.wire = nil
		}
	})
	return err
}

// connect takes the port, unless it is taken.
func (p *port) connect() (*portWire, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wire != nil {
		return nil, errPortTaken
	}
	conn, err := net.Dial("unix", p.socket)
	if err != nil {
		return nil, err
	}
	p.wire = &portWire{Conn: conn, port: p}
	return p.wire, nil
}

// close frees the port of whoever has it: another process can then have it.
func (p *port) close() {
	p.mu.Lock()
	wire := p.wire
	p.mu.Unlock()
	if wire != nil {
		wire.Close()
	}
}

var errPortTaken = errors.New("the port has a wire")

func newVMM(p place, rec record, cgroups string) *vmm {
	v := &vmm{place: p, rec: rec, cgroups: cgroups, patience: site.StartTimeout}
	v.ports[0].socket, v.ports[1].socket = p.path(wireSocket), p.path(wire2Socket)
	return v
}

// start brings up a machine and waits for its first word.
func (d *Driver) start(ctx context.Context, spec machine.Spec, rec record) (_ *vmm, _ net.Conn, err error) {
	p := place(spec.Dir)
	qemu, err := d.programs.find(ctx, d.config.QEMU)
	if err != nil {
		return nil, nil, err
	}
	parts, err := d.source().Parts(ctx, spec, p.path(scratchFile), int64(rec.Shape.DiskMB)<<20)
	if err != nil {
		return nil, nil, err
	}
	if err := d.config.Images.Hold(spec.Dir, parts.Held()...); err != nil {
		return nil, nil, err
	}
	ctx, cancel := site.StartContext(ctx) // of what it is made may take longer
	defer cancel()
	rec.Facts = rec.Shape.Facts(parts)
	limits := rec.cgroupLimits(p, spec.Workspace)
	if rec.Cgroup {
		group, err := cgroup.Make(d.config.Cgroups, rec.Instance, limits)
		if err != nil {
			return nil, nil, err
		}
		rec.Cgroup, rec.Kept = group.Name != "", group.Kept
	}
	if err := rec.save(p); err != nil {
		return nil, nil, err
	}
	v := newVMM(p, rec, d.config.Cgroups)
	defer func() {
		if err != nil {
			err = v.explain(err)
			v.letGo()
		}
	}()
	if err := v.launch(ctx, qemu, parts); err != nil {
		return nil, nil, err
	}
	if err := rec.group().Check(d.config.Cgroups, v.process.PID, limits); err != nil {
		return nil, nil, err
	}
	if err := checkWalls(rec, v.process.PID); err != nil {
		return nil, nil, err
	}
	if err := v.monitor.do(ctx, "cont"); err != nil { // the guest's first instruction
		return nil, nil, err
	}
	began := time.Now()
	conn, err := v.greet(ctx, &v.ports[0])
	hint := parts.KernelHint()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded):
		if hint != "" {
			hint = ", and " + hint
		}
		err = fmt.Errorf("its guest has not come up in %s; hint: see whether the host is busy%s: %w", time.Since(began).Round(time.Second), hint, err)
	case hint != "" && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET)):
		err = fmt.Errorf("its guest ended before it answered; hint: see %s: %w", hint, err)
	}
	v.patience = greetTry
	return v, conn, err
}

// launch starts QEMU, behind its walls and with its guest stopped, and connects to its
// sockets: nothing that the guest prints is missed.
func (v *vmm) launch(ctx context.Context, qemu program, parts microvm.Parts) error {
	var fds descriptors
	defer fds.close()
	locked, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	args, err := v.arguments(locked, parts, &fds)
	if err != nil {
		return err
	}
	said, out, err := os.Pipe()
	if err != nil {
		return err
	}
	v.errors = said
	v.work.Go(func() { v.said.Record(said) })
	child := confine.Child{
		Plan: v.rec.plan(qemu, parts, args), Tag: v.rec.tag(v.place), Map: v.rec.Map, Files: fds.files, Out: out,
		Join: func(pid int) error { return v.rec.group().Join(v.cgroups, pid) },
	}
	if !v.rec.Cgroup {
		child.CPUs = v.rec.Shape.CPUs
	}
	cmd, err := confine.Start(ctx, child)
	out.Close()
	fds.close() // else a QEMU that has ended would still be listening
	if err != nil {
		return fmt.Errorf("starting QEMU confined: %w", err)
	}
	// It is waited for as long as it lives, also when nobody holds the machine any more.
	exit := make(chan error, 1)
	go func() { exit <- cmd.Wait() }()
	v.exit = exit
	if err := v.find(); err != nil {
		return err
	}
	return v.connect(ctx)
}

// find takes hold of the running process.
func (v *vmm) find() error {
	running, err := process.Find(v.rec.tag(v.place))
	if err == nil && len(running) == 1 {
		v.process = running[0]
		return nil
	}
	for _, p := range running {
		p.Close()
	}
	if err == nil && len(running) == 0 {
		return machine.ErrGone
	}
	return errors.Join(err, fmt.Errorf("%d processes are the QEMU of %s", len(running), v.place))
}

// connect takes up the monitor and the console.
func (v *vmm) connect(ctx context.Context) error {
	console, err := net.Dial("unix", v.place.path(consoleSocket))
	if err != nil {
		return err
	}
	v.console = console
	v.work.Go(func() { v.printed.Record(console) })
	conn, err := net.Dial("unix", v.place.path(monitorSocket))
	if err != nil {
		return err
	}
	v.monitor, err = converse(ctx, conn)
	return err
}

// findVMM finds what another process started.
func findVMM(ctx context.Context, cgroups string, p place, rec record) (*vmm, error) {
	v := newVMM(p, rec, cgroups)
	v.patience = greetTry
	err := v.find()
	if err == nil {
		err = checkWalls(rec, v.process.PID) // of QEMU, and so that it is no other
	}
	if err == nil {
		err = v.connect(ctx)
	}
	if err != nil {
		v.letGo()
		return nil, err
	}
	return v, nil
}

// greet gives the guest's first process a wire at a port.
func (v *vmm) greet(ctx context.Context, at *port) (net.Conn, error) {
	conn, err := at.connect()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Conn.Close() })
	deadline := time.Now().Add(v.patience)
	last, bounded := ctx.Deadline()
	if bounded {
		deadline = earlier(deadline, last)
	}
	greeted, err := wire.Greet(conn, deadline)
	if stop() && err == nil {
		return greeted, nil
	}
	conn.Close()
	if bounded && !time.Now().Before(last) { // the connection's deadline may come a moment before that of ctx
		err = errors.Join(context.DeadlineExceeded, err)
	} else if ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return nil, err
}

// greetFree greets at whatever port is free, until ctx ends.
func (v *vmm) greetFree(ctx context.Context) (net.Conn, error) {
	for {
		err := errPortTaken
		for i := range v.ports {
			conn, failed := v.greet(ctx, &v.ports[i])
			if failed == nil || ctx.Err() != nil {
				return conn, failed
			}
			if !errors.Is(failed, errPortTaken) {
				err = failed
			}
		}
		// It may have missed that a port was closed just before.
		if !errors.Is(err, os.ErrDeadlineExceeded) || site.Pause(ctx, greetPause) != nil {
			return nil, err
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// explain adds to the error of a start what QEMU and its guest said last, unless that says
// itself what is wrong.
func (v *vmm) explain(err error) error {
	if errors.Is(err, wire.ErrRefused) {
		return err
	}
	if errors.Is(err, machine.ErrGone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		v.settle()
	}
	for _, tape := range []struct {
		who  string
		text string
	}{{"QEMU", site.LastLine(v.said.String())}, {"the guest", microvm.LastWords(v.printed.String())}} {
		if tape.text != "" {
			err = fmt.Errorf("%w; %s said last: %s", err, tape.who, printable(tape.text))
		}
	}
	if strings.Contains(v.said.String(), "Cannot allocate memory") {
		err = fmt.Errorf("%w; hint: the host has no %d MB of memory for it (--memory)", err, v.rec.Shape.MemoryMB)
	}
	return err
}

// letGo gives up all that this process holds of QEMU, and leaves it running.
func (v *vmm) letGo() {
	v.process.Close()
	if v.monitor != nil {
		v.monitor.close()
	}
	if v.console != nil {
		v.console.Close()
	}
	if v.errors != nil {
		v.errors.Close()
	}
	for i := range v.ports {
		v.ports[i].close()
	}
	v.work.Wait()
}

// Machine is a QEMU that this process holds.
type Machine struct {
	*site.Held
	vmm  *vmm
	work sync.WaitGroup
}

// hold begins to watch a machine.
func (d *Driver) hold(v *vmm, lock io.Closer) *Machine {
	m := &Machine{vmm: v}
	m.Held = site.Hold(string(v.place), lock, func(ctx context.Context, dir string) error {
		m.askToEnd(ctx)
		return d.clear(ctx, dir)
	}, m.letGo)
	m.work.Go(m.awaitDeath)
	return m
}

func (m *Machine) awaitDeath() {
	if m.vmm.process.Ended() == nil { // else it was let go, which says nothing of it
		m.Died(m.vmm.died())
	}
}

// died says why QEMU ended, as far as the host can know.
func (v *vmm) died() string {
	var exit error
	if v.exit != nil {
		exit = <-v.exit
	}
	v.settle()
	switch {
	case v.rec.group().OutOfMemory(v.cgroups):
		return fmt.Sprintf("the kernel killed QEMU: with the guest's memory of %d MB it needed more than %d MB", v.rec.Shape.MemoryMB, v.rec.Shape.MemoryMB+v.rec.overheadMB())
	case v.monitor.ended() != "":
		return "the guest ended the machine: " + v.monitor.ended()
	case exit != nil && v.said.String() != "":
		return fmt.Sprintf("QEMU ended: %v: %s", exit, printable(site.LastLine(v.said.String())))
	case exit != nil:
		return fmt.Sprintf("QEMU ended: %v", exit)
	}
	return "QEMU ended"
}

// settle waits a moment for what QEMU and its guest said last.
func (v *vmm) settle() {
	over := make(chan struct{})
	go func() {
		defer close(over)
		v.work.Wait()
		if v.monitor != nil {
			<-v.monitor.gone
		}
	}()
	select {
	case <-over:
	case <-time.After(settlePatience):
	}
}

// Rewire implements machine.Machine. The old wire stays in use until the proxy has
// taken the new one.
func (m *Machine) Rewire(ctx context.Context) (net.Conn, error) {
	if err := m.Alive(nil); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	conn, err := m.vmm.greetFree(ctx)
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", m.vmm.rec.ID, err)
	}
	return conn, nil
}

// Facts implements machine.Machine.
func (m *Machine) Facts() machine.Facts { return m.vmm.rec.Facts }

// Limits implements machine.Machine.
func (m *Machine) Limits() []nucleus.Limit { return slices.Clone(m.vmm.rec.Limits) }

// Resume implements machine.Machine: nothing is watched, so nothing was paused.
func (m *Machine) Resume(context.Context) error { return nil }

// Console implements machine.Machine.
func (m *Machine) Console() string { return m.vmm.printed.String() }

// askToEnd has the guest flush what programs in the background wrote and end by itself. It
// may refuse, and is killed then.
func (m *Machine) askToEnd(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, endPatience)
	defer cancel()
	deadline, _ := ctx.Deadline()
	asked := false
	for i := range m.vmm.ports { // at each that is free: whose wire was closed just now may not be listened to
		conn, err := m.vmm.ports[i].connect()
		if err != nil {
			continue
		}
		defer conn.Close()
		asked = wire.SayEnd(conn, deadline) == nil || asked
	}
	if !asked {
		return
	}
	select {
	case <-m.Done():
	case <-ctx.Done():
	}
}

// letGo ends this process's part and waits for it.
func (m *Machine) letGo() {
	m.vmm.process.Close()
	m.work.Wait()
	m.vmm.letGo()
}
