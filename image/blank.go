package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Blank makes an empty ext4 file system of size bytes in a new file, which takes up room
// only as it is filled. All have the same ids: no machine sees that of another. It is not
// flushed to the host's disk.
func (s *Store) Blank(ctx context.Context, path string, size int64) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(path)
			err = s.full(err)
		}
	}()
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("%s of %d MiB: %w", path, size>>20, err)
	}
	if known := s.blanks.of(size); known != nil {
		return known.write(f)
	}
	if err := format(ctx, path, size); err != nil {
		return err
	}
	if made, err := writtenIn(f); err == nil { // else the next one is formatted too
		s.blanks.keep(size, made)
	}
	return nil
}

// format has mkfs make the file system. What depends on chance or time is given, and nobody
// makes it larger later: without the room for that a blank one of 10 GB takes up 0.2 MB, not 4.
func format(ctx context.Context, path string, size int64) error {
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		if mkfs, err = exec.LookPath("/sbin/mkfs.ext4"); err != nil {
			return errors.New("this host has no mkfs.ext4, which makes a machine's disks; hint: install e2fsprogs")
		}
	}
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-U", blankID, "-L", "", "-O", "^resize_inode", "-E",
		"lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0,hash_seed="+blankID, path)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "E2FSPROGS_FAKE_TIME=1", "SOURCE_DATE_EPOCH=1"}
	if said, err := cmd.CombinedOutput(); err != nil {
		return formatError(path, size, err, said)
	}
	return nil
}

const blankID = "63616c00-0000-4000-8000-000000000001"

func formatError(path string, size int64, err error, said []byte) error {
	text := strings.TrimSpace(string(said))
	if strings.Contains(text, "No space left") {
		err = unix.ENOSPC
	}
	return fmt.Errorf("mkfs.ext4 %s of %d MiB: %w: %s", path, size>>20, err, text)
}

// blanks keeps what is written in blank disks, by their sizes: to run mkfs takes longer
// than all else that a start from a snapshot does with files.
type blanks struct {
	mu   sync.Mutex
	made map[int64]contents
}

// Bounds of blanks, which is memory.
const (
	mostBlanks   = 8       // sizes
	largestBlank = 4 << 20 // bytes written
)

func (b *blanks) of(size int64) contents {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.made[size]
}

func (b *blanks) keep(size int64, c contents) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.made == nil || len(b.made) >= mostBlanks {
		b.made = map[int64]contents{}
	}
	b.made[size] = c
}

// contents is what a file with holes holds; what is not in it is zero.
type contents []piece

type piece struct {
	at   int64
	data []byte
}

func (c contents) write(f *os.File) error {
	for _, p := range c {
		if _, err := f.WriteAt(p.data, p.at); err != nil {
			return err
		}
	}
	return nil
}

// writtenIn reads what is not a hole. It is an error where that is much, as on a file
// system that knows no holes.
func writtenIn(f *os.File) (contents, error) {
	var c contents
	for at, sum := int64(0), int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return c, nil // holes to the end
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		if sum += end - start; sum > largestBlank {
			return nil, fmt.Errorf("%d bytes are written, want at most %d", sum, largestBlank)
		}
		data := make([]byte, end-start)
		if _, err := f.ReadAt(data, start); err != nil {
			return nil, err
		}
		c, at = append(c, piece{start, data}), end
	}
}
