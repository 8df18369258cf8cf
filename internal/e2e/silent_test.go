package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/internal/testenv"
	"cal/nucleus"
)

const asksToWrite = `{"operations":{"write_files":"ask","read_files":"always"}}`

// killAuthority ends the authority and waits until it is gone.
func killAuthority(t *testing.T, e *testenv.Env) {
	t.Helper()
	pid := authorityPID(t, e)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for syscall.Kill(pid, 0) == nil && !isZombie(pid) {
		time.Sleep(time.Millisecond)
	}
}

func isZombie(pid int) bool {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	return err != nil || strings.Contains(string(raw), ") Z ")
}

// TestAuthorityThatLostItsDatabase damages the database of an authority that has asks of a running
// machine, and does what the program says mends it: without another node the machine of before asks
// again, and what is granted then is done.
func TestAuthorityThatLostItsDatabase(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	s := newGrantStory(t, e, asksToWrite)
	s.asks(s.write("before"))
	killAuthority(t, e)
	dir := filepath.Join(e.CAL, "authority")
	for _, name := range []string{"authority.db-wal", "authority.db-shm"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	e.Write(filepath.Join(dir, "authority.db"), strings.Repeat("not a database. ", 512))
	e.Cal("node", "start").Want(t, 0, "nobody can approve", "it is damaged; move it away")
	if err := s.write("away"); err == nil || err.Kind != nucleus.KindUnavailable || !strings.Contains(err.Message, "does not run") {
		t.Errorf("without an authority: %+v", err)
	}
	// What it says: mkdir damaged && mv authority.db* damaged/
	if err := os.Mkdir(filepath.Join(dir, "damaged"), 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "authority.db*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if err := os.Rename(f, filepath.Join(dir, "damaged", filepath.Base(f))); err != nil {
			t.Fatal(err)
		}
	}
	e.Cal("node", "start").Want(t, 0)
	s.grant(s.asks(s.write("after")), "", testenv.Passphrase, nil)
	if err := s.write("after"); err != nil {
		t.Errorf("granted by the authority that began anew: %+v", err)
	}
	e.Verify()
}

// TestAuthorityThatHangs stops the authority's process in the middle: what needs nobody's approval
// starts and works, soon, and says that nobody can approve; what needs one is refused with what is
// so; and all goes on when it does.
func TestAuthorityThatHangs(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	s := newGrantStory(t, e, asksToWrite)
	pid := authorityPID(t, e)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	took := func(what string, most time.Duration, f func()) {
		t.Helper()
		began := time.Now()
		f()
		d := time.Since(began)
		t.Logf("%s took %v", what, d)
		if d > most {
			t.Errorf("%s took %v, at most %v are wanted", what, d, most)
		}
	}
	took("a command that needs no approval", 12*time.Second, func() {
		e.Cal("run", "--", "echo", "works").Want(t, 0, "works", "nobody can approve anything in this machine")
	})
	took("cal approve list", 10*time.Second, func() {
		got := e.Cal("approve", "list").Want(t, 1, "has not answered for 5s")
		if strings.Contains(got.Stderr, "cal node start") {
			t.Errorf("a hint that mends nothing: %s", got.Stderr)
		}
	})
	took("an ask", 20*time.Second, func() {
		if err := s.write("a"); err == nil || err.Kind != nucleus.KindUnavailable || !strings.Contains(err.Message, "does not answer") {
			t.Errorf("asked of an authority that hangs: %+v", err)
		}
	})
	took("cal node restart", 30*time.Second, func() { e.Cal("node", "restart").Want(t, 0) })
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.grant(s.asks(s.write("a")), "", testenv.Passphrase, nil)
	if err := s.write("a"); err != nil {
		t.Errorf("after it went on: %+v", err)
	}
}
