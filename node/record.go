package node

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"time"

	"cal/audit"
	"cal/nucleus"
)

// append records an entry durably. A log that failed before is read anew from the
// disk first: where there is room again, it goes on, with what it is owed before.
func (n *Node) append(e nucleus.Entry) (nucleus.Entry, error) {
	if err := n.payOwed(); err != nil {
		return nucleus.Entry{}, err
	}
	size := n.log.Size()
	recorded, err := n.log.Append(e)
	if !errors.Is(err, audit.ErrFailed) || n.log.Reopen() != nil {
		return recorded, err
	}
	if there, ok := n.persisted(e, size); ok {
		return there, nil
	}
	return n.log.Append(e)
}

// appendBoth records two entries that follow one another, with one sync.
func (n *Node) appendBoth(first, second nucleus.Entry) error {
	if err := n.payOwed(); err != nil {
		return err
	}
	err := n.beginBoth(first, second)
	if !errors.Is(err, audit.ErrFailed) || n.log.Reopen() != nil {
		return err
	}
	return n.beginBoth(first, second)
}

func (n *Node) beginBoth(first, second nucleus.Entry) error {
	one, err := n.log.Begin(first)
	if err != nil {
		return err
	}
	two, err := n.log.Begin(second)
	_, firstErr := one.Wait()
	if err == nil {
		_, err = two.Wait() // others may wait behind it
	}
	return errors.Join(firstErr, err)
}

// persisted finds an entry about a permit that reached the disk though its sync failed, at or
// after a place in the log: it does not happen twice.
func (n *Node) persisted(e nucleus.Entry, from int64) (nucleus.Entry, bool) {
	if e.Permit == "" {
		return e, false
	}
	for there, err := range n.log.Backward(e.Session) {
		if err != nil || there.Seq < from {
			break
		}
		if there.Kind == e.Kind && there.Permit == e.Permit {
			return there, true
		}
	}
	return e, false
}

// begin gives an entry its place, like append. One that cannot be written afterwards
// is not begun again: its place was part of a decision.
func (n *Node) begin(e nucleus.Entry) (*audit.Pending, error) {
	if err := n.witness.allow(); err != nil {
		return nil, err
	}
	if err := n.payOwed(); err != nil {
		return nil, err
	}
	pending, err := n.log.Begin(e)
	if !errors.Is(err, audit.ErrFailed) || n.log.Reopen() != nil {
		return pending, err
	}
	return n.log.Begin(e)
}

// owed are entries of what has happened while the log could not be written, in their order.
// Nothing new is decided before they are in the log. They live as long as the node: one that
// is killed meanwhile leaves intents without outcome, and pods that the next one ends.
type owed struct {
	mu      sync.Mutex
	entries []nucleus.Entry
	lost    int // beyond the most that are kept
	most    int // 0: maxOwed
}

// maxOwed bounds what is kept: most of what happens on a full disk is refused.
const maxOwed = 4096

// note records what has happened already: nothing is left to refuse but what comes next. Where
// the log cannot be written, it is owed the entry, which then says when it happened.
func (n *Node) note(e nucleus.Entry) {
	if n.noted(e) != nil {
		slog.Error("an event waits for the log to be written", "kind", e.Kind, "pod", e.Pod)
	}
}

// noted is note; the error says why the entry is not in the log yet.
func (n *Node) noted(e nucleus.Entry) error {
	_, err := n.append(e)
	if err == nil {
		return nil
	}
	n.owe(e)
	return err
}

// owe keeps an entry until the log can be written. An outcome may be owed for an intent that
// could not be synced: whether that is in the log shows when it has been read anew.
func (n *Node) owe(e nucleus.Entry) {
	n.owed.mu.Lock()
	defer n.owed.mu.Unlock()
	if len(n.owed.entries) >= cmp.Or(n.owed.most, maxOwed) {
		n.owed.lost++
		return
	}
	n.owed.entries = append(n.owed.entries, happened(e, n.config.Now()))
}

// happened adds the time of an event to its entry, which is recorded later.
func happened(e nucleus.Entry, now time.Time) nucleus.Entry {
	values := map[string]json.RawMessage{}
	if json.Unmarshal(e.Data, &values) == nil || len(e.Data) == 0 {
		values["happened"] = data(now.UTC().Format(time.RFC3339Nano))
		e.Data = data(values)
	}
	return e
}

// payOwed writes what the log is owed.
func (n *Node) payOwed() error {
	o := &n.owed
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.entries) == 0 && o.lost == 0 {
		return nil
	}
	if err := n.log.Publish(); errors.Is(err, audit.ErrFailed) {
		err = n.log.Reopen()
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	open := map[string]bool{}
	for _, intent := range n.log.OpenIntents() {
		open[intent.Permit] = true
	}
	for len(o.entries) > 0 {
		e := o.entries[0]
		if e.Kind != nucleus.KindOutcome || open[e.Permit] {
			if _, err := n.log.Append(e); errors.Is(err, audit.ErrFailed) || errors.Is(err, audit.ErrClosed) {
				return err
			} else if err != nil { // it will never be one
				slog.Error("an event could not be recorded", "kind", e.Kind, "pod", e.Pod, "error", err)
				o.lost++
			}
		}
		o.entries = o.entries[1:]
	}
	if o.lost > 0 {
		if _, err := n.log.Append(nucleus.Entry{Kind: nucleus.KindLogLost, Data: data(map[string]int{"entries": o.lost})}); err != nil {
			return err
		}
		o.lost = 0
	}
	return nil
}

// keepLog publishes the log for other programs once a second, and takes it up again
// when it had to refuse entries and can be written once more. It ends passages too.
func (n *Node) keepLog(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.endPassages()
		err := n.log.Publish()
		if errors.Is(err, audit.ErrFailed) {
			if err = n.log.Reopen(); err == nil {
				slog.Info("the log can be written again")
			}
		}
		if err == nil {
			err = n.payOwed()
		}
		if err = errors.Join(err, n.salts.Sync()); err != nil {
			slog.Error("keeping the log", "error", err)
		}
	}
}

// keysEntry names the keys of a node that starts: its own, by which it signs permits and
// what it did itself, the log's, and the person's.
func keysEntry(keys map[string]ed25519.PrivateKey) nucleus.Entry {
	public := map[string]any{}
	for name, key := range keys {
		public[name] = map[string]any{"algorithm": "ed25519", "public": key.Public()}
	}
	return nucleus.Entry{Kind: nucleus.KindKeyLoad, Data: data(map[string]any{"version": nucleus.Version, "keys": public})}
}
