package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cal/guest"
	"cal/internal/durable"
	"cal/internal/idmap"
	"cal/machine"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

// recover takes up what an earlier node left: running machines get a new wire and
// their sessions go on; what cannot be taken up is removed whole. Intents that
// nobody closed get the outcome unknown.
func (n *Node) recover(ctx context.Context) error {
	if err := n.closeIntents(); err != nil {
		return err
	}
	if err := n.removeSpares(ctx); err != nil {
		return err
	}
	n.removeGone(ctx)
	entries, err := os.ReadDir(n.dirs.Pods())
	if err != nil {
		return err
	}
	// Those that agents asked for after the pods above them, without which they are removed.
	left := make([]leftPod, 0, len(entries))
	for _, e := range entries {
		l := leftPod{name: e.Name(), dir: filepath.Join(n.dirs.Pods(), e.Name())}
		l.err = durable.Load(filepath.Join(l.dir, podFile), &l.record)
		left = append(left, l)
		if l.err == nil {
			if link := n.link(l.record.Spec); link != nil {
				link.left = append(link.left, l.record.ID)
			}
		}
	}
	slices.SortStableFunc(left, func(a, b leftPod) int { return a.record.depth() - b.record.depth() })
	for _, l := range left {
		p, err := n.adopt(ctx, l)
		if err == nil {
			n.mu.Lock()
			n.pods[p.record.ID] = p
			n.mu.Unlock()
			p.serve()
			err = n.adoptErrand(p)
			if err == nil && p.record.Sub != nil {
				// Whose end found nothing below it before p was known.
				err = n.aboveLives(p)
			}
			if err != nil {
				n.failPod(p, err)
			}
			continue
		}
		slog.Warn("pod cannot be adopted; removing what is left of it", "pod", l.name, "cause", err)
		if err := n.remove(ctx, l, err); err != nil {
			return fmt.Errorf("removing what is left of pod %s: %w", l.name, err)
		}
	}
	return n.closeLostAccounts()
}

func (n *Node) aboveLives(p *Pod) error {
	above, err := n.pod(p.record.Sub.Parent)
	if err != nil || above.ended() != "" {
		return errAboveEnded
	}
	return nil
}

// closeLostAccounts gives back what was set aside for pods that did not come to be, or are gone.
func (n *Node) closeLostAccounts() error {
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	for _, p := range pods {
		if p.record.Sub != nil {
			continue
		}
		p.root.mu.Lock()
		var err error
		for id := range p.root.budget.Accounts {
			if _, gone := n.pod(id); gone != nil {
				err = errors.Join(err, p.root.closeAccount(id))
			}
		}
		p.root.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// leftPod is what an earlier node has left of a pod.
type leftPod struct {
	name, dir string
	record    record
	err       error // of reading the record
}

func (r record) depth() int {
	if r.Sub == nil {
		return 0
	}
	return r.Sub.Depth
}

// closeIntents writes what recovery knows of requests that a dead node had begun.
func (n *Node) closeIntents() error {
	for _, e := range n.log.OpenIntents() {
		if _, err := n.append(nucleus.Entry{
			Pod: e.Pod, Session: e.Session, Actor: e.Actor, Kind: nucleus.KindOutcome, Op: e.Op, Digest: e.Digest,
			Permit: e.Permit, Status: nucleus.OutcomeUnknown, Data: data(map[string]any{"message": "the node ended before the outcome was known"}),
		}); err != nil {
			return err
		}
	}
	return nil
}

// adoptDeadline is long: on a busy host a machine that is given up would have answered yet.
const adoptDeadline = 45 * time.Second

// adopt attaches a new wire to a running machine.
func (n *Node) adopt(ctx context.Context, left leftPod) (_ *Pod, err error) {
	if left.err != nil {
		return nil, left.err
	}
	p := &Pod{node: n, dir: left.dir, record: left.record, state: stateRunning, logged: true, gone: make(chan struct{}), failed: make(chan struct{})}
	defer func() {
		if err != nil {
			p.leaveSession()
		}
	}()
	// What a node and its machine say to one another is of one version, as at the boot.
	if p.record.Version != nucleus.Version {
		return nil, fmt.Errorf("its machine is of version %q, this node of %s", p.record.Version, nucleus.Version)
	}
	if len(p.record.OutcomeKey) == 0 {
		return nil, errors.New("its machine had not answered yet")
	}
	loaded, err := policy.Load(podFile, p.record.Policy)
	if err != nil {
		return nil, err
	}
	if err := p.setPolicy(loaded); err != nil { // a file lays JSON out; its digest is of the canonical bytes
		return nil, err
	}
	p.approvers = p.record.Approvers
	// Asks die with their node, and with them what was kept for their pushes.
	if err := os.RemoveAll(p.transfersDir()); err != nil {
		return nil, err
	}
	if err := p.open(); err != nil {
		return nil, err
	}
	driver, err := n.driver(p.record)
	if err != nil {
		return nil, err
	}
	// The epoch is on disk before a permit of it exists.
	p.record.Epoch++
	if err := p.save(); err != nil {
		return nil, err
	}
	if err := n.adoptRun(p); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, adoptDeadline)
	defer cancel()
	adopted, err := driver.Adopt(ctx, machineDir(p.dir))
	if err != nil {
		return nil, err
	}
	p.machine = adopted
	if p.session, err = n.attachAgain(ctx, p); err != nil {
		return nil, errors.Join(err, p.machine.Destroy(context.WithoutCancel(ctx)))
	}
	p.root.mu.Lock()
	err = p.takeUp()
	p.root.mu.Unlock()
	if err != nil {
		return nil, errors.Join(err, p.machine.Destroy(context.WithoutCancel(ctx)))
	}
	_, err = n.append(nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Kind: nucleus.KindPodAdopt, Exposure: p.root.legs().Names(), Data: data(map[string]any{"epoch": p.record.Epoch})})
	if err == nil {
		n.registerRequesters(ctx, p)
	}
	return p, err
}

// attachTry is how long the hand-over of the first wire may take before another is handed in,
// which may take twice as long.
const attachTry = 6 * time.Second

// attachAgain attaches the machine's new wire; where nobody takes it, as when what hands it in
// hangs, another one, until ctx ends.
func (n *Node) attachAgain(ctx context.Context, p *Pod) (*wire.Session, error) {
	conn := p.machine.Wire()
	for try := attachTry; ; try *= 2 {
		trying, cancel := context.WithTimeout(ctx, try)
		session, err := n.attach(trying, p, conn)
		late := trying.Err() != nil
		cancel()
		if err == nil || !late || ctx.Err() != nil {
			return session, err
		}
		slog.Warn("the machine did not take its new wire; another is handed in", "pod", p.record.ID)
		again, rewired := p.machine.Rewire(ctx)
		if rewired != nil {
			return nil, errors.Join(err, rewired)
		}
		conn = again
	}
}

// attach proves to the machine that this node holds the key of its Boot.
func (n *Node) attach(ctx context.Context, p *Pod, conn net.Conn) (*wire.Session, error) {
	session, err := wire.Host(conn)
	if err != nil {
		return nil, err
	}
	proved := make(chan error, 1)
	go func() { proved <- n.proveTo(session, p) }()
	select {
	case err = <-proved:
	case <-ctx.Done():
		err = errors.New("the machine did not ask for the proof in time")
	}
	if err != nil {
		session.Close()
		return nil, err
	}
	return session, nil
}

func (n *Node) proveTo(session *wire.Session, p *Pod) error {
	stream, err := session.Accept()
	if err != nil {
		return err
	}
	defer stream.Close()
	var proof guest.AttachProof
	if stream.Kind != guest.StreamProof {
		return fmt.Errorf("first stream is of kind %q, want %q", stream.Kind, guest.StreamProof)
	}
	if err := nucleus.Strict(stream.Header, &proof); err != nil {
		return err
	}
	if proof.Boot != p.record.Boot {
		return fmt.Errorf("the machine is of boot %s, want %s", proof.Boot, p.record.Boot)
	}
	proof.Time = p.time()
	signed, err := nucleus.Sign(n.key, nucleus.DomainAttach, proof)
	if err != nil {
		return err
	}
	return stream.SendJSON(wire.FrameJSON, signed)
}

// remove takes away all that a pod left, whatever its record says.
func (n *Node) remove(ctx context.Context, left leftPod, cause error) error {
	e := nucleus.Entry{Pod: left.name, Session: left.record.Session, Kind: nucleus.KindPodFail, Data: data(map[string]any{"reason": logged(cause.Error(), 1000)})}
	if _, err := n.append(e); err != nil {
		return err
	}
	if err := n.removeDir(ctx, left.dir); err != nil {
		return err
	}
	e.Kind, e.Data = nucleus.KindPodEnd, nil
	_, err := n.append(e)
	return err
}

// removeDir takes away what the driver that made it left in a directory, and the
// directory. Which driver that was, the drivers know; where it is none of them,
// nothing is touched.
func (n *Node) removeDir(ctx context.Context, dir string) error {
	if err := machine.RemoveAny(ctx, machineDir(dir), n.config.Drivers...); err != nil {
		return err
	}
	return idmap.RemoveAll(ctx, dir)
}
