package tools

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// Sandbox is the workspace as file tools see it. Names have two steps. Resolve
// follows the links of a name, inside the workspace only, and returns the place it
// stands for; that place is what policy judges. Opening then follows no link at
// all: what has become one since is refused, so that a link swapped under a call
// leads nowhere, not even to another file of the workspace.
//
// Refused: "..", places outside, blocked paths, other file systems mounted
// inside, everything but regular files and directories, regular files with more
// than one link and, for writing, what lies in a .git. Hard links are refused for
// reading as well as writing: a second name may lie outside the workspace or be a
// blocked one, and no system call tells; whoever wants such a file copies it by a
// command, which policy judges as one.
type Sandbox struct {
	path            string // absolute, without links
	given           string // as the caller named it
	dir             *os.File
	root            *os.Root
	mount           mount
	blocked         func(string) bool
	openat2         bool             // the kernel has it; else the walk below does the same by hand
	testOnlyBetween func(rel string) // runs between look and open
}

// OpenSandbox opens the workspace directory. A nil blocked blocks nothing.
func OpenSandbox(workspace string, blocked func(path string) bool) (*Sandbox, error) {
	if !filepath.IsAbs(workspace) {
		return nil, fmt.Errorf("workspace %q is not an absolute path", workspace)
	}
	real, err := filepath.EvalSymlinks(workspace)
	if err != nil {
		return nil, fmt.Errorf("workspace: %w", err)
	}
	root, err := os.OpenRoot(real)
	if err != nil {
		return nil, fmt.Errorf("workspace: %w", err)
	}
	dir, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("workspace: %w", err)
	}
	mount, err := mountOf(int(dir.Fd()))
	if err != nil {
		dir.Close()
		root.Close()
		return nil, fmt.Errorf("workspace: %w", err)
	}
	if blocked == nil {
		blocked = func(string) bool { return false }
	}
	s := &Sandbox{path: real, given: filepath.Clean(workspace), dir: dir, root: root, mount: mount, blocked: blocked}
	fd, err := s.openStrict2(".", unix.O_PATH)
	if s.openat2 = err == nil; s.openat2 {
		unix.Close(fd)
	}
	return s, nil
}

// Close gives the workspace's descriptors back.
func (s *Sandbox) Close() error {
	return errors.Join(s.dir.Close(), s.root.Close())
}

// Rel returns name relative to the workspace without looking at any file.
func (s *Sandbox) Rel(name string) (string, error) {
	rel, err := lexical(s.path, name)
	if err != nil && s.given != s.path {
		return lexical(s.given, name)
	}
	return rel, err
}

const maxLinks = 40

// Resolve returns the place that name stands for: relative, clean, free of
// links. The place need not exist. Both the name and the place are held against
// the blocked patterns.
func (s *Sandbox) Resolve(name string) (string, error) {
	rel, err := s.Rel(name)
	if err != nil {
		return "", err
	}
	if err := s.checkBlocked(rel); err != nil {
		return "", err
	}
	fd, err := s.openStrict(rel, unix.O_PATH)
	if err == nil {
		unix.Close(fd)
		return rel, nil
	}
	if !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.ENOENT) {
		return "", s.refusal(rel, err)
	}
	real, err := s.follow(rel)
	if err != nil {
		return "", err
	}
	if !utf8.ValidString(real) {
		return "", nucleus.Errorf(nucleus.KindInvalid, "%q leads to a name that is not UTF-8: %q", rel, real)
	}
	return real, s.checkBlocked(real)
}

// follow walks rel and replaces each link by what it says. done holds no link,
// so taking its last element away is what ".." means there.
func (s *Sandbox) follow(rel string) (string, error) {
	var done []string
	rest := strings.Split(rel, "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(done) == 0 {
				return "", nucleus.Errorf(nucleus.KindDenied, "path %q leads out of the workspace", rel)
			}
			done = done[:len(done)-1]
			continue
		}
		here := strings.Join(append(done[:len(done):len(done)], part), "/")
		info, err := s.root.Lstat(here)
		if errors.Is(err, fs.ErrNotExist) {
			return s.missing(rel, append(done, part), rest)
		}
		if err != nil {
			return "", s.refusal(rel, err)
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			done = append(done, part)
			continue
		}
		if links++; links > maxLinks {
			return "", nucleus.Errorf(nucleus.KindInvalid, "path %q goes through more than %d links", rel, maxLinks)
		}
		target, err := s.root.Readlink(here)
		if err != nil {
			return "", s.refusal(rel, err)
		}
		if path.IsAbs(target) {
			below, err := s.absolute(target)
			if err != nil {
				return "", nucleus.Errorf(nucleus.KindDenied, "path %q leads out of the workspace, to %q", rel, target)
			}
			done, target = nil, below
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	if len(done) == 0 {
		return ".", nil
	}
	return strings.Join(done, "/"), nil
}

// absolute returns what of an absolute link target lies below the workspace,
// not yet cleaned: a ".." in it means what the directory before it says.
func (s *Sandbox) absolute(target string) (string, error) {
	for _, root := range []string{s.path, s.given} {
		if target == root {
			return ".", nil
		}
		if below, ok := strings.CutPrefix(target, root+"/"); ok {
			return below, nil
		}
	}
	return "", errors.New("outside")
}

// missing is the place of something that does not exist; below it nothing can,
// so what is left of the name counts as it stands.
func (s *Sandbox) missing(rel string, done, rest []string) (string, error) {
	for _, part := range rest {
		if part == ".." {
			return "", nucleus.Errorf(nucleus.KindNotFound, "%q does not exist", rel)
		}
	}
	return path.Join(append(done, rest...)...), nil
}

// checkBlocked refuses a blocked path and everything below one.
func (s *Sandbox) checkBlocked(rel string) error {
	for at := rel; at != "."; at = path.Dir(at) {
		if s.blocked(at) {
			return &nucleus.Error{Kind: nucleus.KindDenied, Rule: "blocked", Message: fmt.Sprintf("%q is blocked by policy", rel)}
		}
	}
	return nil
}

// checkWritable refuses git's own files: a hook or setting that is written there
// is a command that runs with the next commit, under a policy that allows no
// commands. Who may run commands can write there by one.
func checkWritable(rel string) error {
	if rel == "." {
		return nucleus.Errorf(nucleus.KindInvalid, "the workspace itself is a directory")
	}
	for part := range strings.SplitSeq(rel, "/") {
		if part == ".git" {
			return &nucleus.Error{Kind: nucleus.KindDenied, Rule: "git-files", Message: fmt.Sprintf("%q belongs to git: file tools do not write there", rel)}
		}
	}
	return nil
}

// openStrict opens rel, which must be free of links and on the workspace's own
// file system, and never blocks on what it opens.
func (s *Sandbox) openStrict(rel string, flags int) (int, error) {
	if s.openat2 {
		return s.openStrict2(rel, flags)
	}
	return s.openStrictWalk(rel, flags)
}

func (s *Sandbox) openStrict2(rel string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	if flags&unix.O_PATH != 0 {
		how.Flags = uint64(flags | unix.O_CLOEXEC)
	}
	for {
		fd, err := unix.Openat2(int(s.dir.Fd()), rel, &how)
		if err != unix.EINTR && err != unix.EAGAIN { // EAGAIN: a rename raced the walk (openat2(2))
			return fd, err
		}
	}
}

// openStrictWalk is openStrict where the kernel has no openat2: each element is
// opened by itself and must lie on the workspace's mount.
func (s *Sandbox) openStrictWalk(rel string, flags int) (int, error) {
	parts := strings.Split(rel, "/")
	at, err := unix.FcntlInt(s.dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for i, part := range parts {
		last := i == len(parts)-1
		how := unix.O_PATH | unix.O_DIRECTORY
		if last && flags&unix.O_PATH == 0 {
			how = flags | unix.O_NONBLOCK | unix.O_NOCTTY
		} else if last {
			how = flags
		}
		next, err := openOne(at, part, how)
		unix.Close(at)
		if err != nil {
			return -1, err
		}
		at = next
		if err := s.checkMount(at); err != nil {
			unix.Close(at)
			return -1, err
		}
	}
	return at, nil
}

// openOne opens one element of a path and says ELOOP for a link, whichever way
// the kernel puts it.
func openOne(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		var st unix.Stat_t
		if err == unix.ENOTDIR && unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return -1, unix.ELOOP
		}
		if err == nil && flags&unix.O_PATH != 0 && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			unix.Close(fd)
			return -1, unix.ELOOP
		}
		return fd, err
	}
}

// mount says on which mount a file lies: by the mount's number, or by device
// where the kernel tells none. (A device alone misses bind mounts and, on an overlay,
// tells files from their directories.)
type mount struct {
	id     uint64
	device bool
}

func mountOf(fd int) (mount, error) {
	var sx unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &sx)
	if err == nil && sx.Mask&unix.STATX_MNT_ID != 0 {
		return mount{id: sx.Mnt_id}, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return mount{}, err
	}
	return mount{uint64(st.Dev), true}, nil //nolint:unconvert // int64 on other systems
}

func (s *Sandbox) checkMount(fd int) error {
	at, err := mountOf(fd)
	if err == nil && at != s.mount {
		err = unix.EXDEV
	}
	return err
}

// refusal says in a sentence why rel could not be opened.
func (s *Sandbox) refusal(rel string, err error) error {
	var known *nucleus.Error
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(err, unix.ENOENT):
		return nucleus.Errorf(nucleus.KindNotFound, "%q does not exist", rel)
	case errors.Is(err, unix.ENOTDIR):
		return nucleus.Errorf(nucleus.KindNotFound, "%q does not exist: a file stands where a directory is named", rel)
	case errors.Is(err, unix.ELOOP):
		return nucleus.Errorf(nucleus.KindConflict, "%q has become a symbolic link", rel)
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EBUSY): // EBUSY: something is mounted on the name
		return nucleus.Errorf(nucleus.KindDenied, "%q lies on another file system", rel)
	case errors.Is(err, unix.ENXIO):
		return nucleus.Errorf(nucleus.KindDenied, "%q is a socket, fifo or device without a reader", rel)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nucleus.Errorf(nucleus.KindFailed, "%q: permission denied", rel)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return nucleus.Errorf(nucleus.KindFailed, "%q: no space left on the workspace's disk", rel)
	}
	return nucleus.Errorf(nucleus.KindFailed, "%q: %v", rel, err)
}

// Open opens a regular file for reading. rel comes from Resolve.
func (s *Sandbox) Open(rel string) (*os.File, int64, error) {
	fd, size, err := s.openRegular(rel)
	if err != nil {
		return nil, 0, err
	}
	return os.NewFile(uintptr(fd), rel), size, nil
}

// openRegular returns a descriptor and the size.
func (s *Sandbox) openRegular(rel string) (fd int, size int64, err error) {
	if err := s.checkBlocked(rel); err != nil {
		return -1, 0, err
	}
	// Opening a device can act on it, so its kind is looked at first, and again
	// on the descriptor, in case it has been swapped.
	fd, err = s.openStrict(rel, unix.O_PATH)
	if err != nil {
		return -1, 0, s.refusal(rel, err)
	}
	_, err = s.checkRegular(rel, fd)
	unix.Close(fd)
	if err != nil {
		return -1, 0, err
	}
	if s.testOnlyBetween != nil {
		s.testOnlyBetween(rel)
	}
	if fd, err = s.openStrict(rel, unix.O_RDONLY); err != nil {
		return -1, 0, s.refusal(rel, err)
	}
	if size, err = s.checkRegular(rel, fd); err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, size, nil
}

// ReadSmall returns the content of a regular file whole if it is shorter than
// limit; else whole is false, and Open is the way to it.
func (s *Sandbox) ReadSmall(rel string, limit int64) (content []byte, whole bool, err error) {
	fd, size, err := s.openRegular(rel)
	if err != nil {
		return nil, false, err
	}
	defer unix.Close(fd)
	if size >= limit {
		return nil, false, nil
	}
	// One byte more than the size: a regular file reads short at its end alone.
	content = make([]byte, size+1)
	n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, content) })
	if err != nil {
		return nil, false, s.refusal(rel, err)
	}
	return content[:n], n <= int(size), nil
}

func ignoringEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// checkRegular returns the size of what is a regular file on the workspace's mount.
func (s *Sandbox) checkRegular(rel string, fd int) (int64, error) {
	var sx unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &sx)
	if err == nil && !s.mount.device && sx.Mask&unix.STATX_MNT_ID != 0 {
		// One system call for both questions.
		if sx.Mnt_id != s.mount.id {
			return 0, s.refusal(rel, unix.EXDEV)
		}
		return int64(sx.Size), s.checkKind(rel, uint32(sx.Mode), uint64(sx.Nlink))
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, s.refusal(rel, err)
	}
	if err := s.checkMount(fd); err != nil {
		return 0, s.refusal(rel, err)
	}
	return st.Size, s.checkStat(rel, st)
}

func (s *Sandbox) checkStat(rel string, st unix.Stat_t) error {
	return s.checkKind(rel, st.Mode, uint64(st.Nlink)) //nolint:unconvert // uint32 on other architectures
}

func (s *Sandbox) checkKind(rel string, mode uint32, links uint64) error {
	var kind string
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		if links > 1 {
			return nucleus.Errorf(nucleus.KindDenied, "%q has %d hard links, and another of its names may lie outside the workspace: copy the file first", rel, links)
		}
		return nil
	case unix.S_IFDIR:
		return nucleus.Errorf(nucleus.KindInvalid, "%q is a directory", rel)
	case unix.S_IFLNK:
		return s.refusal(rel, unix.ELOOP)
	case unix.S_IFIFO:
		kind = "fifo"
	case unix.S_IFSOCK:
		kind = "socket"
	default:
		kind = "device"
	}
	return nucleus.Errorf(nucleus.KindDenied, "%q is a %s, not a regular file", rel, kind)
}

// OpenDir opens a directory for listing or as a command's working directory.
func (s *Sandbox) OpenDir(rel string) (*os.File, error) {
	if err := s.checkBlocked(rel); err != nil {
		return nil, err
	}
	fd, err := s.openStrict(rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "%q is not a directory", rel)
	}
	if err != nil {
		return nil, s.refusal(rel, err)
	}
	return os.NewFile(uintptr(fd), rel), nil
}

// Digest returns the hex SHA-256 of a regular file and its mode, or "" where rel
// does not exist. A file of more than limit bytes is refused as too large.
func (s *Sandbox) Digest(rel string, limit int64) (string, error) {
	file, size, err := s.Open(rel)
	var e *nucleus.Error
	if errors.As(err, &e) && e.Kind == nucleus.KindNotFound {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer file.Close()
	if size > limit {
		return "", nucleus.Errorf(nucleus.KindTooLarge, "%q has %d bytes, at most %d", rel, size, limit)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(file, limit)); err != nil {
		return "", s.refusal(rel, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Replace puts content at rel in one step: whoever reads sees the old content or
// the new, also when every process is killed in between (then a file
// .NAME.*.cal-tmp may be left). Missing directories are made. Mode 0 keeps the mode of the
// existing file, or is 0644.
func (s *Sandbox) Replace(rel string, content []byte, mode uint32) error {
	if err := s.checkBlocked(rel); err != nil {
		return err
	}
	if err := checkWritable(rel); err != nil {
		return err
	}
	parent, err := s.openParent(rel)
	if err != nil {
		return s.refusal(rel, err)
	}
	defer unix.Close(parent)
	name := path.Base(rel)
	var st unix.Stat_t
	err = unix.Fstatat(parent, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
		if mode == 0 {
			mode = 0o644
		}
	case err != nil:
		return s.refusal(rel, err)
	default:
		if err := s.checkStat(rel, st); err != nil {
			return err
		}
		if st.Mode&0o222 == 0 {
			return nucleus.Errorf(nucleus.KindFailed, "%q is read-only (mode %04o)", rel, st.Mode&0o777)
		}
		if mode == 0 {
			mode = st.Mode & 0o777
		}
	}
	return s.replaceIn(parent, name, rel, content, mode)
}

func (s *Sandbox) replaceIn(parent int, name, rel string, content []byte, mode uint32) error {
	temp := fmt.Sprintf(".%.200s.%s.cal-tmp", name, rand.Text()[:8])
	fd, err := unix.Openat(parent, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return s.refusal(rel, err)
	}
	file := os.NewFile(uintptr(fd), temp)
	_, err = file.Write(content)
	if err == nil {
		err = file.Chmod(fs.FileMode(mode))
	}
	// Not fsync: a call that has returned must outlive the processes, which the
	// page cache does; the host's power is not this program's to guard.
	err = errors.Join(err, file.Close())
	if err == nil {
		err = unix.Renameat(parent, temp, parent, name)
	}
	if err != nil {
		_ = unix.Unlinkat(parent, temp, 0)
		return s.refusal(rel, err)
	}
	return nil
}

// openParent opens the directory that holds rel and makes what is missing of
// it.
func (s *Sandbox) openParent(rel string) (int, error) {
	dir := path.Dir(rel)
	fd, err := s.openStrict(dir, unix.O_PATH|unix.O_DIRECTORY)
	if !errors.Is(err, unix.ENOENT) || dir == "." {
		return fd, err
	}
	above, err := s.openParent(dir)
	if err != nil {
		return -1, err
	}
	err = unix.Mkdirat(above, path.Base(dir), 0o755)
	unix.Close(above)
	if err != nil && err != unix.EEXIST {
		return -1, err
	}
	return s.openStrict(dir, unix.O_PATH|unix.O_DIRECTORY)
}
