package egress

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"cal/nucleus"
)

// ServeProxy serves one HTTP proxy connection of a guest: CONNECT, and requests
// in absolute form for plain HTTP. Each request is an attempt of its own and is
// parsed and written anew, so that nothing is read in two ways.
func (g *Gateway) ServeProxy(ctx context.Context, conn net.Conn, peer Peer) {
	g.serveHTTP(ctx, conn, peer, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			g.connect(w, r, peer)
		} else {
			g.forward(w, r, peer)
		}
	})
}

func (g *Gateway) refuseMalformed(w http.ResponseWriter, r *http.Request, peer Peer, err error) {
	refused := refuse(nucleus.KindInvalid, ruleName, "%v", err)
	g.gate.Refused(r.Context(), malformed(peer, ViaHTTP), refused.Error)
	writeRefusal(w, refused)
}

func (g *Gateway) connect(w http.ResponseWriter, r *http.Request, peer Peer) {
	host, port, err := connectTarget(r)
	if err != nil {
		g.refuseMalformed(w, r, peer, err)
		return
	}
	p, refused := g.open(r.Context(), Attempt{Pod: peer.Pod, Session: peer.Session, Stream: peer.Stream, Via: ViaHTTP, Host: host, Port: port})
	if refused != nil {
		writeRefusal(w, refused)
		return
	}
	guest, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		p.end(err)
		return
	}
	defer guest.Close()
	guest.SetDeadline(time.Time{})
	guest.SetWriteDeadline(time.Now().Add(g.limits.Handshake))
	if _, err := guest.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		p.end(err)
		return
	}
	guest.SetWriteDeadline(time.Time{})
	p.tunnel(guest, buffered.Reader)
}

// connectTarget reads what was sent; r.URL has been decoded once.
func connectTarget(r *http.Request) (host string, port int, err error) {
	return ParseHostPort(r.RequestURI, 0)
}

// forwardTarget reads the target of a plain request.
func forwardTarget(r *http.Request) (target, error) {
	t, err := parseTarget(r.RequestURI)
	if err == nil && t.scheme != "http" {
		err = errHTTPS
	}
	return t, err
}

var errHTTPS = errors.New("https goes through CONNECT; this proxy does not see inside")

// forward sends one plain request and its response on.
func (g *Gateway) forward(w http.ResponseWriter, r *http.Request, peer Peer) {
	t, err := forwardTarget(r)
	if err != nil {
		g.refuseMalformed(w, r, peer, err)
		return
	}
	p, refused := g.open(r.Context(), Attempt{
		Pod: peer.Pod, Session: peer.Session, Stream: peer.Stream, Via: ViaHTTP,
		Host: t.host, Port: t.port, Method: r.Method, URL: t.String(), Path: t.path,
	})
	if refused != nil {
		writeRefusal(w, refused)
		return
	}
	control := http.NewResponseController(w)
	detach := context.AfterFunc(p.ctx, func() {
		control.SetReadDeadline(past)
		control.SetWriteDeadline(past)
	})
	err = g.roundTrip(w, r, t, p, control)
	detach()
	p.end(err)
}

func (g *Gateway) roundTrip(w http.ResponseWriter, r *http.Request, t target, p *crossing, control *http.ResponseController) error {
	out, err := http.NewRequestWithContext(p.ctx, r.Method, t.String(), nil)
	if err != nil {
		writeRefusal(w, refuse(nucleus.KindInvalid, ruleName, "%v", err))
		return err
	}
	out.Header = endToEnd(r.Header)
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header.Set("User-Agent", "") // or the transport adds its own
	}
	if r.ContentLength != 0 {
		out.ContentLength = r.ContentLength
		body := &pacedBody{ReadCloser: r.Body, control: control, limit: g.limits.Idle, touch: func() {}}
		defer body.stop()
		out.Body = body
	}
	resp, err := p.transport(g).RoundTrip(out)
	if err != nil {
		writeRefusal(w, failed(p.reason(err), "asking "+p.place()))
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode < http.StatusOK {
		err := errors.New("answer with status " + resp.Status)
		writeRefusal(w, failed(err, p.place()))
		return err
	}
	for name, values := range endToEnd(resp.Header) {
		w.Header()[name] = values
	}
	w.WriteHeader(resp.StatusCode)
	if err := copyBody(w, control, g.limits.Idle, resp.Body); err != nil {
		abort(control)
		return err
	}
	return nil
}
