package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// MaxCheckpoint bounds a signed note with many cosignatures, in bytes.
const MaxCheckpoint = 1 << 20

// Checkpoint is what a C2SP checkpoint says: the log, how many entries it has,
// and the root of their Merkle tree.
type Checkpoint struct {
	Origin string
	Size   int64
	Root   tlog.Hash
}

// VerifierKey is the signed-note form of a log's public key. It is empty when
// origin cannot be the name of a key: it must not be empty, nor hold a space,
// a plus or a line break.
func VerifierKey(origin string, public ed25519.PublicKey) string {
	key, err := note.NewEd25519VerifierKey(origin, public)
	if err != nil {
		return ""
	}
	if _, err := note.NewVerifier(key); err != nil {
		return ""
	}
	return key
}

// CheckKey says why key is not what VerifierKey returns.
func CheckKey(key string) error {
	if _, err := note.NewVerifier(key); err != nil {
		return fmt.Errorf("verifier key %q: %w", key, err)
	}
	return nil
}

// ParseCheckpoint checks the signature of a signed note by the log's key, a
// VerifierKey, and returns what it says. Signatures of others are ignored.
func ParseCheckpoint(signed []byte, key string) (Checkpoint, error) {
	v, err := note.NewVerifier(strings.TrimSpace(key))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("verifier key %q: %w", key, err)
	}
	return openCheckpoint(signed, v)
}

// errSignature says that a note is not signed by the log's key.
var errSignature = errors.New("bad signature")

// openCheckpoint parses a checkpoint. With errSignature it still returns what
// the text says.
func openCheckpoint(signed []byte, v note.Verifier) (Checkpoint, error) {
	if len(signed) > MaxCheckpoint {
		return Checkpoint{}, fmt.Errorf("not a checkpoint: %d bytes, at most %d are one", len(signed), MaxCheckpoint)
	}
	end := bytes.LastIndex(signed, []byte("\n\n"))
	if end < 0 {
		return Checkpoint{}, errors.New("not a checkpoint: no signature")
	}
	cp, err := parseBody(string(signed[:end+1]))
	if err != nil {
		return Checkpoint{}, err
	}
	if cp.Origin != v.Name() {
		return cp, fmt.Errorf("%w: the checkpoint is of log %q, the key of %q", errSignature, cp.Origin, v.Name())
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		return cp, fmt.Errorf("%w: %w", errSignature, err)
	}
	// note.Open lets base64 pass whose last bits differ and mean nothing.
	for _, sig := range append(n.Sigs, n.UnverifiedSigs...) {
		if _, err := base64.StdEncoding.Strict().DecodeString(sig.Base64); err != nil {
			return cp, fmt.Errorf("%w: by %s: %w", errSignature, sig.Name, err)
		}
	}
	return cp, nil
}

// parseBody reads the text of a checkpoint. Extension lines are let pass.
func parseBody(text string) (Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(lines) < 4 || lines[0] == "" {
		return Checkpoint{}, fmt.Errorf("not a checkpoint: %d lines, want origin, size and root", len(lines)-1)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || size < 0 || strconv.FormatInt(size, 10) != lines[1] {
		return Checkpoint{}, fmt.Errorf("not a checkpoint: size %q", lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return Checkpoint{}, fmt.Errorf("not a checkpoint: root %q", lines[2])
	}
	return Checkpoint{lines[0], size, tlog.Hash(root)}, nil
}

// signer signs notes in the name of the log.
type signer struct {
	note.Verifier
	key ed25519.PrivateKey
}

func newSigner(origin string, key ed25519.PrivateKey) (*signer, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("log key has %d bytes, want %d", len(key), ed25519.PrivateKeySize)
	}
	vkey := VerifierKey(origin, key.Public().(ed25519.PublicKey))
	if vkey == "" {
		return nil, fmt.Errorf("origin %q cannot name a log: it must not be empty or hold a space or a plus", origin)
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, err
	}
	return &signer{v, key}, nil
}

func (s *signer) Sign(text []byte) ([]byte, error) { return ed25519.Sign(s.key, text), nil }

// checkpoint signs the tree. The text is C2SP's: tlog.FormatTree writes another
// first line.
func (s *signer) checkpoint(t *tree) ([]byte, error) {
	text := fmt.Sprintf("%s\n%d\n%s\n", s.Name(), t.size, t.root())
	return note.Sign(&note.Note{Text: text}, s)
}
