package policy

import (
	"math"

	"cal/nucleus"
)

// Canonical returns the RFC 8785 bytes of the policy. Load reads them back to an
// equal policy, and equal policies of one name have the same bytes.
func (p *Policy) Canonical() ([]byte, error) {
	operations, obligations := object{}, object{}
	for i, op := range nucleus.Ops() {
		if d := p.duties[i]; d.level != Never {
			operations[string(op)] = d.level
			if d.approvals > 1 {
				obligations[string(op)] = object{"approvals": d.approvals}
			}
		}
	}
	document := object{
		"operations": operations,
		"paths": object{
			"roots":   setJSON(p.roots, func(r root) any { return r }),
			"blocked": append([]string{}, p.blocked.patterns...),
		},
		"commands": setJSON(p.commands, func(a argv) any { return a.elements() }),
		"hosts":    setJSON(p.hosts, hostRule.json),
	}
	document.add("name", p.name, p.name != "")
	document.add("obligations", obligations, len(obligations) > 0)
	document.add("budget", p.budget.json(), p.budget != noBudgetLimit)
	document.add("window", p.window.json(), p.window != always)
	document.add("trusted_origins", texts(p.origins.only), len(p.origins.only) > 0)
	return nucleus.Canonical(document)
}

type object map[string]any

func (o object) add(key string, value any, present bool) {
	if present {
		o[key] = value
	}
}

func setJSON[R rule[R]](s set[R], element func(R) any) any {
	if s.any {
		return "any"
	}
	only := make([]any, len(s.only))
	for i, r := range s.only {
		only[i] = element(r)
	}
	return object{"only": only}
}

func (r hostRule) json() any {
	o := object{"host": r.host(), "port": r.port}
	o.add("methods", r.methods.list(), r.methods != allMethods)
	o.add("path", r.pathText(), !r.anyPath)
	o.add("trusted", true, r.trusted)
	return o
}

func (b budget) json() any {
	o := object{}
	o.add("usd", float64(b.microUSD)/1e6, b.microUSD != unlimited)
	o.add("tokens", b.tokens, b.tokens != unlimited)
	o.add("seconds", b.seconds, b.seconds != unlimited)
	return o
}

func (w window) json() any {
	o := object{}
	o.add("from", formatTime(w.from), w.from != math.MinInt64)
	o.add("until", formatTime(w.until), w.until != math.MaxInt64)
	return o
}

func texts[R rule[R]](rules []R) []string {
	out := make([]string, len(rules))
	for i, r := range rules {
		out[i] = r.String()
	}
	return out
}
