package agents

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cal/nucleus"
)

// fake is an install whose program is small and linked dynamically.
func fake(t *testing.T) Install {
	t.Helper()
	binary, err := filepath.EvalSymlinks("/bin/true")
	if err != nil {
		t.Skip(err)
	}
	return Install{Path: "/bin/true", Binary: binary, Version: "1.2.3"}
}

func TestLaunchRefuses(t *testing.T) {
	for _, d := range definitions {
		for _, c := range []struct {
			name   string
			change func(*Launch)
			want   string
		}{
			{"no mode", func(l *Launch) { l.Mode = "" }, `unknown mode ""`},
			{"no tools", func(l *Launch) { l.MCPURL = "" }, "no MCP endpoint"},
			{"no model", func(l *Launch) { l.ModelURL = "" }, "no model endpoint"},
			{"relative HOME", func(l *Launch) { l.Home = "home" }, `HOME "home"`},
			{"directory outside HOME", func(l *Launch) { l.Dir = "/tmp" }, `directory "/tmp"`},
			{"directory above HOME", func(l *Launch) { l.Dir = guestHome + "/../x" }, "is not below HOME"},
			{"HOME as directory", func(l *Launch) { l.Dir = guestHome }, "is not below HOME"},
			{"prompt longer than an argument", func(l *Launch) { l.Prompt = strings.Repeat("x", 200_000) }, "200000 bytes, more than"},
		} {
			l := launch(nucleus.Mediated, "go")
			c.change(&l)
			if _, err := d.Agent(fake(t), l); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, %s: %v, want %q", d.Name, c.name, err, c.want)
			}
		}
	}
	l := launch(nucleus.Contained, "go")
	l.MCPURL = ""
	if _, err := claudeCode.Agent(fake(t), l); err != nil {
		t.Errorf("a contained agent without CAL's tools: %v", err)
	}
}

// TestEnvironment hands over a person's whole environment.
func TestEnvironment(t *testing.T) {
	person := map[string]string{
		"TERM": "xterm", "COLORTERM": "truecolor", "LANG": "de_DE.UTF-8", "LC_ALL": "C", "TZ": "Europe/Berlin",
		"ANTHROPIC_API_KEY": "canary", "OPENAI_API_KEY": "canary", "ANTHROPIC_BASE_URL": "canary", "CLAUDE_CODE_OAUTH_TOKEN": "canary",
		"SSH_AUTH_SOCK": "canary", "GITHUB_TOKEN": "canary", "HOME": "canary", "PATH": "canary", "LD_PRELOAD": "canary",
		"HTTPS_PROXY": "canary", "TERMINFO": "canary", "LCANARY": "canary", "CODEX_HOME": "canary", "NODE_OPTIONS": "canary",
	}
	for _, d := range definitions {
		for _, mode := range []nucleus.Mode{nucleus.Mediated, nucleus.Contained} {
			l := launch(mode, "go")
			l.Env = person
			agent, err := d.Agent(fake(t), l)
			if err != nil {
				t.Fatal(err)
			}
			for name, value := range agent.Env {
				if value == "canary" {
					t.Errorf("%s %s: %s is the person's", d.Name, mode, name)
				}
			}
			for _, name := range []string{"TERM", "COLORTERM", "LANG", "LC_ALL", "TZ"} {
				if agent.Env[name] != person[name] {
					t.Errorf("%s %s: %s is %q, want %q", d.Name, mode, name, agent.Env[name], person[name])
				}
			}
			if !slices.Contains(slices.Collect(maps.Values(agent.Env)), Placeholder) {
				t.Errorf("%s %s: no placeholder", d.Name, mode)
			}
			for name, data := range agent.Home {
				if strings.Contains(string(data), "canary") {
					t.Errorf("%s %s: %s holds something of the person's", d.Name, mode, name)
				}
			}
		}
	}
}

// TestRoot wants the program, what it needs to start, and nothing else.
func TestRoot(t *testing.T) {
	for _, d := range definitions {
		agent, err := d.Agent(fake(t), launch(nucleus.Mediated, ""))
		if err != nil {
			t.Fatal(err)
		}
		var guests []string
		for _, l := range agent.Root {
			guests = append(guests, l.Guest)
			if real, err := filepath.EvalSymlinks(l.Host); err != nil || real != l.Host {
				t.Errorf("%s: layer of %s is a link to %s, %v", d.Name, l.Host, real, err)
			}
			info, err := os.Stat(l.Host)
			if err != nil {
				t.Error(err)
			} else if info.IsDir() && l.Guest != "/usr/share/terminfo" {
				t.Errorf("%s: %s is a whole directory", d.Name, l.Host)
			}
			for _, forbidden := range []string{"/bin/sh", "/bin/bash", "git", "busybox"} {
				if strings.HasSuffix(l.Guest, forbidden) {
					t.Errorf("%s: %s is in the root", d.Name, l.Guest)
				}
			}
		}
		if agent.Argv[0] != "/opt/"+d.Name+"/bin/"+d.Program || !slices.Contains(guests, agent.Argv[0]) {
			t.Errorf("%s: starts %s, which is not among %v", d.Name, agent.Argv[0], guests)
		}
		if !slices.ContainsFunc(guests, func(g string) bool { return filepath.Base(g) == "libc.so.6" }) {
			t.Errorf("%s: no libc among %v", d.Name, guests)
		}
		contained, err := d.Agent(fake(t), launch(nucleus.Contained, ""))
		if err != nil {
			t.Fatal(err)
		}
		if len(contained.Root) != 1 {
			t.Errorf("%s contained: layers %v, want only the program", d.Name, contained.Root)
		}
	}
}

// TestStaticProgramNeedsNothing also shows that the list is not simply empty.
func TestStaticProgramNeedsNothing(t *testing.T) {
	_, in := installed(t, "codex")
	found := map[string]string{}
	if err := needs(in.Binary, found); err != nil || len(found) != 0 {
		t.Errorf("static program: %v, %v", found, err)
	}
	if err := needs(fake(t).Binary, found); err != nil || len(found) < 2 {
		t.Errorf("dynamic program: %v, %v", found, err)
	}
	if err := needs("/etc/passwd", found); err == nil {
		t.Error("no error from a file that is no program")
	}
}

func TestInstructions(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string][]byte
		want  string
	}{
		{"none", nil, ""},
		{"of another kind", map[string][]byte{"README.md": []byte("R"), "CLAUDE.md.bak": []byte("B")}, ""},
		{"one, as it is", map[string][]byte{"app/CLAUDE.md": []byte(" C\n")}, " C\n"},
		{"own before the other's", map[string][]byte{"app/CLAUDE.md": []byte("C"), "app/AGENTS.md": []byte("A")}, "C"},
		{"the other's alone", map[string][]byte{"app/AGENTS.md": []byte("A")}, "A"},
		{"outer first", map[string][]byte{"b/x/CLAUDE.md": []byte("2"), "a/CLAUDE.md": []byte("1"), "a/AGENTS.md": []byte("0")},
			"# From a/CLAUDE.md\n\n1\n\n# From b/x/CLAUDE.md\n\n2\n\n"},
	} {
		if got := string(claudeCode.instructions(c.files)); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestModel(t *testing.T) {
	for _, c := range []struct {
		agent string
		env   map[string]string
		want  nucleus.Model
		err   string
	}{
		{"claude-code", nil, nucleus.Model{}, "no credential for Claude Code: ANTHROPIC_API_KEY and CLAUDE_CODE_OAUTH_TOKEN are not set"},
		{"codex", map[string]string{"OPENAI_API_KEY": ""}, nucleus.Model{}, "no credential for Codex: OPENAI_API_KEY is not set"},
		{"codex", map[string]string{"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "https://h/api"}, nucleus.Model{}, `OPENAI_BASE_URL is "https://h/api", which does not end in /v1`},
		{"codex", map[string]string{"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "https://h/x/v1/"}, nucleus.Model{Protocol: "openai", BaseURL: "https://h/x", Key: "k"}, ""},
		{"codex", map[string]string{"OPENAI_API_KEY": "k"}, nucleus.Model{Protocol: "openai", BaseURL: "https://api.openai.com", Key: "k"}, ""},
		{"claude-code", map[string]string{"ANTHROPIC_API_KEY": "k", "CLAUDE_CODE_OAUTH_TOKEN": "t"}, nucleus.Model{Protocol: "anthropic", BaseURL: "https://api.anthropic.com", Key: "k"}, ""},
		{"claude-code", map[string]string{"CLAUDE_CODE_OAUTH_TOKEN": "t", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9/"}, nucleus.Model{Protocol: "anthropic", BaseURL: "http://127.0.0.1:9", Key: "t", Bearer: true}, ""},
	} {
		d, err := Find(c.agent)
		if err != nil {
			t.Fatal(err)
		}
		got, err := d.Model(c.env)
		if got != c.want || c.err == "" && err != nil || c.err != "" && (err == nil || err.Error() != c.err) {
			t.Errorf("%s %v: %+v, %v; want %+v, %q", c.agent, c.env, got, err, c.want, c.err)
		}
	}
	if _, err := Find("cursor"); err == nil || !strings.Contains(err.Error(), "known: claude-code, codex") {
		t.Errorf("unknown agent: %v", err)
	}
	var missing *Missing
	if _, err := codex.Model(nil); !errors.As(err, &missing) || missing.Hint == "" {
		t.Errorf("no hint: %v", err)
	}
}

// Every agent works on a task by itself: the task is one argument, behind "--", whatever it says.
func TestTask(t *testing.T) {
	const task = "--dangerously-skip-permissions {task} $(id)"
	for _, d := range definitions {
		for _, mode := range []nucleus.Mode{nucleus.Mediated, nucleus.Contained} {
			for _, prompt := range []string{"", "go"} {
				agent, err := d.Agent(fake(t), launch(mode, prompt))
				if err != nil {
					t.Fatal(err)
				}
				argv, err := agent.ForTask(task)
				if err != nil {
					t.Fatalf("%s: %v", d.Name, err)
				}
				if n := len(argv); argv[n-1] != task || argv[n-2] != "--" || argv[0] != agent.Argv[0] || slices.Contains(argv, "go") {
					t.Errorf("%s %s: %q", d.Name, mode, argv)
				}
				// As it is launched with a prompt, which opencode takes word by word.
				prompted, err := d.Agent(fake(t), launch(mode, task))
				if err != nil || strings.Join(prompted.Argv, " ") != strings.Join(argv, " ") {
					t.Errorf("%s %s: %q, with a prompt %q, %v", d.Name, mode, argv, prompted.Argv, err)
				}
			}
		}
	}
}

func TestOwnTask(t *testing.T) {
	for text, want := range map[string]string{
		"task: [run, '{task}']": "", "": "not known", "task: [run]": "0 elements", "task: ['{task}', '{task}']": "2 elements", "task: ['--prompt={task}']": "0 elements",
	} {
		file := filepath.Join(t.TempDir(), "mine.yaml")
		if err := os.WriteFile(file, []byte("program: /bin/true\nmodel: anthropic\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		d, in, err := Own(file)
		if err == nil {
			var agent nucleus.Agent
			if agent, err = d.Agent(in, launch(nucleus.Mediated, "")); err == nil {
				var argv []string
				if argv, err = agent.ForTask("do {model_url}"); err == nil && (argv[1] != "run" || argv[2] != "do {model_url}") {
					t.Errorf("%s: %q", text, argv)
				}
				if _, err := agent.ForTask("-x"); err == nil {
					t.Errorf("%s: an option is taken for a task", text)
				}
			}
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// What a client waits for one call is told to the client and to CAL alike.
func TestCallTimeout(t *testing.T) {
	for text, want := range map[string]int{"": nucleus.CallSeconds, "call_timeout_s: 300": 300, "call_timeout_s: 9": 0, "call_timeout_s: 100000": 0, "call_timeout_s: soon": 0} {
		file := filepath.Join(t.TempDir(), "mine.yaml")
		if err := os.WriteFile(file, []byte("program: /bin/true\nmodel: anthropic\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		d, in, err := Own(file)
		if want == 0 {
			if err == nil {
				t.Errorf("%q is taken", text)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		agent, err := d.Agent(in, launch(nucleus.Mediated, ""))
		if err != nil || agent.CallS != want {
			t.Errorf("%q: %d s, %v; want %d", text, agent.CallS, err, want)
		}
	}
	for name, told := range map[string]string{"claude-code": "7200000", "codex": "tool_timeout_sec = 7200\n", "opencode": `"timeout":7200000`} {
		d, err := Find(name)
		if err != nil {
			t.Fatal(err)
		}
		agent, err := d.Agent(fake(t), launch(nucleus.Mediated, ""))
		if err != nil || agent.CallS != 7200 || agent.Env["MCP_TOOL_TIMEOUT"] != told && !strings.Contains(string(agent.Home[".codex/config.toml"])+agent.Env["OPENCODE_CONFIG_CONTENT"], told) {
			t.Errorf("%s: %d s, told %q", name, agent.CallS, agent.Env["MCP_TOOL_TIMEOUT"])
		}
	}
}
