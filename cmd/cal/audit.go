package main

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"cal/audit"
	"cal/internal/keyfile"
	"cal/nucleus"
	"cal/workspace"
)

func auditCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Read and verify the log", Example: "  cal audit verify"}
	cmd.AddCommand(auditLogCommand(), auditShowCommand(), auditKeyCommand(), auditVerifyCommand())
	return cmd
}

func logDir() (string, error) {
	home, err := workspace.OpenHome()
	return home.Log(), err
}

func auditLogCommand() *cobra.Command {
	var pod, op, decision, kind string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "log", Short: "List the entries", Example: "  cal audit log --op git_push --decision deny", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			dir, err := logDir()
			if err != nil {
				return err
			}
			list := []nucleus.Entry{}
			for e, err := range audit.Read(dir, 0) {
				if err != nil {
					return err
				}
				if match(pod, e.Pod) && match(op, string(e.Op)) && match(decision, string(e.Verdict)) && match(kind, e.Kind) {
					list = append(list, e)
				}
			}
			return printList(list, asJSON, "SEQ\tTIME\tPOD\tKIND\tOPERATION\tDECISION\tRULE\tSTATUS", func(e nucleus.Entry) string {
				return strings.Join([]string{strconv.FormatInt(e.Seq, 10), e.Time[:min(len(e.Time), 19)], e.Pod, e.Kind, string(e.Op), string(e.Verdict), e.Rule, e.Status}, "\t")
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&pod, "pod", "", "only this pod")
	f.StringVar(&op, "op", "", "only this operation")
	f.StringVar(&decision, "decision", "", "only allow, ask or deny")
	f.StringVar(&kind, "kind", "", "only this kind, e.g. request.intent")
	f.BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func match(want, got string) bool { return want == "" || want == got }

func auditShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show N", Short: "Show one entry", Example: "  cal audit show 12", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			n, err := strconv.ParseInt(given[0], 10, 64)
			if err != nil || n < 0 {
				return usageError{fmt.Errorf("%q is no entry number", given[0])}
			}
			dir, err := logDir()
			if err != nil {
				return err
			}
			for e, err := range audit.Read(dir, n) {
				if err != nil {
					return err
				}
				enc := json.NewEncoder(os.Stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(e)
			}
			return fmt.Errorf("the log has no entry %d", n)
		},
	}
}

func verifierKey() (string, error) {
	home, err := workspace.OpenHome()
	if err != nil {
		return "", err
	}
	key, err := keyfile.Load(home.LogKey())
	if err != nil {
		return "", fmt.Errorf("no log yet: %w", err)
	}
	return audit.VerifierKey(nucleus.LogOrigin, key.Public().(ed25519.PublicKey)), nil
}

func auditKeyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "key", Short: "Print the key that verifies the log, in signed-note form", Example: "  cal audit key > log.vkey", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			key, err := verifierKey()
			if err == nil {
				fmt.Println(key)
			}
			return err
		},
	}
}

func auditVerifyCommand() *cobra.Command {
	var key, checkpoint string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "verify [DIR]", Short: "Check every entry, tile and signature; says what is wrong and where",
		Example: "  cal audit verify\n  cal audit verify copy/ --key \"$(cat log.vkey)\" --checkpoint kept.txt", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			dir, err := logDir()
			if err != nil {
				return err
			}
			if len(given) == 1 {
				dir = given[0]
			}
			if key == "" {
				if key, err = verifierKey(); err != nil {
					return err
				}
			}
			o := audit.VerifyOptions{Key: key}
			if checkpoint != "" {
				if o.Checkpoint, err = os.ReadFile(checkpoint); err != nil {
					return err
				}
			}
			report, err := audit.Verify(dir, o)
			if err != nil {
				return err
			}
			return printReport(dir, report, asJSON)
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "verifier key in signed-note form (default: this host's)")
	cmd.Flags().StringVar(&checkpoint, "checkpoint", "", "a checkpoint that was kept elsewhere; shows truncation and rewriting")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func printReport(dir string, report *audit.Report, asJSON bool) error {
	if asJSON {
		if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
			return err
		}
	} else {
		for _, p := range report.Problems {
			fmt.Println(p)
		}
		if report.OK() {
			fmt.Printf("%s: %d entries, all as they were written\n", dir, report.Size)
		}
	}
	if !report.OK() {
		return fmt.Errorf("the log in %s is not as it was written: %s", dir, count(len(report.Problems), "problem"))
	}
	return nil
}
