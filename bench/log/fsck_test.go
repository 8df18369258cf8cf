package main

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
