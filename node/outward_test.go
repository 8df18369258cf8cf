package node

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"cal/guest"
	"cal/guest/tools"
	"cal/internal/git"
	"cal/nucleus"
	"cal/wire"
)

// pushes is a policy under which a push needs nobody: without a way in there are not
// three legs.
var pushes = policyOf("read_files write_files git_push create_pr")

func pushTo(branch string) map[string]string { return map[string]string{"branch": branch} }

// What the machine committed reaches the remote of the host's record, and no other:
// what the machine calls origin is its own affair.
func TestPush(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("w", pushes), nil)
	m := h.inside(p)
	elsewhere := filepath.Join(t.TempDir(), "elsewhere.git")
	person.git(person.Dir, "init", "--quiet", "--bare", elsewhere)
	for _, args := range [][]string{
		{"remote", "add", "origin", elsewhere}, {"config", "remote.origin.pushurl", elsewhere}, {"config", "url." + elsewhere + ".insteadOf", person.Remote},
	} {
		if _, err := m.git("app", args...); err != nil {
			t.Fatal(err)
		}
	}
	want := m.commit("new.txt", "by the agent\n")
	main := person.at("main")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	if got := person.at("agent/work"); got != want {
		t.Errorf("the remote has %q, want %s", got, want)
	}
	if person.at("main") != main {
		t.Error("main moved")
	}
	if out := person.git(elsewhere, "for-each-ref"); out != "" {
		t.Errorf("elsewhere has %s", out)
	}
	if out := person.git(person.Dir, "for-each-ref", "refs/heads"); strings.Contains(out, "agent/work") {
		t.Errorf("the person's own repository has %s", out)
	}
	// And a second one, of what came after.
	want = m.commit("more.txt", "more\n")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	if got := person.at("agent/work"); got != want {
		t.Errorf("the remote has %q, want %s", got, want)
	}
	intents := h.entries(nucleus.KindIntent, nucleus.GitPush)
	if len(intents) != 2 || !strings.Contains(string(intents[1].Args), want) || !strings.Contains(string(intents[1].Args), person.Remote) {
		t.Errorf("intents %+v", intents)
	}
}

// Pushes and fetches that end at once all stand on record: a branch whose place on the remote
// was forgotten could not be pushed again, and a fetch that was would be lost.
func TestRecordOfARepositoryAtOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(newPersonRepo(t).spec("w", pushes), nil)
	const pushed = 50
	var ends sync.WaitGroup
	for i := range pushed {
		ends.Go(func() {
			if err := p.changeRepo("app", func(s *nucleus.RepoRecord) { s.Heads[fmt.Sprint("b", i)] = "x" }); err != nil {
				t.Error(err)
			}
		})
	}
	ends.Wait()
	stored, err := p.readRepo("app")
	if err != nil {
		t.Fatal(err)
	}
	for i := range pushed {
		if name := fmt.Sprint("b", i); stored.Heads[name] != "x" {
			t.Errorf("branch %s was forgotten", name)
		}
	}
}

// A push that took place is done, even where the host cannot write down where the branch
// stands now.
func TestPushNotNoted(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("w", pushes), nil)
	want := h.inside(p).commit("new.txt", "x\n")
	// The remote's hook runs when the branch has moved.
	hook := filepath.Join(person.Remote, "hooks", "post-receive")
	if err := os.MkdirAll(filepath.Dir(hook), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(hook, fmt.Appendf(nil, "#!/bin/sh\necho none >'%s'\n", p.repoFile("app")), 0o755); err != nil {
		t.Fatal(err)
	}
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	if got := person.at("agent/work"); got != want {
		t.Errorf("the remote has %q, want %s", got, want)
	}
	if _, err := p.readRepo("app"); err == nil {
		t.Error("the record can be read: the hook did not run")
	}
	outcomes := h.entries(nucleus.KindOutcome, nucleus.GitPush)
	if len(outcomes) != 1 || outcomes[0].Status != nucleus.OutcomeDone {
		t.Errorf("outcomes %+v", outcomes)
	}
}

// The first push of a repository whose remote was never fetched.
func TestFirstPush(t *testing.T) {
	h := newHost(t)
	person := newPersonRepo(t)
	person.git(person.Dir, "update-ref", "-d", "refs/remotes/origin/main")
	p := h.pod(person.spec("", pushes), nil)
	want := h.inside(p).commit("new.txt", "x\n")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	if got := person.at("agent/work"); got != want {
		t.Errorf("the remote has %q, want %s", got, want)
	}
}

// No name of a branch is anything but a branch.
func TestBranchNames(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("", pushes), nil)
	h.inside(p).commit("new.txt", "x\n")
	before := person.git(person.Remote, "for-each-ref")
	for _, name := range []string{
		"", "HEAD:main", "main:refs/heads/other", "..", "a..b", "refs/heads/../..", "../main", "/main", "main/", "a//b", "a b", "a\nb", "a\x00b", "a~1", "a^", "a?", "a*", "a[b", "a\\b",
		"@{-1}", "x.lock", ".x", "a/.b", "a@{b", "+main", "--all", "-x", "--delete", strings.Repeat("a", 5000),
	} {
		a := h.tool(p, nucleus.GitPush, pushTo(name))
		if a.Error == nil {
			t.Errorf("branch %q: %v", name, a)
		}
	}
	for _, repo := range []string{"other", "../app", "app/../app", "/", "app.git"} {
		a := h.tool(p, nucleus.GitPush, map[string]string{"branch": "agent/work", "repo": repo})
		if a.Error == nil || a.Error.Kind != nucleus.KindNotFound && a.Error.Kind != nucleus.KindInvalid {
			t.Errorf("repo %q: %v", repo, a)
		}
	}
	if after := person.git(person.Remote, "for-each-ref"); after != before {
		t.Errorf("the remote moved:\n%s\n%s", before, after)
	}
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
}

// Whatever a machine sends for a branch: it is that branch, whole and sound, or it is
// refused.
func TestHostileBundle(t *testing.T) {
	t.Parallel()
	answer := func(stream *wire.Stream, r tools.BundleResult) {
		value, _ := json.Marshal(r)
		stream.SendJSON(wire.FrameResult, tools.Result{Value: value})
	}
	const ref = "refs/heads/agent/work"
	// build makes a bundle in the machine by its own git.
	build := func(m *inside, args ...string) []byte {
		file := m.dir("app") + ".hostile"
		defer os.Remove(file)
		if _, err := m.git("app", append([]string{"bundle", "create", "--quiet", file}, args...)...); err != nil {
			m.host.t.Error(err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			m.host.t.Error(err)
		}
		return data
	}
	for name, send := range map[string]func(m *inside, stream *wire.Stream){
		"nothing":               func(*inside, *wire.Stream) {},
		"no result":             func(_ *inside, s *wire.Stream) { sendBundle(s, []byte("x")) },
		"garbage":               func(_ *inside, s *wire.Stream) { sendBundle(s, []byte("garbage")); answer(s, tools.BundleResult{}) },
		"empty":                 func(_ *inside, s *wire.Stream) { answer(s, tools.BundleResult{}) },
		"another frame":         func(_ *inside, s *wire.Stream) { s.Send(wire.FrameStdout, []byte("x")) },
		"a result that is none": func(_ *inside, s *wire.Stream) { s.Send(wire.FrameResult, []byte("{")) },
		"half a bundle": func(m *inside, s *wire.Stream) {
			data := build(m, ref)
			sendBundle(s, data[:len(data)/2])
			answer(s, tools.BundleResult{Ref: ref})
		},
		"a changed byte": func(m *inside, s *wire.Stream) {
			data := build(m, ref)
			data[len(data)-30] ^= 1
			sendBundle(s, data)
			answer(s, tools.BundleResult{Ref: ref})
		},
		"another branch": func(m *inside, s *wire.Stream) {
			m.git("app", "branch", "-f", "other")
			sendBundle(s, build(m, "refs/heads/other"))
			answer(s, tools.BundleResult{Ref: ref})
		},
		"missing what it builds on": func(m *inside, s *wire.Stream) {
			sendBundle(s, build(m, ref, "^refs/heads/agent/work~1"))
			answer(s, tools.BundleResult{Ref: ref})
		},
		"an object that fsck refuses": func(m *inside, s *wire.Stream) {
			bad := "tree " + gitMust(m, "rev-parse", "HEAD^{tree}") + "\nauthor A <a@b> 1 +0000\ncommitter nobody\n\nbad\n"
			file := m.dir("app") + ".object"
			defer os.Remove(file)
			os.WriteFile(file, []byte(bad), 0o644)
			id := gitMust(m, "hash-object", "-t", "commit", "-w", "--literally", file)
			gitMust(m, "update-ref", ref, id)
			sendBundle(s, build(m, ref))
			answer(s, tools.BundleResult{Ref: ref, Commit: id})
		},
		"a .git in a tree": func(m *inside, s *wire.Stream) {
			blob := gitMust(m, "hash-object", "-w", "new.txt")
			file := m.dir("app") + ".tree"
			defer os.Remove(file)
			raw := []byte("100644 .git\x00")
			for i := 0; i < 40; i += 2 {
				raw = append(raw, unhex(blob[i])<<4|unhex(blob[i+1]))
			}
			os.WriteFile(file, raw, 0o644)
			tree := gitMust(m, "hash-object", "-t", "tree", "-w", "--literally", file)
			id := gitMust(m, "commit-tree", "-m", "bad", "-p", "HEAD", tree)
			gitMust(m, "update-ref", ref, id)
			sendBundle(s, build(m, ref))
			answer(s, tools.BundleResult{Ref: ref, Commit: id})
		},
		"a tag": func(m *inside, s *wire.Stream) {
			tree := gitMust(m, "rev-parse", "HEAD^{tree}")
			gitMust(m, "tag", "-f", "thing", tree)
			sendBundle(s, build(m, "refs/tags/thing"))
			answer(s, tools.BundleResult{Ref: ref, Commit: tree})
		},
		"a link to a commit that nobody has": func(_ *inside, s *wire.Stream) {
			answer(s, tools.BundleResult{Ref: ref, Empty: true, Commit: strings.Repeat("1", 40)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			person := newPersonRepo(t)
			p := h.pod(person.spec("", pushes), nil)
			m := h.inside(p)
			m.commit("new.txt", "x\n")
			m.commit("more.txt", "x\n")
			h.mu.Lock()
			h.repo = func(m *inside, stream *wire.Stream, call guest.RepoCall) bool {
				send(m, stream)
				return true
			}
			h.mu.Unlock()
			a := h.tool(p, nucleus.GitPush, pushTo("agent/work"))
			if a.Error == nil {
				t.Errorf("pushed: %v", a)
			}
			if got := person.at("agent/work"); got != "" {
				t.Errorf("the remote has %s", got)
			}
			if left, _ := filepath.Glob(filepath.Join(p.dir, "bundle-*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func gitMust(m *inside, args ...string) string {
	out, err := m.git("app", args...)
	if err != nil {
		m.host.t.Error(err)
	}
	return out
}

func unhex(c byte) byte {
	if c >= 'a' {
		return c - 'a' + 10
	}
	return c - '0'
}

// A machine names a commit by more than its id: by that it could reach what the
// person has and never handed over.
func TestEmptyBundleNamesAnything(t *testing.T) {
	h := newHost(t)
	person := newPersonRepo(t)
	person.git(person.Dir, "checkout", "--quiet", "-b", "private")
	secret := person.commit("secret.txt", "not for anybody\n")
	person.git(person.Dir, "checkout", "--quiet", "main")
	p := h.pod(person.spec("", pushes), nil)
	for _, name := range []string{secret[:7], "HEAD", "refs/heads/agent/work", secret, "@{0}"} {
		h.mu.Lock()
		h.repo = func(_ *inside, stream *wire.Stream, _ guest.RepoCall) bool {
			value, _ := json.Marshal(tools.BundleResult{Ref: "refs/heads/agent/work", Empty: true, Commit: name})
			stream.SendJSON(wire.FrameResult, tools.Result{Value: value})
			return true
		}
		h.mu.Unlock()
		if a := h.tool(p, nucleus.GitPush, pushTo("agent/work")); a.Error == nil {
			t.Errorf("%q: %v", name, a)
		}
		if got := person.at("agent/work"); got != "" {
			t.Fatalf("%q: the remote has %s: %s", name, got, person.git(person.Remote, "log", "-1", "--format=%s", got))
		}
	}
}

// The remote moved since: the push is refused, not forced over it.
func TestRemoteMoved(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("", pushes), nil)
	m := h.inside(p)
	m.commit("new.txt", "x\n")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	person.git(person.Dir, "checkout", "--quiet", "-b", "theirs")
	theirs := person.commit("theirs.txt", "somebody else's\n")
	person.git(person.Dir, "push", "--quiet", "--force", "origin", "theirs:agent/work")
	m.commit("more.txt", "x\n")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, nucleus.KindFailed)
	if got := person.at("agent/work"); got != theirs {
		t.Errorf("the remote has %s, want %s", got, theirs)
	}
	// A branch that came into being since is not overwritten either.
	person.git(person.Dir, "push", "--quiet", "origin", "theirs:new")
	gitMust(m, "branch", "new")
	h.tool(p, nucleus.GitPush, pushTo("new")).want(t, nucleus.KindFailed)
	if got := person.at("new"); got != theirs {
		t.Errorf("the remote has %s, want %s", got, theirs)
	}
	for _, e := range h.entries(nucleus.KindOutcome, nucleus.GitPush)[1:] {
		if e.Status != nucleus.OutcomeFailed || e.Outcome == nil {
			t.Errorf("outcome %+v", e)
		}
	}
}

// Nothing that the machine, or the person's repository, configures runs on the host.
func TestNothingRunsOnTheHost(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	dir := t.TempDir()
	mark := filepath.Join(dir, "ran")
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho \"$0 $*\" >>"+mark+"\ncat\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	settings := map[string]string{
		"core.fsmonitor": script, "core.sshCommand": script, "core.pager": script, "core.editor": script, "diff.external": script, "uploadpack.packObjectsHook": script,
		"filter.x.clean": script, "filter.x.smudge": script, "filter.x.process": script, "filter.x.required": "true",
		"diff.x.textconv": script, "diff.x.command": script, "merge.x.driver": script, "credential.helper": "!" + script, "gpg.program": script,
	}
	spoil := func(git func(args ...string), root string) {
		for key, value := range settings {
			git("config", key, value)
		}
		hooks := filepath.Join(root, ".git", "hooks")
		os.MkdirAll(hooks, 0o755)
		for _, hook := range []string{"pre-push", "post-checkout", "reference-transaction", "post-update", "pre-receive", "update", "post-index-change", "fsmonitor-watchman"} {
			if err := os.WriteFile(filepath.Join(hooks, hook), []byte("#!/bin/sh\necho hook >>"+mark+"\n"), 0o755); err != nil {
				t.Error(err)
			}
		}
	}
	person.commit(".gitattributes", "* filter=x diff=x merge=x\n")
	person.git(person.Dir, "push", "--quiet", "origin", "main")
	spoil(func(args ...string) { person.git(person.Dir, args...) }, person.Dir)
	p := h.pod(person.spec("w", pushes), nil)
	m := h.inside(p)
	m.commit("new.txt", "x\n")
	m.commit(".gitmodules", "[submodule \"x\"]\n\tpath = x\n\turl = ext::"+script+"\n")
	// The machine's own settings are made last: here they run on the same host.
	head := gitMust(m, "rev-parse", "HEAD")
	os.Remove(mark)
	h.mu.Lock()
	bundle := filepath.Join(dir, "b")
	gitMust(m, "bundle", "create", "--quiet", bundle, "refs/heads/agent/work")
	data, err := os.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	spoil(func(args ...string) { gitMust(m, args...) }, m.dir("app"))
	h.repo = func(_ *inside, stream *wire.Stream, call guest.RepoCall) bool {
		if call.Out.Ref != "refs/heads/agent/work" {
			value, _ := json.Marshal(tools.BundleResult{Ref: call.Out.Ref, Empty: true, Commit: head})
			stream.SendJSON(wire.FrameResult, tools.Result{Value: value})
			return true
		}
		sendBundle(stream, data)
		value, _ := json.Marshal(tools.BundleResult{Ref: call.Out.Ref, Commit: head})
		stream.SendJSON(wire.FrameResult, tools.Result{Value: value})
		return true
	}
	h.mu.Unlock()
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/pods/"+p.record.ID+"/repos/app/fetch", p.record.ID, nil)).want(t, "")
	if person.at("agent/work") != head {
		t.Error("control: nothing was pushed")
	}
	if ran, err := os.ReadFile(mark); err == nil {
		t.Errorf("ran on the host:\n%s", ran)
	}
}

// The credentials of a remote reach neither machine nor log, whatever fails.
func TestRemoteCredentials(t *testing.T) {
	h := newHost(t)
	person := newPersonRepo(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	person.git(person.Dir, "remote", "set-url", "origin", "http://person:hunter2hunter2@"+address+"/app.git")
	p := h.pod(person.spec("", pushes), nil)
	m := h.inside(p)
	m.commit("new.txt", "x\n")
	a := h.tool(p, nucleus.GitPush, pushTo("agent/work"))
	a.want(t, nucleus.KindFailed)
	if strings.Contains(a.Body, "hunter2") {
		t.Errorf("the agent is told: %v", a)
	}
	for _, e := range h.log() {
		if strings.Contains(string(document(t, e)), "hunter2") {
			t.Errorf("in the log: %s", document(t, e))
		}
	}
}

// A label goes with the workspace: a repository that a session before brought in is
// as untrusted in the next one, which does not name it.
func TestLabelOfWorkspace(t *testing.T) {
	h := newHost(t)
	person := newPersonRepo(t)
	person.git(person.Dir, "remote", "set-url", "origin", "https://git.example.org/stranger/app.git")
	p := h.pod(person.spec("w", policyOf(all)), nil)
	if !p.record.Untrusted || p.root.legs() != 0 {
		t.Fatalf("control: untrusted %v, exposure %v", p.record.Untrusted, p.root.legs().Names())
	}
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	next := h.pod(specOf("w", policyOf(all)), nil)
	h.tool(next, nucleus.ReadFiles, map[string]string{"path": "app/README.md"}).want(t, "")
	if !next.root.legs().Has(nucleus.Untrusted) {
		t.Errorf("a stranger's file was read; exposure %v", next.root.legs().Names())
	}
}

// forge is GitHub's API as far as pull requests need it.
type forge struct {
	server *httptest.Server

	mu       sync.Mutex
	head     map[string]string // branch -> where it is said to stand
	opened   string            // what a new pull request's head is said to be; "": as head
	requests []string
	tokens   map[string]bool
	asked    map[string]string // by the last POST
}

func newForge(t *testing.T) *forge {
	f := &forge{head: map[string]string{}, tokens: map[string]bool{}}
	f.server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.server.Close)
	return f
}

func (f *forge) option(h *host) { h.forge = Forge{API: f.server.URL, Token: "secret-token"} }

func (f *forge) stands(branch, commit string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.head[branch] = commit
}

func (f *forge) posts() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(f.requests), func(r string) bool { return !strings.HasPrefix(r, "POST ") }))
}

func (f *forge) serve(w http.ResponseWriter, r *http.Request) {
	raw, _ := io.ReadAll(r.Body)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, r.Method+" "+r.URL.Path)
	f.tokens[r.Header.Get("Authorization")] = true
	if branch, ok := strings.CutPrefix(r.URL.Path, "/repos/o/app/git/ref/heads/"); ok && r.Method == http.MethodGet {
		commit, known := f.head[branch]
		if !known {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"message":"Not Found"}`)
			return
		}
		fmt.Fprintf(w, `{"ref":"refs/heads/%s","object":{"type":"commit","sha":%q}}`, branch, commit)
		return
	}
	f.asked = nil
	json.Unmarshal(raw, &f.asked)
	switch f.asked["title"] {
	case "refused":
		w.WriteHeader(http.StatusUnprocessableEntity)
		io.WriteString(w, `{"message":"Validation Failed: token=hunter2correct"}`)
	case "nonsense":
		io.WriteString(w, "<html>")
	case "endless":
		w.WriteHeader(http.StatusCreated)
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat(" ", 1<<16)); err != nil {
				return
			}
		}
	default:
		w.WriteHeader(http.StatusCreated)
		head := cmp.Or(f.opened, f.head[f.asked["head"]])
		fmt.Fprintf(w, `{"html_url":"https://github.com/o/app/pull/7","number":7,"head":{"sha":%q}}`, head)
	}
}

// remoteIsForge says in the record on the host that origin lies on the forge.
func remoteIsForge(t *testing.T, p *Pod, url string) {
	t.Helper()
	stored, err := p.readRepo("app")
	if err != nil {
		t.Fatal(err)
	}
	stored.Remotes["origin"] = url
	if err := p.writeRepo("app", stored); err != nil {
		t.Fatal(err)
	}
}

// A pull request is opened at the forge with exactly what was decided, and only for
// what stands there.
func TestPullRequest(t *testing.T) {
	t.Parallel()
	f := newForge(t)
	h := newHost(t, f.option)
	person := newPersonRepo(t)
	p := h.pod(person.spec("", pushes), nil)
	m := h.inside(p)
	pushed := m.commit("new.txt", "x\n")
	pr := func(title string) answer {
		return h.tool(p, nucleus.CreatePR, map[string]string{"title": title, "body": "why"})
	}
	pr("elsewhere").want(t, nucleus.KindInvalid, "not on github.com")
	remoteIsForge(t, p, "https://person:hunter2@github.com/o/app.git")
	pr("unpushed").want(t, nucleus.KindConflict, "git_push first")
	f.stands("agent/work", pushed)
	a := pr("done")
	a.want(t, "")
	if !strings.Contains(a.Body, "pull/7") || f.requests[len(f.requests)-1] != "POST /repos/o/app/pulls" || len(f.tokens) != 1 || !f.tokens["Bearer secret-token"] {
		t.Errorf("%v, %q, %v", a, f.requests, f.tokens)
	}
	if f.asked["head"] != "agent/work" || f.asked["base"] != "main" || f.asked["title"] != "done" || f.asked["body"] != "why" || len(f.asked) != 4 {
		t.Errorf("asked for %+v", f.asked)
	}
	pr("refused").want(t, nucleus.KindFailed, "Validation Failed")
	pr("nonsense").want(t, nucleus.KindFailed, "without JSON")
	pr("endless").want(t, nucleus.KindFailed)
	for _, e := range h.log() {
		raw := string(document(t, e))
		if e.Outcome != nil {
			raw += string(e.Outcome.Payload)
		}
		if strings.Contains(raw, "secret-token") || strings.Contains(raw, "hunter2") {
			t.Errorf("in the log: %s", raw)
		}
	}
}

// What the remote really has counts, not what the host has on record: a branch that moved
// on the remote is not the one that was decided.
func TestPullRequestHead(t *testing.T) {
	t.Parallel()
	f := newForge(t)
	h := newHost(t, f.option)
	person := newPersonRepo(t)
	p := h.pod(person.spec("", pushes), nil)
	m := h.inside(p)
	pushed := m.commit("new.txt", "x\n")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "") // so it stands on record
	remoteIsForge(t, p, "git@github.com:o/app.git")
	pr := func() answer {
		return h.tool(p, nucleus.CreatePR, map[string]string{"title": "t", "body": "b"})
	}
	pr().want(t, nucleus.KindConflict, "git_push first") // deleted there since
	f.stands("agent/work", strings.Repeat("1", 40))
	pr().want(t, nucleus.KindConflict, "1111", "git_push first")
	f.stands("agent/work", "")
	pr().want(t, nucleus.KindConflict, "git_push first")
	if n := f.posts(); n != 0 {
		t.Errorf("%d pull requests were asked for", n)
	}
	f.stands("agent/work", pushed)
	pr().want(t, "")
	m.commit("more.txt", "not pushed\n")
	pr().want(t, nucleus.KindConflict, "git_push first")
	if n := f.posts(); n != 1 {
		t.Errorf("%d pull requests were asked for, want 1", n)
	}
	// It moved between the look and the request: that is said.
	f.stands("agent/work", gitMust(m, "rev-parse", "HEAD"))
	f.opened = strings.Repeat("2", 40)
	pr().want(t, nucleus.KindConflict, "pull request 7", "2222", "close it")
}

// Without a token nothing is asked of anybody.
func TestPullRequestWithoutToken(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(h *host) { h.forge = Forge{API: "http://127.0.0.1:1"} })
	person := newPersonRepo(t)
	p := h.pod(person.spec("", pushes), nil)
	h.inside(p).commit("new.txt", "x\n")
	h.tool(p, nucleus.GitPush, pushTo("agent/work")).want(t, "")
	remoteIsForge(t, p, "git@github.com:o/app.git")
	h.tool(p, nucleus.CreatePR, map[string]string{"title": "t", "body": "b"}).want(t, nucleus.KindUnavailable, "GH_TOKEN")
}

func TestForgeRepository(t *testing.T) {
	t.Parallel()
	for remote, want := range map[string]string{
		"https://github.com/o/app":                    "o/app",
		"https://github.com/o/app.git":                "o/app",
		"https://u:p@github.com/o/app.git/":           "o/app",
		"git@github.com:o/app.git":                    "o/app",
		"ssh://git@github.com/o/app":                  "o/app",
		"https://github.com/o":                        "",
		"https://github.com/o/app/x":                  "",
		"https://github.com.evil.example/o/app":       "",
		"https://evil.example/github.com/o/app":       "",
		"https://github.com@evil.example/o/app":       "",
		"https://evil.example/https://github.com/o/a": "",
		"git@evil.example:github.com/o/app":           "",
		"":                                            "",
	} {
		got, err := forgeRepository(remote)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", remote, got, err, want)
		}
	}
}

func TestWithoutCredentials(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"https://u:p@host.example/a.git":   "https://host.example/a.git",
		"https://token@host.example/a":     "https://host.example/a",
		"https://u:p@@host.example/a":      "https://host.example/a",
		"http://u:p@host.example:8080/a@b": "http://host.example:8080/a@b",
		"ssh://git@host.example/a":         "ssh://git@host.example/a",
		"git@host.example:a":               "git@host.example:a",
		"/srv/git/a.git":                   "/srv/git/a.git",
	} {
		if got := git.WithoutCredentials(url); got != want {
			t.Errorf("%q: %q, want %q", url, got, want)
		}
	}
}

// An ssh address can hold a password too.
func TestWithoutCredentialsSSH(t *testing.T) {
	if got := git.WithoutCredentials("ssh://git:hunter2@host.example/a"); strings.Contains(got, "hunter2") {
		t.Errorf("got %q", got)
	}
}

// web_fetch is made by the node, through the gateway: decided once, recorded on
// opening and closing; a redirect is another request.
func TestWebFetch(t *testing.T) {
	t.Parallel()
	var hits atomic.Int32
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/private", http.StatusFound)
		case "/bytes":
			w.Write([]byte{0xff, 0xfe})
		default:
			io.WriteString(w, "page "+r.URL.Path)
		}
	}))
	defer site.Close()
	_, port, err := net.SplitHostPort(strings.TrimPrefix(site.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	policy := json.RawMessage(`{"operations":{"web_fetch":"always"},"hosts":{"only":[{"host":"127.0.0.1","port":` + port + `,"methods":["GET"],"path":"/open/**"},{"host":"127.0.0.1","port":` + port + `,"methods":["GET"],"path":"/moved"},{"host":"127.0.0.1","port":` + port + `,"methods":["GET"],"path":"/bytes"}]}}`)
	p := h.pod(specOf("", policy), nil)
	fetch := func(args map[string]string) answer { return h.tool(p, nucleus.WebFetch, args) }
	a := fetch(map[string]string{"url": site.URL + "/open/a"})
	a.want(t, "")
	if !strings.Contains(a.Body, "page /open/a") {
		t.Errorf("got %v", a)
	}
	if legs := p.root.legs(); !legs.Has(nucleus.Untrusted | nucleus.WayOut) {
		t.Errorf("exposure %v", legs.Names())
	}
	opened, closed := h.entries(nucleus.KindEgressOpen, ""), h.entries(nucleus.KindEgressClose, "")
	intent, outcome := h.entries(nucleus.KindIntent, nucleus.WebFetch), h.entries(nucleus.KindOutcome, nucleus.WebFetch)
	if len(opened) != 1 || len(closed) != 1 || len(intent) != 1 || len(outcome) != 1 ||
		!(intent[0].Seq < opened[0].Seq && opened[0].Seq < closed[0].Seq && closed[0].Seq < outcome[0].Seq) {
		t.Errorf("intent %+v opened %+v closed %+v outcome %+v", intent, opened, closed, outcome)
	}
	a = fetch(map[string]string{"url": site.URL + "/moved"})
	a.want(t, "")
	if !strings.Contains(a.Body, "/private") || strings.Contains(a.Body, "page /private") {
		t.Errorf("got %v", a)
	}
	if a := fetch(map[string]string{"url": site.URL + "/bytes"}); !strings.Contains(a.Body, "body_b64") {
		t.Errorf("got %v", a)
	}
	before := hits.Load()
	for name, args := range map[string]map[string]string{
		"another path":   {"url": site.URL + "/private"},
		"dots":           {"url": site.URL + "/open/../private"},
		"another method": {"url": site.URL + "/open/a", "method": "POST"},
		"a name for it":  {"url": "http://localhost:" + port + "/open/a"},
		"another port":   {"url": "http://127.0.0.1:1/open/a"},
		"metadata":       {"url": "http://169.254.169.254/open/a"},
		"mapped":         {"url": "http://[::ffff:127.0.0.1]:" + port + "/open/a"},
		"decimal":        {"url": "http://2130706433:" + port + "/open/a"},
		"user":           {"url": "http://u@127.0.0.1:" + port + "/open/a"},
		"file":           {"url": "file:///etc/passwd"},
	} {
		if a := fetch(args); a.Error == nil || a.Error.Kind != nucleus.KindDenied && a.Error.Kind != nucleus.KindInvalid {
			t.Errorf("%s: %v", name, a)
		}
	}
	if hits.Load() != before {
		t.Errorf("%d requests reached the site", hits.Load()-before)
	}
}

// No record, no connection.
func TestWebFetchNotRecorded(t *testing.T) {
	t.Parallel()
	var hits atomic.Int32
	site := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	defer site.Close()
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(site.URL, "http://"))
	h := newHost(t)
	disk := h.memoryLog()
	p := h.pod(specOf("", json.RawMessage(`{"operations":{"web_fetch":"always"},"hosts":{"only":[{"host":"127.0.0.1","port":`+port+`}]}}`)), nil)
	h.tool(p, nucleus.WebFetch, map[string]string{"url": site.URL}).want(t, "")
	if hits.Load() != 1 {
		t.Fatal("control: nobody came")
	}
	// The first append that fails is the intent's; with one more it is that of the opening.
	for allowed := range 2 {
		appends := 0
		disk.failing(func(what string) error {
			if what == "append" {
				if appends++; appends > allowed {
					return errNo
				}
			}
			return nil
		})
		h.tool(p, nucleus.WebFetch, map[string]string{"url": site.URL}).want(t, nucleus.KindUnavailable)
		disk.failing(nil)
		if err := h.node.log.Reopen(); err != nil {
			t.Fatal(err)
		}
		if hits.Load() != 1 {
			t.Errorf("with %d records somebody came", allowed)
		}
	}
}

// What came of an effect on the host is known, or said to be unknown: a caller that goes
// away cuts none off, and a request that changes something and whose answer does not come may have
// changed it.
func TestEffectsEndKnown(t *testing.T) {
	t.Parallel()
	reached, release := make(chan struct{}), make(chan struct{})
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(reached)
			select {
			case <-release:
			case <-r.Context().Done():
				t.Error("the request was cut off with its caller")
			}
			return
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		conn.Close()
	}))
	defer site.Close()
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(site.URL, "http://"))
	h := newHost(t)
	p := h.pod(specOf("", json.RawMessage(`{"operations":{"web_fetch":"always"},"hosts":{"only":[{"host":"127.0.0.1","port":`+port+`}]}}`)), nil)
	last := func() nucleus.Entry {
		outcomes := h.entries(nucleus.KindOutcome, nucleus.WebFetch)
		if len(outcomes) == 0 {
			return nucleus.Entry{}
		}
		return outcomes[len(outcomes)-1]
	}
	for method, want := range map[string]string{"GET": nucleus.OutcomeFailed, "POST": nucleus.OutcomeUnknown} {
		a := h.tool(p, nucleus.WebFetch, map[string]string{"url": site.URL + "/drop", "method": method})
		a.want(t, nucleus.KindFailed)
		if unsaid := !strings.Contains(a.Body, "nobody can say"); last().Status != want || unsaid != (want == nucleus.OutcomeFailed) {
			t.Errorf("%s: recorded %q, want %q; said %v", method, last().Status, want, a)
		}
	}
	ctx, hangUp := context.WithCancel(h.context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		h.toolContext(ctx, p, nucleus.WebFetch, map[string]string{"url": site.URL + "/slow"})
	}()
	<-reached
	hangUp()
	close(release)
	<-over
	eventually(t, "the fetch is recorded as done", func() bool { return last().Status == nucleus.OutcomeDone })
}
