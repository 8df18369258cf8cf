package tools

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cal/nucleus"
	"cal/wire"
)

// Timeouts and sizes that hold where Config says nothing.
const (
	DefaultTimeout   = 120 * time.Second
	MaxTimeout       = 24 * time.Hour
	DefaultOutputCap = 256 << 10

	argsTimeout   = time.Minute     // from a stream's header to its whole arguments
	dataTimeout   = 5 * time.Minute // between two pieces of a bundle
	resultTimeout = 5 * time.Minute // for a caller to take a result
	maxFrame      = 1 << 20         // bytes of one frame after the arguments
	maxCalls      = 256             // at once; more wait on the wire
)

// Config is all that the worker knows of its machine.
type Config struct {
	Workspace      string            // absolute path of the directory that file tools are kept to
	Home           string            // HOME of commands
	Env            map[string]string // environment of commands: this and nothing inherited
	Blocked        func(path string) bool
	OutputCap      int           // bytes kept of each stream of a command; 0: DefaultOutputCap
	DefaultTimeout time.Duration // of a command that names none; 0: DefaultTimeout
	MaxTimeout     time.Duration // 0: MaxTimeout
	Confine        func() error  // confines the thread that it is called on, and so what that starts: commands are; nil: no more than this program
	Sync           func() error  // after each call that may have changed the workspace, before its end is told; nil: not needed
	MaxTasks       int           // that the user may have (RLIMIT_NPROC): a command with three quarters of it is ended; 0: not limited here
}

func (c Config) withDefaults() Config {
	if c.OutputCap <= 0 {
		c.OutputCap = DefaultOutputCap
	}
	if c.DefaultTimeout <= 0 {
		c.DefaultTimeout = DefaultTimeout
	}
	if c.MaxTimeout <= 0 || c.MaxTimeout > MaxTimeout {
		c.MaxTimeout = MaxTimeout
	}
	c.DefaultTimeout = min(c.DefaultTimeout, c.MaxTimeout)
	return c
}

// worker serves the calls of one session.
type worker struct {
	config Config
	box    *Sandbox
	exec   *Executor
	// changing is held from a file's resolution to its replacement, so that of two
	// edits at once the second sees the first. Commands are not held back by it.
	changing sync.Mutex
}

// Serve answers calls until the session or ctx ends; it closes the session. When
// it returns, every process that it started is dead and reaped. It returns nil when
// the other end closed the session, and an error when it could not begin.
func Serve(ctx context.Context, session *wire.Session, c Config) error {
	defer session.Close()
	c = c.withDefaults()
	box, err := OpenSandbox(c.Workspace, c.Blocked)
	if err != nil {
		return err
	}
	defer box.Close()
	executor, err := newExecutor(box, c)
	if err != nil {
		return err
	}
	w := &worker{config: c, box: box, exec: executor}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { session.Close() })
	session.Handle(w.brief)
	var calls sync.WaitGroup
	slots := make(chan struct{}, maxCalls)
	for {
		stream, err := session.Accept()
		if err != nil {
			break
		}
		select {
		case slots <- struct{}{}:
		case <-session.Done():
			stream.Close()
			continue // Accept says it again
		}
		calls.Go(func() {
			defer func() { <-slots }()
			w.serve(ctx, stream)
		})
	}
	stop()
	cancel()
	w.exec.close()
	calls.Wait()
	return nil
}

// caller is the other end of one call.
type caller struct {
	stream    *wire.Stream
	call      Call
	cancel    context.CancelFunc
	listening sync.WaitGroup
}

func (w *worker) serve(ctx context.Context, stream *wire.Stream) {
	ctx, cancel := context.WithCancel(ctx)
	c := &caller{stream: stream, cancel: cancel}
	defer func() {
		stream.SetReadDeadline(time.Now())
		cancel()
		stream.Close()
		c.listening.Wait()
	}()
	switch stream.Kind {
	case StreamResolve:
		action, err := w.resolve(c)
		if err != nil {
			c.finish(Resolved{Error: w.failure(c.call.Op, err)})
			return
		}
		c.finish(Resolved{Action: &action, Standing: w.standing(c.call, action)})
	case StreamDo:
		value, exit, err := w.do(ctx, c)
		w.conclude(c, value, exit, err)
	case StreamJobs:
		w.watchJobs(ctx, c)
	case StreamBundle:
		var header Bundle
		var value any
		err := strictHeader(stream.Header, &header)
		if err == nil {
			c.listen(nil, nil)
			value, err = w.bundle(ctx, stream, header)
		}
		if err == nil {
			err = stream.Send(wire.FrameData, nil)
		}
		w.conclude(c, value, 0, err)
	case StreamUnbundle:
		var header Unbundle
		var value any
		err := strictHeader(stream.Header, &header)
		if err == nil {
			value, err = w.unbundle(ctx, &frameReader{stream: stream}, header)
		}
		w.conclude(c, value, 0, w.settle(err))
	case StreamIncoming:
		var header Incoming
		var value any
		err := strictHeader(stream.Header, &header)
		if err == nil {
			value, err = w.incoming(ctx, &frameReader{stream: stream}, header)
		}
		w.conclude(c, value, 0, w.settle(err))
	default:
		c.finish(Result{Error: nucleus.Errorf(nucleus.KindInvalid, "unknown kind of stream %q", stream.Kind)})
	}
}

func strictHeader(raw json.RawMessage, v any) error {
	if err := nucleus.Strict(raw, v); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "header: %v", err)
	}
	return nil
}

// conclude sends the result of a call.
func (w *worker) conclude(c *caller, value any, exit int, err error) {
	if err != nil {
		c.finish(Result{Error: w.failure(c.call.Op, err)})
		return
	}
	raw, err := json.Marshal(value)
	if err != nil {
		c.finish(Result{Error: w.failure(c.call.Op, err)})
		return
	}
	c.finish(Result{Value: raw, ExitCode: exit})
}

func (w *worker) failure(op nucleus.Op, err error) *nucleus.Error {
	e := *nucleus.AsError(err)
	if errors.Is(err, context.Canceled) {
		e.Kind, e.Message = nucleus.KindFailed, "the caller went away"
	}
	e.Operation = op
	return &e
}

func (c *caller) finish(result any) {
	c.stream.SetWriteDeadline(time.Now().Add(resultTimeout))
	c.stream.SendJSON(wire.FrameResult, result)
}

// receive reads header and arguments.
func (c *caller) receive() (Args, error) {
	var args Args
	if err := strictHeader(c.stream.Header, &c.call); err != nil {
		return args, err
	}
	c.stream.SetReadDeadline(time.Now().Add(argsTimeout))
	// An action holds what the arguments hold once more, and JSON may escape every byte.
	if err := c.stream.RecvJSON(wire.FrameJSON, 2*MaxArgs, &args); err != nil {
		return args, nucleus.Errorf(nucleus.KindInvalid, "arguments: %v", err)
	}
	c.stream.SetReadDeadline(time.Time{})
	return args, nil
}

// listen reads what the caller sends while the call runs; its going away, or
// what makes no sense, ends the call. r and in are nil for a call that takes nothing.
func (c *caller) listen(r *running, in *inlet) {
	c.listening.Go(func() {
		defer c.cancel()
		for {
			kind, payload, err := c.stream.Recv(maxFrame)
			if err == nil && r == nil {
				err = fmt.Errorf("frame %q for a call that takes none", kind)
			} else if err == nil {
				err = r.frame(kind, payload, in)
			}
			if err != nil {
				return
			}
		}
	})
}

// resolve answers what a call would do. Nothing is changed.
func (w *worker) resolve(c *caller) (nucleus.Action, error) {
	args, err := c.receive()
	if err != nil {
		return nucleus.Action{}, err
	}
	p, err := w.plan(c.call, args.Args)
	return p.action, err
}

// maxStanding is the longest file that is shown to a person beside what would be in its place.
const maxStanding = 1 << 20

// standing is what the file holds that a call would change; nil where that is not wanted, or
// not what was resolved.
func (w *worker) standing(call Call, action nucleus.Action) []byte {
	if !call.Standing || len(action.Files) != 1 || action.Files[0].Before == "" || call.Op != nucleus.WriteFiles && call.Op != nucleus.EditFiles {
		return nil
	}
	content, err := w.readUpTo(action.Files[0].Path, maxStanding)
	if err != nil || nucleus.SHA256([]byte(content)) != action.Files[0].Before {
		return nil
	}
	return []byte(content)
}

// do carries a call out if it still resolves to what was permitted.
func (w *worker) do(ctx context.Context, c *caller) (any, int, error) {
	args, err := c.receive()
	if err != nil {
		return nil, 0, err
	}
	if args.Action == nil {
		return nil, 0, invalid(c.call.Op, "no action: what was permitted has to be handed in")
	}
	permitted, err := nucleus.Canonical(args.Action)
	if err != nil {
		return nil, 0, invalid(c.call.Op, "action: %v", err)
	}
	p, done, err := w.replan(c.call, permitted, args.Args)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	if c.call.Op != nucleus.RunBash {
		c.listen(nil, nil)
	}
	value, exit, err := p.run(ctx, c)
	if changes(c.call.Op) {
		err = w.settle(err)
	}
	return value, exit, err
}

// changes reports whether a call may have changed the workspace, whatever came of it.
func changes(op nucleus.Op) bool {
	switch op {
	case nucleus.WriteFiles, nucleus.EditFiles, nucleus.RunBash, nucleus.GitCommit:
		return true
	}
	return false
}

// settle has what a call changed written out, where the machine's kernel would do that later: what
// a finished call wrote outlives the machine. err is the call's own.
func (w *worker) settle(err error) error {
	if w.config.Sync == nil {
		return err
	}
	if failed := w.config.Sync(); failed != nil && err == nil {
		err = nucleus.Errorf(nucleus.KindFailed, "the workspace's disk did not take what was written: %v", failed)
	}
	return err
}

// replan resolves a call again and refuses it unless that is what was permitted, in
// canonical bytes. done is called when it has been carried out.
func (w *worker) replan(call Call, permitted []byte, raw json.RawMessage) (p plan, done func(), err error) {
	done = func() {}
	if call.Op == nucleus.WriteFiles || call.Op == nucleus.EditFiles {
		w.changing.Lock()
		done = w.changing.Unlock
	}
	if p, err = w.plan(call, raw); err == nil {
		err = sameAction(permitted, p.action)
	}
	if err != nil {
		done()
		return plan{}, nil, err
	}
	return p, done, nil
}

// plan resolves a call.
func (w *worker) plan(call Call, raw json.RawMessage) (plan, error) {
	decoded, err := Decode(call.Op, raw)
	if err != nil {
		return plan{}, err
	}
	action, err := newAction(call.Op, raw)
	if err != nil {
		return plan{}, err
	}
	switch args := decoded.(type) {
	case ReadArgs:
		return w.planRead(action, args)
	case WriteArgs:
		return w.planWrite(action, args)
	case EditArgs:
		return w.planEdit(action, args)
	case GlobArgs:
		return w.planGlob(action, args)
	case GrepArgs:
		return w.planGrep(action, args)
	case RunArgs:
		return w.planRun(call, action, args)
	case CommitArgs:
		return w.planCommit(call, action, args)
	}
	return plan{}, invalid(call.Op, "%s takes effect on the host", call.Op)
}

// sameAction compares what was permitted, as its canonical bytes in which absent and
// empty are one, with what would be done.
func sameAction(permitted []byte, now nucleus.Action) error {
	canonical, err := nucleus.Canonical(now)
	if err == nil && bytes.Equal(permitted, canonical) {
		return nil
	}
	var then nucleus.Action
	if err == nil {
		err = nucleus.Strict(permitted, &then)
	}
	if err != nil {
		return invalid(now.Op, "action: %v", err)
	}
	what := "the request"
	if len(then.Files) == 1 && len(now.Files) == 1 {
		switch p, n := then.Files[0], now.Files[0]; {
		case p.Path != n.Path:
			return nucleus.Errorf(nucleus.KindConflict, "%q leads to %q: name that path", p.Path, n.Path)
		case p != n:
			what = fmt.Sprintf("%q", n.Path)
		}
	}
	if then.Command != nil && now.Command != nil {
		what = "the command, or a file that it names,"
	}
	return nucleus.Errorf(nucleus.KindConflict, "%s has changed since it was decided; nothing was done", what)
}

// NotDumpable keeps other processes of the same user from reading this one's
// memory, descriptors and environment, and from tracing it.
func NotDumpable() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl(PR_SET_DUMPABLE): %w", err)
	}
	return nil
}

// Inherit begins the tools role of the proxy's binary: it returns the socket fd, on which
// the worker speaks as wire.Guest. The proxy holds the other end and speaks as wire.Host.
// Neither the memory of this process nor a descriptor above 2 passes to a command.
func Inherit(fd int) (*net.UnixConn, error) {
	if err := NotDumpable(); err != nil {
		return nil, err
	}
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		closeOnExec()
	}
	file := os.NewFile(uintptr(fd), "wire")
	if file == nil {
		return nil, fmt.Errorf("descriptor %d is not valid", fd)
	}
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("descriptor %d is no unix socket", fd), conn.Close())
	}
	return socket, nil
}

// closeOnExec marks every descriptor one by one, for kernels without
// close_range's flag.
func closeOnExec() {
	var limit unix.Rlimit
	highest := 4096
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		highest = int(min(limit.Cur, 1<<16))
	}
	for fd := 3; fd < highest; fd++ {
		unix.CloseOnExec(fd)
	}
}
