package approval

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"cal/internal/passkeytest"
	"cal/nucleus"
)

const page = "http://localhost:7433"

func passkeyApprover(t testing.TB, name string, a *passkeytest.Authenticator) []nucleus.Approver {
	return []nucleus.Approver{{Name: name, Kind: nucleus.ApproverPasskey, Key: a.Point(t), Origin: page}}
}

func answerTo(t testing.TB, a *passkeytest.Authenticator, grant nucleus.Grant) Answer {
	t.Helper()
	challenge, err := PasskeyChallenge(grant)
	if err != nil {
		t.Fatal(err)
	}
	var answer Answer
	answer.ClientData, answer.AuthenticatorData, answer.Signature = a.Answer(t, challenge)
	return answer
}

func passkeyToken(t testing.TB, grant nucleus.Grant, answer Answer) string {
	t.Helper()
	token, err := PasskeyToken(grant, answer)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func passkeyGrant(t testing.TB, a *passkeytest.Authenticator, name string, ask nucleus.AskRequest) (nucleus.Grant, string) {
	t.Helper()
	b, err := Bind(ask)
	if err != nil {
		t.Fatal(err)
	}
	grant := b.Grant("g-1", name, "looks right")
	return grant, passkeyToken(t, grant, answerTo(t, a, grant))
}

// What the authenticator and the browser say, false in one thing each.
func TestPasskeyAnswer(t *testing.T) {
	type auth = passkeytest.Authenticator
	ask := askFor(t, actions()["push"])
	for name, c := range map[string]struct {
		change func(*auth)
		want   Reason
	}{
		"as it should be":       {func(*auth) {}, ""},
		"no counter":            {func(a *auth) { a.Count = 0 }, ""},
		"an unknown member":     {func(a *auth) { a.Member = map[string]any{"more": "later"} }, ""},
		"no crossOrigin":        {func(a *auth) { a.Member = map[string]any{"crossOrigin": nil} }, ""},
		"made, not asked":       {func(a *auth) { a.Member = map[string]any{"type": "webauthn.create"} }, BadCeremony},
		"a payment":             {func(a *auth) { a.Member = map[string]any{"type": "payment.get"} }, BadCeremony},
		"no type":               {func(a *auth) { a.Member = map[string]any{"type": nil} }, BadClientData},
		"type in other case":    {func(a *auth) { a.Member = map[string]any{"type": nil, "Type": "webauthn.get"} }, BadClientData},
		"another challenge":     {func(a *auth) { a.Member = map[string]any{"challenge": strings.Repeat("A", 43)} }, BadChallenge},
		"an empty challenge":    {func(a *auth) { a.Member = map[string]any{"challenge": ""} }, BadChallenge},
		"a challenge in a list": {func(a *auth) { a.Member = map[string]any{"challenge": []string{"x"}} }, BadClientData},
		"another port":          {func(a *auth) { a.Origin = "http://localhost:7434" }, BadOrigin},
		"another scheme":        {func(a *auth) { a.Origin = "https://localhost:7433" }, BadOrigin},
		"a name below":          {func(a *auth) { a.Origin = "http://a.localhost:7433" }, BadOrigin},
		"an address":            {func(a *auth) { a.Origin = "http://127.0.0.1:7433" }, BadOrigin},
		"a longer origin":       {func(a *auth) { a.Origin = page + ".evil.example" }, BadOrigin},
		"origin in other case":  {func(a *auth) { a.Origin = "http://LOCALHOST:7433" }, BadOrigin},
		"an empty origin":       {func(a *auth) { a.Origin = "" }, BadOrigin},
		"in a frame":            {func(a *auth) { a.Member = map[string]any{"crossOrigin": true} }, BadFrame},
		"in a frame, as text":   {func(a *auth) { a.Member = map[string]any{"crossOrigin": "false"} }, BadFrame},
		"below a top page":      {func(a *auth) { a.Member = map[string]any{"topOrigin": "https://evil.example"} }, BadFrame},
		"another site":          {func(a *auth) { a.Party = "evil.example" }, BadRelyingParty},
		"a site with the port":  {func(a *auth) { a.Party = "localhost:7433" }, BadRelyingParty},
		"nobody there":          {func(a *auth) { a.Flags &^= passkeytest.Present }, BadPresence},
		"not verified":          {func(a *auth) { a.Flags &^= passkeytest.Verified }, BadVerification},
		"backed up, not able":   {func(a *auth) { a.Flags |= flagBackedUp }, BadAuthData},
		"with a credential":     {func(a *auth) { a.Flags |= passkeytest.Credential }, BadAuthData},
		"with extensions":       {func(a *auth) { a.Flags |= passkeytest.Extensions; a.More = []byte{0xa0} }, BadAuthData},
		"with more":             {func(a *auth) { a.More = []byte{0} }, BadAuthData},
		"long client data":      {func(a *auth) { a.Member = map[string]any{"more": strings.Repeat("x", maxClientData)} }, BadClientData},
	} {
		a := passkeytest.New(t, page)
		known := passkeyApprover(t, "ann", a)
		c.change(a)
		grant, token := passkeyGrant(t, a, "ann", ask)
		got, err := Verify(token, ask, known, created+1)
		if c.want == "" {
			if err != nil || got != grant {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
			continue
		}
		wantReason(t, name, err, c.want)
		if got != (nucleus.Grant{}) {
			t.Errorf("%s: refused and %+v", name, got)
		}
	}
}

// Client data that a sloppy reader would take, signed rightly.
func TestPasskeyClientData(t *testing.T) {
	a := passkeytest.New(t, page)
	ask := askFor(t, actions()["push"])
	good, token := passkeyGrant(t, a, "ann", ask)
	_, answer, err := openPasskey(token)
	if err != nil {
		t.Fatal(err)
	}
	text := string(answer.ClientData)
	for name, edited := range map[string]string{
		"origin twice":    strings.Replace(text, "{", `{"origin":"https://evil.example",`, 1),
		"a second object": text + "{}",
		"a byte order":    "\ufeff" + text,
		"a list":          "[" + text + "]",
		"nothing":         "",
		"not UTF-8":       strings.Replace(text, "localhost", "localhos\xff", 1),
	} {
		other := answer
		other.ClientData = []byte(edited)
		other.Signature = a.Sign(t, other.ClientData, other.AuthenticatorData)
		_, err := Verify(passkeyToken(t, good, other), ask, passkeyApprover(t, "ann", a), created+1)
		wantReason(t, name, err, BadClientData)
	}
	other := answer
	other.ClientData = []byte(" " + text + "\n")
	other.Signature = a.Sign(t, other.ClientData, other.AuthenticatorData)
	if _, err := Verify(passkeyToken(t, good, other), ask, passkeyApprover(t, "ann", a), created+1); err != nil {
		t.Errorf("positive control: %v", err)
	}
}

// Every claim is below the signature: one changed after it is refused, and one signed is compared.
func TestPasskeyEveryClaim(t *testing.T) {
	a := passkeytest.New(t, page)
	known := passkeyApprover(t, "ann", a)
	ask := askFor(t, actions()["push"])
	good, _ := passkeyGrant(t, a, "ann", ask)
	answer := answerTo(t, a, good)
	signed := map[string]Reason{
		"jti": BadID, "iss": BadApprover, "ask": BadAsk, "ask_sha256": BadAskDigest, "aud": BadPod, "session": BadSession, "boot": BadBoot,
		"op": BadOp, "digest": BadDigest, "policy_sha256": BadPolicy, "reason": "", "nonce": BadNonce, "nbf_ms": BadLife, "exp_ms": BadLife,
	}
	raw, err := nucleus.Canonical(good)
	if err != nil {
		t.Fatal(err)
	}
	var members map[string]any
	if err := json.Unmarshal(raw, &members); err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Sorted(maps.Keys(members)), slices.Sorted(maps.Keys(signed)); !slices.Equal(got, want) {
		t.Fatalf("a grant has %q, this test knows %q", got, want)
	}
	for name, want := range signed {
		changed := maps.Clone(members)
		switch value := changed[name].(type) {
		case float64:
			changed[name] = map[string]float64{"nbf_ms": created - 1, "exp_ms": value + 1}[name]
		case string:
			changed[name] = value + "/x"
			if name == "op" {
				changed[name] = string(nucleus.CreatePR)
			}
		}
		raw, err := nucleus.Canonical(changed)
		if err != nil {
			t.Fatal(err)
		}
		var grant nucleus.Grant
		if err := nucleus.Strict(raw, &grant); err != nil {
			t.Fatal(err)
		}
		_, err = Verify(passkeyToken(t, grant, answer), ask, known, created+1)
		after := BadChallenge
		if name == "iss" {
			after = BadApprover
		}
		wantReason(t, name+" after it was signed", err, after)
		_, err = Verify(passkeyToken(t, grant, answerTo(t, a, grant)), ask, known, created+1)
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		wantReason(t, name+", signed", err, want)
	}
	late := good
	late.NotBefore = created + 1000
	_, err = Verify(passkeyToken(t, late, answerTo(t, a, late)), ask, known, created+1)
	wantReason(t, "too early", err, NotYet)
	_, err = Verify(passkeyToken(t, good, answer), ask, known, good.Expires)
	wantReason(t, "too late", err, Expired)
}

// A token is one text for one grant by one key: any other is refused.
func TestPasskeyToken(t *testing.T) {
	ann, eve := passkeytest.New(t, page), passkeytest.New(t, page)
	ask := askFor(t, actions()["push"])
	good, token := passkeyGrant(t, ann, "ann", ask)
	_, forged := passkeyGrant(t, eve, "ann", ask)
	keys := passkeyApprover(t, "ann", ann)
	seed := newApprover(t, "ann")
	_, sealed := seed.grant(t, ask)
	parts := strings.Split(token, ".") // passkey, v1, and four
	part := func(i int, raw string) string {
		changed := slices.Clone(parts)
		changed[i] = base64.RawURLEncoding.EncodeToString([]byte(raw))
		return strings.Join(changed, ".")
	}
	decoded := func(i int) string {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	flip := func(i, at int) string {
		raw := []byte(decoded(i))
		raw[at] ^= 1
		return part(i, string(raw))
	}
	with := func(change func(*nucleus.Approver)) []nucleus.Approver {
		changed := slices.Clone(keys)
		changed[0].Key = bytes.Clone(changed[0].Key)
		change(&changed[0])
		return changed
	}
	for name, c := range map[string]struct {
		token string
		keys  []nucleus.Approver
		want  Reason
	}{
		"as it should be":          {token, keys, ""},
		"another's passkey":        {forged, keys, BadSignature},
		"nobody approves":          {token, nil, BadApprover},
		"a sealed key's token":     {sealed, keys, BadApprover},
		"a passkey's, sealed key":  {token, seed.keys(), BadApprover},
		"a key of another kind":    {token, with(func(a *nucleus.Approver) { a.Kind = "rsa" }), BadApprover},
		"no origin known":          {token, with(func(a *nucleus.Approver) { a.Origin = "" }), BadOrigin},
		"no key known":             {token, with(func(a *nucleus.Approver) { a.Key = nil }), BadKey},
		"a compressed key":         {token, with(func(a *nucleus.Approver) { a.Key = append([]byte{2}, a.Key[1:33]...) }), BadKey},
		"a point off the curve":    {token, with(func(a *nucleus.Approver) { a.Key[64] ^= 1 }), BadKey},
		"the point at infinity":    {token, with(func(a *nucleus.Approver) { a.Key = []byte{0} }), BadKey},
		"too long":                 {token + strings.Repeat("A", MaxToken), keys, BadSize},
		"too few parts":            {strings.Join(parts[:5], "."), keys, BadFormat},
		"too many parts":           {token + ".AA", keys, BadFormat},
		"version 2":                {strings.Replace(token, "v1", "v2", 1), keys, BadFormat},
		"a newline in it":          {strings.Replace(token, "v1.", "v1.\n", 1), keys, BadFormat},
		"padding":                  {token + "=", keys, BadFormat},
		"spaces in the claims":     {part(2, strings.Replace(decoded(2), ":", ": ", 1)), keys, BadFormat},
		"a claim in other case":    {part(2, strings.Replace(decoded(2), `"aud"`, `"AUD"`, 1)), keys, BadFormat},
		"a claim more":             {part(2, strings.Replace(decoded(2), "{", `{"uses":20,`, 1)), keys, BadFormat},
		"client data changed":      {flip(3, len(decoded(3))-2), keys, BadFormat},
		"authenticator changed":    {flip(4, 36), keys, BadSignature},
		"signature changed":        {flip(5, 20), keys, BadSignature},
		"signature empty":          {part(5, ""), keys, BadSignature},
		"signature and more":       {part(5, decoded(5)+"\x00"), keys, BadSignature},
		"authenticator data short": {part(4, decoded(4)[:36]), keys, BadAuthData},
	} {
		got, err := Verify(c.token, ask, c.keys, created+1)
		switch {
		case c.want == "" && (err != nil || got != good):
			t.Errorf("%s: %+v, %v", name, got, err)
		case c.want == "":
		case name == "client data changed" && ReasonOf(err) != "" && err != nil: // it may be JSON still
		default:
			wantReason(t, name, err, c.want)
		}
	}
	nowhere := *ann
	nowhere.Origin = ""
	_, unplaced := passkeyGrant(t, &nowhere, "ann", ask)
	_, err := Verify(unplaced, ask, with(func(a *nucleus.Approver) { a.Origin = "" }), created+1)
	wantReason(t, "no origin, and none known", err, BadOrigin)
	if claims, err := Claims(token); err != nil || claims != good {
		t.Errorf("claims: %+v, %v", claims, err)
	}
	// Not one byte of it can be another.
	for i := range token {
		c := byte('A')
		if token[i] == c {
			c = 'B'
		}
		if _, err := Verify(token[:i]+string(c)+token[i+1:], ask, keys, created+1); ReasonOf(err) == "" {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
}

// The answer for one ask is none for another, whatever differs.
func TestPasskeyMovedToken(t *testing.T) {
	a := passkeytest.New(t, page)
	ask := askFor(t, actions()["push"])
	_, token := passkeyGrant(t, a, "ann", ask)
	n := 0
	eachChange(t, ask, func(path string, other nucleus.AskRequest) {
		n++
		if _, err := Verify(token, other, passkeyApprover(t, "ann", a), created+1); ReasonOf(err) == "" {
			t.Errorf("%s: %v", path, err)
		}
	})
	if n < 30 {
		t.Errorf("only %d changes were tried", n)
	}
}

func TestRegistered(t *testing.T) {
	type auth = passkeytest.Authenticator
	type reg = Registration
	challenge := []byte("0123456789abcdef0123456789abcdef")
	other := passkeytest.New(t, page)
	for name, c := range map[string]struct {
		change func(*auth)
		edit   func(*reg)
		want   Reason
	}{
		"as it should be":        {nil, nil, ""},
		"with extensions":        {func(a *auth) { a.Flags |= passkeytest.Extensions; a.More = []byte{0xa0} }, nil, ""},
		"asked, not made":        {func(a *auth) { a.Member = map[string]any{"type": "webauthn.get"} }, nil, BadCeremony},
		"another page":           {func(a *auth) { a.Origin = "http://localhost:80" }, nil, BadOrigin},
		"in a frame":             {func(a *auth) { a.Member = map[string]any{"crossOrigin": true} }, nil, BadFrame},
		"another challenge":      {func(a *auth) { a.Member = map[string]any{"challenge": "AAAA"} }, nil, BadChallenge},
		"another site":           {func(a *auth) { a.Party = "evil.example" }, nil, BadRelyingParty},
		"nobody there":           {func(a *auth) { a.Flags = passkeytest.Verified }, nil, BadPresence},
		"not verified":           {func(a *auth) { a.Flags = passkeytest.Present }, nil, BadVerification},
		"more than it says":      {func(a *auth) { a.More = []byte{0} }, nil, BadAuthData},
		"another key":            {nil, func(r *reg) { r.PublicKey = other.SPKI(t) }, BadAuthData},
		"another credential":     {nil, func(r *reg) { r.Credential = other.ID }, BadAuthData},
		"no credential id":       {nil, func(r *reg) { r.Credential = nil }, BadAuthData},
		"a long credential id":   {nil, func(r *reg) { r.Credential = make([]byte, 2000) }, BadAuthData},
		"a point alone":          {nil, func(r *reg) { r.PublicKey = other.Point(t) }, BadKey},
		"no key":                 {nil, func(r *reg) { r.PublicKey = nil }, BadKey},
		"a key that is no point": {nil, func(r *reg) { r.PublicKey = bytes.Clone(r.PublicKey); r.PublicKey[90] ^= 1 }, BadKey},
		"no credential in it":    {nil, func(r *reg) { r.AuthenticatorData = r.AuthenticatorData[:37] }, BadAuthData},
		"cut":                    {nil, func(r *reg) { r.AuthenticatorData = r.AuthenticatorData[:100] }, BadAuthData},
		"nothing":                {nil, func(r *reg) { *r = reg{} }, BadClientData},
	} {
		a := passkeytest.New(t, page)
		if c.change != nil {
			c.change(a)
		}
		r := Registration{Credential: a.ID, PublicKey: a.SPKI(t)}
		r.ClientData, r.AuthenticatorData = a.Register(t, challenge)
		if c.edit != nil {
			c.edit(&r)
		}
		key, err := Registered(r, challenge, page)
		if c.want == "" {
			if err != nil || !bytes.Equal(key, a.Point(t)) {
				t.Errorf("%s: %x, %v", name, key, err)
			}
			continue
		}
		wantReason(t, name, err, c.want)
	}
}

// What a browser and an authenticator say may be anything.
func FuzzPasskey(f *testing.F) {
	a := passkeytest.New(f, page)
	challenge := []byte("0123456789abcdef0123456789abcdef")
	clientData, authData, _ := a.Answer(f, challenge)
	f.Add(clientData, authData)
	f.Fuzz(func(t *testing.T, clientData, authData []byte) {
		err := checkClientData(clientData, typeGet, challenge, page)
		if err == nil && len(clientData) < len(challenge) || err != nil && ReasonOf(err) == "" {
			t.Fatalf("%q: %v", clientData, err)
		}
		flags, err := checkAuthData(authData)
		if err == nil && (len(authData) < authDataSize || flags&flagVerified == 0) || err != nil && ReasonOf(err) == "" {
			t.Fatalf("%x: %v", authData, err)
		}
	})
}

func BenchmarkVerifyPasskey(b *testing.B) {
	a := passkeytest.New(b, page)
	ask := askFor(b, actions()["push"])
	_, token := passkeyGrant(b, a, "ann", ask)
	keys := passkeyApprover(b, "ann", a)
	for b.Loop() {
		if _, err := Verify(token, ask, keys, created+1); err != nil {
			b.Fatal(err)
		}
	}
}
