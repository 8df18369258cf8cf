package client

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/approval"
	"cal/nucleus"
)

// serve answers every request at a new socket with one code and body.
func serve(t *testing.T, code int, body string) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "a.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		fmt.Fprint(w, body)
	})}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	c := New(socket)
	t.Cleanup(func() {
		c.Close()
		_ = server.Close()
		<-done
	})
	return c
}

// What answers at the socket need not be an authority.
func TestHostileAnswers(t *testing.T) {
	for name, a := range map[string]struct {
		code int
		body string
		kind nucleus.Kind
	}{
		"no JSON":         {200, "hello", ""},
		"unknown field":   {200, `{"id":"a-1","state":"granted","always":true}`, ""},
		"two answers":     {200, `{"id":"a-1"}{"id":"a-2"}`, ""},
		"endless":         {200, strings.Repeat(" ", 2*approval.MaxAsk+1), nucleus.KindTooLarge},
		"error, no kind":  {500, "oops", nucleus.KindUnavailable},
		"redirect":        {302, "", nucleus.KindUnavailable},
		"error with kind": {403, `{"error":{"kind":"forbidden","message":"no"}}`, nucleus.KindForbidden},
	} {
		_, err := serve(t, a.code, a.body).Status(t.Context(), "a-1")
		var e *nucleus.Error
		if err == nil || errors.As(err, &e) != (a.kind != "") || e != nil && e.Kind != a.kind {
			t.Errorf("%s: %v, want an error of kind %q", name, err, a.kind)
		}
	}
	if s, err := serve(t, 200, `{"id":"a-1","state":"pending","ask_sha256":"d"}`).Status(t.Context(), "a-1"); err != nil || s.State != Pending {
		t.Errorf("positive control: %+v, %v", s, err)
	}
}

func TestGetOtherAsk(t *testing.T) {
	ask := nucleus.AskRequest{ID: "a-2", Action: nucleus.Action{Op: nucleus.GitPush}}
	digest, canonical, err := approval.Digest(ask)
	if err != nil {
		t.Fatal(err)
	}
	c := serve(t, 200, string(canonical))
	if _, _, err := c.Get(t.Context(), "a-1"); err == nil || !strings.Contains(err.Error(), `sent "a-2"`) {
		t.Errorf("another ask: %v", err)
	}
	if got, d, err := c.Get(t.Context(), "a-2"); err != nil || d != digest || got.ID != "a-2" {
		t.Errorf("positive control: %+v, %s, %v", got, d, err)
	}
}

func TestSilentAuthority(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "a.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	c := New(socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, "a-1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want the deadline", err)
	}
}

// What names no user, or root, requires nothing that could be met, and is refused.
func TestRequirements(t *testing.T) {
	for _, bad := range []string{"anybody", "other-user:", "other-user:ann", "other-user:0", "other-user:-1", "other-user:07", "other-user:7:8", "passkey:7", "Other-user"} {
		if err := CheckRequirement(bad); err == nil || nucleus.AsError(err).Kind != nucleus.KindInvalid {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for _, good := range []struct {
		require  string
		uid      int
		required bool
	}{{"", AnyUser, false}, {"passkey", AnyUser, false}, {"other-user", AnyUser, true}, {"other-user:990", 990, true}} {
		uid, required, err := OtherUserOf(good.require)
		if err != nil || uid != good.uid || required != good.required || CheckRequirement(good.require) != nil {
			t.Errorf("%q: %d, %v, %v", good.require, uid, required, err)
		}
	}
}

// A log's files lie below the directory, whatever who hands them out names them.
func TestHostileLog(t *testing.T) {
	pack := func(h tar.Header) string {
		var out strings.Builder
		w := tar.NewWriter(&out)
		h.Size = int64(len("x"))
		if h.Typeflag != tar.TypeReg {
			h.Size = 0
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			fmt.Fprint(w, "x")
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	base := t.TempDir()
	for name, body := range map[string]string{
		"above": pack(tar.Header{Typeflag: tar.TypeReg, Name: "../above"}), "absolute": pack(tar.Header{Typeflag: tar.TypeReg, Name: filepath.Join(base, "absolute")}),
		"link": pack(tar.Header{Typeflag: tar.TypeSymlink, Name: "tile", Linkname: base}), "device": pack(tar.Header{Typeflag: tar.TypeFifo, Name: "fifo"}),
		"cut": pack(tar.Header{Typeflag: tar.TypeReg, Name: "journal"})[:512],
	} {
		dir := filepath.Join(base, name+"-dir")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := serve(t, 200, body).Log(t.Context(), dir); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := serve(t, 200, pack(tar.Header{Typeflag: tar.TypeReg, Name: "tile/0/000"})).Log(t.Context(), t.TempDir()); err != nil {
		t.Errorf("positive control: %v", err)
	}
	if made, err := filepath.Glob(filepath.Join(base, "a*e")); err != nil || len(made) != 0 {
		t.Errorf("made %q, %v", made, err)
	}
	if err := serve(t, 403, `{"error":{"kind":"forbidden","message":"no"}}`).Log(t.Context(), t.TempDir()); err == nil || err.Error() != "no" {
		t.Errorf("refused: %v", err)
	}
}
