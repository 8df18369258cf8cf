package testenv

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/creack/pty"

	approvals "cal/approval/client"
)

// Terminal is a program on a pseudo-terminal, as a person has it.
type Terminal struct {
	Screen *Output
	cmd    *exec.Cmd
	tty    *os.File
	ended  chan struct{}
	env    *Env
	seen   int // bytes of the screen that Until has passed
}

// Terminal starts a command on a terminal of 110 columns and 40 rows.
func (e *Env) Terminal(cmd *exec.Cmd) *Terminal {
	e.t.Helper()
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 40, Cols: 110})
	if err != nil {
		e.t.Fatal(err)
	}
	t := &Terminal{Screen: newOutput(), cmd: cmd, tty: tty, ended: make(chan struct{}), env: e}
	go func() {
		defer close(t.ended)
		io.Copy(t.Screen, tty)
		cmd.Wait()
	}()
	e.t.Cleanup(func() {
		cmd.Process.Kill()
		tty.Close()
		<-t.ended
	})
	return t
}

// Lines is a command for a terminal that shows lines and knows no screen.
func (e *Env) Lines(name string, args ...string) *exec.Cmd {
	cmd := e.Command(name, args...)
	cmd.Env = append(cmd.Env, "TERM=dumb")
	return cmd
}

// Until waits for a text that has not been passed yet.
func (t *Terminal) Until(text string) {
	t.env.t.Helper()
	deadline := time.After(t.env.patience)
	for {
		_, changed := t.Screen.look("")
		screen := t.Screen.String()
		if at := strings.Index(screen[t.seen:], text); at >= 0 {
			t.seen += at + len(text)
			return
		}
		select {
		case <-changed:
		case <-t.ended:
			if !strings.Contains(t.Screen.String()[t.seen:], text) {
				t.env.t.Fatalf("ended before %q; the screen:\n%s", text, clip(t.Screen.String()))
			}
		case <-deadline:
			t.env.t.Fatalf("no %q; the screen:\n%s", text, clip(t.Screen.String()))
		}
	}
}

// Type sends keys as they are.
func (t *Terminal) Type(keys string) { io.WriteString(t.tty, keys) }

// Wait returns the exit code once the program has ended.
func (t *Terminal) Wait() int {
	t.env.t.Helper()
	select {
	case <-t.ended:
	case <-time.After(t.env.patience):
		t.env.t.Fatalf("%v does not end; the screen:\n%s", t.cmd.Args, clip(t.Screen.String()))
	}
	return t.cmd.ProcessState.ExitCode()
}

// Passphrase is that of the first approver.
const Passphrase = "correct horse battery staple"

// Approver makes the person's approval key, at a terminal.
func (e *Env) Approver() {
	e.t.Helper()
	t := e.Terminal(e.Command("cal", "approve", "init"))
	for _, talk := range [][2]string{{"passphrase: ", Passphrase}, {"passphrase again: ", Passphrase}, {"your phrase: ", "the person's own phrase"}} {
		t.Until(talk[0])
		t.Type(talk[1] + "\n")
	}
	if code := t.Wait(); code != 0 {
		e.t.Fatalf("cal approve init: exit code %d\n%s", code, t.Screen)
	}
}

// Grant approves one ask at a terminal and returns what the authority drew.
func (e *Env) Grant(ask string) string {
	e.t.Helper()
	t := e.Terminal(e.Lines("cal", "approve", ask))
	t.Until("[y/N]")
	drawn := t.Screen.String()
	t.Type("y\n")
	t.Until("passphrase of")
	t.Type(Passphrase + "\n")
	if code := t.Wait(); code != 0 {
		e.t.Fatalf("cal approve %s: exit code %d\n%s", ask, code, t.Screen)
	}
	return drawn
}

// DenyAll refuses every ask that comes until stop, which waits and returns the ids.
func (e *Env) DenyAll(reason string) (stop func() []string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan []string)
	go func() {
		var denied []string
		defer func() { done <- denied }()
		authority := approvals.New(filepath.Join(e.CAL, "run", "authority.sock"))
		defer authority.Close()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			pending, _ := authority.List(ctx, approvals.Pending) // none answers yet
			for _, ask := range pending {
				if e.Command("cal", "approve", "deny", ask.ID, "--reason", reason).Run() == nil {
					denied = append(denied, ask.ID)
				}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() []string {
		cancel()
		return <-done
	}
}
