// Package durable writes files so that they survive a power cut.
//
// Claim: when a function here returns nil, what it wrote is on the disk under
// its name; a reader sees the old content or the new, never a part. Threat:
// kill -9, power loss, a full disk, a name that somebody replaced by a symbolic
// link or a FIFO. Promise: a write never goes through a link at its last
// element, a read never leaves the directory, blocks or exceeds its bound.
//
// An error does not mean that nothing was written: a failed sync may follow a
// rename that took place. And after a failed sync the page cache may hold what
// the disk does not, so the only safe way on is to write the content anew under
// a new file, which WriteFile always does.
package durable

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"cal/nucleus"
)

// temporary begins the name of every file that is not finished.
const temporary = ".tmp-"

// maxJSON bounds a record that Load reads.
const maxJSON = 16 << 20

// Dir is an open directory. Names are slash-separated, relative to it, and
// cannot leave it, not by ".." and not by a symbolic link.
type Dir struct {
	root *os.Root
}

// OpenDir opens an existing directory.
func OpenDir(name string) (*Dir, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &Dir{root}, nil
}

// Close closes the directory; files opened in it stay open.
func (d *Dir) Close() error { return d.root.Close() }

// ReadFile returns the content of a regular file of at most limit bytes. A
// symbolic link, a FIFO, a device and a directory are refused.
func (d *Dir) ReadFile(name string, limit int64) ([]byte, error) {
	before, err := d.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file (%s)", name, before.Mode().Type())
	}
	// The name may have been replaced meanwhile: do not block on a FIFO.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file (%s)", name, info.Mode().Type())
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", name, info.Size(), limit)
	}
	data := make([]byte, 0, info.Size()+1)
	for {
		n, err := f.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		switch {
		case int64(len(data)) > limit:
			return nil, fmt.Errorf("%s has more than %d bytes", name, limit)
		case err == io.EOF:
			return data, nil
		case err != nil:
			return nil, err
		}
		if len(data) == cap(data) {
			data = append(data, 0)[:len(data)]
		}
	}
}

// WriteFile makes name a regular file with exactly this content and mode,
// whatever was there before, a symbolic link included (which is replaced, not
// followed). Directories on the way must exist.
func (d *Dir) WriteFile(name string, data []byte, perm fs.FileMode) (err error) {
	parent, err := d.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, parent.Close()) }()
	// A file left by a crash lies in the root of the directory, where Clean
	// finds it without a walk.
	unfinished := temporary + rand.Text()
	f, err := d.root.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := fill(f, data, perm); err != nil {
		return errors.Join(err, d.root.Remove(unfinished))
	}
	if err := d.root.Rename(unfinished, name); err != nil {
		return errors.Join(err, d.root.Remove(unfinished))
	}
	return parent.Sync()
}

// fill writes, syncs and closes f.
func fill(f *os.File, data []byte, perm fs.FileMode) error {
	err := f.Chmod(perm)
	if err == nil {
		_, err = f.Write(data)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// MkdirAll makes name and the directories on the way to it; those that exist
// stay as they are.
func (d *Dir) MkdirAll(name string, perm fs.FileMode) error {
	name = path.Clean(name)
	if info, err := d.root.Stat(name); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s is not a directory", name)
		}
		return nil
	}
	if err := d.MkdirAll(path.Dir(name), perm); err != nil {
		return err
	}
	if err := d.root.Mkdir(name, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return d.syncDir(path.Dir(name))
}

// Append opens an existing regular file for writing at its end.
func (d *Dir) Append(name string) (*os.File, error) {
	f, err := d.root.OpenFile(name, os.O_WRONLY|os.O_APPEND|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file (%s)", name, info.Mode().Type())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Remove removes a file or an empty directory. One that is not there is no
// error.
func (d *Dir) Remove(name string) error {
	if err := d.Discard(name); err != nil {
		return err
	}
	return d.syncDir(path.Dir(name))
}

// Discard is Remove of what may come back after a power cut.
func (d *Dir) Discard(name string) error {
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Names lists the directory itself, without unfinished files, sorted.
func (d *Dir) Names() ([]string, error) {
	list, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range list {
		if !strings.HasPrefix(entry.Name(), temporary) {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// Clean removes the unfinished files that a crash left. The caller must be the
// only writer of the directory.
func (d *Dir) Clean() error {
	list, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, entry := range list {
		if strings.HasPrefix(entry.Name(), temporary) {
			if err := d.root.Remove(entry.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// FS shows the directory for walking. It follows links that stay inside.
func (d *Dir) FS() fs.FS { return d.root.FS() }

// Lock takes an exclusive lock on the file name, which is made if it is
// missing, and holds it until the returned file is closed or the process ends,
// however it ends. ErrLocked means that somebody else holds it.
func (d *Dir) Lock(name string) (io.Closer, error) {
	f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = ErrLocked
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ErrLocked is returned by Lock.
var ErrLocked = errors.New("locked by another process")

func (d *Dir) syncDir(name string) error {
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// in opens the directory of a path and calls do with it and the last element.
func in(name string, do func(d *Dir, base string) error) error {
	name, err := filepath.Abs(name)
	if err != nil {
		return err
	}
	d, err := OpenDir(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := do(d, filepath.Base(name)); err != nil {
		return fmt.Errorf("%s: %w", filepath.Dir(name), err)
	}
	return nil
}

// WriteFile is Dir.WriteFile in the directory of a path.
func WriteFile(name string, data []byte, perm fs.FileMode) error {
	return in(name, func(d *Dir, base string) error { return d.WriteFile(base, data, perm) })
}

// ReadFile is Dir.ReadFile in the directory of a path.
func ReadFile(name string, limit int64) (data []byte, err error) {
	err = in(name, func(d *Dir, base string) error {
		data, err = d.ReadFile(base, limit)
		return err
	})
	return data, err
}

// Remove is Dir.Remove in the directory of a path.
func Remove(name string) error {
	return in(name, func(d *Dir, base string) error { return d.Remove(base) })
}

// MkdirAll makes a directory and those on the way to it, each durably.
func MkdirAll(name string, perm fs.FileMode) error {
	name, err := filepath.Abs(name)
	if err != nil {
		return err
	}
	if info, err := os.Stat(name); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s is not a directory", name)
		}
		return nil
	}
	if err := MkdirAll(filepath.Dir(name), perm); err != nil {
		return err
	}
	return in(name, func(d *Dir, base string) error { return d.MkdirAll(base, perm) })
}

// Store writes v as JSON, readable by its owner only.
func Store(name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return WriteFile(name, append(data, '\n'), 0o600)
}

// Load reads what Store wrote. Unknown fields and data after the value are
// refused, fs.ErrNotExist says that there is no such file.
func Load(name string, v any) error {
	data, err := ReadFile(name, maxJSON)
	if err != nil {
		return err
	}
	if err := nucleus.Strict(data, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
