package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	approvals "cal/approval/client"
	"cal/internal/chromium"
	"cal/internal/script"
	"cal/internal/testenv"
	"cal/nucleus"
)

// TestPasskey has an approver make a passkey in a browser, by a link that the terminal shows, and
// grant an agent's push with it: the remote gets the branch. What is not verified, and what a
// program of the same user does without the passkey, grants nothing.
func TestPasskey(t *testing.T) {
	browser := chromium.Start(t)
	e := testenv.New(t)
	e.Agents()
	e.Approver()
	e.Cal("node", "start").Want(t, 0)
	tab := browser.Open("about:blank")
	device := tab.Passkeys(true)
	addPasskey(t, e, tab, "touch")

	e.Write(filepath.Join(e.CAL, "policies", "pushing.yaml"), "name: pushing\noperations: {read_files: always, edit_files: always, git_commit: always, git_push: ask}\n")
	repo := e.Repo("greeter", greeter())
	branch := "agent/claude-code"
	call := func(tool string, args map[string]any) script.Step {
		return script.Step{Server: "cal", Tool: tool, Args: args}
	}
	p := providers["claude-code"]
	model := p.start(t, e, "key-"+random(), script.Steps(
		call("edit_files", map[string]any{"path": "greeter/greet.sh", "old": "Helo", "new": "Hello"}),
		call("git_commit", map[string]any{"message": "Spell it right"}),
		call("git_push", map[string]any{"branch": branch}),
		script.Step{Text: "It is published."},
	))
	start := func() *testenv.Running {
		return e.Start(e.Command("cal", "run", "--repo", repo.Dir, "--trust", "--agent", p.agent, "--policy", "pushing", "--require-approvals", "passkey", "--prompt", "Mend and publish."))
	}
	run := start()
	ask := nextAsk(t, e, run)
	if !strings.Contains(run.Stderr.String(), "approvals    passkey") {
		t.Errorf("the confirmation does not say by what it is approved:\n%s", run.Stderr)
	}
	page := strings.TrimSpace(e.Start(e.Command("nucleus-authority", "page", ask)).Wait().Want(t, 0).Stdout)
	authority := approvals.New(filepath.Join(e.CAL, "run", "authority.sock"))
	defer authority.Close()
	waits := func(what string) {
		t.Helper()
		if status, err := authority.Status(e.Context(), ask); err != nil || status.State != approvals.Pending || len(status.Grants) != 0 {
			t.Fatalf("%s: %+v, %v", what, status, err)
		}
	}

	// A program of the same user has the page's link, and any header that it likes.
	origin, key, _ := strings.Cut(page, "/#key=")
	key, _, _ = strings.Cut(key, "&")
	post := func(path string, body any) (code int, reply []byte) {
		raw, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		r, err := http.NewRequest(http.MethodPost, origin+path, bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{"Origin": origin, "Sec-Fetch-Site": "same-origin", "Content-Type": "application/json", "Nucleus-Page": key} {
			r.Header.Set(name, value)
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		reply, _ = io.ReadAll(response.Body)
		return response.StatusCode, reply
	}
	status, err := authority.Status(e.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	var asked struct {
		Challenge []byte `json:"challenge"`
	}
	code, reply := post("/api/asks/"+ask+"/challenge", map[string]string{"ask_sha256": status.AskDigest, "approver": "touch"})
	if err := json.Unmarshal(reply, &asked); err != nil || code != http.StatusOK {
		t.Fatalf("positive control: %d %s", code, reply)
	}
	code, reply = post("/api/asks/"+ask+"/grant", map[string]any{"challenge": asked.Challenge, "client_data": []byte(`{"type":"webauthn.get"}`), "authenticator_data": make([]byte, 37), "signature": []byte{0x30, 0}})
	if code != http.StatusForbidden {
		t.Errorf("without the passkey: %d %s", code, reply)
	}
	waits("without the passkey")
	shown, _, err := authority.Get(e.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signer(t, e, "", testenv.Passphrase).Grant(shown, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = authority.Grant(e.Context(), ask, token)
	if err == nil || !strings.Contains(err.Error(), "knows the approvers touch") {
		t.Errorf("by the passphrase, where a passkey is required: %v", err)
	}
	waits("by passphrase")

	tab.Go("about:blank")
	tab.Go(page)
	tab.Until(`document.getElementById("text").textContent.includes("what will happen: git_push")`)
	if text := tab.Text("#text"); !strings.Contains(text, `"refs/heads/`+branch+`"`) || !strings.Contains(text, `| +echo "Hello, $1"`) {
		t.Errorf("the page shows %s", text)
	}
	if err := tab.Eval(`document.getElementById("text").scrollTop = 1e9`, nil); err != nil { // read to the end
		t.Fatal(err)
	}
	tab.Verify(device, false)
	tab.Click("#approve")
	tab.Until(`!document.getElementById("error").hidden`)
	waits("not verified")
	tab.Verify(device, true)
	tab.Click("#approve")
	tab.Until(`document.getElementById("outcome").textContent.includes("Granted by touch")`)
	run.Wait().Want(t, 0, "It is published")
	if got := repo.Git("ls-remote", repo.Remote, "refs/heads/"+branch); !strings.Contains(got, "refs/heads/"+branch) {
		t.Errorf("the remote has %q", got)
	}
	if got := results(t, model); len(got) != 3 {
		t.Errorf("%d tool results, want 3", len(got))
	}
	uses := e.Entries(of(nucleus.KindApprovalUse, ""))
	if len(uses) != 1 || uses[0].Actor != "touch" || !strings.Contains(string(uses[0].Data), `"passkey.v1.`) {
		t.Errorf("uses %+v", uses)
	}
	if starts := e.Entries(of(nucleus.KindPodStart, "")); len(starts) != 1 || !strings.Contains(string(starts[0].Data), `"approvals":"passkey"`) || strings.Contains(string(starts[0].Data), `"kind":"ed25519"`) {
		t.Errorf("starts %+v", starts)
	}
	e.Cal("audit", "verify").Want(t, 0)
}

// addPasskey makes a passkey at a terminal and in a tab, and compares what the two show.
func addPasskey(t *testing.T, e *testenv.Env, tab *chromium.Tab, name string) {
	t.Helper()
	terminal := e.Terminal(e.Command("nucleus-authority", "approver", "add", name, "--passkey", "--port", fmt.Sprint(freePort(t))))
	link := regexp.MustCompile(`http://localhost:\d+/#enrol=\S+`)
	testenv.Eventually(t, time.Minute, "a link", func() bool { return link.MatchString(terminal.Screen.String()) })
	tab.Go(link.FindString(terminal.Screen.String()))
	tab.Click("#enrol-go")
	tab.Until(`document.getElementById("fingerprint").textContent`)
	terminal.Until("passphrase of")
	if shown := tab.Text("#fingerprint"); shown == "" || !strings.Contains(terminal.Screen.String(), shown) {
		t.Fatalf("the page shows fingerprint %q; the terminal:\n%s", shown, terminal.Screen)
	}
	terminal.Type(testenv.Passphrase + "\n")
	if code := terminal.Wait(); code != 0 {
		t.Fatalf("exit code %d\n%s", code, terminal.Screen)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
