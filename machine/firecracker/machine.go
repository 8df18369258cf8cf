package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
	"cal/nucleus"
	"cal/wire"
)

const (
	guestCID     = 3    // of every guest: nobody else is on its vsock
	wirePort     = 1024 // where the guest's first process takes wires
	greetTimeout = 10 * time.Second
	endPatience  = 2 * time.Second // with a guest that was asked to end

	// A guest is asked again whether it takes wires, the longer it takes the less often.
	firstAgain = time.Millisecond
	lastAgain  = 50 * time.Millisecond
)

// Machine is a Firecracker that this process holds.
type Machine struct {
	*site.Held
	rec  record
	vmm  *vmm
	work sync.WaitGroup
}

// make makes a machine and waits for its first word. digest is that of the program.
func (d *Driver) make(ctx context.Context, spec machine.Spec, digest string, lock io.Closer, warm bool) (*Machine, error) {
	rec, err := d.begin(spec)
	if err != nil {
		return nil, err
	}
	if err := spec.States(rec.Shape.Limits()); err != nil {
		return nil, err
	}
	if err := rec.Jail.make(); err != nil {
		return nil, err
	}
	made, err := d.assemble(ctx, spec, rec)
	if err != nil {
		return nil, err
	}
	rec.Facts, rec.Jail.FileSize = rec.Shape.Facts(made), int64(made.Longest())
	rec.Template.FileSize = max(int64(made.Longest()), int64(rec.Shape.MemoryMB)<<20)
	if err := rec.save(); err != nil {
		return nil, err
	}
	ctx, cancel := site.StartContext(ctx) // of what it is made may take longer
	defer cancel()
	snapshot := ""
	if warm {
		snapshot = d.snapshotOrNone(ctx, rec, made, digest)
	}
	v, err := d.launch(ctx, rec.Jail, digest)
	if err != nil {
		return nil, err
	}
	conn, err := d.bring(ctx, v, rec, made, snapshot)
	if err != nil {
		err = v.explain(err)
		v.letGo()
		return nil, err
	}
	m := d.hold(rec, v, lock)
	m.Give(conn)
	return m, nil
}

// snapshotOrNone is the snapshot to start from. Where none can be made machines boot from
// now on: that is slower, and no weaker.
func (d *Driver) snapshotOrNone(ctx context.Context, rec record, made microvm.Parts, digest string) string {
	dir, err := d.snapshot(ctx, rec, made, digest)
	if err != nil {
		d.warm.Store(false)
		slog.Warn("no snapshots of machines can be made; each machine boots", "error", err)
		return ""
	}
	return dir
}

// bring starts the guest and greets it.
func (d *Driver) bring(ctx context.Context, v *vmm, rec record, made microvm.Parts, snapshot string) (net.Conn, error) {
	if snapshot == "" {
		if err := v.bootUp(ctx, made, rec); err != nil {
			return nil, err
		}
		return v.greet(ctx)
	}
	if err := v.serial(ctx); err != nil {
		return nil, err
	}
	if err := v.restore(ctx, snapshot); err != nil {
		d.forget(snapshot)
		return nil, err
	}
	if err := filtered(v.process.PID); err != nil {
		return nil, err
	}
	if err := v.api.resume(ctx); err != nil {
		return nil, err
	}
	return v.greet(ctx)
}

// bootUp starts a guest from its kernel.
func (v *vmm) bootUp(ctx context.Context, made microvm.Parts, rec record) error {
	if err := v.serial(ctx); err != nil {
		return err
	}
	if err := v.configure(ctx, made, rec); err != nil {
		return err
	}
	if err := v.api.start(ctx); err != nil {
		return err
	}
	return filtered(v.process.PID)
}

// configure says all that Firecracker must know before it starts the guest. There is
// no network device, and no metadata service.
func (v *vmm) configure(ctx context.Context, made microvm.Parts, rec record) error {
	if err := v.api.setMachine(ctx, machineConfig{CPUs: rec.Shape.CPUs, MemoryMB: rec.Shape.MemoryMB}); err != nil {
		return err
	}
	if err := v.api.setBoot(ctx, bootSource{"/" + kernelFile, "/" + initramfsFile, cmdline(made, rec.Shape.Pids)}); err != nil {
		return err
	}
	for _, drive := range drives(made, rec.Shape.CPUs) {
		if err := v.api.addDrive(ctx, drive); err != nil {
			return err
		}
	}
	return v.api.setVsock(ctx, vsockDevice{guestCID, "/" + vsockSocket})
}

// greet gives the guest's first process a wire as soon as it takes one.
func (v *vmm) greet(ctx context.Context) (net.Conn, error) {
	conn, err := v.await(ctx)
	if err != nil {
		return nil, err
	}
	greeted, err := wire.Greet(conn, deadlineOf(ctx))
	if err != nil {
		conn.Close()
		return nil, err
	}
	return greeted, nil
}

// await connects to the guest's first process when it takes wires. It has said nothing then,
// and heard nothing.
func (v *vmm) await(ctx context.Context) (net.Conn, error) {
	for again := firstAgain; ; again = min(again*3/2, lastAgain) {
		conn, err := v.reach(ctx)
		if err == nil {
			return conn, nil
		}
		if v.ended() {
			return nil, fmt.Errorf("%w: the guest did not come up: %w", machine.ErrGone, v.endedBy())
		}
		if site.Pause(ctx, again) != nil {
			return nil, fmt.Errorf("the guest did not come up: %w: %w", context.Cause(ctx), v.endedBy())
		}
	}
}

// endedBy says with what a guest that is no more ended.
func (v *vmm) endedBy() error {
	if text := microvm.LastWords(v.console.String()); text != "" {
		return fmt.Errorf("its console's last line: %s", line(text))
	}
	return errors.New("it printed nothing")
}

// reach connects to the port of wires.
func (v *vmm) reach(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	return v.jail.dialPort(ctx, wirePort)
}

func deadlineOf(ctx context.Context) time.Time {
	if deadline, ok := ctx.Deadline(); ok {
		return deadline
	}
	return time.Now().Add(greetTimeout)
}

// hold begins to watch a Firecracker.
func (d *Driver) hold(rec record, v *vmm, lock io.Closer) *Machine {
	m := &Machine{rec: rec, vmm: v}
	m.Held = site.Hold(rec.Jail.Dir, lock, func(ctx context.Context, dir string) error {
		m.askToEnd(ctx)
		return d.clear(ctx, dir)
	}, m.letGo)
	m.work.Go(m.awaitDeath)
	return m
}

func (m *Machine) awaitDeath() {
	<-m.vmm.done
	if m.vmm.ended() { // else it was let go, which says nothing of it
		m.Died(m.vmm.died())
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
	conn, err := m.vmm.greet(ctx)
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", m.rec.ID, err)
	}
	return conn, nil
}

// Facts implements machine.Machine.
func (m *Machine) Facts() machine.Facts { return m.rec.Facts }

// Limits implements machine.Machine.
func (m *Machine) Limits() []nucleus.Limit { return m.rec.Shape.Limits() }

// Resume implements machine.Machine: nothing is watched, so nothing was paused.
func (m *Machine) Resume(context.Context) error { return nil }

// Console implements machine.Machine.
func (m *Machine) Console() string { return m.vmm.console.String() }

// askToEnd has the guest flush what programs in the background wrote and end by itself. It
// may refuse, and is killed then.
func (m *Machine) askToEnd(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, endPatience)
	defer cancel()
	conn, err := m.vmm.jail.dialPort(ctx, wirePort)
	if err != nil {
		return
	}
	defer conn.Close()
	if wire.SayEnd(conn, deadlineOf(ctx)) != nil {
		return
	}
	select {
	case <-m.Done():
	case <-ctx.Done():
	}
}

// letGo ends this process's part and waits for it.
func (m *Machine) letGo() {
	m.vmm.letGo()
	m.work.Wait()
}
