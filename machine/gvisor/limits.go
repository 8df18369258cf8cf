package gvisor

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/internal/process"
	"cal/machine"
	"cal/nucleus"
)

// limit decides how each resource is kept.
//
//   - cpu: by cgroup quota, else by the processors on which the sandbox may run;
//     both bind from its first instruction.
//   - memory: by cgroup, else watched; watched too where the Spec states none,
//     because a cgroup costs time at each start.
//   - pids: by the sentry, for each user of the machine; the proxy is exempt.
//   - disk: the workspace is a directory of the host, and not limited.
func (r *record) limit(want, usual nucleus.Resources) {
	if want.Pids == 0 {
		want.Pids = usual.Pids
	}
	if want.MemoryMB == 0 {
		want.MemoryMB = usual.MemoryMB
	}
	r.CPU, r.Pids = want.CPU, want.Pids
	limits := map[string]nucleus.Limit{}
	if want.CPU > 0 {
		limits["cpu"] = nucleus.Limit{Resource: "cpu", Value: machine.Value(want.CPU, "cores"), How: machine.Enforced}
	}
	if want.MemoryMB > 0 {
		how := machine.Enforced
		if r.Cgroup != "" {
			r.Memory = int64(want.MemoryMB) << 20
		} else {
			how = machine.Watched
			r.MaxWatch = int64(want.MemoryMB) << 20
		}
		limits["memory"] = nucleus.Limit{Resource: "memory", Value: machine.Value(want.MemoryMB, "MB"), How: how}
	}
	if want.Pids > 0 {
		limits["pids"] = nucleus.Limit{Resource: "pids", Value: machine.Value(want.Pids, "tasks a user"), How: machine.Enforced}
	}
	r.Limits = nil
	for _, name := range machine.Resources {
		limit, ok := limits[name]
		if !ok {
			limit = machine.NoLimit(name)
		}
		r.Limits = append(r.Limits, limit)
	}
}

// usual is what limits a machine whose Spec does not: enough tasks for large
// builds, which cost the host about half a megabyte each, and half of its memory.
func usual(meminfo string) nucleus.Resources {
	limits := nucleus.Resources{Pids: 2048, MemoryMB: leastMemory}
	data, _ := os.ReadFile(meminfo)
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "MemTotal:" {
			if kilobytes, err := strconv.Atoi(fields[1]); err == nil {
				limits.MemoryMB = max(leastMemory, kilobytes>>11)
			}
		}
	}
	return limits
}

// leastMemory, in MB, is where a host does not say how much it has.
const leastMemory = 1024

// groupLimits is what the cgroup is to keep. The sentry runs a thread of the host, or two, for
// each task of the guest; whoever broke out of it finds an end there.
func (r record) groupLimits(spec machine.Spec) cgroup.Limits {
	limits := cgroup.Limits{Memory: int64(spec.Resources.MemoryMB) << 20, CPU: spec.Resources.CPU, Pids: 4*r.Pids + ownThreads, IO: diskRate}
	if disk := cgroup.Disk(spec.Workspace); disk != "" {
		limits.Disks = []string{disk}
	}
	return limits
}

const (
	ownThreads = 1024      // of sentry and gofers
	diskRate   = 512 << 20 // bytes a second; a machine must not take the whole disk
)

// gauge measures the bytes that a sandbox holds: the guest's memory and files in
// memory, all of which lie in memfds that it makes at its start, and the sentry's own.
type gauge struct{ files []*os.File }

// lastDescriptor is up to which number a sandbox's are searched for memfds; those
// come with its start.
const lastDescriptor = 256

// open takes copies of the memfds. /proc/PID/fd would show them to a process of the same
// user only; this asks for the right to trace, which the owner of the sandbox's
// user namespace has.
func (g *gauge) open(sandbox process.Process) error {
	found := false
	err := sandbox.Control(func(pidfd int) error {
		for number := range lastDescriptor {
			fd, err := unix.PidfdGetfd(pidfd, number, 0)
			if errors.Is(err, unix.EBADF) {
				continue
			}
			if err != nil {
				return err
			}
			file := os.NewFile(uintptr(fd), "memory of a sandbox")
			target, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			if !strings.HasPrefix(target, "/memfd:") {
				file.Close()
				continue
			}
			found = found || strings.HasPrefix(target, "/memfd:runsc-memory")
			g.files = append(g.files, file)
		}
		return nil
	})
	if err != nil {
		g.close()
		return fmt.Errorf("descriptors of sandbox %d: %w", sandbox.PID, err)
	}
	if !found {
		g.close()
		return fmt.Errorf("sandbox %d shows no memory of a guest", sandbox.PID)
	}
	return nil
}

func (g *gauge) used(sandbox process.Process) (int64, error) {
	if g.files == nil {
		if err := g.open(sandbox); err != nil {
			return 0, err
		}
	}
	total, err := privateMemory(sandbox.PID)
	for _, file := range g.files {
		var stat unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
			return 0, err
		}
		total += stat.Blocks * 512
	}
	return total, err
}

func (g *gauge) close() {
	for _, file := range g.files {
		file.Close()
	}
	g.files = nil
}

func privateMemory(pid int) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kilobytes, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			return kilobytes << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no RssAnon", pid)
}
