package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/machine/site"
)

// The jailer makes a machine's control group, below one for all, sets its limits and
// joins it before there is a Firecracker. What holds is then read back.

const quotaPeriod = 100000 // microseconds, the kernel's own default

// controllers that a machine's group needs.
var controllers = []string{"memory", "cpu", "pids"}

// limits of a machine's group.
type limits struct {
	Version int   `json:"version"` // of control groups
	Memory  int64 `json:"memory"`  // bytes
	NoSwap  bool  `json:"no_swap"` // where the kernel can
	CPUs    int   `json:"cpus"`
	Tasks   int   `json:"tasks"` // of the host: threads of Firecracker
}

// cgroupVersion says which kind of control groups can limit a machine; 0: none.
func cgroupVersion(mount string) int {
	if data, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers")); err == nil {
		has := strings.Fields(string(data))
		if slices.ContainsFunc(controllers, func(name string) bool { return !slices.Contains(has, name) }) {
			return 0
		}
		return 2
	}
	for _, name := range controllers {
		if _, err := os.Stat(filepath.Join(mount, name, "cgroup.procs")); err != nil {
			return 0
		}
	}
	return 1
}

// canForbidSwap makes the group above all machines' and says whether those below it can
// be kept from swap.
func canForbidSwap(mount string, version int) bool {
	if version == 1 {
		_, err := os.Stat(filepath.Join(mount, "memory", "memory.memsw.limit_in_bytes"))
		return err == nil
	}
	for _, controller := range controllers { // what is refused shows in what is missing below
		_ = os.WriteFile(filepath.Join(mount, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
	if err := os.Mkdir(filepath.Join(mount, parentCgroup), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return false
	}
	_, err := os.Stat(filepath.Join(mount, parentCgroup, "memory.swap.max"))
	return err == nil
}

// settings are the files of the group and what the jailer writes into them.
func (l limits) settings() []string {
	memory, cpus := strconv.FormatInt(l.Memory, 10), strconv.Itoa(l.CPUs*quotaPeriod)
	settings := []string{"memory.max=" + memory}
	swap, quota := "memory.swap.max=0", "cpu.max="+cpus+" "+strconv.Itoa(quotaPeriod)
	if l.Version == 1 {
		settings = []string{"memory.limit_in_bytes=" + memory}
		swap, quota = "memory.memsw.limit_in_bytes="+memory, "cpu.cfs_quota_us="+cpus
	}
	if l.NoSwap {
		settings = append(settings, swap)
	}
	return append(settings, quota, "pids.max="+strconv.Itoa(l.Tasks))
}

func (j jail) group() cgroup.Group {
	return cgroup.Group{Name: parentCgroup + "/" + j.ID, Kept: []string{cgroup.Pids}}
}

// checkGroup reads back that a process is in the jail's group and what limits it: a limit
// is called enforced only when the kernel says so.
func (j jail) checkGroup(mount string, pid int) error {
	return j.group().Check(mount, pid, cgroup.Limits{Memory: j.Limits.Memory, CPU: j.Limits.CPUs, Pids: j.Limits.Tasks})
}

// members are the processes in the jail's group.
func (j jail) members(mount string) ([]int, error) {
	if j.Limits.Version == 1 {
		mount = filepath.Join(mount, "memory")
	}
	data, err := os.ReadFile(filepath.Join(mount, parentCgroup, j.ID, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) { // being removed
		return nil, nil
	}
	var pids []int
	for _, text := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(text); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// removeGroup kills who is still in the group, a process that was between fork and exec,
// and removes it.
func (j jail) removeGroup(ctx context.Context, mount string) error {
	for {
		pids, err := j.members(mount)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return cgroup.Remove(ctx, mount, j.group().Name)
		}
		for _, pid := range pids {
			j.killMember(mount, pid)
		}
		if err := site.Pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("processes %v of machine %s do not end: %w", pids, j.ID, err)
		}
	}
}

// killMember kills a process that is in the group when it is held, so that its number is
// nobody else's. One that has ended is as good.
func (j jail) killMember(mount string, pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if pids, err := j.members(mount); err == nil && slices.Contains(pids, pid) {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}
