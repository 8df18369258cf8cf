package node

import (
	"context"
	"crypto/ed25519"
	"slices"
	"time"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// approversNow asks the authority who can approve for a pod, and says how strong that is: only
// they will be known to its machine. Without an authority there is nobody and nothing can be
// approved, which is an error where the pod was to have somebody. Who has the operator's key
// does not count: it asks.
func (n *Node) approversNow(ctx context.Context, require nucleus.ApprovedBy) (list []nucleus.Approver, by string, err error) {
	info, asked := n.authorityInfo(ctx)
	if operator, err := keyfile.Load(n.operatorKeyFile()); err == nil && asked == nil {
		list = approval.Different(info.Approvers, operator.Public().(ed25519.PublicKey))
	}
	refuse := func(format string, args ...any) ([]nucleus.Approver, string, error) {
		return nil, "", nucleus.Errorf(nucleus.KindUnavailable, "the pod requires approvals by "+string(require)+", and "+format, args...)
	}
	switch {
	case require == "":
	case require != nucleus.ByOtherUser && require != nucleus.ByPasskey:
		return nil, "", nucleus.Errorf(nucleus.KindInvalid, "required approvals %q: want %q or %q", require, nucleus.ByOtherUser, nucleus.ByPasskey)
	case asked != nil:
		return refuse("the authority does not say who can approve: %v", asked)
	case require == nucleus.ByOtherUser && info.Approvals != approvals.OtherUser:
		return refuse("the authority runs as the same user as this node (run nucleus-authority serve --ask-uid as another)")
	case require == nucleus.ByPasskey:
		list = slices.DeleteFunc(list, func(a nucleus.Approver) bool { return a.Kind != nucleus.ApproverPasskey })
		if len(list) == 0 {
			return refuse("nobody has one (nucleus-authority approver add NAME --passkey)")
		}
	}
	return list, info.By(list), nil
}

func (n *Node) authorityInfo(ctx context.Context) (approvals.Info, error) {
	if n.asks == nil {
		return approvals.Info{}, nucleus.Errorf(nucleus.KindUnavailable, "this node has no authority")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return n.asks.Info(ctx)
}
