package wire

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"cal/nucleus"
)

// Requests to the node are signed by RFC 9421 in one fixed profile:
//
//	Content-Digest: sha-256=:...:
//	Nucleus-Pod: pod-... | -
//	Signature-Input: nucleus=("@method" "@target-uri" "content-digest" "nucleus-pod");
//	    created=...;expires=...;nonce="...";keyid="...";alg="...";tag="nucleus-v1"
//	Signature: nucleus=:...:
//
// One signature and no other; these components in this order; these parameters,
// each once, in any order; everything in the canonical spelling of RFC 8941.
const (
	// MaxBody is the largest body of a signed request in bytes.
	MaxBody = 16 << 20
	// NoPod is the value of Nucleus-Pod in a request that concerns no pod.
	NoPod = "-"
	// MaxLifetime is the longest time from created to expires.
	MaxLifetime = 60 * time.Second

	signatureLifetime = 30 * time.Second // of what Signer makes
	label             = "nucleus="
	tag               = "nucleus-v1"
	components        = `("@method" "@target-uri" "content-digest" "nucleus-pod")`
	algEd25519        = "ed25519"
	algHMAC           = "hmac-sha256"
	minSecret         = 32   // bytes of an HMAC key
	maxParams         = 1024 // bytes of Signature-Input
)

// Signer signs requests with one key: Ed25519 or HMAC, not both.
type Signer struct {
	KeyID   string
	Ed25519 ed25519.PrivateKey
	HMAC    []byte           // at least 32 bytes
	Now     func() time.Time // nil: time.Now
	Era     string           // of the Verifier, where it has one
}

// Sign sets the four headers of the profile on r for a body that the caller also
// sends. pod is "" where the request concerns none. The URL of r is absolute:
// http://nucleus/... on a socket or a wire. A signed request is sent once;
// sending it again is a replay, so sign it again.
func (s *Signer) Sign(r *http.Request, pod string, body []byte) error {
	if len(body) > MaxBody {
		return nucleus.Errorf(nucleus.KindTooLarge, "body of %d bytes, at most %d", len(body), MaxBody)
	}
	if r.URL.Scheme != "http" && r.URL.Scheme != "https" || r.URL.Host == "" {
		return fmt.Errorf("wire: signing %q: the URL is not absolute", r.URL)
	}
	if pod == "" {
		pod = NoPod
	}
	alg := algEd25519
	switch {
	case len(s.Ed25519) == ed25519.PrivateKeySize && s.HMAC == nil:
	case s.Ed25519 == nil && len(s.HMAC) >= minSecret:
		alg = algHMAC
	default:
		return fmt.Errorf("wire: signer %q needs one Ed25519 key or one secret of %d bytes", s.KeyID, minSecret)
	}
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	at := now()
	params := parameters{
		created: at.Unix(), expires: at.Add(signatureLifetime).Unix(),
		nonce: strconv.FormatInt(at.UnixMilli(), 10) + "-" + rand.Text(), keyID: s.KeyID, alg: alg,
	}
	if s.Era != "" {
		params.nonce += "-" + s.Era
	}
	authority := r.Host
	if authority == "" {
		authority = r.URL.Host
	}
	signed := SignedRequest{
		Method:         r.Method,
		TargetURI:      r.URL.Scheme + "://" + strings.ToLower(authority) + r.URL.RequestURI(),
		Pod:            pod,
		ContentDigest:  contentDigest(body),
		SignatureInput: label + params.String(),
		KeyID:          s.KeyID,
		Body:           body,
	}
	if signed.Method == "" {
		signed.Method = http.MethodGet
	}
	if _, err := signed.parse(); err != nil { // what nobody would accept is not sent
		return fmt.Errorf("wire: signing: %w", err)
	}
	base := signed.base(params.String())
	var signature []byte
	if alg == algHMAC {
		signature = macSHA256(s.HMAC, base)
	} else {
		signature = ed25519.Sign(s.Ed25519, base)
	}
	r.Header.Set("Content-Digest", signed.ContentDigest)
	r.Header.Set("Nucleus-Pod", pod)
	r.Header.Set("Signature-Input", signed.SignatureInput)
	r.Header.Set("Signature", label+byteSequence(signature))
	return nil
}

// NewSignedRequest makes a request with its body and signs it.
func (s *Signer) NewSignedRequest(method, url, pod string, body []byte) (*http.Request, error) {
	r, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if len(body) > 0 {
		r.Header.Set("Content-Type", "application/json")
	}
	return r, s.Sign(r, pod, body)
}

// Statement signs a request that is not sent: the word of the key's holder, for
// somebody who verifies it elsewhere.
func (s *Signer) Statement(method, url, pod string, body []byte) (SignedRequest, error) {
	r, err := s.NewSignedRequest(method, url, pod, body)
	if err != nil {
		return SignedRequest{}, err
	}
	r.RequestURI = r.URL.RequestURI() // as a server would see it
	signed, err := readSigned(r, r.Host)
	signed.Body = body
	return signed, err
}

// SignedRequest is a request with its signature, so that somebody who was not
// there - the authority - can verify it later.
type SignedRequest struct {
	Method         string `json:"method"`
	TargetURI      string `json:"target_uri"`
	Pod            string `json:"pod"` // the header: NoPod for none
	ContentDigest  string `json:"content_digest"`
	SignatureInput string `json:"signature_input"`
	Signature      string `json:"signature"`
	KeyID          string `json:"keyid"`
	Body           []byte `json:"body_b64"`
}

// Verify reports whether the holder of key signed exactly this request. It asks
// neither for the time nor whether the request was seen before.
func (s SignedRequest) Verify(key Key) error {
	params, err := s.parse()
	if err != nil {
		return err
	}
	if err := s.verifySignature(key, params); err != nil {
		return err
	}
	return s.verifyBody()
}

// parse checks the form of all that is signed, and that it can be read in one way
// only: nothing in it can end a line of the signature base.
func (s SignedRequest) parse() (parameters, error) {
	if !isToken(s.Method, 20) {
		return parameters{}, unauthenticated("method %.40q is no token", s.Method)
	}
	if !isVisible(s.TargetURI) {
		return parameters{}, unauthenticated("the target URI has a character that is not visible ASCII")
	}
	if !isName(s.Pod) {
		return parameters{}, unauthenticated("Nucleus-Pod %.80q is no name", s.Pod)
	}
	if raw, ok := parseByteSequence(strings.TrimPrefix(s.ContentDigest, "sha-256=")); !ok || len(raw) != sha256.Size || !strings.HasPrefix(s.ContentDigest, "sha-256=") {
		return parameters{}, unauthenticated("Content-Digest %.80q, want sha-256=:...:", s.ContentDigest)
	}
	params, err := parseSignatureInput(s.SignatureInput)
	if err != nil {
		return parameters{}, err
	}
	if s.KeyID != params.keyID {
		return parameters{}, unauthenticated("key id %.80q beside keyid %q in the signature", s.KeyID, params.keyID)
	}
	return params, nil
}

func (s SignedRequest) verifySignature(key Key, params parameters) error {
	if key.ID != params.keyID {
		return unauthenticated("signed with key %q, not %q", params.keyID, key.ID)
	}
	alg, err := key.alg()
	if err != nil {
		return err
	}
	if params.alg != alg {
		return unauthenticated("alg %q, but key %q is for %s", params.alg, key.ID, alg)
	}
	signature, ok := parseByteSequence(strings.TrimPrefix(s.Signature, label))
	if !ok || !strings.HasPrefix(s.Signature, label) {
		return unauthenticated("Signature %.80q, want the one signature %s:...:", s.Signature, label)
	}
	base := s.base(strings.TrimPrefix(s.SignatureInput, label))
	if alg == algHMAC {
		ok = hmac.Equal(signature, macSHA256(key.HMAC, base))
	} else {
		ok = ed25519.Verify(key.Ed25519, base, signature)
	}
	if !ok {
		return unauthenticated("the signature of key %q does not fit the request", key.ID)
	}
	return nil
}

func (s SignedRequest) verifyBody() error {
	if want := contentDigest(s.Body); s.ContentDigest != want {
		return unauthenticated("the body's digest is %s, the signed one %s", want, s.ContentDigest)
	}
	return nil
}

// base is the signature base of RFC 9421, 2.5.
func (s SignedRequest) base(params string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "\"@method\": %s\n", s.Method)
	fmt.Fprintf(&b, "\"@target-uri\": %s\n", s.TargetURI)
	fmt.Fprintf(&b, "\"content-digest\": %s\n", s.ContentDigest)
	fmt.Fprintf(&b, "\"nucleus-pod\": %s\n", s.Pod)
	fmt.Fprintf(&b, "\"@signature-params\": %s", params)
	return b.Bytes()
}

// Role says what a key may do; the node's routes ask for it.
type Role string

// The roles. A key without one may do nothing.
const (
	Operator  Role = "operator" // all routes
	AgentRole Role = "agent"    // tools and events of its own pod
)

// Key is a key that the node knows: Ed25519 or HMAC, not both, which fixes its
// algorithm.
type Key struct {
	ID      string
	Ed25519 ed25519.PublicKey
	HMAC    []byte
	Role    Role
	Pod     string // of an agent
}

func (k Key) alg() (string, error) {
	switch {
	case len(k.Ed25519) == ed25519.PublicKeySize && k.HMAC == nil:
		return algEd25519, nil
	case k.Ed25519 == nil && len(k.HMAC) >= minSecret:
		return algHMAC, nil
	}
	return "", unauthenticated("key %q is neither an Ed25519 key nor a secret of at least %d bytes", k.ID, minSecret)
}

// Caller is who signed a request.
type Caller struct {
	KeyID string
	Role  Role
	Pod   string // an agent's own; what the request names is in SignedRequest.Pod
}

// Verifier admits signed requests, each once. Its methods may be called at once.
type Verifier struct {
	// Keys finds a key by its id.
	Keys func(keyID string) (Key, bool)
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Started is when this verifier's memory of nonces begins. What was created
	// before is refused, for it may have been admitted before. Since created counts
	// whole seconds, so is all of its second, but for nonces that begin with the
	// milliseconds of the signing and a hyphen, as those of Signer do.
	Started time.Time

	nonces nonces

	mu     sync.Mutex
	latest time.Time // that the clock has shown
	era    string
}

// setBack is how far a clock may go back and count as running on: what was forgotten
// since is still told from what is new, as a signature lives longer.
const setBack = 5 * time.Second

// Era is "" as long as the clock runs forward. Once it was set back, times cannot
// tell a new request from one that was admitted before and has been forgotten. Then what a
// nonce ends with does: a hyphen and this word, which nobody knew before.
func (v *Verifier) Era() string {
	era, _ := v.look()
	return era
}

// NewEra begins an era: from now on only what was signed for it is admitted.
func (v *Verifier) NewEra() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.newEra()
}

func (v *Verifier) newEra() {
	v.era = rand.Text()
	v.nonces.clear()
}

// look reads the clock and begins an era where it was set back.
func (v *Verifier) look() (era string, now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now = v.now().Round(0) // the wall clock alone
	if now.Before(v.latest.Add(-setBack)) {
		v.newEra()
		v.latest = now
	}
	if now.After(v.latest) {
		v.latest = now
	}
	return v.era, now
}

// ahead is how far the clock of a signer may be ahead of ours. One that is behind
// has the lifetime of its signatures.
const ahead = 10 * time.Second

// Verify admits r or says why not, as a *nucleus.Error. authority is the name
// under which the node serves: "nucleus" on a socket or a wire. Nothing of the
// body is read before the signature fits, and never more than MaxBody; r.Body is
// then a fresh reader of it.
func (v *Verifier) Verify(r *http.Request, authority string) (Caller, []byte, *SignedRequest, error) {
	signed, err := readSigned(r, authority)
	if err != nil {
		return Caller{}, nil, nil, err
	}
	params, err := signed.parse()
	if err != nil {
		return Caller{}, nil, nil, err
	}
	key, ok := v.Keys(params.keyID)
	if !ok {
		return Caller{}, nil, nil, unauthenticated("unknown key %q", params.keyID)
	}
	if err := v.inTime(params); err != nil {
		return Caller{}, nil, nil, err
	}
	if err := signed.verifySignature(key, params); err != nil {
		return Caller{}, nil, nil, err
	}
	if signed.Body, err = readBody(r); err != nil {
		return Caller{}, nil, nil, err
	}
	if err := signed.verifyBody(); err != nil {
		return Caller{}, nil, nil, err
	}
	// The body may have taken its time; the nonce is kept only until expires.
	if err := v.inTime(params); err != nil {
		return Caller{}, nil, nil, err
	}
	if err := v.nonces.use(key, params, v.now()); err != nil {
		return Caller{}, nil, nil, err
	}
	r.Body = io.NopCloser(bytes.NewReader(signed.Body))
	return Caller{KeyID: key.ID, Role: key.Role, Pod: key.Pod}, signed.Body, &signed, nil
}

func (v *Verifier) now() time.Time {
	if v.Now != nil {
		return v.Now()
	}
	return time.Now()
}

func (v *Verifier) inTime(p parameters) error {
	era, now := v.look()
	switch {
	case p.expires <= p.created || p.expires-p.created > int64(MaxLifetime/time.Second):
		return unauthenticated("valid for %d seconds, at least 1 and at most %d", p.expires-p.created, MaxLifetime/time.Second)
	case era != "" && !strings.HasSuffix(p.nonce, "-"+era):
		return unauthenticated("the clock here was set back: sign it again, for the era that /v1/healthz names")
	case era == "" && !v.Started.IsZero() && !p.createdAfter(v.Started):
		return unauthenticated("created %s, not after the node's start at %s: sign it again", clock(p.created), clock(v.Started.Unix()))
	case p.created > now.Add(ahead).Unix():
		return unauthenticated("created %s, but here it is %s: the signer's clock is ahead", clock(p.created), clock(now.Unix()))
	case p.expires <= now.Unix():
		return unauthenticated("expired %s, here it is %s: too late, or the signer's clock is behind", clock(p.expires), clock(now.Unix()))
	}
	return nil
}

func clock(seconds int64) string { return time.Unix(seconds, 0).UTC().Format("2006-01-02T15:04:05Z") }

// readSigned takes what is signed from a request as it arrived.
func readSigned(r *http.Request, authority string) (SignedRequest, error) {
	scheme := "http://"
	if r.TLS != nil {
		scheme = "https://"
	}
	if !strings.EqualFold(r.Host, authority) {
		return SignedRequest{}, unauthenticated("host %.80q, want %q", r.Host, authority)
	}
	if !strings.HasPrefix(r.RequestURI, "/") {
		return SignedRequest{}, unauthenticated("request target %.80q, want a path", r.RequestURI)
	}
	signed := SignedRequest{Method: r.Method, TargetURI: scheme + strings.ToLower(authority) + r.RequestURI}
	for name, field := range map[string]*string{
		"Content-Digest":  &signed.ContentDigest,
		"Nucleus-Pod":     &signed.Pod,
		"Signature-Input": &signed.SignatureInput,
		"Signature":       &signed.Signature,
	} {
		values := r.Header[name]
		if len(values) != 1 {
			return SignedRequest{}, unauthenticated("%d headers %s, want 1", len(values), name)
		}
		*field = values[0]
	}
	params, err := parseSignatureInput(signed.SignatureInput)
	signed.KeyID = params.keyID
	return signed, err
}

func readBody(r *http.Request) ([]byte, error) {
	if r.Body == nil {
		return nil, nil
	}
	tooLarge := func(size string) error {
		return nucleus.Errorf(nucleus.KindTooLarge, "body of %s bytes, at most %d", size, MaxBody)
	}
	if r.ContentLength > MaxBody {
		return nil, tooLarge(strconv.FormatInt(r.ContentLength, 10))
	}
	var body bytes.Buffer
	if r.ContentLength > 0 {
		body.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	if _, err := body.ReadFrom(io.LimitReader(r.Body, MaxBody+1)); err != nil {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "reading the body: %v", err)
	}
	if body.Len() > MaxBody {
		return nil, tooLarge("more than " + strconv.Itoa(MaxBody))
	}
	return body.Bytes(), nil
}

// parameters of the one signature.
type parameters struct {
	created, expires  int64
	nonce, keyID, alg string
}

func (p parameters) String() string {
	return fmt.Sprintf(`%s;created=%d;expires=%d;nonce="%s";keyid="%s";alg="%s";tag="%s"`,
		components, p.created, p.expires, p.nonce, p.keyID, p.alg, tag)
}

// createdAfter compares whole seconds, and milliseconds where the nonce has them.
func (p parameters) createdAfter(start time.Time) bool {
	if p.created != start.Unix() {
		return p.created > start.Unix()
	}
	text, _, _ := strings.Cut(p.nonce, "-")
	milli, ok := parseInteger(text)
	return ok && milli/1000 == p.created && milli > start.UnixMilli()
}

// parseSignatureInput accepts the one form of the profile.
func parseSignatureInput(in string) (parameters, error) {
	var p parameters
	if len(in) > maxParams {
		return p, unauthenticated("Signature-Input of %d bytes, at most %d", len(in), maxParams)
	}
	rest, ok := strings.CutPrefix(in, label)
	if !ok {
		return p, unauthenticated("Signature-Input %.80q, want the one signature %s(...)", in, label)
	}
	rest, ok = strings.CutPrefix(rest, components)
	if !ok {
		return p, unauthenticated("signed components %.120q, want exactly %s", rest, components)
	}
	seen := map[string]bool{}
	for rest != "" {
		name, value, after, ok := cutParameter(rest)
		if !ok {
			return p, unauthenticated("Signature-Input: %.80q, want ;name=value", rest)
		}
		rest = after
		if seen[name] {
			return p, unauthenticated("parameter %s twice", name)
		}
		seen[name] = true
		switch name {
		case "created":
			p.created, ok = parseInteger(value)
		case "expires":
			p.expires, ok = parseInteger(value)
		case "nonce":
			p.nonce, ok = parseString(value, 16, 128)
		case "keyid":
			p.keyID, ok = parseString(value, 1, 128)
		case "alg":
			p.alg, ok = parseString(value, 1, 40)
		case "tag":
			var got string
			got, ok = parseString(value, 1, 40)
			if ok && got != tag {
				return p, unauthenticated("tag %q, want %q", got, tag)
			}
		default:
			return p, unauthenticated("unknown parameter %.40q", name)
		}
		if !ok {
			return p, unauthenticated("parameter %s=%.140s is malformed", name, value)
		}
	}
	for _, name := range []string{"created", "expires", "nonce", "keyid", "alg", "tag"} {
		if !seen[name] {
			return p, unauthenticated("no parameter %s", name)
		}
	}
	return p, nil
}

// cutParameter cuts ;name=value off the front. A quoted value contains no
// semicolon here: parseString refuses it.
func cutParameter(in string) (name, value, rest string, ok bool) {
	in, ok = strings.CutPrefix(in, ";")
	if !ok {
		return "", "", "", false
	}
	name, in, ok = strings.Cut(in, "=")
	if !ok {
		return "", "", "", false
	}
	if i := strings.IndexByte(in, ';'); i >= 0 {
		return name, in[:i], in[i:], true
	}
	return name, in, "", true
}

// parseInteger reads an integer as RFC 8941 writes it: no sign, no leading zero.
func parseInteger(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 0 && len(s) <= 13 && strconv.FormatInt(n, 10) == s
}

// parseString reads a quoted string without escapes.
func parseString(s string, least, most int) (string, bool) {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return "", false
	}
	s = s[1 : len(s)-1]
	return s, len(s) >= least && len(s) <= most && isVisible(s) && !strings.ContainsAny(s, `"\;`)
}

// byteSequence is :base64: as RFC 8941 writes it.
func byteSequence(raw []byte) string { return ":" + base64.StdEncoding.EncodeToString(raw) + ":" }

func parseByteSequence(s string) ([]byte, bool) {
	if len(s) < 2 || len(s) > 200 || s[0] != ':' || s[len(s)-1] != ':' {
		return nil, false
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(s[1 : len(s)-1])
	return raw, err == nil && byteSequence(raw) == s
}

func contentDigest(body []byte) string {
	sum := sha256.Sum256(body)
	return "sha-256=" + byteSequence(sum[:])
}

func macSHA256(key, message []byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write(message)
	return mac.Sum(nil)
}

func isVisible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func isToken(s string, most int) bool {
	for i := range len(s) {
		if s[i] < 'A' || s[i] > 'Z' {
			return false
		}
	}
	return s != "" && len(s) <= most
}

func isName(s string) bool {
	for i := range len(s) {
		b := s[i]
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || strings.IndexByte("-_.:", b) >= 0) {
			return false
		}
	}
	return s != "" && len(s) <= 128
}

func unauthenticated(format string, args ...any) *nucleus.Error {
	return nucleus.Errorf(nucleus.KindUnauthenticated, format, args...)
}
