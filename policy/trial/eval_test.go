package trial

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"cal/nucleus"
	"cal/policy"
)

// evaluator knows the profiles, and resolves URLs as far as these tests need it.
func evaluator() *Evaluator {
	return &Evaluator{UnixMilli: 1_800_000_000_000, Policy: policy.Profile, Fetch: func(method, text string) (nucleus.Fetch, error) {
		u, err := url.Parse(text)
		if err != nil || u.Host == "" || u.User != nil {
			return nucleus.Fetch{}, fmt.Errorf("URL %q is none", text)
		}
		port, err := strconv.Atoi(u.Port())
		if err != nil {
			port = 443
		}
		if method == "" {
			method = "GET"
		}
		return nucleus.Fetch{Method: method, URL: text, Host: u.Hostname(), Port: port, Path: u.EscapedPath()}, nil
	}}
}

func TestLineRefuses(t *testing.T) {
	for _, c := range []struct{ line, want string }{
		{``, "ends too early"},
		{`{"policy": "default", "session": []} x`, "data after the value"},
		{`{"policy": "default", "policy": "permissive", "session": []}`, `duplicate key "policy"`},
		{`{"Policy": "default", "session": []}`, `the line has the unknown key "Policy"; want {"policy"`},
		{`{"policy": "default", "session": [], "now": 1}`, `the line has the unknown key "now"`},
		{`[]`, `the line is no object`},
		{`null`, `the line is no object`},
		{`{"session": []}`, `policy is missing`},
		{`{"policy": 1, "session": []}`, `policy is missing`},
		{`{"policy": null, "session": []}`, `policy is missing`},
		{`{"policy": "lax", "session": []}`, `unknown profile "lax"`},
		{`{"policy": {"operations": {"execute": "always"}}, "session": []}`, `policy:1: unknown operation "execute"`},
		{`{"policy": {"budget": {"usd": -1}}, "session": []}`, `policy:1: budget.usd is the number -1`},
		{`{"policy": "default"}`, `session is missing`},
		{`{"policy": "default", "session": null}`, `session is missing`},
		{`{"policy": "default", "session": {}}`, `session is missing or no list`},
		{`{"policy": "default", "session": [1]}`, `session[0]: is no object`},
		{`{"policy": "default", "session": [{}]}`, `session[0]: has no op`},
		{`{"policy": "default", "session": [{"op": 1}]}`, `session[0]: has no op, or one that is no string`},
		{`{"policy": "default", "session": [{"op": "git_push"}, {"op": "execute"}]}`, `session[1]: has the unknown operation "execute"; want one of read_files`},
		{`{"policy": "default", "session": [{"op": "READ_FILES", "path": "a"}]}`, `unknown operation "READ_FILES"`},
		{`{"policy": "default", "session": [{"op": "read_files", "file": "a"}]}`, `has the unknown argument "file" of read_files; want op, repo, path`},
		{`{"policy": "default", "session": [{"op": "read_files", "Path": "a"}]}`, `unknown argument "Path"`},
		{`{"policy": "default", "session": [{"op": "read_files", "path": 1}]}`, `has the argument "path" of read_files as a JSON number, want string`},
		{`{"policy": "default", "session": [{"op": "run_bash", "argv": "git push"}]}`, `argument "argv" of run_bash as a JSON string`},
		{`{"policy": "default", "session": [{"op": "net_connect", "host": "a.b", "port": "443"}]}`, `argument "port" of net_connect as a JSON string, want int`},
		{`{"policy": "default", "session": [{"op": "net_connect", "host": "a.b", "port": 1.5}]}`, `has the argument "port" of net_connect as a JSON number 1.5, want int`},
		{`{"policy": "default", "session": [{"op": "read_files", "path": "a", "repo": "evil"}]}`, `repo is "evil"; want "untrusted" or "trusted"`},
		{`{"policy": "default", "session": [{"op": "read_files", "path": "a", "repo": true}]}`, `repo is true; want`},
		{`{"policy": "default", "session": ` + strings.Repeat("[", 1000) + `}`, "nested deeper than 64"},
		{`{"policy": "default", "session": [` + strings.Repeat("{},", MaxSteps) + `{}]}`, "session has 100001 steps; at most 100000"},
		{strings.Repeat(" ", MaxLine+1), "the line has 4194305 bytes; at most 4194304"},
	} {
		out, err := evaluator().Line([]byte(c.line))
		if out != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.100s:\n got %s, %v\nwant %s", c.line, out, err, c.want)
		}
	}
}

// short writes decisions as "verdict rule legs".
func short(t *testing.T, out []byte) []string {
	t.Helper()
	var a answer
	if err := json.Unmarshal(out, &a); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, d := range a.Decisions {
		all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s %s", d.Decision, d.Rule, strings.Join(d.Legs, "+"))))
	}
	return all
}

const trialled = `{"operations": {"read_files": "always", "write_files": "always", "grep_search": "always", "run_bash": "always", "web_fetch": "always", "net_connect": "ask",
  "git_commit": "always", "git_push": "always", "web_search": "always"},
 "paths": {"roots": {"only": ["app"]}, "blocked": ["**/.env*"]},
 "commands": {"only": [["git", "status"], ["bash", "-c", "make all"]]},
 "hosts": {"only": [{"host": "docs.example", "port": 443}, {"host": "api.example", "port": 443, "methods": ["GET"], "path": "/v1/**", "trusted": true}]}}`

// Each session is told in steps; what is denied exposes nothing, an ask counts as
// granted.
func TestSessions(t *testing.T) {
	for _, c := range []struct {
		name, policy, session string
		want                  []string
	}{
		{"a denial takes no leg", trialled, `{"op":"read_files","path":"other/x"},{"op":"read_files","path":"app/.env"},{"op":"read_files","path":"../x"},{"op":"read_files","path":"/etc/passwd"}`,
			[]string{"deny paths.roots", "deny paths.blocked", "deny paths", "deny paths"}},
		{"a path is cleaned", trialled, `{"op":"read_files","path":"./app//x"},{"op":"read_files","path":"app/../.env"},{"op":"grep_search","pattern":"x"}`,
			[]string{"allow operations.read_files private", "deny paths.roots private", "deny paths.roots private"}},
		{"an ask exposes", trialled, `{"op":"net_connect","host":"docs.example","port":443},{"op":"read_files","path":"app/x"},{"op":"git_push"}`,
			[]string{"ask operations.net_connect untrusted+way_out", "allow operations.read_files private+untrusted+way_out", "ask trifecta private+untrusted+way_out"}},
		{"a connection is untrusted before it is judged", `{"operations":{"read_files":"always","net_connect":"always"},"hosts":{"only":[{"host":"a.b","port":1}]}}`,
			`{"op":"net_connect","host":"A.b","port":1},{"op":"read_files","path":"x"},{"op":"net_connect","host":"a.b","port":1}`,
			[]string{"allow hosts[0] untrusted+way_out", "allow operations.read_files private+untrusted+way_out", "ask trifecta private+untrusted+way_out"}},
		{"a trusted rule counts on no leg", trialled, `{"op":"read_files","path":"app/x","repo":"untrusted"},{"op":"web_fetch","url":"https://api.example/v1/x"},{"op":"web_fetch","url":"https://docs.example/"}`,
			[]string{"allow operations.read_files private+untrusted", "allow hosts[0] private+untrusted", "ask trifecta private+untrusted+way_out"}},
		{"the label is that of the step", trialled, `{"op":"write_files","path":"app/x"},{"op":"write_files","path":"app/x","content":"y","repo":"trusted"},{"op":"write_files","path":"app/x","repo":"untrusted"}`,
			[]string{"allow operations.write_files", "allow operations.write_files", "allow operations.write_files untrusted"}},
		{"repo of a git operation", trialled, `{"op":"git_commit","message":"m","repo":"app"},{"op":"git_commit","message":"m","repo":"other"},{"op":"git_commit","message":"m","paths":["app/x"]},{"op":"git_commit","message":"m","repo":"app","paths":["other/x"]},{"op":"git_push","branch":"b","repo":"untrusted"}`,
			[]string{"allow operations.git_commit", "deny paths.roots", "allow operations.git_commit", "deny paths.roots", "ask nu way_out"}},
		{"commands", trialled, `{"op":"run_bash","argv":["git","status"],"dir":"app"},{"op":"run_bash","argv":["git","push"],"dir":"app"},{"op":"run_bash","script":"make all","dir":"app"},{"op":"run_bash","script":"make all; x","dir":"app"},{"op":"run_bash","argv":["git","status"]},{"op":"run_bash","output":"j1"}`,
			[]string{"allow commands[1] private", "deny commands private", "allow commands[0] private", "deny commands private", "deny paths.roots private", "allow operations.run_bash private"}},
		{"what stands for nothing", trialled, `{"op":"run_bash"},{"op":"run_bash","argv":["a"],"script":"b"},{"op":"read_files"},{"op":"web_fetch","url":"https://u@docs.example/"},{"op":"web_fetch","url":"x"},{"op":"net_connect"},{"op":"create_pr"}`,
			[]string{"deny resolve", "deny resolve", "deny resolve", "deny resolve", "deny resolve", "deny hosts", "deny operations.create_pr"}},
		{"attacks on names", trialled, "{\"op\":\"net_connect\",\"host\":\"evil\\u0000.docs.example\",\"port\":443},{\"op\":\"net_connect\",\"host\":\"docs.example.\",\"port\":443},{\"op\":\"net_connect\",\"host\":\"docs.example\",\"port\":65979}",
			[]string{"deny hosts", "deny hosts", "deny hosts"}},
		{"operations without a tool", trialled, `{"op":"web_search","query":"x"},{"op":"manage_pods"},{"op":"spawn_agent","repo":"untrusted"}`,
			[]string{"allow operations.web_search untrusted", "deny operations.manage_pods untrusted", "deny operations.spawn_agent untrusted"}},
		{"delegation", "{\"operations\":{\"spawn_agent\":\"always\",\"manage_pods\":\"ask\",\"read_files\":\"always\"}}",
			`{"op":"spawn_agent","task":"t"},{"op":"spawn_agent","task":"t","policy":{"operations":{"git_push":"always"}},"wait_s":3,"repo":"untrusted"},{"op":"spawn_agent","policy":7},{"op":"manage_pods","action":"create","policy":"default"},{"op":"manage_pods","action":"list"},{"op":"manage_pods","action":"call","pod":"p-x"},{"op":"manage_pods"}`,
			[]string{"allow operations.spawn_agent", "allow operations.spawn_agent", "deny resolve", "ask operations.manage_pods", "ask operations.manage_pods", "deny resolve", "deny resolve"}},
		{"nothing is allowed by nothing", `{}`, `{"op":"read_files","path":"a"},{"op":"run_bash","argv":["a"]},{"op":"git_push"}`,
			[]string{"deny operations.read_files", "deny operations.run_bash", "deny operations.git_push"}},
		{"a window that is over", `{"operations":{"read_files":"always"},"window":{"until":"2026-01-01T00:00:00Z"}}`, `{"op":"read_files","path":"a"}`, []string{"deny window"}},
		{"a window that is open", `{"operations":{"read_files":"always"},"window":{"from":"2026-01-01T00:00:00Z","until":"2099-01-01T00:00:00Z"}}`, `{"op":"read_files","path":"a"}`, []string{"allow operations.read_files private"}},
	} {
		out, err := evaluator().Line([]byte(`{"policy": ` + c.policy + `, "session": [` + c.session + `]}`))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := short(t, out); strings.Join(got, "\n") != strings.Join(c.want, "\n") {
			t.Errorf("%s:\n got %q\nwant %q", c.name, got, c.want)
		}
	}
}

// Any line is refused, or answered step by step with legs that only grow and a
// denial that takes none.
func FuzzLine(f *testing.F) {
	f.Add([]byte(`{"policy":"default","session":[{"op":"read_files","path":"a"},{"op":"web_fetch","url":"https://x/"}]}`))
	f.Add([]byte(`{"policy":{"operations":{"net_connect":"always"},"hosts":"any"},"session":[{"op":"net_connect","host":"x","port":1,"repo":"untrusted"}]}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		out, err := evaluator().Line(line)
		if err != nil {
			return
		}
		var sent struct{ Session []json.RawMessage }
		var a answer
		if err := errors.Join(json.Unmarshal(line, &sent), json.Unmarshal(out, &a)); err != nil || len(a.Decisions) != len(sent.Session) {
			t.Fatalf("%s: %s, %v", line, out, err)
		}
		var before nucleus.Legs
		for i, d := range a.Decisions {
			now, err := nucleus.LegsOf(d.Legs)
			if err != nil || !now.Has(before) || d.Rule == "" || d.Decision == nucleus.Deny && now != before {
				t.Fatalf("%s: step %d of %s", line, i, out)
			}
			before = now
		}
	})
}
