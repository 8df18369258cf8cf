package nucleus

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// Boot is the first frame on a machine's wire, accepted once and before any
// other process starts in the machine. Keys are raw Ed25519 public keys, base64
// in JSON.
type Boot struct {
	Pod       string          `json:"pod"`
	Boot      string          `json:"boot"`
	NodeKey   []byte          `json:"node_key"`
	Approvers []Approver      `json:"approvers,omitempty"` // who can grant to this boot
	Policy    json.RawMessage `json:"policy"`              // normalised, canonical
	Time      NodeTime        `json:"time"`
	Guest     json.RawMessage `json:"guest"` // users, mounts and ports; package guest reads it
}

// NodeTime is what a node's clocks say in one moment. Tick is milliseconds on the
// monotonic clock of the node's process, Epoch counts the nodes that a pod has had, and
// begins a new count of ticks. The wall clock may be set, back and forth.
type NodeTime struct {
	Epoch     uint64 `json:"epoch"`
	Tick      int64  `json:"tick_ms"`
	UnixMilli int64  `json:"unix_ms"`
}

// BootReply answers Boot. OutcomeKey is new at every boot, restore and fork.
type BootReply struct {
	Boot       string `json:"boot"`
	OutcomeKey []byte `json:"outcome_key"`
	Version    string `json:"version"`
	Error      string `json:"error,omitempty"` // why the machine refuses to serve
}

// Permit is the node's word to one machine that one request may be acted on,
// once, for a time. Seq is accepted once and only in rising order of arrival
// of unseen numbers. How old a permit is the guest judges by Issued.Tick on its own
// monotonic clock: no clock that is set makes an old permit young, or a young one old.
type Permit struct {
	ID        string   `json:"id"`
	Pod       string   `json:"pod"`
	Boot      string   `json:"boot"`
	Session   string   `json:"session"`
	Seq       uint64   `json:"seq"`
	Op        Op       `json:"op"`
	Digest    string   `json:"digest"` // Action.Digest
	Salt      []byte   `json:"salt"`
	Verdict   Verdict  `json:"verdict"`
	Rule      string   `json:"rule"`
	Context   Context  `json:"context"`
	Grants    []string `json:"grants,omitempty"` // tokens, one of each approver, where Verdict is Ask
	Issued    NodeTime `json:"issued"`
	Life      int64    `json:"life_ms"` // from Issued
	Requester string   `json:"requester"`
}

// ResultDigest is the hex SHA-256 of the permit's salt followed by the canonical result: what an
// outcome says of a result does not confirm a guess of it.
func (p Permit) ResultDigest(result []byte) string {
	h := sha256.New()
	h.Write(p.Salt)
	h.Write(result)
	return hex.EncodeToString(h.Sum(nil))
}

// EpochBits is where a permit's sequence holds its epoch: above them.
const EpochBits = 40

// Outcome is what the guest (or, for an outward operation, the node) says came
// of a permit. Status is one of the Outcome constants.
type Outcome struct {
	Permit   string `json:"permit"`
	Pod      string `json:"pod"`
	Boot     string `json:"boot"`
	Seq      uint64 `json:"seq"`
	Status   string `json:"status"`
	ExitCode int    `json:"exit_code,omitempty"`
	Result   string `json:"result_sha256,omitempty"` // Permit.ResultDigest
	Bytes    int64  `json:"bytes,omitempty"`
	Message  string `json:"message,omitempty"`
	Millis   int64  `json:"ms"`

	// Admission is, in a node's outcome, the guest's own outcome for the permit, by the
	// boot's key: OutcomeAdmitted where the effect was tried.
	Admission *Signed `json:"admission,omitempty"`
}

// The statuses of an outcome.
const (
	OutcomeDone     = "done"     // the effect took place
	OutcomeFailed   = "failed"   // it was tried and failed; Message says how
	OutcomeRefused  = "refused"  // nothing was done: the guest's own decision was stricter, or it could not be asked
	OutcomeAdmitted = "admitted" // the guest has nothing against an effect on the host; the node may act
	OutcomeUnknown  = "unknown"  // nobody can say: the node ended, or the answer to what was done did not come
)

// Signed is canonical JSON and one Ed25519 signature over domain, a newline and
// the payload. The domain keeps a signature made for one purpose from being read
// as another.
type Signed struct {
	Payload []byte `json:"payload_b64"`
	Sig     []byte `json:"sig_b64"`
}

// Signature domains.
const (
	DomainPermit   = "nucleus-permit-v1"
	DomainOutcome  = "nucleus-outcome-v1"
	DomainAttach   = "nucleus-attach-v1"
	DomainAsk      = "nucleus-ask-v1"
	DomainVouch    = "nucleus-approver-v1"
	DomainWebAuthn = "nucleus-webauthn-v1"
)

// Sign makes the canonical bytes of v and signs them.
func Sign(key ed25519.PrivateKey, domain string, v any) (Signed, error) {
	payload, err := Canonical(v)
	if err != nil {
		return Signed{}, err
	}
	return Signed{payload, ed25519.Sign(key, signedBytes(domain, payload))}, nil
}

// Open verifies the signature and decodes the payload into v; unknown fields
// are refused.
func (s Signed) Open(key ed25519.PublicKey, domain string, v any) error {
	if len(key) != ed25519.PublicKeySize {
		return fmt.Errorf("public key has %d bytes, want %d", len(key), ed25519.PublicKeySize)
	}
	if !ed25519.Verify(key, signedBytes(domain, s.Payload), s.Sig) {
		return errors.New("bad signature")
	}
	return Strict(s.Payload, v)
}

func signedBytes(domain string, payload []byte) []byte {
	return append([]byte(domain+"\n"), payload...)
}
