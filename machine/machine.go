// Package machine says what a driver owes: an isolated machine that runs the
// tool-proxy and one stream to it, the wire.
//
// Whatever runs in the machine is hostile, the proxy included once it has been
// taken over. A driver promises that nothing of the host is in the machine but
// what its Spec names, that the machine has no network interface, that a limit
// which it calls enforced holds from the first instruction, and that whatever
// it made can be found again and removed, at whatever moment the node was killed.
//
// A driver's job ends at handing over the wire. It knows no policy, no agent
// and no session.
package machine

import (
	"context"
	"errors"
	"fmt"
	"net"

	"cal/nucleus"
)

// The users of a machine where it has ids of its own.
const (
	ToolsID = nucleus.MachineToolsID
	AgentID = 1001
)

// Spec is a machine to be made. Every path is one of the host. Check says what
// every driver refuses.
type Spec struct {
	ID string // of the pod: [a-z0-9-], at most 63

	// Dir is the machine's own directory: it exists, mode 0700, and holds nothing
	// else. All that the driver makes lies in it or is named in it.
	Dir string

	// Proxy is the static program that runs as `nucleus.MachineProxy init` with the wire on
	// descriptor 3; a new wire is handed in by `nucleus.MachineProxy attach`, the same way.
	Proxy string

	// Workspace is a directory of the host for what outlives the machine. Nobody else changes
	// it while the machine lives. Either it is itself shown at nucleus.MachineWorkspace, as the only
	// directory of the host that the machine can write, and who reads it there sees at once what
	// the machine wrote; or it holds a disk that is mounted there (Facts.Sync). A driver
	// refuses a workspace that is of the other kind.
	Workspace string

	Image     nucleus.Image   // of a kind: the caller knows the driver's usual one
	Agent     []nucleus.Layer // read-only, below nucleus.MachineAgent
	Resources nucleus.Resources
	Watched   []string // resources whose limit may be watched where it cannot be enforced
}

// Facts is what the proxy must know of the machine that it is in.
type Facts struct {
	ToolsUID int `json:"tools_uid"`
	ToolsGID int `json:"tools_gid"`
	AgentUID int `json:"agent_uid"`
	AgentGID int `json:"agent_gid"`

	// OneID says that the workspace knows one user only, the machine's root. The
	// tools' user is then uid 0 and the proxy must take all capabilities from it.
	OneID bool `json:"one_id,omitempty"`

	// Tasks is how many processes and threads a user of the machine may have; 0: any number.
	Tasks int `json:"tasks,omitempty"`

	// Env is what the image gives to the tools, PATH at least.
	Env map[string]string `json:"env,omitempty"`

	// Sync says that the workspace is a disk of the machine's own, which its kernel writes
	// later. The proxy must then write it out (syncfs) after each call that may have
	// changed it, before it signs what came of the call.
	Sync bool `json:"sync,omitempty"`

	// Digests are of what the machine was made of, "sha256:...", as far as it was made of
	// images: "kernel", "initramfs", "root", "layers".
	Digests map[string]string `json:"digests,omitempty"`
}

// Driver makes machines of one kind. All methods may be called at once.
type Driver interface {
	// Name is what a person writes to ask for this driver.
	Name() string

	// Tier is how strong the wall is where Probe succeeds.
	Tier() nucleus.Tier

	// Probe proves that a machine works on this host by running guest code in
	// one under a deadline. It leaves nothing behind. The error is a *ProbeError
	// wherever the cause is known. It may take seconds; the caller keeps the result.
	Probe(ctx context.Context) error

	// Create makes and starts a machine. Before each thing it makes it writes
	// down in spec.Dir what that will be. When it fails, nothing is left; ctx
	// ends the start, never a running machine. A Spec that asks for what the
	// driver cannot keep is refused with ErrRefused.
	Create(ctx context.Context, spec Spec) (Machine, error)

	// Adopt takes over the machine of dir that another process created, and begins
	// to hand in a new wire: the caller proves itself to the proxy over it.
	// ErrGone says that no machine runs there: Remove it.
	Adopt(ctx context.Context, dir string) (Machine, error)

	// Remove ends what runs for dir and deletes what was made for it, dir itself
	// included once it is empty. The workspace stays. It may be called again, and
	// for a directory in which Create died at any moment or never came. It must
	// not be called while a Machine of dir is held; use Destroy. A machine that another driver
	// made is left as it is, with ErrForeign.
	Remove(ctx context.Context, dir string) error
}

// Copier is implemented by a driver whose machines hold copies of what a Spec names on the
// host, made when they start. Digests says of what a machine of spec would be made now, as
// Facts.Digests does of one that was made.
type Copier interface {
	Digests(ctx context.Context, spec Spec) (map[string]string, error)
}

// Imaged is implemented by a driver whose machines have another image than the host's
// programs where nobody names one.
type Imaged interface {
	UsualImage() nucleus.Image
}

// Machine is one running machine. All methods may be called at once. The holder
// calls Destroy or Release in the end.
type Machine interface {
	// Wire returns the host's end of the wire, once; then nil. The caller closes it.
	Wire() net.Conn

	// Rewire begins to hand a new wire to the running proxy and returns the
	// host's end at once, because the proxy waits for the node's proof on it. Where
	// the proxy refuses, reading fails with the reason.
	Rewire(ctx context.Context) (net.Conn, error)

	Facts() Facts

	// Limits says for each of Resources, in their order, what holds and how. Memory and pids are
	// limited by a driver whose tier is not none where the Spec says nothing, too: what
	// runs away in a machine must not take the host with it. Such a limit may be watched.
	Limits() []nucleus.Limit

	// Paused delivers a reason each time the machine was stopped for exceeding a
	// watched limit. It stays stopped until Resume or Destroy.
	Paused() <-chan string
	Resume(ctx context.Context) error

	// Done is closed when the machine has died, by itself or not. Reason then
	// says why, as far as the host can know.
	Done() <-chan struct{}
	Reason() string

	// Console returns the last lines that the proxy printed: bounded, and written
	// by the guest, so never to be believed or sent to a terminal as they are.
	Console() string

	// Destroy kills the machine and removes all of it as Driver.Remove does. It
	// may be called again.
	Destroy(ctx context.Context) error

	// Release gives the machine up and leaves it running, for another process to
	// adopt. No other method but Done may follow.
	Release()
}

// ErrRefused is wrapped by Create where the Spec asks for what must not or
// cannot be kept.
var ErrRefused = errors.New("refused")

// ErrGone is wrapped by Adopt where no machine runs.
var ErrGone = errors.New("no machine runs")

// ErrForeign is wrapped by Adopt and Remove where another driver made the machine.
var ErrForeign = errors.New("a machine of another driver")

// RemoveAny removes the machine of dir, whichever of the drivers made it. Where it was none of
// them nothing is touched, and the error wraps ErrForeign.
func RemoveAny(ctx context.Context, dir string, drivers ...Driver) error {
	var foreign error
	removed := false
	for _, d := range drivers {
		switch err := d.Remove(ctx, dir); {
		case errors.Is(err, ErrForeign):
			foreign = err
		case err != nil:
			return err
		default:
			removed = true
		}
	}
	if !removed {
		return foreign
	}
	return nil
}

// Refuse returns an error that wraps ErrRefused.
func Refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrRefused}, args...)...)
}

// ProbeError says why a driver does not work here and what a person can do.
type ProbeError struct {
	Cause string // what is so, with values
	Mend  string // what to do, one line
	Err   error  // what the driver saw; may be nil
}

func (e *ProbeError) Error() string {
	if e.Err == nil {
		return e.Cause
	}
	return e.Cause + ": " + e.Err.Error()
}

func (e *ProbeError) Unwrap() error { return e.Err }
