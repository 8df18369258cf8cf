package main

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/approval/client"
	"cal/nucleus"
)

// pane is a terminal of tmux: what stands on it is what a person sees.
type pane struct {
	t      *testing.T
	socket string
}

// newPane runs the program in a terminal of 80 columns and 24 rows, and then says its exit
// code and the terminal's modes.
func newPane(t *testing.T, home, env string, args ...string) *pane {
	t.Helper()
	return paneAfter(t, home, env, "echo before", args...)
}

// paneAfter is newPane at a terminal at which a line of shell ran before.
func paneAfter(t *testing.T, home, env, before string, args ...string) *pane {
	t.Helper()
	if _, err := exec.LookPath("tmux"); err != nil {
		t.Skip("no tmux, which is the person's terminal here")
	}
	p := &pane{t, filepath.Join(t.TempDir(), "tmux")}
	p.tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", fmt.Sprintf(
		"%s; env CAL_HOME=%s %s %s %s; echo exit=$?; stty -a; read forever", before, home, env, binary, strings.Join(args, " ")))
	t.Cleanup(func() { _ = exec.Command("tmux", "-S", p.socket, "kill-server").Run() })
	return p
}

func (p *pane) tmux(args ...string) string {
	p.t.Helper()
	out, err := exec.CommandContext(p.t.Context(), "tmux", append([]string{"-S", p.socket}, args...)...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("tmux %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func (p *pane) screen() string { return p.tmux("capture-pane", "-p") }

// shows returns the screen once all of the texts stand on it.
func (p *pane) shows(texts ...string) string {
	p.t.Helper()
	deadline := time.After(patience)
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		screen, missing := p.screen(), ""
		for _, text := range texts {
			if !strings.Contains(screen, text) {
				missing = text
			}
		}
		if missing == "" {
			return screen
		}
		select {
		case <-again.C:
		case <-deadline:
			p.t.Fatalf("after %v the screen has no %q:\n%s", patience, missing, screen)
		}
	}
}

// press sends keys by their names, text what is typed; each call is one piece.
func (p *pane) press(keys ...string) {
	for _, k := range keys {
		p.tmux("send-keys", k)
	}
}

func (p *pane) text(s string) { p.tmux("send-keys", "-l", s) }

// queueHome is an authority that knows a pod.
func queueHome(t *testing.T) (home string, api *client.Client) {
	t.Helper()
	home = t.TempDir()
	quickKey(t, home)
	api, _ = daemon(t, home, nil)
	if err := api.RegisterPod(t.Context(), "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	return home, api
}

func submit(t *testing.T, api *client.Client, ask nucleus.AskRequest) {
	t.Helper()
	if _, err := api.Submit(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
}

// The queue is live, shows what is signed, and decides for the passphrase alone; keys that
// came before an ask could be read decide nothing.
func TestQueueAtTerminal(t *testing.T) {
	t.Parallel() // mostly waits
	home, api := queueHome(t)
	p := newPane(t, home, "TERM=screen NO_COLOR=", "approve", "--reason", "fine")
	p.shows("approvals by ann", "no ask waits")
	submit(t, api, newAsk(t, "a-1", "make", "test"))
	submit(t, api, newAsk(t, "a-2", "rm", "x\u202e\x1b[2J"))
	p.shows("2 asks wait", `run_bash (arbitrary code) "make" "test"`, `(writes) "rm" "x\u{202e}\u{1...`)

	// Who types ahead: the ask, and all that would grant it.
	p.tmux("send-keys", "Enter", ";", "send-keys", "-l", "g", ";", "send-keys", "-l", passphrase, ";", "send-keys", "Enter")
	p.shows("what will happen: run_bash", "keys count in a moment")
	p.shows("lines ", "g grant  d deny")
	if screen := p.screen(); strings.Contains(screen, "passphrase of") {
		t.Errorf("a key that was typed ahead counts:\n%s", screen)
	}
	wantState(t, api, "a-1", client.Pending)

	// A program of the same user with a terminal of its own has no passphrase.
	p.text("g")
	p.shows("your phrase: "+phrase, "passphrase of ann:")
	p.text("password123")
	if screen := p.screen(); strings.Contains(screen, "password123") {
		t.Errorf("the passphrase is shown:\n%s", screen)
	}
	p.press("Enter")
	p.shows("wrong passphrase")
	wantState(t, api, "a-1", client.Pending)

	p.text(passphrase)
	p.press("Enter")
	p.shows("a-1 is granted once, until", "1 ask waits")
	if status := wantState(t, api, "a-1", client.Granted); status.Grants[0].Reason != "fine" {
		t.Errorf("%+v", status)
	}

	p.press("Enter")
	p.shows(`argv[1]     "x\u{202e}\u{1b}[2J"`, "lines ")
	p.text("d")
	p.shows("reason (the agent is told): fine")
	p.press("C-u")
	p.text("keep x")
	p.press("Enter")
	p.shows("a-2 is denied", "no ask waits")
	if status := wantState(t, api, "a-2", client.Denied); status.Reason != "keep x" {
		t.Errorf("%+v", status)
	}
	p.text("q")
	after := p.shows("before", "exit=0", " icanon", " echo ")
	if strings.Contains(after, "asks wait") {
		t.Errorf("the screen was not put back:\n%s", after)
	}
}

// An ask that expires or is decided elsewhere while it is shown cannot be granted.
func TestQueueOvertaken(t *testing.T) {
	t.Parallel() // mostly waits
	home, api := queueHome(t)
	short := newAsk(t, "a-1", "true")
	short.Expires = short.Created + 12000 // a busy host has shown it by then
	submit(t, api, short)
	submit(t, api, newAsk(t, "a-2", "false"))
	p := newPane(t, home, "TERM=screen", "approve")
	p.shows("2 asks wait")
	p.press("Enter")
	p.shows("a-1", "lines ")
	p.text("g")
	p.shows("passphrase of ann:")
	p.text(passphrase)
	p.shows("closed", "nothing is decided: it has expired")
	p.text("q") // not a command: who types looks at the keys
	p.press("Enter")
	p.shows("closed", "Esc list")
	wantState(t, api, "a-1", client.Expired)
	p.press("Escape")
	p.shows("1 ask waits")
	p.press("Enter")
	p.shows("a-2", "lines ")
	p.text("g")
	p.shows("passphrase of ann:")
	if code, out := withoutTerminal(t, home, "", "deny", "a-2"); code != 0 {
		t.Fatalf("deny: %d %s", code, out)
	}
	p.shows("closed", "it waits no longer")
	p.text(passphrase)
	p.press("Enter")
	wantState(t, api, "a-2", client.Denied)
}

// The screen follows the terminal's size, has no colours where they are not wanted, and gives
// way to lines where the terminal knows no screen.
func TestQueueTerminals(t *testing.T) {
	t.Parallel() // mostly waits
	home, api := queueHome(t)
	submit(t, api, newAsk(t, "a-1", "make", "test"))
	for env, want := range map[string]bool{"TERM=screen NO_COLOR=": true, "TERM=screen NO_COLOR=1": false} {
		p := newPane(t, home, env, "approve")
		p.shows("1 ask waits")
		if got := strings.Contains(p.tmux("capture-pane", "-p", "-e"), "\x1b[7m"); got != want {
			t.Errorf("%s: colours %v, want %v", env, got, want)
		}
		p.press("Enter")
		p.shows("approval by ann", "lines ")
		p.tmux("resize-window", "-x", "40", "-y", "16")
		for _, line := range strings.Split(p.shows("a-1, 0:0", "lines of what will happen were n"), "\n") {
			if len(line) > 40 {
				t.Errorf("line %q at 40 columns", line)
			}
		}
		p.press("Space", "Space")
		p.shows("lines 3", "g grant")
		p.tmux("resize-window", "-x", "30", "-y", "16")
		p.shows("30x16: 40x12 is needed (q)")
		p.text("g")
		p.tmux("resize-window", "-x", "80", "-y", "24")
		p.shows("what will happen: run_bash", "g grant")
		if screen := p.screen(); strings.Contains(screen, "passphrase of") {
			t.Errorf("granted on a terminal that is too small:\n%s", screen)
		}
		p.press("C-c")
		p.shows("exit=130", " icanon")
	}
	for _, env := range []string{"TERM=dumb", "TERM="} {
		p := newPane(t, home, env, "approve")
		p.shows("grant this once? [y/N]")
		p.press("n", "Enter")
		p.shows(fmt.Sprintf("exit=%d", exitNotGranted))
	}
	wantState(t, api, "a-1", client.Pending)
}

// Whatever a machine's output has left the terminal in, the person sees what is signed, whole
// and nothing else: on the whole screen, and line by line a page at a time.
func TestWreckedTerminal(t *testing.T) {
	t.Parallel() // mostly waits
	home, api := queueHome(t)
	const fake = `\033[2J\033[1;1Happroval by ann\033[8;1H  runs        read-only: "ls" "-l"\033[24;1Hyour phrase: blue lamp`
	submit(t, api, newAsk(t, "a-1", "rm", "-rf", "everything"))
	for name, left := range map[string]string{
		"margins":            `\033[19;24r\033[19;1H`,
		"origin in margins":  `\033[1;12r\033[?6h`,
		"insert":             `\033[4h`,
		"no wrap":            `\033[?7l`,
		"line drawing":       `\033(0`,
		"shifted out":        `\033)0\016`,
		"alternate screen":   `\033[?1049h` + fake,
		"all of it together": `\033[?1049h` + fake + `\033)0\016\033(0\033[4h\033[?7l\033[1;12r\033[?6h`,
	} {
		t.Run(name, func(t *testing.T) {
			p := paneAfter(t, home, "TERM=screen", "printf '"+fake+left+"'", "approve", "a-1")
			screen := p.shows("approval by ann  1 of 1: a-1", `"rm" "-rf" "everything"`, "g grant  d deny")
			if lines := strings.Split(strings.TrimRight(screen, "\n"), "\n"); len(lines) != 24 || !strings.HasPrefix(lines[0], "approval by ann") || !strings.HasPrefix(lines[23], "g grant") {
				t.Errorf("the screen is not whole, it has %d lines:\n%s", len(lines), screen)
			}
			if strings.Contains(screen, `"ls"`) {
				t.Errorf("what the machine wrote is still there:\n%s", screen)
			}
			p.press("q")
			p.shows("exit=4")

			p = paneAfter(t, home, "TERM=screen", "printf '"+fake+left+"'", "grant", "a-1")
			screen = p.shows("approval by ann", "lines 1-18 of ", "Enter goes on")
			if strings.Contains(screen, `"ls"`) {
				t.Errorf("what the machine wrote is still there:\n%s", screen)
			}
			p.press("Enter")
			p.shows(`"rm" "-rf" "everything"`, "grant this once? [y/N]")
			p.press("n", "Enter")
			p.shows("exit=4")
		})
	}
	wantState(t, api, "a-1", client.Pending)
}

// A job in the background that writes to the terminal while a person decides is stopped.
func TestNobodyElseWrites(t *testing.T) {
	t.Parallel() // mostly waits
	home, api := queueHome(t)
	submit(t, api, newAsk(t, "a-1", "true"))
	mark := filepath.Join(t.TempDir(), "go")
	script := mark + ".sh"
	text := fmt.Sprintf("set -m\n(until test -e %[1]s; do sleep 0.05; done; echo OVERWRITTEN; touch %[1]s.done) &\nCAL_HOME=%s %s approve a-1\necho exit=$?; stty -a; read forever\n", mark, home, binary)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := paneAfter(t, home, "TERM=screen", "exec env --default-signal=TTIN,TTOU TERM=screen bash "+script) // tmux ignores them
	p.shows("approval by ann", "g grant")
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // for what must not happen
	if screen := p.screen(); strings.Contains(screen, "OVERWRITTEN") {
		t.Errorf("it wrote:\n%s", screen)
	}
	if _, err := os.Stat(mark + ".done"); err == nil {
		t.Error("it went on")
	}
	p.press("q")
	p.shows("exit=4", "-tostop")
}

// Whoever ends the program gets the terminal back as it was. It is put back once, though the
// end of the process and of the queue come together: a second time wipes what stood there.
func TestQueueEnded(t *testing.T) {
	t.Parallel() // mostly waits
	home, _ := queueHome(t)
	p := newPane(t, home, "TERM=screen", "approve")
	p.shows("no ask waits")
	shell := strings.TrimSpace(p.tmux("display-message", "-p", "#{pane_pid}"))
	if out, err := exec.Command("pkill", "-TERM", "-P", shell).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	after := p.shows("before", "exit=130", " icanon", " echo ")
	if strings.Contains(after, "no ask waits") {
		t.Errorf("the screen was not put back:\n%s", after)
	}
}
