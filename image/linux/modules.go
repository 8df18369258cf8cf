package linux

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"cal/image/unpack"
)

// Wanted are the modules that a machine needs, by name: transports of a VMM without
// a PCI bus, disks, the wire, the file systems of its disks.
var Wanted = []string{
	"virtio_mmio", "virtio_blk", "virtio_console", "vmw_vsock_virtio_transport", "erofs", "overlay", "ext4",
}

// Module is one as a machine loads it: not compressed.
type Module struct {
	Path string // relative to the directory of all, ends with ".ko"
	Data []byte
}

// Modules reads the modules below dir, that of /lib/modules/VERSION, that have to be
// loaded for the wanted ones, each after what it needs. What the kernel has built in is
// left out.
func Modules(ctx context.Context, dir string, wanted []string) ([]Module, error) {
	s := &shelf{ctx: ctx, dir: dir, files: map[string]string{}, builtin: map[string]bool{}, state: map[string]bool{}}
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
	ctx     context.Context
	dir     string
	files   map[string]string // by name
	builtin map[string]bool
	state   map[string]bool // false while what it needs is added
	order   []Module
}

// moduleName is what a module is called in lists of dependencies.
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
	s.state[name] = false
	data, err := s.plain(file)
	if err != nil {
		return fmt.Errorf("module %s: %w", file, err)
	}
	needs, err := dependencies(data)
	if err != nil {
		return fmt.Errorf("module %s: %w", file, err)
	}
	for _, need := range needs {
		if err := s.add(need, name); err != nil {
			return err
		}
	}
	s.state[name] = true
	path, _, _ := strings.Cut(file, ".ko")
	s.order = append(s.order, Module{path + ".ko", data})
	return nil
}

// largestModule bounds one that is read.
const largestModule = 64 << 20

// plain reads a module, compressed or not.
func (s *shelf) plain(file string) ([]byte, error) {
	f, err := os.Open(filepath.Join(s.dir, file))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := unpack.PlainStream(s.ctx, f)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, largestModule+1))
	if err == nil && len(data) > largestModule {
		err = fmt.Errorf("more than %d MiB", largestModule>>20)
	}
	return data, err
}

// largestInfo bounds the .modinfo section of a module.
const largestInfo = 1 << 20

// dependencies reads what a module says of itself.
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
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
