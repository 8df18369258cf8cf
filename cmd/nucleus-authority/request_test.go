package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"cal/authority"
	"cal/nucleus"
	"cal/wire"
)

var requester = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))

// signedRequest is what the requester of the tests sent to the node, as the node
// hands it on.
func signedRequest(t *testing.T, method, target, pod, body string) json.RawMessage {
	t.Helper()
	signer := wire.Signer{KeyID: "agent", Ed25519: requester}
	r, err := signer.NewSignedRequest(method, target, pod, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	r.RequestURI = r.URL.RequestURI() // as a server sees it
	public := requester.Public().(ed25519.PublicKey)
	verifier := wire.Verifier{
		Keys:    func(string) (wire.Key, bool) { return wire.Key{ID: "agent", Ed25519: public}, true },
		Started: time.Now().Add(-time.Minute),
	}
	_, _, signed, err := verifier.Verify(r, "nucleus")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(signed)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestRequested(t *testing.T) {
	const target, body = "http://nucleus/v1/pods/p-1/tools/git_push?wait=60", `{ "branch": "x<y" }`
	key := requester.Public().(ed25519.PublicKey)
	good := signedRequest(t, http.MethodPost, target, "p-1", body)
	got, err := requested(nucleus.AskRequest{Requester: "agent", Request: good}, key)
	want := authority.Requested{Pod: "p-1", Op: nucleus.GitPush, Args: nucleus.SHA256([]byte(`{"branch":"x<y"}`))}
	if err != nil || got != want {
		t.Fatalf("%+v, %v; want %+v", got, err, want)
	}
	edit := func(old, new string) json.RawMessage {
		edited := strings.Replace(string(good), old, new, 1)
		if edited == string(good) {
			t.Fatalf("no %q in %s", old, good)
		}
		return json.RawMessage(edited)
	}
	other, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		request json.RawMessage
		id      string
		key     ed25519.PublicKey
	}{
		"nothing":          {json.RawMessage("null"), "agent", key},
		"another key":      {good, "agent", other},
		"no key":           {good, "agent", nil},
		"another key's id": {good, "operator", key},
		"other operation":  {edit("git_push", "create_pr"), "agent", key},
		"other pod":        {edit("pods/p-1", "pods/p-2"), "agent", key},
		"other body":       {edit(`"body_b64":"`, `"body_b64":"AAAA`), "agent", key},
		"one field more":   {edit(`{`, `{"approved":true,`), "agent", key},
		"not a call":       {signedRequest(t, http.MethodGet, target, "p-1", ""), "agent", key},
		"another route":    {signedRequest(t, http.MethodPost, "http://nucleus/v1/pods/p-1/agent", "p-1", "{}"), "agent", key},
		"path too long":    {signedRequest(t, http.MethodPost, "http://nucleus/v1/pods/p-1/tools/git_push/x", "p-1", "{}"), "agent", key},
		"pods differ":      {signedRequest(t, http.MethodPost, target, "p-2", "{}"), "agent", key},
		"arguments twice":  {signedRequest(t, http.MethodPost, target, "p-1", `{"a":1,"a":2}`), "agent", key},
	} {
		if got, err := requested(nucleus.AskRequest{Requester: c.id, Request: c.request}, c.key); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
	// An escaped slash does not make two parts.
	escaped := signedRequest(t, http.MethodPost, "http://nucleus/v1/pods/p-1%2Fx/tools/git_push", "p-1", "{}")
	if got, err := requested(nucleus.AskRequest{Requester: "agent", Request: escaped}, key); err == nil {
		t.Errorf("escaped slash: %+v", got)
	}
}

// The place that is shown is the one that the machine signed.
func TestRequestedConnection(t *testing.T) {
	key := requester.Public().(ed25519.PublicKey)
	ask := func(body string, shown *nucleus.Connect) nucleus.AskRequest {
		request := signedRequest(t, http.MethodPost, "http://nucleus/v1/pods/p-1/tools/net_connect", "p-1", body)
		return nucleus.AskRequest{Requester: "agent", Request: request, Action: nucleus.Action{Op: nucleus.NetConnect, Connect: shown}}
	}
	const body = `{"host":"a.example","port":443}`
	got, err := requested(ask(body, &nucleus.Connect{Host: "a.example", Port: 443}), key)
	if want := (authority.Requested{Pod: "p-1", Op: nucleus.NetConnect, Args: nucleus.SHA256([]byte(body))}); err != nil || got != want {
		t.Fatalf("%+v, %v; want %+v", got, err, want)
	}
	for name, bad := range map[string]nucleus.AskRequest{
		"another host":  ask(body, &nucleus.Connect{Host: "b.example", Port: 443}),
		"another port":  ask(body, &nucleus.Connect{Host: "a.example", Port: 22}),
		"nothing shown": ask(body, nil),
		"more signed":   ask(`{"host":"a.example","port":443,"path":"/"}`, &nucleus.Connect{Host: "a.example", Port: 443}),
		"other case":    ask(`{"Host":"a.example","Port":443}`, &nucleus.Connect{Host: "b.example", Port: 443}),
	} {
		if got, err := requested(bad, key); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}
