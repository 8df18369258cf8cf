package node

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"cal/guest"
	"cal/node/client"
	"cal/nucleus"
)

func (h *host) health() client.Health {
	h.t.Helper()
	w := httptest.NewRecorder()
	h.node.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/healthz", nil))
	var health client.Health
	if err := json.Unmarshal(w.Body.Bytes(), &health); err != nil {
		h.t.Fatal(err)
	}
	return health
}

// The host's clock is set, back and forth and in the rest of a node: who asks for the era
// is served at once, what was signed before is not, and ticks go on.
func TestHostClockIsSet(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(all)), map[string]string{"a": "text"})
	read := func() *http.Request {
		return h.signed(h.asAgent(p), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/read_files", p.record.ID, []byte(`{"path":"a"}`))
	}
	inEra := func() *http.Request {
		signer := h.asAgent(p)
		signer.Era = h.health().Era
		return h.signed(signer, http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/read_files", p.record.ID, []byte(`{"path":"a"}`))
	}
	if h.health().Era != "" {
		t.Error("an era from the start")
	}
	h.serve(h.node, read()).want(t, "")
	for _, jump := range []time.Duration{-time.Hour, time.Hour, 24 * time.Hour, -24 * time.Hour} {
		old := inEra()
		h.clock.pass(jump)
		if a := h.serve(h.node, old); a.Error == nil || a.Error.Kind != nucleus.KindUnauthenticated {
			t.Errorf("%v: signed before: %v", jump, a)
		}
		h.serve(h.node, inEra()).want(t, "")
	}
	// Set back while no node runs.
	h.clock.pass(time.Hour)
	h.serve(h.node, inEra()).want(t, "")
	if err := h.node.Close(); err != nil {
		t.Fatal(err)
	}
	h.clock.pass(-30 * time.Minute)
	h.start()
	var err error
	if p, err = h.node.pod(p.record.ID); err != nil {
		t.Fatal(err)
	}
	if a := h.serve(h.node, read()); a.Error == nil || a.Error.Kind != nucleus.KindUnauthenticated {
		t.Errorf("without an era: %v", a)
	}
	h.serve(h.node, inEra()).want(t, "")

	permits := h.inside(p).permits()
	for i, permit := range permits {
		if i == 0 {
			continue
		}
		before := permits[i-1]
		if same := permit.Issued.Epoch == before.Issued.Epoch; permit.Issued.Tick < before.Issued.Tick && same || permit.Issued.Epoch < before.Issued.Epoch || permit.Seq>>nucleus.EpochBits != permit.Issued.Epoch {
			t.Errorf("permit %+v after %+v", permit.Issued, before.Issued)
		}
	}
}

// A permit's time begins when it is issued, not when its request came: a log that is slow
// does not make it old.
func TestPermitIsFresh(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), map[string]string{"a": "text"})
	heard := make(chan nucleus.NodeTime, 1)
	h.behaves(func(_ *inside, c *callInside) (guest.CallResult, bool) {
		heard <- c.permit.Issued
		return c.honest(), true
	})
	before := p.time()
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	if got := <-heard; got.Tick < before.Tick || got.Epoch != before.Epoch || got.Tick > p.time().Tick {
		t.Errorf("issued at %+v, between %+v and %+v", got, before, p.time())
	}
}

// The person's client follows a node whose clock was set back while both ran.
func TestClientFollowsEra(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, stop := context.WithCancel(h.context())
	served := make(chan error, 1)
	go func() { served <- h.node.Serve(ctx) }()
	defer func() { stop(); <-served }()
	c := client.New(h.node.dirs.Socket(), OperatorKey, h.operator)
	h.clock.pass(20 * time.Second) // still within the life of a signature
	eventually(t, "the node serves", func() bool { _, err := c.Pods(ctx); return err == nil })
	h.clock.pass(-20 * time.Second)
	if _, err := c.Pods(ctx); err != nil {
		t.Errorf("after the clock was set back: %v", err)
	}
	h.clock.pass(-10 * time.Second)
	stream, err := c.Agent(ctx, "p-none", client.AgentRequest{})
	if err == nil {
		stream.Close()
	}
	if err == nil || nucleus.AsError(err).Kind != nucleus.KindNotFound {
		t.Errorf("a stream after it was set back again: %v, want no such pod", err)
	}
}
