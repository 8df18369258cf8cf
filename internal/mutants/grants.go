package main

// What an approval is worth: how many, by whom, once.
var grantMutants = []mutant{
	{"grants: as many as the ask needs", "approval/verify.go", "|| len(tokens) != ask.Approvals", "|| len(tokens) == 0", "TestApproved"},
	{"grants: none counts twice", "approval/verify.go", "if counted[once] {", "if false {", "TestApproved"},
	{"grants: a key counts once", "approval/verify.go", ", \"key \" + hex.EncodeToString(approver.Key)", ", \"key \" + hex.EncodeToString([]byte(approver.Name))", "TestApproved"},
	{"grants: a kind of key that is not known", "approval/verify.go", "if approver.Kind != nucleus.ApproverEd25519 {", "if false {", "TestVerifyKeysAndTokens"},
	{"grants: who asks does not count", "approval/verify.go", "for _, key := range requesters {", "for _, key := range [][]byte{} {", "TestDifferent"},
	{"grants: the machine's own need", "guest/call.go", "if ask.Approvals < need {", "if false {", "TestQuorum"},
	{"grants: the machine's own key does not count", "guest/call.go", "approval.Different(p.boot.Approvers, p.key.Public().(ed25519.PublicKey))", "approval.Different(p.boot.Approvers, p.key.Public().(ed25519.PublicKey)[:0])", "TestQuorum"},
	{"grants: nobody is asked for more than there are", "node/approve.go", "case d.Approvals > len(p.approvers):", "case false:", "TestQuorumBeyondApprovers"},
	{"grants: one key is one approver of the node", "node/approve.go", "return approval.Different(info.Approvers, operator.Public().(ed25519.PublicKey))", "return append(info.Approvers[:0:0], append(info.Approvers, approval.Different(nil, operator.Public().(ed25519.PublicKey))...)...)", "TestQuorum"},
	{"grants: all are used or none", "approval/spent/spent.go", "if added == 0 {", "if added == 0 && grant == grants[0] {", "TestUseTogether"},
	{"grants: more than there are is not asked", "authority/authority.go", "ask.Approvals > there {", "false {", "TestQuorum"},
	{"grants: no token before all have granted", "authority/store.go", "if status.State != client.Granted {", "if false {", "TestQuorum"},
	{"grants: who asks cannot grant", "authority/authority.go", "if approver.PublicKey.Equal(requester) {", "if approver.PublicKey.Equal(requester) && false {", "TestRequesterCannotGrant"},
	{"grants: a use is counted", "authority/authority.go", "case row.uses >= most:", "case false:", "TestAskAndDecide"},
	{"grants: a use names its grants", "authority/authority.go", "case !slices.Equal(u.Grants, given):", "case !slices.Equal(given, given):", "TestAskAndDecide"},
	{"grants: what a removed approver granted is void", "authority/members.go", "for _, id := range unused {", "for _, id := range unused[:0] {", "TestRemoveRevokes"},
	{"approvers: one is added by one who is there", "authority/approver.go", "return err == nil && sameIdentity(said, f.Identity)", "return err == nil || sameIdentity(said, f.Identity)", "TestPlantedApprover"},
	{"approvers: there is one first", "authority/approver.go", "return len(known) == 0", "return true", "TestPlantedApprover"},
	{"approvers: the seal says who added it", "authority/key.go", "!sameIdentity(s.Identity, f.Identity)", "s.Approver != f.Approver", "TestPlantedApprover"},
	{"approvers: the passphrase of who adds", "authority/key.go", "if errors.As(err, &wrong) {", "if errors.As(err, &wrong) && false {", "TestApprovers"},
}
