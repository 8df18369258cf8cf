package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"cal/approval"
	"cal/audit"
	"cal/internal/timeline"
	"cal/nucleus"
	"cal/workspace"
)

func auditProveCommand() *cobra.Command {
	var log logFlags
	var session, checkpoint, output string
	var text bool
	cmd := &cobra.Command{
		Use: "prove N | prove --session S", Short: "Make a proof of one entry, or a receipt of a session, that a stranger can verify",
		Long: "Make a proof of one entry (a C2SP tlog-proof with the entry in it), or a receipt of a session: all its entries, the\n" +
			"proof that they are in the log, and the signed checkpoint. doc/log.md has the formats. What is not shown is not given\n" +
			"away: digests are salted.",
		Example: "  cal audit prove 12 > 12.tlog-proof\n  cal audit prove --session last -o session.receipt", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			if (len(given) == 1) == (session != "") {
				return usageError{errors.New("want the number of an entry or --session (cal audit log --kind pod.create lists them)")}
			}
			dir, key, err := log.both()
			if err != nil {
				return err
			}
			var raw []byte
			if session == "" {
				n, err := entryNumber(given[0])
				if err != nil {
					return err
				}
				if checkpoint != "" || text {
					return usageError{errors.New("--checkpoint and --text are for --session")}
				}
				if _, raw, err = audit.Prove(dir, key, n); err != nil {
					return err
				}
				return writeOut(output, raw)
			}
			if !text && (output == "" || output == "-") && term.IsTerminal(1) {
				return usageError{errors.New("a receipt is packed and standard output a terminal: -o FILE writes it there, --text leaves it to be read")}
			}
			o := audit.ReceiptOptions{Key: key, Text: text}
			if o.Session, err = findSession(dir, session); err != nil {
				return err
			}
			if checkpoint != "" {
				if o.Checkpoint, err = workspace.ReadGiven(checkpoint, audit.MaxCheckpoint); err != nil {
					return err
				}
			}
			if raw, err = audit.NewReceipt(dir, o); err != nil {
				return err
			}
			v, err := audit.VerifyReceipt(raw, audit.VerifyReceiptOptions{Key: key})
			if err == nil && len(v.Others) == 0 {
				fmt.Fprintln(os.Stderr, "cal: the checkpoint has no cosignature yet: where an authority or another witness cosigns the log, a receipt made a minute later has")
			}
			if err == nil {
				err = tellBelow(dir, v)
			}
			return errors.Join(err, writeOut(output, raw))
		},
	}
	log.addDir(cmd)
	log.addKey(cmd)
	f := cmd.Flags()
	f.StringVar(&session, "session", "", "a receipt of this session; last is the newest that you began")
	f.StringVar(&checkpoint, "checkpoint", "", "a cosigned checkpoint of this log to prove it under (default: the log's own cosigned one where it covers the session, else the newest)")
	f.StringVarP(&output, "output", "o", "", "write it there (default: standard output)")
	f.BoolVar(&text, "text", false, "leave the entries of a receipt unpacked, to be read")
	return cmd
}

// tellBelow names the sessions of pods below those of a receipt, which it does not show.
func tellBelow(dir string, v *audit.Receipt) error {
	pods := map[string]bool{}
	for _, raw := range v.Entries {
		if e, err := audit.ParseEntry(raw); err == nil && e.Pod != "" {
			pods[e.Pod] = true
		}
	}
	var below []string
	for raw, err := range audit.Find(dir, v.First, audit.Filter{Kind: nucleus.KindPodCreate}) {
		if err != nil {
			return err
		}
		var e nucleus.Entry
		var data struct{ Sub struct{ Parent string } }
		if json.Unmarshal(raw, &e) == nil && json.Unmarshal(e.Data, &data) == nil && pods[data.Sub.Parent] {
			below = append(below, e.Session)
		}
	}
	if len(below) > 0 {
		fmt.Fprintf(os.Stderr, "cal: pods below this session's have sessions and receipts of their own: %s\n", approval.Visible(strings.Join(below, " ")))
	}
	return nil
}

func writeOut(file string, raw []byte) error {
	if file == "" || file == "-" {
		_, err := os.Stdout.Write(raw)
		return err
	}
	return os.WriteFile(file, raw, 0o600)
}

func auditVerifyReceiptCommand() *cobra.Command {
	var log logFlags
	var witnesses []string
	var session string
	var asJSON, entries bool
	cmd := &cobra.Command{
		Use: "verify-receipt FILE", Short: "Verify a receipt or a proof with nothing but the key; says what it proves",
		Example: "  cal audit verify-receipt session.receipt --key \"$(cat log.vkey)\"\n  cal audit verify-receipt session.receipt --witness \"$(cat witness.vkey)\" --json", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			key, err := log.verifier()
			if err != nil {
				return err
			}
			raw, err := readReceipt(given[0])
			if err != nil {
				return err
			}
			v, err := audit.VerifyReceipt(raw, audit.VerifyReceiptOptions{Key: key, Witnesses: witnesses})
			if err == nil && session != "" && v.Session != session {
				err = &audit.ReceiptError{Kind: audit.Foreign, Detail: fmt.Sprintf("it is of session %q, wanted is %q", v.Session, session)}
			}
			if err != nil {
				return refusedReceipt(given[0], err, asJSON)
			}
			return printReceipt(given[0], v, asJSON, entries)
		},
	}
	log.addKey(cmd)
	f := cmd.Flags()
	f.StringArrayVar(&witnesses, "witness", nil, "key of a witness that must have cosigned the checkpoint; may be given again")
	f.StringVar(&session, "session", "", "refuse it if it is of another session")
	f.BoolVar(&entries, "entries", false, "list its entries too")
	f.BoolVar(&asJSON, "json", false, "as JSON, with the entries")
	return cmd
}

// readReceipt reads a file, "-" standard input, no further than a receipt may be long.
func readReceipt(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(os.Stdin, audit.MaxReceipt+1))
	}
	return workspace.ReadGiven(name, audit.MaxReceipt)
}

func refusedReceipt(name string, err error, asJSON bool) error {
	var refused *audit.ReceiptError
	if !errors.As(err, &refused) {
		return err
	}
	if asJSON {
		if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"ok": false, "kind": refused.Kind, "detail": refused.Detail}); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s proves nothing: %w", name, err)
}

func printReceipt(name string, v *audit.Receipt, asJSON, entries bool) error {
	if asJSON {
		return json.NewEncoder(os.Stdout).Encode(struct {
			OK bool `json:"ok"`
			*audit.Receipt
			Says []string `json:"says"`
		}{true, v, v.Says()})
	}
	if entries {
		out := newListing(os.Stdout, false)
		for _, raw := range v.Entries {
			if err := out.add(raw); err != nil {
				return err
			}
		}
		if err := out.flush(); err != nil {
			return err
		}
		fmt.Println()
	}
	fmt.Printf("%s: as it was signed\n", audit.Printable(name))
	for _, line := range v.Says() {
		fmt.Println("  " + line)
	}
	for _, w := range v.Witnesses {
		fmt.Printf("  cosigned by %s, %s by its clock\n", audit.Printable(w.Name), time.Unix(w.Unix, 0).UTC().Format(time.RFC3339))
	}
	if len(v.Witnesses) == 0 {
		fmt.Println("  no cosignature was asked for: the log's key alone vouches for the checkpoint")
	}
	if len(v.Others) > 0 {
		fmt.Printf("  not checked, for want of the keys (--witness): signatures in the names of %s\n", approval.Visible(strings.Join(v.Others, ", ")))
	}
	return nil
}

func auditTimelineCommand() *cobra.Command {
	var log logFlags
	var session, receipt, html string
	cmd := &cobra.Command{
		Use: "timeline", Short: "Make a page of a session, to be looked at in a browser",
		Long: "Make a page of a session: one file that loads nothing. Every entry on it was verified under the checkpoint that it\n" +
			"names. With --receipt it is made from a receipt, by whoever has the key.",
		Example: "  cal audit timeline --session last --html session.html\n  cal audit timeline --receipt session.receipt --key \"$(cat log.vkey)\" --html session.html", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if (session == "") == (receipt == "") || html == "" {
				return usageError{errors.New("want --html FILE and one of --session and --receipt")}
			}
			key, err := log.verifier()
			if err != nil {
				return err
			}
			var raw []byte
			if receipt != "" {
				raw, err = readReceipt(receipt)
			} else {
				raw, err = log.receipt(session, key)
			}
			if err != nil {
				return err
			}
			v, err := audit.VerifyReceipt(raw, audit.VerifyReceiptOptions{Key: key})
			if err != nil {
				return err
			}
			var page bytes.Buffer
			if err := timeline.Write(&page, v); err != nil {
				return err
			}
			return writeOut(html, page.Bytes())
		},
	}
	log.addDir(cmd)
	log.addKey(cmd)
	cmd.Flags().StringVar(&session, "session", "", "of this session; last is the newest that you began")
	cmd.Flags().StringVar(&receipt, "receipt", "", "made from this receipt, in place of a log")
	cmd.Flags().StringVar(&html, "html", "", "write the page there; - is standard output")
	return cmd
}

// receipt is the receipt of a session that a person names.
func (l *logFlags) receipt(session, key string) ([]byte, error) {
	dir, err := l.place()
	if err != nil {
		return nil, err
	}
	if session, err = findSession(dir, session); err != nil {
		return nil, err
	}
	return audit.NewReceipt(dir, audit.ReceiptOptions{Key: key, Session: session})
}
