package e2e

import (
	"os"
	"strings"
	"testing"

	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

// TestAgentInMicroVM lets a real agent work in a machine with a kernel of its own, emulated: it
// reads, edits, runs a test, commits, and its push waits for a person.
func TestAgentInMicroVM(t *testing.T) {
	e := testenv.New(t)
	machine := e.MicroVM()
	e.Agents()
	p := providers["codex"]
	repo := e.Repo("greeter", greeter())
	call := func(tool string, args map[string]any) script.Step {
		return script.Step{Server: "cal", Tool: tool, Args: args}
	}
	steps := []script.Step{
		call("read_files", map[string]any{"path": "greeter/greet.sh"}),
		call("edit_files", map[string]any{"path": "greeter/greet.sh", "old": "Helo", "new": "Hello"}),
		call("run_bash", map[string]any{"argv": []string{"sh", "test.sh"}, "dir": "greeter"}),
		call("git_commit", map[string]any{"message": "Spell it right"}),
		call("git_push", map[string]any{"branch": "agent/codex"}),
		{Text: "The typo is mended. I could not publish it."},
	}
	model := p.start(t, e, "key-"+random(), func(turn script.Turn) script.Step { return steps[min(turn.N, len(steps)-1)] })
	before := repo.State()
	args := append([]string{"run", "--repo", repo.Dir, "--agent", "codex", "--policy", policyFor(e), "--prompt", "Mend the typo and publish it."}, machine...)
	e.Cal(args...).Want(t, 0, "1 commit", "greet.sh", "The typo is mended")
	got := results(t, model)
	for i, want := range []string{"Helo", "", "PASSED", "Spell it right", `"kind":"approval_required"`} {
		if len(got) <= i || !strings.Contains(strings.ReplaceAll(got[i].Text, `\"`, `"`), want) {
			t.Fatalf("step %d: want %q in %+v", i, want, got)
		}
	}
	if after := repo.State(); after != before {
		t.Errorf("the host's repository or its remote changed\nbefore:\n%s\nafter:\n%s", before, after)
	}
	e.Cal("repo", "fetch", "--repo", repo.Dir).Want(t, 0, "agent/codex")
	if log := repo.Git("log", "--format=%s %an %ae", "agent/codex", "-1"); log != "Spell it right Test Person person@example.org" {
		t.Errorf("the agent's commit is %q", log)
	}
	started := e.Entries(of(nucleus.KindPodStart, ""))
	if len(started) == 0 {
		t.Error("no pod.start in the log")
	}
	e.Verify()
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
}

// TestAgentsInMicroVMs is TestAgent in machines with a kernel of their own.
func TestAgentsInMicroVMs(t *testing.T) {
	if os.Getenv("CAL_LONG") == "" {
		t.Skip("emulated machines are slow: make test-long")
	}
	t.Run("claude-code", func(t *testing.T) { agentStory(t, providers["claude-code"], true, true) })
	t.Run("codex", func(t *testing.T) { agentStory(t, providers["codex"], false, true) })
	t.Run("opencode", func(t *testing.T) { agentStory(t, providers["opencode"], false, true) })
}
