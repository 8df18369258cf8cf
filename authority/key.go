package authority

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unicode/utf8"

	"filippo.io/age"

	"cal/nucleus"
)

// MinPassphrase is the least number of characters of a passphrase.
const MinPassphrase = 8

// secret is what age seals. All that is said of the key in clear is in it, so that a change
// is noticed.
type secret struct {
	Identity
	Seed []byte `json:"seed"`
}

// Init makes the first approver's key in cfg.Dir, which is made too if need be, sealed
// with the passphrase. It refuses where there is one.
func Init(cfg Config, approver, phrase, passphrase string) (_ Identity, err error) {
	if err := checkNew(approver, phrase, passphrase); err != nil {
		return Identity{}, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return Identity{}, err
	}
	if err := checkPrivate(cfg.Dir); err != nil {
		return Identity{}, err
	}
	lock, err := holdAlone(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return Identity{}, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if _, err := readKeys(cfg.Dir); err == nil {
		return Identity{}, fmt.Errorf("there is an approval key in %s; it is not replaced", cfg.Dir)
	} else if !errors.Is(err, ErrNoKey) {
		return Identity{}, err
	}
	f, err := newKey(Identity{Approver: approver, Phrase: phrase}, passphrase, cfg.WorkFactor)
	if err != nil {
		return Identity{}, err
	}
	return f.Identity, writeNew(cfg.Dir, f)
}

// newKey makes a key that a passphrase seals.
func newKey(identity Identity, passphrase string, workFactor int) (keyFile, error) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return keyFile{}, err
	}
	defer clear(private)
	identity.Kind, identity.PublicKey = nucleus.ApproverEd25519, public
	sealed, err := seal(secret{identity, private.Seed()}, passphrase, workFactor)
	return keyFile{Identity: identity, Sealed: sealed}, err
}

func checkPassphrase(passphrase string) error {
	if n := utf8.RuneCountInString(passphrase); n < MinPassphrase {
		return fmt.Errorf("the passphrase has %d characters, want at least %d", n, MinPassphrase)
	}
	return nil
}

func seal(s secret, passphrase string, workFactor int) ([]byte, error) {
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return nil, err
	}
	if workFactor != 0 {
		recipient.SetWorkFactor(workFactor)
	}
	clearText, err := nucleus.Canonical(s)
	if err != nil {
		return nil, err
	}
	defer clear(clearText)
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, recipient)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(clearText); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return sealed.Bytes(), nil
}

func open(f keyFile, passphrase string) (ed25519.PrivateKey, error) {
	if passphrase == "" {
		return nil, nucleus.Errorf(nucleus.KindForbidden, "no passphrase")
	}
	id, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return nil, err
	}
	r, err := age.Decrypt(bytes.NewReader(f.Sealed), id)
	var wrong *age.NoIdentityMatchError
	if errors.As(err, &wrong) {
		return nil, nucleus.Errorf(nucleus.KindForbidden, "wrong passphrase")
	} else if err != nil {
		return nil, fmt.Errorf("approval key: %w", err)
	}
	clearText, err := io.ReadAll(r)
	defer clear(clearText)
	if err != nil {
		return nil, fmt.Errorf("approval key: %w", err)
	}
	var s secret
	if err := json.Unmarshal(clearText, &s); err != nil || len(s.Seed) != ed25519.SeedSize {
		return nil, errors.New("approval key: what is sealed is no key")
	}
	defer clear(s.Seed)
	if s.Kind == "" {
		s.Kind = nucleus.ApproverEd25519
	}
	key := ed25519.NewKeyFromSeed(s.Seed)
	if !sameIdentity(s.Identity, f.Identity) || !bytes.Equal(f.PublicKey, key.Public().(ed25519.PublicKey)) {
		return nil, errors.New("approval key: name, phrase, public key or who added it were changed since it was made")
	}
	return key, nil
}
