package approval

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strings"

	"cal/nucleus"
)

// A passkey's grant is a token of a kind of its own:
//
//	passkey.v1.CLAIMS.CLIENT-DATA.AUTHENTICATOR-DATA.SIGNATURE
//
// each part in base64url without padding. CLAIMS are the canonical bytes of a nucleus.Grant,
// the rest is what the authenticator answered (WebAuthn Level 3). It signs its own data and
// the digest of the client data; the client data holds the challenge; and the challenge is the
// digest of all claims, the ask's digest among them. So there is no claim that the signature
// does not cover.

const passkeyHeader = "passkey.v1."

// The reasons why what an authenticator answered does not hold.
const (
	BadClientData   Reason = "client_data"   // not the JSON of a browser's client data
	BadCeremony     Reason = "ceremony"      // the answer to a question of another type
	BadChallenge    Reason = "challenge"     // the answer to another challenge
	BadOrigin       Reason = "origin"        // asked by another page
	BadFrame        Reason = "frame"         // asked by a page inside another
	BadAuthData     Reason = "auth_data"     // authenticator data of another form
	BadRelyingParty Reason = "relying_party" // for another site
	BadPresence     Reason = "presence"      // nobody touched the authenticator
	BadVerification Reason = "verification"  // the authenticator did not verify who
	BadKey          Reason = "key"           // not the public key of a passkey
)

// RelyingParty is the WebAuthn relying party of every passkey: pages on this host alone.
const RelyingParty = "localhost"

// Origin is the origin of the authority's page on a port.
func Origin(port int) string { return fmt.Sprintf("http://%s:%d", RelyingParty, port) }

// PasskeySize is the size of a passkey's public key: an uncompressed point on P-256 (SEC 1, 2.3.3).
const PasskeySize = 65

// The types of client data (WebAuthn, 5.8.1).
const (
	typeGet    = "webauthn.get"
	typeCreate = "webauthn.create"
)

// Flags of authenticator data (WebAuthn, 6.1).
const (
	flagPresent    = 1 << 0
	flagVerified   = 1 << 2
	flagEligible   = 1 << 3 // the key may be copied to other devices
	flagBackedUp   = 1 << 4
	flagCredential = 1 << 6
	flagExtensions = 1 << 7
)

const (
	authDataSize  = sha256.Size + 1 + 4 // relying party, flags, counter
	maxClientData = 2 << 10
	maxCredential = 1023 // WebAuthn, 4
)

// Answer is what an authenticator and its browser say to a challenge.
type Answer struct {
	ClientData        []byte `json:"client_data"`
	AuthenticatorData []byte `json:"authenticator_data"`
	Signature         []byte `json:"signature"` // ECDSA, DER
}

// Counter counts the signatures of an authenticator; 0 where it does not count. It means
// something once the answer was verified.
func (a Answer) Counter() uint32 {
	if len(a.AuthenticatorData) < authDataSize {
		return 0
	}
	return binary.BigEndian.Uint32(a.AuthenticatorData[sha256.Size+1:])
}

// PasskeyChallenge is what a passkey signs to grant: the SHA-256 of the domain, the ask's digest
// and the canonical claims, a line each.
func PasskeyChallenge(grant nucleus.Grant) ([]byte, error) {
	claims, err := nucleus.Canonical(grant)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(nucleus.DomainWebAuthn + "\n" + grant.AskDigest + "\n" + string(claims)))
	return sum[:], nil
}

// PasskeyToken makes the token of a grant from the answer to its challenge. It checks nothing.
func PasskeyToken(grant nucleus.Grant, answer Answer) (string, error) {
	claims, err := nucleus.Canonical(grant)
	if err != nil {
		return "", err
	}
	parts := []string{}
	for _, part := range [][]byte{claims, answer.ClientData, answer.AuthenticatorData, answer.Signature} {
		parts = append(parts, base64.RawURLEncoding.EncodeToString(part))
	}
	return passkeyHeader + strings.Join(parts, "."), nil
}

func openPasskey(token string) (nucleus.Grant, Answer, error) {
	fail := func(format string, args ...any) (nucleus.Grant, Answer, error) {
		return nucleus.Grant{}, Answer{}, refuse(BadFormat, format, args...)
	}
	encoded := strings.Split(strings.TrimPrefix(token, passkeyHeader), ".")
	if len(encoded) != 4 {
		return fail("a passkey's token has %d parts, want 4", len(encoded))
	}
	var parts [4][]byte
	for i, text := range encoded {
		raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
		if err != nil {
			return fail("part %d of a passkey's token: %v", i+1, err)
		}
		parts[i] = raw
	}
	grant, err := claims(parts[0])
	if err != nil {
		return nucleus.Grant{}, Answer{}, err
	}
	answer := Answer{ClientData: parts[1], AuthenticatorData: parts[2], Signature: parts[3]}
	if canonical, err := PasskeyToken(grant, answer); err != nil || canonical != token {
		return fail("a passkey's token that is not in its one form")
	}
	return grant, answer, nil
}

// verifyPasskey checks that a passkey of one of approvers has signed all claims of token, and
// returns them.
func verifyPasskey(token string, approvers []nucleus.Approver) (nucleus.Grant, error) {
	grant, answer, err := openPasskey(token)
	if err != nil {
		return nucleus.Grant{}, err
	}
	approver, ok := find(approvers, grant.Approver)
	if !ok {
		return nucleus.Grant{}, refuse(BadApprover, "%q is not an approver", grant.Approver)
	}
	challenge, err := PasskeyChallenge(grant)
	if err != nil {
		return nucleus.Grant{}, refuse(BadFormat, "claims: %v", err)
	}
	if err := VerifyAnswer(approver, challenge, answer); err != nil {
		return nucleus.Grant{}, err
	}
	return grant, nil
}

// VerifyAnswer checks that the passkey of approver answered challenge on its page, with its owner
// present and verified (WebAuthn, 7.2). Every error is a *Refusal. That its counter does not go
// back has to be checked by who remembers it.
func VerifyAnswer(approver nucleus.Approver, challenge []byte, a Answer) error {
	if approver.Kind != nucleus.ApproverPasskey {
		return refuse(BadApprover, "the key of %q is of kind %q, not a passkey", approver.Name, approver.Kind)
	}
	key, err := passkey(approver.Key)
	if err != nil {
		return err
	}
	if err := checkClientData(a.ClientData, typeGet, challenge, approver.Origin); err != nil {
		return err
	}
	flags, err := checkAuthData(a.AuthenticatorData)
	if err != nil {
		return err
	}
	if flags&(flagCredential|flagExtensions) != 0 || len(a.AuthenticatorData) != authDataSize {
		return refuse(BadAuthData, "authenticator data of %d bytes with flags 0x%02x, want %d and neither a credential nor extensions", len(a.AuthenticatorData), flags, authDataSize)
	}
	clientData := sha256.Sum256(a.ClientData)
	signed := sha256.Sum256(append(bytes.Clone(a.AuthenticatorData), clientData[:]...))
	if !ecdsa.VerifyASN1(key, signed[:], a.Signature) {
		return refuse(BadSignature, "not signed by the passkey of %q, or changed", approver.Name)
	}
	return nil
}

func passkey(raw []byte) (*ecdsa.PublicKey, error) {
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
	if err != nil {
		return nil, refuse(BadKey, "a public key of %d bytes that is no point on P-256: %v", len(raw), err)
	}
	return key, nil
}

// checkClientData compares what a browser says of the page that asked. Members that are not
// known are let through, as 5.8.1 wants; a member that is there twice is not.
func checkClientData(raw []byte, kind string, challenge []byte, origin string) error {
	if len(raw) > maxClientData {
		return refuse(BadClientData, "client data of %d bytes, at most %d are allowed", len(raw), maxClientData)
	}
	canonical, err := nucleus.CanonicalJSON(raw)
	if err != nil {
		return refuse(BadClientData, "client data: %v", err)
	}
	var members map[string]json.RawMessage // a struct would take "Origin" for "origin"
	if err := json.Unmarshal(canonical, &members); err != nil {
		return refuse(BadClientData, "client data: %v", err)
	}
	for _, m := range []struct {
		reason     Reason
		name, want string
	}{
		{BadCeremony, "type", kind},
		{BadChallenge, "challenge", base64.RawURLEncoding.EncodeToString(challenge)},
		{BadOrigin, "origin", origin},
	} {
		var got *string
		if err := json.Unmarshal(members[m.name], &got); err != nil || got == nil {
			return refuse(BadClientData, "the %s of the client data is %q, not a text", m.name, members[m.name])
		}
		if *got != m.want || m.want == "" {
			return refuse(m.reason, "the client data's %s is %q, want %q", m.name, *got, m.want)
		}
	}
	if inside, ok := members["crossOrigin"]; ok && string(inside) != "false" {
		return refuse(BadFrame, "the page that asked stood inside one of another origin")
	}
	if top, ok := members["topOrigin"]; ok {
		return refuse(BadFrame, "the page that asked stood inside %s", top)
	}
	return nil
}

func checkAuthData(raw []byte) (flags byte, err error) {
	if len(raw) < authDataSize {
		return 0, refuse(BadAuthData, "authenticator data of %d bytes, want at least %d", len(raw), authDataSize)
	}
	party := sha256.Sum256([]byte(RelyingParty))
	flags = raw[sha256.Size]
	switch {
	case !bytes.Equal(raw[:sha256.Size], party[:]):
		return flags, refuse(BadRelyingParty, "the authenticator answered for another site than %s", RelyingParty)
	case flags&flagPresent == 0:
		return flags, refuse(BadPresence, "nobody touched the authenticator")
	case flags&flagVerified == 0:
		return flags, refuse(BadVerification, "the authenticator did not verify its owner")
	case flags&flagBackedUp != 0 && flags&flagEligible == 0:
		return flags, refuse(BadAuthData, "flags 0x%02x: backed up and not eligible for it", flags)
	}
	return flags, nil
}

// Registration is what a browser says of a passkey that it has just made. The key comes as
// SubjectPublicKeyInfo, which getPublicKey gives.
type Registration struct {
	Credential        []byte `json:"credential"` // its id
	PublicKey         []byte `json:"public_key"` // SubjectPublicKeyInfo, DER
	ClientData        []byte `json:"client_data"`
	AuthenticatorData []byte `json:"authenticator_data"`
}

// pointInfo is what stands before a point on P-256 in its SubjectPublicKeyInfo (RFC 5480, 2).
var pointInfo = []byte{0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00}

// Registered checks that r was made for challenge on the page of origin, with its owner present
// and verified, and returns the public key (WebAuthn, 7.1). Nothing in it proves who made it:
// no attestation is asked for. Every error is a *Refusal.
func Registered(r Registration, challenge []byte, origin string) (key []byte, err error) {
	if err := checkClientData(r.ClientData, typeCreate, challenge, origin); err != nil {
		return nil, err
	}
	flags, err := checkAuthData(r.AuthenticatorData)
	if err != nil {
		return nil, err
	}
	key, found := bytes.CutPrefix(r.PublicKey, pointInfo)
	if !found {
		return nil, refuse(BadKey, "a public key of %d bytes that is no point on P-256", len(r.PublicKey))
	}
	if _, err := passkey(key); err != nil {
		return nil, err
	}
	if n := len(r.Credential); n == 0 || n > maxCredential {
		return nil, refuse(BadAuthData, "a credential id of %d bytes, want 1 to %d", n, maxCredential)
	}
	// What the browser's methods say is in the authenticator's own data too: the id, and the key
	// in the one canonical form of COSE (RFC 9053, 7.1.1; CTAP 2.1, 8).
	const modelSize = 16
	want := binary.BigEndian.AppendUint16(nil, uint16(len(r.Credential)))
	want = append(want, r.Credential...)
	want = append(want, 0xa5, 0x01, 0x02, 0x03, 0x26, 0x20, 0x01, 0x21, 0x58, 0x20)
	want = append(want, key[1:33]...)
	want = append(want, 0x22, 0x58, 0x20)
	want = append(want, key[33:]...)
	rest := r.AuthenticatorData[authDataSize:]
	if flags&flagCredential == 0 || len(rest) < modelSize {
		return nil, refuse(BadAuthData, "authenticator data of %d bytes with flags 0x%02x, without a credential", len(r.AuthenticatorData), flags)
	}
	extensions, found := bytes.CutPrefix(rest[modelSize:], want)
	if !found || flags&flagExtensions == 0 && len(extensions) > 0 {
		return nil, refuse(BadAuthData, "the authenticator speaks of another credential or key than the browser")
	}
	return key, nil
}
