package tools

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"cal/nucleus"
)

// A brief call is one that takes a frame and answers in one: it moves no streams and
// is soon done. It travels as a wire call, in parts that nobody has to encode anew on
// the way:
//
//	request: header (JSON), action (canonical JSON; empty: resolve only), arguments (JSON)
//	reply:   header (JSON), value (JSON)
//
// The proxy hears the node in the same form, with headers of its own.

// Brief reports whether an operation can be a brief call. Resolving always can.
func Brief(op nucleus.Op) bool {
	switch op {
	case nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles, nucleus.GlobSearch, nucleus.GrepSearch:
		return true
	}
	return false
}

// Join puts parts into one message; all but the last have their length before them.
func Join(parts ...[]byte) []byte {
	size := 0
	for _, part := range parts {
		size += 4 + len(part)
	}
	message := make([]byte, 0, size)
	for i, part := range parts {
		if i < len(parts)-1 {
			message = binary.BigEndian.AppendUint32(message, uint32(len(part)))
		}
		message = append(message, part...)
	}
	return message
}

// Split takes n parts apart that Join put together.
func Split(message []byte, n int) ([][]byte, error) {
	parts := make([][]byte, 0, n)
	for len(parts) < n-1 {
		if len(message) < 4 || uint64(len(message)) < 4+uint64(binary.BigEndian.Uint32(message)) {
			return nil, fmt.Errorf("message ends in part %d of %d", len(parts)+1, n)
		}
		size := binary.BigEndian.Uint32(message)
		parts = append(parts, message[4:4+size])
		message = message[4+size:]
	}
	return append(parts, message), nil
}

// BriefResult is the header of a reply; the value is its second part.
type BriefResult struct {
	Action   *nucleus.Action `json:"action,omitempty"` // resolved
	Standing []byte          `json:"standing_b64,omitempty"`
	Error    *nucleus.Error  `json:"error,omitempty"`
}

func (r BriefResult) join(value []byte) []byte {
	head, err := json.Marshal(r)
	if err != nil { // cannot be: texts and numbers
		head = []byte(`{"error":{"kind":"internal","message":"a result that cannot be written"}}`)
	}
	return Join(head, value)
}

// brief serves one brief call.
func (w *worker) brief(ctx context.Context, request []byte) []byte {
	parts, err := Split(request, 3)
	var call Call
	if err == nil {
		err = strictHeader(parts[0], &call)
	}
	if err != nil {
		return BriefResult{Error: w.failure(call.Op, err)}.join(nil)
	}
	action, args := parts[1], parts[2]
	if len(action) == 0 {
		return w.briefResolve(call, args)
	}
	value, err := w.briefDo(ctx, call, action, args)
	if err != nil {
		return BriefResult{Error: w.failure(call.Op, err)}.join(nil)
	}
	return BriefResult{}.join(value)
}

func (w *worker) briefResolve(call Call, args []byte) []byte {
	p, err := w.plan(call, args)
	if err != nil {
		return BriefResult{Error: w.failure(call.Op, err)}.join(nil)
	}
	return BriefResult{Action: &p.action, Standing: w.standing(call, p.action)}.join(nil)
}

func (w *worker) briefDo(ctx context.Context, call Call, permitted, args []byte) ([]byte, error) {
	if !Brief(call.Op) {
		return nil, invalid(call.Op, "%s needs a stream", call.Op)
	}
	p, done, err := w.replan(call, permitted, args)
	if err != nil {
		return nil, err
	}
	defer done()
	value, _, err := p.run(ctx, nil)
	if changes(call.Op) {
		err = w.settle(err)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(value)
}
