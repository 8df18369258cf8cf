package node

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/egress"
	"cal/guest"
	"cal/nucleus"
	"cal/wire"
)

// web is a site on loopback that counts who comes, and lets connections stand.
type web struct {
	host string
	port int
	hits atomic.Int32
}

func newWeb(t testing.TB, host string) *web {
	t.Helper()
	w := &web{host: host}
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.hits.Add(1)
		io.WriteString(rw, "page "+r.URL.Path)
		if r.URL.Path == "/endless" {
			rw.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	w.port = l.Addr().(*net.TCPAddr).Port
	return w
}

func (w *web) url(path string) string { return fmt.Sprintf("http://%s:%d%s", w.host, w.port, path) }

// connects is a policy under which programs may connect to these sites and the agent may
// fetch from them.
func connects(levels string, sites ...*web) json.RawMessage {
	var policy map[string]any
	if err := json.Unmarshal(policyOf(levels), &policy); err != nil {
		panic(err)
	}
	rules := []map[string]any{}
	for _, s := range sites {
		rules = append(rules, map[string]any{"host": s.host, "port": s.port})
	}
	policy["hosts"] = map[string]any{"only": rules}
	raw, _ := json.Marshal(policy)
	return raw
}

const ordinary = "read_files write_files net_connect web_fetch"

// get asks for a page through the machine's HTTP proxy, as any program can.
func (h *host) get(p *Pod, s *web) answer {
	h.t.Helper()
	return h.getHost(p, s.host, s.port)
}

func (h *host) getHost(p *Pod, host string, port int) answer {
	h.t.Helper()
	stream := h.inside(p).program(guest.StreamHTTP, host, port)
	defer stream.Close()
	fmt.Fprintf(stream, "GET http://%s/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", net.JoinHostPort(host, strconv.Itoa(port)))
	return h.read(stream)
}

// tunnel is a connection that a program has open.
type tunnel struct {
	*wire.Stream
	from *bufio.Reader
}

// through opens a tunnel by HTTP CONNECT.
func (h *host) through(p *Pod, s *web) (*tunnel, answer) {
	h.t.Helper()
	stream := h.inside(p).program(guest.StreamHTTP, s.host, s.port)
	fmt.Fprintf(stream, "CONNECT %s:%d HTTP/1.1\r\nHost: x\r\n\r\n", s.host, s.port)
	const established = "HTTP/1.1 200 Connection established\r\n\r\n"
	head := make([]byte, len(established))
	n, err := io.ReadFull(stream, head)
	if err == nil && string(head) == established {
		return &tunnel{stream, bufio.NewReader(stream)}, answer{Status: http.StatusOK}
	}
	return nil, h.read(io.MultiReader(strings.NewReader(string(head[:n])), stream))
}

func (h *host) read(from io.Reader) answer {
	h.t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(from), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(resp.Body)
	a := answer{Status: resp.StatusCode, Body: string(raw)}
	var body struct {
		Error *nucleus.Error `json:"error"`
	}
	if a.Status >= 300 && json.Unmarshal(raw, &body) == nil {
		a.Error = body.Error
	}
	return a
}

// socks asks by SOCKS5 and returns the reply.
func (h *host) socks(p *Pod, s *web) byte {
	h.t.Helper()
	stream := h.inside(p).program(guest.StreamSOCKS, s.host, s.port)
	defer stream.Close()
	raw := append([]byte{5, 1, 0, 5, 1, 0, 3, byte(len(s.host))}, s.host...)
	stream.Write(binary.BigEndian.AppendUint16(raw, uint16(s.port)))
	reply := make([]byte, 12)
	if _, err := io.ReadFull(stream, reply); err != nil {
		h.t.Fatal(err)
	}
	return reply[3]
}

// private is a pod whose session has read private data, so that connections ask.
func (h *host) private(workspace string, policy json.RawMessage) *Pod {
	h.t.Helper()
	p := h.pod(specOf(workspace, policy), map[string]string{"a": "secret"})
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(h.t, "")
	return p
}

// asks is the error of a connection that waits for a person.
func (h *host) asks(a answer) *nucleus.Error {
	h.t.Helper()
	e := a.want(h.t, nucleus.KindApproval)
	if e.Ask == "" || a.Status != http.StatusForbidden {
		h.t.Fatalf("got %v, want 403 with an ask", a)
	}
	return e
}

// A connection that needs a person is refused at once, with the ask; it is the machine
// that signed for it; a grant lets this session's connections to that place through,
// and each is recorded with it.
func TestConnectionAsks(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	first := h.asks(h.get(p, site))
	if first.Rule != "trifecta" || first.Operation != nucleus.NetConnect {
		t.Errorf("got %+v", first)
	}
	for range 3 {
		if again := h.asks(h.get(p, site)); again.Ask != first.Ask {
			t.Errorf("a retry is ask %s, not %s", again.Ask, first.Ask)
		}
	}
	if _, a := h.through(p, site); h.asks(a).Ask != first.Ask {
		t.Errorf("CONNECT is another ask: %v", a)
	}
	if reply := h.socks(p, site); reply != 2 {
		t.Errorf("SOCKS reply %d, want 2", reply)
	}
	if n := site.hits.Load(); n != 0 {
		t.Fatalf("%d requests came without a grant", n)
	}
	asks := h.authority.asked()
	if len(asks) != 1 {
		t.Fatalf("%d asks, want 1", len(asks))
	}
	ask := asks[0]
	if err := approval.Check(ask); err != nil {
		t.Error(err)
	}
	var signed wire.SignedRequest
	if err := json.Unmarshal(ask.Request, &signed); err != nil {
		t.Fatal(err)
	}
	if err := signed.Verify(wire.Key{ID: p.record.Boot, Ed25519: p.record.OutcomeKey}); err != nil || ask.Requester != p.record.Boot {
		t.Errorf("the machine did not sign: %v, requester %s", err, ask.Requester)
	}
	if ask.Action.Args != nucleus.SHA256(signed.Body) || !strings.HasSuffix(signed.TargetURI, "/tools/net_connect") {
		t.Errorf("signed %s %s", signed.TargetURI, signed.Body)
	}
	if want := (nucleus.Passage{Host: site.host, Port: site.port, Exposure: nucleus.Private | nucleus.WayOut, Millis: 3_600_000}); ask.Passage == nil || *ask.Passage != want {
		t.Errorf("passage %+v, want %+v", ask.Passage, want)
	}
	if ask.Context.Exposure != nucleus.Private || ask.Action.Fetch != nil {
		t.Errorf("context %+v, action %+v", ask.Context, ask.Action)
	}
	screen, err := approval.Draw(ask, approval.View{Width: 200})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{`"127.0.0.1"`, strconv.Itoa(site.port), "127.0.0.1, as asked for", "GET " + site.url("/a"), "exposure    private", "every net_connect of this session", "1h0m0s"} {
		if !strings.Contains(screen.Text, text) {
			t.Errorf("no %q on the screen:\n%s", text, screen.Text)
		}
	}

	h.authority.grant(first.Ask, nil)
	h.get(p, site).want(t, "")
	if reply := h.socks(p, site); reply != 0 {
		t.Errorf("SOCKS reply %d after the grant", reply)
	}
	if tunnel, a := h.through(p, site); tunnel == nil {
		t.Errorf("CONNECT after the grant: %v", a)
	}
	if n := site.hits.Load(); n != 1 {
		t.Errorf("%d requests came, want 1", n)
	}
	if n := len(h.authority.asked()); n != 1 {
		t.Errorf("%d asks, want 1", n)
	}

	uses := h.entries(nucleus.KindApprovalUse, nucleus.NetConnect)
	if len(uses) != 1 || uses[0].Ask != first.Ask || !strings.Contains(string(uses[0].Data), `"until_ms"`) {
		t.Fatalf("uses %+v", uses)
	}
	opened := h.entries(nucleus.KindEgressOpen, "")
	if len(opened) != 3 {
		t.Errorf("%d openings recorded, want 3", len(opened))
	}
	for _, e := range opened {
		if !slices.Equal(e.Grants, uses[0].Grants) || e.Seq < uses[0].Seq {
			t.Errorf("opening %+v, use %+v", e, uses[0])
		}
	}
	refused, let := 0, 0
	for _, e := range h.entries(nucleus.KindIntent, nucleus.NetConnect) {
		if e.Ask != first.Ask || e.Verdict != nucleus.Ask {
			t.Errorf("intent %+v", e)
		}
		if e.Status == nucleus.OutcomeRefused {
			refused++
		} else if slices.Equal(e.Grants, uses[0].Grants) && e.Seq > uses[0].Seq {
			let++
		}
	}
	if refused != 6 || let != 3 {
		t.Errorf("%d refusals and %d passings recorded, want 6 and 3", refused, let)
	}
	if legs := p.root.legs(); legs != nucleus.Private|nucleus.Untrusted|nucleus.WayOut {
		t.Errorf("exposure %v", legs.Names())
	}
	if open := h.node.log.OpenIntents(); len(open) != 0 {
		t.Errorf("open intents: %+v", open)
	}
}

// A grant is for one place, one operation, one session.
func TestPassageIsForOnePlace(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, port, host := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.2")
	policy := connects(ordinary, site, port, host)
	p, stranger := h.private("w", policy), h.private("other", policy)
	asked := map[string]bool{}
	granted := h.asks(h.get(p, site)).Ask
	asked[granted] = true
	h.authority.grant(granted, nil)
	h.get(p, site).want(t, "")
	for what, refused := range map[string]*nucleus.Error{
		"another port":      h.asks(h.get(p, port)),
		"another host":      h.asks(h.get(p, host)),
		"another pod":       h.asks(h.get(stranger, site)),
		"another operation": h.tool(p, nucleus.WebFetch, map[string]string{"url": site.url("/b")}).want(t, nucleus.KindApproval),
	} {
		if asked[refused.Ask] {
			t.Errorf("%s: the ask of something else", what)
		}
		asked[refused.Ask] = true
	}
	if n := site.hits.Load() + port.hits.Load() + host.hits.Load(); n != 1 {
		t.Errorf("%d requests came, want the one that was granted", n)
	}
	// The next session of the workspace has none of its passages.
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	next := h.pod(specOf("w", policy), nil)
	if e := h.asks(h.get(next, site)); asked[e.Ask] {
		t.Error("another session: the ask of something else")
	}
	if n := site.hits.Load(); n != 1 {
		t.Errorf("%d requests came", n)
	}
}

// A grant that was given for one place is not used for another, whoever mixes them up, and
// stays good for its own.
func TestGrantOfAnotherPlace(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.private("", connects("read_files net_connect web_fetch=ask", site, other))
	id := h.asks(h.get(p, site)).Ask
	h.authority.grant(id, nil)
	h.authority.mu.Lock()
	tokens, ask := h.authority.status[id].Tokens(), h.authority.asks[id]
	h.authority.mu.Unlock()
	grants, err := approval.Approved(tokens, ask, p.approvers, h.clock.now().UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	with := &approved{ask, grants, tokens}
	decide := func(action nucleus.Action) error {
		pre := prepared{action: action, salt: nucleus.NewSalt()}
		_, err := h.node.decide(t.Context(), p, request{op: action.Op, caller: wire.Caller{KeyID: p.record.Boot}}, pre, with)
		return err
	}
	for what, action := range map[string]nucleus.Action{
		"another port": connectAction(egress.Attempt{Via: egress.ViaSOCKS, Host: other.host, Port: other.port}),
		"a fetch":      connectAction(egress.Attempt{Via: egress.ViaFetch, Host: site.host, Port: site.port, Method: "GET", URL: site.url("/"), Path: "/"}),
	} {
		if err := decide(action); err == nil || nucleus.AsError(err).Kind != nucleus.KindRefused || !strings.Contains(err.Error(), "is not for") {
			t.Errorf("%s: %v", what, err)
		}
	}
	h.get(p, site).want(t, "") // not used up by it
	if other.hits.Load() != 0 || site.hits.Load() != 1 {
		t.Errorf("came: %d and %d", other.hits.Load(), site.hits.Load())
	}
}

// What the authority signs must be the ask that was made, to its last field.
func TestGrantOfAnotherPassage(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	id := h.asks(h.get(p, site)).Ask
	for name, change := range map[string]func(*nucleus.AskRequest){
		"longer": func(a *nucleus.AskRequest) {
			a.Passage = &nucleus.Passage{Host: site.host, Port: site.port, Exposure: a.Passage.Exposure, Millis: 1 << 40}
		},
		"another port": func(a *nucleus.AskRequest) {
			a.Passage = &nucleus.Passage{Host: site.host, Port: 1, Exposure: a.Passage.Exposure, Millis: a.Passage.Millis}
		},
		"more exposed": func(a *nucleus.AskRequest) {
			a.Passage = &nucleus.Passage{Host: site.host, Port: site.port, Exposure: 7, Millis: a.Passage.Millis}
		},
		"none":    func(a *nucleus.AskRequest) { a.Passage = nil },
		"session": func(a *nucleus.AskRequest) { a.Session = "s-other" },
		"pod":     func(a *nucleus.AskRequest) { a.Pod = "p-other" },
		"boot":    func(a *nucleus.AskRequest) { a.Boot = "b-other" },
	} {
		h.authority.grant(id, change)
		if a := h.get(p, site); a.Status != http.StatusForbidden || a.Error.Kind != nucleus.KindRefused || !strings.Contains(a.Body, "grant") {
			t.Errorf("%s: %v", name, a)
		}
	}
	if site.hits.Load() != 0 {
		t.Error("somebody came")
	}
	h.authority.grant(id, nil)
	h.get(p, site).want(t, "")
}

// closes fails unless the tunnel ends.
func (c *tunnel) closes(t testing.TB, when string) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c.from); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection stands", when)
	}
}

// lives fails unless the tunnel carries a request and its answer.
func (c *tunnel) lives(t testing.TB, when string) {
	t.Helper()
	io.WriteString(c, "GET /alive HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(c.from, nil)
	if err != nil {
		t.Errorf("%s: %v", when, err)
		return
	}
	defer resp.Body.Close()
	if raw, err := io.ReadAll(resp.Body); err != nil || string(raw) != "page /alive" {
		t.Errorf("%s: %q, %v", when, raw, err)
	}
}

// A passage ends when the session takes what the person was not told of, by anything but
// passages; what went through it ends too, and the next attempt asks anew, with what is so now.
func TestPassageEndsWithExposure(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	h.node.stopKeeping() // at once, not with the next look at the clock
	h.node.serving.Wait()
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site, other))
	first := h.asks(h.get(p, site)).Ask
	h.authority.grant(first, nil)
	tunnel, a := h.through(p, site)
	if tunnel == nil {
		t.Fatal(a)
	}
	// A second passage takes untrusted and a way out as the first did: it ends no other.
	second := h.asks(h.get(p, other)).Ask
	h.authority.grant(second, nil)
	h.get(p, other).want(t, "")
	tunnel.lives(t, "beside a second passage")
	// Nor does a file of what the person knows to be private.
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	tunnel.lives(t, "after another private file")
	h.get(p, site).want(t, "")

	// A repository that cannot be trusted is in the machine, and is read.
	p.root.mu.Lock()
	p.record.Untrusted = true
	p.root.mu.Unlock()
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	tunnel.closes(t, "after an untrusted file")
	before := site.hits.Load()
	third := h.asks(h.get(p, site))
	if third.Ask == first || site.hits.Load() != before {
		t.Errorf("ask %s, %d requests more", third.Ask, site.hits.Load()-before)
	}
	if e := h.asks(h.get(p, other)); e.Ask == second {
		t.Error("the other passage stands")
	}
	asks := h.authority.asked()
	ask := asks[slices.IndexFunc(asks, func(a nucleus.AskRequest) bool { return a.ID == third.Ask })]
	if !ask.Passage.Exposure.Has(bothLegs) || !ask.Context.Exposure.Has(bothLegs) {
		t.Errorf("the person is told of %v, passage %v", ask.Context.Exposure.Names(), ask.Passage.Exposure.Names())
	}
	if !slices.ContainsFunc(ask.Evidence, func(e nucleus.Evidence) bool { return e.Leg == "untrusted" && strings.HasPrefix(e.What, "read_files") }) {
		t.Errorf("evidence %+v", ask.Evidence)
	}
	h.authority.grant(third.Ask, nil)
	h.get(p, site).want(t, "")
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	h.get(p, site).want(t, "") // nothing new was taken
}

// An ask that told the person less than is so by now is not answered by its grant.
func TestStaleAsk(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	first := h.asks(h.get(p, site)).Ask
	h.authority.grant(first, nil)
	p.root.mu.Lock()
	err := h.node.expose(p, nucleus.Untrusted, false, "read_files of a stranger's")
	p.root.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if e := h.asks(h.get(p, site)); e.Ask == first || site.hits.Load() != 0 {
		t.Errorf("ask %s, %d requests", e.Ask, site.hits.Load())
	}
	if got := h.entries(nucleus.KindApprovalUse, ""); len(got) != 0 {
		t.Errorf("uses %+v", got)
	}
	// The same where the grant is at hand already: decide has the last word.
	h.authority.mu.Lock()
	ask, tokens := h.authority.asks[first], h.authority.status[first].Tokens()
	h.authority.mu.Unlock()
	grants, err := approval.Approved(tokens, ask, p.approvers, h.clock.now().UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	pre := prepared{action: connectAction(egress.Attempt{Via: egress.ViaSOCKS, Host: site.host, Port: site.port}), salt: nucleus.NewSalt()}
	if _, err := h.node.decide(t.Context(), p, request{op: nucleus.NetConnect}, pre, &approved{ask, grants, tokens}); err == nil || !strings.Contains(err.Error(), "taken more") {
		t.Errorf("got %v", err)
	}
}

// A passage ends when its hour has passed, and with it what went through it; a younger one
// stands on.
func TestPassageEndsWithTime(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, younger := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site, younger))
	open := func(s *web) (*tunnel, string) {
		t.Helper()
		ask := h.asks(h.get(p, s)).Ask
		h.authority.grant(ask, nil)
		tunnel, a := h.through(p, s)
		if tunnel == nil {
			t.Fatal(a)
		}
		return tunnel, ask
	}
	old, first := open(site)
	h.clock.pass(50 * time.Minute)
	young, _ := open(younger)
	h.clock.pass(9 * time.Minute)
	h.get(p, site).want(t, "")
	old.lives(t, "after 59 minutes")
	h.clock.pass(time.Minute)
	if e := h.asks(h.get(p, site)); e.Ask == first {
		t.Error("the ask of an hour ago")
	}
	old.closes(t, "after an hour")
	young.lives(t, "the younger one")
	h.get(p, younger).want(t, "")
	if n := site.hits.Load(); n != 2 {
		t.Errorf("%d requests came, want 2", n)
	}
}

// A node's passages end with it; the grant stays used up. That also holds for one whose
// ask and token come back.
func TestPassageEndsWithNode(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("w", connects(ordinary, site))
	seen := map[string]bool{}
	for round, end := range []func(){h.restart, func() { h.kill(); h.start() }, func() { h.kill(); h.start() }} {
		id := h.asks(h.get(p, site)).Ask
		if seen[id] {
			t.Fatalf("round %d: an ask of an earlier node", round)
		}
		seen[id] = true
		pending, _ := p.asks.get(id)
		h.authority.grant(id, nil)
		h.get(p, site).want(t, "")
		hits := site.hits.Load()
		end()
		var err error
		if p, err = h.node.pod(p.record.ID); err != nil {
			t.Fatal(err)
		}
		p.asks.put(pending)
		if a := h.get(p, site); a.Error == nil || !strings.Contains(a.Body, "used before") {
			t.Errorf("round %d: the grant again: %v", round, a)
		}
		h.asks(h.get(p, site))
		if site.hits.Load() != hits {
			t.Errorf("round %d: somebody came", round)
		}
		p.dropAsk(id)
		for _, a := range h.authority.asked() {
			seen[a.ID] = true
			p.dropAsk(a.ID)
		}
	}
}

// The use of a grant that cannot be made durable opens nothing.
func TestPassageNotRecorded(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	disk := h.memoryLog()
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	h.authority.grant(h.asks(h.get(p, site)).Ask, nil)
	disk.failing(func(string) error { return errNo })
	if a := h.get(p, site); a.Status == http.StatusOK || site.hits.Load() != 0 {
		t.Errorf("with a full disk: %v", a)
	}
	disk.failing(nil)
	if err := h.node.log.Reopen(); err != nil {
		t.Fatal(err)
	}
	if len(p.root.passages) != 0 {
		t.Errorf("passages %+v", p.root.passages)
	}
	// The grant is lost, and a new ask is made: never the other way round.
	h.authority.grant(h.asks(h.get(p, site)).Ask, nil)
	if err := h.node.spent.Close(); err != nil {
		t.Fatal(err)
	}
	if a := h.get(p, site); a.Status == http.StatusOK || site.hits.Load() != 0 {
		t.Errorf("without the store of used grants: %v", a)
	}
}

// A person's no to a place holds for a while: nobody asks again at once. An answer that
// did not come in time is no no.
func TestPersonDeniesPlace(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.private("", connects("read_files net_connect web_fetch=ask", site, other))
	ask := h.asks(h.get(p, site)).Ask
	h.authority.deny(ask, "not there")
	for range 4 {
		a := h.get(p, site)
		if e := a.want(t, nucleus.KindRefused, "not there"); e.Ask != ask || a.Status != http.StatusForbidden {
			t.Errorf("got %v", a)
		}
	}
	if reply := h.socks(p, site); reply != 2 {
		t.Errorf("SOCKS reply %d", reply)
	}
	if n := len(h.authority.asked()); n != 1 {
		t.Errorf("%d asks, want 1", n)
	}
	if got := h.entries(nucleus.KindApprovalDeny, nucleus.NetConnect); len(got) != 1 {
		t.Errorf("%d denials recorded", len(got))
	}
	// The no is for that place, and for that operation.
	if e := h.asks(h.get(p, other)); e.Ask == ask {
		t.Error("another place")
	}
	fetch := func() answer { return h.tool(p, nucleus.WebFetch, map[string]string{"url": site.url("/b")}) }
	fetched := fetch().want(t, nucleus.KindApproval).Ask
	h.authority.deny(fetched, "nor so")
	for range 3 {
		if e := fetch().want(t, nucleus.KindRefused, "nor so"); e.Ask != fetched {
			t.Errorf("got %+v", e)
		}
	}
	// What the session takes meanwhile makes no yes of it.
	p.root.mu.Lock()
	err := h.node.expose(p, nucleus.Untrusted, false, "test")
	p.root.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	h.get(p, site).want(t, nucleus.KindRefused)
	h.clock.pass(askLife)
	late := h.asks(h.get(p, site)).Ask
	if late == ask {
		t.Error("the no holds for ever")
	}
	h.authority.answer(late, approvals.Status{State: approvals.Expired})
	h.get(p, site).want(t, nucleus.KindRefused, "in time")
	if e := h.asks(h.get(p, site)); e.Ask == late {
		t.Error("an ask that ran out is still the ask")
	}
	if site.hits.Load() != 0 {
		t.Error("somebody came")
	}
}

// A machine that does not sign, or signs something else, gets no ask: the connection is
// refused, and the record says why.
func TestMachineDoesNotSign(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, sign := range map[string]func(*inside, guest.SignCall) guest.SignReply{
		"refuses": func(*inside, guest.SignCall) guest.SignReply {
			return guest.SignReply{Error: nucleus.Errorf(nucleus.KindForbidden, "not asked for")}
		},
		"signs nothing": func(*inside, guest.SignCall) guest.SignReply { return guest.SignReply{} },
		"another host": func(m *inside, c guest.SignCall) guest.SignReply {
			return m.statement(m.key, m.boot.Pod, nucleus.NetConnect, "good.example", c.Port)
		},
		"another port": func(m *inside, c guest.SignCall) guest.SignReply {
			return m.statement(m.key, m.boot.Pod, nucleus.NetConnect, c.Host, c.Port+1)
		},
		"another operation": func(m *inside, c guest.SignCall) guest.SignReply {
			return m.statement(m.key, m.boot.Pod, nucleus.WebFetch, c.Host, c.Port)
		},
		"another pod": func(m *inside, c guest.SignCall) guest.SignReply {
			return m.statement(m.key, "p-other", nucleus.NetConnect, c.Host, c.Port)
		},
		"another key": func(m *inside, c guest.SignCall) guest.SignReply {
			return m.statement(stranger, m.boot.Pod, nucleus.NetConnect, c.Host, c.Port)
		},
	} {
		h.mu.Lock()
		h.sign = sign
		h.mu.Unlock()
		a := h.get(p, site)
		if e := a.want(t, nucleus.KindApproval, "could not be asked"); e.Ask != "" || a.Status != http.StatusForbidden {
			t.Errorf("%s: %v", name, a)
		}
		intents := h.entries(nucleus.KindIntent, nucleus.NetConnect)
		if last := intents[len(intents)-1]; last.Status != nucleus.OutcomeRefused || !strings.Contains(string(last.Data), "message") {
			t.Errorf("%s: recorded %+v", name, last)
		}
	}
	if n := len(h.authority.asked()); n != 0 {
		t.Errorf("%d asks", n)
	}
	h.mu.Lock()
	h.sign = nil
	h.mu.Unlock()
	h.asks(h.get(p, site)) // control
}

// A program that opens connections all at once makes one ask, and one grant is used once
// for all of them.
func TestManyConnectionsOneAsk(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	at := func(n int) []answer {
		var calls sync.WaitGroup
		answers := make([]answer, n)
		for i := range answers {
			calls.Go(func() { answers[i] = h.get(p, site) })
		}
		calls.Wait()
		return answers
	}
	for _, a := range at(20) {
		h.asks(a)
	}
	asks := h.authority.asked()
	if len(asks) != 1 {
		t.Fatalf("%d asks, want 1", len(asks))
	}
	h.authority.grant(asks[0].ID, nil)
	for _, a := range at(20) {
		a.want(t, "")
	}
	if n := len(h.authority.asked()); n != 1 || site.hits.Load() != 20 {
		t.Errorf("%d asks, %d requests", n, site.hits.Load())
	}
	if got := h.entries(nucleus.KindApprovalUse, ""); len(got) != 1 {
		t.Errorf("%d uses", len(got))
	}
}

// Who tries one place after the other does not fill the person's queue.
func TestOpenAsksAreLimited(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.private("", policyOf(ordinary))
	for i := range maxOpenAsks + 5 {
		a := h.getHost(p, fmt.Sprintf("h%d.example", i), 80)
		if e := a.want(t, nucleus.KindApproval); (e.Ask != "") != (i < maxOpenAsks) {
			t.Errorf("place %d: %v", i, a)
		}
	}
	asks := h.authority.asked()
	if len(asks) != maxOpenAsks {
		t.Fatalf("%d asks, want %d", len(asks), maxOpenAsks)
	}
	h.authority.deny(asks[0].ID, "")
	h.getHost(p, "h0.example", 80).want(t, nucleus.KindRefused)
	h.asks(h.getHost(p, "later.example", 80))
}

// lookups answers every name and remembers which it was asked for.
type lookups struct {
	mu     sync.Mutex
	names  []string
	answer string
}

func (l *lookups) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.names = append(l.names, host)
	return []netip.Addr{netip.MustParseAddr(l.answer)}, nil
}

func (l *lookups) asked() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.names)
}

// A name that a guest could choose is not looked up before a person has seen it: the
// question would carry it out. One that the policy names is.
func TestNamesAreNotLookedUp(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	resolver := &lookups{answer: "93.184.216.34"}
	h.node.gateway = egress.New(egress.Config{Gate: (*gate)(h.node), Resolver: resolver})
	var policy map[string]any
	if err := json.Unmarshal(policyOf(ordinary), &policy); err != nil {
		t.Fatal(err)
	}
	policy["hosts"] = json.RawMessage(`{"only":[{"host":"*.wild.example","port":80},{"host":"named.example","port":80}]}`)
	p, anywhere := h.private("a", document(t, policy)), h.private("b", policyOf(ordinary))
	for _, c := range []struct {
		p    *Pod
		host string
		text string
	}{
		{p, "c2vjcmv0.wild.example", "not looked up"},
		{anywhere, "c2vjcmv0.any.example", "not looked up"},
		{p, "named.example", "93.184.216.34"},
		{anywhere, "93.184.216.35", "as asked for"},
	} {
		id := h.asks(h.getHost(c.p, c.host, 80)).Ask
		asks := h.authority.asked()
		ask := asks[slices.IndexFunc(asks, func(a nucleus.AskRequest) bool { return a.ID == id })]
		if len(ask.Detail) != 3 || !strings.Contains(ask.Detail[1].Text, c.text) {
			t.Errorf("%s: %+v, want %q", c.host, ask.Detail, c.text)
		}
	}
	if got := resolver.asked(); !slices.Equal(got, []string{"named.example"}) {
		t.Errorf("looked up: %q", got)
	}
	// Where the gateway never goes there is nothing to ask a person for.
	before := len(h.authority.asked())
	resolver.mu.Lock()
	resolver.answer = "10.0.0.7"
	resolver.mu.Unlock()
	next := h.private("c", document(t, policy))
	for what, a := range map[string]answer{
		"a name that leads to a private network": h.getHost(next, "named.example", 80),
		"loopback":                               h.getHost(anywhere, "127.0.0.1", 80),
		"metadata":                               h.getHost(anywhere, "169.254.169.254", 80),
	} {
		if a.Error == nil || a.Error.Kind != nucleus.KindDenied || a.Error.Rule != "egress.address" {
			t.Errorf("%s: %v", what, a)
		}
	}
	if n := len(h.authority.asked()); n != before {
		t.Errorf("%d asks more", n-before)
	}
}

// Nobody can approve, or nobody answers: a refusal, and no hang.
func TestConnectionWithoutAuthority(t *testing.T) {
	t.Parallel()
	site := newWeb(t, "127.0.0.1")
	h := newHost(t)
	p := h.private("", connects(ordinary, site))
	a := h.get(p, site)
	if e := a.want(t, nucleus.KindApproval, "nobody could approve"); e.Ask != "" || a.Status != http.StatusForbidden {
		t.Errorf("got %v", a)
	}
	if got := h.entries(nucleus.KindIntent, nucleus.NetConnect); len(got) != 1 || got[0].Status != nucleus.OutcomeRefused || got[0].Verdict != nucleus.Ask {
		t.Errorf("recorded %+v", got)
	}
	h = newHost(t, withAuthority)
	p = h.private("", connects(ordinary, site))
	h.authority.stop()
	a = h.get(p, site)
	a.want(t, nucleus.KindApproval, "could not be asked")
	if strings.Contains(a.Body, h.authority.socket) {
		t.Errorf("a program in the machine is told of the host: %v", a)
	}
	h.authority.start()
	h.asks(h.get(p, site))
	if site.hits.Load() != 0 {
		t.Error("somebody came")
	}
}

// A fetch is granted by place too: one grant, every page of it, until the session has
// read what the person was not told of.
func TestFetchPassage(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.pod(specOf("", connects("read_files web_fetch=ask net_connect=ask", site, other)), map[string]string{"a": "secret"})
	fetch := func(s *web, path, method string) answer {
		return h.tool(p, nucleus.WebFetch, map[string]string{"url": s.url(path), "method": method})
	}
	first := fetch(site, "/a", "GET").want(t, nucleus.KindApproval).Ask
	if again := fetch(site, "/b", "POST").want(t, nucleus.KindApproval).Ask; again != first {
		t.Errorf("another page is ask %s, not %s", again, first)
	}
	operator := h.serve(h.node, h.signed(h.asOperator(), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/web_fetch", p.record.ID, document(t, map[string]string{"url": site.url("/c")})))
	if e := operator.want(t, nucleus.KindApproval); e.Ask != first {
		t.Errorf("the session's ask is %s, not %s", e.Ask, first)
	}
	ask := h.authority.asked()[0]
	if err := approval.Check(ask); err != nil || ask.Passage.Exposure != nucleus.WayOut || ask.Action.Fetch.URL != site.url("/a") {
		t.Errorf("%v, passage %+v, action %+v", err, ask.Passage, ask.Action.Fetch)
	}
	h.authority.grant(first, nil)
	for _, path := range []string{"/a", "/b", "/c"} {
		if a := fetch(site, path, "POST"); !strings.Contains(a.Body, "page "+path) {
			t.Errorf("%s: %v", path, a)
		}
	}
	fetch(other, "/a", "GET").want(t, nucleus.KindApproval)
	h.asks(h.get(p, site)) // a connection is another operation
	if n := len(h.entries(nucleus.KindApprovalUse, "")); n != 1 {
		t.Errorf("%d uses", n)
	}
	use := h.entries(nucleus.KindApprovalUse, "")[0]
	opened, intents := h.entries(nucleus.KindEgressOpen, nucleus.WebFetch), h.entries(nucleus.KindIntent, nucleus.WebFetch)
	if len(opened) != 3 || len(intents) != 3 {
		t.Fatalf("%d openings, %d intents, want 3 of each", len(opened), len(intents))
	}
	for i := range opened {
		if !slices.Equal(opened[i].Grants, use.Grants) || !slices.Equal(intents[i].Grants, use.Grants) || intents[i].Ask != first {
			t.Errorf("opening %+v of %+v", opened[i], intents[i])
		}
	}
	// What the page said does not end it; what the session reads besides does.
	if !p.root.legs().Has(nucleus.Untrusted|nucleus.WayOut) || p.root.legs().Has(nucleus.Private) {
		t.Errorf("exposure %v", p.root.legs().Names())
	}
	long := make(chan answer, 1)
	go func() { long <- fetch(site, "/endless", "GET") }()
	eventually(t, "a fetch under way", func() bool { return site.hits.Load() == 4 })
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	if a := <-long; a.Error == nil || !strings.Contains(a.Body, "withdrawn") {
		t.Errorf("the fetch under way: %v", a)
	}
	next := fetch(site, "/a", "GET").want(t, nucleus.KindApproval)
	if next.Ask == first || next.Rule != "trifecta" {
		t.Errorf("got %+v", next)
	}
	if n := site.hits.Load(); n != 4 {
		t.Errorf("%d requests came, want 4", n)
	}
}

// The agent waits for the person, and goes on with its own request.
func TestFetchWaitsForPerson(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	got := make(chan answer, 2)
	for _, path := range []string{"/one", "/two"} {
		go func() { got <- h.tool(p, nucleus.WebFetch, map[string]string{"url": site.url(path)}, "wait=15") }()
	}
	eventually(t, "an ask", func() bool { return len(h.authority.asked()) == 1 })
	h.authority.grant(h.authority.asked()[0].ID, nil)
	pages := []string{(<-got).Body, (<-got).Body}
	for _, path := range []string{"/one", "/two"} {
		if !slices.ContainsFunc(pages, func(body string) bool { return strings.Contains(body, "page "+path) }) {
			t.Errorf("no %s among %q", path, pages)
		}
	}
	if n := len(h.authority.asked()); n != 1 {
		t.Errorf("%d asks", n)
	}
}

// What passages alone have taken is still taken: it counts at the gate, for ever, and
// is stored apart.
func TestExposureThroughPassages(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("w", connects(ordinary+" git_push", site))
	h.authority.grant(h.asks(h.get(p, site)).Ask, nil)
	h.get(p, site).want(t, "")
	stored, err := openSession("s-1", p.record.Workspace, p.dir)
	if err != nil {
		t.Fatal(err)
	}
	if stored.exposure != nucleus.Private|nucleus.Untrusted|nucleus.WayOut || stored.beside() != nucleus.Private {
		t.Errorf("stored: %v, beside passages %v", stored.exposure.Names(), stored.beside().Names())
	}
	h.kill()
	h.start()
	if p, err = h.node.pod(p.record.ID); err != nil {
		t.Fatal(err)
	}
	if e := h.asks(h.get(p, site)); e.Rule != "trifecta" {
		t.Errorf("got %+v", e)
	}
	if ask := h.authority.asked()[1]; !ask.Context.Exposure.Has(bothLegs) || ask.Passage.Exposure != nucleus.Private|nucleus.WayOut {
		t.Errorf("exposure %v, passage %v", ask.Context.Exposure.Names(), ask.Passage.Exposure.Names())
	}
}

// outside is a name server and a network that remember what they were asked for, and how
// many entries the log had on the disk then. Nobody answers there.
type outside struct {
	log func() int64

	mu      sync.Mutex
	lookups []int64
	dials   []int64
}

func (o *outside) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lookups = append(o.lookups, o.log())
	return []netip.Addr{netip.MustParseAddr("93.184.216.34")}, nil
}

func (o *outside) DialContext(context.Context, string, string) (net.Conn, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dials = append(o.dials, o.log())
	return nil, errNo
}

// seen takes what was seen since it was asked last.
func (o *outside) seen() (lookups, dials []int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	lookups, dials = o.lookups, o.dials
	o.lookups, o.dials = nil, nil
	return lookups, dials
}

// Before a connection's intent is on the disk nothing of it leaves the host: no dial, and
// no question to a name server either. That holds where nobody has to be asked and where a
// passage is open.
func TestConnectionWaitsForIntent(t *testing.T) {
	t.Parallel()
	for name, levels := range map[string]string{"allowed": "net_connect", "through a passage": "net_connect=ask"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, withAuthority)
			disk := h.memoryLog()
			var policy map[string]any
			if err := json.Unmarshal(policyOf(levels), &policy); err != nil {
				t.Fatal(err)
			}
			policy["hosts"] = json.RawMessage(`{"only":[{"host":"*.wild.example","port":80}]}`)
			p := h.pod(specOf("", document(t, policy)), nil)
			world := &outside{log: h.node.log.Size}
			h.node.gateway = egress.New(egress.Config{Gate: (*gate)(h.node), Resolver: world, Dialer: world})
			get := func() answer { return h.getHost(p, "a.wild.example", 80) }
			goes := func(when string) {
				t.Helper()
				before := h.node.log.Size()
				get()
				// The intent, and that it is opened.
				if lookups, dials := world.seen(); !slices.Equal(lookups, []int64{before + 1}) || !slices.Equal(dials, []int64{before + 2}) {
					t.Errorf("%s: looked up with %d entries and dialled with %d, of %d before", when, lookups, dials, before)
				}
			}
			if levels != "net_connect" {
				h.authority.grant(h.asks(get()).Ask, nil)
				get()
				world.seen()
			}
			goes("at first")
			disk.failing(func(string) error { return errNo })
			if a := get(); a.Error == nil || a.Error.Kind != nucleus.KindUnavailable {
				t.Errorf("with a full disk: %v", a)
			}
			if lookups, dials := world.seen(); len(lookups)+len(dials) != 0 {
				t.Errorf("with a full disk: looked up with %d entries, dialled with %d", lookups, dials)
			}
			disk.failing(nil)
			if err := h.node.log.Reopen(); err != nil {
				t.Fatal(err)
			}
			goes("with room again")
		})
	}
}

// A pod that has ended has no connections, through a passage neither; that is recorded.
func TestNoPassageAfterPodEnded(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site := newWeb(t, "127.0.0.1")
	p := h.private("", connects(ordinary, site))
	h.authority.grant(h.asks(h.get(p, site)).Ask, nil)
	h.get(p, site).want(t, "")
	p.setState(stateStopped, "")
	if a := h.get(p, site); a.Error == nil || a.Error.Kind != nucleus.KindUnavailable || site.hits.Load() != 1 {
		t.Errorf("got %v, %d requests came", a, site.hits.Load())
	}
	intents := h.entries(nucleus.KindIntent, nucleus.NetConnect)
	if last := intents[len(intents)-1]; last.Verdict != nucleus.Deny || last.Rule != rulePod || last.Status != nucleus.OutcomeRefused || !strings.Contains(string(last.Data), "attempt") {
		t.Errorf("recorded %+v", last)
	}
	p.setState(stateRunning, "")
	h.get(p, site).want(t, "") // control
}

// Every fetch through a passage is admitted by the machine, with the grant that opened it.
// A node that takes the passage for one of another place does not get past the machine.
func TestFetchPassageHasTwoLocks(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	p := h.pod(specOf("", connects("web_fetch=ask", site, other)), nil)
	fetch := func(s *web) answer {
		return h.tool(p, nucleus.WebFetch, map[string]string{"url": s.url("/a")})
	}
	h.authority.grant(fetch(site).want(t, nucleus.KindApproval).Ask, nil)
	fetch(site).want(t, "")
	fetch(site).want(t, "")
	permits := h.inside(p).permits()
	if len(permits) != 2 || len(permits[0].Grants) != 1 || !slices.Equal(permits[0].Grants, permits[1].Grants) || permits[0].Seq == permits[1].Seq {
		t.Errorf("admitted %+v", permits)
	}
	p.root.mu.Lock()
	p.root.passages[0].port = other.port
	p.root.mu.Unlock()
	if a := fetch(other); a.Error == nil || a.Error.Kind != nucleus.KindForbidden || !strings.Contains(a.Body, "leads elsewhere") || other.hits.Load() != 0 {
		t.Errorf("to another place: %v, %d requests came", a, other.hits.Load())
	}
	p.root.mu.Lock()
	p.root.passages[0].port = site.port
	p.root.mu.Unlock()
	fetch(site).want(t, "") // control
	var machine, node nucleus.Outcome
	for i, e := range h.entries(nucleus.KindOutcome, nucleus.WebFetch) {
		if err := e.Outcome.Open(h.node.key.Public().(ed25519.PublicKey), nucleus.DomainOutcome, &node); err != nil {
			t.Fatal(err)
		}
		if err := node.Admission.Open(p.record.OutcomeKey, nucleus.DomainOutcome, &machine); err != nil {
			t.Fatal(err)
		}
		want := []string{nucleus.OutcomeDone, nucleus.OutcomeDone, nucleus.OutcomeRefused, nucleus.OutcomeDone}[i]
		if node.Status != want || (machine.Status == nucleus.OutcomeAdmitted) != (want == nucleus.OutcomeDone) {
			t.Errorf("outcome %d: node %s, machine %s, want %s", i, node.Status, machine.Status, want)
		}
		node, machine = nucleus.Outcome{}, nucleus.Outcome{}
	}
}
