// Package linux reads what a kernel is delivered in: the compressed ELF in a bzImage,
// and the modules beside it with what each needs; and it writes the archive that a
// kernel starts from.
//
// The files come from a package that was verified, or are a person's own. They are
// parsed all the same as if a stranger had made them: every length is checked against
// what there is, and what is unpacked has a bound.
package linux

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// largest bounds an unpacked kernel: Debian's has 60 MB.
const largest = 512 << 20

// The setup header of a bzImage (Documentation/x86/boot.rst of the kernel).
const (
	setupSects    = 0x1f1
	bootFlag      = 0x1fe // 0x55 0xaa
	setupMagic    = 0x202 // "HdrS"
	setupVersion  = 0x206
	kernelVersion = 0x20e // offset of a text, less 0x200
	payloadOffset = 0x248
	payloadLength = 0x24c
	setupEnd      = 0x250
	sector        = 512
)

// ErrNoKernel is wrapped where a file is no kernel that a machine can start.
var ErrNoKernel = errors.New("no x86-64 Linux kernel")

// Kernel is a kernel in both its forms. BzImage is nil for one that was given as an ELF.
type Kernel struct {
	BzImage []byte
	ELF     []byte
	Version string // as uname -r says it; "" where the file does not
}

// Parse reads a bzImage or an uncompressed ELF. The ELF, also the one in a bzImage, is what
// Firecracker starts; QEMU starts the bzImage, and an ELF alone only by its PVH entry.
func Parse(data []byte) (Kernel, error) {
	if bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		f, err := checkELF(data)
		if err != nil {
			return Kernel{}, err
		}
		if err := checkPVH(f); err != nil {
			return Kernel{}, err
		}
		return Kernel{ELF: data, Version: banner(data)}, nil
	}
	if len(data) < setupEnd || data[bootFlag] != 0x55 || data[bootFlag+1] != 0xaa || string(data[setupMagic:setupMagic+4]) != "HdrS" {
		return Kernel{}, fmt.Errorf("%w: neither a bzImage nor an ELF", ErrNoKernel)
	}
	if version := binary.LittleEndian.Uint16(data[setupVersion:]); version < 0x208 {
		return Kernel{}, fmt.Errorf("%w: boot protocol %d.%02d, want 2.08 or later", ErrNoKernel, version>>8, version&0xff)
	}
	raw, err := payload(data)
	if err != nil {
		return Kernel{}, fmt.Errorf("%w: %v", ErrNoKernel, err)
	}
	_, err = checkELF(raw)
	return Kernel{BzImage: data, ELF: raw, Version: version(data)}, err
}

// payload unpacks the ELF in a bzImage.
func payload(data []byte) ([]byte, error) {
	sects := int64(data[setupSects])
	if sects == 0 {
		sects = 4
	}
	start := (sects+1)*sector + int64(binary.LittleEndian.Uint32(data[payloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(data[payloadLength:]))
	if start >= end || end > int64(len(data)) {
		return nil, fmt.Errorf("a payload from byte %d to %d of %d", start, end, len(data))
	}
	packed := data[start:end]
	switch {
	case bytes.HasPrefix(packed, []byte(elf.ELFMAG)):
		return packed, nil
	case bytes.HasPrefix(packed, legacyLZ4):
		return unpackLZ4(packed, largest)
	case bytes.HasPrefix(packed, []byte{0x1f, 0x8b}):
		return unpackGzip(packed)
	case bytes.HasPrefix(packed, zstdMagic):
		return unpackZstd(packed)
	}
	return nil, fmt.Errorf("a payload that begins with % x; LZ4, zstd, gzip and none are known", packed[:min(6, len(packed))])
}

var zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}

// unpackZstd reads one frame; its unpacked size follows, which the reader would take for
// another frame.
func unpackZstd(packed []byte) ([]byte, error) {
	if len(packed) < len(zstdMagic)+4 {
		return nil, io.ErrUnexpectedEOF
	}
	frame, size := packed[:len(packed)-4], binary.LittleEndian.Uint32(packed[len(packed)-4:])
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(largest))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out, err := r.DecodeAll(frame, nil)
	if err == nil && int64(len(out)) != int64(size) {
		err = fmt.Errorf("zstd: %d bytes, want %d", len(out), size)
	}
	return out, err
}

func unpackGzip(packed []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	r.Multistream(false) // the size follows
	out, err := io.ReadAll(io.LimitReader(r, largest+1))
	if err == nil && len(out) > largest {
		err = fmt.Errorf("more than %d MiB", largest>>20)
	}
	return out, err
}

func version(data []byte) string {
	at := int64(binary.LittleEndian.Uint16(data[kernelVersion:])) + 0x200
	if at == 0x200 || at >= int64(len(data)) {
		return ""
	}
	return firstWord(data[at:])
}

// bannerText begins what the kernel prints first.
const bannerText = "Linux version "

// banner finds the version that the kernel prints.
func banner(data []byte) string {
	_, after, ok := bytes.Cut(data, []byte(bannerText))
	if !ok {
		return ""
	}
	return firstWord(after)
}

// firstWord is what stands before a space, if it may be the name of a directory.
func firstWord(data []byte) string {
	word, _, ok := bytes.Cut(data[:min(len(data), 128)], []byte(" "))
	if !ok || len(word) == 0 || word[0] == '.' || strings.ContainsFunc(string(word), func(r rune) bool {
		return r != '.' && r != '-' && r != '_' && r != '+' && r != '~' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return ""
	}
	return string(word)
}

// lowest is where the memory begins into which a VMM loads a kernel; what lies below holds
// its tables.
const lowest = 1 << 20

// checkELF holds a file to what a VMM can load, and to what every Linux says of itself.
func checkELF(data []byte) (*elf.File, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrNoKernel, err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		return nil, fmt.Errorf("%w: an ELF of type %v for %v", ErrNoKernel, f.Type, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD && p.Type != elf.PT_NOTE {
			continue
		}
		if size := uint64(len(data)); p.Off > size || p.Filesz > size-p.Off {
			return nil, fmt.Errorf("%w: a segment of %d bytes at byte %d of %d", ErrNoKernel, p.Filesz, p.Off, size)
		}
		if p.Type == elf.PT_LOAD && p.Paddr < lowest {
			return nil, fmt.Errorf("%w: a segment goes to address %#x, below 1 MiB", ErrNoKernel, p.Paddr)
		}
	}
	if !holds(f, f.Entry) {
		return nil, fmt.Errorf("%w: it is entered at %#x, where nothing of it is loaded", ErrNoKernel, f.Entry)
	}
	if !bytes.Contains(data, []byte(bannerText)) {
		return nil, fmt.Errorf("%w: it nowhere says %q", ErrNoKernel, bannerText)
	}
	return f, nil
}

// holds says whether something is loaded to a physical address.
func holds(f *elf.File, at uint64) bool {
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && at >= p.Paddr && at-p.Paddr < p.Memsz {
			return true
		}
	}
	return false
}

// pvhEntry is the type of the note by which QEMU enters an ELF (XEN_ELFNOTE_PHYS32_ENTRY).
const pvhEntry = 18

// checkPVH wants the entry by which QEMU starts an ELF.
func checkPVH(f *elf.File) error {
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("%w: %v", ErrNoKernel, err)
		}
		if at, ok := note(notes, "Xen\x00", pvhEntry); ok && holds(f, at) {
			return nil
		}
	}
	return fmt.Errorf("%w: an ELF without a PVH entry (CONFIG_PVH), by which QEMU starts one", ErrNoKernel)
}

// note finds the number in a note of four or eight bytes.
func note(notes []byte, name string, kind uint32) (uint64, bool) {
	for len(notes) >= 12 {
		names, size := binary.LittleEndian.Uint32(notes), binary.LittleEndian.Uint32(notes[4:])
		of := binary.LittleEndian.Uint32(notes[8:])
		notes = notes[12:]
		begin, end := padded(names), padded(names)+padded(size)
		if end > uint64(len(notes)) {
			return 0, false
		}
		if value := notes[begin : begin+uint64(size)]; of == kind && string(notes[:names]) == name {
			switch size {
			case 4:
				return uint64(binary.LittleEndian.Uint32(value)), true
			case 8:
				return binary.LittleEndian.Uint64(value), true
			}
		}
		notes = notes[end:]
	}
	return 0, false
}

// padded is a length in a note with what makes it a multiple of four.
func padded(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
