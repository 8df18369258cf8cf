package workspace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"cal/internal/durable"
	"cal/internal/git"
	"cal/nucleus"
)

// Work is what a workspace holds of one repository, as last fetched from its machine.
type Work struct {
	Workspace string `json:"workspace"`
	Repo      string `json:"repo"`
	Path      string `json:"path"`
	Branch    string `json:"branch"`
	Base      string `json:"base"`
	Head      string `json:"head"`
	Worktree  string `json:"worktree"`
	dir       string // quarantine
}

// Works lists the repositories of all workspaces.
func (h Home) Works() ([]Work, error) {
	files, err := filepath.Glob(filepath.Join(h.Dir, "isolation", "vms", "*", "repos", "*.json"))
	if err != nil {
		return nil, err
	}
	works := []Work{}
	for _, f := range files {
		var s nucleus.RepoRecord
		if err := durable.Load(f, &s); err != nil {
			return nil, err
		}
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		w := Work{
			Workspace: filepath.Base(filepath.Dir(filepath.Dir(f))), Repo: name, Path: s.Path, Branch: s.Branch, Base: s.Base,
			Head: s.Head, Worktree: s.Worktree,
		}
		if s.Quarantine != "" {
			w.dir = filepath.Join(filepath.Dir(f), s.Quarantine)
		}
		works = append(works, w)
	}
	return works, nil
}

// Work finds the work on the repository at path; workspace may be empty where only
// one holds it.
func (h Home) Work(ctx context.Context, path, workspace string) (Work, error) {
	origin, err := git.Open(ctx, path)
	if err != nil {
		return Work{}, err
	}
	works, err := h.Works()
	if err != nil {
		return Work{}, err
	}
	var found []Work
	for _, w := range works {
		if w.Path == origin.Dir && (workspace == "" || w.Workspace == workspace) {
			found = append(found, w)
		}
	}
	switch {
	case len(found) == 0:
		return Work{}, fmt.Errorf("no workspace holds %s (cal run --repo %s ...)", origin.Dir, path)
	case len(found) > 1:
		return Work{}, fmt.Errorf("workspaces %s and %s hold %s: name one with --workspace", found[0].Workspace, found[1].Workspace, origin.Dir)
	case found[0].Head == "" || found[0].dir == "":
		return Work{}, fmt.Errorf("nothing has come back from workspace %s yet: its run did not end", found[0].Workspace)
	}
	return found[0], nil
}

// WorkspaceFor proposes a workspace name for a repository: its directory's name, with a
// number where another repository has taken it.
func (h Home) WorkspaceFor(repo string) (string, error) {
	works, err := h.Works()
	if err != nil {
		return "", err
	}
	taken := map[string]bool{}
	for _, w := range works {
		if w.Path == repo {
			return w.Workspace, nil
		}
		taken[w.Workspace] = true
	}
	base := RepoName(repo)
	name := base
	for i := 2; taken[name]; i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name, nil
}

// RepoName makes a directory's name into one that a workspace may bear.
func RepoName(path string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-' {
			return r
		}
		return '-'
	}, filepath.Base(path))
	name = strings.TrimLeft(name, ".-_")
	if name == "" {
		return "repo"
	}
	return name[:min(len(name), 60)]
}

var plainDiff = []string{"diff", "--no-ext-diff", "--no-textconv"}

// Diff writes what the agent changed: from the commit that was brought to what lies in its
// working tree, committed or not.
func (w Work) Diff(ctx context.Context, out io.Writer, colour, stat bool) error {
	args := append([]string(nil), plainDiff...)
	if colour {
		args = append(args, "--color=always")
	}
	if stat {
		args = append(args, "--stat=80")
	}
	return git.Repo{Dir: w.dir}.Stream(ctx, nil, out, append(args, w.Base, w.Worktree)...)
}

// Commits lists the agent's commits, newest first.
func (w Work) Commits(ctx context.Context) ([]string, error) {
	out, err := git.Repo{Dir: w.dir}.Run(ctx, "log", "--no-show-signature", "--no-color", "--format=%h %s", w.Base+".."+w.Head)
	if err != nil || strings.TrimSpace(out) == "" {
		return nil, err
	}
	return strings.Split(strings.TrimSpace(out), "\n"), nil
}

// Fetch brings the agent's branch into the person's repository as
// refs/heads/BRANCH; nothing is executed, no file of the working tree changes. A
// branch of that name that has other commits is left alone.
func (w Work) Fetch(ctx context.Context) (ref string, err error) {
	origin := git.Repo{Dir: w.Path}
	ref = "refs/heads/" + w.Branch
	if at, err := origin.Run(ctx, "symbolic-ref", "--quiet", "HEAD"); err == nil && strings.TrimSpace(at) == ref {
		return "", fmt.Errorf("%s is checked out in %s: its working tree would not match (git switch to another branch)", w.Branch, w.Path)
	}
	if w.Head == w.Base {
		return "", fmt.Errorf("branch %s has no commit beyond %.12s (cal repo apply brings what is not committed)", w.Branch, w.Base)
	}
	// No "+": a branch that would lose commits is refused.
	_, err = origin.Run(ctx, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-gc", "--refmap=", w.dir, w.Head+":"+ref)
	var failed *git.Error
	if errors.As(err, &failed) && strings.Contains(failed.Stderr, "non-fast-forward") {
		return "", fmt.Errorf("branch %s of %s has commits that the agent's has not; rename one of them", w.Branch, w.Path)
	}
	return ref, err
}

// ErrDirty says that a working tree has changes of its own.
var ErrDirty = errors.New("the working tree has changes of its own")

// Apply puts what the agent changed onto the person's working tree, uncommitted.
// A tree with changes of its own is refused, and so is a patch that does not fit whole.
func (w Work) Apply(ctx context.Context) error {
	origin := git.Repo{Dir: w.Path}
	status, err := origin.Run(ctx, "status", "--porcelain", "--untracked-files=normal", "--ignore-submodules=all")
	if err != nil {
		return err
	}
	if strings.TrimSpace(status) != "" {
		return fmt.Errorf("%w: %s (git stash, or commit them)", ErrDirty, firstLine(status))
	}
	var patch bytes.Buffer
	args := append(append([]string(nil), plainDiff...), "--no-color", "--binary", "--full-index", w.Base, w.Worktree)
	if err := (git.Repo{Dir: w.dir}).Stream(ctx, nil, &patch, args...); err != nil {
		return err
	}
	if patch.Len() == 0 {
		return errors.New("the agent changed nothing")
	}
	file, err := os.CreateTemp("", "cal-apply-*.patch")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if _, err := file.Write(patch.Bytes()); err != nil {
		return err
	}
	if _, err := origin.Run(ctx, "apply", "--whitespace=nowarn", file.Name()); err != nil {
		return fmt.Errorf("%w; nothing was changed", err)
	}
	return nil
}

func firstLine(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(lines) == 1 {
		return strings.TrimSpace(lines[0])
	}
	return fmt.Sprintf("%s and %d more", strings.TrimSpace(lines[0]), len(lines)-1)
}
