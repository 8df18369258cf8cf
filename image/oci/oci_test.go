package oci

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// A registry has a login sent to nobody but itself and its own domain, and has the host ask
// no address of its own network.
func TestElsewhere(t *testing.T) {
	for name, c := range map[string]struct {
		registry, method, url, login string
		refused                      string // "": it is asked, or at least looked for
	}{
		"another's token service":           {"registry.example.com", "GET", "https://token.example.org/", "Basic x", "not of the same domain"},
		"a neighbour under a public suffix": {"one.github.io", "GET", "https://two.github.io/", "Basic x", "not of the same domain"},
		"a password in a form":              {"registry.example.com", "POST", "https://token.example.org/", "", "not of the same domain"},
		"another port is another's, by IP":  {"192.0.2.1", "GET", "https://192.0.2.2/", "Basic x", "not of the same domain"},
		"without TLS":                       {"registry.example.com", "GET", "http://registry.example.com/", "", "without TLS"},
		"elsewhere without TLS":             {"registry.example.com", "GET", "http://cdn.example.org/", "", "without TLS"},
		"this host":                         {"registry.example.com", "GET", "https://127.0.0.1:1/", "", "no public address"},
		"this host, in six":                 {"registry.example.com", "GET", "https://[::ffff:127.0.0.1]:1/", "", "no public address"},
		"a cloud's own":                     {"registry.example.com", "GET", "https://169.254.169.254/", "", "no public address"},
		"a neighbour":                       {"registry.example.com", "GET", "https://10.0.0.1/", "", "no public address"},
		"a provider's":                      {"registry.example.com", "GET", "https://100.64.0.1/", "", "no public address"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, c.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.login != "" {
			req.Header.Set("Authorization", c.login)
		}
		resp, err := newGuard(c.registry+":443", true).RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, pair := range [][2]string{{"auth.docker.io", "index.docker.io"}, {"gitlab.com", "registry.gitlab.com"}, {"AUTH.example.co.uk", "registry.example.co.uk"}} {
		if !sameSite(pair[0], pair[1]) {
			t.Errorf("control: %v are of one domain", pair)
		}
	}
	if sameSite("one.co.uk", "two.co.uk") || sameSite("localhost", "localhost.localdomain") {
		t.Error("they are not of one domain")
	}
}

// A registry of the host's own network may send elsewhere in it, and has the login for itself.
func TestElsewhereInside(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if asked++; r.URL.Path == "/other" && r.Header.Get("Authorization") != "" {
			t.Error("another host got the login")
		}
	}))
	defer server.Close()
	g := newGuard("localhost:5000", false)
	far := strings.Replace(server.URL, "127.0.0.1", "127.0.0.2", 1)
	_, port, _ := strings.Cut(strings.TrimPrefix(server.URL, "http://"), ":")
	for i, c := range []struct {
		url, login string
		ok         bool
	}{
		{"http://127.0.0.1:" + port + "/other", "", false}, // before the registry has shown where it is
		{"http://localhost:" + port + "/", "Basic x", true},
		{"http://127.0.0.1:" + port + "/other", "", true},
		{far + "/other", "Basic x", false},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.login != "" {
			req.Header.Set("Authorization", c.login)
		}
		resp, err := g.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		if (err == nil) != c.ok {
			t.Errorf("%d, %s: %v", i, c.url, err)
		}
	}
	if asked != 2 {
		t.Errorf("the server was asked %d times, want 2", asked)
	}
}
