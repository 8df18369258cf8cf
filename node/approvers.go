package node

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"sync"

	"cal/internal/durable"
	"cal/nucleus"
)

// knownApprovers are the keys that could approve when a machine of this node started. Who takes the
// authority's place, its directory with it, shows other keys: those are told to the person and
// stand in the log. It is no lock: who writes the node's files can silence it.
//
// The keys of the first machine are taken as they are. Every other one is told until the person
// confirms it, one that the authority added in order too: of that the node knows nothing but
// the authority's word.
type knownApprovers struct {
	file string

	mu    sync.Mutex
	first bool // there is no file: whoever approves now is taken
	list  []nucleus.KnownApprover
}

func (d Dirs) knownFile() string { return filepath.Join(d.Keys(), "approvers.json") }

// open reads what an earlier node saw. Of a file that cannot be read every key is told again.
func (k *knownApprovers) open(file string) {
	k.file = file
	switch err := durable.Load(file, &k.list); {
	case errors.Is(err, fs.ErrNotExist):
		k.first = true
	case err != nil:
		k.list = nil
		slog.Error("who could approve before is not known; everybody is told as new", "error", err)
	}
}

func sameApprover(a, b nucleus.Approver) bool {
	return a.Name == b.Name && a.Kind == b.Kind && a.Origin == b.Origin && bytes.Equal(a.Key, b.Key)
}

func (k *knownApprovers) find(a nucleus.Approver) int {
	return slices.IndexFunc(k.list, func(known nucleus.KnownApprover) bool { return sameApprover(known.Approver, a) })
}

// unconfirmed says, a line each, which of these approvers the person has not confirmed.
func (k *knownApprovers) unconfirmed(list []nucleus.Approver) (lines []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, a := range list {
		if at := k.find(a); k.first || at >= 0 && k.list[at].Confirmed {
			continue
		}
		had := slices.IndexFunc(k.list, func(known nucleus.KnownApprover) bool { return known.Confirmed && known.Name == a.Name })
		if had >= 0 {
			lines = append(lines, fmt.Sprintf("approver %s has another key than before: %s, not %s", a.Name, keyText(a), keyText(k.list[had].Approver)))
		} else {
			lines = append(lines, fmt.Sprintf("approver %s is new: %s", a.Name, keyText(a)))
		}
	}
	return lines
}

func keyText(a nucleus.Approver) string { return a.Kind + " " + hex.EncodeToString(a.Key) }

// noteApprovers records approvers that no machine was started with before, then keeps them.
func (n *Node) noteApprovers(list []nucleus.Approver) error {
	lines := n.known.unconfirmed(list)
	k := &n.known
	k.mu.Lock()
	defer k.mu.Unlock()
	next := slices.Clone(k.list)
	for _, a := range list {
		if k.find(a) < 0 {
			next = append(next, nucleus.KnownApprover{Approver: a, Seen: n.config.Now().UnixMilli(), Confirmed: k.first})
		}
	}
	if len(next) == len(k.list) {
		return nil
	}
	return n.keepApprovers(next, nucleus.Entry{Actor: "node", Kind: nucleus.KindKeyApprovers, Data: data(map[string]any{"approvers": next[len(k.list):], "told": lines, "first": k.first})})
}

// keepApprovers records a change, then makes it. The caller holds the mutex of what is known.
func (n *Node) keepApprovers(next []nucleus.KnownApprover, e nucleus.Entry) error {
	if _, err := n.append(e); err != nil {
		return logFailure(err)
	}
	if err := durable.Store(n.known.file, next); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "who can approve cannot be kept: %v", err)
	}
	n.known.list, n.known.first = next, false
	return nil
}

// listApprovers answers with who can approve now.
func (n *Node) listApprovers(w http.ResponseWriter, r *http.Request, _ verified) error {
	list, _, err := n.approversNow(r.Context(), nucleus.PodSpec{})
	if err != nil {
		return err
	}
	k := &n.known
	k.mu.Lock()
	defer k.mu.Unlock()
	answer := []nucleus.KnownApprover{}
	for _, a := range list {
		known := nucleus.KnownApprover{Approver: a}
		if at := k.find(a); at >= 0 {
			known = k.list[at]
		}
		answer = append(answer, known)
	}
	writeJSON(w, http.StatusOK, answer)
	return nil
}

// confirmApprovers takes the person's word for approvers: for exactly these keys.
func (n *Node) confirmApprovers(w http.ResponseWriter, _ *http.Request, v verified) error {
	var list []nucleus.Approver
	if err := nucleus.Strict(v.body, &list); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "approvers: %v", err)
	}
	k := &n.known
	k.mu.Lock()
	defer k.mu.Unlock()
	next := slices.Clone(k.list)
	for _, a := range list {
		switch at := k.find(a); {
		case at >= 0:
			next[at].Confirmed = true
		default:
			next = append(next, nucleus.KnownApprover{Approver: a, Seen: n.config.Now().UnixMilli(), Confirmed: true})
		}
		for i := range next { // the name stands for this key from now on
			if next[i].Name == a.Name && !sameApprover(next[i].Approver, a) {
				next[i].Confirmed = false
			}
		}
	}
	if err := n.keepApprovers(next, nucleus.Entry{Actor: v.caller.KeyID, Kind: nucleus.KindKeyApprovers, Data: data(map[string]any{"confirmed": list})}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
