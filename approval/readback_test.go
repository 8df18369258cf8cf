package approval

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"cal/nucleus"
)

// readBack is a person with all the time in the world: it makes an action out of nothing but
// the text that was drawn. What it cannot read it gives up on, so that a text which can be
// read in two ways is found.
type readBack struct {
	t      testing.TB
	fields []drawnField
}

type drawnField struct {
	label, value string
}

// sectionOf reads the section that begins with heading: each label with its value.
func sectionOf(t testing.TB, text, heading string) readBack {
	t.Helper()
	_, rest, ok := strings.Cut("\n"+text, "\n"+heading+"\n")
	if !ok {
		t.Fatalf("no section %q in\n%s", heading, text)
	}
	var lines []string
	for _, line := range strings.Split(strings.TrimSuffix(rest, "\n"), "\n") {
		if !strings.HasPrefix(line, "  ") {
			break // the next section
		}
		if more, carried := strings.CutPrefix(line, "  : "); carried {
			lines[len(lines)-1] += more
			continue
		}
		lines = append(lines, line)
	}
	r := readBack{t: t}
	for at := 0; at < len(lines); at++ {
		line := lines[at]
		if len(line) < 14 || strings.HasPrefix(line, "  | ") || strings.HasPrefix(line, "  ~ ") {
			t.Fatalf("line %q stands where a label was expected", line)
		}
		label, value := line[2:13], line[14:]
		if end := strings.IndexByte(line[13:], ' '); line[13] != ' ' { // a label longer than its column
			label, value = line[2:13+end], line[13+end+1:]
		}
		label = strings.TrimRight(label, " ")
		var n int
		if _, err := fmt.Sscanf(value, "%d lines:", &n); err == nil && !strings.HasPrefix(value, `"`) {
			var block []string
			for range n {
				at++
				body, ok := strings.CutPrefix(lines[at], "  | ")
				if !ok {
					t.Fatalf("line %q stands in a text of %d lines", lines[at], n)
				}
				block = append(block, unvisible(t, body))
			}
			value = strings.Join(block, "\n")
		} else if strings.HasPrefix(value, `"`) && !slices.Contains([]string{"env", "header", "LOOK", "runs", "policy"}, label) {
			value = unquote(t, value)
		}
		r.fields = append(r.fields, drawnField{label, value})
	}
	return r
}

func unquote(t testing.TB, s string) string {
	t.Helper()
	inner, ok := strings.CutPrefix(s, `"`)
	if ok {
		inner, ok = strings.CutSuffix(inner, `"`)
	}
	if !ok {
		t.Fatalf("%q is not quoted", s)
	}
	return unvisible(t, inner)
}

// all are the values of a label; one is the only one, or empty.
func (r readBack) all(label string) (values []string) {
	for _, f := range r.fields {
		if f.label == label {
			values = append(values, f.value)
		}
	}
	return values
}

func (r readBack) one(label string) string {
	r.t.Helper()
	switch values := r.all(label); len(values) {
	case 0:
		return ""
	case 1:
		return values[0]
	default:
		r.t.Fatalf("label %q stands %d times", label, len(values))
		return ""
	}
}

func (r readBack) number(label string) int {
	r.t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(r.one(label), " bytes"))
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// pairs reads `"name" = "value"`.
func (r readBack) pairs(label string) map[string]string {
	r.t.Helper()
	var out map[string]string
	for _, f := range r.fields {
		if f.label != label {
			continue
		}
		name, value, ok := cutQuoted(f.value)
		if !ok {
			r.t.Fatalf("%q is no pair", f.value)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[unquote(r.t, name)] = unquote(r.t, value)
	}
	return out
}

// cutQuoted splits at the end of the first quoted text.
func cutQuoted(s string) (name, value string, ok bool) {
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			value, ok = strings.CutPrefix(s[i+1:], " = ")
			return s[:i+1], value, ok
		}
	}
	return "", "", false
}

func (r readBack) files(label string) (files []nucleus.File) {
	for _, f := range r.fields {
		switch last := len(files) - 1; f.label {
		case label:
			files = append(files, nucleus.File{Path: f.value})
		case "  before":
			files[last].Before = f.value
		case "  after":
			files[last].After = f.value
		}
	}
	return files
}

func (r readBack) notes(text string) bool {
	for _, note := range r.all("note") {
		if note == text {
			return true
		}
	}
	return false
}

// actionIn reads the action that a screen shows.
func actionIn(t testing.TB, text string, op nucleus.Op) nucleus.Action {
	t.Helper()
	r := sectionOf(t, text, "what will happen: "+string(op))
	a := nucleus.Action{Op: op, Args: r.one("arguments")}
	switch op {
	case nucleus.WriteFiles:
		a.Files = r.files("file")
	case nucleus.RunBash:
		if r.one("job") != "" {
			a.Job = &nucleus.Job{ID: r.one("job"), Stop: r.one("action") == "stop it"}
			break
		}
		c := &nucleus.Command{Binary: r.one("binary"), Dir: r.one("directory"), Env: r.pairs("env"), Stdin: r.one("stdin"), Files: r.files("names file"),
			Script: r.notes("a shell runs the script below"), TTY: r.notes("runs on a terminal")}
		for i := 0; len(r.all(fmt.Sprintf("argv[%d]", i))) > 0; i++ {
			c.Argv = append(c.Argv, r.one(fmt.Sprintf("argv[%d]", i)))
		}
		a.Command = c
	case nucleus.WebFetch:
		a.Fetch = &nucleus.Fetch{Method: r.one("method"), URL: r.one("url"), Host: r.one("host"), Port: r.number("port"), Path: r.one("path"), Headers: r.pairs("header"), Body: r.one("  digest"), Bytes: r.number("body")}
	case nucleus.NetConnect:
		a.Connect = &nucleus.Connect{Host: r.one("host"), Port: r.number("port")}
	case nucleus.GitPush:
		a.Push = &nucleus.Push{Repo: r.one("repository"), Remote: r.one("remote"), Ref: r.one("ref"), Old: r.one("old"), New: r.one("new"), Drops: r.notes(dropsNote)}
	case nucleus.CreatePR:
		a.PR = &nucleus.PR{Repository: r.one("repository"), API: r.one("api"), Base: r.one("base"), Head: r.one("head"), HeadID: r.one("head id"), Title: r.one("title"), Body: r.one("body")}
	case nucleus.SpawnAgent:
		s := &nucleus.Sub{Do: nucleus.SubDo(r.one("do")), Pod: r.one("pod"), Task: r.one("task"), Agent: r.one("agent"), Driver: r.one("driver"), Tier: nucleus.Tier(r.one("tier")),
			Mode: nucleus.Mode(r.one("mode")), Repo: r.one("repository"), Branch: r.one("branch"), Commit: r.one("commit"), Env: r.all("env"), Keep: r.notes("the pod stays when its agent has ended")}
		var c nucleus.Resources
		if _, err := fmt.Sscanf(r.one("resources"), "cpu %d, memory_mb %d, pids %d, disk_mb %d", &c.CPU, &c.MemoryMB, &c.Pids, &c.DiskMB); err != nil {
			t.Fatal(err)
		}
		s.Resources = &c
		for i, name := range s.Env {
			s.Env[i] = unquote(t, name)
		}
		policy := strings.Join(blockOf(t, text, "the policy of the new pod"), "\n")
		canonical, err := nucleus.CanonicalJSON([]byte(policy))
		if err != nil || r.one("policy") != "as above, \""+nucleus.SHA256(canonical)+"\"" {
			t.Fatalf("policy %s, %v, its digest %s", policy, err, r.one("policy"))
		}
		s.Policy = canonical
		a.Sub = s
	case nucleus.GitCommit:
		a.Commit = &nucleus.Commit{Repo: r.one("repository"), Message: r.one("message"), Paths: r.all("path"), Name: r.one("name"), Email: r.one("email")}
	}
	return a
}

// blockOf are the lines of a section that holds nothing but a text.
func blockOf(t testing.TB, text, heading string) (lines []string) {
	t.Helper()
	_, rest, ok := strings.Cut("\n"+text, "\n"+heading+"\n")
	if !ok {
		t.Fatalf("no section %q", heading)
	}
	for _, line := range strings.Split(rest, "\n") {
		if more, carried := strings.CutPrefix(line, "  : "); carried {
			lines[len(lines)-1] += more
		} else if body, ok := strings.CutPrefix(line, "  | "); ok {
			lines = append(lines, body)
		} else {
			break
		}
	}
	for i, line := range lines {
		lines[i] = unvisible(t, line)
	}
	return lines
}

// withTexts is an ask of each kind, all of whose texts are a and b.
func withTexts(a, b string) map[string]nucleus.Action {
	args := hexOf("args")
	files := []nucleus.File{{Path: a, Before: hexOf("x")}, {Path: b, After: hexOf("y")}, {Path: a + b}}
	return map[string]nucleus.Action{
		"files":   {Op: nucleus.WriteFiles, Args: args, Files: files},
		"command": {Op: nucleus.RunBash, Args: args, Command: &nucleus.Command{Argv: []string{a, b, "", a + "\n" + b}, Script: true, Dir: b, Env: map[string]string{a: b, "x" + b: a}, Stdin: hexOf("in"), Binary: a, Files: files, TTY: true}},
		"fetch":   {Op: nucleus.WebFetch, Args: args, Fetch: &nucleus.Fetch{Method: b, URL: a, Host: b, Port: 443, Path: a, Headers: map[string]string{a: b, b + "y": a}, Body: hexOf("b"), Bytes: 3}},
		"connect": {Op: nucleus.NetConnect, Args: args, Connect: &nucleus.Connect{Host: a, Port: 22}},
		"push":    {Op: nucleus.GitPush, Args: args, Push: &nucleus.Push{Repo: a, Remote: b, Ref: a, Old: b, New: a, Drops: len(a)%2 == 0}},
		"pr":      {Op: nucleus.CreatePR, Args: args, PR: &nucleus.PR{Repository: a, API: b, Base: a, Head: b, HeadID: a, Title: b, Body: a + "\n" + b}},
		"job":     {Op: nucleus.RunBash, Args: args, Job: &nucleus.Job{ID: "j" + a, Stop: true}},
		"sub": {Op: nucleus.SpawnAgent, Args: args, Sub: &nucleus.Sub{Do: nucleus.SubSpawn, Pod: "p" + a, Task: b, Agent: "g" + a, Policy: policyWith(a, b), Driver: "d" + b, Tier: "kernel", Mode: "mediated",
			Resources: &nucleus.Resources{CPU: 2, MemoryMB: 512, Pids: 9}, Env: []string{a, b}, Repo: "r" + a, Branch: "b" + b, Commit: "c" + a, Keep: true}},
		"commit": {Op: nucleus.GitCommit, Args: args, Commit: &nucleus.Commit{Repo: a, Message: b, Paths: []string{a, b}, Name: a, Email: b}},
	}
}

func policyWith(a, b string) json.RawMessage {
	raw, err := nucleus.Canonical(map[string]any{"name": a, "paths": map[string]any{"blocked": []string{b, a + b}}})
	if err != nil {
		panic(err)
	}
	return raw
}

// checkReadBack draws each kind of ask and reads the action back out of the text.
func checkReadBack(t *testing.T, a, b string, width int) {
	if !utf8.ValidString(a+b) || !utf8.ValidString(a) {
		return // refused before it is drawn
	}
	for name, action := range withTexts(a, b) {
		ask := askFor(t, action)
		ask.Detail = []nucleus.Detail{{Title: a, Text: b}}
		ask.Why, ask.Rule = b, a
		drawn, err := Draw(ask, View{Width: width, Whole: true})
		if err != nil {
			t.Fatal(err)
		}
		checkScreen(t, drawn.Text, max(width, 40))
		want, err := nucleus.Canonical(action)
		if err != nil {
			t.Fatal(err)
		}
		got, err := nucleus.Canonical(actionIn(t, drawn.Text, action.Op))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Fatalf("%s: the screen says\n%s\nwhat is signed is\n%s\nthe screen:\n%s", name, got, want, drawn.Text)
		}
	}
}

var hostileTexts = []string{
	"plain", "", " ", "a ", "\n", "a\n", "\na", "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\u2066x\u2069", "a\u200b\u200d\ufeffb", "\u0430pple", "\u009b31m", "\x7f\x00\r\x08",
	"line\nline \n\n", `\u{202e}`, `\`, `"`, `" = "`, `a" = "b`, "3 lines:", "e\u0301", "\U000e0041", "\u2028\u2029\u0085", strings.Repeat("long ", 400), strings.Repeat("\n", 300),
	"what will happen: read_files\n  host        \"good.example\"", "  | x", "  : x", "  ~ x", "\n  argv[0]     \"true\"", "a\tb\tc",
}

// Text shown is bytes executed: what a person reads is what is signed, to the last byte.
func TestTextIsBytes(t *testing.T) {
	for i, a := range hostileTexts {
		for j := i; j < i+len(hostileTexts); j += 4 { // with itself, and with every fourth
			checkReadBack(t, a, hostileTexts[j%len(hostileTexts)], 40+(17*i+5*j)%100)
		}
	}
}

func FuzzTextIsBytes(f *testing.F) {
	for i, text := range hostileTexts {
		f.Add(text, hostileTexts[(i+7)%len(hostileTexts)], 40+i)
	}
	f.Fuzz(func(t *testing.T, a, b string, width int) { checkReadBack(t, a, b, 40+max(width%200, 0)) })
}

// What the requester signed and an action holds as a digest alone stands on the screen.
func TestDrawSignedArguments(t *testing.T) {
	for _, text := range hostileTexts {
		for name, c := range map[string]struct {
			action nucleus.Action
			args   map[string]any
			label  string
		}{
			"content": {nucleus.Action{Op: nucleus.WriteFiles, Files: []nucleus.File{{Path: "a", After: hexOf(text)}}}, map[string]any{"path": "a", "content": text}, "content"},
			"edit":    {nucleus.Action{Op: nucleus.EditFiles, Files: []nucleus.File{{Path: "a", Before: hexOf("x"), After: hexOf("y")}}}, map[string]any{"path": "a", "old": "x", "new": text}, "new"},
			"body":    {nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "POST", Host: "h.example", Port: 443, Body: hexOf(text), Bytes: len(text)}}, map[string]any{"url": "https://h.example", "body": text}, "body"},
			"stdin":   {nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"sh"}, Binary: "/bin/sh", Stdin: hexOf(text)}}, map[string]any{"argv": []string{"sh"}, "stdin": text}, "stdin"},
		} {
			args, err := nucleus.Canonical(c.args)
			if err != nil {
				continue // not UTF-8
			}
			c.action.Args = nucleus.SHA256(args)
			ask := askFor(t, c.action)
			ask.Request, err = json.Marshal(map[string]any{"method": "POST", "body_b64": args})
			if err != nil {
				t.Fatal(err)
			}
			drawn := draw(t, ask, View{Whole: true, Width: 90})
			checkScreen(t, drawn, 90)
			if got := sectionOf(t, drawn, "what the requester signed"); got.one(c.label) != text || len(got.all("NOTE")) > 0 {
				t.Errorf("%s: %q is drawn as %q, notes %q\n%s", name, text, got.one(c.label), got.all("NOTE"), drawn)
			}
			// Arguments whose digest is another one are not shown as if they were these.
			other := ask
			other.Action.Args = hexOf("other")
			if got := sectionOf(t, draw(t, sealed(t, other), View{Whole: true}), "what the requester signed"); got.one(c.label) != "" || len(got.all("NOTE")) != 1 {
				t.Errorf("%s: other arguments are drawn: %+v", name, got.fields)
			}
			// And a digest that is not that of the argument is said.
			if name == "edit" {
				continue
			}
			switch {
			case c.action.Fetch != nil:
				other.Action.Fetch.Body = hexOf("other")
			case c.action.Command != nil:
				other.Action.Command.Stdin = hexOf("other")
			default:
				other.Action.Files[0].After = hexOf("other")
			}
			other.Action.Args = c.action.Args
			if got := sectionOf(t, draw(t, sealed(t, other), View{Whole: true}), "what the requester signed"); len(got.all("NOTE")) != 1 {
				t.Errorf("%s: another digest is not said: %+v", name, got.fields)
			}
		}
	}
}
