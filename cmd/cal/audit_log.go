package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"cal/approval"
	"cal/audit"
	"cal/internal/timeline"
	"cal/nucleus"
	"cal/workspace"
)

// selection is what `log` and `export` list.
type selection struct {
	log          logFlags
	filter       audit.Filter
	op, decision string
	since, until string
}

func (s *selection) addFlags(cmd *cobra.Command) {
	s.log.addDir(cmd)
	f := cmd.Flags()
	f.StringVar(&s.filter.Pod, "pod", "", "only this pod")
	f.StringVar(&s.filter.Session, "session", "", "only this session; last is the newest that you began")
	f.StringVar(&s.filter.Actor, "actor", "", "only this actor: a key id, agent, machine or operator")
	f.StringVar(&s.op, "operation", "", "only this operation")
	f.StringVar(&s.decision, "decision", "", "only allow, ask or deny")
	f.StringVar(&s.filter.Kind, "kind", "", "only this kind; \"approval.*\" is all that begin so")
	f.StringVar(&s.filter.Host, "host", "", "only what is about this host on the network")
	f.StringVar(&s.since, "since", "", "not before: a time, a date, or a duration ago such as 90m")
	f.StringVar(&s.until, "until", "", "before: the same")
}

// resolve checks the flags and returns the log's directory.
func (s *selection) resolve() (string, error) {
	dir, err := s.log.place()
	if err != nil {
		return "", err
	}
	s.filter.Op, s.filter.Verdict = nucleus.Op(s.op), nucleus.Verdict(s.decision)
	if s.op != "" && !s.filter.Op.Valid() {
		return "", usageError{fmt.Errorf("unknown operation %q: one of %v", s.op, nucleus.Ops())}
	}
	if verdicts := []nucleus.Verdict{nucleus.Allow, nucleus.Ask, nucleus.Deny}; s.decision != "" && !slices.Contains(verdicts, s.filter.Verdict) {
		return "", usageError{fmt.Errorf("unknown decision %q: one of %v", s.decision, verdicts)}
	}
	s.filter.Host = strings.ToLower(s.filter.Host)
	now := time.Now()
	if s.filter.Since, err = parseTime(s.since, now); err != nil {
		return "", usageError{fmt.Errorf("--since: %w", err)}
	}
	if s.filter.Until, err = parseTime(s.until, now); err != nil {
		return "", usageError{fmt.Errorf("--until: %w", err)}
	}
	s.filter.Session, err = findSession(dir, s.filter.Session)
	return dir, err
}

// parseTime reads a point in time as people write one.
func parseTime(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), nil
	}
	for _, form := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04", time.DateOnly} {
		if at, err := time.Parse(form, text); err == nil {
			return at, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is neither a time such as 2026-11-22T06:24:40Z (UTC where no zone is given), a date, nor a duration such as 90m", text)
}

// findSession is the session that a person names: "last" is the newest that a person began;
// those of sub-pods begin later and are passed over.
func findSession(dir, name string) (string, error) {
	if name != "last" {
		return name, nil
	}
	last := ""
	for raw, err := range audit.Find(dir, 0, audit.Filter{Kind: nucleus.KindPodCreate}) {
		if err != nil {
			return "", err
		}
		e, err := audit.ParseEntry(raw)
		if err != nil {
			return "", err
		}
		var data struct {
			Sub *struct{} `json:"sub"`
		}
		_ = json.Unmarshal(e.Data, &data) // what says nothing of a parent has none
		if e.Session != "" && data.Sub == nil {
			last = e.Session
		}
	}
	if last == "" {
		return "", fmt.Errorf("the log in %s has no session", dir)
	}
	return last, nil
}

func auditLogCommand() *cobra.Command {
	var s selection
	var asJSON, follow bool
	var tail int
	cmd := &cobra.Command{
		Use: "log", Short: "List the entries, filtered; follow what comes",
		Example: "  cal audit log --operation git_push --decision deny\n  cal audit log --session last --host api.github.com --json\n  cal audit log --follow --kind \"approval.*\"", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := s.resolve()
			if err != nil {
				return err
			}
			if tail < 0 {
				return usageError{fmt.Errorf("--last %d: want 0 or more", tail)}
			}
			out := newListing(os.Stdout, asJSON)
			seen, next, err := list(dir, s.filter, tail, out)
			if err != nil {
				return err
			}
			if follow {
				for raw, err := range audit.Tail(cmd.Context(), dir, next, s.filter, 200*time.Millisecond) {
					if err == nil {
						err = errors.Join(out.add(raw), out.flush())
					}
					if err != nil {
						return err
					}
				}
				return nil
			}
			if out.count == 0 {
				fmt.Fprintf(os.Stderr, "cal: none of %s matches\n", countOf(seen, "entry", "entries"))
			}
			return nil
		},
	}
	s.addFlags(cmd)
	cmd.Flags().IntVarP(&tail, "last", "n", 0, "only the last N that match; 0: all")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is appended, until interrupted")
	cmd.Flags().BoolVar(&asJSON, "json", false, "one entry a line, as it is hashed")
	cmd.Flags().StringVar(&s.op, "op", "", "the same as --operation")
	return cmd
}

func countOf(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// list prints what the log has now, and returns how many entries that are.
func list(dir string, f audit.Filter, tail int, out *listing) (seen, next int64, err error) {
	_, size, err := audit.Newest(dir)
	if err != nil {
		return 0, 0, err
	}
	var ring [][]byte
	next = size
	for raw, err := range audit.Find(dir, 0, f) {
		if err != nil {
			return 0, 0, err
		}
		if tail == 0 {
			err = out.add(raw)
		} else {
			if len(ring) == tail {
				ring = ring[1:]
			}
			ring = append(ring, slices.Clone(raw))
		}
		if err != nil {
			return 0, 0, err
		}
		if seq, ok := audit.Seq(raw); ok && seq >= next {
			next = seq + 1 // appended since
		}
	}
	for _, raw := range ring {
		if err := out.add(raw); err != nil {
			return 0, 0, err
		}
	}
	return next, next, out.flush()
}

// listing writes entries as they come: JSON lines, or a table whose columns are as wide
// as its rows so far need.
type listing struct {
	out    *bufio.Writer
	asJSON bool
	count  int
	rows   [][]string // that wait
	widths []int
}

const listingRows = 500

var listingHeader = []string{"SEQ", "TIME", "POD", "KIND", "OPERATION", "DECISION", "RULE", "STATUS", "WHAT"}

func newListing(w io.Writer, asJSON bool) *listing {
	return &listing{out: bufio.NewWriterSize(w, 1<<16), asJSON: asJSON, widths: make([]int, len(listingHeader))}
}

func (l *listing) add(raw []byte) error {
	if l.asJSON {
		l.count++
		_, err := l.out.Write(append(raw[:len(raw):len(raw)], '\n'))
		return err
	}
	e, err := audit.ParseEntry(raw)
	if err != nil {
		return err
	}
	if l.count == 0 {
		l.rows = append(l.rows, listingHeader)
	}
	l.count++
	l.rows = append(l.rows, []string{
		strconv.FormatInt(e.Seq, 10), approval.Visible(e.Time[:min(len(e.Time), 19)]), approval.Visible(e.Pod), approval.Visible(e.Kind), approval.Visible(string(e.Op)),
		approval.Visible(string(e.Verdict)), approval.Visible(e.Rule), approval.Visible(e.Status), timeline.What(e),
	})
	if len(l.rows) >= listingRows {
		return l.flush()
	}
	return nil
}

func (l *listing) flush() error {
	for _, row := range l.rows {
		for i, cell := range row {
			l.widths[i] = max(l.widths[i], len(cell))
		}
	}
	for _, row := range l.rows {
		line := ""
		for i, cell := range row {
			line += fmt.Sprintf("%-*s  ", l.widths[i], cell)
		}
		if _, err := l.out.WriteString(strings.TrimRight(line, " ") + "\n"); err != nil {
			return err
		}
	}
	l.rows = l.rows[:0]
	return l.out.Flush()
}

func auditExportCommand() *cobra.Command {
	var s selection
	cmd := &cobra.Command{
		Use: "export", Short: "Write the entries as JSON lines, and at the end the checkpoint they stand under",
		Long: "Write the entries as JSON lines, filtered as `cal audit log` does, and at the end a line {\"checkpoint\": ...}:\n" +
			"the newest signed checkpoint when the export began. Entries appended later are not in it. To prove them use `cal audit prove`.",
		Example: "  cal audit export --since 24h > day.jsonl", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			dir, err := s.resolve()
			if err != nil {
				return err
			}
			signed, size, err := audit.Newest(dir)
			if err != nil {
				return err
			}
			out := newListing(os.Stdout, true)
			for raw, err := range audit.Find(dir, 0, s.filter) {
				if err != nil {
					return err
				}
				if seq, ok := audit.Seq(raw); ok && seq >= size {
					break
				}
				if err := out.add(raw); err != nil {
					return err
				}
			}
			last, err := json.Marshal(map[string]string{"checkpoint": string(signed)})
			if err != nil {
				return err
			}
			return errors.Join(out.add(last), out.flush())
		},
	}
	s.addFlags(cmd)
	return cmd
}

func auditShowCommand() *cobra.Command {
	var log logFlags
	var asJSON, reveal bool
	var file string
	cmd := &cobra.Command{
		Use: "show N", Short: "Show one entry",
		Long: "Show one entry. --reveal finds the salt of its digest among this host's, and the digests of contents that the\n" +
			"entry leaves out, puts the action together and says whether the digest is that of it. Where the entry shows it redacted\n" +
			"or cut, --args names a file with the action as the entry has it, made whole.",
		Example: "  cal audit show 12\n  cal audit show 12 --reveal", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			if file != "" && !reveal {
				return usageError{errors.New("--args is for --reveal")}
			}
			n, err := entryNumber(given[0])
			if err != nil {
				return err
			}
			dir, err := log.place()
			if err != nil {
				return err
			}
			for raw, err := range audit.ReadRaw(dir, n) {
				if err != nil {
					return err
				}
				return showEntry(raw, asJSON, reveal, file)
			}
			return fmt.Errorf("the log has no entry %d", n)
		},
	}
	log.addDir(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "the entry as it is hashed")
	cmd.Flags().BoolVar(&reveal, "reveal", false, "check the digest of the arguments with its salt")
	cmd.Flags().StringVar(&file, "args", "", "with --reveal: a file with the action, where the entry shows a part")
	return cmd
}

func entryNumber(text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, usageError{fmt.Errorf("%q is no entry number", text)}
	}
	return n, nil
}

func showEntry(raw []byte, asJSON, reveal bool, file string) error {
	e, err := audit.ParseEntry(raw)
	if err != nil {
		return err
	}
	var found *revealed
	if reveal {
		if found, err = revealEntry(e, file); err != nil {
			return err
		}
	}
	switch {
	case asJSON && reveal:
		err = json.NewEncoder(os.Stdout).Encode(struct {
			Entry  json.RawMessage `json:"entry"`
			Reveal *revealed       `json:"reveal"`
		}{raw, found})
	case asJSON:
		_, err = fmt.Printf("%s\n", raw)
	default:
		printEntry(e, found)
	}
	if err == nil && found != nil && !found.Matches {
		err = errors.New(found.Why)
	}
	return err
}

func printEntry(e nucleus.Entry, found *revealed) {
	field := func(name, value string) {
		if value != "" {
			fmt.Printf("%-10s %s\n", name, strings.ReplaceAll(value, "\n", "\n           "))
		}
	}
	field("entry", strconv.FormatInt(e.Seq, 10))
	field("time", approval.Visible(e.Time))
	field("kind", approval.Visible(e.Kind))
	field("pod", approval.Visible(e.Pod))
	field("session", approval.Visible(e.Session))
	if e.Prev != nil {
		field("before it", fmt.Sprintf("entry %d of the session", *e.Prev))
	}
	field("actor", approval.Visible(e.Actor))
	field("operation", approval.Visible(string(e.Op)))
	field("what", timeline.What(e))
	field("decision", approval.Visible(string(e.Verdict)))
	field("rule", approval.Visible(e.Rule))
	field("status", approval.Visible(e.Status))
	field("exposure", approval.Visible(strings.Join(e.Exposure, ", ")))
	field("permit", approval.Visible(e.Permit))
	field("ask", approval.Visible(e.Ask))
	field("grants", approval.Visible(strings.Join(e.Grants, ", ")))
	field("digest", approval.Visible(e.Digest))
	field("args", asciiJSON(e.Args))
	field("data", asciiJSON(e.Data))
	if e.Outcome != nil {
		field("outcome", asciiJSON(e.Outcome.Payload))
		field("signature", fmt.Sprintf("%x", e.Outcome.Sig))
	}
	if found != nil {
		field("salt", found.Salt)
		field("action", asciiJSON(found.Action))
		field("reveal", found.Why)
	}
}

// asciiJSON is JSON laid out for a terminal: what is not printable ASCII is escaped as
// JSON has it.
func asciiJSON(raw []byte) string {
	if len(raw) == 0 {
		return ""
	}
	var value any
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber()
	if !utf8.Valid(raw) || dec.Decode(&value) != nil {
		return approval.Visible(string(raw))
	}
	laid, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return approval.Visible(string(raw))
	}
	var b strings.Builder
	for _, r := range string(laid) {
		switch {
		case r == '\n' || r >= 0x20 && r < 0x7f:
			b.WriteRune(r)
		default:
			for _, unit := range utf16.Encode([]rune{r}) {
				fmt.Fprintf(&b, `\u%04x`, unit)
			}
		}
	}
	return b.String()
}

// revealed says whether a digest is that of some arguments.
type revealed struct {
	Matches bool            `json:"matches"`
	Salt    string          `json:"salt"` // hex
	Digest  string          `json:"digest"`
	Action  json.RawMessage `json:"action"` // what the digest is compared with, canonical
	Why     string          `json:"why"`
}

func revealEntry(e nucleus.Entry, file string) (*revealed, error) {
	if e.Digest == "" {
		return nil, fmt.Errorf("entry %d has no digest: requests and asks have one", e.Seq)
	}
	home, err := workspace.OpenHome()
	if err != nil {
		return nil, err
	}
	salt, left, err := findSalt(filepath.Join(home.Dir, "keys", "salts"), e)
	if err != nil {
		return nil, err
	}
	action := []byte(e.Args)
	if file != "" {
		if action, err = workspace.ReadGiven(file, audit.MaxReceipt); err != nil {
			return nil, err
		}
	}
	if len(action) == 0 {
		return nil, fmt.Errorf("entry %d shows no arguments: its request.intent does, or give them with --args", e.Seq)
	}
	if action, err = audit.Whole(action, left); err != nil {
		return nil, err
	}
	r := &revealed{Salt: fmt.Sprintf("%x", salt), Digest: nucleus.ActionDigest(action, salt), Action: action}
	switch r.Matches = r.Digest == e.Digest; {
	case r.Matches:
		r.Why = "the digest is that of the salt and this action"
	case file == "":
		r.Why = fmt.Sprintf("the digest of entry %d is not that of the arguments it shows, which are redacted or cut: give the whole with --args", e.Seq)
	default:
		r.Why = fmt.Sprintf("the digest of entry %d is not that of the arguments in %s", e.Seq, file)
	}
	return r, nil
}

// findSalt looks for the salt of what was permitted by its permit, of anything else by its
// digest.
func findSalt(file string, e nucleus.Entry) (nucleus.Salt, []string, error) {
	if e.Permit != "" {
		if salt, left, err := audit.FindSalt(file, e.Permit); !errors.Is(err, fs.ErrNotExist) {
			return salt, left, err
		}
	}
	return audit.FindSalt(file, e.Digest)
}
