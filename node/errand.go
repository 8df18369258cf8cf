package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cal/guest"
	"cal/internal/durable"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// errand is the run of a sub-agent on its task, without a terminal. What it says and how it
// ended is on disk, so that the next node can tell it: but for what came last, or was on the wire,
// when a node was killed.
type errand struct {
	file string
	done chan struct{} // closed when it has ended

	mu    sync.Mutex
	state errandFile
	saved time.Time // when state was written last
	due   bool      // it will be written in a moment
}

type errandFile struct {
	Stdout  tail             `json:"stdout"`
	Stderr  tail             `json:"stderr"`
	LeftOut string           `json:"left_out,omitempty"`
	Start   int64            `json:"start"` // of the log: its session.start
	Exit    *guest.AgentExit `json:"exit,omitempty"`
}

// maxOutput is how much of the end of a sub-agent's output is kept, in bytes.
const maxOutput = 32 << 10

// tail is the end of an output.
type tail struct {
	Text  []byte `json:"text_b64"`
	Total int64  `json:"total"`
}

func (t *tail) write(b []byte) {
	t.Total += int64(len(b))
	t.Text = append(t.Text, b...)
	if over := len(t.Text) - maxOutput; over > 0 {
		t.Text = append([]byte(nil), t.Text[over:]...)
	}
}

func (t tail) String() string {
	text := strings.ToValidUTF8(string(t.Text), "\uFFFD")
	if cut := t.Total - int64(len(t.Text)); cut > 0 {
		text = fmt.Sprintf("[the first %d bytes are left out]\n%s", cut, text)
	}
	return text
}

func errandPath(pod string) string { return filepath.Join(pod, "errand.json") }

func (p *Pod) errandOf() *errand {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.errand
}

func (e *errand) ended() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}

func (e *errand) stateName() string {
	if e.ended() {
		return "ended"
	}
	return "running"
}

// sayEvery is how often output is written at most: a sub-agent that prints single bytes costs
// no more than one that prints pages.
const sayEvery = 20 * time.Millisecond

// say keeps output, and writes it soon.
func (e *errand) say(kind wire.Frame, text []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if kind == wire.FrameStderr {
		e.state.Stderr.write(text)
	} else {
		e.state.Stdout.write(text)
	}
	if e.due {
		return
	}
	if wait := sayEvery - time.Since(e.saved); wait > 0 {
		e.due = true
		time.AfterFunc(wait, func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.write()
		})
		return
	}
	e.write()
}

// write puts the state beside its place and then there, without waiting for the disk. What
// finish has stored stays. The caller holds the mutex.
func (e *errand) write() {
	e.due, e.saved = false, time.Now()
	if e.state.Exit != nil {
		return
	}
	raw, err := json.Marshal(e.state)
	if err == nil {
		if err = os.WriteFile(e.file+".new", raw, 0o600); err == nil {
			err = os.Rename(e.file+".new", e.file)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // the pod has gone
		slog.Warn("what a sub-agent says cannot be kept", "file", e.file, "error", err)
	}
}

// endErrand keeps how it ended. What the sub-agent did not spend is its parent's at once: a
// parent that has set all aside could not come for the result.
func (n *Node) endErrand(p *Pod, e *errand, exit guest.AgentExit) {
	p.root.mu.Lock()
	err := p.root.closeAccount(p.record.ID)
	p.root.mu.Unlock()
	if err != nil {
		slog.Error("what a sub-agent did not spend is not given back", "pod", p.record.ID, "error", err)
	}
	e.finish(exit)
}

func (e *errand) finish(exit guest.AgentExit) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state.Exit != nil {
		return
	}
	e.state.Exit = &exit
	if err := durable.Store(e.file, e.state); err != nil && !errors.Is(err, fs.ErrNotExist) {
		slog.Warn("how a sub-agent ended cannot be kept", "file", e.file, "error", err)
	}
	close(e.done)
}

// startErrand starts the pod's agent on a task.
func (n *Node) startErrand(ctx context.Context, p *Pod, actor string, argv []string, leftOut string) error {
	e := &errand{file: errandPath(p.dir), done: make(chan struct{}), state: errandFile{LeftOut: leftOut}}
	if err := durable.Store(e.file, e.state); err != nil {
		return err
	}
	p.mu.Lock()
	p.errand = e
	p.mu.Unlock()
	machine, start, err := n.openAgent(ctx, p, actor, client.AgentRequest{}, argv)
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.state.Start = start.Seq
	e.mu.Unlock()
	n.serving.Go(func() { n.followErrand(p, e, actor, start, machine) })
	return nil
}

// adoptErrand takes the run of a sub-agent up that an earlier node followed.
func (n *Node) adoptErrand(p *Pod) error {
	e := &errand{file: errandPath(p.dir), done: make(chan struct{})}
	err := durable.Load(e.file, &e.state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.errand = e
	p.mu.Unlock()
	if e.state.Exit != nil {
		close(e.done)
		return nil
	}
	n.serving.Go(func() { n.followErrand(p, e, "", nucleus.Entry{Seq: e.state.Start}, nil) })
	return nil
}

// followErrand keeps what the sub-agent says until it, its machine or this node ends. Without
// a stream it joins the agent.
func (n *Node) followErrand(p *Pod, e *errand, actor string, start nucleus.Entry, machine *wire.Stream) {
	for {
		if machine == nil {
			var gone error
			if machine, gone = n.rejoin(p); gone != nil {
				n.endRuns(p, nucleus.AsError(gone))
				n.endErrand(p, e, guest.AgentExit{ExitCode: -1, Error: nucleus.AsError(gone)})
				return
			}
			if machine == nil { // the node ends
				return
			}
		}
		kind, payload, err := machine.Recv(1 << 20)
		switch {
		case err != nil:
			machine.Close()
			machine = nil
		case kind == wire.FrameStdout || kind == wire.FrameStderr:
			e.say(kind, payload)
		case kind == wire.FrameResult:
			machine.Close()
			exit, err := readExit(payload)
			if err != nil {
				exit = guest.AgentExit{ExitCode: -1, Error: nucleus.AsError(err)}
			}
			exit.Start = start.Seq
			exit = p.endOf(exit)
			if exit.Refused {
				n.recordAgentRefused(p, actor, start, nucleus.OutcomeRefused, exit.Error)
			} else {
				n.recordAgentEnd(p, exit)
			}
			n.endErrand(p, e, exit)
			return
		}
	}
}

// rejoin joins the pod's agent on the wire that the machine has now, or gets. The error says that the
// pod has ended; without both, this node ends.
func (n *Node) rejoin(p *Pod) (*wire.Stream, error) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		if why := p.ended(); why != "" {
			return nil, nucleus.Errorf(nucleus.KindUnavailable, "%s", why)
		}
		if session, err := p.wire(); err == nil {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			stream, err := session.Open(ctx, guest.StreamAttach, nil)
			cancel()
			if err == nil {
				return stream, nil
			}
		}
		select {
		case <-n.closing:
			return nil, nil
		case <-again.C:
		}
	}
}

// errandResult is what an agent is told of its sub-agent.
type errandResult struct {
	Pod      string         `json:"pod"`
	State    string         `json:"state"` // "running": manage_pods wait goes on; "ended"; "failed": it was not started, or its machine has ended
	ExitCode *int           `json:"exit_code,omitempty"`
	Output   string         `json:"output"`           // the end of its standard output
	Errors   string         `json:"errors,omitempty"` // the end of its standard error, where it did not end well
	Error    *nucleus.Error `json:"error,omitempty"`
	LeftOut  string         `json:"left_out,omitempty"` // of the asking pod's working tree
	Repo     *comeBack      `json:"repo,omitempty"`     // what came back
	Kept     string         `json:"kept,omitempty"`     // why the pod is still there
}

func (e *errand) result(pod string) errandResult {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := errandResult{Pod: pod, State: "running", Output: e.state.Stdout.String(), LeftOut: e.state.LeftOut}
	exit := e.state.Exit
	if exit == nil {
		return r
	}
	r.State, r.ExitCode = "ended", &exit.ExitCode
	if exit.Error != nil {
		r.State, r.ExitCode, r.Error = "failed", nil, exit.Error
	}
	if exit.ExitCode != 0 {
		r.Errors = e.state.Stderr.String()
	}
	return r
}

// collect waits for the sub-agent, and when it has ended brings its branch back and ends its
// pod. What cannot be brought back keeps the pod.
func (n *Node) collect(ctx context.Context, p, sub *Pod, actor string, until time.Time, keep bool) (json.RawMessage, error) {
	e := sub.errandOf()
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-e.done:
	case <-timer.C:
	case <-ctx.Done():
	case <-n.closing:
	}
	if !e.ended() {
		r := e.result(sub.record.ID)
		r.Kept = "it runs; go on with manage_pods wait"
		return json.Marshal(r)
	}
	sub.ending.Lock()
	defer sub.ending.Unlock()
	r := e.result(sub.record.ID)
	if _, err := n.pod(sub.record.ID); err != nil { // another call has brought it back
		return json.Marshal(r)
	}
	if sub.ended() == "" && len(sub.record.Repos) > 0 {
		back, err := n.bringBack(ctx, p, sub, actor)
		if err != nil {
			r.Kept = fmt.Sprintf("its branch could not be brought back: %v; go on with manage_pods fetch and delete", err)
			return json.Marshal(r)
		}
		r.Repo = &back
	}
	switch {
	case keep:
		r.Kept = "as asked"
	case p.ended() == "": // else who ends p ends it
		if err := n.DeletePod(ctx, actor, sub.record.ID); err != nil {
			r.Kept = fmt.Sprintf("it could not be ended: %v", err)
		}
	}
	return json.Marshal(r)
}

func (n *Node) bringBack(ctx context.Context, p, sub *Pod, actor string) (comeBack, error) {
	q, err := n.newTransfer(ctx, sub, sub.record.Repos[0], sub.transfersDir())
	if err != nil {
		return comeBack{}, err
	}
	defer q.drop()
	back, err := q.takeBack(ctx)
	if err != nil {
		return back, err
	}
	return back, n.give(ctx, p, q, back, actor)
}
