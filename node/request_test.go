package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"cal/audit"
	"cal/guest"
	"cal/nucleus"
	"cal/wire"
)

const all = "read_files write_files edit_files glob_search grep_search run_bash git_commit"

func written(p *Pod, name string) bool {
	_, err := os.Stat(filepath.Join(p.record.Workspace, "files", name))
	return err == nil
}

// No action without a record: whichever append of a request fails, what must
// follow it does not happen, and the caller is told that the log is the reason.
func TestNoActionWithoutRecord(t *testing.T) {
	h := newHost(t)
	disk := h.memoryLog()
	p := h.pod(specOf("", policyOf(all)), nil)
	write := func(name string) answer {
		return h.tool(p, nucleus.WriteFiles, map[string]string{"path": name, "content": "x"})
	}
	write("control").want(t, "")
	if !written(p, "control") {
		t.Fatal("control: nothing was written")
	}
	before := len(h.inside(p).permits())
	for _, where := range []string{"append", "sync"} {
		disk.failing(func(what string) error {
			if what == where {
				return errors.New("disk full")
			}
			return nil
		})
		write("no-"+where).want(t, nucleus.KindUnavailable, "log")
		// A refusal that cannot be recorded says so too.
		h.tool(p, nucleus.GitPush, map[string]string{"branch": "x"}).want(t, nucleus.KindUnavailable, "log")
		if written(p, "no-"+where) || len(h.inside(p).permits()) != before {
			t.Errorf("%s failed: the machine was reached", where)
		}
		disk.failing(nil)
		write("again-"+where).want(t, "")
		before = len(h.inside(p).permits())
	}
}

// The outcome's append fails: the effect is there, the intent is open, and the caller
// knows that nobody recorded what came of it.
func TestOutcomeNotRecorded(t *testing.T) {
	h := newHost(t)
	disk := h.memoryLog()
	p := h.pod(specOf("", policyOf(all)), nil)
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		disk.failing(func(string) error { return errors.New("disk full") })
		return c.honest(), true
	}
	h.tool(p, nucleus.WriteFiles, map[string]string{"path": "a", "content": "x"}).want(t, nucleus.KindUnavailable, "was done", "could not be recorded")
	if !written(p, "a") {
		t.Error("nothing was written")
	}
	disk.failing(nil)
	if err := h.node.log.Reopen(); err != nil {
		t.Fatal(err)
	}
	open := h.node.log.OpenIntents()
	if len(open) != 1 || open[0].Op != nucleus.WriteFiles {
		t.Errorf("open intents: %+v", open)
	}
}

// An intent whose sync failed is on the disk all the same, and an outcome that could not be
// written is owed: when the log can be written again, each intent that is in it gets its
// outcome, and one that is not gets none. Nobody has to start the node anew.
func TestOutcomesAreOwed(t *testing.T) {
	h := newHost(t)
	disk := h.memoryLog()
	p := h.pod(specOf("", policyOf(all)), nil)
	write := func(name string) answer {
		return h.tool(p, nucleus.WriteFiles, map[string]string{"path": name, "content": "x"})
	}
	failing := func(at string) func(string) error {
		return func(what string) error {
			if what == at {
				return errors.New("disk full")
			}
			return nil
		}
	}
	disk.failing(failing("append"))
	write("not there").want(t, nucleus.KindUnavailable, "nothing was done")
	disk.failing(failing("sync"))
	write("persisted").want(t, nucleus.KindUnavailable, "nothing was done")
	disk.failing(nil)
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		disk.failing(func(string) error { return errors.New("disk full") })
		return c.honest(), true
	}
	write("done").want(t, nucleus.KindUnavailable, "was done", "could not be recorded")
	h.behave = nil
	disk.failing(nil)
	write("control").want(t, "") // takes the log up again
	if open := h.node.log.OpenIntents(); len(open) != 0 {
		t.Errorf("open: %+v", open)
	}
	got := []string{}
	for e, err := range audit.Read(disk.dump(t), 0) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == nucleus.KindIntent || e.Kind == nucleus.KindOutcome {
			got = append(got, e.Kind+" "+e.Status)
		}
	}
	want := "request.intent |request.outcome refused|request.intent |request.outcome done|request.intent |request.outcome done"
	if s := strings.Join(got, "|"); s != want {
		t.Errorf("got %s\nwant %s", s, want)
	}
}

// An outcome whose sync failed and that is on the disk all the same is there once.
func TestOutcomeThatPersisted(t *testing.T) {
	h := newHost(t)
	disk := h.memoryLog()
	p := h.pod(specOf("", policyOf(all)), nil)
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		failed := false
		disk.failing(func(what string) error {
			if what == "sync" && !failed {
				failed = true
				return errors.New("disk full")
			}
			return nil
		})
		return c.honest(), true
	}
	h.tool(p, nucleus.WriteFiles, map[string]string{"path": "a", "content": "x"}).want(t, "")
	outcomes := 0
	for e, err := range audit.Read(disk.dump(t), 0) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == nucleus.KindOutcome {
			outcomes++
		}
	}
	if open := h.node.log.OpenIntents(); outcomes != 1 || len(open) != 0 {
		t.Errorf("%d outcomes, open %+v", outcomes, open)
	}
}

// When the machine sees a permit, its intent is on the disk; the outcome is the
// machine's own signature.
func TestOrderAndOutcome(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), nil)
	durable := make(chan []nucleus.Entry, 1)
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		durable <- h.node.log.OpenIntents()
		return c.honest(), true
	}
	h.tool(p, nucleus.WriteFiles, map[string]string{"path": "a", "content": "x"}).want(t, "")
	open := <-durable
	permit := h.inside(p).permits()[0]
	if len(open) != 1 || open[0].Permit != permit.ID || open[0].Digest != permit.Digest {
		t.Errorf("open when the machine acted: %+v, permit %+v", open, permit)
	}
	outcomes := h.entries(nucleus.KindOutcome, nucleus.WriteFiles)
	if len(outcomes) != 1 || outcomes[0].Outcome == nil {
		t.Fatalf("outcomes: %+v", outcomes)
	}
	var outcome nucleus.Outcome
	if err := outcomes[0].Outcome.Open(p.record.OutcomeKey, nucleus.DomainOutcome, &outcome); err != nil {
		t.Fatal(err)
	}
	if outcome.Permit != permit.ID || outcome.Seq != permit.Seq || outcome.Status != nucleus.OutcomeDone || outcomes[0].Status != nucleus.OutcomeDone {
		t.Errorf("outcome %+v of permit %+v, entry %+v", outcome, permit, outcomes[0])
	}
	if outcomes[0].Digest != permit.Digest {
		t.Errorf("outcome's digest %s, intent's %s", outcomes[0].Digest, permit.Digest)
	}
}

// A machine that lies, or says nothing, gives a clear error and the outcome unknown.
func TestHostileMachine(t *testing.T) {
	type hostile struct {
		behave func(*inside, *callInside) (guest.CallResult, bool)
		kind   nucleus.Kind
		text   string
	}
	// What can be said in either form of a call, a frame or a stream, is said in both.
	lies := map[string]hostile{
		"honest": {nil, "", ""},
		"signs nothing": {func(_ *inside, c *callInside) (guest.CallResult, bool) {
			r := c.honest()
			r.Outcome = nil
			return r, true
		}, nucleus.KindInternal, "signed no outcome"},
		"signs for another permit": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			other := c.permit
			other.ID = "r-other"
			return m.sign(other, c.honest(), nucleus.OutcomeDone), true
		}, nucleus.KindInternal, "another permit"},
		"signs for another sequence": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			other := c.permit
			other.Seq++
			return m.sign(other, c.honest(), nucleus.OutcomeDone), true
		}, nucleus.KindInternal, "another permit"},
		"signs another result": {func(_ *inside, c *callInside) (guest.CallResult, bool) {
			r := c.honest()
			r.Value = json.RawMessage(`{"content":"made up"}`)
			return r, true
		}, nucleus.KindInternal, "another result"},
		"signs with another key": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			r := c.honest()
			signed, _ := nucleus.Sign(h2key(m), nucleus.DomainOutcome, nucleus.Outcome{Permit: c.permit.ID, Boot: c.permit.Boot, Seq: c.permit.Seq})
			r.Outcome = &signed
			return r, true
		}, nucleus.KindInternal, "bad signature"},
		"signs in another domain": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			r := c.honest()
			signed, _ := nucleus.Sign(m.key, nucleus.DomainAttach, nucleus.Outcome{Permit: c.permit.ID, Boot: c.permit.Boot, Seq: c.permit.Seq})
			r.Outcome = &signed
			return r, true
		}, nucleus.KindInternal, "bad signature"},
		"signs what is no JSON": {func(m *inside, c *callInside) (guest.CallResult, bool) {
			if c.stream != nil { // where a value that is none cannot be said
				c.stream.Send(wire.FrameResult, []byte(`{"value":{"content":}`))
				return guest.CallResult{}, false
			}
			return m.sign(c.permit, guest.CallResult{Value: []byte(`{"content":`)}, nucleus.OutcomeDone), true
		}, nucleus.KindInternal, ""},
		"the machine dies": {func(m *inside, _ *callInside) (guest.CallResult, bool) {
			m.mu.Lock()
			defer m.mu.Unlock()
			go m.session.Close() // which waits for this call
			return guest.CallResult{}, false
		}, nucleus.KindUnavailable, "wire"},
	}
	inFrame := func(raw string) func(*inside, *callInside) (guest.CallResult, bool) {
		return func(_ *inside, c *callInside) (guest.CallResult, bool) {
			c.raw = []byte(raw)
			return guest.CallResult{}, true
		}
	}
	inFrames := map[string]hostile{
		"garbage":               {inFrame("\x00\x00\x00\x0a\x00{not json"), nucleus.KindInternal, "invalid character"},
		"raw bytes":             {inFrame(strings.Repeat("\xff", 64)), nucleus.KindInternal, "part 1 of 2"},
		"nothing":               {inFrame(string([]byte{})), nucleus.KindInternal, "part 1 of 2"},
		"a header beyond it":    {inFrame("\x00\x00\x00\x03{}"), nucleus.KindInternal, "part 1 of 2"},
		"an empty header":       {inFrame("\x00\x00\x00\x02{}"), nucleus.KindInternal, "signed no outcome"},
		"a header with a value": {inFrame("\x00\x00\x00\x0b{\"value\":1}"), nucleus.KindInternal, "signed no outcome"},
	}
	onStream := func(do func(s *wire.Stream)) func(*inside, *callInside) (guest.CallResult, bool) {
		return func(_ *inside, c *callInside) (guest.CallResult, bool) {
			do(c.stream)
			return guest.CallResult{}, false
		}
	}
	onStreams := map[string]hostile{
		"garbage":        {onStream(func(s *wire.Stream) { s.Send(wire.FrameResult, []byte("\x00{not json")) }), nucleus.KindInternal, ""},
		"raw bytes":      {onStream(func(s *wire.Stream) { s.Write(bytes.Repeat([]byte{0xff}, 64)) }), nucleus.KindUnavailable, "wire"},
		"announces 1 GB": {onStream(func(s *wire.Stream) { s.Write([]byte{byte(wire.FrameResult), 0x40, 0, 0, 0}) }), nucleus.KindUnavailable, "1073741824 bytes"},
		"hangs up":       {onStream(func(*wire.Stream) {}), nucleus.KindUnavailable, "wire"},
	}
	try := func(name string, op nucleus.Op, args any, c hostile) {
		t.Run(string(op)+" "+name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			p := h.pod(specOf("", policyOf(all)), map[string]string{"a": "text\n"})
			h.mu.Lock()
			h.behave = c.behave
			h.mu.Unlock()
			h.tool(p, op, args).want(t, c.kind, c.text)
			want := nucleus.OutcomeUnknown
			if c.kind == "" {
				want = nucleus.OutcomeDone
			}
			outcomes := h.entries(nucleus.KindOutcome, op)
			if len(outcomes) != 1 || outcomes[0].Status != want {
				t.Errorf("outcomes %+v, want one %s", outcomes, want)
			}
			if len(h.node.log.OpenIntents()) != 0 {
				t.Errorf("intents left open: %+v", h.node.log.OpenIntents())
			}
		})
	}
	read, run := map[string]string{"path": "a"}, map[string]any{"argv": []string{"true"}}
	for name, c := range lies {
		try(name, nucleus.ReadFiles, read, c)
		try(name, nucleus.RunBash, run, c)
	}
	for name, c := range inFrames {
		try(name, nucleus.ReadFiles, read, c)
	}
	for name, c := range onStreams {
		try(name, nucleus.RunBash, run, c)
	}
}

// h2key is a good key that is not the machine's: the operator's.
func h2key(m *inside) []byte { return m.host.operator }

// A machine that never answers holds its caller and nobody else; the caller's
// going away ends it.
func TestMachineHangs(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), map[string]string{"a": "text\n"})
	reached, ended := make(chan struct{}, 1), make(chan struct{}, 1)
	var once atomic.Bool
	h.mu.Lock()
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		if !once.CompareAndSwap(false, true) {
			return c.honest(), true
		}
		reached <- struct{}{}
		<-c.ctx.Done() // until the node takes it back
		ended <- struct{}{}
		return guest.CallResult{}, false
	}
	h.mu.Unlock()
	ctx, cancel := context.WithCancel(h.context())
	got := make(chan answer, 1)
	go func() { got <- h.toolContext(ctx, p, nucleus.ReadFiles, map[string]string{"path": "a"}) }()
	<-reached
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	cancel()
	(<-got).want(t, nucleus.KindTimeout)
	<-ended
}

// A denial is recorded, names its rule, reaches nothing and exposes nothing.
func TestDenied(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("", policyOf("write_files")), map[string]string{"a": "secret"})
	e := h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, nucleus.KindDenied)
	if e.Rule != "operations.read_files" || e.Operation != nucleus.ReadFiles {
		t.Errorf("got %+v", e)
	}
	if legs := p.root.legs(); legs != 0 {
		t.Errorf("a denied operation took %v", legs.Names())
	}
	if got := len(h.inside(p).permits()); got != 0 {
		t.Errorf("%d permits reached the machine", got)
	}
	intents := h.entries(nucleus.KindIntent, nucleus.ReadFiles)
	if len(intents) != 1 || intents[0].Verdict != nucleus.Deny || intents[0].Status != nucleus.OutcomeRefused || intents[0].Rule != "operations.read_files" {
		t.Errorf("intents %+v", intents)
	}
	h.tool(p, nucleus.WriteFiles, map[string]string{"path": "b", "content": "x"}).want(t, "")
}

// A request that was refused waits for no outcome: a later node has nothing to
// close for it.
func TestRefusedIsNotOpen(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("", policyOf("write_files")), map[string]string{"a": "secret"})
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, nucleus.KindDenied)
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "../.."}).want(t, nucleus.KindInvalid)
	if open := h.node.log.OpenIntents(); len(open) != 0 {
		t.Errorf("open: %+v", open)
	}
	h.kill()
	h.start()
	if got := h.entries(nucleus.KindOutcome, nucleus.ReadFiles); len(got) != 0 {
		t.Errorf("a refused request got an outcome: %+v", got)
	}
}

// The exposure is on the disk before the effect, is carried to the next session
// of the workspace, and to no other.
func TestExposureIsDurable(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(all)), map[string]string{"a": "secret"})
	stored := make(chan nucleus.Legs, 1)
	h.mu.Lock()
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		s, err := openSession("s-1", p.record.Workspace, p.dir)
		if err == nil {
			stored <- s.exposure
		} else {
			stored <- 0
		}
		return guest.CallResult{}, false // the machine dies with it, so to say
	}
	h.mu.Unlock()
	h.tool(p, nucleus.RunBash, map[string]any{"argv": []string{"cat", "a"}}).want(t, nucleus.KindUnavailable)
	if legs := <-stored; legs != nucleus.Private {
		t.Errorf("on the disk when the machine acted: %v", legs.Names())
	}
	h.kill()
	h.start()
	if adopted, err := h.node.pod(p.record.ID); err != nil || adopted.root.legs() != nucleus.Private {
		t.Errorf("after a kill: %v, %v", adopted.root.legs().Names(), err)
	}
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	if next := h.pod(specOf("w", policyOf(all)), nil); next.root.legs() != nucleus.Private {
		t.Errorf("the next session starts with %v", next.root.legs().Names())
	}
	if other := h.pod(specOf("other", policyOf(all)), nil); other.root.legs() != 0 {
		t.Errorf("another workspace starts with %v", other.root.legs().Names())
	}
}

// An exposure that cannot be stored stops the effect.
func TestExposureNotStored(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(all)), map[string]string{"a": "secret"})
	if err := os.Mkdir(p.root.file, 0o700); err != nil {
		t.Fatal(err)
	}
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, nucleus.KindUnavailable, "nothing was done")
	if got := len(h.inside(p).permits()); got != 0 || p.root.legs() != 0 {
		t.Errorf("%d permits, exposure %v", got, p.root.legs().Names())
	}
	h.tool(p, nucleus.WriteFiles, map[string]string{"path": "b", "content": "x"}).want(t, "")
}

// Many requests of one session at once: the exposure in the order of the log only
// grows, sequences never meet, and each intent has its outcome.
func TestConcurrentRequests(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("w", policyOf(all)), map[string]string{"a": "secret"})
	var calls sync.WaitGroup
	for i := range 24 {
		calls.Go(func() {
			var a answer
			switch i % 3 {
			case 0:
				a = h.tool(p, nucleus.WriteFiles, map[string]string{"path": "f" + string(rune('a'+i)), "content": "x"})
			case 1:
				a = h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"})
			default:
				a = h.tool(p, nucleus.WebFetch, map[string]string{"url": "http://example.org/"})
				if a.Error == nil || a.Error.Kind != nucleus.KindDenied {
					t.Errorf("web_fetch: %v", a)
				}
				return
			}
			if a.Status != http.StatusOK {
				t.Errorf("%v", a)
			}
		})
	}
	calls.Wait()
	var before nucleus.Legs
	for _, e := range h.entries(nucleus.KindIntent, "") {
		legs, err := nucleus.LegsOf(e.Exposure)
		if err != nil || !legs.Has(before) {
			t.Errorf("entry %d: exposure %v after %v (%v)", e.Seq, e.Exposure, before.Names(), err)
		}
		before |= legs
	}
	seqs := map[uint64]bool{}
	for _, permit := range h.inside(p).permits() {
		if seqs[permit.Seq] {
			t.Errorf("sequence %d twice", permit.Seq)
		}
		seqs[permit.Seq] = true
	}
	if got := len(h.entries(nucleus.KindOutcome, "")); got != 16 || len(seqs) != 16 {
		t.Errorf("%d outcomes, %d permits, want 16", got, len(seqs))
	}
}

// What cannot be resolved is refused, recorded and reaches nothing.
func TestUnresolved(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), nil)
	for _, body := range []string{`{"path":"../../etc/shadow"}`, `{"path":"a","path":"b"}`, `{"nonsense":1}`, `[]`} {
		req := h.signed(h.asAgent(p), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/read_files", p.record.ID, []byte(body))
		a := h.serve(h.node, req)
		if a.Error == nil || a.Error.Kind != nucleus.KindInvalid && a.Error.Kind != nucleus.KindDenied {
			t.Errorf("%q: %v", body, a)
		}
	}
	if got := len(h.inside(p).permits()); got != 0 {
		t.Errorf("%d permits", got)
	}
	for _, e := range h.entries(nucleus.KindIntent, nucleus.ReadFiles) {
		if e.Verdict != nucleus.Deny || e.Status != nucleus.OutcomeRefused {
			t.Errorf("entry %+v", e)
		}
	}
	for _, op := range []string{"execute", "READ_FILES", "read_files%20", "..%2fagent"} {
		req := h.signed(h.asAgent(p), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/"+op, p.record.ID, []byte(`{}`))
		if a := h.serve(h.node, req); a.Error == nil || a.Error.Kind != nucleus.KindInvalid || !strings.Contains(a.Body, "unknown operation") {
			t.Errorf("operation %q: %v", op, a)
		}
	}
}

// Arguments that are no JSON are refused and recorded like others.
func TestArgumentsAreNoJSON(t *testing.T) {
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), nil)
	bodies := []string{``, `{`, `{"path":`, "{\"path\":\"\xff\"}", "\x00", `{"path":"a"} {}`}
	for _, body := range bodies {
		req := h.signed(h.asAgent(p), http.MethodPost, "/v1/pods/"+p.record.ID+"/tools/read_files", p.record.ID, []byte(body))
		if a := h.serve(h.node, req); a.Error == nil || a.Error.Kind != nucleus.KindInvalid {
			t.Errorf("%q: %v", body, a)
		}
	}
	if got := len(h.entries(nucleus.KindIntent, nucleus.ReadFiles)); got != len(bodies) {
		t.Errorf("%d refusals recorded, want %d", got, len(bodies))
	}
}
