package authority

import (
	"crypto/ed25519"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	paseto "aidanwoods.dev/go-paseto"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// tokenOf signs claims as they are.
func tokenOf(t *testing.T, key ed25519.PrivateKey, footer string, claims nucleus.Grant) string {
	t.Helper()
	raw, err := nucleus.Canonical(claims)
	if err != nil {
		t.Fatal(err)
	}
	token, err := paseto.NewTokenFromClaimsJSON(raw, approval.Footer(footer))
	if err != nil {
		t.Fatal(err)
	}
	secret, err := paseto.NewV4AsymmetricSecretKeyFromEd25519(key)
	if err != nil {
		t.Fatal(err)
	}
	return token.V4Sign(secret, approval.Assertion(claims.AskDigest))
}

// flipped is a token with one letter changed, counted from the end where at is below 0.
func flipped(token string, at int) string {
	if at < 0 {
		at += len(token)
	}
	letter := byte('A')
	if token[at] == letter {
		letter = 'B'
	}
	return token[:at] + string(letter) + token[at+1:]
}

// The daemon takes a grant as anybody does who verifies one: for this ask, by an approver's key that
// it knows, now, once.
func TestGrantRefuses(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	ask, other := askAt(t, b.c, "a-1", nil), askAt(t, b.c, "a-2", nil)
	b.submit(t, ask)
	b.submit(t, other)
	ann := b.signer(t, "ann", passphrase)
	_, eve, _ := ed25519.GenerateKey(nil)
	binding, err := approval.Bind(ask)
	if err != nil {
		t.Fatal(err)
	}
	signed := func(key ed25519.PrivateKey, footer string, change func(*nucleus.Grant)) string {
		g := binding.Grant(nucleus.NewID("g-"), "ann", "")
		if change != nil {
			change(&g)
		}
		return tokenOf(t, key, footer, g)
	}
	changed := ask
	changed.Why = "nothing to see"
	grant := func(ask nucleus.AskRequest) string {
		token, err := ann.Grant(ask, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	good := grant(ask)
	b.c.advance(time.Second)
	now := b.c.ms.Load()
	for _, c := range []struct {
		what, token string
		kind        nucleus.Kind
		text        string
	}{
		{"none", "", nucleus.KindInvalid, "bytes"},
		{"no token", "granted", nucleus.KindInvalid, "PASETO"},
		{"too long", good + strings.Repeat("x", approval.MaxToken), nucleus.KindInvalid, "bytes"},
		{"for another ask", grant(other), nucleus.KindConflict, "what was shown"},
		{"for what was not shown", grant(changed), nucleus.KindConflict, "what was shown"},
		{"for another ask, with this one's digest", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Ask = "a-2" }), nucleus.KindForbidden, "it is for ask"},
		{"for another pod", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Pod = "p-2" }), nucleus.KindForbidden, "it is for pod"},
		{"for other arguments", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Digest = hexOf("x") }), nucleus.KindForbidden, "it is for digest"},
		{"flipped signature", flipped(good, strings.LastIndexByte(good, '.')-10), nucleus.KindForbidden, "signature"},
		{"another footer", signed(ann.key, "bob", nil), nucleus.KindForbidden, `"bob" is not an approver`},
		{"by the key of nobody", signed(eve, "ann", nil), nucleus.KindForbidden, "signature"},
		{"by another approver's key", signed(ann.key, "bob", func(g *nucleus.Grant) { g.Approver = "bob" }), nucleus.KindForbidden, "signature"},
		{"by a stranger", signed(eve, "eve", func(g *nucleus.Grant) { g.Approver = "eve" }), nucleus.KindNotFound, "there is no approver"},
		{"expired by itself", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Expires = now }), nucleus.KindForbidden, "expired"},
		{"not yet", signed(ann.key, "ann", func(g *nucleus.Grant) { g.NotBefore = now + 1 }), nucleus.KindForbidden, "valid in"},
		{"beyond the ask", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Expires++ }), nucleus.KindForbidden, "valid from"},
		{"a task without bounds", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Task = b.taskOf(t, ask, 3); g.Task.Uses = 100 }), nucleus.KindInvalid, "a task of 100 uses"},
		{"a long reason", signed(ann.key, "ann", func(g *nucleus.Grant) { g.Reason = strings.Repeat("x", approval.MaxReason+1) }), nucleus.KindInvalid, "reason"},
	} {
		_, err := b.client.Grant(t.Context(), "a-1", c.token)
		wantKind(t, c.what, err, c.kind, c.text)
		if s, err := b.client.Status(t.Context(), "a-1"); err != nil || s.State != client.Pending || len(s.Grants) != 0 {
			t.Fatalf("%s: now %+v, %v", c.what, s, err)
		}
	}
	body, _, _ := strings.Cut(strings.TrimPrefix(good, "v4.public."), ".")
	if _, err := b.client.Grant(t.Context(), "a-1", flipped(good, len("v4.public.")+len(body)/3)); err == nil {
		t.Error("claims with a letter changed were taken")
	}
	if s, err := b.client.Grant(t.Context(), "a-1", good); err != nil || s.State != client.Granted {
		t.Fatalf("positive control: %+v, %v", s, err)
	}
	_, err = b.client.Grant(t.Context(), "a-1", good)
	wantKind(t, "again", err, nucleus.KindConflict, "a-1 is granted")

	late := grant(other)
	b.c.ms.Store(other.Expires)
	_, err = b.client.Grant(t.Context(), "a-2", late)
	wantKind(t, "after the ask's time", err, nucleus.KindConflict, "a-2 is expired")
}

// A grant that was taken back before all had granted stays taken back, whoever has kept its token;
// and who was removed grants nothing any more.
func TestGrantReplayed(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob", "carol")
	ask := askAt(t, b.c, "a-1", func(q *nucleus.AskRequest) { q.Approvals = 2 })
	b.submit(t, ask)
	tokenOf := func(name, secret string) string {
		token, err := b.signer(t, name, secret).Grant(ask, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	first, again, bob := tokenOf("ann", passphrase), tokenOf("ann", passphrase), tokenOf("bob", passphraseOf("bob"))
	post := func(token string) (client.Status, error) { return b.client.Grant(t.Context(), "a-1", token) }
	if s, err := post(first); err != nil || len(s.Grants) != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	_, err := post(first)
	wantKind(t, "one approver twice", err, nucleus.KindConflict, "1 more of 2")
	if _, err := b.client.Revoke(t.Context(), client.Revocation{ID: "a-1"}); err != nil {
		t.Fatal(err)
	}
	_, err = post(first)
	wantKind(t, "what was taken back", err, nucleus.KindForbidden, "was given before")
	b.stop()
	b = startBench(t, b.c, b.cfg)
	_, err = post(first)
	wantKind(t, "what was taken back, at the next daemon", err, nucleus.KindForbidden, "was given before")
	if _, err := b.client.RemoveApprover(t.Context(), "bob"); err != nil {
		t.Fatal(err)
	}
	_, err = post(bob)
	wantKind(t, "of who was removed", err, nucleus.KindNotFound, "there is no approver")
	if s, err := post(again); err != nil || len(s.Grants) != 1 {
		t.Fatalf("positive control: %+v, %v", s, err)
	}
	if s, err := post(tokenOf("carol", passphraseOf("carol"))); err != nil || s.State != client.Granted {
		t.Fatalf("positive control: %+v, %v", s, err)
	}
}

// Who was removed stays so, though the file is put back as it was.
func TestRemovedStaysRemoved(t *testing.T) {
	b := newBench(t, nil)
	b.withPasskey(t, "touch", freePort(t))
	b.add(t, "bob")
	before := map[string][]byte{}
	for _, name := range []string{"touch", "bob"} {
		raw, err := os.ReadFile(keyPath(b.cfg.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		before[name] = raw
	}
	putBack := func() {
		t.Helper()
		b.stop()
		for name, raw := range before {
			if err := os.WriteFile(keyPath(b.cfg.Dir, name), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		b = startBench(t, b.c, b.cfg)
	}
	putBack()
	if got := names(b.Approvers()); len(got) != 3 {
		t.Fatalf("positive control: %v", got)
	}
	for name := range before {
		if _, err := b.client.RemoveApprover(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	putBack()
	if got := names(b.Approvers()); !slices.Equal(got, []string{"ann"}) {
		t.Errorf("approvers %v, want ann alone", got)
	}
	list, err := ReadApprovers(b.cfg.Dir)
	if err != nil || len(list) != 3 || list[1].Removed == 0 || list[2].Removed == 0 {
		t.Errorf("list %+v, %v", list, err)
	}
	if raw, err := os.ReadFile(keyPath(b.cfg.Dir, "bob")); err != nil || strings.Contains(string(raw), "sealed") {
		t.Errorf("the key of who was removed: %s, %v", raw, err)
	}

	// The word of a version that told the file alone is taken up.
	if _, err := b.store.db.Exec("DELETE FROM removed"); err != nil {
		t.Fatal(err)
	}
	b.stop()
	b = startBench(t, b.c, b.cfg)
	putBack()
	if got := names(b.Approvers()); !slices.Equal(got, []string{"ann"}) {
		t.Errorf("after a version before: %v, want ann alone", got)
	}
}

// Who vouches has signed for exactly this key and name: what the way changes is refused.
func TestVouchedApprover(t *testing.T) {
	b := newBench(t, nil)
	b.add(t, "bob")
	made, err := b.signer(t, "ann", passphrase).NewApprover("carol", "green lamp", passphraseOf("carol"), lowWork)
	if err != nil {
		t.Fatal(err)
	}
	public, _, _ := ed25519.GenerateKey(nil)
	for what, c := range map[string]struct {
		change func(*client.NewApprover)
		kind   nucleus.Kind
		text   string
	}{
		"another key":    {func(n *client.NewApprover) { n.Key = public }, nucleus.KindForbidden, "has not vouched"},
		"another name":   {func(n *client.NewApprover) { n.Name = "eve" }, nucleus.KindForbidden, "has not vouched"},
		"another phrase": {func(n *client.NewApprover) { n.Phrase = "red lamp" }, nucleus.KindForbidden, "has not vouched"},
		"by another":     {func(n *client.NewApprover) { n.By = "bob" }, nucleus.KindForbidden, "has not vouched"},
		"by nobody":      {func(n *client.NewApprover) { n.By = "" }, nucleus.KindInvalid, "nobody is named"},
		"no word":        {func(n *client.NewApprover) { n.Vouched = nucleus.Signed{} }, nucleus.KindForbidden, "has not vouched"},
		"a short key":    {func(n *client.NewApprover) { n.Key = n.Key[1:] }, nucleus.KindInvalid, "public key of 31 bytes"},
		"nothing sealed": {func(n *client.NewApprover) { n.Sealed = nil }, nucleus.KindInvalid, "sealed one of 0"},
		"ann's key":      {func(n *client.NewApprover) { n.Key = b.Approvers()[0].Key }, nucleus.KindConflict, "another approver's"},
	} {
		n := made
		c.change(&n)
		_, err := b.client.AddApprover(t.Context(), n)
		wantKind(t, what, err, c.kind, c.text)
	}
	if got := names(b.Approvers()); len(got) != 2 {
		t.Fatalf("approvers %v", got)
	}
	if a, err := b.client.AddApprover(t.Context(), made); err != nil || a.Name != "carol" {
		t.Fatalf("positive control: %+v, %v", a, err)
	}
	ask := askAt(t, b.c, "a-1", nil)
	if _, err := b.grantBy(t, "a-1", b.submit(t, ask).AskDigest, "carol"); err != nil {
		t.Errorf("the new key: %v", err)
	}
}
