package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestHostSuspended stops a whole host - cal, node, sandbox, file server - in the middle of
// an agent's call, lets the wall clock go on by hours, and wakes it: the call is answered,
// the session goes on. Then the clock is set back, and it goes on all the same.
func TestHostSuspended(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	_, clock := e.ClockedNode()
	woken, setBack := make(chan struct{}), make(chan struct{})
	model := script.Anthropic(func(turn script.Turn) script.Step {
		switch len(turn.Results) {
		case 0:
			return script.Step{Server: "cal", Tool: "run_bash", Args: map[string]any{"script": "echo begun > begun; sleep 2; echo slept-well"}}
		case 1: // asked for once the host is awake
			return script.Step{Server: "cal", Tool: "write_files", Args: map[string]any{"path": "greeter/after-waking", "content": "x"}}
		case 2:
			close(woken)
			<-setBack
			return script.Step{Server: "cal", Tool: "write_files", Args: map[string]any{"path": "greeter/after-setting-back", "content": "x"}}
		}
		return script.Step{Text: "ALL-DONE"}
	})
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	ownAgent(e, "steady", e.Build("./internal/e2e/steady"))
	repo := e.Repo("greeter", greeter())
	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--agent", "steady", "--prompt", "work"))
	file := func(name string) string {
		return filepath.Join(e.CAL, "isolation", "vms", "greeter", "files", name)
	}
	exists := func(name string) func() bool {
		return func() bool { _, err := os.Stat(file(name)); return err == nil }
	}
	testenv.Eventually(t, 30*time.Second, "the agent's call has begun", exists("begun"))
	node, err := e.NodePID()
	if err != nil {
		t.Fatal(err)
	}
	host := []int{run.Cmd.Process.Pid, node}
	names := map[string]bool{}
	for _, p := range e.Processes() {
		if strings.HasPrefix(p.Name, "runsc") {
			host = append(host, p.PID)
			names[p.Name] = true
		}
	}
	if !names["runsc-sandbox"] || !names["runsc-gofer"] {
		t.Fatalf("found %v, want a sandbox and its file server", names)
	}
	signal := func(s syscall.Signal) {
		for _, pid := range host {
			if err := syscall.Kill(pid, s); err != nil {
				t.Fatalf("process %d: %v", pid, err)
			}
		}
	}
	signal(syscall.SIGSTOP)
	clock.Ahead(3 * time.Hour)
	<-time.After(4 * time.Second) // longer than the call would have taken
	if exists("greeter/after-waking")() {
		t.Error("control: the session went on while everything stood still")
	}
	signal(syscall.SIGCONT)
	select {
	case <-woken:
	case <-run.Ended():
		t.Fatalf("the session ended\n%v", run.Wait())
	case <-time.After(time.Minute):
		t.Fatal("the session does not go on")
	}
	clock.Ahead(0)
	close(setBack)
	run.Wait().Want(t, 0, "ALL-DONE")

	told := results(t, model)
	if len(told) != 3 || !strings.Contains(told[0].Text, "slept-well") {
		t.Errorf("the agent was told %+v", told)
	}
	for _, name := range []string{"greeter/after-waking", "greeter/after-setting-back"} {
		if !exists(name)() {
			t.Errorf("%s was not written; the agent was told %+v", name, told)
		}
	}
	// The jumps are in the log: it was the node's clock that went.
	var last time.Time
	jumps := 0
	for _, entry := range e.Log() {
		at, err := time.Parse(time.RFC3339Nano, entry.Time)
		if err != nil {
			t.Fatal(err)
		}
		if gap := at.Sub(last); !last.IsZero() && (gap > 2*time.Hour || gap < -2*time.Hour) {
			jumps++
		}
		last = at
	}
	if jumps != 2 {
		t.Errorf("%d jumps of the clock in the log, want 2", jumps)
	}
	for _, entry := range e.Entries(of(nucleus.KindOutcome, "")) {
		if entry.Status != nucleus.OutcomeDone {
			t.Errorf("entry %d: %s %s", entry.Seq, entry.Op, entry.Status)
		}
	}
	if report := e.Verify(); len(report.Intents) > 0 {
		t.Errorf("%d intents without an outcome", len(report.Intents))
	}
}
