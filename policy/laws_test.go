package policy

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"cal/nucleus"
)

// Each law is tried on each dimension alone, so that premises such as "c is below
// both" hold often, and then on all of them together.

// dimension draws one dimension of a policy whose others are at the top.
type dimension struct {
	name string
	draw func(*rapid.T, *Policy)
}

// The alphabets are small: rules must often be nested, equal or disjoint.
var dimensions = []dimension{
	{"operations", func(t *rapid.T, p *Policy) {
		// Fourteen independent levels are hardly ever comparable: often only two vary.
		narrow := rapid.Bool().Draw(t, "narrow")
		for i := range p.duties {
			if narrow && i != opRunBash && i != opGitPush {
				continue
			}
			p.duties[i] = duty{}
			if level := Level(rapid.IntRange(0, 2).Draw(t, "level")); level != Never {
				p.duties[i] = duty{level, uint8(rapid.IntRange(1, 3).Draw(t, "approvals"))}
			}
		}
	}},
	{"roots", func(t *rapid.T, p *Policy) {
		p.roots = drawSet(t, rapid.Map(rapid.SampledFrom([]string{".", "a", "b", "a/b", "a/c", "a/b/c", "ab"}), must(parseRoot)))
	}},
	{"blocked", func(t *rapid.T, p *Policy) {
		all := []string{"**", "**/*.pem", ".env*", "a/*", "a", "a/**", "a/**/b"}
		p.blocked = newBlocked(rapid.SliceOfN(rapid.Map(rapid.SampledFrom(all), must(parseBlocked)), 0, 3).Draw(t, "blocked"))
	}},
	{"commands", func(t *rapid.T, p *Policy) { p.commands = drawSet(t, rapid.Custom(drawArgv)) }},
	{"hosts", func(t *rapid.T, p *Policy) { p.hosts = drawSet(t, rapid.Custom(drawHost)) }},
	{"budget", func(t *rapid.T, p *Policy) {
		amount := rapid.SampledFrom([]int64{0, 1, 250_000, 5_000_000, unlimited})
		p.budget = budget{amount.Draw(t, "usd"), amount.Draw(t, "tokens"), amount.Draw(t, "seconds")}
		if p.budget.tokens == 0 && p.budget.seconds == 0 {
			p.budget.microUSD = unlimited
		}
	}},
	{"window", func(t *rapid.T, p *Policy) {
		from := rapid.SampledFrom([]int64{always.from, 0, 10, 20, 1_767_225_600_123}).Draw(t, "from")
		until := rapid.SampledFrom([]int64{always.until, 10, 20, 30, 1_798_761_600_000}).Draw(t, "until")
		p.window = window{from, until}.normal()
	}},
	{"origins", func(t *rapid.T, p *Policy) {
		all := []string{"**", "g.com/**", "g.com/o/**", "g.com/o/r", "g.com/o/r/**", "h.com/**", "g.com:8443/**", "file:/srv/**"}
		p.origins = downset(rapid.SliceOfN(rapid.Map(rapid.SampledFrom(all), must(parseOriginPattern)), 0, 3).Draw(t, "origins"))
	}},
}

func must[R any](parse func(string) (R, error)) func(string) R {
	return func(s string) R {
		r, err := parse(s)
		if err != nil {
			panic(err)
		}
		return r
	}
}

func drawSet[R rule[R]](t *rapid.T, rules *rapid.Generator[R]) set[R] {
	if rapid.IntRange(0, 7).Draw(t, "any") == 0 {
		return everything[R]()
	}
	return downset(rapid.SliceOfN(rules, 0, 4).Draw(t, "only"))
}

func drawArgv(t *rapid.T) argv {
	args := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "*", "env", "sh"}), 0, 3).Draw(t, "argv")
	if len(args) == 0 || rapid.Bool().Draw(t, "tail") {
		args = append(args, "**")
	}
	a, err := parseArgv(args)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

var (
	someHosts = []string{"a.com", "x.a.com", "*.a.com", "*.x.a.com", "y.x.a.com", "b.com", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "::1", "::/0"}
	somePaths = []string{"/", "/**", "/r", "/r/**", "/r/s", "/r/s/**"}
)

func drawHost(t *rapid.T) hostRule {
	r := must(parseHost)(rapid.SampledFrom(someHosts).Draw(t, "host"))
	r.port = rapid.SampledFrom([]uint16{80, 443}).Draw(t, "port")
	r.methods, r.anyPath = allMethods, true
	if rapid.Bool().Draw(t, "with methods") {
		r.methods = methods(rapid.IntRange(1, 3).Draw(t, "methods")) << 1 // GET, HEAD
	}
	if rapid.Bool().Draw(t, "with path") {
		r.path, r.anyPath = must(parseURLPath)(rapid.SampledFrom(somePaths).Draw(t, "path")), false
	}
	r.trusted = rapid.Bool().Draw(t, "trusted")
	if r.check() != nil {
		r.trusted = false
	}
	return r
}

func draw(t *rapid.T, label string, dims []dimension) *Policy {
	return rapid.Custom(func(t *rapid.T) *Policy {
		p := Top()
		for _, d := range dims {
			d.draw(t, p)
		}
		return p.seal()
	}).Draw(t, label)
}

func (p *Policy) GoString() string {
	canonical, err := p.Canonical()
	return fmt.Sprintf("%s %v", canonical, err)
}

// form is the normal form in text, cheaper than the canonical bytes.
func form(p *Policy) string {
	return fmt.Sprint(p.duties, p.roots, p.blocked.patterns, p.commands, p.hosts, p.budget, p.window, p.origins)
}

func same(t *rapid.T, law string, got, want *Policy) {
	t.Helper()
	if form(got) != form(want) || !Equal(got, want) {
		t.Fatalf("%s:\n got %#v\nwant %#v", law, got, want)
	}
}

func holds(t *rapid.T, law string, ok bool) {
	t.Helper()
	if !ok {
		t.Fatal(law)
	}
}

func eachDimension(t *testing.T, check func(*rapid.T, []dimension)) {
	for i, d := range dimensions {
		t.Run(d.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) { check(t, dimensions[i:i+1]) })
		})
	}
	t.Run("all", func(t *testing.T) {
		rapid.Check(t, func(t *rapid.T) { check(t, dimensions) })
	})
}

func TestLatticeLaws(t *testing.T) {
	eachDimension(t, func(t *rapid.T, dims []dimension) {
		a, b, c := draw(t, "a", dims), draw(t, "b", dims), draw(t, "c", dims)
		ab, ba := Meet(a, b), Join(a, b)

		same(t, "meet is commutative", ab, Meet(b, a))
		same(t, "join is commutative", ba, Join(b, a))
		same(t, "meet is associative", Meet(ab, c), Meet(a, Meet(b, c)))
		same(t, "join is associative", Join(ba, c), Join(a, Join(b, c)))
		same(t, "meet is idempotent", Meet(a, a), a)
		same(t, "join is idempotent", Join(a, a), a)
		same(t, "meet absorbs join", Meet(a, ba), a)
		same(t, "join absorbs meet", Join(a, ab), a)

		holds(t, "the meet is below both", Leq(ab, a) && Leq(ab, b))
		holds(t, "the join is above both", Leq(a, ba) && Leq(b, ba))
		if Leq(c, a) && Leq(c, b) {
			holds(t, "the meet is the greatest lower bound", Leq(c, ab))
		}
		if Leq(a, c) && Leq(b, c) {
			holds(t, "the join is the least upper bound", Leq(ba, c))
		}
		holds(t, "a <= b iff meet(a, b) == a", Leq(a, b) == (form(ab) == form(a)))
		holds(t, "a <= b iff join(a, b) == b", Leq(a, b) == (form(ba) == form(b)))
		if Leq(a, b) && Leq(b, a) {
			same(t, "<= is antisymmetric", a, b)
		}
		if Leq(a, b) && Leq(b, c) {
			holds(t, "<= is transitive", Leq(a, c))
		}
		same(t, "top is neutral for meet", Meet(a, Top()), a)
		same(t, "bottom is neutral for join", Join(a, Bottom()), a)
		same(t, "nothing is below bottom", Meet(a, Bottom()), Bottom())
		same(t, "nothing is above top", Join(a, Top()), Top())
	})
}

// TestNuLaws holds what is claimed of nu on drawn policies.
func TestNuLaws(t *testing.T) {
	eachDimension(t, func(t *rapid.T, dims []dimension) {
		checkNu(t.Fatalf, draw(t, "a", dims), draw(t, "b", dims))
	})
}

func checkNu(fail func(string, ...any), a, b *Policy) {
	na, nb := Nu(a), Nu(b)
	switch {
	case !Equal(Nu(na), na):
		fail("nu is not idempotent on %#v", a)
	case !Leq(na, a):
		fail("nu is not deflationary on %#v", a)
	case !Leq(Meet(na, nb), Nu(Meet(a, b))):
		fail("nu(a) ^ nu(b) is not below nu(a ^ b) for\n%#v\n%#v", a, b)
	case Equal(na, a) && Equal(nb, b) && !Equal(Nu(Meet(a, b)), Meet(a, b)):
		fail("the meet of two safe policies is not safe:\n%#v\n%#v", a, b)
	}
}

// TestNuExhaustive tries all pairs of a small model, and finds there the laws
// that do not hold, so that nobody claims them.
func TestNuExhaustive(t *testing.T) {
	var model []*Policy
	picked := []nucleus.Op{nucleus.ReadFiles, nucleus.WebSearch, nucleus.WebFetch, nucleus.GitPush}
	for code := range 3 * 3 * 3 * 3 * 2 {
		p := &Policy{window: always}
		p.hosts.any = code%2 == 1
		for rest, i := code/2, 0; i < len(picked); rest, i = rest/3, i+1 {
			if level := Level(rest % 3); level != Never {
				p.duties[opIndex(picked[i])] = duty{level, 1}
			}
		}
		model = append(model, p.seal())
	}
	notMonotone, notMeet := 0, 0
	for _, a := range model {
		for _, b := range model {
			checkNu(t.Fatalf, a, b)
			if Leq(a, b) && !Leq(Nu(a), Nu(b)) {
				notMonotone++
			}
			if !Equal(Nu(Meet(a, b)), Meet(Nu(a), Nu(b))) {
				notMeet++
			}
		}
	}
	if notMonotone == 0 || notMeet == 0 {
		t.Fatalf("%d pairs where nu is not monotone, %d where it does not preserve meets; want some of each", notMonotone, notMeet)
	}
}

// TestScopesMean ties the order to decisions: an action lies within the meet iff
// it lies within both, within the join iff it lies within one of them.
func TestScopesMean(t *testing.T) {
	for _, d := range dimensions {
		if d.name != "roots" && d.name != "commands" && d.name != "hosts" {
			continue
		}
		t.Run(d.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				a, b := draw(t, "a", []dimension{d}), draw(t, "b", []dimension{d})
				action := drawAction(t, d.name)
				sa, sb := a.scope(&action), b.scope(&action)
				meet, join := Meet(a, b).scope(&action), Join(a, b).scope(&action)
				within, either := !sa.denied && !sb.denied, !sa.denied || !sb.denied
				if meet.denied == within || join.denied == either {
					t.Fatalf("%+v: a %+v, b %+v, meet %+v, join %+v", action, sa, sb, meet, join)
				}
				if a.hosts.any || b.hosts.any {
					return // any names no trusted rule, and trusts nothing
				}
				if meet.trusted != (sa.trusted && sb.trusted) || join.trusted != (sa.trusted || sb.trusted) {
					t.Fatalf("trusted %+v: a %+v, b %+v, meet %+v, join %+v", action, sa, sb, meet, join)
				}
			})
		})
	}
}

func drawAction(t *rapid.T, scope string) nucleus.Action {
	switch scope {
	case "roots":
		name := rapid.SampledFrom([]string{".", "a", "b", "a/b", "a/b/c/d", "ab", "abc", "c"}).Draw(t, "path")
		return nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: name}}}
	case "commands":
		args := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "env", "sh"}), 1, 4).Draw(t, "args")
		return nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: args}}
	}
	host := rapid.SampledFrom([]string{"a.com", "x.a.com", "y.x.a.com", "z.y.x.a.com", "b.com", "10.1.2.3", "10.9.9.9", "::1"}).Draw(t, "host")
	port := rapid.SampledFrom([]int{80, 443}).Draw(t, "port")
	if rapid.Bool().Draw(t, "connect") {
		return nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: port}}
	}
	return nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{
		Host: host, Port: port,
		Method: rapid.SampledFrom([]string{"GET", "HEAD", "POST", "BREW"}).Draw(t, "method"),
		Path:   rapid.SampledFrom([]string{"/", "/r", "/r/", "/r/s", "/r/s/t", "/q", "/r/../q"}).Draw(t, "path"),
	}}
}

// Disjoint lists meet to nothing, never to everything.
func TestDisjointMeetsToNothing(t *testing.T) {
	a := load(t, `{operations: {net_connect: always}, hosts: {only: [{host: a.com, port: 443}]}}`)
	b := load(t, `{operations: {net_connect: always}, hosts: {only: [{host: b.com, port: 443}]}}`)
	for _, p := range []*Policy{a, b, Meet(a, b)} {
		for _, host := range []string{"a.com", "b.com", "c.com"} {
			d := p.Decide(nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: 443}}, nucleus.Context{})
			want := nucleus.Deny
			if p == a && host == "a.com" || p == b && host == "b.com" {
				want = nucleus.Allow
			}
			if d.Verdict != want {
				t.Errorf("%#v: %s is %s, want %s", p, host, d.Verdict, want)
			}
		}
	}
}

// A product too large to compute allows nothing; the bound of a list is beyond
// what a file needs.
func TestMeetIsBounded(t *testing.T) {
	var left, right []argv
	for i := range 1000 {
		left = append(left, argv{head: []string{fmt.Sprint(i), "*"}})
		right = append(right, argv{head: []string{"*", fmt.Sprint(i)}})
	}
	if got := downset(left).meet(downset(right)); got.any || len(got.only) != 0 {
		t.Errorf("the meet of 1000 x 1000 crossing rules has %d rules, any %v; want nothing", len(got.only), got.any)
	}
	if got := downset(left).meet(downset(right[:3])); len(got.only) != 3000 {
		t.Errorf("the meet of 1000 x 3 crossing rules has %d rules, want 3000", len(got.only))
	}
}

// insides says for each rule which atoms it holds.
func insides[R, A any](rules []R, atoms []A, holds func(R, A) bool) [][]bool {
	inside := make([][]bool, len(rules))
	for i, r := range rules {
		for _, atom := range atoms {
			inside[i] = append(inside[i], holds(r, atom))
		}
	}
	return inside
}

// checkRules tries every pair of rules against every atom: the order of rules is
// the order of what they hold, and the meet holds what both hold.
func checkRules[R rule[R], A any](t *testing.T, rules []R, atoms []A, holds func(R, A) bool) {
	t.Helper()
	inside := insides(rules, atoms, holds)
	for i, a := range rules {
		for j, b := range rules {
			m, met := a.meet(b)
			below := true
			for k, atom := range atoms {
				both := inside[i][k] && inside[j][k]
				if (met && holds(m, atom)) != both {
					t.Fatalf("meet of %v and %v is %v (%v), and of %+v that is wrong", a, b, m, met, atom)
				}
				below = below && (inside[j][k] || !inside[i][k])
			}
			if a.leq(b) != below {
				t.Fatalf("%v <= %v is %v, of what they hold %v", a, b, a.leq(b), below)
			}
			if a.leq(b) != (met && m.String() == a.String()) {
				t.Fatalf("%v <= %v is %v, and their meet %v", a, b, a.leq(b), m)
			}
			if (a.String() == b.String()) != (a.leq(b) && b.leq(a)) {
				t.Fatalf("%v and %v: two texts for one rule, or one for two", a, b)
			}
			if a.leq(b) && b.kin() != "" && a.kin() != b.kin() {
				t.Fatalf("%v is below %v, and no kin", a, b)
			}
		}
	}
}

// checkCautiousRules is checkRules for rules whose order and meet may be stricter than
// what they hold: never looser, and still an order with greatest lower bounds.
func checkCautiousRules[R rule[R], A any](t *testing.T, rules []R, atoms []A, holds func(R, A) bool) {
	t.Helper()
	inside := insides(rules, atoms, holds)
	for i, a := range rules {
		for j, b := range rules {
			m, met := a.meet(b)
			for k, atom := range atoms {
				if met && holds(m, atom) && !(inside[i][k] && inside[j][k]) {
					t.Fatalf("meet of %v and %v is %v and holds %+v", a, b, m, atom)
				}
				if a.leq(b) && inside[i][k] && !inside[j][k] {
					t.Fatalf("%v <= %v, and only the first holds %+v", a, b, atom)
				}
			}
			if a.leq(b) != (met && m.String() == a.String()) || met && !(m.leq(a) && m.leq(b)) {
				t.Fatalf("%v <= %v is %v, and their meet %v", a, b, a.leq(b), m)
			}
			for _, c := range rules {
				if c.leq(a) && c.leq(b) && !(met && c.leq(m)) {
					t.Fatalf("%v is below %v and %v, and not below their meet %v", c, a, b, m)
				}
				if a.leq(b) && b.leq(c) && !a.leq(c) {
					t.Fatalf("%v <= %v <= %v, and the first is not below the last", a, b, c)
				}
			}
		}
	}
}

// words lists all sequences of letters with the given lengths.
func words(letters []string, low, high int) (all [][]string) {
	var grow func([]string)
	grow = func(word []string) {
		if len(word) >= low {
			all = append(all, append([]string(nil), word...))
		}
		if len(word) < high {
			for _, l := range letters {
				grow(append(word, l))
			}
		}
	}
	grow(nil)
	return all
}

func TestRulesExhaustive(t *testing.T) {
	t.Run("commands", func(t *testing.T) {
		var rules []argv
		for _, head := range words([]string{"a", "*", "./x", "sh"}, 0, 2) {
			rules = append(rules, argv{head: head, tail: true})
			if len(head) > 0 {
				rules = append(rules, argv{head: head})
			}
		}
		checkRules(t, rules, words([]string{"a", "b", "./x", "sh", "env"}, 0, 3), argv.matches)
	})
	for wrapper, option := range map[string]string{"env": "-u", "timeout": "-k", "xargs": "--odd", "sudo": "-s", "strace": "-o", "find": "-exec"} {
		t.Run("commands of "+wrapper, func(t *testing.T) {
			var rules []argv
			for _, head := range words([]string{"a", "*", "./x", "sh", option, "env"}, 0, 2) {
				head = append([]string{wrapper}, head...)
				rules = append(rules, argv{head: head}, argv{head: head, tail: true})
			}
			rules = append(rules, argv{tail: true}, argv{head: []string{"*"}}, argv{head: []string{"*", "a"}, tail: true})
			var atoms [][]string
			for _, args := range words([]string{"a", "./x", "sh", option, "env"}, 0, 3) {
				atoms = append(atoms, append([]string{wrapper}, args...))
			}
			checkCautiousRules(t, rules, append(atoms, []string{"a"}, []string{"b", "sh"}), argv.matches)
		})
	}
	t.Run("roots", func(t *testing.T) {
		rules := []root{".", "a", "ab", "a/b", "a/b/c", "b"}
		checkRules(t, rules, []string{".", "a", "ab", "a/b", "a/bc", "a/b/c", "b", "b/c", "c"}, func(r root, name string) bool {
			p := Policy{roots: set[root]{only: []root{r}}}
			return p.seal().inRoots(name)
		})
	})
	t.Run("origins", func(t *testing.T) {
		var rules []span
		for _, text := range []string{"**", "g.com/**", "g.com/o", "g.com/o/**", "g.com/o/r", "g.com/or/**", "g.com:80/**", "file:/srv/**"} {
			rules = append(rules, must(parseOriginPattern)(text))
		}
		atoms := []string{"g.com/o", "g.com/o/r", "g.com/o/s", "g.com/or", "g.com/x", "g.com:80/o", "file:/srv", "file:/x"}
		checkRules(t, rules, append(atoms, "g.com", "g.com/or/x"), span.matches)
	})
	t.Run("hosts", func(t *testing.T) {
		var rules []hostRule
		for _, host := range []string{"a.com", "x.a.com", "*.a.com", "10.0.0.0/8", "10.0.0.0/16", "10.1.2.3"} {
			for _, m := range []methods{allMethods, 2, 6} {
				for _, path := range []string{"", "/", "/**", "/r", "/r/**"} {
					for _, trusted := range []bool{false, true} {
						r := must(parseHost)(host)
						r.port, r.methods, r.anyPath, r.trusted = 443, m, path == "", trusted
						if path != "" {
							r.path = must(parseURLPath)(path)
						}
						if r.check() == nil {
							rules = append(rules, r)
						}
					}
				}
			}
		}
		other := rules[0]
		other.port = 80
		type atom struct {
			action nucleus.Action
			trust  bool
		}
		var atoms []atom
		for _, host := range []string{"a.com", "x.a.com", "y.x.a.com", "10.0.1.2", "10.1.2.3", "10.9.9.9"} {
			for _, port := range []int{80, 443} {
				if port == 80 && host != "a.com" {
					continue
				}
				atoms = append(atoms, atom{nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: port}}, false})
				for _, method := range []string{"GET", "HEAD", "BREW"} {
					for _, path := range []string{"/", "/r", "/r/s", "/r/../q"} {
						atoms = append(atoms, atom{plainAction(method, host, port, path), false})
						for _, trust := range []bool{false, true} {
							atoms = append(atoms, atom{nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Host: host, Port: port, Method: method, Path: path}}, trust})
						}
					}
				}
			}
		}
		checkRules(t, append(rules, other), atoms, func(r hostRule, a atom) bool {
			p := Policy{hosts: set[hostRule]{only: []hostRule{r}}, hostNames: []string{"hosts[0]"}}
			s := p.scope(&a.action)
			return !s.denied && (s.trusted || !a.trust)
		})
	})
}
