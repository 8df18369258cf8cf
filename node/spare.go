package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"cal/image"
	"cal/internal/durable"
	"cal/internal/fileid"
	"cal/internal/idmap"
	"cal/machine"
	"cal/nucleus"
)

// A spare is a machine made ahead of the pod that will have it, of the shape of the
// pod that ended last: it is started, but has got no Boot frame, and without one the
// proxy starts no process and serves nobody. So a spare has run nothing, belongs to
// no session, and differs from a machine made now only in that its start is over.
// The pod that takes it takes its name too.

// A file in Dirs.Spares says so before anything of a spare is made, until a pod
// has it or nothing of it is left.

type spare struct {
	id      string // of the pod that will have it
	note    string // the file that says so
	dir     string
	driver  machine.Driver
	shape   string
	spec    machine.Spec
	ready   chan struct{} // closed when machine or err is there
	machine machine.Machine
	err     error
	gone    chan struct{} // closed when it was discarded
}

// spares keeps one spare at most.
type spares struct {
	dirs   Dirs
	images *image.Store
	life   time.Duration // of a spare that nobody takes; 0: none is made

	mu      sync.Mutex
	waiting *spare
	leaving map[*spare]bool // being discarded
	expiry  *time.Timer
	closed  bool
	work    sync.WaitGroup
}

// take returns the waiting spare where a machine of spec, made now, would be the
// same one; nil where there is none.
func (s *spares) take(ctx context.Context, driver machine.Driver, spec machine.Spec, named bool) *spare {
	if s.life == 0 {
		return nil
	}
	shape, err := s.shapeOf(driver, spec, named)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	taken := s.waiting
	if taken == nil || taken.shape != shape {
		if taken != nil && named && taken.spec.Workspace == spec.Workspace {
			// The pod will write there, and a machine that was started before may
			// hold what its kernel has seen of the workspace for how it is.
			s.dismiss()
			s.work.Go(func() { s.discard(taken) })
		}
		s.mu.Unlock()
		if named {
			s.awaitLeaving(ctx, spec.Workspace)
		}
		return nil
	}
	s.dismiss()
	s.mu.Unlock()
	select {
	case <-taken.ready:
	case <-ctx.Done():
		s.discard(taken)
		return nil
	}
	if taken.err == nil {
		select {
		case <-taken.machine.Done():
		default:
			if taken.current(ctx, spec) {
				s.left(taken) // to the pod
				return taken
			}
		}
	}
	s.discard(taken)
	return nil
}

// awaitLeaving waits until no spare that is being discarded has the workspace: some drivers
// let one machine at a time have it.
func (s *spares) awaitLeaving(ctx context.Context, workspace string) {
	s.mu.Lock()
	var leaving []*spare
	for old := range s.leaving {
		if old.spec.Workspace == workspace {
			leaving = append(leaving, old)
		}
	}
	s.mu.Unlock()
	for _, old := range leaving {
		select {
		case <-old.gone:
		case <-ctx.Done():
			return
		}
	}
}

// current reports whether what the spare holds copies of is still what a machine made now
// would hold.
func (s *spare) current(ctx context.Context, spec machine.Spec) bool {
	copier, ok := s.driver.(machine.Copier)
	if !ok {
		return true
	}
	digests, err := copier.Digests(ctx, spec)
	return err == nil && maps.Equal(digests, s.machine.Facts().Digests)
}

// prepare begins to make a spare like spec, in place of the one that waits. A named
// workspace is the spare's too; else it gets an empty one.
func (s *spares) prepare(driver machine.Driver, spec machine.Spec, named bool) {
	if s.life == 0 {
		return
	}
	id := podID()
	made := &spare{id: id, note: filepath.Join(s.dirs.Spares(), id), dir: s.dirs.Pod(id), driver: driver, ready: make(chan struct{}), gone: make(chan struct{})}
	made.spec = spec
	made.spec.ID, made.spec.Dir = id, machineDir(made.dir)
	if !named {
		made.spec.Workspace = filesDir(ownWorkspace(made.dir))
	}
	var err error
	if made.shape, err = s.shapeOf(driver, spec, named); err != nil {
		return // it could not be told what for
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if old := s.waiting; old != nil {
		if old.shape == made.shape {
			return
		}
		s.dismiss()
		s.work.Go(func() { s.discard(old) })
	}
	s.waiting = made
	s.expiry = time.AfterFunc(s.life, func() { s.expire(made) })
	s.work.Go(func() {
		defer close(made.ready)
		if made.err = made.make(); made.err != nil {
			slog.Warn("no spare machine", "cause", made.err)
			s.work.Go(func() { s.expire(made) })
		}
	})
}

// drop gives the spare up that holds a workspace which is to go.
func (s *spares) drop(workspace string) {
	s.mu.Lock()
	held := s.waiting
	if held == nil || held.spec.Workspace != filesDir(workspace) {
		s.mu.Unlock()
		s.awaitLeaving(context.Background(), filesDir(workspace))
		return
	}
	s.dismiss()
	s.mu.Unlock()
	s.discard(held)
}

// status is for people and benchmarks.
func (s *spares) status() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting == nil {
		return "none"
	}
	select {
	case <-s.waiting.ready:
		return "ready"
	default:
		return "starting"
	}
}

// dismiss lets the waiting spare go, to a pod or to be discarded. s.mu is held.
func (s *spares) dismiss() {
	if s.leaving == nil {
		s.leaving = map[*spare]bool{}
	}
	s.expiry.Stop()
	s.leaving[s.waiting] = true
	s.waiting = nil
}

// left says that a spare is one no more.
func (s *spares) left(old *spare) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.leaving, old)
	close(old.gone)
}

func (s *spares) expire(old *spare) {
	s.mu.Lock()
	if s.waiting != old || s.closed {
		s.mu.Unlock()
		return
	}
	s.dismiss()
	s.work.Add(1)
	s.mu.Unlock()
	defer s.work.Done()
	s.discard(old)
}

// close removes the waiting spare; afterwards none is made.
func (s *spares) close() {
	s.mu.Lock()
	s.closed = true
	old := s.waiting
	if old != nil {
		s.dismiss()
	}
	s.mu.Unlock()
	if old != nil {
		s.discard(old)
	}
	s.work.Wait()
}

// discard removes a spare that no pod will have. What it fails to remove the next
// node does.
func (s *spares) discard(old *spare) {
	defer s.left(old)
	<-old.ready
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var err error // of removing; why a start failed has been said
	if old.machine != nil {
		err = old.machine.Destroy(ctx)
	}
	if err == nil {
		err = old.driver.Remove(ctx, old.spec.Dir)
	}
	if err == nil {
		err = idmap.RemoveAll(ctx, old.dir)
	}
	if err == nil {
		err = durable.Remove(old.note)
	}
	if err != nil {
		slog.Error("removing a spare machine", "dir", old.dir, "error", err)
	}
}

// make writes down what it makes, then starts the machine.
func (s *spare) make() error {
	if err := durable.Store(s.note, map[string]string{"driver": s.driver.Name()}); err != nil {
		return err
	}
	for _, dir := range []string{s.spec.Dir, s.spec.Workspace} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	s.machine, err = s.driver.Create(ctx, s.spec)
	return err
}

// removeSpares takes away what an earlier node made ahead. One that a pod has taken
// is the pod's.
func (n *Node) removeSpares(ctx context.Context) error {
	notes, err := os.ReadDir(n.dirs.Spares())
	if err != nil {
		return err
	}
	for _, note := range notes {
		dir := n.dirs.Pod(note.Name())
		_, err := os.Stat(filepath.Join(dir, podFile))
		if errors.Is(err, fs.ErrNotExist) {
			err = n.removeDir(ctx, dir)
		}
		if err == nil {
			err = durable.Remove(filepath.Join(n.dirs.Spares(), note.Name()))
		}
		if err != nil {
			return fmt.Errorf("removing the spare machine in %s: %w", dir, err)
		}
	}
	return nil
}

// become gives the pod, of which nothing exists yet, the spare's name and machine.
func (p *Pod) become(s *spare) {
	p.dir, p.machine, p.ahead = s.dir, s.machine, s.note
	p.record.ID = s.id
	if p.record.Spec.Workspace == "" {
		p.record.Workspace = ownWorkspace(p.dir)
	}
}

// shapeOf is the digest of all that a machine is made of: the spec without what is
// its own, what the host's paths in it lead to now, and what its image was last unpacked
// to; and how things stood with corrupt images, for one may be what the machine has open.
// A cache that was deleted and filled anew, or a program that was replaced, is
// another shape.
func (s *spares) shapeOf(driver machine.Driver, spec machine.Spec, named bool) (string, error) {
	spec.ID, spec.Dir = "", ""
	paths := []string{spec.Proxy}
	if named {
		paths = append(paths, spec.Workspace)
	} else {
		spec.Workspace = ""
	}
	if spec.Image.Path != "" {
		paths = append(paths, spec.Image.Path)
	}
	for _, layer := range append(append([]nucleus.Layer(nil), spec.Image.Layers...), spec.Agent...) {
		paths = append(paths, layer.Host)
	}
	if spec.Image.Kind == "host" { // its generated files follow the host's
		paths = append(paths, "/etc", "/etc/passwd", "/etc/group", "/etc/ld.so.cache")
	}
	var found []fileid.ID
	for _, path := range paths {
		id, err := fileid.Of(path)
		if err != nil {
			return "", err
		}
		found = append(found, id)
	}
	var unpacked string
	var retired time.Time
	if s.images != nil {
		var err error
		if unpacked, err = s.images.Unpacked(spec.Image); err != nil {
			return "", err
		}
		if retired, err = s.images.Retired(); err != nil {
			return "", err
		}
	}
	raw, err := json.Marshal(struct {
		Driver   driverKey
		Spec     machine.Spec
		Paths    []fileid.ID
		Unpacked string
		Retired  time.Time
	}{keyOf(driver), spec, found, unpacked, retired})
	return nucleus.SHA256(raw), err
}
