package e2e

import (
	"strings"
	"testing"

	"cal/internal/testenv"
)

// The tools' side became an ordinary user on every thread, and what it starts
// stays one: read of the guest's kernel, then tried.
func TestToolsHoldNoPrivilege(t *testing.T) {
	env := testenv.New(t)
	const ask = `for task in /proc/1/task/*/status /proc/self/status; do echo "thread $task"; cat "$task"; done`
	out := env.Cal("run", "--", "sh", "-c", ask).Want(t, 0).Stdout
	want := map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	}
	seen := map[string]int{}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if strings.HasPrefix(line, "thread ") {
			seen["thread"]++
		}
		if wanted, ok := want[name]; ok {
			seen[name]++
			if got := strings.TrimSpace(value); got != wanted {
				t.Errorf("%s is %q, want %q", name, got, wanted)
			}
		}
	}
	if seen["thread"] < 3 {
		t.Fatalf("saw %d threads, want the worker's several and the command's:\n%s", seen["thread"], out)
	}
	for name := range want {
		if seen[name] != seen["thread"] {
			t.Errorf("%s was said of %d threads of %d", name, seen[name], seen["thread"])
		}
	}
	// Each ends with 0 for one who may; the first is the control, for which nothing is needed.
	script := `try() { if "$@" >/dev/null 2>&1; then echo "did: $*"; else echo "could not: $*"; fi; }
try mkdir /tmp/own
try mount -t tmpfs none /tmp/own
try unshare --mount true
try unshare --user --map-root-user true
try chroot / true
try chown 0 /tmp/own
try ls /.nucleus/agent/.
try dd if=/proc/1/mem count=0
try cat /proc/1/environ
`
	env.Cal("run", "--", "sh", "-c", script).Want(t, 0, "did: mkdir /tmp/own", "could not: mount", "could not: unshare --mount", "could not: unshare --user",
		"could not: chroot", "could not: chown 0", "could not: ls /.nucleus", "could not: dd", "could not: cat /proc/1/environ")
}
