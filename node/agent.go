package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"cal/guest"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// openAgent starts the agent in the machine with argv, or joins it. start is the entry that
// recorded the start, before it was made.
func (n *Node) openAgent(ctx context.Context, p *Pod, actor string, body client.AgentRequest, argv []string) (machine *wire.Stream, start nucleus.Entry, err error) {
	session, err := p.wire()
	if err != nil {
		return nil, start, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if body.Attach {
		if _, err := n.append(nucleus.Entry{Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindSessionAttach}); err != nil {
			return nil, start, logFailure(err)
		}
		machine, err := session.Open(ctx, guest.StreamAttach, nil)
		if err != nil {
			return nil, start, p.lost(err)
		}
		return machine, start, nil
	}
	if start, err = n.recordAgentStart(p, actor, body, argv); err != nil {
		return nil, start, err
	}
	machine, err = session.Open(ctx, guest.StreamAgent, guest.AgentStart{Start: start.Seq, TTY: body.TTY, Rows: body.Rows, Cols: body.Cols})
	if err != nil {
		err = p.lost(err)
		n.recordAgentRefused(p, actor, start, nucleus.OutcomeRefused, nucleus.AsError(err))
		return nil, start, err
	}
	agent := p.record.Spec.Agent
	if err := machine.SendJSON(wire.FrameJSON, guest.AgentProgram{Argv: argv, Env: agent.Env, Home: agent.Home}); err != nil {
		machine.Close()
		err = p.lost(err)
		n.recordAgentRefused(p, actor, start, nucleus.OutcomeUnknown, nucleus.AsError(err))
		return nil, start, err
	}
	return machine, start, nil
}

// recordAgentStart logs the start and, as reads, the instruction files handed over.
func (n *Node) recordAgentStart(p *Pod, actor string, body client.AgentRequest, argv []string) (nucleus.Entry, error) {
	names := []string{}
	for name := range p.record.Spec.Agent.Home {
		if instruction, ok := strings.CutPrefix(name, guest.WorkDir+"/"); ok {
			names = append(names, instruction)
		}
	}
	p.root.mu.Lock()
	defer p.root.mu.Unlock()
	p.settle()
	if err := p.overspent(false); err != nil {
		return nucleus.Entry{}, err
	}
	if len(names) > 0 {
		takes := nucleus.Private
		if p.record.Untrusted {
			takes |= nucleus.Untrusted
		}
		if err := n.expose(p, takes, false, "instruction files "+fmt.Sprint(names)); err != nil {
			return nucleus.Entry{}, logFailure(err)
		}
	}
	start, err := n.append(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindSessionStart, Exposure: p.root.exposure.Names(),
		Data: data(map[string]any{"agent": p.record.Spec.Agent.Name, "argv": shownArgv(argv), "tty": body.TTY, "instructions": names}),
	})
	if err != nil {
		return start, logFailure(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.runs == nil {
		p.runs = map[int64]string{}
	}
	p.runs[start.Seq] = actor
	return start, nil
}

func (n *Node) relayAgent(p *Pod, actor string, start nucleus.Entry, person, machine *wire.Stream) {
	go func() {
		defer machine.Close() // the terminal went away; the agent goes on
		copyFrames(machine, person)
	}()
	for {
		kind, payload, err := machine.Recv(1 << 20)
		if err != nil {
			p.awaitDeath()
			if _, gone := p.wire(); gone != nil { // not the wire alone: the machine
				n.endRuns(p, nucleus.AsError(gone))
				sendExit(person, p.endOf(guest.AgentExit{ExitCode: -1, Error: nucleus.AsError(gone)}).Error)
			}
			return
		}
		if kind == wire.FrameResult {
			exit, err := readExit(payload)
			if err == nil {
				if start.Kind != "" {
					exit.Start = start.Seq
				}
				exit = p.endOf(exit)
				payload = data(exit)
			}
			switch {
			case err != nil || tookOver(exit):
			case exit.Refused && start.Kind != "":
				n.recordAgentRefused(p, actor, start, nucleus.OutcomeRefused, exit.Error)
			default:
				n.recordAgentEnd(p, exit)
			}
		}
		if person.Send(kind, payload) != nil || kind == wire.FrameResult {
			return
		}
	}
}

// shownArgv is what an entry has room for: a prompt may be longer.
func shownArgv(argv []string) []string {
	shown, room := []string{}, 20_000
	for i, arg := range argv {
		arg = logged(arg, 2000)
		if room -= len(arg); room < 0 {
			return append(shown, fmt.Sprintf("[cut: %d more]", len(argv)-i))
		}
		shown = append(shown, arg)
	}
	return shown
}

// tookOver reports whether the stream ended because another terminal joined the agent,
// which goes on.
func tookOver(exit guest.AgentExit) bool {
	return !exit.Refused && exit.Error != nil && exit.Error.Kind == nucleus.KindConflict
}

// recordAgentRefused takes a start back that started nothing, or nobody knows what: another
// agent runs, by the machine's word, or its wire ended.
func (n *Node) recordAgentRefused(p *Pod, actor string, start nucleus.Entry, status string, why *nucleus.Error) {
	p.mu.Lock()
	delete(p.runs, start.Seq)
	p.mu.Unlock()
	n.note(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindSessionRefuse,
		Status: status, Data: data(map[string]any{"start": start.Seq, "error": why}),
	})
}

// recordAgentEnd records how a run of the agent ended, once, whoever comes to know first: the
// terminal that is joined to it, or the node that watches the machine.
func (n *Node) recordAgentEnd(p *Pod, exit guest.AgentExit) {
	p.mu.Lock()
	actor, open := p.runs[exit.Start]
	delete(p.runs, exit.Start)
	p.mu.Unlock()
	if !open {
		return
	}
	n.note(nucleus.Entry{
		Pod: p.record.ID, Session: p.record.Session, Actor: actor, Kind: nucleus.KindSessionEnd,
		Exposure: p.root.legs().Names(), Data: data(exit),
	})
}

// endRuns records the end of runs that nobody will say more of: their machine is gone.
func (n *Node) endRuns(p *Pod, why *nucleus.Error) {
	p.mu.Lock()
	open := slices.Sorted(maps.Keys(p.runs))
	p.mu.Unlock()
	for _, start := range open {
		n.recordAgentEnd(p, p.endOf(guest.AgentExit{Start: start, ExitCode: -1, Error: why}))
	}
}

// adoptRun finds the run of the agent that goes on, or has ended, in a machine that an
// earlier node left: the log has its start and not its end.
func (n *Node) adoptRun(p *Pod) error {
	for e, err := range n.log.Backward(p.record.Session) {
		if err != nil {
			return err
		}
		switch e.Kind {
		case nucleus.KindSessionEnd, nucleus.KindSessionRefuse:
			return nil
		case nucleus.KindSessionStart:
			p.runs = map[int64]string{e.Seq: e.Actor}
			return nil
		}
	}
	return nil
}
