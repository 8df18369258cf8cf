package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The roles of disks.
const (
	diskRoot      = "root"      // EROFS, read-only
	diskLayers    = "layers"    // EROFS, read-only; absent where there are none
	diskWorkspace = "workspace" // ext4
	diskScratch   = "scratch"   // ext4, blank at each start
)

const deviceDeadline = 20 * time.Second

// disk is a block device with its role.
type disk struct {
	name string // vda
	role string
}

func (d disk) device() string { return "/dev/" + d.name }

// writable says which roles are written to.
func (d disk) writable() bool { return d.role == diskWorkspace || d.role == diskScratch }

// findDisks waits for as many disks as there are roles. A device whose serial number is a role
// has that role; where none has one, the order of the devices is that of the roles.
func findDisks(roles []string) (map[string]disk, error) {
	var names []string
	err := await(deviceDeadline, func() (bool, error) {
		var err error
		names, err = diskNames()
		return len(names) >= len(roles), err
	})
	if err != nil || len(names) != len(roles) {
		return nil, fmt.Errorf("the machine has disks %v, and should have %v: %w", names, roles, errors.Join(err, errDevices))
	}
	serials := make([]string, len(names))
	for i, name := range names {
		serial, _ := os.ReadFile(filepath.Join("/sys/block", name, "serial"))
		serials[i] = strings.TrimSpace(string(serial))
	}
	disks, err := assign(names, serials, roles)
	if err != nil {
		return nil, err
	}
	for _, d := range disks {
		if err := d.prepare(); err != nil {
			return nil, fmt.Errorf("%s disk %s: %w", d.role, d.name, err)
		}
	}
	return disks, nil
}

var errDevices = errors.New("devices and command line disagree")

func diskNames() ([]string, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries { // ordered by name
		if strings.HasPrefix(entry.Name(), "vd") {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

func assign(names, serials, roles []string) (map[string]disk, error) {
	bySerial := slices.ContainsFunc(serials, func(s string) bool { return slices.Contains(roles, s) })
	disks := map[string]disk{}
	for i, name := range names {
		role := roles[i]
		if bySerial {
			role = serials[i]
		}
		if !slices.Contains(roles, role) || disks[role].name != "" {
			return nil, fmt.Errorf("disk %s has serial number %q; roles are %v", name, role, roles)
		}
		disks[role] = disk{name, role}
	}
	return disks, nil
}

// prepare forgets what the kernel read of a disk before the wire was greeted: where the
// machine is restored from a snapshot, another disk has taken its place.
func (d disk) prepare() error {
	if err := await(deviceDeadline, func() (bool, error) {
		_, err := os.Stat(d.device())
		return err == nil, nil
	}); err != nil {
		return err
	}
	device, err := os.Open(d.device())
	if err != nil {
		return err
	}
	defer device.Close()
	if _, err := unix.IoctlRetInt(int(device.Fd()), unix.BLKFLSBUF); err != nil {
		return fmt.Errorf("dropping what was read: %w", err)
	}
	return nil
}

// await looks again and again, for devices come when they are ready. Nothing that can be
// waited for says so in a machine that has no file systems yet.
func await(most time.Duration, there func() (bool, error)) error {
	for deadline := time.Now().Add(most); ; time.Sleep(2 * time.Millisecond) {
		ok, err := there()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not there within %s", most)
		}
	}
}
