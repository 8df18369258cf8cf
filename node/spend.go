package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"cal/egress"
	"cal/guest"
	"cal/nucleus"
	"cal/wire"
)

// What spends a budget: calls to the model, and the time in which something of a pod
// runs. And what happens when it is spent.

// modelEntry is what a model.call adds to the log.
type modelEntry struct {
	egress.ModelCall
	USD      float64            `json:"usd"`
	Unpriced bool               `json:"unpriced,omitempty"` // charged like the dearest: the model, or its service, has no price
	Left     map[string]float64 `json:"left,omitempty"`     // of the dimensions that have a limit
}

// beginModelCall admits a call where something is left, holds what it may cost, and
// records its intent. Where only calls under way might spend the rest, it waits for them.
func (n *Node) beginModelCall(ctx context.Context, call egress.ModelCall) error {
	p, err := n.pod(call.Pod)
	if err != nil {
		return err
	}
	if err := n.witness.allow(); err != nil {
		return err
	}
	entry := nucleus.Entry{Pod: call.Pod, Session: call.Session, Actor: "agent", Kind: nucleus.KindModelCall}
	if err := n.holdModelCall(ctx, p, call); err != nil {
		e := nucleus.AsError(err)
		entry.Verdict, entry.Rule, entry.Status = nucleus.Deny, e.Rule, nucleus.OutcomeRefused
		entry.Data = data(map[string]any{"id": call.ID, "host": call.Host, "port": call.Port, "method": call.Method, "path": call.Path, "requested": call.Requested, "message": e.Message})
		n.note(entry)
		return e
	}
	entry.Data = data(modelEntry{ModelCall: call})
	if _, err = n.log.Append(entry); err != nil {
		n.ofCall(call.ID)
		p.root.mu.Lock()
		defer p.root.mu.Unlock()
		p.root.release(call.ID)
		p.leave()
	}
	return err
}

func (n *Node) holdModelCall(ctx context.Context, p *Pod, call egress.ModelCall) error {
	s := p.root
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		p.settle()
		if why := p.ended(); why != "" {
			return &nucleus.Error{Kind: nucleus.KindUnavailable, Rule: rulePod, Message: why}
		}
		if err := p.overspent(!call.Free); err != nil {
			return err
		}
		left := s.left(p.record.ID)
		if call.Free || len(s.budget.Holds) == 0 || left.MicroUSD > 0 && left.Tokens > 0 {
			break
		}
		if s.freed == nil {
			s.freed = make(chan struct{})
		}
		freed := s.freed
		s.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if ctx.Err() != nil {
			return nucleus.Errorf(nucleus.KindUnavailable, "calls that are under way may spend the rest of the budget; try again when one has ended")
		}
	}
	if !call.Free {
		cost := func(tokens egress.Tokens) nucleus.Amounts {
			usd, _ := n.config.Prices.Cost(call.Requested, call.Service, tokens)
			return nucleus.Amounts{MicroUSD: usd, Tokens: tokens.Sum()}
		}
		s.budget.Holds[call.ID] = hold{p.record.ID, cost(call.Expected()), cost(call.Bound())}
		if s.budget.limited(p.record.ID) {
			if err := s.budget.store(); err != nil {
				s.release(call.ID)
				return nucleus.Errorf(nucleus.KindUnavailable, "nothing was sent: %v", err)
			}
		}
	}
	p.enter()
	n.mu.Lock()
	n.modelCalls[call.ID] = p
	n.mu.Unlock()
	return nil
}

// ofCall is the pod whose call has ended. It may have ended itself meanwhile: what it spent
// is spent all the same, by the pod above it.
func (n *Node) ofCall(id string) *Pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.modelCalls[id]
	delete(n.modelCalls, id)
	return p
}

// release gives back what was held for a call. The caller holds the mutex.
func (s *rootSession) release(call string) {
	delete(s.budget.Holds, call)
	if s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
}

// endModelCall charges what a call used and records it. The charge is durable before its
// entry is written.
func (n *Node) endModelCall(call egress.ModelCall) error {
	entry := modelEntry{ModelCall: call}
	var storeErr error
	if p := n.ofCall(call.ID); p != nil {
		model := call.Model
		if model == "" {
			model = call.Requested
		}
		var amounts nucleus.Amounts
		if amounts.Tokens = call.Tokens.Sum(); amounts.Tokens > 0 {
			var known bool
			amounts.MicroUSD, known = n.config.Prices.Cost(model, call.Service, call.Tokens)
			entry.Unpriced = !known
		}
		entry.USD = nucleus.USD.Number(amounts.MicroUSD)
		s := p.root
		s.mu.Lock()
		s.release(call.ID)
		a := s.budget.Accounts[p.record.ID]
		if call.Estimated {
			a.Estimated++
		}
		if entry.Unpriced && !slices.Contains(a.Unpriced, model) && len(a.Unpriced) < 16 {
			a.Unpriced = append(a.Unpriced, model)
		}
		p.leave()
		storeErr = s.spend(p.record.ID, amounts)
		entry.Left = p.leftNumbers()
		s.mu.Unlock()
		defer n.stopSpent(s)
	}
	err := n.noted(nucleus.Entry{Pod: call.Pod, Session: call.Session, Actor: "agent", Kind: nucleus.KindModelCall, Data: data(entry)})
	return errors.Join(storeErr, err)
}

// leftNumbers is what is left in US dollars, tokens and seconds, where there is a limit. The
// caller holds the session's mutex.
func (p *Pod) leftNumbers() map[string]float64 {
	left := p.root.left(p.record.ID)
	numbers := map[string]float64{}
	for _, d := range nucleus.Dimensions() {
		if n := *left.Of(d); n != nucleus.Unlimited {
			numbers[d.String()] = d.Number(max(0, n))
		}
	}
	return numbers
}

// overspent is the refusal of a pod that has nothing left, nil while it has. For a call to
// the model a limit of 0 is spent from the start. The caller holds the session's mutex.
func (p *Pod) overspent(model bool) error {
	l := p.root.budget
	for _, d := range nucleus.Dimensions() {
		a := l.payer(p.record.ID, d)
		if a == nil {
			continue
		}
		spent, reserved, limit := *a.Spent.Of(d), *a.Reserved.Of(d), *a.Limit.Of(d)
		if used := nucleus.AddAmounts(spent, reserved); d.Over(used, limit) || model && used >= limit {
			return spentError(d, spent, reserved, limit)
		}
	}
	return nil
}

func spentError(d nucleus.Dimension, spent, reserved, limit int64) *nucleus.Error {
	return &nucleus.Error{Kind: nucleus.KindDenied, Rule: d.Rule(), Message: d.Explain(spent, reserved, limit)}
}

// The clock of a pod runs while its agent or a background command does, while a request of
// it is being carried out, and while a call to its model is under way; once, however many do. It stands while a
// request waits for a person, and while the machine is paused.

// monotonic is CLOCK_MONOTONIC: it cannot be set, and goes on from one process to the next.
func monotonic() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(fmt.Sprintf("the monotonic clock: %v", err)) // every system has it
	}
	return time.Duration(now.Nano())
}

func (n *Node) tick() int64 { return n.config.Monotonic().Milliseconds() }

// settle charges the time that the pod's clock has run. The caller holds the session's
// mutex, as for the following.
func (p *Pod) settle() {
	a := p.root.budget.Accounts[p.record.ID]
	if a == nil || a.running == 0 {
		return
	}
	now := p.node.tick()
	if passed := now - a.Since; passed > 0 && !a.frozen {
		p.root.budget.charge(p.record.ID, nucleus.Amounts{Millis: passed})
	}
	a.Since = now
}

// enter says that one thing more runs, leave that it has ended.
func (p *Pod) enter() {
	p.settle()
	a := p.root.budget.Accounts[p.record.ID]
	if a.running++; a.running == 1 {
		a.Since = p.node.tick()
	}
}

func (p *Pod) leave() {
	p.settle()
	a := p.root.budget.Accounts[p.record.ID]
	if a.running--; a.running == 0 {
		a.Since = 0
	}
}

func (p *Pod) freeze(frozen bool) {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	p.settle()
	p.root.budget.Accounts[p.record.ID].frozen = frozen
}

// works sets whether something runs in the pod that no request waits for, by the word of
// its machine: the agent, or a background command.
func (p *Pod) works(runs bool) {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	if p.working == runs {
		return
	}
	if p.working = runs; runs {
		p.enter()
	} else {
		p.leave()
	}
	if p.root.budget.payer(p.record.ID, nucleus.Seconds) == nil {
		return
	}
	if err := p.root.budget.store(); err != nil { // the next node has to know that it ran
		slog.Error("that a clock runs could not be stored", "pod", p.record.ID, "error", err)
	}
}

// maxGap is the most that a pod can have run on without a node: its machine waits a minute
// for the next one, which has its own deadline, and the time was last stored a while before.
const maxGap = 2 * time.Minute

// takeUp charges the time that went by since an earlier node last stored it, if the clock
// ran then. The caller holds the session's mutex.
func (p *Pod) takeUp() error {
	a := p.root.budget.Accounts[p.record.ID]
	if a == nil {
		return fmt.Errorf("pod %s has no account in its session's budget", p.record.ID)
	}
	if a.Since == 0 {
		return nil
	}
	gap := min(max(0, p.node.tick()-a.Since), maxGap.Milliseconds())
	a.Since = 0
	return p.root.spend(p.record.ID, nucleus.Amounts{Millis: gap})
}

const (
	budgetTick  = 250 * time.Millisecond // how soon a session is ended after its time is over
	budgetStore = 5 * time.Second        // how often running clocks are stored
)

// keepBudgets ends sessions whose time is over, and stores running clocks now and then.
func (n *Node) keepBudgets(ctx context.Context) {
	tick := time.NewTicker(budgetTick)
	defer tick.Stop()
	var stored time.Duration
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, s := range n.sessions() {
			n.stopSpent(s)
		}
		if now := n.config.Monotonic(); now-stored >= budgetStore {
			stored = now
			n.storeClocks()
		}
	}
}

// sessions are the root sessions of all pods.
func (n *Node) sessions() []*rootSession {
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	var all []*rootSession
	for _, p := range pods {
		p.mu.Lock()
		root := p.root
		p.mu.Unlock()
		if root != nil && !slices.Contains(all, root) {
			all = append(all, root)
		}
	}
	return all
}

func (n *Node) storeClocks() {
	for _, s := range n.sessions() {
		s.mu.Lock()
		moved := s.budget.unstored
		for p := range s.pods {
			a := s.budget.Accounts[p.record.ID]
			if a == nil {
				continue
			}
			before := a.Spent.Millis
			p.settle()
			if moved = moved || a.Spent.Millis != before || a.stored != a.Spent.Millis; moved {
				a.stored = a.Spent.Millis
			}
		}
		if moved {
			if err := s.budget.store(); err != nil {
				slog.Error("time that was used could not be stored", "error", err)
			}
		}
		s.mu.Unlock()
	}
}

// stopSpent ends the work of each pod of a root session that has nothing left, once. Money
// and tokens that are set aside for sub-pods may come back; time may not be used twice
// meanwhile, so a pod whose time is all set aside is ended too.
func (n *Node) stopSpent(s *rootSession) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.pods {
		p.settle()
	}
	for p := range s.pods {
		a := s.budget.Accounts[p.record.ID]
		if a == nil || a.Stopped != "" || !p.live() {
			continue
		}
		if d, payer := p.spentUp(); payer != nil {
			n.stopPod(p, a, d, payer)
		}
	}
}

// spentUp names the dimension in which the pod's session is over, and who would pay.
func (p *Pod) spentUp() (nucleus.Dimension, *account) {
	for _, d := range nucleus.Dimensions() {
		a := p.root.budget.payer(p.record.ID, d)
		if a == nil {
			continue
		}
		used := *a.Spent.Of(d)
		if d == nucleus.Seconds {
			used += *a.Reserved.Of(d)
		}
		if d.Over(used, *a.Limit.Of(d)) {
			return d, a
		}
	}
	return 0, nil
}

func (n *Node) stopPod(p *Pod, a *account, d nucleus.Dimension, payer *account) {
	spent, reserved, limit := *payer.Spent.Of(d), *payer.Reserved.Of(d), *payer.Limit.Of(d)
	a.Stopped = d.Rule()
	if err := p.root.budget.store(); err != nil {
		slog.Error("a spent budget could not be stored", "pod", p.record.ID, "error", err)
	}
	n.note(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Kind: nucleus.KindSessionBudget, Rule: d.Rule(), Exposure: p.root.exposure.Names(),
		Data: data(map[string]any{"dimension": d.String(), "limit": d.Number(limit), "spent": d.Number(spent), "reserved": d.Number(reserved)}),
	})
	n.closeUncovered(p.root)
	n.endWork(p, spentError(d, spent, reserved, limit))
}

// forgetBudget ends what is stored of a session whose first pod is removed. Calls that end
// later are recorded in the log alone.
func (p *Pod) forgetBudget() {
	if p.root == nil {
		return
	}
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	if filepath.Dir(p.root.budget.file) == p.dir {
		p.root.budget.file = ""
	}
}

// stoppedBy is why the pod's work was ended, nil where it was not.
func (p *Pod) stoppedBy() *nucleus.Error {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	a := p.root.budget.Accounts[p.record.ID]
	if a == nil || a.Stopped == "" {
		return nil
	}
	for _, d := range nucleus.Dimensions() {
		if payer := p.root.budget.payer(p.record.ID, d); d.Rule() == a.Stopped && payer != nil {
			return spentError(d, *payer.Spent.Of(d), *payer.Reserved.Of(d), *payer.Limit.Of(d))
		}
	}
	return nil
}

// endOf is how the pod's agent ended, with the budget as the reason where it was that.
func (p *Pod) endOf(exit guest.AgentExit) guest.AgentExit {
	if why := p.stoppedBy(); why != nil && !exit.Refused && !tookOver(exit) {
		exit.Error = why
	}
	return exit
}

// endGrace is how long an agent, and a command, has to end after it was told to.
const endGrace = 3 * time.Second

// endWork ends what runs in a pod, by and by. Only one does it, however often the machine says
// that something runs.
func (n *Node) endWork(p *Pod, why *nucleus.Error) {
	select {
	case <-n.closing: // the next node does
		return
	default:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopAgain = true
	if p.stopping {
		return
	}
	p.stopping = true
	n.serving.Go(func() {
		for p.stopsAgain() {
			p.endWork(why, disobedience)
		}
	})
}

// stopsAgain reports whether what runs is to be ended, another time too.
func (p *Pod) stopsAgain() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopping, p.stopAgain = p.stopAgain, false
	select {
	case <-p.node.closing: // the next node does
		p.stopping = false
	default:
	}
	return p.stopping
}

// disobedience is how long a machine may say that something runs there which it was told to kill.
const disobedience = 30 * time.Second

// endWork tells what runs in a pod to end, and kills what does not; at last the machine.
func (p *Pod) endWork(why *nucleus.Error, patience time.Duration) {
	for _, signal := range []string{"TERM", "KILL"} {
		if p.idle() {
			return
		}
		p.mu.Lock()
		for stream := range p.calls {
			go stream.Send(wire.FrameSignal, []byte(signal))
		}
		if p.watched != nil {
			go p.watched.Send(wire.FrameSignal, []byte(signal))
		}
		p.mu.Unlock()
		if p.idleWithin(endGrace) {
			return
		}
	}
	p.mu.Lock()
	for _, cancel := range p.calls {
		cancel(why)
	}
	p.mu.Unlock()
	if p.idleWithin(patience) {
		return
	}
	if _, gone := p.wire(); gone == nil { // else it stands still, and will hear of it
		p.node.failPod(p, fmt.Errorf("the machine did not end what runs in it: %w", why))
	}
}

// idle reports whether nothing of the pod runs.
func (p *Pod) idle() bool {
	p.root.mu.Lock()
	working := p.working
	p.root.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	return !working && len(p.calls) == 0
}

// idleWithin waits until nothing of the pod runs.
func (p *Pod) idleWithin(patience time.Duration) bool {
	over := time.After(patience)
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for {
		if p.idle() || !p.live() {
			return true
		}
		select {
		case <-poll.C:
		case <-over:
			return false
		case <-p.node.closing:
			return true // the next node ends it
		}
	}
}

// watchWork hears from the machine what runs there that no request waits for, on one wire
// until that ends.
func (p *Pod) watchWork(session *wire.Session) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	stream, err := session.Open(ctx, guest.StreamWatch, nil)
	cancel()
	if err != nil {
		return // the wire ended
	}
	defer stream.Close()
	p.mu.Lock()
	p.watched = stream
	p.mu.Unlock()
	for {
		var state guest.WorkState
		if err := stream.RecvJSON(wire.FrameJSON, 64<<10, &state); err != nil {
			return
		}
		if state.Exit != nil {
			state.Exit.Error = boundedError(state.Exit.Error)
			p.node.recordAgentEnd(p, p.endOf(*state.Exit))
		}
		p.works(state.Agent || state.Jobs)
		if why := p.stoppedBy(); why != nil && (state.Agent || state.Jobs) {
			p.node.endWork(p, why)
		}
	}
}

// budgetStatus is what the API says of the pod's budget.
func (p *Pod) budgetStatus(s *rootSession) *nucleus.Budget {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.budget.Accounts[p.record.ID]
	if a == nil {
		return nil
	}
	p.settle()
	b := &nucleus.Budget{Estimated: a.Estimated, Unpriced: slices.Clone(a.Unpriced), Stopped: a.Stopped}
	for _, d := range nucleus.Dimensions() {
		of := b.Of(d)
		if payer := s.budget.payer(p.record.ID, d); payer != nil {
			limit, left := *payer.Limit.Of(d), *payer.Limit.Of(d)-*payer.Spent.Of(d)-*payer.Reserved.Of(d)
			of.Limit, of.Left = new(d.Number(limit)), new(d.Number(max(0, left)))
			of.Spent, of.Reserved = d.Number(*payer.Spent.Of(d)), d.Number(*payer.Reserved.Of(d))
			continue
		}
		of.Spent = d.Number(*a.Spent.Of(d))
	}
	return b
}

// budgetPlan is the budget of a pod that has not begun.
func budgetPlan(limits nucleus.Amounts) *nucleus.Budget {
	b := &nucleus.Budget{}
	for _, d := range nucleus.Dimensions() {
		if limit := *limits.Of(d); limit != nucleus.Unlimited {
			b.Of(d).Limit, b.Of(d).Left = new(d.Number(limit)), new(d.Number(limit))
		}
	}
	return b
}
