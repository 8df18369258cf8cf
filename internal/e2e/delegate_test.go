package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

// delegation writes a policy under which agents may have pods below their own, and returns its name.
func delegation(e *testenv.Env, sites ...string) string {
	var rules []string
	for _, s := range sites {
		host, port, _ := strings.Cut(s, ":")
		rules = append(rules, fmt.Sprintf("{host: %q, port: %s}", host, port))
	}
	e.Write(filepath.Join(e.CAL, "policies", "delegation.yaml"), `name: delegation
operations: {read_files: always, write_files: always, edit_files: always, run_bash: always, git_commit: always, git_push: always, net_connect: always, spawn_agent: always, manage_pods: always}
hosts: {only: [`+strings.Join(rules, ", ")+`]}
`)
	return "delegation"
}

const subTask = "SUBTASK: mend the typo in greeter/greet.sh and commit it."

// TestSubAgent has each real agent give the work to a sub-agent of its own kind in a real
// machine; the branch comes back, and nothing more than was asked for went along.
func TestSubAgent(t *testing.T) {
	for _, name := range []string{"claude-code", "codex"} {
		t.Run(name, func(t *testing.T) { subAgentStory(t, providers[name]) })
	}
}

func subAgentStory(t *testing.T, p provider) {
	e := testenv.New(t)
	e.Agents()
	repo := e.Repo("greeter", greeter())
	before := repo.State()
	call := func(tool string, args map[string]any) script.Step {
		return script.Step{Server: "cal", Tool: tool, Args: args}
	}
	of := `for-each-ref --format="%(refname:short) %(contents:subject)" refs/heads/cal`
	above := []script.Step{
		call("run_bash", map[string]any{"script": "echo of-the-agent > greeter/agent.txt; git -C greeter add -A; git -C greeter commit -qm first; echo secret > greeter/uncommitted.txt"}),
		call("spawn_agent", map[string]any{"task": subTask, "policy": map[string]any{
			"operations": map[string]any{"read_files": "always", "edit_files": "always", "git_commit": "always", "git_push": "always", "run_bash": "always"},
		}}),
		call("run_bash", map[string]any{"script": "cd greeter; git " + of + "; git status --short --branch; git show --stat $(git for-each-ref --format='%(objectname)' refs/heads/cal); sh test.sh"}),
		call("manage_pods", map[string]any{"action": "list"}),
		{Text: "MAIN-DONE"},
	}
	below := []script.Step{
		call("run_bash", map[string]any{"script": "ls greeter; git -C greeter log --format=%s"}),
		call("edit_files", map[string]any{"path": "greeter/greet.sh", "old": "Helo", "new": "Hello"}),
		call("git_commit", map[string]any{"message": "Spell it right"}),
		call("write_files", map[string]any{"path": "greeter/x", "content": "x"}),
		{Text: "SUB-DONE"},
	}
	said := make(chan []script.Result, 100)
	model := p.start(t, e, "key-"+random(), func(turn script.Turn) script.Step {
		if strings.Contains(turn.Prompt, "SUBTASK") {
			if turn.N == len(below)-1 {
				said <- turn.Results
			}
			return below[min(turn.N, len(below)-1)]
		}
		return above[min(turn.N, len(above)-1)]
	})
	e.Cal("run", "--repo", repo.Dir, "--agent", p.agent, "--policy", delegation(e), "--prompt", "Have it mended.").Want(t, 0, "MAIN-DONE")
	var got []script.Result
	for _, r := range model.Conversation() {
		if !strings.Contains(r.Turn.Prompt, "SUBTASK") && len(r.Turn.Results) > len(got) {
			got = r.Turn.Results
		}
	}
	if len(got) != 4 {
		t.Fatalf("%d results: %v", len(got), got)
	}
	text := func(i int) string { return strings.ReplaceAll(got[i].Text, `\"`, `"`) }
	for i, wants := range map[int][]string{
		1: {"SUB-DONE", `"state":"ended"`, `"exit_code":0`, `"commits":1`, "the working tree differs"},
		2: {"cal/sub/p-", "Spell it right", "## agent/" + p.agent, "greet.sh", "FAILED: Helo"}, // its own working tree is as it was
		3: {"[]"},
	} {
		for _, want := range wants {
			if !strings.Contains(text(i), want) {
				t.Errorf("result %d: want %q in %s", i, want, text(i))
			}
		}
	}
	select {
	case results := <-said:
		if !strings.Contains(results[0].Text, "agent.txt") || !strings.Contains(results[0].Text, "first") || strings.Contains(results[0].Text, "uncommitted") {
			t.Errorf("what went along: %s", results[0].Text)
		}
		if !strings.Contains(results[3].Text, "operations.write_files") {
			t.Errorf("what its policy does not allow: %s", results[3].Text)
		}
	default:
		t.Error("the sub-agent did not come to its end")
	}
	if after := repo.State(); after != before {
		t.Errorf("the host's repository changed\n%s\n%s", before, after)
	}
	creates := e.Entries(func(x nucleus.Entry) bool { return x.Kind == nucleus.KindPodCreate })
	if len(creates) != 2 || !strings.Contains(string(creates[1].Data), `"parent":"`+creates[0].Pod+`"`) || !strings.Contains(string(creates[1].Data), `"root_session":"`+creates[0].Session+`"`) {
		t.Errorf("pod.create entries: %+v", creates)
	}
	for i, pod := range creates {
		receipt := filepath.Join(t.TempDir(), "receipt")
		made := e.Cal("audit", "prove", "--session", pod.Session, "-o", receipt).Want(t, 0)
		if tells := strings.Contains(made.Stderr, "have sessions and receipts of their own: "+creates[1].Session); tells != (i == 0) {
			t.Errorf("the receipt of pod %d says of the pods below it: %v", i, made)
		}
		e.Cal("audit", "verify-receipt", receipt).Want(t, 0, "none is left out; the last one ends it")
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
	e.Verify()
}

// TestSubPodOverTheWire has an agent of the person's call tools in a pod below its own: the
// network there is that pod's, and its machine has what the policy of that pod says.
func TestSubPodOverTheWire(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("the machine's programs are the host's, and here is no curl: ", err)
	}
	e := testenv.New(t)
	site := newPage(t)
	repo := e.Repo("greeter", greeter())
	curl := map[string]any{"script": "curl -s --noproxy '' -x http://127.0.0.1:8080 " + site.url + "/"}
	own := func(hosts any) map[string]any {
		return map[string]any{"operations": map[string]any{"run_bash": "always", "net_connect": "always"}, "hosts": hosts}
	}
	var pods []string
	step := func(turn script.Turn) script.Step {
		pods = pods[:0]
		for _, r := range turn.Results {
			var made struct{ Pod string }
			if json.Unmarshal([]byte(r.Text), &made) == nil && made.Pod != "" {
				pods = append(pods, made.Pod)
			}
		}
		call := func(args map[string]any) script.Step {
			return script.Step{Server: "cal", Tool: "manage_pods", Args: args}
		}
		switch turn.N {
		case 0:
			return call(map[string]any{"action": "create", "policy": own(map[string]any{"only": []any{}})})
		case 1:
			return call(map[string]any{"action": "create", "policy": own("any")})
		case 2, 3:
			return call(map[string]any{"action": "call", "pod": pods[turn.N-2], "operation": "run_bash", "arguments": curl})
		case 4:
			return call(map[string]any{"action": "call", "pod": pods[0], "operation": "run_bash", "arguments": map[string]any{"argv": []string{"cat", "greeter/greet.sh"}}})
		case 5:
			return call(map[string]any{"action": "call", "pod": pods[0], "operation": "read_files", "arguments": map[string]any{"path": "greeter/greet.sh"}})
		case 6:
			return call(map[string]any{"action": "delete", "pod": pods[0]})
		}
		return script.Step{Text: "DONE"}
	}
	model := script.Anthropic(step)
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	ownAgent(e, "demo", e.Build("./internal/demoagent/cmd"))
	e.Cal("run", "--repo", repo.Dir, "--agent", "demo", "--policy", delegation(e, site.host+":"+site.port), "--prompt", "go").Want(t, 0, "DONE")
	got := results(t, model)
	for i, want := range map[int]string{
		2: `"kind":"denied"`, 3: `"kind":"approval_required"`, 4: "Helo", 5: "operations.read_files", 6: `"deleted":true`,
	} {
		if len(got) <= i || !strings.Contains(strings.ReplaceAll(got[i].Text, `\"`, `"`), want) {
			t.Errorf("call %d: want %q in %v", i, want, got)
		}
	}
	if hits, _ := site.seen(); hits != 0 {
		t.Errorf("%d requests came", hits)
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
}

// TestNodeDiesUnderSubAgent kills the node while a sub-agent works: both machines are taken up, and
// the result arrives.
func TestNodeDiesUnderSubAgent(t *testing.T) {
	t.Parallel() // mostly waits
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	release := make(chan struct{})
	var begun, pod atomic.Value
	call := func(tool string, args map[string]any) script.Step {
		return script.Step{Server: "cal", Tool: tool, Args: args}
	}
	model := script.Anthropic(func(turn script.Turn) script.Step {
		if strings.Contains(turn.Prompt, "SUBTASK") {
			begun.Store(true)
			select {
			case <-release:
			default:
				return call("run_bash", map[string]any{"script": "sleep 0.2"})
			}
			if committed := strings.Contains(fmt.Sprint(turn.Results), `"stat"`) || strings.Contains(fmt.Sprint(turn.Results), "Spell"); !committed {
				return call("run_bash", map[string]any{"script": "cd greeter && sed -i s/Helo/Hello/ greet.sh && git commit -qam Spell && git log -1 --format=%s"})
			}
			return script.Step{Text: "SUB-DONE"}
		}
		for _, r := range turn.Results {
			var said struct{ Pod, State, Output string }
			if json.Unmarshal([]byte(r.Text), &said) == nil && said.Pod != "" {
				pod.Store(said.Pod)
			}
			if said.State == "ended" {
				return script.Step{Text: "MAIN-DONE " + r.Text}
			}
		}
		switch id, _ := pod.Load().(string); {
		case turn.N == 0:
			return call("spawn_agent", map[string]any{"task": subTask, "wait_s": 0})
		case id != "":
			return call("manage_pods", map[string]any{"action": "wait", "pod": id, "wait_s": 1})
		}
		return call("manage_pods", map[string]any{"action": "list"})
	})
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	steadyAgent(e)
	run := e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--agent", "steady", "--policy", delegation(e), "--prompt", "work"))
	testenv.Eventually(t, 30*time.Second, "the sub-agent works", func() bool { return begun.Load() != nil && pod.Load() != nil })
	sandboxes := e.Sandboxes()
	if len(sandboxes) != 2 {
		t.Fatalf("sandboxes %v, want two", sandboxes)
	}
	for range 3 {
		pid, err := e.NodePID()
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		e.Cal("node", "start").Want(t, 0)
	}
	status, err := e.Client().Pod(e.Context(), pod.Load().(string))
	if err != nil || status.State != "running" || status.Parent == "" || status.RootSession == "" {
		t.Fatalf("%+v, %v", status, err)
	}
	e.Cal("vm", "list").Want(t, 0, "PARENT", status.Parent)
	close(release)
	run.Wait().Want(t, 0, "MAIN-DONE", "SUB-DONE", `"commits":1`)
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
	e.Verify()
	wantPaired(t, e)
}

// TestSubPodNeedsThePerson has a pod asked for under a policy that asks: the authority's own
// program shows what it will be, and a grant makes one.
func TestSubPodNeedsThePerson(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	repo := e.Repo("greeter", greeter())
	e.Cal("node", "start").Want(t, 0)
	node := e.Client()
	pod, err := node.CreatePod(e.Context(), nucleus.PodSpec{
		Mode: nucleus.Mediated, Image: nucleus.Image{Kind: "host"}, Repos: []nucleus.Repo{{Name: "greeter", Path: repo.Dir, Branch: "agent/x"}}, Workspace: "mine",
		Identity: nucleus.Identity{Name: "Test Person", Email: "person@example.org"},
		Policy:   json.RawMessage(`{"operations":{"read_files":"always","run_bash":"always","git_push":"ask","manage_pods":"ask"}}`),
	})
	if err != nil {
		t.Fatal(err)
	}
	tool := func(pod string, op nucleus.Op, args any) (json.RawMessage, *nucleus.Error) {
		value, err := node.Tool(e.Context(), pod, op, args)
		if err != nil {
			return nil, nucleus.AsError(err)
		}
		return value, nil
	}
	commit := func(pod, message string) {
		value, refused := tool(pod, nucleus.RunBash, map[string]any{"script": "cd greeter && echo x > " + message + " && git add -A && git commit -qm " + message})
		if refused != nil || !strings.Contains(string(value), `"exit_code":0`) {
			t.Fatalf("%s, %+v", value, refused)
		}
	}
	commit(pod.ID, "above")
	create := map[string]any{"action": "create", "policy": map[string]any{"operations": map[string]any{"run_bash": "always", "git_push": "always"}}}
	_, refused := tool(pod.ID, nucleus.ManagePods, create)
	if refused == nil || refused.Ask == "" {
		t.Fatalf("%+v", refused)
	}
	screen := e.Grant(refused.Ask)
	for _, text := range []string{"the policy of the new pod", `"git_push": "ask"`, `"run_bash": "always"`, `"create"`, `"gvisor"`, "kernel", `"greeter"`, `"mine"`, "agent/x"} {
		if !strings.Contains(screen, text) {
			t.Errorf("the authority did not show %s\n%s", text, screen)
		}
	}
	if strings.Contains(screen, "read_files") {
		t.Errorf("the authority showed the asking pod's policy\n%s", screen)
	}
	value, refused := tool(pod.ID, nucleus.ManagePods, create)
	var made struct{ Pod, Branch string }
	if refused != nil || json.Unmarshal(value, &made) != nil {
		t.Fatalf("%s, %+v", value, refused)
	}
	// A push from below shows all that is new on the remote, and where it comes from.
	commit(made.Pod, "below")
	push := map[string]any{"branch": made.Branch}
	_, refused = tool(made.Pod, nucleus.GitPush, push)
	if refused == nil || refused.Ask == "" {
		t.Fatalf("%+v", refused)
	}
	screen = e.Grant(refused.Ask)
	for _, text := range []string{"asked for by the agent of pod " + pod.ID, made.Pod, `"mine"`, "Test Person <person@example.org> below", "Test Person <person@example.org> above"} {
		if !strings.Contains(screen, text) {
			t.Errorf("the authority did not show %s\n%s", text, screen)
		}
	}
	if _, refused := tool(made.Pod, nucleus.GitPush, push); refused != nil {
		t.Errorf("%+v", refused)
	}
	if log := repo.Git("ls-remote", "--heads", "origin", made.Branch); !strings.Contains(log, made.Branch) {
		t.Errorf("the remote has %q", log)
	}
	if err := node.DeletePod(e.Context(), pod.ID); err != nil {
		t.Error(err)
	}
	if pods, err := node.Pods(e.Context()); err != nil || len(pods) != 0 || len(e.LeftOfMachines()) != 0 {
		t.Errorf("%+v, %v, left %v", pods, err, e.LeftOfMachines())
	}
	e.Verify()
}

// TestSubAgentHasItsOwnBudget lets a sub-agent spend what was set aside for it: it ends, its parent
// hears why and goes on.
func TestSubAgentHasItsOwnBudget(t *testing.T) {
	e := testenv.New(t)
	repo := e.Repo("greeter", greeter())
	call := func(tool string, args map[string]any) script.Step {
		return script.Step{Server: "cal", Tool: tool, Args: args}
	}
	spawn := func(tokens int) script.Step {
		return call("spawn_agent", map[string]any{"task": subTask, "policy": map[string]any{
			"operations": map[string]any{"run_bash": "always"}, "budget": map[string]any{"tokens": tokens},
		}})
	}
	above := []script.Step{spawn(2_000_000), spawn(5), call("run_bash", map[string]any{"script": "echo on"}), {Text: "MAIN-DONE"}}
	model := script.Anthropic(func(turn script.Turn) script.Step {
		if strings.Contains(turn.Prompt, "SUBTASK") {
			return call("run_bash", map[string]any{"script": "sleep 0.2"}) // on and on
		}
		return above[min(turn.N, len(above)-1)]
	})
	url, stop, err := model.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	e.Vars["ANTHROPIC_BASE_URL"], e.Vars["ANTHROPIC_API_KEY"] = url, "key-"+random()
	steadyAgent(e)
	e.Write(filepath.Join(e.CAL, "policies", "limited.yaml"), `operations: {run_bash: always, spawn_agent: always, manage_pods: always}
budget: {tokens: 1000000}
`)
	e.Cal("run", "--repo", repo.Dir, "--agent", "steady", "--policy", "limited", "--prompt", "work").Want(t, 0, "MAIN-DONE")
	var got []script.Result
	for _, r := range model.Conversation() {
		if !strings.Contains(r.Turn.Prompt, "SUBTASK") && len(r.Turn.Results) > len(got) {
			got = r.Turn.Results
		}
	}
	for i, wants := range [][]string{{`"rule":"budget.tokens"`, "are left"}, {`"state":"failed"`, "budget.tokens"}, {"on"}} {
		for _, want := range wants {
			if len(got) <= i || !strings.Contains(got[i].Text, want) {
				t.Errorf("result %d: want %q in %v", i, want, got)
			}
		}
	}
	if ended := e.Entries(of(nucleus.KindSessionBudget, "")); len(ended) != 1 {
		t.Errorf("%d sessions were ended by their budget, want the sub-agent's", len(ended))
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
	e.Verify()
}

// steadyAgent describes the agent "steady", which can be a sub-agent.
func steadyAgent(e *testenv.Env) {
	e.Write(filepath.Join(e.CAL, "agents", "steady.yaml"), fmt.Sprintf(
		"program: %s\nargs: [\"{prompt}\"]\ntask: [\"{task}\"]\nmodel: anthropic\nenv: {ANTHROPIC_BASE_URL: \"{model_url}\", ANTHROPIC_API_KEY: \"{placeholder}\", CAL_MCP_URL: \"{mcp_url}\"}\n", e.Build("./internal/e2e/steady")))
}
