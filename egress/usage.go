package egress

import (
	"bytes"
	"encoding/json"
)

// maxEvent is the most of one event, or of an answer in one piece, that is kept
// to read the usage from; of a longer one the tokens are not known.
const maxEvent = 8 << 20

// Tokens is what a call used, as the provider counted. Input is what was not
// read from a cache.
type Tokens struct {
	Input      int64 `json:"input"`
	CacheRead  int64 `json:"cache_read,omitempty"`
	CacheWrite int64 `json:"cache_write,omitempty"`
	Output     int64 `json:"output"`
}

// usageCounter reads the usage out of an answer that is written to it while it
// streams by. It keeps one line of a stream at a time.
type usageCounter struct {
	stream bool // server-sent events; else one JSON value
	tokens Tokens
	model  string
	line   []byte
	skip   bool // the line is too long
}

func (u *usageCounter) Write(p []byte) (int, error) {
	if !u.stream {
		u.keep(p)
		return len(p), nil
	}
	for rest := p; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		u.keep(line)
		if ended {
			u.event()
		}
		rest = after
	}
	return len(p), nil
}

func (u *usageCounter) keep(p []byte) {
	if u.skip = u.skip || len(u.line)+len(p) > maxEvent; !u.skip {
		u.line = append(u.line, p...)
	}
}

func (u *usageCounter) event() {
	data, ok := bytes.CutPrefix(u.line, []byte("data:"))
	if ok && !u.skip && bytes.Contains(data, []byte(`"usage"`)) {
		u.read(data)
	}
	u.line, u.skip = u.line[:0], false
}

// finish reads what the end of the answer completes.
func (u *usageCounter) finish() {
	if u.stream {
		u.event()
	} else if !u.skip {
		u.read(u.line)
	}
	u.line = nil
}

// report is the part of an event or answer that both protocols put usage in.
type report struct {
	Model string `json:"model"`
	Usage *struct {
		Input      *int64 `json:"input_tokens"`
		Output     *int64 `json:"output_tokens"`
		CacheRead  *int64 `json:"cache_read_input_tokens"`
		CacheWrite *int64 `json:"cache_creation_input_tokens"`

		Prompt     *int64   `json:"prompt_tokens"`
		Completion *int64   `json:"completion_tokens"`
		InputOf    *details `json:"input_tokens_details"`
		PromptOf   *details `json:"prompt_tokens_details"`
	} `json:"usage"`
}

type details struct {
	Cached int64 `json:"cached_tokens"`
}

// read takes the newest numbers: both protocols count from the beginning of the
// call, and repeat in later events only what has grown.
func (u *usageCounter) read(data []byte) {
	var event struct {
		report
		Message  *report `json:"message"`  // Anthropic, message_start
		Response *report `json:"response"` // OpenAI, response.*
	}
	if json.Unmarshal(data, &event) != nil {
		return
	}
	for _, r := range []*report{&event.report, event.Message, event.Response} {
		if r == nil || r.Usage == nil {
			continue
		}
		if r.Model != "" {
			u.model = r.Model
		}
		cached := r.Usage.InputOf
		if cached == nil {
			cached = r.Usage.PromptOf
		}
		input := r.Usage.Input
		if input == nil {
			input = r.Usage.Prompt
		}
		take(&u.tokens.Input, input)
		take(&u.tokens.Output, r.Usage.Output)
		take(&u.tokens.Output, r.Usage.Completion)
		take(&u.tokens.CacheRead, r.Usage.CacheRead)
		take(&u.tokens.CacheWrite, r.Usage.CacheWrite)
		if cached != nil && input != nil { // OpenAI counts the cached as input
			u.tokens.CacheRead = max(cached.Cached, 0)
			u.tokens.Input = max(*input-cached.Cached, 0)
		}
	}
}

func take(to, from *int64) {
	if from != nil && *from >= 0 {
		*to = *from
	}
}
