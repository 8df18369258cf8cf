package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// methods is a set of HTTP methods. The highest bit stands for all that is not
// in the list, connections that nobody can look into included.
type methods uint8

const allMethods methods = 0xff

var methodNames = [...]string{"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}

func methodOf(name string) methods {
	if i := slices.Index(methodNames[:], name); i >= 0 {
		return 1 << i
	}
	return 1 << len(methodNames)
}

func (m methods) list() []string {
	var names []string
	for i, name := range methodNames {
		if m&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// hostRule opens one port of a name, of all names below a suffix, or of a range
// of addresses. With methods or a path it opens only requests that the gateway
// sees whole. trusted requests count on no leg.
type hostRule struct {
	name    string       // "example.org"; with wild, ".example.org" for all names below
	wild    bool         //
	addr    netip.Prefix // valid: a rule for addresses, and name is empty
	port    uint16
	methods methods
	path    span // zero with anyPath
	anyPath bool // looser than "/**": a connection has no path
	trusted bool
}

// opaque reports whether the rule also opens connections that nobody looks into.
func (r hostRule) opaque() bool { return r.methods == allMethods && r.anyPath }

func (r hostRule) leq(s hostRule) bool {
	return r.port == s.port && r.methods&^s.methods == 0 && (s.trusted || !r.trusted) &&
		r.hostLeq(s) && (s.anyPath || !r.anyPath && r.path.leq(s.path))
}

func (r hostRule) hostLeq(s hostRule) bool {
	if r.addr.IsValid() || s.addr.IsValid() {
		return r.addr.IsValid() && s.addr.IsValid() &&
			s.addr.Bits() <= r.addr.Bits() && s.addr.Contains(r.addr.Addr())
	}
	if s.wild {
		return strings.HasSuffix(r.name, s.name) // of a wild r too: its name begins with the dot
	}
	return !r.wild && r.name == s.name
}

func (r hostRule) meet(s hostRule) (hostRule, bool) {
	out := r
	switch {
	case r.port != s.port:
		return hostRule{}, false
	case r.hostLeq(s):
	case s.hostLeq(r):
		out.name, out.wild, out.addr = s.name, s.wild, s.addr
	default:
		return hostRule{}, false
	}
	out.methods = r.methods & s.methods
	out.trusted = r.trusted && s.trusted
	switch {
	case r.anyPath:
		out.path, out.anyPath = s.path, s.anyPath
	case !s.anyPath:
		var ok bool
		if out.path, ok = r.path.meet(s.path); !ok {
			return hostRule{}, false
		}
	}
	return out, out.methods != 0
}

// host is the rule's host as it is written in a file.
func (r hostRule) host() string {
	switch {
	case r.addr.IsSingleIP():
		return r.addr.Addr().String()
	case r.addr.IsValid():
		return r.addr.String()
	case r.wild:
		return "*" + r.name
	}
	return r.name
}

// pathText is the rule's path as it is written in a file.
func (r hostRule) pathText() string {
	if r.path.below && r.path.base == "" {
		return "/**"
	}
	return r.path.String()
}

func (r hostRule) kin() string {
	if r.wild || r.addr.IsValid() && !r.addr.IsSingleIP() {
		return ""
	}
	return r.host()
}

// String is the rule in one line: "api.github.com port 443 GET,POST /repos/**
// trusted".
func (r hostRule) String() string {
	var b strings.Builder
	b.WriteString(r.host())
	b.WriteString(" port ")
	b.WriteString(strconv.Itoa(int(r.port)))
	if r.methods != allMethods {
		b.WriteByte(' ')
		b.WriteString(strings.Join(r.methods.list(), ","))
	}
	if !r.anyPath {
		b.WriteByte(' ')
		b.WriteString(r.pathText())
	}
	if r.trusted {
		b.WriteString(" trusted")
	}
	return b.String()
}

// peer is the host of an action, read once for all rules.
type peer struct {
	name string
	addr netip.Addr // valid: the host is an address
}

// readPeer refuses hosts that two resolvers could understand differently:
// upper case, a trailing dot, brackets, NUL, a last label that is a number
// ("127.1", "0x7f.1") without being an address.
func readPeer(host string) (peer, bool) {
	if looksLikeAddress(host) {
		addr, err := netip.ParseAddr(host)
		if err != nil || addr.Zone() != "" {
			return peer{}, false
		}
		return peer{addr: addr.Unmap()}, true
	}
	return peer{name: host}, cleanName(host)
}

func looksLikeAddress(host string) bool {
	if strings.IndexByte(host, ':') >= 0 {
		return true
	}
	last := host[strings.LastIndexByte(host, '.')+1:]
	if len(last) >= 2 && last[0] == '0' && (last[1] == 'x' || last[1] == 'X') {
		return true
	}
	for i := range len(last) {
		if last[i] < '0' || last[i] > '9' {
			return false
		}
	}
	return last != ""
}

func cleanName(host string) bool {
	if host == "" || len(host) > 253 {
		return false
	}
	label := 0
	for i := range len(host) {
		switch c := host[i]; {
		case c == '.':
			if label == 0 {
				return false
			}
			label = 0
			continue
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '_', c == '-' && label > 0:
			label++
		default:
			return false
		}
		if label > 63 {
			return false
		}
	}
	return label > 0
}

func (r hostRule) opens(p peer, port int) bool {
	if int(r.port) != port {
		return false
	}
	if p.addr.IsValid() {
		return r.addr.IsValid() && r.addr.Contains(p.addr)
	}
	if r.addr.IsValid() {
		return false
	}
	if r.wild {
		return len(p.name) > len(r.name) && strings.HasSuffix(p.name, r.name)
	}
	return p.name == r.name
}

// opensRequest judges a request whose peer the rule opens. A path that a server
// could read as another one satisfies no rule that names a path.
func (r hostRule) opensRequest(method methods, path string) bool {
	return r.methods&method != 0 && (r.anyPath || cleanURLPath(path) && r.path.matches(path))
}

// cleanURLPath refuses what servers decode, fold or cut before they look up a
// path: dot segments (also with parameters, "..;x"), empty segments, encoded
// dots, slashes, backslashes and percent signs, queries and fragments.
func cleanURLPath(path string) bool {
	if path == "" || path[0] != '/' {
		return false
	}
	for i := range len(path) {
		switch c := path[i]; {
		case c <= ' ', c >= 0x7f, c == '\\', c == '?', c == '#':
			return false
		case c == '%' && !harmlessEscape(path[i:]):
			return false
		}
	}
	for rest, more := path[1:], true; more; {
		var segment string
		segment, rest, more = strings.Cut(rest, "/")
		if segment == "" && more || segment == "." || strings.HasPrefix(segment, "..") || strings.HasPrefix(segment, ".;") {
			return false
		}
	}
	return true
}

func harmlessEscape(s string) bool {
	if len(s) < 3 {
		return false
	}
	c, err := strconv.ParseUint(s[1:3], 16, 8)
	return err == nil && c >= ' ' && !strings.ContainsRune(`./\%;`, rune(c))
}

// parseHost reads the host of a rule: a name, "*.suffix", an address or a CIDR.
func parseHost(text string) (hostRule, error) {
	const want = "want a name, \"*.suffix\", an address or a CIDR"
	if strings.ContainsRune(text, '/') {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return hostRule{}, fmt.Errorf("host %q is no CIDR; %s", text, want)
		}
		if prefix.Addr().Is4In6() {
			return hostRule{}, fmt.Errorf("host %q is an IPv4 range written as IPv6; want the IPv4 range", text)
		}
		if prefix != prefix.Masked() {
			return hostRule{}, fmt.Errorf("host %q has bits set after its prefix; want %q", text, prefix.Masked())
		}
		return hostRule{addr: prefix}, nil
	}
	if text == "*" {
		return hostRule{}, errors.New(`host "*" is no pattern; want "*.suffix", or "hosts: any" for every host`)
	}
	name, wild := strings.ToLower(text), false
	if rest, ok := strings.CutPrefix(name, "*."); ok {
		name, wild = rest, true
	}
	p, ok := readPeer(name)
	switch {
	case !ok || wild && p.addr.IsValid():
		return hostRule{}, fmt.Errorf("host %q is no host; %s", text, want)
	case p.addr.IsValid():
		return hostRule{addr: netip.PrefixFrom(p.addr, p.addr.BitLen())}, nil
	case wild:
		return hostRule{name: "." + name, wild: true}, nil
	}
	return hostRule{name: name}, nil
}

// parseURLPath reads the path of a rule: exact, or "prefix/**" for the prefix
// and all below it.
func parseURLPath(text string) (span, error) {
	base, below := strings.CutSuffix(text, "/**")
	clean := cleanURLPath(base) && !(below && strings.HasSuffix(base, "/"))
	if !clean && !(below && base == "") || strings.ContainsAny(base, "*%") {
		return span{}, fmt.Errorf("path %q is no pattern; want a clean path like \"/repos\", or \"/repos/**\" for it and all below", text)
	}
	return span{base, below}, nil
}

// check tells what is wrong with a whole rule.
func (r hostRule) check() error {
	if r.trusted && (r.methods == allMethods || r.anyPath) {
		return errors.New("a trusted rule counts on no leg, so it must list methods and a path")
	}
	return nil
}

// Literals returns the addresses below which the gateway may dial for host:port
// although they are private, loopback or otherwise reserved: those that a rule
// names by a literal address or CIDR, never by a host name. host is what was
// asked for, as in an action. A rule with methods or a path counts only for the
// very address that was asked for, because only then Decide has judged the
// request by that rule.
func (p *Policy) Literals(host string, port int) []netip.Prefix {
	asked, ok := readPeer(host)
	if !ok {
		return nil
	}
	var literals []netip.Prefix
	for _, r := range p.hosts.only {
		switch {
		case !r.addr.IsValid() || int(r.port) != port:
		case asked.addr.IsValid() && r.addr.Contains(asked.addr):
			literals = append(literals, r.addr)
		case !asked.addr.IsValid() && r.opaque():
			literals = append(literals, r.addr)
		}
	}
	return literals
}

// NamesHost reports whether a rule opens port of this very name, not by a pattern: to
// ask a resolver for it tells nobody anything that the policy's writer did not write.
func (p *Policy) NamesHost(host string, port int) bool {
	asked, ok := readPeer(host)
	if !ok || asked.addr.IsValid() {
		return false
	}
	for i := range p.hosts.only {
		if r := &p.hosts.only[i]; !r.wild && r.opens(asked, port) {
			return true
		}
	}
	return false
}

// TrustedRules lists the host rules that count on no leg, one line each: they
// are assumptions of whoever wrote the policy, and are shown as such.
func (p *Policy) TrustedRules() []string {
	var rules []string
	for _, r := range p.hosts.only {
		if r.trusted {
			rules = append(rules, r.String())
		}
	}
	return rules
}
