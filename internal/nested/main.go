// Command nested runs the tests of the driver firecracker with the real programs, on a
// host whose own KVM runs no guest or that has none: it boots a small host under plain
// emulation (qemu, tcg), whose emulated processor has virtualisation, and runs them
// there. All of it is then emulated twice: what is slow there says nothing.
//
//	nested --firecracker PATH --jailer PATH [--unfiltered PATH] [--run REGEXP] [--keep DIR]
//
// The emulated host has one processor: a kernel changes its own code while others run it,
// and QEMU, with a thread for each processor, then went on with what had been there. All of
// the emulated host hung, at the breakpoint that stands there for a moment.
//
// QEMU itself is kept on one processor of this host. Where its emulated processor enters a guest,
// it notes an interrupt for that by a plain "or" without a lock (helper_vmrun, in 7.2), and what its
// other thread noted there in the same moment was lost: the timer's interrupt, after which the
// emulated host slept for ever. On one processor nothing comes between.
//
// On an emulated host of two processors one boot of eight of a guest's guest ended with the exit
// reason "Shutdown" in mid request, which was the emulated processors' doing; on one, none of 92
// did. A test that failed in such a way is tried again, at most twice, and that is counted and
// printed; nothing else is tried again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/machine/machinetest"
)

func main() {
	if os.Getpid() == 1 {
		host() // does not return
	}
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nested:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("nested", flag.ContinueOnError)
	firecracker := flags.String("firecracker", "", "the real firecracker, built with musl (required)")
	jailer := flags.String("jailer", "", "its jailer (required)")
	unfiltered := flags.String("unfiltered", "", "a static firecracker whose seccomp filter allows everything, to see that it is refused")
	pattern := flags.String("run", ".", "run only tests whose names match")
	timeout := flags.Duration("timeout", 2*time.Hour, "of all")
	keep := flags.String("keep", "", "directory for what is made, which stays; empty: a temporary one")
	memory := flags.Int("memory", 6144, "of the emulated host, in MB")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *firecracker == "" || *jailer == "" || flags.NArg() > 0 {
		flags.Usage()
		return errors.New("no --firecracker or no --jailer: they are named by make test-firecracker FIRECRACKER=PATH JAILER=PATH")
	}
	wanted, err := regexp.Compile(*pattern)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	dir := *keep
	if dir == "" {
		if dir, err = os.MkdirTemp("", "cal-nested-"); err != nil {
			return err
		}
		defer os.RemoveAll(dir)
	}
	b := build{dir: dir, programs: map[string]string{"firecracker": *firecracker, "jailer": *jailer}}
	if *unfiltered != "" {
		b.programs["unfiltered"] = *unfiltered
	}
	made, err := b.make(ctx, wanted)
	if err != nil {
		return err
	}
	return boot(ctx, made, *memory)
}

// tests lists what there is to run, each of the conformance suite's for itself: a process
// each, so that one can be tried again.
func tests(ctx context.Context, binary string, wanted *regexp.Regexp) ([]string, error) {
	output, err := exec.CommandContext(ctx, binary, "-test.list", ".").Output()
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(output)) {
		name := strings.TrimSpace(line)
		switch {
		case !strings.HasPrefix(name, "Test"):
		case name == "TestConformance":
			for _, part := range machinetest.Names() {
				names = append(names, name+"/"+part)
			}
		default:
			names = append(names, name)
		}
	}
	return slices.DeleteFunc(names, func(name string) bool { return !wanted.MatchString(name) }), nil
}

// boot runs the emulated host and passes on what it prints.
func boot(ctx context.Context, made image, memory int) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1",
		"-m", fmt.Sprint(memory), "-kernel", made.kernel, "-initrd", made.initrd, "-drive", "file="+made.disk+",if=virtio,format=raw,cache=unsafe,discard=unmap", "-append", "console=ttyS0 quiet panic=-1 reboot=t",
		"-display", "none", "-nic", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot")
	verdict := verdict{spoke: time.AfterFunc(silence, func() {
		stop(fmt.Errorf("the emulated host printed nothing for %s: its emulator hangs; hint: try again", silence))
	})}
	defer verdict.spoke.Stop()
	cmd.Stdout, cmd.Stderr = &verdict, os.Stderr
	if err := toOneProcessor(); err != nil {
		return err
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("qemu: %w", errors.Join(err, context.Cause(ctx)))
	}
	return verdict.err()
}

// toOneProcessor keeps this thread, and what the goroutine starts from now on, on the last of the
// processors that it may run on.
func toOneProcessor() error {
	runtime.LockOSThread() // never unlocked: the program ends with this
	var may, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("asking for processors: %w", err)
	}
	last := 0
	for cpu, left := 0, may.Count(); left > 0; cpu++ {
		if may.IsSet(cpu) {
			last, left = cpu, left-1
		}
	}
	one.Set(last)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("staying on processor %d: %w", last, err)
	}
	return nil
}

// silence is longer than the host leaves any test: its own clock may have stopped.
const silence = hungTimeout + 2*time.Minute

// verdict passes on what it gets and keeps the last line that begins with the word.
type verdict struct {
	line, last string
	spoke      *time.Timer // of silence
}

const verdictWord = "nested-verdict:"

func (v *verdict) Write(p []byte) (int, error) {
	v.spoke.Reset(silence)
	for _, c := range string(p) {
		if c != '\n' {
			v.line += string(c)
			continue
		}
		if said, ok := strings.CutPrefix(strings.TrimSpace(v.line), verdictWord); ok {
			v.last = strings.TrimSpace(said)
		}
		v.line = ""
	}
	return os.Stdout.Write(p)
}

func (v *verdict) err() error {
	switch v.last {
	case "passed":
		return nil
	case "":
		return errors.New("the emulated host ended without a verdict")
	}
	return errors.New(v.last)
}

// build is what is made for the emulated host.
type build struct {
	dir      string
	programs map[string]string // real ones, by name
}

func (b build) path(name string) string { return filepath.Join(b.dir, name) }
