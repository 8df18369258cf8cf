package redact

import (
	"path"
	"regexp"
	"strings"
)

// option is one of a program that takes a secret and does not say so by its name.
type option struct {
	flag     string
	sub      string // only behind this word: docker login
	attached bool   // -pSECRET
	apart    bool   // -p SECRET
	pair     bool   // the value is a name, a colon and the secret
	cookie   bool   // the value is NAME=VALUE, or a file that has none
	prefix   string // the value's: pass:SECRET
}

var login = []option{{flag: "-p", sub: "login", attached: true, apart: true}}

var mysql = []option{{flag: "-p", attached: true}}

var programs = map[string][]option{
	"curl": {
		{flag: "-u", attached: true, apart: true, pair: true}, {flag: "-U", attached: true, apart: true, pair: true}, {flag: "--user", apart: true, pair: true},
		{flag: "--user=", attached: true, pair: true}, {flag: "--proxy-user", apart: true, pair: true}, {flag: "--proxy-user=", attached: true, pair: true},
		{flag: "-b", attached: true, apart: true, cookie: true},
	},
	"sshpass": {{flag: "-p", attached: true, apart: true}},
	"mysql":   mysql, "mysqldump": mysql, "mysqladmin": mysql, "mysqlimport": mysql, "mariadb": mysql, "mariadb-dump": mysql, "mariadb-admin": mysql,
	"docker": login, "podman": login, "nerdctl": login, "buildah": login, "skopeo": login, "helm": login, "oras": login, "crane": login,
	"redis-cli": {{flag: "-a", attached: true, apart: true}},
	"openssl": {
		{flag: "-pass", apart: true, prefix: "pass:"}, {flag: "-passin", apart: true, prefix: "pass:"}, {flag: "-passout", apart: true, prefix: "pass:"},
	},
	"7z": {{flag: "-p", attached: true}}, "7za": {{flag: "-p", attached: true}}, "unzip": {{flag: "-P", apart: true}}, "zip": {{flag: "-P", apart: true}},
}

// reads looks at the word of an option, and the one behind: which of both holds the secret, and
// where in it.
func (o option) reads(word, next string) (inNext bool, from int, ok bool) {
	value := next
	switch {
	case o.apart && word == o.flag:
		inNext = true
	case o.attached && len(word) > len(o.flag) && strings.HasPrefix(word, o.flag) && !strings.HasPrefix(word, "--"+strings.TrimPrefix(o.flag, "-")) &&
		(strings.HasSuffix(o.flag, "=") || !strings.HasPrefix(word, "--")):
		value, from = word[len(o.flag):], len(o.flag)
	default:
		return false, 0, false
	}
	switch {
	case value == "" || strings.Contains(value, Mark):
		return false, 0, false
	case o.pair:
		name, secret, ok := strings.Cut(value, ":")
		return inNext, from + len(name) + 1, ok && secret != ""
	case o.cookie:
		return inNext, from, strings.Contains(value, "=")
	case o.prefix != "":
		return inNext, from + len(o.prefix), strings.HasPrefix(value, o.prefix) && len(value) > len(o.prefix)
	}
	return inNext, from, true
}

// redactArgv treats a list as an argv: what stands behind "--token", and what the options of
// known programs hold. The elements were redacted one by one before.
func redactArgv(list []any) (changed bool) {
	var options []option
	seen := map[string]bool{}
	for i, element := range list {
		word, ok := element.(string)
		if !ok {
			continue
		}
		next, last := "", i+1 >= len(list)
		if !last {
			next, _ = list[i+1].(string)
		}
		if known, ok := programs[path.Base(word)]; ok {
			options = known
		}
		for _, o := range options {
			if o.sub != "" && !seen[o.sub] {
				continue
			}
			if inNext, from, ok := o.reads(word, next); ok && inNext {
				list[i+1], changed = next[:from]+Mark, true
			} else if ok {
				list[i], changed = word[:from]+Mark, true
			}
		}
		if len(seen) < 64 && len(word) < 32 {
			seen[word] = true
		}
		if next != "" && !strings.Contains(next, Mark) && takesSecret(word, next, seen) {
			list[i+1], changed = Mark, true
		}
	}
	return changed
}

// takesSecret reports whether the word behind an element of an argv is a secret for the element's
// name.
func takesSecret(word, next string, seen map[string]bool) bool {
	if strings.ContainsAny(word, "= \n") || len(word) > maxName {
		return false
	}
	g := gradeOf(word)
	switch {
	case g == harmless:
		return false
	case !strings.HasPrefix(word, "-"): // config set db.password SECRET
		return g >= named && (seen["set"] || seen["config"]) && strings.ContainsAny(word, "._-") && !strings.HasPrefix(next, "-")
	case strings.HasPrefix(next, "--"), strings.HasPrefix(next, "-") && (g != password && word != "--pass" || len(next) < 4):
		return false // another flag
	}
	return g >= named || !settings[strings.ToLower(next)]
}

// command is a known program in a line of shell, and what follows to the end of the command.
var command = regexp.MustCompile(`(?:^|[\s;&|("'` + "`" + `/=])(curl|sshpass|mysql(?:dump|admin|import)?|mariadb(?:-dump|-admin)?|docker|podman|nerdctl|buildah|skopeo|helm|oras|crane|redis-cli|openssl|7za?|unzip|zip)[ \t][^\n|;&]*`)

// word is one of a line of shell.
var word = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"']+(?:"[^"]*"|'[^']*'|[^\s"']+)*`)

// redactCommands treats lines of shell as redactArgv treats an argv.
func redactCommands(text string) string {
	if !strings.Contains(text, " -") {
		return text
	}
	text = redactFlags(text)
	for _, hint := range hints {
		if strings.Contains(text, hint) {
			return redactOptions(text)
		}
	}
	return text
}

// hints are in the names of the programs.
var hints = []string{"curl", "sshpass", "mysql", "mariadb", "docker", "podman", "nerdctl", "buildah", "skopeo", "helm", "oras", "crane", "redis-cli", "openssl", "7z", "zip"}

func redactOptions(text string) string {
	var clean strings.Builder
	done := 0
	for _, at := range command.FindAllStringSubmatchIndex(text, -1) {
		line := text[at[2]:at[1]]
		spans := word.FindAllStringIndex(line, -1)
		options, sub := programs[text[at[2]:at[3]]], map[string]bool{}
		for i, span := range spans {
			this, next := bared(line, span), [2]int{}
			if i+1 < len(spans) {
				next = bared(line, spans[i+1])
			}
			for _, o := range options {
				if o.sub != "" && !sub[o.sub] {
					continue
				}
				inNext, from, ok := o.reads(line[this[0]:this[1]], line[next[0]:next[1]])
				if !ok {
					continue
				}
				place := this
				if inNext {
					place = next
				}
				if start := at[2] + place[0] + from; start >= done {
					clean.WriteString(text[done:start])
					clean.WriteString(Mark)
					done = at[2] + place[1]
				}
			}
			sub[line[this[0]:this[1]]] = true
		}
	}
	if done == 0 {
		return text
	}
	clean.WriteString(text[done:])
	return clean.String()
}

// bared is a word without the quotes around it.
func bared(line string, span []int) [2]int {
	if from, to := span[0], span[1]; to-from >= 2 && isQuote(line[from]) && line[to-1] == line[from] {
		return [2]int{from + 1, to - 1}
	}
	return [2]int{span[0], span[1]}
}

// redactFlags replaces what stands behind --token.
func redactFlags(text string) string {
	var clean strings.Builder
	done := 0
	for at := 0; at < len(text); {
		dash := strings.IndexByte(text[at:], '-')
		if dash < 0 {
			break
		}
		start := at + dash
		end := start
		for end < len(text) && isNameByte(text[end]) {
			end++
		}
		at = end
		if start > done && strings.IndexByte(" \t\r\n\"'", text[start-1]) < 0 {
			continue // within a word
		}
		from := end
		for from < len(text) && (text[from] == ' ' || text[from] == '\t') {
			from++
		}
		if from == end || from == len(text) {
			continue
		}
		to := valueEnd(text, from)
		name, value := text[start:end], text[from:to]
		if strings.Contains(value, Mark) || !takesSecret(name, value, nil) || !strings.HasPrefix(name, "--") && gradeOf(name) != password {
			continue
		}
		clean.WriteString(text[done:from])
		clean.WriteString(Mark)
		done, at = to, to
	}
	if done == 0 {
		return text
	}
	clean.WriteString(text[done:])
	return clean.String()
}

// valueEnd is where a word of a line of shell ends that begins at from.
func valueEnd(text string, from int) int {
	if quote := text[from]; isQuote(quote) {
		if n := strings.IndexByte(text[from+1:], quote); n >= 0 {
			return from + n + 2
		}
	}
	if n := strings.IndexAny(text[from+1:], " \t\r\n\"'"); n >= 0 {
		return from + 1 + n
	}
	return len(text)
}
