package script

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

func started(t *testing.T, s *Server) string {
	t.Helper()
	url, stop, err := s.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return url
}

func post(t *testing.T, url, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Api-Key", "k")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

// stream reads server-sent events and checks their form.
func stream(t *testing.T, text string) (names []string, data []map[string]any) {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, ok := strings.CutPrefix(lines.Text(), "event: ")
		if !ok || !lines.Scan() {
			t.Fatalf("no event line: %q", lines.Text())
		}
		raw, ok := strings.CutPrefix(lines.Text(), "data: ")
		var d map[string]any
		if !ok || json.Unmarshal([]byte(raw), &d) != nil || d["type"] != name {
			t.Fatalf("no data of %s: %q", name, lines.Text())
		}
		if lines.Scan() && lines.Text() != "" {
			t.Fatalf("no empty line after %s", name)
		}
		names, data = append(names, name), append(data, d)
	}
	return names, data
}

const (
	anthropicUser   = `{"role":"user","content":"go"}`
	anthropicCall   = `{"role":"assistant","content":[{"type":"text","text":"x"},{"type":"tool_use","id":"toolu_script000","name":"mcp__cal__f","input":{}}]}`
	anthropicResult = `{"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_script000","is_error":true,"content":[{"type":"text","text":"no"}]},{"type":"text","text":"more"}]}`
	openaiUser      = `{"type":"message","role":"user","content":[{"type":"input_text","text":"go"}]}`
	openaiCall      = `{"type":"message","role":"assistant","content":[{"type":"output_text","text":"x"}]},{"type":"function_call","name":"f","namespace":"mcp__cal","call_id":"call_script000","arguments":"{}"}`
	openaiResult    = `{"type":"function_call_output","call_id":"call_script000","output":"no"},{"type":"message","role":"user","content":"more"}`
)

var steps = []Step{
	{Text: "I look.", Server: "cal", Tool: "f", Args: map[string]string{"a": "<&>"}},
	{Text: "Finished."},
}

func messages(stream bool, m ...string) string {
	return fmt.Sprintf(`{"model":"m","max_tokens":9,"stream":%v,"tools":[{"name":"mcp__cal__f"}],"messages":[%s]}`, stream, strings.Join(m, ","))
}

func responses(stream bool, tools string, i ...string) string {
	return fmt.Sprintf(`{"model":"m","stream":%v,"tools":[%s],"input":[%s]}`, stream, tools, strings.Join(i, ","))
}

// TestPlaceIsInTheConversation repeats, reorders and interleaves requests.
func TestPlaceIsInTheConversation(t *testing.T) {
	for _, c := range []struct {
		name          string
		server        *Server
		path          string
		first, second string
	}{
		{"anthropic", Anthropic(Steps(steps...)), "/v1/messages?beta=true", messages(false, anthropicUser), messages(false, anthropicUser, anthropicCall, anthropicResult)},
		{"openai", OpenAI(Steps(steps...)), "/v1/responses", responses(false, "", openaiUser), responses(false, "", openaiUser, openaiCall, openaiResult)},
	} {
		url := started(t, c.server) + c.path
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				if status, got := post(t, url, c.second); status != 200 || !strings.Contains(got, "Finished.") {
					t.Errorf("%s: second turn: %d %s", c.name, status, got)
				}
				if status, got := post(t, url, c.first); status != 200 || !strings.Contains(got, "I look.") {
					t.Errorf("%s: first turn: %d %s", c.name, status, got)
				}
			})
		}
		all.Wait()
		for _, r := range c.server.Conversation() {
			want := Turn{Prompt: "go"}
			if len(r.Turn.Results) > 0 {
				want = Turn{N: 1, Prompt: "more", Results: []Result{{r.Turn.Results[0].Call, "no", c.name == "anthropic"}}}
			}
			if fmt.Sprint(r.Turn) != fmt.Sprint(want) || r.Credential() != "k" {
				t.Errorf("%s: turn %+v with credential %q, want %+v with k", c.name, r.Turn, r.Credential(), want)
			}
		}
		if n := len(c.server.Conversation()); n != 8 {
			t.Errorf("%s: %d requests kept, want 8", c.name, n)
		}
	}
}

func TestAnthropicStream(t *testing.T) {
	server := Anthropic(Steps(steps...))
	_, text := post(t, started(t, server)+"/v1/messages", messages(true, anthropicUser))
	names, data := stream(t, text)
	want := "message_start content_block_start content_block_delta content_block_stop content_block_start content_block_delta content_block_stop message_delta message_stop"
	if got := strings.Join(names, " "); got != want {
		t.Fatalf("events %s, want %s", got, want)
	}
	use := data[4]["content_block"].(map[string]any)
	delta := data[5]["delta"].(map[string]any)
	if use["name"] != "mcp__cal__f" || fmt.Sprint(use["input"]) != "map[]" || delta["partial_json"] != `{"a":"<&>"}` || data[5]["index"] != 1.0 {
		t.Errorf("tool use %v with %v", use, delta)
	}
	if reason := data[7]["delta"].(map[string]any)["stop_reason"]; reason != "tool_use" {
		t.Errorf("stop reason %v", reason)
	}
	kept := server.Requests()[0]
	in := data[0]["message"].(map[string]any)["usage"].(map[string]any)["input_tokens"]
	out := data[7]["usage"].(map[string]any)["output_tokens"]
	if in != float64(kept.Input) || out != float64(kept.Output) || kept.Input < 2 || kept.Output < 2 {
		t.Errorf("usage %v and %v, kept %d and %d", in, out, kept.Input, kept.Output)
	}
}

func TestOpenAIStream(t *testing.T) {
	for _, c := range []struct{ name, tools, events, call string }{
		{"direct", `{"type":"namespace","name":"mcp__cal","tools":[{"type":"function","name":"f"}]},{"type":"custom","name":"exec"}`,
			"response.function_call_arguments", `{"arguments":"{\"a\":\"<&>\"}","call_id":"call_script000","id":"fc_script000","name":"f","namespace":"mcp__cal","status":"completed","type":"function_call"}`},
		{"by program", `{"type":"namespace","name":"functions","tools":[{"type":"custom","name":"exec"}]}`,
			"response.custom_tool_call_input", `{"call_id":"call_script000","id":"ctc_script000","input":"const result = await tools.mcp__cal__f({\"a\":\"<&>\"});\ntext(result);\n","name":"exec","status":"completed","type":"custom_tool_call"}`},
	} {
		_, text := post(t, started(t, OpenAI(Steps(steps...)))+"/v1/responses", responses(true, c.tools, openaiUser))
		names, data := stream(t, text)
		want := "response.created response.in_progress response.output_item.added response.content_part.added response.output_text.delta response.output_text.done " +
			"response.content_part.done response.output_item.done response.output_item.added " + c.events + ".delta " + c.events + ".done response.output_item.done response.completed"
		if got := strings.Join(names, " "); got != want {
			t.Fatalf("%s: events %s, want %s", c.name, got, want)
		}
		var call bytes.Buffer
		enc := json.NewEncoder(&call)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(data[11]["item"]); err != nil || strings.TrimSpace(call.String()) != c.call {
			t.Errorf("%s: call %s, want %s", c.name, call.String(), c.call)
		}
		usage := data[12]["response"].(map[string]any)["usage"].(map[string]any)
		if usage["total_tokens"].(float64) != usage["input_tokens"].(float64)+usage["output_tokens"].(float64) {
			t.Errorf("%s: usage %v", c.name, usage)
		}
	}
}

// TestSideRequests must leave the script where it is.
func TestSideRequests(t *testing.T) {
	const schema = `{"type":"json_schema","schema":{"type":"object","properties":{"title":{"type":"string","maxLength":5},"n":{"type":"integer"},"k":{"enum":["e"]},"l":{"type":"array"},"b":{"type":"boolean"}}}}`
	never := func(Turn) Step { t.Error("the model was asked"); return Step{} }
	for _, c := range []struct {
		name, method, path, body string
		server                   *Server
		status                   int
		want                     string
	}{
		{"title", "POST", "/v1/messages", `{"messages":[` + anthropicUser + `],"output_config":{"format":` + schema + `}}`, Anthropic(never), 200, `{\"b\":false,\"k\":\"e\",\"l\":[],\"n\":0,\"title\":\"Scrip\"}`},
		{"title", "POST", "/v1/responses", `{"input":"go","text":{"format":` + schema + `}}`, OpenAI(never), 200, `\"title\":\"Scrip\"`},
		{"probe", "POST", "/v1/messages", `{"max_tokens":1,"messages":[` + anthropicUser + `]}`, Anthropic(never), 200, `"end_turn"`},
		{"token count", "POST", "/v1/messages/count_tokens", `{}`, Anthropic(never), 200, `"input_tokens":1`},
		{"models", "GET", "/v1/models", ``, Anthropic(never), 200, `"data":[]`},
		{"models", "GET", "/v1/models?x=1", ``, OpenAI(never), 200, `"data":[]`},
		{"another path", "POST", "/v1/files", ``, OpenAI(never), 404, `POST /v1/files is not served`},
		{"another path", "GET", "/v1/messages", ``, Anthropic(never), 404, `not_found_error`},
		{"no JSON", "POST", "/v1/messages", `{`, Anthropic(never), 400, `invalid_request_error`},
		{"no JSON", "POST", "/v1/responses", `[]`, OpenAI(never), 400, `invalid_request_error`},
	} {
		url := started(t, c.server)
		req, err := http.NewRequest(c.method, url+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		raw, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || !strings.Contains(string(raw), c.want) {
			t.Errorf("%s %s: %d %s, want %d with %s", c.name, c.path, resp.StatusCode, raw, c.status, c.want)
		}
		if kept := c.server.Requests(); len(kept) != 1 || !kept[0].Side || kept[0].Path != c.path {
			t.Errorf("%s: kept %+v", c.name, kept)
		}
	}
}

func TestErrorsAndEnd(t *testing.T) {
	server := Anthropic(Steps(Step{Status: 529, Text: "Overloaded"}))
	status, got := post(t, started(t, server)+"/v1/messages", messages(true, anthropicUser))
	if status != 529 || !strings.Contains(got, `"overloaded_error"`) || !strings.Contains(got, "Overloaded") {
		t.Errorf("%d %s", status, got)
	}
	server = Anthropic(Steps(Step{Tool: "f", Args: func() {}}))
	if status, got = post(t, started(t, server)+"/v1/messages", messages(true, anthropicUser)); status != 500 || !strings.Contains(got, "arguments of f") {
		t.Errorf("arguments that are no JSON: %d %s", status, got)
	}
	server = Anthropic(Steps())
	if _, got = post(t, started(t, server)+"/v1/messages", messages(false, anthropicUser)); !strings.Contains(got, "The script has 0 steps and is at its end.") {
		t.Errorf("after the end: %s", got)
	}
}

// TestHold: a held answer has a head, no end, and ends with the server.
func TestHold(t *testing.T) {
	server := Anthropic(Steps(Step{Text: "never", Hold: true}))
	url, stop, err := server.Start()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(url+"/v1/messages", "application/json", strings.NewReader(messages(true, anthropicUser)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	head, err := bufio.NewReader(resp.Body).ReadString('\n')
	if err != nil || head != "event: message_start\n" {
		t.Errorf("head %q, %v", head, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := server.Wait(ctx, func(r []Request) bool { return len(r) == 1 }); err != nil {
		t.Error(err)
	}
	stop()
	rest, _ := io.ReadAll(resp.Body)
	if strings.Contains(string(rest), "never") || strings.Contains(string(rest), "message_stop") {
		t.Errorf("a held answer went on: %s", rest)
	}
	cancel()
	if err := server.Wait(ctx, func([]Request) bool { return false }); err == nil {
		t.Error("waiting ended without an error")
	}
}
