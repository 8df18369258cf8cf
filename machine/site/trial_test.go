package site

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"cal/internal/durable"
	"cal/machine"
	"cal/nucleus"
)

// remover is a driver that removes its machines, and does nothing else.
type remover struct {
	name  string
	stuck error
}

func (r remover) Name() string              { return r.name }
func (remover) Tier() nucleus.Tier          { return nucleus.TierNone }
func (remover) Probe(context.Context) error { return nil }
func (remover) Create(context.Context, machine.Spec) (machine.Machine, error) {
	return nil, errors.ErrUnsupported
}
func (remover) Adopt(context.Context, string) (machine.Machine, error) {
	return nil, errors.ErrUnsupported
}

func (r remover) Remove(ctx context.Context, dir string) error {
	var rec record
	return Remove(ctx, dir, func(context.Context, string) error {
		if err := LoadRecord(dir, r.name, &rec); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return errors.Join(r.stuck, DeleteRecord(dir))
	})
}

func begin(t *testing.T, scratch string, by remover) *Trial {
	t.Helper()
	trial, err := BeginTrial(t.Context(), scratch, by)
	must(t, err)
	must(t, durable.Store(filepath.Join(trial.Machine(), RecordFile), record{by.name}))
	must(t, os.WriteFile(filepath.Join(trial.Dir, "more"), nil, 0o600))
	return trial
}

func TestTrial(t *testing.T) {
	scratch, one, other := t.TempDir(), remover{name: "one"}, remover{name: "other"}
	here := func(trial *Trial) bool { _, err := os.Lstat(trial.Dir); return err == nil }

	first, second, foreign := begin(t, scratch, one), begin(t, scratch, one), begin(t, scratch, other)
	if !here(first) {
		t.Fatal("a probe that runs was taken for one that died")
	}
	must(t, first.End(t.Context()))
	if here(first) {
		t.Error("what a probe made is still there")
	}
	must(t, second.lock.Close()) // as a process that died
	must(t, foreign.lock.Close())
	must(t, os.WriteFile(filepath.Join(scratch, "cal-probe-file"), nil, 0o600))
	third := begin(t, scratch, one)
	if here(second) {
		t.Error("what a dead probe left is still there")
	}
	if !here(foreign) || !used(foreign.Machine()) {
		t.Error("another driver's was removed")
	}
	must(t, ClearTrials(t.Context(), scratch, one, other))
	if here(foreign) || !here(third) {
		t.Errorf("left by another driver: %v; of a probe that runs: %v", here(foreign), here(third))
	}
	must(t, third.End(t.Context()))

	left := begin(t, scratch, remover{"stuck", io.ErrNoProgress})
	must(t, left.lock.Close())
	if _, err := BeginTrial(t.Context(), scratch, remover{"stuck", io.ErrNoProgress}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("what cannot be removed: %v", err)
	}
}

// An empty root stays, and is the same for each probe; one of somebody else's is not taken.
func TestEmptyRoot(t *testing.T) {
	scratch := t.TempDir()
	root := func() string {
		trial := begin(t, scratch, remover{name: "one"})
		dir, err := trial.EmptyRoot()
		must(t, err)
		if entries, err := os.ReadDir(filepath.Join(dir, "usr")); err != nil || len(entries) > 0 {
			t.Errorf("%v (%v)", entries, err)
		}
		must(t, trial.End(t.Context()))
		return dir
	}
	first, second := root(), root()
	if _, err := os.Stat(first); err != nil || first != second {
		t.Errorf("%s and %s (%v)", first, second, err)
	}
	must(t, os.Chmod(filepath.Dir(first), 0o777))
	if third := root(); third == first {
		t.Errorf("%s, which others can write, was taken", third)
	}
}

// In a directory of everybody's, what others made is not looked at: their record could name
// processes and files of this user's.
func TestTrialsOfOthers(t *testing.T) {
	for name, foist := range map[string]func(dir string) error{
		"of another user": func(dir string) error { return os.Lchown(dir, 12345, 12345) },
		"open to others":  func(dir string) error { return os.Chmod(dir, 0o755) },
		"behind a link": func(dir string) error {
			aside := filepath.Join(filepath.Dir(dir), "aside")
			return errors.Join(os.Rename(dir, aside), os.Symlink(aside, dir))
		},
	} {
		if name == "of another user" && os.Geteuid() != 0 {
			continue // who is not root cannot give files away
		}
		scratch := t.TempDir()
		trial := begin(t, scratch, remover{name: "one"})
		must(t, trial.lock.Close())
		must(t, foist(trial.Dir))
		must(t, ClearTrials(t.Context(), scratch, remover{name: "one"}))
		if !used(trial.Machine()) {
			t.Errorf("%s: it was removed", name)
		}
	}
}
