// Command cal runs coding agents in isolated machines.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"cal/internal/confine"
	"cal/internal/kvm"
	"cal/nucleus"
	"cal/workspace/agents"
)

// Exit codes (doc/cli.md).
const (
	exitFailed      = 1
	exitUsage       = 2
	exitDenied      = 3
	exitApproval    = 4
	exitNoCommand   = 127 // as a shell has it
	exitInterrupted = 130
)

// interrupts are the signals by which a person (Ctrl-C, Ctrl-\), or the terminal that closes, ends cal.
var interrupts = []os.Signal{os.Interrupt, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP}

func main() {
	kvm.Main()     // the child that tries whether KVM runs a guest
	confine.Main() // the child that becomes a VMM
	ctx, stop := signal.NotifyContext(context.Background(), interrupts...)
	defer stop()
	root := newRoot()
	err := root.ExecuteContext(ctx)
	os.Exit(report(ctx, err))
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "cal",
		Short:         "Run coding agents in isolated machines, every side effect decided and recorded",
		Example:       "  cal run --repo . --agent claude-code\n  cal run --repo . -- make test",
		SilenceErrors: true, SilenceUsage: true,
		Version: nucleus.Version,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(runCommand(), attachCommand(), statusCommand(), vmCommand(), repoCommand(), approveCommand(), auditCommand(), nodeCommand(), imageCommand(), policyCommand(), agentCommand(), doctorCommand(), versionCommand())
	for _, cmd := range root.Commands() {
		refuseUnknown(cmd)
	}
	return root
}

// refuseUnknown makes a group of commands print its help when it is called alone, and
// fail on a word that is none of its commands.
func refuseUnknown(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		refuseUnknown(sub)
	}
	if cmd.Runnable() {
		return
	}
	cmd.RunE = func(cmd *cobra.Command, given []string) error {
		if len(given) > 0 {
			return usageError{fmt.Errorf("%s has no command %q (%s --help)", cmd.CommandPath(), given[0], cmd.CommandPath())}
		}
		return cmd.Help()
	}
}

// usageError ends with exit code 2; exitCode is a command's own.
type usageError struct{ error }

type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// report prints the error, one line of fact and one hint, and returns the exit code.
func report(ctx context.Context, err error) int {
	var code exitCode
	var usage usageError
	var refused *nucleus.Error
	var missing *agents.Missing
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, context.Canceled) || ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "cal: interrupted")
		return exitInterrupted
	}
	fmt.Fprintln(os.Stderr, "cal:", harmless(err.Error()))
	switch {
	case errors.As(err, &usage) || strings.HasPrefix(err.Error(), "unknown command"):
		return exitUsage
	case errors.As(err, &missing):
		fmt.Fprintln(os.Stderr, "hint:", harmless(missing.Hint))
	case errors.As(err, &refused):
		return refusalCode(refused)
	}
	return exitFailed
}

// harmless keeps what an error repeats of a machine, a repository or a policy from steering
// the terminal, and from looking like lines of our own: control and format characters become
// their code points, and each line but the first is indented.
func harmless(text string) string {
	var b strings.Builder
	for _, r := range text {
		switch {
		case r == '\n':
			b.WriteString("\n  ")
		case unicode.IsPrint(r) || r == '\t':
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
	}
	return b.String()
}

func refusalCode(e *nucleus.Error) int {
	if e.Rule != "" && e.Kind == nucleus.KindDenied {
		fmt.Fprintln(os.Stderr, "rule:", harmless(e.Rule))
	}
	if spentOf(e) != nil {
		fmt.Fprintln(os.Stderr, "hint: raise it in the policy (--policy); a new run begins with a new budget")
	}
	if e.Ask != "" && e.Kind == nucleus.KindApproval { // it can still be answered
		fmt.Fprintf(os.Stderr, "hint: cal approve %s\n", harmless(e.Ask))
	}
	switch e.Kind {
	case nucleus.KindDenied, nucleus.KindForbidden:
		return exitDenied
	case nucleus.KindApproval, nucleus.KindRefused:
		return exitApproval
	case nucleus.KindInvalid:
		return exitUsage
	}
	return exitFailed
}

// args wraps cobra's checks so that a wrong count is a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usageError{fmt.Errorf("%s: %w (%s --help)", cmd.CommandPath(), err, cmd.CommandPath())}
		}
		return nil
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Example: "  cal version", Args: args(cobra.NoArgs),
		Run: func(*cobra.Command, []string) { fmt.Println("cal", nucleus.Version) },
	}
}
