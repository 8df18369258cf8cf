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
	"cal/nucleus"
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
	var refused *nucleus.Error
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		return exitInterrupted
	}
	fmt.Fprintln(os.Stderr, "nucleus-authority:", err)
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, authority.ErrNotGranted):
		return exitNotGranted
	case errors.Is(err, authority.ErrNoKey):
		fmt.Fprintln(os.Stderr, "hint: cal approve init makes one")
	case errors.As(err, &refused) && refused.Kind == nucleus.KindUnavailable:
		fmt.Fprintln(os.Stderr, "hint: cal node start starts it, once cal approve init has made its key")
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
	root.AddCommand(c.init(), c.serve(), c.approve(), c.deny(), c.list(), c.show(), c.grants(), c.revoke(), c.approver(), c.witness())
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
	prompt, err := authority.OpenPrompt()
	if err != nil {
		return err
	}
	defer prompt.Close()
	restore, err := prompt.Guard()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		restore()
		os.Exit(exitInterrupted)
	})
	defer stop()
	return f(prompt)
}

func (c *command) init() *cobra.Command {
	var approver string
	cmd := &cobra.Command{Use: "init", Short: "Make the approval key, sealed with a passphrase", Args: args(cobra.NoArgs)}
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
	cmd := &cobra.Command{Use: "serve", Short: "Take asks and keep decisions until stopped", Args: args(cobra.NoArgs)}
	cmd.Flags().IntSliceVar(&askUIDs, "ask-uid", nil, "another user that may ask (and never decide)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		ctx := cmd.Context()
		cfg := authority.Config{Dir: c.dir, AskUIDs: askUIDs, VerifyRequest: requested}
		if _, noKey := authority.ReadApprovers(c.dir); errors.Is(noKey, authority.ErrNoKey) {
			err := atTerminal(ctx, func(p *authority.Prompt) error { return c.makeKey(p, "") })
			if err != nil {
				return fmt.Errorf("%w; %w", noKey, err)
			}
		}
		log, err := openLog(c.dir)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, log.Close()) }()
		cfg.Recorder = log
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
	var reason, approver string
	var task taskFlags
	cmd := &cobra.Command{Use: "approve [ID]", Short: "Show an ask, or each that is pending, and grant it once", Args: args(cobra.MaximumNArgs(1))}
	cmd.Flags().StringVar(&approver, "approver", "", "who grants (default: the only one there is)")
	cmd.Flags().StringVar(&reason, "reason", "", "why; the agent is told")
	task.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		ctx := cmd.Context()
		choice, err := task.choice()
		if err != nil {
			return err
		}
		if choice != nil && len(ids) == 0 {
			return usageError{errors.New("--uses is for one ask: name it")}
		}
		if err := authority.CheckSocketDir(c.socket); err != nil {
			return err
		}
		identity, err := authority.ReadIdentity(c.dir, approver)
		if err != nil {
			return err
		}
		api := client.New(c.socket)
		defer api.Close()
		if len(ids) == 0 {
			pending, err := api.List(ctx, client.Pending)
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
		}
		return atTerminal(ctx, func(p *authority.Prompt) error {
			var refused error
			for _, id := range ids {
				if _, err := p.ApproveTask(ctx, api, identity, id, reason, choice); errors.Is(err, authority.ErrNotGranted) {
					refused = errors.Join(refused, err)
				} else if err != nil {
					return err
				}
			}
			return refused
		})
	}
	return cmd
}

func (c *command) deny() *cobra.Command {
	var reason, approver string
	cmd := &cobra.Command{Use: "deny ID", Short: "Refuse an ask", Args: args(cobra.ExactArgs(1))}
	cmd.Flags().StringVar(&approver, "approver", "", "who refuses (default: the only one there is)")
	cmd.Flags().StringVar(&reason, "reason", "", "why; the agent is told")
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		api := client.New(c.socket)
		defer api.Close()
		ask, digest, err := api.Get(cmd.Context(), ids[0])
		if err != nil {
			return err
		}
		if _, err := api.Decide(cmd.Context(), ids[0], client.Decision{Approver: approver, AskDigest: digest, Reason: reason}); err != nil {
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
	cmd := &cobra.Command{Use: "list", Short: "List asks, oldest first", Args: args(cobra.NoArgs)}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().StringVar(&state, "state", client.Pending, "pending, granted, denied, expired, withdrawn, revoked, or empty for all")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		api := client.New(c.socket)
		defer api.Close()
		items, err := api.List(cmd.Context(), state)
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(items)
		}
		for _, i := range items {
			until := time.UnixMilli(i.Expires).Format("15:04:05")
			of := ""
			if i.Need > 1 {
				of = fmt.Sprintf("%d of %d approvals  ", len(i.Granted), i.Need)
			}
			fmt.Printf("%s  %s  pod %s  until %s  %s%s\n", approval.Visible(i.ID), approval.Visible(i.State), approval.Visible(i.Pod), until, of, i.Summary)
		}
		return nil
	}
	return cmd
}

func (c *command) show() *cobra.Command {
	var view approval.View
	cmd := &cobra.Command{Use: "show ID", Short: "Show an ask as approve does, and grant nothing", Args: args(cobra.ExactArgs(1))}
	cmd.Flags().BoolVar(&view.Whole, "whole", false, "cut nothing")
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
