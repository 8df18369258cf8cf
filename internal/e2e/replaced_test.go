package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/internal/testenv"
	"cal/nucleus"
)

// TestReplacedAuthorityIsTold puts another authority, made by a program of the same user with the same
// name and phrase, in place of the person's: the next launch says that the key is another one, and
// so do the status and the log, until the person says that it was they.
func TestReplacedAuthorityIsTold(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	e.Cal("node", "start").Want(t, 0)
	const says = "has another key than before"
	if r := e.Cal("run", "--", "true").Want(t, 0); strings.Contains(r.Stderr, "approver ") {
		t.Fatalf("the first is told: %v", r)
	}
	e.Cal("approve", "trust").Want(t, 0, "every approver is confirmed")

	pid := authorityPID(t, e)
	authority, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := authority.Kill(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 5*time.Second, "the end of the authority", func() bool {
		for _, p := range e.Processes() {
			if p.PID == pid {
				return false
			}
		}
		return true
	})
	dir := filepath.Join(e.CAL, "authority")
	if err := os.Rename(dir, dir+".person"); err != nil {
		t.Fatal(err)
	}
	makes := e.Terminal(e.Command("nucleus-authority", "init", "--dir", dir))
	for _, talk := range [][2]string{{"passphrase: ", "attacker attacker"}, {"passphrase again: ", "attacker attacker"}, {"your phrase: ", "the person's own phrase"}} {
		makes.Until(talk[0])
		makes.Type(talk[1] + "\n")
	}
	if code := makes.Wait(); code != 0 {
		t.Fatalf("init: %d\n%s", code, makes.Screen)
	}
	e.Cal("node", "restart").Want(t, 0)
	e.Cal("run", "--", "true").Want(t, 0, says, "cal approve trust confirms")
	s := newGrantStory(t, e, `{"operations":{"write_files":"ask","read_files":"always"}}`)
	e.Cal("status").Want(t, 0, says)
	told := func() int {
		return len(e.Entries(func(n nucleus.Entry) bool { return n.Kind == nucleus.KindKeyApprovers }))
	}
	if n := told(); n != 2 {
		t.Errorf("%d entries of keys that can approve, want 2: one of the person's, one of the other", n)
	}
	e.Cal("audit", "log", "--json", "--kind", nucleus.KindKeyApprovers).Want(t, 0, says)

	e.Cal("approve", "trust").Want(t, 1, "nothing is confirmed")
	e.Cal("status").Want(t, 0, says)
	sure := e.Terminal(e.Command("cal", "approve", "trust"))
	sure.Until("Enter confirms these keys")
	sure.Type("\n")
	if code := sure.Wait(); code != 0 {
		t.Fatalf("trust: %d\n%s", code, sure.Screen)
	}
	if r := e.Cal("status").Want(t, 0, s.pod); strings.Contains(r.Stdout, says) {
		t.Errorf("confirmed, and told: %v", r)
	}
	e.Cal("node", "restart").Want(t, 0)
	if r := e.Cal("run", "--", "true").Want(t, 0); strings.Contains(r.Stderr, says) {
		t.Errorf("confirmed, and told: %v", r)
	}
	e.Cal("audit", "verify").Want(t, 0)
}
