package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"cal/approval"
	"cal/approval/client"
	"cal/authority"
	"cal/nucleus"
)

func (c *command) grants() *cobra.Command {
	var asJSON, all bool
	var pod string
	var most int
	cmd := &cobra.Command{
		Use: "grants", Short: "List what was granted and can still be used, with its uses, newest first", Args: args(cobra.NoArgs),
		Example: "  nucleus-authority grants\n  nucleus-authority grants --all --limit 500 --json",
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&all, "all", false, "what is used, over or taken back too")
	cmd.Flags().IntVar(&most, "limit", 100, fmt.Sprintf("how many at most, the newest first; up to %d", client.MaxApprovals))
	cmd.Flags().StringVar(&pod, "pod", "", "of this pod only")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		api := client.New(c.socket)
		defer api.Close()
		if most < 1 || most > client.MaxApprovals {
			return usageError{fmt.Errorf("--limit %d: want 1 to %d", most, client.MaxApprovals)}
		}
		list, err := api.Approvals(cmd.Context(), client.ApprovalsOf{Pod: pod, All: all, Limit: most})
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(list)
		}
		if len(list) == 0 {
			fmt.Println("nothing that was granted can still be used")
		}
		for _, a := range list {
			printApproval(a)
		}
		if len(list) == most {
			fmt.Fprintf(os.Stderr, "these are the newest %d; --limit shows more\n", most)
		}
		return nil
	}
	return cmd
}

func printApproval(a client.Approval) {
	what := "once"
	switch {
	case a.Task != nil:
		what = fmt.Sprintf("task, %d of %d uses", len(a.Uses), a.Task.Uses)
	case a.Passage != nil:
		what = fmt.Sprintf("passage to %s port %d", a.Passage.Host, a.Passage.Port)
	}
	until := time.UnixMilli(a.Until).Format("15:04:05")
	fmt.Printf("%s  %s  pod %s  until %s  %s  %s\n", approval.Visible(a.Ask), approval.Visible(a.State), approval.Visible(a.Pod), until, approval.Visible(what), approval.Plain(a.Summary))
	for _, g := range a.Grants {
		fmt.Printf("  %s by %s\n", approval.Visible(g.Grant), approval.Visible(g.Approver))
	}
	if a.Shed {
		fmt.Println("  what was asked in full was removed since")
	}
	for _, u := range a.Uses {
		fmt.Printf("  use %d at %s: %s\n", u.N, time.UnixMilli(u.Used).Format("15:04:05"), approval.Visible(u.Outcome))
	}
}

func (c *command) revoke() *cobra.Command {
	var reason string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "revoke ID", Short: "Take back what was granted: for an ask, by a grant, or to a pod", Args: args(cobra.ExactArgs(1)),
		Long: fmt.Sprintf("Take back what was granted: for an ask, by a grant, or all of a pod. When this returns no use of it begins any more and its\n"+
			"passages are closed; a use that had begun before is listed, and goes on. A node that asks on and does not say that it knows is waited\n"+
			"for no longer than %v: then this fails and says so, and what was taken back is taken back.", client.Lease+time.Second),
		Example: "  nucleus-authority revoke a-2X... --reason 'enough'\n  nucleus-authority revoke p-pe3aetlioa",
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; the agent is told")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		api := client.New(c.socket)
		defer api.Close()
		now, err := api.Revoke(cmd.Context(), client.Revocation{ID: ids[0], Reason: reason})
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(now)
		}
		for _, a := range now.Revoked {
			printApproval(a)
		}
		if !now.Closed {
			return fmt.Errorf("taken back: no use of it begins any more. But a node that watches has not said in %d ms that it knows, so a passage that was open may be open still (cal vm stop POD ends its connections with the machine)", now.Millis)
		}
		fmt.Printf("taken back; nothing of it is open since %d ms\n", now.Millis)
		if now.Unrecorded {
			fmt.Fprintln(os.Stderr, unrecorded)
		}
		return nil
	}
	return cmd
}

const unrecorded = "the authority's log cannot be written: this holds, is recorded when it can be, and nothing else is decided before (make room on its disk)"

// taskFlags are those of approve by which a person chooses a task.
type taskFlags struct {
	uses  int
	life  time.Duration
	match []string
	cmd   *cobra.Command
}

func (f *taskFlags) add(cmd *cobra.Command) {
	f.cmd = cmd
	cmd.Flags().IntVar(&f.uses, "uses", 0, fmt.Sprintf("grant a task of so many uses, at most %d, in place of one use", nucleus.MaxTaskUses))
	cmd.Flags().DurationVar(&f.life, "for", 30*time.Minute, "how long the task stands, at most an hour")
	cmd.Flags().StringArrayVar(&f.match, "match", nil, "what the task is for, where not just what is asked: a ref or path (with /** for all below), a directory, or the command's arguments, one flag each (* for one, ** for the rest)")
}

// choice is the task that the flags choose; nil for one use.
func (f *taskFlags) choice() (*authority.TaskChoice, error) {
	if f.uses == 0 {
		if len(f.match) > 0 || f.cmd.Flags().Changed("for") {
			return nil, usageError{errors.New("--match and --for are of a task: say how often with --uses")}
		}
		return nil, nil
	}
	return &authority.TaskChoice{Uses: f.uses, Life: f.life, Match: f.match}, nil
}
