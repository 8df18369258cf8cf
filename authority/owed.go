package authority

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"cal/approval/client"
	"cal/nucleus"
)

// What takes something back, an approver's removal too, holds in this process before anything is
// written: a database or a log that fails keeps nobody's grant alive. It is kept in the database
// with the entry that the log is owed for it, then recorded. As long as it is not kept no
// watcher is answered, so that passages end with their leases; as long as the log is owed
// anything nothing new is decided. Every call that decides, and every watcher's, tries again.

// owing is what could not be kept or recorded yet. All of it is guarded by mu.
type owing struct {
	voids   map[string]void // by ask
	removed map[string]bool // approvers
	uses    []uncounted
	entries bool // the log is owed some
}

// void is what was granted for an ask and is taken back.
type void struct {
	row    askRow
	grants []string
	by     string
	why    string
	at     int64
}

// uncounted is a use that was counted, could not be recorded, and of which nobody was told.
type uncounted struct {
	row    askRow
	n      int
	permit string
}

// unkept reports whether something that was taken back would come back with the next daemon.
func (o *owing) unkept() bool { return len(o.voids)+len(o.removed) > 0 }

// settle keeps and records what is owed. The caller holds mu.
func (a *Authority) settle() error {
	var errs []error // one that cannot be kept holds up none of the others
	for _, name := range slices.Sorted(maps.Keys(a.owing.removed)) {
		errs = append(errs, a.keepRemoval(name))
	}
	for _, ask := range slices.Sorted(maps.Keys(a.owing.voids)) {
		errs = append(errs, a.keepVoid(a.owing.voids[ask]))
	}
	if err := errors.Join(append(errs, a.payOwed())...); err != nil {
		return err
	}
	for len(a.owing.uses) > 0 {
		if err := a.uncount(a.owing.uses[0]); err != nil {
			return err
		}
		a.owing.uses = a.owing.uses[1:]
	}
	return nil
}

// payOwed records what was kept before. One that is killed in between records it again.
func (a *Authority) payOwed() error {
	for a.owing.entries {
		seq, entry, err := a.store.owed()
		switch {
		case errors.Is(err, errUnknown):
			a.owing.entries = false
			return nil
		case err != nil:
			return unavailable(err)
		}
		if err := a.cfg.Recorder.Record(entry); err != nil {
			return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot record %s, which holds already: %v", entry.Kind, err)
		}
		if err := a.store.paid(seq); err != nil {
			return unavailable(err)
		}
	}
	return nil
}

// takeBack makes grants for an ask void. The caller holds mu, and settles.
func (a *Authority) takeBack(row askRow, grants []string, by, why string) {
	if a.owing.voids == nil {
		a.owing.voids = map[string]void{}
	}
	for _, grant := range a.owing.voids[row.id].grants { // of another who approved, not kept yet
		if !slices.Contains(grants, grant) {
			grants = append(grants, grant)
		}
	}
	a.owing.voids[row.id] = void{row, grants, by, why, a.millis()}
	a.broadcast()
}

func (a *Authority) keepVoid(v void) error {
	entry, err := a.entry(nucleus.KindApprovalRevoke, v.row.ask(), v.row.digest, map[string]any{"why": v.why, "uses": v.row.uses, "at_ms": v.at}, func(e *nucleus.Entry) { e.Actor, e.Grants = v.by, v.grants })
	if err != nil {
		return err
	}
	if err := a.store.void(v, entry); err != nil {
		return unavailable(err)
	}
	delete(a.owing.voids, v.row.id)
	a.owing.entries = true
	a.broadcast()
	return nil
}

// keepRemoval keeps that an approver was removed, and takes back what it granted.
func (a *Authority) keepRemoval(name string) error {
	f := &a.files[slices.IndexFunc(a.files, func(k keyFile) bool { return k.Approver == name })]
	entry, err := a.keyEntry(nucleus.KindKeyRemove, f.Identity, actor)
	if err != nil {
		return err
	}
	if err := a.store.remove(name, f.Removed, entry); err != nil {
		return unavailable(err)
	}
	a.owing.entries = true
	if _, err := a.takeBackOf(name); err != nil {
		return err
	}
	if err := a.takeKey(f); err != nil {
		return err
	}
	delete(a.owing.removed, name)
	return nil
}

// takeBackOf takes back what a removed approver granted and can still be used: an ask that
// others have to grant too goes on without it.
func (a *Authority) takeBackOf(name string) (asks []string, err error) {
	rows, err := a.store.grantedBy(name, a.millis()-longestLife)
	if err != nil {
		return nil, unavailable(err)
	}
	for _, row := range rows {
		if !a.living(row) {
			continue
		}
		grants := row.grantIDs()
		if g, _ := row.given(name); row.state == client.Pending {
			grants = []string{g.Grant}
		}
		a.takeBack(row, grants, actor, "approver "+name+" was removed")
		asks = append(asks, row.id)
	}
	return asks, nil
}

// uncount takes back the counting of a use. Where the log holds it all the same, it says that it
// does not count.
func (a *Authority) uncount(u uncounted) error {
	known, err := a.cfg.Recorder.HasUse(u.permit)
	if err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot read its log: %v", err)
	}
	if known {
		err := a.record(nucleus.KindApprovalRefuse, u.row.ask(), u.row.digest, map[string]any{"why": "the use recorded before does not count: nobody was told of it", "uncounted": true},
			func(e *nucleus.Entry) { e.Permit, e.Grants = u.permit, u.row.grantIDs() })
		if err != nil {
			return err
		}
	}
	return unavailable(a.store.dropUse(u.row.id, u.n, u.permit))
}

const settleEvery = 5 * time.Second

// keepSettled settles until ctx ends: what was taken back is kept also where nobody calls.
func (a *Authority) keepSettled(ctx context.Context) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.mu.Lock()
			_ = a.settle() // the next call says so
			a.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}
