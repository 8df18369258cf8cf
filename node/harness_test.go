package node

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	paseto "aidanwoods.dev/go-paseto"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/audit"
	"cal/guest"
	"cal/guest/tools"
	"cal/internal/keyfile"
	"cal/machine"
	"cal/machine/fake"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

const patience = 20 * time.Second

// host is one host with a node on it, a pretended authority and machines in memory whose
// proxy is inside: real permits, real outcomes, a real tools worker, no walls.
type host struct {
	t         testing.TB
	home      string
	driver    *fake.Driver
	authority *authorityStub // nil: none is configured
	witnesses []Witness      // required
	forge     Forge
	storage   Limits
	clock     *clock
	ticks     atomic.Int64  // nanoseconds that the host's monotonic clock is ahead
	spare     time.Duration // Config.SpareLife
	emulated  bool          // the driver is of tier emulated
	ahead     bool          // Config.SpareEmulated
	node      *Node
	operator  ed25519.PrivateKey

	mu       sync.Mutex
	machines map[string]*inside // by pod
	behave   func(*inside, *callInside) (guest.CallResult, bool)
	resolved func(*guest.CallResult)                          // what a machine says of a call before it is decided, to be changed
	repo     func(*inside, *wire.Stream, guest.RepoCall) bool // true: answered
	boot     func(*inside, *nucleus.BootReply) bool           // false: no answer
	attach   func() error
	sign     func(*inside, guest.SignCall) guest.SignReply // nil: as guest.Proxy does
	agent    func(*wire.Stream)
	watch    func(*wire.Stream)                              // nil: no agent runs
	program  func(*inside, guest.AgentProgram, *wire.Stream) // in place of agent
	joined   func(*inside, *wire.Stream)                     // who attaches to an agent
	lost     func() bool                                     // a wire that is handed in and never taken
	onAttach func(*inside)                                   // a later node has come
}

type clock struct {
	mu    sync.Mutex
	ahead time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
}

type option func(*host)

func withAuthority(h *host) { h.authority = newAuthority(h.t) }

// newHost starts a node that has never run here.
func newHost(t testing.TB, options ...option) *host {
	t.Helper()
	// Short: a socket's path has 107 bytes at most. In memory, where there is such a
	// place: what these tests ask of the disk is order, not survival of a power cut.
	dir, err := os.MkdirTemp(memory(), "caln-")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, home: filepath.Join(dir, "cal"), machines: map[string]*inside{}, clock: &clock{}}
	h.driver = fake.New(fake.Config{Guest: h.guest})
	for _, o := range options {
		o(h)
	}
	t.Cleanup(func() {
		if h.node != nil {
			h.node.mu.Lock()
			ids := slices.Collect(maps.Keys(h.node.pods))
			h.node.mu.Unlock()
			for _, id := range ids {
				h.node.DeletePod(context.Background(), "test", id)
			}
			h.node.Close()
		}
		os.RemoveAll(dir)
	})
	h.start()
	return h
}

func memory() string {
	const place = "/dev/shm"
	if info, err := os.Stat(place); err == nil && info.IsDir() {
		return place
	}
	return ""
}

func (h *host) monotonic() time.Duration { return monotonic() + time.Duration(h.ticks.Load()) }

func (h *host) open() (*Node, error) {
	proxy, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	c := Config{Home: h.home, Drivers: []machine.Driver{h.driver}, Proxy: proxy, GitHub: h.forge, Storage: h.storage, Now: h.clock.now, SpareLife: h.spare, SpareEmulated: h.ahead, Monotonic: h.monotonic, Witnesses: h.witnesses}
	if h.emulated {
		c.Drivers[0] = emulated{h.driver}
	}
	if h.authority != nil {
		c.Authority = h.authority.socket
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return Open(ctx, c)
}

func (h *host) start() {
	h.t.Helper()
	n, err := h.open()
	if err != nil {
		h.t.Fatal("opening the node: ", err)
	}
	h.node = n
	h.clock.pass(time.Millisecond) // what is signed now is after the node's start, however quick that was
	if h.operator, err = keyfile.Load(n.operatorKeyFile()); err != nil {
		h.t.Fatal(err)
	}
}

// restart ends the node in order and starts another.
func (h *host) restart() {
	h.t.Helper()
	if err := h.node.Close(); err != nil {
		h.t.Fatal("closing the node: ", err)
	}
	h.node = nil
	h.start()
}

// kill takes from the node what the kernel takes from a process that dies: its
// connections and its locks. Nothing is written.
func (h *host) kill() {
	n := h.node
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	close(n.closing)
	n.transients.Wait()
	if spare := n.spares.waiting; spare != nil {
		<-spare.ready
		n.spares.dismiss()
		spare.machine.Wire().Close()
		spare.machine.Release()
	}
	for _, p := range pods {
		p.disconnect()
		p.machine.Release()
	}
	n.stopKeeping()
	n.serving.Wait()
	n.spent.Close()
	n.salts.Close()
	n.log.Close()
	n.lock.Close()
	h.node = nil
}

func document(t testing.TB, v any) json.RawMessage {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// policyOf is a policy of operations at a level each, without other limits.
func policyOf(operations string) json.RawMessage {
	levels := map[string]string{}
	for _, part := range strings.Fields(operations) {
		op, level, ok := strings.Cut(part, "=")
		if !ok {
			level = "always"
		}
		levels[op] = level
	}
	raw, _ := json.Marshal(map[string]any{"operations": levels, "paths": map[string]any{"roots": "any"}, "commands": "any", "hosts": "any"})
	return raw
}

func specOf(workspace string, policy json.RawMessage) nucleus.PodSpec {
	return nucleus.PodSpec{
		Workspace: workspace, Driver: "fake", Mode: nucleus.Mediated, Policy: policy, Image: nucleus.Image{Kind: "host"},
		Identity: nucleus.Identity{Name: "Test Person", Email: "person@example.org"},
	}
}

// pod makes a pod and puts files into its workspace.
func (h *host) pod(spec nucleus.PodSpec, files map[string]string) *Pod {
	h.t.Helper()
	p, err := h.node.CreatePod(h.context(), "operator", spec)
	if err != nil {
		h.t.Fatal("creating the pod: ", err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(p.record.Workspace, "files", name), []byte(content), 0o644); err != nil {
			h.t.Fatal(err)
		}
	}
	return p
}

func (h *host) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	h.t.Cleanup(cancel)
	return ctx
}

func (h *host) inside(p *Pod) *inside {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.machines[p.record.ID]
}

// answer is what the API said.
type answer struct {
	Status int
	Body   string
	Error  *nucleus.Error
}

func (a answer) String() string { return fmt.Sprintf("%d %s", a.Status, cut(a.Body, 600)) }

func (h *host) asOperator() *wire.Signer {
	return &wire.Signer{KeyID: OperatorKey, Ed25519: h.operator, Now: h.clock.now}
}

func (h *host) asAgent(p *Pod) *wire.Signer {
	return &wire.Signer{KeyID: p.record.Boot, Ed25519: h.inside(p).key, Now: h.clock.now}
}

func (h *host) signed(s *wire.Signer, method, path, pod string, body []byte) *http.Request {
	h.t.Helper()
	req, err := s.NewSignedRequest(method, "http://nucleus"+path, pod, body)
	if err != nil {
		h.t.Fatal(err)
	}
	req.RequestURI = req.URL.RequestURI()
	return req
}

// finalAnswer leaves informational responses out, which a recorder takes for the answer.
type finalAnswer struct{ *httptest.ResponseRecorder }

func (w finalAnswer) WriteHeader(code int) {
	if code >= 200 {
		w.ResponseRecorder.WriteHeader(code)
	}
}

func (h *host) serve(n *Node, req *http.Request) answer {
	w := httptest.NewRecorder()
	n.handler().ServeHTTP(finalAnswer{w}, req)
	a := answer{Status: w.Code, Body: w.Body.String()}
	var body struct {
		Error *nucleus.Error `json:"error"`
	}
	if w.Code >= 300 && json.Unmarshal(w.Body.Bytes(), &body) == nil {
		a.Error = body.Error
	}
	return a
}

// tool performs one operation as its own agent.
func (h *host) tool(p *Pod, op nucleus.Op, args any, query ...string) answer {
	h.t.Helper()
	return h.toolContext(h.context(), p, op, args, query...)
}

func (h *host) toolContext(ctx context.Context, p *Pod, op nucleus.Op, args any, query ...string) answer {
	path := "/v1/pods/" + p.record.ID + "/tools/" + string(op)
	if len(query) > 0 {
		path += "?" + strings.Join(query, "&")
	}
	raw, err := json.Marshal(args)
	if err != nil {
		panic(err)
	}
	return h.serve(h.node, h.signed(h.asAgent(p), http.MethodPost, path, p.record.ID, raw).WithContext(ctx))
}

// want fails the test unless the answer is an error of this kind with these texts.
func (a answer) want(t testing.TB, kind nucleus.Kind, texts ...string) *nucleus.Error {
	t.Helper()
	if kind == "" {
		if a.Status >= 300 {
			t.Fatalf("got %v, want success", a)
		}
		return nil
	}
	if a.Error == nil || a.Error.Kind != kind {
		t.Fatalf("got %v, want kind %s", a, kind)
	}
	for _, text := range texts {
		if !strings.Contains(a.Body, text) {
			t.Fatalf("got %v, want %q in it", a, text)
		}
	}
	return a.Error
}

// log reads the whole log of the running node.
func (h *host) log() []nucleus.Entry {
	h.t.Helper()
	var entries []nucleus.Entry
	for e, err := range audit.Read(h.node.dirs.Log(), 0) {
		if err != nil {
			h.t.Fatal(err)
		}
		entries = append(entries, e)
	}
	return entries
}

func (h *host) entries(kind string, op nucleus.Op) []nucleus.Entry {
	h.t.Helper()
	return slices.DeleteFunc(h.log(), func(e nucleus.Entry) bool { return e.Kind != kind || op != "" && e.Op != op })
}

// eventually asks until ready says yes.
func eventually(t testing.TB, what string, ready func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("after %s: not so: %s", patience, what)
		}
	}
}

// inside is one boot of a machine as its proxy sees it.
type inside struct {
	host   *host
	in     fake.Inside
	boot   nucleus.Boot
	policy *policy.Policy
	key    ed25519.PrivateKey
	worker *wire.Session

	mu      sync.Mutex
	session *wire.Session
	seqs    map[uint64]bool
	grants  map[string]int64          // token -> when it was used first, unix milliseconds
	tasks   map[string]*nucleus.Task  // token -> what is left of the task
	acted   []nucleus.Permit          // in order
	asked   map[string]guest.SignCall // by connection: what its program asks for
}

// callInside is one call that reached the machine.
type callInside struct {
	call   guest.Call
	args   guest.CallArgs
	stream *wire.Stream    // nil: a brief call
	ctx    context.Context // of a brief call
	raw    []byte          // the whole reply to a brief call, where it is not nil
	permit nucleus.Permit
	honest func() guest.CallResult
}

func (m *inside) permits() []nucleus.Permit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.acted)
}

// guest is the whole machine: fake.Config.Guest.
func (h *host) guest(ctx context.Context, in fake.Inside) {
	session, err := wire.Guest(in.Wire)
	if err != nil {
		return
	}
	stop := context.AfterFunc(ctx, func() { session.Close() })
	defer stop()
	m := &inside{host: h, in: in, session: session, seqs: map[uint64]bool{}, grants: map[string]int64{}, tasks: map[string]*nucleus.Task{}}
	if err := m.takeBoot(session); err != nil {
		fmt.Fprintln(in.Console, err)
		session.Close()
		return
	}
	end, err := m.startWorker(ctx)
	if err != nil {
		fmt.Fprintln(in.Console, err)
		session.Close()
		return
	}
	defer end()
	var wires sync.WaitGroup
	defer wires.Wait()
	wires.Go(func() { m.serve(session) })
	for {
		select {
		case <-ctx.Done():
			m.mu.Lock()
			current := m.session
			m.mu.Unlock()
			current.Close()
			return
		case a := <-in.Attach:
			m.takeWire(ctx, a, &wires)
		}
	}
}

func (m *inside) takeBoot(session *wire.Session) error {
	stream, err := session.Accept()
	if err != nil {
		return err
	}
	defer stream.Close()
	if err := stream.RecvJSON(wire.FrameJSON, 4<<20, &m.boot); err != nil {
		return err
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	m.key = private
	if m.policy, err = policy.Load("boot", m.boot.Policy); err != nil {
		return err
	}
	m.host.mu.Lock()
	m.host.machines[m.boot.Pod] = m
	reply := m.host.boot
	m.host.mu.Unlock()
	answer := nucleus.BootReply{Boot: m.boot.Boot, OutcomeKey: public, Version: guest.Version}
	if reply == nil || reply(m, &answer) {
		_ = stream.SendJSON(wire.FrameJSON, answer) // as guest.Proxy: a node that ended right behind it has it
	}
	return nil
}

func (m *inside) startWorker(ctx context.Context) (end func(), err error) {
	home, err := os.MkdirTemp("", "caln-home-")
	if err != nil {
		return nil, err
	}
	ours, theirs := net.Pipe()
	worker, err := wire.Guest(theirs)
	if err != nil {
		return nil, err
	}
	if m.worker, err = wire.Host(ours); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		tools.Serve(ctx, worker, tools.Config{Workspace: m.in.Spec.Workspace, Home: home, Env: map[string]string{"PATH": os.Getenv("PATH")}})
	}()
	return func() {
		m.worker.Close()
		<-done
		os.RemoveAll(home)
	}, nil
}

// takeWire is what guest.Proxy does with a later node: it wants a proof.
func (m *inside) takeWire(ctx context.Context, a fake.Attach, wires *sync.WaitGroup) {
	m.host.mu.Lock()
	refuse, came, lost := m.host.attach, m.host.onAttach, m.host.lost
	m.host.mu.Unlock()
	if came != nil {
		came(m)
	}
	if lost != nil && lost() {
		wires.Go(func() { <-ctx.Done(); a.Answer(errNo) })
		return
	}
	if refuse != nil {
		a.Answer(refuse())
		return
	}
	session, err := wire.Guest(a.Wire)
	if err != nil {
		a.Answer(err)
		return
	}
	if err := m.prove(ctx, session); err != nil {
		session.Close()
		a.Answer(err)
		return
	}
	a.Answer(nil)
	m.mu.Lock()
	old := m.session
	m.session = session
	m.mu.Unlock()
	old.Close()
	wires.Go(func() { m.serve(session) })
}

func (m *inside) prove(ctx context.Context, session *wire.Session) error {
	want := guest.AttachProof{Boot: m.boot.Boot, Nonce: rand.Text()}
	stream, err := session.Open(ctx, guest.StreamProof, want)
	if err != nil {
		return err
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(patience))
	var signed nucleus.Signed
	if err := stream.RecvJSON(wire.FrameJSON, 64<<10, &signed); err != nil {
		return err
	}
	var got guest.AttachProof
	if err := signed.Open(m.boot.NodeKey, nucleus.DomainAttach, &got); err != nil {
		return err
	}
	if got.Boot != want.Boot || got.Nonce != want.Nonce {
		return errors.New("proof for something else")
	}
	return nil
}

func (m *inside) serve(session *wire.Session) {
	session.Handle(m.brief)
	var streams sync.WaitGroup
	defer streams.Wait()
	for {
		stream, err := session.Accept()
		if err != nil {
			return
		}
		streams.Go(func() {
			defer stream.Close()
			switch stream.Kind {
			case guest.StreamCall:
				m.call(stream)
			case guest.StreamRepo:
				m.repo(stream)
			case guest.StreamSign:
				m.signConnection(stream)
			case guest.StreamWatch:
				m.host.mu.Lock()
				watch := m.host.watch
				m.host.mu.Unlock()
				if watch != nil {
					watch(stream)
				} else if stream.SendJSON(wire.FrameJSON, guest.WorkState{}) == nil {
					stream.Recv(64)
				}
			case guest.StreamAttach:
				if m.host.joined != nil {
					m.host.joined(m, stream)
				}
			case guest.StreamAgent:
				var program guest.AgentProgram
				if m.host.agent == nil && m.host.program == nil || stream.RecvJSON(wire.FrameJSON, 1<<20, &program) != nil {
					return
				}
				if m.host.program != nil {
					m.host.program(m, program, stream)
					return
				}
				m.host.agent(stream)
			}
		})
	}
}

// program opens one connection of a program in the machine that asks for host and port.
func (m *inside) program(kind, host string, port int) *wire.Stream {
	m.host.t.Helper()
	id := rand.Text()
	m.mu.Lock()
	if m.asked == nil {
		m.asked = map[string]guest.SignCall{}
	}
	m.asked[id] = guest.SignCall{Connection: id, Host: host, Port: port}
	m.mu.Unlock()
	var stream *wire.Stream
	eventually(m.host.t, "a node takes the stream", func() (ok bool) {
		m.mu.Lock()
		session := m.session
		m.mu.Unlock()
		var err error
		stream, err = session.Open(m.host.context(), kind, guest.Connection{ID: id})
		return err == nil
	})
	m.host.t.Cleanup(func() { stream.Close() })
	stream.SetDeadline(time.Now().Add(patience))
	return stream
}

func (m *inside) signConnection(stream *wire.Stream) {
	var call guest.SignCall
	if err := nucleus.Strict(stream.Header, &call); err != nil {
		return
	}
	m.host.mu.Lock()
	own := m.host.sign
	m.host.mu.Unlock()
	if own != nil {
		stream.SendJSON(wire.FrameResult, own(m, call))
		return
	}
	m.mu.Lock()
	asked := m.asked[call.Connection] == call
	delete(m.asked, call.Connection)
	m.mu.Unlock()
	if !asked {
		stream.SendJSON(wire.FrameResult, guest.SignReply{Error: nucleus.Errorf(nucleus.KindForbidden, "nobody asked for %+v", call)})
		return
	}
	stream.SendJSON(wire.FrameResult, m.statement(m.key, m.boot.Pod, nucleus.NetConnect, call.Host, call.Port))
}

func (m *inside) statement(key ed25519.PrivateKey, pod string, op nucleus.Op, host string, port int) guest.SignReply {
	signer := wire.Signer{KeyID: m.boot.Boot, Ed25519: key, Now: m.host.clock.now}
	body, err := nucleus.Canonical(nucleus.Connect{Host: host, Port: port})
	if err == nil {
		var signed wire.SignedRequest
		if signed, err = signer.Statement(http.MethodPost, "http://nucleus/v1/pods/"+pod+"/tools/"+string(op), pod, body); err == nil {
			return guest.SignReply{Request: &signed}
		}
	}
	return guest.SignReply{Error: nucleus.AsError(err)}
}

func (m *inside) call(stream *wire.Stream) {
	c := &callInside{stream: stream}
	if err := nucleus.Strict(stream.Header, &c.call); err != nil {
		return
	}
	if err := stream.RecvJSON(wire.FrameJSON, 4<<20, &c.args); err != nil {
		return
	}
	if result, send := m.answer(c); send {
		stream.SendJSON(wire.FrameResult, result)
	}
}

// brief is call in one frame. What is not answered stays open until nobody waits.
func (m *inside) brief(ctx context.Context, request []byte) []byte {
	c := &callInside{ctx: ctx}
	parts, err := tools.Split(request, 3)
	if err != nil || nucleus.Strict(parts[0], &c.call) != nil {
		return nil
	}
	if c.args.Args.Args = parts[2]; len(parts[1]) > 0 && json.Unmarshal(parts[1], &c.args.Action) != nil {
		return nil
	}
	result, send := m.answer(c)
	switch {
	case c.raw != nil:
		return c.raw
	case !send:
		<-ctx.Done()
		return nil
	}
	value := result.Value
	result.Value = nil
	head, err := json.Marshal(result)
	if err != nil {
		panic(err)
	}
	return tools.Join(head, value)
}

func (m *inside) answer(c *callInside) (result guest.CallResult, send bool) {
	header := tools.Call{Op: c.call.Op, Standing: c.call.Standing, Identity: nucleus.Identity{Name: "Test Person", Email: "person@example.org"}}
	if c.call.Resolve {
		var resolved tools.Resolved
		if err := m.work(tools.StreamResolve, header, c.args.Args, &resolved); err != nil {
			resolved.Error = nucleus.AsError(err)
		}
		result := guest.CallResult{Action: resolved.Action, Standing: resolved.Standing, Error: resolved.Error}
		m.host.mu.Lock()
		defer m.host.mu.Unlock()
		if m.host.resolved != nil {
			m.host.resolved(&result)
		}
		return result, true
	}
	if err := m.admit(c); err != nil {
		return m.sign(c.permit, guest.CallResult{Error: nucleus.Errorf(nucleus.KindForbidden, "%v", err)}, nucleus.OutcomeRefused), true
	}
	c.honest = func() guest.CallResult {
		if c.call.Op.OnHost() {
			return m.sign(c.permit, guest.CallResult{}, nucleus.OutcomeAdmitted)
		}
		var result tools.Result
		if err := m.work(tools.StreamDo, header, c.args.Args, &result); err != nil {
			result.Error = nucleus.AsError(err)
		}
		status := nucleus.OutcomeDone
		if result.Error != nil {
			status = nucleus.OutcomeFailed
		}
		return m.sign(c.permit, guest.CallResult{Value: result.Value, Error: result.Error}, status)
	}
	m.mu.Lock()
	m.acted = append(m.acted, c.permit)
	m.mu.Unlock()
	m.host.mu.Lock()
	behave := m.host.behave
	m.host.mu.Unlock()
	if behave != nil {
		return behave(m, c)
	}
	return c.honest(), true
}

// admit is a second lock of its own hand.
func (m *inside) admit(c *callInside) error {
	if c.call.Permit == nil || c.args.Action == nil {
		return errors.New("no permit")
	}
	if err := c.call.Permit.Open(m.boot.NodeKey, nucleus.DomainPermit, &c.permit); err != nil {
		return err
	}
	digest, err := c.args.Action.Digest(nucleus.Salt(c.permit.Salt))
	m.mu.Lock()
	used := m.seqs[c.permit.Seq]
	m.seqs[c.permit.Seq] = true
	m.mu.Unlock()
	switch {
	case err != nil:
		return err
	case used:
		return fmt.Errorf("sequence %d again", c.permit.Seq)
	case digest != c.permit.Digest:
		return errors.New("another action")
	case c.permit.Pod != m.boot.Pod || c.permit.Boot != m.boot.Boot || c.permit.Op != c.call.Op:
		return errors.New("another machine or operation")
	case m.policy.Decide(*c.args.Action, c.permit.Context).Verdict.StricterThan(c.permit.Verdict):
		return errors.New("its own decision is stricter")
	}
	if c.permit.Verdict != nucleus.Ask {
		return nil
	}
	if c.args.Ask == nil || c.args.Ask.Approvals < m.policy.Decide(*c.args.Action, c.permit.Context).Approvals {
		return errors.New("too few grants")
	}
	token, now := strings.Join(c.permit.Grants, " "), c.permit.Issued.UnixMilli
	m.mu.Lock()
	defer m.mu.Unlock()
	spent, again := m.grants[token]
	if task := m.tasks[token]; task != nil {
		task.Uses--
		if err := approval.Matches(task.Match, *c.args.Action); err != nil || task.Uses < 0 {
			return fmt.Errorf("the task is over, or for something else: %w", err)
		}
		return nil
	}
	if q := c.args.Ask.Passage; q == nil {
		if c.args.Ask.Digest != c.permit.Digest || again {
			return errors.New("the grant is for something else, or was used")
		}
	} else if host, port, placed := c.args.Action.Place(); !placed || host != q.Host || port != q.Port {
		return errors.New("the passage leads elsewhere")
	} else if again {
		if now >= spent+q.Millis {
			return errors.New("the passage has ended")
		}
		return nil
	}
	grants, err := approval.Approved(c.permit.Grants, *c.args.Ask, m.boot.Approvers, now)
	if err != nil {
		return err
	}
	m.grants[token] = now
	if task := grants[0].Task; task != nil {
		left := *task
		left.Uses--
		m.tasks[token] = &left
	}
	return nil
}

func (m *inside) sign(permit nucleus.Permit, result guest.CallResult, status string) guest.CallResult {
	outcome := nucleus.Outcome{Permit: permit.ID, Pod: m.boot.Pod, Boot: m.boot.Boot, Seq: permit.Seq, Status: status}
	if len(result.Value) > 0 {
		outcome.Result = permit.ResultDigest(result.Value)
	}
	signed, err := nucleus.Sign(m.key, nucleus.DomainOutcome, outcome)
	if err != nil {
		panic(err)
	}
	result.Outcome = &signed
	return result
}

func (m *inside) work(kind string, header any, args tools.Args, result any) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := m.worker.Open(ctx, kind, header)
	if err != nil {
		return err
	}
	defer stream.Close()
	if err := stream.SendJSON(wire.FrameJSON, args); err != nil {
		return err
	}
	for {
		frame, payload, err := stream.Recv(32 << 20)
		if err != nil {
			return err
		}
		if frame == wire.FrameResult {
			return json.Unmarshal(payload, result)
		}
	}
}

// repo moves repositories with plain git, as any machine could.
func (m *inside) repo(stream *wire.Stream) {
	var call guest.RepoCall
	if err := nucleus.Strict(stream.Header, &call); err != nil {
		return
	}
	m.host.mu.Lock()
	own := m.host.repo
	m.host.mu.Unlock()
	if own != nil && own(m, stream, call) {
		return
	}
	var result tools.Result
	var value any
	var err error
	if call.In != nil {
		value, err = m.unbundle(stream, *call.In)
	} else if call.Add != nil {
		value, err = m.add(stream, *call.Add)
	} else {
		value, err = m.bundle(stream, *call.Out)
	}
	if err != nil {
		result.Error = nucleus.Errorf(nucleus.KindFailed, "%v", err)
	} else {
		result.Value, _ = json.Marshal(value)
	}
	stream.SendJSON(wire.FrameResult, result)
}

func (m *inside) dir(repo string) string { return filepath.Join(m.in.Spec.Workspace, repo) }

func (m *inside) git(repo string, args ...string) (string, error) {
	cmd := exec.Command("git", args...)
	cmd.Dir = m.dir(repo)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("git %v: %w: %s", args, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// commit makes a commit in the machine, as its tools do.
func (m *inside) commit(name, content string) string {
	m.host.t.Helper()
	if err := os.WriteFile(filepath.Join(m.dir("app"), name), []byte(content), 0o644); err != nil {
		m.host.t.Fatal(err)
	}
	for _, args := range [][]string{{"add", "-A"}, {"commit", "--quiet", "-m", "agent: " + name}} {
		if _, err := m.git("app", args...); err != nil {
			m.host.t.Fatal(err)
		}
	}
	id, err := m.git("app", "rev-parse", "HEAD")
	if err != nil {
		m.host.t.Fatal(err)
	}
	return id
}

func (m *inside) unbundle(stream *wire.Stream, u tools.Unbundle) (any, error) {
	if err := os.Mkdir(m.dir(u.Repo), 0o755); err != nil {
		return nil, err
	}
	file, err := os.Create(m.dir(u.Repo) + ".bundle")
	if err != nil {
		return nil, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	for {
		kind, payload, err := stream.Recv(1 << 20)
		if err != nil || kind != wire.FrameData {
			return nil, fmt.Errorf("frame %q: %w", kind, err)
		}
		if len(payload) == 0 {
			break
		}
		if _, err := file.Write(payload); err != nil {
			return nil, err
		}
	}
	for _, args := range [][]string{
		{"init", "--quiet", "--initial-branch=" + u.Branch}, {"bundle", "unbundle", file.Name()},
		{"update-ref", "refs/heads/" + u.Branch, u.Commit}, {"reset", "--quiet", "--hard", u.Commit},
	} {
		if _, err := m.git(u.Repo, args...); err != nil {
			return nil, err
		}
	}
	return tools.UnbundleResult{Repo: u.Repo, Commit: u.Commit, Branch: u.Branch}, nil
}

// add takes a branch of another machine in.
func (m *inside) add(stream *wire.Stream, in tools.Incoming) (any, error) {
	var pack bytes.Buffer
	for {
		kind, payload, err := stream.Recv(1 << 20)
		if err != nil || kind != wire.FrameData {
			return nil, fmt.Errorf("frame %q: %w", kind, err)
		}
		if len(payload) == 0 {
			break
		}
		pack.Write(payload)
	}
	cmd := exec.Command("git", "index-pack", "--stdin", "--fix-thin")
	cmd.Dir, cmd.Stdin = m.dir(in.Repo), &pack
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("index-pack: %w: %s", err, out)
	}
	_, err := m.git(in.Repo, "update-ref", "refs/heads/"+in.Branch, in.Commit)
	return tools.UnbundleResult{Repo: in.Repo, Commit: in.Commit, Branch: in.Branch}, err
}

// worktree is a commit of what lies in the working tree; HEAD where nothing has changed.
func (m *inside) worktree(repo string) (string, error) {
	if changed, err := m.git(repo, "status", "--porcelain"); err != nil || changed == "" {
		return "HEAD", err
	}
	if _, err := m.git(repo, "add", "-A"); err != nil {
		return "", err
	}
	defer m.git(repo, "reset", "-q")
	return m.git(repo, "stash", "create")
}

func (m *inside) bundle(stream *wire.Stream, b tools.Bundle) (any, error) {
	ref := b.Ref
	if ref == tools.WorktreeRef {
		at, err := m.worktree(b.Repo)
		if err != nil {
			return nil, err
		}
		if _, err := m.git(b.Repo, "update-ref", ref, at); err != nil {
			return nil, err
		}
	}
	commit, err := m.git(b.Repo, "rev-parse", "--verify", "--quiet", ref)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindNotFound, "no branch %q", ref)
	}
	result := tools.BundleResult{Ref: ref, Commit: commit}
	if commit == b.Base {
		result.Empty = true
		return result, stream.Send(wire.FrameData, nil)
	}
	file := m.dir(b.Repo) + ".out"
	defer os.Remove(file)
	args := []string{"bundle", "create", "--quiet", file, ref}
	if b.Base != "" {
		args = append(args, "^"+b.Base)
	}
	if _, err := m.git(b.Repo, args...); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return result, sendBundle(stream, data)
}

func sendBundle(stream *wire.Stream, data []byte) error {
	if _, err := (frameWriter{stream}).Write(data); err != nil {
		return err
	}
	return stream.Send(wire.FrameData, nil)
}

// person is an approver with a real key.
type person struct {
	nucleus.Approver
	key paseto.V4AsymmetricSecretKey
}

func newPerson(t testing.TB, name string) person {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	p := person{Approver: nucleus.Approver{Name: name, Kind: nucleus.ApproverEd25519, Key: public}}
	if err == nil {
		p.key, err = paseto.NewV4AsymmetricSecretKeyFromEd25519(private)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// authorityStub approves and denies at a test's word, with real keys.
type authorityStub struct {
	t        testing.TB
	socket   string
	persons  []person
	uses     map[string][]string // permits that used what was granted for an ask
	at       func(step string)   // nil, or called when something has been written down and is not answered yet
	voided   []approvals.Voided
	left     []string // pods that were withdrawn
	reports  []approvals.Outcome
	answers  bool // to who watches
	database string

	mu      sync.Mutex
	asks    map[string]nucleus.AskRequest
	order   []string
	status  map[string]approvals.Status
	changed chan struct{}
	keys    map[string]map[string][]byte
	server  *http.Server
	witness *witnessed
}

func newAuthority(t testing.TB) *authorityStub {
	t.Helper()
	dir, err := os.MkdirTemp("", "caln-auth-")
	if err != nil {
		t.Fatal(err)
	}
	a := &authorityStub{t: t, socket: filepath.Join(dir, "s"), persons: []person{newPerson(t, "person")}, uses: map[string][]string{}, answers: true, database: "db-1", asks: map[string]nucleus.AskRequest{},
		status: map[string]approvals.Status{}, changed: make(chan struct{}), keys: map[string]map[string][]byte{}, witness: newWitnessed()}
	a.start()
	t.Cleanup(func() { a.stop(); os.RemoveAll(dir) })
	return a
}

// newKey gives the first person another key.
func (a *authorityStub) newKey() { a.persons[0] = newPerson(a.t, a.persons[0].Name) }

func (a *authorityStub) start() {
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/info", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		info := approvals.Info{Approvals: approvals.SameUser, Witness: a.witness.PublicKey()}
		for _, p := range a.persons {
			info.Approvers = append(info.Approvers, p.Approver)
		}
		json.NewEncoder(w).Encode(info)
	})
	mux.HandleFunc("POST "+approvals.WitnessPrefix+"/logs", func(w http.ResponseWriter, r *http.Request) {
		var log approvals.Log
		json.NewDecoder(r.Body).Decode(&log)
		a.witness.trust(log.Key)
		w.Write([]byte("{}"))
	})
	mux.Handle("POST "+approvals.WitnessPrefix+"/add-checkpoint", a.witness)
	mux.HandleFunc("POST /v1/pods", func(w http.ResponseWriter, r *http.Request) {
		var p approvals.Pod
		json.NewDecoder(r.Body).Decode(&p)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.keys[p.Pod] = p.Keys
		w.Write([]byte("{}"))
	})
	// It counts and refuses nothing: what refuses in these tests is the node.
	mux.HandleFunc("POST /v1/asks/{id}/uses", func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		var use approvals.Use
		json.NewDecoder(r.Body).Decode(&use)
		a.mu.Lock()
		if a.status[id].State == approvals.Revoked {
			a.mu.Unlock()
			wire.WriteError(w, nucleus.Errorf(nucleus.KindRefused, "ask %s is revoked", id))
			return
		}
		a.uses[id] = append(a.uses[id], use.Permit)
		used := approvals.Used{N: len(a.uses[id]), Of: 1}
		a.mu.Unlock()
		a.reached("counted")
		json.NewEncoder(w).Encode(used)
	})
	mux.HandleFunc("POST /v1/asks/{id}/outcomes", func(w http.ResponseWriter, r *http.Request) {
		var o approvals.Outcome
		json.NewDecoder(r.Body).Decode(&o)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.reports = append(a.reports, o)
		w.Write([]byte("{}"))
	})
	mux.HandleFunc("POST /v1/pods/{pod}/withdrawal", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.left = append(a.left, r.PathValue("pod"))
		gone := []approvals.Approval{}
		for ask, permits := range a.uses {
			approval := approvals.Approval{Ask: ask, State: approvals.Spent, Pod: a.asks[ask].Pod, Op: a.asks[ask].Action.Op, Grants: []approvals.Given{{Grant: "g-of-" + ask}}}
			for i, permit := range permits {
				approval.Uses = append(approval.Uses, approvals.UseOf{N: i + 1, Permit: permit, Outcome: nucleus.OutcomeUnknown})
			}
			if approval.Pod == r.PathValue("pod") {
				gone = append(gone, approval)
			}
		}
		json.NewEncoder(w).Encode(gone)
	})
	mux.HandleFunc("GET /v1/revocations", func(w http.ResponseWriter, r *http.Request) {
		after, err := strconv.Atoi(r.URL.Query().Get("after"))
		a.mu.Lock()
		database := a.database
		a.mu.Unlock()
		begins := r.URL.Query().Get("database") != database
		for limit := time.After(approvals.WatchWait); err == nil; {
			a.mu.Lock()
			voided, changed, answers := a.voided, a.changed, a.answers
			a.mu.Unlock()
			if !answers {
				break
			}
			if begins {
				voided, after = nil, len(voided)
			} else {
				voided = voided[min(after, len(voided)):]
			}
			if told := (approvals.Watched{Database: database, Seq: int64(after + len(voided)), Revoked: append([]approvals.Voided{}, voided...)}); len(voided) > 0 || begins {
				json.NewEncoder(w).Encode(told)
				return
			}
			select {
			case <-changed:
			case <-limit:
				json.NewEncoder(w).Encode(approvals.Watched{Database: database, Seq: int64(after), Revoked: []approvals.Voided{}})
				return
			case <-r.Context().Done():
				return
			}
		}
		wire.WriteError(w, nucleus.Errorf(nucleus.KindUnavailable, "not now"))
	})
	mux.HandleFunc("POST /v1/asks", func(w http.ResponseWriter, r *http.Request) {
		raw, _ := io.ReadAll(r.Body)
		ask, digest, _, err := approval.Parse(raw)
		if err != nil {
			wire.WriteError(w, nucleus.Errorf(nucleus.KindInvalid, "%v", err))
			return
		}
		a.reached("asked")
		a.mu.Lock()
		if _, known := a.asks[ask.ID]; !known {
			a.order = append(a.order, ask.ID)
			a.status[ask.ID] = approvals.Status{ID: ask.ID, State: approvals.Pending, AskDigest: digest, Need: ask.Approvals}
		}
		a.asks[ask.ID] = ask
		close(a.changed)
		a.changed = make(chan struct{})
		status := a.status[ask.ID]
		a.mu.Unlock()
		a.reached("submitted")
		json.NewEncoder(w).Encode(status)
	})
	mux.HandleFunc("GET /v1/asks/{id}", func(w http.ResponseWriter, r *http.Request) {
		for {
			a.mu.Lock()
			status, changed := a.status[r.PathValue("id")], a.changed
			a.mu.Unlock()
			if status.State != approvals.Pending || r.URL.Query().Get("wait") == "" {
				json.NewEncoder(w).Encode(status)
				return
			}
			select {
			case <-changed:
			case <-r.Context().Done():
				return
			}
		}
	})
	a.server = &http.Server{Handler: mux}
	go a.server.Serve(l)
}

func (a *authorityStub) stop() { a.server.Close() }

func (a *authorityStub) reached(step string) {
	a.mu.Lock()
	at := a.at
	a.mu.Unlock()
	if at != nil {
		at(step)
	}
}

// asked returns the asks so far.
func (a *authorityStub) asked() []nucleus.AskRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	var asks []nucleus.AskRequest
	for _, id := range a.order {
		asks = append(asks, a.asks[id])
	}
	return asks
}

func (a *authorityStub) answer(id string, s approvals.Status) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s.ID = id
	a.status[id] = s
	close(a.changed)
	a.changed = make(chan struct{})
}

// revoke takes back what was granted for an ask.
func (a *authorityStub) revoke(id, reason string) {
	a.mu.Lock()
	a.voided = append(a.voided, approvals.Voided{Ask: id, Pod: a.asks[id].Pod, Grants: []string{}, Reason: reason})
	a.mu.Unlock()
	a.answer(id, approvals.Status{State: approvals.Revoked, Reason: reason})
}

func (a *authorityStub) deny(id, reason string) {
	a.answer(id, approvals.Status{State: approvals.Denied, Reason: reason})
}

// grant answers ask id with a grant for what change makes of it.
func (a *authorityStub) grant(id string, change func(*nucleus.AskRequest)) {
	a.t.Helper()
	a.mu.Lock()
	ask, ok := a.asks[id]
	a.mu.Unlock()
	if !ok {
		a.t.Fatalf("no ask %q", id)
	}
	if change != nil {
		change(&ask)
	}
	var tokens []string
	for _, p := range a.persons[:ask.Approvals] {
		tokens = append(tokens, p.token(a.t, ask))
	}
	a.answer(id, given(tokens...))
}

// grantTask answers ask id with a grant for a task: as narrow as can be, but for what change makes
// of it.
func (a *authorityStub) grantTask(id string, uses int, change func(*nucleus.Task)) {
	a.t.Helper()
	a.mu.Lock()
	ask := a.asks[id]
	a.mu.Unlock()
	match, err := approval.Narrowest(ask)
	if err != nil {
		a.t.Fatal(err)
	}
	task := nucleus.Task{Uses: uses, Until: ask.Created + 30*60*1000, Exposure: approval.Told(ask), Match: match}
	if change != nil {
		change(&task)
	}
	a.answer(id, given(a.persons[0].taskToken(a.t, ask, &task)))
}

// given is the answer of an authority where these tokens were granted.
func given(tokens ...string) approvals.Status {
	s := approvals.Status{State: approvals.Granted, Need: len(tokens)}
	for _, token := range tokens {
		s.Grants = append(s.Grants, approvals.Given{Token: token})
	}
	return s
}

func (p person) token(t testing.TB, ask nucleus.AskRequest) string { return p.taskToken(t, ask, nil) }

func (p person) taskToken(t testing.TB, ask nucleus.AskRequest, task *nucleus.Task) string {
	t.Helper()
	b, err := approval.Bind(ask)
	if err != nil {
		t.Fatal(err)
	}
	grant := b.Grant(nucleus.NewID("g-"), p.Name, "looks right")
	grant.Task = task
	raw, err := nucleus.Canonical(grant)
	if err != nil {
		t.Fatal(err)
	}
	token, err := paseto.NewTokenFromClaimsJSON(raw, approval.Footer(p.Name))
	if err != nil {
		t.Fatal(err)
	}
	return token.V4Sign(p.key, approval.Assertion(b.AskDigest))
}

// personRepo is a person's repository with a bare remote, both below one directory.
type personRepo struct {
	t           testing.TB
	Dir, Remote string
}

func newPersonRepo(t testing.TB) *personRepo {
	t.Helper()
	dir := t.TempDir()
	r := &personRepo{t, filepath.Join(dir, "app"), filepath.Join(dir, "remote.git")}
	for _, d := range []string{r.Dir, r.Remote} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.git(r.Remote, "init", "--quiet", "--bare")
	r.git(r.Dir, "init", "--quiet", "--initial-branch=main")
	r.commit("README.md", "hello\n")
	r.git(r.Dir, "remote", "add", "origin", r.Remote)
	r.git(r.Dir, "push", "--quiet", "origin", "main")
	r.git(r.Dir, "fetch", "--quiet", "origin")
	return r
}

func (r *personRepo) git(dir string, args ...string) string {
	r.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=P", "GIT_AUTHOR_EMAIL=p@example.org", "GIT_COMMITTER_NAME=P", "GIT_COMMITTER_EMAIL=p@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (r *personRepo) commit(name, content string) string {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.Dir, name), []byte(content), 0o644); err != nil {
		r.t.Fatal(err)
	}
	r.git(r.Dir, "add", "-A")
	r.git(r.Dir, "commit", "--quiet", "-m", "change "+name)
	return r.git(r.Dir, "rev-parse", "HEAD")
}

// at is where the remote's branch stands; "" where it does not exist.
func (r *personRepo) at(branch string) string {
	r.t.Helper()
	cmd := exec.Command("git", "rev-parse", "--verify", "--quiet", "refs/heads/"+branch)
	cmd.Dir = r.Remote
	out, _ := cmd.Output()
	return strings.TrimSpace(string(out))
}

func (r *personRepo) spec(workspace string, policy json.RawMessage) nucleus.PodSpec {
	spec := specOf(workspace, policy)
	spec.Repos = []nucleus.Repo{{Name: "app", Path: r.Dir, Branch: "agent/work"}}
	return spec
}

// pipe is both ends of a stream of frames.
func pipe(t testing.TB) (a, b *wire.Stream) {
	t.Helper()
	x, y := net.Pipe()
	t.Cleanup(func() { x.Close(); y.Close() })
	return wire.NewStream(x), wire.NewStream(y)
}

// memoryFS is a disk for a log that fails where it is told to.
type memoryFS struct {
	mu    sync.Mutex
	files map[string][]byte
	fail  func(what string) error // before the effect; nil: never
}

func newMemoryFS() *memoryFS { return &memoryFS{files: map[string][]byte{}} }

func (m *memoryFS) failing(f func(string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = f
}

func (m *memoryFS) check(what string) error {
	if m.fail == nil {
		return nil
	}
	return m.fail(what)
}

type nothing struct{}

func (nothing) Close() error { return nil }

func (m *memoryFS) Lock(string) (io.Closer, error) { return nothing{}, nil }
func (m *memoryFS) Close() error                   { return nil }

func (m *memoryFS) Names() ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	names := map[string]bool{}
	for name := range m.files {
		first, _, _ := strings.Cut(name, "/")
		names[first] = true
	}
	return slices.Sorted(maps.Keys(names)), nil
}

func (m *memoryFS) Partials() ([]string, error) { return nil, nil }

func (m *memoryFS) ReadFile(name string, limit int64) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.files[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	if int64(len(data)) > limit {
		return nil, errors.New("too large")
	}
	return slices.Clone(data), nil
}

func (m *memoryFS) WriteFile(name string, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("write " + name); err != nil {
		return err
	}
	m.files[name] = slices.Clone(data)
	return nil
}

func (m *memoryFS) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.files, name)
	return nil
}

func (m *memoryFS) Append(name string) (audit.File, error) { return &memoryFile{m, name}, nil }

// dump writes the disk into a directory.
func (m *memoryFS) dump(t testing.TB) (dir string) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	dir = t.TempDir()
	for name, content := range m.files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

type memoryFile struct {
	fs   *memoryFS
	name string
}

func (f *memoryFile) Write(p []byte) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.check("append"); err != nil {
		return 0, err
	}
	f.fs.files[f.name] = append(f.fs.files[f.name], p...)
	return len(p), nil
}

func (f *memoryFile) Sync() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return f.fs.check("sync")
}

func (f *memoryFile) Close() error { return nil }

// memoryLog gives the node a log on a disk that can fail. No pod may exist yet.
func (h *host) memoryLog() *memoryFS {
	h.t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		h.t.Fatal(err)
	}
	disk := newMemoryFS()
	log, err := audit.Open("memory", audit.Options{Origin: nucleus.LogOrigin, Key: key, FS: disk, Link: true})
	if err != nil {
		h.t.Fatal(err)
	}
	h.node.stopKeeping() // the test says when the log is taken up again
	h.node.serving.Wait()
	if err := h.node.log.Close(); err != nil {
		h.t.Fatal(err)
	}
	h.node.log = log
	if h.node.witness, err = newWitnesses(log, key.Public().(ed25519.PublicKey), h.node.asks, nil); err != nil {
		h.t.Fatal(err)
	}
	return disk
}

// get is an ask that is held.
func (b *askBook) get(id string) (pendingAsk, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, ok := b.asks[id]
	return p, ok
}
