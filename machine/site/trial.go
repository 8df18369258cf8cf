package site

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"cal/internal/durable"
	"cal/internal/process"
	"cal/machine"
)

// Trial is a directory for all that a probe makes. It is locked while the probe runs: what
// a process left that died in one is removed by ClearTrials.
type Trial struct {
	Dir    string // mode 0700
	driver machine.Driver
	lock   io.Closer
}

const trialPrefix = "cal-probe-"

// BeginTrial makes a directory for a probe of driver in scratch, after it removed what earlier
// ones left.
func BeginTrial(ctx context.Context, scratch string, driver machine.Driver) (*Trial, error) {
	if err := ClearTrials(ctx, scratch, driver); err != nil {
		return nil, err
	}
	if scratch != "" {
		if err := os.MkdirAll(scratch, 0o700); err != nil {
			return nil, err
		}
	}
	for {
		dir, err := os.MkdirTemp(scratch, trialPrefix)
		if err != nil {
			return nil, err
		}
		lock, err := lockTrial(dir)
		if err == nil {
			return &Trial{dir, driver, lock}, os.Mkdir(filepath.Join(dir, trialMachine), 0o700)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, durable.ErrLocked) {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		// Another process took it for one that was left.
	}
}

const trialMachine = "m"

// Machine is the directory for the probe's machine, empty.
func (t *Trial) Machine() string { return filepath.Join(t.Dir, trialMachine) }

// EmptyRoot is a root file system in which there is nothing. It stays where it is, beside the
// trials, so that each probe's is the same image.
func (t *Trial) EmptyRoot() (dir string, err error) {
	place := filepath.Join(filepath.Dir(t.Dir), "cal-empty-root")
	if err := os.Mkdir(place, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	if !own(place) { // another user's, where scratch is everybody's
		place = t.Dir
	}
	dir = filepath.Join(place, "root")
	return dir, os.MkdirAll(filepath.Join(dir, "usr"), 0o755)
}

// End removes the machine and all else. What ended the probe must not end this, so ctx
// gives its values alone.
func (t *Trial) End(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), process.EndTimeout)
	defer cancel()
	defer t.lock.Close()
	return removeTrial(ctx, t.Dir, t.driver)
}

// ClearTrials removes what processes left in scratch that died while they probed one of the
// drivers. Only what this process's user made is looked at: scratch may be everybody's.
func ClearTrials(ctx context.Context, scratch string, drivers ...machine.Driver) error {
	if scratch == "" {
		scratch = os.TempDir()
	}
	found, err := filepath.Glob(filepath.Join(scratch, trialPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range found {
		if own(dir) {
			err = errors.Join(err, clearTrial(ctx, dir, drivers...))
		}
	}
	if err != nil {
		return fmt.Errorf("what an earlier probe left: %w", err)
	}
	return nil
}

func clearTrial(ctx context.Context, dir string, drivers ...machine.Driver) error {
	lock, err := lockTrial(dir)
	if errors.Is(err, durable.ErrLocked) || errors.Is(err, fs.ErrNotExist) {
		return nil // it is another's, or was removed just now
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	return removeTrial(ctx, dir, drivers...)
}

func removeTrial(ctx context.Context, dir string, drivers ...machine.Driver) error {
	err := machine.RemoveAny(ctx, filepath.Join(dir, trialMachine), drivers...)
	if errors.Is(err, machine.ErrForeign) {
		return nil // its driver's
	}
	if err != nil {
		return err
	}
	return Delete(filepath.Dir(dir), filepath.Base(dir))
}

// lockTrial takes a directory's lock, if that is still in it.
func lockTrial(dir string) (io.Closer, error) {
	opened, err := durable.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	lock, err := opened.Lock(LockFile)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(filepath.Join(dir, LockFile)); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// own says whether a directory is this user's and nobody else may look into it.
func own(dir string) bool {
	info, err := os.Lstat(dir)
	if err != nil || !info.IsDir() || info.Mode().Perm() != 0o700 {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid()
}
