// Package keyfile keeps an Ed25519 key in a private file: one line, the seed in
// base64. A file that others can read is refused.
package keyfile

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"

	"cal/internal/durable"
)

// LoadOrMake reads the key at path and makes one where there is none.
func LoadOrMake(path string) (ed25519.PrivateKey, error) {
	key, err := Load(path)
	if errors.Is(err, os.ErrNotExist) {
		_, key, err := ed25519.GenerateKey(nil)
		if err != nil {
			return nil, err
		}
		line := base64.StdEncoding.EncodeToString(key.Seed()) + "\n"
		return key, durable.WriteFile(path, []byte(line), 0o600)
	}
	return key, err
}

// Load reads the key at path. Without a file the error is os.ErrNotExist.
func Load(path string) (ed25519.PrivateKey, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: others can read this key (chmod 600)", path, mode)
	}
	seed, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(raw)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("%s holds no Ed25519 seed", path)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}
