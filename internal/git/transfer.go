package git

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
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

// unpack takes a pack in and returns its id. Every object is checked, and what it builds on must
// be here.
func (r Repo) unpack(ctx context.Context, in io.Reader) (id string, err error) {
	var said strings.Builder
	if err := r.Stream(ctx, in, &said, "index-pack", "--stdin", "--fix-thin", "--strict", "--fsck-objects"); err != nil {
		return "", err
	}
	_, id, _ = strings.Cut(strings.TrimSpace(said.String()), "\t")
	return id, nil
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
// object is checked, and comes from the machine: base is the commit that it was given.
func (q Quarantine) Take(ctx context.Context, bundle io.Reader, ref, base string) (commit string, err error) {
	reader := bufio.NewReader(bundle)
	if commit, err = bundleHead(reader, ref); err != nil {
		return "", err
	}
	head, err := reader.Peek(12) // "PACK", version, number of objects
	if err != nil {
		return "", fmt.Errorf("the head of the pack: %w", err)
	}
	pack, err := q.unpack(ctx, reader)
	if err != nil {
		return "", err
	}
	got, err := q.Resolve(ctx, commit)
	if err != nil || got != commit {
		return "", fmt.Errorf("the bundle names %s as %s, which it does not hold", commit, ref)
	}
	sent, err := packed(filepath.Join(q.Dir, "objects", "pack", "pack-"+pack+".idx"), len(commit)/2, binary.BigEndian.Uint32(head[8:]))
	if err != nil {
		return "", err
	}
	if err := q.checkSent(ctx, commit, base, sent); err != nil {
		return "", err
	}
	if err := q.checkSize(ctx, commit); err != nil {
		return "", err
	}
	_, err = q.Run(ctx, "update-ref", ref, commit)
	return commit, err
}

// How many files a commit may stand for, and how many bytes their paths may have. A few trees that
// hold each other stand for any number of files, and git's diff keeps all their names in memory.
const (
	maxNames     = 1 << 20
	maxNameBytes = 256 << 20
)

// checkSize is an error where commit stands for more files than anything here is to look at.
func (q Quarantine) checkSize(ctx context.Context, commit string) error {
	counting := &nameCount{}
	err := q.Stream(ctx, nil, counting, "ls-tree", "-r", "-z", "--name-only", commit)
	if counting.over() {
		return fmt.Errorf("commit %s stands for more than %d files, or for paths of more than %d bytes", commit, maxNames, maxNameBytes)
	}
	return err
}

type nameCount struct{ names, bytes int }

func (c *nameCount) over() bool { return c.names > maxNames || c.bytes > maxNameBytes }

// Write counts names, each with a NUL behind it, and ends git where they are too many.
func (c *nameCount) Write(p []byte) (int, error) {
	c.names += bytes.Count(p, []byte{0})
	c.bytes += len(p)
	if c.over() {
		return 0, errors.New("too many names")
	}
	return len(p), nil
}

// checkSent is an error where commit leads to an object that was neither sent, nor is of the history
// of base or of what was taken before. The quarantine borrows all that the person has: whoever
// knows the id of an object there could else name it as its own, and have it handed on.
func (q Quarantine) checkSent(ctx context.Context, commit, base string, sent map[string]bool) error {
	known := []string{"--all"} // what was taken before
	if base != "" {
		known = append(known, base)
	}
	missing := map[string]bool{}
	objects := func(visit func(id string), revisions ...string) error {
		return q.Stream(ctx, nil, &lines{visit: visit}, append([]string{"rev-list", "--objects", "--no-object-names"}, revisions...)...)
	}
	err := objects(func(id string) {
		if !sent[id] {
			missing[id] = true
		}
	}, append([]string{commit, "--not"}, known...)...)
	if err != nil || len(missing) == 0 {
		return err
	}
	// Git leaves out what it sees to be known, not all that is: a file may be again what it was long ago.
	if err := objects(func(id string) { delete(missing, id) }, known...); err != nil {
		return err
	}
	for id := range missing {
		return fmt.Errorf("commit %s leads to object %s, which the machine neither sent nor was given", commit, id)
	}
	return nil
}

// lines visits each line that is written to it.
type lines struct {
	rest  []byte
	visit func(string)
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, whole := bytes.Cut(l.rest, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		l.visit(string(line))
		l.rest = rest
	}
}

// packed reads the ids of the first objects of a pack from its index (gitformat-pack(5), version 2).
// Those behind them are what git added to complete it. size is that of an id in bytes.
func packed(index string, size int, first uint32) (map[string]bool, error) {
	raw, err := os.ReadFile(index)
	if err != nil {
		return nil, err
	}
	const head, fanout = 8, 256 * 4
	broken := fmt.Errorf("%s is no index of version 2", index)
	if len(raw) < head+fanout || string(raw[:head]) != "\377tOc\000\000\000\002" {
		return nil, broken
	}
	count := int(binary.BigEndian.Uint32(raw[head+fanout-4:]))
	ids := raw[head+fanout:]
	offsets := count * (size + 4) // behind the ids and their checksums
	if len(ids) < offsets+count*4 {
		return nil, broken
	}
	large := ids[offsets+count*4:]
	type object struct {
		id     string
		offset uint64
	}
	objects := make([]object, count)
	for i := range objects {
		offset := uint64(binary.BigEndian.Uint32(ids[offsets+i*4:]))
		if at := int(offset&^(1<<31)) * 8; offset>>31 == 1 {
			if len(large) < at+8 {
				return nil, broken
			}
			offset = binary.BigEndian.Uint64(large[at:])
		}
		objects[i] = object{hex.EncodeToString(ids[i*size : (i+1)*size]), offset}
	}
	slices.SortFunc(objects, func(a, b object) int { return cmp.Compare(a.offset, b.offset) })
	sent := make(map[string]bool, count)
	for _, o := range objects[:min(count, int(first))] {
		sent[o.id] = true
	}
	return sent, nil
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
	_, err = to.unpack(ctx, reader)
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
