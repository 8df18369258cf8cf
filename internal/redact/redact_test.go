package redact

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

const (
	base62 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	upper  = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
	hexa   = "0123456789abcdef"
	small  = "abcdefghijklmnopqrstuvwxyz0123456789"
)

// shownOf is v as JSON without its secrets.
func shownOf(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var value any
	if err := dec.Decode(&value); err != nil {
		panic(err)
	}
	before, _ := json.Marshal(value)
	clean, changed := Value(value)
	if after, _ := json.Marshal(clean); changed == bytes.Equal(before, after) {
		panic(fmt.Sprintf("changed: %v\n%s\n%s", changed, before, after))
	}
	shown, err := nucleus.Canonical(clean)
	if err != nil {
		panic(err)
	}
	return shown
}

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
	{"Stripe, hook", "whsec_", made(32, base62), ""}, {"GitLab, runner", "glrt-", made(20, base62), ""}, {"GitLab, trigger", "glptt-", made(40, hexa), ""}, {"xAI", "xai-", made(80, base62), ""},
	{"Groq", "gsk_", made(52, base62), ""}, {"Perplexity", "pplx-", made(48, hexa), ""}, {"Atlassian", "ATATT3xFfGF0", made(180, base62+"_-"), "=1A2B3C4D"}, {"Bitbucket", "ATBB", made(32, base62), ""}, {"Linear", "lin_api_", made(40, base62), ""},
	{"Shopify", "shpat_", made(32, hexa), ""}, {"Figma", "figd_", made(40, base62+"_-"), ""}, {"Grafana", "glsa_", made(32, base62) + "_" + made(8, hexa), ""}, {"DigitalOcean, OAuth", "doo_v1_", made(64, hexa), ""}, {"Tailscale", "tskey-auth-", made(16, base62) + "-" + made(32, base62), ""},
	{"RubyGems", "rubygems_", made(48, hexa), ""}, {"Postman", "PMAK-", made(24, hexa) + "-" + made(34, hexa), ""}, {"New Relic", "NRAK-", made(27, upper), ""}, {"Vault, batch", "hvb.", made(90, base62+"_-"), ""},
	{"RSA, unarmoured", "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", made(1500, base62+"+/"), "=="}, {"RSA, unarmoured, PKCS 1", "MIIEowIBAAKCAQEA", made(1500, base62+"+/"), ""}, {"EC, unarmoured", "MIGHAgEAMBMGByqGSM49", made(140, base62+"+/"), ""}, {"Ed25519, unarmoured", "MC4CAQAwBQYDK2VwBCIE", made(44, base62+"+/"), ""},
	{"small letters and digits", "", "q7" + made(38, small) + "x9z1", ""}, {"base64 of 150 bytes", "", encoded(150), ""},
	{"without a known form", "", made(32, base62), ""}, {"without a known form, 40", "", made(40, base62+"_-"), ""},
}

// texts are where a secret may stand; %s is it.
var texts = []string{
	"%s", "a word %s and more", "TOKEN=%s make deploy", "{\"x\": \"%s\"}", "line one\nline two: %s\nline three", "curl https://example.org/?q=%s", "<%s>", "'%s'",
}

// Every kind of secret at every place: nothing of it is shown, and what stands beside is.
func TestHidesSecrets(t *testing.T) {
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
				shown := string(shownOf(v))
				for i := 0; i+12 <= len(s.secret); i++ {
					if part := s.secret[i : i+12]; strings.Contains(shown, part) {
						t.Fatalf("%s as %s in %q: %q is shown: %s", s.name, name, text, part, shown)
					}
				}
				if !strings.Contains(shown, Mark) {
					t.Fatalf("%s as %s in %q: %s", s.name, name, text, shown)
				}
				if again := string(shownOf(json.RawMessage(shown))); again != shown {
					t.Fatalf("%s as %s in %q: shown again: %s, first %s", s.name, name, text, again, shown)
				}
			}
		}
		if got := string(shownOf("a word " + whole + " and more")); !strings.Contains(got, "a word ") || !strings.Contains(got, " and more") && !strings.Contains(s.name, "cut off") {
			t.Errorf("%s: what stands beside it is gone: %s", s.name, got)
		}
	}
}

// Secrets that only a name or a place tells, short ones and guessable ones too. § is the secret.
func TestByName(t *testing.T) {
	const secret = "hunter2correct"
	for _, text := range []string{
		// headers
		"Authorization: Basic §", "Authorization: Bearer §", "authorization: token §", "Proxy-Authorization: Digest username=\"ada\", response=\"§\"",
		"AUTHORIZATION:§", "Cookie: theme=dark; session=§; lang=en", "Set-Cookie: sid=§; HttpOnly", "cookie: a=§", "Host: a\r\nX-Api-Key: §",
		"GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b; c=§\r\nAccept: */*\r\n\r\n", `printf 'Host: a\r\nX-Api-Key: §\r\n'`,
		"curl -H 'Cookie: a=b; c=§' https://example.org", `curl -H "X-Api-Key: §" https://example.org`, "X-Auth: §", "X-Auth-Token: §",
		// assignments
		"aws_secret_access_key = §", "password=§", "PASSWORD: '§'", "\"client_secret\": \"§\"", "AccountKey=§;EndpointSuffix=x", "//registry.example.org/:_authToken=§", "export DB_PASSWORD=§ && make",
		"machine.passphrase=§", "sessionId=§", "PGPASSWORD=§ psql", "DB_PASS=§", "SSHPASS=§", "DBPASSWORD=§", "clientsecret=§", "clientsecret: §", "GITHUB_PAT=§ gh api", "REDISCLI_AUTH=§", "pass=§", "pw=§", "auth=§", "_auth=§",
		"env:\n  GITHUB_PAT: §", "DB_PASS: §", "MYSQL_PWD=§", "smtp_pass: §", "userPass=§", "password := \"§\"", "password == \"§\"", "os.environ[\"PASSWORD\"] = \"§\"", "config['api_key'] = '§'", ":password => '§'", "password?=§", "pass := `§`",
		// behind another name
		"https://x/?access_token=§", "https://x/?api_key=§", "https://x/a?b=c&password=§&d=e", "wss://h/?token=§", "--env=DB_PASSWORD=§", "env: API_TOKEN=§", "note: password=§", "config: {password: §}", "a=b:token=§", "-Dpassword=§", "java -Djavax.net.ssl.keyStorePassword=§ -jar x",
		"{user: ada, password: §}", "run(user=ada, password=§)", "$env:API_TOKEN=\"§\"", "set -x; TOKEN=§", "cmd --env API_KEY=§", "-e TOKEN=§", "see:\tsecret: §",
		// JSON and the like in a string
		`{"password":"§"}`, `{"a":"{\"password\":\"§\"}"}`, `{\"password\":\"§\"}`, `{\\\"api_key\\\": \\\"§\\\"}`, `{"password":"quo\"§"}`, `{"password" : "§"}`, `{'token': '§'}`, `{"passwords": ["a", "§"]}`, `{"secret": {"deep": ["§"]}, "x": 1}`,
		`[{"name":"Authorization","value":"§"}]`, `[{"key": "api_key", "value": "a \" §"}]`, `{\"name\":\"X-Api-Key\",\"value\":\"§\"}`, "passwords: [a, §]", `data: "{\"auth\":\"§\"}"`,
		// YAML and XML
		"password: correct horse §", "user: ada\npassword: correct horse §\nhost: x", "password: |\n  one\n  §\nhost: x", "a:\n  - passphrase: >-\n      one\n\n      §\n    b: c", "<password>§</password>", "<x><apiKey id=\"1\">§</apiKey></x>", "<pass>§</pass>",
		"my password: §", "the secret: §",
		// URLs
		"https://ada:§@example.org/", "redis://:§@cache:6379", "https://user:pa/§@h/x", "https://user:pa@§@h/x", "postgres://u:a:§@h/x",
		// commands
		"deploy --pass §", "deploy --password §", "deploy --password -§", "deploy --token § --verbose", "x --api-key §", "sshpass -p § ssh ada@h", "sshpass -p§ ssh ada@h", "mysql -u root -p§ x", "mysqldump -p§ --all-databases > x", "docker login -u ada -p § registry.example.org", "sudo docker login -p§",
		"curl -u ada:§ https://x", "curl -uada:§ https://x", "curl -s -U 'ada:§' https://x", "curl --proxy-user ada:§ x", "curl --user=ada:§ x", "curl -b sid=§ https://x", "curl -b 'sid=§; a=b' https://x", "cd /x && /usr/bin/curl -u \"ada:§\" https://x | jq .",
		"openssl enc -pass pass:§ -in x", "openssl rsa -passin pass:§", "redis-cli -a § ping", "unzip -P § a.zip", "7z x -p§ a.7z", "sh -c 'mysql -p§'", "X=1 sshpass -p \"§\" scp a b",
	} {
		hidden(t, strings.ReplaceAll(text, "§", secret), secret)
	}
	for _, v := range []any{
		map[string]any{"GITHUB_PAT": secret}, map[string]any{"pass": secret}, map[string]any{"auth": secret},
		[]map[string]any{{"name": "Authorization", "value": secret}}, map[string]any{"Key": "x-api-key", "Value": secret}, [][]string{{"Accept", "*/*"}, {"X-Api-Key", secret}}, [][]string{{"Cookie", secret}},
		[]string{"curl", "-u", "ada:" + secret, "https://example.org"}, []string{"curl", "--user", "ada:" + secret}, []string{"/usr/bin/curl", "-uada:" + secret}, []string{"curl", "-b", "sid=" + secret}, map[string]any{"privateKey": secret},
		[]string{"deploy", "--pass", secret}, []string{"deploy", "--password", "-" + secret}, []string{"sudo", "sshpass", "-p", secret, "ssh", "h"}, []string{"mysql", "-p" + secret}, []string{"docker", "login", "-u", "ada", "-p", secret}, []string{"openssl", "enc", "-pass", "pass:" + secret},
		[]string{"sh", "-c", "sshpass -p " + secret + " ssh h"}, []string{"java", "-Dpassword=" + secret}, []string{"aws", "configure", "set", "aws_secret_access_key", secret}, []string{"npm", "config", "set", "//r.example.org/:_authToken", secret}, []string{"redis-cli", "-a", secret},
		[]string{"-----BEGIN PRIVATE KEY-----", secret, "x", "-----END PRIVATE KEY-----"}, []string{"echo", "a\n-----BEGIN EC PRIVATE KEY-----", secret},
		map[string]any{"password": secret}, map[string]any{"headers": map[string]any{"Authorization": []string{secret}}}, map[string]any{"Set-Cookie": secret},
		map[string]any{"env": map[string]string{"NPM_TOKEN": secret, "AWS_SECRET_ACCESS_KEY": secret}}, []string{"login", "--password", secret}, []string{"x", "--api-key=" + secret},
	} {
		hidden(t, v, secret)
	}
}

// A number under the name of a password is one; under the name of a token it counts.
func TestNumbers(t *testing.T) {
	hidden(t, map[string]any{"password": 1234567890}, "1234567890")
	hidden(t, map[string]any{"db": map[string]any{"PGPASSWORD": 1234567890}}, "1234567890")
	hidden(t, map[string]any{"passwords": []int{1234567890}}, "1234567890")
	if got := string(shownOf(map[string]any{"token": 12, "password": nil, "secret": false})); strings.Contains(got, Mark) {
		t.Errorf("got %s", got)
	}
}

// hidden checks that nothing of a secret is shown of v, and that what is shown stays as it is.
func hidden(t *testing.T, v any, secret string) {
	t.Helper()
	shown := string(shownOf(v))
	if strings.Contains(shown, secret) || !strings.Contains(shown, Mark) {
		t.Errorf("%q: %s", v, shown)
	}
	if again := string(shownOf(json.RawMessage(shown))); again != shown {
		t.Errorf("%q: shown again: %s, first %s", v, again, shown)
	}
}

// The twins: what looks like a secret and is what a reader of the log needs to see.
func TestKeepsTheRest(t *testing.T) {
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
		// what is about a secret, and words that are no names
		`token_count: "12"`, "s/token: abc/", "Bump secret: rotation", "fix the token: expire it", "passwordField = document.getElementById('x')", "password_file=/run/secrets/db", "secretName: db-credentials", "token_type: bearer", "token_url = https://example.org/oauth",
		"--password-stdin", "docker login --password-stdin registry.example.org", "--token-file /run/token", "--no-password --host x", "./token.go:12:5: undefined: x", "internal/auth/secret.go:7: unused", "auth: required", "auth=none", "auth = HTTPBasicAuth(user)", "pass: 5, fail: 0", "PASS: TestFoo (0.00s)", "--- PASS: TestAuth",
		"PWD=/home/ada", "OLDPWD=/", "FORCE_AUTH=true", "bypass=1", "compass: north", "two-pass: yes", "single_pass=0", "path: a", "PATH=/usr/bin:/bin", "patch=1", "format=pat", "token: null", "password: false", `{"token":null,"secret":false}`, `{"password":""}`, "password:", "a: b: c", "secret::Name x", "std::auth::token(x)",
		`{"name":"path","value":"x"}`, `[{"name":"Accept","value":"*/*"}]`, "<label>Password</label>", "<token>  </token>", "author: Ada, title: x", "tokens: [1, 2]", `{"tokens":{"input":12}}`, "keys: [a, b]", "key=value", "monkey: x", "turkey=1",
		// options of other programs, and other options
		"docker run -p 8080:80 -u 1000:1000 x", "docker run -p 8080:80 login", "ssh -p 2222 ada@h", "mkdir -p a/b", "cp -pR a b", "mysql -u root -p mydb", "curl -b cookies.txt https://x", "curl -u ada https://x", "curl -X POST https://x", "openssl rsa -passin file:/x -in key.pem", "openssl rsa -passin env:X", "redis-cli -p 6379", "unzip -p a.zip", "tar -pxf a.tar", "git log -p token.go", "grep -rn token: src", "sed -i s/secret/x/ f",
		"go test -run TestPassword -v", "npm run auth -- --watch", "pass insert x", "python -m http.server --bind x -p 80",
		// URLs with a port, a scope and an at sign behind the host
		"https://registry.example.org:4873/@scope/pkg", "http://[::1]:8080/@x", "git@example.org:a/b.git", "ssh://git@example.org:22/a/b.git", "https://ada@example.org/x", "https://example.org/@ada", "https://example.org/a?to=x@example.org", "mailto:a@b.example", "http://localhost:3000/a:b@c", "op://vault/item/password",
		// the twins of the runs
		"/nix/store/3f8q0xk2v9wz7c5m1n4b6p8r0s2t4a6d-hello-2.12", "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi", "http://p53lf57qovyuvwsc6xnrppyply3vtqm7l6pcobkmyqsiofyeznfu5uqd.onion/x", "md5sum d41d8cd98f00b204e9800998ecf8427e", "abc123def456", "ubuntu-22.04.3-live-server-amd64.iso", "cp311-cp311-manylinux_2_17_x86_64", "node2server3handler4request8value", "windowsserver2019datacenter64bit",
		"MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE" + made(80, base62), "MCowBQYDK2VwAyEA" + made(43, base62), "src: data:font/woff2;base64," + encoded(120), "sha512: " + made(128, hexa),
		"secretary", "passwords are hashed", "the token is invalid", "cookie-cutter", "Tue, 14 Nov 2023 22:13:20 GMT", "x509: certificate signed by unknown authority",
	} {
		want, err := nucleus.Canonical(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := shownOf(text); string(got) != string(want) || strings.Contains(string(got), Mark) {
			t.Errorf("%q is shown as %.200s", text, got)
		}
	}
	for _, v := range []any{
		[]string{"docker", "run", "-u", "1000:1000", "x"}, []string{"docker", "run", "--user", "1000:1000", "x"}, []string{"go", "test", "-run", "TestX"}, []string{"git", "checkout", made(40, hexa)},
		map[string]any{"PWD": "/workspace", "PATH": "/bin"}, map[string]any{"auth": map[string]any{"type": "basic"}}, map[string]any{"auth": "none", "pass": 3}, map[string]any{"token_count": "12", "passwordField": "x", "tokens": map[string]int{"input": 3}},
		[]map[string]any{{"name": "Accept", "value": "*/*"}}, [][]string{{"Accept", "*/*"}, {"X-Request-Id", "7"}}, []string{"secret", "list"}, []string{"vault", "token", "lookup"}, []string{"mysql", "-p", "mydb"}, []string{"docker", "run", "-p", "80:80", "x"}, []string{"curl", "-b", "jar.txt"},
		[]string{"docker", "login", "--password-stdin", "registry.example.org"}, []string{"x", "--password", "--verbose"}, []string{"x", "--token", "-v"}, []string{"x", "--no-auth", "target"}, []string{"git", "config", "set", "user.name", "Ada"}, []string{"-----BEGIN CERTIFICATE-----", "abc", "-----END CERTIFICATE-----"},
		map[string]any{"max_tokens": 100, "token_count": 7}, map[string]any{"token": ""}, map[string]any{"old": made(40, hexa), "new": made(40, hexa), "ref": "refs/heads/agent/fix"},
	} {
		if got := string(shownOf(v)); strings.Contains(got, Mark) {
			t.Errorf("%v is shown as %s", v, got)
		}
	}
}

// Of what is random and has no known form, little gets by; of names, little is taken.
func TestRandomText(t *testing.T) {
	for _, c := range []struct {
		of    string
		n     int
		limit int // of 2000
	}{
		{base62, 24, 250}, {base62, 32, 130}, {base62, 40, 60}, {base62, 64, 20}, {base62, 128, 2}, {base62, 250, 1}, {base62 + "+/", 40, 80}, {small, 32, 260}, {small, 40, 120}, {small, 64, 60},
	} {
		missed := 0
		for range 2000 {
			if s := made(c.n, c.of); redactRandom(s) == s {
				missed++
			}
		}
		t.Logf("%d characters of %d: %.1f %% are shown", c.n, len(c.of), float64(missed)/20)
		if missed > c.limit {
			t.Errorf("%d of 2000 texts of %d characters of %d were taken for words, at most %d may be", missed, c.n, len(c.of), c.limit)
		}
	}
	for _, words := range [][]string{
		{"Abstract", "HTTP2", "handler", "Factory", "IPv6", "test", "Server", "request", "JSON", "Node", "value", "Index", "get", "URL"},
		{"windows", "server", "2019", "x64", "http2", "node", "amd64", "handler", "v1", "release", "test", "build", "py", "debian12"},
	} {
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
		t.Logf("%d of 5000 names as of %v are taken for secrets", taken, words[:4])
		if taken > 250 {
			t.Errorf("%d of 5000 names as of %v were taken for secrets", taken, words[:4])
		}
	}
	for range 5000 {
		for _, n := range []int{32, 40, 64} {
			if digest := made(n, hexa); redactRandom(digest) != digest {
				t.Fatalf("%s was taken for a secret", digest)
			}
		}
	}
}

// The time is in proportion to the text, whatever it is.
func TestTimeIsBounded(t *testing.T) {
	for _, text := range []string{
		"a://", "token:[", "token={", "auth=f(", "token=a[redacted]", "password: ", "password: |\n ", "\"", "'", "\\", "token=\"", "token='\\'", "auth=\\\"", "=", ":", " = ", "--token ", "-", "curl -u a ", "curl ", "docker login ", "<a>", "<token>", "</", "a</a>",
		"\"name\":\"token\",", "\"name\":\"token\",\"value\":\"", "Cookie: ", "Authorization:\"", "Bearer abcdefgh1 ", "a1b2", "A1b2C3d4", "A1b2C3d4\n", "-----BEGIN PRIVATE KEY-----", "ghp_", "eyJ", "[", "{", "x.x.x.", "mysql -p", "@", "a:b@", "token: ab.", "Basic YTpi", "pass=", "\n", "\\n",
	} {
		long := strings.Repeat(text, (256<<10)/len(text))
		started := time.Now()
		Text(long)
		if took := time.Since(started); took > 3*time.Second {
			t.Errorf("%d bytes of %q took %s", len(long), text, took)
		}
	}
}

func FuzzValue(f *testing.F) {
	for _, s := range secrets {
		f.Add(s.before + s.secret + s.after)
	}
	f.Fuzz(func(t *testing.T, text string) {
		shown := shownOf(text)
		if !json.Valid(shown) {
			t.Fatalf("%q: %s", text, shown)
		}
		if again := shownOf(json.RawMessage(shown)); string(again) != string(shown) {
			t.Fatalf("%q: shown again: %s, first %s", text, again, shown)
		}
	})
}
