package audit

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/nucleus"
)

// Whoever can write the directory puts something else in the place of each file: nobody
// waits for it, follows it out of the directory, takes in what does not fit, or panics.
// Verify and Open say no; reading gives an error or true entries.
func TestHostileDirectory(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "outside")
	write(t, secret, "a secret of the reader's\n")
	in := map[string]func(path string) error{
		"a FIFO":               func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"a link to itself":     func(p string) error { return os.Symlink(filepath.Base(p), p) },
		"a link out of it":     func(p string) error { return os.Symlink(secret, p) },
		"a link to a device":   func(p string) error { return os.Symlink("/dev/zero", p) },
		"a directory":          func(p string) error { return os.Mkdir(p, 0o700) },
		"an endless file":      func(p string) error { return sparse(p, 1<<40) },
		"zeros":                func(p string) error { return os.WriteFile(p, make([]byte, 1<<20), 0o600) },
		"0xff":                 func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte{0xff}, 1<<16), 0o600) },
		"nothing":              func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"line breaks":          func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("\n"), 1<<16), 0o600) },
		"signatures":           func(p string) error { return os.WriteFile(p, manySignatures(), 0o600) },
		"a journal of lengths": func(p string) error { return os.WriteFile(p, lengths(), 0o600) },
	}
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendEntries(t, l, 0, 300)
	mustKeep(t, l)
	appendEntries(t, l, 300, 5)
	copied := filepath.Join(t.TempDir(), "copy")
	copyDir(t, dir, copied)
	l.Close()
	kept := l.Checkpoint()
	for file := range contents(t, copied) {
		if file == lockName {
			continue
		}
		for name, make := range in {
			what := file + " is " + name
			at := filepath.Join(t.TempDir(), "at")
			copyDir(t, copied, at)
			path := filepath.Join(at, file)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			within(t, what, func() {
				r, err := verify(at, VerifyOptions{Key: testVerifier, Checkpoint: kept, Witnesses: []string{testWitnessKey}}, 0)
				if err == nil && r.OK() {
					t.Errorf("%s: not detected", what)
				}
				n := 0
				for e, err := range Read(at, 0) {
					if err != nil {
						break
					}
					if n++; e.Seq != int64(n-1) || e.Pod != "p-1" {
						t.Errorf("%s: entry %d is read as %+v", what, n-1, e)
						break
					}
				}
				// What a writer needs, and no more, it looks at: full tiles it never reads.
				if l, err := Open(at, testOptions()); err == nil {
					if strings.HasPrefix(file, "tile/") {
						l.Close()
						return
					}
					t.Errorf("%s: it opened", what)
					l.Close()
				}
			})
		}
	}
	if raw, err := os.ReadFile(secret); err != nil || string(raw) != "a secret of the reader's\n" {
		t.Errorf("what lies outside: %q, %v", raw, err)
	}
	wantOK(t, copied, kept, 305)
}

// within fails where something takes long, or takes much memory.
func within(t *testing.T, what string, do func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: somebody waits", what)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<30 {
		t.Errorf("%s: %d MB were taken", what, grown>>20)
	}
}

func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func manySignatures() []byte {
	text := []byte(testOrigin + "\n3\n" + EmptyRoot.String() + "\n\n")
	for i := range 5000 {
		text = fmt.Appendf(text, "— w%d AAAAAAAAAAAAAAAA\n", i)
	}
	return text
}

// lengths is a journal whose first frame says that it has 4 GB.
func lengths() []byte {
	f := frame([]byte("{}"))
	binary.BigEndian.PutUint32(f, 1<<32-1)
	return append([]byte(journalMagic), f...)
}

// Files that nobody knows, beside the log's own: no reader is led astray.
func TestForeignFilesBeside(t *testing.T) {
	dir := makeLog(t, 5)
	for name, content := range map[string]string{"README": "x", "checkpoint.old": "x", "tile.txt": "x", ".tmp-1": "x", "sub/tile/0/000": "x"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), content)
	}
	wantOK(t, dir, nil, 5)
	l := mustOpen(t, dir, testOptions())
	if _, err := l.Append(nucleus.Entry{Kind: "log.x"}); err != nil {
		t.Error(err)
	}
	l.Close()
	wantOK(t, dir, nil, 6)
}

func FuzzOpenCheckpoint(f *testing.F) {
	s, err := newSigner(testOrigin, testKey)
	if err != nil {
		f.Fatal(err)
	}
	signed, err := s.checkpoint(&tree{})
	if err != nil {
		f.Fatal(err)
	}
	line, err := Cosign(signed, "w.test", testWitness, time.Unix(1700000000, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Add(append(bytes.Clone(signed), line...))
	f.Add(manySignatures())
	f.Fuzz(func(t *testing.T, raw []byte) {
		cp, err := openCheckpoint(raw, s)
		if err == nil && (cp.Size != 0 || cp.Root != EmptyRoot) {
			t.Errorf("signed by nobody: %q", raw) // the key has signed the empty tree alone
		}
		if said, err := cosigned(raw, testWitnessKey); err == nil && said.Unix != 1700000000 {
			t.Errorf("cosigned by nobody: %q", raw)
		}
	})
}
