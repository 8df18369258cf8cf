package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of the kernel's include/uapi/linux/kvm.h, for x86-64.
const (
	getAPIVersion = 0xAE00
	createVM      = 0xAE01
	vcpuMmapSize  = 0xAE04
	createVCPU    = 0xAE41
	setMemory     = 0x4020AE46
	run           = 0xAE80
	setRegisters  = 0x4090AE82
	getSpecial    = 0x8138AE83
	setSpecial    = 0x4138AE84
)

const (
	apiVersion = 12 // since Linux 2.6.22, for good
	exitIO     = 2  // KVM_EXIT_IO
	guestAt    = 0x1000
	pageSize   = 0x1000
	port       = 0x10
	answer     = 42

	registers  = 18 // words of struct kvm_regs
	atRSP      = 6
	atRIP      = 16         // word of rip in it; rflags follows
	specials   = 312        // bytes of struct kvm_sregs, which begins with cs
	exitReason = 8          // offset in struct kvm_run
	ioOf       = 32         // offset of what describes the exit
	portOf     = ioOf + 2   // size, direction, port
	dataOf     = ioOf + 8   // offset of the data
	leastRun   = dataOf + 8 // bytes of struct kvm_run that are read
	bit1       = 2          // of rflags, always set
)

// The guest runs in long mode with paging, as kernels do: a host that only emulates may
// still step through the modes before it. Its memory is the code and three tables
// that map the first GiB onto itself.
const (
	memorySize  = 0x10000
	tablesAt    = 0x4000 // the three of them, a page each
	stackAt     = 0xf000
	present     = 1 << 0
	writable    = 1 << 1
	large       = 1 << 7
	protection  = 1 << 0  // of CR0
	paging      = 1 << 31 // of CR0
	extension   = 1 << 5  // of CR4: PAE
	longMode    = 1<<8 | 1<<10
	segmentSize = 24 // bytes of struct kvm_segment
	atCR0       = 8*segmentSize + 2*16
	atCR3       = atCR0 + 16
	atCR4       = atCR0 + 24
	atEFER      = atCR0 + 40
)

// code counts in memory before it answers: milliseconds for a processor, many seconds
// for a host that emulates one instruction after the other, as some do that are virtual
// machines themselves.
//
//	mov rax, 0x8000; mov rcx, 2000000
//	1: inc qword [rax]; dec rcx; jnz 1b
//	mov al, 42; out 0x10, al; hlt
var code = []byte{
	0x48, 0xc7, 0xc0, 0x00, 0x80, 0x00, 0x00, 0x48, 0xc7, 0xc1, 0x80, 0x84, 0x1e, 0x00,
	0x48, 0xff, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf8,
	0xb0, answer, 0xe6, port, 0xf4,
}

// runGuest has a virtual processor write a number to a port and sees it arrive.
func runGuest(device string) error {
	kvm, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer kvm.Close()
	if version, err := ioctl(kvm.Fd(), getAPIVersion, 0); err != nil || version != apiVersion {
		return fmt.Errorf("its API is version %d, want %d (%w)", version, apiVersion, err)
	}
	vm, err := ioctl(kvm.Fd(), createVM, 0)
	if err != nil {
		return fmt.Errorf("making a virtual machine: %w", err)
	}
	memory, err := unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	copy(memory[guestAt:], code)
	table := func(n int, entry uint64) { binary.LittleEndian.PutUint64(memory[tablesAt+n*pageSize:], entry) }
	table(0, tablesAt+pageSize|present|writable)
	table(1, tablesAt+2*pageSize|present|writable)
	table(2, 0|present|writable|large)
	region := struct {
		slot, flags           uint32
		guest, size, userland uint64
	}{size: memorySize, userland: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := ioctl(vm, setMemory, unsafe.Pointer(&region)); err != nil {
		return fmt.Errorf("giving it memory: %w", err)
	}
	cpu, err := ioctl(vm, createVCPU, 0)
	if err != nil {
		return fmt.Errorf("making a virtual processor: %w", err)
	}
	if err := setOut(cpu); err != nil {
		return err
	}
	size, err := ioctl(kvm.Fd(), vcpuMmapSize, 0)
	if err != nil || size < leastRun {
		return fmt.Errorf("the size of its state is %d (%w)", size, err)
	}
	state, err := unix.Mmap(int(cpu), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if _, err := ioctl(cpu, run, 0); err != nil {
		return fmt.Errorf("running it: %w", err)
	}
	return answered(state)
}

// setOut points the processor at the code.
func setOut(cpu uintptr) error {
	var special [specials]byte
	if _, err := ioctl(cpu, getSpecial, unsafe.Pointer(&special)); err != nil {
		return fmt.Errorf("reading its registers: %w", err)
	}
	segment := func(n int, kind, l byte) {
		at := special[n*segmentSize:]
		clear(at[:segmentSize])
		binary.LittleEndian.PutUint32(at[8:], 0xffffffff) // limit
		at[14], at[15], at[19], at[21] = kind, 1, 1, 1    // type, present, code or data, 4 KiB units
		at[18], at[20] = 1-l, l                           // 32-bit, 64-bit
	}
	segment(0, 11, 1) // cs: execute, read, accessed
	for n := 1; n < 6; n++ {
		segment(n, 3, 0) // data: read, write, accessed
	}
	word := func(at int, value uint64) { binary.LittleEndian.PutUint64(special[at:], value) }
	word(atCR0, protection|paging)
	word(atCR3, tablesAt)
	word(atCR4, extension)
	word(atEFER, longMode)
	if _, err := ioctl(cpu, setSpecial, unsafe.Pointer(&special)); err != nil {
		return fmt.Errorf("setting its segments: %w", err)
	}
	var general [registers]uint64
	general[atRSP], general[atRIP], general[atRIP+1] = stackAt, guestAt, bit1
	if _, err := ioctl(cpu, setRegisters, unsafe.Pointer(&general)); err != nil {
		return fmt.Errorf("setting its registers: %w", err)
	}
	return nil
}

func answered(state []byte) error {
	if reason := binary.LittleEndian.Uint32(state[exitReason:]); reason != exitIO {
		return fmt.Errorf("its first instructions ended with exit reason %d, want %d", reason, exitIO)
	}
	at := binary.LittleEndian.Uint64(state[dataOf:])
	if got := binary.LittleEndian.Uint16(state[portOf:]); got != port || at >= uint64(len(state)) || state[at] != answer {
		return errors.New("it wrote something else than its code says")
	}
	return nil
}

func ioctl[T uintptr | int | unsafe.Pointer](fd uintptr, request uintptr, argument T) (uintptr, error) {
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(argument))
	if errno != 0 {
		return 0, errno
	}
	return result, nil
}
