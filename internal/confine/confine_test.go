package confine

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/cgroup"
	"cal/internal/idmap"
	"cal/internal/process"
	"cal/internal/testenv/subids"
)

// A copy of this test program is what is confined: with tryName as its first
// argument it tries to leave, and prints what came of it.
const tryName = "try-to-leave"

// The tests run again as an ordinary user, and as one with subordinate ids.
const (
	asOrdinary = "CAL_TEST_ORDINARY"
	withSubIDs = "CAL_TEST_SUBIDS"
	ordinaryID = 64322
)

func TestMain(m *testing.M) {
	Main()
	if len(os.Args) > 2 && os.Args[1] == tryName {
		tryToLeave(os.Args[2])
		os.Exit(0)
	}
	code := m.Run()
	if plainDir != "" {
		os.RemoveAll(plainDir)
	}
	os.Exit(code)
}

// attempts are what a program does that wants out, each with what it needs beside. Outside,
// started plainly, each must succeed.
func attempts(outside string) map[string]func() error {
	return map[string]func() error{
		"read a file of the host": func() error { _, err := os.ReadFile(filepath.Join(outside, "secret")); return err },
		"see the host's root":     func() error { _, err := os.Stat("/etc/passwd"); return err },
		"see processes":           func() error { _, err := os.ReadDir("/proc/1"); return err },
		"write what it is shown":  func() error { return tryWrite(filepath.Join(outside, "shown")) },
		"write its root":          func() error { return tryWrite(filepath.Join(outside, "new-file")) },
		"make a socket":           func() error { return closed(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)) },
		"reach the host's TCP":    func() error { return dial("tcp", outside) },
		"reach a host's socket":   func() error { return dial("unix", outside) },
		"signal its starter":      func() error { return unix.Kill(parent(outside), 0) },
		"run a program":           func() error { return exec.Command("/bin/true").Run() },
		"make a user namespace":   func() error { return namespaced(unix.CLONE_NEWUSER) },
		"trace":                   func() error { return trace() },
		"use io_uring":            func() error { return uring() },
		"raise a limit":           func() error { return raise() },
		"have memory as a file":   func() error { return closed(unix.MemfdCreate("hidden", 0)) },
		"have shared memory":      func() error { return sharedMemory() },
	}
}

func tryWrite(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

func closed(fd int, err error) error {
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func dial(network, outside string) error {
	address := filepath.Join(outside, "socket")
	if network == "tcp" {
		raw, err := os.ReadFile(filepath.Join(outside, "port"))
		if err != nil {
			raw = []byte("127.0.0.1:1")
		}
		address = string(raw)
	}
	conn, err := net.DialTimeout(network, address, 2*time.Second)
	if err == nil {
		conn.Close()
	}
	return err
}

func parent(outside string) int {
	n, _ := strconv.Atoi(filepath.Base(outside))
	return n
}

func namespaced(flag uintptr) error {
	cmd := exec.Command(os.Args[0], "-test.run=NOTHING")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flag}
	return cmd.Run()
}

func trace() error {
	cmd := exec.Command(os.Args[0], "-test.run=NOTHING")
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Wait()
	err := unix.PtraceSeize(cmd.Process.Pid)
	cmd.Process.Kill()
	return err
}

func uring() error {
	var params [120]byte
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(ptr(&params)), 0)
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}

// sharedMemory makes a segment, which ends with the process's last use of it.
func sharedMemory() error {
	id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, unix.IPC_CREAT|0o600)
	if err != nil {
		return err
	}
	_, err = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	return err
}

func raise() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Max > mostOpen {
		return nil
	}
	limit.Max++
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

// came is what came of the attempts and what the program sees of itself.
type came struct {
	Failed map[string]string `json:"failed"` // by attempt; those that are missing succeeded
	Root   []string          `json:"root"`
	Open   []string          `json:"open"` // descriptors from 3 on: what can be read from each
	UID    int               `json:"uid"`
	Host   string            `json:"host"`
	Net    []string          `json:"net"`
	Env    []string          `json:"env"`
}

func tryToLeave(outside string) {
	result := came{Failed: map[string]string{}, UID: os.Getuid(), Env: os.Environ()}
	for fd := 3; fd < 64; fd++ {
		var stat unix.Stat_t
		if unix.Fstat(fd, &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFREG {
			text := make([]byte, 100)
			n, _ := unix.Pread(fd, text, 0)
			result.Open = append(result.Open, fmt.Sprintf("%d %s", fd, text[:max(n, 0)]))
		}
	}
	entries, _ := os.ReadDir("/")
	for _, entry := range entries {
		result.Root = append(result.Root, entry.Name())
	}
	result.Host, _ = os.Hostname()
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		result.Net = append(result.Net, i.Name)
	}
	for name, try := range attempts(outside) {
		if err := try(); err != nil {
			result.Failed[name] = err.Error()
		}
	}
	json.NewEncoder(os.Stdout).Encode(result)
	os.Stdout.Sync()
	for { // the test looks from the outside, and kills
		time.Sleep(time.Hour)
	}
}

// ground is a directory with a secret and doors, which the attempts look for.
func ground(t *testing.T) string {
	t.Helper()
	base, err := os.MkdirTemp("", "conf")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := filepath.Join(base, strconv.Itoa(os.Getpid()))
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Chmod(base, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("s"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "shown"), nil, 0o666))
	must(t, os.Chmod(filepath.Join(dir, "shown"), 0o666))
	for network, address := range map[string]string{"unix": filepath.Join(dir, "socket"), "tcp": "127.0.0.1:0"} {
		listener, err := net.Listen(network, address)
		must(t, err)
		t.Cleanup(func() { listener.Close() })
		if network == "tcp" {
			must(t, os.WriteFile(filepath.Join(dir, "port"), []byte(listener.Addr().String()), 0o644))
		} else {
			must(t, os.Chmod(address, 0o777))
		}
	}
	return dir
}

// program is a copy of this test that everybody can read.
func program(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "program")
	self := "/proc/self/exe"
	if raceDetector {
		plain, err := builtPlain()
		must(t, err)
		self = plain
	}
	data, err := os.ReadFile(self)
	must(t, err)
	must(t, os.WriteFile(path, data, 0o755))
	return path
}

// builtPlain is this test without the race detector, which needs more memory, and more of
// /proc, than what is confined is given.
var builtPlain = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "confine")
	if err != nil {
		return "", err
	}
	plainDir = dir
	path := filepath.Join(dir, "plain")
	build := exec.Command("go", "test", "-c", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if output, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building this test anew: %w: %s", err, output)
	}
	return path, nil
})

var plainDir string // to be removed in the end

// child is what the tests confine.
func child(t *testing.T, outside string) (c Child, said *os.File) {
	t.Helper()
	path := program(t, outside)
	files, err := Libraries(t.Context(), path)
	must(t, err)
	shown := filepath.Join(outside, "shown")
	files = append(files, File{shown, shown})
	must(t, os.WriteFile(filepath.Join(outside, "given"), []byte("handed over"), 0o600))
	given, err := os.Open(filepath.Join(outside, "given"))
	must(t, err)
	t.Cleanup(func() { given.Close() })
	said, out, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { said.Close(); out.Close() })
	tag := "tag-of-" + filepath.Base(filepath.Dir(outside))
	c = Child{
		Plan: Plan{Program: path, Args: []string{path, tryName, outside, tag}, Env: []string{"ONLY=this"}, Files: files, Devices: []string{"/dev/null", "/dev/urandom"}},
		Tag:  tag, Files: []*os.File{given}, Out: out,
	}
	switch {
	case os.Geteuid() == 0:
		c.Plan.ID, err = ID()
		must(t, err)
	case os.Getenv(withSubIDs) != "":
		ids, err := idmap.Find()
		must(t, err)
		c.Map, c.Plan.ID = &ids, SubID(ids.Count)
	}
	return c, said
}

// confined runs the attempts in a confined child and returns what came of them while
// the child lives.
func confined(t *testing.T, c Child, said *os.File) (came, *exec.Cmd) {
	t.Helper()
	cmd, err := Start(t.Context(), c)
	must(t, err)
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var result came
	said.SetReadDeadline(time.Now().Add(20 * time.Second))
	must(t, json.NewDecoder(said).Decode(&result))
	return result, cmd
}

// TestInside: nothing that the program tries succeeds, and outside all of it does.
func TestInside(t *testing.T) {
	outside := ground(t)
	c, said := child(t, outside)
	result, _ := confined(t, c, said)
	for name := range attempts(outside) {
		if result.Failed[name] == "" {
			t.Errorf("confined, it could: %s", name)
		}
	}
	t.Logf("confined: %v", result.Failed)
	for _, name := range result.Root {
		if !slices.Contains([]string{"dev", "lib", "lib64", "usr", "etc", "tmp"}, name) {
			t.Errorf("its root holds %q", name)
		}
	}
	if !slices.Equal(result.Open, []string{"3 handed over"}) || len(result.Net) > 1 || !slices.Equal(result.Env, []string{"ONLY=this"}) {
		t.Errorf("it has descriptors %q, network %q, environment %q", result.Open, result.Net, result.Env)
	}
	if result.UID != int(c.Plan.ID) {
		t.Errorf("it is user %d, want %d", result.UID, c.Plan.ID)
	}

	// Control: the same program, started plainly.
	plain := exec.Command(c.Plan.Program, tryName, outside)
	output, err := plain.StdoutPipe()
	must(t, err)
	plain.ExtraFiles = c.Files
	must(t, plain.Start())
	var free came
	stop := time.AfterFunc(20*time.Second, func() { plain.Process.Kill() })
	defer stop.Stop()
	if err := json.NewDecoder(output).Decode(&free); err != nil {
		t.Errorf("the control says nothing: %v", err)
	}
	plain.Process.Kill()
	plain.Wait()
	for name, err := range free.Failed {
		t.Errorf("outside, it could not: %s: %s", name, err)
	}
}

// TestOutside reads the walls off the running process.
func TestOutside(t *testing.T) {
	outside := ground(t)
	c, said := child(t, outside)
	if os.Geteuid() == 0 {
		groups, err := syscall.Getgroups()
		must(t, err)
		must(t, syscall.Setgroups([]int{4, 27}))
		defer syscall.Setgroups(groups)
	}
	c.CPUs = 1
	c.Plan.Memory, c.Plan.FileSize = 1<<40, 1<<30
	_, cmd := confined(t, c, said)
	found, err := process.Find(c.Tag)
	must(t, err)
	if len(found) != 1 || found[0].PID != cmd.Process.Pid {
		t.Fatalf("found %+v, want process %d", found, cmd.Process.Pid)
	}
	found[0].Close()
	pid := cmd.Process.Pid
	status := readStatus(t, pid)
	for key, want := range map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2",
	} {
		if status[key] != want {
			t.Errorf("%s: %q, want %q", key, status[key], want)
		}
	}
	if ids := strings.Fields(status["NSpid"]); len(ids) != 2 || ids[1] != "1" {
		t.Errorf("it is process %q, want the first of a namespace", ids)
	}
	if os.Geteuid() == 0 || os.Getenv(withSubIDs) != "" {
		for _, kind := range []string{"Uid", "Gid"} {
			for _, id := range strings.Fields(status[kind]) {
				if n, _ := strconv.Atoi(id); n == os.Getuid() || n < 1000 || os.Geteuid() == 0 && n < lowestID {
					t.Errorf("%s: %q", kind, status[kind])
				}
			}
		}
		if status["Groups"] != "" {
			t.Errorf("groups %q", status["Groups"])
		}
	}
	spaces := []string{"mnt", "pid", "net", "ipc", "uts"}
	if os.Geteuid() != 0 {
		spaces = append(spaces, "user")
	}
	for _, space := range spaces {
		own, err := os.Readlink("/proc/self/ns/" + space)
		must(t, err)
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, space))
		if err != nil || own == theirs {
			t.Errorf("%s namespace: %q, ours %q, %v", space, theirs, own, err)
		}
	}
	for limit, want := range map[string]string{"Max core file size": "0", "Max open files": strconv.Itoa(mostOpen), "Max address space": strconv.Itoa(1 << 40), "Max file size": strconv.Itoa(1 << 30)} {
		if got := limitOf(t, pid, limit); got != want {
			t.Errorf("%s: %q, want %s", limit, got, want)
		}
	}
	if strings.ContainsAny(status["Cpus_allowed_list"], ",-") {
		t.Errorf("it may run on %s", status["Cpus_allowed_list"])
	}
	session, err := unix.Getsid(pid)
	must(t, err)
	if own, _ := unix.Getsid(0); session == own {
		t.Error("it is in this session")
	}
}

func readStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	status := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	return status
}

func limitOf(t *testing.T, pid int, name string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.Fields(rest)[1]
		}
	}
	return "no such limit"
}

// TestJoinsFirst: the child is within its limits before it has done anything.
func TestJoinsFirst(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes cgroups")
	}
	outside := ground(t)
	name := "cal-test-" + filepath.Base(filepath.Dir(outside))
	limits := cgroup.Limits{Memory: 512 << 20, CPU: 1, Pids: 40}
	group, err := cgroup.Make(cgroup.Mount, name, limits)
	must(t, err)
	if group.Name == "" {
		t.Skip("memory and processors cannot be limited here")
	}
	c, said := child(t, outside)
	joined := 0
	c.Join = func(pid int) error {
		joined = pid
		if got := readStatus(t, pid)["Threads"]; got == "" {
			t.Error("the child has ended")
		}
		if program, err := os.Readlink(fmt.Sprintf("/proc/%d/root", pid)); err != nil || program != "/" {
			t.Errorf("the child has begun: its root is %q, %v", program, err)
		}
		return group.Join(cgroup.Mount, pid)
	}
	_, cmd := confined(t, c, said)
	if joined != cmd.Process.Pid {
		t.Errorf("process %d joined, %d runs", joined, cmd.Process.Pid)
	}
	must(t, group.Check(cgroup.Mount, cmd.Process.Pid, limits))
	cmd.Process.Kill()
	cmd.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	must(t, cgroup.Remove(ctx, cgroup.Mount, name))

	// What cannot be limited does not run.
	c, _ = child(t, outside)
	c.Join = func(int) error { return errors.New("no room in the group") }
	if cmd, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("started all the same: %v, %v", cmd, err)
	}
	if found, err := process.Find(c.Tag); err != nil || len(found) > 0 {
		t.Errorf("left: %v, %v", found, err)
	}
}

// TestNoWallNoProgram: where a wall cannot be built, nothing runs and the error says why.
func TestNoWallNoProgram(t *testing.T) {
	outside := ground(t)
	for name, spoil := range map[string]func(*Child){
		"missing library": func(c *Child) { c.Plan.Files = append(c.Plan.Files, File{"/nowhere/lib.so", "/lib.so"}) },
		"missing device":  func(c *Child) { c.Plan.Devices = []string{"/dev/no-such-device"} },
		"no device":       func(c *Child) { c.Plan.Devices = []string{filepath.Join(outside, "secret")} },
		"dots":            func(c *Child) { c.Plan.Files = append(c.Plan.Files, File{"/etc/passwd", "/a/../../etc/passwd"}) },
		"shown twice":     func(c *Child) { c.Plan.Files = append(c.Plan.Files, c.Plan.Files[0]) },
		"missing program": func(c *Child) { c.Plan.Program = "/bin/none" },
		"no program": func(c *Child) {
			c.Plan.Program = filepath.Join(outside, "secret")
			c.Plan.Files = append(c.Plan.Files, File{c.Plan.Program, c.Plan.Program})
		},
		"long plan": func(c *Child) { c.Plan.Env = []string{strings.Repeat("x", 1<<20)} },
	} {
		c, _ := child(t, outside)
		spoil(&c)
		cmd, err := Start(t.Context(), c)
		if err == nil {
			cmd.Process.Kill()
			cmd.Wait()
			t.Errorf("%s: it runs", name)
			continue
		}
		t.Logf("%s: %v", name, err)
		if found, err := process.Find(c.Tag); err != nil || len(found) > 0 {
			t.Errorf("%s: left: %v, %v", name, found, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	c, _ := child(t, outside)
	c.Join = func(int) error { cancel(); return nil }
	if cmd, err := Start(ctx, c); err == nil { // it may have become the program before
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// TestOtherABI: calls of the processor's 32-bit ABI, whose numbers mean others, kill.
func TestOtherABI(t *testing.T) {
	outside := ground(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("the program is of i386")
	}
	path := filepath.Join(outside, "other")
	must(t, os.WriteFile(path, i386(), 0o755))
	var exit *exec.ExitError
	if err := exec.Command(path).Run(); !errors.As(err, &exit) || exit.ExitCode() != 7 { // control
		t.Skipf("the host's kernel has no other ABI: %v", err)
	}
	c, _ := child(t, outside)
	c.Plan.Program, c.Plan.Args, c.Plan.Files = path, []string{path}, []File{{path, path}}
	cmd, err := Start(t.Context(), c)
	must(t, err)
	err = cmd.Wait()
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGSYS {
		t.Errorf("a program of another ABI ended with %v, want it killed by SIGSYS", err)
	}
}

// i386 is a program that exits with 7: an ELF header, one segment, and
// mov eax, 1; mov ebx, 7; int 0x80.
func i386() []byte {
	const at, header = 0x8048000, 52 + 32
	code := []byte{0xb8, 1, 0, 0, 0, 0xbb, 7, 0, 0, 0, 0xcd, 0x80}
	words := []any{
		[]byte("\x7fELF\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"), uint16(2), uint16(3), uint32(1), uint32(at + header), uint32(52), uint32(0), uint32(0),
		uint16(52), uint16(32), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(0), uint32(at), uint32(at), uint32(header + len(code)), uint32(header + len(code)), uint32(5), uint32(0x1000),
		code,
	}
	var file bytes.Buffer
	for _, word := range words {
		binary.Write(&file, binary.LittleEndian, word)
	}
	return file.Bytes()
}

func TestLibraries(t *testing.T) {
	const list = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tgone.so => not found\n"
	if got := parseList([]byte(list)); !slices.Equal(got, []string{"/lib/x86_64-linux-gnu/libz.so.1", "/lib64/ld-linux-x86-64.so.2"}) {
		t.Errorf("%q", got)
	}
	files, err := Libraries(t.Context(), "/bin/sh")
	must(t, err)
	if !slices.ContainsFunc(files, func(f File) bool { return strings.Contains(f.Host, "libc.so") || strings.Contains(f.Host, "ld-musl") }) {
		t.Errorf("/bin/sh: %v", files)
	}
	if _, err := Libraries(t.Context(), "/etc/passwd"); err == nil {
		t.Error("/etc/passwd is taken for a program")
	}
}

func TestIDs(t *testing.T) {
	for text, want := range map[string]bool{"0 0 4294967295\n": true, "0 100000 65536\n": false, "": false, "0 1000 1\n1 100000 65536\n": false} {
		if got := idsMapped(strings.NewReader(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// TestOrdinaryUser runs the other tests as one who has no rights, and as one with
// subordinate ids.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this is the ordinary user")
	}
	dir, err := os.MkdirTemp("", "cuser")
	must(t, err)
	defer os.RemoveAll(dir)
	must(t, os.Chmod(dir, 0o755))
	tests := program(t, dir)
	for _, name := range []string{"home", "tmp"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		must(t, os.Chown(filepath.Join(dir, name), ordinaryID, ordinaryID))
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir + "/home", "TMPDIR=" + dir + "/tmp", asOrdinary + "=1"}
	run := func(t *testing.T, as []string, credential *syscall.Credential, env []string) {
		args := slices.Concat(as, []string{tests, "-test.v", "-test.timeout=2m"})
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		cmd.Dir, cmd.Env = dir+"/tmp", env
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
		if cmd.Path, err = exec.LookPath(args[0]); err != nil {
			t.Fatal(err)
		}
		output, err := cmd.CombinedOutput()
		t.Logf("%s", output)
		if err != nil {
			t.Error(err)
		}
	}
	t.Run("without rights", func(t *testing.T) {
		run(t, nil, &syscall.Credential{Uid: ordinaryID, Gid: ordinaryID}, env)
	})
	t.Run("with subordinate ids", func(t *testing.T) {
		as, err := subids.As(dir, ordinaryID, 300000, 400000)
		if err != nil {
			t.Skipf("no subordinate ids on this host: %v", err)
		}
		run(t, as, nil, append(env, withSubIDs+"=1"))
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
