package egress

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"
)

// What a call used is the provider's count where it gives one to the end, and else an
// estimate that lies above it: hanging up early hides nothing.
func TestWhatACallUsed(t *testing.T) {
	const start = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"claude-x\",\"usage\":{\"input_tokens\":40,\"output_tokens\":1}}}\n\n"
	body := `{"model":"claude-x","stream":true,"messages":"` + strings.Repeat("x", 1000) + `"}`
	text := "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\"" + strings.Repeat("word ", 80) + "\"}}\n\n"
	end := "event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":500}}\n\n"
	for name, c := range map[string]struct {
		path, protocol, request string
		answer                  string // what the provider sends at once
		status                  int
		hang                    bool // it does not end
		leave                   bool // the guest hangs up then
		want                    Tokens
		estimated               bool
	}{
		"a whole answer":             {"/v1/messages", "anthropic", body, start + text + end, 200, false, false, Tokens{Input: 40, Output: 500}, false},
		"cut before the count":       {"/v1/messages", "anthropic", body, start + text, 200, true, true, Tokens{Input: 40, Output: int64(len(start+text)) / 4}, true},
		"cut before the first byte":  {"/v1/messages", "anthropic", body, "", 200, true, true, Tokens{Input: int64(len(body))}, true},
		"cut behind the count":       {"/v1/messages", "anthropic", body, start + text + end, 200, true, true, Tokens{Input: 40, Output: 500}, false},
		"a stream that counts not":   {"/v1/chat/completions", "openai", body, "data: {\"model\":\"gpt-y\",\"choices\":[{}]}\n\ndata: [DONE]\n\n", 200, false, false, Tokens{Input: int64(len(body)), Output: 13}, true},
		"an answer that counts half": {"/v1/messages", "anthropic", body, `{"model":"claude-x","usage":{"output_tokens":9}}`, 200, false, false, Tokens{Input: int64(len(body)), Output: 9}, true},
		"a refusal":                  {"/v1/messages", "anthropic", body, `{"type":"error"}`, 429, false, false, Tokens{}, false},
		"an error of the provider":   {"/v1/messages", "anthropic", body, `{"type":"error"}`, 529, false, false, Tokens{}, false},
		"a count of tokens":          {"/v1/messages/count_tokens", "anthropic", body, `{"input_tokens":700}`, 200, false, false, Tokens{}, false},
		"an absurd count":            {"/v1/messages", "anthropic", body, `{"model":"claude-x","usage":{"input_tokens":9000000000000000000,"output_tokens":9000000000000000000}}`, 200, false, false, Tokens{Input: MaxTokens, Output: MaxTokens}, false},
		"a count below nothing":      {"/v1/messages", "anthropic", body, `{"model":"claude-x","usage":{"input_tokens":-9,"output_tokens":-9}}`, 200, false, false, Tokens{Input: int64(len(body)), Output: 16}, true},
		"more cached than there was": {"/v1/chat/completions", "openai", body, `{"usage":{"prompt_tokens":5,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":99}}}`, 200, false, false, Tokens{CacheRead: 99, Output: 9}, false},
		"it goes on from before":     {"/v1/responses", "openai", `{"model":"m","stream":true,"previous_response_id":"resp_1"}`, "", 200, true, true, Tokens{Input: maxContext}, true},
		"two readings":               {"/v1/responses", "openai", `{"model":"a","model":"b","stream":true}`, "", 200, true, true, Tokens{Input: maxContext, Output: maxAnswer}, true},
		"no stream, and cut":         {"/v1/messages", "anthropic", `{"model":"a","max_tokens":9000}`, "", 200, true, true, Tokens{Input: 31, Output: 9000}, true},
		"of no length, and cut":      {"/v1/chat/completions", "openai", `{"model":"a"}`, "", 200, true, true, Tokens{Input: 13, Output: maxAnswer}, true},
		"many at once, and cut":      {"/v1/chat/completions", "openai", `{"model":"a","n":100,"max_tokens":10}`, "", 200, true, true, Tokens{Input: 37, Output: 1000}, true},
		"in the background":          {"/v1/responses", "openai", `{"model":"a","background":true}`, `{"model":"a","status":"queued","usage":null}`, 200, false, false, Tokens{Input: 31, Output: maxAnswer}, true},
		"it is done so":              {"/v1/responses", "openai", `{"model":"a"}`, `{"model":"a","status":"queued","background":true,"usage":null}`, 200, false, false, Tokens{Input: 13, Output: maxAnswer}, true},
	} {
		t.Run(name, func(t *testing.T) {
			began, over := make(chan bool, 1), make(chan bool)
			server := site(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if c.answer != "" {
					if !strings.HasPrefix(c.answer, "{") {
						w.Header().Set("Content-Type", "text/event-stream")
					}
					w.WriteHeader(c.status)
					io.WriteString(w, c.answer)
					http.NewResponseController(w).Flush()
				}
				began <- true
				if c.hang {
					select {
					case <-r.Context().Done():
					case <-over:
					}
				}
			})
			defer close(over)
			w := newWorld(t, nil)
			conn := client(t, w.modelFront(nucleus.Model{Protocol: c.protocol, BaseURL: "http://" + server + map[string]string{"openai": "/v1"}[c.protocol], Key: realKey}))
			io.WriteString(conn, post(c.path, c.request, "Connection: close"))
			<-began
			if c.leave {
				if c.answer != "" { // all of it has arrived
					got := make([]byte, 0, 4096)
					for !strings.Contains(string(got), c.answer[len(c.answer)-20:]) {
						piece := make([]byte, 4096)
						n, err := conn.Read(piece)
						if got = append(got, piece[:n]...); err != nil {
							t.Fatalf("%q, %v", got, err)
						}
					}
				}
				conn.Close()
			} else {
				io.ReadAll(conn)
			}
			w.until("model done=true")
			call := w.calls[1]
			if call.Estimated { // the time that it took may count for more
				c.want.Output = max(c.want.Output, int64(call.Took.Seconds()*outputPerSecond))
			}
			if call.Tokens != c.want || call.Estimated != c.estimated {
				t.Errorf("used %+v, estimated %v; want %+v, %v\n%+v", call.Tokens, call.Estimated, c.want, c.estimated, call)
			}
			if intent := w.calls[0]; intent.Free != (c.path == "/v1/messages/count_tokens") || !intent.Free && intent.Expected().Input < c.want.Input && c.estimated {
				t.Errorf("expected %+v of %+v", intent.Expected(), intent)
			}
		})
	}
}

// Nothing that was thought about for long is cheap.
func TestTimeCounts(t *testing.T) {
	u := usageCounter{}
	if !u.estimate(ModelCall{Sent: 100, Received: 0, Took: 30 * time.Second, stream: true}, true) || u.tokens != (Tokens{Input: 100, Output: 6000}) {
		t.Errorf("%+v", u.tokens)
	}
}

func TestUsageDetails(t *testing.T) {
	for _, c := range []struct {
		answer, model, service string
		want                   Tokens
	}{
		{`{"model":"c","usage":{"input_tokens":1,"output_tokens":2,"cache_creation_input_tokens":30,"cache_creation":{"ephemeral_5m_input_tokens":10,"ephemeral_1h_input_tokens":20},"service_tier":"standard"}}`, "c", "standard", Tokens{Input: 1, Output: 2, CacheWrite: 30, CacheHour: 20}},
		{`{"model":"c","usage":{"input_tokens":1,"output_tokens":2,"service_tier":"standard","speed":"fast"}}`, "c", "standard+fast", Tokens{Input: 1, Output: 2}},
		{`{"model":"c","usage":{"input_tokens":1,"output_tokens":2,"service_tier":"standard","inference_geo":"us"}}`, "c", "standard+us", Tokens{Input: 1, Output: 2}},
		{`{"model":"c","usage":{"input_tokens":1,"output_tokens":2,"service_tier":"standard","inference_geo":"not_available"}}`, "c", "standard", Tokens{Input: 1, Output: 2}},
		// The whole leaves out the round that shortened the conversation.
		{`{"model":"c","usage":{"input_tokens":23,"output_tokens":10,"iterations":[{"type":"compaction","input_tokens":180,"output_tokens":35},{"type":"message","input_tokens":23,"output_tokens":10}]}}`, "c", "", Tokens{Input: 203, Output: 45}},
		{`{"model":"c","usage":{"input_tokens":23,"output_tokens":10,"iterations":[{"type":"message","input_tokens":23,"output_tokens":10},{"type":"advisor_message","model":"d","input_tokens":50,"output_tokens":7,"cache_read_input_tokens":4}]}}`, "c+d", "", Tokens{Input: 73, Output: 17, CacheRead: 4}},
		{`{"model":"g","service_tier":"priority","usage":{"input_tokens":10,"output_tokens":2,"input_tokens_details":{"cached_tokens":4,"cache_write_tokens":3}}}`, "g", "priority", Tokens{Input: 3, Output: 2, CacheRead: 4, CacheWrite: 3}},
	} {
		u := usageCounter{}
		io.WriteString(&u, c.answer)
		u.finish()
		if u.tokens != c.want || u.models() != c.model || u.service.String() != c.service || !u.final || !u.input {
			t.Errorf("%s:\n got %+v", c.answer, u)
		}
	}
}

// What goes in is more than the request's bytes where these stand for something else.
func TestWhatBytesDoNotTell(t *testing.T) {
	for name, c := range map[string]struct {
		body string
		more int64 // tokens beside the bytes; -1: no bound
	}{
		"text":                  {`{"messages":[{"role":"user","content":[{"type":"text","text":"image"},{"type":"tool_result","content":"document"}]}]}`, 0},
		"an image":              {`{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"url","url":"https://a.example/b"}}]}]}`, maxImage},
		"images in a result":    {`{"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"image","source":{"type":"base64","data":"AA"}},{"type":"image"}]}]}]}`, 2 * maxImage},
		"an image by address":   {`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://a.example/b"}}]}]}`, maxImage},
		"an image as input":     {`{"input":[{"role":"user","content":[{"type":"input_image","image_url":"https://a.example/b"}]}]}`, maxImage},
		"a document":            {`{"messages":[{"role":"user","content":[{"type":"document","source":{"type":"url","url":"https://a.example/b.pdf"}}]}]}`, -1},
		"a file":                {`{"input":[{"role":"user","content":[{"type":"input_file","file_url":"https://a.example/b.pdf"}]}]}`, -1},
		"what is kept":          {`{"input":[{"type":"item_reference","id":"msg_1"}]}`, -1},
		"what is kept, no more": {`{"input":[{"id":"msg_1"}]}`, -1},
		"thought that is kept":  {`{"input":[{"type":"reasoning","id":"rs_1","summary":[]}]}`, -1},
		"thought that is sent":  {`{"input":[{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":"xxx"}]}`, 0},
		"input as text":         {`{"input":"document"}`, 0},
	} {
		call := ModelCall{Sent: int64(len(c.body))}
		call.look([]byte(c.body), false)
		want := call.Sent + c.more
		if c.more < 0 {
			want = maxContext
		}
		if got := call.inputBound(); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}

// Who asks for a dearer service and hangs up before the provider says so pays for it.
func TestServiceOfACall(t *testing.T) {
	const fast = `{"model":"c","speed":"fast","inference_geo":"us","service_tier":"auto"}`
	for name, c := range map[string]struct {
		request, answer, want string
		cut                   bool
	}{
		"as it is named":         {`{"model":"c"}`, `{"usage":{"service_tier":"standard","speed":"standard","inference_geo":"global"}}`, "standard", false},
		"cut off at the start":   {fast, `{"usage":{"service_tier":"standard"}}`, "standard+fast+us", true},
		"never named":            {fast, `{"usage":{"service_tier":"standard"}}`, "standard+fast+us", false},
		"asked for, not given":   {fast, `{"usage":{"service_tier":"standard","speed":"standard","inference_geo":"global"}}`, "standard", false},
		"a tier, cut off":        {`{"model":"c","service_tier":"priority"}`, `{"service_tier":"auto"}`, "priority", true},
		"a tier that is refused": {`{"model":"c","service_tier":"priority"}`, `{"service_tier":"default"}`, "default", false},
	} {
		var call ModelCall
		call.look([]byte(c.request), false)
		u := usageCounter{}
		io.WriteString(&u, c.answer)
		u.finish()
		if got := u.given(call.asked, c.cut).String(); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// A call that the budget does not admit is refused in the words of an account that is
// empty, and reaches nobody.
func TestSpentBudgetRefusesACall(t *testing.T) {
	for protocol, want := range map[string]struct {
		status int
		kind   string
	}{"anthropic": {402, "billing_error"}, "openai": {429, "insufficient_quota"}} {
		server := site(t, func(http.ResponseWriter, *http.Request) { t.Error("the provider was asked") })
		w := newWorld(t, nil)
		w.modelErr = &nucleus.Error{Kind: nucleus.KindDenied, Rule: "budget.usd", Message: "the budget is spent: 5.02 of 5.00 USD"}
		path := map[string]string{"anthropic": "/v1/messages", "openai": "/v1/responses"}[protocol]
		address := w.modelFront(nucleus.Model{Protocol: protocol, BaseURL: "http://" + server + map[string]string{"openai": "/v1"}[protocol], Key: realKey})
		resp, body := ask(t, address, post(path, "{}"))
		var shape struct {
			Error struct{ Type, Message string }
		}
		if err := json.Unmarshal([]byte(body), &shape); err != nil || resp.StatusCode != want.status || shape.Error.Type != want.kind ||
			shape.Error.Message != "CAL: the budget is spent: 5.02 of 5.00 USD" || resp.Header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s: %d %v %s", protocol, resp.StatusCode, resp.Header, body)
		}
	}
}

// So many calls of a pod are under way, and more wait for one of them to end.
func TestCallsUnderWayAreBounded(t *testing.T) {
	began, release := make(chan bool, 3*maxCalls), make(chan bool)
	var mu sync.Mutex
	var now, most int
	server := site(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		began <- true
		<-release
		mu.Lock()
		now--
		mu.Unlock()
		io.WriteString(w, anthropicJSON)
	})
	w := newWorld(t, nil)
	address := w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + server, Key: realKey})
	var done sync.WaitGroup
	const calls = 3 * maxCalls
	for range calls {
		done.Go(func() {
			conn := client(t, address)
			io.WriteString(conn, post("/v1/messages", "{}", "Connection: close"))
			if answer, _ := io.ReadAll(conn); !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
				t.Errorf("%q", answer)
			}
		})
	}
	for range maxCalls {
		<-began
	}
	for range calls {
		release <- true
	}
	done.Wait()
	if most != maxCalls {
		t.Errorf("%d calls were under way at once, want %d", most, maxCalls)
	}
}

// A call for which there is no place in time is refused, and may be tried again.
func TestCallWaitsInVain(t *testing.T) {
	began, release := make(chan bool, maxCalls), make(chan bool)
	server := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- true
		<-release
		io.WriteString(w, anthropicJSON)
	})
	defer close(release)
	w := newWorld(t, func(c *Config) { c.Limits.ModelWait = 50 * time.Millisecond })
	address := w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + server, Key: realKey})
	for range maxCalls {
		conn := client(t, address)
		io.WriteString(conn, post("/v1/messages", "{}", "Connection: close"))
		<-began
	}
	if resp, body := ask(t, address, post("/v1/messages", "{}")); resp.StatusCode != 503 || !strings.Contains(body, fmt.Sprint(maxCalls, " calls are under way")) {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}
