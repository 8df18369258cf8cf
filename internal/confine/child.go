package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Main is the child of Start. Every program that confines calls it first; it
// returns at once in any other process.
func Main() {
	if len(os.Args) != 3 || os.Args[1] != childName {
		return
	}
	runtime.LockOSThread() // what follows is the thread's, and becomes the program's
	// Out of the way of the program's descriptors; it is closed when the program runs.
	socket, err := unix.FcntlInt(3, unix.F_DUPFD_CLOEXEC, aside)
	if err != nil {
		os.Exit(2) // nobody there
	}
	err = become(socket)
	_, _ = unix.Write(socket, []byte(err.Error()))
	os.Exit(1)
}

func isEOF(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) }

// become returns only with an error.
func become(socket int) error {
	message, files, err := receive(socket)
	if err != nil {
		return err
	}
	var plan Plan
	if err := json.Unmarshal(message, &plan); err != nil {
		return fmt.Errorf("plan: %w", err)
	}
	for _, wall := range []struct {
		name  string
		build func() error
	}{
		{"root", plan.buildRoot},
		{"limits of the process", plan.limit},
		{"user", plan.dropUser},
		{"seccomp filter", loadFilter},
		{"descriptors", func() error { return keepDescriptors(files) }},
	} {
		if err := wall.build(); err != nil {
			return fmt.Errorf("%s: %w", wall.name, err)
		}
	}
	return fmt.Errorf("%s: %w", plan.Program, unix.Exec(plan.Program, plan.Args, plan.Env))
}

const mostFiles = 32

func receive(socket int) (message []byte, files []int, err error) {
	if err := unix.SetNonblock(socket, false); err != nil {
		return nil, nil, err
	}
	message, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*mostFiles))
	n, rn, flags, _, err := unix.Recvmsg(socket, message, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n == 0 || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, nil, fmt.Errorf("no plan came (%d bytes, flags %#x): %w", n, flags, err)
	}
	controls, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		return nil, nil, err
	}
	for _, control := range controls {
		fds, err := unix.ParseUnixRights(&control)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, fds...)
	}
	return message[:n], files, nil
}

// stage is over what the new root is built. Whatever it hides is hidden in this mount
// namespace only, and all that is shown has been opened before.
const stage = "/dev"

// buildRoot leaves the child in a root that holds what the plan shows.
func (p Plan) buildRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of its own: %w", err)
	}
	shown := slices.Clone(p.Files)
	for _, device := range p.Devices {
		shown = append(shown, File{device, device})
	}
	sources, err := openAll(shown)
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=1m"); err != nil {
		return fmt.Errorf("tmpfs: %w", err)
	}
	for i, file := range shown {
		if err := p.show(sources[i], file, i >= len(p.Files)); err != nil {
			return fmt.Errorf("showing %s: %w", file.Host, err)
		}
	}
	if err := unix.Mount("", stage, "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=1m"); err != nil {
		return fmt.Errorf("read-only: %w", err)
	}
	if err := unix.Chdir(stage); err != nil {
		return err
	}
	// The old root comes to lie over the new one, and is let go.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("the old root: %w", err)
	}
	return unix.Chdir("/")
}

func openAll(files []File) ([]int, error) {
	var fds []int
	for _, file := range files {
		if !filepath.IsAbs(file.Guest) || filepath.Clean(file.Guest) != file.Guest {
			return nil, fmt.Errorf("%q is not a clean absolute path", file.Guest)
		}
		fd, err := unix.Open(file.Host, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file.Host, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// show lays a file over an empty one of the stage.
func (p Plan) show(fd int, file File, device bool) error {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	at := filepath.Join(stage, file.Guest)
	if err := mkdirAll(filepath.Dir(at)); err != nil {
		return err
	}
	if device {
		if stat.Mode&unix.S_IFMT != unix.S_IFCHR {
			return errors.New("it is no device")
		}
		// The host's root gives the device to the program's user; others have no
		// right to make one, and get it with the host's own mode.
		if unix.Mknod(at, unix.S_IFCHR|0o600, int(stat.Rdev)) == nil {
			return unix.Lchown(at, int(p.ID), int(p.ID))
		}
	}
	make := func() error {
		fd, err := unix.Open(at, unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	}
	if stat.Mode&unix.S_IFMT == unix.S_IFDIR {
		make = func() error { return unix.Mkdir(at, 0o755) }
	}
	if err := make(); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), at, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if device {
		return nil
	}
	return remountReadOnly(at)
}

func mkdirAll(dir string) error {
	path := stage
	for _, name := range strings.Split(strings.TrimPrefix(dir, stage), "/") {
		if name == "" {
			continue
		}
		path += "/" + name
		if err := unix.Mkdir(path, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return nil
}

// remountReadOnly keeps what the mount below forbids: a user namespace may not allow it.
func remountReadOnly(at string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(at, &stat); err != nil {
		return err
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV)
	if stat.Flags&unix.ST_NOEXEC != 0 {
		flags |= unix.MS_NOEXEC
	}
	return unix.Mount("", at, "", flags, "")
}

func (p Plan) limit() error {
	limits := map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: mostOpen}
	if p.Memory > 0 {
		limits[unix.RLIMIT_AS] = p.Memory
	}
	if p.FileSize > 0 {
		limits[unix.RLIMIT_FSIZE] = p.FileSize
	}
	for resource, most := range limits {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: most, Max: most}); err != nil {
			return fmt.Errorf("%d to %d: %w", resource, most, err)
		}
	}
	return nil
}

// dropUser gives up every capability, the groups and the user, for good. It works on
// this thread alone, which is the one that becomes the program.
func (p Plan) dropUser() error {
	for capability := range uintptr(64) {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("bounding set: %w", err)
		}
	}
	// Without these, uid 0 of a namespace would get capabilities again by exec.
	const secure = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<7 // noroot, no_setuid_fixup, keep_caps off, no_cap_ambient_raise, each locked
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secure, 0, 0, 0); err != nil {
		return fmt.Errorf("securebits: %w", err)
	}
	if p.ID != 0 {
		if err := call(unix.SYS_SETGROUPS, 0, 0, 0); err != nil {
			return fmt.Errorf("groups: %w", err)
		}
		id := uintptr(p.ID)
		if err := errors.Join(call(unix.SYS_SETRESGID, id, id, id), call(unix.SYS_SETRESUID, id, id, id)); err != nil {
			return fmt.Errorf("becoming %d: %w", p.ID, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient capabilities: %w", err)
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// call is a system call of this thread; package syscall's would be all threads'.
func call(number, a, b, c uintptr) error {
	if _, _, errno := unix.RawSyscall(number, a, b, c); errno != 0 {
		return errno
	}
	return nil
}

// The program may open mostOpen descriptors; the child keeps its own from aside on.
const (
	mostOpen = 1024
	aside    = 500
)

// keepDescriptors leaves the program 0, 1, 2 and the files, from 3 on.
func keepDescriptors(files []int) error {
	var moved []int
	for _, fd := range files {
		to, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, aside)
		if err != nil {
			return err
		}
		moved = append(moved, to)
	}
	for fd := 3; fd < mostOpen; fd++ {
		unix.CloseOnExec(fd)
	}
	for i, fd := range moved {
		if err := unix.Dup3(fd, 3+i, 0); err != nil {
			return err
		}
	}
	return nil
}
