package authority

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

const (
	passphrase = "correct horse"
	phrase     = "blue lamp"
	lowWork    = 4
)

// clock is a hand-set clock.
type clock struct{ ms atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.ms.Store(1_700_000_000_000)
	return c
}

func (c *clock) now() time.Time          { return time.UnixMilli(c.ms.Load()) }
func (c *clock) advance(d time.Duration) { c.ms.Add(d.Milliseconds()) }

func hexOf(s string) string { return nucleus.SHA256([]byte(s)) }

// The tests' requests are signed with nucleus.Sign.
const domain = "test-request"

type testRequest struct {
	Requested
	Nonce string
}

func verifyTestRequest(ask nucleus.AskRequest, key ed25519.PublicKey) (got Requested, err error) {
	var signed nucleus.Signed
	if err := nucleus.Strict(ask.Request, &signed); err != nil {
		return got, err
	}
	var request testRequest
	err = signed.Open(key, domain, &request)
	return request.Requested, err
}

var requester = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))

func askAt(t testing.TB, c *clock, id string, change func(*nucleus.AskRequest)) nucleus.AskRequest {
	t.Helper()
	salt := nucleus.Salt{5}
	ask := nucleus.AskRequest{
		ID: id, Pod: "p-1", Workspace: "w", Session: "s-1", Boot: "b-1", Requester: "agent",
		Action: nucleus.Action{Op: nucleus.GitPush, Args: hexOf("args"), Push: &nucleus.Push{Repo: "app", Remote: "https://example.com/app.git", Ref: "refs/heads/main", Old: "0", New: "1"}},
		Salt:   salt[:], Policy: hexOf("policy"), Rule: "trifecta", Why: "because", Approvals: 1, Tier: "kernel", Mode: "mediated",
		Context: nucleus.Context{Exposure: nucleus.Private | nucleus.Untrusted, UnixMilli: c.ms.Load()},
		Created: c.ms.Load(), Expires: c.ms.Load() + 300_000, Nonce: "n-1",
	}
	if change != nil {
		change(&ask)
	}
	var err error
	if ask.Digest == "" {
		if ask.Digest, err = ask.Action.Digest(nucleus.Salt(ask.Salt)); err != nil {
			t.Fatal(err)
		}
	}
	if ask.Request == nil {
		signed, err := nucleus.Sign(requester, domain, testRequest{Requested{"p-1", nucleus.GitPush, hexOf("args")}, id})
		if err != nil {
			t.Fatal(err)
		}
		if ask.Request, err = nucleus.Canonical(signed); err != nil {
			t.Fatal(err)
		}
	}
	return ask
}

// bench is one authority that serves on a socket.
type bench struct {
	*Authority
	c      *clock
	cfg    Config
	socket string
	client *client.Client
	stop   func()
}

func newBench(t *testing.T, change func(*Config)) *bench {
	t.Helper()
	c := newClock()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "key"), WorkFactor: lowWork, Now: c.now, VerifyRequest: verifyTestRequest}
	if change != nil {
		change(&cfg)
	}
	if _, err := Init(cfg, "ann", phrase, passphrase); err != nil {
		t.Fatal(err)
	}
	return startBench(t, c, cfg)
}

func startBench(t *testing.T, c *clock, cfg Config) *bench {
	t.Helper()
	a, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{Authority: a, c: c, cfg: cfg, socket: filepath.Join(t.TempDir(), "run", "a.sock")}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- a.Serve(ctx, b.socket, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	b.client = client.New(b.socket)
	b.stop = sync.OnceFunc(func() {
		b.client.Close()
		cancel()
		if err := errors.Join(<-done, a.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(b.stop)
	if err := b.client.RegisterPod(t.Context(), "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) keys() []nucleus.Approver { return b.Approvers() }

func (b *bench) submit(t *testing.T, ask nucleus.AskRequest) client.Status {
	t.Helper()
	status, err := b.client.Submit(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// typed is what a person decides at a terminal. To approve takes the passphrase.
type typed struct {
	Approve    bool
	Approver   string
	AskDigest  string // of a denial
	Reason     string
	Passphrase string
	Task       *nucleus.Task
}

// decide does what the program at the terminal does.
func (b *bench) decide(t testing.TB, id string, d typed) (client.Status, error) {
	t.Helper()
	if !d.Approve {
		return b.client.Deny(t.Context(), id, client.Denial{Approver: d.Approver, AskDigest: d.AskDigest, Reason: d.Reason})
	}
	key, err := ReadKey(b.cfg.Dir, d.Approver)
	if err != nil {
		return client.Status{}, err
	}
	signer, err := key.Open(d.Passphrase)
	if err != nil {
		return client.Status{}, err
	}
	defer signer.Close()
	ask, _, err := b.client.Get(t.Context(), id)
	if err != nil {
		return client.Status{}, err
	}
	token, err := signer.Grant(ask, d.Task, d.Reason)
	if err != nil {
		return client.Status{}, err
	}
	return b.client.Grant(t.Context(), id, token)
}

// signer is the key of an approver in clear.
func (b *bench) signer(t testing.TB, approver, passphrase string) *Signer {
	t.Helper()
	key, err := ReadKey(b.cfg.Dir, approver)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := key.Open(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(signer.Close)
	return signer
}

// signed is a grant of ann's for an ask.
func (b *bench) signed(t testing.TB, ask nucleus.AskRequest) string {
	t.Helper()
	token, err := b.signer(t, "ann", passphrase).Grant(ask, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func kindOf(err error) nucleus.Kind {
	var e *nucleus.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return ""
}

func wantKind(t *testing.T, what string, err error, kind nucleus.Kind, text string) {
	t.Helper()
	if kindOf(err) != kind || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("%s: %q (%v), want %q with %q", what, kindOf(err), err, kind, text)
	}
}

// recorded returns the kinds of the entries in the database, in order.
func recorded(t *testing.T, dir string) []string {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "authority.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query("SELECT entry FROM record ORDER BY seq")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var kinds []string
	for rows.Next() {
		var raw string
		var entry nucleus.Entry
		if err := rows.Scan(&raw); err != nil {
			t.Fatal(err)
		}
		if err := nucleus.Strict([]byte(raw), &entry); err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, entry.Kind)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return kinds
}

func wantRecord(t *testing.T, dir string, want ...string) {
	t.Helper()
	if got := recorded(t, dir); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("recorded %v, want %v", got, want)
	}
}

// The node asks, the person denies or grants, the node reads a token that holds.
func TestAskAndDecide(t *testing.T) {
	b := newBench(t, nil)
	info, err := b.client.Info(t.Context())
	if err != nil || len(info.Approvers) != 1 || info.Approvers[0].Name != "ann" || info.Approvers[0].Kind != nucleus.ApproverEd25519 || !bytes.Equal(info.Approvers[0].Key, b.Approvers()[0].Key) || info.Approvals != client.SameUser {
		t.Fatalf("info %+v, %v", info, err)
	}
	one, two := askAt(t, b.c, "a-1", nil), askAt(t, b.c, "a-2", nil)
	status := b.submit(t, one)
	if again := b.submit(t, one); !reflect.DeepEqual(again, status) || status.State != client.Pending {
		t.Errorf("the same ask again: %+v, want %+v pending", again, status)
	}
	b.submit(t, two)
	items, err := b.client.List(t.Context(), client.Pending)
	if err != nil || len(items) != 2 || items[0].Summary != "git_push refs/heads/main to https://example.com/app.git" {
		t.Fatalf("list %+v, %v", items, err)
	}

	type result struct {
		status client.Status
		err    error
	}
	waited := make(chan result, 1)
	go func() {
		s, err := b.client.Wait(t.Context(), "a-1")
		waited <- result{s, err}
	}()
	got, digest, err := b.client.Get(t.Context(), "a-1")
	if err != nil || digest != status.AskDigest || got.Action.Push.Ref != "refs/heads/main" {
		t.Fatalf("get %+v %s, %v", got, digest, err)
	}
	granted, err := b.decide(t, "a-1", typed{Approve: true, AskDigest: digest, Reason: "fine <&>", Passphrase: passphrase})
	if err != nil || granted.State != client.Granted {
		t.Fatalf("decide %+v, %v", granted, err)
	}
	if r := <-waited; r.err != nil || !reflect.DeepEqual(r.status, granted) {
		t.Errorf("wait %+v, want %+v", r, granted)
	}
	grant, err := approval.Verify(granted.Grants[0].Token, one, b.keys(), b.c.ms.Load())
	if err != nil || grant.ID != granted.Grants[0].Grant || grant.Reason != "fine <&>" {
		t.Errorf("grant %+v, %v", grant, err)
	}
	if _, err := approval.Verify(granted.Grants[0].Token, two, b.keys(), b.c.ms.Load()); approval.ReasonOf(err) != approval.BadAsk {
		t.Errorf("the token for the other ask: %v", err)
	}

	denied, err := b.client.Deny(t.Context(), "a-2", client.Denial{AskDigest: items[1].AskDigest, Reason: "not today"})
	if err != nil || denied.State != client.Denied || len(denied.Grants) != 0 {
		t.Errorf("deny %+v, %v", denied, err)
	}
	if s, err := b.client.Wait(t.Context(), "a-2"); err != nil || s.Reason != "not today" {
		t.Errorf("wait %+v, %v", s, err)
	}
	for _, d := range []typed{{Approve: true, AskDigest: items[1].AskDigest, Passphrase: passphrase}, {AskDigest: items[1].AskDigest}} {
		_, err := b.decide(t, "a-2", d)
		wantKind(t, "a second decision", err, nucleus.KindConflict, "a-2 is denied")
	}

	use := client.Use{Permit: "r-1", Grants: []string{granted.Grants[0].Grant}}
	if used, err := b.client.Use(t.Context(), "a-1", use); err != nil || used != (client.Used{N: 1, Of: 1}) {
		t.Errorf("used %+v, %v", used, err)
	}
	for _, c := range []struct {
		what, ask string
		use       client.Use
		kind      nucleus.Kind
		text      string
	}{
		{"used again", "a-1", use, nucleus.KindRefused, "was used before"},
		{"with another's grant", "a-1", client.Use{Permit: "r-2", Grants: []string{"g-1"}}, nucleus.KindRefused, "was granted by"},
		{"with none", "a-1", client.Use{Permit: "r-2"}, nucleus.KindRefused, "was granted by"},
		{"of a denied ask", "a-2", use, nucleus.KindRefused, "is denied"},
		{"of none", "a-none", use, nucleus.KindNotFound, "a-none"},
		{"for no permit", "a-1", client.Use{Grants: use.Grants}, nucleus.KindInvalid, "permit"},
	} {
		_, err := b.client.Use(t.Context(), c.ask, c.use)
		wantKind(t, c.what, err, c.kind, c.text)
	}
	wantRecord(t, b.cfg.Dir, "approval.ask", "approval.ask", "approval.grant", "approval.deny", "approval.use", "approval.refuse", "approval.refuse", "approval.refuse", "approval.refuse")

	// What was decided is still so for the next daemon.
	b.stop()
	b = startBench(t, b.c, b.cfg)
	if s, err := b.client.Status(t.Context(), "a-1"); err != nil || !reflect.DeepEqual(s, granted) {
		t.Errorf("after a restart %+v, %v; want %+v", s, err, granted)
	}
}

func TestSubmitRefuses(t *testing.T) {
	b := newBench(t, nil)
	b.submit(t, askAt(t, b.c, "a-known", nil))
	other, err := nucleus.Sign(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, 32)), domain, testRequest{Requested{"p-1", nucleus.GitPush, hexOf("args")}, "n"})
	if err != nil {
		t.Fatal(err)
	}
	forged, _ := nucleus.Canonical(other)
	signed := func(r Requested) json.RawMessage {
		s, err := nucleus.Sign(requester, domain, testRequest{r, "n"})
		if err != nil {
			t.Fatal(err)
		}
		raw, _ := nucleus.Canonical(s)
		return raw
	}
	for name, c := range map[string]struct {
		id     string
		change func(*nucleus.AskRequest)
		kind   nucleus.Kind
		text   string
	}{
		"wrong digest":       {"a-1", func(q *nucleus.AskRequest) { q.Digest = hexOf("other") }, nucleus.KindInvalid, "action and salt give"},
		"expired":            {"a-2", func(q *nucleus.AskRequest) { q.Created -= 2000; q.Expires = q.Created + 1000 }, nucleus.KindInvalid, "expired 1000 ms ago"},
		"expires now":        {"a-3", func(q *nucleus.AskRequest) { q.Created -= 1000; q.Expires = q.Created + 1000 }, nucleus.KindInvalid, "expired 0 ms ago"},
		"an hour behind":     {"a-4", func(q *nucleus.AskRequest) { q.Created -= 3_600_000 }, nucleus.KindInvalid, "clocks apart"},
		"an hour ahead":      {"a-5", func(q *nucleus.AskRequest) { q.Created += 3_600_000; q.Expires += 3_600_000 }, nucleus.KindInvalid, "clocks apart"},
		"known, other why":   {"a-known", func(q *nucleus.AskRequest) { q.Why = "harmless" }, nucleus.KindConflict, "other content"},
		"other pod":          {"a-6", func(q *nucleus.AskRequest) { q.Pod = "p-2" }, nucleus.KindUnauthenticated, "not registered"},
		"other requester":    {"a-7", func(q *nucleus.AskRequest) { q.Requester = "node" }, nucleus.KindUnauthenticated, "no requester node"},
		"no request":         {"a-8", func(q *nucleus.AskRequest) { q.Request = json.RawMessage("{}") }, nucleus.KindUnauthenticated, "bad signature"},
		"signed by another":  {"a-9", func(q *nucleus.AskRequest) { q.Request = forged }, nucleus.KindUnauthenticated, "bad signature"},
		"another pod signed": {"a-10", func(q *nucleus.AskRequest) { q.Request = signed(Requested{"p-9", nucleus.GitPush, hexOf("args")}) }, nucleus.KindUnauthenticated, "has pod"},
		"another op signed":  {"a-11", func(q *nucleus.AskRequest) { q.Request = signed(Requested{"p-1", nucleus.CreatePR, hexOf("args")}) }, nucleus.KindUnauthenticated, "has operation"},
		"other args signed":  {"a-12", func(q *nucleus.AskRequest) { q.Request = signed(Requested{"p-1", nucleus.GitPush, hexOf("x")}) }, nucleus.KindUnauthenticated, "has arguments"},
		"asked before":       {"a-13b", func(q *nucleus.AskRequest) { q.Request = askAt(t, b.c, "a-known", nil).Request }, nucleus.KindUnauthenticated, "was asked for before, as a-known"},
		"not UTF-8":          {"a-13", func(q *nucleus.AskRequest) { q.Why = "\xff" }, "", "UTF-8"},
		"too long":           {"a-14", func(q *nucleus.AskRequest) { q.Why = strings.Repeat("x", approval.MaxAsk) }, "", "at most"},
	} {
		_, err := b.client.Submit(t.Context(), askAt(t, b.c, c.id, c.change))
		wantKind(t, name, err, c.kind, c.text)
		if _, err := b.client.Status(t.Context(), c.id); c.id != "a-known" && kindOf(err) != nucleus.KindNotFound {
			t.Errorf("%s: the refused ask is there: %v", name, err)
		}
	}
	b.submit(t, askAt(t, b.c, "a-15", nil)) // positive control

	b.cfg.VerifyRequest = nil
	b.Authority.cfg.VerifyRequest = nil
	_, err = b.client.Submit(t.Context(), askAt(t, b.c, "a-16", nil))
	wantKind(t, "nobody can verify", err, nucleus.KindUnavailable, "cannot check")
}

func TestRegisterPodOnce(t *testing.T) {
	b := newBench(t, nil)
	mine := map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}
	eve := map[string][]byte{"agent": bytes.Repeat([]byte{1}, 32)}
	more := map[string][]byte{"agent": mine["agent"], "eve": eve["agent"]}
	for name, keys := range map[string]map[string][]byte{"other key": eve, "one more key": more} {
		wantKind(t, name, b.client.RegisterPod(t.Context(), "p-1", keys), nucleus.KindConflict, "other requester keys")
	}
	for name, keys := range map[string]map[string][]byte{"none": {}, "short": {"a": {1}}, "odd id": {"a b": mine["agent"]}} {
		wantKind(t, name, b.client.RegisterPod(t.Context(), "p-2", keys), nucleus.KindInvalid, "p-2")
	}
	if err := b.client.RegisterPod(t.Context(), "p-1", mine); err != nil {
		t.Errorf("the same keys again: %v", err)
	}
}

func TestDecideRefuses(t *testing.T) {
	b := newBench(t, nil)
	ask := askAt(t, b.c, "a-1", nil)
	digest := b.submit(t, ask).AskDigest
	for name, c := range map[string]struct {
		d    typed
		kind nucleus.Kind
		text string
	}{
		"no passphrase":          {typed{Approve: true}, nucleus.KindForbidden, "no passphrase"},
		"wrong passphrase":       {typed{Approve: true, Passphrase: "correct horsf"}, nucleus.KindForbidden, "wrong passphrase"},
		"denial of other digest": {typed{AskDigest: hexOf("x")}, nucleus.KindConflict, "what was shown"},
		"denial of no digest":    {typed{}, nucleus.KindConflict, "what was shown"},
		"denial, long reason":    {typed{AskDigest: digest, Reason: strings.Repeat("x", approval.MaxReason+1)}, nucleus.KindInvalid, "reason"},
		"grant, long reason":     {typed{Approve: true, Passphrase: passphrase, Reason: strings.Repeat("x", approval.MaxReason+1)}, nucleus.KindInvalid, "reason"},
	} {
		_, err := b.decide(t, "a-1", c.d)
		wantKind(t, name, err, c.kind, c.text)
		if s, err := b.client.Status(t.Context(), "a-1"); err != nil || s.State != client.Pending || s.Tokens() != nil {
			t.Fatalf("%s: now %+v, %v", name, s, err)
		}
	}
	_, err := b.client.Deny(t.Context(), "a-none", client.Denial{AskDigest: digest})
	wantKind(t, "unknown ask", err, nucleus.KindNotFound, "a-none")
	if s, err := b.decide(t, "a-1", typed{Approve: true, AskDigest: digest, Passphrase: passphrase}); err != nil || s.State != client.Granted {
		t.Errorf("positive control: %+v, %v", s, err)
	}

	digest = b.submit(t, askAt(t, b.c, "a-late", nil)).AskDigest
	b.c.advance(5 * time.Minute)
	_, err = b.decide(t, "a-late", typed{Approve: true, AskDigest: digest, Passphrase: passphrase})
	wantKind(t, "expired", err, nucleus.KindConflict, "a-late is expired")
	if s, err := b.client.Wait(t.Context(), "a-late"); err != nil || s.State != client.Expired {
		t.Errorf("wait for the expired one: %+v, %v", s, err)
	}
}

// Who can read the sealed key can guess, and each guess costs what scrypt takes.
func TestGuessingIsDear(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "key")}
	if _, err := Init(cfg, "ann", phrase, passphrase); err != nil {
		t.Fatal(err)
	}
	key, err := ReadKey(cfg.Dir, "ann")
	if err != nil {
		t.Fatal(err)
	}
	if header, _, _ := strings.Cut(string(key.file.Sealed), "\n---"); !strings.HasPrefix(header, "age-encryption.org/v1\n-> scrypt ") || !strings.Contains(header, " 18\n") {
		t.Errorf("sealed with %q, want scrypt with 2^18", header)
	}
}

func TestWaitEndsAtExpiry(t *testing.T) {
	b := newBench(t, nil)
	b.submit(t, askAt(t, b.c, "a-1", func(q *nucleus.AskRequest) { q.Expires = q.Created + 20 }))
	advance := time.AfterFunc(5*time.Millisecond, func() { b.c.advance(time.Second) })
	defer advance.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if s, err := b.client.Wait(ctx, "a-1"); err != nil || s.State != client.Expired {
		t.Errorf("%+v, %v", s, err)
	}
	b.submit(t, askAt(t, b.c, "a-2", nil))
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if s, err := b.client.Wait(short, "a-2"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%+v, %v; want the deadline", s, err)
	}
	_, err := b.client.Wait(t.Context(), "a-none")
	wantKind(t, "unknown", err, nucleus.KindNotFound, "a-none")
}

// A log that cannot be written allows nothing.
type brokenLog struct{ kind string }

func (l brokenLog) Record(e nucleus.Entry) error {
	if e.Kind == l.kind {
		return errors.New("no space left on device")
	}
	return nil
}

func (l brokenLog) HasUse(string) (bool, error) { return false, nil }

func TestNoRecordNoDecision(t *testing.T) {
	for _, kind := range []string{nucleus.KindApprovalAsk, nucleus.KindApprovalGrant, nucleus.KindApprovalDeny, nucleus.KindApprovalUse} {
		b := newBench(t, func(c *Config) { c.Recorder = brokenLog{kind} })
		ask := askAt(t, b.c, "a-1", nil)
		_, err := b.client.Submit(t.Context(), ask)
		if kind == nucleus.KindApprovalAsk {
			wantKind(t, kind, err, nucleus.KindUnavailable, "no space left")
			if items, err := b.client.List(t.Context(), ""); err != nil || len(items) != 0 {
				t.Errorf("asks %v, %v", items, err)
			}
			continue
		}
		digest, _, _ := approval.Digest(ask)
		status, err := b.decide(t, "a-1", typed{Approve: kind != nucleus.KindApprovalDeny, AskDigest: digest, Passphrase: passphrase})
		if kind == nucleus.KindApprovalUse {
			if err != nil {
				t.Fatal(err)
			}
			_, err := b.client.Use(t.Context(), "a-1", client.Use{Permit: "r-1", Grants: []string{status.Grants[0].Grant}})
			wantKind(t, kind, err, nucleus.KindUnavailable, "no space left")
			continue
		}
		wantKind(t, kind, err, nucleus.KindUnavailable, "no space left")
		if s, err := b.client.Status(t.Context(), "a-1"); err != nil || s.State != client.Pending || s.Tokens() != nil {
			t.Errorf("%s: now %+v, %v; want pending", kind, s, err)
		}
	}
}

// Who connects decides what is heard.
func TestPeers(t *testing.T) {
	const node, stranger = 4242, 4243
	b := newBench(t, func(c *Config) { c.AskUIDs = []int{node} })
	ask := askAt(t, b.c, "a-1", nil)
	digest := b.submit(t, ask).AskDigest
	grant, _ := json.Marshal(client.SignedGrant{Token: b.signed(t, ask)})
	denial, _ := json.Marshal(client.Denial{AskDigest: digest})
	call := func(uid int, method, path string, body []byte) (int, string) {
		r := httptest.NewRequest(method, path, bytes.NewReader(body))
		if uid >= 0 {
			r = r.WithContext(context.WithValue(r.Context(), peerKey{}, uid))
		}
		w := httptest.NewRecorder()
		b.handler().ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	for _, c := range []struct {
		uid  int
		path string
		want int
	}{
		{-1, "/v1/info", http.StatusUnauthorized},
		{stranger, "/v1/info", http.StatusForbidden},
		{stranger, "/v1/asks", http.StatusForbidden},
		{stranger, "/v1/asks/a-1", http.StatusForbidden},
		{stranger, "/v1/asks/a-1/bytes", http.StatusForbidden},
		{node, "/v1/asks/a-1", http.StatusOK},
		{node, "/v1/asks/a-1?wait=61", http.StatusBadRequest},
		{node, "/v1/asks?state=all", http.StatusBadRequest},
		{node, "/v2/info", http.StatusNotFound},
	} {
		if code, body := call(c.uid, http.MethodGet, c.path, nil); code != c.want {
			t.Errorf("uid %d GET %s: %d %s, want %d", c.uid, c.path, code, body, c.want)
		}
	}
	if _, body := call(node, http.MethodGet, "/v1/info", nil); !strings.Contains(body, client.OtherUser) {
		t.Errorf("info for the node's user: %s", body)
	}
	for _, uid := range []int{-1, stranger, node} {
		for _, route := range []string{"POST /v1/asks/a-1/grant", "POST /v1/asks/a-1/denial", "POST /v1/revocations", "POST /v1/approvers", "DELETE /v1/approvers/ann"} {
			method, path, _ := strings.Cut(route, " ")
			body := grant
			if strings.HasSuffix(path, "denial") {
				body = denial
			}
			if code, body := call(uid, method, path, body); code != http.StatusForbidden && code != http.StatusUnauthorized {
				t.Errorf("uid %d: %s: %d %s", uid, route, code, body)
			}
		}
	}
	big := bytes.Repeat([]byte("x"), maxBody+1)
	if code, _ := call(os.Geteuid(), http.MethodPost, "/v1/asks/a-1/grant", big); code != http.StatusRequestEntityTooLarge {
		t.Errorf("a long body: %d", code)
	}
	if code, _ := call(os.Geteuid(), http.MethodPost, "/v1/asks/a-1/denial", []byte(`{"ask_sha256":"x","passphrase":"y"}`)); code != http.StatusBadRequest {
		t.Errorf("an unknown field: %d", code)
	}
	if code, body := call(os.Geteuid(), http.MethodPost, "/v1/asks/a-1/grant", grant); code != http.StatusOK {
		t.Errorf("positive control: %d %s", code, body)
	}
	info, err := os.Stat(b.socket)
	if err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("socket %v, %v", info.Mode(), err)
	}
}

func TestKeyFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "key")
	cfg := Config{Dir: dir, WorkFactor: lowWork}
	if _, err := Open(cfg); err == nil {
		t.Error("a directory that is not there was opened")
	}
	for name, c := range map[string]struct{ approver, phrase, passphrase string }{
		"short passphrase": {"ann", phrase, "1234567"},
		"no passphrase":    {"ann", phrase, ""},
		"no phrase":        {"ann", "", passphrase},
		"odd name":         {"ann\n", phrase, passphrase},
	} {
		if _, err := Init(cfg, c.approver, c.phrase, c.passphrase); err == nil {
			t.Errorf("%s: made", name)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); !errors.Is(err, ErrNoKey) {
		t.Errorf("no key: %v", err)
	}
	identity, err := Init(cfg, "ann", phrase, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Init(cfg, "ann", phrase, passphrase); err == nil || !strings.Contains(err.Error(), "not replaced") {
		t.Errorf("a second key: %v", err)
	}
	path := keyPath(dir, "ann")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file %v, %v", info.Mode(), err)
	}
	a, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := Open(cfg); err == nil {
		t.Error("opened twice", second.Close())
	}
	key, err := open(a.files[0], passphrase)
	if err != nil || !bytes.Equal(identity.PublicKey, key.Public().(ed25519.PublicKey)) {
		t.Errorf("positive control: %v", err)
	}
	if bytes.Contains(raw, key.Seed()) {
		t.Error("the seed stands in the file")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}

	other, _, _ := ed25519.GenerateKey(nil)
	for name, change := range map[string]func(*keyFile){
		"name":       func(k *keyFile) { k.Approver = "bob" },
		"phrase":     func(k *keyFile) { k.Phrase = "red lamp" },
		"public key": func(k *keyFile) { k.PublicKey = other },
		"sealed":     func(k *keyFile) { k.Sealed[len(k.Sealed)-1] ^= 1 },
	} {
		var file keyFile
		if err := json.Unmarshal(raw, &file); err != nil {
			t.Fatal(err)
		}
		change(&file)
		changed, _ := json.Marshal(file)
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := open(a.files[0], passphrase); err == nil {
			t.Errorf("%s changed: the key opens", name)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"", "{}", `{"approver":"ann"}`, string(raw) + "x"} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(cfg); err == nil || errors.Is(err, ErrNoKey) {
			t.Errorf("key file %.20q: %v", bad, err)
		}
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "0700") {
		t.Errorf("a directory that others can read: %v", err)
	}
}

func TestServeRefusesPlace(t *testing.T) {
	b := newBench(t, nil)
	for name, make := range map[string]func(dir string) error{
		"others can look": func(dir string) error { return os.Chmod(dir, 0o755) },
		"others can write": func(dir string) error {
			return os.Chmod(dir, 0o777)
		},
		"a file is there": func(dir string) error { return os.WriteFile(filepath.Join(dir, "a.sock"), nil, 0o600) },
	} {
		dir := filepath.Join(t.TempDir(), "run")
		if err := errors.Join(os.Mkdir(dir, 0o700), make(dir)); err != nil {
			t.Fatal(err)
		}
		if err := b.Serve(t.Context(), filepath.Join(dir, "a.sock"), nil); err == nil {
			t.Errorf("%s: served", name)
		}
	}
	if err := b.Serve(t.Context(), b.socket, nil); err == nil || !strings.Contains(err.Error(), "answers at") {
		t.Errorf("a living socket: %v", err)
	}
	if info, err := os.Stat(b.socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", info.Mode(), err)
	}
}

func TestDamagedDatabase(t *testing.T) {
	b := newBench(t, nil)
	digest := b.submit(t, askAt(t, b.c, "a-1", nil)).AskDigest
	// Somebody changes the ask after it was taken.
	if _, err := b.store.db.Exec("UPDATE asks SET canonical = CAST(replace(CAST(canonical AS TEXT), 'refs/heads/main', 'refs/heads/work') AS BLOB)"); err != nil {
		t.Fatal(err)
	}
	_, err := b.decide(t, "a-1", typed{Approve: true, AskDigest: digest, Passphrase: passphrase})
	wantKind(t, "changed ask", err, nucleus.KindInternal, "damaged")
	b.stop()
	if err := os.WriteFile(filepath.Join(b.cfg.Dir, "authority.db"), bytes.Repeat([]byte("garbage "), 2000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, side := range []string{"-wal", "-shm"} {
		_ = os.Remove(filepath.Join(b.cfg.Dir, "authority.db"+side))
	}
	if a, err := Open(b.cfg); err == nil {
		t.Error("garbage was opened", a.Close())
	}
}

// The database fails at the last step: nobody gets a token.
func TestDecisionNotStored(t *testing.T) {
	b := newBench(t, nil)
	digest := b.submit(t, askAt(t, b.c, "a-1", nil)).AskDigest
	if _, err := b.store.db.Exec("CREATE TRIGGER full BEFORE UPDATE ON asks BEGIN SELECT RAISE(FAIL, 'disk is full'); END"); err != nil {
		t.Fatal(err)
	}
	for _, approve := range []bool{true, false} {
		s, err := b.decide(t, "a-1", typed{Approve: approve, AskDigest: digest, Passphrase: passphrase})
		wantKind(t, fmt.Sprint("approve ", approve), err, nucleus.KindUnavailable, "disk is full")
		if s.Tokens() != nil {
			t.Errorf("a token came: %+v", s)
		}
		if s, err := b.client.Status(t.Context(), "a-1"); err != nil || s.State != client.Pending || s.Tokens() != nil {
			t.Errorf("now %+v, %v", s, err)
		}
	}
	if _, err := b.store.db.Exec("DROP TRIGGER full"); err != nil {
		t.Fatal(err)
	}
	row, err := b.store.ask("a-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.store.end("a-1", client.Pending, client.Denied, "", 1); err != nil {
		t.Errorf("positive control: %v", err)
	}
	if err := b.store.end("a-1", client.Pending, client.Denied, "", 1); err == nil {
		t.Error("the store took a second denial")
	}
	if err := b.store.addGrant(row, client.Given{Grant: "g-1", Approver: "ann", Token: "token"}); err == nil {
		t.Error("the store took a grant for what was denied")
	}
}

func TestClientWithoutAuthority(t *testing.T) {
	c := client.New(filepath.Join(t.TempDir(), "none.sock"))
	defer c.Close()
	_, err := c.Info(t.Context())
	wantKind(t, "nobody there", err, nucleus.KindUnavailable, "no authority answers at")
}

// The daemon of the child dies by SIGKILL at the point that the test names.
const (
	childEnv = "AUTHORITY_TEST_CHILD"
	killEnv  = "AUTHORITY_TEST_KILL"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := child(dir, os.Getenv(killEnv)); err != nil {
			fmt.Println("error", err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

type killer struct {
	Recorder
	http.ResponseWriter
}

func die() { _ = syscall.Kill(os.Getpid(), syscall.SIGKILL); select {} }

func (k killer) Record(e nucleus.Entry) error {
	if err := k.Recorder.Record(e); err != nil {
		return err
	}
	if e.Kind == nucleus.KindApprovalGrant {
		die()
	}
	return nil
}

func (k killer) WriteHeader(int) { die() }

func child(dir, when string) error {
	c := newClock()
	a, err := Open(Config{Dir: dir, WorkFactor: lowWork, Now: c.now, VerifyRequest: verifyTestRequest})
	if err != nil {
		return err
	}
	if when == "after record" {
		a.cfg.Recorder = killer{Recorder: a.cfg.Recorder}
	}
	handler := a.handler()
	listener, err := a.listen(filepath.Join(dir, "run", "a.sock"))
	if err != nil {
		return err
	}
	fmt.Println("ready")
	server := http.Server{ConnContext: withPeer, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if when == "before answer" && strings.HasSuffix(r.URL.Path, "/grant") {
			w = killer{ResponseWriter: w}
		}
		handler.ServeHTTP(w, r)
	})}
	return server.Serve(listener)
}

// Killed between record and decision, the ask is open; killed between decision
// and answer, the one grant is there. Never two tokens.
func TestKillAroundDecision(t *testing.T) {
	for _, c := range []struct {
		when, state string
		records     []string
	}{
		{"after record", client.Pending, []string{"approval.ask", "approval.grant", "approval.grant"}},
		{"before answer", client.Granted, []string{"approval.ask", "approval.grant"}},
	} {
		b := newBench(t, nil)
		ask := askAt(t, b.c, "a-1", nil)
		b.submit(t, ask)
		b.stop()

		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+b.cfg.Dir, killEnv+"="+c.when)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 100)
		if n, err := out.Read(line); err != nil || string(line[:n]) != "ready\n" {
			t.Fatalf("child said %q, %v", line[:n], err)
		}
		api := client.New(filepath.Join(b.cfg.Dir, "run", "a.sock"))
		token := b.signed(t, ask)
		_, err = api.Grant(t.Context(), "a-1", token)
		wantKind(t, c.when, err, nucleus.KindUnavailable, "")
		api.Close()
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("child ended with %v, want SIGKILL", err)
		}

		b = startBench(t, b.c, b.cfg)
		status, err := b.client.Status(t.Context(), "a-1")
		if err != nil || status.State != c.state {
			t.Fatalf("%s: %+v, %v; want %s", c.when, status, err, c.state)
		}
		if c.state == client.Pending {
			if status, err = b.client.Grant(t.Context(), "a-1", token); err != nil {
				t.Fatal(err)
			}
		} else {
			_, err := b.client.Grant(t.Context(), "a-1", token)
			wantKind(t, "a second grant", err, nucleus.KindConflict, "a-1 is granted")
		}
		if _, err := approval.Verify(status.Grants[0].Token, ask, b.keys(), b.c.ms.Load()); err != nil {
			t.Errorf("%s: %v", c.when, err)
		}
		wantRecord(t, b.cfg.Dir, c.records...)
	}
}

// Many deciders at once: one decision.
func TestDecideConcurrently(t *testing.T) {
	b := newBench(t, nil)
	digest := b.submit(t, askAt(t, b.c, "a-1", nil)).AskDigest
	var wg sync.WaitGroup
	var decided atomic.Int32
	for i := range 20 {
		wg.Go(func() {
			_, err := b.decide(t, "a-1", typed{Approve: i%2 == 0, AskDigest: digest, Passphrase: passphrase})
			if err == nil {
				decided.Add(1)
			} else if kindOf(err) != nucleus.KindConflict {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if decided.Load() != 1 || len(recorded(t, b.cfg.Dir)) != 2 {
		t.Errorf("%d decisions, recorded %v", decided.Load(), recorded(t, b.cfg.Dir))
	}
}

func BenchmarkListThousand(bm *testing.B) {
	c := newClock()
	s, err := openStore(filepath.Join(bm.TempDir(), "a.db"), "ann")
	if err != nil {
		bm.Fatal(err)
	}
	defer s.close()
	for i := range 1000 {
		ask := askAt(bm, c, fmt.Sprintf("a-%d", i), nil)
		digest, canonical, _ := approval.Digest(ask)
		if err := s.addAsk(askRow{id: ask.ID, digest: digest, about: aboutOf(ask), pod: ask.Pod, op: ask.Action.Op, summary: approval.Summary(ask), created: ask.Created, expires: ask.Expires, state: client.Pending}, nucleus.SHA256(ask.Request), canonical); err != nil {
			bm.Fatal(err)
		}
	}
	for bm.Loop() {
		items, err := s.list(client.Pending, client.MaxListed, c.ms.Load())
		if err != nil || len(items) != 1000 {
			bm.Fatal(len(items), err)
		}
	}
}
