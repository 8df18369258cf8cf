package policy

import (
	"fmt"
	"path"
	"strings"

	"cal/nucleus"
	"cal/policy/program"
)

// Decide judges one action: the stricter of nu(p) and the exposure gate, within
// the scopes of p. It names the rule that decided:
//
//	operations            the operation is none of the 14
//	operations.OP         its level
//	action                the part that must be judged is missing
//	window                now is outside
//	budget.usd, budget.tokens, budget.seconds
//	                      nothing is left of it
//	paths                 a path that is absolute, has "..", or is not clean
//	paths.roots           no root holds the path
//	paths.blocked         a blocked pattern matches it
//	commands, commands[i] no rule, or the rule that matched
//	hosts, hosts[i]       no rule, or the rule that matched
//	delegation            the pod that is asked for has more than this one
//	nu                    allowed always, but the policy enables all three legs
//	trifecta              the session has met private data and untrusted content
//
// Rules are counted in the order of the canonical form. A denied action takes no
// leg. Takes of an ask are those it takes once it is granted.
//
// Files are judged for read, write, edit and both searches, where the entry is
// the directory that the search starts from. A command is judged by its argv, its
// directory and the files that argv names, a commit by its paths, which are
// relative to its repository (all of the repository when it names none). A push
// and a pull request are judged by level and gate: their remote comes from the
// workspace's record. A connection is judged by host and port; with a Fetch it is one
// request in plain HTTP, judged by method and path too, and takes the legs of a connection.
func (p *Policy) Decide(a nucleus.Action, c nucleus.Context) nucleus.Decision {
	i := opIndex(a.Op)
	switch {
	case i < 0:
		return deny("operations", fmt.Sprintf("unknown operation %q", a.Op))
	case p == nil || p.duties[i].level == Never:
		return deny(opRules[i], fmt.Sprintf("%s never allows %s", p.title(), a.Op))
	case !p.window.contains(c.UnixMilli):
		return deny("window", p.window.explain(c.UnixMilli))
	}
	if d, over := p.budget.over(&c); over {
		return deny(d.Rule(), p.budget.explain(d, &c))
	}
	s := p.scope(&a)
	if s.denied {
		return deny(s.rule, s.why)
	}

	m := machine{c.UntrustedRepo, c.DirectNetwork}
	start := Start(c)
	takes := m.legs(i)
	if s.trusted {
		takes = 0
	}
	before := c.Exposure | start
	if i == opNetConnect {
		before |= takes & nucleus.Untrusted // what comes in is read while more goes out
	}
	d := nucleus.Decision{Verdict: nucleus.Ask, Takes: takes | start, Approvals: int(p.duties[i].approvals)}
	switch {
	case takes.Has(nucleus.WayOut) && before.Has(nucleus.Private|nucleus.Untrusted):
		d.Rule, d.Why = "trifecta", trifectaTexts[i]
	case p.lowers(i, m):
		d.Rule, d.Why = "nu", nuTexts[i]
	case p.duties[i].level == Ask:
		d.Rule, d.Why = opRules[i], askTexts[i]
	default:
		d.Verdict, d.Approvals = nucleus.Allow, 0
		d.Rule, d.Why = s.rule, allowTexts[i]
		if s.rule == "" {
			d.Rule = opRules[i]
		}
	}
	return d
}

// The sentences of decisions that are not denials, made once.
var opRules, allowTexts, askTexts, nuTexts, trifectaTexts [ops]string

func init() {
	for i, op := range nucleus.Ops() {
		opRules[i] = "operations." + string(op)
		allowTexts[i] = string(op) + " is allowed"
		askTexts[i] = string(op) + " needs an approval each time"
		nuTexts[i] = string(op) + " needs an approval: the policy enables private data, untrusted content and a way out together"
		trifectaTexts[i] = string(op) + " is a way out, and this session has met both private data and untrusted content"
	}
}

func deny(rule, why string) nucleus.Decision {
	return nucleus.Decision{Verdict: nucleus.Deny, Rule: rule, Why: why}
}

func (p *Policy) title() string {
	if p == nil || p.name == "" {
		return "the policy"
	}
	return "policy " + p.name
}

func (w window) explain(now int64) string {
	switch {
	case w == window{}:
		return "the policy is valid at no time"
	case now < w.from:
		return fmt.Sprintf("the policy is valid from %s, and it is %s", formatTime(w.from), formatTime(now))
	}
	return fmt.Sprintf("the policy was valid until %s, and it is %s", formatTime(w.until), formatTime(now))
}

// scoped is what the scopes say of an action. rule is empty where no single
// rule of a scope decided.
type scoped struct {
	denied    bool
	rule, why string
	trusted   bool
}

func outside(rule, format string, args ...any) scoped {
	return scoped{denied: true, rule: rule, why: fmt.Sprintf(format, args...)}
}

func (p *Policy) scope(a *nucleus.Action) scoped {
	switch a.Op {
	case nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles, nucleus.GlobSearch, nucleus.GrepSearch:
		if len(a.Files) == 0 {
			return outside("action", "%s names no file", a.Op)
		}
		return p.scopeFiles(a.Files)
	case nucleus.RunBash:
		if a.Job != nil && a.Command == nil {
			return scoped{} // the command was judged when it was started
		}
		return p.scopeCommand(a.Command)
	case nucleus.GitCommit:
		return p.scopeCommit(a.Commit)
	case nucleus.WebFetch:
		return p.scopeFetch(a.Fetch)
	case nucleus.NetConnect:
		return p.scopeConnect(a.Connect, a.Fetch)
	case nucleus.ManagePods, nucleus.SpawnAgent:
		return p.scopeSub(a.Op, a.Sub)
	}
	return scoped{}
}

func (p *Policy) scopePath(name string) scoped {
	switch {
	case !cleanPath(name):
		return outside("paths", "%q is not a clean path below the workspace", name)
	case !p.inRoots(name):
		return outside("paths.roots", "%q lies in none of the directories of paths.roots", name)
	case p.blocked.matches(name):
		return outside("paths.blocked", "%q is blocked", name)
	}
	return scoped{}
}

// inRoots looks up name and every directory above it.
func (p *Policy) inRoots(name string) bool {
	if p.roots.any || p.rootNames["."] {
		return true
	}
	for end := len(name); end > 0; end = strings.LastIndexByte(name[:end], '/') {
		if p.rootNames[name[:end]] {
			return true
		}
	}
	return false
}

func (p *Policy) scopeFiles(files []nucleus.File) scoped {
	for i := range files {
		if s := p.scopePath(files[i].Path); s.denied {
			return s
		}
	}
	return scoped{}
}

func (p *Policy) scopeCommand(c *nucleus.Command) scoped {
	if c == nil || len(c.Argv) == 0 {
		return outside("action", "run_bash names no command")
	}
	if s := p.scopePath(orWorkspace(c.Dir)); s.denied {
		return s
	}
	if s := p.scopeFiles(c.Files); s.denied {
		return s
	}
	if p.commands.any {
		return scoped{}
	}
	// A variable such as GIT_SSH_COMMAND turns an allowed command into another.
	if len(c.Env) > 0 {
		return outside("commands", "a command with variables of its own is allowed only where commands is any")
	}
	for i := range p.commands.only {
		if p.commands.only[i].matches(c.Argv) {
			return scoped{rule: p.commandNames[i]}
		}
	}
	if program.Runs(c.Argv[0]) {
		return outside("commands", "no rule of commands names %q, which runs other programs; no wildcard stands for it", c.Argv)
	}
	return outside("commands", "no rule of commands allows %q", c.Argv)
}

func (p *Policy) scopeCommit(c *nucleus.Commit) scoped {
	if c == nil {
		return outside("action", "git_commit names no repository")
	}
	repo := orWorkspace(c.Repo)
	if len(c.Paths) == 0 {
		return p.scopePath(repo)
	}
	for _, name := range c.Paths {
		if !cleanPath(repo) || !cleanPath(name) {
			return outside("paths", "%q in %q is not a clean path below the repository", name, repo)
		}
		if s := p.scopePath(path.Join(repo, name)); s.denied {
			return s
		}
	}
	return scoped{}
}

func orWorkspace(dir string) string {
	if dir == "" {
		return "."
	}
	return dir
}

func (p *Policy) scopeFetch(f *nucleus.Fetch) scoped {
	if f == nil {
		return outside("action", "web_fetch names no request")
	}
	asked, ok := readPeer(f.Host)
	if !ok {
		return outside("hosts", "%q is not a clean host", f.Host)
	}
	if p.hosts.any {
		return scoped{}
	}
	method := methodOf(f.Method)
	var found scoped
	for i := range p.hosts.only {
		r := &p.hosts.only[i]
		if !r.opens(asked, f.Port) || !r.opensRequest(method, f.Path) {
			continue
		}
		if r.trusted {
			return scoped{rule: p.hostNames[i], trusted: true}
		}
		if found.rule == "" {
			found.rule = p.hostNames[i]
		}
	}
	if found.rule == "" {
		return outside("hosts", "no rule of hosts allows %s %s to %s port %d%s", f.Method, f.Path, f.Host, f.Port, p.hostHint())
	}
	return found
}

// scopeConnect judges a connection, or one request in plain HTTP, which the gateway sees
// whole. No rule is trusted here: nothing proves who answers.
func (p *Policy) scopeConnect(c *nucleus.Connect, plain *nucleus.Fetch) scoped {
	if c == nil {
		return outside("action", "net_connect names no host")
	}
	if plain != nil && (plain.Host != c.Host || plain.Port != c.Port) {
		return outside("action", "net_connect is for %s port %d, and its request for %s port %d", c.Host, c.Port, plain.Host, plain.Port)
	}
	asked, ok := readPeer(c.Host)
	if !ok {
		return outside("hosts", "%q is not a clean host", c.Host)
	}
	if p.hosts.any {
		return scoped{}
	}
	inside := false
	for i := range p.hosts.only {
		r := &p.hosts.only[i]
		if !r.opens(asked, c.Port) {
			continue
		}
		if r.opaque() || plain != nil && r.opensRequest(methodOf(plain.Method), plain.Path) {
			return scoped{rule: p.hostNames[i]}
		}
		inside = true
	}
	if inside && plain != nil {
		return outside("hosts", "no rule of hosts allows %s %s to %s port %d", plain.Method, plain.Path, c.Host, c.Port)
	}
	if inside {
		return outside("hosts", "the rules for %s port %d allow single requests, not a connection that nobody looks into", c.Host, c.Port)
	}
	return outside("hosts", "no rule of hosts allows %s port %d%s", c.Host, c.Port, p.hostHint())
}

func (p *Policy) hostHint() string {
	if len(p.hosts.only) == 0 {
		return "; " + p.title() + " allows no host"
	}
	return ""
}
