package redact

import (
	"math"
	"strings"
)

// A secret without a name and of no known form is told by how it looks: a run of
// letters and digits in which the three classes change about as often as chance has
// it. Words, in whatever case, change less often; digests in hex have no capitals.
const (
	randomLeast = 24  // shorter ones are names as often as secrets
	randomMost  = 256 // longer ones are contents
	// randomChanges is the least share of neighbours of different classes, where digits
	// stand in several places; randomOnce where they stand in one, as in IPv6Addr. Chance
	// has 0.62 in base64; names in camel case have 0.3.
	randomChanges, randomOnce = 0.42, 0.52
	// randomBits is the least entropy of the characters, in bits each.
	randomBits = 3.9

	// lowLeast, lowDigits, lowChanges and lowNumbers are for runs of small letters and digits
	// alone: their least length, shares of digits and of changes, and how many numbers stand in them.
	// Chance has 0.28 and 0.4. lowBits is what 16 different characters have at most, so that
	// digests in hex are none.
	lowLeast, lowMost     = 28, 64
	lowDigits, lowChanges = 0.15, 0.25
	lowNumbers, lowBits   = 4, 4.0
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
		from, to := at, end
		if n := end - at; n < randomLeast || n > randomMost || !looksRandom(text[at:end]) {
			from, to = lowRandom(text, at, end)
		}
		if from < to && !isPublic(text, at, end) {
			clean.WriteString(text[done:from])
			clean.WriteString(Mark)
			done, end = to, to
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
	return bits(&counts, len(run)) >= randomBits
}

// bits is the entropy of n characters that occur so often, in bits each.
func bits(counts *[256]int, n int) float64 {
	sum := 0.0
	for _, count := range counts {
		if count > 0 {
			p := float64(count) / float64(n)
			sum -= p * math.Log2(p)
		}
	}
	return sum
}

// lowRandom is where, in a run, small letters and digits look random by themselves.
func lowRandom(text string, at, end int) (from, to int) {
	for from = at; from < end; from = to + 1 {
		to = from
		for to < end && (class(text[to]) == 0 || class(text[to]) == 2) {
			to++
		}
		if n := to - from; n < lowLeast || n > lowMost || from > at && class(text[from-1]) == 1 || to < end && class(text[to]) == 1 {
			continue
		}
		var counts [256]int
		digits, changes, numbers := 0, 0, 0
		for i := from; i < to; i++ {
			counts[text[i]]++
			changed := i > from && class(text[i]) != class(text[i-1])
			if changed {
				changes++
			}
			if class(text[i]) == 0 {
				digits++
				if i == from || changed {
					numbers++
				}
			}
		}
		if n := float64(to - from); numbers >= lowNumbers && float64(digits) >= lowDigits*n && float64(changes) >= lowChanges*n && bits(&counts, to-from) > lowBits {
			return from, to
		}
	}
	return 0, 0
}

// isPublic is true of runs that look random and are made to be shown: digests, public
// keys, lines of a longer base64 text, and what was cut.
func isPublic(text string, at, end int) bool {
	run, before := text[at:end], strings.ToLower(text[max(0, at-11):at])
	for _, name := range []string{"h1:", "sha256:", "sha384:", "sha512:", "md5:", "sha-256=:", "sha-512=:", "base64,"} {
		if strings.HasSuffix(before, name) {
			return true
		}
	}
	for _, prefix := range []string{"sha1-", "sha256-", "sha384-", "sha512-", "AAAAC3NzaC1", "AAAAB3NzaC1", "AAAAE2VjZHNh", "MFkwEwYHKoZIzj0", "MCowBQYDK2V", "/nix/store/", "baf", "k51"} {
		if strings.HasPrefix(run, prefix) {
			return true
		}
	}
	if strings.HasPrefix(text[end:], CutMark) || strings.HasPrefix(text[end:], ".onion") {
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
