package main

import (
	"fmt"
	"strings"
)

// mutant replaces old, which occurs once in file, by new. The test must fail.
type mutant struct{ law, file, old, new, test string }

var mutants = []mutant{
	// the order
	{"a level is <= a looser one", "policy/level.go", "d.level <= e.level && d.approvals >= e.approvals", "d.approvals >= e.approvals", "TestLatticeLaws"},
	{"more approvals are stricter", "policy/level.go", "d.level <= e.level && d.approvals >= e.approvals", "d.level <= e.level", "TestLatticeLaws"},
	{"meet of levels is the stricter", "policy/level.go", "duty{min(d.level, e.level), max(d.approvals, e.approvals)}", "duty{max(d.level, e.level), max(d.approvals, e.approvals)}", "TestLatticeLaws"},
	{"a known name elsewhere is arbitrary code", "policy/command/command.go", "case !installed(c.Binary):", "case c.Binary == \"\" && !installed(c.Binary):", "TestOf"},
	{"meet of quorums is the larger", "policy/level.go", "duty{min(d.level, e.level), max(d.approvals, e.approvals)}", "duty{min(d.level, e.level), min(d.approvals, e.approvals)}", "TestLatticeLaws"},
	{"join of levels is the looser", "policy/level.go", "duty{max(d.level, e.level), min(d.approvals, e.approvals)}", "duty{min(d.level, e.level), min(d.approvals, e.approvals)}", "TestLatticeLaws"},
	{"never has one value", "policy/level.go", "if d.level == Never || e.level == Never {\n\t\treturn duty{}\n\t}", "", "TestLatticeLaws"},
	{"an empty set allows nothing", "policy/set.go", "return s.any || slices.ContainsFunc(s.only", "return s.any || len(s.only) == 0 || slices.ContainsFunc(s.only", "TestLatticeLaws"},
	{"disjoint sets meet to nothing", "policy/set.go", "\treturn downset(out)\n}", "\tif len(out) == 0 {\n\t\treturn everything[R]()\n\t}\n\treturn downset(out)\n}", "TestDisjointMeetsToNothing"},
	{"any is above every set", "policy/set.go", "if t.any || s.any {\n\t\treturn t.any\n\t}", "if t.any || s.any {\n\t\treturn true\n\t}", "TestLatticeLaws"},
	{"meet with any is the other", "policy/set.go", "if s.any {\n\t\treturn t\n\t}\n\tif t.any {", "if s.any {\n\t\treturn s\n\t}\n\tif t.any {", "TestLatticeLaws"},
	{"sets are reduced to maximal rules", "policy/set.go", "(kin == \"\" || !slices.ContainsFunc(above[kin], below))", "(kin == \"\" || true)", "TestLatticeLaws"},
	{"a meet that is too large allows nothing", "policy/set.go", "if len(out) > 4*maxRules {\n\t\t\treturn set[R]{}", "if len(out) > 4*maxRules {\n\t\t\treturn everything[R]()", "TestMeetIsBounded"},
	{"roots are whole names", "policy/set.go", "(len(name) == len(base) || name[len(base)] == '/')", "true", "TestRulesExhaustive"},
	{"hosts: ports differ", "policy/host.go", "r.port == s.port && r.methods&^s.methods == 0", "r.methods&^s.methods == 0", "TestRulesExhaustive"},
	{"hosts: fewer methods are below", "policy/host.go", "r.port == s.port && r.methods&^s.methods == 0", "r.port == s.port", "TestRulesExhaustive"},
	{"hosts: trusted is looser", "policy/host.go", "(s.trusted || !r.trusted) &&", "true &&", "TestRulesExhaustive"},
	{"trusted: meet is and", "policy/host.go", "out.trusted = r.trusted && s.trusted", "out.trusted = r.trusted || s.trusted", "TestRulesExhaustive"},
	{"hosts: a path is below any path", "policy/host.go", "(s.anyPath || !r.anyPath && r.path.leq(s.path))", "(s.anyPath || r.path.leq(s.path))", "TestRulesExhaustive"},
	{"blocked: meet is union", "policy/path.go", "return newBlocked(slices.Concat(b.patterns, c.patterns))", "return c", "TestLatticeLaws"},
	{"budget: meet is the minimum", "policy/limits.go", "budget{min(b.microUSD, c.microUSD), min(b.tokens", "budget{max(b.microUSD, c.microUSD), min(b.tokens", "TestLatticeLaws"},
	{"a spent budget denies", "policy/decide.go", "if d, over := p.budget.over(&c); over {", "if d, over := p.budget.over(&c); over && false {", "TestBudget"},
	{"a budget is spent at its limit", "nucleus/budget.go", "return used >= limit &&", "return used > limit &&", "TestOver"},
	{"what is set aside cannot be spent", "policy/limits.go", "nucleus.AddAmounts(*c.Spent.Of(d), *c.Reserved.Of(d))", "*c.Spent.Of(d)", "TestBudget"},
	{"no seconds are over from the start", "nucleus/budget.go", "(used > 0 || d == Seconds)", "used > 0", "TestOver"},
	{"sums of budgets do not wrap", "nucleus/budget.go", "if a > Unlimited-b {", "if false {", "TestAmountsDoNotOverflow"},
	{"empty windows are one value", "policy/limits.go", "if w.from >= w.until {", "if w.from > w.until+100 {", "TestLatticeLaws"},
	{"window: meet is intersection", "policy/limits.go", "window{max(w.from, v.from), min(w.until, v.until)}", "window{min(w.from, v.from), min(w.until, v.until)}", "TestLatticeLaws"},
	{"origins: meet is intersection", "policy/policy.go", "origins:  a.origins.meet(b.origins)", "origins:  a.origins.join(b.origins)", "TestLatticeLaws"},
	{"argv: ** is no less than its head", "policy/argv.go", "if len(a.head) < len(b.head) || !b.tail && (a.tail || len(a.head) > len(b.head)) {", "if !b.tail && (a.tail || len(a.head) > len(b.head)) {\n\t\treturn false\n\t}\n\tif len(a.head)+1 < len(b.head) {", "TestRulesExhaustive"},
	{"argv: a wildcard names no shell", "policy/argv.go", "if a.wild(0) && program.Runs(args[0]) {", "if false {", "TestAttacksOnWildcards"},
	{"argv: nor one behind a wrapper", "policy/argv.go", "i >= next && isProgram(args[i])", "false", "TestAttacksOnWildcards"},
	{"argv: nor a file by its path behind one", "policy/argv.go", "return program.Named(arg) || program.Runs(arg) && arg[0] != '-'", "return program.Named(arg)", "TestAttacksOnWildcards"},
	{"argv: nor an option that holds a command", "policy/argv.go", "a.wild(i) && (program.Hands(args[at], args[i]) || ", "a.wild(i) && (", "TestAttacksOnWildcards"},
	{"argv: nor a variable that holds a shell", "policy/argv.go", "word[0] != '-' && program.Named(word)", "false", "TestAttacksOnWildcards"},
	{"argv: an argument may be called as it likes", "policy/argv.go", "if i > next && sure {", "if false {", "TestAttacksOnWildcards"},
	{"argv: the order knows what may be run", "policy/argv.go", "return program.Runs(arg)\n\tcase", "return false\n\tcase", "TestRulesExhaustive"},
	{"argv: the order knows what may be run behind one", "policy/argv.go", "case isProgram(arg):\n\t\treturn true", "case isProgram(arg):\n\t\treturn false", "TestRulesExhaustive"},
	{"argv: the order knows options that hold commands", "policy/argv.go", "if program.Hands(wrapper, arg) {", "if wrapper == \"\" {", "TestRulesExhaustive"},
	{"program: an option that may take a value", "policy/program/program.go", "\"-a --arg-file -d", "\"--max-lines -a --arg-file -d", "TestBehind"},
	{"program: find runs what stands behind -exec", "policy/program/program.go", "at = i + 1\n", "at = len(args)\n", "TestBehind"},
	{"argv: the meet of rules is below both", "policy/argv.go", "return out, out.leq(a) && out.leq(b)", "return out, true", "TestMeetNamesNothing"},
	{"program: a path is code", "policy/program/program.go", "return kinds[name] != 0 || strings.IndexByte(name, '/') >= 0", "return kinds[name] != 0", "TestRuns"},
	{"program: a version is no other program", "policy/program/program.go", "kinds[trimmed] != 0 {\n\t\treturn trimmed", "false {\n\t\treturn trimmed", "TestRuns"},

	// each dimension of a policy
	{"join of sets is union", "policy/set.go", "return downset(slices.Concat(s.only, t.only))", "return downset(s.only)", "TestLatticeLaws"},
	{"join with any is any", "policy/set.go", "if s.any || t.any {\n\t\treturn everything[R]()", "if s.any && t.any {\n\t\treturn everything[R]()", "TestLatticeLaws"},
	{"hosts: meet has the methods of both", "policy/host.go", "out.methods = r.methods & s.methods", "out.methods = r.methods | s.methods", "TestRulesExhaustive"},
	{"hosts: a range is above its parts", "policy/host.go", "s.addr.Bits() <= r.addr.Bits() && s.addr.Contains", "s.addr.Contains", "TestRulesExhaustive"},
	{"hosts: a name is below no other", "policy/host.go", "return !r.wild && r.name == s.name", "return r.name == s.name || true", "TestRulesExhaustive"},
	{"hosts: meet has the path of both", "policy/host.go", "if out.path, ok = r.path.meet(s.path); !ok {\n\t\t\treturn hostRule{}, false", "if out.path, ok = r.path.meet(s.path); !ok {\n\t\t\treturn out, true", "TestRulesExhaustive"},
	{"prefixes hold what is below", "policy/set.go", "return t.matches(s.base) && (t.below || !s.below)", "return t.matches(s.base)", "TestRulesExhaustive"},
	{"blocked: join is intersection", "policy/path.go", "return !slices.Contains(c.patterns, p)\n\t}))", "return false\n\t}))", "TestLatticeLaws"},
	{"blocked: more patterns are stricter", "policy/path.go", "return !slices.ContainsFunc(c.patterns, func(p string) bool { return !slices.Contains(b.patterns, p) })", "return true", "TestLatticeLaws"},
	{"budget: join is the maximum", "policy/limits.go", "budget{max(b.microUSD, c.microUSD), max(b.tokens", "budget{min(b.microUSD, c.microUSD), max(b.tokens", "TestLatticeLaws"},
	{"window: join spans both", "policy/limits.go", "window{min(w.from, v.from), max(w.until, v.until)}", "window{max(w.from, v.from), max(w.until, v.until)}", "TestLatticeLaws"},
	{"meet takes operations", "policy/policy.go", "m.duties[i] = a.duties[i].meet(b.duties[i])", "m.duties[i] = a.duties[i]", "TestLatticeLaws"},
	{"meet takes roots", "policy/policy.go", "a.roots.meet(b.roots)", "a.roots", "TestLatticeLaws"},
	{"meet takes blocked", "policy/policy.go", "a.blocked.meet(b.blocked)", "a.blocked", "TestLatticeLaws"},
	{"meet takes commands", "policy/policy.go", "a.commands.meet(b.commands)", "a.commands", "TestLatticeLaws"},
	{"meet takes hosts", "policy/policy.go", "a.hosts.meet(b.hosts)", "a.hosts", "TestLatticeLaws"},
	{"meet takes budgets", "policy/policy.go", "a.budget.meet(b.budget)", "a.budget", "TestLatticeLaws"},
	{"meet takes windows", "policy/policy.go", "a.window.meet(b.window)", "a.window", "TestLatticeLaws"},
	{"the order sees operations", "policy/policy.go", "if !a.duties[i].leq(b.duties[i]) {", "if false && !a.duties[i].leq(b.duties[i]) {", "TestLatticeLaws"},
	{"the order sees roots", "policy/policy.go", "return a.roots.leq(b.roots) && ", "return ", "TestLatticeLaws"},
	{"the order sees windows", "policy/policy.go", " && a.window.leq(b.window)", "", "TestLatticeLaws"},
	{"the order sees budgets", "policy/policy.go", " && a.budget.leq(b.budget)", "", "TestLatticeLaws"},
	{"the order sees origins", "policy/policy.go", " && a.origins.leq(b.origins)", "", "TestLatticeLaws"},

	// delegation
	{"a delegated policy is a meet", "policy/delegate.go", "return Meet(Nu(p), requested)", "return requested", "TestDelegateIsBelow"},
	{"what must be asked for above must be asked for below", "policy/delegate.go", "return Meet(Nu(p), requested)", "return Meet(p, requested)", "TestDelegateIsBelow"},
	{"a pod with more is denied, whoever made it", "policy/delegate.go", "if !Leq(child, Nu(p)) {", "if !Leq(child, Nu(p)) && false {", "TestDecideHoldsDelegation"},

	// nu
	{"nu lowers push", "policy/policy.go", "case opGitPush, opCreatePR:", "case opCreatePR:", "TestGateExhaustive"},
	{"nu lowers fetches only where hosts is any", "policy/policy.go", "if !p.hosts.any {\n\t\t\treturn false", "if false {\n\t\t\treturn false", "TestGateExhaustive"},
	{"nu needs all three legs", "policy/policy.go", "return p.enables(m).Has(allLegs)", "return p.enables(m).Has(nucleus.WayOut)", "TestGateExhaustive"},
	{"nu counts what asks as enabled", "policy/policy.go", "if d.level != Never {\n\t\t\tlegs |=", "if d.level == Always {\n\t\t\tlegs |=", "TestNuCountsWhatAsks"},
	{"nu lowers no further than ask", "policy/policy.go", "n.duties[i].level = Ask", "n.duties[i].level = Never", "TestNuAgreesWithDecide"},
	{"nu lowers fetches where hosts is any", "policy/policy.go", "case opWebFetch, opNetConnect:\n\t\tif !p.hosts.any {", "case opWebFetch, opNetConnect:\n\t\tif true {", "TestGateExhaustive"},
	{"nu lowers commands only on a network of their own", "policy/policy.go", "if !m.directNetwork {\n\t\t\treturn false", "if false {\n\t\t\treturn false", "TestGateExhaustive"},
	{"nu lowers only always", "policy/policy.go", "if p.duties[i].level != Always {", "if p.duties[i].level == Ask {", "TestNuLaws"},

	// the gate
	{"the trifecta asks", "policy/decide.go", "case takes.Has(nucleus.WayOut) && before.Has(nucleus.Private|nucleus.Untrusted):", "case false:", "TestProve"},
	{"both legs make the trifecta", "policy/decide.go", "case takes.Has(nucleus.WayOut) && before.Has(nucleus.Private|nucleus.Untrusted):", "case takes.Has(nucleus.WayOut) && before.Has(nucleus.Private):", "TestGateExhaustive"},
	{"a connection is untrusted before it is judged", "policy/decide.go", "if i == opNetConnect {", "if false {", "TestConnectIsUntrustedFirst"},
	{"contained mode has private from the start", "policy/decide.go", "before := c.Exposure | start", "before := c.Exposure", "TestGateExhaustive"},
	{"contained mode with a stranger's repository", "policy/legs.go", "return nucleus.Private | nucleus.Untrusted\n\t}", "return nucleus.Private\n\t}", "TestGateExhaustive"},
	{"only a trusted rule counts on no leg", "policy/decide.go", "if s.trusted {\n\t\ttakes = 0", "if s.trusted || s.rule != \"\" {\n\t\ttakes = 0", "TestStory"},
	{"an unknown operation denies", "policy/decide.go", "case i < 0:", "case false:", "TestZeroAndNilDeny"},
	{"ask asks", "policy/decide.go", "case p.duties[i].level == Ask:", "case false:", "TestGateExhaustive"},
	{"never denies", "policy/decide.go", "case p == nil || p.duties[i].level == Never:", "case p == nil:", "TestGateExhaustive"},
	{"the window denies", "policy/decide.go", "case !p.window.contains(c.UnixMilli):", "case false:", "TestWindow"},
	{"the end of the window is outside", "policy/limits.go", "w.from <= ms && ms < w.until", "w.from <= ms && ms <= w.until", "TestWindow"},
	{"what is missing denies", "policy/decide.go", "if len(a.Files) == 0 {", "if false {", "TestMissingPartDenies"},

	// the scopes
	{"paths are clean", "policy/decide.go", "case !cleanPath(name):", "case false:", "TestAttacksOnPaths"},
	{"paths lie in roots", "policy/decide.go", "case !p.inRoots(name):", "case false:", "TestAttacksOnPaths"},
	{"blocked paths are denied", "policy/decide.go", "case p.blocked.matches(name):", "case false:", "TestAttacksOnPaths"},
	{"every file is judged", "policy/decide.go", "for i := range files {\n", "for i := range files[:1] {\n", "TestAttacksOnPaths"},
	{"files that argv names are judged", "policy/decide.go", "if s := p.scopeFiles(c.Files); s.denied {", "if s := p.scopeFiles(nil); s.denied {", "TestAttacksOnPaths"},
	{"a pattern is a whole segment", "policy/path.go", "return p == len(pattern)", "return true", "TestAttacksOnPaths"},
	{"a command's directory is judged", "policy/decide.go", "if s := p.scopePath(orWorkspace(c.Dir)); s.denied {", "if s := p.scopePath(orWorkspace(c.Dir)); s.denied && false {", "TestAttacksOnPaths"},
	{"a commit without paths is all of its repository", "policy/decide.go", "if len(c.Paths) == 0 {\n\t\treturn p.scopePath(repo)", "if len(c.Paths) == 0 {\n\t\treturn scoped{}", "TestAttacksOnCommits"},
	{"a commit's paths lie in its repository", "policy/decide.go", "p.scopePath(path.Join(repo, name))", "p.scopePath(path.Join(\".\", name))", "TestAttacksOnCommits"},
	{"variables of its own", "policy/decide.go", "if len(c.Env) > 0 {", "if false {", "TestAttacksOnCommands"},
	{"argv is matched whole", "policy/argv.go", "!a.tail && len(args) > len(a.head)", "false", "TestAttacksOnCommands"},
	{"a suffix has its dot", "policy/host.go", "return len(p.name) > len(r.name) && strings.HasSuffix(p.name, r.name)", "return strings.HasSuffix(p.name, r.name[1:])", "TestAttacksOnHosts"},
	{"an address is compared as an address", "policy/host.go", "return r.addr.IsValid() && r.addr.Contains(p.addr)", "return r.addr.IsValid()", "TestAttacksOnHosts"},
	{"a request's method is judged", "policy/host.go", "return r.methods&method != 0 &&", "return true &&", "TestAttacksOnRequests"},
	{"only a literal opens a private address", "policy/host.go", "case !asked.addr.IsValid() && r.opaque():", "case true:", "TestLiterals"},
	{"names are clean", "policy/host.go", "return peer{name: host}, cleanName(host)", "return peer{name: host}, host != \"\"", "TestAttacksOnHosts"},
	{"numbers are addresses", "policy/host.go", "if looksLikeAddress(host) {", "if strings.Contains(host, \":\") {", "TestLoadRefuses"},
	{"ports are compared whole", "policy/host.go", "if int(r.port) != port {", "if r.port != uint16(port) {", "TestAttacksOnHosts"},
	{"URL paths are clean", "policy/host.go", "(r.anyPath || cleanURLPath(path) && r.path.matches(path))", "(r.anyPath || r.path.matches(path))", "TestAttacksOnRequests"},
	{"requests open no connection", "policy/decide.go", "if r.opaque() || plain != nil &&", "if true || plain != nil &&", "TestAttacksOnHosts"},
	{"plain requests are judged whole", "policy/decide.go", "if r.opaque() || plain != nil && r.opensRequest(methodOf(plain.Method), plain.Path) {", "if r.opaque() || plain != nil {", "TestAttacksOnRequests"},
	{"plain requests are seen inside", "policy/decide.go", "if r.opaque() || plain != nil && r.opensRequest(methodOf(plain.Method), plain.Path) {", "if r.opaque() {", "TestAttacksOnRequests"},
	{"a plain request is for its connection", "policy/decide.go", "if plain != nil && (plain.Host", "if false && (plain.Host", "TestAttacksOnPlainRequests"},
	{"a repository tightens", "policy/load.go", "return Meet(p, own), nil", "return Join(p, own), nil", "TestTightenNeverLoosens"},
	{"an origin proves who answers", "policy/origin.go", "case \"http\", \"git\", \"ftp\", \"ftps\":", "case \"http\":\n\tcase \"git\", \"ftp\", \"ftps\":", "TestTrustedRepo"},
	{"every remote is trusted", "policy/origin.go", "if p == nil || !p.origins.holds(span{base: origin}) {", "if p == nil || len(remotes) == 1 && !p.origins.holds(span{base: origin}) {", "TestTrustedRepo"},

	// reading files
	{"what is left out allows no host", "policy/load.go", "\t\tcommands: everything[argv](),\n", "\t\tcommands: everything[argv](),\n\t\thosts: everything[hostRule](),\n", "TestDefaults"},
	{"tags are refused", "policy/node.go", "case y.Style&yaml.TaggedStyle != 0:", "case false:", "TestLoadRefuses"},
	{"merge keys are refused", "policy/node.go", "case \"!!merge\":\n\t\t\treturn nil, n.errorf(\"merge key <<; a policy has no merge keys\")", "case \"!!merge\":\n\t\t\tn.kind = text", "TestLoadRefuses"},
	{"a second document is refused", "policy/node.go", "case err == nil:\n\t\treturn nil, &lineError{second.Line", "case err == nil && false:\n\t\treturn nil, &lineError{second.Line", "TestLoadRefuses"},
	{"unknown keys are refused", "policy/node.go", "if read == nil {", "if read == nil && false {", "TestLoadRefuses"},
	{"keys that come twice are refused", "policy/node.go", "if line, twice := seen[key.text]; twice {", "if line, twice := seen[key.text]; twice && false {", "TestLoadRefuses"},
	{"anchors are refused", "policy/node.go", "case y.Anchor != \"\":", "case false:", "TestLoadRefuses"},
	{"depth is bounded", "policy/node.go", "case depth > maxDepth:", "case false:", "TestLoadRefuses"},
	{"size is bounded", "policy/node.go", "case len(data) > MaxDocument:", "case false:", "TestLoadRefuses"},
	{"marks are bounded", "policy/node.go", "if marks > most {", "if false {", "TestLoadRefuses"},
	{"messages are bounded", "policy/node.go", "if cut := len(message) - head - tail; cut > 0 {", "if cut := len(message) - head - tail; cut > 1<<30 {", "TestLoadIsBounded"},
	{"an inverted window is refused", "policy/load.go", "if err == nil && w.from > w.until {", "if false {", "TestLoadRefuses"},
	{"a trusted rule lists methods and paths", "policy/host.go", "if r.trusted && (r.methods == allMethods || r.anyPath) {", "if r.trusted && r.methods == allMethods {", "TestLoadRefuses"},

	// trials, proofs, commands
	{"a denial takes no leg", "policy/trial/step.go", "if d.Verdict == nucleus.Allow || d.Verdict == nucleus.Ask {", "if d.Verdict != \"\" {\n\t\td.Takes |= nucleus.WayOut", "TestSessions"},
	{"an ask counts as granted", "policy/trial/step.go", "if d.Verdict == nucleus.Allow || d.Verdict == nucleus.Ask {", "if d.Verdict == nucleus.Allow {", "TestSessions"},
	{"the label is that of the step", "policy/trial/step.go", "c.UntrustedRepo = s.untrusted", "", "TestSessions"},
	{"what the log cut is not judged", "policy/trial/replay.go", "strings.Contains(text, \"[cut: \") ||", "", "TestRun"},
	{"the proof does not believe what it need not", "policy/prove.go", "if !trustNothing && p.scope(&a).trusted {", "if p.scope(&a).trusted {", "TestProve"},
	{"git's options before the subcommand", "policy/command/forge.go", "case gitValued[a.text] && len(args) > 1:", "case false:", "TestRead"},
	{"git -c runs programs", "policy/command/forge.go", "!args[1].known || !gitSafeKeys[strings.ToLower(key)]", "!args[1].known || key == \"\"", "TestRead"},
	{"wrappers are looked through", "policy/command/wrapper.go", "r.command(rest, depth+1)\n}", "r.add(rest, ReadOnly, \"a wrapper\")\n}", "TestRead"},
	{"a shell is arbitrary code", "policy/command/command.go", "r.raise(Arbitrary, name+\" runs code\")", "", "TestReadScripts"},
	{"what is not known is arbitrary code", "policy/command/classify.go", "return Arbitrary, \"the program \" + name + \" is not known\"", "return ReadOnly, \"the program \" + name + \" is not known\"", "TestRead"},
	{"substitutions are read", "policy/command/script.go", "\t\tr.node(n, depth)\n\t\treturn true", "\t\tr.node(n, depth)\n\t\t_, sub := n.(*syntax.CmdSubst)\n\t\treturn !sub", "TestReadScripts"},
	{"variables can change what runs", "policy/command/script.go", "if a.Naked || a.Name == nil || harmlessVariable(a.Name.Value) {", "if true {", "TestReadScripts"},
}

func init() {
	for _, row := range []struct{ leg, ops, when string }{
		{"Private", "ReadFiles GlobSearch GrepSearch RunBash", "InAnyMachine"},
		{"Untrusted", "WebFetch WebSearch NetConnect", "InAnyMachine"},
		{"Untrusted", "ReadFiles WriteFiles EditFiles GlobSearch GrepSearch RunBash", "UntrustedRepo"},
		{"WayOut", "GitPush CreatePR WebFetch NetConnect", "InAnyMachine"},
		{"WayOut", "RunBash", "DirectNetwork"},
	} {
		for op := range strings.FieldsSeq(row.ops) {
			old := fmt.Sprintf("\t{nucleus.%s, nucleus.%s, %s},\n", row.leg, op, row.when)
			mutants = append(mutants, mutant{"leg: " + op + " takes " + row.leg + " " + row.when, "policy/legs.go", old, "", "TestGateExhaustive"})
		}
	}
}
