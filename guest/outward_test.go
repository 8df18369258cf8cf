package guest

import (
	"crypto/ed25519"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"cal/approval"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

// outwardPolicy has all three legs; hosts are named, so nothing is lowered but pushes.
const outwardPolicy = `{"operations":{"read_files":"always","git_push":"ask","create_pr":"ask","web_fetch":"always"},"paths":{"roots":"any"},"hosts":{"only":[{"host":"example.org","port":443}]}}`

func newOutwardLock(t testing.TB, policy string) *lock {
	l := newLock(t)
	l.p.boot.Policy = json.RawMessage(policy)
	if err := l.p.adopt(); err != nil {
		t.Fatal(err)
	}
	return l
}

func pushAction() nucleus.Action {
	return nucleus.Action{Op: nucleus.GitPush, Push: &nucleus.Push{Repo: "app", Remote: "r", Ref: "refs/heads/a", Old: "0", New: "1"}}
}

func fetchAction() nucleus.Action {
	return nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", URL: "https://example.org/", Host: "example.org", Port: 443, Path: "/"}}
}

// over makes a call on a wire, as the node does, and returns what the proxy signed.
func (l *lock) over(call Call, args CallArgs) (CallResult, nucleus.Outcome) {
	l.t.Helper()
	node, machine := sessions(l.t)
	go func() {
		if stream, err := machine.Accept(); err == nil {
			l.p.handle(deadline(l.t), stream)
		}
	}()
	stream, err := node.Open(deadline(l.t), StreamCall, call)
	if err != nil {
		l.t.Fatal(err)
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(patience))
	if err := stream.SendJSON(wire.FrameJSON, args); err != nil {
		l.t.Fatal(err)
	}
	var result CallResult
	if err := stream.RecvJSON(wire.FrameResult, 1<<20, &result); err != nil {
		l.t.Fatal(err)
	}
	var outcome nucleus.Outcome
	if err := result.Outcome.Open(l.p.key.Public().(ed25519.PublicKey), nucleus.DomainOutcome, &outcome); err != nil {
		l.t.Fatal(err)
	}
	return result, outcome
}

// An effect on the host is judged like any other, its legs are taken, and nothing is
// done here: there is no worker in this test.
func TestAdmitsEffectOnHost(t *testing.T) {
	l := newOutwardLock(t, outwardPolicy)
	fetch := fetchAction()
	permit := l.permit(fetch)
	result, outcome := l.over(Call{Op: fetch.Op, Permit: l.sign(permit)}, CallArgs{Args: tools.Args{Action: &fetch}})
	if result.Error != nil || outcome.Status != nucleus.OutcomeAdmitted || outcome.Permit != permit.ID || outcome.Seq != permit.Seq || outcome.Boot != "b-1" {
		t.Fatalf("%+v, %+v", result.Error, outcome)
	}
	if want := nucleus.Untrusted | nucleus.WayOut; l.p.served.exposure != want {
		t.Errorf("legs %v, want %v", l.p.served.exposure.Names(), want.Names())
	}
	// Private data, served here, beside what was fetched: the next fetch needs a grant, also
	// where the node has forgotten both.
	read := readAction("a")
	l.admitted("a read", Call{Op: read.Op, Permit: l.sign(l.permit(read))}, &read)
	result, outcome = l.over(Call{Op: fetch.Op, Permit: l.sign(l.permit(fetch))}, CallArgs{Args: tools.Args{Action: &fetch}})
	if result.Error == nil || outcome.Status != nucleus.OutcomeRefused || result.Error.Rule != "trifecta" {
		t.Errorf("%+v, %+v", result.Error, outcome)
	}
}

// A push needs the grant that the boot's policy asks for, over the wire too; an ask may
// be larger than a stream's header.
func TestAdmitsGrantedPush(t *testing.T) {
	l := newOutwardLock(t, outwardPolicy)
	push := pushAction()
	permit := l.permit(push)
	permit.Verdict = nucleus.Allow
	result, outcome := l.over(Call{Op: push.Op, Permit: l.sign(permit)}, CallArgs{Args: tools.Args{Action: &push}})
	if result.Error == nil || outcome.Status != nucleus.OutcomeRefused || l.p.served.exposure != 0 {
		t.Errorf("without a grant: %+v, %+v, legs %v", result.Error, outcome, l.p.served.exposure.Names())
	}
	permit = l.permit(push)
	ask := l.ask(permit, push)
	ask.Detail = []nucleus.Detail{{Title: "diff", Text: string(make([]byte, 200<<10))}}
	permit.Grants = []string{l.token(ask)}
	result, outcome = l.over(Call{Op: push.Op, Permit: l.sign(permit)}, CallArgs{Args: tools.Args{Action: &push}, Ask: &ask})
	if result.Error != nil || outcome.Status != nucleus.OutcomeAdmitted {
		t.Errorf("with a grant: %+v, %+v", result.Error, outcome)
	}
	again := l.permit(push)
	again.Grants, again.Digest, again.Salt = permit.Grants, permit.Digest, permit.Salt
	result, outcome = l.over(Call{Op: push.Op, Permit: l.sign(again)}, CallArgs{Args: tools.Args{Action: &push}, Ask: &ask})
	if result.Error == nil || outcome.Status != nucleus.OutcomeRefused {
		t.Errorf("the grant again: %+v, %+v", result.Error, outcome)
	}
}

// A grant for a place admits every fetch there, each under a permit of its own; with the
// same grant a node gets no fetch of another place past this lock, also where its permit
// says that one was granted.
func TestAdmitsFetchesThroughPassage(t *testing.T) {
	l := newOutwardLock(t, placePolicy)
	fetch := func(host, path string) nucleus.Action {
		return nucleus.Action{Op: nucleus.WebFetch, Args: nucleus.SHA256([]byte(path)), Fetch: &nucleus.Fetch{Method: "GET", URL: "https://" + host + path, Host: host, Port: 443, Path: path}}
	}
	first := fetch("example.org", "/a")
	ask := l.ask(l.permit(first), first)
	ask.Passage = &nucleus.Passage{Host: "example.org", Port: 443, Exposure: nucleus.WayOut, Millis: approval.MaxPassage}
	token := l.token(ask)
	do := func(action nucleus.Action) (CallResult, nucleus.Outcome) {
		t.Helper()
		permit := l.permit(action)
		permit.Verdict, permit.Grants = nucleus.Ask, []string{token}
		return l.over(Call{Op: action.Op, Permit: l.sign(permit)}, CallArgs{Args: tools.Args{Action: &action}, Ask: &ask})
	}
	for _, path := range []string{"/a", "/b"} {
		if result, outcome := do(fetch("example.org", path)); result.Error != nil || outcome.Status != nucleus.OutcomeAdmitted {
			t.Errorf("%s: %+v, %+v", path, result.Error, outcome)
		}
	}
	result, outcome := do(fetch("other.example", "/a"))
	if result.Error == nil || outcome.Status != nucleus.OutcomeRefused || !strings.Contains(outcome.Message, "leads to example.org") {
		t.Errorf("another place: %+v, %+v", result.Error, outcome)
	}
	if result, outcome = do(fetch("example.org", "/c")); result.Error != nil || outcome.Status != nucleus.OutcomeAdmitted {
		t.Errorf("the place after that: %+v, %+v", result.Error, outcome)
	}
}
