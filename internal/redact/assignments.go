package redact

import "strings"

// redactAssignments replaces the values of NAME=value, "name": "value" and name: value, where
// the name is that of a secret. Where it is not, the value is looked at for others:
// env: API_TOKEN=x.
func redactAssignments(text string) string {
	var clean strings.Builder
	done := 0
	for at := 0; at < len(text); at++ {
		if text[at] != '=' && text[at] != ':' {
			continue
		}
		from, to := assigned(text, done, at)
		if from >= to {
			continue
		}
		clean.WriteString(text[done:from])
		clean.WriteString(Mark)
		done, at = to, to-1
	}
	if done == 0 {
		return text
	}
	clean.WriteString(text[done:])
	return clean.String()
}

// assigned finds the secret that is assigned at the operator text[sep], behind floor. From and
// to are equal where there is none.
func assigned(text string, floor, sep int) (from, to int) {
	n, ok := nameBefore(text, floor, sep)
	if !ok {
		return 0, 0
	}
	g := gradeOf(text[n.start:n.end])
	if g == harmless || g == weak && text[sep] == ':' && !n.quoted && text[sep:sep+min(2, len(text)-sep)] != ":=" {
		return 0, 0
	}
	after := sep + 1
	for after < len(text) && after < sep+3 && strings.IndexByte("=:>~", text[after]) >= 0 {
		after++
	}
	if operator := text[sep:after]; operator == "::" || operator == ":" && strings.HasPrefix(text[after:], "//") {
		return 0, 0
	}
	from = after
	for from < len(text) && (text[from] == ' ' || text[from] == '\t') {
		from++
	}
	a := assignment{text: text, name: n, grade: g, from: from, spaced: from > after, colon: text[sep] == ':'}
	return a.value()
}

// name is where a name stands in a text.
type name struct {
	start, end int
	quoted     bool
}

// nameBefore is the name to the left of the operator at sep.
func nameBefore(text string, floor, sep int) (n name, ok bool) {
	i := sep
	if i > floor && text[sep] == '=' {
		switch text[i-1] {
		case '=', ':', '<', '>':
			return n, false // seen already, or a comparison
		case '!', '+', '?':
			i--
		}
	}
	spaces := i
	for i > floor && (text[i-1] == ' ' || text[i-1] == '\t') {
		i--
	}
	spaces -= i
	if i > floor+1 && text[i-1] == ']' && isQuote(text[i-2]) { // env["PASSWORD"] = "x"
		i--
	}
	if i > floor && isQuote(text[i-1]) {
		n.quoted = true
		for i--; i > floor && text[i-1] == '\\'; {
			i--
		}
	}
	if spaces > 0 && text[sep] == ':' && !n.quoted && !strings.HasPrefix(text[sep:], ":=") {
		return n, false
	}
	n.end = i
	for i > floor && isNameByte(text[i-1]) {
		if i--; n.end-i > maxName {
			return n, false
		}
	}
	n.start = i
	if i > floor && text[i-1] == '\\' && n.end-i > 1 && strings.IndexByte("nrt", text[i]) >= 0 {
		n.start++ // behind an escape of JSON
	}
	return n, n.start < n.end
}

func isQuote(c byte) bool { return c == '"' || c == '\'' || c == '`' }

func isNameByte(c byte) bool {
	return c|0x20 >= 'a' && c|0x20 <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '.'
}

// assignment is a name of a secret and where its value begins.
type assignment struct {
	text   string
	name   name
	grade  grade
	from   int
	spaced bool // white space before the value
	colon  bool
}

// plain are words that are no secret under whatever name.
var plain = map[string]bool{"true": true, "false": true, "null": true, "nil": true, "none": true, "undefined": true, "~": true}

func (a assignment) value() (from, to int) {
	text, from := a.text, a.from
	switch {
	case from == len(text), strings.HasPrefix(text[from:], Mark) && !a.toLineEnd():
		return 0, 0
	case (text[from] == '|' || text[from] == '>') && a.colon:
		if from, to, ok := a.block(); ok {
			return from, to
		}
	case (text[from] == '{' || text[from] == '[') && a.grade >= named:
		if to := bracket(text, from); to > from+2 {
			return from, to
		}
	}
	inside := from
	for inside < len(text) && text[inside] == '\\' {
		inside++
	}
	if inside < len(text) && isQuote(text[inside]) {
		end := closing(text, from, inside+1)
		if n := strings.IndexByte(text[inside+1:end], '\n'); end == len(text) && n >= 0 {
			end = inside + 1 + n // never closed: no quote
		}
		quoted := text[inside+1 : end]
		if quoted == "" || quoted == Mark || isOneOf(plain, quoted) || a.grade == weak && isOneOf(settings, quoted) {
			return 0, 0
		}
		return from, min(len(text), end+inside+1-from)
	}
	return a.bare()
}

// isOneOf looks a word up in whatever case; no long text is one.
func isOneOf(set map[string]bool, text string) bool {
	return len(text) < 16 && set[strings.ToLower(text)]
}

// toLineEnd is true of a password in the form of YAML, which may have several words.
func (a assignment) toLineEnd() bool {
	return a.grade == password && a.colon && a.spaced && a.beginsLine()
}

// bare is a value without quotes: to the next white space, and for a password in the form of
// YAML to the end of the line.
func (a assignment) bare() (from, to int) {
	text, from := a.text, a.from
	until := " \t\r\n\"'`&;<"
	if a.toLineEnd() {
		until = "\r\n"
	}
	to = len(text)
	if a.grade == weak {
		to = min(to, from+reach) // it may be none, and is looked at again
	}
	if n := strings.IndexAny(text[from:to], until); n >= 0 {
		to = from + n
	}
	if n := escape(text[from:to]); n >= 0 {
		to = from + n
	}
	value := text[from:to]
	word := strings.TrimRight(value, ",)}];")
	switch {
	case word == "", word == "|", word == "\\", value == Mark, isOneOf(plain, word):
		return 0, 0
	case a.grade == weak && (isOneOf(settings, word) || isCall(value)):
		return 0, 0
	case a.grade == named && a.colon && a.spaced && !a.beginsMember() && startsWithWord(value):
		return 0, 0 // prose: "Bump secret: rotation"
	}
	return from, to
}

// escape is where a text that stands in a string of JSON or of code ends: at an escaped quote or
// line end.
func escape(text string) int {
	for i := 0; i+1 < len(text); i++ {
		if text[i] == '\\' && (isQuote(text[i+1]) || text[i+1] == 'n' || text[i+1] == 'r' || text[i+1] == '\\') {
			return i
		}
	}
	return -1
}

// closing is where the quote that opens at from, with the backslashes before it, is closed, at or
// behind inside: the index of the backslashes and the quote that close it, or of the text's end.
func closing(text string, from, inside int) int {
	quote, slashes := text[inside-1], inside-1-from
	for i := inside; i < len(text); i++ {
		if text[i] != quote {
			continue
		}
		before := 0
		for i-before > inside && text[i-1-before] == '\\' {
			before++
		}
		// More backslashes are a quote within; an even number before a bare quote are
		// backslashes of their own.
		if before <= slashes || slashes == 0 && before%2 == 0 {
			return i - min(before, slashes)
		}
	}
	return len(text)
}

// reach is how far is looked for the end of what may be no secret, so that the time stays in
// proportion to the text.
const reach = 1 << 10

// bracket is where the bracket that opens at from is closed, behind it; from where it is not.
func bracket(text string, from int) int {
	depth := 0
	for i := from; i < min(len(text), from+reach); i++ {
		switch text[i] {
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return from
}

// block is a block of YAML: the lines below that stand further to the right than the name.
func (a assignment) block() (from, to int, ok bool) {
	text := a.text
	line, rest, more := strings.Cut(text[a.from:], "\n")
	if !more || strings.Trim(line, "|>+-0123456789 \r") != "" {
		return 0, 0, false
	}
	start := strings.LastIndexByte(text[:a.name.start], '\n') + 1
	indent := len(text[start:a.name.start]) - len(strings.TrimLeft(text[start:a.name.start], " \t-"))
	at := a.from + len(line) + 1
	from, to = -1, at
	for rest != "" {
		line, after, _ := strings.Cut(rest, "\n")
		body := strings.TrimLeft(line, " \t")
		if body != "" && len(line)-len(body) <= indent {
			break
		}
		if from < 0 && body != "" {
			from = at + len(line) - len(body)
		}
		if at += len(line); body != "" {
			to = at
		}
		at, rest = at+1, after
	}
	if from < 0 || text[from:to] == Mark {
		return 0, 0, true
	}
	return from, to, true
}

// beginsLine reports whether the name stands first in its line, as in YAML.
func (a assignment) beginsLine() bool {
	before := strings.TrimRight(a.text[:a.name.start], " \t-\"'")
	return before == "" || strings.HasSuffix(before, "\n") || strings.HasSuffix(before, "\\n")
}

// beginsMember reports whether the name stands where a setting does, and not in a sentence.
func (a assignment) beginsMember() bool {
	before := strings.TrimRight(a.text[:a.name.start], " \t-")
	return a.name.quoted || before == "" || strings.IndexByte("\n\r{[(,;?&\"'`|", before[len(before)-1]) >= 0 || strings.HasSuffix(before, `\n`)
}

// isCall is true of code such as getpass().
func isCall(value string) bool {
	name, _, ok := strings.Cut(value, "(")
	for i := range len(name) {
		if !isNameByte(name[i]) {
			return false
		}
	}
	return ok && name != ""
}

// startsWithWord is true of a text that begins with a word of small letters.
func startsWithWord(text string) bool {
	end := 0
	for end < len(text) && text[end] >= 'a' && text[end] <= 'z' {
		end++
	}
	return end > 1 && (end == len(text) || strings.IndexByte(".,;:!?)/", text[end]) >= 0)
}
