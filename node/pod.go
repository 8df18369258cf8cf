package node

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"cal/egress"
	"cal/guest"
	"cal/internal/durable"
	"cal/internal/idmap"
	"cal/internal/redact"
	"cal/machine"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

// The states of a pod.
const (
	statePlanned  = "planned" // worked out, and not begun
	stateStarting = "starting"
	stateRunning  = "running"
	statePaused   = "paused" // stopped for exceeding a watched limit
	stateStopped  = "stopped"
	stateFailed   = "failed"
)

// Pod is a machine with its policy and its session.
type Pod struct {
	node    *Node
	dir     string
	record  record // what is on disk; only the node's own goroutine for the pod changes it
	policy  *policy.Policy
	digest  string // of the policy
	root    *rootSession
	machine machine.Machine
	seq     atomic.Uint64
	asks    askBook
	asked   *newSub       // what the pod was asked for with; nil: by the person, or adopted
	route   *egress.Route // to the agent's model; nil: none
	laps    laps          // of its start
	ahead   string        // the note of the spare that its machine was; empty: of none

	logged bool // pod.create is in the log

	// The keys that can approve for this pod, as they were at its boot: the machine
	// knows these, and an authority that shows others later changes nothing.
	approvers []nucleus.Approver

	acting    sync.WaitGroup // effects on the host that have begun
	recording sync.Mutex     // held while the record of a repository is read and written anew
	fetching  sync.Mutex     // held while what the workspace keeps of a repository is replaced
	ending    sync.Mutex     // held while what came of its errand is brought back

	working bool // something runs that no request waits for; the root session's mutex guards it

	mu                  sync.Mutex // of the fields below, and of root and machine while the pod starts
	session             *wire.Session
	watched             *wire.Stream                             // on which the machine says what runs
	stopping, stopAgain bool                                     // what runs is being ended; since that began the machine said that something runs
	calls               map[*wire.Stream]context.CancelCauseFunc // commands that run
	state               string
	reason              string
	removed             bool             // nothing of the machine is left
	runs                map[int64]string // of the agent, whose end is not recorded: by the start's entry, who started it
	errand              *errand          // of its agent, where another pod's agent gave it a task
	users               int              // who use it now, see transient.go
	used                time.Duration    // when the last of them were done, by Config.Monotonic

	started chan struct{} // closed when the start has come to an end
	gone    chan struct{} // closed when removed
	failed  chan struct{} // closed when it cannot go on
}

// record is pod.json: all that the next node needs to take the pod up again or to
// remove it whole. It is on disk before the machine is made.
type record struct {
	ID         string               `json:"id"`
	Workspace  string               `json:"workspace"` // directory on the host
	Spec       nucleus.PodSpec      `json:"spec"`
	Driver     string               `json:"driver"`
	Tier       nucleus.Tier         `json:"tier"`
	Session    string               `json:"session"`
	Boot       string               `json:"boot"`
	OutcomeKey []byte               `json:"outcome_key,omitempty"` // empty until the machine has answered
	Approvers  []nucleus.Approver   `json:"approvers,omitempty"`
	Approvals  string               `json:"approvals,omitempty"` // how strong they are, as approvals.Info.By says
	Policy     json.RawMessage      `json:"policy"`
	Repos      []nucleus.RepoStatus `json:"repos,omitempty"`
	Untrusted  bool                 `json:"untrusted"` // holds a repository that is labelled so
	Epoch      uint64               `json:"epoch"`     // counts nodes; sequences of different nodes never meet
	Created    string               `json:"created"`
	Version    string               `json:"version"` // of the programs in the machine
	Sub        *subRecord           `json:"sub,omitempty"`
}

// root is the session whose exposure, budget and storage the pod shares.
func (r record) root() string {
	if r.Sub != nil {
		return r.Sub.Session
	}
	return r.Session
}

var podRef = regexp.MustCompile(`^r-[A-Za-z0-9]{1,64}$`)

var workspaceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CreatePod starts a machine for spec and returns when it serves.
func (n *Node) CreatePod(ctx context.Context, actor string, spec nucleus.PodSpec) (*Pod, error) {
	var l laps
	l.begin()
	p, err := n.plan(ctx, spec)
	if err != nil {
		n.recordPodRefused(actor, spec, err)
		return nil, err
	}
	l.lap("plan")
	p.laps = l
	if err := n.create(ctx, actor, p); err != nil {
		if !p.logged {
			n.recordPodRefused(actor, spec, err)
		}
		return nil, err
	}
	return p, nil
}

// recordPodRefused records a pod that was asked for and not made.
func (n *Node) recordPodRefused(actor string, spec nucleus.PodSpec, why error) {
	e := nucleus.AsError(why)
	n.note(nucleus.Entry{Actor: actor, Kind: nucleus.KindPodRefuse, Rule: e.Rule, Status: nucleus.OutcomeRefused, Data: data(map[string]any{
		"workspace": cut(spec.Workspace, 200), "driver": cut(spec.Driver, 200), "require": cut(string(spec.Require), 200), "mode": cut(string(spec.Mode), 200), "kind": e.Kind, "message": logged(e.Message, 1000),
	})})
}

// create starts the machine of a pod that is worked out.
func (n *Node) create(ctx context.Context, actor string, p *Pod) error {
	defer n.use(p)()
	n.awaitRemoval(ctx, p.record.Workspace)
	driver, err := n.driver(p.record)
	if err != nil {
		return err
	}
	if made := n.spares.take(ctx, driver, p.machineSpec(n), p.record.Spec.Workspace != ""); made != nil {
		p.become(made)
	}
	p.nameBranch()
	n.mu.Lock()
	err = n.inTheWay(p)
	if err == nil && p.asked != nil {
		// From here on the end of the pod above finds it.
		err = p.asked.orphaned()
	}
	if err == nil {
		n.pods[p.record.ID] = p
	}
	n.mu.Unlock()
	if err != nil {
		if downErr := n.teardown(p); downErr != nil {
			slog.Error("removing a spare machine", "pod", p.record.ID, "error", downErr)
		}
		return err
	}
	defer close(p.started)
	err = n.startPod(ctx, actor, p, driver)
	if err != nil {
		n.failPod(p, err)
	}
	return err
}

// inTheWay says which pod stands in the way of a new one. The caller holds the mutex.
func (n *Node) inTheWay(p *Pod) error {
	for _, other := range n.pods {
		if ref := p.record.Spec.Ref; ref != "" && other.record.Spec.Ref == ref {
			return nucleus.Errorf(nucleus.KindConflict, "ref %s is pod %s", ref, other.record.ID)
		}
		if other.record.Workspace == p.record.Workspace && other.holds() {
			return nucleus.Errorf(nucleus.KindConflict, "workspace %q is in use by pod %s since %s; wait for it, or end it with: cal vm stop %s",
				p.record.Spec.Workspace, other.record.ID, other.record.Created, other.record.ID)
		}
	}
	return nil
}

// PlanPod says what CreatePod would make of a spec. Nothing is begun and nothing changed.
func (n *Node) PlanPod(ctx context.Context, spec nucleus.PodSpec) (*Pod, error) {
	p, err := n.plan(ctx, spec)
	if err != nil {
		return nil, err
	}
	p.state = statePlanned
	n.awaitRemoval(ctx, p.record.Workspace)
	n.mu.Lock()
	defer n.mu.Unlock()
	return p, n.inTheWay(p)
}

// awaitRemoval waits a moment for a machine that has ended to give its workspace free.
func (n *Node) awaitRemoval(ctx context.Context, workspace string) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	for _, p := range pods {
		if p.record.Workspace != workspace || p.live() {
			continue
		}
		select {
		case <-p.gone:
		case <-ctx.Done():
			return
		}
	}
}

// plan checks the spec and works out everything that does not touch a machine.
func (n *Node) plan(ctx context.Context, spec nucleus.PodSpec) (*Pod, error) {
	if spec.Mode != nucleus.Mediated && spec.Mode != nucleus.Contained {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "mode %q: want %q or %q", spec.Mode, nucleus.Mediated, nucleus.Contained)
	}
	if spec.Workspace != "" && !workspaceName.MatchString(spec.Workspace) {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "workspace name %q: want 1 to 64 letters, digits, '.', '_' or '-'", spec.Workspace)
	}
	if spec.Ref != "" && !podRef.MatchString(spec.Ref) {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "ref %q: want \"r-\" and 1 to 64 letters and digits", spec.Ref)
	}
	if err := spec.Resources.Check(); err != nil {
		return nil, err
	}
	if err := spec.Image.Check(); err != nil {
		return nil, err
	}
	if spec.Transient && spec.Agent != nil {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "a transient pod with agent %q: an agent works on where no request waits for it; leave out transient", spec.Agent.Name)
	}
	declared, err := resolvePolicy(spec.Policy)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "policy: %v", err)
	}
	approvers, by, err := n.approversNow(ctx, spec) // and again at the boot
	if err != nil {
		return nil, err
	}
	driver, err := n.chooseDriver(ctx, spec)
	if err != nil {
		return nil, err
	}
	p := n.newPod(spec, driver)
	p.approvers, p.record.Approvals = approvers, by
	effective, err := n.labelRepos(ctx, p, declared)
	if err != nil {
		return nil, err
	}
	return p, p.setPolicy(effective)
}

// newPod is a pod of which nothing exists yet.
func (n *Node) newPod(spec nucleus.PodSpec, driver machine.Driver) *Pod {
	id := podID()
	spec.Image = usualImage(spec.Image, driver)
	p := &Pod{node: n, dir: n.dirs.Pod(id), state: stateStarting, started: make(chan struct{}), gone: make(chan struct{}), failed: make(chan struct{})}
	p.record = record{
		ID: id, Spec: spec, Driver: driver.Name(), Tier: driver.Tier(),
		Session: nucleus.NewID("s-"), Boot: nucleus.NewID("b-"), Epoch: 1,
		Created: n.config.Now().UTC().Format(time.RFC3339), Version: nucleus.Version,
	}
	p.record.Workspace = ownWorkspace(p.dir)
	if spec.Workspace != "" {
		p.record.Workspace = n.dirs.Workspace(spec.Workspace)
	}
	return p
}

// usualImage is the image, or the driver's usual one where none is named. The layers are the
// host's and fit the host's programs: no other image gets them by itself.
func usualImage(image nucleus.Image, driver machine.Driver) nucleus.Image {
	if image.Kind != "" {
		return image
	}
	if own, ok := driver.(machine.Imaged); ok {
		return own.UsualImage()
	}
	image.Kind = nucleus.ImageHost
	return image
}

func (p *Pod) setPolicy(effective *policy.Policy) error {
	var err error
	p.policy = effective
	if p.record.Policy, err = effective.Canonical(); err != nil {
		return err
	}
	p.digest = nucleus.SHA256(p.record.Policy)
	return nil
}

// resolvePolicy reads a profile's name or a whole policy.
func resolvePolicy(raw json.RawMessage) (*policy.Policy, error) {
	var name string
	if len(raw) == 0 {
		return policy.Profile("default")
	}
	if json.Unmarshal(raw, &name) == nil {
		return policy.Profile(name)
	}
	return policy.Load("policy", raw)
}

// open takes up what a pod needs beside its machine.
func (p *Pod) open() error {
	if err := p.joinSession(); err != nil {
		return err
	}
	p.root.mu.Lock()
	start := policy.Start(nucleus.Context{Contained: p.record.Spec.Mode == nucleus.Contained, UntrustedRepo: p.record.Untrusted})
	err := p.node.expose(p, start, false, "contained mode: the agent reads without asking")
	p.root.mu.Unlock()
	if err != nil {
		return err
	}
	if m := p.record.Spec.Model; m != nil {
		p.route, err = p.node.gateway.NewRoute(*m)
	}
	return err
}

// joinSession takes up the pod's root session: its own, or that of the pod above it.
func (p *Pod) joinSession() error {
	var root *rootSession
	if p.record.Sub == nil {
		var err error
		if root, err = openSession(p.record.Session, p.record.Workspace, p.dir); err != nil {
			return err
		}
	} else {
		above, err := p.node.pod(p.record.Sub.Parent)
		if err != nil {
			return fmt.Errorf("the pod above it is gone: %w", err)
		}
		root = above.root
	}
	p.mu.Lock()
	p.root = root
	p.mu.Unlock()
	root.mu.Lock()
	defer root.mu.Unlock()
	if p.asked != nil {
		if err := p.asked.joined(); err != nil {
			return err
		}
	} else if p.record.Sub == nil && len(p.record.OutcomeKey) == 0 { // later it has one, or its file is lost
		if err := root.openAccount(p.record.ID, "", p.policy.Budget()); err != nil {
			return err
		}
	}
	root.pods[p] = true
	return nil
}

func (p *Pod) leaveSession() {
	p.mu.Lock()
	root := p.root
	p.mu.Unlock()
	if root == nil {
		return
	}
	root.mu.Lock()
	defer root.mu.Unlock()
	p.settle()
	delete(root.pods, p)
	if err := root.closeAccount(p.record.ID); err != nil {
		slog.Error("what a pod did not spend is not given back", "pod", p.record.ID, "error", err)
	}
}

// podID is short enough for a person to type and for a socket's path.
func podID() string {
	id := nucleus.NewID("")
	out := make([]byte, 10)
	for i := range out {
		out[i] = id[i] | 0x20 // base32 in lower case; digits keep their value
	}
	return "p-" + string(out)
}

func (n *Node) startPod(ctx context.Context, actor string, p *Pod, driver machine.Driver) error {
	spec := p.record.Spec
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	for _, part := range []string{"files", "repos"} {
		if err := os.MkdirAll(filepath.Join(p.record.Workspace, part), 0o700); err != nil {
			return err
		}
	}
	if err := p.open(); err != nil {
		return err
	}
	if err := os.MkdirAll(machineDir(p.dir), 0o700); err != nil {
		return err
	}
	if err := p.save(); err != nil {
		return err
	}
	if err := n.witness.contradicted(); err != nil {
		return logFailure(err)
	}
	if p.ahead != "" { // from here on it is a pod's
		if err := durable.Remove(p.ahead); err != nil {
			return err
		}
	}
	if err := n.appendBoth(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindPodCreate,
		Data: data(map[string]any{"driver": p.record.Driver, "tier": p.record.Tier, "mode": spec.Mode, "policy_sha256": p.digest, "workspace": spec.Workspace, "spare": p.ahead != "", "sub": p.record.Sub}),
	}, p.policyEntry(actor)); err != nil {
		return logFailure(err)
	}
	p.logged = true
	p.laps.lap("log")
	if p.ahead == "" {
		made, err := driver.Create(ctx, p.machineSpec(n))
		if err != nil {
			return nucleus.Errorf(nucleus.KindFailed, "starting pod %s: %v", p.record.ID, err)
		}
		p.mu.Lock()
		p.machine = made
		p.mu.Unlock()
	}
	p.laps.lap("machine")
	reply, err := p.boot(ctx)
	p.laps.lap("boot")
	if err != nil {
		return nucleus.Errorf(nucleus.KindFailed, "starting pod %s: %v%s", p.record.ID, err, consoleHint(p.machine))
	}
	p.record.OutcomeKey, p.record.Approvers = reply.OutcomeKey, p.approvers
	if err := p.save(); err != nil {
		return err
	}
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindPodStart,
		Exposure: p.root.legs().Names(),
		Data: data(map[string]any{
			"boot": p.record.Boot, "outcome_key": reply.OutcomeKey, "proxy": reply.Version, "limits": p.machine.Limits(), "one_id": p.machine.Facts().OneID,
			"proxy_sha256": n.proxyDigest(), "policy_sha256": p.digest, "image": logged(spec.Image.String(), 500), "image_digests": p.machine.Facts().Digests, "approvers": p.approvers, "approvals": p.record.Approvals, "repos": p.record.Repos, "untrusted": p.record.Untrusted,
		}),
	}); err != nil {
		return logFailure(err)
	}
	p.serve()
	if err := n.importRepos(ctx, p, actor); err != nil {
		return err
	}
	if err := n.importSub(ctx, p, actor); err != nil {
		return err
	}
	p.laps.lap("repos")
	n.registerRequesters(ctx, p)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != stateStarting {
		return nucleus.Errorf(nucleus.KindConflict, "pod %s: %s", p.record.ID, p.reason)
	}
	p.state = stateRunning
	return nil
}

// policyEntry says what the pod may do: its policy whole, where an entry has room for it.
func (p *Pod) policyEntry(actor string) nucleus.Entry {
	values := map[string]any{"policy_sha256": p.digest, "bytes": len(p.record.Policy)}
	if len(p.record.Policy) <= shownPolicy {
		values["policy"] = p.record.Policy
	}
	return nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindPolicyLoad, Data: data(values)}
}

// shownPolicy is the longest policy in bytes that the log has whole.
const shownPolicy = 60_000

func consoleHint(m machine.Machine) string {
	if text := lastLines(m.Console()); text != "" {
		return "; the machine's console ends with:\n| " + strings.ReplaceAll(text, "\n", "\n| ")
	}
	return ""
}

// Bounds of what is said of a console.
const (
	consoleLines = 12
	consoleLine  = 200 // bytes
)

// lastLines are the last lines of a console in printable characters: the guest wrote it, and
// a person's terminal may show it.
func lastLines(text string) string {
	lines := strings.Split(strings.TrimRight(text, "\r\n"), "\n")
	lines = lines[max(0, len(lines)-consoleLines):]
	for i, line := range lines {
		line = strings.TrimRight(line, "\r")
		if len(line) > consoleLine {
			line = line[:consoleLine] + "..."
		}
		var b strings.Builder
		for _, r := range line {
			switch {
			case unicode.IsPrint(r) && r != utf8.RuneError || r == '\t':
				b.WriteRune(r)
			default:
				b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
			}
		}
		lines[i] = b.String()
	}
	return strings.Join(lines, "\n")
}

// data marshals what a kind adds to an entry; the argument is always our own.
func data(v any) json.RawMessage {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("entry data: %v", err))
	}
	return raw
}

func logFailure(err error) error {
	if errors.Is(err, errUnwitnessed) {
		return nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: %v", err)
	}
	return nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: the log cannot be written: %v", err)
}

// podFile is the record of a pod in its directory.
const podFile = "pod.json"

func (p *Pod) save() error {
	return durable.Store(filepath.Join(p.dir, podFile), p.record)
}

// The places below a pod's directory, and below a workspace.
func machineDir(pod string) string   { return filepath.Join(pod, "machine") }
func ownWorkspace(pod string) string { return filepath.Join(pod, "workspace") } // of a pod that names none
func filesDir(work string) string    { return filepath.Join(work, "files") }

func (p *Pod) machineSpec(n *Node) machine.Spec {
	spec := p.record.Spec
	return machine.Spec{
		ID: p.record.ID, Dir: machineDir(p.dir), Proxy: n.config.Proxy, Image: spec.Image, Agent: spec.Agent.Places(),
		Workspace: filesDir(p.record.Workspace), Resources: spec.Resources, Watched: spec.Watched,
	}
}

// agentLayers says where in the machine each layer of the agent's root lies.
func (p *Pod) agentLayers() []guest.AgentLayer {
	var layers []guest.AgentLayer
	for _, l := range p.record.Spec.Agent.Places() {
		layers = append(layers, guest.AgentLayer{Source: l.Guest, Path: l.Name})
	}
	return layers
}

// boot sends the first frame and takes the machine's key.
func (p *Pod) boot(ctx context.Context) (nucleus.BootReply, error) {
	var reply nucleus.BootReply
	session, err := wire.Host(p.machine.Wire())
	if err != nil {
		return reply, err
	}
	p.mu.Lock()
	p.session = session
	p.mu.Unlock()
	facts := p.machine.Facts()
	spec := p.record.Spec
	config, err := json.Marshal(guest.Config{
		ToolsUID: facts.ToolsUID, ToolsGID: facts.ToolsGID, AgentUID: facts.AgentUID, AgentGID: facts.AgentGID,
		Mode: spec.Mode, Env: p.toolsEnv(facts), Layers: p.agentLayers(), Identity: spec.Identity,
		MaxPids: facts.Tasks, Sync: facts.Sync, WaitAsk: waitAsk(spec.Agent),
	})
	if err != nil {
		return reply, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	approvers, approvals, err := p.node.approversNow(ctx, spec)
	if err == nil {
		err = p.node.noteApprovers(approvers)
	}
	if err != nil {
		return reply, err
	}
	p.mu.Lock() // who looks meanwhile sees one or the other
	p.approvers, p.record.Approvals = approvers, approvals
	p.mu.Unlock()
	stream, err := session.Open(ctx, guest.StreamBoot, nil)
	if err != nil {
		return reply, err
	}
	defer stream.Close()
	deadline, _ := ctx.Deadline()
	stream.SetDeadline(deadline)
	err = stream.SendJSON(wire.FrameJSON, nucleus.Boot{
		Pod: p.record.ID, Boot: p.record.Boot, NodeKey: p.node.key.Public().(ed25519.PublicKey),
		Approvers: p.approvers, Policy: p.record.Policy, Time: p.time(), Guest: config,
	})
	if err == nil {
		err = stream.RecvJSON(wire.FrameJSON, 64<<10, &reply)
	}
	if err != nil {
		return reply, fmt.Errorf("the machine did not answer its boot frame: %w", err)
	}
	return reply, checkBootReply(reply, p.record.Boot)
}

// time is what this node's clocks say, for the machine.
func (p *Pod) time() nucleus.NodeTime {
	return nucleus.NodeTime{
		Epoch: p.record.Epoch, Tick: time.Since(p.node.born).Milliseconds(), UnixMilli: p.node.config.Now().UnixMilli(),
	}
}

// waitAsk is how long, in seconds, an agent's call waits for a person.
func waitAsk(agent *nucleus.Agent) int {
	if agent == nil {
		return nucleus.Agent{}.WaitAsk()
	}
	return agent.WaitAsk()
}

// toolsEnv is the environment of tools: the image's, its layers', then what the person
// handed over.
func (p *Pod) toolsEnv(facts machine.Facts) map[string]string {
	env := map[string]string{
		"ALL_PROXY": "socks5h://" + guest.SOCKSAddr, "HTTP_PROXY": "http://" + guest.ProxyAddr, "HTTPS_PROXY": "http://" + guest.ProxyAddr,
		"http_proxy": "http://" + guest.ProxyAddr, "https_proxy": "http://" + guest.ProxyAddr,
		"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
	}
	for _, more := range []map[string]string{facts.Env, p.record.Spec.Image.Env, p.record.Spec.Env} {
		maps.Copy(env, more)
	}
	return env
}

// serve answers the streams that the machine opens and watches for its end.
func (p *Pod) serve() {
	n := p.node
	key := wire.Key{ID: p.record.Boot, Ed25519: p.record.OutcomeKey, Role: wire.AgentRole, Pod: p.record.ID}
	n.mu.Lock()
	n.agents[p.record.Boot] = key
	n.mu.Unlock()
	p.mu.Lock()
	session := p.session
	p.mu.Unlock()
	n.serving.Add(1)
	go func() {
		defer n.serving.Done()
		p.acceptStreams(session)
	}()
	n.serving.Go(func() { p.watchWork(session) })
	n.serving.Add(1)
	go func() {
		defer n.serving.Done()
		for {
			select {
			case <-p.machine.Done():
				n.failPod(p, errors.New("the machine ended: "+p.machine.Reason()+consoleHint(p.machine)))
				return
			case reason := <-p.machine.Paused():
				n.pausePod(p, reason)
			case <-session.Done():
				n.wireEnded(p)
				return
			}
		}
	}()
}

// wireEnded waits a moment for the machine's own end, which breaks the wire first. A
// machine that lives gets a new wire, once; one that does not take it has failed.
func (n *Node) wireEnded(p *Pod) {
	select {
	case <-n.closing:
		return
	case <-p.machine.Done():
		n.failPod(p, errors.New("the machine ended: "+p.machine.Reason()+consoleHint(p.machine)))
		return
	case <-time.After(2 * time.Second):
	}
	if !p.live() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), adoptDeadline)
	defer cancel()
	conn, err := p.machine.Rewire(ctx)
	if err == nil {
		var session *wire.Session
		if session, err = n.attach(ctx, p, conn); err == nil {
			p.mu.Lock()
			p.session = session
			p.mu.Unlock()
			p.serve()
			return
		}
	}
	n.failPod(p, fmt.Errorf("the wire to the machine ended and it took no other: %w", err))
}

// pausePod takes note that a machine was stopped for exceeding a watched limit.
func (n *Node) pausePod(p *Pod, reason string) {
	p.freeze(true)
	n.note(nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Kind: nucleus.KindPodPause, Data: data(map[string]any{"reason": reason})})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == stateRunning {
		p.state, p.reason = statePaused, reason
	}
}

// ResumePod lets a paused machine go on.
func (n *Node) ResumePod(ctx context.Context, actor, id string) error {
	p, err := n.pod(id)
	if err != nil {
		return err
	}
	if err := n.resume(ctx, actor, p); err != nil {
		return err
	}
	p.freeze(false)
	return nil
}

func (n *Node) resume(ctx context.Context, actor string, p *Pod) error {
	id := p.record.ID
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != statePaused {
		return nucleus.Errorf(nucleus.KindConflict, "pod %s is %s, not paused", id, p.state)
	}
	if _, err := n.append(nucleus.Entry{Pod: id, Session: p.record.Session, Actor: actor, Kind: nucleus.KindPodResume}); err != nil {
		return logFailure(err)
	}
	if err := p.machine.Resume(ctx); err != nil {
		return nucleus.Errorf(nucleus.KindFailed, "%v", err)
	}
	p.state, p.reason = stateRunning, ""
	return nil
}

func (p *Pod) acceptStreams(session *wire.Session) {
	api := newStreamServer(p.node.handler())
	defer api.close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	peer := egress.Peer{Pod: p.record.ID, Session: p.record.Session}
	for {
		stream, err := session.Accept()
		if err != nil {
			return
		}
		switch stream.Kind {
		case guest.StreamAPI:
			api.serve(stream)
		case guest.StreamSOCKS:
			go p.node.gateway.ServeSOCKS(ctx, stream, peerOf(peer, stream))
		case guest.StreamHTTP:
			go p.node.gateway.ServeProxy(ctx, stream, peerOf(peer, stream))
		case guest.StreamModel:
			go p.serveModel(ctx, stream, peer)
		default:
			slog.Warn("stream of an unknown kind refused", "pod", p.record.ID, "kind", stream.Kind)
			stream.Close()
		}
	}
}

// peerOf is peer with the machine's own name of a connection; one that has none can be
// refused, and not asked for.
func peerOf(peer egress.Peer, stream *wire.Stream) egress.Peer {
	var header guest.Connection
	if err := nucleus.Strict(stream.Header, &header); err == nil {
		peer.Stream = header.ID
	}
	return peer
}

func (p *Pod) serveModel(ctx context.Context, conn net.Conn, peer egress.Peer) {
	if p.route == nil {
		conn.Close()
		return
	}
	p.node.gateway.ServeModel(ctx, conn, peer, p.route)
}

func (p *Pod) live() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == stateStarting || p.state == stateRunning || p.state == statePaused
}

// holds reports whether the pod's machine may still have its workspace.
func (p *Pod) holds() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.removed
}

func (p *Pod) setState(state, reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state, p.reason = state, reason
}

// wire returns the session of a pod that serves.
func (p *Pod) wire() (*wire.Session, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil || p.state != stateStarting && p.state != stateRunning {
		reason := p.reason
		if reason != "" {
			reason = ": " + reason
		}
		if p.state == stateFailed {
			reason += "\nhint: cal audit log --pod " + p.record.ID + " shows what it did"
		}
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "pod %s is %s%s", p.record.ID, p.state, reason)
	}
	return p.session, nil
}

// release leaves the machine to the next node.
func (p *Pod) release() {
	p.disconnect()
	if p.machine != nil && p.live() {
		p.machine.Release()
	}
}

func (p *Pod) disconnect() {
	p.mu.Lock()
	session := p.session
	p.mu.Unlock()
	if session != nil {
		session.Close()
	}
}

// failPod ends a pod that cannot go on and leaves nothing of it but the reason.
func (n *Node) failPod(p *Pod, cause error) {
	p.mu.Lock()
	if p.state == stateFailed || p.state == stateStopped && p.reason == "" {
		p.mu.Unlock()
		return
	}
	p.state, p.reason = stateFailed, cause.Error()
	select {
	case <-p.failed:
	default:
		close(p.failed)
	}
	p.mu.Unlock()
	slog.Error("pod failed", "pod", p.record.ID, "cause", cause)
	n.note(nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Kind: nucleus.KindPodFail, Data: data(map[string]any{"reason": logged(cause.Error(), 4000)})})
	n.failSubs(p)
	if err := n.teardown(p); err != nil {
		slog.Error("removing a failed pod", "pod", p.record.ID, "error", err)
	}
}

// ofRef is the id of the pod that its caller gave this name, or the name itself.
func (n *Node) ofRef(name string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id, p := range n.pods {
		if p.record.Spec.Ref == name && name != "" {
			return id
		}
	}
	return name
}

// DeletePod stops the machine and forgets the pod, which is named by its id or its ref; a named workspace stays.
// The pods below it end first.
func (n *Node) DeletePod(ctx context.Context, actor, name string) error {
	p, err := n.pod(n.ofRef(name))
	if err != nil {
		return err
	}
	return n.endPod(ctx, actor, p, "")
}

// endPod is DeletePod with a reason for the log, where the node ends the pod itself.
func (n *Node) endPod(ctx context.Context, actor string, p *Pod, why string) error {
	p.mu.Lock()
	starting, live, removed := p.state == stateStarting, p.state == stateRunning || p.state == statePaused, p.removed
	if starting { // who starts it takes it away
		p.state, p.reason = stateStopped, "deleted while it started"
	}
	p.mu.Unlock()
	if starting {
		select {
		case <-p.started:
		case <-ctx.Done():
			return ctx.Err()
		}
		p.mu.Lock()
		removed = p.removed
		p.mu.Unlock()
	}
	if live {
		n.stopDeciding(p, actor, why)
	}
	if err := n.endSubs(ctx, actor, p); err != nil {
		return err
	}
	if !removed { // also what an earlier attempt could not remove
		if err := n.teardown(p); err != nil {
			return err
		}
	}
	n.mu.Lock()
	delete(n.pods, p.record.ID)
	n.mu.Unlock()
	if driver, err := n.driver(p.record); err == nil && live && (driver.Tier() != nucleus.TierEmulated || n.config.SpareEmulated) {
		n.spares.prepare(driver, p.machineSpec(n), p.record.Spec.Workspace != "")
	}
	return nil
}

// stopDeciding ends what may be decided for a pod, in the critical section in which
// it is decided: an intent that was allowed stands before pod.stop in the log, or is none.
func (n *Node) stopDeciding(p *Pod, actor, why string) {
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	if p.ended() != "" { // whoever deletes it too was first
		return
	}
	e := nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindPodStop, Exposure: p.root.exposure.Names()}
	if why != "" {
		e.Data = data(map[string]any{"reason": why})
	}
	n.note(e) // a full disk keeps nobody from ending it
	p.setState(stateStopped, "")
}

// beginEffect lets an effect on the host begin, unless the pod has ended; p.acting is
// told when it is over. From then on the pod's end waits for it.
func (p *Pod) beginEffect() (ended string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ended = p.endedLocked(); ended == "" {
		p.acting.Add(1)
	}
	return ended
}

// effectPatience is how long the end of a pod waits for an effect that has begun: cut off,
// nobody could say what came of it.
const effectPatience = 20 * time.Second

func (p *Pod) awaitEffects() {
	over := make(chan struct{})
	go func() {
		defer close(over)
		p.acting.Wait()
	}()
	select {
	case <-over:
	case <-time.After(effectPatience):
		slog.Warn("a pod ends before its effects on the host", "pod", p.record.ID)
	}
}

// ended says why nothing is done any longer for a pod; "" while it lives.
func (p *Pod) ended() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.endedLocked()
}

func (p *Pod) endedLocked() string {
	switch {
	case p.state != stateStopped && p.state != stateFailed:
		return ""
	case p.reason == "":
		return fmt.Sprintf("pod %s is %s", p.record.ID, p.state)
	}
	return fmt.Sprintf("pod %s is %s: %s", p.record.ID, p.state, p.reason)
}

// teardown removes the machine and all that was made for it.
func (n *Node) teardown(p *Pod) error {
	n.mu.Lock()
	delete(n.agents, p.record.Boot)
	n.mu.Unlock()
	p.awaitEffects()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	n.gateway.CloseAll(egress.Peer{Pod: p.record.ID, Session: p.record.Session}, nil)
	if p.route != nil {
		p.route.Close()
	}
	p.disconnect()
	p.leaveSession()
	p.asks.clear()
	go n.withdraw(p)
	p.asked.release()
	var err error
	if p.machine != nil {
		err = p.machine.Destroy(ctx)
	} else {
		err = n.removeMachine(ctx, p)
	}
	if err != nil {
		return fmt.Errorf("removing the machine of pod %s: %w", p.record.ID, err)
	}
	p.forgetBudget()
	if err := idmap.RemoveAll(ctx, p.dir); err != nil {
		return err
	}
	if p.ahead != "" { // where the start ended before the pod's own record was there
		if err := durable.Remove(p.ahead); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	p.mu.Lock()
	first := !p.removed
	p.removed = true
	p.mu.Unlock()
	if first {
		if p.logged {
			n.endRuns(p, nucleus.Errorf(nucleus.KindUnavailable, "%s", p.ended()))
			n.note(nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Kind: nucleus.KindPodEnd})
			n.witness.wish()
		}
		close(p.gone)
	}
	return nil
}

// removeMachine removes what a start that did not come to a machine may have left.
func (n *Node) removeMachine(ctx context.Context, p *Pod) error {
	driver, err := n.driver(p.record)
	if err != nil {
		return err
	}
	return driver.Remove(ctx, machineDir(p.dir))
}

// status is what the API says of the pod.
func (p *Pod) status() nucleus.PodStatus {
	p.mu.Lock()
	state, reason, root, machine, approvals, approvers := p.state, p.reason, p.root, p.machine, p.record.Approvals, p.approvers
	p.mu.Unlock()
	s := nucleus.PodStatus{
		ID: p.record.ID, Workspace: p.record.Spec.Workspace, State: state, Reason: reason, Driver: p.record.Driver, Tier: p.record.Tier,
		Mode: p.record.Spec.Mode, Session: p.record.Session, Boot: p.record.Boot, Created: p.record.Created, Repos: p.record.Repos, Exposure: []string{},
	}
	if sub := p.record.Sub; sub != nil {
		s.Parent, s.RootSession = sub.Parent, sub.Session
	}
	s.Approvals, s.Unconfirmed = approvals, p.node.known.unconfirmed(approvers)
	s.Network, s.Image, s.Environments = p.policy.Network(), p.record.Spec.Image.String(), p.record.Spec.Image.Environments()
	if root != nil {
		s.Exposure = root.legs().Names()
		s.Budget = p.budgetStatus(root)
	} else {
		s.Budget = budgetPlan(p.policy.Budget())
	}
	s.Policy, s.Asks = p.policy.Name(), p.asks.waiting(p.node.config.Now().UnixMilli())
	if p.record.Spec.Agent != nil {
		s.Agent = p.record.Spec.Agent.Name
	}
	if machine != nil {
		s.Limits = machine.Limits()
	}
	return s
}

// logged is a text as an entry has it: at most n bytes and a note of what is missing. Secrets go
// first, so that none is cut in two and the half shown.
func logged(s string, n int) string { return cut(redact.Text(s), n) }

// cut shortens a text visibly and keeps it UTF-8: what is signed must be.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + fmt.Sprintf("... (%d bytes more)", len(s)-n)
}
