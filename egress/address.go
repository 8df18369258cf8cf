package egress

import (
	"fmt"
	"net/netip"
)

// forbidden lists what no host name may lead to (IANA special-purpose address
// registries, and the addresses at which clouds serve credentials). The first
// match names the reason.
var forbidden = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("169.254.169.254/32"), "metadata service"},
	{netip.MustParsePrefix("168.63.129.16/32"), "metadata service"}, // Azure: an address of the public range
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("10.0.0.0/8"), "private"},
	{netip.MustParsePrefix("100.64.0.0/10"), "carrier-grade NAT"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("172.16.0.0/12"), "private"},
	{netip.MustParsePrefix("192.0.0.0/24"), "reserved"},
	{netip.MustParsePrefix("192.0.2.0/24"), "documentation"},
	{netip.MustParsePrefix("192.88.99.0/24"), "6to4 relay"},
	{netip.MustParsePrefix("192.168.0.0/16"), "private"},
	{netip.MustParsePrefix("198.18.0.0/15"), "benchmark"},
	{netip.MustParsePrefix("198.51.100.0/24"), "documentation"},
	{netip.MustParsePrefix("203.0.113.0/24"), "documentation"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved"},

	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4 inside IPv6"},
	{netip.MustParsePrefix("::/96"), "IPv4 inside IPv6"},
	{netip.MustParsePrefix("64:ff9b:1::/48"), "NAT64 of a local network"},
	{netip.MustParsePrefix("2001::/32"), "Teredo"},
	{netip.MustParsePrefix("2001:2::/48"), "benchmark"},
	{netip.MustParsePrefix("2001::/23"), "reserved"},
	{netip.MustParsePrefix("2001:db8::/32"), "documentation"},
	{netip.MustParsePrefix("2002::/16"), "6to4"},
	{netip.MustParsePrefix("3fff::/20"), "documentation"},
	{netip.MustParsePrefix("fc00::/7"), "private"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fec0::/10"), "site-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

var (
	globalIPv6 = netip.MustParsePrefix("2000::/3")
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
)

// guard returns an error that names the reason when addr may not be reached
// through a host name. An IPv4 address behind the well-known NAT64 prefix is
// judged as itself.
func guard(addr netip.Addr) error {
	if addr.Zone() != "" {
		return fmt.Errorf("address %s has a zone", addr)
	}
	judged := addr
	if nat64.Contains(addr) {
		b := addr.As16()
		judged = netip.AddrFrom4([4]byte(b[12:]))
	}
	for _, f := range forbidden {
		if f.prefix.Contains(judged) {
			return fmt.Errorf("address %s is %s", addr, f.what)
		}
	}
	if judged.Is6() && !globalIPv6.Contains(judged) {
		return fmt.Errorf("address %s is reserved", addr)
	}
	return nil
}
