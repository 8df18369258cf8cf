package node

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"cal/approval"
	"cal/egress"
	"cal/guest"
	"cal/nucleus"
	"cal/wire"
)

// A grant for net_connect or web_fetch is for a place: an operation, a host and a port.
// It is used up like every other, once and durably, before anything happens; what its use
// opens is a passage, which the session's further requests to that place go through. A
// passage is in this node's memory alone. It ends with the node, so that a restart, or a
// crash, asks anew; when the session takes private data or untrusted content by anything but
// a passage that the person was not told of; and when its time has passed. Connections that
// went through it end with it.

// A task is open like a passage, for one operation and what its pattern describes. It is used by
// word of the authority each time, and counted.

// passage is one open passage of a session, or a task.
type passage struct {
	pod      string // whose machine knows it
	link     *link  // to the authority that may take it back
	op       nucleus.Op
	host     string
	port     int
	exposure nucleus.Legs // as far as the session may have gone beside its passages
	until    int64        // unix milliseconds
	used     used
	task     *nucleus.Task // nil for a passage
	uses     int           // of the task
}

// leads reports whether a goes where the passage leads, or is what the task is for.
func (p *passage) leads(a nucleus.Action) bool {
	if p.task != nil {
		return approval.Matches(p.task.Match, a) == nil
	}
	host, port, placed := a.Place()
	return placed && p.host == host && p.port == port
}

// used are the grants that were used up for an ask.
type used struct {
	ask       *nucleus.AskRequest
	grants    []string // their ids
	approvers []string
	tokens    []string
}

// passageLife is how long a passage stands at most.
const passageLife = time.Hour

// passage returns what lets a through now: an open passage of a pod, or else a task with uses
// left; nil for none. The caller holds the session's mutex.
func (s *rootSession) passage(pod string, a nucleus.Action, now time.Time) *passage {
	var task *passage
	for i := range s.passages {
		p := &s.passages[i]
		switch {
		case !s.covers(p, pod, a, now):
		case p.task == nil:
			return p
		case p.uses < p.task.Uses:
			task = p
		}
	}
	return task
}

// covers reports whether a was let through by p, and would not be cut off now.
func (s *rootSession) covers(p *passage, pod string, a nucleus.Action, now time.Time) bool {
	return p.pod == pod && p.op == a.Op && s.stands(p, now) && p.leads(a)
}

// open reports whether a passage lets a through now.
func (s *rootSession) open(pod string, a nucleus.Action, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.passage(pod, a, now) != nil
}

func (s *rootSession) stands(p *passage, now time.Time) bool {
	return now.UnixMilli() < p.until && !s.beyond(p.exposure)
}

// beyond reports whether the session has taken more, beside its passages, than a person
// was told.
func (s *rootSession) beyond(told nucleus.Legs) bool { return s.beside()&bothLegs&^told != 0 }

// admits says why what was granted for ask, a passage or a task, does not let a through. The caller holds the
// session's mutex.
func (s *rootSession) admits(ask nucleus.AskRequest, task *nucleus.Task, a nucleus.Action) error {
	host, port, placed := a.Place()
	q := ask.Passage
	refuse := func(format string, args ...any) error {
		return &nucleus.Error{Kind: nucleus.KindRefused, Operation: a.Op, Ask: ask.ID, Message: fmt.Sprintf(format, args...)}
	}
	if task != nil {
		if err := approval.Matches(task.Match, a); err != nil || ask.Action.Op != a.Op {
			return refuse("the task granted for %s is not for this %s: %v", ask.ID, a.Op, err)
		}
		if s.beyond(task.Exposure) {
			return refuse("the session has taken more than the person was told: ask again")
		}
	}
	switch {
	case !placed && q == nil:
		return nil
	case !placed || q == nil || ask.Action.Op != a.Op || q.Host != host || q.Port != port:
		return refuse("the grant for %s is not for %s to %s port %d", ask.ID, a.Op, host, port)
	case s.beyond(q.Exposure):
		return refuse("the session has taken more than the person was told: ask again")
	}
	return nil
}

// closeUncovered forgets the passages that have ended and closes every connection of the
// session's pods which would not be let in now. The caller holds the session's mutex.
func (n *Node) closeUncovered(root *rootSession) {
	now := n.config.Now()
	root.passages = slices.DeleteFunc(root.passages, func(q passage) bool { return !root.stands(&q, now) })
	for p := range root.pods {
		state := p.context(now)
		n.gateway.CloseAll(egress.Peer{Pod: p.record.ID, Session: p.record.Session}, func(a egress.Attempt) bool {
			if a.Via == egress.ViaModel {
				return true // named by the person at launch
			}
			action := connectAction(a)
			switch p.policy.Decide(action, state).Verdict {
			case nucleus.Allow:
				return true
			case nucleus.Ask:
				return slices.ContainsFunc(root.passages, func(q passage) bool {
					return (q.task != nil || n.passagesStand(p)) && root.covers(&q, p.record.ID, action, now)
				})
			}
			return false
		})
	}
}

// endPassages closes what went through passages whose time has passed.
func (n *Node) endPassages() {
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	for _, p := range pods {
		p.mu.Lock()
		root := p.root
		p.mu.Unlock()
		if root == nil {
			continue
		}
		root.mu.Lock()
		for i := range root.passages {
			if !root.stands(&root.passages[i], n.config.Now()) {
				n.closeUncovered(root)
				break
			}
		}
		root.mu.Unlock()
	}
}

// askPatience is how long a connection waits for the asking: a refusal is no hang.
const askPatience = 3 * time.Second

// connect is the path of a connection that a program in the machine opens: the same as
// of every request, but nobody waits for the person.
func (n *Node) connect(ctx context.Context, p *Pod, a egress.Attempt) (nucleus.Permit, error) {
	r := request{caller: wire.Caller{KeyID: p.record.Boot, Role: wire.AgentRole, Pod: p.record.ID}, attempt: &a}
	pre := prepared{action: connectAction(a), salt: nucleus.NewSalt()}
	r.op = pre.action.Op
	var err error
	if pre.digest, err = pre.action.Digest(pre.salt); err != nil {
		return nucleus.Permit{}, err
	}
	ruled, err := n.decide(ctx, p, r, pre, nil)
	if needed := needsOf(err); needed != nil {
		ctx, cancel := context.WithTimeout(ctx, askPatience)
		defer cancel()
		ruled, _, err = n.approve(ctx, p, r, pre, needed)
	}
	if err != nil {
		return nucleus.Permit{}, err
	}
	return p.recorded(ruled) // before anything is dialled
}

// connectArgs are the arguments of a net_connect: what the machine signs for.
func connectArgs(host string, port int) []byte {
	raw, err := nucleus.Canonical(nucleus.Connect{Host: host, Port: port})
	if err != nil {
		panic(err) // a host in the gateway's spelling and a number
	}
	return raw
}

func connectAction(a egress.Attempt) nucleus.Action {
	fetch := &nucleus.Fetch{Method: a.Method, URL: a.URL, Host: a.Host, Port: a.Port, Path: a.Path}
	if a.Via == egress.ViaFetch {
		return nucleus.Action{Op: nucleus.WebFetch, Fetch: fetch}
	}
	action := nucleus.Action{Op: nucleus.NetConnect, Args: nucleus.SHA256(connectArgs(a.Host, a.Port)), Connect: &nucleus.Connect{Host: a.Host, Port: a.Port}}
	if a.Method != "" { // plain HTTP: the gateway sees inside
		action.Fetch = fetch
	}
	return action
}

// signature is the machine's word that a program in it asked for what the gateway
// understood on a connection.
func (p *Pod) signature(ctx context.Context, a egress.Attempt) (*wire.SignedRequest, error) {
	session, err := p.wire()
	if err != nil {
		return nil, err
	}
	stream, err := session.Open(ctx, guest.StreamSign, guest.SignCall{Connection: a.Stream, Host: a.Host, Port: a.Port})
	if err != nil {
		return nil, p.lost(err)
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, func() { stream.Close() })
	defer stop()
	var reply guest.SignReply
	if err := stream.RecvJSON(wire.FrameResult, 64<<10, &reply); err != nil {
		return nil, p.lost(err)
	}
	if reply.Error != nil {
		return nil, reply.Error
	}
	if err := p.checkSignature(reply.Request, a); err != nil {
		return nil, nucleus.Errorf(nucleus.KindForbidden, "what the machine signed for a connection: %v", err)
	}
	return reply.Request, nil
}

func (p *Pod) checkSignature(signed *wire.SignedRequest, a egress.Attempt) error {
	if signed == nil {
		return fmt.Errorf("nothing")
	}
	if err := signed.Verify(wire.Key{ID: p.record.Boot, Ed25519: p.record.OutcomeKey}); err != nil {
		return err
	}
	target := fmt.Sprintf("http://%s/v1/pods/%s/tools/%s", authority, p.record.ID, nucleus.NetConnect)
	if signed.Method != http.MethodPost || signed.TargetURI != target || signed.Pod != p.record.ID || string(signed.Body) != string(connectArgs(a.Host, a.Port)) {
		return fmt.Errorf("it is %s %s for pod %s", signed.Method, signed.TargetURI, signed.Pod)
	}
	return nil
}

// placeDetail is what is known of a place before anything is sent there.
func (n *Node) placeDetail(ctx context.Context, p *Pod, r request, a nucleus.Action) ([]nucleus.Detail, error) {
	host, port, _ := a.Place()
	addresses, err := n.addressesOf(ctx, p, host, port)
	if err != nil {
		return nil, err
	}
	details := []nucleus.Detail{{Title: "addresses of " + host, Text: addresses}}
	if r.attempt == nil {
		return details, nil
	}
	text := "a program in the machine opens a connection, by " + string(r.attempt.Via)
	if r.attempt.Method != "" {
		text = "a program in the machine asks, in plain HTTP:\n" + r.attempt.Method + " " + cut(r.attempt.URL, 2000)
	}
	return append(details, nucleus.Detail{Title: "first request", Text: text}), nil
}

const lookupPatience = time.Second

// addressesOf says where host leads. A name that the policy does not name is not looked
// up: what a guest chose freely, a name server of the guest's would hear. A place that the
// gateway never dials is an error: there is nothing to ask for.
func (n *Node) addressesOf(ctx context.Context, p *Pod, host string, port int) (string, error) {
	if _, err := netip.ParseAddr(host); err != nil && !p.policy.NamesHost(host, port) {
		return "not looked up before it is granted: the policy does not name this host, and the question to a name server would carry the name out", nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupPatience)
	defer cancel()
	addrs, err := n.gateway.Lookup(ctx, host, p.policy.Literals(host, port))
	if err != nil {
		e := nucleus.AsError(err)
		if e.Kind == nucleus.KindDenied {
			return "", e
		}
		return "not known now: " + cut(e.Message, 300), nil
	}
	var lines []string
	for _, a := range addrs {
		lines = append(lines, a.String())
	}
	if len(addrs) == 1 && addrs[0].String() == host {
		return host + ", as asked for", nil
	}
	return strings.Join(lines, "\n") + "\n(now; each connection looks it up anew)", nil
}
