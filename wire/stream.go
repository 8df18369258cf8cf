package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
)

// Stream is one stream of a session: bytes both ways, or frames. Use one form
// in each direction, not both.
//
// Close ends both directions and never waits: what was written before still
// arrives, then the end; a writer at the other end fails with EPIPE. With frames
// there is no half close, a frame says that no more will follow.
type Stream struct {
	net.Conn
	Kind   string          // set by who opened it
	Header json.RawMessage // on the accepting side

	send    sync.Mutex
	sendErr error // a frame was sent in part
	recvErr error // a frame was received in part
}

// NewStream makes a stream for frames over any connection.
func NewStream(conn net.Conn) *Stream { return &Stream{Conn: conn} }

// CloseWrite ends our direction of raw bytes: the other end reads EOF and may go
// on sending, through a session for ten minutes at most. Relay calls it. It is an
// error where the connection cannot do that.
func (s *Stream) CloseWrite() error {
	if !endWriting(s.Conn) {
		return errors.ErrUnsupported
	}
	return nil
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

const (
	frameHeader = 5
	recvFirst   = 64 << 10 // what a frame's length alone makes us allocate
)

// Send writes one frame: kind, length (uint32, big endian), payload. Safe for
// concurrent use. After an error within a frame every later Send fails with it.
func (s *Stream) Send(kind Frame, payload []byte) error {
	if int64(len(payload)) > math.MaxInt32 {
		return fmt.Errorf("wire: frame of %d bytes, at most %d", len(payload), math.MaxInt32)
	}
	frame := make([]byte, frameHeader+len(payload))
	frame[0] = byte(kind)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	copy(frame[frameHeader:], payload)
	s.send.Lock()
	defer s.send.Unlock()
	if s.sendErr != nil {
		return s.sendErr
	}
	_, err := s.Write(frame)
	s.sendErr = err
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

// Recv reads one frame whose payload has at most limit bytes; one goroutine at a
// time. io.EOF means that the other end closed between frames. A deadline that
// passes between frames leaves the stream whole; any other error stays.
func (s *Stream) Recv(limit int) (Frame, []byte, error) {
	if s.recvErr != nil {
		return 0, nil, s.recvErr
	}
	var head [frameHeader]byte
	if n, err := io.ReadFull(s.Conn, head[:]); err != nil {
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			s.recvErr = err
		}
		return 0, nil, err
	}
	kind, size := Frame(head[0]), binary.BigEndian.Uint32(head[1:])
	if int64(size) > int64(limit) {
		s.recvErr = fmt.Errorf("wire: frame %q of %d bytes, at most %d", kind, size, limit)
		return 0, nil, s.recvErr
	}
	payload, err := s.payload(int(size))
	if err != nil {
		s.recvErr = fmt.Errorf("wire: frame %q of %d bytes ends after %d: %w", kind, size, len(payload), err)
		return 0, nil, s.recvErr
	}
	return kind, payload, nil
}

// payload makes room as bytes arrive: a length alone costs its sender nothing.
func (s *Stream) payload(size int) ([]byte, error) {
	payload := make([]byte, 0, min(size, recvFirst))
	for {
		n, err := io.ReadFull(s.Conn, payload[len(payload):cap(payload)])
		payload = payload[:len(payload)+n]
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil || len(payload) == size {
			return payload, err
		}
		grown := make([]byte, len(payload), min(size, 2*cap(payload)))
		copy(grown, payload)
		payload = grown
	}
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

// endWriting reports whether it could tell the other end of conn, and nobody
// else, that no more will come.
func endWriting(conn net.Conn) bool {
	half, ok := conn.(interface{ CloseWrite() error })
	return ok && half.CloseWrite() == nil
}
