package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// checkPromises reads back from the kernel what the machine is to be. Anything that is not
// so ends it.
func checkPromises(disks map[string]disk) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if err := checkMounts(string(mounts)); err != nil {
		return err
	}
	for _, s := range settings {
		if err := s.check(); err != nil {
			return err
		}
	}
	return errors.Join(checkInterfaces("/sys/class/net"), checkDevices("/sys/bus/virtio/devices"), checkModules(), checkDisks(disks), checkWrites())
}

func checkInterfaces(dir string) error {
	interfaces, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, i := range interfaces {
		if i.Name() != "lo" {
			return fmt.Errorf("the machine has a network interface, %s", i.Name())
		}
	}
	return nil
}

// devices of a machine, by their number in the virtio specification, section 5.
var devices = map[string]string{
	"0x0002": "disk", "0x0003": "serial ports", "0x0004": "random numbers", "0x0005": "memory balloon", "0x0013": "vsock",
}

// checkDevices: not even a device without a driver is there that a machine should not have, a
// network interface first of all.
func checkDevices(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		id, err := os.ReadFile(filepath.Join(dir, entry.Name(), "device"))
		if err != nil {
			return err
		}
		if number := strings.TrimSpace(string(id)); devices[number] == "" {
			return fmt.Errorf("the machine has a device that it should not have: virtio number %s (0x0001 is a network interface)", number)
		}
	}
	return nil
}

// checkModules tries to load one. The kernel refuses the right before it looks at what is loaded.
func checkModules() error {
	if err := unix.InitModule(nil, ""); err != unix.EPERM && err != unix.ENOSYS {
		return fmt.Errorf("the kernel still takes modules (%v)", err)
	}
	return nil
}

// checkDisks: what is not written to lies on devices that refuse writes. Then nothing in this
// machine, its kernel included, can change it.
func checkDisks(disks map[string]disk) error {
	for _, d := range disks {
		ro, err := os.ReadFile(filepath.Join("/sys/block", d.name, "ro"))
		if err != nil {
			return err
		}
		if !d.writable() && strings.TrimSpace(string(ro)) != "1" {
			return fmt.Errorf("the %s disk %s can be written", d.role, d.name)
		}
	}
	return nil
}

func checkWrites() error {
	for _, dir := range []string{"/", "/usr", "/etc", "/dev", "/.nucleus", nucleus.MachineAgent} {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		switch err {
		case unix.EROFS, unix.ENOENT:
		case unix.ENOTDIR:
			return fmt.Errorf("%s is no directory", dir)
		default:
			return fmt.Errorf("%s can be written (%v)", dir, err)
		}
	}
	return nil
}

// mountRule is what the mounts of a place must be.
type mountRule struct {
	fstype   []string
	writable bool
	devices  bool
	programs bool
}

// mountRules are the mounts that a machine may have. Others are layers: read-only, of
// the layers disk.
var mountRules = map[string]mountRule{
	"/":                      {fstype: []string{"overlay"}, programs: true},
	"/proc":                  {fstype: []string{"proc"}, writable: true},
	"/sys":                   {fstype: []string{"sysfs"}},
	"/dev":                   {fstype: []string{"tmpfs"}, devices: true},
	"/dev/pts":               {fstype: []string{"devpts"}, writable: true, devices: true},
	"/dev/shm":               {fstype: []string{"tmpfs"}, writable: true},
	"/tmp":                   {fstype: []string{"tmpfs"}, writable: true, programs: true},
	"/run":                   {fstype: []string{"tmpfs"}, writable: true},
	nucleus.MachineHome:      {fstype: []string{"ext4"}, writable: true, programs: true},
	nucleus.MachineWorkspace: {fstype: []string{"ext4"}, writable: true, programs: true},
	nucleus.MachineProxy:     {fstype: []string{"rootfs", "tmpfs", "ramfs"}, programs: true},
}

var layerRule = mountRule{fstype: []string{"erofs"}, programs: true}

// mounted is a line of /proc/self/mountinfo.
type mounted struct {
	place   string
	options []string // of the mount
	fstype  string
	super   []string // of the file system
}

func parseMounts(text string) ([]mounted, error) {
	var mounts []mounted
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		own, of := strings.Fields(before), strings.Fields(after)
		if !ok || len(own) < 6 || len(of) < 3 {
			return nil, fmt.Errorf("mountinfo has the line %q", line)
		}
		mounts = append(mounts, mounted{own[4], strings.Split(own[5], ","), of[0], strings.Split(of[2], ",")})
	}
	return mounts, nil
}

func checkMounts(text string) error {
	mounts, err := parseMounts(text)
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, m := range mounts {
		rule, known := mountRules[m.place]
		if !known {
			rule = layerRule
		}
		if err := m.check(rule); err != nil {
			return fmt.Errorf("mount at %s: %w", m.place, err)
		}
		seen[m.place] = true
	}
	for place := range mountRules {
		if !seen[place] {
			return fmt.Errorf("nothing is mounted at %s", place)
		}
	}
	return nil
}

func (m mounted) check(rule mountRule) error {
	has := func(option string) bool { return slices.Contains(m.options, option) }
	switch {
	case !slices.Contains(rule.fstype, m.fstype):
		return fmt.Errorf("it is %s, and should be %s", m.fstype, strings.Join(rule.fstype, " or "))
	case !has("nosuid"):
		return errors.New("it gives rights by setuid")
	case !rule.devices && !has("nodev"):
		return errors.New("it takes devices")
	case !rule.programs && !has("noexec"):
		return errors.New("programs can be run from it")
	case !rule.writable && !has("ro"):
		return errors.New("it can be written")
	case (m.fstype == "overlay" || m.fstype == "erofs") && !slices.Contains(m.super, "ro"):
		return errors.New("its file system can be written")
	case m.fstype == "overlay" && slices.ContainsFunc(m.super, func(o string) bool { return strings.HasPrefix(o, "upperdir=") }):
		return errors.New("it has an upper layer")
	case m.fstype == "proc" && !slices.Contains(m.super, "hidepid=invisible") && !slices.Contains(m.super, "hidepid=2"):
		return errors.New("it shows everybody's processes")
	}
	return nil
}
