package egress

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// Whoever reads along understands what the gateway understands, and nothing where it
// understands nothing.
func TestReadAlong(t *testing.T) {
	socks := func(host string, port int) string { return string(socksRequest(host, port)) }
	long := strings.Repeat("x", 70<<10)
	for name, c := range map[string]struct {
		via  Via
		raw  string
		want []string
	}{
		"SOCKS name":         {ViaSOCKS, socks("Example.COM.", 443), []string{"example.com:443"}},
		"SOCKS and a tunnel": {ViaSOCKS, socks("example.com", 80) + "CONNECT other.example:443 HTTP/1.1\r\n\r\n", []string{"example.com:80"}},
		"SOCKS half":         {ViaSOCKS, socks("example.com", 443)[:9], nil},
		"SOCKS NUL":          {ViaSOCKS, socks("evil\x00.example.com", 443), nil},
		"SOCKS decimal":      {ViaSOCKS, socks("2130706433", 443), nil},
		"SOCKS 4":            {ViaSOCKS, "\x04\x01\x00\x50\x7f\x00\x00\x01\x00", nil},
		"SOCKS bind":         {ViaSOCKS, "\x05\x01\x00\x05\x02\x00\x01\x01\x02\x03\x04\x00\x50", nil},
		"CONNECT":            {ViaHTTP, "CONNECT Example.com:443 HTTP/1.1\r\nHost: other.example:443\r\n\r\nGET http://evil.example/ HTTP/1.1\r\n\r\n", []string{"example.com:443"}},
		"CONNECT no port":    {ViaHTTP, "CONNECT example.com HTTP/1.1\r\n\r\n", nil},
		"plain":              {ViaHTTP, "GET http://example.com/a?b HTTP/1.1\r\nHost: other.example\r\n\r\n", []string{"example.com:80"}},
		"plain https":        {ViaHTTP, "GET https://example.com/ HTTP/1.1\r\nHost: x\r\n\r\n", nil},
		"plain user":         {ViaHTTP, "GET http://u@example.com/ HTTP/1.1\r\nHost: x\r\n\r\n", nil},
		"origin form":        {ViaHTTP, "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", nil},
		"several": {
			ViaHTTP, "POST http://a.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\nGET http://evil.example/ HTTP/1.1GET http://b.example:81/ HTTP/1.1\r\nHost: x\r\n\r\n" +
				"POST http://c.example/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nCONNECT d.example:22 HTTP/1.1\r\n\r\n",
			[]string{"a.example:80", "b.example:81", "c.example:80", "d.example:22"},
		},
		"endless head": {ViaHTTP, "GET http://example.com/ HTTP/1.1\r\nA: " + long + "\r\n\r\n", nil},
		"large body":   {ViaHTTP, fmt.Sprintf("POST http://a.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%sGET http://b.example/ HTTP/1.1\r\nHost: x\r\n\r\n", len(long), long), []string{"a.example:80", "b.example:80"}},
		"nothing":      {ViaHTTP, "", nil},
		"garbage":      {ViaHTTP, "\x16\x03\x01\x00\x00", nil},
	} {
		var got []string
		_ = ReadAlong(strings.NewReader(c.raw), c.via, func(host string, port int) { got = append(got, joinHostPort(host, port)) })
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// What the gateway judges is what was read along, for every form of request.
func TestReadAlongAgrees(t *testing.T) {
	w := newWorld(t, nil)
	for via, c := range map[Via]struct{ address, raw, last string }{
		ViaSOCKS: {w.socks(), string(socksRequest("Some.Example.", 8443)), "some.example:8443"},
		ViaHTTP: {w.proxy(), "GET http://Other.example:8080/x HTTP/1.1\r\nHost: liar.example\r\n\r\n" +
			"CONNECT last.example:443 HTTP/1.1\r\nHost: liar.example\r\n\r\n", "last.example:443"},
	} {
		before := len(w.attempts)
		var along []string
		if err := ReadAlong(strings.NewReader(c.raw), via, func(host string, port int) { along = append(along, joinHostPort(host, port)) }); err != nil {
			t.Fatal(err)
		}
		io.WriteString(client(t, c.address), c.raw)
		w.until(fmt.Sprintf("decide %s %s", via, c.last))
		var judged []string
		w.mu.Lock()
		for _, a := range w.attempts[before:] {
			judged = append(judged, joinHostPort(a.Host, a.Port))
		}
		w.mu.Unlock()
		if len(along) == 0 || !slices.Equal(along, judged) {
			t.Errorf("%s: read along %q, judged %q", via, along, judged)
		}
	}
}

// A person's no is told as such, at once; the grant that let a connection through
// stands in the records of its opening and its end.
func TestRulingsOfPersons(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("granted.example", "93.184.216.34", 80, site(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "page") }))
	w.mu.Lock()
	granted := w.rules["granted.example:80"]
	granted.Grant = "g-1"
	w.rules["granted.example:80"] = granted
	w.mu.Unlock()
	w.rule("refused.example:80", Ruling{Verdict: "deny", Rule: "trifecta", Message: "the person said no", Ask: "a-1"})
	resp, body := ask(t, w.proxy(), "GET http://refused.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if e := refusalIn(t, body); resp.StatusCode != 403 || e.Kind != "approval_refused" || e.Ask != "a-1" || e.Message != "the person said no" {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("refused.example", 80)); reply != replyNotAllowed {
		t.Errorf("reply %d, want %d", reply, replyNotAllowed)
	}
	if w.has("resolve refused.example") {
		t.Error("a refused name was resolved")
	}
	if _, body := ask(t, w.proxy(), "GET http://granted.example/ HTTP/1.1\r\nHost: x\r\n\r\n"); body != "page" {
		t.Errorf("control: %s", body)
	}
	w.until("closed granted.example:80 grant=g-1")
	if !w.has("opened 93.184.216.34:80 grant=g-1") {
		t.Errorf("journal %q", w.lines())
	}
}
