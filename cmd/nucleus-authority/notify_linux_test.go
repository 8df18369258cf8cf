package main

import (
	"crypto/ed25519"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A new ask is told of by the person's command, which hears names and no secret, and delays
// nobody though it hangs; it ends with the daemon.
func TestServeTells(t *testing.T) {
	home, dir := t.TempDir(), t.TempDir()
	quickKey(t, home)
	out := filepath.Join(dir, "out")
	var served *exec.Cmd
	api, _ := daemon(t, home, func(cmd *exec.Cmd) {
		served = cmd
		cmd.Env = append(cmd.Env, "SOME_TOKEN=secret", "DBUS_SESSION_BUS_ADDRESS=unix:path="+filepath.Join(dir, "nobody"))
		cmd.Args = append(cmd.Args, "--desktop", "--notify=sh", "--notify=-c", "--notify", `{ echo pid=$$; env; } > "$0.new"; mv "$0.new" "$0"; exec sleep 600`, "--notify="+out)
	})
	if err := api.RegisterPod(t.Context(), "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	submit(t, api, newAsk(t, "a-1", "make", "secret words"))
	submit(t, api, newAsk(t, "a-2", "make", "more")) // while the command hangs
	var told string
	for deadline := time.Now().Add(patience); told == ""; time.Sleep(5 * time.Millisecond) {
		raw, _ := os.ReadFile(out)
		if told = string(raw); time.Now().After(deadline) {
			t.Fatal("nobody was told")
		}
	}
	for _, want := range []string{"CAL_ASK=a-1\n", "CAL_POD=p-1\n", "CAL_OPERATION=run_bash\n", "CAL_HOME=" + home + "\n"} {
		if !strings.Contains(told, want) {
			t.Errorf("the command was not told %q:\n%s", want, told)
		}
	}
	if strings.Contains(told, "secret") {
		t.Errorf("the command was told too much:\n%s", told)
	}
	pid := strings.TrimPrefix(strings.Split(told, "\n")[0], "pid=")
	if _, err := os.Stat("/proc/" + pid); err != nil {
		t.Fatalf("the command does not hang: %v", err)
	}
	if err := served.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = served.Wait()
	if _, err := os.Stat("/proc/" + pid); err == nil {
		t.Error("the command outlives the daemon")
	}
}
