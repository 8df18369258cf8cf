package egress

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"cal/nucleus"
)

// serveHTTP serves HTTP/1.1 on one connection of a guest and returns when
// connection and handlers have ended.
func (g *Gateway) serveHTTP(ctx context.Context, guest net.Conn, peer Peer, handler http.HandlerFunc) {
	defer guest.Close()
	leave := g.admit(peer.Pod)
	if leave == nil {
		handler = func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			writeRefusal(w, refuse(nucleus.KindUnavailable, ruleLimit, "%d connections are open, no more at once", g.limits.Connections))
		}
	} else {
		defer leave()
	}
	var handlers sync.WaitGroup
	listener := &oneConn{conn: guest, done: make(chan struct{})}
	server := &http.Server{
		ReadHeaderTimeout: g.limits.Handshake,
		IdleTimeout:       g.limits.Idle,
		MaxHeaderBytes:    g.limits.Header,

		DisableGeneralOptionsHandler: true, // OPTIONS * is ours to refuse
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				listener.Close()
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handlers.Add(1)
			defer handlers.Done()
			control := http.NewResponseController(w)
			control.SetWriteDeadline(time.Time{})
			handler(w, r)
			// The rest of the answer and of the request's body have this long.
			control.SetReadDeadline(time.Now().Add(g.limits.Handshake))
			control.SetWriteDeadline(time.Now().Add(g.limits.Handshake))
		}),
	}
	if leave == nil {
		server.SetKeepAlivesEnabled(false)
	}
	stop := context.AfterFunc(ctx, func() { guest.Close() })
	defer stop()
	server.Serve(listener)
	handlers.Wait()
}

// oneConn is a listener with one connection.
type oneConn struct {
	mu   sync.Mutex
	conn net.Conn // nil once accepted
	once sync.Once
	done chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	conn := l.conn
	l.conn = nil
	l.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *oneConn) Addr() net.Addr { return guestAddr{} }

type guestAddr struct{}

func (guestAddr) Network() string { return "wire" }
func (guestAddr) String() string  { return "guest" }

// statusOf is the HTTP status of a refusal.
func statusOf(kind nucleus.Kind) int {
	switch kind {
	case nucleus.KindDenied, nucleus.KindApproval, nucleus.KindRefused:
		return http.StatusForbidden
	case nucleus.KindInvalid:
		return http.StatusBadRequest
	case nucleus.KindTooLarge:
		return http.StatusRequestEntityTooLarge
	case nucleus.KindUnavailable:
		return http.StatusServiceUnavailable
	case nucleus.KindTimeout:
		return http.StatusGatewayTimeout
	}
	return http.StatusBadGateway
}

func writeRefusal(w http.ResponseWriter, r *refusal) {
	writeJSON(w, statusOf(r.Kind), map[string]any{"error": r.Error})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err) // only strings and numbers come here
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(body, '\n'))
}

// hopByHop are the fields that belong to one connection (RFC 9110, 7.6.1), and
// those with which a client speaks to its proxy.
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization",
	"Proxy-Authentication-Info", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Expect", "Http2-Settings",
}

// endToEnd returns the fields of h that go further than this connection.
func endToEnd(h http.Header) http.Header {
	out := h.Clone()
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			out.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range hopByHop {
		out.Del(name)
	}
	return out
}

// pacedBody gives the guest a time for each piece of its request's body. The
// handler stops it before it returns: a transport may still be reading then.
type pacedBody struct {
	io.ReadCloser
	control *http.ResponseController
	limit   time.Duration
	touch   func()

	mu      sync.Mutex
	stopped bool
}

func (b *pacedBody) Read(p []byte) (int, error) {
	if !b.pace(time.Now().Add(b.limit)) {
		return 0, net.ErrClosed
	}
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		// The server goes on reading, to see a guest that hangs up: that has
		// no deadline of ours.
		b.pace(time.Time{})
	}
	b.touch()
	return n, err
}

func (b *pacedBody) pace(until time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.stopped {
		b.control.SetReadDeadline(until)
	}
	return !b.stopped
}

func (b *pacedBody) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stopped = true
}

// abort ends the guest's connection without the mark that ends a whole body, so
// that half an answer is not taken for one.
func abort(control *http.ResponseController) {
	if conn, _, err := control.Hijack(); err == nil {
		conn.Close()
	}
}

// copyBody streams a response's body, each piece as soon as it is there.
func copyBody(w io.Writer, control *http.ResponseController, limit time.Duration, from io.Reader) error {
	buffer := make([]byte, copyBuffer)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			control.SetWriteDeadline(time.Now().Add(limit))
			if _, e := w.Write(buffer[:n]); e != nil {
				return e
			}
			if e := control.Flush(); e != nil {
				return e
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
