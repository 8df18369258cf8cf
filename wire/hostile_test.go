package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// muxFrame is one frame of yamux as a hostile end would write it.
func muxFrame(kind byte, flags uint16, id, length uint32, body string) []byte {
	frame := make([]byte, muxHeader, muxHeader+len(body))
	frame[1] = kind
	binary.BigEndian.PutUint16(frame[2:], flags)
	binary.BigEndian.PutUint32(frame[4:], id)
	binary.BigEndian.PutUint32(frame[8:], length)
	return append(frame, body...)
}

const syn, ack, fin, rst = 1, 2, 4, 8

// wireFrame is one frame of a stream.
func wireFrame(kind Frame, size uint32, payload string) string {
	head := []byte{byte(kind), 0, 0, 0, 0}
	binary.BigEndian.PutUint32(head[1:], size)
	return string(head) + payload
}

// against returns a session and the raw connection of a hostile other end.
func against(t *testing.T, l limits) (*Session, net.Conn) {
	t.Helper()
	a, b := socketPair(t)
	session, err := newSession(a, yamuxClient, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return session, b
}

// small keeps hostile tests fast; the counts scale with the limits.
var small = limits{incoming: 8, outgoing: 4, backlog: 4, header: 100 * time.Millisecond, linger: 100 * time.Millisecond}

func TestWhatTheOtherEndMayNotSendEndsTheSession(t *testing.T) {
	open := muxFrame(muxWindow, syn, 2, 0, "")
	unread := wireFrame(FrameJSON, 15, `{"kind":"good"}`)
	unread += strings.Repeat("x", streamWindow-len(unread)) // a window that nobody reads
	for _, c := range []struct {
		name string
		send []byte
		want string
	}{
		{"an HTTP request", []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "speaks something else"},
		{"0xff", bytes.Repeat([]byte{0xff}, 100), "speaks something else"},
		{"a ping", muxFrame(2, syn, 0, 1, ""), "frame of type 2"},
		{"the answer to a ping", muxFrame(2, ack, 0, 1, ""), "frame of type 2"},
		{"an unknown type", muxFrame(4, 0, 0, 0, ""), "frame of type 4"},
		{"data beyond a window", muxFrame(muxData, syn, 2, streamWindow+1, ""), "length 262145"},
		{"4 GiB of data", muxFrame(muxData, syn, 2, 0xffffffff, ""), "length 4294967295"},
		{"a window of 4 GiB", append(open, muxFrame(muxWindow, 0, 2, 0xffffffff, "")...), "length 4294967295"},
		{"one stream twice", append(open, open...), "duplicate stream"},
		{"the end twice", append(open, append(muxFrame(muxWindow, fin, 2, 0, ""), muxFrame(muxWindow, fin, 2, 0, "")...)...), "unexpected flag"},
		{"more than the window in all", append(open, append(muxFrame(muxData, 0, 2, streamWindow, unread), muxFrame(muxData, 0, 2, 1, "x")...)...), "recv window exceeded"},
		{"go away: error", muxFrame(muxGoAway, 0, 0, 1, ""), "protocol error"},
		{"nothing", nil, "closed by the other end"},
		{"half a header", open[:7], "unexpected EOF"},
		{"half a body", muxFrame(muxData, syn, 2, 100, "abc"), "wire: session closed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			session, raw := against(t, small)
			go io.Copy(io.Discard, raw)
			raw.Write(c.send)
			raw.(*net.UnixConn).CloseWrite()
			select {
			case <-session.Done():
			case <-time.After(patience):
				t.Fatal("the session goes on")
			}
			if err := session.Err(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want ErrClosed with %q", err, c.want)
			}
			if _, err := session.Accept(); !errors.Is(err, ErrClosed) {
				t.Errorf("Accept: %v", err)
			}
		})
	}
}

func TestWhatASessionSurvives(t *testing.T) {
	stream := func(id uint32, data string) []byte {
		return append(muxFrame(muxWindow, syn, id, 0, ""), muxFrame(muxData, 0, id, uint32(len(data)), data)...)
	}
	for _, c := range []struct {
		name string
		send []byte
	}{
		{"a stream that is ended at once", append(stream(2, ""), muxFrame(muxWindow, fin, 2, 0, "")...)},
		{"a stream that is reset at once", append(stream(2, ""), muxFrame(muxWindow, rst, 2, 0, "")...)},
		{"data for no stream", muxFrame(muxData, 0, 77, 5, "hello")},
		{"a window for no stream", muxFrame(muxWindow, 0, 77, 5, "")},
		{"the end of no stream", muxFrame(muxWindow, fin, 77, 0, "")},
		{"an acknowledgement of no stream", muxFrame(muxWindow, ack, 1, 0, "")},
		{"a header that is too large", stream(2, wireFrame(FrameJSON, maxHeader+1, ""))},
		{"a header of 4 GiB", stream(2, wireFrame(FrameJSON, 0xffffffff, "xxx"))},
		{"a header of another kind", stream(2, wireFrame(FrameStdin, 2, "{}"))},
		{"a header that is no JSON", stream(2, wireFrame(FrameJSON, 3, "{x}"))},
		{"a header that is no object", stream(2, wireFrame(FrameJSON, 2, "[]"))},
		{"half a header, then nothing", stream(2, wireFrame(FrameJSON, 100, `{"kind":`))},
		{"nothing but the stream", stream(2, "")},
	} {
		t.Run(c.name, func(t *testing.T) {
			session, raw := against(t, small)
			go io.Copy(io.Discard, raw)
			if _, err := raw.Write(c.send); err != nil {
				t.Fatal(err)
			}
			// The next stream is served, and it is the only one that is handed out.
			if _, err := raw.Write(stream(4, wireFrame(FrameJSON, 15, `{"kind":"good"}`))); err != nil {
				t.Fatal(err)
			}
			within(t, "Accept", patience, func() {
				good, err := session.Accept()
				if err != nil || good.Kind != "good" {
					t.Errorf("got %+v, %v", good, err)
				}
			})
			// The tokens of the bad ones come back: by their end, or by time.
			eventually(t, "only the good stream lives", func() bool { return len(session.incoming) <= 2 })
		})
	}
}

// TestManyStreams: 10,000 streams from a hostile end, in the ways that differ in
// what they make yamux keep.
func TestManyStreams(t *testing.T) {
	const many = 10_000
	head := wireFrame(FrameJSON, 14, `{"kind":"bad"}`)
	for _, c := range []struct {
		name  string
		of    func(id uint32) []byte
		reads []bool // whether it reads what we answer
	}{
		{"without a header", func(id uint32) []byte { return muxFrame(muxWindow, syn, id, 0, "") }, []bool{true, false}},
		{"with a header", func(id uint32) []byte {
			return append(muxFrame(muxWindow, syn, id, 0, ""), muxFrame(muxData, 0, id, uint32(len(head)), head)...)
		}, []bool{true}},
		{"with 4 KiB of data", func(id uint32) []byte {
			return append(muxFrame(muxWindow, syn, id, 0, ""), muxFrame(muxData, 0, id, 4096, strings.Repeat("x", 4096))...)
		}, []bool{true}},
	} {
		for _, reads := range c.reads {
			t.Run(fmt.Sprintf("%s, reading answers %v", c.name, reads), func(t *testing.T) {
				l := limits{incoming: 128, outgoing: 128, backlog: 64, header: time.Second, linger: time.Second}
				session, raw := against(t, l)
				goroutines, memory := runtime.NumGoroutine(), heap()
				var work sync.WaitGroup
				defer work.Wait()
				defer raw.Close()
				if reads {
					work.Go(func() { io.Copy(io.Discard, raw) })
				}
				sent := make(chan struct{})
				work.Go(func() {
					defer close(sent)
					for i := range uint32(many) {
						raw.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
						if _, err := raw.Write(c.of(2 + 2*i)); err != nil {
							return
						}
					}
				})
				select {
				case <-sent: // or stalled by itself, when it reads nothing
				case <-time.After(2 * patience):
					t.Fatal("the hostile end is not heard out")
				}
				most := 2*(l.incoming+l.backlog) + 50
				if n := runtime.NumGoroutine() - goroutines; n > most {
					t.Errorf("%d goroutines more than before, at most %d wanted", n, most)
				}
				if grown := int64(heap()) - int64(memory); grown > 64<<20 {
					t.Errorf("%d MiB more than before", grown>>20)
				}
				if err := session.Err(); err != nil {
					t.Errorf("the session ended: %v", err)
				}
				within(t, "Close", patience, func() { session.Close() })
			})
		}
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestStreamsThatAreNeverClosed: a hostile guest that never ends what the node
// opened takes the node's tokens for that one machine, not its memory, and they
// come back.
func TestStreamsThatAreNeverClosed(t *testing.T) {
	session, raw := against(t, small)
	go io.Copy(io.Discard, raw)
	for i := range 3 * small.outgoing {
		stream, err := session.Open(timeout(t, patience), "call", nil)
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		raw.Write(muxFrame(muxWindow, ack, uint32(1+2*i), 0, "")) // accepted, never ended
		stream.Close()
		if n := session.mux.NumStreams(); n > small.outgoing+1 { // yamux forgets a moment later
			t.Fatalf("%d streams are kept", n)
		}
	}
}

// TestAStalledStreamStallsNoOther: one stream is not read while eight others make
// calls, in both directions.
func TestAStalledStreamStallsNoOther(t *testing.T) {
	host, guest := sessions(t)
	for _, way := range []struct {
		name   string
		caller *Session
		callee *Session
	}{{"from the host", host, guest}, {"from the guest", guest, host}} {
		t.Run(way.name, func(t *testing.T) {
			// The stalled stream: its writer fills the window and waits.
			stalled, unread := streams(t, way.caller, way.callee)
			writing := make(chan error, 1)
			go func() {
				_, err := stalled.Write(make([]byte, 8*streamWindow))
				writing <- err
			}()
			// Its first bytes have arrived; the rest comes up to the window.
			if _, err := io.CopyN(io.Discard, unread, 1); err != nil {
				t.Fatal(err)
			}

			var work sync.WaitGroup
			work.Go(func() { // answers eight streams
				for range 8 {
					stream, err := way.callee.Accept()
					if err != nil {
						t.Error(err)
						return
					}
					work.Go(func() {
						defer stream.Close()
						for {
							kind, payload, err := stream.Recv(1 << 20)
							if err != nil {
								return
							}
							if err := stream.Send(kind, payload); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
			})
			for i := range 8 {
				work.Go(func() {
					stream, err := way.caller.Open(timeout(t, patience), "call", map[string]int{"n": i})
					if err != nil {
						t.Error(err)
						return
					}
					defer stream.Close()
					stream.SetDeadline(time.Now().Add(patience))
					for j := range 30 {
						want := bytes.Repeat([]byte{byte(i)}, 1+j*2999)
						if err := stream.Send(FrameJSON, want); err != nil {
							t.Errorf("stream %d, call %d: %v", i, j, err)
							return
						}
						if _, got, err := stream.Recv(1 << 20); err != nil || !bytes.Equal(got, want) {
							t.Errorf("stream %d, call %d: %d bytes, %v", i, j, len(got), err)
							return
						}
					}
				})
			}
			within(t, "eight streams with 30 calls each", 2*patience, work.Wait)

			// The control: it was stalled indeed, and goes on when it is read.
			select {
			case err := <-writing:
				t.Fatalf("the stalled stream was not stalled: %v", err)
			default:
			}
			if n, err := io.CopyN(io.Discard, unread, 8*streamWindow-1); err != nil {
				t.Fatalf("after the stall: %d bytes, %v", n, err)
			}
			if err := <-writing; err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestRecvRefuses(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", "", "EOF"},
		{"half a header", "j\x00\x00", "unexpected EOF"},
		{"no payload", wireFrame(FrameJSON, 10, ""), "ends after 0: unexpected EOF"},
		{"half a payload", wireFrame(FrameJSON, 10, "12345"), "ends after 5: unexpected EOF"},
		{"too large", wireFrame(FrameStdout, 101, strings.Repeat("x", 101)), `frame 'o' of 101 bytes, at most 100`},
		{"4 GiB", wireFrame(FrameStdout, 0xffffffff, ""), "of 4294967295 bytes"},
	} {
		a, b := net.Pipe()
		go func() {
			io.WriteString(b, c.in)
			b.Close()
		}()
		stream := NewStream(a)
		_, _, err := stream.Recv(100)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
		if (err == io.EOF) != (c.in == "") {
			t.Errorf("%s: %v read as an orderly end", c.name, err)
		}
		if _, _, again := stream.Recv(100); again == nil {
			t.Errorf("%s: the stream goes on after %v", c.name, err)
		}
		a.Close()
		b.Close()
	}
}

// TestALengthAloneCostsNoMemory: 100 streams that announce 1 GiB each.
func TestALengthAloneCostsNoMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var work sync.WaitGroup
	for range 100 {
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		stream := NewStream(a)
		stream.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		work.Go(func() { io.WriteString(b, wireFrame(FrameStdout, 1<<30, "few")) })
		work.Go(func() {
			if _, _, err := stream.Recv(2 << 30); err == nil {
				t.Error("a frame without its payload was received")
			}
		})
	}
	work.Wait()
	runtime.ReadMemStats(&after)
	if taken := after.TotalAlloc - before.TotalAlloc; taken > 64<<20 {
		t.Errorf("%d MiB for 100 lengths", taken>>20)
	}
}

func TestDeadlineBetweenFramesIsHarmless(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	stream := NewStream(a)
	stream.SetReadDeadline(past)
	if _, _, err := stream.Recv(10); err == nil {
		t.Fatal("received nothing")
	}
	stream.SetReadDeadline(time.Now().Add(patience))
	go NewStream(b).Send(FrameData, []byte("piece"))
	if kind, payload, err := stream.Recv(10); err != nil || kind != FrameData || string(payload) != "piece" {
		t.Fatalf("got %q, %q, %v", kind, payload, err)
	}
}

func TestSendFailsForGood(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	defer a.Close()
	stream := NewStream(a)
	stream.SetWriteDeadline(past)
	if err := stream.Send(FrameData, []byte("x")); err == nil {
		t.Fatal("sent past the deadline")
	}
	stream.SetWriteDeadline(time.Now().Add(patience))
	go io.Copy(io.Discard, b)
	if err := stream.Send(FrameData, []byte("y")); err == nil {
		t.Error("a frame after half a frame")
	}
}

func FuzzRecv(f *testing.F) {
	f.Add([]byte(wireFrame(FrameJSON, 2, "{}")))
	f.Add([]byte("j\x00\x00\x00"))
	f.Add([]byte(wireFrame(FrameJSON, 0xffffffff, "x")))
	f.Fuzz(func(t *testing.T, in []byte) {
		stream := NewStream(bufConn{bytes.NewReader(in)})
		read := 0
		for {
			_, payload, err := stream.Recv(1 << 10)
			if err != nil {
				break
			}
			if len(payload) > 1<<10 {
				t.Fatalf("%d bytes", len(payload))
			}
			read += frameHeader + len(payload)
		}
		if read > len(in) {
			t.Fatalf("read %d of %d bytes", read, len(in))
		}
	})
}

// bufConn reads from a buffer and can do nothing else.
type bufConn struct{ *bytes.Reader }

func (bufConn) Write(p []byte) (int, error)        { return len(p), nil }
func (bufConn) Close() error                       { return nil }
func (bufConn) LocalAddr() net.Addr                { return addr{} }
func (bufConn) RemoteAddr() net.Addr               { return addr{} }
func (bufConn) SetDeadline(time.Time) error        { return nil }
func (bufConn) SetReadDeadline(t time.Time) error  { return nil }
func (bufConn) SetWriteDeadline(t time.Time) error { return nil }

// FuzzGuard: whatever arrives, the guard neither panics nor lets a ping or a
// large frame through.
func FuzzGuard(f *testing.F) {
	f.Add(muxFrame(muxData, syn, 2, 3, "abc"), 1)
	f.Add(muxFrame(2, syn, 0, 0, ""), 5)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		if step <= 0 || step > 100 {
			return
		}
		g := &guard{conn: &stepReader{in: in, step: step}, stopped: func(uint32) {}}
		out, _ := io.ReadAll(g)
		if !bytes.HasPrefix(in, out) {
			t.Fatal("the guard changed what it read")
		}
		for len(out) >= muxHeader {
			kind, length := out[1], binary.BigEndian.Uint32(out[8:])
			if kind == 2 || kind > 3 || kind != muxGoAway && length > streamWindow {
				t.Fatalf("type %d, length %d went through", kind, length)
			}
			out = out[muxHeader:]
			if kind == muxData {
				out = out[min(int(length), len(out)):]
			}
		}
	})
}

type stepReader struct {
	in   []byte
	step int
}

func (r *stepReader) Read(p []byte) (int, error) {
	if len(r.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.in[:min(r.step, len(r.in))])
	r.in = r.in[n:]
	return n, nil
}

func (r *stepReader) Write(p []byte) (int, error) { return len(p), nil }
func (r *stepReader) Close() error                { return nil }
