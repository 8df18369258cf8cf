package guest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"cal/guest/tools"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

// Descriptors that a role inherits.
const (
	fdWire   = 3 // init: the wire
	fdWorker = 4 // tools: the stream to the proxy
)

// Init serves the machine over the inherited wire.
func Init(ctx context.Context) error {
	conn, err := wireConn(fdWire)
	if err != nil {
		return err
	}
	return Run(ctx, conn)
}

// RunTools is the tools worker: files and commands as the tools' user.
func RunTools(ctx context.Context) error {
	conn, err := tools.Inherit(fdWorker)
	if err != nil {
		return err
	}
	quick, err := newQuickConn(conn)
	if err != nil {
		return err
	}
	session, err := wire.Guest(quick)
	if err != nil {
		return err
	}
	config, err := receiveConfig(session)
	if err != nil {
		return err
	}
	return tools.Serve(ctx, session, config)
}

// receiveConfig takes the first stream, which holds the worker's configuration.
func receiveConfig(session *wire.Session) (tools.Config, error) {
	stream, err := session.Accept()
	if err != nil {
		return tools.Config{}, err
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(bootDeadline))
	var sent WorkerConfig
	var config tools.Config
	if stream.Kind != "config" {
		err = fmt.Errorf("first stream is of kind %q", stream.Kind)
	} else if err = stream.RecvJSON(wire.FrameJSON, 4<<20, &sent); err == nil {
		config, err = workerConfig(sent)
	}
	answer := struct{ Error string }{}
	if err != nil {
		answer.Error = err.Error()
	}
	return config, errors.Join(err, stream.SendJSON(wire.FrameJSON, answer))
}

func workerConfig(sent WorkerConfig) (tools.Config, error) {
	p, err := policy.Load("boot", sent.Policy)
	if err != nil {
		return tools.Config{}, err
	}
	return tools.Config{
		Workspace: nucleus.MachineWorkspace, Home: nucleus.MachineHome, Env: sent.Env, Blocked: p.Blocked,
		MaxTasks: sent.MaxPids, Sync: syncing(sent.Sync), Confine: confining(),
	}, nil
}

// confining keeps a thread, and what it starts, to the places of the tools, where the kernel can.
func confining() func() error {
	if landlock() == 0 {
		return nil
	}
	return func() error { return keepWritesBelow(writable) }
}

// syncing writes the workspace out, where it is a disk that the machine's kernel writes later.
func syncing(needed bool) func() error {
	if !needed {
		return nil
	}
	return func() error {
		workspace, err := unix.Open(nucleus.MachineWorkspace, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(workspace)
		return unix.Syncfs(workspace)
	}
}
