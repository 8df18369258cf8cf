// Package git runs the git program on the host without letting a repository run
// anything.
//
// What comes out of a machine was written by an agent, and what lies in a
// person's repository may name programs: hooks, filters, fsmonitor, external diffs,
// transports. The package promises that a command here executes git alone: no
// hook, no filter, no pager, no prompt, no transport but those named, no
// configuration but the repository's own, of which everything that could run a program is
// overridden. Push is the exception that is said: it uses the person's credentials.
package git

import (
	"bufio"
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
	line := strings.TrimSpace(e.Stderr)
	if i := strings.LastIndexByte(line, '\n'); i >= 0 {
		line = line[i+1:]
	}
	if line == "" {
		line = fmt.Sprintf("exit code %d", e.Code)
	}
	return fmt.Sprintf("git %s: %s", e.Args[0], line)
}

// hardening overrides every setting by which git starts a program.
var hardening = []string{
	"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.pager=cat", "-c", "core.askPass=", "-c", "core.sshCommand=false",
	"-c", "core.attributesFile=/dev/null", "-c", "core.editor=false", "-c", "sequence.editor=false", "-c", "credential.helper=",
	"-c", "protocol.allow=never", "-c", "protocol.file.allow=always", "-c", "gc.auto=0", "-c", "maintenance.auto=false",
	"-c", "diff.external=", "-c", "gpg.program=false", "-c", "commit.gpgSign=false", "-c", "tag.gpgSign=false", "-c", "uploadpack.packObjectsHook=",
	"-c", "submodule.recurse=false", "-c", "fetch.recurseSubmodules=false", "-c", "transfer.fsckObjects=true", "-c", "core.quotePath=false",
}

func environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_TERMINAL_PROMPT=0", "GIT_ALLOW_PROTOCOL=file",
		"GIT_NO_LAZY_FETCH=1", "GIT_NO_REPLACE_OBJECTS=1", "GIT_ATTR_NOSYSTEM=1",
	}
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
	drivers, err := r.neutralDrivers(ctx)
	if err != nil {
		return err
	}
	return r.run(ctx, in, out, environment(), append(drivers, args...), args)
}

func (r Repo) run(ctx context.Context, in io.Reader, out io.Writer, env, args, shown []string) error {
	ctx, cancel := context.WithTimeout(ctx, commandDeadline)
	defer cancel()
	full := append(append([]string{"-c", "safe.directory=*"}, hardening...), args...)
	cmd := exec.CommandContext(ctx, "git", full...)
	cmd.Dir = r.Dir
	cmd.Env = env
	cmd.Stdin, cmd.Stdout = in, out
	var stderr bytes.Buffer
	cmd.Stderr = &limitedBuffer{&stderr, 64 << 10}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("git %s: %w", shown[0], ctx.Err())
	case errors.As(err, &exit):
		return &Error{shown, stderr.String(), exit.ExitCode()}
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("git is not installed")
	}
	return err
}

// neutralDrivers overrides the filter, diff and merge drivers that the
// repository's own configuration names: attributes in a tree can select them.
func (r Repo) neutralDrivers(ctx context.Context) ([]string, error) {
	var out bytes.Buffer
	err := r.run(ctx, nil, &out, environment(), []string{"config", "--null", "--name-only", "--get-regexp", `^(filter|diff|merge)\..*\.(clean|smudge|process|command|textconv|driver|required)$`}, []string{"config"})
	var failed *Error
	if errors.As(err, &failed) && failed.Code == 1 {
		return nil, nil // no such key
	}
	if errors.As(err, &failed) && strings.Contains(failed.Stderr, "not a git repository") {
		return nil, nil // init and bundle verify run outside of one
	}
	if err != nil {
		return nil, err
	}
	var args []string
	for _, key := range strings.Split(strings.TrimSuffix(out.String(), "\x00"), "\x00") {
		value := ""
		if strings.HasSuffix(key, ".required") {
			value = "false"
		}
		args = append(args, "-c", key+"="+value)
	}
	return args, nil
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
	if _, err := os.Stat(abs); err != nil {
		return Repo{}, err
	}
	top, err := Repo{abs}.Run(ctx, "rev-parse", "--show-toplevel")
	if err != nil {
		return Repo{}, fmt.Errorf("%s is not in a git repository with a working tree", abs)
	}
	return Repo{strings.TrimSuffix(top, "\n")}, nil
}

// Resolve returns the commit id that a name stands for.
func (r Repo) Resolve(ctx context.Context, name string) (string, error) {
	out, err := r.Run(ctx, "rev-parse", "--verify", "--quiet", "--end-of-options", name+"^{commit}")
	if err != nil {
		return "", fmt.Errorf("%s: no commit %q", r.Dir, name)
	}
	return strings.TrimSpace(out), nil
}

// Remotes returns name -> URL of the repository's own configuration.
func (r Repo) Remotes(ctx context.Context) (map[string]string, error) {
	out, err := r.Run(ctx, "config", "--null", "--get-regexp", `^remote\..*\.url$`)
	remotes := map[string]string{}
	var failed *Error
	if errors.As(err, &failed) && failed.Code == 1 {
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

// WriteBundle writes a bundle of HEAD, which must be commit, with its whole history.
func (r Repo) WriteBundle(ctx context.Context, out io.Writer, commit string) error {
	shallow, err := r.Run(ctx, "rev-parse", "--is-shallow-repository")
	if err != nil {
		return err
	}
	if strings.TrimSpace(shallow) == "true" {
		return fmt.Errorf("%s is a shallow clone: its history cannot be handed over (git fetch --unshallow)", r.Dir)
	}
	head, err := r.Resolve(ctx, "HEAD")
	if err != nil {
		return err
	}
	if head != commit {
		return fmt.Errorf("%s: HEAD moved from %.12s to %.12s meanwhile", r.Dir, commit, head)
	}
	return r.Stream(ctx, nil, out, "bundle", "create", "--quiet", "-", "HEAD")
}

// Quarantine is a bare repository of the host's that takes what a machine sends.
// Nothing in it is ever checked out or executed.
type Quarantine struct {
	Repo
}

// MakeQuarantine makes the quarantine in dir, which is empty. It borrows the objects of
// origin, the person's repository, so that only what is new crosses the wire.
func MakeQuarantine(ctx context.Context, dir string, origin Repo) (Quarantine, error) {
	q := Quarantine{Repo{dir}}
	if _, err := q.Run(ctx, "init", "--quiet", "--bare", "--template=", "."); err != nil {
		return q, err
	}
	objects, err := origin.Run(ctx, "rev-parse", "--path-format=absolute", "--git-path", "objects")
	if err != nil {
		return q, err
	}
	info := filepath.Join(dir, "objects", "info")
	if err := os.MkdirAll(info, 0o700); err != nil {
		return q, err
	}
	return q, os.WriteFile(filepath.Join(info, "alternates"), []byte(objects), 0o600)
}

// Take brings ref of a bundle, which the machine made, to the same ref here. Every
// object is checked.
func (q Quarantine) Take(ctx context.Context, bundle io.Reader, ref string) (commit string, err error) {
	reader := bufio.NewReader(bundle)
	if commit, err = bundleHead(reader, ref); err != nil {
		return "", err
	}
	// git fetch does not check the objects of a bundle; index-pack does, and completes
	// a pack that builds on what is here already.
	if err := q.Stream(ctx, reader, io.Discard, "index-pack", "--stdin", "--fix-thin", "--strict", "--fsck-objects"); err != nil {
		return "", err
	}
	got, err := q.Resolve(ctx, commit)
	if err != nil || got != commit {
		return "", fmt.Errorf("the bundle names %s as %s, which it does not hold", commit, ref)
	}
	_, err = q.Run(ctx, "update-ref", ref, commit)
	return commit, err
}

// IsAncestor reports whether commit is in the history of of.
func (r Repo) IsAncestor(ctx context.Context, commit, of string) (bool, error) {
	_, err := r.Run(ctx, "merge-base", "--is-ancestor", commit, of)
	var failed *Error
	if errors.As(err, &failed) && failed.Code == 1 {
		return false, nil
	}
	return err == nil, err
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

// CheckRef reports whether name is a well-formed full ref name.
func CheckRef(ctx context.Context, name string) error {
	if _, err := (Repo{"/"}).Run(ctx, "check-ref-format", name); err != nil {
		return fmt.Errorf("%q is no valid ref name", name)
	}
	return nil
}

// Push sends commit to ref of url if ref is still at old there (all zeros: does not exist).
// It uses the person's own credentials, and no name from the machine but ref.
func (q Quarantine) Push(ctx context.Context, url, commit, ref, old string) error {
	lease := old
	if strings.Trim(old, "0") == "" {
		lease = ""
	}
	env := append(os.Environ(), "GIT_TERMINAL_PROMPT=0", "GIT_ALLOW_PROTOCOL=https:http:ssh:git:file", "LC_ALL=C")
	// The quarantine's configuration is ours; the person's global one is needed for credentials.
	args := []string{"-c", "core.hooksPath=/dev/null", "-c", "protocol.ext.allow=never",
		"push", "--quiet", "--no-verify", "--no-follow-tags", "--force-with-lease=" + ref + ":" + lease, "--", url, commit + ":" + ref}
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
	cmd := exec.CommandContext(ctx, "git", "config", "--get", name)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}
