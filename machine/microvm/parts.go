// Package microvm is what machines with a kernel of their own share, whatever VMM
// runs them: of what they are made, which disks they have, what their kernel is told, and
// which limits hold in them.
//
// Claim: a machine has a read-only root, read-only layers, the workspace's disk and a
// scratch disk of a stated size; no other file, and no network interface. Threat: the
// guest writes what it likes to its disks; a workspace holds what another driver left. Promise:
// the host never reads a file system that a guest has written; the kernel's command line says
// roles and numbers alone; a workspace of plain files is refused, and left as it is.
package microvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cal/image"
	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

// The roles of disks, in the order in which a guest finds them.
const (
	Root      = "root"      // EROFS
	Layers    = "layers"    // EROFS; absent where there are none
	Workspace = "workspace" // ext4, what outlives the machine
	Scratch   = "scratch"   // ext4, blank for each machine
)

// Disk is a file that a machine sees as a disk.
type Disk struct {
	Role   string
	Path   string
	Digest string // "sha256:..." of one that is never written; else ""
	Size   int64
}

// ReadOnly says whether the guest may not write it.
func (d Disk) ReadOnly() bool { return d.Role == Root || d.Role == Layers }

// Parts are what a machine is made of.
type Parts struct {
	Kernel    image.Kernel
	Initramfs image.Disk
	Disks     []Disk
	Env       map[string]string // of the tools
}

// Source is where parts come from.
type Source struct {
	Images *image.Store
	Kernel string // path; empty: Debian's cloud kernel
	Host   string // where the host's root is seen
}

// Parts makes what a machine of spec needs. scratch is where its scratch disk will lie;
// that and a workspace that is new get size bytes. What it makes outside of the store is
// the scratch disk and a workspace's first disk.
func (s Source) Parts(ctx context.Context, spec machine.Spec, scratch string, size int64) (Parts, error) {
	p, err := s.fixed(ctx, spec)
	if err != nil {
		return Parts{}, err
	}
	workspace, err := s.workspace(ctx, spec.Workspace, size)
	if err != nil {
		return Parts{}, err
	}
	if err := s.Images.Blank(ctx, scratch, size); err != nil {
		return Parts{}, fmt.Errorf("scratch disk: %w", err)
	}
	p.Disks = append(p.Disks, workspace, Disk{Role: Scratch, Path: scratch, Size: size})
	return p, nil
}

// Digests is machine.Copier's for the driver.
func (s Source) Digests(ctx context.Context, spec machine.Spec) (map[string]string, error) {
	p, err := s.fixed(ctx, spec)
	return p.Digests(), err
}

// fixed are the parts that are never written.
func (s Source) fixed(ctx context.Context, spec machine.Spec) (Parts, error) {
	kernel, err := s.Images.Kernel(ctx, s.Kernel, nil)
	if err != nil {
		return Parts{}, err
	}
	initramfs, err := s.Images.Initramfs(ctx, kernel, spec.Proxy)
	if err != nil {
		return Parts{}, err
	}
	root, err := s.Images.Root(ctx, spec.Image, s.Host, nil)
	if err != nil {
		return Parts{}, refusal(ctx, err)
	}
	p := Parts{Kernel: kernel, Initramfs: initramfs, Env: root.Env}
	p.Disks = append(p.Disks, Disk{Root, root.Path, root.Digest, root.Size})
	if layers := slices.Concat(spec.Image.Layers, spec.Agent); len(layers) > 0 {
		disk, err := s.Images.Layers(ctx, layers, nil)
		if err != nil {
			return Parts{}, refusal(ctx, err)
		}
		p.Disks = append(p.Disks, Disk{Layers, disk.Path, disk.Digest, disk.Size})
	}
	return p, nil
}

// refusal is of an image that cannot be made, unless the host is at fault.
func refusal(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, unix.ENOSPC) || errors.Is(err, image.ErrCorrupt) {
		return err
	}
	return machine.Refuse("%v", err)
}

// workspace is the workspace's disk, made where there is none. What is there must be a
// file of its own with one name: another name may be anybody's.
func (s Source) workspace(ctx context.Context, dir string, size int64) (Disk, error) {
	if err := site.OnlyDisk(dir, site.WorkspaceDisk+unfinished); err != nil {
		return Disk{}, err
	}
	path := filepath.Join(dir, site.WorkspaceDisk)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := s.blankWorkspace(ctx, path, size); err != nil {
			return Disk{}, fmt.Errorf("workspace's disk: %w", err)
		}
	}
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return Disk{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Nlink != 1 {
		return Disk{}, machine.Refuse("%s has mode %o and %d names, want a file with one: is another machine using it?", path, stat.Mode, stat.Nlink)
	}
	return Disk{Role: Workspace, Path: path, Size: stat.Size}, nil
}

// unfinished is the end of the name of a disk that is being made: what a killed start left
// is never taken for a disk.
const unfinished = ".new"

func (s Source) blankWorkspace(ctx context.Context, path string, size int64) error {
	if err := os.Remove(path + unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.Images.Blank(ctx, path+unfinished, size); err != nil {
		return err
	}
	if err := flush(path + unfinished); err != nil {
		return err
	}
	return os.Rename(path+unfinished, path)
}

// flush puts a file onto the host's disk: a name without its contents would be a
// workspace that no machine can use.
func flush(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// CommandLine is what the kernel is told for its first process. wire is "serial" or
// "vsock", tasks how many each user may have.
func (p Parts) CommandLine(wire string, tasks int) string {
	roles := make([]string, len(p.Disks))
	for i, disk := range p.Disks {
		roles[i] = disk.Role
	}
	// Huge pages for those who ask: unasked, a third of the proxy's processes' memory was for nothing.
	return fmt.Sprintf("cal.disks=%s cal.wire=%s cal.tasks=%d transparent_hugepage=madvise", strings.Join(roles, ","), wire, tasks)
}

// Digests are of what is never written.
func (p Parts) Digests() map[string]string {
	digests := map[string]string{"kernel": p.Kernel.Digest, "initramfs": p.Initramfs.Digest}
	for _, disk := range p.Disks {
		if disk.ReadOnly() {
			digests[disk.Role] = disk.Digest
		}
	}
	return digests
}

// KernelHint is what else to look at where the kernel is a person's own and may be why nothing
// came up.
func (p Parts) KernelHint() string {
	if p.Kernel.Package != "" {
		return ""
	}
	return "whether the kernel is a good one: `cal image build kernel` goes back to Debian's"
}

// Longest is the size of the largest file that the machine may write, in bytes.
func (p Parts) Longest() (most uint64) {
	for _, disk := range p.Disks {
		if !disk.ReadOnly() {
			most = max(most, uint64(disk.Size))
		}
	}
	return most
}

// Held are the digests of the objects of the store that the machine uses.
func (p Parts) Held() []string { return slices.Collect(maps.Values(p.Digests())) }

// Shape is how large a machine is.
type Shape struct {
	CPUs     int `json:"cpus"`
	MemoryMB int `json:"memory_mb"`
	DiskMB   int `json:"disk_mb"` // of scratch, and of a workspace that is new
	Pids     int `json:"pids"`    // tasks that each user of the machine may have
}

// Usual is the size of machines for which nobody states one.
func Usual() nucleus.Resources {
	return nucleus.Resources{CPU: min(runtime.NumCPU(), 4), MemoryMB: 2048, Pids: 2048, DiskMB: 10 << 10}
}

// ShapeOf is what a Spec asks for, and for the rest what is usual.
func ShapeOf(want, usual nucleus.Resources) Shape {
	or := func(want, usual int) int {
		if want == 0 {
			return usual
		}
		return want
	}
	return Shape{or(want.CPU, usual.CPU), or(want.MemoryMB, usual.MemoryMB), or(want.DiskMB, usual.DiskMB), or(want.Pids, usual.Pids)}
}

// Limits says how each resource is kept: a machine has so many processors and so much
// memory, and no more; its disks have their size; tasks are its own kernel's, which limits
// each user to them.
func (s Shape) Limits() []nucleus.Limit {
	return []nucleus.Limit{
		{Resource: "cpu", Value: machine.Value(s.CPUs, "cores"), How: machine.Enforced},
		{Resource: "memory", Value: machine.Value(s.MemoryMB, "MB"), How: machine.Enforced},
		{Resource: "pids", Value: machine.Value(s.Pids, "tasks a user"), How: machine.Enforced},
		{Resource: "disk", Value: machine.Value(s.DiskMB, "MB"), How: machine.Enforced},
	}
}

// Facts of every machine of this shape.
func (s Shape) Facts(p Parts) machine.Facts {
	return machine.Facts{
		ToolsUID: machine.ToolsID, ToolsGID: machine.ToolsID, AgentUID: machine.AgentID, AgentGID: machine.AgentID,
		Tasks: s.Pids, Sync: true, Env: p.Env, Digests: p.Digests(),
	}
}
