package image

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cal/image/linux"
)

// testELF is a small ELF with one section, which is loaded to 16 MiB and entered there; QEMU's
// way in too.
func testELF(kind elf.Type, section, content string) string {
	var out bytes.Buffer
	names := "\x00" + section + "\x00.shstrtab\x00"
	note := "\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00\x00\x00\x00\x01"
	const at, start = 16 << 20, 64 + 2*56
	begin := start + len(note)
	header := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1}, Type: uint16(kind), Machine: uint16(elf.EM_X86_64),
		Version: 1, Entry: at, Ehsize: 64, Phoff: 64, Phentsize: 56, Phnum: 2, Shentsize: 64, Shnum: 3, Shstrndx: 2, Shoff: uint64(begin + len(content) + len(names)),
	}
	binary.Write(&out, binary.LittleEndian, header)
	binary.Write(&out, binary.LittleEndian, []elf.Prog64{
		{Type: uint32(elf.PT_NOTE), Off: start, Filesz: uint64(len(note)), Memsz: uint64(len(note))},
		{Type: uint32(elf.PT_LOAD), Off: uint64(begin), Filesz: uint64(len(content)), Memsz: uint64(len(content)), Paddr: at, Vaddr: at},
	})
	out.WriteString(note + content + names)
	binary.Write(&out, binary.LittleEndian, []elf.Section64{
		{}, {Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: uint64(begin), Size: uint64(len(content))},
		{Name: uint32(2 + len(section)), Type: uint32(elf.SHT_STRTAB), Off: uint64(begin + len(content)), Size: uint64(len(names))},
	})
	return out.String()
}

// plantKernel makes a kernel and the modules that a machine needs of it.
func plantKernel(t *testing.T, s *Store, version string) (path string) {
	dir := homeDir(t)
	s.modules = dir + "/modules"
	files := map[string]string{"vmlinux": testELF(elf.ET_EXEC, ".rodata", "Linux version "+version+" (somebody)")}
	for _, name := range linux.Wanted {
		need := ""
		if name != "erofs" {
			need = "erofs"
		}
		files["modules/"+version+"/kernel/fs/"+name+".ko"] = testELF(elf.ET_REL, ".modinfo", "depends="+need+"\x00")
	}
	plant(t, dir, files)
	return dir + "/vmlinux"
}

func TestKernelAndInitramfs(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	path := plantKernel(t, s, "6.1.0-test")
	k, err := s.Kernel(ctx, path, nil)
	must(t, err)
	if k.Version != "6.1.0-test" || k.Image != k.ELF || k.Tried || !isDigest(k.Digest) {
		t.Errorf("%+v", k)
	}
	proxy := filepath.Join(homeDir(t), "proxy")
	must(t, os.WriteFile(proxy, []byte("a program"), 0o755))
	disk, err := s.Initramfs(ctx, k, proxy)
	must(t, err)
	raw, err := os.ReadFile(disk.Path)
	must(t, err)
	order := "/lib/modules/6.1.0-test/kernel/fs/erofs.ko\n/lib/modules/6.1.0-test/kernel/fs/virtio_mmio.ko\n"
	if !bytes.HasPrefix(raw, []byte("070701")) || !bytes.Contains(raw, []byte(order)) || bytes.Count(raw, []byte("a program")) != 1 {
		t.Errorf("%d bytes", len(raw))
	}
	if cpio, err := exec.LookPath("cpio"); err == nil {
		cmd := exec.Command(cpio, "--list", "--quiet")
		cmd.Stdin = bytes.NewReader(raw)
		list, err := cmd.CombinedOutput()
		if err != nil || !strings.HasSuffix(string(list), "lib/modules/6.1.0-test/kernel/fs/ext4.ko\nmodules\ninit\n") {
			t.Errorf("%s %v", list, err)
		}
	}
	again, err := testStore(t).Initramfs(ctx, k, proxy)
	if err != nil || again.Digest != disk.Digest {
		t.Errorf("the same parts gave %s and %s, %v", again.Digest, disk.Digest, err)
	}
	must(t, os.WriteFile(proxy, []byte("another one"), 0o755))
	other, err := s.Initramfs(ctx, k, proxy)
	if err != nil || other.Digest == disk.Digest {
		t.Errorf("another program: %s, %v", other.Digest, err)
	}
	if _, err := s.Initramfs(ctx, k, proxy+"none"); err == nil {
		t.Error("a program that is not there")
	}
	// The same kernel with other modules is another object.
	must(t, os.WriteFile(s.modules+"/6.1.0-test/kernel/fs/ext4.ko", []byte(testELF(elf.ET_REL, ".modinfo", "depends=\x00x=y\x00")), 0o644))
	renewed, err := s.RenewKernel(ctx, path, nil)
	if err != nil || renewed.Digest != k.Digest || renewed.object == k.object {
		t.Errorf("other modules: %+v, %v", renewed, err)
	}
	must(t, s.Hold(t.TempDir(), k.Digest))
	if list, err := s.List(ctx, false); err != nil || len(list) != 4 || len(list[0].UsedBy)+len(list[1].UsedBy)+len(list[2].UsedBy)+len(list[3].UsedBy) != 2 {
		t.Errorf("%+v, %v", list, err)
	}
	k = renewed
	must(t, flip(k.ELF, 70))
	if k, err := s.Kernel(ctx, path, nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a changed kernel: %+v, %v", k, err)
	}
}

// The kernel that was taken last is the one that all get who name none.
func TestRenewKernel(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	for _, version := range []string{"6.1.0-one", "6.1.0-two"} {
		k, err := s.RenewKernel(ctx, plantKernel(t, s, version), nil)
		must(t, err)
		usual, err := s.Kernel(ctx, "", nil)
		if err != nil || usual.Digest != k.Digest || usual.Version != version {
			t.Errorf("%+v, %v; want %+v", usual, err, k)
		}
	}
}

func TestKernelRefuses(t *testing.T) {
	s, dir := testStore(t), homeDir(t)
	whole := plantKernel(t, s, "6.1.0-test")
	raw, err := os.ReadFile(whole)
	must(t, err)
	plant(t, dir, map[string]string{"text": strings.Repeat("no kernel ", 1000), "empty": "", "half": string(raw[:50])})
	for name, want := range map[string]error{"text": linux.ErrNoKernel, "empty": linux.ErrNoKernel, "half": linux.ErrNoKernel, ".": linux.ErrNoKernel, "missing": os.ErrNotExist} {
		if k, err := s.Kernel(context.Background(), filepath.Join(dir, name), nil); !errors.Is(err, want) {
			t.Errorf("%s: %+v, %v", name, k, err)
		}
	}
	nothingLeft(t, s, "no kernels")
	must(t, os.Remove(s.modules+"/6.1.0-test/kernel/fs/virtio_blk.ko"))
	if k, err := s.Kernel(context.Background(), whole, nil); err == nil || !strings.Contains(err.Error(), "virtio_blk") {
		t.Errorf("without a module that a machine needs: %+v, %v", k, err)
	}
	said := ""
	must(t, os.RemoveAll(s.modules))
	if _, err := s.Kernel(context.Background(), whole, func(line string) { said = line }); err != nil || !strings.Contains(said, "no modules") {
		t.Errorf("without any modules: %q, %v", said, err)
	}
}

// A program is an ELF too: it does not become the kernel of all machines.
func TestProgramIsNoKernel(t *testing.T) {
	s, ctx := testStore(t), context.Background()
	usual, err := s.RenewKernel(ctx, plantKernel(t, s, "6.1.0-test"), nil)
	must(t, err)
	program, err := os.Executable()
	must(t, err)
	if k, err := s.RenewKernel(ctx, program, nil); !errors.Is(err, linux.ErrNoKernel) || !strings.Contains(hint(err), "cal image build kernel takes Debian's") {
		t.Errorf("%+v, %v", k, err)
	}
	if k, err := s.Kernel(ctx, "", nil); err != nil || k.Digest != usual.Digest {
		t.Errorf("afterwards: %+v, %v", k, err)
	}
}

func TestBlank(t *testing.T) {
	mkfs := "/sbin/mkfs.ext4"
	if _, err := os.Stat(mkfs); err != nil {
		t.Skip("mkfs.ext4 is not installed (e2fsprogs)")
	}
	s, dir := testStore(t), t.TempDir()
	digests := map[string]bool{}
	for _, name := range []string{"formatted", "written again", "formatted by another process"} {
		if name == "formatted by another process" {
			s = testStore(t)
		}
		path := filepath.Join(dir, name)
		must(t, s.Blank(context.Background(), path, 64<<20))
		if known := s.blanks.of(64 << 20); known == nil {
			t.Error("what a blank disk holds is not kept")
		}
		if said, err := exec.Command("/sbin/e2fsck", "-f", "-n", path).CombinedOutput(); err != nil {
			t.Errorf("%s: e2fsck: %v: %s", name, err, said)
		}
		digest, err := digestFile(path)
		must(t, err)
		digests[digest] = true
		file, err := stated(dir, name)
		if err != nil || file.Size != 64<<20 || onDisk(path) > 1<<20 {
			t.Errorf("%+v takes up %d bytes, %v", file, onDisk(path), err)
		}
	}
	if len(digests) != 1 {
		t.Errorf("blank disks differ: %v", digests)
	}
	must(t, s.Blank(context.Background(), dir+"/larger", 80<<20))
	if file, err := stated(dir, "larger"); err != nil || file.Size != 80<<20 {
		t.Errorf("of another size: %+v, %v", file, err)
	}
	for size := range int64(2 * mostBlanks) {
		s.blanks.keep(size, contents{})
	}
	if got := len(s.blanks.made); got > mostBlanks {
		t.Errorf("%d sizes are kept, want at most %d", got, mostBlanks)
	}
	if err := s.Blank(context.Background(), dir+"/formatted", 64<<20); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a disk that is there: %v", err)
	}
	for name, size := range map[string]int64{"tiny": 100, "negative": -1, "beyond what a file can be": 1 << 62} {
		if err := s.Blank(context.Background(), filepath.Join(dir, name), size); err == nil {
			t.Errorf("%s was made", name)
		}
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}

// TestWrittenIn: what is read of a file with holes makes the same file again, and a file
// that holds much is left alone.
func TestWrittenIn(t *testing.T) {
	dir := t.TempDir()
	fill := func(name string, size int64, at ...int64) *os.File {
		f, err := os.Create(filepath.Join(dir, name))
		must(t, err)
		t.Cleanup(func() { f.Close() })
		for _, at := range at {
			_, err := f.WriteAt([]byte("data"), at)
			must(t, err)
		}
		must(t, f.Truncate(size))
		return f
	}
	f := fill("source", 64<<20, 0, 5<<20+7, 64<<20-4)
	c, err := writtenIn(f)
	must(t, err)
	again := fill("again", 64<<20)
	must(t, c.write(again))
	one, err := digestFile(f.Name())
	must(t, err)
	if other, err := digestFile(again.Name()); err != nil || other != one {
		t.Errorf("%s, %v, want %s", other, err, one)
	}
	if taken := onDisk(again.Name()); taken > 1<<20 {
		t.Errorf("12 bytes take up %d", taken)
	}
	must(t, os.WriteFile(filepath.Join(dir, "full"), bytes.Repeat([]byte("data"), largestBlank/4+1), 0o600))
	full, err := os.Open(filepath.Join(dir, "full"))
	must(t, err)
	defer full.Close()
	if c, err := writtenIn(full); err == nil {
		t.Errorf("of a file with %d bytes %d pieces are kept", largestBlank+4, len(c))
	}
}
