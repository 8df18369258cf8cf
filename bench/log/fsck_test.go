package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"cal/audit"
	"cal/nucleus"
)

// tessera's fsck verifies what we wrote, unchanged, at every size it is published
// at: partial tiles, full ones, three levels, and beside a writer that goes on.
func TestFsck(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l, err := audit.Open(dir, audit.Options{Origin: origin, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	size := 0
	for _, grown := range []int{0, 1, 2, 255, 256, 257, 511, 513, 1000, 66000} {
		for size < grown {
			var last *audit.Pending
			for range min(500, grown-size) {
				p, err := l.Begin(entry(size))
				if err != nil {
					t.Fatal(err)
				}
				if size++; last == nil {
					last = p // it writes those that follow, too
				}
			}
			if _, err := last.Wait(); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Publish(); err != nil {
			t.Fatal(err)
		}
		// What is appended and not yet published is not theirs to see.
		if _, err := l.Append(nucleus.Entry{Kind: "log.x", Data: json.RawMessage(`"not yet published"`)}); err != nil {
			t.Fatal(err)
		}
		size++
		if err := check(t.Context(), dir, vkey(), 2); err != nil {
			t.Fatalf("%d entries: %v", grown, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := check(t.Context(), dir, vkey(), 1); err != nil {
		t.Fatalf("closed, %d entries: %v", size, err)
	}
	if r, err := audit.Verify(dir, audit.VerifyOptions{Key: vkey()}); err != nil || !r.OK() || r.Size != int64(size) {
		t.Fatalf("%d entries: %+v, %v", size, r, err)
	}
}

// The control: of every file that fsck reads, one byte changed is one log refused.
func TestFsckSeesTampering(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	if err := fill(dir, 700); err != nil {
		t.Fatal(err)
	}
	tried := 0
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "journal" || d.Name() == "lock" {
			return err
		}
		whole, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		at := len(whole) / 2
		if strings.HasSuffix(name, "checkpoint") {
			at = len(whole) - 10
		}
		whole[at] ^= 1
		if err := os.WriteFile(name, whole, 0o600); err != nil {
			return err
		}
		if check(t.Context(), dir, vkey(), 2) == nil {
			t.Errorf("%s: byte %d changed, and fsck found nothing", name, at)
		}
		if r, err := audit.Verify(dir, audit.VerifyOptions{Key: vkey()}); err == nil && r.OK() {
			t.Errorf("%s: byte %d changed, and Verify found nothing", name, at)
		}
		tried++
		whole[at] ^= 1
		return os.WriteFile(name, whole, 0o600)
	})
	if err != nil || tried < 8 {
		t.Fatalf("%d files: %v", tried, err)
	}
	if err := check(t.Context(), dir, vkey(), 2); err != nil {
		t.Fatalf("restored: %v", err)
	}
}

// The other way round: a log that tessera wrote is one for our Verify, and one byte
// changed is found.
func TestTesserasLog(t *testing.T) {
	secret, public, err := note.GenerateKey(rand.Reader, "tessera.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "log")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	driver, err := posix.New(ctx, posix.Config{Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	options := tessera.NewAppendOptions().WithCheckpointSigner(signer).WithBatching(256, time.Millisecond).WithCheckpointInterval(100 * time.Millisecond)
	appender, shutdown, _, err := tessera.NewAppender(ctx, driver, options)
	if err != nil {
		t.Fatal(err)
	}
	const n = 600
	for i := range n {
		e := entry(i)
		e.Seq = int64(i)
		raw, err := nucleus.Canonical(e)
		if err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 || i == n-1 { // in their order, and not one by one
			index, err := appender.Add(ctx, tessera.NewEntry(raw))()
			if err != nil || index.Index != uint64(i) {
				t.Fatalf("entry %d is %d: %v", i, index.Index, err)
			}
			continue
		}
		appender.Add(ctx, tessera.NewEntry(raw))
	}
	if err := shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	verify := func() *audit.Report {
		t.Helper()
		r, err := audit.Verify(dir, audit.VerifyOptions{Key: public})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := verify(); !r.OK() || r.Size != n {
		t.Fatalf("%d entries: %v", r.Size, r.Problems)
	}
	name := filepath.Join(dir, "tile/entries/001")
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	raw[60] ^= 1 // in the first entry
	if err := os.WriteFile(name, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := verify(); r.OK() || r.Problems[0].Kind != audit.Changed || r.Problems[0].File != "tile/entries/001" || r.Problems[0].Index != 256 {
		t.Errorf("one byte changed: %v", r.Problems)
	}
}
