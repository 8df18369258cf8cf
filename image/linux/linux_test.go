package linux

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testELF is a small ELF with one section beside the table of names. With at, the section is
// loaded there and entered; with notes it has those.
func testELF(kind elf.Type, machine elf.Machine, section string, data []byte, at uint64, notes ...byte) []byte {
	var out bytes.Buffer
	names := "\x00" + section + "\x00.shstrtab\x00"
	const start = 64 + 2*56
	begin := start + len(notes)
	header := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1}, Type: uint16(kind), Machine: uint16(machine),
		Version: 1, Entry: at, Ehsize: 64, Phoff: 64, Phentsize: 56, Phnum: 2, Shentsize: 64, Shnum: 3, Shstrndx: 2, Shoff: uint64(begin + len(data) + len(names)),
	}
	segments := []elf.Prog64{
		{Type: uint32(elf.PT_NOTE), Off: start, Filesz: uint64(len(notes)), Memsz: uint64(len(notes))},
		{Type: uint32(elf.PT_LOAD), Off: uint64(begin), Filesz: uint64(len(data)), Memsz: uint64(len(data)), Paddr: at, Vaddr: at},
	}
	sections := []elf.Section64{
		{}, {Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: uint64(begin), Size: uint64(len(data))},
		{Name: uint32(2 + len(section)), Type: uint32(elf.SHT_STRTAB), Off: uint64(begin + len(data)), Size: uint64(len(names))},
	}
	binary.Write(&out, binary.LittleEndian, header)
	binary.Write(&out, binary.LittleEndian, segments)
	out.Write(notes)
	out.Write(data)
	out.WriteString(names)
	binary.Write(&out, binary.LittleEndian, sections)
	return out.Bytes()
}

// testNote is a note as the kernel has them.
func testNote(name string, kind uint32, value ...byte) []byte {
	raw := binary.LittleEndian.AppendUint32(nil, uint32(len(name)))
	raw = binary.LittleEndian.AppendUint32(raw, uint32(len(value)))
	raw = append(binary.LittleEndian.AppendUint32(raw, kind), name...)
	raw = append(raw, make([]byte, -len(name)&3)...)
	return append(append(raw, value...), make([]byte, -len(value)&3)...)
}

const (
	loaded = 16 << 20
	said   = "Linux version 6.1.0-test-amd64 (somebody) #1"
)

func testKernel() []byte {
	notes := append(testNote("Xen\x00", 6, []byte("linux\x00")...), testNote("Xen\x00", pvhEntry, 4, 0, 0, 1, 0, 0, 0, 0)...)
	return testELF(elf.ET_EXEC, elf.EM_X86_64, ".rodata", []byte(said), loaded, notes...)
}

// bzImage puts a payload where the boot protocol has it.
func bzImage(payload []byte) []byte {
	image := make([]byte, 5*sector+16)
	image[setupSects], image[bootFlag], image[bootFlag+1] = 4, 0x55, 0xaa
	copy(image[setupMagic:], "HdrS")
	binary.LittleEndian.PutUint16(image[setupVersion:], 0x20f)
	binary.LittleEndian.PutUint16(image[kernelVersion:], 0x100)
	copy(image[0x300:], "6.1.0-test-amd64 (somebody) #1\x00")
	binary.LittleEndian.PutUint32(image[payloadOffset:], 16)
	binary.LittleEndian.PutUint32(image[payloadLength:], uint32(len(payload)))
	return append(image, payload...)
}

// stored is an LZ4 frame of literals only.
func stored(data []byte) []byte {
	block := []byte{0xf0}
	n := len(data) - 15
	for ; n >= 255; n -= 255 {
		block = append(block, 255)
	}
	block = append(append(block, byte(n)), data...)
	frame := binary.LittleEndian.AppendUint32(slices.Clone(legacyLZ4), uint32(len(block)))
	return binary.LittleEndian.AppendUint32(append(frame, block...), uint32(len(data)))
}

func zipped(data []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(data)
	w.Close()
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(data)))
}

func zstandard(t *testing.T, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	must(t, err)
	return binary.LittleEndian.AppendUint32(w.EncodeAll(data, nil), uint32(len(data)))
}

func TestParse(t *testing.T) {
	kernel := testKernel()
	for name, data := range map[string][]byte{"ELF": kernel, "LZ4": bzImage(stored(kernel)), "gzip": bzImage(zipped(kernel)), "zstd": bzImage(zstandard(t, kernel)), "plain": bzImage(kernel)} {
		k, err := Parse(data)
		if err != nil || !bytes.Equal(k.ELF, kernel) || k.Version != "6.1.0-test-amd64" || (k.BzImage == nil) != (name == "ELF") {
			t.Errorf("%s: version %q, %d bytes, %v", name, k.Version, len(k.ELF), err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	kernel := testKernel()
	good := bzImage(stored(kernel))
	way := testNote("Xen\x00", pvhEntry, 4, 0, 0, 1)
	elfOf := func(kind elf.Type, machine elf.Machine, text string, at uint64, notes []byte) []byte {
		return testELF(kind, machine, ".x", []byte(text), at, notes...)
	}
	if _, err := Parse(elfOf(elf.ET_EXEC, elf.EM_X86_64, said, loaded, way)); err != nil {
		t.Errorf("control: %v", err)
	}
	elsewhere, behind, wraps := slices.Clone(kernel), slices.Clone(kernel), slices.Clone(kernel)
	elsewhere[24+3] = 0x7f // the entry's fourth byte
	binary.LittleEndian.PutUint64(behind[64+56+32:], 1<<20)
	binary.LittleEndian.PutUint64(wraps[64+56+8:], 1<<63)
	binary.LittleEndian.PutUint64(wraps[64+56+32:], 1<<63)
	changed := func(at int, value ...byte) []byte {
		data := slices.Clone(good)
		copy(data[at:], value)
		return data
	}
	for name, data := range map[string][]byte{
		"nothing": nil, "text": []byte(strings.Repeat("no kernel ", 100)), "a header alone": good[:setupEnd], "cut off": good[:len(good)-1],
		"an old protocol": changed(setupVersion, 7, 2), "a payload behind the end": changed(payloadOffset, 0xff, 0xff, 0xff, 0xff),
		"a long payload": changed(payloadLength, 0xff, 0xff, 0xff, 0xff), "no payload": changed(payloadLength, 0, 0, 0, 0), "an unknown packing": bzImage([]byte("\xfd7zXZ\x00 and so on")),
		"a payload that is no ELF": bzImage(stored([]byte(strings.Repeat("x", 100)))), "a false size": bzImage(append(stored(kernel)[:len(stored(kernel))-4], 1, 0, 0, 0)),
		"another machine": elfOf(elf.ET_EXEC, elf.EM_AARCH64, said, loaded, way), "a library": elfOf(elf.ET_DYN, elf.EM_X86_64, said, loaded, way), "half an ELF": kernel[:40],
		"a program": elfOf(elf.ET_EXEC, elf.EM_X86_64, "hello", 4<<20, way), "a program that speaks of it": elfOf(elf.ET_EXEC, elf.EM_X86_64, said, 4<<20, testNote("Go\x00\x00", 4, 1, 2, 3, 4)),
		"a program in a bzImage": bzImage(stored(elfOf(elf.ET_EXEC, elf.EM_X86_64, "hello", 4<<20, way))), "another's note": elfOf(elf.ET_EXEC, elf.EM_X86_64, said, loaded, testNote("Not\x00", pvhEntry, 4, 0, 0, 1)),
		"an entry into nothing": elfOf(elf.ET_EXEC, elf.EM_X86_64, said, loaded, testNote("Xen\x00", pvhEntry, 0, 0, 0, 2)), "half a note": elfOf(elf.ET_EXEC, elf.EM_X86_64, said, loaded, way[:len(way)-5]),
		"an endless note": elfOf(elf.ET_EXEC, elf.EM_X86_64, said, loaded, []byte("\xff\xff\xff\xff\xff\xff\xff\xff\x12\x00\x00\x00")), "below the memory": elfOf(elf.ET_EXEC, elf.EM_X86_64, said, 4096, testNote("Xen\x00", pvhEntry, 4, 16, 0, 0)),
		"entered elsewhere": elsewhere, "a segment behind the end": behind, "a segment that wraps": wraps,
		"bad zstd": bzImage([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4, 5}), "short zstd": bzImage(zstandard(t, kernel)[:20]), "half a zstd": bzImage(zstdMagic),
		"bad gzip": bzImage([]byte{0x1f, 0x8b, 8, 0, 1, 2, 3}),
	} {
		if k, err := Parse(data); !errors.Is(err, ErrNoKernel) {
			t.Errorf("%s: version %q, %v", name, k.Version, err)
		}
	}
	data := changed(0x300, []byte("../../etc (x)")...)
	if k, err := Parse(data); err != nil || k.Version != "" {
		t.Errorf("a version that is no name of a directory: %q, %v", k.Version, err)
	}
}

// Blocks as the format's description has them: a match that overlaps what it makes, and
// one that reaches before the block.
func TestUnpackBlock(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want string
		bad  bool
	}{
		"literals":              {in: "\x30abc", want: "abc"},
		"a match that overlaps": {in: "\x36abc\x03\x00\x10x", want: "abcabcabcabca" + "x"},
		"one byte, many times":  {in: "\x1fa\x01\x00\x05\x10b", want: strings.Repeat("a", 1+4+15+5) + "b"},
		"before the block":      {in: "\x30abc\x04\x00\x10x", bad: true},
		"an offset of zero":     {in: "\x30abc\x00\x00\x10x", bad: true},
		"half an offset":        {in: "\x30abc\x01", bad: true},
		"too few literals":      {in: "\x40abc", bad: true},
		"an endless length":     {in: "\xf0\xff\xff", bad: true},
		"no end":                {in: "\x30abc\x03\x00", bad: true},
		"too much":              {in: "\x1fa\x01\x00" + strings.Repeat("\xff", 5) + "\x00\x10b", bad: true},
	} {
		got, err := unpackBlock(nil, []byte(c.in), 1000)
		if c.bad != (err != nil) || !c.bad && string(got) != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
	if _, err := unpackBlock([]byte("another block"), []byte("\x30abc\x04\x00\x10x"), 1000); err == nil {
		t.Error("a match in the block before")
	}
	if _, err := unpackBlock(nil, []byte("\x1fa\x01\x00\xff\xff\xff\xff\x00"), 1000); err == nil || !strings.Contains(err.Error(), "more than 1000") {
		t.Errorf("a match that makes too much: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(bzImage(stored(testKernel())))
	f.Add(testKernel())
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := Parse(data)
		if err == nil && len(k.ELF) == 0 {
			t.Error("a kernel without an ELF")
		}
	})
}

// shelve writes modules that say what they need.
func shelve(t *testing.T, needs map[string]string) string {
	dir := t.TempDir()
	for file, need := range needs {
		name := filepath.Join(dir, "kernel", file)
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		info := []byte("license=GPL\x00depends=" + need + "\x00name=x\x00")
		must(t, os.WriteFile(name, testELF(elf.ET_REL, elf.EM_X86_64, ".modinfo", info, 0), 0o644))
	}
	must(t, os.WriteFile(dir+"/modules.builtin", []byte("kernel/fs/ext4/ext4.ko\nkernel/lib/built-in.ko\n"), 0o644))
	return dir
}

func names(modules []Module) (list []string) {
	for _, m := range modules {
		list = append(list, m.Path)
	}
	return list
}

func TestModules(t *testing.T) {
	ctx := context.Background()
	dir := shelve(t, map[string]string{
		"net/top.ko": "middle,other-one", "net/middle.ko": "base", "lib/base.ko": "", "lib/other_one.ko": "base,built_in", "x/a.ko": "b", "x/b.ko": "a", "x/lost.ko": "gone",
	})
	got, err := Modules(ctx, dir, []string{"ext4", "top", "base"})
	if want := []string{"kernel/lib/base.ko", "kernel/net/middle.ko", "kernel/lib/other_one.ko", "kernel/net/top.ko"}; err != nil || !slices.Equal(names(got), want) {
		t.Errorf("%v, %v; want %v", names(got), err, want)
	}
	for _, name := range []string{"missing", "a", "lost"} {
		if got, err := Modules(ctx, dir, []string{name}); err == nil {
			t.Errorf("%s: %v", name, names(got))
		}
	}
	plain, err := os.ReadFile(dir + "/kernel/lib/base.ko")
	must(t, err)
	must(t, os.WriteFile(dir+"/kernel/lib/base.ko.gz", zipped(plain)[:len(zipped(plain))-4], 0o644))
	must(t, os.Remove(dir+"/kernel/lib/base.ko"))
	if got, err := Modules(ctx, dir, []string{"middle"}); err != nil || names(got)[0] != "kernel/lib/base.ko" || !bytes.Equal(got[0].Data, plain) {
		t.Errorf("compressed: %v, %v", names(got), err)
	}
	must(t, os.WriteFile(dir+"/kernel/lib/base.ko.gz", []byte("no ELF"), 0o644))
	if got, err := Modules(ctx, dir, []string{"base"}); err == nil {
		t.Errorf("no ELF: %v", names(got))
	}
	if got, err := Modules(ctx, dir+"/none", nil); err == nil {
		t.Errorf("no directory: %v", names(got))
	}
}

func TestArchive(t *testing.T) {
	make := func() []byte {
		var out bytes.Buffer
		a := NewArchive(&out)
		a.Dir("dev")
		a.Device("dev/console", 0o600, 5, 1)
		a.File("init", 0o755, 5, strings.NewReader("hello, and more"))
		must(t, a.Close())
		return out.Bytes()
	}
	want := "070701" + "00000001" + "000041ed" + "00000000" + "00000000" + "00000002" + "00000000" + "00000000" + "00000000" + "00000000" + "00000000" + "00000000" + "00000004" + "00000000" + "dev\x00" + "\x00\x00" +
		"070701" + "00000002" + "00002180" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" + "00000000" + "00000000" + "00000005" + "00000001" + "0000000c" + "00000000" + "dev/console\x00" + "\x00\x00" +
		"070701" + "00000003" + "000081ed" + "00000000" + "00000000" + "00000001" + "00000000" + "00000005" + "00000000" + "00000000" + "00000000" + "00000000" + "00000005" + "00000000" + "init\x00" + "\x00" + "hello" + "\x00\x00\x00" +
		"070701" + "00000000" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" + "00000000" + "00000000" + "00000000" + "00000000" + "0000000b" + "00000000" + "TRAILER!!!\x00" + "\x00\x00\x00"
	if got := make(); string(got) != want || !bytes.Equal(got, make()) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
	var out bytes.Buffer
	a := NewArchive(&out)
	a.File("short", 0o644, 9, strings.NewReader("short"))
	a.File("next", 0o644, 1, strings.NewReader("x"))
	if err := a.Close(); err == nil {
		t.Error("a file that is shorter than said")
	}
}
