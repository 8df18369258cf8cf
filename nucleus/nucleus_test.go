package nucleus

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
)

func sign(n int) int { return cmp.Compare(n, 0) }

func slowCompareUTF16(a, b string) int {
	return slices.Compare(utf16.Encode([]rune(a)), utf16.Encode([]rune(b)))
}

var minusZero = regexp.MustCompile(`(^|[\[,:])-0([,\]}]|$)`)

func dropMinusZero(raw []byte) []byte {
	for {
		next := minusZero.ReplaceAll(raw, []byte("${1}0${2}"))
		if bytes.Equal(next, raw) {
			return raw
		}
		raw = next
	}
}

func newKey(t *testing.T) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return pub, priv
}

func TestSignedIsForOneKeyAndOneDomain(t *testing.T) {
	pub, priv := newKey(t)
	other, _ := newKey(t)
	permit := Permit{ID: "p1", Pod: "pod-1", Seq: 7, Op: ReadFiles, Verdict: Allow, Salt: []byte{1, 2}}
	signed, err := Sign(priv, DomainPermit, permit)
	if err != nil {
		t.Fatal(err)
	}
	var got Permit
	if err := signed.Open(pub, DomainPermit, &got); err != nil || got.ID != "p1" || got.Seq != 7 {
		t.Fatalf("the control does not open: %+v, %v", got, err)
	}

	flip := func(raw []byte, i int) []byte {
		raw = slices.Clone(raw)
		raw[i] ^= 1
		return raw
	}
	for name, c := range map[string]struct {
		signed Signed
		key    ed25519.PublicKey
		domain string
	}{
		"another key":         {signed, other, DomainPermit},
		"no key":              {signed, nil, DomainPermit},
		"a short key":         {signed, pub[:31], DomainPermit},
		"another domain":      {signed, pub, DomainOutcome},
		"no domain":           {signed, pub, ""},
		"a changed payload":   {Signed{flip(signed.Payload, 20), signed.Sig}, pub, DomainPermit},
		"a longer payload":    {Signed{append(slices.Clone(signed.Payload), ' '), signed.Sig}, pub, DomainPermit},
		"a changed signature": {Signed{signed.Payload, flip(signed.Sig, 3)}, pub, DomainPermit},
		"no signature":        {Signed{signed.Payload, nil}, pub, DomainPermit},
		// Moving the border between domain and payload must not help.
		"a moved border": {Signed{append([]byte(DomainPermit+"\n"), signed.Payload...), signed.Sig}, pub, ""},
	} {
		var into Permit
		if err := c.signed.Open(c.key, c.domain, &into); err == nil {
			t.Errorf("%s: opened", name)
		}
	}

	for _, a := range []string{DomainPermit, DomainOutcome, DomainAttach, DomainAsk} {
		if strings.Contains(a, "\n") {
			t.Errorf("domain %q contains the separator", a)
		}
		s, err := Sign(priv, a, struct{}{})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range []string{DomainPermit, DomainOutcome, DomainAttach, DomainAsk} {
			if err := s.Open(pub, b, &struct{}{}); (err == nil) != (a == b) {
				t.Errorf("signed for %s, opened as %s: %v", a, b, err)
			}
		}
	}

	number, err := Sign(priv, "v1", 2)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := (Signed{[]byte("12"), number.Sig}).Open(pub, "v", &n); err == nil {
		t.Errorf("2 signed for v1 was read as %d signed for v", n)
	}

	// A payload of another shape is refused even with a good signature.
	wide, err := Sign(priv, DomainPermit, map[string]any{"id": "p1", "extra": true})
	if err != nil {
		t.Fatal(err)
	}
	if err := wide.Open(pub, DomainPermit, &Permit{}); err == nil || !strings.Contains(err.Error(), "extra") {
		t.Errorf("unknown field: %v", err)
	}
	if _, err := Sign(priv, DomainPermit, Permit{Rule: "\xff"}); err == nil {
		t.Error("signed text that is not UTF-8")
	}
}

func TestDigestBindsSaltAndEveryField(t *testing.T) {
	salt := NewSalt()
	base := func() Action {
		return Action{Op: GitPush, Args: SHA256([]byte("x")), Push: &Push{Repo: "app", Remote: "https://example.com/a", Ref: "refs/heads/x", Old: "0", New: "1"}}
	}
	digest := func(a Action, s Salt) string {
		d, err := a.Digest(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	want := digest(base(), salt)
	if got := digest(base(), salt); got != want {
		t.Fatalf("two digests of one action: %s, %s", got, want)
	}
	if digest(base(), NewSalt()) == want {
		t.Error("another salt, the same digest")
	}
	for name, change := range map[string]func(*Action){
		"op":     func(a *Action) { a.Op = CreatePR },
		"args":   func(a *Action) { a.Args = "" },
		"remote": func(a *Action) { a.Push.Remote += "/" },
		"ref":    func(a *Action) { a.Push.Ref = "refs/heads/y" },
		"old":    func(a *Action) { a.Push.Old = "2" },
		"new":    func(a *Action) { a.Push.New = "2" },
		"part":   func(a *Action) { a.Connect = &Connect{Host: "h", Port: 1} },
	} {
		a := base()
		change(&a)
		if digest(a, salt) == want {
			t.Errorf("%s changed, the same digest", name)
		}
	}
	if _, err := (Action{Op: RunBash, Command: &Command{Argv: []string{"\xff"}}}).Digest(salt); err == nil {
		t.Error("digest of text that is not UTF-8")
	}
	// Two different texts that encoding/json would write alike.
	if a, b := "\xff", "\xfe"; func() bool {
		x, errX := Action{Args: a}.Digest(salt)
		y, errY := Action{Args: b}.Digest(salt)
		return errX == nil && errY == nil && x == y
	}() {
		t.Error("two actions with one digest")
	}
}

func TestStrict(t *testing.T) {
	type point struct{ X, Y int }
	for _, in := range []string{``, `{`, `{"X":1,"Z":2}`, `{"X":1}{}`, `{"X":1} x`, `{"X":1}]`, `{"X":"1"}`, `[]`, `{"X":1.5}`} {
		var p point
		if err := Strict([]byte(in), &p); err == nil {
			t.Errorf("Strict(%s) = %+v, want an error", in, p)
		}
	}
	var p point
	if err := Strict([]byte(" {\"X\":1,\"Y\":2} \n"), &p); err != nil || p != (point{1, 2}) {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestOps(t *testing.T) {
	ops := Ops()
	if len(ops) != 14 {
		t.Fatalf("%d operations, want 14", len(ops))
	}
	ops[0] = "changed"
	if Ops()[0] == "changed" {
		t.Error("the caller can change the list")
	}
	for _, bad := range []Op{"", "execute", "READ_FILES", "read_files ", "read_files\x00", "changed"} {
		if bad.Valid() {
			t.Errorf("%q is valid", bad)
		}
		raw, _ := json.Marshal(bad)
		var o Op
		if err := json.Unmarshal(raw, &o); err == nil {
			t.Errorf("%q was decoded", bad)
		}
		if err := json.Unmarshal([]byte(`{"op":`+string(raw)+`}`), &Action{}); err == nil {
			t.Errorf("%q was decoded in an action", bad)
		}
		if err := json.Unmarshal([]byte(`{`+string(raw)+`:1}`), &map[Op]int{}); err == nil {
			t.Errorf("%q was decoded as a key", bad)
		}
	}
	for _, op := range Ops() {
		var o Op
		if err := json.Unmarshal([]byte(`"`+string(op)+`"`), &o); err != nil || o != op {
			t.Errorf("%s: %v, %v", op, o, err)
		}
	}
}

func TestLegs(t *testing.T) {
	for l := Legs(0); l < 8; l++ {
		names := l.Names()
		if names == nil {
			t.Errorf("%d: names are nil", l)
		}
		if back, err := LegsOf(names); err != nil || back != l {
			t.Errorf("%d -> %v -> %d, %v", l, names, back, err)
		}
		for m := Legs(0); m < 8; m++ {
			if got, want := l.Has(m), l|m == l; got != want {
				t.Errorf("Legs(%d).Has(%d) = %v", l, m, got)
			}
		}
	}
	for _, bad := range [][]string{{""}, {"Private"}, {"private", "x"}} {
		if l, err := LegsOf(bad); err == nil {
			t.Errorf("LegsOf(%q) = %v", bad, l)
		}
	}
}

func TestVerdictsAreOrdered(t *testing.T) {
	order := []Verdict{Deny, Ask, Allow}
	for i, a := range order {
		for j, b := range order {
			if got := a.StricterThan(b); got != (i < j) {
				t.Errorf("%s stricter than %s: %v", a, b, got)
			}
		}
	}
	for _, unknown := range []Verdict{"", "ALLOW", "yes"} {
		if !unknown.StricterThan(Ask) || Deny.StricterThan(unknown) {
			t.Errorf("verdict %q does not deny", unknown)
		}
	}
}

func TestTierSatisfies(t *testing.T) {
	tiers := []Tier{TierVM, TierKernel, TierEmulated, TierNone, "", "VM", "root"}
	for _, have := range tiers {
		for _, want := range tiers {
			ok := want == TierVM && have == TierVM ||
				(want == TierKernel || want == "") && (have == TierVM || have == TierKernel) ||
				want == TierNone && have == TierNone
			if have.Satisfies(want) != ok {
				t.Errorf("%q satisfies %q: %v, want %v", have, want, !ok, ok)
			}
		}
	}
}

func TestAsError(t *testing.T) {
	denied := Errorf(KindDenied, "no %d", 1)
	for in, want := range map[error]Error{
		error(denied):                          *denied,
		fmt.Errorf("outer: %w", denied):        *denied,
		errors.New("disk full"):                {Kind: KindInternal, Message: "disk full"},
		errors.Join(errors.New("one"), denied): *denied,
	} {
		if got := AsError(in); *got != want {
			t.Errorf("AsError(%v) = %+v, want %+v", in, *got, want)
		}
	}
	raw, err := json.Marshal(denied)
	if err != nil || string(raw) != `{"kind":"denied","message":"no 1"}` {
		t.Errorf("got %s, %v", raw, err)
	}
}

func TestNewID(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := NewID("pod-")
		if !regexp.MustCompile(`^pod-[A-Z2-7]{26}$`).MatchString(id) || seen[id] {
			t.Fatalf("id %q", id)
		}
		seen[id] = true
	}
}
