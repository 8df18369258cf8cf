package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/bmatcuk/doublestar/v4"
	"pgregory.net/rapid"

	"cal/nucleus"
)

// Each class of attack stands beside benign twins that must pass: a false alarm
// is a bug too.

const attacked = `
name: attacked
operations: {read_files: always, grep_search: always, run_bash: always, git_commit: always, web_fetch: always, net_connect: always}
paths:
  roots: {only: ["app", "lib/core"]}
  blocked: ["**/.env*", "**/*.pem", "*.key", "token", "app/secret", "app/*/private", "v?v", "ab*ba"]
commands: {only: [[git, status], [go, test, "**"], [ls, "*"], ["**"], [bash, "-c", "make all"]]}
hosts:
  only:
    - {host: api.example, port: 443, methods: [GET], path: "/repos/**"}
    - {host: one.example, port: 443, methods: [GET], path: "/exact"}
    - {host: methods.example, port: 443, methods: [GET]}
    - {host: path.example, port: 443, path: "/**"}
    - {host: "*.wild.example", port: 443}
    - {host: 10.1.0.0/16, port: 443}
    - {host: 127.0.0.1, port: 8080}
    - {host: "::1", port: 8080}
`

func check(t *testing.T, class string, a nucleus.Action, want string) {
	t.Helper()
	d := load(t, attacked).Decide(a, nucleus.Context{})
	got := string(d.Verdict)
	if d.Verdict == nucleus.Deny {
		got += " " + d.Rule
	}
	if got != want {
		t.Errorf("%s: %+v: %s (%s), want %s", class, a, got, d.Why, want)
	}
}

func TestAttacksOnPaths(t *testing.T) {
	for _, c := range []struct{ class, path, want string }{
		{"parent", "../etc/passwd", "deny paths"},
		{"parent inside", "app/../../etc/passwd", "deny paths"},
		{"parent that stays", "app/../app/x", "deny paths"},
		{"only parent", "..", "deny paths"},
		{"absolute", "/etc/passwd", "deny paths"},
		{"unclean", "app//x", "deny paths"},
		{"unclean dot", "app/./x", "deny paths"},
		{"trailing slash", "app/", "deny paths"},
		{"empty", "", "deny paths"},
		{"NUL", "app/x\x00.go", "deny paths"},
		{"not UTF-8", "app/\xff", "deny paths"},
		{"outside the roots", "other/x", "deny paths.roots"},
		{"the workspace above a root", ".", "deny paths.roots"},
		{"a root's name as a prefix", "apple/x", "deny paths.roots"},
		{"beside a deeper root", "lib/x", "deny paths.roots"},
		{"blocked at the top of a root", "app/.env", "deny paths.blocked"},
		{"blocked deeper", "app/a/b/.env.local", "deny paths.blocked"},
		{"below a blocked directory", "app/.env.d/x", "deny paths.blocked"},
		{"suffix deeper", "app/a/tls.pem", "deny paths.blocked"},
		{"pattern without slash, deeper", "app/a/b/tls.key", "deny paths.blocked"},
		{"whole name", "app/token", "deny paths.blocked"},
		{"anchored directory", "app/secret/x/y", "deny paths.blocked"},
		{"anchored with star", "app/x/private", "deny paths.blocked"},
		{"question mark is one character", "app/vxv", "deny paths.blocked"},
		{"question mark is one character of any alphabet", "app/vüv", "deny paths.blocked"},
		{"star is none", "app/abba", "deny paths.blocked"},

		{"a root itself", "app", "allow"},
		{"a deeper root", "lib/core/x.go", "allow"},
		{"two dots in a name", "app/..x/a..b", "allow"},
		{"name that begins like a blocked one", "app/tokenizer.go", "allow"},
		{"name that ends like a blocked one", "app/mytoken", "allow"},
		{"suffix in the middle", "app/x.pem.go", "allow"},
		{"suffix without its dot", "app/pem", "allow"},
		{"environment", "app/environment.go", "allow"},
		{"anchored elsewhere", "app/x/secret", "allow"},
		{"star is one segment", "app/x/y/private", "allow"},
		{"question mark is not none", "app/vv", "allow"},
		{"what stands before a star and behind it do not overlap", "app/aba", "allow"},
		{"unicode", "app/größe.go", "allow"},
		{"spaces", "app/a file.go", "allow"},
	} {
		files := []nucleus.File{{Path: "app/ok.go"}, {Path: c.path}}
		check(t, c.class, nucleus.Action{Op: nucleus.ReadFiles, Files: files}, c.want)
		check(t, c.class+" (search)", nucleus.Action{Op: nucleus.GrepSearch, Files: files[1:]}, c.want)
		check(t, c.class+" (named by a command)", nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{
			Argv: []string{"git", "status"}, Dir: "app", Files: files}}, c.want)
		if c.path != "" { // the workspace
			check(t, c.class+" (directory of a command)", nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"git", "status"}, Dir: c.path}}, c.want)
		}
	}
}

func TestAttacksOnCommits(t *testing.T) {
	for _, c := range []struct {
		class, repo string
		paths       []string
		want        string
	}{
		{"another repository", "other", nil, "deny paths.roots"},
		{"all of a repository that holds a root", "lib", nil, "deny paths.roots"},
		{"parent", "app", []string{"../other/x"}, "deny paths"},
		{"parent that stays below", "app", []string{"x/../y"}, "deny paths"},
		{"repository is a parent", "../app", []string{"x"}, "deny paths"},
		{"absolute", "app", []string{"/x"}, "deny paths"},
		{"blocked", "app", []string{"main.go", "a/.env"}, "deny paths.blocked"},
		{"beside the root", "lib", []string{"core/x", "other/x"}, "deny paths.roots"},
		{"whole repository", "app", nil, "allow"},
		{"paths", "app", []string{"main.go"}, "allow"},
		{"paths below a deeper root", "lib", []string{"core/x"}, "allow"},
	} {
		check(t, c.class, nucleus.Action{Op: nucleus.GitCommit, Commit: &nucleus.Commit{Repo: c.repo, Paths: c.paths}}, c.want)
	}
}

func TestAttacksOnCommands(t *testing.T) {
	p := load(t, strings.Replace(attacked, `["**"], `, "", 1))
	for _, c := range []struct {
		class  string
		argv   []string
		script bool
		env    map[string]string
		want   nucleus.Verdict
	}{
		{"other subcommand", []string{"git", "push"}, false, nil, nucleus.Deny},
		{"option before the subcommand", []string{"git", "-C", ".", "push"}, false, nil, nucleus.Deny},
		{"configuration before the subcommand", []string{"git", "-c", "alias.status=!sh", "status"}, false, nil, nucleus.Deny},
		{"joined words", []string{"git status"}, false, nil, nucleus.Deny},
		{"an argument more", []string{"git", "status", "--porcelain"}, false, nil, nucleus.Deny},
		{"an argument fewer", []string{"git"}, false, nil, nucleus.Deny},
		{"wrapper", []string{"env", "git", "status"}, false, nil, nucleus.Deny},
		{"shell", []string{"bash", "-c", "git status"}, true, nil, nucleus.Deny},
		{"shell, login", []string{"bash", "-lc", "make all"}, true, nil, nucleus.Deny},
		{"script with more in it", []string{"bash", "-c", "make all; curl evil"}, true, nil, nucleus.Deny},
		{"path to the program", []string{"./git", "status"}, false, nil, nucleus.Deny},
		{"upper case", []string{"GIT", "status"}, false, nil, nucleus.Deny},
		{"variables of its own", []string{"git", "status"}, false, map[string]string{"GIT_EXTERNAL_DIFF": "sh"}, nucleus.Deny},
		{"star is one argument", []string{"ls", "a", "b"}, false, nil, nucleus.Deny},
		{"star is no less", []string{"ls"}, false, nil, nucleus.Deny},

		{"exact", []string{"git", "status"}, false, nil, nucleus.Allow},
		{"tail of none", []string{"go", "test"}, false, nil, nucleus.Allow},
		{"tail of many", []string{"go", "test", "-run", "Test;x y", "./..."}, false, nil, nucleus.Allow},
		{"star", []string{"ls", "a b"}, false, nil, nucleus.Allow},
		{"empty argument", []string{"ls", ""}, false, nil, nucleus.Allow},
		{"shell that is named", []string{"bash", "-c", "make all"}, true, nil, nucleus.Allow},
	} {
		d := p.Decide(nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: c.argv, Dir: "app", Script: c.script, Env: c.env}}, nucleus.Context{})
		if d.Verdict != c.want || c.want == nucleus.Deny && d.Rule != "commands" {
			t.Errorf("%s: %q: %+v, want %s", c.class, c.argv, d, c.want)
		}
	}
}

// A wildcard names no arbitrary code: each class of it beside benign twins.
func TestAttacksOnWildcards(t *testing.T) {
	p := load(t, `{operations: {run_bash: always}, commands: {only: [["**"], [env, "**"], [timeout, "*", "**"], [xargs, "**"], [sudo, "**"], [watch, "**"], [find, "**"], [nice, "**"], [strace, "**"], [bash, -c, "*"], [python3, tool.py, "**"], [cargo, test, "**"]]}}`)
	for _, c := range []struct {
		class string
		argv  []string
		want  nucleus.Verdict
	}{
		{"shell", []string{"sh", "-c", "x"}, nucleus.Deny},
		{"shell by its path", []string{"/bin/sh", "-c", "x"}, nucleus.Deny},
		{"login shell", []string{"bash", "-lc", "x"}, nucleus.Deny},
		{"interpreter", []string{"python3", "-c", "x"}, nucleus.Deny},
		{"interpreter, code joined to its flag", []string{"python3", "-cx"}, nucleus.Deny},
		{"interpreter with a version", []string{"/usr/bin/python3.11", "x.py"}, nucleus.Deny},
		{"program of the workspace", []string{"./run.sh"}, nucleus.Deny},
		{"program of another directory", []string{"/tmp/x"}, nucleus.Deny},
		{"wrapper that is not named", []string{"nohup", "ls"}, nucleus.Deny},
		{"shell behind a named wrapper", []string{"env", "A=b", "bash", "-c", "x"}, nucleus.Deny},
		{"shell by its path behind a named wrapper", []string{"env", "/bin/bash"}, nucleus.Deny},
		{"shell behind two wrappers", []string{"timeout", "5", "nice", "sh"}, nucleus.Deny},
		{"interpreter behind xargs", []string{"xargs", "-n1", "perl", "-e", "x"}, nucleus.Deny},
		{"find -exec", []string{"find", ".", "-exec", "sh", "{}", ";"}, nucleus.Deny},
		{"find -execdir behind a test", []string{"find", ".", "-name", "x", "-execdir", "/bin/bash", "{}", "+"}, nucleus.Deny},
		{"find runs a file by its path", []string{"find", ".", "-ok", "./x", ";"}, nucleus.Deny},
		{"find runs a wrapper", []string{"find", ".", "-exec", "env", "ls", ";"}, nucleus.Deny},
		{"find runs a second command", []string{"find", ".", "-exec", "ls", ";", "-exec", "sh", ";"}, nucleus.Deny},
		{"path behind a wrapper", []string{"timeout", "5", "./x"}, nucleus.Deny},
		{"path to another directory behind a wrapper", []string{"timeout", "5", "/tmp/ls"}, nucleus.Deny},
		{"path behind a wrapper with options", []string{"timeout", "-k", "1", "--signal=KILL", "5", "./x"}, nucleus.Deny},
		{"path behind joined options", []string{"xargs", "-n1", "-I{}", "./x"}, nucleus.Deny},
		{"path behind the end of options", []string{"nice", "-n", "5", "--", "x/y"}, nucleus.Deny},
		{"path behind variables", []string{"env", "-i", "A=b", "C=./d", "./x"}, nucleus.Deny},
		{"path behind two wrappers", []string{"timeout", "5", "env", "./x"}, nucleus.Deny},
		{"path behind an option that is not known", []string{"nice", "--odd", "ls", "./x"}, nucleus.Deny},
		{"shell behind an option that may take a value", []string{"xargs", "--max-lines", "sh"}, nucleus.Deny},
		{"path behind a wrapper that is not known well", []string{"strace", "-o", "x", "./x"}, nucleus.Deny},
		{"shell in a variable", []string{"env", "SHELL=/bin/bash", "make"}, nucleus.Deny},
		{"command in an option", []string{"env", "-S", "bash -c x"}, nucleus.Deny},
		{"command joined to an option", []string{"env", "-ivSbash -c x"}, nucleus.Deny},
		{"command in a long option", []string{"env", "--split-string=bash -c x"}, nucleus.Deny},
		{"shell by an option", []string{"sudo", "-ns"}, nucleus.Deny},
		{"login shell by an option", []string{"sudo", "--login"}, nucleus.Deny},
		{"command as one text", []string{"watch", "x; y"}, nucleus.Deny},
		{"awk", []string{"awk", "BEGIN{system(\"x\")}"}, nucleus.Deny},

		{"benign program", []string{"ls", "-l"}, nucleus.Allow},
		{"benign program by its path", []string{"/usr/bin/ls"}, nucleus.Allow},
		{"benign program behind a wrapper", []string{"env", "A=b", "git", "status"}, nucleus.Allow},
		{"option that holds no command", []string{"env", "-u", "A", "-i", "git", "status"}, nucleus.Allow},
		{"option that opens no shell", []string{"sudo", "-n", "-u", "bin", "ls", "-l"}, nucleus.Allow},
		{"benign program behind two named wrappers", []string{"timeout", "5", "ls", "x"}, nucleus.Allow},
		{"the name of a shell as find's argument", []string{"find", ".", "-name", "bash"}, nucleus.Allow},
		{"the name of an interpreter as find's argument", []string{"find", "/usr/bin", "-iname", "python3", "-o", "-path", "./node"}, nucleus.Allow},
		{"find in a directory", []string{"find", "./src", "-newer", "a/sh", "-print"}, nucleus.Allow},
		{"find runs a benign program", []string{"find", ".", "-exec", "grep", "-l", "bash", "{}", "+"}, nucleus.Allow},
		{"find -exec and a name behind it", []string{"find", ".", "-exec", "grep", "x", "{}", ";", "-name", "bash"}, nucleus.Allow},
		{"the argument of a program behind a wrapper", []string{"timeout", "5", "grep", "-r", "bash", "./x"}, nucleus.Allow},
		{"packages of a program behind a wrapper", []string{"timeout", "-s", "KILL", "5", "go", "test", "./..."}, nucleus.Allow},
		{"a file of a wrapper's option", []string{"xargs", "-a", "./list", "rm"}, nucleus.Allow},
		{"a directory in a variable", []string{"env", "GOCACHE=/tmp/c", "go", "test"}, nucleus.Allow},
		{"a program of the system behind a wrapper", []string{"nice", "-n", "5", "/usr/bin/git", "status"}, nucleus.Allow},
		{"the name of a shell as an argument", []string{"grep", "-r", "bash", "."}, nucleus.Allow},
		{"a name that begins like one", []string{"env", "shellcheck", "x"}, nucleus.Allow},
		{"a name that begins like an interpreter", []string{"nodemon-like"}, nucleus.Allow},
		{"exec inside a word", []string{"cargo", "test", "executor"}, nucleus.Allow},
		{"exec as a word", []string{"cargo", "test", "exec"}, nucleus.Allow},
		{"token inside a word", []string{"git", "add", "tokenizer.go"}, nucleus.Allow},
		{"a named shell", []string{"bash", "-c", "anything"}, nucleus.Allow},
		{"a named interpreter", []string{"python3", "tool.py", "x"}, nucleus.Allow},
	} {
		d := p.Decide(nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: c.argv}}, nucleus.Context{})
		if d.Verdict != c.want || c.want == nucleus.Deny && d.Rule != "commands" {
			t.Errorf("%s: %q: %+v, want %s", c.class, c.argv, d, c.want)
		}
	}
}

// Two policies of which one denies a command meet in one that denies it, although
// its rule becomes longer.
func TestMeetNamesNothing(t *testing.T) {
	a := load(t, `{operations: {run_bash: always}, commands: {only: [["*", "-c", x]]}}`)
	b := load(t, `{operations: {run_bash: always}, commands: {only: [[bash, "**"]]}}`)
	action := nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"bash", "-c", "x"}, Script: true}}
	for _, p := range []*Policy{a, Meet(a, b), Meet(b, a)} {
		if d := p.Decide(action, nucleus.Context{}); d.Verdict != nucleus.Deny {
			t.Errorf("%#v: %+v", p, d)
		}
	}
	if d := b.Decide(action, nucleus.Context{}); d.Verdict != nucleus.Allow {
		t.Errorf("%#v: %+v", b, d)
	}
}

func TestAttacksOnHosts(t *testing.T) {
	for _, c := range []struct {
		class, host string
		port        int
		want        string
	}{
		{"NUL before a suffix", "evil\x00.wild.example", 443, "deny hosts"},
		{"line feed", "evil\n.wild.example", 443, "deny hosts"},
		{"suffix without its dot", "evilwild.example", 443, "deny hosts"},
		{"the suffix itself", "wild.example", 443, "deny hosts"},
		{"suffix and more", "x.wild.example.evil", 443, "deny hosts"},
		{"empty label", "..wild.example", 443, "deny hosts"},
		{"leading dot", ".wild.example", 443, "deny hosts"},
		{"trailing dot", "x.wild.example.", 443, "deny hosts"},
		{"upper case", "X.wild.example", 443, "deny hosts"},
		{"brackets", "[::1]", 8080, "deny hosts"},
		{"zone", "::1%lo", 8080, "deny hosts"},
		{"user", "a@x.wild.example", 443, "deny hosts"},
		{"port in the host", "x.wild.example:443", 443, "deny hosts"},
		{"space", "x .wild.example", 443, "deny hosts"},
		{"percent", "x%2e.wild.example", 443, "deny hosts"},
		{"unicode", "x\u3002wild.example", 443, "deny hosts"},
		{"other port", "x.wild.example", 80, "deny hosts"},
		{"port that overflows to 443", "x.wild.example", 65536 + 443, "deny hosts"},
		{"short address", "127.1", 8080, "deny hosts"},
		{"decimal address", "2130706433", 8080, "deny hosts"},
		{"hexadecimal address", "0x7f000001", 8080, "deny hosts"},
		{"octal address", "0177.0.0.1", 8080, "deny hosts"},
		{"address beside the range", "10.2.0.1", 443, "deny hosts"},
		{"mapped address beside the range", "::ffff:10.2.0.1", 443, "deny hosts"},
		{"address as a label", "10.1.2.3.wild.example", 80, "deny hosts"},
		{"a connection to a host of requests", "api.example", 443, "deny hosts"},
		{"a connection to a host of methods", "methods.example", 443, "deny hosts"},
		{"a connection to a host of paths", "path.example", 443, "deny hosts"},
		{"empty", "", 443, "deny hosts"},

		{"below the suffix", "x.wild.example", 443, "allow"},
		{"deep below the suffix", "a.b-c.x_1.wild.example", 443, "allow"},
		{"range", "10.1.255.3", 443, "allow"},
		{"mapped address in the range", "::ffff:10.1.0.9", 443, "allow"},
		{"address", "127.0.0.1", 8080, "allow"},
		{"IPv6 address", "::1", 8080, "allow"},
		{"IPv6 address, written out", "0:0:0:0:0:0:0:1", 8080, "allow"},
		{"numbers in a name", "10.1.2.3.wild.example", 443, "allow"},
	} {
		check(t, c.class, nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: c.host, Port: c.port}}, c.want)
		if !strings.HasPrefix(c.class, "a connection") {
			check(t, c.class, nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "POST", Host: c.host, Port: c.port, Path: "/a"}}, c.want)
		}
		if c.want == "deny hosts" && strings.ContainsAny(c.host, "\x00\n[]%@: ") && c.host != "::ffff:10.2.0.1" {
			if d := Top().Decide(nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: c.host, Port: c.port}}, nucleus.Context{}); d.Verdict != nucleus.Deny {
				t.Errorf("%s: %q is %+v where hosts is any, want deny", c.class, c.host, d)
			}
		}
	}
}

func TestAttacksOnRequests(t *testing.T) {
	for _, c := range []struct{ class, method, host, path, want string }{
		{"other method", "POST", "api.example", "/repos/o/r", "deny hosts"},
		{"method in lower case", "get", "api.example", "/repos/o/r", "deny hosts"},
		{"unknown method", "TRACE", "api.example", "/repos/o/r", "deny hosts"},
		{"other path", "GET", "api.example", "/user", "deny hosts"},
		{"prefix of a segment", "GET", "api.example", "/repository", "deny hosts"},
		{"dot segments", "GET", "api.example", "/repos/../user", "deny hosts"},
		{"dot segment at the end", "GET", "api.example", "/repos/..", "deny hosts"},
		{"one dot", "GET", "api.example", "/repos/./x", "deny hosts"},
		{"encoded dots", "GET", "api.example", "/repos/%2e%2E/user", "deny hosts"},
		{"half encoded dots", "GET", "api.example", "/repos/.%2e/user", "deny hosts"},
		{"encoded slash", "GET", "api.example", "/repos/..%2fuser", "deny hosts"},
		{"twice encoded", "GET", "api.example", "/repos/%252e%252e/user", "deny hosts"},
		{"backslash", "GET", "api.example", `/repos/..\user`, "deny hosts"},
		{"encoded backslash", "GET", "api.example", "/repos/%5c..%5cuser", "deny hosts"},
		{"path parameter", "GET", "api.example", "/repos/..;/user", "deny hosts"},
		{"encoded path parameter", "GET", "api.example", "/repos/..%3b/user", "deny hosts"},
		{"empty segment", "GET", "api.example", "/repos//user", "deny hosts"},
		{"no slash", "GET", "api.example", "repos/x", "deny hosts"},
		{"empty", "GET", "api.example", "", "deny hosts"},
		{"query in the path", "GET", "api.example", "/repos/x?y", "deny hosts"},
		{"fragment in the path", "GET", "api.example", "/repos/x#/../", "deny hosts"},
		{"bad escape", "GET", "api.example", "/repos/%zz", "deny hosts"},
		{"cut escape", "GET", "api.example", "/repos/%2", "deny hosts"},
		{"line feed", "GET", "api.example", "/repos/x\r\nHost: evil", "deny hosts"},
		{"below an exact path", "GET", "one.example", "/exact/x", "deny hosts"},
		{"exact path with slash", "GET", "one.example", "/exact/", "deny hosts"},

		{"prefix itself", "GET", "api.example", "/repos", "allow"},
		{"prefix with slash", "GET", "api.example", "/repos/", "allow"},
		{"below", "GET", "api.example", "/repos/o/r/issues/1", "allow"},
		{"dots in a name", "GET", "api.example", "/repos/o/.github/a..b/v1.2", "allow"},
		{"harmless escape", "GET", "api.example", "/repos/o/a%20b", "allow"},
		{"exact", "GET", "one.example", "/exact", "allow"},
		{"any path of a method", "GET", "methods.example", "/a/../b", "allow"},
		{"other method, any path", "POST", "methods.example", "/a", "deny hosts"},
		{"any method of a path", "BREW", "path.example", "/a", "allow"},
	} {
		check(t, c.class, nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: c.method, Host: c.host, Port: 443, Path: c.path}}, c.want)
		check(t, c.class+" (plain HTTP)", plainAction(c.method, c.host, 443, c.path), c.want)
	}
}

// plainAction is a request that a program sends to the HTTP proxy.
func plainAction(method, host string, port int, path string) nucleus.Action {
	return nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: port}, Fetch: &nucleus.Fetch{Method: method, Host: host, Port: port, Path: path}}
}

// A request in plain HTTP is judged for the host that is connected to, and takes the legs
// of a connection, whoever the rule trusts.
func TestAttacksOnPlainRequests(t *testing.T) {
	elsewhere := plainAction("GET", "api.example", 443, "/repos/x")
	elsewhere.Connect.Host = "evil.example"
	check(t, "request to another host", elsewhere, "deny action")
	elsewhere = plainAction("GET", "x.wild.example", 443, "/")
	elsewhere.Connect.Port = 80
	check(t, "request to another port", elsewhere, "deny action")
	check(t, "host that is not clean", plainAction("GET", "evil\x00.wild.example", 443, "/"), "deny hosts")
	check(t, "a rule for connections", plainAction("BREW", "x.wild.example", 443, "/a/../b"), "allow")

	p := load(t, `{operations: {net_connect: always, web_fetch: always}, hosts: {only: [{host: a.example, port: 80, methods: [GET], path: "/x/**", trusted: true}]}}`)
	met := nucleus.Context{Exposure: nucleus.Private | nucleus.Untrusted}
	plain := plainAction("GET", "a.example", 80, "/x/y")
	if d := p.Decide(plain, met); d.Verdict != nucleus.Ask || d.Rule != "trifecta" {
		t.Errorf("plain HTTP under a trusted rule: %+v", d)
	}
	if d := p.Decide(nucleus.Action{Op: nucleus.WebFetch, Fetch: plain.Fetch}, met); d.Verdict != nucleus.Allow {
		t.Errorf("the fetch under a trusted rule: %+v", d)
	}
}

// Only a literal opens a private address, and a rule for single requests only
// the address that was asked for.
func TestLiterals(t *testing.T) {
	p := load(t, `
hosts:
  only:
    - {host: intranet.example, port: 443}
    - {host: 10.0.0.0/8, port: 443}
    - {host: 192.168.1.5, port: 443, methods: [GET], path: "/x/**"}
    - {host: "fd00::/8", port: 443}
    - {host: 127.0.0.1, port: 8080}
`)
	for _, c := range []struct {
		host string
		port int
		want string
	}{
		{"intranet.example", 443, "10.0.0.0/8 fd00::/8"},
		{"intranet.example", 80, ""},
		{"10.2.3.4", 443, "10.0.0.0/8"},
		{"::ffff:10.2.3.4", 443, "10.0.0.0/8"},
		{"10.2.3.4", 80, ""},
		{"192.168.1.5", 443, "192.168.1.5/32"},
		{"192.168.1.6", 443, ""},
		{"127.0.0.1", 8080, "127.0.0.1/32"},
		{"127.0.0.1", 443, ""},
		{"169.254.169.254", 443, ""},
		{"[::1]", 443, ""},
	} {
		var got []string
		for _, prefix := range p.Literals(c.host, c.port) {
			got = append(got, prefix.String())
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("Literals(%q, %d) = %v, want %s", c.host, c.port, got, c.want)
		}
	}
	names := load(t, `hosts: {only: [{host: intranet.example, port: 443}, {host: "*.example", port: 443}]}`)
	for _, q := range []*Policy{names, load(t, "hosts: any"), {}} {
		for _, host := range []string{"intranet.example", "127.0.0.1"} {
			if got := q.Literals(host, 443); len(got) != 0 {
				t.Errorf("%#v opens %v for %s; only a literal does", q, got, host)
			}
		}
	}
	if !netip.MustParsePrefix("10.0.0.0/8").Contains(netip.MustParseAddr("10.2.3.4")) {
		t.Fatal("positive control")
	}
}

func TestTrustedRepo(t *testing.T) {
	p := load(t, `trusted_origins: ["github.com/my-org/**", "git.example:8443/team/app", "file:/srv/git/**", "GitLab.example/**"]`)
	for _, c := range []struct {
		remote string
		want   bool
	}{
		{"https://evil.example/my-org/app", false},
		{"https://github.com.evil.example/my-org/app", false},
		{"https://evilgithub.com/my-org/app", false},
		{"https://github.com@evil.example/my-org/app", false},
		{"https://evil.example?@github.com/my-org/app", false},
		{"https://evil.example#@github.com/my-org/app", false},
		{`https://evil.example\@github.com/my-org/app`, false},
		{"https://github.com/my-org/../evil/app", false},
		{"https://github.com/my-org/%2e%2e/evil", false},
		{"https://github.com//my-org/app", false},
		{"https://github.com/my-organisation/app", false},
		{"https://github.com/My-Org/app", false},
		{"https://github.com/other/app", false},
		{"https://github.com:8443/my-org/app", false},
		{"https://github.com:x/my-org/app", false},
		{"https://github.com./my-org/app", false},
		{"https://github.com/", false},
		{"http://github.com/my-org/app", false},
		{"git://github.com/my-org/app", false},
		{"ext::sh -c evil github.com/my-org/app", false},
		{"ext://github.com/my-org/app", false},
		{"git@evil.example:my-org/app", false},
		{"git@github.com@evil.example:my-org/app", false},
		{"git@evil.example@github.com:my-org/app", false},
		{"ssh://git@evil.example@github.com/my-org/app", false},
		{"ssh://a b@github.com/my-org/app", false},
		{"git@github.com:other/app.git", false},
		{"git@github.com:my-org/../evil/app", false},
		{"C:/my-org/app", false},
		{"../my-org/app", false},
		{"github.com/my-org/app", false},
		{"file://evil.example/srv/git/app", false},
		{"/srv/git/../evil", false},
		{"/srv/github", false},
		{"https://git.example:8443/team/app2", false},
		{"https://git.example/team/app", false},
		{"", false},

		{"https://github.com/my-org/app", true},
		{"https://github.com/my-org/app.git", true},
		{"https://github.com/my-org/app/", true},
		{"https://GitHub.com/my-org/app", true},
		{"https://github.com:443/my-org/app", true},
		{"https://user:token@github.com/my-org/app", true},
		{"ssh://git@github.com/my-org/app.git", true},
		{"ssh://git@github.com:22/my-org/app.git", true},
		{"git@github.com:my-org/app.git", true},
		{"git@github.com:/my-org/app.git", true},
		{"github.com:my-org/sub/app", true},
		{"https://git.example:8443/team/app.git", true},
		{"https://gitlab.example/any/thing", true},
		{"/srv/git/app.git", true},
		{"file:///srv/git/app", true},
		{"file://localhost/srv/git/app", true},
	} {
		trusted, why := TrustedRepo(p, []string{"git@github.com:my-org/ok.git", c.remote})
		if trusted != c.want || why == "" {
			t.Errorf("%q: trusted %v (%s), want %v", c.remote, trusted, why, c.want)
		}
		if trusted, _ := TrustedRepo(&Policy{}, []string{c.remote}); trusted {
			t.Errorf("%q is trusted by a policy without trusted_origins", c.remote)
		}
	}
	if trusted, why := TrustedRepo(nil, nil); !trusted || why == "" {
		t.Errorf("a repository without remotes: trusted %v (%s), want trusted", trusted, why)
	}
}

// Our globs against an independent reader of the same language.
func TestGlobsAgree(t *testing.T) {
	segment := rapid.SampledFrom([]string{"a", "b", "ab", "abc", ".env", "x.pem", "größe"})
	pattern := rapid.SampledFrom([]string{"a", "b", "a*", "*b", "*", "**", "?b", "a?c", ".env*", "*.pem", "*b*c", "gr??e"})
	rapid.Check(t, func(t *rapid.T) {
		name := strings.Join(rapid.SliceOfN(segment, 1, 5).Draw(t, "path"), "/")
		glob := strings.Join(rapid.SliceOfN(pattern, 1, 5).Draw(t, "pattern"), "/")
		normal, err := parseBlocked(glob)
		if err != nil {
			t.Fatal(err)
		}
		other := glob
		if !strings.Contains(glob, "/") {
			other = "**/" + glob
		}
		want := doublestar.MatchUnvalidated(other, name) || doublestar.MatchUnvalidated(other+"/**", name)
		// "x/**" holds x itself; doublestar sees that only where x has no wildcard.
		for rest, deep := strings.CutSuffix(other, "/**"); deep; rest, deep = strings.CutSuffix(rest, "/**") {
			want = want || doublestar.MatchUnvalidated(rest, name)
		}
		if got := newBlocked([]string{normal}).matches(name); got != want {
			t.Fatalf("%q (%q) blocks %q: %v, want %v", glob, normal, name, got, want)
		}
	})
}

// A pattern with many stars takes no exponential time.
func TestGlobIsLinear(t *testing.T) {
	p := load(t, `paths: {blocked: ["`+strings.Repeat("**/a*/", 100)+`b", "`+strings.Repeat("*a", 200)+`b"]}`)
	if p.Blocked(strings.Repeat("aaaa/", 800) + strings.Repeat("a", 4000)) {
		t.Error("blocked without reason")
	}
}

// A name that a pattern lets through is not one that the policy's writer wrote.
func TestNamesHost(t *testing.T) {
	t.Parallel()
	load := func(hosts string) *Policy {
		t.Helper()
		p, err := Load("p", []byte(`{"operations":{"net_connect":"always"},"hosts":`+hosts+`}`))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	named := load(`{"only":[{"host":"*.example.org","port":443},{"host":"example.com","port":443},{"host":"10.0.0.0/8","port":443},{"host":"api.example.com","port":443,"methods":["GET"],"path":"/a"}]}`)
	for _, c := range []struct {
		p    *Policy
		host string
		port int
		want bool
	}{
		{named, "example.com", 443, true},
		{named, "api.example.com", 443, true},
		{named, "example.com", 80, false},
		{named, "secret.example.org", 443, false},
		{named, "example.org", 443, false},
		{named, "x.example.com", 443, false},
		{named, "Example.com", 443, false},
		{named, "example.com.", 443, false},
		{named, "10.0.0.1", 443, false}, // an address is not looked up anyway
		{named, "", 443, false},
		{load(`"any"`), "example.com", 443, false},
		{load(`{"only":[]}`), "example.com", 443, false},
	} {
		if got := c.p.NamesHost(c.host, c.port); got != c.want {
			t.Errorf("%q port %d: %v, want %v", c.host, c.port, got, c.want)
		}
	}
}
