package audit

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"

	"cal/internal/durable"
	"cal/nucleus"
)

// Salts is the private file that holds, by request, the salt of the digests in
// the log. It lies beside the log's directory, not in it, so that the directory
// can be handed to a stranger. One line is one salt: ID, a space, 64 hex digits.
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

// Put keeps the salt of a request. The id has no white space.
func (s *Salts) Put(id string, salt nucleus.Salt) error {
	if id == "" || strings.ContainsAny(id, " \t\r\n") {
		return fmt.Errorf("salt of request %q: an id has no white space and is not empty", id)
	}
	line := fmt.Appendf(nil, "%s %s\n", id, hex.EncodeToString(salt[:]))
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

// FindSalt reads the salt of a request from the file, which may be open for
// writing elsewhere. fs.ErrNotExist says that it is not there.
func FindSalt(name, id string) (salt nucleus.Salt, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return salt, err
	}
	defer f.Close()
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return salt, fmt.Errorf("salts %s: none of request %q: %w", name, id, fs.ErrNotExist)
		}
		if err != nil {
			return salt, err
		}
		if rest, ok := strings.CutPrefix(line, id+" "); ok {
			digits := strings.TrimSuffix(rest, "\n")
			if decoded, err := hex.DecodeString(digits); err == nil && len(decoded) == len(salt) {
				return nucleus.Salt(decoded), nil
			}
		}
	}
}
