// Package approval turns one ask into the bytes that are signed, the text that
// a person reads, and the check of the grant that comes back.
//
// The threat is an asker that shows one thing and does another: a grant moved
// to another pod, argument or time, and a text whose control characters hide
// what will run. So text and grant are both made from the same canonical bytes,
// and a grant is good only for the digest of exactly these bytes.
//
// The package is pure: no clock, no files, no network, and no key but public
// ones, so that it cannot sign.
package approval

import (
	"errors"
	"fmt"
	"strings"

	"cal/nucleus"
)

// MaxAsk is the largest canonical ask in bytes. What does not fit is cut by the
// asker, visibly.
const MaxAsk = 4 << 20

// MaxLife is the longest time, in milliseconds, between an ask's making and its
// expiry.
const MaxLife = 24 * 60 * 60 * 1000

// MaxPassage is the longest life of a passage in milliseconds.
const MaxPassage = 60 * 60 * 1000

const maxName = 128

// Digest returns the canonical bytes of an ask and their hex SHA-256. Text that
// is not UTF-8 and an ask longer than MaxAsk are refused.
func Digest(ask nucleus.AskRequest) (hex string, canonical []byte, err error) {
	canonical, err = nucleus.Canonical(ask)
	if err != nil {
		return "", nil, fmt.Errorf("ask %q: %w", ask.ID, err)
	}
	if len(canonical) > MaxAsk {
		return "", nil, fmt.Errorf("ask %q has %d bytes, at most %d are allowed", ask.ID, len(canonical), MaxAsk)
	}
	return nucleus.SHA256(canonical), canonical, nil
}

// Parse reads an ask from JSON and refuses what the ask does not say in full:
// the canonical form of raw must be the canonical form of what was understood.
// A key in other case, a repeated key and an explicit empty value are errors.
func Parse(raw []byte) (ask nucleus.AskRequest, digest string, canonical []byte, err error) {
	fail := func(err error) (nucleus.AskRequest, string, []byte, error) {
		return nucleus.AskRequest{}, "", nil, err
	}
	if len(raw) > 2*MaxAsk {
		return fail(fmt.Errorf("ask has %d bytes, at most %d are allowed", len(raw), MaxAsk))
	}
	given, err := nucleus.CanonicalJSON(raw)
	if err != nil {
		return fail(err)
	}
	if err := nucleus.Strict(given, &ask); err != nil {
		return fail(err)
	}
	digest, canonical, err = Digest(ask)
	if err != nil {
		return fail(err)
	}
	if string(given) != string(canonical) {
		return fail(errors.New("ask is not in its canonical form"))
	}
	return ask, digest, canonical, nil
}

// Check says what is wrong with an ask in itself: a field that is missing or
// malformed, a digest that its action and salt do not give, a part of another
// operation. It knows no time and no key.
func Check(ask nucleus.AskRequest) error {
	for _, f := range []struct{ name, value string }{
		{"id", ask.ID}, {"pod", ask.Pod}, {"session", ask.Session}, {"boot", ask.Boot},
		{"requester", ask.Requester}, {"nonce", ask.Nonce},
	} {
		if err := CheckName(f.name, f.value); err != nil {
			return fmt.Errorf("ask %q: %w", ask.ID, err)
		}
	}
	for _, f := range []struct{ name, value string }{{"policy digest", ask.Policy}, {"digest", ask.Digest}} {
		if !validSHA256(f.value) {
			return fmt.Errorf("ask %q: %s %q is not a hex SHA-256", ask.ID, f.name, f.value)
		}
	}
	if len(ask.Salt) != len(nucleus.Salt{}) {
		return fmt.Errorf("ask %q: salt has %d bytes, want %d", ask.ID, len(ask.Salt), len(nucleus.Salt{}))
	}
	if ask.Created <= 0 || ask.Expires <= ask.Created || ask.Expires-ask.Created > MaxLife {
		return fmt.Errorf("ask %q: made at %d ms, expires at %d ms; want a life of at most %d ms", ask.ID, ask.Created, ask.Expires, int64(MaxLife))
	}
	if ask.Approvals < 1 || ask.Approvals > nucleus.MaxApprovals {
		return fmt.Errorf("ask %q: it needs %d approvals, want 1 to %d", ask.ID, ask.Approvals, nucleus.MaxApprovals)
	}
	if ask.Takes&^(nucleus.Private|nucleus.Untrusted|nucleus.WayOut) != 0 {
		return fmt.Errorf("ask %q: it takes exposure 0x%x, which is none", ask.ID, uint8(ask.Takes))
	}
	if err := checkParts(ask.Action); err != nil {
		return fmt.Errorf("ask %q: %w", ask.ID, err)
	}
	if err := checkPassage(ask); err != nil {
		return fmt.Errorf("ask %q: %w", ask.ID, err)
	}
	digest, err := ask.Action.Digest(nucleus.Salt(ask.Salt))
	if err != nil {
		return fmt.Errorf("ask %q: %w", ask.ID, err)
	}
	if digest != ask.Digest {
		return fmt.Errorf("ask %q: digest is %s, action and salt give %s", ask.ID, ask.Digest, digest)
	}
	return nil
}

// checkParts refuses an action whose parts are not the one that its operation
// has: what is shown for a push must not ride beside a command.
func checkParts(a nucleus.Action) error {
	if !a.Op.Valid() {
		return fmt.Errorf("unknown operation %q", a.Op)
	}
	if !validSHA256(a.Args) {
		return fmt.Errorf("arguments' digest %q is not a hex SHA-256", a.Args)
	}
	present := map[string]bool{
		"files": len(a.Files) > 0, "command": a.Command != nil, "fetch": a.Fetch != nil,
		"connect": a.Connect != nil, "push": a.Push != nil, "pr": a.PR != nil, "commit": a.Commit != nil, "job": a.Job != nil, "sub": a.Sub != nil,
	}
	want := map[nucleus.Op]string{
		nucleus.ReadFiles: "files", nucleus.WriteFiles: "files", nucleus.EditFiles: "files",
		nucleus.GlobSearch: "files", nucleus.GrepSearch: "files", nucleus.RunBash: "command",
		nucleus.WebFetch: "fetch", nucleus.NetConnect: "connect", nucleus.GitPush: "push",
		nucleus.CreatePR: "pr", nucleus.GitCommit: "commit", nucleus.ManagePods: "sub", nucleus.SpawnAgent: "sub",
	}[a.Op]
	if a.Op == nucleus.RunBash && a.Job != nil && a.Command == nil {
		want = "job"
	}
	for _, part := range []string{"files", "command", "fetch", "connect", "push", "pr", "commit", "job", "sub"} {
		switch {
		case part == want && !present[part]:
			return fmt.Errorf("%s without its %s", a.Op, part)
		case part != want && present[part]:
			return fmt.Errorf("%s with a %s that does not belong to it", a.Op, part)
		}
	}
	return nil
}

// checkPassage refuses an ask that would open another place than its action leads
// to, or open it without saying for how long.
func checkPassage(ask nucleus.AskRequest) error {
	host, port, placed := ask.Action.Place()
	p := ask.Passage
	switch {
	case !placed && p == nil:
		return nil
	case !placed:
		return fmt.Errorf("%s with a passage; it is granted for one use", ask.Action.Op)
	case p == nil:
		return fmt.Errorf("%s without its passage", ask.Action.Op)
	case p.Host != host || p.Port != port:
		return fmt.Errorf("the passage leads to %s port %d, %s to %s port %d", p.Host, p.Port, ask.Action.Op, host, port)
	case p.Millis <= 0 || p.Millis > MaxPassage:
		return fmt.Errorf("the passage stands for %d ms, want 1 to %d", p.Millis, MaxPassage)
	case p.Exposure&^(nucleus.Private|nucleus.Untrusted|nucleus.WayOut) != 0:
		return fmt.Errorf("the passage knows exposure 0x%x, which is none", uint8(p.Exposure))
	}
	return nil
}

// CheckName refuses a value that is not an id: 1 to 128 ASCII letters, digits and
// -._:@, and neither "." nor "..".
func CheckName(what, value string) error {
	if !validName(value) {
		return fmt.Errorf("%s %q is not 1 to %d letters, digits and -._:@", what, value, maxName)
	}
	return nil
}

func validName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._:@", r)) {
			return false
		}
	}
	return s != "." && s != ".."
}

func validSHA256(s string) bool {
	if len(s) != 64 {
		return false
	}
	for _, r := range s {
		if !(r >= '0' && r <= '9' || r >= 'a' && r <= 'f') {
			return false
		}
	}
	return true
}
