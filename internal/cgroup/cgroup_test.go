package cgroup

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tree is a pretended mount of version 2.
func tree(t *testing.T, files ...string) string {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte("cpu memory\n"), 0o644))
	for _, name := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o644))
	}
	return dir
}

func TestVersion2(t *testing.T) {
	mount := tree(t, "cal-x/memory.max", "cal-x/memory.swap.max", "cal-x/cpu.max", "cal-x/pids.max", "cal-x/io.max", "cgroup.subtree_control")
	g, err := Make(mount, "cal-x", Limits{CPU: 2, Memory: 512 << 20, Pids: 100, IO: 1000, Disks: []string{"254:0"}})
	if err != nil || g.Name != "cal-x" || !g.Keeps(Pids) || !g.Keeps(IO) {
		t.Fatalf("%+v, %v", g, err)
	}
	for file, want := range map[string]string{
		"cal-x/memory.max": "536870912", "cal-x/memory.swap.max": "0", "cal-x/cpu.max": "200000 100000", "cal-x/pids.max": "100", "cal-x/io.max": "254:0 rbps=1000 wbps=1000",
	} {
		if data, err := os.ReadFile(filepath.Join(mount, file)); err != nil || string(data) != want {
			t.Errorf("%s: %q, %v", file, data, err)
		}
	}
	if data, err := os.ReadFile(filepath.Join(mount, "cgroup.subtree_control")); err != nil || !strings.Contains(string(data), "+") {
		t.Errorf("no controller was handed down: %q, %v", data, err)
	}
}

// TestWithoutControllers: a directory can be made, but limits nothing.
func TestWithoutControllers(t *testing.T) {
	mount := tree(t)
	if g, err := Make(mount, "cal-x", Limits{Memory: 1 << 30}); err != nil || g.Name != "" {
		t.Errorf("%+v, %v", g, err)
	}
	if _, err := os.Lstat(filepath.Join(mount, "cal-x")); !os.IsNotExist(err) {
		t.Errorf("the group is left: %v", err)
	}
}

// TestWithoutPids: what some hosts lack is not said to be kept.
func TestWithoutPids(t *testing.T) {
	mount := tree(t, "cal-x/memory.max", "cal-x/cpu.max")
	g, err := Make(mount, "cal-x", Limits{Memory: 1 << 30, Pids: 10, IO: 10, Disks: []string{"1:0"}})
	if err != nil || g.Name != "cal-x" || g.Kept != nil {
		t.Errorf("%+v, %v", g, err)
	}
}

// TestReadBack: what the kernel does not confirm is not called enforced.
func TestReadBack(t *testing.T) {
	if err := (Group{Name: "cal-none"}).Check(Mount, os.Getpid(), Limits{Memory: 1 << 30}); err == nil {
		t.Error("this process is said to be in a group that does not exist")
	}
	const table = "4:cpu,cpuacct:/cal-a\n3:memory:/cal-a/b\n0::/cal-c\n"
	for _, c := range []struct {
		controller, name string
		want             bool
	}{{"cpu", "cal-a", true}, {"cpuacct", "cal-a", true}, {"memory", "cal-a", false}, {"", "cal-c", true}, {"", "cal-a", false}, {"cpu", "cal", false}} {
		if got := isIn(table, c.controller, c.name); got != c.want {
			t.Errorf("%q in %q: %v", c.controller, c.name, got)
		}
	}
}

// TestVersion: what lacks a controller limits nothing.
func TestVersion(t *testing.T) {
	plant := func(files ...string) string {
		dir := t.TempDir()
		for _, name := range files {
			name, content, _ := strings.Cut(name, "=")
			must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
			must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
		}
		return dir
	}
	for name, c := range map[string]struct {
		mount string
		want  int
	}{
		"nothing":             {plant(), 0},
		"version 2":           {plant("cgroup.controllers=cpuset cpu io memory pids\n"), 2},
		"version 2, no cpu":   {plant("cgroup.controllers=memory pids\n"), 0},
		"version 1":           {plant("memory/cgroup.procs", "cpu/cgroup.procs", "pids/cgroup.procs"), 1},
		"version 1, no pids":  {plant("memory/cgroup.procs", "cpu/cgroup.procs"), 0},
		"a hybrid without v1": {plant("unified/cgroup.controllers="), 0},
	} {
		if got := Version(c.mount); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestSettings are what another program writes; the order counts: no sum of memory and swap
// may be below that of memory.
func TestSettings(t *testing.T) {
	want := Limits{Memory: 64 << 20, CPU: 2, Pids: 30}
	for _, c := range []struct {
		version int
		swap    bool
		want    string
	}{
		{2, true, "memory.max=67108864 memory.swap.max=0 cpu.weight=200 cpu.max=200000 100000 pids.max=30"},
		{2, false, "memory.max=67108864 cpu.weight=200 cpu.max=200000 100000 pids.max=30"},
		{1, true, "memory.limit_in_bytes=67108864 memory.memsw.limit_in_bytes=67108864 cpu.shares=2048 cpu.cfs_quota_us=200000 pids.max=30"},
		{1, false, "memory.limit_in_bytes=67108864 cpu.shares=2048 cpu.cfs_quota_us=200000 pids.max=30"},
	} {
		if got := strings.Join(Settings(c.version, want, c.swap), " "); got != c.want {
			t.Errorf("version %d, swap %v: %s, want %s", c.version, c.swap, got, c.want)
		}
	}
}

// TestCanForbidSwap: only the kernel's file says it.
func TestCanForbidSwap(t *testing.T) {
	if CanForbidSwap(tree(t), "cal-all") {
		t.Error("without the file")
	}
	mount := tree(t, "cal-all/memory.swap.max")
	if !CanForbidSwap(mount, "cal-all") { // control
		t.Error("with the file")
	}
	if CanForbidSwap(mount, "cal-other") {
		t.Error("the file of another group is taken for one below")
	}
}

func TestDisk(t *testing.T) {
	for _, path := range []string{"/proc", "/nowhere"} {
		if got := Disk(path); got != "" {
			t.Errorf("%s lies on disk %q", path, got)
		}
	}
	disk := Disk(t.TempDir())
	if disk == "" {
		t.Skip("temporary files lie on no disk of their own here")
	}
	if _, err := os.Stat("/sys/dev/block/" + disk + "/queue"); err != nil {
		t.Errorf("disk %q: %v", disk, err)
	}
}

func name() string { return "cal-test-" + strings.ToLower(rand.Text()) }

// make1 makes a group of the host's, or skips.
func make1(t *testing.T, want Limits) Group {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes cgroups")
	}
	g, err := Make(Mount, name(), want)
	must(t, err)
	if g.Name == "" {
		t.Skip("memory and processors cannot be limited here")
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		must(t, Remove(ctx, Mount, g.Name))
		if left, _ := filepath.Glob(filepath.Join(Mount, "*", g.Name)); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
	return g
}

// in runs a shell in the group; it reads its script only when it is there.
func in(t *testing.T, g Group, script string) (string, error) {
	t.Helper()
	cmd := exec.Command("sh", "-s")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	must(t, g.Join(Mount, cmd.Process.Pid))
	_, err = stdin.Write([]byte(script))
	must(t, errors.Join(err, stdin.Close()))
	err = cmd.Wait()
	return said.String(), err
}

// TestEnforced tries each limit from the inside, beside the same without the limit.
func TestEnforced(t *testing.T) {
	const fork = "i=0; p=; while [ $i -lt 30 ]; do sleep 1 & p=\"$p $!\"; i=$((i+1)); done; echo $i; kill $p"
	const fill = "x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo ${#x}"
	tight := make1(t, Limits{Memory: 40 << 20, CPU: 1, Pids: 12})
	wide := make1(t, Limits{Memory: 1 << 30, CPU: 1, Pids: 200})
	if said, err := in(t, tight, fill); err == nil && strings.Contains(said, "60000000") {
		t.Errorf("60 MB where 40 may be: %q", said)
	}
	if !tight.OutOfMemory(Mount) {
		t.Error("the kernel says of no process that it was killed for memory")
	}
	if said, err := in(t, wide, fill); err != nil || !strings.Contains(said, "60000000") { // control
		t.Errorf("60 MB where 1024 may be: %q, %v", said, err)
	}
	if wide.OutOfMemory(Mount) {
		t.Error("out of memory in a group that has enough")
	}
	if tight.Keeps(Pids) {
		if said, _ := in(t, tight, fork); !strings.Contains(said, "fork") {
			t.Errorf("30 processes where 12 may be: %q", said)
		}
	}
	if said, err := in(t, wide, fork); err != nil || !strings.Contains(said, "30") { // control
		t.Errorf("30 processes where 200 may be: %q, %v", said, err)
	}
}

// TestCheck: a process that is in the group is confirmed, with its limits and no others.
func TestCheck(t *testing.T) {
	limits := Limits{Memory: 64 << 20, CPU: 1, Pids: 30, IO: 10 << 20}
	if disk := Disk(t.TempDir()); disk != "" {
		limits.Disks = []string{disk}
	}
	g := make1(t, limits)
	t.Logf("kept beside memory and processors: %q", g.Kept)
	cmd := exec.Command("sleep", "60")
	must(t, cmd.Start())
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	if g.Check(Mount, cmd.Process.Pid, limits) == nil {
		t.Error("a process that was not put in is said to be in")
	}
	must(t, g.Join(Mount, cmd.Process.Pid))
	must(t, g.Check(Mount, cmd.Process.Pid, limits))
	if pids, err := Members(Mount, g.Name); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Errorf("members %v, %v, want %d", pids, err, cmd.Process.Pid)
	}
	if pids, err := Members(Mount, g.Name+"-none"); err != nil || pids != nil {
		t.Errorf("of a group that is not there: %v, %v", pids, err)
	}
	for what, other := range map[string]Limits{"memory": {Memory: 65 << 20}, "processors": {CPU: 2}} {
		if g.Check(Mount, cmd.Process.Pid, other) == nil {
			t.Errorf("a limit of %s that is another is confirmed", what)
		}
	}
	k := kindAt(Mount)
	swap := k.file(Mount, k.memory, g.Name, k.swap)
	if _, err := os.Stat(swap); err != nil {
		t.Logf("this kernel limits no swap: %v", err)
		return
	}
	must(t, set(swap, strconv.Itoa(1<<30)))
	if g.Check(Mount, cmd.Process.Pid, limits) == nil {
		t.Error("a gigabyte of swap is confirmed as none")
	}
}

// TestVersion2Real takes a tree of the kernel's own. Where version 1 holds the
// controllers, as a hybrid host has it, nothing may be promised and nothing be left.
func TestVersion2Real(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root mounts a cgroup tree")
	}
	mount, ended := t.TempDir(), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for ever: the thread's mount namespace dies with it
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
			t.Errorf("mount namespace: %v", err)
			return
		}
		if err := unix.Mount("cgroup2", mount, "cgroup2", 0, ""); err != nil {
			t.Logf("no cgroup2 on this host: %v", err)
			return
		}
		const memory = 300 << 20
		made, failed := Make(mount, name(), Limits{Memory: memory, CPU: 1, Pids: 10})
		controllers, err := os.ReadFile(filepath.Join(mount, "cgroup.subtree_control"))
		has := strings.Fields(string(controllers))
		able := slices.Contains(has, "memory") && slices.Contains(has, "cpu")
		t.Logf("the tree's root hands down %q; made %+v", has, made)
		if err != nil || failed != nil || able != (made.Name != "") {
			t.Errorf("controllers %q, %v: made %+v, %v", controllers, err, made, failed)
		}
		if able {
			data, err := os.ReadFile(filepath.Join(mount, made.Name, "memory.max"))
			if err != nil || strings.TrimSpace(string(data)) != strconv.Itoa(memory) {
				t.Errorf("memory.max: %q, %v", data, err)
			}
		}
		if err := Remove(context.Background(), mount, made.Name); err != nil {
			t.Error(err)
		}
		if left, err := filepath.Glob(filepath.Join(mount, "cal-test-*")); err != nil || len(left) > 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	}()
	<-ended
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
