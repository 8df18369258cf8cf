package audit

import (
	"math"
	"strings"
)

// A secret without a name and of no known form is told by how it looks: a run of
// letters and digits in which the three classes change about as often as chance has
// it. Words, in whatever case, change less often; digests in hex have no capitals.
const (
	randomLeast = 24  // shorter ones are names as often as secrets
	randomMost  = 128 // longer ones are contents
	// randomChanges is the least share of neighbours of different classes, where digits
	// stand in several places; randomOnce where they stand in one, as in IPv6Addr. Chance
	// has 0.62 in base64; names in camel case have 0.3.
	randomChanges, randomOnce = 0.42, 0.52
	// randomBits is the least entropy of the characters, in bits each.
	randomBits = 3.9
)

// redactRandom replaces the runs that look random.
func redactRandom(text string) string {
	var clean strings.Builder
	done := 0
	for at := 0; at < len(text); {
		if !isRun(text[at]) {
			at++
			continue
		}
		end := at
		for end < len(text) && isRun(text[end]) {
			end++
		}
		if n := end - at; n >= randomLeast && n <= randomMost && looksRandom(text[at:end]) && !isPublic(text, at, end) {
			clean.WriteString(text[done:at])
			clean.WriteString(redacted)
			done = end
		}
		at = end
	}
	if done == 0 {
		return text
	}
	clean.WriteString(text[done:])
	return clean.String()
}

// class of a character of a run: digit, capital, small letter, or what stands between.
func class(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return 0
	case c >= 'A' && c <= 'Z':
		return 1
	case c >= 'a' && c <= 'z':
		return 2
	}
	return 3
}

func isRun(c byte) bool {
	return class(c) < 3 || c == '+' || c == '/' || c == '_' || c == '-' || c == '='
}

func looksRandom(run string) bool {
	var counts [256]int
	var classes [4]int
	pairs, changes, numbers := 0, 0, 0
	for i := range len(run) {
		counts[run[i]]++
		c := class(run[i])
		classes[c]++
		if c == 0 && (i == 0 || class(run[i-1]) != 0) {
			numbers++
		}
		if i > 0 && c < 3 {
			if before := class(run[i-1]); before < 3 {
				pairs++
				if before != c {
					changes++
				}
			}
		}
	}
	letters := len(run) - classes[3]
	least := randomChanges
	if numbers == 1 {
		least = randomOnce
	}
	if letters < randomLeast-4 || numbers == 0 || classes[1] < 3 || classes[2] < 3 || float64(changes) < least*float64(pairs) {
		return false
	}
	bits := 0.0
	for _, n := range counts {
		if n > 0 {
			p := float64(n) / float64(len(run))
			bits -= p * math.Log2(p)
		}
	}
	return bits >= randomBits
}

// isPublic is true of runs that look random and are made to be shown: digests, public
// keys, lines of a longer base64 text, and what was cut.
func isPublic(text string, at, end int) bool {
	run, before := text[at:end], strings.ToLower(text[max(0, at-9):at])
	for _, name := range []string{"h1:", "sha256:", "sha384:", "sha512:", "md5:", "sha-256=:", "sha-512=:"} {
		if strings.HasSuffix(before, name) {
			return true
		}
	}
	for _, prefix := range []string{"sha1-", "sha256-", "sha384-", "sha512-", "AAAAC3NzaC1", "AAAAB3NzaC1", "AAAAE2VjZHNh"} {
		if strings.HasPrefix(run, prefix) {
			return true
		}
	}
	if strings.HasPrefix(text[end:], cutMark) {
		return true
	}
	if rest, ok := strings.CutPrefix(text[end:], "\n"); ok && wholeLine(text, at) && isRunLine(rest) {
		return true
	}
	above, ok := strings.CutSuffix(text[:at], "\n")
	return ok && (end == len(text) || text[end] == '\n') && isRunLine(above[strings.LastIndexByte(above, '\n')+1:])
}

func wholeLine(text string, at int) bool { return at == 0 || text[at-1] == '\n' }

// isRunLine reports whether the first line of text is one long run.
func isRunLine(text string) bool {
	line, _, _ := strings.Cut(text, "\n")
	for i := range len(line) {
		if !isRun(line[i]) {
			return false
		}
	}
	return len(line) >= 4
}
