package node

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cal/egress"
	"cal/guest"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// budgetPod is a pod whose agent may do all and spend no more than budget.
func (h *host) budgetPod(budget string) *Pod {
	h.t.Helper()
	spec := specOf("w", json.RawMessage(fmt.Sprintf(`{"operations": {"read_files": "always", "run_bash": "always", "write_files": "ask"}, "budget": %s}`, budget)))
	spec.Agent = &nucleus.Agent{Name: "test", Argv: []string{"/agent"}}
	return h.pod(spec, map[string]string{"a": "text"})
}

func (h *host) readA(p *Pod) answer {
	return h.tool(p, nucleus.ReadFiles, map[string]any{"path": "a"})
}

func callOf(p *Pod, id string) egress.ModelCall {
	return egress.ModelCall{ID: id, Pod: p.record.ID, Session: p.record.Session, Protocol: "anthropic", Host: "api.example", Port: 443, Method: "POST", Path: "/v1/messages", Requested: "claude-opus-4-5", Sent: 100}
}

// callModel makes a call to the model that uses so much, as the gateway does.
func (h *host) callModel(p *Pod, call egress.ModelCall, used egress.Tokens) error {
	if err := (*gate)(h.node).ModelCall(h.context(), call); err != nil {
		return err
	}
	call.Done, call.Status, call.Tokens, call.Model = true, 200, used, call.Requested
	return (*gate)(h.node).ModelCall(h.context(), call)
}

func (h *host) spentOf(p *Pod) nucleus.Amounts {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	p.settle()
	return p.root.budget.Accounts[p.record.ID].Spent
}

// modelEntries are what the log says of calls that have ended.
func (h *host) modelEntries() (ended []modelEntry) {
	h.t.Helper()
	for _, e := range h.entries(nucleus.KindModelCall, "") {
		var entry modelEntry
		if e.Status == "" && json.Unmarshal(e.Data, &entry) == nil && entry.Done {
			ended = append(ended, entry)
		}
	}
	return ended
}

// What a call used is charged in tokens and dollars, stands in its entry with what is
// left, and is there again after the node was killed.
func TestModelCallsAreCharged(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.budgetPod(`{"usd": 5, "tokens": 1000000}`)
	if err := h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 10_000, CacheRead: 20_000, CacheWrite: 1_000, Output: 2_000}); err != nil {
		t.Fatal(err)
	}
	const cost = 50_000 + 10_000 + 6_250 + 50_000 // of claude-opus-4-5, in millionths
	if got, want := h.spentOf(p), (nucleus.Amounts{MicroUSD: cost, Tokens: 33_000}); got.MicroUSD != want.MicroUSD || got.Tokens != want.Tokens {
		t.Errorf("spent %+v, want %+v", got, want)
	}
	entry := h.modelEntries()[0]
	if entry.USD != 0.11625 || entry.Left["usd"] != 4.88375 || entry.Left["tokens"] != 967_000 || entry.Unpriced || len(entry.Left) != 2 {
		t.Errorf("the entry says %+v", entry)
	}
	free := callOf(p, "mc-2")
	free.Free = true
	if err := h.callModel(p, free, egress.Tokens{}); err != nil {
		t.Fatal(err)
	}
	unknown := callOf(p, "mc-3")
	unknown.Requested = "model-nobody-knows"
	if err := h.callModel(p, unknown, egress.Tokens{Input: 1_000}); err != nil {
		t.Fatal(err)
	}
	if entry := h.modelEntries()[2]; !entry.Unpriced || entry.USD < 0.03 {
		t.Errorf("a model without a price is charged %v, unpriced %v", entry.USD, entry.Unpriced)
	}
	before := h.spentOf(p)
	underWay := callOf(p, "mc-4") // that its node does not see the end of costs all that it can
	if err := (*gate)(h.node).ModelCall(h.context(), underWay); err != nil {
		t.Fatal(err)
	}
	id := p.record.ID
	h.kill()
	h.start()
	p = h.node.pods[id]
	got, want := h.spentOf(p), before.Plus(nucleus.Amounts{Tokens: 100 + 128_000})
	if got.Tokens != want.Tokens || got.MicroUSD <= before.MicroUSD {
		t.Errorf("after the node was killed %+v is spent, want what was spent before and what was under way: %+v", got, want)
	}
	status := p.status()
	if b := status.Budget; b == nil || *b.USD.Limit != 5 || *b.Tokens.Left != float64(1_000_000-got.Tokens) || b.Seconds.Limit != nil || b.Estimated != 1 || len(b.Unpriced) != 1 || b.Unpriced[0] != "model-nobody-knows" {
		t.Errorf("status %+v", status.Budget)
	}
}

// A call is refused when nothing is left, before it is sent; a limit of 0 is for who calls
// no model.
func TestNothingLeftForAModelCall(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.budgetPod(`{"usd": 0}`)
	h.readA(p).want(t, "")
	e := nucleus.AsError(h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 1}))
	if e.Kind != nucleus.KindDenied || e.Rule != "budget.usd" || e.Message != "the budget is spent: 0.00 of 0.00 USD" {
		t.Errorf("a call without a budget: %+v", e)
	}
	h.readA(p).want(t, "")
	if calls := h.entries(nucleus.KindModelCall, ""); len(calls) != 1 || calls[0].Status != nucleus.OutcomeRefused || calls[0].Rule != "budget.usd" {
		t.Errorf("the log says %+v", calls)
	}
	free := callOf(p, "mc-2")
	free.Free = true
	if err := h.callModel(p, free, egress.Tokens{}); err != nil {
		t.Errorf("what costs nothing: %v", err)
	}
}

// waitedOn counts when somebody begins to wait for its end.
type waitedOn struct {
	context.Context
	once  sync.Once
	times *atomic.Int64
}

func (c *waitedOn) Done() <-chan struct{} {
	c.once.Do(func() { c.times.Add(1) })
	return c.Context.Done()
}

// A hundred calls at once cannot all start on the last tokens.
func TestParallelCallsShareWhatIsLeft(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.budgetPod(`{"tokens": 5000}`)
	var work sync.WaitGroup
	var under, waiting atomic.Int64
	release := make(chan bool)
	for i := range 100 {
		work.Go(func() {
			call := callOf(p, fmt.Sprint("mc-", i))
			if err := (*gate)(h.node).ModelCall(&waitedOn{Context: h.context(), times: &waiting}, call); err != nil {
				if e := nucleus.AsError(err); e.Rule != "budget.tokens" {
					t.Errorf("%+v", e)
				}
				return
			}
			under.Add(1)
			<-release
			call.Done, call.Status, call.Tokens = true, 200, egress.Tokens{Input: 100, Output: 4000}
			if err := (*gate)(h.node).ModelCall(h.context(), call); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "each call is under way or waits", func() bool { return under.Load()+waiting.Load() == 100 })
	close(release)
	work.Wait()
	// Each holds its 100 bytes and an answer of 4096 tokens: the second begins on 804 that are left.
	if made := under.Load(); made != 2 {
		t.Errorf("%d calls were made on 5000 tokens, want 2", made)
	}
}

// What may be spent by a call under way is waited for, and not in vain.
func TestCallWaitsForAnother(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.budgetPod(`{"tokens": 5000}`)
	first := callOf(p, "mc-1")
	first.Sent = 2000
	if err := (*gate)(h.node).ModelCall(h.context(), first); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(h.context(), 20*time.Millisecond)
	defer cancel()
	if e := nucleus.AsError((*gate)(h.node).ModelCall(short, callOf(p, "mc-2"))); e.Kind != nucleus.KindUnavailable {
		t.Fatalf("a second call: %+v", e)
	}
	second := make(chan error)
	go func() { second <- h.callModel(p, callOf(p, "mc-3"), egress.Tokens{Output: 10}) }()
	first.Done, first.Status, first.Tokens = true, 200, egress.Tokens{Input: 500, Output: 10}
	if err := (*gate)(h.node).ModelCall(h.context(), first); err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Errorf("the second call, after the first: %v", err)
	}
}

// The clock runs while something of the pod does, once for all; not while it idles, nor
// while a request waits for a person, and the wall clock has no part in it.
func TestSecondsByUse(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	began, release := make(chan bool), make(chan bool)
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		if c.call.Op == nucleus.RunBash {
			began <- true
			<-release
		}
		return c.honest(), true
	}
	p := h.budgetPod(`{"seconds": 3600}`)
	pass := func(d time.Duration) { h.ticks.Add(int64(d)) }
	used := func(what string, want time.Duration) {
		t.Helper()
		if got := time.Duration(h.spentOf(p).Millis) * time.Millisecond; got < want || got > want+5*time.Second {
			t.Errorf("%s: %s are used, want %s", what, got, want)
		}
	}
	pass(time.Hour)
	used("idle", 0)
	run := func() answer { return h.tool(p, nucleus.RunBash, map[string]any{"argv": []string{"true"}}) }
	// A command reserves nothing: each may take a day, and none does.
	answers := make(chan answer)
	for range 13 {
		go func() {
			answers <- h.tool(p, nucleus.RunBash, map[string]any{"argv": []string{"true"}, "timeout_s": 3500})
		}()
		<-began
		release <- true
		(<-answers).want(t, "")
	}
	used("13 commands that could have taken an hour each", 0)
	for range 3 {
		go func() { answers <- run() }()
		<-began
	}
	pass(20 * time.Second)
	h.clock.pass(100 * time.Hour) // the person sets the clock
	for range 3 {
		release <- true
		(<-answers).want(t, "")
	}
	used("3 commands at a time", 20*time.Second)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval)
	pass(time.Hour)
	used("a request that waits for "+ask.Ask, 20*time.Second)
	pass(time.Hour)
	h.clock.pass(-300 * time.Hour)
	used("the clock set back", 20*time.Second)
	h.pausePod(p, 30*time.Second, pass)
	used("a paused machine", 20*time.Second)
}

// pausePod lets time pass while the agent of a paused machine is there.
func (h *host) pausePod(p *Pod, d time.Duration, pass func(time.Duration)) {
	p.works(true)
	h.node.pausePod(p, "test")
	pass(d)
	p.works(false)
	if err := h.node.ResumePod(h.context(), "operator", p.record.ID); err != nil {
		h.t.Fatal(err)
	}
}

// signals collects what a stream is told to do.
func signals(stream *wire.Stream, to chan<- string) {
	defer close(to)
	for {
		kind, payload, err := stream.Recv(1 << 20)
		if err != nil {
			return
		}
		if kind == wire.FrameSignal {
			to <- string(payload)
		}
	}
}

// When the time is over, the agent and the command that runs are told to end, and the
// command that does not is killed; who asked is told why, and it is in the log.
func TestTheEndOfTheTime(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	toAgent, toCommand, began := make(chan string, 10), make(chan string, 10), make(chan bool)
	h.watch = func(stream *wire.Stream) {
		stream.SendJSON(wire.FrameJSON, guest.WorkState{Agent: true})
		told := make(chan string)
		go signals(stream, told)
		for s := range told {
			toAgent <- s
			if s == "TERM" {
				stream.SendJSON(wire.FrameJSON, guest.WorkState{})
			}
		}
	}
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		if c.call.Op != nucleus.RunBash {
			return c.honest(), true
		}
		began <- true
		told := make(chan string)
		go signals(c.stream, told)
		for s := range told {
			toCommand <- s
			if s == "KILL" {
				break
			}
		}
		return c.honest(), true
	}
	p := h.budgetPod(`{"seconds": 60}`)
	eventually(t, "the agent runs", func() bool { p.root.mu.Lock(); defer p.root.mu.Unlock(); return p.working })
	got := make(chan answer)
	go func() { got <- h.tool(p, nucleus.RunBash, map[string]any{"argv": []string{"true"}}) }()
	<-began
	h.ticks.Add(int64(50 * time.Second))
	h.readA(p).want(t, "")
	h.ticks.Add(int64(11 * time.Second))
	for _, want := range []struct {
		from chan string
		said string
	}{{toAgent, "TERM"}, {toCommand, "TERM"}, {toCommand, "KILL"}} {
		select {
		case s := <-want.from:
			if s != want.said {
				t.Fatalf("told to %s, want %s", s, want.said)
			}
		case <-time.After(patience):
			t.Fatalf("nobody was told to %s", want.said)
		}
	}
	e := (<-got).want(t, nucleus.KindDenied, "the budget is spent: 6", "of 60 seconds")
	if e.Rule != "budget.seconds" {
		t.Errorf("rule %q", e.Rule)
	}
	h.readA(p).want(t, nucleus.KindDenied, "of 60 seconds")
	entries := h.entries(nucleus.KindSessionBudget, "")
	var said struct {
		Dimension    string
		Limit, Spent float64
	}
	if len(entries) != 1 || entries[0].Rule != "budget.seconds" || json.Unmarshal(entries[0].Data, &said) != nil || said.Dimension != "seconds" || said.Limit != 60 || said.Spent < 61 {
		t.Errorf("the log says %+v", entries)
	}
	if b := p.status().Budget; b.Stopped != "budget.seconds" || *b.Seconds.Left != 0 {
		t.Errorf("status %+v", b)
	}
	if _, _, err := h.node.openAgent(h.context(), p, "operator", client.AgentRequest{}, []string{"/agent"}); nucleus.AsError(err).Rule != "budget.seconds" {
		t.Errorf("another agent: %v", err)
	}
}

// What is spent by a call to the model ends the session at once.
func TestTheEndOfTheTokens(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	told := make(chan string, 10)
	h.watch = func(stream *wire.Stream) {
		stream.SendJSON(wire.FrameJSON, guest.WorkState{Agent: true})
		signals(stream, told)
	}
	p := h.budgetPod(`{"tokens": 1000}`)
	eventually(t, "the agent runs", func() bool { p.root.mu.Lock(); defer p.root.mu.Unlock(); return p.working })
	if err := h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 999}); err != nil {
		t.Fatal(err)
	}
	select {
	case s := <-told:
		t.Fatalf("the agent was told to %s, and a token is left", s)
	case <-time.After(4 * budgetTick):
	}
	if err := h.callModel(p, callOf(p, "mc-2"), egress.Tokens{Input: 50}); err != nil {
		t.Fatal(err)
	}
	if s := <-told; s != "TERM" {
		t.Errorf("told to %s", s)
	}
	if e := nucleus.AsError(h.callModel(p, callOf(p, "mc-3"), egress.Tokens{Input: 1})); e.Rule != "budget.tokens" || e.Message != "the budget is spent: 1049 of 1000 tokens" {
		t.Errorf("a call after the end: %+v", e)
	}
	// The person is told why the agent ended, whatever it says itself.
	a, b := pipe(t)
	machine, guestEnd := pipe(t)
	start := nucleus.Entry{Kind: nucleus.KindSessionStart, Seq: 7}
	p.mu.Lock()
	p.runs = map[int64]string{start.Seq: "operator"}
	p.mu.Unlock()
	go h.node.relayAgent(p, "operator", start, a, machine)
	guestEnd.SendJSON(wire.FrameResult, guest.AgentExit{ExitCode: 143})
	var exit guest.AgentExit
	if err := b.RecvJSON(wire.FrameResult, 1<<20, &exit); err != nil || exit.Error == nil || exit.Error.Rule != "budget.tokens" || exit.ExitCode != 143 {
		t.Errorf("the person is told %+v, %v", exit, err)
	}
	if ends := h.entries(nucleus.KindSessionEnd, ""); len(ends) != 1 || !strings.Contains(string(ends[0].Data), "1049 of 1000 tokens") {
		t.Errorf("the log says %+v", ends)
	}
}

// Time that goes by between two nodes is counted while the agent runs on: not less than
// nothing, and not more than a machine waits for a node.
func TestTimeWithoutANode(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		runs   bool
		passed time.Duration
		want   time.Duration
	}{
		"the agent ran on":  {true, 30 * time.Second, 30 * time.Second},
		"too long":          {true, 10 * time.Hour, maxGap},
		"backwards":         {true, -10 * time.Hour, 0},
		"the agent had not": {false, 30 * time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			var mu sync.Mutex
			runs := c.runs
			h.watch = func(stream *wire.Stream) {
				mu.Lock()
				defer mu.Unlock()
				stream.SendJSON(wire.FrameJSON, guest.WorkState{Agent: runs})
				mu.Unlock()
				stream.Recv(64)
				mu.Lock()
			}
			p := h.budgetPod(`{"seconds": 7200}`)
			if c.runs {
				eventually(t, "the agent runs", func() bool { p.root.mu.Lock(); defer p.root.mu.Unlock(); return p.working })
			}
			h.ticks.Add(int64(100 * time.Second))
			h.node.storeClocks()
			before := time.Duration(h.spentOf(p).Millis) * time.Millisecond
			mu.Lock()
			runs = false // it ends while nobody looks
			mu.Unlock()
			id := p.record.ID
			h.kill()
			h.clock.pass(1000 * time.Hour)
			h.ticks.Add(int64(c.passed))
			h.start()
			got := time.Duration(h.spentOf(h.node.pods[id]).Millis) * time.Millisecond
			const unstored = 100 * time.Millisecond // went by between storing and the end
			if got < before+c.want-unstored || got > before+c.want+5*time.Second {
				t.Errorf("%s were used before and %s are after, want %s more", before, got, c.want)
			}
		})
	}
}

// A sub-pod that draws on the pod above it ends both when nothing is left; one that has an
// amount of its own ends alone. A call that its end cut off is paid for.
func TestSubPodsSpend(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	var own map[string]any
	if err := json.Unmarshal(policyOf(delegating), &own); err != nil {
		t.Fatal(err)
	}
	own["budget"] = object{"tokens": 10_000}
	p := h.pod(specOf("w", document(t, own)), map[string]string{"a": "text"})
	reads := func(of object) object {
		return object{"policy": object{"operations": object{"read_files": "always"}, "budget": of}}
	}
	stopped := func(p *Pod) string { return p.status().Budget.Stopped }
	apart := h.create(p, reads(object{"tokens": 1000}))
	if err := h.callModel(apart, callOf(apart, "mc-1"), egress.Tokens{Output: 1500}); err != nil {
		t.Fatal(err)
	}
	if stopped(apart) != "budget.tokens" || stopped(p) != "" {
		t.Errorf("stopped are %q and above it %q", stopped(apart), stopped(p))
	}
	if left := *p.status().Budget.Tokens.Left; left != 8500 {
		t.Errorf("left %v, want 10000 less 1000 and the 500 beyond", left)
	}
	h.end(p, apart)
	sharing := h.create(p, reads(object{}))
	cut := callOf(sharing, "mc-2")
	if err := (*gate)(h.node).ModelCall(h.context(), cut); err != nil {
		t.Fatal(err)
	}
	h.end(p, sharing)
	cut.Done, cut.Tokens, cut.Estimated = true, egress.Tokens{Input: 100, Output: 400}, true
	if err := (*gate)(h.node).ModelCall(h.context(), cut); err != nil {
		t.Fatal(err)
	}
	if left := *p.status().Budget.Tokens.Left; left != 8000 {
		t.Errorf("left %v: the call of a pod that was deleted meanwhile is not paid for", left)
	}
	sharing = h.create(p, reads(object{}))
	h.readA(p).want(t, "")
	if err := h.callModel(sharing, callOf(sharing, "mc-3"), egress.Tokens{Output: 8000}); err != nil {
		t.Fatal(err)
	}
	if stopped(sharing) != "budget.tokens" || stopped(p) != "budget.tokens" {
		t.Errorf("stopped are %q and above it %q", stopped(sharing), stopped(p))
	}
	h.readA(p).want(t, nucleus.KindDenied, "10000 of 10000 tokens")
}

// A machine that says again and again that something runs in it does not keep the node busy.
func TestMachineThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	flooded, spent := make(chan bool), make(chan bool)
	h.watch = func(stream *wire.Stream) {
		<-spent
		for range 20_000 {
			if stream.SendJSON(wire.FrameJSON, guest.WorkState{Agent: true}) != nil {
				return
			}
		}
		close(flooded)
		stream.Recv(64)
	}
	p := h.budgetPod(`{"tokens": 1000}`)
	if err := h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 1000}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session is stopped", func() bool { return p.stoppedBy() != nil })
	close(spent)
	eventually(t, "the machine has said so", func() bool {
		select {
		case <-flooded:
			p.root.mu.Lock()
			defer p.root.mu.Unlock()
			return p.working
		default:
			return false
		}
	})
	stacks := make([]byte, 64<<20)
	if ends := strings.Count(string(stacks[:runtime.Stack(stacks, true)]), ".idleWithin("); ends > 10 { // those of other tests beside it
		t.Errorf("%d ends of it are under way at once", ends)
	}
}

// Where nothing limits a session, what it spends is stored with the clocks, and no call waits
// for the disk.
func TestSpendingWithoutALimit(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.budgetPod(`{}`)
	to := func(file string) {
		p.root.mu.Lock()
		defer p.root.mu.Unlock()
		p.root.budget.file = file
	}
	file := filepath.Join(p.dir, budgetFile)
	to(filepath.Join(p.dir, "none", budgetFile)) // cannot be written
	if err := h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 10, Output: 20}); err != nil {
		t.Error(err)
	}
	to(file)
	h.node.storeClocks()
	id := p.record.ID
	h.kill()
	h.start()
	if got := h.spentOf(h.node.pods[id]); got.Tokens != 30 || got.MicroUSD == 0 {
		t.Errorf("spent %+v, want 30 tokens", got)
	}
}

// A limit that cannot be kept on the disk refuses what it would be charged for, before it is sent.
func TestBudgetThatCannotBeStored(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.budgetPod(`{"usd": 1}`)
	p.root.mu.Lock()
	file := p.root.budget.file
	p.root.budget.file = filepath.Join(p.dir, "none", budgetFile)
	p.root.mu.Unlock()
	if e := nucleus.AsError(h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 10})); e == nil || e.Kind != nucleus.KindUnavailable {
		t.Errorf("a call: %v, want it refused", e)
	}
	p.root.mu.Lock()
	p.root.budget.file = file
	p.root.mu.Unlock()
	if err := h.callModel(p, callOf(p, "mc-2"), egress.Tokens{Input: 10}); err != nil {
		t.Errorf("a call, once it can be stored: %v", err)
	}
}

// That something runs is on the disk as soon as it does, where seconds are limited: the time
// without a node counts from there.
func TestClockIsStoredAtOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.watch = func(stream *wire.Stream) { stream.Recv(64) } // the machine says nothing of its own
	p := h.budgetPod(`{"seconds": 60}`)
	for _, runs := range []bool{true, false} {
		p.works(runs)
		stored, err := openLedger(filepath.Join(p.dir, budgetFile))
		if err != nil {
			t.Fatal(err)
		}
		if since := stored.Accounts[p.record.ID].Since; since > 0 != runs {
			t.Errorf("it runs: %v; the file says that it has run since %d", runs, since)
		}
	}
}

// A machine that does not end what runs in it is ended itself, and the person is told why.
func TestMachineThatDoesNotObey(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.watch = func(stream *wire.Stream) {
		stream.SendJSON(wire.FrameJSON, guest.WorkState{Agent: true})
		signals(stream, make(chan string, 100)) // and does nothing
	}
	p := h.budgetPod(`{"tokens": 1000}`)
	eventually(t, "the agent runs", func() bool { return !p.idle() })
	a, b := pipe(t)
	machine, guestEnd := pipe(t)
	go h.node.relayAgent(p, "operator", nucleus.Entry{}, a, machine)
	if err := h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 1000}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session is stopped", func() bool { return p.stoppedBy() != nil })
	p.endWork(p.stoppedBy(), time.Millisecond)
	if p.live() {
		t.Fatal("the machine goes on")
	}
	guestEnd.Close() // as its wire does
	var exit guest.AgentExit
	if err := b.RecvJSON(wire.FrameResult, 1<<20, &exit); err != nil || exit.Error == nil || exit.Error.Rule != "budget.tokens" {
		t.Errorf("the person is told %+v, %v", exit, err)
	}
}
