package node

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cal/guest"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// asOperatorWaits asks for a push as the person does, whose request outlives the machine.
func (h *host) asOperatorWaits(p *Pod, branch string) <-chan answer {
	h.t.Helper()
	req := h.signed(h.asOperator(), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/git_push?wait=15", p.record.ID, document(h.t, pushTo(branch)))
	n, before := h.node, len(h.authority.asked())
	got := make(chan answer, 1)
	go func() { got <- h.serve(n, req.WithContext(context.WithoutCancel(req.Context()))) }()
	eventually(h.t, "an ask", func() bool {
		asks := h.authority.asked()
		if len(asks) == before {
			return false
		}
		_, ok := p.asks.get(asks[before].ID)
		return ok
	})
	return got
}

func (h *host) lastAsk() string {
	asks := h.authority.asked()
	return asks[len(asks)-1].ID
}

// A grant that arrives when its pod is gone pushes nothing, and that is recorded.
func TestGrantAfterPodEnded(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(h *host, p *Pod){
		"deleted": func(h *host, p *Pod) {
			if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
				h.t.Fatal(err)
			}
		},
		"failed": func(h *host, p *Pod) {
			h.driver.Kill(p.dir + "/machine")
			eventually(h.t, "the node knows", func() bool { return p.status().State == stateFailed })
		},
		"not at all": func(*host, *Pod) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, withAuthority)
			person := newPersonRepo(t)
			p := h.pod(person.spec("w", policyOf("git_push=ask")), nil)
			h.inside(p).commit("new.txt", "x\n")
			got := h.asOperatorWaits(p, "agent/work")
			ask := h.lastAsk()
			end(h, p)
			h.authority.grant(ask, nil)
			a := <-got
			if name == "not at all" {
				if a.want(t, ""); person.at("agent/work") == "" {
					t.Error("control: nothing was pushed")
				}
				return
			}
			a.want(t, nucleus.KindUnavailable, "pod "+p.record.ID)
			if at := person.at("agent/work"); at != "" {
				t.Errorf("the remote has %s", at)
			}
			intents := h.entries(nucleus.KindIntent, nucleus.GitPush)
			if len(intents) != 1 || intents[0].Verdict != nucleus.Deny || intents[0].Rule != rulePod || intents[0].Status != nucleus.OutcomeRefused || intents[0].Ask != ask {
				t.Errorf("recorded: %+v", intents)
			}
			if used := h.entries(nucleus.KindApprovalUse, ""); len(used) != 0 {
				t.Errorf("the grant was used up: %+v", used)
			}
		})
	}
}

// Grant and deletion in the same moment: either the push was decided while the pod lived, and
// the log has it before the pod's end and says truly what came of it; or nothing happens.
func TestGrantWhilePodEnds(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	person := newPersonRepo(t)
	pushed := 0
	for i := range 24 {
		p := h.pod(person.spec("w", policyOf("git_push=ask")), nil)
		branch := "b-" + p.record.ID
		gitMust(h.inside(p), "checkout", "--quiet", "-b", branch)
		h.inside(p).commit("f", p.record.ID)
		got := h.asOperatorWaits(p, branch)
		ask := h.lastAsk()
		// In every second round the end begins when the machine is asked to admit the push.
		begin := make(chan struct{})
		if i%2 == 0 {
			close(begin)
		}
		h.behaves(func(_ *inside, c *callInside) (guest.CallResult, bool) {
			if i%2 == 1 {
				close(begin)
			}
			return c.honest(), true
		})
		var both sync.WaitGroup
		both.Go(func() { h.authority.grant(ask, nil) })
		both.Go(func() {
			<-begin
			if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
				t.Error(err)
			}
		})
		both.Wait()
		a := <-got
		done := person.at(branch) != ""
		if done {
			pushed++
		}
		if done != (a.Status == http.StatusOK) {
			t.Errorf("pushed %v, but the answer is %v", done, a)
		}
		allowed, said, stopped := int64(0), "", int64(0)
		for _, e := range h.log() {
			switch {
			case e.Pod != p.record.ID:
			case e.Kind == nucleus.KindPodStop:
				stopped = e.Seq
			case e.Op == nucleus.GitPush && e.Kind == nucleus.KindIntent && e.Verdict != nucleus.Deny:
				allowed = e.Seq
			case e.Op == nucleus.GitPush && (e.Kind == nucleus.KindOutcome || e.Kind == nucleus.KindIntent):
				said = e.Status
			}
		}
		if allowed > stopped || done && (allowed == 0 || said != nucleus.OutcomeDone) || !done && said != nucleus.OutcomeRefused {
			t.Errorf("pushed %v; intent %d, pod.stop %d, status %q", done, allowed, stopped, said)
		}
	}
	t.Logf("%d of 24 pushed", pushed)
}

// agentStream is the person's end of an agent's stream, as the API gives it.
func (h *host) startAgent(p *Pod, body client.AgentRequest) (*wire.Stream, nucleus.Entry) {
	h.t.Helper()
	machine, start, err := h.node.openAgent(h.context(), p, "operator", body, p.record.Spec.Agent.Argv)
	if err != nil {
		h.t.Fatal(err)
	}
	return machine, start
}

// A start that the machine refuses is taken back in the log; one that it makes is not, and
// neither is a terminal that lost its place.
func TestSessionStartRefused(t *testing.T) {
	t.Parallel()
	busy := nucleus.Errorf(nucleus.KindConflict, "an agent runs in this machine already")
	for name, c := range map[string]struct {
		exit    guest.AgentExit
		refused bool
		ended   bool
	}{
		"busy":          {guest.AgentExit{ExitCode: -1, Error: busy, Refused: true}, true, false},
		"cannot":        {guest.AgentExit{ExitCode: -1, Error: nucleus.Errorf(nucleus.KindFailed, "no such program"), Refused: true}, true, false},
		"taken over":    {guest.AgentExit{ExitCode: -1, Error: busy}, false, false},
		"ran to an end": {guest.AgentExit{ExitCode: 3}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.agent = func(stream *wire.Stream) { stream.SendJSON(wire.FrameResult, c.exit) }
			spec := specOf("", policyOf("read_files"))
			spec.Agent = &nucleus.Agent{Name: "test", Argv: []string{"/agent"}}
			p := h.pod(spec, nil)
			machine, start := h.startAgent(p, client.AgentRequest{})
			defer machine.Close()
			a, b := pipe(t)
			relayed := make(chan struct{})
			go func() {
				defer close(relayed)
				h.node.relayAgent(p, "operator", start, a, machine)
			}()
			var exit client.AgentExit
			if err := b.RecvJSON(wire.FrameResult, 1<<20, &exit); err != nil || exit.ExitCode != c.exit.ExitCode || exit.Refused != c.refused {
				t.Errorf("the person is told %+v, %v", exit, err)
			}
			b.Close()
			<-relayed
			starts, refusals, ends := h.entries(nucleus.KindSessionStart, ""), h.entries(nucleus.KindSessionRefuse, ""), h.entries(nucleus.KindSessionEnd, "")
			if len(starts) != 1 || len(refusals) == 1 != c.refused || len(ends) == 1 != c.ended {
				t.Fatalf("starts %+v, refusals %+v, ends %+v", starts, refusals, ends)
			}
			if c.refused && (refusals[0].Status != nucleus.OutcomeRefused || !strings.Contains(string(refusals[0].Data), c.exit.Error.Message) ||
				!strings.Contains(string(refusals[0].Data), string(document(t, map[string]int64{"start": starts[0].Seq}))[1:10])) {
				t.Errorf("refusal %+v of %d", refusals[0], starts[0].Seq)
			}
		})
	}
}

// Every run of the agent that was started has its end in the log, once: by the machine's
// word, whoever is there to hear it, or with the end of the machine.
func TestSessionEndIsRecorded(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		leaves, restart bool // the terminal, the node
		says            func(start int64) *guest.AgentExit
		code            int
		why             string
	}{
		"both say it":              {false, false, func(start int64) *guest.AgentExit { return &guest.AgentExit{Start: start, ExitCode: 3} }, 3, ""},
		"nobody is at a terminal":  {true, false, func(start int64) *guest.AgentExit { return &guest.AgentExit{Start: start, ExitCode: 3} }, 3, ""},
		"the next node hears it":   {true, true, func(start int64) *guest.AgentExit { return &guest.AgentExit{Start: start, ExitCode: 3} }, 3, ""},
		"the machine says nothing": {true, false, nil, -1, "stopped"},
		"nor to the next node":     {true, true, nil, -1, "stopped"},
		"it says it of another":    {true, false, func(start int64) *guest.AgentExit { return &guest.AgentExit{Start: start + 1, ExitCode: 3} }, -1, "stopped"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			ended, seen := make(chan guest.WorkState), make(chan bool, 10)
			h.watch = func(stream *wire.Stream) {
				stream.SendJSON(wire.FrameJSON, guest.WorkState{Agent: true})
				seen <- true
				gone := make(chan bool)
				go func() { stream.Recv(64); close(gone) }()
				select {
				case state := <-ended:
					stream.SendJSON(wire.FrameJSON, state)
					<-gone
				case <-gone:
				}
			}
			exits := make(chan guest.AgentExit)
			h.agent = func(stream *wire.Stream) {
				if exit, ok := <-exits; ok {
					stream.SendJSON(wire.FrameResult, exit)
				}
			}
			spec := specOf("", policyOf("read_files"))
			spec.Agent = &nucleus.Agent{Name: "test", Argv: []string{"/agent"}}
			p := h.pod(spec, nil)
			<-seen
			machine, start := h.startAgent(p, client.AgentRequest{})
			a, b := pipe(t)
			relayed := make(chan struct{})
			go func() {
				defer close(relayed)
				defer machine.Close()
				h.node.relayAgent(p, "operator", start, a, machine)
			}()
			if c.leaves {
				b.Close()
				close(exits) // the stream ends, the agent goes on
				<-relayed
			}
			if c.restart {
				h.kill()
				h.start()
				<-seen
				var err error
				if p, err = h.node.pod(p.record.ID); err != nil {
					t.Fatal(err)
				}
			}
			ends := func() []nucleus.Entry { return h.entries(nucleus.KindSessionEnd, "") }
			works := func() bool { p.root.mu.Lock(); defer p.root.mu.Unlock(); return p.working }
			eventually(t, "the node has heard that it runs", works)
			if c.says != nil {
				exit := c.says(start.Seq)
				if !c.leaves {
					exits <- *exit
					b.RecvJSON(wire.FrameResult, 1<<20, &client.AgentExit{})
					<-relayed
				}
				ended <- guest.WorkState{Exit: exit}
				eventually(t, "the node has heard it", func() bool { return !works() })
			} else if n := len(ends()); n != 0 {
				t.Errorf("%d ends while it runs", n)
			}
			if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
				t.Fatal(err)
			}
			got := ends()
			if len(got) != 1 {
				t.Fatalf("%d ends: %v", len(got), got)
			}
			var exit guest.AgentExit
			if err := json.Unmarshal(got[0].Data, &exit); err != nil || exit.Start != start.Seq || exit.ExitCode != c.code || got[0].Actor != "operator" {
				t.Errorf("%s by %q, %v", got[0].Data, got[0].Actor, err)
			}
			if c.why != "" && (exit.Error == nil || !strings.Contains(exit.Error.Message, c.why)) {
				t.Errorf("its reason is %v", exit.Error)
			}
			if v := h.receipt(p.record.Session); !v.Begins || !v.Linked || !v.Ends {
				t.Errorf("the receipt: begins %v, linked %v, ends %v", v.Begins, v.Linked, v.Ends)
			}
		})
	}
}

// A push that has begun is not cut off by the end of its pod, which waits for it.
func TestPodEndWaitsForPush(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	person := newPersonRepo(t)
	p := h.pod(person.spec("w", pushes), nil)
	want := h.inside(p).commit("new.txt", "x\n")
	began, goOn := filepath.Join(person.Remote, "began"), filepath.Join(person.Remote, "go-on")
	hook := filepath.Join(person.Remote, "hooks", "pre-receive")
	if err := os.MkdirAll(filepath.Dir(hook), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(hook, []byte("#!/bin/sh\n: >"+began+"\nwhile [ ! -e "+goOn+" ]; do sleep 0.01; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	got, ended := make(chan answer, 1), make(chan error, 1)
	go func() { got <- h.tool(p, nucleus.GitPush, pushTo("agent/work")) }()
	exists := func(name string) func() bool {
		return func() bool { _, err := os.Stat(name); return err == nil }
	}
	eventually(t, "the push has begun", exists(began))
	go func() { ended <- h.node.DeletePod(h.context(), "operator", p.record.ID) }()
	eventually(t, "the pod's end has begun", func() bool { return p.ended() != "" })
	select {
	case err := <-ended:
		t.Fatalf("the pod has ended before its push: %v", err)
	case a := <-got:
		t.Fatalf("the push has ended: %v", a)
	default:
	}
	if err := os.WriteFile(goOn, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	(<-got).want(t, "")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if at := person.at("agent/work"); at != want {
		t.Errorf("the remote has %q, want %s", at, want)
	}
	if outcomes := h.entries(nucleus.KindOutcome, nucleus.GitPush); len(outcomes) != 1 || outcomes[0].Status != nucleus.OutcomeDone {
		t.Errorf("outcomes %+v", outcomes)
	}
}
