package authority

import (
	"context"
	"crypto/ed25519"
	"errors"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"cal/approval/client"
	"cal/nucleus"
)

// failing is a log that can be told to fail.
type failing struct {
	memoryLog
	broken atomic.Bool
	torn   bool // what failed turns up all the same
}

var errNoRoom = errors.New("no space left on device")

func (f *failing) Record(e nucleus.Entry) error {
	if f.broken.Load() {
		if f.torn {
			_ = f.memoryLog.Record(e)
		}
		return errNoRoom
	}
	return f.memoryLog.Record(e)
}

func (f *failing) HasUse(permit string) (bool, error) {
	if f.broken.Load() {
		return false, errNoRoom
	}
	return f.memoryLog.HasUse(permit)
}

func (f *failing) kinds(kind string) (n int) {
	for _, e := range f.all() {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

func newFailing(t *testing.T) (*bench, *failing) {
	log := &failing{}
	return newBench(t, func(c *Config) { c.Recorder = log }), log
}

// An approver is removed, and a pod's grants are taken back, whatever became of the bytes of one ask:
// shed while the clock was wrong, or damaged.
func TestTakenBackWithoutTheAsk(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, *bench){
		"whole": func(*testing.T, *bench) {},
		"shed": func(t *testing.T, b *bench) { // a day forward and back, as by a bad time server
			b.c.advance(26 * time.Hour)
			if b.shedNow(t, keepFor, keepBytes) == 0 {
				t.Fatal("nothing was shed")
			}
			b.c.advance(-26 * time.Hour)
		},
		"damaged": func(t *testing.T, b *bench) {
			if _, err := b.store.db.Exec("UPDATE asks SET canonical = x'7b7d'"); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			b.add(t, "bob")
			by := func(who, pass, id string) []string {
				ask := askAt(t, b.c, id, nil)
				b.submit(t, ask)
				status, err := b.decide(t, id, typed{Approve: true, Approver: who, Passphrase: pass, Task: b.taskOf(t, ask, 3)})
				if err != nil {
					t.Fatal(err)
				}
				return []string{status.Grants[0].Grant}
			}
			bobs, anns := by("bob", passphraseOf("bob"), "a-bob"), by("ann", passphrase, "a-ann")
			spoil(t, b)
			gone, err := b.client.RemoveApprover(t.Context(), "bob")
			if err != nil || len(gone.Revoked) != 1 || gone.Revoked[0] != "a-bob" || len(b.Approvers()) != 1 {
				t.Fatalf("removed: %+v, %v; approvers %v", gone, err, names(b.Approvers()))
			}
			if err := b.use(t, "a-bob", "r-1", bobs); err == nil {
				t.Error("a removed approver's grant was used")
			}
			now, err := b.client.Revoke(t.Context(), client.Revocation{ID: "p-1", Reason: "enough"})
			if err != nil || len(now.Revoked) != 1 || now.Revoked[0].Ask != "a-ann" || now.Revoked[0].State != client.Void {
				t.Errorf("the pod's: %+v, %v", now, err)
			}
			if err := b.use(t, "a-ann", "r-2", anns); err == nil {
				t.Error("what was taken back was used")
			}
		})
	}
}

// What is taken back holds while the log cannot be written: a watcher is told, no use begins, and
// nothing new is decided before the log has the entry.
func TestTakenBackWithoutLog(t *testing.T) {
	b, log := newFailing(t)
	b.add(t, "bob")
	b.passage(t, "a-1")
	grants := b.granted(t, "a-2", 2)
	b.submit(t, askAt(t, b.c, "a-3", nil))
	if _, err := b.client.Watch(t.Context(), "w-1", client.Watched{}); err != nil {
		t.Fatal(err)
	}
	log.broken.Store(true)
	go func() { _, _ = b.client.Watch(t.Context(), "w-1", b.known(2)) }() // it says that it knows
	now, err := b.client.Revoke(t.Context(), client.Revocation{ID: "p-1"})
	if err != nil || len(now.Revoked) != 2 || !now.Unrecorded {
		t.Errorf("taken back: %+v, %v", now, err)
	}
	if told, err := b.client.Watch(t.Context(), "w-2", b.known(0)); err != nil || len(told.Revoked) != 2 {
		t.Errorf("a watcher is told %+v, %v", told, err)
	}
	if gone, err := b.client.RemoveApprover(t.Context(), "bob"); err != nil || !gone.Unrecorded || len(b.Approvers()) != 1 {
		t.Errorf("removed: %+v, %v", gone, err)
	}
	if err := b.use(t, "a-2", "r-2", grants); err == nil {
		t.Error("what was taken back was used")
	}
	_, err = b.decide(t, "a-3", typed{Approve: true, Approver: "ann", Passphrase: passphrase})
	wantKind(t, "a decision", err, nucleus.KindUnavailable, "no space left")
	log.broken.Store(false)
	if s, err := b.decide(t, "a-3", typed{Approve: true, Approver: "ann", Passphrase: passphrase}); err != nil || s.State != client.Granted {
		t.Errorf("with a log again: %+v, %v", s, err)
	}
	if r, k := log.kinds(nucleus.KindApprovalRevoke), log.kinds(nucleus.KindKeyRemove); r != 2 || k != 1 {
		t.Errorf("recorded: %d revocations and %d removals, want 2 and 1", r, k)
	}
}

// What is taken back holds in this process where the database cannot keep it: no use begins, and no
// watcher is answered, so that passages end with their leases. It is kept when it can be.
func TestTakenBackWithoutDatabase(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	b.passage(t, "a-1")
	grants := b.granted(t, "a-2", 2)
	if _, err := b.client.Watch(t.Context(), "w-1", client.Watched{}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.db.Exec(`CREATE TRIGGER full BEFORE UPDATE ON asks BEGIN SELECT RAISE(FAIL, 'disk is full'); END;
		CREATE TRIGGER removals BEFORE INSERT ON removed BEGIN SELECT RAISE(FAIL, 'disk is full'); END`); err != nil {
		t.Fatal(err)
	}
	_, err := b.client.Revoke(t.Context(), client.Revocation{ID: "p-1"})
	wantKind(t, "taken back", err, nucleus.KindUnavailable, "as long as this authority runs")
	_, err = b.client.RemoveApprover(t.Context(), "bob")
	wantKind(t, "removed", err, nucleus.KindUnavailable, "as long as this authority runs")
	if len(b.Approvers()) != 1 {
		t.Errorf("approvers %v", names(b.Approvers()))
	}
	_, err = b.client.Watch(t.Context(), "w-1", b.known(0))
	wantKind(t, "a watcher", err, nucleus.KindUnavailable, "disk is full")
	if err := b.use(t, "a-2", "r-2", grants); err == nil {
		t.Error("what was taken back was used")
	}
	if s := b.stateOf(t, "a-1").State; s != client.Void {
		t.Errorf("the passage is %s", s)
	}
	if _, err := b.store.db.Exec("DROP TRIGGER full; DROP TRIGGER removals"); err != nil {
		t.Fatal(err)
	}
	if told, err := b.client.Watch(t.Context(), "w-1", b.known(0)); err != nil || len(told.Revoked) != 2 {
		t.Errorf("with room again a watcher is told %+v, %v", told, err)
	}
	b.stop()
	b = startBench(t, b.c, b.cfg)
	if s := b.stateOf(t, "a-1").State; s != client.Void || len(b.Approvers()) != 1 {
		t.Errorf("the next daemon: %s, approvers %v", s, names(b.Approvers()))
	}
}

// A use that could not be recorded does not count, whether the log holds it all the same or not.
func TestUseWithoutLog(t *testing.T) {
	for _, torn := range []bool{false, true} {
		b, log := newFailing(t)
		log.torn = torn
		grants := b.granted(t, "a-1", 0)
		log.broken.Store(true)
		for _, permit := range []string{"r-1", "r-2"} {
			wantKind(t, permit, b.use(t, "a-1", permit, grants), nucleus.KindUnavailable, "no space left")
		}
		log.broken.Store(false)
		if err := b.use(t, "a-1", "r-3", grants); err != nil {
			t.Errorf("with a log again: %v", err)
		}
		wantKind(t, "once more", b.use(t, "a-1", "r-4", grants), nucleus.KindRefused, "used before")
		if a := b.stateOf(t, "a-1"); len(a.Uses) != 1 || a.Uses[0].Permit != "r-3" {
			t.Errorf("uses %+v", a.Uses)
		}
		var said int
		for _, e := range log.all() {
			if e.Kind == nucleus.KindApprovalRefuse && e.Permit == "r-1" {
				said++
			}
		}
		if said > 0 != torn {
			t.Errorf("torn %v: %d entries say that the use does not count", torn, said)
		}
	}
}

// The use that was counted last is the last one, whatever the clock said.
func TestLastUseAfterClockBack(t *testing.T) {
	b := newBench(t, nil)
	if err := b.use(t, "a-1", "r-1", b.granted(t, "a-1", 0)); err != nil {
		t.Fatal(err)
	}
	b.c.advance(-time.Hour)
	b.granted(t, "a-2", 0)
	if err := b.store.addUse("a-2", 1, "r-2", b.c.now().UnixMilli()); err != nil { // killed before it was recorded
		t.Fatal(err)
	}
	b.stop()
	b = startBench(t, b.c, b.cfg)
	if known, err := b.store.HasUse("r-2"); !known || err != nil {
		t.Errorf("the use under r-2 is in the database and in no log: %v", err)
	}
}

// Whose approver was removed is not used, though nothing has made it void.
func TestRemovedGrantsNothing(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	ask := askAt(t, b.c, "a-1", nil)
	status, err := b.grantBy(t, "a-1", b.submit(t, ask).AskDigest, "bob")
	if err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	for i := range b.files {
		if b.files[i].Approver == "bob" {
			b.files[i].Removed = b.millis()
		}
	}
	b.mu.Unlock()
	wantKind(t, "a use", b.use(t, "a-1", "r-1", []string{status.Grants[0].Grant}), nucleus.KindRefused, "no approver any more")
}

// What a watcher knows of another database says nothing of this one.
func TestWatchAnotherDatabase(t *testing.T) {
	b := newBench(t, nil)
	b.passage(t, "a-1")
	b.passage(t, "a-2")
	if now, err := b.client.Revoke(t.Context(), client.Revocation{ID: "a-1"}); err != nil || !now.Closed {
		t.Fatalf("%+v, %v", now, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), client.WatchWait/2)
	defer cancel()
	told, err := b.client.Watch(ctx, "w-1", client.Watched{Database: "db-other", Seq: 1})
	if err != nil || told.Database != b.store.id || told.Seq != 1 || len(told.Revoked) != 0 {
		t.Errorf("answered %+v, %v", told, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if w := b.watchers["w-1"]; w.knows != 0 {
		t.Errorf("it is taken to know %d revocations", w.knows)
	}
}

// Where the disk has little room nothing new is asked, and what is there is decided and used.
func TestAskingNeedsRoom(t *testing.T) {
	b := newBench(t, nil)
	grants := b.granted(t, "a-1", 0)
	b.submit(t, askAt(t, b.c, "a-2", nil))
	b.mu.Lock()
	b.reserve = math.MaxUint64
	b.mu.Unlock()
	_, err := b.client.Submit(t.Context(), askAt(t, b.c, "a-3", nil))
	wantKind(t, "an ask", err, nucleus.KindUnavailable, "make room")
	wantKind(t, "a pod", b.client.RegisterPod(t.Context(), "p-9", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}), nucleus.KindUnavailable, "make room")
	before := len(recorded(t, b.cfg.Dir))
	wantKind(t, "a use of what was not granted", b.use(t, "a-1", "r-0", []string{"g-none"}), nucleus.KindRefused, "was granted by")
	if n := len(recorded(t, b.cfg.Dir)); n != before {
		t.Errorf("who asks has the log grow by %d", n-before)
	}
	if err := b.use(t, "a-1", "r-1", grants); err != nil {
		t.Errorf("a use: %v", err)
	}
	if s, err := b.decide(t, "a-2", typed{Approve: true, Passphrase: passphrase}); err != nil || s.State != client.Granted {
		t.Errorf("a decision: %+v, %v", s, err)
	}
}
