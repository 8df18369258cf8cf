package authority

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"cal/approval"
	"cal/internal/durable"
	"cal/nucleus"
)

// The approvers of a directory: a file for each, in approvers/. The first made itself; every
// other was added by one who was there, whose signature stands in its file, and the secret
// that the passphrase seals says by whom. So who can write into the directory and knows no
// passphrase cannot put an approver beside the others: they would have to be replaced, and
// then the person's own passphrase opens nothing.

// ErrNoKey is the error of a directory in which no key was made yet.
var ErrNoKey = errors.New("there is no approval key")

const (
	approversName = "approvers"
	oldKeyName    = "key.json" // where the one key lay before there were several
	maxPhrase     = 200
	maxApprovers  = 64
)

// Identity is what is known of an approver without the passphrase. Phrase is the
// person's own: it stands on every screen that asks for the passphrase, and no
// asker is told of it.
type Identity struct {
	Approver   string `json:"approver"`
	Kind       string `json:"kind,omitempty"` // empty in a key made before there were kinds: ed25519
	PublicKey  []byte `json:"public_key"`
	Phrase     string `json:"phrase"`               // a passkey has none
	AddedBy    string `json:"added_by,omitempty"`   // empty for the first
	Credential []byte `json:"credential,omitempty"` // a passkey's id
	Origin     string `json:"origin,omitempty"`     // of the page that a passkey signs on
}

// public is the approver as askers know it.
func (i Identity) public() nucleus.Approver {
	return nucleus.Approver{Name: i.Approver, Kind: i.Kind, Key: i.PublicKey, Origin: i.Origin}
}

// keyFile is one approver on the disk. One that was removed keeps its name, so that what it
// signed stays named and what it vouched for stays vouched for; the secret is gone.
type keyFile struct {
	Identity
	Sealed  []byte          `json:"sealed,omitempty"`  // age, scrypt
	Vouched *nucleus.Signed `json:"vouched,omitempty"` // the Identity, by the key of AddedBy
	Removed int64           `json:"removed_ms,omitempty"`
}

// Listed is one approver of a directory, as its owner sees it.
type Listed struct {
	nucleus.Approver
	AddedBy string `json:"added_by,omitempty"`
	Removed int64  `json:"removed_ms,omitempty"`
}

// ReadApprovers lists the approvers of a directory, those who were removed too: the first, then
// by name.
func ReadApprovers(dir string) ([]Listed, error) {
	files, err := readKeys(dir)
	if err != nil {
		return nil, err
	}
	var list []Listed
	for _, f := range files {
		list = append(list, Listed{f.public(), f.AddedBy, f.Removed})
	}
	return list, nil
}

// choose finds who can approve by a name; an empty one stands for the only one that there is
// with a passphrase.
func choose(files []keyFile, name string) (keyFile, error) {
	var names []string
	var found []keyFile
	for _, f := range files {
		if f.Removed != 0 {
			continue
		}
		names = append(names, f.Approver)
		if name == "" && f.Kind == nucleus.ApproverEd25519 || f.Approver == name {
			found = append(found, f)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case name != "":
		return keyFile{}, nucleus.Errorf(nucleus.KindNotFound, "there is no approver %q; there are %s", name, strings.Join(names, ", "))
	}
	return keyFile{}, nucleus.Errorf(nucleus.KindInvalid, "which approver? there are %s", strings.Join(names, ", "))
}

// readKeys reads all approvers and refuses the directory where one was not added by one of the
// others.
func readKeys(dir string) ([]keyFile, error) {
	names, err := filepath.Glob(filepath.Join(dir, approversName, "*.json"))
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(filepath.Join(dir, oldKeyName)); err == nil {
		names = append(names, filepath.Join(dir, oldKeyName))
	}
	var files []keyFile
	for _, name := range names {
		f, err := readKey(name)
		if err != nil {
			return nil, err
		}
		switch i := slices.IndexFunc(files, func(g keyFile) bool { return g.Approver == f.Approver }); {
		case i < 0:
			files = append(files, f)
		case !bytes.Equal(files[i].PublicKey, f.PublicKey):
			return nil, fmt.Errorf("%s: approver %s is there with another key", name, f.Approver)
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%w in %s", ErrNoKey, dir)
	}
	return vouched(files)
}

// vouched holds every approver's file against the key of who added it. Of the first there is
// one; it comes first.
func vouched(files []keyFile) (known []keyFile, err error) {
	for rest := files; len(rest) > 0; {
		at := slices.IndexFunc(rest, func(f keyFile) bool { return vouches(known, f) })
		if at < 0 {
			return nil, fmt.Errorf("approver %s was not added by one who is known here: its file was changed, or put there by somebody else", rest[0].Approver)
		}
		known = append(known, rest[at])
		rest = slices.Delete(rest, at, at+1)
	}
	return known, nil
}

func vouches(known []keyFile, f keyFile) bool {
	if f.AddedBy == "" {
		return len(known) == 0
	}
	by := slices.IndexFunc(known, func(k keyFile) bool { return k.Approver == f.AddedBy })
	if by < 0 || f.Vouched == nil {
		return false
	}
	var said Identity
	err := f.Vouched.Open(known[by].PublicKey, nucleus.DomainVouch, &said)
	return err == nil && sameIdentity(said, f.Identity)
}

func sameIdentity(a, b Identity) bool {
	return a.Approver == b.Approver && a.Kind == b.Kind && bytes.Equal(a.PublicKey, b.PublicKey) && a.Phrase == b.Phrase && a.AddedBy == b.AddedBy &&
		bytes.Equal(a.Credential, b.Credential) && a.Origin == b.Origin
}

// sizes are those of the public keys of each kind.
var sizes = map[string]int{nucleus.ApproverEd25519: ed25519.PublicKeySize, nucleus.ApproverPasskey: approval.PasskeySize}

func readKey(path string) (keyFile, error) {
	raw, err := durable.ReadFile(path, 64<<10)
	if err != nil {
		return keyFile{}, err
	}
	var f keyFile
	if err := nucleus.Strict(raw, &f); err != nil {
		return keyFile{}, fmt.Errorf("%s: %w", path, err)
	}
	if f.Kind == "" {
		f.Kind = nucleus.ApproverEd25519
	}
	err = approval.CheckName("approver", f.Approver)
	switch {
	case err != nil:
		return keyFile{}, fmt.Errorf("%s: %w", path, err)
	case sizes[f.Kind] == 0:
		return keyFile{}, fmt.Errorf("%s: a key of kind %q, which this program does not know", path, f.Kind)
	case len(f.PublicKey) != sizes[f.Kind]:
		return keyFile{}, fmt.Errorf("%s: approver %q, public key of %d bytes, want %d", path, f.Approver, len(f.PublicKey), sizes[f.Kind])
	}
	return f, nil
}

func keyPath(dir, approver string) string {
	return filepath.Join(dir, approversName, approver+".json")
}

// writeNew makes the file of a new approver durably, or fails if there is one of that name: a
// link, unlike a rename, replaces nothing.
func writeNew(dir string, f keyFile) error {
	raw, err := nucleus.Canonical(f)
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Join(dir, approversName), 0o700); err != nil {
		return err
	}
	unfinished := filepath.Join(dir, ".new-"+f.Approver)
	if err := durable.WriteFile(unfinished, raw, 0o600); err != nil {
		return err
	}
	err = os.Link(unfinished, keyPath(dir, f.Approver))
	if errors.Is(err, os.ErrExist) {
		err = nucleus.Errorf(nucleus.KindConflict, "there is, or was, an approver %q in %s; a name is used once", f.Approver, dir)
	}
	return errors.Join(err, durable.Remove(unfinished), syncDir(filepath.Join(dir, approversName)))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// adoptOldKey moves the one key of a directory that was made before there were several to
// where they lie now. The caller holds the directory's lock.
func adoptOldKey(dir string) error {
	old := filepath.Join(dir, oldKeyName)
	f, err := readKey(old)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Join(dir, approversName), 0o700); err != nil {
		return err
	}
	// It is there already where this was cut off; readKeys has seen that it is the same.
	if err := os.Link(old, keyPath(dir, f.Approver)); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := syncDir(filepath.Join(dir, approversName)); err != nil {
		return err
	}
	return durable.Remove(old)
}

func checkNew(approver, phrase, passphrase string) error {
	if err := checkPassphrase(passphrase); err != nil {
		return err
	}
	return checkNames(approver, phrase)
}

func checkNames(approver, phrase string) error {
	if err := approval.CheckName("approver", approver); err != nil {
		return err
	}
	if phrase == "" || len(phrase) > maxPhrase || !utf8.ValidString(phrase) {
		return fmt.Errorf("your phrase has %d bytes, want 1 to %d of UTF-8", len(phrase), maxPhrase)
	}
	return nil
}
