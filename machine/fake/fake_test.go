package fake_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cal/machine"
	"cal/machine/fake"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

func TestConformance(t *testing.T) {
	for _, how := range []string{machine.Enforced, machine.Watched} {
		t.Run(how, func(t *testing.T) {
			driver := fake.New(fake.Config{Guest: guest, Memory: how})
			proxy, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			machinetest.Run(t, machinetest.Host{
				Driver: func() machine.Driver { return driver }, Proxy: proxy, Scratch: t.TempDir(),
				Kill: func(_ *testing.T, dir string) { driver.Kill(dir) },
			})
		})
	}
}

// guest does the few actions that need no machine, in this process.
func guest(ctx context.Context, in fake.Inside) {
	var kept string
	var mu sync.Mutex
	var wires sync.WaitGroup
	do := func(a script.Action) (string, error) {
		mu.Lock()
		defer mu.Unlock()
		path := filepath.Join(in.Spec.Workspace, strings.TrimPrefix(a.Path, nucleus.MachineWorkspace))
		switch a.Do {
		case "echo":
			return a.Data, nil
		case "set":
			kept = a.Data
			return "", nil
		case "get":
			return kept, nil
		case "read":
			data, err := os.ReadFile(path)
			return string(data), err
		case "write":
			return "", os.WriteFile(path, []byte(a.Data), 0o644)
		case "alter":
			return "", script.Alter(path)
		}
		return "", errors.ErrUnsupported
	}
	serve := func(wire net.Conn, answer func(error)) {
		stop := context.AfterFunc(ctx, func() { wire.Close() })
		defer stop()
		defer wire.Close()
		decoder, encoder := json.NewDecoder(wire), json.NewEncoder(wire)
		for {
			var action script.Action
			if decoder.Decode(&action) != nil {
				return
			}
			if answer != nil {
				if action.Data != script.Proof {
					answer(errors.New("no proof"))
					return
				}
				answer(nil)
				answer = nil
			}
			var reply script.Reply
			data, err := do(action)
			if reply.Data = data; err != nil {
				reply.Err = err.Error()
			}
			if encoder.Encode(reply) != nil {
				return
			}
		}
	}
	wires.Go(func() { serve(in.Wire, nil) })
	for {
		select {
		case <-ctx.Done():
			wires.Wait()
			return
		case attach := <-in.Attach:
			wires.Go(func() { serve(attach.Wire, attach.Answer) })
		}
	}
}

func TestProbeFails(t *testing.T) {
	why := &machine.ProbeError{Cause: "off", Mend: "on"}
	if err := fake.New(fake.Config{Fail: why}).Probe(context.Background()); !errors.Is(err, error(why)) {
		t.Errorf("got %v", err)
	}
}
