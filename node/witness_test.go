package node

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/audit"
	"cal/audit/witness"
	"cal/internal/durable"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// witnessed is a witness with a memory that a test can look into.
type witnessed struct {
	*witness.Witness
	mu   sync.Mutex
	key  string
	kept []byte
	off  bool
}

func newWitnessed() *witnessed {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	w := &witnessed{}
	w.Witness = &witness.Witness{Name: "witness.test", Key: key, Store: w}
	return w
}

func (w *witnessed) trust(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.key != key { // a log begun anew, as memoryLog does
		w.key, w.kept = key, nil
	}
}

func (w *witnessed) Log(string) (string, []byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.key, w.kept, nil
}

func (w *witnessed) Keep(_ string, signed []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kept = signed
	return nil
}

func (w *witnessed) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kept = nil
}

// size is that of the checkpoint that is kept.
func (w *witnessed) size(t *testing.T) int64 {
	t.Helper()
	key, kept, _ := w.Log("")
	cp, err := audit.ParseCheckpoint(kept, key)
	if err != nil {
		t.Fatal(err)
	}
	return cp.Size
}

// serve is a witness on loopback that can be switched off.
func (w *witnessed) serve(t *testing.T) Witness {
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		off := w.off
		w.mu.Unlock()
		if off {
			http.Error(rw, "off", http.StatusServiceUnavailable)
			return
		}
		w.ServeHTTP(rw, r)
	}))
	t.Cleanup(server.Close)
	return Witness{URL: server.URL, Key: w.PublicKey()}
}

func (w *witnessed) switchOff(off bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.off = off
}

// knowLog makes the log's key before the node does, so that a witness can know it.
func (h *host) knowLog(w *witnessed) {
	h.t.Helper()
	keys := Dirs{h.home}.Keys()
	if err := durable.MkdirAll(keys, 0o700); err != nil {
		h.t.Fatal(err)
	}
	key, err := keyfile.LoadOrMake(filepath.Join(keys, "log.key"))
	if err != nil {
		h.t.Fatal(err)
	}
	w.trust(audit.VerifierKey(nucleus.LogOrigin, key.Public().(ed25519.PublicKey)))
}

// Before the authority is asked it has cosigned the log with the ask in it. A log that
// is not the one it knows gets no ask to anybody.
func TestAskIsWitnessed(t *testing.T) {
	h := newHost(t, withAuthority)
	p := h.pod(specOf("", writeAsks), nil)
	w := h.authority.witness
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval)
	asked := h.entries(nucleus.KindApprovalAsk, nucleus.WriteFiles)
	if len(asked) != 1 || w.size(t) <= asked[0].Seq {
		t.Errorf("the authority has cosigned %d entries, the ask is entry %d", w.size(t), asked[0].Seq)
	}
	// The same log is kept in the directory, cosigned.
	if err := h.node.witness.round(t.Context(), witnessAuthority); err != nil {
		t.Fatal(err)
	}
	r, err := audit.Verify(h.node.dirs.Log(), audit.VerifyOptions{Key: w.key, Witnesses: []string{w.PublicKey()}})
	if err != nil || !r.OK() || r.Cosigned <= asked[0].Seq {
		t.Errorf("%+v, %v", r, err)
	}

	// What was last is known when the node has ended.
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "none"})
	size := h.node.log.Size()
	if err := h.node.Close(); err != nil {
		t.Fatal(err)
	}
	if w.size(t) != size {
		t.Errorf("the authority has cosigned %d entries of %d", w.size(t), size)
	}
	h.node = nil
	h.start()
	p = h.node.pods[p.record.ID]

	// The authority has seen more of this log than there is.
	w.Store = forged{w, h.forgedCheckpoint(100)}
	before := len(h.authority.asked())
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindUnavailable, "does not vouch for the log", "has cosigned 100 entries")
	if len(h.authority.asked()) != before {
		t.Error("it was asked all the same")
	}
	w.Store = w
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval)
}

// A log that was put back to an older state, or begun anew, while the node was down is one
// that the authority knows more of: no effect and no machine begins, and what is wrong is said.
// What was done on purpose goes on once the authority forgets the old one.
func TestLogPutBack(t *testing.T) {
	h := newHost(t, withAuthority)
	p := h.pod(specOf("v", policyOf(all)), map[string]string{"a": "text"})
	read := func() answer { return h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"}) }
	older := t.TempDir()
	if err := h.node.log.Publish(); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(older, "log"), os.DirFS(h.node.dirs.Log())); err != nil {
		t.Fatal(err)
	}
	read().want(t, "")
	log := h.node.dirs.Log()
	if err := h.node.Close(); err != nil { // the last checkpoint is cosigned
		t.Fatal(err)
	}
	if err := errors.Join(os.RemoveAll(log), os.CopyFS(log, os.DirFS(filepath.Join(older, "log")))); err != nil {
		t.Fatal(err)
	}
	h.node = nil
	h.start()
	p = h.node.pods[p.record.ID]
	before := len(h.entries(nucleus.KindIntent, ""))
	read().want(t, nucleus.KindUnavailable, "nothing was done", "the authority knows another history", "witness --forget")
	if len(h.entries(nucleus.KindIntent, "")) != before {
		t.Error("the intent was recorded")
	}
	if _, err := h.node.CreatePod(h.context(), "operator", specOf("w", policyOf(all))); err == nil || !strings.Contains(err.Error(), "another history") {
		t.Errorf("a machine was started: %v", err)
	}
	h.authority.witness.forget()
	if err := h.node.witness.round(t.Context(), witnessAuthority); err != nil {
		t.Fatal(err)
	}
	read().want(t, "")
	h.pod(specOf("w", policyOf(all)), nil)
}

func (h *host) logKey() ed25519.PrivateKey {
	h.t.Helper()
	key, err := keyfile.Load(filepath.Join(h.node.dirs.Keys(), "log.key"))
	if err != nil {
		h.t.Fatal(err)
	}
	return key
}

// Without a witness that is required no effect begins: not at the start, not when it
// has been away for too long, and at once when it contradicts. It comes back, and so
// do the effects. What runs gets its outcome meanwhile.
func TestRequiredWitness(t *testing.T) {
	w := newWitnessed()
	w.switchOff(true)
	h := newHost(t, func(h *host) {
		h.witnesses = []Witness{w.serve(t)}
		h.knowLog(w)
	})
	h.node.stopKeeping() // the test says when the log is shown
	h.node.serving.Wait()
	p := h.pod(specOf("", policyOf(all)), nil)
	write := func(name string) answer { return h.tool(p, nucleus.WriteFiles, writeArgs(name)) }
	refused := func(name, why string) {
		t.Helper()
		write(name).want(t, nucleus.KindUnavailable, "nothing was done", "a witness that is required", why)
		if written(p, name) {
			t.Errorf("%s was written", name)
		}
	}
	round := func() {
		t.Helper()
		if err := h.node.witness.round(t.Context(), witnessAuthority); err != nil {
			t.Fatal(err)
		}
	}
	refused("first", "503")
	w.switchOff(false)
	round()
	write("second").want(t, "")
	if !written(p, "second") {
		t.Error("nothing was written")
	}
	round()
	r, err := audit.Verify(h.node.dirs.Log(), audit.VerifyOptions{Key: w.key, Witnesses: []string{w.PublicKey()}})
	if err != nil || !r.OK() || r.Cosigned != w.size(t) {
		t.Errorf("%+v, %v", r, err)
	}

	// It goes, and effects go on for a while.
	w.switchOff(true)
	now := time.Now()
	h.node.witness.now = func() time.Time { return now }
	round()
	write("third").want(t, "")
	now = now.Add(witnessPatience + time.Second)
	refused("fourth", "503")
	w.switchOff(false)
	round()
	write("fifth").want(t, "")

	// It has seen another log: no patience.
	w.Store = forged{w, h.forgedCheckpoint(500)}
	round()
	refused("sixth", "500 entries")
	w.Store = w
	round()
	write("seventh").want(t, "")
}

// forged is a store with another checkpoint.
type forged struct {
	*witnessed
	signed []byte
}

func (f forged) Log(string) (string, []byte, error) { return f.key, f.signed, nil }

// forgedCheckpoint is of another log of n entries, signed by the log's key.
func (h *host) forgedCheckpoint(n int) []byte {
	h.t.Helper()
	l, err := audit.Open(filepath.Join(h.t.TempDir(), "log"), audit.Options{Origin: nucleus.LogOrigin, Key: h.logKey()})
	if err != nil {
		h.t.Fatal(err)
	}
	defer l.Close()
	for range n {
		if _, err := l.Append(nucleus.Entry{Kind: "log.x"}); err != nil {
			h.t.Fatal(err)
		}
	}
	return l.Checkpoint()
}

func TestWitnessConfig(t *testing.T) {
	good := newWitnessed().PublicKey()
	for name, c := range map[string]struct {
		w    Witness
		want string
	}{
		"no key":               {Witness{"http://w", ""}, "witness key"},
		"a log's key":          {Witness{"http://w", "w+11223344+AUy1q/atefv1q7zK/MJp2FzSZR7UuIW1hp8kGu3wpbop"}, "type 4"},
		"a wrong hash":         {Witness{"http://w", strings.Replace(good, "+", "+0", 1)}, "NAME+ID+KEY"},
		"no URL":               {Witness{"", good}, "http or https"},
		"another kind of URL":  {Witness{"ftp://w", good}, "http or https"},
		"a path without a URL": {Witness{"/w", good}, "http or https"},
	} {
		if _, err := newWitnesses(nil, make(ed25519.PublicKey, 32), nil, []Witness{c.w}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := newWitnesses(nil, make(ed25519.PublicKey, 32), nil, []Witness{{"http://w", good}}); err != nil {
		t.Error(err)
	}
}
