package authority

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

func (b *bench) taskOf(t *testing.T, ask nucleus.AskRequest, uses int) *nucleus.Task {
	t.Helper()
	match, err := approval.Narrowest(ask)
	if err != nil {
		t.Fatal(err)
	}
	return &nucleus.Task{Uses: uses, Until: b.c.ms.Load() + 1_800_000, Exposure: approval.Told(ask), Match: match}
}

// granted puts an ask and grants it, for a task or once.
func (b *bench) granted(t *testing.T, id string, uses int) (ids []string) {
	t.Helper()
	ask := askAt(t, b.c, id, nil)
	b.submit(t, ask)
	d := typed{Approve: true, Approver: "ann", Passphrase: passphrase}
	if uses > 0 {
		d.Task = b.taskOf(t, ask, uses)
	}
	status, err := b.decide(t, id, d)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range status.Grants {
		ids = append(ids, g.Grant)
	}
	return ids
}

func (b *bench) use(t *testing.T, ask, permit string, grants []string) error {
	t.Helper()
	_, err := b.client.Use(t.Context(), ask, client.Use{Permit: permit, Grants: grants})
	return err
}

func (b *bench) stateOf(t *testing.T, ask string) client.Approval {
	t.Helper()
	list, err := b.client.Approvals(t.Context(), client.ApprovalsOf{Pod: "p-1", All: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if a.Ask == ask {
			return a
		}
	}
	t.Fatalf("no %s in %+v", ask, list)
	return client.Approval{}
}

// A task is chosen with the grant, counted by the authority, and over after its uses or its time.
func TestTask(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	ask := askAt(t, b.c, "a-bad", nil)
	b.submit(t, ask)
	for what, change := range map[string]func(*nucleus.Task){
		"uses": func(k *nucleus.Task) { k.Uses = 21 }, "time": func(k *nucleus.Task) { k.Until += 3_600_000 }, "exposure": func(k *nucleus.Task) { k.Exposure = 0 },
		"another": func(k *nucleus.Task) {
			k.Match.Push = &nucleus.PushMatch{Repo: "other", Remote: "x", Ref: "refs/heads/main"}
		},
	} {
		task := b.taskOf(t, ask, 3)
		change(task)
		_, err := b.decide(t, "a-bad", typed{Approve: true, Approver: "ann", Passphrase: passphrase, Task: task})
		wantKind(t, what, err, nucleus.KindInvalid, "task")
	}

	grants := b.granted(t, "a-1", 3)
	if a := b.stateOf(t, "a-1"); a.State != client.Unused || a.Task == nil || a.Task.Uses != 3 || a.Grants[0].Token != "" || a.Until != b.c.ms.Load()+300_000 {
		t.Errorf("unused %+v", a)
	}
	for n := 1; n <= 3; n++ {
		used, err := b.client.Use(t.Context(), "a-1", client.Use{Permit: fmt.Sprint("r-", n), Grants: grants})
		if err != nil || used != (client.Used{N: n, Of: 3}) {
			t.Fatalf("use %d: %+v, %v", n, used, err)
		}
		if n == 1 {
			b.c.advance(10 * time.Minute) // beyond the ask's time
			if a := b.stateOf(t, "a-1"); a.State != client.Open || a.Until != a.Task.Until {
				t.Errorf("open %+v", a)
			}
		}
	}
	wantKind(t, "once more", b.use(t, "a-1", "r-4", grants), nucleus.KindRefused, "was used before, 3 times of 3")
	if err := b.client.Report(t.Context(), "a-1", client.Outcome{Permit: "r-2", Status: nucleus.OutcomeDone}); err != nil {
		t.Error(err)
	}
	if err := b.client.Report(t.Context(), "a-1", client.Outcome{Permit: "r-2", Status: nucleus.OutcomeFailed}); err == nil {
		t.Error("an outcome was replaced")
	}
	a := b.stateOf(t, "a-1")
	if a.State != client.Spent || len(a.Uses) != 3 || a.Uses[0].Outcome != nucleus.OutcomeUnknown || a.Uses[1].Outcome != nucleus.OutcomeDone {
		t.Errorf("used %+v", a)
	}
	grants = b.granted(t, "a-2", 3)
	if err := b.use(t, "a-2", "r-1", grants); err != nil {
		t.Fatal(err)
	}
	b.c.advance(31 * time.Minute)
	wantKind(t, "after its time", b.use(t, "a-2", "r-2", grants), nucleus.KindRefused, "expired")
	if a := b.stateOf(t, "a-2"); a.State != client.Over {
		t.Errorf("over %+v", a)
	}

	// All who approve choose the same.
	ask = askAt(t, b.c, "a-3", func(q *nucleus.AskRequest) { q.Approvals = 2 })
	digest := b.submit(t, ask).AskDigest
	task := b.taskOf(t, ask, 2)
	if _, err := b.decide(t, "a-3", typed{Approve: true, Approver: "ann", Passphrase: passphrase, Task: task}); err != nil {
		t.Fatal(err)
	}
	_, err := b.grantBy(t, "a-3", digest, "bob")
	wantKind(t, "once beside a task", err, nucleus.KindConflict, "other bounds")
	status, err := b.decide(t, "a-3", typed{Approve: true, Approver: "bob", Passphrase: passphraseOf("bob"), Task: task})
	if err != nil || status.State != client.Granted {
		t.Fatalf("%+v, %v", status, err)
	}
	if _, err := approval.Approved(status.Tokens(), ask, b.Approvers(), b.c.ms.Load()); err != nil {
		t.Error(err)
	}
}

// Who grants after another takes over the bounds of the first, to their end, where the own choice is
// for the same and no shorter; else nothing is chosen.
func TestTaskAfter(t *testing.T) {
	b := newBench(t, nil)
	now := b.c.ms.Load()
	ask := askAt(t, b.c, "a-1", nil)
	choice := TaskChoice{Uses: 3, Life: 30 * time.Minute}
	first, err := choice.After(ask, nil, now)
	if err != nil || first.Until != now+1_800_000 {
		t.Fatalf("the first: %+v, %v", first, err)
	}
	later := now + 100_000
	before := []client.Given{{Approver: "ann", Task: first}, {Approver: "bob", Task: first}}
	if task, err := choice.After(ask, before, later); err != nil || !approval.SameTask(task, first) {
		t.Errorf("%+v, %v; want %+v", task, err, first)
	}
	wide, exposed := *first, *first
	wide.Match.Push = &nucleus.PushMatch{Repo: first.Match.Push.Repo, Remote: first.Match.Push.Remote, Ref: "refs/heads/**"}
	exposed.Exposure = ^first.Exposure
	for what, c := range map[string]struct {
		choice TaskChoice
		first  *nucleus.Task
		text   string
	}{
		"fewer uses":         {TaskChoice{Uses: 2, Life: choice.Life}, first, "--uses 3"},
		"less time":          {TaskChoice{Uses: 3, Life: 10 * time.Minute}, first, "longer than --for 10m"},
		"a narrower pattern": {choice, &wide, "another pattern"},
		"other exposure":     {choice, &exposed, "another pattern"},
		"once":               {choice, nil, "leave --uses out"},
	} {
		task, err := c.choice.After(ask, []client.Given{{Approver: "ann", Task: c.first}}, later)
		if err == nil || task != nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %+v, %v; want %q", what, task, err, c.text)
		}
	}
}

// What was taken back is not used, from the answer on: by its ask, its grant, or its pod.
func TestRevoke(t *testing.T) {
	b := newBench(t, nil)
	for i, by := range []func(ask string, grants []string) string{
		func(ask string, _ []string) string { return ask }, func(_ string, grants []string) string { return grants[0] }, func(string, []string) string { return "p-1" },
	} {
		unused, task, spent := fmt.Sprint("a-unused", i), fmt.Sprint("a-task", i), fmt.Sprint("a-spent", i)
		g1, g2, g3 := b.granted(t, unused, 0), b.granted(t, task, 5), b.granted(t, spent, 0)
		for ask, g := range map[string][]string{task: g2, spent: g3} {
			if err := b.use(t, ask, "r-1", g); err != nil {
				t.Fatal(err)
			}
		}
		for ask, g := range map[string][]string{unused: g1, task: g2} {
			now, err := b.client.Revoke(t.Context(), client.Revocation{ID: by(ask, g), Reason: "changed my mind"})
			if err != nil || !now.Closed || i < 2 && (len(now.Revoked) != 1 || now.Revoked[0].Ask != ask || now.Revoked[0].State != client.Void || now.Revoked[0].Reason != "changed my mind") {
				t.Errorf("revoke %s: %+v, %v", ask, now, err)
			}
			wantKind(t, "use of "+ask, b.use(t, ask, "r-2", g), nucleus.KindRefused, "is revoked")
			if s, err := b.client.Status(t.Context(), ask); err != nil || s.State != client.Revoked || s.Tokens() != nil {
				t.Errorf("%s: %+v, %v", ask, s, err)
			}
		}
		if a := b.stateOf(t, spent); a.State != client.Spent {
			t.Errorf("what was used before: %+v", a)
		}
	}
	for what, id := range map[string]string{"nothing": "", "a stranger": "a-none", "what was used": "a-spent0"} {
		_, err := b.client.Revoke(t.Context(), client.Revocation{ID: id})
		if kind := kindOf(err); kind != nucleus.KindNotFound && kind != nucleus.KindInvalid {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := len(slices.DeleteFunc(recorded(t, b.cfg.Dir), func(k string) bool { return k != nucleus.KindApprovalRevoke })); n != 6 {
		t.Errorf("%d revocations are recorded, want 6", n)
	}
}

// passage grants a passage and opens it.
func (b *bench) passage(t *testing.T, id string) {
	t.Helper()
	ask := askAt(t, b.c, id, func(q *nucleus.AskRequest) {
		q.Action = nucleus.Action{Op: nucleus.NetConnect, Args: hexOf("args"), Connect: &nucleus.Connect{Host: "h", Port: 22}}
		q.Passage = &nucleus.Passage{Host: "h", Port: 22, Millis: 3_600_000}
		signed, err := nucleus.Sign(requester, domain, testRequest{Requested{"p-1", nucleus.NetConnect, hexOf("args")}, id})
		if err != nil {
			t.Fatal(err)
		}
		q.Request, _ = nucleus.Canonical(signed)
	})
	status, err := b.grantBy(t, id, b.submit(t, ask).AskDigest, "ann")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.use(t, id, "r-1", []string{status.Grants[0].Grant}); err != nil {
		t.Fatal(err)
	}
	if a := b.stateOf(t, id); a.State != client.Open || a.Passage == nil || a.Until != b.c.ms.Load()+3_600_000 {
		t.Errorf("open passage %+v", a)
	}
}

// known is what a watcher knows that was told of revocations up to a number.
func (b *bench) known(seq int64) client.Watched {
	return client.Watched{Database: b.store.id, Seq: seq}
}

// A watcher that asks on and on from the start renews its lease and never says that it knows: what is
// taken back is void at once all the same, and who takes it back is told that it may be open.
func TestRevokeIsNotHeldUp(t *testing.T) {
	if revokePatience <= client.Lease {
		t.Errorf("waited for %v, a lease has %v", revokePatience, client.Lease)
	}
	b := newBench(t, nil)
	b.passage(t, "a-1")
	b.passage(t, "a-2")
	b.patience = 300 * time.Millisecond
	if now, err := b.client.Revoke(t.Context(), client.Revocation{ID: "a-1"}); err != nil || !now.Closed {
		t.Fatalf("nobody watches: %+v, %v", now, err)
	}
	watching, stop := context.WithCancel(t.Context())
	asked, ended := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(ended)
		for watching.Err() == nil {
			_, _ = b.client.Watch(watching, "evil", b.known(0)) // answered at once: it was told the first before
			select {
			case asked <- struct{}{}:
			default:
			}
		}
	}()
	defer func() { stop(); <-ended }()
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	now, err := b.client.Revoke(ctx, client.Revocation{ID: "a-2"})
	if err != nil || now.Closed || len(now.Revoked) != 1 || now.Revoked[0].State != client.Void || now.Millis < 300 {
		t.Fatalf("%+v, %v", now, err)
	}
}

// Who takes something back is answered when each node that watches has said that it knows, or when
// its lease has ended; also of a daemon that was started in between.
func TestRevokeWaitsForWatchers(t *testing.T) {
	b := newBench(t, nil)
	b.passage(t, "a-1")
	b.passage(t, "a-2")
	type answer struct {
		now client.RevokedNow
		err error
	}
	revoke := func(ask string) chan answer {
		done := make(chan answer, 1)
		go func() {
			now, err := b.client.Revoke(context.Background(), client.Revocation{ID: ask})
			done <- answer{now, err}
		}()
		return done
	}
	silent := func(what string, done chan answer) {
		select {
		case a := <-done:
			t.Fatalf("%s: answered %+v", what, a)
		case <-time.After(50 * time.Millisecond):
		}
	}
	first, err := b.client.Watch(t.Context(), "w-1", client.Watched{})
	if err != nil || first.Seq != 0 || len(first.Revoked) != 0 {
		t.Fatalf("%+v, %v", first, err)
	}
	// The daemon is another one now, and knows who watched the one before.
	b.stop()
	b = startBench(t, b.c, b.cfg)
	done := revoke("a-1")
	silent("before the watcher asked the new daemon", done)
	told, err := b.client.Watch(t.Context(), "w-1", b.known(first.Seq))
	if err != nil || told.Seq != 1 || len(told.Revoked) != 1 || told.Revoked[0].Ask != "a-1" || told.Revoked[0].Pod != "p-1" || len(told.Revoked[0].Grants) != 1 {
		t.Fatalf("told %+v, %v", told, err)
	}
	silent("before the watcher said that it knows", done)
	watching, stop := context.WithCancel(t.Context())
	defer stop()
	go b.client.Watch(watching, "w-1", b.known(told.Seq))
	if a := <-done; a.err != nil || !a.now.Closed {
		t.Errorf("%+v", a)
	}
	// One that does not ask again holds it up until its lease has ended.
	done = revoke("a-2")
	silent("without a word of the watcher", done)
	b.mu.Lock()
	w := b.watchers["w-1"]
	w.seen = time.Now().Add(-client.Lease + 100*time.Millisecond)
	b.watchers["w-1"] = w
	b.broadcast()
	b.mu.Unlock()
	if a := <-done; a.err != nil || !a.now.Closed {
		t.Errorf("%+v", a)
	}
}

// A node takes back what a pod asked before a time, and is told what of it had been granted.
func TestWithdraw(t *testing.T) {
	b := newBench(t, nil)
	b.granted(t, "a-unused", 0)
	task := b.granted(t, "a-task", 4)
	spent := b.granted(t, "a-spent", 0)
	if err := b.use(t, "a-task", "r-1", task); err != nil {
		t.Fatal(err)
	}
	if err := b.use(t, "a-spent", "r-2", spent); err != nil {
		t.Fatal(err)
	}
	b.submit(t, askAt(t, b.c, "a-pending", nil))
	before := b.c.ms.Load() + 1
	b.c.advance(time.Second)
	b.submit(t, askAt(t, b.c, "a-later", nil))
	gone, err := b.client.Withdraw(t.Context(), "p-1", client.Withdrawal{Before: before, Reason: "the node was started anew"})
	states := map[string]string{}
	for _, a := range gone {
		states[a.Ask] = a.State
	}
	if err != nil || len(states) != 3 || states["a-unused"] != client.Void || states["a-task"] != client.Void || states["a-spent"] != client.Spent {
		t.Errorf("gone %v, %v", states, err)
	}
	for ask, want := range map[string]string{"a-pending": client.Withdrawn, "a-later": client.Pending, "a-unused": client.Revoked, "a-task": client.Revoked, "a-spent": client.Granted} {
		if s, err := b.client.Status(t.Context(), ask); err != nil || s.State != want {
			t.Errorf("%s: %+v, %v; want %s", ask, s, err, want)
		}
	}
	if gone, err := b.client.Withdraw(t.Context(), "p-2", client.Withdrawal{Before: before}); err != nil || len(gone) != 0 {
		t.Errorf("another pod: %+v, %v", gone, err)
	}
}

// A daemon that was killed between counting a use and recording it: the next one records it,
// once.
func TestUseOfAKilledDaemonIsRecorded(t *testing.T) {
	b := newBench(t, nil)
	b.granted(t, "a-1", 1)
	if err := b.store.addUse("a-1", 1, "r-1", b.c.now().UnixMilli()); err != nil {
		t.Fatal(err)
	}
	if known, err := b.store.HasUse("r-1"); known || err != nil {
		t.Fatalf("known %v, %v", known, err)
	}
	for range 2 {
		b.stop()
		b = startBench(t, b.c, b.cfg)
		var entry string
		var n int
		if err := b.store.db.QueryRow("SELECT count(*), max(entry) FROM record WHERE json_extract(entry, '$.kind') = ?", nucleus.KindApprovalUse).Scan(&n, &entry); err != nil || n != 1 {
			t.Fatalf("%d uses recorded, %v", n, err)
		}
		var e nucleus.Entry
		if err := json.Unmarshal([]byte(entry), &e); err != nil || e.Permit != "r-1" || e.Ask != "a-1" || len(e.Grants) != 1 || !strings.Contains(string(e.Data), `"n":1`) {
			t.Errorf("recorded %s, %v", entry, err)
		}
	}
}
