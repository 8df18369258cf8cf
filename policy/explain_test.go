package policy

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"cal/nucleus"
	"cal/policy/program"
)

// Every profile keeps its promise, every small policy too, and a trusted rule is what
// the proof rests on where it says so.
func TestProve(t *testing.T) {
	for _, name := range Profiles() {
		p, err := Profile(name)
		if err != nil {
			t.Fatal(err)
		}
		if proof := Prove(p, false); !proof.Holds || proof.States < 4 || len(proof.Assumptions) < 3 {
			t.Errorf("%s: %+v", name, proof)
		}
	}
	trusting := load(t, `{operations: {read_files: always, web_fetch: always}, hosts: {only: [
		{host: a.b, port: 443, methods: [GET, POST], path: "/x/**", trusted: true}, {host: c.d, port: 443}]}, trusted_origins: ["g.com/o/**"]}`)
	proof := Prove(trusting, false)
	if text := fmt.Sprint(proof.Assumptions); !proof.Holds || !strings.Contains(text, "a.b port 443 GET,POST /x/** trusted") || !strings.Contains(text, "g.com/o/**") {
		t.Errorf("with its assumptions: %+v", proof)
	}
	proof = Prove(trusting, true)
	if proof.Holds || len(proof.Counterexample) != 2 || !strings.Contains(proof.Counterexample[1], "https://a.b:443/x") {
		t.Errorf("without its assumptions: %+v, want the shortest counterexample", proof)
	}
	push := load(t, `{operations: {read_files: always, git_push: always}}`)
	if proof := Prove(push, false); !proof.Holds {
		t.Errorf("%+v", proof)
	}
	if proof := Prove(push, true); proof.Holds || len(proof.Counterexample) < 2 || !strings.Contains(proof.Counterexample[len(proof.Counterexample)-1], "git_push") {
		t.Errorf("a repository that is wrongly trusted: %+v", proof)
	}
	if proof := Prove(load(t, `{operations: {read_files: always, git_push: ask}}`), true); !proof.Holds {
		t.Errorf("a push that asks anyway: %+v", proof)
	}
}

// All capability states of the operations that carry a leg, on three kinds of hosts.
func TestProveExhaustive(t *testing.T) {
	picked := []nucleus.Op{nucleus.ReadFiles, nucleus.RunBash, nucleus.WebFetch, nucleus.NetConnect, nucleus.GitPush, nucleus.CreatePR, nucleus.WebSearch}
	hosts := []set[hostRule]{{}, everything[hostRule](), downset([]hostRule{{name: "x", port: 443, methods: allMethods, anyPath: true}})}
	for code := range 3 * 3 * 3 * 3 * 3 * 3 * 3 {
		for _, h := range hosts {
			p := defaults()
			p.hosts = h
			for rest, i := code, 0; i < len(picked); rest, i = rest/3, i+1 {
				if level := Level(rest % 3); level != Never {
					p.duties[opIndex(picked[i])] = duty{level, 1}
				}
			}
			if proof := Prove(p.seal(), false); !proof.Holds {
				t.Fatalf("%#v: %v", p, proof.Counterexample)
			}
		}
	}
}

func TestProveIsQuick(t *testing.T) {
	var hosts, commands []string
	for i := range 1000 {
		hosts = append(hosts, fmt.Sprintf(`{host: h%d.example, port: 443}`, i))
		commands = append(commands, fmt.Sprintf(`[go, test, "./p%d"]`, i))
	}
	p := load(t, fmt.Sprintf(`{operations: {read_files: always, run_bash: always, web_fetch: always, net_connect: always, git_push: always},
		commands: {only: [%s]}, hosts: {only: [%s]}}`, strings.Join(commands, ","), strings.Join(hosts, ",")))
	started := time.Now()
	if proof := Prove(p, false); !proof.Holds {
		t.Error(proof)
	}
	// A second on an idle machine; more where others work beside.
	if took := time.Since(started); took > 3*time.Second {
		t.Errorf("took %s", took)
	}
}

// A difference is listed iff there is one, in the direction in which it is, and its
// example shows it.
func TestDiff(t *testing.T) {
	eachDimension(t, func(t *rapid.T, dims []dimension) {
		a, b := draw(t, "a", dims), draw(t, "b", dims)
		more, less := false, false
		for _, d := range Diff(a, b) {
			more, less = more || d.More, less || !d.More
			if d.Example == "" || strings.HasPrefix(d.Scope, "operations") {
				continue
			}
			action := actionOf(t, d.Example)
			denies, allows := a, b
			if !d.More {
				denies, allows = b, a
			}
			switch d.Scope {
			case "paths.blocked":
				if name := action.Files[0].Path; !denies.Blocked(name) || allows.Blocked(name) {
					t.Fatalf("%+v shows nothing", d)
				}
			case "hosts":
				if !denies.scope(&action).denied || allows.scope(&action).denied {
					t.Fatalf("%+v shows nothing", d)
				}
			}
		}
		if more != !Leq(b, a) || less != !Leq(a, b) {
			t.Fatalf("more %v, less %v: %+v\n%#v\n%#v", more, less, Diff(a, b), a, b)
		}
	})
}

func actionOf(t *rapid.T, step string) nucleus.Action {
	var s struct {
		Op         nucleus.Op
		Path, Host string
		Port       int
		URL        string
		Method     string
		Argv       []string
	}
	if err := json.Unmarshal([]byte(step), &s); err != nil {
		t.Fatal(err)
	}
	a := nucleus.Action{Op: s.Op}
	switch s.Op {
	case nucleus.ReadFiles:
		return readAction(s.Path)
	case nucleus.RunBash:
		return runAction(s.Argv...)
	case nucleus.NetConnect:
		a.Connect = &nucleus.Connect{Host: s.Host, Port: s.Port}
	case nucleus.WebFetch:
		rest := strings.TrimPrefix(s.URL, "https://")
		slash := strings.IndexByte(rest, '/')
		colon := strings.LastIndexByte(rest[:slash], ':')
		var port int
		if _, err := fmt.Sscan(rest[colon+1:slash], &port); err != nil {
			t.Fatal(err)
		}
		if s.Method == "" {
			s.Method = "GET"
		}
		return fetchAction(s.Method, strings.Trim(rest[:colon], "[]"), port, rest[slash:])
	}
	return a
}

func TestDiffExamples(t *testing.T) {
	a := load(t, `{operations: {read_files: always}, paths: {roots: {only: [a]}, blocked: ["**/*.pem"]}, commands: {only: [[git, status]]}, hosts: {only: [{host: a.b, port: 1}]}}`)
	b := load(t, `{operations: {read_files: ask}, paths: {roots: {only: ["."]}}, commands: {only: [[git, "**"]]}, hosts: {only: [{host: "*.b", port: 1}, {host: c, port: 2, methods: [POST]}]}, window: {until: 2026-01-01T00:00:00Z}}`)
	var got []string
	for _, d := range Diff(a, b) {
		got = append(got, fmt.Sprint(d.More, " ", d.Scope, " ", d.Rule, " ", d.Example))
	}
	want := []string{
		`false operations.read_files ask instead of always {"op":"read_files"}`,
		`true paths.roots . {"op":"read_files","path":"b"}`,
		`true paths.blocked **/*.pem {"op":"read_files","path":".pem"}`,
		`true commands ["git" "**"] {"argv":["git"],"op":"run_bash"}`,
		`true hosts *.b port 1 {"host":"x.b","op":"net_connect","port":1}`,
		`true hosts c port 2 POST {"method":"POST","op":"web_fetch","url":"https://c:2/"}`,
		`false window until 2026-01-01T00:00:00Z instead of always `,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Each line that is named holds the rule, each change that is named is enough, and
// none is named too many.
func TestPlaceAndChanges(t *testing.T) {
	const source = `name: t
operations:
  read_files: always
  run_bash: ask
  web_fetch: always
  git_push: always
paths:
  roots: {only: [app]}
  blocked:
    - "*.key"
    - "**/.env*"
commands:
  only:
    - [ls]
    - [git, status]
hosts:
  only:
    - {host: z.example, port: 443}
    - {host: a.example, port: 443, methods: [GET]}
window: {from: 2026-01-01T00:00:00Z}
`
	p := load(t, source)
	now := nucleus.Context{UnixMilli: 1_800_000_000_000}
	run := runAction("ls")
	run.Command.Dir = "app"
	shell := runAction("sh", "-c", "*")
	shell.Command.Dir = "app"
	for _, c := range []struct {
		action  nucleus.Action
		context nucleus.Context
		rule    string
		line    int
		changes []string
	}{
		{readAction("app/x"), now, "operations.read_files", 3, nil},
		{readAction("other"), now, "paths.roots", 8, []string{`paths.roots: one more, "other" or a directory above it`}},
		{readAction("app/.env"), now, "paths.blocked", 11, []string{`paths.blocked: without ["**/.env*"]`}},
		{readAction("app/x.key"), now, "paths.blocked", 10, []string{`paths.blocked: without ["**/*.key"]`}},
		{readAction("x/.env.key"), now, "paths.roots", 8, []string{`paths.roots: one more, "x/.env.key" or a directory above it`, `paths.blocked: without ["**/*.key" "**/.env*"]`}},
		{readAction("../x"), now, "paths", 7, []string{"no policy allows this"}},
		{readAction("app/x"), nucleus.Context{UnixMilli: 1}, "window", 20, []string{"window: one that holds 1970-01-01T00:00:00.001Z"}},
		{run, now, "operations.run_bash", 4, []string{"operations.run_bash: always"}},
		{shell, now, "commands", 12, []string{"commands: any", "operations.run_bash: always"}},
		{fetchAction("GET", "z.example", 443, "/"), now, "hosts[1]", 18, nil},
		{fetchAction("GET", "a.example", 443, "/"), now, "hosts[0]", 19, nil},
		{fetchAction("PUT", "a.example", 443, "/y"), now, "hosts", 16, []string{"hosts: one more rule, a.example port 443 PUT /y"}},
		{fetchAction("PUT", "a.example", 70000, "/y"), now, "hosts", 16, []string{"no policy allows this"}},
		{nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: "evil\x00.z.example", Port: 443}}, now, "operations.net_connect", 0, []string{"operations.net_connect: always", "no policy allows this"}},
		{nucleus.Action{Op: nucleus.CreatePR}, now, "operations.create_pr", 0, []string{"operations.create_pr: always", "a grant for each use, or a policy that does not enable private data, untrusted content and a way out together"}},
		{nucleus.Action{Op: nucleus.GitPush}, nucleus.Context{Exposure: nucleus.Private | nucleus.Untrusted, UnixMilli: now.UnixMilli}, "trifecta", 0,
			[]string{"a grant for each use, or a session that has not met both private data and untrusted content"}},
		{nucleus.Action{Op: "execute"}, now, "operations", 2, []string{"no policy allows this"}},
	} {
		d := p.Decide(c.action, c.context)
		line, changes := Place(p, []byte(source), d.Rule, c.action), Changes(p, c.action, c.context)
		if d.Rule != c.rule || line != c.line || strings.Join(changes, "\n") != strings.Join(c.changes, "\n") {
			t.Errorf("%s:\n got %s, line %d, %q\nwant %s, line %d, %q", Step(c.action), d.Rule, line, changes, c.rule, c.line, c.changes)
		}
	}
}

// Any argument vector reads as a pattern that matches itself, or is refused.
func FuzzArgv(f *testing.F) {
	f.Add("git", "*", "**")
	f.Add("env", "sh", "-c")
	f.Add("env", "a", "./x")
	f.Add("find", "-exec", "sh")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		for _, elements := range [][]string{{a}, {a, b}, {a, b, c}} {
			r, err := parseArgv(elements)
			if err != nil {
				continue
			}
			again, err := parseArgv(r.elements())
			if err != nil || again.String() != r.String() || !r.leq(r) {
				t.Fatalf("%q reads as %v, %v", elements, again, err)
			}
			if star := strings.Contains(strings.Join(elements, ""), "*"); !star && !r.matches(elements) {
				t.Fatalf("%q does not match itself", elements)
			}
			for _, s := range []argv{{tail: true}, {head: []string{"env"}, tail: true}, {head: []string{"*", "*"}}} {
				m, ok := r.meet(s)
				if strings.Contains(strings.Join(m.head, ""), "*") || m.tail {
					continue
				}
				// Behind a wrapper a meet may be stricter than both.
				if both := r.matches(m.head) && s.matches(m.head); ok && !both || !ok && both && !program.Wraps(a) {
					t.Fatalf("%v meets %v in %v, %v", r, s, m, ok)
				}
			}
		}
	})
}

// A wildcard behind a wrapper never stands for a program that must be named, whatever
// the words before it are.
func FuzzWildcard(f *testing.F) {
	f.Add("timeout", "5", "./x", "a")
	f.Add("env", "A=b", "-u", "sh")
	f.Add("find", "-name", "-exec", "bash")
	f.Add("sudo", "-u", "--", "/bin/sh")
	f.Fuzz(func(t *testing.T, a, b, c, d string) {
		args := []string{a, b, c, d}
		for n := 1; n <= len(args); n++ {
			if (argv{head: []string{a}, tail: true}).hides(args[:n]) {
				continue
			}
			for rest := args[:n]; len(rest) > 0 && program.Wraps(rest[0]); {
				at, sure := program.Behind(rest)
				if at < 1 || at > len(rest) {
					t.Fatalf("%q: program at %d", rest, at)
				}
				for i := at; i < len(rest) && (i == at || !sure); i++ {
					if isProgram(rest[i]) {
						t.Fatalf("%q: a wildcard stands for %q", args[:n], rest[i])
					}
				}
				rest = rest[at:]
			}
		}
	})
}

// Any host is refused, or one rule that opens what it says; a name that is asked for
// is the name that is dialled.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"a.b", "*.a.b", "10.0.0.0/8", "::1", "127.1", "0x7f.1", "evil\x00.a.b", "[::1]", "A.b.", "::ffff:10.0.0.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, ok := readPeer(s); ok && !p.addr.IsValid() && (s != strings.ToLower(s) || strings.ContainsAny(s, "\x00 \t\r\n/\\@:[]%?#") || strings.HasSuffix(s, ".")) {
			t.Fatalf("%q is a clean name", s)
		}
		r, err := parseHost(s)
		if err != nil {
			return
		}
		again, err := parseHost(r.host())
		if err != nil || again != r {
			t.Fatalf("%q is %+v, and back %+v, %v", s, r, again, err)
		}
		r.port, r.methods, r.anyPath = 1, allMethods, true
		for _, a := range r.examples() {
			if !r.holdsAction(&a) {
				t.Fatalf("%q does not open %s", s, Step(a))
			}
		}
	})
}

// A path that is clean has one meaning, and what blocks a directory blocks all below.
func FuzzPath(f *testing.F) {
	for _, s := range []string{"a/b", "../a", "a/../b", ".env", "a\x00b", "**/*.pem", "a/**/b"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, name, pattern string) {
		if cleanPath(name) && (strings.HasPrefix(name, "/") || strings.Contains("/"+name+"/", "/../") || strings.Contains(name, "//")) {
			t.Fatalf("%q is clean", name)
		}
		normal, err := parseBlocked(pattern)
		if err != nil || !cleanPath(name) || name == "." {
			return
		}
		if again, err := parseBlocked(normal); err != nil || again != normal {
			t.Fatalf("%q is %q, and that %q, %v", pattern, normal, again, err)
		}
		if b := newBlocked([]string{normal}); b.matches(name) && !b.matches(name+"/x") {
			t.Fatalf("%q blocks %q and not what is below it", normal, name)
		}
	})
}
