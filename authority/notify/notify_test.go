package notify

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cal/nucleus"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// started is a notifier that runs until the test's end.
type started struct {
	*Notifier
	t      *testing.T
	mu     sync.Mutex
	errors []string
}

func start(t *testing.T, commands ...[]string) *started {
	t.Helper()
	s := &started{t: t}
	s.Notifier = &Notifier{Commands: commands, Env: []string{"PATH=" + os.Getenv("PATH")}, Failed: func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.errors = append(s.errors, err.Error())
	}}
	return s
}

func (s *started) run() {
	done := make(chan struct{})
	go func() { defer close(done); s.Run(s.t.Context()) }()
	s.t.Cleanup(func() { <-done })
}

func (s *started) failures() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.errors, "\n")
}

func eventually(t *testing.T, what string, ready func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(patience); !ready(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("after %v: %s", patience, what)
		}
	}
}

func lines(path string) []string {
	raw, _ := os.ReadFile(path)
	return strings.Split(strings.TrimSuffix(string(raw), "\n"), "\n")
}

var note = Note{Ask: "a-1", Pod: "p-1", Op: nucleus.GitPush}

// A command gets its arguments as they are, and of the ask the names alone.
func TestCommand(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	s := start(t, []string{"sh", "-c", `env | sort > "$1.new"; printf '%s\n' "$0" "$2" >> "$1.new"; mv "$1.new" "$1"`, "zero", out, "$(id); x"})
	s.run()
	s.Announce(note)
	eventually(t, "the command has not run", func() bool { _, err := os.Stat(out); return err == nil })
	var got []string
	for _, line := range lines(out) {
		if name, _, _ := strings.Cut(line, "="); !slices.Contains([]string{"PWD", "OLDPWD", "SHLVL", "_", "PATH"}, name) { // the shell's own
			got = append(got, line)
		}
	}
	if want := []string{"CAL_ASK=a-1", "CAL_MORE=0", "CAL_OPERATION=git_push", "CAL_POD=p-1", "zero", "$(id); x"}; !slices.Equal(got, want) {
		t.Errorf("the command got %q, want %q", got, want)
	}
	if s.failures() != "" {
		t.Error(s.failures())
	}
	for _, bad := range []Note{{Ask: "a 1", Pod: "p-1", Op: nucleus.GitPush}, {Ask: "a-1", Pod: "<b>x</b>", Op: nucleus.GitPush}, {Ask: "a-1", Pod: "p-1", Op: "rm"}} {
		before := s.failures()
		s.Announce(bad)
		if s.failures() == before {
			t.Errorf("%+v is told of", bad)
		}
	}
}

// What comes while a command runs is told with the next one: no flood, and nobody waits.
func TestFlood(t *testing.T) {
	dir := t.TempDir()
	out, gate := filepath.Join(dir, "out"), filepath.Join(dir, "gate")
	s := start(t, []string{"sh", "-c", `echo "$CAL_ASK $CAL_MORE" >> "$0"; while [ ! -e "$1" ]; do sleep 0.01; done`, out, gate})
	s.run()
	s.Announce(note)
	eventually(t, "the first is not told of", func() bool { return lines(out)[0] != "" })
	for i := range 1000 {
		s.Announce(Note{Ask: fmt.Sprint("b-", i), Pod: "p-1", Op: nucleus.RunBash})
	}
	if got := lines(out); len(got) != 1 {
		t.Errorf("while one ran: %q", got)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the rest is not told of", func() bool { return len(lines(out)) >= 2 })
	if got := lines(out); got[0] != "a-1 0" || got[1] != "b-0 999" {
		t.Errorf("told %q", got)
	}
}

// A command that hangs is ended with what it started, one that fails is said, and the next
// ones run all the same.
func TestHangAndFail(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	pid := filepath.Join(t.TempDir(), "pid")
	s := start(t,
		[]string{"sh", "-c", `sleep 40 & echo $! > "$0"; wait`, pid},
		[]string{"sh", "-c", `printf 'no \033[2J screen'; exit 3`},
		[]string{"/no/such/program"},
		[]string{"sh", "-c", `echo "$CAL_ASK" >> "$0"`, out})
	s.Limit = 200 * time.Millisecond
	s.run()
	s.Announce(note)
	eventually(t, "the last command has not run", func() bool { return lines(out)[0] == "a-1" })
	for _, want := range []string{"sh of ask a-1 did not end within 200ms", `exit status 3: no \u{1b}[2J screen`, "/no/such/program of ask a-1"} {
		if !strings.Contains(s.failures(), want) {
			t.Errorf("failures %q, want %q", s.failures(), want)
		}
	}
	child := lines(pid)[0]
	eventually(t, "what the hanging command started lives on", func() bool {
		status, err := os.ReadFile("/proc/" + child + "/status")
		return os.IsNotExist(err) || strings.Contains(string(status), "State:\tZ")
	})
}

func TestKept(t *testing.T) {
	got := Kept([]string{"PATH=/bin", "ANTHROPIC_API_KEY=secret", "LC_ALL=C", "HOME=/h", "CAL_HOME=/c", "DBUS_SESSION_BUS_ADDRESS=unix:x", "LD_PRELOAD=/x", "CAL_ASK=old"})
	if want := []string{"PATH=/bin", "LC_ALL=C", "HOME=/h", "CAL_HOME=/c", "DBUS_SESSION_BUS_ADDRESS=unix:x"}; !slices.Equal(got, want) {
		t.Errorf("kept %q, want %q", got, want)
	}
}

func TestFromEnv(t *testing.T) {
	env := map[string]string{"CAL_ASK": "a-1", "CAL_POD": "p-1", "CAL_OPERATION": "git_push", "CAL_MORE": "2"}
	get := func(name string) string { return env[name] }
	n, err := FromEnv(get)
	if err != nil {
		t.Fatal(err)
	}
	if title, body := n.Text(); title != "CAL: an approval is wanted" || body != "git_push in pod p-1: cal approve a-1 (and 2 more: cal approve)" {
		t.Errorf("%q, %q", title, body)
	}
	for name, bad := range map[string]string{"CAL_ASK": "<i>x</i>", "CAL_POD": "p 1", "CAL_OPERATION": "x", "CAL_MORE": "many"} {
		good := env[name]
		env[name] = bad
		if n, err := FromEnv(get); err == nil {
			t.Errorf("%s=%s: %+v", name, bad, n)
		}
		env[name] = good
	}
}
