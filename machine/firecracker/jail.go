package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/process"
	"cal/machine"
	"cal/machine/site"
)

// Names in a jail's root, which is all that the Firecracker in it sees.
const (
	apiSocket     = "run/firecracker.socket" // Firecracker's own choice
	vsockSocket   = "vsock"
	consolePipe   = "console"
	logPipe       = "log"
	kernelFile    = "kernel"
	initramfsFile = "initramfs"
	stateFile     = "snapshot.state"
	memoryFile    = "snapshot.memory"
)

const (
	parentCgroup    = "cal-firecracker" // above all machines' groups
	mostDescriptors = 1024
	vmmTasks        = 32 // threads of Firecracker beside one for each processor
)

// jail is where one Firecracker runs, as it stands in the record: its directory, the
// user that it is, and what it may take of the host.
type jail struct {
	Dir  string `json:"-"`    // of the machine
	ID   string `json:"id"`   // of the instance; found in the arguments of every process of it
	Exec string `json:"exec"` // file name of the program
	UID  uint32 `json:"uid"`  // and gid

	Limits   limits `json:"limits"`
	FileSize int64  `json:"file_size,omitempty"` // bytes, the longest file that it may write
}

func (j jail) base() string { return filepath.Join(j.Dir, j.Exec) }
func (j jail) root() string { return filepath.Join(j.base(), j.ID, "root") }

func (j jail) path(name string) string { return filepath.Join(j.root(), name) }

// args of the jailer. Firecracker is never told to do without its seccomp filter.
func (j jail) args(firecracker string) []string {
	id := strconv.FormatUint(uint64(j.UID), 10)
	args := []string{
		"--id", j.ID, "--exec-file", firecracker, "--uid", id, "--gid", id, "--chroot-base-dir", j.Dir,
		"--resource-limit", "no-file=" + strconv.Itoa(mostDescriptors),
	}
	if j.FileSize > 0 {
		args = append(args, "--resource-limit", "fsize="+strconv.FormatInt(j.FileSize, 10))
	}
	args = append(args, "--cgroup-version", strconv.Itoa(j.Limits.Version), "--parent-cgroup", parentCgroup)
	for _, setting := range j.Limits.settings() {
		args = append(args, "--cgroup", setting)
	}
	return append(args, "--new-pid-ns", "--daemonize", "--", "--log-path", "/"+logPipe, "--level", "Info", "--show-level")
}

// make makes the jail's root and the pipes in it. A pipe holds 64 KiB and then takes no
// more: what the guest prints while no node reads is bounded by the kernel.
func (j jail) make() error {
	if err := os.MkdirAll(j.root(), 0o700); err != nil {
		return err
	}
	for _, name := range []string{consolePipe, logPipe} {
		if err := unix.Mkfifo(j.path(name), 0o600); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := j.own(name); err != nil {
			return err
		}
	}
	return nil
}

// own gives a file of the jail to its user.
func (j jail) own(name string) error { return os.Lchown(j.path(name), int(j.UID), int(j.UID)) }

// run runs the jailer, which returns when Firecracker is about to run by itself, in a
// session of its own: the death of the node ends no machine. The network namespace
// is new and stays as the kernel made it.
func (j jail) run(ctx context.Context, jailer, firecracker string) error {
	said := &site.Bounded{}
	cmd := exec.CommandContext(ctx, jailer, j.args(firecracker)...)
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.Stdout, cmd.Stderr = said, said
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("jailer: %w: %s", err, line(site.LastLine(said.String())))
	}
	return nil
}

// find returns the Firecracker of the jail, open, or machine.ErrGone.
func (j jail) find() (process.Process, error) {
	running, err := process.Find(j.ID)
	if err != nil {
		return process.Process{}, err
	}
	return j.firecracker(running)
}

// started is find for one that a jailer has just started: it is in the jail's group, and
// the arguments of all the host's other processes need not be read.
func (j jail) started(mount string) (process.Process, error) {
	pids, err := j.members(mount)
	if err != nil {
		return process.Process{}, err
	}
	var running []process.Process
	for _, pid := range pids {
		if p, ok := process.Open(pid, j.ID); ok {
			running = append(running, p)
		}
	}
	return j.firecracker(running)
}

// firecracker is the one among processes that have the jail's name, of which it closes the
// others.
func (j jail) firecracker(running []process.Process) (process.Process, error) {
	var found []process.Process
	for _, p := range running {
		if p.Name == "/"+j.Exec && j.checkUser(p.PID) == nil {
			found = append(found, p)
			continue
		}
		p.Close() // the jailer, on its way, or somebody who has read the arguments
	}
	if len(found) == 1 {
		return found[0], nil
	}
	for _, p := range found {
		p.Close()
	}
	if len(found) == 0 {
		return process.Process{}, machine.ErrGone
	}
	return process.Process{}, fmt.Errorf("%d processes are the Firecracker of %s", len(found), j.ID)
}

// await waits until the jail's Firecracker answers. The jailer has started it, so it is in
// the jail's group as long as it runs; while it becomes another program, or its parent ends,
// one look may miss it.
func (j jail) await(ctx context.Context, a *api, mount string) (process.Process, error) {
	const looks = 5
	for empty := 0; ; {
		_, err := a.info(ctx)
		if err == nil {
			return j.started(mount)
		}
		var refused *apiError
		if errors.As(err, &refused) {
			return process.Process{}, err
		}
		if members, err := j.members(mount); err != nil || len(members) > 0 {
			empty = 0
		} else if empty++; empty == looks {
			return process.Process{}, fmt.Errorf("%w: firecracker ended before it listened", machine.ErrGone)
		}
		if site.Pause(ctx, time.Millisecond) != nil {
			return process.Process{}, fmt.Errorf("firecracker does not listen: %w", context.Cause(ctx))
		}
	}
}

// ended says whether nothing runs for the jail. A process that is just being made has
// no arguments, but is in the cgroup; one that is not yet in the cgroup has arguments.
func (j jail) ended(mount string) bool {
	running, err := process.Find(j.ID)
	for _, p := range running {
		p.Close()
	}
	members, errMembers := j.members(mount)
	return errors.Join(err, errMembers) == nil && len(running)+len(members) == 0
}

// checkFS refuses a directory on which a jail cannot be.
func checkFS(dir string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return err
	}
	if flags := hindering(stat.Flags); len(flags) > 0 {
		return machine.Refuse("%s lies on a file system mounted %s, where a jail has neither its program nor /dev/kvm; set CAL_HOME to a directory on another", dir, strings.Join(flags, " and "))
	}
	return nil
}

// hindering are the flags of a mount that keep a jail from being there.
func hindering(flags int64) (names []string) {
	if flags&unix.ST_NODEV != 0 {
		names = append(names, "nodev")
	}
	if flags&unix.ST_NOEXEC != 0 {
		names = append(names, "noexec")
	}
	return names
}

// remove ends all that runs for the jail and deletes it. It starts again while
// processes appear: a start that was caught between fork and exec shows up late.
func (j jail) remove(ctx context.Context, mount string) error {
	for {
		if err := process.End(ctx, j.ID); err != nil {
			return err
		}
		if err := j.removeGroup(ctx, mount); err != nil {
			return err
		}
		if err := site.Delete(j.base(), j.ID); err != nil {
			return err
		}
		if err := os.Remove(j.base()); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
		if j.ended(mount) {
			return nil
		}
	}
}
