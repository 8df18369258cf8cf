// Package fake is a driver in memory for tests: the reference for what a driver
// owes, without any wall. A goroutine stands in for the proxy.
//
// It is faithful where a caller could go wrong: it refuses what a real driver
// refuses, its wire is a socket, a machine outlives its holder, and a machine that
// died is gone. Its tier is none, so no requirement is ever met by it.
package fake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

// Inside is what a guest finds in its machine.
type Inside struct {
	Spec    machine.Spec
	Facts   machine.Facts
	Wire    net.Conn      // as of boot
	Attach  <-chan Attach // later ones
	Console io.Writer
}

// Attach is a new wire that is handed in. Answer must be called once; an error
// refuses the wire.
type Attach struct {
	Wire   net.Conn
	Answer func(error)
}

// Config says what the machines are.
type Config struct {
	Guest  func(context.Context, Inside) // the proxy; the machine dies when it returns; ctx is the kill
	Memory string                        // how a memory limit is kept; empty: enforced
	Fail   error                         // of Probe
}

// Driver holds the machines of one pretended host. A node that "restarts" keeps
// using the same Driver, as it would find the same host.
type Driver struct {
	config Config
	mu     sync.Mutex
	alive  map[string]*sandbox // by directory
	held   map[string]bool
}

// New returns a host without machines.
func New(config Config) *Driver {
	if config.Memory == "" {
		config.Memory = machine.Enforced
	}
	return &Driver{config: config, alive: map[string]*sandbox{}, held: map[string]bool{}}
}

// sandbox is what lives on when nobody holds it.
type sandbox struct {
	spec    machine.Spec
	facts   machine.Facts
	limits  []nucleus.Limit
	kill    context.CancelFunc
	done    chan struct{}
	attach  chan Attach
	console console
}

// recordFile lies in a machine's directory from before it starts until it is removed.
const recordFile = "fake.json"

// Name implements machine.Driver.
func (d *Driver) Name() string { return "fake" }

// Tier implements machine.Driver.
func (d *Driver) Tier() nucleus.Tier { return nucleus.TierNone }

// Probe implements machine.Driver.
func (d *Driver) Probe(ctx context.Context) error { return errors.Join(d.config.Fail, ctx.Err()) }

// Create implements machine.Driver.
func (d *Driver) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	if err := spec.Check(); err != nil {
		return nil, err
	}
	if err := site.OnlyFiles(spec.Workspace); err != nil {
		return nil, err
	}
	limits := d.limits(spec.Resources)
	if err := spec.States(limits); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	host, guest, err := pair()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	record := filepath.Join(spec.Dir, recordFile)
	if _, err := os.Lstat(record); err == nil {
		return nil, errors.Join(machine.Refuse("machine directory %s is in use; Adopt or Remove it", spec.Dir), host.Close(), guest.Close())
	}
	if err := os.WriteFile(record, []byte("{}\n"), 0o600); err != nil {
		return nil, errors.Join(err, host.Close(), guest.Close())
	}
	box := d.boot(spec, limits, guest)
	return d.hold(spec.Dir, box, host), nil
}

func (d *Driver) limits(want nucleus.Resources) []nucleus.Limit {
	var limits []nucleus.Limit
	for _, resource := range []struct {
		name, unit, how string
		value           int
	}{
		{"cpu", "cores", machine.Enforced, want.CPU},
		{"memory", "MB", d.config.Memory, want.MemoryMB},
		{"pids", "tasks a user", machine.Enforced, want.Pids},
		{"disk", "MB", machine.Enforced, want.DiskMB},
	} {
		if resource.value == 0 {
			limits = append(limits, machine.NoLimit(resource.name))
			continue
		}
		limits = append(limits, nucleus.Limit{Resource: resource.name, Value: machine.Value(resource.value, resource.unit), How: resource.how})
	}
	return limits
}

func (d *Driver) boot(spec machine.Spec, limits []nucleus.Limit, wire net.Conn) *sandbox {
	ctx, kill := context.WithCancel(context.Background())
	box := &sandbox{
		spec: spec, limits: limits, kill: kill, done: make(chan struct{}), attach: make(chan Attach),
		facts: machine.Facts{ToolsUID: machine.ToolsID, ToolsGID: machine.ToolsID, AgentUID: machine.AgentID, AgentGID: machine.AgentID,
			Env: map[string]string{"PATH": "/usr/bin:/bin"}},
	}
	d.alive[spec.Dir] = box
	go func() {
		defer close(box.done)
		defer kill()
		defer wire.Close()
		d.config.Guest(ctx, Inside{spec, box.facts, wire, box.attach, &box.console})
	}()
	return box
}

func (d *Driver) hold(dir string, box *sandbox, wire net.Conn) *Machine {
	d.held[dir] = true
	return &Machine{driver: d, box: box, wire: wire, paused: make(chan string)}
}

// Adopt implements machine.Driver.
func (d *Driver) Adopt(ctx context.Context, dir string) (machine.Machine, error) {
	d.mu.Lock()
	box := d.alive[dir]
	switch {
	case d.held[dir]:
		d.mu.Unlock()
		return nil, fmt.Errorf("machine directory %s: held by another", dir)
	case box == nil || closed(box.done):
		d.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", dir, machine.ErrGone)
	}
	m := d.hold(dir, box, nil)
	d.mu.Unlock()
	conn, err := m.Rewire(ctx)
	if err != nil {
		m.Release()
		return nil, err
	}
	m.wire = conn
	return m, nil
}

// Remove implements machine.Driver.
func (d *Driver) Remove(ctx context.Context, dir string) error {
	d.mu.Lock()
	box, held := d.alive[dir], d.held[dir]
	d.mu.Unlock()
	if held {
		return fmt.Errorf("machine directory %s: held by another", dir)
	}
	return d.remove(ctx, dir, box)
}

func (d *Driver) remove(ctx context.Context, dir string, box *sandbox) error {
	if box != nil {
		box.kill()
		select {
		case <-box.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.alive, dir)
	delete(d.held, dir)
	if err := os.Remove(filepath.Join(dir, recordFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := os.Remove(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY) {
		return nil
	}
	return err
}

// Kill ends the machine of dir as kill -9 of a sandbox would, whoever holds it.
func (d *Driver) Kill(dir string) {
	d.mu.Lock()
	box := d.alive[dir]
	d.mu.Unlock()
	if box != nil {
		box.kill()
		<-box.done
	}
}

func pair() (host, guest net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ends := make([]net.Conn, 2)
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "wire")
		ends[i], err = net.FileConn(file)
		file.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	return ends[0], ends[1], nil
}

func closed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}
