package gvisor

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path"
	"syscall"

	"cal/machine"
)

// Machines of root use ids from lowestID, above what is given to users, system
// services and containers, 65536 for each. Which of the slots is taken by
// chance, so that a machine that broke out of the sentry finds no process of another machine
// under its ids, and stays with the workspace, whose files carry it.
const (
	lowestID = 0x70000000
	idCount  = 65536
	slots    = 4094
)

// idBase returns the first host id for a machine with this workspace.
func idBase(workspace string) (uint32, error) {
	info, err := os.Lstat(workspace)
	if err != nil {
		return 0, err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if base := owner - machine.ToolsID; owner >= lowestID && base%idCount == 0 && (base-lowestID)/idCount < slots {
		return base, nil
	}
	slot, err := rand.Int(rand.Reader, big.NewInt(slots))
	if err != nil {
		return 0, err
	}
	return lowestID + uint32(slot.Int64())*idCount, nil
}

// giveWorkspace makes the tools' user of the machine the owner of the
// workspace. It follows no link, and refuses a file with a second name: that name
// may lie in somebody's repository.
func giveWorkspace(workspace string, base uint32) error {
	id := int(base) + machine.ToolsID
	info, err := os.Lstat(workspace)
	if err != nil {
		return err
	}
	if int(info.Sys().(*syscall.Stat_t).Uid) == id {
		return nil
	}
	root, err := os.OpenRoot(workspace)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := giveBelow(root, ".", id); err != nil {
		return err
	}
	// The directory itself comes last: its owner says that all of it is done.
	return root.Lchown(".", id, id)
}

func giveBelow(root *os.Root, dir string, id int) error {
	opened, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer opened.Close()
	for {
		entries, err := opened.ReadDir(1024)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := give(root, path.Join(dir, entry.Name()), entry, id); err != nil {
				return err
			}
		}
	}
}

func give(root *os.Root, name string, entry fs.DirEntry, id int) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	if stat := info.Sys().(*syscall.Stat_t); !entry.IsDir() && stat.Nlink > 1 {
		return machine.Refuse("workspace file %s has %d names; it would change owner under all of them", name, stat.Nlink)
	}
	if err := root.Lchown(name, id, id); err != nil {
		return err
	}
	if entry.IsDir() {
		return giveBelow(root, name, id)
	}
	return nil
}

// idsMapped says whether the ids of every slot exist in this user namespace: a
// container's root may own a few thousand only.
func idsMapped(uidMap io.Reader) (mapped bool, count uint64) {
	lines := bufio.NewScanner(uidMap)
	for lines.Scan() {
		var first, outside, size uint64
		if _, err := fmt.Sscan(lines.Text(), &first, &outside, &size); err != nil {
			continue
		}
		count += size
		if first <= lowestID && first+size >= lowestID+slots*idCount {
			mapped = true
		}
	}
	return mapped, count
}
