package node

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/approval/spent"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// approved is a grant that the authority gave for an ask of ours.
type approved struct {
	ask   nucleus.AskRequest
	grant nucleus.Grant
	token string
}

// askLife is how long a person has to answer.
const askLife = 15 * time.Minute

// pendingAsk ties an ask to the prepared request it was made for: a retry
// continues with exactly these values.
type pendingAsk struct {
	ask nucleus.AskRequest
	pre prepared
	op  nucleus.Op
}

// askBook holds the asks of one pod in memory: an ask dies with its boot.
type askBook struct {
	mu     sync.Mutex
	asks   map[string]pendingAsk
	closed bool // the pod has ended
}

func (b *askBook) put(p pendingAsk) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	if b.asks == nil {
		b.asks = map[string]pendingAsk{}
	}
	for id, old := range b.asks { // nobody came back for them
		if old.ask.Expires <= p.ask.Created {
			b.remove(id)
		}
	}
	p.pre.sent.hold()
	b.asks[p.ask.ID] = p
}

// remove forgets an ask and what was kept for it. The caller holds the mutex.
func (b *askBook) remove(id string) {
	if p, ok := b.asks[id]; ok {
		delete(b.asks, id)
		p.pre.sent.drop()
	}
}

// clear forgets all asks of a pod that has ended.
func (b *askBook) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for id := range b.asks {
		b.remove(id)
	}
}

func (b *askBook) get(id string) (pendingAsk, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, ok := b.asks[id]
	return p, ok
}

// same finds a living ask for the same action, so that an agent
// that repeats itself does not fill the person's queue. The caller holds what it keeps.
func (b *askBook) same(op nucleus.Op, action nucleus.Action, requester string, now int64) (pendingAsk, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.asks {
		if p.op == op && p.ask.Requester == requester && now < p.ask.Expires && sameAction(p.pre.action, action) {
			p.pre.sent.hold()
			return p, true
		}
	}
	return pendingAsk{}, false
}

func (b *askBook) drop(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.remove(id)
}

// approve puts the request before a person, waits as long as the caller does, and
// decides again when a grant arrives. What was prepared for the ask comes back with a
// hold, or nothing.
func (n *Node) approve(ctx context.Context, p *Pod, r request, pre prepared, needed *needsApproval) (ruling, prepared, error) {
	if !n.canApprove(p) {
		if err := n.recordUnapproved(p, r, pre, needed); err != nil {
			return ruling{}, prepared{}, err
		}
		return ruling{}, prepared{}, &nucleus.Error{Kind: nucleus.KindApproval, Operation: r.op, Rule: needed.decision.Rule,
			Message: needed.decision.Why + "; nobody could approve when this machine started (cal approve init makes the key)"}
	}
	pending, err := n.pendingAsk(ctx, p, r, pre, needed)
	if err != nil {
		return ruling{}, prepared{}, err
	}
	granted := false
	defer func() {
		if !granted {
			pending.pre.sent.drop()
		}
	}()
	answer, err := n.await(ctx, pending.ask.ID, r.wait)
	if err != nil {
		return ruling{}, prepared{}, authorityFailure(err)
	}
	switch answer.State {
	case approvals.Granted:
	case approvals.Denied, approvals.Expired:
		p.asks.drop(pending.ask.ID)
		return ruling{}, prepared{}, n.recordRefusal(p, r, pending, answer.State, answer.Reason)
	default:
		return ruling{}, prepared{}, &nucleus.Error{Kind: nucleus.KindApproval, Operation: r.op, Rule: needed.decision.Rule, Ask: pending.ask.ID,
			Message: needed.decision.Why + "; a person has been asked and has not answered yet; call again to wait on"}
	}
	grant, err := approval.Verify(answer.Token, pending.ask, approverMap(p.approvers), n.config.Now().UnixMilli())
	if err != nil {
		return ruling{}, prepared{}, nucleus.Errorf(nucleus.KindRefused, "the authority's grant for %s: %v", pending.ask.ID, err)
	}
	p.asks.drop(pending.ask.ID)
	// The values that were approved, not those that were resolved anew for a retry.
	granted = true
	ruled, err := n.decide(p, r, pending.pre, &approved{pending.ask, grant, answer.Token})
	return ruled, pending.pre, err
}

// canApprove reports whether anybody could grant anything to this pod.
func (n *Node) canApprove(p *Pod) bool { return n.asks != nil && len(p.approvers) > 0 }

// recordUnapproved records a request that needed an approval nobody could give.
func (n *Node) recordUnapproved(p *Pod, r request, pre prepared, needed *needsApproval) error {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	entry := n.intent(p, r, pre, "", needed.decision)
	entry.Status = nucleus.OutcomeRefused
	if _, err := n.append(entry); err != nil {
		return logFailure(err)
	}
	return nil
}

// await waits for a person, but not longer than the caller does: an answer that is
// still pending is no error.
func (n *Node) await(ctx context.Context, ask string, wait time.Duration) (approvals.Status, error) {
	if wait > 0 {
		waiting, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		status, err := n.asks.Wait(waiting, ask)
		if err == nil || waiting.Err() == nil {
			return status, err
		}
	}
	return n.asks.Status(ctx, ask)
}

func (n *Node) pendingAsk(ctx context.Context, p *Pod, r request, pre prepared, needed *needsApproval) (pendingAsk, error) {
	now := n.config.Now()
	if known, ok := p.asks.same(r.op, pre.action, r.caller.KeyID, now.UnixMilli()); ok {
		return known, nil
	}
	if err := pre.sent.await(); err != nil {
		return pendingAsk{}, n.refuseUnresolved(p, r, err)
	}
	signed, err := json.Marshal(r.signed)
	if err != nil {
		return pendingAsk{}, err
	}
	ask := nucleus.AskRequest{
		ID: nucleus.NewID("a-"), Pod: p.record.ID, Workspace: p.record.Spec.Workspace, Session: p.record.Session, Boot: p.record.Boot,
		Requester: r.caller.KeyID, Request: signed, Action: pre.action, Digest: pre.digest, Salt: pre.salt[:],
		Policy: p.digest, Rule: needed.decision.Rule, Why: needed.decision.Why, Context: needed.context,
		Tier: string(p.record.Tier), Mode: string(p.record.Spec.Mode), Detail: pre.detail, Evidence: p.root.shown(),
		Created: now.UnixMilli(), Expires: now.Add(askLife).UnixMilli(), Nonce: nucleus.NewID("n-"),
	}
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindApprovalAsk, Op: r.op,
		Digest: pre.digest, Args: data(pre.action), Verdict: nucleus.Ask, Rule: needed.decision.Rule, Ask: ask.ID,
	}); err != nil {
		return pendingAsk{}, logFailure(err)
	}
	if _, err := n.asks.Submit(ctx, ask); err != nil {
		return pendingAsk{}, authorityFailure(err)
	}
	pending := pendingAsk{ask: ask, pre: pre, op: r.op}
	pre.sent.hold()
	p.asks.put(pending)
	return pending, nil
}

func sameAction(a, b nucleus.Action) bool {
	x, errX := nucleus.Canonical(a)
	y, errY := nucleus.Canonical(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

func (s *rootSession) shown() []nucleus.Evidence {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]nucleus.Evidence(nil), s.evidence...)
}

func authorityFailure(err error) error {
	return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority cannot be reached: %v (start it with: nucleus-authority serve)", err)
}

func (n *Node) recordRefusal(p *Pod, r request, pending pendingAsk, state, reason string) error {
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindApprovalDeny, Op: r.op,
		Digest: pending.ask.Digest, Verdict: nucleus.Deny, Rule: pending.ask.Rule, Ask: pending.ask.ID, Status: state,
		Data: data(map[string]any{"reason": cut(reason, 1000)}),
	}); err != nil {
		return logFailure(err)
	}
	message := "the person said no"
	if state == approvals.Expired {
		message = "nobody answered in time"
	}
	if reason != "" {
		message += ": " + reason
	}
	return &nucleus.Error{Kind: nucleus.KindRefused, Operation: r.op, Rule: pending.ask.Rule, Ask: pending.ask.ID, Message: message}
}

// useGrant uses a grant up durably, before the effect, once. The caller holds the
// session's mutex.
func (n *Node) useGrant(p *Pod, a *approved, permit string) error {
	err := n.spent.Use(a.grant)
	if errors.Is(err, spent.ErrUsed) {
		return nucleus.Errorf(nucleus.KindRefused, "grant %s was used before", a.grant.ID)
	}
	if err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: grant %s cannot be used up: %v", a.grant.ID, err)
	}
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: a.grant.Approver, Kind: nucleus.KindApprovalUse, Op: a.grant.Op,
		Digest: a.grant.Digest, Ask: a.ask.ID, Grants: []string{a.grant.ID}, Permit: permit, Data: data(map[string]any{"token": a.token}),
	}); err != nil {
		return logFailure(err)
	}
	p.used.Store(permit, &a.ask)
	// For the authority's record; the grant is used up whether it hears of it or not.
	go n.reportUse(a.grant.ID)
	return nil
}

func (n *Node) reportUse(grant string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := n.asks.Used(ctx, grant); err != nil {
		slog.Warn("the authority did not take note of a grant's use", "grant", grant, "error", err)
	}
}

// askOf returns the ask that a permit's grant was given for.
func (p *Pod) askOf(permit nucleus.Permit) (*nucleus.AskRequest, error) {
	ask, ok := p.used.LoadAndDelete(permit.ID)
	if !ok {
		return nil, fmt.Errorf("permit %s has a grant but no ask", permit.ID)
	}
	return ask.(*nucleus.AskRequest), nil
}

// approverKeys asks the authority for its public keys; without an authority there
// are none and nothing can be approved.
func (n *Node) approverKeys(ctx context.Context) map[string][]byte {
	if n.asks == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	info, err := n.asks.Info(ctx)
	if err != nil || len(info.PublicKey) != ed25519.PublicKeySize {
		return nil
	}
	return map[string][]byte{info.Approver: info.PublicKey}
}

func approverMap(keys map[string][]byte) map[string]ed25519.PublicKey {
	out := map[string]ed25519.PublicKey{}
	for name, key := range keys {
		out[name] = key
	}
	return out
}

// registerRequesters tells the authority which keys may ask for this pod. When it
// is not there, gated operations will be refused; the rest goes on.
func (n *Node) registerRequesters(ctx context.Context, p *Pod) {
	if n.asks == nil {
		return
	}
	operator, err := keyfile.Load(n.operatorKeyFile())
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	err = n.asks.RegisterPod(ctx, p.record.ID, map[string][]byte{
		OperatorKey:   operator.Public().(ed25519.PublicKey),
		p.record.Boot: p.record.OutcomeKey,
	})
	if err != nil {
		slog.Warn("the authority does not know who may ask for a pod; what needs an approval will be refused", "pod", p.record.ID, "error", err)
	}
}
