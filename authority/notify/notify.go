// Package notify tells a person that an ask waits: it runs commands.
//
// The threat is an asker that wants the person drowned, deceived or delayed by what it asks
// for, and a command that hangs. So a command is an argv and never a shell; it hears the ids
// and the operation, which are names, and no word that an agent wrote; commands run one after
// the other, for a bounded time, and what comes meanwhile is told with the next; and nobody
// who asks waits for any of it. Nothing here can decide.
package notify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"cal/approval"
	"cal/nucleus"
)

// Note is what is told of an ask.
type Note struct {
	Ask  string
	Pod  string
	Op   nucleus.Op
	More int // asks that came since the last one that was told of, beside this
}

// The environment of a command.
const (
	askEnv  = "CAL_ASK"
	podEnv  = "CAL_POD"
	opEnv   = "CAL_OPERATION"
	moreEnv = "CAL_MORE"
)

// env is a note as variables.
func (n Note) env() []string {
	return []string{askEnv + "=" + n.Ask, podEnv + "=" + n.Pod, opEnv + "=" + string(n.Op), moreEnv + "=" + strconv.Itoa(n.More)}
}

// FromEnv is the note that a command was given.
func FromEnv(getenv func(string) string) (Note, error) {
	n := Note{Ask: getenv(askEnv), Pod: getenv(podEnv), Op: nucleus.Op(getenv(opEnv))}
	var err error
	if n.More, err = strconv.Atoi(getenv(moreEnv)); err != nil {
		return Note{}, fmt.Errorf("%s=%q: want a number", moreEnv, getenv(moreEnv))
	}
	return n, n.check()
}

func (n Note) check() error {
	if !n.Op.Valid() {
		return fmt.Errorf("%q is no operation", n.Op)
	}
	return errors.Join(approval.CheckName("ask", n.Ask), approval.CheckName("pod", n.Pod))
}

// Text is a note in words: a title, and what to do.
func (n Note) Text() (title, body string) {
	body = fmt.Sprintf("%s in pod %s: cal approve %s", n.Op, n.Pod, n.Ask)
	if n.More > 0 {
		body += fmt.Sprintf(" (and %d more: cal approve)", n.More)
	}
	return "CAL: an approval is wanted", body
}

// Notifier runs commands. All of it but Announce is set before the first use.
type Notifier struct {
	Commands [][]string    // argv of each
	Env      []string      // of the commands, beside the note
	Limit    time.Duration // of one command; 0: 10 seconds
	Failed   func(error)   // is told of a command that failed

	mu    sync.Mutex
	next  *Note
	woken chan struct{}
}

// Announce has the commands run for a note, and returns at once.
func (n *Notifier) Announce(note Note) {
	if err := note.check(); err != nil {
		n.failed(err)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.next != nil {
		n.next.More++
		return
	}
	n.next = &note
	select {
	case n.wake() <- struct{}{}:
	default:
	}
}

// wake is the channel that wakes Run; the caller holds mu.
func (n *Notifier) wake() chan struct{} {
	if n.woken == nil {
		n.woken = make(chan struct{}, 1)
	}
	return n.woken
}

func (n *Notifier) failed(err error) {
	if n.Failed != nil {
		n.Failed(err)
	}
}

// Run runs the commands until ctx ends, and ends those that still run then.
func (n *Notifier) Run(ctx context.Context) {
	n.mu.Lock()
	woken := n.wake()
	n.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			return
		case <-woken:
		}
		n.mu.Lock()
		note := n.next
		n.next = nil
		n.mu.Unlock()
		if note == nil {
			continue
		}
		for _, argv := range n.Commands {
			if err := n.run(ctx, argv, *note); err != nil && ctx.Err() == nil {
				n.failed(err)
			}
		}
	}
}

const (
	defaultLimit = 10 * time.Second
	maxOutput    = 1 << 10 // of what a command that failed said
)

func (n *Notifier) run(ctx context.Context, argv []string, note Note) error {
	limit := n.Limit
	if limit == 0 {
		limit = defaultLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(append([]string{}, n.Env...), note.env()...)
	var out output
	cmd.Stdout, cmd.Stderr = &out, &out
	// With all that it started and left in its group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s of ask %s did not end within %v", approval.Visible(argv[0]), note.Ask, limit)
	case err != nil:
		return fmt.Errorf("%s of ask %s: %w: %s", approval.Visible(argv[0]), note.Ask, err, approval.Visible(strings.TrimSpace(out.String())))
	}
	return nil
}

// output keeps the beginning of what is written.
type output struct{ bytes.Buffer }

func (o *output) Write(p []byte) (int, error) {
	o.Buffer.Write(p[:min(len(p), maxOutput-o.Len())])
	return len(p), nil
}

// Kept are the variables of the person's environment that a command gets: where programs, the
// screen and its bus are, and the language.
func Kept(environ []string) (kept []string) {
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		switch name {
		case "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "CAL_HOME":
			kept = append(kept, entry)
		default:
			if strings.HasPrefix(name, "LC_") {
				kept = append(kept, entry)
			}
		}
	}
	return kept
}
