package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/process"
	"cal/machine"
	"cal/machine/site"
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

const quotaPeriod = 100000 // microseconds, the kernel's own default

// The files that hold the memory limit and quota, in a cgroup of version 2 or 1.
type hierarchy struct {
	memory, cpu string // directories, below the mount point
	limit       string // file in memory
	quota       string // file in cpu
	period      string // what follows the quota in its file; version 1 keeps it elsewhere
}

var (
	unified  = hierarchy{".", ".", "memory.max", "cpu.max", " 100000"}
	separate = hierarchy{"memory", "cpu", "memory.limit_in_bytes", "cpu.cfs_quota_us", ""}
)

func hierarchyAt(mount string) hierarchy {
	if _, err := os.Stat(filepath.Join(mount, "cgroup.controllers")); err == nil {
		return unified
	}
	return separate
}

// makeCgroup makes the cgroup name and returns it, or "" where this process may
// not, or memory and processors cannot be limited in it.
func makeCgroup(mount, name string) (string, error) {
	if name == "" {
		return "", nil
	}
	kind := hierarchyAt(mount)
	for _, dir := range []string{kind.memory, kind.cpu} {
		err := os.Mkdir(filepath.Join(mount, dir, name), 0o755)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return "", removeCgroup(context.Background(), mount, name)
		}
	}
	for _, file := range []string{filepath.Join(kind.memory, name, kind.limit), filepath.Join(kind.cpu, name, kind.quota)} {
		if unix.Access(filepath.Join(mount, file), unix.W_OK) != nil {
			return "", removeCgroup(context.Background(), mount, name)
		}
	}
	return name, nil
}

// setCgroup sets the limits. runsc finds a cgroup that is there, puts the sandbox
// into it before it starts it and tells the guest what it may use, but leaves the
// limits as they are.
func (r record) setCgroup(mount string) error {
	kind := hierarchyAt(mount)
	if r.Cgroup == "" {
		return nil
	}
	if r.Memory > 0 {
		if err := set(filepath.Join(mount, kind.memory, r.Cgroup, kind.limit), fmt.Sprint(r.Memory)); err != nil {
			return err
		}
	}
	if r.CPU > 0 {
		return set(filepath.Join(mount, kind.cpu, r.Cgroup, kind.quota), strconv.Itoa(r.CPU*quotaPeriod)+kind.period)
	}
	return nil
}

// set writes to a file of the kernel's, which must be there.
func set(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// removeCgroup removes the cgroup in every hierarchy. A cgroup stays busy until the kernel
// has let go of its last process.
func removeCgroup(ctx context.Context, mount, name string) error {
	if name == "" {
		return nil
	}
	places, err := filepath.Glob(filepath.Join(mount, "*", name))
	if err != nil {
		return err
	}
	places = append(places, filepath.Join(mount, name))
	for _, place := range places {
		for {
			err := os.Remove(place)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, syscall.EBUSY) {
				return err
			}
			if err := site.Pause(ctx, 2*time.Millisecond); err != nil {
				return fmt.Errorf("cgroup %s is still busy: %w", place, err)
			}
		}
	}
	return nil
}

// checkCgroup reads back what holds for a process: a limit is called enforced
// only when the kernel says so.
func (r record) checkCgroup(mount string, pid int) error {
	if r.Cgroup == "" {
		return nil
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	kind, want := hierarchyAt(mount), []string{"0::/" + r.Cgroup}
	if kind == separate {
		want = []string{":memory:/" + r.Cgroup, ":cpu:/" + r.Cgroup}
	}
	for _, line := range want {
		if !strings.Contains(strings.ReplaceAll(string(data), ":cpu,cpuacct:", ":cpu:"), line+"\n") {
			return fmt.Errorf("sandbox is not in cgroup %s: %q", r.Cgroup, data)
		}
	}
	if r.Memory > 0 {
		if err := holds(filepath.Join(mount, kind.memory, r.Cgroup, kind.limit), r.Memory); err != nil {
			return err
		}
	}
	if r.CPU > 0 {
		return holds(filepath.Join(mount, kind.cpu, r.Cgroup, kind.quota), int64(r.CPU)*quotaPeriod)
	}
	return nil
}

func holds(file string, want int64) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if fields := strings.Fields(string(data)); len(fields) == 0 || fields[0] != strconv.FormatInt(want, 10) {
		return fmt.Errorf("%s is %q, want %d", file, data, want)
	}
	return nil
}

// outOfMemory says whether the kernel has killed in the machine's cgroup.
func (r record) outOfMemory(mount string) bool {
	for _, file := range []string{
		filepath.Join(mount, "memory", r.Cgroup, "memory.oom_control"),
		filepath.Join(mount, r.Cgroup, "memory.events"),
	} {
		data, err := os.ReadFile(file)
		if err != nil || r.Cgroup == "" {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "oom_kill" && fields[1] != "0" {
				return true
			}
		}
	}
	return false
}

// someProcessors returns n of the processors that this thread may use, other
// ones each time, or all where there are no more than n.
func someProcessors(n int) (set unix.CPUSet, err error) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return set, err
	}
	var list []int
	for cpu := range len(allowed) * 64 {
		if allowed.IsSet(cpu) {
			list = append(list, cpu)
		}
	}
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] }) //nolint:gosec // spreads load, hides nothing
	for _, cpu := range list[:min(n, len(list))] {
		set.Set(cpu)
	}
	return set, nil
}

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
