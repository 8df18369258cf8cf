package tools

import (
	"context"
	"sync"
	"time"

	"cal/nucleus"
	"cal/wire"
)

// Limits of background commands.
const (
	maxJobs    = 32 // that run at once
	maxOldJobs = 64 // that have ended and can still be asked for
)

// jobs are the background commands of a session. Their output is kept in bounded
// memory until it is asked for.
type jobs struct {
	mu    sync.Mutex
	all   map[string]*job
	order []string
	work  sync.WaitGroup

	changed chan struct{} // closed, and made anew, when one begins or ends
}

type job struct {
	id             string
	running        *running
	stdout, stderr *keeper
	timeout        time.Duration
	stop           chan struct{}
	stopOnce       sync.Once
	over           chan struct{} // closed when nothing of it is left
}

// begin starts a command in the background. It lives until it ends, is stopped,
// or the session ends.
func (x *Executor) begin(c command, timeout time.Duration) (string, error) {
	x.jobs.mu.Lock()
	defer x.jobs.mu.Unlock()
	if running := x.jobs.running(); running >= maxJobs {
		return "", nucleus.Errorf(nucleus.KindConflict, "%d background commands are running, at most %d", running, maxJobs)
	}
	j := &job{
		id: nucleus.NewID("bash-")[:13], timeout: timeout, stop: make(chan struct{}), over: make(chan struct{}),
		stdout: newKeeper(x.config.OutputCap), stderr: newKeeper(x.config.OutputCap),
	}
	c.stdout, c.stderr = j.stdout, j.stderr
	r, err := x.start(c)
	if err != nil {
		return "", err
	}
	j.running = r
	x.jobs.add(j)
	x.jobs.tell()
	x.jobs.work.Go(func() {
		defer x.jobs.end(j)
		r.wait(context.Background(), timeout, j.stop) // the session's end kills it
	})
	return j.id, nil
}

func (js *jobs) end(j *job) {
	js.mu.Lock()
	defer js.mu.Unlock()
	close(j.over)
	js.tell()
}

// tell wakes who watches. The caller holds the mutex.
func (js *jobs) tell() {
	if js.changed != nil {
		close(js.changed)
		js.changed = nil
	}
}

// state says whether any runs, until changed is closed.
func (js *jobs) state() (running bool, changed <-chan struct{}) {
	js.mu.Lock()
	defer js.mu.Unlock()
	if js.changed == nil {
		js.changed = make(chan struct{})
	}
	return js.running() > 0, js.changed
}

// stopAll begins to end every one.
func (js *jobs) stopAll() {
	js.mu.Lock()
	defer js.mu.Unlock()
	for _, j := range js.all {
		j.stopOnce.Do(func() { close(j.stop) })
	}
}

// watchJobs is the "jobs" stream.
func (w *worker) watchJobs(ctx context.Context, c *caller) {
	gone := make(chan struct{})
	c.listening.Go(func() {
		defer close(gone)
		for {
			kind, _, err := c.stream.Recv(maxFrame)
			if err != nil {
				return
			}
			if kind == wire.FrameSignal {
				w.exec.jobs.stopAll()
			}
		}
	})
	for {
		running, changed := w.exec.jobs.state()
		if c.stream.SendJSON(wire.FrameJSON, JobState{Running: running}) != nil {
			return
		}
		select {
		case <-changed:
		case <-gone:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (js *jobs) running() int {
	n := 0
	for _, j := range js.all {
		if !j.ended() {
			n++
		}
	}
	return n
}

func (js *jobs) add(j *job) {
	js.all[j.id] = j
	js.order = append(js.order, j.id)
	for i := 0; len(js.order) > maxJobs+maxOldJobs && i < len(js.order); i++ {
		if old := js.order[i]; js.all[old].ended() {
			delete(js.all, old)
			js.order = append(js.order[:i], js.order[i+1:]...)
			i--
		}
	}
}

func (js *jobs) wait() { js.work.Wait() }

func (js *jobs) find(id string) (*job, error) {
	js.mu.Lock()
	defer js.mu.Unlock()
	if j := js.all[id]; j != nil {
		return j, nil
	}
	return nil, nucleus.Errorf(nucleus.KindNotFound, "no background command %q", id)
}

func (j *job) ended() bool {
	select {
	case <-j.over:
		return true
	default:
		return false
	}
}

// output returns what the command has written since it was last asked.
func (js *jobs) output(id string) (RunResult, error) {
	j, err := js.find(id)
	if err != nil {
		return RunResult{}, err
	}
	result := RunResult{ID: id, Running: !j.ended()} // before its output is taken: none is missed at the end
	result.outputs(j.stdout.take(), j.stderr.take())
	if !result.Running {
		result.ended(j.running.child, j.timeout)
	}
	return result, nil
}

// stop ends the command and returns what it still wrote.
func (js *jobs) stop(ctx context.Context, id string) (RunResult, error) {
	j, err := js.find(id)
	if err != nil {
		return RunResult{}, err
	}
	j.stopOnce.Do(func() { close(j.stop) })
	select {
	case <-j.over:
	case <-ctx.Done():
		return RunResult{}, nucleus.Errorf(nucleus.KindTimeout, "background command %q is being stopped: %v", id, ctx.Err())
	}
	return js.output(id)
}
