package guest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"cal/egress"
	"cal/nucleus"
	"cal/wire"
)

// forwarder is a proxy with its listeners for programs, and the node at the other end
// of the wire.
type forwarder struct {
	t           testing.TB
	l           *lock
	node        *wire.Session
	socks, http net.Listener
}

func newForwarder(t testing.TB) *forwarder {
	t.Helper()
	f := &forwarder{t: t, l: newLock(t)}
	var machine *wire.Session
	f.node, machine = sessions(t)
	f.l.p.session = machine
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.l.p.serve(ctx) }()
	listen := func(kind string, watch watcher) net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go f.l.p.forward(l, kind, watch)
		return l
	}
	f.socks = listen(StreamSOCKS, f.l.p.asked.watch(egress.ViaSOCKS))
	f.http = listen(StreamHTTP, f.l.p.asked.watch(egress.ViaHTTP))
	t.Cleanup(func() { cancel(); f.node.Close(); <-served })
	return f
}

// program opens a connection, sends raw, and returns what the node sees of it: the
// stream, once all of raw has arrived there, and its name.
func (f *forwarder) program(l net.Listener, raw string) (program net.Conn, stream *wire.Stream, id string) {
	f.t.Helper()
	program, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { program.Close() })
	if _, err := io.WriteString(program, raw); err != nil {
		f.t.Fatal(err)
	}
	if stream, err = f.node.Accept(); err != nil {
		f.t.Fatal(err)
	}
	f.arrives(stream, raw)
	var header Connection
	if err := nucleus.Strict(stream.Header, &header); err != nil || len(header.ID) < 20 {
		f.t.Fatalf("header %s: %v", stream.Header, err)
	}
	return program, stream, header.ID
}

func (f *forwarder) arrives(stream *wire.Stream, raw string) {
	f.t.Helper()
	got := make([]byte, len(raw))
	stream.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(stream, got); err != nil || string(got) != raw {
		f.t.Fatalf("arrived %q, %v; want %q", got, err, raw)
	}
}

// sign is what a node asks, in its words.
func (f *forwarder) sign(header any) SignReply {
	f.t.Helper()
	stream, err := f.node.Open(deadline(f.t), StreamSign, header)
	if err != nil {
		f.t.Fatal(err)
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(patience))
	var reply SignReply
	if err := stream.RecvJSON(wire.FrameResult, 1<<20, &reply); err != nil {
		f.t.Fatal(err)
	}
	return reply
}

func (f *forwarder) refuses(what string, header any, text string) {
	f.t.Helper()
	if r := f.sign(header); r.Request != nil || r.Error == nil || !strings.Contains(r.Error.Message, text) {
		f.t.Errorf("%s: %+v, %v; want a refusal with %q", what, r.Request, r.Error, text)
	}
}

func (f *forwarder) signs(what string, call SignCall) *wire.SignedRequest {
	f.t.Helper()
	r := f.sign(call)
	if r.Request == nil {
		f.t.Fatalf("%s: refused: %v", what, r.Error)
	}
	if err := r.Request.Verify(wire.Key{ID: "b-1", Ed25519: f.l.p.key.Public().(ed25519.PublicKey)}); err != nil {
		f.t.Fatalf("%s: %v", what, err)
	}
	return r.Request
}

const plainGet = "GET http://example.org/page HTTP/1.1\r\nHost: example.org\r\n\r\n"

// socksTo is a SOCKS greeting and request.
func socksTo(host string, port int) string {
	return "\x05\x01\x00\x05\x01\x00\x03" + string(rune(len(host))) + host + string([]byte{byte(port >> 8), byte(port)})
}

// The proxy signs for the connection that a program has open, and what it signs is a
// net_connect to where the program asked to go.
func TestSignsForConnection(t *testing.T) {
	t.Parallel() // mostly waits
	f := newForwarder(t)
	for name, c := range map[string]struct {
		l    net.Listener
		raw  string
		host string
		port int
	}{
		"SOCKS":      {f.socks, socksTo("Example.org", 443), "example.org", 443},
		"CONNECT":    {f.http, "CONNECT example.org:8443 HTTP/1.1\r\nHost: other.example\r\n\r\n", "example.org", 8443},
		"plain HTTP": {f.http, plainGet, "example.org", 80},
	} {
		_, _, id := f.program(c.l, c.raw)
		got := f.signs(name, SignCall{Connection: id, Host: c.host, Port: c.port})
		if want := fmt.Sprintf(`{"host":%q,"port":%d}`, c.host, c.port); got.Method != http.MethodPost ||
			got.TargetURI != "http://nucleus/v1/pods/p-1/tools/net_connect" || got.Pod != "p-1" || string(got.Body) != want {
			t.Errorf("%s: signed %s %s for %s: %s, want %s", name, got.Method, got.TargetURI, got.Pod, got.Body, want)
		}
	}
}

// The proxy is no oracle: what no program asks for on an open connection, and whatever
// is no connection, is not signed.
func TestSignsNothingElse(t *testing.T) {
	t.Parallel() // mostly waits
	f := newForwarder(t)
	_, _, id := f.program(f.http, plainGet)
	asked := SignCall{Connection: id, Host: "example.org", Port: 80}
	other := asked
	other.Host = "evil.example"
	f.refuses("another host", other, "does not ask for")
	other = asked
	other.Port = 443
	f.refuses("another port", other, "does not ask for")
	other = asked
	other.Host = "Example.org"
	f.refuses("another spelling", other, "does not ask for")
	other = asked
	other.Connection = "no-such"
	f.refuses("no such connection", other, "no connection")
	other.Connection = ""
	f.refuses("no connection", other, "no connection")
	for name, header := range map[string]any{
		"an operation":  map[string]any{"connection": id, "host": "example.org", "port": 80, "op": "git_push"},
		"a body":        map[string]any{"connection": id, "host": "example.org", "port": 80, "body": "{}"},
		"a pod":         map[string]any{"connection": id, "host": "example.org", "port": 80, "pod": "p-2"},
		"a text":        "POST /v1/pods/p-1/tools/git_push",
		"nothing":       nil,
		"another shape": []string{id, "example.org", "80"},
	} {
		if r := f.sign(header); r.Request != nil || r.Error == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}

	// Once for each time that a program asks.
	f.signs("control", asked)
	f.refuses("a second time", asked, "does not ask for")

	// No longer than the connection is open.
	program, _, closing := f.program(f.http, plainGet)
	program.Close()
	closed := func() bool {
		f.l.p.asked.mu.Lock()
		defer f.l.p.asked.mu.Unlock()
		return f.l.p.asked.conns[closing] == nil
	}
	for end := time.Now().Add(patience); !closed(); {
		if time.Now().After(end) {
			t.Fatal("the connection is remembered")
		}
		f.refuses("meanwhile, of another", SignCall{Connection: "no-such"}, "no connection")
	}
	f.refuses("a closed connection", SignCall{Connection: closing, Host: "example.org", Port: 80}, "no connection")
}

// Who sends nothing that the gateway would understand gets nothing signed, and its bytes
// go to the node all the same.
func TestSignsNothingUnreadable(t *testing.T) {
	t.Parallel() // mostly waits
	f := newForwarder(t)
	for name, c := range map[string]struct {
		l   net.Listener
		raw string
	}{
		"NUL in a name": {f.socks, socksTo("example.org\x00.x", 443)},
		"half a SOCKS":  {f.socks, socksTo("example.org", 443)[:8]},
		"half a head":   {f.http, "GET http://example.org/ HTTP/1.1\r\nHost"},
		"origin form":   {f.http, "GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"},
		"https in full": {f.http, "GET https://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n"},
		"garbage":       {f.http, strings.Repeat("\x00\xff", 300)},
	} {
		_, _, id := f.program(c.l, c.raw)
		for _, port := range []int{80, 443} {
			f.refuses(name, SignCall{Connection: id, Host: "example.org", Port: port}, "does not ask for")
		}
	}
}

// On one connection the request of now counts, and what is no request - a body, what
// goes through a tunnel - counts for nothing.
func TestSignsForTheRequestOfNow(t *testing.T) {
	t.Parallel() // mostly waits
	f := newForwarder(t)
	program, stream, id := f.program(f.http, plainGet)
	call := func(host string, port int) SignCall { return SignCall{Connection: id, Host: host, Port: port} }
	send := func(raw string) {
		t.Helper()
		if _, err := io.WriteString(program, raw); err != nil {
			t.Fatal(err)
		}
		f.arrives(stream, raw)
	}
	body := "GET http://in-the-body.example/ HTTP/1.1\r\nHost: x\r\n\r\n"
	send(fmt.Sprintf("POST http://second.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	f.signs("the second request", call("second.example", 80))
	f.refuses("the first request", call("example.org", 80), "does not ask for")
	f.refuses("the body", call("in-the-body.example", 80), "does not ask for")
	send("CONNECT third.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
	f.signs("the tunnel", call("third.example", 443))
	send(plainGet)
	f.refuses("in the tunnel", call("example.org", 80), "does not ask for")
	// A tunnel is carried on without being read along, however much goes through.
	send(strings.Repeat("x", 1<<20))
	if _, err := stream.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 6)
	if _, err := io.ReadFull(program, got); err != nil || string(got) != "answer" {
		t.Errorf("%q, %v", got, err)
	}
}

// A signature is asked for before the reading along has come so far: it is waited for.
func TestSignWaitsForTheRequest(t *testing.T) {
	t.Parallel()
	f := newForwarder(t)
	program, stream, id := f.program(f.http, "GET http://example.org/ HTTP/1.1\r\n")
	got := make(chan SignReply, 1)
	signing, err := f.node.Open(deadline(t), StreamSign, SignCall{Connection: id, Host: "example.org", Port: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer signing.Close()
	go func() {
		var reply SignReply
		_, payload, err := signing.Recv(1 << 20)
		if err == nil {
			err = json.Unmarshal(payload, &reply)
		}
		if err != nil {
			reply.Error = nucleus.AsError(err)
		}
		got <- reply
	}()
	io.WriteString(program, "Host: x\r\n\r\n")
	f.arrives(stream, "Host: x\r\n\r\n")
	if reply := <-got; reply.Request == nil {
		t.Errorf("refused: %v", reply.Error)
	}
}

// What the proxy signs for a connection is signed as what it sends itself: for the era of
// the node's verifier, where it has one.
func TestSignsForEra(t *testing.T) {
	t.Parallel() // mostly waits
	f := newForwarder(t)
	verifier := wire.Verifier{Keys: func(string) (wire.Key, bool) {
		return wire.Key{ID: "b-1", Ed25519: f.l.p.key.Public().(ed25519.PublicKey)}, true
	}}
	verifier.NewEra()
	statement := func() error {
		t.Helper()
		_, _, id := f.program(f.http, plainGet)
		s := f.signs("a connection", SignCall{Connection: id, Host: "example.org", Port: 80})
		r := httptest.NewRequest(s.Method, s.TargetURI, bytes.NewReader(s.Body))
		r.RequestURI = r.URL.RequestURI()
		for name, value := range map[string]string{"Content-Digest": s.ContentDigest, "Nucleus-Pod": s.Pod, "Signature-Input": s.SignatureInput, "Signature": s.Signature} {
			r.Header.Set(name, value)
		}
		_, _, _, err := verifier.Verify(r, "nucleus")
		return err
	}
	if err := statement(); err == nil || !strings.Contains(err.Error(), "era") {
		t.Errorf("without the era: %v", err)
	}
	f.l.p.era.Store(verifier.Era())
	if err := statement(); err != nil {
		t.Errorf("with the era: %v", err)
	}
}
