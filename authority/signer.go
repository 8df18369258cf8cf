package authority

import (
	"crypto/ed25519"
	"errors"
	"fmt"

	paseto "aidanwoods.dev/go-paseto"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// The program at which a person decides opens the approver's key and signs there. What goes to
// the daemon is the signature: it tells nothing, and is for nothing else than what was shown. So
// who listens in the daemon's place, as every program of its user can, gets no key by it.

// Key is an approver's key as it lies in a directory, sealed.
type Key struct {
	Identity
	file keyFile
}

// ReadKey returns the key of an approver of a directory. An empty name stands for the only one
// that there is with a passphrase.
func ReadKey(dir, name string) (Key, error) {
	files, err := readKeys(dir)
	if err != nil {
		return Key{}, err
	}
	f, err := choose(files, name)
	if err == nil && f.Kind != nucleus.ApproverEd25519 {
		err = hasPasskey(f)
	}
	return Key{f.Identity, f}, err
}

func hasPasskey(f keyFile) *nucleus.Error {
	return nucleus.Errorf(nucleus.KindInvalid, "%s has a passkey and no passphrase: it grants on the page (nucleus-authority page)", f.Approver)
}

// Signer is an approver's key in clear.
type Signer struct {
	identity Identity
	key      ed25519.PrivateKey
}

// Open opens the key, which takes about half a second; its caller closes it after its use. A wrong
// passphrase is a KindForbidden error.
func (k Key) Open(passphrase string) (*Signer, error) {
	key, err := open(k.file, passphrase)
	if err != nil {
		return nil, err
	}
	return &Signer{k.Identity, key}, nil
}

// Close clears the key.
func (s *Signer) Close() { clear(s.key) }

// Grant makes the token of a grant for exactly ask, for one use or for a task, and looks at it as
// a verifier will. Whoever calls it has shown ask to the person.
func (s *Signer) Grant(ask nucleus.AskRequest, task *nucleus.Task, reason string) (token string, err error) {
	binding, err := approval.Bind(ask)
	if err != nil {
		return "", err
	}
	grant := binding.Grant(nucleus.NewID("g-"), s.identity.Approver, reason)
	grant.Task = task
	claims, err := nucleus.Canonical(grant)
	if err != nil {
		return "", err
	}
	unsigned, err := paseto.NewTokenFromClaimsJSON(claims, approval.Footer(grant.Approver))
	if err != nil {
		return "", err
	}
	secret, err := paseto.NewV4AsymmetricSecretKeyFromEd25519(s.key)
	if err != nil {
		return "", err
	}
	token = unsigned.V4Sign(secret, approval.Assertion(binding.AskDigest))
	if _, err := binding.Verify(token, []nucleus.Approver{s.identity.public()}, ask.Created); err != nil {
		return "", fmt.Errorf("the new grant does not hold: %w", err)
	}
	return token, nil
}

// NewApprover makes the key of one more approver, sealed with its own passphrase, and vouches for
// it. workFactor is that of Config.
func (s *Signer) NewApprover(name, phrase, passphrase string, workFactor int) (client.NewApprover, error) {
	if err := checkNew(name, phrase, passphrase); err != nil {
		return client.NewApprover{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	f, err := newKey(Identity{Approver: name, Phrase: phrase, AddedBy: s.identity.Approver}, passphrase, workFactor)
	if err != nil {
		return client.NewApprover{}, err
	}
	vouched, err := s.vouch(f.Identity)
	return client.NewApprover{Name: name, Phrase: phrase, Key: f.PublicKey, Sealed: f.Sealed, By: s.identity.Approver, Vouched: vouched}, err
}

// VouchPasskey vouches for the passkey that was made for an approver. Whoever calls it has had
// the person compare its fingerprint.
func (s *Signer) VouchPasskey(name string, made client.Made) (client.Voucher, error) {
	if len(made.Key) != approval.PasskeySize || made.Origin != approval.Origin(portOf(made.Origin)) {
		return client.Voucher{}, errors.New("what was made is no passkey of the authority's page")
	}
	vouched, err := s.vouch(Identity{Approver: name, Kind: nucleus.ApproverPasskey, PublicKey: made.Key, AddedBy: s.identity.Approver, Credential: made.Credential, Origin: made.Origin})
	return client.Voucher{By: s.identity.Approver, Vouched: vouched}, err
}

func (s *Signer) vouch(i Identity) (nucleus.Signed, error) {
	return nucleus.Sign(s.key, nucleus.DomainVouch, i)
}
