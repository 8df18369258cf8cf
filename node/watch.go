package node

import (
	"context"
	"log/slog"
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

// watch is what the node knows of what was taken back.
type watch struct {
	id    string
	clock func() time.Duration // monotonic
	lapse func()               // called when no word has come for Lease
	seq   int64                // up to which revocation it knows all; of watchOnce

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

// watchRevocations closes what is taken back until ctx ends. First it takes back what an earlier
// node asked and nobody waits for any more.
func (n *Node) watchRevocations(ctx context.Context) {
	if n.asks == nil {
		return
	}
	defer n.watch.stop()
	for ctx.Err() == nil {
		if n.watchOnce(ctx) != nil {
			select {
			case <-ctx.Done():
			case <-time.After(watchRetry):
			}
		}
	}
}

// watchOnce asks the authority what was taken back since it was asked before.
func (n *Node) watchOnce(ctx context.Context) error {
	asked := n.watch.clock()
	told, err := n.asks.Watch(ctx, n.watch.id, n.watch.seq)
	if err == nil && len(n.leftPods) > 0 {
		n.leftPods, err = n.withdrawLeft(ctx, n.leftPods)
	}
	if err != nil {
		return err
	}
	if told.Seq < n.watch.seq {
		slog.Warn("the authority does not know any more what it took back; all passages are closed", "known", n.watch.seq, "now", told.Seq)
		n.closePassages(func(q *passage) bool { return q.task == nil })
	}
	for _, v := range told.Revoked {
		n.revoked(v)
	}
	n.watch.seq = told.Seq
	n.watch.answered(asked)
	return nil
}

// beginWatch asks once before anything is served, where the authority answers at once.
func (n *Node) beginWatch(ctx context.Context) {
	if n.asks != nil {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_ = n.watchOnce(ctx) // watchRevocations goes on
	}
}

// revoked closes what was taken back, and records it.
func (n *Node) revoked(v approvals.Voided) {
	n.closePassages(func(q *passage) bool { return q.used.ask.ID == v.Ask })
	n.recordRevoked(v.Pod, v.Ask, v.Grants, v.Reason)
}

// recordRevoked records that something was taken back, of a pod of this node. It is, whether that
// can be recorded or not.
func (n *Node) recordRevoked(pod, ask string, grants []string, why string) {
	p, err := n.pod(pod)
	if err != nil {
		return
	}
	if _, err := n.append(nucleus.Entry{
		Pod: pod, Session: p.record.Session, Actor: "authority", Kind: nucleus.KindApprovalRevoke, Ask: ask, Grants: grants, Data: data(map[string]any{"reason": logged(why, 1000)}),
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
func (n *Node) withdraw(pod string) {
	if n.asks == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := n.asks.Withdraw(ctx, pod, approvals.Withdrawal{Before: n.config.Now().Add(time.Hour).UnixMilli(), Reason: "the pod has ended"}); err != nil {
		slog.Warn("what a pod asked could not be taken back", "pod", pod, "error", err)
	}
}

// withdrawLeft takes back what pods asked of an earlier node, whose memory of it is gone, and
// returns the pods of which that could not be done yet. A use that the authority has counted and
// that the log does not know had no effect that this node can name: it is recorded as unknown.
func (n *Node) withdrawLeft(ctx context.Context, pods []string) ([]string, error) {
	for i, pod := range pods {
		gone, err := n.asks.Withdraw(ctx, pod, approvals.Withdrawal{Before: n.opened.UnixMilli(), Reason: "the node was started anew"})
		if err != nil {
			return pods[i:], err
		}
		for _, a := range gone {
			if err := n.recordLost(a); err != nil {
				return pods[i:], err
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
