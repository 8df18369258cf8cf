// Package redact takes secrets out of what is written down to be read by others.
//
// Claim: what lies under a name of a secret, text in the form of a known token and a run of
// characters that looks random are replaced by "[redacted]", wherever they stand in a JSON
// value. Threat: a secret that an honest program or person put into arguments, a message or a
// prompt. It is a help and not a wall: a secret that looks like a word, or that somebody
// encodes, gets by, and what is bound by a digest is bound whole. What stays is as important:
// digests, ids, public keys and names are what a reader looks for.
//
// What was redacted stays as it is when it is redacted again.
package redact

import (
	"encoding/json"
	"strings"
)

// Mark stands in the place of a secret.
const Mark = "[redacted]"

// CutMark begins what says that the rest of a text is missing. It is told from the end of a
// secret.
const CutMark = "[cut: "

// Value is a decoded JSON value without its secrets, and whether it had any. Lists and maps
// are changed in place; numbers are json.Number or float64.
func Value(value any) (clean any, changed bool) {
	switch v := value.(type) {
	case string:
		text := Text(v)
		return text, text != v
	case []any:
		return v, list(v)
	case map[string]any:
		return v, object(v)
	}
	return value, false
}

// object treats the members, and what only two of them together tell.
func object(v map[string]any) (changed bool) {
	var renamed []string
	for name, member := range v {
		clean, hidden := any(Mark), hides(gradeOf(name), member)
		if !hidden {
			clean, hidden = Value(member)
		} else if member == Mark {
			hidden = false
		}
		if hidden {
			v[name], changed = clean, true
		}
		if Text(name) != name {
			renamed = append(renamed, name)
		}
	}
	for _, name := range renamed {
		member := v[name]
		delete(v, name)
		v[Text(name)], changed = member, true
	}
	return hideNamed(v) || changed
}

// hides reports whether a value under a name of this grade is a secret.
func hides(g grade, value any) bool {
	switch v := value.(type) {
	case nil, bool:
		return false
	case json.Number, float64:
		return g == password
	case string:
		return v != "" && (g >= named || g == weak && !settings[strings.ToLower(v)])
	}
	return g >= named
}

// shortest is how long a secret is at least that no name before it tells.
const shortest = 14

// Text is a text without its secrets.
func Text(text string) string {
	if len(text) < shortest && !strings.ContainsAny(text, "=: ") {
		return text
	}
	text = knownForms(text)
	if strings.Contains(text, "://") {
		text = redactURLs(text)
	}
	text = redactSchemes(text)
	text = redactCommands(text)
	text = redactRandom(text)
	if strings.ContainsAny(text, "=:") {
		if containsFold(text, "cookie") || containsFold(text, "authorization") {
			text = redactHeaders(text)
		}
		text = redactPairs(text)
		text = redactAssignments(text)
	}
	if strings.Contains(text, "</") {
		text = redactElements(text)
	}
	return text
}

// list treats the elements, and what only their order tells: argv, pairs of names and values,
// and a key whose lines are elements.
func list(v []any) (changed bool) {
	changed = hideKeyLines(v)
	for i := range v {
		clean, hidden := Value(v[i])
		v[i], changed = clean, changed || hidden
	}
	return redactArgv(v) || hidePairs(v) || changed
}

// hidePairs treats [["X-Api-Key", "..."], ...].
func hidePairs(list []any) (changed bool) {
	for _, element := range list {
		if pair, ok := element.([]any); !ok || len(pair) != 2 {
			return false
		}
	}
	for _, element := range list {
		pair := element.([]any)
		if name, ok := pair[0].(string); ok && !strings.ContainsAny(name, " \n") && pair[1] != any(Mark) && hides(gradeOf(name), pair[1]) {
			pair[1], changed = Mark, true
		}
	}
	return changed
}

// hideNamed hides the value of {"name": "Authorization", "value": "..."}.
func hideNamed(object map[string]any) (changed bool) {
	if len(object) > 8 {
		return false
	}
	g := harmless
	for key, member := range object {
		if name, ok := member.(string); ok && nameKeys[strings.ToLower(key)] && !strings.ContainsAny(name, " \n") {
			g = max(g, gradeOf(name))
		}
	}
	if g == harmless {
		return false
	}
	for key, member := range object {
		if valueKeys[strings.ToLower(key)] && member != any(Mark) && hides(g, member) {
			object[key], changed = Mark, true
		}
	}
	return changed
}

var (
	nameKeys  = map[string]bool{"name": true, "key": true, "header": true, "field": true}
	valueKeys = map[string]bool{"value": true, "val": true, "values": true}
)

// hideKeyLines hides the lines of a private key that are elements of a list.
func hideKeyLines(list []any) (changed bool) {
	inside := false
	for i, element := range list {
		line, ok := element.(string)
		switch {
		case !ok:
			inside = false
		case inside:
			list[i], changed = Mark, true
			inside = !strings.Contains(line, "-----END ")
		default:
			at := strings.LastIndex(line, "-----BEGIN ")
			inside = at >= 0 && strings.Contains(line[at:], "PRIVATE KEY") && !strings.Contains(line[at:], "-----END ")
		}
	}
	return changed
}

// containsFold is strings.Contains for a lower-case ASCII word in whatever case.
func containsFold(text, word string) bool {
	first := word[0]
	for i := 0; i+len(word) <= len(text); i++ {
		if text[i]|0x20 == first && strings.EqualFold(text[i:i+len(word)], word) {
			return true
		}
	}
	return false
}
