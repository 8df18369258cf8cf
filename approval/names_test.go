package approval

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// The first are the samples of RFC 3492, 7.1.
func TestPunycode(t *testing.T) {
	for encoded, want := range map[string]string{
		"egbpdaj6bu4bxfgehfvwxn":                                                "ليهمابتكلموشعربي؟",
		"ihqwcrb4cv8a8dqg056pqjye":                                              "他们为什么不说中文",
		"Proprostnemluvesky-uyb24dma41a":                                        "Pročprostěnemluvíčesky",
		"b1abfaaepdrnnbgefbadotcwatmq2g4l":                                      "почемужеонинеговорятпорусски",
		"PorqunopuedensimplementehablarenEspaol-fmd56a":                         "PorquénopuedensimplementehablarenEspañol",
		"989aomsvi5e83db1d2a355cv1e0vak1dwrv93d5xbh15a0dt30a5jpsd879ccm6fea98c": "세계의모든사람들이한국어를이해한다면얼마나좋을까",
		"3B-ww4c5e180e575a65lsy2b":                                              "3年B組金八先生",
		"80ak6aa92e":                                                            "аррӏе",
		"pple-43d":                                                              "аpple",
	} {
		got, ok := fromPunycode(encoded)
		if !ok || got != want {
			t.Errorf("%s: %q, %v, want %q", encoded, got, ok, want)
		}
	}
	for _, bad := range []string{"", "abc-", "-", "9999999999999999999999", "a-!", "99999b", "é"} {
		if got, ok := fromPunycode(bad); ok {
			t.Errorf("%q stands for %q, want nothing", bad, got)
		}
	}
}

func TestOddNames(t *testing.T) {
	for name, want := range map[string]string{
		"xn--80ak6aa92e.com":                           `"xn--80ak6aa92e" stands for "\u{430}\u{440}\u{440}\u{4cf}\u{435}", letters beyond ASCII|"\u{430}\u{440}\u{440}\u{4cf}\u{435}" looks like "apple" and is not`,
		"https://XN--pple-43d.com/x":                   `"XN--pple-43d" stands for "\u{430}pple", letters beyond ASCII|"\u{430}pple" mixes letters of Cyrillic and Latin|"\u{430}pple" looks like "apple" and is not`,
		"git@g\u0456thub.com:o/r.git":                  `"g\u{456}thub" mixes letters of Cyrillic and Latin|"g\u{456}thub" looks like "github" and is not`,
		"xn--.com":                                     `"xn--" is no name in Punycode, though it begins like one`,
		"b\u00fccher.example":                          "",
		"xn--bcher-kva.example":                        `"xn--bcher-kva" stands for "b\u{fc}cher", letters beyond ASCII`,
		"3\u5e74b\u7d44.example":                       "",
		"\u03b1pi.example":                             `"\u{3b1}pi" mixes letters of Greek and Latin|"\u{3b1}pi" looks like "api" and is not`,
		"plain.example:443":                            "",
		"127.0.0.1":                                    "",
		"[2001:db8::1]":                                "",
		"git.example/xn--80ak6aa92e":                   `"xn--80ak6aa92e" stands for "\u{430}\u{440}\u{440}\u{4cf}\u{435}", letters beyond ASCII|"\u{430}\u{440}\u{440}\u{4cf}\u{435}" looks like "apple" and is not`,
		"\u043f\u0440\u0438\u043c\u0435\u0440.example": "",
	} {
		if got := strings.Join(oddNames(name), "|"); got != want {
			t.Errorf("%q:\n got %s\nwant %s", name, got, want)
		}
	}
}

func FuzzOddNames(f *testing.F) {
	for _, seed := range []string{"xn--80ak6aa92e.com", "xn--a-0000000000", "xn--", "a\u0430", "xn--99999999999999999999999999999999999999999999999"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		for _, note := range oddNames(name) {
			for i := range len(note) {
				if note[i] < 0x20 || note[i] > 0x7e {
					t.Fatalf("%q: byte 0x%02x in %q", name, note[i], note)
				}
			}
		}
		if label, ok := strings.CutPrefix(name, "xn--"); ok {
			if got, ok := fromPunycode(label); ok && !utf8.ValidString(got) {
				t.Fatalf("%q stands for %q", name, got)
			}
		}
	})
}
