package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// algCosignature is C2SP's type of a timestamped Ed25519 cosignature.
const algCosignature = 0x04

// Cosignature is the word of a witness: it had seen this checkpoint by then, and
// no other history of the log.
type Cosignature struct {
	Witness string `json:"witness"` // name of its key
	Time    int64  `json:"time"`    // Unix seconds, by the witness's clock
}

// WitnessKey is the signed-note form of a witness's public key (C2SP
// tlog-cosignature, type 0x04); empty when name cannot be the name of a key.
func WitnessKey(name string, public ed25519.PublicKey) string {
	if VerifierKey(name, public) == "" {
		return ""
	}
	w := newWitness(name, public)
	return fmt.Sprintf("%s+%08x+%s", name, w.hash, base64.StdEncoding.EncodeToString(append([]byte{algCosignature}, public...)))
}

// witness is a note.Verifier of cosignatures.
type witness struct {
	name   string
	hash   uint32
	public ed25519.PublicKey
}

func newWitness(name string, public ed25519.PublicKey) *witness {
	id := append([]byte(name+"\n"), algCosignature)
	sum := sha256.Sum256(append(id, public...))
	return &witness{name, binary.BigEndian.Uint32(sum[:]), public}
}

// CheckWitnessKey says why key is not what WitnessKey returns.
func CheckWitnessKey(key string) error {
	_, err := parseWitness(key)
	return err
}

func parseWitness(key string) (*witness, error) {
	key = strings.TrimSpace(key)
	name, rest, _ := strings.Cut(key, "+")
	_, encoded, _ := strings.Cut(rest, "+")
	raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || len(raw) != 1+ed25519.PublicKeySize || raw[0] != algCosignature {
		return nil, fmt.Errorf("witness key %q is not NAME+HASH+KEY of type 4, a cosignature key", key)
	}
	if want := WitnessKey(name, raw[1:]); want != key {
		return nil, fmt.Errorf("witness key %q: its hash is not that of name and key", key)
	}
	return newWitness(name, raw[1:]), nil
}

func (w *witness) Name() string    { return w.name }
func (w *witness) KeyHash() uint32 { return w.hash }

func (w *witness) Verify(text, sig []byte) bool {
	return len(sig) == 8+ed25519.SignatureSize && sig[0] < 0x80 &&
		ed25519.Verify(w.public, cosignedText(int64(binary.BigEndian.Uint64(sig)), text), sig[8:])
}

// cosignedText is what a witness signs.
func cosignedText(unix int64, text []byte) []byte {
	return fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", unix, text)
}

type cosigner struct {
	*witness
	key ed25519.PrivateKey
	at  time.Time
}

func (c cosigner) Sign(text []byte) ([]byte, error) {
	at := c.at.Unix()
	if at <= 0 {
		return nil, fmt.Errorf("the clock of the witness says %s", c.at)
	}
	return append(binary.BigEndian.AppendUint64(nil, uint64(at)), ed25519.Sign(c.key, cosignedText(at, text))...), nil
}

// Cosign makes the signature line of a witness under a signed checkpoint. What the
// checkpoint says, and who signed it, the caller has checked.
func Cosign(signed []byte, name string, key ed25519.PrivateKey, at time.Time) ([]byte, error) {
	public := key.Public().(ed25519.PublicKey)
	if WitnessKey(name, public) == "" {
		return nil, fmt.Errorf("%q cannot name a witness: it must not be empty or hold a space or a plus", name)
	}
	end := bytes.LastIndex(signed, []byte("\n\n"))
	if end < 0 {
		return nil, errors.New("not a checkpoint: no signature")
	}
	cosigned, err := note.Sign(&note.Note{Text: string(signed[:end+1])}, cosigner{newWitness(name, public), key, at})
	if err != nil {
		return nil, err
	}
	return cosigned[end+2:], nil
}

// Cosignatures returns what the witnesses with these keys say of a signed
// checkpoint. One that says nothing, or whose cosignature is wrong, is an error.
func Cosignatures(signed []byte, keys ...string) ([]Cosignature, error) {
	said := []Cosignature{}
	for _, key := range keys {
		w, err := parseWitness(key)
		if err != nil {
			return nil, err
		}
		n, err := note.Open(signed, note.VerifierList(w))
		if err != nil {
			return nil, fmt.Errorf("%w: witness %s: %w", errSignature, w.name, err)
		}
		raw, err := base64.StdEncoding.Strict().DecodeString(n.Sigs[0].Base64)
		if err != nil {
			return nil, fmt.Errorf("%w: witness %s: %w", errSignature, w.name, err)
		}
		said = append(said, Cosignature{w.name, int64(binary.BigEndian.Uint64(raw[4:]))})
	}
	return said, nil
}

// AddCosignature returns a signed checkpoint with one more signature line, which
// must be a cosignature by the witness with this key.
func AddCosignature(signed, line []byte, key string) ([]byte, error) {
	both := append(bytes.Clone(signed), line...)
	if _, err := Cosignatures(both, key); err != nil {
		return nil, err
	}
	return both, nil
}
