package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// The frames of yamux (its spec.md): version, type, flags, stream id, length.
const (
	muxHeader  = 12
	muxData    = 0
	muxWindow  = 1
	muxGoAway  = 3
	muxReset   = 8    // flag
	muxStop    = 0x10 // flag of ours, which yamux passes over
	maxReading = 64 << 10
)

// guard stands between yamux and the connection.
//
// Reading, it lets through only what the other end of a session of this package
// sends: no pings, for which yamux would start a goroutine each, and no data or
// window larger than a stream's. What else arrives ends the session. The frames of
// calls, which yamux does not know, it takes out.
//
// Writing, it joins a frame's header with its body, which yamux writes apart.
//
// It can ask the other end to stop sending on a stream, and reset a stream, for
// which yamux has no call: it tells the other end so, and yamux here as if the
// other end had said it.
type guard struct {
	conn    io.ReadWriteCloser
	stopped func(id uint32) // the other end asks to stop; must not block
	called  func(kind byte, flags uint16, id uint32, body []byte) error

	read []byte // for yamux, and not yet asked for
	buf  []byte
	head [muxHeader]byte // of the frame that is arriving
	have int             // bytes in head
	body uint32          // bytes of the body still to come
	call []byte          // of the call's frame that is arriving; nil: the body is yamux's

	callBuf []byte // to be used again

	mu     sync.Mutex
	resets []byte // frames for yamux here

	write sync.Mutex
	out   []byte // a header that waits for its body
	frame []byte // of a call, to be used again
}

// Read is called by one goroutine.
func (g *guard) Read(p []byte) (int, error) {
	for len(g.read) == 0 {
		if g.have == 0 && g.body == 0 { // between frames
			if g.read = g.takeResets(); len(g.read) > 0 {
				break
			}
		}
		if g.buf == nil {
			g.buf = make([]byte, muxHeader+maxReading)
		}
		n, err := g.conn.Read(g.buf[muxHeader:])
		if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
			g.wake(time.Time{}) // it was reset that woke us
			continue
		}
		if n == 0 {
			if g.have > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		// An error beside data comes back with the next read.
		if g.read, err = g.inspect(g.buf[muxHeader : muxHeader+n]); err != nil {
			return 0, err
		}
	}
	n := copy(p, g.read)
	g.read = g.read[n:]
	return n, nil
}

func (g *guard) takeResets() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	taken := g.resets
	g.resets = nil
	return taken
}

// wake ends a Read that waits, by a deadline that has gone by, where the
// connection has deadlines. Elsewhere a reset takes effect here with the next
// bytes that arrive.
func (g *guard) wake(at time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !at.IsZero() && len(g.resets) == 0 {
		return // taken already
	}
	if conn, ok := g.conn.(interface{ SetReadDeadline(time.Time) error }); ok {
		conn.SetReadDeadline(at)
	}
}

// stop asks the other end to send no more on a stream. Unlike a reset it takes
// nothing away: what was sent to the other end can still be read there.
func (g *guard) stop(id uint32) { g.control(id, muxStop) }

// reset ends a stream at both ends, whatever they are doing.
func (g *guard) reset(id uint32) {
	g.mu.Lock()
	g.resets = append(g.resets, controlFrame(id, muxReset)...)
	g.mu.Unlock()
	g.wake(past)
	g.control(id, muxReset)
}

func (g *guard) control(id uint32, flag uint16) {
	g.write.Lock()
	defer g.write.Unlock()
	_, _ = g.conn.Write(controlFrame(id, flag)) // an error comes back to yamux with its next frame
}

// controlFrame is an update of a stream's window by nothing, with a flag.
func controlFrame(id uint32, flag uint16) []byte {
	frame := make([]byte, muxHeader)
	frame[1] = muxWindow
	binary.BigEndian.PutUint16(frame[2:], flag)
	binary.BigEndian.PutUint32(frame[4:], id)
	return frame
}

// inspect returns what of p is for yamux, in buf. It needs room before p for one
// header: of a header that came in two reads nothing has been handed on before.
func (g *guard) inspect(p []byte) ([]byte, error) {
	out := g.buf[:0]
	for len(p) > 0 {
		if g.body > 0 {
			n := min(uint32(len(p)), g.body)
			if g.call == nil {
				out = append(out, p[:n]...)
			} else {
				g.call = append(g.call, p[:n]...)
			}
			g.body -= n
			p = p[n:]
			if err := g.endCall(); err != nil {
				return nil, err
			}
			continue
		}
		n := copy(g.head[g.have:], p)
		g.have += n
		p = p[n:]
		if g.have < muxHeader {
			break
		}
		g.have = 0
		forMux, err := g.header()
		if err != nil {
			return nil, err
		}
		if forMux {
			out = append(out, g.head[:]...)
		} else if err := g.endCall(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// header judges the header of a frame that has arrived.
func (g *guard) header() (forMux bool, err error) {
	version, kind, length := g.head[0], g.head[1], binary.BigEndian.Uint32(g.head[8:])
	switch {
	case version != 0:
		return false, fmt.Errorf("the other end speaks something else (version %d)", version)
	case kind == muxData && length <= streamWindow:
		g.body = length
	case kind == muxWindow && length <= streamWindow:
		if binary.BigEndian.Uint16(g.head[2:])&muxStop != 0 {
			g.stopped(binary.BigEndian.Uint32(g.head[4:]))
		}
	case kind == muxGoAway:
	case kind == muxCall && length <= MaxCall, kind == muxReply && length <= chunk:
		g.body = length
		if g.callBuf == nil {
			g.callBuf = make([]byte, 0, smallRead)
		}
		g.call = g.callBuf[:0]
		return false, nil
	default:
		return false, fmt.Errorf("the other end sent a frame of type %d and length %d", kind, length)
	}
	return true, nil
}

// endCall hands a call's frame over when it is whole.
func (g *guard) endCall() error {
	if g.call == nil || g.body > 0 {
		return nil
	}
	body := g.call
	g.callBuf, g.call = body, nil
	return g.called(g.head[1], binary.BigEndian.Uint16(g.head[2:]), binary.BigEndian.Uint32(g.head[4:]), body)
}

// Write is called by one goroutine, with a frame's header and then its body.
func (g *guard) Write(p []byte) (int, error) {
	g.write.Lock()
	defer g.write.Unlock()
	if len(g.out) == 0 && len(p) == muxHeader && p[1] == muxData && binary.BigEndian.Uint32(p[8:]) > 0 {
		g.out = append(g.out, p...)
		return len(p), nil
	}
	if len(g.out) == 0 {
		return g.conn.Write(p)
	}
	g.out = append(g.out, p...)
	_, err := g.conn.Write(g.out)
	g.out = g.out[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (g *guard) Close() error { return g.conn.Close() }
