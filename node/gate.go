package node

import (
	"context"
	"net/netip"

	"cal/egress"
	"cal/nucleus"
)

// gate answers the gateway: each connection is a net_connect of the pod's
// session, decided and recorded like everything else.
type gate Node

// fetchPermit marks the context of a web_fetch that has been decided: its first
// request is this one, and only this one.
type fetchPermit struct {
	url string
}

type fetchKey struct{}

func withFetch(ctx context.Context, url string) context.Context {
	return context.WithValue(ctx, fetchKey{}, fetchPermit{url})
}

func (g *gate) Decide(ctx context.Context, a egress.Attempt) (egress.Ruling, error) {
	n := (*Node)(g)
	p, err := n.pod(a.Pod)
	if err != nil {
		return egress.Ruling{}, err
	}
	literals := p.policy.Literals(a.Host, a.Port)
	if permitted, ok := ctx.Value(fetchKey{}).(fetchPermit); ok && permitted.url == a.URL {
		return egress.Ruling{Verdict: nucleus.Allow, Rule: "web_fetch", Literals: literals}, nil
	}
	decision, err := n.decideConnect(p, a)
	if err != nil {
		return egress.Ruling{}, err
	}
	return egress.Ruling{Verdict: decision.Verdict, Rule: decision.Rule, Message: decision.Why, Literals: literals}, nil
}

// decideConnect judges a connection, takes its legs and records it, in the
// critical section of the session.
func (n *Node) decideConnect(p *Pod, a egress.Attempt) (nucleus.Decision, error) {
	action := connectAction(a)
	salt := nucleus.NewSalt()
	digest, err := action.Digest(salt)
	if err != nil {
		return nucleus.Decision{}, err
	}
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	decision := p.policy.Decide(action, nucleus.Context{
		Exposure: p.root.exposure, UntrustedRepo: p.record.Untrusted,
		Contained: p.record.Spec.Mode == nucleus.Contained, UnixMilli: n.config.Now().UnixMilli(),
	})
	entry := nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: "machine", Kind: nucleus.KindIntent, Op: action.Op, Digest: digest,
		Args: data(action), Verdict: decision.Verdict, Rule: decision.Rule, Data: data(map[string]any{"attempt": a.ID}),
	}
	if decision.Verdict == nucleus.Allow {
		if err := n.expose(p, decision.Takes, string(action.Op)+" "+a.Host); err != nil {
			return decision, err
		}
		if err := n.salts.Put(a.ID, salt); err != nil {
			return decision, err
		}
	} else {
		entry.Status = nucleus.OutcomeRefused
	}
	entry.Exposure = p.root.exposure.Names()
	_, err = n.append(entry)
	return decision, err
}

func connectAction(a egress.Attempt) nucleus.Action {
	if a.Via == egress.ViaFetch { // a further hop of a fetch
		return nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: a.Method, URL: a.URL, Host: a.Host, Port: a.Port, Path: a.Path}}
	}
	if a.Method != "" && a.Method != "CONNECT" { // plain HTTP: the gateway sees inside
		return nucleus.Action{
			Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: a.Host, Port: a.Port},
			Fetch: &nucleus.Fetch{Method: a.Method, URL: a.URL, Host: a.Host, Port: a.Port, Path: a.Path},
		}
	}
	return nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: a.Host, Port: a.Port}}
}

func (g *gate) Refused(_ context.Context, a egress.Attempt, why *nucleus.Error) {
	(*Node)(g).note(nucleus.Entry{
		Pod: a.Pod, Session: a.Session, Actor: "machine", Kind: nucleus.KindIntent, Op: a.Op(), Args: data(a),
		Verdict: nucleus.Deny, Rule: why.Rule, Status: nucleus.OutcomeRefused,
		Data: data(map[string]any{"attempt": a.ID, "kind": why.Kind, "message": cut(why.Message, 500)}),
	})
}

func (g *gate) Opened(_ context.Context, a egress.Attempt, addr netip.AddrPort) error {
	_, err := (*Node)(g).log.Append(nucleus.Entry{
		Pod: a.Pod, Session: a.Session, Actor: "machine", Kind: nucleus.KindEgressOpen, Op: a.Op(),
		Data: data(map[string]any{"attempt": a.ID, "via": a.Via, "host": a.Host, "port": a.Port, "address": addr.String()}),
	})
	return err
}

func (g *gate) Closed(a egress.Attempt, sent, received int64, cause error) {
	values := map[string]any{"attempt": a.ID, "via": a.Via, "host": a.Host, "port": a.Port, "sent": sent, "received": received}
	if cause != nil {
		values["error"] = cut(cause.Error(), 500)
	}
	n := (*Node)(g)
	n.note(nucleus.Entry{Pod: a.Pod, Session: a.Session, Actor: "machine", Kind: nucleus.KindEgressClose, Op: a.Op(), Data: data(values)})
}

func (g *gate) ModelCall(_ context.Context, call egress.ModelCall) error {
	_, err := (*Node)(g).log.Append(nucleus.Entry{
		Pod: call.Pod, Session: call.Session, Actor: "agent", Kind: nucleus.KindModelCall, Data: data(call),
	})
	return err
}
