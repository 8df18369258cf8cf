package firecracker

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// tinyWord is what the tiny guest prints.
const tinyWord = "cal-probe: guest code runs"

// tinyKernel is a kernel of some twenty bytes: it prints a line and waits. It shows in
// milliseconds whether KVM runs anything, and gives a Firecracker whose threads can be tried.
func tinyKernel() []byte {
	const load, header = 16 << 20, 64 + 56
	code := []byte{
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8: the serial port
		0x48, 0x8d, 0x35, 13, 0, 0, 0, // lea rsi, [the text]
		0xfc,       // cld
		0xac,       // next: lodsb
		0x84, 0xc0, // test al, al
		0x74, 0x03, // jz wait
		0xee,       // out dx, al
		0xeb, 0xf8, // jmp next
		0xfa,       // wait: cli
		0xf4,       // hlt
		0xeb, 0xfd, // jmp the hlt
	}
	code = append(code, tinyWord+"\n\x00"...)
	var file bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Entry: load, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Off: header, Vaddr: load, Paddr: load,
			Filesz: uint64(len(code)), Memsz: uint64(len(code)), Align: 4096,
		},
		code,
	} {
		_ = binary.Write(&file, binary.LittleEndian, part) // into memory
	}
	return file.Bytes()
}
