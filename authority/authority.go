// Package authority is the approval daemon and the program at which persons decide:
// it keeps the approvers' keys, shows asks, and is the only code that signs a grant.
//
// The threat is an asker on the same host that wants its own ask granted: it
// lies about what was requested, decides in the person's place, takes the daemon's
// place, replays, or kills the daemon at a chosen moment. So an ask is
// taken only with the request that its requester signed; the program at the
// terminal opens the key with its passphrase, signs a grant for exactly the bytes
// that it has shown, and hands that alone to the daemon, which verifies it like anybody; the
// key never leaves that process and is in clear only while it signs; and a
// decision is recorded before anybody learns of it. What is granted is used by
// word of the authority alone, use by use, so that what was taken back is not used.
//
// That several approvers are several persons nobody can prove here: each is a key
// with a passphrase of its own, and who knows two passphrases counts twice.
//
// Where asker and approver are the same user, the passphrase is all that stands
// between them. An asker that can read the terminal on which it is typed, or
// replace the programs of its own user, is outside of what this can stop; a
// daemon of another user is the answer to that.
package authority

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	sqlite3 "modernc.org/sqlite/lib"

	"cal/approval"
	"cal/approval/client"
	"cal/audit/witness"
	"cal/nucleus"
)

// Recorder is a log. Record returns when the entry is durable; when it fails,
// what was to be decided does not happen, and what takes something back happens all the same and
// is recorded later. After a failure each call tries whether the log can be written again.
type Recorder interface {
	Record(nucleus.Entry) error
	// HasUse reports whether the use under a permit was recorded; an error where that is not
	// known, as after a Record that failed and may have written.
	HasUse(permit string) (bool, error)
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
	// LogDir is the directory of the Recorder's log, and LogKey the key that verifies it: both are
	// handed out to who may ask. Empty: nobody gets them.
	LogDir, LogKey string
	// Announce is told of each ask that was taken, and must not wait; nil: nobody is.
	Announce func(client.Item)
	// Now is the clock; nil is the system's.
	Now func() time.Time
}

const (
	maxSkew = 5 * time.Minute // between an ask's making and this clock

	// What waits for persons at once, of a pod and of all: no pod takes the whole queue.
	maxPending         = 2000
	maxPendingBytes    = 128 << 20 // canonical
	maxPodPending      = 32
	maxPodPendingBytes = 16 << 20

	maxKeys = 64 // of one pod

	// What is free on the disk below which nothing new is taken of who asks: what the person
	// decides, what is used, and the log of both have room.
	reserve = 64 << 20
)

// Authority is one open directory of keys and its database. Its methods may be called at
// the same time.
type Authority struct {
	cfg     Config
	store   *store
	lock    *os.File
	witness *witness.Witness

	mu       sync.Mutex // one change of an ask or of the approvers at a time
	files    []keyFile
	changed  chan struct{}
	passkeys passkeys

	watchers map[string]watcher // see revoke.go
	patience time.Duration      // revokePatience
	reserve  uint64             // reserve

	owing owing // see owed.go
}

// Open opens the keys and the database in cfg.Dir and holds them alone; a second Open
// fails. There is ErrNoKey before Init.
func Open(cfg Config) (*Authority, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if err := checkPrivate(cfg.Dir); err != nil {
		return nil, err
	}
	files, err := readKeys(cfg.Dir)
	if err != nil {
		return nil, err
	}
	lock, err := holdAlone(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return nil, err
	}
	if err := adoptOldKey(cfg.Dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	s, err := openStore(filepath.Join(cfg.Dir, "authority.db"), files[0].Approver)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if cfg.Recorder == nil {
		cfg.Recorder = s
	}
	a := &Authority{cfg: cfg, files: files, store: s, lock: lock, changed: make(chan struct{}), watchers: map[string]watcher{}, patience: revokePatience, reserve: reserve}
	watched, err := s.watchers()
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	for _, id := range watched { // who watched the daemon before this one may have passages open
		a.watchers[id] = watcher{seen: time.Now()}
	}
	if err := errors.Join(a.keepRemoved(), a.openWitness()); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	if err := a.recordLastUse(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.owing.entries = true // of the daemon before this one, perhaps
	if err := a.settle(); err != nil {
		slog.Warn("what was taken back could not be kept or recorded; nothing is decided before", "error", err)
	}
	return a, nil
}

// recordLastUse records a use that the daemon before this one had counted when it was killed.
// Uses are counted one at a time, so it is the last one, if any.
func (a *Authority) recordLastUse() error {
	id, use, err := a.store.lastUse()
	if id == "" || err != nil {
		return err
	}
	if known, err := a.cfg.Recorder.HasUse(use.Permit); known || err != nil {
		return err
	}
	row, err := a.store.ask(id)
	if err != nil {
		return err
	}
	most := 1
	if task := row.task(); task != nil {
		most = task.Uses
	}
	return a.recordUse(row, client.Used{N: use.N, Of: most}, use.Permit)
}

func (a *Authority) recordUse(row askRow, used client.Used, permit string) error {
	return a.record(nucleus.KindApprovalUse, row.ask(), row.digest, map[string]any{"n": used.N, "of": used.Of}, func(e *nucleus.Entry) {
		e.Permit, e.Grants = permit, row.grantIDs()
	})
}

// Close releases database and lock.
func (a *Authority) Close() error { return errors.Join(a.store.close(), a.lock.Close()) }

// Approvers lists who can approve now.
func (a *Authority) Approvers() []nucleus.Approver {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.approvers()
}

func (a *Authority) approvers() (list []nucleus.Approver) {
	for _, f := range a.files {
		if f.Removed == 0 {
			list = append(list, f.public())
		}
	}
	return list
}

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

// actor is the actor of what the authority itself does.
const actor = "authority"

// record writes one entry about an ask.
func (a *Authority) record(kind string, ask nucleus.AskRequest, digest string, data map[string]any, change func(*nucleus.Entry)) error {
	entry, err := a.entry(kind, ask, digest, data, change)
	if err != nil {
		return err
	}
	if err := a.cfg.Recorder.Record(entry); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot record %s of ask %s: %v", kind, ask.ID, err)
	}
	return nil
}

func (a *Authority) entry(kind string, ask nucleus.AskRequest, digest string, data map[string]any, change func(*nucleus.Entry)) (nucleus.Entry, error) {
	data["ask_sha256"] = digest
	raw, err := nucleus.Canonical(data)
	if err != nil {
		return nucleus.Entry{}, err
	}
	entry := nucleus.Entry{
		Time: a.cfg.Now().UTC().Format(time.RFC3339Nano), Kind: kind, Pod: ask.Pod, Session: ask.Session, Actor: actor,
		Op: ask.Action.Op, Digest: ask.Digest, Rule: ask.Rule, Ask: ask.ID, Exposure: ask.Context.Exposure.Names(), Data: raw,
	}
	if change != nil {
		change(&entry)
	}
	return entry, nil
}

// RegisterPod keeps the keys of a pod's requesters, and who counts there as an approver: the first
// word counts.
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
	if len(pod.Approvers) > maxApprovers {
		return nucleus.Errorf(nucleus.KindInvalid, "pod %s: %d approvers, at most %d are allowed", pod.Pod, len(pod.Approvers), maxApprovers)
	}
	said, err := nucleus.Canonical(pod)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.roomToAsk(); err != nil {
		return err
	}
	known, err := a.store.addPod(pod.Pod, string(said))
	if err != nil {
		return unavailable(err)
	}
	if known != string(said) {
		return nucleus.Errorf(nucleus.KindConflict, "pod %s has other requester keys or approvers", pod.Pod)
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
	if err := a.settle(); err != nil {
		return client.Status{}, err
	}
	switch known, err := a.store.ask(ask.ID); {
	case err == nil && known.digest == digest:
		return known.status(a.millis()), nil
	case err == nil:
		return client.Status{}, nucleus.Errorf(nucleus.KindConflict, "ask %s is known with other content: %s, now %s", ask.ID, known.digest, digest)
	case !errors.Is(err, errUnknown):
		return client.Status{}, unavailable(err)
	}
	if err := a.roomToAsk(); err != nil {
		return client.Status{}, err
	}
	if err := a.admit(ask, len(canonical)); err != nil {
		refusal := nucleus.AsError(err)
		data := map[string]any{"why": refusal.Message}
		return client.Status{}, errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, digest, data, nil))
	}
	if err := a.record(nucleus.KindApprovalAsk, ask, digest, map[string]any{"summary": approval.Summary(ask)}, nil); err != nil {
		return client.Status{}, err
	}
	row := askRow{id: ask.ID, digest: digest, about: aboutOf(ask), pod: ask.Pod, op: ask.Action.Op, summary: approval.Summary(ask), need: ask.Approvals, created: ask.Created, expires: ask.Expires, state: client.Pending}
	if err := a.store.addAsk(row, nucleus.SHA256(ask.Request), canonical); err != nil {
		return client.Status{}, unavailable(err)
	}
	a.broadcast()
	if a.cfg.Announce != nil {
		a.cfg.Announce(client.Item{ID: row.id, State: row.state, Pod: row.pod, Op: row.op, Summary: row.summary, Need: row.need, AskDigest: row.digest, Created: row.created, Expires: row.expires})
	}
	return row.status(a.millis()), nil
}

// admit checks an ask against the clock and against what its requester signed.
func (a *Authority) admit(ask nucleus.AskRequest, bytes int) error {
	now := a.millis()
	if skew := time.Duration(now-ask.Created) * time.Millisecond; skew.Abs() > maxSkew {
		return nucleus.Errorf(nucleus.KindInvalid, "ask %s was made %v before now by this clock, at most %v are allowed: are the clocks apart?", ask.ID, skew, maxSkew)
	}
	if now >= ask.Expires {
		return nucleus.Errorf(nucleus.KindInvalid, "ask %s expired %d ms ago", ask.ID, now-ask.Expires)
	}
	if err := a.room(ask.Pod, bytes, now); err != nil {
		return err
	}
	if there := len(a.approvers()); ask.Approvals > there {
		return nucleus.Errorf(nucleus.KindInvalid, "ask %s needs %d different approvers, there are %d (nucleus-authority approver add)", ask.ID, ask.Approvals, there)
	}
	key, _, err := a.requester(ask)
	if err != nil {
		return err
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

// room refuses an ask of so many bytes where its pod, or all together, have asked for enough.
func (a *Authority) room(pod string, bytes int, now int64) error {
	all, own, err := a.store.pending(pod, now)
	if err != nil {
		return unavailable(err)
	}
	for _, bound := range []struct {
		load
		whose       string
		asks, bytes int
	}{
		{own, "of pod " + pod, maxPodPending, maxPodPendingBytes},
		{all, "in all", maxPending, maxPendingBytes},
	} {
		if bound.load.asks >= bound.asks || bound.load.bytes+bytes > bound.bytes {
			return nucleus.Errorf(nucleus.KindRefused, "%d asks with %d bytes %s wait for a person, at most %d with %d are taken: answer some (cal approve list), or let them expire",
				bound.load.asks, bound.load.bytes, bound.whose, bound.asks, bound.bytes)
		}
	}
	return nil
}

// roomToAsk refuses what who asks adds to the disk, where the rest of it is for who decides.
func (a *Authority) roomToAsk() error {
	var disk unix.Statfs_t
	if err := unix.Statfs(a.cfg.Dir, &disk); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority's disk: %v", err)
	}
	if free := disk.Bavail * uint64(disk.Bsize); free < a.reserve {
		return nucleus.Errorf(nucleus.KindUnavailable, "the disk of the authority has %d MiB free, and nothing is asked below %d (make room on it, and call again)", free>>20, a.reserve>>20)
	}
	return nil
}

// requester is the key that was registered for who asks, and who counts as an approver there;
// none stands for all.
func (a *Authority) requester(ask nucleus.AskRequest) (key ed25519.PublicKey, approvers []string, err error) {
	raw, err := a.store.pod(ask.Pod)
	if errors.Is(err, errUnknown) {
		return nil, nil, nucleus.Errorf(nucleus.KindUnauthenticated, "pod %s is not registered with the authority", ask.Pod)
	} else if err != nil {
		return nil, nil, unavailable(err)
	}
	var pod client.Pod
	if err := nucleus.Strict([]byte(raw), &pod); err != nil {
		return nil, nil, fmt.Errorf("keys of pod %s: %w", ask.Pod, err)
	}
	key, ok := pod.Keys[ask.Requester]
	if !ok {
		return nil, nil, nucleus.Errorf(nucleus.KindUnauthenticated, "pod %s has no requester %s", ask.Pod, ask.Requester)
	}
	return key, pod.Approvers, nil
}

// decision is what an approver decides on what has the digest.
type decision struct {
	grant    bool
	approver string // empty: the only one there is with a passphrase
	digest   string
	reason   string
	task     *nucleus.Task // nil: one use
}

// Grant grants the ask id with a token that an approver has signed for it elsewhere. A decision
// stands: there is no second one of the same approver, and one denial is the end of the ask.
func (a *Authority) Grant(id, token string) (client.Status, error) {
	claims, err := approval.Claims(token)
	if err != nil {
		return client.Status{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	d := decision{true, claims.Approver, claims.AskDigest, claims.Reason, claims.Task}
	if err := checkReason(d.reason); err != nil {
		return client.Status{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	approver, row, ask, err := a.undecided(id, d)
	if err != nil {
		return client.Status{}, err
	}
	refuse := func(err *nucleus.Error) (client.Status, error) {
		return client.Status{}, errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, row.digest, map[string]any{"why": err.Message}, by(approver)))
	}
	if approver.Kind != nucleus.ApproverEd25519 { // its answers are counted, and good for one challenge
		return refuse(hasPasskey(approver))
	}
	grant, err := approval.Verify(token, ask, []nucleus.Approver{approver.public()}, a.millis())
	if err != nil {
		return refuse(nucleus.Errorf(nucleus.KindForbidden, "%v", err))
	}
	switch known, err := a.store.knowsGrant(grant.ID); {
	case err != nil:
		return client.Status{}, unavailable(err)
	case known: // it was taken back, or is another ask's
		return refuse(nucleus.Errorf(nucleus.KindForbidden, "grant %s was given before", grant.ID))
	}
	return a.granted(row, ask, approver, grant, token)
}

func checkReason(reason string) error {
	if len(reason) > approval.MaxReason || !utf8.ValidString(reason) {
		return nucleus.Errorf(nucleus.KindInvalid, "the reason has %d bytes, at most %d of UTF-8 are allowed", len(reason), approval.MaxReason)
	}
	return nil
}

// by names who acted in an entry.
func by(approver keyFile) func(*nucleus.Entry) {
	return func(e *nucleus.Entry) { e.Actor = approver.Approver }
}

// Deny refuses the ask id, by the word of the daemon's own user.
func (a *Authority) Deny(id string, d client.Denial) (client.Status, error) {
	if err := checkReason(d.Reason); err != nil {
		return client.Status{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	approver, row, ask, err := a.undecided(id, decision{approver: d.Approver, digest: d.AskDigest})
	if err != nil {
		return client.Status{}, err
	}
	err = a.record(nucleus.KindApprovalDeny, ask, row.digest, map[string]any{"reason": d.Reason}, func(e *nucleus.Entry) {
		e.Actor, e.Verdict = approver.Approver, nucleus.Deny
	})
	if err != nil {
		return client.Status{}, err
	}
	err = a.store.end(id, client.Pending, client.Denied, d.Reason, a.millis())
	return a.concluded(id, a.unkept(err, ask, row.digest, by(approver)))
}

// unkept records that what the log says of a decision does not count: it could not be kept. It
// returns err, and what stands in the way of recording that too.
func (a *Authority) unkept(err error, ask nucleus.AskRequest, digest string, change func(*nucleus.Entry)) error {
	if err == nil {
		return nil
	}
	why := fmt.Sprintf("the decision recorded before does not count, it could not be kept: %v", err)
	return errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, digest, map[string]any{"why": why}, change))
}

// granted records and keeps a grant that was verified. The caller holds mu.
func (a *Authority) granted(row askRow, ask nucleus.AskRequest, approver keyFile, grant nucleus.Grant, token string) (client.Status, error) {
	data := map[string]any{"reason": grant.Reason, "expires_ms": grant.Expires, "need": row.need}
	if grant.Task != nil {
		data["task"] = grant.Task
	}
	if q := row.about.Passage; q != nil {
		data["passage_ms"] = q.Millis
	}
	err := a.record(nucleus.KindApprovalGrant, ask, row.digest, data, func(e *nucleus.Entry) {
		e.Actor, e.Verdict, e.Grants = approver.Approver, nucleus.Allow, []string{grant.ID}
	})
	if err != nil {
		return client.Status{}, err
	}
	err = a.store.addGrant(row, client.Given{Grant: grant.ID, Approver: approver.Approver, Reason: grant.Reason, Given: a.millis(), Token: token})
	return a.concluded(row.id, a.unkept(err, ask, row.digest, func(e *nucleus.Entry) { e.Actor, e.Grants = approver.Approver, []string{grant.ID} }))
}

// undecided returns the ask id, and the approver that d names, if this approver can still decide
// it and was shown what it says. The caller holds mu.
func (a *Authority) undecided(id string, d decision) (keyFile, askRow, nucleus.AskRequest, error) {
	fail := func(err error) (keyFile, askRow, nucleus.AskRequest, error) {
		return keyFile{}, askRow{}, nucleus.AskRequest{}, err
	}
	if err := a.settle(); err != nil {
		return fail(err)
	}
	row, ask, err := a.known(id)
	if err != nil {
		return fail(err)
	}
	if state := row.stateAt(a.millis()); state != client.Pending {
		return fail(nucleus.Errorf(nucleus.KindConflict, "ask %s is %s", id, state))
	}
	approver, err := choose(a.files, d.approver)
	if err != nil {
		return fail(err)
	}
	refuse := func(kind nucleus.Kind, format string, args ...any) (keyFile, askRow, nucleus.AskRequest, error) {
		err := nucleus.Errorf(kind, format, args...)
		return fail(errors.Join(err, a.record(nucleus.KindApprovalRefuse, ask, row.digest, map[string]any{"why": err.Message}, by(approver))))
	}
	if d.digest != row.digest {
		return refuse(nucleus.KindConflict, "what was shown has digest %q, ask %s has %s", d.digest, id, row.digest)
	}
	if _, given := row.given(approver.Approver); given && d.grant {
		return fail(nucleus.Errorf(nucleus.KindConflict, "%s has granted ask %s; %d more of %d have to", approver.Approver, id, row.need-len(row.grants), row.need))
	}
	if d.grant {
		requester, counts, err := a.requester(ask)
		if err != nil {
			return fail(err)
		}
		if len(counts) > 0 && !slices.Contains(counts, approver.Approver) {
			return fail(nucleus.Errorf(nucleus.KindConflict, "the machine of pod %s knows the approvers %s, not %s: it started before, or requires approvals of another kind", ask.Pod, strings.Join(counts, ", "), approver.Approver))
		}
		if d.task != nil {
			if err := approval.CheckTask(ask, *d.task, a.millis()); err != nil {
				return fail(nucleus.Errorf(nucleus.KindInvalid, "%v", err))
			}
		}
		if len(row.grants) > 0 && !approval.SameTask(row.task(), d.task) {
			return fail(nucleus.Errorf(nucleus.KindConflict, "%s granted ask %s for other bounds; all who approve choose the same", row.grants[0].Approver, id))
		}
		if bytes.Equal(approver.PublicKey, requester) {
			return refuse(nucleus.KindForbidden, "ask %s was signed by the key of %s; who asks cannot grant", id, approver.Approver)
		}
	}
	return approver, row, ask, nil
}

// known returns an ask and what its bytes say.
func (a *Authority) known(id string) (askRow, nucleus.AskRequest, error) {
	row, err := a.store.ask(id)
	if errors.Is(err, errUnknown) {
		return row, nucleus.AskRequest{}, noAsk(id)
	} else if err != nil {
		return row, nucleus.AskRequest{}, unavailable(err)
	}
	if row.shed() {
		return row, nucleus.AskRequest{}, gone(row, row.stateAt(a.millis()))
	}
	raw, err := a.store.canonical(id)
	if err != nil {
		return row, nucleus.AskRequest{}, unavailable(err)
	}
	ask, digest, _, err := approval.Parse(raw)
	if err != nil || digest != row.digest || ask.ID != id {
		return row, ask, nucleus.Errorf(nucleus.KindInternal, "ask %s is damaged in the database", id)
	}
	return row, ask, nil
}

func noAsk(id string) *nucleus.Error {
	return nucleus.Errorf(nucleus.KindNotFound, "there is no ask %q", id)
}

// concluded makes known what has become of an ask.
func (a *Authority) concluded(id string, err error) (client.Status, error) {
	if err != nil {
		return client.Status{}, unavailable(err)
	}
	a.broadcast()
	row, err := a.store.ask(id)
	return row.status(a.millis()), unavailable(err)
}

// Use counts one use of what was granted for an ask. It is in the database before it is in the
// log, and in the log before anybody learns of it. One that could not be recorded does not count;
// one whose daemon is killed in between does: a use is lost then, and none is gained.
func (a *Authority) Use(id string, u client.Use) (client.Used, error) {
	if err := approval.CheckName("permit", u.Permit); err != nil {
		return client.Used{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.settle(); err != nil {
		return client.Used{}, err
	}
	row, err := a.store.ask(id) // its bytes may be long, and who waits here waits three seconds
	if errors.Is(err, errUnknown) {
		return client.Used{}, noAsk(id)
	} else if err != nil {
		return client.Used{}, unavailable(err)
	}
	named := func(e *nucleus.Entry) { e.Grants, e.Permit = u.Grants, u.Permit }
	refuse := func(format string, args ...any) (client.Used, error) {
		err := nucleus.Errorf(nucleus.KindRefused, format, args...)
		if a.roomToAsk() != nil { // who asks fills no disk with refusals
			return client.Used{}, err
		}
		return client.Used{}, errors.Join(err, a.record(nucleus.KindApprovalRefuse, row.ask(), row.digest, map[string]any{"why": err.Message}, named))
	}
	given := row.grantIDs()
	most, until := 1, row.expires
	if task := row.task(); task != nil {
		most = task.Uses
		if row.uses > 0 { // the first use has to come in the ask's time
			until = task.Until
		}
	}
	now := a.millis()
	state := row.stateAt(now)
	if a.isVoid(row) {
		state = client.Revoked
	}
	gone, removed := a.removed(row)
	switch {
	case state != client.Granted:
		return refuse("ask %s is %s", id, state)
	case removed:
		return refuse("ask %s was granted by %s, who is no approver any more", id, gone)
	case !slices.Equal(u.Grants, given):
		return refuse("ask %s was granted by %q, not %q", id, given, u.Grants)
	case row.uses >= most:
		return refuse("what was granted for ask %s was used before, %d times of %d", id, row.uses, most)
	case now >= until:
		return refuse("what was granted for ask %s expired %d ms ago", id, now-until)
	}
	used := client.Used{N: row.uses + 1, Of: most}
	if err := a.store.addUse(id, used.N, u.Permit, now); err != nil {
		return client.Used{}, unavailable(err)
	}
	if err := a.recordUse(row, used, u.Permit); err != nil {
		a.owing.uses = append(a.owing.uses, uncounted{row, used.N, u.Permit})
		_ = a.settle() // or before the next decision
		return client.Used{}, err
	}
	return used, nil
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
		return client.Status{}, 0, nil, noAsk(id)
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
	hint := ""
	if codeOf(err) == sqlite3.SQLITE_FULL {
		hint = " (make room on its disk, and call again)"
	}
	return nucleus.Errorf(nucleus.KindUnavailable, "the authority's database: %v%s", err, hint)
}
