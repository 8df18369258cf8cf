package node

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"cal/guest"
	"cal/nucleus"
)

// A request in plain HTTP is seen whole by the gateway, so a rule that names method and
// path lets it through, request by request, and opens nothing that nobody looks into.
func TestPlainRequestsAreJudgedWhole(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, open := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	var policy map[string]any
	if err := json.Unmarshal(connects(ordinary, open), &policy); err != nil {
		t.Fatal(err)
	}
	policy["hosts"] = map[string]any{"only": []map[string]any{
		{"host": site.host, "port": site.port, "methods": []string{"GET"}, "path": "/a/**"},
		{"host": open.host, "port": open.port},
	}}
	raw, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	p := h.pod(specOf("w", raw), map[string]string{"a": "x"})

	plain := func(s *web, method, path string) answer {
		stream := h.inside(p).program(guest.StreamHTTP, s.host, s.port)
		defer stream.Close()
		fmt.Fprintf(stream, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", method, s.url(path))
		return h.read(stream)
	}
	for _, c := range []struct {
		method, path string
		allowed      bool
	}{
		{"GET", "/a", true},
		{"GET", "/a/b?q=1", true},
		{"POST", "/a/b", false},
		{"GET", "/b", false},
		{"GET", "/ab", false},
		{"get", "/a", false},
	} {
		before := site.hits.Load()
		a := plain(site, c.method, c.path)
		want := nucleus.KindDenied
		if c.allowed {
			want = ""
		}
		e := a.want(t, want)
		if came := site.hits.Load() - before; c.allowed != (came == 1) {
			t.Errorf("%s %s: %d requests came", c.method, c.path, came)
		}
		if !c.allowed && (e.Rule != "hosts" || !strings.Contains(e.Message, c.method+" ")) {
			t.Errorf("%s %s: %+v", c.method, c.path, e)
		}
		if a := plain(open, c.method, c.path); a.Status != http.StatusOK {
			t.Errorf("%s %s where the rule names no method: %+v", c.method, c.path, a)
		}
	}
	before := site.hits.Load()
	if tunnel, a := h.through(p, site); tunnel != nil || a.want(t, nucleus.KindDenied).Rule != "hosts" {
		t.Errorf("CONNECT: %+v", a)
	}
	if reply := h.socks(p, site); reply != 2 {
		t.Errorf("SOCKS reply %d, want 2", reply)
	}
	if site.hits.Load() != before {
		t.Error("a connection came")
	}
	if reply := h.socks(p, open); reply != 0 {
		t.Errorf("SOCKS reply %d where the rule names no method, want 0", reply)
	}
	if legs := p.root.legs(); !legs.Has(nucleus.Untrusted | nucleus.WayOut) {
		t.Errorf("exposure %v", legs.Names())
	}
}
