package node

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/machine"
	"cal/machine/fake"
	"cal/nucleus"
	"cal/wire"
)

// What a caller may do depends on its key alone.
func TestRoles(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), map[string]string{"a": "text"})
	other := h.pod(specOf("", policyOf(all)), map[string]string{"a": "other's"})
	read := []byte(`{"path":"a"}`)
	tools := "/v1/pods/" + p.record.ID + "/tools/read_files"
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	strange := func(id string) *wire.Signer { return &wire.Signer{KeyID: id, Ed25519: stranger, Now: h.clock.now} }
	agent, operator := h.asAgent(p), h.asOperator()
	spec := document(t, specOf("", policyOf(all)))
	for name, c := range map[string]struct {
		signer            *wire.Signer
		method, path, pod string
		body              []byte
		kind              nucleus.Kind
	}{
		"its own agent":                        {agent, "POST", tools, p.record.ID, read, ""},
		"the operator":                         {operator, "POST", tools, p.record.ID, read, ""},
		"its agent's view":                     {agent, "GET", "/v1/pods/" + p.record.ID, p.record.ID, nil, ""},
		"another pod's agent":                  {h.asAgent(other), "POST", tools, p.record.ID, read, nucleus.KindForbidden},
		"another pod's agent, for itself":      {h.asAgent(other), "POST", tools, other.record.ID, read, nucleus.KindForbidden},
		"the operator, signed for another pod": {operator, "POST", tools, other.record.ID, read, nucleus.KindForbidden},
		"an agent lists":                       {agent, "GET", "/v1/pods", "", nil, nucleus.KindForbidden},
		"an agent creates":                     {agent, "POST", "/v1/pods", "", spec, nucleus.KindForbidden},
		"an agent plans":                       {agent, "POST", "/v1/plan", "", spec, nucleus.KindForbidden},
		"an agent deletes itself":              {agent, "DELETE", "/v1/pods/" + p.record.ID, p.record.ID, nil, nucleus.KindForbidden},
		"an agent starts an agent":             {agent, "POST", "/v1/pods/" + p.record.ID + "/agent", p.record.ID, []byte(`{}`), nucleus.KindForbidden},
		"an agent fetches":                     {agent, "POST", "/v1/pods/" + p.record.ID + "/repos/app/fetch", p.record.ID, nil, nucleus.KindForbidden},
		"an agent resumes":                     {agent, "POST", "/v1/pods/" + p.record.ID + "/resume", p.record.ID, nil, nucleus.KindForbidden},
		"an agent stops the node":              {agent, "POST", "/v1/stop", "", nil, nucleus.KindForbidden},
		"a stranger":                           {strange("nobody"), "POST", tools, p.record.ID, read, nucleus.KindUnauthenticated},
		"a stranger as operator":               {strange(OperatorKey), "POST", tools, p.record.ID, read, nucleus.KindUnauthenticated},
		"a stranger as the agent":              {strange(p.record.Boot), "POST", tools, p.record.ID, read, nucleus.KindUnauthenticated},
		"no such pod":                          {operator, "POST", "/v1/pods/p-none/tools/read_files", "p-none", read, nucleus.KindNotFound},
		"no such route":                        {operator, "POST", "/v1/nothing", "", nil, nucleus.KindNotFound},
	} {
		a := h.serve(h.node, h.signed(c.signer, c.method, c.path, c.pod, c.body))
		if c.kind == "" && a.Status >= 300 || c.kind != "" && (a.Error == nil || a.Error.Kind != c.kind) {
			t.Errorf("%s: %v, want %q", name, a, c.kind)
		}
	}

	for name, change := range map[string]func(*http.Request){
		"unsigned":       func(r *http.Request) { r.Header.Del("Signature") },
		"another method": func(r *http.Request) { r.Method = http.MethodPut },
		"another path":   func(r *http.Request) { r.RequestURI, r.URL.Path = tools[:len(tools)-1], tools[:len(tools)-1] },
		"another query":  func(r *http.Request) { r.RequestURI += "?wait=1" },
		"another pod":    func(r *http.Request) { r.Header.Set("Nucleus-Pod", other.record.ID) },
		"another host":   func(r *http.Request) { r.Host = "elsewhere" },
		"another body":   func(r *http.Request) { r.Body = http.NoBody },
	} {
		req := h.signed(agent, "POST", tools, p.record.ID, read)
		change(req)
		if a := h.serve(h.node, req); a.Error == nil || a.Error.Kind != nucleus.KindUnauthenticated && a.Error.Kind != nucleus.KindNotFound {
			t.Errorf("%s: %v", name, a)
		}
	}

	again := func(r *http.Request) *http.Request {
		copied := r.Clone(context.Background())
		copied.RequestURI, copied.Body = r.RequestURI, h.signed(agent, "POST", tools, p.record.ID, read).Body
		return copied
	}
	req := h.signed(agent, "POST", tools, p.record.ID, read)
	replay := again(req)
	h.serve(h.node, req).want(t, "")
	h.serve(h.node, replay).want(t, nucleus.KindUnauthenticated)

	// A key dies with its pod.
	late := h.signed(h.asAgent(other), "GET", "/v1/pods/"+other.record.ID, other.record.ID, nil)
	if err := h.node.DeletePod(h.context(), "operator", other.record.ID); err != nil {
		t.Fatal(err)
	}
	h.serve(h.node, late).want(t, nucleus.KindUnauthenticated)
}

func resend(h *host, method, path string, headers http.Header) *http.Request {
	req, err := http.NewRequest(method, "http://nucleus"+path, http.NoBody)
	if err != nil {
		h.t.Fatal(err)
	}
	req.RequestURI, req.Header = path, headers.Clone()
	return req
}

// What one node has admitted no later one admits, however the first one ended.
func TestReplayAfterRestart(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*host){
		"in order": func(h *host) { h.restart() },
		"killed":   func(h *host) { h.kill(); h.start() },
		"in order, then killed": func(h *host) {
			h.restart()
			eventually(h.t, "a request of after the restart is admitted", func() bool {
				return h.serve(h.node, h.signed(h.asOperator(), "GET", "/v1/pods", "", nil)).Status == http.StatusOK
			})
			h.kill()
			h.start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			req := h.signed(h.asOperator(), "GET", "/v1/pods", "", nil)
			headers := req.Header.Clone()
			h.serve(h.node, req).want(t, "")
			end(h)
			h.serve(h.node, resend(h, "GET", "/v1/pods", headers)).want(t, nucleus.KindUnauthenticated)
			eventually(t, "a new request is admitted", func() bool {
				return h.serve(h.node, h.signed(h.asOperator(), "GET", "/v1/pods", "", nil)).Status == http.StatusOK
			})
		})
	}
}

// A node that waits for the one before it begins when that one has ended: what the
// earlier one admits meanwhile is not admitted again.
func TestReplayAfterOverlap(t *testing.T) {
	h := newHost(t)
	first := h.node
	opened := make(chan *Node, 1)
	go func() {
		n, err := h.open()
		if err != nil {
			t.Error(err)
		}
		opened <- n
	}()
	// The second node has looked at the file when it is at the lock.
	waiting := func() bool {
		links, _ := filepath.Glob("/proc/self/fd/*")
		n := 0
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && to == filepath.Join(h.node.dirs.Run(), "node.lock") {
				n++
			}
		}
		return n == 2
	}
	eventually(t, "the second node waits for the lock", waiting)
	h.clock.pass(2 * time.Second)
	req := h.signed(h.asOperator(), "GET", "/v1/pods", "", nil)
	headers := req.Header.Clone()
	h.serve(first, req).want(t, "")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	h.node = <-opened
	h.serve(h.node, resend(h, "GET", "/v1/pods", headers)).want(t, nucleus.KindUnauthenticated)

	// The second is killed, and the third finds nothing of the first.
	h.clock.pass(2 * time.Second)
	req = h.signed(h.asOperator(), "GET", "/v1/pods", "", nil)
	headers = req.Header.Clone()
	h.serve(h.node, req).want(t, "")
	h.kill()
	h.start()
	h.serve(h.node, resend(h, "GET", "/v1/pods", headers)).want(t, nucleus.KindUnauthenticated)
}

// A spec is read strictly, and what it cannot mean is refused before anything is made.
func TestPodSpec(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	good := specOf("w", policyOf(all))
	asMap := func(change func(map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(document(t, good), &m); err != nil {
			t.Fatal(err)
		}
		change(m)
		return document(t, m)
	}
	for name, body := range map[string][]byte{
		"unknown field":           asMap(func(m map[string]any) { m["network"] = "direct" }),
		"unknown field of a part": asMap(func(m map[string]any) { m["resources"] = map[string]any{"cpus": 1} }),
		"no mode":                 asMap(func(m map[string]any) { delete(m, "mode") }),
		"unknown mode":            asMap(func(m map[string]any) { m["mode"] = "open" }),
		"workspace is a path":     asMap(func(m map[string]any) { m["workspace"] = "../w" }),
		"workspace is hidden":     asMap(func(m map[string]any) { m["workspace"] = ".ssh" }),
		"workspace is long":       asMap(func(m map[string]any) { m["workspace"] = strings.Repeat("w", 65) }),
		"unknown profile":         asMap(func(m map[string]any) { m["policy"] = "everything" }),
		"unknown operation": asMap(func(m map[string]any) {
			m["policy"] = map[string]any{"operations": map[string]any{"execute": "always"}}
		}),
		"unknown driver": asMap(func(m map[string]any) { m["driver"] = "docker" }),
		"not a repository": asMap(func(m map[string]any) {
			m["repos"] = []map[string]any{{"name": "app", "path": h.home, "branch": "x"}}
		}),
		"repository name is a path": asMap(func(m map[string]any) {
			m["repos"] = []map[string]any{{"name": "../app", "path": h.home, "branch": "x"}}
		}),
		"ref that is a path": asMap(func(m map[string]any) { m["ref"] = "../p" }),
		"ref that is an id":  asMap(func(m map[string]any) { m["ref"] = "p-aaaaaaaaaa" }),
		"two values":         append(document(t, good), "{}"...),
		"no JSON":            []byte("mode: mediated"),
		"empty":              nil,
	} {
		for _, route := range []string{"/v1/pods", "/v1/plan"} {
			a := h.serve(h.node, h.signed(h.asOperator(), "POST", route, "", body))
			if a.Error == nil || a.Error.Kind != nucleus.KindInvalid {
				t.Errorf("%s: %s: %v", route, name, a)
			}
		}
	}
	// A tier that no driver here has is never lowered.
	for _, tier := range []nucleus.Tier{nucleus.TierVM, nucleus.TierKernel, nucleus.TierEmulated, "strong"} {
		spec := good
		spec.Require = tier
		for _, driver := range []string{"", "fake"} {
			spec.Driver = driver
			a := h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/pods", "", document(t, spec)))
			if a.Error == nil || a.Error.Kind != nucleus.KindUnavailable && a.Error.Kind != nucleus.KindInvalid {
				t.Errorf("require %s, driver %q: %v", tier, driver, a)
			}
		}
	}
	// A plan says what a pod would be, and begins nothing.
	planned := h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/plan", "", document(t, good)))
	planned.want(t, "", `"state":"planned"`, `"driver":"fake"`, `"network":true`)
	if left, err := os.ReadDir(h.node.dirs.Pods()); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if pods := h.node.podList(); len(pods) > 0 {
		t.Errorf("a plan is listed: %+v", pods)
	}
	for _, e := range h.log() {
		if strings.HasPrefix(e.Kind, "pod.") && e.Kind != nucleus.KindPodRefuse {
			t.Errorf("recorded: %+v", e)
		}
	}
	h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/pods", "", document(t, good))).want(t, "")
	for _, route := range []string{"/v1/pods", "/v1/plan"} {
		h.serve(h.node, h.signed(h.asOperator(), "POST", route, "", document(t, good))).want(t, nucleus.KindConflict, "in use by pod")
	}
}

// Who was cut off before the answer came ends the pod by the name that it gave.
func TestDeleteByRef(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := specOf("", policyOf(all))
	spec.Ref = "r-mine"
	mine, other := h.pod(spec, nil), h.pod(specOf("", policyOf(all)), nil)
	h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/pods", "", document(t, spec))).want(t, nucleus.KindConflict, mine.record.ID)
	h.serve(h.node, h.signed(h.asOperator(), "GET", "/v1/pods/r-mine", "r-mine", nil)).want(t, nucleus.KindNotFound)
	h.serve(h.node, h.signed(h.asOperator(), "DELETE", "/v1/pods/r-other", "r-other", nil)).want(t, nucleus.KindNotFound)
	h.serve(h.node, h.signed(h.asOperator(), "DELETE", "/v1/pods/r-mine", "r-mine", nil)).want(t, "")
	if _, err := h.node.pod(mine.record.ID); err == nil {
		t.Error("it lives")
	}
	if _, err := h.node.pod(other.record.ID); err != nil {
		t.Errorf("another was ended: %v", err)
	}
	if stops := h.entries(nucleus.KindPodStop, ""); len(stops) != 1 || stops[0].Pod != mine.record.ID {
		t.Errorf("recorded: %+v", stops)
	}
}

// A machine that does not come up leaves nothing but a reason.
func TestCreateFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		boot func(*inside, *nucleus.BootReply) bool
		text string
	}{
		"answers nothing":    {func(*inside, *nucleus.BootReply) bool { return false }, "boot frame"},
		"refuses":            {func(_ *inside, r *nucleus.BootReply) bool { r.Error = "no namespaces"; return true }, "no namespaces"},
		"has no key":         {func(_ *inside, r *nucleus.BootReply) bool { r.OutcomeKey = nil; return true }, "outcome key"},
		"has half a key":     {func(_ *inside, r *nucleus.BootReply) bool { r.OutcomeKey = r.OutcomeKey[:16]; return true }, "outcome key"},
		"is of another time": {func(_ *inside, r *nucleus.BootReply) bool { r.Version = "0.0.0"; return true }, "version"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.boot = c.boot
			_, err := h.node.CreatePod(h.context(), "operator", specOf("w", policyOf(all)))
			if err == nil || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v", err)
			}
			h.nothingLeft()
			h.mu.Lock()
			h.boot = nil
			h.mu.Unlock()
			h.pod(specOf("w", policyOf(all)), nil) // the workspace is free again
		})
	}
}

// nothingLeft fails the test where a machine, its directory or an agent's key is left.
func (h *host) nothingLeft() {
	h.t.Helper()
	if left, err := os.ReadDir(h.node.dirs.Pods()); err != nil || len(left) != 0 {
		h.t.Errorf("left of pods: %v, %v", left, err)
	}
	h.node.mu.Lock()
	agents := len(h.node.agents)
	h.node.mu.Unlock()
	if agents != 0 {
		h.t.Errorf("%d keys of agents", agents)
	}
}

// The caller of create goes away while the machine starts.
func TestCreateCancelled(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(h.context())
	h.boot = func(m *inside, _ *nucleus.BootReply) bool {
		cancel()
		return false
	}
	if _, err := h.node.CreatePod(ctx, "operator", specOf("w", policyOf(all))); err == nil {
		t.Fatal("created for nobody")
	}
	h.nothingLeft()
	if got := h.entries(nucleus.KindPodFail, ""); len(got) != 1 {
		t.Errorf("%d failures recorded", len(got))
	}
}

// A machine that dies is noticed, whatever ends first: the wire or the process.
func TestMachineDies(t *testing.T) {
	h := newHost(t)
	for range 10 {
		p := h.pod(specOf("", policyOf(all)), nil)
		h.driver.Kill(filepath.Join(p.dir, "machine"))
		eventually(t, "the pod has failed", func() bool { return p.status().State == stateFailed })
		eventually(t, "its agent's key is gone", func() bool {
			a := h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"})
			return a.Error != nil && a.Error.Kind == nucleus.KindUnauthenticated
		})
	}
	eventually(t, "nothing is left", func() bool {
		left, err := os.ReadDir(h.node.dirs.Pods())
		return err == nil && len(left) == 0
	})
	h.nothingLeft()
}

// slowDriver says when a machine has been made, and waits before it hands it over.
type slowDriver struct {
	*fake.Driver
	made chan string
	goOn chan struct{}
}

func (d *slowDriver) Create(ctx context.Context, spec machine.Spec) (machine.Machine, error) {
	m, err := d.Driver.Create(ctx, spec)
	d.made <- spec.ID
	<-d.goOn
	return m, err
}

// Who looks at a pod while it starts disturbs nothing.
func TestLookWhileStarting(t *testing.T) {
	h := newHost(t)
	created, looked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(looked)
		for {
			select {
			case <-created:
				return
			default:
				h.node.mu.Lock()
				pods := h.node.podList()
				h.node.mu.Unlock()
				for _, p := range pods {
					p.status()
				}
			}
		}
	}()
	person := newPersonRepo(t)
	h.pod(person.spec("w", policyOf(all)), nil)
	close(created)
	<-looked
}

// A pod that is deleted while its machine is being made does not come up.
func TestDeleteWhileStarting(t *testing.T) {
	h := newHost(t)
	slow := &slowDriver{h.driver, make(chan string, 1), make(chan struct{})}
	h.node.config.Drivers = []machine.Driver{slow}
	created := make(chan error, 1)
	go func() {
		_, err := h.node.CreatePod(h.context(), "operator", specOf("w", policyOf(all)))
		created <- err
	}()
	id := <-slow.made
	deleted := make(chan error, 1)
	go func() { deleted <- h.node.DeletePod(h.context(), "operator", id) }()
	eventually(t, "the pod stops", func() bool {
		p, err := h.node.pod(id)
		return err != nil || !p.live()
	})
	close(slow.goOn)
	if err := <-deleted; err != nil {
		t.Errorf("deleting: %v", err)
	}
	if err := <-created; err == nil {
		t.Error("a deleted pod was started")
	}
	h.nothingLeft()
	if p, err := h.node.pod(id); err == nil {
		t.Errorf("the pod is listed: %+v", p.status())
	}
}

var errNo = errors.New("no")
