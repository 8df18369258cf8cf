package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"cal/audit"
	"cal/nucleus"
	"cal/policy"
	"cal/policy/command"
	"cal/policy/trial"
)

// explained is the answer of `cal policy why`.
type explained struct {
	Decision nucleus.Verdict `json:"decision"`
	Rule     string          `json:"rule"`
	Where    string          `json:"where,omitempty"` // FILE:LINE of the rule, where it stands in the file
	Why      string          `json:"why"`
	Class    string          `json:"class,omitempty"` // of a command
	Runs     []string        `json:"runs,omitempty"`  // the programs in it, with the class of each
	Change   []string        `json:"change,omitempty"`
}

func policyWhy() *cobra.Command {
	var asJSON bool
	var exposure []string
	cmd := &cobra.Command{
		Use: "why POLICY STEP", Short: "Say how a step is decided, by which rule and line, and what would change it",
		Example: "  cal policy why default '{\"op\": \"read_files\", \"path\": \".env\"}'\n  cal policy why fix-issue '{\"op\": \"git_push\"}' --exposure private,untrusted",
		Args:    args(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, given []string) error {
			legs, err := nucleus.LegsOf(exposure)
			if err != nil {
				return usageError{err}
			}
			result, err := explain(given[0], given[1], legs)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(os.Stdout).Encode(result)
			}
			return printExplained(result)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().StringSliceVar(&exposure, "exposure", nil, "legs that the session has taken: private, untrusted, way_out")
	return cmd
}

func explain(name, step string, exposure nucleus.Legs) (explained, error) {
	p, path, source, err := sourceOf(name)
	if err != nil {
		return explained{}, err
	}
	e := trial.Evaluator{Policy: readPolicy, Fetch: newFetch, UnixMilli: time.Now().UnixMilli()}
	action, context, d, err := e.Step(p, []byte(step), exposure)
	if err != nil {
		return explained{}, err
	}
	result := explained{Decision: d.Verdict, Rule: d.Rule, Why: d.Why}
	if line := policy.Place(p, source, d.Rule, action); line > 0 {
		result.Where = path + ":" + strconv.Itoa(line)
	}
	if c := action.Command; c != nil {
		reading := command.Of(*c)
		result.Class = reading.Class.String() + " (" + reading.Why + ")"
		for _, part := range reading.Parts {
			result.Runs = append(result.Runs, fmt.Sprintf("%s: %s (%s)", part.Class, strings.Join(part.Argv, " "), part.Why))
		}
	}
	if d.Rule != "resolve" {
		result.Change = policy.Changes(p, action, context)
	}
	return result, nil
}

func printExplained(e explained) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	line := func(name, text string) {
		if text != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, text)
		}
	}
	line("decision", string(e.Decision))
	line("rule", e.Rule)
	line("where", e.Where)
	line("because", e.Why)
	line("command", e.Class)
	for _, part := range e.Runs {
		line("runs", part)
	}
	for _, change := range e.Change {
		line("allowed by", change)
	}
	return w.Flush()
}

func policyDiff() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "diff A B", Short: "Say what B allows more and less than A, rule by rule, with a step that shows it", Example: "  cal policy diff default fix-issue",
		Args: args(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, given []string) error {
			a, b, err := readTwo(given)
			if err != nil {
				return err
			}
			all := policy.Diff(a, b)
			if asJSON && all == nil {
				all = []policy.Difference{}
			}
			return printList(all, asJSON, "B ALLOWS\tSCOPE\tRULE\tFOR EXAMPLE", func(d policy.Difference) string {
				word := "less"
				if d.More {
					word = "more"
				}
				return strings.Join([]string{word, d.Scope, d.Rule, d.Example}, "\t")
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func policySimulate() *cobra.Command {
	var asJSON bool
	var name, dir string
	cmd := &cobra.Command{
		Use: "simulate --policy NEW", Short: "Say which requests of a log a policy would have denied or asked for", Example: "  cal policy simulate --policy my-policy.yaml --log ~/.cal/log",
		Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if name == "" {
				return usageError{fmt.Errorf("which policy? --policy NAME or FILE")}
			}
			p, err := readPolicy(name)
			if err != nil {
				return err
			}
			if dir, err = (&logFlags{dir: dir}).place(); err != nil {
				return err
			}
			result, err := trial.Run(p, audit.Read(dir, 0))
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(os.Stdout).Encode(result)
			}
			return printReplay(result)
		},
	}
	cmd.RunE = reader(cmd.RunE)
	cmd.Flags().StringVar(&name, "policy", "", "profile, or file")
	cmd.Flags().StringVar(&dir, "log", "", "directory of the log (default: this host's)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func printReplay(r trial.Replay) error {
	fmt.Printf("of %s it would have denied %d, asked for %d\n", count(r.Requests, "recorded request"), len(r.Denied), len(r.Asked))
	if n := len(r.Unjudged); n > 0 {
		fmt.Printf("%s cannot be judged, because the log does not show enough of it: %s\n", count(n, "request"), strings.Trim(fmt.Sprint(r.Unjudged), "[]"))
	}
	all := append(append([]trial.Replayed{}, r.Denied...), r.Asked...)
	if len(all) == 0 {
		return nil
	}
	return printList(all, false, "SEQ\tOPERATION\tRECORDED\tNOW\tRULE\tBECAUSE", func(d trial.Replayed) string {
		return strings.Join([]string{strconv.FormatInt(d.Seq, 10), audit.Printable(string(d.Op)), audit.Printable(string(d.Recorded)), string(d.Decision), audit.Printable(d.Rule), audit.Printable(d.Why)}, "\t")
	})
}

func policyProve() *cobra.Command {
	var asJSON, trustNothing bool
	cmd := &cobra.Command{
		Use: "prove FILE", Short: "Prove that private data and untrusted content reach no way out without an approval, or print the shortest session in which they do",
		Example: "  cal policy prove my-policy.yaml\n  cal policy prove my-policy.yaml --trust-nothing", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			p, err := readPolicy(given[0])
			if err != nil {
				return err
			}
			proof := policy.Prove(p, trustNothing)
			if asJSON {
				err = json.NewEncoder(os.Stdout).Encode(proof)
			} else {
				printProof(proof)
			}
			if err == nil && !proof.Holds {
				return exitCode(exitFailed)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVar(&trustNothing, "trust-nothing", false, "do not assume what trusted rules and labels of repositories say")
	return cmd
}

func printProof(p policy.Proof) {
	for _, a := range p.Assumptions {
		fmt.Println("assumed:", a)
	}
	if p.Holds {
		fmt.Printf("holds: in %s nothing leaves without an approval once private data and untrusted content have met\n", count(p.States, "state"))
		return
	}
	fmt.Println("does not hold; each of these is allowed or granted, and the last is a way out without an approval:")
	for i, step := range p.Counterexample {
		fmt.Printf("%d  %s\n", i, step)
	}
}
