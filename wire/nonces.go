package wire

import (
	"crypto/sha256"
	"sync"
	"time"

	"cal/nucleus"
)

// How many nonces are kept for one key. With the lifetime of Signer an operator
// can send 17,000 requests a second, an agent 4,000, before one is refused; all
// of them together cost some 60 MiB and 15 MiB.
const (
	operatorNonces = 1 << 19
	agentNonces    = 1 << 17
)

// nonces remembers what was admitted until it has expired. Each key has its own
// room, so that one agent cannot lock the others out, nor the operator.
type nonces struct {
	mu   sync.Mutex
	keys map[string]*keyNonces
	// dropped is the latest expiry that was forgotten. What expires no later is
	// refused although the clock says that it is valid: the clock was set back, and
	// it may be a replay.
	dropped int64
	swept   int64 // the second in which forget last ran
}

type nonce [16]byte

type keyNonces struct {
	used     map[nonce]struct{}
	expiring map[int64][]nonce // by the second in which they expire
}

// use admits a nonce once. now decides what may be forgotten.
func (n *nonces) use(key Key, p parameters, now time.Time) error {
	sum := sha256.Sum256([]byte(p.nonce))
	id := nonce(sum[:16])
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forget(now.Unix())
	if p.expires <= n.dropped {
		return unauthenticated("expires %s, but the clock here stood at %s before: sign it again", clock(p.expires), clock(n.dropped))
	}
	if n.keys == nil {
		n.keys = map[string]*keyNonces{}
	}
	k := n.keys[key.ID]
	if k == nil {
		k = &keyNonces{used: map[nonce]struct{}{}, expiring: map[int64][]nonce{}}
		n.keys[key.ID] = k
	}
	if _, replay := k.used[id]; replay {
		return unauthenticated("nonce %q was used before: a request is good once, sign it again", p.nonce)
	}
	most := agentNonces
	if key.Role == Operator {
		most = operatorNonces
	}
	if len(k.used) >= most {
		return nucleus.Errorf(nucleus.KindUnavailable, "%d requests of key %q within their lifetime, at most %d: try again in some seconds", len(k.used), key.ID, most)
	}
	k.used[id] = struct{}{}
	k.expiring[p.expires] = append(k.expiring[p.expires], id)
	return nil
}

// clear forgets everything: what was admitted before is told by another sign.
func (n *nonces) clear() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keys, n.dropped, n.swept = nil, 0, 0
}

func (n *nonces) forget(now int64) {
	if now == n.swept {
		return
	}
	n.swept = now
	for name, k := range n.keys {
		for second, ids := range k.expiring { // at most some 70
			if second > now {
				continue
			}
			for _, id := range ids {
				delete(k.used, id)
			}
			delete(k.expiring, second)
			n.dropped = max(n.dropped, second)
		}
		if len(k.used) == 0 {
			delete(n.keys, name)
		}
	}
}
