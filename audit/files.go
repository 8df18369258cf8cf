package audit

import (
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"cal/internal/durable"
)

// files is a directory of the host. Entries show what agents did, so it is
// private to its owner.
type files struct {
	*durable.Dir
}

func openFiles(dir string) (FS, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	d, err := durable.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	return files{d}, nil
}

func (f files) Lock(name string) (io.Closer, error) {
	lock, err := f.Dir.Lock(name)
	if err != nil {
		return nil, err
	}
	if err := f.Clean(); err != nil {
		_ = lock.Close() // the error at hand is the one to tell
		return nil, err
	}
	return lock, nil
}

func (f files) Partials() (names []string, err error) {
	err = fs.WalkDir(f.FS(), "tile", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && strings.HasSuffix(path.Dir(name), ".p") {
			names = append(names, name)
		}
		return err
	})
	return names, err
}

func (f files) WriteFile(name string, data []byte) error {
	if err := f.MkdirAll(path.Dir(name), 0o700); err != nil {
		return err
	}
	return f.Dir.WriteFile(name, data, 0o600)
}

func (f files) Remove(name string) error { return f.Discard(name) }

func (f files) Append(name string) (File, error) {
	file, err := f.Dir.Append(name)
	if err != nil {
		return nil, err
	}
	return datasynced{file}, nil
}

// datasynced syncs what is needed to read a file back, no more.
type datasynced struct {
	*os.File
}

func (f datasynced) Sync() error { return durable.Datasync(f.File) }
