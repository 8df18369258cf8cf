package wire

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	chunk      = 32 << 10 // the most that one write puts before another stream's
	smallRead  = 4 << 10
	lingerRead = 4 * streamWindow // what is taken and dropped after Close
)

// past is a deadline that has gone by.
var past = time.Unix(1, 0)

// conn is one stream of a session as a net.Conn that keeps the contract of
// net.Conn, which yamux does not: there, Close leaves reads waiting; reads, writes
// and Close wait past every deadline while the connection below is stuck; and a
// session that ended looks like an orderly end of the stream. So each call to
// yamux runs in a goroutine of the session, and the caller waits for it as long
// as its deadline allows.
type conn struct {
	session *Session
	mux     *yamux.Stream
	token   chan struct{} // where the stream's token goes back

	closing    sync.Once
	closed     chan struct{} // here
	stopping   sync.Once
	stopped    chan struct{} // by the other end, which takes no more
	readUntil  deadline
	writeUntil deadline

	read    sync.Mutex // held by Read
	buf     []byte
	rest    []byte      // of buf: read and not yet asked for
	filled  chan result // of the call that fills buf
	filling bool
	full    bool // buf was filled whole
	readErr error

	write    sync.Mutex  // held by Write
	piece    []byte      // on its way
	wrote    chan result // of the call that writes piece
	writing  bool
	writeErr error

	half      sync.Mutex
	ended     bool // our direction, by CloseWrite
	endedTime time.Time
}

type result struct {
	n   int
	err error
}

func newConn(s *Session, mux *yamux.Stream, token chan struct{}) *conn {
	c := &conn{
		session: s, mux: mux, token: token,
		closed:  make(chan struct{}),
		stopped: make(chan struct{}),
		filled:  make(chan result, 1),
		wrote:   make(chan result, 1),
	}
	s.conns.Store(mux.StreamID(), c)
	c.readUntil.set(time.Time{})
	c.writeUntil.set(time.Time{})
	return c
}

// errStopped is what a writer sees when the other end has closed the stream.
var errStopped = fmt.Errorf("wire: the other end has closed the stream: %w", syscall.EPIPE)

// await waits for the result of a call to yamux until the deadline, or until
// nobody wants it any longer.
func (c *conn) await(d *deadline, ready <-chan result, stopped <-chan struct{}) (result, error) {
	for {
		until, changed := d.get()
		var fired <-chan time.Time
		if !until.IsZero() {
			left := time.Until(until)
			if left <= 0 {
				return result{}, os.ErrDeadlineExceeded
			}
			timer := time.NewTimer(left)
			defer timer.Stop()
			fired = timer.C
		}
		select {
		case r := <-ready:
			return r, nil
		case <-fired:
			return result{}, os.ErrDeadlineExceeded
		case <-c.closed:
			return result{}, net.ErrClosed
		case <-stopped:
			return result{}, errStopped
		case <-changed:
		}
	}
}

// Read returns what has arrived. After a deadline it can be called again:
// nothing is lost.
func (c *conn) Read(p []byte) (int, error) {
	c.read.Lock()
	defer c.read.Unlock()
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	if len(c.rest) == 0 {
		if c.readErr != nil {
			return 0, c.readErr
		}
		if len(p) == 0 {
			return 0, nil
		}
		if !c.filling {
			if c.buf == nil {
				c.buf = make([]byte, smallRead)
			} else if c.full {
				c.buf = make([]byte, chunk) // more than a message now and then
			}
			c.filling = true
			c.session.spawn(func() {
				n, err := c.mux.Read(c.buf)
				c.filled <- result{n, err}
			})
		}
		r, err := c.await(&c.readUntil, c.filled, nil)
		if err != nil {
			return 0, err
		}
		c.filling = false
		c.rest, c.readErr = c.buf[:r.n], c.readError(r.err)
		c.full = r.n == smallRead && len(c.buf) == smallRead
		if r.n == 0 {
			return 0, c.readErr
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *conn) readError(err error) error {
	if err == nil {
		return nil
	}
	if ended := c.session.Err(); ended != nil {
		return ended // yamux says EOF, as if the stream were complete
	}
	c.half.Lock()
	defer c.half.Unlock()
	if c.ended && errors.Is(err, io.EOF) && time.Since(c.endedTime) >= c.session.limits.linger {
		return fmt.Errorf("wire: half-closed for %v: %w", c.session.limits.linger, os.ErrDeadlineExceeded)
	}
	return err
}

// Write takes p in pieces, so that other streams get their turn, and returns when
// they have been given to the connection. A deadline that passes leaves at most
// one piece on its way, which is counted as written: the next Write goes on after
// it, Close drops it.
func (c *conn) Write(p []byte) (int, error) {
	c.write.Lock()
	defer c.write.Unlock()
	total := 0
	for total < len(p) {
		n, err := c.writePiece(p[total:min(len(p), total+chunk)])
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

func (c *conn) writePiece(p []byte) (int, error) {
	if err := c.written(); err != nil {
		return 0, err
	}
	if until, _ := c.writeUntil.get(); !until.IsZero() && time.Until(until) <= 0 {
		return 0, os.ErrDeadlineExceeded
	}
	c.piece = append(c.piece[:0], p...) // p is the caller's again when Write returns
	c.writing = true
	c.session.spawn(func() {
		_, err := c.mux.Write(c.piece)
		c.wrote <- result{0, err}
	})
	return len(p), c.written()
}

// written waits until no piece is on its way.
func (c *conn) written() error {
	if c.writeErr != nil {
		return c.writeErr
	}
	if c.isClosed() {
		return net.ErrClosed
	}
	if c.isStopped() {
		return errStopped
	}
	if !c.writing {
		return nil
	}
	r, err := c.await(&c.writeUntil, c.wrote, c.stopped)
	if err != nil {
		return err
	}
	c.writing = false
	if r.err != nil {
		c.writeErr = c.session.explain(r.err)
		if c.isStopped() {
			c.writeErr = errStopped // what yamux says is only how it ended
		}
	}
	return c.writeErr
}

func (c *conn) isStopped() bool {
	select {
	case <-c.stopped:
		return true
	default:
		return false
	}
}

func (c *conn) isClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// Close ends both directions. It does not wait: what was written before still
// arrives, then the end; what still arrives here is dropped.
func (c *conn) Close() error {
	c.closing.Do(func() {
		close(c.closed)
		c.mux.SetWriteDeadline(past) // ends a write that waits for room
		c.session.spawn(c.linger)
	})
	return nil
}

// stopSending is called when the other end has closed the stream and takes no
// more. What it sent before can still be read.
func (c *conn) stopSending() {
	c.stopping.Do(func() {
		close(c.stopped)
		c.mux.SetWriteDeadline(past) // ends a write that waits for room
	})
}

// linger sends the end and takes what is still on its way here until the other
// end has ended too. One that sends is asked to stop; one that goes on all the
// same is reset; one that does nothing is reset by yamux after limits.linger.
// Then the token is free.
func (c *conn) linger() {
	id := c.mux.StreamID()
	defer func() {
		c.session.conns.Delete(id)
		<-c.token
	}()
	c.mux.Close()
	c.read.Lock() // ends soon: closed is closed
	defer c.read.Unlock()
	total := len(c.rest)
	if c.filling {
		r := <-c.filled
		if r.err != nil {
			return
		}
		total += r.n
	}
	asked, reset := false, false
	for buf := make([]byte, smallRead); ; {
		if total > 0 && !asked {
			asked = true
			c.session.conn.stop(id)
		}
		if total > lingerRead && !reset {
			reset = true
			c.session.conn.reset(id)
		}
		n, err := c.mux.Read(buf)
		if err != nil {
			return
		}
		total += n
	}
}

// CloseWrite ends our direction only: the other end reads EOF and may go on
// sending, for limits.linger at most. Nothing may be written afterwards.
func (c *conn) CloseWrite() error {
	c.write.Lock()
	defer c.write.Unlock()
	if c.writeErr == nil {
		c.writeErr = net.ErrClosed
	}
	c.half.Lock()
	defer c.half.Unlock()
	if !c.ended {
		c.ended, c.endedTime = true, time.Now()
		pending := c.writing
		c.session.spawn(func() {
			if pending {
				<-c.wrote
			}
			c.mux.Close()
		})
	}
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return addr{} }
func (c *conn) RemoteAddr() net.Addr { return addr{} }

func (c *conn) SetDeadline(t time.Time) error {
	c.readUntil.set(t)
	c.writeUntil.set(t)
	return nil
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.readUntil.set(t)
	return nil
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.writeUntil.set(t)
	return nil
}

// addr is the address of both ends: who is there is known by keys, not by place.
type addr struct{}

func (addr) Network() string { return "wire" }
func (addr) String() string  { return "wire" }

// deadline can be changed while somebody waits for it.
type deadline struct {
	mu      sync.Mutex
	until   time.Time
	changed chan struct{}
}

func (d *deadline) set(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed != nil {
		close(d.changed)
	}
	d.until, d.changed = until, make(chan struct{})
}

func (d *deadline) get() (time.Time, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.until, d.changed
}
