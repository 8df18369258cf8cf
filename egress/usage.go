package egress

import (
	"bytes"
	"encoding/json"

	"cal/nucleus"
)

// maxEvent is the most of one event, or of an answer in one piece, that is kept
// to read the usage from; of a longer one the tokens are not known.
const maxEvent = 8 << 20

// MaxTokens is the most tokens of a kind that are believed of one call.
const MaxTokens = 1_000_000_000

// Tokens is what a call used, as the provider counted. Input is what was not
// read from a cache; CacheHour is the part of CacheWrite that is kept for an hour.
type Tokens struct {
	Input      int64 `json:"input"`
	CacheRead  int64 `json:"cache_read,omitempty"`
	CacheWrite int64 `json:"cache_write,omitempty"`
	CacheHour  int64 `json:"cache_write_1h,omitempty"`
	Output     int64 `json:"output"`
}

// Sum is all tokens that the provider counts.
func (t Tokens) Sum() int64 { return t.Input + t.CacheRead + t.CacheWrite + t.Output }

// usageCounter reads the usage out of an answer that is written to it while it
// streams by. It keeps one line of a stream at a time.
type usageCounter struct {
	stream  bool // server-sent events; else one JSON value
	tokens  Tokens
	model   string
	service string // the kind of service that the provider says it gave
	line    []byte
	skip    bool // the line is too long

	refused      bool // by the provider
	apart        bool // the provider goes on though nobody listens
	input, final bool // whether the provider said how much went in, and how much came of it in the end
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
	if ok && !u.skip && (u.model == "" || bytes.Contains(data, []byte(`"usage"`))) {
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
	Model   string `json:"model"`
	Service string `json:"service_tier"`
	Apart   bool   `json:"background"`
	Usage   *struct {
		Input      *int64 `json:"input_tokens"`
		Output     *int64 `json:"output_tokens"`
		CacheRead  *int64 `json:"cache_read_input_tokens"`
		CacheWrite *int64 `json:"cache_creation_input_tokens"`
		Writes     *struct {
			Hour *int64 `json:"ephemeral_1h_input_tokens"`
		} `json:"cache_creation"`
		Service string `json:"service_tier"`
		Speed   string `json:"speed"`

		Prompt     *int64   `json:"prompt_tokens"`
		Completion *int64   `json:"completion_tokens"`
		InputOf    *details `json:"input_tokens_details"`
		PromptOf   *details `json:"prompt_tokens_details"`
	} `json:"usage"`
}

type details struct {
	Cached int64 `json:"cached_tokens"`
	Writes int64 `json:"cache_write_tokens"`
}

// read takes the newest numbers: both protocols count from the beginning of the
// call, and repeat in later events only what has grown. What Anthropic says at the start
// of a message is no count of what came of it.
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
		if r == nil {
			continue
		}
		if r.Model != "" {
			u.model = r.Model
		}
		if r.Service != "" {
			u.service = r.Service
		}
		u.apart = u.apart || r.Apart
		if r.Usage == nil {
			continue
		}
		if r.Usage.Service != "" {
			u.service = r.Usage.Service
		}
		if r.Usage.Speed != "" && r.Usage.Speed != "standard" {
			u.service = r.Usage.Speed
		}
		cached := r.Usage.InputOf
		if cached == nil {
			cached = r.Usage.PromptOf
		}
		input := r.Usage.Input
		if input == nil {
			input = r.Usage.Prompt
		}
		u.input = take(&u.tokens.Input, input) || u.input
		output := take(&u.tokens.Output, r.Usage.Output)
		output = take(&u.tokens.Output, r.Usage.Completion) || output
		u.final = u.final || output && r != event.Message
		take(&u.tokens.CacheRead, r.Usage.CacheRead)
		take(&u.tokens.CacheWrite, r.Usage.CacheWrite)
		if r.Usage.Writes != nil {
			take(&u.tokens.CacheHour, r.Usage.Writes.Hour)
		}
		if cached != nil && input != nil { // OpenAI counts the cached as input
			u.tokens.CacheRead = within(cached.Cached)
			u.tokens.CacheWrite = within(cached.Writes)
			u.tokens.Input = within(within(*input) - u.tokens.CacheRead - u.tokens.CacheWrite)
		}
	}
}

// take takes a number that a provider can have meant.
func take(to, from *int64) bool {
	if from == nil || *from < 0 {
		return false
	}
	*to = within(*from)
	return true
}

func within(n int64) int64 { return max(0, min(n, MaxTokens)) }

// The estimate stands for what a provider did not report: because the answer was cut
// off, which a guest can do that wants the count unseen, or because it never does. It is
// meant to lie above what was used. A byte of the request is a token: no tokenizer makes
// more of them; no call takes more than maxContext. Of what came out, four bytes of the
// answer are one, with its framing; or the time that the call took counts, where that is
// more, because an answer that is thought about has no bytes yet. Where the provider may go
// on although nobody listens - the request asks for no stream, or to be done in the
// background - it counts for all that the request allows.
const (
	maxContext      = 1_050_000
	maxAnswer       = 128_000
	bytesPerOutput  = 4
	outputPerSecond = 200
)

// estimate fills in what the provider did not report of a call that it took on, and says
// whether anything was. cut says that the answer is not whole.
func (u *usageCounter) estimate(call ModelCall, cut bool) bool {
	if !u.input {
		u.tokens.Input = call.inputBound()
	}
	if !u.final {
		bySpeed := int64(call.Took.Seconds() * outputPerSecond)
		u.tokens.Output = within(max(u.tokens.Output, call.Received/bytesPerOutput, bySpeed*max(1, call.choices)))
		if call.apart || u.apart || cut && !call.stream {
			u.tokens.Output = within(max(u.tokens.Output, call.outputBound()))
		}
	}
	return !u.input || !u.final
}

func (c ModelCall) inputBound() int64 {
	if c.hidden {
		return maxContext
	}
	return min(max(c.Sent, c.size), maxContext)
}

// Expected is what may be held of a budget for a call that has begun: all that its request
// can be, and an answer of some length.
func (c ModelCall) Expected() Tokens {
	answer := c.outputBound()
	if !c.apart {
		answer = min(answer, 4096)
	}
	return Tokens{Input: c.inputBound(), Output: answer}
}

func (c ModelCall) outputBound() int64 {
	if c.most == 0 {
		return maxAnswer
	}
	return within(c.most)
}

// maxRead is as much of a request's body as is read before the call is admitted.
const maxRead = 4 << 20

// look reads from a request's body what a budget needs: the model that it names, how much
// may come of it, and whether its bytes say how much goes in. They do not where the body is
// compressed, or goes on from what the provider keeps, or could be understood in two ways.
func (c *ModelCall) look(body []byte, encoded bool) {
	c.hidden, c.most, c.choices = true, maxAnswer, 1
	canonical, err := nucleus.CanonicalJSON(body)
	var members map[string]json.RawMessage
	if encoded || err != nil || json.Unmarshal(canonical, &members) != nil {
		return
	}
	var model string
	if json.Unmarshal(members["model"], &model) == nil {
		c.Requested = shorten(model)
	}
	number := func(key string) (n int64) {
		if json.Unmarshal(members[key], &n) != nil {
			return 0
		}
		return n
	}
	for _, key := range []string{"max_tokens", "max_output_tokens", "max_completion_tokens"} {
		if stated := number(key); stated > 0 {
			c.most = min(c.most, stated)
		}
	}
	c.choices = max(1, min(number("n"), 1000))
	c.most *= c.choices
	c.stream, c.apart = string(members["stream"]) == "true", string(members["background"]) == "true"
	c.hidden = false
	for _, key := range []string{"previous_response_id", "conversation", "prompt", "container"} {
		if value := members[key]; len(value) > 0 && string(value) != "null" {
			c.hidden = true
		}
	}
}
