package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/image"
	"cal/internal/durable"
	"cal/internal/kvm"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/machine/microvm"
	"cal/machine/site"
	"cal/nucleus"
)

// faked is a driver over the fake programs, as a process that was just started has it.
func faked(t testing.TB, spoil ...func(*Config)) *Driver {
	t.Helper()
	firecracker, jailer := fakePrograms(t)
	dir := jailDir(t)
	kernel := filepath.Join(dir, "vmlinux")
	must(t, os.WriteFile(kernel, fakeKernel(), 0o600))
	host := filepath.Join(dir, "host")
	for name, data := range map[string]string{"usr/bin/sh": "#!", "etc/passwd": "root:x:0:0::/:/bin/sh\n", "etc/group": "root:x:0:\n"} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(host, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(host, name), []byte(data), 0o644))
	}
	images, err := image.Open(filepath.Join(dir, "images"))
	must(t, err)
	config := Config{Firecracker: firecracker, Jailer: jailer, Images: images, Kernel: kernel, Host: host, KVM: new(kvm.Host)}
	for _, spoil := range spoil {
		spoil(&config)
	}
	d := New(config)
	d.proved, err = fileDigest(firecracker)
	must(t, err)
	return d
}

// again is the driver as another process would have it.
func (d *Driver) again() *Driver {
	fresh := New(d.config)
	fresh.proved, fresh.usual = d.proved, d.usual
	return fresh
}

// fakeHost is a host for the suite over the fake programs.
func fakeHost(t testing.TB, d *Driver) machinetest.Host {
	t.Helper()
	dir := jailDir(t)
	proxy := filepath.Join(dir, "proxy")
	must(t, os.WriteFile(proxy, []byte("#!"), 0o755))
	return machinetest.Host{Driver: func() machine.Driver { return reporting{d.again()} }, Proxy: proxy, Scratch: dir, Disk: true, Kill: killVMM, Left: left}
}

// TestSuiteOverFake: what the suite asks of a driver's life, with Firecracker and its
// guest replaced.
func TestSuiteOverFake(t *testing.T) {
	d := faked(t)
	machinetest.Try(t, fakeHost(t, d), "refused", "limits are stated", "new wire", "adopt", "remove", "workspace of another kind")
}

// TestRemoveAtAnyMoment tries it over the fake programs.
func TestRemoveAtAnyMoment(t *testing.T) {
	d := faked(t)
	removeAtAnyMoment(t, d, fakeHost(t, d))
}

// removeAtAnyMoment: the node dies after each step of a start; another process finds
// all that was made by the record and removes it.
func removeAtAnyMoment(t *testing.T, d *Driver, host machinetest.Host) {
	var ctx context.Context
	var spec machine.Spec
	var rec record
	var made microvm.Parts
	var v *vmm
	steps := []struct {
		name string
		do   func() error
	}{
		{"nothing", func() error { return nil }},
		{"a record that was being written", func() error { return os.WriteFile(filepath.Join(spec.Dir, ".tmp-1"), nil, 0o600) }},
		{"the record", func() (err error) { rec, err = d.begin(spec); return err }},
		{"the jail", func() error { return rec.Jail.make() }},
		{"a template's jail", func() error { return rec.Template.make() }},
		{"the parts", func() (err error) {
			made, err = d.assemble(ctx, spec, rec)
			rec.Jail.FileSize = int64(made.Longest())
			return errors.Join(err, rec.save())
		}},
		{"Firecracker", func() (err error) { v, err = d.launch(ctx, rec.Jail, d.proved); return err }},
		{"a template's Firecracker", func() error {
			template, err := d.launch(ctx, rec.Template, d.proved)
			if err == nil {
				template.letGo()
			}
			return err
		}},
		{"a guest that runs", func() error { return v.bootUp(ctx, made, rec) }},
		{"a guest that is greeted", func() error {
			conn, err := v.greet(ctx)
			if err == nil {
				conn.Close()
			}
			return err
		}},
		{"a dead Firecracker", func() error { killVMM(t, spec.Dir); return nil }},
	}
	for last := range steps {
		t.Run("after "+steps[last].name, func(t *testing.T) {
			ctx, spec, v = machinetest.Context(t), host.Spec(t), nil
			t.Cleanup(func() { must(t, d.again().Remove(context.Background(), spec.Dir)) })
			for _, step := range steps[:last+1] {
				if err := step.do(); err != nil {
					t.Fatalf("%s: %v", step.name, err)
				}
			}
			noteInstances(spec.Dir)
			if v != nil {
				v.letGo() // as a process that died
			}
			for range 2 {
				must(t, d.again().Remove(ctx, spec.Dir))
			}
			if found := left(t, spec.Dir); len(found) > 0 {
				t.Errorf("left: %v", found)
			}
			if steps[last].name != steps[1].name {
				if entries, err := os.ReadDir(spec.Dir); err == nil {
					t.Errorf("the directory is left, with %v", entries)
				}
			}
		})
	}
}

// TestKilledJailer tries it over the fake programs.
func TestKilledJailer(t *testing.T) {
	d := faked(t)
	killedJailer(t, d, fakeHost(t, d))
}

// killedJailer: the jailer is killed at some moment of its work, and what it and its
// children made is found and removed.
func killedJailer(t *testing.T, d *Driver, host machinetest.Host) {
	stopped := 0
	for after := time.Duration(0); after < emulated(80*time.Millisecond, 400*time.Millisecond); after += emulated(4*time.Millisecond, 40*time.Millisecond) {
		spec := host.Spec(t)
		rec, err := d.begin(spec)
		must(t, err)
		noteInstances(spec.Dir)
		must(t, rec.Jail.make())
		ctx, cancel := context.WithTimeout(machinetest.Context(t), after)
		if rec.Jail.run(ctx, d.config.Jailer, d.config.Firecracker) != nil {
			stopped++
		}
		cancel()
		must(t, d.again().Remove(machinetest.Context(t), spec.Dir))
		if found := left(t, spec.Dir); len(found) > 0 {
			t.Errorf("killed after %v: left: %v", after, found)
		}
	}
	if stopped < 2 {
		t.Errorf("%d jailers were killed at work, want more", stopped)
	}
}

// TestWorkspace: a workspace is one machine's at a time, and of one kind for good.
func TestWorkspace(t *testing.T) {
	d := faked(t)
	host := fakeHost(t, d)
	ctx := machinetest.Context(t)
	spec := host.Spec(t)
	m, err := d.Create(ctx, spec)
	must(t, err)
	second := host.Spec(t)
	second.Workspace = spec.Workspace
	if other, err := d.Create(ctx, second); !errors.Is(err, machine.ErrRefused) || !strings.Contains(err.Error(), "another machine") {
		t.Errorf("a second machine with the workspace of one that runs: %v, %v", other, err)
	}
	must(t, m.Destroy(ctx))
	m, err = d.Create(ctx, second) // and then it can be had
	must(t, err)
	must(t, m.Destroy(ctx))

	for name, spoil := range map[string]func(dir string) error{
		"files of the host": func(dir string) error { return os.WriteFile(filepath.Join(dir, "main.go"), nil, 0o644) },
		"a link":            func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, site.WorkspaceDisk)) },
		"a directory":       func(dir string) error { return os.Mkdir(filepath.Join(dir, site.WorkspaceDisk), 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			spec := host.Spec(t)
			must(t, spoil(spec.Workspace))
			if m, err := d.Create(ctx, spec); !errors.Is(err, machine.ErrRefused) {
				t.Errorf("%v, %v", m, err)
			}
			if found := left(t, spec.Dir); len(found) > 0 {
				t.Errorf("left: %v", found)
			}
		})
	}
}

// TestSnapshotOverFake: the second machine of a shape starts from what the first made,
// another shape does not, and what was changed is thrown away.
func TestSnapshotOverFake(t *testing.T) {
	d := faked(t, func(c *Config) { c.Snapshots = filepath.Join(jailDir(t), "snapshots") })
	host := fakeHost(t, d)
	count := func() int {
		found, err := filepath.Glob(filepath.Join(d.config.Snapshots, "*", manifestFile))
		must(t, err)
		return len(found)
	}
	given := map[string]bool{} // entropy
	create := func(change ...func(*machine.Spec)) {
		t.Helper()
		spec := host.Spec(t)
		for _, change := range change {
			change(&spec)
		}
		m, err := reporting{d}.Create(machinetest.Context(t), spec)
		must(t, err)
		guest := machinetest.Talk(t, m.Wire())
		if entropy := guest.Must(script.Action{Do: "entropy", UID: -1}); len(entropy) != 128 || given[entropy] {
			t.Errorf("a machine that was restored got the entropy %q, as another", entropy)
		} else {
			given[entropy] = true
		}
		must(t, m.Destroy(machinetest.Context(t)))
		if found := left(t, spec.Dir); len(found) > 0 {
			t.Errorf("left: %v", found)
		}
	}
	create()
	create()
	checkSnapshots(t, d.config.Snapshots, 1)
	create(func(s *machine.Spec) { s.Resources.CPU = 1 })
	create(func(s *machine.Spec) { s.Resources.MemoryMB = 300 })
	create(func(s *machine.Spec) { s.Resources.DiskMB = 100 })
	create(func(s *machine.Spec) {
		s.Agent = []nucleus.Layer{{Name: "a", Host: s.Workspace + "-agent", Guest: nucleus.MachineAgent + "/a"}}
		must(t, os.Mkdir(s.Workspace+"-agent", 0o755))
	})
	if got := count(); got != mostSnapshots {
		t.Errorf("%d snapshots are kept, want %d", got, mostSnapshots)
	}
	checkSnapshots(t, d.config.Snapshots, mostSnapshots)

	for name, c := range map[string]struct {
		file  string
		spoil func(file string) error
	}{
		"content": {stateFile, func(file string) error { return os.WriteFile(file, []byte("another"), 0o600) }},
		"memory":  {memoryFile, func(file string) error { return os.WriteFile(file, []byte("MEMORY"), 0o600) }},
		"mode":    {memoryFile, func(file string) error { return os.Chmod(file, 0o644) }},
		"owner":   {memoryFile, func(file string) error { return os.Chown(file, 1, 1) }},
		"a name":  {memoryFile, func(file string) error { return os.Link(file, file+"-2") }},
		"loss":    {stateFile, os.Remove},
	} {
		t.Run(name, func(t *testing.T) {
			create() // makes it where it is missing
			found, err := filepath.Glob(filepath.Join(d.config.Snapshots, "*", c.file))
			must(t, err)
			for _, name := range found {
				must(t, c.spoil(name))
			}
			before := count()
			create() // it boots
			if got := count(); got != before-1 {
				t.Errorf("%d snapshots are kept, want %d: the changed one is thrown away", got, before-1)
			}
		})
	}
}

// TestProbeRefuses: each thing that is missing is said, with what to do.
func TestProbeRefuses(t *testing.T) {
	dir := jailDir(t)
	program := func(name, says string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+says+"\n"), 0o755))
		return path
	}
	good, jailer := program("firecracker", "echo Firecracker v"+Version), program("jailer", "echo Jailer v"+Version)
	for name, c := range map[string]struct {
		config Config
		want   string
	}{
		"no firecracker":    {Config{Jailer: jailer}, "no firecracker on PATH"},
		"no jailer":         {Config{Firecracker: good}, "no jailer on PATH"},
		"nothing there":     {Config{Firecracker: dir + "/none", Jailer: jailer}, "no firecracker at"},
		"an older one":      {Config{Firecracker: program("old", "echo Firecracker v1.10.0"), Jailer: jailer}, "takes no other"},
		"a newer jailer":    {Config{Firecracker: good, Jailer: program("new", "echo Jailer v2.0.0")}, "takes no other"},
		"another program":   {Config{Firecracker: jailer, Jailer: jailer}, "takes no other"},
		"one that fails":    {Config{Firecracker: program("bad", "exit 3"), Jailer: jailer}, "--version failed"},
		"one that hangs":    {Config{Firecracker: program("slow", "exec sleep 60"), Jailer: jailer, Patience: 200 * time.Millisecond}, "--version failed"},
		"no control groups": {Config{Firecracker: good, Jailer: jailer, Cgroups: dir}, "no cgroups"},
	} {
		t.Run(name, func(t *testing.T) {
			c.config.KVM = new(kvm.Host)
			err := New(c.config).Probe(t.Context())
			want := c.want
			if os.Geteuid() != 0 {
				want = "started as root"
			}
			var failed *machine.ProbeError
			if !errors.As(err, &failed) || !strings.Contains(err.Error(), want) || failed.Mend == "" {
				t.Errorf("got %v, want %q with a mend", err, want)
			}
		})
	}
}

// TestUnprovedFilter: a Firecracker whose filter allows all looks well in /proc, and is
// refused by each way to start a machine.
func TestUnprovedFilter(t *testing.T) {
	d := faked(t)
	host := fakeHost(t, d)
	d.proved = ""
	spec := host.Spec(t)
	m, err := d.Create(machinetest.Context(t), spec)
	if m != nil || !errors.Is(err, errAllowed) {
		t.Errorf("got %v, %v, want %v", m, err, errAllowed)
	}
	if found := left(t, spec.Dir); len(found) > 0 {
		t.Errorf("left: %v", found)
	}
	if d.proved != "" {
		t.Error("taken for proved")
	}
}

// TestReplacedProgram: what was proved of a program is not said of another in its place.
func TestReplacedProgram(t *testing.T) {
	d := faked(t)
	proved := d.proved
	for range 2 {
		if digest, err := d.prove(machinetest.Context(t)); err != nil || digest != proved { // control
			t.Fatalf("%s, %v, want %s", digest, err, proved)
		}
	}
	must(t, copyFile(d.config.Firecracker, d.config.Firecracker+".new"))
	file, err := os.OpenFile(d.config.Firecracker+".new", os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = file.WriteString("another")
	must(t, errors.Join(err, file.Close(), os.Chmod(file.Name(), 0o755), os.Rename(file.Name(), d.config.Firecracker)))
	if digest, err := d.prove(machinetest.Context(t)); !errors.Is(err, errAllowed) {
		t.Errorf("%s, %v, want %v: it allows everything", digest, err, errAllowed)
	}
}

// TestDiesAtOnce: a Firecracker that ends before it listens is not waited for.
func TestDiesAtOnce(t *testing.T) {
	d := faked(t)
	dead := filepath.Join(filepath.Dir(d.config.Firecracker), "dead") // under this name the fake is none
	must(t, os.Rename(d.config.Firecracker, dead))
	d.config.Firecracker = dead
	started := time.Now()
	m, err := d.Create(machinetest.Context(t), fakeHost(t, d).Spec(t))
	if m != nil || !errors.Is(err, machine.ErrGone) || !strings.Contains(err.Error(), "before it listened") {
		t.Errorf("%v, %v", m, err)
	}
	if took := time.Since(started); took > 20*time.Second {
		t.Errorf("it was waited for %v", took)
	}
}

// TestAnotherProgram: what runs in the jail must be what was proved.
func TestAnotherProgram(t *testing.T) {
	d := faked(t)
	host := fakeHost(t, d)
	ctx := machinetest.Context(t)
	rec, err := d.begin(host.Spec(t))
	must(t, err)
	t.Cleanup(func() { must(t, d.clear(context.Background(), rec.Jail.Dir)) })
	must(t, rec.Jail.make())
	v, err := d.launch(ctx, rec.Jail, strings.Repeat("0", 64))
	if v != nil || err == nil || !strings.Contains(err.Error(), "digest") {
		t.Errorf("got %v, %v", v, err)
	}
}

// TestConfined: a Firecracker that lacks one of its walls starts no guest.
func TestConfined(t *testing.T) {
	d := faked(t)
	host := fakeHost(t, d)
	ctx := machinetest.Context(t)
	rec, err := d.begin(host.Spec(t))
	must(t, err)
	t.Cleanup(func() { must(t, d.clear(context.Background(), rec.Jail.Dir)) })
	must(t, rec.Jail.make())
	v, err := d.launch(ctx, rec.Jail, d.proved)
	must(t, err)
	defer v.letGo()
	must(t, d.confined(v, d.proved)) // control
	if _, err := os.Lstat(rec.Jail.path("dev/net/tun")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the jail has the device of which network interfaces are made: %v", err)
	}
	for name, spoil := range map[string]func(v *vmm, digest *string){
		"another program":     func(_ *vmm, digest *string) { *digest = strings.Repeat("0", 64) },
		"another user":        func(v *vmm, _ *string) { v.jail.UID++ },
		"more memory":         func(v *vmm, _ *string) { v.jail.Limits.Memory *= 2 },
		"more processors":     func(v *vmm, _ *string) { v.jail.Limits.CPUs++ },
		"more tasks":          func(v *vmm, _ *string) { v.jail.Limits.Tasks++ },
		"another group":       func(v *vmm, _ *string) { v.jail.ID = newInstance() },
		"the host's own user": func(v *vmm, _ *string) { v.process.PID = os.Getpid() },
	} {
		spoiled, digest := vmm{jail: v.jail, cgroups: v.cgroups, process: v.process}, d.proved
		spoil(&spoiled, &digest)
		if err := d.confined(&spoiled, digest); err == nil {
			t.Errorf("%s: not seen", name)
		}
	}
	if err := ownNamespaces(os.Getpid()); err == nil {
		t.Error("the host's namespaces are taken for a jail's")
	}
}

// TestMembers: what is in a machine's group and has no arguments that tell whose it is,
// as a process between fork and exec, ends with the machine.
func TestMembers(t *testing.T) {
	d := faked(t)
	rec, err := d.begin(fakeHost(t, d).Spec(t))
	must(t, err)
	cmd := exec.Command("sh", "-c", "echo in; read x; while :; do read x || sleep 1; done")
	output, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	for _, setting := range rec.Jail.Limits.settings() {
		file, _, _ := strings.Cut(setting, "=")
		controller, _, _ := strings.Cut(file, ".")
		dir := filepath.Join("/sys/fs/cgroup", controller, rec.Jail.group().Name)
		if rec.Jail.Limits.Version == 2 {
			dir = filepath.Join("/sys/fs/cgroup", rec.Jail.group().Name)
		}
		must(t, os.MkdirAll(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(cmd.Process.Pid)), 0))
	}
	_, err = output.Read(make([]byte, 1))
	must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	must(t, d.again().Remove(machinetest.Context(t), rec.Jail.Dir))
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("it runs on")
		must(t, cmd.Process.Kill())
	}
}

// TestForeignRecord: a machine of another driver is not touched.
func TestForeignRecord(t *testing.T) {
	dir := t.TempDir()
	must(t, durable.Store(filepath.Join(dir, site.RecordFile), map[string]any{"driver": "gvisor", "a field of its own": 1}))
	d := New(Config{})
	for name, try := range map[string]func() error{
		"adopt":  func() error { _, err := d.Adopt(context.Background(), dir); return err },
		"remove": func() error { return d.Remove(context.Background(), dir) },
	} {
		if err := try(); !errors.Is(err, machine.ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, site.RecordFile)); err != nil {
		t.Error(err)
	}
}

// TestReasons: what is said of a Firecracker that ended.
func TestReasons(t *testing.T) {
	for log, want := range map[string]string{
		"": "the machine ended",
		"x [m:fc_vcpu 0:ERROR] Received KVM_EXIT_INTERNAL_ERROR signal\ny [m:main:INFO] Vmm is stopping.\n": "firecracker ended: x [m:fc_vcpu 0:ERROR] Received KVM_EXIT_INTERNAL_ERROR signal",
		"x [m:main:ERROR] Shutting down VM after intercepting a bad syscall (59).\n":                        "firecracker ended: x [m:main:ERROR] Shutting down VM after intercepting a bad syscall (59).",
	} {
		v := &vmm{cgroups: t.TempDir()}
		v.log.Record(strings.NewReader(log))
		if got := v.died(); got != want {
			t.Errorf("%q: %q, want %q", log, got, want)
		}
	}
}
