package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	approvals "cal/approval/client"
	"cal/audit"
	"cal/internal/keyfile"
	"cal/nucleus"
	"cal/workspace"
)

func auditCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Read, verify and prove the log", Example: "  cal audit log --decision deny\n  cal audit verify"}
	cmd.AddCommand(auditLogCommand(), auditShowCommand(), auditKeyCommand(), auditVerifyCommand(), auditProveCommand(), auditVerifyReceiptCommand(), auditTimelineCommand(), auditExportCommand())
	for _, sub := range cmd.Commands() {
		sub.RunE = reader(sub.RunE)
	}
	return cmd
}

// reader wraps a command that reads what a stranger may have made. Wherever it is - in a
// long computation, in a read that does not return - a signal ends it: it changes nothing
// that would have to be put right. And its errors, which name files and texts from there, are
// printable ASCII.
func reader(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, given []string) error {
		ended := make(chan error, 1)
		go func() { ended <- run(cmd, given) }()
		var err error
		select {
		case err = <-ended:
		case <-cmd.Context().Done():
			select {
			case err = <-ended: // one that waits for the signal
			case <-time.After(100 * time.Millisecond):
				return cmd.Context().Err()
			}
		}
		if err != nil {
			err = printableError{err}
		}
		return err
	}
}

type printableError struct{ error }

func (e printableError) Error() string { return audit.Printable(e.error.Error()) }
func (e printableError) Unwrap() error { return e.error }

// logFlags name a log that is read: this host's own where they are empty.
type logFlags struct{ dir, key string }

func (l *logFlags) addDir(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.dir, "log", "", "directory of the log (default: this host's)")
}

func (l *logFlags) addKey(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.key, "key", "", "verifier key in signed-note form (default: this host's)")
}

func (l *logFlags) place() (string, error) {
	if l.dir != "" {
		return l.dir, nil
	}
	home, err := workspace.OpenHome()
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(home.Log()); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("no log yet in %s: it begins with the node (cal run, cal node start)", home.Log())
	}
	return home.Log(), nil
}

func (l *logFlags) verifier() (string, error) {
	if l.key != "" {
		return l.key, nil
	}
	home, err := workspace.OpenHome()
	if err != nil {
		return "", err
	}
	key, err := publicKey(home.LogKey(), nucleus.LogOrigin)
	if err != nil {
		return "", fmt.Errorf("no log yet, and no --key: %w", err)
	}
	return key, nil
}

func (l *logFlags) both() (dir, key string, err error) {
	if dir, err = l.place(); err == nil {
		key, err = l.verifier()
	}
	return dir, key, err
}

func publicKey(file, origin string) (string, error) {
	key, err := keyfile.Load(file)
	if err != nil {
		return "", err
	}
	return audit.VerifierKey(origin, key.Public().(ed25519.PublicKey)), nil
}

func auditKeyCommand() *cobra.Command {
	var asJSON, witness bool
	cmd := &cobra.Command{
		Use: "key", Short: "Print the key that verifies the log, or its witness, in signed-note form", Example: "  cal audit key > log.vkey\n  cal audit key --witness > witness.vkey", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			name, find := nucleus.LogOrigin, func() (string, error) {
				_, key, err := new(logFlags).both()
				return key, err
			}
			if witness {
				name, find = "the authority", func() (string, error) { return witnessKey(cmd.Context()) }
			}
			key, err := find()
			if err == nil && asJSON {
				return json.NewEncoder(os.Stdout).Encode(map[string]string{"of": name, "key": key})
			}
			if err == nil {
				fmt.Println(key)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&witness, "witness", false, "the key by which this host's authority cosigns; it must run")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func witnessKey(ctx context.Context) (string, error) {
	home, err := workspace.OpenHome()
	if err != nil {
		return "", err
	}
	authority := approvals.New(home.AuthoritySocket())
	defer authority.Close()
	info, err := authority.Info(ctx)
	if err != nil {
		return "", fmt.Errorf("%w (cal node start starts it, once cal approve init has made its key)", err)
	}
	if info.Witness == "" {
		return "", errors.New("this host's authority is no witness")
	}
	return info.Witness, nil
}

// verified is the report on one log, and on how it fits the other.
type verified struct {
	Dir string `json:"dir"`
	*audit.Report
	Compared string          `json:"compared_with,omitempty"` // the authority's log
	Contrary []audit.Problem `json:"contradicts,omitempty"`

	// NotCompared says what nobody looked at, and what would not show therefore.
	NotCompared []string `json:"not_compared"`
}

func (v verified) problems() int { return len(v.Problems) + v.More + len(v.Contrary) }

func (v *verified) lacks(format string, args ...any) {
	v.NotCompared = append(v.NotCompared, fmt.Sprintf(format, args...))
}

func auditVerifyCommand() *cobra.Command {
	var log logFlags
	var checkpoint string
	var witnesses []string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "verify [DIR]", Short: "Check every entry, tile and signature; says what is wrong, of what kind and where",
		Long: "Check every entry, tile and signature; says what is wrong, of what kind and where.\n" +
			"Without DIR it is this host's log, and the authority's, and whether the two contradict one another;\n" +
			"where the authority runs, also whether the log continues the checkpoint that it cosigned last. What could not be\n" +
			"compared is said.",
		Example: "  cal audit verify\n  cal audit verify copy/ --key \"$(cat log.vkey)\" --checkpoint kept.txt", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			log.dir = strings.Join(given, "")
			dir, key, err := log.both()
			if err != nil {
				return err
			}
			o := audit.VerifyOptions{Key: key, Witnesses: witnesses}
			none := "none was given (--checkpoint)"
			if checkpoint != "" {
				o.Checkpoint, err = workspace.ReadGiven(checkpoint, audit.MaxCheckpoint)
			} else if log.dir == "" {
				o.Checkpoint, none, err = keptByAuthority(cmd.Context(), key)
			}
			if err != nil {
				return err
			}
			report, err := audit.Verify(dir, o)
			if err != nil {
				return err
			}
			all := []verified{{Dir: dir, Report: report}}
			if o.Checkpoint == nil {
				all[0].lacks("a checkpoint kept elsewhere: %s; a log that was cut back to an older state, or that the holder of its key wrote anew, looks the same", none)
			}
			if o.Checkpoint == nil && report.Cosigned >= 0 && len(witnesses) == 0 {
				all[0].lacks("the cosignatures in the log: no witness was named (--witness)")
			}
			if log.dir == "" {
				all, err = withAuthority(cmd.Context(), all)
			} else {
				all[0].lacks("the authority's log: it is compared with this host's own log alone (without DIR)")
			}
			if err != nil {
				return err
			}
			return printReports(all, asJSON)
		},
	}
	log.addKey(cmd)
	cmd.Flags().StringVar(&checkpoint, "checkpoint", "", "a checkpoint that was kept elsewhere; shows truncation and rewriting")
	cmd.Flags().StringArrayVar(&witnesses, "witness", nil, "key of a witness that must have cosigned the checkpoint in the log; may be given again")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON: a list, a member for each log")
	return cmd
}

// keptByAuthority is the checkpoint of this host's log that a running authority keeps, or
// why there is none.
func keptByAuthority(ctx context.Context, key string) (checkpoint []byte, none string, err error) {
	home, err := workspace.OpenHome()
	if err != nil {
		return nil, "", err
	}
	authority := approvals.New(home.AuthoritySocket())
	defer authority.Close()
	kept, err := authority.Witnessed(ctx, nucleus.LogOrigin)
	var refused *nucleus.Error
	switch {
	case errors.As(err, &refused) && refused.Kind == nucleus.KindUnavailable:
		return nil, "the authority, which keeps one, does not run (cal node start)", nil
	case errors.As(err, &refused) && refused.Kind == nucleus.KindNotFound || err == nil && kept.Checkpoint == "":
		return nil, "the authority has cosigned none yet", nil
	case err != nil:
		return nil, "", err
	}
	if kept.Key != key {
		return nil, "", fmt.Errorf("the authority has cosigned log %s with the key %s, this one has %s", nucleus.LogOrigin, kept.Key, key)
	}
	return []byte(kept.Checkpoint), "", nil
}

// withAuthority adds the report on the authority's log: this user's own, or the one that another
// user's authority hands out.
func withAuthority(ctx context.Context, all []verified) ([]verified, error) {
	home, err := workspace.OpenHome()
	if err != nil {
		return all, err
	}
	dir := filepath.Join(home.AuthorityDir(), "log")
	shown := dir
	key, err := publicKey(filepath.Join(home.AuthorityDir(), "log.key"), nucleus.AuthorityLogOrigin)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		if dir, err = os.MkdirTemp("", "cal-authority-log-"); err != nil {
			return all, err
		}
		defer os.RemoveAll(dir)
		shown = "the authority's log, from " + home.AuthoritySocket()
		if key, err = handedOut(ctx, home, dir); err != nil {
			all[0].lacks("the authority's log: %v; grants that nobody gave, and asks that are left out, would not show", err)
			return all, nil
		}
	}
	if err != nil {
		return all, err
	}
	report, err := audit.Verify(dir, audit.VerifyOptions{Key: key})
	if err != nil {
		return all, err
	}
	other := verified{Dir: shown, Report: report}
	other.lacks("a checkpoint kept elsewhere: nobody keeps one of the authority's log; one that was cut back, or that the holder of its key wrote anew, looks the same")
	if shown != dir {
		other.lacks("the key of the authority's log: it is what the authority says")
	}
	all = append(all, other)
	if all[0].problems() > 0 || !report.OK() {
		all[0].lacks("the authority's log: what is wrong already may hide more")
		return all, nil
	}
	all[0].Compared = shown
	all[0].Contrary, err = audit.Compare(all[0].Dir, dir)
	return all, err
}

// handedOut copies the log of the authority that answers into a directory, and returns the key that
// it names for it. Where approvals have to be another user's, nobody else's is taken.
func handedOut(ctx context.Context, home workspace.Home, dir string) (key string, err error) {
	config, err := home.Config()
	if err != nil {
		return "", err
	}
	uid, other, err := approvals.OtherUserOf(config.Approvals.Require)
	if err != nil {
		return "", err
	}
	authority := approvals.New(home.AuthoritySocket())
	if other {
		authority = authority.OfOtherUser(uid)
	}
	defer authority.Close()
	info, err := authority.Info(ctx)
	if approvals.Absent(err) {
		return "", errors.New("there is none here, and no authority runs that could hand one out (cal node start)")
	} else if err != nil {
		return "", err
	}
	if info.Log == "" {
		return "", errors.New("the authority hands none out")
	}
	return info.Log, authority.Log(ctx, dir)
}

func printReports(all []verified, asJSON bool) error {
	wrong, where := 0, ""
	for _, v := range all {
		if n := v.problems(); n > 0 {
			wrong += n
			where = v.Dir
		}
	}
	if asJSON {
		for i := range all {
			all[i].NotCompared = append([]string{}, all[i].NotCompared...) // a list where it is empty too
		}
		if err := json.NewEncoder(os.Stdout).Encode(all); err != nil {
			return err
		}
	} else {
		for _, v := range all {
			v.print()
		}
	}
	if wrong > 0 {
		return fmt.Errorf("the log in %s is not as it was written: %s", where, count(wrong, "problem"))
	}
	return nil
}

func (v verified) print() {
	for _, p := range append(v.Problems, v.Contrary...) {
		fmt.Println(p)
	}
	if v.More > 0 {
		fmt.Printf("and %s more\n", count(v.More, "problem"))
	}
	if v.OK() {
		fmt.Printf("%s: %d entries, all as they were written\n", audit.Printable(v.Dir), v.Size)
		if v.Kept >= 0 {
			fmt.Printf("they continue the checkpoint of %d entries that was kept elsewhere\n", v.Kept)
		}
		for _, w := range v.Cosignatures {
			fmt.Printf("%s cosigned %d entries on %s\n", audit.Printable(w.Name), v.Cosigned, time.Unix(w.Unix, 0).UTC().Format(time.DateTime))
		}
	}
	if v.Compared != "" && len(v.Contrary) == 0 {
		fmt.Println("each grant that was used is in the authority's log, each ask that it was shown in this one")
	}
	for _, what := range v.NotCompared {
		fmt.Println("not compared:", audit.Printable(what))
	}
}
