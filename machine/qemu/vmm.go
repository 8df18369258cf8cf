package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/internal/confine"
	"cal/internal/fileid"
	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
)

// Where QEMU finds in its root what it opens by name; all else it is handed open.
const (
	kernelPlace    = "/machine/kernel"
	initramfsPlace = "/machine/initramfs"
	firmwarePlace  = "/machine/firmware"
	modulesPlace   = "/machine/modules"
)

// firmware is what QEMU itself starts a microvm with.
var firmware = []string{"bios-microvm.bin", "linuxboot_dma.bin"}

// program is QEMU with all that it needs to run.
type program struct {
	path  string
	files []confine.File
}

// programs remembers what the loader said of a program, as long as that is the same file.
type programs struct {
	mu    sync.Mutex
	id    fileid.ID
	known program
}

// find returns QEMU, its libraries and its firmware.
func (p *programs) find(ctx context.Context, path string) (program, error) {
	found, err := exec.LookPath(path)
	if err == nil {
		found, err = filepath.EvalSymlinks(found)
	}
	if err != nil {
		return program{}, err
	}
	id, err := fileid.Of(found)
	if err != nil {
		return program{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known.path == found && p.id == id {
		return p.known, nil
	}
	files, err := confine.Libraries(ctx, found)
	if err != nil {
		return program{}, err
	}
	roms, err := findFirmware(ctx, found)
	if err != nil {
		return program{}, err
	}
	p.id, p.known = id, program{found, slices.Concat(files, roms, findModules(found))}
	return p.known, nil
}

// findFirmware asks QEMU where it looks.
func findFirmware(ctx context.Context, path string) ([]confine.File, error) {
	cmd := exec.CommandContext(ctx, path, "-L", "help")
	cmd.Env, cmd.Dir = []string{}, "/"
	output, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s -L help: %w", path, err)
	}
	var found []confine.File
	for _, name := range firmware {
		for dir := range strings.Lines(string(output)) {
			file, err := filepath.EvalSymlinks(filepath.Join(strings.TrimSpace(dir), name))
			if err == nil && filepath.IsAbs(file) {
				found = append(found, confine.File{Host: file, Guest: firmwarePlace + "/" + name})
				break
			}
		}
	}
	if len(found) < len(firmware) {
		return nil, fmt.Errorf("QEMU lacks its firmware %s in %q", strings.Join(firmware, " or "), strings.Fields(string(output)))
	}
	return found, nil
}

// findModules returns the parts of QEMU itself that it loads by name for a microvm: some
// builds have them apart.
func findModules(path string) (found []confine.File) {
	const name = "accel-tcg-x86_64.so"
	for _, pattern := range []string{"../lib*/qemu/", "../lib/*/qemu/"} {
		paths, _ := filepath.Glob(filepath.Join(filepath.Dir(path), pattern, name)) // the pattern is a good one
		if len(paths) > 0 {
			return []confine.File{{Host: paths[0], Guest: modulesPlace + "/" + name}}
		}
	}
	return nil
}

// descriptors are what QEMU is handed, from 3 on, in this order.
type descriptors struct {
	files []*os.File
}

// add returns the number that the file has in QEMU.
func (d *descriptors) add(file *os.File) int {
	d.files = append(d.files, file)
	return 2 + len(d.files)
}

func (d *descriptors) close() {
	for _, file := range d.files {
		file.Close()
	}
}

// listen makes a socket at a path and hands its listening end to QEMU.
func (d *descriptors) listen(path string) (int, error) {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return 0, err
	}
	listener.SetUnlinkOnClose(false)
	defer listener.Close()
	file, err := listener.File()
	if err != nil {
		return 0, err
	}
	return d.add(file), nil
}

// open hands a disk to QEMU. A disk that is written is one machine's alone: the lock
// belongs to the open file and is held as long as QEMU has it, whoever dies.
func (d *descriptors) open(ctx context.Context, disk microvm.Disk) (int, error) {
	flags := os.O_RDWR | unix.O_NOFOLLOW
	if disk.ReadOnly() {
		flags = os.O_RDONLY | unix.O_NOFOLLOW
	}
	file, err := os.OpenFile(disk.Path, flags, 0)
	if err != nil {
		return 0, err
	}
	number := d.add(file)
	for !disk.ReadOnly() {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		// The machine that had it may be on its way out.
		if !errors.Is(err, unix.EWOULDBLOCK) || site.Pause(ctx, lockEvery) != nil {
			return 0, machine.Refuse("%s is another machine's: %v", disk.Path, err)
		}
	}
	return number, nil
}

// arguments of QEMU for a machine. Everything that it would add by itself is switched off:
// there is what stands here, and nothing else.
func (v *vmm) arguments(ctx context.Context, parts microvm.Parts, fds *descriptors) ([]string, error) {
	p, rec := v.place, v.rec
	accelerator, cpu := "kvm", "host"
	tuning := ""
	if rec.Emulated {
		accelerator, cpu = fmt.Sprintf("tcg,thread=multi,tb-size=%d", codeMB), "max"
		if khz := counterKHz(); khz > 0 {
			tuning = fmt.Sprintf("tsc_early_khz=%d lpj=%d no_timer_check ", khz, khz*lpjPerKHz)
		}
	}
	args := []string{
		"-name", rec.tag(p), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-L", firmwarePlace,
		"-M", "microvm,acpi=on,isa-serial=on,mem-merge=off,dump-guest-core=off", "-accel", accelerator, "-cpu", cpu,
		"-smp", strconv.Itoa(rec.Shape.CPUs), "-m", strconv.Itoa(rec.Shape.MemoryMB),
		"-kernel", kernelPlace, "-initrd", initramfsPlace,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t " + tuning + parts.CommandLine("serial", rec.Shape.Pids),
		"-device", "virtio-serial-device,max_ports=3", // the first is reserved for a console
	}
	for _, socket := range []struct{ id, path string }{{"console", consoleSocket}, {"qmp", monitorSocket}, {"wire", wireSocket}, {"wire2", wire2Socket}} {
		fd, err := fds.listen(p.path(socket.path))
		if err != nil {
			return nil, err
		}
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", socket.id, fd))
	}
	args = append(args,
		"-serial", "chardev:console", "-mon", "chardev=qmp,mode=control",
		"-device", "virtserialport,chardev=wire,name=cal.wire", "-device", "virtserialport,chardev=wire2,name=cal.wire2",
		"-object", fmt.Sprintf(`{"qom-type":"throttle-group","id":"rate","limits":{"bps-total":%d}}`, diskRate),
	)
	for i, disk := range parts.Disks {
		fd, err := fds.open(ctx, disk)
		if err != nil {
			return nil, err
		}
		options := "read-only=on"
		if !disk.ReadOnly() {
			options = "read-only=off,discard=unmap"
		}
		flush := "off"
		if disk.Role == microvm.Scratch { // forgotten with the machine
			flush = "on"
		}
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, i+1),
			"-blockdev", fmt.Sprintf("driver=file,node-name=%s-file,filename=/dev/fdset/%d,locking=off,aio=threads,cache.no-flush=%s,%s", disk.Role, i+1, flush, options),
			"-blockdev", fmt.Sprintf("driver=throttle,node-name=%s,throttle-group=rate,file=%[1]s-file,%s", disk.Role, options),
			// A write that the host's disk has no room for fails in the guest, too; by itself QEMU would
			// stop the machine, until somebody lets it go on.
			"-device", fmt.Sprintf("virtio-blk-device,drive=%s,serial=%[1]s,werror=report,rerror=report", disk.Role),
		)
	}
	return args, nil
}

const (
	codeMB    = 128       // of translated code, where all is emulated
	lpjPerKHz = 4         // a kernel of 250 ticks a second: loops of its delay in a tick, taken for one a count
	diskRate  = 512 << 20 // bytes a second, of all disks of a machine together
)

// overheadMB is what QEMU needs beside the guest's memory: itself, threads, the translated code, and
// the host's cache of disks, which the kernel takes back.
func (r record) overheadMB() int {
	if r.Emulated {
		return 128 + codeMB
	}
	return 128
}

// limits of QEMU's cgroup. Its threads are those of processors and of disks.
func (r record) cgroupLimits(p place, workspace string) cgroup.Limits {
	want := cgroup.Limits{
		Memory: int64(r.Shape.MemoryMB+r.overheadMB()) << 20, CPU: r.Shape.CPUs, Pids: r.Shape.CPUs + vmmThreads, IO: diskRate,
	}
	for _, path := range []string{string(p), workspace} {
		if disk := cgroup.Disk(path); disk != "" && !slices.Contains(want.Disks, disk) {
			want.Disks = append(want.Disks, disk)
		}
	}
	return want
}

const (
	vmmThreads  = 96      // QEMU has up to 64 for disks
	addressesMB = 2 << 10 // of address space beside the guest's memory, most of it never touched
)

// plan confines QEMU.
func (r record) plan(qemu program, parts microvm.Parts, args []string) confine.Plan {
	plan := confine.Plan{
		Program: qemu.path, Args: append([]string{"qemu-system-x86_64"}, args...), Env: []string{"QEMU_MODULE_DIR=" + modulesPlace, "MALLOC_ARENA_MAX=2"}, // else its threads take addresses by the GB
		Files: slices.Concat(qemu.files, []confine.File{
			{Host: parts.Kernel.Image, Guest: kernelPlace}, {Host: parts.Initramfs.Path, Guest: initramfsPlace},
		}),
		Devices: []string{"/dev/null", "/dev/urandom"}, ID: r.User,
		Memory: uint64(r.Shape.MemoryMB+addressesMB) << 20, FileSize: parts.Longest(),
	}
	if !r.Emulated {
		plan.Devices = append(plan.Devices, "/dev/kvm")
	}
	return plan
}

// checkWalls reads from the outside, before the guest runs, what holds for QEMU.
func checkWalls(rec record, pid int) error {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	status := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	for key, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapEff": noCapabilities, "CapPrm": noCapabilities, "CapBnd": noCapabilities} {
		if status[key] != want {
			return fmt.Errorf("qemu runs with %s %q, want %q", key, status[key], want)
		}
	}
	// One is that of package confine; QEMU puts its own over it.
	if filters, told := status["Seccomp_filters"]; told && (filters == "0" || filters == "1") {
		return fmt.Errorf("qemu runs with %s seccomp filters, want its own too", filters)
	}
	user := uint32(os.Getuid())
	switch {
	case rec.Map != nil:
		user = rec.Map.Outer(rec.User)
	case rec.User != 0:
		user = rec.User
	}
	if ids := strings.Fields(status["Uid"]); len(ids) != 4 || slices.ContainsFunc(ids, func(id string) bool { return id != strconv.FormatUint(uint64(user), 10) }) {
		return fmt.Errorf("qemu is user %q, want %d", status["Uid"], user)
	}
	// In a namespace of one id nobody may give groups up.
	if groups := status["Groups"]; groups != "" && rec.User != 0 {
		return fmt.Errorf("qemu has the groups %s, want none", groups)
	}
	spaces := []string{"mnt", "pid", "net", "ipc", "uts"}
	if os.Geteuid() != 0 {
		spaces = append(spaces, "user")
	}
	for _, space := range spaces {
		own, err := os.Readlink("/proc/self/ns/" + space)
		if err != nil {
			return err
		}
		if theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, space)); err != nil || theirs == own {
			return fmt.Errorf("qemu shares the %s namespace: %q, %w", space, theirs, err)
		}
	}
	return nil
}

const noCapabilities = "0000000000000000"
