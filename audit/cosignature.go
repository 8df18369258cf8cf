package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// cosignatureType is the key type of a C2SP tlog-cosignature by Ed25519.
const cosignatureType = 4

// WitnessKey is the signed-note form of a witness's public key (C2SP
// tlog-cosignature). The name is not empty and has no space, plus or line break.
func WitnessKey(name string, public ed25519.PublicKey) string {
	return fmt.Sprintf("%s+%08x+%s", name, witnessID(name, public), base64.StdEncoding.EncodeToString(append([]byte{cosignatureType}, public...)))
}

func witnessID(name string, public ed25519.PublicKey) uint32 {
	sum := sha256.Sum256(append([]byte(name+"\n\x04"), public...))
	return binary.BigEndian.Uint32(sum[:])
}

// parseWitnessKey is the inverse of WitnessKey.
func parseWitnessKey(key string) (name string, public ed25519.PublicKey, err error) {
	key = strings.TrimSpace(key)
	parts := strings.SplitN(key, "+", 3)
	if len(parts) == 3 {
		raw, err := base64.StdEncoding.Strict().DecodeString(parts[2])
		if err == nil && len(raw) == 1+ed25519.PublicKeySize && raw[0] == cosignatureType && WitnessKey(parts[0], raw[1:]) == key && parts[0] != "" {
			return parts[0], raw[1:], nil
		}
	}
	return "", nil, fmt.Errorf("witness key %.200q: want NAME+ID+KEY of a cosignature (type %d)", key, cosignatureType)
}

// cosignedText is what a witness signs of a checkpoint.
func cosignedText(body []byte, unix int64) []byte {
	return append(fmt.Appendf(nil, "cosignature/v1\ntime %d\n", unix), body...)
}

// cosigned checks the cosignature of one witness under a checkpoint.
func cosigned(signed []byte, key string) (Witnessed, error) {
	name, public, err := parseWitnessKey(key)
	if err != nil {
		return Witnessed{}, err
	}
	end := bytes.LastIndex(signed, []byte("\n\n"))
	if end < 0 {
		return Witnessed{}, malformed("not a checkpoint: no signature")
	}
	body := signed[:end+1]
	var found []Witnessed
	for line := range strings.Lines(string(signed[end+2:])) {
		text, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "— "+name+" ")
		raw, err := base64.StdEncoding.Strict().DecodeString(text)
		if !ok || err != nil || len(raw) != 4+8+ed25519.SignatureSize || binary.BigEndian.Uint32(raw) != witnessID(name, public) {
			continue // another key's
		}
		unix := binary.BigEndian.Uint64(raw[4:])
		if unix > math.MaxInt64 || !ed25519.Verify(public, cosignedText(body, int64(unix)), raw[12:]) {
			return Witnessed{}, refuse(NoCosignature, "the cosignature of %s does not hold (time %s)", name, strconv.FormatUint(unix, 10))
		}
		found = append(found, Witnessed{name, int64(unix)})
	}
	switch len(found) {
	case 0:
		return Witnessed{}, refuse(NoCosignature, "%s has not cosigned the checkpoint", name)
	case 1:
		return found[0], nil
	}
	return Witnessed{}, malformed("the checkpoint has %d cosignatures of %s", len(found), name)
}

// CheckWitnessKey says why key is not what WitnessKey returns.
func CheckWitnessKey(key string) error {
	_, _, err := parseWitnessKey(key)
	return err
}

// Cosign makes the signature line of a witness under a signed checkpoint (C2SP
// tlog-cosignature). What the checkpoint says, and who signed it, the caller has
// checked.
func Cosign(signed []byte, name string, key ed25519.PrivateKey, at time.Time) ([]byte, error) {
	public := key.Public().(ed25519.PublicKey)
	if VerifierKey(name, public) == "" {
		return nil, fmt.Errorf("%q cannot name a witness: it must not be empty or hold a space or a plus", name)
	}
	end := bytes.LastIndex(signed, []byte("\n\n"))
	if end < 0 {
		return nil, errors.New("not a checkpoint: no signature")
	}
	unix := at.Unix()
	if unix <= 0 {
		return nil, fmt.Errorf("the clock of the witness says %s", at)
	}
	raw := binary.BigEndian.AppendUint32(nil, witnessID(name, public))
	raw = binary.BigEndian.AppendUint64(raw, uint64(unix))
	raw = append(raw, ed25519.Sign(key, cosignedText(signed[:end+1], unix))...)
	return fmt.Appendf(nil, "— %s %s\n", name, base64.StdEncoding.EncodeToString(raw)), nil
}

// AddCosignature returns a signed checkpoint with one more signature line, which
// must be a cosignature by the witness with this key.
func AddCosignature(signed, line []byte, key string) ([]byte, error) {
	if bytes.IndexByte(line, '\n') != len(line)-1 || len(line) == 0 {
		return nil, fmt.Errorf("%.200q is no signature line", line)
	}
	both := append(bytes.Clone(signed), line...)
	if _, err := cosigned(both, key); err != nil {
		return nil, err
	}
	if _, err := note.Open(both, nil); !unverified(err) {
		return nil, err // not a note any more
	}
	return both, nil
}

// unverified is the answer of note.Open without keys to what is a note.
func unverified(err error) bool {
	var none *note.UnverifiedNoteError
	return errors.As(err, &none)
}

// Cosignatures returns what the witnesses with these keys say of a signed checkpoint.
// One that says nothing, or whose cosignature does not hold, is an error.
func Cosignatures(signed []byte, keys ...string) ([]Witnessed, error) {
	said := []Witnessed{}
	for _, key := range keys {
		w, err := cosigned(signed, key)
		if err != nil {
			return nil, err
		}
		said = append(said, w)
	}
	return said, nil
}
