package wire

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"

	"github.com/dunglas/httpsfv"
	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write testdata/signatures.json anew")

// The keys of RFC 9421, appendix B.1.4 and B.1.5.
var (
	rfcPrivate = ed25519.NewKeyFromSeed(unhex("9f8362f87a484a954e6e740c5b4c0e84229139a20aa8ab56ff66586f6a7d29c5"))
	rfcPublic  = rfcPrivate.Public().(ed25519.PublicKey)
	rfcSecret  = unbase64("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
)

func unhex(s string) []byte {
	raw, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return raw
}

func unbase64(s string) []byte {
	raw, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return raw
}

// TestRFC9421 runs appendix B.2.5 and B.2.6. Their components are not those of our
// profile, so the signature base stands here as the RFC prints it.
func TestRFC9421(t *testing.T) {
	b25 := `"date": Tue, 20 Apr 2021 02:07:55 GMT
"@authority": example.com
"content-type": application/json
"@signature-params": ("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"`
	if got, want := byteSequence(macSHA256(rfcSecret, []byte(b25))), ":pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:"; got != want {
		t.Errorf("B.2.5: got %s, want %s", got, want)
	}
	b26 := `"date": Tue, 20 Apr 2021 02:07:55 GMT
"@method": POST
"@path": /foo
"@authority": example.com
"content-type": application/json
"content-length": 18
"@signature-params": ("date" "@method" "@path" "@authority" "content-type" "content-length");created=1618884473;keyid="test-key-ed25519"`
	if got, want := byteSequence(ed25519.Sign(rfcPrivate, []byte(b26))), ":wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==:"; got != want {
		t.Errorf("B.2.6: got %s, want %s", got, want)
	}
	// RFC 9530, appendix B.1, of the body of RFC 9421.
	if got, want := contentDigest([]byte(`{"hello": "world"}`)), "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"; got != want {
		t.Errorf("digest: got %s, want %s", got, want)
	}
}

var noon = time.Date(2026, 11, 22, 12, 0, 0, 500e6, time.UTC)

// site is a verifier with a clock that stands still, and signers for it.
type site struct {
	now      time.Time
	verifier *Verifier
	operator *Signer
	agent    *Signer
	keys     map[string]Key
}

func newSite() *site {
	s := &site{now: noon}
	clock := func() time.Time { return s.now }
	s.keys = map[string]Key{
		"operator": {ID: "operator", Ed25519: rfcPublic, Role: Operator},
		"agent-1":  {ID: "agent-1", HMAC: rfcSecret, Role: AgentRole, Pod: "pod-1"},
	}
	s.verifier = &Verifier{
		Keys:    func(id string) (Key, bool) { k, ok := s.keys[id]; return k, ok },
		Now:     clock,
		Started: noon.Add(-time.Hour),
	}
	s.operator = &Signer{KeyID: "operator", Ed25519: rfcPrivate, Now: clock}
	s.agent = &Signer{KeyID: "agent-1", HMAC: rfcSecret, Now: clock}
	return s
}

const target = "http://nucleus/v1/pods/pod-1/tools/run_bash?wait=5&x=%2Fy"

func (s *site) signed(t testing.TB, signer *Signer, body string) *http.Request {
	t.Helper()
	r, err := signer.NewSignedRequest("POST", target, "pod-1", []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	return arrived(t, r, body)
}

// arrived is a request as a server gets it: written and read again.
func arrived(t testing.TB, r *http.Request, body string) *http.Request {
	t.Helper()
	var wire bytes.Buffer
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	if err := r.Write(&wire); err != nil {
		t.Fatal(err)
	}
	got := httptest.NewRequest("GET", "/", nil)
	read, err := http.ReadRequest(bufio.NewReader(&wire))
	if err != nil {
		t.Fatal(err)
	}
	return read.WithContext(got.Context())
}

func (s *site) wantRefused(t *testing.T, what string, r *http.Request, want string) {
	t.Helper()
	_, _, _, err := s.verifier.Verify(r, "nucleus")
	var e *nucleus.Error
	switch {
	case err == nil:
		t.Errorf("%s: admitted", what)
	case !errors.As(err, &e) || e.Kind != nucleus.KindUnauthenticated || !strings.Contains(e.Message, want):
		t.Errorf("%s: got %v, want an error of kind unauthenticated with %q", what, err, want)
	}
}

func TestVerifyAdmits(t *testing.T) {
	s := newSite()
	for _, signer := range []*Signer{s.operator, s.agent} {
		r := s.signed(t, signer, `{"argv":["ls"]}`)
		// What is not covered may change on the way.
		r.Header.Set("X-Extra", "1")
		r.Header.Set("User-Agent", "other")
		caller, body, signed, err := s.verifier.Verify(r, "nucleus")
		if err != nil {
			t.Fatal(err)
		}
		want := Caller{KeyID: signer.KeyID, Role: s.keys[signer.KeyID].Role, Pod: s.keys[signer.KeyID].Pod}
		if caller != want || string(body) != `{"argv":["ls"]}` || signed.Pod != "pod-1" || signed.TargetURI != target || signed.Method != "POST" {
			t.Errorf("got %+v, %s, %+v", caller, body, signed)
		}
		if again, err := io.ReadAll(r.Body); string(again) != string(body) || err != nil {
			t.Errorf("the handler reads %q, %v", again, err)
		}
	}
	get, err := s.operator.NewSignedRequest("GET", "http://nucleus/v1/pods", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, body, signed, err := s.verifier.Verify(arrived(t, get, ""), "nucleus"); err != nil || len(body) != 0 || signed.Pod != NoPod {
		t.Errorf("GET: %q, %+v, %v", body, signed, err)
	}
}

func TestVerifyRefusesWhatWasChanged(t *testing.T) {
	const body = `{"argv":["ls"]}`
	for _, c := range []struct {
		name   string
		change func(*http.Request)
		want   string
	}{
		{"method", func(r *http.Request) { r.Method = "PUT" }, "does not fit"},
		{"path", func(r *http.Request) { r.RequestURI = strings.Replace(r.RequestURI, "run_bash", "git_push", 1) }, "does not fit"},
		{"another pod's path", func(r *http.Request) { r.RequestURI = strings.Replace(r.RequestURI, "pod-1", "pod-2", 1) }, "does not fit"},
		{"spelling of the path", func(r *http.Request) { r.RequestURI = strings.Replace(r.RequestURI, "/v1/", "/v1//", 1) }, "does not fit"},
		{"escape in the path", func(r *http.Request) { r.RequestURI = strings.Replace(r.RequestURI, "%2F", "%2f", 1) }, "does not fit"},
		{"query", func(r *http.Request) { r.RequestURI = strings.Replace(r.RequestURI, "wait=5", "wait=6", 1) }, "does not fit"},
		{"no query", func(r *http.Request) { r.RequestURI, _, _ = strings.Cut(r.RequestURI, "?") }, "does not fit"},
		{"absolute target", func(r *http.Request) { r.RequestURI = target }, "want a path"},
		{"no path", func(r *http.Request) { r.RequestURI = "*" }, "want a path"},
		{"host", func(r *http.Request) { r.Host = "evil" }, `host "evil", want "nucleus"`},
		{"pod", func(r *http.Request) { r.Header.Set("Nucleus-Pod", "pod-2") }, "does not fit"},
		{"no pod", func(r *http.Request) { r.Header.Del("Nucleus-Pod") }, "0 headers Nucleus-Pod"},
		{"empty pod", func(r *http.Request) { r.Header.Set("Nucleus-Pod", "") }, "no name"},
		{"two pods", func(r *http.Request) { r.Header.Add("Nucleus-Pod", "pod-2") }, "2 headers Nucleus-Pod"},
		{"pod with a line of its own", func(r *http.Request) { r.Header.Set("Nucleus-Pod", "pod-1\n\"x\": y") }, "no name"},
		{"body", func(r *http.Request) { setBody(r, `{"argv":["rm"]}`) }, "body's digest"},
		{"longer body", func(r *http.Request) { setBody(r, body+" ") }, "body's digest"},
		{"no body", func(r *http.Request) { setBody(r, "") }, "body's digest"},
		{"body and digest", func(r *http.Request) {
			setBody(r, "{}")
			r.Header.Set("Content-Digest", contentDigest([]byte("{}")))
		}, "does not fit"},
		{"no digest", func(r *http.Request) { r.Header.Del("Content-Digest") }, "0 headers Content-Digest"},
		{"two digests", func(r *http.Request) { r.Header.Add("Content-Digest", contentDigest([]byte("{}"))) }, "2 headers Content-Digest"},
		{"two digests in one", func(r *http.Request) {
			r.Header.Set("Content-Digest", r.Header.Get("Content-Digest")+", "+contentDigest([]byte("{}")))
		}, "want sha-256="},
		{"digest of another kind", func(r *http.Request) {
			r.Header.Set("Content-Digest", strings.Replace(r.Header.Get("Content-Digest"), "256", "512", 1))
		}, "want sha-256="},
		{"digest that is too short", func(r *http.Request) { r.Header.Set("Content-Digest", "sha-256=:AAAA:") }, "want sha-256="},
		{"signature", func(r *http.Request) { r.Header.Set("Signature", label+byteSequence(make([]byte, 64))) }, "does not fit"},
		{"short signature", func(r *http.Request) { r.Header.Set("Signature", label+byteSequence(nil)) }, "does not fit"},
		{"no signature", func(r *http.Request) { r.Header.Del("Signature") }, "0 headers Signature"},
		{"signature under another label", func(r *http.Request) {
			r.Header.Set("Signature", strings.Replace(r.Header.Get("Signature"), label, "sig1=", 1))
		}, "the one signature"},
		{"a second signature", func(r *http.Request) {
			r.Header.Set("Signature", r.Header.Get("Signature")+", other="+byteSequence(nil))
		}, "the one signature"},
		{"a second signature before", func(r *http.Request) {
			r.Header.Set("Signature", "other="+byteSequence(nil)+", "+r.Header.Get("Signature"))
		}, "the one signature"},
		{"a second header of signatures", func(r *http.Request) { r.Header.Add("Signature", "other=:AA==:") }, "2 headers Signature"},
		{"a second input", func(r *http.Request) { r.Header.Add("Signature-Input", "other=()") }, "2 headers Signature-Input"},
		{"no input", func(r *http.Request) { r.Header.Del("Signature-Input") }, "0 headers Signature-Input"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, pick := range []func(*site) *Signer{func(s *site) *Signer { return s.operator }, func(s *site) *Signer { return s.agent }} {
				s := newSite()
				r := s.signed(t, pick(s), body)
				c.change(r)
				s.wantRefused(t, c.name, r, c.want)
			}
		})
	}
}

func setBody(r *http.Request, body string) {
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
}

// sign makes a request whose signature fits, with any input and components.
func (s *site) sign(t testing.TB, key string, base func(SignedRequest) []byte, input string) *http.Request {
	t.Helper()
	r := s.signed(t, s.operator, "{}")
	signed, err := readSigned(r, "nucleus")
	if err != nil {
		t.Fatal(err)
	}
	signed.SignatureInput = input
	r.Header.Set("Signature-Input", input)
	raw := base(signed)
	signature := ed25519.Sign(rfcPrivate, raw)
	if s.keys[key].HMAC != nil {
		signature = macSHA256(s.keys[key].HMAC, raw)
	}
	r.Header.Set("Signature", label+byteSequence(signature))
	return r
}

func profileBase(s SignedRequest) []byte {
	return s.base(strings.TrimPrefix(s.SignatureInput, label))
}

func (s *site) input(change func(*parameters)) string {
	p := parameters{created: s.now.Unix(), expires: s.now.Unix() + 30, nonce: "nonce-of-sixteen", keyID: "operator", alg: algEd25519}
	if change != nil {
		change(&p)
	}
	return label + p.String()
}

// TestVerifyRefusesAnotherProfile: the signature fits, by the right key, but is not
// made as it must be.
func TestVerifyRefusesAnotherProfile(t *testing.T) {
	s := newSite()
	good := s.input(nil)
	if _, _, _, err := s.verifier.Verify(s.sign(t, "operator", profileBase, good), "nucleus"); err != nil {
		t.Fatalf("the control: %v", err)
	}
	replace := func(old, with string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("%q is not in %s", old, good)
		}
		return strings.Replace(good, old, with, 1)
	}
	created := fmt.Sprintf(";created=%d", s.now.Unix())
	for _, c := range []struct{ name, input, want string }{
		{"no body covered", replace(` "content-digest"`, ""), "signed components"},
		{"no pod covered", replace(` "nucleus-pod"`, ""), "signed components"},
		{"no method covered", replace(`"@method" `, ""), "signed components"},
		{"nothing covered", replace(components, "()"), "signed components"},
		{"path instead of target", replace(`"@target-uri"`, `"@path"`), "signed components"},
		{"one more component", replace(`"nucleus-pod")`, `"nucleus-pod" "content-type")`), "signed components"},
		{"one component twice", replace(`"@method"`, `"@method" "@method"`), "signed components"},
		{"another order", replace(`"@method" "@target-uri"`, `"@target-uri" "@method"`), "signed components"},
		{"a component with a parameter", replace(`"@method"`, `"@method";req`), "signed components"},
		{"two spaces", replace(`"@method" `, `"@method"  `), "signed components"},
		{"another label", replace(label, "sig1="), "the one signature"},
		{"two signatures", good + `, other=("@method");created=1`, "malformed"},
		{"another tag", replace(`tag="nucleus-v1"`, `tag="nucleus-v2"`), `tag "nucleus-v2"`},
		{"tag as a token", replace(`tag="nucleus-v1"`, `tag=nucleus-v1`), "malformed"},
		{"no tag", replace(`;tag="nucleus-v1"`, ""), "no parameter tag"},
		{"no alg", replace(`;alg="ed25519"`, ""), "no parameter alg"},
		{"no keyid", replace(`;keyid="operator"`, ""), "no parameter keyid"},
		{"no nonce", replace(`;nonce="nonce-of-sixteen"`, ""), "no parameter nonce"},
		{"no created", replace(created, ""), "no parameter created"},
		{"no expires", replace(fmt.Sprintf(";expires=%d", s.now.Unix()+30), ""), "no parameter expires"},
		{"one parameter more", good + `;x=1`, `unknown parameter "x"`},
		{"one parameter twice", good + created, "created twice"},
		{"a flag", good + `;x`, "want ;name=value"},
		{"short nonce", replace("nonce-of-sixteen", "short"), "malformed"},
		{"long nonce", replace("nonce-of-sixteen", strings.Repeat("n", 129)), "malformed"},
		{"nonce with an escape", replace("nonce-of-sixteen", `nonce-of-sixtee\"`), "malformed"},
		{"nonce with a quote", replace("nonce-of-sixteen", `nonce"of-sixteen"`), "malformed"},
		{"nonce as bytes", replace(`"nonce-of-sixteen"`, `:bm9uY2Utb2Ytc2l4dGVlbg==:`), "malformed"},
		{"nonce with a semicolon", replace("nonce-of-sixteen", "nonce;of-sixteen"), "malformed"},
		{"created as a string", replace(created, fmt.Sprintf(`;created="%d"`, s.now.Unix())), "malformed"},
		{"created with a sign", replace(created, fmt.Sprintf(`;created=+%d`, s.now.Unix())), "malformed"},
		{"created with a zero in front", replace(created, fmt.Sprintf(`;created=0%d`, s.now.Unix())), "malformed"},
		{"created with a fraction", replace(created, created+".5"), "malformed"},
		{"negative created", replace(created, ";created=-1"), "malformed"},
		{"huge created", replace(created, ";created=9223372036854775807"), "malformed"},
		{"space after a semicolon", replace(";created", "; created"), "unknown parameter"},
		{"name in upper case", replace(";created", ";Created"), "unknown parameter"},
		{"4 KiB", good + ";x=" + strings.Repeat("1", 4096), "Signature-Input of"},
		{"unknown key", s.input(func(p *parameters) { p.keyID = "nobody" }), `unknown key "nobody"`},
		{"alg of another kind", s.input(func(p *parameters) { p.alg = algHMAC }), `alg "hmac-sha256", but key "operator" is for ed25519`},
		{"alg unknown", s.input(func(p *parameters) { p.alg = "none" }), `alg "none"`},
		{"alg in upper case", s.input(func(p *parameters) { p.alg = "ED25519" }), `alg "ED25519"`},
		{"expires too far", s.input(func(p *parameters) { p.expires = p.created + 61 }), "valid for 61 seconds"},
		{"expires before created", s.input(func(p *parameters) { p.expires = p.created - 1 }), "valid for -1 seconds"},
		{"expires with created", s.input(func(p *parameters) { p.expires = p.created }), "valid for 0 seconds"},
		{"created in the future", s.input(func(p *parameters) { p.created += 11; p.expires += 11 }), "the signer's clock is ahead"},
		{"expired now", s.input(func(p *parameters) { p.created -= 30; p.expires -= 30 }), "expired"},
		{"expired an hour ago", s.input(func(p *parameters) { p.created -= 3600; p.expires -= 3600 }), "not after the node's start"},
	} {
		s.wantRefused(t, c.name, s.sign(t, "operator", profileBase, c.input), c.want)
	}
	// At the borders.
	for name, change := range map[string]func(*parameters){
		"60 seconds":             func(p *parameters) { p.expires = p.created + 60 },
		"one second left":        func(p *parameters) { p.created -= 29; p.expires -= 29 },
		"10 seconds ahead":       func(p *parameters) { p.created += 10; p.expires += 10 },
		"keyid of 1, nonce long": func(p *parameters) { p.nonce = strings.Repeat("n", 128) },
	} {
		input := s.input(func(p *parameters) {
			p.nonce = "nonce for " + name
			p.nonce = strings.ReplaceAll(p.nonce, " ", "-")
			change(p)
		})
		if _, _, _, err := s.verifier.Verify(s.sign(t, "operator", profileBase, input), "nucleus"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Another order of the parameters is one that a signer may choose.
	reordered := label + components + fmt.Sprintf(`;tag="nucleus-v1";alg="ed25519";keyid="operator";nonce="another-sixteen-";expires=%d;created=%d`, s.now.Unix()+5, s.now.Unix())
	if _, _, _, err := s.verifier.Verify(s.sign(t, "operator", profileBase, reordered), "nucleus"); err != nil {
		t.Errorf("another order of the parameters: %v", err)
	}
}

// TestAlgConfusion: the public key, which everybody knows, must not serve as a
// secret; neither may a key that is both or nothing.
func TestAlgConfusion(t *testing.T) {
	s := newSite()
	asHMAC := s.input(func(p *parameters) { p.alg = algHMAC })
	r := s.sign(t, "operator", profileBase, asHMAC)
	r.Header.Set("Signature", label+byteSequence(macSHA256(rfcPublic, profileBase(must(readSigned(r, "nucleus"))))))
	s.wantRefused(t, "HMAC by the public key", r, `alg "hmac-sha256"`)
	r = s.sign(t, "operator", profileBase, s.input(nil))
	r.Header.Set("Signature", label+byteSequence(macSHA256(rfcPublic, profileBase(must(readSigned(r, "nucleus"))))))
	s.wantRefused(t, "HMAC by the public key, said to be ed25519", r, "does not fit")

	for name, key := range map[string]Key{
		"nothing":            {ID: "operator", Role: Operator},
		"both":               {ID: "operator", Ed25519: rfcPublic, HMAC: rfcSecret},
		"an empty secret":    {ID: "operator", HMAC: []byte{}},
		"a short secret":     {ID: "operator", HMAC: rfcSecret[:31]},
		"a short public key": {ID: "operator", Ed25519: rfcPublic[:31]},
	} {
		s.keys["operator"] = key
		for _, alg := range []string{algEd25519, algHMAC} {
			r := s.sign(t, "operator", profileBase, s.input(func(p *parameters) { p.alg = alg }))
			r.Header.Set("Signature", label+byteSequence(macSHA256(key.HMAC, profileBase(must(readSigned(r, "nucleus"))))))
			s.wantRefused(t, name, r, "neither an Ed25519 key nor a secret")
		}
	}
	// A lookup that answers with another key.
	s.keys["operator"] = Key{ID: "root", Ed25519: rfcPublic, Role: Operator}
	s.wantRefused(t, "another key than asked for", s.sign(t, "operator", profileBase, s.input(nil)), `not "root"`)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestReplay(t *testing.T) {
	s := newSite()
	r := s.signed(t, s.operator, "{}")
	replay := func() *http.Request {
		again := r.Clone(r.Context())
		setBody(again, "{}")
		return again
	}
	if _, _, _, err := s.verifier.Verify(replay(), "nucleus"); err != nil {
		t.Fatal(err)
	}
	s.wantRefused(t, "the same request", replay(), "used before")

	// The nonce alone makes the replay: other content, newly signed.
	used := s.input(func(p *parameters) { p.nonce = must(readSigned(r, "nucleus")).nonce() })
	s.wantRefused(t, "the same nonce in another request", s.sign(t, "operator", profileBase, used), "used before")

	// Another key may use it: nobody can burn another's.
	s.keys["other"] = Key{ID: "other", Ed25519: rfcPublic, Role: Operator}
	if _, _, _, err := s.verifier.Verify(s.sign(t, "operator", profileBase, strings.Replace(used, `keyid="operator"`, `keyid="other"`, 1)), "nucleus"); err != nil {
		t.Errorf("the same nonce by another key: %v", err)
	}

	// Refused requests burn no nonce.
	bad := s.signed(t, s.operator, "{}")
	good := bad.Clone(bad.Context())
	setBody(bad, "[]")
	s.wantRefused(t, "another body", bad, "body's digest")
	setBody(good, "{}")
	if _, _, _, err := s.verifier.Verify(good, "nucleus"); err != nil {
		t.Errorf("after a forgery with its nonce: %v", err)
	}

	// Until the last moment.
	s.now = noon.Add(29 * time.Second)
	s.wantRefused(t, "the same request after 29 s", replay(), "used before")
	s.now = noon.Add(31 * time.Second)
	s.wantRefused(t, "the same request after 31 s", replay(), "expired")
}

func (s SignedRequest) nonce() string { return must(parseSignatureInput(s.SignatureInput)).nonce }

// TestClockJumps: hours forward, as after a suspend, and back again.
func TestClockJumps(t *testing.T) {
	s := newSite()
	old := s.signed(t, s.operator, "{}")
	replay := func() *http.Request {
		again := old.Clone(old.Context())
		setBody(again, "{}")
		return again
	}
	if _, _, _, err := s.verifier.Verify(replay(), "nucleus"); err != nil {
		t.Fatal(err)
	}
	s.now = noon.Add(8 * time.Hour)
	if _, _, _, err := s.verifier.Verify(s.signed(t, s.operator, "{}"), "nucleus"); err != nil {
		t.Fatalf("after a jump forward: %v", err)
	}
	if n := s.kept("operator"); n != 1 {
		t.Errorf("%d nonces are kept, want 1", n)
	}
	s.now = noon.Add(500 * time.Millisecond)
	kept := s.signed(t, s.operator, "{}")
	s.now = noon.Add(8*time.Hour + time.Second)
	if _, _, _, err := s.verifier.Verify(s.signed(t, s.operator, "{}"), "nucleus"); err != nil {
		t.Fatal(err)
	}
	s.now = noon.Add(time.Second) // set back: the old request would be in time again
	s.wantRefused(t, "a replay after the clock was set back", replay(), "the clock here was set back")
	// What was signed in time, and not sent before the clock was set back, has no era either.
	s.wantRefused(t, "one that was kept", kept, "the clock here was set back")
	s.now = noon.Add(2 * time.Second)
	s.wantRefused(t, "one without an era", s.signed(t, s.operator, "{}"), "the clock here was set back")
	s.operator.Era = s.verifier.Era()
	if s.operator.Era == "" {
		t.Fatal("no era")
	}
	second := s.signed(t, s.operator, "{}")
	again := second.Clone(second.Context())
	setBody(again, "{}")
	if _, _, _, err := s.verifier.Verify(second, "nucleus"); err != nil {
		t.Errorf("a new request after the clock was set back: %v", err)
	}
	s.wantRefused(t, "and again", again, "used before")
	// Set back once more: that era is over too.
	last := s.signed(t, s.operator, "{}")
	s.now = noon.Add(-time.Hour)
	s.wantRefused(t, "of the era before", last, "the clock here was set back")
	s.operator.Era = s.verifier.Era()
	if _, _, _, err := s.verifier.Verify(s.signed(t, s.operator, "{}"), "nucleus"); err != nil {
		t.Errorf("in the third era: %v", err)
	}
}

// A busy node whose clock is set back by an hour serves on at once, and takes nothing twice
// that it has forgotten.
func TestClockSetBack(t *testing.T) {
	s := newSite()
	var first *http.Request
	for i := range 300 { // one each second: most are forgotten
		s.now = noon.Add(time.Duration(i) * time.Second)
		r := s.signed(t, s.operator, "{}")
		if first == nil {
			first = r.Clone(r.Context())
			setBody(first, "{}")
		}
		if _, _, _, err := s.verifier.Verify(r, "nucleus"); err != nil {
			t.Fatal(err)
		}
	}
	s.now = noon.Add(time.Second)
	s.wantRefused(t, "the first once more", first, "the clock here was set back")
	s.operator.Era = s.verifier.Era()
	if _, _, _, err := s.verifier.Verify(s.signed(t, s.operator, "{}"), "nucleus"); err != nil {
		t.Errorf("a new request: %v", err)
	}
	// A clock that is corrected by a little is not set back.
	s.now = noon
	if _, _, _, err := s.verifier.Verify(s.signed(t, s.operator, "{}"), "nucleus"); err != nil {
		t.Errorf("after a correction by a second: %v", err)
	}
}

// Milliseconds of the nonce are read with an era behind them too.
func TestEraOfANewVerifier(t *testing.T) {
	s := newSite()
	s.verifier.NewEra()
	s.wantRefused(t, "without an era", s.signed(t, s.operator, "{}"), "the clock here was set back")
	s.operator.Era = s.verifier.Era()
	if _, _, _, err := s.verifier.Verify(s.signed(t, s.operator, "{}"), "nucleus"); err != nil {
		t.Error(err)
	}
}

func (s *site) kept(key string) int {
	k := s.verifier.nonces.keys[key]
	if k == nil {
		return 0
	}
	return len(k.used)
}

func TestNothingFromBeforeTheStart(t *testing.T) {
	s := newSite()
	s.verifier.Started = noon
	sign := func(at time.Time) *http.Request {
		s.now = at
		return s.signed(t, s.operator, "{}")
	}
	for _, at := range []time.Time{noon.Add(-29 * time.Second), noon.Add(-time.Second), noon.Add(-time.Millisecond), noon} {
		r := sign(at)
		s.now = noon.Add(100 * time.Millisecond)
		s.wantRefused(t, at.String(), r, "not after the node's start")
	}
	for _, at := range []time.Time{noon.Add(time.Millisecond), noon.Add(time.Second)} {
		if _, _, _, err := s.verifier.Verify(sign(at), "nucleus"); err != nil {
			t.Errorf("created %v after the start: %v", at.Sub(noon), err)
		}
	}
	// Without milliseconds the second as a whole is too early; milliseconds that
	// contradict created count for nothing.
	for _, nonce := range []string{"nonce-of-sixteen", "12345678901234567890", fmt.Sprint(noon.UnixMilli() + 5000), fmt.Sprint(noon.UnixMilli()) + "-0123456789"} {
		s.now = noon.Add(time.Millisecond)
		s.wantRefused(t, nonce, s.sign(t, "operator", profileBase, s.input(func(p *parameters) { p.nonce = nonce + "------" })), "not after the node's start")
	}
}

func TestNonceStoreIsBounded(t *testing.T) {
	var n nonces
	agent, operator := Key{ID: "agent", Role: AgentRole}, Key{ID: "operator", Role: Operator}
	p := parameters{expires: noon.Unix() + 30}
	for i := range agentNonces {
		p.nonce = fmt.Sprint("n", i)
		if err := n.use(agent, p, noon); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	p.nonce = "one more"
	if err := n.use(agent, p, noon); nucleus.AsError(err).Kind != nucleus.KindUnavailable {
		t.Errorf("one more: %v", err)
	}
	for _, other := range []Key{operator, {ID: "another agent", Role: AgentRole}} {
		if err := n.use(other, p, noon); err != nil {
			t.Errorf("%s is locked out by an agent: %v", other.ID, err)
		}
	}
	p.expires += 60
	if err := n.use(agent, p, noon.Add(31*time.Second)); err != nil {
		t.Errorf("after the others have expired: %v", err)
	}
	if kept := len(n.keys["agent"].used); kept != 1 || len(n.keys) != 1 {
		t.Errorf("%d nonces of %d keys are kept", kept, len(n.keys))
	}
}

func TestOneOfManyReplaysIsAdmitted(t *testing.T) {
	s := newSite()
	r := s.signed(t, s.operator, "{}")
	var admitted sync.Map
	var work sync.WaitGroup
	for i := range 32 {
		again := r.Clone(r.Context())
		setBody(again, "{}")
		work.Go(func() {
			if _, _, _, err := s.verifier.Verify(again, "nucleus"); err == nil {
				admitted.Store(i, true)
			}
		})
	}
	work.Wait()
	n := 0
	admitted.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d of 32 were admitted, want 1", n)
	}
}

// TestLargeBodies: what is too large is refused before it is held, and a body is
// not read for a signature that does not fit.
func TestLargeBodies(t *testing.T) {
	s := newSite()
	if _, err := s.operator.NewSignedRequest("POST", target, "", make([]byte, MaxBody+1)); nucleus.AsError(err).Kind != nucleus.KindTooLarge {
		t.Errorf("signing: %v", err)
	}
	for _, c := range []struct {
		name     string
		length   int64
		mostRead int64
		most     uint64 // bytes allocated
	}{{"100 MB, said", 100e6, 0, 1 << 20}, {"100 MB, not said", -1, MaxBody + 1, 9 * MaxBody}} {
		r := s.signed(t, s.operator, "{}")
		body := &endless{most: 100e6}
		r.Body, r.ContentLength = body, c.length
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, _, err := s.verifier.Verify(r, "nucleus")
		runtime.ReadMemStats(&after)
		if nucleus.AsError(err).Kind != nucleus.KindTooLarge || !strings.Contains(err.Error(), "at most 16777216") {
			t.Errorf("%s: %v", c.name, err)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; body.read > c.mostRead || grown > c.most {
			t.Errorf("%s: %d bytes read, %d allocated", c.name, body.read, grown)
		}
	}
	forged := s.signed(t, s.operator, "{}")
	forged.Header.Set("Nucleus-Pod", "pod-2")
	body := &endless{most: 100e6}
	forged.Body, forged.ContentLength = body, 1000
	s.wantRefused(t, "a forgery", forged, "does not fit")
	if body.read != 0 {
		t.Errorf("%d bytes of a forgery's body were read", body.read)
	}
	// The largest that is allowed.
	large := strings.Repeat("x", MaxBody)
	r := s.signed(t, s.agent, large)
	if _, got, _, err := s.verifier.Verify(r, "nucleus"); err != nil || len(got) != MaxBody {
		t.Errorf("16 MiB: %d bytes, %v", len(got), err)
	}
	broken := s.signed(t, s.agent, "{}")
	broken.Body = io.NopCloser(io.MultiReader(strings.NewReader("{"), failing{}))
	if _, _, _, err := s.verifier.Verify(broken, "nucleus"); nucleus.AsError(err).Kind != nucleus.KindInvalid {
		t.Errorf("a body that breaks off: %v", err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("connection lost") }

type endless struct{ read, most int64 }

func (e *endless) Read(p []byte) (int, error) {
	n := min(int64(len(p)), e.most-e.read)
	e.read += n
	if n == 0 {
		return 0, io.EOF
	}
	return int(n), nil
}

func (e *endless) Close() error { return nil }

func TestSignRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		signer    Signer
		url, pod  string
		wantError string
	}{
		"no key":            {Signer{KeyID: "a"}, target, "", "needs one Ed25519 key or one secret"},
		"two keys":          {Signer{KeyID: "a", Ed25519: rfcPrivate, HMAC: rfcSecret}, target, "", "needs one"},
		"short secret":      {Signer{KeyID: "a", HMAC: rfcSecret[:31]}, target, "", "needs one"},
		"no key id":         {Signer{Ed25519: rfcPrivate}, target, "", "keyid"},
		"key id with quote": {Signer{KeyID: `a"`, Ed25519: rfcPrivate}, target, "", "keyid"},
		"relative URL":      {Signer{KeyID: "a", Ed25519: rfcPrivate}, "/v1/pods", "", "not absolute"},
		"another scheme":    {Signer{KeyID: "a", Ed25519: rfcPrivate}, "unix://nucleus/x", "", "not absolute"},
		"pod with a space":  {Signer{KeyID: "a", Ed25519: rfcPrivate}, target, "pod 1", "no name"},
	} {
		if _, err := c.signer.NewSignedRequest("POST", c.url, c.pod, nil); err == nil || !strings.Contains(err.Error(), c.wantError) {
			t.Errorf("%s: got %v, want %q", name, err, c.wantError)
		}
	}
}

// TestSignedRequestForAThirdParty: the authority verifies later what the node got.
func TestSignedRequestForAThirdParty(t *testing.T) {
	s := newSite()
	for _, signer := range []*Signer{s.operator, s.agent} {
		_, _, signed, err := s.verifier.Verify(s.signed(t, signer, `{"n":1}`), "nucleus")
		if err != nil {
			t.Fatal(err)
		}
		raw, err := nucleus.Canonical(signed)
		if err != nil {
			t.Fatal(err)
		}
		var got SignedRequest
		if err := nucleus.Strict(raw, &got); err != nil || !reflect.DeepEqual(got, *signed) {
			t.Fatalf("got %+v, %v, want %+v", got, err, *signed)
		}
		key := s.keys[signer.KeyID]
		if err := got.Verify(key); err != nil {
			t.Fatalf("the control: %v", err)
		}
		other := s.keys["operator"]
		if signer == s.operator {
			other = s.keys["agent-1"]
		}
		if err := got.Verify(other); err == nil {
			t.Error("verified by another key")
		}
		other.ID = key.ID
		if err := got.Verify(other); err == nil {
			t.Error("verified by another key of the same name")
		}
		for i := range reflect.TypeFor[SignedRequest]().NumField() {
			changed := got
			field := reflect.ValueOf(&changed).Elem().Field(i)
			name := reflect.TypeFor[SignedRequest]().Field(i).Name
			if field.Kind() == reflect.String {
				field.SetString(field.String() + "X")
			} else {
				field.SetBytes([]byte(`{"n":2}`))
			}
			if err := changed.Verify(key); err == nil {
				t.Errorf("%s changed: verified", name)
			}
			// A line break could move the borders between the fields.
			if field.Kind() == reflect.String {
				field.SetString(field.String() + "\n\"nucleus-pod\": pod-2")
				if err := changed.Verify(key); err == nil {
					t.Errorf("%s with a line of its own: verified", name)
				}
			}
		}
	}
}

// TestSignedRequestOfAnotherForm: even the key's holder cannot sign what could be
// read in two ways.
func TestSignedRequestOfAnotherForm(t *testing.T) {
	p := parameters{created: 1, expires: 2, nonce: "nonce-of-sixteen", keyID: "operator", alg: algEd25519}
	key := newSite().keys["operator"]
	verify := func(change func(*SignedRequest)) error {
		s := SignedRequest{Method: "GET", TargetURI: "http://nucleus/", Pod: NoPod, ContentDigest: contentDigest(nil), SignatureInput: label + p.String(), KeyID: p.keyID}
		change(&s)
		s.Signature = label + byteSequence(ed25519.Sign(rfcPrivate, s.base(p.String())))
		return s.Verify(key)
	}
	if err := verify(func(*SignedRequest) {}); err != nil {
		t.Fatalf("the control: %v", err)
	}
	for name, change := range map[string]func(*SignedRequest){
		"target of two lines": func(s *SignedRequest) { s.TargetURI += "\n\"nucleus-pod\": pod-2" },
		"target with a space": func(s *SignedRequest) { s.TargetURI += " HTTP/1.1" },
		"target with a NUL":   func(s *SignedRequest) { s.TargetURI += "\x00" },
		"target beyond ASCII": func(s *SignedRequest) { s.TargetURI += "é" },
		"method of two lines": func(s *SignedRequest) { s.Method += "\nX" },
		"no method":           func(s *SignedRequest) { s.Method = "" },
		"pod of two lines":    func(s *SignedRequest) { s.Pod += "\nX" },
		"digest of two lines": func(s *SignedRequest) { s.ContentDigest += "\nX" },
	} {
		if err := verify(change); err == nil {
			t.Errorf("%s: verified", name)
		}
	}
}

// vector is one case of testdata/signatures.json, for any implementation.
type vector struct {
	Name    string         `json:"name"`
	Base    string         `json:"signature_base"`
	Request *SignedRequest `json:"request"`
	Valid   bool           `json:"valid"` // by the key that keyid names
	Why     string         `json:"why,omitempty"`
}

type vectorFile struct {
	Comment string            `json:"comment"`
	Ed25519 map[string]string `json:"ed25519_public_hex"`
	HMAC    map[string]string `json:"hmac_secret_hex"`
	Vectors []vector          `json:"vectors"`
}

func TestVectors(t *testing.T) {
	const file = "testdata/signatures.json"
	if *update {
		raw, err := json.MarshalIndent(makeVectors(t), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(raw, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var all vectorFile
	if err := nucleus.Strict(raw, &all); err != nil {
		t.Fatal(err)
	}
	for _, v := range all.Vectors {
		key := Key{ID: v.Request.KeyID}
		if public, ok := all.Ed25519[key.ID]; ok {
			key.Ed25519 = unhex(public)
		} else {
			key.HMAC = unhex(all.HMAC[key.ID])
		}
		if err := v.Request.Verify(key); (err == nil) != v.Valid {
			t.Errorf("%s: %v, want valid %v", v.Name, err, v.Valid)
		}
		if v.Valid {
			if got := string(v.Request.base(strings.TrimPrefix(v.Request.SignatureInput, label))); got != v.Base {
				t.Errorf("%s: signature base\n%s\nwant\n%s", v.Name, got, v.Base)
			}
		}
	}
	if len(all.Vectors) < 10 {
		t.Errorf("only %d vectors", len(all.Vectors))
	}
}

func makeVectors(t *testing.T) vectorFile {
	all := vectorFile{
		Comment: "RFC 9421 signatures in the profile nucleus-v1. Keys are those of RFC 9421, appendix B.1.4 and B.1.5. Time and nonces are not judged.",
		Ed25519: map[string]string{"test-key-ed25519": hex.EncodeToString(rfcPublic)},
		HMAC:    map[string]string{"test-shared-secret": hex.EncodeToString(rfcSecret)},
	}
	add := func(name, method, url, pod string, body []byte, hmac bool, change func(*SignedRequest), why string) {
		p := parameters{created: 1618884473, expires: 1618884503, nonce: "b3k2pp5k7z-50gdd", keyID: "test-key-ed25519", alg: algEd25519}
		if hmac {
			p.keyID, p.alg = "test-shared-secret", algHMAC
		}
		s := &SignedRequest{Method: method, TargetURI: url, Pod: pod, ContentDigest: contentDigest(body), SignatureInput: label + p.String(), KeyID: p.keyID, Body: body}
		base := s.base(p.String())
		if hmac {
			s.Signature = label + byteSequence(macSHA256(rfcSecret, base))
		} else {
			s.Signature = label + byteSequence(ed25519.Sign(rfcPrivate, base))
		}
		if change != nil {
			change(s)
		}
		all.Vectors = append(all.Vectors, vector{Name: name, Base: string(base), Request: s, Valid: change == nil, Why: why})
	}
	body := []byte(`{"argv":["go","test","./..."]}`)
	for _, hmac := range []bool{false, true} {
		kind := map[bool]string{false: "ed25519: ", true: "hmac-sha256: "}[hmac]
		add(kind+"a tool call", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, nil, "")
		add(kind+"a query", "GET", "http://nucleus/v1/pods?state=running&q=%2F", "-", []byte{}, hmac, nil, "")
		add(kind+"bytes that are no text", "POST", "http://nucleus/v1/pods/pod-1/tools/write_files", "pod-1", []byte{0, 255, 10}, hmac, nil, "")
		add(kind+"another pod", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, func(s *SignedRequest) { s.Pod = "pod-2" }, "Nucleus-Pod is covered")
		add(kind+"another path", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, func(s *SignedRequest) { s.TargetURI = "http://nucleus/v1/pods/pod-1/tools/git_push" }, "@target-uri is covered")
		add(kind+"another body", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, func(s *SignedRequest) { s.Body = []byte("{}") }, "content-digest is of the body")
		add(kind+"another method", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, func(s *SignedRequest) { s.Method = "PUT" }, "@method is covered")
		add(kind+"another nonce", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, func(s *SignedRequest) { s.SignatureInput = strings.Replace(s.SignatureInput, "b3k2", "b3k3", 1) }, "the parameters are covered")
		add(kind+"a second signature", "POST", "http://nucleus/v1/pods/pod-1/tools/run_bash", "pod-1", body, hmac, func(s *SignedRequest) { s.Signature += ", x=:AA==:" }, "one signature and no other")
	}
	return all
}

// FuzzSignatureInput compares with an independent parser of RFC 8941: what we
// accept, it reads as the same one signature, and writes back in the same bytes.
func FuzzSignatureInput(f *testing.F) {
	s := newSite()
	f.Add(s.input(nil))
	f.Add(label + components)
	f.Add(label + components + `;created=1;expires=2;nonce="0123456789abcdef";keyid="a";alg="b";tag="nucleus-v1"`)
	f.Add(label + components + `;tag="nucleus-v1";nonce="01234567;89abcdef";nonce=:AA==:`)
	f.Fuzz(checkSignatureInput)
}

func checkSignatureInput(t *testing.T, in string) {
	p, err := parseSignatureInput(in)
	if err != nil {
		return
	}
	dictionary, err := httpsfv.UnmarshalDictionary([]string{in})
	if err != nil {
		t.Fatalf("accepted %q, which is no dictionary: %v", in, err)
	}
	if back, err := httpsfv.Marshal(dictionary); err != nil || back != in {
		t.Fatalf("accepted %q, which is not canonical: %q, %v", in, back, err)
	}
	member, _ := dictionary.Get("nucleus")
	list, ok := member.(httpsfv.InnerList)
	if names := dictionary.Names(); len(names) != 1 || !ok {
		t.Fatalf("accepted %q: members %q", in, names)
	}
	var covered []string
	for _, item := range list.Items {
		covered = append(covered, item.Value.(string))
		if len(item.Params.Names()) > 0 {
			t.Fatalf("accepted %q", in)
		}
	}
	if !slices.Equal(covered, []string{"@method", "@target-uri", "content-digest", "nucleus-pod"}) {
		t.Fatalf("accepted %q, which covers %q", in, covered)
	}
	want := map[string]any{"created": p.created, "expires": p.expires, "nonce": p.nonce, "keyid": p.keyID, "alg": p.alg, "tag": tag}
	if len(list.Params.Names()) != len(want) {
		t.Fatalf("accepted %q with parameters %q", in, list.Params.Names())
	}
	for name, value := range want {
		if got, _ := list.Params.Get(name); got != value {
			t.Fatalf("%q: %s is %v, for us %v", in, name, got, value)
		}
	}
}

// TestSignatureInputRoundTrip: all that a signer may write is accepted.
func TestSignatureInputRoundTrip(t *testing.T) {
	text := func(least, most int) *rapid.Generator[string] {
		return rapid.StringOfN(rapid.RuneFrom([]rune("abcXYZ019-_.:/+=,()@!~")), least, most, most)
	}
	rapid.Check(t, func(r *rapid.T) {
		p := parameters{
			created: rapid.Int64Range(0, 999999999999).Draw(r, "created"), expires: rapid.Int64Range(0, 999999999999).Draw(r, "expires"),
			nonce: text(16, 128).Draw(r, "nonce"), keyID: text(1, 128).Draw(r, "keyid"), alg: text(1, 40).Draw(r, "alg"),
		}
		in := label + p.String()
		if got, err := parseSignatureInput(in); err != nil || got != p {
			r.Fatalf("%s: got %+v, %v", in, got, err)
		}
		checkSignatureInput(t, in)
	})
}

func BenchmarkSign(b *testing.B) {
	s := newSite()
	body := bytes.Repeat([]byte("x"), 1<<10)
	for name, signer := range map[string]*Signer{"ed25519": s.operator, "hmac": s.agent} {
		b.Run(name, func(b *testing.B) {
			r := must(http.NewRequest("POST", target, nil))
			b.ReportAllocs()
			for b.Loop() {
				if err := signer.Sign(r, "pod-1", body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	body := strings.Repeat("x", 1<<10)
	for _, name := range []string{"ed25519", "hmac"} {
		b.Run(name, func(b *testing.B) {
			s := newSite()
			signer := s.operator
			if name == "hmac" {
				signer = s.agent
			}
			requests := make([]*http.Request, agentNonces/2)
			for i := range requests {
				r := must(signer.NewSignedRequest("POST", target, "pod-1", []byte(body)))
				r.RequestURI = r.URL.RequestURI()
				setBody(r, body)
				requests[i] = r
			}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				if i%len(requests) == 0 {
					s.verifier.nonces = nonces{}
				}
				r := requests[i%len(requests)]
				setBody(r, body)
				if _, _, _, err := s.verifier.Verify(r, "nucleus"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A statement is the request that its signer would have sent.
func TestStatement(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer := Signer{KeyID: "k", Ed25519: private}
	const url, body = "http://nucleus/v1/pods/p-1/tools/net_connect", `{"host":"a.example","port":443}`
	got, err := signer.Statement(http.MethodPost, url, "p-1", []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	if err := got.Verify(Key{ID: "k", Ed25519: public}); err != nil {
		t.Error(err)
	}
	if got.Method != http.MethodPost || got.TargetURI != url || got.Pod != "p-1" || string(got.Body) != body || got.KeyID != "k" {
		t.Errorf("got %+v", got)
	}
	again, err := signer.Statement(http.MethodPost, url, "p-1", []byte(body))
	if err != nil || again.Signature == got.Signature {
		t.Errorf("two statements are one: %v", err)
	}
	for name, change := range map[string]func(*SignedRequest){
		"body":   func(s *SignedRequest) { s.Body = []byte(`{"host":"b.example","port":443}`) },
		"target": func(s *SignedRequest) { s.TargetURI = strings.Replace(s.TargetURI, "net_connect", "git_push", 1) },
		"pod":    func(s *SignedRequest) { s.Pod = "p-2" },
		"method": func(s *SignedRequest) { s.Method = http.MethodPut },
	} {
		other := got
		change(&other)
		if err := other.Verify(Key{ID: "k", Ed25519: public}); err == nil {
			t.Errorf("%s changed: the signature still fits", name)
		}
	}
	if _, err := signer.Statement(http.MethodPost, "/v1/pods", "p-1", nil); err == nil {
		t.Error("a statement about no place was signed")
	}
}
