package node

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"cal/guest"
	"cal/nucleus"
)

// actOnHost lets the machine's second lock judge the permit, and acts only where it
// has signed that it admits it. A machine that refuses, or is gone, is a no.
func (n *Node) actOnHost(ctx context.Context, p *Pod, r request, pre prepared, permit nucleus.Permit) (json.RawMessage, *nucleus.Signed, error) {
	outcome := nucleus.Outcome{Permit: permit.ID, Pod: p.record.ID, Boot: p.record.Boot, Seq: permit.Seq, Status: nucleus.OutcomeDone}
	started := time.Now()
	var value json.RawMessage
	var err error
	if outcome.Admission, err = n.admission(ctx, p, pre, permit); err != nil {
		outcome.Status = nucleus.OutcomeRefused
	} else {
		value, err = effect(ctx, pre, permit)
		var doubt *unsure
		switch {
		case errors.As(err, &doubt):
			outcome.Status = nucleus.OutcomeUnknown
		case err != nil:
			outcome.Status = nucleus.OutcomeFailed
		}
		p.acting.Done()
	}
	if err != nil {
		outcome.Message = logged(err.Error(), 512)
	}
	if len(value) > 0 {
		outcome.Bytes, outcome.Result = int64(len(value)), permit.ResultDigest(value)
	}
	outcome.Millis = time.Since(started).Milliseconds()
	signed, signErr := nucleus.Sign(n.key, nucleus.DomainOutcome, outcome)
	if signErr != nil {
		return nil, nil, errors.Join(err, signErr)
	}
	return value, &signed, err
}

// effectLife bounds an effect on the host.
const effectLife = 10 * time.Minute

// effect goes to its end though the caller goes away: cut off, nobody could say what
// came of it. What its own time cuts off is unknown.
func effect(ctx context.Context, pre prepared, permit nucleus.Permit) (json.RawMessage, error) {
	acting, cancel := context.WithTimeout(context.WithoutCancel(ctx), effectLife)
	defer cancel()
	value, err := pre.effect(acting, permit)
	if err != nil && acting.Err() != nil {
		err = &unsure{err}
	}
	return value, err
}

// unsure is why nobody can say whether an effect on the host took place.
type unsure struct{ why error }

func (e *unsure) Error() string { return "nobody can say whether it was done: " + e.why.Error() }
func (e *unsure) Unwrap() error {
	said := *nucleus.AsError(e.why)
	said.Message = "nobody can say whether it was done: " + said.Message
	return &said
}

// notDone is why an effect on the host was not tried.
type notDone struct{ why *nucleus.Error }

func (e *notDone) Error() string { return e.why.Error() }
func (e *notDone) Unwrap() error { return e.why }

// admission is the machine's own word on an effect of the host, whatever it is. The
// effect has begun where the error is nil: p.acting waits for it.
func (n *Node) admission(ctx context.Context, p *Pod, pre prepared, permit nucleus.Permit) (*nucleus.Signed, error) {
	refuse := func(format string, args ...any) *notDone {
		e := nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: "+format, args...)
		e.Operation = permit.Op
		return &notDone{e}
	}
	// Longer than it lives no permit is admitted.
	waiting, cancel := context.WithTimeout(ctx, permitLife)
	defer cancel()
	result, err := n.permitted(waiting, p, guest.Call{}, permit, pre, nil, nil)
	if err != nil {
		return nil, refuse("the machine did not admit it: %v", err)
	}
	if e := result.Error; e != nil {
		refused := refuse("%s", e.Message)
		refused.why.Kind, refused.why.Rule = nucleus.KindForbidden, "second-lock"
		return result.Outcome, refused
	}
	said, err := openOutcome(result.Outcome, p.record.OutcomeKey, permit)
	if err != nil || said.Status != nucleus.OutcomeAdmitted {
		return result.Outcome, refuse("the machine says %q of the permit, want %q", cut(said.Status, 80), nucleus.OutcomeAdmitted)
	}
	if why := p.beginEffect(); why != "" {
		return result.Outcome, refuse("%s", why)
	}
	return result.Outcome, nil
}
