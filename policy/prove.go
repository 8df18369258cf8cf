package policy

import (
	"fmt"

	"cal/nucleus"
)

// Proof is the answer of Prove. With a counterexample the property does not hold.
type Proof struct {
	Holds          bool     `json:"holds"`
	Assumptions    []string `json:"assumptions"`
	States         int      `json:"states"` // exposures in machines that sessions can be in
	Counterexample []string `json:"counterexample,omitempty"`
}

// Prove tries every session in every kind of machine: its steps are one action for
// each operation and rule, an ask is granted, a denial changes nothing. It holds iff
// no session that has met private data and untrusted content goes on to a way out
// that is allowed without an approval, given the assumptions; else the
// counterexample is a shortest such session. With trustNothing the rules that are
// trusted and the labels of repositories are not believed.
//
// What a step really carries comes from the leg table alone; what is decided, from
// Decide. A machine with a network that does not pass the gateway is outside: there
// only run_bash is decided.
func Prove(p *Policy, trustNothing bool) Proof {
	result := Proof{Holds: true, Assumptions: assumptions(p, trustNothing)}
	steps := p.steps()
	for code := range 4 {
		c := nucleus.Context{UntrustedRepo: code&1 != 0, Contained: code&2 != 0, UnixMilli: p.window.from}
		example, states := p.search(steps, c, trustNothing)
		result.States += states
		if example != nil && (result.Holds || len(example) < len(result.Counterexample)) {
			result.Holds, result.Counterexample = false, example
		}
	}
	return result
}

func assumptions(p *Policy, trustNothing bool) []string {
	all := []string{
		"the machine has no network that does not pass the gateway",
		"what a person grants has been read by the person",
	}
	if trustNothing {
		return all
	}
	for _, rule := range p.TrustedRules() {
		all = append(all, "trusted, counts on no leg: "+rule)
	}
	all = append(all, "a repository without a remote, or that a person calls trusted, holds nothing of a stranger")
	for _, origin := range p.origins.only {
		all = append(all, "trusted origin, holds nothing of a stranger: "+origin.String())
	}
	return all
}

// steps are actions for each operation and rule that might be allowed. Decide
// depends on an action by its operation and by what the scopes say, so one of each
// kind stands for all.
func (p *Policy) steps() []nucleus.Action {
	type kind struct {
		op              nucleus.Op
		denied, trusted bool
	}
	var all []nucleus.Action
	seen := map[kind]bool{}
	add := func(a nucleus.Action) {
		s := p.scope(&a)
		if k := (kind{a.Op, s.denied, s.trusted}); !seen[k] {
			seen[k] = true
			all = append(all, a)
		}
	}
	name := "a"
	if len(p.roots.only) > 0 {
		name = p.roots.only[0].examples()[0].Files[0].Path
	}
	for _, op := range nucleus.Ops() {
		switch op {
		case nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles, nucleus.GlobSearch, nucleus.GrepSearch:
			a := readAction(name)
			a.Op = op
			add(a)
		case nucleus.RunBash:
			rules := p.commands.only
			if p.commands.any {
				rules = []argv{{}}
			}
			for _, r := range rules {
				a := r.examples()[0]
				if a.Command.Dir = name; !p.inRoots(name) || len(p.roots.only) == 0 || p.roots.only[0] == "." {
					a.Command.Dir = "."
				}
				add(a)
			}
		case nucleus.GitCommit:
			add(nucleus.Action{Op: op, Commit: &nucleus.Commit{Repo: ".", Paths: []string{name}}})
		case nucleus.WebFetch, nucleus.NetConnect:
			for _, a := range p.hostSteps(op) {
				add(a)
			}
		default:
			add(nucleus.Action{Op: op})
		}
	}
	return all
}

func (p *Policy) hostSteps(op nucleus.Op) (all []nucleus.Action) {
	rules := p.hosts.only
	if p.hosts.any {
		rules = []hostRule{{name: "x", port: 443, methods: allMethods, anyPath: true}}
	}
	for _, r := range rules {
		if op == nucleus.NetConnect && r.opaque() {
			all = append(all, r.examples()...)
			continue
		}
		request := r
		request.methods = r.methods &^ (1 << len(methodNames))
		for _, a := range request.examples() {
			if op == nucleus.NetConnect {
				a = plain(a)
			}
			all = append(all, a)
		}
	}
	return all
}

// search walks the exposures breadth first. A state is what the node believes and
// what is true; the two differ only where nothing is trusted.
func (p *Policy) search(steps []nucleus.Action, c nucleus.Context, trustNothing bool) (example []string, states int) {
	type state struct{ believed, real nucleus.Legs }
	const met = nucleus.Private | nucleus.Untrusted
	believed := Start(c)
	real := believed
	if trustNothing && c.Contained {
		real |= nucleus.Untrusted
	}
	start := state{believed, real}
	trail := map[state][]string{start: nil}
	queue := []state{start}
	for ; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		for i := range steps {
			a := steps[i]
			c.Exposure = at.believed
			d := p.Decide(a, c)
			if d.Verdict != nucleus.Allow && d.Verdict != nucleus.Ask {
				continue
			}
			carries := machine{untrustedRepo: c.UntrustedRepo || trustNothing}.legs(opIndex(a.Op))
			if !trustNothing && p.scope(&a).trusted {
				carries = 0
			}
			before := at.real
			if a.Op == nucleus.NetConnect {
				before |= carries & nucleus.Untrusted
			}
			session := func() []string { return append(trail[at][:len(trail[at]):len(trail[at])], Step(a)) }
			if d.Verdict == nucleus.Allow && carries.Has(nucleus.WayOut) && before.Has(met) {
				return append([]string{fmt.Sprintf("machine: repository untrusted %v, contained %v", c.UntrustedRepo, c.Contained)}, session()...), len(trail)
			}
			next := state{at.believed | d.Takes, at.real | carries}
			if _, seen := trail[next]; !seen {
				trail[next] = session()
				queue = append(queue, next)
			}
		}
	}
	return nil, len(trail)
}
