package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"cal/guest"
	"cal/guest/tools"
	"cal/internal/git"
	"cal/nucleus"
	"cal/policy"
)

// Pods that an agent asks for. What such a pod is comes from the record of the pod that asks,
// never from the machine: the arguments take away, and there is none for an image, a
// network, a credential or a path of the host. Its policy is policy.Delegate's, and
// policy.Decide holds it against the asking pod's, here and in the machine. It shares
// the root session: one exposure, one critical section. It ends before the pod above it.

// What a root session may have.
const (
	maxSubs  = 8 // pods below its own at once
	maxDepth = 3 // below its own pod
)

// ruleDelegation is the rule by which a pod that was asked for is not made.
const ruleDelegation = "delegation"

// subRecord is what the record of a pod that an agent asked for has beside others.
type subRecord struct {
	Parent  string `json:"parent"`       // the pod that asked
	Session string `json:"root_session"` // whose exposure it shares
	Depth   int    `json:"depth"`        // 1: below the pod of the root session
}

// newSub is a pod that was asked for and is not there yet.
type newSub struct {
	parent, pod *Pod
	origin      *transfer // what goes along; nil: nothing
	repo        nucleus.RepoStatus
	from        nucleus.RepoRecord // the parent's of it
	commit      string
	budget      nucleus.Amounts // as it was asked for

	taken   bool   // by the call that makes it; the root session's mutex guards it
	account string // counted in the root session's making, with this account; its mutex guards it
	held    bool   // origin has a hold for the pod's life; the pod's mutex guards it
}

// beyond says which bound of the root session stands in the way. The caller holds its mutex.
func (s *newSub) beyond() string {
	if s == nil {
		return ""
	}
	if depth := s.pod.record.Sub.Depth; depth > maxDepth {
		return fmt.Sprintf("the pod would be %d below the session's first one, at most %d are allowed", depth, maxDepth)
	}
	living := s.parent.root.making
	for p := range s.parent.root.pods {
		if p.record.Sub != nil {
			living++
		}
	}
	if living >= maxSubs {
		return fmt.Sprintf("this session has %d pods below its own, no more at once; end one with manage_pods delete", living)
	}
	return ""
}

// reserve takes the place that beyond saw, and sets the budget aside: for one call, of those
// that waited for the same approval. An error of kind denied says that there is not so much. The
// caller holds the root session's mutex, and settles what it has reserved.
func (s *newSub) reserve() error {
	if s == nil {
		return nil
	}
	root := s.parent.root
	if s.taken {
		return nucleus.Errorf(nucleus.KindConflict, "another call that waited for this approval makes the pod")
	}
	if err := root.openAccount(s.pod.record.ID, s.parent.record.ID, s.budget); err != nil {
		return err
	}
	s.taken, s.account = true, s.pod.record.ID
	root.making++
	return nil
}

// joined gives the place and the account to the pod, which may have got the name of a spare
// meanwhile. The caller holds the root session's mutex.
func (s *newSub) joined() error {
	root := s.parent.root
	if s.account == "" {
		return nil
	}
	if err := root.renameAccount(s.account, s.pod.record.ID); err != nil {
		return err
	}
	s.account = ""
	root.making--
	return nil
}

// settle gives back what a pod that did not come to be was to have.
func (s *newSub) settle() {
	if s == nil {
		return
	}
	root := s.parent.root
	root.mu.Lock()
	defer root.mu.Unlock()
	s.giveBack()
}

// giveBack is settle for who holds the root session's mutex.
func (s *newSub) giveBack() {
	if s == nil || s.account == "" {
		return
	}
	root := s.parent.root
	if err := root.closeAccount(s.account); err != nil {
		slog.Error("the budget of a pod that was not made is not given back", "pod", s.parent.record.ID, "error", err)
	}
	s.account = ""
	root.making--
}

// orphaned is an error when the pod above has ended. The caller holds the node's mutex,
// without which nobody looks for the pods below one that has ended.
func (s *newSub) orphaned() error {
	if why := s.parent.ended(); why != "" {
		return nucleus.Errorf(nucleus.KindUnavailable, "nothing was done: %s", why)
	}
	return nil
}

// release forgets what the pod was made from.
func (s *newSub) release() {
	if s == nil {
		return
	}
	s.pod.mu.Lock()
	held := s.held
	s.held = false
	s.pod.mu.Unlock()
	if held {
		s.origin.drop()
	}
}

func refusedDelegation(format string, args ...any) error {
	e := nucleus.Errorf(nucleus.KindDenied, format, args...)
	e.Rule = ruleDelegation
	return e
}

// prepareSub resolves spawn_agent and manage_pods.
func (n *Node) prepareSub(ctx context.Context, p *Pod, r request, raw []byte, pre *prepared) error {
	decoded, err := tools.Decode(r.op, raw)
	if err != nil {
		return err
	}
	switch args := decoded.(type) {
	case tools.SpawnArgs:
		return n.prepareSpawn(ctx, p, r, args, pre)
	case tools.PodsArgs:
		switch do := nucleus.SubDo(args.Action); do {
		case nucleus.SubCreate:
			return n.prepareCreate(ctx, p, r, args.NewPod, pre)
		case nucleus.SubList:
			pre.action.Sub = &nucleus.Sub{Do: do}
			pre.effect = func(context.Context, nucleus.Permit) (json.RawMessage, error) { return json.Marshal(n.below(p)) }
			return nil
		case nucleus.SubWait, nucleus.SubFetch, nucleus.SubDelete:
			return n.prepareWith(ctx, p, r, do, args, pre)
		}
	}
	return nucleus.Errorf(nucleus.KindInvalid, "call is POST /v1/pods/POD/tools/OPERATION, which the machine's proxy makes of it")
}

// prepareWith resolves what is done with a pod that is there.
func (n *Node) prepareWith(ctx context.Context, p *Pod, r request, do nucleus.SubDo, args tools.PodsArgs, pre *prepared) error {
	sub, err := n.subOf(p, args.Pod)
	if err != nil {
		return err
	}
	if do != nucleus.SubDelete && sub.record.Sub.Parent != p.record.ID {
		return nucleus.Errorf(nucleus.KindInvalid, "pod %s belongs to pod %s, which alone can %s", sub.record.ID, sub.record.Sub.Parent, do)
	}
	pre.action.Sub = &nucleus.Sub{Do: do, Pod: args.Pod, Keep: args.Keep}
	switch do {
	case nucleus.SubWait:
		if sub.errandOf() == nil {
			return nucleus.Errorf(nucleus.KindInvalid, "pod %s runs no sub-agent to wait for", args.Pod)
		}
		until := time.Now().Add(time.Duration(tools.Seconds(args.WaitS)) * time.Second)
		pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
			return n.collect(ctx, p, sub, r.caller.KeyID, until, args.Keep)
		}
	case nucleus.SubDelete:
		pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
			if err := n.DeletePod(ctx, r.caller.KeyID, args.Pod); err != nil {
				return nil, err
			}
			return json.Marshal(map[string]any{"pod": args.Pod, "deleted": true})
		}
	case nucleus.SubFetch:
		return n.prepareComeBack(ctx, p, sub, r, args.Repo, pre)
	}
	return nil
}

// subOf finds a living pod below p.
func (n *Node) subOf(p *Pod, id string) (*Pod, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.isBelow(id, p.record.ID) {
		return nil, nucleus.Errorf(nucleus.KindNotFound, "there is no pod %s below pod %s (manage_pods list)", id, p.record.ID)
	}
	return n.pods[id], nil
}

// isBelow reports whether pod id was asked for by pod above, or by one below it. The
// caller holds the mutex.
func (n *Node) isBelow(id, above string) bool {
	for p := n.pods[id]; p != nil && p.record.Sub != nil; p = n.pods[p.record.Sub.Parent] {
		if p.record.Sub.Parent == above {
			return true
		}
	}
	return false
}

// manages reports whether the agent of pod caller may call the tools of pod id: it is
// below, and the caller's policy lets it manage pods. What is called is decided by the policy
// of pod id, which has nothing that the caller's has not.
func (n *Node) manages(caller, id string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	above := n.pods[caller]
	return above != nil && above.policy.Level(nucleus.ManagePods) != policy.Never && n.isBelow(id, caller)
}

// above are the pods above p, the nearest first.
func (n *Node) above(p *Pod) []*Pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	var pods []*Pod
	for p.record.Sub != nil {
		if p = n.pods[p.record.Sub.Parent]; p == nil {
			break
		}
		pods = append(pods, p)
	}
	return pods
}

// workspaceOf is the workspace that a person knows the pod's session by.
func (n *Node) workspaceOf(p *Pod) string {
	for _, above := range n.above(p) {
		p = above
	}
	return p.record.Spec.Workspace
}

// subStatus is what an agent is told of a pod below its own.
type subStatus struct {
	Pod      string       `json:"pod"`
	Parent   string       `json:"parent"`
	State    string       `json:"state"`
	Agent    string       `json:"agent,omitempty"` // of its sub-agent: "running" or "ended"
	Driver   string       `json:"driver"`
	Tier     nucleus.Tier `json:"tier"`
	Mode     nucleus.Mode `json:"mode"`
	Repo     string       `json:"repo,omitempty"`
	Branch   string       `json:"branch,omitempty"`
	Base     string       `json:"base,omitempty"`
	Exposure []string     `json:"exposure"` // of the whole session
	LeftOut  string       `json:"left_out,omitempty"`
	Created  string       `json:"created"`
}

func (p *Pod) subStatus() subStatus {
	s := p.status()
	status := subStatus{Pod: s.ID, Parent: s.Parent, State: s.State, Driver: s.Driver, Tier: s.Tier, Mode: s.Mode, Exposure: s.Exposure, Created: s.Created}
	if e := p.errandOf(); e != nil {
		status.Agent = e.stateName()
	}
	for _, r := range s.Repos {
		status.Repo, status.Branch, status.Base = r.Name, r.Branch, r.Base
	}
	return status
}

// below lists the pods below p, the oldest first.
func (n *Node) below(p *Pod) []subStatus {
	n.mu.Lock()
	pods := slices.DeleteFunc(n.podList(), func(q *Pod) bool { return !n.isBelow(q.record.ID, p.record.ID) })
	n.mu.Unlock()
	list := []subStatus{}
	for _, q := range pods {
		list = append(list, q.subStatus())
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Created+list[i].Pod < list[j].Created+list[j].Pod })
	return list
}

// endSubs ends the pods that p's agent asked for, and those below them.
func (n *Node) endSubs(ctx context.Context, actor string, p *Pod) error {
	n.mu.Lock()
	pods := n.askedBy(p)
	n.mu.Unlock()
	var errs []error
	for _, q := range pods {
		if err := n.DeletePod(ctx, actor, q.record.ID); err != nil && nucleus.AsError(err).Kind != nucleus.KindNotFound {
			errs = append(errs, fmt.Errorf("ending pod %s below pod %s: %w", q.record.ID, p.record.ID, err))
		}
	}
	return errors.Join(errs...)
}

// failSubs ends the pods below one that is no more. Where they cannot end in order, as without a
// log, they fail with it.
func (n *Node) failSubs(p *Pod) {
	if err := n.endSubs(context.Background(), "", p); err == nil {
		return
	}
	n.mu.Lock()
	pods := n.askedBy(p)
	n.mu.Unlock()
	for _, q := range pods {
		n.failPod(q, errAboveEnded)
	}
}

var errAboveEnded = errors.New("the pod above it has ended")

// askedBy are the pods that p's agent asked for. The caller holds the mutex.
func (n *Node) askedBy(p *Pod) []*Pod {
	return slices.DeleteFunc(n.podList(), func(q *Pod) bool { return q.record.Sub == nil || q.record.Sub.Parent != p.record.ID })
}

// derive works out the pod that args ask for from the record of the one that asks. With
// agent it has the asking pod's agent and the route to its model.
func (n *Node) derive(ctx context.Context, p *Pod, args tools.NewPod, agent bool) (*newSub, error) {
	from := p.record.Spec
	spec := nucleus.PodSpec{
		Driver: p.record.Driver, Require: from.Require, Approvals: from.Approvals, Mode: from.Mode, Image: from.Image, Resources: from.Resources, Watched: from.Watched,
		Env: from.Env, Identity: from.Identity,
	}
	if agent {
		spec.Agent, spec.Model = from.Agent, from.Model
	}
	requested, err := requestedPolicy(args.Policy)
	if err != nil {
		return nil, err
	}
	effective, budget := policy.Delegate(p.policy, requested), nucleus.NoLimit()
	if requested != nil {
		budget = requested.Budget() // set aside whole, or refused
	}
	if spec.Mode, err = narrowMode(from.Mode, args.Mode); err != nil {
		return nil, err
	}
	if spec.Env, err = narrowEnv(from.Env, args.Env); err != nil {
		return nil, err
	}
	want, err := args.Limits()
	if err != nil {
		return nil, err
	}
	if want != nil {
		if spec.Resources, err = narrowResources(from.Resources, *want); err != nil {
			return nil, err
		}
	}
	if args.Require != "" {
		if spec.Require = nucleus.Tier(args.Require); !spec.Require.AtLeast(from.Require) {
			return nil, refusedDelegation("tier %s is weaker than %s, which this pod was made to have", args.Require, from.Require)
		}
		spec.Driver = "" // the strongest that has it
	}
	if args.Driver != "" {
		spec.Driver = args.Driver
	}
	driver, err := n.chooseDriver(ctx, spec)
	if err != nil {
		return nil, err
	}
	if !driver.Tier().AtLeast(p.record.Tier) {
		return nil, refusedDelegation("driver %s has tier %s, this pod has %s", driver.Name(), driver.Tier(), p.record.Tier)
	}
	if spec.Policy, err = effective.Canonical(); err != nil {
		return nil, err
	}
	child := n.newPod(spec, driver)
	child.record.Sub = &subRecord{Parent: p.record.ID, Session: p.root.id, Depth: 1}
	if p.record.Sub != nil {
		child.record.Sub.Depth = p.record.Sub.Depth + 1
	}
	child.record.Untrusted = p.record.Untrusted
	child.asked = &newSub{parent: p, pod: child, budget: budget}
	return child.asked, child.setPolicy(effective)
}

// requestedPolicy reads a profile's name or a whole policy; nil for neither.
func requestedPolicy(raw json.RawMessage) (*policy.Policy, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	requested, err := resolvePolicy(raw)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "policy: %v", err)
	}
	return requested, nil
}

func narrowMode(from nucleus.Mode, want string) (nucleus.Mode, error) {
	switch mode := nucleus.Mode(want); {
	case want == "":
		return from, nil
	case mode != nucleus.Mediated && mode != nucleus.Contained:
		return "", nucleus.Errorf(nucleus.KindInvalid, "mode %q: want %q or %q", want, nucleus.Mediated, nucleus.Contained)
	case mode == nucleus.Contained && from != nucleus.Contained:
		return "", refusedDelegation("mode contained: this pod is %s", from)
	default:
		return mode, nil
	}
}

func narrowEnv(from map[string]string, want *[]string) (map[string]string, error) {
	if want == nil {
		return from, nil
	}
	env := map[string]string{}
	for _, name := range *want {
		value, ok := from[name]
		if !ok {
			return nil, refusedDelegation("env: this pod was not given %q", name)
		}
		env[name] = value
	}
	return env, nil
}

// narrowResources takes what is asked for where it is no more than what is stated. What
// is not stated is a default that the driver knows alone: nothing is smaller for certain.
func narrowResources(from, want nucleus.Resources) (nucleus.Resources, error) {
	for _, r := range []struct {
		name  string
		from  int
		asked *int
	}{{"cpu", from.CPU, &want.CPU}, {"memory_mb", from.MemoryMB, &want.MemoryMB}, {"pids", from.Pids, &want.Pids}, {"disk_mb", from.DiskMB, &want.DiskMB}} {
		switch {
		case *r.asked == 0:
			*r.asked = r.from
		case r.from == 0:
			return want, refusedDelegation("resources.%s is %d; this pod states none: leave it out", r.name, *r.asked)
		case *r.asked > r.from:
			return want, refusedDelegation("resources.%s is %d, this pod has %d", r.name, *r.asked, r.from)
		}
	}
	return want, want.Check()
}

// prepareCreate resolves a pod without an agent.
func (n *Node) prepareCreate(ctx context.Context, p *Pod, r request, args tools.NewPod, pre *prepared) error {
	sub, err := n.derive(ctx, p, args, false)
	if err != nil {
		return err
	}
	child := sub.pod
	pre.action.Sub = child.asAction(nucleus.SubCreate)
	leftOut, err := n.goAlong(ctx, sub, r.op, args.Repo, pre)
	if err != nil || pre.effect != nil {
		return err
	}
	pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
		if err := n.create(ctx, r.caller.KeyID, child); err != nil {
			return nil, n.abandon(ctx, r.caller.KeyID, child, err)
		}
		status := child.subStatus()
		status.LeftOut = leftOut
		return json.Marshal(status)
	}
	return nil
}

// prepareSpawn resolves a pod with a sub-agent on a task.
func (n *Node) prepareSpawn(ctx context.Context, p *Pod, r request, args tools.SpawnArgs, pre *prepared) error {
	until := time.Now().Add(time.Duration(tools.Seconds(args.WaitS)) * time.Second)
	if p.record.Spec.Agent == nil {
		return nucleus.Errorf(nucleus.KindInvalid, "pod %s was made without an agent: there is none to start", p.record.ID)
	}
	argv, err := p.record.Spec.Agent.ForTask(args.Task)
	if err != nil {
		return err
	}
	sub, err := n.derive(ctx, p, args.NewPod, true)
	if err != nil {
		return err
	}
	child := sub.pod
	if child.record.Spec.Mode != p.record.Spec.Mode {
		return nucleus.Errorf(nucleus.KindInvalid, "mode %s: the agent of this pod was prepared for %s (manage_pods create makes a pod without an agent)", child.record.Spec.Mode, p.record.Spec.Mode)
	}
	s := child.asAction(nucleus.SubSpawn)
	s.Task, s.Agent, s.Keep = args.Task, p.record.Spec.Agent.Name, args.Keep
	pre.action.Sub = s
	leftOut, err := n.goAlong(ctx, sub, r.op, args.Repo, pre)
	if err != nil || pre.effect != nil {
		return err
	}
	pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
		err := n.create(ctx, r.caller.KeyID, child)
		if err == nil {
			err = n.startErrand(ctx, child, r.caller.KeyID, argv, leftOut)
		}
		if err != nil {
			return nil, n.abandon(ctx, r.caller.KeyID, child, err)
		}
		return n.collect(ctx, p, child, r.caller.KeyID, until, args.Keep)
	}
	return nil
}

// abandon removes a pod that did not come to serve, and says why it did not. What went wrong
// on the host names its places: the machine is not told.
func (n *Node) abandon(ctx context.Context, actor string, child *Pod, why error) error {
	if kind := nucleus.AsError(why).Kind; kind == nucleus.KindFailed || kind == nucleus.KindInternal {
		slog.Error("a pod did not come to serve", "pod", child.record.ID, "parent", child.record.Sub.Parent, "cause", why)
		why = nucleus.Errorf(kind, "pod %s did not come to serve; why is the host's affair, and in its log", child.record.ID)
	}
	err := n.DeletePod(ctx, actor, child.record.ID)
	if err == nil || nucleus.AsError(err).Kind == nucleus.KindNotFound {
		return why
	}
	slog.Error("removing a pod that did not come to serve", "pod", child.record.ID, "error", err)
	return nucleus.Errorf(nucleus.AsError(why).Kind, "%v; and what is left of it could not be removed", why)
}

// asAction is the pod as an action shows it.
func (p *Pod) asAction(do nucleus.SubDo) *nucleus.Sub {
	spec := p.record.Spec
	return &nucleus.Sub{
		Do: do, Policy: p.record.Policy, Driver: p.record.Driver, Tier: p.record.Tier, Mode: spec.Mode,
		Resources: &spec.Resources, Env: slices.Sorted(maps.Keys(spec.Env)),
	}
}

// goAlong takes the repository that goes along into quarantine, as for a push. It returns what
// of the working tree stays. pre.effect is set where the policy will say no.
func (n *Node) goAlong(ctx context.Context, sub *newSub, op nucleus.Op, name string, pre *prepared) (leftOut string, err error) {
	p := sub.parent
	if name != "" || len(p.record.Repos) > 0 {
		if sub.repo, sub.from, err = p.storedRepo(name); err != nil {
			return "", err
		}
		pre.action.Sub.Repo, pre.action.Sub.Branch = sub.repo.Name, sub.repo.Branch
	}
	if n.hopeless(p, op, pre) {
		return "", nil
	}
	pre.effect = nil
	pre.sub = sub
	if sub.repo.Name == "" {
		return "", nil
	}
	q, err := n.newTransfer(ctx, p, sub.repo, p.transfersDir())
	if err != nil {
		return "", err
	}
	pre.sent, sub.origin = q, q
	if sub.commit, err = q.take(ctx, "refs/heads/"+sub.repo.Branch); err != nil {
		return "", err
	}
	pre.action.Sub.Commit = sub.commit
	leftOut, err = q.leftOut(ctx, sub.commit)
	if leftOut != "" {
		pre.detail = append(pre.detail, nucleus.Detail{Title: "left out", Text: leftOut})
	}
	return leftOut, err
}

// leftOut says what of the machine's working tree is not in commit; "" for nothing.
func (t *transfer) leftOut(ctx context.Context, commit string) (string, error) {
	worktree, err := t.take(ctx, tools.WorktreeRef)
	if err != nil {
		return "", err
	}
	// Compared, not walked: a few trees can stand for more files than anybody can count.
	trees, err := t.Run(ctx, "rev-parse", commit+"^{tree}", worktree+"^{tree}")
	if err != nil {
		return "", err
	}
	if of := strings.Fields(trees); len(of) != 2 || of[0] != of[1] {
		return fmt.Sprintf("the working tree differs from commit %.12s, and what is not committed stays: commit what is to go along", commit), nil
	}
	return "", nil
}

// subBranch is the branch of a pod that was asked for, there and where it comes back.
func subBranch(pod string) string { return "cal/sub/" + pod }

// nameBranch says what goes along, once the pod has its name.
func (p *Pod) nameBranch() {
	if s := p.asked; s != nil && s.origin != nil {
		p.record.Repos = []nucleus.RepoStatus{{
			Name: s.repo.Name, Branch: subBranch(p.record.ID), Base: s.commit, Trusted: s.repo.Trusted && !p.record.Untrusted, Why: "as in pod " + s.parent.record.ID,
		}}
	}
}

// importSub hands the repository over that goes along. The quarantine in which it was checked
// is the pod's origin from here on: it holds nothing else of the host.
func (n *Node) importSub(ctx context.Context, p *Pod, actor string) error {
	s := p.asked
	if s == nil || s.origin == nil {
		return nil
	}
	repo := p.record.Repos[0]
	place := filepath.Join(p.record.Workspace, "repos", repo.Name+".origin.git")
	if err := s.origin.moveTo(place); err != nil {
		return err
	}
	p.mu.Lock()
	s.held = true
	p.mu.Unlock()
	stored := nucleus.RepoRecord{
		Path: place, Branch: repo.Branch, Base: repo.Base, PersonBase: s.from.PersonBase, Trusted: repo.Trusted, BaseBranch: s.from.BaseBranch,
		Remotes: s.from.Remotes, Heads: s.from.Heads,
	}
	if stored.PersonBase == "" {
		stored.PersonBase = s.from.Base
	}
	if _, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindRepoImport,
		Data: data(map[string]any{"repo": repo.Name, "branch": repo.Branch, "base": repo.Base, "from": s.parent.record.ID}),
	}); err != nil {
		return logFailure(err)
	}
	if err := p.writeRepo(repo.Name, stored); err != nil {
		return err
	}
	return p.handOverFor(ctx, git.Repo{Dir: place}, nucleus.Repo{Name: repo.Name, Branch: repo.Branch}, repo.Name, repo.Base, false, stored.Remotes)
}

// moveTo makes a transfer the origin of a pod, with a hold for it.
func (t *transfer) moveTo(place string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := os.Rename(t.Dir, place); err != nil {
		return err
	}
	t.Dir = place
	t.kept = true // it goes with the pod
	t.holders++
	return nil
}

// prepareComeBack resolves the fetch of the branch of a pod below.
func (n *Node) prepareComeBack(ctx context.Context, p, sub *Pod, r request, name string, pre *prepared) error {
	repo, err := sub.repo(name)
	if err != nil {
		return err
	}
	pre.action.Sub.Repo, pre.action.Sub.Branch = repo.Name, repo.Branch
	if n.hopeless(p, r.op, pre) {
		return nil
	}
	pre.effect = nil
	q, err := n.newTransfer(ctx, sub, repo, sub.transfersDir())
	if err != nil {
		return err
	}
	pre.sent = q
	back, err := q.takeBack(ctx)
	if err != nil {
		return err
	}
	pre.action.Sub.Commit = back.Head
	pre.effect = func(ctx context.Context, _ nucleus.Permit) (json.RawMessage, error) {
		if err := n.give(ctx, p, q, back, r.caller.KeyID); err != nil {
			return nil, err
		}
		return json.Marshal(back)
	}
	return nil
}

// comeBack is a branch that comes back from a pod below.
type comeBack struct {
	Pod     string `json:"pod"`
	Repo    string `json:"repo"`
	Branch  string `json:"branch"`
	Base    string `json:"base"`
	Head    string `json:"head"`
	Commits int    `json:"commits"`
	LeftOut string `json:"left_out,omitempty"`
}

// takeBack takes the pod's branch into quarantine.
func (t *transfer) takeBack(ctx context.Context) (comeBack, error) {
	back := comeBack{Pod: t.pod.record.ID, Repo: t.repo.Name, Branch: t.repo.Branch, Base: t.stored.Base}
	var err error
	if back.Head, err = t.take(ctx, "refs/heads/"+back.Branch); err != nil {
		return back, err
	}
	if back.LeftOut, err = t.leftOut(ctx, back.Head); err != nil {
		return back, err
	}
	commits, err := t.Run(ctx, "rev-list", "--count", back.Base+".."+back.Head)
	if err != nil {
		return back, err
	}
	back.Commits, err = strconv.Atoi(strings.TrimSpace(commits))
	return back, err
}

// give brings what was taken back into the machine of p, as a branch of its own. A branch
// without commits is not brought.
func (n *Node) give(ctx context.Context, p *Pod, q *transfer, back comeBack, actor string) error {
	if back.Commits == 0 {
		return nil
	}
	values := data(map[string]any{"repo": back.Repo, "branch": back.Branch, "base": back.Base, "head": back.Head, "from": back.Pod})
	for _, e := range []nucleus.Entry{
		{Pod: q.pod.record.ID, Session: q.pod.record.Session, Kind: nucleus.KindRepoFetch},
		{Pod: p.record.ID, Session: p.record.Session, Kind: nucleus.KindRepoImport},
	} {
		e.Actor, e.Data = actor, values
		if _, err := n.append(e); err != nil {
			return logFailure(err)
		}
	}
	add := tools.Incoming{Repo: back.Repo, Branch: back.Branch, Commit: back.Head, Base: back.Base}
	return p.sendRepo(ctx, guest.RepoCall{Add: &add}, func(out io.Writer) error { return q.WritePack(ctx, out, back.Head, back.Base) })
}
