package workspace

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"cal/internal/keyfile"
	"cal/node/client"
	"cal/nucleus"
)

// serveNode answers on the socket of the node as one of a version with these pods; nil: it does
// not list them.
func serveNode(t *testing.T, h Home, version string, pods []nucleus.PodStatus) (asked func() []string) {
	t.Helper()
	var mu sync.Mutex
	var requests []string
	if err := os.MkdirAll(filepath.Join(h.Dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := keyfile.LoadOrMake(filepath.Join(h.Dir, "keys", "operator.key")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", h.NodeSocket())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		requests = append(requests, r.Method+" "+r.URL.Path)
		mu.Unlock()
		switch {
		case r.Method == http.MethodDelete:
			w.WriteHeader(http.StatusNoContent)
		case r.URL.Path == "/v1/healthz":
			json.NewEncoder(w).Encode(client.Health{Version: version})
		case pods != nil:
			json.NewEncoder(w).Encode(pods)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(requests)
	}
}

// TestOtherVersionIsSaid counts what would end, and says nothing that it does not know.
func TestOtherVersionIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		pods []nucleus.PodStatus
		says string
	}{
		"none":     {[]nucleus.PodStatus{}, "no pod runs on it"},
		"one":      {[]nucleus.PodStatus{{State: "running"}, {State: "failed"}, {State: "stopped"}}, "1 pod runs on it and ends"},
		"several":  {[]nucleus.PodStatus{{State: "running"}, {State: "starting"}, {State: "paused"}}, "3 pods run on it and end"},
		"unlisted": {nil, "which it does not list, end"},
	} {
		t.Run(name, func(t *testing.T) {
			h, _ := person(t)
			serveNode(t, h, "0.0.1", c.pods)
			node, err := h.Node(t.Context())
			var other *OtherVersion
			if !errors.As(err, &other) || node != nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "0.0.1") || !strings.Contains(err.Error(), "cal node restart") {
				t.Errorf("%v, want %q", err, c.says)
			}
			if _, err := os.Stat(h.NodeSocket()); err != nil {
				t.Errorf("the node was taken away: %v", err)
			}
		})
	}
	h, _ := person(t) // the control
	serveNode(t, h, nucleus.Version, nil)
	if node, err := h.Node(t.Context()); err != nil || node == nil {
		t.Errorf("a node of this version: %v", err)
	}
}

// A node that was started before approvals were required of all requires nothing of anybody: it is
// not used.
func TestNodeRequiresWhatIsSet(t *testing.T) {
	h, _ := person(t)
	serveNode(t, h, nucleus.Version, nil)
	if _, err := h.Node(t.Context()); err != nil {
		t.Fatalf("positive control: %v", err)
	}
	write(t, filepath.Join(h.Dir, "config.yaml"), "approvals: {require: other-user, uid: 990}\n")
	if node, err := h.Node(t.Context()); err == nil || node != nil || !strings.Contains(err.Error(), `"other-user:990" (cal node restart`) {
		t.Errorf("%v", err)
	}
	for flag, want := range map[string]string{"": "other-user:990", "passkey": "passkey", "other-user:7": "other-user:7"} {
		if p, err := h.Plan(t.Context(), RunOptions{Approvals: flag}); err != nil || p.Spec.Approvals != want {
			t.Errorf("flag %q: %+v, %v", flag, p, err)
		}
	}
	if _, err := h.Plan(t.Context(), RunOptions{Approvals: "other-user:nobody-at-all"}); err == nil || !strings.Contains(err.Error(), "unknown user") {
		t.Errorf("a user who is none: %v", err)
	}
}

func TestNoNode(t *testing.T) {
	h, _ := person(t)
	if _, err := h.RunningNode(t.Context()); !errors.Is(err, ErrNoNode) {
		t.Errorf("%v", err)
	}
	// A socket that a dead node left.
	l, err := net.Listen("unix", h.NodeSocket())
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := h.RunningNode(t.Context()); !errors.Is(err, ErrNoNode) {
		t.Errorf("%v", err)
	}
	if _, err := h.Node(t.Context()); err == nil || !strings.Contains(err.Error(), "nucleus-node is neither beside cal nor on PATH") {
		t.Errorf("without a program: %v", err)
	}
	if got := h.Approvals(t.Context()); got != "none: nobody can approve (cal approve init)" {
		t.Errorf("approvals %q", got)
	}
}

// TestStartIsCalledOff interrupts the wait for a node that does not come.
func TestStartIsCalledOff(t *testing.T) {
	h, base := person(t)
	bin := filepath.Join(base, "bin")
	started := filepath.Join(base, "started")
	write(t, filepath.Join(bin, "nucleus-node"), "#!/bin/sh\necho > "+started+"\n")
	if err := os.Chmod(filepath.Join(bin, "nucleus-node"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	ctx, interrupt := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := h.Node(ctx)
		done <- err
	}()
	for {
		if _, err := os.Stat(started); err == nil {
			break
		}
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
	}
	interrupt()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was called off", err)
	}
}

func TestDeleteWorkspace(t *testing.T) {
	h, base := person(t)
	write(t, filepath.Join(base, "mine"), "x")
	for _, name := range []string{"", ".", "..", "../../mine", "a/b", ".hidden", "none"} {
		if err := h.DeleteWorkspace(t.Context(), name); err == nil {
			t.Errorf("%q was deleted", name)
		}
	}
	if _, err := os.Stat(filepath.Join(base, "mine")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(h.Workspace("app"), "files", "x"), "x")
	asked := serveNode(t, h, nucleus.Version, []nucleus.PodStatus{})
	if err := h.DeleteWorkspace(t.Context(), "app"); err != nil || !slices.Contains(asked(), "DELETE /v1/workspaces/app") {
		t.Errorf("%v; the node was asked %q", err, asked())
	}
	if _, err := os.Stat(h.Workspace("app")); err != nil { // that is the node's to remove
		t.Error(err)
	}
}
