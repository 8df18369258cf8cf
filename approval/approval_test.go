package approval

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	paseto "aidanwoods.dev/go-paseto"

	"cal/nucleus"
)

const created = 1_700_000_000_000

func hexOf(s string) string { return nucleus.SHA256([]byte(s)) }

// sealed recomputes the ask's digest after a change to its action or salt.
func sealed(t testing.TB, ask nucleus.AskRequest) nucleus.AskRequest {
	t.Helper()
	digest, err := ask.Action.Digest(nucleus.Salt(ask.Salt))
	if err != nil {
		t.Fatal(err)
	}
	ask.Digest = digest
	return ask
}

func askFor(t testing.TB, action nucleus.Action) nucleus.AskRequest {
	t.Helper()
	salt := nucleus.Salt{1, 2, 3}
	var passage *nucleus.Passage
	if host, port, ok := action.Place(); ok {
		passage = &nucleus.Passage{Host: host, Port: port, Exposure: nucleus.Private | nucleus.WayOut, Millis: MaxPassage}
	}
	return sealed(t, nucleus.AskRequest{
		ID: "a-1", Pod: "p-1", Workspace: "shop", Session: "s-1", Boot: "b-1", Requester: "agent-1",
		Request: json.RawMessage(`{"method":"POST"}`), Action: action, Salt: salt[:], Policy: hexOf("policy"),
		Rule: "trifecta", Why: "private data met a stranger's text", Approvals: 1, Tier: "kernel", Mode: "mediated",
		Context:  nucleus.Context{Exposure: nucleus.Private | nucleus.Untrusted, UntrustedRepo: true, UnixMilli: created - 1},
		Detail:   []nucleus.Detail{{Title: "diff", Text: "-old\n+new"}},
		Evidence: []nucleus.Evidence{{Seq: 12, Leg: "private", What: "read_files secret.txt"}},
		Passage:  passage,
		Created:  created, Expires: created + 300_000, Nonce: "n-1",
	})
}

// actions holds one full action for each part.
func actions() map[string]nucleus.Action {
	args := hexOf("args")
	file := []nucleus.File{{Path: "a.go", Before: hexOf("x"), After: hexOf("y")}}
	return map[string]nucleus.Action{
		"files":   {Op: nucleus.WriteFiles, Args: args, Files: file},
		"command": {Op: nucleus.RunBash, Args: args, Command: &nucleus.Command{Argv: []string{"git", "-C", ".", "push"}, Script: true, Dir: "app", Env: map[string]string{"A": "b"}, Stdin: hexOf("in"), Binary: "/usr/bin/git", Files: file, TTY: true}},
		"fetch":   {Op: nucleus.WebFetch, Args: args, Fetch: &nucleus.Fetch{Method: "POST", URL: "https://example.com/p", Host: "example.com", Port: 443, Path: "/p", Headers: map[string]string{"Accept": "text/plain"}, Body: hexOf("b"), Bytes: 3}},
		"connect": {Op: nucleus.NetConnect, Args: args, Connect: &nucleus.Connect{Host: "example.com", Port: 22}},
		"push":    {Op: nucleus.GitPush, Args: args, Push: &nucleus.Push{Repo: "app", Remote: "https://example.com/app.git", Ref: "refs/heads/main", Old: "0000", New: "abcd"}},
		"pr":      {Op: nucleus.CreatePR, Args: args, PR: &nucleus.PR{Repository: "o/r", API: "https://api.example.com", Base: "main", Head: "agent/x", HeadID: "abcd", Title: "fix", Body: "one\ntwo"}},
		"job":     {Op: nucleus.RunBash, Args: args, Job: &nucleus.Job{ID: "job-1", Stop: true}},
		"commit":  {Op: nucleus.GitCommit, Args: args, Commit: &nucleus.Commit{Repo: "app", Message: "fix\n\nbody", Paths: []string{"a.go"}, Name: "P", Email: "p@example.com"}},
	}
}

type approver struct {
	name   string
	public ed25519.PublicKey
	key    paseto.V4AsymmetricSecretKey
}

func newApprover(t testing.TB, name string) approver {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := paseto.NewV4AsymmetricSecretKeyFromEd25519(private)
	if err != nil {
		t.Fatal(err)
	}
	return approver{name, public, key}
}

func (a approver) keys() []nucleus.Approver {
	return []nucleus.Approver{{Name: a.name, Kind: nucleus.ApproverEd25519, Key: a.public}}
}

// sign makes a token of any claims, as a faulty or hostile signer could.
func (a approver) sign(t testing.TB, claims any, footer []byte, assertion []byte) string {
	t.Helper()
	raw, err := nucleus.Canonical(claims)
	if err != nil {
		t.Fatal(err)
	}
	token, err := paseto.NewTokenFromClaimsJSON(raw, footer)
	if err != nil {
		t.Fatal(err)
	}
	return token.V4Sign(a.key, assertion)
}

func (a approver) grant(t testing.TB, ask nucleus.AskRequest) (nucleus.Grant, string) {
	t.Helper()
	b, err := Bind(ask)
	if err != nil {
		t.Fatal(err)
	}
	g := b.Grant("g-1", a.name, "looks right")
	return g, a.sign(t, g, Footer(a.name), Assertion(b.AskDigest))
}

func wantReason(t *testing.T, what string, err error, want Reason) {
	t.Helper()
	if err == nil {
		t.Fatalf("%s: accepted, want refused as %q", what, want)
	}
	if got := ReasonOf(err); got != want {
		t.Fatalf("%s: refused as %q (%v), want %q", what, got, err, want)
	}
}

// A token is moved: the same approver, the same bytes, another ask.
func TestVerifyMovedToken(t *testing.T) {
	a := newApprover(t, "ann")
	ask := askFor(t, actions()["push"])
	_, token := a.grant(t, ask)

	moves := map[Reason]func(*nucleus.AskRequest){
		BadAsk:       func(q *nucleus.AskRequest) { q.ID = "a-2" },
		BadPod:       func(q *nucleus.AskRequest) { q.Pod = "p-2" },
		BadSession:   func(q *nucleus.AskRequest) { q.Session = "s-2" },
		BadBoot:      func(q *nucleus.AskRequest) { q.Boot = "b-2" },
		BadOp:        func(q *nucleus.AskRequest) { q.Action.Op = nucleus.CreatePR },
		BadDigest:    func(q *nucleus.AskRequest) { q.Digest = hexOf("other") },
		BadPolicy:    func(q *nucleus.AskRequest) { q.Policy = hexOf("looser") },
		BadNonce:     func(q *nucleus.AskRequest) { q.Nonce = "n-2" },
		BadLife:      func(q *nucleus.AskRequest) { q.Expires -= 1000 },
		BadAskDigest: func(q *nucleus.AskRequest) { q.Why = "nothing to see" },
	}
	for want, move := range moves {
		moved := ask
		move(&moved)
		_, err := Verify(token, moved, a.keys(), created+1)
		if want == BadLife { // the digest differs too, and is compared first
			want = BadAskDigest
		}
		wantReason(t, fmt.Sprintf("moved to another %s", want), err, want)
	}
	for at, want := range map[int64]Reason{created - 1: NotYet, ask.Expires: Expired, ask.Expires + 1: Expired} {
		_, err := Verify(token, ask, a.keys(), at)
		wantReason(t, fmt.Sprintf("at %d", at), err, want)
	}
	for _, at := range []int64{created, ask.Expires - 1} {
		if _, err := Verify(token, ask, a.keys(), at); err != nil {
			t.Errorf("at %d: %v", at, err)
		}
	}
}

// Every leaf of the ask is changed on its own: the grant no longer holds.
func TestVerifyEveryFieldOfAsk(t *testing.T) {
	a := newApprover(t, "ann")
	for name, action := range actions() {
		ask := askFor(t, action)
		_, token := a.grant(t, ask)
		if _, err := Verify(token, ask, a.keys(), created+1); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		changed := 0
		eachChange(t, ask, func(path string, other nucleus.AskRequest) {
			changed++
			if _, err := Verify(token, other, a.keys(), created+1); err == nil || ReasonOf(err) == "" {
				t.Errorf("%s: %s changed: %v, want a refusal", name, path, err)
			}
		})
		if changed < 30 {
			t.Errorf("%s: %d fields changed, want at least 30", name, changed)
		}
	}
}

// A signer that holds the key but signs other claims over the right ask.
func TestVerifyEveryClaim(t *testing.T) {
	a := newApprover(t, "ann")
	ask := askFor(t, actions()["push"])
	good, _ := a.grant(t, ask)
	digest, _, _ := Digest(ask)

	for name, c := range map[string]struct {
		change func(*nucleus.Grant)
		want   Reason
	}{
		"jti empty":   {func(g *nucleus.Grant) { g.ID = "" }, BadID},
		"jti odd":     {func(g *nucleus.Grant) { g.ID = "../x" }, BadID},
		"iss":         {func(g *nucleus.Grant) { g.Approver = "bob" }, BadIssuer},
		"ask":         {func(g *nucleus.Grant) { g.Ask += "x" }, BadAsk},
		"ask_sha256":  {func(g *nucleus.Grant) { g.AskDigest = hexOf("x") }, BadAskDigest},
		"aud":         {func(g *nucleus.Grant) { g.Pod += "x" }, BadPod},
		"aud empty":   {func(g *nucleus.Grant) { g.Pod = "" }, BadPod},
		"session":     {func(g *nucleus.Grant) { g.Session = "" }, BadSession},
		"boot":        {func(g *nucleus.Grant) { g.Boot += "x" }, BadBoot},
		"op":          {func(g *nucleus.Grant) { g.Op = nucleus.RunBash }, BadOp},
		"op unknown":  {func(g *nucleus.Grant) { g.Op = "anything" }, BadFormat},
		"digest":      {func(g *nucleus.Grant) { g.Digest = strings.ToUpper(g.Digest) }, BadDigest},
		"policy":      {func(g *nucleus.Grant) { g.Policy = "" }, BadPolicy},
		"nonce":       {func(g *nucleus.Grant) { g.Nonce = "" }, BadNonce},
		"nbf early":   {func(g *nucleus.Grant) { g.NotBefore-- }, BadLife},
		"nbf future":  {func(g *nucleus.Grant) { g.NotBefore = created + 1000 }, NotYet},
		"exp late":    {func(g *nucleus.Grant) { g.Expires++ }, BadLife},
		"exp missing": {func(g *nucleus.Grant) { g.Expires = 0 }, BadLife},
		"exp past":    {func(g *nucleus.Grant) { g.Expires = created + 5 }, Expired},
	} {
		g := good
		c.change(&g)
		_, err := Verify(a.sign(t, g, Footer("ann"), Assertion(digest)), ask, a.keys(), created+10)
		wantReason(t, name, err, c.want)
	}

	extra := map[string]any{}
	raw, _ := json.Marshal(good)
	if err := json.Unmarshal(raw, &extra); err != nil {
		t.Fatal(err)
	}
	extra["nbf_ms"], extra["exp_ms"] = good.NotBefore, good.Expires
	if _, err := Verify(a.sign(t, extra, Footer("ann"), Assertion(digest)), ask, a.keys(), created+10); err != nil {
		t.Fatalf("positive control: %v", err)
	}
	extra["uses"] = 20
	_, err := Verify(a.sign(t, extra, Footer("ann"), Assertion(digest)), ask, a.keys(), created+10)
	wantReason(t, "unknown claim", err, BadFormat)
}

func TestVerifyKeysAndTokens(t *testing.T) {
	ann, eve := newApprover(t, "ann"), newApprover(t, "ann")
	ask := askFor(t, actions()["push"])
	digest, _, _ := Digest(ask)
	good, token := ann.grant(t, ask)
	_, forged := eve.grant(t, ask)

	flip := func(i int) string {
		c := byte('A')
		if token[i] == c {
			c = 'B'
		}
		return token[:i] + string(c) + token[i+1:]
	}
	dot := strings.LastIndexByte(token, '.')
	for name, c := range map[string]struct {
		token string
		keys  []nucleus.Approver
		want  Reason
	}{
		"empty":                 {"", ann.keys(), BadSize},
		"huge":                  {token + strings.Repeat("A", MaxToken), ann.keys(), BadSize},
		"huge footer":           {token + strings.Repeat("A", 300), ann.keys(), BadSize},
		"word":                  {"yes", ann.keys(), BadFormat},
		"local token":           {strings.Replace(token, "public", "local", 1), ann.keys(), BadFormat},
		"version 2":             {strings.Replace(token, "v4", "v2", 1), ann.keys(), BadFormat},
		"no footer":             {token[:dot], ann.keys(), BadFormat},
		"two footers":           {token + ".AA", ann.keys(), BadFormat},
		"no payload":            {tokenHeader + token[dot:], ann.keys(), BadFormat},
		"payload too short":     {tokenHeader + "AAAA" + token[dot:], ann.keys(), BadFormat},
		"another's key":         {forged, ann.keys(), BadSignature},
		"nobody approves":       {token, nil, BadApprover},
		"approver unknown":      {token, []nucleus.Approver{{Name: "bob", Kind: nucleus.ApproverEd25519, Key: ann.public}}, BadApprover},
		"key of no length":      {token, []nucleus.Approver{{Name: "ann", Kind: nucleus.ApproverEd25519}}, BadApprover},
		"key of another kind":   {token, []nucleus.Approver{{Name: "ann", Kind: "rsa", Key: ann.public}}, BadApprover},
		"claims changed":        {flip(len(tokenHeader) + 12), ann.keys(), BadFormat},
		"signature changed":     {flip(dot - 9), ann.keys(), BadSignature},
		"without assertion":     {ann.sign(t, good, Footer("ann"), nil), ann.keys(), BadSignature},
		"assertion of the ask":  {ann.sign(t, good, Footer("ann"), []byte(digest)), ann.keys(), BadSignature},
		"footer with more":      {ann.sign(t, good, []byte(`{"kid":"ann","x":1}`), Assertion(digest)), ann.keys(), BadFormat},
		"footer with spaces":    {ann.sign(t, good, []byte(`{"kid": "ann"}`), Assertion(digest)), ann.keys(), BadFormat},
		"footer changed to ann": {ann.sign(t, good, Footer("bob"), Assertion(digest))[:dot] + token[dot:], ann.keys(), BadSignature},
	} {
		_, err := Verify(c.token, ask, c.keys, created+1)
		if name == "claims changed" && ReasonOf(err) == BadSignature {
			continue // the changed byte still made JSON
		}
		wantReason(t, name, err, c.want)
	}
	if got, err := Verify(token, ask, ann.keys(), created+1); err != nil || got != good {
		t.Fatalf("positive control: %+v, %v; want %+v", got, err, good)
	}
	if _, err := Verify(forged, ask, eve.keys(), created+1); err != nil {
		t.Fatalf("positive control: %v", err)
	}

	b, err := Bind(ask)
	if err != nil {
		t.Fatal(err)
	}
	for _, empty := range []func(*Binding){
		func(b *Binding) { b.Ask = "" }, func(b *Binding) { b.AskDigest = "" }, func(b *Binding) { b.Pod = "" },
		func(b *Binding) { b.Session = "" }, func(b *Binding) { b.Boot = "" }, func(b *Binding) { b.Op = "" },
		func(b *Binding) { b.Digest = "" }, func(b *Binding) { b.Policy = "" }, func(b *Binding) { b.Nonce = "" },
		func(b *Binding) { b.Created = 0 }, func(b *Binding) { b.Expires = 0 },
	} {
		w := b
		empty(&w)
		_, err := w.Verify(token, ann.keys(), created+1)
		wantReason(t, fmt.Sprintf("%+v", w), err, BadWant)
	}
}

func TestCheck(t *testing.T) {
	for name, action := range actions() {
		if err := Check(askFor(t, action)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct {
		change func(*nucleus.AskRequest)
		want   string
	}{
		"no id":              {func(q *nucleus.AskRequest) { q.ID = "" }, "id"},
		"id is a path":       {func(q *nucleus.AskRequest) { q.ID = "../a" }, "id"},
		"id is a dot":        {func(q *nucleus.AskRequest) { q.ID = ".." }, "id"},
		"pod with escape":    {func(q *nucleus.AskRequest) { q.Pod = "p\x1b[2J" }, "pod"},
		"no nonce":           {func(q *nucleus.AskRequest) { q.Nonce = "" }, "nonce"},
		"short salt":         {func(q *nucleus.AskRequest) { q.Salt = q.Salt[:31] }, "31 bytes"},
		"digest":             {func(q *nucleus.AskRequest) { q.Digest = hexOf("x") }, "action and salt give"},
		"action":             {func(q *nucleus.AskRequest) { q.Action.Args = hexOf("x") }, "action and salt give"},
		"salt":               {func(q *nucleus.AskRequest) { q.Salt = append([]byte{9}, q.Salt[1:]...) }, "action and salt give"},
		"policy":             {func(q *nucleus.AskRequest) { q.Policy = "none" }, "policy digest"},
		"expires first":      {func(q *nucleus.AskRequest) { q.Expires = q.Created }, "life"},
		"for ever":           {func(q *nucleus.AskRequest) { q.Expires = q.Created + MaxLife + 1 }, "life"},
		"push without push":  {func(q *nucleus.AskRequest) { q.Action.Push = nil }, "git_push without its push"},
		"push and a command": {func(q *nucleus.AskRequest) { q.Action.Command = &nucleus.Command{} }, "does not belong"},
		"unknown operation":  {func(q *nucleus.AskRequest) { q.Action.Op = "sudo" }, "unknown operation"},
	} {
		ask := askFor(t, actions()["push"])
		c.change(&ask)
		if err := Check(ask); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.want)
		}
	}
}

// What is granted by place says which, for how long, and it is the place that the
// action leads to; nothing else is granted so.
func TestCheckPassage(t *testing.T) {
	for _, name := range []string{"connect", "fetch"} {
		for want, change := range map[string]func(*nucleus.AskRequest){
			"without its passage":        func(q *nucleus.AskRequest) { q.Passage = nil },
			"the passage leads to other": func(q *nucleus.AskRequest) { q.Passage.Host = "other.example" },
			"port 8443":                  func(q *nucleus.AskRequest) { q.Passage.Port = 8443 },
			"stands for 0 ms":            func(q *nucleus.AskRequest) { q.Passage.Millis = 0 },
			"stands for -1 ms":           func(q *nucleus.AskRequest) { q.Passage.Millis = -1 },
			"stands for 3600001 ms":      func(q *nucleus.AskRequest) { q.Passage.Millis = MaxPassage + 1 },
			"exposure 0x81":              func(q *nucleus.AskRequest) { q.Passage.Exposure = 0x81 },
		} {
			ask := askFor(t, actions()[name])
			if err := Check(ask); err != nil {
				t.Fatalf("positive control: %v", err)
			}
			change(&ask)
			if err := Check(ask); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want an error with %q", name, err, want)
			}
		}
	}
	for _, name := range []string{"push", "pr", "files", "command", "commit", "job"} {
		ask := askFor(t, actions()[name])
		ask.Passage = &nucleus.Passage{Host: "example.com", Port: 443, Millis: 1}
		if err := Check(ask); err == nil || !strings.Contains(err.Error(), "with a passage") {
			t.Errorf("%s: %v, want it refused", name, err)
		}
	}
}

func TestParse(t *testing.T) {
	ask := askFor(t, actions()["command"])
	digest, canonical, err := Digest(ask)
	if err != nil {
		t.Fatal(err)
	}
	text := string(canonical)
	for name, raw := range map[string]string{
		"empty":          "",
		"key in caps":    strings.Replace(text, `"pod":`, `"POD":`, 1),
		"key twice":      strings.Replace(text, `"pod":`, `"pod":"p-9","pod":`, 1),
		"unknown key":    strings.Replace(text, `"pod":`, `"always":true,"pod":`, 1),
		"empty member":   strings.Replace(text, `"dir":"app"`, `"dir":"app","stdin_sha256":""`, 1),
		"not UTF-8":      strings.Replace(text, "shop", "sh\xffop", 1),
		"lone surrogate": strings.Replace(text, "shop", `sh\ud800op`, 1),
		"data after":     text + "{}",
		"too long":       strings.Replace(text, "shop", strings.Repeat("x", MaxAsk), 1),
	} {
		if raw == text {
			t.Fatalf("%s: nothing changed", name)
		}
		if _, _, _, err := Parse([]byte(raw)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	got, d, c, err := Parse([]byte(" " + text + "\n"))
	if err != nil || d != digest || string(c) != text || !reflect.DeepEqual(got.Action, ask.Action) {
		t.Errorf("Parse = %+v, %s, %s, %v", got, d, c, err)
	}

	ask.Action.Command.Argv[1] = "a\xff"
	if _, _, err := Digest(ask); err == nil || !strings.Contains(err.Error(), "UTF-8") {
		t.Errorf("argv that is not UTF-8: %v, want refused", err)
	}
}

// eachChange calls f with a copy of ask for every leaf field, that leaf changed.
func eachChange(t testing.TB, ask nucleus.AskRequest, f func(path string, other nucleus.AskRequest)) {
	t.Helper()
	var paths [][]int
	leaves(reflect.ValueOf(ask), nil, func(path []int) { paths = append(paths, path) })
	for _, path := range paths {
		raw, err := json.Marshal(ask)
		if err != nil {
			t.Fatal(err)
		}
		var other nucleus.AskRequest
		if err := json.Unmarshal(raw, &other); err != nil {
			t.Fatal(err)
		}
		name := change(t, reflect.ValueOf(&other).Elem(), path)
		f(name, other)
	}
}

func leaves(v reflect.Value, path []int, f func([]int)) {
	step := func(i int) []int { return append(append([]int{}, path...), i) }
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			leaves(v.Field(i), step(i), f)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			leaves(v.Elem(), path, f)
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			f(path)
			return
		}
		for i := range v.Len() {
			leaves(v.Index(i), step(i), f)
		}
	default:
		f(path)
	}
}

func change(t testing.TB, v reflect.Value, path []int) string {
	name := ""
	for _, i := range path {
		for v.Kind() == reflect.Pointer {
			v = v.Elem()
		}
		if v.Kind() == reflect.Struct {
			name += "." + v.Type().Field(i).Name
			v = v.Field(i)
		} else {
			name += fmt.Sprintf("[%d]", i)
			v = v.Index(i)
		}
	}
	switch v.Kind() {
	case reflect.String:
		if v.Type() == reflect.TypeFor[nucleus.Op]() {
			v.SetString(string(nucleus.ManagePods))
			break
		}
		v.SetString(v.String() + "x")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Uint8:
		v.SetUint(v.Uint() ^ 4)
	case reflect.Map:
		for _, key := range v.MapKeys() {
			v.SetMapIndex(key, reflect.ValueOf(v.MapIndex(key).String()+"x"))
		}
	case reflect.Slice:
		if v.Type() == reflect.TypeFor[json.RawMessage]() {
			v.SetBytes([]byte(`{"method":"GET"}`))
			break
		}
		v.SetBytes(append([]byte{^v.Bytes()[0]}, v.Bytes()[1:]...))
	default:
		t.Fatalf("%s: kind %s", name, v.Kind())
	}
	return name
}

func FuzzVerify(f *testing.F) {
	a := newApprover(f, "ann")
	ask := askFor(f, actions()["push"])
	_, token := a.grant(f, ask)
	f.Add(token)
	f.Add(token[:len(token)-4])
	f.Add("v4.public..")
	f.Add("v4.public.AAAA.e30")
	f.Fuzz(func(t *testing.T, other string) {
		_, err := Verify(other, ask, a.keys(), created+1)
		if err == nil && other != token {
			t.Fatalf("accepted %q", other)
		}
		if err != nil && ReasonOf(err) == "" {
			t.Fatalf("%v is no refusal", err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	a := newApprover(b, "ann")
	ask := askFor(b, actions()["push"])
	_, token := a.grant(b, ask)
	for b.Loop() {
		if _, err := Verify(token, ask, a.keys(), created+1); err != nil {
			b.Fatal(err)
		}
	}
}

// As many different approvers as the ask needs: no more, no fewer, none twice, by name, key or
// grant.
func TestApproved(t *testing.T) {
	ann, bob, carol := newApprover(t, "ann"), newApprover(t, "bob"), newApprover(t, "carol")
	twin := approver{"twin", ann.public, ann.key}
	known := slices.Concat(ann.keys(), bob.keys(), twin.keys())
	ask := askFor(t, actions()["push"])
	ask.Approvals = 2
	other := ask
	other.Nonce = "n-2"
	token := func(a approver, ask nucleus.AskRequest, id string) string {
		b, err := Bind(ask)
		if err != nil {
			t.Fatal(err)
		}
		return a.sign(t, b.Grant(id, a.name, ""), Footer(a.name), Assertion(b.AskDigest))
	}
	one, two := token(ann, ask, "g-1"), token(bob, ask, "g-2")
	for what, c := range map[string]struct {
		tokens []string
		want   Reason
	}{
		"none":                   {nil, BadQuorum},
		"one":                    {[]string{one}, BadQuorum},
		"three":                  {[]string{one, two, token(twin, ask, "g-3")}, BadQuorum},
		"one twice":              {[]string{one, one}, BadTwice},
		"two of one approver":    {[]string{one, token(ann, ask, "g-3")}, BadTwice},
		"one key by two names":   {[]string{one, token(twin, ask, "g-3")}, BadTwice},
		"one id by two":          {[]string{one, token(bob, ask, "g-1")}, BadTwice},
		"an unknown second":      {[]string{one, token(carol, ask, "g-3")}, BadApprover},
		"a second for other":     {[]string{one, token(bob, other, "g-3")}, BadNonce},
		"a second by the first":  {[]string{one, token(approver{"bob", ann.public, ann.key}, ask, "g-3")}, BadSignature},
		"a second that is empty": {[]string{one, ""}, BadSize},
	} {
		_, err := Approved(c.tokens, ask, known, created+1)
		wantReason(t, what, err, c.want)
	}
	if grants, err := Approved([]string{two, one}, ask, known, created+1); err != nil || len(grants) != 2 || grants[0].Approver != "bob" {
		t.Errorf("positive control: %+v, %v", grants, err)
	}
	ask.Approvals = 0
	_, err := Approved(nil, ask, known, created+1)
	wantReason(t, "an ask for none", err, BadQuorum)
}

func TestDifferent(t *testing.T) {
	ann, bob := newApprover(t, "ann"), newApprover(t, "bob")
	twin := approver{"twin", ann.public, ann.key}
	all := slices.Concat(ann.keys(), bob.keys(), twin.keys())
	for what, c := range map[string]struct {
		requesters [][]byte
		want       string
	}{
		"one key counts once": {nil, "ann bob"}, "who asks does not count": {[][]byte{bob.public}, "ann"}, "by whatever name": {[][]byte{ann.public, {}}, "bob"},
	} {
		var got []string
		for _, a := range Different(all, c.requesters...) {
			got = append(got, a.Name)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", what, got, c.want)
		}
	}
}
