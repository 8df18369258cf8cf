package node

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"cal/guest"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

// Two calls that wait for one ask: one pod is made, and the other call takes nothing of its.
func TestDelegationOneAskTwoCalls(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	var own map[string]any
	if err := json.Unmarshal(policyOf(ordinary+" manage_pods=ask"), &own); err != nil {
		t.Fatal(err)
	}
	own["budget"] = object{"usd": 5}
	p := h.pod(specOf("w", document(t, own)), nil)
	asked := object{"action": "create", "policy": object{"operations": object{"read_files": "always"}, "budget": object{"usd": 3}}}
	ask := h.tool(p, nucleus.ManagePods, asked).want(t, nucleus.KindApproval).Ask
	var wg sync.WaitGroup
	got := make([]answer, 6)
	for i := range got {
		wg.Go(func() { got[i] = h.tool(p, nucleus.ManagePods, asked, "wait=2") })
	}
	h.authority.grant(ask, nil)
	wg.Wait()
	made := 0
	for _, a := range got {
		if a.Status == http.StatusOK {
			made++
		} else {
			t.Log(a)
		}
	}
	if made != 1 || len(h.node.below(p)) != 1 {
		t.Fatalf("%d made, %d below", made, len(h.node.below(p)))
	}
	sub := h.node.below(p)[0].Pod
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	account := p.root.budget.Accounts[sub]
	if p.root.making != 0 || account == nil || account.Closed || account.Limit.MicroUSD != 3_000_000 {
		t.Errorf("%d places are taken by nobody; the pod's account is %+v", p.root.making, account)
	}
}

// The log cannot be written when a machine ends: the machines below it end all the same.
func TestDelegatedPodsEndWithoutALog(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	disk := h.memoryLog()
	p := h.pod(specOf("w", policyOf(delegating)), nil)
	child := h.create(p, object{})
	other := h.create(p, object{})
	grandchild := h.create(child, object{})
	disk.failing(func(string) error { return errors.New("no space left on device") })
	h.driver.Kill(machineDir(p.dir))
	<-p.gone
	for _, q := range []*Pod{grandchild, child, other} {
		eventually(t, "nothing is left of "+q.record.ID, func() bool { return !q.holds() && q.ended() != "" })
	}
	disk.failing(nil)
}

// Asks of a session for places: sub-pods do not multiply them.
func TestDelegationAsksForPlaces(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("w", policyOf(ordinary+" manage_pods web_fetch=ask")), nil)
	fetch := func(of *Pod, i int) answer {
		return h.tool(of, nucleus.WebFetch, object{"url": "https://h" + strconv.Itoa(i) + ".example/"})
	}
	for round := range 3 {
		child := h.create(p, object{})
		for i := range maxOpenAsks {
			fetch(child, 100*round+i)
		}
		if round == 0 {
			continue
		}
		h.end(p, child)
	}
	fetch(p, 1000)
	if n := len(h.authority.asked()); n > maxOpenAsks {
		t.Errorf("%d asks of one session wait, want at most %d", n, maxOpenAsks)
	}
}

// What a tree of pods makes the host store counts as one session's.
func TestDelegationStorage(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(h *host) { h.storage = Limits{Transfer: 4 << 20, Pod: 6 << 20, Node: 1 << 30} })
	repo := newPersonRepo(t)
	p := h.pod(repo.spec("w", policyOf(delegating)), nil)
	child, other := h.create(p, object{}), h.create(p, object{})
	hold := func(of *Pod) error {
		q, err := h.node.newTransfer(h.context(), of, of.record.Repos[0], of.transfersDir())
		if err != nil {
			return err
		}
		t.Cleanup(q.drop)
		return q.charge(3 << 20)
	}
	if err := hold(child); err != nil {
		t.Fatal(err)
	}
	if err := hold(other); err == nil {
		t.Error("two pods of one session store more than one may")
	}
}

// Nothing of the host is named to an agent whose pod does not come to be.
func TestDelegationNamesNoHost(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	repo := newPersonRepo(t)
	p := h.pod(repo.spec("w", policyOf(delegating)), nil)
	h.inside(p).commit("a", "a\n")
	h.mu.Lock()
	h.repo = func(m *inside, s *wire.Stream, call guest.RepoCall) bool {
		if call.In == nil {
			return false
		}
		s.SendJSON(wire.FrameResult, tools.Result{Error: nucleus.Errorf(nucleus.KindFailed, "no")})
		return true
	}
	h.mu.Unlock()
	a := h.createTry(p, object{})
	a.want(t, nucleus.KindFailed)
	if strings.Contains(a.Body, filepath.Dir(h.home)) {
		t.Errorf("told the agent: %v", a)
	}
}

// A machine names a commit of the person's that it was not given: nothing of it goes along.
func TestDelegationCarriesNothingElse(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	repo := newPersonRepo(t)
	repo.git(repo.Dir, "checkout", "--quiet", "-b", "hidden")
	hidden := repo.commit("hidden.txt", "not handed over\n")
	repo.git(repo.Dir, "checkout", "--quiet", "main")
	p := h.pod(repo.spec("w", policyOf(delegating)), nil)
	in := h.inside(p)
	if _, err := in.git("app", "cat-file", "-e", hidden); err == nil {
		t.Fatal("the machine has it already")
	}
	head, _ := in.git("app", "rev-parse", "HEAD")
	tree, _ := in.git("app", "rev-parse", "HEAD^{tree}")
	raw := "tree " + tree + "\nparent " + head + "\nparent " + hidden + "\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nx\n"
	cmd := exec.Command("git", "hash-object", "-t", "commit", "-w", "--stdin", "--literally")
	cmd.Dir, cmd.Stdin = in.dir("app"), strings.NewReader(raw)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	forged := strings.TrimSpace(string(out))
	cmd = exec.Command("git", "pack-objects", "-q", "--stdout")
	cmd.Dir, cmd.Stdin = in.dir("app"), strings.NewReader(forged+"\n")
	pack, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	h.repo = func(m *inside, s *wire.Stream, call guest.RepoCall) bool {
		if call.Out == nil || m != in {
			return false
		}
		bundle := append([]byte("# v2 git bundle\n"+forged+" "+call.Out.Ref+"\n\n"), pack...)
		sendBundle(s, bundle)
		value, _ := json.Marshal(tools.BundleResult{Ref: call.Out.Ref, Commit: forged})
		s.SendJSON(wire.FrameResult, tools.Result{Value: value})
		return true
	}
	h.mu.Unlock()
	a := h.createTry(p, object{})
	if a.Status != http.StatusOK {
		t.Log(a)
		return
	}
	sub, _ := h.node.pod(h.node.below(p)[0].Pod)
	if text, err := h.inside(sub).git("app", "show", hidden+":hidden.txt"); err == nil {
		t.Errorf("the child has %q", text)
	}
}

// The machine above ends while the next node takes up the ones below: they end too.
func TestDelegationAdoptedUnderADeadParent(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(delegating)), nil)
	child := h.create(p, object{})
	h.kill()
	killed := false
	h.onAttach = func(m *inside) {
		if m.boot.Pod != child.record.ID || killed {
			return
		}
		killed = true
		h.driver.Kill(machineDir(p.dir))
		eventually(t, "the node has ended the one above", func() bool { _, err := os.Stat(p.dir); return os.IsNotExist(err) })
	}
	h.start()
	if !killed {
		t.Fatal("control: the machine above was not killed")
	}
	eventually(t, "nothing is left of the one below", func() bool {
		_, err := os.Stat(child.dir)
		return os.IsNotExist(err)
	})
}

// The longest task in its longest writing can be started, and is in the log.
func TestSpawnLongestTask(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.spawning(func(_ *inside, program guest.AgentProgram, s *wire.Stream) {
		s.SendJSON(wire.FrameResult, guest.AgentExit{})
	})
	for _, c := range []string{"x", "\"", "\n", "\x01"} {
		a := h.tool(p, nucleus.SpawnAgent, object{"task": "x" + strings.Repeat(c, tools.MaxTask-1)})
		if a.Status != http.StatusOK {
			t.Errorf("%q: %v", c, a)
		}
	}
}
