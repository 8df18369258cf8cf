// Command nucleus-authority keeps an approver's key and is where a person
// decides: it draws what is asked for from the bytes that are signed, and grants
// it once, for the passphrase typed at the terminal.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"cal/approval"
	"cal/approval/client"
	"cal/authority"
)

// The exit codes that differ from 1, failed.
const (
	exitUsage       = 2
	exitNotGranted  = 4
	exitInterrupted = 130
)

type usageError struct{ error }

// command holds what all subcommands share.
type command struct {
	dir    string
	socket string
}

func main() { os.Exit(run()) }

func run() int {
	if err := authority.Harden(); err != nil {
		fmt.Fprintln(os.Stderr, "nucleus-authority: this process cannot be kept from being read:", err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := root().ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil, errors.Is(err, authority.ErrInterrupted):
		return exitInterrupted
	}
	fmt.Fprintln(os.Stderr, "nucleus-authority:", err)
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, authority.ErrNotGranted):
		return exitNotGranted
	case errors.Is(err, authority.ErrNoKey):
		fmt.Fprintln(os.Stderr, "hint: cal approve init makes one; where the authority is another user's, that user has them (doc/approvals.md)")
	case client.Absent(err):
		fmt.Fprintln(os.Stderr, "hint: cal node start starts it, once cal approve init has made its key, and says why one that was started has ended")
	}
	return 1
}

func root() *cobra.Command {
	var c command
	root := &cobra.Command{
		Use: "nucleus-authority", Short: "Approve what agents ask for, over exactly what is shown, once",
		SilenceErrors: true, SilenceUsage: true,
	}
	home := os.Getenv("CAL_HOME")
	if home == "" {
		if h, err := os.UserHomeDir(); err == nil {
			home = filepath.Join(h, ".cal")
		}
	}
	root.PersistentFlags().StringVar(&c.dir, "dir", filepath.Join(home, "authority"), "directory of key and database")
	root.PersistentFlags().StringVar(&c.socket, "socket", filepath.Join(home, "run", "authority.sock"), "unix socket of the daemon")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(c.init(), c.serve(), c.approve(), c.grant(), c.deny(), c.list(), c.show(), c.grants(), c.revoke(), c.approver(), c.page(), c.desktop(), c.witness())
	return root
}

// args makes a wrong number of arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usageError{err}
		}
		return nil
	}
}

// atTerminal runs f with the person's terminal. A signal puts it back as it was
// and ends the process: a read of a terminal cannot be called off.
func atTerminal(ctx context.Context, f func(*authority.Prompt) error) error {
	prompt, err := authority.OpenPrompt(!wholeScreen())
	if err != nil {
		return err
	}
	defer prompt.Close()
	restore := prompt.Guard()
	stop := context.AfterFunc(ctx, func() {
		restore()
		os.Exit(exitInterrupted)
	})
	defer stop()
	return f(prompt)
}

func (c *command) init() *cobra.Command {
	var approver string
	cmd := &cobra.Command{Use: "init", Short: "Make the approval key, sealed with a passphrase", Example: "  nucleus-authority init --approver ann", Args: args(cobra.NoArgs)}
	cmd.Flags().StringVar(&approver, "approver", "", "name of the approver (default: the user's)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return atTerminal(cmd.Context(), func(p *authority.Prompt) error { return c.makeKey(p, approver) })
	}
	return cmd
}

func (c *command) makeKey(p *authority.Prompt, approver string) error {
	if approver == "" {
		u, err := user.Current()
		if err != nil {
			return fmt.Errorf("name the approver with --approver: %w", err)
		}
		approver = u.Username
	}
	_, err := p.Init(authority.Config{Dir: c.dir}, approver)
	return err
}

func (c *command) serve() *cobra.Command {
	var askUIDs []int
	var tell teller
	cmd := &cobra.Command{Use: "serve", Short: "Take asks and keep decisions until stopped", Example: "  nucleus-authority serve\n  nucleus-authority serve --ask-uid 1000   # as another user than the node's", Args: args(cobra.NoArgs)}
	cmd.Flags().IntSliceVar(&askUIDs, "ask-uid", nil, "another user that may ask (and never decide)")
	tell.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		ctx := cmd.Context()
		cfg := authority.Config{Dir: c.dir, AskUIDs: askUIDs, VerifyRequest: requested}
		if _, noKey := authority.ReadApprovers(c.dir); errors.Is(noKey, authority.ErrNoKey) {
			err := atTerminal(ctx, func(p *authority.Prompt) error { return c.makeKey(p, "") })
			if err != nil {
				return fmt.Errorf("%w; %w", noKey, err)
			}
		}
		announce, stop, err := tell.start(ctx)
		if err != nil {
			return err
		}
		defer stop()
		cfg.Announce = announce
		log, err := openLog(c.dir)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, log.Close()) }()
		cfg.Recorder, cfg.LogDir, cfg.LogKey = log, log.dir, log.key
		a, err := authority.Open(cfg)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.Close()) }()
		return a.Serve(ctx, c.socket, func() {
			var names []string
			for _, approver := range a.Approvers() {
				names = append(names, approver.Name)
			}
			fmt.Printf("approver %s at %s\n", strings.Join(names, ", "), c.socket)
		})
	}
	return cmd
}

func (c *command) approve() *cobra.Command {
	cmd := &cobra.Command{
		Use: "approve [ID]", Short: "Show all that waits on a whole screen, or the ask with an ID, and decide",
		Example: "  nucleus-authority approve\n  nucleus-authority approve --approver bob --reason 'as we said'", Args: args(cobra.MaximumNArgs(1)),
	}
	c.granting(cmd, func(ctx context.Context, g granter, ids []string) error {
		switch {
		case wholeScreen() && g.task == nil:
			return g.queue(ctx, ids)
		case len(ids) > 0:
			return g.grant(ctx, ids)
		}
		pending, err := g.api.List(ctx, client.Pending)
		if err != nil {
			return err
		}
		for _, ask := range pending {
			ids = append(ids, ask.ID)
		}
		if len(ids) == 0 {
			fmt.Println("no ask is pending")
			return nil
		}
		return g.grant(ctx, ids)
	})
	return cmd
}

func (c *command) grant() *cobra.Command {
	cmd := &cobra.Command{
		Use: "grant ID...", Short: "Show asks one after the other, line by line, and grant each once",
		Example: "  nucleus-authority grant a-QFZ2EXAMPLE\n  nucleus-authority grant a-QFZ2EXAMPLE --uses 5 --for 30m --match 'refs/heads/agent/**'", Args: args(cobra.MinimumNArgs(1)),
	}
	c.granting(cmd, func(ctx context.Context, g granter, ids []string) error { return g.grant(ctx, ids) })
	return cmd
}

// granter is who grants, and where.
type granter struct {
	api    *client.Client
	key    authority.Key
	reason string
	task   *authority.TaskChoice // nil: one use
}

// granting gives a command the flags of who grants, and runs it.
func (c *command) granting(cmd *cobra.Command, run func(context.Context, granter, []string) error) {
	var reason, approver string
	var task taskFlags
	cmd.Flags().StringVar(&approver, "approver", "", "who grants (default: the only one there is)")
	cmd.Flags().StringVar(&reason, "reason", "", "why; the agent is told")
	task.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		choice, err := task.choice()
		if err != nil {
			return err
		}
		if choice != nil && len(ids) != 1 {
			return usageError{errors.New("--uses is for one ask: name it")}
		}
		if err := authority.CheckSocketDir(c.socket); err != nil {
			return err
		}
		key, err := authority.ReadKey(c.dir, approver)
		if err != nil {
			return err
		}
		api := client.New(c.socket)
		defer api.Close()
		return run(cmd.Context(), granter{api, key, reason, choice}, ids)
	}
}

// queue shows all that waits, or the one ask that is named, on a whole screen.
func (g granter) queue(ctx context.Context, ids []string) error {
	only := ""
	if len(ids) > 0 {
		only = ids[0]
		if err := g.api.Waits(ctx, only); err != nil {
			return err
		}
	}
	return atTerminal(ctx, func(p *authority.Prompt) error {
		return p.Queue(ctx, g.api, g.key, g.reason, only, os.Getenv("NO_COLOR") != "")
	})
}

func (g granter) grant(ctx context.Context, ids []string) error {
	return atTerminal(ctx, func(p *authority.Prompt) error {
		var refused error
		for _, id := range ids {
			if _, err := p.Approve(ctx, g.api, g.key, id, g.reason, g.task); errors.Is(err, authority.ErrNotGranted) {
				refused = errors.Join(refused, err)
			} else if err != nil {
				return err
			}
		}
		return refused
	})
}

// wholeScreen reports whether the terminal is one that a screen can be drawn on.
func wholeScreen() bool {
	kind := os.Getenv("TERM")
	return kind != "" && kind != "dumb"
}

func (c *command) deny() *cobra.Command {
	var reason, approver string
	cmd := &cobra.Command{
		Use: "deny ID", Short: "Refuse an ask", Example: "  nucleus-authority deny a-QFZ2EXAMPLE --reason 'not this one'", Args: args(cobra.ExactArgs(1)),
	}
	cmd.Flags().StringVar(&approver, "approver", "", "who refuses (default: the only one there is)")
	cmd.Flags().StringVar(&reason, "reason", "", "why; the agent is told")
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		api := client.New(c.socket)
		defer api.Close()
		ask, digest, err := api.Get(cmd.Context(), ids[0])
		if err != nil {
			return err
		}
		if _, err := api.Deny(cmd.Context(), ids[0], client.Denial{Approver: approver, AskDigest: digest, Reason: reason}); err != nil {
			return err
		}
		fmt.Println("denied:", approval.Summary(ask))
		return nil
	}
	return cmd
}

func (c *command) list() *cobra.Command {
	var asJSON bool
	var state string
	var most int
	cmd := &cobra.Command{Use: "list", Short: "List asks, oldest first", Example: "  nucleus-authority list --state denied\n  nucleus-authority list --json", Args: args(cobra.NoArgs)}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().StringVar(&state, "state", client.Pending, "pending, granted, denied, expired, withdrawn, revoked, or empty for all")
	cmd.Flags().IntVar(&most, "limit", client.MaxListed, fmt.Sprintf("how many at most, the newest; up to %d", client.MaxListed))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if most < 1 || most > client.MaxListed {
			return usageError{fmt.Errorf("--limit %d: want 1 to %d", most, client.MaxListed)}
		}
		api := client.New(c.socket)
		defer api.Close()
		items, err := api.Newest(cmd.Context(), state, most)
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(items)
		}
		now := time.Now()
		for _, i := range items {
			age, until := now.Sub(time.UnixMilli(i.Created)).Round(time.Second), time.UnixMilli(i.Expires).Format("15:04:05")
			of := ""
			if i.Need > 1 {
				of = fmt.Sprintf("%d of %d approvals  ", len(i.Granted), i.Need)
			}
			shed := ""
			if i.Shed {
				shed = "  (what it said in full was removed since)"
			}
			fmt.Printf("%s  %s  pod %s  asked %s ago  until %s  %s%s%s\n", approval.Visible(i.ID), approval.Visible(i.State), approval.Visible(i.Pod), age, until, of, approval.Plain(i.Summary), shed)
		}
		return nil
	}
	return cmd
}

func (c *command) show() *cobra.Command {
	var view approval.View
	var asJSON bool
	cmd := &cobra.Command{
		Use: "show ID", Short: "Show an ask as approve does, and grant nothing", Example: "  nucleus-authority show a-QFZ2EXAMPLE --whole | less", Args: args(cobra.ExactArgs(1)),
	}
	cmd.Flags().BoolVar(&view.Whole, "whole", false, "cut nothing")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON: the ask as it is signed, and what came of it")
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		api := client.New(c.socket)
		defer api.Close()
		ask, _, err := api.Get(cmd.Context(), ids[0])
		if err != nil {
			return err
		}
		status, err := api.Status(cmd.Context(), ids[0])
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(map[string]any{"ask": ask, "status": status})
		}
		screen, err := approval.Draw(ask, view)
		if err != nil {
			return err
		}
		fmt.Printf("%sstate: %s\n", screen.Text, approval.Visible(status.State))
		if status.Reason != "" {
			fmt.Println("reason:", approval.Visible(status.Reason))
		}
		return nil
	}
	return cmd
}
