package guest

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

// handed is what reached the tools worker.
type handed struct {
	mu    sync.Mutex
	calls [][][]byte // header, action, arguments
}

func (h *handed) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.calls)
}

// withWorker gives the lock's proxy a worker that answers with reply.
func (l *lock) withWorker(reply func(parts [][]byte) []byte) *handed {
	l.t.Helper()
	ours, theirs := sessions(l.t)
	h := &handed{}
	theirs.Handle(func(_ context.Context, request []byte) []byte {
		parts, err := tools.Split(request, 3)
		if err != nil {
			l.t.Error(err)
			return nil
		}
		h.mu.Lock()
		h.calls = append(h.calls, parts)
		h.mu.Unlock()
		return reply(parts)
	})
	l.p.worker = ours
	return h
}

// brief is one brief call of the node.
func (l *lock) brief(call Call, action, args []byte) (CallResult, []byte) {
	l.t.Helper()
	head, err := json.Marshal(call)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.answer(tools.Join(head, action, args))
}

func (l *lock) answer(request []byte) (CallResult, []byte) {
	l.t.Helper()
	parts, err := tools.Split(l.p.brief(deadline(l.t), request), 2)
	if err != nil {
		l.t.Fatal(err)
	}
	var result CallResult
	if err := nucleus.Strict(parts[0], &result); err != nil {
		l.t.Fatal(err)
	}
	return result, parts[1]
}

func (l *lock) outcomeOf(result CallResult) nucleus.Outcome {
	l.t.Helper()
	var outcome nucleus.Outcome
	if result.Outcome == nil {
		l.t.Fatalf("no outcome: %+v", result)
	}
	if err := result.Outcome.Open(publicOf(l.p), nucleus.DomainOutcome, &outcome); err != nil {
		l.t.Fatal(err)
	}
	return outcome
}

// A brief call passes the same second lock as a stream: without a good permit nothing
// reaches the worker, and the refusal is signed.
func TestBriefCallIsLocked(t *testing.T) {
	l := newLock(t)
	const value = `{"content":"x"}`
	worker := l.withWorker(func([][]byte) []byte { return tools.Join([]byte(`{}`), []byte(value)) })
	action := readAction("a")
	raw, err := nucleus.Canonical(action)
	if err != nil {
		t.Fatal(err)
	}
	other, err := nucleus.Canonical(readAction("b"))
	if err != nil {
		t.Fatal(err)
	}
	expired := l.permit(action)
	expired.Life = -1
	permit := l.permit(action)
	good := Call{Op: nucleus.ReadFiles, Permit: l.sign(permit)}
	for name, c := range map[string]struct {
		call   Call
		action []byte
		text   string
	}{
		"no permit":                    {Call{Op: nucleus.ReadFiles}, raw, "no permit"},
		"no action":                    {good, nil, "action:"},
		"another action":               {good, other, "another action"},
		"an action with more":          {good, []byte(`{"everything":true,` + string(raw[1:])), "action:"},
		"an action twice":              {good, append(raw[:len(raw):len(raw)], raw...), "action:"},
		"another operation":            {Call{Op: nucleus.RunBash, Permit: good.Permit}, raw, "the call is"},
		"expired":                      {Call{Op: nucleus.ReadFiles, Permit: l.sign(expired)}, raw, "ms old, at most"},
		"a permit that nobody signed":  {Call{Op: nucleus.ReadFiles, Permit: &nucleus.Signed{Payload: good.Permit.Payload}}, raw, "signature"},
		"a permit for what is blocked": {Call{Op: nucleus.ReadFiles, Permit: l.sign(l.allowed(readAction(".env")))}, mustCanonical(t, readAction(".env")), "its own decision is"},
	} {
		result, got := l.brief(c.call, c.action, []byte(`{"path":"a"}`))
		if result.Error == nil || !strings.Contains(result.Error.Message, c.text) || len(got) > 0 {
			t.Errorf("%s: %+v, value %q, want an error with %q", name, result.Error, got, c.text)
		}
		if result.Outcome != nil && l.outcomeOf(result).Status != nucleus.OutcomeRefused {
			t.Errorf("%s: outcome %+v", name, l.outcomeOf(result))
		}
	}
	for name, request := range map[string][]byte{"empty": nil, "no parts": []byte("hello"), "no header": tools.Join(nil, raw, nil), "a header with more": tools.Join([]byte(`{"op":"read_files","root":true}`), raw, nil)} {
		if result, _ := l.answer(request); result.Error == nil || result.Error.Kind != nucleus.KindInvalid {
			t.Errorf("%s: %+v", name, result.Error)
		}
	}
	if n := worker.count(); n != 0 {
		t.Fatalf("%d calls reached the worker without a good permit", n)
	}

	result, got := l.brief(good, raw, []byte(`{"path":"a"}`))
	if result.Error != nil || string(got) != value || worker.count() != 1 {
		t.Fatalf("control: %+v, value %q, %d calls", result.Error, got, worker.count())
	}
	outcome := l.outcomeOf(result)
	if outcome.Status != nucleus.OutcomeDone || outcome.Result != nucleus.SHA256(append(permit.Salt, value...)) || outcome.Bytes != int64(len(value)) {
		t.Errorf("outcome %+v", outcome)
	}
	if parts := worker.calls[0]; string(parts[1]) != string(raw) || string(parts[2]) != `{"path":"a"}` || strings.Contains(string(parts[0]), "permit") {
		t.Errorf("the worker was handed %q", parts)
	}
	if again, _ := l.brief(good, raw, []byte(`{"path":"a"}`)); again.Error == nil || !strings.Contains(again.Error.Message, "used before") || worker.count() != 1 {
		t.Errorf("again: %+v, %d calls", again.Error, worker.count())
	}
}

// What the worker says is told as it is; what it cannot say is unknown, and the same is
// signed.
func TestBriefOutcome(t *testing.T) {
	for name, c := range map[string]struct {
		reply  string
		status string
	}{
		"failed":              {string(tools.Join([]byte(`{"error":{"kind":"not_found","message":"m"}}`), nil)), nucleus.OutcomeFailed},
		"no reply of its own": {"", nucleus.OutcomeUnknown},
		"no header":           {string(tools.Join([]byte("x"), []byte(`{}`))), nucleus.OutcomeUnknown},
	} {
		l := newLock(t)
		l.withWorker(func([][]byte) []byte { return []byte(c.reply) })
		action := readAction("a")
		result, value := l.brief(Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}, mustCanonical(t, action), []byte(`{"path":"a"}`))
		if outcome := l.outcomeOf(result); outcome.Status != c.status || result.Error == nil || len(value) > 0 {
			t.Errorf("%s: outcome %+v, error %+v, value %q", name, outcome, result.Error, value)
		}
	}
}

// Resolving needs no permit and takes none: nothing is signed, nothing is spent.
func TestBriefResolve(t *testing.T) {
	l := newLock(t)
	action := readAction("a")
	worker := l.withWorker(func(parts [][]byte) []byte {
		if len(parts[1]) > 0 {
			t.Errorf("resolving was handed the action %q", parts[1])
		}
		return tools.Join([]byte(`{"action":`+string(mustCanonical(t, action))+`}`), nil)
	})
	permit := l.sign(l.permit(action))
	result, _ := l.brief(Call{Op: nucleus.ReadFiles, Resolve: true, Permit: permit}, mustCanonical(t, action), []byte(`{"path":"a"}`))
	if result.Error != nil || result.Outcome != nil || result.Action == nil || result.Action.Files[0].Path != "a" || worker.count() != 1 {
		t.Errorf("got %+v, %d calls", result, worker.count())
	}
	if l.p.served.exposure != 0 || len(l.p.served.seqs) != 0 {
		t.Errorf("resolving took %v and spent %d permits", l.p.served.exposure.Names(), len(l.p.served.seqs))
	}
}

// quick connections keep what net.Conn promises, over a wire.
func TestQuickConn(t *testing.T) {
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	theirConn, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	a, err := newQuickConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	b, err := newQuickConn(theirConn.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	host, err := wire.Host(a)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := wire.Guest(b)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	guest.Handle(func(_ context.Context, request []byte) []byte { return make([]byte, 4<<20) })
	reply, err := host.Call(deadline(t), make([]byte, wire.MaxCall), 8<<20) // more than the sockets' buffers hold
	if err != nil || len(reply) != 4<<20 {
		t.Fatalf("%d bytes, %v", len(reply), err)
	}
	guest.Close()
	if _, err := host.Call(deadline(t), nil, 1); err == nil {
		t.Error("the other end is closed, and a call succeeds")
	}
}

func publicOf(p *Proxy) ed25519.PublicKey { return p.key.Public().(ed25519.PublicKey) }

func mustCanonical(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := nucleus.Canonical(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// allowed is a permit of a node that allows what its policy does not.
func (l *lock) allowed(action nucleus.Action) nucleus.Permit {
	l.t.Helper()
	permit := l.permit(action)
	permit.Verdict = nucleus.Allow
	return permit
}

// What the machine signs cannot be redacted later.
func TestOutcomeWithoutSecrets(t *testing.T) {
	l := newLock(t)
	const token = "ghp_0123456789abcdefghijABCDEFGHIJ012345"
	for _, n := range []int{0, 490, 505} { // whole, and where the message is cut
		failed := nucleus.Errorf(nucleus.KindFailed, "%s no file %s, password=hunter2correct", strings.Repeat("x", n), token)
		result := l.p.outcome(l.permit(readAction("a")), CallResult{Error: failed}, nucleus.OutcomeFailed, 1, time.Now())
		outcome := l.outcomeOf(result)
		if strings.Contains(outcome.Message, token[:8]) || strings.Contains(outcome.Message, "hunter2") || outcome.Message == "" {
			t.Errorf("signed %q", outcome.Message)
		}
		if !strings.Contains(result.Error.Message, token) {
			t.Errorf("the caller is told %q", result.Error.Message)
		}
	}
}
