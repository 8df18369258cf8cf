package egress

import (
	"bufio"
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"
)

// clientHello is what a client with config sends first.
func clientHello(t testing.TB, config *tls.Config) []byte {
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tls.Client(near, config).Handshake()
	}()
	defer func() { near.Close(); far.Close(); <-done }()
	far.SetDeadline(time.Now().Add(wait))
	head := make([]byte, 5)
	if _, err := io.ReadFull(far, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

// echConfig is the list that a provider publishes so that names can be hidden
// behind public.
func echConfig(t testing.TB, public string) []byte {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	body := []byte{1, 0, 0x20, 0, 32}
	body = append(body, key.PublicKey().Bytes()...)
	body = append(body, 0, 4, 0, 1, 0, 1, 0, byte(len(public)))
	body = append(append(body, public...), 0, 0)
	config := binary.BigEndian.AppendUint16([]byte{0xfe, 0x0d}, uint16(len(body)))
	config = append(config, body...)
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(config))), config...)
}

// split cuts a hello of one record into records of n bytes.
func split(hello []byte, n int) []byte {
	var out []byte
	for body := hello[5:]; len(body) > 0; {
		piece := body[:min(n, len(body))]
		body = body[len(piece):]
		out = binary.BigEndian.AppendUint16(append(out, hello[:3]...), uint16(len(piece)))
		out = append(out, piece...)
	}
	return out
}

func TestReadHello(t *testing.T) {
	plain := func(name string) []byte { return clientHello(t, &tls.Config{ServerName: name}) }
	nameless := clientHello(t, &tls.Config{ServerName: "127.0.0.1", InsecureSkipVerify: true})
	example := plain("example.com")
	upper := bytes.Replace(example, []byte("example.com"), []byte("eXample.com"), 1)
	nul := bytes.Replace(example, []byte("example.com"), []byte("exam\x00le.com"), 1)
	for name, c := range map[string]struct {
		raw  []byte
		host string
		want string // "" = passes
	}{
		"same":                  {example, "example.com", ""},
		"same, other case":      {upper, "example.com", ""},
		"same, in small pieces": {split(example, 7), "example.com", ""},
		"same, data after it":   {append(bytes.Clone(example), "more"...), "example.com", ""},
		"none, for an address":  {nameless, "127.0.0.1", ""},
		"other":                 {plain("evil.example"), "example.com", `TLS name "evil.example"`},
		"other, small pieces":   {split(plain("evil.example"), 3), "example.com", `TLS name "evil.example"`},
		"longer":                {plain("example.com.evil.example"), "example.com", "TLS name"},
		"below":                 {plain("a.example.com"), "example.com", "TLS name"},
		"NUL":                   {nul, "example.com", "TLS name"},
		"none":                  {nameless, "example.com", "no TLS name"},
		"one, for an address":   {example, "127.0.0.1", "TLS name"},
		"hidden behind the same": {clientHello(t, &tls.Config{
			ServerName: "evil.example", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: echConfig(t, "example.com"),
		}), "example.com", "ECH"},
		"hidden behind another": {clientHello(t, &tls.Config{
			ServerName: "example.com", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: echConfig(t, "front.example"),
		}), "example.com", "ECH"},
		"cut short":        {example[:len(example)-1], "example.com", "no TLS ClientHello"},
		"not TLS":          {[]byte("GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"), "example.com", "no TLS ClientHello"},
		"an alert":         {[]byte{21, 3, 1, 0, 2, 2, 40}, "example.com", "no TLS ClientHello"},
		"records for ever": {bytes.Repeat([]byte{22, 3, 1, 0, 0}, 1<<20), "example.com", "no TLS ClientHello"},
		"a long hello":     {append([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, make([]byte, 1<<20)...), "example.com", "no TLS ClientHello"},
	} {
		taken, err := readHello(bytes.NewReader(c.raw), c.host)
		if c.want == "" && (err != nil || !bytes.HasPrefix(c.raw, taken) || len(taken) < len(example)/2) {
			t.Errorf("%s: took %d of %d bytes, %v", name, len(taken), len(c.raw), err)
		}
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !errors.As(err, new(errHello))) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func FuzzReadHello(f *testing.F) {
	f.Add(clientHello(f, &tls.Config{ServerName: "example.com"}))
	f.Add(clientHello(f, &tls.Config{ServerName: "example.com", MaxVersion: tls.VersionTLS12}))
	f.Add(split(clientHello(f, &tls.Config{ServerName: "evil.example"}), 9))
	f.Add([]byte{22, 3, 1, 0, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		taken, err := readHello(bytes.NewReader(raw), "example.com")
		if err == nil && (!bytes.HasPrefix(raw, taken) || !bytes.Contains(bytes.ToLower(withoutRecords(taken)), []byte("example.com"))) {
			t.Fatalf("passed % x", raw)
		}
		looksLikeTLS(bufio.NewReader(bytes.NewReader(raw)))
	})
}

func withoutRecords(raw []byte) []byte {
	var out []byte
	for len(raw) >= 5 {
		n := min(int(binary.BigEndian.Uint16(raw[3:]))+5, len(raw))
		out = append(out, raw[5:n]...)
		raw = raw[n:]
	}
	return out
}

// tlsWorld has a TLS site that answers for three names, on 443 and 8443, and
// rules for one name and for its address.
func tlsWorld(t *testing.T) *world {
	w := newWorld(t, func(c *Config) { c.Limits.Handshake = 500 * time.Millisecond })
	server := site(t, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "hello from "+r.Host) },
		"example.com", "evil.example", "127.0.0.1")
	w.allow("example.com", "93.184.216.34", 443, server)
	w.allow("example.com", "93.184.216.34", 8443, server)
	w.links["127.0.0.1:443"] = server
	w.rule("127.0.0.1:443", Ruling{Verdict: nucleus.Allow, Literals: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})
	return w
}

// The name in TLS is the name that was asked for, over SOCKS and CONNECT.
func TestTLSName(t *testing.T) {
	for _, c := range []struct {
		host string
		port int
		name string
		want string // error of the handshake
		log  string
	}{
		{"example.com", 443, "example.com", "", "<nil>"},
		{"example.com", 443, "evil.example", "unrecognized name", `TLS name "evil.example", asked for example.com`},
		{"example.com", 443, "127.0.0.1", "unrecognized name", "no TLS name"},
		{"example.com", 8443, "example.com", "", "<nil>"},
		{"example.com", 8443, "evil.example", "unrecognized name", `TLS name "evil.example"`},
		{"127.0.0.1", 443, "127.0.0.1", "", "<nil>"},
		{"127.0.0.1", 443, "example.com", "unrecognized name", `TLS name "example.com", asked for the address 127.0.0.1`},
	} {
		for _, via := range []string{"socks", "connect"} {
			w := tlsWorld(t)
			var conn net.Conn
			if via == "socks" {
				var reply int
				if conn, reply = dialSOCKS(t, w.socks(), socksRequest(c.host, c.port)); reply != 0 {
					t.Fatalf("reply %d", reply)
				}
			} else {
				conn = client(t, w.proxy())
				io.WriteString(conn, "CONNECT "+joinHostPort(c.host, c.port)+" HTTP/1.1\r\nHost: x\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: "CONNECT"})
				if err != nil || resp.StatusCode != 200 {
					t.Fatalf("%v %v", resp, err)
				}
			}
			err := tls.Client(conn, &tls.Config{ServerName: c.name, RootCAs: testCA(t).pool}).Handshake()
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s %s:%d with TLS name %s: %v, want %q", via, c.host, c.port, c.name, err, c.want)
			}
			conn.Close()
			closed := w.until("closed")
			if !strings.Contains(closed, c.log) && c.want != "" {
				t.Errorf("%s: recorded %q, want %q", via, closed, c.log)
			}
			if c.want != "" && !strings.Contains(closed, "sent=0") {
				t.Errorf("%s: bytes went out: %s", via, closed)
			}
		}
	}
}

// On 443 a client that does not speak TLS, or nothing, gets no byte through and
// is cut off; on another port it may speak anything, and the server may begin.
func TestNotTLS(t *testing.T) {
	for _, said := range []string{"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "\x16", "\x16\x03", ""} {
		w := tlsWorld(t)
		conn, reply := dialSOCKS(t, w.socks(), socksRequest("example.com", 443))
		if reply != 0 {
			t.Fatalf("reply %d", reply)
		}
		io.WriteString(conn, said)
		if _, err := io.ReadAll(conn); errors.As(err, new(net.Error)) && err.(net.Error).Timeout() {
			t.Errorf("%q on 443: not cut off", said)
		}
		if closed := w.until("closed"); !strings.Contains(closed, "sent=0") {
			t.Errorf("%q on 443: %s", said, closed)
		}
	}
	w := newWorld(t, nil)
	w.allow("mail.example", "93.184.216.34", 25, greeter(t, true))
	conn, _ := dialSOCKS(t, w.socks(), socksRequest("mail.example", 25))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || line != "220 hello\n" {
		t.Errorf("server that speaks first: %q, %v", line, err)
	}
}

// greeter speaks first, and then listens or ends.
func greeter(t *testing.T, listens bool) string {
	var all sync.WaitGroup
	t.Cleanup(func() { waitFor(t, &all, "greeter has not ended") })
	return listen(t, &all, func(c net.Conn) {
		defer c.Close()
		io.WriteString(c, "220 hello\n")
		if listens {
			io.Copy(io.Discard, c)
		}
	})
}
