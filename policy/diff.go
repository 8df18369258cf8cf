package policy

import (
	"fmt"
	"slices"

	"cal/nucleus"
)

// Difference is one rule by which two policies differ. Example is a step that the
// one denies and the other does not, the shortest that was found; empty for what no
// single step shows.
type Difference struct {
	More    bool   `json:"more"` // b allows more than a
	Scope   string `json:"scope"`
	Rule    string `json:"rule"`
	Example string `json:"example,omitempty"`
}

// Diff lists what b allows more and less than a, as rules. It is empty iff the two
// are equal.
func Diff(a, b *Policy) []Difference {
	var d differ
	for i, op := range nucleus.Ops() {
		d.duty(string(op), a.duties[i], b.duties[i])
	}
	diffSet(&d, "paths.roots", a, b, a.roots, b.roots, root.examples, []nucleus.Action{readAction("a"), readAction("x/y")})
	d.blocked(a.blocked, b.blocked)
	diffSet(&d, "commands", a, b, a.commands, b.commands, argv.examples, []nucleus.Action{runAction("x"), runAction("sh"), runAction("y", "z")})
	diffSet(&d, "hosts", a, b, a.hosts, b.hosts, hostRule.examples, []nucleus.Action{
		{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: "x", Port: 443}}, {Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: "y.invalid", Port: 1}},
	})
	none := func(span) []nucleus.Action { return nil }
	diffSet(&d, "trusted_origins", a, b, a.origins, b.origins, none, nil)
	d.limits(a, b)
	return d.all
}

type differ struct{ all []Difference }

func (d *differ) add(more bool, scope, rule, example string) {
	d.all = append(d.all, Difference{more, scope, rule, example})
}

func (d *differ) duty(op string, a, b duty) {
	if a == b {
		return
	}
	rule := fmt.Sprintf("%s instead of %s", b, a)
	if !b.leq(a) {
		d.add(true, "operations."+op, rule, Step(nucleus.Action{Op: nucleus.Op(op)}))
	}
	if !a.leq(b) {
		d.add(false, "operations."+op, rule, Step(nucleus.Action{Op: nucleus.Op(op)}))
	}
}

func (d duty) String() string {
	if d.approvals > 1 {
		return fmt.Sprintf("%s (%d approvals)", d.level, d.approvals)
	}
	return d.level.String()
}

// diffSet lists the rules of each set that are not below the other. An example is an
// action that the scope of the one denies and that of the other does not.
func diffSet[R rule[R]](d *differ, scope string, a, b *Policy, sa, sb set[R], examples func(R) []nucleus.Action, anything []nucleus.Action) {
	one := func(more bool, from, to *Policy, sf, st set[R]) {
		if st.any && !sf.any {
			d.add(more, scope, "any", tell(from, to, anything))
		}
		for _, r := range st.only {
			if !sf.any && !sf.holds(r) {
				d.add(more, scope, r.String(), tell(from, to, examples(r)))
			}
		}
	}
	one(true, a, b, sa, sb)
	one(false, b, a, sb, sa)
}

// tell returns the first action that the scopes of denies deny and those of allows
// do not. What paths.blocked says has its own lines.
func tell(denies, allows *Policy, actions []nucleus.Action) string {
	p, q := *denies, *allows
	p.blocked, q.blocked = newBlocked(nil), newBlocked(nil)
	for i := range actions {
		a := actions[i]
		if a.Op == nucleus.RunBash { // where it runs is no matter of commands
			p.roots, q.roots = everything[root](), everything[root]()
		}
		if p.scope(&a).denied && !q.scope(&a).denied {
			return Step(a)
		}
	}
	return ""
}

func (d *differ) blocked(a, b blocked) {
	one := func(more bool, from, to blocked) {
		for _, pattern := range from.patterns {
			if slices.Contains(to.patterns, everythingBlocked) || slices.Contains(to.patterns, pattern) {
				continue
			}
			example := ""
			if name := examplePath(pattern); !to.matches(name) {
				example = Step(readAction(name))
			}
			d.add(more, "paths.blocked", pattern, example)
		}
	}
	one(true, a, b)
	one(false, b, a)
}

func (d *differ) limits(a, b *Policy) {
	for _, l := range []struct {
		name string
		a, b int64
	}{
		{"budget.usd (millionths)", a.budget.microUSD, b.budget.microUSD}, {"budget.tokens", a.budget.tokens, b.budget.tokens}, {"budget.seconds", a.budget.seconds, b.budget.seconds},
	} {
		if l.a != l.b {
			d.add(l.b > l.a, l.name, fmt.Sprintf("%s instead of %s", amount(l.b), amount(l.a)), "")
		}
	}
	if a.window == b.window {
		return
	}
	rule := fmt.Sprintf("%s instead of %s", b.window, a.window)
	if !b.window.leq(a.window) {
		d.add(true, "window", rule, "")
	}
	if !a.window.leq(b.window) {
		d.add(false, "window", rule, "")
	}
}

func amount(n int64) string {
	if n == unlimited {
		return "unlimited"
	}
	return fmt.Sprint(n)
}

func (w window) String() string {
	switch {
	case w == always:
		return "always"
	case w == window{}:
		return "never"
	case w.from == always.from:
		return "until " + formatTime(w.until)
	case w.until == always.until:
		return "from " + formatTime(w.from)
	}
	return "from " + formatTime(w.from) + " until " + formatTime(w.until)
}
