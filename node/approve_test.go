package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	approvals "cal/approval/client"
	"cal/nucleus"
	"cal/wire"
)

var writeAsks = policyOf("read_files write_files=ask")

func writeArgs(name string) map[string]string { return map[string]string{"path": name, "content": "x"} }

// An ask has an id; who calls again waits on for the same ask; a grant is good for
// one effect and for these values.
func TestAskAndGrant(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	first := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval)
	if first.Ask == "" || first.Rule != "operations.write_files" || len(h.inside(p).permits()) != 0 || written(p, "a") {
		t.Fatalf("got %+v", first)
	}
	for range 3 {
		if again := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval); again.Ask != first.Ask {
			t.Errorf("a retry is ask %s, not %s", again.Ask, first.Ask)
		}
	}
	if other := h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval); other.Ask == first.Ask {
		t.Error("another path continues the ask")
	}
	operator := h.serve(h.node, h.signed(h.asOperator(), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/write_files", p.record.ID, document(t, writeArgs("a"))))
	if e := operator.want(t, nucleus.KindApproval); e.Ask == first.Ask {
		t.Error("another requester continues the ask")
	}
	asks := h.authority.asked()
	if len(asks) != 3 {
		t.Fatalf("%d asks, want 3", len(asks))
	}
	var request wire.SignedRequest
	if err := json.Unmarshal(asks[0].Request, &request); err != nil {
		t.Fatal(err)
	}
	key := wire.Key{ID: p.record.Boot, Ed25519: p.record.OutcomeKey}
	if err := request.Verify(key); err != nil || asks[0].Requester != p.record.Boot || asks[0].Pod != p.record.ID {
		t.Errorf("the ask holds no request of the agent's: %v, %+v", err, asks[0])
	}

	h.authority.grant(first.Ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	if !written(p, "a") || written(p, "b") {
		t.Error("the grant did something else")
	}
	if again := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval); again.Ask == first.Ask {
		t.Error("the grant's ask lives on")
	}

	// What a reader of the log sees: ask, use, intent, in this order, before the outcome.
	kinds := []string{}
	for _, e := range h.log() {
		if e.Ask == first.Ask || e.Kind == nucleus.KindOutcome {
			kinds = append(kinds, e.Kind)
		}
	}
	if want := []string{nucleus.KindApprovalAsk, nucleus.KindApprovalUse, nucleus.KindIntent, nucleus.KindOutcome}; !slices.Equal(kinds, want) {
		t.Errorf("kinds %v, want %v", kinds, want)
	}
	intent := h.entries(nucleus.KindIntent, nucleus.WriteFiles)[0]
	if len(intent.Grants) != 1 || intent.Verdict != nucleus.Ask || intent.Ask != first.Ask {
		t.Errorf("intent %+v", intent)
	}
}

// The outcome of a retry belongs to the intent that was approved.
func TestOutcomeOfRetry(t *testing.T) {
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	intent, outcome := h.entries(nucleus.KindIntent, nucleus.WriteFiles)[0], h.entries(nucleus.KindOutcome, nucleus.WriteFiles)[0]
	if intent.Digest != outcome.Digest {
		t.Errorf("intent %s, outcome %s", intent.Digest, outcome.Digest)
	}
}

// A caller that waits gets the answer when the person gives it.
func TestWaitForPerson(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	got := make(chan answer, 1)
	go func() { got <- h.tool(p, nucleus.WriteFiles, writeArgs("a"), "wait=15") }()
	eventually(t, "an ask", func() bool { return len(h.authority.asked()) == 1 })
	select {
	case a := <-got:
		t.Fatalf("answered before the person: %v", a)
	default:
	}
	h.authority.grant(h.authority.asked()[0].ID, nil)
	(<-got).want(t, "")
	if !written(p, "a") {
		t.Error("nothing was written")
	}
}

// Two callers wait for one ask: one grant, one effect.
func TestOneGrantTwoCallers(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	var calls sync.WaitGroup
	answers := make([]answer, 6)
	for i := range answers {
		calls.Go(func() { answers[i] = h.tool(p, nucleus.WriteFiles, writeArgs("a"), "wait=1") })
	}
	h.authority.grant(ask, nil)
	calls.Wait()
	done := 0
	for _, a := range answers {
		if a.Status == http.StatusOK {
			done++
		}
	}
	if got := len(h.inside(p).permits()); done != 1 || got != 1 {
		t.Errorf("%d succeeded, %d permits, want 1: %v", done, got, answers)
	}
}

// A grant for anything but what was asked is refused, and says which field differs.
func TestGrantForOtherValues(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	for name, change := range map[string]func(*nucleus.AskRequest){
		"ask":     func(a *nucleus.AskRequest) { a.ID = "a-other" },
		"pod":     func(a *nucleus.AskRequest) { a.Pod = "p-other" },
		"session": func(a *nucleus.AskRequest) { a.Session = "s-other" },
		"boot":    func(a *nucleus.AskRequest) { a.Boot = "b-other" },
		"nonce":   func(a *nucleus.AskRequest) { a.Nonce = "n-other" },
		"policy":  func(a *nucleus.AskRequest) { a.Policy = nucleus.SHA256(nil) },
		"operation": func(a *nucleus.AskRequest) {
			a.Action.Op = nucleus.GitPush
			a.Digest, _ = a.Action.Digest(nucleus.Salt(a.Salt))
		},
		"digest": func(a *nucleus.AskRequest) {
			a.Action.Files = []nucleus.File{{Path: "harmless"}}
			a.Digest, _ = a.Action.Digest(nucleus.Salt(a.Salt))
		},
		"why":      func(a *nucleus.AskRequest) { a.Why = "nothing happens" },
		"evidence": func(a *nucleus.AskRequest) { a.Evidence = []nucleus.Evidence{{Seq: 1}} },
		"expired":  func(a *nucleus.AskRequest) { a.Expires = a.Created + 1 },
	} {
		path := "f-" + name
		ask := h.tool(p, nucleus.WriteFiles, writeArgs(path)).want(t, nucleus.KindApproval).Ask
		h.authority.grant(ask, change)
		h.tool(p, nucleus.WriteFiles, writeArgs(path)).want(t, nucleus.KindRefused, "grant")
		if written(p, path) {
			t.Errorf("%s: it was done", name)
		}
		// Refused is not used up: the right grant still counts.
		h.authority.grant(ask, nil)
		h.tool(p, nucleus.WriteFiles, writeArgs(path)).want(t, "")
	}
	// A key that nobody has named.
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("forged")).want(t, nucleus.KindApproval).Ask
	forger := newPerson(t, "person")
	h.authority.answer(ask, given(forger.token(t, h.authority.asked()[len(h.authority.asked())-1])))
	h.tool(p, nucleus.WriteFiles, writeArgs("forged")).want(t, nucleus.KindRefused, "grant")
	for _, token := range []string{"", "yes", "v4.public.AAAA.AAAA", strings.Repeat("v4.public.", 2000)} {
		h.authority.answer(ask, given(token))
		h.tool(p, nucleus.WriteFiles, writeArgs("forged")).want(t, nucleus.KindRefused, "grant")
	}
	if written(p, "forged") {
		t.Error("a forged grant was good")
	}
}

// An authority that shows another key than at boot cannot approve for a machine
// that runs: who takes its socket's place takes nothing.
func TestAuthorityWithAnotherKey(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	person := newPersonRepo(t)
	p := h.pod(person.spec("", policyOf("git_push=ask")), nil)
	h.authority.newKey()
	push := map[string]string{"branch": "agent/work"}
	ask := h.tool(p, nucleus.GitPush, push).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.GitPush, push).want(t, nucleus.KindRefused, "grant")
	if at := person.at("agent/work"); at != "" {
		t.Errorf("the remote has %s", at)
	}
	h.restart()
	p, err := h.node.pod(p.record.ID)
	if err != nil {
		t.Fatal(err)
	}
	ask = h.tool(p, nucleus.GitPush, push).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.GitPush, push).want(t, nucleus.KindRefused, "grant")
}

// A person's no is final for the ask, and says why; a new request is a new ask.
func TestPersonDenies(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	for _, state := range []string{approvals.Denied, approvals.Expired} {
		ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
		h.authority.answer(ask, approvals.Status{State: state, Reason: "not on a Friday"})
		e := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindRefused, "not on a Friday")
		if e.Ask != ask {
			t.Errorf("got %+v", e)
		}
		if e := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval); e.Ask == ask {
			t.Error("the ask lives on")
		}
		h.authority.deny(h.authority.asked()[len(h.authority.asked())-1].ID, "")
		h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindRefused)
	}
	if written(p, "a") || len(h.inside(p).permits()) != 0 {
		t.Error("it was done")
	}
	if got := h.entries(nucleus.KindApprovalDeny, nucleus.WriteFiles); len(got) != 4 {
		t.Errorf("%d denials recorded, want 4", len(got))
	}
}

// Without the authority what needs it is refused with the reason and the mend; the
// rest goes on, and goes on when it comes back.
func TestAuthorityUnreachable(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), map[string]string{"a": "text"})
	h.authority.stop()
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindUnavailable, "authority does not run", "nucleus-authority serve")
	h.tool(p, nucleus.WriteFiles, writeArgs("b"), "wait=600").want(t, nucleus.KindUnavailable, "authority does not run")
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	if written(p, "b") {
		t.Error("it was done")
	}
	h.authority.start()
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, "")
}

// Where no authority is configured nobody can approve.
func TestNoAuthority(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("", writeAsks), nil)
	if e := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval); e.Ask != "" {
		t.Errorf("got %+v", e)
	}
	if written(p, "a") {
		t.Error("it was done")
	}
}

// What more persons have to approve than can is not done, and nobody is asked.
func TestQuorumBeyondApprovers(t *testing.T) {
	t.Parallel()
	for approvals, want := range map[int]string{1: "a person has been asked", 2: "the approvals of 2 different persons, and 1 could approve when this machine started (nucleus-authority approver add"} {
		h := newHost(t, withAuthority)
		p := h.pod(specOf("", writeNeeds(approvals)), map[string]string{"b": "text"})
		e := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval, want)
		if asked := len(h.authority.asked()); asked != 2-approvals || (e.Ask != "") != (asked == 1) {
			t.Errorf("%d approvals: %d asks, %+v", approvals, asked, e)
		}
		h.tool(p, nucleus.ReadFiles, map[string]string{"path": "b"}).want(t, "") // the rest goes on
		if written(p, "a") {
			t.Error("it was done")
		}
	}
}

func writeNeeds(approvals int) json.RawMessage {
	return json.RawMessage(fmt.Sprintf(`{"operations":{"write_files":"ask","read_files":"always"},"obligations":{"write_files":{"approvals":%d}}}`, approvals))
}

// Two of three persons have to grant, each by an own key. What an authority hands out beside
// that - one token, one twice, two of one person, one for something else - is refused, and is
// not used up.
func TestQuorum(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	ann := h.authority.persons[0]
	bob, eve := newPerson(t, "bob"), newPerson(t, "eve")
	twin := person{nucleus.Approver{Name: "twin", Kind: bob.Kind, Key: bob.Key}, bob.key}
	h.authority.persons = []person{ann, bob, twin}
	p := h.pod(specOf("", writeNeeds(2)), nil)
	if len(p.approvers) != 2 {
		t.Fatalf("approvers %+v: one key counts once", p.approvers)
	}
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval, "2 persons have been asked to approve and 0 have").Ask
	shown := h.authority.asked()[0]
	if shown.Approvals != 2 {
		t.Errorf("ask for %d approvals", shown.Approvals)
	}
	half := given(ann.token(t, shown))
	half.State, half.Need = approvals.Pending, 2
	h.authority.answer(ask, half)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval, "2 persons have been asked to approve and 1 have")
	other := shown
	other.ID = "a-other"
	one := ann.token(t, shown)
	for what, tokens := range map[string][]string{
		"none": nil, "one": {one}, "one twice": {one, one}, "two of one": {one, ann.token(t, shown)}, "three": {one, bob.token(t, shown), twin.token(t, shown)},
		"a stranger": {one, eve.token(t, shown)}, "one key by two names": {bob.token(t, shown), twin.token(t, shown)}, "one for another ask": {one, bob.token(t, other)},
	} {
		h.authority.answer(ask, given(tokens...))
		h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindRefused, "grant")
		if written(p, "a") {
			t.Errorf("%s: it was done", what)
		}
	}
	h.authority.answer(ask, given(bob.token(t, shown), one))
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	if !written(p, "a") {
		t.Error("it was not done")
	}
	uses := h.entries(nucleus.KindApprovalUse, "")
	if len(uses) != 1 || len(uses[0].Grants) != 2 || !strings.Contains(string(uses[0].Data), `"approvers":["bob","person"]`) {
		t.Errorf("uses %+v", uses)
	}
	permits := h.inside(p).permits()
	if last := permits[len(permits)-1]; len(last.Grants) != 2 {
		t.Errorf("permit with %d grants", len(last.Grants))
	}
}

// A grant is judged against what holds when it arrives.
func TestDecidedAgain(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	until := time.Now().Add(time.Minute).UTC().Format(time.RFC3339)
	policy := json.RawMessage(fmt.Sprintf(`{"operations":{"write_files":"ask"},"paths":{"roots":"any"},"commands":"any","hosts":"any","window":{"until":%q}}`, until))
	p := h.pod(specOf("", policy), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	got := make(chan answer, 1)
	go func() { got <- h.tool(p, nucleus.WriteFiles, writeArgs("a"), "wait=10") }()
	h.clock.pass(2 * time.Minute)
	h.authority.grant(ask, nil)
	if a := <-got; a.Error == nil || a.Error.Kind != nucleus.KindDenied || a.Error.Rule != "window" {
		t.Errorf("got %v", a)
	}
	if written(p, "a") {
		t.Error("it was done")
	}
}

// A grant that was used is used for ever: also by a node that was started since.
func TestGrantIsUsedAcrossRestart(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("w", writeAsks), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	pending, _ := p.asks.get(ask)
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	h.authority.mu.Lock()
	token := h.authority.status[ask].Tokens()[0]
	h.authority.mu.Unlock()

	for _, end := range []func(){h.restart, func() { h.kill(); h.start() }} {
		end()
		p, err := h.node.pod(p.record.ID)
		if err != nil {
			t.Fatal(err)
		}
		// The next node comes upon the same ask and the same token.
		again := pending
		again.ask.Nonce = pending.ask.Nonce
		p.asks.put(again)
		before := len(h.inside(p).permits())
		h.authority.answer(ask, given(token))
		_, _, err = h.node.approve(h.context(), p, request{caller: wire.Caller{KeyID: p.record.Boot}, op: nucleus.WriteFiles}, pending.pre, &needsApproval{})
		if e := nucleus.AsError(err); err == nil || e.Kind != nucleus.KindRefused || !strings.Contains(e.Message, "used before") {
			t.Errorf("got %v", err)
		}
		if got := len(h.inside(p).permits()); got != before {
			t.Errorf("%d permits, want %d", got, before)
		}
	}
}

// The grant cannot be recorded as used: nothing happens.
func TestGrantUseNotRecorded(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	if err := h.node.spent.Close(); err != nil {
		t.Fatal(err)
	}
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindUnavailable, "nothing was done")
	if written(p, "a") {
		t.Error("it was done")
	}
}

// The workspace changes while a person thinks: the retry is a new ask, and it is
// the new one that later retries continue.
func TestAskAfterChange(t *testing.T) {
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", policyOf("write_files=ask edit_files")), map[string]string{"a": "one"})
	first := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.tool(p, nucleus.EditFiles, map[string]string{"path": "a", "old": "one", "new": "two"}).want(t, "")
	second := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	if first == second {
		t.Fatal("the ask for another content was continued")
	}
	for range 20 {
		if e := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval); e.Ask != second {
			t.Fatalf("ask %s, want %s; %d asks", e.Ask, second, len(h.authority.asked()))
		}
	}
	h.authority.grant(first, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval)
	h.authority.grant(second, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
}

// The caller went away while the person thought: that is what the record says.
func TestCallerLeavesBeforeAnswer(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	ctx, cancel := context.WithCancel(h.context())
	got := make(chan answer, 1)
	go func() { got <- h.toolContext(ctx, p, nucleus.WriteFiles, writeArgs("a"), "wait=600") }()
	eventually(t, "an ask", func() bool {
		asks := h.authority.asked()
		if len(asks) == 0 {
			return false
		}
		_, ok := p.asks.get(asks[0].ID)
		return ok
	})
	cancel()
	if a := <-got; a.Error == nil {
		t.Errorf("got %v", a)
	}
	h.authority.grant(h.authority.asked()[0].ID, nil)
	if written(p, "a") || len(h.inside(p).permits()) != 0 {
		t.Error("done for nobody")
	}
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
}

// Who asks for one thing after the other, of any kind, fills neither the person's queue nor the
// host's disk: a session has few asks open at once, with few bytes, and is told so.
func TestOpenAsksOfEveryKindAreLimited(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	first := h.tool(p, nucleus.WriteFiles, writeArgs("f0")).want(t, nucleus.KindApproval).Ask
	for i := 1; i < maxOpenAsks; i++ {
		if e := h.tool(p, nucleus.WriteFiles, writeArgs(fmt.Sprintf("f%d", i))).want(t, nucleus.KindApproval); e.Ask == "" {
			t.Fatalf("ask %d: %v", i, e)
		}
	}
	if e := h.tool(p, nucleus.WriteFiles, writeArgs("more")).want(t, nucleus.KindApproval, "16 asks of this session wait for a person"); e.Ask != "" {
		t.Errorf("one more is asked: %v", e)
	}
	if n := len(h.authority.asked()); n != maxOpenAsks {
		t.Errorf("%d asks, want %d", n, maxOpenAsks)
	}
	if e := h.tool(p, nucleus.WriteFiles, writeArgs("f0")).want(t, nucleus.KindApproval); e.Ask != first {
		t.Errorf("the ask that is open is asked anew: %v", e)
	}
	h.authority.grant(first, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("f0")).want(t, "")
	if e := h.tool(p, nucleus.WriteFiles, writeArgs("more")).want(t, nucleus.KindApproval); e.Ask == "" {
		t.Errorf("what was answered makes no room: %v", e)
	}
	// Few large ones are as many.
	big, asked := h.pod(specOf("", writeAsks), nil), 0
	for i := range maxOpenAsks {
		args := map[string]string{"path": fmt.Sprintf("f%d", i), "content": strings.Repeat("x", 500<<10)}
		e := h.tool(big, nucleus.WriteFiles, args).want(t, nucleus.KindApproval)
		if e.Ask == "" {
			if !strings.Contains(e.Message, "at most 8388608 are allowed") {
				t.Errorf("ask %d: %v", i, e)
			}
			break
		}
		asked++
	}
	if asked < 8 || asked == maxOpenAsks {
		t.Errorf("%d asks of 500 KiB are open at once", asked)
	}
	// Another session has bounds of its own.
	if e := h.tool(h.pod(specOf("", writeAsks), nil), nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval); e.Ask == "" {
		t.Errorf("another session: %v", e)
	}
}

// The bytes of what a session asks at once are bounded too.
func TestOpenAskBytesAreLimited(t *testing.T) {
	t.Parallel()
	s := &rootSession{}
	now := time.Now()
	for i, bytes := range []int{maxOpenAskBytes / 2, maxOpenAskBytes / 2, 1} {
		id := fmt.Sprint(i)
		if err := s.askFor(id, now); err != nil {
			t.Fatal(err)
		}
		if err := s.weigh(id, bytes); (err == nil) != (i < 2) {
			t.Errorf("ask %d of %d bytes: %v", i, bytes, err)
		}
	}
	s.answered("0")
	if err := s.weigh("2", maxOpenAskBytes/2); err != nil {
		t.Errorf("after an answer: %v", err)
	}
	if err := s.askFor("3", now.Add(askLife)); err != nil {
		t.Fatal(err)
	}
	if err := s.weigh("3", maxOpenAskBytes); err != nil {
		t.Errorf("after all have expired: %v", err)
	}
}
