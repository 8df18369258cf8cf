package node

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/internal/passkeytest"
	"cal/nucleus"
)

// A pod that requires passkeys knows no other approver; without one, or with what is weaker than
// required, it is not made.
func TestRequireApprovals(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	ann := h.authority.persons[0]
	spec := specOf("", writeAsks)
	refused := func(what string, by string, kind nucleus.Kind, text string) {
		t.Helper()
		spec.Approvals = by
		_, err := h.node.CreatePod(h.context(), "operator", spec)
		if err == nil || nucleus.AsError(err).Kind != kind || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %s with %q", what, err, kind, text)
		}
		if left := h.entries(nucleus.KindPodStart, ""); len(left) != 0 {
			t.Errorf("%s: started", what)
		}
	}
	refused("no passkey", approvals.RequirePasskey, nucleus.KindUnavailable, "nobody has one")
	refused("the same user", approvals.RequireOtherUser, nucleus.KindUnavailable, "approvals of another user are required")
	refused("a word", "anybody", nucleus.KindInvalid, `"anybody"`)

	key := passkeytest.New(t, "http://localhost:7433")
	touch := nucleus.Approver{Name: "touch", Kind: nucleus.ApproverPasskey, Key: key.Point(t), Origin: key.Origin}
	h.authority.mu.Lock()
	h.authority.persons = []person{ann, {Approver: touch}}
	h.authority.mu.Unlock()
	spec.Approvals = ""
	if p := h.pod(spec, nil); len(p.approvers) != 2 || p.status().Approvals != approvals.SameUser {
		t.Errorf("requires nothing: %+v, %s", p.approvers, p.status().Approvals)
	}
	spec.Approvals = approvals.RequirePasskey
	p := h.pod(spec, nil)
	if len(p.approvers) != 1 || p.approvers[0].Name != "touch" || p.status().Approvals != approvals.Passkey {
		t.Fatalf("requires a passkey: %+v, %s", p.approvers, p.status().Approvals)
	}
	ask := h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindApproval).Ask
	shown := h.authority.asked()[0]
	h.authority.answer(ask, given(ann.token(t, shown)))
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, nucleus.KindRefused, "not an approver")
	if written(p, "a") {
		t.Fatal("a passphrase was enough")
	}
	b, err := approval.Bind(shown)
	if err != nil {
		t.Fatal(err)
	}
	grant := b.Grant(nucleus.NewID("g-"), "touch", "")
	challenge, err := approval.PasskeyChallenge(grant)
	if err != nil {
		t.Fatal(err)
	}
	var said approval.Answer
	said.ClientData, said.AuthenticatorData, said.Signature = key.Answer(t, challenge)
	token, err := approval.PasskeyToken(grant, said)
	if err != nil {
		t.Fatal(err)
	}
	h.authority.answer(ask, given(token))
	h.tool(p, nucleus.WriteFiles, writeArgs("a")).want(t, "")
	if !written(p, "a") {
		t.Error("a passkey was not enough")
	}

	delegate := specOf("w", policyOf(delegating))
	delegate.Approvals = approvals.RequirePasskey
	if sub := h.create(h.pod(delegate, nil), object{}); len(sub.approvers) != 1 || sub.status().Approvals != approvals.Passkey {
		t.Errorf("below one that requires a passkey: %+v, %s", sub.approvers, sub.status().Approvals)
	}

	// What the node requires stands beside what the pod does, and neither is in place of the other.
	spec.Approvals, h.node.config.RequireApprovals = "", approvals.RequirePasskey
	if p := h.pod(spec, nil); len(p.approvers) != 1 {
		t.Errorf("the node requires a passkey: %+v", p.approvers)
	}
	spec.Approvals = approvals.RequireOtherUser
	if _, err := h.node.CreatePod(h.context(), "operator", spec); nucleus.AsError(err).Kind != nucleus.KindUnavailable {
		t.Errorf("the pod requires another user, the node a passkey: %v", err)
	}
	spec.Approvals, h.node.config.RequireApprovals = approvals.RequirePasskey, ""
	h.authority.stop()
	if _, err := h.node.CreatePod(h.context(), "operator", spec); nucleus.AsError(err).Kind != nucleus.KindUnavailable {
		t.Errorf("without an authority: %v", err)
	}
	spec.Approvals = ""
	if p := h.pod(spec, nil); p.status().Approvals != approvals.Nobody {
		t.Errorf("without an authority: %s", p.status().Approvals)
	}
}

// The keys of the first machine are taken. Another key of a name, and a new name, are told until the
// person confirms exactly these, over restarts; each stands in the log once.
func TestKnownApprovers(t *testing.T) {
	t.Parallel()
	h := newHost(t, withAuthority)
	told := func(what string, want ...string) {
		t.Helper()
		p := h.pod(specOf("", writeAsks), nil)
		got := p.status().Unconfirmed
		if len(got) != len(want) {
			t.Fatalf("%s: told %q, want %q", what, got, want)
		}
		for i, text := range want {
			if !strings.Contains(got[i], text) {
				t.Errorf("%s: told %q, want %q", what, got[i], text)
			}
		}
		if err := h.node.DeletePod(h.context(), "operator", p.record.ID); err != nil {
			t.Fatal(err)
		}
	}
	recorded := func(want int) {
		t.Helper()
		if got := len(h.entries(nucleus.KindKeyApprovers, "")); got != want {
			t.Errorf("%d entries, want %d", got, want)
		}
	}
	confirm := func(list ...nucleus.Approver) {
		t.Helper()
		raw, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		h.serve(h.node, h.signed(h.asOperator(), "POST", "/v1/approvers/confirmed", "", raw)).want(t, "")
	}
	change := func(do func(a *authorityStub)) {
		h.authority.mu.Lock()
		defer h.authority.mu.Unlock()
		do(h.authority)
	}
	told("the first")
	recorded(1)
	first := h.authority.persons[0].Approver
	told("the same")
	recorded(1)

	change(func(a *authorityStub) { a.newKey() })
	plan, err := h.node.PlanPod(h.context(), specOf("", writeAsks))
	if err != nil || len(plan.status().Unconfirmed) != 1 {
		t.Errorf("before it starts: %+v, %v", plan, err)
	}
	recorded(1) // nothing has begun
	told("another key", "person has another key than before: ed25519 "+hex.EncodeToString(h.authority.persons[0].Key)+", not ed25519 "+hex.EncodeToString(first.Key))
	told("still", "another key")
	recorded(2)
	h.restart()
	told("after a restart", "another key")
	confirm(first) // which it is not
	told("the wrong one is confirmed", "another key")
	confirm(h.authority.persons[0].Approver)
	told("confirmed")
	h.restart()
	told("confirmed, after a restart")
	recorded(4)

	change(func(a *authorityStub) { a.persons = append(a.persons, newPerson(t, "bob")) })
	told("one more", "bob is new")
	recorded(5)
	change(func(a *authorityStub) {
		a.persons = append([]person{}, a.persons...)
		a.persons[0].Approver = first
	})
	told("the earlier key again", "another key", "bob is new")

	if err := os.WriteFile(h.node.dirs.knownFile(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.restart()
	told("what was known cannot be read", "person is new", "bob is new")
}
