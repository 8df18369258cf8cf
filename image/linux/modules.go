package linux

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Wanted are the modules that a machine needs, by name: transports of a VMM without
// a PCI bus, disks, the wire, the file systems of its disks.
var Wanted = []string{
	"virtio_mmio", "virtio_blk", "virtio_console", "vmw_vsock_virtio_transport", "erofs", "overlay", "ext4",
}

// Modules lists the files below dir, that of /lib/modules/VERSION, that have to be
// loaded for the wanted ones, each after what it needs; paths are relative to dir.
// What the kernel has built in is left out.
func Modules(dir string, wanted []string) ([]string, error) {
	s := &shelf{dir: dir, files: map[string]string{}, builtin: map[string]bool{}, state: map[string]bool{}}
	if err := s.read(); err != nil {
		return nil, err
	}
	for _, name := range wanted {
		if err := s.add(name, ""); err != nil {
			return nil, err
		}
	}
	return s.order, nil
}

type shelf struct {
	dir     string
	files   map[string]string // by name
	builtin map[string]bool
	state   map[string]bool // false while what it needs is added
	order   []string
}

func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func (s *shelf) read() error {
	builtin, err := os.ReadFile(filepath.Join(s.dir, "modules.builtin"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for line := range strings.Lines(string(builtin)) {
		s.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return filepath.WalkDir(filepath.Join(s.dir, "kernel"), func(file string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || !strings.Contains(entry.Name(), ".ko") {
			return err
		}
		relative, err := filepath.Rel(s.dir, file)
		s.files[moduleName(file)] = relative
		return err
	})
}

func (s *shelf) add(name, forWhom string) error {
	if done, seen := s.state[name]; s.builtin[name] || seen && done {
		return nil
	} else if seen {
		return fmt.Errorf("module %s needs itself", name)
	}
	file, ok := s.files[name]
	if !ok && forWhom != "" {
		return fmt.Errorf("module %s, which %s needs, is not in %s", name, forWhom, s.dir)
	}
	if !ok {
		return fmt.Errorf("module %s is not in %s, nor is it built in", name, s.dir)
	}
	if !strings.HasSuffix(file, ".ko") {
		return fmt.Errorf("module %s is compressed (%s); a machine loads plain ones", name, filepath.Base(file))
	}
	s.state[name] = false
	needs, err := dependencies(filepath.Join(s.dir, file))
	if err != nil {
		return fmt.Errorf("module %s: %w", file, err)
	}
	for _, need := range needs {
		if err := s.add(need, name); err != nil {
			return err
		}
	}
	s.state[name] = true
	s.order = append(s.order, file)
	return nil
}

// largestInfo bounds the .modinfo section of a module.
const largestInfo = 1 << 20

// dependencies reads what a module says of itself.
func dependencies(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no .modinfo")
	}
	if section.Size > largestInfo {
		return nil, fmt.Errorf("a .modinfo of %d bytes", section.Size)
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	var needs []string
	for field := range bytes.SplitSeq(data, []byte{0}) {
		list, ok := bytes.CutPrefix(field, []byte("depends="))
		if !ok || len(list) == 0 {
			continue
		}
		for name := range strings.SplitSeq(string(list), ",") {
			needs = append(needs, strings.ReplaceAll(name, "-", "_"))
		}
	}
	return needs, nil
}
