package nucleus

// Verdict is the outcome of a decision.
type Verdict string

// The verdicts, from strict to loose.
const (
	Deny  Verdict = "deny"
	Ask   Verdict = "ask"
	Allow Verdict = "allow"
)

func (v Verdict) rank() int {
	switch v {
	case Allow:
		return 2
	case Ask:
		return 1
	}
	return 0 // an unknown verdict denies
}

// StricterThan reports whether v permits less than other.
func (v Verdict) StricterThan(other Verdict) bool { return v.rank() < other.rank() }

// Decision is a value, not an error: a refusal has been decided. Rule names what
// decided ("trifecta", "operations.git_push", "hosts[2]", ...), Why says it in a
// sentence for a person. Takes are the legs that the action takes when it goes
// ahead; a denied action takes none.
type Decision struct {
	Verdict   Verdict `json:"verdict"`
	Rule      string  `json:"rule"`
	Why       string  `json:"why,omitempty"`
	Takes     Legs    `json:"-"`
	Approvals int     `json:"approvals,omitempty"` // how many, for an ask; at least 1
}

// Context is what a decision depends on beside policy and action. Everything is
// handed in: policy has no clock and no files.
type Context struct {
	Exposure      Legs  `json:"exposure"`                 // of the root session, before the action
	UntrustedRepo bool  `json:"untrusted_repo,omitempty"` // the machine holds a repository labelled untrusted
	Contained     bool  `json:"contained,omitempty"`      // contained mode
	DirectNetwork bool  `json:"direct_network,omitempty"` // the machine has a network that does not pass the gateway
	UnixMilli     int64 `json:"unix_ms"`                  // now, UTC

	// Of the budget that the session draws on, before the action: what is used up, and
	// what is set aside for sub-pods.
	Spent    Amounts `json:"spent,omitzero"`
	Reserved Amounts `json:"reserved,omitzero"`
}
