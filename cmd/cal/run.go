package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	approvals "cal/approval/client"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
	"cal/workspace"
)

func runCommand() *cobra.Command {
	var o workspace.RunOptions
	var yes bool
	cmd := &cobra.Command{
		Use:   "run [--repo PATH] [--agent NAME [--prompt TEXT]] [-- COMMAND ARG...]",
		Short: "Run an agent, or a command, in an isolated machine",
		Example: `  cal run --repo . --agent claude-code --prompt "make the tests pass"
  cal run --repo . --agent codex            # the agent's own screen
  cal run --repo . -- make test             # any command; its exit code is returned
  cal run -- uname -a                       # a machine that ends with the command
  cal run --image debian:python3 -- python3 -V`,
		Args: func(cmd *cobra.Command, given []string) error {
			if len(given) > 0 && cmd.ArgsLenAtDash() != 0 {
				return usageError{fmt.Errorf("unexpected argument %q: a command follows \"--\"", given[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, given []string) error {
			o.Command = given
			if err := checkLimits(cmd.Flags(), nucleus.Resources{CPU: o.CPU, MemoryMB: o.MemoryMB, Pids: o.Pids, DiskMB: o.DiskMB}); err != nil {
				return err
			}
			return run(cmd.Context(), o, yes)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Repo, "repo", "", "repository to hand over, by git, from its HEAD")
	f.StringVar(&o.Agent, "agent", "", "agent to run (cal agent list)")
	f.StringVar(&o.Prompt, "prompt", "", "what the agent is to do; without it the agent's own screen")
	f.StringVar(&o.Workspace, "workspace", "", "name of the workspace (default: the repository's name)")
	f.StringVar(&o.Branch, "branch", "", "branch for the agent's commits (default: agent/AGENT)")
	f.StringVar(&o.Policy, "policy", "default", "profile, or file")
	f.StringVar(&o.Mode, "mode", "", "mediated or contained (default: mediated)")
	f.StringVar(&o.Driver, "driver", "", "driver to use (default: the strongest that works)")
	f.StringVar(&o.Require, "require", "", "fail unless the machine is of this tier: vm or kernel")
	f.StringVar(&o.Approvals, "require-approvals", "", "fail unless approvals come from another user of the host, or by passkey: other-user (other-user:USER for one user alone) or passkey")
	f.StringVar(&o.EnvFile, "env-file", "", "NAME=VALUE lines, handed to the tools in the machine")
	f.StringVar(&o.Image, "image", "", imageUsage)
	f.BoolVar(&o.Trust, "trust", false, "the repository holds nothing that a stranger wrote")
	f.BoolVar(&o.NoTTY, "no-tty", false, "no terminal, even where there is one")
	f.IntVar(&o.CPU, "cpu", 0, "limit in cores")
	f.IntVar(&o.MemoryMB, "memory", 0, "limit in MiB (none stated: half of the host's, watched)")
	f.IntVar(&o.Pids, "pids", 0, "limit in processes and threads (none stated: 2048)")
	f.IntVar(&o.DiskMB, "disk", 0, "size in MiB of a microVM's scratch disk, and of a new workspace")
	f.StringSliceVar(&o.AllowWatched, "allow-watched", nil, "resources whose limit may be watched where it cannot be enforced")
	f.BoolVarP(&yes, "yes", "y", false, "answer the launch confirmation (never an approval)")
	return cmd
}

// checkLimits holds the limits that are given to what a machine can have, before anything is
// made: 0 is then no default.
func checkLimits(flags *pflag.FlagSet, limits nucleus.Resources) error {
	for _, b := range limits.Bounds() {
		if name := strings.TrimSuffix(b.Name, "_mb"); flags.Changed(name) && !b.Holds() {
			return usageError{fmt.Errorf("--%s is %v", name, b)}
		}
	}
	return nil
}

func run(ctx context.Context, o workspace.RunOptions, yes bool) (err error) {
	switch {
	case o.Agent == "" && len(o.Command) == 0:
		return usageError{errors.New("name an agent (--agent), or a command behind \"--\"")}
	case o.Agent != "" && len(o.Command) > 0:
		return usageError{fmt.Errorf("--agent %s and the command %q: want one of the two", o.Agent, o.Command[0])}
	}
	if o.Prompt != "" && o.Agent == "" {
		return usageError{errors.New("--prompt needs --agent")}
	}
	home, err := workspace.OpenHome()
	if err != nil {
		return err
	}
	terminal := !o.NoTTY && term.IsTerminal(0) && term.IsTerminal(1)
	if o.Agent != "" && o.Prompt == "" && !terminal {
		return usageError{errors.New("without --prompt the agent needs a terminal")}
	}
	plan, err := home.Plan(ctx, o)
	if err != nil {
		return err
	}
	ask := !yes && !o.NoTTY && term.IsTerminal(0) && term.IsTerminal(2)
	node, err := openNode(ctx, home, ask)
	if err != nil {
		return err
	}
	told, err := confirm(ctx, home, node, plan, ask)
	if err != nil {
		return err
	}
	if err := prepareImage(ctx, home, node, plan.Spec); err != nil {
		return err
	}
	failed := func() {}
	if o.Agent != "" {
		defer keepTitle()()
		failed = starting(plan.Spec.Workspace)
	}
	pod, err := createPod(ctx, node, plan.Spec)
	if err != nil {
		failed()
		return err
	}
	if pod.Approvals == approvals.Nobody && home.HasAuthority() {
		fmt.Fprintln(os.Stderr, "cal: nobody can approve anything in this machine: the authority did not run, or did not answer, when it started (cal approve list says which)")
	}
	session := &session{home: home, node: node, pod: pod, dir: plan.Dir, terminal: terminal && (o.Agent == "" || o.Prompt == "")}
	if o.Agent != "" {
		banner(pod)
	}
	if !slices.Equal(pod.Unconfirmed, told) { // no plan was shown, or they changed since
		sayUnconfirmed(pod.Unconfirmed)
	}
	return session.whole(ctx, func() (int, error) { return session.run(ctx, o) })
}

// whole runs the session to its end, brings the work back, and ends the machine
// whatever happened.
func (s *session) whole(ctx context.Context, run func() (int, error)) (err error) {
	defer func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		endErr := s.end(ending)
		if endErr != nil && err != nil {
			fmt.Fprintln(os.Stderr, "cal:", endErr)
		} else if endErr != nil {
			err = endErr
		}
	}()
	code, err := run()
	spent := spentOf(err)
	if err != nil && spent == nil && !errors.Is(err, context.Canceled) {
		return err
	}
	if reportErr := s.bringBack(ctx); reportErr != nil {
		fmt.Fprintln(os.Stderr, "cal:", reportErr)
		if code == 0 {
			code = exitFailed
		}
	}
	s.sayBudget(ctx)
	switch {
	case spent != nil:
		return spent
	case ctx.Err() != nil:
		return ctx.Err()
	case code != 0:
		return exitCode(code)
	}
	return nil
}

// end ends the machine, by another node where this one is gone.
func (s *session) end(ctx context.Context) error {
	err := s.node.DeletePod(ctx, s.pod.ID)
	if err != nil && unanswered(err) {
		node, startErr := s.home.Node(ctx)
		if startErr == nil {
			s.node, err = node, node.DeletePod(ctx, s.pod.ID)
		}
	}
	if err == nil || nucleus.AsError(err).Kind == nucleus.KindNotFound {
		return nil
	}
	return fmt.Errorf("machine %s may still run: %w; hint: cal vm stop %s", s.pod.ID, err, s.pod.ID)
}

// spentOf is err where it says that the budget is spent: the work up to there is brought
// back all the same.
func spentOf(err error) *nucleus.Error {
	var refused *nucleus.Error
	if errors.As(err, &refused) && refused.Kind == nucleus.KindDenied && strings.HasPrefix(refused.Rule, "budget.") {
		return refused
	}
	return nil
}

// sayBudget says in one line what a session with a budget has used up.
func (s *session) sayBudget(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	pod, err := s.node.Pod(ctx, s.pod.ID)
	if err == nil && pod.Budget.Limited() {
		fmt.Fprintln(os.Stderr, "cal: budget:", workspace.Budget(pod.Budget))
	}
}

// bringBack reports after an interrupt too: what was done is not lost with the command. Only an
// interrupt that comes meanwhile ends it.
func (s *session) bringBack(ctx context.Context) error {
	if ctx.Err() != nil {
		var stop func()
		ctx, stop = signal.NotifyContext(context.WithoutCancel(ctx), interrupts...)
		defer stop()
	}
	err := s.report(ctx, s.pod.Agent != "")
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("interrupted before the work was brought back; the workspace keeps it: %w", ctx.Err())
	}
	return err
}

// attachCommand takes a running session up again, from another terminal or after
// cal itself was killed.
func attachCommand() *cobra.Command {
	return &cobra.Command{
		Use: "attach POD|WORKSPACE", Short: "Join the agent that runs in a machine", Example: "  cal attach my-app", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error { return attach(ctx, node, given[0]) })
		},
	}
}

func attach(ctx context.Context, node *client.Client, name string) error {
	pods, err := node.Pods(ctx)
	if err != nil {
		return err
	}
	home, err := workspace.OpenHome()
	if err != nil {
		return err
	}
	for _, pod := range pods {
		if pod.ID != name && pod.Workspace != name {
			continue
		}
		s := &session{home: home, node: node, pod: pod, terminal: term.IsTerminal(0) && term.IsTerminal(1)}
		defer keepTitle()()
		banner(pod)
		return s.whole(ctx, func() (int, error) { return s.agent(ctx, client.AgentRequest{Attach: true}) })
	}
	return fmt.Errorf("no machine %q runs (cal vm list)", name)
}

// session is one run on the person's terminal.
type session struct {
	home     workspace.Home
	node     *client.Client
	pod      nucleus.PodStatus
	dir      string // of a command
	terminal bool

	typing  sync.Once
	current atomic.Pointer[wire.Stream] // where input goes
}

func (s *session) run(ctx context.Context, o workspace.RunOptions) (int, error) {
	rows, cols := uint16(24), uint16(80)
	if s.terminal {
		if w, h, err := term.GetSize(1); err == nil {
			rows, cols = uint16(h), uint16(w)
		}
	}
	if o.Agent != "" {
		return s.agent(ctx, client.AgentRequest{TTY: s.terminal, Rows: rows, Cols: cols})
	}
	args := map[string]any{"argv": o.Command, "timeout_s": int((24 * time.Hour).Seconds())}
	if s.dir != "" {
		args["dir"] = s.dir
	}
	stream, err := s.node.Run(ctx, s.pod.ID, args, client.Terminal{TTY: s.terminal, Stdin: true, Rows: rows, Cols: cols})
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	code, err := s.relay(ctx, stream)
	if errors.Is(err, errNodeGone) {
		err = fmt.Errorf("%w; whether the command came to its end is not known; hint: cal audit log --pod %s", err, s.pod.ID)
	}
	return code, err
}

// agent starts or joins the agent and stays with it: when the node ends, another is
// started, takes the machine up again, and the session goes on. A node that ends while it
// is joined is one that ended.
func (s *session) agent(ctx context.Context, req client.AgentRequest) (int, error) {
	const mostInARow = 5
	for failed := 0; ; req.Attach = true {
		stream, err := s.node.Agent(ctx, s.pod.ID, req)
		if err == nil {
			var code int
			code, err = s.relay(ctx, stream)
			stream.Close()
			if !errors.Is(err, errNodeGone) {
				return code, err
			}
			failed = 0
			fmt.Fprint(os.Stderr, "\r\ncal: the node ended; starting another\r\n")
		} else if failed++; !req.Attach || failed > mostInARow || !unanswered(err) {
			return 0, err
		}
		node, startErr := s.home.Node(ctx)
		if startErr != nil {
			return 0, startErr
		}
		s.node = node
		if failed == 0 {
			continue
		}
		if pod, statusErr := node.Pod(ctx, s.pod.ID); statusErr == nil && !pod.Live() {
			return 0, err // what the node said of it
		}
	}
}

// unanswered reports whether the node may have ended before it answered.
func unanswered(err error) bool { return nucleus.AsError(err).Kind == nucleus.KindUnavailable }

// errNodeGone says that the connection to the node ended in the middle of a stream.
var errNodeGone = errors.New("the connection to the node ended")

// relay joins the person's terminal, or pipes, and the command in the machine.
func (s *session) relay(ctx context.Context, stream *wire.Stream) (int, error) {
	raw := func(bool) error { return nil }
	if s.terminal {
		old, err := term.MakeRaw(0)
		if err != nil {
			return 0, err
		}
		defer term.Restore(0, old)
		raw = func(on bool) error {
			if on {
				_, err := term.MakeRaw(0)
				return err
			}
			return term.Restore(0, old)
		}
		stopResize := s.watchSize(stream)
		defer stopResize()
		sendSize(stream) // for a session that is joined
	}
	s.current.Store(stream)
	s.typing.Do(func() { go s.sendInput() })
	screen := &splice{out: os.Stdout}
	if s.pod.Agent != "" {
		waiting, stop := context.WithCancel(ctx)
		defer stop()
		go s.sayWaiting(waiting, s.node, screen)
	}
	// The first Ctrl-C goes to the command, which may clean up; if it has not ended
	// soon the stream is closed and the machine kills it. One that waits for an approval has not
	// begun.
	var waiting atomic.Bool
	stop := context.AfterFunc(ctx, func() {
		if waiting.Load() {
			stream.Close()
			return
		}
		stream.Send(wire.FrameSignal, []byte("INT"))
		time.AfterFunc(3*time.Second, func() { stream.Close() })
	})
	defer stop()
	for {
		kind, payload, err := stream.Recv(4 << 20)
		if err != nil {
			if ctx.Err() != nil {
				return exitInterrupted, ctx.Err()
			}
			return 0, fmt.Errorf("%w: %v", errNodeGone, err)
		}
		switch kind {
		case wire.FrameStdout:
			if _, err := screen.Write(payload); err != nil {
				return 0, err
			}
		case wire.FrameStderr:
			if _, err := os.Stderr.Write(payload); err != nil {
				return 0, err
			}
		case wire.FrameJSON:
			var w client.Waiting
			if err := nucleus.Strict(payload, &w); err != nil {
				return 0, err
			}
			// Where keys are the command's, Ctrl-C is too; meanwhile it ends the waiting.
			if err := raw(w.Ask == ""); err != nil {
				return 0, err
			}
			if waiting.Store(w.Ask != ""); w.Ask != "" {
				fmt.Fprintln(os.Stderr, "cal: an approval is wanted: cal approve", workspace.Shown(w.Ask))
			}
		case wire.FrameResult:
			return result(payload)
		}
	}
}

// result reads the last frame, of a command or of an agent.
func result(payload []byte) (int, error) {
	var r struct {
		Value *struct {
			ExitCode int    `json:"exit_code"`
			TimedOut bool   `json:"timed_out"`
			Note     string `json:"note"`
		} `json:"value"`
		ExitCode int            `json:"exit_code"`
		Error    *nucleus.Error `json:"error"`
	}
	if err := json.Unmarshal(payload, &r); err != nil {
		return 0, err
	}
	if r.Error != nil && r.Error.Operation == nucleus.RunBash && r.Error.Kind == nucleus.KindNotFound {
		fmt.Fprintln(os.Stderr, "cal:", r.Error)
		return exitNoCommand, nil
	}
	if r.Error != nil {
		return 0, r.Error
	}
	if r.Value != nil {
		return r.Value.ExitCode, nil
	}
	return r.ExitCode, nil
}

func (s *session) watchSize(stream *wire.Stream) (stop func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range changed {
			sendSize(stream)
		}
	}()
	return func() {
		signal.Stop(changed)
		close(changed)
		<-done
	}
}

func sendSize(stream *wire.Stream) {
	if w, h, err := term.GetSize(1); err == nil {
		stream.SendJSON(wire.FrameSize, map[string]int{"rows": h, "cols": w})
	}
}

// sendInput reads the person's input once for all streams of the session. It ends with
// the process: a read from a terminal cannot be called off.
func (s *session) sendInput() {
	buf := make([]byte, 32<<10)
	for {
		n, err := os.Stdin.Read(buf)
		if n > 0 {
			s.current.Load().Send(wire.FrameStdin, buf[:n]) // a stream that ended is replaced, or the session ends
		}
		if err != nil {
			s.current.Load().Send(wire.FrameStdin, nil)
			return
		}
	}
}

// report brings the work back and says what there is, read from git.
func (s *session) report(ctx context.Context, agent bool) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for _, r := range s.pod.Repos {
		fetched, err := s.node.FetchRepo(ctx, s.pod.ID, r.Name)
		if err != nil {
			return fmt.Errorf("bringing back %s: %w", r.Name, err)
		}
		if !agent && fetched.Worktree == fetched.Base {
			continue
		}
		fmt.Fprintf(os.Stderr, "\ncal: %s: branch %s, %s on %.12s\n", r.Name, fetched.Branch, count(fetched.Commits, "commit"), fetched.Base)
		if strings.TrimSpace(fetched.Stat) == "" {
			fmt.Fprintln(os.Stderr, "cal: nothing was changed")
			continue
		}
		fmt.Fprint(os.Stderr, fetched.Stat)
		if fetched.Worktree != fetched.Head {
			fmt.Fprintln(os.Stderr, "cal: some of it is not committed")
		}
		fmt.Fprintln(os.Stderr, "cal: next: cal repo diff | cal repo fetch | cal repo apply")
	}
	return nil
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
