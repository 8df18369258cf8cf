package gvisor

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"cal/image"
	"cal/internal/idmap"
	"cal/internal/process"
	"cal/internal/testenv/subids"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/site"
)

// The tests run three times where they are started as root: as root, and as an
// ordinary user without and with subordinate ids, by a copy of this program with
// these in its environment.
const (
	asOrdinary = "CAL_TEST_ORDINARY" // directory that holds runsc, testguest and scratch
	ordinaryID = 64321

	withSubIDs  = "CAL_TEST_SUBIDS" // the user has these
	firstSubUID = 300000
	firstSubGID = 400000
)

// bench is what the tests of this package share; see TestMain.
type bench struct {
	dir   string // short, mode 0755
	runsc string
	guest string
	skip  string // why there is nothing to try
}

var (
	shared     bench
	buildGuest sync.Once
	screen     image.Screen
)

func TestMain(m *testing.M) { os.Exit(runMain(m)) }

func runMain(m *testing.M) int {
	if os.Getenv("CAL_TEST_CREATE") != "" {
		return m.Run()
	}
	if dir := os.Getenv(asOrdinary); dir != "" {
		shared = bench{dir: filepath.Join(dir, "scratch"), runsc: filepath.Join(dir, "runsc"), guest: filepath.Join(dir, "testguest")}
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "calg")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	shared = bench{dir: dir}
	shared.runsc, shared.skip = findRunsc()
	return m.Run()
}

// findRunsc looks at $CAL_RUNSC, then in the repository's bin.
func findRunsc() (path, skip string) {
	path = os.Getenv("CAL_RUNSC")
	if path == "" {
		path, _ = filepath.Abs("../../bin/runsc")
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Sprintf("no runsc: CAL_RUNSC is not set, and %v", err)
	}
	return path, ""
}

func need(t testing.TB) bench {
	t.Helper()
	if shared.skip != "" {
		t.Skip(shared.skip)
	}
	buildGuest.Do(func() {
		if shared.guest == "" {
			shared.guest = machinetest.TestGuest(t, shared.dir)
		}
	})
	return shared
}

func host(t *testing.T) machinetest.Host {
	b := need(t)
	return machinetest.Host{
		Driver:  func() machine.Driver { return New(Config{Runsc: b.runsc, Screen: &screen}) },
		Proxy:   b.guest,
		Scratch: b.dir,
		Read:    readWorkspace,
		Copy:    copyWorkspace,
		Kill:    killSandbox,
		Left:    left,
	}
}

// readWorkspace reads as a person can who has subordinate ids.
func readWorkspace(path string) ([]byte, error) {
	if os.Getenv(withSubIDs) == "" {
		return os.ReadFile(path)
	}
	ids, err := idmap.Find()
	if err != nil {
		return nil, err
	}
	return ids.Run(context.Background(), "cat", "--", path)
}

func copyWorkspace(t *testing.T, workspace string) string {
	if os.Getenv(withSubIDs) == "" {
		return workspace
	}
	ids, err := idmap.Find()
	must(t, err)
	to := filepath.Join(t.TempDir(), "copy")
	_, err = ids.Run(t.Context(), "sh", "-c", `cp -a "$1" "$2" && chown -hR 0:0 "$2"`, "sh", workspace, to)
	must(t, err)
	return to
}

func sandboxOf(t *testing.T, dir string) process.Process {
	t.Helper()
	running, err := process.Find(place(dir).argument())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range running {
		t.Cleanup(func() { p.Close() })
	}
	for _, p := range running {
		if p.Name == "runsc-sandbox" {
			return p
		}
	}
	t.Fatalf("no sandbox runs for %s", dir)
	return process.Process{}
}

func killSandbox(t *testing.T, dir string) {
	t.Helper()
	if err := sandboxOf(t, dir).Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// left lists what a machine must not leave.
func left(t *testing.T, dir string) (found []string) {
	t.Helper()
	running, err := process.Find(place(dir).argument())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range running {
		found = append(found, fmt.Sprintf("process %d %s", p.PID, p.Name))
		p.Close()
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if filepath.IsAbs(dir) && strings.Contains(string(mounts), dir) {
		found = append(found, "a mount")
	}
	id := filepath.Base(filepath.Dir(dir)) // as Host.Spec names machines
	for _, pattern := range []string{"/sys/fs/cgroup/cal-" + id + "-*", "/sys/fs/cgroup/*/cal-" + id + "-*", "/run/cal/" + id + "-*"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, names...)
	}
	for _, name := range append(made, site.RecordFile, site.LockFile) {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			found = append(found, name)
		}
	}
	return found
}

func TestConformance(t *testing.T) {
	t.Parallel()
	machinetest.Run(t, host(t))
}

// TestOrdinaryUser runs all other tests as a user without any rights.
func TestOrdinaryUser(t *testing.T) {
	again, _ := asUser(t, "user")
	again.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryID, Gid: ordinaryID}}
	t.Parallel()
	output, err := again.CombinedOutput()
	if err != nil {
		t.Fatalf("as user %d: %v\n%s", ordinaryID, err, output)
	}
	t.Logf("as user %d:\n%s", ordinaryID, output)
}

// TestSubordinateIDs runs all other tests as a user with subordinate ids, a home
// that is closed to others, and a group more than its own. The host's tables of
// users stay as they are: the child sees others, in a mount namespace of its own.
func TestSubordinateIDs(t *testing.T) {
	again, dir := asUser(t, "sub")
	as, err := subids.As(dir, ordinaryID, firstSubUID, firstSubGID)
	if err != nil {
		t.Skipf("no subordinate ids on this host: %v", err)
	}
	for _, name := range []string{"home", "scratch"} {
		must(t, os.Chmod(filepath.Join(dir, name), 0o700))
	}
	again.Args = slices.Concat(as, []string{again.Path}, again.Args[1:])
	again.Path, err = exec.LookPath(as[0])
	must(t, err)
	again.Env = append(again.Env, withSubIDs+"=1")
	t.Parallel()
	output, err := again.CombinedOutput()
	if err != nil {
		t.Fatalf("with subordinate ids: %v\n%s", err, output)
	}
	if !strings.Contains(string(output), "machines have ids of their own") {
		t.Errorf("the tests ran without:\n%s", output)
	}
	t.Logf("with subordinate ids:\n%s", output)
}

// asUser prepares a directory and a command that runs all tests again.
func asUser(t *testing.T, name string) (again *exec.Cmd, dir string) {
	if os.Geteuid() != 0 {
		t.Skip("this is the ordinary user")
	}
	b := need(t)
	dir = filepath.Join(b.dir, name)
	must(t, os.Mkdir(dir, 0o755))
	for name, source := range map[string]string{"runsc": b.runsc, "testguest": b.guest, "tests": "/proc/self/exe"} {
		must(t, copyProgram(filepath.Join(dir, name), source))
	}
	for _, name := range []string{"scratch", "home"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		must(t, os.Chown(filepath.Join(dir, name), ordinaryID, ordinaryID))
	}
	args := []string{"-test.v", "-test.timeout=5m"}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	again = exec.CommandContext(t.Context(), filepath.Join(dir, "tests"), args...)
	again.Dir = filepath.Join(dir, "scratch")
	again.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir + "/home", "TMPDIR=" + dir + "/scratch", asOrdinary + "=" + dir}
	return again, dir
}

func copyProgram(to, from string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(target, source); err != nil {
		target.Close()
		return err
	}
	return target.Close()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
