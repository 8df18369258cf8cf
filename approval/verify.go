package approval

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	paseto "aidanwoods.dev/go-paseto"

	"cal/nucleus"
)

// MaxToken is the largest token in bytes that is looked at.
const MaxToken = 8 << 10

// MaxReason is the longest reason of an approver in bytes.
const MaxReason = 500

const (
	tokenHeader = "v4.public."
	maxFooter   = 256
)

// Reason says why a grant was refused.
type Reason string

// The reasons. Each field that a grant binds has its own.
const (
	BadSize      Reason = "size"       // the token is empty or too long
	BadFormat    Reason = "format"     // not a PASETO v4.public token with a grant in it
	BadApprover  Reason = "approver"   // the footer names nobody who may approve
	BadSignature Reason = "signature"  // not signed by that approver, or changed
	BadIssuer    Reason = "issuer"     // footer and claims name different approvers
	BadID        Reason = "grant_id"   // the grant has no usable id of its own
	BadAsk       Reason = "ask"        // another ask
	BadPod       Reason = "pod"        // another pod
	BadSession   Reason = "session"    // another session
	BadBoot      Reason = "boot"       // another boot of the machine
	BadOp        Reason = "operation"  // another operation
	BadDigest    Reason = "digest"     // other arguments
	BadPolicy    Reason = "policy"     // another policy
	BadNonce     Reason = "nonce"      // another nonce
	BadAskDigest Reason = "ask_digest" // something else that the approver was shown is different
	BadLife      Reason = "lifetime"   // the grant's times reach beyond the ask's
	NotYet       Reason = "not_yet"    // before its time
	Expired      Reason = "expired"    // after its time
	BadWant      Reason = "binding"    // what the verifier compares with is itself incomplete
	BadQuorum    Reason = "quorum"     // fewer approvers than the ask needs, or more
	BadTwice     Reason = "twice"      // one approver, one key or one grant counts twice
	BadTask      Reason = "task"       // bounds of a task that do not fit the ask, or differ between approvers
)

// Refusal is the error of a grant that does not hold.
type Refusal struct {
	Reason  Reason
	Message string
}

func (r *Refusal) Error() string { return "grant refused: " + r.Message }

func refuse(reason Reason, format string, args ...any) *Refusal {
	return &Refusal{reason, fmt.Sprintf(format, args...)}
}

// ReasonOf returns why err refused a grant; empty for any other error.
func ReasonOf(err error) Reason {
	var r *Refusal
	if errors.As(err, &r) {
		return r.Reason
	}
	return ""
}

// Binding is what a grant must be for. A verifier fills it from its own
// knowledge; every field is compared exactly and none may be empty.
type Binding struct {
	Ask       string
	AskDigest string
	Pod       string
	Session   string
	Boot      string
	Op        nucleus.Op
	Digest    string
	Policy    string
	Nonce     string
	Created   int64 // of the ask, milliseconds
	Expires   int64 // of the ask, milliseconds
}

// Bind returns what a grant for ask must be for.
func Bind(ask nucleus.AskRequest) (Binding, error) {
	digest, _, err := Digest(ask)
	if err != nil {
		return Binding{}, err
	}
	return Binding{
		Ask: ask.ID, AskDigest: digest, Pod: ask.Pod, Session: ask.Session, Boot: ask.Boot, Op: ask.Action.Op,
		Digest: ask.Digest, Policy: ask.Policy, Nonce: ask.Nonce, Created: ask.Created, Expires: ask.Expires,
	}, nil
}

// Grant returns the claims that an approver signs to grant b.
func (b Binding) Grant(id, approver, reason string) nucleus.Grant {
	return nucleus.Grant{
		ID: id, Approver: approver, Ask: b.Ask, AskDigest: b.AskDigest, Pod: b.Pod, Session: b.Session, Boot: b.Boot,
		Op: b.Op, Digest: b.Digest, Policy: b.Policy, Reason: reason, Nonce: b.Nonce,
		NotBefore: b.Created, Expires: b.Expires,
	}
}

// Verify checks that token grants exactly ask, now: one approver's part of what Approved
// checks. See Binding.Verify.
func Verify(token string, ask nucleus.AskRequest, approvers []nucleus.Approver, nowMillis int64) (nucleus.Grant, error) {
	b, err := Bind(ask)
	if err != nil {
		return nucleus.Grant{}, refuse(BadWant, "%v", err)
	}
	return b.Verify(token, approvers, nowMillis)
}

// Approved checks that tokens grant exactly ask, now: a grant of each of as many different
// approvers, by different keys, as the ask needs, all for one use or all for the same task. See Binding.Verify.
func Approved(tokens []string, ask nucleus.AskRequest, approvers []nucleus.Approver, nowMillis int64) ([]nucleus.Grant, error) {
	b, err := Bind(ask)
	if err != nil {
		return nil, refuse(BadWant, "%v", err)
	}
	if ask.Approvals < 1 || len(tokens) != ask.Approvals {
		return nil, refuse(BadQuorum, "%d approvers granted, the ask needs %d", len(tokens), ask.Approvals)
	}
	var grants []nucleus.Grant
	counted := map[string]bool{}
	for _, token := range tokens {
		grant, err := b.Verify(token, approvers, nowMillis)
		if err != nil {
			return nil, err
		}
		approver, _ := find(approvers, grant.Approver)
		for _, once := range []string{"approver " + grant.Approver, "key " + hex.EncodeToString(approver.Key), "grant " + grant.ID} {
			if counted[once] {
				return nil, refuse(BadTwice, "%s counts once, the ask needs %d different ones", once, ask.Approvals)
			}
			counted[once] = true
		}
		grants = append(grants, grant)
	}
	if err := checkTasks(ask, grants, nowMillis); err != nil {
		return nil, err
	}
	return grants, nil
}

// checkTasks refuses grants that are good for different things.
func checkTasks(ask nucleus.AskRequest, grants []nucleus.Grant, now int64) error {
	for _, g := range grants {
		if !SameTask(g.Task, grants[0].Task) {
			return refuse(BadTask, "%s and %s granted different tasks", grants[0].Approver, g.Approver)
		}
	}
	if task := grants[0].Task; task != nil {
		if err := CheckTask(ask, *task, now); err != nil {
			return refuse(BadTask, "%v", err)
		}
	}
	return nil
}

// Different returns approvers without those who would count twice, or who would grant what
// they asked for themselves: of several with one key the first stays, and none that has the
// key of a requester.
func Different(approvers []nucleus.Approver, requesters ...[]byte) []nucleus.Approver {
	var different []nucleus.Approver
	known := map[string]bool{}
	for _, key := range requesters {
		known[string(key)] = true
	}
	for _, a := range approvers {
		if !known[string(a.Key)] {
			known[string(a.Key)] = true
			different = append(different, a)
		}
	}
	return different
}

func find(approvers []nucleus.Approver, name string) (nucleus.Approver, bool) {
	at := slices.IndexFunc(approvers, func(a nucleus.Approver) bool { return a.Name == name })
	if at < 0 {
		return nucleus.Approver{}, false
	}
	return approvers[at], true
}

// Verify checks that token is the grant of one of approvers for exactly b, now.
// Every error is a *Refusal. The grant is not used up by it: that is the duty of
// whoever acts, before the act.
func (b Binding) Verify(token string, approvers []nucleus.Approver, nowMillis int64) (nucleus.Grant, error) {
	if err := b.complete(); err != nil {
		return nucleus.Grant{}, err
	}
	if strings.HasPrefix(token, passkeyHeader) {
		if err := checkToken(token); err != nil {
			return nucleus.Grant{}, err
		}
		grant, err := verifyPasskey(token, approvers)
		if err != nil {
			return nucleus.Grant{}, err
		}
		return b.holds(grant, nowMillis)
	}
	name, err := approverOf(token)
	if err != nil {
		return nucleus.Grant{}, err
	}
	approver, ok := find(approvers, name)
	if !ok {
		return nucleus.Grant{}, refuse(BadApprover, "%q is not an approver", name)
	}
	if approver.Kind != nucleus.ApproverEd25519 {
		return nucleus.Grant{}, refuse(BadApprover, "the key of %q is of kind %q, which signs no such token", name, approver.Kind)
	}
	key, err := paseto.NewV4AsymmetricPublicKeyFromEd25519(approver.Key)
	if err != nil {
		return nucleus.Grant{}, refuse(BadApprover, "key of %q: %v", name, err)
	}
	grant, err := open(token, key, b.AskDigest)
	if err != nil {
		return nucleus.Grant{}, b.explain(token, key, err)
	}
	if grant.Approver != name {
		return nucleus.Grant{}, refuse(BadIssuer, "it was issued by %q, its footer names %q", grant.Approver, name)
	}
	return b.holds(grant, nowMillis)
}

// holds checks that claims whose signature was verified are for exactly b, now.
func (b Binding) holds(grant nucleus.Grant, nowMillis int64) (nucleus.Grant, error) {
	if err := b.compare(grant); err != nil {
		return nucleus.Grant{}, err
	}
	switch {
	case nowMillis < grant.NotBefore:
		return nucleus.Grant{}, refuse(NotYet, "it is valid in %d ms", grant.NotBefore-nowMillis)
	case nowMillis >= grant.Expires:
		return nucleus.Grant{}, refuse(Expired, "it expired %d ms ago", nowMillis-grant.Expires)
	}
	return grant, nil
}

// explain finds out why the signature over b's digest does not hold. A token
// that is authentic for another ask is told apart from a forged one. It returns
// a refusal in every case.
func (b Binding) explain(token string, key paseto.V4AsymmetricPublicKey, cause error) error {
	claims, err := Claims(token)
	if err != nil {
		return err
	}
	if _, err := open(token, key, claims.AskDigest); err != nil || claims.AskDigest == b.AskDigest {
		return cause
	}
	if err := b.compare(claims); err != nil {
		return err
	}
	return refuse(BadAskDigest, "it is for an ask with digest %q, want %q", claims.AskDigest, b.AskDigest)
}

func (b Binding) complete() error {
	for _, f := range []struct{ name, value string }{
		{"ask", b.Ask}, {"ask digest", b.AskDigest}, {"pod", b.Pod}, {"session", b.Session}, {"boot", b.Boot},
		{"operation", string(b.Op)}, {"digest", b.Digest}, {"policy", b.Policy}, {"nonce", b.Nonce},
	} {
		if f.value == "" {
			return refuse(BadWant, "the %s to compare with is empty", f.name)
		}
	}
	if b.Created <= 0 || b.Expires <= b.Created {
		return refuse(BadWant, "the ask's times to compare with are %d and %d", b.Created, b.Expires)
	}
	return nil
}

func (b Binding) compare(g nucleus.Grant) error {
	if !validName(g.ID) {
		return refuse(BadID, "its id %q is not 1 to %d letters, digits and -._:@", g.ID, maxName)
	}
	for _, f := range []struct {
		reason    Reason
		name      string
		got, want string
	}{
		{BadAsk, "ask", g.Ask, b.Ask},
		{BadPod, "pod", g.Pod, b.Pod},
		{BadSession, "session", g.Session, b.Session},
		{BadBoot, "boot", g.Boot, b.Boot},
		{BadOp, "operation", string(g.Op), string(b.Op)},
		{BadDigest, "digest", g.Digest, b.Digest},
		{BadPolicy, "policy", g.Policy, b.Policy},
		{BadNonce, "nonce", g.Nonce, b.Nonce},
		{BadAskDigest, "ask digest", g.AskDigest, b.AskDigest},
	} {
		if f.got != f.want {
			return refuse(f.reason, "it is for %s %q, want %q", f.name, f.got, f.want)
		}
	}
	if g.NotBefore < b.Created || g.Expires > b.Expires || g.Expires <= g.NotBefore {
		return refuse(BadLife, "it is valid from %d to %d ms, the ask from %d to %d", g.NotBefore, g.Expires, b.Created, b.Expires)
	}
	return nil
}

// Assertion is the implicit assertion of a grant's token: bytes that are signed
// with it and that the verifier supplies itself.
func Assertion(askDigest string) []byte { return []byte(nucleus.DomainAsk + "\n" + askDigest) }

// Footer is a token's footer. It names the approver whose key is tried.
func Footer(approver string) []byte {
	footer, err := nucleus.Canonical(map[string]string{"kid": approver})
	if err != nil {
		panic(err) // a map of strings has canonical bytes
	}
	return footer
}

// Claims returns what a token says, without any check of its signature. It
// serves to fill the fields of a Binding that the verifier has no source of its
// own for, and to explain a refusal; nothing may be decided by it.
func Claims(token string) (nucleus.Grant, error) {
	if err := checkToken(token); err != nil {
		return nucleus.Grant{}, err
	}
	if strings.HasPrefix(token, passkeyHeader) {
		grant, _, err := openPasskey(token)
		return grant, err
	}
	body, _, _ := strings.Cut(strings.TrimPrefix(token, tokenHeader), ".")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || len(raw) <= ed25519.SignatureSize {
		return nucleus.Grant{}, refuse(BadFormat, "its payload is no base64 with a signature")
	}
	return claims(raw[:len(raw)-ed25519.SignatureSize])
}

func claims(raw []byte) (nucleus.Grant, error) {
	canonical, err := nucleus.CanonicalJSON(raw) // repeated keys are refused
	if err != nil {
		return nucleus.Grant{}, refuse(BadFormat, "claims: %v", err)
	}
	var g nucleus.Grant
	if err := nucleus.Strict(canonical, &g); err != nil {
		return nucleus.Grant{}, refuse(BadFormat, "claims: %v", err)
	}
	return g, nil
}

func open(token string, key paseto.V4AsymmetricPublicKey, askDigest string) (nucleus.Grant, error) {
	if _, err := paseto.NewParserWithoutExpiryCheck().ParseV4Public(key, token, Assertion(askDigest)); err != nil {
		return nucleus.Grant{}, refuse(BadSignature, "%v", err)
	}
	return Claims(token) // of the bytes that were signed: the parser's own map has lost a repeated key
}

func checkToken(token string) error {
	if token == "" || len(token) > MaxToken {
		return refuse(BadSize, "the token has %d bytes, want 1 to %d", len(token), MaxToken)
	}
	if strings.HasPrefix(token, passkeyHeader) {
		return nil
	}
	if !strings.HasPrefix(token, tokenHeader) || strings.Count(token, ".") != 3 {
		return refuse(BadFormat, "it is no PASETO %stoken with a footer", tokenHeader)
	}
	return nil
}

func approverOf(token string) (string, error) {
	if err := checkToken(token); err != nil {
		return "", err
	}
	encoded := token[strings.LastIndexByte(token, '.')+1:]
	if len(encoded) > maxFooter {
		return "", refuse(BadSize, "its footer has %d bytes, at most %d are allowed", len(encoded), maxFooter)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return "", refuse(BadFormat, "footer: %v", err)
	}
	var footer struct {
		Kid string `json:"kid"`
	}
	if err := nucleus.Strict(raw, &footer); err != nil || string(Footer(footer.Kid)) != string(raw) {
		return "", refuse(BadFormat, "its footer does not name an approver")
	}
	return footer.Kid, nil
}
