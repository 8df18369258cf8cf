package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"cal/node/client"
	"cal/nucleus"
	"cal/workspace"
)

// printList prints a listing as a table, or as JSON.
func printList[T any](list []T, asJSON bool, header string, row func(T) string) error {
	if asJSON {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(list)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, header)
	for _, item := range list {
		fmt.Fprintln(w, row(item))
	}
	return w.Flush()
}

func withNode(cmd *cobra.Command, use func(context.Context, *client.Client) error) error {
	home, err := workspace.OpenHome()
	if err != nil {
		return err
	}
	node, err := home.RunningNode(cmd.Context())
	if err != nil {
		return err
	}
	return use(cmd.Context(), node)
}

func repoCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "repo", Short: "See and take what an agent did to a repository", Example: "  cal repo diff"}
	var path, name string
	with := func(cmd *cobra.Command, use func(context.Context, workspace.Work) error) error {
		home, err := workspace.OpenHome()
		if err != nil {
			return err
		}
		work, err := home.Work(cmd.Context(), path, name)
		if err != nil {
			return err
		}
		return use(cmd.Context(), work)
	}
	cmd.PersistentFlags().StringVar(&path, "repo", ".", "the repository on the host")
	cmd.PersistentFlags().StringVar(&name, "workspace", "", "the workspace, where several hold the repository")
	var stat bool
	diff := &cobra.Command{
		Use: "diff", Short: "Show what the agent changed, committed or not", Example: "  cal repo diff --stat", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd, func(ctx context.Context, w workspace.Work) error {
				return w.Diff(ctx, os.Stdout, term.IsTerminal(1) && os.Getenv("NO_COLOR") == "", stat)
			})
		},
	}
	diff.Flags().BoolVar(&stat, "stat", false, "files and counts only")
	fetch := &cobra.Command{
		Use: "fetch", Short: "Bring the agent's branch into the repository, as a branch", Example: "  cal repo fetch && git log agent/claude-code", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd, func(ctx context.Context, w workspace.Work) error {
				moved, err := w.Submodules(ctx)
				if err != nil {
					return err
				}
				ref, err := w.Fetch(ctx)
				if err == nil {
					fmt.Printf("%s is at %.12s\n", ref, w.Head)
					sayLeft(moved)
				}
				return err
			})
		},
	}
	apply := &cobra.Command{
		Use: "apply", Short: "Put what the agent changed onto the working tree, uncommitted", Example: "  cal repo apply && git diff", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd, func(ctx context.Context, w workspace.Work) error {
				left, err := w.Apply(ctx)
				if err != nil {
					return err
				}
				sayLeft(left)
				return w.Diff(ctx, os.Stdout, false, true)
			})
		},
	}
	var asJSON bool
	status := &cobra.Command{
		Use: "status", Short: "List the repositories of all workspaces", Example: "  cal repo status --json", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			works, err := home.Works()
			if err != nil {
				return err
			}
			return printList(works, asJSON, "WORKSPACE\tREPO\tBRANCH\tBASE\tHEAD\tPATH", func(w workspace.Work) string {
				return fmt.Sprintf("%s\t%s\t%s\t%.12s\t%.12s\t%s", w.Workspace, w.Repo, w.Branch, w.Base, w.Head, w.Path)
			})
		},
	}
	status.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.AddCommand(diff, fetch, apply, status)
	return cmd
}

// sayLeft names submodules that the agent moved to commits which only its machine has.
func sayLeft(submodules []string) {
	if len(submodules) > 0 {
		fmt.Fprintln(os.Stderr, "cal: commits in submodules stay in the machine:", workspace.Shown(strings.Join(submodules, ", ")))
	}
}

func vmCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "vm", Short: "Machines", Example: "  cal vm list"}
	var asJSON bool
	list := &cobra.Command{
		Use: "list", Short: "List the machines of the node", Example: "  cal vm list --json", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error {
				pods, err := node.Pods(ctx)
				if err != nil {
					return err
				}
				return printList(pods, asJSON, "POD\tPARENT\tWORKSPACE\tSTATE\tTIER\tMODE\tAGENT\tEXPOSURE\tCREATED", podRow)
			})
		},
	}
	list.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	stop := &cobra.Command{
		Use: "stop POD", Short: "Stop a machine; a named workspace stays", Example: "  cal vm stop p-abcdefghij", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error { return node.DeletePod(ctx, given[0]) })
		},
	}
	resume := &cobra.Command{
		Use: "resume POD", Short: "Let a machine go on that was paused for exceeding a watched limit", Example: "  cal vm resume p-abcdefghij", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error { return node.ResumePod(ctx, given[0]) })
		},
	}
	var sure bool
	remove := &cobra.Command{
		Use: "delete WORKSPACE", Short: "Delete a workspace and all work in it that was not fetched", Example: "  cal vm delete my-app --yes", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			if err := home.HasWorkspace(given[0]); err != nil {
				return err
			}
			if !sure {
				return usageError{fmt.Errorf("work in %s that was not fetched would be lost (--yes deletes it)", given[0])}
			}
			return home.DeleteWorkspace(cmd.Context(), given[0])
		},
	}
	remove.Flags().BoolVarP(&sure, "yes", "y", false, "delete it")
	cmd.AddCommand(list, stop, resume, remove)
	return cmd
}

func nodeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "The control plane on this host", Example: "  cal node status"}
	start := &cobra.Command{
		Use: "start", Short: "Start the node, and the authority where its key exists", Example: "  cal node start", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			home, err := workspace.OpenHome()
			if err == nil {
				_, err = home.Node(cmd.Context())
			}
			return err
		},
	}
	var all bool
	stop := &cobra.Command{
		Use: "stop", Short: "Stop the node; machines wait a minute for the next one", Example: "  cal node stop", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			err = home.StopNode(cmd.Context())
			if all {
				err = errors.Join(err, home.StopAuthority())
			}
			return err
		},
	}
	stop.Flags().BoolVar(&all, "all", false, "the authority too")
	restart := &cobra.Command{
		Use: "restart", Short: "Replace the running node; machines and sessions of its version go on", Example: "  cal node restart", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			var other *workspace.OtherVersion
			if _, err := home.RunningNode(cmd.Context()); errors.As(err, &other) {
				fmt.Fprintln(os.Stderr, "cal:", other.Fact())
			}
			_, err = home.RestartNode(cmd.Context())
			return err
		},
	}
	var asJSON bool
	status := &cobra.Command{
		Use: "status", Short: "Say whether a node runs, and what it holds", Example: "  cal node status --json", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error {
				health, err := node.Health(ctx)
				if err != nil {
					return err
				}
				pods, err := node.Pods(ctx)
				if err != nil {
					return err
				}
				if asJSON {
					return json.NewEncoder(os.Stdout).Encode(map[string]any{"version": health.Version, "pods": pods, "spare": health.Spare})
				}
				fmt.Printf("node %s runs, %s, spare machine: %s\n", health.Version, count(len(pods), "pod"), health.Spare)
				return nil
			})
		},
	}
	status.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.AddCommand(start, stop, restart, status)
	return cmd
}

// approveCommand hands over to the authority's own program: it alone draws an ask.
func approveCommand() *cobra.Command {
	sub := func(use, short, example string) *cobra.Command {
		return &cobra.Command{
			Use: use, Short: short, Example: example, DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, given []string) error {
				return authority(append([]string{cmd.Name()}, given...))
			},
		}
	}
	cmd := sub("approve", "See all that waits for you on a whole screen, and decide", "  cal approve\n  cal approve --approver bob")
	cmd.Use = "approve [ID]"
	cmd.AddCommand(sub("list", "List what waits for a decision", "  cal approve list --json"), sub("show ID", "Show one ask, and grant nothing", "  cal approve show ID --whole"),
		sub("grant ID", "Show one ask line by line, and grant it once", "  cal approve grant ID --reason 'as we said'"),
		sub("deny ID", "Say no", "  cal approve deny ID --reason 'not this one'"), sub("init", "Make the first approval key", "  cal approve init"),
		sub("grants", "List what was granted and can still be used", "  cal approve grants\n  cal approve grants --all --json"), sub("revoke ID", "Take back what was granted: for an ask, by a grant, or to a pod", "  cal approve revoke a-2X... --reason enough"),
		sub("page [ID]", "Print the link of the page at which a passkey approves", "  cal approve page\n  cal approve page a-2X..."),
		sub("approver", "Who can approve: add, list and remove", "  cal approve approver add bob\n  cal approve approver add touch --passkey\n  cal approve approver list --json\n  cal approve approver remove bob"))
	cmd.AddCommand(trustCommand())
	return cmd
}

// trustCommand confirms who can approve now. It is the node that remembers, so it is not handed over.
func trustCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "trust", Short: "Confirm the keys of approvers that a launch tells as new, or as other than before", Args: args(cobra.NoArgs),
		Example: "  cal approve trust",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error { return trust(ctx, node, yes) })
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "confirm what is shown without a question")
	return cmd
}

func trust(ctx context.Context, node *client.Client, yes bool) error {
	known, err := node.Approvers(ctx)
	if err != nil {
		return err
	}
	var list []nucleus.Approver
	for _, a := range known {
		if a.Confirmed {
			continue
		}
		list = append(list, a.Approver)
		since := "no machine was started with it"
		if a.Seen > 0 {
			since = "first seen " + time.UnixMilli(a.Seen).Format("2006-01-02 15:04:05")
		}
		fmt.Printf("%s  %s %x, %s\n", workspace.Shown(a.Name), workspace.Shown(a.Kind), a.Key, since)
	}
	switch {
	case len(known) == 0:
		return errors.New("nobody can approve: the authority does not answer, or no key was made (cal approve init)")
	case len(list) == 0:
		fmt.Println("every approver is confirmed")
		return nil
	case !yes && !(term.IsTerminal(0) && term.IsTerminal(2)):
		return errors.New("nothing is confirmed: there is no terminal to ask at (--yes confirms what is shown)")
	case !yes:
		fmt.Fprintln(os.Stderr, "cal approve approver list shows the keys of the authority; compare them with what you were shown when they were made")
		if err := question(ctx, "Enter confirms these keys, q quits: "); err != nil {
			return err
		}
	}
	if err := node.ConfirmApprovers(ctx, list); err != nil {
		return err
	}
	fmt.Printf("%s confirmed\n", count(len(list), "key"))
	return nil
}

func authority(given []string) error {
	home, err := workspace.OpenHome()
	if err != nil {
		return err
	}
	program, err := workspace.Program("nucleus-authority")
	if err != nil {
		return err
	}
	argv := append([]string{program, given[0], "--dir", home.AuthorityDir(), "--socket", home.AuthoritySocket()}, given[1:]...)
	if err := syscall.Exec(program, argv, os.Environ()); err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	return nil
}

func podRow(p nucleus.PodStatus) string {
	return strings.Join([]string{p.ID, p.Parent, p.Workspace, p.State, string(p.Tier), string(p.Mode), p.Agent, strings.Join(p.Exposure, "+"), p.Created}, "\t")
}
