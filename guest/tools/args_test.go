package tools

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"cal/nucleus"
)

func TestDecodeRefuses(t *testing.T) {
	long := strings.Repeat("x", maxArgv+1)
	cases := []struct {
		op   nucleus.Op
		raw  string
		part string
	}{
		{nucleus.ReadFiles, ``, "arguments"},
		{nucleus.ReadFiles, `[]`, "not a JSON object"},
		{nucleus.ReadFiles, `null`, "not a JSON object"},
		{nucleus.ReadFiles, `{}`, `argument "path" is missing`},
		{nucleus.ReadFiles, `{"path":null}`, `argument "path" is missing`},
		{nucleus.ReadFiles, `{"path":"x","extra":1}`, `unknown argument "extra"`},
		{nucleus.ReadFiles, `{"Path":"x"}`, `argument "path" is missing`},
		{nucleus.ReadFiles, `{"path":"x","Path":"/etc/passwd"}`, `unknown argument "Path"`},
		{nucleus.ReadFiles, `{"path":"x","path":"y"}`, "duplicate key"},
		{nucleus.ReadFiles, `{"path":7}`, `argument "path" is a JSON number, want string`},
		{nucleus.ReadFiles, `{"path":"x","limit":-1}`, "limit -1"},
		{nucleus.ReadFiles, `{"path":"x","limit":1.5}`, `argument "limit"`},
		{nucleus.ReadFiles, `{"path":"x","limit":9007199254740993}`, "2^53"},
		{nucleus.ReadFiles, `{"path":"x"} {}`, "data after the value"},
		{nucleus.ReadFiles, "{\"path\":\"\xff\"}", "not UTF-8"},
		{nucleus.ReadFiles, `{"path":"\ud800"}`, "surrogate"},
		{nucleus.ReadFiles, `{"path":"a\u0000b"}`, "NUL"},
		{nucleus.ReadFiles, `{"path":"a/../b"}`, `".."`},
		{nucleus.WriteFiles, `{"path":"x"}`, `argument "content" is missing`},
		{nucleus.WriteFiles, `{"path":"x","content":"","mode":"4755"}`, "0400 to 0777"},
		{nucleus.WriteFiles, `{"path":"x","content":"","mode":"rwx"}`, "octal"},
		{nucleus.WriteFiles, `{"path":"x","content":"","mode":"00644"}`, "octal"},
		{nucleus.EditFiles, `{"path":"x","old":"","new":"y"}`, `"old" is empty`},
		{nucleus.EditFiles, `{"path":"x","old":"y","new":"y"}`, "equal"},
		{nucleus.GlobSearch, `{"pattern":""}`, "empty"},
		{nucleus.GlobSearch, `{"pattern":"[a"}`, "not a valid pattern"},
		{nucleus.GlobSearch, `{"pattern":"/etc/*"}`, "absolute"},
		{nucleus.GlobSearch, `{"pattern":"` + strings.Repeat("**/", 20) + `x"}`, "16 stars"},
		{nucleus.GrepSearch, `{"pattern":"(a"}`, "missing closing"},
		{nucleus.GrepSearch, `{"pattern":"a","context":99}`, "context 99"},
		{nucleus.RunBash, `{}`, "want exactly one"},
		{nucleus.RunBash, `{"argv":["a"],"script":"b"}`, "want exactly one"},
		{nucleus.RunBash, `{"argv":[]}`, "names no program"},
		{nucleus.RunBash, `{"argv":[""]}`, "names no program"},
		{nucleus.RunBash, `{"argv":"ls -l"}`, `argument "argv"`},
		{nucleus.RunBash, `{"argv":["a\u0000b"]}`, "NUL"},
		{nucleus.RunBash, `{"argv":["` + long + `"]}`, "at most 1048576"},
		{nucleus.RunBash, `{"script":"x","timeout_s":86401}`, "timeout_s 86401"},
		{nucleus.RunBash, `{"script":"x","timeout_s":-1}`, "timeout_s -1"},
		{nucleus.RunBash, `{"script":"x","dir":".."}`, `".."`},
		{nucleus.RunBash, `{"output":"a","stop":"b"}`, "want exactly one"},
		{nucleus.RunBash, `{"output":"a","dir":"b"}`, "stand alone"},
		{nucleus.GitCommit, `{"message":" \n"}`, "empty"},
		{nucleus.GitCommit, `{"message":"m","paths":[""]}`, `"paths" is empty`},
		{nucleus.GitPush, `{"branch":"--force"}`, "not a branch name"},
		{nucleus.CreatePR, `{"title":"t"}`, `argument "body" is missing`},
		{nucleus.WebFetch, `{"url":""}`, "empty"},
		{nucleus.WebFetch, `{"url":"x","headers":{"a":1}}`, `argument "headers`},
		{nucleus.NetConnect, `{}`, "has no tool"},
		{"sh", `{}`, "has no tool"},
	}
	for _, c := range cases {
		got, err := Decode(c.op, json.RawMessage(c.raw))
		if err == nil {
			t.Errorf("%s %.80s: decoded as %+v", c.op, c.raw, got)
			continue
		}
		e := nucleus.AsError(err)
		if !strings.Contains(e.Message, c.part) || e.Kind != nucleus.KindInvalid && e.Kind != nucleus.KindTooLarge {
			t.Errorf("%s %.80s: %s: %q, want %q", c.op, c.raw, e.Kind, e.Message, c.part)
		}
	}
}

func TestDecodeTakes(t *testing.T) {
	cases := []struct {
		op   nucleus.Op
		raw  string
		want any
	}{
		{nucleus.ReadFiles, `{"path":"a/b","offset":null}`, ReadArgs{Path: "a/b"}},
		{nucleus.WriteFiles, `{"path":"x","content":"","mode":"0755"}`, WriteArgs{Path: "x", Mode: "0755"}},
		{nucleus.EditFiles, `{"path":"x","old":"a","new":"","all":true}`, EditArgs{Path: "x", Old: "a", All: true}},
		{nucleus.RunBash, `{"argv":["ls","-l",""]}`, RunArgs{Argv: []string{"ls", "-l", ""}}},
		{nucleus.RunBash, `{"script":"x","timeout_s":86400}`, RunArgs{Script: "x", TimeoutS: 86400}},
		{nucleus.GitPush, `{"branch":"agent/x"}`, PushArgs{Branch: "agent/x"}},
		{nucleus.WebFetch, `{"url":"http://a","headers":{"A":"b"}}`, FetchArgs{URL: "http://a", Headers: map[string]string{"A": "b"}}},
	}
	for _, c := range cases {
		got, err := Decode(c.op, json.RawMessage(c.raw))
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %s: %+v, %v; want %+v", c.op, c.raw, got, err, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, op := range nucleus.Ops() {
		f.Add(string(op), []byte(`{"path":"a","pattern":"b","argv":["c"],"message":"d"}`))
		f.Add(string(op), []byte(`{"path":"a/../b","content":null}`))
	}
	f.Fuzz(func(t *testing.T, op string, raw []byte) {
		args, err := Decode(nucleus.Op(op), raw)
		if err != nil {
			if e := nucleus.AsError(err); e.Kind == nucleus.KindInternal {
				t.Fatalf("%s %q: internal error %v", op, raw, err)
			}
			return
		}
		again, err := json.Marshal(args)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := Decode(nucleus.Op(op), again)
		if err != nil && len(raw) < MaxArgs/8 {
			t.Fatalf("%s %q was taken, its own form %q is not: %v", op, raw, again, err)
		}
		if err == nil {
			if third, _ := json.Marshal(twice); string(third) != string(again) {
				t.Fatalf("%s %q: %q, then %q", op, raw, again, third)
			}
		}
		if action, static, err := ResolveStatic(nucleus.Op(op), raw); err != nil {
			t.Fatalf("%s %q: Decode takes it, ResolveStatic says %v", op, raw, err)
		} else if static && action.Op != nucleus.Op(op) {
			t.Fatalf("%s resolved to %s", op, action.Op)
		}
	})
}

// A schema and the struct behind it must name the same arguments and the same
// required ones.
func TestSchemasMatchStructs(t *testing.T) {
	structs := map[string]any{
		"read_files": ReadArgs{}, "write_files": WriteArgs{}, "edit_files": EditArgs{}, "glob_search": GlobArgs{}, "grep_search": GrepArgs{},
		"bash_output": jobArgs{}, "bash_stop": jobArgs{}, "git_commit": CommitArgs{}, "git_push": PushArgs{}, "create_pr": PRArgs{}, "web_fetch": FetchArgs{},
		"run_bash": RunArgs{}, "spawn_agent": SpawnArgs{}, "manage_pods": PodsArgs{},
	}
	var names []string
	for _, tool := range Describe() {
		names = append(names, tool.Name)
		var schema struct {
			Type                 string
			AdditionalProperties *bool
			Required             []string
			Properties           map[string]json.RawMessage
		}
		if err := json.Unmarshal(tool.InputSchema, &schema); err != nil {
			t.Fatalf("%s: %v in %s", tool.Name, err, tool.InputSchema)
		}
		if schema.Type != "object" || schema.AdditionalProperties == nil || *schema.AdditionalProperties || schema.Required == nil {
			t.Errorf("%s: schema admits more: %s", tool.Name, tool.InputSchema)
		}
		required := map[string]bool{}
		for _, name := range schema.Required {
			required[name] = true
		}
		fields := 1 // "ask", which Continued takes away
		if _, ok := schema.Properties["ask"]; !ok {
			t.Errorf("%s: no \"ask\" in the schema", tool.Name)
		}
		for _, field := range reflect.VisibleFields(reflect.TypeOf(structs[tool.Name])) {
			name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			if field.Anonymous || tool.Name == "run_bash" && (name == "output" || name == "stop") {
				continue // tools of their own for an agent
			}
			fields++
			if _, ok := schema.Properties[name]; !ok {
				t.Errorf("%s: %q is not in the schema", tool.Name, name)
			}
			if required[name] != (options != "omitempty") {
				t.Errorf("%s: %q: required %v in the schema", tool.Name, name, required[name])
			}
		}
		if fields != len(schema.Properties) {
			t.Errorf("%s: %d arguments, %d properties", tool.Name, fields, len(schema.Properties))
		}
	}
	want := "read_files write_files edit_files glob_search grep_search run_bash bash_output bash_stop git_commit git_push create_pr web_fetch spawn_agent manage_pods"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("tools %s, want %s", got, want)
	}
}

func TestOperation(t *testing.T) {
	op, args, err := Operation("bash_stop", json.RawMessage(`{"id":"bash-1"}`))
	if err != nil || op != nucleus.RunBash || string(args) != `{"stop":"bash-1"}` {
		t.Errorf("%s %s %v", op, args, err)
	}
	if _, _, err := Operation("bash_output", nil); err == nil {
		t.Error("bash_output without id was taken")
	}
	if _, _, err := Operation("Bash", json.RawMessage(`{}`)); err == nil {
		t.Error("an unknown tool was taken")
	}
	op, args, err = Operation("read_files", json.RawMessage(`{"path":"x"}`))
	if err != nil || op != nucleus.ReadFiles || string(args) != `{"path":"x"}` {
		t.Errorf("%s %s %v", op, args, err)
	}
}

func TestResolveStatic(t *testing.T) {
	cases := []struct {
		op     nucleus.Op
		raw    string
		static bool
		path   string
	}{
		{nucleus.ReadFiles, `{"path":"./a//b"}`, true, "a/b"},
		{nucleus.ReadFiles, `{"path":"/home/agent/workspace/a"}`, false, ""},
		{nucleus.GlobSearch, `{"pattern":"*"}`, true, "."},
		{nucleus.GrepSearch, `{"pattern":"a","path":"x"}`, true, "x"},
		{nucleus.RunBash, `{"output":"a"}`, true, ""},
		{nucleus.RunBash, `{"argv":["a"]}`, false, ""},
		{nucleus.WriteFiles, `{"path":"a","content":""}`, false, ""},
		{nucleus.GitCommit, `{"message":"m","repo":"r"}`, false, ""},
		{nucleus.WebFetch, `{"url":"x"}`, false, ""},
	}
	for _, c := range cases {
		action, static, err := ResolveStatic(c.op, json.RawMessage(c.raw))
		if err != nil || static != c.static {
			t.Errorf("%s %s: %v, %v", c.op, c.raw, static, err)
			continue
		}
		if c.path != "" && (len(action.Files) != 1 || action.Files[0] != nucleus.File{Path: c.path}) {
			t.Errorf("%s %s: files %v", c.op, c.raw, action.Files)
		}
	}
}

func TestContinued(t *testing.T) {
	for _, c := range []struct{ args, ask, rest string }{
		{`{"path":"a"}`, "", `{"path":"a"}`},
		{`{"path":"a","ask":"a-1"}`, "a-1", `{"path":"a"}`},
		{`{"ask":"a-1"}`, "a-1", `{}`},
		{``, "", ``},
		{`[1]`, "", `[1]`},
		{`{"path":"ask"}`, "", `{"path":"ask"}`},
	} {
		if ask, rest, err := Continued(json.RawMessage(c.args)); err != nil || ask != c.ask || string(rest) != c.rest {
			t.Errorf("%s: %q, %s, %v; want %q, %s", c.args, ask, rest, err, c.ask, c.rest)
		}
	}
	for _, bad := range []string{`{"ask":1}`, `{"ask":"a","ask":"b"}`, `{"path":"a","path":"b","ask":"a-1"}`} {
		if ask, rest, err := Continued(json.RawMessage(bad)); err == nil {
			t.Errorf("%s: taken as %q, %s", bad, ask, rest)
		}
	}
}
