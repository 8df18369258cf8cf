package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/nucleus"
)

// Store keeps what machines are made of, by content digest: kernels, initramfs, disk
// images, and root file systems that were unpacked. Several processes may use one at
// once.
//
// An object is a directory that comes into being whole, by a rename, after all of it
// is on the disk; what a build that died has left is never taken for one. Before an
// object is used its files are held to what was recorded: one of the same size, time
// and inode is as it was, any other is read again and must have its digest, and where
// it has not, using it is an error. What is made again of unchanged input is found
// again by the input's fingerprint, without reading it.
type Store struct {
	dir     string
	modules string // where those of kernels that are given by path lie: /lib/modules

	mu     sync.Mutex
	sights map[string]time.Time // of trees

	blanks blanks
}

// Object says what lies in a directory of the store.
type Object struct {
	Kind   string            `json:"kind"`   // "kernel", "initramfs", "root", "layers", "tree"
	Digest string            `json:"digest"` // "sha256:..." of its one file; of a tree or a kernel, of all that is in it
	What   string            `json:"what"`   // made from, for people
	Files  []File            `json:"files"`
	Env    map[string]string `json:"env,omitempty"`
	Facts  map[string]string `json:"facts,omitempty"` // version, package, ...
}

// File is a file of an object.
type File struct {
	Name     string `json:"name"` // relative to the object's directory
	Digest   string `json:"digest"`
	Size     int64  `json:"size"`
	Modified int64  `json:"modified"` // Unix time in nanoseconds
	Inode    uint64 `json:"inode"`
}

// Disk is a file that a machine gets as a disk or as its initramfs.
type Disk struct {
	Path   string
	Digest string // "sha256:..."
	Size   int64
	Env    map[string]string // what the tools need to find programs
}

// Progress is told in one line what takes a while; nil: nobody wants to know.
type Progress func(line string)

func (p Progress) say(format string, args ...any) {
	if p != nil {
		p(fmt.Sprintf(format, args...))
	}
}

// Open takes up the store in dir, which is made if it is missing.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, modules: "/lib/modules"}
	for _, part := range []string{s.objects(), s.inputs(), s.unfinished(), s.locks(), s.holds(), s.retired()} {
		if err := durable.MkdirAll(part, 0o700); err != nil {
			return nil, fmt.Errorf("image store: %w", err)
		}
	}
	return s, s.clean()
}

func (s *Store) objects() string    { return filepath.Join(s.dir, "objects") }
func (s *Store) inputs() string     { return filepath.Join(s.dir, "inputs") }
func (s *Store) unfinished() string { return filepath.Join(s.dir, "unfinished") }
func (s *Store) locks() string      { return filepath.Join(s.dir, "locks") }
func (s *Store) holds() string      { return filepath.Join(s.dir, "holds") }
func (s *Store) retired() string    { return filepath.Join(s.dir, "retired") }

// object is the directory of a digest.
func (s *Store) object(digest string) string {
	return filepath.Join(s.objects(), strings.TrimPrefix(digest, digestPrefix))
}

const (
	digestPrefix = "sha256:"
	objectFile   = "object.json"
)

// isDigest says whether a text is one: only then may it be part of a path.
func isDigest(s string) bool {
	sum, ok := strings.CutPrefix(s, digestPrefix)
	return ok && len(sum) == 2*sha256.Size && !strings.ContainsFunc(sum, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'f')
	})
}

// ErrCorrupt is wrapped where an object is not what was recorded of it.
var ErrCorrupt = errors.New("corrupt image")

// input is what was made of one fingerprint.
type input struct {
	Object string `json:"object"` // digest
}

// keyOf names an input by what it is made of.
func keyOf(parts ...string) string {
	sum := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(sum, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// made returns the object that was made of an input, or makes it. build fills dir, an
// empty directory on the store's disk, and says what it made; its files' records are
// completed here.
func (s *Store) made(ctx context.Context, key string, build func(dir string) (Object, error)) (Object, error) {
	shared, err := s.lock(ctx, "store", unix.LOCK_SH)
	if err != nil {
		return Object{}, err
	}
	defer shared.Close()
	if o, err := s.known(key); err != nil || o.Digest != "" {
		return o, err
	}
	alone, err := s.lock(ctx, key, unix.LOCK_EX)
	if err != nil {
		return Object{}, err
	}
	defer alone.Close()
	if o, err := s.known(key); err != nil || o.Digest != "" {
		return o, err // another process was first
	}
	return s.make(ctx, key, build)
}

// madeAnew is made, whether there is something or not. Until it has succeeded, what there
// was stays.
func (s *Store) madeAnew(ctx context.Context, key string, build func(dir string) (Object, error)) (Object, error) {
	for _, lock := range []struct {
		name string
		how  int
	}{{"store", unix.LOCK_SH}, {key, unix.LOCK_EX}} {
		held, err := s.lock(ctx, lock.name, lock.how)
		if err != nil {
			return Object{}, err
		}
		defer held.Close()
	}
	return s.make(ctx, key, build)
}

// mended is made, where what there is is corrupt.
func (s *Store) mended(ctx context.Context, key string, build func(dir string) (Object, error)) (Object, error) {
	_, err := s.known(key)
	if errors.Is(err, ErrCorrupt) {
		return s.madeAnew(ctx, key, build)
	}
	return s.made(ctx, key, build)
}

// make builds and keeps an object. The caller holds the locks.
func (s *Store) make(ctx context.Context, key string, build func(dir string) (Object, error)) (Object, error) {
	dir, err := os.MkdirTemp(s.unfinished(), "")
	if err != nil {
		return Object{}, s.full(err)
	}
	defer removeTree(dir) //nolint:errcheck // what is left is removed at the next Open
	o, err := build(dir)
	if err != nil {
		return Object{}, s.full(err)
	}
	if o, err = s.commit(ctx, dir, o); err != nil {
		return Object{}, s.full(err)
	}
	return o, s.full(durable.Store(filepath.Join(s.inputs(), key+".json"), input{o.Digest}))
}

// madeOf is the digest of what was made of an input, which may be gone; "" where nothing was.
func (s *Store) madeOf(key string) (string, error) {
	var in input
	err := durable.Load(filepath.Join(s.inputs(), key+".json"), &in)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("%w: %v; hint: cal image prune removes it, and it is made again at the next start", ErrCorrupt, err)
	}
	return in.Object, nil
}

// known returns what an input led to; the zero Object where there is nothing.
func (s *Store) known(key string) (Object, error) {
	digest, err := s.madeOf(key)
	if err != nil || digest == "" {
		return Object{}, err
	}
	o, err := s.load(digest)
	if errors.Is(err, fs.ErrNotExist) {
		return Object{}, nil // pruned
	}
	if err == nil {
		s.used(o.Digest)
	}
	return o, err
}

// load reads an object and holds it to its record.
func (s *Store) load(digest string) (Object, error) {
	var o Object
	if !isDigest(digest) {
		return o, fmt.Errorf("%w: %q is no digest", ErrCorrupt, digest)
	}
	dir := s.object(digest)
	if err := durable.Load(filepath.Join(dir, objectFile), &o); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			if _, statErr := os.Lstat(dir); errors.Is(statErr, fs.ErrNotExist) {
				return o, err
			}
		}
		return o, fmt.Errorf("%w: %s: %v; hint: %s", ErrCorrupt, digest, err, o.remedy())
	}
	if o.Digest != digest {
		return o, fmt.Errorf("%w: %s says that it is %s; hint: %s", ErrCorrupt, digest, o.Digest, o.remedy())
	}
	for _, f := range o.Files {
		if err := f.check(dir, false); err != nil {
			return o, fmt.Errorf("%w (of %s, made from %s); hint: %s", err, digest, o.What, o.remedy())
		}
	}
	return o, nil
}

// remedy is what a person does about a corrupt object.
func (o Object) remedy() string {
	if o.Kind == kindKernel && o.Facts[factPackage] == "" {
		return fmt.Sprintf("cal image build kernel:%s makes it again; cal image prune removes it, and machines then start with Debian's kernel", o.What)
	}
	return "cal image prune removes it, and it is made again at the next start"
}

// check holds a file to its record. One that seems untouched is not read, unless all is
// to be.
func (f File) check(dir string, all bool) error {
	if !filepath.IsLocal(f.Name) {
		return fmt.Errorf("%w: file name %q", ErrCorrupt, f.Name)
	}
	name := filepath.Join(dir, f.Name)
	now, err := stated(dir, f.Name)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	now.Digest = f.Digest
	if now == f && !all {
		return nil
	}
	if now.Size != f.Size {
		return fmt.Errorf("%w: %s has %d bytes, want %d", ErrCorrupt, name, now.Size, f.Size)
	}
	digest, err := digestFile(name)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	if digest != f.Digest {
		return fmt.Errorf("%w: %s has %s, want %s", ErrCorrupt, name, digest, f.Digest)
	}
	return nil
}

// stated is the record of a file, without its digest.
func stated(dir, name string) (File, error) {
	var stat unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, name), &stat); err != nil {
		return File{}, &fs.PathError{Op: "lstat", Path: filepath.Join(dir, name), Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return File{}, fmt.Errorf("%s is not a regular file", filepath.Join(dir, name))
	}
	return File{Name: name, Size: stat.Size, Modified: unix.TimespecToNsec(stat.Mtim), Inode: stat.Ino}, nil
}

func digestFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return digestPrefix + hex.EncodeToString(sum.Sum(nil)), nil
}

// commit records the files of a finished directory, puts all of it onto the disk, and
// gives it its name.
func (s *Store) commit(ctx context.Context, dir string, o Object) (Object, error) {
	for i := range o.Files {
		if err := o.Files[i].keep(dir); err != nil {
			return o, err
		}
	}
	switch {
	case o.Digest != "":
	case len(o.Files) == 1:
		o.Digest = o.Files[0].Digest
	default:
		o.Digest = digestOf(o.Files)
	}
	if err := durable.Store(filepath.Join(dir, objectFile), o); err != nil {
		return o, err
	}
	if err := syncAll(dir, o); err != nil {
		return o, err
	}
	place := s.object(o.Digest)
	err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, place, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) { // the same content, made of another input or once more
		have, loadErr := s.load(o.Digest)
		if loadErr == nil {
			loadErr = s.verify(ctx, have)
		}
		if loadErr == nil {
			s.used(o.Digest)
			return have, nil
		}
		if !errors.Is(loadErr, ErrCorrupt) {
			return have, loadErr
		}
		if err := s.retire(o.Digest); err != nil {
			return o, err
		}
		err = unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, place, unix.RENAME_NOREPLACE)
	}
	if err != nil {
		return o, &os.LinkError{Op: "rename", Old: dir, New: place, Err: err}
	}
	return o, syncDir(s.objects())
}

// digestOf is that of several files, names included.
func digestOf(files []File) string {
	sum := sha256.New()
	for _, f := range files {
		fmt.Fprintf(sum, "%s %s\n", f.Digest, f.Name)
	}
	return digestPrefix + hex.EncodeToString(sum.Sum(nil))
}

// keep makes a finished file read-only and durable and takes its record.
func (f *File) keep(dir string) error {
	name := filepath.Join(dir, f.Name)
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := errors.Join(file.Chmod(0o444), file.Sync()); err != nil {
		return err
	}
	record, err := stated(dir, f.Name)
	if err != nil {
		return err
	}
	record.Digest, err = digestFile(name)
	*f = record
	return err
}

// syncAll puts what is not on the disk yet there: directories, and the many files of a
// tree, which are not synced one by one.
func syncAll(top string, o Object) error {
	if o.Kind == kindTree {
		dir, err := os.Open(top)
		if err != nil {
			return err
		}
		defer dir.Close()
		return unix.Syncfs(int(dir.Fd()))
	}
	return filepath.WalkDir(top, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return err
		}
		return syncDir(name)
	})
}

func syncDir(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// used takes down that an object was wanted now: prune asks for it. That it cannot be
// taken down keeps nobody from using it.
func (s *Store) used(digest string) {
	now := time.Now()
	os.Chtimes(filepath.Join(s.object(digest), objectFile), now, now) //nolint:errcheck // said above
}

// full explains an error of a disk that has no room left.
func (s *Store) full(err error) error {
	if err == nil || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	free := "an unknown number of"
	var stat unix.Statfs_t
	if unix.Statfs(s.dir, &stat) == nil {
		free = fmt.Sprint(int64(stat.Bavail) * stat.Bsize >> 20)
	}
	return fmt.Errorf("%w (%s MiB are free at %s); nothing was kept; hint: cal image prune, or give CAL_HOME more room", err, free, s.dir)
}

// lock takes the lock of a name and waits for it until ctx ends.
func (s *Store) lock(ctx context.Context, name string, how int) (io.Closer, error) {
	f, err := os.OpenFile(filepath.Join(s.locks(), name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, s.full(err)
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, &fs.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another process that builds an image: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// clean removes what builds that died have left. While any process builds it does nothing.
func (s *Store) clean() error {
	unfinished, err := os.ReadDir(s.unfinished())
	if err != nil {
		return err
	}
	retired, err := os.ReadDir(s.retired())
	if err != nil {
		return err
	}
	apt, err := filepath.Glob(filepath.Join(sharedTemp, s.aptDirs()+"*"))
	if err != nil || len(unfinished)+len(retired)+len(apt) == 0 {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // one try
	alone, err := s.lock(ctx, "store", unix.LOCK_EX)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	if err != nil {
		return err
	}
	defer alone.Close()
	if unfinished, err = os.ReadDir(s.unfinished()); err != nil {
		return err
	}
	for _, entry := range unfinished {
		if err := removeTree(filepath.Join(s.unfinished(), entry.Name())); err != nil {
			return err
		}
	}
	return errors.Join(s.cleanApt(sharedTemp), s.clearRetired())
}

// removeTree removes a directory, also one whose own directories forbid it.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error { //nolint:errcheck // the second attempt says what is left
		if entry != nil && entry.IsDir() {
			os.Chmod(name, 0o700) //nolint:errcheck // the same
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// layersFile says in a disk of layers where they go.
const layersFile = "layers.json"

// LayerAt is an element of layers.json, in the disk of layers: Source is an entry of the
// disk's root. An outer place comes before those inside it.
type LayerAt struct {
	Source string `json:"source"`
	Guest  string `json:"guest"`
}

// placed sorts layers by their place and gives each a source; layers of one directory of
// the host share one.
func placed(layers []nucleus.Layer) (sources []string, at []LayerAt, err error) {
	layers = slices.Clone(layers)
	slices.SortStableFunc(layers, func(a, b nucleus.Layer) int { return strings.Compare(a.Guest, b.Guest) })
	for _, layer := range layers {
		host, err := filepath.EvalSymlinks(layer.Host)
		if err != nil {
			return nil, nil, fmt.Errorf("layer %q: %w", layer.Name, err)
		}
		i := slices.Index(sources, host)
		if i < 0 {
			i = len(sources)
			sources = append(sources, host)
		}
		at = append(at, LayerAt{fmt.Sprint(i), layer.Guest})
	}
	return sources, at, nil
}
