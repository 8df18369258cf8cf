package node

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"
)

// A transient pod is for what somebody does in it themselves. They end it; where they were
// killed before they could, the node does, once nobody has used it for transientLife. A request
// of its API is a use as long as it is open, waiting for a person too, and the pod's start is one.

// transientLife is how long a transient pod stays that nobody uses.
const transientLife = time.Minute

// use says that p is in use until done is called, and with it the pods above it, which it does
// not outlive.
func (n *Node) use(p *Pod) (done func()) {
	pods := append(n.above(p), p)
	for _, q := range pods {
		q.mu.Lock()
		q.users++
		q.mu.Unlock()
	}
	return func() {
		for _, q := range pods {
			q.mu.Lock()
			q.users--
			q.used = n.config.Monotonic()
			q.mu.Unlock()
		}
	}
}

// using answers a request whose caller was found to be allowed it.
func (n *Node) using(w http.ResponseWriter, r *http.Request, v verified, next verifiedHandler) error {
	if p, err := n.pod(r.PathValue("id")); err == nil {
		defer n.use(p)()
	}
	return next(w, r, v)
}

// keepTransient ends transient pods that nobody uses any more, until the node closes. Who used
// one of an earlier node has transientLife to come back.
func (n *Node) keepTransient() {
	each := func(look func(*Pod)) {
		n.mu.Lock()
		pods := n.podList()
		n.mu.Unlock()
		for _, p := range pods {
			look(p)
		}
	}
	each(func(p *Pod) { n.use(p)() })
	tick := time.NewTicker(budgetTick)
	defer tick.Stop()
	for {
		select {
		case <-n.closing:
			return
		case <-tick.C:
			each(n.endAbandoned)
		}
	}
}

// endAbandoned ends a transient pod that nobody has used for transientLife. Where that fails it
// is tried again as much later.
func (n *Node) endAbandoned(p *Pod) {
	if !p.abandoned() {
		return
	}
	defer n.use(p)()
	why := fmt.Sprintf("no request has used the transient pod for %v", transientLife)
	if err := n.endPod(context.Background(), "", p, why); err != nil {
		slog.Error("ending a transient pod that nobody uses", "pod", p.record.ID, "error", err)
	}
}

func (p *Pod) abandoned() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.record.Spec.Transient && p.users == 0 && p.node.config.Monotonic()-p.used >= transientLife
}
