package node

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"net"
	"slices"
	"strings"
	"testing"

	"cal/egress"
	"cal/guest"
	"cal/guest/tools"
	"cal/nucleus"
	"cal/wire"
)

// fits fails unless a log entry with this in it can be written.
func fits(t *testing.T, e nucleus.Entry) {
	t.Helper()
	raw, err := nucleus.Canonical(e)
	if err != nil || len(raw) > nucleus.MaxEntry {
		t.Fatalf("an entry of %d bytes: %v", len(raw), err)
	}
}

func machineKey() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32)) }

var somePermit = nucleus.Permit{ID: "r-1", Pod: "p-1", Boot: "b-1", Seq: 1<<nucleus.EpochBits | 1, Op: nucleus.ReadFiles}

// Whatever a machine says at the end of a call: what is believed is signed for this permit
// and this result, and what goes into the log fits.
func FuzzResult(f *testing.F) {
	key := machineKey()
	sign := func(o nucleus.Outcome) *nucleus.Signed {
		signed, err := nucleus.Sign(key, nucleus.DomainOutcome, o)
		if err != nil {
			f.Fatal(err)
		}
		return &signed
	}
	value := json.RawMessage(`{"content":"x"}`)
	good := nucleus.Outcome{Permit: "r-1", Pod: "p-1", Boot: "b-1", Seq: somePermit.Seq, Status: nucleus.OutcomeDone, Result: nucleus.SHA256(value)}
	other := good
	other.Permit = "r-2"
	for _, r := range []guest.CallResult{
		{Value: value, Outcome: sign(good)}, {Value: json.RawMessage(`"y"`), Outcome: sign(good)}, {Outcome: sign(other)}, {},
		{Error: nucleus.Errorf("made up", "%s", strings.Repeat("x", 50)), Outcome: sign(good)}, {Action: &nucleus.Action{Op: nucleus.RunBash}},
	} {
		f.Add([]byte(document(f, r)))
	}
	f.Add([]byte(`{"error":{"kind":"\u0000","operation":"x","message":1}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		result, err := readResult(raw)
		if err != nil {
			return
		}
		if e := result.Error; e != nil {
			fits(t, nucleus.Entry{Kind: nucleus.KindOutcome, Data: data(map[string]any{"kind": e.Kind, "message": cut(e.Message, 1000)})})
			if len(e.Message) > 2*maxSaid || e.Ask != "" || len(e.Rule) > 200 {
				t.Fatalf("unbounded: %+v", e)
			}
		}
		outcome, err := checkResult(result, key.Public().(ed25519.PublicKey), somePermit)
		if err != nil {
			return
		}
		fits(t, nucleus.Entry{Kind: nucleus.KindOutcome, Outcome: result.Outcome})
		if outcome.Permit != somePermit.ID || outcome.Seq != somePermit.Seq || outcome.Boot != somePermit.Boot || len(result.Value) > 0 && outcome.Result != somePermit.ResultDigest(result.Value) {
			t.Fatalf("believed: %+v for %s", outcome, result.Value)
		}
	})
}

// A machine may sign any bytes: what is taken for an outcome is one.
func FuzzOutcome(f *testing.F) {
	good := nucleus.Outcome{Permit: "r-1", Pod: "p-1", Boot: "b-1", Seq: somePermit.Seq, Status: nucleus.OutcomeAdmitted}
	f.Add([]byte(document(f, good)))
	f.Add([]byte(`{"permit":"r-1","boot":"b-1","seq":1099511627777,"status":"admitted","extra":1}`))
	f.Add([]byte(`{"permit":"r-1","permit":"r-2"}`))
	f.Add([]byte(`{} {}`))
	key := machineKey()
	f.Fuzz(func(t *testing.T, payload []byte) {
		signed := &nucleus.Signed{Payload: payload, Sig: ed25519.Sign(key, append([]byte(nucleus.DomainOutcome+"\n"), payload...))}
		outcome, err := openOutcome(signed, key.Public().(ed25519.PublicKey), somePermit)
		if err != nil {
			return
		}
		if outcome.Permit != somePermit.ID || outcome.Seq != somePermit.Seq || outcome.Boot != somePermit.Boot {
			t.Fatalf("%+v", outcome)
		}
		// The entry that holds it, and the node's own around it.
		fits(t, nucleus.Entry{Kind: nucleus.KindOutcome, Outcome: signed})
		own, err := nucleus.Sign(key, nucleus.DomainOutcome, nucleus.Outcome{Permit: "r-1", Admission: signed})
		if err != nil {
			t.Fatal(err)
		}
		fits(t, nucleus.Entry{Kind: nucleus.KindOutcome, Outcome: &own})
	})
}

// A machine that answers its boot frame is of this boot and this version, and has a key.
func FuzzBootReply(f *testing.F) {
	good := nucleus.BootReply{Boot: "b-1", OutcomeKey: make([]byte, ed25519.PublicKeySize), Version: nucleus.Version}
	for _, change := range []func(*nucleus.BootReply){
		func(*nucleus.BootReply) {}, func(r *nucleus.BootReply) { r.Boot = "b-2" }, func(r *nucleus.BootReply) { r.OutcomeKey = r.OutcomeKey[:31] },
		func(r *nucleus.BootReply) { r.Version = strings.Repeat("9", 50) }, func(r *nucleus.BootReply) { r.Error = strings.Repeat("no ", 20) },
	} {
		r := good
		change(&r)
		f.Add([]byte(document(f, r)))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var reply nucleus.BootReply
		if json.Unmarshal(raw, &reply) != nil {
			return
		}
		if err := checkBootReply(reply, "b-1"); err != nil {
			if len(err.Error()) > 2*maxSaid {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			fits(t, nucleus.Entry{Kind: nucleus.KindPodFail, Data: data(map[string]any{"reason": err.Error()})})
			return
		}
		if reply.Boot != "b-1" || reply.Version != nucleus.Version || len(reply.OutcomeKey) != ed25519.PublicKeySize || reply.Error != "" {
			t.Fatalf("believed: %+v", reply)
		}
		fits(t, nucleus.Entry{Kind: nucleus.KindPodStart, Data: data(map[string]any{"outcome_key": reply.OutcomeKey, "proxy": reply.Version})})
	})
}

// Whatever frames a machine sends for a bundle: reading them ends, counts each byte once, and
// a result is taken once.
func FuzzBundleFrames(f *testing.F) {
	frame := func(kind wire.Frame, payload string) []byte {
		n := len(payload)
		return append([]byte{byte(kind), byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, payload...)
	}
	result := string(document(f, tools.Result{Value: json.RawMessage(`{"ref":"refs/heads/a","commit":"1","empty":true}`)}))
	f.Add(slices.Concat(frame(wire.FrameData, "# v2 git bundle\n"), frame(wire.FrameData, ""), frame(wire.FrameResult, result)))
	f.Add(slices.Concat(frame(wire.FrameData, ""), frame(wire.FrameResult, result)))
	f.Add(slices.Concat(frame(wire.FrameData, ""), frame(wire.FrameData, "late")))
	f.Add(slices.Concat(frame(wire.FrameResult, `{"error":{"kind":"denied","message":"no"}}`)))
	f.Add(slices.Concat(frame(wire.FrameData, "x"), frame(wire.FrameStdout, "y")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, b := net.Pipe()
		defer a.Close()
		go func() {
			defer b.Close()
			b.Write(raw)
		}()
		var counted int64
		in := &bundleReader{stream: wire.NewStream(a), charge: func(n int64) error { counted += n; return nil }}
		var got bytes.Buffer
		if _, err := got.ReadFrom(in); err == nil {
			err = in.end()
			if err == nil {
				sent, err := in.sent()
				if err == nil && in.result == nil {
					t.Fatalf("a result from nowhere: %+v", sent)
				}
			}
		}
		if int64(got.Len()) > counted || counted > int64(len(raw)) {
			t.Fatalf("read %d bytes, counted %d, sent %d", got.Len(), counted, len(raw))
		}
		if in.result != nil && in.result.Error != nil && len(in.result.Error.Message) > 2*maxSaid {
			t.Fatal("unbounded")
		}
	})
}

// An outcome that would not fit into an entry of the log is none; what came of the permit is
// then unknown, and stands in the log.
func TestOutcomeOfABook(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("", policyOf(all)), map[string]string{"a": "text"})
	h.behaves(func(m *inside, c *callInside) (guest.CallResult, bool) {
		signed, err := nucleus.Sign(m.key, nucleus.DomainOutcome, nucleus.Outcome{Permit: c.permit.ID, Boot: c.permit.Boot, Seq: c.permit.Seq, Message: strings.Repeat("x", 1<<20)})
		if err != nil {
			t.Error(err)
		}
		return guest.CallResult{Outcome: &signed}, true
	})
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, nucleus.KindInternal, "at most")
	h.behaves(func(m *inside, c *callInside) (guest.CallResult, bool) {
		return m.sign(c.permit, guest.CallResult{Error: nucleus.Errorf(nucleus.Kind(strings.Repeat("k", 100_000)), "%s", strings.Repeat("m", 1<<20))}, nucleus.OutcomeFailed), true
	})
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, nucleus.KindInternal)
	outcomes := h.entries(nucleus.KindOutcome, nucleus.ReadFiles)
	if len(outcomes) != 2 || outcomes[0].Status != nucleus.OutcomeUnknown || outcomes[1].Status != nucleus.OutcomeFailed || len(h.node.log.OpenIntents()) != 0 {
		t.Errorf("outcomes %+v, open %+v", outcomes, h.node.log.OpenIntents())
	}
}

// The gateway may make the one request that a fetch was decided for, and no other under
// that name: not even to the same place.
func TestFetchIsForOneRequest(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.pod(specOf("", json.RawMessage(`{"operations":{"web_fetch":"always"},"hosts":{"only":[{"host":"example.org","port":443,"methods":["GET"],"path":"/open"}]}}`)), nil)
	ctx := withFetch(t.Context(), "https://example.org/open", "")
	for url, want := range map[string]nucleus.Verdict{
		"https://example.org/open": nucleus.Allow, "https://example.org/other": nucleus.Deny, "https://elsewhere.example/open": nucleus.Deny, "": nucleus.Deny,
	} {
		a := egress.Attempt{ID: nucleus.NewID("e-"), Pod: p.record.ID, Session: p.record.Session, Via: egress.ViaFetch, Method: "GET", URL: url, Host: "example.org", Port: 443, Path: "/other"}
		if strings.Contains(url, "elsewhere") {
			a.Host, a.Path = "elsewhere.example", "/open"
		}
		ruling, err := (*gate)(h.node).Decide(ctx, a)
		if err != nil || ruling.Verdict != want {
			t.Errorf("%q: %+v, %v; want %s", url, ruling, err, want)
		}
	}
}
