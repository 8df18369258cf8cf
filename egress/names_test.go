package egress

import (
	"net/netip"
	"strings"
	"testing"
)

var badHosts = []string{
	"", ".", "..", "a..b", ".example.com", "example.com..",
	"evil\x00.google.com", "evil.com\x00", "\x00",
	"a\r\nb", "example.com\r\n", "example.com\n", "exa\tmple.com", " example.com", "example.com ", "exam ple.com",
	"%65vil.com", "example.com%00", "fe80::1%eth0", "fe80::1%25eth0", "::1%1",
	"[example.com]", "[::1]", "[127.0.0.1]", "example.com:80", "a:b",
	"user@example.com", "example.com/x", "example.com?x", "example.com#x", `example.com\x`, "*.example.com",
	"2130706433", "127.1", "0x7f.1", "0x7f000001", "0X7F.0.0.1", "0177.0.0.1", "127.0.0.01", "127.0.0.1.", "1.2.3", "1.2.3.4.5",
	"256.0.0.1", "127.0.0.0x1", "example.0x", "example.123", "0x", "0", "00", "1.2.3.4x:",
	"::ffff:127.0.0.1", "::ffff:7f00:1", "::FFFF:8.8.8.8", "0:0:0:0:0:ffff:10.0.0.1",
	"exämple.com", "example。com", "ⓔxample.com", "１２７.0.0.1", "\xff.com", "\u200bexample.com", "\u202eexample.com",
	"-example.com", "example-.com", "a.-b.com",
	strings.Repeat("a", 64) + ".com", strings.Repeat("a.", 127) + "aa",
}

var goodHosts = map[string]string{
	"example.com":                  "example.com",
	"EXAMPLE.Com":                  "example.com",
	"example.com.":                 "example.com",
	"localhost":                    "localhost",
	"xn--exmple-cua.com":           "xn--exmple-cua.com",
	"_dmarc.a-b.example.com":       "_dmarc.a-b.example.com",
	"1.example.com":                "1.example.com",
	"0x7f.example.com":             "0x7f.example.com",
	"127.0.0.1.example.com":        "127.0.0.1.example.com",
	"127.0.0.1":                    "127.0.0.1",
	"8.8.8.8":                      "8.8.8.8",
	"::1":                          "::1",
	"2001:DB8:0:0:0:0:0:1":         "2001:db8::1",
	"64:ff9b::8.8.8.8":             "64:ff9b::808:808",
	"a.b.c.d.e.f.0xg":              "a.b.c.d.e.f.0xg",
	strings.Repeat("a", 63) + ".a": strings.Repeat("a", 63) + ".a",
}

func TestParseHost(t *testing.T) {
	for _, bad := range badHosts {
		if got, err := ParseHost(bad); err == nil {
			t.Errorf("ParseHost(%q) = %q, want an error", bad, got)
		}
	}
	for in, want := range goodHosts {
		if got, err := ParseHost(in); err != nil || got != want {
			t.Errorf("ParseHost(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
}

func FuzzParseHost(f *testing.F) {
	for _, s := range badHosts {
		f.Add(s)
	}
	for s := range goodHosts {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, err := ParseHost(s)
		if err != nil {
			return
		}
		if again, err := ParseHost(host); err != nil || again != host {
			t.Fatalf("ParseHost(%q) = %q, which reads as %q, %v", s, host, again, err)
		}
		if i := strings.IndexFunc(host, func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune(`%[]/\@?#"`, c) }); i >= 0 {
			t.Fatalf("ParseHost(%q) = %q: byte %d", s, host, i)
		}
		if host != strings.ToLower(host) || strings.HasSuffix(host, ".") {
			t.Fatalf("ParseHost(%q) = %q: another spelling", s, host)
		}
		last := host[strings.LastIndexByte(host, '.')+1:]
		addr, err := netip.ParseAddr(host)
		if err != nil && isNumber(last) {
			t.Fatalf("ParseHost(%q) = %q: a resolver reads an address", s, host)
		}
		if err == nil && (addr.Is4In6() || addr.Zone() != "" || addr.String() != host) {
			t.Fatalf("ParseHost(%q) = %q: not the one spelling", s, host)
		}
	})
}

func TestParseHostPort(t *testing.T) {
	for _, bad := range []string{
		"", ":80", "example.com", "example.com:", "example.com:0", "example.com:65536", "example.com:-1", "example.com:+80", "example.com:080",
		"example.com: 80", "example.com:80 ", "example.com:8\x000", "example.com:http", "a:b:80", "::1:80", "[::1", "[::1]", "[::1]80", "[::1]:",
		"[127.0.0.1]:80", "[example.com]:80", "[[::1]]:80", "[fe80::1%eth0]:80", "[::ffff:1.2.3.4]:80", "evil.com:80@example.com:80", "example.com:80/x",
	} {
		if host, port, err := ParseHostPort(bad, 0); err == nil {
			t.Errorf("ParseHostPort(%q) = %q, %d, want an error", bad, host, port)
		}
	}
	for in, want := range map[string]string{
		"example.com:443": "example.com:443", "[::1]:1": "[::1]:1", "Example.COM.:65535": "example.com:65535", "10.0.0.1:22": "10.0.0.1:22",
	} {
		host, port, err := ParseHostPort(in, 0)
		if got := joinHostPort(host, port); err != nil || got != want {
			t.Errorf("ParseHostPort(%q) = %s, %v, want %s", in, got, err, want)
		}
	}
}

func TestParseTarget(t *testing.T) {
	for _, bad := range []string{
		"", "/x", "example.com", "//example.com/", "ftp://example.com/", "file:///etc/passwd", "http:example.com", "http://", "http:///x",
		"http://user@example.com/", "http://user:pw@example.com/", "http://example.com@evil.com/", `http://example.com\@evil.com/`, `http:\\example.com/`,
		"http://example.com/a/../b", "http://example.com/a/%2e%2e/b", "http://example.com/a%2f..%2fb", "http://example.com/.", "http://example.com/a/%2E", "http://example.com/a%5c..%5cb",
		"http://example.com/a b", "http://example.com/\r\nx", "http://example.com/\x00", "http://exam%70le.com/", "http://ex%C3%A4mple.com/", "http://[::1%25eth0]/",
		"http://2130706433/", "http://0x7f.1/", "http://[::ffff:7f00:1]/", "http://example.com:0/", "http://example.com:99999/", "http://example.com/%zz",
		"http://example.com/" + strings.Repeat("a", maxURL),
	} {
		if got, err := parseTarget(bad); err == nil {
			t.Errorf("parseTarget(%.80q) = %s, want an error", bad, got)
		}
	}
	for in, want := range map[string]string{
		"http://example.com":                             "http://example.com/",
		"HTTP://Example.COM.:80/A?b=c#d":                 "http://example.com/A?b=c",
		"https://example.com:443/":                       "https://example.com/",
		"https://example.com:8443/":                      "https://example.com:8443/",
		"http://[::1]/":                                  "http://[::1]/",
		"http://[2001:DB8::1]:8080/x":                    "http://[2001:db8::1]:8080/x",
		"https://registry.npmjs.org/@types%2fnode":       "https://registry.npmjs.org/@types%2fnode",
		"https://example.com/a..b/...":                   "https://example.com/a..b/...",
		"https://example.com/?next=http://x/../y%00":     "https://example.com/?next=http://x/../y%00",
		"https://gitlab.com/api/v4/projects/group%2Fx/z": "https://gitlab.com/api/v4/projects/group%2Fx/z",
	} {
		got, err := parseTarget(in)
		if err != nil || got.String() != want {
			t.Errorf("parseTarget(%q) = %s, %v, want %s", in, got, err, want)
		}
	}
}

func FuzzParseTarget(f *testing.F) {
	f.Add("http://example.com:80/a%2fb?c#d")
	f.Add("https://[::1]:443//")
	f.Add("http://a@b/")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseTarget(s)
		if err != nil {
			return
		}
		if again, err := parseTarget(got.String()); err != nil || again != got {
			t.Fatalf("parseTarget(%q) = %s, which reads as %s, %v", s, got, again, err)
		}
	})
}
