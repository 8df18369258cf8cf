package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"

	"cal/image"
	"cal/internal/kvm"
)

// qemuTimes: a machine under QEMU, from `cal run` to the end of its first tool call and of the
// machine, beside what QEMU and the same kernel take alone: to the panic for want of a
// first process.
func qemuTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	ours := s.calRun("--driver", "qemu", "--", "git", "--version")
	if out, err := s.cal(ctx, ours.argv[1:]...); err != nil { // the kernel and the image are fetched, once
		return nil, fmt.Errorf("%w: %s", err, lastLine(out))
	}
	images, err := image.Open(filepath.Join(s.home, "images"))
	if err != nil {
		return nil, err
	}
	kernel, err := images.Kernel(ctx, "", nil)
	if err != nil {
		return nil, err
	}
	how, accelerator, cpu := "emulated", "tcg,thread=multi,tb-size=128", "max"
	if new(kvm.Host).Probe(ctx) == nil {
		how, accelerator, cpu = "with KVM", "kvm", "host"
	}
	alone := contender{
		name: "QEMU alone, the same kernel, to its panic without an init",
		argv: []string{path, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
			"-M", "microvm,acpi=on,isa-serial=on", "-accel", accelerator, "-cpu", cpu, "-smp", strconv.Itoa(min(runtime.NumCPU(), 4)), "-m", "2048",
			"-kernel", kernel.Image, "-append", "console=ttyS0 quiet panic=-1 reboot=t"},
		env: os.Environ(), dir: s.dir,
	}
	medians, err := race(ctx, min(rounds, 7), alone, ours)
	if err != nil {
		return nil, err
	}
	return table("A machine under QEMU, "+how+", `git --version` in it", []string{alone.name, ours.name + " --driver qemu"}, medians), nil
}
