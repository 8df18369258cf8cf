package egress

import (
	"bufio"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

// refusalIn reads {"error": {...}}.
func refusalIn(t *testing.T, body string) nucleus.Error {
	t.Helper()
	var answer struct{ Error nucleus.Error }
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatalf("%q: %v", body, err)
	}
	return answer.Error
}

// seen is a plain site that answers with the request it got.
func seen(t *testing.T) string {
	return site(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Site", "yes")
		w.Header().Set("Proxy-Authenticate", "Basic")
		fmt.Fprintf(w, "%s %s host=%s", r.Method, r.RequestURI, r.Host)
		names := make([]string, 0, len(r.Header))
		for name := range r.Header {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			fmt.Fprintf(w, " %s=%s", name, r.Header.Get(name))
		}
		fmt.Fprintf(w, " body=%s", body)
	})
}

func TestForward(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("example.com", "93.184.216.34", 80, seen(t))
	address := w.proxy()
	resp, body := ask(t, address, "POST http://EXAMPLE.com:80/a%2fb?c=d HTTP/1.1\r\nHost: evil.example\r\nProxy-Authorization: Basic eA==\r\n"+
		"Connection: X-Mine, close\r\nX-Mine: 1\r\nKeep-Alive: 1\r\nTE: trailers\r\nUpgrade: websocket\r\nX-Kept: 2\r\nContent-Length: 4\r\n\r\nbody")
	want := "POST /a%2fb?c=d host=example.com Connection=close Content-Length=4 X-Kept=2 body=body"
	if resp.StatusCode != 200 || body != want {
		t.Errorf("%d\n got %s\nwant %s", resp.StatusCode, body, want)
	}
	if resp.Header.Get("X-Site") != "yes" || resp.Header.Get("Proxy-Authenticate") != "" {
		t.Errorf("header %v", resp.Header)
	}
	a := w.attempts[0]
	if a.Method != "POST" || a.Path != "/a%2fb" || a.URL != "http://example.com/a%2fb?c=d" || a.Via != ViaHTTP {
		t.Errorf("attempt %+v", a)
	}
	lines := w.lines()
	if !strings.HasPrefix(lines[2], "opened") || !strings.HasPrefix(lines[3], "dial") {
		t.Errorf("journal %q", lines)
	}
	w.until("closed example.com:80")
}

func TestEndToEnd(t *testing.T) {
	got := endToEnd(http.Header{
		"Connection": {"X-Hop, close", "x-other"}, "X-Hop": {"1"}, "X-Other": {"1"}, "X-Kept": {"1"}, "Transfer-Encoding": {"chunked"}, "Proxy-Authorization": {"x"},
	})
	if len(got) != 1 || got.Get("X-Kept") != "1" {
		t.Errorf("got %v, want X-Kept only", got)
	}
}

// Each request of a connection is decided for itself.
func TestForwardKeepAlive(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("example.com", "93.184.216.34", 80, seen(t))
	conn := client(t, w.proxy())
	r := bufio.NewReader(conn)
	io.WriteString(conn, "GET http://example.com/1 HTTP/1.1\r\nHost: example.com\r\n\r\n"+
		"GET http://evil.example/2 HTTP/1.1\r\nHost: example.com\r\n\r\n"+
		"POST http://example.com/3 HTTP/1.1\r\nHost: example.com\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
	for _, want := range []int{200, 403, 200} {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != want {
			t.Errorf("%d %s, want %d", resp.StatusCode, body, want)
		}
	}
	if len(w.attempts) != 3 || w.has("resolve evil") {
		t.Errorf("journal %q", w.lines())
	}
}

// A refusal is JSON with the reason, at once.
func TestProxyRefusal(t *testing.T) {
	w := newWorld(t, nil)
	w.rule("ask.example:443", Ruling{Verdict: nucleus.Ask, Rule: "trifecta", Message: "needs an approval", Ask: "ask-7"})
	w.rule("ask.example:80", Ruling{Verdict: nucleus.Ask, Rule: "trifecta", Message: "needs an approval", Ask: "ask-7"})
	w.allow("lost.example", "93.184.216.34", 443, closedPort(t))
	w.zone["lost.example"] = nil
	w.allow("dead.example", "93.184.216.34", 443, closedPort(t))
	address := w.proxy()
	for request, want := range map[string]nucleus.Error{
		"CONNECT evil.example:443":  {Kind: nucleus.KindDenied, Operation: nucleus.NetConnect, Rule: "hosts", Message: "evil.example:443 is in no rule"},
		"CONNECT ask.example:443":   {Kind: nucleus.KindApproval, Operation: nucleus.NetConnect, Rule: "trifecta", Message: "needs an approval", Ask: "ask-7"},
		"GET http://ask.example/":   {Kind: nucleus.KindApproval, Operation: nucleus.NetConnect, Rule: "trifecta", Message: "needs an approval", Ask: "ask-7"},
		"GET http://evil.example/x": {Kind: nucleus.KindDenied, Operation: nucleus.NetConnect, Rule: "hosts", Message: "evil.example:80 is in no rule"},
	} {
		began := time.Now()
		resp, body := ask(t, address, request+" HTTP/1.1\r\nHost: x\r\n\r\n")
		if resp.StatusCode != 403 || resp.Header.Get("Content-Type") != "application/json" || refusalIn(t, body) != want {
			t.Errorf("%s: %d %s, want %+v", request, resp.StatusCode, body, want)
		}
		t.Logf("%s refused in %v", request, time.Since(began))
	}
	if w.has("resolve") {
		t.Errorf("journal %q", w.lines())
	}
	for _, host := range []string{"lost.example", "dead.example"} {
		resp, body := ask(t, address, "CONNECT "+host+":443 HTTP/1.1\r\nHost: x\r\n\r\n")
		if resp.StatusCode != 502 || refusalIn(t, body).Kind != nucleus.KindFailed {
			t.Errorf("%s: %d %s", host, resp.StatusCode, body)
		}
	}
	w.decideErr = errTest
	if resp, body := ask(t, address, "CONNECT dead.example:443 HTTP/1.1\r\nHost: x\r\n\r\n"); resp.StatusCode != 503 || refusalIn(t, body).Kind != nucleus.KindUnavailable {
		t.Errorf("undecided: %d %s", resp.StatusCode, body)
	}
}

func TestProxyHostile(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Handshake = 300 * time.Millisecond; c.Limits.Header = 8 << 10 })
	w.allow("google.com", "93.184.216.34", 443, echo(t))
	w.allow("google.com", "93.184.216.34", 80, seen(t))
	address := w.proxy()
	for name, raw := range map[string]string{
		"NUL":                   "CONNECT evil\x00.google.com:443 HTTP/1.1\r\n\r\n",
		"escaped NUL":           "CONNECT evil%00.google.com:443 HTTP/1.1\r\n\r\n",
		"CRLF":                  "CONNECT google.com\r\nX: y:443 HTTP/1.1\r\n\r\n",
		"escaped CRLF":          "CONNECT google.com%0d%0aX:443 HTTP/1.1\r\n\r\n",
		"space":                 "CONNECT google.com :443 HTTP/1.1\r\n\r\n",
		"no port":               "CONNECT google.com HTTP/1.1\r\n\r\n",
		"port twice":            "CONNECT google.com:443:443 HTTP/1.1\r\n\r\n",
		"user":                  "CONNECT google.com@evil.example:443 HTTP/1.1\r\n\r\n",
		"path":                  "CONNECT google.com:443/x HTTP/1.1\r\n\r\n",
		"slash":                 "CONNECT /google.com:443 HTTP/1.1\r\n\r\n",
		"URL":                   "CONNECT http://google.com:443 HTTP/1.1\r\n\r\n",
		"brackets":              "CONNECT [google.com]:443 HTTP/1.1\r\n\r\n",
		"mapped":                "CONNECT [::ffff:127.0.0.1]:443 HTTP/1.1\r\n\r\n",
		"zone":                  "CONNECT [fe80::1%25eth0]:443 HTTP/1.1\r\n\r\n",
		"decimal":               "CONNECT 2130706433:443 HTTP/1.1\r\n\r\n",
		"hexadecimal":           "CONNECT 0x7f.1:443 HTTP/1.1\r\n\r\n",
		"octal":                 "GET http://0177.0.0.1/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"origin form":           "GET / HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"asterisk":              "OPTIONS * HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"https":                 "GET https://google.com/ HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"ftp":                   "GET ftp://google.com/ HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"user in URL":           "GET http://google.com@evil.example/ HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"backslash":             "GET http://evil.example\\@google.com/ HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"dot segments":          "GET http://google.com/a/%2e%2e/b HTTP/1.1\r\nHost: google.com\r\n\r\n",
		"two Hosts":             "GET http://google.com/ HTTP/1.1\r\nHost: google.com\r\nHost: evil.example\r\n\r\n",
		"space before colon":    "GET http://google.com/ HTTP/1.1\r\nHost: google.com\r\nTransfer-Encoding : chunked\r\n\r\n",
		"two lengths":           "POST http://google.com/ HTTP/1.1\r\nHost: google.com\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"strange coding":        "POST http://google.com/ HTTP/1.1\r\nHost: google.com\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
		"HTTP/2 preface":        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"header without end":    "GET http://google.com/ HTTP/1.1\r\nHost: google.com\r\nX: " + strings.Repeat("a", 32<<10) + "\r\n\r\n",
		"headers without end":   "GET http://google.com/ HTTP/1.1\r\nHost: google.com\r\n" + strings.Repeat("X: a\r\n", 8<<10) + "\r\n",
		"request line too long": "GET http://google.com/" + strings.Repeat("a", 32<<10) + " HTTP/1.1\r\nHost: google.com\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			resp, body := ask(t, address, raw)
			if resp.StatusCode < 400 || resp.StatusCode >= 500 && resp.StatusCode != 501 && resp.StatusCode != 505 {
				t.Errorf("%d %s", resp.StatusCode, body)
			}
		})
	}
	if w.has("resolve") || w.has("dial") || len(w.attempts) > 0 {
		t.Errorf("journal %q", w.lines())
	}
	if resp, _ := ask(t, address, "GET http://google.com/ HTTP/1.1\r\nHost: google.com\r\n\r\n"); resp.StatusCode != 200 {
		t.Errorf("control: %d", resp.StatusCode)
	}
	// Length and chunks at once: what goes out has one meaning.
	_, body := ask(t, address, "POST http://google.com/ HTTP/1.1\r\nHost: google.com\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n")
	if strings.Contains(body, "smuggled") || strings.Contains(body, "Content-Length=5") {
		t.Errorf("smuggled: %s", body)
	}
}

// A client that sends its head a byte at a time is cut off in time.
func TestProxySlow(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Handshake = 200 * time.Millisecond })
	for _, head := range []string{"", "CONNECT a", "GET http://example.com/ HTTP/1.1\r\nX: "} {
		far, near := net.Pipe()
		ended := make(chan struct{})
		go func() { defer close(ended); w.g.ServeProxy(t.Context(), near, testPeer) }()
		far.SetDeadline(time.Now().Add(wait))
		drained := make(chan struct{})
		go func() { defer close(drained); io.Copy(io.Discard, far) }()
		io.WriteString(far, head)
		tick := time.NewTicker(20 * time.Millisecond)
		began := time.Now()
	loop:
		for {
			select {
			case <-ended:
				break loop
			case <-tick.C:
				if head != "" {
					io.WriteString(far, "a")
				}
			}
			if time.Since(began) > 4*time.Second {
				t.Fatalf("%q and a trickle of bytes keep the connection", head)
			}
		}
		tick.Stop()
		far.Close()
		<-drained
	}
}

// A body that stalls in the middle ends with the idle limit, for guest and site.
func TestForwardStalled(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Idle = 200 * time.Millisecond; c.Limits.Handshake = 200 * time.Millisecond })
	w.allow("example.com", "93.184.216.34", 80, seen(t))
	hold := make(chan struct{})
	w.allow("slow.example", "93.184.216.35", 80, site(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Length", "100")
		io.WriteString(rw, "part")
		http.NewResponseController(rw).Flush()
		<-hold
	}))
	t.Cleanup(func() { close(hold) })
	address := w.proxy()
	conn := client(t, address)
	io.WriteString(conn, "POST http://example.com/ HTTP/1.1\r\nHost: example.com\r\nContent-Length: 100\r\n\r\npart")
	io.ReadAll(conn)
	w.until("closed example.com:80")
	conn = client(t, address)
	io.WriteString(conn, "GET http://slow.example/ HTTP/1.1\r\nHost: slow.example\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
		if body, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("half an answer passes for a whole: %q", body)
		}
	}
	if line := w.until("closed slow.example:80"); !strings.Contains(line, errIdle.Error()) {
		t.Errorf("recorded %q", line)
	}
}

// The real curl, over both forwarders, with and without TLS.
func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("curl is not installed")
	}
	authority := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(authority, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: testCA(t).cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	w := tlsWorld(t)
	w.allow("plain.example", "93.184.216.36", 80, seen(t))
	socks, proxy := "--socks5-hostname "+w.socks(), "--proxytunnel --proxy http://"+w.proxy()
	plain := strings.TrimPrefix(proxy, "--proxytunnel ")
	for _, c := range []struct {
		way, url string
		exit     int
		want     string
	}{
		{socks, "https://example.com/", 0, "hello from example.com"},
		{socks, "http://plain.example/x", 0, "GET /x host=plain.example"},
		{socks, "https://evil.example/", 97, ""},
		{socks, "https://example.com:444/", 97, ""},
		{socks + " --connect-to example.com:443:evil.example:443", "https://example.com/", 97, ""},
		{socks + " --connect-to evil.example:443:example.com:443", "https://evil.example/", 35, ""}, // TLS name
		{proxy, "https://example.com/", 0, "hello from example.com"},
		{proxy, "https://evil.example/", 56, ""},
		{proxy + " --connect-to evil.example:443:example.com:443", "https://evil.example/", 35, ""},
		{plain, "http://plain.example/x", 0, "GET /x host=plain.example"},
		{plain, "http://evil.example/x", 0, `"kind":"denied"`},
		{plain + " -H Host:evil.example", "http://plain.example/x", 0, "GET /x host=plain.example"},
		{plain + " -T " + authority, "http://plain.example/up", 0, "-----END CERTIFICATE-----"},
	} {
		args := append([]string{"-sS", "--max-time", "8", "--cacert", authority}, strings.Fields(c.way)...)
		cmd := exec.Command(curl, append(args, c.url)...)
		cmd.Env = []string{"HOME=" + t.TempDir()}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if got := cmd.ProcessState.ExitCode(); got != c.exit || !strings.Contains(string(out), c.want) {
			t.Errorf("curl %s %s: exit %d, want %d\n%s", c.way, c.url, got, c.exit, out)
		}
	}
	if w.has("resolve evil") {
		t.Error("a denied name was resolved")
	}
}
