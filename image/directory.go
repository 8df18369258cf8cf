package image

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
)

// filled are the entries of a root that the driver fills itself.
var filled = map[string]bool{"proc": true, "sys": true, "dev": true, "tmp": true, "run": true, ".nucleus": true, "lost+found": true}

// directoryRoot shows a directory that holds a root file system. It is not
// written to: /etc is copied, everything else is shown where it lies.
func directoryRoot(dir string) (Root, error) {
	if !filepath.IsAbs(dir) {
		return Root{}, fmt.Errorf("%q is not an absolute path", dir)
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return Root{}, err
	}
	if dir == "/" {
		return Root{}, errors.New("the whole file system of the host is no image; use kind host")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return Root{}, err
	}
	root := Root{Links: map[string]string{}, Files: map[string][]byte{}}
	for _, entry := range entries {
		if err := root.directoryEntry(dir, entry); err != nil {
			return Root{}, err
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "usr")); err != nil && len(root.Binds) == 0 {
		return Root{}, fmt.Errorf("%s holds no root file system", dir)
	}
	maps.Copy(root.Files, generated(root.Files["/etc/passwd"], root.Files["/etc/group"]))
	for name := range root.Files {
		delete(root.Links, name) // an image may hold a link where the machine has a file
	}
	return root, nil
}

func (r *Root) directoryEntry(dir string, entry fs.DirEntry) error {
	place, guest := filepath.Join(dir, entry.Name()), "/"+entry.Name()
	switch {
	case filled[entry.Name()]:
		return nil
	case entry.Type().IsRegular() && (entry.Name() == "usr" || entry.Name() == "etc" || entry.Name() == "home"):
		return fmt.Errorf("its %s is a file, no directory", guest)
	case entry.Type()&fs.ModeSymlink != 0:
		return r.copyEntry(place, guest)
	case entry.Name() == "etc" && entry.IsDir():
		return r.copyTree(place, guest)
	case entry.Name() == "home" && entry.IsDir():
		return r.homes(place)
	case !entry.IsDir() && !entry.Type().IsRegular():
		return nil
	}
	info, err := entry.Info()
	if err != nil {
		return err
	}
	if need := fs.FileMode(0o004); entry.IsDir() {
		need = 0o005
		if info.Mode().Perm()&need != need {
			return nil
		}
	} else if info.Mode().Perm()&need != need {
		return nil
	}
	r.Binds = append(r.Binds, Bind{place, guest})
	return nil
}

// homes shows the home directories one by one, for the machine's own lies
// beside them.
func (r *Root) homes(place string) error {
	entries, err := os.ReadDir(place)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Name() == "agent" || !entry.IsDir() {
			continue
		}
		if info, err := entry.Info(); err == nil && info.Mode().Perm()&0o005 == 0o005 {
			r.Binds = append(r.Binds, Bind{filepath.Join(place, entry.Name()), "/home/" + entry.Name()})
		}
	}
	return nil
}

// largestEtc bounds how many entries of an image's /etc are copied.
const largestEtc = 20000

func (r *Root) copyTree(place, guest string) error {
	entries := 0
	return filepath.WalkDir(place, func(name string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) {
			return fs.SkipDir
		}
		if err != nil {
			return err
		}
		if entries++; entries > largestEtc {
			return fmt.Errorf("%s holds more than %d entries", place, largestEtc)
		}
		if entry.IsDir() {
			if info, err := entry.Info(); err == nil && info.Mode().Perm()&0o005 != 0o005 {
				return fs.SkipDir
			}
			return nil
		}
		return r.copyEntry(name, filepath.Join(guest, name[len(place):]))
	})
}
