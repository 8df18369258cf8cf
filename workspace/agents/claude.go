package agents

import (
	"encoding/json"
	"slices"
	"strconv"

	"cal/nucleus"
)

var claudeCode = Definition{
	Name:           "claude-code",
	Title:          "Claude Code",
	Program:        "claude",
	Package:        "@anthropic-ai/claude-code",
	MinVersion:     "2.1.197",
	InstallHint:    "npm install -g @anthropic-ai/claude-code",
	ModelProtocol:  "anthropic",
	KeyEnv:         []string{"ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"},
	CallTimeout:    toolTimeout,
	BaseURLEnv:     "ANTHROPIC_BASE_URL",
	DefaultBaseURL: "https://api.anthropic.com",
	Instructions:   []string{"CLAUDE.md", "AGENTS.md"},
	bearer:         []string{"CLAUDE_CODE_OAUTH_TOKEN"},
	versions:       "%s (Claude Code)",
	native: func(arch string) []nativePackage {
		cpu := map[string]string{"amd64": "x64", "arm64": "arm64"}[arch]
		return []nativePackage{
			{"@anthropic-ai/claude-code-linux-" + cpu, "claude"},
			{"@anthropic-ai/claude-code-linux-" + cpu + "-musl", "claude"},
		}
	},
	recipe: startClaude,
}

func startClaude(d Definition, l Launch) (start, error) {
	s := start{
		env: map[string]string{
			"ANTHROPIC_BASE_URL":                                   l.ModelURL,
			"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC":             "1",
			"CLAUDE_CODE_DISABLE_FEEDBACK_SURVEY":                  "1",
			"CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
			"CLAUDE_CODE_DISABLE_TERMINAL_TITLE":                   "1", // the title is the session's banner
			"DISABLE_AUTOUPDATER":                                  "1",
			"DISABLE_INSTALLATION_CHECKS":                          "1",
			"ENABLE_CLAUDEAI_MCP_SERVERS":                          "false",
			"ENABLE_TOOL_SEARCH":                                   "false", // every tool is shown to the model at once
			"MCP_CONNECTION_NONBLOCKING":                           "false",
			"MCP_TOOL_TIMEOUT":                                     strconv.FormatInt(d.CallTimeout.Milliseconds(), 10),
		},
		home: map[string][]byte{},
	}
	if l.Bearer {
		s.env["CLAUDE_CODE_OAUTH_TOKEN"] = Placeholder
	} else {
		s.env["ANTHROPIC_API_KEY"] = Placeholder
	}
	if err := s.answerClaude(d, l); err != nil {
		return start{}, err
	}
	if l.Mode == nucleus.Mediated {
		s.env["CLAUDE_CODE_DISABLE_AUTO_MEMORY"] = "1"   // its HOME ends with the session
		s.env["CLAUDE_CODE_DISABLE_AGENT_VIEW"] = "1"    // background agents would start without these flags
		s.env["ENABLE_MCP_LARGE_OUTPUT_FILES"] = "false" // it has no tool to read such a file with
		s.argv = append(s.argv, "--strict-mcp-config", "--setting-sources", "project", "--allowedTools", "mcp__cal", "--append-system-prompt", note)
		if !l.BuiltinTools {
			s.argv = append(s.argv, "--tools", "")
		}
	}
	if l.Mode == nucleus.Contained || l.BuiltinTools {
		s.env["IS_SANDBOX"] = "1"
		s.argv = append(s.argv, "--dangerously-skip-permissions", "--settings", `{"skipDangerousModePermissionPrompt":true}`)
	}
	if l.MCPURL != "" {
		config, err := json.Marshal(map[string]any{"mcpServers": map[string]any{"cal": map[string]any{"type": "http", "url": l.MCPURL, "alwaysLoad": true}}})
		if err != nil {
			return start{}, err
		}
		s.argv = append(s.argv, "--mcp-config", string(config))
	}
	s.argv = append(s.argv, l.Args...)
	s.task = append(slices.Clone(s.argv), "--print", "--", nucleus.TaskHere)
	if l.Prompt != "" {
		s.argv = append(s.argv, "--print", "--", l.Prompt)
	}
	return s, nil
}

// answerClaude answers the questions of a first run: theme, login, whether the
// folder is trusted, whether the key in the environment may be used, imports of
// instruction files from elsewhere (no).
func (s start) answerClaude(d Definition, l Launch) error {
	config, err := json.Marshal(map[string]any{
		"hasCompletedOnboarding": true,
		"lastOnboardingVersion":  d.MinVersion,
		"theme":                  "dark",
		"customApiKeyResponses":  map[string]any{"approved": []string{Placeholder[max(0, len(Placeholder)-20):]}, "rejected": []string{}},
		"projects": map[string]any{l.Dir: map[string]any{
			"hasTrustDialogAccepted":                  true,
			"hasCompletedProjectOnboarding":           true,
			"hasClaudeMdExternalIncludesApproved":     false,
			"hasClaudeMdExternalIncludesWarningShown": true,
		}},
	})
	if err != nil {
		return err
	}
	s.home[".claude.json"] = config
	return nil
}
