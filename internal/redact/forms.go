package redact

import (
	"encoding/base64"
	"regexp"
	"strings"
	"sync"
)

// knownForm is how a secret looks that says what it is. One of hints is in every match; looking
// for them first keeps the common case cheap.
type knownForm struct {
	hints []string
	form  func() *regexp.Regexp // made when it is needed first
}

func form(hints, expression string) knownForm {
	return knownForm{strings.Fields(hints), sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })}
}

var forms = []knownForm{
	form("ghp_ gho_ ghu_ ghs_ ghr_", `\bgh[pousr]_[A-Za-z0-9_]{20,}`),
	form("github_pat_", `github_pat_[A-Za-z0-9_]{20,}`),
	form("glpat-", `glpat-[A-Za-z0-9_-]{16,}`),
	form("sk-", `\bsk-[A-Za-z0-9_-]{16,}`),
	form("_live_", `\b[sr]k_live_[A-Za-z0-9]{16,}`),
	form("_test_", `\b[sr]k_test_[A-Za-z0-9]{16,}`),
	form("AKIA", `\bAKIA[A-Z0-9]{16}\b`),
	form("ASIA", `\bASIA[A-Z0-9]{16}\b`),
	form("GOCSPX-", `\bGOCSPX-[A-Za-z0-9_-]{20,}`),
	form("1//", `\b1//[A-Za-z0-9_-]{30,}`),
	form("AIza", `\bAIza[A-Za-z0-9_-]{30,}`),
	form("ya29.", `\bya29\.[A-Za-z0-9_-]{20,}`),
	form("xox", `\bxox[abeoprs]-[A-Za-z0-9-]{10,}`),
	form("xapp-", `\bxapp-[0-9]-[A-Za-z0-9-]{20,}`),
	form("hooks.slack.com", `hooks\.slack\.com/(services|workflows|triggers)/[A-Za-z0-9_/-]+`),
	form("npm_", `\bnpm_[A-Za-z0-9]{30,}`),
	form("pypi-", `\bpypi-[A-Za-z0-9_-]{30,}`),
	form("hf_", `\bhf_[A-Za-z0-9]{30,}`),
	form("SG.", `\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}`),
	form("hvs.", `\bhvs\.[A-Za-z0-9_-]{20,}`),
	form("dckr_pat_", `\bdckr_pat_[A-Za-z0-9_-]{20,}`),
	form("dop_v1_", `\bdop_v1_[a-f0-9]{32,}`),
	form("eyJ", `\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`),
	form("v4.", `\bv4\.(public|local)\.[A-Za-z0-9_-]{40,}`),
	form("AGE-", `AGE-(PLUGIN-[A-Z0-9-]+|SECRET-KEY)-1[A-Z0-9]{20,}`),
	form("PRIVATE+KEY+", `PRIVATE\+KEY\+[^\s"]+`),
	form("KEY-----", `(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|$)`),
	form("Signature=", `\bSignature=[A-Za-z0-9%+/=]{16,}`),
	form("whsec_", `\bwhsec_[A-Za-z0-9+/=]{20,}`),
	form("glrt- gldt- glptt- glcbt- glft- glsoat- glagent- glimt-", `\bgl(rt|dt|ptt|cbt|ft|soat|agent|imt)-[A-Za-z0-9_.-]{16,}`),
	form("xai-", `\bxai-[A-Za-z0-9]{20,}`),
	form("gsk_", `\bgsk_[A-Za-z0-9]{20,}`),
	form("pplx-", `\bpplx-[A-Za-z0-9]{20,}`),
	form("ATATT ATCTT ATBB", `\bAT(ATT|CTT|BB)[A-Za-z0-9_=-]{20,}`),
	form("lin_api_ lin_oauth_", `\blin_(api|oauth)_[A-Za-z0-9]{20,}`),
	form("shpat_ shpca_ shppa_ shpss_", `\bshp(at|ca|pa|ss)_[A-Fa-f0-9]{20,}`),
	form("figd_", `\bfigd_[A-Za-z0-9_-]{20,}`),
	form("glsa_", `\bglsa_[A-Za-z0-9_]{20,}`),
	form("doo_v1_ dor_v1_", `\bdo[or]_v1_[a-f0-9]{32,}`),
	form("tskey-", `\btskey-[a-z]+-[A-Za-z0-9-]{16,}`),
	form("rubygems_", `\brubygems_[a-f0-9]{32,}`),
	form("PMAK-", `\bPMAK-[A-Za-z0-9-]{20,}`),
	form("NRAK-", `\bNRAK-[A-Z0-9]{20,}`),
	form("hvb.", `\bhvb\.[A-Za-z0-9_-]{20,}`),
	form("IBAAKCA IBADANBgkqhkiG9w0BAQEFAASC", `\bMII[A-Za-z0-9+/]{3}IBA(AKCA|DANBgkqhkiG9w0BAQEFAASC)[A-Za-z0-9+/=]+`), // RSA, unarmoured
	form("MIGHAgEAM", `\bMIGHAgEAM[A-Za-z0-9+/=]{40,}`),                                                                 // EC, PKCS 8
	form("MC4CAQAwB", `\bMC4CAQAwB[A-Za-z0-9+/=]{40,}`),                                                                 // Ed25519, PKCS 8
}

func knownForms(text string) string {
	for _, f := range forms {
		for _, hint := range f.hints {
			if strings.Contains(text, hint) {
				text = f.form().ReplaceAllString(text, Mark)
				break
			}
		}
	}
	return text
}

var (
	urlStart = regexp.MustCompile(`[a-zA-Z][a-zA-Z0-9+.-]*://`)
	port     = regexp.MustCompile(`^[0-9]{1,5}(/|$)`)
	// headerName begins a header whose value has several words.
	headerName = regexp.MustCompile(`(?i)\b(?:(?:proxy-)?authorization|(?:set-)?cookie)["']?(?: *= *|: *)`)
	// bearer and basic are credentials without the header's name; the first group is the
	// scheme, the second what follows.
	bearer = regexp.MustCompile(`\b([Bb]earer +)([A-Za-z0-9._~+/=-]{8,})`)
	basic  = regexp.MustCompile(`\b([Bb]asic +)([A-Za-z0-9+/=]{8,})`)
	// element is one of XML that holds a text.
	element = regexp.MustCompile(`<([A-Za-z][A-Za-z0-9:_.-]*)(?:\s[^<>]*)?>([^<>]+)</`)
	// pair is the beginning of a name and a value as two members: the third group opens the value.
	pair = regexp.MustCompile(`\\*["'](?i:name|key|header|field)\\*["']\s*:\s*\\*["']([^"'\\\s]+)\\*["']\s*,\s*\\*["'](?i:value|val)\\*["']\s*:\s*(\\*["'])`)
)

// redactURLs replaces the user's part of a URL where it holds a password, or is one.
func redactURLs(text string) string {
	return replace(text, urlStart, func(at []int) (from, to int) {
		from = at[1]
		end := min(len(text), from+reach)
		if n := strings.IndexAny(text[from:end], " \t\r\n\"'`<>"); n >= 0 {
			end = from + n
		}
		rest := text[from:end]
		authority, _, _ := strings.Cut(rest, "/")
		authority, _, _ = strings.Cut(authority, "?")
		authority, _, _ = strings.Cut(authority, "#")
		user, password, ok := strings.Cut(rest, ":")
		switch last := strings.LastIndexByte(authority, '@'); {
		case last >= 0 && (strings.Contains(authority[:last], ":") || last >= 20):
			return from, from + last
		case last >= 0:
			return 0, 0
		case ok && len(user) <= len(authority) && !strings.HasPrefix(user, "[") && !port.MatchString(password):
			if slash := strings.IndexByte(password, '@'); slash >= 0 { // user:pa/ss@host
				return from, from + len(user) + 1 + slash
			}
		}
		return 0, 0
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
			return parts[1] + Mark
		})
	}
	if strings.Contains(text, "asic ") {
		text = basic.ReplaceAllStringFunc(text, func(match string) string {
			parts := basic.FindStringSubmatch(match)
			pair, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(parts[2], "="))
			if err != nil || !strings.Contains(string(pair), ":") {
				return match
			}
			return parts[1] + Mark
		})
	}
	return text
}

// redactHeaders replaces the values of headers that are secret as a whole: to the end
// of the line, or of the quotes around header or value.
func redactHeaders(text string) string {
	return replace(text, headerName, func(at []int) (from, to int) {
		from, until := at[1], "\r\n"
		if quote := text[from:]; quote != "" && (quote[0] == '"' || quote[0] == '\'') {
			from, until = from+1, until+quote[:1]
		} else if at[0] > 0 && (text[at[0]-1] == '"' || text[at[0]-1] == '\'') {
			until += text[at[0]-1 : at[0]]
		}
		if n := strings.IndexAny(text[from:], until); n >= 0 {
			return from, from + n
		}
		return from, len(text)
	})
}

// redactElements replaces the text of <password>...</password>.
func redactElements(text string) string {
	return replace(text, element, func(at []int) (from, to int) {
		inside := strings.TrimSpace(text[at[4]:at[5]])
		if !hides(gradeOf(text[at[2]:at[3]]), inside) || plain[strings.ToLower(inside)] {
			return 0, 0
		}
		return at[4], at[5]
	})
}

// redactPairs replaces the value of "name": "Authorization", "value": "...".
func redactPairs(text string) string {
	if !containsFold(text, "value\"") && !containsFold(text, "value\\") && !containsFold(text, "value'") && !containsFold(text, "val\"") && !containsFold(text, "val\\") {
		return text
	}
	return replace(text, pair, func(at []int) (from, to int) {
		if gradeOf(text[at[2]:at[3]]) < named {
			return 0, 0
		}
		return at[5], closing(text, at[4], at[5])
	})
}

// replace puts Mark in the place of what secret says of each match of form: from and to are
// places in text; nothing where they are equal. Places that a secret before covers are passed over, and
// what is redacted already stays.
func replace(text string, form *regexp.Regexp, secret func(at []int) (from, to int)) string {
	var clean strings.Builder
	done := 0
	for _, at := range form.FindAllStringSubmatchIndex(text, -1) {
		if at[0] < done {
			continue
		}
		from, to := secret(at)
		if from >= to || text[from:to] == Mark {
			continue
		}
		clean.WriteString(text[done:from])
		clean.WriteString(Mark)
		done = to
	}
	if done == 0 {
		return text
	}
	clean.WriteString(text[done:])
	return clean.String()
}
