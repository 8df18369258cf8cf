package guest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

// terminal is one person's end of an agent's stream.
type terminal struct {
	t      *testing.T
	stream *wire.Stream
	done   chan struct{} // join has returned
}

// join seats a terminal at a run that has no process.
func join(t *testing.T, run *agentRun) *terminal {
	t.Helper()
	node, machine := sessions(t)
	accepted := make(chan *wire.Stream, 1)
	go func() {
		stream, err := machine.Accept()
		if err == nil {
			accepted <- stream
		}
	}()
	stream, err := node.Open(deadline(t), StreamAttach, nil)
	if err != nil {
		t.Fatal(err)
	}
	stream.SetDeadline(time.Now().Add(patience))
	term := &terminal{t, stream, make(chan struct{})}
	inside := <-accepted
	run.mu.Lock()
	before := run.joined
	run.mu.Unlock()
	go func() {
		defer close(term.done)
		run.join(inside)
	}()
	wait(t, "the terminal is seated", func() bool {
		run.mu.Lock()
		defer run.mu.Unlock()
		return run.joined > before && run.seated
	})
	return term
}

func wait(t *testing.T, what string, ready func() bool) {
	t.Helper()
	limit := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("after %s: not so: %s", patience, what)
		}
	}
}

func (x *terminal) read() (wire.Frame, []byte) {
	x.t.Helper()
	kind, payload, err := x.stream.Recv(1 << 20)
	if err != nil {
		x.t.Fatal(err)
	}
	return kind, payload
}

func newTestRun() *agentRun {
	run := newAgentRun()
	run.input = func(wire.Frame, []byte) {}
	return run
}

func piece(n int) chunk { return chunk{wire.FrameStdout, bytes.Repeat([]byte{byte(n)}, 32<<10)} }

// While nobody reads, the agent goes on and the oldest output gives way; who comes
// back sees the newest.
func TestOutputWithoutReader(t *testing.T) {
	run := newTestRun()
	const pieces = 100
	for n := range pieces {
		run.put(piece(n)) // never waits
	}
	if run.queued > maxQueued+64<<10 {
		t.Errorf("%d bytes wait", run.queued)
	}
	run.end(7)
	term := join(t, run)
	var got []byte
	for {
		kind, payload := term.read()
		if kind == wire.FrameResult {
			var exit AgentExit
			if err := json.Unmarshal(payload, &exit); err != nil || exit.ExitCode != 7 || exit.Error != nil {
				t.Errorf("exit %s, %v", payload, err)
			}
			break
		}
		got = append(got, payload[0])
	}
	if len(got) < 30 || got[len(got)-1] != pieces-1 || got[0] != byte(pieces-len(got)) {
		t.Errorf("pieces %v", got)
	}
}

// A reader that is slow slows the agent, and loses nothing.
func TestSlowReader(t *testing.T) {
	run := newTestRun()
	term := join(t, run)
	const pieces = 200
	written := make(chan int, pieces)
	go func() {
		for n := range pieces {
			run.put(piece(n))
			written <- n
		}
		run.end(0)
	}()
	wait(t, "the agent is held back", func() bool {
		run.mu.Lock()
		defer run.mu.Unlock()
		return run.queued > maxQueued
	})
	if len(written) == pieces {
		t.Error("the agent was not held back")
	}
	for n := range pieces {
		kind, payload := term.read()
		if kind != wire.FrameStdout || payload[0] != byte(n) {
			t.Fatalf("piece %d: %q %d", n, kind, payload[0])
		}
	}
	if kind, _ := term.read(); kind != wire.FrameResult {
		t.Errorf("frame %q", kind)
	}
}

// A reader that goes away frees the agent that it held back.
func TestSlowReaderLeaves(t *testing.T) {
	run := newTestRun()
	term := join(t, run)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := range 200 {
			run.put(piece(n))
		}
	}()
	wait(t, "the agent is held back", func() bool {
		run.mu.Lock()
		defer run.mu.Unlock()
		return run.queued > maxQueued
	})
	term.stream.Close()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the agent waits for nobody")
	}
	<-term.done
}

// Who joins last takes over: the one before is told, and neither sees what is the other's.
func TestTakeOver(t *testing.T) {
	run := newTestRun()
	typed := make(chan string, 4)
	run.input = func(_ wire.Frame, payload []byte) { typed <- string(payload) }
	first := join(t, run)
	run.put(chunk{wire.FrameStdout, []byte("one")})
	if _, payload := first.read(); string(payload) != "one" {
		t.Errorf("got %q", payload)
	}
	second := join(t, run)
	kind, payload := first.read()
	var exit AgentExit
	if kind != wire.FrameResult || json.Unmarshal(payload, &exit) != nil || exit.Error == nil || exit.Error.Kind != nucleus.KindConflict {
		t.Errorf("the first is told %q %s", kind, payload)
	}
	<-first.done
	first.stream.Close() // its leaving unseats nobody
	run.put(chunk{wire.FrameStdout, []byte("two")})
	if _, payload := second.read(); string(payload) != "two" {
		t.Errorf("got %q", payload)
	}
	run.mu.Lock()
	seated := run.seated
	run.mu.Unlock()
	if !seated {
		t.Error("the second is not seated")
	}
	second.stream.Send(wire.FrameStdin, []byte("keys"))
	if got := <-typed; got != "keys" {
		t.Errorf("typed %q", got)
	}
	run.end(0)
	if kind, _ := second.read(); kind != wire.FrameResult {
		t.Errorf("frame %q", kind)
	}
}

// A terminal that was taken over types no more.
func TestTakenOverTypesNoMore(t *testing.T) {
	run := newTestRun()
	typed := make(chan string, 4)
	run.input = func(_ wire.Frame, payload []byte) { typed <- string(payload) }
	first := join(t, run)
	second := join(t, run)
	first.stream.Send(wire.FrameStdin, []byte("from the first"))
	second.stream.Send(wire.FrameStdin, []byte("from the second"))
	wait(t, "the second's keys", func() bool {
		select {
		case got := <-typed:
			if got == "from the first" {
				t.Error("the first still types")
			}
			return got == "from the second"
		default:
			return false
		}
	})
	run.end(0)
}

// Who attaches where no agent runs is told so.
func TestAttachWithoutAgent(t *testing.T) {
	node, machine := sessions(t)
	h := &agentHost{}
	go func() {
		for {
			stream, err := machine.Accept()
			if err != nil {
				return
			}
			if stream.Kind == StreamAttach {
				h.attach(stream)
			} else {
				h.start(stream)
			}
		}
	}()
	for kind, want := range map[string]nucleus.Kind{StreamAttach: nucleus.KindNotFound, StreamAgent: nucleus.KindInvalid} {
		stream, err := node.Open(deadline(t), kind, map[string]any{"uid": 0})
		if err != nil {
			t.Fatal(err)
		}
		stream.SetDeadline(time.Now().Add(patience))
		var exit AgentExit
		if err := stream.RecvJSON(wire.FrameResult, 1<<16, &exit); err != nil || exit.Error == nil || exit.Error.Kind != want {
			t.Errorf("%s: %+v, %v", kind, exit, err)
		}
	}
}

// machineWithNode is a proxy whose API connections reach a handler.
func machineWithNode(t *testing.T, handler http.HandlerFunc) *lock {
	t.Helper()
	l := newLock(t)
	node, machine := sessions(t)
	l.p.session = machine
	server := &http.Server{Handler: handler}
	streams := &streamListener{node}
	go server.Serve(streams)
	t.Cleanup(func() { server.Close() })
	return l
}

// Every tool of the agent is a signed request to the node; what comes back as an error
// comes back as the tool's error, in JSON.
func TestMCP(t *testing.T) {
	var l *lock
	seen := make(chan string, 16)
	l = machineWithNode(t, func(w http.ResponseWriter, r *http.Request) {
		v := wire.Verifier{Keys: func(id string) (wire.Key, bool) {
			return wire.Key{ID: "b-1", Ed25519: l.p.key.Public().(ed25519.PublicKey), Role: wire.AgentRole, Pod: "p-1"}, id == "b-1"
		}}
		_, body, signed, err := v.Verify(r, "nucleus")
		if err != nil {
			wire.WriteError(w, nucleus.AsError(err))
			return
		}
		seen <- r.URL.Path + " " + signed.Pod + " " + string(body)
		switch {
		case strings.Contains(string(body), "denied"):
			wire.WriteError(w, &nucleus.Error{Kind: nucleus.KindDenied, Operation: nucleus.ReadFiles, Rule: "paths.blocked", Message: "no"})
		case strings.Contains(string(body), "asks"):
			wire.WriteError(w, &nucleus.Error{Kind: nucleus.KindApproval, Ask: "a-1", Message: "wait"})
		case strings.Contains(string(body), "image"):
			w.Write([]byte(`{"image":{"mime":"image/png","data_b64":"AAEC"}}`))
		default:
			w.Write([]byte(`{"path":"a","content":"text\n","start":1,"lines":1,"total_lines":1,"bytes":5}`))
		}
	})
	ctx := deadline(t)
	endpoint := newEndpoint(t, l.p.mcpHandler())
	client := mcp.NewClient(&mcp.Implementation{Name: "test"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: endpoint + "/mcp"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	call := func(name string, args any) (*mcp.CallToolResult, error) {
		return session.CallTool(ctx, &mcp.CallToolParams{Name: name, Arguments: args})
	}
	text := func(r *mcp.CallToolResult) string {
		if len(r.Content) != 1 {
			t.Fatalf("content %+v", r.Content)
		}
		c, ok := r.Content[0].(*mcp.TextContent)
		if !ok {
			t.Fatalf("content %T", r.Content[0])
		}
		return c.Text
	}
	kind := func(r *mcp.CallToolResult) nucleus.Error {
		var e struct{ Error nucleus.Error }
		if err := json.Unmarshal([]byte(text(r)), &e); err != nil || !r.IsError {
			t.Errorf("error %v: %s, %v", r.IsError, text(r), err)
		}
		return e.Error
	}

	r, err := call("read_files", map[string]any{"path": "a"})
	if err != nil || r.IsError || !strings.Contains(text(r), "text") {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := <-seen; got != `/v1/pods/p-1/tools/read_files p-1 {"path":"a"}` {
		t.Errorf("the node saw %s", got)
	}
	r, err = call("read_files", map[string]any{"path": "denied"})
	if err != nil {
		t.Fatal(err)
	}
	if e := kind(r); e.Kind != nucleus.KindDenied || e.Rule != "paths.blocked" || e.Operation != nucleus.ReadFiles {
		t.Errorf("got %+v", e)
	}
	r, err = call("read_files", map[string]any{"path": "asks"})
	if err != nil {
		t.Fatal(err)
	}
	if e := kind(r); e.Kind != nucleus.KindApproval || e.Ask != "a-1" {
		t.Errorf("got %+v", e)
	}
	r, err = call("read_files", map[string]any{"path": "image"})
	if err != nil || r.IsError {
		t.Fatalf("%+v, %v", r, err)
	}
	if c, ok := r.Content[0].(*mcp.ImageContent); !ok || c.MIMEType != "image/png" || !bytes.Equal(c.Data, []byte{0, 1, 2}) {
		t.Errorf("content %+v", r.Content[0])
	}
	for len(seen) > 0 {
		<-seen
	}
	for name, args := range map[string]any{
		"execute":     map[string]any{},
		"read_files":  map[string]any{"path": 7},
		"grep_search": map[string]any{"patern": "x"},
		"manage_pods": map[string]any{},
	} {
		r, err := call(name, args)
		if err == nil && !r.IsError {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if len(seen) != 0 {
		t.Errorf("nonsense reached the node: %s", <-seen)
	}
}

// A call in a pod below is a request for that pod, signed for it; a pod's own manage_pods is not.
func TestMCPCallsBelow(t *testing.T) {
	seen := make(chan string, 16)
	var l *lock
	l = machineWithNode(t, func(w http.ResponseWriter, r *http.Request) {
		v := wire.Verifier{Keys: func(id string) (wire.Key, bool) {
			return wire.Key{ID: "b-1", Ed25519: l.p.key.Public().(ed25519.PublicKey), Role: wire.AgentRole, Pod: "p-1"}, id == "b-1"
		}}
		_, body, signed, err := v.Verify(r, "nucleus")
		if err != nil {
			wire.WriteError(w, nucleus.AsError(err))
			return
		}
		seen <- r.URL.Path + " " + signed.Pod + " " + string(body)
		w.Write([]byte(`{}`))
	})
	// Who may have no pods below is not shown the tools for them.
	shown := func() string {
		client := mcp.NewClient(&mcp.Implementation{Name: "test"}, nil)
		session, err := client.Connect(deadline(t), &mcp.StreamableClientTransport{Endpoint: newEndpoint(t, l.p.mcpHandler()) + "/mcp"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Close()
		listed, err := session.ListTools(deadline(t), nil)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, tool := range listed.Tools {
			names = append(names, tool.Name)
		}
		return strings.Join(names, " ")
	}
	if names := shown(); strings.Contains(names, "pod") || strings.Contains(names, "spawn") || !strings.Contains(names, "read_files") {
		t.Errorf("shown: %s", names)
	}
	l.p.policy = policy.Top()
	if names := shown(); !strings.Contains(names, "manage_pods") || !strings.Contains(names, "spawn_agent") {
		t.Errorf("shown: %s", names)
	}
	for args, want := range map[string]string{
		`{"action":"call","pod":"p-sub","operation":"read_files","arguments":{"path":"a"}}`: `/v1/pods/p-sub/tools/read_files p-sub {"path":"a"}`,
		`{"action":"call","pod":"p-sub","operation":"bash_stop","arguments":{"id":"j"}}`:    `/v1/pods/p-sub/tools/run_bash p-sub {"stop":"j"}`,
		`{"action":"list"}`: `/v1/pods/p-1/tools/manage_pods p-1 {"action":"list"}`,
	} {
		if r := l.p.callTool(deadline(t), l.p.api(), "manage_pods", json.RawMessage(args), nil); r.IsError {
			t.Errorf("%s: %+v", args, r.Content[0])
			continue
		}
		if got := <-seen; got != want {
			t.Errorf("%s: the node saw %s, want %s", args, got, want)
		}
	}
	for _, args := range []string{
		`{"action":"call","pod":"p-sub"}`, `{"action":"call","operation":"read_files","arguments":{"path":"a"}}`, `{"action":"call","pod":"../p-1","operation":"read_files","arguments":{"path":"a"}}`,
		`{"action":"call","pod":"p-sub","operation":"read_files","arguments":{"path":7}}`, `{"action":"call","pod":"p-sub","operation":"execute"}`,
	} {
		if r := l.p.callTool(deadline(t), l.p.api(), "manage_pods", json.RawMessage(args), nil); !r.IsError || len(seen) > 0 {
			t.Errorf("%s: %+v", args, r.Content[0])
		}
	}
}

// A node that is gone is said, within the caller's time.
func TestMCPWithoutNode(t *testing.T) {
	l := newLock(t)
	node, machine := sessions(t)
	l.p.session = machine
	node.Close()
	<-machine.Done()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	r := l.p.callTool(ctx, l.p.api(), "read_files", json.RawMessage(`{"path":"a"}`), nil)
	if c, ok := r.Content[0].(*mcp.TextContent); !ok || !r.IsError || !strings.Contains(c.Text, string(nucleus.KindUnavailable)) {
		t.Errorf("got %+v", r)
	}
}

// streamListener takes the streams of a session as connections.
type streamListener struct{ session *wire.Session }

func (l *streamListener) Accept() (net.Conn, error) { return l.session.Accept() }
func (l *streamListener) Close() error              { return l.session.Close() }
func (l *streamListener) Addr() net.Addr            { return &net.UnixAddr{Name: "wire", Net: "unix"} }

func newEndpoint(t *testing.T, h http.Handler) string {
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}
