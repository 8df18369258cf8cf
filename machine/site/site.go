// Package site is what every driver does with a machine's directory on the host:
// hold it and the machine in it, give it back, delete what was made in it, keep the console small.
//
// Claim: one process at a time holds a directory, and what is deleted is what the
// machine had, never what is mounted there. Threat: the holder is killed at any
// moment; a mount was left in the directory; the console is written by the guest.
// Promise: the lock goes with its holder, no deletion goes through a mount or a link,
// and no text of a guest takes more room than is stated here.
package site

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/machine"
)

// LockFile is the name of the lock in a machine's directory.
const LockFile = "lock"

// lockTimeout outlasts the moment in which a child of a killed node still has the
// node's lock, between fork and exec, on a busy host.
const lockTimeout = 2 * time.Second

// Lock takes the directory for this process.
func Lock(ctx context.Context, path string) (io.Closer, error) {
	dir, err := durable.OpenDir(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	for {
		held, err := dir.Lock(LockFile)
		if err == nil {
			return held, nil
		}
		if !errors.Is(err, durable.ErrLocked) || Pause(ctx, 5*time.Millisecond) != nil {
			return nil, fmt.Errorf("machine directory %s: %w", path, err)
		}
	}
}

// claim is Lock of a directory in which no machine may be.
func claim(ctx context.Context, path string) (io.Closer, error) {
	if used(path) {
		return nil, errUsed(path)
	}
	held, err := Lock(ctx, path)
	if err == nil && used(path) { // meanwhile
		held.Close()
		return nil, errUsed(path)
	}
	return held, err
}

func used(path string) bool {
	_, err := os.Lstat(filepath.Join(path, RecordFile))
	return err == nil
}

func errUsed(path string) error {
	return machine.Refuse("machine directory %s is in use; Adopt or Remove it", path)
}

// unlock gives the directory back as it was before Lock.
func unlock(path string, held io.Closer) error {
	err := os.Remove(filepath.Join(path, LockFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, held.Close())
}

// Discard removes the emptied directory. One that holds anything else is its
// owner's and stays.
func Discard(path string, held io.Closer) error {
	if err := unlock(path, held); err != nil {
		return err
	}
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY) {
		return nil
	}
	return err
}

// Delete removes names of a directory and never goes through a mount.
func Delete(dir string, names ...string) error {
	for _, name := range names {
		path := filepath.Join(dir, name)
		if err := unmountBelow(path); err != nil {
			return err
		}
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return nil
}

// DeleteRecord removes the record of a machine, and one that was being written. It goes
// last: while it is there, what else is left is known.
func DeleteRecord(path string) error {
	if err := Delete(path, RecordFile); err != nil {
		return err
	}
	dir, err := durable.OpenDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Clean()
}

// unmountBelow detaches every mount at or below dir that this process sees. Deleting
// through one would delete what is mounted.
func unmountBelow(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range bytes.Lines(table) {
		fields := strings.Fields(string(line))
		if len(fields) < 5 || !strings.HasPrefix(unescape(fields[4])+"/", dir+"/") {
			continue
		}
		if err := unix.Unmount(unescape(fields[4]), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmounting %s: %w", unescape(fields[4]), err)
		}
	}
	return nil
}

// unescape undoes the octal escapes of /proc/self/mountinfo.
func unescape(name string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(name)
}

// Pause waits, or returns early with the context's error.
func Pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
