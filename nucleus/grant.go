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
	Approvals int             `json:"approvals"` // how many different approvers have to grant it, at least 1
	Takes     Legs            `json:"takes"`     // what the action adds to the session's exposure
	Context   Context         `json:"context"`
	Tier      string          `json:"tier"`
	Mode      string          `json:"mode"`
	Detail    []Detail        `json:"detail,omitempty"` // shown below the action: diff stat, diff, addresses
	Evidence  []Evidence      `json:"evidence,omitempty"`
	Passage   *Passage        `json:"passage,omitempty"` // for net_connect and web_fetch, which are granted by place
	Created   int64           `json:"created_ms"`
	Expires   int64           `json:"expires_ms"`
	Nonce     string          `json:"nonce"` // the proxy holds it in memory
}

// Passage is what a grant for net_connect or web_fetch opens: the operation, in
// the ask's session, to one host and port. It opens when the grant is used, which
// happens once, and it ends when the session takes private or untrusted beyond
// Exposure by anything but a passage, and at the latest when Millis have passed.
type Passage struct {
	Host     string `json:"host"`
	Port     int    `json:"port"`
	Exposure Legs   `json:"exposure"`
	Millis   int64  `json:"ms"`
}

// Place is where an action of net_connect or web_fetch leads; ok is false for
// any other action.
func (a Action) Place() (host string, port int, ok bool) {
	switch {
	case a.Op == NetConnect && a.Connect != nil:
		return a.Connect.Host, a.Connect.Port, true
	case a.Op == WebFetch && a.Fetch != nil:
		return a.Fetch.Host, a.Fetch.Port, true
	}
	return "", 0, false
}

// Approver is one key that can grant, by a name of its own.
type Approver struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"`             // ApproverEd25519 or ApproverPasskey
	Key    []byte `json:"key"`              // the public key, in the form of its kind
	Origin string `json:"origin,omitempty"` // of the page that a passkey signs on
}

// KnownApprover is one whose key a node has seen. Seen is 0 where no machine was started with it yet.
type KnownApprover struct {
	Approver
	Seen      int64 `json:"seen_ms"` // first
	Confirmed bool  `json:"confirmed"`
}

// The kinds of an approver's key.
const (
	ApproverEd25519 = "ed25519" // signs PASETO v4.public tokens; the public key has 32 bytes
	ApproverPasskey = "passkey" // answers WebAuthn challenges with ES256; an uncompressed point of 65 bytes
)

// MaxApprovals is the largest number of approvers that an ask can need.
const MaxApprovals = 16

// Detail is one titled block of text for the approver.
type Detail struct {
	Title string `json:"title"`
	Text  string `json:"text"`
}

// DetailLately is the title of the Detail that says what the session did before the ask. It
// changes with each ask and says nothing of the action.
const DetailLately = "what the session has read and fetched lately"

// Evidence points at a log entry that took a leg of the exposure.
type Evidence struct {
	Seq  int64  `json:"seq"`
	Leg  string `json:"leg"`
	What string `json:"what"`
}

// Grant is the claims of one approval (PASETO v4.public, or WebAuthn, by the approver's own
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
	Task      *Task  `json:"task,omitempty"` // nil: good for one use
}

// Task makes a grant good for several uses, of which the one that was asked for is the first:
// the operation of the ask, in its pod, for every action that Match describes, as long as the
// session's exposure, but for what passages took, is not beyond Exposure. An approver chooses
// it; nobody asks for one.
type Task struct {
	Uses     int   `json:"uses"`     // 1 to MaxTaskUses
	Until    int64 `json:"until_ms"` // Unix milliseconds, at most MaxTaskMillis after it is given
	Exposure Legs  `json:"exposure"`
	Match    Match `json:"match"`
}

// The bounds of a task.
const (
	MaxTaskUses   = 20
	MaxTaskMillis = 60 * 60 * 1000
)

// Match describes actions by a closed pattern. The part that belongs to the operation is
// present, and no other. What a part does not name may be anything.
type Match struct {
	Push    *PushMatch    `json:"push,omitempty"`
	Fetch   *FetchMatch   `json:"fetch,omitempty"`
	Connect *Connect      `json:"connect,omitempty"`
	Files   *FilesMatch   `json:"files,omitempty"`
	Command *CommandMatch `json:"command,omitempty"`
}

// PushMatch is pushes from one repository to one remote that drop nothing from it. Ref is exact,
// or "prefix/**".
type PushMatch struct {
	Repo   string `json:"repo"`
	Remote string `json:"remote"`
	Ref    string `json:"ref"`
}

// FetchMatch is requests to one host. Path is exact, or "prefix/**"; query, headers and body may
// be any.
type FetchMatch struct {
	Method string `json:"method"`
	Scheme string `json:"scheme"`
	Host   string `json:"host"`
	Port   int    `json:"port"`
	Path   string `json:"path"`
}

// FilesMatch is files below one directory of the workspace; "." is the workspace.
type FilesMatch struct {
	Root string `json:"root"`
}

// CommandMatch is commands without an input that run one program in one directory and
// environment. Argv is a pattern: "*" is one argument, "**" all that follow. Commands that may
// run arbitrary code are never meant.
type CommandMatch struct {
	Argv   []string          `json:"argv"`
	Binary string            `json:"binary"`
	Dir    string            `json:"dir"`
	Env    map[string]string `json:"env,omitempty"`
}
