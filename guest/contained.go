package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

// startContained runs the agent among the tools: their user, their view of the
// machine, the workspace. What it does there is its own affair; what leaves the
// machine is decided and recorded like everything else.
func (p *Proxy) startContained(start AgentStart, program AgentProgram) (*agentRun, error) {
	if len(program.Argv) == 0 || !strings.HasPrefix(program.Argv[0], "/") {
		return nil, errors.New("argv[0] is no absolute path")
	}
	if err := p.fillHome(program.Home); err != nil {
		return nil, fmt.Errorf("filling HOME: %w", err)
	}
	args, err := json.Marshal(tools.RunArgs{Argv: containedArgv(program), TimeoutS: int(tools.MaxTimeout / time.Second)})
	if err != nil {
		return nil, err
	}
	call := tools.Call{Op: nucleus.RunBash, Terminal: start.TTY, Rows: start.Rows, Cols: start.Cols, Stream: true, Stdin: start.TTY}
	ctx, cancel := context.WithTimeout(context.Background(), bootDeadline)
	defer cancel()
	action, err := p.resolveCommand(ctx, call, args)
	if err != nil {
		return nil, err
	}
	worker, err := p.worker.Open(ctx, tools.StreamDo, call)
	if err != nil {
		return nil, err
	}
	if err := worker.SendJSON(wire.FrameJSON, tools.Args{Args: args, Action: action}); err != nil {
		worker.Close()
		return nil, err
	}
	run := newAgentRun()
	run.input = func(kind wire.Frame, payload []byte) {
		if kind != wire.FrameStdin || start.TTY { // without a terminal the agent has no input
			worker.Send(kind, payload)
		}
	}
	go run.follow(worker)
	return run, nil
}

// containedArgv names the program where its layer lies in the tools' view, with its
// environment; the tools' own stays beneath it.
func containedArgv(program AgentProgram) []string {
	argv := []string{"/usr/bin/env"}
	names := make([]string, 0, len(program.Env))
	for name := range program.Env {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		argv = append(argv, name+"="+program.Env[name])
	}
	return append(append(argv, nucleus.MachineAgent+program.Argv[0]), program.Argv[1:]...)
}

func (p *Proxy) resolveCommand(ctx context.Context, call tools.Call, args json.RawMessage) (*nucleus.Action, error) {
	stream, err := p.worker.Open(ctx, tools.StreamResolve, call)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var resolved tools.Resolved
	if err = stream.SendJSON(wire.FrameJSON, tools.Args{Args: args}); err == nil {
		err = stream.RecvJSON(wire.FrameResult, maxResult, &resolved)
	}
	if err == nil && resolved.Error != nil {
		err = resolved.Error
	}
	return resolved.Action, err
}

// fillHome writes the agent's files into the tools' HOME, which its owner may have
// filled with links: nothing outside of it is touched.
func (p *Proxy) fillHome(files map[string][]byte) error {
	home, err := os.OpenRoot(nucleus.MachineHome)
	if err != nil {
		return err
	}
	defer home.Close()
	for name, data := range files {
		if strings.HasPrefix(name, "workspace/") {
			return fmt.Errorf("%s lies in the workspace", name)
		}
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			if err := home.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			if err := home.Lchown(dir, p.config.ToolsUID, p.config.ToolsGID); err != nil {
				return err
			}
		}
		if err := home.WriteFile(path.Clean(name), data, 0o600); err != nil {
			return err
		}
		if err := home.Lchown(name, p.config.ToolsUID, p.config.ToolsGID); err != nil {
			return err
		}
	}
	return nil
}

// follow queues what the worker sends until the agent's end.
func (r *agentRun) follow(worker *wire.Stream) {
	defer worker.Close()
	code := -1
	for {
		kind, payload, err := worker.Recv(maxResult)
		if err != nil {
			break
		}
		if kind == wire.FrameResult {
			var result tools.Result
			if json.Unmarshal(payload, &result) == nil {
				code = result.ExitCode
				if result.Error != nil {
					r.put(chunk{wire.FrameStderr, []byte(result.Error.Message + "\n")})
					code = 127
				}
			}
			break
		}
		r.put(chunk{kind, payload})
	}
	r.end(code)
}
