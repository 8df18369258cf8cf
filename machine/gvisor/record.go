package gvisor

import (
	"os"
	"path/filepath"
	"syscall"

	"cal/internal/cgroup"
	"cal/internal/durable"
	"cal/internal/idmap"
	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

// place is a machine's directory. runsc's own state, the bundle, the console and
// the record lie at fixed names in it, so that they can be removed unread.
type place string

func (p place) runscRoot() string { return filepath.Join(string(p), "r") }

// argument is one that every process of runsc for the place has.
func (p place) argument() string { return "--root=" + p.runscRoot() }

func (p place) empty() string   { return filepath.Join(string(p), "empty") }
func (p place) config() string  { return filepath.Join(string(p), "config.json") }
func (p place) console() string { return filepath.Join(string(p), "console") }
func (p place) pid() string     { return filepath.Join(string(p), "pid") }
func (p place) record() string  { return filepath.Join(string(p), site.RecordFile) }

const (
	name      = "gvisor"
	container = "m" // runsc's name for the only container of its root
)

// made are all names in a place but the record.
var made = []string{"r", "rootfs", "empty", "config.json", "console", "pid"}

// check refuses a directory in which runsc could not put its control socket:
// it would then put it into /run or /tmp without a word, where nobody removes it.
func (p place) check() error {
	socket := filepath.Join(p.runscRoot(), "runsc-"+container+".sock")
	if most := len(syscall.RawSockaddrUnix{}.Path) - 1; len(socket) > most {
		return machine.Refuse("machine directory %s is too long: its control socket's path has %d bytes, at most %d are possible", p, len(socket), most)
	}
	return nil
}

// record is the machine's, see site.RecordFile.
type record struct {
	Driver  string   `json:"driver"`
	ID      string   `json:"id"`
	Created string   `json:"created"`
	IDBase  uint32   `json:"id_base,omitempty"` // id of the machine's root, where runsc runs; 0: the user who started it
	Cgroup  string   `json:"cgroup,omitempty"`
	Kept    []string `json:"kept,omitempty"` // by the cgroup, see cgroup.Group

	// Map is the person's namespace in which runsc ran, where the person has
	// subordinate ids. Without it IDBase is an id of the host.
	Map *idmap.Map `json:"map,omitempty"`

	// Shown is the directory at which that namespace shows the skeleton.
	Shown string `json:"shown,omitempty"`

	// Root is the directory of the root's skeleton where it cannot lie in the
	// place: started as root, the gofer has an id of the machine's and must be able to
	// walk there, which the host root's home does not let it. It holds no secret.
	Root string `json:"root,omitempty"`

	Facts    machine.Facts   `json:"facts"`
	Limits   []nucleus.Limit `json:"limits,omitempty"`
	Memory   int64           `json:"memory,omitempty"`    // bytes, where a cgroup enforces it
	MaxWatch int64           `json:"max_watch,omitempty"` // bytes, where it is watched
	CPU      int             `json:"cpu,omitempty"`
	Pids     int             `json:"pids,omitempty"`

	wanted cgroup.Limits // of the cgroup, in the process that makes the machine
}

// group is the machine's cgroup.
func (r record) group() cgroup.Group { return cgroup.Group{Name: r.Cgroup, Kept: r.Kept} }

// rootfs is where the skeleton of the machine's root lies.
func (r record) rootfs(place place) string {
	if r.Root != "" {
		return filepath.Join(r.Root, "rootfs")
	}
	return filepath.Join(string(place), "rootfs")
}

// makeRootfs makes that directory, empty.
func (r record) makeRootfs(place place) (string, error) {
	if r.Root != "" {
		if err := os.MkdirAll(filepath.Dir(r.Root), 0o711); err != nil {
			return "", err
		}
		if err := os.Mkdir(r.Root, 0o711); err != nil {
			return "", err
		}
	}
	return r.rootfs(place), os.Mkdir(r.rootfs(place), 0o755)
}

func (r record) save(place place) error { return durable.Store(place.record(), r) }

func loadRecord(dir string) (rec record, err error) { return rec, site.LoadRecord(dir, name, &rec) }
