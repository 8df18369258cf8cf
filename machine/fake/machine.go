package fake

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"cal/machine"
	"cal/nucleus"
)

const attachTimeout = 30 * time.Second

// Machine is a held sandbox.
type Machine struct {
	driver *Driver
	box    *sandbox
	paused chan string

	mu   sync.Mutex
	wire net.Conn
	gone bool
}

// Wire implements machine.Machine.
func (m *Machine) Wire() net.Conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	conn := m.wire
	m.wire = nil
	return conn
}

// Rewire implements machine.Machine.
func (m *Machine) Rewire(context.Context) (net.Conn, error) {
	if closed(m.box.done) {
		return nil, fmt.Errorf("%s: %w", m.box.spec.Dir, machine.ErrGone)
	}
	host, guest, err := pair()
	if err != nil {
		return nil, err
	}
	handed := &handedWire{Conn: host, answer: make(chan error, 1)}
	go func() {
		timer := time.NewTimer(attachTimeout)
		defer timer.Stop()
		answer := func(err error) {
			if err != nil {
				handed.answer <- fmt.Errorf("the proxy did not take the new wire: %w", err)
				guest.Close()
			}
		}
		select {
		case m.box.attach <- Attach{guest, answer}:
		case <-m.box.done:
			answer(machine.ErrGone)
		case <-timer.C:
			answer(context.DeadlineExceeded)
		}
	}()
	return handed, nil
}

// handedWire ends with the reason where the guest refused it.
type handedWire struct {
	net.Conn
	answer chan error
}

func (w *handedWire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n == 0 && err != nil {
		select {
		case refusal := <-w.answer:
			return 0, refusal
		default:
		}
	}
	return n, err
}

// Facts implements machine.Machine.
func (m *Machine) Facts() machine.Facts { return m.box.facts }

// Limits implements machine.Machine.
func (m *Machine) Limits() []nucleus.Limit { return slices.Clone(m.box.limits) }

// Paused implements machine.Machine. A fake machine is never paused.
func (m *Machine) Paused() <-chan string { return m.paused }

// Resume implements machine.Machine.
func (m *Machine) Resume(context.Context) error { return nil }

// Done implements machine.Machine.
func (m *Machine) Done() <-chan struct{} { return m.box.done }

// Reason implements machine.Machine.
func (m *Machine) Reason() string {
	if closed(m.box.done) {
		return "the guest ended"
	}
	return ""
}

// Console implements machine.Machine.
func (m *Machine) Console() string { return m.box.console.String() }

// Destroy implements machine.Machine.
func (m *Machine) Destroy(ctx context.Context) error {
	if !m.leave() {
		return nil
	}
	if err := m.driver.remove(ctx, m.box.spec.Dir, m.box); err != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.gone = false // it may be tried again
		return err
	}
	return nil
}

// Release implements machine.Machine.
func (m *Machine) Release() {
	if !m.leave() {
		return
	}
	m.driver.mu.Lock()
	defer m.driver.mu.Unlock()
	delete(m.driver.held, m.box.spec.Dir)
}

func (m *Machine) leave() (first bool) {
	m.mu.Lock()
	first = !m.gone
	m.gone = true
	m.mu.Unlock()
	if conn := m.Wire(); first && conn != nil {
		conn.Close()
	}
	return first
}

const consoleMost = 16 << 10

// console keeps the end of what is written.
type console struct {
	mu   sync.Mutex
	text []byte
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, p...)
	c.text = c.text[max(0, len(c.text)-consoleMost):]
	return len(p), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}
