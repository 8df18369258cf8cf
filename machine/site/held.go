package site

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"cal/internal/process"
	"cal/machine"
)

// StartTimeout is for a start whose context has no deadline. Of what the machine is made
// may take longer, and is made before.
const StartTimeout = 60 * time.Second

// StartContext is ctx with a deadline, StartTimeout from now where it has none.
func StartContext(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, StartTimeout)
}

// Clear ends all that runs for the machine of a directory and deletes what was made for it,
// the record last.
type Clear func(ctx context.Context, dir string) error

// Create is a driver's Create: start makes a machine in dir, whose lock it is given. Where
// it fails the directory is as it was before.
func Create[M machine.Machine](ctx context.Context, dir string, clear Clear, start func(lock io.Closer) (M, error)) (machine.Machine, error) {
	lock, err := claim(ctx, dir)
	if err != nil {
		return nil, err
	}
	m, err := start(lock)
	if err == nil {
		return m, nil
	}
	// What ended the start must not end the cleaning up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), process.EndTimeout)
	defer cancel()
	return nil, errors.Join(err, clear(ctx, dir), unlock(dir, lock))
}

// Adopted is a machine that was found, with a Held in it.
type Adopted interface {
	machine.Machine
	Give(wire net.Conn)
}

// Adopt is a driver's Adopt: load reads the record of dir, find looks for what runs.
func Adopt[R any, M Adopted](ctx context.Context, dir string, load func(dir string) (R, error), find func(record R, lock io.Closer) (M, error)) (machine.Machine, error) {
	record, err := load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, gone(dir)
	}
	if err != nil {
		return nil, err
	}
	lock, err := Lock(ctx, dir)
	if err != nil {
		return nil, err
	}
	m, err := find(record, lock)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	conn, err := m.Rewire(ctx)
	if err != nil {
		m.Release()
		return nil, err
	}
	m.Give(conn)
	return m, nil
}

// Remove is a driver's Remove.
func Remove(ctx context.Context, dir string, clear Clear) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := Lock(ctx, dir)
	if err != nil {
		return err
	}
	if err := clear(ctx, dir); err != nil {
		lock.Close()
		return err
	}
	return Discard(dir, lock)
}

func gone(dir string) error { return fmt.Errorf("%s: %w", dir, machine.ErrGone) }

// Held is a machine that this process holds, as far as that is alike for all drivers: its
// directory's lock, the wire until somebody takes it, and how it ends. It is a part of a
// driver's Machine.
type Held struct {
	dir    string
	lock   io.Closer
	clear  Clear
	letGo  func()
	paused chan string
	done   chan struct{}

	removal  sync.Mutex // of Destroy and Release, one after the other
	mu       sync.Mutex
	wire     net.Conn
	reason   string
	died     bool
	released bool
	removed  bool // Destroy has removed everything
}

// Hold begins to hold the machine of dir. letGo, which is called once, ends this process's
// part and waits for it; Died may be called until it returns.
func Hold(dir string, lock io.Closer, clear Clear, letGo func()) *Held {
	return &Held{dir: dir, lock: lock, clear: clear, letGo: letGo, paused: make(chan string, 1), done: make(chan struct{})}
}

// Give hands in the wire that Wire returns.
func (h *Held) Give(wire net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wire = wire
}

// Wire implements machine.Machine.
func (h *Held) Wire() net.Conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	conn := h.wire
	h.wire = nil
	return conn
}

// Alive calls do while the machine runs and is held, else the error wraps machine.ErrGone. do
// must be quick; it may be nil.
func (h *Held) Alive(do func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.died:
		return fmt.Errorf("%w: %s", gone(h.dir), h.reason)
	case h.released || h.removed:
		return gone(h.dir)
	case do != nil:
		return do()
	}
	return nil
}

// Died says that the machine has ended, and why: what was said first stays.
func (h *Held) Died(reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.died {
		return
	}
	h.died = true
	if h.reason == "" {
		h.reason = reason
	}
	close(h.done)
}

// Pause tells that the machine was stopped.
func (h *Held) Pause(reason string) {
	select {
	case h.paused <- reason:
	default:
	}
}

// Paused implements machine.Machine.
func (h *Held) Paused() <-chan string { return h.paused }

// Done implements machine.Machine.
func (h *Held) Done() <-chan struct{} { return h.done }

// Reason implements machine.Machine.
func (h *Held) Reason() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reason
}

// Destroy implements machine.Machine. A second one waits for the first.
func (h *Held) Destroy(ctx context.Context) error {
	h.removal.Lock()
	defer h.removal.Unlock()
	if !h.begin("destroyed") {
		return nil
	}
	if err := h.clear(ctx, h.dir); err != nil {
		return err
	}
	<-h.done
	h.mu.Lock()
	h.removed = true
	h.mu.Unlock()
	h.leave()
	return Discard(h.dir, h.lock)
}

// begin says whether the machine is still held, and if so why it is about to end.
func (h *Held) begin(reason string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.removed || h.released {
		return false
	}
	if h.reason == "" {
		h.reason = reason
	}
	return true
}

// Release implements machine.Machine.
func (h *Held) Release() {
	h.removal.Lock()
	defer h.removal.Unlock()
	h.mu.Lock()
	first := !h.released && !h.removed
	h.released = h.released || first
	h.mu.Unlock()
	if first {
		h.leave()
		h.lock.Close()
	}
}

func (h *Held) leave() {
	if conn := h.Wire(); conn != nil {
		conn.Close()
	}
	h.letGo()
}
