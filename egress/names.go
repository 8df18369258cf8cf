package egress

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

const (
	maxName = 253  // bytes of a host name (RFC 1035, 2.3.4, without the root's dot)
	maxURL  = 8192 // bytes of a URL
)

// ParseHost returns the one spelling of a host: a name in lower case without
// the root's dot, or an address as netip writes it. Every host that reaches the
// gateway comes through here, so that policy, resolver and TLS see the same
// bytes. Refused is whatever two programs could read differently: control
// characters, spaces, percent signs, brackets, text that is not ASCII (an
// international name comes as punycode), IPv4 in decimal, octal, hexadecimal or
// short form, IPv4 inside IPv6, zones.
func ParseHost(s string) (string, error) {
	name, err := parseHost(s)
	if err != nil {
		return "", fmt.Errorf("host %.80q: %w", s, err)
	}
	return name, nil
}

func parseHost(s string) (string, error) {
	if strings.IndexByte(s, ':') >= 0 {
		return parseLiteral(s)
	}
	name := strings.TrimSuffix(s, ".")
	if name == "" {
		return "", errors.New("empty")
	}
	if len(name) > maxName {
		return "", fmt.Errorf("%d bytes, at most %d", len(name), maxName)
	}
	for i := 0; i < len(name); i++ {
		if !isNameByte(name[i]) {
			return "", fmt.Errorf("byte %#02x at %d belongs to no host name", name[i], i)
		}
	}
	name = strings.ToLower(name)
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return "", fmt.Errorf("label %.70q", label)
		}
	}
	if isNumber(labels[len(labels)-1]) {
		if s != name {
			return "", errors.New("an address has no trailing dot and no letters in upper case")
		}
		return parseLiteral(name)
	}
	return name, nil
}

func parseLiteral(s string) (string, error) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return "", errors.New("ends in a number and is not an address in its usual form")
	case addr.Zone() != "":
		return "", errors.New("address with a zone")
	case addr.Is4In6():
		return "", fmt.Errorf("IPv4 inside IPv6; the address is %s", addr.Unmap())
	}
	return addr.String(), nil
}

func isNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.'
}

// isNumber reports whether resolvers and inet_aton would read a name that ends
// in this label as an IPv4 address (URL standard, "ends in a number").
func isNumber(label string) bool {
	digits, hex := strings.CutPrefix(label, "0x")
	for i := 0; i < len(digits); i++ {
		c := digits[i]
		if !('0' <= c && c <= '9') && !(hex && 'a' <= c && c <= 'f') {
			return false
		}
	}
	return true
}

// ParseHostPort splits HOST:PORT or [ADDRESS]:PORT. Where the port is left out
// it is missing, or an error if missing is 0.
func ParseHostPort(s string, missing int) (string, int, error) {
	host, digits, given, err := splitPort(s)
	if err != nil {
		return "", 0, err
	}
	host, err = ParseHost(host)
	if err != nil {
		return "", 0, err
	}
	if !given {
		if missing == 0 {
			return "", 0, fmt.Errorf("%.80q names no port", s)
		}
		return host, missing, nil
	}
	port, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || port == 0 || digits[0] == '0' {
		return "", 0, fmt.Errorf("port %.20q is not a number from 1 to 65535", digits)
	}
	return host, int(port), nil
}

func splitPort(s string) (host, port string, given bool, err error) {
	if inside, ok := strings.CutPrefix(s, "["); ok {
		host, rest, ok := strings.Cut(inside, "]")
		if addr, err := netip.ParseAddr(host); !ok || err != nil || !addr.Is6() {
			return "", "", false, fmt.Errorf("%.80q: brackets hold an IPv6 address and nothing else", s)
		}
		port, given := strings.CutPrefix(rest, ":")
		if rest != "" && !given {
			return "", "", false, fmt.Errorf("%.80q: data after the bracket", s)
		}
		return host, port, given, nil
	}
	host, port, given = strings.Cut(s, ":")
	if strings.IndexByte(port, ':') >= 0 {
		return "", "", false, fmt.Errorf("%.80q: an IPv6 address with a port stands in brackets", s)
	}
	return host, port, given, nil
}

// target is a URL in the one spelling that is judged, shown and sent.
type target struct {
	scheme string
	host   string
	port   int
	path   string // escaped, begins with a slash
	query  string // without the question mark
}

// parseTarget reads an absolute http or https URL. A fragment is dropped: it is
// never sent. Refused are user names, backslashes and dot segments, in every
// encoding, because a server may read them differently from a rule.
func parseTarget(raw string) (target, error) {
	t, err := parseURL(raw)
	if err != nil {
		return target{}, fmt.Errorf("URL %.120q: %w", raw, err)
	}
	return t, nil
}

func parseURL(raw string) (target, error) {
	if len(raw) > maxURL {
		return target{}, fmt.Errorf("%d bytes, at most %d", len(raw), maxURL)
	}
	for i := 0; i < len(raw); i++ {
		if c := raw[i]; c <= ' ' || c > '~' || c == '\\' {
			return target{}, fmt.Errorf("byte %#02x at %d", c, i)
		}
	}
	u, err := url.Parse(raw)
	if err != nil {
		return target{}, errors.Unwrap(err)
	}
	t := target{scheme: u.Scheme, path: u.EscapedPath(), query: u.RawQuery}
	missing := map[string]int{"http": 80, "https": 443}[u.Scheme]
	switch {
	case missing == 0:
		return target{}, fmt.Errorf("scheme %.20q is neither http nor https", u.Scheme)
	case u.User != nil:
		return target{}, errors.New("holds a user name")
	case u.Opaque != "":
		return target{}, errors.New("has no authority")
	}
	if t.host, t.port, err = ParseHostPort(u.Host, missing); err != nil {
		return target{}, err
	}
	for segment := range strings.FieldsFuncSeq(u.Path, func(r rune) bool { return r == '/' || r == '\\' }) {
		if segment == "." || segment == ".." {
			return target{}, fmt.Errorf("path with the segment %q", segment)
		}
	}
	if t.path == "" {
		t.path = "/"
	}
	return t, nil
}

// authority is HOST or HOST:PORT, as the Host field carries it.
func (t target) authority() string {
	if t.scheme == "http" && t.port == 80 || t.scheme == "https" && t.port == 443 {
		if strings.IndexByte(t.host, ':') >= 0 {
			return "[" + t.host + "]"
		}
		return t.host
	}
	return joinHostPort(t.host, t.port)
}

func (t target) String() string {
	s := t.scheme + "://" + t.authority() + t.path
	if t.query != "" {
		s += "?" + t.query
	}
	return s
}

func joinHostPort(host string, port int) string {
	return net.JoinHostPort(host, strconv.Itoa(port))
}
