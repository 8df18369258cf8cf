package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"cal/internal/testenv"
	"cal/nucleus"
)

// What a stranger is handed of a session is a file and two keys: he sees that each entry
// stands in the log, that the authority has seen this log, and that the machine signed
// what came of its command.
func TestReceiptForAStranger(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	e.Cal("run", "--", "sh", "-c", "echo one; exit 3").Want(t, 3, "one")
	session := e.Entries(func(n nucleus.Entry) bool { return n.Kind == nucleus.KindPodCreate })[0].Session
	logKey := strings.TrimSpace(e.Cal("audit", "key").Want(t, 0).Stdout)
	witness := strings.TrimSpace(e.Cal("audit", "key", "--witness").Want(t, 0).Stdout)
	file := filepath.Join(e.Dir, "session.receipt")
	verify := []string{"audit", "verify-receipt", file, "--key", logKey, "--witness", witness, "--session", session}
	testenv.Eventually(t, 20*time.Second, "the authority cosigns the session", func() bool {
		e.Cal("audit", "prove", "--session", session, "-o", file).Want(t, 0)
		return e.Cal(verify...).Code == 0
	})
	e.Cal(verify...).Want(t, 0, "each in the log at its place", "none is left out; the last one ends it", "1 outcomes have the machine's signature, 0 are", "cosigned by cal/authority")
	var says struct {
		OK       bool              `json:"ok"`
		Signed   int               `json:"outcomes_signed"`
		Entries  []json.RawMessage `json:"entries"`
		Unproved int               `json:"outcomes_unchecked"`
	}
	if err := json.Unmarshal([]byte(e.Cal(append(verify, "--json")...).Want(t, 0).Stdout), &says); err != nil || !says.OK || says.Signed != 1 || says.Unproved != 0 || len(says.Entries) < 4 {
		t.Errorf("got %+v, %v", says, err)
	}
	page := filepath.Join(e.Dir, "session.html")
	e.Cal("audit", "timeline", "--receipt", file, "--key", logKey, "--html", page).Want(t, 0)
	if made, err := os.ReadFile(page); err != nil || !strings.Contains(string(made), "exit code 3") {
		t.Errorf("the page: %d bytes, %v", len(made), err)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	e.Cal(verify...).Want(t, 1, "proves nothing: changed")
}

// A secret in a prompt or in a command that does not exist is nowhere in the log, and neither is
// what would confirm a guess; the host can still show that an entry is of its action.
func TestSecretsStayOutOfTheLog(t *testing.T) {
	e := testenv.New(t)
	const token, word = "ghp_0123456789abcdefghijABCDEFGHIJ012345", "hunter2correct"
	e.Cal("run", "--", "sh", "-c", "echo one > file; cat file", "log in with "+token+" and PASSWORD="+word).Want(t, 0, "one")
	e.Cal("run", "--", token, "--password", word) // no such program
	e.Cal("run", "--", "echo", "two").Want(t, 0, "two")
	redacted, revealed := 0, 0
	for _, n := range e.Entries(func(nucleus.Entry) bool { return true }) {
		raw, err := json.Marshal(n)
		if err != nil {
			t.Fatal(err)
		}
		if n.Outcome != nil {
			raw = append(raw, n.Outcome.Payload...)
		}
		if n.Digest != "" && n.Kind == nucleus.KindIntent && !strings.Contains(string(n.Args), `"args_sha256":"[salted]"`) {
			t.Errorf("a digest without a salt: %s", n.Args)
		}
		for _, secret := range []string{token, word} {
			if strings.Contains(string(raw), secret) {
				t.Errorf("%s is shown: %s", secret, raw)
			}
		}
		hides := strings.Contains(string(n.Args), "[redacted]")
		if hides || strings.Contains(string(n.Data), "[redacted]") {
			redacted++
		}
		if n.Digest != "" && n.Kind == nucleus.KindIntent && !hides {
			e.Cal("audit", "show", strconv.FormatInt(n.Seq, 10), "--reveal").Want(t, 0, "the digest is that of the salt and this action")
			revealed++
		}
	}
	if redacted < 2 || revealed == 0 {
		t.Errorf("the control: %d entries have something redacted, %d could be revealed", redacted, revealed)
	}
}
