package site

import (
	"errors"
	"io/fs"
	"os"
	"slices"

	"cal/machine"
)

// WorkspaceDisk is the only file of a workspace that is a disk.
const WorkspaceDisk = "workspace.ext4"

// another is how a refusal of the other kind of workspace ends.
const another = "take the work out with cal repo fetch, or name another workspace"

// OnlyDisk refuses a workspace in which files lie as they are: another driver made it. The
// names beside the disk's may be there too.
func OnlyDisk(dir string, beside ...string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if name := entry.Name(); name != WorkspaceDisk && !slices.Contains(beside, name) {
			return machine.Refuse("workspace %s holds %s as a file of the host, so a driver without disks made it; %s", dir, name, another)
		}
	}
	return nil
}

// OnlyFiles refuses a workspace that is a disk. One that belongs to a machine's ids, into which
// this process may not look, is none: the directory of a disk stays the person's.
func OnlyFiles(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(entries) == 1 && entries[0].Name() == WorkspaceDisk {
		return machine.Refuse("workspace %s is the disk of a microVM; %s", dir, another)
	}
	return nil
}
