package policy

import (
	"cmp"
	"slices"
	"strconv"
)

// maxRules bounds a set. A file with more is refused; a meet or join whose exact
// result would have more allows nothing, so that no pair of policies can occupy
// the host for long.
const maxRules = 4096

// rule is an element of a partial order in which two elements that have anything
// below both have a greatest such element.
type rule[R any] interface {
	leq(R) bool
	meet(R) (R, bool) // false: nothing is below both
	String() string   // the same text iff the same rule
	kin() string      // what a rule shares with every rule below it; empty: nothing
}

// set is any, or the downset of only. Its zero value holds nothing. In normal
// form no rule is below another, rules are sorted by their text, and any has no
// rules.
type set[R rule[R]] struct {
	any  bool
	only []R
}

func everything[R rule[R]]() set[R] { return set[R]{any: true} }

// downset returns the normal form of the set that rules generate.
func downset[R rule[R]](rules []R) set[R] {
	type keyed struct {
		text string
		rule R
	}
	sorted := make([]keyed, len(rules))
	for i, r := range rules {
		sorted[i] = keyed{r.String(), r}
	}
	slices.SortFunc(sorted, func(a, b keyed) int { return cmp.Compare(a.text, b.text) })
	sorted = slices.CompactFunc(sorted, func(a, b keyed) bool { return a.text == b.text })
	above := map[string][]int{} // by kin: who could be above
	for i, k := range sorted {
		above[k.rule.kin()] = append(above[k.rule.kin()], i)
	}
	var maximal []R
	for i, k := range sorted {
		below := func(j int) bool { return i != j && k.rule.leq(sorted[j].rule) }
		kin := k.rule.kin()
		if !slices.ContainsFunc(above[""], below) && (kin == "" || !slices.ContainsFunc(above[kin], below)) {
			maximal = append(maximal, k.rule)
		}
	}
	if len(maximal) > maxRules {
		return set[R]{}
	}
	return set[R]{only: maximal}
}

func (s set[R]) holds(r R) bool {
	return s.any || slices.ContainsFunc(s.only, func(t R) bool { return r.leq(t) })
}

func (s set[R]) leq(t set[R]) bool {
	if t.any || s.any {
		return t.any
	}
	return !slices.ContainsFunc(s.only, func(r R) bool { return !t.holds(r) })
}

func (s set[R]) meet(t set[R]) set[R] {
	if s.any {
		return t
	}
	if t.any {
		return s
	}
	// A rule that lies below the other set is its own meet with it and covers all
	// its pairwise meets; only the rest needs the product.
	var out, left, right []R
	for _, r := range s.only {
		if t.holds(r) {
			out = append(out, r)
		} else {
			left = append(left, r)
		}
	}
	for _, r := range t.only {
		if s.holds(r) {
			out = append(out, r)
		} else {
			right = append(right, r)
		}
	}
	for _, a := range left {
		for _, b := range right {
			if r, ok := a.meet(b); ok {
				out = append(out, r)
			}
		}
		if len(out) > 4*maxRules {
			return set[R]{}
		}
	}
	return downset(out)
}

func (s set[R]) join(t set[R]) set[R] {
	if s.any || t.any {
		return everything[R]()
	}
	return downset(slices.Concat(s.only, t.only))
}

// names lists what a decision calls the rules of a set: NAME[0], NAME[1], ...
func (s set[R]) names(name string) []string {
	names := make([]string, len(s.only))
	for i := range names {
		names[i] = name + "[" + strconv.Itoa(i) + "]"
	}
	return names
}

// covers reports whether name is base or lies below it. The empty base covers
// everything.
func covers(base, name string) bool {
	if base == "" {
		return true
	}
	return len(name) >= len(base) && name[:len(base)] == base &&
		(len(name) == len(base) || name[len(base)] == '/')
}

// span is one name, or with below also all that lies under it: "base" and
// "base/**". Two spans are nested or disjoint.
type span struct {
	base  string
	below bool
}

func (s span) matches(name string) bool {
	if s.below {
		return covers(s.base, name)
	}
	return s.base == name
}

func (s span) leq(t span) bool {
	return t.matches(s.base) && (t.below || !s.below)
}

func (s span) meet(t span) (span, bool) {
	if s.leq(t) {
		return s, true
	}
	return t, t.leq(s)
}

func (s span) kin() string {
	if s.below {
		return ""
	}
	return s.base
}

func (s span) String() string {
	if !s.below {
		return s.base
	}
	if s.base == "" {
		return "**"
	}
	return s.base + "/**"
}
