// Package egress is the gateway on the host: the only way from a machine to any
// network.
//
// What arrives here comes from a guest that may be wholly hostile. It tries to
// reach hosts that no rule names, to smuggle a second name past the check of the
// first, to make an allowed name lead into the host's own networks, to carry
// data out in DNS queries, to learn the keys that the gateway adds, and to tie
// up the host with connections that never end.
//
// The gateway promises: a host is resolved only after the policy allowed it,
// resolved once, and exactly the address that was checked and recorded is
// dialled. Private and special addresses are reached only where a rule names an
// address or a network and the guest asks for the address itself. A TLS
// connection names the host that was asked for. What is recorded is recorded
// before the first packet leaves. A refusal is an answer, at once. A credential
// that the gateway adds is in nothing that goes back to the guest.
//
// BUG: inside TLS the gateway cannot see the Host field. A provider that serves
// one customer's site over the TLS name of another's can be used to reach the
// latter's neighbours; so can plain HTTP spoken through a SOCKS connection.
package egress

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"cal/nucleus"
)

// Peer is where a stream came from, as the node knows it; nothing that the
// guest says enters it.
type Peer struct {
	Pod     string
	Session string
	Stream  string // the machine's name of the connection; for who asks it about that one
}

// Via is the way an attempt came.
type Via string

// The ways.
const (
	ViaSOCKS Via = "socks"
	ViaHTTP  Via = "http"
	ViaModel Via = "model"
	ViaFetch Via = "fetch"
)

// Attempt is one try to reach something outside. Host and Port are what was
// asked for in the spelling of ParseHost. Method, URL and Path are present where
// the gateway sees inside: plain HTTP, fetches and model calls.
type Attempt struct {
	ID      string `json:"id"`
	Pod     string `json:"pod"`
	Session string `json:"session"`
	Via     Via    `json:"via"`
	Host    string `json:"host"`
	Port    int    `json:"port"`
	Method  string `json:"method,omitempty"`
	URL     string `json:"url,omitempty"`
	Path    string `json:"path,omitempty"`  // escaped
	Stream  string `json:"-"`               // of Peer
	Grant   string `json:"grant,omitempty"` // of the ruling that let it through
}

// Op is the operation that an attempt is judged as.
func (a Attempt) Op() nucleus.Op {
	if a.Via == ViaFetch {
		return nucleus.WebFetch
	}
	return nucleus.NetConnect
}

// Ruling is the answer to an attempt. Literals are the networks of the rules
// that name an address; they open forbidden ranges for a host that is itself an
// address. Any Verdict but Allow refuses.
type Ruling struct {
	Verdict  nucleus.Verdict
	Rule     string
	Message  string
	Ask      string // id of the ask: pending where Verdict is Ask, refused by a person where it is Deny
	Grant    string // id of the grant, where Verdict is Allow because of one
	Literals []netip.Prefix
}

// Gate decides and records. The node implements it; its methods are called from
// many goroutines at once.
type Gate interface {
	// Decide judges an attempt and records the judgement. It is called before
	// any name is resolved, and again for the same attempt when CloseAll ran in
	// between. An error means that it could not be decided, and refuses. For a
	// fetch ctx is the one that Fetch was given, so that the node can answer
	// with the decision that it has already made.
	Decide(ctx context.Context, a Attempt) (Ruling, error)

	// Refused records that the gateway itself refused an attempt: a malformed
	// host (Host is empty, nothing was decided), a name that does not resolve
	// or leads to a forbidden address (after Decide), a path that the model
	// route does not let through.
	Refused(ctx context.Context, a Attempt, why *nucleus.Error)

	// Opened records that addr is about to be dialled. It returns once the
	// record is durable; on an error nothing is dialled.
	Opened(ctx context.Context, a Attempt, addr netip.AddrPort) error

	// Closed follows each Opened that returned nil, once: the connection ended,
	// or could not be made. Bytes are those on the wire; err is nil for an
	// ordinary end. An attempt whose first address did not answer opens the
	// next, as another pair with the same ID.
	Closed(a Attempt, sent, received int64, err error)

	// ModelCall admits a call to the model and records its intent (Done is false; an
	// error refuses the call, a *nucleus.Error in its words), and then charges and
	// records its outcome. It may wait for others to end before it admits one.
	ModelCall(ctx context.Context, call ModelCall) error
}

// Resolver turns a name into addresses, in the order in which they are to be
// tried. *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Dialer opens a TCP connection to an address. *net.Dialer is one.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Limits bound what a guest can hold. Zero means the default in brackets.
type Limits struct {
	Connections int           // of one pod at once (256)
	Header      int           // bytes of an HTTP request's head (64 KiB)
	Handshake   time.Duration // for a SOCKS greeting, an HTTP head, a ClientHello (10 s)
	Decide      time.Duration // for the Gate to answer (10 s)
	Dial        time.Duration // to resolve and connect (10 s)
	Idle        time.Duration // without a byte in either direction (15 min)
	Fetch       time.Duration // for one fetch (30 s)
	FetchBody   int64         // bytes of a fetch's answer that are kept (1 MiB)
	ModelBody   int64         // bytes of a request to the model (64 MiB)
	ModelWait   time.Duration // for a call to the model to be admitted (2 min)
}

func (l Limits) withDefaults() Limits {
	fill(&l.Connections, 256)
	fill(&l.Header, 64<<10)
	fill(&l.Handshake, 10*time.Second)
	fill(&l.Decide, 10*time.Second)
	fill(&l.Dial, 10*time.Second)
	fill(&l.Idle, 15*time.Minute)
	fill(&l.Fetch, 30*time.Second)
	fill(&l.FetchBody, 1<<20)
	fill(&l.ModelBody, 64<<20)
	fill(&l.ModelWait, 2*time.Minute)
	return l
}

func fill[T int | int64 | time.Duration](v *T, standard T) {
	if *v == 0 {
		*v = standard
	}
}

// Config is what a gateway needs. Without a Gate everything is refused. Nil
// Resolver, Dialer and Roots are the host's own, a nil Now is time.Now.
type Config struct {
	Gate     Gate
	Resolver Resolver
	Dialer   Dialer
	Roots    *x509.CertPool
	Now      func() time.Time
	Limits   Limits
}

// Gateway serves the streams of all pods of a node. Its Serve methods take over
// the connection, which must keep the contract of net.Conn (Close ends reads and
// writes under way), return when everything that they started has ended, and may
// run at once.
type Gateway struct {
	gate     Gate
	resolver Resolver
	dialer   Dialer
	roots    *x509.CertPool
	now      func() time.Time
	limits   Limits

	mu        sync.Mutex
	crossings map[*crossing]struct{}
	streams   map[string]int // open streams by pod
}

// New returns a gateway.
func New(c Config) *Gateway {
	g := &Gateway{
		gate:      c.Gate,
		resolver:  c.Resolver,
		dialer:    c.Dialer,
		roots:     c.Roots,
		now:       c.Now,
		limits:    c.Limits.withDefaults(),
		crossings: map[*crossing]struct{}{},
		streams:   map[string]int{},
	}
	if g.gate == nil {
		g.gate = closedGate{}
	}
	if g.resolver == nil {
		g.resolver = absoluteResolver{net.DefaultResolver}
	}
	if g.dialer == nil {
		g.dialer = &net.Dialer{}
	}
	if g.now == nil {
		g.now = time.Now
	}
	return g
}

// absoluteResolver asks for the name and nothing else: the host's search
// domains would turn "metadata" into a name that no rule has judged.
type absoluteResolver struct{ *net.Resolver }

func (r absoluteResolver) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	return r.Resolver.LookupNetIP(ctx, network, host+".")
}

// closedGate is the gate of a gateway that was given none.
type closedGate struct{}

var errNoGate = errors.New("nobody decides and records for this gateway")

func (closedGate) Decide(context.Context, Attempt) (Ruling, error)       { return Ruling{}, errNoGate }
func (closedGate) Refused(context.Context, Attempt, *nucleus.Error)      {}
func (closedGate) Opened(context.Context, Attempt, netip.AddrPort) error { return errNoGate }
func (closedGate) Closed(a Attempt, sent, received int64, err error)     {}
func (closedGate) ModelCall(ctx context.Context, call ModelCall) error   { return errNoGate }

// CloseAll ends the peer's crossings for which keep returns false (all, if keep
// is nil) and returns their number; a Peer without Session means every session
// of the pod. An attempt that is being decided meanwhile is decided again, so
// that no ruling from before the call lives on after it. It waits for nothing
// and may be called from within Gate.Decide.
func (g *Gateway) CloseAll(peer Peer, keep func(Attempt) bool) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for p := range g.crossings {
		if p.Pod != peer.Pod || peer.Session != "" && p.Session != peer.Session {
			continue
		}
		if keep != nil && keep(p.Attempt) {
			continue
		}
		n++
		if p.decided {
			p.cancel(errWithdrawn)
		} else {
			p.stale = true
		}
	}
	return n
}

// admit counts a stream of a pod; the caller calls the function it returns when
// the stream has ended. It returns nil when the pod has too many.
func (g *Gateway) admit(pod string) func() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.streams[pod] >= g.limits.Connections {
		return nil
	}
	g.streams[pod]++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.streams[pod]--; g.streams[pod] == 0 {
			delete(g.streams, pod)
		}
	}
}
