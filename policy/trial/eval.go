// Package trial tries policies out on sessions that did not happen, or happened
// under another policy.
//
// Claim: a trial decides with policy.Decide and nothing else, and lets the exposure
// grow as a node does: what goes ahead takes its legs, an ask counts as granted, a
// denial takes nothing. What it cannot judge it says, and counts as such.
//
// It has no workspace: paths are taken as they are written, and the files that an
// argv names are known only from a log.
package trial

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"cal/nucleus"
	"cal/policy"
)

// Evaluator answers lines of `cal policy eval`. Policy finds a policy by its name;
// Fetch resolves the method and URL of a web_fetch; UnixMilli is the time of every
// decision.
type Evaluator struct {
	Policy    func(name string) (*policy.Policy, error)
	Fetch     func(method, url string) (nucleus.Fetch, error)
	UnixMilli int64
}

// MaxLine is the largest line that is read, and MaxSteps the longest session.
const (
	MaxLine  = 4 << 20
	MaxSteps = 100_000
)

type answer struct {
	Decisions []decided `json:"decisions"`
}

type decided struct {
	Decision nucleus.Verdict `json:"decision"`
	Rule     string          `json:"rule"`
	Legs     []string        `json:"legs"` // of the session, after the step
}

// Line judges one session, {"policy": NAME or object, "session": [STEP...]}, and
// returns {"decisions": [{"decision", "rule", "legs"}...]}, one for each step.
func (e *Evaluator) Line(line []byte) ([]byte, error) {
	p, session, err := e.read(line)
	if err != nil {
		return nil, err
	}
	result := answer{Decisions: make([]decided, 0, len(session))}
	var exposure nucleus.Legs
	for i, raw := range session {
		s, err := e.readStep(raw)
		if err != nil {
			return nil, fmt.Errorf("session[%d]: %w", i, err)
		}
		var d nucleus.Decision
		d, exposure = s.judge(p, nucleus.Context{Exposure: exposure, UnixMilli: e.UnixMilli})
		result.Decisions = append(result.Decisions, decided{d.Verdict, d.Rule, exposure.Names()})
	}
	return json.Marshal(result)
}

func (e *Evaluator) read(line []byte) (*policy.Policy, []json.RawMessage, error) {
	const want = `want {"policy": NAME or object, "session": [{"op": ...}, ...]}`
	if len(line) > MaxLine {
		return nil, nil, fmt.Errorf("the line has %d bytes; at most %d are read", len(line), MaxLine)
	}
	canonical, err := nucleus.CanonicalJSON(line) // refuses what two readers could understand differently
	if err != nil {
		return nil, nil, fmt.Errorf("not JSON: %w; %s", err, want)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(canonical, &members); err != nil || members == nil {
		return nil, nil, errors.New("the line is no object; " + want)
	}
	for key := range members {
		if key != "policy" && key != "session" {
			return nil, nil, fmt.Errorf("the line has the unknown key %q; %s", key, want)
		}
	}
	var session []json.RawMessage
	if err := json.Unmarshal(members["session"], &session); err != nil || session == nil {
		return nil, nil, errors.New("session is missing or no list; " + want)
	}
	if len(session) > MaxSteps {
		return nil, nil, fmt.Errorf("session has %d steps; at most %d are read", len(session), MaxSteps)
	}
	p, err := e.policy(members["policy"])
	return p, session, err
}

func (e *Evaluator) policy(raw json.RawMessage) (*policy.Policy, error) {
	raw = bytes.TrimSpace(raw)
	switch {
	case len(raw) > 0 && raw[0] == '{':
		return policy.Load("policy", raw)
	case len(raw) > 0 && raw[0] == '"':
		var name string
		if err := json.Unmarshal(raw, &name); err != nil {
			return nil, err
		}
		return e.Policy(name)
	}
	return nil, errors.New("policy is missing; want a name or an object")
}

// Step judges a single step in a session that has the given exposure, and returns
// what was judged too.
func (e *Evaluator) Step(p *policy.Policy, raw []byte, exposure nucleus.Legs) (nucleus.Action, nucleus.Context, nucleus.Decision, error) {
	canonical, err := nucleus.CanonicalJSON(raw)
	if err != nil {
		return nucleus.Action{}, nucleus.Context{}, nucleus.Decision{}, fmt.Errorf("the step is not JSON: %w", err)
	}
	s, err := e.readStep(canonical)
	if err != nil {
		return nucleus.Action{}, nucleus.Context{}, nucleus.Decision{}, fmt.Errorf("the step %w", err)
	}
	c := nucleus.Context{Exposure: exposure, UntrustedRepo: s.untrusted, UnixMilli: e.UnixMilli}
	d, _ := s.judge(p, c)
	return s.actionUnder(p), c, d, nil
}
