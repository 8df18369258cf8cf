package firecracker

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/machine/microvm"
	"cal/machine/site"
)

// A snapshot is a guest that has booted and waits for its first wire, for machines of one
// shape to start from. It has seen no wire, no Boot, no writable disk and no secret, and
// the Firecracker that made it is ended and never runs a machine. Each machine that is
// restored from it gets entropy of its own over its first wire before any process of
// the proxy exists.
//
// The files belong to root, mode 0600. Firecracker, which opens them as the user of its
// jail, is given them for the moment in which it loads them and no guest runs.

const (
	manifestFile  = "snapshot.json" // is written last: a directory without it is no snapshot
	snapshotLock  = "lock"
	mostSnapshots = 4 // shapes; the one that was used longest ago goes first
)

// manifest says what a snapshot was when it was made.
type manifest struct {
	Version  string   `json:"version"` // of Firecracker
	Shape    []string `json:"shape"`
	State    fileSum  `json:"state"`
	Memory   fileSum  `json:"memory"`
	Recorded string   `json:"recorded"`
}

// fileSum tells a file from another. Reading a guest's memory to get its digest would
// take longer than to boot one.
type fileSum struct {
	Size     int64  `json:"size"`
	Modified int64  `json:"modified"` // Unix time in nanoseconds
	Inode    uint64 `json:"inode"`
	Digest   string `json:"digest,omitempty"` // of the state
}

// shapeOf is all that a guest which has booted depends on.
func shapeOf(made microvm.Parts, rec record, firecracker string) ([]string, error) {
	host, err := hostShape()
	if err != nil {
		return nil, err
	}
	shape := []string{
		"firecracker " + firecracker, "kernel " + made.Kernel.Digest, "initramfs " + made.Initramfs.Digest, "cmdline " + cmdline(made, rec.Shape.Pids),
		fmt.Sprintf("%d processors, %d MB", rec.Shape.CPUs, rec.Shape.MemoryMB), host,
	}
	for _, disk := range made.Disks {
		shape = append(shape, fmt.Sprintf("disk %s of %d bytes: %s", disk.Role, disk.Size, disk.Digest))
	}
	return shape, nil
}

// hostShape names this host's kernel and processor.
func hostShape() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", err
	}
	info, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	defer info.Close()
	var processor []string
	lines := bufio.NewScanner(info)
	for lines.Scan() && lines.Text() != "" { // of the first: a host may have hundreds
		name, value, _ := strings.Cut(lines.Text(), ":")
		if slices.Contains([]string{"vendor_id", "cpu family", "model", "stepping", "microcode", "flags"}, strings.TrimSpace(name)) {
			processor = append(processor, strings.TrimSpace(value))
		}
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	return "host " + unix.ByteSliceToString(name.Release[:]) + " " + unix.ByteSliceToString(name.Version[:]) + " on " + strings.Join(processor, " "), nil
}

func shapeKey(shape []string) string {
	sum := sha256.New()
	for _, part := range shape {
		fmt.Fprintf(sum, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// errSnapshot is wrapped where a machine could not be restored, which says nothing of
// whether one can be booted.
var errSnapshot = errors.New("snapshot")

// snapshot returns the directory of a snapshot of the shape, made at need.
func (d *Driver) snapshot(ctx context.Context, rec record, made microvm.Parts, firecracker string) (string, error) {
	shape, err := shapeOf(made, rec, firecracker)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(d.config.Snapshots, shapeKey(shape))
	held, err := claimSnapshot(ctx, dir)
	if err != nil {
		return "", err
	}
	defer held.Close()
	var m manifest
	if err := durable.Load(filepath.Join(dir, manifestFile), &m); err == nil {
		return dir, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := d.takeSnapshot(ctx, rec, made, firecracker, dir, shape); err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	d.forgetOldest(dir)
	return dir, nil
}

// claimSnapshot makes the directory and locks it; again, where another removed it meanwhile.
func claimSnapshot(ctx context.Context, dir string) (io.Closer, error) {
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		held, err := lockSnapshot(ctx, dir)
		if !errors.Is(err, fs.ErrNotExist) {
			return held, err
		}
	}
}

// lockSnapshot waits for its turn: a snapshot's files have one owner at a time.
func lockSnapshot(ctx context.Context, dir string) (io.Closer, error) {
	opened, err := durable.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	for {
		held, err := opened.Lock(snapshotLock)
		if err == nil {
			if _, err := os.Lstat(filepath.Join(dir, snapshotLock)); err != nil { // it was removed
				held.Close()
				return nil, err
			}
			return held, nil
		}
		if !errors.Is(err, durable.ErrLocked) {
			return nil, err
		}
		if site.Pause(ctx, time.Millisecond) != nil {
			return nil, fmt.Errorf("snapshot %s: %w", dir, context.Cause(ctx))
		}
	}
}

// takeSnapshot boots a guest of the machine's shape in a jail of its own and saves it. Its
// writable disks are empty: it does not look at them before its first wire.
func (d *Driver) takeSnapshot(ctx context.Context, rec record, made microvm.Parts, firecracker, dir string, shape []string) (err error) {
	j := rec.Template
	if err := j.unswapped(swaps); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.remove(context.WithoutCancel(ctx), d.config.Cgroups)) }()
	if err := j.make(); err != nil {
		return err
	}
	if err := j.showTemplate(made); err != nil {
		return err
	}
	v, err := d.launch(ctx, j, firecracker)
	if err != nil {
		return err
	}
	defer v.letGo()
	if err := v.bootUp(ctx, made, rec); err != nil {
		return v.explain(err)
	}
	conn, err := v.await(ctx)
	if err != nil {
		return err
	}
	conn.Close() // it has heard nothing
	if err := v.api.pause(ctx); err != nil {
		return err
	}
	if err := v.api.saveSnapshot(ctx, snapshotCreate{memoryInUse, "/" + stateFile, "/" + memoryFile}); err != nil {
		return err
	}
	if err := j.unswapped(swaps); err != nil { // it may have begun to meanwhile
		return err
	}
	return j.keep(dir, manifest{Version: Version, Shape: shape, Recorded: time.Now().UTC().Format(time.RFC3339)})
}

// memoryInUse is the kind of snapshot that is taken: the difference to nothing is all the
// memory that is in use, in a file with holes.
const memoryInUse = "Diff"

// errSwap says that no snapshot can be taken: Firecracker finds what is in memory, and takes
// what was swapped out for zeros.
var errSwap = errors.New("this host swaps, and its control groups cannot keep a machine from it")

const swaps = "/proc/swaps"

// unswapped says whether all of the jail's memory stays where Firecracker finds it.
func (j jail) unswapped(swaps string) error {
	if j.Limits.NoSwap {
		return nil
	}
	table, err := os.ReadFile(swaps)
	if err == nil && strings.Count(strings.TrimSpace(string(table)), "\n") > 0 { // below its heading
		err = errSwap
	}
	if errors.Is(err, fs.ErrNotExist) { // a kernel that knows no swap
		return nil
	}
	return err
}

// showTemplate shows the template's jail the same parts; in place of writable disks empty files.
func (j jail) showTemplate(made microvm.Parts) error {
	for name, source := range shown(made) {
		if err := j.show(source, name); err != nil {
			return err
		}
	}
	for _, disk := range made.Disks {
		if disk.ReadOnly() {
			continue
		}
		if err := errors.Join(os.WriteFile(j.path(disk.Role), nil, 0o600), os.Truncate(j.path(disk.Role), disk.Size), j.own(disk.Role)); err != nil {
			return err
		}
	}
	return nil
}

// keep takes a snapshot's files out of the jail in which they were made.
func (j jail) keep(dir string, m manifest) error {
	for name, sum := range map[string]*fileSum{stateFile: &m.State, memoryFile: &m.Memory} {
		file, err := within(j.root(), name, unix.S_IFREG)
		if err != nil {
			return err
		}
		file.Close()
		target := filepath.Join(dir, name)
		if err := os.Rename(j.path(name), target); err != nil {
			return err
		}
		if err := errors.Join(os.Lchown(target, 0, 0), os.Chmod(target, 0o600)); err != nil {
			return err
		}
		if *sum, err = sumOf(target); err != nil {
			return err
		}
	}
	digest, err := fileDigest(filepath.Join(dir, stateFile))
	if err != nil {
		return err
	}
	m.State.Digest = digest
	return durable.Store(filepath.Join(dir, manifestFile), m)
}

// sumOf describes a file that must be root's alone.
func sumOf(path string) (fileSum, error) {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return fileSum{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if stat.Mode != unix.S_IFREG|0o600 || stat.Uid != 0 || stat.Gid != 0 || stat.Nlink != 1 {
		return fileSum{}, fmt.Errorf("%s is of mode %o, user %d and has %d names, want a file that is root's alone", path, stat.Mode, stat.Uid, stat.Nlink)
	}
	return fileSum{Size: stat.Size, Modified: stat.Mtim.Nano(), Inode: stat.Ino}, nil
}

// check holds a snapshot's files against its manifest.
func (m manifest) check(dir string) error {
	for name, want := range map[string]fileSum{stateFile: m.State, memoryFile: m.Memory} {
		got, err := sumOf(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if want.Digest != "" {
			if got.Digest, err = fileDigest(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		if got != want {
			return fmt.Errorf("%s is %+v, was %+v", filepath.Join(dir, name), got, want)
		}
	}
	return nil
}

// restore loads a snapshot into a Firecracker that has done nothing yet, and leaves the
// guest paused.
func (v *vmm) restore(ctx context.Context, dir string) (err error) {
	held, err := lockSnapshot(ctx, dir)
	if err != nil {
		return err
	}
	defer held.Close()
	var m manifest
	if err := durable.Load(filepath.Join(dir, manifestFile), &m); err != nil {
		return fmt.Errorf("%w: %w", errSnapshot, err)
	}
	if err := m.check(dir); err != nil {
		return fmt.Errorf("%w: %w", errSnapshot, err)
	}
	defer func() { err = errors.Join(err, takeBack(v.jail, dir)) }()
	for _, name := range []string{stateFile, memoryFile} {
		if err := os.Link(filepath.Join(dir, name), v.jail.path(name)); err != nil {
			return fmt.Errorf("%w: %w", errSnapshot, err)
		}
		if err := v.jail.own(name); err != nil {
			return err
		}
	}
	if err := v.api.loadSnapshot(ctx, snapshotLoad{"/" + stateFile, memoryBackend{"File", "/" + memoryFile}}); err != nil {
		return fmt.Errorf("%w: %w", errSnapshot, err)
	}
	now := time.Now()
	return os.Chtimes(filepath.Join(dir, manifestFile), now, now) // when it was used last
}

// takeBack makes a snapshot's files root's again and takes their names out of a jail. The
// Firecracker in it has them open, and may read the memory only.
func takeBack(j jail, dir string) (err error) {
	for _, name := range []string{stateFile, memoryFile} {
		err = errors.Join(err, os.Lchown(filepath.Join(dir, name), 0, 0))
		if failed := os.Remove(j.path(name)); !errors.Is(failed, fs.ErrNotExist) {
			err = errors.Join(err, failed)
		}
	}
	return err
}

// forgetOldest removes snapshots that are more than may be, but never the one of dir.
// What a machine was restored from stays on the disk, without a name, while it runs.
func (d *Driver) forgetOldest(dir string) {
	found, err := filepath.Glob(filepath.Join(d.config.Snapshots, "*", manifestFile))
	if err != nil || len(found) <= mostSnapshots {
		return
	}
	used := func(name string) time.Time {
		info, err := os.Stat(name)
		if err != nil {
			return time.Time{}
		}
		return info.ModTime()
	}
	slices.SortFunc(found, func(a, b string) int { return used(a).Compare(used(b)) })
	for _, name := range found[:len(found)-mostSnapshots] {
		if old := filepath.Dir(name); old != dir {
			d.forget(old)
		}
	}
}

// forget removes a snapshot that nobody is loading.
func (d *Driver) forget(dir string) {
	opened, err := durable.OpenDir(dir)
	if err != nil {
		return
	}
	defer opened.Close()
	held, err := opened.Lock(snapshotLock)
	if err != nil {
		return
	}
	defer held.Close()
	// The manifest first: without it the rest is no snapshot.
	if err := errors.Join(os.Remove(filepath.Join(dir, manifestFile)), os.RemoveAll(dir)); err != nil {
		slog.Warn("a snapshot of a machine could not be removed", "dir", dir, "error", err)
	}
}
