package agents

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cal/internal/script"
	"cal/nucleus"
)

// installed finds a real agent in the node_modules that CAL_TEST_AGENTS names.
func installed(t *testing.T, name string) (Definition, Install) {
	t.Helper()
	prefix := os.Getenv("CAL_TEST_AGENTS")
	if prefix == "" {
		t.Skip("CAL_TEST_AGENTS names no node_modules with the agents")
	}
	d, err := Find(name)
	if err != nil {
		t.Fatal(err)
	}
	in, err := d.Locate(context.Background(), Host{Env: map[string]string{"PATH": filepath.Join(prefix, ".bin")}})
	if err != nil {
		t.Fatal(err)
	}
	return d, in
}

func endpoint(d Definition, m script.Model) *script.Server {
	if d.ModelProtocol == "openai" {
		return script.OpenAI(m)
	}
	return script.Anthropic(m)
}

func launch(mode nucleus.Mode, prompt string) Launch {
	l := Launch{
		Mode: mode, Prompt: prompt, Home: guestHome, Dir: guestHome + "/work",
		MCPURL: "http://" + mcpAddr + "/mcp", ModelURL: "http://" + modelAddr,
		Env: map[string]string{"TERM": "xterm-256color", "AWS_SECRET_ACCESS_KEY": "canary-of-the-host"},
	}
	if mode == nucleus.Contained {
		l.Dir = guestHome + "/workspace"
	}
	return l
}

// startWorld makes the agent and its world. A contained agent lies in a root with the
// host's programs.
func startWorld(t *testing.T, name string, l Launch, m script.Model) (*world, *script.Server) {
	t.Helper()
	d, in := installed(t, name)
	agent, err := d.Agent(in, l)
	if err != nil {
		t.Fatal(err)
	}
	if l.Mode == nucleus.Contained {
		for _, dir := range []string{"/usr", "/bin", "/lib", "/lib64", "/etc/ssl"} {
			agent.Root = append(agent.Root, nucleus.Layer{Host: dir, Guest: dir})
		}
	}
	model := endpoint(d, m)
	return newWorld(t, model, agent, l.Dir), model
}

var all = []string{"claude-code", "codex", "opencode"}

// directModel is a model that Codex does not know, to which it offers each tool
// directly; to those it knows it offers a runner of small programs.
var directModel = []string{"-m", "scripted"}

func TestMediatedCallsTools(t *testing.T) {
	const prompt = "--write \"it\",  then\nstop"
	for _, c := range []struct {
		name, agent string
		args        []string
		bearer      bool
	}{
		{"claude-code", "claude-code", nil, false},
		{"claude-code with a token", "claude-code", nil, true},
		{"codex", "codex", nil, false},
		{"codex, tools offered directly", "codex", directModel, false},
		{"opencode", "opencode", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := launch(nucleus.Mediated, prompt)
			l.Args, l.Bearer = c.args, c.bearer
			l.Instructions = map[string][]byte{"app/CLAUDE.md": []byte("INSTRUCTION-A"), "app/AGENTS.md": []byte("INSTRUCTION-B")}
			w, model := startWorld(t, c.agent, l, script.Steps(
				script.Step{Text: "I write.", Server: "cal", Tool: "write_files", Args: map[string]any{"path": "app/x", "content": "<new & old>"}},
				script.Step{Text: "WRITTEN-AND-DONE"},
			))
			out, code := w.run()
			if code != 0 || !strings.Contains(out, "WRITTEN-AND-DONE") {
				t.Errorf("exit code %d, output:\n%s", code, out)
			}
			if got := w.wrote.get("app/x"); got != "<new & old>" {
				t.Errorf("write_files wrote %q", got)
			}
			turns := model.Conversation()
			if len(turns) != 2 {
				t.Fatalf("%d turns, want 2\n%s", len(turns), out)
			}
			if got := turns[1].Turn.Results; len(got) != 1 || !strings.Contains(got[0].Text, "wrote app/x") {
				t.Errorf("the model saw the results %+v", got)
			}
			if got := turns[0].Turn.Prompt; got != prompt {
				t.Errorf("the model saw the prompt %q", got)
			}
			want := map[string]string{"claude-code": "INSTRUCTION-A", "codex": "INSTRUCTION-B", "opencode": "INSTRUCTION-B"}[c.agent]
			for _, s := range []string{want, "Their paths are relative to the workspace"} {
				if !strings.Contains(string(turns[0].Body), s) {
					t.Errorf("the model did not see %q", s)
				}
			}
			for _, r := range model.Requests() {
				if got := r.Credential(); got != Placeholder && r.Method != "HEAD" {
					t.Errorf("%s %s carried the credential %q", r.Method, r.Path, got)
				}
				if bearer := r.Header.Get("Authorization") != ""; r.Method == "POST" && bearer != (c.bearer || c.agent == "codex") {
					t.Errorf("%s %s: Authorization %q", r.Method, r.Path, r.Header.Get("Authorization"))
				}
				if strings.Contains(string(r.Body), "canary-of-the-host") {
					t.Error("the host's environment reached the model")
				}
			}
			offered := map[string][]string{
				"claude-code": {"mcp__cal__write_files"},
				"opencode":    {"cal_write_files"},
				// exec runs programs that call the other tools; it has no files, network or processes.
				"codex": {"mcp__cal__write_files", "exec", "wait", "request_user_input", "request_user_input_async", "sleep",
					"list_mcp_resources", "list_mcp_resource_templates", "read_mcp_resource", "get_goal", "create_goal", "update_goal"},
			}[c.agent]
			for _, tool := range turns[0].Tools {
				if !slices.Contains(offered, tool) {
					t.Errorf("the model was offered %s", tool)
				}
			}
			if len(turns[0].Tools) == 0 {
				t.Error("the model was offered no tool")
			}
		})
	}
}

// marker is printed only by a shell that computes it.
const marker = "marker-42"

// shell is a call of an agent's own shell.
func shell(agent string) script.Step {
	const command = `echo marker-$((6*7)); echo built-in > "$HOME/workspace/made-by-shell"; cat "$HOME/workspace/made-by-shell"`
	if agent == "codex" {
		return script.Step{Tool: "exec_command", Args: map[string]any{"cmd": command}}
	}
	tool := map[string]string{"claude-code": "Bash", "opencode": "bash"}[agent]
	return script.Step{Tool: tool, Args: map[string]any{"command": command, "description": "compute"}}
}

func TestBuiltinTools(t *testing.T) {
	for _, agent := range all {
		for _, c := range []struct {
			name  string
			mode  nucleus.Mode
			on    bool
			works bool
		}{
			{"mediated, switched off", nucleus.Mediated, false, false},
			{"mediated, switched on", nucleus.Mediated, true, false},
			{"contained", nucleus.Contained, false, true},
		} {
			t.Run(agent+" "+c.name, func(t *testing.T) {
				t.Parallel()
				l := launch(c.mode, "use your own shell")
				l.BuiltinTools = c.on
				w, model := startWorld(t, agent, l, script.Steps(shell(agent), script.Step{Text: "ENDED"}))
				out, code := w.run()
				if code != 0 || !strings.Contains(out, "ENDED") {
					t.Errorf("exit code %d, output:\n%s", code, out)
				}
				turns := model.Conversation()
				last := turns[len(turns)-1].Turn.Results
				if len(last) != 1 {
					t.Fatalf("%d results, want 1\n%s", len(last), out)
				}
				t.Logf("the shell's result: %.300s", last[0].Text)
				if worked := strings.Contains(last[0].Text, marker); worked != c.works {
					t.Errorf("a shell ran: %v, want %v: %s", worked, c.works, last[0].Text)
				}
			})
		}
	}
}

// TestBuiltinWrite lets the agents' own tools write: what they reach is
// their own root, which ends with them, and no file of the host or the workspace.
func TestBuiltinWrite(t *testing.T) {
	canary := filepath.Join(t.TempDir(), "canary")
	if err := os.WriteFile(canary, []byte("canary-of-the-host"), 0o666); err != nil {
		t.Fatal(err)
	}
	for agent, steps := range map[string][]script.Step{
		"claude-code": {
			{Tool: "Read", Args: map[string]any{"file_path": canary}},
			{Tool: "Write", Args: map[string]any{"file_path": canary, "content": "overwritten"}},
			{Text: "ENDED"},
		},
		"opencode": {
			{Tool: "read", Args: map[string]any{"filePath": canary}},
			{Tool: "write", Args: map[string]any{"filePath": canary, "content": "overwritten"}},
			{Text: "ENDED"},
		},
		"codex": {
			{Tool: "view_image", Args: map[string]any{"path": canary}},
			{Tool: "apply_patch", Args: "*** Begin Patch\n*** Update File: " + canary + "\n@@\n-canary-of-the-host\n+overwritten\n*** End Patch\n"},
			{Text: "ENDED"},
		},
	} {
		t.Run(agent, func(t *testing.T) {
			t.Parallel()
			l := launch(nucleus.Mediated, "use your own tools")
			l.BuiltinTools = true
			w, model := startWorld(t, agent, l, script.Steps(steps...))
			out, code := w.run()
			if code != 0 || !strings.Contains(out, "ENDED") {
				t.Errorf("exit code %d, output:\n%s", code, out)
			}
			turns := model.Conversation()
			for _, r := range turns[len(turns)-1].Turn.Results {
				t.Logf("result: %.300s", r.Text)
				if strings.Contains(r.Text, "canary-of-the-host") {
					t.Error("a file of the host was read")
				}
			}
			if got, err := os.ReadFile(canary); err != nil || string(got) != "canary-of-the-host" {
				t.Errorf("the host's file is now %q, %v", got, err)
			}
		})
	}
}
