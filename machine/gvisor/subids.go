package gvisor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"

	"cal/image"
	"cal/internal/idmap"
	"cal/machine"
)

// Machines of an ordinary user with subordinate ids have subSlot of them each,
// which holds the machine's own users. runsc then runs in the person's namespace,
// as 0 of it, exactly as it runs for root on the host; ids of that namespace stand in
// the bundle and in record.IDBase.
const subSlot = 2048

// subordinate knows whether the person's map can be made. That it can is kept;
// that it cannot is looked at again, since a person may mend it meanwhile.
type subordinate struct {
	mu    sync.Mutex
	found *idmap.Map
}

func (s *subordinate) find(ctx context.Context) (idmap.Map, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.found != nil {
		return *s.found, nil
	}
	m, err := idmap.Find()
	if err != nil {
		return idmap.Map{}, err
	}
	if m.Count < subSlot {
		return idmap.Map{}, &idmap.Missing{Cause: fmt.Sprintf("%d subordinate ids are too few", m.Count),
			Mend: fmt.Sprintf("give the user at least %d in /etc/subuid and /etc/subgid", subSlot)}
	}
	if err := m.Try(ctx); err != nil {
		return idmap.Map{}, fmt.Errorf("the subordinate ids cannot be used: %w", err)
	}
	s.found = &m
	return m, nil
}

// Remark says what would make machines of this driver stronger on this host; ""
// where nothing would.
func (d *Driver) Remark(ctx context.Context) string {
	if !d.ordinary {
		return ""
	}
	if _, err := d.subordinate(ctx); err != nil {
		return "machines have one user id, yours: " + err.Error()
	}
	return ""
}

// ordinaryIDs chooses the ids of an ordinary user's machine: subordinate ones, else
// the person's own. A workspace that other ids own is refused when they are not to be had.
func (d *Driver) ordinaryIDs(ctx context.Context, rec *record, workspace string) error {
	info, err := os.Lstat(workspace)
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	ids, missing := d.subordinate(ctx)
	if missing != nil {
		if owner != uint32(os.Getuid()) {
			return machine.Refuse("workspace %s belongs to id %d, which this user cannot take on now: %v; or remove the workspace as root", workspace, owner, missing)
		}
		return nil
	}
	base, err := subBase(ids, owner)
	if err != nil {
		return machine.Refuse("workspace %s: %v", workspace, err)
	}
	rec.Map, rec.IDBase = &ids, base
	return nil
}

// subBase returns the first id for a machine whose workspace belongs to owner.
func subBase(ids idmap.Map, owner uint32) (uint32, error) {
	if inner, ok := ids.Inner(owner); ok {
		if base := inner - machine.ToolsID; inner > machine.ToolsID && (base-1)%subSlot == 0 && base-1+subSlot <= ids.Count {
			return base, nil
		}
	} else if owner != uint32(os.Getuid()) {
		return 0, fmt.Errorf("it belongs to id %d, which is neither this user's nor among its subordinate ids %d-%d", owner, ids.UID, ids.UID+ids.Count-1)
	}
	slot, err := rand.Int(rand.Reader, big.NewInt(int64(ids.Count/subSlot)))
	if err != nil {
		return 0, err
	}
	return 1 + uint32(slot.Int64())*subSlot, nil
}

func (r record) idCount() uint32 {
	if r.Map != nil {
		return subSlot
	}
	return idCount
}

// giveWorkspace makes the machine's tools' user the owner of the workspace.
func (r record) giveWorkspace(ctx context.Context, workspace string) error {
	if r.Map == nil {
		return giveWorkspace(workspace, r.IDBase)
	}
	id := r.IDBase + machine.ToolsID
	info, err := os.Lstat(workspace)
	if err != nil {
		return err
	}
	if inner, ok := r.Map.Inner(info.Sys().(*syscall.Stat_t).Uid); ok && inner == id {
		return nil
	}
	_, err = r.Map.Run(ctx, "sh", "-c", giveAll, "sh", workspace, fmt.Sprintf("%d:%d", id, id))
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == severalNames {
		return machine.Refuse("%v", err)
	}
	return err
}

// giveAll is giveWorkspace for what only the person's namespace may do: a file
// with a second name is refused, no link is followed, the directory itself comes last.
const (
	giveAll = `set -e
second=$(find -P "$1" ! -type d -links +1 | head -n 1)
if [ -n "$second" ]; then echo "workspace file $second has other names; it would change owner under all of them" >&2; exit 9; fi
find -P "$1" -mindepth 1 -exec chown -h "$2" {} +
chown -h "$2" "$1"`
	severalNames = 9
)

// mountpoints are directories of every host that everybody can enter. One of
// them shows the skeleton of the root in the mount namespace of runsc: its file
// server has to walk there, and the person's own directories are not for others.
var mountpoints = []string{"/mnt", "/media", "/srv", "/opt", "/var/empty", "/var/lib"}

// showAt chooses a mount point that hides nothing of what the machine needs.
func (r *record) showAt(place place, runsc string, binds []image.Bind) error {
	if r.Map == nil {
		return nil
	}
	needed := []string{string(place), runsc}
	for _, bind := range binds {
		needed = append(needed, bind.Host)
	}
	for _, dir := range mountpoints {
		info, err := os.Lstat(dir)
		hides := slices.ContainsFunc(needed, func(path string) bool { return path == dir || strings.HasPrefix(path, dir+"/") })
		if err == nil && info.IsDir() && info.Mode().Perm()&0o005 == 0o005 && !hides {
			r.Shown = dir
			return nil
		}
	}
	return machine.Refuse("the machine's root has no place to be shown at: each of %s is missing, closed or in use", strings.Join(mountpoints, ", "))
}

// root is where runsc finds the skeleton of the machine's root.
func (r record) root(place place) string {
	if r.Shown != "" {
		return r.Shown
	}
	return r.rootfs(place)
}

// starter returns what starts runsc where the machine's ids exist.
func (r record) starter(cmd *exec.Cmd, place place) func() error {
	if r.Map == nil {
		return cmd.Start
	}
	return func() error {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNS // with the new user namespace: nothing spreads to the host
		cmd.Args = append([]string{"sh", "-c", `mount --bind "$1" "$2" && shift 2 && exec "$@"`, "sh", r.rootfs(place), r.root(place), cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
		return r.Map.Start(cmd)
	}
}
