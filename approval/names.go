package approval

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// lookalikes are letters that a person takes for a Latin one: the lower-case letters of
// Cyrillic, Greek and Armenian that most typefaces draw alike (Unicode UTS 39 has more).
var lookalikes = map[rune]rune{
	'а': 'a', 'в': 'b', 'с': 'c', 'ԁ': 'd', 'е': 'e', 'ё': 'e', 'ғ': 'f', 'ԍ': 'g', 'һ': 'h', 'н': 'h', 'і': 'i', 'ї': 'i', 'ј': 'j', 'к': 'k', 'ӏ': 'l', 'м': 'm',
	'п': 'n', 'о': 'o', 'р': 'p', 'ԛ': 'q', 'г': 'r', 'ѕ': 's', 'т': 't', 'ц': 'u', 'ѵ': 'v', 'ԝ': 'w', 'х': 'x', 'у': 'y', 'ү': 'y', 'з': '3',
	'α': 'a', 'β': 'b', 'ε': 'e', 'η': 'n', 'ι': 'i', 'κ': 'k', 'ν': 'v', 'ο': 'o', 'ρ': 'p', 'σ': 'o', 'τ': 't', 'υ': 'u', 'χ': 'x', 'ω': 'w', 'γ': 'y',
	'օ': 'o', 'ո': 'n', 'ս': 'u', 'հ': 'h', 'ց': 'g', 'յ': 'j', 'ք': 'p', 'ı': 'i', 'ɑ': 'a', 'ɡ': 'g', 'ɩ': 'i', 'ʏ': 'y',
}

// maxOddName is more than a host name and a forge's path have; the rest of a longer text is
// shown, and not looked at.
const maxOddName = 4096

// together are scripts that one language writes in one word.
var together = [][]string{{"Han", "Hiragana", "Katakana", "Latin"}, {"Han", "Hangul", "Latin"}, {"Han", "Bopomofo", "Latin"}}

// oddNames says, a line each, what in a host name or URL is not what it may look like: a
// label in Punycode (RFC 3492) with what it stands for, scripts mixed in one label, and a
// label all of whose letters look like Latin ones.
func oddNames(text string) []string {
	var notes []string
	text = text[:min(len(text), maxOddName)]
	for _, label := range strings.FieldsFunc(text, func(r rune) bool { return r < unicode.MaxASCII && r != '-' && !isAlphanumeric(r) }) {
		shown := label
		if strings.HasPrefix(strings.ToLower(label), "xn--") {
			decoded, ok := fromPunycode(label[len("xn--"):])
			if !ok {
				notes = append(notes, quote(label)+" is no name in Punycode, though it begins like one")
				continue
			}
			shown = decoded
			notes = append(notes, quote(label)+" stands for "+quote(decoded)+", letters beyond ASCII")
		} else if !strings.ContainsFunc(label, func(r rune) bool { return r > unicode.MaxASCII }) {
			continue
		}
		if mixed := scripts(shown); len(mixed) > 1 && !slices.ContainsFunc(together, func(set []string) bool { return subset(mixed, set) }) {
			notes = append(notes, fmt.Sprintf("%s mixes letters of %s", quote(shown), strings.Join(mixed, " and ")))
		}
		if latin := latinLook(shown); latin != shown && !strings.ContainsFunc(latin, func(r rune) bool { return r > unicode.MaxASCII }) {
			notes = append(notes, fmt.Sprintf("%s looks like %s and is not", quote(shown), quote(latin)))
		}
	}
	return notes
}

func isAlphanumeric(r rune) bool {
	return r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
}

func subset(a, b []string) bool {
	return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) })
}

// scripts names those of a label's letters, in order; digits and marks have none of their own.
func scripts(label string) []string {
	var found []string
	for _, r := range label {
		for name, table := range unicode.Scripts {
			if name != "Common" && name != "Inherited" && unicode.Is(table, r) && !slices.Contains(found, name) {
				found = append(found, name)
			}
		}
	}
	slices.Sort(found)
	return found
}

func latinLook(label string) string {
	return strings.Map(func(r rune) rune {
		if latin, ok := lookalikes[unicode.ToLower(r)]; ok {
			return latin
		}
		return r
	}, label)
}

// fromPunycode is what a label stands for behind its xn-- (RFC 3492, 6.2). It must hold a
// letter beyond ASCII.
func fromPunycode(encoded string) (string, bool) {
	const base, tMin, tMax, skew, damp, firstBias, firstRune = 36, 1, 26, 38, 700, 72, 0x80
	var out []rune
	if at := strings.LastIndexByte(encoded, '-'); at >= 0 {
		out, encoded = []rune(encoded[:at]), encoded[at+1:]
	}
	r, i, bias := firstRune, 0, firstBias
	for first := true; len(encoded) > 0; first = false {
		before, weight := i, 1
		for k := base; ; k += base {
			if encoded == "" {
				return "", false
			}
			digit := strings.IndexByte("abcdefghijklmnopqrstuvwxyz0123456789", strings.ToLower(encoded[:1])[0])
			encoded = encoded[1:]
			if digit < 0 || weight > unicode.MaxRune || i > (1<<40) {
				return "", false
			}
			i += digit * weight
			threshold := min(max(k-bias, tMin), tMax)
			if digit < threshold {
				break
			}
			weight *= base - threshold
		}
		// The next threshold follows from how far this one went (6.1).
		size := len(out) + 1
		delta := (i - before) / 2
		if first {
			delta = (i - before) / damp
		}
		delta += delta / size
		steps := 0
		for ; delta > (base-tMin)*tMax/2; steps += base {
			delta /= base - tMin
		}
		bias = steps + (base-tMin+1)*delta/(delta+skew)
		r += i / size
		i %= size
		if r > unicode.MaxRune || r >= 0xd800 && r < 0xe000 {
			return "", false
		}
		out = slices.Insert(out, i, rune(r))
		i++
	}
	return string(out), r != firstRune || strings.ContainsRune(string(out), firstRune)
}
