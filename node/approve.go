package node

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/approval/spent"
	"cal/audit"
	"cal/audit/witness"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// approved are the grants that the authority gave for an ask of ours, one of each approver.
type approved struct {
	ask    nucleus.AskRequest
	grants []nucleus.Grant
	tokens []string
}

// askLife is how long a person has to answer.
const askLife = 15 * time.Minute

// askGrace is how much longer a request may wait: its ask is made after it has come, and ends as
// expired.
const askGrace = time.Minute

// pendingAsk ties an ask to the prepared request it was made for: a retry
// continues with exactly these values, unless the ask is for a passage.
type pendingAsk struct {
	ask     nucleus.AskRequest
	pre     prepared
	op      nucleus.Op
	refused *nucleus.Error // a person's no to a place, which stands for a while
	until   int64          // unix milliseconds
}

// askBook holds the asks of one pod in memory: an ask dies with its boot.
type askBook struct {
	mu     sync.Mutex
	asks   map[string]pendingAsk
	closed bool          // the pod has ended
	making chan struct{} // holds whoever makes an ask
}

// alone waits for its turn to make an ask, so that many requests for one thing make one.
func (b *askBook) alone(ctx context.Context) (leave func(), err error) {
	b.mu.Lock()
	if b.making == nil {
		b.making = make(chan struct{}, 1)
	}
	making := b.making
	b.mu.Unlock()
	select {
	case making <- struct{}{}:
		return func() { <-making }, nil
	case <-ctx.Done():
		return nil, nucleus.Errorf(nucleus.KindTimeout, "another ask of this machine is still being made")
	}
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
	if p.until == 0 {
		p.until = p.ask.Expires
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

// waiting lists the asks that a person can still answer.
func (b *askBook) waiting(now int64) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var ids []string
	for id, p := range b.asks {
		if p.refused == nil && now < p.until {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
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

// same finds a living ask for the same action, or for the place that the action leads to,
// so that an agent that repeats itself does not fill the person's queue; the caller holds
// what it keeps. An ask for a place that told the person less than the session has taken
// since is not the same. Asks whose time is over are forgotten: nobody came back for them.
func (b *askBook) same(r request, action nucleus.Action, beside nucleus.Legs, now int64) (known pendingAsk, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, p := range b.asks {
		if now >= p.until {
			b.remove(id)
			continue
		}
		if p.op == r.op && p.sameAs(r, action, beside) {
			known, ok = p, true
		}
	}
	if ok {
		known.pre.sent.hold()
	}
	return known, ok
}

func (p pendingAsk) sameAs(r request, action nucleus.Action, beside nucleus.Legs) bool {
	host, port, placed := action.Place()
	if q := p.ask.Passage; placed && q != nil {
		return q.Host == host && q.Port == port && (p.refused != nil || beside&bothLegs&^q.Exposure == 0)
	}
	return p.ask.Requester == r.caller.KeyID && sameAction(p.pre.action, action)
}

// dropAsk forgets an ask that has been answered.
func (p *Pod) dropAsk(id string) {
	p.root.answered(id)
	p.asks.mu.Lock()
	defer p.asks.mu.Unlock()
	p.asks.remove(id)
}

// What a session asks for at once, its sub-agents and sub-pods with it: a program that tries one
// thing after the other fills neither the person's queue nor the host's disk. The authority holds
// each pod to bounds of its own.
const (
	maxOpenAsks     = 16
	maxOpenAskBytes = 8 << 20 // of their canonical bytes
)

// openAsk is what an ask takes of its session's bounds.
type openAsk struct {
	bytes int
	until int64 // unix milliseconds
}

// askFor takes one of the asks that a session may have open. It is given back by answered, or
// when the ask expires.
func (s *rootSession) askFor(ask string, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.asks, func(_ string, o openAsk) bool { return now.UnixMilli() >= o.until })
	if n := len(s.asks); n >= maxOpenAsks {
		return fmt.Errorf("%d asks of this session wait for a person, no more at once: %s", n, askLess)
	}
	if s.asks == nil {
		s.asks = map[string]openAsk{}
	}
	s.asks[ask] = openAsk{until: now.Add(askLife).UnixMilli()}
	return nil
}

// weigh notes how many bytes a person is shown of an ask that was taken by askFor.
func (s *rootSession) weigh(ask string, bytes int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	others := 0
	for _, o := range s.asks {
		others += o.bytes
	}
	if others+bytes > maxOpenAskBytes {
		return fmt.Errorf("this ask has %d bytes, and %d of this session that wait for a person have %d, at most %d are allowed: ask for less at once, or %s", bytes, len(s.asks)-1, others, maxOpenAskBytes, askLess)
	}
	o := s.asks[ask]
	o.bytes = bytes
	s.asks[ask] = o
	return nil
}

const askLess = "call again when some are answered or expired (each lives 15 minutes)"

func (s *rootSession) answered(ask string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asks, ask)
}

// approve puts the request before a person, waits as long as the caller does, and
// decides again when a grant arrives. What was approved comes back with a hold, or
// nothing.
func (n *Node) approve(ctx context.Context, p *Pod, r request, pre prepared, needed *needsApproval) (ruling, prepared, error) {
	grant, approvedPre, err := n.obtain(ctx, p, r, pre, needed)
	if err != nil {
		return ruling{}, prepared{}, n.recordUnapproved(p, r, pre, needed, err)
	}
	ruled, err := n.decide(ctx, p, r, approvedPre, grant)
	if grant != nil {
		p.dropAsk(grant.ask.ID)
	}
	if needsOf(err) != nil { // the passage that was open has ended meanwhile
		err = n.recordUnapproved(p, r, pre, needed, &nucleus.Error{Kind: nucleus.KindApproval, Operation: r.op, Rule: needed.decision.Rule, Message: needed.decision.Why + "; call again to ask"})
	}
	return ruled, approvedPre, err
}

// unapprovable says why nobody could grant to this pod what a decision asks for; "" where
// somebody could.
func (n *Node) unapprovable(p *Pod, d nucleus.Decision) string {
	switch {
	case n.spentErr != nil:
		return fmt.Sprintf("which grants were used before cannot be known: %v (when it is moved away, cal node restart begins a new file; the authority counts too, so no grant is good twice)", n.spentErr)
	case n.asks == nil || len(p.approvers) == 0:
		return "nobody could approve when this machine started (cal approve init makes the key; where there is one, the authority did not run or did not answer then, and machines that start when it does know who can approve)"
	case d.Approvals > len(p.approvers):
		return fmt.Sprintf("the policy wants the approvals of %d different persons, and %d could approve when this machine started (nucleus-authority approver add makes more; machines that start then know them)", d.Approvals, len(p.approvers))
	}
	return ""
}

// obtain gets a grant and the values that it was given for, with a hold. A grant for a
// place lets the request's own values through; no grant and no error mean that somebody
// else has opened the passage meanwhile.
func (n *Node) obtain(ctx context.Context, p *Pod, r request, pre prepared, needed *needsApproval) (*approved, prepared, error) {
	fail := func(err error) (*approved, prepared, error) { return nil, prepared{}, err }
	refuse := func(ask, message string) (*approved, prepared, error) {
		return fail(&nucleus.Error{Kind: nucleus.KindApproval, Operation: r.op, Rule: needed.decision.Rule, Ask: ask, Message: needed.decision.Why + "; " + message})
	}
	holding := func(grant *approved, pre prepared) (*approved, prepared, error) {
		pre.sent.hold()
		return grant, pre, nil
	}
	if why := n.unapprovable(p, needed.decision); why != "" {
		return refuse("", why)
	}
	pending, made, err := n.pendingAsk(ctx, p, r, pre, needed)
	if err != nil {
		return fail(err)
	}
	if !made {
		return holding(nil, pre)
	}
	defer pending.pre.sent.drop()
	if pending.refused != nil {
		return fail(pending.refused)
	}
	if r.waiting != nil && time.Until(r.until) > 0 {
		r.waiting(pending.ask.ID)
	}
	answer, err := n.await(ctx, p, pending.ask.ID, time.Until(r.until))
	if r.waiting != nil {
		r.waiting("")
	}
	if err != nil {
		return fail(authorityFailure(err))
	}
	switch answer.State {
	case approvals.Granted:
	case approvals.Denied, approvals.Expired, approvals.Withdrawn, approvals.Revoked:
		refused, err := n.recordRefusal(p, r, pending, answer.State, answer.Reason)
		if err != nil {
			return fail(err)
		}
		p.dropAsk(pending.ask.ID)
		if pending.ask.Passage != nil && answer.State == approvals.Denied {
			pending.refused, pending.until = refused, n.config.Now().Add(askLife).UnixMilli()
			p.asks.put(pending)
		}
		return fail(refused)
	default:
		return refuse(pending.ask.ID, fmt.Sprintf("%s; call again with the same arguments and \"ask\": %q to wait on", waitsFor(answer), pending.ask.ID))
	}
	grants, err := approval.Approved(answer.Tokens(), pending.ask, p.approvers, n.config.Now().UnixMilli())
	if err != nil {
		return fail(&nucleus.Error{Kind: nucleus.KindRefused, Operation: r.op, Ask: pending.ask.ID, Message: fmt.Sprintf("the authority's grant for %s: %v", pending.ask.ID, err)})
	}
	got := &approved{pending.ask, grants, answer.Tokens()}
	if pending.ask.Passage != nil {
		return holding(got, pre)
	}
	p.dropAsk(pending.ask.ID)
	return holding(got, pending.pre) // what was approved, not what was resolved anew for a retry
}

// waitsFor says what an ask that is not decided waits for.
func waitsFor(s approvals.Status) string {
	if s.Need > 1 {
		return fmt.Sprintf("%d persons have been asked to approve and %d have", s.Need, len(s.Grants))
	}
	return "a person has been asked and has not answered yet"
}

// recordUnapproved records a request that needed an approval and has none, unless the
// ask and what came of it are the record. What a program in the machine is told leaves
// out the host's own affairs.
func (n *Node) recordUnapproved(p *Pod, r request, pre prepared, needed *needsApproval, cause error) error {
	e := nucleus.AsError(cause)
	if r.attempt == nil && e.Ask != "" {
		return cause
	}
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	n.keepSalt(pre.digest, pre.salt, pre.action)
	entry := n.intent(p, r, pre, "", needed.decision)
	entry.Status, entry.Ask = nucleus.OutcomeRefused, e.Ask
	values := map[string]any{"kind": e.Kind, "message": logged(e.Message, 1000)}
	if r.attempt != nil {
		values["attempt"] = r.attempt.ID
	}
	entry.Data = data(values)
	if _, err := n.append(entry); err != nil {
		return logFailure(err)
	}
	switch e.Kind {
	case nucleus.KindApproval, nucleus.KindRefused, nucleus.KindDenied:
		return cause
	}
	if r.attempt != nil {
		return &nucleus.Error{Kind: nucleus.KindApproval, Operation: r.op, Rule: needed.decision.Rule, Message: needed.decision.Why + "; a person could not be asked"}
	}
	return cause
}

// await waits for a person, but not longer than the caller does: an answer that is
// still pending is no error.
func (n *Node) await(ctx context.Context, p *Pod, ask string, wait time.Duration) (approvals.Status, error) {
	if wait > 0 {
		waiting, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		status, err := n.authority(p).Wait(waiting, ask)
		if err == nil || waiting.Err() == nil {
			return status, err
		}
	}
	return n.authority(p).Status(ctx, ask)
}

// pendingAsk is the ask that this request waits for, with a hold: one that is open, or a
// new one. False means that a passage is open by now.
func (n *Node) pendingAsk(ctx context.Context, p *Pod, r request, pre prepared, needed *needsApproval) (pendingAsk, bool, error) {
	leave, err := p.asks.alone(ctx)
	if err != nil {
		return pendingAsk{}, false, err
	}
	defer leave()
	now := n.config.Now()
	known, ok := p.asks.same(r, pre.action, needed.beside, now.UnixMilli())
	if ok && (r.ask == "" || r.ask == known.ask.ID) {
		return known, true, nil
	}
	if ok { // another than the one that is waited for
		known.pre.sent.drop()
	}
	if p.root.open(p.record.ID, pre.action, now) {
		return pendingAsk{}, false, nil
	}
	if r.ask != "" {
		return pendingAsk{}, false, nucleus.Errorf(nucleus.KindNotFound, "ask %s is open no longer, or is not for these arguments: it was answered and its answer taken, or nobody answered in time; call without \"ask\" to ask anew", r.ask)
	}
	if err := pre.sent.await(); err != nil {
		return pendingAsk{}, false, err
	}
	tooMuch := func(why error) (pendingAsk, bool, error) {
		return pendingAsk{}, false, &nucleus.Error{Kind: nucleus.KindApproval, Operation: r.op, Rule: needed.decision.Rule, Message: needed.decision.Why + "; " + why.Error()}
	}
	id, submitted := nucleus.NewID("a-"), false
	if err := p.root.askFor(id, now); err != nil {
		return tooMuch(err)
	}
	defer func() {
		if !submitted {
			p.root.answered(id)
		}
	}()
	ask, err := n.newAsk(ctx, p, r, pre, needed, id)
	if err != nil {
		return pendingAsk{}, false, err
	}
	_, canonical, err := approval.Digest(ask)
	if err != nil {
		return pendingAsk{}, false, nucleus.Errorf(nucleus.KindTooLarge, "%v", err)
	}
	if err := p.root.weigh(id, len(canonical)); err != nil {
		return tooMuch(err)
	}
	n.keepSalt(ask.Digest, pre.salt, ask.Action)
	shown, _ := ask.Action.Shown()
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindApprovalAsk, Op: r.op,
		Digest: ask.Digest, Args: data(shown), Verdict: nucleus.Ask, Rule: needed.decision.Rule, Ask: ask.ID,
	}); err != nil {
		return pendingAsk{}, false, logFailure(err)
	}
	asking, cancel := context.WithTimeout(ctx, askingPatience)
	defer cancel()
	if _, _, err := n.witness.show(asking, askingPatience); err != nil {
		return pendingAsk{}, false, witnessFailure(err)
	}
	if err := n.submit(asking, p, ask); err != nil {
		return pendingAsk{}, false, authorityFailure(err)
	}
	submitted = true
	pending := pendingAsk{ask: ask, pre: pre, op: r.op}
	pre.sent.hold()
	p.asks.put(pending)
	return pending, true, nil
}

// askingPatience is how long an ask waits for the authority to take it.
const askingPatience = 10 * time.Second

// submit puts an ask before the authority. One that does not know the pod, because it did not run
// when the machine started or has lost its database since, is told of it and asked once more.
func (n *Node) submit(ctx context.Context, p *Pod, ask nucleus.AskRequest) error {
	_, err := n.authority(p).Submit(ctx, ask)
	var refused *nucleus.Error
	if errors.As(err, &refused) && refused.Kind == nucleus.KindUnauthenticated {
		n.registerRequesters(ctx, p)
		_, err = n.authority(p).Submit(ctx, ask)
	}
	return err
}

// newAsk makes the ask for a request.
func (n *Node) newAsk(ctx context.Context, p *Pod, r request, pre prepared, needed *needsApproval, id string) (nucleus.AskRequest, error) {
	ask := nucleus.AskRequest{
		ID: id, Pod: p.record.ID, Workspace: n.workspaceOf(p), Session: p.record.Session, Boot: p.record.Boot,
		Requester: r.caller.KeyID, Action: pre.action, Digest: pre.digest, Salt: pre.salt[:],
		Policy: p.digest, Rule: needed.decision.Rule, Why: needed.decision.Why, Approvals: max(needed.decision.Approvals, 1), Takes: needed.decision.Takes, Context: needed.context,
		Tier: string(p.record.Tier), Mode: string(p.record.Spec.Mode), Detail: pre.detail, Evidence: p.root.shown(), Nonce: nucleus.NewID("n-"),
	}
	if sub := p.record.Sub; sub != nil {
		ask.Detail = append([]nucleus.Detail{{Title: "pod", Text: "pod " + p.record.ID + " was asked for by the agent of pod " + sub.Parent}}, ask.Detail...)
	}
	ask.Detail = append(ask.Detail, n.fileDetail(ctx, p, r, pre.action)...)
	ask.Detail = append(p.root.readLately(), ask.Detail...)
	signed := r.signed
	if host, port, placed := pre.action.Place(); placed {
		detail, err := n.placeDetail(ctx, p, r, pre.action)
		if err != nil {
			return ask, err
		}
		ask.Detail = append(ask.Detail, detail...)
		ask.Passage = &nucleus.Passage{Host: host, Port: port, Exposure: needed.beside | nucleus.WayOut, Millis: passageLife.Milliseconds()}
	}
	if r.attempt != nil {
		// What is granted is the place: what the gateway saw of the first request is told in
		// the detail.
		ask.Action.Fetch = nil
		var err error
		if ask.Digest, err = ask.Action.Digest(pre.salt); err != nil {
			return ask, err
		}
		if signed, err = p.signature(ctx, *r.attempt); err != nil {
			return ask, err
		}
	}
	var err error
	if ask.Request, err = json.Marshal(signed); err != nil {
		return ask, err
	}
	now := n.config.Now()
	ask.Created, ask.Expires = now.UnixMilli(), now.Add(askLife).UnixMilli()
	return ask, nil
}

func sameAction(a, b nucleus.Action) bool {
	x, errX := nucleus.Canonical(a)
	y, errY := nucleus.Canonical(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

func (s *rootSession) readLately() []nucleus.Detail {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lately.detail()
}

func (s *rootSession) shown() []nucleus.Evidence {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]nucleus.Evidence(nil), s.evidence...)
}

func authorityFailure(err error) error {
	var refused *nucleus.Error
	if errors.As(err, &refused) && refused.Kind != nucleus.KindUnavailable {
		return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority refuses to be asked: %s", refused.Message)
	}
	switch {
	case approvals.Absent(err):
		return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority does not run: %v (start it with: cal node start, or nucleus-authority serve)", err)
	case approvals.Silent(err):
		return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority does not answer: %v (it hangs, or was stopped: cal approve list says whether it answers)", err)
	}
	if refused != nil { // it said so itself
		return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority cannot take it: %s", refused.Message)
	}
	return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority could not be asked: %v (if it does not run: cal node start, or nucleus-authority serve)", err)
}

// witnessFailure tells an authority that contradicts the log from one that does not
// answer.
func witnessFailure(err error) error {
	var refused *nucleus.Error
	contradicts := errors.Is(err, witness.ErrFork) || errors.Is(err, witness.ErrAhead) || errors.Is(err, witness.ErrSignature) || errors.Is(err, audit.ErrFailed)
	if contradicts || errors.As(err, &refused) && refused.Kind == nucleus.KindConflict {
		return nucleus.Errorf(nucleus.KindUnavailable, "an approval is needed and the authority does not vouch for the log: %v", err)
	}
	return authorityFailure(err)
}

func (n *Node) recordRefusal(p *Pod, r request, pending pendingAsk, state, reason string) (*nucleus.Error, error) {
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindApprovalDeny, Op: r.op,
		Digest: pending.ask.Digest, Verdict: nucleus.Deny, Rule: pending.ask.Rule, Ask: pending.ask.ID, Status: state,
		Data: data(map[string]any{"reason": logged(reason, 1000)}),
	}); err != nil {
		return nil, logFailure(err)
	}
	message := "the person said no"
	switch state {
	case approvals.Expired:
		message = "nobody answered in time"
		if pending.ask.Approvals > 1 {
			message = fmt.Sprintf("%d persons had to approve, and too few answered in time", pending.ask.Approvals)
		}
	case approvals.Withdrawn:
		message = "the question was taken back"
	case approvals.Revoked:
		message = "the person took the approval back"
	}
	if reason != "" {
		message += ": " + reason
	}
	return &nucleus.Error{Kind: nucleus.KindRefused, Operation: r.op, Rule: pending.ask.Rule, Ask: pending.ask.ID, Message: message}, nil
}

// usePatience is how long a session waits for the authority's word that a grant may be used.
const usePatience = 3 * time.Second

// useGrants uses the grants of an ask up durably, all at once, before the effect, once. Those
// for a place open its passage, and those for a task begin it, which lets a through; others are good
// for this effect alone. The authority counts the use first, so that what was taken back is not
// used. The caller holds the session's mutex.
func (n *Node) useGrants(ctx context.Context, p *Pod, a *approved, action nucleus.Action, permit string, now time.Time) (*passage, error) {
	task := a.grants[0].Task
	if err := p.root.admits(a.ask, task, action); err != nil {
		return nil, err
	}
	opened := passage{pod: p.record.ID, link: n.link(p.record.Spec), op: action.Op, used: used{&a.ask, grantIDs(a.grants), approverNames(a.grants), a.tokens}, task: task}
	counted, err := n.countUse(ctx, p, opened.used, permit)
	if err != nil {
		return nil, err
	}
	err = n.spent.Use(a.grants...)
	if errors.Is(err, spent.ErrUsed) {
		return nil, nucleus.Errorf(nucleus.KindRefused, "what was granted for ask %s was used before", a.ask.ID)
	}
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: what was granted for ask %s cannot be used up: %v", a.ask.ID, err)
	}
	values := map[string]any{"tokens": a.tokens}
	switch q := a.ask.Passage; {
	case task != nil:
		opened.exposure, opened.until = task.Exposure, task.Until
		values["task"] = task
		if err := n.countTask(&opened, permit); err != nil {
			return nil, err
		}
	case q != nil:
		opened.host, opened.port, opened.exposure = q.Host, q.Port, q.Exposure
		opened.until = now.UnixMilli() + min(q.Millis, passageLife.Milliseconds())
		values["passage"] = map[string]any{"host": q.Host, "port": q.Port, "exposure": q.Exposure.Names(), "until_ms": opened.until}
	}
	if err := n.recordUse(p, opened.used, permit, counted, values); err != nil {
		return nil, err
	}
	if task != nil || a.ask.Passage != nil {
		p.root.passages = append(p.root.passages, opened)
	}
	return &opened, nil
}

// useAgain uses a task once more. The caller holds the session's mutex.
func (n *Node) useAgain(ctx context.Context, p *Pod, task *passage, permit string) error {
	counted, err := n.countUse(ctx, p, task.used, permit)
	if err != nil {
		return err
	}
	if err := n.countTask(task, permit); err != nil {
		return err
	}
	return n.recordUse(p, task.used, permit, counted, map[string]any{})
}

// countTask counts a use of a task, here, for itself.
func (n *Node) countTask(task *passage, permit string) error {
	id := task.used.ask.ID
	uses, err := n.spent.Again(id, task.task.Uses, permit)
	if errors.Is(err, spent.ErrUsed) {
		return nucleus.Errorf(nucleus.KindRefused, "the task granted for ask %s was used %d times before", id, task.task.Uses)
	}
	if err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: the task granted for ask %s cannot be counted: %v", id, err)
	}
	task.uses = uses
	return nil
}

func (n *Node) recordUse(p *Pod, u used, permit string, counted approvals.Used, values map[string]any) error {
	values["approvers"], values["n"], values["of"] = u.approvers, counted.N, counted.Of
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: u.approvers[len(u.approvers)-1], Kind: nucleus.KindApprovalUse, Op: u.ask.Action.Op,
		Digest: u.ask.Digest, Ask: u.ask.ID, Grants: u.grants, Permit: permit, Data: data(values),
	}); err != nil {
		return logFailure(err)
	}
	return nil
}

func grantIDs(grants []nucleus.Grant) (ids []string) {
	for _, g := range grants {
		ids = append(ids, g.ID)
	}
	return ids
}

func approverNames(grants []nucleus.Grant) (names []string) {
	for _, g := range grants {
		names = append(names, g.Approver)
	}
	return names
}

// countUse has the authority count a use. What it refuses is refused; where it does not answer
// nothing is done.
func (n *Node) countUse(ctx context.Context, p *Pod, u used, permit string) (approvals.Used, error) {
	ctx, cancel := context.WithTimeout(ctx, usePatience)
	defer cancel()
	counted, err := n.authority(p).Use(ctx, u.ask.ID, approvals.Use{Permit: permit, Grants: u.grants})
	var refused *nucleus.Error
	if errors.As(err, &refused) && refused.Kind == nucleus.KindRefused {
		return counted, &nucleus.Error{Kind: nucleus.KindRefused, Ask: u.ask.ID, Message: "the authority: " + refused.Message}
	}
	if err != nil {
		return counted, authorityFailure(err)
	}
	return counted, nil
}

// reportOutcome tells the authority what came of a use, for its listing.
func (n *Node) reportOutcome(p *Pod, ask, permit, status string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := n.authority(p).Report(ctx, ask, approvals.Outcome{Permit: permit, Status: status}); err != nil {
		slog.Warn("the authority did not take note of what came of a grant", "ask", ask, "error", err)
	}
}

const (
	// startPatience is how long a machine's start waits in all for an authority that does not answer.
	startPatience = 2 * time.Second
	// silenceLasts is for how long such an authority is not asked again by one that starts.
	silenceLasts = 10 * time.Second
)

// silence is what is known of an authority that did not answer.
type silence struct {
	mu    sync.Mutex
	until time.Time
	err   error
}

// briefly asks the authority something without which a machine can start. Who waited in vain waits
// once: until silenceLasts is over the same is said at once.
func (n *Node) briefly(ctx context.Context, ask func(context.Context) error) error {
	n.silence.mu.Lock()
	known := n.silence.err
	if !time.Now().Before(n.silence.until) {
		known = nil
	}
	n.silence.mu.Unlock()
	if known != nil {
		return known
	}
	waiting, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	err := ask(waiting)
	if waiting.Err() == nil || ctx.Err() != nil || !approvals.Silent(err) {
		return err
	}
	err = nucleus.Errorf(nucleus.KindUnavailable, "the authority has not answered for %v: it hangs, or was stopped", startPatience)
	slog.Warn("machines start without approvers", "error", err)
	n.silence.mu.Lock()
	n.silence.until, n.silence.err = time.Now().Add(silenceLasts), err
	n.silence.mu.Unlock()
	return err
}

// approversNow asks the authority who can approve for a pod, and how strong that is; without an authority there is nobody
// and nothing can be approved. It is an error only where the pod, or this node, requires who. Who has
// the operator's key does not count: it asks.
func (n *Node) approversNow(ctx context.Context, spec nucleus.PodSpec) (list []nucleus.Approver, by string, err error) {
	require := cmp.Or(spec.Approvals, n.config.RequireApprovals)
	if n.asks == nil {
		if require != "" {
			return nil, "", nucleus.Errorf(nucleus.KindUnavailable, "approvals by %s are required, and this node has no authority (nucleus-node --authority)", require)
		}
		return nil, approvals.Nobody, nil
	}
	var info approvals.Info
	err = n.briefly(ctx, func(ctx context.Context) (err error) {
		info, err = n.asks.Approvers(ctx, spec.Approvals, n.config.RequireApprovals)
		return err
	})
	operator, keyErr := keyfile.Load(n.operatorKeyFile())
	switch err = errors.Join(err, keyErr); {
	case err == nil:
		list := approval.Different(info.Approvers, operator.Public().(ed25519.PublicKey))
		return list, info.By(list), nil
	case require != "":
		return nil, "", err
	}
	return nil, approvals.Nobody, nil
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
	keys := map[string][]byte{
		OperatorKey:   operator.Public().(ed25519.PublicKey),
		p.record.Boot: p.record.OutcomeKey,
	}
	for _, above := range n.above(p) {
		keys[above.record.Boot] = above.record.OutcomeKey
	}
	var names []string
	for _, a := range p.approvers {
		names = append(names, a.Name)
	}
	err = n.briefly(ctx, func(ctx context.Context) error { return n.authority(p).RegisterPod(ctx, p.record.ID, keys, names...) })
	if err != nil {
		slog.Warn("the authority does not know who may ask for a pod; what needs an approval will be refused", "pod", p.record.ID, "error", err)
	}
}
