package audit

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"cal/internal/durable"
	"cal/nucleus"
)

// Salts is the private file that holds, by request, the salt of the digests in
// the log. It lies beside the log's directory, not in it, so that the directory
// can be handed to a stranger. One line is one salt: ID, a space, 64 hex digits; and, each
// after a space, the digests of contents that the entry leaves out (nucleus.Action.Shown).
//
// Put writes at once but does not sync: a killed process loses nothing, a power
// cut may lose the salts since the last Sync. The log stays provable without
// them; only the requests behind those digests can no longer be shown to fit,
// and FindSalt then says so.
type Salts struct {
	mu   sync.Mutex
	file *os.File
	size int64 // of whole lines
	torn bool  // something may lie behind them
}

// OpenSalts opens the file, or makes it, readable by its owner only.
func OpenSalts(name string) (*Salts, error) {
	if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		if err := durable.WriteFile(name, nil, 0o600); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	s := &Salts{file: f}
	if s.size, err = checkSalts(f); err != nil {
		return nil, errors.Join(fmt.Errorf("salts %s: %w", name, err), f.Close())
	}
	return s, nil
}

// checkSalts refuses a file that others can read, ends a line that a crash cut, so that it
// spoils no other, and returns the file's size.
func checkSalts(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return 0, fmt.Errorf("mode is %s, want a regular file of mode 0600", info.Mode())
	}
	size := info.Size()
	if size == 0 {
		return 0, nil
	}
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, size-1); err != nil {
		return 0, err
	}
	if last[0] != '\n' {
		n, err := f.Write([]byte("\n"))
		return size + int64(n), err
	}
	return size, nil
}

// Put keeps the salt of a request, and the digests that its entry leaves out. The id has no
// white space; a digest is 64 hex digits.
func (s *Salts) Put(id string, salt nucleus.Salt, left ...string) error {
	if id == "" || strings.ContainsAny(id, " \t\r\n") {
		return fmt.Errorf("salt of request %q: an id has no white space and is not empty", id)
	}
	for _, digest := range left {
		if !isDigest(digest) {
			return fmt.Errorf("salt of request %q: %.80q is no hex SHA-256", id, digest)
		}
	}
	line := []byte(strings.Join(append([]string{id, hex.EncodeToString(salt[:])}, left...), " ") + "\n")
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.write(line)
	if err != nil {
		err = fmt.Errorf("salts cannot be written: %w", err)
	}
	return err
}

// write adds a line whole or not at all, and goes on after a disk that was full.
func (s *Salts) write(line []byte) error {
	if s.torn {
		if err := s.file.Truncate(s.size); err != nil {
			return err
		}
		s.torn = false
	}
	if _, err := s.file.Write(line); err != nil {
		s.torn = s.file.Truncate(s.size) != nil
		return err
	}
	s.size += int64(len(line))
	return nil
}

// Sync puts on the disk what Put wrote.
func (s *Salts) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := durable.Datasync(s.file); err != nil {
		return fmt.Errorf("salts cannot be written: %w", err)
	}
	return nil
}

// Close syncs and closes the file.
func (s *Salts) Close() error {
	err := s.Sync()
	return errors.Join(err, s.file.Close())
}

func isDigest(text string) bool {
	raw, err := hex.DecodeString(text)
	return err == nil && len(raw) == sha256.Size
}

// FindSalt reads the salt of a request from the file, which may be open for
// writing elsewhere, and the digests that its entry leaves out. fs.ErrNotExist says that
// it is not there.
func FindSalt(name, id string) (salt nucleus.Salt, left []string, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return salt, nil, err
	}
	defer f.Close()
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return salt, nil, fmt.Errorf("salts %s: none of request %q: %w", name, id, fs.ErrNotExist)
		}
		if err != nil {
			return salt, nil, err
		}
		rest, ok := strings.CutPrefix(line, id+" ")
		kept := strings.Split(strings.TrimSuffix(rest, "\n"), " ")
		if !ok || slices.ContainsFunc(kept, func(digits string) bool { return !isDigest(digits) }) {
			continue // of another, or cut by a crash
		}
		decoded, err := hex.DecodeString(kept[0])
		return nucleus.Salt(decoded), kept[1:], err
	}
}

// Whole is a shown action with the digests that were kept beside its salt in the place of
// their marks, in the canonical bytes that the salted digest is of. What is no action, or
// has other marks than were left out, stays what it is: it is cut, or whole already.
func Whole(shown []byte, left []string) ([]byte, error) {
	canonical, err := nucleus.CanonicalJSON(shown)
	if err != nil {
		return nil, err
	}
	var action nucleus.Action
	if nucleus.Strict(canonical, &action) == nil {
		if whole, ok := action.Whole(left); ok {
			return nucleus.Canonical(whole)
		}
	}
	return canonical, nil
}
