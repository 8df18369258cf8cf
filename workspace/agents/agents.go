// Package agents knows the coding agents that people use: where their install
// lies, and how each is started so that its tools are CAL's.
//
// An agent is the program that a hostile page or repository speaks to, and it
// changes every week. So nothing here is a wall. The wall of mediated mode is what
// the agent's own root does not hold - no workspace, no shell, no git, no
// interpreter but its own - and it stands when every flag below is ignored. The
// flags are for the model's sake: it is offered only what works.
//
// What the package promises: the layers of an agent's root are the agent's own
// program, the libraries that it names, certificates and terminal descriptions,
// and nothing else of the host; of the person's environment an agent gets the
// terminal, language and time zone, never more; what it gets as a credential is a
// placeholder; and no first-run question stands between the person and the agent.
package agents

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"cal/nucleus"
)

// Placeholder is what an agent gets for a credential. The model route takes it
// away and adds the real one outside the machine.
const Placeholder = "placeholder-held-by-cal"

// toolTimeout bounds one MCP call as the built-in agents see it: a long test run, or a
// person who is asked and takes a while.
const toolTimeout = 2 * time.Hour

// Definition is one agent that CAL knows how to start.
type Definition struct {
	Name           string   // "claude-code"
	Title          string   // "Claude Code"
	Program        string   // the command: "claude"
	Package        string   // on npm
	MinVersion     string   // the oldest that has been tried with this recipe
	InstallHint    string   // a command
	ModelProtocol  string   // as in nucleus.Model
	KeyEnv         []string // where a person's credential may stand, first wins
	BaseURLEnv     string
	DefaultBaseURL string        // what comes before /v1 in the provider's paths
	CallTimeout    time.Duration // how long its client waits for one tool call, as the recipe tells it to
	Instructions   []string      // file names that it reads in a project, first wins

	bearer   []string // those of KeyEnv that are sent as Authorization where others are not
	versions string   // what `--version` prints, with %s for the version
	native   func(arch string) []nativePackage
	beside   []string // further programs of the install, next to the native one
	recipe   func(Definition, Launch) (start, error)
}

var definitions = []Definition{claudeCode, codex, opencode}

// Find returns the definition of a name.
func Find(name string) (Definition, error) {
	for _, d := range definitions {
		if d.Name == name {
			return d, nil
		}
	}
	return Definition{}, fmt.Errorf("unknown agent %q; known: %s", name, strings.Join(Names(), ", "))
}

// Names lists the agents that Find knows.
func Names() []string {
	var names []string
	for _, d := range definitions {
		names = append(names, d.Name)
	}
	return names
}

// Missing says that something of the person's is not there: what is so, and what
// to do about it, a line each.
type Missing struct{ Fact, Hint string }

func (m *Missing) Error() string { return m.Fact }

// Model is the route to the agent's model, from the environment of the person
// who launches it. The error is a *Missing where no credential is found.
func (d Definition) Model(env map[string]string) (nucleus.Model, error) {
	m := nucleus.Model{Protocol: d.ModelProtocol, BaseURL: d.DefaultBaseURL}
	if base := env[d.BaseURLEnv]; base != "" {
		m.BaseURL = strings.TrimRight(base, "/")
		if d.ModelProtocol == "openai" { // whose base URLs end in the version
			var ok bool
			if m.BaseURL, ok = strings.CutSuffix(m.BaseURL, "/v1"); !ok {
				return nucleus.Model{}, fmt.Errorf("%s is %q, which does not end in /v1", d.BaseURLEnv, base)
			}
		}
	}
	if name := d.KeyFrom(env); name != "" {
		m.Key, m.Bearer = env[name], slices.Contains(d.bearer, name)
		return m, nil
	}
	return nucleus.Model{}, &Missing{
		Fact: fmt.Sprintf("no credential for %s: %s not set", d.Title, oneOf(d.KeyEnv)),
		Hint: fmt.Sprintf("export %s=... (it stays outside the machine)", d.KeyEnv[0]),
	}
}

// KeyFrom names the variable that holds the person's credential; "" where none does.
func (d Definition) KeyFrom(env map[string]string) string {
	for _, name := range d.KeyEnv {
		if env[name] != "" {
			return name
		}
	}
	return ""
}

func oneOf(names []string) string {
	if len(names) == 1 {
		return names[0] + " is"
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1] + " are"
}
