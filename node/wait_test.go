package node

import (
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"testing"

	approvals "cal/approval/client"
	"cal/nucleus"
	"cal/wire"
)

// A call with an ask's id goes on waiting for that ask: one effect, and never an ask anew.
func TestRetryWithAsk(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	write := func(name, ask string) answer { return h.tool(p, nucleus.WriteFiles, writeArgs(name), "ask="+ask) }

	first := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval, `\"ask\": \"a-`).Ask
	if again := write("a", first).want(t, nucleus.KindApproval); again.Ask != first {
		t.Errorf("the call continues ask %s, not %s", again.Ask, first)
	}
	write("b", first).want(t, nucleus.KindNotFound, first)
	write("a", "a-other").want(t, nucleus.KindNotFound, "a-other")
	write("a", "../x").want(t, nucleus.KindInvalid)
	if n := len(h.authority.asked()); n != 1 {
		t.Fatalf("%d asks, want 1", n)
	}
	h.authority.grant(first, nil)
	write("a", first).want(t, "")
	write("a", first).want(t, nucleus.KindNotFound, first)
	if n := len(h.inside(p).permits()); n != 1 || !written(p, "a") || len(h.authority.asked()) != 1 {
		t.Errorf("%d permits, %d asks, want 1 of each", n, len(h.authority.asked()))
	}

	second := h.tool(p, nucleus.WriteFiles, writeArgs("c")).want(t, nucleus.KindApproval).Ask
	h.authority.deny(second, "not this one")
	if e := write("c", second).want(t, nucleus.KindRefused, "not this one"); e.Ask != second {
		t.Errorf("refused %+v", e)
	}
	write("c", second).want(t, nucleus.KindNotFound)
	if written(p, "c") || len(h.authority.asked()) != 2 {
		t.Error("a denial had an effect, or was asked about again")
	}
}

// Who waits is told at once what for.
func TestWaitSaysWhatFor(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	server := httptest.NewServer(h.node.handler())
	defer server.Close()
	call := func(query string) (ask string) {
		req := h.signed(h.asAgent(p), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/write_files"+query, p.record.ID, document(t, writeArgs("a")))
		req.RequestURI, req.URL.Host, req.URL.Scheme = "", server.Listener.Addr().String(), "http"
		req.Host = "nucleus"
		ctx := httptrace.WithClientTrace(h.context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			if code == http.StatusProcessing {
				ask = header.Get(wire.AskHeader)
				h.authority.answer(ask, approvals.Status{State: approvals.Denied, Reason: "no"})
			}
			return nil
		}})
		resp, err := server.Client().Do(req.WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusOK || resp.Header.Get(wire.AskHeader) != "" {
			t.Errorf("%s, header %q", resp.Status, resp.Header)
		}
		return ask
	}
	if ask := call(""); ask != "" {
		t.Errorf("who does not wait is told of %s", ask)
	}
	if ask := call("?wait=600"); ask == "" || ask != h.authority.asked()[0].ID {
		t.Errorf("told of %q, asked %s", ask, h.authority.asked()[0].ID)
	}
}

// An agent's call waits for nine tenths of what its client allows.
func TestWaitOfAgents(t *testing.T) {
	for limit, want := range map[int]int{0: 54, 60: 54, 100: 90, 7200: 6480} {
		if got := waitAsk(&nucleus.Agent{CallS: limit}); got != want {
			t.Errorf("of %d s it waits %d, want %d", limit, got, want)
		}
	}
	if got := waitAsk(nil); got != 54 {
		t.Errorf("without an agent: %d, want 54", got)
	}
}
