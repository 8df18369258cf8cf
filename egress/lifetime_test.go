package egress

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"
	"cal/wire"
)

// CloseAll ends what keep does not want, of that peer, and says why.
func TestCloseAll(t *testing.T) {
	w := newWorld(t, nil)
	server := echo(t)
	w.allow("trusted.example", "93.184.216.34", 7, server)
	w.allow("other.example", "93.184.216.35", 7, server)
	address := w.socks()
	trusted, reply := dialSOCKS(t, address, socksRequest("trusted.example", 7))
	other, reply2 := dialSOCKS(t, address, socksRequest("other.example", 7))
	if reply != 0 || reply2 != 0 {
		t.Fatal(reply, reply2)
	}
	keep := func(a Attempt) bool { return a.Host == "trusted.example" }
	for _, peer := range []Peer{{Pod: "p-2"}, {Pod: "p-1", Session: "s-2"}} {
		if n := w.g.CloseAll(peer, nil); n != 0 {
			t.Errorf("CloseAll(%+v) closed %d", peer, n)
		}
	}
	if n := w.g.CloseAll(Peer{Pod: "p-1"}, keep); n != 1 {
		t.Errorf("closed %d, want 1", n)
	}
	if _, err := io.ReadAll(other); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("other: %v", err)
	}
	if line := w.until("closed other.example"); !strings.Contains(line, errWithdrawn.Error()) {
		t.Errorf("recorded %q", line)
	}
	io.WriteString(trusted, "x")
	if _, err := io.ReadFull(trusted, make([]byte, 1)); err != nil {
		t.Errorf("trusted: %v", err)
	}
	if n := w.g.CloseAll(testPeer, nil); n != 1 {
		t.Errorf("closed %d, want 1", n)
	}
	w.until("closed trusted.example")
}

// An attempt that was allowed before CloseAll, and is not yet open when it runs,
// does not slip through: it is decided again.
func TestCloseAllWhileDeciding(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("other.example", "93.184.216.35", 7, echo(t))
	var once sync.Once
	w.decide = func(Attempt) {
		once.Do(func() {
			w.rule("other.example:7", Ruling{Verdict: nucleus.Ask, Ask: "ask-1"})
			w.g.CloseAll(testPeer, nil)
		})
	}
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("other.example", 7)); reply != replyNotAllowed {
		t.Errorf("reply %d, want %d", reply, replyNotAllowed)
	}
	if len(w.attempts) != 2 || w.has("dial") || w.attempts[0].ID != w.attempts[1].ID {
		t.Errorf("journal %q", w.lines())
	}

	// Allowed by every ruling, withdrawn each time: it ends all the same.
	w = newWorld(t, nil)
	w.allow("other.example", "93.184.216.35", 7, echo(t))
	w.decide = func(Attempt) { w.g.CloseAll(testPeer, nil) }
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("other.example", 7)); reply != replyFailure {
		t.Errorf("reply %d, want %d", reply, replyFailure)
	}
}

// The same between decision and dial.
func TestCloseAllWhileResolving(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("other.example", "93.184.216.35", 7, echo(t))
	w.resolve = func(string) ([]netip.Addr, error) {
		w.g.CloseAll(testPeer, nil)
		return []netip.Addr{netip.MustParseAddr("93.184.216.35")}, nil
	}
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("other.example", 7)); reply == 0 {
		t.Error("a withdrawn attempt was opened")
	}
}

// Over its limit a pod is told so, at once; another pod is not concerned.
func TestConnectionLimit(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Connections = 1 })
	w.allow("example.com", "93.184.216.34", 7, echo(t))
	first, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7))
	if reply != 0 {
		t.Fatal(reply)
	}
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7)); reply != replyFailure && reply != -1 {
		t.Errorf("second: reply %d", reply)
	}
	if resp, body := ask(t, w.proxy(), "GET http://example.com/ HTTP/1.1\r\nHost: x\r\n\r\n"); resp.StatusCode != 503 || refusalIn(t, body).Rule != ruleLimit {
		t.Errorf("second: %d %s", resp.StatusCode, body)
	}
	other := w.front(func(ctx context.Context, c net.Conn) { w.g.ServeSOCKS(ctx, c, Peer{Pod: "p-2"}) })
	if _, reply := dialSOCKS(t, other, socksRequest("example.com", 7)); reply != 0 {
		t.Errorf("other pod: reply %d", reply)
	}
	first.Close()
	w.until("closed")
	for range 100 { // the count falls just after the record
		if _, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7)); reply == 0 {
			return
		}
	}
	t.Error("the limit is not given back")
}

func TestIdle(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Idle = 100 * time.Millisecond })
	w.allow("example.com", "93.184.216.34", 7, echo(t))
	conn, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7))
	if reply != 0 {
		t.Fatal(reply)
	}
	io.ReadAll(conn)
	if line := w.until("closed"); !strings.Contains(line, errIdle.Error()) {
		t.Errorf("recorded %q", line)
	}
}

// A far end that stops reading, and a guest that does, hold nobody for longer
// than the idle limit.
func TestStalledReader(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Idle = 200 * time.Millisecond })
	flood := site(t, func(rw http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := rw.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	})
	w.allow("example.com", "93.184.216.34", 80, flood)
	conn := client(t, w.proxy())
	io.WriteString(conn, "GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n")
	w.until("closed")
	conn, _ = dialSOCKS(t, w.socks(), socksRequest("example.com", 80))
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
	w.until("closed")
}

// Over the real wire: a guest that never closes its stream does not keep the
// gateway from ending, by the idle limit, by CloseAll, by the context.
func TestOverWire(t *testing.T) {
	for _, way := range []string{"control", "far end", "idle", "withdrawn", "context"} {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, func(c *Config) {
				c.Limits.Handshake = 200 * time.Millisecond
				if way == "idle" {
					c.Limits.Idle = 200 * time.Millisecond
				}
			})
			w.allow("example.com", "93.184.216.34", 7, echo(t))
			if way == "far end" {
				w.allow("example.com", "93.184.216.34", 7, greeter(t, false))
			}
			near, far := net.Pipe()
			host, err := wire.Host(near)
			if err != nil {
				t.Fatal(err)
			}
			guest, err := wire.Guest(far)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			defer guest.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			go func() {
				stream, err := host.Accept()
				if err == nil {
					w.g.ServeSOCKS(ctx, stream.Conn, testPeer)
				}
				ended <- err
			}()
			stream, err := guest.Open(ctx, "socks", nil)
			if err != nil {
				t.Fatal(err)
			}
			stream.SetDeadline(time.Now().Add(wait))
			stream.Write(socksRequest("example.com", 7))
			if _, err := io.ReadFull(stream, make([]byte, 12)); err != nil {
				t.Fatal(err)
			}
			switch way {
			case "control":
				fmt.Fprint(stream, "hello")
				got := make([]byte, 5)
				if _, err := io.ReadFull(stream, got); err != nil || string(got) != "hello" {
					t.Errorf("echo over the wire: %q, %v", got, err)
				}
				stream.Close()
			case "withdrawn":
				w.g.CloseAll(testPeer, nil)
			case "context":
				cancel()
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(wait):
				t.Fatal("ServeSOCKS has not returned")
			}
			want := map[string]string{
				"control": "err=<nil>", "far end": "err=<nil>", "idle": errIdle.Error(), "withdrawn": errWithdrawn.Error(), "context": "canceled",
			}[way]
			if line := w.until("closed"); !strings.HasSuffix(line, want) {
				t.Errorf("recorded %q, want %q", line, want)
			}
		})
	}
}
