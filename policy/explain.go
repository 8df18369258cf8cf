package policy

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"cal/nucleus"
)

// Place returns the line of a policy's source that holds what a decision on the
// action calls rule, 0 where none does: nu and trifecta stand in no file, and what is
// left out of one neither. p is what was read from source.
func Place(p *Policy, source []byte, rule string, a nucleus.Action) int {
	document, err := parse(source)
	if err != nil {
		return 0
	}
	scope, _, _ := strings.Cut(rule, "[")
	n, line := document, 0
	for key := range strings.SplitSeq(scope, ".") {
		if n, line = n.member(key); n == nil {
			return 0
		}
	}
	items := n.items
	if only, _ := n.member("only"); only != nil {
		items = only.items
	}
	for _, item := range items {
		if p.wrote(item, scope, rule, a) {
			return item.line
		}
	}
	return line
}

// wrote reports whether an item of a scope is what rule stands for.
func (p *Policy) wrote(item *node, scope, rule string, a nucleus.Action) bool {
	switch scope {
	case "hosts":
		r, err := readHost(item)
		return err == nil && rule == nameOf(r, p.hosts, p.hostNames)
	case "commands":
		r, err := readArgv(item)
		return err == nil && rule == nameOf(r, p.commands, p.commandNames)
	case "paths.blocked":
		pattern, err := readString(item, "", parseBlocked)
		return err == nil && slices.ContainsFunc(judgedPaths(&a), newBlocked([]string{pattern}).matches)
	}
	return false
}

func nameOf[R rule[R]](r R, s set[R], names []string) string {
	for i, t := range s.only {
		if t.String() == r.String() {
			return names[i]
		}
	}
	return ""
}

// member returns what stands under a key, and the line of the key.
func (n *node) member(key string) (*node, int) {
	if n.kind == mapping {
		for i := range n.keys {
			if n.keys[i].text == key {
				return n.items[i], n.keys[i].line
			}
		}
	}
	return nil, 0
}

// Changes says what would have to be different for the action to be allowed, all of
// it together. Each change is tried on a copy of p before it is named; where none
// helps, the last sentence says so.
func Changes(p *Policy, a nucleus.Action, c nucleus.Context) []string {
	var changes []string
	for range 100 {
		d := p.Decide(a, c)
		if d.Verdict == nucleus.Allow {
			return changes
		}
		var change string
		if p, change = p.change(&a, c, d); change == "" {
			return append(changes, "no policy allows this")
		}
		changes = append(changes, change)
		if p == nil {
			return changes
		}
	}
	return append(changes, "more than can be listed")
}

// change returns a policy in which the rule of d does not decide, and what was
// changed; nil where it takes another session or a person.
func (p *Policy) change(a *nucleus.Action, c nucleus.Context, d nucleus.Decision) (*Policy, string) {
	q := *p
	i := opIndex(a.Op)
	switch {
	case i < 0:
		return p, ""
	case d.Rule == opRules[i]:
		q.duties[i] = duty{Always, 1}
		return q.seal(), opRules[i] + ": always"
	case d.Rule == "nu":
		return nil, "a grant for each use, or a policy that does not enable private data, untrusted content and a way out together"
	case d.Rule == "trifecta":
		return nil, "a grant for each use, or a session that has not met both private data and untrusted content"
	case d.Rule == "window":
		q.window = always
		return q.seal(), "window: one that holds " + formatTime(c.UnixMilli)
	case strings.HasPrefix(d.Rule, "budget."):
		q.budget = noBudgetLimit
		return q.seal(), d.Rule + ": a larger one, or none"
	case d.Rule == "paths.roots", d.Rule == "paths.blocked":
		return q.open(a, d.Rule)
	case d.Rule == "commands" && len(a.Command.Env) > 0:
		q.commands = everything[argv]()
		return q.seal(), "commands: any"
	case d.Rule == "commands":
		rule := argv{head: a.Command.Argv}
		if slices.Contains(rule.head, "*") || slices.Contains(rule.head, "**") {
			q.commands = everything[argv]()
			return q.seal(), "commands: any"
		}
		q.commands = q.commands.join(downset([]argv{rule}))
		return q.seal(), fmt.Sprintf("commands: one more rule, %s", rule)
	case d.Rule == "hosts":
		return q.openHost(a)
	}
	return p, ""
}

// open takes away what hides the first path of the action that is denied.
func (p *Policy) open(a *nucleus.Action, rule string) (*Policy, string) {
	for _, name := range judgedPaths(a) {
		if s := p.scopePath(name); s.rule != rule {
			continue
		}
		if rule == "paths.roots" {
			p.roots = p.roots.join(downset([]root{root(name)}))
			return p.seal(), fmt.Sprintf("paths.roots: one more, %q or a directory above it", name)
		}
		var kept, taken []string
		for _, pattern := range p.blocked.patterns {
			if newBlocked([]string{pattern}).matches(name) {
				taken = append(taken, pattern)
			} else {
				kept = append(kept, pattern)
			}
		}
		p.blocked = newBlocked(kept)
		return p.seal(), fmt.Sprintf("paths.blocked: without %q", taken)
	}
	return p, ""
}

func (p *Policy) openHost(a *nucleus.Action) (*Policy, string) {
	var r hostRule
	var err error
	switch {
	case a.Connect != nil && a.Fetch == nil && validPort(a.Connect.Port):
		if r, err = parseHost(a.Connect.Host); err == nil {
			r.port, r.methods, r.anyPath = uint16(a.Connect.Port), allMethods, true
		}
	case a.Fetch != nil && validPort(a.Fetch.Port):
		if r, err = parseHost(a.Fetch.Host); err == nil {
			r.port, r.methods, r.anyPath = uint16(a.Fetch.Port), methodOf(a.Fetch.Method), true
			if base, err := parseURLPath(a.Fetch.Path); err == nil {
				r.path, r.anyPath = base, false
			}
		}
	default:
		return p, ""
	}
	if err != nil || !r.holdsAction(a) {
		return p, ""
	}
	p.hosts = p.hosts.join(downset([]hostRule{r}))
	return p.seal(), fmt.Sprintf("hosts: one more rule, %s", r)
}

func validPort(port int) bool { return 0 < port && port <= 65535 }

func (r hostRule) holdsAction(a *nucleus.Action) bool {
	p := Policy{hosts: set[hostRule]{only: []hostRule{r}}, hostNames: []string{"hosts[0]"}}
	return !p.scope(a).denied
}

// judgedPaths are the names of an action that the scope paths judges.
func judgedPaths(a *nucleus.Action) []string {
	var names []string
	files := a.Files
	if a.Command != nil {
		names, files = append(names, orWorkspace(a.Command.Dir)), a.Command.Files
	}
	for _, f := range files {
		names = append(names, f.Path)
	}
	if a.Commit != nil {
		if len(a.Commit.Paths) == 0 {
			names = append(names, orWorkspace(a.Commit.Repo))
		}
		for _, name := range a.Commit.Paths {
			names = append(names, path.Join(orWorkspace(a.Commit.Repo), name))
		}
	}
	return names
}

// examples are the shortest actions that a rule allows.
func (r root) examples() []nucleus.Action {
	if r == "." {
		return []nucleus.Action{readAction("a"), readAction("b"), readAction("x/y")}
	}
	return []nucleus.Action{readAction(string(r)), readAction(string(r) + "/a")}
}

func readAction(name string) nucleus.Action {
	return nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: name}}}
}

func (a argv) examples() []nucleus.Action {
	args := slices.Clone(a.head)
	for i, arg := range args {
		if arg == "*" {
			args[i] = "x"
		}
	}
	if len(args) == 0 {
		args = []string{"x"}
	}
	return []nucleus.Action{runAction(args...)}
}

func runAction(args ...string) nucleus.Action {
	return nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: args, Dir: "."}}
}

// examples are one connection where the rule opens one, and else a request with
// each of its methods.
func (r hostRule) examples() []nucleus.Action {
	host := r.host()
	switch {
	case r.wild:
		host = "x" + r.name
	case r.addr.IsValid():
		host = r.addr.Addr().String()
	}
	if r.opaque() {
		return []nucleus.Action{{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: int(r.port)}}}
	}
	name := "/"
	if !r.anyPath && r.path.base != "" {
		name = r.path.base
	}
	list := r.methods.list()
	if r.methods == allMethods {
		list = []string{"GET"}
	}
	var all []nucleus.Action
	for _, method := range list {
		all = append(all, fetchAction(method, host, int(r.port), name))
	}
	return all
}

// plain is a request as a program sends it to the HTTP proxy.
func plain(a nucleus.Action) nucleus.Action {
	f := *a.Fetch
	f.URL = "http" + strings.TrimPrefix(f.URL, "https")
	return nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: f.Host, Port: f.Port}, Fetch: &f}
}

func fetchAction(method, host string, port int, name string) nucleus.Action {
	shown := host
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		shown = "[" + host + "]"
	}
	return nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{
		Method: method, URL: fmt.Sprintf("https://%s:%d%s", shown, port, name), Host: host, Port: port, Path: name,
	}}
}

// Step writes an action as a step of `cal policy eval`, for people too.
func Step(a nucleus.Action) string {
	step := object{"op": string(a.Op)}
	switch {
	case a.Command != nil:
		step["argv"] = a.Command.Argv
	case a.Connect != nil:
		step["host"], step["port"] = a.Connect.Host, a.Connect.Port
		if a.Fetch != nil {
			step["method"], step["path"] = a.Fetch.Method, a.Fetch.Path
		}
	case a.Fetch != nil:
		step["url"] = a.Fetch.URL
		step.add("method", a.Fetch.Method, a.Fetch.Method != "GET")
	case len(a.Files) > 0:
		step["path"] = a.Files[0].Path
	}
	raw, err := nucleus.Canonical(step)
	if err != nil {
		return string(a.Op)
	}
	return string(raw)
}

// examplePath is a short path that a blocked pattern matches.
func examplePath(pattern string) string {
	var segments []string
	for segment := range strings.SplitSeq(pattern, "/") {
		if segment != "**" {
			segments = append(segments, strings.NewReplacer("**", "x", "*", "", "?", "x").Replace(segment))
		}
	}
	name := path.Join(segments...)
	if !cleanPath(name) || name == "." || !newBlocked([]string{pattern}).matches(name) {
		name = strings.NewReplacer("**", "x", "*", "x", "?", "x").Replace(pattern)
	}
	return name
}
