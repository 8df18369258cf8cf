package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"cal/audit"
	"cal/egress"
	"cal/guest"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

// request is one operation that somebody asks of a pod.
type request struct {
	caller  wire.Caller
	signed  *wire.SignedRequest
	op      nucleus.Op
	args    json.RawMessage
	until   time.Time        // when the caller stops waiting for a person; zero: it does not wait
	ask     string           // the ask that it goes on waiting for; empty: any that is for the same
	call    guest.Call       // terminal and streaming; Op and Permit are filled in here
	stream  *wire.Stream     // where frames of a running command go and come from; nil: none
	waiting func(ask string) // tells the caller what it waits for, and with "" that it waits no longer; nil: nobody is told
	laps    *laps

	attempt *egress.Attempt // a connection of a program: nobody signed for it yet, and nobody waits
}

// prepared is a request with its arguments resolved and, for an effect on the host,
// the values that the effect will use.
type prepared struct {
	action nucleus.Action
	bytes  []byte // of action, canonical
	salt   nucleus.Salt
	digest string
	detail []nucleus.Detail
	ask    *nucleus.AskRequest                                            // what its grant was given for, once it has one
	effect func(context.Context, nucleus.Permit) (json.RawMessage, error) // on the host; nil: in the machine
	sent   *transfer                                                      // what was taken from the machine for it
	sub    *newSub                                                        // the pod that is asked for
}

// The one path that a request takes:
// 1 authenticated (api.go), 2 resolved, 3 decided, legs taken, intent durable,
// 4 approved where needed, 5-6 done in the machine or on the host, 7 recorded.
func (n *Node) request(ctx context.Context, p *Pod, r request) (json.RawMessage, error) {
	pre, err := n.prepare(ctx, p, r)
	if err != nil {
		pre.sent.drop()
		return nil, n.refuseUnresolved(p, r, err)
	}
	defer pre.sent.drop()
	r.laps.lap("resolve")
	ruled, err := n.decide(ctx, p, r, pre, nil)
	if needed := needsOf(err); needed != nil {
		ruled, pre, err = n.approve(ctx, p, r, pre, needed)
		defer pre.sent.drop()
	}
	if err != nil {
		return nil, err
	}
	defer ruled.sub.settle()
	permit, err := p.recorded(ruled)
	if err != nil {
		return nil, err
	}
	r.laps.lap("log")
	pre.ask = ruled.ask
	value, outcome, err := n.act(ctx, p, r, pre, permit)
	r.laps.lap("act")
	if recordErr := n.recordOutcome(p, r, pre, permit, outcome, err); recordErr != nil {
		return nil, recordErr
	}
	r.laps.lap("outcome")
	if r.op == nucleus.RunBash { // its end may be the budget's
		if why := p.stoppedBy(); why != nil {
			return nil, why
		}
	}
	return value, err
}

// prepare resolves the arguments: statically, in the machine, or on the host.
func (n *Node) prepare(ctx context.Context, p *Pod, r request) (prepared, error) {
	pre := prepared{salt: nucleus.NewSalt()}
	canonical, err := nucleus.CanonicalJSON(r.args)
	if err != nil {
		return pre, nucleus.Errorf(nucleus.KindInvalid, "arguments: %v", err)
	}
	switch r.op {
	case nucleus.GitPush:
		err = n.preparePush(ctx, p, canonical, &pre)
	case nucleus.CreatePR:
		err = n.preparePR(ctx, p, canonical, &pre)
	case nucleus.WebFetch:
		err = n.prepareFetch(p, canonical, &pre)
	case nucleus.SpawnAgent, nucleus.ManagePods:
		err = n.prepareSub(ctx, p, r, canonical, &pre)
	default:
		err = n.prepareInGuest(ctx, p, r, canonical, &pre)
	}
	if err != nil {
		return pre, err
	}
	pre.action.Op = r.op
	pre.action.Args = nucleus.SHA256(canonical)
	if pre.bytes, err = nucleus.Canonical(pre.action); err != nil {
		return pre, err
	}
	pre.digest = nucleus.ActionDigest(pre.bytes, pre.salt)
	return pre, nil
}

func (n *Node) prepareInGuest(ctx context.Context, p *Pod, r request, args []byte, pre *prepared) error {
	action, known, err := tools.ResolveStatic(r.op, args)
	if err != nil {
		return err
	}
	if known {
		pre.action = action
		return nil
	}
	header := r.call
	header.Op, header.Resolve = r.op, true
	result, err := p.call(ctx, header, nil, guest.CallArgs{Args: tools.Args{Args: args}}, nil)
	if err != nil {
		return err
	}
	if result.Error != nil {
		return result.Error
	}
	if result.Action == nil {
		return nucleus.Errorf(nucleus.KindInternal, "the machine resolved nothing")
	}
	pre.action = *result.Action
	return nil
}

// needsApproval is what decide returns for an ask: nothing has been done.
type needsApproval struct {
	decision nucleus.Decision
	context  nucleus.Context
	beside   nucleus.Legs // what the session had taken by anything but passages
}

func (*needsApproval) Error() string { return "an approval is needed" }

// needsOf is err as an approval that is needed, or nil.
func needsOf(err error) *needsApproval {
	var needed *needsApproval
	errors.As(err, &needed)
	return needed
}

// context is what a decision about the pod depends on now. The caller holds the
// session's mutex.
func (p *Pod) context(now time.Time) nucleus.Context {
	c := nucleus.Context{
		Exposure: p.root.exposure, UntrustedRepo: p.record.Untrusted, Contained: p.record.Spec.Mode == nucleus.Contained, UnixMilli: now.UnixMilli(),
	}
	p.settle()
	c.Spent, c.Reserved = p.root.budget.used(p.record.ID)
	return c
}

// decide is the critical section of a root session: decide, use up the grant, add
// the legs, append the intent. The intent has its place in the log then; that it is
// on the disk is waited for outside, so that requests of one session share a sync.
// approval is nil on the first pass; an ask for which no passage is open then comes back
// as *needsApproval. A grant that was given is judged against what holds now.
func (n *Node) decide(ctx context.Context, p *Pod, r request, pre prepared, approval *approved) (_ ruling, err error) {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	var reserved *newSub
	defer func() {
		if err != nil {
			reserved.giveBack()
		}
	}()
	now := n.config.Now()
	state := p.context(now)
	decision := p.policy.Decide(pre.action, state)
	if why := p.ended(); why != "" {
		decision = nucleus.Decision{Verdict: nucleus.Deny, Rule: rulePod, Why: why}
	}
	if why := pre.sub.beyond(); why != "" && decision.Verdict != nucleus.Deny {
		decision = nucleus.Decision{Verdict: nucleus.Deny, Rule: ruleDelegation, Why: why}
	}
	open := p.root.passage(p.record.ID, pre.action, now)
	if decision.Verdict == nucleus.Ask && open == nil && approval == nil {
		return ruling{}, &needsApproval{decision, state, p.root.beside()}
	}
	if decision.Verdict != nucleus.Deny {
		if err := pre.sub.reserve(); err != nil {
			e := nucleus.AsError(err)
			if e.Kind != nucleus.KindDenied {
				return ruling{}, nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: %v", err)
			}
			decision = nucleus.Decision{Verdict: nucleus.Deny, Rule: e.Rule, Why: e.Message}
		} else {
			reserved = pre.sub
		}
	}
	permit := nucleus.Permit{
		ID: nucleus.NewID("r-"), Pod: p.record.ID, Boot: p.record.Boot, Session: p.record.Session,
		Op: r.op, Digest: pre.digest, Salt: pre.salt[:], Verdict: decision.Verdict, Rule: decision.Rule, Context: state,
		Life: permitLife.Milliseconds(), Requester: r.caller.KeyID,
	}
	if r.attempt != nil {
		permit.ID = r.attempt.ID
	}
	r.laps.lap("decide")
	entry := n.intent(p, r, pre, permit.ID, decision)
	if approval != nil {
		entry.Ask = approval.ask.ID
	}
	var ask *nucleus.AskRequest
	_, _, placed := pre.action.Place()
	if placed && decision.Verdict == nucleus.Ask && !n.passagesStand(p) {
		return ruling{}, &nucleus.Error{Kind: nucleus.KindUnavailable, Operation: r.op, Rule: decision.Rule, Message: "nothing was done: the authority has not been reached for a while, so nobody knows what was taken back (cal approve list says whether it answers; cal node start, or nucleus-authority serve, starts one that does not run)"}
	}
	switch decision.Verdict {
	case nucleus.Allow:
	case nucleus.Ask:
		switch {
		case open == nil:
			if asked := approval.ask.Approvals; decision.Approvals > asked {
				return ruling{}, &nucleus.Error{Kind: nucleus.KindRefused, Operation: r.op, Ask: approval.ask.ID, Message: fmt.Sprintf("%d approvals are needed, the ask was for %d", decision.Approvals, asked)}
			}
			if open, err = n.useGrants(ctx, p, approval, pre.action, permit.ID, now); err != nil {
				return ruling{}, err
			}
		case open.task != nil:
			if err := n.useAgain(ctx, p, open, permit.ID); err != nil {
				if nucleus.AsError(err).Kind != nucleus.KindRefused {
					return ruling{}, err
				}
				// Taken back, or used up: a person is asked anew.
				over := open.used.ask.ID
				p.root.closePassages(func(q *passage) bool { return q.used.ask.ID == over })
				return ruling{}, &needsApproval{decision, state, p.root.beside()}
			}
		}
		ask = open.used.ask
		permit.Grants, entry.Grants, entry.Ask = open.used.tokens, open.used.grants, ask.ID
	default:
		entry.Permit, entry.Status = "", nucleus.OutcomeRefused
		n.keepSalt(pre.digest, pre.salt, pre.action)
		if _, err := n.append(entry); err != nil {
			return ruling{}, logFailure(err)
		}
		return ruling{}, denial(r.op, decision)
	}
	what := cut(string(r.op)+" "+describe(pre.action), maxWhat)
	if err := n.expose(p, decision.Takes, placed && decision.Verdict == nucleus.Ask, what); err != nil {
		return ruling{}, nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: %v", err)
	}
	entry.Exposure = p.root.exposure.Names()
	id := permit.ID
	if entry.Permit == "" { // a connection: its entry names no permit
		id = pre.digest
	}
	if err := n.putSalt(id, pre.salt, pre.action); err != nil {
		return ruling{}, logFailure(err)
	}
	intent, err := n.begin(entry)
	if err != nil {
		return ruling{}, logFailure(err)
	}
	p.root.lately.add(intent.Seq(), decision.Takes, what)
	if r.attempt == nil {
		permit.Seq = p.nextSeq()
	}
	return ruling{permit, ask, intent, reserved}, nil
}

// putSalt keeps the salt of an action and what its entry leaves out.
func (n *Node) putSalt(id string, salt nucleus.Salt, action nucleus.Action) error {
	_, left := action.Shown()
	return n.salts.Put(id, salt, left...)
}

// keepSalt keeps the salt of what has no permit: it is found by the digest.
func (n *Node) keepSalt(digest string, salt nucleus.Salt, action nucleus.Action) {
	if err := n.putSalt(digest, salt, action); err != nil {
		slog.Warn("a refused request cannot be shown to fit its entry later", "error", err)
	}
}

// ruling is a decision to go ahead. It counts when its intent is on the disk.
type ruling struct {
	permit nucleus.Permit
	ask    *nucleus.AskRequest // what the permit's grant was given for
	intent *audit.Pending
	sub    *newSub // what was reserved for the pod that is asked for
}

// recorded waits until the intent is on the disk: without it there is no permit, and
// the permit's time begins then. Every ruling is waited for: others may wait behind it.
func (p *Pod) recorded(r ruling) (nucleus.Permit, error) {
	if _, err := r.intent.Wait(); err != nil {
		// It may be on the disk all the same, open for ever.
		p.node.owe(nucleus.Entry{
			Pod: p.record.ID, Session: p.record.Session, Actor: r.permit.Requester, Kind: nucleus.KindOutcome, Op: r.permit.Op, Digest: r.permit.Digest,
			Permit: r.permit.ID, Status: nucleus.OutcomeRefused, Data: data(map[string]any{"message": "nothing was done: the intent could not be recorded in time"}),
		})
		return nucleus.Permit{}, logFailure(err)
	}
	r.permit.Issued = p.time()
	return r.permit, nil
}

// rulePod is the rule by which nothing is done for a pod that has ended.
const rulePod = "pod"

func denial(op nucleus.Op, d nucleus.Decision) error {
	kind := nucleus.KindDenied
	if d.Rule == rulePod {
		kind = nucleus.KindUnavailable
	}
	return &nucleus.Error{Kind: kind, Operation: op, Rule: d.Rule, Message: d.Why}
}

// permitLife is how long a permit may wait for its effect to start.
const permitLife = 30 * time.Second

func (n *Node) intent(p *Pod, r request, pre prepared, permit string, d nucleus.Decision) nucleus.Entry {
	shown, _ := pre.action.Shown()
	e := nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindIntent, Op: r.op,
		Digest: pre.digest, Args: data(shown), Verdict: d.Verdict, Rule: d.Rule, Permit: permit, Exposure: p.root.exposure.Names(),
	}
	if r.attempt != nil { // its outcome is the opening and closing of connections
		e.Actor, e.Permit, e.Data = "machine", "", data(map[string]any{"attempt": r.attempt.ID})
	}
	return e
}

// refuseUnresolved records a request whose arguments stand for nothing.
func (n *Node) refuseUnresolved(p *Pod, r request, cause error) error {
	e := nucleus.AsError(cause)
	if e.Operation == "" {
		copied := *e
		copied.Operation = r.op
		e = &copied
	}
	_, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindIntent, Op: r.op,
		Args: shownArgs(r.args), Verdict: nucleus.Deny, Rule: "resolve", Status: nucleus.OutcomeRefused,
		Data: data(map[string]any{"kind": e.Kind, "message": logged(e.Message, 1000)}),
	})
	if err != nil {
		return logFailure(err)
	}
	return e
}

// shownArgs are arguments as they came, which may be no JSON at all.
func shownArgs(raw json.RawMessage) json.RawMessage {
	if _, err := nucleus.CanonicalJSON(raw); err != nil {
		return data(logged(string(raw), 1000))
	}
	return raw
}

// act does it: in the machine under a signed permit, or on the host.
func (n *Node) act(ctx context.Context, p *Pod, r request, pre prepared, permit nucleus.Permit) (json.RawMessage, *nucleus.Signed, error) {
	p.root.mu.Lock()
	p.enter()
	p.root.mu.Unlock()
	defer func() {
		p.root.mu.Lock()
		p.leave()
		p.root.mu.Unlock()
	}()
	if pre.effect != nil {
		return n.actOnHost(ctx, p, r, pre, permit)
	}
	result, err := n.permitted(ctx, p, r.call, permit, pre, r.args, r.stream)
	if err != nil {
		return nil, nil, err
	}
	if result.Error != nil {
		return nil, result.Outcome, result.Error
	}
	return result.Value, result.Outcome, nil
}

// permitted makes a call under a permit and returns what the machine signed for it.
func (n *Node) permitted(ctx context.Context, p *Pod, header guest.Call, permit nucleus.Permit, pre prepared, args json.RawMessage, stream *wire.Stream) (guest.CallResult, error) {
	signed, err := nucleus.Sign(n.key, nucleus.DomainPermit, permit)
	if err != nil {
		return guest.CallResult{}, err
	}
	header.Op, header.Permit = permit.Op, &signed
	sent := guest.CallArgs{Args: tools.Args{Args: args, Action: &pre.action}, Ask: pre.ask}
	result, err := p.call(ctx, header, pre.bytes, sent, stream)
	if err != nil {
		return result, err
	}
	_, err = checkResult(result, p.record.OutcomeKey, permit)
	return result, err
}

// recordOutcome is the last step. When it fails the effect has happened and the log is owed
// its outcome; where the node ends before that, recovery closes the intent as unknown.
func (n *Node) recordOutcome(p *Pod, r request, pre prepared, permit nucleus.Permit, outcome *nucleus.Signed, cause error) error {
	entry := nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: r.caller.KeyID, Kind: nucleus.KindOutcome, Op: r.op,
		Digest: pre.digest, Permit: permit.ID, Outcome: outcome, Status: statusOf(outcome),
	}
	if cause != nil {
		e := nucleus.AsError(cause)
		entry.Data = data(map[string]any{"kind": e.Kind, "message": logged(e.Message, 1000)})
	}
	if err := n.noted(entry); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "%s was done, but its outcome could not be recorded yet: %v", r.op, err)
	}
	if pre.ask != nil {
		go n.reportOutcome(p, pre.ask.ID, permit.ID, entry.Status)
	}
	return nil
}

// statusOf is the status in what was signed for a permit, by the machine or by this node, and
// was checked: the entry says nothing else. Without it nobody knows.
func statusOf(outcome *nucleus.Signed) string {
	var says nucleus.Outcome
	if outcome == nil || json.Unmarshal(outcome.Payload, &says) != nil {
		return nucleus.OutcomeUnknown
	}
	switch says.Status {
	case nucleus.OutcomeDone, nucleus.OutcomeFailed, nucleus.OutcomeRefused:
		return says.Status
	}
	return nucleus.OutcomeUnknown
}

// call makes one call to the machine: what is brief in one frame, the rest on a
// stream. action is args.Action in its canonical bytes; nil where the arguments are only
// to be resolved. Frames of the command go to stream and frames of stream go to the command.
func (p *Pod) call(ctx context.Context, header guest.Call, action []byte, args guest.CallArgs, stream *wire.Stream) (guest.CallResult, error) {
	session, err := p.wire()
	if err != nil {
		return guest.CallResult{}, err
	}
	if stream == nil && args.Ask == nil && (header.Resolve || tools.Brief(header.Op)) {
		head, err := json.Marshal(header)
		if err != nil {
			return guest.CallResult{}, err
		}
		if request := tools.Join(head, action, args.Args.Args); len(request) <= wire.MaxCall {
			return p.callBriefly(ctx, session, request)
		}
	}
	return p.callOnStream(ctx, session, header, args, stream)
}

// maxReply is the longest reply of a machine.
const maxReply = 64 << 20

func (p *Pod) callBriefly(ctx context.Context, session *wire.Session, request []byte) (guest.CallResult, error) {
	var result guest.CallResult
	reply, err := session.Call(ctx, request, maxReply)
	if err != nil {
		return result, p.unanswered(ctx, err)
	}
	parts, err := tools.Split(reply, 2)
	if err == nil {
		result, err = readResult(parts[0])
	}
	if err == nil && len(parts[1]) > 0 {
		// What comes from a machine is JSON only when somebody has looked.
		if result.Value = parts[1]; !json.Valid(result.Value) {
			err = errors.New("a value that is not JSON")
		}
	}
	return result, err
}

func (p *Pod) callOnStream(ctx context.Context, session *wire.Session, header guest.Call, args guest.CallArgs, stream *wire.Stream) (guest.CallResult, error) {
	var result guest.CallResult
	guestStream, err := session.Open(ctx, guest.StreamCall, header)
	if err != nil {
		return result, p.lost(err)
	}
	defer guestStream.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { guestStream.Close() })
	defer stop()
	if header.Op == nucleus.RunBash && !header.Resolve {
		defer p.running(guestStream, cancel)()
	}
	if err := guestStream.SendJSON(wire.FrameJSON, args); err != nil {
		return result, p.lost(err)
	}
	if stream != nil {
		go func() {
			defer guestStream.Close() // the caller is gone: the command ends
			copyFrames(guestStream, stream)
		}()
	}
	for {
		frame, payload, err := guestStream.Recv(maxReply)
		if err != nil {
			return result, p.unanswered(ctx, err)
		}
		if frame == wire.FrameResult {
			return readResult(payload)
		}
		if stream != nil {
			if err := stream.Send(frame, payload); err != nil {
				return result, nucleus.Errorf(nucleus.KindTimeout, "the caller went away before the command ended")
			}
		}
	}
}

// running lets the end of the budget reach a command; the caller calls what it returns
// when the command has ended.
func (p *Pod) running(stream *wire.Stream, cancel context.CancelCauseFunc) func() {
	p.mu.Lock()
	if p.calls == nil {
		p.calls = map[*wire.Stream]context.CancelCauseFunc{}
	}
	p.calls[stream] = cancel
	p.mu.Unlock()
	if why := p.stoppedBy(); why != nil { // it was decided just before
		cancel(why)
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.calls, stream)
	}
}

func (p *Pod) unanswered(ctx context.Context, err error) error {
	var spent *nucleus.Error
	if errors.As(context.Cause(ctx), &spent) {
		return spent
	}
	if ctx.Err() != nil {
		return nucleus.Errorf(nucleus.KindTimeout, "the caller went away before the machine answered")
	}
	return p.lost(err)
}

// How long a request whose wire ended waits for the word that the machine did: a wire may
// end alone, and a stream without its wire.
const (
	wirePatience  = 500 * time.Millisecond
	deathPatience = 3 * time.Second
)

// lost says why a call has no answer.
func (p *Pod) lost(err error) error {
	if p.awaitDeath() {
		_, err := p.wire()
		return err
	}
	return nucleus.Errorf(nucleus.KindUnavailable, "pod %s: the wire to the machine ended: %v", p.record.ID, err)
}

// awaitDeath waits a moment for the word that the machine has died, which breaks the wire
// first, and says whether the pod has failed.
func (p *Pod) awaitDeath() bool {
	p.mu.Lock()
	session := p.session
	p.mu.Unlock()
	patience := time.NewTimer(wirePatience)
	defer patience.Stop()
	select {
	case <-p.failed:
	case <-session.Done():
		patience.Reset(deathPatience)
	case <-patience.C:
		return false
	}
	select {
	case <-p.failed:
	case <-p.gone:
	case <-p.node.closing:
	case <-patience.C:
	}
	select {
	case <-p.failed: // and gone by now, it may be
		return true
	default:
		return false
	}
}

func copyFrames(to, from *wire.Stream) {
	for {
		kind, payload, err := from.Recv(1 << 20)
		if err != nil || to.Send(kind, payload) != nil {
			return
		}
	}
}

func (p *Pod) nextSeq() uint64 { return p.record.Epoch<<nucleus.EpochBits | p.seq.Add(1) }

// maxWhat is how much of what a request was for is kept beside the exposure.
const maxWhat = 300

// describe names an action in a few words.
func describe(a nucleus.Action) string {
	switch {
	case a.Command != nil && len(a.Command.Argv) > 0:
		return a.Command.Argv[0]
	case a.Fetch != nil:
		return a.Fetch.URL
	case a.Connect != nil:
		return a.Connect.Host
	case a.Sub != nil:
		return string(a.Sub.Do)
	case len(a.Files) > 0:
		return a.Files[0].Path
	}
	return ""
}
