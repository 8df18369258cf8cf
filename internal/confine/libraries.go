package confine

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// libraryTimeout is generous: the loader only looks for files.
const libraryTimeout = 10 * time.Second

// Libraries returns a program and all that its loader loads for it, each at its own
// place. The host's loader is asked, which the program would trust anyway.
func Libraries(ctx context.Context, program string) ([]File, error) {
	files := []File{{program, program}}
	loader, err := loaderOf(program)
	if err != nil || loader == "" {
		return files, err
	}
	ctx, cancel := context.WithTimeout(ctx, libraryTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, loader, "--list", program)
	cmd.Env, cmd.Dir = []string{}, "/"
	output, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", program, err)
	}
	paths := append(parseList(output), loader)
	if _, err := os.Stat(loaderCache); err == nil {
		paths = append(paths, loaderCache)
	}
	slices.Sort(paths)
	for _, path := range slices.Compact(paths) {
		files = append(files, File{path, path})
	}
	return files, nil
}

// loaderCache says where libraries lie that are in none of the loader's own directories.
const loaderCache = "/etc/ld.so.cache"

// loaderOf is a program's loader; "" of one that is static.
func loaderOf(program string) (string, error) {
	file, err := elf.Open(program)
	if err != nil {
		return "", fmt.Errorf("%s is no program: %w", program, err)
	}
	defer file.Close()
	for _, part := range file.Progs {
		if part.Type != elf.PT_INTERP {
			continue
		}
		if part.Filesz > 4096 {
			return "", fmt.Errorf("%s names a loader of %d bytes", program, part.Filesz)
		}
		name := make([]byte, part.Filesz)
		if _, err := part.ReadAt(name, 0); err != nil {
			return "", err
		}
		loader := string(bytes.TrimRight(name, "\x00"))
		if !filepath.IsAbs(loader) {
			return "", errors.New("its loader has no absolute path")
		}
		return loader, nil
	}
	return "", nil
}

// parseList reads lines like "libc.so.6 => /lib/libc.so.6 (0x...)"; the loader itself
// and what the kernel gives stand without an arrow.
func parseList(output []byte) (paths []string) {
	for line := range strings.Lines(string(output)) {
		_, path, found := strings.Cut(line, "=> ")
		if !found {
			path = strings.TrimSpace(line)
		}
		path, _, _ = strings.Cut(path, " (")
		if path = filepath.Clean(strings.TrimSpace(path)); filepath.IsAbs(path) {
			paths = append(paths, path)
		}
	}
	return paths
}
