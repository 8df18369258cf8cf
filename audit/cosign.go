package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/note"
)

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
