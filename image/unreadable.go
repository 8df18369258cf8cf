package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"
)

// Screen knows which entries below a directory `other` cannot read. A driver
// whose file server runs as the person must cover them, because the kernel shows
// an owner its own files whatever their mode.
//
// Reading a whole /usr takes about half a second, so an answer is kept for ten
// minutes: an entry that loses its permission for `other` in that time is
// covered in machines started after it. The zero value is ready.
type Screen struct {
	mu   sync.Mutex
	seen map[string]*sight
}

type sight struct {
	once    sync.Once
	at      time.Time
	entries []string
	err     error
}

const (
	sightAge      = 10 * time.Minute
	mostUncovered = 256
)

// Unreadable returns the topmost entries below dir, absolute, that lack
// permission to read (for a directory: to read and enter) for `other`. dir may be
// a file. An error says that it could not be found out, or that there are too
// many entries to cover: the directory must not be shown then.
func (s *Screen) Unreadable(ctx context.Context, dir string, now time.Time) ([]string, error) {
	s.mu.Lock()
	seen := s.seen[dir]
	if seen == nil || now.Sub(seen.at) > sightAge {
		seen = &sight{at: now}
		if s.seen == nil {
			s.seen = map[string]*sight{}
		}
		s.seen[dir] = seen
	}
	s.mu.Unlock()
	seen.once.Do(func() { seen.entries, seen.err = unreadable(ctx, dir) })
	if seen.err != nil {
		s.mu.Lock()
		if s.seen[dir] == seen {
			delete(s.seen, dir)
		}
		s.mu.Unlock()
	}
	return seen.entries, seen.err
}

func unreadable(ctx context.Context, dir string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, fs.ErrPermission) {
			return fs.SkipDir // listed by its mode, or not ours to enter either
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if entry.Type()&fs.ModeSymlink != 0 {
			return nil
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		need := fs.FileMode(0o004)
		if entry.IsDir() {
			need = 0o005
		}
		if info.Mode().Perm()&need == need {
			return nil
		}
		if len(found) == mostUncovered {
			return fmt.Errorf("%s holds more than %d entries that are not for everybody to read", dir, mostUncovered)
		}
		found = append(found, name)
		if entry.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	return found, err
}
