package nucleus

import "encoding/json"

// AskRequest is what the node puts before the authority: one action that needs
// an approval, with everything a person needs to judge it. The authority draws
// exactly these bytes; a grant is bound to their digest.
type AskRequest struct {
	ID        string          `json:"id"`
	Pod       string          `json:"pod"`
	Workspace string          `json:"workspace"`
	Session   string          `json:"session"`
	Boot      string          `json:"boot"`
	Requester string          `json:"requester"` // key id
	Request   json.RawMessage `json:"request"`   // the requester's signed request, see wire.SignedRequest
	Action    Action          `json:"action"`
	Digest    string          `json:"digest"` // Action.Digest under Salt
	Salt      []byte          `json:"salt"`
	Policy    string          `json:"policy_sha256"`
	Rule      string          `json:"rule"`
	Why       string          `json:"why"`
	Context   Context         `json:"context"`
	Tier      string          `json:"tier"`
	Mode      string          `json:"mode"`
	Detail    []Detail        `json:"detail,omitempty"` // shown below the action: diff stat, diff, addresses
	Evidence  []Evidence      `json:"evidence,omitempty"`
	Created   int64           `json:"created_ms"`
	Expires   int64           `json:"expires_ms"`
	Nonce     string          `json:"nonce"` // the proxy holds it in memory
}

// Detail is one titled block of text for the approver.
type Detail struct {
	Title string `json:"title"`
	Text  string `json:"text"`
}

// Evidence points at a log entry that took a leg of the exposure.
type Evidence struct {
	Seq  int64  `json:"seq"`
	Leg  string `json:"leg"`
	What string `json:"what"`
}

// Grant is the claims of one approval (PASETO v4.public, by the approver's own
// key). Every field is compared; a grant is used up once, durably, before the
// effect.
type Grant struct {
	ID        string `json:"jti"`
	Approver  string `json:"iss"`
	Ask       string `json:"ask"`
	AskDigest string `json:"ask_sha256"` // of the canonical AskRequest
	Pod       string `json:"aud"`
	Session   string `json:"session"`
	Boot      string `json:"boot"`
	Op        Op     `json:"op"`
	Digest    string `json:"digest"`
	Policy    string `json:"policy_sha256"`
	Reason    string `json:"reason"`
	Nonce     string `json:"nonce"`
	NotBefore int64  `json:"nbf_ms"`
	Expires   int64  `json:"exp_ms"`
}
