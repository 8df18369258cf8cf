package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// commandLine is what the kernel's command line says to the first process.
type commandLine struct {
	disks []string // roles, in the order of the devices
	wire  string   // "serial" or "vsock"
	tasks uint64   // that each user may have; 0: as the kernel has it
}

const (
	wireSerial = "serial"
	wireVsock  = "vsock"
)

func readCommandLine() (commandLine, error) {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return commandLine{}, err
	}
	return parseCommandLine(string(text))
}

func parseCommandLine(text string) (commandLine, error) {
	var line commandLine
	for _, word := range strings.Fields(text) {
		switch name, value, _ := strings.Cut(word, "="); name {
		case "cal.disks":
			line.disks = strings.Split(value, ",")
		case "cal.wire":
			line.wire = value
		case "cal.tasks":
			tasks, err := strconv.ParseUint(value, 10, 32)
			if err != nil || tasks == 0 {
				return line, fmt.Errorf("cal.tasks=%q on the kernel's command line is no number of tasks", value)
			}
			line.tasks = tasks
		}
	}
	if line.wire != wireSerial && line.wire != wireVsock {
		return line, fmt.Errorf("cal.wire=%q on the kernel's command line: want %s or %s", line.wire, wireSerial, wireVsock)
	}
	roles := map[string]bool{}
	for _, role := range line.disks {
		if known := role == diskRoot || role == diskLayers || role == diskWorkspace || role == diskScratch; !known || roles[role] {
			return line, fmt.Errorf("cal.disks=%q on the kernel's command line: %q is unknown or twice there", strings.Join(line.disks, ","), role)
		}
		roles[role] = true
	}
	for _, role := range []string{diskRoot, diskWorkspace, diskScratch} {
		if !roles[role] {
			return line, fmt.Errorf("cal.disks=%q on the kernel's command line lacks %s", strings.Join(line.disks, ","), role)
		}
	}
	return line, nil
}

// earlyMounts makes the initial file system usable: what the kernel says, and its devices.
func earlyMounts() error {
	for _, m := range []struct{ fstype, place string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.place, 0o755); err != nil {
			return err
		}
		if err := mount(m.fstype, m.place, m.fstype, unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
			return err
		}
	}
	console, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil // a machine without one is silent
	}
	for fd := range 3 {
		if err := unix.Dup2(console, fd); err != nil {
			return err
		}
	}
	if console > 2 {
		unix.Close(console)
	}
	return nil
}

// loadModules loads what the initial file system holds, in the order of its list, and frees
// the memory of the files. One that does not load is said; what is missed without it
// refuses to serve later.
func loadModules() {
	list, err := os.ReadFile("/modules")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		slog.Error("list of modules", "error", err)
	}
	for _, name := range strings.Fields(string(list)) {
		if err := loadModule(name); err != nil && !errors.Is(err, unix.EEXIST) {
			slog.Error("module", "name", name, "error", err)
		}
	}
	os.RemoveAll("/lib/modules")
	os.Remove("/modules")
}

func loadModule(name string) error {
	file, err := os.Open(filepath.Join("/", name))
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}

// addEntropy gives the kernel's random numbers what no other machine has, and has them begin anew
// from it at once. By itself the kernel takes up what was added within a minute (Linux 6.1:
// crng_reseed_interval): until then two machines of one snapshot would draw the same numbers.
func addEntropy(entropy []byte) error {
	pool, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer pool.Close()
	if err := creditEntropy(pool, entropy); err != nil {
		return fmt.Errorf("adding entropy: %w", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, pool.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return fmt.Errorf("reseeding the random numbers: %w", errno)
	}
	return nil
}

// creditEntropy adds to the kernel's pool, counted in full.
func creditEntropy(pool *os.File, entropy []byte) error {
	// struct rand_pool_info: bits, bytes, then the bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(entropy)*8))
	info = append(binary.NativeEndian.AppendUint32(info, uint32(len(entropy))), entropy...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, pool.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return errno
	}
	return nil
}

// tolerated is by how much the clock may differ without being set: a program that runs
// should not see it jump for nothing.
const tolerated = 50 * time.Millisecond

func setClock(now time.Time) error {
	if off := time.Until(now); off > -tolerated && off < tolerated {
		return nil
	}
	spec := unix.NsecToTimespec(now.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &spec); err != nil {
		return fmt.Errorf("setting the clock to %s: %w", now.UTC().Format(time.RFC3339), err)
	}
	return nil
}

func uptime() time.Duration {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return 0
	}
	return time.Duration(now.Nano()).Round(time.Millisecond)
}
