// Package passkeytest is an authenticator in software, with the browser before it, for tests:
// it answers whatever it is told to, true or false. It knows nothing of who verifies.
package passkeytest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"testing"
)

// The flags of authenticator data (WebAuthn, 6.1).
const (
	Present    = 1 << 0
	Verified   = 1 << 2
	Credential = 1 << 6
	Extensions = 1 << 7
)

// Authenticator holds one passkey. Its fields say what it answers.
type Authenticator struct {
	Key    *ecdsa.PrivateKey
	ID     []byte // of the credential
	Origin string
	Party  string
	Flags  byte
	Count  uint32         // of what comes next; 0 stays 0
	Member map[string]any // of the client data, beside or instead of the right ones; nil leaves one out
	More   []byte         // after the authenticator data
}

// New makes a passkey that answers rightly on a page of origin.
func New(t testing.TB, origin string) *Authenticator {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		t.Fatal(err)
	}
	return &Authenticator{Key: key, ID: id, Origin: origin, Party: "localhost", Flags: Present | Verified, Count: 1}
}

// Point is the public key as an uncompressed point.
func (a *Authenticator) Point(t testing.TB) []byte {
	t.Helper()
	point, err := a.Key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return point
}

// SPKI is the public key as a browser's getPublicKey gives it.
func (a *Authenticator) SPKI(t testing.TB) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(&a.Key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return spki
}

// Answer signs a challenge.
func (a *Authenticator) Answer(t testing.TB, challenge []byte) (clientData, authData, signature []byte) {
	t.Helper()
	clientData, authData = a.clientData(t, "webauthn.get", challenge), append(a.authData(a.Flags), a.More...)
	return clientData, authData, a.Sign(t, clientData, authData)
}

// Sign makes the signature over any client data and authenticator data.
func (a *Authenticator) Sign(t testing.TB, clientData, authData []byte) []byte {
	t.Helper()
	client := sha256.Sum256(clientData)
	signed := sha256.Sum256(append(bytes.Clone(authData), client[:]...))
	signature, err := ecdsa.SignASN1(rand.Reader, a.Key, signed[:])
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

// Register answers as when the passkey is made.
func (a *Authenticator) Register(t testing.TB, challenge []byte) (clientData, authData []byte) {
	t.Helper()
	authData = append(a.authData(a.Flags|Credential), make([]byte, 16)...)
	authData = binary.BigEndian.AppendUint16(authData, uint16(len(a.ID)))
	authData = append(authData, a.ID...)
	point := a.Point(t)
	cose := append([]byte("\xa5\x01\x02\x03\x26\x20\x01\x21\x58\x20"), point[1:33]...)
	cose = append(append(cose, 0x22, 0x58, 0x20), point[33:]...)
	return a.clientData(t, "webauthn.create", challenge), append(append(authData, cose...), a.More...)
}

func (a *Authenticator) authData(flags byte) []byte {
	party := sha256.Sum256([]byte(a.Party))
	data := binary.BigEndian.AppendUint32(append(party[:], flags), a.Count)
	if a.Count > 0 {
		a.Count++
	}
	return data
}

func (a *Authenticator) clientData(t testing.TB, kind string, challenge []byte) []byte {
	t.Helper()
	members := map[string]any{"type": kind, "challenge": base64.RawURLEncoding.EncodeToString(challenge), "origin": a.Origin, "crossOrigin": false}
	for name, value := range a.Member {
		members[name] = value
		if value == nil {
			delete(members, name)
		}
	}
	raw, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
