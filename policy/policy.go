package policy

import (
	"slices"

	"cal/nucleus"
)

// Policy says what an agent may do. It is made by Load, Profile, Top, Bottom,
// Meet, Join and Nu, always in normal form, and never changes; any number of
// readers may share it. The zero value denies everything, and so does nil.
type Policy struct {
	name     string
	duties   [ops]duty
	roots    set[root]
	blocked  blocked
	commands set[argv]
	hosts    set[hostRule]
	budget   budget
	window   window
	origins  set[span] // never any: "**" is the pattern of all

	hostNames, commandNames []string        // what decisions call the rules
	rootNames               map[string]bool // those of roots.only
}

// seal completes a policy whose scopes are all set.
func (p *Policy) seal() *Policy {
	p.hostNames = p.hosts.names("hosts")
	p.commandNames = p.commands.names("commands")
	p.rootNames = make(map[string]bool, len(p.roots.only))
	for _, r := range p.roots.only {
		p.rootNames[string(r)] = true
	}
	return p
}

// Top returns the policy that no other is looser than.
func Top() *Policy {
	p := &Policy{
		roots:    everything[root](),
		blocked:  newBlocked(nil),
		commands: everything[argv](),
		hosts:    everything[hostRule](),
		budget:   noBudgetLimit,
		window:   always,
		origins:  downset([]span{{below: true}}),
	}
	for i := range p.duties {
		p.duties[i] = duty{Always, 1}
	}
	return p.seal()
}

// Bottom returns the policy that no other is stricter than.
func Bottom() *Policy {
	return (&Policy{blocked: newBlocked([]string{everythingBlocked})}).seal()
}

// Meet returns the loosest policy that allows nothing which a or b does not. It
// keeps the name when both have the same.
func Meet(a, b *Policy) *Policy {
	m := &Policy{
		name:     commonName(a, b),
		roots:    a.roots.meet(b.roots),
		blocked:  a.blocked.meet(b.blocked),
		commands: a.commands.meet(b.commands),
		hosts:    a.hosts.meet(b.hosts),
		budget:   a.budget.meet(b.budget),
		window:   a.window.meet(b.window),
		origins:  a.origins.meet(b.origins),
	}
	for i := range m.duties {
		m.duties[i] = a.duties[i].meet(b.duties[i])
	}
	return m.seal()
}

// Join returns the strictest policy of which a and b are both parts.
func Join(a, b *Policy) *Policy {
	j := &Policy{
		name:     commonName(a, b),
		roots:    a.roots.join(b.roots),
		blocked:  a.blocked.join(b.blocked),
		commands: a.commands.join(b.commands),
		hosts:    a.hosts.join(b.hosts),
		budget:   a.budget.join(b.budget),
		window:   a.window.join(b.window),
		origins:  a.origins.join(b.origins),
	}
	for i := range j.duties {
		j.duties[i] = a.duties[i].join(b.duties[i])
	}
	return j.seal()
}

func commonName(a, b *Policy) string {
	if a.name == b.name {
		return a.name
	}
	return ""
}

// Leq reports whether a is equal to or stricter than b in every dimension.
func Leq(a, b *Policy) bool {
	for i := range a.duties {
		if !a.duties[i].leq(b.duties[i]) {
			return false
		}
	}
	return a.roots.leq(b.roots) && a.blocked.leq(b.blocked) && a.commands.leq(b.commands) &&
		a.hosts.leq(b.hosts) && a.budget.leq(b.budget) && a.window.leq(b.window) && a.origins.leq(b.origins)
}

// Equal reports whether a and b are the same point of the order; names may
// differ.
func Equal(a, b *Policy) bool { return Leq(a, b) && Leq(b, a) }

// Name is the policy's name, empty where it has none.
func (p *Policy) Name() string { return p.name }

// Level is the declared level of an operation, before nu.
func (p *Policy) Level(op nucleus.Op) Level {
	if i := opIndex(op); i >= 0 {
		return p.duties[i].level
	}
	return Never
}

// Blocked reports whether a pattern of paths.blocked matches name or a directory
// above it. name is clean and relative to the workspace.
//
// A search is decided by the directory that it starts from; whoever carries it
// out skips what Blocked names, and asks again for the name that a link led to.
func (p *Policy) Blocked(name string) bool { return p.blocked.matches(name) }

// BlockedPatterns lists paths.blocked in normal form.
func (p *Policy) BlockedPatterns() []string { return slices.Clone(p.blocked.patterns) }

// Network reports whether p lets anything on a network be reached from the machine. The agent's
// model and a push or pull request, which the host makes, are no part of it.
func (p *Policy) Network() bool {
	enabled := func(op nucleus.Op) bool { return p.Level(op) != Never }
	named := p.hosts.any || len(p.hosts.only) > 0
	return named && (enabled(nucleus.NetConnect) || enabled(nucleus.WebFetch)) || enabled(nucleus.WebSearch)
}

// Nu returns p with the obligations that the lethal trifecta makes necessary:
// where p enables all three legs, git_push and create_pr ask at least, and where
// hosts is any so do web_fetch and net_connect. It is idempotent and
// deflationary, nu(a) ^ nu(b) <= nu(a ^ b), and its fixed points are closed under
// meet; it is neither monotone nor does it preserve meets. Derived obligations
// are never stored: apply it last, to the meet of what was declared.
func Nu(p *Policy) *Policy {
	n := *p
	for i := range n.duties {
		if p.lowers(i, machine{}) {
			n.duties[i].level = Ask
		}
	}
	return &n
}

// lowers reports whether nu lowers operation i in the machine.
func (p *Policy) lowers(i int, m machine) bool {
	if p.duties[i].level != Always {
		return false
	}
	switch i {
	case opGitPush, opCreatePR:
	case opWebFetch, opNetConnect:
		if !p.hosts.any {
			return false
		}
	case opRunBash:
		if !m.directNetwork {
			return false
		}
	default:
		return false
	}
	return p.enables(m).Has(allLegs)
}

const allLegs = nucleus.Private | nucleus.Untrusted | nucleus.WayOut

var (
	opRunBash    = opIndex(nucleus.RunBash)
	opWebFetch   = opIndex(nucleus.WebFetch)
	opNetConnect = opIndex(nucleus.NetConnect)
	opGitPush    = opIndex(nucleus.GitPush)
	opCreatePR   = opIndex(nucleus.CreatePR)
)

// enables are the legs of all operations that are not never. What a repository's
// label adds is left to the exposure gate: nu reads the policy alone.
func (p *Policy) enables(m machine) nucleus.Legs {
	var legs nucleus.Legs
	for i, d := range p.duties {
		if d.level != Never {
			legs |= machine{directNetwork: m.directNetwork}.legs(i)
		}
	}
	return legs
}

// Digest is the hex SHA-256 of the canonical bytes.
func (p *Policy) Digest() (string, error) {
	canonical, err := p.Canonical()
	if err != nil {
		return "", err
	}
	return nucleus.SHA256(canonical), nil
}
