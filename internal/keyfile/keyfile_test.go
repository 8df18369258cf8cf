package keyfile

import (
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMakeAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.key")
	if _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	made, err := LoadOrMake(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	for name, load := range map[string]func() (interface{ Seed() []byte }, error){
		"Load":       func() (interface{ Seed() []byte }, error) { k, err := Load(path); return k, err },
		"LoadOrMake": func() (interface{ Seed() []byte }, error) { k, err := LoadOrMake(path); return k, err },
	} {
		if again, err := load(); err != nil || string(again.Seed()) != string(made.Seed()) {
			t.Errorf("%s: %v, not the key that was made", name, err)
		}
	}
	other, err := LoadOrMake(filepath.Join(t.TempDir(), "b.key"))
	if err != nil || other.Equal(made) {
		t.Errorf("two keys are the same, or %v", err)
	}
}

// TestRefuses: a key that others can read, or that is none, is not used and not replaced.
func TestRefuses(t *testing.T) {
	seed := base64.StdEncoding.EncodeToString(make([]byte, 32))
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		says    string
	}{
		"good":              {seed + "\n", 0o600, ""},
		"readable by group": {seed, 0o640, "0640"},
		"readable by all":   {seed, 0o604, "0604"},
		"writable by group": {seed, 0o620, "0620"},
		"empty":             {"", 0o600, "holds no Ed25519 seed"},
		"short":             {seed[:40], 0o600, "holds no Ed25519 seed"},
		"long":              {base64.StdEncoding.EncodeToString(make([]byte, 33)), 0o600, "holds no Ed25519 seed"},
		"two lines":         {seed + "\n" + seed + "\n", 0o600, "holds no Ed25519 seed"},
		"no base64":         {strings.Repeat("!", 44), 0o600, "holds no Ed25519 seed"},
	} {
		path := filepath.Join(t.TempDir(), "k")
		if err := errors.Join(os.WriteFile(path, []byte(c.content), 0o600), os.Chmod(path, c.mode)); err != nil {
			t.Fatal(err)
		}
		for _, load := range []func() error{
			func() error { _, err := Load(path); return err },
			func() error { _, err := LoadOrMake(path); return err },
		} {
			err := load()
			switch {
			case c.says == "" && err != nil:
				t.Errorf("%s: %v", name, err)
			case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
				t.Errorf("%s: %v, want %q", name, err, c.says)
			case err != nil && strings.Contains(err.Error(), seed):
				t.Errorf("%s: the error shows the key: %v", name, err)
			}
		}
		if raw, _ := os.ReadFile(path); string(raw) != c.content {
			t.Errorf("%s: the file was replaced by %q", name, raw)
		}
	}
}
