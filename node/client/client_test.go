package client

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"
	"cal/wire"
)

// serve answers on a socket and returns a client of it, whose requests reach handle only when
// their signature verifies as the node verifies it.
func serve(t *testing.T, handle func(w http.ResponseWriter, r *http.Request, pod string, body []byte)) *Client {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	verifier := &wire.Verifier{Keys: func(id string) (wire.Key, bool) {
		return wire.Key{ID: id, Ed25519: public, Role: wire.Operator}, id == "operator"
	}}
	socket := listen(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, body, signed, err := verifier.Verify(r, "nucleus")
		if err != nil {
			wire.WriteError(w, nucleus.AsError(err))
			return
		}
		handle(w, r, signed.Pod, body)
	}))
	return New(socket, "operator", private)
}

func listen(t *testing.T, handler http.Handler) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return socket
}

// TestCalls holds every method to its route, the pod that it signs for, and its body.
func TestCalls(t *testing.T) {
	var got string
	c := serve(t, func(w http.ResponseWriter, r *http.Request, pod string, body []byte) {
		got = fmt.Sprintf("%s %s for %q: %s", r.Method, r.URL, pod, body)
		if r.Method == http.MethodGet && r.URL.Path == "/v1/pods" {
			io.WriteString(w, `[{"id":"p-1"}]`)
			return
		}
		io.WriteString(w, `{"id":"p-1"}`)
	})
	ctx := t.Context()
	for want, call := range map[string]func() error{
		`POST /v1/pods for "-": {"ref":"r-1","mode":"mediated"`: func() error {
			_, err := c.CreatePod(ctx, nucleus.PodSpec{Ref: "r-1", Mode: nucleus.Mediated})
			return err
		},
		`POST /v1/plan for "-": {"mode":"contained"`: func() error { _, err := c.PlanPod(ctx, nucleus.PodSpec{Mode: nucleus.Contained}); return err },
		`GET /v1/pods for "-": `:                     func() error { _, err := c.Pods(ctx); return err },
		`GET /v1/pods/p-1 for "p-1": `:               func() error { _, err := c.Pod(ctx, "p-1"); return err },
		`DELETE /v1/pods/p-1 for "p-1": `:            func() error { return c.DeletePod(ctx, "p-1") },
		`POST /v1/pods/p-1/resume for "p-1": `:       func() error { return c.ResumePod(ctx, "p-1") },
		`POST /v1/stop for "-": `:                    func() error { return c.Stop(ctx) },
		`POST /v1/pods/p-1/tools/read_files for "p-1": {"path":"x"}`: func() error {
			_, err := c.Tool(ctx, "p-1", nucleus.ReadFiles, map[string]string{"path": "x"})
			return err
		},
		`POST /v1/pods/p-1/repos/app/fetch for "p-1": `: func() error { _, err := c.FetchRepo(ctx, "p-1", "app"); return err },
	} {
		got = ""
		if err := call(); err != nil || !strings.HasPrefix(got, want) {
			t.Errorf("sent %q, %v; want %q", got, err, want)
		}
	}
	if status, err := c.CreatePod(ctx, nucleus.PodSpec{}); err != nil || status.ID != "p-1" {
		t.Errorf("answer %+v, %v", status, err)
	}
}

// TestOtherKeyIsRefused is the control of the signatures above.
func TestOtherKeyIsRefused(t *testing.T) {
	c := serve(t, func(http.ResponseWriter, *http.Request, string, []byte) {
		t.Error("a request of another key was admitted")
	})
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(c.socket, "operator", other).Pods(t.Context()); nucleus.AsError(err).Kind != nucleus.KindUnauthenticated {
		t.Errorf("%v, want unauthenticated", err)
	}
}

// TestErrors: a refusal keeps its kind, rule and ask; no node is said as such.
func TestErrors(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request, _ string, _ []byte) {
		if strings.HasSuffix(r.URL.Path, "/p-html") {
			w.WriteHeader(http.StatusBadGateway)
			io.WriteString(w, "<html>")
			return
		}
		wire.WriteError(w, &nucleus.Error{Kind: nucleus.KindApproval, Operation: nucleus.GitPush, Rule: "trifecta", Message: "ask", Ask: "a-1"})
	})
	_, err := c.Tool(t.Context(), "p-1", nucleus.GitPush, nil)
	var refused *nucleus.Error
	if !errors.As(err, &refused) || refused.Kind != nucleus.KindApproval || refused.Rule != "trifecta" || refused.Ask != "a-1" || refused.Operation != nucleus.GitPush {
		t.Errorf("%#v", err)
	}
	if _, err := c.Pod(t.Context(), "p-html"); nucleus.AsError(err).Kind != nucleus.KindUnavailable {
		t.Errorf("an answer that is none of a node's: %v", err)
	}
	if _, err := c.Agent(t.Context(), "p-1", AgentRequest{}); !errors.As(err, &refused) || refused.Kind != nucleus.KindApproval {
		t.Errorf("a refused stream: %v", err)
	}
	gone := New(filepath.Join(t.TempDir(), "none"), "operator", make(ed25519.PrivateKey, ed25519.PrivateKeySize))
	if _, err := gone.Pods(t.Context()); nucleus.AsError(err).Kind != nucleus.KindUnavailable || !strings.Contains(err.Error(), "none") {
		t.Errorf("without a node: %v", err)
	}
	if _, err := gone.Health(t.Context()); err == nil {
		t.Error("without a node it is healthy")
	}
}

func TestHealth(t *testing.T) {
	ok := New(listen(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Signature") != "" {
			t.Error("the question for health is signed: a node that is not ours would learn a signature")
		}
		json.NewEncoder(w).Encode(Health{Status: "ok", Version: "9", AdmitsFrom: 7})
	})), "operator", nil)
	if h, err := ok.Health(t.Context()); err != nil || h.Version != "9" || h.AdmitsFrom != 7 {
		t.Errorf("%+v, %v", h, err)
	}
	other := New(listen(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })), "operator", nil)
	if _, err := other.Health(t.Context()); err == nil || !strings.Contains(err.Error(), "does not speak like a node") {
		t.Errorf("another server: %v", err)
	}
}

// TestSentOnce: a request whose connection broke may have been acted on; it is not sent again.
func TestSentOnce(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]int{}
	c := serve(t, func(w http.ResponseWriter, r *http.Request, _ string, _ []byte) {
		mu.Lock()
		seen[r.URL.Path]++
		mu.Unlock()
		if r.URL.Path == "/v1/stop" {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
			return
		}
		io.WriteString(w, "[]")
	})
	if _, err := c.Pods(t.Context()); err != nil { // a connection that is kept, as a retry wants it
		t.Fatal(err)
	}
	if err := c.Stop(t.Context()); nucleus.AsError(err).Kind != nucleus.KindUnavailable {
		t.Errorf("%v, want unavailable", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if seen["/v1/stop"] != 1 {
		t.Errorf("sent %d times", seen["/v1/stop"])
	}
}

// TestStream runs a command's stream: what is typed comes back, and the result ends it.
func TestStream(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request, pod string, body []byte) {
		if r.URL.Query().Get("terminal") != "1" || r.URL.Query().Get("rows") != "5" || pod != "p-1" || !strings.Contains(string(body), "argv") {
			t.Errorf("%s for %s: %s", r.URL, pod, body)
		}
		stream, err := wire.Upgrade(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		defer stream.Close()
		kind, payload, err := stream.Recv(1 << 10)
		if err != nil || kind != wire.FrameStdin {
			t.Errorf("frame %q, %v", kind, err)
		}
		stream.Send(wire.FrameStdout, payload)
		stream.SendJSON(wire.FrameResult, StreamResult{Value: json.RawMessage(`{"exit_code":3}`)})
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := c.Run(ctx, "p-1", map[string]any{"argv": []string{"cat"}}, Terminal{TTY: true, Stdin: true, Rows: 5, Cols: 7})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := stream.Send(wire.FrameStdin, []byte("typed")); err != nil {
		t.Fatal(err)
	}
	if kind, payload, err := stream.Recv(1 << 10); err != nil || kind != wire.FrameStdout || string(payload) != "typed" {
		t.Errorf("%q %q %v", kind, payload, err)
	}
	var result StreamResult
	if err := stream.RecvJSON(wire.FrameResult, 1<<10, &result); err != nil || string(result.Value) != `{"exit_code":3}` {
		t.Errorf("%+v %v", result, err)
	}
}
