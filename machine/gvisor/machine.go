package gvisor

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/process"
	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

const (
	attachTimeout = 30 * time.Second
	watchEvery    = 250 * time.Millisecond // a guest takes no more than some hundred MB in that time
	shortenEvery  = 4                      // rounds of watching
	resumeGrace   = 2 * time.Second        // for the holder to make the guest smaller
)

// Machine is a sandbox that this process holds.
type Machine struct {
	*site.Held
	driver  *Driver
	place   place
	rec     record
	sandbox process.Process
	memory  gauge           // of the goroutine that watches
	ctx     context.Context // ends with Release and Destroy
	cancel  context.CancelFunc
	work    sync.WaitGroup

	mu      sync.Mutex
	stopped bool      // by a watched limit
	grace   time.Time // no watching before
}

// flags of every runsc command. Without --overlay2=none what a call wrote would
// lie in memory; a gofer network namespace of its own leaves no mount on the host.
// Exclusive mounts: see sharedWithHost.
func (d *Driver) flags(place place, rec record) []string {
	flags := []string{
		"--root=" + place.runscRoot(), "--platform=systrap", "--network=none", "--host-uds=none", "--host-fifo=none",
		"--overlay2=none", "--file-access-mounts=exclusive", "--gofer-network-namespace=new", "--host-settings=ignore",
	}
	if rec.Facts.OneID {
		flags = append(flags, "--rootless")
	}
	if rec.Cgroup == "" {
		flags = append(flags, "--ignore-cgroups")
	}
	return flags
}

func (d *Driver) start(ctx context.Context, place place, rec record, lock io.Closer) (*Machine, error) {
	host, guest, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer guest.Close()
	if err := d.run(ctx, place, rec, guest); err != nil {
		host.Close()
		return nil, err
	}
	m, err := d.hold(place, rec, lock)
	if err != nil {
		host.Close()
		return nil, err
	}
	if err := rec.group().Check(d.config.Cgroups, m.sandbox.PID, rec.wanted); err != nil {
		host.Close()
		m.letGo()
		return nil, err
	}
	m.Give(host)
	return m, nil
}

// run starts the sandbox in a session of its own: the death of the node, or of
// the terminal it runs on, ends no machine.
func (d *Driver) run(ctx context.Context, place place, rec record, guest *os.File) error {
	ctx, cancel := site.StartContext(ctx)
	defer cancel()
	console, err := os.OpenFile(place.console(), os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer console.Close()
	if err := os.Mkdir(place.runscRoot(), 0o700); err != nil {
		return err
	}
	args := append(d.flags(place, rec), "run", "--detach", "--bundle="+string(place), "--pid-file="+place.pid(), "--pass-fd=3:3", container)
	cmd := command(ctx, d.config.Runsc, args, guest)
	cmd.Stdout, cmd.Stderr = console, console
	if err := process.StartOn(rec.starter(cmd, place), rec.processors()); err != nil {
		return fmt.Errorf("runsc: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("runsc run: %w: %s", err, site.LastLine(site.Tail(place.console())))
	}
	return nil
}

func command(ctx context.Context, runsc string, args []string, guest *os.File) *exec.Cmd {
	cmd := exec.CommandContext(ctx, runsc, args...)
	cmd.Env = environment
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	if guest != nil {
		cmd.ExtraFiles = []*os.File{guest} // descriptor 3
	}
	return cmd
}

// processors is on how many the sandbox is let run; 0 leaves it to the cgroup.
func (r record) processors() int {
	if r.Cgroup != "" {
		return 0
	}
	return r.CPU
}

// hold finds the running sandbox of a place and begins to watch it.
func (d *Driver) hold(place place, rec record, lock io.Closer) (*Machine, error) {
	running, err := process.Find(place.argument())
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(running, func(p process.Process) bool { return p.Name == "runsc-sandbox" })
	for i, p := range running {
		if i != at {
			p.Close()
		}
	}
	if at < 0 {
		return nil, fmt.Errorf("%w: %s", machine.ErrGone, site.LastLine(site.Tail(place.console())))
	}
	m := &Machine{driver: d, place: place, rec: rec, sandbox: running[at]}
	m.Held = site.Hold(string(place), lock, d.clear, m.letGo)
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.work.Go(m.awaitDeath)
	m.work.Go(m.watch)
	return m, nil
}

// awaitDeath believes the process, not `runsc list`, which calls zombies running.
func (m *Machine) awaitDeath() {
	if m.sandbox.Ended() != nil {
		return // it was let go, which says nothing of it
	}
	reason := "the sandbox ended"
	if m.rec.group().OutOfMemory(m.driver.config.Cgroups) {
		reason = fmt.Sprintf("the kernel killed the sandbox: it exceeded its memory limit of %d MB", m.rec.Memory>>20)
	}
	m.Died(reason)
}

// watch keeps the console small and the watched memory below its limit.
func (m *Machine) watch() {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	defer m.memory.close()
	for round := 0; ; round++ {
		select {
		case <-m.ctx.Done():
			return
		case <-m.Done():
			return
		case now := <-tick.C:
			if round%shortenEvery == 0 {
				site.Shorten(m.place.console())
			}
			m.watchMemory(now)
		}
	}
}

func (m *Machine) watchMemory(now time.Time) {
	if m.rec.MaxWatch == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped || now.Before(m.grace) {
		return
	}
	used, err := m.memory.used(m.sandbox)
	switch {
	case err != nil:
		m.halt(fmt.Sprintf("memory cannot be measured: %v", err))
	case used > m.rec.MaxWatch:
		m.halt(fmt.Sprintf("memory is %d MB, above the watched limit of %d MB", used>>20, m.rec.MaxWatch>>20))
	}
}

// halt stops the sentry: without it the guest gets no memory, file or wire.
func (m *Machine) halt(reason string) {
	if m.sandbox.Signal(unix.SIGSTOP) != nil {
		return // it has ended, or ends
	}
	m.stopped = true
	m.Pause(reason)
}

// Resume implements machine.Machine. Watching begins anew after a few seconds.
func (m *Machine) Resume(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.stopped {
		return nil
	}
	if err := m.sandbox.Signal(unix.SIGCONT); err != nil {
		return fmt.Errorf("resuming %s: %w", m.rec.ID, err)
	}
	m.stopped, m.grace = false, time.Now().Add(resumeGrace)
	return nil
}

// Facts implements machine.Machine.
func (m *Machine) Facts() machine.Facts { return m.rec.Facts }

// Limits implements machine.Machine.
func (m *Machine) Limits() []nucleus.Limit { return slices.Clone(m.rec.Limits) }

// Console implements machine.Machine.
func (m *Machine) Console() string { return site.Tail(m.place.console()) }

// Rewire implements machine.Machine.
func (m *Machine) Rewire(context.Context) (conn net.Conn, err error) {
	err = m.Alive(func() error {
		conn, err = m.handIn()
		return err
	})
	return conn, err
}

// handIn begins to hand in a new wire.
func (m *Machine) handIn() (net.Conn, error) {
	host, guest, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer guest.Close()
	// The hand-over outlives this call: the proxy takes the wire once the holder
	// has proved itself on it.
	ctx, cancel := context.WithTimeout(m.ctx, attachTimeout)
	args := append(m.driver.flags(m.place, m.rec), "exec", "--pass-fd=3:3", container, nucleus.MachineProxy, "attach")
	cmd := command(ctx, m.driver.config.Runsc, args, guest)
	said := &site.Bounded{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		cancel()
		host.Close()
		return nil, fmt.Errorf("runsc exec: %w", err)
	}
	handed := &handedWire{Conn: host, answered: make(chan struct{})}
	m.work.Go(func() {
		defer cancel()
		defer close(handed.answered)
		if err := cmd.Wait(); err != nil {
			handed.refusal = fmt.Errorf("the proxy did not take the new wire: %w: %s", err, site.LastLine(said.String()))
		}
	})
	return handed, nil
}

// letGo ends this process's part and waits for it.
func (m *Machine) letGo() {
	m.cancel()
	m.sandbox.Close()
	m.work.Wait()
}
