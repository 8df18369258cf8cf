package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
)

// hold keeps objects as long as a directory exists.
type hold struct {
	Dir     string   `json:"dir"`
	Objects []string `json:"objects"` // digests
}

// Hold keeps objects from being pruned as long as dir exists, the directory of a machine
// that uses them: those that have one of the digests, or a file of it. A second call for a
// directory replaces what the first has said.
func (s *Store) Hold(dir string, digests ...string) error {
	for _, digest := range digests {
		if !isDigest(digest) {
			return fmt.Errorf("%q is no digest", digest)
		}
	}
	sum := sha256.Sum256([]byte(dir))
	return s.full(durable.Store(filepath.Join(s.holds(), hex.EncodeToString(sum[:])+".json"), hold{dir, digests}))
}

// held returns who holds each object, and forgets the holds of directories that are gone.
func (s *Store) held() (map[string][]string, error) {
	entries, err := os.ReadDir(s.holds())
	if err != nil {
		return nil, err
	}
	by := map[string][]string{}
	for _, entry := range entries {
		name := filepath.Join(s.holds(), entry.Name())
		if filepath.Ext(name) != ".json" {
			continue // a file that a crash left unfinished
		}
		var h hold
		if err := durable.Load(name, &h); err != nil {
			return nil, err // what is held is then not known
		}
		if _, err := os.Lstat(h.Dir); errors.Is(err, fs.ErrNotExist) {
			if err := durable.Remove(name); err != nil {
				return nil, err
			}
			continue
		}
		for _, digest := range h.Objects {
			by[digest] = append(by[digest], h.Dir)
		}
	}
	return by, nil
}

// Listed is an object of the store as a person sees it.
type Listed struct {
	Object
	Size   int64     `json:"size"` // bytes on the disk
	Made   time.Time `json:"made"`
	Used   time.Time `json:"used"`            // last
	UsedBy []string  `json:"used_by"`         // directories of machines
	Wrong  string    `json:"wrong,omitempty"` // why it will not be used
}

// List returns all objects, the one used last first. With verify all of each is read.
func (s *Store) List(ctx context.Context, verify bool) ([]Listed, error) {
	held, err := s.held()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.objects())
	if err != nil {
		return nil, err
	}
	list := []Listed{}
	for _, entry := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		digest := digestPrefix + entry.Name()
		if !isDigest(digest) {
			continue
		}
		list = append(list, s.look(ctx, digest, held, verify))
	}
	slices.SortStableFunc(list, func(a, b Listed) int { return b.Used.Compare(a.Used) })
	return list, nil
}

// Inspect returns one object, after reading all of it. A digest may be shortened to what no
// other has.
func (s *Store) Inspect(ctx context.Context, digest string) (Listed, error) {
	held, err := s.held()
	if err != nil {
		return Listed{}, err
	}
	entries, err := os.ReadDir(s.objects())
	if err != nil {
		return Listed{}, err
	}
	var found []string
	for _, entry := range entries {
		if name := digestPrefix + entry.Name(); isDigest(name) && (strings.HasPrefix(entry.Name(), digest) || strings.HasPrefix(name, digest)) {
			found = append(found, name)
		}
	}
	if len(found) != 1 || digest == "" {
		return Listed{}, fmt.Errorf("digest %q: %d objects have it, want one (cal image list)", digest, len(found))
	}
	return s.look(ctx, found[0], held, true), nil
}

func (s *Store) look(ctx context.Context, digest string, held map[string][]string, verify bool) Listed {
	l := Listed{UsedBy: slices.Clone(held[digest])}
	var err error
	if l.Object, err = s.load(digest); err == nil && verify {
		err = s.verify(ctx, l.Object)
	}
	for _, f := range l.Files {
		l.UsedBy = append(l.UsedBy, held[f.Digest]...)
	}
	slices.Sort(l.UsedBy)
	l.UsedBy = append([]string{}, slices.Compact(l.UsedBy)...) // a list, in JSON too
	if err != nil {
		l.Object.Digest, l.Wrong = digest, err.Error()
	}
	dir := s.object(digest)
	if info, err := os.Stat(filepath.Join(dir, objectFile)); err == nil {
		l.Used = info.ModTime()
	}
	if info, err := os.Stat(dir); err == nil {
		l.Made = info.ModTime()
	}
	l.Size = onDisk(dir)
	return l
}

// verify reads all of an object.
func (s *Store) verify(ctx context.Context, o Object) error {
	for _, f := range o.Files {
		if err := f.check(s.object(o.Digest), true); err != nil {
			return err
		}
	}
	if o.Kind == kindTree {
		return s.checkTree(ctx, o)
	}
	return nil
}

// onDisk is what a directory takes up; a file with several names counts once.
func onDisk(dir string) int64 {
	var size int64
	seen := map[uint64]bool{}
	filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error { //nolint:errcheck // what cannot be read does not count
		var stat unix.Stat_t
		if err == nil && unix.Lstat(name, &stat) == nil && (stat.Nlink < 2 || !seen[stat.Ino]) {
			seen[stat.Ino] = true
			size += stat.Blocks * 512
		}
		return nil
	})
	return size
}

// grace is how long an object stays after it was wanted, whatever is asked: a driver that
// was given its path has not said yet that a machine uses it.
const grace = 10 * time.Minute

// Prune removes the objects that no machine uses and that were not wanted for the time `unused`,
// and those that are corrupt, and returns them.
func (s *Store) Prune(ctx context.Context, unused time.Duration, now time.Time) ([]Listed, error) {
	alone, err := s.lock(ctx, "store", unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer alone.Close()
	list, err := s.List(ctx, false)
	if err != nil {
		return nil, err
	}
	removed := []Listed{}
	for _, l := range list {
		if len(l.UsedBy) > 0 || l.Wrong == "" && now.Sub(l.Used) < max(unused, grace) {
			continue
		}
		if err := s.remove(l.Digest); err != nil {
			return removed, err
		}
		removed = append(removed, l)
	}
	return removed, s.sweep(ctx)
}

// remove takes an object out of the store in one step, then deletes it.
func (s *Store) remove(digest string) error {
	gone, err := os.MkdirTemp(s.unfinished(), "")
	if err != nil {
		return err
	}
	if err := os.Rename(s.object(digest), filepath.Join(gone, "object")); err != nil {
		return err
	}
	if err := syncDir(s.objects()); err != nil {
		return err
	}
	return removeTree(gone)
}

// sweep removes what leads to no object any more. The caller is alone.
func (s *Store) sweep(ctx context.Context) error {
	list, err := s.List(ctx, false)
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, l := range list {
		there[l.Digest] = true
		there[l.Facts[factTree]] = true // a disk that was made of a tree does without it
	}
	inputs, err := os.ReadDir(s.inputs())
	if err != nil {
		return err
	}
	for _, entry := range inputs {
		name := filepath.Join(s.inputs(), entry.Name())
		var in input
		if err := durable.Load(name, &in); err == nil && there[in.Object] {
			continue
		}
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	for _, dir := range []string{s.unfinished(), s.locks()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if entry.Name() == "store" {
				continue
			}
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
