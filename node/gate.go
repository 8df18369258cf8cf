package node

import (
	"context"
	"net/netip"

	"cal/approval"
	"cal/egress"
	"cal/nucleus"
)

// gate answers the gateway: each connection is a net_connect of the pod's
// session, decided and recorded like everything else.
type gate Node

// fetchPermit marks the context of a web_fetch that has been decided: its first
// request is this one, and only this one.
type fetchPermit struct {
	url   string
	grant string
}

type fetchKey struct{}

func withFetch(ctx context.Context, url, grant string) context.Context {
	return context.WithValue(ctx, fetchKey{}, fetchPermit{url, grant})
}

func (g *gate) Decide(ctx context.Context, a egress.Attempt) (egress.Ruling, error) {
	n := (*Node)(g)
	p, err := n.pod(a.Pod)
	if err != nil {
		return egress.Ruling{}, err
	}
	ruling := egress.Ruling{Verdict: nucleus.Allow, Literals: p.policy.Literals(a.Host, a.Port)}
	if permitted, ok := ctx.Value(fetchKey{}).(fetchPermit); ok && permitted.url == a.URL {
		ruling.Rule, ruling.Grant = "web_fetch", permitted.grant
		return ruling, nil
	}
	permit, err := n.connect(ctx, p, a)
	if err == nil {
		ruling.Rule, ruling.Grant = permit.Rule, grantOf(permit)
		return ruling, nil
	}
	e := nucleus.AsError(err)
	refused := egress.Ruling{Verdict: nucleus.Deny, Rule: e.Rule, Message: e.Message, Ask: e.Ask}
	switch e.Kind {
	case nucleus.KindDenied, nucleus.KindRefused:
		return refused, nil
	case nucleus.KindApproval:
		refused.Verdict = nucleus.Ask
		return refused, nil
	}
	return egress.Ruling{}, err
}

// grantOf names the grant that a permit stands on, for the record.
func grantOf(permit nucleus.Permit) string {
	if len(permit.Grants) == 0 {
		return ""
	}
	grant, err := approval.Claims(permit.Grants[0])
	if err != nil {
		return "" // it was verified when it was used
	}
	return grant.ID
}

func (g *gate) Refused(_ context.Context, a egress.Attempt, why *nucleus.Error) {
	(*Node)(g).note(nucleus.Entry{
		Pod: a.Pod, Session: a.Session, Actor: "machine", Kind: nucleus.KindIntent, Op: a.Op(), Args: data(a),
		Verdict: nucleus.Deny, Rule: why.Rule, Status: nucleus.OutcomeRefused,
		Data: data(map[string]any{"attempt": a.ID, "kind": why.Kind, "message": logged(why.Message, 500)}),
	})
}

func (g *gate) Opened(_ context.Context, a egress.Attempt, addr netip.AddrPort) error {
	_, err := (*Node)(g).log.Append(nucleus.Entry{
		Pod: a.Pod, Session: a.Session, Actor: "machine", Kind: nucleus.KindEgressOpen, Op: a.Op(), Grants: grants(a),
		Data: data(map[string]any{"attempt": a.ID, "via": a.Via, "host": a.Host, "port": a.Port, "address": addr.String()}),
	})
	return err
}

func (g *gate) Closed(a egress.Attempt, sent, received int64, cause error) {
	values := map[string]any{"attempt": a.ID, "via": a.Via, "host": a.Host, "port": a.Port, "sent": sent, "received": received}
	if cause != nil {
		values["error"] = logged(cause.Error(), 500)
	}
	n := (*Node)(g)
	n.note(nucleus.Entry{Pod: a.Pod, Session: a.Session, Actor: "machine", Kind: nucleus.KindEgressClose, Op: a.Op(), Grants: grants(a), Data: data(values)})
}

func grants(a egress.Attempt) []string {
	if a.Grant == "" {
		return nil
	}
	return []string{a.Grant}
}

func (g *gate) ModelCall(ctx context.Context, call egress.ModelCall) error {
	if call.Done {
		return (*Node)(g).endModelCall(call)
	}
	return (*Node)(g).beginModelCall(ctx, call)
}
