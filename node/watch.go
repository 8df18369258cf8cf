package node

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	approvals "cal/approval/client"
	"cal/audit"
	"cal/nucleus"
)

// A passage is used without asking the authority each time, so the node watches what is taken back
// and closes it. Its passages stand only as long as the last word from the authority is younger than
// approvals.Lease, counted from when the node asked: the authority counts from later, so that when
// it tells a person that a passage is closed, it is, whether the node answered or not.

// link is how the node reaches the authority for the pods that require the same of whose it is:
// nobody else is told anything for them, nobody else's word lets their passages stand, and nobody
// else takes them back.
type link struct {
	client *approvals.Client
	watch  watch
	left   []string // pods of an earlier node; of watchOnce
}

// links are made when the first pod needs one.
type links struct {
	mu    sync.Mutex
	of    map[linkKey]*link
	start func(*link) // watches one; nil before the node has taken up its pods
}

// linkKey is what pods require of whose the authority is.
type linkKey struct {
	other bool
	uid   int // approvals.AnyUser
}

// watch is what the node knows of what was taken back.
type watch struct {
	id    string
	clock func() time.Duration // monotonic
	lapse func()               // called when no word has come for Lease
	last  approvals.Watched    // what was told last; of watchOnce

	mu    sync.Mutex
	heard bool
	asked time.Duration // when what was answered last was asked
	timer *time.Timer
}

// fresh reports whether passages stand.
func (w *watch) fresh() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heard && w.clock()-w.asked < approvals.Lease
}

// answered takes note of an answer to what was asked at a time.
func (w *watch) answered(asked time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heard, w.asked = true, asked
	if w.timer != nil {
		w.timer.Stop()
	}
	w.timer = time.AfterFunc(approvals.Lease-(w.clock()-asked), w.lapse)
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
	}
}

const watchRetry = 200 * time.Millisecond

// link is that of pods of a spec; nil where the node has no authority.
func (n *Node) link(spec nucleus.PodSpec) *link {
	if n.asks == nil {
		return nil
	}
	uid, other, err := approvals.OtherUserOf(spec.Approvals, n.config.RequireApprovals)
	if err != nil {
		uid, other = noUser, true // a pod of an earlier node, under what this one requires
	}
	n.links.mu.Lock()
	defer n.links.mu.Unlock()
	key := linkKey{other, uid}
	l := n.links.of[key]
	if l != nil {
		return l
	}
	l = &link{client: n.asks, watch: watch{id: nucleus.NewID("w-"), clock: n.config.Monotonic, lapse: n.suspendPassages}}
	if other {
		l.client = n.asks.OfOtherUser(uid)
	}
	if n.links.of == nil {
		n.links.of = map[linkKey]*link{}
	}
	n.links.of[key] = l
	if n.links.start != nil {
		n.links.start(l)
	}
	return l
}

// authority is the client by which is asked for a pod.
func (n *Node) authority(p *Pod) *approvals.Client { return n.link(p.record.Spec).client }

// noUser is the uid of nobody.
const noUser = -2

// passagesStand reports whether the authority of a pod was heard of lately.
func (n *Node) passagesStand(p *Pod) bool {
	l := n.link(p.record.Spec)
	return l != nil && l.watch.fresh()
}

// watchRevocations closes what is taken back until ctx ends. First it takes back what an earlier
// node asked and nobody waits for any more.
func (n *Node) watchRevocations(ctx context.Context, l *link) {
	defer l.watch.stop()
	for ctx.Err() == nil {
		if n.watchOnce(ctx, l) != nil {
			select {
			case <-ctx.Done():
			case <-time.After(watchRetry):
			}
		}
	}
}

// watchOnce asks the authority what was taken back since it was asked before.
func (n *Node) watchOnce(ctx context.Context, l *link) error {
	asked := l.watch.clock()
	told, err := l.client.Watch(ctx, l.watch.id, l.watch.last)
	if err == nil && len(l.left) > 0 {
		l.left, err = n.withdrawLeft(ctx, l)
	}
	if err != nil {
		return err
	}
	if last := l.watch.last; last.Database != "" && (told.Database != last.Database || told.Seq < last.Seq) {
		slog.Warn("the authority does not know any more what it granted and took back; all passages are closed", "known", last.Seq, "now", told.Seq)
		n.closePassages(func(q *passage) bool { return q.link == l && q.task == nil })
	}
	for _, v := range told.Revoked {
		n.revoked(l, v)
	}
	l.watch.last = approvals.Watched{Database: told.Database, Seq: told.Seq}
	l.watch.answered(asked)
	return nil
}

// beginWatch asks once before anything is served, where the authority answers at once, and watches
// until keeping ends.
func (n *Node) beginWatch(ctx, keeping context.Context) {
	if n.asks == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	n.link(nucleus.PodSpec{})
	watch := func(l *link) { n.serving.Go(func() { n.watchRevocations(keeping, l) }) }
	n.links.mu.Lock()
	n.links.start = watch
	known := slices.Collect(maps.Values(n.links.of))
	n.links.mu.Unlock()
	for _, l := range known {
		_ = n.watchOnce(ctx, l) // watchRevocations goes on
		watch(l)
	}
}

// revoked closes what was taken back, and records it.
func (n *Node) revoked(l *link, v approvals.Voided) {
	n.closePassages(func(q *passage) bool { return q.link == l && q.used.ask.ID == v.Ask })
	if p, err := n.pod(v.Pod); err == nil && n.link(p.record.Spec) == l {
		n.recordRevoked(p, v.Ask, v.Grants, v.Reason)
	}
}

// recordRevoked records that something was taken back, of a pod of this node. It is, whether that
// can be recorded or not.
func (n *Node) recordRevoked(p *Pod, ask string, grants []string, why string) {
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: "authority", Kind: nucleus.KindApprovalRevoke, Ask: ask, Grants: grants, Data: data(map[string]any{"reason": logged(why, 1000)}),
	}); err != nil {
		slog.Error("that an approval was taken back could not be recorded", "ask", ask, "error", err)
	}
}

// closePassages forgets passages and tasks of all sessions, and closes what went through them.
func (n *Node) closePassages(which func(*passage) bool) {
	for _, root := range n.rootSessions() {
		root.mu.Lock()
		if root.closePassages(which) {
			n.closeUncovered(root)
		}
		root.mu.Unlock()
	}
}

// closePassages forgets passages and tasks, and reports whether there were some. The caller holds
// the mutex.
func (s *rootSession) closePassages(which func(*passage) bool) bool {
	before := len(s.passages)
	s.passages = slices.DeleteFunc(s.passages, func(q passage) bool { return which(&q) })
	return len(s.passages) < before
}

// suspendPassages closes what goes through passages: nobody can say whether they were taken back.
func (n *Node) suspendPassages() {
	slog.Warn("the authority has not answered for a while; passages let nothing through", "lease", approvals.Lease)
	for _, root := range n.rootSessions() {
		root.mu.Lock()
		if len(root.passages) > 0 {
			n.closeUncovered(root)
		}
		root.mu.Unlock()
	}
}

func (n *Node) rootSessions() (roots []*rootSession) {
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	for _, p := range pods {
		p.mu.Lock()
		root := p.root
		p.mu.Unlock()
		if root != nil && !slices.Contains(roots, root) {
			roots = append(roots, root)
		}
	}
	return roots
}

// withdraw takes back what a pod that has ended has asked. An authority that does not hear it lets
// the asks expire.
func (n *Node) withdraw(p *Pod) {
	if n.asks == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := n.authority(p).Withdraw(ctx, p.record.ID, approvals.Withdrawal{Before: n.config.Now().Add(time.Hour).UnixMilli(), Reason: "the pod has ended"}); err != nil {
		slog.Warn("what a pod asked could not be taken back", "pod", p.record.ID, "error", err)
	}
}

// withdrawLeft takes back what pods asked of an earlier node, whose memory of it is gone, and
// returns the pods of which that could not be done yet. A use that the authority has counted and
// that the log does not know had no effect that this node can name: it is recorded as unknown.
func (n *Node) withdrawLeft(ctx context.Context, l *link) ([]string, error) {
	for i, pod := range l.left {
		gone, err := l.client.Withdraw(ctx, pod, approvals.Withdrawal{Before: n.opened.UnixMilli(), Reason: "the node was started anew"})
		if err != nil {
			return l.left[i:], err
		}
		for _, a := range gone {
			if err := n.recordLost(a); err != nil {
				return l.left[i:], err
			}
		}
	}
	return nil, nil
}

// recordLost records the uses of an approval that an earlier node was given and did not record.
func (n *Node) recordLost(a approvals.Approval) error {
	known := map[string]bool{}
	for raw, err := range audit.Find(n.dirs.Log(), 0, audit.Filter{Kind: nucleus.KindApprovalUse, Pod: a.Pod}) {
		if err != nil {
			return err
		}
		e, err := audit.ParseEntry(raw)
		if err != nil {
			return err
		}
		known[e.Permit] = true
	}
	var grants []string
	for _, g := range a.Grants {
		grants = append(grants, g.Grant)
	}
	for _, u := range a.Uses {
		if known[u.Permit] {
			continue
		}
		if _, err := n.append(nucleus.Entry{
			Pod: a.Pod, Actor: "authority", Kind: nucleus.KindApprovalUse, Op: a.Op, Ask: a.Ask, Grants: grants, Permit: u.Permit, Status: nucleus.OutcomeUnknown,
			Data: data(map[string]any{"n": u.N, "message": "the authority counted this use for a node that ended before it was recorded"}),
		}); err != nil {
			return err
		}
	}
	return nil
}
