package machine

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"cal/nucleus"
)

var validID = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// Resources are what a Spec can limit, in the order in which Limits states them.
var Resources = []string{"cpu", "memory", "pids", "disk"}

// watchable are those whose limit a driver may watch.
var watchable = []string{"cpu", "memory", "pids"}

// Check refuses what no driver may accept: names that are paths, a directory
// that others can enter, layers over places of the machine's own or over one
// another, limits out of range. It reads the host's file system.
func (s Spec) Check() error {
	if !validID.MatchString(s.ID) {
		return Refuse("machine id %q is not 1 to 63 of a-z, 0-9 and '-'", s.ID)
	}
	for _, check := range []func() error{s.checkDirs, s.checkProxy, s.checkImage, s.checkLayers, s.checkResources} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (s Spec) checkDirs() error {
	info, err := directory("machine directory", s.Dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return Refuse("machine directory %s has mode %04o, want 0700", s.Dir, info.Mode().Perm())
	}
	if _, err := directory("workspace", s.Workspace); err != nil {
		return err
	}
	if within(s.Workspace, s.Dir) || within(s.Dir, s.Workspace) {
		return Refuse("workspace %s and machine directory %s lie in one another", s.Workspace, s.Dir)
	}
	return nil
}

func (s Spec) checkProxy() error {
	if err := clean("proxy", s.Proxy); err != nil {
		return err
	}
	info, err := os.Stat(s.Proxy)
	if err != nil {
		return Refuse("proxy: %v", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return Refuse("proxy %s is not a program", s.Proxy)
	}
	return nil
}

func (s Spec) checkImage() error {
	if s.Image.Kind == "" {
		return Refuse("no kind of image is named")
	}
	if err := s.Image.Check(); err != nil {
		return Refuse("%v", err)
	}
	return nil
}

// own are the places that the driver fills itself; no layer may lie at them,
// above them or in them.
var own = []string{"/proc", "/sys", "/dev", "/tmp", "/run", "/.nucleus", nucleus.MachineWorkspace, "/etc/passwd", "/etc/group", "/etc/resolv.conf", "/etc/hosts"}

func (s Spec) checkLayers() error {
	var guests []string
	for _, layer := range s.Image.Layers {
		if err := s.checkLayer(layer); err != nil {
			return err
		}
		for _, place := range own {
			if within(layer.Guest, place) || within(place, layer.Guest) {
				return Refuse("layer %q at %s covers %s", layer.Name, layer.Guest, place)
			}
		}
		guests = append(guests, layer.Guest)
	}
	for _, layer := range s.Agent {
		if err := s.checkLayer(layer); err != nil {
			return err
		}
		if layer.Guest == nucleus.MachineAgent || !within(layer.Guest, nucleus.MachineAgent) {
			return Refuse("agent layer %q at %s is not below %s", layer.Name, layer.Guest, nucleus.MachineAgent)
		}
		guests = append(guests, layer.Guest)
	}
	for i, one := range guests {
		for _, other := range guests[i+1:] {
			if within(one, other) || within(other, one) {
				return Refuse("layers at %s and %s cover one another", one, other)
			}
		}
	}
	return nil
}

func (s Spec) checkLayer(layer nucleus.Layer) error {
	if err := clean("layer "+layer.Name, layer.Host); err != nil {
		return err
	}
	if err := clean("layer "+layer.Name, layer.Guest); err != nil {
		return err
	}
	if within(s.Dir, layer.Host) || within(s.Workspace, layer.Host) {
		return Refuse("layer %q shows %s, which holds the machine's own directories", layer.Name, layer.Host)
	}
	info, err := os.Stat(layer.Host)
	if err != nil {
		return Refuse("layer %q: %v", layer.Name, err)
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return Refuse("layer %q: %s is neither directory nor file", layer.Name, layer.Host)
	}
	return nil
}

func (s Spec) checkResources() error {
	if err := s.Resources.Check(); err != nil {
		return Refuse("%v", err)
	}
	for _, name := range s.Watched {
		if !slices.Contains(watchable, name) {
			return Refuse("resource %q may not be watched (%s)", name, strings.Join(watchable, ", "))
		}
	}
	return nil
}

// directory refuses what is not a directory itself: a link there could be
// turned at any time.
func directory(what, path string) (fs.FileInfo, error) {
	if err := clean(what, path); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, Refuse("%s: %v", what, err)
	}
	if !info.IsDir() {
		return nil, Refuse("%s %s is not a directory", what, path)
	}
	return info, nil
}

func clean(what, path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsAny(path, "\x00\n") {
		return Refuse("%s: %q is not a clean absolute path", what, path)
	}
	if path == "/" {
		return Refuse("%s is the whole file system", what)
	}
	return nil
}

// within reports whether path is dir or lies below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// States says how a limit is kept; a Spec's limit that is only watched must be
// allowed by name.
func (s Spec) States(limits []nucleus.Limit) error {
	stated := map[string]int{"cpu": s.Resources.CPU, "memory": s.Resources.MemoryMB, "pids": s.Resources.Pids, "disk": s.Resources.DiskMB}
	for _, limit := range limits {
		if stated[limit.Resource] == 0 || limit.How == Enforced {
			continue
		}
		if limit.How == Watched && slices.Contains(s.Watched, limit.Resource) {
			continue
		}
		if limit.How == Watched {
			return Refuse("%s limit of %s would be %s here, not enforced; allow it by name (allow_watched: [%s]) or leave the limit out",
				limit.Resource, limit.Value, limit.How, limit.Resource)
		}
		return Refuse("%s is not limited here, and a limit of %d is asked for; leave it out, or take another driver", limit.Resource, stated[limit.Resource])
	}
	return nil
}

// How a limit is kept.
const (
	Enforced  = "enforced"
	Watched   = "watched"
	Unlimited = "none"
)

// NoLimit is the statement for a resource that is not limited.
func NoLimit(resource string) nucleus.Limit {
	return nucleus.Limit{Resource: resource, Value: "unlimited", How: Unlimited}
}

// Value writes a limit's value for a person.
func Value(n int, unit string) string { return fmt.Sprintf("%d %s", n, unit) }
