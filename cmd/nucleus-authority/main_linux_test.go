package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"cal/approval"
	"cal/approval/client"
	"cal/authority"
	"cal/nucleus"
)

const (
	passphrase = "correct horse battery"
	phrase     = "blue lamp"
	patience   = 60 * time.Second
)

var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "nucleus-authority-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Println(err)
		return 1
	}
	binary = filepath.Join(dir, "nucleus-authority")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// terminal is a program with a pseudo-terminal of its own.
type terminal struct {
	t      *testing.T
	cmd    *exec.Cmd
	master *os.File
	got    bytes.Buffer
	chunks chan []byte
}

func atPty(t *testing.T, home, typedAhead string, args ...string) *terminal {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := master.WriteString(typedAhead); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "CAL_HOME="+home, "TERM=dumb") // line by line
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := errors.Join(cmd.Start(), slave.Close()); err != nil {
		t.Fatal(err)
	}
	p := &terminal{t: t, cmd: cmd, master: master, chunks: make(chan []byte)}
	go func() {
		defer close(p.chunks)
		for {
			chunk := make([]byte, 4096)
			n, err := master.Read(chunk)
			if n > 0 {
				p.chunks <- chunk[:n]
			}
			if err != nil {
				return // EIO: nobody holds the other side
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		for range p.chunks {
		}
		_ = master.Close()
	})
	return p
}

// expect reads on until text appears after what was expected before.
func (p *terminal) expect(text string) {
	p.t.Helper()
	deadline := time.After(patience)
	for !strings.Contains(p.got.String(), text) {
		select {
		case chunk, ok := <-p.chunks:
			if !ok {
				p.t.Fatalf("ended without %q:\n%s", text, p.got.String())
			}
			p.got.Write(chunk)
		case <-deadline:
			p.t.Fatalf("no %q after %v:\n%s", text, patience, p.got.String())
		}
	}
	all := p.got.String()
	p.got.Reset()
	p.got.WriteString(all[strings.Index(all, text)+len(text):])
}

func (p *terminal) send(line string) {
	p.t.Helper()
	if _, err := p.master.WriteString(line + "\n"); err != nil {
		p.t.Fatal(err)
	}
}

// secret waits until nothing that is typed would be shown, and types.
func (p *terminal) secret(prompt, text string) {
	p.t.Helper()
	p.expect(prompt)
	for deadline := time.Now().Add(patience); ; {
		state, err := unix.IoctlGetTermios(int(p.master.Fd()), unix.TCGETS)
		if err != nil {
			p.t.Fatal(err)
		}
		if state.Lflag&unix.ECHO == 0 {
			break
		}
		if time.Now().After(deadline) {
			p.t.Fatal("the terminal still echoes")
		}
	}
	p.send(text)
}

// end waits for the program and returns its exit code and the rest it printed.
func (p *terminal) end() (int, string) {
	p.t.Helper()
	deadline := time.After(patience)
	for open := true; open; {
		var chunk []byte
		select {
		case chunk, open = <-p.chunks:
			p.got.Write(chunk)
		case <-deadline:
			p.t.Fatalf("still runs after %v:\n%s", patience, p.got.String())
		}
	}
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode(), p.got.String()
}

// withoutTerminal runs the program with no terminal and everything on its
// standard input, environment and arguments that could grant.
func withoutTerminal(t *testing.T, home, stdin string, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), "CAL_HOME="+home, "PASSPHRASE="+passphrase, "AGE_PASSPHRASE="+passphrase)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(out)
}

// makeKey runs init as a person does.
func makeKey(t *testing.T, home string) {
	t.Helper()
	p := atPty(t, home, "", "init", "--approver", "ann")
	p.secret("passphrase: ", passphrase)
	p.secret("passphrase again: ", passphrase)
	p.expect("your phrase: ")
	p.send(phrase)
	if code, out := p.end(); code != 0 || !strings.Contains(out, "The key is made") {
		t.Fatalf("init: %d\n%s", code, out)
	}
}

// quickKey makes a key that costs little to open.
func quickKey(t *testing.T, home string) {
	t.Helper()
	cfg := authority.Config{Dir: filepath.Join(home, "authority"), WorkFactor: 4}
	if _, err := authority.Init(cfg, "ann", phrase, passphrase); err != nil {
		t.Fatal(err)
	}
}

// daemon is a running serve; kill ends it the hard way.
func daemon(t *testing.T, home string, change func(*exec.Cmd)) (api *client.Client, kill func()) {
	t.Helper()
	cmd := exec.Command(binary, "serve")
	cmd.Env = append(os.Environ(), "CAL_HOME="+home)
	if change != nil {
		change(cmd)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	api = client.New(filepath.Join(home, "run", "authority.sock"))
	ended := false
	kill = func() {
		if !ended {
			ended = true
			api.Close()
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(kill)
	line := make([]byte, 300)
	if n, err := out.Read(line); err != nil || !strings.HasPrefix(string(line[:n]), "approver ann at ") {
		kill()
		t.Fatalf("serve said %q, %v, %s", line[:n], err, stderr.String())
	}
	return api, kill
}

// newAsk makes an ask for a command with the request that its requester signed.
func newAsk(t *testing.T, id string, argv ...string) nucleus.AskRequest {
	t.Helper()
	args, err := nucleus.Canonical(map[string]any{"argv": argv})
	if err != nil {
		t.Fatal(err)
	}
	salt, now := nucleus.NewSalt(), time.Now().UnixMilli()
	ask := nucleus.AskRequest{
		ID: id, Pod: "p-1", Workspace: "w", Session: "s-1", Boot: "b-1", Requester: "agent", Request: signedRequest(t, http.MethodPost, "http://nucleus/v1/pods/p-1/tools/run_bash", "p-1", string(args)),
		Action: nucleus.Action{Op: nucleus.RunBash, Args: nucleus.SHA256(args), Command: &nucleus.Command{Argv: argv, Dir: ".", Binary: "/usr/bin/" + argv[0]}},
		Salt:   salt[:], Policy: nucleus.SHA256([]byte("policy")), Rule: "operations.run_bash", Why: "this profile asks", Approvals: 1, Tier: "kernel", Mode: "mediated",
		Context: nucleus.Context{UnixMilli: now}, Created: now, Expires: now + 300_000, Nonce: "n-1",
	}
	if ask.Digest, err = ask.Action.Digest(salt); err != nil {
		t.Fatal(err)
	}
	return ask
}

func wantState(t *testing.T, api *client.Client, id, want string) client.Status {
	t.Helper()
	status, err := api.Status(t.Context(), id)
	if err != nil || status.State != want || (status.Tokens() != nil) != (want == client.Granted) {
		t.Fatalf("%s: %+v, %v; want %s", id, status, err, want)
	}
	return status
}

func TestInit(t *testing.T) {
	home := t.TempDir()
	if code, out := withoutTerminal(t, home, passphrase+"\n"+passphrase+"\n"+phrase+"\n", "init", "--approver", "ann"); code != 1 || !strings.Contains(out, "no terminal") {
		t.Errorf("init without a terminal: %d %s", code, out)
	}
	for _, c := range []struct{ first, again, want string }{{passphrase, passphrase + "x", "differ"}, {"short", "", "at least 8"}} {
		p := atPty(t, home, "", "init", "--approver", "ann")
		p.secret("passphrase: ", c.first)
		if c.again != "" {
			p.secret("passphrase again: ", c.again)
		}
		if code, out := p.end(); code != 1 || !strings.Contains(out, c.want) {
			t.Errorf("%q, %q: %d %s", c.first, c.again, code, out)
		}
	}
	if code, out := withoutTerminal(t, home, "", "serve"); code != 1 || !strings.Contains(out, "cal approve init") {
		t.Errorf("serve without key: %d %s", code, out)
	}
	quickKey(t, home)
	p := atPty(t, home, "", "init", "--approver", "ann")
	if code, out := p.end(); code != 1 || !strings.Contains(out, "not replaced") {
		t.Errorf("init again: %d %s", code, out)
	}
	for _, args := range [][]string{{"approve", "a", "b"}, {"deny"}, {"list", "--no-such"}, {"show"}} {
		if code, out := withoutTerminal(t, home, "", args...); code != exitUsage {
			t.Errorf("%v: %d %s, want %d", args, code, out, exitUsage)
		}
	}
	if code, out := withoutTerminal(t, home, "", "list"); code != 1 || !strings.Contains(out, "no authority answers") {
		t.Errorf("list without a daemon: %d %s", code, out)
	}
}

// The whole story: asked, guessed at, refused, granted, killed, still granted.
func TestApprove(t *testing.T) {
	home := t.TempDir()
	makeKey(t, home)
	api, kill := daemon(t, home, nil)
	ctx := t.Context()
	if err := api.RegisterPod(ctx, "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	argv := []string{"sh", "-c", "echo hi \x1b[2K\r; curl evil.example", "--as=\u202etxt.exe"}
	ask := newAsk(t, "a-1", argv...)
	if _, err := api.Submit(ctx, ask); err != nil {
		t.Fatal(err)
	}

	// A node that shows another command than the requester signed.
	lie := newAsk(t, "a-lie", "true")
	lie.Request = newAsk(t, "a-x", argv...).Request
	if _, err := api.Submit(ctx, lie); err == nil || !strings.Contains(err.Error(), "its requester signed") {
		t.Errorf("a lie: %v", err)
	}

	again := newAsk(t, "a-again", argv...)
	again.Request = ask.Request
	if _, err := api.Submit(ctx, again); err == nil || !strings.Contains(err.Error(), "was asked for before") {
		t.Errorf("a second ask for one request: %v", err)
	}

	// No terminal, no grant, whatever else is given.
	if code, out := withoutTerminal(t, home, "y\n"+passphrase+"\n", "approve", "a-1"); code != 1 || !strings.Contains(out, "no terminal") {
		t.Errorf("approve without a terminal: %d %s", code, out)
	}
	wantState(t, api, "a-1", client.Pending)

	// The same user with a terminal of its own, without the passphrase.
	p := atPty(t, home, "", "approve", "a-1")
	p.expect("grant this once? [y/N] ")
	p.send("y")
	for i := range 3 {
		p.secret("passphrase of ann: ", fmt.Sprint("a good guess ", i))
	}
	if code, out := p.end(); code != exitNotGranted {
		t.Errorf("wrong passphrases: %d %s", code, out)
	}
	wantState(t, api, "a-1", client.Pending)

	// What was typed before the question is no answer.
	p = atPty(t, home, "y\n"+passphrase+"\n", "approve", "a-1")
	p.expect("what will happen: run_bash")
	p.send("y") // nor what comes with the screen
	p.expect("grant this once? [y/N] ")
	p.send("n")
	if code, out := p.end(); code != exitNotGranted || strings.Contains(out, "passphrase of") {
		t.Errorf("typed ahead: %d %s", code, out)
	}
	wantState(t, api, "a-1", client.Pending)

	// A new daemon takes up the ask.
	kill()
	api, kill = daemon(t, home, nil)

	// The person.
	p = atPty(t, home, "", "approve", "a-1", "--reason", "looks right")
	p.expect("what will happen: run_bash")
	p.expect("class       arbitrary code: ")
	p.expect(`runs        network: "curl" "evil.example"`)
	p.expect("grant this once? [y/N] ")
	p.send("y")
	p.expect("your phrase: " + phrase)
	p.secret("passphrase of ann: ", passphrase)
	if code, out := p.end(); code != 0 || !strings.Contains(out, "granted once, until ") {
		t.Fatalf("approve: %d %s", code, out)
	}
	status := wantState(t, api, "a-1", client.Granted)
	if status.Grants[0].Reason != "looks right" {
		t.Errorf("status %+v", status)
	}
	info, err := api.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := approval.Approved(status.Tokens(), ask, info.Approvers, time.Now().UnixMilli()); err != nil {
		t.Errorf("the grant: %v", err)
	}
	other := ask
	other.Pod = "p-2"
	if _, err := approval.Approved(status.Tokens(), other, info.Approvers, time.Now().UnixMilli()); approval.ReasonOf(err) != approval.BadPod {
		t.Errorf("the grant for another pod: %v", err)
	}

	// Denied: no passphrase is needed, and the agent is told why.
	if _, err := api.Submit(ctx, newAsk(t, "a-2", "rm", "-r", "x")); err != nil {
		t.Fatal(err)
	}
	var items []client.Item
	code, out := withoutTerminal(t, home, "", "list", "--json")
	if err := json.Unmarshal([]byte(out), &items); code != 0 || err != nil || len(items) != 1 || items[0].Summary != `run_bash (writes) "rm" "-r" "x"` {
		t.Errorf("list: %d %v %s", code, err, out)
	}
	if code, out := withoutTerminal(t, home, "", "deny", "a-2", "--reason", "keep x"); code != 0 || !strings.Contains(out, "denied") {
		t.Errorf("deny: %d %s", code, out)
	}
	if status := wantState(t, api, "a-2", client.Denied); status.Reason != "keep x" {
		t.Errorf("status %+v", status)
	}
	// One that is over takes nobody's passphrase.
	p = atPty(t, home, "", "approve", "a-2")
	if code, out := p.end(); code != 1 || !strings.Contains(out, "ask a-2 is denied; nothing waits for a grant") || strings.Contains(out, "passphrase") {
		t.Errorf("approve of what was denied: %d %s", code, out)
	}

	kill()
	api, _ = daemon(t, home, nil)
	if after := wantState(t, api, "a-1", client.Granted); !reflect.DeepEqual(after, status) {
		t.Errorf("after kill -9: %+v, want %+v", after, status)
	}
}

// A second approver is added at a terminal, by who knows the first one's passphrase; then two
// persons approve one ask, each with a passphrase and a phrase of their own.
func TestTwoApprovers(t *testing.T) {
	home := t.TempDir()
	quickKey(t, home)
	api, _ := daemon(t, home, nil)
	ctx := t.Context()
	if err := api.RegisterPod(ctx, "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	if code, out := withoutTerminal(t, home, passphrase+"\n", "approver", "add", "bob"); code != 1 || !strings.Contains(out, "no terminal") {
		t.Errorf("add without a terminal: %d %s", code, out)
	}
	const second, phrase2 = "an own secret of bob", "red lamp"
	add := func(first string) (int, string) {
		p := atPty(t, home, "", "approver", "add", "bob")
		p.expect(`ann adds approver "bob"`)
		p.expect("your phrase: " + phrase)
		p.secret("passphrase of ann: ", first)
		if first != passphrase {
			return p.end()
		}
		p.secret("passphrase: ", second)
		p.secret("passphrase again: ", second)
		p.expect("your phrase: ")
		p.send(phrase2)
		return p.end()
	}
	if code, out := add("not the passphrase"); code != 1 || !strings.Contains(out, "wrong passphrase") {
		t.Errorf("add by a stranger: %d %s", code, out)
	}
	if info, err := api.Info(ctx); err != nil || len(info.Approvers) != 1 {
		t.Fatalf("approvers %+v, %v", info, err)
	}
	if code, out := add(passphrase); code != 0 || !strings.Contains(out, "those that run know it not") {
		t.Fatalf("add: %d %s", code, out)
	}
	var list []authority.Listed
	if code, out := withoutTerminal(t, home, "", "approver", "list", "--json"); code != 0 || json.Unmarshal([]byte(out), &list) != nil || len(list) != 2 || list[1].Name != "bob" || list[1].AddedBy != "ann" {
		t.Errorf("list: %d %s", code, out)
	}

	ask := newAsk(t, "a-1", "rm", "-r", "x")
	ask.Approvals = 2
	if _, err := api.Submit(ctx, ask); err != nil {
		t.Fatal(err)
	}
	if code, out := withoutTerminal(t, home, "", "approve", "a-1"); code != 1 || !strings.Contains(out, "which approver? there are ann, bob") {
		t.Errorf("approve by nobody: %d %s", code, out)
	}
	for _, who := range []struct{ name, phrase, passphrase, says string }{
		{"ann", phrase, passphrase, "granted by ann; nothing is done until 1 more of 2 approvers"}, {"bob", phrase2, second, "granted once, until "},
	} {
		wantState(t, api, "a-1", client.Pending)
		p := atPty(t, home, "", "approve", "a-1", "--approver", who.name)
		p.expect("needs       2 different approvers; you are one of them")
		p.expect("grant this once? [y/N] ")
		p.send("y")
		p.expect("your phrase: " + who.phrase)
		p.secret("passphrase of "+who.name+": ", who.passphrase)
		if code, out := p.end(); code != 0 || !strings.Contains(out, who.says) {
			t.Fatalf("approve by %s: %d %s", who.name, code, out)
		}
	}
	status := wantState(t, api, "a-1", client.Granted)
	info, err := api.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := approval.Approved(status.Tokens(), ask, info.Approvers, time.Now().UnixMilli()); err != nil {
		t.Errorf("the grants: %v", err)
	}
	if code, out := withoutTerminal(t, home, "", "approver", "remove", "bob"); code != 0 || !strings.Contains(out, "approver bob is removed; 1 grants of it were not used and are void\n  ask a-1") {
		t.Errorf("remove: %d %s", code, out)
	}
	if status, err := api.Status(ctx, "a-1"); err != nil || status.State != client.Revoked {
		t.Errorf("after the removal %+v, %v", status, err)
	}
}

// A task is chosen at the terminal, shown with its bounds, and taken back.
func TestTaskAtTerminal(t *testing.T) {
	home := t.TempDir()
	quickKey(t, home)
	api, _ := daemon(t, home, nil)
	ctx := t.Context()
	if err := api.RegisterPod(ctx, "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	for id, argv := range map[string][]string{"a-sh": {"sh", "-c", "x"}, "a-1": {"git", "log", "-3"}} {
		if _, err := api.Submit(ctx, newAsk(t, id, argv...)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"approve", "--uses", "3"}, exitUsage, "name it"},
		{[]string{"approve", "a-1", "--match", "git"}, exitUsage, "--uses"},
		{[]string{"approve", "a-1", "--for", "10m"}, exitUsage, "--uses"},
	} {
		if code, out := withoutTerminal(t, home, "", c.args...); code != c.code || !strings.Contains(out, c.text) {
			t.Errorf("%v: %d %s", c.args, code, out)
		}
	}
	for text, args := range map[string][]string{
		"arbitrary code": {"approve", "a-sh", "--uses", "3"}, "21 uses": {"approve", "a-1", "--uses", "21"}, "at most an hour": {"approve", "a-1", "--uses", "2", "--for", "61m"},
		"not for what was asked": {"approve", "a-1", "--uses", "2", "--match", "git", "--match", "status"},
	} {
		p := atPty(t, home, "", args...)
		if code, out := p.end(); code != 1 || !strings.Contains(out, text) || strings.Contains(out, "passphrase of") {
			t.Errorf("%v: %d %s, want %q", args, code, out, text)
		}
	}
	p := atPty(t, home, "", "approve", "a-1", "--uses", "3", "--for", "10m", "--match", "git", "--match", "log", "--match", "**")
	p.expect("grant this once? [y/N] ")
	p.send("y")
	p.expect("what a grant for a task opens")
	p.expect("at most 3, the one that is asked for among them")
	p.expect(`argv[2]     "**"`)
	p.expect("grant all of this? [y/N] ")
	p.send("y")
	p.secret("passphrase of ann: ", passphrase)
	if code, out := p.end(); code != 0 || !strings.Contains(out, "granted as a task of 3 uses") {
		t.Fatalf("approve: %d %s", code, out)
	}
	status := wantState(t, api, "a-1", client.Granted)
	if _, err := api.Use(ctx, "a-1", client.Use{Permit: "r-1", Grants: []string{status.Grants[0].Grant}}); err != nil {
		t.Fatal(err)
	}
	var list []client.Approval
	if code, out := withoutTerminal(t, home, "", "grants", "--json"); code != 0 || json.Unmarshal([]byte(out), &list) != nil || len(list) != 1 || list[0].State != client.Open || len(list[0].Uses) != 1 {
		t.Errorf("grants: %d %s", code, out)
	}
	if code, out := withoutTerminal(t, home, "", "grants"); code != 0 || !strings.Contains(out, "task, 1 of 3 uses") || !strings.Contains(out, "use 1 at ") {
		t.Errorf("grants: %d %s", code, out)
	}
	began := time.Now()
	if code, out := withoutTerminal(t, home, "", "revoke", status.Grants[0].Grant, "--reason", "enough"); code != 0 || !strings.Contains(out, "taken back; nothing of it is open") {
		t.Errorf("revoke: %d %s", code, out)
	}
	if took := time.Since(began); took > client.Lease { // nothing needs to be waited for
		t.Errorf("it took %v", took)
	}
	if _, err := api.Use(ctx, "a-1", client.Use{Permit: "r-2", Grants: []string{status.Grants[0].Grant}}); err == nil {
		t.Error("used after it was taken back")
	}
	if code, out := withoutTerminal(t, home, "", "revoke", "a-none"); code != 1 || !strings.Contains(out, "no ask, grant or pod") {
		t.Errorf("revoke of nothing: %d %s", code, out)
	}
}

// The screen at the terminal is the screen of the signed bytes.
func TestScreen(t *testing.T) {
	home := t.TempDir()
	quickKey(t, home)
	api, _ := daemon(t, home, nil)
	if err := api.RegisterPod(t.Context(), "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	ask := newAsk(t, "a-1", "sh", "-c", "echo \x1b[2K\x07\u202e"+strings.Repeat("\nx", 100), "last \u0430rgument")
	if _, err := api.Submit(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	for _, whole := range []bool{false, true} {
		screen, err := approval.Draw(ask, approval.View{Whole: whole})
		if err != nil {
			t.Fatal(err)
		}
		p := atPty(t, home, "", "approve", "a-1")
		if whole {
			p.expect("[y/N/v] ")
			p.send("v")
		}
		p.expect("approval by ann\r\n\r\n")
		p.expect(strings.ReplaceAll(screen.Text, "\n", "\r\n"))
		p.expect("grant this once? [y/N")
		p.send("")
		if code, out := p.end(); code != exitNotGranted || strings.ContainsAny(out, "\x1b\x07\u202e") {
			t.Errorf("%d %q", code, out)
		}
		args := []string{"show", "a-1"}
		if whole {
			args = append(args, "--whole")
		}
		if code, out := withoutTerminal(t, home, "", args...); code != 0 || out != screen.Text+"state: pending\n" {
			t.Errorf("show: %d %q, want %q", code, out, screen.Text)
		}
	}
	wantState(t, api, "a-1", client.Pending)
}

// A key that another process of the user could read out of memory is given out.
func TestNotDumpable(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become an ordinary user, for whom /proc tells the difference")
	}
	const uid = 65534
	home := t.TempDir()
	for dir := home; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	quickKey(t, home)
	if err := filepath.Walk(home, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Chown(path, uid, uid))
	}); err != nil {
		t.Fatal(err)
	}
	owner := func(cmd *exec.Cmd) uint32 {
		info, err := os.Stat(fmt.Sprintf("/proc/%d/environ", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Uid
	}
	asUser := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}

	var served *exec.Cmd
	daemon(t, home, func(cmd *exec.Cmd) { cmd.SysProcAttr, cmd.Dir, served = asUser, "/", cmd })
	if got := owner(served); got != 0 {
		t.Errorf("the daemon's memory belongs to uid %d, want 0: it is dumpable", got)
	}
	control := exec.Command("/bin/cat")
	control.SysProcAttr = asUser
	in, err := control.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := control.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := control.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if got := owner(control); got != uid {
		t.Errorf("positive control: an ordinary process's memory belongs to uid %d, want %d", got, uid)
	}
	_ = in.Close()
	_ = control.Wait()
}
