package node

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"cal/guest"
	"cal/nucleus"
	"cal/policy"
)

// outward is a pod on a host on which every effect outside would be seen.
type outward struct {
	*host
	person *personRepo
	forge  *forge
	p      *Pod
	page   string
	hits   *atomic.Int32
}

func newOutward(t *testing.T, policy func(port string) json.RawMessage, options ...option) *outward {
	t.Helper()
	o := &outward{person: newPersonRepo(t), forge: newForge(t), hits: &atomic.Int32{}}
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		o.hits.Add(1)
		io.WriteString(w, "page")
	}))
	t.Cleanup(site.Close)
	o.page = site.URL + "/"
	_, port, err := net.SplitHostPort(strings.TrimPrefix(site.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	o.host = newHost(t, append(options, o.forge.option)...)
	o.p = o.pod(o.person.spec("", policy(port)), nil)
	o.forge.stands("agent/work", o.inside(o.p).commit("new.txt", "x\n"))
	return o
}

// free allows every way out and nothing beside: no two legs meet.
func free(port string) json.RawMessage {
	return json.RawMessage(`{"operations":{"git_push":"always","create_pr":"always","web_fetch":"always"},"hosts":{"only":[{"host":"127.0.0.1","port":` + port + `}]}}`)
}

func (o *outward) do(op nucleus.Op, query ...string) answer {
	o.t.Helper()
	switch op {
	case nucleus.GitPush:
		return o.tool(o.p, op, pushTo("agent/work"), query...)
	case nucleus.CreatePR:
		remoteIsForge(o.t.(*testing.T), o.p, "https://github.com/o/app")
		defer remoteIsForge(o.t.(*testing.T), o.p, o.person.Remote)
		return o.tool(o.p, op, map[string]string{"title": "t", "body": "b"}, query...)
	}
	return o.tool(o.p, op, map[string]string{"url": o.page}, query...)
}

// happened counts effects outside.
func (o *outward) happened() int {
	pushes := 0
	if o.person.at("agent/work") != "" {
		pushes = 1
	}
	return pushes + o.forge.posts() + int(o.hits.Load())
}

var onHost = []nucleus.Op{nucleus.GitPush, nucleus.CreatePR, nucleus.WebFetch}

func (h *host) behaves(behave func(*inside, *callInside) (guest.CallResult, bool)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.behave = behave
}

// An effect on the host happens when the machine has signed that it admits exactly this
// permit, and not otherwise. Both words are in the log.
func TestMachineAdmits(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		behave func(*inside, *callInside) (guest.CallResult, bool)
		text   string
	}{
		"refuses": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			return m.sign(c.permit, guest.CallResult{Error: nucleus.Errorf(nucleus.KindForbidden, "not with me")}, nucleus.OutcomeRefused), true
		}, "not with me"},
		"hangs up":      {func(*inside, *callInside) (guest.CallResult, bool) { return guest.CallResult{}, false }, "did not admit"},
		"signs nothing": {func(*inside, *callInside) (guest.CallResult, bool) { return guest.CallResult{}, true }, "signed no outcome"},
		"says that it is done": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			return m.sign(c.permit, guest.CallResult{}, nucleus.OutcomeDone), true
		}, "\"done\" of the permit"},
		"signs for another permit": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			other := c.permit
			other.ID = "r-other"
			return m.sign(other, guest.CallResult{}, nucleus.OutcomeAdmitted), true
		}, "another permit"},
		"signs with another key": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			signed, _ := nucleus.Sign(h2key(m), nucleus.DomainOutcome, nucleus.Outcome{Permit: c.permit.ID, Boot: c.permit.Boot, Seq: c.permit.Seq, Status: nucleus.OutcomeAdmitted})
			return guest.CallResult{Outcome: &signed}, true
		}, "bad signature"},
		"the pod ends meanwhile": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			p, _ := m.host.node.pod(m.boot.Pod)
			p.setState(stateStopped, "")
			return c.honest(), true
		}, "is stopped"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, op := range onHost {
				o := newOutward(t, free)
				o.behaves(c.behave)
				a := o.do(op)
				if a.Error == nil || !strings.Contains(a.Error.Message, c.text) || !strings.Contains(a.Error.Message, "nothing was done") {
					t.Errorf("%s: %v, want %q", op, a, c.text)
				}
				if n := o.happened(); n != 0 {
					t.Errorf("%s: %d effects", op, n)
				}
				outcomes := o.entries(nucleus.KindOutcome, op)
				if len(outcomes) != 1 || outcomes[0].Status != nucleus.OutcomeRefused {
					t.Errorf("%s: outcomes %+v", op, outcomes)
				}
				if open := o.node.log.OpenIntents(); len(open) != 0 {
					t.Errorf("%s: open %+v", op, open)
				}
				o.behaves(nil)
				o.p.setState(stateRunning, "")
				if o.do(op).want(t, ""); o.happened() != 1 { // control
					t.Errorf("%s: control: %d effects", op, o.happened())
				}
			}
		})
	}
}

// What the log has of an effect on the host holds the node's word and, in it, the machine's.
func TestBothWordsInTheLog(t *testing.T) {
	t.Parallel()
	o := newOutward(t, free)
	for i, op := range onHost {
		o.do(op).want(t, "")
		entry := o.entries(nucleus.KindOutcome, op)[0]
		permit := o.inside(o.p).permits()[i]
		var node, machine nucleus.Outcome
		if err := entry.Outcome.Open(o.node.key.Public().(ed25519.PublicKey), nucleus.DomainOutcome, &node); err != nil {
			t.Fatal(err)
		}
		if node.Admission == nil {
			t.Fatalf("%s: the node's outcome %+v holds no admission", op, node)
		}
		if err := node.Admission.Open(o.p.record.OutcomeKey, nucleus.DomainOutcome, &machine); err != nil {
			t.Fatal(err)
		}
		if node.Status != nucleus.OutcomeDone || machine.Status != nucleus.OutcomeAdmitted || machine.Permit != permit.ID || node.Permit != permit.ID || permit.Op != op {
			t.Errorf("%s: node %+v, machine %+v, permit %+v", op, node, machine, permit)
		}
	}
}

// A fault of the node's own decision - here a policy that is looser than the one that the
// machine has from its boot - does not get past the machine.
func TestNodeIsLooserThanBoot(t *testing.T) {
	t.Parallel()
	strict := func(port string) json.RawMessage {
		return json.RawMessage(`{"operations":{"git_push":"ask","create_pr":"ask","web_fetch":"ask"},"hosts":{"only":[{"host":"127.0.0.1","port":` + port + `}]}}`)
	}
	o := newOutward(t, strict, withAuthority)
	for _, op := range onHost {
		o.do(op).want(t, nucleus.KindApproval)
	}
	_, port, _ := net.SplitHostPort(strings.TrimSuffix(strings.TrimPrefix(o.page, "http://"), "/"))
	loose, err := policy.Load("loose", free(port))
	if err != nil {
		t.Fatal(err)
	}
	kept := o.p.policy
	o.p.policy = loose
	for _, op := range onHost {
		o.do(op).want(t, nucleus.KindForbidden, "its own decision is stricter")
	}
	if n := o.happened(); n != 0 {
		t.Errorf("%d effects", n)
	}
	o.p.policy = kept
	for _, op := range onHost {
		ask := o.do(op).want(t, nucleus.KindApproval).Ask
		o.authority.grant(ask, nil)
		o.do(op).want(t, "")
	}
	if n := o.happened(); n != 3 {
		t.Errorf("control: %d effects, want 3", n)
	}
}

// Who calls goes away while the machine thinks: nothing is done.
func TestCallerLeavesBeforeAdmission(t *testing.T) {
	t.Parallel()
	o := newOutward(t, free)
	reached, leave := context.WithCancel(o.context())
	o.behaves(func(_ *inside, c *callInside) (guest.CallResult, bool) {
		leave()
		c.stream.Recv(1 << 10) // until the node closes it
		return guest.CallResult{}, false
	})
	a := o.toolContext(reached, o.p, nucleus.GitPush, pushTo("agent/work"))
	a.want(t, nucleus.KindUnavailable, "nothing was done")
	if n := o.happened(); n != 0 {
		t.Errorf("%d effects", n)
	}
}
