package audit

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"cal/nucleus"
)

const (
	base62 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	upper  = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
	hexa   = "0123456789abcdef"
)

var letters = rand.New(rand.NewPCG(6, 2))

// made is n characters at random, so that no text here looks like somebody's token.
func made(n int, of string) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = of[letters.IntN(len(of))]
	}
	return string(b)
}

func encoded(n int) string {
	return base64.StdEncoding.EncodeToString([]byte(made(n, base62+"!#$%&~")))
}

// secrets are what must not be shown, wherever it stands: what is fixed, what is secret.
var secrets = []struct{ name, before, secret, after string }{
	{"GitHub, classic", "ghp_", made(36, base62), ""}, {"GitHub, OAuth", "gho_", made(36, base62), ""},
	{"GitHub, app", "ghs_", made(36, base62), ""}, {"GitHub, refresh", "ghr_", made(76, base62), ""},
	{"GitHub, fine-grained", "github_pat_", made(22, base62) + "_" + made(59, base62), ""},
	{"GitLab", "glpat-", made(20, base62), ""},
	{"Anthropic, key", "sk-ant-api03-", made(93, base62+"_-") + "AA", ""}, {"Anthropic, session", "sk-ant-oat01-", made(93, base62+"_-"), ""},
	{"OpenAI", "sk-", made(48, base62), ""}, {"OpenAI, project", "sk-proj-", made(124, base62+"_-"), ""}, {"OpenAI, service", "sk-svcacct-", made(60, base62), ""},
	{"AWS, key id", "AKIA", made(16, upper), ""}, {"AWS, session", "ASIA", made(16, upper), ""},
	{"AWS, secret key by its look", "", made(40, base62+"+"), ""},
	{"Slack, bot", "xoxb-", made(12, "0123456789") + "-" + made(24, base62), ""}, {"Slack, app", "xapp-1-", "A" + made(10, upper) + "-" + made(13, "0123456789") + "-" + made(64, hexa), ""},
	{"Slack, hook", "https://hooks.slack.com/services/", "T" + made(8, upper) + "/B" + made(8, upper) + "/" + made(24, base62), ""},
	{"Google, API", "AIza", made(35, base62+"_-"), ""}, {"Google, access", "ya29.", made(60, base62+"_-"), ""},
	{"Google, client", "GOCSPX-", made(28, base62+"_-"), ""}, {"Google, refresh", "1//", "0" + made(60, base62+"_-"), ""},
	{"npm", "npm_", made(36, base62), ""}, {"PyPI", "pypi-", "AgEIcHlwaS5vcmc" + made(120, base62+"_-"), ""},
	{"Hugging Face", "hf_", made(34, base62), ""}, {"Stripe", "sk_live_", made(24, base62), ""}, {"SendGrid", "SG.", made(22, base62) + "." + made(43, base62), ""},
	{"DigitalOcean", "dop_v1_", made(64, hexa), ""}, {"Vault", "hvs.", made(90, base62+"_-"), ""}, {"Docker", "dckr_pat_", made(27, base62+"_-"), ""},
	{"JWT", "eyJ", "hbGciOiJIUzI1NiJ9.eyJ" + made(60, base62) + "." + made(43, base62+"_-"), ""}, {"PASETO", "v4.local.", made(120, base62+"_-"), ""},
	{"age", "AGE-SECRET-KEY-1", made(58, upper), ""}, {"note key", "PRIVATE+KEY+log+0a1b2c3d+", encoded(33), ""},
	{"PEM", "-----BEGIN RSA PRIVATE KEY-----\n", encoded(48) + "\n" + encoded(48), "\n-----END RSA PRIVATE KEY-----"},
	{"PEM, OpenSSH", "-----BEGIN OPENSSH PRIVATE KEY-----\n", encoded(48), "\n-----END OPENSSH PRIVATE KEY-----"},
	{"PEM, cut off", "-----BEGIN PRIVATE KEY-----\n", encoded(48), ""},
	{"password in a URL", "postgres://ada:", made(9, base62), "@db.example.org/x"}, {"token in a URL", "https://", made(24, base62), "@example.org/x.git"},
	{"without a known form", "", made(32, base62), ""}, {"without a known form, 40", "", made(40, base62+"_-"), ""},
}

// texts are where a secret may stand; %s is it.
var texts = []string{
	"%s", "a word %s and more", "TOKEN=%s make deploy", "{\"x\": \"%s\"}", "line one\nline two: %s\nline three", "curl https://example.org/?q=%s", "<%s>", "'%s'",
}

// Every kind of secret at every place: nothing of it is shown, and what stands beside is.
func TestShownHidesSecrets(t *testing.T) {
	for _, s := range secrets {
		whole := s.before + s.secret + s.after
		for _, text := range texts {
			if strings.Contains(text, "'") && strings.Contains(whole, "cut off") {
				continue
			}
			for name, v := range map[string]any{
				"text": fmt.Sprintf(text, whole), "list": []string{"run", fmt.Sprintf(text, whole), "--fast"},
				"object": map[string]any{"path": "a.txt", "content": map[string]string{"deep": fmt.Sprintf(text, whole)}}, "key": map[string]int{fmt.Sprintf(text, whole): 1},
			} {
				shown := string(Shown(v))
				for i := 0; i+12 <= len(s.secret); i++ {
					if part := s.secret[i : i+12]; strings.Contains(shown, part) {
						t.Fatalf("%s as %s in %q: %q is shown: %s", s.name, name, text, part, shown)
					}
				}
				if !strings.Contains(shown, redacted) {
					t.Fatalf("%s as %s in %q: %s", s.name, name, text, shown)
				}
				if again := string(Shown(json.RawMessage(shown))); again != shown {
					t.Fatalf("%s as %s in %q: shown again: %s, first %s", s.name, name, text, again, shown)
				}
			}
		}
		if got := string(Shown("a word " + whole + " and more")); !strings.Contains(got, "a word ") || !strings.Contains(got, " and more") && !strings.Contains(s.name, "cut off") {
			t.Errorf("%s: what stands beside it is gone: %s", s.name, got)
		}
	}
}

// Secrets that only a name or a place tells, short ones and guessable ones too.
func TestShownByName(t *testing.T) {
	const secret = "hunter2"
	for _, text := range []string{
		"Authorization: Basic " + secret, "Authorization: Bearer " + secret, "authorization: token " + secret, "Proxy-Authorization: Digest username=\"ada\", response=\"" + secret + "\"",
		"AUTHORIZATION:" + secret, "Cookie: theme=dark; session=" + secret + "; lang=en", "Set-Cookie: sid=" + secret + "; HttpOnly", "cookie: a=" + secret,
		"GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b; c=" + secret + "\r\nAccept: */*\r\n\r\n",
		"curl -H 'Cookie: a=b; c=" + secret + "' https://example.org", `curl -H "X-Api-Key: ` + secret + `" https://example.org`,
		"aws_secret_access_key = " + secret, "password=" + secret, "PASSWORD: '" + secret + "'", "\"client_secret\": \"" + secret + "\"",
		"AccountKey=" + secret + ";EndpointSuffix=x", "//registry.example.org/:_authToken=" + secret, "export DB_PASSWORD=" + secret + " && make",
		"https://ada:" + secret + "@example.org/", "redis://:" + secret + "@cache:6379", "machine.passphrase=" + secret, "sessionId=" + secret,
	} {
		shown := string(Shown(text))
		if strings.Contains(shown, secret) || !strings.Contains(shown, redacted) {
			t.Errorf("%q: %s", text, shown)
		}
		if again := string(Shown(json.RawMessage(shown))); again != shown {
			t.Errorf("%q: shown again: %s, first %s", text, again, shown)
		}
	}
	for _, v := range []any{
		map[string]any{"password": secret}, map[string]any{"headers": map[string]any{"Authorization": []string{secret}}}, map[string]any{"Set-Cookie": secret},
		map[string]any{"env": map[string]string{"NPM_TOKEN": secret, "AWS_SECRET_ACCESS_KEY": secret}}, []string{"login", "--password", secret}, []string{"x", "--api-key=" + secret},
		[]string{"curl", "-u", "ada:" + secret, "https://example.org"}, []string{"curl", "--user", "ada:" + secret}, map[string]any{"privateKey": secret},
	} {
		shown := string(Shown(v))
		if strings.Contains(shown, secret) || !strings.Contains(shown, redacted) {
			t.Errorf("%v: %s", v, shown)
		}
	}
}

// The twins: what looks like a secret and is what a reader of the log needs to see.
func TestShownKeepsTheRest(t *testing.T) {
	image := "data:image/png;base64," + encoded(2000)
	wrapped := strings.Join([]string{encoded(57), encoded(57), encoded(57), encoded(20)}, "\n")
	for _, text := range []string{
		"commit " + made(40, hexa), made(12, hexa), "sha256:" + made(64, hexa), made(128, hexa), "tree " + made(64, hexa),
		"550e8400-e29b-41d4-a716-446655440000", "01ARZ3NDEKTSV4RRFFQ69G5FAV", nucleus.NewID("q-"), nucleus.NewID("a-"), "p-xgvre4zojk",
		"golang.org/x/mod v0.42.0 h1:" + encoded(32), "sha512-" + encoded(64), "SHA256:" + strings.TrimRight(encoded(32), "="),
		"v0.0.0-20260720115447-2e1c6971d19e", "github.com/transparency-dev/witness@v0.0.0-20260720115447-2e1c6971d19e/omniwitness/omniwitness.go",
		"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + made(43, base62) + " ada@example.org",
		"-----BEGIN PUBLIC KEY-----\n" + wrapped + "\n-----END PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----\n" + wrapped + "\n-----END CERTIFICATE-----",
		image, wrapped, "/home/ada/src/github.com/ada/Project2/internal/HTTPServer/handlerV2_test.go", "C:/Users/Ada/Documents/Project2024/src/Main.java",
		"TestNothingIsAcknowledgedBeforeItsSync", "TestIPv6LinkLocalUnicastTCP", "IsHTTP2NoCachedConnError", "AbstractSingletonProxyFactoryBean2",
		"SOME_VERY_LONG_CONSTANT_NAME_42", "--max-tokens=1000", "max_tokens: 4096", "tokenizer = bpe", "author: Ada", "authority=x.example.org", "keyboard: us",
		"https://example.org/a/b?page=2&sort=name", "https://docs.example.org/reference/authorizations-and-cookies", "postgres://db.example.org:5432/x", "user@example.org",
		"basic usage", "Basic authentication is described below", "bearer of news", "12:34:56", "a = b", "key: value", "docker run -u 1000:1000 x",
		"secretary", "passwords are hashed", "the token is invalid", "cookie-cutter", "Tue, 14 Nov 2023 22:13:20 GMT", "x509: certificate signed by unknown authority",
	} {
		want, err := nucleus.Canonical(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := Shown(text); string(got) != string(want) && !strings.Contains(string(got), cutMark) || strings.Contains(string(got), redacted) {
			t.Errorf("%q is shown as %.200s", text, got)
		}
	}
	for _, v := range []any{
		[]string{"docker", "run", "-u", "1000:1000", "x"}, []string{"docker", "run", "--user", "1000:1000", "x"}, []string{"go", "test", "-run", "TestX"}, []string{"git", "checkout", made(40, hexa)},
		map[string]any{"max_tokens": 100, "token_count": 7}, map[string]any{"token": ""}, map[string]any{"old": made(40, hexa), "new": made(40, hexa), "ref": "refs/heads/agent/fix"},
	} {
		if got := string(Shown(v)); strings.Contains(got, redacted) {
			t.Errorf("%v is shown as %s", v, got)
		}
	}
}

// Of what is random and has no known form, little gets by; of names, little is taken.
func TestRandomText(t *testing.T) {
	for _, n := range []int{24, 32, 40, 64} {
		missed := 0
		for range 2000 {
			if s := made(n, base62); redactRandom(s) == s {
				missed++
			}
		}
		if limit := map[int]int{24: 250, 32: 130, 40: 60, 64: 20}[n]; missed > limit {
			t.Errorf("%d of 2000 texts of %d characters were taken for words, at most %d may be", missed, n, limit)
		}
	}
	words := []string{"Abstract", "HTTP2", "handler", "Factory", "IPv6", "test", "Server", "request", "JSON", "Node", "value", "Index", "get", "URL"}
	taken := 0
	for range 5000 {
		var name strings.Builder
		for name.Len() < 30 {
			name.WriteString(words[letters.IntN(len(words))])
		}
		if got := redactRandom(name.String()); got != name.String() {
			taken++
		}
	}
	if taken > 250 {
		t.Errorf("%d of 5000 names were taken for secrets", taken)
	}
}

func FuzzShown(f *testing.F) {
	for _, s := range secrets {
		f.Add(s.before + s.secret + s.after)
	}
	f.Fuzz(func(t *testing.T, text string) {
		shown := Shown(text)
		if len(shown) > maxShown || !json.Valid(shown) {
			t.Fatalf("%q: %s", text, shown)
		}
	})
}
