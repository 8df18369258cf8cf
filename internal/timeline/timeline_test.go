package timeline

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	texttemplate "text/template"
	"time"

	"cal/audit"
	"cal/nucleus"
)

// session makes the verified receipt of entries that come at the given offsets.
type session struct {
	entries []nucleus.Entry
	at      []time.Duration
	now     time.Duration
}

func (s *session) add(after time.Duration, e nucleus.Entry) {
	s.now += after
	e.Session, e.Pod = "s-1", "p-1"
	s.entries, s.at = append(s.entries, e), append(s.at, s.now)
}

func js(v any) json.RawMessage {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return raw
}

func (s *session) receipt(t testing.TB) *audit.Receipt {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	i := 0
	l, err := audit.Open(dir, audit.Options{Origin: nucleus.LogOrigin, Key: key, Now: func() time.Time {
		return time.Date(2026, 3, 4, 9, 0, 0, 0, time.UTC).Add(s.at[min(i, len(s.at)-1)])
	}})
	if err != nil {
		t.Fatal(err)
	}
	var pending []*audit.Pending
	for n, e := range s.entries {
		i = n
		p, err := l.Begin(e)
		if err != nil {
			t.Fatal(err)
		}
		pending = append(pending, p)
	}
	for _, p := range pending {
		if _, err := p.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	o := audit.ReceiptOptions{Key: audit.VerifierKey(nucleus.LogOrigin, key.Public().(ed25519.PublicKey)), Session: "s-1"}
	raw, err := audit.NewReceipt(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := audit.VerifyReceipt(raw, audit.VerifyReceiptOptions{Key: o.Key})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// call adds a request and its outcome.
func (s *session) call(after, took time.Duration, a nucleus.Action, exposure []string, exit int) {
	permit := fmt.Sprintf("r-%d", len(s.entries))
	s.add(after, nucleus.Entry{Kind: nucleus.KindIntent, Actor: "b-1", Op: a.Op, Args: js(a), Verdict: nucleus.Allow, Rule: "operations." + string(a.Op), Permit: permit, Exposure: exposure, Digest: nucleus.SHA256([]byte(permit))})
	outcome := nucleus.Outcome{Permit: permit, Pod: "p-1", Boot: "b-1", Status: nucleus.OutcomeDone, ExitCode: exit, Millis: took.Milliseconds()}
	if a.Op.OnHost() {
		admitted, _ := nucleus.Canonical(nucleus.Outcome{Permit: permit, Pod: "p-1", Boot: "b-1", Status: nucleus.OutcomeAdmitted})
		outcome.Admission = &nucleus.Signed{Payload: admitted, Sig: []byte("x")}
	}
	payload, _ := nucleus.Canonical(outcome)
	s.add(took, nucleus.Entry{Kind: nucleus.KindOutcome, Actor: "b-1", Op: a.Op, Permit: permit, Status: nucleus.OutcomeDone, Outcome: &nucleus.Signed{Payload: payload, Sig: []byte("x")}})
}

// long makes a session of n entries as an agent's day has them: reads, edits, tests, a
// page, asks, refusals, a pause for a person.
func long(n int) *session {
	random := rand.New(rand.NewPCG(1, 2))
	ms := func(from, to int) time.Duration { return time.Duration(from+random.IntN(to-from)) * time.Millisecond }
	var s session
	s.add(0, nucleus.Entry{Kind: nucleus.KindPodCreate, Actor: "operator", Data: js(map[string]any{"driver": "gvisor", "tier": "kernel", "mode": "mediated", "workspace": "shop"})})
	s.add(ms(300, 600), nucleus.Entry{Kind: nucleus.KindPodStart, Actor: "operator", Data: js(map[string]any{"policy": map[string]any{"name": "safe-pr-fixer"}})})
	s.add(ms(100, 200), nucleus.Entry{Kind: nucleus.KindRepoImport, Actor: "operator", Data: js(map[string]any{"repo": "shop", "branch": "agent/claude-code", "base": "deb8c13c9d47be36b38ce19a4c3b0e39367f5eae"})})
	s.add(ms(100, 200), nucleus.Entry{Kind: nucleus.KindSessionStart, Actor: "operator", Data: js(map[string]any{"agent": "claude-code"})})
	files := []string{"shop/README.md", "shop/go.mod", "shop/cart/cart.go", "shop/cart/cart_test.go", "shop/api/orders.go", "shop/api/orders_test.go", "shop/web/src/components/checkout/payment-form.tsx", "shop/web/package.json", "shop/db/migrations/0007_orders.sql", "shop/internal/money/money.go", "shop/internal/money/round.go", "shop/.github/workflows/ci.yml"}
	programs := [][]string{{"go", "test", "./..."}, {"go", "vet", "./..."}, {"git", "status"}, {"npm", "test"}, {"ls", "-la"}, {"grep", "-rn", "TODO", "."}}
	exposure := []string{"private"}
	dollars := 5.0
	for len(s.entries) < n-6 {
		if len(s.entries) > n/3 {
			exposure = []string{"private", "untrusted", "way_out"}
		}
		id := fmt.Sprintf("mc-%d", len(s.entries))
		call := map[string]any{"id": id, "host": "api.anthropic.com", "port": 443, "done": false}
		s.add(ms(40, 900), nucleus.Entry{Kind: nucleus.KindModelCall, Actor: "agent", Data: js(call)})
		cost := 0.002 + random.Float64()*0.012
		dollars -= cost
		took := ms(900, 9000)
		call = map[string]any{"id": id, "host": "api.anthropic.com", "port": 443, "done": true, "status": 200, "model": "claude-sonnet", "took": took, "tokens": map[string]any{"input": 2000 + random.IntN(30000), "output": 50 + random.IntN(900)}, "usd": cost, "left": map[string]any{"usd": dollars}}
		s.add(took, nucleus.Entry{Kind: nucleus.KindModelCall, Actor: "agent", Data: js(call)})
		file := nucleus.File{Path: files[random.IntN(len(files))]}
		switch k := random.IntN(20); {
		case k < 8:
			s.call(ms(5, 40), ms(1, 9), nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{file}}, exposure, 0)
		case k < 12:
			s.call(ms(5, 40), ms(2, 20), nucleus.Action{Op: nucleus.EditFiles, Files: []nucleus.File{file}}, exposure, 0)
		case k < 13:
			s.call(ms(5, 40), ms(2, 200), nucleus.Action{Op: nucleus.GrepSearch, Files: []nucleus.File{{Path: "shop"}}}, exposure, 0)
		case k < 17:
			s.call(ms(5, 40), ms(80, 14000), nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: programs[random.IntN(len(programs))], Dir: "shop"}}, exposure, random.IntN(4)/3)
		case k < 18:
			s.call(ms(5, 40), ms(50, 150), nucleus.Action{Op: nucleus.GitCommit, Commit: &nucleus.Commit{Repo: "shop", Message: "Round half to even"}}, exposure, 0)
		case k < 19 && len(exposure) > 1:
			attempt := fmt.Sprintf("eg-%d", len(s.entries))
			d := map[string]any{"attempt": attempt, "host": []string{"pkg.go.dev", "docs.stripe.com", "registry.npmjs.org"}[random.IntN(3)], "port": 443}
			s.add(ms(5, 40), nucleus.Entry{Kind: nucleus.KindEgressOpen, Actor: "machine", Op: nucleus.WebFetch, Data: js(d)})
			d["sent"], d["received"] = 700, 48213
			s.add(ms(100, 3000), nucleus.Entry{Kind: nucleus.KindEgressClose, Actor: "machine", Op: nucleus.WebFetch, Data: js(d)})
		case random.IntN(4) == 0:
			host := []string{"metrics.evil.example", "paste.example"}[random.IntN(2)]
			s.add(ms(5, 40), nucleus.Entry{Kind: nucleus.KindIntent, Actor: "machine", Op: nucleus.NetConnect, Verdict: nucleus.Deny, Rule: "hosts", Status: nucleus.OutcomeRefused, Exposure: exposure, Args: js(nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: 443}})})
		}
	}
	push := nucleus.Action{Op: nucleus.GitPush, Push: &nucleus.Push{Repo: "shop", Remote: "https://github.com/ada/shop", Ref: "refs/heads/agent/claude-code"}}
	s.add(ms(5, 40), nucleus.Entry{Kind: nucleus.KindApprovalAsk, Actor: "b-1", Op: nucleus.GitPush, Args: js(push), Verdict: nucleus.Ask, Rule: "trifecta", Ask: "a-1"})
	s.add(42*time.Minute, nucleus.Entry{Kind: nucleus.KindApprovalUse, Actor: "ada", Op: nucleus.GitPush, Ask: "a-1", Grants: []string{"g-1"}, Permit: "r-push"})
	s.add(ms(2, 4), nucleus.Entry{Kind: nucleus.KindIntent, Actor: "b-1", Op: nucleus.GitPush, Args: js(push), Verdict: nucleus.Ask, Rule: "trifecta", Ask: "a-1", Grants: []string{"g-1"}, Permit: "r-push", Exposure: exposure})
	s.add(ms(900, 1800), nucleus.Entry{Kind: nucleus.KindOutcome, Actor: "b-1", Op: nucleus.GitPush, Permit: "r-push", Status: nucleus.OutcomeDone})
	s.add(ms(500, 800), nucleus.Entry{Kind: nucleus.KindSessionEnd, Actor: "operator", Exposure: exposure, Data: js(map[string]any{"exit_code": 0})})
	s.add(ms(500, 800), nucleus.Entry{Kind: nucleus.KindPodStop, Actor: "operator", Exposure: exposure})
	return &s
}

// short makes a session of five entries.
func short5() *session {
	var s session
	s.add(0, nucleus.Entry{Kind: nucleus.KindPodCreate, Actor: "operator", Data: js(map[string]any{"driver": "gvisor", "tier": "kernel", "mode": "contained", "workspace": "notes"})})
	s.add(400*time.Millisecond, nucleus.Entry{Kind: nucleus.KindPodStart, Actor: "operator", Data: js(map[string]any{"policy": map[string]any{"name": "default"}})})
	s.call(90*time.Millisecond, 30*time.Millisecond, nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"uname", "-a"}}}, []string{"private"}, 0)
	s.add(60*time.Millisecond, nucleus.Entry{Kind: nucleus.KindPodStop, Actor: "operator"})
	return &s
}

func write(t testing.TB, r *audit.Receipt) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, r); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestPageSays(t *testing.T) {
	page := string(write(t, long(2000).receipt(t)))
	for _, want := range []string{
		"shop | claude-code", "What was refused", "metrics.evil.example:443", "private and untrusted have met", "dollars left",
		"refs/heads/agent/claude-code to https://github.com/ada/shop", "exposure private untrusted way_out", nucleus.LogOrigin, "1 granted", "42 min",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if n := strings.Count(page, "<tr id=\"e"); n < 1990 {
		t.Errorf("%d entries", n)
	}
	t.Logf("2,000 entries: %d bytes", len(page))
	if _, err := newStory(&audit.Receipt{Entries: []json.RawMessage{[]byte(`{"kind":"x","seq":0,"time":"soon"}`)}}); err == nil {
		t.Error("a time that is none was drawn")
	}
}

// A sub-agent has a lane, as long as the call that waits for it.
func TestSubPodsHaveALane(t *testing.T) {
	s := short5()
	s.call(time.Second, 7*time.Second, nucleus.Action{Op: nucleus.SpawnAgent, Sub: &nucleus.Sub{Task: "mend it"}}, []string{"private"}, 0)
	story, err := newStory(s.receipt(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range story.groups() {
		if g.Name != "Sub-pods" {
			continue
		}
		if len(g.Lanes) != 1 || g.Lanes[0].Label != "spawn_agent" || len(g.Lanes[0].Marks) != 1 {
			t.Errorf("got %+v", g.Lanes)
		}
		return
	}
	t.Error("there is no lane of sub-pods")
}

// A page made again is the same page.
func TestPageIsOne(t *testing.T) {
	r := long(300).receipt(t)
	if !bytes.Equal(write(t, r), write(t, r)) {
		t.Error("two pages of one receipt differ")
	}
}

func TestScale(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(seconds ...float64) (times []time.Time) {
		for _, s := range seconds {
			times = append(times, start.Add(time.Duration(s*float64(time.Second))))
		}
		return times
	}
	for _, c := range []struct {
		name  string
		times []time.Time
		want  []float64
	}{
		{"one", at(0), []float64{0}},
		{"all at once", at(0, 0, 0), []float64{0, 0, 0}},
		{"even", at(0, 1, 2, 4), []float64{0, 25, 50, 100}},
		{"a long pause", at(0, 10, 3610, 3620), []float64{0, 48, 52, 100}},
		{"a clock that was set back", at(4, 0, 2), []float64{100, 0, 50}},
	} {
		s := newScale(c.times)
		for i, at := range c.times {
			if got := s.at(at); got < c.want[i]-0.01 || got > c.want[i]+0.01 {
				t.Errorf("%s: time %d is at %.2f, want %.2f", c.name, i, got, c.want[i])
			}
		}
		if len(s.ticks(start)) > 12 {
			t.Errorf("%s: %d ticks", c.name, len(s.ticks(start)))
		}
	}
}

// browser finds a Chromium.
func browser(t *testing.T) string {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("no Chromium is installed (apt install chromium)")
	return ""
}

// open loads a page from a file and returns what became of it, and what the console said.
func open(t *testing.T, page []byte, flags ...string) (dom, console string) {
	t.Helper()
	program, dir := browser(t), t.TempDir()
	file := filepath.Join(dir, "page.html")
	if err := os.WriteFile(file, page, 0o600); err != nil {
		t.Fatal(err)
	}
	given := append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update",
		"--user-data-dir=" + filepath.Join(dir, "profile"), "--enable-logging=stderr", "--dump-dom", "--virtual-time-budget=3000"}, flags...)
	cmd := exec.CommandContext(t.Context(), program, append(given, "file://"+file)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	for line := range strings.Lines(errs.String()) {
		if strings.Contains(line, "CONSOLE") {
			console += line
		}
	}
	return out.String(), console
}

func TestWhat(t *testing.T) {
	for _, c := range []struct {
		e    nucleus.Entry
		want string
	}{
		{nucleus.Entry{Kind: nucleus.KindIntent, Op: nucleus.NetConnect, Verdict: nucleus.Deny, Rule: "egress.model", Args: js(map[string]any{"id": "eg-1", "via": "model", "host": "api.example", "port": 443, "method": "HEAD", "path": "/\u202e"})},
			`HEAD /\u{202e} by model, api.example:443`},
		{nucleus.Entry{Kind: nucleus.KindPodCreate, Data: js(map[string]any{"mode": "mediated", "sub": map[string]any{"parent": "p-9"}})}, "below p-9, mediated"},
		{nucleus.Entry{Kind: nucleus.KindPodStop}, ""},
		{nucleus.Entry{Kind: nucleus.KindIntent, Args: js(nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "a\u202eb"}}})}, `a\u{202e}b`},
		{nucleus.Entry{Kind: nucleus.KindIntent, Args: js([]string{"what came"})}, `["what came"]`},
		{nucleus.Entry{Kind: nucleus.KindIntent, Args: js(map[string]any{"op": 3})}, `{"op":3}`},
		{nucleus.Entry{Kind: nucleus.KindModelCall, Data: js(map[string]any{"done": true, "model": "m", "tokens": map[string]int{"input": 3, "output": 4}, "took": 1500000000})}, "m 3 in, 4 out, 1.5s"},
		{nucleus.Entry{Kind: nucleus.KindEgressClose, Data: js(map[string]any{"host": "h", "port": 1, "sent": 2048, "received": 3 << 20})}, "h:1, 2.0 KiB sent, 3.0 MiB received"},
		{nucleus.Entry{Kind: nucleus.KindSessionBudget, Data: js(map[string]any{"dimension": "usd", "limit": 0.5, "spent": 0.51})}, "of 0.5 usd, 0.51 are spent"},
		{nucleus.Entry{Kind: nucleus.KindSessionEnd, Data: js(map[string]any{"exit_code": 3})}, "exit code 3"},
		{nucleus.Entry{Kind: "later.kind", Data: js(map[string]any{"reason": "because"})}, "because"},
		{nucleus.Entry{Kind: "later.kind", Data: js("text")}, ""},
		{nucleus.Entry{Kind: nucleus.KindIntent, Args: js(nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: strings.Repeat("x", 500)}}})}, strings.Repeat("x", 146) + "..."},
	} {
		if got := What(c.e); got != c.want {
			t.Errorf("%s: got %q, want %q", c.e.Kind, got, c.want)
		}
	}
}

// hostile fills every text of an entry with payloads.
func hostile(address string) *session {
	payloads := []string{
		`<img src="` + address + `/img" onerror="fetch('` + address + `/onerror')">`,
		`<script>fetch("` + address + `/script");document.title="owned"</script>`,
		`"><svg onload=fetch('` + address + `/svg')>`,
		`'-fetch("` + address + `/attr")-'`,
		`</title></style></script><script src="` + address + `/src"></script>`,
		`</pre><iframe src="` + address + `/frame"></iframe><link rel=stylesheet href="` + address + `/css">`,
		"\u202egnp.exe\u2066\x1b[31m\x00\u00a0<b id=bold>", "{{.Session}}", `javascript:fetch('` + address + `/js')`,
	}
	s := long(60)
	i := 0
	next := func() string { i++; return payloads[i%len(payloads)] + fmt.Sprint(i) }
	for round := range len(payloads) * 2 {
		e := nucleus.Entry{Kind: nucleus.KindIntent, Actor: next(), Verdict: nucleus.Verdict(next()), Rule: next(), Permit: next(), Ask: next(), Status: next(),
			Exposure: []string{next(), "private"}, Grants: []string{next()}, Digest: next()}
		p := next()
		switch round % 9 {
		case 0:
			e.Op, e.Args = nucleus.ReadFiles, js(nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: p}}})
		case 1:
			e.Op, e.Args = nucleus.RunBash, js(nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{p, next()}}})
		case 2:
			e.Op, e.Args, e.Verdict = nucleus.WebFetch, js(nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: next(), URL: p, Host: next()}}), nucleus.Deny
		case 3:
			e.Kind, e.Data = nucleus.KindModelCall, js(map[string]any{"done": true, "model": p, "host": next(), "id": next()})
		case 4:
			e.Kind, e.Data = nucleus.KindPodCreate, js(map[string]any{"workspace": p, "driver": next(), "tier": next(), "mode": next()})
		case 5:
			e.Kind, e.Data = nucleus.KindSessionStart, js(map[string]any{"agent": p})
		case 6:
			e.Kind, e.Data = p, js(map[string]any{"reason": next(), "message": next(), "summary": next()})
		case 7:
			e.Kind, e.Data = nucleus.KindEgressOpen, js(map[string]any{"host": p, "port": 1, "attempt": next()})
		case 8:
			e.Args, e.Verdict, e.Data = js(p), nucleus.Deny, js(map[string]any{"message": next()})
		}
		s.add(time.Second, e)
	}
	s.entries[0].Data = js(map[string]any{"workspace": payloads[1], "driver": next(), "tier": next(), "mode": next()})
	return s
}

// What is written in the log does not run, load or hide anything in the reader's browser.
// The control: without the escaping and the policy it does.
func TestHostileTextIsText(t *testing.T) {
	t.Parallel()
	var hits atomic.Int64
	var seen atomic.Value
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		seen.Store(r.URL.Path)
		w.Header().Set("Access-Control-Allow-Origin", "*")
	}))
	defer web.Close()
	r := hostile(web.URL).receipt(t)
	page := write(t, r)
	if bad := regexp.MustCompile(`[^\x20-\x7e\n]`).FindAll(page, 3); len(bad) > 0 {
		t.Errorf("the page has characters beyond ASCII: %q", bad)
	}
	if !bytes.Contains(page, []byte(`\u{202e}gnp.exe`)) {
		t.Error("a character that turns the text around is not visible")
	}
	dom, console := open(t, page)
	if n := hits.Load(); n > 0 {
		t.Errorf("%d requests, the last for %v", n, seen.Load())
	}
	if console != "" {
		t.Errorf("the console says %s", console)
	}
	for _, never := range []string{"<img", "<iframe", "<link", "<b id=", "<title>owned"} {
		if strings.Contains(dom, never) {
			t.Errorf("the page has %s", never)
		}
	}
	if n := strings.Count(dom, "<script"); n != 1 {
		t.Errorf("%d scripts", n)
	}

	// The same data in a template that escapes nothing, without the policy, and then with it.
	p, err := newPage(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, policy := range []bool{false, true} {
		loose := pageHTML
		if !policy {
			loose = regexp.MustCompile(`<meta http-equiv="Content-Security-Policy"[^>]*>`).ReplaceAllString(loose, "")
		}
		var open1 bytes.Buffer
		if err := texttemplate.Must(texttemplate.New("loose").Parse(loose)).Execute(&open1, p); err != nil {
			t.Fatal(err)
		}
		hits.Store(0)
		_, console := open(t, open1.Bytes())
		if got := hits.Load(); policy && got > 0 {
			t.Errorf("the policy alone let %d requests through, the last for %v", got, seen.Load())
		} else if !policy && got < 3 {
			t.Errorf("the control: %d requests without escaping and policy", got)
		}
		if policy && console == "" {
			t.Error("the control: the console says nothing of what the policy stopped")
		}
	}
}

// The page works: its script runs under the policy, marks are reached by keys, and lead to
// their entries.
func TestPageInABrowser(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]*session{"five": short5(), "long": long(2000)} {
		r := s.receipt(t)
		page := write(t, r)
		probe := `
const plot = document.querySelector(".plot");
const key = (k) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true, cancelable: true }));
const stops = document.querySelectorAll('.m[tabindex="0"]').length;
document.querySelector('.m[tabindex="0"]').focus();
const first = document.activeElement.dataset.e;
key("ArrowDown");
const second = document.activeElement.dataset.e;
const detail = document.getElementById("detail").textContent;
key("Enter");
const row = document.activeElement.id;
document.getElementById("find").value = "no such text";
document.getElementById("find").dispatchEvent(new Event("input", { bubbles: true }));
const found = document.getElementById("shown").textContent;
document.querySelector('[data-z="4"]').click();
document.title = JSON.stringify({ stops, first, second, detail, row, found, zoom: plot.className, wide: document.documentElement.scrollWidth <= innerWidth, marks: document.querySelectorAll(".m").length });`
		text := strings.Replace(string(page), "script-src ", "script-src "+hash(probe)+" ", 1)
		text = strings.Replace(text, "</body>", "<script>"+probe+"</script></body>", 1)
		dom, console := open(t, []byte(text))
		if console != "" {
			t.Errorf("%s: the console says %s", name, console)
		}
		title := regexp.MustCompile(`<title>(\{.*?\})</title>`).FindStringSubmatch(dom)
		if title == nil {
			t.Fatalf("%s: the probe did not run", name)
		}
		var got struct {
			Stops                                   int
			First, Second, Detail, Row, Found, Zoom string
			Wide                                    bool
			Marks                                   int
		}
		if err := json.Unmarshal([]byte(strings.ReplaceAll(title[1], "&quot;", `"`)), &got); err != nil {
			t.Fatal(err)
		}
		if got.Stops != 1 || got.Row != "e"+got.Second || !strings.Contains(got.Detail, "entry "+got.Second) || got.Found != fmt.Sprintf("0 of %d", len(r.Entries)) || got.Zoom != "plot z4" || !got.Wide {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

// Every text of the page's data is visible ASCII: what a new field shows must pass the
// same way.
func TestAllTextIsVisible(t *testing.T) {
	r := hostile("http://127.0.0.1:1").receipt(t)
	// Anyone can add a line for a key that nobody gives, and the receipt holds.
	r.Checkpoint += "\u2014 cal/authority\u202eevil\u009b31m AAAA\n"
	p, err := newPage(r)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(p.Checkpoint); n != 6 || !p.Checkpoint[n-1].Signs || p.Checkpoint[n-1].Text != `cal/authority\u{202e}evil\u{9b}31m AAAA` || p.Checkpoint[0].Signs {
		t.Errorf("the checkpoint: %+v", p.Checkpoint)
	}
	p.CSS, p.JS = "", ""
	texts := 0
	var visit func(where string, v reflect.Value)
	visit = func(where string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			visit(where, v.Elem())
		case reflect.Struct:
			for i := range v.NumField() {
				visit(where+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.Slice:
			for i := range v.Len() {
				visit(where, v.Index(i))
			}
		case reflect.String:
			texts++
			if strings.ContainsFunc(v.String(), func(r rune) bool { return r < 0x20 || r > 0x7e }) {
				t.Errorf("%s is %q", where, v.String())
			}
		}
	}
	visit("", reflect.ValueOf(p))
	if texts < 500 {
		t.Errorf("only %d texts were seen", texts)
	}
}

// What a newer program wrote is shown as it is written.
func TestNewerEntries(t *testing.T) {
	r := short5().receipt(t)
	raw := `{"args":{"op":"fold_paper\u202e"},"decision":"perhaps","kind":"request.consider","op":"fold\u001b_paper","seq":%d,"session":"s-1","status":"pondered","time":"2040-01-02T03:04:05Z"}`
	r.Entries = append(r.Entries, json.RawMessage(fmt.Sprintf(raw, r.Last+1)), json.RawMessage(strings.Replace(fmt.Sprintf(raw, r.Last+2), "request.consider", nucleus.KindIntent, 1)))
	page := string(write(t, r))
	for _, want := range []string{`<td>fold\u{1b}_paper</td>`, `<b>perhaps</b> pondered`, "<td>request.consider</td>"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
}

func TestPageIsBounded(t *testing.T) {
	r := short5().receipt(t)
	r.Entries = make([]json.RawMessage, maxEntries+1)
	var out bytes.Buffer
	if err := Write(&out, r); err == nil || !strings.Contains(err.Error(), "has 100001 entries") || out.Len() > 0 {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
}

func BenchmarkPage(b *testing.B) {
	r := long(2000).receipt(b)
	for b.Loop() {
		var out bytes.Buffer
		if err := Write(&out, r); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(out.Len()), "page-bytes")
	}
}
