package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"

	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

const agentInit = "/.nucleus/init" // this program, in the agent's own root

// agentHost holds the one agent of a session. The agent outlives the wire: its
// output waits, bounded, for the node that comes back.
type agentHost struct {
	proxy   *Proxy
	mu      sync.Mutex
	run     *agentRun
	started chan struct{} // closed, and made anew, when another agent has started
}

// watch tells the node what runs, whoever is joined to the agent, and hands on its signals.
func (h *agentHost) watch(ctx context.Context, stream *wire.Stream) {
	jobs, err := h.proxy.worker.Open(ctx, tools.StreamJobs, nil)
	if err != nil {
		return
	}
	defer jobs.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		for {
			kind, payload, err := stream.Recv(64)
			if err != nil {
				return
			}
			if kind != wire.FrameSignal {
				continue
			}
			if run, _ := h.current(); run != nil && !run.ended() {
				run.input(kind, payload)
			}
			jobs.Send(kind, payload)
		}
	}()
	states := make(chan tools.JobState)
	go func() {
		defer cancel()
		for {
			var state tools.JobState
			if jobs.RecvJSON(wire.FrameJSON, 64<<10, &state) != nil {
				return
			}
			select {
			case states <- state:
			case <-ctx.Done():
				return
			}
		}
	}()
	var state WorkState
	for {
		run, started := h.current()
		state.Agent, state.Exit = run != nil && !run.ended(), nil
		if run != nil && run.ended() {
			state.Exit = run.exit()
		}
		if stream.SendJSON(wire.FrameJSON, state) != nil {
			return
		}
		exited := make(chan struct{}) // never
		if state.Agent {
			exited = run.exited
		}
		select {
		case <-exited:
		case <-started:
		case jobs := <-states:
			state.Jobs = jobs.Running
		case <-ctx.Done():
			return
		}
	}
}

func (h *agentHost) current() (*agentRun, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.started == nil {
		h.started = make(chan struct{})
	}
	return h.run, h.started
}

func (h *agentHost) start(stream *wire.Stream) {
	var start AgentStart
	if err := nucleus.Strict(stream.Header, &start); err != nil {
		refuseAgent(stream, nucleus.Errorf(nucleus.KindInvalid, "agent: %v", err))
		return
	}
	// A prompt and a HOME are larger than a header may be.
	stream.SetReadDeadline(time.Now().Add(bootDeadline))
	var program AgentProgram
	if err := stream.RecvJSON(wire.FrameJSON, 16<<20, &program); err != nil {
		refuseAgent(stream, nucleus.Errorf(nucleus.KindInvalid, "agent's program: %v", err))
		return
	}
	stream.SetReadDeadline(time.Time{})
	h.mu.Lock()
	if h.run != nil && !h.run.ended() {
		h.mu.Unlock()
		refuseAgent(stream, nucleus.Errorf(nucleus.KindConflict, "an agent runs in this machine already"))
		return
	}
	begin := h.proxy.startAgent
	if h.proxy.config.Mode == nucleus.Contained {
		begin = h.proxy.startContained
	}
	run, err := begin(start, program)
	if err == nil {
		run.start = start.Start
		h.run = run
		if h.started != nil {
			close(h.started)
			h.started = nil
		}
	}
	h.mu.Unlock()
	if err != nil {
		refuseAgent(stream, nucleus.Errorf(nucleus.KindFailed, "starting the agent: %v", err))
		return
	}
	run.join(stream)
}

func (h *agentHost) attach(stream *wire.Stream) {
	h.mu.Lock()
	run := h.run
	h.mu.Unlock()
	if run == nil {
		endAgent(stream, nucleus.Errorf(nucleus.KindNotFound, "no agent runs in this machine"))
		return
	}
	run.join(stream)
}

func endAgent(stream *wire.Stream, e *nucleus.Error) {
	stream.SetWriteDeadline(time.Now().Add(bootDeadline))
	stream.SendJSON(wire.FrameResult, AgentExit{ExitCode: -1, Error: e})
}

// refuseAgent says that no agent was started.
func refuseAgent(stream *wire.Stream, e *nucleus.Error) {
	stream.SetWriteDeadline(time.Now().Add(bootDeadline))
	stream.SendJSON(wire.FrameResult, AgentExit{ExitCode: -1, Error: e, Refused: true})
}

// startAgent builds the agent's jail, its endpoints, and starts it.
func (p *Proxy) startAgent(start AgentStart, program AgentProgram) (*agentRun, error) {
	if len(program.Argv) == 0 || !strings.HasPrefix(program.Argv[0], "/") {
		return nil, errors.New("argv[0] is no absolute path")
	}
	env := []string{"HOME=" + nucleus.MachineHome, "PATH=/usr/local/bin:/usr/bin:/bin", "USER=agent", "LOGNAME=agent", "TMPDIR=/tmp"}
	for name, value := range program.Env {
		env = append(env, name+"="+value)
	}
	plan := jailPlan{
		Kind: agentJail, UID: p.config.AgentUID, GID: p.config.AgentGID,
		Listen: []string{MCPAddr, ModelAddr}, DNS: true,
		Layers: append([]AgentLayer{{nucleus.MachineProxy, agentInit}}, p.config.Layers...),
		Next:   append([]string{agentInit, "agent-init", "--"}, program.Argv...),
		Env:    env, Home: program.Home,
	}
	run := newAgentRun()
	run.input = run.toJail
	stdio, closeChild, err := run.stdio(start, plan.UID, plan.GID)
	if err != nil {
		return nil, err
	}
	defer closeChild()
	if run.jail, err = startJail(plan, stdio); err != nil {
		run.closeFiles()
		return nil, err
	}
	go serveMCP(run.jail.listeners[0], p.mcpHandler())
	go p.forward(run.jail.listeners[1], StreamModel, unwatched)
	go answerNXDOMAIN(run.jail.dns)
	go run.wait()
	return run, nil
}

// agentRun is one life of an agent's process.
type agentRun struct {
	jail    *jail    // nil in contained mode
	tty     *os.File // of a jailed agent; nil without a terminal
	outputs []*os.File
	input   func(wire.Frame, []byte) // what the person types and does

	mu     sync.Mutex
	room   sync.Cond // output was taken, or somebody joined or left
	queue  []chunk
	queued int
	joined int // generation of who reads; a new one takes over
	seated bool
	pumps  sync.WaitGroup

	start  int64 // as the node names the run
	exited chan struct{}
	code   int // once it is closed
}

func newAgentRun() *agentRun {
	r := &agentRun{exited: make(chan struct{})}
	r.room.L = &r.mu
	return r
}

type chunk struct {
	kind wire.Frame
	data []byte
}

const maxQueued = 1 << 20

func (r *agentRun) ended() bool {
	select {
	case <-r.exited:
		return true
	default:
		return false
	}
}

// exit is how an agent that has ended did.
func (r *agentRun) exit() *AgentExit { return &AgentExit{Start: r.start, ExitCode: r.code} }

// stdio makes the terminal or the pipes; closeChild closes the child's ends.
func (r *agentRun) stdio(start AgentStart, uid, gid int) (func(*exec.Cmd), func(), error) {
	if start.TTY {
		master, slave, err := pty.Open()
		if err != nil {
			return nil, nil, err
		}
		pty.Setsize(master, &pty.Winsize{Rows: start.Rows, Cols: start.Cols})
		if err := slave.Chown(uid, gid); err != nil {
			return nil, nil, fmt.Errorf("giving the terminal to the agent: %w", err)
		}
		r.tty = master
		r.pump(wire.FrameStdout, master)
		return func(cmd *exec.Cmd) {
			cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
			cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty, cmd.SysProcAttr.Ctty = true, true, 0
		}, func() { slave.Close() }, nil
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	r.pump(wire.FrameStdout, outR)
	r.pump(wire.FrameStderr, errR)
	return func(cmd *exec.Cmd) {
		cmd.Stdout, cmd.Stderr = outW, errW // stdin stays /dev/null: agents wait for its end
		cmd.SysProcAttr.Setsid = true
	}, func() { outW.Close(); errW.Close() }, nil
}

func (r *agentRun) pump(kind wire.Frame, from *os.File) {
	r.outputs = append(r.outputs, from)
	r.pumps.Add(1)
	go func() {
		defer r.pumps.Done()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if n > 0 {
				r.put(chunk{kind, append([]byte(nil), buf[:n]...)})
			}
			if err != nil {
				return
			}
		}
	}()
}

// put queues output. A reader that is slow slows the agent; while nobody reads, the
// oldest output gives way.
func (r *agentRun) put(c chunk) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.queued > maxQueued {
		if r.seated {
			r.room.Wait()
			continue
		}
		r.queued -= len(r.queue[0].data)
		r.queue = r.queue[1:]
	}
	r.queue = append(r.queue, c)
	r.queued += len(c.data)
	r.room.Broadcast()
}

func (r *agentRun) wait() {
	r.jail.cmd.Wait()
	r.pumps.Wait()
	r.closeFiles()
	r.jail.close()
	r.end(exitCode(r.jail.cmd.ProcessState))
}

func (r *agentRun) end(code int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.code = code
	close(r.exited)
	r.room.Broadcast()
}

func (r *agentRun) closeFiles() {
	for _, f := range r.outputs {
		f.Close()
	}
}

// join connects a stream to the agent until either ends. Who joins last takes
// over.
func (r *agentRun) join(stream *wire.Stream) {
	r.mu.Lock()
	r.joined++
	mine := r.joined
	r.seated = true
	r.room.Broadcast()
	r.mu.Unlock()
	go r.read(stream, mine)
	for {
		c, state := r.take(mine)
		switch state {
		case chunkReady:
			if err := stream.Send(c.kind, c.data); err != nil {
				r.leave(mine)
				return
			}
		case agentEnded:
			stream.SetWriteDeadline(time.Now().Add(bootDeadline))
			stream.SendJSON(wire.FrameResult, r.exit())
			return
		case tookOver:
			endAgent(stream, nucleus.Errorf(nucleus.KindConflict, "another terminal took over"))
			return
		}
	}
}

type takeState int

const (
	chunkReady takeState = iota
	agentEnded
	tookOver
)

func (r *agentRun) take(mine int) (chunk, takeState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		switch {
		case r.joined != mine:
			return chunk{}, tookOver
		case len(r.queue) > 0:
			c := r.queue[0]
			r.queue = r.queue[1:]
			r.queued -= len(c.data)
			r.room.Broadcast()
			return c, chunkReady
		case r.ended():
			return chunk{}, agentEnded
		}
		r.room.Wait()
	}
}

func (r *agentRun) leave(mine int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.joined == mine {
		r.joined++
		r.seated = false
		r.room.Broadcast()
	}
}

// read carries what the person types. The end of the stream is the end of the
// wire, not of the agent.
func (r *agentRun) read(stream *wire.Stream, mine int) {
	defer r.leave(mine)
	for {
		kind, payload, err := stream.Recv(1 << 20)
		if err != nil || !r.seat(mine) {
			return
		}
		r.input(kind, payload)
	}
}

// seat reports whether the reader that joined as mine still has the terminal.
func (r *agentRun) seat(mine int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.joined == mine
}

func (r *agentRun) toJail(kind wire.Frame, payload []byte) {
	switch kind {
	case wire.FrameStdin:
		if r.tty != nil {
			_, _ = r.tty.Write(payload) // an agent that has ended reads nothing
		}
	case wire.FrameSize:
		var size struct{ Rows, Cols uint16 }
		if json.Unmarshal(payload, &size) == nil && r.tty != nil {
			pty.Setsize(r.tty, &pty.Winsize{Rows: size.Rows, Cols: size.Cols})
		}
	case wire.FrameSignal:
		r.signal(string(payload))
	}
}

var signals = map[string]syscall.Signal{
	"INT": syscall.SIGINT, "TERM": syscall.SIGTERM, "HUP": syscall.SIGHUP, "QUIT": syscall.SIGQUIT, "KILL": syscall.SIGKILL,
}

func (r *agentRun) signal(name string) {
	if s, ok := signals[name]; ok && !r.ended() {
		r.jail.cmd.Process.Signal(s) // agent-init passes it on
	}
}

func exitCode(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

// answerNXDOMAIN answers every DNS question with "no such name" at once: some
// agents hang for seconds where nothing answers.
func answerNXDOMAIN(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n < 12 || buf[2]&0x80 != 0 {
			continue // RFC 1035, 4.1.1: shorter than a header, or an answer
		}
		answer := append([]byte(nil), buf[:n]...)
		answer[2] |= 0x80                   // QR
		answer[3] = answer[3]&0x70 | 0x83   // RA, NXDOMAIN
		copy(answer[6:12], make([]byte, 6)) // no answers, authorities, additional records
		_, _ = conn.WriteTo(answer[:min(n, questionEnd(answer))], from)
	}
}

// questionEnd is the offset behind the first question.
func questionEnd(m []byte) int {
	i := 12
	for i < len(m) && m[i] != 0 && m[i]&0xc0 == 0 {
		i += int(m[i]) + 1
	}
	return i + 5
}

// AgentInit is the first process of the agent's pid namespace: it starts the
// agent, passes signals on, reaps what is orphaned and ends as the agent does.
func AgentInit(argv []string) (int, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return 127, err
	}
	stop := forwardSignals(cmd.Process.Pid)
	defer stop()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 127, err
		case pid == cmd.Process.Pid && status.Exited():
			return status.ExitStatus(), nil
		case pid == cmd.Process.Pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		}
	}
}

// api returns a client whose connections are streams of the wire.
func (p *Proxy) api() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return p.open(ctx, StreamAPI, nil)
		},
		MaxIdleConnsPerHost: 8,
		IdleConnTimeout:     time.Minute,
	}}
}
