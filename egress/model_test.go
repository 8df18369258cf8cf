package egress

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

const realKey = "sk-real-0123456789abcdef"

// modelFront serves the route to base for testPeer.
func (w *world) modelFront(m nucleus.Model) string {
	w.t.Helper()
	route, err := w.g.NewRoute(m)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(route.Close)
	return w.front(func(ctx context.Context, c net.Conn) { w.g.ServeModel(ctx, c, testPeer, route) })
}

const (
	anthropicStream = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"claude-x\",\"usage\":{\"input_tokens\":10,\"cache_creation_input_tokens\":3,\"cache_read_input_tokens\":70,\"output_tokens\":1}}}\n\n" +
		"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\"say \\\"usage\\\": {\\\"input_tokens\\\": 999}\"}}\n\n" +
		"event: message_delta\r\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":25}}\r\n\r\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
	anthropicJSON   = `{"type":"message","model":"claude-x","content":[],"usage":{"input_tokens":12,"output_tokens":34}}`
	responsesStream = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"model\":\"gpt-x\",\"usage\":null}}\n\n" +
		"event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"model\":\"gpt-x\",\"usage\":{\"input_tokens\":100,\"input_tokens_details\":{\"cached_tokens\":60},\"output_tokens\":7}}}\n\n"
	chatStream = "data: {\"model\":\"gpt-y\",\"choices\":[{}],\"usage\":null}\n\ndata: {\"model\":\"gpt-y\",\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":9}}\n\ndata: [DONE]\n\n"
	chatJSON   = `{"model":"gpt-y","usage":{"prompt_tokens":8,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":0}}}`
)

// provider answers with the canned answer that the query's name says, and
// keeps the last request.
type provider struct {
	got  chan *http.Request
	body chan string
}

func newProvider(t *testing.T, answer string) (*provider, func(http.ResponseWriter, *http.Request)) {
	p := &provider{got: make(chan *http.Request, 16), body: make(chan string, 16)}
	return p, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		p.got <- r
		p.body <- string(body)
		w.Header().Set("Set-Cookie", "session=1")
		w.Header().Set("Anthropic-Organization-Id", "org-1")
		w.Header().Set("Request-Id", "req-1")
		w.Header().Set("Content-Type", "application/json")
		if strings.HasPrefix(answer, "event:") || strings.HasPrefix(answer, "data:") {
			w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		}
		io.WriteString(w, answer)
	}
}

func post(path, body string, headers ...string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: 127.0.0.1:7002\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s",
		path, len(body), strings.Join(append(headers, ""), "\r\n"), body)
}

// The credential is exchanged, fields are filtered, tokens are counted, and the
// call is recorded before and after.
func TestModelCall(t *testing.T) {
	for name, c := range map[string]struct {
		protocol, base, path, upstream string
		bearer                         bool
		answer, model                  string
		tokens                         Tokens
	}{
		"anthropic":       {"anthropic", "", "/v1/messages?beta=true", "/v1/messages?beta=true", false, anthropicStream, "claude-x", Tokens{Input: 10, CacheRead: 70, CacheWrite: 3, Output: 25}},
		"anthropic OAuth": {"anthropic", "", "/v1/messages", "/v1/messages", true, anthropicJSON, "claude-x", Tokens{Input: 12, Output: 34}},
		"anthropic below": {"anthropic", "/gateway/", "/v1/messages/count_tokens", "/gateway/v1/messages/count_tokens", false, `{"input_tokens":5}`, "", Tokens{}},
		"responses":       {"openai", "/v1", "/v1/responses", "/v1/responses", false, responsesStream, "gpt-x", Tokens{Input: 40, CacheRead: 60, Output: 7}},
		"responses below": {"openai", "/api/v1/", "/responses", "/api/v1/responses", false, responsesStream, "gpt-x", Tokens{Input: 40, CacheRead: 60, Output: 7}},
		"responses again": {"openai", "/api/v1/", "/api/v1/responses", "/api/v1/responses", false, responsesStream, "gpt-x", Tokens{Input: 40, CacheRead: 60, Output: 7}},
		"chat":            {"openai", "/v1", "/v1/chat/completions", "/v1/chat/completions", false, chatStream, "gpt-y", Tokens{Input: 8, Output: 9}},
		"chat JSON":       {"openai", "/v1", "/chat/completions", "/v1/chat/completions", false, chatJSON, "gpt-y", Tokens{Input: 8, Output: 9}},
		"broken":          {"openai", "/v1", "/chat/completions", "/v1/chat/completions", false, `{"usage":{"prompt_tokens":"x"`, "", Tokens{Input: 15, Output: 7}},
		"negative":        {"openai", "/v1", "/chat/completions", "/v1/chat/completions", false, `{"usage":{"prompt_tokens":-5,"completion_tokens":-1}}`, "", Tokens{Input: 15, Output: 13}},
	} {
		t.Run(name, func(t *testing.T) {
			p, handler := newProvider(t, c.answer)
			w := newWorld(t, nil)
			w.links["93.184.216.34:443"] = site(t, handler, "api.example")
			w.zone["api.example"] = []string{"93.184.216.34"}
			address := w.modelFront(nucleus.Model{Protocol: c.protocol, BaseURL: "https://api.example" + c.base, Key: realKey, Bearer: c.bearer})
			resp, body := ask(t, address, post(c.path, `{"stream":true}`,
				"Authorization: Bearer placeholder", "X-Api-Key: placeholder", "Cookie: a=b", "Proxy-Authorization: x", "OpenAI-Organization: o", "X-Forwarded-For: 1",
				"Anthropic-Version: 2023-06-01", "Anthropic-Beta: b1", "Accept-Encoding: gzip", "User-Agent: agent/1", "Connection: x-y", "X-Y: 1"))
			if resp.StatusCode != 200 || body != c.answer {
				t.Fatalf("%d %q\nwant %q", resp.StatusCode, body, c.answer)
			}
			if resp.Header.Get("Request-Id") != "req-1" || resp.Header.Get("Set-Cookie") != "" || resp.Header.Get("Anthropic-Organization-Id") != "" {
				t.Errorf("response header %v", resp.Header)
			}
			got := <-p.got
			if got.RequestURI != c.upstream || got.Host != "api.example" || <-p.body != `{"stream":true}` {
				t.Errorf("upstream %s %s", got.Host, got.RequestURI)
			}
			want := http.Header{
				"Anthropic-Version": {"2023-06-01"}, "Anthropic-Beta": {"b1"}, "User-Agent": {"agent/1"}, "Content-Type": {"application/json"},
				"Accept-Encoding": {"identity"}, "Content-Length": {"15"},
			}
			if c.protocol == "anthropic" && !c.bearer {
				want["X-Api-Key"] = []string{realKey}
			} else {
				want["Authorization"] = []string{"Bearer " + realKey}
			}
			if fmt.Sprint(got.Header) != fmt.Sprint(want) {
				t.Errorf("upstream header\n got %v\nwant %v", got.Header, want)
			}
			if got.ProtoMajor != 2 {
				t.Errorf("upstream speaks %s", got.Proto)
			}
			w.until("model done=true")
			if lines := w.lines(); !strings.HasPrefix(lines[0], "model done=false") || !strings.HasPrefix(lines[1], "resolve") {
				t.Errorf("journal %q", lines)
			}
			call := w.calls[1]
			if call.Estimated { // the time that it took may count
				c.tokens.Output = max(c.tokens.Output, int64(call.Took.Seconds()*outputPerSecond))
			}
			if estimated := name == "broken" || name == "negative"; call.Estimated != estimated {
				t.Errorf("estimated: %v, want %v", call.Estimated, estimated)
			}
			if call.Status != 200 || call.Tokens != c.tokens || call.Model != c.model || call.Sent != 15 || call.Received != int64(len(c.answer)) || call.Error != "" {
				t.Errorf("outcome %+v, want tokens %+v", call, c.tokens)
			}
			if call.ID == "" || call.ID != w.calls[0].ID || call.Pod != "p-1" || call.Host != "api.example" {
				t.Errorf("outcome %+v of intent %+v", call, w.calls[0])
			}
		})
	}
}

// Inference passes and nothing else; a refusal has the provider's shape.
func TestModelPaths(t *testing.T) {
	answered := make(chan string, 100)
	server := site(t, func(w http.ResponseWriter, r *http.Request) { answered <- r.RequestURI; io.WriteString(w, "{}") })
	for protocol, requests := range map[string]map[string]int{
		"anthropic": {
			"POST /v1/messages": 200, "POST /v1/messages/count_tokens": 200, "GET /v1/models": 200, "GET /v1/models?limit=5&after_id=x": 200,
			"GET /v1/messages": 403, "POST /v1/models": 403, "DELETE /v1/models": 403, "HEAD /v1/models": 403, "POST /v1/messages/": 403, "POST //v1/messages": 403,
			"POST /v1/messages/batches": 403, "POST /v1/files": 403, "GET /v1/organizations/me": 403, "POST /api/oauth/token": 403, "GET /": 403, "POST /V1/messages": 403,
			"POST /v1/./messages": 403, "POST /v1/files/../messages": 403, "POST /v1/messages/..%2ffiles": 403, "POST /v1%2fmessages": 403, "POST /v1/messages%00": 403,
			"POST /v1/messages?api_key=x": 403, "POST /v1/messages?beta=true;x=y": 403, "POST /v1/messages?beta=" + strings.Repeat("x", 2000): 403,
			"POST http://evil.example/v1/messages": 403, "CONNECT api.example:443": 403, "OPTIONS *": 403, "POST /responses": 403,
		},
		"openai": {
			"POST /v1/responses": 200, "POST /responses": 200, "POST /v1/chat/completions": 200, "GET /v1/models?client_version=1": 200,
			"POST /v1/messages": 403, "POST /v1/files": 403, "POST /v1/embeddings": 403, "GET /v1/responses": 403, "GET /v1/responses/resp_1": 403, "DELETE /v1/models/m": 403,
			"POST /v1/v1/responses": 403, "POST /v1": 403, "POST /v1/realtime/sessions": 403, "POST /v1/fine_tuning/jobs": 403,
		},
	} {
		w := newWorld(t, nil)
		address := w.modelFront(nucleus.Model{Protocol: protocol, BaseURL: "http://" + server + "/v1", Key: realKey})
		if protocol == "anthropic" {
			address = w.modelFront(nucleus.Model{Protocol: protocol, BaseURL: "http://" + server, Key: realKey})
		}
		for request, want := range requests {
			method, _, _ := strings.Cut(request, " ")
			resp, body := askAs(t, address, method, request+" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
			if resp.StatusCode != want {
				t.Errorf("%s %s: %d %s, want %d", protocol, request, resp.StatusCode, body, want)
			}
			if want == 200 {
				<-answered
				continue
			}
			var shape struct {
				Type  string
				Error struct{ Type, Message string }
			}
			if json.Unmarshal([]byte(body), &shape); method != "HEAD" && (!strings.HasPrefix(shape.Error.Message, "CAL: ") || shape.Error.Type == "" || (shape.Type == "error") != (protocol == "anthropic")) {
				t.Errorf("%s %s: %s", protocol, request, body)
			}
		}
		if len(answered) != 0 {
			t.Errorf("%s: %d refused requests reached the provider, %s", protocol, len(answered), <-answered)
		}
		if !w.has("refused model " + ruleModel) {
			t.Error("refusals are not recorded")
		}
	}
}

func askAs(t *testing.T, address, method, raw string) (*http.Response, string) {
	t.Helper()
	conn := client(t, address)
	io.WriteString(conn, raw)
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%.200q: %v", raw, err)
	}
	body, _ := io.ReadAll(resp.Body)
	return resp, string(body)
}

// A call that cannot be recorded is not made.
func TestModelNotRecorded(t *testing.T) {
	server := site(t, func(http.ResponseWriter, *http.Request) { t.Error("the provider was asked") })
	w := newWorld(t, nil)
	w.modelErr = errTest
	address := w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + server, Key: realKey})
	resp, body := ask(t, address, post("/v1/messages", "{}"))
	if resp.StatusCode != 503 || strings.Contains(body, errTest.Error()) {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// Each event reaches the guest when the provider sends it.
func TestModelStreams(t *testing.T) {
	next := make(chan string)
	server := site(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for event := range next {
			io.WriteString(w, event)
			http.NewResponseController(w).Flush()
		}
	})
	w := newWorld(t, nil)
	conn := client(t, w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + server, Key: realKey}))
	io.WriteString(conn, post("/v1/messages", "{}"))
	next <- "data: 1\n\n"
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(resp.Body)
	for i, event := range []string{"", "data: 2\n\n", "data: sk-real-0\n\n", "data: sk-real-01234\n"} {
		if event != "" {
			next <- event
		}
		if line, err := lines.ReadString('\n'); err != nil || event != "" && !strings.HasPrefix(event, line) {
			t.Fatalf("event %d: %q, %v", i, line, err)
		}
		if strings.HasSuffix(event, "\n\n") || event == "" {
			lines.ReadString('\n')
		}
	}
	close(next)
	if rest, err := io.ReadAll(lines); err != nil || len(rest) != 0 {
		t.Errorf("end: %q, %v", rest, err)
	}
}

// Whatever the provider does, the guest never gets the key, nor does any record.
func TestModelKeyStaysHere(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	behaviour := map[string]http.HandlerFunc{
		"echoes all headers in an error": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(401)
			fmt.Fprintf(w, "bad key in %v", r.Header)
		},
		"echoes it in a success":      func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header) },
		"echoes it in allowed fields": func(w http.ResponseWriter, r *http.Request) { w.Header().Set("X-Request-Id", "for "+realKey) },
		"echoes it in a cookie":       func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Set-Cookie", realKey) },
		"redirects with it": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/v1/messages?"+realKey, http.StatusTemporaryRedirect)
		},
		"echoes it in the redirect":     func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(302); fmt.Fprint(w, realKey) },
		"echoes it at the very end":     func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "x"+realKey) },
		"echoes it twice, interlocked":  func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, realKey[:9], realKey, realKey) },
		"echoes it in the model's name": func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, `{"model":%q,"usage":{}}`, realKey) },
		"echoes it compressed": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			fmt.Fprint(w, realKey)
		},
		"echoes it a byte at a time": func(w http.ResponseWriter, r *http.Request) {
			for i := range realKey {
				fmt.Fprint(w, realKey[i:i+1])
				http.NewResponseController(w).Flush()
			}
		},
		"hangs up in the middle": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, realKey)
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		},
		"hangs up at once": func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) },
	}
	for name, handler := range behaviour {
		for _, bearer := range []bool{false, true} {
			w := newWorld(t, nil)
			address := w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + site(t, handler), Key: realKey, Bearer: bearer})
			conn := client(t, address)
			io.WriteString(conn, post("/v1/messages", "{}", "Connection: close"))
			raw, err := io.ReadAll(conn)
			w.until("model done=true")
			if err != nil || bytes.Contains(raw, []byte(realKey)) || len(raw) == 0 {
				t.Errorf("%s: the guest got %q, %v", name, raw, err)
			}
			if strings.Contains(name, "redirect") && !bytes.HasPrefix(raw, []byte("HTTP/1.1 502")) {
				t.Errorf("%s: %q", name, raw)
			}
			if strings.Contains(name, "middle") && bytes.HasSuffix(raw, []byte("0\r\n\r\n")) {
				t.Errorf("%s: half an answer looks whole: %q", name, raw)
			}
			recorded := fmt.Sprintf("%+v %q", w.calls, w.lines())
			if strings.Contains(recorded, realKey) {
				t.Errorf("%s: recorded %s", name, recorded)
			}
		}
	}

	// The control: another key passes, so the search above can find one.
	w := newWorld(t, nil)
	address := w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + site(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, realKey) }), Key: "sk-other-0123456789"})
	if _, body := ask(t, address, post("/v1/messages", "{}")); body != realKey {
		t.Errorf("control: %q", body)
	}
	route, err := w.g.NewRoute(nucleus.Model{Protocol: "openai", BaseURL: "https://api.example/v1", Key: realKey})
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{fmt.Sprint(route), fmt.Sprintf("%+v", route), fmt.Sprintf("%#v", route), route.String()} {
		if strings.Contains(shown, realKey) {
			t.Errorf("formatted: %s", shown)
		}
	}
}

func TestRedactor(t *testing.T) {
	key := "abcabcabd1"
	for _, text := range []string{key, "x" + key + "y", key + key, key[:5] + key, "abcabcabcabd1", key[:9], "", "zzz", key[:9] + "X" + key, strings.Repeat("abc", 20)} {
		want := strings.ReplaceAll(text, key, redacted)
		for size := 1; size <= len(text)+1; size++ {
			var out bytes.Buffer
			r := &redactor{to: &out, key: []byte(key)}
			for piece := range slices.Chunk([]byte(text), size) {
				if n, err := r.Write(piece); n != len(piece) || err != nil {
					t.Fatal(n, err)
				}
			}
			if r.finish(); out.String() != want {
				t.Errorf("%q in pieces of %d: %q, want %q", text, size, out.String(), want)
			}
		}
	}
}

func TestNewRoute(t *testing.T) {
	w := newWorld(t, nil)
	for base, want := range map[string]string{
		"https://api.anthropic.com":      "",
		"https://api.openai.com/v1/":     "",
		"http://127.0.0.1:11434/v1":      "",
		"http://localhost:11434/v1":      "",
		"http://[::1]:11434/v1":          "",
		"https://10.0.0.5/v1":            "",
		"http://api.anthropic.com":       "not a loopback address",
		"http://10.0.0.5/v1":             "not a loopback address",
		"http://localhost.evil.example/": "not a loopback address",
		"https://user:hunter2@host.com/": "user name",
		"https://api.example/v1?key=x":   "query",
		"https://api.example/v1/../x":    "segment",
		"ftp://api.example/":             "neither http nor https",
		"api.anthropic.com":              "neither http nor https",
		"":                               "neither http nor https",
		"https://2130706433/":            "usual form",
	} {
		_, err := w.g.NewRoute(nucleus.Model{Protocol: "openai", BaseURL: base, Key: realKey})
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("NewRoute(%q): %v, want %q", base, err, want)
		}
	}
	for _, m := range []nucleus.Model{{Protocol: "gopher", BaseURL: "https://a.example"}, {Protocol: "openai", BaseURL: "https://a.example", Key: "a\r\nb: c-" + realKey}} {
		if _, err := w.g.NewRoute(m); err == nil || strings.Contains(err.Error(), realKey) {
			t.Errorf("NewRoute(%q): %v", m.Protocol, err)
		}
	}
}

// The name of an endpoint opens no forbidden address, and its certificate is checked.
func TestModelEndpoint(t *testing.T) {
	server := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") }, "api.example", "127.0.0.1")
	for name, c := range map[string]struct {
		host, addr, roots string
		want              int
	}{
		"control":            {"api.example", "93.184.216.34", "", 200},
		"private":            {"api.example", "10.0.0.1", "", 403},
		"loopback":           {"api.example", "127.0.0.1", "", 403},
		"metadata":           {"api.example", "169.254.169.254", "", 403},
		"wrong certificate":  {"other.example", "93.184.216.34", "", 502},
		"does not resolve":   {"api.example", "", "", 502},
		"address of its own": {"127.0.0.1", "", "", 200},
	} {
		w := newWorld(t, nil)
		port := "443"
		if c.addr != "" {
			w.zone[c.host] = []string{c.addr}
			w.links[c.addr+":443"] = server
		} else if c.host == "127.0.0.1" {
			_, port, _ = net.SplitHostPort(server)
		}
		address := w.modelFront(nucleus.Model{Protocol: "openai", BaseURL: "https://" + c.host + ":" + port + "/v1", Key: realKey})
		resp, body := ask(t, address, post("/v1/responses", "{}"))
		if resp.StatusCode != c.want {
			t.Errorf("%s: %d %s, want %d", name, resp.StatusCode, body, c.want)
		}
		if c.want == 403 && w.has("dial") {
			t.Errorf("%s: %q", name, w.lines())
		}
		w.until(fmt.Sprintf("model done=true status=%d", c.want))
	}
}

// A request that is too large, or stops in the middle, ends; so does a guest
// that hangs up.
func TestModelBounds(t *testing.T) {
	began, gone := make(chan struct{}, 10), make(chan struct{}, 10)
	server := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- struct{}{}
		if _, err := io.ReadAll(r.Body); err == nil {
			<-r.Context().Done()
		}
		gone <- struct{}{}
	})
	w := newWorld(t, func(c *Config) {
		c.Limits.ModelBody = 1000
		c.Limits.Idle = 300 * time.Millisecond
		c.Limits.Handshake = 200 * time.Millisecond
	})
	address := w.modelFront(nucleus.Model{Protocol: "anthropic", BaseURL: "http://" + server, Key: realKey})
	if resp, body := ask(t, address, post("/v1/messages", strings.Repeat("x", 2000))); resp.StatusCode != 413 || !strings.Contains(body, "request_too_large") {
		t.Errorf("too large: %d %s", resp.StatusCode, body)
	}
	if resp, body := ask(t, address, "POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"); resp.StatusCode < 500 {
		t.Errorf("half a body: %d %s", resp.StatusCode, body)
	}
	if resp, body := ask(t, address, post("/v1/messages", "{}")); resp.StatusCode < 500 {
		t.Errorf("a silent provider: %d %s", resp.StatusCode, body)
	}
	<-began
	conn := client(t, address)
	io.WriteString(conn, post("/v1/messages", "{}"))
	<-began
	conn.Close()
	for range 2 { // it was never asked for what is too large or half
		select {
		case <-gone:
		case <-time.After(wait):
			t.Fatal("the provider still waits")
		}
	}
}
