// Package script is a model that says what it is told: an HTTP server that
// speaks the inference API of a provider and answers every request with the next
// step of a script. Tests and the demo drive real agents with it, without an
// account and without a network beyond loopback.
//
// Whoever uses it trusts two things. The answer is the one that the provider
// would send, event by event, so that an agent that works here works there. And
// the place in the script is read from the conversation that the agent sends
// back, never from a counter, so that a request that is repeated, aborted or made
// at the same time as another does not move it. What agents ask beside their
// conversation (a title, a token count, a list of models) is answered without
// touching the script. Every request is kept as it arrived, so that a test can
// say which credential came over a route and what the model was shown.
package script

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
)

// Step is one answer of the model: text, a tool call, or text and then a call.
// A step without Tool ends the model's turn.
type Step struct {
	Text   string
	Server string // MCP server of Tool; empty for a tool of the agent's own
	Tool   string
	Args   any // encoded as JSON; nil is {}

	Status int  // not 0: answer with this HTTP status and the provider's form of an error; Text is its message
	Hold   bool // send the head of the answer, then nothing until the client leaves or the server stops
}

// Turn is what the agent has told the model so far in one conversation.
type Turn struct {
	N       int      // answers that the model has given in this conversation
	Prompt  string   // the newest text of the user
	Results []Result // of every tool call so far, oldest first
}

// Result is what came of one tool call.
type Result struct {
	Call  string // id of the call
	Text  string // its text parts, joined by newlines
	Error bool   // where the protocol says so: Anthropic does, OpenAI does not
}

// A Model answers a turn. It is called from several goroutines, and again for
// the same turn when an agent repeats a request.
type Model func(Turn) Step

// Steps is the model that gives the steps in order, and ends its turn with a
// sentence that says so when there is none left.
func Steps(steps ...Step) Model {
	steps = slices.Clone(steps)
	return func(t Turn) Step {
		if t.N < len(steps) {
			return steps[t.N]
		}
		return Step{Text: fmt.Sprintf("The script has %d steps and is at its end.", len(steps))}
	}
}

// arguments is the JSON of a step's Args, without escapes for HTML.
func (s Step) arguments() (json.RawMessage, error) {
	if s.Args == nil {
		return json.RawMessage("{}"), nil
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s.Args); err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", s.Tool, err)
	}
	return bytes.TrimSpace(buf.Bytes()), nil
}

// tokens is a plausible count for n bytes of text.
func tokens(n int) int { return n/4 + 1 }

// example is a value that a JSON schema describes, for the side requests that
// want one: a title, a summary.
func example(schema json.RawMessage) any {
	var s struct {
		Type       string
		Enum       []any
		MaxLength  *int
		Properties map[string]json.RawMessage
	}
	if json.Unmarshal(schema, &s) != nil {
		return nil
	}
	if len(s.Enum) > 0 {
		return s.Enum[0]
	}
	switch s.Type {
	case "object":
		object := map[string]any{}
		for name, property := range s.Properties {
			object[name] = example(property)
		}
		return object
	case "array":
		return []any{}
	case "boolean":
		return false
	case "integer", "number":
		return 0
	}
	text := "Scripted session"
	if s.MaxLength != nil && *s.MaxLength < len(text) {
		text = text[:max(*s.MaxLength, 0)]
	}
	return text
}
