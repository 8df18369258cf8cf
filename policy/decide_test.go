package policy

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"cal/nucleus"
)

func load(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Load("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// golden compares with a file of testdata; UPDATE_GOLDEN=1 writes it.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (UPDATE_GOLDEN=1 writes it):\n got %s\nwant %s", file, got, want)
	}
}

// sample is an action of op that every scope of Top allows.
func sample(op nucleus.Op) nucleus.Action {
	a := nucleus.Action{Op: op}
	switch op {
	case nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles, nucleus.GlobSearch, nucleus.GrepSearch:
		a.Files = []nucleus.File{{Path: "app/main.go"}}
	case nucleus.RunBash:
		a.Command = &nucleus.Command{Argv: []string{"go", "test", "./..."}, Dir: "app"}
	case nucleus.GitCommit:
		a.Commit = &nucleus.Commit{Repo: "app", Paths: []string{"main.go"}}
	case nucleus.WebFetch:
		a.Fetch = &nucleus.Fetch{Method: "GET", Host: "example.org", Port: 443, Path: "/x"}
	case nucleus.NetConnect:
		a.Connect = &nucleus.Connect{Host: "example.org", Port: 443}
	case nucleus.ManagePods:
		a.Sub = &nucleus.Sub{Do: nucleus.SubList}
	case nucleus.SpawnAgent:
		a.Sub = &nucleus.Sub{Do: nucleus.SubSpawn, Task: "t", Policy: json.RawMessage(`{"operations":{}}`)}
	}
	return a
}

// TestGateExhaustive tries every operation, level, exposure and kind of machine,
// with the rest of the policy enabling all legs or not, against the sentences of
// the design written down a second time.
func TestGateExhaustive(t *testing.T) {
	const (
		priv, untr, out = nucleus.Private, nucleus.Untrusted, nucleus.WayOut
	)
	in := func(op nucleus.Op, names string) bool {
		return strings.Contains(" "+names+" ", " "+string(op)+" ")
	}
	count := 0
	for _, op := range nucleus.Ops() {
		for level := Never; level <= Always; level++ {
			for code := range 1 << 8 {
				bit := func(i int) bool { return code>>i&1 == 1 }
				c := nucleus.Context{
					Exposure: nucleus.Legs(code & 7), UntrustedRepo: bit(3), Contained: bit(4), DirectNetwork: bit(5), UnixMilli: 1,
				}
				hostsAny, others := bit(6), bit(7)
				p := Top()
				if !hostsAny {
					p.hosts = downset([]hostRule{{name: "example.org", port: 443, methods: allMethods, anyPath: true}})
				}
				for i, other := range nucleus.Ops() {
					if !others {
						p.duties[i] = duty{}
					}
					if other == op {
						p.duties[i] = duty{level, 2}
					}
				}
				got := p.seal().Decide(sample(op), c)
				count++

				if level == Never {
					if got.Verdict != nucleus.Deny || got.Takes != 0 || got.Rule != "operations."+string(op) {
						t.Fatalf("%s never, %+v: %+v", op, c, got)
					}
					continue
				}
				var takes nucleus.Legs
				if in(op, "read_files glob_search grep_search run_bash") {
					takes |= priv
				}
				fileOrCommand := in(op, "read_files write_files edit_files glob_search grep_search run_bash")
				if in(op, "web_fetch web_search net_connect") || fileOrCommand && c.UntrustedRepo {
					takes |= untr
				}
				if in(op, "git_push create_pr web_fetch net_connect") || op == nucleus.RunBash && c.DirectNetwork {
					takes |= out
				}
				before := c.Exposure
				all := takes
				if c.Contained {
					before |= priv
					all |= priv
					if c.UntrustedRepo {
						before |= untr
						all |= untr
					}
				}
				if op == nucleus.NetConnect {
					before |= untr
				}
				enablesAll := others
				lowered := in(op, "git_push create_pr") ||
					hostsAny && in(op, "web_fetch net_connect") ||
					c.DirectNetwork && op == nucleus.RunBash
				want := nucleus.Decision{Verdict: nucleus.Allow, Takes: all}
				switch {
				case takes.Has(out) && before.Has(priv|untr):
					want.Verdict, want.Rule = nucleus.Ask, "trifecta"
				case level == Always && enablesAll && lowered:
					want.Verdict, want.Rule = nucleus.Ask, "nu"
				case level == Ask:
					want.Verdict, want.Rule = nucleus.Ask, "operations."+string(op)
				default:
					want.Rule = "operations." + string(op)
					if !hostsAny && in(op, "web_fetch net_connect") {
						want.Rule = "hosts[0]"
					}
				}
				if want.Verdict == nucleus.Ask {
					want.Approvals = 2
				}
				got.Why = ""
				if got != want {
					t.Fatalf("%s %s, hosts any %v, others %v, %+v:\n got %+v\nwant %+v", op, level, hostsAny, others, c, got, want)
				}
			}
		}
	}
	if count != 14*3*256 {
		t.Fatalf("%d cases", count)
	}
}

// TestStory walks through one session the way a node does: the exposure grows
// with what went ahead, and with nothing else.
func TestStory(t *testing.T) {
	p := load(t, `
name: story
operations: {read_files: always, run_bash: always, web_fetch: always, git_push: always, net_connect: always}
hosts: {only: [{host: docs.example, port: 443}, {host: api.example, port: 443, methods: [GET], path: "/v1/**", trusted: true}]}
`)
	fetch := func(host, path string) nucleus.Action {
		return nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", Host: host, Port: 443, Path: path}}
	}
	push := nucleus.Action{Op: nucleus.GitPush, Push: &nucleus.Push{Repo: "app"}}
	var exposure nucleus.Legs
	for i, step := range []struct {
		action  nucleus.Action
		verdict nucleus.Verdict
		rule    string
		granted bool
		after   string
	}{
		{push, nucleus.Ask, "nu", false, ""},
		{fetch("evil.example", "/"), nucleus.Deny, "hosts", false, ""},
		{fetch("api.example", "/v1/issue"), nucleus.Allow, "hosts[0]", false, ""},
		{fetch("api.example", "/v1/../admin"), nucleus.Deny, "hosts", false, ""},
		{sample(nucleus.ReadFiles), nucleus.Allow, "operations.read_files", false, "private"},
		{fetch("docs.example", "/guide"), nucleus.Allow, "hosts[1]", false, "private untrusted way_out"},
		{fetch("docs.example", "/guide?"), nucleus.Ask, "trifecta", false, "private untrusted way_out"},
		{fetch("api.example", "/v1/issue"), nucleus.Allow, "hosts[0]", false, "private untrusted way_out"},
		{push, nucleus.Ask, "trifecta", true, "private untrusted way_out"},
		{sample(nucleus.ReadFiles), nucleus.Allow, "operations.read_files", false, "private untrusted way_out"},
	} {
		d := p.Decide(step.action, nucleus.Context{Exposure: exposure, UnixMilli: 1})
		if d.Verdict == nucleus.Allow || d.Verdict == nucleus.Ask && step.granted {
			exposure |= d.Takes
		}
		if d.Verdict != step.verdict || d.Rule != step.rule || strings.Join(exposure.Names(), " ") != step.after {
			t.Errorf("step %d: %+v, exposure %v; want %s by %s, %q", i, d, exposure.Names(), step.verdict, step.rule, step.after)
		}
	}
}

// The first connection of a session that has read private data asks already:
// what comes back through it is read while more goes out.
func TestConnectIsUntrustedFirst(t *testing.T) {
	p := load(t, `{operations: {net_connect: always, web_fetch: always}, hosts: {only: [{host: example.org, port: 443}]}}`)
	c := nucleus.Context{Exposure: nucleus.Private}
	if d := p.Decide(sample(nucleus.NetConnect), c); d.Rule != "trifecta" || d.Verdict != nucleus.Ask || d.Approvals != 1 {
		t.Errorf("net_connect after private data: %+v, want an ask by trifecta", d)
	}
	if d := p.Decide(sample(nucleus.WebFetch), c); d.Verdict != nucleus.Allow {
		t.Errorf("web_fetch after private data: %+v, want allow", d)
	}
	if d := p.Decide(sample(nucleus.NetConnect), nucleus.Context{}); d.Verdict != nucleus.Allow {
		t.Errorf("net_connect without private data: %+v, want allow", d)
	}
}

// What asks is enabled: a person may grant it, and then the three have met.
func TestNuCountsWhatAsks(t *testing.T) {
	for text, want := range map[string]Level{
		"{read_files: ask, web_search: ask, git_push: always}":   Ask,
		"{read_files: ask, web_search: never, git_push: always}": Always,
	} {
		if got := Nu(load(t, "operations: "+text)).Level(nucleus.GitPush); got != want {
			t.Errorf("%s: git_push is %s, want %s", text, got, want)
		}
	}
}

func TestZeroAndNilDeny(t *testing.T) {
	for _, p := range []*Policy{nil, {}, Bottom()} {
		for _, op := range append(nucleus.Ops(), "", "execute", "READ_FILES") {
			for exposure := range nucleus.Legs(8) {
				if d := p.Decide(sample(op), nucleus.Context{Exposure: exposure}); d.Verdict != nucleus.Deny || d.Takes != 0 || d.Rule == "" || d.Why == "" {
					t.Errorf("%#v: %q is %+v, want a denial that says why and takes nothing", p, op, d)
				}
			}
		}
	}
}

// What must be judged and is missing cannot be decided.
func TestMissingPartDenies(t *testing.T) {
	for _, op := range nucleus.Ops() {
		full, bare := sample(op), nucleus.Action{Op: op}
		if d := Top().Decide(full, nucleus.Context{}); d.Verdict == nucleus.Deny {
			t.Errorf("%s: %+v", op, d)
		}
		needsPart := full.Files != nil || full.Command != nil || full.Commit != nil || full.Fetch != nil || full.Connect != nil || full.Sub != nil
		d := Top().Decide(bare, nucleus.Context{})
		if needsPart != (d.Verdict == nucleus.Deny && d.Rule == "action") {
			t.Errorf("%s without its part: %+v", op, d)
		}
	}
}

func TestWindow(t *testing.T) {
	p := load(t, `{operations: {read_files: always}, window: {from: 2026-01-01T00:00:00Z, until: 2027-01-01T00:00:00Z}}`)
	const from, until = 1767225600000, 1798761600000
	for now, want := range map[int64]nucleus.Verdict{
		0: nucleus.Deny, from - 1: nucleus.Deny, from: nucleus.Allow, until - 1: nucleus.Allow, until: nucleus.Deny, until + 1: nucleus.Deny,
	} {
		if d := p.Decide(sample(nucleus.ReadFiles), nucleus.Context{UnixMilli: now}); d.Verdict != want || want == nucleus.Deny && d.Rule != "window" {
			t.Errorf("at %d: %+v, want %s", now, d, want)
		}
	}
}

func TestLegTable(t *testing.T) {
	var b strings.Builder
	b.WriteString("| leg | operation | when |\n|---|---|---|\n")
	seen := map[string]bool{}
	for _, row := range LegTable() {
		line := fmt.Sprintf("| %s | `%s` | %s |\n", row.Leg.Names()[0], row.Op, row.When)
		if seen[line] || !row.Op.Valid() || len(row.Leg.Names()) != 1 {
			t.Errorf("bad row %s", line)
		}
		seen[line] = true
		b.WriteString(line)
	}
	golden(t, "testdata/legs.md", b.String())
	for i, op := range nucleus.Ops() {
		if opIndex(op) != i {
			t.Errorf("opIndex(%s) = %d, want %d", op, opIndex(op), i)
		}
	}
}

// Nu as a policy and nu inside a decision are one rule.
func TestNuAgreesWithDecide(t *testing.T) {
	for _, name := range Profiles() {
		p, err := Profile(name)
		if err != nil {
			t.Fatal(err)
		}
		n := Nu(p)
		for _, op := range nucleus.Ops() {
			for exposure := range nucleus.Legs(8) {
				c := nucleus.Context{Exposure: exposure}
				a, b := p.Decide(sample(op), c), n.Decide(sample(op), c)
				if a.Verdict != b.Verdict || a.Takes != b.Takes || a.Approvals != b.Approvals {
					t.Errorf("%s %s exposure %v: %+v, of nu %+v", name, op, exposure.Names(), a, b)
				}
			}
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	var rules []string
	for i := range 100 {
		rules = append(rules, fmt.Sprintf(`{host: h%d.example.org, port: 443, methods: [GET], path: "/a%d/**"}`, i, i))
	}
	var commands, blocked, roots []string
	for i := range 100 {
		commands = append(commands, fmt.Sprintf(`[go, test, "./p%d"]`, i))
		blocked = append(blocked, fmt.Sprintf(`"**/*.x%d"`, i))
		roots = append(roots, fmt.Sprintf("p%d", i))
	}
	p := load(b, fmt.Sprintf(`
operations: {read_files: always, run_bash: always, web_fetch: always}
paths: {roots: {only: [%s]}, blocked: [%s]}
commands: {only: [%s]}
hosts: {only: [%s]}
`, strings.Join(roots, ","), strings.Join(blocked, ","), strings.Join(commands, ","), strings.Join(rules, ",")))
	for name, a := range map[string]nucleus.Action{
		"read":  {Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "p99/src/main.go"}}},
		"run":   {Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"go", "test", "./p99"}, Dir: "p99"}},
		"fetch": {Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", Host: "h99.example.org", Port: 443, Path: "/a99/x"}},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d := p.Decide(a, nucleus.Context{}); d.Verdict != nucleus.Allow {
					b.Fatal(d)
				}
			}
		})
	}
}

func BenchmarkLoad1000(b *testing.B) {
	var text strings.Builder
	text.WriteString("hosts:\n  only:\n")
	for i := range 1000 {
		fmt.Fprintf(&text, "  - {host: h%d.example.org, port: 443, methods: [GET, POST], path: \"/a/%d/**\"}\n", i, i)
	}
	for b.Loop() {
		load(b, text.String())
	}
}
