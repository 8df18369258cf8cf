package machinetest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/machine/site"
)

// readDisk reads a file of a workspace that is a disk.
func readDisk(path string) ([]byte, error) {
	workspace, file := filepath.Split(path)
	disk, remove, err := settledDisk(workspace)
	if err != nil {
		return nil, err
	}
	defer remove()
	output, err := exec.Command("debugfs", "-R", "cat /"+file, disk).Output()
	if err == nil && len(output) == 0 {
		listing, _ := exec.Command("debugfs", "-R", "ls -l /", disk).Output()
		if !strings.Contains(string(listing), file) {
			return nil, fmt.Errorf("%s: %w", path, os.ErrNotExist)
		}
	}
	return output, err
}

// copyDisk copies all of a workspace that is a disk.
func copyDisk(t *testing.T, workspace string) string {
	t.Helper()
	disk, remove, err := settledDisk(workspace)
	must(t, err)
	defer remove()
	dir := t.TempDir()
	output, err := exec.Command("debugfs", "-R", "rdump / "+dir, disk).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs: %v: %s", err, output)
	}
	if err := copyTimes(disk, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

var modified = regexp.MustCompile(`(?m)^ *mtime: 0x([0-9a-f]+):([0-9a-f]+)`)

// copyTimes gives the files of dir the times that they have on the disk, of which rdump
// knows the seconds alone.
func copyTimes(disk, dir string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		output, err := exec.Command("debugfs", "-R", "stat "+strings.TrimPrefix(path, dir), disk).Output()
		if err != nil {
			return err
		}
		found := modified.FindSubmatch(output)
		if found == nil {
			return fmt.Errorf("debugfs says no time of %s: %s", path, output)
		}
		seconds, err := strconv.ParseInt(string(found[1]), 16, 64)
		if err != nil {
			return err
		}
		fraction, err := strconv.ParseInt(string(found[2]), 16, 64)
		if err != nil {
			return err
		}
		at := time.Unix(seconds, fraction>>2) // the low bits are more of the seconds
		return os.Chtimes(path, at, at)
	})
}

// settledDisk is a copy of a workspace's disk whose journal was replayed, as a kernel does
// when it mounts it.
func settledDisk(workspace string) (disk string, remove func(), err error) {
	dir, err := os.MkdirTemp("/var/tmp", "cal-test-disk-")
	if err != nil {
		return "", nil, err
	}
	disk, remove = filepath.Join(dir, "disk"), func() { os.RemoveAll(dir) }
	if err := copySparse(filepath.Join(workspace, site.WorkspaceDisk), disk); err != nil {
		remove()
		return "", nil, err
	}
	output, err := exec.Command("e2fsck", "-p", disk).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() <= 1 { // 1: it mended something, the journal
		err = nil
	}
	if err != nil {
		remove()
		return "", nil, fmt.Errorf("e2fsck: %w: %s", err, output)
	}
	return disk, remove, nil
}

func copySparse(source, target string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Create(target)
	if err != nil {
		return err
	}
	defer to.Close()
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if err := to.Truncate(info.Size()); err != nil {
		return err
	}
	for at := int64(0); ; {
		start, err := from.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := from.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(to, start), io.NewSectionReader(from, start, end-start)); err != nil {
			return err
		}
		at = end
	}
}
