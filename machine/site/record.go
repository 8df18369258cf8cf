package site

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"cal/internal/durable"
	"cal/machine"
)

// RecordFile is the name of a machine's record: what another process needs to adopt or
// remove it. It is on the disk before what it names is made, and each driver's says in
// "driver" whose it is.
const RecordFile = "machine.json"

const maxRecord = 1 << 20

// LoadRecord reads the record of the machine of dir, which driver must have made: the error
// wraps machine.ErrForeign where another did, and fs.ErrNotExist where there is none.
func LoadRecord(dir, driver string, record any) error {
	path := filepath.Join(dir, RecordFile)
	data, err := durable.ReadFile(path, maxRecord)
	if err != nil {
		return err
	}
	var of struct {
		Driver string `json:"driver"`
	}
	if err := json.Unmarshal(data, &of); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	switch of.Driver {
	case driver:
		return durable.Load(path, record)
	case "":
		return fmt.Errorf("%s names no driver", path)
	}
	return fmt.Errorf("%s: %w: %q", dir, machine.ErrForeign, of.Driver)
}
