package node

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	approvals "cal/approval/client"
	"cal/guest"
	"cal/nucleus"
	"cal/wire"
)

const filesAsk = `{"operations":{"write_files":"ask","read_files":"always","edit_files":"ask"},"paths":{"roots":"any"}}`

// A task lets through what its pattern describes, as often as it says; each use is counted by the
// authority and stands in the log. What the pattern does not describe asks anew.
func TestTask(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", json.RawMessage(filesAsk)), nil)
	write := func(path string) answer { return h.tool(p, nucleus.WriteFiles, writeArgs(path)) }
	ask := write("src/a").want(t, nucleus.KindApproval).Ask
	h.authority.grantTask(ask, 3, func(k *nucleus.Task) { k.Match.Files.Root = "src" })
	write("src/a").want(t, "")
	write("src/deeper/b").want(t, "")
	other := write("c").want(t, nucleus.KindApproval).Ask
	edit := h.tool(p, nucleus.EditFiles, map[string]any{"path": "src/a", "edits": []map[string]string{{"old": "x", "new": "y"}}})
	if e := edit.Error; e == nil || e.Kind == nucleus.KindApproval && e.Ask == ask {
		t.Errorf("another operation: %+v", edit)
	}
	write("src/c").want(t, "")
	fourth := write("src/d").want(t, nucleus.KindApproval).Ask
	if other == ask || fourth == ask || fourth == other || written(p, "c") || written(p, "src/d") {
		t.Errorf("asks %s %s %s", ask, other, fourth)
	}
	uses := h.entries(nucleus.KindApprovalUse, "")
	if len(uses) != 3 {
		t.Fatalf("uses %+v", uses)
	}
	permits := map[string]bool{}
	for i, u := range uses {
		var d struct {
			N, Of int
			Task  *nucleus.Task
		}
		if err := json.Unmarshal(u.Data, &d); err != nil || d.N != i+1 || u.Ask != ask || (d.Task != nil) != (i == 0) || u.Permit == "" {
			t.Errorf("use %d: %+v %s, %v", i+1, u, u.Data, err)
		}
		permits[u.Permit] = true
	}
	for _, e := range h.entries(nucleus.KindIntent, nucleus.WriteFiles) {
		if e.Verdict == nucleus.Ask && e.Permit != "" && !permits[e.Permit] {
			t.Errorf("an intent without a use: %+v", e)
		}
	}
	eventually(t, "three outcomes reported", func() bool {
		h.authority.mu.Lock()
		defer h.authority.mu.Unlock()
		return len(h.authority.reports) == 3 && h.authority.reports[0].Status == nucleus.OutcomeDone
	})
}

// The node counts for itself: an authority that says yes for ever is not enough.
func TestTaskIsCountedHere(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("w", json.RawMessage(filesAsk)), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.authority.grantTask(ask, 2, func(k *nucleus.Task) { k.Match.Files.Root = "." })
	for _, name := range []string{"a", "b"} {
		h.tool(p, nucleus.WriteFiles, writeArgs(name)).want(t, "")
	}
	p.root.mu.Lock()
	p.root.passages[0].uses = 0 // as after a fault
	p.root.mu.Unlock()
	if again := h.tool(p, nucleus.WriteFiles, writeArgs("c")).want(t, nucleus.KindApproval).Ask; again == ask || written(p, "c") {
		t.Errorf("a third use of two: ask %s", again)
	}
}

// A task ends with its time, when the session takes more than was told, and with its node.
func TestTaskEnds(t *testing.T) {
	t.Parallel()
	for what, end := range map[string]func(*host, *Pod){
		"time":     func(h *host, _ *Pod) { h.clock.pass(31 * time.Minute) },
		"exposure": func(h *host, p *Pod) { h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "") },
		"node":     func(h *host, _ *Pod) { h.restart() },
		"kill":     func(h *host, _ *Pod) { h.kill(); h.start() },
		"nothing":  func(*host, *Pod) {},
	} {
		h := newHost(t, withAuthority)
		p := h.pod(specOf("w", json.RawMessage(filesAsk)), map[string]string{"a": "secret"})
		ask := h.tool(p, nucleus.WriteFiles, writeArgs("x1")).want(t, nucleus.KindApproval).Ask
		h.authority.grantTask(ask, 20, func(k *nucleus.Task) { k.Match.Files.Root = "." })
		h.tool(p, nucleus.WriteFiles, writeArgs("x1")).want(t, "")
		end(h, p)
		p, err := h.node.pod(p.record.ID)
		if err != nil {
			t.Fatal(err)
		}
		a := h.tool(p, nucleus.WriteFiles, writeArgs("x2"))
		if ended := a.Error != nil && a.Error.Kind == nucleus.KindApproval && a.Error.Ask != ask; ended == (what == "nothing") || written(p, "x2") == ended {
			t.Errorf("%s: %v", what, a)
		}
	}
}

// Grants that an authority hands out for bounds which nobody may grant are refused.
func TestTaskOutOfBounds(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", json.RawMessage(filesAsk)), nil)
	for what, change := range map[string]func(*nucleus.Task){
		"uses": func(k *nucleus.Task) { k.Uses = 21 }, "time": func(k *nucleus.Task) { k.Until += 3_600_000 }, "over": func(k *nucleus.Task) { k.Until = 1 },
		"exposure": func(k *nucleus.Task) { k.Exposure = ^nucleus.Legs(0) }, "another": func(k *nucleus.Task) { k.Match.Files.Root = "elsewhere" },
		"no pattern": func(k *nucleus.Task) { k.Match = nucleus.Match{} },
	} {
		ask := h.tool(p, nucleus.WriteFiles, writeArgs(what)).want(t, nucleus.KindApproval).Ask
		h.authority.grantTask(ask, 2, change)
		h.tool(p, nucleus.WriteFiles, writeArgs(what)).want(t, nucleus.KindRefused, "task")
		if written(p, what) {
			t.Errorf("%s: it was done", what)
		}
	}
}

// A push of a task goes to the remote and the refs that were shown.
func TestTaskOfPushes(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	person := newPersonRepo(t)
	p := h.pod(person.spec("", policyOf("git_push=ask")), nil)
	ask := h.tool(p, nucleus.GitPush, map[string]string{"branch": "agent/work"}).want(t, nucleus.KindApproval).Ask
	h.authority.grantTask(ask, 5, func(k *nucleus.Task) { k.Match.Push.Ref = "refs/heads/agent/**" })
	h.tool(p, nucleus.GitPush, map[string]string{"branch": "agent/work"}).want(t, "")
	if person.at("agent/work") == "" {
		t.Error("nothing was pushed")
	}
	action := nucleus.Action{Op: nucleus.GitPush, Push: &nucleus.Push{Repo: "app", Remote: person.Remote, Ref: "refs/heads/agent/other", Old: zeroID, New: strings.Repeat("1", 40)}}
	standing := func() bool {
		p.root.mu.Lock()
		defer p.root.mu.Unlock()
		return p.root.passage(p.record.ID, action, h.clock.now()) != nil
	}
	if !standing() {
		t.Error("another branch that was shown asks anew")
	}
	for what, change := range map[string]func(*nucleus.Push){
		"main": func(q *nucleus.Push) { q.Ref = "refs/heads/main" }, "another remote": func(q *nucleus.Push) { q.Remote += "x" }, "one that drops commits": func(q *nucleus.Push) { q.Drops = true },
	} {
		push := *action.Push
		change(&push)
		kept := action.Push
		action.Push = &push
		if standing() {
			t.Errorf("%s is let through", what)
		}
		action.Push = kept
	}
}

// What a person takes back is not used: a grant before its first use, a task, a passage with the
// connections in it. Both are recorded.
func TestRevoked(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects("read_files write_files=ask net_connect web_fetch", site))
	write := func(path string) answer { return h.tool(p, nucleus.WriteFiles, writeArgs(path)) }

	unused := write("x").want(t, nucleus.KindApproval).Ask
	h.authority.grant(unused, nil)
	h.authority.revoke(unused, "changed my mind")
	write("x").want(t, nucleus.KindRefused, "took the approval back: changed my mind")
	if written(p, "x") {
		t.Error("it was done")
	}

	task := write("b").want(t, nucleus.KindApproval).Ask
	h.authority.grantTask(task, 9, func(k *nucleus.Task) { k.Match.Files.Root = "." })
	write("b").want(t, "")
	h.authority.revoke(task, "")
	if again := write("c").want(t, nucleus.KindApproval).Ask; again == task || written(p, "c") {
		t.Errorf("ask %s", again)
	}

	id := h.asks(h.get(p, site)).Ask
	h.authority.grant(id, nil)
	h.get(p, site).want(t, "")
	tunnel, a := h.through(p, site)
	if tunnel == nil {
		t.Fatal(a)
	}
	began := time.Now()
	h.authority.revoke(id, "enough")
	tunnel.SetReadDeadline(time.Now().Add(patience))
	if _, err := tunnel.from.ReadByte(); err == nil {
		t.Error("the connection says something")
	}
	took := time.Since(began)
	t.Logf("a connection was closed %v after its passage was taken back", took)
	if took > time.Second {
		t.Errorf("closed after %v", took)
	}
	hits := site.hits.Load()
	if again := h.asks(h.get(p, site)).Ask; again == id || site.hits.Load() != hits {
		t.Errorf("ask %s", again)
	}
	var recorded []string
	eventually(t, "the revocations in the log", func() bool {
		recorded = nil
		for _, e := range h.entries(nucleus.KindApprovalRevoke, "") {
			recorded = append(recorded, e.Ask)
		}
		return len(recorded) == 3
	})
	if want := strings.Join([]string{unused, task, id}, " "); strings.Join(recorded, " ") != want {
		t.Errorf("recorded %v, want %v", recorded, want)
	}
}

// A task is used by word of the authority alone: also where the node has not heard yet that it was
// taken back.
func TestRevokedTask(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", json.RawMessage(filesAsk)), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.authority.grantTask(ask, 9, func(k *nucleus.Task) { k.Match.Files.Root = "." })
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	h.authority.answer(ask, approvals.Status{State: approvals.Revoked})
	if again := h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval).Ask; again == ask || written(p, "b") {
		t.Errorf("ask %s", again)
	}
	h.authority.grantTask(h.authority.asked()[1].ID, 9, func(k *nucleus.Task) { k.Match.Files.Root = "." })
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, "")
	h.authority.stop()
	h.tool(p, nucleus.WriteFiles, writeArgs("c")).want(t, nucleus.KindUnavailable, "the authority does not run")
	if written(p, "c") {
		t.Error("it was done without the authority's word")
	}
}

// Where the authority has not been heard of for a lease, nobody knows what was taken back: passages
// let nothing through, and what went through them is closed. They stand again when it is back.
func TestPassagesNeedTheAuthority(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	id := h.asks(h.get(p, site)).Ask
	h.authority.grant(id, nil)
	h.get(p, site).want(t, "")
	tunnel, a := h.through(p, site)
	if tunnel == nil {
		t.Fatal(a)
	}
	silence := func(yes bool) {
		h.authority.mu.Lock()
		h.authority.answers = !yes
		close(h.authority.changed)
		h.authority.changed = make(chan struct{})
		h.authority.mu.Unlock()
	}
	silence(true)
	h.ticks.Add(int64(approvals.Lease))
	hits := site.hits.Load()
	h.get(p, site).want(t, nucleus.KindUnavailable)
	h.node.suspendPassages() // as its timer does
	tunnel.SetReadDeadline(time.Now().Add(patience))
	if _, err := tunnel.from.ReadByte(); err == nil {
		t.Errorf("the connection stays open: %v", err)
	}
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "") // the rest goes on
	if site.hits.Load() != hits {
		t.Error("somebody came")
	}
	silence(false)
	eventually(t, "the passage stands again", func() bool { return h.get(p, site).Error == nil })
}

// An authority whose database was begun anew knows nothing of what was granted before: passages end,
// though it has taken back no fewer than the one before, none.
func TestPassagesEndWithTheDatabase(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	h.authority.grant(h.asks(h.get(p, site)).Ask, nil)
	h.get(p, site).want(t, "")
	h.authority.mu.Lock()
	h.authority.database = "db-2"
	close(h.authority.changed)
	h.authority.changed = make(chan struct{})
	h.authority.mu.Unlock()
	eventually(t, "the passage ends", func() bool {
		a := h.get(p, site)
		return a.Error != nil && a.Error.Kind == nucleus.KindApproval
	})
}

// A machine that requires another user's authority lets nothing through a passage by the word of
// one that is not, and is told by no other what was taken back.
func TestPassagesOfAnotherUser(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	id := h.asks(h.get(p, site)).Ask
	h.authority.grant(id, nil)
	h.get(p, site).want(t, "")
	p.record.Spec.Approvals = approvals.RequireOtherUser
	if told, err := h.node.link(p.record.Spec).client.Watch(h.context(), "w-1", approvals.Watched{}); err == nil {
		t.Errorf("the same user's authority is heard: %+v", told)
	}
	hits := site.hits.Load()
	h.get(p, site).want(t, nucleus.KindUnavailable)
	if site.hits.Load() != hits {
		t.Error("somebody came, by the word of the same user's authority")
	}
	p.record.Spec.Approvals = ""
	h.authority.revoke(id, "enough")
	eventually(t, "the passage ends", func() bool {
		a := h.get(p, site)
		return a.Error != nil && a.Error.Kind == nucleus.KindApproval
	})
}

// The timer of the lease runs from when the node asked.
func TestWatchLease(t *testing.T) {
	var now time.Duration
	lapsed := make(chan struct{}, 1)
	w := watch{clock: func() time.Duration { return now }, lapse: func() { lapsed <- struct{}{} }}
	if w.fresh() {
		t.Error("fresh before a word")
	}
	now = time.Hour
	w.answered(now - approvals.Lease + 20*time.Millisecond)
	if !w.fresh() {
		t.Error("not fresh")
	}
	<-lapsed
	now += 20 * time.Millisecond
	if w.fresh() {
		t.Error("fresh after the lease")
	}
}

// A node that starts takes back what an earlier one asked, and records the uses that the authority
// counted for it and of which the log knows nothing.
func TestLeftApprovals(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("w", json.RawMessage(filesAsk)), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	permit := h.entries(nucleus.KindApprovalUse, "")[0].Permit
	h.kill()
	h.authority.mu.Lock()
	h.authority.left = nil
	h.authority.uses[ask] = []string{permit, "r-lost"}
	h.authority.mu.Unlock()
	h.start()
	uses := h.entries(nucleus.KindApprovalUse, "")
	if len(uses) != 2 || uses[1].Permit != "r-lost" || uses[1].Status != nucleus.OutcomeUnknown || uses[1].Ask != ask || uses[0].Status != "" {
		t.Errorf("uses %+v", uses)
	}
	h.authority.mu.Lock()
	left := fmt.Sprint(h.authority.left)
	h.authority.mu.Unlock()
	if left != "["+p.record.ID+"]" {
		t.Errorf("withdrawn %s", left)
	}
	// And what a pod asked goes with it.
	if err := h.node.DeletePod(t.Context(), "test", p.record.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the withdrawal of a pod that has ended", func() bool {
		h.authority.mu.Lock()
		defer h.authority.mu.Unlock()
		return len(h.authority.left) == 2
	})
}

// 100 retries of one ask are one effect.
func TestConcurrentRetries(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	before := len(h.inside(p).permits())
	h.authority.grant(ask, nil)
	const callers = 100
	answers := make(chan answer, callers)
	for range callers {
		go func() { answers <- h.tool(p, nucleus.WriteFiles, writeArgs("a")) }()
	}
	done := 0
	for range callers {
		a := <-answers
		switch {
		case a.Error == nil:
			done++
		case a.Error.Kind != nucleus.KindApproval && a.Error.Kind != nucleus.KindRefused:
			t.Errorf("%v", a)
		}
	}
	uses := h.entries(nucleus.KindApprovalUse, "")
	if permits := len(h.inside(p).permits()) - before; done != 1 || permits != 1 || len(uses) != 1 {
		t.Errorf("%d of %d retries did it, %d permits, %d uses", done, callers, permits, len(uses))
	}
}

// The node dies at each step of an approval: there is never a second effect, what was used up and
// had no outcome stands in the log as unknown, nothing is done again by itself, and the next ask
// is a new one.
func TestKillAtEachStep(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		step             string
		effects          int // of the ask
		lost, unfinished int // entries with the status unknown: uses, outcomes
	}{
		{"nothing", 1, 0, 0}, {"asked", 0, 0, 0}, {"submitted", 0, 0, 0}, {"granted", 0, 0, 0}, {"counted", 0, 1, 0}, {"admitted", 0, 0, 1}, {"done", 1, 0, 1},
	} {
		h := newHost(t, withAuthority)
		p := h.pod(specOf("w", json.RawMessage(filesAsk)), nil)
		effects := 0
		var once sync.Once
		var killing sync.WaitGroup
		var dead atomic.Bool
		at := func(step string) {
			if step == c.step {
				once.Do(func() {
					killing.Add(1)
					h.kill()
					dead.Store(true)
					killing.Done()
				})
			}
		}
		h.authority.mu.Lock()
		h.authority.at = at
		h.authority.mu.Unlock()
		h.behaves(func(_ *inside, call *callInside) (guest.CallResult, bool) {
			if len(call.permit.Grants) == 0 {
				return call.honest(), true
			}
			if at("admitted"); dead.Load() {
				return guest.CallResult{}, false
			}
			effects++
			result := call.honest()
			at("done")
			return result, !dead.Load()
		})
		node := h.node
		call := func() {
			r := request{caller: wire.Caller{KeyID: p.record.Boot}, op: nucleus.WriteFiles, args: document(t, writeArgs("a")), signed: &wire.SignedRequest{}}
			_, _ = node.request(h.context(), p, r)
			killing.Wait() // the call ends when the node has begun to die
		}
		call()
		asks := h.authority.asked()
		if len(asks) == 1 && !dead.Load() {
			h.authority.grant(asks[0].ID, nil)
			at("granted")
			if !dead.Load() {
				call()
			}
		}
		if dead.Load() != (c.step != "nothing") {
			t.Fatalf("%s: not reached", c.step)
		}
		if dead.Load() {
			h.start()
			dead.Store(false)
		}
		if effects != c.effects {
			t.Errorf("killed when %s: %d effects, want %d", c.step, effects, c.effects)
		}
		lost, unfinished := 0, 0
		for _, e := range h.log() {
			if e.Status == nucleus.OutcomeUnknown && e.Kind == nucleus.KindApprovalUse {
				lost++
			}
			if e.Status == nucleus.OutcomeUnknown && e.Kind == nucleus.KindOutcome {
				unfinished++
			}
		}
		if lost != c.lost || unfinished != c.unfinished {
			t.Errorf("killed when %s: %d uses and %d outcomes are unknown, want %d and %d", c.step, lost, unfinished, c.lost, c.unfinished)
		}
		p, err := h.node.pod(p.record.ID)
		if err != nil {
			t.Fatal(err)
		}
		next := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
		if len(asks) == 1 && next == asks[0].ID || effects != c.effects {
			t.Errorf("killed when %s: ask %s again, %d effects", c.step, next, effects)
		}
		h.authority.grant(next, nil)
		h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
		if effects != c.effects+1 {
			t.Errorf("killed when %s: %d effects after the next grant", c.step, effects)
		}
	}
}

// Where the node cannot know which grants were used, nobody is asked, and the rest goes on.
func TestSpentCannotBeRead(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("w", json.RawMessage(filesAsk)), map[string]string{"b": "text"})
	if err := h.node.Close(); err != nil {
		t.Fatal(err)
	}
	file := h.node.spentFile()
	h.node = nil
	for _, name := range []string{file + "-wal", file + "-shm"} {
		os.Remove(name)
	}
	if err := os.WriteFile(file, bytes.Repeat([]byte("not a database. "), 512), 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	p, err := h.node.pod(p.record.ID)
	if err != nil {
		t.Fatal(err)
	}
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval, file, "moved away")
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "b"}).want(t, "")
	if n := len(h.authority.asked()); n != 0 || written(p, "a") {
		t.Errorf("%d asks", n)
	}
	if err := h.node.Close(); err != nil {
		t.Fatal(err)
	}
	h.node = nil
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	h.start()
	if p, err = h.node.pod(p.record.ID); err != nil {
		t.Fatal(err)
	}
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
}
