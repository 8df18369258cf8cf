// Package firecracker runs machines under Firecracker, on KVM that really runs a
// guest, for a node that was started as root. It never runs a Firecracker outside of
// its jailer.
//
// Claim: guest code reaches the host through KVM, a few virtual devices and one stream;
// who takes over the Firecracker behind them is a user of its own in an empty jail, with no
// network, no capability and the system calls of its filter. Threat: all in the machine,
// its kernel included, is hostile, and so is the Firecracker once it was taken over; the
// node may be killed at any moment. Promise: each Firecracker has a uid, a root, pid, net,
// mount, IPC and UTS namespaces and a cgroup of its own, all of it checked before a guest
// runs; the program's seccomp filter was proved by calls that it forbids; no path in a
// jail is followed; what was made is written down before it is made and can be removed from
// that record.
package firecracker

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"cal/image"
	"cal/internal/cgroup"
	"cal/internal/fileid"
	"cal/internal/kvm"
	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
	"cal/nucleus"
)

// Version is the release of Firecracker and its jailer that this driver was tried with.
const Version = "1.16.1"

const name = "firecracker"

// Config is what the driver depends on. Every field but the first three has a default.
type Config struct {
	Firecracker string       // path of the program
	Jailer      string       // path of its jailer, of the same version
	Images      *image.Store // of kernels, initramfs and disks

	// Snapshots is a directory for guests that have booted, from which machines start, on
	// the file system of the machines' directories; empty: each machine boots.
	Snapshots string

	Kernel   string        // path of a kernel; empty: Debian's cloud kernel
	Host     string        // where the host's root is seen; empty: /
	Cgroups  string        // where cgroups are mounted; empty: /sys/fs/cgroup
	Scratch  string        // where Probe makes and removes a directory; empty: /var/tmp
	Patience time.Duration // of Probe; 0: 10 s

	// KVM is what is known of this host's; one for all drivers of a process saves
	// trying. nil: the driver's own.
	KVM *kvm.Host
}

// Driver makes machines with Firecracker.
type Driver struct {
	config Config
	usual  nucleus.Resources // of machines whose Spec does not say

	mu     sync.Mutex
	proved string    // digest of the program whose filter was proved
	read   fileid.ID // of the program that has this digest

	warm atomic.Bool // machines start from snapshots
}

// New returns a driver that has not been probed.
func New(config Config) *Driver {
	if config.Host == "" {
		config.Host = "/"
	}
	if config.Cgroups == "" {
		config.Cgroups = cgroup.Mount
	}
	if config.Scratch == "" {
		config.Scratch = "/var/tmp"
	}
	if config.Patience == 0 {
		config.Patience = 10 * time.Second
	}
	if config.KVM == nil {
		config.KVM = new(kvm.Host)
	}
	d := &Driver{config: config, usual: microvm.Usual()}
	d.warm.Store(config.Snapshots != "")
	return d
}

// Name implements machine.Driver.
func (d *Driver) Name() string { return name }

// UsualImage implements machine.Imaged: an image holds a copy of all that is in it, and
// the host's programs are too many for that.
func (d *Driver) UsualImage() nucleus.Image { return nucleus.Image{Kind: nucleus.ImageDebian} }

// Digests implements machine.Copier.
func (d *Driver) Digests(ctx context.Context, spec machine.Spec) (map[string]string, error) {
	return d.source().Digests(ctx, spec)
}

func (d *Driver) source() microvm.Source {
	return microvm.Source{Images: d.config.Images, Kernel: d.config.Kernel, Host: d.config.Host}
}

// Tier implements machine.Driver.
func (d *Driver) Tier() nucleus.Tier { return nucleus.TierVM }

// Create implements machine.Driver.
func (d *Driver) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	if err := spec.Check(); err != nil {
		return nil, err
	}
	if err := checkFS(spec.Dir); err != nil {
		return nil, err
	}
	digest, err := d.prove(ctx)
	if err != nil {
		return nil, err
	}
	return site.Create(ctx, spec.Dir, d.clear, func(lock io.Closer) (*Machine, error) {
		m, err := d.make(ctx, spec, digest, lock, d.warm.Load())
		if !errors.Is(err, errSnapshot) {
			return m, err
		}
		slog.Warn("a machine could not start from its snapshot; it is booted", "machine", spec.ID, "error", err)
		if err := d.clear(ctx, spec.Dir); err != nil {
			return nil, err
		}
		return d.make(ctx, spec, digest, lock, false)
	})
}

// begin decides what the machine will be, and writes it down before anything is made
// of it.
func (d *Driver) begin(spec machine.Spec) (record, error) {
	exec, err := filepath.EvalSymlinks(d.config.Firecracker) // as the jailer does
	if err != nil {
		return record{}, err
	}
	uid, err := newUID()
	if err != nil {
		return record{}, err
	}
	rec := record{
		Driver: name, ID: spec.ID, Created: time.Now().UTC().Format(time.RFC3339Nano),
		Jail: jail{Dir: spec.Dir, ID: newInstance(), Exec: filepath.Base(exec), UID: uid}, Shape: microvm.ShapeOf(spec.Resources, d.usual),
	}
	version := cgroup.Version(d.config.Cgroups)
	if version == 0 {
		return record{}, machine.Refuse("no cgroups with the controllers %s are at %s", strings.Join(cgroup.Controllers, ", "), d.config.Cgroups)
	}
	rec.Jail.Limits = limits{
		Version: version, Memory: int64(rec.Shape.MemoryMB+overheadMB) << 20, NoSwap: cgroup.CanForbidSwap(d.config.Cgroups, parentCgroup),
		CPUs: rec.Shape.CPUs, Tasks: rec.Shape.CPUs + vmmTasks,
	}
	rec.Template = rec.Jail
	rec.Template.ID = newInstance()
	if rec.Template.UID, err = newUID(); err != nil {
		return record{}, err
	}
	return rec, rec.save()
}

// overheadMB is what a machine's cgroup may hold beside the guest's memory: Firecracker
// itself, 5 MB, and the host's cache of its disks, which the kernel takes back.
const overheadMB = 64

// Adopt implements machine.Driver.
func (d *Driver) Adopt(ctx context.Context, dir string) (machine.Machine, error) {
	return site.Adopt(ctx, dir, loadRecord, func(rec record, lock io.Closer) (*Machine, error) {
		v, err := rec.Jail.hold(d.config.Cgroups)
		if err != nil {
			return nil, err
		}
		return d.hold(rec, v, lock), nil
	})
}

// Remove implements machine.Driver.
func (d *Driver) Remove(ctx context.Context, dir string) error { return site.Remove(ctx, dir, d.clear) }

// clear ends all that runs for a machine and deletes what was made for it.
func (d *Driver) clear(ctx context.Context, dir string) error {
	rec, err := loadRecord(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return site.DeleteRecord(dir) // one that was being written
	}
	if err != nil {
		return err
	}
	for _, j := range []jail{rec.Jail, rec.Template} {
		if err := j.remove(ctx, d.config.Cgroups); err != nil {
			return err
		}
	}
	return site.DeleteRecord(dir)
}
