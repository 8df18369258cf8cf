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
	if verify {
		return s.list(ctx, s.verify)
	}
	return s.list(ctx, s.sight)
}

// list looks at all objects and holds each to its record; check says what more is wrong, if
// it is not nil.
func (s *Store) list(ctx context.Context, check func(context.Context, Object) error) ([]Listed, error) {
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
		list = append(list, s.look(ctx, digest, held, check))
	}
	if err := ctx.Err(); err != nil {
		return nil, err // which would stand in the last ones as what is wrong
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
	l := s.look(ctx, found[0], held, s.verify)
	return l, ctx.Err()
}

func (s *Store) look(ctx context.Context, digest string, held map[string][]string, check func(context.Context, Object) error) Listed {
	l := Listed{UsedBy: slices.Clone(held[digest])}
	var err error
	if l.Object, err = s.load(digest); err == nil && check != nil {
		err = check(ctx, l.Object)
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
	err := ctx.Err()
	for i := 0; i < len(o.Files) && err == nil; i++ {
		err = errors.Join(o.Files[i].check(s.object(o.Digest), true), ctx.Err())
	}
	if err == nil && o.Kind == kindTree {
		err = s.readTree(ctx, o)
	}
	if errors.Is(err, ErrCorrupt) {
		err = fmt.Errorf("%w; hint: cal image prune --verify removes it, and it is made again at the next start", err)
	}
	return err
}

// sight is what an object is held to before it is used, beside its record.
func (s *Store) sight(ctx context.Context, o Object) error {
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

// Pruned is what Prune did with an object.
type Pruned struct {
	Listed
	Removed bool   `json:"removed"`
	Why     string `json:"why"` // it was removed or kept
}

// Prune removes the objects that no machine uses and that were not wanted for the time `unused`,
// and whatever is corrupt; with verify all of each object is read for that. It returns all
// that there was.
//
// A corrupt object goes though a machine uses it, so that it can be made again. Such a machine
// has it open, or, of a tree, its directory: what it shows lies aside until the machine is
// gone.
func (s *Store) Prune(ctx context.Context, unused time.Duration, verify bool, now time.Time) ([]Pruned, error) {
	alone, err := s.lock(ctx, "store", unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer alone.Close()
	check := s.sight
	if verify {
		check = s.verify
	}
	list, err := s.list(ctx, check)
	if err != nil {
		return nil, err
	}
	done := []Pruned{}
	for _, l := range list {
		p := Pruned{Listed: l}
		stays := max(unused, grace)
		switch ago := now.Sub(l.Used).Round(time.Second); {
		case l.Wrong != "" && len(l.UsedBy) > 0:
			p.Removed, p.Why = true, "it is corrupt; it takes up room until the machine has ended that uses it: "+strings.Join(l.UsedBy, ", ")
			err = s.retire(l.Digest)
		case l.Wrong != "":
			p.Removed, p.Why = true, "it is corrupt"
			err = s.remove(l.Digest)
		case len(l.UsedBy) > 0:
			p.Why = "a machine uses it: " + strings.Join(l.UsedBy, ", ")
		case ago < stays:
			p.Why = fmt.Sprintf("it was wanted %s ago, and stays for %s", ago, stays)
		default:
			p.Removed, p.Why = true, fmt.Sprintf("no machine uses it, and it was wanted %s ago", ago)
			err = s.remove(l.Digest)
		}
		if err != nil {
			return done, err
		}
		done = append(done, p)
	}
	return done, s.sweep(ctx)
}

// retire takes a corrupt object out of the store in one step, and leaves it to the machines
// that use it.
func (s *Store) retire(digest string) error {
	aside, err := os.MkdirTemp(s.retired(), strings.TrimPrefix(digest, digestPrefix)+".")
	if err != nil {
		return err
	}
	err = os.Rename(s.object(digest), filepath.Join(aside, "object"))
	if errors.Is(err, fs.ErrNotExist) { // another process did it
		return os.Remove(aside)
	}
	if err != nil {
		return errors.Join(err, os.Remove(aside))
	}
	return syncDir(s.objects())
}

// Retired changes whenever a corrupt object was taken from the machines that use it: a machine
// that was made before may be one of them.
func (s *Store) Retired() (time.Time, error) {
	info, err := os.Stat(s.retired())
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

// clearRetired removes what was retired and no machine uses any more. The caller is alone.
func (s *Store) clearRetired() error {
	entries, err := os.ReadDir(s.retired())
	if err != nil || len(entries) == 0 {
		return err
	}
	held, err := s.held()
	if err != nil {
		return err
	}
	for _, entry := range entries {
		dir := filepath.Join(s.retired(), entry.Name())
		sum, _, _ := strings.Cut(entry.Name(), ".")
		users := len(held[digestPrefix+sum])
		var o Object
		if err := durable.Load(filepath.Join(dir, "object", objectFile), &o); err == nil {
			for _, f := range o.Files {
				users += len(held[f.Digest])
			}
		}
		if users > 0 {
			continue
		}
		if err := removeTree(dir); err != nil {
			return err
		}
	}
	return nil
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
	list, err := s.list(ctx, nil)
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
	return s.clearRetired()
}
