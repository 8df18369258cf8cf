package tools

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"cal/nucleus"
	"cal/wire"
)

// Caps on the workspace files that a command names and an approver is shown.
const (
	maxNamedFiles = 32
	maxNamedSize  = 8 << 20
	maxNamedArgs  = 512 // arguments looked at
)

// RunResult is what run_bash, bash_output and bash_stop return. ExitCode is 128
// plus the signal for a command that a signal ended. Output that is not UTF-8 stands in
// the _b64 fields. Streamed output is not repeated here.
type RunResult struct {
	ID        string `json:"id,omitempty"` // of a background command
	Running   bool   `json:"running,omitempty"`
	ExitCode  int    `json:"exit_code"`
	Stdout    string `json:"stdout"`
	Stderr    string `json:"stderr"`
	StdoutB64 string `json:"stdout_b64,omitempty"`
	StderrB64 string `json:"stderr_b64,omitempty"`
	StdoutCut int64  `json:"stdout_cut_bytes,omitempty"`
	StderrCut int64  `json:"stderr_cut_bytes,omitempty"`
	TimedOut  bool   `json:"timed_out,omitempty"`
	Notice    string `json:"notice,omitempty"`
}

func (r *RunResult) outputs(stdout, stderr kept) {
	r.Stdout, r.StdoutB64, r.StdoutCut = stdout.text, stdout.base64, stdout.cut
	r.Stderr, r.StderrB64, r.StderrCut = stderr.text, stderr.base64, stderr.cut
}

// ended fills in how the command ended.
func (r *RunResult) ended(c *child, timeout time.Duration) {
	r.ExitCode = c.exit()
	switch reason := c.killed(); reason {
	case "":
	case reasonTimeout:
		r.TimedOut = true
		r.Notice = fmt.Sprintf("ended after %v: give timeout_s, or run it in the background", timeout)
	default:
		r.Notice = "ended: " + reason
	}
}

func (w *worker) planRun(call Call, action nucleus.Action, args RunArgs) (plan, error) {
	switch {
	case args.Output != "":
		action.Job = args.job()
		return plan{action, func(context.Context, *caller) (any, int, error) {
			result, err := w.exec.jobs.output(args.Output)
			return result, 0, err
		}}, nil
	case args.Stop != "":
		action.Job = args.job()
		return plan{action, func(ctx context.Context, _ *caller) (any, int, error) {
			result, err := w.exec.jobs.stop(ctx, args.Stop)
			return result, 0, err
		}}, nil
	}
	if args.Background && (call.Terminal || call.Stream || call.Stdin) {
		return plan{}, invalid(action.Op, "a background command has no terminal and no streams")
	}
	if args.Stdin != "" && (call.Stdin || call.Terminal) {
		return plan{}, invalid(action.Op, `"stdin" is given while input is streamed`)
	}
	dir, err := w.box.Resolve(searchBase(args.Dir))
	if err != nil {
		return plan{}, err
	}
	d, err := w.box.OpenDir(dir)
	if err != nil {
		return plan{}, err
	}
	d.Close()
	resolved, err := w.resolveCommand(args, dir)
	if err != nil {
		return plan{}, err
	}
	resolved.TTY = call.Terminal
	action.Command = &resolved
	return plan{action, func(ctx context.Context, caller *caller) (any, int, error) {
		return w.run(ctx, caller, resolved, args)
	}}, nil
}

// resolveCommand turns arguments into the argv that is executed, the program
// that it names and the workspace files that it names.
func (w *worker) resolveCommand(args RunArgs, dir string) (nucleus.Command, error) {
	c := nucleus.Command{Argv: args.Argv, Dir: dir}
	var err error
	if args.Script != "" {
		c.Script = true
		c.Argv = []string{"bash", "-c", args.Script}
		if c.Binary, err = w.exec.lookup("bash", dir); err != nil {
			c.Argv[0] = "sh"
		}
	}
	if c.Binary == "" {
		if c.Binary, err = w.exec.lookup(c.Argv[0], dir); err != nil {
			return c, err
		}
	}
	if args.Stdin != "" {
		c.Stdin = nucleus.SHA256([]byte(args.Stdin))
	}
	if !c.Script {
		c.Files = w.namedFiles(c.Binary, c.Argv, dir)
	}
	return c, nil
}

// namedFiles are the workspace files that argv names, with their digests, which
// are absent for one that is too large or may not be read.
func (w *worker) namedFiles(binary string, argv []string, dir string) []nucleus.File {
	var files []nucleus.File
	seen := map[string]bool{}
	for _, arg := range append([]string{binary}, argv[1:min(len(argv), maxNamedArgs)]...) {
		if strings.HasPrefix(arg, "-") {
			_, arg, _ = strings.Cut(arg, "=")
		}
		if arg == "" || len(files) == maxNamedFiles {
			continue
		}
		if !path.IsAbs(arg) {
			arg = path.Join(w.box.path, dir, arg) // a ".." may lead to another directory of the workspace
		}
		rel, err := w.box.Resolve(arg)
		if err != nil || seen[rel] {
			continue
		}
		seen[rel] = true
		digest, err := w.box.Digest(rel, maxNamedSize)
		var e *nucleus.Error
		if missing := err == nil && digest == ""; missing || errors.As(err, &e) && e.Kind == nucleus.KindInvalid {
			continue // nothing there, or a directory
		}
		files = append(files, nucleus.File{Path: rel, Before: digest})
	}
	return files
}

func (w *worker) timeout(caller *caller, args RunArgs) time.Duration {
	switch {
	case args.TimeoutS > 0:
		return min(time.Duration(args.TimeoutS)*time.Second, w.config.MaxTimeout)
	case args.Background || caller.call.Stream || caller.call.Terminal:
		return w.config.MaxTimeout // somebody watches it
	}
	return w.config.DefaultTimeout
}

func (w *worker) run(ctx context.Context, caller *caller, resolved nucleus.Command, args RunArgs) (any, int, error) {
	timeout := w.timeout(caller, args)
	c := command{
		binary: resolved.Binary, argv: resolved.Argv, dir: resolved.Dir, env: resolved.Env, tty: resolved.TTY,
		size: pty.Winsize{Rows: caller.call.Rows, Cols: caller.call.Cols},
	}
	if args.Stdin != "" {
		c.stdin = strings.NewReader(args.Stdin)
	}
	if args.Background {
		id, err := w.exec.begin(c, timeout)
		return RunResult{ID: id, Running: true}, 0, err
	}
	var in *inlet
	if caller.call.Stdin || caller.call.Terminal {
		in = newInlet()
		c.stdin = in
	}
	stdout, stderr := newKeeper(w.config.OutputCap), newKeeper(w.config.OutputCap)
	c.stdout, c.stderr = stdout, stderr
	if caller.call.Stream || caller.call.Terminal {
		c.stdout, c.stderr = frameWriter{caller.stream, wire.FrameStdout}, frameWriter{caller.stream, wire.FrameStderr}
	}
	r, err := w.exec.start(c)
	if err != nil {
		return nil, 0, err
	}
	caller.listen(r, in)
	r.wait(ctx, timeout, nil)
	var result RunResult
	result.outputs(stdout.take(), stderr.take())
	result.ended(r.child, timeout)
	return result, result.ExitCode, nil
}

// frameWriter sends each piece as a frame; a caller that does not read holds the
// command back.
type frameWriter struct {
	stream *wire.Stream
	kind   wire.Frame
}

func (w frameWriter) Write(p []byte) (int, error) {
	return len(p), w.stream.Send(w.kind, p)
}

var signals = map[string]unix.Signal{
	"INT": unix.SIGINT, "TERM": unix.SIGTERM, "HUP": unix.SIGHUP, "QUIT": unix.SIGQUIT, "KILL": unix.SIGKILL,
}

// frame acts on one frame that came while a command runs.
func (r *running) frame(kind wire.Frame, payload []byte, in *inlet) error {
	switch kind {
	case wire.FrameStdin:
		if in == nil {
			return errors.New("input for a command that takes none")
		}
		if len(payload) == 0 {
			in.end()
			return nil
		}
		in.put(payload)
	case wire.FrameSize:
		var size struct{ Rows, Cols uint16 }
		if err := json.Unmarshal(payload, &size); err != nil {
			return err
		}
		r.resize(size.Rows, size.Cols)
	case wire.FrameSignal:
		sig, ok := signals[strings.TrimPrefix(string(payload), "SIG")]
		if !ok {
			return fmt.Errorf("unknown signal %q", payload)
		}
		r.signal(sig)
	default:
		return fmt.Errorf("frame %q while a command runs", kind)
	}
	return nil
}

var _ io.ReadCloser = (*inlet)(nil)
