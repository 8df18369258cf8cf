package node

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	approvals "cal/approval/client"
	"cal/audit"
	"cal/audit/witness"
	"cal/nucleus"
)

const (
	witnessEvery = time.Minute
	// witnessRetry is how soon a required witness that did not cosign is asked again.
	witnessRetry = 5 * time.Second
	// witnessFirst is how long a node that starts waits for the first cosignatures.
	witnessFirst = 10 * time.Second
	// witnessAuthority is how long a round waits for the authority.
	witnessAuthority = 5 * time.Second
	// witnessFarewell is how long a node that ends waits for the last cosignatures.
	witnessFarewell = 2 * time.Second
	// witnessPatience is for how long effects go on without a required witness.
	witnessPatience = 3 * time.Minute
)

var errUnwitnessed = errors.New("the log is not vouched for")

// Witness is one of C2SP tlog-witness that the person requires.
type Witness struct {
	URL string // submission prefix
	Key string // of type 4, a cosignature key
}

// witnesses shows the log to those outside of the node who vouch for its history: the
// authority, where there is one, at every ask and once a minute, and the witnesses that
// are required once a minute. It is the one owner of the cosigned checkpoint.
type witnesses struct {
	log      *audit.Log
	key      string // of the log
	asks     *approvals.Client
	required []*witness.Client
	now      func() time.Time // a monotonic clock
	soon     chan struct{}    // a round is wanted before its time

	mu      sync.Mutex // the authority is shown checkpoints in their order
	builtIn *witness.Client

	state   sync.Mutex
	last    time.Time // when all that are required had cosigned; zero: never
	err     error     // why not since
	another error     // the authority knows another history of this log
}

func newWitnesses(log *audit.Log, key ed25519.PublicKey, asks *approvals.Client, required []Witness) (*witnesses, error) {
	w := &witnesses{log: log, key: audit.VerifierKey(nucleus.LogOrigin, key), asks: asks, now: time.Now, soon: make(chan struct{}, 1), err: errors.New("none was asked yet")}
	direct := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for _, r := range required {
		if err := audit.CheckWitnessKey(r.Key); err != nil {
			return nil, err
		}
		if !strings.HasPrefix(r.URL, "http://") && !strings.HasPrefix(r.URL, "https://") {
			return nil, fmt.Errorf("witness %q: want an http or https URL", r.URL)
		}
		w.required = append(w.required, &witness.Client{URL: r.URL, Key: r.Key, HTTP: direct})
	}
	return w, nil
}

// allow says why no effect may begin: the authority knows another history of the log, or a
// witness that is required has not vouched for it for too long.
func (w *witnesses) allow() error {
	if err := w.contradicted(); err != nil {
		return err
	}
	w.state.Lock()
	defer w.state.Unlock()
	if len(w.required) == 0 || !w.last.IsZero() && w.now().Sub(w.last) <= witnessPatience {
		return nil
	}
	return fmt.Errorf("%w: a witness that is required has not cosigned it: %w", errUnwitnessed, w.err)
}

// contradicted is why nothing begins, not even a machine: the authority knows another history
// of the log.
func (w *witnesses) contradicted() error {
	w.state.Lock()
	defer w.state.Unlock()
	if w.another == nil {
		return nil
	}
	return fmt.Errorf("%w: %w; if it was begun anew, or put back, on purpose: nucleus-authority witness --forget %s", errUnwitnessed, w.another, nucleus.LogOrigin)
}

// show publishes the log and has the authority cosign it. It returns the published
// checkpoint, and the same with what the authority added. It waits as long as given for the
// authority, and no longer for who was before.
func (w *witnesses) show(ctx context.Context, patience time.Duration) (signed, cosigned []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.log.Publish(); err != nil {
		return nil, nil, err
	}
	signed = w.log.Published()
	if w.asks == nil {
		return signed, signed, nil
	}
	if err := w.introduce(ctx); err != nil {
		return signed, signed, err
	}
	cosigned, err = w.add(ctx, w.builtIn, signed, signed)
	if errors.Is(err, witness.ErrUnknownLog) { // it has lost its database since
		slog.Warn("the authority does not know the log any more; it is told of it anew", "error", err)
		w.builtIn = nil
		if err = w.introduce(ctx); err == nil {
			cosigned, err = w.add(ctx, w.builtIn, signed, signed)
		}
	}
	w.noteAuthority(err)
	return signed, cosigned, err
}

// noteAuthority keeps that the authority contradicts the log, until it does no more. One that
// does not answer says nothing about it.
func (w *witnesses) noteAuthority(err error) {
	w.state.Lock()
	defer w.state.Unlock()
	switch {
	case err == nil:
		w.another = nil
	case contradicts(err):
		slog.Error("the authority contradicts the log", "error", err)
		w.another = fmt.Errorf("the authority knows another history of it: %w", err)
	}
}

// contradicts tells a witness that knows another history from one that does not answer.
func contradicts(err error) bool {
	return errors.Is(err, witness.ErrFork) || errors.Is(err, witness.ErrAhead)
}

// add has one more witness cosign a checkpoint.
func (w *witnesses) add(ctx context.Context, c *witness.Client, signed, cosigned []byte) ([]byte, error) {
	line, err := c.Cosign(ctx, w.log, signed, w.key)
	if err != nil {
		return cosigned, err
	}
	return audit.AddCosignature(cosigned, line, c.Key)
}

// round shows the log to everyone and keeps in it what they cosigned. The error is the
// authority's; one of the others counts in allow. There is one round at a time.
func (w *witnesses) round(ctx context.Context, patience time.Duration) error {
	signed, cosigned, authority := w.show(ctx, patience)
	if signed == nil {
		return authority
	}
	var others error
	for _, c := range w.required {
		var err error
		if cosigned, err = w.add(ctx, c, signed, cosigned); err != nil {
			others = errors.Join(others, err)
		}
	}
	if ctx.Err() != nil { // whoever was asked could not answer
		return ctx.Err()
	}
	w.note(others)
	if others == nil && len(cosigned) > len(signed) {
		if err := w.log.Keep(cosigned); err != nil {
			slog.Error("keeping the cosigned checkpoint", "error", err)
		}
	}
	return authority
}

// introduce makes the log known to the authority, once.
func (w *witnesses) introduce(ctx context.Context) error {
	if w.builtIn != nil {
		return nil
	}
	info, err := w.asks.Info(ctx)
	if err != nil {
		return err
	}
	if err := audit.CheckWitnessKey(info.Witness); err != nil {
		return fmt.Errorf("the authority is no witness: %w", err)
	}
	if err := w.asks.RegisterLog(ctx, w.key); err != nil {
		return err
	}
	w.builtIn = &witness.Client{URL: approvals.WitnessURL, Key: info.Witness, HTTP: w.asks.HTTP()}
	return nil
}

// note says what came of the required witnesses.
func (w *witnesses) note(err error) {
	w.state.Lock()
	defer w.state.Unlock()
	if err == nil {
		if w.err != nil && len(w.required) > 0 {
			slog.Info("the log is witnessed")
		}
		w.last, w.err = w.now(), nil
		return
	}
	slog.Error("a witness that is required has not cosigned the log", "error", err)
	w.err = err
	if contradicts(err) {
		w.last = time.Time{} // it contradicts: no patience
	}
}

// keep shows the log now and then, until ctx ends.
func (w *witnesses) keep(ctx context.Context) {
	for {
		if err := w.round(ctx, witnessAuthority); err != nil && ctx.Err() == nil {
			// Without an authority nobody can approve, and the rest goes on.
			slog.Warn("the authority has not cosigned the log", "error", err)
		}
		wait := witnessEvery
		if w.failing() {
			wait = witnessRetry
		}
		select {
		case <-ctx.Done():
			return
		case <-w.soon:
		case <-time.After(wait):
		}
	}
}

// wish asks for a round now: a session has ended, and its receipt shall have the word of
// those who vouch for the log.
func (w *witnesses) wish() {
	select {
	case w.soon <- struct{}{}:
	default: // one is wanted already
	}
}

func (w *witnesses) failing() bool {
	w.state.Lock()
	defer w.state.Unlock()
	return w.another != nil || len(w.required) > 0 && w.err != nil
}
