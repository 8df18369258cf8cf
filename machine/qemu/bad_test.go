package qemu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/image"
	"cal/internal/kvm"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/machine/site"
	"cal/nucleus"
)

// TestBadStart: what cannot become a machine is an error that says why, and leaves nothing.
func TestBadStart(t *testing.T) {
	b := need(t)
	h := host(t)
	file := func(t *testing.T, content string, mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), "file")
		must(t, os.WriteFile(path, []byte(content), mode))
		return path
	}
	for name, test := range map[string]struct {
		config func(*testing.T, *Config)
		spec   func(*testing.T, *machine.Spec)
		want   string
	}{
		"no QEMU":               {config: func(t *testing.T, c *Config) { c.QEMU = "/nowhere/qemu" }, want: "/nowhere/qemu"},
		"QEMU is no program":    {config: func(t *testing.T, c *Config) { c.QEMU = file(t, "echo hello", 0o755) }, want: "is no program"},
		"another program":       {config: func(t *testing.T, c *Config) { c.QEMU = "/bin/true" }, want: "lacks its firmware"},
		"QEMU that ends":        {config: func(t *testing.T, c *Config) { c.QEMU = impostor(t) }, want: "QEMU said last: I am no emulator"},
		"no kernel":             {config: func(t *testing.T, c *Config) { c.Kernel = "/nowhere/vmlinuz" }, want: "/nowhere/vmlinuz"},
		"a kernel that is none": {config: func(t *testing.T, c *Config) { c.Kernel = file(t, strings.Repeat("no kernel", 1000), 0o644) }, want: "kernel"},
		"no image":              {spec: func(t *testing.T, s *machine.Spec) { s.Image.Path = "/nowhere" }, want: "/nowhere"},
		"workspace is a link": {spec: func(t *testing.T, s *machine.Spec) {
			must(t, os.Symlink(file(t, "", 0o600), filepath.Join(s.Workspace, site.WorkspaceDisk)))
		}, want: "want a file with one"},
		"workspace has another name": {spec: func(t *testing.T, s *machine.Spec) {
			must(t, os.WriteFile(filepath.Join(s.Workspace, site.WorkspaceDisk), nil, 0o600))
			must(t, os.Link(filepath.Join(s.Workspace, site.WorkspaceDisk), filepath.Join(filepath.Dir(s.Workspace), "second")))
		}, want: "2 names"},
		"long directory": {spec: func(t *testing.T, s *machine.Spec) {
			s.Dir = filepath.Join(s.Dir, strings.Repeat("x", 100))
			must(t, os.Mkdir(s.Dir, 0o700))
		}, want: "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			config := Config{Images: b.images, Proxy: b.guest, Usual: nucleus.Resources{CPU: 1, MemoryMB: 512, DiskMB: 64}}
			if test.config != nil {
				test.config(t, &config)
			}
			spec := h.Spec(t)
			if test.spec != nil {
				test.spec(t, &spec)
			}
			_, d := New(config)
			wantRefusal(t, d, spec, test.want)
		})
	}
}

// wantRefusal tries to make a machine, which must fail with these words and leave nothing.
func wantRefusal(t *testing.T, d *Driver, spec machine.Spec, want string) {
	t.Helper()
	m, err := d.Create(machinetest.Context(t), spec)
	if err == nil {
		m.Destroy(machinetest.Context(t))
		t.Fatal("there is a machine")
	}
	if !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q in it", err, want)
	}
	if len(err.Error()) > 2000 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
	if strings.Contains(err.Error(), "PCI") {
		t.Errorf("what every guest prints is named as a cause: %v", err)
	}
	if found := left(t, spec.Dir); found != nil {
		t.Errorf("left: %v", found)
	}
}

// impostor is a program with QEMU's firmware that is no QEMU; see TestMain.
func impostor(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qemu-system-x86_64")
	data, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	must(t, os.WriteFile(path, data, 0o755))
	help, err := exec.Command("qemu-system-x86_64", "-L", "help").Output()
	must(t, err)
	must(t, os.WriteFile(path+".help", help, 0o644))
	return path
}

// TestCorruptImage: an image that is not what was recorded of it is used for nothing.
func TestCorruptImage(t *testing.T) {
	b := need(t)
	h := host(t)
	spec := h.Spec(t)
	root := filepath.Join(t.TempDir(), "root")
	must(t, os.MkdirAll(filepath.Join(root, "usr"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "usr", "file"), []byte(t.Name()), 0o644))
	spec.Image = nucleus.Image{Kind: nucleus.ImageDirectory, Path: root}
	disk, err := b.images.Root(t.Context(), spec.Image, "/", nil)
	must(t, err)
	must(t, os.Chmod(disk.Path, 0o644))
	f, err := os.OpenFile(disk.Path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("spoilt"), disk.Size/2)
	must(t, errors.Join(err, f.Close()))
	m, err := newDriver(b).Create(machinetest.Context(t), spec)
	if err == nil {
		m.Destroy(machinetest.Context(t))
	}
	if !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("a corrupt image: %v", err)
	}
	if strings.Contains(err.Error(), "PCI") {
		t.Errorf("what every guest prints is named as a cause: %v", err)
	}
	if found := left(t, spec.Dir); found != nil {
		t.Errorf("left: %v", found)
	}
}

// TestCorruptWorkspace: the host does not read the disk; the guest's kernel does, refuses to
// serve, and the error has its words.
func TestCorruptWorkspace(t *testing.T) {
	h := host(t)
	spec := h.Spec(t)
	must(t, os.WriteFile(filepath.Join(spec.Workspace, site.WorkspaceDisk), []byte(strings.Repeat("no file system", 1<<18)), 0o600))
	wantRefusal(t, newDriver(need(t)), spec, "the guest refuses to serve: workspace disk")
}

// TestSilentGuest: a guest that does not answer is given up when the start's time is over.
func TestSilentGuest(t *testing.T) {
	h := host(t)
	spec := h.Spec(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // no kernel boots in that
	defer cancel()
	m, err := h.Driver().Create(ctx, spec)
	if err == nil {
		m.Destroy(machinetest.Context(t))
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want that the time is over", err)
	}
	if strings.Contains(err.Error(), "PCI") {
		t.Errorf("what every guest prints is named as a cause: %v", err)
	}
	if found := left(t, spec.Dir); found != nil {
		t.Errorf("left: %v", found)
	}
}

// TestProbe: where KVM runs a guest its driver passes; else it says why within two seconds.
// The emulated one passes everywhere.
func TestProbe(t *testing.T) {
	b := need(t)
	accelerated, emulated := New(Config{Images: b.images, Proxy: b.guest, Scratch: b.dir, KVM: new(kvm.Host), Patience: time.Minute})
	if accelerated.Tier() != nucleus.TierVM || emulated.Tier() != nucleus.TierEmulated || accelerated.Name() != emulated.Name() {
		t.Errorf("%s of tier %s, %s of tier %s", accelerated.Name(), accelerated.Tier(), emulated.Name(), emulated.Tier())
	}
	began := time.Now()
	err := accelerated.Probe(t.Context())
	var failed *machine.ProbeError
	switch {
	case err == nil:
		t.Log("KVM runs guests here")
	case !errors.As(err, &failed) || failed.Mend == "" || !strings.Contains(err.Error(), "kvm"):
		t.Errorf("without a usable KVM: %v", err)
	case time.Since(began) > 4*time.Second:
		t.Errorf("it took %s to say: %v", time.Since(began), err)
	default:
		t.Logf("no KVM: %v (%s)", err, failed.Mend)
	}
	must(t, emulated.Probe(t.Context()))
	if entries, err := filepath.Glob(filepath.Join(b.dir, "cal-probe-*")); err != nil || len(entries) > 0 {
		t.Errorf("left: %q, %v", entries, err)
	}
}

// TestProbeSaysWhy: each cause has its mend.
func TestProbeSaysWhy(t *testing.T) {
	b := need(t)
	empty, err := image.Open(t.TempDir())
	must(t, err)
	for name, test := range map[string]struct {
		config      Config
		cause, mend string
	}{
		"not installed":  {Config{QEMU: "qemu-that-is-none", Images: b.images}, "not installed", "apt install"},
		"not executable": {Config{QEMU: "/etc/passwd", Images: b.images}, "may not be executed", "chmod"},
		"not QEMU":       {Config{QEMU: "/bin/true", Images: b.images}, "cannot be used", "apt install"},
		"no kernel":      {Config{Images: empty}, "no kernel was fetched", "cal image build kernel"},
	} {
		_, d := New(test.config)
		err := d.Probe(t.Context())
		var failed *machine.ProbeError
		if !errors.As(err, &failed) || !strings.Contains(err.Error(), test.cause) || !strings.Contains(failed.Mend, test.mend) {
			t.Errorf("%s: %v", name, err)
		}
	}
	proc := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(proc, "self"), 0o755))
	must(t, os.WriteFile(filepath.Join(proc, "self/status"), []byte("Seccomp:\t2\n"), 0o644))
	_, d := New(Config{Images: b.images})
	if err := d.diagnose(t.Context(), proc, errors.New("namespaces: fork/exec /proc/self/fd/4: operation not permitted")); !strings.Contains(err.Error(), "seccomp filter") {
		t.Errorf("in a container: %v", err)
	}
	if err := d.diagnose(t.Context(), "/nowhere", errors.New("namespaces: operation not permitted")); !strings.Contains(err.Error(), "namespaces and mounts") {
		t.Errorf("without rights: %v", err)
	}
}

// TestProbeOfTheDead: what a process left that was killed while it probed, the next removes
// before it probes itself.
func TestProbeOfTheDead(t *testing.T) {
	b := need(t)
	scratch, err := os.MkdirTemp(b.dir, "p")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(scratch)) })
	dir := filepath.Join(scratch, "cal-probe-dead", "m") // as site.BeginTrial makes it
	spec := host(t).Spec(t)
	must(t, os.MkdirAll(dir, 0o700))
	spec.Dir = dir
	d := newDriver(b)
	m, err := d.Create(machinetest.Context(t), spec)
	must(t, err)
	m.Release()
	if found := left(t, dir); len(found) == 0 { // control
		t.Fatal("nothing runs for the probe that died")
	}
	trial, err := site.BeginTrial(machinetest.Context(t), scratch, d)
	must(t, err)
	if found := left(t, dir); found != nil {
		t.Errorf("left: %v", found)
	}
	if found, err := os.ReadDir(scratch); err != nil || len(found) != 1 {
		t.Errorf("%v, %v, want the new probe's directory alone", found, err)
	}
	must(t, trial.End(t.Context()))
}

// TestHostDiskFull: where the host's disk has no room for what a guest writes, the guest's write
// fails and the machine goes on.
func TestHostDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small disk")
	}
	h := host(t)
	spec := h.Spec(t)
	small := filepath.Join(filepath.Dir(spec.Dir), "small")
	must(t, os.Mkdir(small, 0o700))
	must(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=24m,mode=700"))
	t.Cleanup(func() { must(t, unix.Unmount(small, unix.MNT_DETACH)) })
	spec.Workspace = filepath.Join(small, "w")
	must(t, os.Mkdir(spec.Workspace, 0o700))
	spec.Resources.DiskMB = 256
	_, guest := h.Create(t, spec)
	tools := machine.ToolsID
	write := func(dir string, mb int) script.Reply {
		return guest.Try(script.Action{Do: "flood", Path: dir + "/f", N: mb, UID: tools})
	}
	if reply := write(nucleus.MachineHome, 60); reply.Err != "" { // control: scratch lies elsewhere
		t.Fatalf("60 MB on a disk that has room: %+v", reply)
	}
	if reply := write(nucleus.MachineWorkspace, 60); reply.Err == "" {
		t.Errorf("60 MB on a disk of 24: %+v", reply)
	}
	guest.Must(script.Action{Do: "echo", UID: -1})
}

// TestEndsWithoutItsWire: a machine whose wire was closed hears all the same that it is to end.
func TestEndsWithoutItsWire(t *testing.T) {
	h := host(t)
	made, guest := h.Create(t, h.Spec(t))
	guest.Must(script.Action{Do: "echo", UID: -1})
	must(t, guest.Close())
	m := made.(*Machine)
	m.askToEnd(t.Context())
	select {
	case <-m.Done():
		if reason := m.Reason(); !strings.Contains(reason, "the guest ended the machine") {
			t.Errorf("it ended: %s", reason)
		}
	default:
		t.Errorf("it was not heard within %s", endPatience)
	}
}
