package agents

import (
	"encoding/json"
	"slices"
	"strings"

	"cal/nucleus"
)

var opencode = Definition{
	Name:           "opencode",
	Title:          "opencode",
	Program:        "opencode",
	Package:        "opencode-ai",
	MinVersion:     "1.18.33",
	InstallHint:    "npm install -g opencode-ai",
	ModelProtocol:  "anthropic",
	KeyEnv:         []string{"ANTHROPIC_API_KEY"},
	CallTimeout:    toolTimeout,
	BaseURLEnv:     "ANTHROPIC_BASE_URL",
	DefaultBaseURL: "https://api.anthropic.com",
	Instructions:   []string{"AGENTS.md", "CLAUDE.md"},
	versions:       "%s",
	native: func(arch string) []nativePackage {
		cpu := map[string]string{"amd64": "x64", "arm64": "arm64"}[arch]
		return []nativePackage{
			{"opencode-linux-" + cpu, "bin/opencode"},
			{"opencode-linux-" + cpu + "-baseline", "bin/opencode"},
		}
	},
	recipe: startOpencode,
}

// notePath is a file of instructions, below HOME.
const notePath = ".config/opencode/cal.md"

func startOpencode(d Definition, l Launch) (start, error) {
	mediated := l.Mode == nucleus.Mediated
	config := map[string]any{
		"$schema":           "https://opencode.ai/config.json",
		"autoupdate":        false,
		"share":             "disabled",
		"enabled_providers": []string{"anthropic"},
		"provider": map[string]any{"anthropic": map[string]any{
			"options": map[string]any{"baseURL": l.ModelURL + "/v1"},
		}},
		"permission": map[string]any{"*": "allow"}, // the machine is the sandbox
	}
	s := start{
		env: map[string]string{
			"ANTHROPIC_API_KEY":                Placeholder,
			"OPENCODE_DISABLE_AUTOUPDATE":      "1",
			"OPENCODE_DISABLE_DEFAULT_PLUGINS": "1", // they would be fetched
			"OPENCODE_DISABLE_LSP_DOWNLOAD":    "1",
			"OPENCODE_DISABLE_MODELS_FETCH":    "1", // it brings a list of its own
			"OPENCODE_DISABLE_SHARE":           "1",
			"OPENCODE_DISABLE_TERMINAL_TITLE":  "1", // the title is the session's banner
		},
		home: map[string][]byte{},
	}
	if mediated {
		config["instructions"] = []string{l.Home + "/" + notePath}
		s.home[notePath] = []byte(note + "\n")
		s.env["OPENCODE_DISABLE_EXTERNAL_SKILLS"] = "1" // to be read with its own tools
	}
	if l.MCPURL != "" {
		config["mcp"] = map[string]any{"cal": map[string]any{
			"type": "remote", "url": l.MCPURL, "enabled": true, "oauth": false, "timeout": d.CallTimeout.Milliseconds(),
		}}
	}
	if mediated && !l.BuiltinTools { // the last match wins
		config["permission"] = json.RawMessage(`{"*":"deny","cal_*":"allow"}`)
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return start{}, err
	}
	s.env["OPENCODE_CONFIG_CONTENT"] = string(raw)
	run := append([]string{"run"}, l.Args...)
	s.task = append(slices.Clone(run), "--", nucleus.TaskHere)
	if l.Prompt != "" {
		// An argument with a space in it would be put in quotes; they are joined by spaces again.
		s.argv = append(append(run, "--"), strings.Split(l.Prompt, " ")...)
	} else {
		s.argv = slices.Clone(l.Args)
	}
	return s, nil
}
