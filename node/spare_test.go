package node

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cal/machine"
	"cal/machine/fake"
	"cal/nucleus"
)

func withSpares(h *host) { h.spare = time.Hour }

// waitingSpare waits until the spare is made and returns it; nil where there is none.
func (h *host) waitingSpare() *spare {
	h.node.spares.mu.Lock()
	waiting := h.node.spares.waiting
	h.node.spares.mu.Unlock()
	if waiting != nil {
		<-waiting.ready
	}
	return waiting
}

// delete ends a pod; the node then makes a spare of its shape.
func (h *host) delete(p *Pod) {
	h.t.Helper()
	if err := h.node.DeletePod(h.context(), OperatorKey, p.record.ID); err != nil {
		h.t.Fatal(err)
	}
}

// A pod of the same shape gets the spare, as good as a machine made now; its record in
// the log says so. Of another shape none does.
func TestSpare(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		first  string // workspace
		change func(*host, *nucleus.PodSpec)
		want   bool
	}{
		"no workspace":           {want: true},
		"the same workspace":     {first: "w", want: true},
		"another policy":         {want: true, change: func(_ *host, s *nucleus.PodSpec) { s.Policy = policyOf("read_files") }},
		"another environment":    {want: true, change: func(_ *host, s *nucleus.PodSpec) { s.Env = map[string]string{"A": "b"} }},
		"another workspace":      {first: "w", change: func(_ *host, s *nucleus.PodSpec) { s.Workspace = "v" }},
		"no workspace after one": {first: "w", change: func(_ *host, s *nucleus.PodSpec) { s.Workspace = "" }},
		"a workspace after none": {change: func(_ *host, s *nucleus.PodSpec) { s.Workspace = "w" }},
		"other limits":           {change: func(_ *host, s *nucleus.PodSpec) { s.Resources.Pids = 99 }},
		"one layer more": {change: func(h *host, s *nucleus.PodSpec) {
			s.Image.Layers = []nucleus.Layer{{Name: "l", Host: filepath.Dir(os.Args[0]), Guest: "/opt/l"}}
		}},
		"the workspace was made anew": {first: "w", change: func(h *host, s *nucleus.PodSpec) {
			if err := os.Rename(h.node.dirs.Workspace("w"), h.node.dirs.Workspace("w")+".old"); err != nil {
				h.t.Fatal(err)
			}
		}},
		"the spare has died": {change: func(h *host, s *nucleus.PodSpec) { h.driver.Kill(machineDir(h.waitingSpare().dir)) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, withSpares)
			spec := specOf(test.first, policyOf(all))
			first := h.pod(spec, map[string]string{"left": "by the first"})
			h.delete(first)
			made := h.waitingSpare()
			if made == nil || made.err != nil {
				t.Fatalf("no spare: %+v", made)
			}
			if test.change != nil {
				test.change(h, &spec)
			}
			second := h.pod(spec, map[string]string{"a": "text"})
			if got := second.record.ID == made.id; got != test.want {
				t.Fatalf("pod %s has the spare %s: %v, want %v", second.record.ID, made.id, got, test.want)
			}
			h.tool(second, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
			_, err := os.Stat(filepath.Join(filesDir(second.record.Workspace), "left"))
			if kept := err == nil; kept != (spec.Workspace == "w" && name != "the workspace was made anew" && test.first == "w") {
				t.Errorf("the first pod's file is in the second's workspace: %v", kept)
			}
			creates := h.entries(nucleus.KindPodCreate, "")
			var said struct{ Spare bool }
			if err := json.Unmarshal(creates[len(creates)-1].Data, &said); err != nil || said.Spare != test.want {
				t.Errorf("the log says spare %v (%v), want %v", said.Spare, err, test.want)
			}
			if _, err := os.Stat(made.note); test.want && !os.IsNotExist(err) {
				t.Errorf("the pod is still written down as a spare: %v", err)
			}
		})
	}
}

// Nothing of a spare outlives what it was made for: it goes when its time is over,
// with the node in order, and with the next node after a crash. None was a pod, so
// the log knows nothing of it.
func TestSpareEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*host, *spare){
		"another shape": func(h *host, _ *spare) {
			spec := specOf("", policyOf(all))
			spec.Resources.Pids = 99
			h.delete(h.pod(spec, nil))
		},
		"its time is over": func(h *host, made *spare) { h.node.spares.expire(made) },
		"the node ends":    func(h *host, _ *spare) { h.spare = 0; h.restart() },
		"the node dies":    func(h *host, _ *spare) { h.spare = 0; h.kill(); h.start() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, withSpares)
			h.delete(h.pod(specOf("", policyOf(all)), nil))
			made := h.waitingSpare()
			if made == nil || made.err != nil {
				t.Fatalf("no spare: %+v", made)
			}
			box := made.machine.Done()
			end(h, made)
			select {
			case <-box:
			case <-h.context().Done():
				t.Fatal("the spare's machine runs on")
			}
			h.node.spares.work.Wait()
			for _, path := range []string{made.dir, made.note} {
				if _, err := os.Stat(path); !os.IsNotExist(err) {
					t.Errorf("%s is still there: %v", path, err)
				}
			}
			for _, e := range h.log() {
				if e.Pod == made.id {
					t.Errorf("the log has %s of the spare", e.Kind)
				}
			}
		})
	}
}

// Without SpareLife there is none.
func TestNoSpare(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.delete(h.pod(specOf("", policyOf(all)), nil))
	if made := h.waitingSpare(); made != nil {
		t.Errorf("%+v", made)
	}
}

// emulated is a driver whose machines cost processor time while they do nothing.
type emulated struct{ machine.Driver }

func (emulated) Tier() nucleus.Tier { return nucleus.TierEmulated }

// Of an emulated machine none is made ahead unless that is wanted.
func TestNoEmulatedSpare(t *testing.T) {
	t.Parallel()
	for _, wanted := range []bool{false, true} {
		h := newHost(t, withSpares, func(h *host) { h.emulated, h.ahead = true, wanted })
		spec := specOf("", policyOf(all))
		spec.Driver = "fake"
		h.delete(h.pod(spec, nil))
		if made := h.waitingSpare(); (made != nil) != wanted {
			t.Errorf("wanted %v: %+v", wanted, made)
		}
	}
}

// copier is a driver whose machines hold copies.
type copier struct {
	machine.Driver
	now map[string]string
	err error
}

func (c copier) Digests(context.Context, machine.Spec) (map[string]string, error) {
	return c.now, c.err
}

// made is a machine of which no more is asked than its facts.
type made struct {
	machine.Machine
	facts machine.Facts
}

func (m made) Facts() machine.Facts { return m.facts }

// A spare that holds a copy of files that have changed since is none.
func TestSpareOfOldCopies(t *testing.T) {
	m := made{facts: machine.Facts{Digests: map[string]string{"root": "sha256:1", "layers": "sha256:2"}}}
	for name, test := range map[string]struct {
		driver machine.Driver
		want   bool
	}{
		"no copies":      {fake.New(fake.Config{}), true},
		"as it was":      {copier{now: map[string]string{"layers": "sha256:2", "root": "sha256:1"}}, true},
		"another root":   {copier{now: map[string]string{"layers": "sha256:2", "root": "sha256:3"}}, false},
		"a layer less":   {copier{now: map[string]string{"root": "sha256:1"}}, false},
		"nobody can say": {copier{now: m.facts.Digests, err: errors.New("gone")}, false},
	} {
		if got := (&spare{driver: test.driver, machine: m}).current(t.Context(), machine.Spec{}); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
