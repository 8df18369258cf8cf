package qemu

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"

	"cal/internal/cgroup"
	"cal/internal/durable"
	"cal/internal/idmap"
	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
	"cal/nucleus"
)

// The names in a machine's directory.
const (
	scratchFile   = "scratch.ext4"
	wireSocket    = "wire"
	wire2Socket   = "wire2" // a new wire comes here while the old one is in use
	monitorSocket = "qmp"
	consoleSocket = "console"
)

// made are all names but the record.
var made = []string{scratchFile, wireSocket, wire2Socket, monitorSocket, consoleSocket}

// place is a machine's directory.
type place string

func (p place) path(name string) string { return filepath.Join(string(p), name) }

// check refuses a directory in which no socket can be made.
func (p place) check() error {
	longest := p.path(consoleSocket)
	if most := len(syscall.RawSockaddrUnix{}.Path) - 1; len(longest) > most {
		return machine.Refuse("machine directory %s is too long: a socket's path has %d bytes, at most %d are possible", p, len(longest), most)
	}
	return nil
}

// record is the machine's, see site.RecordFile.
type record struct {
	Driver   string        `json:"driver"`
	Emulated bool          `json:"emulated,omitempty"`
	ID       string        `json:"id"`
	Created  string        `json:"created"`
	Instance string        `json:"instance"`         // names the cgroup, and in the arguments the process; nobody can guess it
	User     uint32        `json:"user,omitempty"`   // that QEMU is; 0: who started it
	Map      *idmap.Map    `json:"map,omitempty"`    // whose id User is, of a person with subordinate ids
	Kept     []string      `json:"kept,omitempty"`   // by the cgroup, see cgroup.Group
	Cgroup   bool          `json:"cgroup,omitempty"` // there is one
	Shape    microvm.Shape `json:"shape"`
	Facts    machine.Facts `json:"facts"`

	Limits []nucleus.Limit `json:"limits,omitempty"`
}

func (r record) save(p place) error { return durable.Store(p.path(site.RecordFile), r) }

func (r record) group() cgroup.Group {
	if !r.Cgroup {
		return cgroup.Group{}
	}
	return cgroup.Group{Name: r.Instance, Kept: r.Kept}
}

// tag is the argument by which the machine's process is found.
func (r record) tag(p place) string {
	return strings.ReplaceAll(p.path(r.Instance), ",", ",,") // as QEMU reads a name
}

func loadRecord(dir string) (rec record, err error) {
	if err := site.LoadRecord(dir, name, &rec); err != nil {
		return record{}, err
	}
	if rec.Instance == "" || rec.Instance != filepath.Base(rec.Instance) || !strings.HasPrefix(rec.Instance, "cal-") {
		return record{}, fmt.Errorf("%s: the record names the instance %q, which is none of this driver's", dir, rec.Instance)
	}
	return rec, nil
}
