package workspace

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"cal/internal/git"
)

// keptFiles are files of a working tree as they were, kept by a second link in the repository's
// own directory: that takes no room, and putting one back neither.
type keptFiles struct {
	top, dir string
	paths    []string
	links    []string // "": there was none
	made     []string // directories that were not there, outer ones first
}

func keepFiles(ctx context.Context, r git.Repo, paths []string) (*keptFiles, error) {
	at, err := r.Run(ctx, "rev-parse", "--absolute-git-dir")
	if err != nil {
		return nil, err
	}
	place := strings.TrimSuffix(at, "\n")
	if !sameDevice(place, r.Dir) { // a worktree may lie elsewhere than its repository
		place = r.Dir
	}
	k := &keptFiles{top: r.Dir}
	if k.dir, err = os.MkdirTemp(place, ".cal-apply-"); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for i, path := range paths {
		link := filepath.Join(k.dir, strconv.Itoa(i))
		kept, err := keep(filepath.Join(k.top, path), link)
		if err != nil {
			k.drop()
			return nil, err
		}
		if !kept {
			link = ""
		}
		k.paths, k.links = append(k.paths, path), append(k.links, link)
		k.noteMissing(filepath.Dir(path), seen)
	}
	return k, nil
}

// keep makes link a second name of a file, or a copy where the kernel refuses one: for a file of
// another user. What is no file is not kept: git changes nothing else.
func keep(path, link string) (kept bool, err error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || err == nil && info.IsDir() {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if os.Link(path, link) == nil {
		return true, nil
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(path)
		if err != nil {
			return false, err
		}
		return true, os.Symlink(target, link)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	return true, os.WriteFile(link, raw, info.Mode().Perm())
}

func sameDevice(a, b string) bool {
	var first, second syscall.Stat_t
	return syscall.Stat(a, &first) == nil && syscall.Stat(b, &second) == nil && first.Dev == second.Dev
}

func (k *keptFiles) noteMissing(dir string, seen map[string]bool) {
	if dir == "." || seen[dir] {
		return
	}
	seen[dir] = true
	k.noteMissing(filepath.Dir(dir), seen)
	if _, err := os.Lstat(filepath.Join(k.top, dir)); errors.Is(err, fs.ErrNotExist) {
		k.made = append(k.made, dir)
	}
}

// putBack makes every path what it was: first what is new goes, then what was there comes back.
func (k *keptFiles) putBack() error {
	var errs []error
	remove := func(path string) {
		err := os.Remove(filepath.Join(k.top, path))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) && !errors.Is(err, syscall.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	for i, path := range k.paths {
		if k.links[i] == "" {
			remove(path)
		}
	}
	for i := len(k.made) - 1; i >= 0; i-- {
		remove(k.made[i])
	}
	for i, path := range k.paths {
		if k.links[i] == "" {
			continue
		}
		full := filepath.Join(k.top, path)
		if info, err := os.Lstat(full); err == nil && info.IsDir() {
			remove(path)
		}
		errs = append(errs, os.MkdirAll(filepath.Dir(full), 0o755), os.Rename(k.links[i], full))
	}
	return errors.Join(errs...)
}

func (k *keptFiles) drop() { os.RemoveAll(k.dir) }
