package authority

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// What was granted is taken back at once where it is used by word of the authority, which refuses
// the next use. A passage is used without asking, so every node that has opened one watches what
// is taken back, and holds its passages open only as long as its last word from here is young: a
// lease. Who takes one back is answered when each watcher has asked again since, or its lease has
// ended.

// watcher is a node that watches.
type watcher struct {
	knows int64     // up to which revocation
	seen  time.Time // on the monotonic clock
}

// living reports whether something of what was granted can still be used.
func (a *Authority) living(row askRow) bool {
	switch a.approvalState(row) {
	case client.Unused, client.Open, client.Partly:
		return true
	}
	return false
}

// approvalState is the state of what was granted now.
func (a *Authority) approvalState(row askRow) string {
	now, task, passage := a.millis(), row.task(), row.about.Passage
	switch {
	case a.isVoid(row):
		return client.Void
	case row.stateAt(now) == client.Pending:
		return client.Partly
	case row.state != client.Granted:
		return client.Over
	case row.uses == 0 && now < row.expires:
		return client.Unused
	case row.uses == 0:
		return client.Over
	case task != nil && row.uses >= task.Uses, task == nil && passage == nil:
		return client.Spent
	case task != nil && now < task.Until, task == nil && now < a.passageEnd(row, passage):
		return client.Open
	}
	return client.Over
}

// isVoid reports whether all that was granted was taken back, kept or not.
func (a *Authority) isVoid(row askRow) bool {
	v, ok := a.owing.voids[row.id]
	return row.state == client.Revoked || ok && len(v.grants) == len(row.grants)
}

// passageEnd is when a passage that was opened by the first use ends at the latest.
func (a *Authority) passageEnd(row askRow, passage *nucleus.Passage) int64 {
	uses, err := a.store.usesOf(row.id)
	if err != nil || len(uses) == 0 {
		return row.expires + passage.Millis
	}
	return uses[0].Used + passage.Millis
}

// Approvals lists what was granted, newest first.
func (a *Authority) Approvals(of client.ApprovalsOf) ([]client.Approval, error) {
	if of.Limit < 0 || of.Limit > client.MaxApprovals {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "limit %d, want at most %d", of.Limit, client.MaxApprovals)
	}
	most := cmp.Or(of.Limit, client.MaxApprovals)
	since := int64(0)
	if !of.All {
		since = a.millis() - longestLife
	}
	list := []client.Approval{}
	for skip := 0; len(list) < most; skip += approvalsAtOnce {
		rows, err := a.store.newest(of.Pod, since, skip)
		if err != nil {
			return nil, unavailable(err)
		}
		for _, row := range rows {
			if len(list) == most || !of.All && !a.living(row) {
				continue
			}
			item, err := a.approval(row)
			if err != nil {
				return nil, err
			}
			list = append(list, item)
		}
		if len(rows) < approvalsAtOnce {
			break
		}
	}
	return list, nil
}

const (
	// longestLife is when nothing of an ask can be used any more, after it has expired, in ms: a
	// task or a passage stands for an hour at most.
	longestLife = max(nucleus.MaxTaskMillis, approval.MaxPassage)

	approvalsAtOnce = 32 // rows in memory
)

func (a *Authority) approval(row askRow) (client.Approval, error) {
	passage := row.about.Passage
	item := client.Approval{
		Ask: row.id, State: a.approvalState(row), Pod: row.pod, Op: row.op, Summary: row.summary, Need: row.need, Task: row.task(), Until: row.expires,
		Grants: []client.Given{}, Reason: row.reason, Shed: row.shed(),
	}
	for _, g := range row.grants {
		g.Token = ""
		item.Grants = append(item.Grants, g)
	}
	if item.State == client.Void {
		item.Ended = row.ended
	}
	var err error
	if item.Uses, err = a.store.usesOf(row.id); err != nil {
		return item, unavailable(err)
	}
	switch {
	case item.Task != nil && len(item.Uses) > 0:
		item.Until = item.Task.Until
	case item.Task == nil && passage != nil:
		item.Passage = passage
		if len(item.Uses) > 0 {
			item.Until = a.passageEnd(row, passage)
		}
	}
	return item, nil
}

// Revoke takes back what was granted for an ask, or to a pod, and waits until nothing of it is
// open.
func (a *Authority) Revoke(ctx context.Context, r client.Revocation) (client.RevokedNow, error) {
	began := time.Now()
	done, seq, err := a.revokeAll(r)
	if err != nil {
		return done, err
	}
	// Everything else is used by word of the authority alone, use by use.
	open := slices.ContainsFunc(done.Revoked, func(a client.Approval) bool {
		return len(a.Uses) > 0 && (a.Op == nucleus.NetConnect || a.Op == nucleus.WebFetch)
	})
	done.Closed = !open || a.closed(ctx, seq)
	done.Millis = time.Since(began).Milliseconds()
	return done, nil
}

func (a *Authority) revokeAll(r client.Revocation) (client.RevokedNow, int64, error) {
	done := client.RevokedNow{Revoked: []client.Approval{}}
	if len(r.Reason) > approval.MaxReason {
		return done, 0, nucleus.Errorf(nucleus.KindInvalid, "the reason has %d bytes, at most %d are allowed", len(r.Reason), approval.MaxReason)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.settle() // what it cannot do is tried again below
	rows, err := a.meant(r.ID)
	if err != nil {
		return done, 0, err
	}
	var found bool
	var revoked []string
	for _, row := range rows {
		if a.living(row) {
			a.takeBack(row, row.grantIDs(), actor, r.Reason)
			revoked = append(revoked, row.id)
		}
		found = found || a.isVoid(row)
	}
	if !found {
		return done, 0, nucleus.Errorf(nucleus.KindNotFound, "%q is no ask, grant or pod with something granted that could still be used", r.ID)
	}
	if err := a.settle(); a.owing.unkept() {
		return done, 0, nucleus.Errorf(nucleus.KindUnavailable, "what was granted is taken back as long as this authority runs: nothing of it is used, and nodes close their passages within %v. But that could not be kept, which is tried again: %v", client.Lease, err)
	} else if err != nil {
		slog.Error("what was taken back could not be recorded yet", "error", err)
		done.Unrecorded = true
	}
	for _, id := range revoked {
		row, err := a.store.ask(id)
		if err != nil {
			return done, 0, unavailable(err)
		}
		item, err := a.approval(row)
		if err != nil {
			return done, 0, err
		}
		done.Revoked = append(done.Revoked, item)
	}
	_, seq, err := a.store.revocations(-1)
	return done, seq, unavailable(err)
}

// meant are the asks that an id stands for.
func (a *Authority) meant(id string) ([]askRow, error) {
	if id == "" {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "no ask, grant or pod is named")
	}
	if ask, err := a.store.askOf(id); err == nil {
		id = ask
	} else if !errors.Is(err, errUnknown) {
		return nil, unavailable(err)
	}
	row, err := a.store.ask(id)
	if err == nil {
		if len(row.grants) == 0 {
			return nil, nil
		}
		return []askRow{row}, nil
	} else if !errors.Is(err, errUnknown) {
		return nil, unavailable(err)
	}
	rows, err := a.store.granted(id)
	return rows, unavailable(err)
}

// revokePatience is how long it is waited for watchers. Who says nothing has nothing open after
// its lease; who asks on and on without knowing holds nobody up for longer.
const revokePatience = client.Lease + time.Second

// closed waits until every watcher knows of revocation seq, or has nothing open any more. False says
// that one was there to the end which did not say that it knows.
func (a *Authority) closed(ctx context.Context, seq int64) bool {
	patience := time.NewTimer(a.patience)
	defer patience.Stop()
	for over := false; ; {
		a.mu.Lock()
		left := a.lag(seq)
		changed := a.changed
		a.mu.Unlock()
		if left <= 0 || over {
			return left <= 0
		}
		lapse := time.NewTimer(left)
		select {
		case <-changed:
		case <-lapse.C:
		case <-patience.C:
			over = true // one last look
		case <-ctx.Done():
			lapse.Stop()
			return false
		}
		lapse.Stop()
	}
}

// lag is how long it takes at most until every watcher knows of revocation seq, or its lease has
// ended. The caller holds mu.
func (a *Authority) lag(seq int64) time.Duration {
	var longest time.Duration
	for id, w := range a.watchers {
		left := client.Lease - time.Since(w.seen)
		switch {
		case left <= 0:
			delete(a.watchers, id)
			_ = a.store.dropWatcher(id) // else the next daemon waits for it once more
		case w.knows < seq:
			longest = max(longest, left)
		}
	}
	return longest
}

const maxWatchers = 1000

// Watch answers when something was taken back after what is known, at the latest after WatchWait. Who
// asks says by the number that nothing up to there is open with it. One of another database says
// nothing of this one.
func (a *Authority) Watch(ctx context.Context, id string, known client.Watched) (client.Watched, error) {
	after := known.Seq
	if known.Database != a.store.id {
		after = -1
	}
	if err := approval.CheckName("watcher", id); err != nil {
		return client.Watched{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	deadline := time.NewTimer(client.WatchWait)
	defer deadline.Stop()
	for waited, asked := false, time.Now(); ; {
		a.mu.Lock()
		if err := a.settle(); a.owing.unkept() { // whose lease ends then
			a.mu.Unlock()
			return client.Watched{}, err
		}
		_, again := a.watchers[id]
		if len(a.watchers) >= maxWatchers {
			a.lag(0) // forgets those whose lease has ended
		}
		if n := len(a.watchers); n >= maxWatchers && !again {
			a.mu.Unlock()
			return client.Watched{}, nucleus.Errorf(nucleus.KindUnavailable, "%d nodes watch, no more are taken", n)
		}
		asks, last, err := a.store.revocations(after)
		if err == nil && !again {
			err = a.store.addWatcher(id) // before it is told anything: the next daemon knows of it
		}
		if w := a.watchers[id]; err == nil && !waited {
			a.watchers[id] = watcher{knows: max(after, 0), seen: asked}
			if after > w.knows {
				a.broadcast()
			}
		}
		changed := a.changed
		a.mu.Unlock()
		if err != nil {
			return client.Watched{}, unavailable(err)
		}
		if len(asks) > 0 || after != last || waited {
			return a.voided(asks, last)
		}
		select {
		case <-changed:
		case <-deadline.C:
			waited = true // one last look
		case <-ctx.Done():
			return client.Watched{}, ctx.Err()
		}
	}
}

func (a *Authority) voided(asks []string, last int64) (client.Watched, error) {
	w := client.Watched{Database: a.store.id, Seq: last, Revoked: []client.Voided{}}
	for _, id := range asks {
		row, err := a.store.ask(id)
		if err != nil {
			return w, unavailable(err)
		}
		v := client.Voided{Ask: id, Pod: row.pod, Reason: row.reason, Grants: []string{}}
		for _, g := range row.grants {
			v.Grants = append(v.Grants, g.Grant)
		}
		w.Revoked = append(w.Revoked, v)
	}
	return w, nil
}

// Withdraw takes back what a pod asked before a time, by its node's word: nobody waits for the
// answer any more, and nothing can use what was granted.
func (a *Authority) Withdraw(pod string, w client.Withdrawal) ([]client.Approval, error) {
	if len(w.Reason) > approval.MaxReason {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "the reason has %d bytes, at most %d are allowed", len(w.Reason), approval.MaxReason)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.settle() // what it cannot do is tried again below
	rows, err := a.store.asks(" WHERE pod = ? AND created_ms < ? AND state IN ('pending', 'granted') ORDER BY created_ms, id", pod, w.Before)
	if err != nil {
		return nil, unavailable(err)
	}
	var ended, voided []string
	var errs []error
	for _, row := range rows {
		switch {
		case row.stateAt(a.millis()) == client.Pending:
			errs = append(errs, a.withdraw(row, w.Reason))
		case a.living(row):
			a.takeBack(row, row.grantIDs(), actor, w.Reason)
			voided = append(voided, row.id)
		case row.uses > 0:
			ended = append(ended, row.id)
		}
	}
	if err := a.settle(); a.owing.unkept() {
		errs = append(errs, err)
	}
	gone := []client.Approval{}
	for _, id := range slices.Concat(ended, voided) {
		row, err := a.store.ask(id)
		if err != nil {
			return gone, unavailable(err)
		}
		item, err := a.approval(row)
		if err != nil {
			return gone, err
		}
		gone = append(gone, item)
	}
	a.broadcast()
	return gone, errors.Join(errs...)
}

// withdraw ends an ask that is pending. The log is owed the entry.
func (a *Authority) withdraw(row askRow, why string) error {
	entry, err := a.entry(nucleus.KindApprovalRefuse, row.ask(), row.digest, map[string]any{"why": "withdrawn: " + why}, nil)
	if err != nil {
		return err
	}
	a.owing.entries = true
	return unavailable(a.store.withdraw(row.id, why, a.millis(), entry))
}

// Report takes a node's word on what came of a use.
func (a *Authority) Report(ask string, o client.Outcome) error {
	switch o.Status {
	case nucleus.OutcomeDone, nucleus.OutcomeFailed, nucleus.OutcomeRefused, nucleus.OutcomeUnknown:
	default:
		return nucleus.Errorf(nucleus.KindInvalid, "unknown outcome %q", o.Status)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return unavailable(a.store.setOutcome(ask, o.Permit, o.Status))
}
