package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cal/machine"
)

// The disks of a machine, by their roles, in the order in which the guest finds them.
const (
	rootDisk      = "root"
	layersDisk    = "layers"
	workspaceDisk = "workspace"
	scratchDisk   = "scratch"
)

// workspaceFile is the disk in a workspace's directory.
const workspaceFile = "workspace.ext4"

// parts are what a machine is made of, in its jail.
type parts struct {
	kernel, initramfs string // digests
	tasks             int    // of a user
	disks             []part
	env               map[string]string
}

type part struct {
	role     string
	digest   string // of one that is never written
	readOnly bool
	size     int64
}

// cmdline tells the kernel where its console is and its first process which disk is
// which. A guest that wants to end resets the keyboard controller, for which
// Firecracker ends without an error.
func (p parts) cmdline() string {
	roles := make([]string, len(p.disks))
	for i, d := range p.disks {
		roles[i] = d.role
	}
	return "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd random.trust_cpu=on" +
		fmt.Sprintf(" cal.disks=%s cal.wire=vsock cal.tasks=%d", strings.Join(roles, ","), p.tasks)
}

// assemble puts the machine's parts into the jail.
func (d *Driver) assemble(ctx context.Context, spec machine.Spec, rec record) (parts, error) {
	kernel, err := d.config.Images.Kernel(ctx, d.config.Kernel, nil)
	if err != nil {
		return parts{}, err
	}
	initramfs, err := d.config.Images.Initramfs(ctx, kernel, spec.Proxy)
	if err != nil {
		return parts{}, err
	}
	root, err := d.config.Images.Root(ctx, spec.Image, d.config.Host, nil)
	if err != nil {
		return parts{}, machine.Refuse("%v", err)
	}
	p := parts{kernel: kernel.Digest, initramfs: initramfs.Digest, env: root.Env, tasks: rec.Facts.Tasks}
	p.disks = append(p.disks, part{role: rootDisk, digest: root.Digest, readOnly: true, size: root.Size})
	files := map[string]string{kernelFile: kernel.ELF, initramfsFile: initramfs.Path, rootDisk: root.Path}
	if layers := slices.Concat(spec.Image.Layers, spec.Agent); len(layers) > 0 {
		disk, err := d.config.Images.Layers(ctx, layers, nil)
		if err != nil {
			return parts{}, machine.Refuse("%v", err)
		}
		files[layersDisk] = disk.Path
		p.disks = append(p.disks, part{role: layersDisk, digest: disk.Digest, readOnly: true, size: disk.Size})
	}
	for name, source := range files {
		if err := rec.Jail.show(source, name); err != nil {
			return parts{}, err
		}
	}
	workspace, err := d.workspace(ctx, spec, rec)
	if err != nil {
		return parts{}, err
	}
	scratch := int64(rec.DiskMB) << 20
	if err := d.config.Images.Blank(ctx, rec.Jail.path(scratchDisk), scratch); err != nil {
		return parts{}, err
	}
	p.disks = append(p.disks, part{role: workspaceDisk, size: workspace}, part{role: scratchDisk, size: scratch})
	return p, errors.Join(rec.Jail.own(workspaceDisk), rec.Jail.own(scratchDisk))
}

// show puts a file that nobody writes into the jail, under a second name where the file
// system allows it.
func (j jail) show(source, name string) error {
	err := os.Link(source, j.path(name))
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	return copyFile(source, j.path(name))
}

func copyFile(source, target string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// workspace puts the workspace's disk into the jail, made where there is none, and
// returns its size. The file must be the very one, and one machine's at a time.
func (d *Driver) workspace(ctx context.Context, spec machine.Spec, rec record) (int64, error) {
	path := filepath.Join(spec.Workspace, workspaceFile)
	if err := onlyDisk(spec.Workspace); err != nil {
		return 0, err
	}
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		if err := d.config.Images.Blank(ctx, path, int64(rec.DiskMB)<<20); err != nil {
			return 0, err
		}
	}
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return 0, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Nlink != 1 {
		return 0, machine.Refuse("%s is of mode %o with %d names, want a file with one: is another machine using it?", path, stat.Mode, stat.Nlink)
	}
	err := os.Link(path, rec.Jail.path(workspaceDisk))
	if errors.Is(err, unix.EXDEV) {
		return 0, machine.Refuse("workspace %s and machine directory %s lie on different file systems; set CAL_HOME so that they do not", spec.Workspace, spec.Dir)
	}
	return stat.Size, err
}

// onlyDisk refuses a workspace in which files lie as they are: another driver made it.
func onlyDisk(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Name() != workspaceFile {
			return machine.Refuse("workspace %s holds %s as a file of the host, so it was made by a driver without disks; take the work out with cal repo fetch, or name another workspace", dir, entry.Name())
		}
	}
	return nil
}

// limit keeps one machine's disks from taking the host's: 200 MB and 10,000 operations a
// second for each processor, after a GB for the start.
func limit(cpus int) *rateLimiter {
	const refill = 100 // ms
	n := int64(cpus)
	return &rateLimiter{
		Bandwidth: &tokenBucket{Size: n * 20 << 20, Burst: 1 << 30, Refill: refill},
		Ops:       &tokenBucket{Size: n * 1000, Burst: 50_000, Refill: refill},
	}
}

// digests of what is never written.
func (p parts) digests() map[string]string {
	digests := map[string]string{kernelFile: p.kernel, initramfsFile: p.initramfs}
	for _, d := range p.disks {
		if d.readOnly {
			digests[d.role] = d.digest
		}
	}
	return digests
}

// longest is the size of the longest file that may be written.
func (p parts) longest() (most int64) {
	for _, d := range p.disks {
		if !d.readOnly {
			most = max(most, d.size)
		}
	}
	return most
}

// drives are the requests for the disks. What a guest flushed of its workspace is on
// the host's disk; scratch is forgotten with the machine.
func (p parts) drives(cpus int) []drive {
	var drives []drive
	for _, d := range p.disks {
		cache := "Unsafe"
		if d.role == workspaceDisk {
			cache = "Writeback"
		}
		drives = append(drives, drive{ID: d.role, Path: "/" + d.role, ReadOnly: d.readOnly, Cache: cache, Limit: limit(cpus)})
	}
	return drives
}
