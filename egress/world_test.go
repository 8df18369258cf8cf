package egress

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cal/nucleus"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errTest = errors.New("no disk")

const wait = 10 * time.Second // for what must happen

var testPeer = Peer{Pod: "p-1", Session: "s-1"}

// world is a gateway with an outside that lies on loopback: names resolve to
// public addresses, and the dialer leads these to real listeners.
type world struct {
	t *testing.T
	g *Gateway

	mu       sync.Mutex
	journal  []string            // what happened, in order
	rules    map[string]Ruling   // by host:port; others are denied
	zone     map[string][]string // name -> addresses
	links    map[string]string   // dialled address -> listener
	calls    []ModelCall
	attempts []Attempt // of Decide
	changed  chan struct{}

	decide    func(Attempt) // called within Decide
	decideErr error
	openErr   error
	modelErr  error
	resolve   func(host string) ([]netip.Addr, error)
}

func newWorld(t *testing.T, change func(*Config)) *world {
	w := &world{t: t, rules: map[string]Ruling{}, zone: map[string][]string{}, links: map[string]string{}, changed: make(chan struct{})}
	c := Config{Gate: w, Resolver: w, Dialer: w, Roots: testCA(t).pool}
	if change != nil {
		change(&c)
	}
	w.g = New(c)
	return w
}

func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked(format, args...)
}

func (w *world) noteLocked(format string, args ...any) {
	w.journal = append(w.journal, fmt.Sprintf(format, args...))
	close(w.changed)
	w.changed = make(chan struct{})
}

// until waits for a line that begins with prefix.
func (w *world) until(prefix string) string {
	w.t.Helper()
	deadline := time.After(wait)
	for {
		w.mu.Lock()
		changed := w.changed
		i := slices.IndexFunc(w.journal, func(line string) bool { return strings.HasPrefix(line, prefix) })
		var line string
		if i >= 0 {
			line = w.journal[i]
		}
		w.mu.Unlock()
		if i >= 0 {
			return line
		}
		select {
		case <-changed:
		case <-deadline:
			w.t.Fatalf("no %q in journal:\n%s", prefix, strings.Join(w.lines(), "\n"))
		}
	}
}

func (w *world) lines() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.journal)
}

func (w *world) has(prefix string) bool {
	return slices.ContainsFunc(w.lines(), func(line string) bool { return strings.HasPrefix(line, prefix) })
}

func (w *world) Decide(_ context.Context, a Attempt) (Ruling, error) {
	w.mu.Lock()
	w.attempts = append(w.attempts, a)
	place := joinHostPort(a.Host, a.Port)
	w.noteLocked("decide %s %s", a.Via, place)
	ruling, ok := w.rules[place]
	err, hook := w.decideErr, w.decide
	w.mu.Unlock()
	if hook != nil {
		hook(a)
	}
	if !ok {
		ruling = Ruling{Verdict: nucleus.Deny, Rule: "hosts", Message: place + " is in no rule"}
	}
	return ruling, err
}

func (w *world) Refused(_ context.Context, a Attempt, why *nucleus.Error) {
	w.note("refused %s %s: %s", a.Via, why.Rule, why.Message)
}

func (w *world) Opened(_ context.Context, a Attempt, addr netip.AddrPort) error {
	w.note("opened %s%s", addr, granted(a))
	return w.openErr
}

func (w *world) Closed(a Attempt, sent, received int64, err error) {
	w.note("closed %s%s sent=%d received=%d err=%v", joinHostPort(a.Host, a.Port), granted(a), sent, received, err)
}

func granted(a Attempt) string {
	if a.Grant == "" {
		return ""
	}
	return " grant=" + a.Grant
}

func (w *world) ModelCall(_ context.Context, call ModelCall) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, call)
	w.noteLocked("model done=%t status=%d %s", call.Done, call.Status, call.Path)
	return w.modelErr
}

func (w *world) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	w.note("resolve %s", host)
	if w.resolve != nil {
		return w.resolve(host)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var addrs []netip.Addr
	for _, a := range w.zone[host] {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	if addrs == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, Server: "10.9.8.7:53", IsNotFound: true}
	}
	return addrs, nil
}

func (w *world) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	w.note("dial %s", address)
	w.mu.Lock()
	to, ok := w.links[address]
	w.mu.Unlock()
	if !ok {
		to = address
		if !netip.MustParseAddrPort(address).Addr().IsLoopback() {
			return nil, fmt.Errorf("test traffic would leave loopback: %s", address)
		}
	}
	return (&net.Dialer{}).DialContext(ctx, network, to)
}

// allow makes name a host with a public address behind which listener answers.
func (w *world) allow(name, addr string, port int, listener string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rules[joinHostPort(name, port)] = Ruling{Verdict: nucleus.Allow, Rule: "hosts[0]"}
	w.zone[name] = []string{addr}
	w.links[joinHostPort(addr, port)] = listener
}

func (w *world) rule(place string, r Ruling) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rules[place] = r
}

// front listens on loopback and serves every connection; its clean-up waits
// until all have ended.
func (w *world) front(serve func(context.Context, net.Conn)) string {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	w.t.Cleanup(func() { // after the listener's own
		cancel()
		waitFor(w.t, &all, "serving has not ended with its context")
	})
	return listen(w.t, &all, func(conn net.Conn) { serve(ctx, conn) })
}

func (w *world) socks() string {
	return w.front(func(ctx context.Context, c net.Conn) { w.g.ServeSOCKS(ctx, c, testPeer) })
}

func (w *world) proxy() string {
	return w.front(func(ctx context.Context, c net.Conn) { w.g.ServeProxy(ctx, c, testPeer) })
}

func waitFor(t *testing.T, all *sync.WaitGroup, failure string) {
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(wait):
		t.Error(failure)
	}
}

func listen(t *testing.T, all *sync.WaitGroup, serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { serve(conn) })
		}
	})
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// echo answers with what it gets.
func echo(t *testing.T) string {
	var all sync.WaitGroup
	t.Cleanup(func() { waitFor(t, &all, "echo server has not ended") })
	return listen(t, &all, func(c net.Conn) {
		defer c.Close()
		io.Copy(c, c)
	})
}

// ca is an authority for names of the tests.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

var sharedCA = sync.OnceValues(func() (*ca, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &ca{cert, key, pool}, nil
})

func testCA(t testing.TB) *ca {
	c, err := sharedCA()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *ca) certificate(t testing.TB, names ...string) tls.Certificate {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, &c.key.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: c.key}
}

// site serves HTTP on loopback, with TLS if names are given.
func site(t *testing.T, handler http.HandlerFunc, names ...string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	server := &http.Server{Handler: handler, ErrorLog: discardLog}
	var all sync.WaitGroup
	if names == nil {
		all.Go(func() { server.Serve(l) })
	} else {
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{testCA(t).certificate(t, names...)}}
		all.Go(func() { server.ServeTLS(l, "", "") })
	}
	t.Cleanup(func() {
		server.Close()
		waitFor(t, &all, "site has not ended")
	})
	return address
}

// client opens a connection on which everything has a deadline.
func client(t *testing.T, address string) net.Conn {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(wait))
	return conn
}

// ask sends raw bytes to an HTTP server and reads one response.
func ask(t *testing.T, address, raw string) (*http.Response, string) {
	t.Helper()
	conn := client(t, address)
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%.200q: %v", raw, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%.200q: %v", raw, err)
	}
	return resp, string(body)
}

var discardLog = log.New(io.Discard, "", 0)
