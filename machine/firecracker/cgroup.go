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

	"cal/machine/site"
)

const quotaPeriod = 100000 // microseconds, the kernel's own default

// controllers that a machine's cgroup needs.
var controllers = []string{"memory", "cpu", "pids"}

// cgroupVersion says which kind of cgroups can limit a machine; 0: none.
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

// cgroupSettings are the files of a machine's cgroup and what the jailer writes into
// them before Firecracker is there; memory in bytes, tasks of the host.
func cgroupSettings(version, cpus int, memory int64, tasks int) []string {
	limit, quota, period := "memory.max", "cpu.max", " "+strconv.Itoa(quotaPeriod)
	if version == 1 {
		limit, quota, period = "memory.limit_in_bytes", "cpu.cfs_quota_us", ""
	}
	return []string{
		limit + "=" + strconv.FormatInt(memory, 10),
		quota + "=" + strconv.Itoa(cpus*quotaPeriod) + period,
		"pids.max=" + strconv.Itoa(tasks),
	}
}

// cgroupDir is the directory of the jail's cgroup in which a file is.
func (j jail) cgroupDir(mount, file string) string {
	if j.CgroupVersion == 1 {
		controller, _, _ := strings.Cut(file, ".")
		mount = filepath.Join(mount, controller)
	}
	return filepath.Join(mount, parentCgroup, j.ID)
}

// checkCgroup reads back that a process is in the jail's cgroup and what limits it: a
// limit is called enforced only when the kernel says so.
func (j jail) checkCgroup(mount string, pid int) error {
	for _, setting := range j.Cgroup {
		file, want, _ := strings.Cut(setting, "=")
		dir := j.cgroupDir(mount, file)
		got, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(got)) != want {
			return fmt.Errorf("%s is %q, want %q", filepath.Join(dir, file), got, want)
		}
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return err
		}
		if !slices.Contains(strings.Fields(string(procs)), strconv.Itoa(pid)) {
			return fmt.Errorf("firecracker is not in cgroup %s", dir)
		}
	}
	return nil
}

// outOfMemory says whether the kernel has killed in the jail's cgroup.
func (j jail) outOfMemory(mount string) bool {
	dir, file := j.cgroupDir(mount, "memory."), "memory.events"
	if j.CgroupVersion == 1 {
		file = "memory.oom_control"
	}
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "oom_kill" && fields[1] != "0" {
			return true
		}
	}
	return false
}

// members are the processes of the host in the jail's cgroup.
func (j jail) members(mount string) ([]int, error) {
	if len(j.Cgroup) == 0 {
		return nil, nil
	}
	data, err := os.ReadFile(filepath.Join(j.cgroupDir(mount, j.Cgroup[0]), "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) { // being removed
		return nil, nil
	}
	var pids []int
	for _, text := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(text); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// removeCgroup kills who is still in the cgroup, a process that was between fork and
// exec, and removes it in every hierarchy. It stays busy until the kernel has let go of
// its last process.
func (j jail) removeCgroup(ctx context.Context, mount string) error {
	for _, setting := range j.Cgroup {
		dir := j.cgroupDir(mount, setting)
		for {
			err := os.Remove(dir)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, syscall.EBUSY) {
				return err
			}
			pids, err := j.members(mount)
			if err != nil {
				return err
			}
			for _, pid := range pids {
				_ = syscall.Kill(pid, syscall.SIGKILL) // one that has ended is as good
			}
			if err := site.Pause(ctx, 2*time.Millisecond); err != nil {
				return fmt.Errorf("cgroup %s is still busy: %w", dir, err)
			}
		}
	}
	return nil
}
