package node

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"cal/guest"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

func transientSpec() nucleus.PodSpec {
	spec := specOf("", policyOf("read_files run_bash manage_pods write_files=ask"))
	spec.Transient = true
	return spec
}

// hoursPass lets time go by until the node has looked at every pod and ended those that nobody
// used in it.
func (h *host) hoursPass(meanwhile func()) {
	h.t.Helper()
	for range 2 { // another may have its turn after the first
		idle := h.pod(transientSpec(), nil)
		eventually(h.t, "a transient pod that nobody uses has ended", func() bool {
			h.ticks.Add(int64(10 * time.Second))
			meanwhile()
			return h.gone(idle)
		})
	}
}

func (h *host) gone(p *Pod) bool {
	_, err := h.node.pod(p.record.ID)
	return err != nil
}

// commandsGoOn has commands run until their callers go away, and says that one has begun.
func (h *host) commandsGoOn() (began <-chan bool) {
	said := make(chan bool, 10)
	h.behaves(func(_ *inside, c *callInside) (guest.CallResult, bool) {
		if c.call.Op != nucleus.RunBash {
			return c.honest(), true
		}
		said <- true
		for {
			if _, _, err := c.stream.Recv(1 << 20); err != nil {
				return guest.CallResult{}, false
			}
		}
	})
	return said
}

var sleeps = map[string]any{"argv": []string{"sleep", "infinity"}}

// A transient pod stays as long as somebody uses it, however that is, and ends a minute later,
// with its reason in the log and nothing left. Pods that are not transient stay.
func TestTransientPods(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- h.node.Serve(ctx) }()
	defer func() { stop(); <-served }()
	person := client.New(h.node.dirs.Socket(), OperatorKey, h.operator)
	eventually(t, "the node serves", func() bool { _, err := person.Pods(ctx); return err == nil })
	began := h.commandsGoOn()

	withAgent, plain := transientSpec(), transientSpec()
	withAgent.Transient, plain.Transient = false, false
	withAgent.Agent = &nucleus.Agent{Name: "test", Argv: []string{"/agent"}}
	kept := map[string]*Pod{"a pod": h.pod(plain, nil), "an agent's pod": h.pod(withAgent, nil), "a named workspace's pod": h.pod(specOf("w", policyOf(all)), nil)}

	// What uses a pod, and how it ends.
	used, ends := map[string]*Pod{}, map[string]func(){}
	pod := func(how string) *Pod {
		used[how] = h.pod(transientSpec(), nil)
		return used[how]
	}
	again := pod("requests now and then")
	look := func() {
		if _, err := person.Pod(ctx, again.record.ID); err != nil {
			t.Fatal(err)
		}
	}

	stream, err := person.Run(ctx, pod("a command").record.ID, sleeps, client.Terminal{})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	<-began
	ends["a command"] = func() { stream.Close() } // as when its caller is killed

	waits := pod("a request that waits for a person")
	answered := make(chan answer, 1)
	go func() { answered <- h.tool(waits, nucleus.WriteFiles, writeArgs("a"), "wait=600") }()
	eventually(t, "an ask", func() bool { return len(waits.status().Asks) == 1 })
	h.node.pausePod(waits, "too much memory") // waits all the same
	ends["a request that waits for a person"] = func() {
		h.authority.deny(h.lastAsk(), "no")
		(<-answered).want(t, nucleus.KindRefused)
	}

	above := pod("a command in a pod below")
	running, kill := context.WithCancel(ctx)
	defer kill()
	below, ended := h.create(above, object{}), make(chan answer, 1)
	go func() { ended <- h.toolContext(running, below, nucleus.RunBash, sleeps) }()
	<-began
	ends["a command in a pod below"] = func() {
		kill()
		(<-ended).want(t, nucleus.KindTimeout)
	}

	h.hoursPass(look)
	for how, p := range used {
		if h.gone(p) {
			t.Errorf("%s: the pod has ended", how)
		}
	}
	for _, end := range ends {
		end()
	}
	var stopped []nucleus.Entry
	eventually(t, "they have ended in their turn", func() bool {
		h.ticks.Add(int64(10 * time.Second))
		for _, p := range used {
			if !h.gone(p) {
				return false
			}
		}
		return true
	})
	for how, p := range used {
		stopped = nil
		for _, e := range h.log() {
			if e.Pod == p.record.ID && e.Kind == nucleus.KindPodStop {
				stopped = append(stopped, e)
			}
		}
		if len(stopped) != 1 || stopped[0].Actor != "" || !strings.Contains(string(stopped[0].Data), "no request has used the transient pod for 1m0s") {
			t.Errorf("%s: recorded as %+v", how, stopped)
		}
		if v := h.receipt(p.record.Session); !v.Ends {
			t.Errorf("%s: its session has no end in the log", how)
		}
	}
	h.hoursPass(func() {})
	for what, p := range kept {
		if h.gone(p) {
			t.Errorf("%s that is not transient has ended", what)
		}
		if err := h.node.DeletePod(ctx, "operator", p.record.ID); err != nil {
			t.Error(err)
		}
	}
	h.nothingLeft()
}

// Another node takes a transient pod up as if it had just been used, and ends it in its turn.
func TestTransientPodIsTakenUp(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(transientSpec(), nil)
	h.kill()
	h.ticks.Add(int64(time.Hour))
	h.start()
	for range 2 { // which the node looks at, and no time goes by
		idle := h.pod(transientSpec(), nil)
		idle.mu.Lock()
		idle.used -= time.Hour
		idle.mu.Unlock()
		eventually(t, "a transient pod that nobody uses has ended", func() bool { return h.gone(idle) })
	}
	if h.gone(p) {
		t.Error("the pod has ended with the first look of the new node")
	}
	h.hoursPass(func() {})
	if !h.gone(p) {
		t.Error("the pod stays")
	}
	h.nothingLeft()
}

// The start of a transient pod is its use, however long it takes.
func TestTransientPodStarts(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	booting, goOn := make(chan bool), make(chan bool)
	h.mu.Lock()
	h.boot = func(*inside, *nucleus.BootReply) bool {
		h.mu.Lock()
		h.boot = nil
		h.mu.Unlock()
		booting <- true
		<-goOn
		return true
	}
	h.mu.Unlock()
	made := make(chan error, 1)
	go func() {
		_, err := h.node.CreatePod(h.context(), "operator", transientSpec())
		made <- err
	}()
	<-booting
	h.hoursPass(func() {})
	close(goOn)
	if err := <-made; err != nil {
		t.Error(err)
	}
}

// Who cannot use a pod does not keep it.
func TestTransientPodOfOthers(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	stranger, p := h.pod(specOf("w", policyOf(all)), nil), h.pod(transientSpec(), nil)
	h.hoursPass(func() {
		for _, s := range []*wire.Signer{h.asAgent(stranger), {KeyID: OperatorKey, Ed25519: h.inside(stranger).key, Now: h.clock.now}} {
			if a := h.serve(h.node, h.signed(s, http.MethodGet, "/v1/pods/"+p.record.ID, p.record.ID, nil)); a.Status < 400 {
				t.Fatalf("answered with %v", a)
			}
		}
	})
	if !h.gone(p) {
		t.Error("the pod stays")
	}
}

// An agent works on where no request waits for it.
func TestTransientPodHasNoAgent(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := transientSpec()
	spec.Agent = &nucleus.Agent{Name: "test", Argv: []string{"/agent"}}
	if _, err := h.node.CreatePod(h.context(), "operator", spec); nucleus.AsError(err).Kind != nucleus.KindInvalid || !strings.Contains(err.Error(), "leave out transient") {
		t.Errorf("created: %v", err)
	}
}
