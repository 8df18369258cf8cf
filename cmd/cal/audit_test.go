package main

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"cal/audit"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// auditHome makes a home whose log has one session with a refusal and hostile text, and
// the log of an authority beside it. It returns the directory that cal runs in.
func auditHome(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	home := filepath.Join(dir, "home")
	writeLog(t, filepath.Join(home, "log"), filepath.Join(home, "keys", "log.key"), nucleus.LogOrigin, sessionEntries(t, home)...)
	ask := nucleus.Entry{Kind: nucleus.KindApprovalAsk, Ask: "a-1", Digest: "d1", Session: "s-1", Op: nucleus.GitPush}
	grant := nucleus.Entry{Kind: nucleus.KindApprovalGrant, Ask: "a-1", Digest: "d1", Session: "s-1", Op: nucleus.GitPush, Grants: []string{"g-1"}}
	writeLog(t, filepath.Join(home, "authority", "log"), filepath.Join(home, "authority", "log.key"), nucleus.AuthorityLogOrigin, ask, grant)
	return dir
}

func writeLog(t *testing.T, dir, keyFile, origin string, entries ...nucleus.Entry) {
	t.Helper()
	for _, place := range []string{dir, filepath.Dir(keyFile)} {
		if err := os.MkdirAll(place, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	key, err := keyfile.LoadOrMake(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l, err := audit.Open(dir, audit.Options{Origin: origin, Key: key, Now: func() time.Time { now = now.Add(time.Second); return now }})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// sessionEntries are entries of session s-1 with one of s-2 among them; their salts go
// into home.
func sessionEntries(t *testing.T, home string) []nucleus.Entry {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(home, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	salts, err := audit.OpenSalts(filepath.Join(home, "keys", "salts"))
	if err != nil {
		t.Fatal(err)
	}
	call := func(permit string, a nucleus.Action) nucleus.Entry {
		salt := nucleus.NewSalt()
		digest, err := a.Digest(salt)
		shown, left := a.Shown()
		if err == nil {
			err = salts.Put(permit, salt, left...)
		}
		args, _ := json.Marshal(shown)
		if err != nil {
			t.Fatal(err)
		}
		return nucleus.Entry{Kind: nucleus.KindIntent, Pod: "p-1", Session: "s-1", Actor: "b-1", Op: a.Op, Digest: digest, Args: args, Verdict: nucleus.Allow, Rule: "operations." + string(a.Op), Permit: permit}
	}
	push := json.RawMessage(`{"op":"git_push","push":{"ref":"refs/heads/x","remote":"https://git.example.org/a"}}`)
	entries := []nucleus.Entry{
		{Kind: nucleus.KindPodCreate, Pod: "p-1", Session: "s-1", Actor: "operator"},
		call("r-1", nucleus.Action{Op: nucleus.ReadFiles, Args: nucleus.SHA256([]byte("arguments")), Files: []nucleus.File{{Path: "a\x1b[2J\u202egpj.exe", Before: nucleus.SHA256([]byte("content"))}}}),
		{Kind: nucleus.KindPodCreate, Pod: "p-2", Session: "s-2", Actor: "operator"},
		call("r-2", nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"curl", "--token", "hunter2hunter2"}}}),
		{Kind: nucleus.KindApprovalAsk, Pod: "p-1", Session: "s-1", Op: nucleus.GitPush, Verdict: nucleus.Ask, Rule: "trifecta", Ask: "a-1", Digest: "d1", Args: push},
		{Kind: nucleus.KindApprovalUse, Pod: "p-1", Session: "s-1", Op: nucleus.GitPush, Ask: "a-1", Grants: []string{"g-1"}},
		{Kind: nucleus.KindIntent, Pod: "p-1", Session: "s-1", Op: nucleus.NetConnect, Verdict: nucleus.Deny, Rule: "hosts", Status: nucleus.OutcomeRefused, Args: json.RawMessage(`{"connect":{"host":"evil.example","port":443},"op":"net_connect"}`)},
	}
	if err := salts.Close(); err != nil {
		t.Fatal(err)
	}
	return entries
}

// want runs cal and checks its exit code and what it says; it returns standard output.
func want(t *testing.T, dir string, code int, says string, given ...string) string {
	t.Helper()
	out, errs, got := cal(t, dir, "", given...)
	if got != code || !strings.Contains(out+errs, says) {
		t.Errorf("cal %s: exit code %d, want %d, and %q in\n%s%s", strings.Join(given, " "), got, code, says, out, errs)
	}
	return out
}

// A sub-pod's session begins after the one that a person began, which is the one meant.
func TestLastSessionIsAPersons(t *testing.T) {
	home := filepath.Join(t.TempDir(), "log")
	writeLog(t, home, filepath.Join(t.TempDir(), "log.key"), nucleus.LogOrigin,
		nucleus.Entry{Kind: nucleus.KindPodCreate, Pod: "p-1", Session: "s-1", Actor: "operator", Data: json.RawMessage(`{"sub":null}`)},
		nucleus.Entry{Kind: nucleus.KindPodCreate, Pod: "p-2", Session: "s-2", Actor: "operator", Data: json.RawMessage(`{"sub":null}`)},
		nucleus.Entry{Kind: nucleus.KindPodCreate, Pod: "p-3", Session: "s-3", Actor: "b-1", Data: json.RawMessage(`{"sub":{"parent":"p-2"}}`)})
	if got, err := findSession(home, "last"); got != "s-2" || err != nil {
		t.Errorf("got %q, %v, want s-2", got, err)
	}
}

func TestAuditLog(t *testing.T) {
	dir := auditHome(t)
	table := want(t, dir, 0, "SEQ  TIME", "audit", "log")
	if strings.Count(table, "\n") != 8 || strings.ContainsAny(table, "\x1b\u202e") || !strings.Contains(table, `a\u{1b}[2J\u{202e}gpj.exe`) {
		t.Errorf("got %q", table)
	}
	for _, c := range []struct {
		args  []string
		lines string // sequence numbers
	}{
		{nil, "0123456"},
		{[]string{"--pod", "p-1"}, "013456"},
		{[]string{"--session", "s-1", "--operation", "git_push"}, "45"},
		{[]string{"--session", "last"}, "2"},
		{[]string{"--decision", "deny"}, "6"},
		{[]string{"--kind", "approval.*"}, "45"},
		{[]string{"--host", "Evil.example"}, "6"},
		{[]string{"--host", "git.example.org"}, "4"},
		{[]string{"--actor", "operator"}, "02"},
		{[]string{"--since", "2026-01-02T03:04:10Z"}, "456"},
		{[]string{"--until", "2026-01-02 03:04:07"}, "0"},
		{[]string{"-n", "2", "--pod", "p-1"}, "56"},
		{[]string{"--log", filepath.Join(dir, "home", "authority", "log")}, "01"},
	} {
		out := want(t, dir, 0, "", append([]string{"audit", "log", "--json"}, c.args...)...)
		got := ""
		for line := range strings.Lines(out) {
			canonical, err := nucleus.CanonicalJSON([]byte(line))
			if err != nil || string(canonical)+"\n" != line {
				t.Errorf("%v: not a canonical entry: %q", c.args, line)
			}
			var e nucleus.Entry
			if err := json.Unmarshal(canonical, &e); err != nil {
				t.Error(err)
			}
			got += string(rune('0' + e.Seq))
		}
		if got != c.lines {
			t.Errorf("%v: got entries %s, want %s", c.args, got, c.lines)
		}
	}
	want(t, dir, 0, "none of 7 entries matches", "audit", "log", "--pod", "p-9")
	want(t, dir, 2, "unknown operation", "audit", "log", "--operation", "push")
	want(t, dir, 2, "unknown decision", "audit", "log", "--decision", "maybe")
	want(t, dir, 2, "neither a time", "audit", "log", "--since", "yesterday")
	want(t, dir, 1, "no such file", "audit", "log", "--log", "nowhere")
}

func TestAuditFollow(t *testing.T) {
	dir := auditHome(t)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "audit", "log", "--follow", "--json", "--kind", nucleus.KindPodStop)
	cmd.Env = append(os.Environ(), "CAL_TEST_PROGRAM=1", "CAL_HOME="+filepath.Join(dir, "home"))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	writeLog(t, filepath.Join(dir, "home", "log"), filepath.Join(dir, "home", "keys", "log.key"), nucleus.LogOrigin,
		nucleus.Entry{Kind: nucleus.KindPodResume, Pod: "p-1"}, nucleus.Entry{Kind: nucleus.KindPodStop, Pod: "p-1"})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.Contains(line, `"seq":8`) {
		t.Errorf("got %q, %v", line, err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("an interrupted --follow: %v", err)
	}
}

func TestAuditShow(t *testing.T) {
	dir := auditHome(t)
	text := want(t, dir, 0, "the digest is that of the salt and this action", "audit", "show", "1", "--reveal")
	if strings.ContainsAny(text, "\x1b\u202e") || !strings.Contains(text, `a\u001b[2J\u202egpj.exe`) {
		t.Errorf("got %q", text)
	}
	var shown struct {
		Entry  nucleus.Entry
		Reveal revealed
	}
	if err := json.Unmarshal([]byte(want(t, dir, 0, "", "audit", "show", "1", "--reveal", "--json")), &shown); err != nil || !shown.Reveal.Matches || shown.Reveal.Digest != shown.Entry.Digest {
		t.Errorf("got %+v, %v", shown, err)
	}
	for _, content := range []string{"arguments", "content"} { // left out of the entry, and put back
		digest := nucleus.SHA256([]byte(content))
		if strings.Contains(string(shown.Entry.Args), digest) || !strings.Contains(string(shown.Entry.Args), nucleus.Salted) || !strings.Contains(string(shown.Reveal.Action), digest) {
			t.Errorf("%s has the digest %s: shown as %s, revealed as %s", content, digest, shown.Entry.Args, shown.Reveal.Action)
		}
	}
	// A redacted argument is shown to be what it is by who knows it.
	want(t, dir, 1, "redacted or cut", "audit", "show", "3", "--reveal")
	whole := filepath.Join(dir, "whole.json")
	for argument, code := range map[string]int{"hunter2hunter2": 0, "hunter3hunter3": 1} {
		raw, err := nucleus.Canonical(nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"curl", "--token", argument}}})
		if err == nil {
			err = os.WriteFile(whole, raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		want(t, dir, code, "digest", "audit", "show", "3", "--reveal", "--args", whole)
	}
	want(t, dir, 1, "has no digest", "audit", "show", "0", "--reveal")
	want(t, dir, 2, "--args is for --reveal", "audit", "show", "1", "--args", whole)
	want(t, dir, 1, "no entry 99", "audit", "show", "99")
	want(t, dir, 2, "no entry number", "audit", "show", "1x")
}

func TestAuditVerify(t *testing.T) {
	dir := auditHome(t)
	want(t, dir, 0, "7 entries, all as they were written", "audit", "verify")
	want(t, dir, 0, "each grant that was used is in the authority's log", "audit", "verify")
	key := strings.TrimSpace(want(t, dir, 0, nucleus.LogOrigin, "audit", "key"))
	log := filepath.Join(dir, "home", "log")
	kept := filepath.Join(dir, "kept")
	signed, err := os.ReadFile(filepath.Join(log, "checkpoint"))
	if err == nil {
		err = os.WriteFile(kept, signed, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	tamper := func(change func(copied string)) string {
		copied := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(copied, os.DirFS(log)); err != nil {
			t.Fatal(err)
		}
		change(copied)
		return copied
	}
	bundle := filepath.Join("tile", "entries", "000.p", "7")
	edit := func(old, new string) func(string) {
		return func(copied string) {
			for _, name := range []string{bundle, "journal"} {
				file := filepath.Join(copied, name)
				raw, err := os.ReadFile(file)
				if err == nil {
					err = os.WriteFile(file, bytes.Replace(raw, []byte(old), []byte(new), 1), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	want(t, dir, 0, "all as they were written", "audit", "verify", tamper(func(string) {}), "--key", key)
	changed := tamper(edit(`"deny"`, `"deno"`))
	want(t, dir, 1, "changed, entry 6, tile/entries/000.p/7", "audit", "verify", changed, "--key", key)
	var reports []struct{ Problems []audit.Problem }
	if err := json.Unmarshal([]byte(want(t, dir, 1, "", "audit", "verify", changed, "--key", key, "--json")), &reports); err != nil || len(reports) != 1 ||
		len(reports[0].Problems) != 1 || reports[0].Problems[0].Kind != audit.Changed || reports[0].Problems[0].Index != 6 {
		t.Errorf("got %+v, %v", reports, err)
	}
	reports = nil
	if err := json.Unmarshal([]byte(want(t, dir, 0, "", "audit", "verify", "--json")), &reports); err != nil || len(reports) != 2 {
		t.Errorf("the node's log and the authority's: %+v, %v", reports, err)
	}
	// The holder of the key writes another log, and a shorter one.
	other := t.TempDir()
	writeLog(t, filepath.Join(other, "log"), filepath.Join(dir, "home", "keys", "log.key"), nucleus.LogOrigin, make7()...)
	want(t, dir, 0, "7 entries, all as they were written", "audit", "verify", filepath.Join(other, "log"), "--key", key)
	want(t, dir, 1, "fork", "audit", "verify", filepath.Join(other, "log"), "--key", key, "--checkpoint", kept)
	short := t.TempDir()
	writeLog(t, filepath.Join(short, "log"), filepath.Join(dir, "home", "keys", "log.key"), nucleus.LogOrigin, make7()[:3]...)
	want(t, dir, 1, "truncated", "audit", "verify", filepath.Join(short, "log"), "--key", key, "--checkpoint", kept)
	// In the place of the log it forgets what the authority was shown.
	if err := os.RemoveAll(log); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(other, "log"), log); err != nil {
		t.Fatal(err)
	}
	want(t, dir, 1, "missing: the authority was shown ask a-1", "audit", "verify")
}

func make7() []nucleus.Entry {
	list := make([]nucleus.Entry, 7)
	for i := range list {
		list[i] = nucleus.Entry{Kind: nucleus.KindPodResume, Pod: "p-1"}
	}
	return list
}

func TestAuditReceipt(t *testing.T) {
	dir := auditHome(t)
	key := strings.TrimSpace(want(t, dir, 0, "", "audit", "key"))
	file := filepath.Join(dir, "s.receipt")
	want(t, dir, 0, "", "audit", "prove", "--session", "s-1", "-o", file)
	elsewhere := t.TempDir() // a stranger has the file and the key
	want(t, elsewhere, 0, "from entry 0 to entry 6\n  1 entry of the log lies between them and is not shown", "audit", "verify-receipt", file, "--key", key)
	want(t, elsewhere, 0, "evil.example", "audit", "verify-receipt", file, "--key", key, "--entries")
	want(t, elsewhere, 1, "no log yet, and no --key", "audit", "verify-receipt", file)
	want(t, elsewhere, 1, "foreign", "audit", "verify-receipt", file, "--key", key, "--session", "s-2")
	want(t, elsewhere, 1, "no cosignature", "audit", "verify-receipt", file, "--key", key,
		"--witness", audit.WitnessKey("w", make(ed25519.PublicKey, ed25519.PublicKeySize)))
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)-20] ^= 1
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	var refused struct {
		OK   bool
		Kind audit.ProblemKind
	}
	if err := json.Unmarshal([]byte(want(t, elsewhere, 1, "changed", "audit", "verify-receipt", file, "--key", key, "--json")), &refused); err != nil || refused.OK || refused.Kind != audit.Changed {
		t.Errorf("got %+v, %v", refused, err)
	}
	proof := want(t, dir, 0, "c2sp.org/tlog-proof@v1", "audit", "prove", "3")
	out, errs, code := cal(t, elsewhere, proof, "audit", "verify-receipt", "-", "--key", key)
	if code != 0 || !strings.Contains(out, "1 of the 7 entries under the checkpoint") {
		t.Errorf("%d: %s%s", code, out, errs)
	}
	want(t, dir, 2, "--session", "audit", "prove")
	want(t, dir, 2, "--session", "audit", "prove", "1", "--session", "s-1")
	want(t, dir, 1, "no entry of session s-9", "audit", "prove", "--session", "s-9")
	want(t, dir, 1, "no entry 7", "audit", "prove", "7")
}

func TestAuditExport(t *testing.T) {
	dir := auditHome(t)
	out := strings.Split(strings.TrimSpace(want(t, dir, 0, "", "audit", "export", "--session", "s-1")), "\n")
	if len(out) != 7 {
		t.Fatalf("%d lines, want six entries and a checkpoint", len(out))
	}
	var end struct{ Checkpoint string }
	if err := json.Unmarshal([]byte(out[6]), &end); err != nil {
		t.Fatal(err)
	}
	key := want(t, dir, 0, "", "audit", "key")
	if cp, err := audit.ParseCheckpoint([]byte(end.Checkpoint), key); err != nil || cp.Size != 7 {
		t.Errorf("got %+v, %v", cp, err)
	}
}

func TestAuditTimeline(t *testing.T) {
	dir := auditHome(t)
	page := filepath.Join(dir, "page.html")
	want(t, dir, 0, "", "audit", "timeline", "--session", "s-1", "--html", page)
	made, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(made, []byte("evil.example:443")) || !bytes.Contains(made, []byte(`a\u{1b}[2J\u{202e}gpj.exe`)) || bytes.Contains(made, []byte("p-2")) {
		t.Errorf("the page is %s", made)
	}
	// From the receipt it is the same page, and from one that was changed there is none.
	key := strings.TrimSpace(want(t, dir, 0, "", "audit", "key"))
	file := filepath.Join(dir, "s.receipt")
	want(t, dir, 0, "", "audit", "prove", "--session", "s-1", "--text", "-o", file)
	if again := want(t, t.TempDir(), 0, "", "audit", "timeline", "--receipt", file, "--key", key, "--html", "-"); again != string(made) {
		t.Errorf("the page of the receipt differs: %d bytes, want %d", len(again), len(made))
	}
	raw, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, bytes.Replace(raw, []byte("evil.example"), []byte("good.example"), 1), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	want(t, dir, 1, "changed", "audit", "timeline", "--receipt", file, "--html", "-")
	want(t, dir, 2, "--html", "audit", "timeline", "--session", "s-1")
	want(t, dir, 2, "--html", "audit", "timeline", "--html", "x")
}

// An audit command ends on a signal wherever it is: here in a read that goes on.
func TestAuditEndsOnSignal(t *testing.T) {
	t.Parallel()
	dir := auditHome(t)
	name := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, given := range [][]string{
		{"verify", "--checkpoint", name}, {"verify-receipt", name}, {"verify-receipt", "-"}, {"timeline", "--html", "x.html", "--receipt", name},
		{"prove", "--session", "s-1", "-o", "x", "--checkpoint", name}, {"show", "1", "--reveal", "--args", name},
	} {
		for _, sig := range []os.Signal{os.Interrupt, syscall.SIGQUIT, syscall.SIGTERM} {
			fifo, err := os.OpenFile(name, os.O_RDWR, 0) // which is its writer
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), program, append([]string{"audit"}, given...)...)
			cmd.Env = append(os.Environ(), "CAL_TEST_PROGRAM=1", "CAL_HOME="+filepath.Join(dir, "home"))
			cmd.Dir, cmd.Stdin = dir, fifo
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() { defer close(ended); _ = cmd.Wait(); fifo.Close() }()
			// More than a pipe holds: when it is written, the program reads, and wants more.
			if _, err := fifo.Write(make([]byte, 256<<10)); err != nil {
				<-ended
				t.Fatalf("%v: it ended by itself: %v", given, cmd.ProcessState)
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			select {
			case <-ended:
				if code := cmd.ProcessState.ExitCode(); code != exitInterrupted {
					t.Errorf("%v, %v: %v, want exit code %d", given, sig, cmd.ProcessState, exitInterrupted)
				}
			case <-time.After(5 * time.Second): // a pipe is read for 10
				t.Errorf("%v: it does not hear %v", given, sig)
				_ = cmd.Process.Kill()
				<-ended
			}
		}
	}
}

// Files that are none are refused at once, and what they are called does not reach the
// terminal.
func TestAuditHostileFiles(t *testing.T) {
	t.Parallel()
	dir := auditHome(t)
	const evil = "\x1b]0;PWNED\a\x1b[2J\u202e\u009b31m"
	fifo, folder, escape := filepath.Join(dir, "fifo"), filepath.Join(dir, "folder"), filepath.Join(dir, evil)
	err := syscall.Mkfifo(fifo, 0o600)
	for _, name := range []string{folder, escape} {
		if err == nil {
			err = os.Mkdir(name, 0o700)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	inert := func(code int, says string, given ...string) {
		t.Helper()
		out, errs, got := cal(t, dir, "", given...)
		if got != code || !strings.Contains(out+errs, says) || strings.ContainsFunc(out+errs, func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
			t.Errorf("cal %q: exit code %d, want %d, and %q in\n%q", given, got, code, says, out+errs)
		}
	}
	for _, given := range [][]string{
		{"verify-receipt"}, {"timeline", "--html", "x.html", "--receipt"}, {"verify", "--checkpoint"}, {"prove", "--session", "s-1", "-o", "x", "--checkpoint"}, {"show", "1", "--reveal", "--args"},
	} {
		for name, says := range map[string]string{fifo: "", folder: "is no regular file", escape: `\u{1b}]0;PWNED\u{7}`, "/dev/zero": "is no regular file", "/dev/full": "is no regular file", filepath.Join(dir, "none"): "no such file"} {
			inert(1, says, append(append([]string{"audit"}, given...), name)...)
		}
	}
	large := filepath.Join(dir, "large")
	f, err := os.Create(large)
	if err == nil {
		err = errors.Join(f.Truncate(1<<40), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	inert(1, "bytes", "audit", "verify-receipt", large)
	inert(1, "not a checkpoint: 1048577 bytes", "audit", "verify", "--checkpoint", large)
	// A directory of a stranger's, and a receipt of that name.
	log := filepath.Join(dir, "home", "log")
	copied := filepath.Join(dir, "copy"+evil)
	if err := os.CopyFS(copied, os.DirFS(log)); err != nil {
		t.Fatal(err)
	}
	key := strings.TrimSpace(want(t, dir, 0, "", "audit", "key"))
	inert(0, "7 entries, all as they were written", "audit", "verify", copied, "--key", key)
	if err := os.WriteFile(filepath.Join(copied, "tile", "0", evil), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	inert(1, `extra, tile/0/\u{1b}]0;PWNED\u{7}\u{1b}[2J\u{202e}\u{9b}31m: it is neither`, "audit", "verify", copied, "--key", key)
	if err := os.RemoveAll(filepath.Join(copied, "journal")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(copied, "checkpoint"), filepath.Join(copied, "journal")); err != nil {
		t.Fatal(err)
	}
	inert(1, "damaged", "audit", "log", "--log", copied)
	receipt := filepath.Join(dir, "receipt"+evil)
	want(t, dir, 0, "", "audit", "prove", "--session", "s-1", "-o", receipt)
	inert(0, "as it was signed", "audit", "verify-receipt", receipt, "--key", key)
	raw, err := os.ReadFile(receipt)
	if err == nil {
		at := bytes.Index(raw, []byte("sha256 ")) + len("sha256 ")
		err = os.WriteFile(receipt, append(append(bytes.Clone(raw[:at]), evil...), raw[at+64:]...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	inert(1, "is no SHA-256", "audit", "verify-receipt", receipt, "--key", key)
}

// What nobody compared is said, in words and in JSON: a log that was cut back with its
// older checkpoint is a valid one.
func TestAuditVerifySaysWhatIsNotCompared(t *testing.T) {
	t.Parallel()
	dir := auditHome(t)
	home := filepath.Join(dir, "home")
	key := strings.TrimSpace(want(t, dir, 0, "", "audit", "key"))
	const authorityGone = "not compared: a checkpoint kept elsewhere: the authority, which keeps one, does not run"
	lacks := func(says []string, given ...string) {
		t.Helper()
		given = append([]string{"audit", "verify"}, given...)
		out := want(t, dir, 0, "all as they were written", given...)
		lines := []string{}
		for _, line := range strings.Split(out, "\n") {
			if text, ok := strings.CutPrefix(line, "not compared: "); ok {
				lines = append(lines, text)
			}
		}
		var reports []struct {
			NotCompared []string `json:"not_compared"`
		}
		if err := json.Unmarshal([]byte(want(t, dir, 0, `"not_compared":[`, append(given, "--json")...)), &reports); err != nil {
			t.Fatal(err)
		}
		listed := []string{}
		for _, r := range reports {
			listed = append(listed, r.NotCompared...)
		}
		if !slices.Equal(lines, listed) || len(lines) != len(says) {
			t.Errorf("%v: got %q and %q, want %q", given, lines, listed, says)
			return
		}
		for i := range says {
			if !strings.HasPrefix(lines[i], says[i]) {
				t.Errorf("%v: got %q, want %q", given, lines[i], says[i])
			}
		}
	}
	lacks([]string{"a checkpoint kept elsewhere: the authority, which keeps one, does not run", "a checkpoint kept elsewhere: nobody keeps one of the authority's log"})
	checkpoint := filepath.Join(home, "log", "checkpoint")
	lacks([]string{"a checkpoint kept elsewhere: nobody keeps one of the authority's log"}, "--checkpoint", checkpoint)
	lacks([]string{"a checkpoint kept elsewhere: none was given", "the authority's log: it is compared with this host's own"}, filepath.Join(home, "log"), "--key", key)
	lacks([]string{"the authority's log: it is compared with this host's own"}, filepath.Join(home, "log"), "--key", key, "--checkpoint", checkpoint)
	if err := os.RemoveAll(filepath.Join(home, "authority")); err != nil {
		t.Fatal(err)
	}
	lacks([]string{"the authority's log: there is none"}, "--checkpoint", checkpoint)
	if out := want(t, dir, 0, authorityGone, "audit", "verify"); strings.Contains(out, "continue the checkpoint") {
		t.Errorf("got %s", out)
	}
	// The control: a log cut back is found by the checkpoint, and by nothing else.
	kept := filepath.Join(dir, "kept")
	raw, err := os.ReadFile(checkpoint)
	if err == nil {
		err = errors.Join(os.WriteFile(kept, raw, 0o600), os.RemoveAll(filepath.Join(home, "log")))
	}
	if err != nil {
		t.Fatal(err)
	}
	writeLog(t, filepath.Join(home, "log"), filepath.Join(home, "keys", "log.key"), nucleus.LogOrigin, make7()[:2]...)
	lacks([]string{"a checkpoint kept elsewhere: the authority", "the authority's log: there is none"})
	want(t, dir, 1, "truncated", "audit", "verify", "--checkpoint", kept)
}

// newerLog is a log that a newer program wrote, whose holder means no good either: an
// operation, a decision and a kind that this one does not know, and a refusal whose text
// speaks to the terminal.
func newerLog(t *testing.T, dir, keyFile string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(keyFile), 0o700); err != nil {
		t.Fatal(err)
	}
	key, err := keyfile.LoadOrMake(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	const evil = `\u001b]0;PWNED\u0007`
	raw := []string{
		`{"args":{"creases":1,"op":"fold_paper"},"decision":"perhaps","kind":"request.intent","op":"fold_paper` + evil + `","permit":"r-1","pod":"p-1","seq":0,"session":"s-1","status":"pondered","time":"2040-01-02T03:04:05Z"}`,
		`{"kind":"request.consider","pod":"p-1","seq":1,"session":"s-1","time":"` + evil + `"}`,
		`{"args":{"connect":{"host":"h` + evil + `","port":443},"op":"net_connect"},"decision":"perhaps` + evil + `","kind":"request.intent","op":"net_connect","pod":"p-1","seq":2,"session":"s-1","time":"2040-01-02T03:04:05Z"}`,
	}
	var bundle, hashes []byte
	var leaves []tlog.Hash
	for i, text := range raw {
		canonical, err := nucleus.CanonicalJSON([]byte(text))
		if err != nil {
			t.Fatal(i, err)
		}
		h := tlog.RecordHash(canonical)
		leaves, hashes = append(leaves, h), append(hashes, h[:]...)
		bundle = append(binary.BigEndian.AppendUint16(bundle, uint16(len(canonical))), canonical...)
	}
	text := fmt.Sprintf("%s\n3\n%s\n", nucleus.LogOrigin, tlog.NodeHash(tlog.NodeHash(leaves[0], leaves[1]), leaves[2]))
	vkey := audit.VerifierKey(nucleus.LogOrigin, key.Public().(ed25519.PublicKey))
	id, err := strconv.ParseUint(strings.Split(vkey, "+")[1], 16, 32)
	if err != nil {
		t.Fatal(err)
	}
	signature := append(binary.BigEndian.AppendUint32(nil, uint32(id)), ed25519.Sign(key, []byte(text))...)
	for name, content := range map[string]string{
		"checkpoint": fmt.Sprintf("%s\n\u2014 %s %s\n", text, nucleus.LogOrigin, base64.StdEncoding.EncodeToString(signature)), "tile/0/000.p/3": string(hashes), "tile/entries/000.p/3": string(bundle),
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAuditOfANewerLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	newerLog(t, filepath.Join(dir, "home", "log"), filepath.Join(dir, "home", "keys", "log.key"))
	receipt := filepath.Join(dir, "s.receipt")
	for _, c := range []struct{ given, says string }{
		{"audit verify", "3 entries, all as they were written"},
		{"audit log", `request.intent    fold_paper\u{1b}]0;PWNED\u{7}  perhaps`},
		{"audit log --kind request.consider", "request.consider"},
		{"audit show 0", `operation  fold_paper\u{1b}]0;PWNED\u{7}`},
		{"audit prove --session s-1 -o " + receipt, ""},
		{"audit verify-receipt --entries " + receipt, "the intent in entry 0 has no outcome"},
		{"audit timeline --session s-1 --html x.html", "time"}, // of which one is none
		{"policy simulate --policy read-only", "1 request cannot be judged"},
		{"policy simulate --policy read-only", `perhaps\u{1b}]0;PWNED\u{7}`},
	} {
		out, errs, code := cal(t, dir, "", strings.Fields(c.given)...)
		if want := map[bool]int{true: 1}[strings.Contains(c.given, "timeline")]; code != want || !strings.Contains(out+errs, c.says) ||
			strings.ContainsFunc(out+errs, func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
			t.Errorf("cal %s: exit code %d, want %d, and %q in\n%q", c.given, code, want, c.says, out+errs)
		}
	}
}
