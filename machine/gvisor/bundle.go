package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"cal/image"
	"cal/machine"
	"cal/nucleus"
)

// assemble makes the machine's root and bundle.
func (d *Driver) assemble(ctx context.Context, spec machine.Spec, rec *record) error {
	if rec.IDBase != 0 {
		if err := rec.giveWorkspace(ctx, spec.Workspace); err != nil {
			return fmt.Errorf("workspace: %w", err)
		}
	}
	root, err := d.root(ctx, spec)
	if err != nil {
		return err
	}
	rec.Facts.Env = root.Env
	if root.Digest != "" {
		rec.Facts.Digests = map[string]string{"root": root.Digest}
	}
	place := place(spec.Dir)
	covers, err := d.covers(ctx, root, place, *rec)
	if err != nil {
		return err
	}
	binds := slices.Clone(root.Binds)
	binds = append(binds, image.Bind{Host: spec.Proxy, Guest: nucleus.MachineProxy})
	for _, layer := range spec.Agent {
		source, err := filepath.EvalSymlinks(layer.Host)
		if err != nil {
			return machine.Refuse("agent layer %q: %v", layer.Name, err)
		}
		binds = append(binds, image.Bind{Host: source, Guest: layer.Guest})
	}
	skeleton, err := rec.makeRootfs(place)
	if err != nil {
		return err
	}
	if err := rec.showAt(place, d.config.Runsc, append(binds, image.Bind{Host: spec.Workspace})); err != nil {
		return err
	}
	root.Binds = binds
	if err := root.Build(skeleton, "/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/var", nucleus.MachineAgent, nucleus.MachineWorkspace); err != nil {
		return fmt.Errorf("root skeleton: %w", err)
	}
	if err := rec.save(place); err != nil {
		return err
	}
	return writeConfig(place, d.config.oci(spec, *rec, append(binds, covers...)))
}

// root finds the machine's root, and keeps the store from removing what it shows.
func (d *Driver) root(ctx context.Context, spec machine.Spec) (image.Root, error) {
	var root image.Root
	var err error
	if d.config.Images == nil {
		root, err = image.Resolve(spec.Image, d.config.Host)
	} else {
		root, err = d.config.Images.Resolve(ctx, spec.Image, d.config.Host, nil)
	}
	switch {
	case ctx.Err() != nil:
		return root, ctx.Err()
	case err != nil:
		return root, machine.Refuse("%v", err)
	case root.Digest != "":
		return root, d.config.Images.Hold(spec.Dir, root.Digest)
	}
	return root, nil
}

// covers returns binds that hide what `other` cannot read. Where a machine has ids
// of its own the host's kernel refuses such files to them, and there is nothing to hide.
func (d *Driver) covers(ctx context.Context, root image.Root, place place, rec record) ([]image.Bind, error) {
	if !rec.Facts.OneID {
		return nil, nil
	}
	var covers []image.Bind
	for _, bind := range root.Binds {
		hidden, err := d.config.Screen.Unreadable(ctx, bind.Host, time.Now())
		if err != nil {
			return nil, machine.Refuse("%v", err)
		}
		for _, name := range hidden {
			if name == bind.Host {
				return nil, machine.Refuse("%s is not for everybody to read", name)
			}
			cover, err := place.cover(name)
			if err != nil {
				return nil, err
			}
			covers = append(covers, image.Bind{Host: cover, Guest: filepath.Join(bind.Guest, name[len(bind.Host):])})
		}
	}
	return covers, nil
}

// cover returns an empty file or directory to lay over name.
func (p place) cover(name string) (string, error) {
	info, err := os.Lstat(name)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(p.empty(), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	if info.IsDir() {
		dir := filepath.Join(p.empty(), "dir")
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
		return dir, nil
	}
	file := filepath.Join(p.empty(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		return "", err
	}
	return file, nil
}

func writeConfig(place place, config specs.Spec) error {
	data, err := json.Marshal(config)
	if err != nil {
		return err
	}
	return os.WriteFile(place.config(), data, 0o600)
}

// capabilities of the proxy inside the machine: it builds roots, namespaces and
// users for the others and gives none of these on. They are the sentry's, not the
// host's. Nothing is inheritable or ambient.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
	"CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_RESOURCE",
}

// oci is the bundle's config.json.
func (c Config) oci(spec machine.Spec, rec record, binds []image.Bind) specs.Spec {
	pids := uint64(rec.Pids)
	return specs.Spec{
		Version:  specs.Version,
		Hostname: "cal",
		Root:     &specs.Root{Path: rec.root(place(spec.Dir)), Readonly: true},
		Process: &specs.Process{
			Args:            []string{nucleus.MachineProxy, "init"},
			Env:             []string{"PATH=" + image.DefaultPath},
			Cwd:             "/",
			NoNewPrivileges: true,
			Capabilities:    &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
			Rlimits: []specs.POSIXRlimit{
				{Type: "RLIMIT_NPROC", Hard: pids, Soft: pids},
				{Type: "RLIMIT_NOFILE", Hard: 1 << 20, Soft: 65536},
				{Type: "RLIMIT_CORE"},
			},
		},
		Mounts:      c.mounts(spec, rec, binds),
		Annotations: sharedWithHost(binds),
		Linux:       rec.linux(),
	}
}

func (c Config) mounts(spec machine.Spec, rec record, binds []image.Bind) []specs.Mount {
	uid, gid := fmt.Sprintf("uid=%d", rec.Facts.ToolsUID), fmt.Sprintf("gid=%d", rec.Facts.ToolsGID)
	// Files there are memory. A full file system is an answer, a paused machine is none.
	size := fmt.Sprintf("size=%d", max(rec.Memory, rec.MaxWatch)/2)
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "nodev", "noexec"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "nodev", "noexec"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid"}},
		scratch("/dev/shm", "mode=1777", size),
		scratch("/tmp", "mode=1777", size),
		scratch("/run", "mode=755", size),
		scratch(nucleus.MachineHome, "mode=755", uid, gid, size),
	}
	for _, bind := range binds {
		mounts = append(mounts, specs.Mount{
			Destination: bind.Guest, Type: "bind", Source: bind.Host, Options: []string{"bind", "ro", "nosuid", "nodev"},
		})
	}
	options := []string{"bind", "rw", "nosuid", "nodev"}
	if n := remembered(descriptors()); n > 0 {
		options = append(options, fmt.Sprintf("dcache=%d", n))
	}
	return append(mounts, specs.Mount{Destination: nucleus.MachineWorkspace, Type: "bind", Source: spec.Workspace, Options: options})
}

// sharedWithHost tells the sentry which binds the host may change while the machine
// runs, a package upgrade for one: all but the workspace. By the flags mounts are
// exclusive: what the sentry knows of a file it need not ask for again, which makes
// git status a third faster. What is written goes to the host's file at once all the
// same, for the sentry writes through a descriptor of it; only the times of a file that
// was just written are its own until it forgets the file. (The other way round, a
// hint "container" for the workspace, would lay an overlay over it.)
func sharedWithHost(binds []image.Bind) map[string]string {
	hints := map[string]string{}
	known := map[string]bool{}
	for i, bind := range binds {
		if known[bind.Host] { // covers have one source; two hints for it are refused
			continue
		}
		known[bind.Host] = true
		mount := fmt.Sprintf("dev.gvisor.spec.mount.bind%d.", i)
		hints[mount+"source"], hints[mount+"type"], hints[mount+"share"] = bind.Host, "bind", "shared"
	}
	return hints
}

const (
	alwaysRemembered = 1000  // without being told
	mostRemembered   = 65536 // about 100 MB
)

// remembered is how many unused files of the workspace the sentry keeps in mind; 0
// leaves it at its own figure. Each costs it up to three descriptors of the host, and
// a sentry that has no more dies, so a quarter of them is left for open files.
func remembered(descriptors uint64) uint64 {
	if n := min(descriptors/4, mostRemembered); n > alwaysRemembered {
		return n
	}
	return 0
}

// descriptors is how many runsc may open: it raises its limit to the hard one.
func descriptors() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	return limit.Max
}

func scratch(where string, options ...string) specs.Mount {
	return specs.Mount{Destination: where, Type: "tmpfs", Source: "tmpfs", Options: append([]string{"nosuid", "nodev"}, options...)}
}

func (r record) linux() *specs.Linux {
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: r.IDBase, Size: r.idCount()}}
	if r.IDBase == 0 {
		// runsc has by then entered a user namespace in which the user is 0.
		ids = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 0, Size: 1}}
	}
	linux := &specs.Linux{UIDMappings: ids, GIDMappings: ids}
	for _, kind := range []specs.LinuxNamespaceType{
		specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace, specs.UserNamespace,
	} {
		linux.Namespaces = append(linux.Namespaces, specs.LinuxNamespace{Type: kind})
	}
	if r.Cgroup != "" {
		linux.CgroupsPath = "/" + r.Cgroup
	}
	return linux
}

// environment is all that runsc gets of the environment.
var environment = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
