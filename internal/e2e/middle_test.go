package e2e

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/internal/testenv"
	"cal/nucleus"
)

// middle listens in the place of the authority's socket, as any program of its user can, hands all
// on, and may do something first.
type middle struct {
	t     *testing.T
	moved string // where the authority is reached now

	mu     sync.Mutex
	bodies []string // of all requests
	before func(path string, body []byte)
}

func newMiddle(t *testing.T, socket string) *middle {
	t.Helper()
	m := &middle{t: t, moved: socket + ".moved"}
	if err := os.Rename(socket, m.moved); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "authority"})
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "unix", m.moved)
	}}
	proxy.Transport = transport
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		m.mu.Lock()
		m.bodies = append(m.bodies, string(body))
		before := m.before
		m.mu.Unlock()
		if before != nil {
			before(r.Method+" "+r.URL.Path, body)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		proxy.ServeHTTP(w, r)
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
		transport.CloseIdleConnections()
		_ = os.Remove(socket)
		_ = os.Rename(m.moved, socket)
	})
	return m
}

// at does something with what is posted to a path, before it is handed on.
func (m *middle) at(route string, do func(body []byte)) *atomic.Int32 {
	var times atomic.Int32
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before = func(path string, body []byte) {
		if path == route {
			times.Add(1)
			do(body)
		}
	}
	return &times
}

// TestMiddle has a program of the same user take the place of the authority's socket while a person
// grants one ask and adds an approver. It learns nothing that is typed, and gets neither its own ask
// granted nor its own key in; what the person does passes through it and works.
func TestMiddle(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	s := newGrantStory(t, e, `{"operations":{"write_files":"ask","read_files":"always"}}`)
	good, evil := s.asks(s.write("harmless")), s.asks(s.write("evil"))
	m := newMiddle(t, filepath.Join(e.CAL, "run", "authority.sock"))
	direct := approvals.New(m.moved)
	defer direct.Close()
	_, digest, err := direct.Get(e.Context(), evil)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, err error, kind nucleus.Kind) {
		t.Helper()
		if err == nil || nucleus.AsError(err).Kind != kind {
			t.Errorf("%s: %v, want %s", what, err, kind)
		}
	}

	posted := m.at("POST /v1/asks/"+good+"/grant", func(body []byte) {
		var g approvals.SignedGrant
		if err := nucleus.Strict(body, &g); err != nil {
			t.Errorf("what is posted is more than a signed grant: %v", err)
		}
		claims, err := approval.Claims(g.Token)
		if err != nil || claims.Ask != good || claims.AskDigest == digest || claims.Reason != "" {
			t.Errorf("the token says %+v, %v", claims, err)
		}
		_, err = direct.Grant(e.Context(), evil, g.Token)
		refused("the token for another ask", err, nucleus.KindConflict)
		_, err = direct.Grant(e.Context(), evil, forged(t, g.Token, evil, digest))
		refused("the token with other claims", err, nucleus.KindForbidden)
	})
	e.Grant(good)
	if posted.Load() != 1 {
		t.Fatalf("the grant passed %d times", posted.Load())
	}
	if e := s.write("harmless"); e != nil {
		t.Errorf("positive control: what the person granted: %+v", e)
	}
	if got := s.asks(s.write("evil")); got != evil {
		t.Errorf("asks %s, want the same one, %s", got, evil)
	}
	if status, err := direct.Status(e.Context(), evil); err != nil || status.State != approvals.Pending || len(status.Grants) != 0 {
		t.Errorf("the other ask: %+v, %v", status, err)
	}

	// A key of its own in the place of the new approver's.
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	posted = m.at("POST /v1/approvers", func(body []byte) {
		var n approvals.NewApprover
		if err := nucleus.Strict(body, &n); err != nil {
			t.Errorf("what is posted is more than a key and a word for it: %v", err)
		}
		n.Key = public
		_, err := direct.AddApprover(e.Context(), n)
		refused("another key", err, nucleus.KindForbidden)
	})
	add := e.Terminal(e.Command("cal", "approve", "approver", "add", "bob"))
	for _, talk := range [][2]string{{"passphrase of", testenv.Passphrase}, {"passphrase: ", bobsSecret}, {"passphrase again: ", bobsSecret}, {"your phrase: ", "red lamp"}} {
		add.Until(talk[0])
		add.Type(talk[1] + "\n")
	}
	if code := add.Wait(); code != 0 || posted.Load() != 1 {
		t.Fatalf("approver add: exit code %d, passed %d times\n%s", code, posted.Load(), add.Screen)
	}
	if info, err := direct.Info(e.Context()); err != nil || len(info.Approvers) != 2 || bytes.Equal(info.Approvers[1].Key, public) {
		t.Errorf("approvers %+v, %v", info, err)
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	for _, body := range m.bodies {
		for _, secret := range []string{testenv.Passphrase, bobsSecret} {
			if strings.Contains(body, secret) {
				t.Errorf("a passphrase was sent: %s", body)
			}
		}
	}
}

// forged is a token that says something else under the same signature.
func forged(t *testing.T, token, ask, digest string) string {
	t.Helper()
	const header, signature = "v4.public.", ed25519.SignatureSize
	body, footer, _ := strings.Cut(strings.TrimPrefix(token, header), ".")
	raw, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil || len(raw) <= signature {
		t.Fatalf("token %q: %v", token, err)
	}
	var claims map[string]any
	if err := json.Unmarshal(raw[:len(raw)-signature], &claims); err != nil {
		t.Fatal(err)
	}
	grant, err := approval.Claims(token)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range claims {
		switch value {
		case grant.Ask:
			claims[name] = ask
		case grant.AskDigest:
			claims[name] = digest
		}
	}
	said, err := nucleus.Canonical(claims)
	if err != nil {
		t.Fatal(err)
	}
	return header + base64.RawURLEncoding.EncodeToString(append(said, raw[len(raw)-signature:]...)) + "." + footer
}
