// Package wire joins the node and a machine by one multiplexed stream, and
// signs and verifies the HTTP requests that reach the node.
//
// The machine at the other end is hostile: whatever it sends has a size limit
// and a deadline, and a stream that it stalls stalls no other. Neither end is
// trusted for being connected; packages above it exchange signed permits.
package wire

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	maxHeader     = 64 << 10         // bytes of a stream's first frame
	headerTimeout = 10 * time.Second // from a stream's opening to its whole header
	streamWindow  = 1 << 20          // bytes in flight per stream and direction
	acceptBacklog = 256
)

// ErrClosed is returned once the session has ended.
var ErrClosed = errors.New("wire: session closed")

// Session is one end of a machine's wire. All methods may be called at once.
type Session struct {
	mux      *yamux.Session
	accepted chan *Stream
	readers  sync.WaitGroup
}

// Host returns the node's end of the wire over conn and takes conn over.
func Host(conn io.ReadWriteCloser) (*Session, error) { return newSession(conn, yamux.Client) }

// Guest returns the machine's end of the wire over conn and takes conn over.
func Guest(conn io.ReadWriteCloser) (*Session, error) { return newSession(conn, yamux.Server) }

func newSession(conn io.ReadWriteCloser, end func(io.ReadWriteCloser, *yamux.Config) (*yamux.Session, error)) (*Session, error) {
	config := yamux.DefaultConfig()
	// A machine may be stopped or its host suspended for hours; the death of
	// either end shows as EOF, so liveness needs no timer.
	config.EnableKeepAlive = false
	config.StreamOpenTimeout = 0
	config.StreamCloseTimeout = 0
	config.ConnectionWriteTimeout = 365 * 24 * time.Hour
	config.MaxStreamWindowSize = streamWindow
	config.AcceptBacklog = acceptBacklog
	config.LogOutput = io.Discard
	mux, err := end(conn, config)
	if err != nil {
		return nil, fmt.Errorf("wire: %w", err)
	}
	s := &Session{mux: mux, accepted: make(chan *Stream)}
	s.readers.Add(1)
	go s.acceptLoop()
	return s, nil
}

// acceptLoop reads the header of each new stream in a goroutine of its own, so
// that one which sends none delays nobody.
func (s *Session) acceptLoop() {
	defer s.readers.Done()
	for {
		conn, err := s.mux.AcceptStream()
		if err != nil {
			return
		}
		s.readers.Add(1)
		go func() {
			defer s.readers.Done()
			stream, err := readHeader(conn)
			if err != nil {
				conn.Close()
				return
			}
			select {
			case s.accepted <- stream:
			case <-s.mux.CloseChan():
				conn.Close()
			}
		}()
	}
}

// Open starts a stream of a kind; header is marshalled to JSON of at most 64 KiB.
func (s *Session) Open(ctx context.Context, kind string, header any) (*Stream, error) {
	first, err := json.Marshal(struct {
		Kind   string `json:"kind"`
		Header any    `json:"header,omitempty"`
	}{kind, header})
	if err != nil {
		return nil, err
	}
	if len(first) > maxHeader {
		return nil, fmt.Errorf("wire: header of %d bytes, at most %d", len(first), maxHeader)
	}
	conn, err := s.mux.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("wire: opening a %s stream: %w", kind, err)
	}
	stream := &Stream{Conn: conn, Kind: kind}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetWriteDeadline(deadline)
		defer conn.SetWriteDeadline(time.Time{})
	}
	if err := stream.Send(FrameJSON, first); err != nil {
		conn.Close()
		return nil, fmt.Errorf("wire: opening a %s stream: %w", kind, err)
	}
	return stream, nil
}

// Accept returns the next stream that the other end opened. It returns
// ErrClosed when the session has ended.
func (s *Session) Accept() (*Stream, error) {
	select {
	case stream := <-s.accepted:
		return stream, nil
	case <-s.mux.CloseChan():
		return nil, ErrClosed
	}
}

// Done is closed when the session has ended, by either end.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Close ends the session and every stream in it.
func (s *Session) Close() error {
	err := s.mux.Close()
	s.readers.Wait()
	return err
}

// Stream is one stream of a session: bytes both ways, or frames. Use one form
// in each direction, not both.
type Stream struct {
	net.Conn
	Kind   string          // set by who opened it
	Header json.RawMessage // on the accepting side
	send   sync.Mutex
}

// NewStream makes a stream for frames over any connection.
func NewStream(conn net.Conn) *Stream { return &Stream{Conn: conn} }

func readHeader(conn net.Conn) (*Stream, error) {
	stream := &Stream{Conn: conn}
	conn.SetReadDeadline(time.Now().Add(headerTimeout))
	defer conn.SetReadDeadline(time.Time{})
	kind, payload, err := stream.Recv(maxHeader)
	if err != nil {
		return nil, err
	}
	var first struct {
		Kind   string          `json:"kind"`
		Header json.RawMessage `json:"header"`
	}
	if kind != FrameJSON {
		return nil, fmt.Errorf("wire: first frame is of kind %q", kind)
	}
	if err := json.Unmarshal(payload, &first); err != nil {
		return nil, fmt.Errorf("wire: header: %w", err)
	}
	stream.Kind, stream.Header = first.Kind, first.Header
	return stream, nil
}

// Frame is the kind of a frame.
type Frame byte

// The kinds of frames.
const (
	FrameJSON   Frame = 'j' // a message; which one depends on its place
	FrameStdin  Frame = 'i' // to a command; empty = end of input
	FrameStdout Frame = 'o' // from a command or terminal
	FrameStderr Frame = 'e'
	FrameSize   Frame = 'w' // terminal size: {"rows", "cols"}
	FrameSignal Frame = 's' // signal name: "INT", "TERM", "HUP", "QUIT", "KILL"
	FrameResult Frame = 'r' // the last frame of a call
	FrameData   Frame = 'd' // a piece of a file or pack; empty = its end
)

// Send writes one frame: kind, length (uint32, big endian), payload. Safe for
// concurrent use.
func (s *Stream) Send(kind Frame, payload []byte) error {
	if int64(len(payload)) > 1<<31 {
		return fmt.Errorf("wire: frame of %d bytes", len(payload))
	}
	frame := make([]byte, 5+len(payload))
	frame[0] = byte(kind)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	copy(frame[5:], payload)
	s.send.Lock()
	defer s.send.Unlock()
	_, err := s.Write(frame)
	return err
}

// SendJSON sends v as one frame.
func (s *Stream) SendJSON(kind Frame, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.Send(kind, payload)
}

// Recv reads one frame whose payload has at most limit bytes. io.EOF means that
// the other end closed between frames.
func (s *Stream) Recv(limit int) (Frame, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(s.Conn, head[:]); err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(head[1:])
	if int64(size) > int64(limit) {
		return 0, nil, fmt.Errorf("wire: frame %q of %d bytes, at most %d", head[0], size, limit)
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(s.Conn, payload); err != nil {
		return 0, nil, fmt.Errorf("wire: frame %q: %w", head[0], err)
	}
	return Frame(head[0]), payload, nil
}

// RecvJSON reads one frame of a kind into v.
func (s *Stream) RecvJSON(want Frame, limit int, v any) error {
	kind, payload, err := s.Recv(limit)
	if err != nil {
		return err
	}
	if kind != want {
		return fmt.Errorf("wire: frame %q, want %q", kind, want)
	}
	return json.Unmarshal(payload, v)
}
