package e2e

import (
	"encoding/json"
	"syscall"
	"testing"
	"time"

	"cal/internal/testenv"
	"cal/nucleus"
)

// A machine made ahead is as empty as one made now, and ends with its node.
func TestSpareMachine(t *testing.T) {
	env := testenv.New(t)
	const look = "ls -A ~/workspace /tmp; touch ~/workspace/left /tmp/left"
	env.Cal("run", "--", "sh", "-c", look).Want(t, 0)
	awaitSpare(t, env)
	if got := env.Cal("run", "--", "sh", "-c", look).Want(t, 0); got.Stdout != env.Cal("run", "--pids", "300", "--", "sh", "-c", look).Want(t, 0).Stdout {
		t.Errorf("in a machine made ahead there was %q", got.Stdout)
	}
	var spare []bool
	for _, e := range env.Entries(func(e nucleus.Entry) bool { return e.Kind == nucleus.KindPodCreate }) {
		var said struct{ Spare bool }
		if err := json.Unmarshal(e.Data, &said); err != nil {
			t.Fatal(err)
		}
		spare = append(spare, said.Spare)
	}
	if len(spare) != 3 || spare[0] || !spare[1] || spare[2] {
		t.Fatalf("machines made ahead: %v, want the second alone", spare)
	}
	awaitSpare(t, env)
	sandboxes := func() (n int) {
		for _, p := range env.Processes() {
			if p.Name == "runsc-sandbox" {
				n++
			}
		}
		return n
	}
	if got := sandboxes(); got != 1 {
		t.Fatalf("%d sandboxes run beside no pod, want the spare's", got)
	}
	pid, err := env.NodePID()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, 20*time.Second, "the spare's sandbox to end with its node", func() bool { return sandboxes() == 0 })
	env.Cal("run", "--", "true").Want(t, 0)
}

func awaitSpare(t *testing.T, env *testenv.Env) {
	t.Helper()
	testenv.Eventually(t, 20*time.Second, "the node's spare machine", func() bool {
		health, err := env.Client().Health(t.Context())
		return err == nil && health.Spare == "ready"
	})
}
