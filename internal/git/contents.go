package git

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// Submodule is a commit of another repository that a tree records at a path.
type Submodule struct {
	Path   string // relative to the repository that was asked
	Commit string
	Repo   Repo   // checked out there
	Absent string // why it cannot be handed over; empty: Repo holds Commit
}

// maxDepth bounds submodules of submodules.
const maxDepth = 8

// Submodules lists the submodules of a commit and theirs, outer ones first.
func (r Repo) Submodules(ctx context.Context, commit string) ([]Submodule, error) {
	bare, err := r.Bare(ctx)
	if err != nil {
		return nil, err
	}
	return r.submodules(ctx, commit, bare, maxDepth)
}

func (r Repo) submodules(ctx context.Context, commit string, bare bool, depth int) ([]Submodule, error) {
	listed, err := r.Run(ctx, "ls-tree", "-r", "-z", "--full-tree", commit)
	if err != nil {
		return nil, err
	}
	var found []Submodule
	for entry := range strings.SplitSeq(listed, "\x00") {
		if !strings.HasPrefix(entry, "160000 ") {
			continue
		}
		facts, path, _ := strings.Cut(entry, "\t")
		sub := Submodule{Path: path, Commit: strings.Fields(facts)[2]}
		switch {
		case depth == 0:
			sub.Absent = "submodules are nested too deep"
		case bare:
			sub.Absent = "a bare repository has no submodules"
		default:
			sub.Repo, sub.Absent = r.checkedOut(ctx, sub)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		found = append(found, sub)
		if sub.Absent != "" {
			continue
		}
		inner, err := sub.Repo.submodules(ctx, sub.Commit, false, depth-1)
		if err != nil {
			return nil, err
		}
		for _, s := range inner {
			s.Path = path + "/" + s.Path
			found = append(found, s)
		}
	}
	return found, nil
}

// checkedOut finds the repository of a submodule, or says why it cannot be handed over. A link on
// the way to it could lead to another repository of the person: git names the place that it found.
func (r Repo) checkedOut(ctx context.Context, sub Submodule) (Repo, string) {
	hidden := func(name string) bool { return strings.HasPrefix(name, ".") }
	if slices.ContainsFunc(strings.Split(sub.Path, "/"), hidden) {
		return Repo{}, "a name in its path begins with a dot"
	}
	dir := filepath.Join(r.Dir, sub.Path)
	repo, err := Open(ctx, dir)
	if err != nil || repo.Dir != dir {
		return Repo{}, fmt.Sprintf("not checked out (git -C %s submodule update --init %s)", r.Dir, sub.Path)
	}
	if id, err := repo.Resolve(ctx, sub.Commit); err != nil || id != sub.Commit {
		return Repo{}, fmt.Sprintf("its commit %.12s is not there (git -C %s submodule update %s)", sub.Commit, r.Dir, sub.Path)
	}
	return repo, ""
}

// LargeFiles lists the files of a commit that are pointers of Git LFS: what they point to is not
// in git.
func (r Repo) LargeFiles(ctx context.Context, commit string) ([]string, error) {
	const pointer = "^version https://git-lfs.github.com/spec/v1$"
	// Pointers stand where attributes ask for them; without any, not every file is read.
	if asked, err := r.grep(ctx, commit, "filter=lfs", ":(top,glob)**/.gitattributes"); err != nil || len(asked) == 0 {
		return nil, err
	}
	return r.grep(ctx, commit, pointer, ":(top)")
}

func (r Repo) grep(ctx context.Context, commit, pattern, where string) ([]string, error) {
	out, err := r.Run(ctx, "grep", "-l", "-z", "--full-name", "-e", pattern, commit, "--", where)
	if Exit(err, 1) {
		return nil, nil
	}
	var names []string
	for name := range strings.SplitSeq(strings.TrimSuffix(out, "\x00"), "\x00") {
		names = append(names, strings.TrimPrefix(name, commit+":"))
	}
	return names, err
}
