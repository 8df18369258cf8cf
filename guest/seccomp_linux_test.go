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
func verdict(t *testing.T, vm *bpf.VM, nr, ofArch uint32, arg uint64) seccomp.Action {
	t.Helper()
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], nr)
	binary.BigEndian.PutUint32(data[4:], ofArch)
	// A filter on a little-endian machine finds the low word of an argument first.
	binary.BigEndian.PutUint32(data[16:], uint32(arg))
	binary.BigEndian.PutUint32(data[20:], uint32(arg>>32))
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

// TestShortWay: the way past the filter changes no verdict, whatever the number, the
// numbering or the flags.
func TestShortWay(t *testing.T) {
	here, err := arch.GetInfo("")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{agentJail, toolsJail} {
		policy := seccompPolicy(kind)
		long, err := policy.Assemble()
		whole := machineFor(t, long, err)
		short, err := seccompFilter(kind)
		fast := machineFor(t, short, err)
		try := func(nr, ofArch uint32, arg uint64) seccomp.Action {
			want, got := verdict(t, whole, nr, ofArch, arg), verdict(t, fast, nr, ofArch, arg)
			if got != want {
				t.Errorf("%s: call %#x of %#x with %#x: %#x, without the short way %#x", kind, nr, ofArch, arg, got, want)
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
		for _, name := range forbidden {
			if got := try(uint32(here.SyscallNames[name]), uint32(here.ID), 0); got == seccomp.ActionAllow {
				t.Errorf("%s: %s is allowed", kind, name)
			}
		}
		for _, allowed := range []string{"read", "openat", "execve", "clone"} {
			if got := try(uint32(here.SyscallNames[allowed]), uint32(here.ID), uint64(unix.SIGCHLD)); got != seccomp.ActionAllow {
				t.Errorf("%s: %s gets %#x", kind, allowed, got)
			}
		}
		if got := try(uint32(here.SyscallNames["clone"]), uint32(here.ID), unix.CLONE_NEWNET); got == seccomp.ActionAllow {
			t.Errorf("%s: clone makes a network namespace", kind)
		}
	}
}
