package policy

import (
	"fmt"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"cal/nucleus"
)

func TestLoadRefuses(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		// documents
		{"", `f:1: the document is empty`},
		{"# nothing\n", `f:1: the document is empty`},
		{"null", `f:1: the policy is nothing; want a mapping`},
		{"always", `f:1: the policy is "always"; want a mapping`},
		{"- a", `f:1: the policy is a list; want a mapping`},
		{"name: a\n---\nname: b", `f:2: a second document`},
		{"name: \xff", `f:1: the document is not UTF-8`},
		{"name: [", `f:`},
		{`{"name": "a"} x`, `f:`},
		{"name: a\n\tb: c", `f:`},
		{"name: \"a\x00\"", `f:`},
		{strings.Repeat("#", MaxDocument+1), `f:1: the document has more than 1048576 bytes`},
		{"name: a\n" + strings.Repeat("#\n", maxMarks/2), `f:32769: the document has more than 65536 lines and marks`},
		{"[" + strings.Repeat("1,", maxMarksJSON) + "1]", `f:1: the document has more than 98304 lines and marks`},
		{"name: " + strings.Repeat("x", 100_000) + "\n", ` [cut: `},
		// YAML that reads differently than it looks
		{"operations: &x {read_files: always}", `f:1: anchor &x`},
		{"name: a\noperations: *x", `f:2: not YAML: alias *x`},
		{"a: &x b\nname: *x", `f:1: anchor &x`},
		{"name: a\n<<: {name: b}", `f:2: merge key <<`},
		{"name: !!str a", `f:1: tag !!str`},
		{"name: !x a", `f:1: tag !x`},
		{"name: 1", `f:1: name is the number 1; want a string (quote it)`},
		{"name: true", `f:1: name is true; want a string`},
		{"name: ~", `f:1: name is nothing; want a string`},
		{"commands: {only: [[sleep, 5]]}", `f:1: an argument is the number 5; want a string`},
		{"commands: {only: [[go, **]]}", `must be quoted`},
		// nesting
		{strings.Repeat("[", 100_000), `f:`},
		{strings.Repeat("- ", 100_000), `f:`},
		{strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000), `f:`},
		{"commands: {only: [[" + strings.Repeat("[", 20) + strings.Repeat("]", 20) + "]]}", `f:1: nested deeper than 12`},
		{`{"hosts":` + strings.Repeat("[", 20) + strings.Repeat("]", 20) + "}", `f:1: nested deeper than 12`},
		// keys
		{"name: a\nrules: []", `f:2: the policy has the unknown key "rules"; want one of name, operations, obligations, paths, commands, hosts, budget, window, trusted_origins`},
		{"Name: a", `f:1: the policy has the unknown key "Name"`},
		{"name: a\nname: a", `f:2: the policy has the key "name" twice, first in line 1`},
		{"{\"name\": \"a\",\n \"name\": \"a\"}", `f:2: the policy has the key "name" twice, first in line 1`},
		{"1: a", `f:1: the key of the policy is the number 1`},
		{"? [a]\n: b", `f:1: the key of the policy is a list`},
		{"paths: {root: any}", `f:1: paths has the unknown key "root"; want one of roots, blocked`},
		{"hosts: {only: [], any: true}", `f:1: hosts has the unknown key "any"; want one of only`},
		{"hosts: {only: [{host: a.b, port: 1, ports: 2}]}", `f:1: a host rule has the unknown key "ports"`},
		{"obligations: {git_push: {quorum: 2}}", `f:1: obligations.git_push has the unknown key "quorum"; want one of approvals`},
		// operations
		{"operations:\n  read_files: always\n  execute: always", `f:3: unknown operation "execute"; want one of read_files, write_files`},
		{"operations: {read_files: allow}", `f:1: read_files is "allow"; want never, ask or always`},
		{"operations: {read_files: Always}", `f:1: read_files is "Always"`},
		{"operations: {read_files: true}", `f:1: read_files is true; want never, ask or always`},
		{"operations: {read_files: 2}", `f:1: read_files is the number 2`},
		{"operations: {read_files: }", `f:1: read_files is nothing`},
		{"operations: {read_files: always, read_files: never}", `f:1: operations has the key "read_files" twice`},
		{"operations: [read_files]", `f:1: operations is a list; want a mapping`},
		{"obligations: {execute: {approvals: 1}}", `f:1: unknown operation "execute"`},
		{"obligations: {git_push: {approvals: 0}}", `f:1: obligations.git_push.approvals is the number 0; want a whole number from 1 to 16`},
		{"obligations: {git_push: {approvals: 17}}", `want a whole number from 1 to 16`},
		{"obligations: {git_push: {approvals: two}}", `want a whole number from 1 to 16`},
		// sets
		{"hosts: all", `f:1: hosts is "all"; want any, or {only: [`},
		{"hosts:\n", `f:1: hosts is nothing; want any`},
		{"hosts: {}", `f:1: hosts is an empty mapping; want any, or {only: []} for nothing`},
		{"hosts: []", `f:1: hosts is a list; want any`},
		{"hosts: {only: any}", `f:1: hosts.only is "any"; want a list`},
		{"commands: none", `f:1: commands is "none"; want any`},
		{"paths: {roots: [a]}", `f:1: paths.roots is a list; want any`},
		{"commands: {only: [" + strings.Repeat("[a],", maxRules) + "[a]]}", `commands.only has 4097 entries; at most 4096`},
		// paths
		{"paths: {roots: {only: [/etc]}}", `f:1: root "/etc" is not a clean path below the workspace`},
		{"paths: {roots: {only: [a/../b]}}", `root "a/../b" is not a clean path`},
		{"paths: {roots: {only: [\"a/**\"]}}", `root "a/**" has a wildcard`},
		{"paths: {blocked: \"*.pem\"}", `f:1: paths.blocked is "*.pem"; want a list`},
		{"paths: {blocked: [\"/etc/*\"]}", `f:1: blocked pattern "/etc/*" is not a clean path`},
		{"paths: {blocked: [\"../*\"]}", `is not a clean path`},
		{"paths: {blocked: [\"a/\"]}", `is not a clean path`},
		{"paths: {blocked: [\"!a\"]}", `has one of ! [ ] { } \`},
		{"paths: {blocked: [\"*.{pem,key}\"]}", `has one of ! [ ] { } \`},
		{"paths: {blocked: [\"[ab]\"]}", `has one of ! [ ] { } \`},
		{"paths: {blocked: [\"**.pem\"]}", `has ** beside other characters`},
		{"paths: {blocked: [\"a\\u0007\"]}", `control or replacement character at byte 1`},
		{`{"paths": {"blocked": ["\ud800"]}}`, `control or replacement character at byte 0`},
		// commands
		{"commands: {only: [git status]}", `f:1: a command is "git status"; want a list like [git, status]`},
		{"commands: {only: [[]]}", `f:1: a command pattern without arguments`},
		{"commands: {only: [[\"**\", a]]}", `"**" is argument 1 of 2; it may only be the last`},
		{"commands: {only: [[git, \"st*\"]]}", `argument "st*" has a wildcard in it`},
		// hosts
		{"hosts: {only: [a.b]}", `f:1: a host rule is "a.b"; want a mapping`},
		{"hosts:\n  only:\n  - {port: 443}", `f:3: a host rule without host`},
		{"hosts: {only: [{host: a.b}]}", `f:1: the rule for host a.b has no port; want a whole number from 1 to 65535`},
		{"hosts: {only: [{host: a.b, port: 0}]}", `f:1: port is the number 0; want a whole number from 1 to 65535`},
		{"hosts: {only: [{host: a.b, port: 65536}]}", `port is the number 65536`},
		{"hosts: {only: [{host: a.b, port: 0x1BB}]}", `port is the number 0x1BB`},
		{"hosts: {only: [{host: a.b, port: \"443\"}]}", `port is "443"`},
		{"hosts: {only: [{host: \"*\", port: 443}]}", `host "*" is no pattern; want "*.suffix", or "hosts: any"`},
		{"hosts: {only: [{host: \"a.*\", port: 443}]}", `host "a.*" is no host`},
		{"hosts: {only: [{host: \"*a.b\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: \"*.10.0.0.1\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: a.b., port: 443}]}", `is no host`},
		{"hosts: {only: [{host: \"a.b:443\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: https://a.b, port: 443}]}", `is no CIDR`},
		{"hosts: {only: [{host: \"127.1\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: \"0x7f000001\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: \"[::1]\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: \"fe80::1%eth0\", port: 443}]}", `is no host`},
		{"hosts: {only: [{host: 10.1.2.3/8, port: 443}]}", `has bits set after its prefix; want "10.0.0.0/8"`},
		{"hosts: {only: [{host: \"::ffff:10.0.0.0/104\", port: 443}]}", `is an IPv4 range written as IPv6`},
		{"hosts: {only: [{host: grün.example, port: 443}]}", `is no host`},
		{"hosts: {only: [{host: a.b, port: 443, methods: GET}]}", `methods is "GET"; want a list`},
		{"hosts: {only: [{host: a.b, port: 443, methods: []}]}", `methods is an empty list, which allows nothing`},
		{"hosts: {only: [{host: a.b, port: 443, methods: [get]}]}", `unknown method "get"; want one of DELETE, GET`},
		{"hosts: {only: [{host: a.b, port: 443, path: repos}]}", `path "repos" is no pattern`},
		{"hosts: {only: [{host: a.b, port: 443, path: /a/*/b}]}", `is no pattern`},
		{"hosts: {only: [{host: a.b, port: 443, path: /a/../b}]}", `is no pattern`},
		{"hosts: {only: [{host: a.b, port: 443, path: \"//**\"}]}", `is no pattern`},
		{"hosts: {only: [{host: a.b, port: 443, path: /a%20b}]}", `is no pattern`},
		{"hosts: {only: [{host: a.b, port: 443, trusted: true}]}", `f:1: the rule for host a.b: a trusted rule counts on no leg, so it must list methods and a path`},
		{"hosts: {only: [{host: a.b, port: 443, trusted: true, path: /a}]}", `must list methods and a path`},
		{"hosts: {only: [{host: a.b, port: 443, trusted: true, methods: [GET]}]}", `must list methods and a path`},
		{"hosts: {only: [{host: a.b, port: 443, trusted: 1}]}", `trusted is the number 1; want true or false`},
		{"hosts: {only: [{host: a.b, port: 443, trusted: \"true\"}]}", `trusted is "true"; want true or false`},
		// budget
		{"budget: {usd: -1}", `f:1: budget.usd is the number -1`},
		{"budget: {usd: 0.0000001}", `budget.usd is the number`},
		{"budget: {usd: 1e3}", `budget.usd is`},
		{"budget: {usd: .inf}", `budget.usd is`},
		{"budget: {usd: .nan}", `budget.usd is`},
		{"budget: {tokens: -1}", `budget.tokens is the number -1; want a whole number from 0 to 9007199254740991`},
		{"budget: {tokens: 1.5}", `budget.tokens is the number 1.5`},
		{"budget: {seconds: 9007199254740992}", `budget.seconds is`},
		{"budget: {euro: 1}", `budget has the unknown key "euro"; want one of usd, tokens, seconds`},
		// window
		{"window: {from: 2027-01-01T00:00:00Z, until: 2026-01-01T00:00:00Z}", `f:1: window is from 2027-01-01T00:00:00Z until 2026-01-01T00:00:00Z, which is before`},
		{"window: {from: 2026-01-01}", `window.from is "2026-01-01"; want a time like`},
		{"window: {from: 2026-01-01T00:00:00}", `window.from is`},
		{"window: {from: 2026-01-01T00:00:00.0001Z}", `to the millisecond at most`},
		{"window: {from: 5}", `window.from is the number 5`},
		// origins
		{"trusted_origins: any", `trusted_origins is "any"; want a list`},
		{"trusted_origins: [https://github.com/my-org]", `trusted origin "https://github.com/my-org" is no pattern`},
		{"trusted_origins: [github.com]", `is no pattern`},
		{"trusted_origins: [\"*.com/**\"]", `is no pattern`},
		{"trusted_origins: [github.com/my-org/*]", `is no pattern`},
		{"trusted_origins: [\"github.com/../**\"]", `is no pattern`},
		// scopes that nothing enforces yet
	} {
		p, err := Load("f", []byte(c.text))
		if shown := c.text[:min(len(c.text), 80)]; p != nil || err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "f:") {
			t.Errorf("%q:\n got %v, policy %v\nwant %s", shown, err, p != nil, c.want)
		}
	}
}

// No document costs a reader more than this, in bytes and time: the shapes that cost
// most, as large as they may be, and filled up with marks to the last that is read.
func TestLoadIsBounded(t *testing.T) {
	const most, mostTime = 64 << 20, 10 * time.Second
	long := strings.Repeat("x", 12)
	for name, shape := range map[string]struct{ head, part, tail string }{
		"lists":               {"a: [", "[],", "]"},
		"pairs in a list":     {"a: [", "a: b,", "]"},
		"keys":                {"", "a: b\n", ""},
		"long flow keys":      {"{", "aa" + long + ",", "}"},
		"comments at lines":   {"", "a: b #" + long + "\n", ""},
		"comments over lines": {"", "#" + long + "\n- b\n", ""},
		"comments in flow":    {"{", "a #" + long + "\n,", "}"},
		"numbered escapes":    {`name: "`, `\u0041`, `"`},
		"words":               {"name: ", "x ", ""},
		"letters":             {"name: ", "é", ""},
		"other line breaks":   {"name: a", "\u0085x", ""},
		"lines of a block":    {"name: |\n", " x\n", ""},
		"long tag":            {"!", "x", " a"},
		"long alias":          {"name: *", "x", ""},
		"spaces":              {"", " ", "a: b"},
		"anchors and tags":    {"[", "&a !b c,", "]"},
		"aliases":             {"a: &a [x]\nb: [", "*a,", "]"},
		"directives":          {"", "%TAG !a! b\n", "--- a"},
		"documents":           {"", "---\n", ""},
		"open lists":          {"", "[", ""},
		"open mappings":       {"", "{a: ", ""},
		"block lists":         {"", "- ", ""},
		"block keys":          {"", "? ", ""},
		"wide and deep":       {strings.Repeat("[", 9000), "a,", ""},
		"JSON numbers":        {`{"a":[`, "1,", "1]}"},
		"JSON keys":           {`{"a":{`, `"":"",`, `"":1}}`},
		"JSON string":         {`{"name":"`, `\t`, `"}`},
		"rules":               {"commands: {only: [", "[a],", "]}"},
		"blocked patterns":    {"paths: {blocked: [", "a,", "]}"},
		"long pattern":        {`paths: {blocked: ["`, "*a", `"], x: y}`},
		"not UTF-8":           {"", "\xff", ""},
	} {
		parts := (MaxDocument - len(shape.head) - len(shape.tail)) / len(shape.part)
		filled := 0 // parts below the bound on marks
		if per := marksOf(shape.part); per > 0 {
			bound := maxMarks
			if strings.HasPrefix(name, "JSON") {
				bound = maxMarksJSON
			}
			filled = min(parts, (bound-marksOf(shape.head)-marksOf(shape.tail))/per)
		}
		for _, n := range []int{parts, filled} {
			text := []byte(shape.head + strings.Repeat(shape.part, n) + shape.tail)
			if n == 0 {
				continue
			}
			started := time.Now()
			var err error
			bytes := allocated(func() { _, err = Load("f", text) })
			took := time.Since(started)
			if err == nil || !strings.HasPrefix(err.Error(), "f:") || len(err.Error()) > 1200 {
				t.Errorf("%s, %d parts: %.2000v", name, n, err)
			}
			t.Logf("%s, %d parts: %d MB, %s", name, n, bytes>>20, took)
			if bytes > most || took > mostTime {
				t.Errorf("%s, %d parts: %d MB allocated in %s; want at most %d MB in %s", name, n, bytes>>20, took, most>>20, mostTime)
			}
		}
	}
}

func marksOf(s string) int {
	low, high := 0, len(s)+1 // the first bound that s keeps
	for low < high {
		if middle := (low + high) / 2; checkMarks([]byte(s), middle) == nil {
			high = middle
		} else {
			low = middle + 1
		}
	}
	return low
}

// allocated is how many bytes do allocates in all; it never holds more at once.
func allocated(do func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Policies that are large and honest are read: the benign twins of the bounds.
func TestLoadLarge(t *testing.T) {
	rules := func(n int) map[string]string {
		var block, flow strings.Builder
		block.WriteString("# a large policy\nhosts:\n  only:\n")
		flow.WriteString("hosts: {only: [\n")
		for i := range n {
			fmt.Fprintf(&block, "  - host: h%d.example.org # the host of team-%d\n    port: 443\n    methods: [GET, HEAD, POST]\n    path: \"/a/%d/**\"\n", i, i, i)
			fmt.Fprintf(&flow, "  {host: h%d.example.org, port: 443, methods: [GET, HEAD, POST], path: \"/a/%d/**\"},\n", i, i)
		}
		block.WriteString("commands:\n  only:\n")
		flow.WriteString("]}\ncommands: {only: [\n")
		for i := range n {
			fmt.Fprintf(&block, "  - [make, \"t%d\", \"--flag=a-b\", \"x:y\", \"**\"]\n", i)
			fmt.Fprintf(&flow, "  [make, \"t%d\", \"--flag=a-b\", \"x:y\", \"**\"],\n", i)
		}
		flow.WriteString("]}\n")
		return map[string]string{"block": block.String(), "flow": flow.String()}
	}
	for _, n := range []int{1000, 1800} {
		for style, text := range rules(n) {
			p, err := Load("f", []byte(text))
			if err != nil {
				t.Errorf("%d hosts and commands, %s: %v", n, style, err)
				continue
			}
			canonical, err := p.Canonical()
			if err != nil {
				t.Fatal(err)
			}
			if back, err := Load("f", canonical); err != nil || !Equal(back, p) || len(p.hosts.only) != n || len(p.commands.only) != n {
				t.Errorf("%d hosts and commands, %s: %d and %d are read, and back with %v", n, style, len(p.hosts.only), len(p.commands.only), err)
			}
		}
	}
}

func TestDefaults(t *testing.T) {
	p := load(t, "{}")
	want := `{"commands":"any","hosts":{"only":[]},"operations":{},"paths":{"blocked":[],"roots":{"only":["."]}}}`
	if got, err := p.Canonical(); string(got) != want || err != nil {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
	for _, op := range nucleus.Ops() {
		if p.Level(op) != Never {
			t.Errorf("%s is %s, want never", op, p.Level(op))
		}
	}
	if d := p.Decide(sample(nucleus.ReadFiles), nucleus.Context{}); d.Verdict != nucleus.Deny {
		t.Errorf("%+v", d)
	}
}

// Different writings of one policy are one value.
func TestOneValue(t *testing.T) {
	for _, pair := range [][2]string{
		{"hosts: {only: [{host: A.b, port: 1}]}", "hosts: {only: [{host: a.b, port: 1}]}"},
		{"hosts: {only: [{host: a.b, port: 1}, {host: \"*.b\", port: 1}]}", "hosts: {only: [{host: \"*.b\", port: 1}]}"},
		{"hosts: {only: [{host: 10.0.0.0/8, port: 1}, {host: 10.0.0.1, port: 1}]}", "hosts: {only: [{host: 10.0.0.0/8, port: 1}]}"},
		{"hosts: {only: [{host: \"::ffff:10.0.0.1\", port: 1}]}", "hosts: {only: [{host: 10.0.0.1/32, port: 1}]}"},
		{"hosts: {only: [{host: a.b, port: 1, trusted: false}]}", "hosts: {only: [{host: a.b, port: 1}]}"},
		{"paths: {blocked: [\"*.pem\", b, b]}", "paths: {blocked: [\"**/b\", \"**/*.pem/**\"]}"},
		{"paths: {blocked: [a, \"**/**\"]}", "paths: {blocked: [\"**\"]}"},
		{"paths: {}", "paths: {roots: {only: [\".\", src]}, blocked: []}"},
		{"budget: {}", "window: {}"},
		{"window: {from: 2026-01-01T00:00:00Z, until: 2026-01-01T00:00:00Z}", "window: {from: 2027-01-01T02:00:00+02:00, until: 2027-01-01T00:00:00Z}"},
		{"operations: {git_push: never}\nobligations: {git_push: {approvals: 1}}", "{}"},
		{"trusted_origins: [github.com/o/r.git, github.com/o/s]", "trusted_origins: [GitHub.com/o/s, github.com/o/r]"},
		{"commands: {only: [[a, b], [a, \"**\"]]}", `{"commands": {"only": [["a", "**"]]}}`},
	} {
		a, b := load(t, pair[0]), load(t, pair[1])
		if a.GoString() != b.GoString() || !Equal(a, b) {
			t.Errorf("%s is %#v\n%s is %#v", pair[0], a, pair[1], b)
		}
	}
}

// TestVectors: testdata/canonical/NAME.yaml becomes NAME.json byte by byte, with
// the digest in its name's line of DIGESTS; another implementation can run them.
func TestVectors(t *testing.T) {
	files, err := filepath.Glob("testdata/canonical/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no vectors", err)
	}
	var digests strings.Builder
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		p, err := Load(file, data)
		if err != nil {
			t.Fatal(err)
		}
		canonical, err := p.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		golden(t, strings.TrimSuffix(file, ".yaml")+".json", string(canonical))
		digest, err := p.Digest()
		if err != nil || digest != nucleus.SHA256(canonical) {
			t.Errorf("%s: digest %s, %v", file, digest, err)
		}
		fmt.Fprintf(&digests, "%s  %s\n", digest, strings.TrimSuffix(filepath.Base(file), ".yaml"))
	}
	golden(t, "testdata/canonical/DIGESTS", digests.String())
}

func TestCanonicalReadsBack(t *testing.T) {
	eachDimension(t, func(t *rapid.T, dims []dimension) {
		p := draw(t, "p", dims)
		for _, p := range []*Policy{p, Nu(p), Meet(p, Bottom())} {
			canonical, err := p.Canonical()
			if err != nil {
				t.Fatal(err)
			}
			back, err := Load("back", canonical)
			if err != nil {
				t.Fatalf("%s:%v", canonical, err)
			}
			same(t, "read back", back, p)
			holds(t, "equal policies have equal bytes", back.GoString() == p.GoString())
		}
	})
}

func TestProfiles(t *testing.T) {
	embedded, err := filepath.Glob("profiles/*.yaml")
	if err != nil || len(embedded) != len(Profiles()) {
		t.Errorf("%d files, %d profiles, %v", len(embedded), len(Profiles()), err)
	}
	var table strings.Builder
	table.WriteString("| operation |")
	for _, name := range Profiles() {
		fmt.Fprintf(&table, " %s |", name)
	}
	fmt.Fprintf(&table, "\n|---|%s\n", strings.Repeat("---|", len(Profiles())))
	for _, op := range nucleus.Ops() {
		fmt.Fprintf(&table, "| `%s` |", op)
		for _, name := range Profiles() {
			p, err := Profile(name)
			if err != nil {
				t.Fatal(err)
			}
			if p.Name() != name {
				t.Errorf("profile %s says its name is %q", name, p.Name())
			}
			cell := p.Level(op).String()
			if now := Nu(p).Level(op); now != p.Level(op) {
				cell += ", nu: " + now.String()
			}
			fmt.Fprintf(&table, " %s |", cell)
		}
		table.WriteString("\n")
	}
	golden(t, "testdata/profiles.md", table.String())
	if _, err := Profile("../profiles/default"); err == nil || !strings.Contains(err.Error(), `unknown profile "../profiles/default"; want one of default, read-only`) {
		t.Errorf("got %v", err)
	}
}

// What a person expects of the profile that cal run uses.
func TestDefaultProfile(t *testing.T) {
	p, err := Profile("default")
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range nucleus.Ops() {
		d := p.Decide(sample(op), nucleus.Context{})
		want := nucleus.Allow
		switch op {
		case nucleus.GitPush, nucleus.CreatePR:
			want = nucleus.Ask
		case nucleus.WebFetch, nucleus.NetConnect, nucleus.WebSearch, nucleus.ManagePods, nucleus.SpawnAgent:
			want = nucleus.Deny
		}
		if d.Verdict != want {
			t.Errorf("%s: %+v, want %s", op, d, want)
		}
	}
	for name, want := range map[string]bool{
		".env": true, "app/.env.production": true, "app/tls/server.pem": true, ".ssh/config": true, "x/id_ed25519": true,
		"app/tokenizer.go": false, "app/environment.ts": false, "go.mod": false, ".github/workflows/ci.yml": false,
		"app/keyboard.go": false, "docs/id_rsa.md": false, ".gitignore": false,
	} {
		if p.Blocked(name) != want {
			t.Errorf("blocked %s: %v, want %v", name, p.Blocked(name), want)
		}
	}
}

func TestLevelText(t *testing.T) {
	for l := Never; l <= Always; l++ {
		text, err := l.MarshalText()
		var back Level
		if err != nil || back.UnmarshalText(text) != nil || back != l {
			t.Errorf("%v: %s, %v, back %v", l, text, err, back)
		}
	}
	var l Level
	if err := l.UnmarshalText([]byte("maybe")); err == nil {
		t.Error("maybe is a level")
	}
	if _, err := Level(3).MarshalText(); err == nil {
		t.Error("Level(3) has a text")
	}
}

// Any document is refused, or becomes a policy that reads back to itself.
func FuzzLoad(f *testing.F) {
	files, _ := filepath.Glob("testdata/canonical/*")
	embedded, _ := filepath.Glob("profiles/*.yaml")
	for _, file := range slices.Concat(files, embedded) {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("? {a: b}\n: - - -"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Load("f", data)
		if err != nil {
			return
		}
		canonical, err := p.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		back, err := Load("back", canonical)
		if err != nil {
			t.Fatalf("%s:%v", canonical, err)
		}
		if back.GoString() != p.GoString() || !Equal(back, p) {
			t.Fatalf("%q reads as %#v and back as %#v", data, p, back)
		}
		Top().Decide(sample(nucleus.ReadFiles), nucleus.Context{})
		for _, op := range nucleus.Ops() {
			d := p.Decide(sample(op), nucleus.Context{})
			if line := Place(p, data, d.Rule, sample(op)); line < 0 || line > 1+strings.Count(string(data), "\n")+strings.Count(string(data), "\r")+strings.Count(string(data), "\u0085")+strings.Count(string(data), "\u2028")+strings.Count(string(data), "\u2029") {
				t.Fatalf("%q: %s stands in line %d", data, d.Rule, line)
			}
		}
	})
}

// A path that satisfies a rule means the same to a reader that decodes it.
func FuzzURLPath(f *testing.F) {
	for _, s := range []string{"/a/b", "/a/../b", "/%2e%2e/a", "/a;b", "//", "/a%20b/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !cleanURLPath(s) {
			return
		}
		u, err := url.Parse("https://h" + s)
		if err != nil {
			t.Fatalf("%q is clean, and %v", s, err)
		}
		if clean := path.Clean(u.Path); u.Host != "h" || u.RawQuery != "" || clean != strings.TrimSuffix(u.Path, "/") && clean != u.Path {
			t.Fatalf("%q is clean, and reads as %q", s, u.Path)
		}
	})
}

// An origin that is understood names the host that a URL reader would ask.
func FuzzOrigin(f *testing.F) {
	for _, s := range []string{"https://github.com/o/r", "https://a@b/c", "https://a?@b/c", "ssh://git@h:22/x", "git@h:x/y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		origin, err := originOf(s)
		if err != nil || !strings.Contains(s, "://") {
			return
		}
		u, err := url.Parse(s)
		if err != nil {
			t.Fatalf("%q is %q, and %v", s, origin, err)
		}
		host, _, _ := strings.Cut(origin, "/")
		name, _, _ := strings.Cut(host, ":")
		if u.Scheme != "file" && strings.ToLower(u.Hostname()) != name {
			t.Fatalf("%q is %q, and its host %q", s, origin, u.Hostname())
		}
	})
}
