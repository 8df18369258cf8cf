package agents

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"cal/nucleus"
)

// ownFile is an agent that the person describes: ~/.cal/agents/NAME.yaml. In Args
// and Env {prompt}, {mcp_url}, {model_url} and {placeholder} stand for their values. Task are the
// arguments by which it works as a sub-agent: one whole element, {task}, stands for the task.
// CallTimeoutS is how many seconds its client of MCP waits for a tool call, by default
// nucleus.CallSeconds.
type ownFile struct {
	Program string            `yaml:"program"` // absolute path of a native program
	Args    []string          `yaml:"args"`
	Model   string            `yaml:"model"` // "anthropic" or "openai"
	Task    []string          `yaml:"task"`
	Env     map[string]string `yaml:"env"`

	CallTimeoutS *int `yaml:"call_timeout_s"`
}

// Own reads the person's own definition of an agent and its install. Without
// a file the error is os.ErrNotExist.
func Own(path string) (Definition, Install, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return Definition{}, Install{}, err
	}
	var own ownFile
	document := yaml.NewDecoder(bytes.NewReader(raw))
	document.KnownFields(true)
	if err := document.Decode(&own); err != nil {
		return Definition{}, Install{}, fmt.Errorf("%s: %w", path, err)
	}
	d, err := own.definition(strings.TrimSuffix(filepath.Base(path), ".yaml"))
	if err != nil {
		return Definition{}, Install{}, fmt.Errorf("%s: %w", path, err)
	}
	binary, err := filepath.EvalSymlinks(own.Program)
	if err != nil {
		return Definition{}, Install{}, &Missing{Fact: fmt.Sprintf("%s: program %s: %v", path, own.Program, errors.Unwrap(err)), Hint: "name a program that is there"}
	}
	return d, Install{Path: own.Program, Binary: binary, Version: "of " + path}, nil
}

func (own ownFile) definition(name string) (Definition, error) {
	if !filepath.IsAbs(own.Program) {
		return Definition{}, fmt.Errorf("program %q is no absolute path", own.Program)
	}
	if n := len(slices.DeleteFunc(slices.Clone(own.Task), func(arg string) bool { return arg != nucleus.TaskHere })); len(own.Task) > 0 && n != 1 {
		return Definition{}, fmt.Errorf("task has %d elements that are %s, want one", n, nucleus.TaskHere)
	}
	call := nucleus.CallSeconds
	if own.CallTimeoutS != nil {
		call = *own.CallTimeoutS
	}
	if call < 10 || call > 86_400 {
		return Definition{}, fmt.Errorf("call_timeout_s %d: want 10 to 86400 seconds", call)
	}
	i := slices.IndexFunc(definitions, func(d Definition) bool { return d.ModelProtocol == own.Model })
	if i < 0 {
		return Definition{}, fmt.Errorf("model %q: want anthropic or openai", own.Model)
	}
	like := definitions[i] // the same provider: the same credentials and address
	return Definition{
		Name: name, Title: name, Program: filepath.Base(own.Program), ModelProtocol: like.ModelProtocol,
		KeyEnv: like.KeyEnv, BaseURLEnv: like.BaseURLEnv, DefaultBaseURL: like.DefaultBaseURL, bearer: like.bearer,
		CallTimeout: time.Duration(call) * time.Second, Instructions: []string{"AGENTS.md", "CLAUDE.md"}, recipe: own.start,
	}, nil
}

func (own ownFile) start(_ Definition, l Launch) (start, error) {
	fill := strings.NewReplacer("{prompt}", l.Prompt, "{mcp_url}", l.MCPURL, "{model_url}", l.ModelURL, "{placeholder}", Placeholder)
	s := start{env: map[string]string{}, home: map[string][]byte{}}
	for _, arg := range own.Args {
		s.argv = append(s.argv, fill.Replace(arg))
	}
	for _, arg := range own.Task {
		if arg != nucleus.TaskHere {
			arg = fill.Replace(arg)
		}
		s.task = append(s.task, arg)
	}
	for name, value := range maps.All(own.Env) {
		s.env[name] = fill.Replace(value)
	}
	return s, nil
}
