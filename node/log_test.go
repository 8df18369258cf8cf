package node

import (
	"cmp"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/audit"
	"cal/guest"
	"cal/internal/keyfile"
	"cal/nucleus"
)

func (h *host) verifierKey() string {
	key, err := keyfile.Load(filepath.Join(h.node.dirs.Keys(), "log.key"))
	if err != nil {
		h.t.Fatal(err)
	}
	return audit.VerifierKey(nucleus.LogOrigin, key.Public().(ed25519.PublicKey))
}

// receipt is the receipt of a pod's session, as a stranger verifies it.
func (h *host) receipt(session string) *audit.Receipt {
	h.t.Helper()
	raw, err := audit.NewReceipt(h.node.dirs.Log(), audit.ReceiptOptions{Key: h.verifierKey(), Session: session})
	if err != nil {
		h.t.Fatal(err)
	}
	v, err := audit.VerifyReceipt(raw, audit.VerifyReceiptOptions{Key: h.verifierKey()})
	if err != nil {
		h.t.Fatal(err)
	}
	return v
}

// salt is what the host keeps for an entry.
func (h *host) salt(e nucleus.Entry) (nucleus.Salt, []string) {
	h.t.Helper()
	salt, left, err := audit.FindSalt(filepath.Join(h.node.dirs.Keys(), "salts"), cmp.Or(e.Permit, e.Digest))
	if err != nil {
		h.t.Errorf("entry %d, %s %s %s: %v", e.Seq, e.Kind, e.Op, e.Verdict, err)
	}
	return salt, left
}

// reveal shows that the digest of an entry is that of the action it shows.
func (h *host) reveal(e nucleus.Entry) {
	h.t.Helper()
	salt, left := h.salt(e)
	whole, err := audit.Whole(e.Args, left)
	if err != nil || nucleus.ActionDigest(whole, salt) != e.Digest {
		h.t.Errorf("entry %d, %s %s %s: its digest is not that of %s with %v: %v", e.Seq, e.Kind, e.Op, e.Verdict, e.Args, left, err)
	}
}

// results counts the outcomes of which the host can show that they are of result.
func (h *host) results(v *audit.Receipt, result string) (n int) {
	h.t.Helper()
	for _, raw := range v.Entries {
		e, err := audit.ParseEntry(raw)
		if err != nil {
			h.t.Fatal(err)
		}
		var outcome nucleus.Outcome
		if e.Outcome == nil || json.Unmarshal(e.Outcome.Payload, &outcome) != nil {
			continue
		}
		salt, _ := h.salt(e)
		if outcome.Result == (nucleus.Permit{Salt: salt[:]}).ResultDigest([]byte(result)) {
			n++
		}
	}
	return n
}

// A connection that was let through, or refused, or asked for, can be revealed as every
// request can.
func TestConnectionIsRevealed(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	site, other := newWeb(t, "127.0.0.1"), newWeb(t, "127.0.0.1")
	h.get(h.pod(specOf("", connects(ordinary, site)), nil), site).want(t, "")
	h.get(h.pod(specOf("", connects(ordinary, site)), nil), other).want(t, nucleus.KindDenied)
	p := h.private("", connects(ordinary, site))
	ask := h.asks(h.get(p, site))
	h.authority.grant(ask.Ask, nil)
	h.get(p, site).want(t, "")
	verdicts := map[string]int{}
	for _, kind := range []string{nucleus.KindIntent, nucleus.KindApprovalAsk} {
		for _, e := range h.entries(kind, nucleus.NetConnect) {
			h.reveal(e)
			verdicts[fmt.Sprint(e.Kind, " ", e.Verdict, " ", e.Status)]++
		}
	}
	for _, want := range []string{"request.intent allow ", "request.intent deny refused", "request.intent ask refused", "request.intent ask ", "approval.ask ask "} {
		if verdicts[want] == 0 {
			t.Errorf("no entry %q among %v", want, verdicts)
		}
	}
}

// A session's receipt says that none of its entries is left out, from the first to the
// last: with calls that were permitted, refused and asked for, a node that ended in order,
// one that was killed, and another session beside it. Whoever has the salts can show for
// each request and each ask, refused ones too, that its digest is of what the entry shows.
func TestSessionIsWhole(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	p, other := h.pod(specOf("", policyOf("read_files write_files=ask")), map[string]string{"a": "text"}), h.pod(specOf("", policyOf("read_files")), nil)
	var result string
	calls := func(p *Pod) {
		read := h.tool(p, nucleus.ReadFiles, map[string]string{"path": "a"})
		read.want(t, "")
		result = strings.TrimSpace(read.Body)
		h.tool(p, nucleus.EditFiles, map[string]any{"path": "a", "old": "text", "new": "x"}).want(t, nucleus.KindDenied)
		h.tool(other, nucleus.ReadFiles, map[string]string{"path": "nothing"})
	}
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, nucleus.KindApproval).Ask
	calls(p)
	h.authority.grant(ask, nil)
	h.tool(p, nucleus.WriteFiles, writeArgs("b")).want(t, "")
	h.tool(p, nucleus.WriteFiles, writeArgs("c")).want(t, nucleus.KindApproval)
	for _, end := range []func(){h.restart, func() { h.kill(); h.start() }} {
		end()
		var err error
		if p, err = h.node.pod(p.record.ID); err != nil {
			t.Fatal(err)
		}
		if other, err = h.node.pod(other.record.ID); err != nil {
			t.Fatal(err)
		}
		calls(p)
	}
	if v := h.receipt(p.record.Session); !v.Begins || !v.Linked || v.Ends {
		t.Errorf("while it lives: begins %v, linked %v, ends %v", v.Begins, v.Linked, v.Ends)
	}
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Fatal(err)
	}
	h.tool(other, nucleus.ReadFiles, map[string]string{"path": "nothing"})
	v := h.receipt(p.record.Session)
	if !v.Begins || !v.Linked || !v.Ends || v.Between == 0 {
		t.Errorf("begins %v, linked %v, ends %v, %d of others between", v.Begins, v.Linked, v.Ends, v.Between)
	}
	if v := h.receipt(other.record.Session); !v.Begins || !v.Linked || v.Ends {
		t.Errorf("the other: begins %v, linked %v, ends %v", v.Begins, v.Linked, v.Ends)
	}

	kinds, revealed := []string{}, map[string]int{}
	for _, raw := range v.Entries {
		e, err := audit.ParseEntry(raw)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(kinds, e.Kind) {
			kinds = append(kinds, e.Kind)
		}
		if e.Kind != nucleus.KindIntent && e.Kind != nucleus.KindApprovalAsk || e.Rule == "resolve" {
			continue
		}
		h.reveal(e)
		revealed[fmt.Sprint(e.Kind, " ", e.Verdict, " ", e.Status)]++
	}
	for _, want := range []string{"request.intent allow ", "request.intent deny refused", "request.intent ask ", "approval.ask ask "} {
		if revealed[want] == 0 {
			t.Errorf("no entry %q among %v", want, revealed)
		}
	}
	// Nothing in it confirms a guess: neither of arguments and contents, nor of results.
	for what, content := range map[string]string{
		"what was written": "x", "the arguments": `{"content":"x","path":"b"}`, "the refused arguments": `{"new":"x","old":"text","path":"a"}`, "what was read": "text",
		"the content after the refused edit": "x", "the result": result,
	} {
		for _, raw := range v.Entries {
			e, err := audit.ParseEntry(raw)
			if err == nil && e.Outcome != nil {
				raw = append(raw[:len(raw):len(raw)], e.Outcome.Payload...)
			}
			if digest := nucleus.SHA256([]byte(content)); strings.Contains(string(raw), digest) {
				t.Errorf("%s has the digest %s, which is shown: %s", what, digest, raw)
			}
		}
	}
	if h.results(v, result) == 0 {
		t.Errorf("no outcome is of the result %s", result)
	}
	want := []string{nucleus.KindPodCreate, nucleus.KindPolicyLoad, nucleus.KindPodStart, nucleus.KindApprovalAsk, nucleus.KindIntent, nucleus.KindOutcome,
		nucleus.KindApprovalUse, nucleus.KindPodAdopt, nucleus.KindPodStop, nucleus.KindPodEnd}
	if !slices.Equal(kinds, want) {
		t.Errorf("kinds\n%v, want\n%v", kinds, want)
	}
}

// A pod's policy stands in the log whole, with the digest that permits and grants name; a
// very long one by its digest alone.
func TestPolicyIsRecorded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	hosts := make([]string, 3000)
	for i := range hosts {
		hosts[i] = fmt.Sprintf(`{"host":"a-rather-long-name-of-host-%d.example.org","port":443}`, i)
	}
	long := `{"operations":{"net_connect":"always"},"hosts":{"only":[` + strings.Join(hosts, ",") + `]}}`
	for _, c := range []struct {
		policy json.RawMessage
		whole  bool
	}{{policyOf("read_files"), true}, {json.RawMessage(`"default"`), true}, {json.RawMessage(long), false}} {
		p := h.pod(specOf("", c.policy), nil)
		var got struct {
			Digest string          `json:"policy_sha256"`
			Policy json.RawMessage `json:"policy"`
			Bytes  int             `json:"bytes"`
		}
		for _, e := range h.entries(nucleus.KindPolicyLoad, "") {
			if e.Pod == p.record.ID {
				if err := json.Unmarshal(e.Data, &got); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got.Digest != p.digest || got.Bytes != len(p.record.Policy) || (got.Policy != nil) != c.whole {
			t.Errorf("recorded %+.300v", got)
		}
		if c.whole && nucleus.SHA256(got.Policy) != p.digest {
			t.Errorf("the policy recorded has another digest: %s", got.Policy)
		}
	}
}

// Each start of a node records its public keys.
func TestKeysAreRecorded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.restart()
	loads := h.entries(nucleus.KindKeyLoad, "")
	if len(loads) != 2 {
		t.Fatalf("%d entries, want 2", len(loads))
	}
	var got struct {
		Keys map[string]struct {
			Algorithm string
			Public    []byte
		}
	}
	if err := json.Unmarshal(loads[1].Data, &got); err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]ed25519.PrivateKey{"node": h.node.key, OperatorKey: h.operator} {
		if k := got.Keys[name]; k.Algorithm != "ed25519" || !key.Public().(ed25519.PublicKey).Equal(ed25519.PublicKey(k.Public)) {
			t.Errorf("%s: recorded %+v", name, k)
		}
	}
	if !strings.Contains(h.verifierKey(), "+") || len(got.Keys["log"].Public) != ed25519.PublicKeySize {
		t.Errorf("the log's key: %+v", got.Keys["log"])
	}
}

// A secret that somebody puts into a call is shown nowhere: not in its arguments, not in what comes
// of it by the node's or the machine's word, not in what an agent is started with.
func TestSecretsAreNotLogged(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	const token, word = "ghp_0123456789abcdefghijABCDEFGHIJ012345", "hunter2correct"
	site := newWeb(t, "127.0.0.1")
	p := h.pod(specOf("", connects("read_files write_files=ask web_fetch net_connect", site)), nil)
	h.tool(p, nucleus.ReadFiles, map[string]string{"path": "nothing/" + token}).want(t, nucleus.KindNotFound)
	h.tool(p, nucleus.EditFiles, map[string]string{"path": token, "old": "password=" + word, "new": "x"}).want(t, nucleus.KindNotFound)
	h.tool(p, nucleus.RunBash, map[string]any{"argv": 7, "password": word})
	h.tool(p, nucleus.GitPush, map[string]string{"repo": "https://ada:" + word + "@example.org/" + token})
	closed := &web{host: site.host, port: 1}
	for _, at := range []*web{site, closed} {
		h.tool(p, nucleus.WebFetch, map[string]any{"url": at.url("/?access_token=" + word), "headers": map[string]string{"X-Api-Key": word}})
	}
	ask := h.tool(p, nucleus.WriteFiles, map[string]string{"path": "a-" + token, "content": word}).want(t, nucleus.KindApproval).Ask
	h.authority.deny(ask, "it writes to "+token+" with password="+word)
	h.tool(p, nucleus.WriteFiles, map[string]string{"path": "a-" + token, "content": word}).want(t, nucleus.KindRefused)
	messages := 0
	for _, e := range h.log() {
		raw, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if e.Outcome != nil {
			raw = append(raw, e.Outcome.Payload...)
		}
		if strings.Contains(string(raw), token) || strings.Contains(string(raw), word) {
			t.Errorf("%s", raw)
		}
		messages += strings.Count(string(raw), "[redacted]")
	}
	if messages < 12 {
		t.Errorf("%d secrets were redacted: the control", messages)
	}
	for n := 940; n < 1000; n++ { // none is cut in two before it is recognised
		if got := logged(strings.Repeat("x", n)+" "+token, 1000); strings.Contains(got, token[:8]) {
			t.Fatalf("cut behind %d bytes: %s", n, got[n:])
		}
	}
}

// What happens while the log cannot be written is recorded when it can be, in its order and
// with the time at which it happened, before anything new; what is too much is counted.
func TestLogIsOwed(t *testing.T) {
	t.Parallel()
	for _, first := range []nucleus.Op{nucleus.ReadFiles, nucleus.EditFiles} { // what the policy allows, and what not
		t.Run(string(first), func(t *testing.T) { logIsOwed(t, first) })
	}
}

func logIsOwed(t *testing.T, first nucleus.Op) {
	t.Parallel()
	h := newHost(t)
	h.node.owed.most = 50
	disk := h.memoryLog()
	p, other := h.pod(specOf("w", policyOf("read_files")), map[string]string{"a": "text"}), h.pod(specOf("v", policyOf("read_files")), map[string]string{"a": "text"})
	h.tool(other, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")
	began, done := make(chan bool), make(chan bool)
	h.mu.Lock()
	h.behave = func(_ *inside, c *callInside) (guest.CallResult, bool) {
		began <- true
		<-done
		return c.honest(), true
	}
	h.mu.Unlock()
	read := make(chan answer)
	go func() { read <- h.tool(other, nucleus.ReadFiles, map[string]string{"path": "a"}) }()
	<-began
	size := len(disk.entries(t))

	disk.failing(func(string) error { return errors.New("no space left on device") })
	close(done)
	(<-read).want(t, nucleus.KindUnavailable, "its outcome could not be recorded yet")
	if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
		t.Errorf("a pod cannot be ended: %v", err)
	}
	h.mu.Lock()
	h.behave = nil
	h.mu.Unlock()
	h.tool(other, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, nucleus.KindUnavailable, "the log cannot be written")
	for i := range h.node.owed.most {
		h.node.note(nucleus.Entry{Kind: "test.note", Status: fmt.Sprint(i)})
	}
	if n := len(disk.entries(t)); n != size {
		t.Errorf("%d entries on a full disk, %d before", n, size)
	}
	disk.failing(nil)
	if first == nucleus.EditFiles {
		h.tool(other, first, map[string]any{"path": "a", "old": "text", "new": "x"}).want(t, nucleus.KindDenied)
	}
	h.tool(other, nucleus.ReadFiles, map[string]string{"path": "a"}).want(t, "")

	entries := disk.entries(t)[size:]
	kinds := []string{}
	for _, e := range entries {
		if n := len(kinds); n == 0 || kinds[n-1] != e.Kind {
			kinds = append(kinds, e.Kind)
		}
	}
	want := []string{nucleus.KindOutcome, nucleus.KindPodStop, nucleus.KindPodEnd, "test.note", nucleus.KindLogLost, nucleus.KindIntent, nucleus.KindOutcome}
	if !slices.Equal(kinds, want) {
		t.Fatalf("kinds %v, want %v", kinds, want)
	}
	for _, e := range entries[:3] {
		var d struct{ Happened time.Time }
		if err := json.Unmarshal(e.Data, &d); e.Kind != nucleus.KindOutcome && (err != nil || time.Since(d.Happened) > time.Minute) {
			t.Errorf("%s: %s, %v", e.Kind, e.Data, err)
		}
	}
	for _, e := range entries {
		if e.Kind == nucleus.KindLogLost && string(e.Data) != `{"entries":3}` {
			t.Errorf("lost: %s", e.Data)
		}
	}
	if open := h.node.log.OpenIntents(); len(open) != 0 {
		t.Errorf("open: %+v", open)
	}
}

// entries are what a reader of the disk finds.
func (m *memoryFS) entries(t *testing.T) (list []nucleus.Entry) {
	t.Helper()
	for e, err := range audit.Read(m.dump(t), 0) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}
