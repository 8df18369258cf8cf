package authority

import (
	"crypto/ed25519"
	"database/sql"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

func passphraseOf(name string) string { return "secret of " + name }

// add makes approvers by the word of ann.
func (b *bench) add(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		made, err := b.addBy(t, newcomer{name, "lamp of " + name, passphraseOf(name), "ann", passphrase})
		if err != nil || made.Name != name {
			t.Fatalf("adding %s: %+v, %v", name, made, err)
		}
	}
}

// newcomer is what is typed to add an approver.
type newcomer struct{ Name, Phrase, Passphrase, By, ByPassphrase string }

// addBy does what the program at the terminal does.
func (b *bench) addBy(t *testing.T, n newcomer) (nucleus.Approver, error) {
	t.Helper()
	key, err := ReadKey(b.cfg.Dir, n.By)
	if err != nil {
		return nucleus.Approver{}, err
	}
	signer, err := key.Open(n.ByPassphrase)
	if err != nil {
		return nucleus.Approver{}, err
	}
	defer signer.Close()
	made, err := signer.NewApprover(n.Name, n.Phrase, n.Passphrase, lowWork)
	if err != nil {
		return nucleus.Approver{}, err
	}
	return b.client.AddApprover(t.Context(), made)
}

func (b *bench) grantBy(t *testing.T, ask, digest, name string) (client.Status, error) {
	t.Helper()
	secret := passphraseOf(name)
	if name == "ann" {
		secret = passphrase
	}
	return b.decide(t, ask, typed{Approve: true, Approver: name, Reason: "by " + name, Passphrase: secret})
}

func names(list []nucleus.Approver) (names []string) {
	for _, a := range list {
		names = append(names, a.Name)
	}
	return names
}

// One who can approve adds another; a name is used once; the last one stays.
func TestApprovers(t *testing.T) {
	b := newBench(t, nil)
	good := newcomer{Name: "bob", Phrase: "red lamp", Passphrase: passphraseOf("bob"), By: "ann", ByPassphrase: passphrase}
	for what, c := range map[string]struct {
		change func(*newcomer)
		kind   nucleus.Kind
		text   string
	}{
		"wrong passphrase":  {func(n *newcomer) { n.ByPassphrase = "wrong horse" }, nucleus.KindForbidden, "wrong passphrase"},
		"no passphrase":     {func(n *newcomer) { n.ByPassphrase = "" }, nucleus.KindForbidden, "no passphrase"},
		"by a stranger":     {func(n *newcomer) { n.By = "eve" }, nucleus.KindNotFound, "there is no approver"},
		"a known name":      {func(n *newcomer) { n.Name = "ann" }, nucleus.KindConflict, "used once"},
		"an odd name":       {func(n *newcomer) { n.Name = "../ann" }, nucleus.KindInvalid, "letters"},
		"short passphrase":  {func(n *newcomer) { n.Passphrase = "short" }, nucleus.KindInvalid, "characters"},
		"no phrase":         {func(n *newcomer) { n.Phrase = "" }, nucleus.KindInvalid, "phrase"},
		"phrase not UTF-8":  {func(n *newcomer) { n.Phrase = "" + strings.Repeat("x", 300) }, nucleus.KindInvalid, "phrase"},
		"nobody is removed": {nil, nucleus.KindNotFound, "there is no approver"},
		"the last one":      {nil, nucleus.KindConflict, "last approver"},
	} {
		n := good
		var err error
		switch what {
		case "nobody is removed":
			_, err = b.client.RemoveApprover(t.Context(), "bob")
		case "the last one":
			_, err = b.client.RemoveApprover(t.Context(), "ann")
		default:
			c.change(&n)
			_, err = b.addBy(t, n)
		}
		wantKind(t, what, err, c.kind, c.text)
	}
	b.add(t, "bob", "carol")
	info, err := b.client.Info(t.Context())
	if err != nil || !slices.Equal(names(info.Approvers), []string{"ann", "bob", "carol"}) {
		t.Fatalf("info %+v, %v", info, err)
	}
	if gone, err := b.client.RemoveApprover(t.Context(), "bob"); err != nil || len(gone.Revoked) != 0 {
		t.Fatalf("removed %+v, %v", gone, err)
	}
	_, err = b.addBy(t, good)
	wantKind(t, "the name of one who was removed", err, nucleus.KindConflict, "used once")
	wantRecord(t, b.cfg.Dir, "key.new", "key.new", "key.remove")
	b.stop()
	b = startBench(t, b.c, b.cfg)
	if got := names(b.Approvers()); !slices.Equal(got, []string{"ann", "carol"}) {
		t.Errorf("after a restart %v", got)
	}
	list, err := ReadApprovers(b.cfg.Dir)
	if err != nil || len(list) != 3 || list[1].Removed == 0 || list[2].AddedBy != "ann" {
		t.Errorf("list %+v, %v", list, err)
	}
	if raw, err := os.ReadFile(keyPath(b.cfg.Dir, "bob")); err != nil || strings.Contains(string(raw), "sealed") {
		t.Errorf("the key of who was removed: %s, %v", raw, err)
	}
}

// Who can write into the directory and knows no passphrase cannot put a key beside the others.
func TestPlantedApprover(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	b.stop()
	dir := b.cfg.Dir
	read := func(name string) (f keyFile) {
		raw, err := os.ReadFile(keyPath(dir, name))
		if err == nil {
			err = json.Unmarshal(raw, &f)
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	write := func(f keyFile) {
		raw, err := nucleus.Canonical(f)
		if err == nil {
			err = os.WriteFile(keyPath(dir, f.Approver), raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	public, secret, _ := ed25519.GenerateKey(nil)
	eve, err := newKey(Identity{Approver: "eve", Phrase: "x", AddedBy: "ann"}, "eve's own secret", lowWork)
	if err != nil {
		t.Fatal(err)
	}
	eve.PublicKey = public
	vouch := func(i Identity) *nucleus.Signed {
		s, err := nucleus.Sign(secret, nucleus.DomainVouch, i)
		if err != nil {
			t.Fatal(err)
		}
		return &s
	}
	ann, bob := read("ann"), read("bob")
	opens := func() error {
		a, err := Open(b.cfg)
		if err == nil {
			err = a.Close()
		}
		return err
	}
	if err := opens(); err != nil {
		t.Fatalf("positive control: %v", err)
	}
	for what, plant := range map[string]func(){
		"no word":           func() { write(eve) },
		"by its own word":   func() { f := eve; f.Vouched = vouch(f.Identity); write(f) },
		"by another's word": func() { f := eve; f.Vouched = bob.Vouched; write(f) },
		"as the first": func() {
			f := eve
			f.AddedBy = ""
			write(f)
		},
		"bob with another key":    func() { f := bob; f.PublicKey = public; write(f) },
		"bob with another phrase": func() { f := bob; f.Phrase = "red"; write(f) },
		"in a circle": func() {
			f, g := eve, ann
			f.AddedBy, g.AddedBy = "ann", "eve"
			f.Vouched, g.Vouched = vouch(f.Identity), vouch(g.Identity)
			write(f)
			write(g)
		},
	} {
		plant()
		if err := opens(); err == nil || !strings.Contains(err.Error(), "was not added by one who is known") {
			t.Errorf("%s: %v", what, err)
		}
		write(ann)
		write(bob)
		os.Remove(keyPath(dir, "eve"))
	}
	// A stranger that makes itself the first and vouches for the others is in, but what the
	// passphrases seal says that it was not so: no old key opens any more.
	first, claimed := eve, ann
	first.AddedBy, claimed.AddedBy = "", "eve"
	claimed.Vouched = vouch(claimed.Identity)
	write(first)
	write(claimed)
	a, err := Open(b.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := open(a.files[1], passphrase); err == nil || !strings.Contains(err.Error(), "who added it were changed") {
		t.Errorf("a key that was claimed opens: %v", err)
	}
}

// An ask that needs two has both or none; one denial is the end; who has granted cannot again.
func TestQuorum(t *testing.T) {
	b := newBench(t, nil)
	two := func(id string, need int) (nucleus.AskRequest, string) {
		ask := askAt(t, b.c, id, func(q *nucleus.AskRequest) { q.Approvals = need })
		digest, _, err := approval.Digest(ask)
		if err != nil {
			t.Fatal(err)
		}
		return ask, digest
	}
	ask, digest := two("a-1", 2)
	_, err := b.client.Submit(t.Context(), ask)
	wantKind(t, "more than there are", err, nucleus.KindInvalid, "needs 2 different approvers, there are 1 (nucleus-authority approver add)")
	b.add(t, "bob", "carol")
	b.submit(t, ask)
	_, err = b.decide(t, "a-1", typed{Approve: true, Passphrase: passphrase})
	wantKind(t, "nobody named", err, nucleus.KindInvalid, "which approver? there are ann, bob, carol")
	_, err = b.grantBy(t, "a-1", digest, "eve")
	wantKind(t, "a stranger", err, nucleus.KindNotFound, "there is no approver")
	_, err = b.decide(t, "a-1", typed{Approve: true, Approver: "bob", Passphrase: passphrase})
	wantKind(t, "with another's passphrase", err, nucleus.KindForbidden, "wrong passphrase")

	status, err := b.grantBy(t, "a-1", digest, "ann")
	if err != nil || status.State != client.Pending || len(status.Grants) != 1 || status.Tokens() != nil || status.Need != 2 {
		t.Fatalf("one of two: %+v, %v", status, err)
	}
	_, err = b.grantBy(t, "a-1", digest, "ann")
	wantKind(t, "ann twice", err, nucleus.KindConflict, "1 more of 2 have to")
	_, err = b.client.Use(t.Context(), "a-1", client.Use{Permit: "r-1", Grants: []string{status.Grants[0].Grant}})
	wantKind(t, "used with one", err, nucleus.KindRefused, "is pending")
	if items, err := b.client.List(t.Context(), client.Pending); err != nil || len(items) != 1 || items[0].Need != 2 || !slices.Equal(items[0].Granted, []string{"ann"}) {
		t.Errorf("list %+v, %v", items, err)
	}
	b.stop() // what one granted stays for the next daemon
	b = startBench(t, b.c, b.cfg)
	status, err = b.grantBy(t, "a-1", digest, "bob")
	if err != nil || status.State != client.Granted || len(status.Tokens()) != 2 || status.Grants[1].Reason != "by bob" {
		t.Fatalf("both: %+v, %v", status, err)
	}
	grants, err := approval.Approved(status.Tokens(), ask, b.Approvers(), b.c.ms.Load())
	if err != nil || grants[0].Approver != "ann" || grants[1].Approver != "bob" {
		t.Errorf("grants %+v, %v", grants, err)
	}
	if used, err := b.client.Use(t.Context(), "a-1", client.Use{Permit: "r-1", Grants: []string{grants[0].ID, grants[1].ID}}); err != nil || used.N != 1 {
		t.Errorf("used %+v, %v", used, err)
	}

	ask, digest = two("a-2", 3)
	b.submit(t, ask)
	if _, err := b.grantBy(t, "a-2", digest, "bob"); err != nil {
		t.Fatal(err)
	}
	status, err = b.client.Deny(t.Context(), "a-2", client.Denial{Approver: "carol", AskDigest: digest, Reason: "no"})
	if err != nil || status.State != client.Denied || status.Tokens() != nil || status.Reason != "no" {
		t.Errorf("denied by one: %+v, %v", status, err)
	}
	_, err = b.grantBy(t, "a-2", digest, "ann")
	wantKind(t, "after the denial", err, nucleus.KindConflict, "a-2 is denied")
}

// What an approver who was removed has granted is void: also as one of two.
func TestRemoveRevokes(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob", "carol")
	digests := map[string]string{}
	for id, need := range map[string]int{"a-used": 1, "a-unused": 1, "a-half": 2, "a-ann": 1} {
		digests[id] = b.submit(t, askAt(t, b.c, id, func(q *nucleus.AskRequest) { q.Approvals = need })).AskDigest
		by := "bob"
		if id == "a-ann" {
			by = "ann"
		}
		if _, err := b.grantBy(t, id, digests[id], by); err != nil {
			t.Fatal(err)
		}
	}
	use := func(id string) error {
		status, err := b.client.Status(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		u := client.Use{Permit: "r-1"}
		for _, g := range status.Grants {
			u.Grants = append(u.Grants, g.Grant)
		}
		_, err = b.client.Use(t.Context(), id, u)
		return err
	}
	if err := use("a-used"); err != nil {
		t.Fatal(err)
	}
	gone, err := b.client.RemoveApprover(t.Context(), "bob")
	slices.Sort(gone.Revoked)
	if err != nil || !slices.Equal(gone.Revoked, []string{"a-half", "a-unused"}) {
		t.Errorf("removed %+v, %v", gone, err)
	}
	wantKind(t, "the grant of who was removed", use("a-unused"), nucleus.KindRefused, "is revoked")
	if err := use("a-ann"); err != nil {
		t.Errorf("positive control: %v", err)
	}
	if status, err := b.client.Status(t.Context(), "a-unused"); err != nil || status.Tokens() != nil || status.Reason != "approver bob was removed" {
		t.Errorf("%+v, %v", status, err)
	}
	if status, err := b.grantBy(t, "a-half", digests["a-half"], "ann"); err != nil || status.State != client.Pending {
		t.Errorf("one of two after the removal of the other: %+v, %v", status, err)
	}
	_, err = b.grantBy(t, "a-half", digests["a-half"], "bob")
	wantKind(t, "who was removed", err, nucleus.KindNotFound, "there is no approver")
	if status, err := b.grantBy(t, "a-half", digests["a-half"], "carol"); err != nil || status.State != client.Granted {
		t.Errorf("a third: %+v, %v", status, err)
	}
}

// Who asks cannot grant, whatever name its key has.
func TestRequesterCannotGrant(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	digest := b.submit(t, askAt(t, b.c, "a-1", nil)).AskDigest
	b.mu.Lock()
	b.files[1].PublicKey = requester.Public().(ed25519.PublicKey)
	b.mu.Unlock()
	_, err := b.grantBy(t, "a-1", digest, "bob")
	wantKind(t, "the requester's key", err, nucleus.KindForbidden, "who asks cannot grant")
	if _, err := b.grantBy(t, "a-1", digest, "ann"); err != nil {
		t.Errorf("positive control: %v", err)
	}
}

// A directory of the time of one key is taken up: the key opens, what was used stays used, and
// what was open is void.
func TestOldDirectory(t *testing.T) {
	b := newBench(t, nil)
	b.stop()
	dir := b.cfg.Dir
	sealed := func() []byte {
		f, err := readKey(keyPath(dir, "ann"))
		if err != nil {
			t.Fatal(err)
		}
		key, err := open(f, passphrase)
		if err != nil {
			t.Fatal(err)
		}
		old := f.Identity
		old.Kind = ""
		raw, err := seal(secret{old, key.Seed()}, passphrase, lowWork)
		if err != nil {
			t.Fatal(err)
		}
		f.Identity, f.Sealed = old, raw
		file, err := nucleus.Canonical(f)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}()
	if strings.Contains(string(sealed), "kind") {
		t.Fatalf("not as it was: %s", sealed)
	}
	for _, name := range []string{keyPath(dir, "ann"), filepath.Join(dir, "authority.db"), filepath.Join(dir, approversName)} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, oldKeyName), sealed, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "authority.db"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Exec(`CREATE TABLE pods (pod TEXT PRIMARY KEY, keys TEXT NOT NULL) STRICT;
		CREATE TABLE asks (id TEXT PRIMARY KEY, sha256 TEXT NOT NULL, canonical BLOB NOT NULL, request_sha256 TEXT NOT NULL UNIQUE, pod TEXT NOT NULL, op TEXT NOT NULL,
			summary TEXT NOT NULL, created_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', token TEXT NOT NULL DEFAULT '',
			jti TEXT UNIQUE, used_ms INTEGER NOT NULL DEFAULT 0) STRICT;
		CREATE INDEX asks_state ON asks (state, expires_ms);
		INSERT INTO asks VALUES ('a-pending', 'x', x'00', '1', 'p', 'git_push', 's', 1, 1800000000000, 'pending', '', '', NULL, 0),
			('a-used', 'x', x'00', '2', 'p', 'git_push', 's', 1, 1800000000000, 'granted', 'ok', 't', 'g-1', 7), ('a-unused', 'x', x'00', '3', 'p', 'git_push', 's', 1, 1800000000000, 'granted', '', 't', 'g-2', 0);`)
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if list, err := ReadApprovers(dir); err != nil || len(list) != 1 || list[0].Name != "ann" {
		t.Errorf("before: %+v, %v", list, err)
	}
	for range 2 { // the second finds it done
		b = startBench(t, b.c, b.cfg)
		for id, want := range map[string]string{"a-pending": client.Withdrawn, "a-used": client.Granted, "a-unused": client.Revoked} {
			if s, err := b.client.Status(t.Context(), id); err != nil || s.State != want || s.Need != 1 {
				t.Errorf("%s: %+v, %v; want %s", id, s, err, want)
			}
		}
		row, err := b.store.ask("a-used")
		if err != nil || row.uses != 1 || len(row.grants) != 1 || row.grants[0].Approver != "ann" {
			t.Errorf("used: %+v, %v", row, err)
		}
		if _, err := os.Stat(filepath.Join(dir, oldKeyName)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the old file: %v", err)
		}
		ask := askAt(t, b.c, nucleus.NewID("a-"), nil)
		if _, err := b.grantBy(t, ask.ID, b.submit(t, ask).AskDigest, "ann"); err != nil {
			t.Errorf("the old key: %v", err)
		}
		b.stop()
	}
}
