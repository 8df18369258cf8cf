package firecracker

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/machine/site"
)

// The jailer makes a machine's control group, below one for all, sets its limits and
// joins it before there is a Firecracker. What holds is then read back.

// limits of a machine's group.
type limits struct {
	Version int   `json:"version"` // of control groups
	Memory  int64 `json:"memory"`  // bytes
	NoSwap  bool  `json:"no_swap"` // where the kernel can
	CPUs    int   `json:"cpus"`
	Tasks   int   `json:"tasks"` // of the host: threads of Firecracker
}

func (l limits) all() cgroup.Limits {
	return cgroup.Limits{Memory: l.Memory, CPU: l.CPUs, Pids: l.Tasks}
}

// settings are the files of the group and what the jailer writes into them.
func (l limits) settings() []string { return cgroup.Settings(l.Version, l.all(), l.NoSwap) }

func (j jail) group() cgroup.Group {
	return cgroup.Group{Name: parentCgroup + "/" + j.ID, Kept: []string{cgroup.Pids}}
}

// checkGroup reads back that a process is in the jail's group and what limits it: a limit
// is called enforced only when the kernel says so.
func (j jail) checkGroup(mount string, pid int) error {
	return j.group().Check(mount, pid, j.Limits.all())
}

// members are the processes in the jail's group.
func (j jail) members(mount string) ([]int, error) { return cgroup.Members(mount, j.group().Name) }

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
