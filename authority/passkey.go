package authority

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// A passkey's private key is in its owner's authenticator, which signs when it has verified
// them, for the page that asks (WebAuthn). So this daemon holds nothing that could grant for it,
// and nothing that is typed can be overheard. What the authenticator does not do is show what
// it signs: the page does.

const (
	enrolmentLife = 5 * time.Minute
	challengeLife = 3 * time.Minute
	maxChallenges = 64
)

// passkeys is what is under way with passkeys; Authority.mu guards it.
type passkeys struct {
	enrolment *enrolment             // the newest; one at a time
	issued    map[string]issuedGrant // by challenge, base64url
	page      *page                  // nil: there is none
}

// enrolment is a passkey that is being made.
type enrolment struct {
	id        string
	name      string
	challenge []byte
	origin    string
	until     time.Time
	made      *Identity // what the page has brought; AddedBy is still to come
	counter   uint32
	done      chan struct{} // closed when it is made
}

// issuedGrant is a grant that waits for its signature.
type issuedGrant struct {
	ask      string
	decision decision
	grant    nucleus.Grant
	until    time.Time
}

// pageOrigin is where the passkeys that can approve sign; empty where there are none. The
// caller holds mu.
func (a *Authority) pageOrigin() string {
	for _, f := range a.files {
		if f.Kind == nucleus.ApproverPasskey && f.Removed == 0 {
			return f.Origin
		}
	}
	return ""
}

// Enrol begins the making of a passkey: it opens the page. What comes of it approves nothing
// until Vouch.
func (a *Authority) Enrol(n client.NewPasskey) (client.Enrolment, error) {
	fail := func(err error) (client.Enrolment, error) { return client.Enrolment{}, err }
	if err := approval.CheckName("approver", n.Name); err != nil {
		return fail(nucleus.Errorf(nucleus.KindInvalid, "%v", err))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.newName(n.Name); err != nil {
		return fail(err)
	}
	if n.Port == 0 {
		n.Port = client.DefaultPort
		if a.pageOrigin() != "" {
			n.Port = portOf(a.pageOrigin())
		}
	}
	origin := approval.Origin(n.Port)
	if there := a.pageOrigin(); there != "" && there != origin {
		return fail(nucleus.Errorf(nucleus.KindConflict, "there are passkeys for %s; a page on another port cannot use them (remove them first)", there))
	}
	if err := a.openPage(n.Port); err != nil {
		return fail(err)
	}
	e := &enrolment{id: nucleus.NewID("e-"), name: n.Name, challenge: randomBytes(), origin: origin, until: a.cfg.Now().Add(enrolmentLife), done: make(chan struct{})}
	a.passkeys.enrolment = e
	return client.Enrolment{ID: e.id, Link: origin + "/#enrol=" + e.id, Until: e.until.UnixMilli()}, nil
}

// enrolmentOf is the enrolment id, if its time is not over. The caller holds mu.
func (a *Authority) enrolmentOf(id string) (*enrolment, error) {
	e := a.passkeys.enrolment
	if e == nil || subtle.ConstantTimeCompare([]byte(e.id), []byte(id)) != 1 {
		return nil, nucleus.Errorf(nucleus.KindNotFound, "no passkey is being made by this link; the newest link counts, once")
	}
	if !a.cfg.Now().Before(e.until) {
		return nil, nucleus.Errorf(nucleus.KindNotFound, "the time to make the passkey of %s is over: begin again", e.name)
	}
	return e, nil
}

// register takes the passkey that a browser has made: the first one by a link counts.
func (a *Authority) register(id string, r approval.Registration) (client.Made, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e, err := a.enrolmentOf(id)
	if err != nil {
		return client.Made{}, err
	}
	if e.made != nil {
		return client.Made{}, nucleus.Errorf(nucleus.KindConflict, "a passkey was made by this link already; if it was not you, do not vouch for it, and begin again")
	}
	key, err := approval.Registered(r, e.challenge, e.origin)
	if err != nil {
		return client.Made{}, nucleus.Errorf(nucleus.KindInvalid, "the passkey of %s: %v", e.name, err)
	}
	if slices.ContainsFunc(a.files, func(f keyFile) bool { return bytes.Equal(f.PublicKey, key) }) {
		return client.Made{}, nucleus.Errorf(nucleus.KindConflict, "this passkey is, or was, an approver already")
	}
	e.made = &Identity{Approver: e.name, Kind: nucleus.ApproverPasskey, PublicKey: key, Credential: r.Credential, Origin: e.origin}
	e.counter = approval.Answer{AuthenticatorData: r.AuthenticatorData}.Counter()
	close(e.done)
	return client.Made{Fingerprint: fingerprint(key)}, nil
}

// fingerprint is 80 bits of a public key's digest, for a person to compare.
func fingerprint(key []byte) string {
	sum := sha256.Sum256(key)
	var groups []string
	for part := range slices.Chunk(sum[:10], 2) {
		groups = append(groups, hex.EncodeToString(part))
	}
	return strings.Join(groups, "-")
}

// Vouch makes an approver of the passkey that was made, on the word of one who can approve and
// has compared its fingerprint.
func (a *Authority) Vouch(id string, v client.Voucher) (nucleus.Approver, error) {
	fail := func(err error) (nucleus.Approver, error) { return nucleus.Approver{}, err }
	a.mu.Lock()
	defer a.mu.Unlock()
	e, err := a.enrolmentOf(id)
	if err != nil {
		return fail(err)
	}
	if e.made == nil {
		return fail(nucleus.Errorf(nucleus.KindConflict, "no passkey of %s was made yet", e.name))
	}
	made := *e.made
	made.AddedBy = v.By
	var said Identity
	if err := nucleus.Strict(v.Vouched.Payload, &said); err == nil && !bytes.Equal(said.PublicKey, made.PublicKey) {
		return fail(nucleus.Errorf(nucleus.KindConflict, "the passkey that was made has fingerprint %s, not %q", fingerprint(made.PublicKey), fingerprint(said.PublicKey)))
	}
	if err := a.admitApprover(keyFile{Identity: made, Vouched: &v.Vouched}, func() error { return a.store.setCounter(made.Approver, e.counter) }); err != nil {
		return fail(err)
	}
	a.passkeys.enrolment = nil
	return made.public(), nil
}

// challenge makes the grant that d wants, and returns what the approver's passkey has to sign
// for it, and that passkey's id.
func (a *Authority) challenge(id string, d decision) (challenge, credential []byte, err error) {
	fail := func(err error) ([]byte, []byte, error) { return nil, nil, err }
	if err := checkReason(d.reason); err != nil {
		return fail(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	approver, _, ask, err := a.undecided(id, d)
	if err != nil {
		return fail(err)
	}
	if approver.Kind != nucleus.ApproverPasskey {
		return fail(nucleus.Errorf(nucleus.KindInvalid, "%s has no passkey; this approver grants at a terminal (cal approve)", approver.Approver))
	}
	binding, err := approval.Bind(ask)
	if err != nil {
		return fail(err)
	}
	grant := binding.Grant(nucleus.NewID("g-"), approver.Approver, d.reason)
	grant.Task = d.task
	if challenge, err = approval.PasskeyChallenge(grant); err != nil {
		return fail(err)
	}
	now := a.cfg.Now()
	for known, i := range a.passkeys.issued {
		if !now.Before(i.until) {
			delete(a.passkeys.issued, known)
		}
	}
	if len(a.passkeys.issued) >= maxChallenges {
		return fail(nucleus.Errorf(nucleus.KindUnavailable, "%d grants wait for their passkeys, no more are begun", len(a.passkeys.issued)))
	}
	if a.passkeys.issued == nil {
		a.passkeys.issued = map[string]issuedGrant{}
	}
	a.passkeys.issued[base64.RawURLEncoding.EncodeToString(challenge)] = issuedGrant{id, d, grant, now.Add(challengeLife)}
	return challenge, approver.Credential, nil
}

// grantByPasskey grants the ask id with the answer to a challenge that was made for it: the
// challenge is good once, whatever comes of it.
func (a *Authority) grantByPasskey(id, challenge string, answer approval.Answer) (client.Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	issued, ok := a.passkeys.issued[challenge]
	delete(a.passkeys.issued, challenge)
	if !ok || issued.ask != id || !a.cfg.Now().Before(issued.until) {
		return client.Status{}, nucleus.Errorf(nucleus.KindForbidden, "no passkey is asked with this challenge for ask %s, or no longer", id)
	}
	approver, row, ask, err := a.undecided(id, issued.decision)
	if err != nil {
		return client.Status{}, err
	}
	refuse := func(err error) (client.Status, error) {
		refused := nucleus.Errorf(nucleus.KindForbidden, "%v", err)
		return client.Status{}, errors.Join(refused, a.record(nucleus.KindApprovalRefuse, ask, row.digest, map[string]any{"why": refused.Message}, by(approver)))
	}
	token, err := approval.PasskeyToken(issued.grant, answer)
	if err != nil {
		return client.Status{}, err
	}
	grant, err := approval.Verify(token, ask, []nucleus.Approver{approver.public()}, a.millis())
	if err != nil {
		return refuse(err)
	}
	if err := a.count(approver.Approver, answer.Counter()); err != nil {
		return refuse(err)
	}
	return a.granted(row, ask, approver, grant, token)
}

// count takes the counter of a verified answer. One that does not rise may come from a copy of
// the passkey (WebAuthn, 7.2); one that does not count stays 0.
func (a *Authority) count(approver string, now uint32) error {
	before, err := a.store.counter(approver)
	if err != nil {
		return unavailable(err)
	}
	if now <= before && (now != 0 || before != 0) {
		return nucleus.Errorf(nucleus.KindForbidden, "the passkey of %s has signed %d times, it said %d before: there may be a copy of it (remove the approver)", approver, now, before)
	}
	return unavailable(a.store.setCounter(approver, now))
}

func (s *store) counter(approver string) (n uint32, err error) {
	err = s.db.QueryRow("SELECT counter FROM passkeys WHERE approver = ?", approver).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return n, err
}

func (s *store) setCounter(approver string, n uint32) error {
	_, err := s.db.Exec("INSERT INTO passkeys VALUES (?, ?) ON CONFLICT (approver) DO UPDATE SET counter = excluded.counter", approver, n)
	return err
}

func randomBytes() []byte {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return b
}

// passkeyRoutes is what a program at the socket can do with passkeys: it can never use one.
func (a *Authority) passkeyRoutes(route func(string, role, func(*http.Request, int) (any, error))) {
	route("POST /v1/passkeys", decider, func(r *http.Request, _ int) (any, error) {
		var n client.NewPasskey
		if err := read(r, maxBody, &n); err != nil {
			return nil, err
		}
		return a.Enrol(n)
	})
	route("GET /v1/passkeys/{id}", decider, func(r *http.Request, _ int) (any, error) { return a.enrolled(r) })
	route("POST /v1/passkeys/{id}/voucher", decider, func(r *http.Request, _ int) (any, error) {
		var v client.Voucher
		if err := read(r, maxBody, &v); err != nil {
			return nil, err
		}
		return a.Vouch(r.PathValue("id"), v)
	})
	route("GET /v1/page", decider, func(r *http.Request, _ int) (any, error) { return a.pageLink(r.URL.Query().Get("ask")) })
}

// enrolled waits until the passkey was made, at most as long as the request says.
func (a *Authority) enrolled(r *http.Request) (client.Made, error) {
	limit, err := waitOf(r)
	if err != nil {
		return client.Made{}, err
	}
	a.mu.Lock()
	e, err := a.enrolmentOf(r.PathValue("id"))
	a.mu.Unlock()
	if err != nil {
		return client.Made{}, err
	}
	deadline := time.NewTimer(min(limit, e.until.Sub(a.cfg.Now())))
	defer deadline.Stop()
	select {
	case <-e.done:
		return client.Made{Fingerprint: fingerprint(e.made.PublicKey), Key: e.made.PublicKey, Credential: e.made.Credential, Origin: e.made.Origin}, nil
	case <-deadline.C:
	case <-r.Context().Done():
	}
	return client.Made{}, nil
}
