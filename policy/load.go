package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cal/nucleus"
)

// Load reads one policy from YAML or JSON. name stands in errors, which have the
// form "NAME:LINE: what is so; what was wanted". Scopes that are left out have
// their defaults: paths is the workspace, commands any, hosts nothing, budget and
// window unlimited, trusted_origins none; an operation that is left out is never
// allowed. What Load cannot read or nothing enforces is an error, never a looser
// policy.
func Load(name string, data []byte) (*Policy, error) {
	return loadOver(name, data, defaults())
}

func defaults() *Policy {
	return &Policy{
		roots:    set[root]{only: []root{"."}},
		blocked:  newBlocked(nil),
		commands: everything[argv](),
		budget:   noBudgetLimit,
		window:   always,
	}
}

// Tighten returns the meet of p and a policy that says only what it takes away: in
// data, read as Load does, an operation or a scope that is left out stays as it is
// in p. Whatever data says, the result is <= p.
func Tighten(p *Policy, name string, data []byte) (*Policy, error) {
	own, err := loadOver(name, data, Top())
	if err != nil {
		return nil, err
	}
	own.name = p.name
	return Meet(p, own), nil
}

// loadOver reads a policy whose left-out scopes are those of from, which nobody else holds.
func loadOver(name string, data []byte, from *Policy) (*Policy, error) {
	document, err := parse(data)
	l := loader{policy: from}
	if err == nil {
		err = l.document(document)
	}
	if err != nil {
		return nil, fmt.Errorf("%s:%w", name, err)
	}
	return l.policy.seal(), nil
}

type loader struct {
	policy    *Policy
	approvals [ops]uint8
}

func (l *loader) document(n *node) error {
	p := l.policy
	err := n.fields("the policy",
		field{"name", l.name},
		field{"operations", l.operations},
		field{"obligations", l.obligations},
		field{"paths", l.paths},
		field{"commands", func(n *node) (err error) {
			p.commands, err = readSet(n, "commands", `[[git, status], [go, test, "**"]]`, readArgv)
			return err
		}},
		field{"hosts", func(n *node) (err error) {
			p.hosts, err = readSet(n, "hosts", "[{host: api.github.com, port: 443}]", readHost)
			return err
		}},
		field{"budget", l.budget},
		field{"window", l.window},
		field{"trusted_origins", l.origins},
	)
	for i := range p.duties {
		if p.duties[i].level != Never {
			p.duties[i].approvals = max(1, l.approvals[i])
		}
	}
	return err
}

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

func (l *loader) name(n *node) error {
	name, err := n.str("name")
	if err == nil && !namePattern.MatchString(name) {
		err = n.errorf("name %q; want lower-case letters, digits, dots, dashes and underscores, at most 64", name)
	}
	l.policy.name = name
	return err
}

// perOperation reads a mapping whose keys are operations.
func perOperation(n *node, what string, read func(i int, n *node) error) error {
	var known []field
	for i, op := range nucleus.Ops() {
		known = append(known, field{string(op), func(n *node) error { return read(i, n) }})
	}
	if n.kind == mapping {
		for i := range n.keys {
			if key := &n.keys[i]; key.kind == text && lookup(known, key.text) == nil {
				return key.errorf("unknown operation %q; want one of %s", key.text, keyNames(known))
			}
		}
	}
	return n.fields(what, known...)
}

func (l *loader) operations(n *node) error {
	return perOperation(n, "operations", func(i int, n *node) error {
		if err := l.policy.duties[i].level.UnmarshalText([]byte(n.text)); err != nil || n.kind != text {
			return n.errorf("%s is %s; want never, ask or always", nucleus.Ops()[i], n.describe())
		}
		return nil
	})
}

func (l *loader) obligations(n *node) error {
	return perOperation(n, "obligations", func(i int, n *node) error {
		what := "obligations." + string(nucleus.Ops()[i])
		return n.fields(what, field{"approvals", func(n *node) error {
			count, err := n.integer(what+".approvals", 1, MaxApprovals)
			l.approvals[i] = uint8(count)
			return err
		}})
	})
}

func (l *loader) paths(n *node) error {
	return n.fields("paths",
		field{"roots", func(n *node) (err error) {
			l.policy.roots, err = readSet(n, "paths.roots", `["."]`, func(n *node) (root, error) {
				return readString(n, "paths.roots", parseRoot)
			})
			return err
		}},
		field{"blocked", func(n *node) error {
			items, err := n.elements("paths.blocked", `["**/.env*", "**/*.pem"]`)
			if err != nil {
				return err
			}
			var patterns []string
			for _, item := range items {
				pattern, err := readString(item, "paths.blocked", parseBlocked)
				if err != nil {
					return err
				}
				patterns = append(patterns, pattern)
			}
			l.policy.blocked = newBlocked(patterns)
			return nil
		}},
	)
}

// readSet reads "any" or {only: [...]}.
func readSet[R rule[R]](n *node, what, example string, read func(*node) (R, error)) (set[R], error) {
	if n.kind == text && n.text == "any" {
		return everything[R](), nil
	}
	if n.kind != mapping {
		return set[R]{}, n.errorf("%s is %s; want any, or {only: %s}", what, n.describe(), example)
	}
	if len(n.keys) == 0 {
		return set[R]{}, n.errorf("%s is an empty mapping; want any, or {only: []} for nothing", what)
	}
	var rules []R
	err := n.fields(what, field{"only", func(n *node) error {
		items, err := n.elements(what+".only", example)
		for _, item := range items {
			r, err := read(item)
			if err != nil {
				return err
			}
			rules = append(rules, r)
		}
		return err
	}})
	return downset(rules), err
}

// readString reads a string and gives what is wrong with it its line.
func readString[R any](n *node, what string, parse func(string) (R, error)) (R, error) {
	s, err := n.str(what)
	if err != nil {
		var zero R
		return zero, err
	}
	r, err := parse(s)
	if err != nil {
		err = n.errorf("%v", err)
	}
	return r, err
}

func readArgv(n *node) (argv, error) {
	items, err := n.elements("a command", `[git, status]`)
	if err != nil {
		return argv{}, err
	}
	args := make([]string, len(items))
	for i, item := range items {
		if args[i], err = item.str("an argument"); err != nil {
			return argv{}, err
		}
	}
	a, err := parseArgv(args)
	if err != nil {
		err = n.errorf("%v", err)
	}
	return a, err
}

func readHost(n *node) (hostRule, error) {
	r := hostRule{methods: allMethods, anyPath: true}
	err := n.fields("a host rule",
		field{"host", func(n *node) error {
			host, err := readString(n, "host", parseHost)
			r.name, r.wild, r.addr = host.name, host.wild, host.addr
			return err
		}},
		field{"port", func(n *node) error {
			port, err := n.integer("port", 1, 65535)
			r.port = uint16(port)
			return err
		}},
		field{"methods", func(n *node) (err error) {
			r.methods, err = readMethods(n)
			return err
		}},
		field{"path", func(n *node) (err error) {
			r.path, err = readString(n, "path", parseURLPath)
			r.anyPath = false
			return err
		}},
		field{"trusted", func(n *node) error {
			if n.kind != other || n.text != "true" && n.text != "false" {
				return n.errorf("trusted is %s; want true or false", n.describe())
			}
			r.trusted = n.text == "true"
			return nil
		}},
	)
	if err != nil {
		return r, err
	}
	if r.name == "" && !r.addr.IsValid() {
		return r, n.errorf("a host rule without host; want for example {host: api.github.com, port: 443}")
	}
	if r.port == 0 {
		return r, n.errorf("the rule for host %s has no port; want a whole number from 1 to 65535", r.host())
	}
	if err := r.check(); err != nil {
		return r, n.errorf("the rule for host %s: %v", r.host(), err)
	}
	return r, nil
}

func readMethods(n *node) (methods, error) {
	items, err := n.elements("methods", "[GET, POST]")
	if err != nil {
		return 0, err
	}
	if len(items) == 0 {
		return 0, n.errorf("methods is an empty list, which allows nothing; want at least one of %s", strings.Join(methodNames[:], ", "))
	}
	var m methods
	for _, item := range items {
		name, err := item.str("a method")
		if err != nil {
			return 0, err
		}
		if !slices.Contains(methodNames[:], name) {
			return 0, item.errorf("unknown method %q; want one of %s", name, strings.Join(methodNames[:], ", "))
		}
		m |= methodOf(name)
	}
	return m, nil
}

const maxInteger = 1<<53 - 1

func (l *loader) budget(n *node) error {
	b := &l.policy.budget
	return n.fields("budget",
		field{"usd", func(n *node) (err error) { b.microUSD, err = readUSD(n); return err }},
		field{"tokens", func(n *node) (err error) { b.tokens, err = n.integer("budget.tokens", 0, maxInteger); return err }},
		field{"seconds", func(n *node) (err error) { b.seconds, err = n.integer("budget.seconds", 0, maxInteger); return err }},
	)
}

var usdPattern = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})(\.[0-9]{1,6})?$`)

// readUSD reads dollars exactly, in millionths.
func readUSD(n *node) (int64, error) {
	if n.kind != number || !usdPattern.MatchString(n.text) {
		return 0, n.errorf("budget.usd is %s; want an amount like 5 or 0.25, below 1000000000, of six decimals at most", n.describe())
	}
	whole, fraction, _ := strings.Cut(n.text, ".")
	return strconv.ParseInt(whole+(fraction + "000000")[:6], 10, 64)
}

func (l *loader) window(n *node) error {
	w := &l.policy.window
	err := n.fields("window",
		field{"from", func(n *node) (err error) { w.from, err = readTime(n, "window.from"); return err }},
		field{"until", func(n *node) (err error) { w.until, err = readTime(n, "window.until"); return err }},
	)
	if err == nil && w.from > w.until {
		return n.errorf("window is from %s until %s, which is before; want from before until", formatTime(w.from), formatTime(w.until))
	}
	*w = w.normal()
	return err
}

func readTime(n *node, what string) (int64, error) {
	t, err := time.Parse(time.RFC3339Nano, n.text)
	if n.kind != text || err != nil || t.Nanosecond()%int(time.Millisecond) != 0 || t.UTC().Year() < 1 || t.UTC().Year() > 9999 {
		return 0, n.errorf("%s is %s; want a time like 2026-01-01T00:00:00Z, to the millisecond at most", what, n.describe())
	}
	return t.UnixMilli(), nil
}

func (l *loader) origins(n *node) error {
	items, err := n.elements("trusted_origins", `["github.com/my-org/**"]`)
	if err != nil {
		return err
	}
	var patterns []span
	for _, item := range items {
		pattern, err := readString(item, "trusted_origins", parseOriginPattern)
		if err != nil {
			return err
		}
		patterns = append(patterns, pattern)
	}
	l.policy.origins = downset(patterns)
	return nil
}
