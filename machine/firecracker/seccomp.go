package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cal/machine/site"
)

// A Firecracker built for another libc than musl installs a filter that allows every
// call, and /proc says of it what it says of a real one. So a filter is proved by making the
// threads of a Firecracker do calls that it must forbid. Whoever ran the program is
// then known by its digest.

// forbidden calls, with arguments that harm nothing where they are allowed.
var forbidden = []struct {
	name   string
	number uint64
}{
	{"execve", unix.SYS_EXECVE},
	{"openat", unix.SYS_OPENAT},
	{"ptrace", unix.SYS_PTRACE},
	{"mount", unix.SYS_MOUNT},
	{"unshare", unix.SYS_UNSHARE},
	{"bpf", unix.SYS_BPF},
	{"setuid", unix.SYS_SETUID},
	{"process_vm_readv", unix.SYS_PROCESS_VM_READV},
}

// wantThreads are those that a running Firecracker has, by the beginning of their names.
// The first is its main thread, which has the name of the program.
var wantThreads = []string{"", "fc_api", "fc_vcpu"}

// proveFilter makes every thread of a running Firecracker try the forbidden calls, and an
// allowed one first, which shows that trying works. The process is of no use afterwards.
func proveFilter(ctx context.Context, pid int) error {
	failed := make(chan error)
	go func() {
		// For ever: a tracer is a thread, and its end sets the traced ones free.
		runtime.LockOSThread()
		failed <- proveThreads(ctx, pid)
	}()
	return <-failed
}

func proveThreads(ctx context.Context, pid int) error {
	threads, err := threadsOf(pid)
	if err != nil {
		return err
	}
	for _, want := range wantThreads {
		if !slices.ContainsFunc(threads, func(t thread) bool { return t.is(pid, want) }) {
			return fmt.Errorf("firecracker has no thread %q", want)
		}
	}
	at, err := callInstruction(pid)
	if err != nil {
		return err
	}
	for _, t := range threads {
		if err := t.prove(ctx, at); err != nil {
			return fmt.Errorf("thread %s of firecracker: %w", t.name, err)
		}
	}
	return nil
}

type thread struct {
	id    int
	inner uint64 // in its own pid namespace
	name  string
}

func (t thread) is(pid int, want string) bool {
	if want == "" {
		return t.id == pid
	}
	return strings.HasPrefix(t.name, want)
}

func threadsOf(pid int) ([]thread, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var threads []thread
	for _, entry := range entries {
		if worker, err := isWorker(filepath.Join(dir, entry.Name(), "stat")); err != nil || worker {
			if err != nil {
				return nil, err
			}
			continue
		}
		id, err := strconv.Atoi(entry.Name())
		if err != nil {
			return nil, err
		}
		status, err := os.ReadFile(filepath.Join(dir, entry.Name(), "status"))
		if err != nil {
			return nil, err
		}
		ids := strings.Fields(statusValue(string(status), "NSpid"))
		inner, err := strconv.ParseUint(ids[max(0, len(ids)-1)], 10, 32)
		if err != nil {
			return nil, err
		}
		threads = append(threads, thread{id, inner, statusValue(string(status), "Name")})
	}
	return threads, nil
}

// isWorker says whether a thread is one that the kernel runs on a process's account, as
// KVM's: it never runs code of the process.
func isWorker(stat string) (bool, error) {
	const userWorker = 0x4000 // PF_USER_WORKER of linux/sched.h
	data, err := os.ReadFile(stat)
	if err != nil {
		return false, err
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:])) // behind the name
	flags, err := strconv.ParseUint(fields[min(6, len(fields)-1)], 10, 64)
	return flags&userWorker != 0, err
}

// errTrying says that a thread could not be made to do calls.
var errTrying = errors.New("its calls cannot be tried")

// errAllowed says that a call was not stopped.
var errAllowed = errors.New("no seccomp filter stops it")

func (t thread) prove(ctx context.Context, at uint64) error {
	if err := unix.PtraceSeize(t.id); err != nil {
		return fmt.Errorf("ptrace: %w", err)
	}
	if err := unix.PtraceInterrupt(t.id); err != nil {
		return fmt.Errorf("ptrace: %w", err)
	}
	if _, err := t.stopped(ctx); err != nil {
		return err
	}
	var before unix.PtraceRegs
	if err := unix.PtraceGetRegs(t.id, &before); err != nil {
		return fmt.Errorf("ptrace: %w", err)
	}
	got, err := t.try(ctx, before, at, unix.SYS_GETTID)
	if err != nil || got != t.inner {
		return fmt.Errorf("gettid, which is allowed, returns %d, want %d: %w", int64(got), t.inner, errors.Join(err, errTrying))
	}
	for _, call := range forbidden {
		got, err := t.try(ctx, before, at, call.number)
		if err == nil {
			err = errAllowed
		}
		if !errors.Is(err, errTrapped) {
			return fmt.Errorf("%s returned %d: %w", call.name, int64(got), err)
		}
	}
	if err := unix.PtraceSetRegs(t.id, &before); err != nil {
		return fmt.Errorf("ptrace: %w", err)
	}
	return unix.PtraceDetach(t.id)
}

// errTrapped says that the filter stopped a call.
var errTrapped = errors.New("trapped by seccomp")

// callInstruction is the address of an instruction in a process's program that does a
// call.
func callInstruction(pid int) (uint64, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return 0, err
	}
	defer memory.Close()
	for line := range strings.Lines(string(maps)) {
		var start, end uint64
		var rights string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &start, &end, &rights); err != nil || rights != "r-xp" || end-start > largestText {
			continue
		}
		text := make([]byte, end-start)
		if _, err := memory.ReadAt(text, int64(start)); err != nil {
			continue
		}
		if i := bytes.Index(text, []byte{0x0f, 0x05}); i >= 0 {
			return start + uint64(i), nil
		}
	}
	return 0, fmt.Errorf("%w: process %d has no instruction for one", errTrying, pid)
}

const largestText = 64 << 20 // bytes of a program; Firecracker's has 2 MB

// try makes the stopped thread do one call, all of whose arguments are 0, by the
// instruction at an address.
func (t thread) try(ctx context.Context, regs unix.PtraceRegs, at, call uint64) (uint64, error) {
	regs.Rip = at
	regs.Rax, regs.Orig_rax = call, ^uint64(0)
	regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9 = 0, 0, 0, 0, 0, 0
	if err := unix.PtraceSetRegs(t.id, &regs); err != nil {
		return 0, fmt.Errorf("ptrace: %w", err)
	}
	for {
		signal, err := t.step(ctx, &regs)
		switch {
		case err != nil:
			return 0, err
		case signal == unix.SIGSYS:
			return regs.Rax, errTrapped
		case signal != unix.SIGTRAP:
			return regs.Rax, fmt.Errorf("stopped by %v", signal)
		case regs.Rip != at:
			return regs.Rax, nil
		}
		// The step before was trapped, and this is its own end, which comes later.
	}
}

// step runs one instruction of the stopped thread and returns what stopped it.
func (t thread) step(ctx context.Context, regs *unix.PtraceRegs) (unix.Signal, error) {
	if err := unix.PtraceSingleStep(t.id); err != nil {
		return 0, fmt.Errorf("ptrace: %w", err)
	}
	signal, err := t.stopped(ctx)
	if err != nil {
		return 0, err
	}
	if err := unix.PtraceGetRegs(t.id, regs); err != nil {
		return 0, fmt.Errorf("ptrace: %w", err)
	}
	return signal, nil
}

// stopped waits for the thread to stop and says by which signal. It looks again and again:
// a wait by the kernel has no end, and neither had one for a thread that never stops.
func (t thread) stopped(ctx context.Context) (unix.Signal, error) {
	for again := time.Duration(0); ; again = min(2*again+time.Microsecond, time.Millisecond) {
		var status unix.WaitStatus
		found, err := unix.Wait4(t.id, &status, unix.WALL|unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("ptrace: %w", err)
		case found == 0:
			if err := site.Pause(ctx, again); err != nil {
				return 0, fmt.Errorf("%w: it does not stop: %w", errTrying, err)
			}
		case !status.Stopped():
			return 0, fmt.Errorf("it ended with status %#x", uint32(status))
		default:
			return status.StopSignal(), nil
		}
	}
}

// filtered says whether every thread of a process has a seccomp filter, of whatever kind.
func filtered(pid int) error {
	threads, err := threadsOf(pid)
	if err != nil {
		return err
	}
	for _, t := range threads {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", pid, t.id))
		if err != nil {
			return err
		}
		for key, want := range map[string]string{"Seccomp": "2", "NoNewPrivs": "1"} {
			if got := statusValue(string(status), key); got != want {
				return fmt.Errorf("thread %s of firecracker has %s %s, want %s", t.name, key, got, want)
			}
		}
	}
	return nil
}

func statusValue(status, key string) string {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	return ""
}
