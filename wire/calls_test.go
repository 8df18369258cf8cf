package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// echo replies with the request, n times.
func echo(n int) func(context.Context, []byte) []byte {
	return func(_ context.Context, request []byte) []byte { return bytes.Repeat(request, n) }
}

func mustCall(t testing.TB, s *Session, request []byte) []byte {
	t.Helper()
	reply, err := s.Call(timeout(t, patience), request, 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

func TestCall(t *testing.T) {
	host, guest := sessions(t)
	guest.Handle(echo(3))
	for _, size := range []int{0, 1, chunk/3 - 1, chunk/3 + 1, MaxCall} {
		request := bytes.Repeat([]byte("abcdefg"), size/7+1)[:size]
		if got := mustCall(t, host, request); !bytes.Equal(got, bytes.Repeat(request, 3)) {
			t.Errorf("%d bytes: got %d others", size, len(got))
		}
	}
	if _, err := host.Call(timeout(t, patience), make([]byte, MaxCall+1), 1); err == nil || !strings.Contains(err.Error(), "65537 bytes, at most 65536") {
		t.Errorf("a request that is too long: %v", err)
	}
	if got := mustCall(t, host, []byte("a")); string(got) != "aaa" {
		t.Errorf("after it: %q", got)
	}
	if n := len(host.outgoing); n != 0 {
		t.Errorf("%d tokens are still held", n)
	}
}

// read tells when the first bytes have been read.
type read struct {
	net.Conn
	once sync.Once
	told chan struct{}
}

func (r *read) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.once.Do(func() { close(r.told) })
	return n, err
}

// TestCallAtTheVeryBeginning: yamux reads before its constructor has returned, and a call that
// waits there already is served all the same.
func TestCallAtTheVeryBeginning(t *testing.T) {
	a, b := net.Pipe()
	host, err := Host(a)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	replied := make(chan error, 1)
	go func() {
		reply, err := host.Call(timeout(t, patience), []byte("early"), 64)
		if err == nil && string(reply) != "early" {
			err = fmt.Errorf("reply %q", reply)
		}
		replied <- err
	}()
	below := &read{Conn: b, told: make(chan struct{})}
	limits := defaultLimits
	limits.calls = limits.incoming
	guest, err := newSession(below, func(conn io.ReadWriteCloser, config *yamux.Config) (*yamux.Session, error) {
		mux, err := yamux.Server(conn, config)
		<-below.told
		for range 1000 { // whoever serves it comes to do so
			runtime.Gosched()
		}
		return mux, err
	}, limits)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	guest.Handle(echo(1))
	if err := <-replied; err != nil {
		t.Error(err)
	}
}

// TestCallsBesideStreams: calls and streams on one connection do not mix, and each
// gets its own.
func TestCallsBesideStreams(t *testing.T) {
	host, guest := sessions(t)
	guest.Handle(echo(40))
	a, b := streams(t, host, guest)
	var work sync.WaitGroup
	const bulk = 8 << 20
	work.Go(func() {
		defer a.CloseWrite()
		if _, err := a.Write(bytes.Repeat([]byte{7}, bulk)); err != nil {
			t.Error(err)
		}
	})
	work.Go(func() {
		got, err := io.ReadAll(b)
		if err != nil || len(got) != bulk || bytes.Count(got, []byte{7}) != bulk {
			t.Errorf("the stream got %d bytes, %v", len(got), err)
		}
	})
	for worker := range 8 {
		work.Go(func() {
			for i := range 50 {
				request := fmt.Appendf(nil, "%d.%d;", worker, i*i*i)
				if got := mustCall(t, host, request); !bytes.Equal(got, bytes.Repeat(request, 40)) {
					t.Errorf("call %s got %.40q", request, got)
				}
			}
		})
	}
	work.Wait()
}

// TestSlowCallsDelayNoOther: calls that do not end, and a reply that takes long to
// send, leave the others their turn.
func TestSlowCallsDelayNoOther(t *testing.T) {
	host, guest := sessions(t)
	release := make(chan struct{})
	guest.Handle(func(_ context.Context, request []byte) []byte {
		switch string(request) {
		case "slow":
			<-release
		case "long":
			return make([]byte, 32<<20)
		}
		return request
	})
	var slow sync.WaitGroup
	for range 20 {
		slow.Go(func() { mustCall(t, host, []byte("slow")) })
	}
	slow.Go(func() { mustCall(t, host, []byte("long")) })
	within(t, "a quick call", patience, func() {
		for range 100 {
			mustCall(t, host, []byte("quick"))
		}
	})
	close(release)
	slow.Wait()
}

// TestACallThatNobodyWaitsFor tells the handler so, and keeps its place until the
// handler has answered.
func TestACallThatNobodyWaitsFor(t *testing.T) {
	host, guest := sessions(t)
	begun, told, release := make(chan struct{}), make(chan struct{}), make(chan struct{})
	guest.Handle(func(ctx context.Context, request []byte) []byte {
		if string(request) != "wait" {
			return request
		}
		close(begun)
		<-ctx.Done()
		close(told)
		<-release
		return make([]byte, 3*chunk)
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		_, err := host.Call(ctx, []byte("wait"), 1<<20)
		ended <- err
	}()
	<-begun
	if len(host.outgoing) != 1 {
		t.Errorf("%d tokens, want 1", len(host.outgoing))
	}
	cancel()
	within(t, "the caller's end", patience, func() {
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	within(t, "the handler's being told", patience, func() { <-told })
	if len(host.outgoing) != 1 {
		t.Errorf("the place is free before the reply: %d tokens, want 1", len(host.outgoing))
	}
	close(release)
	eventually(t, "the place is free", func() bool { return len(host.outgoing) == 0 })
	mustCall(t, host, []byte("next"))
}

// TestCallsWhileTheConnectionIsStuck: the other end reads nothing. Deadlines hold, and
// callers who try again and again gather no more goroutines than there are tokens.
func TestCallsWhileTheConnectionIsStuck(t *testing.T) {
	session, _ := against(t, small)
	full := 0
	for range 6 * small.outgoing {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		var err error
		within(t, "Call", patience, func() { _, err = session.Call(ctx, make([]byte, MaxCall), 1) })
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		if strings.Contains(err.Error(), "streams and calls are open") {
			full++
		}
	}
	if want := 5 * small.outgoing; full != want {
		t.Errorf("%d calls found no place, want %d", full, want)
	}
	within(t, "Close", patience, func() { session.Close() })
}

// TestCallsEndWithTheSession: who waits for a reply, and who serves a call, is told.
func TestCallsEndWithTheSession(t *testing.T) {
	host, guest := sessions(t)
	begun := make(chan struct{})
	guest.Handle(func(ctx context.Context, _ []byte) []byte {
		close(begun)
		<-ctx.Done()
		return nil
	})
	ended := make(chan error, 1)
	go func() {
		_, err := host.Call(context.Background(), nil, 1)
		ended <- err
	}()
	<-begun
	within(t, "the end of both", patience, func() {
		guest.Close()
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
		host.Close()
	})
	if _, err := host.Call(context.Background(), nil, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestCallsBeforeAHandler wait for it; a session that ends without one ends them.
func TestCallsBeforeAHandler(t *testing.T) {
	host, guest := sessions(t)
	got := make(chan []byte, 1)
	go func() { got <- mustCall(t, host, []byte("early")) }()
	eventually(t, "the call has arrived", func() bool {
		guest.calls.mu.Lock()
		defer guest.calls.mu.Unlock()
		return len(guest.calls.serving) == 1
	})
	guest.Handle(echo(1))
	within(t, "its reply", patience, func() {
		if reply := <-got; string(reply) != "early" {
			t.Errorf("got %q", reply)
		}
	})
}

// serving returns a session that serves so many calls, and the raw connection of its
// other end.
func serving(t *testing.T, calls int, handler func(context.Context, []byte) []byte) (*Session, net.Conn) {
	t.Helper()
	a, b := socketPair(t)
	l := small
	l.calls = calls
	session, err := newSession(a, yamuxServer, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	session.Handle(handler)
	return session, b
}

func TestHostileCallsEndTheSession(t *testing.T) {
	blocked := func(ctx context.Context, _ []byte) []byte {
		<-ctx.Done()
		return nil
	}
	var many []byte
	for id := range uint32(small.incoming + 1) {
		many = append(many, muxFrame(muxCall, 0, id, 1, "x")...)
	}
	for _, c := range []struct {
		name   string
		serves bool
		send   []byte
		want   string
	}{
		{"a call to the host", false, muxFrame(muxCall, 0, 1, 2, "hi"), "at most 0 are served"},
		{"a call beyond its length", true, muxFrame(muxCall, 0, 1, MaxCall+1, ""), "type 32 and length 65537"},
		{"a call of 4 GiB", true, muxFrame(muxCall, 0, 1, 0xffffffff, ""), "length 4294967295"},
		{"one call twice", true, append(muxFrame(muxCall, 0, 5, 0, ""), muxFrame(muxCall, 0, 5, 0, "")...), "call 5"},
		{"more calls than may live", true, many, "call 8 beside 8 others"},
		{"a reply beyond its length", false, muxFrame(muxReply, 0, 0, chunk+1, ""), "type 33 and length 32769"},
		{"half a call", true, muxFrame(muxCall, 0, 1, 100, "abc"), "wire: session closed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			session, raw := against(t, small)
			if c.serves {
				session, raw = serving(t, small.incoming, blocked)
			}
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
		})
	}
}

// TestHostileReplies: one end makes a call, and the other answers more than was asked.
func TestHostileReplies(t *testing.T) {
	piece := strings.Repeat("x", chunk)
	t.Run("without end", func(t *testing.T) {
		session, raw := against(t, small)
		before := heap()
		ended := make(chan error, 1)
		go func() {
			_, err := session.Call(context.Background(), nil, 10*chunk)
			ended <- err
		}()
		io.ReadFull(raw, make([]byte, muxHeader))
		for range 1000 {
			if _, err := raw.Write(muxFrame(muxReply, callMore, 0, chunk, piece)); err != nil {
				break
			}
		}
		within(t, "the end", patience, func() {
			if err := <-ended; !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "more than 327680 bytes") {
				t.Errorf("got %v", err)
			}
		})
		if grown := int64(heap()) - int64(before); grown > 4<<20 {
			t.Errorf("%d KiB more than before", grown>>10)
		}
	})
	t.Run("that nobody asked for, twice, and to what was taken back", func(t *testing.T) {
		session, raw := against(t, small)
		for id := range uint32(200) {
			raw.Write(muxFrame(muxReply, callMore, 1000+id, chunk, piece))
		}
		replies := make(chan []byte, 1)
		go func() { replies <- mustCall(t, session, []byte("a")) }()
		io.ReadFull(raw, make([]byte, muxHeader+1))
		raw.Write(muxFrame(muxReply, 0, 0, 2, "ok"))
		raw.Write(muxFrame(muxReply, 0, 0, 5, "again"))
		raw.Write(muxFrame(muxCall, callCancel, 77, 0, ""))
		if got := <-replies; string(got) != "ok" {
			t.Errorf("got %q", got)
		}
		go func() { replies <- mustCall(t, session, []byte("b")) }()
		io.ReadFull(raw, make([]byte, muxHeader+1))
		raw.Write(muxFrame(muxReply, 0, 1, 4, "next"))
		if got := <-replies; string(got) != "next" {
			t.Errorf("got %q", got)
		}
		if n := len(session.outgoing); n != 0 {
			t.Errorf("%d tokens are held", n)
		}
	})
}

// TestFramesInAnyPieces: calls, replies and yamux's frames arrive byte by byte and all
// at once.
func TestFramesInAnyPieces(t *testing.T) {
	head := wireFrame(FrameJSON, 15, `{"kind":"good"}`)
	var all []byte
	for id := range uint32(4) { // as many as wait in the backlog
		all = append(all, muxFrame(muxCall, 0, id, 3, "abc")...)
		all = append(all, muxFrame(muxWindow, syn, 1+2*id, 0, "")...)
		all = append(all, muxFrame(muxCall, 0, 100+id, 0, "")...)
		all = append(all, muxFrame(muxData, 0, 1+2*id, uint32(len(head)), head)...)
	}
	for _, size := range []int{1, 5, 11, 12, 13, 1 << 20} {
		t.Run(fmt.Sprintf("%d bytes", size), func(t *testing.T) {
			served := make(chan string, 8)
			session, raw := serving(t, 10, func(_ context.Context, request []byte) []byte {
				served <- string(request)
				return nil
			})
			go io.Copy(io.Discard, raw)
			go func() {
				for rest := all; len(rest) > 0; {
					n := min(size, len(rest))
					raw.Write(rest[:n])
					rest = rest[n:]
				}
			}()
			within(t, "all of them", patience, func() {
				for range 4 {
					if stream, err := session.Accept(); err != nil || stream.Kind != "good" {
						t.Errorf("got %+v, %v", stream, err)
					}
				}
				got := map[string]int{}
				for range 8 {
					got[<-served]++
				}
				if got["abc"] != 4 || got[""] != 4 {
					t.Errorf("served %v", got)
				}
			})
		})
	}
}
