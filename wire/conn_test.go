package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
)

const patience = 10 * time.Second // for what must happen

func TestMain(m *testing.M) {
	if run, ok := helpers[os.Getenv("WIRE_TEST_HELPER")]; ok {
		run()
		return
	}
	goleak.VerifyTestMain(m)
}

// helpers are what this test binary does when a test starts it again.
var helpers = map[string]func(){}

// socketPair returns two ends of a unix socket pair as conns.
func socketPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fileConn(t, fds[0]), fileConn(t, fds[1])
}

func fileConn(t testing.TB, fd int) net.Conn {
	t.Helper()
	file := os.NewFile(uintptr(fd), "socket pair")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// sessions returns both ends of a session over a socket pair.
func sessions(t testing.TB) (host, guest *Session) {
	t.Helper()
	a, b := socketPair(t)
	host, err := Host(a)
	if err != nil {
		t.Fatal(err)
	}
	guest, err = Guest(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		host.Close()
		guest.Close()
	})
	return host, guest
}

// streams returns both ends of a stream.
func streams(t testing.TB, host, guest *Session) (*Stream, *Stream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a, err := host.Open(ctx, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := guest.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

// within fails the test when f takes longer than it may.
func within(t testing.TB, what string, limit time.Duration, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("%s takes longer than %v", what, limit)
	}
}

// eventually waits until f holds.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("after %v still not: %s", patience, what)
		}
	}
}

// TestStreamIsAConn runs the contract of net.Conn as x/net states it.
func TestStreamIsAConn(t *testing.T) {
	nettest.TestConn(t, func() (a, b net.Conn, stop func(), err error) {
		p, q := socketPair(t)
		host, err := Host(p)
		if err != nil {
			return nil, nil, nil, err
		}
		guest, err := Guest(q)
		if err != nil {
			return nil, nil, nil, err
		}
		x, err := host.Open(t.Context(), "test", nil)
		if err != nil {
			return nil, nil, nil, err
		}
		y, err := guest.Accept()
		if err != nil {
			return nil, nil, nil, err
		}
		return x, y, func() {
			x.Close()
			y.Close()
			host.Close()
			guest.Close()
		}, nil
	})
}

// stuck returns a session whose other end reads nothing, with one stream on it
// that has filled the connection.
func stuck(t *testing.T) (*Session, *Stream, net.Conn) {
	t.Helper()
	a, raw := socketPair(t)
	session, err := Host(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	stream, err := session.Open(t.Context(), "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	// The stream's own room ends, or the connection's, whichever is first; so
	// several are needed to fill the connection.
	for range 8 {
		filler, err := session.Open(timeout(t, 200*time.Millisecond), "filler", nil)
		if errors.Is(err, context.DeadlineExceeded) {
			return session, stream, raw
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { filler.Close() })
		filler.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		filler.Write(make([]byte, 4*streamWindow))
	}
	t.Fatal("the connection does not fill")
	return nil, nil, nil
}

func timeout(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func closeEndsAReadThatWaits(t *testing.T, stream *Stream) {
	t.Helper()
	waiting := make(chan error, 1)
	go func() {
		_, err := stream.Read(make([]byte, 1))
		waiting <- err
	}()
	eventually(t, "the read holds its lock", func() bool {
		inner := stream.Conn.(*conn)
		if inner.read.TryLock() {
			inner.read.Unlock()
			return false
		}
		return true
	})
	within(t, "Close", patience, func() { stream.Close() })
	select {
	case err := <-waiting:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("a read that waited while the stream was closed: %v", err)
		}
	case <-time.After(patience):
		t.Error("Close leaves a read waiting")
	}
}

func TestCloseEndsAReadThatWaits(t *testing.T) {
	host, guest := sessions(t)
	for range 10 {
		a, _ := streams(t, host, guest)
		_, b := streams(t, host, guest)
		closeEndsAReadThatWaits(t, a)
		closeEndsAReadThatWaits(t, b)
	}
}

func TestDeadlinesHoldWhileTheConnectionIsStuck(t *testing.T) {
	session, stream, raw := stuck(t)

	stream.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	within(t, "a write with a deadline", patience, func() {
		if _, err := stream.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %v", err)
		}
	})
	stream.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	within(t, "a write after one that was cut off", patience, func() {
		if _, err := stream.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write behind one that is on its way: %v", err)
		}
	})
	stream.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	within(t, "a read with a deadline", patience, func() {
		if _, err := stream.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
	})
	stream.SetReadDeadline(time.Time{})

	// The other end can still say that it takes no more.
	stream.SetWriteDeadline(time.Time{})
	writing := make(chan error, 1)
	go func() {
		_, err := stream.Write([]byte("x"))
		writing <- err
	}()
	if _, err := raw.Write(controlFrame(1, muxStop)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-writing:
		if !errors.Is(err, syscall.EPIPE) {
			t.Errorf("a write that waited while the other end closed: %v", err)
		}
	case <-time.After(patience):
		t.Error("a write waits for an end that takes no more")
	}
	closeEndsAReadThatWaits(t, stream)

	// A caller who tries again and again gathers no goroutines without end.
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	short := timeout(t, time.Second)
	for range 3 * defaultLimits.outgoing {
		ctx := canceled
		if len(session.outgoing) < cap(session.outgoing) {
			ctx = timeout(t, time.Millisecond)
		}
		if short.Err() != nil {
			break
		}
		if s, err := session.Open(ctx, "x", nil); err == nil {
			t.Fatalf("opened %v on a stuck connection", s)
		}
	}
	if n := len(session.outgoing); n > defaultLimits.outgoing {
		t.Errorf("%d streams wait to be opened", n)
	}
	within(t, "the session's Close", patience, func() { session.Close() })
	if _, err := session.Open(t.Context(), "x", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Open on a closed session: %v", err)
	}
}

func TestSessionEndIsNoOrderlyEnd(t *testing.T) {
	host, guest := sessions(t)
	a, b := streams(t, host, guest)
	c, d := streams(t, host, guest)

	// An orderly end reads as EOF, with all that came before it.
	if _, err := a.Write([]byte("all of it")); err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(b); string(got) != "all of it" || err != nil {
		t.Errorf("after an orderly end: %q, %v", got, err)
	}

	// The death of the other end does not.
	if _, err := c.Write([]byte("a part")); err != nil {
		t.Fatal(err)
	}
	if err := d.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 6)
	if _, err := io.ReadFull(d, got); err != nil {
		t.Fatal(err)
	}
	host.Close()
	if n, err := d.Read(got); !errors.Is(err, ErrClosed) || errors.Is(err, net.ErrClosed) {
		t.Errorf("after the other end died: %d bytes, %v; want ErrClosed", n, err)
	}
	if _, err := d.Write([]byte("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("write after the other end died: %v; want ErrClosed", err)
	}
	select {
	case <-guest.Done():
	case <-time.After(patience):
		t.Fatal("the death of the host's end goes unseen")
	}
	if err := guest.Err(); !errors.Is(err, ErrClosed) || err.Error() != "wire: session closed by the other end" {
		t.Errorf("guest: %v", err)
	}
	if err := host.Err(); err != ErrClosed {
		t.Errorf("host: %v", err)
	}
	if _, err := guest.Accept(); !errors.Is(err, ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
}

// TestStreamsEndWholly: a token comes back when both ends have closed, and both
// sides forget the stream.
func TestStreamsEndWholly(t *testing.T) {
	host, guest := sessions(t)
	for i := range 3 * defaultLimits.outgoing { // far more than may live at once
		a, b := streams(t, host, guest)
		if err := a.SendJSON(FrameJSON, i); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			a, b = b, a
		}
		a.Close()
		b.Close()
	}
	eventually(t, "all streams are gone", func() bool {
		return len(host.outgoing) == 0 && len(guest.incoming) <= 1 && host.mux.NumStreams() == 0 && guest.mux.NumStreams() == 0
	})
}

// TestASilentEndIsReset: the other end does nothing about a stream that we closed.
func TestASilentEndIsReset(t *testing.T) {
	p, q := socketPair(t)
	l := defaultLimits
	l.linger, l.outgoing = 50*time.Millisecond, 1
	host, err := newSession(p, yamuxClient, l)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	guest, err := Guest(q)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	a, b := streams(t, host, guest)
	a.Close()
	if s, err := host.Open(timeout(t, 5*time.Millisecond), "next", nil); err == nil {
		t.Errorf("opened %v while the only token is taken", s)
	} else if want := fmt.Sprintf("wire: opening a next stream: %d streams and calls are open: context deadline exceeded", l.outgoing); err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	next, err := host.Open(timeout(t, patience), "next", nil)
	if err != nil {
		t.Fatalf("after the linger: %v", err)
	}
	next.Close()
	b.SetDeadline(time.Now().Add(patience))
	if n, err := b.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the other end reads %d, %v", n, err)
	}
}

// TestAnEndThatKeepsOnSendingIsStopped: its writes fail soon after we closed, and
// what we sent before stays readable: yes | head must not lose what head said.
func TestAnEndThatKeepsOnSendingIsStopped(t *testing.T) {
	host, guest := sessions(t)
	for name, way := range map[string][2]*Session{"host closes": {host, guest}, "guest closes": {guest, host}} {
		a, b := streams(t, way[0], way[1])
		said := bytes.Repeat([]byte("said before"), streamWindow/20)
		if _, err := a.Write(said); err != nil {
			t.Fatal(err)
		}
		a.Close()
		b.SetDeadline(time.Now().Add(patience))
		sent, err := io.Copy(b, zeros{})
		if !errors.Is(err, syscall.EPIPE) || sent > 16<<20 {
			t.Errorf("%s: sent %d bytes to an end that had closed, then: %v", name, sent, err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s: the next write: %v", name, err)
		}
		if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, said) {
			t.Errorf("%s: what was said before: %d of %d bytes, %v", name, len(got), len(said), err)
		}
		b.Close()
	}
	eventually(t, "nothing is left", func() bool {
		left := 0
		for _, s := range []*Session{host, guest} {
			s.conns.Range(func(any, any) bool { left++; return true })
			left += s.mux.NumStreams() + len(s.outgoing)
		}
		return left == 0
	})
}

// TestAnEndThatDoesNotStopIsReset, long before the linger is over, and both ends
// forget the stream.
func TestAnEndThatDoesNotStopIsReset(t *testing.T) {
	for name, below := range map[string]func(net.Conn) io.ReadWriteCloser{
		"with deadlines below":    func(c net.Conn) io.ReadWriteCloser { return c },
		"without deadlines below": func(c net.Conn) io.ReadWriteCloser { return struct{ io.ReadWriteCloser }{c} },
	} {
		t.Run(name, func(t *testing.T) {
			p, q := socketPair(t)
			host, err := Host(below(p))
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			guest, err := Guest(below(q))
			if err != nil {
				t.Fatal(err)
			}
			defer guest.Close()
			host.conn.stopped = func(uint32) {} // deaf
			guest.conn.stopped = func(uint32) {}
			a, b := streams(t, host, guest)
			c, d := streams(t, guest, host)
			a.Close()
			c.Close()
			for name, stream := range map[string]*Stream{"guest": b, "host": d} {
				stream.SetWriteDeadline(time.Now().Add(patience))
				sent, err := io.Copy(stream, zeros{})
				if err == nil || errors.Is(err, os.ErrDeadlineExceeded) || sent > 16<<20 {
					t.Errorf("%s: sent %d bytes to an end that had closed, then: %v", name, sent, err)
				}
				stream.Close()
			}
			x, y := streams(t, host, guest) // frames go both ways, whatever waits for one
			if err := x.Send(FrameJSON, nil); err != nil {
				t.Error(err)
			}
			if _, _, err := y.Recv(1); err != nil {
				t.Error(err)
			}
			y.Close()
			x.Close()
			eventually(t, "nothing is left", func() bool {
				return len(host.outgoing)+len(guest.outgoing) == 0 && host.mux.NumStreams()+guest.mux.NumStreams() == 0
			})
			if host.Err() != nil || guest.Err() != nil {
				t.Errorf("sessions: %v, %v", host.Err(), guest.Err())
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestHalfCloseIsBounded: the other end may go on for the linger, and a cut is no
// orderly end.
func TestHalfCloseIsBounded(t *testing.T) {
	p, q := socketPair(t)
	l := defaultLimits
	l.linger = 50 * time.Millisecond
	host, err := newSession(p, yamuxClient, l)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	guest, err := Guest(q)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	a, b := streams(t, host, guest)
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the other end reads %d, %v; want EOF", n, err)
	}
	if _, err := a.Write([]byte("x")); err == nil {
		t.Error("wrote after the end")
	}
	b.Write([]byte("more"))
	a.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(a); string(got) != "more" || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q, %v; want the cut to be an error", got, err)
	}
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	if err := NewStream(pipe).CloseWrite(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("on a connection without halves: %v", err)
	}
}
