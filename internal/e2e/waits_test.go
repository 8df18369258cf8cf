package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	approvals "cal/approval/client"
	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

// TestAgentWaits has real agents call what needs a person, who answers while the call waits:
// the agent never hears that it has to come again, and each grant has one effect.
func TestAgentWaits(t *testing.T) {
	for name, p := range providers {
		t.Run(name, func(t *testing.T) { waitStory(t, p) })
	}
}

func waitStory(t *testing.T, p provider) {
	e := testenv.New(t)
	e.Agents()
	e.Approver()
	e.Write(filepath.Join(e.CAL, "policies", "asking.yaml"), "name: asking\noperations: {read_files: always, write_files: ask, run_bash: ask}\n")
	repo := e.Repo("greeter", greeter())
	call := func(tool string, args map[string]any) script.Step {
		return script.Step{Server: "cal", Tool: tool, Args: args}
	}
	model := p.start(t, e, "key-"+random(), script.Steps(
		call("write_files", map[string]any{"path": "greeter/greet.sh", "content": "#!/bin/sh\necho \"Hello, $1\"\n"}),
		call("run_bash", map[string]any{"argv": []string{"sh", "test.sh"}, "dir": "greeter"}),
		call("write_files", map[string]any{"path": "greeter/other", "content": "x"}),
		script.Step{Text: "The typo is mended."},
	))
	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--trust", "--agent", p.agent, "--policy", "asking", "--prompt", "Mend the typo."))
	if screen := e.Grant(nextAsk(t, e, run)); !strings.Contains(screen, "  | -echo \"Helo, $1\"\r\n  | +echo \"Hello, $1\"\r\n") || !strings.Contains(screen, "content     3 lines:") {
		t.Errorf("the change is not shown:\n%s", screen)
	}
	if screen := e.Grant(nextAsk(t, e, run)); !strings.Contains(screen, `argv[1]     "test.sh"`) || !strings.Contains(screen, `names file  "greeter/test.sh"`) {
		t.Errorf("the command is not shown:\n%s", screen)
	}
	e.Cal("approve", "deny", nextAsk(t, e, run), "--reason", "one file is enough").Want(t, 0)
	run.Wait().Want(t, 0, "The typo is mended", "cal: an approval is wanted: cal approve a-")

	got := results(t, model)
	if len(got) != 3 {
		t.Fatalf("%d tool results, want 3: the agent called again", len(got))
	}
	for i, text := range []string{"greeter/greet.sh", "PASSED", "one file is enough"} {
		if said := strings.ReplaceAll(got[i].Text, `\"`, `"`); !strings.Contains(said, text) || strings.Contains(said, string(nucleus.KindApproval)) {
			t.Errorf("call %d: want %q in %.1000s", i, text, said)
		}
	}
	if p.agent == "codex" {
		// Its programs are handed back to the model, to be looked at again, only when the
		// call's own time is over.
		told := func(r script.Request) bool { return strings.Contains(string(r.Body), "Defaults to 7200000 ms") }
		if !slices.ContainsFunc(model.Requests(), told) {
			t.Error("the model is to look again while a person thinks")
		}
	}
	for kind, want := range map[string]int{nucleus.KindApprovalAsk: 3, nucleus.KindApprovalUse: 2, nucleus.KindApprovalDeny: 1} {
		if entries := e.Entries(of(kind, "")); len(entries) != want {
			t.Errorf("%d entries %s, want %d", len(entries), kind, want)
		}
	}
}

// nextAsk waits for the one ask that a run makes.
func nextAsk(t *testing.T, e *testenv.Env, run *testenv.Running) (id string) {
	t.Helper()
	authority := approvals.New(filepath.Join(e.CAL, "run", "authority.sock"))
	defer authority.Close()
	testenv.Eventually(t, time.Minute, "an ask", func() bool {
		select {
		case <-run.Ended():
			t.Fatalf("ended without an ask\n%v", fmt.Sprint(run.Wait()))
		default:
		}
		pending, _ := authority.List(e.Context(), approvals.Pending)
		if len(pending) == 1 {
			id = pending[0].ID
		}
		return id != ""
	})
	return id
}

// TestBannerOfAsks has an agent's own screen on a terminal: what waits is said in its title,
// with a bell, until it is answered.
func TestBannerOfAsks(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	e.Write(filepath.Join(e.CAL, "policies", "asking.yaml"), "name: asking\noperations: {read_files: always, write_files: ask}\n")
	e.Write(filepath.Join(e.CAL, "agents", "demo.yaml"), fmt.Sprintf(
		"program: %s\nargs: [go]\nmodel: anthropic\nenv: {ANTHROPIC_BASE_URL: \"{model_url}\", ANTHROPIC_API_KEY: \"{placeholder}\", CAL_MCP_URL: \"{mcp_url}\"}\n", e.Build("./internal/demoagent/cmd")))
	answered := make(chan struct{})
	model := script.Anthropic(func(turn script.Turn) script.Step {
		if turn.N == 0 {
			return script.Step{Server: "cal", Tool: "write_files", Args: map[string]any{"path": "greeter/new", "content": "x"}}
		}
		<-answered // the session goes on, so that the banner can
		return script.Step{Text: "DONE"}
	})
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	end := sync.OnceFunc(func() { close(answered) })
	t.Cleanup(end)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	repo := e.Repo("greeter", greeter())
	screen := e.Terminal(e.Command("cal", "run", "--repo", repo.Dir, "--agent", "demo", "--policy", "asking", "--yes", "--trust"))
	screen.Until("\x1b]0;\U0001F512 CAL ISOLATION ACTIVE")
	screen.Until("\x1b]0;1 APPROVAL WAITS: cal approve | \U0001F512 CAL ISOLATION ACTIVE")
	screen.Until("\x07\x07")
	authority := approvals.New(filepath.Join(e.CAL, "run", "authority.sock"))
	defer authority.Close()
	pending, err := authority.List(e.Context(), approvals.Pending)
	if err != nil || len(pending) != 1 {
		t.Fatal(pending, err)
	}
	e.Grant(pending[0].ID)
	screen.Until("\x1b]0;\U0001F512 CAL ISOLATION ACTIVE")
	end()
	screen.Until("DONE")
	if code := screen.Wait(); code != 0 {
		t.Errorf("exit code %d\n%s", code, screen.Screen)
	}
}
