package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"cal/nucleus"
)

// Rules of the gateway itself, as refusals name them.
const (
	ruleName    = "egress.name"
	ruleAddress = "egress.address"
	ruleModel   = "egress.model"
	ruleLimit   = "egress.limit"
)

var (
	errWithdrawn = errors.New("closed by the gateway: the ruling was withdrawn")
	errIdle      = errors.New("closed by the gateway: idle")
	errFinished  = errors.New("finished")
)

const (
	maxAddresses = 3 // of one name that are tried
	maxDecisions = 4 // of one attempt, when rulings are withdrawn meanwhile
)

// crossing is one attempt on its way from decision to end. Closing is by its
// context alone: whoever cancels it ends the connection, and its owner, the
// goroutine that opened it, then calls end.
type crossing struct {
	Attempt
	g      *Gateway
	outer  context.Context // of the stream
	ctx    context.Context
	cancel context.CancelCauseFunc
	conn   *meteredConn

	decided, stale bool // guarded by g.mu
}

// open is the one way out: decide, resolve, check, record, dial. The caller
// ends the crossing. The error says what the guest is told.
func (g *Gateway) open(ctx context.Context, a Attempt) (*crossing, *refusal) {
	a.ID = nucleus.NewID("eg-")
	inner, cancel := context.WithCancelCause(ctx)
	p := &crossing{Attempt: a, g: g, outer: ctx, ctx: inner, cancel: cancel}
	g.mu.Lock()
	g.crossings[p] = struct{}{}
	g.mu.Unlock()

	ruling, refused := p.decide()
	if refused == nil {
		refused = p.connect(ruling)
	}
	if refused != nil {
		refused.Operation = a.Op()
		p.forget()
		return nil, refused
	}
	return p, nil
}

// refusal is why there is no connection: what the guest is told, and the error
// behind it where there is one.
type refusal struct {
	*nucleus.Error
	cause error
}

func refuse(kind nucleus.Kind, rule, format string, args ...any) *refusal {
	e := nucleus.Errorf(kind, format, args...)
	e.Rule = rule
	return &refusal{Error: e}
}

// unavailable hides from the guest why the node could not decide or record.
func unavailable(cause error, format string, args ...any) *refusal {
	return &refusal{nucleus.Errorf(nucleus.KindUnavailable, format, args...), cause}
}

// forget ends what never had a connection.
func (p *crossing) forget() {
	p.cancel(nil)
	p.g.mu.Lock()
	delete(p.g.crossings, p)
	p.g.mu.Unlock()
}

func (p *crossing) decide() (Ruling, *refusal) {
	ctx, cancel := context.WithTimeout(p.ctx, p.g.limits.Decide)
	defer cancel()
	for range maxDecisions {
		ruling, err := p.g.gate.Decide(ctx, p.Attempt)
		if err != nil {
			return Ruling{}, unavailable(err, "%s could not be decided", p.place())
		}
		if refused := refusalOf(ruling, p.place()); refused != nil {
			return Ruling{}, refused
		}
		p.g.mu.Lock()
		p.decided, p.stale = !p.stale, false
		p.Grant = ruling.Grant
		decided := p.decided
		p.g.mu.Unlock()
		if decided {
			return ruling, nil
		}
	}
	return Ruling{}, unavailable(nil, "%s could not be decided: the ruling was withdrawn %d times", p.place(), maxDecisions)
}

func (p *crossing) place() string { return joinHostPort(p.Host, p.Port) }

// refusalOf returns nil for a ruling that allows, and for nothing else.
func refusalOf(r Ruling, place string) *refusal {
	if r.Verdict == nucleus.Allow {
		return nil
	}
	refused := refuse(nucleus.KindDenied, r.Rule, "%s", r.Message)
	switch {
	case r.Verdict == nucleus.Ask:
		refused.Kind = nucleus.KindApproval
	case r.Ask != "":
		refused.Kind = nucleus.KindRefused
	}
	refused.Ask = r.Ask
	if refused.Message == "" {
		refused.Message = fmt.Sprintf("%s is not allowed (rule %s)", place, r.Rule)
	}
	return refused
}

// connect resolves, checks, and dials what was checked.
func (p *crossing) connect(ruling Ruling) *refusal {
	ctx, cancel := context.WithTimeout(p.ctx, p.g.limits.Dial)
	defer cancel()
	addrs, refused := p.g.addresses(ctx, p.Host, ruling.Literals)
	if refused != nil {
		p.g.gate.Refused(context.WithoutCancel(ctx), p.Attempt, refused.Error)
		return refused
	}
	var err error
	for i, addr := range addrs {
		to := netip.AddrPortFrom(addr, uint16(p.Port))
		if e := p.g.gate.Opened(ctx, p.Attempt, to); e != nil {
			return unavailable(e, "%s could not be recorded", p.place())
		}
		var conn net.Conn
		if conn, err = p.g.dial(ctx, to, len(addrs)-i); err == nil {
			p.conn = newMeteredConn(conn, p)
			return nil
		}
		err = p.reason(err)
		p.g.gate.Closed(p.Attempt, 0, 0, err)
		if ctx.Err() != nil {
			break
		}
	}
	return failed(err, "connecting to "+p.place())
}

// Lookup returns the addresses that a connection to host would be tried at now, and
// connects to none. It asks a resolver about the name: whoever lets a guest choose
// names freely gives it a way out by that. An error that is a *nucleus.Error of
// KindDenied says that host leads to a place which the gateway never dials.
func (g *Gateway) Lookup(ctx context.Context, host string, literals []netip.Prefix) ([]netip.Addr, error) {
	addrs, refused := g.addresses(ctx, host, literals)
	if refused != nil {
		return nil, refused.Error
	}
	return addrs, nil
}

// addresses returns what host stands for, each one checked: the host itself if
// it is an address, else the answer of one question to the resolver. One
// forbidden address among them refuses all: an honest name has none.
func (g *Gateway) addresses(ctx context.Context, host string, literals []netip.Prefix) ([]netip.Addr, *refusal) {
	if addr, err := netip.ParseAddr(host); err == nil {
		opened := slices.ContainsFunc(literals, func(n netip.Prefix) bool { return n.Contains(addr) })
		if err := guard(addr); err != nil && !opened {
			return nil, refuse(nucleus.KindDenied, ruleAddress, "%v; only a rule with this address or its network opens it", err)
		}
		return []netip.Addr{addr}, nil
	}
	answer, err := g.resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, failed(err, "resolving "+host)
	}
	if len(answer) == 0 {
		return nil, refuse(nucleus.KindFailed, "", "resolving %s: no address", host)
	}
	addrs := make([]netip.Addr, len(answer))
	for i, addr := range answer {
		addrs[i] = addr.Unmap() // Go's resolver wraps the answers to A questions
		if err := guard(addrs[i]); err != nil {
			return nil, refuse(nucleus.KindDenied, ruleAddress, "%s leads to a forbidden place: %v", host, err)
		}
	}
	return addrs[:min(len(addrs), maxAddresses)], nil
}

// dial connects to one of left addresses, and takes its share of the time that
// remains.
func (g *Gateway) dial(ctx context.Context, to netip.AddrPort, left int) (net.Conn, error) {
	deadline, _ := ctx.Deadline()
	ctx, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
	defer cancel()
	return g.dialer.DialContext(ctx, "tcp", to.String())
}

// failed says why something that was allowed could not be done. It keeps the
// host's own addresses (its resolver, its interfaces) out of the message.
func failed(cause error, doing string) *refusal {
	kind := nucleus.KindFailed
	var timeout net.Error
	if errors.As(cause, &timeout) && timeout.Timeout() {
		kind = nucleus.KindTimeout
	}
	reason := cause
	var (
		dns *net.DNSError
		op  *net.OpError
	)
	if errors.As(cause, &dns) {
		reason = errors.New(dns.Err)
	} else if errors.As(cause, &op) {
		reason = op.Err
	}
	return &refusal{nucleus.Errorf(kind, "%s: %v", doing, reason), cause}
}

// reason is why the crossing ended: the word of whoever closed it goes before
// the error that its owner saw from that.
func (p *crossing) reason(err error) error {
	cause := context.Cause(p.ctx)
	if errors.Is(cause, os.ErrDeadlineExceeded) && p.outer.Err() != nil {
		return context.Cause(p.outer) // which set the deadline
	}
	if cause != nil && cause != errFinished {
		return cause
	}
	return err
}

// end closes the crossing's connection and reports it; err is what its owner saw.
func (p *crossing) end(err error) {
	err = p.reason(err)
	p.conn.stop()
	p.forget()
	p.g.gate.Closed(p.Attempt, p.conn.sent.Load(), p.conn.received.Load(), err)
}

// meteredConn is the outer side of a crossing. It counts bytes, and ends the
// crossing when none has moved for the idle limit.
type meteredConn struct {
	net.Conn
	sent, received atomic.Int64
	idle           *time.Timer
	limit          time.Duration
	detach         func() bool
}

func newMeteredConn(conn net.Conn, p *crossing) *meteredConn {
	m := &meteredConn{Conn: conn, limit: p.g.limits.Idle}
	m.idle = time.AfterFunc(m.limit, func() { p.cancel(errIdle) })
	m.detach = context.AfterFunc(p.ctx, func() { conn.Close() })
	return m
}

func (m *meteredConn) stop() {
	m.idle.Stop()
	m.detach()
	m.Conn.Close()
}

func (m *meteredConn) Read(b []byte) (int, error) {
	n, err := m.Conn.Read(b)
	m.received.Add(int64(n))
	m.touch(n)
	return n, err
}

func (m *meteredConn) Write(b []byte) (int, error) {
	n, err := m.Conn.Write(b)
	m.sent.Add(int64(n))
	m.touch(n)
	return n, err
}

func (m *meteredConn) touch(n int) {
	if n > 0 {
		m.idle.Reset(m.limit)
	}
}

// closeWrite ends the outgoing half of a connection and reports whether it has
// halves.
func closeWrite(conn net.Conn) bool {
	c, ok := conn.(interface{ CloseWrite() error })
	return ok && c.CloseWrite() == nil
}
