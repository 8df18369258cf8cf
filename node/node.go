// Package node is nucleus-node: the control plane on the host.
//
// Every side effect of every machine passes request.go, in one order: the caller is
// authenticated, the arguments are resolved, the decision is made, its legs are
// taken and its intent is durable in the log, an approval is used up where one is
// needed; only then does anything happen, and what came of it is logged. What cannot be
// decided or recorded does not happen. The node holds no key that can grant.
//
// A machine and its session outlive the node: what is needed to take them up again
// is on disk before a sandbox, a mount or a socket is made.
package node

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	approvals "cal/approval/client"
	"cal/approval/spent"
	"cal/audit"
	"cal/egress"
	"cal/egress/prices"
	"cal/image"
	"cal/internal/durable"
	"cal/internal/keyfile"
	"cal/machine"
	"cal/nucleus"
	"cal/wire"
)

// Config is all that a node needs.
type Config struct {
	Home      string           // CAL_HOME; everything the node keeps lies below it
	Drivers   []machine.Driver // strongest first
	Proxy     string           // the static nucleus-tool-proxy
	Authority string           // socket of the approval daemon; "" means that nobody can approve
	Witnesses []Witness        // required: without their cosignatures no effect begins
	GitHub    Forge            // for create_pr
	Storage   Limits           // of what machines can make the host store
	Stop      func()           // ends the program, for POST /v1/stop
	SpareLife time.Duration    // how long a machine made ahead waits for a pod; 0: none is made
	Prices    *prices.Table    // of models; nil: the built-in ones
	Images    *image.Store     // the drivers'; nil: they have none
	Now       func() time.Time // nil: the system's clock

	SpareEmulated bool // a machine is made ahead where it is emulated too, though it costs processor time all the while

	Monotonic func() time.Duration // on this host, for all its processes; nil: the system's clock

	RequireApprovals string // see approvals.CheckRequirement: no pod starts where that is not so; "": any
}

// Node is the control plane of one person. Make it with Open.
type Node struct {
	config   Config
	dirs     Dirs
	key      ed25519.PrivateKey
	log      *audit.Log
	owed     owed
	salts    *audit.Salts
	witness  *witnesses
	silence  silence // of the authority
	gateway  *egress.Gateway
	spent    *spent.Store
	spentErr error // why there is none
	asks     *approvals.Client
	links    links
	known    knownApprovers
	opened   time.Time // by the host's clock
	verifier *wire.Verifier
	storage  storage
	born     time.Time // of this process's ticks
	probes   probes
	spares   spares
	lock     *os.File

	mu         sync.Mutex
	pods       map[string]*Pod
	modelCalls map[string]*Pod     // of the calls under way
	agents     map[string]wire.Key // boot id -> key of the agent inside
	serving    sync.WaitGroup

	transients  sync.WaitGroup // keepTransient
	stopKeeping context.CancelFunc
	closing     chan struct{} // closed when the node gives its machines up
}

// Dirs are the places below CAL_HOME.
type Dirs struct{ Home string }

// The places. Run and everything in it is private to the user.
func (d Dirs) Run() string                  { return filepath.Join(d.Home, "run") }
func (d Dirs) Socket() string               { return filepath.Join(d.Run(), "node.sock") }
func (d Dirs) Log() string                  { return filepath.Join(d.Home, "log") }
func (d Dirs) Keys() string                 { return filepath.Join(d.Home, "keys") }
func (d Dirs) Pods() string                 { return filepath.Join(d.Run(), "pods") }
func (d Dirs) Spares() string               { return filepath.Join(d.Run(), "spares") }
func (d Dirs) Probes() string               { return filepath.Join(d.Run(), "probes") }
func (d Dirs) Pod(id string) string         { return filepath.Join(d.Pods(), id) }
func (d Dirs) Workspace(name string) string { return filepath.Join(d.Home, "isolation", "vms", name) }

// Open takes the node's place below config.Home: one node at a time.
func Open(ctx context.Context, config Config) (*Node, error) {
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Prices == nil {
		config.Prices = prices.Builtin()
	}
	if config.Monotonic == nil {
		config.Monotonic = monotonic
	}
	n := &Node{born: time.Now(), storage: storage{limits: config.Storage.withDefaults()}, config: config, dirs: Dirs{config.Home}, pods: map[string]*Pod{}, modelCalls: map[string]*Pod{}, agents: map[string]wire.Key{}, closing: make(chan struct{})}
	n.opened = config.Now()
	n.spares.dirs, n.spares.images, n.spares.life = n.dirs, config.Images, config.SpareLife
	for _, dir := range []string{n.dirs.Run(), n.dirs.Log(), n.dirs.Keys(), n.dirs.Pods(), n.dirs.Spares()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := n.open(ctx); err != nil {
		n.Close()
		return nil, err
	}
	if err := n.recover(ctx); err != nil {
		n.Close()
		return nil, err
	}
	keeping, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.stopKeeping = stop
	n.serving.Go(func() { n.keepLog(keeping) })
	n.serving.Go(func() { n.keepBudgets(keeping) })
	first, cancel := context.WithTimeout(ctx, witnessFirst)
	_ = n.witness.round(first, startPatience) // what came of it counts in allow, before the first effect
	cancel()
	n.serving.Go(func() { n.witness.keep(keeping) })
	n.beginWatch(ctx, keeping)
	n.transients.Go(n.keepTransient)
	return n, nil
}

func (n *Node) open(ctx context.Context) error {
	var err error
	_, none := os.Stat(filepath.Join(n.dirs.Run(), "node.lock"))
	if n.lock, err = lockFile(ctx, filepath.Join(n.dirs.Run(), "node.lock"), n.dirs.Socket()); err != nil {
		return err
	}
	since := n.admitsSince(errors.Is(none, fs.ErrNotExist))
	if n.key, err = keyfile.LoadOrMake(filepath.Join(n.dirs.Keys(), "node.key")); err != nil {
		return err
	}
	logKey, err := keyfile.LoadOrMake(filepath.Join(n.dirs.Keys(), "log.key"))
	if err != nil {
		return err
	}
	operator, err := keyfile.LoadOrMake(filepath.Join(n.dirs.Keys(), "operator.key"))
	if err != nil {
		return err
	}
	if n.log, err = audit.Open(n.dirs.Log(), audit.Options{Origin: nucleus.LogOrigin, Key: logKey, Now: n.config.Now, Link: true}); err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	if n.salts, err = audit.OpenSalts(filepath.Join(n.dirs.Keys(), "salts")); err != nil {
		return err
	}
	if n.spent, n.spentErr = spent.Open(n.spentFile()); n.spentErr != nil { // what needs no approval goes on
		slog.Error("nothing can be approved", "error", n.spentErr)
	}
	n.known.open(n.dirs.knownFile())
	if n.config.Authority != "" {
		n.asks = approvals.New(n.config.Authority)
		uid, other, err := approvals.OtherUserOf(n.config.RequireApprovals)
		if err != nil {
			return err
		}
		if other {
			n.asks = n.asks.OfOtherUser(uid)
		}
	}
	if n.witness, err = newWitnesses(n.log, logKey.Public().(ed25519.PublicKey), n.asks, n.config.Witnesses); err != nil {
		return err
	}
	n.note(keysEntry(map[string]ed25519.PrivateKey{"node": n.key, "log": logKey, OperatorKey: operator}))
	n.gateway = egress.New(egress.Config{Gate: (*gate)(n)})
	public := operator.Public().(ed25519.PublicKey)
	n.verifier = &wire.Verifier{
		Started: since, Now: n.config.Now,
		Keys: func(id string) (wire.Key, bool) {
			if id == OperatorKey {
				return wire.Key{ID: id, Ed25519: public, Role: wire.Operator}, true
			}
			n.mu.Lock()
			defer n.mu.Unlock()
			key, ok := n.agents[id]
			return key, ok
		},
	}
	if n.config.Now().Before(since) { // the clock was set back since the earlier node
		n.verifier.Started = time.Time{}
		n.verifier.NewEra()
	}
	return nil
}

// admitsSince is the time up to which an earlier node may have admitted requests: none of
// them is admitted again. One that ended in order wrote it down; after a crash it is now;
// without an earlier node there is none. The lock is held: no other node admits any more.
func (n *Node) admitsSince(first bool) time.Time {
	var last struct {
		UnixMilli int64 `json:"unix_ms"`
	}
	if first {
		return time.Time{}
	}
	err := durable.Load(n.lastFile(), &last)
	// Good for one start: a node that crashes leaves none.
	if removeErr := durable.Remove(n.lastFile()); err != nil || removeErr != nil {
		return n.config.Now()
	}
	return time.UnixMilli(last.UnixMilli)
}

func (n *Node) lastFile() string { return filepath.Join(n.dirs.Run(), "admitted.json") }

func (n *Node) spentFile() string { return filepath.Join(n.dirs.Run(), "spent.db") }

// OperatorKey is the key id of the person's own requests.
const OperatorKey = "operator"

// Close gives everything back. Machines go on: the next node adopts them.
func (n *Node) Close() error {
	close(n.closing)
	n.transients.Wait() // a machine is ended or left to the next node
	n.spares.close()
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	for _, p := range pods {
		p.release()
	}
	if n.stopKeeping != nil {
		n.stopKeeping()
	}
	n.serving.Wait()
	n.storeClocks()
	if n.witness != nil { // so that what was last is known elsewhere, if anybody answers
		ctx, cancel := context.WithTimeout(context.Background(), witnessFarewell)
		_ = n.witness.round(ctx, witnessFarewell)
		cancel()
	}
	var errs []error
	if n.verifier != nil {
		errs = append(errs, durable.Store(n.lastFile(), map[string]int64{"unix_ms": n.config.Now().UnixMilli()}))
	}
	if n.spent != nil {
		errs = append(errs, n.spent.Close())
	}
	if n.log != nil {
		errs = append(errs, n.log.Close())
	}
	if n.salts != nil {
		errs = append(errs, n.salts.Close())
	}
	if n.lock != nil {
		errs = append(errs, n.lock.Close())
	}
	return errors.Join(errs...)
}

// Serve answers requests on the socket until ctx ends.
func (n *Node) Serve(ctx context.Context) error {
	l, err := listenPrivate(n.dirs.Socket())
	if err != nil {
		return err
	}
	server := &http.Server{Handler: n.handler(), ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stopped := make(chan error, 1)
	go func() { stopped <- server.Serve(l) }()
	slog.Info("node serves", "socket", n.dirs.Socket())
	select {
	case err := <-stopped:
		return err
	case <-ctx.Done():
	}
	shutdown, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	if server.Shutdown(shutdown) != nil {
		server.Close()
	}
	os.Remove(n.dirs.Socket())
	return nil
}

func (n *Node) podList() []*Pod {
	pods := make([]*Pod, 0, len(n.pods))
	for _, p := range n.pods {
		pods = append(pods, p)
	}
	return pods
}

func (n *Node) pod(id string) (*Pod, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.pods[id]
	if !ok {
		return nil, nucleus.Errorf(nucleus.KindNotFound, "no pod %q", id)
	}
	return p, nil
}

// lockPatience is how long a node waits for the one before it to end.
const lockPatience = 10 * time.Second

// lockFile holds an exclusive lock as long as the file is open. It waits for a node
// that is ending, never for one that answers on its socket.
func lockFile(ctx context.Context, path, socket string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		if conn, dialErr := net.DialTimeout("unix", socket, time.Second); dialErr == nil {
			conn.Close()
			f.Close()
			return nil, fmt.Errorf("%s: another node runs here", path)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("%s: another node runs here", path)
		}
	}
}

// listenPrivate makes a unix socket that its owner alone can reach, in place of
// one that a dead node left.
func listenPrivate(path string) (net.Listener, error) {
	const longest = 107 // sun_path, less the final NUL
	if len(path) > longest {
		return nil, fmt.Errorf("socket path %s has %d bytes, at most %d: set CAL_HOME to a shorter path", path, len(path), longest)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Not by umask, which is the whole process's: what the log makes meanwhile would be shut to the
	// node itself. Until the mode is set the directory, which is private, keeps others out.
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
