package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"unicode/utf8"

	"cal/nucleus"
)

const maxErrorBody = 1 << 20

// AskHeader is where the informational response 102 to a request that waits for a person has
// the ask's id.
const AskHeader = "Nucleus-Ask"

// statuses is the one table of kinds and HTTP statuses. The kind in the body is
// what programs branch on; the status is for those that read no body. For a
// status that several kinds share, the first is read back where there is no body.
var statuses = []struct {
	kind   nucleus.Kind
	status int
}{
	{nucleus.KindInvalid, http.StatusBadRequest},
	{nucleus.KindUnauthenticated, http.StatusUnauthorized},
	{nucleus.KindForbidden, http.StatusForbidden},
	{nucleus.KindDenied, http.StatusForbidden},
	{nucleus.KindRefused, http.StatusForbidden},
	{nucleus.KindApproval, http.StatusPreconditionRequired},
	{nucleus.KindNotFound, http.StatusNotFound},
	{nucleus.KindConflict, http.StatusConflict},
	{nucleus.KindTooLarge, http.StatusRequestEntityTooLarge},
	{nucleus.KindFailed, http.StatusUnprocessableEntity},
	{nucleus.KindUnavailable, http.StatusServiceUnavailable},
	{nucleus.KindTimeout, http.StatusGatewayTimeout},
	{nucleus.KindInternal, http.StatusInternalServerError},
}

func statusOf(kind nucleus.Kind) int {
	for _, row := range statuses {
		if row.kind == kind {
			return row.status
		}
	}
	return http.StatusInternalServerError
}

func kindOf(status int) nucleus.Kind {
	for _, row := range statuses {
		if row.status == status {
			return row.kind
		}
	}
	switch {
	case status >= 500:
		return nucleus.KindUnavailable
	case status >= 400:
		return nucleus.KindInvalid
	}
	return nucleus.KindInternal
}

// errorBody is an error as it crosses HTTP.
type errorBody struct {
	Error *nucleus.Error `json:"error"`
}

// WriteError answers a request with e.
func WriteError(w http.ResponseWriter, e *nucleus.Error) {
	body, err := json.Marshal(errorBody{e})
	if err != nil { // cannot be: an Error is strings
		body = []byte(`{"error":{"kind":"internal","message":"an error that cannot be written"}}`)
	}
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Cache-Control", "no-store")
	w.WriteHeader(statusOf(e.Kind))
	w.Write(append(body, '\n'))
}

// ReadError returns the error that an answer carries. Where it carries none, it
// says what came instead. It reads resp.Body and leaves it to the caller to close.
func ReadError(resp *http.Response) *nucleus.Error {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	var body errorBody
	if json.Unmarshal(raw, &body) == nil && body.Error != nil && body.Error.Kind != "" {
		return body.Error
	}
	message := fmt.Sprintf("HTTP %d", resp.StatusCode)
	if text := bytes.TrimSpace(raw[:min(len(raw), 200)]); len(text) > 0 && utf8.Valid(text) {
		message += fmt.Sprintf(": %q", text)
	}
	if err != nil {
		message += fmt.Sprintf(" (%v)", err)
	}
	return &nucleus.Error{Kind: kindOf(resp.StatusCode), Message: message}
}
