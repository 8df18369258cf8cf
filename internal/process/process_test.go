package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
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
