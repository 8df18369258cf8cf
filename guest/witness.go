package guest

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"cal/egress"
	"cal/nucleus"
	"cal/wire"
)

// A connection that a program opens has nobody who signs for it, and an ask holds its
// requester's signed request. So the proxy signs, with the key of this boot, what it has
// seen a program ask for: it reads along what goes to the node. The node can have it
// signed that a program asked for a connection to a host and port, while the connection on
// which this was asked is open, and once for each time. It can have nothing else signed:
// operation, pod and form are written here.

// Connection is the header of a SOCKS or HTTP stream: the name by which the node may ask
// about it.
type Connection struct {
	ID string `json:"id"`
}

// SignCall is the header of a "sign" stream: what the node understood on a connection.
type SignCall struct {
	Connection string `json:"connection"`
	Host       string `json:"host"`
	Port       int    `json:"port"`
}

// SignReply ends a "sign" stream.
type SignReply struct {
	Request *wire.SignedRequest `json:"request,omitempty"`
	Error   *nucleus.Error      `json:"error,omitempty"`
}

// signPatience is how long the node may be ahead of the reading along.
const signPatience = time.Second

func (p *Proxy) sign(ctx context.Context, stream *wire.Stream) {
	stream.SetDeadline(time.Now().Add(bootDeadline))
	var call SignCall
	if err := nucleus.Strict(stream.Header, &call); err != nil {
		stream.SendJSON(wire.FrameResult, SignReply{Error: nucleus.Errorf(nucleus.KindInvalid, "sign: %v", err)})
		return
	}
	ctx, cancel := context.WithTimeout(ctx, signPatience)
	defer cancel()
	var reply SignReply
	if err := p.asked.take(ctx, call); err != nil {
		reply.Error = nucleus.Errorf(nucleus.KindForbidden, "the machine does not sign: %v", err)
	} else if signed, err := p.statement(call); err != nil {
		reply.Error = nucleus.AsError(err)
	} else {
		reply.Request = &signed
	}
	stream.SendJSON(wire.FrameResult, reply)
}

// statement is the signed request of the program that asked for host and port.
func (p *Proxy) statement(call SignCall) (wire.SignedRequest, error) {
	args, err := nucleus.Canonical(nucleus.Connect{Host: call.Host, Port: call.Port})
	if err != nil {
		return wire.SignedRequest{}, err
	}
	signer := p.signer()
	return signer.Statement(http.MethodPost, "http://nucleus/v1/pods/"+p.boot.Pod+"/tools/"+string(nucleus.NetConnect), p.boot.Pod, args)
}

// witness knows what was asked for on each connection that is open.
type witness struct {
	mu    sync.Mutex
	conns map[string]*asking
}

// asking is what one connection asks for now. A request that follows on the same
// connection takes its place.
type asking struct {
	place   nucleus.Connect
	unused  bool          // asked for, and not signed yet
	changed chan struct{} // closed at the next change
}

// watcher makes of a connection one that is read along, with the header of its stream;
// end is called when it has ended.
type watcher func(net.Conn) (watched net.Conn, header any, end func())

func unwatched(conn net.Conn) (net.Conn, any, func()) { return conn, nil, func() {} }

func (w *witness) watch(via egress.Via) watcher {
	return func(conn net.Conn) (net.Conn, any, func()) {
		id := rand.Text()
		w.mu.Lock()
		if w.conns == nil {
			w.conns = map[string]*asking{}
		}
		w.conns[id] = &asking{changed: make(chan struct{})}
		w.mu.Unlock()
		from, to := io.Pipe()
		read := make(chan struct{})
		go func() {
			defer close(read)
			err := egress.ReadAlong(from, via, func(host string, port int) { w.note(id, host, port) })
			from.CloseWithError(err) // what is written from here on is nobody's business
		}()
		return &watched{conn, to}, Connection{ID: id}, func() {
			to.Close()
			<-read
			w.mu.Lock()
			defer w.mu.Unlock()
			close(w.conns[id].changed)
			delete(w.conns, id)
		}
	}
}

func (w *witness) note(id, host string, port int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.conns[id]
	a.place, a.unused = nucleus.Connect{Host: host, Port: port}, true
	close(a.changed)
	a.changed = make(chan struct{})
}

// take waits until what the call says has been asked for on its connection, which must
// be open, and takes it: it is signed once.
func (w *witness) take(ctx context.Context, call SignCall) error {
	want := nucleus.Connect{Host: call.Host, Port: call.Port}
	for {
		w.mu.Lock()
		a := w.conns[call.Connection]
		if a == nil {
			w.mu.Unlock()
			return fmt.Errorf("no connection %.40q is open", call.Connection)
		}
		if a.unused && a.place == want {
			a.unused = false
			w.mu.Unlock()
			return nil
		}
		changed := a.changed
		w.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("connection %s does not ask for %.80q port %d, or no longer", call.Connection, call.Host, call.Port)
		}
	}
}

// watched hands what is read to whoever reads along, before anybody else sees it.
type watched struct {
	net.Conn
	along *io.PipeWriter
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		_, _ = w.along.Write(p[:n]) // nobody reads along any more
	}
	return n, err
}
