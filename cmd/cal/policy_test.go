package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cal/audit"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/policy/trial"
)

// TestMain makes the test binary the program itself, for the tests that use it as
// another program would: by arguments, standard input, output and exit code.
func TestMain(m *testing.M) {
	if os.Getenv("CAL_TEST_PROGRAM") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// cal runs the program in dir, with a home of its own below it.
func cal(t *testing.T, dir, stdin string, given ...string) (stdout, stderr string, code int) {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, given...)
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "CAL_TEST_PROGRAM=1", "CAL_HOME="+filepath.Join(dir, "home"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// policyFiles are in the directory in which the program runs.
func policyFiles(t *testing.T) string {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"whole.yaml": `name: fix-issue
operations: {read_files: always, edit_files: always, run_bash: always, git_push: ask}
obligations: {git_push: {approvals: 2}}
paths: {roots: {only: ["."]}, blocked: ["**/.env*", "**/*.pem"]}
commands: {only: [["git", "status"], ["go", "test", "**"]]}
hosts: {only: [{host: "api.github.com", port: 443, methods: [GET], path: "/repos/**"}, {host: "*.example.org", port: 443}]}
budget: {usd: 5, tokens: 100000, seconds: 3600}
window: {from: 2026-01-01T00:00:00Z, until: 2027-01-01T00:00:00Z}
trusted_origins: ["github.com/my-org/**"]
`,
		"a.json":               `{"operations": {"read_files": "always", "net_connect": "ask"}, "hosts": {"only": [{"host": "*.example.org", "port": 443}]}, "budget": {"usd": 2}}`,
		"b.yaml":               "operations: {read_files: always, net_connect: always}\nhosts: {only: [{host: a.example.org, port: 443}, {host: other.example, port: 80}]}\nobligations: {net_connect: {approvals: 3}}\n",
		"trusting.yaml":        "operations: {read_files: always, web_fetch: always}\nhosts: {only: [{host: a.b, port: 443, methods: [GET], path: \"/x/**\", trusted: true}, {host: c.d, port: 443}]}\n",
		"bad.yaml":             "operations:\n  read_files: always\n  execute: always\n",
		"home/policies/c.yaml": "name: c\noperations: {read_files: ask}\n",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	large, err := os.Create(filepath.Join(dir, "large.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer large.Close()
	if err := large.Truncate(100 << 20); err != nil { // 100 MB of NUL, sparse
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestPolicyForPrograms(t *testing.T) {
	dir := policyFiles(t)
	const abMeet = `{"budget":{"usd":2},"commands":"any","hosts":{"only":[{"host":"a.example.org","port":443}]},"obligations":{"net_connect":{"approvals":3}},"operations":{"net_connect":"ask","read_files":"always"},"paths":{"blocked":[],"roots":{"only":["."]}}}`
	const abJoin = `{"commands":"any","hosts":{"only":[{"host":"*.example.org","port":443},{"host":"other.example","port":80}]},"operations":{"net_connect":"always","read_files":"always"},"paths":{"blocked":[],"roots":{"only":["."]}}}`
	for _, c := range []struct {
		name, given, stdin string
		stdout, stderr     string // stderr: a part of it
		code               int
	}{
		{"meet of files", "meet a.json b.yaml", "", abMeet + "\n", "", 0},
		{"join of files", "join a.json b.yaml", "", abJoin + "\n", "", 0},
		{"leq true", "leq read-only default", "", "true\n", "", 0},
		{"leq false", "leq default read-only", "", "false\n", "", 1},
		{"leq of itself", "leq whole.yaml whole.yaml", "", "true\n", "", 0},
		{"leq of neither", "leq a.json b.yaml", "", "false\n", "", 1},
		{"a policy of the person's", "leq c permissive", "", "true\n", "", 0},
		{"unknown name", "meet lax default", "", "", `policy "lax" is neither a profile`, 2},
		{"unknown second name", "leq default lax", "", "", `policy "lax" is neither a profile`, 2},
		{"a bad file", "join default bad.yaml", "", "", `bad.yaml:3: unknown operation "execute"; want one of read_files`, 1},
		{"100 MB", "leq large.yaml default", "", "", `large.yaml:1: the document has more than 1048576 bytes`, 1},
		{"100 MB, checked", "check large.yaml", "", "", `large.yaml:1: the document has more than 1048576 bytes`, 1},
		{"one argument", "meet default", "", "", `accepts 2 arg(s), received 1`, 2},
		{"three arguments", "leq default default default", "", "", `accepts 2 arg(s), received 3`, 2},
		{"unknown flag", "leq --fuzzy default default", "", "", `unknown flag: --fuzzy`, 2},
		{"all dimensions", "check whole.yaml", "", "whole.yaml: valid\n", "", 0},
		{"check", "check home/policies/c.yaml", "", "home/policies/c.yaml: valid\n", "", 0},
		{"check of a bad file as JSON", "check --json bad.yaml", "", `{"file":"bad.yaml","valid":false,"error":"bad.yaml:3: unknown operation \"execute\"; want one of read_files, write_files, edit_files, run_bash, glob_search, grep_search, web_search, web_fetch, net_connect, git_commit, git_push, create_pr, manage_pods, spawn_agent"}` + "\n", "bad.yaml:3", 1},

		{"the example of the contract", "eval", `{"policy": "permissive", "session": [{"op": "read_files", "path": "a"}, {"op": "web_fetch", "url": "https://x/"}, {"op": "run_bash", "argv": ["git", "push"]}]}`,
			`{"decisions":[{"decision":"allow","rule":"operations.read_files","legs":["private"]},{"decision":"ask","rule":"nu","legs":["private","untrusted","way_out"]},{"decision":"allow","rule":"operations.run_bash","legs":["private","untrusted","way_out"]}]}` + "\n", "", 0},
		{"no command", "frob", "", "", `cal policy has no command "frob" (cal policy --help)`, 2},
		{"too many arguments", "list x", "", "", `(cal policy list --help)`, 2},
		{"a directory", "check .", "", "", "policy ./. is no regular file and no pipe (d---------)", 1},
		{"a device without end", "check /dev/zero", "", "", "policy /dev/zero is no regular file and no pipe", 1},
		{"a pipe that nobody writes to", "check pipe.yaml", "", "", "pipe.yaml:1: the document is empty", 1},
		{"a pipe, by another command", "meet default pipe.yaml", "", "", "pipe.yaml:1: the document is empty", 1},
		{"a file that is too large", "check large.yaml", "", "", "large.yaml:1: the document has more than 1048576 bytes", 1},
		{"an empty session", "eval", `{"policy": {}, "session": []}`, `{"decisions":[]}` + "\n", "", 0},
		{"no line", "eval", "", "", "", 0},
		{"two lines and an empty one", "eval", `{"policy": {}, "session": [{"op": "read_files", "path": "a"}]}` + "\r\n\n" + `{"policy": "c", "session": [{"op": "read_files", "path": "a"}]}`,
			`{"decisions":[{"decision":"deny","rule":"operations.read_files","legs":[]}]}` + "\n" + `{"decisions":[{"decision":"ask","rule":"operations.read_files","legs":["private"]}]}` + "\n", "", 0},
		{"a bad line between two", "eval", `{"policy": {}, "session": []}` + "\nx\n" + `{"policy": {}, "session": []}` + "\n",
			`{"decisions":[]}` + "\n" + `{"error":"line 2: not JSON: canonical JSON: byte 0: 'x', want a value; want {\"policy\": NAME or object, \"session\": [{\"op\": ...}, ...]}"}` + "\n" + `{"decisions":[]}` + "\n", "cal: line 2: not JSON", 1},
	} {
		stdout, stderr, code := cal(t, dir, c.stdin, append([]string{"policy"}, strings.Fields(c.given)...)...)
		if stdout != c.stdout || !strings.Contains(stderr, c.stderr) || c.stderr == "" && stderr != "" || code != c.code {
			t.Errorf("%s: cal policy %s:\n got %q, %q, exit code %d\nwant %q, %q, exit code %d", c.name, c.given, stdout, stderr, code, c.stdout, c.stderr, c.code)
		}
	}
}

// What a program prints can be handed in again.
func TestPolicyMeetReadsBack(t *testing.T) {
	dir := policyFiles(t)
	for _, pair := range [][2]string{{"whole.yaml", "permissive"}, {"a.json", "b.yaml"}, {"default", "fix-issue"}} {
		meet, _, code := cal(t, dir, "", "policy", "meet", pair[0], pair[1])
		if code != 0 {
			t.Fatalf("meet of %v: exit code %d", pair, code)
		}
		if err := os.WriteFile(filepath.Join(dir, "meet.json"), []byte(meet), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, above := range pair {
			if stdout, stderr, code := cal(t, dir, "", "policy", "leq", "meet.json", above); stdout != "true\n" || code != 0 {
				t.Errorf("the meet of %v is not below %s: %s%s", pair, above, stdout, stderr)
			}
		}
	}
}

// A line may be long, and one that is too long ends nothing but itself.
func TestPolicyEvalLongLines(t *testing.T) {
	dir := t.TempDir()
	step := `{"op":"read_files","path":"` + strings.Repeat("a", 100_000) + `"}`
	long := `{"policy":"default","session":[` + step + "," + step + `]}` + "\n"
	tooLong := `{"policy":"default","session":[` + strings.Repeat(step+",", trial.MaxLine/len(step)) + step + `]}` + "\n"
	stdout, stderr, code := cal(t, dir, long+tooLong+long, "policy", "eval")
	lines := strings.Split(stdout, "\n")
	if len(lines) != 4 || code != 1 || !strings.Contains(lines[1], "bytes; at most 4194304 are read") || lines[0] != lines[2] || strings.Count(lines[0], "allow") != 2 {
		t.Errorf("exit code %d, %d lines, %.300s, %s", code, len(lines), stdout, stderr)
	}
}

// A step has the arguments of the tool of its name: one list, said twice.
func TestStepsHaveTheArgumentsOfTheTools(t *testing.T) {
	for op, of := range map[nucleus.Op]any{
		nucleus.ReadFiles: tools.ReadArgs{}, nucleus.WriteFiles: tools.WriteArgs{}, nucleus.EditFiles: tools.EditArgs{},
		nucleus.GlobSearch: tools.GlobArgs{}, nucleus.GrepSearch: tools.GrepArgs{}, nucleus.RunBash: tools.RunArgs{},
		nucleus.GitCommit: tools.CommitArgs{}, nucleus.GitPush: tools.PushArgs{}, nucleus.CreatePR: tools.PRArgs{}, nucleus.WebFetch: tools.FetchArgs{},
		nucleus.SpawnAgent: tools.SpawnArgs{}, nucleus.ManagePods: tools.PodsArgs{},
	} {
		var want []string
		for _, field := range reflect.VisibleFields(reflect.TypeOf(of)) {
			if field.Anonymous {
				continue
			}
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			want = append(want, name)
		}
		got := trial.Arguments(op)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: a step knows %v, the tool %v", op, got, want)
		}
	}
}

func TestPolicyForPeople(t *testing.T) {
	dir := policyFiles(t)
	for _, c := range []struct {
		given          []string
		stdout, stderr string // parts
		code           int
	}{
		{[]string{"why", "default", `{"op":"read_files","path":"a/.env"}`}, "rule        paths.blocked\nwhere       profiles/default.yaml:", "", 0},
		{[]string{"why", "whole.yaml", `{"op":"run_bash","argv":["bash","-lc","git -C . push"]}`}, "runs        push: git -C . push (git push)\n", "", 0},
		{[]string{"why", "whole.yaml", `{"op":"run_bash","argv":["cargo","test","executor"]}`}, "command     writes (cargo test)\n", "", 0},
		{[]string{"why", "whole.yaml", `{"op":"git_push"}`, "--exposure", "private,untrusted", "--json"}, `"decision":"ask","rule":"trifecta"`, "", 0},
		{[]string{"why", "whole.yaml", `{"op":"git_push"}`, "--json"}, `"where":"whole.yaml:2"`, "", 0},
		{[]string{"why", "default", `{"op":"execute"}`}, "", `unknown operation "execute"`, 1},
		{[]string{"why", "default", `{"op":"git_push"}`, "--exposure", "secret"}, "", `unknown leg "secret"`, 2},
		{[]string{"why", "default", `git_push`}, "", `the step is not JSON`, 1},
		{[]string{"diff", "default", "default", "--json"}, "[]\n", "", 0},
		{[]string{"diff", "read-only", "default"}, `more      operations.write_files  always instead of never  {"op":"write_files"}`, "", 0},
		{[]string{"prove", "whole.yaml"}, "assumed: trusted origin, holds nothing of a stranger: github.com/my-org/**\n", "", 0},
		{[]string{"prove", "default", "--trust-nothing"}, "holds: in", "", 0},
		{[]string{"prove", "trusting.yaml"}, "holds: in", "", 0},
		{[]string{"prove", "trusting.yaml", "--trust-nothing"}, "https://a.b:443/x", "", 1},
		{[]string{"prove", "trusting.yaml", "--trust-nothing", "--json"}, `{"holds":false,`, "", 1},
		{[]string{"prove", "bad.yaml"}, "", `bad.yaml:3: unknown operation`, 1},
		{[]string{"simulate"}, "", "which policy?", 2},
		{[]string{"simulate", "--policy", "default", "--log", "."}, "", "not a log", 1},
		{[]string{"show", "whole.yaml"}, `"budget":{"seconds":3600,"tokens":100000,"usd":5}`, "", 0},
		{[]string{"show", "trusting.yaml"}, `"trusted":true`, "assumption: counts on no leg: a.b port 443 GET /x/** trusted", 0},
		{[]string{"show", "trusting.yaml", "--json"}, `"trusted":true`, "", 0},
		{[]string{"list", "--json"}, `"fix-issue"`, "", 0},
		{[]string{"list"}, "home/policies/c.yaml", "", 0},
	} {
		stdout, stderr, code := cal(t, dir, "", append([]string{"policy"}, c.given...)...)
		if !strings.Contains(stdout, c.stdout) || !strings.Contains(stderr, c.stderr) || c.stderr == "" && stderr != "" || code != c.code {
			t.Errorf("cal policy %q:\n got %q, %q, exit code %d\nwant %q, %q, exit code %d", c.given, stdout, stderr, code, c.stdout, c.stderr, c.code)
		}
	}
}

// A policy is tried on a log as a node writes it, with what a log cuts.
func TestPolicySimulate(t *testing.T) {
	dir := policyFiles(t)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	where := filepath.Join(dir, "log")
	log, err := audit.Open(where, audit.Options{Origin: nucleus.LogOrigin, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	write := func(kind string, op nucleus.Op, exposure []string, args, data any) {
		raw := func(v any) json.RawMessage {
			if v == nil {
				return nil
			}
			out, err := nucleus.Canonical(v)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		e := nucleus.Entry{Pod: "p-1", Kind: kind, Op: op, Exposure: exposure, Args: raw(args), Data: raw(data)}
		if kind == nucleus.KindIntent {
			e.Verdict, e.Rule = nucleus.Allow, "operations."+string(op)
		}
		if _, err := log.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	write(nucleus.KindPodCreate, "", nil, nil, map[string]any{"mode": "mediated", "workspace": "w"})
	write(nucleus.KindPodStart, "", nil, nil, map[string]any{"untrusted": true})
	for _, a := range []nucleus.Action{
		{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "app/main.go"}}},
		{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "app/.env"}}},
		{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"echo", strings.Repeat("x", 9000)}, Dir: "app"}},
		{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"make"}, Dir: "app"}},
		{Op: nucleus.GitPush, Push: &nucleus.Push{Repo: "app", Remote: "https://github.com/a/b"}},
	} {
		write(nucleus.KindIntent, a.Op, nil, a, nil)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := cal(t, dir, "", "policy", "simulate", "--policy", "default", "--log", where)
	for _, want := range []string{"of 5 recorded requests it would have denied 1, asked for 1\n", "1 request cannot be judged, because the log does not show enough of it: 4\n", "\n3    read_files  allow     deny  paths.blocked", "\n6    git_push    allow     ask   trifecta"} {
		if !strings.Contains(stdout, want) || stderr != "" || code != 0 {
			t.Errorf("got %q, %q, exit code %d, want %q", stdout, stderr, code, want)
		}
	}
	stdout, _, _ = cal(t, dir, "", "policy", "simulate", "--policy", "edit-only", "--log", where, "--json")
	if want := `"unjudged":[4]`; !strings.Contains(stdout, want) || strings.Count(stdout, `"decision":"deny"`) != 3 {
		t.Errorf("got %s, want %s and 3 denials", stdout, want)
	}
}
