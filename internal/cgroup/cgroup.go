// Package cgroup keeps the processes of a machine within limits that the host's
// kernel enforces, in control groups of version 2 or 1.
//
// Claim: what a Group says that it keeps holds for whatever is in it, and for all that
// it starts. Threat: a file can be written and mean nothing: a controller is missing,
// belongs to the other version, or is not handed down. Promise: each limit is read back; one that
// the kernel does not confirm is not kept, and memory and processors that cannot be
// limited make no group at all.
package cgroup

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
)

// Mount is where a host has its control groups.
const Mount = "/sys/fs/cgroup"

// Limits are of a whole group. Zero: unlimited.
type Limits struct {
	Memory int64    // bytes, swap among them
	CPU    int      // processors' time
	Pids   int      // processes and threads
	IO     int64    // bytes a second read from, and written to, each disk
	Disks  []string // whose IO is limited, as Disk names them
}

// What a group keeps where it can.
const (
	Pids = "pids"
	IO   = "io"
)

// Group is a control group. The zero value is none.
type Group struct {
	Name string   `json:"name"`           // below the mount point
	Kept []string `json:"kept,omitempty"` // of Pids and IO, those that are limited; memory and processors always are
}

// Keeps reports whether the group limits something of which not every host is able.
func (g Group) Keeps(what string) bool { return slices.Contains(g.Kept, what) }

const quotaPeriod = 100000 // microseconds, the kernel's own default

// kind is a version's names of directories below the mount point and of files.
type kind struct {
	memory, cpu, pids, io string // directories

	limit, swap string // of memory
	quota       string
	period      string // what follows the quota in its file; version 1 keeps it elsewhere
	weight      string
	weightOf1   int // the usual one, of a group that has a processor's time
	throttle    []string
	rate        string // a line of throttle: device, bytes a second
	swapIsSum   bool
}

var (
	unified = kind{
		memory: ".", cpu: ".", pids: ".", io: ".", limit: "memory.max", swap: "memory.swap.max", quota: "cpu.max", period: " 100000",
		weight: "cpu.weight", weightOf1: 100,
		throttle: []string{"io.max"}, rate: "%s rbps=%d wbps=%[2]d",
	}
	separate = kind{
		memory: "memory", cpu: "cpu", pids: "pids", io: "blkio", limit: "memory.limit_in_bytes", swap: "memory.memsw.limit_in_bytes", quota: "cpu.cfs_quota_us",
		weight: "cpu.shares", weightOf1: 1024,
		throttle: []string{"blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"}, rate: "%s %d", swapIsSum: true,
	}
)

func kindAt(mount string) *kind {
	if _, err := os.Stat(filepath.Join(mount, "cgroup.controllers")); err == nil {
		return &unified
	}
	return &separate
}

// Make makes the group name with these limits. The zero Group without an error says
// that this process may not, or that memory and processors cannot be limited in it.
func Make(mount, name string, want Limits) (Group, error) {
	k := kindAt(mount)
	if k == &unified {
		handDown(mount)
	}
	for _, dir := range []string{k.memory, k.cpu} {
		err := os.Mkdir(filepath.Join(mount, dir, name), 0o755)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return Group{}, Remove(context.Background(), mount, name)
		}
	}
	for _, file := range []string{k.file(mount, k.memory, name, k.limit), k.file(mount, k.cpu, name, k.quota)} {
		if unix.Access(file, unix.W_OK) != nil {
			return Group{}, Remove(context.Background(), mount, name)
		}
	}
	g := Group{Name: name}
	if err := g.set(mount, k, want); err != nil {
		return Group{}, errors.Join(err, Remove(context.Background(), mount, name))
	}
	if want.Pids > 0 && k.setPids(mount, name, want.Pids) == nil {
		g.Kept = append(g.Kept, Pids)
	}
	if want.IO > 0 && len(want.Disks) > 0 && k.setIO(mount, name, want) == nil {
		g.Kept = append(g.Kept, IO)
	}
	return g, nil
}

// handDown has the root's controllers work in groups below it. What the kernel refuses
// shows when the limits are set.
func handDown(mount string) {
	control := filepath.Join(mount, "cgroup.subtree_control")
	data, _ := os.ReadFile(control)
	for _, controller := range []string{"memory", "cpu", "pids", "io"} {
		if !slices.Contains(strings.Fields(string(data)), controller) { // writing waits for groups that are being removed
			_ = set(control, "+"+controller)
		}
	}
}

func (k *kind) file(mount, dir, name, file string) string {
	return filepath.Join(mount, dir, name, file)
}

// setting is a file of a group and what is written into it.
type setting struct {
	dir, file, value string
	optional         bool // not every kernel has the file
}

// settings limit memory and processors, in the order in which they are to be written.
func (k *kind) settings(want Limits) (settings []setting) {
	if want.Memory > 0 {
		settings = append(settings, setting{k.memory, k.limit, fmt.Sprint(want.Memory), false},
			setting{k.memory, k.swap, fmt.Sprint(k.mostSwap(want)), true})
	}
	if want.CPU > 0 {
		// Where processors are scarce the group counts for as many as it may use, or it would be one task among all.
		settings = append(settings, setting{k.cpu, k.weight, strconv.Itoa(want.CPU * k.weightOf1), true},
			setting{k.cpu, k.quota, strconv.Itoa(want.CPU*quotaPeriod) + k.period, false})
	}
	return settings
}

// mostSwap is what stands in the file for swap. Else what does not fit would go there,
// without end.
func (k *kind) mostSwap(want Limits) int64 {
	if k.swapIsSum {
		return want.Memory
	}
	return 0
}

func (g Group) set(mount string, k *kind, want Limits) error {
	for _, s := range k.settings(want) {
		if err := set(k.file(mount, s.dir, g.Name, s.file), s.value); err != nil && !(s.optional && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// Settings are what another program has to write, as FILE=VALUE, that makes a group by
// itself on a host of this Version; swap says whether CanForbidSwap.
func Settings(version int, want Limits, swap bool) (settings []string) {
	k := &unified
	if version == 1 {
		k = &separate
	}
	for _, s := range k.settings(want) {
		if swap || s.file != k.swap {
			settings = append(settings, s.file+"="+s.value)
		}
	}
	if want.Pids > 0 {
		settings = append(settings, pidsFile+"="+strconv.Itoa(want.Pids))
	}
	return settings
}

const pidsFile = "pids.max" // in either version

// Controllers are those without which a group is not limited in all that Version asks for.
var Controllers = []string{"memory", "cpu", "pids"}

// Version says which kind of control groups has all of Controllers; 0: none.
func Version(mount string) int {
	if data, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers")); err == nil {
		has := strings.Fields(string(data))
		if slices.ContainsFunc(Controllers, func(name string) bool { return !slices.Contains(has, name) }) {
			return 0
		}
		return 2
	}
	for _, name := range Controllers {
		if _, err := os.Stat(filepath.Join(mount, name, "cgroup.procs")); err != nil {
			return 0
		}
	}
	return 1
}

// CanForbidSwap makes the group parent and says whether those below it can be kept from
// swap.
func CanForbidSwap(mount, parent string) bool {
	k, within := kindAt(mount), "" // each group of version 1 has the file, the topmost too
	if k == &unified {
		handDown(mount)
		within = parent
		if err := os.Mkdir(filepath.Join(mount, parent), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return false
		}
	}
	_, err := os.Stat(k.file(mount, k.memory, within, k.swap))
	return err == nil
}

// Members are the processes in a group; none where there is no such group.
func Members(mount, name string) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(mount, kindAt(mount).memory, name, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) { // being removed
		return nil, nil
	}
	var pids []int
	for _, text := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(text); err == nil && pid > 0 { // 0 is one that this pid namespace does not see
			pids = append(pids, pid)
		}
	}
	return pids, err
}

func (k *kind) setPids(mount, name string, most int) error {
	if err := os.Mkdir(filepath.Join(mount, k.pids, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	file := k.file(mount, k.pids, name, pidsFile)
	return errors.Join(set(file, strconv.Itoa(most)), holds(file, int64(most)))
}

func (k *kind) setIO(mount, name string, want Limits) error {
	if err := os.Mkdir(filepath.Join(mount, k.io, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, throttle := range k.throttle {
		for _, disk := range want.Disks {
			line := fmt.Sprintf(k.rate, disk, want.IO)
			file := k.file(mount, k.io, name, throttle)
			if err := set(file, line); err != nil {
				return err
			}
			if data, err := os.ReadFile(file); err != nil || !strings.Contains(string(data), line) {
				return fmt.Errorf("%s is %q, want %q: %w", file, data, line, err)
			}
		}
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

// dirs are where the group's files lie, the unified one once.
func (g Group) dirs(mount string) []string {
	k := kindAt(mount)
	dirs := []string{filepath.Join(mount, k.memory, g.Name), filepath.Join(mount, k.cpu, g.Name)}
	if g.Keeps(Pids) {
		dirs = append(dirs, filepath.Join(mount, k.pids, g.Name))
	}
	if g.Keeps(IO) {
		dirs = append(dirs, filepath.Join(mount, k.io, g.Name))
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// Join puts a process into the group. The caller sees to it that it has not started
// anything yet.
func (g Group) Join(mount string, pid int) error {
	if g.Name == "" {
		return nil
	}
	for _, dir := range g.dirs(mount) {
		if err := set(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("cgroup %s: %w", g.Name, err)
		}
	}
	return nil
}

// Check reads back what holds for a process: a limit is called enforced only when
// the kernel says so.
func (g Group) Check(mount string, pid int, want Limits) error {
	if g.Name == "" {
		return nil
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	k := kindAt(mount)
	for _, controller := range g.controllers(k) {
		if !isIn(string(data), controller, g.Name) {
			return fmt.Errorf("process %d is not in cgroup %s: %q", pid, g.Name, data)
		}
	}
	if want.Memory > 0 {
		if err := holds(k.file(mount, k.memory, g.Name, k.limit), want.Memory); err != nil {
			return err
		}
		if err := holds(k.file(mount, k.memory, g.Name, k.swap), k.mostSwap(want)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if want.CPU > 0 {
		if err := holds(k.file(mount, k.cpu, g.Name, k.quota), int64(want.CPU)*quotaPeriod); err != nil {
			return err
		}
	}
	if g.Keeps(Pids) {
		return holds(k.file(mount, k.pids, g.Name, pidsFile), int64(want.Pids))
	}
	return nil
}

func (g Group) controllers(k *kind) []string {
	if k == &unified {
		return []string{""}
	}
	controllers := []string{"memory", "cpu"}
	if g.Keeps(Pids) {
		controllers = append(controllers, "pids")
	}
	if g.Keeps(IO) {
		controllers = append(controllers, "blkio")
	}
	return controllers
}

// isIn reads lines ID:CONTROLLER,CONTROLLER:/PATH; version 2 names no controller.
func isIn(table, controller, name string) bool {
	for line := range strings.Lines(table) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 && fields[2] == "/"+name && slices.Contains(strings.Split(fields[1], ","), controller) {
			return true
		}
	}
	return false
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

// OutOfMemory says whether the kernel has killed in the group.
func (g Group) OutOfMemory(mount string) bool {
	for _, file := range []string{
		filepath.Join(mount, "memory", g.Name, "memory.oom_control"),
		filepath.Join(mount, g.Name, "memory.events"),
	} {
		data, err := os.ReadFile(file)
		if err != nil || g.Name == "" {
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

// Remove removes the group name in every hierarchy. A group stays busy until the kernel
// has let go of its last process.
func Remove(ctx context.Context, mount, name string) error {
	if name == "" {
		return nil
	}
	places, err := filepath.Glob(filepath.Join(mount, "*", name))
	if err != nil {
		return err
	}
	for _, place := range append(places, filepath.Join(mount, name)) {
		for {
			err := os.Remove(place)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, syscall.EBUSY) {
				return err
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("cgroup %s is still busy: %w", place, ctx.Err())
			case <-time.After(2 * time.Millisecond):
			}
		}
	}
	return nil
}

// Disk returns the number, as MAJOR:MINOR, of the disk on which a file lies; "" where
// the kernel can limit none, because the file system lies on several or on none.
func Disk(path string) string {
	var stat unix.Stat_t
	if unix.Stat(path, &stat) != nil {
		return ""
	}
	device := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev))
	target, err := filepath.EvalSymlinks(device)
	if err != nil {
		return ""
	}
	if _, err := os.Stat(filepath.Join(target, "partition")); err == nil {
		target = filepath.Dir(target) // limits are of whole disks
	}
	number, err := os.ReadFile(filepath.Join(target, "dev"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(number))
}
