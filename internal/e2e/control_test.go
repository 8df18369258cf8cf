package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"strings"
	"testing"

	"cal/guest"
	"cal/internal/script"
	"cal/internal/testenv"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
	"cal/workspace/agents"
)

// TestBuiltinTools is the control of TestAgent: the same agents with their own shell
// and editor left on, and a model that asks for them. In mediated mode there is no shell to run
// and no workspace to write; in contained mode there is both.
func TestBuiltinTools(t *testing.T) {
	for _, mode := range []nucleus.Mode{nucleus.Mediated, nucleus.Contained} {
		for _, agent := range []string{"claude-code", "codex", "opencode"} {
			t.Run(string(mode)+" "+agent, func(t *testing.T) { builtinStory(t, providers[agent], mode) })
		}
	}
}

const (
	builtinFile = nucleus.MachineWorkspace + "/greeter/built-in.txt"
	// The shell computes what it prints, so that no echo of the command looks like it.
	builtinShell = `echo computed-$((6*7)); cat ` + nucleus.MachineWorkspace + `/greeter/greet.sh; echo by-shell > ` + nucleus.MachineWorkspace + `/greeter/by-shell.txt`
)

var builtinSteps = map[string][]script.Step{
	"claude-code": {
		{Tool: "Bash", Args: map[string]any{"command": builtinShell, "description": "compute"}},
		{Tool: "Write", Args: map[string]any{"file_path": builtinFile, "content": "by-tool"}},
		{Text: "ENDED"},
	},
	"opencode": {
		{Tool: "bash", Args: map[string]any{"command": builtinShell, "description": "compute"}},
		{Tool: "write", Args: map[string]any{"filePath": builtinFile, "content": "by-tool"}},
		{Text: "ENDED"},
	},
	"codex": {
		{Tool: "exec_command", Args: map[string]any{"cmd": builtinShell}},
		{Tool: "apply_patch", Args: "*** Begin Patch\n*** Add File: " + builtinFile + "\n+by-tool\n*** End Patch\n"},
		{Text: "ENDED"},
	},
}

func builtinStory(t *testing.T, p provider, mode nucleus.Mode) {
	e := testenv.New(t)
	e.Agents()
	model := p.start(t, e, "key-"+random(), script.Steps(builtinSteps[p.agent]...))
	repo := e.Repo("greeter", greeter())
	e.Cal("node", "start").Want(t, 0)
	spec := nucleus.PodSpec{
		Mode: mode, Policy: json.RawMessage(`"default"`), Image: nucleus.Image{Kind: "host"},
		Repos: []nucleus.Repo{{Name: "greeter", Path: repo.Dir, Branch: "agent/x"}},
	}
	launch := agents.Launch{
		Mode: mode, Prompt: "use your own tools", Home: nucleus.MachineHome, Dir: nucleus.MachineHome + "/work",
		MCPURL: guest.MCPURL, ModelURL: guest.ModelURL, Env: maps.Clone(e.Vars), BuiltinTools: true,
	}
	if mode == nucleus.Contained {
		launch.Dir = nucleus.MachineWorkspace + "/greeter"
	}
	spec.Agent, spec.Model = definition(t, e, p.agent, launch)

	node := e.Client()
	pod, err := node.CreatePod(e.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	out, exit := runAgent(t, e, node, pod.ID)
	if exit.ExitCode != 0 || !strings.Contains(out, "ENDED") {
		t.Errorf("exit %+v\n%s", exit, out)
	}
	got := results(t, model)
	if len(got) != 2 {
		t.Fatalf("%d results, want 2: %+v", len(got), got)
	}
	works := mode == nucleus.Contained
	for _, text := range []string{"computed-42", "Helo"} {
		if ran := strings.Contains(got[0].Text, text); ran != works {
			t.Errorf("the shell said %q: %v, want %v: %.500s", text, ran, works, got[0].Text)
		}
	}
	for _, name := range []string{"by-shell.txt", "built-in.txt"} {
		value, err := node.Tool(e.Context(), pod.ID, nucleus.ReadFiles, map[string]any{"path": "greeter/" + name})
		if wrote := err == nil; wrote != works {
			t.Errorf("%s is in the workspace: %v, want %v: %s %v (results %+v)", name, wrote, works, value, err, got)
		}
	}
	// Control: the same read finds what is there.
	if value, err := node.Tool(e.Context(), pod.ID, nucleus.ReadFiles, map[string]any{"path": "greeter/greet.sh"}); err != nil || !strings.Contains(string(value), "Helo") {
		t.Errorf("greet.sh: %s %v", value, err)
	}
	if err := node.DeletePod(e.Context(), pod.ID); err != nil {
		t.Error(err)
	}
}

// definition finds the person's install and makes the program of a session.
func definition(t *testing.T, e *testenv.Env, name string, launch agents.Launch) (*nucleus.Agent, *nucleus.Model) {
	t.Helper()
	d, err := agents.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	install, err := d.Locate(e.Context(), agents.Host{Home: e.Home, Env: e.Vars})
	if err != nil {
		t.Fatal(err)
	}
	model, err := d.Model(e.Vars)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := d.Agent(install, launch)
	if err != nil {
		t.Fatal(err)
	}
	return &agent, &model
}

// runAgent starts a pod's agent and stays with it to its end.
func runAgent(t *testing.T, e *testenv.Env, node *client.Client, pod string) (string, client.AgentExit) {
	t.Helper()
	stream, err := node.Agent(e.Context(), pod, client.AgentRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	out, exit, err := follow(stream)
	if err != nil {
		t.Fatalf("%v; the agent said:\n%s", err, out)
	}
	return out, exit
}

// follow reads an agent's stream until the agent or the stream ends.
func follow(stream *wire.Stream) (string, client.AgentExit, error) {
	var out strings.Builder
	var exit client.AgentExit
	for {
		kind, payload, err := stream.Recv(4 << 20)
		if err != nil {
			return out.String(), exit, err
		}
		switch kind {
		case wire.FrameStdout, wire.FrameStderr:
			out.Write(payload)
		case wire.FrameResult:
			return out.String(), exit, json.Unmarshal(payload, &exit)
		}
	}
}

// TestWaysOut is the control of the attempts that TestAgent's machine makes. With a
// rule for the listener the same attempts are understood and wait for a person, since
// a command has read the workspace; without one they are denied. And the listener does
// hear who reaches it.
func TestWaysOut(t *testing.T) {
	e := testenv.New(t)
	other := listen(t, "tcp", "127.0.0.1:0")
	for i, c := range []struct {
		policy  string
		verdict nucleus.Verdict
	}{{"default", nucleus.Deny}, {policyFor(e, other.addr), nucleus.Ask}} {
		from := 0
		if i > 0 {
			from = len(e.Log())
		}
		run := e.Cal("run", "--policy", c.policy, "--", "bash", "-c", attempts(other.addr, "no-such-name")).Want(t, 0, "attempts-ended")
		if strings.Contains(run.Stdout, "exit 0") {
			t.Errorf("policy %s: a way out\n%v", c.policy, run)
		}
		judged := 0
		for _, entry := range e.Log()[from:] {
			if entry.Op == nucleus.NetConnect && entry.Kind == nucleus.KindIntent && entry.Verdict == c.verdict && strings.Contains(string(entry.Args), `"127.0.0.1"`) {
				judged++
			}
		}
		if judged != 3 { // CONNECT, GET, SOCKS
			t.Errorf("policy %s: %d connections to 127.0.0.1 were judged %s, want 3", c.policy, judged, c.verdict)
		}
	}
	if n := other.seen.Load(); n != 0 {
		t.Errorf("the listener saw %d connections", n)
	}
	node, ctx := e.Client(), e.Context()
	pod, err := node.CreatePod(ctx, nucleus.PodSpec{Mode: nucleus.Mediated, Policy: inlinePolicy(other.addr), Image: nucleus.Image{Kind: "host"}})
	if err != nil {
		t.Fatal(err)
	}
	node.Tool(ctx, pod.ID, nucleus.WebFetch, map[string]any{"url": "http://" + other.addr + "/"}) // which hangs up
	if n := other.seen.Load(); n == 0 {
		t.Error("the listener does not hear a fetch that is allowed")
	}
	if err := node.DeletePod(ctx, pod.ID); err != nil {
		t.Error(err)
	}
}

// inlinePolicy allows files, commands and fetches from one host.
func inlinePolicy(addr string) json.RawMessage {
	host, port, _ := net.SplitHostPort(addr)
	return fmt.Appendf(nil, `{"name":"inline","operations":{"read_files":"always","write_files":"always","run_bash":"always","web_fetch":"always"},"hosts":{"only":[{"host":%q,"port":%s}]}}`, host, port)
}

// TestSearchContained lets a contained command search the machine for the host's
// canaries as TestAgent's tools do.
func TestSearchContained(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	host := plantHost(t, e, repo)
	file, process := random(), random()
	// What is planted is put together in the machine, so that the script does not hold it.
	plant := fmt.Sprintf("printf 'canary-%%s-%s' file > /home/agent/planted\nexport X=canary-$(printf process)-%s\n", file, process)
	run := e.Cal("run", "--repo", repo.Dir, "--mode", "contained", "--", "bash", "-c", plant+host.search()).Want(t, 0, "search-ended")
	if where := host.found([]byte(run.Stdout + run.Stderr)); len(where) > 0 {
		t.Errorf("found in the machine: %v", where)
	}
	for _, planted := range []string{"canary-file-" + file, "canary-process-" + process} {
		if !strings.Contains(run.Stdout, planted) {
			t.Errorf("the search does not find %s\n%v", planted, run)
		}
	}
	if host.agent.seen.Load() != 0 {
		t.Error("the person's ssh agent was reached")
	}
}

// TestPushNeedsThePerson is the control of the refused push: the same push, granted,
// moves the branch that was shown, once.
func TestPushNeedsThePerson(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	repo := e.Repo("greeter", greeter())
	e.Cal("node", "start").Want(t, 0)
	node, ctx := e.Client(), e.Context()
	pod, err := node.CreatePod(ctx, nucleus.PodSpec{
		Mode: nucleus.Mediated, Policy: json.RawMessage(`"default"`), Image: nucleus.Image{Kind: "host"},
		Repos: []nucleus.Repo{{Name: "greeter", Path: repo.Dir, Branch: "agent/x"}}, Identity: nucleus.Identity{Name: "A", Email: "a@example.org"},
	})
	if err != nil {
		t.Fatal(err)
	}
	tool := func(op nucleus.Op, args map[string]any) error {
		_, err := node.Tool(ctx, pod.ID, op, args)
		return err
	}
	if err := tool(nucleus.WriteFiles, map[string]any{"path": "greeter/new.txt", "content": "new"}); err != nil {
		t.Fatal(err)
	}
	if err := tool(nucleus.GitCommit, map[string]any{"message": "new"}); err != nil {
		t.Fatal(err)
	}
	pushed := func() bool {
		return strings.Contains(repo.Git("--git-dir="+repo.Remote, "for-each-ref"), "refs/heads/agent/x")
	}
	push := func() *nucleus.Error {
		err := tool(nucleus.GitPush, map[string]any{"branch": "agent/x"})
		if err == nil {
			return nil
		}
		return nucleus.AsError(err)
	}
	first := push()
	if first == nil || first.Kind != nucleus.KindApproval || first.Ask == "" || pushed() {
		t.Fatalf("push without an approval: %+v, pushed %v", first, pushed())
	}
	if screen := e.Grant(first.Ask); !strings.Contains(screen, "agent/x") || !strings.Contains(screen, repo.Remote) {
		t.Errorf("the authority did not show branch and remote:\n%s", screen)
	}
	if err := push(); err != nil || !pushed() {
		t.Fatalf("push with an approval: %v, pushed %v", err, pushed())
	}
	if err := tool(nucleus.WriteFiles, map[string]any{"path": "greeter/new.txt", "content": "newer"}); err != nil {
		t.Fatal(err)
	}
	if err := tool(nucleus.GitCommit, map[string]any{"message": "newer"}); err != nil {
		t.Fatal(err)
	}
	if again := push(); again == nil || again.Kind != nucleus.KindApproval || again.Ask == first.Ask {
		t.Errorf("a second push on the same approval: %+v", again)
	}
	if err := node.DeletePod(ctx, pod.ID); err != nil {
		t.Error(err)
	}
	e.Verify()
}
