package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// imageSize is that of the directory which images are made of.
const imageSize = 300 << 20

// imageTimes: an image of a directory, made and found again, beside the programs that make
// such images and keep none. Ours is also hashed, synced to the disk and named by its digest.
func imageTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	source := filepath.Join(s.dir, "rootfs")
	files, size, err := someOf("/usr", filepath.Join(source, "usr"), imageSize)
	if err != nil {
		return nil, err
	}
	home, out := filepath.Join(s.dir, "image-home"), filepath.Join(s.dir, "image")
	build := contender{
		name: "cal image build", argv: []string{filepath.Join(s.bin, "cal"), "image", "build", "directory:" + source},
		env: append(os.Environ(), "CAL_HOME="+home),
	}
	first := build
	first.once = func() error { return os.RemoveAll(filepath.Join(home, "images")) }
	contenders := []contender{first}
	for _, peer := range [][]string{{"mkfs.erofs", out, source}, {"mksquashfs", source, out, "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX"}} {
		if _, err := exec.LookPath(peer[0]); err != nil {
			continue
		}
		contenders = append(contenders, contender{name: peer[0] + ", not compressed", argv: peer, env: os.Environ(), once: func() error { return os.RemoveAll(out) }})
	}
	// A round takes seconds, and writes a whole image for each of them.
	medians, err := race(ctx, min(rounds, 3), contenders...)
	if err != nil {
		return nil, err
	}
	unchanged, err := race(ctx, rounds, build)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range contenders {
		names = append(names, c.name)
	}
	lines := table(fmt.Sprintf("An image of a directory of %d MiB in %d files", size>>20, files), names, medians)
	return append(lines, "", fmt.Sprintf("Unchanged, `cal image build` finds it in %.1f ms, the start of the program included.", unchanged[0])), nil
}

// someOf copies files of a directory, in the order of their names, until there are as many
// bytes as wanted.
func someOf(from, to string, want int64) (files int, size int64, err error) {
	err = filepath.WalkDir(from, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || size >= want {
			if entry != nil && entry.IsDir() || size >= want {
				return fs.SkipDir
			}
			return nil // what cannot be read
		}
		place := filepath.Join(to, strings.TrimPrefix(name, from))
		if entry.IsDir() {
			return os.MkdirAll(place, 0o755)
		}
		info, err := entry.Info()
		if err != nil || !info.Mode().IsRegular() || info.Size() > 16<<20 || info.Mode().Perm()&0o004 == 0 {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		files, size = files+1, size+info.Size()
		return os.WriteFile(place, data, info.Mode().Perm())
	})
	return files, size, err
}
