package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"cal/node/client"
	"cal/nucleus"
	"cal/workspace"
)

func statusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "status", Short: "Say what runs, what is left of its budget, and what waits for you", Example: "  cal status\n  cal status --json", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withNode(cmd, func(ctx context.Context, node *client.Client) error {
				pods, err := node.Pods(ctx)
				if err != nil {
					return err
				}
				if asJSON {
					enc := json.NewEncoder(os.Stdout)
					enc.SetIndent("", "  ")
					return enc.Encode(pods)
				}
				return printStatus(os.Stdout, pods)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// printStatus writes a paragraph for each pod.
func printStatus(out io.Writer, pods []nucleus.PodStatus) error {
	if len(pods) == 0 {
		fmt.Fprintln(out, "nothing runs")
		return nil
	}
	for i, p := range pods {
		if i > 0 {
			fmt.Fprintln(out)
		}
		w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
		line := func(label, format string, args ...any) {
			fmt.Fprintf(w, "  %s\t%s\n", label, workspace.Shown(fmt.Sprintf(format, args...)))
		}
		fmt.Fprintln(w, p.ID)
		if p.Workspace != "" {
			line("workspace", "%s", p.Workspace)
		}
		if p.Parent != "" {
			line("below", "%s", p.Parent)
		}
		state := p.State
		reason, more, _ := strings.Cut(p.Reason, "\n") // a console's lines
		if reason != "" {
			state += ": " + reason
		}
		line("state", "%s", state)
		for text := range strings.Lines(more) {
			line("", "%s", strings.TrimSuffix(text, "\n"))
		}
		line("since", "%s", p.Created)
		if p.Agent != "" {
			line("agent", "%s", p.Agent)
		}
		line("policy", "%s", orWord(p.Policy, "without a name"))
		line("mode", "%s, tier %s", p.Mode, p.Tier)
		line("exposure", "%s", orWord(strings.Join(p.Exposure, ", "), "none"))
		if b := p.Budget; b != nil {
			for _, d := range nucleus.Dimensions() {
				line(d.Unit(), "%s", workspace.Spending(d, b.Of(d)))
			}
			if b.Stopped != "" {
				line("ended by", "%s", b.Stopped)
			}
			if b.Estimated > 0 {
				line("estimated", "%s, charged above what was used: the provider did not report it", count(int(b.Estimated), "call"))
			}
			if len(b.Unpriced) > 0 {
				line("no price", "%s, charged like the dearest model (prices.yaml)", strings.Join(quoted(b.Unpriced), ", "))
			}
		}
		for _, unconfirmed := range p.Unconfirmed {
			line("approver", "%s (cal approve trust)", workspace.Shown(unconfirmed))
		}
		for _, ask := range p.Asks {
			line("waits", "cal approve %s", ask)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func orWord(s, word string) string {
	if s == "" {
		return word
	}
	return s
}

// quoted are names that a provider chose.
func quoted(names []string) []string {
	var out []string
	for _, name := range names {
		out = append(out, fmt.Sprintf("%q", name))
	}
	return out
}
