// Package qemu runs machines under QEMU's microvm: on KVM where that really runs a
// guest, else with every instruction emulated, for root or not.
//
// Claim: guest code reaches the host through a processor, real or emulated, four disks and two serial
// ports; who takes over the QEMU behind them is a user of its own, or one in a namespace of its
// own, in a root that holds QEMU alone, with no network, no capability and two seccomp filters.
// Threat: all in the machine, its kernel included, is hostile, and so is a QEMU that was
// taken over; the node may be killed at any moment. Promise: the walls are read from the outside before the
// guest's first instruction, and its limits hold before QEMU's; QEMU is handed its
// disks and sockets open and can name none; nothing of a guest is listened to but
// bounded and under a deadline; what was made is written down before it is made and can be
// removed from that record.
//
// The two kinds are two drivers of one name: a person who asks for "qemu" gets the one
// with KVM where its probe succeeds.
//
// BUG: an ordinary user without subordinate ids gets a user namespace with one id. A QEMU
// that was taken over, and broke out of its root too, is then that user.
package qemu

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"cal/image"
	"cal/internal/cgroup"
	"cal/internal/confine"
	"cal/internal/idmap"
	"cal/internal/kvm"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
	"cal/nucleus"
)

const name = "qemu"

const (
	lockPatience = 5 * time.Second // with another machine that gives a disk up
	lockEvery    = 20 * time.Millisecond
)

// Config is what the drivers depend on. Every field but Images has a default.
type Config struct {
	QEMU     string        // path or name of the program; empty: qemu-system-x86_64
	Images   *image.Store  // of kernels, initramfs and disks
	Kernel   string        // path of a kernel; empty: Debian's cloud kernel
	Host     string        // where the host's root is seen; empty: /
	Cgroups  string        // where cgroups are mounted; empty: /sys/fs/cgroup
	Scratch  string        // where Probe makes and removes a directory; empty: the system's
	Patience time.Duration // of Probe; 0: 10 s with KVM, 45 s without, on a busy host

	// Proxy is the program that Probe boots as the guest's first process. Fetch lets it fetch
	// a kernel where none is here yet.
	Proxy string
	Fetch bool

	// KVM is what is known of this host's; one for all drivers of a process saves
	// trying. nil: the drivers' own.
	KVM *kvm.Host

	// Usual is the size of machines whose Spec does not say; a zero field: see
	// microvm.Usual.
	Usual nucleus.Resources
}

// Driver makes machines with QEMU.
type Driver struct {
	config   Config
	emulated bool
	programs *programs
}

// New returns the driver with KVM, of tier vm, and the one without, of tier emulated, in
// this order. Neither has been probed.
func New(config Config) (accelerated, emulated *Driver) {
	if config.QEMU == "" {
		config.QEMU = "qemu-system-x86_64"
	}
	if config.Host == "" {
		config.Host = "/"
	}
	if config.Cgroups == "" {
		config.Cgroups = cgroup.Mount
	}
	if config.KVM == nil {
		config.KVM = new(kvm.Host)
	}
	usual := microvm.Usual()
	for _, field := range []struct{ set, usual *int }{
		{&config.Usual.CPU, &usual.CPU}, {&config.Usual.MemoryMB, &usual.MemoryMB}, {&config.Usual.Pids, &usual.Pids}, {&config.Usual.DiskMB, &usual.DiskMB},
	} {
		if *field.set == 0 {
			*field.set = *field.usual
		}
	}
	known, slow := new(programs), config
	if config.Patience == 0 {
		config.Patience, slow.Patience = 10*time.Second, 45*time.Second
	}
	return &Driver{config, false, known}, &Driver{slow, true, known}
}

// Name implements machine.Driver. Both have the same.
func (d *Driver) Name() string { return name }

// Tier implements machine.Driver.
func (d *Driver) Tier() nucleus.Tier {
	if d.emulated {
		return nucleus.TierEmulated
	}
	return nucleus.TierVM
}

// UsualImage implements machine.Imaged: a microVM's disk holds a copy, and a host's programs
// may be many.
func (d *Driver) UsualImage() nucleus.Image { return nucleus.Image{Kind: nucleus.ImageDebian} }

// Digests implements machine.Copier.
func (d *Driver) Digests(ctx context.Context, spec machine.Spec) (map[string]string, error) {
	return d.source().Digests(ctx, spec)
}

func (d *Driver) source() microvm.Source {
	return microvm.Source{Images: d.config.Images, Kernel: d.config.Kernel, Host: d.config.Host}
}

// Create implements machine.Driver.
func (d *Driver) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	if err := spec.Check(); err != nil {
		return nil, err
	}
	p := place(spec.Dir)
	if err := p.check(); err != nil {
		return nil, err
	}
	return site.Create(ctx, spec.Dir, d.clear, func(lock io.Closer) (*Machine, error) {
		rec, err := d.begin(ctx, spec)
		if err != nil {
			return nil, err
		}
		v, conn, err := d.start(ctx, spec, rec)
		if err != nil {
			return nil, err
		}
		m := d.hold(v, lock)
		m.Give(conn)
		return m, nil
	})
}

// begin decides what the machine will be, and writes it down before anything is made
// of it.
func (d *Driver) begin(ctx context.Context, spec machine.Spec) (record, error) {
	rec := record{
		Driver: name, Emulated: d.emulated, ID: spec.ID, Created: time.Now().UTC().Format(time.RFC3339Nano),
		Instance: nucleus.NewID("cal-" + spec.ID + "-"), Shape: microvm.ShapeOf(spec.Resources, d.config.Usual),
	}
	rec.Limits = rec.Shape.Limits()
	if err := spec.States(rec.Limits); err != nil {
		return record{}, err
	}
	if err := d.chooseUser(ctx, &rec); err != nil {
		return record{}, err
	}
	rec.Cgroup = os.Geteuid() == 0
	return rec, rec.save(place(spec.Dir))
}

// chooseUser decides who QEMU is. A person's subordinate id is not let at KVM where the
// device is for a group that the person is in.
func (d *Driver) chooseUser(ctx context.Context, rec *record) (err error) {
	if os.Geteuid() == 0 {
		rec.User, err = confine.ID()
		return err
	}
	if !d.emulated && !forEverybody(kvm.Device) {
		return nil
	}
	ids, missing := idmap.Find()
	if missing == nil && ids.Try(ctx) == nil {
		rec.Map, rec.User = &ids, confine.SubID(ids.Count)
	}
	return nil
}

func forEverybody(device string) bool {
	info, err := os.Stat(device)
	return err == nil && info.Mode().Perm()&0o006 == 0o006
}

// Adopt implements machine.Driver.
func (d *Driver) Adopt(ctx context.Context, dir string) (machine.Machine, error) {
	return site.Adopt(ctx, dir, loadRecord, func(rec record, lock io.Closer) (*Machine, error) {
		v, err := findVMM(ctx, d.config.Cgroups, place(dir), rec)
		if err != nil {
			return nil, err
		}
		return d.hold(v, lock), nil
	})
}

// Remove implements machine.Driver.
func (d *Driver) Remove(ctx context.Context, dir string) error { return site.Remove(ctx, dir, d.clear) }

// clear ends all that runs for a machine and deletes what was made for it.
func (d *Driver) clear(ctx context.Context, dir string) error {
	rec, err := loadRecord(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.Join(site.Delete(dir, made...), site.DeleteRecord(dir)) // one that was being written
	}
	if err != nil {
		return err
	}
	err = process.Sweep(ctx, rec.tag(place(dir)), func() error {
		return errors.Join(site.Delete(dir, made...), cgroup.Remove(ctx, d.config.Cgroups, rec.group().Name))
	})
	if err != nil {
		return err
	}
	return site.DeleteRecord(dir)
}
