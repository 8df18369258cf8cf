package egress

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

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
	others  []string // models that answered a part of it
	service service  // the kind of service that the provider says it gave
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

// service is what a call is charged for beside its tokens: the tier, the speed, and where
// the provider computes.
type service struct{ tier, speed, geo string }

// String joins what there is with "+"; what every call has is left out.
func (s service) String() string {
	var parts []string
	if s.tier != "" {
		parts = append(parts, s.tier)
	}
	if s.speed != "" && s.speed != "standard" {
		parts = append(parts, s.speed)
	}
	if s.geo != "" && s.geo != "global" && s.geo != "not_available" {
		parts = append(parts, s.geo)
	}
	return strings.Join(parts, "+")
}

// given is the service that a call is charged for. What the request asked for holds where the
// provider did not come to say what it gave.
func (u *usageCounter) given(asked service, estimated bool) service {
	choose := func(asked, named string) string {
		if asked != "" && (estimated || named == "") {
			return asked
		}
		return named
	}
	return service{choose(asked.tier, u.service.tier), choose(asked.speed, u.service.speed), choose(asked.geo, u.service.geo)}
}

// report is the part of an event or answer that both protocols put usage in.
type report struct {
	Model   string `json:"model"`
	Service string `json:"service_tier"`
	Apart   bool   `json:"background"`
	Usage   *struct {
		sampling
		Rounds  []sampling `json:"iterations"`
		Service string     `json:"service_tier"`
		Speed   string     `json:"speed"`
		Geo     string     `json:"inference_geo"`

		Prompt     *int64   `json:"prompt_tokens"`
		Completion *int64   `json:"completion_tokens"`
		InputOf    *details `json:"input_tokens_details"`
		PromptOf   *details `json:"prompt_tokens_details"`
	} `json:"usage"`
}

// sampling is what Anthropic counts of a call, and of each time that it asked a model for it:
// the whole leaves out what it took to shorten the conversation, or to ask another model.
type sampling struct {
	Input      *int64 `json:"input_tokens"`
	Output     *int64 `json:"output_tokens"`
	CacheRead  *int64 `json:"cache_read_input_tokens"`
	CacheWrite *int64 `json:"cache_creation_input_tokens"`
	Writes     *struct {
		Hour *int64 `json:"ephemeral_1h_input_tokens"`
	} `json:"cache_creation"`
	Model string `json:"model"`
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
			u.service.tier = r.Service
		}
		u.apart = u.apart || r.Apart
		if r.Usage == nil {
			continue
		}
		if r.Usage.Service != "" {
			u.service.tier = r.Usage.Service
		}
		if r.Usage.Speed != "" {
			u.service.speed = r.Usage.Speed
		}
		if r.Usage.Geo != "" {
			u.service.geo = r.Usage.Geo
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
		u.addRounds(r.Usage.Rounds)
		if cached != nil && input != nil { // OpenAI counts the cached as input
			u.tokens.CacheRead = within(cached.Cached)
			u.tokens.CacheWrite = within(cached.Writes)
			u.tokens.Input = within(within(*input) - u.tokens.CacheRead - u.tokens.CacheWrite)
		}
	}
}

// addRounds makes the counts at least what the rounds of a call add up to.
func (u *usageCounter) addRounds(rounds []sampling) {
	var sum Tokens
	for _, round := range rounds {
		var one Tokens
		take(&one.Input, round.Input)
		take(&one.Output, round.Output)
		take(&one.CacheRead, round.CacheRead)
		take(&one.CacheWrite, round.CacheWrite)
		if round.Writes != nil {
			take(&one.CacheHour, round.Writes.Hour)
		}
		sum = Tokens{within(sum.Input + one.Input), within(sum.CacheRead + one.CacheRead), within(sum.CacheWrite + one.CacheWrite), within(sum.CacheHour + one.CacheHour), within(sum.Output + one.Output)}
		if m := round.Model; m != "" && m != u.model && !slices.Contains(u.others, m) && len(u.others) < 4 {
			u.others = append(u.others, m)
		}
	}
	u.tokens = Tokens{max(u.tokens.Input, sum.Input), max(u.tokens.CacheRead, sum.CacheRead), max(u.tokens.CacheWrite, sum.CacheWrite), max(u.tokens.CacheHour, sum.CacheHour), max(u.tokens.Output, sum.Output)}
}

// models names who answered, "" where the provider did not say. Several at once are no name in a
// table of prices.
func (u *usageCounter) models() string {
	if len(u.others) == 0 {
		return u.model
	}
	return strings.Join(append([]string{u.model}, u.others...), "+")
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
// more of them; an image is maxImage more, however small its bytes or its address; a file,
// and what the provider keeps, has no such bound. No call takes more than maxContext. Of what came out, four bytes of the
// answer are one, with its framing; or the time that the call took counts, where that is
// more, because an answer that is thought about has no bytes yet. Where the provider may go
// on although nobody listens - the request asks for no stream, or to be done in the
// background - it counts for all that the request allows.
const (
	maxContext      = 1_050_000
	maxAnswer       = 128_000
	maxImage        = 12_000
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
	return min(max(c.Sent, c.size)+c.images*maxImage, maxContext)
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

// Bound is the most that can come of the call: what its request can be, and all that it allows.
func (c ModelCall) Bound() Tokens { return Tokens{Input: c.inputBound(), Output: c.outputBound()} }

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
	asked := func(key string, usual ...string) (s string) {
		if json.Unmarshal(members[key], &s) != nil || slices.Contains(usual, s) {
			return ""
		}
		return shorten(s)
	}
	c.asked = service{asked("service_tier", "auto", "default", "standard", "standard_only"), asked("speed"), asked("inference_geo")}
	c.Service = c.asked.String()
	c.hidden = false
	for _, key := range []string{"previous_response_id", "conversation", "prompt", "container"} {
		if value := members[key]; len(value) > 0 && string(value) != "null" {
			c.hidden = true
		}
	}
	for _, key := range []string{"messages", "input", "system"} {
		var content any
		if json.Unmarshal(members[key], &content) == nil {
			c.lookInto(content)
		}
		items, _ := content.([]any)
		for _, item := range items { // in a list of items, one that says no more than its id is one that the provider keeps
			if object, ok := item.(map[string]any); ok && object["type"] == nil && object["role"] == nil {
				c.hidden = true
			}
		}
	}
}

// lookInto looks for what is more tokens than bytes.
func (c *ModelCall) lookInto(content any) {
	switch content := content.(type) {
	case []any:
		for _, item := range content {
			c.lookInto(item)
		}
	case map[string]any:
		switch kind, _ := content["type"].(string); kind {
		case "image", "image_url", "input_image", "computer_screenshot":
			c.images++
			return
		case "document", "file", "input_file", "container_upload", "item_reference":
			c.hidden = true
		case "reasoning":
			if thought, _ := content["encrypted_content"].(string); thought == "" {
				c.hidden = true
			}
		}
		for _, item := range content {
			c.lookInto(item)
		}
	}
}
