package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"cal/image"
	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

// probeScript runs in the guest. Only shell builtins: the answer comes from the
// kernel that the guest sees, which must be gVisor's.
const probeScript = `read -r version </proc/version && echo "cal-probe: $version"`

// Probe implements machine.Driver: a shell of the host's root file system must
// run under gVisor's kernel and say so.
func (d *Driver) Probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.config.Patience)
	defer cancel()
	if err := d.probeRunsc(ctx); err != nil {
		return err
	}
	if !d.ordinary {
		if err := probeIDs("/proc/self/uid_map"); err != nil {
			return err
		}
	}
	trial, err := site.BeginTrial(ctx, d.config.Scratch, d)
	if err != nil {
		return &machine.ProbeError{Cause: "no directory for a probe can be made", Mend: "set TMPDIR to a directory that you can write", Err: err}
	}
	output, err := d.probeGuest(ctx, place(trial.Machine()))
	if ended := trial.End(ctx); ended != nil {
		return &machine.ProbeError{Cause: "the probe's machine cannot be removed", Mend: "look for processes named runsc-sandbox", Err: ended}
	}
	if err == nil && strings.Contains(output, "cal-probe: ") && strings.Contains(output, "gvisor") {
		return nil
	}
	return d.diagnose("/proc", output, err, errors.Is(ctx.Err(), context.DeadlineExceeded))
}

// probeRunsc says whether the pinned runsc is there and is what it should be.
func (d *Driver) probeRunsc(ctx context.Context) error {
	const mend = "run `make` in CAL's source, or install CAL again: it brings its own runsc"
	output, err := exec.CommandContext(ctx, d.config.Runsc, "--version").CombinedOutput()
	switch {
	case d.config.Runsc == "" || errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound):
		return &machine.ProbeError{Cause: fmt.Sprintf("runsc is not at %q", d.config.Runsc), Mend: mend}
	case errors.Is(err, fs.ErrPermission):
		return &machine.ProbeError{
			Cause: fmt.Sprintf("runsc at %s may not be executed", d.config.Runsc),
			Mend:  "chmod 755 it, and see that its file system is not mounted noexec and its directories can be entered", Err: err,
		}
	case ctx.Err() != nil:
		return d.hang("runsc --version")
	case err != nil:
		return &machine.ProbeError{Cause: fmt.Sprintf("%s --version failed: %s", d.config.Runsc, site.LastLine(string(output))), Mend: mend, Err: err}
	}
	first, _, _ := strings.Cut(string(output), "\n")
	if got := strings.TrimPrefix(first, "runsc version "); got != d.config.Version {
		return &machine.ProbeError{Cause: fmt.Sprintf("runsc at %s is version %q, wanted %q", d.config.Runsc, got, d.config.Version), Mend: mend}
	}
	return nil
}

func probeIDs(uidMap string) error {
	file, err := os.Open(uidMap)
	if err != nil {
		return err
	}
	defer file.Close()
	if mapped, count := idsMapped(file); !mapped {
		return &machine.ProbeError{
			Cause: fmt.Sprintf("this root owns %d user ids, not those from %d on that machines get", count, lowestID),
			Mend:  "run CAL as an ordinary user, or in a container that maps all ids",
		}
	}
	return nil
}

// probeGuest runs the script attached, so that it ends with its parent.
func (d *Driver) probeGuest(ctx context.Context, place place) (string, error) {
	root, err := image.Resolve(nucleus.Image{Kind: "host"}, d.config.Host)
	if err != nil {
		return "", err
	}
	rec := record{Driver: d.Name(), ID: "probe"}
	if d.ordinary {
		if ids, err := d.subordinate(ctx); err == nil {
			rec.Map, rec.IDBase = &ids, 1
		}
	} else {
		rec.IDBase = lowestID
		rec.Root = filepath.Join(d.config.Roots, nucleus.NewID("probe-"))
	}
	rec.Facts, rec.Pids, rec.MaxWatch = rec.facts(), d.config.Usual.Pids, int64(d.config.Usual.MemoryMB)<<20
	if err := errors.Join(rec.save(place), os.Mkdir(place.runscRoot(), 0o700)); err != nil {
		return "", err
	}
	skeleton, err := rec.makeRootfs(place)
	if err != nil {
		return "", err
	}
	if err := root.Build(skeleton, "/proc", "/sys", "/dev", "/tmp", "/run", nucleus.MachineHome); err != nil {
		return "", err
	}
	if err := rec.showAt(place, d.config.Runsc, root.Binds); err != nil {
		return "", err
	}
	spec := machine.Spec{Dir: string(place)}
	config := d.config.oci(spec, rec, root.Binds)
	config.Mounts = config.Mounts[:len(config.Mounts)-1] // no workspace
	config.Process.Args = []string{"/bin/sh", "-c", probeScript}
	config.Process.Capabilities = &specs.LinuxCapabilities{}
	if err := writeConfig(place, config); err != nil {
		return "", err
	}
	var output site.Bounded
	cmd := command(ctx, d.config.Runsc, append(d.flags(place, rec), "run", "--bundle="+string(place), container), nil)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := rec.starter(cmd, place)(); err != nil {
		return output.String(), err
	}
	err = cmd.Wait()
	return output.String(), err
}

func (d *Driver) hang(what string) error {
	return &machine.ProbeError{
		Cause: fmt.Sprintf("%s did not answer within %s", what, d.config.Patience),
		Mend:  "see whether the host is overloaded, or a security module stops ptrace or seccomp; `cal doctor` tries again",
	}
}

// diagnose finds the cause of a failed guest: first what the host says of
// itself, then what runsc said.
func (d *Driver) diagnose(proc, output string, err error, late bool) error {
	if err == nil {
		err = errors.New("no answer of gVisor's kernel")
	}
	if late {
		return d.hang("a guest under runsc")
	}
	seen := fmt.Errorf("%w: %s", err, site.LastLine(output))
	confinement := site.Confinement{Program: "runsc", Ordinary: d.ordinary, Userns: true, Proc: proc}
	said := strings.ToLower(output)
	if hindered := confinement.Why(seen, strings.Contains(said, "operation not permitted") || strings.Contains(said, "permission denied")); hindered != nil {
		return hindered
	}
	return confinement.NoGuest(seen)
}
