package workspace

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cal/internal/durable"
	"cal/nucleus"
	"cal/workspace/agents"
)

// person gives the test a HOME and a CAL_HOME of its own.
func person(t *testing.T) (Home, string) {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", filepath.Join(base, "home"))
	t.Setenv("CAL_HOME", filepath.Join(base, "cal"))
	t.Setenv("GIT_CONFIG_NOSYSTEM", "1")
	t.Setenv("PATH", "/usr/bin:/bin")
	write(t, filepath.Join(base, "home", ".gitconfig"), "[user]\n\tname = Ada\n\temail = ada@example.org\n")
	h, err := OpenHome()
	if err != nil {
		t.Fatal(err)
	}
	return h, base
}

func repository(t *testing.T, dir string) (base string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	gitIn(t, dir, "init", "--quiet", "-b", "main")
	write(t, filepath.Join(dir, "AGENTS.md"), "be kind\n")
	gitIn(t, dir, "add", "-A")
	gitIn(t, dir, "commit", "--quiet", "-m", "first")
	return gitIn(t, dir, "rev-parse", "HEAD")
}

func TestPlan(t *testing.T) {
	h, base := person(t)
	dir := filepath.Join(base, "my app")
	commit := repository(t, dir)
	env := filepath.Join(base, "env")
	write(t, env, "# comment\n\nA=1\nB = x=y\nC=\n")
	if _, err := h.Plan(t.Context(), RunOptions{EnvFile: env}); err == nil || !strings.Contains(err.Error(), env+":4: want NAME=VALUE") {
		t.Errorf("a name with a space: %v", err)
	}
	write(t, env, "# comment\n\nA=1\nB=x=y\nC=\n")
	p, err := h.Plan(t.Context(), RunOptions{Repo: filepath.Join(dir), EnvFile: env, CPU: 2, MemoryMB: 512, Pids: 100})
	if err != nil {
		t.Fatal(err)
	}
	spec := p.Spec
	if spec.Env["A"] != "1" || spec.Env["B"] != "x=y" || spec.Env["C"] != "" || spec.Workspace != "my-app" || spec.Mode != nucleus.Mediated ||
		string(spec.Policy) != `"default"` || spec.Resources != (nucleus.Resources{CPU: 2, MemoryMB: 512, Pids: 100}) ||
		spec.Identity != (nucleus.Identity{Name: "Ada", Email: "ada@example.org"}) || spec.Agent != nil || spec.Model != nil {
		t.Errorf("spec %+v", spec)
	}
	if len(spec.Repos) != 1 || spec.Repos[0] != (nucleus.Repo{Name: "my-app", Path: dir, Branch: "agent/work", Base: commit}) {
		t.Errorf("repositories %+v", spec.Repos)
	}
	if string(p.Files["my-app/AGENTS.md"]) != "be kind\n" || p.Dir != "my-app" || len(p.Notes) > 0 {
		t.Errorf("files %q, dir %q, notes %q", p.Files, p.Dir, p.Notes)
	}
	if got := p.HandedOver(); !strings.Contains(got, "A, B, C") || strings.Contains(got, "x=y") {
		t.Errorf("handed over: %q", got)
	}
	if entries, _ := os.ReadDir(filepath.Join(h.Dir, "isolation")); len(entries) > 0 {
		t.Errorf("planning made %v", entries)
	}
	// What is not committed is counted, not handed over; what the repository says about itself is not followed.
	write(t, filepath.Join(dir, "AGENTS.md"), "changed\n")
	write(t, filepath.Join(dir, "new\nline"), "")
	gitIn(t, dir, "rm", "--quiet", "--cached", "AGENTS.md")
	if err := errors.Join(os.Remove(filepath.Join(dir, "AGENTS.md")), os.Symlink("/etc/passwd", filepath.Join(dir, "AGENTS.md"))); err != nil {
		t.Fatal(err)
	}
	if p, err = h.Plan(t.Context(), RunOptions{Repo: dir}); err != nil || len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "stays here: 3 changed or new files") {
		t.Errorf("notes %q, %v", p.Notes, err)
	}
	gitIn(t, dir, "add", "-A")
	gitIn(t, dir, "commit", "--quiet", "-m", "a link")
	if p, err = h.Plan(t.Context(), RunOptions{Repo: dir}); err != nil || len(p.Files) > 0 {
		t.Errorf("a link was followed: %q, %v", p.Files, err)
	}
}

func TestPlanAgent(t *testing.T) {
	h, base := person(t)
	dir := filepath.Join(base, "app")
	repository(t, dir)
	write(t, filepath.Join(h.Dir, "agents", "mine.yaml"), "program: /bin/true\nargs: [\"{prompt}\"]\nmodel: anthropic\n")
	o := RunOptions{Repo: dir, Agent: "mine", Prompt: "x", Trust: true}
	for _, name := range []string{"ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_BASE_URL"} {
		t.Setenv(name, "")
	}
	var missing *agents.Missing
	if _, err := h.Plan(t.Context(), o); !errors.As(err, &missing) || !strings.Contains(missing.Hint, "ANTHROPIC_API_KEY") {
		t.Errorf("without a key: %v", err)
	}
	t.Setenv("CLAUDE_CODE_OAUTH_TOKEN", "the-secret")
	t.Setenv("ANTHROPIC_BASE_URL", "https://user:pass@model.example/x/")
	write(t, filepath.Join(dir, ".cal/policy.yaml"), "operations: {read_files: always}\n")
	gitIn(t, dir, "add", "-A")
	gitIn(t, dir, "commit", "--quiet", "-m", "policy")
	p, err := h.Plan(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !*p.Spec.Repos[0].Trusted || p.Spec.Repos[0].Branch != "agent/mine" || p.Spec.Model.Key != "the-secret" || !p.Spec.Model.Bearer {
		t.Errorf("%+v %+v", p.Spec.Repos, p.Spec.Model)
	}
	pod := nucleus.PodStatus{Driver: "gvisor", Tier: nucleus.TierKernel, Mode: nucleus.Mediated, Environments: []string{"host", "go"},
		Repos: []nucleus.RepoStatus{{Trusted: false, Why: "remote \x1b[2Jhost is not in trusted_origins"}}}
	pod.Budget = &nucleus.Budget{USD: nucleus.Spending{Limit: new(5.0), Left: new(5.0)}, Seconds: nucleus.Spending{Limit: new(3600.0), Left: new(3600.0)}}
	got := p.Confirmation(pod, "same user")
	for _, want := range []string{
		"workspace    app\n", "machine      not running; gvisor starts it\n", "environments host, go\n", "agent        mine", "branch       agent/mine\n",
		`label        untrusted: remote \x1b[2Jhost is not in trusted_origins` + "\n", "policy       default, tightened by the repository's .cal/policy.yaml\n",
		"budget       5.00 USD, 3600 seconds\n", "mode         Safe Mode\n", "tier         kernel\n", "approvals    same user\n", "model at https://model.example/x; its key, from CLAUDE_CODE_OAUTH_TOKEN, stays on the host\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, secret := range []string{"the-secret", "pass", "\x1b"} {
		if strings.Contains(got, secret) {
			t.Errorf("%q is shown:\n%s", secret, got)
		}
	}
}

// TestPlanGoesOn: a workspace keeps its branch, and says when HEAD has moved.
func TestPlanGoesOn(t *testing.T) {
	h, base := person(t)
	dir := filepath.Join(base, "app")
	commit := repository(t, dir)
	store := func(file string, s nucleus.RepoRecord) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), durable.Store(file, s)); err != nil {
			t.Fatal(err)
		}
	}
	record := filepath.Join(h.Workspace("app"), "repos", "app.json")
	store(record, nucleus.RepoRecord{Path: dir, Branch: "agent/first", Base: commit, Head: commit, Quarantine: "app.work/1.git"})
	gitIn(t, dir, "commit", "--quiet", "--allow-empty", "-m", "more")
	p, err := h.Plan(t.Context(), RunOptions{Repo: dir})
	if err != nil || p.Spec.Repos[0].Branch != "agent/first" || len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "goes on from "+commit[:12]) {
		t.Errorf("%+v, %q, %v", p.Spec.Repos, p.Notes, err)
	}
	if got := p.Confirmation(nucleus.PodStatus{}, ""); !strings.Contains(got, "app, goes on at "+commit[:12]) || !strings.Contains(got, dir+" at "+commit[:12]) {
		t.Errorf("it says\n%s", got)
	}
	if _, err := h.Plan(t.Context(), RunOptions{Repo: dir, Branch: "other"}); err == nil || !strings.Contains(err.Error(), "works on branch agent/first") {
		t.Errorf("another branch: %v", err)
	}
	if _, err := h.Work(t.Context(), dir, ""); err != nil {
		t.Error(err)
	}
	// A hand-over that was cut off counts for nothing.
	store(record, nucleus.RepoRecord{Path: dir, Branch: "agent/first", Base: commit, Pending: true})
	if p, err = h.Plan(t.Context(), RunOptions{Repo: dir}); err != nil || p.Spec.Repos[0].Branch != "agent/work" || p.Spec.Workspace != "app" {
		t.Errorf("%+v, %v", p.Spec, err)
	}
	// Another repository of the same name gets a workspace of its own.
	store(record, nucleus.RepoRecord{Path: dir, Branch: "agent/first", Base: commit})
	other := filepath.Join(base, "elsewhere", "app")
	repository(t, other)
	if p, err = h.Plan(t.Context(), RunOptions{Repo: other}); err != nil || p.Spec.Workspace != "app-2" {
		t.Errorf("workspace %q, %v", p.Spec.Workspace, err)
	}
	if _, err := h.Work(t.Context(), dir, ""); err == nil || !strings.Contains(err.Error(), "nothing has come back") {
		t.Errorf("before anything came back: %v", err)
	}
	store(filepath.Join(h.Workspace("second"), "repos", "app.json"), nucleus.RepoRecord{Path: dir, Head: commit, Quarantine: "app.work/1.git"})
	if _, err := h.Work(t.Context(), dir, ""); err == nil || !strings.Contains(err.Error(), "--workspace") {
		t.Errorf("two workspaces: %v", err)
	}
	if w, err := h.Work(t.Context(), dir, "second"); err != nil || w.Workspace != "second" {
		t.Errorf("%+v, %v", w, err)
	}
}

func TestRepoName(t *testing.T) {
	for path, want := range map[string]string{
		"/a/app": "app", "/a/My.App_1-x": "My.App_1-x", "/a/a b": "a-b", "/a/.hidden": "hidden", "/a/--x": "x", "/a/bare.git": "bare.git",
		"/a/\u65e5\u672c": "repo", "/a/\u00fcber": "ber", "/": "repo", "/a/" + strings.Repeat("x", 200): strings.Repeat("x", 60), "/a/a\nb": "a-b",
	} {
		if got := RepoName(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

func TestPolicyNames(t *testing.T) {
	h, base := person(t)
	write(t, filepath.Join(h.Dir, "policies", "mine.yaml"), "name: mine\noperations: {read_files: always}\n")
	write(t, filepath.Join(base, "p.yaml"), "name: file\noperations: {execute: always}\n")
	for name, want := range map[string]string{"": `"default"`, "local-dev": `"local-dev"`, "mine": `"name":"mine"`} {
		if got, err := h.policyOf(name); err != nil || !strings.Contains(string(got), want) {
			t.Errorf("%q: %s, %v", name, got, err)
		}
	}
	for name, want := range map[string]string{"lax": "neither a profile", "../mine": "neither a profile", filepath.Join(base, "p.yaml"): "execute"} {
		if got, err := h.policyOf(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %s, %v; want %q", name, got, err, want)
		}
	}
}

func TestBanner(t *testing.T) {
	pod := nucleus.PodStatus{ID: "p-1", Workspace: "app", Agent: "codex", Mode: nucleus.Mediated, Tier: nucleus.TierKernel, Driver: "gvisor", Environments: []string{"host", "go"}}
	if got, want := Banner(pod), "\U0001F512 CAL ISOLATION ACTIVE | app | codex | host, go | Safe Mode | tier kernel (gvisor)"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	pod.Workspace, pod.Agent = "", ""
	for mode, want := range map[nucleus.Mode][2]string{
		nucleus.Mediated:  {"Safe Mode", "mediated, network by policy"},
		nucleus.Contained: {"contained, no network", "contained, network by policy"},
	} {
		for i, network := range []bool{false, true} {
			pod.Mode, pod.Network = mode, network
			if got := Banner(pod); !strings.Contains(got, "ACTIVE | p-1 | host, go | "+want[i]+" | tier") {
				t.Errorf("%s, network %v: %s", mode, network, got)
			}
		}
	}
}

func TestShown(t *testing.T) {
	for text, want := range map[string]string{
		"plain \u00fc \u65e5 \U0001F512": "plain \u00fc \u65e5 \U0001F512", "a\x1b[2Jb": `a\x1b[2Jb`, "a\nb\tc\r": `a\nb\tc\r`,
		"a\u202eb": `a\u202eb`, "a\u200bb": `a\u200bb`, "a\xffb": `a\ufffdb`, "\x9b2J": `\ufffd2J`, "\u009b2J": `\u009b2J`,
	} {
		if got := Shown(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
