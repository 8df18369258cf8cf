package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Screen knows which entries below a directory this process can reach though
// `other` cannot. A driver whose file server runs as the person must cover them,
// because the kernel shows an owner, or a group's member, what it hides from others.
//
// Reading a whole /usr takes about half a second, so an answer is kept for ten
// minutes: an entry that loses its permission for `other` in that time is
// covered in machines started after it. The zero value is ready.
//
// BUG: a directory of somebody else's that may be entered but not listed (0711)
// cannot be looked into; a file of the person's own in it, for nobody else to
// read and with a name that a guest guesses, is not covered.
type Screen struct {
	mu   sync.Mutex
	seen map[string]*sight
}

type sight struct {
	at      time.Time
	done    chan struct{}
	entries []string
	err     error
}

const (
	sightAge      = 10 * time.Minute
	mostUncovered = 256
)

// Unreadable returns the topmost entries at or below path, absolute, that lack
// permission to read (for a directory: to read and enter) for `other` and yet are
// open to this process. An error says that it could not be found out, or that
// there are too many entries to cover: the path must not be shown then.
func (s *Screen) Unreadable(ctx context.Context, path string, now time.Time) ([]string, error) {
	s.mu.Lock()
	seen := s.seen[path]
	if seen == nil || now.Sub(seen.at) > sightAge {
		seen = &sight{at: now, done: make(chan struct{})}
		if s.seen == nil {
			s.seen = map[string]*sight{}
		}
		s.seen[path] = seen
		s.mu.Unlock()
		seen.entries, seen.err = unreadable(ctx, path)
		if seen.err != nil {
			s.forget(path, seen)
		}
		close(seen.done)
		return seen.entries, seen.err
	}
	s.mu.Unlock()
	select {
	case <-seen.done:
		return seen.entries, seen.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// forget lets the next caller look again after an error, which may have been an
// ended context.
func (s *Screen) forget(path string, seen *sight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[path] == seen {
		delete(s.seen, path)
	}
}

func unreadable(ctx context.Context, path string) ([]string, error) {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if !forAll(stat.Mode) {
		return []string{path}, nil
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, nil
	}
	dir, err := unix.Open(path, walkFlags, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	walk := walk{ctx: ctx, top: path, buffer: make([]byte, 64<<10)}
	err = walk.into(dir, path)
	return walk.found, err
}

const walkFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// forAll says whether everybody may read what has this mode. Links have no
// permission of their own.
func forAll(mode uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return true
	case unix.S_IFDIR:
		return mode&0o005 == 0o005
	}
	return mode&0o004 != 0
}

// reachable says whether a file server with this process's ids could open what
// is not for all. In its user namespace it has every right over what is its own.
func reachable(dir int, name string, stat unix.Stat_t) bool {
	if stat.Uid == uint32(os.Geteuid()) && stat.Gid == uint32(os.Getegid()) {
		return true
	}
	return unix.Faccessat(dir, name, unix.R_OK, 0) == nil
}

// walk reads a tree by descriptors; filepath.WalkDir takes three times as long
// for the same, because it begins at the root for every name.
type walk struct {
	ctx    context.Context
	top    string
	buffer []byte
	found  []string
}

// into reads an open directory and closes it.
func (w *walk) into(dir int, path string) error {
	defer unix.Close(dir)
	if err := w.ctx.Err(); err != nil {
		return err
	}
	var names []string
	for {
		n, err := unix.ReadDirent(dir, w.buffer)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(w.buffer[:n], -1, names)
	}
	for _, name := range names {
		if err := w.entry(dir, path, name); err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) entry(dir int, path, name string) error {
	var stat unix.Stat_t
	if err := unix.Fstatat(dir, name, &stat, unix.AT_SYMLINK_NOFOLLOW); errors.Is(err, unix.ENOENT) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(path, name), err)
	}
	if !forAll(stat.Mode) {
		if !reachable(dir, name, stat) {
			return nil
		}
		if len(w.found) == mostUncovered {
			return fmt.Errorf("%s holds more than %d entries that are not for everybody to read", w.top, mostUncovered)
		}
		w.found = append(w.found, filepath.Join(path, name))
		return nil
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	inner, err := unix.Openat(dir, name, walkFlags, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EACCES):
		return nil // gone, or not this user's to enter in spite of its mode
	case err != nil:
		return fmt.Errorf("%s: %w", filepath.Join(path, name), err)
	}
	return w.into(inner, filepath.Join(path, name))
}
