package egress

import (
	"net/netip"
	"strings"
	"testing"

	"cal/nucleus"
)

// forbiddenExamples has the ends of each range, and what it is called.
var forbiddenExamples = map[string]string{
	"0.0.0.0": "unspecified", "0.255.255.255": "unspecified",
	"10.0.0.0": "private", "10.255.255.255": "private",
	"100.64.0.0": "carrier-grade NAT", "100.100.100.200": "carrier-grade NAT", "100.127.255.255": "carrier-grade NAT",
	"127.0.0.1": "loopback", "127.255.255.255": "loopback",
	"169.254.0.0": "link-local", "169.254.255.255": "link-local", "169.254.169.254": "metadata service", "168.63.129.16": "metadata service",
	"172.16.0.0": "private", "172.31.255.255": "private",
	"192.0.0.0": "reserved", "192.0.0.192": "reserved", "192.0.2.1": "documentation", "192.88.99.1": "6to4 relay",
	"192.168.0.0": "private", "192.168.255.255": "private",
	"198.18.0.0": "benchmark", "198.19.255.255": "benchmark", "198.51.100.7": "documentation", "203.0.113.7": "documentation",
	"224.0.0.1": "multicast", "239.255.255.255": "multicast", "240.0.0.0": "reserved", "255.255.255.255": "reserved",
	"::": "unspecified", "::1": "loopback", "::127.0.0.1": "IPv4 inside IPv6",
	"64:ff9b::127.0.0.1": "loopback", "64:ff9b::169.254.169.254": "metadata service", "64:ff9b::10.1.2.3": "private", "64:ff9b:1::1": "NAT64 of a local network",
	"100::1": "reserved", "2001::1": "Teredo", "2001:0:ffff::": "Teredo", "2001:2::1": "benchmark", "2001:20::1": "reserved", "2001:db8::1": "documentation",
	"2002:7f00:1::": "6to4", "2002:808:808::1": "6to4", "3fff::1": "documentation", "5f00::1": "reserved",
	"fc00::1": "private", "fd00:ec2::254": "private", "fdff::1": "private", "fe80::1": "link-local", "febf::1": "link-local", "fec0::1": "site-local",
	"ff02::1": "multicast", "4000::1": "reserved",
}

var publicExamples = []string{
	"1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0", "169.253.255.255", "172.15.255.255",
	"172.32.0.0", "192.0.1.0", "192.167.255.255", "198.17.255.255", "198.20.0.0", "223.255.255.255",
	"2000::1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::8.8.8.8", "2001:200::1", "2001:4860::8888",
}

func TestGuard(t *testing.T) {
	for addr, what := range forbiddenExamples {
		if err := guard(netip.MustParseAddr(addr)); err == nil || !strings.HasSuffix(err.Error(), " is "+what) {
			t.Errorf("guard(%s) = %v, want it to be %s", addr, err, what)
		}
	}
	for _, addr := range publicExamples {
		if err := guard(netip.MustParseAddr(addr)); err != nil {
			t.Errorf("guard(%s) = %v, want nil", addr, err)
		}
	}
	for _, addr := range []string{"::ffff:8.8.8.8", "2606:4700::1111%eth0"} {
		if err := guard(netip.MustParseAddr(addr)); err == nil {
			t.Errorf("guard(%s) = nil", addr)
		}
	}
}

// A name that leads to any forbidden address is refused, alone or beside a
// public one, and nothing is opened or dialled. The control is the same name on
// a public address.
func TestForbiddenThroughName(t *testing.T) {
	server := echo(t)
	for addr, what := range forbiddenExamples {
		for _, answer := range [][]string{{addr}, {"93.184.216.34", addr}, {addr, "93.184.216.34"}} {
			w := newWorld(t, nil)
			w.allow("rebind.example", "93.184.216.34", 80, server)
			w.links[joinHostPort(addr, 80)] = server
			w.zone["rebind.example"] = answer
			_, refused := w.g.open(t.Context(), Attempt{Pod: "p", Host: "rebind.example", Port: 80})
			if refused == nil || refused.Kind != nucleus.KindDenied || refused.Rule != ruleAddress || !strings.Contains(refused.Message, what) {
				t.Errorf("name on %v: %+v, want refused by %s: %s", answer, refused, ruleAddress, what)
			}
			if w.has("opened") || w.has("dial") || !w.has("refused") {
				t.Errorf("name on %v: %q", answer, w.lines())
			}
		}
	}
	w := newWorld(t, nil)
	w.allow("rebind.example", "93.184.216.34", 80, server)
	p, refused := w.g.open(t.Context(), Attempt{Pod: "p", Host: "rebind.example", Port: 80})
	if refused != nil {
		t.Fatalf("public address: %v", refused.Error)
	}
	p.end(nil)
}

// A mapped answer is the IPv4 address in it.
func TestMappedAnswer(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("mapped.example", "::ffff:10.0.0.1", 80, echo(t))
	if _, refused := w.g.open(t.Context(), Attempt{Pod: "p", Host: "mapped.example", Port: 80}); refused == nil || refused.Rule != ruleAddress {
		t.Errorf("got %+v, want it refused", refused)
	}
	w.zone["mapped.example"] = []string{"::ffff:93.184.216.34"}
	w.links["93.184.216.34:80"] = echo(t)
	p, refused := w.g.open(t.Context(), Attempt{Pod: "p", Host: "mapped.example", Port: 80})
	if refused != nil {
		t.Fatal(refused.Error)
	}
	p.end(nil)
}

// A forbidden address opens only for a host that is that address, by a rule
// that names it or its network; never for a name.
func TestLiteral(t *testing.T) {
	server := echo(t)
	net127 := netip.MustParsePrefix("127.0.0.0/8")
	for _, c := range []struct {
		host     string
		literals []netip.Prefix
		open     bool
	}{
		{"127.0.0.1", nil, false},
		{"127.0.0.1", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, false},
		{"127.0.0.1", []netip.Prefix{netip.MustParsePrefix("::/0")}, false},
		{"name.example", []netip.Prefix{net127}, false},
		{"localhost", []netip.Prefix{net127}, false},
		{"127.0.0.1", []netip.Prefix{net127}, true},
		{"127.0.0.1", []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, true},
	} {
		w := newWorld(t, nil)
		w.zone["name.example"], w.zone["localhost"] = []string{"127.0.0.1"}, []string{"127.0.0.1"}
		w.links["127.0.0.1:80"] = server
		w.rule(joinHostPort(c.host, 80), Ruling{Verdict: nucleus.Allow, Literals: c.literals})
		p, refused := w.g.open(t.Context(), Attempt{Pod: "p", Host: c.host, Port: 80})
		if open := refused == nil; open != c.open {
			t.Errorf("%s with literals %v: open = %t, want %t", c.host, c.literals, open, c.open)
		}
		if p != nil {
			p.end(nil)
		}
		if w.has("resolve 127") {
			t.Error("an address was resolved")
		}
	}
}
