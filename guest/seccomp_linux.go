package guest

import (
	"fmt"
	"slices"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// forbidden are calls that no tool and no agent needs: they change the machine
// itself or open kernel surface.
var forbidden = []string{
	"mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsmount", "fsconfig", "fspick", "mount_setattr",
	"unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "fanotify_init", "modify_ldt",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
	"open_by_handle_at", "name_to_handle_at", "acct", "quotactl", "quotactl_fd", "syslog", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex",
	"iopl", "ioperm", "sethostname", "setdomainname", "lookup_dcookie", "vhangup", "process_vm_writev",
}

// absent are calls that programs do without where the kernel has none. The flags of clone3 lie in
// memory, which a filter cannot read; what goes through a ring of io_uring no filter sees.
var absent = []string{"clone3", "io_uring_setup", "io_uring_enter", "io_uring_register"}

// newestCall is the last of the calls that were looked at for these lists, mseal of Linux 6.10. A
// kernel's newer ones are absent.
const newestCall = 462

// otherFamilies is socket with any family but those that a program in a machine without a
// network needs: unix, IPv4 and IPv6 on lo, and netlink to ask what lo is. The host is
// reached over vsock, by the proxy alone.
var otherFamilies = []seccomp.NameWithConditions{
	{Name: "socket", Conditions: []seccomp.Condition{
		{Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_UNIX}, {Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_INET},
		{Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_INET6}, {Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_NETLINK},
	}},
	{Name: "socket", Conditions: []seccomp.Condition{
		{Argument: 0, Operation: seccomp.Equal, Value: unix.AF_NETLINK}, {Argument: 2, Operation: seccomp.NotEqual, Value: unix.NETLINK_ROUTE},
	}},
}

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

func seccompPolicy(kind string) seccomp.Policy {
	names := forbidden
	if kind == agentJail {
		names = append([]string{"memfd_create", "ptrace", "process_vm_readv", "pidfd_getfd"}, names...)
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		// Those with conditions come last: the library looks for the number of a call in what it
		// has loaded of the arguments, after the first.
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionErrno, Names: names},
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: absent},
			{Action: seccomp.ActionErrno, NamesWithCondtions: newNamespaces},
			{Action: seccomp.ActionErrno | seccomp.Action(unix.EAFNOSUPPORT), NamesWithCondtions: otherFamilies},
		},
	}
}

// seccompFilter is the policy's filter behind a gate for what the policy does not know: a call
// by another ABI (32-bit, by int 0x80) ends the process, and one of another numbering (x32)
// or newer than the policy is absent. The library lets the first pass.
//
// There is a short way past the filter for most calls: at every clone gVisor tries a
// filter with each of 2000 numbers, and a thread that starts should not wait for that.
func seccompFilter(kind string) ([]bpf.Instruction, error) {
	policy := seccompPolicy(kind)
	whole, err := policy.Assemble()
	if err != nil {
		return nil, err
	}
	here, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	last := 0 // number that the policy names
	for _, group := range policy.Syscalls {
		for _, name := range group.Names {
			last = max(last, here.SyscallNames[name])
		}
		for _, call := range group.NamesWithCondtions {
			last = max(last, here.SyscallNames[call.Name])
		}
	}
	return slices.Concat([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(here.ID), SkipTrue: 1},
		bpf.RetConstant{Val: uint32(seccomp.ActionKillProcess)},
		bpf.LoadAbsolute{Off: 0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: newestCall, SkipFalse: 1},
		bpf.RetConstant{Val: uint32(seccomp.ActionErrno) | uint32(unix.ENOSYS)},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: uint32(last), SkipFalse: 1},
		bpf.RetConstant{Val: uint32(seccomp.ActionAllow)},
	}, whole), nil
}

// loadSeccomp puts the filter on every thread of this process.
func loadSeccomp(kind string) error {
	filter, err := seccompFilter(kind)
	if err != nil {
		return fmt.Errorf("seccomp filter: %w", err)
	}
	raw, err := bpf.Assemble(filter)
	if err != nil {
		return fmt.Errorf("seccomp filter: %w", err)
	}
	program := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		program[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	load := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&load)))
	if errno != 0 {
		return fmt.Errorf("loading the seccomp filter: %w", errno)
	}
	if thread != 0 {
		return fmt.Errorf("loading the seccomp filter: thread %d does not take it", thread)
	}
	return nil
}
