package egress

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

// socksRequest is greeting and CONNECT to a name.
func socksRequest(host string, port int) []byte {
	raw := []byte{5, 1, 0, 5, 1, 0, 3, byte(len(host))}
	return binary.BigEndian.AppendUint16(append(raw, host...), uint16(port))
}

// dialSOCKS sends raw and returns the connection after greeting and reply, and
// the reply (-1: closed without one).
func dialSOCKS(t *testing.T, address string, raw []byte) (net.Conn, int) {
	t.Helper()
	conn := client(t, address)
	conn.Write(raw)
	var answer [12]byte
	if n, err := io.ReadFull(conn, answer[:]); err != nil {
		if n >= 2 && answer[1] == 0xff {
			return conn, 0xff
		}
		return conn, -1
	}
	return conn, int(answer[3])
}

// The whole order of a connection that is let through.
func TestSOCKSOrder(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("example.com", "93.184.216.34", 7, echo(t))
	conn, reply := dialSOCKS(t, w.socks(), socksRequest("EXAMPLE.com.", 7))
	if reply != 0 {
		t.Fatalf("reply %d: %q", reply, w.lines())
	}
	io.WriteString(conn, "hello")
	conn.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
		t.Fatalf("echo: %q, %v", got, err)
	}
	conn.Close()
	w.until("closed")
	want := []string{
		"decide socks example.com:7", "resolve example.com", "opened 93.184.216.34:7", "dial 93.184.216.34:7",
		"closed example.com:7 sent=5 received=5 err=<nil>",
	}
	if got := w.lines(); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if a := w.attempts[0]; a.Pod != "p-1" || a.Session != "s-1" || a.ID == "" || a.Op() != nucleus.NetConnect {
		t.Errorf("attempt %+v", a)
	}
}

// A denied name is not resolved: the canary resolver hears nothing.
func TestDeniedIsNotResolved(t *testing.T) {
	w := newWorld(t, nil)
	w.zone["secret-data.evil.example"] = []string{"93.184.216.34"}
	w.rule("asked.example:443", Ruling{Verdict: nucleus.Ask, Ask: "ask-1"})
	w.rule("strange.example:443", Ruling{Verdict: "perhaps"})
	w.rule("empty.example:443", Ruling{})
	address := w.socks()
	for _, host := range []string{"secret-data.evil.example", "asked.example", "strange.example", "empty.example"} {
		began := time.Now()
		if _, reply := dialSOCKS(t, address, socksRequest(host, 443)); reply != replyNotAllowed {
			t.Errorf("%s: reply %d, want %d", host, reply, replyNotAllowed)
		}
		t.Logf("%s refused in %v", host, time.Since(began))
	}
	if w.has("resolve") || w.has("dial") || w.has("opened") {
		t.Errorf("journal %q", w.lines())
	}
	w.rule("secret-data.evil.example:443", Ruling{Verdict: nucleus.Allow}) // the control
	dialSOCKS(t, address, socksRequest("secret-data.evil.example", 443))
	if !w.has("resolve secret-data.evil.example") {
		t.Errorf("journal %q", w.lines())
	}
}

// The port is part of the rule.
func TestExactPort(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("example.com", "93.184.216.34", 7, echo(t))
	address := w.socks()
	for port, want := range map[int]int{7: replyDone, 8: replyNotAllowed, 0: replyNotAllowed} {
		if _, reply := dialSOCKS(t, address, socksRequest("example.com", port)); reply != want {
			t.Errorf("port %d: reply %d, want %d", port, reply, want)
		}
	}
}

func TestSOCKSHostile(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Handshake = 300 * time.Millisecond })
	w.allow("google.com", "93.184.216.34", 7, echo(t))
	address := w.socks()
	for name, c := range map[string]struct {
		raw  []byte
		want int
	}{
		"control":              {socksRequest("google.com", 7), replyDone},
		"NUL":                  {socksRequest("evil\x00.google.com", 7), replyNotAllowed},
		"NUL at the end":       {socksRequest("google.com\x00", 7), replyNotAllowed},
		"CRLF":                 {socksRequest("google.com\r\nX: y", 7), replyNotAllowed},
		"space":                {socksRequest("google.com ", 7), replyNotAllowed},
		"brackets":             {socksRequest("[google.com]", 7), replyNotAllowed},
		"port in the name":     {socksRequest("google.com:7", 7), replyNotAllowed},
		"decimal address":      {socksRequest("2130706433", 7), replyNotAllowed},
		"octal address":        {socksRequest("0177.0.0.1", 7), replyNotAllowed},
		"empty name":           {socksRequest("", 7), replyNotAllowed},
		"255 bytes":            {socksRequest(strings.Repeat("a", 255), 7), replyNotAllowed},
		"loopback as bytes":    {[]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 7}, replyNotAllowed},
		"mapped as bytes":      {append([]byte{5, 1, 0, 5, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 127, 0, 0, 1}, 0, 7), replyNotAllowed},
		"BIND":                 {[]byte{5, 1, 0, 5, 2, 0, 1, 1, 1, 1, 1, 0, 7}, replyNoCommand},
		"UDP ASSOCIATE":        {[]byte{5, 1, 0, 5, 3, 0, 1, 1, 1, 1, 1, 0, 53}, replyNoCommand},
		"Tor RESOLVE":          {append([]byte{5, 1, 0, 5, 0xf0, 0, 3, 10}, "google.com\x00\x00"...), replyNoCommand},
		"address type 2":       {[]byte{5, 1, 0, 5, 1, 0, 2, 1, 1, 1, 1, 0, 7}, replyNoAddressType},
		"reserved byte":        {[]byte{5, 1, 0, 5, 1, 7, 1, 1, 1, 1, 1, 0, 7}, replyFailure},
		"authentication only":  {[]byte{5, 1, 2}, 0xff},
		"no method":            {[]byte{5, 0}, 0xff},
		"SOCKS4":               {[]byte{4, 1, 0, 80, 1, 1, 1, 1, 0}, -1},
		"HTTP":                 {[]byte("GET / HTTP/1.1\r\n\r\n"), -1},
		"silence":              {nil, -1},
		"half a greeting":      {[]byte{5}, -1},
		"half a name":          {[]byte{5, 1, 0, 5, 1, 0, 3, 200, 'a'}, -1},
		"version in a request": {[]byte{5, 1, 0, 4, 1, 0, 1, 1, 1, 1, 1, 0, 7}, replyFailure},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, reply := dialSOCKS(t, address, c.raw); reply != c.want {
				t.Errorf("% x: reply %d, want %d", c.raw, reply, c.want)
			}
		})
	}
	t.Cleanup(func() { // after the parallel ones
		for _, line := range w.lines() {
			if strings.HasPrefix(line, "resolve") && line != "resolve google.com" {
				t.Errorf("journal: %s", line)
			}
		}
		if !w.has("refused socks egress.name") {
			t.Error("malformed names are not recorded")
		}
	})
}

// A client that sends a byte now and then has no more time than a silent one.
func TestSOCKSSlow(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Handshake = 200 * time.Millisecond })
	far, near := net.Pipe()
	defer far.Close()
	ended := make(chan struct{})
	go func() { defer close(ended); w.g.ServeSOCKS(t.Context(), near, testPeer) }()
	far.SetDeadline(time.Now().Add(wait))
	go func() { io.Copy(io.Discard, far) }()
	far.Write([]byte{5, 1, 0, 5, 1, 0, 3, 255})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
			far.Write([]byte{'a'})
		}
		if time.Since(began) > 4*time.Second {
			t.Fatal("a trickle of bytes keeps the handshake open")
		}
	}
}

// The resolver is asked once; what it says later does not count.
func TestRebinding(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("rebind.example", "93.184.216.34", 7, echo(t))
	times := 0
	w.resolve = func(string) ([]netip.Addr, error) {
		if times++; times == 1 {
			return []netip.Addr{netip.MustParseAddr("93.184.216.34")}, nil
		}
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	address := w.socks()
	if _, reply := dialSOCKS(t, address, socksRequest("rebind.example", 7)); reply != 0 {
		t.Fatalf("reply %d", reply)
	}
	if times != 1 || !w.has("dial 93.184.216.34:7") || w.has("dial 127") {
		t.Errorf("%d questions, %q", times, w.lines())
	}
	if _, reply := dialSOCKS(t, address, socksRequest("rebind.example", 7)); reply != replyNotAllowed {
		t.Errorf("after the change: reply %d", reply)
	}
}

// Each cause has its reply, and what cannot be decided or recorded is refused.
func TestSOCKSCauses(t *testing.T) {
	silent := func(w *world) {}
	for name, c := range map[string]struct {
		change func(*world)
		want   int
	}{
		"control":        {silent, replyDone},
		"undecided":      {func(w *world) { w.decideErr = errTest }, replyFailure},
		"not recorded":   {func(w *world) { w.openErr = errTest }, replyFailure},
		"no such name":   {func(w *world) { delete(w.zone, "example.com") }, replyHostUnreachable},
		"no address":     {func(w *world) { w.resolve = func(string) ([]netip.Addr, error) { return nil, nil } }, replyHostUnreachable},
		"nobody listens": {func(w *world) { w.links["93.184.216.34:7"] = closedPort(w.t) }, replyRefused},
	} {
		w := newWorld(t, nil)
		w.allow("example.com", "93.184.216.34", 7, echo(t))
		c.change(w)
		if _, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7)); reply != c.want {
			t.Errorf("%s: reply %d, want %d", name, reply, c.want)
		}
		if name == "not recorded" && w.has("dial") || name == "undecided" && w.has("resolve") {
			t.Errorf("%s: %q", name, w.lines())
		}
		if name == "nobody listens" {
			w.until("closed example.com:7 sent=0 received=0 err=")
		}
	}
}

func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A gateway without a gate lets nothing out.
func TestNoGate(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Gate = nil })
	w.allow("example.com", "93.184.216.34", 7, echo(t))
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7)); reply != replyFailure {
		t.Errorf("reply %d, want %d", reply, replyFailure)
	}
	if w.has("resolve") || w.has("dial") {
		t.Errorf("journal %q", w.lines())
	}
}

// When the first address does not answer the next one of the same answer is
// recorded and tried.
func TestNextAddress(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("example.com", "93.184.216.34", 7, closedPort(t))
	w.zone["example.com"] = []string{"93.184.216.34", "93.184.216.35"}
	w.links["93.184.216.35:7"] = echo(t)
	if _, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 7)); reply != 0 {
		t.Fatalf("reply %d", reply)
	}
	want := []string{"opened 93.184.216.34:7", "dial 93.184.216.34:7", "closed", "opened 93.184.216.35:7", "dial 93.184.216.35:7"}
	for i, line := range w.lines()[2:] {
		if !strings.HasPrefix(line, want[i]) {
			t.Errorf("got %q, want %q", line, want[i])
		}
	}
}

// What the guest is told names neither the host's resolver nor the reason for
// which the log failed.
func TestRefusalKeepsHostToItself(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("example.com", "93.184.216.34", 7, echo(t))
	delete(w.zone, "example.com")
	_, refused := w.g.open(t.Context(), Attempt{Host: "example.com", Port: 7})
	if strings.Contains(refused.Message, "10.9.8.7") || !strings.Contains(refused.Message, "no such host") {
		t.Errorf("message %q", refused.Message)
	}
	w.decideErr = errTest
	_, refused = w.g.open(t.Context(), Attempt{Host: "example.com", Port: 7})
	if strings.Contains(refused.Message, errTest.Error()) {
		t.Errorf("message %q", refused.Message)
	}
}

func FuzzSOCKS(f *testing.F) {
	f.Add(socksRequest("example.com", 443))
	f.Add(socksRequest("evil\x00.google.com", 443))
	f.Add([]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 7})
	f.Add([]byte{5, 2, 0, 2, 5, 3, 0, 4})
	f.Fuzz(func(t *testing.T, raw []byte) {
		from := bytes.NewReader(raw)
		host, port, err := readSOCKS(bufio.NewReader(from), io.Discard)
		if err != nil {
			return
		}
		if again, err := ParseHost(host); err != nil || again != host || port < 1 || port > 65535 {
			t.Fatalf("% x: host %q, port %d: %v", raw, host, port, err)
		}
	})
}
