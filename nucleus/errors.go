package nucleus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Kind says of what sort an error is, for programs that branch on it.
type Kind string

// The kinds of errors that cross an interface.
const (
	KindInvalid         Kind = "invalid"           // the request is malformed
	KindUnauthenticated Kind = "unauthenticated"   // no or a bad signature, a replay, too old
	KindForbidden       Kind = "forbidden"         // authenticated, but not for this route or pod
	KindNotFound        Kind = "not_found"         //
	KindConflict        Kind = "conflict"          // busy or already there
	KindTooLarge        Kind = "too_large"         //
	KindDenied          Kind = "denied"            // by policy
	KindApproval        Kind = "approval_required" // Ask holds the id
	KindRefused         Kind = "approval_refused"  // a person said no
	KindUnavailable     Kind = "unavailable"       // the log, the authority or the machine cannot be reached
	KindTimeout         Kind = "timeout"           //
	KindFailed          Kind = "failed"            // the effect was tried and failed
	KindInternal        Kind = "internal"          //
)

// Error is a failure or a refusal as it crosses an interface:
// {"error": {"kind", "operation", "rule", "message", "ask"?}}.
type Error struct {
	Kind      Kind   `json:"kind"`
	Operation Op     `json:"operation,omitempty"`
	Rule      string `json:"rule,omitempty"`
	Message   string `json:"message"`
	Ask       string `json:"ask,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error of a kind.
func Errorf(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// AsError returns err as an *Error; one that is none becomes KindInternal.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Kind: KindInternal, Message: err.Error()}
}

// Strict decodes one JSON value into v and refuses unknown fields and trailing
// data.
func Strict(raw []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("data after the value")
	}
	return nil
}
