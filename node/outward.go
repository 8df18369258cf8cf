package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sort"
	"strings"
	"unicode/utf8"

	"cal/egress"
	"cal/guest/tools"
	"cal/internal/git"
	"cal/nucleus"
)

// The operations whose effect is on the host: the machine has neither the
// credentials nor a way out.

const zeroID = "0000000000000000000000000000000000000000"

// hopeless reports that op will not be done whatever else its arguments resolve to:
// the policy denies it, or it asks and nobody can approve. Then nothing is taken from
// the machine for it, and decide says no.
func (n *Node) hopeless(p *Pod, op nucleus.Op, pre *prepared) bool {
	action := pre.action
	action.Op = op
	p.root.mu.Lock()
	decision := p.policy.Decide(action, p.context(n.config.Now()))
	p.root.mu.Unlock()
	pre.effect = func(context.Context, nucleus.Permit) (json.RawMessage, error) {
		return nil, nucleus.Errorf(nucleus.KindConflict, "the policy's window opened while %s was resolved: call again", op)
	}
	return decision.Verdict != nucleus.Allow && (decision.Verdict != nucleus.Ask || n.unapprovable(p, decision) != "")
}

// preparePush brings the branch into quarantine, where it is checked and known
// before anybody decides.
func (n *Node) preparePush(ctx context.Context, p *Pod, raw []byte, pre *prepared) error {
	decoded, err := tools.Decode(nucleus.GitPush, raw)
	if err != nil {
		return err
	}
	args := decoded.(tools.PushArgs)
	repo, stored, err := p.storedRepo(args.Repo)
	if err != nil {
		return err
	}
	url, ok := stored.Remotes["origin"]
	if !ok {
		return nucleus.Errorf(nucleus.KindInvalid, "repository %s has no remote origin on the host", repo.Name)
	}
	ref := "refs/heads/" + args.Branch
	if err := git.CheckRef(ctx, ref); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	old := stored.Heads[args.Branch]
	if old == "" {
		old = zeroID
	}
	pre.action.Push = &nucleus.Push{Repo: repo.Name, Remote: git.WithoutCredentials(url), Ref: ref, Old: old}
	if n.hopeless(p, nucleus.GitPush, pre) {
		return nil
	}
	q, err := n.newTransfer(ctx, p, repo, p.transfersDir())
	if err != nil {
		return err
	}
	pre.sent = q
	commit, err := q.take(ctx, ref)
	if err != nil {
		return err
	}
	pre.action.Push.New = commit
	pre.detail, pre.action.Push.Drops = pushDetail(ctx, q, cmp.Or(stored.PersonBase, repo.Base), old, commit)
	pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
		if err := q.Push(ctx, url, commit, ref, old); err != nil {
			return nil, nucleus.Errorf(nucleus.KindFailed, "%v", err)
		}
		if err := p.changeRepo(repo.Name, func(s *nucleus.RepoRecord) { s.Heads[args.Branch] = commit }); err != nil {
			// The push is done, and no less so for this; the branch's next one will be refused.
			slog.Error("where a branch stands after its push could not be written down", "pod", p.record.ID, "ref", ref, "error", err)
		}
		return json.Marshal(map[string]string{"remote": git.WithoutCredentials(url), "ref": ref, "commit": commit})
	}
	return nil
}

// pushDetail shows what moves on the remote: from where it is to the commit, and what
// a push that is no fast-forward drops.
func pushDetail(ctx context.Context, q *transfer, base, old, commit string) (details []nucleus.Detail, drops bool) {
	if old != zeroID {
		if forward, err := q.IsAncestor(ctx, old, commit); err == nil && forward {
			base = old
		} else {
			drops = true
			details = append(details, nucleus.Detail{Title: "NOT A FAST-FORWARD", Text: "the branch on the remote, now at " + old + ", is replaced; commits that it has and the new one has not are dropped from it"})
		}
	}
	add := func(title string, limit int, args ...string) {
		text, err := q.Run(ctx, args...)
		if err != nil {
			text = "cannot be shown: " + err.Error()
		}
		details = append(details, nucleus.Detail{Title: title, Text: cutDetail(text, limit)})
	}
	add("commits", 16<<10, "log", "--no-color", "--format=%h %an <%ae> %s", base+".."+commit)
	add("files", 16<<10, "diff", "--no-color", "--stat=100", base, commit)
	add("diff", 256<<10, "diff", "--no-color", base, commit)
	return details, drops
}

// preparePR resolves a pull request; GitHub's API is reached by the node.
func (n *Node) preparePR(ctx context.Context, p *Pod, raw []byte, pre *prepared) error {
	decoded, err := tools.Decode(nucleus.CreatePR, raw)
	if err != nil {
		return err
	}
	args := decoded.(tools.PRArgs)
	repo, stored, err := p.storedRepo(args.Repo)
	if err != nil {
		return err
	}
	owner, err := forgeRepository(stored.Remotes["origin"])
	if err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "create_pr: %v", err)
	}
	base := args.Base
	if base == "" {
		base = stored.BaseBranch
	}
	if base == "" {
		return nucleus.Errorf(nucleus.KindInvalid, "create_pr: %s was handed over from a detached HEAD: name the base", repo.Name)
	}
	pre.action.PR = &nucleus.PR{Repository: owner, API: n.config.GitHub.api(), Base: base, Head: repo.Branch, Title: args.Title, Body: args.Body}
	if n.hopeless(p, nucleus.CreatePR, pre) {
		return nil
	}
	q, err := n.newTransfer(ctx, p, repo, p.transfersDir())
	if err != nil {
		return err
	}
	pre.sent = q
	if pre.action.PR.HeadID, err = q.take(ctx, "refs/heads/"+repo.Branch); err != nil {
		return err
	}
	pre.detail, _ = pushDetail(ctx, q, cmp.Or(stored.PersonBase, repo.Base), zeroID, pre.action.PR.HeadID)
	pr := *pre.action.PR
	pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
		return n.config.GitHub.open(ctx, pr)
	}
	return nil
}

// prepareFetch resolves one HTTP request of the node on the agent's behalf.
func (n *Node) prepareFetch(p *Pod, raw []byte, pre *prepared) error {
	decoded, err := tools.Decode(nucleus.WebFetch, raw)
	if err != nil {
		return err
	}
	args := decoded.(tools.FetchArgs)
	fetch, err := egress.NewFetch(args.Method, args.URL, args.Headers, []byte(args.Body))
	if err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "web_fetch: %v", err)
	}
	pre.action.Fetch = &fetch
	pre.effect = func(ctx context.Context, permit nucleus.Permit) (json.RawMessage, error) {
		peer := egress.Peer{Pod: p.record.ID, Session: p.record.Session}
		result, err := n.gateway.Fetch(withFetch(ctx, fetch.URL, grantOf(permit)), peer, fetch, []byte(args.Body))
		if err != nil {
			var said *nucleus.Error
			switch {
			case !errors.As(err, &said):
			case said.Kind == nucleus.KindFailed, said.Kind == nucleus.KindTimeout:
				return nil, doubtful(fetch.Method, said)
			default: // the gateway's no
				return nil, said
			}
			return nil, doubtful(fetch.Method, nucleus.Errorf(nucleus.KindFailed, "web_fetch %s: %v", fetch.URL, err))
		}
		return json.Marshal(fetchedPage(result))
	}
	return nil
}

// page is what web_fetch returns: text as text, anything else in base64.
type page struct {
	Status   int               `json:"status"`
	Headers  map[string]string `json:"headers"`
	Body     string            `json:"body,omitempty"`
	Binary   []byte            `json:"body_b64,omitempty"`
	Cut      string            `json:"cut,omitempty"`
	Redirect string            `json:"redirect,omitempty"`
}

func fetchedPage(r *egress.FetchResult) page {
	p := page{Status: r.Status, Headers: r.Headers, Cut: r.Cut, Redirect: r.Redirect}
	if utf8.Valid(r.Body) {
		p.Body = string(r.Body)
	} else {
		p.Binary = r.Body
	}
	return p
}

// repo finds a repository of the pod; with one alone the name may be left out.
func (p *Pod) repo(name string) (nucleus.RepoStatus, error) {
	if name == "" && len(p.record.Repos) == 1 {
		return p.record.Repos[0], nil
	}
	var names []string
	for _, r := range p.record.Repos {
		if r.Name == name {
			return r, nil
		}
		names = append(names, r.Name)
	}
	sort.Strings(names)
	return nucleus.RepoStatus{}, nucleus.Errorf(nucleus.KindNotFound, "no repository %q in this machine; there are: %s", name, strings.Join(names, ", "))
}

// storedRepo is repo with what the workspace has on record of it.
func (p *Pod) storedRepo(name string) (nucleus.RepoStatus, nucleus.RepoRecord, error) {
	repo, err := p.repo(name)
	if err != nil {
		return repo, nucleus.RepoRecord{}, err
	}
	stored, err := p.readRepo(repo.Name)
	return repo, stored, err
}

func (p *Pod) repoFile(name string) string {
	return filepath.Join(p.record.Workspace, "repos", name+".json")
}

var errNoForge = errors.New("the remote is not on github.com, the only forge that is supported")

func forgeRepository(remote string) (string, error) {
	for _, prefix := range []string{"https://github.com/", "git@github.com:", "ssh://git@github.com/"} {
		if rest, ok := strings.CutPrefix(git.WithoutCredentials(remote), prefix); ok {
			rest = strings.TrimSuffix(strings.TrimSuffix(rest, "/"), ".git")
			if strings.Count(rest, "/") == 1 {
				return rest, nil
			}
		}
	}
	return "", fmt.Errorf("%w (remote origin is %q)", errNoForge, git.WithoutCredentials(remote))
}
