package tools

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"regexp"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cal/nucleus"
	"cal/wire"
)

// Bounds of git's own work.
const (
	commitTimeout = 10 * time.Minute // hooks may run a test suite
	gitTimeout    = 30 * time.Minute
	gitOutput     = 64 << 10
)

// CommitResult is what git_commit returns.
type CommitResult struct {
	Repo   string `json:"repo"`
	Commit string `json:"commit"`
	Branch string `json:"branch,omitempty"` // empty on a detached HEAD
	Stat   string `json:"stat"`
	Output string `json:"output,omitempty"` // of git and the repository's hooks
}

// planCommit commits as a person in the machine would: the repository's own
// configuration and hooks hold, with no more rights than any command has. Name and
// address are the call's, and nothing is signed.
func (w *worker) planCommit(call Call, action nucleus.Action, args CommitArgs) (plan, error) {
	if call.Identity.Name == "" || call.Identity.Email == "" {
		return plan{}, invalid(action.Op, "no name or address to commit under: set user.name and user.email in the host's git configuration")
	}
	commit := nucleus.Commit{Message: args.Message, Name: call.Identity.Name, Email: call.Identity.Email}
	for _, p := range args.Paths {
		rel, err := w.box.Rel(p) // a link is committed as a link
		if err != nil {
			return plan{}, err
		}
		commit.Paths = append(commit.Paths, rel)
	}
	var err error
	if commit.Repo, err = w.repository(args.Repo, commit.Paths); err != nil {
		return plan{}, err
	}
	inside := make([]string, len(commit.Paths))
	for i, p := range commit.Paths {
		if inside[i] = below(commit.Repo, p); p == commit.Repo {
			inside[i] = "."
		} else if inside[i] == p && commit.Repo != "." {
			return plan{}, invalid(action.Op, "path %q is not in the repository %q: paths are relative to the workspace", p, commit.Repo)
		}
	}
	action.Commit = &commit
	return plan{action, func(ctx context.Context, _ *caller) (any, int, error) {
		ctx, cancel := context.WithTimeout(ctx, commitTimeout)
		defer cancel()
		result, err := w.commit(ctx, commit, inside)
		return result, 0, err
	}}, nil
}

// repository finds the directory of the repository that a call means: the named
// one, the one around the first path, or the only one.
func (w *worker) repository(named string, paths []string) (string, error) {
	if named != "" {
		rel, err := w.box.Resolve(named)
		if err == nil && !w.isRepository(rel) {
			err = nucleus.Errorf(nucleus.KindNotFound, "%q is not a git repository", rel)
		}
		return rel, err
	}
	if len(paths) > 0 {
		for at := paths[0]; ; at = path.Dir(at) {
			if w.isRepository(at) {
				return at, nil
			}
			if at == "." {
				return "", nucleus.Errorf(nucleus.KindNotFound, "%q lies in no git repository", paths[0])
			}
		}
	}
	if w.isRepository(".") {
		return ".", nil
	}
	list, err := w.box.list(".")
	if err != nil {
		return "", err
	}
	var found []string
	for _, entry := range list {
		if entry.IsDir() && w.isRepository(entry.Name()) {
			found = append(found, entry.Name())
		}
	}
	if len(found) != 1 {
		return "", nucleus.Errorf(nucleus.KindInvalid, `the workspace has %d repositories (%s): name one in "repo"`, len(found), strings.Join(found, ", "))
	}
	return found[0], nil
}

func (w *worker) isRepository(rel string) bool {
	fd, err := w.box.openStrict(path.Join(rel, ".git"), unix.O_PATH)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func (w *worker) commit(ctx context.Context, commit nucleus.Commit, paths []string) (CommitResult, error) {
	result := CommitResult{Repo: commit.Repo}
	g := gitCall{w.exec, commit.Repo, map[string]string{
		"GIT_AUTHOR_NAME": commit.Name, "GIT_AUTHOR_EMAIL": commit.Email,
		"GIT_COMMITTER_NAME": commit.Name, "GIT_COMMITTER_EMAIL": commit.Email,
		"GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true", "GIT_LITERAL_PATHSPECS": "1",
	}, nil}
	add := []string{"add", "--all"}
	record := []string{"commit", "--no-gpg-sign", "--file=-"}
	if len(paths) > 0 {
		add = append(append(add, "--"), paths...)
		record = append(append(record, "--only", "--"), paths...)
	} else if _, err := g.run(ctx, "", "diff", "--cached", "--quiet"); err != nil {
		add = nil // something is staged: that is what is meant
	}
	if add != nil {
		if _, err := g.run(ctx, "", add...); err != nil {
			return result, err
		}
	}
	output, err := g.run(ctx, commit.Message, record...)
	if err != nil {
		return result, err
	}
	result.Output = output
	if result.Commit, err = g.run(ctx, "", "rev-parse", "--verify", "HEAD"); err != nil {
		return result, err
	}
	result.Branch, _ = g.run(ctx, "", "symbolic-ref", "--quiet", "--short", "HEAD")
	result.Stat, err = g.run(ctx, "", "show", "--no-ext-diff", "--no-textconv", "--format=", "--shortstat", "HEAD")
	return result, err
}

// gitCall runs git in one repository.
type gitCall struct {
	exec *Executor
	repo string
	env  map[string]string
	hard []string // settings that stand before the subcommand
}

// plumbing is git for this program's own work on a repository that may be
// hostile: nothing that its configuration names is executed. Settings on the command
// line win over the repository's; GIT_ALLOW_PROTOCOL wins over both, so that no
// remote helper starts, also not for a promised object that is missing.
func (x *Executor) plumbing(repo string) gitCall {
	return gitCall{x, repo, map[string]string{
		"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ATTR_NOSYSTEM": "1",
		"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0",
		"GIT_PAGER": "cat", "GIT_EDITOR": "true", "GIT_ASKPASS": "false", "SSH_ASKPASS": "false",
		"GIT_REPLACE_REF_BASE": "refs/none/", "GIT_TEMPLATE_DIR": "",
	}, []string{
		"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.alternateRefsCommand=", "-c", "core.attributesFile=/dev/null",
		"-c", "core.sshCommand=false", "-c", "core.gitProxy=", "-c", "credential.helper=", "-c", "gc.auto=0", "-c", "maintenance.auto=false",
		"-c", "protocol.allow=never", "-c", "safe.directory=*", "-c", "gpg.program=false", "-c", "diff.external=",
	}}
}

// run returns what git wrote to its standard output, trimmed. Its error holds
// what git said.
func (g gitCall) run(ctx context.Context, stdin string, args ...string) (string, error) {
	stdout := newKeeper(gitOutput)
	if err := g.stream(ctx, strings.NewReader(stdin), stdout, args...); err != nil {
		return "", err
	}
	return strings.TrimSpace(stdout.take().text), nil
}

func (g gitCall) stream(ctx context.Context, stdin io.Reader, stdout io.Writer, args ...string) error {
	binary, err := g.exec.lookup("git", ".")
	if err != nil {
		return err
	}
	stderr, said := newKeeper(gitOutput), newKeeper(gitOutput)
	r, err := g.exec.start(command{
		binary: binary, argv: append(append([]string{"git"}, g.hard...), args...), dir: g.repo, env: g.env,
		stdin: stdin, stdout: io.MultiWriter(stdout, said), stderr: stderr,
	})
	if err != nil {
		return err
	}
	r.wait(ctx, gitTimeout, nil)
	if reason := r.child.killed(); reason != "" {
		return nucleus.Errorf(nucleus.KindTimeout, "git %s: ended: %s", args[0], reason)
	}
	if code := r.child.exit(); code != 0 {
		message := strings.TrimSpace(stderr.take().text + "\n" + said.take().text) // "nothing to commit" goes to stdout
		return nucleus.Errorf(nucleus.KindFailed, "git %s: exit code %d: %s", args[0], code, message)
	}
	return nil
}

var (
	objectID  = regexp.MustCompile(`^[0-9a-f]{40}([0-9a-f]{24})?$`)
	configKey = regexp.MustCompile(`^[a-z][a-z0-9]*\.([A-Za-z0-9._/-]+\.)?[A-Za-z][A-Za-z0-9-]*$`)
	remote    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
)

// checkRef refuses what git could take for an option or a revision expression.
func checkRef(ref string) error {
	if ref == "" || strings.HasPrefix(ref, "-") || strings.HasPrefix(ref, "/") || strings.HasSuffix(ref, "/") ||
		strings.ContainsAny(ref, " ~^:?*[\\\x7f") || strings.Contains(ref, "..") || strings.Contains(ref, "@{") ||
		strings.Contains(ref, "//") || strings.HasSuffix(ref, ".lock") || strings.IndexFunc(ref, func(r rune) bool { return r < ' ' }) >= 0 {
		return nucleus.Errorf(nucleus.KindInvalid, "%q is not the name of a branch", ref)
	}
	return nil
}

// BundleResult ends a "bundle". Empty means that Base holds everything already;
// then no data was sent.
type BundleResult struct {
	Ref    string `json:"ref"`
	Commit string `json:"commit"`
	Empty  bool   `json:"empty,omitempty"`
	Bytes  int64  `json:"bytes"`
}

// bundle sends a git bundle of a branch.
func (w *worker) bundle(ctx context.Context, stream *wire.Stream, b Bundle) (BundleResult, error) {
	var result BundleResult
	if err := checkRef(b.Ref); err != nil {
		return result, err
	}
	if b.Base != "" && !objectID.MatchString(b.Base) {
		return result, nucleus.Errorf(nucleus.KindInvalid, "base %q is not an object id", b.Base)
	}
	rel, err := w.repository(b.Repo, nil)
	if err != nil {
		return result, err
	}
	if result.Ref = b.Ref; !strings.HasPrefix(b.Ref, "refs/") {
		result.Ref = "refs/heads/" + b.Ref
	}
	g := w.exec.plumbing(rel)
	if b.Ref == WorktreeRef {
		if err := g.snapshot(ctx); err != nil {
			return result, err
		}
	}
	if result.Commit, err = g.run(ctx, "", "rev-parse", "--verify", "--quiet", "--end-of-options", result.Ref+"^{commit}"); err != nil {
		return result, nucleus.Errorf(nucleus.KindNotFound, "repository %q has no branch %q", rel, b.Ref)
	}
	what := result.Ref + "\n"
	if b.Base != "" {
		// A base that the repository has lost leaves nothing out.
		if _, err := g.run(ctx, "", "cat-file", "-e", b.Base+"^{commit}"); err == nil {
			what += "^" + b.Base + "\n"
			if _, err := g.run(ctx, "", "merge-base", "--is-ancestor", result.Commit, b.Base); err == nil {
				result.Empty = true
				return result, nil
			}
		}
	}
	out := &counter{w: frameWriter{stream, wire.FrameData}}
	if err := g.stream(ctx, strings.NewReader(what), out, "bundle", "create", "--quiet", "-", "--stdin"); err != nil {
		return result, err
	}
	result.Bytes = out.n
	return result, nil
}

// UnbundleResult ends an "unbundle".
type UnbundleResult struct {
	Repo   string `json:"repo"`
	Commit string `json:"commit"`
	Branch string `json:"branch"`
}

func (u Unbundle) check() error {
	if err := checkRef(u.Branch); err != nil {
		return err
	}
	if !objectID.MatchString(u.Commit) {
		return nucleus.Errorf(nucleus.KindInvalid, "commit %q is not an object id", u.Commit)
	}
	for _, id := range u.Shallow {
		if !objectID.MatchString(id) {
			return nucleus.Errorf(nucleus.KindInvalid, "shallow commit %q is not an object id", id)
		}
	}
	for key, value := range u.Config {
		if !configKey.MatchString(key) || strings.ContainsAny(value, "\n\x00") {
			return nucleus.Errorf(nucleus.KindInvalid, "git setting %q=%q is not valid", key, value)
		}
	}
	for name, address := range u.Remotes {
		if !remote.MatchString(name) || strings.ContainsAny(address, "\n\x00") {
			return nucleus.Errorf(nucleus.KindInvalid, "remote %q at %q is not valid", name, address)
		}
	}
	return nil
}

// unbundle makes a repository from the bundle that r holds. It is made beside
// its place and put there whole: a call that was cut off leaves nothing that looks
// like it.
func (w *worker) unbundle(ctx context.Context, r io.Reader, u Unbundle) (UnbundleResult, error) {
	var result UnbundleResult
	if err := u.check(); err != nil {
		return result, err
	}
	rel, err := w.box.Resolve(u.Repo)
	if err != nil {
		return result, err
	}
	if rel == "." || strings.HasPrefix(path.Base(rel), ".") {
		return result, nucleus.Errorf(nucleus.KindInvalid, "%q is not a name for a repository", u.Repo)
	}
	if u.Replace {
		if err := w.box.root.RemoveAll(rel); err != nil {
			return result, w.box.refusal(rel, err)
		}
	}
	if _, err := w.box.root.Lstat(rel); !errors.Is(err, fs.ErrNotExist) && !w.emptyDirectory(rel) {
		return result, nucleus.Errorf(nucleus.KindConflict, "%q exists already", rel)
	}
	w.sweep(path.Dir(rel))
	making := path.Join(path.Dir(rel), makingPrefix+rand.Text()[:10]+makingSuffix)
	if err := w.box.root.MkdirAll(making, 0o755); err != nil {
		return result, w.box.refusal(making, err)
	}
	defer func() { _ = w.box.root.RemoveAll(making) }() // after the rename there is nothing to remove
	if err := w.fill(ctx, r, making, u); err != nil {
		return result, err
	}
	if err := w.box.root.Remove(rel); err != nil && !errors.Is(err, fs.ErrNotExist) { // the empty directory
		return result, w.box.refusal(rel, err)
	}
	if err := w.box.root.Rename(making, rel); err != nil {
		return result, w.box.refusal(rel, err)
	}
	return UnbundleResult{rel, u.Commit, u.Branch}, nil
}

// Where a repository is made, beside its place.
const makingPrefix, makingSuffix = ".cal-", ".making"

// sweep removes what an unbundle has left whose machine was ended in the middle of it.
func (w *worker) sweep(dir string) {
	list, err := w.box.list(dir)
	if err != nil {
		return // it will be made
	}
	for _, entry := range list {
		if name := entry.Name(); strings.HasPrefix(name, makingPrefix) && strings.HasSuffix(name, makingSuffix) {
			_ = w.box.root.RemoveAll(path.Join(dir, name)) // in nobody's way
		}
	}
}

func (w *worker) emptyDirectory(rel string) bool {
	list, err := w.box.list(rel)
	return err == nil && len(list) == 0
}

func (w *worker) fill(ctx context.Context, r io.Reader, rel string, u Unbundle) error {
	g := w.exec.plumbing(rel)
	if _, err := g.run(ctx, "", "init", "--quiet", "--template=", "--initial-branch="+u.Branch, "."); err != nil {
		return err
	}
	incoming := path.Join(rel, ".git", "incoming.bundle")
	if err := w.store(incoming, r); err != nil {
		return err
	}
	if len(u.Shallow) > 0 {
		if err := w.store(path.Join(rel, ".git", "shallow"), strings.NewReader(strings.Join(u.Shallow, "\n")+"\n")); err != nil {
			return err
		}
	}
	heads, err := g.run(ctx, "", "bundle", "unbundle", ".git/incoming.bundle")
	if err != nil {
		return err
	}
	if err := w.box.root.Remove(incoming); err != nil {
		return w.box.refusal(incoming, err)
	}
	if _, err := g.run(ctx, refUpdates(heads, u), "update-ref", "--stdin"); err != nil {
		return err
	}
	// First without settings: a filter that they name has nothing to run on.
	if _, err := g.run(ctx, "", "reset", "--quiet", "--hard", u.Commit); err != nil {
		return err
	}
	return g.configure(ctx, u)
}

// refUpdates creates the agent's branch and the tags and remote branches that
// the bundle brought.
func refUpdates(heads string, u Unbundle) string {
	var updates strings.Builder
	fmt.Fprintf(&updates, "create refs/heads/%s %s\n", u.Branch, u.Commit)
	for line := range strings.Lines(heads) {
		id, ref, _ := strings.Cut(strings.TrimSpace(line), " ")
		kept := strings.HasPrefix(ref, "refs/tags/") || strings.HasPrefix(ref, "refs/remotes/")
		if kept && objectID.MatchString(id) && checkRef(ref) == nil {
			fmt.Fprintf(&updates, "create %s %s\n", ref, id)
		}
	}
	return updates.String()
}

func (g gitCall) configure(ctx context.Context, u Unbundle) error {
	settings := map[string]string{}
	for key, value := range u.Config {
		settings[key] = value
	}
	for name, address := range u.Remotes {
		settings["remote."+name+".url"] = withoutCredentials(address)
		settings["remote."+name+".fetch"] = "+refs/heads/*:refs/remotes/" + name + "/*"
	}
	keys := make([]string, 0, len(settings))
	for key := range settings {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		if _, err := g.run(ctx, "", "config", "--local", key, settings[key]); err != nil {
			return err
		}
	}
	return nil
}

// withoutCredentials takes a password or token out of a remote's address; the
// user of an ssh address is no secret.
func withoutCredentials(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.User == nil {
		return address
	}
	if u.Scheme == "ssh" || u.Scheme == "git+ssh" {
		u.User = url.User(u.User.Username())
	} else {
		u.User = nil
	}
	return u.String()
}

// store writes r to a new file.
func (w *worker) store(rel string, r io.Reader) error {
	file, err := w.box.root.OpenFile(rel, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return w.box.refusal(rel, err)
	}
	_, err = io.Copy(file, r)
	if err = errors.Join(err, file.Close()); err != nil {
		return w.box.refusal(rel, err)
	}
	return nil
}

// frameReader reads FrameData until the empty one.
type frameReader struct {
	stream *wire.Stream
	rest   bytes.Reader
	ended  bool
}

func (r *frameReader) Read(p []byte) (int, error) {
	for r.rest.Len() == 0 {
		if r.ended {
			return 0, io.EOF
		}
		r.stream.SetReadDeadline(time.Now().Add(dataTimeout))
		kind, payload, err := r.stream.Recv(maxFrame)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return 0, err
		}
		if kind != wire.FrameData {
			return 0, fmt.Errorf("frame %q, want data", kind)
		}
		r.ended = len(payload) == 0
		r.rest.Reset(payload)
	}
	return r.rest.Read(p)
}

// counter counts what passes to another writer.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
