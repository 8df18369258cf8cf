// Package workspace is the person's side on disk: where CAL keeps its things,
// how its daemons are started, which repositories a workspace holds and how work
// comes back from them.
//
// It runs as the person, on the person's files. It promises that nothing which came
// out of a machine is executed here, and that a working tree is changed only when it
// is clean and only by what the person asked for.
package workspace

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	approvals "cal/approval/client"
	"cal/internal/keyfile"
	"cal/node/client"
	"cal/nucleus"
)

// Home is CAL_HOME.
type Home struct{ Dir string }

// OpenHome returns the person's CAL_HOME, which it makes at first use.
func OpenHome() (Home, error) {
	dir := os.Getenv("CAL_HOME")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return Home{}, fmt.Errorf("neither CAL_HOME nor HOME is set")
		}
		dir = filepath.Join(home, ".cal")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Home{}, err
	}
	return Home{dir}, os.MkdirAll(filepath.Join(dir, "run"), 0o700)
}

// The places below Home that several programs share.
func (h Home) NodeSocket() string      { return filepath.Join(h.Dir, "run", "node.sock") }
func (h Home) Probes() string          { return filepath.Join(h.Dir, "run", "probes") } // what a probe makes
func (h Home) AuthoritySocket() string { return filepath.Join(h.Dir, "run", "authority.sock") }
func (h Home) AuthorityDir() string    { return filepath.Join(h.Dir, "authority") }
func (h Home) Log() string             { return filepath.Join(h.Dir, "log") }
func (h Home) LogKey() string          { return filepath.Join(h.Dir, "keys", "log.key") }
func (h Home) Workspace(name string) string {
	return filepath.Join(h.Dir, "isolation", "vms", name)
}

// Program returns the path of one of CAL's programs: beside this one, else on PATH.
func Program(name string) (string, error) {
	self, err := os.Executable()
	if err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			beside := filepath.Join(filepath.Dir(self), name)
			if _, err := os.Stat(beside); err == nil {
				return beside, nil
			}
		}
	}
	found, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is neither beside cal nor on PATH (make install)", name)
	}
	return filepath.Abs(found)
}

// Node returns a client of the person's node, which is started when none runs.
// A node of another version is an error that says how to replace it.
func (h Home) Node(ctx context.Context) (*client.Client, error) {
	if err := h.startAuthority(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		// What needs no approval goes on.
		fmt.Fprintln(os.Stderr, "cal: nobody can approve:", err)
	}
	config, err := h.Config()
	if err != nil {
		return nil, err
	}
	c, err := h.runningNode(ctx)
	if err == nil {
		if err := requiresToo(ctx, c, config); err != nil {
			return nil, err
		}
		return c, nil
	}
	if !errors.Is(err, ErrNoNode) {
		return nil, err
	}
	program, err := Program("nucleus-node")
	if err != nil {
		return nil, err
	}
	args := []string{"--home", h.Dir, "--authority", h.AuthoritySocket()}
	if config.Approvals.Require != "" {
		args = append(args, "--require-approvals", config.Approvals.Require)
	}
	for _, w := range config.Log.Witnesses {
		args = append(args, "--witness", w.URL+" "+w.Key)
	}
	ended, err := startDaemon(program, filepath.Join(h.Dir, "run", "node.log"), args...)
	if err != nil {
		return nil, err
	}
	return h.awaitNode(ctx, ended)
}

// requiresToo refuses a node that was started before what is set for all was set.
func requiresToo(ctx context.Context, c *client.Client, config Config) error {
	health, err := c.Health(ctx)
	if err == nil && health.RequireApprovals != config.Approvals.Require {
		err = fmt.Errorf("the running node was started with approvals.require %q, config.yaml says %q (cal node restart; what runs goes on)", health.RequireApprovals, config.Approvals.Require)
	}
	return err
}

// RestartNode replaces the running node. Machines of its version go on; those of another end.
func (h Home) RestartNode(ctx context.Context) (*client.Client, error) {
	if err := h.StopNode(ctx); err != nil && !errors.Is(err, ErrNoNode) {
		return nil, err
	}
	return h.Node(ctx)
}

// HasWorkspace says why there is no workspace of that name.
func (h Home) HasWorkspace(name string) error {
	if name == "" || name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return fmt.Errorf("%q is no name of a workspace", name)
	}
	if _, err := os.Stat(h.Workspace(name)); err != nil {
		return fmt.Errorf("no workspace %q (cal repo status)", name)
	}
	return nil
}

// DeleteWorkspace removes a workspace and everything in it; the node does, and records it. One
// that a machine uses is refused.
func (h Home) DeleteWorkspace(ctx context.Context, name string) error {
	if err := h.HasWorkspace(name); err != nil {
		return err
	}
	c, err := h.Node(ctx)
	if err != nil {
		return err
	}
	return c.DeleteWorkspace(ctx, name)
}

// ErrNoNode says that no node runs.
var ErrNoNode = errors.New("no node runs (cal node start)")

func (h Home) runningNode(ctx context.Context) (*client.Client, error) {
	if _, err := os.Stat(h.NodeSocket()); err != nil {
		return nil, ErrNoNode
	}
	key, err := h.operatorKey()
	if err != nil {
		return nil, ErrNoNode
	}
	c := client.New(h.NodeSocket(), "operator", key)
	health, err := c.Health(ctx)
	if err != nil {
		return nil, ErrNoNode
	}
	if err := awaitSecond(ctx, health.AdmitsFrom); err != nil {
		return nil, err
	}
	if health.Version != nucleus.Version {
		return c, &OtherVersion{health.Version, runningPods(ctx, c)}
	}
	return c, nil
}

// runningPods counts the machines of a node; -1 where it does not say.
func runningPods(ctx context.Context, c *client.Client) int {
	pods, err := c.Pods(ctx)
	if err != nil {
		return -1
	}
	running := 0
	for _, p := range pods {
		if p.Live() {
			running++
		}
	}
	return running
}

// awaitSecond waits, a second at most, until a request made now is admitted.
func awaitSecond(ctx context.Context, from int64) error {
	select {
	case <-time.After(time.Until(time.Unix(from, 0))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// RunningNode returns a client of the node that runs, or ErrNoNode.
func (h Home) RunningNode(ctx context.Context) (*client.Client, error) { return h.runningNode(ctx) }

// OtherVersion says that the running node is not of this cal's version.
type OtherVersion struct {
	Version string
	Pods    int // that run on it; -1: it does not say
}

func (e *OtherVersion) Error() string { return e.Fact() + " (cal node restart)" }

// Fact says what is so, and what a restart does: a node takes up machines of its own version only.
func (e *OtherVersion) Fact() string {
	ends := "its pods, which it does not list, end when it is restarted; named workspaces stay"
	switch {
	case e.Pods == 0:
		ends = "no pod runs on it"
	case e.Pods == 1:
		ends = "1 pod runs on it and ends when it is restarted; a named workspace stays"
	case e.Pods > 1:
		ends = fmt.Sprintf("%d pods run on it and end when it is restarted; named workspaces stay", e.Pods)
	}
	return fmt.Sprintf("the running node is of version %s, this cal of %s; %s", e.Version, nucleus.Version, ends)
}

func (h Home) operatorKey() (ed25519.PrivateKey, error) {
	return keyfile.Load(filepath.Join(h.Dir, "keys", "operator.key"))
}

const startDeadline = 20 * time.Second

// takeUpDeadline is a node's, which takes up the machines that it finds before it serves.
const takeUpDeadline = 2 * time.Minute

// otherPatience is how long a node is waited for that another cal may have started.
const otherPatience = 5 * time.Second

// awaitNode waits for a node that was just started, whose process has ended when ended is closed.
func (h Home) awaitNode(ctx context.Context, ended <-chan struct{}) (*client.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, takeUpDeadline)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	slow := time.AfterFunc(3*time.Second, func() {
		fmt.Fprintln(os.Stderr, "cal: the node is starting; it takes up the machines that it finds")
	})
	defer slow.Stop()
	var lost <-chan time.Time
	for {
		c, err := h.runningNode(ctx)
		if err == nil {
			return c, nil
		}
		var other *OtherVersion
		if errors.As(err, &other) { // the program that was just started
			return nil, fmt.Errorf("nucleus-node is of version %s, this cal of %s (make install)", other.Version, nucleus.Version)
		}
		select {
		case <-ctx.Done():
			if context.Cause(ctx) != context.DeadlineExceeded {
				return nil, context.Cause(ctx)
			}
			return nil, fmt.Errorf("the node did not start within %s; its log ends with:\n%s", takeUpDeadline, tail(filepath.Join(h.Dir, "run", "node.log")))
		case <-ended:
			// Another cal may have started one at the same time, which will answer.
			ended, lost = nil, time.After(otherPatience)
		case <-lost:
			return nil, fmt.Errorf("the node ended at once; its log ends with:\n%s", tail(filepath.Join(h.Dir, "run", "node.log")))
		case <-tick.C:
		}
	}
}

// authorityTries is how often an authority is started that ends at once.
const authorityTries = 5

// startAuthority starts the approval daemon where the person has made its key.
func (h Home) startAuthority(ctx context.Context) error {
	if !h.HasAuthority() {
		return nil
	}
	// One that listens and does not answer is none that could be started; who needs it finds out.
	// One that was killed just now may still listen, until it breaks off.
	asking, enough := context.WithTimeout(ctx, time.Second)
	_, err := approvals.New(h.AuthoritySocket()).Info(asking)
	late := asking.Err() != nil
	enough()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil || late:
		return nil
	case !approvals.Absent(err) && !errors.Is(err, io.EOF):
		return err
	}
	program, err := Program("nucleus-authority")
	if err != nil {
		return err
	}
	config, err := h.Config()
	if err != nil {
		return err
	}
	args := []string{"serve", "--dir", h.AuthorityDir(), "--socket", h.AuthoritySocket()}
	if desktop := config.Approvals.Desktop; desktop == nil || *desktop {
		args = append(args, "--desktop")
	}
	for _, arg := range config.Approvals.Notify {
		args = append(args, "--notify="+arg)
	}
	start := func() (<-chan struct{}, error) {
		return startDaemon(program, filepath.Join(h.Dir, "run", "authority.log"), args...)
	}
	ended, err := start()
	if err != nil {
		return err
	}
	var again, lost <-chan time.Time
	tries := 1
	waiting, cancel := context.WithTimeout(ctx, startDeadline)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for waiting.Err() == nil {
		if _, err := approvals.New(h.AuthoritySocket()).Info(waiting); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ended:
			// An earlier one that was killed may hold its lock for a moment; or another cal
			// has started one at the same time, which will answer.
			if ended = nil; tries < authorityTries {
				again = time.After(time.Duration(tries) * 100 * time.Millisecond)
			} else {
				lost = time.After(time.Second)
			}
		case <-again:
			tries++
			if ended, err = start(); err != nil {
				return err
			}
		case <-lost:
			return fmt.Errorf("the authority ended at once; its log ends with:\n%s", tail(filepath.Join(h.Dir, "run", "authority.log")))
		case <-waiting.Done():
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the authority did not start within %s; its log ends with:\n%s", startDeadline, tail(filepath.Join(h.Dir, "run", "authority.log")))
}

// StopAuthority ends the approval daemon, which the kernel names as the other end of
// its socket. Without one it does nothing.
func (h Home) StopAuthority() error {
	conn, err := net.DialTimeout("unix", h.AuthoritySocket(), time.Second)
	if err != nil {
		return nil
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) { peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if peerErr != nil {
		return peerErr
	}
	return unix.Kill(int(peer.Pid), unix.SIGTERM)
}

// Approvals says who can approve: "same user", "other user", or that nobody can.
func (h Home) Approvals(ctx context.Context) string {
	info, err := approvals.New(h.AuthoritySocket()).Info(ctx)
	switch {
	case err == nil:
		return info.Approvals
	case !h.HasAuthority():
		return "none: nobody can approve (cal approve init)"
	}
	if approvals.Absent(err) {
		return "none: the authority does not run (cal node start)"
	}
	return "none: " + err.Error()
}

// HasAuthority reports whether the person has made an approval key.
func (h Home) HasAuthority() bool {
	keys, _ := filepath.Glob(filepath.Join(h.AuthorityDir(), "approvers", "*.json"))
	_, err := os.Stat(filepath.Join(h.AuthorityDir(), "key.json")) // of an earlier version, until its daemon has started
	return len(keys) > 0 || err == nil
}

// startDaemon starts a program that outlives this one, in a session of its own. The channel is
// closed should it end first.
func startDaemon(program, logFile string, args ...string) (ended <-chan struct{}, err error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_ = cmd.Wait()
	}()
	return gone, nil
}

func tail(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := slices.Compact(strings.Split(strings.TrimSpace(string(raw)), "\n")) // one that is started again says the same
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

// StopNode ends the running node and waits until it is gone: its socket goes first, its
// lock when all that was to be put away is.
func (h Home) StopNode(ctx context.Context) error {
	c, err := h.runningNode(ctx)
	var other *OtherVersion
	if err != nil && !errors.As(err, &other) {
		return err
	}
	if err := c.Stop(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startDeadline)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(h.NodeSocket()); errors.Is(err, os.ErrNotExist) && h.unlocked() {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the node did not stop within %s", startDeadline)
		}
	}
}

// unlocked reports whether no node holds its place.
func (h Home) unlocked() bool {
	lock, err := os.Open(filepath.Join(h.Dir, "run", "node.lock"))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer lock.Close()
	return unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}
