package guest

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"cal/approval"
	"cal/guest/tools"
	"cal/internal/redact"
	"cal/nucleus"
	"cal/wire"
)

// Call is the header of a "call" stream. CallArgs follow as FrameJSON; what
// a running command is sent or says passes as frames; FrameResult holds a
// CallResult. With Resolve there is no permit and nothing is done: the result is
// the resolved action. An operation that takes effect on the host is judged like any
// other and not done: the outcome says that it is admitted.
type Call struct {
	Resolve  bool            `json:"resolve,omitempty"`
	Op       nucleus.Op      `json:"op"`
	Permit   *nucleus.Signed `json:"permit,omitempty"`
	Terminal bool            `json:"terminal,omitempty"`
	Rows     uint16          `json:"rows,omitempty"`
	Cols     uint16          `json:"cols,omitempty"`
	Stream   bool            `json:"stream,omitempty"`
	Stdin    bool            `json:"stdin,omitempty"`
	Standing bool            `json:"standing,omitempty"` // with Resolve: what the file holds that would be changed is wanted too
}

// CallArgs are what a call is made with.
type CallArgs struct {
	tools.Args
	Ask *nucleus.AskRequest `json:"ask,omitempty"` // what the permit's grants were given for
}

// An action holds what the arguments hold once more, an ask both of them and the
// request that they came in.
const maxCallArgs = 6 * tools.MaxArgs

// CallResult ends a call.
type CallResult struct {
	Value    json.RawMessage `json:"value,omitempty"`
	Action   *nucleus.Action `json:"action,omitempty"` // for Resolve
	Standing []byte          `json:"standing_b64,omitempty"`
	Error    *nucleus.Error  `json:"error,omitempty"`
	Outcome  *nucleus.Signed `json:"outcome,omitempty"` // nucleus.Outcome by the boot's key
}

const maxResult = 32 << 20

// brief is a call in the form of tools.Brief: it says the same as a "call" stream,
// with Call as the request's header and CallResult, without its value, as the reply's.
func (p *Proxy) brief(ctx context.Context, request []byte) []byte {
	parts, err := tools.Split(request, 3)
	var call Call
	if err == nil {
		err = nucleus.Strict(parts[0], &call)
	}
	if err != nil {
		return briefReply(CallResult{Error: nucleus.Errorf(nucleus.KindInvalid, "call: %v", err)}, nil)
	}
	action, args := parts[1], parts[2]
	if call.Resolve {
		result, _ := p.workBriefly(ctx, call, nil, args)
		return briefReply(CallResult{Action: result.Action, Standing: result.Standing, Error: result.Error}, nil)
	}
	var named nucleus.Action
	if err := nucleus.Strict(action, &named); err != nil {
		return briefReply(CallResult{Error: nucleus.Errorf(nucleus.KindInvalid, "action: %v", err)}, nil)
	}
	permit, refusal := p.admit(call, &named, nil)
	started := time.Now()
	if refusal != nil {
		return briefReply(p.outcome(permit, CallResult{Error: refusal}, nucleus.OutcomeRefused, 0, started), nil)
	}
	result, status := p.workBriefly(ctx, call, action, args)
	return briefReply(p.outcome(permit, result, status, 0, started), result.Value)
}

// workBriefly has the worker do it, or resolve it where no action is given.
func (p *Proxy) workBriefly(ctx context.Context, call Call, action, args []byte) (CallResult, string) {
	header, err := json.Marshal(p.header(call))
	var reply []byte
	if err == nil {
		reply, err = p.worker.Call(ctx, tools.Join(header, action, args), maxResult)
	}
	var parts [][]byte
	if err == nil {
		parts, err = tools.Split(reply, 2)
	}
	var result tools.BriefResult
	if err == nil {
		err = json.Unmarshal(parts[0], &result)
	}
	switch {
	case err != nil:
		return CallResult{Error: nucleus.Errorf(nucleus.KindInternal, "tools worker: %v", err)}, nucleus.OutcomeUnknown
	case result.Error != nil:
		return CallResult{Error: result.Error}, nucleus.OutcomeFailed
	}
	return CallResult{Action: result.Action, Standing: result.Standing, Value: parts[1]}, nucleus.OutcomeDone
}

// briefReply has the value behind the header, where nobody encodes it again.
func briefReply(result CallResult, value []byte) []byte {
	result.Value = nil
	head, err := json.Marshal(result)
	if err != nil { // cannot be: texts and canonical JSON
		head = []byte(`{"error":{"kind":"internal","message":"a result that cannot be written"}}`)
	}
	return tools.Join(head, value)
}

func (p *Proxy) call(ctx context.Context, stream *wire.Stream) {
	var call Call
	if err := nucleus.Strict(stream.Header, &call); err != nil {
		finish(stream, CallResult{Error: nucleus.Errorf(nucleus.KindInvalid, "call: %v", err)})
		return
	}
	stream.SetReadDeadline(time.Now().Add(bootDeadline))
	var args CallArgs
	if err := stream.RecvJSON(wire.FrameJSON, maxCallArgs, &args); err != nil {
		finish(stream, CallResult{Error: nucleus.Errorf(nucleus.KindInvalid, "arguments: %v", err)})
		return
	}
	stream.SetReadDeadline(time.Time{})
	if call.Resolve {
		p.resolve(ctx, stream, call, args.Args)
		return
	}
	permit, refusal := p.admit(call, args.Action, args.Ask)
	if refusal != nil {
		finish(stream, p.outcome(permit, CallResult{Error: refusal}, nucleus.OutcomeRefused, 0, time.Now()))
		return
	}
	if call.Op.OnHost() {
		finish(stream, p.outcome(permit, CallResult{}, nucleus.OutcomeAdmitted, 0, time.Now()))
		return
	}
	p.act(ctx, stream, call, args.Args, permit)
}

func finish(stream *wire.Stream, result CallResult) {
	stream.SetWriteDeadline(time.Now().Add(bootDeadline))
	stream.SendJSON(wire.FrameResult, result)
}

// admit is the second lock: the permit is the node's, for this boot, unused and
// in time, for exactly this action; and the policy of the boot, with the legs that
// this proxy has served itself, allows what the permit says.
func (p *Proxy) admit(call Call, action *nucleus.Action, ask *nucleus.AskRequest) (nucleus.Permit, *nucleus.Error) {
	var permit nucleus.Permit
	refuse := func(format string, args ...any) (nucleus.Permit, *nucleus.Error) {
		e := nucleus.Errorf(nucleus.KindForbidden, "the machine refuses: "+format, args...)
		e.Operation, e.Rule = call.Op, "second-lock"
		return permit, e
	}
	if call.Permit == nil || action == nil {
		return refuse("no permit or no action")
	}
	if err := call.Permit.Open(p.boot.NodeKey, nucleus.DomainPermit, &permit); err != nil {
		permit = nucleus.Permit{} // nothing in it is known
		return refuse("permit: %v", err)
	}
	age, present := p.clock.age(permit.Issued)
	switch {
	case permit.Pod != p.boot.Pod || permit.Boot != p.boot.Boot:
		return refuse("permit is for pod %s boot %s, this is pod %s boot %s", permit.Pod, permit.Boot, p.boot.Pod, p.boot.Boot)
	case permit.Op != call.Op || action.Op != call.Op:
		return refuse("permit is for %s, the call is %s", permit.Op, call.Op)
	case !present:
		return refuse("permit is of a node of epoch %d, which is not the present one", permit.Issued.Epoch)
	case permit.Seq>>nucleus.EpochBits != permit.Issued.Epoch:
		return refuse("permit %d is not of epoch %d", permit.Seq, permit.Issued.Epoch)
	case age > permit.Life:
		return refuse("permit is %d ms old, at most %d", age, permit.Life)
	case len(permit.Salt) != len(nucleus.Salt{}):
		return refuse("salt of %d bytes", len(permit.Salt))
	}
	digest, err := action.Digest(nucleus.Salt(permit.Salt))
	if err != nil || digest != permit.Digest {
		return refuse("the permit binds another action")
	}
	return permit, p.decideAgain(permit, *action, ask, permit.Issued.UnixMilli+age)
}

// decideAgain judges what a permit allows. now is the node's wall clock, as the permit has it.
func (p *Proxy) decideAgain(permit nucleus.Permit, action nucleus.Action, ask *nucleus.AskRequest, now int64) *nucleus.Error {
	p.served.mu.Lock()
	defer p.served.mu.Unlock()
	if !p.served.fresh(permit.Seq) {
		return nucleus.Errorf(nucleus.KindForbidden, "the machine refuses: permit %d was used before", permit.Seq)
	}
	context := permit.Context
	context.Exposure |= p.served.exposure
	context.Contained = context.Contained || p.config.Mode == nucleus.Contained
	own := p.policy.Decide(action, context)
	known := permit.Verdict == nucleus.Allow || permit.Verdict == nucleus.Ask
	if !known || own.Verdict == nucleus.Deny || own.Verdict.StricterThan(permit.Verdict) {
		e := nucleus.Errorf(nucleus.KindForbidden, "the machine refuses: the permit says %s, its own decision is %s: %s", permit.Verdict, own.Verdict, own.Why)
		e.Operation, e.Rule = action.Op, own.Rule
		return e
	}
	passage := false
	if permit.Verdict == nucleus.Ask {
		judged, back := p.clock.judged(now)
		if e := p.checkGrants(permit, action, ask, own.Approvals, judged); e != nil {
			if back > 0 {
				e.Message += fmt.Sprintf("; the host's clock was set back by %v: a machine that is started anew goes by it", (time.Duration(back) * time.Millisecond).Round(time.Second))
			}
			return e
		}
		_, _, passage = action.Place() // as the node has it; what the ask says is not believed twice
	}
	p.served.take(own.Takes, passage)
	return nil
}

// checkGrants verifies the approvers' own signatures, of as many different ones as this machine
// itself wants: the node cannot make one. Those for a place open it, for every request there until
// it ends; those for a task begin it; any others are good once, all together.
func (p *Proxy) checkGrants(permit nucleus.Permit, action nucleus.Action, shown *nucleus.AskRequest, need int, now int64) *nucleus.Error {
	refuse := func(format string, args ...any) *nucleus.Error {
		return nucleus.Errorf(nucleus.KindForbidden, "the machine refuses: "+format, args...)
	}
	if shown == nil || len(permit.Grants) == 0 {
		return refuse("an approval is needed and the permit holds none")
	}
	ask := *shown
	if ask.Approvals < need {
		return refuse("%d approvals are needed, the ask was for %d", need, ask.Approvals)
	}
	for _, f := range []struct{ name, asked, here string }{
		{"pod", ask.Pod, p.boot.Pod}, {"boot", ask.Boot, p.boot.Boot}, {"session", ask.Session, permit.Session}, {"operation", string(ask.Action.Op), string(permit.Op)},
		{"policy", ask.Policy, nucleus.SHA256(p.boot.Policy)},
	} {
		if f.asked != f.here {
			return refuse("the approval is for %s %q, here it is %q", f.name, f.asked, f.here)
		}
	}
	together := strings.Join(permit.Grants, "\n")
	if open, ok := p.served.passages[together]; ok && open.approvals >= need {
		return p.served.passes(open, action, now)
	}
	if ask.Passage == nil && ask.Digest != permit.Digest { // the first use of a task is what was asked for
		return refuse("the approval is for something else")
	}
	grants, err := approval.Approved(permit.Grants, ask, p.approvers(), now)
	if err != nil {
		return refuse("grant: %v", err)
	}
	for _, grant := range grants {
		if p.served.grants[grant.ID] {
			return refuse("grant %s was used before", grant.ID)
		}
	}
	task := grants[0].Task
	if task != nil || ask.Passage != nil {
		if err := approval.Check(ask); err != nil {
			return refuse("%v", err)
		}
		open := &opened{op: permit.Op, approvals: len(grants), task: task}
		if task != nil {
			open.exposure, open.until = task.Exposure, task.Until
		} else {
			open.host, open.port, open.exposure, open.until = ask.Passage.Host, ask.Passage.Port, ask.Passage.Exposure, now+ask.Passage.Millis
		}
		if e := p.served.passes(open, action, now); e != nil {
			return e
		}
		p.served.passages[together] = open
	}
	for _, grant := range grants {
		p.served.grants[grant.ID] = true
	}
	return nil
}

// approvers are those of the boot who count here: each key once, and not this machine's own,
// which asks.
func (p *Proxy) approvers() []nucleus.Approver {
	return approval.Different(p.boot.Approvers, p.key.Public().(ed25519.PublicKey))
}

// opened is a passage that grants opened here, or a task.
type opened struct {
	op        nucleus.Op
	host      string
	port      int
	exposure  nucleus.Legs
	approvals int
	until     int64 // on the node's wall clock
	task      *nucleus.Task
	uses      int // of the task
}

// passes says why a passage or a task does not let action through: it is for something else, its
// time has passed, or this proxy itself has served more, beside passages, than the person was
// told. It counts the uses of a task.
func (s *servedState) passes(o *opened, action nucleus.Action, now int64) *nucleus.Error {
	const both = nucleus.Private | nucleus.Untrusted
	refuse := func(format string, args ...any) *nucleus.Error {
		return nucleus.Errorf(nucleus.KindForbidden, "the machine refuses: "+format, args...)
	}
	host, port, placed := action.Place()
	switch {
	case action.Op != o.op || o.task == nil && (!placed || host != o.host || port != o.port):
		return refuse("the passage leads to %s port %d by %s", o.host, o.port, o.op)
	case now >= o.until:
		return refuse("the passage ended %d ms ago", now-o.until)
	case s.exposure&^s.through&both&^o.exposure != 0:
		return refuse("the passage is for a session that has taken less")
	case o.task == nil:
		return nil
	}
	if err := approval.Matches(o.task.Match, action); err != nil {
		return refuse("the task is not for this: %v", err)
	}
	if o.uses >= o.task.Uses {
		return refuse("the task was used %d times before", o.uses)
	}
	o.uses++
	return nil
}

// take adds legs, through a passage or not.
func (s *servedState) take(takes nucleus.Legs, passage bool) {
	if passage {
		s.through |= takes &^ s.exposure
	} else {
		s.through &^= takes
	}
	s.exposure |= takes
}

// fresh reports whether seq was never seen, and remembers it. Numbers arrive
// nearly in order, so what lies far below the highest counts as seen.
func (s *servedState) fresh(seq uint64) bool {
	const window = 4096
	if seq <= s.floor || s.seqs[seq] {
		return false
	}
	s.seqs[seq] = true
	if seq > s.floor+2*window {
		s.floor = seq - window
		for n := range s.seqs {
			if n <= s.floor {
				delete(s.seqs, n)
			}
		}
	}
	return true
}

// act lets the worker do it and signs what came of it.
func (p *Proxy) act(ctx context.Context, stream *wire.Stream, call Call, args tools.Args, permit nucleus.Permit) {
	started := time.Now()
	result, err := p.work(ctx, tools.StreamDo, p.header(call), args, stream)
	if err != nil {
		e := nucleus.Errorf(nucleus.KindInternal, "tools worker: %v", err)
		finish(stream, p.outcome(permit, CallResult{Error: e}, nucleus.OutcomeUnknown, 0, started))
		return
	}
	status := nucleus.OutcomeDone
	if result.Error != nil {
		status = nucleus.OutcomeFailed
	}
	finish(stream, p.outcome(permit, CallResult{Value: result.Value, Error: result.Error}, status, result.ExitCode, started))
}

func (p *Proxy) resolve(ctx context.Context, stream *wire.Stream, call Call, args tools.Args) {
	session, err := p.worker.Open(ctx, tools.StreamResolve, p.header(call))
	if err != nil {
		finish(stream, CallResult{Error: nucleus.Errorf(nucleus.KindInternal, "tools worker: %v", err)})
		return
	}
	defer session.Close()
	var resolved tools.Resolved
	if err = session.SendJSON(wire.FrameJSON, args); err == nil {
		session.SetReadDeadline(time.Now().Add(time.Minute))
		err = session.RecvJSON(wire.FrameResult, maxResult, &resolved)
	}
	if err != nil {
		finish(stream, CallResult{Error: nucleus.Errorf(nucleus.KindInternal, "tools worker: %v", err)})
		return
	}
	finish(stream, CallResult{Action: resolved.Action, Standing: resolved.Standing, Error: resolved.Error})
}

func (p *Proxy) header(call Call) tools.Call {
	return tools.Call{
		Op: call.Op, Terminal: call.Terminal, Rows: call.Rows, Cols: call.Cols,
		Stream: call.Stream, Stdin: call.Stdin, Standing: call.Standing, Identity: p.config.Identity,
	}
}

// work splices one call to the worker: frames of the node go in, frames of the
// worker come out, the result is returned.
func (p *Proxy) work(ctx context.Context, kind string, header, first any, node *wire.Stream) (tools.Result, error) {
	var result tools.Result
	worker, err := p.worker.Open(ctx, kind, header)
	if err != nil {
		return result, err
	}
	defer worker.Close()
	if first != nil {
		if err := worker.SendJSON(wire.FrameJSON, first); err != nil {
			return result, err
		}
	}
	go func() {
		for {
			frame, payload, err := node.Recv(1 << 20)
			if err != nil {
				worker.Close() // the caller is gone: the worker ends the command
				return
			}
			if worker.Send(frame, payload) != nil {
				return
			}
		}
	}()
	for {
		frame, payload, err := worker.Recv(maxResult)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return result, err
		}
		if frame == wire.FrameResult {
			return result, json.Unmarshal(payload, &result)
		}
		if err := node.Send(frame, payload); err != nil {
			return result, fmt.Errorf("the node does not read: %w", err)
		}
	}
}

// outcome signs what came of a permit.
func (p *Proxy) outcome(permit nucleus.Permit, result CallResult, status string, exit int, started time.Time) CallResult {
	outcome := nucleus.Outcome{
		Permit: permit.ID, Pod: p.boot.Pod, Boot: p.boot.Boot, Seq: permit.Seq,
		Status: status, ExitCode: exit, Millis: time.Since(started).Milliseconds(), Bytes: int64(len(result.Value)),
	}
	if result.Error != nil {
		outcome.Message = cut(redact.Text(result.Error.Message), 512) // it is signed: nobody can redact it later
	}
	if len(result.Value) > 0 {
		outcome.Result = permit.ResultDigest(result.Value)
	}
	if signed, err := nucleus.Sign(p.key, nucleus.DomainOutcome, outcome); err == nil {
		result.Outcome = &signed
	}
	return result
}

// cut shortens a text visibly and keeps it UTF-8: what is signed must be.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + fmt.Sprintf("... (%d bytes more)", len(s)-n)
}

// RepoCall is the header of a "repo" stream. It needs no permit: it moves
// repositories between the workspace and the node's quarantine, on the node's word.
type RepoCall struct {
	Out *tools.Bundle   `json:"out,omitempty"`
	In  *tools.Unbundle `json:"in,omitempty"`
	Add *tools.Incoming `json:"add,omitempty"` // a branch into a repository that is there
}

func (p *Proxy) repo(ctx context.Context, stream *wire.Stream) {
	var call RepoCall
	err := nucleus.Strict(stream.Header, &call)
	var result tools.Result
	switch {
	case err != nil:
	case call.Out != nil:
		result, err = p.work(ctx, tools.StreamBundle, call.Out, nil, stream)
	case call.In != nil:
		result, err = p.work(ctx, tools.StreamUnbundle, call.In, nil, stream)
	case call.Add != nil:
		result, err = p.work(ctx, tools.StreamIncoming, call.Add, nil, stream)
	default:
		err = fmt.Errorf("neither in, nor out, nor add")
	}
	if err != nil {
		result.Error = nucleus.Errorf(nucleus.KindFailed, "repository transfer: %v", err)
	}
	stream.SetWriteDeadline(time.Now().Add(bootDeadline))
	stream.SendJSON(wire.FrameResult, result)
}
