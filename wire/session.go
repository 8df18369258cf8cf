// Package wire joins the node and a machine by one multiplexed stream, and
// signs and verifies the HTTP requests that reach the node.
//
// The machine at the other end is hostile: whatever it sends has a size limit
// and a deadline, the streams that it may hold are counted, and one that it
// stalls stalls no other. Neither end is trusted for being connected; packages
// above it exchange signed permits.
//
// A session has no timers of its own: a machine may be paused, and its host
// suspended, for hours, and the session goes on afterwards. The death of either
// end shows at once as the end of the connection below. What a caller waits for
// it bounds itself, by a context or a deadline, which this package keeps even
// while the connection is stuck.
package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

// limits of a session. One hostile end makes the other hold at most
// (incoming + backlog + outgoing) * window bytes, about 208 MiB, twice that while
// buffers grow, beside calls * MaxCall, 32 MiB, where calls are served, and the
// replies that were asked for, each up to the limit that its caller names; an
// ordinary session holds some hundred KiB.
type limits struct {
	incoming int           // streams opened by the other end and not yet ended by both
	outgoing int           // streams opened by this end and not yet ended by both
	backlog  int           // streams that wait for their turn; the rest is reset
	calls    int           // calls of the other end that are served at once
	header   time.Duration // from a stream's opening to its whole header
	linger   time.Duration // from our Close to the other end's, then the stream is reset
}

var defaultLimits = limits{incoming: 512, outgoing: 256, backlog: 64, header: time.Minute, linger: 10 * time.Minute}

const (
	maxHeader    = 64 << 10  // bytes of a stream's first frame
	streamWindow = 256 << 10 // bytes in flight per stream and direction; yamux's least
)

// ErrClosed is returned, possibly with a cause, once the session has ended.
var ErrClosed = errors.New("wire: session closed")

// Session is one end of a machine's wire. All methods may be called at once.
type Session struct {
	mux      *yamux.Session
	begun    chan struct{} // closed when mux is set: yamux reads before it is
	conn     *guard        // below mux
	limits   limits
	accepted chan *Stream
	incoming chan struct{} // holds one token for each living stream
	outgoing chan struct{}
	conns    sync.Map // of all living streams: id -> *conn
	calls    *calls

	mu     sync.Mutex
	closed bool  // by Close
	cause  error // where it ended before Close
	work   sync.WaitGroup
}

// Host returns the node's end of the wire over conn and takes conn over. Closing
// conn must end the reads and writes that wait on it.
func Host(conn io.ReadWriteCloser) (*Session, error) {
	return newSession(conn, yamux.Client, defaultLimits)
}

// Guest returns the machine's end of the wire over conn and takes conn over, as
// Host does. It alone serves calls.
func Guest(conn io.ReadWriteCloser) (*Session, error) {
	l := defaultLimits
	l.calls = l.incoming
	return newSession(conn, yamux.Server, l)
}

func newSession(below io.ReadWriteCloser, end func(io.ReadWriteCloser, *yamux.Config) (*yamux.Session, error), l limits) (*Session, error) {
	s := &Session{
		limits:   l,
		begun:    make(chan struct{}),
		accepted: make(chan *Stream),
		incoming: make(chan struct{}, l.incoming),
		outgoing: make(chan struct{}, l.outgoing),
		calls:    newCalls(),
	}
	s.conn = &guard{conn: below, stopped: func(id uint32) {
		if c, ok := s.conns.Load(id); ok {
			c.(*conn).stopSending()
		}
	}, called: s.takeCall}
	var err error
	if s.mux, err = end(s.conn, muxConfig(l)); err != nil {
		return nil, fmt.Errorf("wire: %w", err)
	}
	close(s.begun)
	s.spawn(s.acceptLoop)
	return s, nil
}

// muxConfig switches off every timer of yamux 0.1.2 that ends a session or spoils
// a stream when the other end does not move:
//
//   - keepalive (30 s): ends the session when a ping is not answered in
//     ConnectionWriteTimeout. Its interval must still be positive.
//   - StreamOpenTimeout (75 s): ends the session when a stream is not
//     acknowledged. 0 switches it off.
//   - ConnectionWriteTimeout (10 s): every frame that could not be written
//     fails, after which the windows of that stream disagree. 0 would fail at
//     once, so it is set beyond any use; deadlines are kept by conn.
//   - StreamCloseTimeout: resets only the one stream that this end has closed and
//     the other has not. It stays on, or such streams would never end. 0 switches
//     it off.
func muxConfig(l limits) *yamux.Config {
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.StreamOpenTimeout = 0
	config.ConnectionWriteTimeout = 365 * 24 * time.Hour
	config.StreamCloseTimeout = l.linger
	config.MaxStreamWindowSize = streamWindow
	config.AcceptBacklog = l.backlog
	config.LogOutput = io.Discard
	return config
}

// spawn runs f in a goroutine that Close waits for. After Close, when nothing
// waits any longer, it runs f itself.
func (s *Session) spawn(f func()) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		f()
		return
	}
	s.work.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.work.Done()
		f()
	}()
}

// acceptLoop reads the header of each new stream in a goroutine of its own, so
// that one which sends none delays nobody. While too many streams live it takes
// no more: they wait in the backlog, then they are reset.
func (s *Session) acceptLoop() {
	defer s.calls.stop()
	for {
		select {
		case s.incoming <- struct{}{}:
		case <-s.Done():
			return
		}
		mux, err := s.mux.AcceptStream()
		if err != nil {
			return
		}
		conn := newConn(s, mux, s.incoming)
		s.spawn(func() {
			stream, err := s.readHeader(conn)
			if err != nil {
				conn.Close()
				return
			}
			select {
			case s.accepted <- stream:
			case <-s.Done():
				conn.Close()
			}
		})
	}
}

func (s *Session) readHeader(conn *conn) (*Stream, error) {
	stream := &Stream{Conn: conn}
	conn.SetReadDeadline(time.Now().Add(s.limits.header))
	defer conn.SetReadDeadline(time.Time{})
	var first header
	if err := stream.RecvJSON(FrameJSON, maxHeader, &first); err != nil {
		return nil, err
	}
	stream.Kind, stream.Header = first.Kind, first.Header
	return stream, nil
}

// header is a stream's first frame.
type header struct {
	Kind   string          `json:"kind"`
	Header json.RawMessage `json:"header,omitempty"`
}

// Open starts a stream of a kind; header is marshalled to JSON of at most 64 KiB.
// It waits, as long as ctx allows, while the connection is stuck or 256 streams
// that this end opened still live: a stream lives until both ends have closed it.
func (s *Session) Open(ctx context.Context, kind string, head any) (*Stream, error) {
	stream, err := s.open(ctx, kind, head)
	if err != nil {
		return nil, fmt.Errorf("wire: opening a %s stream: %w", kind, err)
	}
	return stream, nil
}

func (s *Session) open(ctx context.Context, kind string, head any) (*Stream, error) {
	raw, err := json.Marshal(head)
	if err != nil {
		return nil, err
	}
	first, err := json.Marshal(header{kind, raw})
	if err != nil {
		return nil, err
	}
	if len(first) > maxHeader {
		return nil, fmt.Errorf("header of %d bytes, at most %d", len(first), maxHeader)
	}
	conn, err := s.openConn(ctx)
	if err != nil {
		return nil, err
	}
	stream := &Stream{Conn: conn, Kind: kind}
	stop := context.AfterFunc(ctx, func() { conn.SetWriteDeadline(past) })
	err = stream.Send(FrameJSON, first)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return stream, nil
}

// openConn leaves the waiting for a stuck connection to a goroutine that holds
// the stream's token, so that a caller who tries again and again to reach a
// stopped machine gathers no more of them than there are tokens.
func (s *Session) openConn(ctx context.Context) (*conn, error) {
	if err := s.takeOutgoing(ctx); err != nil {
		return nil, err
	}
	type opened struct {
		conn *conn
		err  error
	}
	result := make(chan opened)
	s.spawn(func() {
		var r opened
		mux, err := s.mux.OpenStream()
		if err != nil {
			<-s.outgoing
			r.err = s.explain(err)
		} else {
			r.conn = newConn(s, mux, s.outgoing)
		}
		select {
		case result <- r:
			return
		case <-ctx.Done():
		case <-s.Done():
		}
		if r.conn != nil {
			r.conn.Close()
		}
	})
	select {
	case r := <-result:
		return r.conn, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-s.Done():
		return nil, s.Err()
	}
}

// takeOutgoing waits for a token of what this end begins.
func (s *Session) takeOutgoing(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case s.outgoing <- struct{}{}:
		return nil
	default:
	}
	select {
	case s.outgoing <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d streams and calls are open: %w", s.limits.outgoing, context.Cause(ctx))
	case <-s.Done():
		return s.Err()
	}
}

// Accept returns the next stream that the other end opened. It returns ErrClosed
// with the cause when the session has ended.
func (s *Session) Accept() (*Stream, error) {
	select {
	case stream := <-s.accepted:
		return stream, nil
	case <-s.Done():
		return nil, s.Err()
	}
}

// Done is closed when the session has ended, by either end.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Err is nil while the session lives, then ErrClosed with what ended it.
func (s *Session) Err() error {
	select {
	case <-s.Done():
	default:
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil && s.closed {
		return ErrClosed
	}
	for s.cause == nil {
		// yamux tells the cause only here, after streams that nobody took.
		_, err := s.mux.AcceptStream()
		switch {
		case err == nil || errors.Is(err, yamux.ErrSessionShutdown):
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
			s.cause = fmt.Errorf("%w by the other end", ErrClosed)
		default:
			s.cause = fmt.Errorf("%w: %w", ErrClosed, err)
		}
	}
	return s.cause
}

// explain turns yamux's word for a session that ended into ours.
func (s *Session) explain(err error) error {
	if ended := s.Err(); ended != nil {
		return ended
	}
	return err
}

// Close ends the session and every stream in it, and returns when all that the
// session started has stopped.
func (s *Session) Close() error {
	alive := s.Err() == nil // or else its cause is kept
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	// The connection goes first: yamux, closed from above, lets its readers spin
	// until it has noticed that the connection has ended.
	err := s.conn.Close()
	<-s.Done()
	s.mux.Close() // has been closed; waits until that is complete
	s.work.Wait()
	if alive {
		return err
	}
	return nil
}
