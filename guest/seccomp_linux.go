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

// BUG: calls of another ABI (32-bit, by int 0x80) pass the filter: the library lets what
// it does not know fall to the default. gVisor has no such ABI; a guest kernel that has must
// be built without it.

// forbidden are calls that no tool and no agent needs: they change the machine
// itself or open kernel surface.
var forbidden = []string{
	"mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsmount", "fsconfig", "fspick", "mount_setattr",
	"unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
	"open_by_handle_at", "name_to_handle_at", "acct", "quotactl", "syslog", "settimeofday", "clock_settime", "adjtimex",
	"iopl", "ioperm", "sethostname", "setdomainname", "lookup_dcookie", "vhangup", "process_vm_writev",
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
		names = append([]string{"memfd_create", "ptrace", "process_vm_readv"}, names...)
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionErrno, Names: names},
			{Action: seccomp.ActionErrno, NamesWithCondtions: newNamespaces},
			// Its flags lie in memory that a filter cannot read; libraries fall back to clone.
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{noFlags}},
		},
	}
}

const noFlags = "clone3"

// seccompFilter is the policy's filter with a short way past it. At every clone gVisor
// tries a filter with each of 2000 numbers of calls; most of them are no calls
// at all, and a thread that starts should not wait for that.
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
		bpf.LoadAbsolute{Off: 0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: uint32(arch.X32.SeccompMask), SkipTrue: 2}, // another numbering
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
