package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cal/image/debian"
	"cal/image/oci"
	"cal/image/tree"
	"cal/image/unpack"
	"cal/internal/fileid"
	"cal/nucleus"
)

// kindTree is the kind of an object that holds a root file system as files.
const kindTree = "tree"

// The entries of a tree's object.
const (
	treeDir      = "root"
	packagesFile = "packages.json"
)

// unpackLimits bound what a stranger's archives may fill.
var unpackLimits = unpack.Limits{Bytes: 64 << 30, Entries: 2 << 20}

// unpacked says whether an image is one that has to be unpacked before it can be shown.
func unpacked(image nucleus.Image) bool {
	return image.Kind == nucleus.ImageTarball || image.Kind == nucleus.ImageOCI || image.Kind == nucleus.ImageDebian
}

// Resolve returns the root of an image of any kind, its layers included. One that has to be
// unpacked is, once, into the store: an image by tag, and one of packages, stay as they
// were first made until Renew.
func (s *Store) Resolve(ctx context.Context, image nucleus.Image, host string, progress Progress) (Root, error) {
	if err := image.Check(); err != nil {
		return Root{}, err
	}
	if !unpacked(image) {
		return Resolve(image, host)
	}
	o, err := s.tree(ctx, image, s.made, progress)
	if err != nil {
		return Root{}, fmt.Errorf("image %s: %w", image, err)
	}
	root, err := Resolve(nucleus.Image{Kind: nucleus.ImageDirectory, Path: s.treeOf(o), Layers: image.Layers}, host)
	if err != nil {
		return Root{}, fmt.Errorf("image %s: %w", image, err)
	}
	for name, value := range o.Env {
		root.Env[name] = value
	}
	root.Digest = o.Digest
	return root, nil
}

// Renew unpacks an image anew though it is there: a tag may have moved, packages have newer
// versions. It returns the tree's digest; "" for an image that lies on the host, which
// needs no renewal.
func (s *Store) Renew(ctx context.Context, image nucleus.Image, progress Progress) (string, error) {
	if err := image.Check(); err != nil {
		return "", err
	}
	if !unpacked(image) {
		return "", nil
	}
	o, err := s.tree(ctx, image, s.madeAnew, progress)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", image, err)
	}
	return o.Digest, nil
}

// Unpacked is the digest of what an image was last unpacked to; "" for one that was not, or
// that lies on the host.
func (s *Store) Unpacked(image nucleus.Image) (string, error) {
	if !unpacked(image) {
		return "", nil
	}
	return s.madeOf(treeKey(image))
}

func (s *Store) treeOf(o Object) string { return filepath.Join(s.object(o.Digest), treeDir) }

var codename = regexp.MustCompile(`(?m)^VERSION_CODENAME="?([a-z]+)"?$`)

// treeKey names what an unpacked image is made of.
func treeKey(image nucleus.Image) string {
	switch image.Kind {
	case nucleus.ImageTarball:
		id, err := fileid.Of(image.Path)
		return keyOf(kindTree, image.String(), fmt.Sprint(id, err))
	case nucleus.ImageDebian:
		suite := image.Suite
		if suite == "" {
			release, _ := os.ReadFile("/etc/os-release") // none: the host's sources say what it is
			if found := codename.FindSubmatch(release); found != nil {
				suite = string(found[1])
			}
		}
		return keyOf(kindTree, image.Kind, suite, strings.Join(slices.Sorted(slices.Values(image.Packages)), ","))
	}
	return keyOf(kindTree, image.String())
}

func (s *Store) tree(ctx context.Context, image nucleus.Image, made maker, progress Progress) (Object, error) {
	if image.Kind == nucleus.ImageTarball {
		if _, err := os.Stat(image.Path); err != nil {
			return Object{}, err
		}
	}
	o, err := made(ctx, treeKey(image), func(dir string) (Object, error) {
		place := filepath.Join(dir, treeDir)
		if err := errors.Join(os.Mkdir(place, 0o755), os.Chmod(place, 0o755)); err != nil { // whatever the umask
			return Object{}, err
		}
		o := Object{Kind: kindTree, What: image.String(), Facts: map[string]string{}}
		err := s.fill(ctx, image, dir, &o, progress)
		if err == nil {
			err = s.describeTree(ctx, place, &o)
		}
		return o, err
	})
	if err == nil && !s.seen(o.Digest) {
		if err = s.checkTree(ctx, o); err == nil {
			s.saw(o.Digest)
		}
	}
	return o, err
}

// seen says whether this process has looked at a tree a short while ago: reading its
// names takes as long as starting a machine.
func (s *Store) seen(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.sights[digest]) < sightAge
}

func (s *Store) saw(digest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sights == nil {
		s.sights = map[string]time.Time{}
	}
	s.sights[digest] = time.Now()
}

func (s *Store) describeTree(ctx context.Context, place string, o *Object) error {
	t := tree.New()
	if err := t.Copy(ctx, place, "/"); err != nil {
		return err
	}
	if !t.Has("/usr") && !t.Has("/bin") {
		return errors.New("it holds no root file system: neither /usr nor /bin")
	}
	digest, err := t.Digest(ctx)
	o.Digest, o.Facts[factFingerprint] = digestPrefix+digest, t.Fingerprint()
	o.Facts["bytes"], o.Facts["entries"] = fmt.Sprint(t.Size()), fmt.Sprint(t.Entries())
	return err
}

const factFingerprint = "fingerprint"

// checkTree holds what lies in a tree to what was unpacked, by what the host's file system
// says of each file, and where that differs by all that is in them.
func (s *Store) checkTree(ctx context.Context, o Object) error {
	t, err := s.treeIn(ctx, o)
	if err == nil && t.Fingerprint() != o.Facts[factFingerprint] {
		err = s.digestTree(ctx, t, o)
	}
	if errors.Is(err, ErrCorrupt) {
		err = fmt.Errorf("%w; hint: %s", err, o.remedy())
	}
	return err
}

// readTree is checkTree for who reads all.
func (s *Store) readTree(ctx context.Context, o Object) error {
	t, err := s.treeIn(ctx, o)
	if err != nil {
		return err
	}
	return s.digestTree(ctx, t, o)
}

func (s *Store) treeIn(ctx context.Context, o Object) (*tree.Tree, error) {
	t := tree.New()
	err := t.Copy(ctx, s.treeOf(o), "/")
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	return t, err
}

func (s *Store) digestTree(ctx context.Context, t *tree.Tree, o Object) error {
	digest, err := t.Digest(ctx)
	if err == nil && digestPrefix+digest != o.Digest {
		err = fmt.Errorf("%w: %s has sha256:%s, want %s", ErrCorrupt, s.treeOf(o), digest, o.Digest)
	}
	return err
}

// fill puts a root file system into dir/root.
func (s *Store) fill(ctx context.Context, image nucleus.Image, dir string, o *Object, progress Progress) error {
	limits := unpackLimits
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return err
	}
	// An archive that claims more than there is room for is refused before the disk is full: the
	// host keeps a tenth of what is free.
	limits.Bytes = min(limits.Bytes, int64(stat.Bavail)*stat.Bsize/10*9)
	var err error
	switch image.Kind {
	case nucleus.ImageTarball:
		err = fillTarball(ctx, image.Path, filepath.Join(dir, treeDir), limits, progress)
	case nucleus.ImageOCI:
		err = fillOCI(ctx, image.Ref, filepath.Join(dir, treeDir), limits, o, progress)
	default:
		err = s.fillDebian(ctx, image, dir, limits, o, progress)
	}
	if errors.Is(err, unpack.ErrTooLarge) && limits.Bytes < unpackLimits.Bytes {
		return fmt.Errorf("%w: %w", unix.ENOSPC, err)
	}
	return err
}

func fillTarball(ctx context.Context, path, place string, limits unpack.Limits, progress Progress) (err error) {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	progress.say("unpacking %s: %d MiB", path, info.Size()>>20)
	plain, err := unpack.PlainStream(ctx, f)
	if err != nil {
		return err
	}
	defer plain.Close()
	into, err := unpack.Open(place, limits)
	if err != nil {
		return err
	}
	into.Tell(func(entries, bytes int64) {
		progress.say("unpacking %s: %d entries, %d MiB so far", path, entries, bytes>>20)
	})
	err = into.Add(ctx, plain, unpack.Plain)
	if errors.Is(err, tar.ErrHeader) {
		err = fmt.Errorf("%w; hint: a tar of a root file system is wanted, as docker export writes it", err)
	}
	return errors.Join(err, into.Close())
}

func fillOCI(ctx context.Context, ref, place string, limits unpack.Limits, o *Object, progress Progress) error {
	progress.say("asking for %s", ref)
	image, err := oci.Open(ctx, ref)
	if err != nil {
		return err
	}
	o.Facts["manifest"], o.Env = image.Digest, toolsEnv(image.Env)
	into, err := unpack.Open(place, limits)
	if err != nil {
		return err
	}
	into.Tell(func(entries, bytes int64) {
		progress.say("unpacking %s: %d entries, %d MiB so far", ref, entries, bytes>>20)
	})
	return errors.Join(image.Unpack(ctx, into, func(layer, of int, size int64) {
		progress.say("fetching %s: layer %d of %d, %.1f MiB", ref, layer, of, float64(size)/(1<<20))
	}), into.Close())
}

// Bounds of an image's own environment.
const (
	mostVariables = 200
	longestValue  = 8192
)

var (
	variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,99}$`)

	// notImages are variables that the machine sets, or that say who the user is.
	notImages = []string{"HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "TERM", "HOSTNAME", "TMPDIR", "MAIL"}
)

// toolsEnv is what of an image's environment the tools get.
func toolsEnv(given []string) map[string]string {
	env := map[string]string{}
	for _, line := range given {
		name, value, _ := strings.Cut(line, "=")
		if !variable.MatchString(name) || len(value) > longestValue || strings.ContainsAny(value, "\x00\n") || slices.Contains(notImages, name) ||
			strings.HasSuffix(strings.ToLower(name), "_proxy") || len(env) == mostVariables {
			continue
		}
		env[name] = value
	}
	return env
}

func (s *Store) fillDebian(ctx context.Context, image nucleus.Image, dir string, limits unpack.Limits, o *Object, progress Progress) error {
	work, remove, err := s.workspace()
	if err != nil {
		return err
	}
	defer remove()
	progress.say("asking Debian's archive")
	apt, err := debian.Open(ctx, work, image.Suite)
	if errors.Is(err, debian.ErrNoApt) {
		return fmt.Errorf("%w; hint: use an image of another kind: oci, tarball or directory", err)
	}
	if err != nil {
		return err
	}
	progress.say("fetching packages")
	debs, err := apt.Fetch(ctx, slices.Concat(debian.Usual, image.Packages))
	if err != nil {
		return err
	}
	progress.say("unpacking %d packages", len(debs))
	packages, err := debian.Root(ctx, debs, filepath.Join(dir, treeDir), limits)
	if err != nil {
		return err
	}
	raw, err := json.MarshalIndent(packages, "", "  ")
	if err != nil {
		return err
	}
	o.Files = []File{{Name: packagesFile}}
	return os.WriteFile(filepath.Join(dir, packagesFile), append(raw, '\n'), 0o600)
}
