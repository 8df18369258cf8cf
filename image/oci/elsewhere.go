package oci

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/publicsuffix"
)

// guard is the way to a registry and to where it sends who asks: large files mostly lie with
// somebody else. A registry is a stranger, and so it may not have a login sent to a third
// party, nor have the host ask its own network.
type guard struct {
	registry string // host name
	secure   bool   // it speaks TLS

	inside atomic.Bool // the registry itself has an address that is not everybody's
	near   *http.Transport
	far    *http.Transport // dials public addresses alone
}

func newGuard(host string, secure bool) *guard {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	g := &guard{registry: host, secure: secure}
	transport := func(check func(string) error) *http.Transport {
		dialer := net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}
		dialer.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error { return check(address) }
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.ResponseHeaderTimeout, t.DialContext = time.Minute, dialer.DialContext
		return t
	}
	g.near = transport(func(address string) error {
		if !public(address) {
			g.inside.Store(true)
		}
		return nil
	})
	g.far = transport(func(address string) error {
		if !public(address) && !g.inside.Load() {
			return fmt.Errorf("%s is no public address, and the registry sent the way there", address)
		}
		return nil
	})
	return g
}

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	host := req.URL.Hostname()
	if g.secure && req.URL.Scheme != "https" {
		return nil, fmt.Errorf("registry %s sends the way to %s without TLS", g.registry, req.URL.Host)
	}
	if strings.EqualFold(host, g.registry) {
		return g.near.RoundTrip(req)
	}
	if !sameSite(host, g.registry) && (req.Header.Get("Authorization") != "" || req.URL.User != nil || req.Method != http.MethodGet && req.Method != http.MethodHead) {
		return nil, fmt.Errorf("registry %s has its login sent to %s, which is not of the same domain; hint: log out of the registry (docker logout) where the image is for everybody, or use a tarball", g.registry, host)
	}
	if through, err := g.far.Proxy(req); err != nil || through != nil { // which looks the name up itself
		if address, parseErr := netip.ParseAddr(host); parseErr == nil && !publicAddr(address) {
			return nil, fmt.Errorf("%s is no public address, and the registry sent the way there", host)
		}
		return g.near.RoundTrip(req)
	}
	return g.far.RoundTrip(req)
}

// sameSite says whether two names belong to one domain that somebody registered.
func sameSite(a, b string) bool {
	siteA, errA := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(a))
	siteB, errB := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(b))
	if net.ParseIP(a) != nil || net.ParseIP(b) != nil {
		return false
	}
	return errA == nil && errB == nil && siteA == siteB
}

func public(address string) bool {
	at, err := netip.ParseAddrPort(address)
	return err == nil && publicAddr(at.Addr())
}

// shared is the address space between a provider and its customers (RFC 6598).
var shared = netip.MustParsePrefix("100.64.0.0/10")

func publicAddr(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsGlobalUnicast() && !a.IsPrivate() && !shared.Contains(a)
}
