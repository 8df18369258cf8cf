package authority

import (
	"bytes"
	"crypto/ed25519"
	"slices"
	"time"

	"cal/approval/client"
	"cal/internal/durable"
	"cal/nucleus"
)

// maxSealed is the size in bytes of a sealed key that is taken; they have some 500.
const maxSealed = 8 << 10

// AddApprover takes the key of one more approver, on the word of one who is there. It is
// recorded before the key is. Machines that were started before do not know it.
func (a *Authority) AddApprover(n client.NewApprover) (nucleus.Approver, error) {
	fail := func(err error) (nucleus.Approver, error) { return nucleus.Approver{}, err }
	if err := checkNames(n.Name, n.Phrase); err != nil {
		return fail(nucleus.Errorf(nucleus.KindInvalid, "%v", err))
	}
	if len(n.Key) != ed25519.PublicKeySize || len(n.Sealed) == 0 || len(n.Sealed) > maxSealed {
		return fail(nucleus.Errorf(nucleus.KindInvalid, "a public key of %d bytes with a sealed one of %d, want %d and 1 to %d", len(n.Key), len(n.Sealed), ed25519.PublicKeySize, maxSealed))
	}
	f := keyFile{Identity{Approver: n.Name, Kind: nucleus.ApproverEd25519, PublicKey: n.Key, Phrase: n.Phrase, AddedBy: n.By}, n.Sealed, &n.Vouched, 0}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.admitApprover(f, func() error { return nil }); err != nil {
		return fail(err)
	}
	return f.public(), nil
}

// admitApprover makes an approver of a key that one who can approve now, with a passphrase, has
// vouched for. prepare is done before it is there. The caller holds mu.
func (a *Authority) admitApprover(f keyFile, prepare func() error) error {
	if f.AddedBy == "" {
		return nucleus.Errorf(nucleus.KindInvalid, "nobody is named who vouches for %s", f.Approver)
	}
	voucher, err := choose(a.files, f.AddedBy)
	if err != nil {
		return err
	}
	if voucher.Kind != nucleus.ApproverEd25519 {
		return hasPasskey(voucher)
	}
	if err := a.newName(f.Approver); err != nil {
		return err
	}
	if slices.ContainsFunc(a.files, func(k keyFile) bool { return bytes.Equal(k.PublicKey, f.PublicKey) }) {
		return nucleus.Errorf(nucleus.KindConflict, "the key of %s is, or was, another approver's", f.Approver)
	}
	if !vouches([]keyFile{voucher}, f) {
		return nucleus.Errorf(nucleus.KindForbidden, "%s has not vouched for approver %s with this key", voucher.Approver, f.Approver)
	}
	if err := a.recordKey(nucleus.KindKeyNew, f.Identity, voucher.Approver); err != nil {
		return err
	}
	if err := prepare(); err != nil {
		return unavailable(err)
	}
	if err := writeNew(a.cfg.Dir, f); err != nil {
		return err
	}
	a.files = append(a.files, f)
	a.broadcast()
	return nil
}

// newName refuses the name of an approver that cannot be added. The caller holds mu.
func (a *Authority) newName(name string) error {
	switch at := slices.IndexFunc(a.files, func(k keyFile) bool { return k.Approver == name }); {
	case at >= 0:
		return nucleus.Errorf(nucleus.KindConflict, "there is, or was, an approver %q; a name is used once", name)
	case len(a.files) >= maxApprovers:
		return nucleus.Errorf(nucleus.KindInvalid, "there are %d approvers, those who were removed among them; no more are taken", len(a.files))
	}
	return nil
}

// RemoveApprover takes an approver's key away for good. What it granted and was not used is
// void, at once. The last one with a passphrase stays: without any nobody could add one.
func (a *Authority) RemoveApprover(name string) (client.Removed, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if name == "" {
		return client.Removed{}, nucleus.Errorf(nucleus.KindInvalid, "no approver is named")
	}
	f, err := choose(a.files, name)
	if err != nil {
		return client.Removed{}, err
	}
	if f.Kind == nucleus.ApproverEd25519 && !slices.ContainsFunc(a.files, func(k keyFile) bool {
		return k.Kind == f.Kind && k.Removed == 0 && k.Approver != name
	}) {
		return client.Removed{}, nucleus.Errorf(nucleus.KindConflict, "%s is the last approver with a passphrase, which adding one takes; add another first", name)
	}
	gone := client.Removed{Name: name, Revoked: []string{}}
	if err := a.recordKey(nucleus.KindKeyRemove, f.Identity, actor); err != nil {
		return gone, err
	}
	granted, err := a.store.granted("")
	if err != nil {
		return gone, unavailable(err)
	}
	for _, row := range granted {
		if _, ok := row.given(name); ok && a.living(row) {
			if err := a.voidGrantOf(name, row); err != nil {
				return gone, err
			}
			gone.Revoked = append(gone.Revoked, row.id)
		}
	}
	at := a.millis()
	if err := a.store.addRemoved(name, at); err != nil {
		return gone, unavailable(err)
	}
	a.broadcast()
	return gone, a.takeKey(slices.IndexFunc(a.files, func(k keyFile) bool { return k.Approver == name }), at)
}

// takeKey takes the secret of an approver who was removed out of the file, which stays for what it
// vouched for.
func (a *Authority) takeKey(i int, at int64) error {
	f := &a.files[i]
	f.Sealed, f.Removed = nil, at
	raw, err := nucleus.Canonical(*f)
	if err != nil {
		return err
	}
	return durable.WriteFile(keyPath(a.cfg.Dir, f.Approver), raw, 0o600)
}

// keepRemoved makes sure that who was removed stays so. What counts is the database: a file of an
// approver can be put back as it was by who has a copy, and what it says of the removal nobody signs.
func (a *Authority) keepRemoved() error {
	for i, f := range a.files {
		if f.Removed != 0 { // also by a version that told the file alone
			if err := a.store.addRemoved(f.Approver, f.Removed); err != nil {
				return unavailable(err)
			}
			continue
		}
		at, err := a.store.removedAt(f.Approver)
		if err != nil {
			return unavailable(err)
		}
		if at != 0 {
			if err := a.takeKey(i, at); err != nil {
				return err
			}
		}
	}
	return nil
}

// voidGrantOf takes back what a removed approver granted for an ask: an ask that others have to
// grant too goes on without it.
func (a *Authority) voidGrantOf(name string, row askRow) error {
	why := "approver " + name + " was removed"
	if row.state != client.Pending {
		return a.revoke(row, actor, why)
	}
	_, ask, err := a.known(row.id)
	if err != nil {
		return err
	}
	g, _ := row.given(name)
	err = a.record(nucleus.KindApprovalRevoke, ask, row.digest, map[string]any{"why": why}, func(e *nucleus.Entry) { e.Grants = []string{g.Grant} })
	if err != nil {
		return err
	}
	return unavailable(a.store.dropGrant(g.Grant))
}

// recordKey records that an approver's key comes or goes.
func (a *Authority) recordKey(kind string, i Identity, by string) error {
	raw, err := nucleus.Canonical(i.public())
	if err != nil {
		return err
	}
	if err := a.cfg.Recorder.Record(nucleus.Entry{Time: a.cfg.Now().UTC().Format(time.RFC3339Nano), Kind: kind, Actor: by, Data: raw}); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot record %s of approver %s: %v", kind, i.Approver, err)
	}
	return nil
}
