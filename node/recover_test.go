package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cal/guest"
	"cal/internal/durable"
	"cal/machine"
	"cal/nucleus"
)

// A node that was killed is followed by one that goes on with its machines: epoch and
// sequences rise, what it had begun is closed as unknown.
func TestRecovery(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(all)), map[string]string{"a": "text"})
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	reached, dead := make(chan struct{}), make(chan struct{})
	h.mu.Lock()
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		close(reached)
		<-dead
		return guest.CallResult{}, false
	}
	h.mu.Unlock()
	// The node ends between intent and outcome: the log refuses the outcome.
	got := make(chan answer, 1)
	log := h.node.log
	go func() {
		got <- h.serve(h.node, h.signed(h.asAgent(p), "POST", "/v1/pods/"+p.record.ID+"/tools/write_files", p.record.ID, []byte(`{"path":"b","content":"x"}`)))
	}()
	<-reached
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	h.kill()
	close(dead)
	if a := <-got; a.Error == nil || a.Error.Kind != nucleus.KindUnavailable {
		t.Errorf("%v", a)
	}
	h.mu.Lock()
	h.behave = nil
	h.mu.Unlock()

	for round := uint64(2); round < 5; round++ {
		h.start()
		adopted, err := h.node.pod(p.record.ID)
		if err != nil {
			t.Fatal(err)
		}
		if adopted.digest != p.digest || nucleus.SHA256(adopted.record.Policy) != p.digest {
			t.Errorf("round %d: the policy has the digest %s, at the start it was %s", round, adopted.digest, p.digest)
		}
		if adopted.record.Epoch != round || adopted.record.Session != p.record.Session || adopted.root.legs() != p.root.legs()|nucleus.Private {
			t.Errorf("round %d: epoch %d, session %s, exposure %v", round, adopted.record.Epoch, adopted.record.Session, adopted.root.legs().Names())
		}
		h.tool(adopted, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
		if round < 4 {
			h.kill()
		}
	}
	var last uint64
	for _, permit := range h.inside(p).permits() {
		if permit.Seq <= last {
			t.Errorf("sequence %d after %d", permit.Seq, last)
		}
		last = permit.Seq
	}
	outcomes := h.entries(nucleus.KindOutcome, nucleus.WriteFiles)
	if len(outcomes) != 1 || outcomes[0].Status != nucleus.OutcomeUnknown {
		t.Errorf("outcomes of the request that was cut: %+v", outcomes)
	}
	if got := h.entries(nucleus.KindPodAdopt, ""); len(got) != 3 {
		t.Errorf("%d adoptions recorded, want 3", len(got))
	}
	if open := h.node.log.OpenIntents(); len(open) != 0 {
		t.Errorf("open: %+v", open)
	}
}

// A pod whose record makes no sense is removed whole, with the reason, and hurts no
// other.
func TestRecoveryOfBrokenRecords(t *testing.T) {
	t.Parallel()
	whole := func(t *testing.T, file string) []byte {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for name, spoil := range map[string]func(t *testing.T, file string) error{
		"torn":    func(t *testing.T, f string) error { return os.WriteFile(f, whole(t, f)[:100], 0o600) },
		"empty":   func(_ *testing.T, f string) error { return os.WriteFile(f, nil, 0o600) },
		"garbage": func(_ *testing.T, f string) error { return os.WriteFile(f, bytes.Repeat([]byte{0}, 4096), 0o600) },
		"missing": func(_ *testing.T, f string) error { return os.Remove(f) },
		"no key": func(_ *testing.T, f string) error {
			var r record
			if err := durable.Load(f, &r); err != nil {
				return err
			}
			r.OutcomeKey = nil
			return durable.Store(f, r)
		},
		"another policy": func(_ *testing.T, f string) error {
			var r record
			if err := durable.Load(f, &r); err != nil {
				return err
			}
			r.Policy = json.RawMessage(`{"operations":{"everything":"always"}}`)
			return durable.Store(f, r)
		},
		"unknown driver": func(_ *testing.T, f string) error {
			var r record
			if err := durable.Load(f, &r); err != nil {
				return err
			}
			r.Driver = "gone"
			return durable.Store(f, r)
		},
		"another version": func(_ *testing.T, f string) error {
			var r record
			if err := durable.Load(f, &r); err != nil {
				return err
			}
			r.Version = "0.0.1"
			return durable.Store(f, r)
		},
		"a spoilt exposure": func(_ *testing.T, f string) error {
			var r record
			if err := durable.Load(f, &r); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(r.Workspace, "exposure.json"), []byte(`{"legs":["none"]}`), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			broken := h.pod(specOf("broken", policyOf(all)), nil)
			sound := h.pod(specOf("sound", policyOf(all)), map[string]string{"a": "text"})
			machine := h.inside(broken)
			h.kill()
			if err := spoil(t, filepath.Join(broken.dir, "pod.json")); err != nil {
				t.Fatal(err)
			}
			h.start()
			if _, err := h.node.pod(broken.record.ID); err == nil {
				t.Error("it was taken up")
			}
			if _, err := os.Stat(broken.dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its directory: %v", err)
			}
			select {
			case <-machine.worker.Done():
			case <-h.context().Done():
				t.Error("its machine lives")
			}
			fails := h.entries(nucleus.KindPodFail, "")
			if len(fails) != 1 || fails[0].Pod != broken.record.ID || !strings.Contains(string(fails[0].Data), "reason") {
				t.Errorf("failures recorded: %+v", fails)
			}
			if p, err := h.node.pod(sound.record.ID); err != nil {
				t.Error(err)
			} else {
				h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
			}
		})
	}
}

// A machine that does not take the new wire, or is gone, is removed; the node starts.
func TestRecoveryOfHostileMachines(t *testing.T) {
	t.Parallel()
	t.Run("refuses the wire", func(t *testing.T) {
		h := newHost(t)
		p := h.pod(specOf("w", policyOf(all)), nil)
		machine := h.inside(p)
		h.kill()
		h.mu.Lock()
		h.attach = func() error { return errNo }
		h.mu.Unlock()
		h.start()
		if _, err := h.node.pod(p.record.ID); err == nil {
			t.Error("it was taken up")
		}
		h.nothingLeft()
		select {
		case <-machine.worker.Done():
		case <-h.context().Done():
			t.Error("its machine lives")
		}
	})
	t.Run("died meanwhile", func(t *testing.T) {
		h := newHost(t)
		p := h.pod(specOf("w", policyOf(all)), nil)
		h.kill()
		h.driver.Kill(filepath.Join(p.dir, "machine"))
		h.start()
		if _, err := h.node.pod(p.record.ID); err == nil {
			t.Error("it was taken up")
		}
		h.nothingLeft()
	})
}

// What hands a machine its new wire may hang; another wire is handed in, and the session
// goes on.
func TestRecoveryHandsInAnotherWire(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(all)), map[string]string{"a": "text"})
	h.kill()
	var tries atomic.Int64
	h.mu.Lock()
	h.lost = func() bool { return tries.Add(1) == 1 }
	h.mu.Unlock()
	h.start()
	adopted, err := h.node.pod(p.record.ID)
	if err != nil || tries.Load() != 2 {
		t.Fatalf("%d wires were handed in: %v", tries.Load(), err)
	}
	h.tool(adopted, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
}

// One node at a time.
func TestOneNode(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithTimeout(h.context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, h.node.config); err == nil || !strings.Contains(err.Error(), "another node") {
		t.Errorf("got %v", err)
	}
	h.serve(h.node, h.signed(h.asOperator(), "GET", "/v1/pods", "", nil)).want(t, "")
}

// foreign is a driver to which every machine is another's.
type foreign struct{ machine.Driver }

func (foreign) Remove(context.Context, string) error { return machine.ErrForeign }

// What a driver made is removed by that driver; where none of them made it, it stays.
func TestRemoveDir(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	own := h.node.config.Drivers
	dir := filepath.Join(t.TempDir(), "pod")
	if err := os.MkdirAll(filepath.Join(dir, "machine"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.node.config.Drivers = []machine.Driver{foreign{}}
	if err := h.node.removeDir(t.Context(), dir); !errors.Is(err, machine.ErrForeign) {
		t.Errorf("a machine of nobody's: %v", err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("a machine of nobody's was deleted: %v", err)
	}
	h.node.config.Drivers = append([]machine.Driver{foreign{}}, own...)
	if err := h.node.removeDir(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pod's directory is left: %v", err)
	}
	h.node.config.Drivers = own
}
