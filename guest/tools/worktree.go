package tools

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"cal/nucleus"
)

// WorktreeRef, asked for in a Bundle, is a commit made on the spot that holds what lies in the
// repository's working tree, committed or not, ignored files left out. Without
// changes it is HEAD itself.
const WorktreeRef = "refs/cal/worktree"

// snapshot makes the commit of WorktreeRef in an index of its own, so that what
// the agent has staged stays as it is.
func (g gitCall) snapshot(ctx context.Context) error {
	g, err := g.withoutFilters(ctx)
	if err != nil {
		return err
	}
	head, err := g.run(ctx, "", "rev-parse", "--verify", "HEAD")
	if err != nil {
		return nucleus.Errorf(nucleus.KindNotFound, "the repository's HEAD is no commit")
	}
	status, err := g.run(ctx, "", "status", "--porcelain", "--untracked-files=normal", "--ignore-submodules=all")
	if err != nil {
		return err
	}
	commit := head
	if status != "" {
		if commit, err = g.commitTree(ctx, head); err != nil {
			return err
		}
	}
	_, err = g.run(ctx, "", "update-ref", WorktreeRef, commit)
	return err
}

func (g gitCall) commitTree(ctx context.Context, head string) (string, error) {
	own := g
	own.env = map[string]string{
		"GIT_INDEX_FILE":  ".git/cal-index",
		"GIT_AUTHOR_NAME": "cal", "GIT_AUTHOR_EMAIL": "cal@localhost", "GIT_COMMITTER_NAME": "cal", "GIT_COMMITTER_EMAIL": "cal@localhost",
	}
	for name, value := range g.env {
		own.env[name] = value
	}
	for _, step := range [][]string{{"read-tree", head}, {"add", "--all", "--ignore-errors"}} {
		if _, err := own.run(ctx, "", step...); err != nil {
			return "", err
		}
	}
	tree, err := own.run(ctx, "", "write-tree")
	if err != nil {
		return "", err
	}
	return own.run(ctx, "what lies in the working tree, not committed\n", "commit-tree", "-p", head, tree)
}

// withoutFilters takes the commands from the filters that the repository's
// configuration defines: what is added would pass through them. They are named one by
// one, because git has no setting for all. (By environment, not -c: a filter's name
// may hold an equals sign.)
func (g gitCall) withoutFilters(ctx context.Context) (gitCall, error) {
	// Exit code 1, no filter, is an error here too; then the output is empty.
	output := newKeeper(gitOutput)
	_ = g.stream(ctx, strings.NewReader(""), output, "config", "--null", "--name-only", "--get-regexp", `^filter\.`)
	listed := output.take()
	if listed.cut > 0 || listed.base64 != "" {
		return g, nucleus.Errorf(nucleus.KindFailed, "the repository defines too many filters, or one whose name is not UTF-8")
	}
	env := maps.Clone(g.env)
	count := 0
	for key := range strings.SplitSeq(listed.text, "\x00") {
		if key == "" {
			continue
		}
		value := ""
		if strings.HasSuffix(key, ".required") {
			value = "false"
		}
		env[fmt.Sprintf("GIT_CONFIG_KEY_%d", count)], env[fmt.Sprintf("GIT_CONFIG_VALUE_%d", count)] = key, value
		count++
	}
	env["GIT_CONFIG_COUNT"] = fmt.Sprint(count)
	g.env = env
	return g, nil
}
