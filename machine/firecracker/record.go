package firecracker

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"

	"cal/internal/durable"
	"cal/internal/process"
	"cal/machine"
	"cal/machine/microvm"
	"cal/machine/site"
)

// record is the machine's, see site.RecordFile.
type record struct {
	Driver  string `json:"driver"`
	ID      string `json:"id"`
	Created string `json:"created"`
	Jail    jail   `json:"jail"`

	// Template is the jail in which a guest of the machine's shape boots for a snapshot.
	Template jail `json:"template"`

	Shape microvm.Shape `json:"shape"`
	Facts machine.Facts `json:"facts"`
}

func (r record) save() error { return durable.Store(filepath.Join(r.Jail.Dir, site.RecordFile), r) }

func loadRecord(dir string) (rec record, err error) {
	if err := site.LoadRecord(dir, name, &rec); err != nil {
		return record{}, err
	}
	rec.Jail.Dir, rec.Template.Dir = dir, dir
	return rec, errors.Join(rec.Jail.check(), rec.Template.check())
}

// check refuses the names of a damaged record: what they name is deleted.
func (j jail) check() error {
	for _, name := range []string{j.ID, j.Exec} {
		if name != filepath.Base(name) || name == "." || name == ".." || name == "/" {
			return fmt.Errorf("record names %q, which is no file name", name)
		}
	}
	if len(j.ID) < 2*idBytes || j.UID < lowestID || j.UID >= lowestID+idCount {
		return fmt.Errorf("record names the instance %q of user %d, which is none of this driver's", j.ID, j.UID)
	}
	return nil
}

// Each machine is a user of its own: a number taken by chance, below those of
// gVisor's machines and above what is given to users, services and containers.
const (
	lowestID = process.LowestMachineID
	idCount  = 1 << 28
	idBytes  = 16 // of chance in an instance's name
)

func newUID() (uint32, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(idCount))
	if err != nil {
		return 0, err
	}
	return lowestID + uint32(n.Int64()), nil
}

// newInstance names a Firecracker. Its processes are found by this name, so nobody may
// be able to guess it.
func newInstance() string {
	var chance [idBytes]byte
	rand.Read(chance[:])
	return "cal-" + hex.EncodeToString(chance[:])
}
