package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	approvals "cal/approval/client"
	"cal/guest"
	"cal/nucleus"
	"cal/wire"
)

// transfers are the quarantines that a pod's requests have left, and what is counted of them.
func (h *host) transfers(p *Pod) (dirs []string, bytes int64) {
	h.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(p.transfersDir(), "*"))
	if err != nil {
		h.t.Fatal(err)
	}
	h.node.storage.mu.Lock()
	defer h.node.storage.mu.Unlock()
	return dirs, h.node.storage.stored.sessions[p.record.Session]
}

func (h *host) wantTransfers(p *Pod, what string, n int) {
	h.t.Helper()
	dirs, bytes := h.transfers(p)
	if len(dirs) != n || (bytes > 0) != (n > 0) {
		h.t.Errorf("%s: %d quarantines, %d bytes counted; want %d", what, len(dirs), bytes, n)
	}
}

// watchTransfers counts how often the machine is asked for a branch.
func (h *host) watchTransfers() *atomic.Int32 {
	var asked atomic.Int32
	h.mu.Lock()
	defer h.mu.Unlock()
	h.repo = func(_ *inside, _ *wire.Stream, call guest.RepoCall) bool {
		if call.Out != nil {
			asked.Add(1)
		}
		return false
	}
	return &asked
}

// Of what the policy never allows, or what asks where nobody can approve, nothing is
// taken from the machine; the refusal is the policy's and stands in the log.
func TestNothingTakenForWhatIsRefused(t *testing.T) {
	t.Parallel()
	h := newHost(t) // no authority
	person := newPersonRepo(t)
	asked := h.watchTransfers()
	for name, c := range map[string]struct {
		policy json.RawMessage
		kind   nucleus.Kind
		rule   string
	}{
		"never":   {policyOf("read_files"), nucleus.KindDenied, "operations."},
		"window":  {json.RawMessage(`{"operations":{"git_push":"always","create_pr":"always"},"window":{"until":"2020-01-01T00:00:00Z"}}`), nucleus.KindDenied, "window"},
		"asks":    {policyOf("git_push=ask create_pr=ask"), nucleus.KindApproval, "operations."},
		"control": {pushes, "", ""},
	} {
		p := h.pod(person.spec("", c.policy), nil)
		remoteIsForge(t, p, "https://github.com/o/app")
		h.inside(p).commit("new.txt", "x\n")
		before := asked.Load()
		for op, args := range map[nucleus.Op]any{nucleus.GitPush: pushTo("agent/work"), nucleus.CreatePR: map[string]string{"title": "t", "body": "b"}} {
			if c.kind == "" {
				remoteIsForge(t, p, person.Remote)
				if op == nucleus.GitPush {
					h.tool(p, op, args).want(t, "")
				}
				continue
			}
			if e := h.tool(p, op, args).want(t, c.kind); !strings.HasPrefix(e.Rule, c.rule) {
				t.Errorf("%s: %s: rule %q, want %q", name, op, e.Rule, c.rule)
			}
			entries := h.entries(nucleus.KindIntent, op)
			last := entries[len(entries)-1]
			if last.Status != nucleus.OutcomeRefused || !strings.HasPrefix(last.Rule, c.rule) || !strings.Contains(string(last.Args), "app") {
				t.Errorf("%s: %s: entry %+v", name, op, last)
			}
		}
		if took := asked.Load() > before; took != (c.kind == "") {
			t.Errorf("%s: the machine was asked for a branch: %v", name, took)
		}
		if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// What was taken for a request goes when the request is over, whatever became of it; what
// waits for a person is kept once, and goes with the answer.
func TestQuarantineGoes(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	person := newPersonRepo(t)
	p := h.pod(person.spec("w", policyOf("git_push=ask")), nil)
	m := h.inside(p)
	m.commit("new.txt", "x\n")
	push := func() answer { return h.tool(p, nucleus.GitPush, pushTo("agent/work")) }

	h.tool(p, nucleus.GitPush, pushTo("no-such-branch")).want(t, nucleus.KindFailed)
	h.wantTransfers(p, "not there", 0)
	ask := push().want(t, nucleus.KindApproval).Ask
	h.wantTransfers(p, "asked", 1)
	for range 3 {
		push().want(t, nucleus.KindApproval)
	}
	h.wantTransfers(p, "asked again", 1)
	h.authority.deny(ask, "")
	push().want(t, nucleus.KindRefused)
	h.wantTransfers(p, "denied", 0)

	ask = push().want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, func(a *nucleus.AskRequest) { a.Nonce = "n-other" })
	push().want(t, nucleus.KindRefused, "grant")
	h.wantTransfers(p, "a bad grant: the ask goes on", 1)
	h.authority.grant(ask, nil)
	push().want(t, "")
	if person.at("agent/work") == "" {
		t.Error("control: nothing was pushed")
	}
	h.wantTransfers(p, "pushed", 0)

	// A second ask whose time runs out without anybody coming back for it.
	m.commit("more.txt", "x\n")
	push().want(t, nucleus.KindApproval)
	h.clock.pass(askLife + time.Second)
	m.commit("still.txt", "x\n")
	push().want(t, nucleus.KindApproval)
	h.wantTransfers(p, "one ran out", 1)
	h.authority.answer(h.authority.asked()[len(h.authority.asked())-1].ID, approvals.Status{State: approvals.Expired})
	push().want(t, nucleus.KindRefused)
	h.wantTransfers(p, "all ran out", 0)

	// What waits when the node, or the pod, ends.
	push().want(t, nucleus.KindApproval)
	h.wantTransfers(p, "waits", 1)
	h.restart()
	p, err := h.node.pod(p.record.ID)
	if err != nil {
		t.Fatal(err)
	}
	h.wantTransfers(p, "after a restart", 0)
	push().want(t, nucleus.KindApproval)
	h.wantTransfers(p, "waits", 1)
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	h.wantTransfers(p, "after the pod", 0)
	if s := &h.node.storage; s.stored.all != 0 || s.waiting.all != 0 {
		t.Errorf("counted for nobody: %d bytes, %d of them waiting", s.stored.all, s.waiting.all)
	}
}

// What a machine sends is bounded: one branch, all of a pod, all of a node. A refusal
// gives back what had come, and others go on.
func TestQuarantineLimits(t *testing.T) {
	t.Parallel()
	noise := func(n int) string {
		raw := make([]byte, n)
		for i := range raw {
			raw[i] = byte(rand.Uint32())
		}
		return string(raw)
	}
	const mib = 1 << 20
	h := newHost(t, withAuthority, func(h *host) { h.storage = Limits{Transfer: 2 * mib, Pod: 5 * mib, Node: 6 * mib} })
	person := newPersonRepo(t)
	one := h.pod(person.spec("one", policyOf("git_push=ask")), nil)
	two := h.pod(person.spec("two", policyOf("git_push=ask")), nil)
	// push asks for a branch of its own with so many bytes in it.
	push := func(p *Pod, branch string, bytes int) answer {
		m := h.inside(p)
		gitMust(m, "checkout", "--quiet", "-b", branch, p.record.Repos[0].Base)
		m.commit(branch, noise(bytes))
		return h.tool(p, nucleus.GitPush, pushTo(branch))
	}
	push(one, "too-large", 3*mib).want(t, nucleus.KindTooLarge, "larger than")
	h.wantTransfers(one, "too large", 0)
	push(one, "a", mib).want(t, nucleus.KindApproval)
	push(one, "b", mib).want(t, nucleus.KindApproval)
	push(one, "c", mib).want(t, nucleus.KindTooLarge, "session "+one.record.Session)
	h.wantTransfers(one, "its room is full", 2)
	push(two, "a", mib).want(t, nucleus.KindApproval)
	push(two, "b", mib).want(t, nucleus.KindTooLarge, "all pods")
	h.wantTransfers(two, "the node's room is full", 1)
	push(two, "small", 1000).want(t, nucleus.KindApproval)
	// An answer makes room.
	h.authority.deny(h.authority.asked()[0].ID, "")
	h.tool(one, nucleus.GitPush, pushTo("a")).want(t, nucleus.KindRefused)
	h.tool(two, nucleus.GitPush, pushTo("b")).want(t, nucleus.KindApproval)
	if left, _ := filepath.Glob(filepath.Join(h.node.dirs.Pods(), "*", "bundle-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A request that comes upon a pod's end leaves nothing in the place that was removed: the next
// node would take it for a pod that failed.
func TestTransferAfterTheEnd(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("w", pushes), nil)
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	var pre prepared
	if err := h.node.preparePush(h.context(), p, []byte(`{"branch":"agent/work"}`), &pre); err == nil {
		t.Error("a branch was taken from a machine that is gone")
	}
	pre.sent.drop()
	p.setState(stateRunning, "") // as it was when the request looked
	if err := h.node.preparePush(h.context(), p, []byte(`{"branch":"agent/work"}`), &pre); err == nil {
		t.Error("a branch was taken from a machine that is gone")
	}
	pre.sent.drop()
	if _, err := os.Stat(p.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there again: %v", p.dir, err)
	}
}

// A workspace keeps what was fetched last, and nothing of what was fetched before; a fetch
// that fails leaves what was there.
func TestFetchKeepsTheLast(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("w", pushes), nil)
	m := h.inside(p)
	fetch := func() answer {
		return h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/pods/"+p.record.ID+"/repos/app/fetch", p.record.ID, nil))
	}
	kept := func() string {
		t.Helper()
		stored, err := p.readRepo("app")
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(p.record.Workspace, "repos", stored.Quarantine)
		if at := person.git(dir, "rev-parse", stored.Head+"^{commit}"); at != stored.Head {
			t.Errorf("the quarantine holds %s, want %s", at, stored.Head)
		}
		if dirs, _ := os.ReadDir(p.keptDir("app")); len(dirs) != 1 {
			t.Errorf("%d quarantines are kept", len(dirs))
		}
		return stored.Head
	}
	for i := range 3 {
		head := m.commit("f", strings.Repeat("x", i+1))
		fetch().want(t, "")
		if got := kept(); got != head {
			t.Errorf("kept %s, want %s", got, head)
		}
	}
	before := kept()
	h.mu.Lock()
	h.repo = func(_ *inside, stream *wire.Stream, _ guest.RepoCall) bool {
		sendBundle(stream, bytes.Repeat([]byte("x"), 1000))
		return true
	}
	h.mu.Unlock()
	if a := fetch(); a.Error == nil {
		t.Errorf("%v", a)
	}
	if got := kept(); got != before {
		t.Errorf("kept %s, want %s", got, before)
	}
	h.wantTransfers(p, "at the end", 0)
}
