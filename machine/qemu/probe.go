package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

const install = "install it (Debian, Ubuntu: apt install qemu-system-x86; Fedora: dnf install qemu-system-x86-core)"

// Probe implements machine.Driver: a kernel must boot and its first process answer. What a
// machine is made of is made first, and may take a while the first time.
func (d *Driver) Probe(ctx context.Context) error {
	if !d.emulated {
		if err := d.config.KVM.Probe(ctx); err != nil {
			return err
		}
	}
	if err := d.probeProgram(ctx); err != nil {
		return err
	}
	if !d.config.Fetch && !d.config.Images.HasKernel(d.config.Kernel) {
		return &machine.ProbeError{Cause: "no kernel was fetched yet", Mend: "cal run --driver qemu fetches Debian's, once, and so does: cal image build kernel"}
	}
	kernel, err := d.config.Images.Kernel(ctx, d.config.Kernel, nil)
	if err == nil {
		_, err = d.config.Images.Initramfs(ctx, kernel, d.config.Proxy)
	}
	if err != nil {
		return &machine.ProbeError{Cause: "there is no kernel to boot", Mend: "see that Debian's archive is reached, or take a kernel of your own: cal image build kernel:PATH", Err: err}
	}
	return d.probeGuest(ctx)
}

// probeProgram says whether QEMU is there with all that it needs.
func (d *Driver) probeProgram(ctx context.Context) error {
	_, err := d.programs.find(ctx, d.config.QEMU)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist):
		return &machine.ProbeError{Cause: fmt.Sprintf("QEMU is not installed as %s", d.config.QEMU), Mend: install}
	case errors.Is(err, fs.ErrPermission):
		return &machine.ProbeError{Cause: fmt.Sprintf("QEMU at %s may not be executed", d.config.QEMU), Mend: "chmod 755 it, and see that its directories can be entered", Err: err}
	}
	return &machine.ProbeError{Cause: fmt.Sprintf("QEMU at %s cannot be used", d.config.QEMU), Mend: install, Err: err}
}

// probeGuest makes a machine of an empty root, and removes it.
func (d *Driver) probeGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.config.Patience)
	defer cancel()
	trial, err := site.BeginTrial(ctx, d.config.Scratch, d)
	if err != nil {
		return &machine.ProbeError{Cause: "no directory for a probe can be made", Mend: "set TMPDIR to a directory that you can write", Err: err}
	}
	err = d.tryGuest(ctx, trial)
	if ended := trial.End(ctx); ended != nil {
		return &machine.ProbeError{Cause: "the probe's machine cannot be removed", Mend: "look for processes named qemu-system-x86_64", Err: errors.Join(err, ended)}
	}
	return err
}

// tryGuest has a guest answer.
func (d *Driver) tryGuest(ctx context.Context, trial *site.Trial) error {
	root, err := trial.EmptyRoot()
	if err != nil {
		return err
	}
	spec := machine.Spec{
		ID: "probe", Dir: trial.Machine(), Workspace: filepath.Join(trial.Dir, "w"), Proxy: d.config.Proxy,
		Image: nucleus.Image{Kind: nucleus.ImageDirectory, Path: root}, Resources: nucleus.Resources{CPU: 1, MemoryMB: 256, DiskMB: 64},
	}
	if err := os.Mkdir(spec.Workspace, 0o755); err != nil {
		return err
	}
	m, err := d.Create(ctx, spec)
	if err != nil {
		return d.diagnose(ctx, "/proc", err)
	}
	m.Release() // the trial's end removes it
	return nil
}

// diagnose finds the cause of a machine that did not come up: first what the host says
// of itself, then what was seen.
func (d *Driver) diagnose(ctx context.Context, proc string, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &machine.ProbeError{Cause: fmt.Sprintf("a guest did not answer within %s", d.config.Patience),
			Mend: "see whether the host is overloaded; `cal doctor` tries again", Err: err}
	}
	ordinary := os.Geteuid() != 0
	confinement := site.Confinement{Program: "QEMU", Ordinary: ordinary, Userns: ordinary, Proc: proc}
	if hindered := confinement.Why(err, strings.Contains(err.Error(), "operation not permitted")); hindered != nil {
		return hindered
	}
	return confinement.NoGuest(errors.New(site.LastLine(err.Error())))
}
