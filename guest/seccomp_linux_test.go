package guest

import (
	"encoding/binary"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// verdict runs a filter on a call. A socket filter reads big-endian words, so the
// machine's own order is turned round.
func verdict(t *testing.T, vm *bpf.VM, nr, ofArch uint32, args ...uint64) seccomp.Action {
	t.Helper()
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], nr)
	binary.BigEndian.PutUint32(data[4:], ofArch)
	for i, arg := range args {
		// A filter on a little-endian machine finds the low word of an argument first.
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(arg))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(arg>>32))
	}
	got, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return seccomp.Action(got)
}

func machineFor(t *testing.T, instructions []bpf.Instruction, err error) *bpf.VM {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(instructions)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// TestFilter: the gate and the way past the filter change no verdict on a call that the policy
// knows, whatever its arguments; what it does not know does not pass.
func TestFilter(t *testing.T) {
	here, err := arch.GetInfo("")
	if err != nil {
		t.Fatal(err)
	}
	const absentHere = seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)
	for _, kind := range []string{agentJail, toolsJail} {
		policy := seccompPolicy(kind)
		long, err := policy.Assemble()
		whole := machineFor(t, long, err)
		short, err := seccompFilter(kind)
		fast := machineFor(t, short, err)
		want := func(nr, ofArch uint32, args ...uint64) seccomp.Action {
			switch {
			case ofArch != uint32(here.ID):
				return seccomp.ActionKillProcess
			case nr > newestCall:
				return absentHere
			}
			return verdict(t, whole, nr, ofArch, args...)
		}
		try := func(nr, ofArch uint32, args ...uint64) seccomp.Action {
			want, got := want(nr, ofArch, args...), verdict(t, fast, nr, ofArch, args...)
			if got != want {
				t.Errorf("%s: call %#x of %#x with %#x: %#x, want %#x", kind, nr, ofArch, args, got, want)
			}
			return got
		}
		x32 := uint32(arch.X32.SeccompMask)
		for nr := range uint32(4096) {
			for _, number := range []uint32{nr, nr | x32, nr | 1<<31, x32 - 1 - nr, ^nr} {
				for _, ofArch := range []uint32{uint32(here.ID), uint32(arch.I386.ID), 0} {
					try(number, ofArch, 0)
					try(number, ofArch, unix.CLONE_NEWUSER)
				}
			}
		}
		number := func(name string) uint32 {
			nr, ok := here.SyscallNames[name]
			if !ok {
				t.Errorf("no call is named %s", name)
			}
			return uint32(nr)
		}
		for _, name := range append(append([]string{}, forbidden...), absent...) {
			if got := try(number(name), uint32(here.ID), 0); got == seccomp.ActionAllow {
				t.Errorf("%s: %s is allowed", kind, name)
			}
		}
		for _, allowed := range []string{"read", "openat", "execve", "clone", "socketpair", "mseal"} {
			if got := try(number(allowed), uint32(here.ID), uint64(unix.SIGCHLD)); got != seccomp.ActionAllow {
				t.Errorf("%s: %s gets %#x", kind, allowed, got)
			}
		}
		if got := try(number("clone"), uint32(here.ID), unix.CLONE_NEWNET); got == seccomp.ActionAllow {
			t.Errorf("%s: clone makes a network namespace", kind)
		}
		for family := range uint64(64) {
			for _, protocol := range []uint64{0, 1, unix.NETLINK_GENERIC, 1 << 32} {
				for _, high := range []uint64{0, 1 << 32} {
					allowed := high == 0 && (family == unix.AF_UNIX || family == unix.AF_INET || family == unix.AF_INET6 || family == unix.AF_NETLINK && protocol == unix.NETLINK_ROUTE)
					got := try(number("socket"), uint32(here.ID), family|high, unix.SOCK_STREAM, protocol)
					if (got == seccomp.ActionAllow) != allowed {
						t.Errorf("%s: socket of family %d, protocol %d gets %#x", kind, family|high, protocol, got)
					}
				}
			}
		}
	}
}
