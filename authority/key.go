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
	"sync"
	"time"
	"unicode/utf8"

	"filippo.io/age"

	"cal/approval"
	"cal/nucleus"
)

// ErrNoKey is the error of a directory in which no key was made yet.
var ErrNoKey = errors.New("there is no approval key")

// MinPassphrase is the least number of characters of a passphrase.
const MinPassphrase = 8

const maxPhrase = 200

// Identity is what is known of the key without its passphrase. Phrase is the
// person's own: it stands on every screen that asks for the passphrase, and no
// asker is told of it.
type Identity struct {
	Approver  string            `json:"approver"`
	PublicKey ed25519.PublicKey `json:"public_key"`
	Phrase    string            `json:"phrase"`
}

// secret is what age seals. Name and phrase are in it, so that a change of the
// clear ones is noticed.
type secret struct {
	Identity
	Seed []byte `json:"seed"`
}

type keyFile struct {
	Identity
	Sealed []byte `json:"sealed"` // age, scrypt
}

const keyName = "key.json"

// Init makes the approver's key in cfg.Dir, which is made too if need be, sealed
// with the passphrase. It refuses to replace a key.
func Init(cfg Config, approver, phrase, passphrase string) (Identity, error) {
	if err := approval.CheckName("approver", approver); err != nil {
		return Identity{}, err
	}
	if err := checkPassphrase(passphrase); err != nil {
		return Identity{}, err
	}
	if phrase == "" || len(phrase) > maxPhrase || !utf8.ValidString(phrase) {
		return Identity{}, fmt.Errorf("your phrase has %d bytes, want 1 to %d of UTF-8", len(phrase), maxPhrase)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return Identity{}, err
	}
	if err := checkPrivate(cfg.Dir); err != nil {
		return Identity{}, err
	}
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return Identity{}, err
	}
	defer clear(private)
	identity := Identity{approver, public, phrase}
	sealed, err := seal(secret{identity, private.Seed()}, passphrase, cfg.WorkFactor)
	if err != nil {
		return Identity{}, err
	}
	raw, err := nucleus.Canonical(keyFile{identity, sealed})
	if err != nil {
		return Identity{}, err
	}
	return identity, writeOnce(cfg.Dir, keyName, raw)
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

// writeOnce makes the file durably, or fails if there is one: a link, unlike a
// rename, replaces nothing.
func writeOnce(dir, name string, data []byte) error {
	f, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), filepath.Join(dir, name)); errors.Is(err, os.ErrExist) {
		return fmt.Errorf("there is an approval key in %s; it is not replaced", dir)
	} else if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadIdentity returns what is known of the key in dir without its passphrase.
func ReadIdentity(dir string) (Identity, error) {
	identity, _, err := readKey(dir)
	return identity, err
}

func readKey(dir string) (Identity, []byte, error) {
	path := filepath.Join(dir, keyName)
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return Identity{}, nil, fmt.Errorf("%w in %s", ErrNoKey, dir)
	} else if err != nil {
		return Identity{}, nil, err
	}
	var file keyFile
	if err := nucleus.Strict(raw, &file); err != nil {
		return Identity{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := approval.CheckName("approver", file.Approver); err != nil || len(file.PublicKey) != ed25519.PublicKeySize {
		return Identity{}, nil, fmt.Errorf("%s: approver %q, public key of %d bytes", path, file.Approver, len(file.PublicKey))
	}
	return file.Identity, file.Sealed, nil
}

// attempts slows guessing down: every wrong passphrase doubles the wait.
type attempts struct {
	mu    sync.Mutex // held while one passphrase is tried: each takes 256 MiB
	wrong int
	until time.Time
}

const (
	firstWait = 500 * time.Millisecond
	longWait  = time.Minute
)

// unseal returns the private key, which the caller clears after its use. A wrong
// passphrase is a KindForbidden error, and so is one that comes too soon after
// it, right or wrong.
func (a *Authority) unseal(passphrase string) (ed25519.PrivateKey, error) {
	if !a.attempts.mu.TryLock() {
		return nil, nucleus.Errorf(nucleus.KindConflict, "another passphrase is being tried")
	}
	defer a.attempts.mu.Unlock()
	now := a.cfg.Now()
	if wait := a.attempts.until.Sub(now); wait > 0 {
		return nil, nucleus.Errorf(nucleus.KindForbidden, "after %d wrong passphrases none is tried for %v", a.attempts.wrong, wait.Round(100*time.Millisecond))
	}
	key, err := a.open(passphrase)
	if err != nil {
		wait := min(firstWait<<min(a.attempts.wrong, 20), longWait)
		a.attempts.wrong++
		a.attempts.until = a.cfg.Now().Add(wait)
		return nil, err
	}
	a.attempts.wrong, a.attempts.until = 0, time.Time{}
	return key, nil
}

func (a *Authority) open(passphrase string) (ed25519.PrivateKey, error) {
	if passphrase == "" {
		return nil, nucleus.Errorf(nucleus.KindForbidden, "no passphrase")
	}
	id, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return nil, err
	}
	r, err := age.Decrypt(bytes.NewReader(a.sealed), id)
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
	key := ed25519.NewKeyFromSeed(s.Seed)
	if s.Approver != a.identity.Approver || s.Phrase != a.identity.Phrase || !a.identity.PublicKey.Equal(key.Public()) {
		return nil, errors.New("approval key: name, phrase or public key were changed since it was made")
	}
	return key, nil
}
