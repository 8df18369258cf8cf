package workspace

import (
	"crypto/ed25519"
	"path/filepath"
	"strings"
	"testing"

	"cal/audit"
)

func TestConfig(t *testing.T) {
	h := Home{t.TempDir()}
	key := audit.WitnessKey("w.test", make(ed25519.PublicKey, ed25519.PublicKeySize))
	for name, c := range map[string]struct{ text, want string }{
		"empty":          {"", ""},
		"a comment":      {"# nothing yet\n", ""},
		"a witness":      {"log:\n  witnesses:\n  - {url: \"https://w.test/x\", key: \"" + key + "\"}\n", ""},
		"unknown key":    {"log:\n  witness: []\n", "line 2: field witness not found"},
		"another key":    {"logs: {}\n", "line 1: field logs not found"},
		"a wrong type":   {"log:\n  witnesses: 3\n", "line 2"},
		"no URL":         {"log:\n  witnesses:\n  - {key: \"" + key + "\"}\n", `witnesses[0].url is ""`},
		"a file":         {"log:\n  witnesses:\n  - {url: \"file:///x\", key: \"" + key + "\"}\n", "want an http or https URL"},
		"no witness key": {"log:\n  witnesses:\n  - {url: \"https://w.test\", key: \"x\"}\n", "witnesses[0].key: witness key"},
		"a notifier":     {"approvals: {notify: [notify-me, \"two words\"], desktop: false}\n", ""},
		"no notifier":    {"approvals: {notify: []}\n", "approvals.notify is []"},
		"a shell line":   {"approvals: {notify: \"notify-me --now\"}\n", "line 1"},
		"a user":         {"approvals: {require: other-user, user: root-of-nowhere}\n", "unknown user root-of-nowhere"},
		"root":           {"approvals: {require: other-user, user: root}\n", "no uid of another user"},
		"a uid":          {"approvals: {require: other-user, uid: 990}\n", ""},
		"uid alone":      {"approvals: {uid: 990}\n", "uid and user go with"},
		"uid, passkey":   {"approvals: {require: passkey, uid: 990}\n", "uid and user go with"},
		"uid and user":   {"approvals: {require: other-user, uid: 990, user: root}\n", "leave one out"},
		"what is none":   {"approvals: {require: somebody}\n", "somebody"},
		"a relative one": {"approvals: {notify: [bin/notify-me]}\n", "want a program, by its name on PATH or its absolute path"},
	} {
		write(t, filepath.Join(h.Dir, "config.yaml"), c.text)
		got, err := h.Config()
		if c.want == "" && (err != nil || name == "a witness" && (len(got.Log.Witnesses) != 1 || got.Log.Witnesses[0].Key != key)) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if name == "a uid" && got.Approvals.Require != "other-user:990" {
			t.Errorf("%s: %+v", name, got.Approvals)
		}
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "config.yaml")) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := (Home{t.TempDir()}).Config(); err != nil {
		t.Error("without a file: ", err)
	}
}
