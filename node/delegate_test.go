package node

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/approval"
	"cal/guest"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

const delegating = ordinary + " git_push create_pr web_fetch net_connect spawn_agent manage_pods"

type object map[string]any

// create asks for a pod below p, which must be made.
func (h *host) create(p *Pod, args object) *Pod {
	h.t.Helper()
	a := h.createTry(p, args)
	a.want(h.t, "")
	var made subStatus
	if err := json.Unmarshal([]byte(a.Body), &made); err != nil {
		h.t.Fatal(err)
	}
	sub, err := h.node.pod(made.Pod)
	if err != nil {
		h.t.Fatal(err)
	}
	return sub
}

func (h *host) createTry(p *Pod, args object) answer {
	h.t.Helper()
	args["action"] = "create"
	return h.tool(p, nucleus.ManagePods, args)
}

// as performs an operation of pod p with the key of another's agent.
func (h *host) as(caller, p *Pod, op nucleus.Op, args any) answer {
	h.t.Helper()
	path := "/v1/pods/" + p.record.ID + "/tools/" + string(op)
	return h.serve(h.node, h.signed(h.asAgent(caller), http.MethodPost, path, p.record.ID, document(h.t, args)))
}

// What a pod may ask for, against what its own record says.
func TestDelegationTakesNoMore(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := specOf("w", policyOf(delegating))
	spec.Env = map[string]string{"TOKEN": "s", "PLAIN": "p"}
	spec.Resources = nucleus.Resources{CPU: 4, MemoryMB: 2048}
	p := h.pod(spec, nil)

	// Control: the same arguments, one step less.
	made := h.create(p, object{
		"policy": "permissive", "mode": "mediated", "driver": "fake", "resources": object{"cpu": 4, "memory_mb": 1024}, "env": []string{"PLAIN"},
	})
	if s := made.record.Spec; s.Resources != (nucleus.Resources{CPU: 4, MemoryMB: 1024}) || len(s.Env) != 1 || s.Env["PLAIN"] != "p" || s.Workspace != "" || s.Agent != nil || s.Model != nil {
		t.Errorf("made %+v", s)
	}
	if inherited := h.create(p, object{}); inherited.record.Spec.Resources != spec.Resources || len(inherited.record.Spec.Env) != 2 {
		t.Errorf("made %+v", inherited.record.Spec)
	}
	for name, c := range map[string]struct {
		args object
		kind nucleus.Kind
		text string
	}{
		"a workspace":          {object{"workspace": "w"}, nucleus.KindInvalid, `unknown argument \"workspace\"`},
		"an image":             {object{"image": object{"kind": "directory", "path": "/"}}, nucleus.KindInvalid, `unknown argument \"image\"`},
		"a path as repository": {object{"repo": "/etc"}, nucleus.KindNotFound, "no repository"},
		"repositories":         {object{"repos": []object{{"path": "/"}}}, nucleus.KindInvalid, `unknown argument \"repos\"`},
		"an agent":             {object{"agent": object{"argv": []string{"/bin/sh"}}}, nucleus.KindInvalid, `unknown argument \"agent\"`},
		"a model":              {object{"model": object{"base_url": "http://evil"}}, nucleus.KindInvalid, `unknown argument \"model\"`},
		"watched limits":       {object{"allow_watched": []string{"memory"}}, nucleus.KindInvalid, `unknown argument \"allow_watched\"`},
		"another case":         {object{"Policy": "permissive"}, nucleus.KindInvalid, `unknown argument \"Policy\"`},
		"a layer in resources": {object{"resources": object{"cpu": 1, "image": 1}}, nucleus.KindInvalid, "unknown field"},
		"contained":            {object{"mode": "contained"}, nucleus.KindDenied, "this pod is mediated"},
		"no mode":              {object{"mode": "free"}, nucleus.KindInvalid, "want"},
		"a foreign variable":   {object{"env": []string{"HOME"}}, nucleus.KindDenied, `not given \"HOME\"`},
		"more cpu":             {object{"resources": object{"cpu": 5}}, nucleus.KindDenied, "this pod has 4"},
		"more memory":          {object{"resources": object{"memory_mb": 2049}}, nucleus.KindDenied, "this pod has 2048"},
		"unstated pids":        {object{"resources": object{"pids": 16}}, nucleus.KindDenied, "states none"},
		"negative cpu":         {object{"resources": object{"cpu": -1}}, nucleus.KindInvalid, "want 1 to 32"},
		"an unknown driver":    {object{"driver": "none"}, nucleus.KindInvalid, "no driver"},
		"tier none":            {object{"require": "none"}, nucleus.KindInvalid, "want"},
		"a tier nobody has":    {object{"require": "vm"}, nucleus.KindUnavailable, "can be started here"},
		"an unknown profile":   {object{"policy": "everything"}, nucleus.KindInvalid, "everything"},
		"a bad policy":         {object{"policy": object{"operations": object{"execute": "always"}}}, nucleus.KindInvalid, "execute"},
		"a policy's path":      {object{"policy": "/etc/passwd"}, nucleus.KindInvalid, "/etc/passwd"},
		"another action's":     {object{"wait_s": 1}, nucleus.KindInvalid, "takes no wait_s"},
		"another pod":          {object{"pod": "p-aaaaaaaaaa"}, nucleus.KindInvalid, "takes no pod"},
	} {
		a := h.createTry(p, c.args)
		if a.Error == nil || a.Error.Kind != c.kind || !strings.Contains(a.Body, c.text) {
			t.Errorf("%s: %v, want %s %q", name, a, c.kind, c.text)
		}
	}
	if n := len(h.node.below(p)); n != 2 {
		t.Errorf("%d pods below, want the two of the control", n)
	}
	for _, e := range h.entries(nucleus.KindPodCreate, "")[1:] {
		if !strings.Contains(string(e.Data), `"parent":"`+p.record.ID+`"`) || !strings.Contains(string(e.Data), `"root_session":"`+p.record.Session+`"`) {
			t.Errorf("pod.create says %s", e.Data)
		}
	}
}

// Every policy that is asked for is met with the asking pod's.
func TestDelegatedPolicy(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	own := json.RawMessage(`{"operations":{"read_files":"always","git_push":"always","web_fetch":"always","manage_pods":"always"},"paths":{"roots":{"only":["app"]}},"hosts":{"only":[{"host":"a.example","port":443}]}}`)
	p := h.pod(specOf("w", own), nil)
	for _, asked := range []any{"permissive", "default", nil, object{"operations": object{"git_push": "always", "run_bash": "always", "read_files": "always"}, "hosts": "any", "paths": object{"roots": "any"}, "commands": "any"}} {
		args := object{}
		if asked != nil {
			args["policy"] = asked
		}
		sub := h.create(p, args)
		if !policy.Leq(sub.policy, policy.Nu(p.policy)) {
			t.Errorf("%v: %s is not below %s", asked, sub.record.Policy, p.record.Policy)
		}
		// What the asking pod asks for its trifecta, the other asks for too.
		if level := sub.policy.Level(nucleus.GitPush); level > policy.Ask {
			t.Errorf("%v: git_push is %s", asked, level)
		}
		h.as(p, sub, nucleus.RunBash, object{"argv": []string{"true"}}).want(t, nucleus.KindDenied, "operations.run_bash")
		h.as(p, sub, nucleus.WebFetch, object{"url": "https://b.example/"}).want(t, nucleus.KindDenied)
		if a := h.tool(p, nucleus.ManagePods, object{"action": "delete", "pod": sub.record.ID}); a.Status != http.StatusOK {
			t.Fatal(a)
		}
	}
}

// Who may touch whom.
func TestDelegationReaches(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	searching := policyOf(delegating + " glob_search")
	p, stranger := h.pod(specOf("w", searching), nil), h.pod(specOf("x", searching), nil)
	child, sibling := h.create(p, object{}), h.create(p, object{})
	grandchild := h.create(child, object{})
	blind := h.pod(specOf("y", policyOf(ordinary+" spawn_agent glob_search")), nil)
	list := object{"pattern": "*"}
	for _, c := range []struct {
		name       string
		caller, of *Pod
		allowed    bool
	}{
		{"itself", p, p, true}, {"parent to child", p, child, true}, {"grandparent", p, grandchild, true}, {"child to its own", child, grandchild, true},
		{"child to parent", child, p, false}, {"siblings", child, sibling, false}, {"nephew", sibling, grandchild, false}, {"up two", grandchild, p, false},
		{"a stranger", stranger, child, false}, {"to a stranger", child, stranger, false}, {"one that manages none", blind, child, false},
	} {
		a := h.as(c.caller, c.of, nucleus.GlobSearch, list)
		if c.allowed != (a.Status == http.StatusOK) || !c.allowed && a.Error.Kind != nucleus.KindForbidden {
			t.Errorf("%s: %v", c.name, a)
		}
	}
	for name, args := range map[string]object{
		"a stranger's child": {"action": "delete", "pod": child.record.ID}, "a pod of the person's": {"action": "delete", "pod": p.record.ID},
		"a fetch": {"action": "fetch", "pod": child.record.ID}, "a wait": {"action": "wait", "pod": child.record.ID},
	} {
		if a := h.tool(stranger, nucleus.ManagePods, args); a.Error == nil || a.Error.Kind != nucleus.KindNotFound {
			t.Errorf("%s: %v", name, a)
		}
	}
	h.tool(child, nucleus.ManagePods, object{"action": "delete", "pod": sibling.record.ID}).want(t, nucleus.KindNotFound)
	h.tool(p, nucleus.ManagePods, object{"action": "call", "pod": child.record.ID, "operation": "glob_search"}).want(t, nucleus.KindInvalid, "proxy")
	// A key of one pod with a signature for another says nothing.
	req := h.signed(h.asAgent(p), http.MethodPost, "/v1/pods/"+child.record.ID+"/tools/glob_search", p.record.ID, document(t, list))
	if a := h.serve(h.node, req); a.Error == nil || a.Error.Kind != nucleus.KindForbidden {
		t.Errorf("signed for another pod: %v", a)
	}
	// An operator's routes stay the operator's.
	if a := h.serve(h.node, h.signed(h.asAgent(p), http.MethodDelete, "/v1/pods/"+child.record.ID, child.record.ID, nil)); a.Error == nil || a.Error.Kind != nucleus.KindForbidden {
		t.Errorf("delete: %v", a)
	}
	h.tool(p, nucleus.ManagePods, object{"action": "delete", "pod": child.record.ID}).want(t, "")
	if _, err := h.node.pod(grandchild.record.ID); err == nil {
		t.Error("a pod outlives the one above it")
	}
	if _, err := h.node.pod(sibling.record.ID); err != nil {
		t.Error(err)
	}
}

// One exposure: what one pod takes, every other of the session is held to.
func TestDelegationSharesExposure(t *testing.T) {
	t.Parallel()
	own := json.RawMessage(`{"operations":{"read_files":"always","write_files":"always","git_push":"always","manage_pods":"always","net_connect":"always","web_fetch":"always"},"paths":{"roots":"any"},"hosts":{"only":[{"host":"127.0.0.1","port":1}]}}`)
	both := nucleus.Private | nucleus.Untrusted
	for name, story := range map[string]func(h *host, p, a, b *Pod) *Pod{ // returns who is asked
		"child gates parent": func(h *host, p, a, _ *Pod) *Pod { h.take(a, both); return p },
		"parent gates child": func(h *host, p, a, _ *Pod) *Pod { h.take(p, both); return a },
		"siblings":           func(h *host, _, a, b *Pod) *Pod { h.take(a, both); return b },
		"each a leg":         func(h *host, p, a, b *Pod) *Pod { h.take(a, nucleus.Private); h.take(b, nucleus.Untrusted); return p },
		"one made later":     func(h *host, p, a, _ *Pod) *Pod { h.take(a, both); return h.create(p, object{}) },
		"when it is gone":    func(h *host, p, a, _ *Pod) *Pod { h.take(a, both); h.end(p, a); return p },
		"control: half":      func(h *host, p, a, _ *Pod) *Pod { h.take(a, nucleus.Private); return p },
		"after another's boot": func(h *host, p, a, _ *Pod) *Pod {
			h.take(a, both)
			h.restart()
			again, _ := h.node.pod(p.record.ID)
			return again
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			p := h.pod(specOf("w", own), nil)
			asked := story(h, p, h.create(p, object{}), h.create(p, object{}))
			asked.root.mu.Lock()
			got := asked.policy.Decide(nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", Host: "127.0.0.1", Port: 1, Path: "/"}}, asked.context(time.Now()))
			asked.root.mu.Unlock()
			want := "trifecta"
			if strings.HasPrefix(name, "control") {
				want = "hosts[0]"
			}
			if got.Rule != want {
				t.Errorf("%+v, want rule %s", got, want)
			}
			if strings.HasPrefix(name, "control") {
				return
			}
			stored, err := openSession("s-1", p.record.Workspace, p.dir)
			if err != nil || !stored.exposure.Has(both) {
				t.Errorf("stored with the root's workspace: %v, %v", stored.exposure.Names(), err)
			}
		})
	}
}

// take takes legs by what a pod does.
func (h *host) take(p *Pod, legs nucleus.Legs) {
	h.t.Helper()
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	if err := h.node.expose(p, legs, false, "test"); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) end(p, sub *Pod) {
	h.t.Helper()
	h.tool(p, nucleus.ManagePods, object{"action": "delete", "pod": sub.record.ID}).want(h.t, "")
}

func TestDelegationLimits(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(delegating)), nil)
	deepest := p
	for range maxDepth {
		deepest = h.create(deepest, object{})
	}
	h.createTry(deepest, object{}).want(t, nucleus.KindDenied, ruleDelegation, "4 below")
	for range maxSubs - maxDepth - 1 {
		h.create(p, object{})
	}
	// The last place, for two at once.
	var wg sync.WaitGroup
	got := make([]answer, 4)
	for i := range got {
		wg.Go(func() { got[i] = h.createTry(p, object{}) })
	}
	wg.Wait()
	made := 0
	for _, a := range got {
		if a.Status == http.StatusOK {
			made++
		} else {
			a.want(t, nucleus.KindDenied, ruleDelegation, "8 pods")
		}
	}
	if made != 1 || len(h.node.below(p)) != maxSubs {
		t.Errorf("%d made for the last place, %d below", made, len(h.node.below(p)))
	}
	h.end(p, deepest)
	h.create(p, object{})
	// A machine that does not start gives its place back.
	for _, s := range h.node.below(p)[maxSubs-1:] {
		sub, _ := h.node.pod(s.Pod)
		h.end(p, sub)
	}
	h.mu.Lock()
	h.boot = func(*inside, *nucleus.BootReply) bool { return false }
	h.mu.Unlock()
	h.createTry(p, object{}).want(t, nucleus.KindFailed)
	h.mu.Lock()
	h.boot = nil
	h.mu.Unlock()
	if p.root.making != 0 {
		t.Errorf("%d places are taken by nobody", p.root.making)
	}
	h.create(p, object{})
}

// The pods of an agent end with its own, and nothing is left.
func TestDelegatedPodsEnd(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(h *host, p *Pod){
		"deleted": func(h *host, p *Pod) { h.node.DeletePod(h.context(), "operator", p.record.ID) },
		"machine dies": func(h *host, p *Pod) {
			p.machine.Destroy(h.context())
			<-p.gone
		},
		"parent is lost in a crash": func(h *host, p *Pod) {
			h.kill()
			os.Remove(filepath.Join(p.dir, podFile))
			h.start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			p := h.pod(specOf("w", policyOf(delegating)), nil)
			child := h.create(p, object{})
			grandchild := h.create(child, object{})
			end(h, p)
			for _, q := range []*Pod{grandchild, child} {
				eventually(t, "nothing is left of "+q.record.ID, func() bool {
					_, err := os.Stat(q.dir)
					_, known := h.node.pod(q.record.ID)
					return os.IsNotExist(err) && known != nil
				})
			}
		})
	}
}

// Creation that races with the end of the pod that asks leaves nothing.
func TestDelegationRacesWithTheEnd(t *testing.T) {
	t.Parallel()
	for range 12 {
		h := newHost(t)
		p := h.pod(specOf("w", policyOf(delegating)), nil)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { h.createTry(p, object{}) })
		}
		wg.Go(func() { h.node.DeletePod(h.context(), "operator", p.record.ID) })
		wg.Wait()
		left, err := os.ReadDir(h.node.dirs.Pods())
		if err != nil || len(left) != 0 {
			t.Fatalf("left: %v, %v", left, err)
		}
	}
}

// A repository goes along as the machine has committed it, and comes back as a branch of
// its own.
func TestDelegationCarriesCommits(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	repo := newPersonRepo(t)
	p := h.pod(repo.spec("w", policyOf(delegating)), nil)
	head := h.inside(p).commit("parent.txt", "of the parent\n")
	if err := os.WriteFile(filepath.Join(h.inside(p).dir("app"), "secret.txt"), []byte("not committed"), 0o644); err != nil {
		t.Fatal(err)
	}
	a := h.createTry(p, object{})
	a.want(t, "", "")
	var made subStatus
	if err := json.Unmarshal([]byte(a.Body), &made); err != nil || made.Base != head || !strings.HasPrefix(made.LeftOut, "the working tree differs") || made.Branch != "cal/sub/"+made.Pod {
		t.Fatalf("%v, %v; want base %s", a, err, head)
	}
	child, _ := h.node.pod(made.Pod)
	inside := h.inside(child)
	if at, err := inside.git("app", "rev-parse", "HEAD"); err != nil || at != head {
		t.Fatalf("the child is at %s, %v", at, err)
	}
	if _, err := os.Stat(filepath.Join(inside.dir("app"), "secret.txt")); err == nil {
		t.Error("what was not committed went along")
	}
	if !p.record.Untrusted || !child.record.Untrusted || child.record.Repos[0].Trusted {
		t.Errorf("untrusted: %v, below %v, its repository trusted %v", p.record.Untrusted, child.record.Untrusted, child.record.Repos[0].Trusted)
	}
	grandchild := h.create(child, object{})
	deepest := h.create(grandchild, object{}) // each borrows the objects of the one above it
	lowest := h.inside(deepest).commit("deepest.txt", "deepest\n")
	h.tool(grandchild, nucleus.ManagePods, object{"action": "fetch", "pod": deepest.record.ID}).want(t, "", `"commits":1`, lowest)
	deep := h.inside(grandchild).commit("deep.txt", "deep\n")
	fetch := func(of *Pod, by *Pod) answer {
		return h.tool(by, nucleus.ManagePods, object{"action": "fetch", "pod": of.record.ID})
	}
	fetch(grandchild, child).want(t, "")
	if at, err := inside.git("app", "rev-parse", "cal/sub/"+grandchild.record.ID); err != nil || at != deep {
		t.Fatalf("it came back as %s, %v", at, err)
	}
	fetch(grandchild, p).want(t, nucleus.KindInvalid, "belongs to")
	if _, err := inside.git("app", "merge", "--quiet", "--ff-only", deep); err != nil {
		t.Fatal(err)
	}
	before, _ := h.inside(p).git("app", "rev-parse", "HEAD")
	fetch(child, p).want(t, "")
	at, err := h.inside(p).git("app", "rev-parse", made.Branch)
	after, _ := h.inside(p).git("app", "rev-parse", "HEAD")
	if err != nil || at != deep || before != after {
		t.Errorf("the branch is at %s, %v; HEAD %s, before %s", at, err, after, before)
	}
	// A push from below shows all that is new on the remote, not only what is new below.
	req := h.node
	q, err := req.newTransfer(h.context(), child, child.record.Repos[0], child.transfersDir())
	if err != nil {
		t.Fatal(err)
	}
	defer q.drop()
	if q.stored.PersonBase != p.record.Repos[0].Base || q.stored.Remotes["origin"] != repo.Remote {
		t.Errorf("recorded %+v", q.stored)
	}
	// It survives the node.
	h.kill()
	h.start()
	p, _ = h.node.pod(p.record.ID)
	if _, err := h.node.pod(made.Pod); err != nil {
		t.Fatal(err)
	}
	newer := inside.commit("newer.txt", "x\n")
	h.tool(p, nucleus.ManagePods, object{"action": "fetch", "pod": made.Pod}).want(t, "")
	if at, _ := h.inside(p).git("app", "rev-parse", made.Branch); at != newer {
		t.Errorf("after the restart: %s, want %s", at, newer)
	}
}

// What a person signs for is shown.
func TestDelegationAsks(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	repo := newPersonRepo(t)
	spec := repo.spec("w", policyOf(ordinary+" spawn_agent=ask manage_pods=ask git_push=ask"))
	spec.Agent = &nucleus.Agent{Name: "tester", Argv: []string{"/bin/agent"}, Task: []string{"/bin/agent", "--", nucleus.TaskHere}}
	h.program = func(_ *inside, program guest.AgentProgram, stream *wire.Stream) {
		stream.Send(wire.FrameStdout, []byte("did: "+program.Argv[2]))
		stream.SendJSON(wire.FrameResult, guest.AgentExit{})
	}
	p := h.pod(spec, nil)
	head := h.inside(p).commit("a.txt", "a\n")
	task := "Refactor the parser.\n\nThen stop."
	args := object{"task": task, "policy": object{"operations": object{"read_files": "always"}}}
	a := h.tool(p, nucleus.SpawnAgent, args)
	ask := a.want(t, nucleus.KindApproval).Ask
	shown := h.authority.asked()[0]
	if err := approval.Check(shown); err != nil {
		t.Error(err)
	}
	screen, err := approval.Draw(shown, approval.View{Whole: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{`"spawn"`, "Refactor the parser.", "Then stop.", head, `"read_files": "always"`, `"tester"`, `"app"`, `"mediated"`} {
		if !strings.Contains(screen.Text, text) {
			t.Errorf("the screen does not show %s\n%s", text, screen.Text)
		}
	}
	if strings.Contains(screen.Text, "git_push") {
		t.Errorf("the screen shows a policy that is not the new pod's\n%s", screen.Text)
	}
	if len(h.node.below(p)) != 0 {
		t.Error("a pod was made before anybody said yes")
	}
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.SpawnAgent, args).want(t, "", "did: Refactor", `"state":"ended"`)
	h.tool(p, nucleus.SpawnAgent, args).want(t, nucleus.KindApproval) // one grant, one sub-agent

	// Pods above may ask for what is below, with their own key.
	create := object{"action": "create", "policy": object{"operations": object{"read_files": "ask"}}}
	h.authority.grant(h.tool(p, nucleus.ManagePods, create).want(t, nucleus.KindApproval).Ask, nil)
	var made subStatus
	json.Unmarshal([]byte(h.tool(p, nucleus.ManagePods, create).Body), &made)
	child, err := h.node.pod(made.Pod)
	if err != nil {
		t.Fatal(err)
	}
	h.authority.mu.Lock()
	keys := h.authority.keys[made.Pod]
	h.authority.mu.Unlock()
	if len(keys) != 3 || !slices.Equal(keys[p.record.Boot], p.record.OutcomeKey) {
		t.Errorf("who may ask for %s: %d keys", made.Pod, len(keys))
	}
	read := h.as(p, child, nucleus.ReadFiles, object{"path": "app/a.txt"})
	h.authority.grant(read.want(t, nucleus.KindApproval).Ask, nil)
	h.as(p, child, nucleus.ReadFiles, object{"path": "app/a.txt"}).want(t, "")
	last := h.authority.asked()[len(h.authority.asked())-1]
	if last.Requester != p.record.Boot || last.Pod != made.Pod || last.Workspace != "w" || len(last.Detail) != 1 || !strings.Contains(last.Detail[0].Text, p.record.ID) {
		t.Errorf("asked by %s for %s in %q: %+v", last.Requester, last.Pod, last.Workspace, last.Detail)
	}
}

// agentHost is a pod whose agent may have sub-agents; run is what they do.
func (h *host) spawning(run func(*inside, guest.AgentProgram, *wire.Stream)) *Pod {
	spec := specOf("w", policyOf(delegating))
	spec.Agent = &nucleus.Agent{Name: "tester", Argv: []string{"/bin/agent"}, Env: map[string]string{"A": "b"}, Task: []string{"/bin/agent", "--print", nucleus.TaskHere}}
	spec.Model = &nucleus.Model{Protocol: "anthropic", BaseURL: "http://127.0.0.1:1", Key: "k"}
	h.program = run
	return h.pod(spec, nil)
}

func (a answer) result(t testing.TB) errandResult {
	t.Helper()
	a.want(t, "")
	var r errandResult
	if err := json.Unmarshal([]byte(a.Body), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSpawn(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	release := make(chan struct{})
	p := h.spawning(func(_ *inside, program guest.AgentProgram, s *wire.Stream) {
		if program.Env["A"] != "b" {
			t.Errorf("started with %v", program.Env)
		}
		switch task := program.Argv[2]; task {
		case "long":
			s.Send(wire.FrameStdout, []byte(strings.Repeat("x", maxOutput)))
			s.Send(wire.FrameStdout, []byte("the end"))
			<-release
			s.SendJSON(wire.FrameResult, guest.AgentExit{})
		case "bad":
			s.Send(wire.FrameStderr, []byte("why"))
			s.SendJSON(wire.FrameResult, guest.AgentExit{ExitCode: 3})
		case "none":
			s.SendJSON(wire.FrameResult, guest.AgentExit{ExitCode: -1, Refused: true, Error: nucleus.Errorf(nucleus.KindFailed, "no such program")})
		default:
			s.Send(wire.FrameStdout, []byte("did "+task))
			s.SendJSON(wire.FrameResult, guest.AgentExit{})
		}
	})
	r := h.tool(p, nucleus.SpawnAgent, object{"task": "it"}).result(t)
	if r.State != "ended" || r.ExitCode == nil || *r.ExitCode != 0 || r.Output != "did it" {
		t.Errorf("%+v", r)
	}
	if _, err := h.node.pod(r.Pod); err == nil {
		t.Error("a pod whose result was brought is still there")
	}
	r = h.tool(p, nucleus.SpawnAgent, object{"task": "bad", "keep": true}).result(t)
	if r.ExitCode == nil || *r.ExitCode != 3 || r.Errors != "why" || r.Kept == "" {
		t.Errorf("%+v", r)
	}
	if _, err := h.node.pod(r.Pod); err != nil {
		t.Error(err)
	}
	r = h.tool(p, nucleus.SpawnAgent, object{"task": "none"}).result(t)
	if r.State != "failed" || r.Error == nil || r.Error.Message != "no such program" {
		t.Errorf("%+v", r)
	}
	r = h.tool(p, nucleus.SpawnAgent, object{"task": "long", "wait_s": 0}).result(t)
	if r.State != "running" {
		t.Errorf("%+v", r)
	}
	wait := object{"action": "wait", "pod": r.Pod}
	close(release)
	r = h.tool(p, nucleus.ManagePods, wait).result(t)
	if r.State != "ended" || !strings.HasSuffix(r.Output, "the end") || !strings.HasPrefix(r.Output, "[the first 7 bytes are left out]") {
		t.Errorf("%.60s ... %+v", r.Output, r.State)
	}
	h.tool(p, nucleus.ManagePods, wait).want(t, nucleus.KindNotFound)
	// The longest task, each byte of which is six in JSON.
	if r := h.tool(p, nucleus.SpawnAgent, object{"task": strings.Repeat("\x01", tools.MaxTask)}).result(t); r.State != "ended" {
		t.Errorf("%+v", r.Error)
	}
	for name, args := range map[string]object{
		"an option": {"task": "--dangerously-skip-permissions"}, "nothing": {"task": " "}, "much": {"task": strings.Repeat("x", tools.MaxTask+1)},
		"a long wait": {"task": "x", "wait_s": 51}, "an argv": {"task": "x", "argv": []string{"sh"}}, "another's mode": {"task": "x", "mode": "contained"},
	} {
		if a := h.tool(p, nucleus.SpawnAgent, args); a.Status < 400 {
			t.Errorf("%s: %v", name, a)
		}
	}
	starts, ends := len(h.entries(nucleus.KindSessionStart, "")), len(h.entries(nucleus.KindSessionEnd, ""))
	if starts != 5 || ends != 4 {
		t.Errorf("%d starts and %d ends in the log", starts, ends)
	}
}

// The node is killed while a sub-agent runs: the next one tells its end.
func TestSpawnSurvivesTheNode(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.spawning(func(_ *inside, _ guest.AgentProgram, s *wire.Stream) {
		s.Send(wire.FrameStdout, []byte("first "))
		s.Recv(1 << 20) // until the wire ends
	})
	r := h.tool(p, nucleus.SpawnAgent, object{"task": "it", "wait_s": 0}).result(t)
	sub, err := h.node.pod(r.Pod)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has said something", func() bool { return sub.errandOf().result(r.Pod).Output != "" })
	h.joined = func(_ *inside, s *wire.Stream) {
		s.Send(wire.FrameStdout, []byte("second"))
		s.SendJSON(wire.FrameResult, guest.AgentExit{})
	}
	h.kill()
	h.start()
	again, err := h.node.pod(p.record.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := h.node.pod(r.Pod); err != nil || got.root != again.root || got.status().Parent != p.record.ID {
		t.Fatalf("adopted %v, %v", got, err)
	}
	r = h.tool(again, nucleus.ManagePods, object{"action": "wait", "pod": r.Pod}).result(t)
	if r.State != "ended" || r.Output != "first second" {
		t.Errorf("%+v", r)
	}
}

// The machine of a sub-agent ends: whoever waits hears it.
func TestSpawnedMachineDies(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.spawning(func(m *inside, _ guest.AgentProgram, s *wire.Stream) { s.Recv(1 << 20) })
	r := h.tool(p, nucleus.SpawnAgent, object{"task": "it", "wait_s": 0}).result(t)
	sub, err := h.node.pod(r.Pod)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan answer, 1)
	go func() { got <- h.tool(p, nucleus.ManagePods, object{"action": "wait", "pod": r.Pod}) }()
	if err := sub.machine.Destroy(h.context()); err != nil {
		t.Fatal(err)
	}
	if r := (<-got).result(t); r.State != "failed" || r.Error == nil {
		t.Errorf("%+v", r)
	}
	// And the end of the pod above ends the wait of its own call.
	r = h.tool(p, nucleus.SpawnAgent, object{"task": "it", "wait_s": 0}).result(t)
	go func() { got <- h.tool(p, nucleus.ManagePods, object{"action": "wait", "pod": r.Pod}) }()
	eventually(t, "somebody waits", func() bool { return len(h.entries(nucleus.KindIntent, nucleus.ManagePods)) == 2 })
	began := time.Now()
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	<-got
	if took := time.Since(began); took > effectPatience/2 {
		t.Errorf("the end took %s", took)
	}
}

// A pod's network is its own policy's; a passage is its own pod's; and when the session has met both
// legs, what no pod would be let through now is closed in all of them.
func TestDelegationNetwork(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	h.node.stopKeeping()
	h.node.serving.Wait()
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.pod(specOf("w", connects(ordinary+" manage_pods", site, other)), map[string]string{"a": "secret"})
	narrow := h.create(p, object{"policy": connects(ordinary, other)})
	wide := h.create(p, object{})
	h.get(narrow, site).want(t, nucleus.KindDenied)
	h.get(narrow, other).want(t, "")
	mine, a := h.through(wide, site)
	if mine == nil {
		t.Fatal(a)
	}
	mine.lives(t, "before both legs have met")
	h.tool(p, nucleus.ReadFiles, object{"path": "a"}).want(t, "")
	mine.closes(t, "when the pod above has read private data")

	first := h.asks(h.get(wide, site)).Ask
	h.authority.grant(first, nil)
	h.get(wide, site).want(t, "")
	if e := h.asks(h.get(p, site)); e.Ask == first {
		t.Errorf("the passage of a pod below is open to the one above")
	}
	h.asks(h.get(narrow, other))
}

// A sub-pod's budget is set aside from the asking pod's, in the section that decides: what is
// left for one is not had by two; what a pod that did not come to be, or ended, did not spend
// comes back.
func TestDelegationBudget(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	var own map[string]any
	if err := json.Unmarshal(policyOf(delegating), &own); err != nil {
		t.Fatal(err)
	}
	own["budget"] = object{"usd": 5, "tokens": 1000}
	p := h.pod(specOf("w", document(t, own)), nil)
	asked := func(usd float64) object {
		return object{"policy": object{"operations": object{"read_files": "always"}, "budget": object{"usd": usd}}}
	}
	left := func() nucleus.Amounts {
		p.root.mu.Lock()
		defer p.root.mu.Unlock()
		return p.root.left(p.record.ID)
	}
	const usd = 1_000_000
	h.createTry(p, asked(5.01)).want(t, nucleus.KindDenied, "budget.usd")
	h.createTry(p, asked(6)).want(t, nucleus.KindDenied, "budget.usd")
	if left().MicroUSD != 5*usd || len(h.node.below(p)) != 0 {
		t.Fatalf("left %+v", left())
	}
	// Three at once, for three apiece of five.
	var wg sync.WaitGroup
	got := make([]answer, 3)
	for i := range got {
		wg.Go(func() { got[i] = h.createTry(p, asked(3)) })
	}
	wg.Wait()
	made := 0
	for _, a := range got {
		if a.Status == http.StatusOK {
			made++
		} else {
			a.want(t, nucleus.KindDenied, "budget.usd", "2.00 USD are left")
		}
	}
	if made != 1 || left().MicroUSD != 2*usd {
		t.Fatalf("%d made, left %+v", made, left())
	}
	sub, _ := h.node.pod(h.node.below(p)[0].Pod)
	if got := sub.policy.Budget(); got.MicroUSD != 3*usd || got.Tokens != 1000 {
		t.Errorf("the sub-pod's policy has %+v", got)
	}
	// What it spends is its own; in what it states no limit it draws on the one above.
	p.root.mu.Lock()
	err := p.root.spend(sub.record.ID, nucleus.Amounts{MicroUSD: usd, Tokens: 400})
	p.root.mu.Unlock()
	if err != nil || left().MicroUSD != 2*usd || left().Tokens != 600 {
		t.Errorf("left %+v, %v", left(), err)
	}
	h.kill()
	h.start()
	p, _ = h.node.pod(p.record.ID)
	sub, _ = h.node.pod(sub.record.ID)
	if left().MicroUSD != 2*usd || left().Tokens != 600 {
		t.Errorf("after a restart left %+v", left())
	}
	h.end(p, sub)
	if left().MicroUSD != 4*usd || left().Tokens != 600 {
		t.Errorf("after its end left %+v", left())
	}
	// One that does not start gives all back.
	h.mu.Lock()
	h.boot = func(*inside, *nucleus.BootReply) bool { return false }
	h.mu.Unlock()
	h.createTry(p, asked(4)).want(t, nucleus.KindFailed)
	h.mu.Lock()
	h.boot = nil
	h.mu.Unlock()
	if left().MicroUSD != 4*usd {
		t.Errorf("after a start that failed left %+v", left())
	}
	// So does one that the machine does not admit.
	h.mu.Lock()
	h.behave = func(m *inside, c *callInside) (guest.CallResult, bool) {
		return m.sign(c.permit, guest.CallResult{Error: nucleus.Errorf(nucleus.KindForbidden, "no")}, nucleus.OutcomeRefused), true
	}
	h.mu.Unlock()
	h.createTry(p, asked(4)).want(t, nucleus.KindForbidden)
	h.mu.Lock()
	h.behave = nil
	h.mu.Unlock()
	if left().MicroUSD != 4*usd || len(h.node.below(p)) != 0 {
		t.Errorf("after a refusal of the machine left %+v", left())
	}
	// And one that was set aside when the node was killed.
	p.root.mu.Lock()
	err = p.root.openAccount("p-never", p.record.ID, nucleus.Amounts{MicroUSD: usd, Tokens: nucleus.Unlimited, Millis: nucleus.Unlimited})
	p.root.mu.Unlock()
	if err != nil || left().MicroUSD != 3*usd {
		t.Fatal(left(), err)
	}
	h.kill()
	h.start()
	p, _ = h.node.pod(p.record.ID)
	if left().MicroUSD != 4*usd {
		t.Errorf("after a crash between left %+v", left())
	}
	h.create(p, asked(4))
}

// A pod that was decided while the one above it lived is not made once that one has ended and
// looked for what is below it.
func TestDelegationAfterTheEnd(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(delegating)), nil)
	derived := func() *newSub {
		sub, err := h.node.derive(h.context(), p, tools.NewPod{}, false)
		if err != nil {
			t.Fatal(err)
		}
		return sub
	}
	if err := h.node.create(h.context(), "test", derived().pod); err != nil { // control
		t.Fatal(err)
	}
	late := derived()
	h.node.stopDeciding(p, "test", "")
	if err := h.node.endSubs(h.context(), "test", p); err != nil {
		t.Fatal(err)
	}
	if err := h.node.create(h.context(), "test", late.pod); err == nil || !strings.Contains(err.Error(), "nothing was done") {
		t.Errorf("made: %v", err)
	}
	if len(h.node.below(p)) != 0 {
		t.Error("a pod is left below one that has ended")
	}
}

// Pods below do not multiply the places that a session asks for at once.
func TestDelegationAsksForFewPlaces(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	var places []*web
	for i := range maxOpenAsks + 1 {
		places = append(places, &web{host: "127.0.0.1", port: 1000 + i})
	}
	p := h.pod(specOf("w", connects("net_connect=ask manage_pods", places...)), nil)
	sub := h.create(p, object{})
	for i, place := range places[:maxOpenAsks] {
		by := []*Pod{p, sub}[i%2]
		if e := h.get(by, place).Error; e == nil || e.Ask == "" {
			t.Fatalf("ask %d: %+v", i, e)
		}
	}
	for _, by := range []*Pod{p, sub} {
		if e := h.get(by, places[maxOpenAsks]).Error; e == nil || e.Kind != nucleus.KindApproval || e.Ask != "" {
			t.Errorf("one more of %s: %+v", by.record.ID, e)
		}
	}
}

// A sub-agent that has ended gives back what it did not spend, before anybody comes for it.
func TestSpawnGivesTheBudgetBack(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := specOf("w", json.RawMessage(`{"operations":{"read_files":"always","spawn_agent":"always","manage_pods":"always"},"budget":{"usd":5}}`))
	spec.Agent = &nucleus.Agent{Name: "tester", Argv: []string{"/bin/agent"}, Task: []string{"/bin/agent", nucleus.TaskHere}}
	release := make(chan struct{})
	h.program = func(_ *inside, _ guest.AgentProgram, s *wire.Stream) {
		<-release
		s.SendJSON(wire.FrameResult, guest.AgentExit{})
	}
	p := h.pod(spec, nil)
	r := h.tool(p, nucleus.SpawnAgent, object{"task": "x", "wait_s": 0, "policy": object{"operations": object{}, "budget": object{"usd": 5}}}).result(t)
	wait := object{"action": "wait", "pod": r.Pod}
	h.tool(p, nucleus.ManagePods, wait).want(t, nucleus.KindDenied, "budget.usd", "set aside")
	close(release)
	sub, err := h.node.pod(r.Pod)
	if err != nil {
		t.Fatal(err)
	}
	<-sub.errandOf().done
	if r := h.tool(p, nucleus.ManagePods, wait).result(t); r.State != "ended" {
		t.Errorf("%+v", r)
	}
}
