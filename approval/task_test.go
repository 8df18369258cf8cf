package approval

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"cal/nucleus"
)

const hour = nucleus.MaxTaskMillis

// A task is only granted for what a closed pattern can describe, and never for arbitrary code.
func TestNarrowest(t *testing.T) {
	for name, c := range map[string]struct {
		action nucleus.Action
		refuse string
	}{
		"push":           {actions()["push"], ""},
		"fetch":          {actions()["fetch"], ""},
		"connect":        {actions()["connect"], ""},
		"files":          {actions()["files"], ""},
		"pull request":   {actions()["pr"], "only one use"},
		"commit":         {actions()["commit"], "only one use"},
		"background job": {actions()["job"], "only one use"},
		"script":         {actions()["command"], "arbitrary code"},
		"shell":          {run(nucleus.Command{Argv: []string{"sh", "-c", "true"}, Dir: ".", Binary: "/bin/sh"}), "arbitrary code"},
		"interpreter":    {run(nucleus.Command{Argv: []string{"python3", "x.py"}, Dir: ".", Binary: "/usr/bin/python3"}), "arbitrary code"},
		"behind another": {run(nucleus.Command{Argv: []string{"env", "sh", "-c", "x"}, Dir: ".", Binary: "/usr/bin/env"}), "arbitrary code"},
		"unknown":        {run(nucleus.Command{Argv: []string{"./tool"}, Dir: ".", Binary: "/srv/tool"}), "arbitrary code"},
		"with an input":  {run(nucleus.Command{Argv: []string{"git", "status"}, Dir: ".", Binary: "/usr/bin/git", Stdin: hexOf("x")}), "an input"},
		"at a terminal":  {run(nucleus.Command{Argv: []string{"git", "status"}, Dir: ".", Binary: "/usr/bin/git", TTY: true}), "a terminal"},
		"command":        {run(nucleus.Command{Argv: []string{"git", "status"}, Dir: ".", Binary: "/usr/bin/git"}), ""},
		"drops commits":  {dropping(), "drops what ref"},
		"environment":    {run(nucleus.Command{Argv: []string{"git", "status"}, Dir: ".", Binary: "/usr/bin/git", Env: map[string]string{"LD_PRELOAD": "x"}}), "arbitrary code"},
	} {
		_, err := Narrowest(askFor(t, c.action))
		if c.refuse == "" && err != nil || c.refuse != "" && (err == nil || !strings.Contains(err.Error(), c.refuse)) {
			t.Errorf("%s: %v, want %q", name, err, c.refuse)
		}
	}
}

func run(c nucleus.Command) nucleus.Action {
	return nucleus.Action{Op: nucleus.RunBash, Args: hexOf("args"), Command: &c}
}

func dropping() nucleus.Action {
	a := actions()["push"]
	push := *a.Push
	push.Drops = true
	a.Push = &push
	return a
}

// What is shown is what is matched: each value of an action that the pattern names, changed.
func TestMatches(t *testing.T) {
	push := func(p nucleus.Push) nucleus.Action { return nucleus.Action{Op: nucleus.GitPush, Push: &p} }
	fetch := func(f nucleus.Fetch) nucleus.Action { return nucleus.Action{Op: nucleus.WebFetch, Fetch: &f} }
	files := func(op nucleus.Op, paths ...string) nucleus.Action {
		a := nucleus.Action{Op: op}
		for _, p := range paths {
			a.Files = append(a.Files, nucleus.File{Path: p})
		}
		return a
	}
	connect := func(host string, port int) nucleus.Action {
		return nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: port}}
	}
	pushes := nucleus.Match{Push: &nucleus.PushMatch{Repo: "app", Remote: "https://h/app.git", Ref: "refs/heads/agent/**"}}
	okPush := nucleus.Push{Repo: "app", Remote: "https://h/app.git", Ref: "refs/heads/agent/x", Old: "1", New: "2"}
	fetches := nucleus.Match{Fetch: &nucleus.FetchMatch{Method: "GET", Scheme: "https", Host: "h", Port: 443, Path: "/docs/**"}}
	okFetch := nucleus.Fetch{Method: "GET", URL: "https://h/docs/a?q=1", Host: "h", Port: 443, Path: "/docs/a"}
	commands := nucleus.Match{Command: &nucleus.CommandMatch{Argv: []string{"git", "log", "**"}, Binary: "/usr/bin/git", Dir: "app"}}
	okRun := nucleus.Command{Argv: []string{"git", "log", "--oneline"}, Binary: "/usr/bin/git", Dir: "app"}
	below := nucleus.Match{Files: &nucleus.FilesMatch{Root: "src"}}
	with := func(change any) nucleus.Action {
		switch change := change.(type) {
		case func(*nucleus.Push):
			p := okPush
			change(&p)
			return push(p)
		case func(*nucleus.Fetch):
			f := okFetch
			change(&f)
			return fetch(f)
		case func(*nucleus.Command):
			c := okRun
			change(&c)
			return run(c)
		}
		panic("what is changed?")
	}
	for _, c := range []struct {
		what   string
		match  nucleus.Match
		action nucleus.Action
		ok     bool
	}{
		{"a push", pushes, push(okPush), true},
		{"deeper", pushes, with(func(p *nucleus.Push) { p.Ref = "refs/heads/agent/a/b" }), true},
		{"another branch", pushes, with(func(p *nucleus.Push) { p.Ref = "refs/heads/main" }), false},
		{"a name that begins so", pushes, with(func(p *nucleus.Push) { p.Ref = "refs/heads/agentx" }), false},
		{"up and out", pushes, with(func(p *nucleus.Push) { p.Ref = "refs/heads/agent/../main" }), false},
		{"a tag", pushes, with(func(p *nucleus.Push) { p.Ref = "refs/tags/agent/x" }), false},
		{"another remote", pushes, with(func(p *nucleus.Push) { p.Remote += "x" }), false},
		{"another repository", pushes, with(func(p *nucleus.Push) { p.Repo = "b" }), false},
		{"that drops commits", pushes, with(func(p *nucleus.Push) { p.Drops = true }), false},
		{"a deletion", pushes, with(func(p *nucleus.Push) { p.New = strings.Repeat("0", 40) }), false},
		{"an exact ref", nucleus.Match{Push: &nucleus.PushMatch{Repo: "app", Remote: "https://h/app.git", Ref: "refs/heads/agent/x"}}, push(okPush), true},
		{"below an exact ref", nucleus.Match{Push: &nucleus.PushMatch{Repo: "app", Remote: "https://h/app.git", Ref: "refs/heads/agent"}}, push(okPush), false},
		{"any ref at all", nucleus.Match{Push: &nucleus.PushMatch{Repo: "app", Remote: "https://h/app.git", Ref: "refs/**"}}, push(okPush), false},
		{"a wildcard", nucleus.Match{Push: &nucleus.PushMatch{Repo: "app", Remote: "https://h/app.git", Ref: "refs/heads/*"}}, push(okPush), false},

		{"a fetch", fetches, fetch(okFetch), true},
		{"another path", fetches, with(func(f *nucleus.Fetch) { f.Path = "/doc" }), false},
		{"up and out of it", fetches, with(func(f *nucleus.Fetch) { f.Path = "/docs/../admin" }), false},
		{"in escapes", fetches, with(func(f *nucleus.Fetch) { f.Path = "/docs/%2e%2e/admin" }), false},
		{"another method", fetches, with(func(f *nucleus.Fetch) { f.Method = "POST" }), false},
		{"another host", fetches, with(func(f *nucleus.Fetch) { f.Host = "i" }), false},
		{"another port", fetches, with(func(f *nucleus.Fetch) { f.Port = 80 }), false},
		{"in clear", fetches, with(func(f *nucleus.Fetch) { f.URL = "http://h/docs/a" }), false},

		{"a connection", nucleus.Match{Connect: &nucleus.Connect{Host: "h", Port: 22}}, connect("h", 22), true},
		{"to another port", nucleus.Match{Connect: &nucleus.Connect{Host: "h", Port: 22}}, connect("h", 23), false},
		{"to another host", nucleus.Match{Connect: &nucleus.Connect{Host: "h", Port: 22}}, connect("hh", 22), false},

		{"a file", below, files(nucleus.WriteFiles, "src/a.go"), true},
		{"the directory itself", below, files(nucleus.GlobSearch, "src"), true},
		{"two files", below, files(nucleus.EditFiles, "src/a.go", "src/b.go"), true},
		{"one of two", below, files(nucleus.WriteFiles, "src/a.go", "b.go"), false},
		{"a name that begins alike", below, files(nucleus.WriteFiles, "srcs/a.go"), false},
		{"out of it", below, files(nucleus.WriteFiles, "src/../b.go"), false},
		{"an absolute one", nucleus.Match{Files: &nucleus.FilesMatch{Root: "."}}, files(nucleus.WriteFiles, "/etc/passwd"), false},
		{"no file", below, files(nucleus.WriteFiles), false},

		{"a command", commands, run(okRun), true},
		{"another subcommand", commands, with(func(c *nucleus.Command) { c.Argv = []string{"git", "push"} }), false},
		{"split anew", commands, with(func(c *nucleus.Command) { c.Argv = []string{"git", "log --oneline"} }), false},
		{"another directory", commands, with(func(c *nucleus.Command) { c.Dir = "." }), false},
		{"another binary", commands, with(func(c *nucleus.Command) { c.Binary = "/usr/local/bin/git" }), false},
		{"with a variable", commands, with(func(c *nucleus.Command) { c.Env = map[string]string{"GIT_SSH_COMMAND": "x"} }), false},
		{"with a harmless variable", commands, with(func(c *nucleus.Command) { c.Env = map[string]string{"LC_ALL": "C"} }), false},
		{"with an input given", commands, with(func(c *nucleus.Command) { c.Stdin = hexOf("x") }), false},
		{"an option that runs a program", nucleus.Match{Command: &nucleus.CommandMatch{Argv: []string{"git", "**"}, Binary: "/usr/bin/git", Dir: "app"}},
			with(func(c *nucleus.Command) { c.Argv = []string{"git", "-c", "alias.x=!sh", "x"} }), false},
		{"any program", nucleus.Match{Command: &nucleus.CommandMatch{Argv: []string{"**"}, Binary: "/bin/sh", Dir: "app"}},
			with(func(c *nucleus.Command) { c.Argv, c.Binary = []string{"sh", "x"}, "/bin/sh" }), false},
		{"no pattern", nucleus.Match{Command: &nucleus.CommandMatch{Binary: "/usr/bin/git", Dir: "app"}}, run(okRun), false},

		{"of another operation", pushes, fetch(okFetch), false},
		{"of a like operation", fetches, connect("h", 443), false},
		{"two patterns", nucleus.Match{Push: pushes.Push, Files: below.Files}, push(okPush), false},
		{"nothing", nucleus.Match{}, push(okPush), false},
	} {
		if err := Matches(c.match, c.action); (err == nil) != c.ok {
			t.Errorf("%s: %v, want %v", c.what, err, c.ok)
		}
	}
}

func taskFor(t testing.TB, ask nucleus.AskRequest) nucleus.Task {
	t.Helper()
	m, err := Narrowest(ask)
	if err != nil {
		t.Fatal(err)
	}
	return nucleus.Task{Uses: 5, Until: created + hour/2, Exposure: Told(ask), Match: m}
}

func TestCheckTask(t *testing.T) {
	ask := askFor(t, actions()["push"])
	good := taskFor(t, ask)
	for what, c := range map[string]struct {
		change func(*nucleus.Task)
		text   string
	}{
		"as it is":       {func(*nucleus.Task) {}, ""},
		"the most":       {func(k *nucleus.Task) { k.Uses, k.Until = 20, created+hour }, ""},
		"no uses":        {func(k *nucleus.Task) { k.Uses = 0 }, "0 uses"},
		"too many":       {func(k *nucleus.Task) { k.Uses = 21 }, "21 uses"},
		"less than none": {func(k *nucleus.Task) { k.Uses = -1 }, "-1 uses"},
		"over":           {func(k *nucleus.Task) { k.Until = created }, "ended"},
		"too long":       {func(k *nucleus.Task) { k.Until = created + hour + 1 }, "at most an hour"},
		"more exposure":  {func(k *nucleus.Task) { k.Exposure |= nucleus.WayOut }, "the ask tells of"},
		"less exposure":  {func(k *nucleus.Task) { k.Exposure = 0 }, "the ask tells of"},
		"for another ref": {func(k *nucleus.Task) {
			k.Match.Push = &nucleus.PushMatch{Repo: "app", Remote: k.Match.Push.Remote, Ref: "refs/heads/x"}
		}, "not for what was asked"},
		"for nothing": {func(k *nucleus.Task) { k.Match = nucleus.Match{} }, "only one use"},
	} {
		task := good
		c.change(&task)
		err := CheckTask(ask, task, created)
		if c.text == "" && err != nil || c.text != "" && (err == nil || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s: %v, want %q", what, err, c.text)
		}
	}
	// What the action itself takes is told: its own first use is no reason to ask anew.
	ask.Takes = nucleus.WayOut
	if Told(ask) != ask.Context.Exposure|nucleus.WayOut {
		t.Errorf("told %v", Told(ask).Names())
	}
}

// The bounds are signed: every one of them flipped in the token's claims makes another token, and
// approvers who differ in one have granted nothing.
func TestTaskIsSigned(t *testing.T) {
	ann, bob := newApprover(t, "ann"), newApprover(t, "bob")
	known := append(ann.keys(), bob.keys()...)
	for name, action := range actions() {
		ask := askFor(t, action)
		ask.Approvals = 2
		if _, err := Narrowest(ask); err != nil {
			continue
		}
		task := taskFor(t, ask)
		sign := func(a approver, task *nucleus.Task) string {
			b, err := Bind(ask)
			if err != nil {
				t.Fatal(err)
			}
			g := b.Grant("g-"+a.name, a.name, "")
			g.Task = task
			return a.sign(t, g, Footer(a.name), Assertion(b.AskDigest))
		}
		grants, err := Approved([]string{sign(ann, &task), sign(bob, &task)}, ask, known, created+1)
		if err != nil || !reflect.DeepEqual(grants[0].Task, &task) {
			t.Fatalf("%s: %+v, %v", name, grants, err)
		}
		_, err = Approved([]string{sign(ann, &task), sign(bob, nil)}, ask, known, created+1)
		wantReason(t, name+": one for a task, one for one use", err, BadTask)
		wide := task
		wide.Uses = nucleus.MaxTaskUses + 1
		_, err = Approved([]string{sign(ann, &wide), sign(bob, &wide)}, ask, known, created+1)
		wantReason(t, name+": out of bounds", err, BadTask)
		raw, err := json.Marshal(task)
		if err != nil {
			t.Fatal(err)
		}
		changed := 0
		eachLeaf(t, raw, func(path string, other []byte) {
			var k nucleus.Task
			if json.Unmarshal(other, &k) != nil {
				return // a number that became a text
			}
			changed++
			_, err := Approved([]string{sign(ann, &task), sign(bob, &k)}, ask, known, created+1)
			wantReason(t, fmt.Sprintf("%s: %s differs", name, path), err, BadTask)
		})
		if changed < 4 {
			t.Errorf("%s: %d bounds changed", name, changed)
		}
	}
}

// eachLeaf calls f with a copy of a JSON value for every leaf, that leaf changed.
func eachLeaf(t testing.TB, raw []byte, f func(path string, other []byte)) {
	t.Helper()
	var walk func(v any, path string, set func(any) []byte)
	walk = func(v any, path string, set func(any) []byte) {
		switch v := v.(type) {
		case map[string]any:
			for key, inner := range v {
				walk(inner, path+"."+key, func(x any) []byte {
					v[key] = x
					defer func() { v[key] = inner }()
					return set(v)
				})
			}
		case []any:
			for i, inner := range v {
				walk(inner, fmt.Sprint(path, "[", i, "]"), func(x any) []byte {
					v[i] = x
					defer func() { v[i] = inner }()
					return set(v)
				})
			}
		case string:
			f(path, set(v+"x"))
		case float64:
			f(path, set(v+1))
		case bool:
			f(path, set(!v))
		}
	}
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	walk(v, "", func(x any) []byte {
		out, err := json.Marshal(x)
		if err != nil {
			t.Fatal(err)
		}
		return out
	})
}

// Every bound of a task is on the screen.
func TestDrawTask(t *testing.T) {
	for name, action := range actions() {
		ask := askFor(t, action)
		if _, err := Narrowest(ask); err != nil {
			continue
		}
		task := taskFor(t, ask)
		raw, _ := json.Marshal(task)
		text := DrawTask(action.Op, task, View{})
		eachLeaf(t, raw, func(path string, other []byte) {
			var k nucleus.Task
			if json.Unmarshal(other, &k) == nil && DrawTask(action.Op, k, View{}) == text && path != ".exposure" {
				t.Errorf("%s: %s is not shown:\n%s", name, path, text)
			}
		})
		for _, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
			if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r > '~' }) || len(line) > 80 {
				t.Errorf("%s: line %q", name, line)
			}
		}
	}
	task := nucleus.Task{Uses: 2, Until: created, Exposure: nucleus.Private, Match: nucleus.Match{Command: &nucleus.CommandMatch{
		Argv: []string{"git", "log", "\u202e", "**"}, Binary: "/usr/bin/git", Dir: "app", Env: map[string]string{"A": "b"}}}}
	want := `what a grant for a task opens
  operation   "run_bash"
  uses        at most 2, the one that is asked for among them
  until       2023-11-14 22:13:20.000 UTC
  while       no other operation takes more than: private
  argv[0]     "git"
  argv[1]     "log"
  argv[2]     "\u{202e}"
  argv[3]     "**"
  binary      "/usr/bin/git"
  directory   "app"
  env         "A" = "b"
  note        files that an argument names may have changed
`
	if got := DrawTask(nucleus.RunBash, task, View{}); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
