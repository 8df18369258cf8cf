package node

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"cal/guest"
	"cal/nucleus"
)

// What a machine says is read here, and bounded: it goes into the log, whose entries have
// an end, and to callers who branch on kinds of errors.

const (
	maxSaid    = 2000    // bytes of a message
	maxOutcome = 8 << 10 // bytes of a signed outcome, whose message the proxy cuts at 512
)

// boundedError is a machine's error within bounds. A kind that there is none of is
// internal; no machine names an ask, or says what a policy of the host's decided.
func boundedError(e *nucleus.Error) *nucleus.Error {
	if e == nil {
		return nil
	}
	said := &nucleus.Error{Kind: e.Kind, Rule: cut(e.Rule, 100), Message: cut(e.Message, maxSaid)}
	kinds := []nucleus.Kind{
		nucleus.KindInvalid, nucleus.KindForbidden, nucleus.KindNotFound, nucleus.KindConflict, nucleus.KindTooLarge, nucleus.KindDenied,
		nucleus.KindUnavailable, nucleus.KindTimeout, nucleus.KindFailed,
	}
	if !slices.Contains(kinds, e.Kind) {
		said.Kind = nucleus.KindInternal
	}
	if e.Operation.Valid() {
		said.Operation = e.Operation
	}
	return said
}

// readResult reads the end of a call.
func readResult(payload []byte) (guest.CallResult, error) {
	var result guest.CallResult
	if err := json.Unmarshal(payload, &result); err != nil {
		return guest.CallResult{}, fmt.Errorf("the machine's result: %w", err)
	}
	result.Error = boundedError(result.Error)
	return result, nil
}

// readExit reads the end of an agent.
func readExit(payload []byte) (guest.AgentExit, error) {
	var exit guest.AgentExit
	if err := json.Unmarshal(payload, &exit); err != nil {
		return exit, fmt.Errorf("the machine's exit: %w", err)
	}
	exit.Error = boundedError(exit.Error)
	return exit, nil
}

// checkBootReply says why a machine that answered cannot be worked with.
func checkBootReply(reply nucleus.BootReply, boot string) error {
	switch {
	case reply.Error != "":
		return fmt.Errorf("the machine refuses to serve: %s", cut(reply.Error, maxSaid))
	case reply.Version != nucleus.Version:
		return fmt.Errorf("nucleus-tool-proxy is of version %s, the node of %s", cut(reply.Version, 40), nucleus.Version)
	case len(reply.OutcomeKey) != ed25519.PublicKeySize:
		return errors.New("the machine sent no outcome key")
	case reply.Boot != boot:
		return fmt.Errorf("the machine answers for boot %s, want %s", cut(reply.Boot, 80), boot)
	}
	return nil
}

// openOutcome verifies that the machine signed this statement for this permit.
func openOutcome(signed *nucleus.Signed, key ed25519.PublicKey, permit nucleus.Permit) (nucleus.Outcome, error) {
	var outcome nucleus.Outcome
	if signed == nil {
		return outcome, nucleus.Errorf(nucleus.KindInternal, "the machine signed no outcome")
	}
	if n := len(signed.Payload) + len(signed.Sig); n > maxOutcome {
		return outcome, nucleus.Errorf(nucleus.KindInternal, "the machine's outcome has %d bytes, at most %d", n, maxOutcome)
	}
	if err := signed.Open(key, nucleus.DomainOutcome, &outcome); err != nil {
		return nucleus.Outcome{}, nucleus.Errorf(nucleus.KindInternal, "the machine's outcome: %v", err)
	}
	if outcome.Permit != permit.ID || outcome.Boot != permit.Boot || outcome.Seq != permit.Seq {
		return nucleus.Outcome{}, nucleus.Errorf(nucleus.KindInternal, "the machine's outcome is for another permit")
	}
	return outcome, nil
}

// checkResult verifies that the machine signed what it says, for this permit.
func checkResult(result guest.CallResult, key ed25519.PublicKey, permit nucleus.Permit) (nucleus.Outcome, error) {
	outcome, err := openOutcome(result.Outcome, key, permit)
	if err == nil && len(result.Value) > 0 && outcome.Result != permit.ResultDigest(result.Value) {
		err = nucleus.Errorf(nucleus.KindInternal, "the machine's outcome is for another result")
	}
	return outcome, err
}
