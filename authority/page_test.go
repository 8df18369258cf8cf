package authority

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/internal/passkeytest"
	"cal/nucleus"
)

// freePort is a port that nobody listens on now.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// visitor speaks HTTP with the page: as its own script does, unless told otherwise.
type visitor struct {
	t      testing.TB
	origin string
	key    string
}

func (v visitor) send(method, path string, body any, change func(*http.Request)) (code int, reply []byte) {
	v.t.Helper()
	var raw []byte
	if body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			v.t.Fatal(err)
		}
	}
	r, err := http.NewRequestWithContext(v.t.Context(), method, v.origin+path, bytes.NewReader(raw))
	if err != nil {
		v.t.Fatal(err)
	}
	r.Header.Set("Sec-Fetch-Site", "same-origin")
	r.Header.Set(pageKeyHeader, v.key)
	if method == http.MethodPost {
		r.Header.Set("Origin", v.origin)
		r.Header.Set("Content-Type", "application/json")
	}
	if change != nil {
		change(r)
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	if err != nil {
		v.t.Fatal(err)
	}
	defer response.Body.Close()
	reply, err = io.ReadAll(response.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return response.StatusCode, reply
}

// call sends what the page's script would, and decodes the answer.
func (v visitor) call(method, path string, body, out any) error {
	v.t.Helper()
	code, raw := v.send(method, path, body, nil)
	if code == http.StatusOK {
		return nucleus.Strict(raw, out)
	}
	var refused struct {
		Error *nucleus.Error `json:"error"`
	}
	if err := nucleus.Strict(raw, &refused); err != nil || refused.Error == nil {
		return fmt.Errorf("%d %s", code, raw)
	}
	return refused.Error
}

func linkPart(t testing.TB, link, name string) string {
	t.Helper()
	_, value, found := strings.Cut(link, name+"=")
	if !found {
		t.Fatalf("no %s in %s", name, link)
	}
	value, _, _ = strings.Cut(value, "&")
	return value
}

// withPasskey adds an approver with a passkey, by ann's word, and returns the page's visitor.
func (b *bench) withPasskey(t testing.TB, name string, port int) (visitor, *passkeytest.Authenticator) {
	t.Helper()
	e, err := b.client.Enrol(t.Context(), client.NewPasskey{Name: name, Port: port})
	if err != nil {
		t.Fatal(err)
	}
	origin, _, _ := strings.Cut(e.Link, "/#")
	v, a := visitor{t: t, origin: origin}, passkeytest.New(t, origin)
	made, err := v.register(a, e.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.vouch(t, e.ID, name, made.Fingerprint); err != nil {
		t.Fatal(err)
	}
	link, err := b.client.Page(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	v.key = linkPart(t, link.Link, "key")
	return v, a
}

// vouch has ann vouch for the passkey that the terminal is told of, if it has the fingerprint that the
// page shows.
func (b *bench) vouch(t testing.TB, enrolment, name, shown string) (nucleus.Approver, error) {
	t.Helper()
	made, err := b.client.Enrolled(t.Context(), enrolment)
	if err != nil {
		return nucleus.Approver{}, err
	}
	if got := fingerprint(made.Key); got != shown {
		t.Fatalf("the terminal shows %s, the page %s", got, shown)
	}
	voucher, err := b.signer(t, "ann", passphrase).VouchPasskey(name, made)
	if err != nil {
		t.Fatal(err)
	}
	return b.client.Vouch(t.Context(), enrolment, voucher)
}

func (v visitor) register(a *passkeytest.Authenticator, enrolment string) (made client.Made, err error) {
	var on pageEnrolling
	if err := v.call(http.MethodPost, "/api/enrolment", map[string]string{"enrolment": enrolment}, &on); err != nil {
		return made, err
	}
	r := approval.Registration{Credential: a.ID, PublicKey: a.SPKI(v.t)}
	r.ClientData, r.AuthenticatorData = a.Register(v.t, on.Challenge)
	return made, v.call(http.MethodPost, "/api/enrolment/passkey", pageEnrolment{enrolment, r}, &made)
}

// begin asks for the challenge of a grant.
func (v visitor) begin(ask, digest, approver string) (asked pageChallenge, err error) {
	return asked, v.call(http.MethodPost, "/api/asks/"+ask+"/challenge", pageDecision{digest, approver, "by touch"}, &asked)
}

func (v visitor) finish(ask string, s pageSignature) (status client.Status, err error) {
	return status, v.call(http.MethodPost, "/api/asks/"+ask+"/grant", s, &status)
}

func signature(t testing.TB, a *passkeytest.Authenticator, challenge []byte) pageSignature {
	t.Helper()
	s := pageSignature{Challenge: challenge}
	s.ClientData, s.AuthenticatorData, s.Signature = a.Answer(t, challenge)
	return s
}

func (v visitor) grant(a *passkeytest.Authenticator, ask, digest, approver string) (client.Status, error) {
	asked, err := v.begin(ask, digest, approver)
	if err != nil {
		return client.Status{}, err
	}
	return v.finish(ask, signature(v.t, a, asked.Challenge))
}

// A passkey is made, vouched for, and grants; its token holds for who knows the approver.
func TestPasskeyGrant(t *testing.T) {
	b := newBench(t, nil)
	port := freePort(t)
	_, err := b.client.Page(t.Context(), "")
	wantKind(t, "before there is a passkey", err, nucleus.KindUnavailable, "there is no page")
	if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		t.Fatal("the page is there before anybody wants it", conn.Close())
	}
	v, a := b.withPasskey(t, "touch", port)
	ask := askAt(t, b.c, "a-1", nil)
	digest := b.submit(t, ask).AskDigest
	status, err := v.grant(a, "a-1", digest, "touch")
	if err != nil || status.State != client.Granted || len(status.Grants) != 1 || status.Grants[0].Token != "" {
		t.Fatalf("%+v, %v", status, err)
	}
	told, err := b.client.Status(t.Context(), "a-1")
	if err != nil || len(told.Tokens()) != 1 {
		t.Fatalf("%+v, %v", told, err)
	}
	info, err := b.client.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	grants, err := approval.Approved(told.Tokens(), ask, info.Approvers, b.c.ms.Load())
	if err != nil || grants[0].Approver != "touch" || grants[0].Reason != "by touch" {
		t.Fatalf("%+v, %v", grants, err)
	}
	if _, err := b.client.Use(t.Context(), "a-1", client.Use{Permit: "t-1", Grants: []string{grants[0].ID}}); err != nil {
		t.Error(err)
	}
	_, err = b.client.Use(t.Context(), "a-1", client.Use{Permit: "t-2", Grants: []string{grants[0].ID}})
	wantKind(t, "used twice", err, nucleus.KindRefused, "used before")

	// Nobody grants for it at the socket, and it vouches for nobody.
	digest = b.submit(t, askAt(t, b.c, "a-2", nil)).AskDigest
	_, err = b.decide(t, "a-2", typed{Approve: true, Approver: "touch", Passphrase: passphrase})
	wantKind(t, "a passphrase for a passkey", err, nucleus.KindInvalid, "has a passkey")
	_, err = b.addBy(t, newcomer{"bob", "x", passphraseOf("bob"), "touch", passphrase})
	wantKind(t, "a passkey vouches", err, nucleus.KindInvalid, "has a passkey")
	bob, err := b.signer(t, "ann", passphrase).NewApprover("bob", "x", passphraseOf("bob"), lowWork)
	if err != nil {
		t.Fatal(err)
	}
	bob.By = "touch"
	_, err = b.client.AddApprover(t.Context(), bob)
	wantKind(t, "a passkey vouches, at the socket", err, nucleus.KindInvalid, "has a passkey")
	asked, err := v.begin("a-2", digest, "touch")
	if err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	issued := b.passkeys.issued[base64.RawURLEncoding.EncodeToString(asked.Challenge)].grant
	b.mu.Unlock()
	before := a.Count
	token, err := approval.PasskeyToken(issued, signature(t, a, asked.Challenge).Answer)
	if err != nil {
		t.Fatal(err)
	}
	a.Count = before
	_, err = b.client.Grant(t.Context(), "a-2", token)
	wantKind(t, "a passkey's token at the socket", err, nucleus.KindInvalid, "has a passkey")
	_, err = v.begin("a-2", digest, "ann")
	wantKind(t, "a challenge for a passphrase", err, nucleus.KindInvalid, "no passkey")
	_, err = b.client.RemoveApprover(t.Context(), "ann")
	wantKind(t, "the last with a passphrase", err, nucleus.KindConflict, "last approver")

	// After a new start the page is there again, with another key; the counter is remembered.
	b.stop()
	b = startBench(t, b.c, b.cfg)
	digest = b.submit(t, askAt(t, b.c, "a-2", nil)).AskDigest
	_, err = v.begin("a-2", digest, "touch")
	wantKind(t, "the key of before", err, nucleus.KindUnauthenticated, "the link")
	link, err := b.client.Page(t.Context(), "a-2")
	if err != nil || !strings.HasSuffix(link.Link, "&ask=a-2") {
		t.Fatal(link, err)
	}
	v.key = linkPart(t, link.Link, "key")
	count := a.Count
	a.Count = 1
	_, err = v.grant(a, "a-2", digest, "touch")
	wantKind(t, "a counter that went back", err, nucleus.KindForbidden, "a copy of it")
	a.Count = count - 1
	_, err = v.grant(a, "a-2", digest, "touch")
	wantKind(t, "a counter that stands", err, nucleus.KindForbidden, "a copy of it")
	a.Count = 0
	_, err = v.grant(a, "a-2", digest, "touch")
	wantKind(t, "a counter that is gone", err, nucleus.KindForbidden, "a copy of it")
	a.Count = count
	if status, err := v.grant(a, "a-2", digest, "touch"); err != nil || status.State != client.Granted {
		t.Errorf("positive control: %+v, %v", status, err)
	}
	wantRecord(t, b.cfg.Dir, "key.new", "approval.ask", "approval.grant", "approval.use", "approval.refuse", "approval.ask", "approval.refuse",
		"approval.refuse", "approval.refuse", "approval.refuse", "approval.grant")
	if _, err := b.client.RemoveApprover(t.Context(), "touch"); err != nil {
		t.Fatal(err)
	}
	digest = b.submit(t, askAt(t, b.c, "a-3", nil)).AskDigest
	_, err = v.grant(a, "a-3", digest, "touch")
	wantKind(t, "after it was removed", err, nucleus.KindNotFound, "there is no approver")
}

// Whom the machine does not count grants nothing, so that the ask stays open for whom it counts.
func TestWhoCounts(t *testing.T) {
	b := newBench(t, nil)
	v, a := b.withPasskey(t, "touch", freePort(t))
	if err := b.client.RegisterPod(t.Context(), "p-2", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}, "touch"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "others later", b.client.RegisterPod(t.Context(), "p-2", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}, "ann"), nucleus.KindConflict, "other")
	ask := askAt(t, b.c, "a-1", func(q *nucleus.AskRequest) {
		q.Pod = "p-2"
		signed, err := nucleus.Sign(requester, domain, testRequest{Requested{"p-2", nucleus.GitPush, hexOf("args")}, "a-1"})
		if err != nil {
			t.Fatal(err)
		}
		if q.Request, err = nucleus.Canonical(signed); err != nil {
			t.Fatal(err)
		}
	})
	digest := b.submit(t, ask).AskDigest
	_, err := b.grantBy(t, "a-1", digest, "ann")
	wantKind(t, "a passphrase where a passkey counts", err, nucleus.KindConflict, "knows the approvers touch, not ann")
	if status, err := v.grant(a, "a-1", digest, "touch"); err != nil || status.State != client.Granted {
		t.Errorf("%+v, %v", status, err)
	}
}

// An authenticator that never counts stays at 0.
func TestPasskeyWithoutCounter(t *testing.T) {
	b := newBench(t, nil)
	v, a := b.withPasskey(t, "touch", freePort(t))
	if err := b.store.setCounter("touch", 0); err != nil {
		t.Fatal(err)
	}
	a.Count = 0
	for _, id := range []string{"a-1", "a-2"} {
		digest := b.submit(t, askAt(t, b.c, id, nil)).AskDigest
		if status, err := v.grant(a, id, digest, "touch"); err != nil || status.State != client.Granted {
			t.Errorf("%s: %+v, %v", id, status, err)
		}
	}
}

// What was signed for one ask, one challenge, one moment or one page is good for no other.
func TestPasskeyGrantRefuses(t *testing.T) {
	b := newBench(t, nil)
	v, a := b.withPasskey(t, "touch", freePort(t))
	digests := map[string]string{}
	for _, id := range []string{"a-1", "a-2"} {
		digests[id] = b.submit(t, askAt(t, b.c, id, nil)).AskDigest
	}
	begin := func() pageChallenge {
		t.Helper()
		asked, err := v.begin("a-1", digests["a-1"], "touch")
		if err != nil {
			t.Fatal(err)
		}
		return asked
	}
	_, err := v.begin("a-1", digests["a-2"], "touch")
	wantKind(t, "another ask was shown", err, nucleus.KindConflict, "what was shown")
	_, err = v.begin("a-9", digests["a-1"], "touch")
	wantKind(t, "no such ask", err, nucleus.KindNotFound, "there is no ask")
	_, err = v.begin("a-1", digests["a-1"], "eve")
	wantKind(t, "no such approver", err, nucleus.KindNotFound, "there is no approver")

	type auth = passkeytest.Authenticator
	for what, c := range map[string]struct {
		change func(*auth)
		text   string
	}{
		"not verified":   {func(a *auth) { a.Flags = passkeytest.Present }, "did not verify"},
		"not touched":    {func(a *auth) { a.Flags = passkeytest.Verified }, "nobody touched"},
		"another page":   {func(a *auth) { a.Origin = "http://localhost:1" }, "origin"},
		"in a frame":     {func(a *auth) { a.Member = map[string]any{"crossOrigin": true} }, "inside one of another origin"},
		"another site":   {func(a *auth) { a.Party = "evil.example" }, "another site"},
		"when made":      {func(a *auth) { a.Member = map[string]any{"type": "webauthn.create"} }, "type"},
		"another's key":  {func(a *auth) { a.Key = passkeytest.New(t, v.origin).Key }, "not signed"},
		"a wrong answer": {func(a *auth) { a.Member = map[string]any{"challenge": "AAAA"} }, "challenge"},
	} {
		asked, other := begin(), *a
		c.change(&other)
		_, err := v.finish("a-1", signature(t, &other, asked.Challenge))
		wantKind(t, what, err, nucleus.KindForbidden, c.text)
		_, err = v.finish("a-1", signature(t, a, asked.Challenge))
		wantKind(t, what+", then right, to a challenge that is used up", err, nucleus.KindForbidden, "no passkey is asked")
	}
	asked := begin()
	s := signature(t, a, asked.Challenge)
	_, err = v.finish("a-2", s)
	wantKind(t, "at another ask", err, nucleus.KindForbidden, "no passkey is asked")
	asked = begin()
	_, err = v.finish("a-1", pageSignature{asked.Challenge, s.Answer})
	wantKind(t, "an answer of before", err, nucleus.KindForbidden, "challenge")
	own := passkeytest.New(t, v.origin)
	_, err = v.finish("a-1", signature(t, own, []byte("a challenge that nobody was given")))
	wantKind(t, "a challenge of its own", err, nucleus.KindForbidden, "no passkey is asked")
	asked = begin()
	b.c.advance(challengeLife)
	_, err = v.finish("a-1", signature(t, a, asked.Challenge))
	wantKind(t, "too late", err, nucleus.KindForbidden, "no longer")
	for range maxChallenges {
		begin()
	}
	_, err = v.begin("a-1", digests["a-1"], "touch")
	wantKind(t, "too many at once", err, nucleus.KindUnavailable, "no more are begun")
	b.c.advance(challengeLife - time.Second)
	if _, err := b.client.Status(t.Context(), "a-1"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a-1", "a-2"} {
		if status, err := b.client.Status(t.Context(), id); err != nil || len(status.Grants) != 0 {
			t.Errorf("%s: %+v, %v", id, status, err)
		}
	}
}

// A link makes one passkey, and none of it approves without the voucher's signature and the
// fingerprint that the page has shown.
func TestPasskeyEnrolment(t *testing.T) {
	b := newBench(t, nil)
	port := freePort(t)
	enrol := func(name string) client.Enrolment {
		t.Helper()
		e, err := b.client.Enrol(t.Context(), client.NewPasskey{Name: name, Port: port})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	for what, c := range map[string]struct {
		n    client.NewPasskey
		kind nucleus.Kind
	}{
		"a known name":  {client.NewPasskey{Name: "ann", Port: port}, nucleus.KindConflict},
		"an odd name":   {client.NewPasskey{Name: "a b", Port: port}, nucleus.KindInvalid},
		"a low port":    {client.NewPasskey{Name: "bob", Port: 80}, nucleus.KindInvalid},
		"a port beyond": {client.NewPasskey{Name: "bob", Port: 70000}, nucleus.KindInvalid},
	} {
		_, err := b.client.Enrol(t.Context(), c.n)
		wantKind(t, what, err, c.kind, "")
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, err = b.client.Enrol(t.Context(), client.NewPasskey{Name: "bob", Port: taken.Addr().(*net.TCPAddr).Port})
	wantKind(t, "a port that is taken", err, nucleus.KindUnavailable, "address already in use")

	e := enrol("touch")
	origin, _, _ := strings.Cut(e.Link, "/#")
	v, mine, eve, own := visitor{t: t, origin: origin}, passkeytest.New(t, origin), passkeytest.New(t, origin), passkeytest.New(t, origin)
	_, err = v.register(mine, "e-guess")
	wantKind(t, "without the link", err, nucleus.KindNotFound, "no passkey is being made")
	eve.Flags = passkeytest.Present
	_, err = v.register(eve, e.ID)
	wantKind(t, "not verified", err, nucleus.KindInvalid, "did not verify")
	ann := b.signer(t, "ann", passphrase)
	vouch := func(e client.Enrolment, name string, key []byte, change func(*client.Voucher)) error {
		v, err := ann.VouchPasskey(name, client.Made{Key: key, Credential: own.ID, Origin: origin})
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(&v)
		}
		_, err = b.client.Vouch(t.Context(), e.ID, v)
		return err
	}
	wantKind(t, "before it is made", vouch(e, "touch", own.Point(t), nil), nucleus.KindConflict, "was made yet")

	// Somebody else was faster: the person sees another fingerprint, or none.
	eve.Flags |= passkeytest.Verified
	if _, err := v.register(eve, e.ID); err != nil {
		t.Fatal(err)
	}
	_, err = v.register(mine, e.ID)
	wantKind(t, "the second by one link", err, nucleus.KindConflict, "made by this link already")
	wantKind(t, "the key of mine", vouch(e, "touch", mine.Point(t), nil), nucleus.KindConflict, "the passkey that was made has fingerprint")
	wantKind(t, "who made it cannot vouch", vouch(e, "touch", eve.Point(t), func(v *client.Voucher) { v.Vouched.Sig[0] ^= 1 }), nucleus.KindForbidden, "has not vouched")
	wantKind(t, "a word for another name", vouch(e, "other", eve.Point(t), nil), nucleus.KindForbidden, "has not vouched")
	wantKind(t, "by nobody", vouch(e, "touch", eve.Point(t), func(v *client.Voucher) { v.By = "" }), nucleus.KindInvalid, "nobody is named")
	if got := names(b.Approvers()); len(got) != 1 {
		t.Fatalf("approvers %v", got)
	}
	next := enrol("touch")
	wantKind(t, "of an enrolment before", vouch(e, "touch", eve.Point(t), nil), nucleus.KindNotFound, "newest")
	b.c.advance(enrolmentLife)
	_, err = v.register(own, next.ID)
	wantKind(t, "too late", err, nucleus.KindNotFound, "is over")

	// As it should be; then the same passkey again, and another port.
	e = enrol("touch")
	waited := make(chan client.Made, 1)
	go func() {
		made, _ := b.client.Enrolled(t.Context(), e.ID)
		waited <- made
	}()
	made, err := v.register(own, e.ID)
	if err != nil {
		t.Fatal(err)
	}
	if told := <-waited; !bytes.Equal(told.Key, own.Point(t)) || !bytes.Equal(told.Credential, own.ID) || told.Origin != origin || made.Fingerprint != fingerprint(own.Point(t)) {
		t.Errorf("the terminal is told %+v, the page %+v", told, made)
	}
	if err := vouch(e, "touch", own.Point(t), nil); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "twice", vouch(e, "touch", own.Point(t), nil), nucleus.KindNotFound, "")
	e = enrol("other")
	_, err = v.register(own, e.ID)
	wantKind(t, "a passkey that is known", err, nucleus.KindConflict, "already")
	_, err = b.client.Enrol(t.Context(), client.NewPasskey{Name: "other", Port: freePort(t)})
	wantKind(t, "another port", err, nucleus.KindConflict, "there are passkeys for")
	list, err := ReadApprovers(b.cfg.Dir)
	if err != nil || len(list) != 2 || list[1].Kind != nucleus.ApproverPasskey || list[1].Origin != origin || list[1].AddedBy != "ann" {
		t.Errorf("%+v, %v", list, err)
	}
}

// Only the page's own script is heard: whoever else reaches the port is refused before anything
// is looked at.
func TestPageRefusesStrangers(t *testing.T) {
	b := newBench(t, nil)
	v, a := b.withPasskey(t, "touch", freePort(t))
	digest := b.submit(t, askAt(t, b.c, "a-1", nil)).AskDigest
	deny := pageDecision{AskDigest: digest, Approver: "touch", Reason: "x"}
	for what, c := range map[string]struct {
		method, path string
		body         any
		change       func(*http.Request)
		code         int
		text         string
	}{
		"the page":                     {"GET", "/", nil, nil, 200, "CAL approvals"},
		"the page by a link":           {"GET", "/", nil, func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }, 200, "CAL approvals"},
		"the list":                     {"GET", "/api/asks", nil, nil, 200, "a-1"},
		"the ask":                      {"GET", "/api/asks/a-1?columns=80", nil, nil, 200, digest},
		"the ask, too wide":            {"GET", "/api/asks/a-1?columns=1000", nil, nil, 400, "columns"},
		"the page in a frame":          {"GET", "/", nil, func(r *http.Request) { r.Header.Set("Sec-Fetch-Dest", "iframe") }, 403, "window of its own"},
		"the page as a script":         {"GET", "/", nil, func(r *http.Request) { r.Header.Set("Sec-Fetch-Mode", "no-cors") }, 403, "window of its own"},
		"a name pointed here":          {"GET", "/api/asks", nil, func(r *http.Request) { r.Host = "evil.example" }, 403, "not"},
		"a name pointed here, page":    {"GET", "/", nil, func(r *http.Request) { r.Host = strings.Replace(r.Host, "localhost", "evil.example", 1) }, 403, "not"},
		"an address as host":           {"GET", "/api/asks", nil, func(r *http.Request) { r.Host = strings.Replace(r.Host, "localhost", "127.0.0.1", 1) }, 403, "not"},
		"a host without its port":      {"GET", "/api/asks", nil, func(r *http.Request) { r.Host = "localhost" }, 403, "not"},
		"a host with a dot":            {"GET", "/api/asks", nil, func(r *http.Request) { r.Host = strings.Replace(r.Host, "localhost", "localhost.", 1) }, 403, "not"},
		"a read from another site":     {"GET", "/api/asks", nil, func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }, 403, "same-origin"},
		"a read from another port":     {"GET", "/api/asks", nil, func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "same-site") }, 403, "same-origin"},
		"a read of the address bar":    {"GET", "/api/asks", nil, func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "none") }, 403, "same-origin"},
		"a read of no known origin":    {"GET", "/api/asks", nil, func(r *http.Request) { r.Header.Del("Sec-Fetch-Site") }, 403, "same-origin"},
		"a read with an origin":        {"GET", "/api/asks", nil, func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, 403, "evil.example"},
		"a read without the key":       {"GET", "/api/asks", nil, func(r *http.Request) { r.Header.Del(pageKeyHeader) }, 401, "the link"},
		"a read with another key":      {"GET", "/api/asks/a-1", nil, func(r *http.Request) { r.Header.Set(pageKeyHeader, "x") }, 401, "the link"},
		"a denial without the key":     {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Del(pageKeyHeader) }, 401, "the link"},
		"a challenge without the key":  {"POST", "/api/asks/a-1/challenge", deny, func(r *http.Request) { r.Header.Del(pageKeyHeader) }, 401, "the link"},
		"a denial of another origin":   {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, 403, "evil.example"},
		"a denial of another port":     {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Set("Origin", "http://localhost:1") }, 403, "localhost:1"},
		"a denial of another scheme":   {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Set("Origin", "https"+strings.TrimPrefix(v.origin, "http")) }, 403, "https"},
		"a denial of a sandbox":        {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Set("Origin", "null") }, 403, "null"},
		"a denial of no origin":        {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Del("Origin") }, 403, "[]"},
		"a denial of two origins":      {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Add("Origin", v.origin) }, 403, "a request of"},
		"a denial from another site":   {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }, 403, "same-origin"},
		"a denial as a form":           {"POST", "/api/asks/a-1/denial", deny, func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, 403, "application/json"},
		"an enrolment of another site": {"POST", "/api/enrolment", map[string]string{"enrolment": "x"}, func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, 403, "evil.example"},
		"leave to ask across origins":  {"OPTIONS", "/api/asks/a-1/denial", nil, nil, 403, "not used"},
		"another method":               {"PUT", "/api/asks/a-1", nil, nil, 403, "not used"},
		"what is not there":            {"GET", "/v1/info", nil, nil, 404, "there is no"},
		"a decision of the socket":     {"POST", "/v1/asks/a-1/decision", deny, nil, 404, "there is no"},
		"a field more":                 {"POST", "/api/asks/a-1/denial", map[string]any{"approve": true, "ask_sha256": digest, "approver": "ann", "passphrase": passphrase}, nil, 400, "unknown field"},
		"too much":                     {"POST", "/api/asks/a-1/denial", strings.Repeat("x", maxBody), nil, 413, "longer"},
	} {
		code, reply := v.send(c.method, c.path, c.body, c.change)
		if code != c.code || !bytes.Contains(reply, []byte(c.text)) {
			t.Errorf("%s: %d %s, want %d with %q", what, code, reply, c.code, c.text)
		}
	}
	if status, err := b.client.Status(t.Context(), "a-1"); err != nil || status.State != client.Pending {
		t.Fatalf("%+v, %v", status, err)
	}
	// What the page says of itself, whatever it answers.
	for _, path := range []string{"/", "/api/asks", "/nothing"} {
		response, err := http.Get(v.origin + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		h := response.Header
		if policy := h.Get("Content-Security-Policy"); !strings.HasPrefix(policy, "default-src 'none'; script-src 'sha256-") || strings.Contains(policy, "unsafe") || h.Get("X-Content-Type-Options") != "nosniff" ||
			h.Get("Referrer-Policy") != "no-referrer" || h.Get("X-Frame-Options") != "DENY" || h.Get("Cross-Origin-Resource-Policy") != "same-origin" || h.Get("Set-Cookie") != "" || h.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: %v", path, h)
		}
	}
	// The right visitor denies, and grants no more.
	var status client.Status
	if err := v.call("POST", "/api/asks/a-1/denial", deny, &status); err != nil || status.State != client.Denied || status.Reason != "x" {
		t.Fatalf("%+v, %v", status, err)
	}
	_, err := v.grant(a, "a-1", digest, "touch")
	wantKind(t, "after it was denied", err, nucleus.KindConflict, "is denied")
}

// It listens on the loopback alone, on both kinds of it.
func TestPageIsLocal(t *testing.T) {
	b := newBench(t, nil)
	port := freePort(t)
	b.withPasskey(t, "touch", port)
	reached := 0
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		ip := address.(*net.IPNet).IP
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip.String(), fmt.Sprint(port)), time.Second)
		if err != nil {
			continue
		}
		_ = conn.Close()
		reached++
		if !ip.IsLoopback() {
			t.Errorf("it answers at %s", ip)
		}
	}
	if reached == 0 {
		t.Error("it answers nowhere")
	}
	if l, err := net.Listen("tcp", fmt.Sprintf("[::1]:%d", port)); err == nil {
		_ = l.Close()
		if six, err := net.Listen("tcp", "[::1]:0"); err == nil {
			_ = six.Close()
			t.Error("somebody else can be localhost, by IPv6")
		}
	}
}

// The list answers when it changes, and when an ask's time is over.
func TestPageList(t *testing.T) {
	b := newBench(t, nil)
	v, _ := b.withPasskey(t, "touch", freePort(t))
	var list pageAsks
	if err := v.call("GET", "/api/asks", nil, &list); err != nil || len(list.Asks) != 0 || len(list.Approvers) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	next := make(chan pageAsks, 1)
	wait := func(known string) {
		go func() {
			var list pageAsks
			_ = v.call("GET", "/api/asks?known="+known, nil, &list)
			next <- list
		}()
	}
	wait(list.State)
	b.submit(t, askAt(t, b.c, "a-1", nil))
	if list = <-next; len(list.Asks) != 1 || list.Asks[0].ID != "a-1" {
		t.Fatalf("%+v", list)
	}
	wait(list.State)
	if _, err := b.client.Deny(t.Context(), "a-1", client.Denial{AskDigest: list.Asks[0].AskDigest}); err != nil {
		t.Fatal(err)
	}
	if list = <-next; len(list.Asks) != 0 {
		t.Fatalf("%+v", list)
	}
}

// Two approvals: one by passkey, one by passphrase; the page shows the ask as the terminal does.
func TestPasskeyQuorum(t *testing.T) {
	b := newBench(t, nil)
	v, a := b.withPasskey(t, "touch", freePort(t))
	ask := askAt(t, b.c, "a-1", func(q *nucleus.AskRequest) { q.Approvals = 2 })
	digest := b.submit(t, ask).AskDigest
	status, err := v.grant(a, "a-1", digest, "touch")
	if err != nil || status.State != client.Pending || len(status.Grants) != 1 {
		t.Fatalf("%+v, %v", status, err)
	}
	_, err = v.begin("a-1", digest, "touch")
	wantKind(t, "twice by one", err, nucleus.KindConflict, "has granted")
	if status, err = b.grantBy(t, "a-1", digest, "ann"); err != nil || len(status.Tokens()) != 2 {
		t.Fatalf("%+v, %v", status, err)
	}
	if _, err := approval.Approved(status.Tokens(), ask, b.Approvers(), b.c.ms.Load()); err != nil {
		t.Error(err)
	}
	var shown pageAsk
	if err := v.call("GET", "/api/asks/a-1?columns=100", nil, &shown); err != nil || shown.Grants[0].Token != "" {
		t.Fatalf("%+v, %v", shown, err)
	}
	screen, err := approval.Draw(ask, approval.View{Width: 100})
	if err != nil || shown.Text != screen.Text || shown.AskDigest != digest {
		t.Errorf("the page shows %q", shown.Text)
	}
	if _, err := base64.RawURLEncoding.DecodeString(v.key); err != nil || len(v.key) < 40 {
		t.Errorf("the page's key is %q", v.key)
	}
}
