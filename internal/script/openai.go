package script

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// OpenAI is a scripted endpoint of the Responses API: POST .../responses,
// streamed or not, GET .../models.
//
// A tool of an MCP server is called with a namespace. Where the client offers its
// tools only to programs (one custom tool "exec" that runs JavaScript with a
// global "tools"), the call is made by such a program, as models do for which the
// client chooses that form.
func OpenAI(m Model) *Server { return newServer(m, openai{}) }

type openai struct{}

type openaiBody struct {
	Model  string
	Stream bool
	Input  items
	Tools  []openaiTool
	Text   struct {
		Format struct {
			Type   string
			Schema json.RawMessage
		}
	}
}

type openaiTool struct {
	Type  string
	Name  string
	Tools []openaiTool // of a namespace
}

// items is the input: a string or a list.
type items []item

type item struct {
	Type    string
	Role    string
	CallID  string `json:"call_id"`
	Content parts
	Output  parts
	Tools   []openaiTool // of "additional_tools"
}

// parts is content: a string or a list.
type parts []struct{ Type, Text string }

func (i *items) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		*i = items{{Type: "message", Role: "user", Content: parts{{"input_text", text}}}}
		return nil
	}
	return json.Unmarshal(raw, (*[]item)(i))
}

func (p *parts) UnmarshalJSON(raw []byte) error {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		*p = parts{{"text", text}}
		return nil
	}
	return json.Unmarshal(raw, (*[]struct{ Type, Text string })(p))
}

func (p parts) text() string {
	var texts []string
	for _, part := range p {
		if strings.HasSuffix(part.Type, "text") {
			texts = append(texts, part.Text)
		}
	}
	return strings.Join(texts, "\n")
}

func (openai) read(r *Request) (asked, error) {
	path, _, _ := strings.Cut(r.Path, "?")
	if r.Method != http.MethodPost || !strings.HasSuffix(path, "/responses") {
		return asked{}, nil
	}
	var body openaiBody
	if err := json.Unmarshal(r.Body, &body); err != nil {
		return asked{}, fmt.Errorf("responses: %w", err)
	}
	a := asked{inference: true, stream: body.Stream, model: body.Model, schema: body.Text.Format.Schema}
	tools := body.Tools
	for _, i := range body.Input {
		tools = append(tools, i.Tools...)
	}
	for _, tool := range tools {
		a.code = offer(r, tool, "") || a.code
	}
	if a.schema != nil {
		return a, nil
	}
	r.Side = false
	said := false // the item before was text of the model: a call that follows belongs to the same answer
	for _, i := range body.Input {
		switch i.Type {
		case "function_call", "custom_tool_call":
			if !said {
				r.Turn.N++
			}
		case "function_call_output", "custom_tool_call_output":
			r.Turn.Results = append(r.Turn.Results, Result{Call: i.CallID, Text: i.Output.text()})
		case "message", "":
			switch i.Role {
			case "assistant":
				r.Turn.N++
			case "user":
				r.Turn.Prompt = i.Content.text()
			}
		}
		said = i.Role == "assistant"
	}
	return a, nil
}

// offer adds a tool's name to r.Tools, and says whether it runs programs.
func offer(r *Request, tool openaiTool, namespace string) (code bool) {
	if tool.Type == "namespace" {
		for _, inner := range tool.Tools {
			code = offer(r, inner, tool.Name) || code
		}
		return code
	}
	name := tool.Name
	if name == "" {
		name = tool.Type // a tool of the provider's own, such as web_search
	}
	if strings.HasPrefix(namespace, "mcp__") {
		name = namespace + "__" + name
	}
	r.Tools = append(r.Tools, name)
	return tool.Type == "custom" && tool.Name == "exec"
}

func (openai) events(r *Request, a asked) ([]event, any, error) {
	args, err := r.Step.arguments()
	if err != nil {
		return nil, nil, err
	}
	r.Output = tokens(len(r.Step.Text) + len(r.Step.Tool) + len(args))
	id := fmt.Sprintf("%03d", r.Turn.N)
	response := func(status string, output []any, usage any) map[string]any {
		return map[string]any{
			"id": "resp_script" + id, "object": "response", "created_at": 0, "status": status,
			"model": a.model, "output": output, "usage": usage, "error": nil, "incomplete_details": nil,
		}
	}
	events := []event{
		{"response.created", map[string]any{"response": response("in_progress", []any{}, nil)}},
		{"response.in_progress", map[string]any{"response": response("in_progress", []any{}, nil)}},
	}
	output := []any{}
	add := func(name string, data map[string]any) { events = append(events, event{name, data}) }
	if r.Step.Text != "" || r.Step.Tool == "" {
		item := "msg_script" + id
		part := func(text string) map[string]any {
			return map[string]any{"type": "output_text", "text": text, "annotations": []any{}}
		}
		message := func(status string, content ...any) map[string]any {
			return map[string]any{"id": item, "type": "message", "role": "assistant", "status": status, "content": slices.Concat([]any{}, content)}
		}
		where := func(data map[string]any) map[string]any {
			data["item_id"], data["output_index"], data["content_index"] = item, 0, 0
			return data
		}
		add("response.output_item.added", map[string]any{"output_index": 0, "item": message("in_progress")})
		add("response.content_part.added", where(map[string]any{"part": part("")}))
		add("response.output_text.delta", where(map[string]any{"delta": r.Step.Text}))
		add("response.output_text.done", where(map[string]any{"text": r.Step.Text}))
		add("response.content_part.done", where(map[string]any{"part": part(r.Step.Text)}))
		done := message("completed", part(r.Step.Text))
		add("response.output_item.done", map[string]any{"output_index": 0, "item": done})
		output = append(output, done)
	}
	if r.Step.Tool != "" {
		call := toolCall(r.Step, args, id, a.code && !slices.Contains(r.Tools, qualified(r.Step, r.Tools)))
		index := len(output)
		started := map[string]any{"status": "in_progress"}
		for k, v := range call {
			started[k] = v
		}
		input, kind := "arguments", "response.function_call_arguments"
		if call["type"] == "custom_tool_call" {
			input, kind = "input", "response.custom_tool_call_input"
		}
		started[input] = ""
		add("response.output_item.added", map[string]any{"output_index": index, "item": started})
		add(kind+".delta", map[string]any{"item_id": call["id"], "output_index": index, "delta": call[input]})
		add(kind+".done", map[string]any{"item_id": call["id"], "output_index": index, input: call[input]})
		call["status"] = "completed"
		add("response.output_item.done", map[string]any{"output_index": index, "item": call})
		output = append(output, call)
	}
	whole := response("completed", output, map[string]any{
		"input_tokens": r.Input, "input_tokens_details": map[string]any{"cached_tokens": 0},
		"output_tokens": r.Output, "output_tokens_details": map[string]any{"reasoning_tokens": 0},
		"total_tokens": r.Input + r.Output,
	})
	add("response.completed", map[string]any{"response": whole})
	for i, e := range events {
		e.data["type"], e.data["sequence_number"] = e.name, i
	}
	return events, whole, nil
}

func toolCall(s Step, args json.RawMessage, id string, byProgram bool) map[string]any {
	call := map[string]any{"call_id": "call_script" + id}
	if byProgram {
		call["id"], call["type"], call["name"] = "ctc_script"+id, "custom_tool_call", "exec"
		call["input"] = fmt.Sprintf("const result = await tools.%s(%s);\ntext(result);\n", qualified(s, nil), args)
		return call
	}
	call["id"], call["type"], call["name"], call["arguments"] = "fc_script"+id, "function_call", s.Tool, string(args)
	if s.Server != "" {
		call["namespace"] = "mcp__" + s.Server
	}
	return call
}

func (openai) fail(status int, message string) any {
	kind := "invalid_request_error"
	if status >= 500 {
		kind = "server_error"
	}
	if status == http.StatusTooManyRequests {
		kind = "rate_limit_exceeded"
	}
	return map[string]any{"error": map[string]any{"message": message, "type": kind, "param": nil, "code": nil}}
}

func (p openai) other(r *Request) (int, any) {
	path, _, _ := strings.Cut(r.Path, "?")
	if r.Method == http.MethodGet && strings.HasSuffix(path, "/models") {
		return http.StatusOK, map[string]any{"object": "list", "data": []any{}}
	}
	return http.StatusNotFound, p.fail(http.StatusNotFound, r.Method+" "+path+" is not served")
}
