package wire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// relayed puts a relay between a client and a server, through a stream of a
// session as sockets of a machine go: client - relay - stream - relay - server.
type relayed struct {
	client, server net.Conn
	results        chan relayResult
	cancel         context.CancelCauseFunc
}

type relayResult struct {
	there, back int64
	err         error
}

func throughTheWire(t *testing.T, idle time.Duration) relayed {
	t.Helper()
	host, guest := sessions(t)
	x, y := streams(t, guest, host)
	client, inner := socketPair(t)
	outer, server := socketPair(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	r := relayed{client, server, make(chan relayResult, 2), cancel}
	for _, pair := range [][2]net.Conn{{inner, x}, {y, outer}} {
		go func() {
			there, back, err := Relay(ctx, pair[0], pair[1], idle)
			r.results <- relayResult{there, back, err}
		}()
	}
	deadline := time.Now().Add(patience)
	client.SetDeadline(deadline)
	server.SetDeadline(deadline)
	return r
}

func (r relayed) wait(t *testing.T) (one, two relayResult) {
	t.Helper()
	for _, result := range []*relayResult{&one, &two} {
		select {
		case *result = <-r.results:
		case <-time.After(patience):
			t.Fatal("a relay does not end")
		}
	}
	return one, two
}

func TestRelayPassesOnTheEnd(t *testing.T) {
	r := throughTheWire(t, patience)
	request, answer := strings.Repeat("ask", 1000), bytes.Repeat([]byte("answer"), 200_000)
	go func() {
		io.WriteString(r.client, request)
		r.client.(*net.UnixConn).CloseWrite()
	}()
	// The server answers only once it has seen the end of the request.
	got, err := io.ReadAll(r.server)
	if err != nil || string(got) != request {
		t.Fatalf("server: %d bytes, %v", len(got), err)
	}
	go func() {
		r.server.Write(answer)
		r.server.Close()
	}()
	got, err = io.ReadAll(r.client)
	if err != nil || !bytes.Equal(got, answer) {
		t.Fatalf("client: %d of %d bytes, %v", len(got), len(answer), err)
	}
	one, two := r.wait(t)
	want := relayResult{int64(len(request)), int64(len(answer)), nil}
	if one != want || two != want {
		t.Errorf("got %+v and %+v, want %+v", one, two, want)
	}
}

func TestRelayEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		idle time.Duration
		end  func(relayed)
		want error // of at least one of the two relays
	}{
		{"when the client is gone", patience, func(r relayed) { r.client.Close() }, nil},
		{"when the server is gone", patience, func(r relayed) { r.server.Close() }, nil},
		{"when nothing goes either way", 50 * time.Millisecond, func(relayed) {}, os.ErrDeadlineExceeded},
		{"when the context ends", 0, func(r relayed) { r.cancel(errors.New("the pod stops")) }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := throughTheWire(t, c.idle)
			// It works before.
			io.WriteString(r.client, "x")
			if _, err := io.ReadFull(r.server, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			c.end(r)
			// One that is gone for good ends its other direction by the first write.
			go io.Copy(io.Discard, r.client)
			go func() {
				for {
					if _, err := r.server.Write([]byte("x")); err != nil {
						return
					}
					if c.idle < patience {
						return
					}
				}
			}()
			if c.name == "when the server is gone" {
				r.client.Close()
			}
			one, two := r.wait(t)
			if c.want != nil && !errors.Is(one.err, c.want) && !errors.Is(two.err, c.want) {
				t.Errorf("got %v and %v, want %v", one.err, two.err, c.want)
			}
		})
	}
}

func TestRelayIsNotIdleWhileOneDirectionMoves(t *testing.T) {
	const idle = 200 * time.Millisecond
	r := throughTheWire(t, idle)
	tick := time.NewTicker(idle / 8)
	defer tick.Stop()
	for range 24 { // three times idle
		<-tick.C
		if _, err := io.WriteString(r.client, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r.server, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	r.client.Close()
	r.server.Close()
	r.wait(t)
}

func TestRelayBetweenEndsThatCannotHalfClose(t *testing.T) {
	a, inner := net.Pipe()
	outer, b := net.Pipe()
	result := make(chan relayResult, 1)
	go func() {
		there, back, err := Relay(t.Context(), inner, outer, patience)
		result <- relayResult{there, back, err}
	}()
	go func() {
		io.WriteString(a, "all")
		a.Close()
	}()
	b.SetDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(b); string(got) != "all" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	select {
	case got := <-result:
		if want := (relayResult{3, 0, nil}); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	case <-time.After(patience):
		t.Fatal("the relay goes on")
	}
}

// TestRelayToAReaderThatStalls: the writer is made to wait, and what ends the
// relay ends it although its write is stuck.
func TestRelayToAReaderThatStalls(t *testing.T) {
	r := throughTheWire(t, 100*time.Millisecond)
	go io.Copy(r.client, zeros{})
	one, two := r.wait(t) // nobody reads r.server
	if !errors.Is(one.err, os.ErrDeadlineExceeded) && !errors.Is(two.err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v and %v, want a deadline", one.err, two.err)
	}
	if one.there > 16<<20 {
		t.Errorf("%d bytes were taken for a reader that reads nothing", one.there)
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
