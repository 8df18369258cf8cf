package script

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// Anthropic is a scripted endpoint of the Messages API: POST /v1/messages,
// streamed or not, POST /v1/messages/count_tokens, GET /v1/models.
func Anthropic(m Model) *Server { return newServer(m, anthropic{}) }

type anthropic struct{}

// titleOf is how opencode asks for a title of the session.
const titleOf = "You are a title generator"

type anthropicBody struct {
	Model     string
	Stream    bool
	MaxTokens int `json:"max_tokens"`
	System    blocks
	Messages  []struct {
		Role    string
		Content blocks
	}
	Tools        []struct{ Name string }
	OutputConfig struct {
		Format struct {
			Type   string
			Schema json.RawMessage
		}
	} `json:"output_config"`
}

// blocks is message content: a string or a list.
type blocks []block

type block struct {
	Type    string
	Text    string
	UseID   string `json:"tool_use_id"`
	IsError bool   `json:"is_error"`
	Content blocks
}

func (b *blocks) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		*b = blocks{{Type: "text", Text: text}}
		return nil
	}
	return json.Unmarshal(raw, (*[]block)(b))
}

func (b blocks) text() string {
	var parts []string
	for _, block := range b {
		if block.Type == "text" {
			parts = append(parts, block.Text)
		}
	}
	return strings.Join(parts, "\n")
}

func (anthropic) read(r *Request) (asked, error) {
	path, _, _ := strings.Cut(r.Path, "?")
	if r.Method != http.MethodPost || !strings.HasSuffix(path, "/v1/messages") {
		return asked{}, nil
	}
	var body anthropicBody
	if err := json.Unmarshal(r.Body, &body); err != nil {
		return asked{}, fmt.Errorf("messages: %w", err)
	}
	a := asked{inference: true, stream: body.Stream, model: body.Model, schema: body.OutputConfig.Format.Schema}
	for _, tool := range body.Tools {
		r.Tools = append(r.Tools, tool.Name)
	}
	// A request for a JSON value is a title or a summary; one token is a probe.
	if a.schema != nil || body.MaxTokens == 1 || strings.Contains(body.System.text(), titleOf) {
		return a, nil
	}
	r.Side = false
	for _, m := range body.Messages {
		if m.Role == "assistant" {
			r.Turn.N++
			continue
		}
		for _, b := range m.Content {
			switch b.Type {
			case "text":
				if m.Role == "user" { // a system message may stand between
					r.Turn.Prompt = b.Text
				}
			case "tool_result":
				r.Turn.Results = append(r.Turn.Results, Result{b.UseID, b.Content.text(), b.IsError})
			}
		}
	}
	return a, nil
}

func (anthropic) events(r *Request, a asked) ([]event, any, error) {
	args, err := r.Step.arguments()
	if err != nil {
		return nil, nil, err
	}
	r.Output = tokens(len(r.Step.Text) + len(r.Step.Tool) + len(args))
	id := fmt.Sprintf("%03d", r.Turn.N)
	usage := map[string]any{
		"input_tokens": r.Input, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
		"output_tokens": 1, "service_tier": "standard",
	}
	message := map[string]any{
		"id": "msg_script" + id, "type": "message", "role": "assistant", "model": a.model,
		"content": []any{}, "stop_reason": nil, "stop_sequence": nil, "usage": usage,
	}
	events := []event{{"message_start", map[string]any{"message": message}}}
	var content []any
	add := func(start, whole map[string]any, delta map[string]any) {
		i := len(content)
		content = append(content, whole)
		events = append(events,
			event{"content_block_start", map[string]any{"index": i, "content_block": start}},
			event{"content_block_delta", map[string]any{"index": i, "delta": delta}},
			event{"content_block_stop", map[string]any{"index": i}})
	}
	if r.Step.Text != "" || r.Step.Tool == "" {
		add(map[string]any{"type": "text", "text": ""},
			map[string]any{"type": "text", "text": r.Step.Text},
			map[string]any{"type": "text_delta", "text": r.Step.Text})
	}
	reason := "end_turn"
	if r.Step.Tool != "" {
		reason = "tool_use"
		use := func(input any) map[string]any {
			return map[string]any{"type": "tool_use", "id": "toolu_script" + id, "name": qualified(r.Step, r.Tools), "input": input}
		}
		add(use(map[string]any{}), use(args), map[string]any{"type": "input_json_delta", "partial_json": string(args)})
	}
	events = append(events,
		event{"message_delta", map[string]any{
			"delta": map[string]any{"stop_reason": reason, "stop_sequence": nil},
			"usage": map[string]any{"output_tokens": r.Output},
		}},
		event{"message_stop", map[string]any{}})
	for _, e := range events {
		e.data["type"] = e.name
	}
	whole := map[string]any{}
	for k, v := range message {
		whole[k] = v
	}
	whole["content"], whole["stop_reason"] = content, reason
	whole["usage"] = map[string]any{"input_tokens": r.Input, "output_tokens": r.Output}
	return events, whole, nil
}

// qualified is the name of a step's tool where those of an MCP server carry the server in
// front: as most clients write it, or as the client does that offers it so.
func qualified(s Step, offered []string) string {
	if s.Server == "" {
		return s.Tool
	}
	if name := s.Server + "_" + s.Tool; slices.Contains(offered, name) {
		return name
	}
	return "mcp__" + s.Server + "__" + s.Tool
}

func (anthropic) fail(status int, message string) any {
	kind := map[int]string{
		400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
		404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error",
	}[status]
	if kind == "" {
		kind = "api_error"
	}
	return map[string]any{"type": "error", "error": map[string]any{"type": kind, "message": message}}
}

func (p anthropic) other(r *Request) (int, any) {
	path, _, _ := strings.Cut(r.Path, "?")
	switch {
	case r.Method == http.MethodPost && strings.HasSuffix(path, "/v1/messages/count_tokens"):
		return http.StatusOK, map[string]any{"input_tokens": r.Input}
	case r.Method == http.MethodGet && strings.HasSuffix(path, "/v1/models"):
		return http.StatusOK, map[string]any{"data": []any{}, "has_more": false}
	case r.Method == http.MethodHead:
		return http.StatusNotFound, nil // a HEAD has no body; this is what the provider says to one of /
	}
	return http.StatusNotFound, p.fail(http.StatusNotFound, r.Method+" "+path+" is not served")
}
