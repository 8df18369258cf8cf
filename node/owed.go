package node

import (
	"log/slog"
	"sync"

	"cal/nucleus"
)

// owed are the outcomes of permits that could not be written when they were due, because
// the log had failed. What could not be synced may be on the disk all the same, so whether
// their intents are in the log shows when it has been read anew.
type owed struct {
	mu       sync.Mutex
	outcomes map[string]nucleus.Entry // by permit
}

func (o *owed) add(e nucleus.Entry) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.outcomes == nil {
		o.outcomes = map[string]nucleus.Entry{}
	}
	o.outcomes[e.Permit] = e
}

func (o *owed) take() map[string]nucleus.Entry {
	o.mu.Lock()
	defer o.mu.Unlock()
	outcomes := o.outcomes
	o.outcomes = nil
	return outcomes
}

// reopen reads the log anew from the disk, and writes what is owed to it.
func (n *Node) reopen() error {
	err := n.log.Reopen()
	if err == nil {
		n.settle()
	}
	return err
}

// settle writes the outcomes that are owed for intents that are open. An intent that did not
// reach the disk needs none.
func (n *Node) settle() {
	outcomes := n.owed.take()
	if len(outcomes) == 0 {
		return
	}
	for _, intent := range n.log.OpenIntents() {
		outcome, ok := outcomes[intent.Permit]
		if !ok {
			continue
		}
		if _, err := n.log.Append(outcome); err != nil {
			n.owed.add(outcome)
			slog.Error("an outcome is owed to the log", "intent", intent.Seq, "error", err)
		}
	}
}
