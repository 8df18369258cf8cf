package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

// ownAgent describes a program as an agent of the person's and returns its name.
func ownAgent(e *testenv.Env, name, program string) string {
	e.Write(filepath.Join(e.CAL, "agents", name+".yaml"), fmt.Sprintf(
		"program: %s\nargs: [\"{prompt}\"]\nmodel: anthropic\nenv: {ANTHROPIC_BASE_URL: \"{model_url}\", ANTHROPIC_API_KEY: \"{placeholder}\", CAL_MCP_URL: \"{mcp_url}\"}\n", program))
	return name
}

// steps is a model that has n files written by a command each, one after the other, and
// goes on with the next as soon as one was reported done. Ended says that it is through.
type steps struct {
	n     int
	done  atomic.Int64
	hold  chan struct{} // closed: the last step is let go
	tries atomic.Int64
}

func (s *steps) turn(turn script.Turn) script.Step {
	done := 0
	for _, r := range turn.Results {
		if strings.Contains(r.Text, "[exit code 0]") {
			done++
		}
	}
	s.done.Store(int64(done))
	s.tries.Store(int64(len(turn.Results)))
	if done < s.n {
		return s.step(done)
	}
	select {
	case <-s.hold:
		return script.Step{Text: "ALL-DONE"}
	default: // more to do until the test has seen enough
		return script.Step{Server: "cal", Tool: "run_bash", Args: map[string]any{"script": "sleep 0.2"}}
	}
}

func (s *steps) step(i int) script.Step {
	return script.Step{Server: "cal", Tool: "run_bash", Args: map[string]any{
		"script": fmt.Sprintf("echo begun >> step-%d.begun; sleep 0.05; echo done > step-%d", i, i),
	}}
}

// TestNodeDies kills the node again and again, at random moments of an agent's
// session. Each next node takes the machine up, and the session goes on to its end.
func TestNodeDies(t *testing.T) {
	t.Parallel() // mostly waits
	kills := 20
	if os.Getenv("CAL_LONG") != "" {
		kills = 100
	}
	e := testenv.New(t)
	work := &steps{n: 3 * kills / 2, hold: make(chan struct{})}
	model := script.Anthropic(work.turn)
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	ownAgent(e, "steady", e.Build("./internal/e2e/steady"))
	repo := e.Repo("greeter", greeter())

	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--agent", "steady", "--prompt", "work"))
	testenv.Eventually(t, 30*time.Second, "the agent has begun", func() bool { return work.tries.Load() > 0 })
	pods := e.Pods()
	if len(pods) != 1 {
		t.Fatalf("pods %v, want one", pods)
	}
	sandboxes := e.Sandboxes()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range kills {
		before := work.tries.Load()
		pid, err := e.NodePID()
		if err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		e.Cal("node", "start").Want(t, 0)
		if i%2 == 0 { // else the next kill comes while the agent's terminal is being joined again
			testenv.Eventually(t, 20*time.Second, fmt.Sprintf("after kill %d the session goes on beyond %d calls", i, before), func() bool {
				return work.tries.Load() > before
			})
		}
		if now := e.Sandboxes(); !slices.Equal(now, sandboxes) {
			t.Fatalf("after kill %d the sandboxes are %v, before %v", i, now, sandboxes)
		}
		time.Sleep(time.Duration(random.IntN(150)) * time.Millisecond) // the moment is what varies
	}
	testenv.Eventually(t, time.Minute, "all steps are done", func() bool { return work.done.Load() >= int64(work.n) })
	status, err := e.Client().Pod(e.Context(), pods[0])
	if err != nil || status.State != "running" {
		t.Fatalf("pod %+v: %v", status, err)
	}
	close(work.hold)
	run.Wait().Want(t, 0, "ALL-DONE") // cal stayed with the session, from node to node
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "cat ../step-*[0-9] | grep -c done").Want(t, 0, fmt.Sprintln(work.n))
	report := e.Verify()
	if len(report.Intents) > 0 {
		t.Errorf("%d intents without an outcome after recovery", len(report.Intents))
	}
	if adopted := e.Entries(of(nucleus.KindPodAdopt, "")); len(adopted) < kills {
		t.Errorf("%d adoptions in the log, want at least %d", len(adopted), kills)
	}
	wantPaired(t, e)
}

// wantPaired checks that each done outcome has its intent before it: no action
// without a record.
func wantPaired(t *testing.T, e *testenv.Env) {
	t.Helper()
	open := map[string]bool{}
	for _, entry := range e.Log() {
		switch entry.Kind {
		case nucleus.KindIntent:
			open[entry.Permit] = true
		case nucleus.KindOutcome:
			if !open[entry.Permit] {
				t.Errorf("entry %d: outcome of %s %s without an intent", entry.Seq, entry.Op, entry.Permit)
			}
		}
	}
}

// TestNodeDiesUnderCommand kills the node in the middle of a command: the person is told what is
// not known, and the machine that nobody is at any more is ended.
func TestNodeDiesUnderCommand(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	e.Cal("node", "start").Want(t, 0)
	run := e.Start(e.Command("cal", "run", "--", "sh", "-c", "echo up; exec sleep 300"))
	run.Until("up")
	pods := e.Pods()
	pid, err := e.NodePID()
	if err != nil || len(pods) != 1 {
		t.Fatalf("node %v, pods %v", err, pods)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	run.Wait().Want(t, 1, "not known", "cal audit log --pod "+pods[0])
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// TestNodeDiesWhileProbing kills the node while it tries a driver: the next one removes the
// guest that runs on, though nobody asks for that driver again.
func TestNodeDiesWhileProbing(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	microVM := e.MicroVM()
	run := e.Start(e.Command("cal", append(append([]string{"run"}, microVM...), "--", "true")...))
	testenv.Eventually(t, time.Minute, "a probe's guest runs", func() bool { return len(e.Sandboxes()) > 0 })
	pid, err := e.NodePID()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := run.Wait(); r.Code == 0 {
		t.Errorf("cal did not notice: %v", r)
	}
	if len(e.Sandboxes()) == 0 { // control
		t.Fatal("the guest ended with the node")
	}
	e.Cal("run", "--driver", "gvisor", "--", "true").Want(t, 0)
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// TestNodeDiesWhileStarting kills the node while it makes a machine: what cannot be
// taken up is removed whole by the next one.
func TestNodeDiesWhileStarting(t *testing.T) {
	e := testenv.New(t)
	e.Cal("node", "start").Want(t, 0)
	for i := range 6 {
		pid, err := e.NodePID()
		if err != nil {
			t.Fatal(err)
		}
		run := e.Start(e.Command("cal", "run", "--", "sleep", "60"))
		testenv.Eventually(t, 20*time.Second, "a pod is being made", func() bool { return len(e.Pods()) > 0 })
		time.Sleep(time.Duration(i*25) * time.Millisecond) // each time at another stage of the start
		syscall.Kill(pid, syscall.SIGKILL)
		if r := run.Wait(); r.Code == 0 {
			t.Errorf("cal did not notice: %v", r)
		}
		e.Cal("node", "start").Want(t, 0)
		node := e.Client()
		pods, err := node.Pods(e.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pods { // adopted: it had answered already
			if p.State != "running" {
				t.Errorf("round %d: pod %+v", i, p)
			}
			if err := node.DeletePod(e.Context(), p.ID); err != nil {
				t.Error(err)
			}
		}
		if left := e.LeftOfMachines(); len(left) > 0 {
			t.Fatalf("round %d: left behind:\n%s", i, strings.Join(left, "\n"))
		}
	}
	e.Verify()
}

// TestSandboxDies kills the sandbox: what a finished call wrote is in the workspace, and
// the next machine has it.
func TestSandboxDies(t *testing.T) {
	e := testenv.New(t)
	e.Cal("node", "start").Want(t, 0)
	node, ctx := e.Client(), e.Context()
	spec := nucleus.PodSpec{Workspace: "kept", Mode: nucleus.Mediated, Policy: json.RawMessage(`"local-dev"`), Image: nucleus.Image{Kind: "host"}}
	pod, err := node.CreatePod(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Tool(ctx, pod.ID, nucleus.WriteFiles, map[string]any{"path": "by-tool.txt", "content": "by-tool"}); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Tool(ctx, pod.ID, nucleus.RunBash, map[string]any{"script": "echo by-command > by-command.txt"}); err != nil {
		t.Fatal(err)
	}
	for _, pid := range e.Sandboxes() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	testenv.Eventually(t, 10*time.Second, "the node knows that the machine died", func() bool {
		status, err := node.Pod(ctx, pod.ID)
		return err == nil && status.State == "failed"
	})
	_, err = node.Tool(ctx, pod.ID, nucleus.ReadFiles, map[string]any{"path": "by-tool.txt"})
	if err == nil || nucleus.AsError(err).Kind != nucleus.KindUnavailable {
		t.Errorf("a call to a dead machine: %v, want unavailable", err)
	}
	if left := e.Sandboxes(); len(left) > 0 {
		t.Errorf("sandboxes %v", left)
	}
	again, err := node.CreatePod(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"by-tool", "by-command"} {
		value, err := node.Tool(ctx, again.ID, nucleus.ReadFiles, map[string]any{"path": name + ".txt"})
		if err != nil || !strings.Contains(string(value), name) {
			t.Errorf("%s: %s %v", name, value, err)
		}
	}
	for _, id := range []string{pod.ID, again.ID} {
		if err := node.DeletePod(ctx, id); err != nil {
			t.Error(err)
		}
	}
	e.Verify()
}

// TestCalDies kills cal itself in the middle of a command: what was written stays. The
// next run on the workspace says which machine holds it and the command that ends
// it, which works.
func TestCalDies(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--", "sh", "-c", "echo kept > kept.txt; echo begun; exec sleep 300"))
	run.Until("begun")
	run.Cmd.Process.Kill()
	run.Wait()
	// The machine may end with its cal, or be held for it: both are said.
	again := e.Cal("run", "--repo", repo.Dir, "--", "cat", "kept.txt")
	if again.Code != 0 {
		again.Want(t, 1, "in use by pod")
		_, hint, found := strings.Cut(again.Stderr, "end it with: cal ")
		if !found {
			t.Fatalf("no command that ends it\n%v", again)
		}
		e.Cal(strings.Fields(lines(hint)[0])...).Want(t, 0)
		again = e.Cal("run", "--repo", repo.Dir, "--", "cat", "kept.txt")
	}
	again.Want(t, 0, "kept")
	e.Verify()
}

// TestCalDiesUnderCommand kills cal in the middle of a command in a machine that is for this
// command alone: the node ends it when nobody has used it for a minute, and not before.
func TestCalDiesUnderCommand(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	_, clock := e.ClockedNode()
	var passed time.Duration
	ended := func(id string) func() bool {
		return func() bool {
			passed += 10 * time.Second
			clock.Passed(passed)
			pods, err := e.Client().Pods(e.Context()) // to ask for the pod itself would be a use
			return err == nil && !slices.ContainsFunc(pods, func(p nucleus.PodStatus) bool { return p.ID == id })
		}
	}
	run := e.Start(e.Command("cal", "run", "--", "sh", "-c", "echo up; exec sleep 300"))
	run.Until("up")
	pods := e.Pods()
	if len(pods) != 1 {
		t.Fatalf("pods %v, want one", pods)
	}
	for range 2 { // control: one that nobody uses ends, and this one, which somebody does, stays
		idle, err := e.Client().CreatePod(e.Context(), nucleus.PodSpec{Transient: true, Mode: nucleus.Mediated, Policy: json.RawMessage(`"default"`), Image: nucleus.Image{Kind: "host"}})
		if err != nil {
			t.Fatal(err)
		}
		testenv.Eventually(t, 20*time.Second, "a machine that nobody uses has ended", ended(idle.ID))
	}
	if !slices.Equal(e.Pods(), pods) {
		t.Fatalf("pods %v, want the command's, %v", e.Pods(), pods)
	}
	run.Cmd.Process.Kill()
	run.Wait()
	testenv.Eventually(t, 20*time.Second, "the machine has ended", ended(pods[0]))
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	stops := e.Entries(func(n nucleus.Entry) bool { return n.Kind == nucleus.KindPodStop && n.Pod == pods[0] })
	if len(stops) != 1 || !strings.Contains(string(stops[0].Data), "no request has used the transient pod") {
		t.Errorf("recorded as %+v", stops)
	}
	if report := e.Verify(); len(report.Intents) > 0 {
		t.Errorf("%d intents without an outcome", len(report.Intents))
	}
}

// TestAllDieAfterAWrite kills cal, the node and the sandbox as soon as a write was
// answered, again and again: what the finished call wrote is there, whole, on the host and in the
// next machine.
func TestAllDieAfterAWrite(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	e.Cal("node", "start").Want(t, 0)
	rounds := 8
	if os.Getenv("CAL_LONG") != "" {
		rounds = 40
	}
	want := map[string]string{}
	for i := range rounds {
		run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--policy", "local-dev", "--", "sh", "-c", "echo up; exec sleep 300"))
		run.Until("up")
		node, ctx := e.Client(), e.Context()
		pods, err := node.Pods(ctx)
		if err != nil || len(pods) != 1 {
			t.Fatalf("round %d: pods %+v, %v", i, pods, err)
		}
		victims := append(e.Sandboxes(), run.Cmd.Process.Pid)
		pid, err := e.NodePID()
		if err != nil || len(victims) < 2 {
			t.Fatalf("round %d: node %v, victims %v", i, err, victims)
		}
		name, content := fmt.Sprintf("greeter/written-%d", i), strings.Repeat(random()+"\n", 1+i*400)
		if _, err := node.Tool(ctx, pods[0].ID, nucleus.WriteFiles, map[string]any{"path": name, "content": content}); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		for _, victim := range append(victims, pid) {
			if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
				t.Errorf("round %d: process %d: %v", i, victim, err)
			}
		}
		run.Wait()
		want[name] = content
		for name, content := range want {
			if got, err := os.ReadFile(filepath.Join(e.CAL, "isolation", "vms", "greeter", "files", name)); err != nil || string(got) != content {
				t.Fatalf("round %d: %s holds %d bytes, want %d; %v", i, name, len(got), len(content), err)
			}
		}
		e.Cal("node", "start").Want(t, 0)
		if left := e.LeftOfMachines(); len(left) > 0 {
			t.Fatalf("round %d: left behind:\n%s", i, strings.Join(left, "\n"))
		}
	}
	sums := e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "sha256sum greeter/written-* 2>/dev/null || sha256sum written-*").Want(t, 0).Stdout
	for name, content := range want {
		if !strings.Contains(sums, nucleus.SHA256([]byte(content))+"  "+strings.TrimPrefix(name, "greeter/")) {
			t.Errorf("the next machine has another %s:\n%s", name, sums)
		}
	}
	if report := e.Verify(); len(report.Intents) > 0 {
		t.Errorf("%d intents without an outcome after recovery", len(report.Intents))
	}
	for _, outcome := range e.Entries(of(nucleus.KindOutcome, nucleus.WriteFiles)) {
		if outcome.Status != nucleus.OutcomeDone {
			t.Errorf("entry %d: what was answered as done is %s in the log", outcome.Seq, outcome.Status)
		}
	}
}

// TestCalDiesUnderAgent kills cal while its agent works: the agent goes on to its end, which
// stands in the log though nobody was at a terminal, and the receipt of it all is whole.
func TestCalDiesUnderAgent(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	work := &steps{n: 3, hold: make(chan struct{})}
	url, stop, err := script.Anthropic(work.turn).Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	ownAgent(e, "steady", e.Build("./internal/e2e/steady"))
	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--agent", "steady", "--prompt", "work"))
	testenv.Eventually(t, 60*time.Second, "the agent works", func() bool { return work.done.Load() >= 1 })
	run.Cmd.Process.Kill()
	run.Wait()
	close(work.hold)
	ends := func() []nucleus.Entry {
		return e.Entries(func(n nucleus.Entry) bool { return n.Kind == nucleus.KindSessionEnd })
	}
	testenv.Eventually(t, 60*time.Second, "the agent's end is recorded", func() bool { return len(ends()) > 0 })
	var exit struct {
		Start int64
		Code  *int `json:"exit_code"`
	}
	starts := e.Entries(func(n nucleus.Entry) bool { return n.Kind == nucleus.KindSessionStart })
	if err := json.Unmarshal(ends()[0].Data, &exit); err != nil || len(starts) != 1 || exit.Start != starts[0].Seq || exit.Code == nil || *exit.Code != 0 {
		t.Errorf("the end is %s, %v; the starts %+v", ends()[0].Data, err, starts)
	}
	e.Cal("vm", "stop", starts[0].Pod).Want(t, 0)
	receipt := filepath.Join(e.Dir, "receipt")
	e.Cal("audit", "prove", "--session", starts[0].Session, "-o", receipt).Want(t, 0)
	e.Cal("audit", "verify-receipt", receipt).Want(t, 0, "none is left out; the last one ends it")
	if n := len(ends()); n != 1 {
		t.Errorf("%d ends in the log", n)
	}
	e.Verify()
}

// Who runs a command in a machine that dies is told so, with what to do next.
func TestSandboxDiesInRequest(t *testing.T) {
	e := testenv.New(t)
	run := e.Start(e.Command("cal", "run", "--", "sh", "-c", "echo has begun; sleep 600"))
	run.Until("has begun")
	pod := e.Pods()[0]
	for _, pid := range e.Sandboxes() {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	run.Wait().Want(t, 1, "pod "+pod+" is failed: the machine ended: ", "hint: cal audit log --pod "+pod)
	e.Cal("audit", "log", "--pod", pod).Want(t, 0, "the machine ended: ")
}
