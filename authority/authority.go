// Package authority is the approval daemon: it keeps the approver's key, shows
// asks to a person, and is the only code that signs a grant.
//
// The threat is an asker on the same host that wants its own ask granted: it
// lies about what was requested, decides in the person's place, guesses the
// passphrase, replays, or kills the daemon at a chosen moment. So an ask is
// taken only with the request that its requester signed; a grant takes the
// digest of the bytes that were shown and the passphrase that seals the key; the
// key never leaves the process and is in clear only while it signs; and a
// decision is recorded before anybody learns of it.
//
// Where asker and approver are the same user, the passphrase is all that stands
// between them. An asker that can read the terminal on which it is typed, or
// replace the programs of its own user, is outside of what this can stop; a
// daemon of another user is the answer to that.
package authority

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	paseto "aidanwoods.dev/go-paseto"

	"cal/approval"
	"cal/approval/client"
	"cal/audit/witness"
	"cal/nucleus"
)

// Recorder is a log. Record returns when the entry is durable; when it fails,
// what was to be recorded does not happen.
type Recorder interface {
	Record(nucleus.Entry) error
}

// Requested is what a requester's signature says was requested.
type Requested struct {
	Pod  string
	Op   nucleus.Op
	Args string // hex SHA-256 of the canonical arguments
}

// Config says what an Authority needs. The zero value of every field but Dir is
// the safest meaning.
type Config struct {
	// Dir holds key and database. It belongs to the process's user, mode 0700.
	Dir string
	// AskUIDs may ask, beside the process's own user. Nobody of these can decide.
	AskUIDs []int
	// WorkFactor is the base-2 logarithm of scrypt's work for a new key; 0 is
	// age's default.
	WorkFactor int
	// VerifyRequest checks the requester's signature in ask.Request with the key
	// that was registered for ask.Requester, and returns what it covers. Nil
	// refuses every ask.
	VerifyRequest func(ask nucleus.AskRequest, key ed25519.PublicKey) (Requested, error)
	// Recorder is where asks, decisions and refusals are recorded; nil is a table
	// of the authority's own database.
	Recorder Recorder
	// Now is the clock; nil is the system's.
	Now func() time.Time
}

const (
	maxSkew    = 5 * time.Minute // between an ask's making and this clock
	maxPending = 2000
	maxKeys    = 64 // of one pod
)

// Authority is one open key and database. Its methods may be called at the same
// time.
type Authority struct {
	cfg      Config
	identity Identity
	sealed   []byte
	store    *store
	lock     *os.File
	witness  *witness.Witness

	mu       sync.Mutex // one change of an ask at a time
	changed  chan struct{}
	attempts attempts
}

// Open opens the key and database in cfg.Dir and holds them alone; a second Open
// fails. There is ErrNoKey before Init.
func Open(cfg Config) (*Authority, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if err := checkPrivate(cfg.Dir); err != nil {
		return nil, err
	}
	identity, sealed, err := readKey(cfg.Dir)
	if err != nil {
		return nil, err
	}
	lock, err := holdAlone(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return nil, err
	}
	s, err := openStore(filepath.Join(cfg.Dir, "authority.db"))
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if cfg.Recorder == nil {
		cfg.Recorder = s
	}
	a := &Authority{cfg: cfg, identity: identity, sealed: sealed, store: s, lock: lock, changed: make(chan struct{})}
	if err := a.openWitness(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// Close releases database and lock.
func (a *Authority) Close() error { return errors.Join(a.store.close(), a.lock.Close()) }

// Identity says whose key it is.
func (a *Authority) Identity() Identity { return a.identity }

func holdAlone(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another authority holds %s: %w", path, err), f.Close())
	}
	return f, nil
}

// checkPrivate refuses a directory that others could look into or change.
func checkPrivate(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 || owner != os.Geteuid() {
		return fmt.Errorf("%s is %v of uid %d, want a directory with mode 0700 of uid %d", dir, info.Mode(), owner, os.Geteuid())
	}
	return nil
}

func (a *Authority) millis() int64 { return a.cfg.Now().UnixMilli() }

// record writes one entry about an ask.
func (a *Authority) record(kind string, ask nucleus.AskRequest, digest string, data map[string]any, change func(*nucleus.Entry)) error {
	data["ask_sha256"] = digest
	raw, err := nucleus.Canonical(data)
	if err != nil {
		return err
	}
	entry := nucleus.Entry{
		Time: a.cfg.Now().UTC().Format(time.RFC3339Nano), Kind: kind, Pod: ask.Pod, Session: ask.Session, Actor: a.identity.Approver,
		Op: ask.Action.Op, Digest: ask.Digest, Rule: ask.Rule, Ask: ask.ID, Exposure: ask.Context.Exposure.Names(), Data: raw,
	}
	if change != nil {
		change(&entry)
	}
	if err := a.cfg.Recorder.Record(entry); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot record %s of ask %s: %v", kind, ask.ID, err)
	}
	return nil
}

// RegisterPod keeps the keys of a pod's requesters: the first word counts.
func (a *Authority) RegisterPod(pod client.Pod) error {
	if err := approval.CheckName("pod", pod.Pod); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	if len(pod.Keys) == 0 || len(pod.Keys) > maxKeys {
		return nucleus.Errorf(nucleus.KindInvalid, "pod %s: %d requester keys, want 1 to %d", pod.Pod, len(pod.Keys), maxKeys)
	}
	for id, key := range pod.Keys {
		if err := approval.CheckName("key id", id); err != nil {
			return nucleus.Errorf(nucleus.KindInvalid, "pod %s: %v", pod.Pod, err)
		}
		if len(key) != ed25519.PublicKeySize {
			return nucleus.Errorf(nucleus.KindInvalid, "pod %s: key %s has %d bytes, want the %d of an Ed25519 public key", pod.Pod, id, len(key), ed25519.PublicKeySize)
		}
	}
	keys, err := nucleus.Canonical(pod.Keys)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	known, err := a.store.addPod(pod.Pod, string(keys))
	if err != nil {
		return unavailable(err)
	}
	if known != string(keys) {
		return nucleus.Errorf(nucleus.KindConflict, "pod %s has other requester keys", pod.Pod)
	}
	return nil
}

// Submit takes an ask from its JSON. The same ask again is accepted and answered
// with its state.
func (a *Authority) Submit(raw []byte) (client.Status, error) {
	ask, digest, canonical, err := approval.Parse(raw)
	if err != nil {
		return client.Status{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	if err := approval.Check(ask); err != nil {
		return client.Status{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch known, err := a.store.ask(ask.ID); {
	case err == nil && known.digest == digest:
		return known.status(a.millis()), nil
	case err == nil:
		return client.Status{}, nucleus.Errorf(nucleus.KindConflict, "ask %s is known with other content: %s, now %s", ask.ID, known.digest, digest)
	case !errors.Is(err, errUnknown):
		return client.Status{}, unavailable(err)
	}
	if err := a.admit(ask); err != nil {
		refusal := nucleus.AsError(err)
		data := map[string]any{"why": refusal.Message}
		return client.Status{}, errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, digest, data, nil))
	}
	if err := a.record(nucleus.KindApprovalAsk, ask, digest, map[string]any{"summary": approval.Summary(ask)}, nil); err != nil {
		return client.Status{}, err
	}
	row := askRow{id: ask.ID, digest: digest, canonical: canonical, request: nucleus.SHA256(ask.Request), pod: ask.Pod, op: ask.Action.Op, summary: approval.Summary(ask), created: ask.Created, expires: ask.Expires, state: client.Pending}
	if err := a.store.addAsk(row); err != nil {
		return client.Status{}, unavailable(err)
	}
	a.broadcast()
	return row.status(a.millis()), nil
}

// admit checks an ask against the clock and against what its requester signed.
func (a *Authority) admit(ask nucleus.AskRequest) error {
	now := a.millis()
	if skew := time.Duration(now-ask.Created) * time.Millisecond; skew.Abs() > maxSkew {
		return nucleus.Errorf(nucleus.KindInvalid, "ask %s was made %v before now by this clock, at most %v are allowed: are the clocks apart?", ask.ID, skew, maxSkew)
	}
	if now >= ask.Expires {
		return nucleus.Errorf(nucleus.KindInvalid, "ask %s expired %d ms ago", ask.ID, now-ask.Expires)
	}
	pending, err := a.store.pending(now)
	if err != nil {
		return unavailable(err)
	}
	if pending >= maxPending {
		return nucleus.Errorf(nucleus.KindUnavailable, "%d asks are pending, no more are taken", pending)
	}
	raw, err := a.store.podKeys(ask.Pod)
	if errors.Is(err, errUnknown) {
		return nucleus.Errorf(nucleus.KindUnauthenticated, "pod %s is not registered with the authority", ask.Pod)
	} else if err != nil {
		return unavailable(err)
	}
	var keys map[string]ed25519.PublicKey
	if err := json.Unmarshal([]byte(raw), &keys); err != nil {
		return fmt.Errorf("keys of pod %s: %w", ask.Pod, err)
	}
	key, ok := keys[ask.Requester]
	if !ok {
		return nucleus.Errorf(nucleus.KindUnauthenticated, "pod %s has no requester %s", ask.Pod, ask.Requester)
	}
	if a.cfg.VerifyRequest == nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "this authority cannot check what a requester signed")
	}
	requested, err := a.cfg.VerifyRequest(ask, key)
	if err != nil {
		return nucleus.Errorf(nucleus.KindUnauthenticated, "ask %s: the requester's request: %v", ask.ID, err)
	}
	for _, f := range []struct{ name, asked, signed string }{
		{"pod", ask.Pod, requested.Pod},
		{"operation", string(ask.Action.Op), string(requested.Op)},
		{"arguments", ask.Action.Args, requested.Args},
	} {
		if f.asked != f.signed {
			return nucleus.Errorf(nucleus.KindUnauthenticated, "ask %s has %s %q, its requester signed %q", ask.ID, f.name, f.asked, f.signed)
		}
	}
	// One request is one effect: a node that asks twice for it wants two grants.
	switch before, err := a.store.askOfRequest(nucleus.SHA256(ask.Request)); {
	case err == nil:
		return nucleus.Errorf(nucleus.KindUnauthenticated, "the request of ask %s was asked for before, as %s", ask.ID, before)
	case !errors.Is(err, errUnknown):
		return unavailable(err)
	}
	return nil
}

// Decide answers the ask id with a person's decision. A decision stands: there
// is no second one.
func (a *Authority) Decide(id string, d client.Decision) (client.Status, error) {
	if len(d.Reason) > approval.MaxReason || !utf8.ValidString(d.Reason) {
		return client.Status{}, nucleus.Errorf(nucleus.KindInvalid, "the reason has %d bytes, at most %d of UTF-8 are allowed", len(d.Reason), approval.MaxReason)
	}
	if !d.Approve {
		return a.deny(id, d)
	}
	a.mu.Lock()
	_, ask, err := a.undecided(id, d.AskDigest)
	a.mu.Unlock()
	if err != nil {
		return client.Status{}, err
	}
	// Without mu: this takes a second, and nobody else need wait for it.
	key, err := a.unseal(d.Passphrase)
	switch {
	case err == nil:
	case nucleus.AsError(err).Kind == nucleus.KindConflict: // nothing was tried
		return client.Status{}, err
	default:
		data := map[string]any{"why": nucleus.AsError(err).Message}
		return client.Status{}, errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, d.AskDigest, data, nil))
	}
	defer clear(key)
	return a.grant(id, d, key)
}

func (a *Authority) deny(id string, d client.Decision) (client.Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	row, ask, err := a.undecided(id, d.AskDigest)
	if err != nil {
		return client.Status{}, err
	}
	err = a.record(nucleus.KindApprovalDeny, ask, row.digest, map[string]any{"reason": d.Reason}, func(e *nucleus.Entry) { e.Verdict = nucleus.Deny })
	if err != nil {
		return client.Status{}, err
	}
	row.state, row.reason = client.Denied, d.Reason
	return a.conclude(row)
}

func (a *Authority) grant(id string, d client.Decision, key ed25519.PrivateKey) (client.Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	row, ask, err := a.undecided(id, d.AskDigest)
	if err != nil {
		return client.Status{}, err
	}
	grant, token, err := sign(key, a.identity, ask, d.Reason)
	if err != nil {
		return client.Status{}, err
	}
	err = a.record(nucleus.KindApprovalGrant, ask, row.digest, map[string]any{"reason": d.Reason, "expires_ms": grant.Expires}, func(e *nucleus.Entry) {
		e.Verdict, e.Grants = nucleus.Allow, []string{grant.ID}
	})
	if err != nil {
		return client.Status{}, err
	}
	row.state, row.reason, row.token, row.grant = client.Granted, d.Reason, token, grant.ID
	return a.conclude(row)
}

// undecided returns the ask id if it can still be decided by somebody who was
// shown what has the digest shown. The caller holds mu.
func (a *Authority) undecided(id, shown string) (askRow, nucleus.AskRequest, error) {
	fail := func(err error) (askRow, nucleus.AskRequest, error) { return askRow{}, nucleus.AskRequest{}, err }
	row, err := a.store.ask(id)
	if errors.Is(err, errUnknown) {
		return fail(nucleus.Errorf(nucleus.KindNotFound, "there is no ask %q", id))
	} else if err != nil {
		return fail(unavailable(err))
	}
	ask, digest, _, err := approval.Parse(row.canonical)
	if err != nil || digest != row.digest || ask.ID != id {
		return fail(nucleus.Errorf(nucleus.KindInternal, "ask %s is damaged in the database", id))
	}
	if state := row.status(a.millis()).State; state != client.Pending {
		return fail(nucleus.Errorf(nucleus.KindConflict, "ask %s is %s", id, state))
	}
	if shown != digest {
		err := nucleus.Errorf(nucleus.KindConflict, "what was shown has digest %q, ask %s has %s", shown, id, digest)
		return fail(errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, digest, map[string]any{"why": err.Message}, nil)))
	}
	return row, ask, nil
}

// conclude makes the decision durable and then known.
func (a *Authority) conclude(row askRow) (client.Status, error) {
	if err := a.store.decide(row); err != nil {
		return client.Status{}, unavailable(err)
	}
	a.broadcast()
	return row.status(a.millis()), nil
}

// sign makes the token and looks at it as a verifier will.
func sign(key ed25519.PrivateKey, identity Identity, ask nucleus.AskRequest, reason string) (nucleus.Grant, string, error) {
	binding, err := approval.Bind(ask)
	if err != nil {
		return nucleus.Grant{}, "", err
	}
	grant := binding.Grant(nucleus.NewID("g-"), identity.Approver, reason)
	claims, err := nucleus.Canonical(grant)
	if err != nil {
		return nucleus.Grant{}, "", err
	}
	token, err := paseto.NewTokenFromClaimsJSON(claims, approval.Footer(identity.Approver))
	if err != nil {
		return nucleus.Grant{}, "", err
	}
	secret, err := paseto.NewV4AsymmetricSecretKeyFromEd25519(key)
	if err != nil {
		return nucleus.Grant{}, "", err
	}
	signed := token.V4Sign(secret, approval.Assertion(binding.AskDigest))
	known := map[string]ed25519.PublicKey{identity.Approver: identity.PublicKey}
	if _, err := binding.Verify(signed, known, ask.Created); err != nil {
		return nucleus.Grant{}, "", fmt.Errorf("the new grant does not hold: %w", err)
	}
	return grant, signed, nil
}

// Used records the report that a grant was used. A second report of the same
// grant is a conflict, recorded too: an effect may have happened twice.
func (a *Authority) Used(grant string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	row, err := a.store.grant(grant)
	if errors.Is(err, errUnknown) {
		return nucleus.Errorf(nucleus.KindNotFound, "there is no grant %q", grant)
	} else if err != nil {
		return unavailable(err)
	}
	ask, digest, _, err := approval.Parse(row.canonical)
	if err != nil {
		return err
	}
	named := func(e *nucleus.Entry) { e.Grants = []string{grant} }
	if row.used != 0 {
		err := nucleus.Errorf(nucleus.KindConflict, "grant %s was reported as used at %d ms", grant, row.used)
		return errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, digest, map[string]any{"why": err.Message}, named))
	}
	if err := a.record(nucleus.KindApprovalUse, ask, digest, map[string]any{}, named); err != nil {
		return err
	}
	return unavailable(a.store.markUsed(grant, a.millis()))
}

// broadcast wakes all that wait for a change; the caller holds mu.
func (a *Authority) broadcast() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// look returns an ask's state and a channel that is closed at the next change of
// any ask.
func (a *Authority) look(id string) (client.Status, int64, <-chan struct{}, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	row, err := a.store.ask(id)
	if errors.Is(err, errUnknown) {
		return client.Status{}, 0, nil, nucleus.Errorf(nucleus.KindNotFound, "there is no ask %q", id)
	} else if err != nil {
		return client.Status{}, 0, nil, unavailable(err)
	}
	now := a.millis()
	return row.status(now), row.expires - now, a.changed, nil
}

func unavailable(err error) error {
	if err == nil {
		return nil
	}
	return nucleus.Errorf(nucleus.KindUnavailable, "the authority's database: %v", err)
}
