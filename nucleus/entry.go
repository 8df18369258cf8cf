package nucleus

import "encoding/json"

// MaxEntry is the largest log entry in bytes (C2SP tlog-tiles: a uint16 length).
const MaxEntry = 65535

// LogOrigin names the node's log in its checkpoints (C2SP tlog-checkpoint).
const LogOrigin = "cal/node-log"

// AuthorityLogOrigin names the log of the authority.
const AuthorityLogOrigin = "cal/authority-log"

// Entry is one line of the log. It is stored as canonical JSON. Fields that do
// not apply are absent. Args are the shown arguments (Action.Shown): secrets
// redacted, cut visibly at 4 KiB. Data is redacted too.
type Entry struct {
	Seq      int64           `json:"seq"`
	Time     string          `json:"time"` // RFC 3339 with nanoseconds, UTC
	Pod      string          `json:"pod,omitempty"`
	Session  string          `json:"session,omitempty"`
	Prev     *int64          `json:"prev,omitempty"`  // the entry before this one of the same session; absent at the first, or where the log does not know
	Actor    string          `json:"actor,omitempty"` // key id
	Kind     string          `json:"kind"`
	Op       Op              `json:"op,omitempty"`
	Digest   string          `json:"digest,omitempty"` // Action.Digest
	Args     json.RawMessage `json:"args,omitempty"`
	Verdict  Verdict         `json:"decision,omitempty"`
	Rule     string          `json:"rule,omitempty"`
	Exposure []string        `json:"exposure,omitempty"` // after the entry
	Permit   string          `json:"permit,omitempty"`
	Ask      string          `json:"ask,omitempty"`
	Grants   []string        `json:"grants,omitempty"`
	Outcome  *Signed         `json:"outcome,omitempty"`
	Status   string          `json:"status,omitempty"`
	Data     json.RawMessage `json:"data,omitempty"` // what the kind adds
}

// The kinds of entries. A reader of an old log accepts kinds it does not know.
const (
	KindPodStart       = "pod.start"
	KindPodAdopt       = "pod.adopt"
	KindPodStop        = "pod.stop" // nothing is decided any more
	KindPodEnd         = "pod.end"  // the machine is gone: the last entry of its session
	KindPodFail        = "pod.fail"
	KindPodCreate      = "pod.create"
	KindPodRefuse      = "pod.refuse" // none was made
	KindPodPause       = "pod.pause"
	KindPodResume      = "pod.resume"
	KindSessionStart   = "session.start"
	KindSessionEnd     = "session.end"
	KindSessionRefuse  = "session.refuse" // a session.start that started nothing
	KindSessionBudget  = "session.budget" // the budget is spent, and the session is ended
	KindSessionAttach  = "session.attach" // a person's terminal joined the agent
	KindSessionClear   = "session.clear"  // a person deleted a workspace, and with it what its sessions had taken
	KindIntent         = "request.intent"
	KindOutcome        = "request.outcome"
	KindApprovalAsk    = "approval.ask"
	KindApprovalGrant  = "approval.grant"
	KindApprovalDeny   = "approval.deny"
	KindApprovalUse    = "approval.use"
	KindApprovalRefuse = "approval.refuse"
	KindApprovalRevoke = "approval.revoke"
	KindEgressOpen     = "egress.open"
	KindEgressClose    = "egress.close"
	KindModelCall      = "model.call"
	KindRepoImport     = "repo.import"
	KindRepoFetch      = "repo.fetch"
	KindPolicyLoad     = "policy.load"   // what a pod may do
	KindKeyLoad        = "key.load"      // the public keys of a node that starts
	KindKeyNew         = "key.new"       // the authority's: an approver's key was made
	KindKeyRemove      = "key.remove"    // the authority's: an approver's key was taken away
	KindKeyApprovers   = "key.approvers" // the node's: keys can approve that no machine was started with before, or the person has confirmed some
	KindLogTorn        = "log.torn"
	KindLogLost        = "log.lost"   // events while the log could not be written, of which there is no entry
	KindLogFork        = "log.fork"   // a witness's: the log's key signed two histories
	KindLogForget      = "log.forget" // a witness's: it gave up what it kept of a log
)

// The kinds of what comes. Nothing writes them yet; every reader takes them.
const (
	KindArtifactSave    = "artifact.save"
	KindSnapshotCreate  = "snapshot.create"
	KindSnapshotRestore = "snapshot.restore"
	KindSnapshotDelete  = "snapshot.delete"
	KindPortOpen        = "port.open"
	KindPortClose       = "port.close"
)
