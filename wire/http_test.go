package wire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"
)

func TestErrorsCrossHTTP(t *testing.T) {
	seen := map[nucleus.Kind]bool{}
	for _, row := range statuses {
		seen[row.kind] = true
		want := nucleus.Error{Kind: row.kind, Operation: nucleus.GitPush, Rule: "trifecta", Message: "a <message> with \"quotes\"", Ask: "ask-1"}
		w := httptest.NewRecorder()
		WriteError(w, &want)
		resp := w.Result()
		if resp.StatusCode != row.status || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: status %d, %v", row.kind, resp.StatusCode, resp.Header)
		}
		if got := ReadError(resp); *got != want {
			t.Errorf("got %+v, want %+v", *got, want)
		}
	}
	for _, kind := range []nucleus.Kind{
		nucleus.KindInvalid, nucleus.KindUnauthenticated, nucleus.KindForbidden, nucleus.KindNotFound, nucleus.KindConflict, nucleus.KindTooLarge, nucleus.KindDenied,
		nucleus.KindApproval, nucleus.KindRefused, nucleus.KindUnavailable, nucleus.KindTimeout, nucleus.KindFailed, nucleus.KindInternal,
	} {
		if !seen[kind] {
			t.Errorf("kind %s has no status", kind)
		}
	}
	w := httptest.NewRecorder()
	WriteError(w, &nucleus.Error{Kind: "of tomorrow", Message: "m"})
	if got := ReadError(w.Result()); w.Code != 500 || got.Kind != "of tomorrow" {
		t.Errorf("an unknown kind: %d, %+v", w.Code, got)
	}
	// The exact form, which other programs read.
	w = httptest.NewRecorder()
	WriteError(w, &nucleus.Error{Kind: nucleus.KindApproval, Operation: nucleus.GitPush, Rule: "trifecta", Message: "needs an approval", Ask: "ask-1"})
	if want := `{"error":{"kind":"approval_required","operation":"git_push","rule":"trifecta","message":"needs an approval","ask":"ask-1"}}` + "\n"; w.Body.String() != want {
		t.Errorf("got %s, want %s", w.Body, want)
	}
}

func TestReadErrorFromSomethingElse(t *testing.T) {
	for _, c := range []struct {
		status int
		body   string
		want   nucleus.Error
	}{
		{502, "<html>Bad Gateway", nucleus.Error{Kind: nucleus.KindUnavailable, Message: `HTTP 502: "<html>Bad Gateway"`}},
		{404, "", nucleus.Error{Kind: nucleus.KindNotFound, Message: "HTTP 404"}},
		{403, `{"error":null}`, nucleus.Error{Kind: nucleus.KindForbidden, Message: `HTTP 403: "{\"error\":null}"`}},
		{403, `{"error":{}}`, nucleus.Error{Kind: nucleus.KindForbidden, Message: `HTTP 403: "{\"error\":{}}"`}},
		{418, "\xff\xfe", nucleus.Error{Kind: nucleus.KindInvalid, Message: "HTTP 418"}},
		{500, strings.Repeat("x", 2<<20), nucleus.Error{Kind: nucleus.KindInternal, Message: `HTTP 500: "` + strings.Repeat("x", 200) + `"`}},
		{200, `{"fine":1}`, nucleus.Error{Kind: nucleus.KindInternal, Message: `HTTP 200: "{\"fine\":1}"`}},
	} {
		got := ReadError(&http.Response{StatusCode: c.status, Body: io.NopCloser(strings.NewReader(c.body))})
		if *got != c.want {
			t.Errorf("%d %.40q: got %+v, want %+v", c.status, c.body, *got, c.want)
		}
	}
}

// oneAtATime is a listener for the streams that a session accepts.
type oneAtATime struct {
	session *Session
}

func (l oneAtATime) Accept() (net.Conn, error) { return l.session.Accept() }
func (l oneAtATime) Close() error              { return l.session.Close() }
func (l oneAtATime) Addr() net.Addr            { return addr{} }

// serve runs handler behind a unix socket and behind a session, and calls f with
// the way to each.
func serve(t *testing.T, handler http.Handler, f func(t *testing.T, dial DialFunc)) {
	run := func(t *testing.T, l net.Listener, dial DialFunc) {
		server := &http.Server{Handler: handler}
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		defer func() {
			server.Close()
			<-served
		}()
		f(t, dial)
	}
	t.Run("unix socket", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "node.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		run(t, l, func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		})
	})
	t.Run("wire", func(t *testing.T) {
		host, guest := sessions(t)
		run(t, oneAtATime{host}, func(ctx context.Context) (net.Conn, error) { return guest.Open(ctx, "api", nil) })
	})
}

func TestSignedHTTP(t *testing.T) {
	s := newSite()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, body, _, err := s.verifier.Verify(r, "nucleus")
		if err != nil {
			WriteError(w, nucleus.AsError(err))
			return
		}
		json.NewEncoder(w).Encode(map[string]any{"caller": caller.KeyID, "bytes": len(body)})
	})
	serve(t, handler, func(t *testing.T, dial DialFunc) {
		client := Client(dial)
		defer client.CloseIdleConnections()
		do := func(r *http.Request) (string, *nucleus.Error) {
			resp, err := client.Do(r.WithContext(timeout(t, patience)))
			if err != nil {
				return "", nucleus.AsError(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return "", ReadError(resp)
			}
			raw, _ := io.ReadAll(resp.Body)
			return strings.TrimSpace(string(raw)), nil
		}
		for _, size := range []int{0, 1000, MaxBody} {
			r := must(s.agent.NewSignedRequest("POST", target, "pod-1", make([]byte, size)))
			if got, err := do(r); err != nil || got != string(must(json.Marshal(map[string]any{"bytes": size, "caller": "agent-1"}))) {
				t.Errorf("%d bytes: %s, %v", size, got, err)
			}
		}
		r := must(s.agent.NewSignedRequest("POST", target, "pod-1", []byte("{}")))
		if _, err := do(r); err != nil {
			t.Error(err)
		}
		r.Body, _ = r.GetBody()
		if _, err := do(r); err == nil || err.Kind != nucleus.KindUnauthenticated || !strings.Contains(err.Message, "used before") {
			t.Errorf("a replay: %v", err)
		}
		r = must(s.agent.NewSignedRequest("POST", target, "pod-1", []byte("{}")))
		r.URL.Path = "/v1/pods/pod-2/tools/run_bash"
		if _, err := do(r); err == nil || err.Kind != nucleus.KindUnauthenticated {
			t.Errorf("another path: %v", err)
		}
		large := must(s.agent.NewSignedRequest("POST", target, "pod-1", []byte("{}")))
		body := &endless{most: 100e6}
		large.Body, large.ContentLength, large.GetBody = body, 100e6, nil
		if _, err := do(large); err == nil || err.Kind == nucleus.KindInternal && !strings.Contains(err.Message, "pipe") && !strings.Contains(err.Message, "reset") {
			t.Errorf("100 MB: %v", err)
		}
	})
}

func TestClientFollowsNoRedirect(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	})
	serve(t, handler, func(t *testing.T, dial DialFunc) {
		client := Client(dial)
		defer client.CloseIdleConnections()
		resp, err := client.Get("http://nucleus/v1/pods")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusTemporaryRedirect || resp.Header.Get("Location") != "/elsewhere" {
			t.Errorf("got %s", resp.Status)
		}
	})
}

func TestUpgrade(t *testing.T) {
	s := newSite()
	var streams sync.WaitGroup
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, body, _, err := s.verifier.Verify(r, "nucleus")
		if err == nil && r.URL.Query().Get("deny") != "" {
			err = &nucleus.Error{Kind: nucleus.KindDenied, Operation: nucleus.RunBash, Rule: "operations.run_bash", Message: "not here"}
		}
		if err != nil {
			WriteError(w, nucleus.AsError(err))
			return
		}
		stream, err := Upgrade(w, r)
		if err != nil {
			WriteError(w, nucleus.AsError(err))
			return
		}
		streams.Add(1)
		defer streams.Done()
		defer stream.Close()
		stream.Send(FrameStdout, body)
		for {
			kind, payload, err := stream.Recv(1 << 20)
			if err != nil || kind == FrameResult {
				return
			}
			stream.Send(FrameStdout, bytes.ToUpper(payload))
		}
	})
	serve(t, handler, func(t *testing.T, dial DialFunc) {
		defer streams.Wait()
		request := func(query string) *http.Request {
			return must(s.operator.NewSignedRequest("POST", "http://nucleus/v1/pods/pod-1/tools/run_bash"+query, "pod-1", []byte(`{"tty":true}`)))
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		stream, err := DialUpgrade(ctx, dial, request(""))
		if err != nil {
			t.Fatal(err)
		}
		cancel() // the stream outlives the context of the dial
		stream.SetDeadline(time.Now().Add(patience))
		for i, want := range []string{`{"tty":true}`, "HELLO", strings.Repeat("X", 1<<20)} {
			if i > 0 {
				if err := stream.Send(FrameStdin, []byte(strings.ToLower(want))); err != nil {
					t.Fatal(err)
				}
			}
			if kind, got, err := stream.Recv(1 << 20); err != nil || kind != FrameStdout || string(got) != want {
				t.Fatalf("got %q, %.40q, %v; want %.40q", kind, got, err, want)
			}
		}
		stream.Send(FrameResult, nil)
		if _, _, err := stream.Recv(100); err != io.EOF {
			t.Errorf("at the end: %v", err)
		}
		stream.Close()

		_, err = DialUpgrade(t.Context(), dial, request("?deny=1"))
		want := nucleus.Error{Kind: nucleus.KindDenied, Operation: nucleus.RunBash, Rule: "operations.run_bash", Message: "not here"}
		if got := nucleus.AsError(err); *got != want {
			t.Errorf("a refusal: got %+v, want %+v", *got, want)
		}
		forged := request("")
		forged.Header.Set("Nucleus-Pod", "pod-2")
		if _, err := DialUpgrade(t.Context(), dial, forged); nucleus.AsError(err).Kind != nucleus.KindUnauthenticated {
			t.Errorf("a forgery: %v", err)
		}
		// An ordinary request to a route that streams is told so.
		client := Client(dial)
		defer client.CloseIdleConnections()
		resp, err := client.Do(request(""))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if e := ReadError(resp); e.Kind != nucleus.KindInvalid || !strings.Contains(e.Message, "Upgrade: nucleus-stream") {
			t.Errorf("without Upgrade: %+v", e)
		}
	})
}

// TestDialUpgradeAgainstOthers: what answers is no node, or nothing does.
func TestDialUpgradeAgainstOthers(t *testing.T) {
	s := newSite()
	for _, c := range []struct {
		name, answer string
		kind         nucleus.Kind
		want         string
	}{
		{"nothing", "", nucleus.KindTimeout, "context deadline exceeded"},
		{"the end", "END", nucleus.KindUnavailable, "EOF"},
		{"no HTTP", "SSH-2.0-OpenSSH\r\n\r\n", nucleus.KindUnavailable, "malformed HTTP"},
		{"an endless head", "HTTP/1.1 101 X\r\n" + strings.Repeat("A: b\r\n", 1<<20), nucleus.KindUnavailable, "EOF"},
		{"101 to something else", "HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", nucleus.KindUnavailable, `"websocket"`},
		{"200", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", nucleus.KindInternal, `HTTP 200: "hi"`},
		{"half a body", "HTTP/1.1 503 X\r\nContent-Length: 100\r\n\r\nhi", nucleus.KindUnavailable, "HTTP 503"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, server := socketPair(t)
			var work sync.WaitGroup
			defer work.Wait()
			defer client.Close()
			work.Go(func() {
				if c.answer == "" {
					return
				}
				server.Read(make([]byte, 4096))
				if c.answer != "END" {
					io.WriteString(server, c.answer)
				}
				server.Close()
			})
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			r := must(s.operator.NewSignedRequest("POST", target, "pod-1", nil))
			_, err := DialUpgrade(ctx, func(context.Context) (net.Conn, error) { return client, nil }, r)
			if e := nucleus.AsError(err); err == nil || e.Kind != c.kind || !strings.Contains(e.Message, c.want) {
				t.Errorf("got %v (%s), want %s with %q", err, e.Kind, c.kind, c.want)
			}
			if _, err := client.Write([]byte("x")); err == nil {
				t.Error("the connection is left open")
			}
		})
	}
	_, err := DialUpgrade(t.Context(), func(context.Context) (net.Conn, error) { return nil, errors.New("no socket") }, must(s.operator.NewSignedRequest("GET", target, "", nil)))
	if e := nucleus.AsError(err); e.Kind != nucleus.KindUnavailable || !strings.Contains(e.Message, "no socket") {
		t.Errorf("got %v", err)
	}
}

// TestFramesBehindTheHead: frames that come in the same packet as the answer.
func TestFramesBehindTheHead(t *testing.T) {
	client, server := socketPair(t)
	go func() {
		server.Read(make([]byte, 4096))
		io.WriteString(server, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: Nucleus-Stream\r\n\r\n"+wireFrame(FrameStdout, 3, "abc")+wireFrame(FrameResult, 0, ""))
		server.Close()
	}()
	stream, err := DialUpgrade(timeout(t, patience), func(context.Context) (net.Conn, error) { return client, nil }, must(newSite().operator.NewSignedRequest("POST", target, "", nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for _, want := range []Frame{FrameStdout, FrameResult} {
		if kind, _, err := stream.Recv(10); kind != want || err != nil {
			t.Errorf("got %q, %v, want %q", kind, err, want)
		}
	}
	if _, _, err := stream.Recv(10); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func BenchmarkSignedCall(b *testing.B) {
	s := newSite()
	s.verifier.Now, s.operator.Now, s.agent.Now = nil, nil, nil
	s.verifier.Started = time.Time{}
	path := filepath.Join(b.TempDir(), "node.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, _, _, err := s.verifier.Verify(r, "nucleus"); err != nil {
			WriteError(w, nucleus.AsError(err))
		}
	})}
	go server.Serve(l)
	defer server.Close()
	client := UnixClient(path)
	defer client.CloseIdleConnections()
	body := make([]byte, 1<<10)
	for name, signer := range map[string]*Signer{"ed25519": s.operator, "hmac": s.agent} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				resp, err := client.Do(must(signer.NewSignedRequest("POST", target, "pod-1", body)))
				if err != nil {
					b.Fatal(err)
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != 200 {
					b.Fatal(resp.Status)
				}
			}
		})
	}
}
