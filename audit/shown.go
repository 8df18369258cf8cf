package audit

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"cal/nucleus"
)

// maxShown is how many bytes of arguments an entry shows.
const maxShown = 4 << 10

// redacted stands in the place of a secret.
const redacted = "[redacted]"

// Shown is v as an entry shows it: canonical JSON of at most 4 KiB. What lies
// under a key that names a secret, text in the form of a known token, and a run of
// characters that looks random are replaced by "[redacted]". What is too long is
// cut, and says how much is missing. Shown of what Shown returned is the same again.
// A value that is not JSON is shown as the reason. What an action does is bound by
// its digest, not by this.
func Shown(v any) json.RawMessage {
	raw, err := nucleus.Canonical(v)
	if err != nil {
		return mustText(fmt.Sprintf("[not shown: %v]", err))
	}
	var value any
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return mustText(fmt.Sprintf("[not shown: %v]", err))
	}
	value = redact(value)
	for limit := maxShown; limit >= 16; limit /= 2 {
		shown, err := nucleus.Canonical(cut(value, limit))
		if err == nil && len(shown) <= maxShown {
			return shown
		}
	}
	return mustText(fmt.Sprintf("[cut: %d bytes]", len(raw)))
}

// mustText is a short text as JSON.
func mustText(text string) json.RawMessage {
	text = strings.ToValidUTF8(text[:min(len(text), 512)], "\uFFFD")
	raw, err := nucleus.Canonical(text)
	if err != nil {
		return json.RawMessage(`"[not shown]"`)
	}
	return raw
}

// redact replaces secrets in a decoded JSON value.
func redact(value any) any {
	switch v := value.(type) {
	case string:
		return redactText(v)
	case []any:
		for i := range v {
			v[i] = redact(v[i])
		}
		redactPairs(v)
	case map[string]any:
		clean := make(map[string]any, len(v))
		for key, member := range v {
			if secretName(key) && !isPlain(member) {
				clean[redactText(key)] = redacted
			} else {
				clean[redactText(key)] = redact(member)
			}
		}
		return clean
	}
	return value
}

// isPlain is true of values that cannot hold a secret.
func isPlain(v any) bool {
	switch v := v.(type) {
	case nil, bool, json.Number:
		return true
	case string:
		return v == ""
	}
	return false
}

// redactPairs treats an argv: the element after "--token" is a secret.
func redactPairs(list []any) {
	for i := 0; i+1 < len(list); i++ {
		flag, ok := list[i].(string)
		if ok && (flag == "--user" || flag == "-u" && isCurl(list)) {
			if next, ok := list[i+1].(string); ok {
				if name, password, ok := strings.Cut(next, ":"); ok && strings.Trim(password, "0123456789") != "" && !strings.Contains(password, redacted) {
					list[i+1] = name + ":" + redacted
				}
			}
		}
		if ok && strings.HasPrefix(flag, "-") && !strings.ContainsAny(flag, "= ") && secretName(flag) {
			if next, ok := list[i+1].(string); ok && next != "" && !strings.HasPrefix(next, "-") {
				list[i+1] = redacted
			}
		}
	}
}

// isCurl tells curl's -u, whose value is a name and a password, from others.
func isCurl(argv []any) bool {
	return slices.ContainsFunc(argv, func(v any) bool {
		text, ok := v.(string)
		return ok && (text == "curl" || strings.HasSuffix(text, "/curl"))
	})
}

// secretWords name secrets; the name is split into words at case changes,
// digits and punctuation, so that "tokenizer" and "author" are none.
var secretWords = map[string]bool{
	"password": true, "passwd": true, "passphrase": true, "pwd": true, "secret": true, "secrets": true,
	"token": true, "apikey": true, "authorization": true, "cookie": true, "credential": true,
	"credentials": true, "privatekey": true, "bearer": true, "authtoken": true, "accesstoken": true,
	"jwt": true, "accesskey": true, "secretkey": true,
}

// secretPairs are names of two words, of which one alone is harmless.
var secretPairs = map[string]bool{
	"api key": true, "private key": true, "access key": true, "signing key": true,
	"encryption key": true, "auth key": true, "session key": true, "pass phrase": true,
	"account key": true, "shared key": true, "session id": true, "amz signature": true,
}

func secretName(name string) bool {
	last := ""
	for _, word := range words(name) {
		if secretWords[word] || secretPairs[last+" "+word] {
			return true
		}
		last = word
	}
	return false
}

// words splits a name as people write names: api_key, apiKey, API-Key, APIKey.
func words(name string) []string {
	var list []string
	var word []rune
	runes := []rune(name)
	flush := func() {
		if len(word) > 0 {
			list = append(list, strings.ToLower(string(word)))
			word = nil
		}
	}
	upper := func(r rune) bool { return r >= 'A' && r <= 'Z' }
	lower := func(r rune) bool { return r >= 'a' && r <= 'z' }
	for i, r := range runes {
		switch {
		case !upper(r) && !lower(r):
			flush()
			continue
		case upper(r) && i > 0 && lower(runes[i-1]),
			upper(r) && i > 0 && upper(runes[i-1]) && i+1 < len(runes) && lower(runes[i+1]):
			flush()
		}
		word = append(word, r)
	}
	flush()
	return list
}

// tokens are the forms of secrets that say what they are. hint is in every
// match; looking for it first keeps the common case cheap.
var tokens = []struct {
	hint string
	form *regexp.Regexp
}{
	{"gh", regexp.MustCompile(`\bgh[pousr]_[A-Za-z0-9_]{20,}`)},
	{"github_pat_", regexp.MustCompile(`github_pat_[A-Za-z0-9_]{20,}`)},
	{"glpat-", regexp.MustCompile(`glpat-[A-Za-z0-9_-]{16,}`)},
	{"sk-", regexp.MustCompile(`\bsk-[A-Za-z0-9_-]{16,}`)},
	{"_live_", regexp.MustCompile(`\b[sr]k_live_[A-Za-z0-9]{16,}`)},
	{"_test_", regexp.MustCompile(`\b[sr]k_test_[A-Za-z0-9]{16,}`)},
	{"AKIA", regexp.MustCompile(`\bAKIA[A-Z0-9]{16}\b`)},
	{"ASIA", regexp.MustCompile(`\bASIA[A-Z0-9]{16}\b`)},
	{"GOCSPX-", regexp.MustCompile(`\bGOCSPX-[A-Za-z0-9_-]{20,}`)},
	{"1//", regexp.MustCompile(`\b1//[A-Za-z0-9_-]{30,}`)},
	{"AIza", regexp.MustCompile(`\bAIza[A-Za-z0-9_-]{30,}`)},
	{"ya29.", regexp.MustCompile(`\bya29\.[A-Za-z0-9_-]{20,}`)},
	{"xox", regexp.MustCompile(`\bxox[abeoprs]-[A-Za-z0-9-]{10,}`)},
	{"xapp-", regexp.MustCompile(`\bxapp-[0-9]-[A-Za-z0-9-]{20,}`)},
	{"hooks.slack.com", regexp.MustCompile(`hooks\.slack\.com/(services|workflows|triggers)/[A-Za-z0-9_/-]+`)},
	{"npm_", regexp.MustCompile(`\bnpm_[A-Za-z0-9]{30,}`)},
	{"pypi-", regexp.MustCompile(`\bpypi-[A-Za-z0-9_-]{30,}`)},
	{"hf_", regexp.MustCompile(`\bhf_[A-Za-z0-9]{30,}`)},
	{"SG.", regexp.MustCompile(`\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}`)},
	{"hvs.", regexp.MustCompile(`\bhvs\.[A-Za-z0-9_-]{20,}`)},
	{"dckr_pat_", regexp.MustCompile(`\bdckr_pat_[A-Za-z0-9_-]{20,}`)},
	{"dop_v1_", regexp.MustCompile(`\bdop_v1_[a-f0-9]{32,}`)},
	{"eyJ", regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`)},
	{"v4.", regexp.MustCompile(`\bv4\.(public|local)\.[A-Za-z0-9_-]{40,}`)},
	{"AGE-", regexp.MustCompile(`AGE-(PLUGIN-[A-Z0-9-]+|SECRET-KEY)-1[A-Z0-9]{20,}`)},
	{"PRIVATE+KEY+", regexp.MustCompile(`PRIVATE\+KEY\+[^\s"]+`)},
	{"PRIVATE KEY", regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|$)`)},
	{"Signature=", regexp.MustCompile(`\bSignature=[A-Za-z0-9%+/=]{16,}`)},
}

// urlUser is the password in a URL; assignment is NAME=value and "Name: value",
// whose name is then asked.
var (
	urlUser    = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s:@]*:[^/\s@]+@`)
	urlToken   = regexp.MustCompile(`(https?://)[^/\s:@]{20,}@`)
	assignment = regexp.MustCompile(`([A-Za-z][A-Za-z0-9_.-]*)(["']?(?: *= *|: *))("[^"]*"|'[^']*'|[^\s"'&;]+)`)
	// headerName begins a header whose value has several words.
	headerName = regexp.MustCompile(`(?i)\b(?:(?:proxy-)?authorization|(?:set-)?cookie)["']?(?: *= *|: *)`)
	// bearer and basic are credentials without the header's name; the first group is the
	// scheme, the second what follows.
	bearer   = regexp.MustCompile(`\b([Bb]earer +)([A-Za-z0-9._~+/=-]{8,})`)
	basic    = regexp.MustCompile(`\b([Bb]asic +)([A-Za-z0-9+/=]{8,})`)
	curlUser = regexp.MustCompile(`(\bcurl\b[^\n|;&]*? (?:-u|--user)[ =]*["']?[^\s:"']+:)[^\s"']+`)
)

func redactText(text string) string {
	for _, t := range tokens {
		if strings.Contains(text, t.hint) {
			text = t.form.ReplaceAllString(text, redacted)
		}
	}
	if strings.Contains(text, "://") {
		text = urlUser.ReplaceAllString(text, "${1}"+redacted+"@")
		text = urlToken.ReplaceAllString(text, "${1}"+redacted+"@")
	}
	text = redactSchemes(text)
	text = redactRandom(text)
	if !strings.ContainsAny(text, "=:") {
		return text
	}
	if lower := strings.ToLower(text); strings.Contains(lower, "cookie") || strings.Contains(lower, "authorization") {
		text = redactHeaders(text)
	}
	return assignment.ReplaceAllStringFunc(text, func(match string) string {
		parts := assignment.FindStringSubmatch(match)
		if !secretName(parts[1]) || strings.Contains(parts[3], redacted) {
			return match
		}
		return parts[1] + parts[2] + redacted
	})
}

// redactSchemes replaces what follows "Bearer" and "Basic", unless it is a word.
func redactSchemes(text string) string {
	if strings.Contains(text, "earer ") {
		text = bearer.ReplaceAllStringFunc(text, func(match string) string {
			parts := bearer.FindStringSubmatch(match)
			if len(parts[2]) < 20 && !strings.ContainsAny(parts[2], "0123456789._~+/=") {
				return match
			}
			return parts[1] + redacted
		})
	}
	if strings.Contains(text, "asic ") {
		text = basic.ReplaceAllStringFunc(text, func(match string) string {
			parts := basic.FindStringSubmatch(match)
			pair, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(parts[2], "="))
			if err != nil || !strings.Contains(string(pair), ":") {
				return match
			}
			return parts[1] + redacted
		})
	}
	if strings.Contains(text, "curl") {
		text = curlUser.ReplaceAllString(text, "${1}"+redacted)
	}
	return text
}

// redactHeaders replaces the values of headers that are secret as a whole: to the end
// of the line, or of the quotes around header or value.
func redactHeaders(text string) string {
	var clean strings.Builder
	done := 0
	for _, at := range headerName.FindAllStringIndex(text, -1) {
		if at[0] < done {
			continue // inside the value of the one before
		}
		from, until := at[1], "\r\n"
		if quote := text[from:]; quote != "" && (quote[0] == '"' || quote[0] == '\'') {
			from, until = from+1, until+quote[:1]
		} else if at[0] > 0 && (text[at[0]-1] == '"' || text[at[0]-1] == '\'') {
			until += text[at[0]-1 : at[0]]
		}
		end := len(text)
		if n := strings.IndexAny(text[from:], until); n >= 0 {
			end = from + n
		}
		if from == end {
			continue
		}
		clean.WriteString(text[done:from])
		clean.WriteString(redacted)
		done = end
	}
	return clean.String() + text[done:]
}

// cutMark begins what says that something is missing.
const cutMark = "[cut: "

// cut shortens texts to limit bytes, and lists and objects to limit members.
func cut(value any, limit int) any {
	switch v := value.(type) {
	case string:
		return cutText(v, limit)
	case []any:
		keep := v[:min(len(v), limit)]
		short := make([]any, 0, len(keep)+1)
		for _, element := range keep {
			short = append(short, cut(element, limit))
		}
		if n := len(v) - len(keep); n > 0 {
			short = append(short, fmt.Sprintf("%s%d more]", cutMark, n))
		}
		return short
	case map[string]any:
		return cutObject(v, limit)
	}
	return value
}

func cutText(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	end := limit
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return fmt.Sprintf("%s%s%d bytes]", text[:end], cutMark, len(text)-end)
}

func cutObject(object map[string]any, limit int) any {
	short := make(map[string]any, min(len(object), limit)+1)
	for _, key := range sortedKeys(object) {
		if len(short) == limit {
			short[cutMark+"members]"] = len(object) - limit
			break
		}
		short[cutText(key, limit)] = cut(object[key], limit)
	}
	return short
}

func sortedKeys(object map[string]any) []string { return slices.Sorted(maps.Keys(object)) }
