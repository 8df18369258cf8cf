package workspace

import (
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
		if s.Pending { // a run was cut off before the machine had it
			continue
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

// Diff writes what the agent changed: from the commit that was brought to what lies in its
// working tree, committed or not.
func (w Work) Diff(ctx context.Context, out io.Writer, colour, stat bool) error {
	args := []string{"diff"}
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
	out, err := git.Repo{Dir: w.dir}.Run(ctx, "log", "--no-color", "--format=%h %s", w.Base+".."+w.Head)
	if err != nil || strings.TrimSpace(out) == "" {
		return nil, err
	}
	return strings.Split(strings.TrimSpace(out), "\n"), nil
}

// Fetch brings the agent's branch into the person's repository as
// refs/heads/BRANCH; nothing is executed, no file of the working tree changes. A
// branch of that name that has other commits is left alone.
func (w Work) Fetch(ctx context.Context) (ref string, err error) {
	if w.Head == w.Base {
		return "", fmt.Errorf("branch %s has no commit beyond %.12s (cal repo apply brings what is not committed)", w.Branch, w.Base)
	}
	return "refs/heads/" + w.Branch, git.Quarantine{Repo: git.Repo{Dir: w.dir}}.Give(ctx, git.Repo{Dir: w.Path}, w.Branch, w.Head, w.Base)
}

// Submodules lists the submodules that the agent moved. Their commits are in the machine alone.
func (w Work) Submodules(ctx context.Context) ([]string, error) {
	changes, err := w.changes(ctx)
	var moved []string
	for _, c := range changes {
		if c.submodule {
			moved = append(moved, c.path)
		}
	}
	return moved, err
}

// change is a path at which the agent's tree is not the person's.
type change struct {
	path      string
	submodule bool // before or after
}

func (w Work) changes(ctx context.Context) ([]change, error) {
	raw, err := git.Repo{Dir: w.dir}.Run(ctx, "diff", "--raw", "--no-renames", "-z", w.Base, w.Worktree)
	if err != nil {
		return nil, err
	}
	var changes []change
	fields := strings.Split(raw, "\x00")
	for i := 0; i+1 < len(fields); i += 2 { // ":100644 100755 ID ID M", path
		changes = append(changes, change{fields[i+1], strings.Contains(fields[i][:min(14, len(fields[i]))], "160000")})
	}
	return changes, nil
}

// ErrDirty says that a working tree has changes of its own.
var ErrDirty = errors.New("the working tree has changes of its own")

// Apply puts what the agent changed onto the person's working tree, uncommitted, and returns
// the paths that it left out: submodules. A tree with changes of its own is refused, and
// so is a patch that does not fit whole. Once it has begun it is not called off: whether
// it succeeds or fails, the tree is as it should be or as it was.
func (w Work) Apply(ctx context.Context) (left []string, err error) {
	origin := git.Repo{Dir: w.Path}
	if bare, err := origin.Bare(ctx); err != nil || bare {
		return nil, errors.Join(err, fmt.Errorf("%s has no working tree (cal repo fetch brings the commits)", w.Path))
	}
	status, err := origin.Run(ctx, "status", "--porcelain", "--untracked-files=no")
	if err != nil {
		return nil, err
	}
	if strings.TrimSpace(status) != "" {
		return nil, fmt.Errorf("%w: %s (git stash, or commit them)", ErrDirty, firstLine(status))
	}
	changes, err := w.changes(ctx)
	if err != nil {
		return nil, err
	}
	patch := []string{"diff", "--no-color", "--binary", "--full-index", "--no-renames", w.Base, w.Worktree, "--", ":(top)"}
	var paths []string
	for _, c := range changes {
		if c.submodule {
			left = append(left, c.path)
			patch = append(patch, ":(top,exclude,literal)"+c.path)
		} else {
			paths = append(paths, c.path)
		}
	}
	if len(paths) == 0 {
		return left, errors.New("the agent changed nothing that can be applied")
	}
	file, err := os.CreateTemp("", "cal-apply-*.patch")
	if err != nil {
		return nil, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if err := (git.Repo{Dir: w.dir}).Stream(ctx, nil, file, patch...); err != nil {
		return nil, err
	}
	if _, err := origin.Run(ctx, "apply", "--check", "--whitespace=nowarn", file.Name()); err != nil {
		return nil, conflicts(err)
	}
	return left, w.applyWhole(context.WithoutCancel(ctx), origin, file.Name(), paths)
}

// applyWhole applies a patch that fits, or puts back what was there. Git takes a file away before it
// writes the new one, so that a link keeps the old one.
func (w Work) applyWhole(ctx context.Context, origin git.Repo, patch string, paths []string) error {
	kept, err := keepFiles(ctx, origin, paths)
	if err != nil {
		return fmt.Errorf("%w; nothing was changed", err)
	}
	defer kept.drop()
	if _, err := origin.Run(ctx, "apply", "--whitespace=nowarn", patch); err != nil {
		if back := kept.putBack(); back != nil {
			return fmt.Errorf("%w; and what was there could not be put back: %w", err, back)
		}
		return conflicts(err)
	}
	return nil
}

// conflicts names each place at which a patch does not fit.
func conflicts(err error) error {
	var failed *git.Error
	if !errors.As(err, &failed) {
		return err
	}
	var why []string
	for line := range strings.Lines(failed.Stderr) {
		if what, ok := strings.CutPrefix(strings.TrimSpace(line), "error: "); ok && !strings.HasPrefix(what, "patch failed: ") {
			why = append(why, what)
		}
	}
	if len(why) == 0 {
		return fmt.Errorf("%w; nothing was changed", err)
	}
	return fmt.Errorf("%s; nothing was changed (cal repo fetch, and merge the branch)", strings.Join(why, "; "))
}

func firstLine(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(lines) == 1 {
		return strings.TrimSpace(lines[0])
	}
	return fmt.Sprintf("%s and %d more", strings.TrimSpace(lines[0]), len(lines)-1)
}
