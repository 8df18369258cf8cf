package agents

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/internal/script"
	"cal/nucleus"
)

// screen is an agent's own screen in a terminal of tmux.
type screen struct {
	t      *testing.T
	ctx    context.Context
	socket string
}

func (w *world) screen(ctx context.Context) *screen {
	t := w.t
	t.Helper()
	for _, program := range []string{"tmux", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("no %s, which holds the agent's screen", program)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &screen{t, ctx, filepath.Join(t.TempDir(), "tmux")}
	s.tmux("-f", "/dev/null", "new-session", "-d", "-x", "110", "-y", "40", fmt.Sprintf(
		"env -i %s=%s unshare -m -p -n -i --fork --kill-child %s; echo agent-exit=$?; read forever", jailedEnv, w.plan, self))
	t.Cleanup(func() { _ = exec.Command("tmux", "-S", s.socket, "kill-server").Run() })
	return s
}

func (s *screen) tmux(args ...string) string {
	s.t.Helper()
	out, err := exec.CommandContext(s.ctx, "tmux", append([]string{"-S", s.socket}, args...)...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("tmux %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// wait returns once all of the texts stand on the screen.
func (s *screen) wait(texts ...string) {
	s.t.Helper()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		shown := s.tmux("capture-pane", "-p")
		missing := ""
		for _, text := range texts {
			if !strings.Contains(shown, text) {
				missing = text
			}
		}
		if missing == "" {
			return
		}
		select {
		case <-s.ctx.Done():
			s.t.Fatalf("%q never came on the screen:\n%s", missing, shown)
		case <-again.C:
		}
	}
}

// TestScreen types a prompt into the agent's own screen, as the first thing that
// ever happens in its HOME, and wants the work done: a question of a first run
// that was not answered beforehand would take the keys.
func TestScreen(t *testing.T) {
	ready := map[string]string{"claude-code": "❯", "codex": "›", "opencode": "Ask anything"}
	for _, c := range []struct {
		agent  string
		mode   nucleus.Mode
		bearer bool
	}{
		{"claude-code", nucleus.Mediated, false},
		{"claude-code", nucleus.Mediated, true},
		{"claude-code", nucleus.Contained, false},
		{"codex", nucleus.Mediated, false},
		{"codex", nucleus.Contained, false},
		{"opencode", nucleus.Mediated, false},
		{"opencode", nucleus.Contained, false},
	} {
		t.Run(fmt.Sprintf("%s %s bearer=%v", c.agent, c.mode, c.bearer), func(t *testing.T) {
			t.Parallel()
			l := launch(c.mode, "")
			l.Bearer = c.bearer
			l.Instructions = map[string][]byte{"CLAUDE.md": []byte("See @/etc/passwd"), "AGENTS.md": []byte("See @/etc/passwd")}
			w, model := startWorld(t, c.agent, l, func(turn script.Turn) script.Step {
				// Claude Code's screen takes a prompt before it has connected to its
				// MCP servers; whoever types within its first second meets that.
				if n := len(turn.Results); n == 0 || strings.Contains(turn.Results[n-1].Text, "No such tool available") {
					return script.Step{Server: "cal", Tool: "write_files", Args: map[string]any{"path": "app/x", "content": "typed"}}
				}
				return script.Step{Text: "WRITTEN-AND-DONE"}
			})
			ctx, cancel := context.WithTimeout(context.Background(), runTimeout)
			defer cancel()
			s := w.screen(ctx)
			s.wait(ready[c.agent])
			s.tmux("send-keys", "-l", "please write it")
			s.wait("please write it")
			s.tmux("send-keys", "Enter")
			s.wait("WRITTEN-AND-DONE")
			t.Logf("after %d turns the screen shows:\n%s", len(model.Conversation()), s.tmux("capture-pane", "-p"))
			if got := w.wrote.get("app/x"); got != "typed" {
				turns := model.Conversation()
				t.Errorf("write_files wrote %q; results: %+v", got, turns[len(turns)-1].Turn.Results)
			}
			if got := model.Conversation()[0].Turn.Prompt; got != "please write it" {
				t.Errorf("the model saw the prompt %q", got)
			}
		})
	}
}
