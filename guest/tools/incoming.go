package tools

import (
	"context"
	"fmt"
	"io"
	"strings"

	"cal/nucleus"
)

// incoming takes a branch of another machine into a repository of this one. No file of a
// working tree changes.
func (w *worker) incoming(ctx context.Context, r io.Reader, in Incoming) (UnbundleResult, error) {
	var result UnbundleResult
	if err := checkRef(in.Branch); err != nil {
		return result, err
	}
	for _, id := range []string{in.Commit, in.Base} {
		if !objectID.MatchString(id) {
			return result, nucleus.Errorf(nucleus.KindInvalid, "commit %q is not an object id", id)
		}
	}
	rel, err := w.repository(in.Repo, nil)
	if err != nil {
		return result, err
	}
	g := w.exec.plumbing(rel)
	if _, err := g.run(ctx, "", "cat-file", "-e", in.Base+"^{commit}"); err != nil {
		return result, nucleus.Errorf(nucleus.KindConflict, "repository %q has lost commit %s, which the branch starts from", rel, in.Base)
	}
	old, err := g.branchAt(ctx, in.Branch)
	if err != nil {
		return result, err
	}
	if err := g.stream(ctx, r, io.Discard, "index-pack", "--stdin", "--fix-thin", "--strict"); err != nil {
		return result, err
	}
	if old != "" {
		if _, err := g.run(ctx, "", "merge-base", "--is-ancestor", old, in.Commit); err != nil {
			return result, nucleus.Errorf(nucleus.KindConflict, "branch %s has commits that the other machine's has not: rename it first", in.Branch)
		}
	}
	if _, err := g.run(ctx, fmt.Sprintf("update refs/heads/%s %s %s\n", in.Branch, in.Commit, orZero(old, in.Commit)), "update-ref", "--stdin"); err != nil {
		return result, err
	}
	return UnbundleResult{rel, in.Commit, in.Branch}, nil
}

// orZero is what update-ref takes for a ref that must not exist yet.
func orZero(old, like string) string {
	if old == "" {
		return strings.Repeat("0", len(like))
	}
	return old
}

// branchAt is where a branch is, "" where there is none. One that is checked out is an error.
func (g gitCall) branchAt(ctx context.Context, branch string) (string, error) {
	ref := "refs/heads/" + branch
	if head, err := g.run(ctx, "", "symbolic-ref", "--quiet", "HEAD"); err == nil && head == ref {
		return "", checkedOut(branch)
	}
	// A pattern also stands for all below it.
	listed, err := g.run(ctx, "", "for-each-ref", "--format=%(refname)%00%(objectname)%00%(worktreepath)", ref)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(listed) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), "\x00", 3)
		if len(fields) != 3 || fields[0] != ref {
			continue
		}
		if fields[2] != "" {
			return "", checkedOut(branch)
		}
		return fields[1], nil
	}
	return "", nil
}

func checkedOut(branch string) error {
	return nucleus.Errorf(nucleus.KindConflict, "branch %s is checked out here: switch to another one, or rename it", branch)
}
