package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"cal/guest"
	"cal/guest/tools"
	"cal/internal/git"
	"cal/nucleus"
	"cal/wire"
)

// Limits bound what machines can make the host store, in bytes. 0 is the default.
type Limits struct {
	Transfer int64 // one branch on its way
	Pod      int64 // of one root session, its sub-pods included: branches on their way, and kept for pushes that wait for a person
	Node     int64 // of all pods
}

// The defaults. A branch holds what is new since the commit that was handed over: more
// than 4 GiB of it is no work of a session. A pod may have pushes of that size that wait for a
// person while another branch is taken; several pods share what one disk can spare.
const (
	maxTransfer = 4 << 30
	maxPod      = 2 * maxTransfer
	maxNode     = 4 * maxTransfer
)

func (l Limits) withDefaults() Limits {
	return Limits{cmp.Or(l.Transfer, maxTransfer), cmp.Or(l.Pod, maxPod), cmp.Or(l.Node, maxNode)}
}

// storage counts what machines have made the host store.
type storage struct {
	limits Limits

	mu      sync.Mutex
	stored  tally // on its way or waiting
	waiting tally // for a person
}

// tally is bytes by root session.
type tally struct {
	all      int64
	sessions map[string]int64
}

func (t *tally) add(session string, bytes int64) {
	if t.sessions == nil {
		t.sessions = map[string]int64{}
	}
	t.all += bytes
	if t.sessions[session] += bytes; t.sessions[session] == 0 {
		delete(t.sessions, session)
	}
}

// within refuses bytes that would make a session, or all of them, exceed their limit.
func (t *tally) within(session string, bytes int64, l Limits) error {
	const what = "would keep more than %d bytes in quarantine; pushes that wait for an answer count (cal approve)"
	switch {
	case bytes <= 0:
	case t.sessions[session]+bytes > l.Pod:
		return nucleus.Errorf(nucleus.KindTooLarge, "session %s "+what, session, l.Pod)
	case t.all+bytes > l.Node:
		return nucleus.Errorf(nucleus.KindTooLarge, "all pods together "+what, l.Node)
	}
	return nil
}

func (s *storage) add(session string, bytes int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stored.within(session, bytes, s.limits); err != nil {
		return err
	}
	s.stored.add(session, bytes)
	return nil
}

// wait counts bytes as kept for an answer. They leave room for one branch on its way: who
// comes back for the answer sends its branch again.
func (s *storage) wait(session string, bytes int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.limits
	room.Pod, room.Node = room.Pod-room.Transfer, room.Node-room.Transfer
	if err := s.waiting.within(session, bytes, room); err != nil {
		return err
	}
	s.waiting.add(session, bytes)
	return nil
}

func (s *storage) remove(session string, stored, waiting int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stored.add(session, -stored)
	s.waiting.add(session, -waiting)
}

// transfer is what a machine sent for one request: a bare repository of its own, which
// is removed whole when nobody holds it any longer. A nil one holds nothing.
type transfer struct {
	git.Quarantine
	pod     *Pod
	repo    nucleus.RepoStatus
	stored  nucleus.RepoRecord
	charged int64 // while it is filled only its maker changes it

	mu      sync.Mutex
	holders int
	waiting int64
	kept    bool
}

// newTransfer makes the quarantine in a directory of its own below dir. The caller holds it.
func (n *Node) newTransfer(ctx context.Context, p *Pod, r nucleus.RepoStatus, dir string) (*transfer, error) {
	stored, err := p.readRepo(r.Name)
	if err != nil {
		return nil, err
	}
	if _, err := p.wire(); err != nil {
		return nil, err
	}
	// Not what is above it: of a pod that ends meanwhile nothing may come to be again.
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	t := &transfer{pod: p, repo: r, stored: stored, holders: 1}
	place, err := os.MkdirTemp(dir, "*.git")
	if err != nil {
		return nil, err
	}
	t.Dir = place
	if t.Quarantine, err = git.MakeQuarantine(ctx, place, git.Repo{Dir: stored.Path}); err == nil {
		err = t.settle()
	}
	if err != nil {
		t.drop()
		return nil, err
	}
	return t, nil
}

// transfersDir holds what is kept for the requests of a pod; it goes with the pod.
func (p *Pod) transfersDir() string { return filepath.Join(p.dir, "transfers") }

// hold is answered by a drop.
func (t *transfer) hold() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holders++
}

// drop gives a hold back; the last one removes what was sent.
func (t *transfer) drop() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holders--; t.holders > 0 {
		return
	}
	if !t.kept {
		if err := os.RemoveAll(t.Dir); err != nil {
			slog.Error("a quarantine could not be removed; it goes with its pod", "dir", t.Dir, "error", err)
		}
	}
	t.pod.node.storage.remove(t.pod.record.root(), t.charged, t.waiting)
	t.charged, t.waiting = 0, 0
}

// await counts what was sent as kept for an answer, up to the last drop.
func (t *transfer) await() error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting > 0 {
		return nil
	}
	if err := t.pod.node.storage.wait(t.pod.record.root(), t.charged); err != nil {
		return err
	}
	t.waiting = t.charged
	return nil
}

// charge counts bytes that arrive.
func (t *transfer) charge(bytes int64) error {
	if t.charged+bytes > t.pod.node.storage.limits.Transfer {
		return nucleus.Errorf(nucleus.KindTooLarge, "the machine's branch is larger than %d bytes", t.pod.node.storage.limits.Transfer)
	}
	if err := t.pod.node.storage.add(t.pod.record.root(), bytes); err != nil {
		return err
	}
	t.charged += bytes
	return nil
}

// settle counts what lies on the disk, which is more than what arrived where a pack
// builds on what the person has.
func (t *transfer) settle() error {
	var bytes int64
	err := filepath.WalkDir(t.Dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			bytes += max(stat.Blocks*512, info.Size())
		}
		return nil
	})
	if err != nil {
		return err
	}
	return t.charge(bytes - t.charged)
}

// take brings one ref of the machine into the quarantine and returns its commit.
func (t *transfer) take(ctx context.Context, ref string) (commit string, err error) {
	session, err := t.pod.wire()
	if err != nil {
		return "", err
	}
	stream, err := session.Open(ctx, guest.StreamRepo, guest.RepoCall{Out: &tools.Bundle{Repo: t.repo.Name, Ref: ref, Base: t.stored.Base}})
	if err != nil {
		return "", err
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, func() { stream.Close() })
	defer stop()
	in := &bundleReader{stream: stream, charge: t.charge}
	if err := in.next(); err != nil {
		return "", in.explain(err)
	}
	if in.ended && in.result == nil { // no piece at all
		if err := in.next(); err != nil {
			return "", in.explain(err)
		}
	}
	if in.result == nil {
		commit, err = t.Take(ctx, in, ref, t.stored.Base)
		if err = cmp.Or(in.err, err); err == nil {
			err = in.end()
		}
		if err != nil {
			return "", in.explain(err)
		}
	}
	sent, err := in.sent()
	if err != nil {
		return "", err
	}
	switch {
	case sent.Empty && commit == "": // nothing that the person's repository has not
		if commit, err = known(ctx, t.Quarantine, sent.Commit, t.stored.Base); err != nil {
			return "", refusedBundle(ref, err)
		}
	case sent.Empty || commit == "":
		return "", refusedBundle(ref, errors.New("it is neither empty nor a bundle"))
	}
	return commit, t.settle()
}

func refusedBundle(ref string, err error) error {
	return nucleus.Errorf(nucleus.KindFailed, "what the machine sent for %s was refused: %v", ref, err)
}

// bundleReader reads the pieces of a bundle, and the result behind them.
type bundleReader struct {
	stream *wire.Stream
	charge func(int64) error
	rest   []byte
	ended  bool          // no piece follows
	result *tools.Result // nil: has not come
	err    error         // of the wire or of a limit, not of what was sent
}

// piecePatience is how long a machine may take for one piece: as long as git may run, here or
// there.
const piecePatience = 10 * time.Minute

// next takes one frame.
func (r *bundleReader) next() error {
	r.stream.SetReadDeadline(time.Now().Add(piecePatience))
	kind, payload, err := r.stream.Recv(1 << 20)
	switch {
	case err != nil:
		r.err = fmt.Errorf("the machine's bundle: %w", err)
	case kind == wire.FrameData && !r.ended:
		r.rest, r.ended = payload, len(payload) == 0
		r.err = r.charge(int64(len(payload)))
	case kind == wire.FrameResult:
		r.ended = true
		r.result = &tools.Result{}
		if err := json.Unmarshal(payload, r.result); err != nil {
			r.err = fmt.Errorf("the machine's bundle: its result: %w", err)
		}
		r.result.Error = boundedError(r.result.Error)
	default:
		r.err = fmt.Errorf("the machine's bundle: frame %q", kind)
	}
	return r.err
}

func (r *bundleReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.ended {
			return 0, io.EOF
		}
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// end takes what is left up to the result; pieces behind the pack are no part of it.
func (r *bundleReader) end() error {
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	if r.result == nil {
		return r.next()
	}
	return nil
}

func (r *bundleReader) sent() (sent tools.BundleResult, err error) {
	if r.result == nil {
		return sent, errors.New("the machine's bundle: no result")
	}
	if r.result.Error != nil {
		return sent, r.result.Error
	}
	if err := json.Unmarshal(r.result.Value, &sent); err != nil {
		return sent, fmt.Errorf("the machine's bundle: its result: %w", err)
	}
	return sent, nil
}

// explain prefers what the machine says of its own failure.
func (r *bundleReader) explain(err error) error {
	if r.result != nil && r.result.Error != nil {
		return r.result.Error
	}
	var known *nucleus.Error
	if r.err != nil || errors.As(err, &known) {
		return err
	}
	return nucleus.Errorf(nucleus.KindFailed, "what the machine sent was refused: %v", err)
}

// known admits a commit that the machine only names: it must be what the machine was
// given. Anything else of the person's repository stays unnamed.
func known(ctx context.Context, q git.Quarantine, commit, base string) (string, error) {
	if !objectID.MatchString(commit) {
		return "", fmt.Errorf("%q is no object id", cut(commit, 80))
	}
	if commit == base {
		return commit, nil
	}
	taken, err := q.Run(ctx, "for-each-ref", "--format=%(objectname)")
	if err != nil {
		return "", err
	}
	if slices.Contains(strings.Fields(taken), commit) { // what it sent before
		return commit, nil
	}
	if ok, err := q.IsAncestor(ctx, commit, base); err != nil || !ok {
		return "", fmt.Errorf("commit %s is not of the history that the machine was given", commit)
	}
	return commit, nil
}

var objectID = regexp.MustCompile(`^[0-9a-f]{40}([0-9a-f]{24})?$`)

// keep makes a transfer what the workspace has of a repository, in place of the one
// before, which is removed.
func (t *transfer) keep(head, worktree string) error {
	place := filepath.Join(filepath.Base(t.pod.keptDir(t.repo.Name)), filepath.Base(t.Dir))
	if err := t.pod.changeRepo(t.repo.Name, func(s *nucleus.RepoRecord) {
		s.Head, s.Worktree, s.Quarantine = head, worktree, place
	}); err != nil {
		return err
	}
	t.kept = true
	others, err := os.ReadDir(t.pod.keptDir(t.repo.Name))
	if err != nil {
		return err
	}
	for _, other := range others {
		if other.Name() != filepath.Base(t.Dir) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(t.pod.keptDir(t.repo.Name), other.Name())))
		}
	}
	return err
}

// keptDir holds what was fetched of a repository last, and while a fetch runs what it brings.
func (p *Pod) keptDir(name string) string {
	return filepath.Join(p.record.Workspace, "repos", name+".work")
}
