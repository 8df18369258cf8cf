package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"

	"cal/internal/cgroup"
	"cal/internal/fileid"
	"cal/machine"
	"cal/machine/site"
)

// Probe implements machine.Driver: this is root, both programs are there in the version
// that was tried, KVM runs a guest, and a tiny guest runs under a jailed Firecracker
// whose threads a filter stops.
func (d *Driver) Probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.config.Patience)
	defer cancel()
	if err := d.probeHost(); err != nil {
		return err
	}
	for _, program := range []struct{ name, path string }{{"firecracker", d.config.Firecracker}, {"jailer", d.config.Jailer}} {
		if err := probeVersion(ctx, program.name, program.path); err != nil {
			return err
		}
	}
	if err := d.config.KVM.Probe(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	d.proved = "" // by this probe, or not at all
	d.mu.Unlock()
	_, err := d.prove(ctx)
	return err
}

func (d *Driver) probeHost() error {
	if os.Geteuid() != 0 {
		return &machine.ProbeError{
			Cause: "firecracker's jailer must be started as root, and this user is not",
			Mend:  "start the node as root to have it; the driver qemu needs no root",
		}
	}
	if cgroup.Version(d.config.Cgroups) == 0 {
		return &machine.ProbeError{
			Cause: fmt.Sprintf("no cgroups with the controllers %s are at %s", strings.Join(cgroup.Controllers, ", "), d.config.Cgroups),
			Mend:  "mount them; in a container give it a cgroup namespace of its own that it may write",
		}
	}
	return nil
}

func probeVersion(ctx context.Context, name, path string) error {
	mend := fmt.Sprintf("install firecracker and jailer %s, both on PATH or named by --firecracker and --jailer", Version)
	if path == "" {
		return &machine.ProbeError{Cause: "there is no " + name + " on PATH", Mend: mend}
	}
	output, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	first, _, _ := strings.Cut(string(output), "\n")
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound):
		return &machine.ProbeError{Cause: fmt.Sprintf("there is no %s at %s", name, path), Mend: mend}
	case err != nil:
		return &machine.ProbeError{Cause: fmt.Sprintf("%s --version failed: %s", path, line(first)), Mend: mend, Err: err}
	}
	// "Firecracker v1.16.1", "Jailer v1.16.1"
	if got, ok := strings.CutPrefix(strings.ToLower(first), name+" v"); !ok || got != Version {
		return &machine.ProbeError{Cause: fmt.Sprintf("%s says it is %q; CAL was tried with %s %s and takes no other", path, line(first), name, Version), Mend: mend}
	}
	return nil
}

// prove runs a tiny guest, once for each program, and has the threads of its Firecracker do
// what their filter forbids. It returns the digest of the program, which is read only when it
// is another file: what runs in a jail is read at each start, and must have this digest.
func (d *Driver) prove(ctx context.Context) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	file, err := fileid.Of(d.config.Firecracker)
	if err != nil {
		return "", err
	}
	if d.proved != "" && d.read == file {
		return d.proved, nil
	}
	digest, err := fileDigest(d.config.Firecracker)
	if err != nil {
		return "", err
	}
	if d.proved == digest {
		d.read = file
		return digest, nil
	}
	ctx, cancel := site.StartContext(ctx)
	defer cancel()
	trial, err := site.BeginTrial(ctx, d.config.Scratch, d)
	if err != nil {
		return "", &machine.ProbeError{Cause: "no directory for a probe can be made", Mend: "let root write to " + d.config.Scratch, Err: err}
	}
	err = d.proveIn(ctx, trial.Machine(), digest)
	if ended := trial.End(ctx); ended != nil {
		return "", &machine.ProbeError{Cause: "the probe's machine cannot be removed", Mend: "look for processes named firecracker", Err: errors.Join(err, ended)}
	}
	if err != nil {
		return "", err
	}
	d.proved, d.read = digest, file
	return digest, nil
}

func (d *Driver) proveIn(ctx context.Context, dir, digest string) error {
	if err := checkFS(dir); err != nil {
		return &machine.ProbeError{Cause: fmt.Sprintf("no jail can be in %s", d.config.Scratch), Mend: "mount it without nodev and noexec", Err: err}
	}
	rec, err := d.begin(machine.Spec{ID: "probe", Dir: dir})
	if err != nil {
		return err
	}
	if err := rec.Jail.make(); err != nil {
		return err
	}
	if err := os.WriteFile(rec.Jail.path(kernelFile), tinyKernel(), 0o444); err != nil {
		return err
	}
	v, err := d.launch(ctx, rec.Jail, digest)
	if err != nil {
		return &machine.ProbeError{Cause: "no jailed firecracker comes up", Mend: "see what the jailer says; in a container it needs CAP_SYS_ADMIN, CAP_MKNOD and all user ids", Err: err}
	}
	defer v.letGo()
	if err := v.startTiny(ctx); err != nil {
		return &machine.ProbeError{Cause: "firecracker runs no guest here", Mend: "see whether KVM is whole: " + "cal doctor prints what it said", Err: v.explain(err)}
	}
	if err := proveFilter(ctx, v.process.PID); err != nil {
		return &machine.ProbeError{
			Cause: fmt.Sprintf("the seccomp filter of %s could not be proved", d.config.Firecracker),
			Mend:  "take the release that its makers built with musl: one for another libc has no filter; and let root trace processes",
			Err:   err,
		}
	}
	return nil
}

// startTiny starts the tiny guest and waits for its word.
func (v *vmm) startTiny(ctx context.Context) error {
	for _, step := range []func() error{
		func() error { return v.serial(ctx) },
		func() error { return v.api.setMachine(ctx, machineConfig{CPUs: 1, MemoryMB: 64}) },
		func() error { return v.api.setBoot(ctx, bootSource{Kernel: "/" + kernelFile}) },
		func() error { return v.api.start(ctx) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	for !strings.Contains(v.console.String(), tinyWord) {
		if site.Pause(ctx, time.Millisecond) != nil {
			return fmt.Errorf("the guest printed %q: %w", v.console.String(), context.Cause(ctx))
		}
	}
	return nil
}
