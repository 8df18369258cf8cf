package authority

import (
	"bytes"
	"crypto/ed25519"
	"log/slog"
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
	if err := a.settle(); err != nil {
		return fail(err)
	}
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
	at := slices.IndexFunc(a.files, func(k keyFile) bool { return k.Approver == name })
	a.files[at].Removed = a.millis() // from now on: what follows can fail
	if a.owing.removed == nil {
		a.owing.removed = map[string]bool{}
	}
	a.owing.removed[name] = true
	gone := client.Removed{Name: name, Revoked: []string{}}
	if asks, err := a.takeBackOf(name); err == nil { // else settle says so
		gone.Revoked = append(gone.Revoked, asks...)
	}
	a.broadcast()
	if err := a.settle(); a.owing.unkept() {
		return gone, nucleus.Errorf(nucleus.KindUnavailable, "approver %s is removed as long as this authority runs. But that could not be kept, which is tried again: %v", name, err)
	} else if err != nil {
		slog.Error("that an approver was removed could not be recorded yet", "error", err)
		gone.Unrecorded = true
	}
	return gone, nil
}

// takeKey takes the secret of an approver who was removed out of the file, which stays for what it
// vouched for.
func (a *Authority) takeKey(f *keyFile) error {
	f.Sealed = nil
	raw, err := nucleus.Canonical(*f)
	if err != nil {
		return err
	}
	return durable.WriteFile(keyPath(a.cfg.Dir, f.Approver), raw, 0o600)
}

// keepRemoved makes sure that who was removed stays so, and that nothing of theirs is left. What
// counts is the database: a file of an approver can be put back as it was by who has a copy, and
// what it says of the removal nobody signs.
func (a *Authority) keepRemoved() error {
	for i := range a.files {
		f := &a.files[i]
		at, err := a.store.removedAt(f.Approver)
		if err != nil {
			return unavailable(err)
		}
		switch {
		case f.Removed != 0 && at == 0: // by a version that told the file alone
			if err := a.store.addRemoved(f.Approver, f.Removed); err != nil {
				return unavailable(err)
			}
		case f.Removed == 0 && at != 0:
			f.Removed = at
			if err := a.takeKey(f); err != nil {
				return err
			}
		}
		if f.Removed != 0 {
			if _, err := a.takeBackOf(f.Approver); err != nil {
				return err
			}
		}
	}
	return nil
}

// removed reports whether one of those who granted an ask is no approver any more.
func (a *Authority) removed(row askRow) (name string, removed bool) {
	for _, g := range row.grants {
		if slices.ContainsFunc(a.files, func(f keyFile) bool { return f.Approver == g.Approver && f.Removed != 0 }) {
			return g.Approver, true
		}
	}
	return "", false
}

// recordKey records that an approver's key comes.
func (a *Authority) recordKey(kind string, i Identity, by string) error {
	entry, err := a.keyEntry(kind, i, by)
	if err != nil {
		return err
	}
	if err := a.cfg.Recorder.Record(entry); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot record %s of approver %s: %v", kind, i.Approver, err)
	}
	return nil
}

// keyEntry says that an approver's key comes or goes.
func (a *Authority) keyEntry(kind string, i Identity, by string) (nucleus.Entry, error) {
	raw, err := nucleus.Canonical(i.public())
	return nucleus.Entry{Time: a.cfg.Now().UTC().Format(time.RFC3339Nano), Kind: kind, Actor: by, Data: raw}, err
}
