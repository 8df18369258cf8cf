package egress

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

func (w *world) fetch(t *testing.T, method, url string, headers map[string]string, body string) (*FetchResult, *nucleus.Error) {
	t.Helper()
	f, err := NewFetch(method, url, headers, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	result, err := w.g.Fetch(t.Context(), testPeer, f, []byte(body))
	if err == nil {
		return result, nil
	}
	var refused *nucleus.Error
	if !errors.As(err, &refused) || refused.Operation != nucleus.WebFetch {
		t.Fatalf("error %#v", err)
	}
	return result, refused
}

func fetchWorld(t *testing.T, change func(*Config)) *world {
	w := newWorld(t, change)
	server := site(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Set-Cookie", "a=b")
		rw.Header().Set("X-Internal", "1")
		switch r.URL.Path {
		case "/moved":
			http.Redirect(rw, r, "http://evil.example/next", http.StatusFound)
		case "/big":
			rw.Header().Set("Content-Length", "5000")
			io.WriteString(rw, strings.Repeat("x", 5000))
		case "/endless":
			for r.Context().Err() == nil {
				if _, err := io.WriteString(rw, strings.Repeat("x", 1000)); err != nil {
					return
				}
			}
		case "/bomb":
			rw.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(rw)
			zeros := make([]byte, 1<<16)
			for range 64 {
				z.Write(zeros)
			}
			z.Close()
		case "/hang":
			<-r.Context().Done()
		default:
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(rw, "%s %s %s X-A=%s UA=%s AE=%s %s", r.Method, r.RequestURI, r.Host, r.Header.Get("X-A"), r.UserAgent(), r.Header.Get("Accept-Encoding"), body)
		}
	}, "example.com", "wrong.example")
	w.allow("example.com", "93.184.216.34", 443, server)
	w.allow("badcert.example", "93.184.216.34", 443, server)
	return w
}

func TestFetch(t *testing.T) {
	w := fetchWorld(t, nil)
	result, refused := w.fetch(t, "POST", "https://Example.com:443/a?b#c", map[string]string{"x-a": "1"}, "data")
	if refused != nil {
		t.Fatal(refused)
	}
	if want := "POST /a?b example.com X-A=1 UA=CAL AE=gzip data"; string(result.Body) != want || result.Status != 200 {
		t.Errorf("%d\n got %s\nwant %s", result.Status, result.Body, want)
	}
	if result.Headers["Content-Type"] == "" || result.Headers["Set-Cookie"] != "" || result.Headers["X-Internal"] != "" || result.Cut != "" {
		t.Errorf("%+v", result)
	}
	a := w.attempts[0]
	if a.Via != ViaFetch || a.Op() != nucleus.WebFetch || a.Method != "POST" || a.URL != "https://example.com/a?b" || a.Path != "/a" {
		t.Errorf("attempt %+v", a)
	}
	want := []string{"decide fetch example.com:443", "resolve example.com", "opened 93.184.216.34:443", "dial 93.184.216.34:443", "closed example.com:443"}
	for i, line := range w.lines() {
		if !strings.HasPrefix(line, want[i]) {
			t.Errorf("line %d: %s, want %s", i, line, want[i])
		}
	}
}

func TestFetchRefused(t *testing.T) {
	w := fetchWorld(t, func(c *Config) { c.Limits.Fetch = 400 * time.Millisecond })
	w.rule("ask.example:443", Ruling{Verdict: nucleus.Ask, Ask: "ask-1"})
	w.allow("inside.example", "10.0.0.1", 80, "")
	for url, want := range map[string]nucleus.Kind{
		"https://evil.example/":        nucleus.KindDenied,
		"https://example.com:444/":     nucleus.KindDenied,
		"http://example.com/":          nucleus.KindDenied,
		"https://ask.example/":         nucleus.KindApproval,
		"http://inside.example/":       nucleus.KindDenied,
		"http://169.254.169.254/":      nucleus.KindDenied,
		"https://badcert.example/":     nucleus.KindFailed,
		"https://example.com/hang":     nucleus.KindTimeout,
		"https://example.com/moved?ok": "",
	} {
		_, refused := w.fetch(t, "GET", url, nil, "")
		if (refused == nil) != (want == "") || refused != nil && refused.Kind != want {
			t.Errorf("%s: %+v, want %q", url, refused, want)
		}
	}
	if w.has("resolve evil") || w.has("resolve ask") || w.has("dial 10.") {
		t.Errorf("journal %q", w.lines())
	}
	w.rule("169.254.169.254:80", Ruling{Verdict: nucleus.Allow, Literals: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	if _, refused := w.fetch(t, "GET", "http://169.254.169.254/", nil, ""); refused == nil || refused.Rule != ruleAddress {
		t.Errorf("metadata: %+v", refused)
	}
}

// A redirect is handed back, and nobody goes there.
func TestFetchRedirect(t *testing.T) {
	w := fetchWorld(t, nil)
	result, refused := w.fetch(t, "GET", "https://example.com/moved", nil, "")
	if refused != nil || result.Status != 302 || result.Redirect != "http://evil.example/next" {
		t.Errorf("%+v, %v", result, refused)
	}
	if len(w.attempts) != 1 || w.has("resolve evil") {
		t.Errorf("journal %q", w.lines())
	}
}

func TestFetchCut(t *testing.T) {
	w := fetchWorld(t, func(c *Config) { c.Limits.FetchBody = 1000 })
	for path, cut := range map[string]string{
		"/big":     "cut after 1000 of 5000 bytes",
		"/endless": "cut after 1000 bytes, the total is not known",
		"/bomb":    "cut after 1000 bytes, the total is not known",
		"/small":   "",
	} {
		result, refused := w.fetch(t, "GET", "https://example.com"+path, nil, "")
		if refused != nil || result.Cut != cut || cut != "" && len(result.Body) != 1000 {
			t.Errorf("%s: %v, cut %q with %d bytes, want %q", path, refused, result.Cut, len(result.Body), cut)
		}
	}
}

// Only the resolved form is fetched, with the body that was judged.
func TestFetchResolved(t *testing.T) {
	w := fetchWorld(t, nil)
	good, err := NewFetch("POST", "https://example.com/a", map[string]string{"X-A": "1"}, []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*nucleus.Fetch, *[]byte){
		"host":    func(f *nucleus.Fetch, _ *[]byte) { f.Host = "trusted.example" },
		"port":    func(f *nucleus.Fetch, _ *[]byte) { f.Port = 80 },
		"path":    func(f *nucleus.Fetch, _ *[]byte) { f.Path = "/allowed" },
		"URL":     func(f *nucleus.Fetch, _ *[]byte) { f.URL = "https://EXAMPLE.com/a" },
		"method":  func(f *nucleus.Fetch, _ *[]byte) { f.Method = "post" },
		"headers": func(f *nucleus.Fetch, _ *[]byte) { f.Headers = map[string]string{"Host": "evil.example"} },
		"body":    func(_ *nucleus.Fetch, b *[]byte) { *b = []byte("other") },
		"digest":  func(f *nucleus.Fetch, _ *[]byte) { f.Body = "" },
	} {
		f, body := good, []byte("data")
		change(&f, &body)
		_, err := w.g.Fetch(t.Context(), testPeer, f, body)
		if nucleus.AsError(err).Kind != nucleus.KindInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(w.attempts) != 0 {
		t.Errorf("journal %q", w.lines())
	}
	if _, err := w.g.Fetch(t.Context(), testPeer, good, []byte("data")); err != nil {
		t.Errorf("control: %v", err)
	}
}

func TestNewFetch(t *testing.T) {
	for _, c := range []struct {
		method, url string
		headers     map[string]string
	}{
		{"CONNECT", "https://example.com/", nil},
		{"TRACE", "https://example.com/", nil},
		{"GET\r\nX: y", "https://example.com/", nil},
		{"GET", "https://example.com/\r\n", nil},
		{"GET", "https://user@example.com/", nil},
		{"GET", "gopher://example.com/", nil},
		{"GET", "https://2130706433/", nil},
		{"GET", "https://example.com/", map[string]string{"Host": "evil.example"}},
		{"GET", "https://example.com/", map[string]string{"transfer-encoding": "chunked"}},
		{"GET", "https://example.com/", map[string]string{"Proxy-Authorization": "x"}},
		{"GET", "https://example.com/", map[string]string{"content-LENGTH": "1"}},
		{"GET", "https://example.com/", map[string]string{"X-A": "1\r\nHost: evil.example"}},
		{"GET", "https://example.com/", map[string]string{"X-A: 1\r\nB": "1"}},
		{"GET", "https://example.com/", map[string]string{"": "1"}},
		{"GET", "https://example.com/", map[string]string{"X-A": "1", "x-a": "2"}},
	} {
		if f, err := NewFetch(c.method, c.url, c.headers, nil); err == nil || nucleus.AsError(err).Kind != nucleus.KindInvalid {
			t.Errorf("NewFetch(%q, %q, %q) = %+v, %v", c.method, c.url, c.headers, f, err)
		}
	}
	f, err := NewFetch("", "https://EXAMPLE.com", map[string]string{"authorization": "Bearer x", "cookie": "a=b; c"}, nil)
	if err != nil || f.Method != "GET" || f.URL != "https://example.com/" || f.Host != "example.com" || f.Port != 443 || f.Headers["Authorization"] != "Bearer x" {
		t.Errorf("%+v, %v", f, err)
	}
}
