package node

import (
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"cal/guest"
	"cal/guest/tools"
	"cal/internal/durable"
	"cal/internal/git"
	"cal/node/client"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

func (p *Pod) readRepo(name string) (nucleus.RepoRecord, error) {
	var s nucleus.RepoRecord
	err := durable.Load(p.repoFile(name), &s)
	if s.Heads == nil {
		s.Heads = map[string]string{}
	}
	return s, err
}

func (p *Pod) writeRepo(name string, s nucleus.RepoRecord) error {
	return durable.Store(p.repoFile(name), s)
}

// changeRepo changes what is on record now: pushes and fetches of a running pod end in any order,
// and one must not write back what another has replaced.
func (p *Pod) changeRepo(name string, change func(*nucleus.RepoRecord)) error {
	p.recording.Lock()
	defer p.recording.Unlock()
	s, err := p.readRepo(name)
	if err != nil {
		return err
	}
	change(&s)
	return p.writeRepo(name, s)
}

// labelRepos looks at the repositories that the spec brings: where they stand, whether they
// are trusted, and what policy they add. It changes nothing.
func (n *Node) labelRepos(ctx context.Context, p *Pod, declared *policy.Policy) (*policy.Policy, error) {
	effective := declared
	for i := range p.record.Spec.Repos {
		r := &p.record.Spec.Repos[i]
		if !workspaceName.MatchString(r.Name) {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "repository name %q: want 1 to 64 letters, digits, '.', '_' or '-'", r.Name)
		}
		origin, err := git.Open(ctx, r.Path)
		if err != nil {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "repository %s: %v", r.Name, err)
		}
		r.Path = origin.Dir
		if r.Base == "" {
			r.Base = "HEAD"
		}
		if r.Base, err = origin.Resolve(ctx, r.Base); err != nil {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "repository %v", err)
		}
		if err := git.CheckRef(ctx, "refs/heads/"+r.Branch); err != nil {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "branch: %v", err)
		}
		if effective, err = tighten(ctx, origin, r.Base, effective); err != nil {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "%s: %v", r.Path, err)
		}
		status, err := labelRepo(ctx, origin, *r, effective)
		if err != nil {
			return nil, err
		}
		p.record.Repos = append(p.record.Repos, status)
		p.record.Untrusted = p.record.Untrusted || !status.Trusted
	}
	return effective, p.keepLabels()
}

// keepLabels counts the repositories that the workspace holds from before: their label
// stays, whether this run names them or not.
func (p *Pod) keepLabels() error {
	files, err := filepath.Glob(filepath.Join(p.record.Workspace, "repos", "*.json"))
	if err != nil {
		return err
	}
next:
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		for _, r := range p.record.Repos {
			if r.Name == name {
				continue next
			}
		}
		stored, err := p.readRepo(name)
		if err != nil {
			return err
		}
		p.record.Untrusted = p.record.Untrusted || !stored.Trusted
	}
	return nil
}

// tighten meets the policy with the repository's own, from the commit that the
// person brought: it can only take away.
func tighten(ctx context.Context, origin git.Repo, base string, p *policy.Policy) (*policy.Policy, error) {
	const name = ".cal/policy.yaml"
	listed, err := origin.Run(ctx, "ls-tree", "--name-only", base, "--", name)
	if err != nil {
		return nil, err
	}
	if strings.TrimSpace(listed) == "" {
		return p, nil
	}
	text, err := origin.Run(ctx, "cat-file", "blob", base+":"+name)
	if err != nil {
		return nil, err
	}
	return policy.Tighten(p, name, []byte(text))
}

func labelRepo(ctx context.Context, origin git.Repo, r nucleus.Repo, p *policy.Policy) (nucleus.RepoStatus, error) {
	// What comes in with it counts as it does.
	parts := []git.Repo{origin}
	submodules, err := origin.Submodules(ctx, r.Base)
	if err != nil {
		return nucleus.RepoStatus{}, err
	}
	for _, sub := range submodules {
		if sub.Absent == "" {
			parts = append(parts, sub.Repo)
		}
	}
	var urls []string
	for _, part := range parts {
		remotes, err := part.Remotes(ctx)
		if err != nil {
			return nucleus.RepoStatus{}, err
		}
		for _, name := range slices.Sorted(maps.Keys(remotes)) {
			urls = append(urls, git.WithoutCredentials(remotes[name]))
		}
	}
	status := nucleus.RepoStatus{Name: r.Name, Branch: r.Branch, Base: r.Base}
	status.Trusted, status.Why = policy.TrustedRepo(p, urls)
	if r.Trusted != nil {
		status.Trusted, status.Why = *r.Trusted, "the person says so"
	}
	return status, nil
}

// importRepos hands the repositories to the machine: new ones whole, known ones stay as
// the agent left them.
func (n *Node) importRepos(ctx context.Context, p *Pod, actor string) error {
	for _, r := range p.record.Spec.Repos {
		stored, err := p.readRepo(r.Name)
		switch {
		case err == nil && !stored.Pending:
			if err := n.keepRepo(p, r, stored); err != nil {
				return err
			}
			continue
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return err
		}
		if err := n.importRepo(ctx, p, actor, r, stored.Pending); err != nil {
			return err
		}
	}
	return nil
}

// keepRepo goes on with what the workspace holds.
func (n *Node) keepRepo(p *Pod, r nucleus.Repo, stored nucleus.RepoRecord) error {
	if stored.Path != r.Path {
		return nucleus.Errorf(nucleus.KindConflict, "workspace %q holds %s from %s, not from %s; name another workspace", p.record.Spec.Workspace, r.Name, stored.Path, r.Path)
	}
	for i := range p.record.Repos {
		if p.record.Repos[i].Name == r.Name {
			p.record.Repos[i].Base, p.record.Repos[i].Branch = stored.Base, stored.Branch
			stored.Trusted = p.record.Repos[i].Trusted
		}
	}
	if err := p.writeRepo(r.Name, stored); err != nil {
		return err
	}
	return p.save()
}

// importRepo hands a repository over. again says that an earlier run was cut off doing so.
func (n *Node) importRepo(ctx context.Context, p *Pod, actor string, r nucleus.Repo, again bool) error {
	origin := git.Repo{Dir: r.Path}
	remotes, err := origin.Remotes(ctx)
	if err != nil {
		return err
	}
	stored := nucleus.RepoRecord{Path: r.Path, Branch: r.Branch, Base: r.Base, Remotes: remotes, Heads: map[string]string{}, Pending: true}
	for _, status := range p.record.Repos {
		if status.Name == r.Name {
			stored.Trusted = status.Trusted
		}
	}
	if branch, err := origin.Run(ctx, "symbolic-ref", "--quiet", "--short", "HEAD"); err == nil {
		stored.BaseBranch = strings.TrimSpace(branch)
	}
	if heads, err := origin.Run(ctx, "for-each-ref", "--format=%(refname) %(objectname)", "refs/remotes/origin"); err == nil {
		for _, line := range strings.Split(strings.TrimSpace(heads), "\n") {
			if name, id, ok := strings.Cut(strings.TrimPrefix(line, "refs/remotes/origin/"), " "); ok && name != "HEAD" {
				stored.Heads[name] = id
			}
		}
	}
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindRepoImport,
		Data: data(map[string]any{"repo": r.Name, "branch": r.Branch, "base": r.Base}),
	}); err != nil {
		return logFailure(err)
	}
	if err := p.writeRepo(r.Name, stored); err != nil {
		return err
	}
	if err := p.handOver(ctx, origin, r, r.Name, r.Base, again); err != nil {
		return err
	}
	submodules, err := origin.Submodules(ctx, r.Base)
	if err != nil {
		return err
	}
	for _, sub := range submodules {
		if sub.Absent != "" { // said at launch
			continue
		}
		if err := p.handOver(ctx, sub.Repo, r, r.Name+"/"+sub.Path, sub.Commit, false); err != nil {
			return err
		}
	}
	stored.Pending = false
	return p.writeRepo(r.Name, stored)
}

// handOver puts one commit of a repository, or of a submodule, into the machine at place.
func (p *Pod) handOver(ctx context.Context, origin git.Repo, r nucleus.Repo, place, commit string, replace bool) error {
	remotes, err := origin.Remotes(ctx)
	if err != nil {
		return err
	}
	return p.handOverFor(ctx, origin, r, place, commit, replace, remotes)
}

// handOverFor is handOver of a repository whose remotes are known from elsewhere.
func (p *Pod) handOverFor(ctx context.Context, origin git.Repo, r nucleus.Repo, place, commit string, replace bool, remotes map[string]string) error {
	shown := map[string]string{}
	for name, url := range remotes {
		shown[name] = git.WithoutCredentials(url)
	}
	shallow, err := origin.Shallow(ctx, commit)
	if err != nil {
		return err
	}
	unbundle := tools.Unbundle{
		Repo: place, Branch: r.Branch, Commit: commit, Replace: replace, Shallow: shallow, Remotes: shown,
		Config: map[string]string{"user.name": p.record.Spec.Identity.Name, "user.email": p.record.Spec.Identity.Email},
	}
	err = p.sendRepo(ctx, guest.RepoCall{In: &unbundle}, func(out io.Writer) error { return origin.WriteBundle(ctx, out, commit) })
	if err != nil {
		return nucleus.Errorf(nucleus.KindFailed, "handing over %s: %v", origin.Dir, err)
	}
	return nil
}

// sendRepo sends what write writes to the machine's repository.
func (p *Pod) sendRepo(ctx context.Context, call guest.RepoCall, write func(io.Writer) error) error {
	session, err := p.wire()
	if err != nil {
		return err
	}
	stream, err := session.Open(ctx, guest.StreamRepo, call)
	if err != nil {
		return err
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, func() { stream.Close() })
	defer stop()
	if err := write(frameWriter{stream}); err != nil {
		return err
	}
	if err := stream.Send(wire.FrameData, nil); err != nil {
		return err
	}
	var result tools.Result
	if err := stream.RecvJSON(wire.FrameResult, 1<<20, &result); err != nil {
		return err
	}
	if result.Error != nil {
		return result.Error
	}
	return nil
}

type frameWriter struct{ stream *wire.Stream }

func (w frameWriter) Write(p []byte) (int, error) {
	for sent := 0; sent < len(p); {
		piece := p[sent:min(len(p), sent+256<<10)]
		if err := w.stream.Send(wire.FrameData, piece); err != nil {
			return sent, err
		}
		sent += len(piece)
	}
	return len(p), nil
}

// fetchRepo brings the agent's branch, and what it has not committed, to the host.
func (n *Node) fetchRepo(ctx context.Context, p *Pod, actor, name string) (client.RepoFetched, error) {
	r, err := p.repo(name)
	if err != nil {
		return client.RepoFetched{}, err
	}
	p.fetching.Lock() // one that ends would remove what another brings
	defer p.fetching.Unlock()
	q, err := n.newTransfer(ctx, p, r, p.keptDir(r.Name))
	if err != nil {
		return client.RepoFetched{}, err
	}
	defer q.drop()
	head, err := q.take(ctx, "refs/heads/"+r.Branch)
	if err != nil {
		return client.RepoFetched{}, err
	}
	worktree, err := q.take(ctx, tools.WorktreeRef)
	if err != nil {
		return client.RepoFetched{}, err
	}
	stored := q.stored
	fetched := client.RepoFetched{Name: r.Name, Branch: r.Branch, Base: stored.Base, Head: head, Worktree: worktree}
	commits, err := q.Run(ctx, "rev-list", "--count", stored.Base+".."+head)
	if err != nil {
		return fetched, err
	}
	if fetched.Commits, err = strconv.Atoi(strings.TrimSpace(commits)); err != nil {
		return fetched, err
	}
	if fetched.Stat, err = q.Run(ctx, "diff", "--no-color", "--stat=80", stored.Base, worktree); err != nil {
		return fetched, err
	}
	_, err = n.append(nucleus.Entry{ // before it takes the place of the last one
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindRepoFetch,
		Data: data(map[string]any{"repo": r.Name, "branch": r.Branch, "base": stored.Base, "head": head, "worktree": worktree}),
	})
	if err != nil {
		return fetched, logFailure(err)
	}
	return fetched, q.keep(head, worktree)
}
