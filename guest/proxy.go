// Package guest is nucleus-tool-proxy: the part of CAL that runs in the machine.
//
// The machine is hostile ground: the agent and every command it runs may do
// their worst to the proxy beside them. The proxy promises the node that it acts
// on nothing but a permit which the node signed for this boot, that it decides
// each request again with the policy of its boot, and that an outcome bears the
// key which it made at this boot and which no other process can read. It
// promises the person that agent and tools live in namespaces of their own,
// without capabilities, and that nobody but the agent reaches the agent's
// endpoints.
package guest

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cal/egress"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

// Version is compared by the node: a proxy of another version is refused.
const Version = nucleus.Version

const (
	bootPatience   = 15 * time.Minute // for the boot frame: a machine may be made ahead of its pod
	bootDeadline   = 30 * time.Second
	attachAddr     = "@nucleus-attach" // abstract: only processes of the proxy's own network namespace see it
	attachDeadline = 10 * time.Second
	orphanPatience = time.Minute // how long a machine waits for a node after its wire ended
)

// Proxy is one boot of a machine.
type Proxy struct {
	boot   nucleus.Boot
	config Config
	policy *policy.Policy
	key    ed25519.PrivateKey
	clock  *nodeClock
	era    atomic.Value // string: what the node's verifier wants nonces to end with
	worker *wire.Session
	agent  agentHost
	asked  witness

	mu      sync.Mutex
	session *wire.Session // the current wire
	changed chan struct{} // closed when session is replaced
	served  servedState
}

// servedState is what the second lock remembers.
type servedState struct {
	mu       sync.Mutex
	seqs     map[uint64]bool
	floor    uint64 // every sequence at or below it was seen
	exposure nucleus.Legs
	through  nucleus.Legs       // of the exposure: what passages alone have taken
	grants   map[string]bool    // used
	passages map[string]*opened // by the tokens that opened each
}

// Run serves the machine over conn until its node has been gone for a minute.
func Run(ctx context.Context, conn io.ReadWriteCloser) error {
	if err := tools.NotDumpable(); err != nil {
		return err
	}
	session, err := wire.Guest(conn)
	if err != nil {
		return err
	}
	p, stream, err := receiveBoot(session)
	if err != nil {
		session.Close()
		return err
	}
	if err := p.start(ctx); err != nil {
		stream.SendJSON(wire.FrameJSON, nucleus.BootReply{Error: err.Error()})
		time.Sleep(50 * time.Millisecond) // the refusal leaves before the machine ends
		session.Close()
		return err
	}
	session.Handle(p.brief)
	reply := nucleus.BootReply{Boot: p.boot.Boot, OutcomeKey: p.key.Public().(ed25519.PublicKey), Version: Version}
	if err := stream.SendJSON(wire.FrameJSON, reply); err != nil {
		// A node that ended right behind its answer has it, and its next one comes.
		slog.Warn("the answer to the boot frame", "error", err)
	}
	stream.Close()
	return p.serve(ctx)
}

// receiveBoot takes the first stream, which must be the boot frame; it is never
// accepted again.
func receiveBoot(session *wire.Session) (*Proxy, *wire.Stream, error) {
	type first struct {
		stream *wire.Stream
		err    error
	}
	got := make(chan first, 1)
	go func() {
		stream, err := session.Accept()
		got <- first{stream, err}
	}()
	var f first
	select {
	case f = <-got:
	case <-time.After(bootPatience):
		return nil, nil, fmt.Errorf("no boot frame within %s", bootPatience)
	}
	if f.err != nil {
		return nil, nil, f.err
	}
	if f.stream.Kind != StreamBoot {
		return nil, nil, fmt.Errorf("first stream is of kind %q, want %q", f.stream.Kind, StreamBoot)
	}
	f.stream.SetDeadline(time.Now().Add(bootDeadline))
	kind, raw, err := f.stream.Recv(4 << 20)
	if err != nil || kind != wire.FrameJSON {
		return nil, nil, fmt.Errorf("boot frame of kind %q: %w", kind, err)
	}
	f.stream.SetDeadline(time.Time{})
	p := &Proxy{session: session, changed: make(chan struct{}), clock: newNodeClock()}
	if err := nucleus.Strict(raw, &p.boot); err != nil {
		return nil, nil, fmt.Errorf("boot frame: %w", err)
	}
	return p, f.stream, p.adopt()
}

// adopt checks the boot frame and makes this boot's key.
func (p *Proxy) adopt() error {
	if p.boot.Pod == "" || p.boot.Boot == "" || len(p.boot.NodeKey) != ed25519.PublicKeySize {
		return errors.New("boot frame lacks pod, boot id or node key")
	}
	if err := nucleus.Strict(p.boot.Guest, &p.config); err != nil {
		return fmt.Errorf("boot frame, guest: %w", err)
	}
	if err := p.config.check(); err != nil {
		return fmt.Errorf("boot frame, guest: %w", err)
	}
	var err error
	if p.policy, err = policy.Load("boot", p.boot.Policy); err != nil {
		return fmt.Errorf("boot frame: %w", err)
	}
	if err := p.clock.begin(p.boot.Time); err != nil {
		return fmt.Errorf("boot frame: %w", err)
	}
	_, p.key, err = ed25519.GenerateKey(rand.Reader)
	p.served = servedState{seqs: map[uint64]bool{}, grants: map[string]bool{}, passages: map[string]*opened{}}
	return err
}

// start makes the tools' jail, its forwarders and the door for a later node.
func (p *Proxy) start(ctx context.Context) error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	// gVisor's tmpfs takes no owner: HOME is given to the tools' user here.
	if err := os.Chown(nucleus.MachineHome, p.config.ToolsUID, p.config.ToolsGID); err != nil {
		return err
	}
	plan := jailPlan{
		Kind: toolsJail, UID: p.config.ToolsUID, GID: p.config.ToolsGID,
		Listen: []string{SOCKSAddr, ProxyAddr},
	}
	contained := p.config.Mode == nucleus.Contained
	if contained { // the agent will be among the tools
		plan.Listen, plan.Show = append(plan.Listen, MCPAddr, ModelAddr), true
	}
	worker, err := startJail(plan, func(cmd *exec.Cmd) {
		cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
		cmd.Stdout = os.Stderr
	})
	theirs.Close()
	if err != nil {
		ours.Close()
		return err
	}
	quick, err := newQuickConn(ours)
	if err == nil {
		p.worker, err = wire.Host(quick)
	}
	if err != nil {
		worker.kill()
		return err
	}
	if err := p.bootWorker(); err != nil {
		worker.kill()
		return err
	}
	go func() {
		worker.cmd.Wait()
		slog.Error("tools worker ended; the machine stops")
		os.Exit(1)
	}()
	go p.forward(worker.listeners[0], StreamSOCKS, p.asked.watch(egress.ViaSOCKS))
	go p.forward(worker.listeners[1], StreamHTTP, p.asked.watch(egress.ViaHTTP))
	if contained {
		go serveMCP(worker.listeners[2], p.mcpHandler())
		go p.forward(worker.listeners[3], StreamModel, unwatched)
	}
	p.agent.proxy = p
	return p.listenAttach(ctx)
}

// bootWorker hands the worker its configuration on the first stream.
func (p *Proxy) bootWorker() error {
	ctx, cancel := context.WithTimeout(context.Background(), bootDeadline)
	defer cancel()
	stream, err := p.worker.Open(ctx, "config", nil)
	if err != nil {
		return err
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(bootDeadline))
	if err := stream.SendJSON(wire.FrameJSON, WorkerConfig{
		Env: p.config.Env, MaxPids: p.config.MaxPids, Sync: p.config.Sync, Policy: p.boot.Policy,
	}); err != nil {
		return err
	}
	var ready struct{ Error string }
	if err := stream.RecvJSON(wire.FrameJSON, 64<<10, &ready); err != nil {
		return fmt.Errorf("tools worker: %w", err)
	}
	if ready.Error != "" {
		return errors.New("tools worker: " + ready.Error)
	}
	return nil
}

// serve answers the node's streams, on one wire after the other.
func (p *Proxy) serve(ctx context.Context) error {
	for {
		session, changed := p.current()
		for {
			stream, err := session.Accept()
			if err != nil {
				break
			}
			go p.handle(ctx, stream)
		}
		slog.Info("wire ended; waiting for a node", "patience", orphanPatience)
		select {
		case <-changed:
		case <-time.After(orphanPatience):
			return errors.New("no node came back: the machine stops")
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *Proxy) current() (*wire.Session, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.session, p.changed
}

// open opens a stream to the node; while no node is there it waits.
func (p *Proxy) open(ctx context.Context, kind string, header any) (*wire.Stream, error) {
	for {
		session, changed := p.current()
		stream, err := session.Open(ctx, kind, header)
		if err == nil {
			return stream, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("no node: %w", err)
		}
	}
}

func (p *Proxy) handle(ctx context.Context, stream *wire.Stream) {
	defer stream.Close()
	switch stream.Kind {
	case StreamCall:
		p.call(ctx, stream)
	case StreamRepo:
		p.repo(ctx, stream)
	case StreamAgent:
		p.agent.start(stream)
	case StreamAttach:
		p.agent.attach(stream)
	case StreamWatch:
		p.agent.watch(ctx, stream)
	case StreamSign:
		p.sign(ctx, stream)
	default:
		slog.Warn("stream of an unknown kind refused", "kind", stream.Kind)
	}
}

// forward carries each connection that a listener accepts to the node.
func (p *Proxy) forward(l net.Listener, kind string, watch watcher) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			watched, header, end := watch(conn)
			defer end()
			defer conn.Close()
			ctx, cancel := context.WithTimeout(context.Background(), orphanPatience)
			stream, err := p.open(ctx, kind, header)
			cancel()
			if err != nil {
				return
			}
			defer stream.Close()
			relay(watched, stream)
		}()
	}
}

// relay copies both ways until either side ends.
func relay(a, b net.Conn) {
	done := make(chan struct{}, 2)
	pipe := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // either side may go first
		done <- struct{}{}
	}
	go pipe(a, b)
	go pipe(b, a)
	<-done
	a.Close()
	b.Close()
	<-done
}

// listenAttach opens the door through which a node that was restarted hands in
// a new wire.
func (p *Proxy) listenAttach(ctx context.Context) error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: attachAddr, Net: "unix"})
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if err := p.attach(conn); err != nil {
					slog.Warn("new wire refused", "error", err)
				}
			}()
		}
	}()
	return nil
}

func (p *Proxy) attach(conn *net.UnixConn) error {
	conn.SetDeadline(time.Now().Add(attachDeadline))
	_, files, err := recvFiles(conn)
	if err != nil {
		return err
	}
	if len(files) != 1 {
		for _, f := range files {
			f.Close()
		}
		return fmt.Errorf("%d descriptors, want the wire alone", len(files))
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	files[0].Close()
	if err != nil {
		return err
	}
	newWire, err := wireConn(fd)
	if err != nil {
		return err
	}
	session, err := wire.Guest(newWire)
	if err != nil {
		return err
	}
	if err := p.prove(session); err != nil {
		session.Close()
		return err
	}
	session.Handle(p.brief)
	p.mu.Lock()
	old := p.session
	p.session = session
	close(p.changed)
	p.changed = make(chan struct{})
	p.mu.Unlock()
	old.Close()
	return sendFiles(conn, "ok", nil)
}

// AttachProof is what the node signs under nucleus.DomainAttach: what it was asked for,
// and its own clocks.
type AttachProof struct {
	Boot  string           `json:"boot"`
	Nonce string           `json:"nonce"`
	Time  nucleus.NodeTime `json:"time"`
}

// prove asks who is at the other end to sign a nonce with the node key of Boot.
func (p *Proxy) prove(session *wire.Session) error {
	ctx, cancel := context.WithTimeout(context.Background(), attachDeadline)
	defer cancel()
	want := AttachProof{Boot: p.boot.Boot, Nonce: rand.Text()}
	stream, err := session.Open(ctx, StreamProof, want)
	if err != nil {
		return err
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(attachDeadline))
	var signed nucleus.Signed
	if err := stream.RecvJSON(wire.FrameJSON, 64<<10, &signed); err != nil {
		return err
	}
	var got AttachProof
	if err := signed.Open(p.boot.NodeKey, nucleus.DomainAttach, &got); err != nil {
		return fmt.Errorf("proof of the node: %w", err)
	}
	if got.Boot != want.Boot || got.Nonce != want.Nonce {
		return errors.New("proof of the node is for another boot or nonce")
	}
	if err := p.clock.begin(got.Time); err != nil {
		return fmt.Errorf("proof of the node: %w", err)
	}
	return nil
}

// Attach hands the wire at fd 3 to the proxy that runs in this machine. It is
// what a node executes in the machine after a restart.
func Attach() error {
	conn, err := net.DialTimeout("unix", attachAddr, attachDeadline)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(attachDeadline))
	if err := sendFiles(conn.(*net.UnixConn), "wire", []*os.File{os.NewFile(3, "wire")}); err != nil {
		return err
	}
	answer, _, err := recvFiles(conn.(*net.UnixConn))
	if err != nil {
		return fmt.Errorf("the proxy refused the new wire: %w", err)
	}
	if answer != "ok" {
		return errors.New(answer)
	}
	return nil
}

// WorkerConfig is what the proxy tells the tools worker first.
type WorkerConfig struct {
	Env     map[string]string `json:"env,omitempty"`
	MaxPids int               `json:"max_pids,omitempty"`
	Sync    bool              `json:"sync,omitempty"` // the workspace after each call that may have changed it
	Policy  json.RawMessage   `json:"policy"`
}
