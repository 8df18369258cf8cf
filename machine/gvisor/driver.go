// Package gvisor runs machines under gVisor's user-space kernel, runsc, with the
// systrap platform: on any Linux, without KVM, as root or not.
//
// Claim: guest code reaches the host through the sentry's seccomp filter, one
// stream, and the files of its root and workspace; nothing else. Threat: all in
// the machine, root of the machine included, is hostile; the node may be killed
// at any moment. Promise: started as root, no process of a machine has the host's
// uid 0 or a capability outside its own user namespace, and files that `other`
// cannot read are closed to it by the host's kernel; started by an ordinary user
// with subordinate ids, the same, and no process has that user's id; started by
// one without, such files are covered. No socket, fifo or device of the host can be named. What was made is
// written down before it is made and can be removed from that record.
//
// BUG: an ordinary user without subordinate ids gets a user namespace with one
// id. A process that broke out of the sentry is then that user.
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"cal/image"
	"cal/internal/cgroup"
	"cal/internal/idmap"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

// Version is the release of runsc that this driver was tried with. It is set
// into the binary when it is built.
const Version = "20260905"

// Config is what the driver depends on. Every field but Runsc has a default.
type Config struct {
	Runsc    string        // path of the pinned runsc
	Version  string        // wanted of Runsc; empty: Version
	Host     string        // where the host's root is seen; empty: /
	Cgroups  string        // where cgroups are mounted; empty: /sys/fs/cgroup
	Roots    string        // where root's machines have their skeletons, see record.Root; empty: /run/cal
	Scratch  string        // where Probe makes and removes a directory; empty: the system's
	Patience time.Duration // of Probe; 0: 10 s

	// Usual limits machines whose Spec does not; a zero field: see usual.
	Usual nucleus.Resources

	// Images holds what has to be unpacked before a machine has it as its root; nil: such
	// an image is refused.
	Images *image.Store

	// Screen is what is known of files that are not for everybody; one for all
	// drivers of a process saves reading. nil: the driver's own.
	Screen *image.Screen
}

// Driver makes machines with runsc.
type Driver struct {
	config   Config
	ordinary bool // not root: no cgroup, and one id or subordinate ones

	subordinate func(context.Context) (idmap.Map, error) // of the person; an error that says why not
}

// New returns a driver that has not been probed.
func New(config Config) *Driver {
	if config.Version == "" {
		config.Version = Version
	}
	if config.Host == "" {
		config.Host = "/"
	}
	if config.Cgroups == "" {
		config.Cgroups = cgroup.Mount
	}
	if config.Roots == "" {
		config.Roots = "/run/cal"
	}
	if config.Patience == 0 {
		config.Patience = 10 * time.Second
	}
	limits := usual("/proc/meminfo")
	if config.Usual.Pids == 0 {
		config.Usual.Pids = limits.Pids
	}
	if config.Usual.MemoryMB == 0 {
		config.Usual.MemoryMB = limits.MemoryMB
	}
	if config.Screen == nil {
		config.Screen = new(image.Screen)
	}
	return &Driver{config: config, ordinary: os.Geteuid() != 0, subordinate: (&subordinate{}).find}
}

// Name implements machine.Driver.
func (d *Driver) Name() string { return name }

// Tier implements machine.Driver.
func (d *Driver) Tier() nucleus.Tier { return nucleus.TierKernel }

// Create implements machine.Driver.
func (d *Driver) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	if err := spec.Check(); err != nil {
		return nil, err
	}
	place := place(spec.Dir)
	if err := place.check(); err != nil {
		return nil, err
	}
	return site.Create(ctx, spec.Dir, d.clear, func(lock io.Closer) (*Machine, error) {
		rec, err := d.begin(ctx, spec)
		if err != nil {
			return nil, err
		}
		if err := d.assemble(ctx, spec, &rec); err != nil {
			return nil, err
		}
		return d.start(ctx, place, rec, lock)
	})
}

// begin decides what the machine will be, and writes it down before anything is
// made of it.
func (d *Driver) begin(ctx context.Context, spec machine.Spec) (record, error) {
	rec := record{Driver: d.Name(), ID: spec.ID, Created: time.Now().UTC().Format(time.RFC3339Nano)}
	if err := site.OnlyFiles(spec.Workspace); err != nil {
		return record{}, err
	}
	if d.ordinary {
		if err := d.ordinaryIDs(ctx, &rec, spec.Workspace); err != nil {
			return record{}, err
		}
	} else {
		base, err := idBase(spec.Workspace)
		if err != nil {
			return record{}, err
		}
		rec.IDBase = base
		if spec.Resources.MemoryMB > 0 { // all else is kept without, and a cgroup costs time at the start
			rec.Cgroup = nucleus.NewID("cal-" + spec.ID + "-")
		}
		rec.Root = filepath.Join(d.config.Roots, nucleus.NewID(spec.ID+"-"))
	}
	if err := rec.save(place(spec.Dir)); err != nil {
		return record{}, err
	}
	rec.limit(spec.Resources, d.config.Usual)
	if rec.Cgroup != "" {
		rec.wanted = rec.groupLimits(spec)
		group, err := cgroup.Make(d.config.Cgroups, rec.Cgroup, rec.wanted)
		if err != nil {
			return record{}, err
		}
		rec.Cgroup, rec.Kept = group.Name, group.Kept
		rec.limit(spec.Resources, d.config.Usual)
	}
	rec.Facts = rec.facts()
	rec.Facts.Tasks = rec.Pids
	if err := spec.States(rec.Limits); err != nil {
		return record{}, err
	}
	return rec, nil
}

func (r record) facts() machine.Facts {
	facts := machine.Facts{ToolsUID: machine.ToolsID, ToolsGID: machine.ToolsID, AgentUID: machine.AgentID, AgentGID: machine.AgentID}
	if r.IDBase == 0 {
		facts.ToolsUID, facts.ToolsGID, facts.OneID = 0, 0, true
	}
	return facts
}

// Adopt implements machine.Driver.
func (d *Driver) Adopt(ctx context.Context, dir string) (machine.Machine, error) {
	return site.Adopt(ctx, dir, loadRecord, func(rec record, lock io.Closer) (*Machine, error) { return d.hold(place(dir), rec, lock) })
}

// Remove implements machine.Driver.
func (d *Driver) Remove(ctx context.Context, dir string) error { return site.Remove(ctx, dir, d.clear) }

// clear ends every process of a machine and deletes what was made for it.
func (d *Driver) clear(ctx context.Context, dir string) error {
	place := place(dir)
	return process.Sweep(ctx, place.argument(), func() error { return d.delete(ctx, place) })
}

func (d *Driver) delete(ctx context.Context, place place) error {
	rec, err := loadRecord(string(place))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := errors.Join(site.Delete(string(place), made...), d.deleteRoot(rec)); err != nil {
		return err
	}
	if err := cgroup.Remove(ctx, d.config.Cgroups, rec.Cgroup); err != nil {
		return err
	}
	return site.DeleteRecord(string(place))
}

// deleteRoot removes a skeleton outside the place. A record that names anything
// but a child of the directory for skeletons is damaged.
func (d *Driver) deleteRoot(rec record) error {
	if rec.Root == "" {
		return nil
	}
	if filepath.Dir(rec.Root) != filepath.Clean(d.config.Roots) {
		return fmt.Errorf("record names the root %s, which is not in %s", rec.Root, d.config.Roots)
	}
	return site.Delete(filepath.Dir(rec.Root), filepath.Base(rec.Root))
}
