package wire

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
)

// A call is a small request with one reply: one frame there, and back as many as
// the reply needs, beside the frames of yamux on the same connection. A stream for
// each would cost both ends ten frames and as many wake-ups, which is most of the
// time that a small operation takes.
//
// Calls need no window: the caller has room for each reply that it waits for, and
// the callee for as many calls as the caller may have open. Replies go out in pieces,
// so that a long one delays nobody.
const (
	muxCall    = 0x20 // a request, whole; with callCancel: nobody waits for its reply
	muxReply   = 0x21 // a piece of a reply
	callCancel = 1    // flag of muxCall
	callMore   = 1    // flag of muxReply: not the last piece

	// MaxCall is the longest request of a call; what is longer needs a stream.
	MaxCall = 64 << 10
)

// calls are those that one end waits for and those that it serves.
type calls struct {
	mu      sync.Mutex
	next    uint32
	waiting map[uint32]*waiting
	serving map[uint32]context.CancelFunc
	handler func(ctx context.Context, request []byte) []byte
	handled chan struct{}   // closed when there is a handler
	idle    chan incoming   // to a goroutine that waits for its next call
	idling  int             // how many do, or will soon
	ctx     context.Context // of all that is served; ends with the session
	stop    context.CancelFunc
}

// waiting is a call without its whole reply. Only the reader of the connection
// touches reply before done is closed.
type waiting struct {
	reply []byte
	limit int
	done  chan struct{}
}

func newCalls() *calls {
	c := &calls{waiting: map[uint32]*waiting{}, serving: map[uint32]context.CancelFunc{}, handled: make(chan struct{}), idle: make(chan incoming)}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c
}

// Handle has f answer the calls of the other end, each in a goroutine of its own.
// The context of one ends when nobody waits for its reply any more. It is called once,
// at the end that Guest made; calls that come before wait for it. The end that Host
// made takes no calls: one ends the session. f must not close the session, which waits
// for it.
func (s *Session) Handle(f func(ctx context.Context, request []byte) []byte) {
	s.calls.handler = f
	close(s.calls.handled)
}

// Call sends a request of at most MaxCall bytes and returns the reply, of at most
// limit bytes: an end that sends more ends the session. It waits as long as ctx
// allows; 256 calls and streams that this end began may live at once, and a call
// lives until its reply has come, even if nobody waits for it any more.
func (s *Session) Call(ctx context.Context, request []byte, limit int) ([]byte, error) {
	if len(request) > MaxCall {
		return nil, fmt.Errorf("wire: call of %d bytes, at most %d", len(request), MaxCall)
	}
	if err := s.takeOutgoing(ctx); err != nil {
		return nil, fmt.Errorf("wire: call: %w", err)
	}
	id, w := s.calls.expect(limit)
	// The connection may be stuck: a goroutine waits for it, as long as it takes.
	failed := make(chan error, 1)
	s.spawn(func() {
		if err := s.conn.send(muxCall, 0, id, request); err != nil {
			failed <- err
		}
	})
	select {
	case <-w.done:
		return w.reply, nil
	case err := <-failed:
		return nil, fmt.Errorf("wire: call: %w", s.explain(err))
	case <-s.Done():
		return nil, fmt.Errorf("wire: call: %w", s.Err())
	case <-ctx.Done():
		s.spawn(func() { _ = s.conn.send(muxCall, callCancel, id, nil) }) // its loss is the session's end
		return nil, fmt.Errorf("wire: call: %w", context.Cause(ctx))
	}
}

func (c *calls) expect(limit int) (uint32, *waiting) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.waiting[c.next] != nil { // after four thousand million calls
		c.next++
	}
	w := &waiting{limit: limit, done: make(chan struct{})}
	c.waiting[c.next] = w
	c.next++
	return c.next - 1, w
}

// replied takes a piece of a reply. One that nobody waits for has been answered
// already, or was never asked for: it is dropped.
func (s *Session) replied(id uint32, piece []byte, last bool) error {
	c := s.calls
	c.mu.Lock()
	w := c.waiting[id]
	if w != nil && last {
		delete(c.waiting, id)
	}
	c.mu.Unlock()
	if w == nil {
		return nil
	}
	if len(w.reply)+len(piece) > w.limit {
		return fmt.Errorf("the other end sent a reply of more than %d bytes", w.limit)
	}
	w.reply = append(w.reply, piece...)
	if last {
		<-s.outgoing // first: who has the reply has the place back
		close(w.done)
	}
	return nil
}

// called begins to serve a request, which is the callee's to keep. More at once than
// the other end may have open are not calls but an attack.
func (s *Session) called(id uint32, request []byte) error {
	c := s.calls
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.serving[id] != nil || len(c.serving) >= s.limits.calls {
		return fmt.Errorf("the other end made call %d beside %d others, or twice; at most %d are served", id, len(c.serving), s.limits.calls)
	}
	ctx, cancel := context.WithCancel(c.ctx)
	c.serving[id] = cancel
	call := incoming{ctx, cancel, id, request}
	select {
	case c.idle <- call:
	default:
		s.spawn(func() { s.serve(call) })
	}
	return nil
}

// incoming is a call to be served.
type incoming struct {
	ctx     context.Context
	cancel  context.CancelFunc
	id      uint32
	request []byte
}

// maxIdle is how many goroutines wait for their next call, with the stack that the last one
// made them grow.
const maxIdle = 4

// serve serves a call and then those that come while it is idle.
func (s *Session) serve(call incoming) {
	c := s.calls
	select {
	case <-c.handled:
	case <-s.Done():
		call.cancel()
		return
	}
	for {
		reply := c.handler(call.ctx, call.request)
		c.mu.Lock()
		delete(c.serving, call.id)
		stay := c.idling < maxIdle
		if stay {
			c.idling++
		}
		c.mu.Unlock()
		call.cancel()
		s.reply(call.id, reply)
		if !stay {
			return
		}
		select {
		case call = <-c.idle:
			c.mu.Lock()
			c.idling--
			c.mu.Unlock()
		case <-s.Done():
			return
		}
	}
}

// reply sends a reply in pieces. What goes wrong with the connection ends the
// session, which the caller sees.
func (s *Session) reply(id uint32, reply []byte) {
	for len(reply) > chunk {
		if s.conn.send(muxReply, callMore, id, reply[:chunk]) != nil {
			return
		}
		reply = reply[chunk:]
	}
	_ = s.conn.send(muxReply, 0, id, reply)
}

func (s *Session) cancelled(id uint32) {
	s.calls.mu.Lock()
	defer s.calls.mu.Unlock()
	if cancel := s.calls.serving[id]; cancel != nil {
		cancel()
	}
}

// takeCall is called by the reader of the connection with each whole frame of a call.
// The body is the reader's again when it returns.
func (s *Session) takeCall(kind byte, flags uint16, id uint32, body []byte) error {
	<-s.begun
	switch {
	case kind == muxReply:
		return s.replied(id, body, flags&callMore == 0)
	case flags&callCancel != 0:
		s.cancelled(id)
		return nil
	}
	return s.called(id, append([]byte(nil), body...))
}

// send writes one frame of a call.
func (g *guard) send(kind byte, flags uint16, id uint32, body []byte) error {
	g.write.Lock()
	defer g.write.Unlock()
	frame := append(g.frame[:0], 0, kind)
	frame = binary.BigEndian.AppendUint16(frame, flags)
	frame = binary.BigEndian.AppendUint32(frame, id)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(body)))
	g.frame = append(frame, body...)
	_, err := g.conn.Write(g.frame)
	return err
}
