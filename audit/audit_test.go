package audit

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cal/nucleus"
)

// TestMain keeps the tests' logs in memory where the host can: they try what is
// written when, not the disk. Benchmarks need the disk.
func TestMain(m *testing.M) {
	flag.Parse()
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() && flag.Lookup("test.bench").Value.String() == "" {
		os.Setenv("TMPDIR", "/dev/shm")
	}
	os.Exit(m.Run())
}

const testOrigin = "cal.test/log"

var testKey = func() ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("a key for tests"))
	return ed25519.NewKeyFromSeed(seed[:])
}()

var testVerifier = VerifierKey(testOrigin, testKey.Public().(ed25519.PublicKey))

func testOptions() Options {
	return Options{Origin: testOrigin, Key: testKey, Now: func() time.Time { return time.Unix(1700000000, 5) }}
}

func mustOpen(t testing.TB, dir string, o Options) *Log {
	t.Helper()
	l, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func entryNumber(i int) nucleus.Entry {
	return nucleus.Entry{
		Kind: nucleus.KindIntent, Pod: "p-1", Session: "s-1", Actor: "k-1", Op: nucleus.ReadFiles,
		Permit: fmt.Sprintf("permit-%d", i/2), Args: json.RawMessage(fmt.Sprintf(`{"path":"file-%d"}`, i)),
		Verdict: nucleus.Allow, Rule: "operations.read_files",
	}
}

// fill appends entries first..first+n-1: intent and outcome in turn.
func appendEntries(t testing.TB, l *Log, first, n int) {
	t.Helper()
	for i := first; i < first+n; i++ {
		e := entryNumber(i)
		if i%2 == 1 {
			e.Kind, e.Status = nucleus.KindOutcome, nucleus.OutcomeDone
		}
		got, err := l.Append(e)
		if err != nil {
			t.Fatal(err)
		}
		if got.Seq != int64(i) {
			t.Fatalf("entry %d got number %d", i, got.Seq)
		}
	}
}

// makeLog makes a log of n entries and closes it.
func makeLog(t testing.TB, n int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendEntries(t, l, 0, n)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// makeCrashed makes a log whose last entries are in the journal alone.
func makeCrashed(t testing.TB, published, journaled int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendEntries(t, l, 0, published)
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
	appendEntries(t, l, published, journaled)
	crashed := filepath.Join(t.TempDir(), "crashed")
	copyDir(t, dir, crashed)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return crashed
}

func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func mustVerify(t testing.TB, dir string, kept []byte) *Report {
	t.Helper()
	r, err := Verify(dir, VerifyOptions{Key: testVerifier, Checkpoint: kept})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantOK is the positive control of every test of tampering.
func wantOK(t testing.TB, dir string, kept []byte, size int64) *Report {
	t.Helper()
	r := mustVerify(t, dir, kept)
	if !r.OK() || r.Size != size {
		t.Fatalf("%d entries, want %d; problems: %v", r.Size, size, r.Problems)
	}
	return r
}

func readAll(t testing.TB, dir string, from int64) []nucleus.Entry {
	t.Helper()
	var all []nucleus.Entry
	for e, err := range Read(dir, from) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// contents reads every file of a directory.
func contents(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		all[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func newKey(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(append(make([]byte, 31), n))
}
