package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start runs sleep with a word of its own among its arguments.
func start(t *testing.T, word string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", "while :; do sleep 60; done", "sh", word)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	must(t, cmd.Start())
	t.Cleanup(func() {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		cmd.Wait()
	})
	return cmd
}

func TestFindAndEnd(t *testing.T) {
	mine, other := "word-of-"+t.Name(), "word-of-"+t.Name()+"-too"
	ended, lives := start(t, mine), start(t, other)
	go ended.Wait() // or it stays a zombie, which Find must not take for alive
	found, err := Find(mine)
	must(t, err)
	if len(found) != 1 || found[0].PID != ended.Process.Pid || found[0].Name != "sh" {
		t.Fatalf("found %+v, want process %d", found, ended.Process.Pid)
	}
	defer found[0].Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	must(t, End(ctx, mine))
	must(t, found[0].Ended())
	if err := found[0].Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("a signal to what has ended: %v", err)
	}
	if found, err := Find(other); err != nil || len(found) != 1 { // control
		t.Errorf("another's process: %+v, %v", found, err)
	} else {
		found[0].Close()
	}
	_ = lives
}

// Arguments can be read by everybody: who has the same is not taken for one of ours.
func TestStranger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	word := "word-of-" + t.Name()
	stranger := exec.Command("sh", "-c", "while :; do sleep 60; done", "sh", word)
	stranger.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	must(t, stranger.Start())
	t.Cleanup(func() {
		unix.Kill(-stranger.Process.Pid, unix.SIGKILL)
		stranger.Wait()
	})
	machines := exec.Command("sh", "-c", "while :; do sleep 60; done", "sh", word)
	machines.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: LowestMachineID, Gid: LowestMachineID}}
	must(t, machines.Start())
	t.Cleanup(func() { unix.Kill(-machines.Process.Pid, unix.SIGKILL) })
	go machines.Wait()
	found, err := Find(word)
	must(t, err)
	for _, p := range found {
		p.Close()
	}
	if len(found) != 1 || found[0].PID != machines.Process.Pid {
		t.Errorf("found %+v, want the machine's %d and not the stranger's %d", found, machines.Process.Pid, stranger.Process.Pid)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	must(t, Sweep(ctx, word, func() error { return nil }))
	if err := unix.Kill(stranger.Process.Pid, 0); err != nil {
		t.Errorf("the stranger's process: %v", err)
	}
}

// TestStrangerOfAPerson: the same for who is not root, and may not signal it.
func TestStrangerOfAPerson(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	const asked = "CAL_TEST_FIND"
	word := "word-of-" + t.Name()
	start(t, word) // root's
	program := filepath.Join(t.TempDir(), "test")
	data, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	must(t, os.WriteFile(program, data, 0o755))
	for dir := filepath.Dir(program); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
	person := exec.Command(program, "-test.run=^TestFindsFor$", "-test.v")
	person.Env = append(os.Environ(), asked+"="+word)
	person.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	output, err := person.CombinedOutput()
	if err != nil || !strings.Contains(string(output), "found 0") {
		t.Errorf("%v: %s", err, output)
	}
}

// TestFindsFor is run by TestStrangerOfAPerson.
func TestFindsFor(t *testing.T) {
	word := os.Getenv("CAL_TEST_FIND")
	if word == "" {
		t.Skip("TestStrangerOfAPerson runs this")
	}
	found, err := Find(word)
	must(t, err)
	must(t, End(t.Context(), word))
	t.Logf("found %d", len(found))
}

func TestStartOn(t *testing.T) {
	cmd := exec.Command("grep", "Cpus_allowed_list", "/proc/self/status")
	var said strings.Builder
	cmd.Stdout = &said
	must(t, StartOn(cmd.Start, 1))
	must(t, cmd.Wait())
	if strings.ContainsAny(said.String(), "-,") {
		t.Errorf("on one processor: %q", said.String())
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
