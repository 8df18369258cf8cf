package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

// budgetPolicy writes a policy of the person that lets everything happen in the machine, with
// a budget.
func budgetPolicy(e *testenv.Env, name, budget string) string {
	e.Write(filepath.Join(e.CAL, "policies", name+".yaml"), "name: "+name+`
operations: {read_files: always, write_files: always, edit_files: always, glob_search: always, grep_search: always, run_bash: always, git_commit: always}
budget: `+budget+"\n")
	return name
}

// modelCalls are what the log says of calls to the model that have ended.
func modelCalls(e *testenv.Env) (calls []struct {
	Done   bool
	USD    float64
	Tokens struct{ Input, Output int64 }
	Left   map[string]float64
}) {
	for _, entry := range e.Entries(of(nucleus.KindModelCall, "")) {
		all := append(calls, struct {
			Done   bool
			USD    float64
			Tokens struct{ Input, Output int64 }
			Left   map[string]float64
		}{})
		if json.Unmarshal(entry.Data, &all[len(calls)]) == nil && all[len(calls)].Done {
			calls = all
		}
	}
	return calls
}

// A real agent that has a budget of tokens is stopped in the middle of its work, with the
// reason, and what it committed up to there is brought back. One with enough goes on to
// its end.
func TestTokenBudget(t *testing.T) {
	e := testenv.New(t)
	e.Agents()
	repo := e.Repo("greeter", greeter())
	const rounds = 12
	work := []script.Step{
		{Server: "cal", Tool: "edit_files", Args: map[string]any{"path": "greeter/greet.sh", "old": "Helo", "new": "Hello"}},
		{Server: "cal", Tool: "git_commit", Args: map[string]any{"message": "Spell it right"}},
	}
	providers["claude-code"].start(t, e, "key-"+random(), func(turn script.Turn) script.Step {
		switch {
		case turn.N < len(work):
			return work[turn.N]
		case turn.N < rounds:
			return script.Step{Server: "cal", Tool: "run_bash", Args: map[string]any{"script": "true"}}
		}
		return script.Step{Text: "ALL-DONE"}
	})
	run := func(workspace, policy string) testenv.Result {
		return e.Cal("run", "--repo", repo.Dir, "--workspace", workspace, "--agent", "claude-code", "--policy", policy, "--prompt", "Mend the typo.")
	}
	run("enough", budgetPolicy(e, "enough", "{tokens: 100000000, usd: 1000000}")).Want(t, 0, "ALL-DONE", "1 commit", "cal: budget: ", " of 100000000, ", " left")
	calls := modelCalls(e)
	var all int64
	for _, c := range calls {
		all += c.Tokens.Input + c.Tokens.Output
	}
	if len(calls) < rounds || all == 0 || calls[0].USD <= 0 {
		t.Fatalf("%d calls, %d tokens: %+v", len(calls), all, calls)
	}
	limit := all / 2
	stopped := run("little", budgetPolicy(e, "little", fmt.Sprintf("{tokens: %d}", limit)))
	stopped.Want(t, 3, "cal: the budget is spent: ", fmt.Sprintf(" of %d tokens", limit), "rule: budget.tokens", "hint: ", "1 commit", "greet.sh")
	if strings.Contains(stopped.String(), "ALL-DONE") {
		t.Errorf("the agent went on to its end:\n%v", stopped)
	}
	var spent int64
	after := modelCalls(e)[len(calls):]
	for _, c := range after {
		spent += c.Tokens.Input + c.Tokens.Output
	}
	last := after[len(after)-1]
	if most := limit + last.Tokens.Input + last.Tokens.Output; spent < limit || spent > most {
		t.Errorf("%d tokens were spent of %d, want no more than the last call beyond: %d", spent, limit, most)
	}
	if ends := e.Entries(of(nucleus.KindSessionBudget, "")); len(ends) != 1 || ends[0].Rule != "budget.tokens" {
		t.Errorf("the log says %+v", ends)
	}
	e.Cal("repo", "diff", "--repo", repo.Dir, "--workspace", "little").Want(t, 0, "+echo \"Hello, $1\"")
	e.Verify()
}

// A command ends when the seconds are over, and not before.
func TestSecondsBudget(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	policy := budgetPolicy(e, "short", "{seconds: 5}")
	e.Cal("run", "--policy", policy, "--", "sh", "-c", "sleep 0.5; echo WHOLE").Want(t, 0, "WHOLE", "cal: budget: seconds ", " of 5, ", " left")
	began := time.Now()
	e.Cal("run", "--policy", policy, "--", "sh", "-c", "trap '' TERM; echo BEGUN; while :; do sleep 1; done").Want(t, 3, "BEGUN", "the budget is spent: ", " of 5 seconds", "rule: budget.seconds")
	if took := time.Since(began); took < 5*time.Second || took > 40*time.Second {
		t.Errorf("it took %s", took)
	}
	e.Cal("run", "--policy", budgetPolicy(e, "none", "{seconds: 0}"), "--", "true").Want(t, 3, "the budget is spent: 0 of 0 seconds")
	e.Cal("run", "--policy", budgetPolicy(e, "silent", "{usd: 0, tokens: 0}"), "--", "true").Want(t, 0)
	for _, outcome := range e.Entries(of(nucleus.KindOutcome, nucleus.RunBash)) {
		if outcome.Status != nucleus.OutcomeDone {
			t.Errorf("outcome %+v", outcome)
		}
	}
	e.Verify()
}

// What is spent is there again after the node was killed, `cal status` shows it, and the
// session ends when all of it is. A model that has no price is charged, and said to be.
func TestBudgetOutlivesTheNode(t *testing.T) {
	t.Parallel()
	e := testenv.New(t)
	work := &steps{n: 1 << 20, hold: make(chan struct{})}
	model := script.Anthropic(work.turn)
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	ownAgent(e, "steady", e.Build("./internal/e2e/steady"))
	repo := e.Repo("greeter", greeter())
	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--agent", "steady", "--policy", budgetPolicy(e, "dollars", "{usd: 2, seconds: 3600}"), "--prompt", "work"))
	testenv.Eventually(t, 30*time.Second, "the agent has worked", func() bool { return work.done.Load() > 3 })
	pods := e.Pods()
	if len(pods) != 1 {
		t.Fatalf("pods %v, want one", pods)
	}
	budget := func() *nucleus.Budget {
		status, err := e.Client().Pod(e.Context(), pods[0])
		if err != nil || status.Budget == nil {
			t.Fatalf("status %+v, %v", status, err)
		}
		return status.Budget
	}
	before := budget()
	if before.USD.Spent <= 0 || before.Seconds.Spent <= 0 || before.Tokens.Spent <= 0 || before.Tokens.Limit != nil {
		t.Fatalf("budget %+v", before)
	}
	pid, err := e.NodePID()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	e.Cal("node", "start").Want(t, 0)
	after := budget()
	if after.USD.Spent < before.USD.Spent || after.Tokens.Spent < before.Tokens.Spent || after.Seconds.Spent < before.Seconds.Spent {
		t.Errorf("before the node was killed %+v, after %+v", before, after)
	}
	e.Cal("status").Want(t, 0, pods[0], "  policy     dollars\n", "  USD        ", " of 2.00, ", " left\n", "  tokens     ", ", no limit\n", "  seconds    ", " of 3600, ", "no price", "charged like the dearest")
	var listed []nucleus.PodStatus
	if err := json.Unmarshal([]byte(e.Cal("status", "--json").Want(t, 0).Stdout), &listed); err != nil || len(listed) != 1 || listed[0].Budget == nil || *listed[0].Budget.USD.Limit != 2 {
		t.Errorf("status --json: %+v, %v", listed, err)
	}
	run.Wait().Want(t, 3, "the budget is spent: 2.", " of 2.00 USD", "rule: budget.usd")
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	e.Cal("status").Want(t, 0, "nothing runs")
	e.Verify()
}
