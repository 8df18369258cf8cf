// Package witness is both ends of C2SP tlog-witness: Witness cosigns the checkpoints
// of logs, Client asks a witness to.
//
// Claim: a Witness cosigns one history of a log. Whoever has a cosignature knows that
// the tree under it begins with every tree that this witness cosigned before. Threat:
// the log's own key holder, who shows one history here and another there, or cuts the
// log back. Promise: what is cosigned is kept first, durably, and a checkpoint that
// does not continue it is refused.
package witness

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"cal/audit"
)

// maxRequest bounds a request: 63 hashes and a checkpoint with a few signatures.
const maxRequest = 16 << 10

// maxProof is how many hashes C2SP allows a proof.
const maxProof = 63

// sizeType is the content type of a conflict that names the witness's size.
const sizeType = "text/x.tlog.size"

// Store is what a witness remembers. What a method returned nil for survives a crash.
type Store interface {
	// Log returns the verifier key of the log and the newest checkpoint of it that was
	// kept, nil if there is none; ErrUnknownLog for a log that nobody named.
	Log(origin string) (key string, signed []byte, err error)
	// Keep replaces the checkpoint that Log returned.
	Keep(origin string, signed []byte) error
}

// Witness cosigns checkpoints of the logs in its store. Its methods may be called at
// the same time.
type Witness struct {
	Name  string // of its key
	Key   ed25519.PrivateKey
	Store Store
	Now   func() time.Time // nil: time.Now
	// Refused is told of checkpoints that the log's key signed and that contradict what
	// was cosigned before. nil: nobody is told.
	Refused func(origin string, kept, signed []byte, why error)

	mu sync.Mutex // one change at a time
}

// The reasons for which a witness refuses, beside Stale.
var (
	ErrMalformed  = errors.New("malformed request")           // 400
	ErrUnknownLog = errors.New("unknown log")                 // 404
	ErrSignature  = errors.New("not signed by the log's key") // 403
	// ErrFork says that the log's key signed what does not continue the checkpoint that
	// was cosigned last: 409 for another root of the same size, 422 for a wrong proof.
	ErrFork = errors.New("it does not continue the checkpoint that was cosigned last")
)

var (
	errOtherRoot = fmt.Errorf("%w: another root for the same size", ErrFork)
	errProof     = fmt.Errorf("%w: the consistency proof does not hold", ErrFork)
)

// Stale says that the old size of a request is not that of the checkpoint cosigned
// last, which has this size: 409.
type Stale int64

func (s Stale) Error() string {
	return fmt.Sprintf("the checkpoint cosigned last is of %d entries", int64(s))
}

// PublicKey is the verifier key of the witness.
func (w *Witness) PublicKey() string {
	return audit.WitnessKey(w.Name, w.Key.Public().(ed25519.PublicKey))
}

// Add takes the body of an add-checkpoint request and returns the cosignature line.
// The errors are those above, or the store's.
func (w *Witness) Add(body []byte) ([]byte, error) {
	r, err := parse(body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	origin, _, _ := strings.Cut(string(r.checkpoint), "\n")
	w.mu.Lock()
	defer w.mu.Unlock()
	key, kept, err := w.Store.Log(origin)
	if err != nil {
		return nil, err
	}
	next, err := audit.ParseCheckpoint(r.checkpoint, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignature, err)
	}
	if r.old > next.Size {
		return nil, fmt.Errorf("%w: old size %d, the checkpoint is of %d entries", ErrMalformed, r.old, next.Size)
	}
	var last audit.Checkpoint
	if kept != nil {
		if last, err = audit.ParseCheckpoint(kept, key); err != nil {
			return nil, fmt.Errorf("the checkpoint that was kept of %q: %w", origin, err)
		}
	}
	if r.old != last.Size {
		return nil, Stale(last.Size)
	}
	if err := continues(last, next, r.proof); err != nil {
		if w.Refused != nil && errors.Is(err, ErrFork) {
			w.Refused(origin, kept, r.checkpoint, err)
		}
		return nil, err
	}
	now := w.Now
	if now == nil {
		now = time.Now
	}
	line, err := audit.Cosign(r.checkpoint, w.Name, w.Key, now())
	if err != nil {
		return nil, err
	}
	cosigned, err := audit.AddCosignature(r.checkpoint, line, w.PublicKey())
	if err != nil {
		return nil, err
	}
	if err := w.Store.Keep(origin, cosigned); err != nil {
		return nil, err
	}
	return line, nil
}

// continues says why the next checkpoint is not a continuation of the last.
func continues(last, next audit.Checkpoint, proof []tlog.Hash) error {
	switch {
	case last.Size == 0 && len(proof) > 0:
		return fmt.Errorf("%w: a proof from nothing has %d hashes, want none", ErrMalformed, len(proof))
	case last.Size == 0 && next.Size > 0:
		return nil
	case last.Size == 0: // the empty tree has one root
		if next.Root != audit.EmptyRoot {
			return errOtherRoot
		}
		return nil
	case last.Size == next.Size:
		if next.Root != last.Root {
			return errOtherRoot
		}
		if len(proof) > 0 {
			return errProof
		}
		return nil
	}
	if err := tlog.CheckTree(proof, next.Size, next.Root, last.Size, last.Root); err != nil {
		return errProof
	}
	return nil
}

// ServeHTTP answers add-checkpoint at whatever path it is mounted.
func (w *Witness) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, maxRequest))
	if err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	line, err := w.Add(body)
	var stale Stale
	code := http.StatusInternalServerError
	switch {
	case err == nil:
		rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = rw.Write(line) // who went away asks again
		return
	case errors.As(err, &stale):
		rw.Header().Set("Content-Type", sizeType)
		rw.WriteHeader(http.StatusConflict)
		_, _ = fmt.Fprintf(rw, "%d\n", int64(stale))
		return
	case errors.Is(err, ErrMalformed):
		code = http.StatusBadRequest
	case errors.Is(err, ErrUnknownLog):
		code = http.StatusNotFound
	case errors.Is(err, ErrSignature):
		code = http.StatusForbidden
	case errors.Is(err, errOtherRoot):
		code = http.StatusConflict
	case errors.Is(err, ErrFork):
		code = http.StatusUnprocessableEntity
	}
	http.Error(rw, err.Error(), code)
}

// request is the body of add-checkpoint.
type request struct {
	old        int64
	proof      []tlog.Hash
	checkpoint []byte
}

func (r request) bytes() []byte {
	body := fmt.Appendf(nil, "old %d\n", r.old)
	for _, h := range r.proof {
		body = append(base64.StdEncoding.AppendEncode(body, h[:]), '\n')
	}
	return append(append(body, '\n'), r.checkpoint...)
}

func parse(body []byte) (request, error) {
	head, checkpoint, ok := bytes.Cut(body, []byte("\n\n"))
	if !ok {
		return request{}, errors.New("no empty line before the checkpoint")
	}
	lines := strings.Split(string(head), "\n")
	digits, ok := strings.CutPrefix(lines[0], "old ")
	old, err := strconv.ParseInt(digits, 10, 64)
	if !ok || err != nil || old < 0 || strconv.FormatInt(old, 10) != digits {
		return request{}, fmt.Errorf("first line %.40q, want \"old\" and a size", lines[0])
	}
	if len(lines)-1 > maxProof {
		return request{}, fmt.Errorf("%d lines of proof, at most %d are allowed", len(lines)-1, maxProof)
	}
	r := request{old: old, proof: []tlog.Hash{}, checkpoint: checkpoint}
	for i, line := range lines[1:] {
		h, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(h) != tlog.HashSize {
			return request{}, fmt.Errorf("line %d of the proof is no hash: %.60q", i+1, line)
		}
		r.proof = append(r.proof, tlog.Hash(h))
	}
	return r, nil
}
