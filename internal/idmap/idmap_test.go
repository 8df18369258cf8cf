package idmap

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestLargest(t *testing.T) {
	for text, want := range map[string]span{
		"":                                      {},
		"ada:100000:65536\n":                    {100000, 65536},
		"ada:100000:65536":                      {100000, 65536},
		"bob:1:2\nada:100000:10\n7:200000:20\n": {200000, 20},
		"adam:100000:65536\n":                   {},
		"ada:0:65536\n":                         {}, // the system's own ids
		"ada:999:1\n":                           {},
		"ada:4294967295:1\n":                    {}, // no id
		"ada:4294900000:4294967295\n":           {},
		"ada:-5:10\nada:x:10\nada:100000\n":     {},
		"ada:100000:65536:more\n":               {},
	} {
		file := filepath.Join(t.TempDir(), "subuid")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := largest(file, "ada", "7"); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
}

// TestFindSaysWhatIsMissing: a half given map is none.
func TestFindSaysWhatIsMissing(t *testing.T) {
	etc := t.TempDir()
	line := strconv.Itoa(os.Getuid()) + ":100000:65536\n"
	if err := os.WriteFile(filepath.Join(etc, "subuid"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := find(etc)
	var missing *Missing
	if !errors.As(err, &missing) || !strings.Contains(missing.Mend, "usermod --add-subuids 165536-231071 --add-subgids 165536-231071") {
		t.Errorf("users without groups: %v", err)
	}
	if err := os.WriteFile(filepath.Join(etc, "subgid"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", etc)
	if _, err = find(etc); !errors.As(err, &missing) || !strings.Contains(missing.Cause, "newuidmap") {
		t.Errorf("without the programs: %v", err)
	}
}

func TestInner(t *testing.T) {
	m := Map{UID: 1000, GID: 1, Count: 10}
	for uid, want := range map[uint32]bool{0: false, 999: false, 1000: true, 1009: true, 1010: false, 1<<32 - 1: false} {
		if inner, ok := m.Inner(uid); ok != want || ok && inner != uid-999 {
			t.Errorf("%d: %d, %t", uid, inner, ok)
		}
	}
	if _, ok := (Map{}).Inner(0); ok {
		t.Error("no map holds an id")
	}
}

// TestNotOurs: a range that nobody gave starts nothing.
func TestNotOurs(t *testing.T) {
	made := filepath.Join(t.TempDir(), "made")
	if _, err := (Map{UID: 5000, GID: 5000, Count: 10}).Run(t.Context(), "touch", made); err == nil || !strings.Contains(err.Error(), "newuidmap") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(made); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it ran: %v", err)
	}
}
