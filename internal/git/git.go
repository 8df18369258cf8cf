// Package git runs the git program on the host without letting a repository run
// anything.
//
// What comes out of a machine was written by an agent, and what lies in a
// person's repository may have been written by a stranger: both may name programs in
// hooks, filters, fsmonitor, external diffs, transports. The package promises that
// git alone is executed: it runs the commands of one table, each with what takes the programs
// from it, with no configuration but the repository's own and no transport. Every
// entry of that table and of the settings beside it stands against an attack that the
// tests make, and which succeeds without the entry. Push is the exception that is said: it
// reaches the person's remote with the person's credentials.
package git

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// Repo is a repository on the host.
type Repo struct {
	Dir string
}

// Error is a git command that failed.
type Error struct {
	Args   []string
	Stderr string
	Code   int
}

func (e *Error) Error() string {
	line := lastLines(e.Stderr, 1)
	if line == "" {
		line = fmt.Sprintf("exit code %d", e.Code)
	}
	return fmt.Sprintf("git %s: %s", e.Args[0], line)
}

// Exit reports whether err is git's exit code code.
func Exit(err error, code int) bool {
	var failed *Error
	return errors.As(err, &failed) && failed.Code == code
}

// commands are all that Run and Stream run, with the options without which a command
// starts what a repository names. A command that is not here is refused: nobody has attacked it.
var commands = map[string][]string{
	"apply":            nil,
	"cat-file":         nil,
	"check-ref-format": nil,
	"config":           nil,
	"diff":             {"--no-ext-diff", "--no-textconv", "--submodule=short"},
	"for-each-ref":     nil,
	"grep":             nil,
	"index-pack":       nil,
	"init":             nil,
	"log":              {"--no-textconv", "--no-show-signature", "--submodule=short"},
	"ls-tree":          nil,
	"merge-base":       nil,
	"pack-objects":     nil,
	"rev-list":         nil,
	"rev-parse":        nil,
	"status":           {"--ignore-submodules=all"},
	"symbolic-ref":     nil,
	"update-ref":       nil,
}

// filtering are those of them that read or write a working tree, through filters.
var filtering = map[string]bool{"apply": true, "diff": true, "status": true}

// settings override what a repository's own configuration says, for every command.
var settings = []string{
	"core.hooksPath=/dev/null", // status runs post-index-change, update-ref reference-transaction
	"core.fsmonitor=false",
	"core.quotePath=false", // no wall: names are shown as they are
}

// environment is git's. GIT_ALLOW_PROTOCOL=none stands before every transport, also for an
// object that a partial clone has left with its promisor.
var environment = []string{
	"HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_ALLOW_PROTOCOL=none", "GIT_NO_REPLACE_OBJECTS=1", "LC_ALL=C",
}

const commandDeadline = 10 * time.Minute

// Run runs git in the repository and returns what it printed.
func (r Repo) Run(ctx context.Context, args ...string) (string, error) {
	var out bytes.Buffer
	err := r.Stream(ctx, nil, &out, args...)
	return out.String(), err
}

// Stream runs git with the given input and output.
func (r Repo) Stream(ctx context.Context, in io.Reader, out io.Writer, args ...string) error {
	options, known := commands[args[0]]
	if !known {
		return fmt.Errorf("git %s is none of the commands that may run here", args[0])
	}
	var filters [][2]string
	if filtering[args[0]] {
		var err error
		if filters, err = r.withoutFilters(ctx); err != nil {
			return err
		}
	}
	return r.run(ctx, in, out, filters, append(append([]string{args[0]}, options...), args[1:]...))
}

// run runs git with values for the settings that filters are made of.
func (r Repo) run(ctx context.Context, in io.Reader, out io.Writer, filters [][2]string, args []string) error {
	ctx, cancel := context.WithTimeout(ctx, commandDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = r.Dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, environment...)
	cmd.Env = append(cmd.Env, configured(append(overrides(), filters...))...)
	cmd.Stdin = in
	if out != nil {
		cmd.Stdout = struct{ io.Writer }{out} // a pipe, whatever out is: on a terminal git starts a pager
	}
	// A Ctrl-C at the terminal is the caller's to hear: git ends when ctx does.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stderr bytes.Buffer
	cmd.Stderr = &limitedBuffer{&stderr, 64 << 10}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("git %s: %w", args[0], ctx.Err())
	case errors.As(err, &exit):
		return &Error{args, stderr.String(), exit.ExitCode()}
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("git is not installed")
	}
	return err
}

// overrides are the settings, and the one by which a repository of another user is read at
// all: git's reason against that is what its configuration could run.
func overrides() [][2]string {
	pairs := [][2]string{{"safe.directory", "*"}}
	for _, s := range settings {
		key, value, _ := strings.Cut(s, "=")
		pairs = append(pairs, [2]string{key, value})
	}
	return pairs
}

// configured hands settings over in the environment. An option -c would be cut at the first
// equals sign, which the name of a filter may hold.
func configured(pairs [][2]string) []string {
	env := []string{fmt.Sprintf("GIT_CONFIG_COUNT=%d", len(pairs))}
	for i, p := range pairs {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, p[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, p[1]))
	}
	return env
}

// withoutFilters takes the programs from the filters that the repository's configuration
// defines and attributes in a tree select. They are named one by one, because git has no
// setting for all.
func (r Repo) withoutFilters(ctx context.Context) ([][2]string, error) {
	var out bytes.Buffer
	err := r.run(ctx, nil, &out, nil, []string{"config", "--null", "--name-only", "--get-regexp", `^filter\.`})
	if Exit(err, 1) || Exit(err, 128) {
		return nil, nil // no such key; no repository, or one that the command itself will not read either
	}
	if err != nil {
		return nil, err
	}
	var pairs [][2]string
	for key := range strings.SplitSeq(strings.TrimSuffix(out.String(), "\x00"), "\x00") {
		value := ""
		if strings.HasSuffix(key, ".required") {
			value = "false"
		}
		pairs = append(pairs, [2]string{key, value})
	}
	return pairs, nil
}

type limitedBuffer struct {
	*bytes.Buffer
	room int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	n := min(len(p), b.room)
	b.Buffer.Write(p[:n])
	b.room -= n
	return len(p), nil
}

// Open returns the repository that holds dir: the top of its working tree, or
// the bare repository itself.
func Open(ctx context.Context, dir string) (Repo, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return Repo{}, err
	}
	if info, err := os.Stat(abs); err != nil {
		return Repo{}, err
	} else if !info.IsDir() {
		return Repo{}, fmt.Errorf("%s is no directory", abs)
	}
	at := Repo{abs}
	if top, err := at.Run(ctx, "rev-parse", "--show-toplevel"); err == nil {
		return Repo{strings.TrimSuffix(top, "\n")}, nil
	} else if ctx.Err() != nil {
		return Repo{}, ctx.Err()
	}
	dirs, err := at.Run(ctx, "rev-parse", "--is-bare-repository", "--absolute-git-dir")
	if err != nil {
		return Repo{}, fmt.Errorf("%s is in no git repository that can be read: %w", abs, err)
	}
	bare, dir, _ := strings.Cut(dirs, "\n")
	if bare != "true" {
		return Repo{}, fmt.Errorf("%s is inside of a .git directory (name the working tree)", abs)
	}
	return Repo{strings.TrimSuffix(dir, "\n")}, nil
}

// Bare reports whether the repository has no working tree.
func (r Repo) Bare(ctx context.Context) (bool, error) {
	out, err := r.Run(ctx, "rev-parse", "--is-bare-repository")
	return strings.TrimSpace(out) == "true", err
}

// Resolve returns the commit id that a name stands for.
func (r Repo) Resolve(ctx context.Context, name string) (string, error) {
	out, err := r.Run(ctx, "rev-parse", "--verify", "--quiet", "--end-of-options", name+"^{commit}")
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("%s: no commit %q", r.Dir, name)
	}
	id := strings.TrimSpace(out)
	if len(id) != 40 {
		return "", fmt.Errorf("%s names its objects by SHA-256, which cannot be handed over yet", r.Dir)
	}
	return id, nil
}

// Head returns the commit that is checked out.
func (r Repo) Head(ctx context.Context) (string, error) {
	id, err := r.Resolve(ctx, "HEAD")
	if err != nil && ctx.Err() == nil {
		if branch, unborn := r.Run(ctx, "symbolic-ref", "--quiet", "--short", "HEAD"); unborn == nil {
			if _, err := r.Run(ctx, "rev-parse", "--verify", "--quiet", "HEAD"); err != nil {
				return "", fmt.Errorf("%s has no commit yet on branch %s (git commit first)", r.Dir, strings.TrimSpace(branch))
			}
		}
	}
	return id, err
}

// Remotes returns name -> URL of the repository's own configuration.
func (r Repo) Remotes(ctx context.Context) (map[string]string, error) {
	out, err := r.Run(ctx, "config", "--null", "--get-regexp", `^remote\..*\.url$`)
	remotes := map[string]string{}
	if Exit(err, 1) {
		return remotes, nil
	}
	if err != nil {
		return nil, err
	}
	for _, record := range strings.Split(strings.TrimSuffix(out, "\x00"), "\x00") {
		key, url, ok := strings.Cut(record, "\n")
		if ok {
			remotes[strings.TrimSuffix(strings.TrimPrefix(key, "remote."), ".url")] = url
		}
	}
	return remotes, nil
}

// IsAncestor reports whether commit is in the history of of.
func (r Repo) IsAncestor(ctx context.Context, commit, of string) (bool, error) {
	_, err := r.Run(ctx, "merge-base", "--is-ancestor", commit, of)
	if Exit(err, 1) {
		return false, nil
	}
	return err == nil, err
}

// CheckRef reports whether name is a well-formed full ref name.
func CheckRef(ctx context.Context, name string) error {
	if _, err := (Repo{"/"}).Run(ctx, "check-ref-format", name); err != nil {
		return fmt.Errorf("%q is no valid ref name", name)
	}
	return nil
}

var userinfo = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*)://([^/\s]*)@`)

// WithoutCredentials drops users and passwords of the URLs in a text; of an ssh URL the
// user stays, who is no secret.
func WithoutCredentials(text string) string {
	return userinfo.ReplaceAllStringFunc(text, func(found string) string {
		parts := userinfo.FindStringSubmatch(found)
		user, _, _ := strings.Cut(parts[2], ":")
		if strings.Contains(parts[1], "ssh") {
			return parts[1] + "://" + user + "@"
		}
		return parts[1] + "://"
	})
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// PersonalSetting returns one of the person's own settings, seen from dir; "" where
// it is not set. git config reads files and runs nothing.
func PersonalSetting(ctx context.Context, dir, name string) string {
	cmd := exec.CommandContext(ctx, "git", "-c", "safe.directory=*", "config", "--get", name)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// Difference returns the hunks between two texts, which lie in files below dir meanwhile.
func Difference(ctx context.Context, dir string, before, after []byte) (hunks string, err error) {
	place, err := os.MkdirTemp(dir, "difference-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(place)) }()
	for name, content := range map[string][]byte{"before": before, "after": after} {
		if err := os.WriteFile(filepath.Join(place, name), content, 0o600); err != nil {
			return "", err
		}
	}
	out, err := Repo{place}.Run(ctx, "diff", "--no-index", "--no-color", "before", "after")
	if err != nil && !Exit(err, 1) { // 1: they differ
		return "", err
	}
	if at := strings.Index(out, "\n@@ "); at >= 0 {
		return out[at+1:], nil
	}
	return out, nil // binary, or the same
}
