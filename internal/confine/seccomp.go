package confine

import (
	"fmt"
	"slices"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// forbidden are calls that no VMM needs once its disks and sockets have been handed to it. A
// VMM has a filter of its own beside this one, which forbids more.
var forbidden = []string{
	// Other roots, mounts, namespaces.
	"mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsmount", "fsconfig", "fspick", "mount_setattr",
	"unshare", "setns", "mknodat", "open_by_handle_at", "name_to_handle_at",
	// Other processes.
	"ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "pidfd_send_signal", "kcmp", "process_madvise",
	// New ways out: what it speaks to, it was handed.
	"socket", "socketpair", "connect", "bind",
	// Memory that no limit of addresses counts.
	"memfd_create", "memfd_secret", "shmget", "msgget",
	// Surface of the kernel.
	"bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "io_uring_setup", "io_uring_enter", "io_uring_register",
	"fanotify_init", "fanotify_mark", "lookup_dcookie", "personality", "syslog", "vhangup", "acct", "quotactl", "swapon", "swapoff",
	// The machine itself.
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "settimeofday", "clock_settime", "adjtimex",
	"clock_adjtime", "sethostname", "setdomainname",
}

// onlyX86 are more of them on that processor.
var onlyX86 = []string{"iopl", "ioperm", "modify_ldt", "mknod", "uselib", "ustat", "sysfs", "_sysctl"}

// newNamespaces is clone with any flag that makes a namespace.
var newNamespaces = func() []seccomp.NameWithConditions {
	var conditions []seccomp.NameWithConditions
	for _, flag := range []uint64{
		unix.CLONE_NEWUSER, unix.CLONE_NEWNS, unix.CLONE_NEWPID, unix.CLONE_NEWNET, unix.CLONE_NEWIPC, unix.CLONE_NEWUTS, unix.CLONE_NEWCGROUP,
	} {
		conditions = append(conditions, seccomp.NameWithConditions{
			Name: "clone", Conditions: []seccomp.Condition{{Argument: 0, Operation: seccomp.BitsSet, Value: flag}},
		})
	}
	return conditions
}()

// filter kills who uses another ABI than this processor's own, whose numbers mean
// other calls.
func filter() ([]bpf.RawInstruction, error) {
	here, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	names := slices.Clone(forbidden)
	if here.ID == arch.X86_64.ID {
		names = append(names, onlyX86...)
	}
	names = slices.DeleteFunc(names, func(name string) bool { _, known := here.SyscallNames[name]; return !known })
	policy := seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionErrno, Names: names},
			{Action: seccomp.ActionErrno, NamesWithCondtions: newNamespaces},
			// Its flags lie in memory that a filter cannot read; libraries fall back to clone.
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}},
		},
	}
	whole, err := policy.Assemble()
	if err != nil {
		return nil, err
	}
	const offsetNumber, offsetArch = 0, 4 // of struct seccomp_data
	guard := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offsetArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(here.ID), SkipTrue: 1},
		bpf.RetConstant{Val: uint32(seccomp.ActionKillProcess)},
		bpf.LoadAbsolute{Off: offsetNumber, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: uint32(arch.X32.SeccompMask), SkipFalse: 1},
		bpf.RetConstant{Val: uint32(seccomp.ActionKillProcess)},
	}
	return bpf.Assemble(slices.Concat(guard, whole))
}

// loadFilter puts the filter on this thread.
func loadFilter() error {
	raw, err := filter()
	if err != nil {
		return err
	}
	program := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		program[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	load := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&load))); errno != 0 {
		return fmt.Errorf("loading it: %w", errno)
	}
	return nil
}
