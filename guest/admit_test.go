package guest

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	paseto "aidanwoods.dev/go-paseto"

	"cal/approval"
	"cal/nucleus"
	"cal/policy"
)

// lock is the second lock with who stands before it: a node, and a person who approves.
type lock struct {
	t        testing.TB
	p        *Proxy
	node     ed25519.PrivateKey
	approver paseto.V4AsymmetricSecretKey
	seq      uint64
	passed   time.Duration // on every monotonic clock
	wall     time.Duration // that the host's wall clock was set by
}

const lockPolicy = `{"operations":{"read_files":"always","write_files":"ask","web_fetch":"always","run_bash":"always"},"paths":{"roots":"any","blocked":["**/.env*"]},"commands":"any","hosts":{"only":[{"host":"example.org","port":443}]}}`

func newKey(t testing.TB) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

func newLock(t testing.TB) *lock {
	t.Helper()
	nodePublic, node := newKey(t)
	approverPublic, approver := newKey(t)
	l := &lock{t: t, node: node}
	var err error
	if l.approver, err = paseto.NewV4AsymmetricSecretKeyFromEd25519(approver); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(Config{ToolsUID: 1000, ToolsGID: 1000, AgentUID: 1001, AgentGID: 1001, Mode: nucleus.Mediated})
	if err != nil {
		t.Fatal(err)
	}
	l.p = &Proxy{clock: newNodeClock(), changed: make(chan struct{}), boot: nucleus.Boot{
		Pod: "p-1", Boot: "b-1", NodeKey: nodePublic, Approvers: []nucleus.Approver{{Name: "person", Kind: nucleus.ApproverEd25519, Key: approverPublic}},
		Policy: json.RawMessage(lockPolicy), Time: nucleus.NodeTime{Epoch: 1, Tick: 1000, UnixMilli: time.Now().UnixMilli()}, Guest: config,
	}}
	l.p.clock.own = func() time.Duration { return l.passed }
	if err := l.p.adopt(); err != nil {
		t.Fatal(err)
	}
	return l
}

func readAction(path string) nucleus.Action {
	return nucleus.Action{Op: nucleus.ReadFiles, Args: nucleus.SHA256([]byte(path)), Files: []nucleus.File{{Path: path}}}
}

func writeAction(path string) nucleus.Action {
	return nucleus.Action{Op: nucleus.WriteFiles, Args: nucleus.SHA256([]byte(path)), Files: []nucleus.File{{Path: path, After: nucleus.SHA256(nil)}}}
}

// permit is what an honest node would write for an action.
func (l *lock) permit(action nucleus.Action) nucleus.Permit {
	l.t.Helper()
	salt := nucleus.NewSalt()
	digest, err := action.Digest(salt)
	if err != nil {
		l.t.Fatal(err)
	}
	now := time.Now().Add(l.wall).UnixMilli()
	state := nucleus.Context{UnixMilli: now}
	l.seq++
	return nucleus.Permit{
		ID: nucleus.NewID("r-"), Pod: "p-1", Boot: "b-1", Session: "s-1", Seq: 1<<40 | l.seq, Op: action.Op, Digest: digest, Salt: salt[:],
		Verdict: l.p.policy.Decide(action, state).Verdict, Context: state, Life: 30_000,
		Issued: nucleus.NodeTime{Epoch: 1, Tick: 1000 + l.passed.Milliseconds(), UnixMilli: now},
	}
}

func (l *lock) sign(permit nucleus.Permit) *nucleus.Signed {
	l.t.Helper()
	signed, err := nucleus.Sign(l.node, nucleus.DomainPermit, permit)
	if err != nil {
		l.t.Fatal(err)
	}
	return &signed
}

// ask is the ask that a permit's grant is given for.
func (l *lock) ask(permit nucleus.Permit, action nucleus.Action) nucleus.AskRequest {
	return nucleus.AskRequest{
		ID: nucleus.NewID("a-"), Pod: permit.Pod, Workspace: "w", Session: permit.Session, Boot: permit.Boot, Requester: "agent",
		Request: json.RawMessage(`{}`), Action: action, Digest: permit.Digest, Salt: permit.Salt, Policy: nucleus.SHA256(l.p.boot.Policy),
		Rule: "operations.write_files", Why: "asks", Approvals: 1, Context: permit.Context, Tier: "kernel", Mode: "mediated",
		Created: permit.Issued.UnixMilli - 1000, Expires: permit.Issued.UnixMilli + 60_000, Nonce: nucleus.NewID("n-"),
	}
}

// tester is an approver.
type tester struct {
	name string
	key  paseto.V4AsymmetricSecretKey
}

func (l *lock) token(ask nucleus.AskRequest) string {
	l.t.Helper()
	return l.tokenBy(tester{"person", l.approver}, ask)
}

func (l *lock) tokenBy(by tester, ask nucleus.AskRequest) string {
	l.t.Helper()
	return l.taskToken(by, ask, nil)
}

func (l *lock) taskToken(by tester, ask nucleus.AskRequest, task *nucleus.Task) string {
	l.t.Helper()
	b, err := approval.Bind(ask)
	if err != nil {
		l.t.Fatal(err)
	}
	grant := b.Grant(nucleus.NewID("g-"), by.name, "yes")
	grant.Task = task
	raw, err := nucleus.Canonical(grant)
	if err != nil {
		l.t.Fatal(err)
	}
	token, err := paseto.NewTokenFromClaimsJSON(raw, approval.Footer(by.name))
	if err != nil {
		l.t.Fatal(err)
	}
	return token.V4Sign(by.key, approval.Assertion(b.AskDigest))
}

func (l *lock) refused(what string, call Call, action *nucleus.Action, text string) {
	l.t.Helper()
	l.refusedAsk(what, call, action, nil, text)
}

func (l *lock) refusedAsk(what string, call Call, action *nucleus.Action, ask *nucleus.AskRequest, text string) {
	l.t.Helper()
	_, e := l.p.admit(call, action, ask)
	if e == nil {
		l.t.Errorf("%s: admitted", what)
	} else if e.Kind != nucleus.KindForbidden || !strings.Contains(e.Message, text) {
		l.t.Errorf("%s: %+v, want %q", what, e, text)
	}
}

// Nothing is acted on but what the node permitted: for this boot, this action, now, once.
func TestPermit(t *testing.T) {
	l := newLock(t)
	action := readAction("a")
	_, stranger := newKey(t)
	foreign, err := nucleus.Sign(stranger, nucleus.DomainPermit, l.permit(action))
	if err != nil {
		t.Fatal(err)
	}
	domain, err := nucleus.Sign(l.node, nucleus.DomainAttach, l.permit(action))
	if err != nil {
		t.Fatal(err)
	}
	wider, err := nucleus.Sign(l.node, nucleus.DomainPermit, map[string]any{"id": "r-1", "everything": true})
	if err != nil {
		t.Fatal(err)
	}
	own, err := nucleus.Sign(l.p.key, nucleus.DomainPermit, l.permit(action))
	if err != nil {
		t.Fatal(err)
	}
	for name, signed := range map[string]*nucleus.Signed{
		"another key": &foreign, "another domain": &domain, "an unknown field": &wider, "the proxy's own key": &own, "empty": {},
	} {
		l.refused(name, Call{Op: nucleus.ReadFiles, Permit: signed}, &action, "permit:")
	}
	l.refused("no permit", Call{Op: nucleus.ReadFiles}, &action, "no permit")
	l.refused("no action", Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}, nil, "no action")

	for name, c := range map[string]struct {
		change func(*nucleus.Permit)
		text   string
	}{
		"another pod":       {func(p *nucleus.Permit) { p.Pod = "p-2" }, "this is pod"},
		"another boot":      {func(p *nucleus.Permit) { p.Boot = "b-2" }, "this is pod"},
		"another operation": {func(p *nucleus.Permit) { p.Op = nucleus.RunBash }, "the call is"},
		"another digest":    {func(p *nucleus.Permit) { p.Digest = nucleus.SHA256(nil) }, "another action"},
		"another salt":      {func(p *nucleus.Permit) { s := nucleus.NewSalt(); p.Salt = s[:] }, "another action"},
		"a short salt":      {func(p *nucleus.Permit) { p.Salt = p.Salt[:31] }, "salt of 31"},
		"no salt":           {func(p *nucleus.Permit) { p.Salt = nil }, "salt of 0"},
		"expired":           {func(p *nucleus.Permit) { p.Life = -1 }, "ms old"},
		"another epoch":     {func(p *nucleus.Permit) { p.Issued.Epoch = 2 }, "epoch 2"},
		"an epoch too many": {func(p *nucleus.Permit) { p.Seq += 1 << nucleus.EpochBits }, "not of epoch"},
	} {
		permit := l.permit(action)
		c.change(&permit)
		l.refused(name, Call{Op: nucleus.ReadFiles, Permit: l.sign(permit)}, &action, c.text)
	}
	for name, change := range map[string]func(*nucleus.Action){
		"another path":         func(a *nucleus.Action) { a.Files = []nucleus.File{{Path: "b"}} },
		"another path beside":  func(a *nucleus.Action) { a.Files = append(a.Files, nucleus.File{Path: "b"}) },
		"other arguments":      func(a *nucleus.Action) { a.Args = "" },
		"a command beside it":  func(a *nucleus.Action) { a.Command = &nucleus.Command{Argv: []string{"sh"}} },
		"text that is no text": func(a *nucleus.Action) { a.Files = []nucleus.File{{Path: "\xff"}} },
	} {
		changed := readAction("a")
		change(&changed)
		l.refused(name, Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}, &changed, "another action")
	}
	permit := l.permit(action)
	l.refused("the call names another operation", Call{Op: nucleus.RunBash, Permit: l.sign(permit)}, &action, "the call is")

	good := Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}
	if _, e := l.p.admit(good, &action, nil); e != nil {
		t.Fatalf("control: %+v", e)
	}
	l.refused("again", good, &action, "used before")
}

// The proxy's own decision counts where it is stricter than the permit's.
func TestDecidesAgain(t *testing.T) {
	l := newLock(t)
	for name, action := range map[string]nucleus.Action{
		"blocked path":       readAction(".env"),
		"outside":            readAction("../a"),
		"never":              {Op: nucleus.GlobSearch, Files: []nucleus.File{{Path: "."}}},
		"asks":               writeAction("a"),
		"nothing to look at": {Op: nucleus.ReadFiles},
	} {
		permit := l.permit(action)
		permit.Verdict = nucleus.Allow
		l.refused(name, Call{Op: action.Op, Permit: l.sign(permit)}, &action, "its own decision is")
	}
	if l.p.served.exposure != 0 {
		t.Errorf("what was refused took %v", l.p.served.exposure.Names())
	}
}

// A permit that allows nothing permits nothing, whatever the proxy thinks itself.
func TestVerdictOfPermit(t *testing.T) {
	l := newLock(t)
	for _, action := range []nucleus.Action{readAction("a"), readAction(".env"), writeAction("a")} {
		for _, verdict := range []nucleus.Verdict{nucleus.Deny, "", "ALLOW", "maybe"} {
			permit := l.permit(action)
			permit.Verdict = verdict
			l.refused(string(action.Op)+" "+action.Files[0].Path+" under "+string(verdict), Call{Op: action.Op, Permit: l.sign(permit)}, &action, "refuses")
		}
	}
}

// The exposure of a permit is joined with what this proxy has served itself: a node
// that forgets does not make the machine forget.
func TestExposureJoined(t *testing.T) {
	l := newLock(t)
	fetch := nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", URL: "https://example.org/", Host: "example.org", Port: 443, Path: "/"}}
	permit := l.permit(fetch)
	if permit.Verdict != nucleus.Allow {
		t.Fatalf("control: %s", permit.Verdict)
	}
	l.p.served.exposure = nucleus.Private | nucleus.Untrusted
	l.refused("forgotten exposure", Call{Op: nucleus.WebFetch, Permit: l.sign(permit)}, &fetch, "its own decision is ask")

	l = newLock(t)
	action := readAction("a")
	if _, e := l.p.admit(Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}, &action, nil); e != nil {
		t.Fatalf("%+v", e)
	}
	if l.p.served.exposure != nucleus.Private {
		t.Errorf("served %v, want private", l.p.served.exposure.Names())
	}
}

// An ask is good with its grant alone: for this ask, by one of the approvers of the boot.
func TestGrant(t *testing.T) {
	l := newLock(t)
	action := writeAction("a")
	call := func(change func(p *nucleus.Permit, shown **nucleus.AskRequest, a *nucleus.AskRequest)) (Call, *nucleus.AskRequest) {
		permit := l.permit(action)
		ask := l.ask(permit, action)
		permit.Grants = []string{l.token(ask)}
		shown := &ask
		if change != nil {
			change(&permit, &shown, &ask)
		}
		return Call{Op: action.Op, Permit: l.sign(permit)}, shown
	}
	stranger := newLock(t)
	for name, change := range map[string]func(*nucleus.Permit, **nucleus.AskRequest, *nucleus.AskRequest){
		"no grant":     func(p *nucleus.Permit, _ **nucleus.AskRequest, _ *nucleus.AskRequest) { p.Grants = nil },
		"no ask":       func(_ *nucleus.Permit, shown **nucleus.AskRequest, _ *nucleus.AskRequest) { *shown = nil },
		"an empty one": func(p *nucleus.Permit, _ **nucleus.AskRequest, _ *nucleus.AskRequest) { p.Grants = []string{""} },
		"a stranger's": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			p.Grants = []string{stranger.token(*a)}
		},
		"of another ask": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			other := *a
			other.ID = "a-other"
			p.Grants = []string{l.token(other)}
		},
		"of another nonce":     func(_ *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) { a.Nonce = "n-other" },
		"shown another reason": func(_ *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) { a.Why = "something else" },
		"another digest": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			other := writeAction("b")
			*a = l.ask(l.permit(other), other)
			p.Grants = []string{l.token(*a)}
		},
		"another boot": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			a.Boot = "b-0"
			p.Grants = []string{l.token(*a)}
		},
		"another pod": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			a.Pod = "p-0"
			p.Grants = []string{l.token(*a)}
		},
		"another session": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			a.Session = "s-0"
			p.Grants = []string{l.token(*a)}
		},
		"another policy": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			a.Policy = nucleus.SHA256(nil)
			p.Grants = []string{l.token(*a)}
		},
		"another operation": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			a.Action = readAction("a")
			p.Grants = []string{l.token(*a)}
		},
		"out of time": func(p *nucleus.Permit, _ **nucleus.AskRequest, a *nucleus.AskRequest) {
			a.Created, a.Expires = p.Issued.UnixMilli-60_000, p.Issued.UnixMilli-1
			p.Grants = []string{l.token(*a)}
		},
	} {
		c, shown := call(change)
		l.refusedAsk(name, c, &action, shown, "the machine refuses")
	}
	c, shown := call(nil)
	if _, e := l.p.admit(c, &action, shown); e != nil {
		t.Errorf("control: %+v", e)
	}
}

// A grant is good for one effect in the machine too: a node that uses one twice is refused.
func TestGrantOnce(t *testing.T) {
	l := newLock(t)
	action := writeAction("a")
	first := l.permit(action)
	ask := l.ask(first, action)
	first.Grants = []string{l.token(ask)}
	if _, e := l.p.admit(Call{Op: action.Op, Permit: l.sign(first)}, &action, &ask); e != nil {
		t.Fatalf("control: %+v", e)
	}
	second := first
	second.ID, second.Seq = "r-second", first.Seq+1
	l.refusedAsk("the same grant", Call{Op: action.Op, Permit: l.sign(second)}, &action, &ask, "grant")
}

// What more approvers have to grant has as many tokens, each of another key.
func TestQuorum(t *testing.T) {
	for _, need := range []int{1, 2, 16} {
		l := newLock(t)
		var err error
		l.p.policy, err = policy.Load("p", fmt.Appendf(nil, `{"operations":{"write_files":"ask"},"obligations":{"write_files":{"approvals":%d}}}`, need))
		if err != nil {
			t.Fatal(err)
		}
		bobKey, bobSecret := newKey(t)
		_, eveSecret := newKey(t)
		bob, eve := tester{"bob", mustSecret(t, bobSecret)}, tester{"eve", mustSecret(t, eveSecret)}
		l.p.boot.Approvers = append(l.p.boot.Approvers, nucleus.Approver{Name: "bob", Kind: nucleus.ApproverEd25519, Key: bobKey},
			nucleus.Approver{Name: "twin", Kind: nucleus.ApproverEd25519, Key: bobKey})
		ann := tester{"person", l.approver}
		twin := tester{"twin", bob.key}
		self := tester{"self", mustSecret(t, l.p.key)}
		l.p.boot.Approvers = append(l.p.boot.Approvers, nucleus.Approver{Name: "self", Kind: nucleus.ApproverEd25519, Key: l.p.key.Public().(ed25519.PublicKey)})
		for _, c := range []struct {
			what   string
			needs  int // of the ask
			by     []tester
			text   string // by what it is refused; "" where one approval is enough
			reason string // where two are needed
		}{
			{"none", need, nil, "holds none", "holds none"},
			{"one", need, []tester{ann}, "", "1 approvers granted, the ask needs 2"},
			{"one of an ask for one", 1, []tester{ann}, "", "2 approvals are needed, the ask was for 1"},
			{"two", need, []tester{ann, bob}, "2 approvers granted, the ask needs 1", ""},
			{"two of an ask for two", 2, []tester{ann, bob}, "", ""},
			{"one twice", 2, []tester{ann, ann}, "approver person counts once", "approver person counts once"},
			{"one by two names", 2, []tester{bob, twin}, "not an approver", "not an approver"},
			{"a stranger", 2, []tester{ann, eve}, "not an approver", "not an approver"},
			{"the machine itself", 2, []tester{ann, self}, "not an approver", "not an approver"},
		} {
			action := writeAction("a")
			permit := l.permit(action)
			ask := l.ask(permit, action)
			ask.Approvals = c.needs
			for _, by := range c.by {
				permit.Grants = append(permit.Grants, l.tokenBy(by, ask))
			}
			_, e := l.p.admit(Call{Op: action.Op, Permit: l.sign(permit)}, &action, &ask)
			text := map[int]string{1: c.text, 2: c.reason, 16: "the machine refuses"}[need]
			if text == "" && e != nil || text != "" && (e == nil || !strings.Contains(e.Message, text)) {
				t.Errorf("%d approvals, %s: %+v, want %q", need, c.what, e, text)
			}
		}
	}
}

func mustSecret(t testing.TB, key ed25519.PrivateKey) paseto.V4AsymmetricSecretKey {
	t.Helper()
	secret, err := paseto.NewV4AsymmetricSecretKeyFromEd25519(key)
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

// A task is used as often as its approver said, for what was shown, while the machine itself has not
// served more; by this boot alone.
func TestTask(t *testing.T) {
	below := func(root string) func(*nucleus.Task) {
		return func(k *nucleus.Task) { k.Match.Files.Root = root }
	}
	for what, c := range map[string]struct {
		change func(*nucleus.Task)
		paths  []string // that are written with it, in order
		read   bool     // something private, before the last one
		later  time.Duration
		text   string // by what the last one is refused
	}{
		"as often as it says":       {below("."), []string{"a", "b", "c"}, false, 0, ""},
		"once more":                 {below("."), []string{"a", "b", "c", "d"}, false, 0, "was used 3 times"},
		"something else":            {below("src"), []string{"src/a", "b"}, false, 0, "the task is not for this"},
		"something else at first":   {below("src"), []string{"b"}, false, 0, "not for what was asked"},
		"after its time":            {below("."), []string{"a", "b"}, false, 31 * time.Minute, "ended"},
		"when more was served":      {below("."), []string{"a", "b"}, true, 0, "has taken less"},
		"of more uses than allowed": {func(k *nucleus.Task) { k.Uses = 21 }, []string{"a"}, false, 0, "21 uses"},
		"of a longer time":          {func(k *nucleus.Task) { k.Until += 3_600_000 }, []string{"a"}, false, 0, "at most an hour"},
		"of more exposure":          {func(k *nucleus.Task) { k.Exposure = nucleus.Private | nucleus.Untrusted }, []string{"a"}, false, 0, "the ask tells of"},
	} {
		l := newLock(t)
		var err error
		if l.p.policy, err = policy.Load("p", []byte(`{"operations":{"write_files":"ask","read_files":"always"},"paths":{"roots":"any"}}`)); err != nil {
			t.Fatal(err)
		}
		action := writeAction(c.paths[0])
		permit := l.permit(action)
		ask := l.ask(permit, action)
		match, err := approval.Narrowest(ask)
		if err != nil {
			t.Fatal(err)
		}
		task := nucleus.Task{Uses: 3, Until: permit.Issued.UnixMilli + 1_800_000, Exposure: approval.Told(ask), Match: match}
		c.change(&task)
		token := l.taskToken(tester{"person", l.approver}, ask, &task)
		var e *nucleus.Error
		for i, path := range c.paths {
			action := writeAction(path)
			if i > 0 {
				if i == len(c.paths)-1 {
					if c.read {
						reading := readAction("secret")
						if _, e := l.p.admit(Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(reading))}, &reading, nil); e != nil {
							t.Fatal(e)
						}
					}
					l.wall += c.later
				}
				permit = l.permit(action)
			}
			permit.Grants = []string{token}
			if _, e = l.p.admit(Call{Op: action.Op, Permit: l.sign(permit)}, &action, &ask); e != nil && i < len(c.paths)-1 {
				t.Fatalf("%s: %s: %v", what, path, e)
			}
		}
		if c.text == "" && e != nil || c.text != "" && (e == nil || !strings.Contains(e.Message, c.text)) {
			t.Errorf("%s: %+v, want %q", what, e, c.text)
		}
		if c.text != "" {
			continue
		}
		// Another boot of the machine knows nothing of it, and what was granted is not for it.
		for boot, text := range map[string]string{"b-1": "", "b-2": "it is for boot"} {
			other := newLock(t)
			other.p.boot.Approvers, other.p.policy, other.p.boot.Boot = l.p.boot.Approvers, l.p.policy, boot
			permit := other.permit(action)
			permit.Boot, permit.Grants, permit.Digest, permit.Salt = boot, []string{token}, ask.Digest, ask.Salt
			moved := ask
			moved.Boot = boot
			_, e := other.p.admit(Call{Op: action.Op, Permit: other.sign(permit)}, &action, &moved)
			if text == "" && e != nil || text != "" && (e == nil || !strings.Contains(e.Message, text)) {
				t.Errorf("boot %s: %+v, want %q", boot, e, text)
			}
		}
	}
}

// A sequence number is accepted once, in whatever order numbers come; an epoch that
// has passed does not come back.
func TestSequence(t *testing.T) {
	s := servedState{seqs: map[uint64]bool{}}
	const first, second = uint64(1) << 40, uint64(2) << 40
	for _, seq := range []uint64{first + 1, first + 3, first + 2, first + 4000} {
		if !s.fresh(seq) {
			t.Errorf("%d is refused", seq-first)
		}
		if s.fresh(seq) {
			t.Errorf("%d is accepted twice", seq-first)
		}
	}
	if s.fresh(0) {
		t.Error("0 is accepted")
	}
	for i := uint64(5000); i < 30_000; i++ {
		s.fresh(first + i)
	}
	if len(s.seqs) > 3*4096 {
		t.Errorf("%d numbers are remembered", len(s.seqs))
	}
	for _, seq := range []uint64{first + 1, first + 5000, first + 10_000, first + 29_999} {
		if s.fresh(seq) {
			t.Errorf("%d comes back", seq-first)
		}
	}
	if !s.fresh(second + 1) {
		t.Error("the next epoch is refused")
	}
	if s.fresh(first + 40_000) {
		t.Error("an epoch that has passed comes back")
	}
}

// One permit from many sides at once is admitted once.
func TestPermitOnceConcurrently(t *testing.T) {
	l := newLock(t)
	action := readAction("a")
	call := Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}
	var admitted atomic.Int32
	var calls sync.WaitGroup
	for range 16 {
		calls.Go(func() {
			if _, e := l.p.admit(call, &action, nil); e == nil {
				admitted.Add(1)
			}
		})
	}
	calls.Wait()
	if admitted.Load() != 1 {
		t.Errorf("admitted %d times", admitted.Load())
	}
}

// An outcome is signed whatever its message holds.
func TestOutcomeIsSigned(t *testing.T) {
	l := newLock(t)
	for _, message := range []string{"", "failed", strings.Repeat("x", 5000)} {
		r := l.p.outcome(l.permit(readAction("a")), CallResult{Error: nucleus.Errorf(nucleus.KindFailed, "%s", message)}, nucleus.OutcomeFailed, 0, time.Now())
		var o nucleus.Outcome
		if r.Outcome == nil {
			t.Errorf("%.20q: not signed", message)
		} else if err := r.Outcome.Open(l.p.key.Public().(ed25519.PublicKey), nucleus.DomainOutcome, &o); err != nil || len(o.Message) > 600 {
			t.Errorf("%.20q: %+v, %v", message, o, err)
		}
	}
}

// A message is cut between characters: half of one would not be text, and nothing could be signed.
func TestOutcomeIsSignedInAnyLanguage(t *testing.T) {
	l := newLock(t)
	for n := range 4 {
		message := strings.Repeat("x", n) + strings.Repeat("\u8a9e", 400)
		if r := l.p.outcome(l.permit(readAction("a")), CallResult{Error: nucleus.Errorf(nucleus.KindFailed, "%s", message)}, nucleus.OutcomeFailed, 0, time.Now()); r.Outcome == nil {
			t.Errorf("after %d letters: not signed", n)
		}
	}
}

const placePolicy = `{"operations":{"read_files":"always","web_fetch":"ask"},"paths":{"roots":"any"},"hosts":{"only":[{"host":"example.org","port":443},{"host":"example.org","port":8443},{"host":"other.example","port":443}]}}`

// A grant for a place opens it here too: for every request there, for its time, and while
// this proxy has served no more than the person was told.
func TestPassage(t *testing.T) {
	fetch := func(host string, port int, path string) nucleus.Action {
		return nucleus.Action{Op: nucleus.WebFetch, Args: nucleus.SHA256([]byte(path)), Fetch: &nucleus.Fetch{Method: "GET", URL: "https://" + host + path, Host: host, Port: port, Path: path}}
	}
	type state struct {
		*lock
		ask   nucleus.AskRequest
		token string
	}
	open := func() *state {
		t.Helper()
		l := newLock(t)
		l.p.boot.Policy = json.RawMessage(placePolicy)
		if err := l.p.adopt(); err != nil {
			t.Fatal(err)
		}
		action := fetch("example.org", 443, "/a")
		permit := l.permit(action)
		ask := l.ask(permit, action)
		ask.Passage = &nucleus.Passage{Host: "example.org", Port: 443, Exposure: nucleus.WayOut, Millis: approval.MaxPassage}
		return &state{l, ask, l.token(ask)}
	}
	call := func(s *state, action nucleus.Action) Call {
		permit := s.permit(action)
		permit.Verdict, permit.Grants = nucleus.Ask, []string{s.token}
		return Call{Op: action.Op, Permit: s.sign(permit)}
	}
	admitted := func(what string, s *state, action nucleus.Action) {
		t.Helper()
		if _, e := s.p.admit(call(s, action), &action, &s.ask); e != nil {
			t.Errorf("%s: %+v", what, e)
		}
	}
	refused := func(what string, s *state, action nucleus.Action, text string) {
		t.Helper()
		s.refusedAsk(what, call(s, action), &action, &s.ask, text)
	}

	s := open()
	for _, path := range []string{"/a", "/b", "/c?d=e"} {
		admitted(path, s, fetch("example.org", 443, path))
	}
	refused("another port", s, fetch("example.org", 8443, "/a"), "leads to")
	refused("another host", s, fetch("other.example", 443, "/a"), "leads to")
	if got := s.p.served.exposure; got != nucleus.Untrusted|nucleus.WayOut || s.p.served.through != got {
		t.Errorf("exposure %v, through passages %v", got.Names(), s.p.served.through.Names())
	}
	// What was fetched through it does not end it; a private file does.
	admitted("before the file", s, fetch("example.org", 443, "/a"))
	read := readAction("a")
	if _, e := s.p.admit(Call{Op: read.Op, Permit: s.sign(s.permit(read))}, &read, nil); e != nil {
		t.Fatal(e)
	}
	refused("after a private file", s, fetch("example.org", 443, "/a"), "taken less")

	s = open()
	admitted("at first", s, fetch("example.org", 443, "/a"))
	pass := func(d time.Duration) { s.passed, s.wall = s.passed+d, s.wall+d }
	pass(59 * time.Minute)
	admitted("after 59 minutes", s, fetch("example.org", 443, "/a"))
	pass(time.Minute)
	refused("after an hour", s, fetch("example.org", 443, "/a"), "ended")

	// The first use wants a grant that holds, for a passage that makes sense, to where
	// the request goes.
	refused("first to another host", open(), fetch("other.example", 443, "/a"), "leads to")
	for what, change := range map[string]func(*nucleus.AskRequest){
		"for ever":       func(a *nucleus.AskRequest) { a.Passage.Millis = approval.MaxPassage + 1 },
		"to another":     func(a *nucleus.AskRequest) { a.Passage.Host = "other.example" },
		"of another pod": func(a *nucleus.AskRequest) { a.Pod = "p-2" },
		"of a boot":      func(a *nucleus.AskRequest) { a.Boot = "b-2" },
	} {
		s := open()
		passage := *s.ask.Passage
		s.ask.Passage = &passage
		change(&s.ask)
		refused(what+", changed by the node", s, fetch("example.org", 443, "/a"), "the machine refuses")
		s.token = s.lock.token(s.ask)
		refused(what+", granted so", s, fetch("example.org", 443, "/a"), "the machine refuses")
	}
	s = open()
	pass(time.Minute) // as long as an ask lives here
	refused("used too late", s, fetch("example.org", 443, "/a"), "grant")
}

// The second lock judges the budget by what the permit says is spent.
func TestSpentBudgetIsRefused(t *testing.T) {
	l := newLock(t)
	l.p.boot.Policy = json.RawMessage(`{"operations":{"read_files":"always"},"budget":{"tokens":100}}`)
	if err := l.p.adopt(); err != nil {
		t.Fatal(err)
	}
	action := readAction("a")
	for spent, refused := range map[int64]bool{99: false, 100: true} {
		permit := l.permit(action)
		permit.Context.Spent.Tokens = spent
		_, refusal := l.p.admit(Call{Op: nucleus.ReadFiles, Permit: l.sign(permit)}, &action, nil)
		if (refusal != nil) != refused || refused && (refusal.Rule != "budget.tokens" || !strings.Contains(refusal.Message, "100 of 100 tokens")) {
			t.Errorf("%d tokens of 100 are spent: %v", spent, refusal)
		}
	}
}

// The second lock holds the policy of a pod that is asked for against its own, whatever the
// node has derived.
func TestDelegationIsHeldAgainstTheOwnPolicy(t *testing.T) {
	l := newLock(t)
	l.p.boot.Policy = json.RawMessage(`{"operations":{"read_files":"always","spawn_agent":"always"}}`)
	if err := l.p.adopt(); err != nil {
		t.Fatal(err)
	}
	for asked, refused := range map[string]bool{
		`{"operations":{"read_files":"always"}}`: false, `{"operations":{"read_files":"always","write_files":"ask"}}`: true, `{"operations":{},"hosts":"any"}`: true,
	} {
		action := nucleus.Action{Op: nucleus.SpawnAgent, Args: nucleus.SHA256(nil), Sub: &nucleus.Sub{Do: nucleus.SubSpawn, Task: "t", Policy: json.RawMessage(asked)}}
		_, refusal := l.p.admit(Call{Op: nucleus.SpawnAgent, Permit: l.sign(l.permit(action))}, &action, nil)
		if (refusal != nil) != refused || refused && refusal.Rule != "delegation" {
			t.Errorf("%s: %v", asked, refusal)
		}
	}
}

// An ask is looked at when its grants are; on a task that is open it says nothing more: a read
// counts beside passages whatever it claims.
func TestOpenTaskBelievesNoAsk(t *testing.T) {
	l := newLock(t)
	l.p.boot.Policy = json.RawMessage(`{"operations":{"read_files":"ask"},"paths":{"roots":"any"}}`)
	if err := l.p.adopt(); err != nil {
		t.Fatal(err)
	}
	action := readAction("src/a")
	permit := l.permit(action)
	ask := l.ask(permit, action)
	match, err := approval.Narrowest(ask)
	if err != nil {
		t.Fatal(err)
	}
	match.Files.Root = "src"
	token := l.taskToken(tester{"person", l.approver}, ask, &nucleus.Task{Uses: 3, Until: permit.Issued.UnixMilli + 1_800_000, Exposure: approval.Told(ask), Match: match})
	admit := func(name string, ask nucleus.AskRequest) {
		t.Helper()
		action := readAction(name)
		permit := l.permit(action)
		permit.Grants = []string{token}
		if name == "src/a" {
			permit.Digest, permit.Salt = ask.Digest, ask.Salt
		}
		if _, e := l.p.admit(Call{Op: action.Op, Permit: l.sign(permit)}, &action, &ask); e != nil {
			t.Fatal(e)
		}
		if l.p.served.through != 0 || l.p.served.exposure != nucleus.Private {
			t.Errorf("%s: it took %v, %v of it through passages", name, l.p.served.exposure.Names(), l.p.served.through.Names())
		}
	}
	admit("src/a", ask)
	l.p.served.exposure = 0
	lie := ask
	lie.Passage = &nucleus.Passage{Host: "x", Port: 1, Millis: 1}
	admit("src/b", lie)
}

// A grant that has expired by what the machine knows of the time is not good again because the
// node says that it is earlier; a clock that is corrected a little harms nobody.
func TestTimeDoesNotGoBack(t *testing.T) {
	for name, c := range map[string]struct {
		later, back time.Duration
		refused     bool
	}{
		"in time": {10 * time.Second, 0, false}, "corrected": {10 * time.Second, 4 * time.Minute, false}, "expired": {3 * time.Hour, 0, true},
		"expired, and set back": {3 * time.Hour, 3 * time.Hour, true},
	} {
		l := newLock(t)
		action := writeAction("a")
		permit := l.permit(action)
		ask := l.ask(permit, action) // lives a minute
		token := l.token(ask)
		l.passed += c.later
		l.wall += c.later
		other := readAction("x")
		if _, e := l.p.admit(Call{Op: other.Op, Permit: l.sign(l.permit(other))}, &other, nil); e != nil {
			t.Fatal(name, e)
		}
		l.wall -= c.back
		permit = l.permit(action)
		permit.Grants, permit.Digest, permit.Salt = []string{token}, ask.Digest, ask.Salt
		_, e := l.p.admit(Call{Op: action.Op, Permit: l.sign(permit)}, &action, &ask)
		switch {
		case name == "corrected": // the ask is from the future then, as far as the node says
			if e == nil || !strings.Contains(e.Message, "valid in") {
				t.Errorf("%s: %v", name, e)
			}
		case (e != nil) != c.refused:
			t.Errorf("%s: %v", name, e)
		case c.back > 0 && !strings.Contains(e.Message, "expired") || c.back > 0 && !strings.Contains(e.Message, "set back by 3h"):
			t.Errorf("%s: %v", name, e)
		}
	}
}
