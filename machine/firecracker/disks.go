package firecracker

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"cal/machine"
	"cal/machine/microvm"
)

// cmdline tells the kernel where its console is. A guest that wants to end resets the
// keyboard controller, for which Firecracker ends without an error.
func cmdline(made microvm.Parts, tasks int) string {
	return "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd random.trust_cpu=on " +
		made.CommandLine("vsock", tasks)
}

// assemble puts the machine's parts into the jail, each disk under its role's name.
func (d *Driver) assemble(ctx context.Context, spec machine.Spec, rec record) (microvm.Parts, error) {
	source := d.source()
	made, err := source.Parts(ctx, spec, rec.Jail.path(microvm.Scratch), int64(rec.Shape.DiskMB)<<20)
	if err != nil {
		return microvm.Parts{}, err
	}
	if err := d.config.Images.Hold(spec.Dir, made.Held()...); err != nil {
		return microvm.Parts{}, err
	}
	for name, source := range shown(made) {
		if err := rec.Jail.show(source, name); err != nil {
			return microvm.Parts{}, err
		}
	}
	for _, disk := range made.Disks {
		if disk.Role == microvm.Workspace {
			if err := rec.Jail.link(disk.Path, disk.Role); err != nil {
				return microvm.Parts{}, err
			}
		}
		if !disk.ReadOnly() {
			err = errors.Join(err, rec.Jail.own(disk.Role))
		}
	}
	return made, err
}

// shown are the files that are never written, by their names in a jail.
func shown(made microvm.Parts) map[string]string {
	files := map[string]string{kernelFile: made.Kernel.ELF, initramfsFile: made.Initramfs.Path}
	for _, disk := range made.Disks {
		if disk.ReadOnly() {
			files[disk.Role] = disk.Path
		}
	}
	return files
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
	return errors.Join(err, to.Chmod(0o444), to.Close())
}

// link puts a file into the jail that must be the very one.
func (j jail) link(source, name string) error {
	err := os.Link(source, j.path(name))
	if errors.Is(err, unix.EXDEV) {
		return machine.Refuse("workspace %s and machine directory %s lie on different file systems; set CAL_HOME so that they do not", source, j.Dir)
	}
	return err
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

// drives are the requests for the disks. What a guest flushed of its workspace is on
// the host's disk; scratch is forgotten with the machine.
func drives(made microvm.Parts, cpus int) []drive {
	var drives []drive
	for _, disk := range made.Disks {
		cache := "Unsafe"
		if disk.Role == microvm.Workspace {
			cache = "Writeback"
		}
		drives = append(drives, drive{ID: disk.Role, Path: "/" + disk.Role, ReadOnly: disk.ReadOnly(), Cache: cache, Limit: limit(cpus)})
	}
	return drives
}
