package git

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// How commits travel: as a pack, never by a transport of git's. A fetch would read the
// remotes, the upload-pack and the alternate-refs command that a configuration names.

// WriteBundle writes a bundle of commit, which it names HEAD, with its history as far as it
// lies here.
func (r Repo) WriteBundle(ctx context.Context, out io.Writer, commit string) error {
	if _, err := fmt.Fprintf(out, "# v2 git bundle\n%s HEAD\n\n", commit); err != nil {
		return err
	}
	err := r.WritePack(ctx, out, commit)
	if promisor, _ := r.Run(ctx, "config", "--get-regexp", `^(extensions\.partialclone|remote\..*\.promisor)$`); err != nil && promisor != "" && ctx.Err() == nil {
		return fmt.Errorf("%s is a partial clone and lacks objects of %.12s: %w (git fetch --refetch --no-filter)", r.Dir, commit, err)
	}
	return err
}

// WritePack writes all objects of commit but those of the commits in without.
func (r Repo) WritePack(ctx context.Context, out io.Writer, commit string, without ...string) error {
	revisions := commit + "\n"
	for _, id := range without {
		revisions += "^" + id + "\n"
	}
	return r.Stream(ctx, strings.NewReader(revisions), out, "pack-objects", "-q", "--revs", "--stdout", "--thin", "--delta-base-offset")
}

// unpack takes a pack in. Every object is checked, and what it builds on must be here.
func (r Repo) unpack(ctx context.Context, in io.Reader) error {
	return r.Stream(ctx, in, io.Discard, "index-pack", "--stdin", "--fix-thin", "--strict", "--fsck-objects")
}

// Shallow returns the commits of the history of commit whose parents the repository was
// cloned without.
func (r Repo) Shallow(ctx context.Context, commit string) ([]string, error) {
	path, err := r.Run(ctx, "rev-parse", "--path-format=absolute", "--git-path", "shallow")
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(strings.TrimSuffix(path, "\n"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	boundary := strings.Fields(string(raw))
	if len(boundary) == 0 {
		return nil, nil
	}
	// Those of other branches are not of this history, and not the machine's to know.
	history, err := r.Run(ctx, "rev-list", commit)
	if err != nil {
		return nil, err
	}
	own := map[string]bool{}
	for id := range strings.FieldsSeq(history) {
		own[id] = true
	}
	return slices.DeleteFunc(boundary, func(id string) bool { return !own[id] }), nil
}

// Quarantine is a bare repository of the host's that takes what a machine sends.
// Nothing in it is ever checked out or executed.
type Quarantine struct {
	Repo
}

// MakeQuarantine makes the quarantine at dir, where there is nothing yet. It borrows the objects of
// origin, the person's repository, so that only what is new crosses the wire.
func MakeQuarantine(ctx context.Context, dir string, origin Repo) (Quarantine, error) {
	q := Quarantine{Repo{dir}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return q, err
	}
	if _, err := q.Run(ctx, "init", "--quiet", "--bare", "--template=", "."); err != nil {
		return q, err
	}
	paths, err := origin.Run(ctx, "rev-parse", "--path-format=absolute", "--git-path", "objects", "--git-path", "shallow")
	if err != nil {
		return q, err
	}
	objects, shallow, _ := strings.Cut(strings.TrimSuffix(paths, "\n"), "\n")
	if strings.Contains(shallow, "\n") {
		return q, fmt.Errorf("the path of %q has a line break in it", origin.Dir)
	}
	if raw, err := os.ReadFile(shallow); err == nil {
		if err := os.WriteFile(filepath.Join(dir, "shallow"), raw, 0o600); err != nil {
			return q, err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return q, err
	}
	info := filepath.Join(dir, "objects", "info")
	if err := os.MkdirAll(info, 0o700); err != nil {
		return q, err
	}
	return q, os.WriteFile(filepath.Join(info, "alternates"), []byte(objects+"\n"), 0o600)
}

// Take brings ref of a bundle, which the machine made, to the same ref here. Every
// object is checked.
func (q Quarantine) Take(ctx context.Context, bundle io.Reader, ref string) (commit string, err error) {
	reader := bufio.NewReader(bundle)
	if commit, err = bundleHead(reader, ref); err != nil {
		return "", err
	}
	if err := q.unpack(ctx, reader); err != nil {
		return "", err
	}
	got, err := q.Resolve(ctx, commit)
	if err != nil || got != commit {
		return "", fmt.Errorf("the bundle names %s as %s, which it does not hold", commit, ref)
	}
	_, err = q.Run(ctx, "update-ref", ref, commit)
	return commit, err
}

// bundleHead reads the head of a bundle up to its pack (gitformat-bundle(5), version
// 2 and 3) and returns the commit that it names for ref. Any other ref is refused.
func bundleHead(r *bufio.Reader, ref string) (commit string, err error) {
	const longest = 1 << 20
	for read := 0; read < longest; {
		line, err := r.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("the head of the bundle: %w", err)
		}
		first := read == 0
		read += len(line)
		line = strings.TrimSuffix(line, "\n")
		switch {
		case first && (line == "# v2 git bundle" || line == "# v3 git bundle"):
		case first:
			return "", errors.New("not a git bundle")
		case line == "" && commit == "":
			return "", fmt.Errorf("the bundle does not hold %s", ref)
		case line == "":
			return commit, nil
		case line[0] == '-' || line[0] == '@':
		default:
			id, name, _ := strings.Cut(line, " ")
			if name != ref || commit != "" || len(id) < 40 || strings.Trim(id, "0123456789abcdef") != "" {
				return "", fmt.Errorf("the bundle holds %q, want %s alone", line, ref)
			}
			commit = id
		}
	}
	return "", errors.New("the head of the bundle has no end")
}

// Give brings commit, which builds on base, to the branch of the person's repository to.
// No file of a working tree changes; a branch that would lose commits, or that is checked
// out somewhere, is left alone.
func (q Quarantine) Give(ctx context.Context, to Repo, branch, commit, base string) error {
	ref := "refs/heads/" + branch
	old, err := to.branchAt(ctx, ref)
	if err != nil {
		return err
	}
	reader, writer := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := q.WritePack(ctx, writer, commit, base)
		writer.CloseWithError(err)
		packed <- err
	}()
	err = to.unpack(ctx, reader)
	reader.CloseWithError(errors.New("index-pack ended"))
	if packErr := <-packed; packErr != nil && err == nil {
		err = packErr
	}
	if err != nil {
		return err
	}
	if old != "" {
		switch forward, err := to.IsAncestor(ctx, old, commit); {
		case err != nil:
			return err
		case !forward:
			return fmt.Errorf("branch %s of %s has commits that the agent's has not (git branch -m %s ANOTHER-NAME)", branch, to.Dir, branch)
		}
	}
	if old == "" {
		old = strings.Repeat("0", len(commit)) // must not exist
	}
	_, err = to.Run(ctx, "update-ref", "-m", "cal repo fetch", ref, commit, old)
	return err
}

// branchAt returns where a branch is, "" where there is none. One that a working tree is on is
// an error.
func (r Repo) branchAt(ctx context.Context, ref string) (commit string, err error) {
	busy := func(where string) error {
		return fmt.Errorf("%s is checked out in %s: its working tree would not match (git switch to another branch)", strings.TrimPrefix(ref, "refs/heads/"), where)
	}
	bare, err := r.Bare(ctx)
	if err != nil {
		return "", err
	}
	if head, err := r.Run(ctx, "symbolic-ref", "--quiet", "HEAD"); err == nil && !bare && strings.TrimSpace(head) == ref {
		return "", busy(r.Dir) // also one that has no commit yet
	}
	// A pattern also stands for all below it.
	listed, err := r.Run(ctx, "for-each-ref", "--format=%(refname)%00%(objectname)%00%(worktreepath)%00", ref)
	if err != nil {
		return "", err
	}
	fields := strings.Split(listed, "\x00")
	for i := 0; i+2 < len(fields); i += 3 {
		if strings.TrimPrefix(fields[i], "\n") != ref {
			continue
		}
		if where := fields[i+2]; where != "" && !(bare && where == r.Dir) {
			return "", busy(where)
		}
		return fields[i+1], nil
	}
	return "", nil
}

// Push sends commit to ref of url if ref is still at old there (all zeros: does not exist).
// It uses the person's own credentials and settings, and no name from the machine but ref.
func (q Quarantine) Push(ctx context.Context, url, commit, ref, old string) error {
	lease := old
	if strings.Trim(old, "0") == "" {
		lease = ""
	}
	// The URL may stand in a stranger's configuration, and a remote helper is a program: git's own
	// transports alone. A hook of the person's would be run on names that the agent chose.
	env := append(slices.DeleteFunc(os.Environ(), ofAnotherRepository), "GIT_TERMINAL_PROMPT=0", "GIT_ALLOW_PROTOCOL="+pushProtocols, "LC_ALL=C")
	args := append(slices.Clone(pushSettings), "push", "--quiet", "--no-follow-tags", "--recurse-submodules=no", "--force-with-lease="+ref+":"+lease, "--", url, commit+":"+ref)
	ctx, cancel := context.WithTimeout(ctx, commandDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir, cmd.Env = q.Dir, env
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("git push: %s", WithoutCredentials(lastLines(string(out), 3)))
	}
	return nil
}

// ofAnotherRepository reports whether a variable says where a repository lies: git sets some for
// its hooks and aliases, and a node that was started from one has them as long as it lives.
func ofAnotherRepository(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return slices.Contains([]string{
		"GIT_DIR", "GIT_COMMON_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES",
		"GIT_SHALLOW_FILE", "GIT_GRAFT_FILE", "GIT_NAMESPACE", "GIT_PREFIX",
	}, name)
}

// The walls of Push.
var (
	pushProtocols = "https:http:ssh:git:file"
	pushSettings  = []string{"-c", "core.hooksPath=/dev/null"}
)
