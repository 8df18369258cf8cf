package redact

import "strings"

// grade says how surely a name is that of a secret.
type grade int

const (
	harmless grade = iota
	weak           // pass, pw, auth: an English word too, so only where a value is set
	named          // token, api_key: what is no number
	password       // whatever it looks like
)

// secretWords name secrets; a name is split into words at case changes, digits and
// punctuation, so that "tokenizer" and "author" are none.
var secretWords = map[string]grade{
	"password": password, "passwords": password, "passwd": password, "passphrase": password, "passphrases": password, "pwd": password,
	"passcode": password, "pgpass": password, "sshpass": password, "dbpass": password, "storepass": password, "keypass": password,
	"secret": named, "secrets": named, "token": named, "apikey": named, "apikeys": named, "authorization": named, "cookie": named, "credential": named,
	"credentials": named, "privatekey": named, "bearer": named, "authtoken": named, "accesstoken": named, "jwt": named, "accesskey": named,
	"secretkey": named,
}

// secretEnds make a secret of a word that nobody split: PGPASSWORD, clientsecret.
var secretEnds = []struct {
	end string
	grade
}{{"password", password}, {"passwd", password}, {"passphrase", password}, {"secret", named}, {"token", named}, {"apikey", named}}

// weakWords name secrets where they are the whole name or its last word behind one of accounts.
var weakWords = map[string]bool{"pass": true, "pw": true, "auth": true}

// accounts are whose pass it is.
var accounts = map[string]bool{
	"db": true, "database": true, "user": true, "admin": true, "root": true, "smtp": true, "mail": true, "email": true, "ftp": true, "sftp": true, "http": true,
	"https": true, "proxy": true, "redis": true, "mongo": true, "mysql": true, "pg": true, "postgres": true, "ssh": true, "login": true, "my": true,
	"ldap": true, "wifi": true, "sudo": true, "su": true, "vault": true, "basic": true, "service": true, "api": true, "ca": true,
}

// secretPairs are names of two words, of which one alone is harmless.
var secretPairs = map[string]bool{
	"api key": true, "private key": true, "access key": true, "signing key": true, "api keys": true, "private keys": true,
	"encryption key": true, "auth key": true, "session key": true, "pass phrase": true, "secret keys": true, "access tokens": true,
	"account key": true, "shared key": true, "session id": true, "amz signature": true, "x auth": true, "github pat": true, "gitlab pat": true,
}

// aboutEnds end a name that says something about a secret: its place, its size, a part of a
// screen or a file.
var aboutEnds = map[string]bool{
	"count": true, "counts": true, "length": true, "len": true, "size": true, "limit": true, "type": true, "field": true, "input": true, "label": true,
	"hint": true, "policy": true, "name": true, "names": true, "url": true, "uri": true, "endpoint": true, "path": true, "file": true, "dir": true, "expiry": true, "expires": true,
	"ttl": true, "timeout": true, "prompt": true, "form": true, "pattern": true, "regex": true, "stdin": true, "fd": true, "budget": true, "usage": true,
	"go": true, "py": true, "js": true, "ts": true, "tsx": true, "jsx": true, "rs": true, "rb": true, "java": true, "md": true, "json": true, "yaml": true, "yml": true, "txt": true,
	"toml": true, "html": true, "css": true, "cpp": true, "php": true, "sh": true, "sql": true, "kt": true, "swift": true,
}

// denials begin a flag that says that there is none.
var denials = map[string]bool{"no": true, "skip": true, "without": true, "disable": true}

// settings are values of a weak name that say how, not what.
var settings = map[string]bool{
	"none": true, "basic": true, "digest": true, "bearer": true, "true": true, "false": true, "yes": true, "no": true, "on": true, "off": true, "required": true,
	"optional": true, "disabled": true, "enabled": true, "oauth": true, "oauth2": true, "oidc": true, "ldap": true, "kerberos": true, "ntlm": true, "negotiate": true, "password": true,
	"token": true, "jwt": true, "null": true, "nil": true, "undefined": true, "auto": true, "default": true, "anonymous": true, "any": true, "all": true, "public": true, "user": true,
}

func gradeOf(name string) grade {
	if len(name) > maxName || !mayBeSecret(name) || name == "PWD" || name == "OLDPWD" {
		return harmless
	}
	list := words(name)
	if len(list) == 0 || denials[list[0]] || len(list) > 1 && aboutEnds[list[len(list)-1]] {
		return harmless
	}
	g, before := harmless, ""
	for _, word := range list {
		g = max(g, secretWords[word])
		if secretPairs[before+" "+word] {
			g = max(g, named)
		}
		for _, s := range secretEnds {
			if len(word) > len(s.end) && strings.HasSuffix(word, s.end) {
				g = max(g, s.grade)
			}
		}
		before = word
	}
	if g == harmless {
		g = lastWord(name, list)
	}
	return g
}

// lastWord grades DB_PASS, GITHUB_PAT and REDISCLI_AUTH, which environments have, and pass.
func lastWord(name string, list []string) grade {
	last := list[len(list)-1]
	switch {
	case len(list) == 1 && weakWords[last]:
		return weak
	case len(list) == 1:
		return harmless
	case weakWords[last] && accounts[list[len(list)-2]]:
		return named
	case name != strings.ToUpper(name):
		return harmless
	case last == "pass", last == "pw", last == "pat":
		return named
	case last == "auth":
		return weak
	}
	return harmless
}

// maxName is how long a name of a secret may be.
const maxName = 100

// mayBeSecret is true of every name that gradeOf does not call harmless, and cheap.
func mayBeSecret(name string) bool {
	for i := 0; i+1 < len(name); i++ {
		switch a, b := name[i]|0x20, name[i+1]|0x20; {
		case a == 'p' && (b == 'a' || b == 'w'), a == 's' && (b == 'e' || b == 'h' || b == 'i'), a == 't' && b == 'o', a == 'k' && b == 'e',
			a == 'c' && (b == 'o' || b == 'r'), a == 'a' && b == 'u', a == 'b' && b == 'e', a == 'j' && b == 'w':
			return true
		}
	}
	return false
}

// words splits a name as people write names: api_key, apiKey, API-Key, APIKey.
func words(name string) []string {
	var list []string
	start := -1
	flush := func(end int) {
		if start >= 0 {
			list = append(list, strings.ToLower(name[start:end]))
		}
		start = -1
	}
	upper := func(c byte) bool { return c >= 'A' && c <= 'Z' }
	lower := func(c byte) bool { return c >= 'a' && c <= 'z' }
	for i := range len(name) {
		c := name[i]
		switch {
		case !upper(c) && !lower(c):
			flush(i)
			continue
		case upper(c) && i > 0 && lower(name[i-1]),
			upper(c) && i > 0 && upper(name[i-1]) && i+1 < len(name) && lower(name[i+1]):
			flush(i)
		}
		if start < 0 {
			start = i
		}
	}
	flush(len(name))
	return list
}
