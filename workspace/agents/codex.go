package agents

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	"cal/nucleus"
)

var codex = Definition{
	Name:           "codex",
	Title:          "Codex",
	Program:        "codex",
	Package:        "@openai/codex",
	MinVersion:     "0.169.0",
	InstallHint:    "npm install -g @openai/codex",
	ModelProtocol:  "openai",
	KeyEnv:         []string{"OPENAI_API_KEY"},
	CallTimeout:    toolTimeout,
	BaseURLEnv:     "OPENAI_BASE_URL",
	DefaultBaseURL: "https://api.openai.com",
	Instructions:   []string{"AGENTS.md", "CLAUDE.md"},
	versions:       "codex-cli %s",
	native: func(arch string) []nativePackage {
		cpu := map[string]string{"amd64": "x64", "arm64": "arm64"}[arch]
		triple := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch] + "-unknown-linux-musl"
		return []nativePackage{{"@openai/codex-linux-" + cpu, "vendor/" + triple + "/bin/codex"}}
	},
	// Most models call tools by small programs; this runs them, in an isolate
	// without files and network.
	beside: []string{"codex-code-mode-host"},
	recipe: startCodex,
}

// builtin are the features of Codex that act by themselves.
var builtin = []string{
	"apps", "browser_use", "computer_use", "hooks", "image_generation", "plugins",
	"shell_snapshot", "shell_tool", "skill_mcp_dependency_install", "unified_exec", "view_image",
}

func startCodex(d Definition, l Launch) (start, error) {
	var config bytes.Buffer
	set := func(key string, value any) {
		raw, err := json.Marshal(value) // of a string, boolean or number: TOML too
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(&config, "%s = %s\n", key, raw)
	}
	table := func(name string) { fmt.Fprintf(&config, "\n[%s]\n", name) }

	// The machine is the sandbox; Codex's own needs calls that the machine may
	// not have, and would ask about each of CAL's tools.
	set("sandbox_mode", "danger-full-access")
	set("approval_policy", "never")
	set("model_provider", "cal")
	set("check_for_update_on_startup", false)
	mediated := l.Mode == nucleus.Mediated
	if mediated {
		set("developer_instructions", note)
		if !l.BuiltinTools {
			set("web_search", "disabled")
		}
	}
	table("model_providers.cal")
	set("name", "cal")
	set("base_url", l.ModelURL+"/v1")
	set("env_key", "OPENAI_API_KEY")
	set("wire_api", "responses")
	if l.MCPURL != "" {
		table("mcp_servers.cal")
		set("url", l.MCPURL)
		set("default_tools_approval_mode", "approve")
		set("startup_timeout_sec", 30)
		set("tool_timeout_sec", int(d.CallTimeout.Seconds()))
	}
	table("features")
	set("daemon_auto_start", false) // would outlive the session
	if mediated && !l.BuiltinTools {
		for _, name := range builtin {
			set(name, false)
		}
		table("agents") // it would start more of itself
		set("enabled", false)
		table("skills.bundled") // to be read with a shell
		set("enabled", false)
	}
	// A call through a program would be handed back as "still running" after 30 seconds, and
	// the model asked to look again, for as long as a person thinks.
	table("features.code_mode")
	set("default_exec_yield_time_ms", d.CallTimeout.Milliseconds())
	dir, err := json.Marshal(l.Dir)
	if err != nil {
		return start{}, err
	}
	table("projects." + string(dir))
	set("trust_level", "trusted")
	table("analytics")
	set("enabled", false)
	table("tui")
	set("screen_reader_detection_done", true)
	fmt.Fprintln(&config, "terminal_title = []") // the title is the session's banner

	s := start{
		env:  map[string]string{"OPENAI_API_KEY": Placeholder},
		home: map[string][]byte{".codex/config.toml": config.Bytes()},
	}
	exec := []string{"exec", "--skip-git-repo-check"}
	s.task = append(append(slices.Clone(exec), l.Args...), "--", nucleus.TaskHere)
	if l.Prompt != "" {
		s.argv = append(s.argv, exec...)
	}
	s.argv = append(s.argv, l.Args...)
	if l.Prompt != "" {
		s.argv = append(s.argv, "--", l.Prompt)
	}
	return s, nil
}
