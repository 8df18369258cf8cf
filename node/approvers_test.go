package node

import (
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
