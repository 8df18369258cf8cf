// Package chromium drives a headless Chromium in tests, by its DevTools protocol over a pipe:
// no port is open that another program could speak to.
package chromium

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"
)

const patience = 30 * time.Second

// Browser is one Chromium with a profile of its own.
type Browser struct {
	t   testing.TB
	out *os.File

	mu      sync.Mutex
	id      int
	waiting map[int]chan message
	tabs    map[string]*Tab
}

type message struct {
	ID        int             `json:"id,omitempty"`
	Session   string          `json:"sessionId,omitempty"`
	Method    string          `json:"method,omitempty"`
	Params    json.RawMessage `json:"params,omitempty"`
	Result    json.RawMessage `json:"result,omitempty"`
	ErrorText *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// Program finds a Chromium, or skips the test, saying so.
func Program(t testing.TB) string {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("no Chromium is installed (apt install chromium)")
	return ""
}

// Start starts a browser that ends with the test. It knows no name but those of the loopback
// and those that flags map.
func Start(t testing.TB, flags ...string) *Browser {
	t.Helper()
	given := append([]string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update",
		"--disable-sync", "--remote-debugging-pipe", "--user-data-dir=" + t.TempDir(),
	}, flags...)
	cmd := exec.Command(Program(t), given...)
	toBrowser, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	in, fromBrowser, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{toBrowser, fromBrowser} // 3 and 4
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = toBrowser.Close(), fromBrowser.Close()
	b := &Browser{t: t, out: out, waiting: map[int]chan message{}, tabs: map[string]*Tab{}}
	read := make(chan struct{})
	go func() {
		defer close(read)
		b.read(in)
	}()
	t.Cleanup(func() {
		_ = b.send("", "Browser.close", nil, nil)
		killer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		killer.Stop()
		_, _ = out.Close(), in.Close()
		<-read
	})
	return b
}

func (b *Browser) read(in *os.File) {
	r := bufio.NewReader(in)
	for {
		raw, err := r.ReadBytes(0)
		b.mu.Lock()
		if err != nil {
			for id, c := range b.waiting {
				close(c)
				delete(b.waiting, id)
			}
			b.mu.Unlock()
			return
		}
		var m message
		if err := json.Unmarshal(raw[:len(raw)-1], &m); err == nil {
			if c, ok := b.waiting[m.ID]; ok && m.ID != 0 {
				delete(b.waiting, m.ID)
				c <- m
			} else if tab := b.tabs[m.Session]; tab != nil {
				tab.event(m)
			}
		}
		b.mu.Unlock()
	}
}

// send calls a method and waits for its result.
func (b *Browser) send(session, method string, params, result any) error {
	if params == nil {
		params = struct{}{}
	}
	raw, err := json.Marshal(params)
	if err != nil {
		return err
	}
	c := make(chan message, 1)
	b.mu.Lock()
	b.id++
	m := message{ID: b.id, Session: session, Method: method, Params: raw}
	b.waiting[m.ID] = c
	b.mu.Unlock()
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, err := b.out.Write(append(line, 0)); err != nil {
		return err
	}
	select {
	case reply, ok := <-c:
		switch {
		case !ok:
			return fmt.Errorf("%s: the browser ended", method)
		case reply.ErrorText != nil:
			return fmt.Errorf("%s: %s", method, reply.ErrorText.Message)
		case result != nil:
			return json.Unmarshal(reply.Result, result)
		}
		return nil
	case <-time.After(patience):
		return fmt.Errorf("%s: no answer after %v", method, patience)
	}
}

// Tab is one page of a browser.
type Tab struct {
	b       *Browser
	session string

	mu       sync.Mutex
	requests []string
	console  []string
}

// Open opens a new tab at an address.
func (b *Browser) Open(address string) *Tab {
	b.t.Helper()
	var target struct {
		ID string `json:"targetId"`
	}
	var attached struct {
		Session string `json:"sessionId"`
	}
	if err := b.send("", "Target.createTarget", map[string]any{"url": "about:blank"}, &target); err != nil {
		b.t.Fatal(err)
	}
	if err := b.send("", "Target.attachToTarget", map[string]any{"targetId": target.ID, "flatten": true}, &attached); err != nil {
		b.t.Fatal(err)
	}
	tab := &Tab{b: b, session: attached.Session}
	b.mu.Lock()
	b.tabs[tab.session] = tab
	b.mu.Unlock()
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		tab.Call(domain+".enable", nil, nil)
	}
	// A tab of a headless browser is never in front by itself.
	tab.Call("Emulation.setFocusEmulationEnabled", map[string]any{"enabled": true}, nil)
	tab.Go(address)
	return tab
}

// event notes what a tab loads and says; the caller holds the browser's mutex.
func (t *Tab) event(m message) {
	var e struct {
		Type    string
		Request struct{ URL string }
		Args    []struct{ Value, Description any }
		Entry   struct{ Source, Level, Text, URL string }
		Details struct {
			Text string
			Ex   struct{ Description string } `json:"exception"`
		} `json:"exceptionDetails"`
	}
	if json.Unmarshal(m.Params, &e) != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch m.Method {
	case "Network.requestWillBeSent":
		t.requests = append(t.requests, e.Request.URL)
	case "Log.entryAdded":
		t.console = append(t.console, fmt.Sprintf("%s %s: %s %s", e.Entry.Source, e.Entry.Level, e.Entry.Text, e.Entry.URL))
	case "Runtime.consoleAPICalled":
		t.console = append(t.console, fmt.Sprint(e.Type, ": ", e.Args))
	case "Runtime.exceptionThrown":
		t.console = append(t.console, "exception: "+e.Details.Text+" "+e.Details.Ex.Description)
	}
}

// Requests are the addresses that the tab has asked for; Console is what it said.
func (t *Tab) Requests() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.requests...)
}

// Console is what the tab said: messages, exceptions, and what its policy stopped.
func (t *Tab) Console() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.console...)
}

// Call calls a method of the DevTools protocol.
func (t *Tab) Call(method string, params, result any) {
	t.b.t.Helper()
	if err := t.b.send(t.session, method, params, result); err != nil {
		t.b.t.Fatal(err)
	}
}

// Go opens an address in the tab.
func (t *Tab) Go(address string) {
	t.b.t.Helper()
	t.Call("Page.navigate", map[string]any{"url": address}, nil)
}

// Eval evaluates an expression, waits for its promise, and decodes its value into out.
func (t *Tab) Eval(expression string, out any) error {
	var reply struct {
		Result struct {
			Value json.RawMessage `json:"value"`
		} `json:"result"`
		Exception *struct {
			Text      string `json:"text"`
			Exception struct {
				Description string `json:"description"`
			} `json:"exception"`
		} `json:"exceptionDetails"`
	}
	err := t.b.send(t.session, "Runtime.evaluate", map[string]any{"expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true}, &reply)
	switch {
	case err != nil:
		return err
	case reply.Exception != nil:
		return fmt.Errorf("%s %s", reply.Exception.Text, reply.Exception.Exception.Description)
	case out == nil || len(reply.Result.Value) == 0:
		return nil
	}
	return json.Unmarshal(reply.Result.Value, out)
}

// Until waits until an expression is true.
func (t *Tab) Until(expression string) {
	t.b.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		var ok bool
		err := t.Eval("Boolean("+expression+")", &ok)
		if err == nil && ok {
			return
		}
		if time.Now().After(deadline) {
			t.b.t.Fatalf("%s is not true after %v: %v\nthe page: %s\nthe console: %q", expression, patience, err, t.Text("body"), t.Console())
		}
	}
}

// Text is the text of an element as it is shown; empty without one.
func (t *Tab) Text(selector string) (text string) {
	quoted, _ := json.Marshal(selector)
	_ = t.Eval("(document.querySelector("+string(quoted)+") || {}).innerText || ''", &text)
	return text
}

// Click clicks in the middle of an element, as a mouse does, once it can be clicked.
func (t *Tab) Click(selector string) {
	t.b.t.Helper()
	quoted, _ := json.Marshal(selector)
	element := "document.querySelector(" + string(quoted) + ")"
	t.Until(element + " && " + element + ".checkVisibility() && !" + element + ".disabled")
	t.ClickAnyhow(selector)
}

// ClickAnyhow clicks where an element is, whether it can be clicked or not.
func (t *Tab) ClickAnyhow(selector string) {
	t.b.t.Helper()
	quoted, _ := json.Marshal(selector)
	var at struct{ X, Y float64 }
	err := t.Eval(`(() => { const e = document.querySelector(`+string(quoted)+`); e.scrollIntoView({ block: "center" }); const r = e.getBoundingClientRect(); return { X: r.x + r.width / 2, Y: r.y + r.height / 2 }; })()`, &at)
	if err != nil {
		t.b.t.Fatal(err)
	}
	for _, kind := range []string{"mousePressed", "mouseReleased"} {
		t.Call("Input.dispatchMouseEvent", map[string]any{"type": kind, "x": at.X, "y": at.Y, "button": "left", "clickCount": 1}, nil)
	}
}

// Key presses a key, by its DOM name.
func (t *Tab) Key(name string, code int) {
	t.b.t.Helper()
	text := map[string]string{"Enter": "\r"}[name]
	t.Call("Input.dispatchKeyEvent", map[string]any{"type": "keyDown", "key": name, "code": name, "windowsVirtualKeyCode": code, "text": text}, nil)
	t.Call("Input.dispatchKeyEvent", map[string]any{"type": "keyUp", "key": name, "code": name, "windowsVirtualKeyCode": code}, nil)
}

// Type types into the element that has the focus.
func (t *Tab) Type(text string) {
	t.b.t.Helper()
	t.Call("Input.insertText", map[string]any{"text": text}, nil)
}

// Passkeys gives the tab a virtual authenticator with a person who touches it at once, and is
// verified or not.
func (t *Tab) Passkeys(verified bool) (authenticator string) {
	t.b.t.Helper()
	t.Call("WebAuthn.enable", nil, nil)
	var added struct {
		ID string `json:"authenticatorId"`
	}
	t.Call("WebAuthn.addVirtualAuthenticator", map[string]any{"options": map[string]any{
		"protocol": "ctap2", "transport": "internal", "hasUserVerification": true, "isUserVerified": verified, "automaticPresenceSimulation": true,
	}}, &added)
	return added.ID
}

// Verify says whether the person at an authenticator is verified from now on.
func (t *Tab) Verify(authenticator string, verified bool) {
	t.b.t.Helper()
	t.Call("WebAuthn.setUserVerified", map[string]any{"authenticatorId": authenticator, "isUserVerified": verified}, nil)
}

// Screenshot writes a picture of the whole page as PNG.
func (t *Tab) Screenshot(file string) {
	t.b.t.Helper()
	var shot struct {
		Data string `json:"data"`
	}
	t.Call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	raw, err := base64.StdEncoding.DecodeString(shot.Data)
	if err == nil {
		err = os.WriteFile(file, raw, 0o600)
	}
	if err != nil {
		t.b.t.Fatal(err)
	}
}
