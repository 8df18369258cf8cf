package nucleus

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Tier says how strong the wall around a machine is.
type Tier string

// The tiers, strongest first. TierEmulated is used only when asked for by name
// and satisfies no requirement.
const (
	TierVM       Tier = "vm"
	TierKernel   Tier = "kernel"
	TierEmulated Tier = "emulated"
	TierNone     Tier = "none"
)

// Satisfies reports whether a machine of tier t meets the requirement want; an
// empty want is met by vm and kernel.
func (t Tier) Satisfies(want Tier) bool {
	switch want {
	case TierVM:
		return t == TierVM
	case TierKernel, "":
		return t == TierVM || t == TierKernel
	}
	return t == want && want == TierNone
}

// AtLeast reports whether t is as strong as u or stronger.
func (t Tier) AtLeast(u Tier) bool {
	strength := map[Tier]int{TierVM: 3, TierKernel: 2, TierEmulated: 1}
	return strength[t] >= strength[u]
}

// Mode says what the agent's process may do itself.
type Mode string

// The modes. In mediated mode the agent's process has a root of its own without
// workspace, shell or git; in contained mode it may do all it likes inside the
// machine.
const (
	Mediated  Mode = "mediated"
	Contained Mode = "contained"
)

// PodSpec is a request for a pod. Unknown fields are errors; zero values are
// the safest meaning.
type PodSpec struct {
	Ref       string            `json:"ref,omitempty"`               // the caller's own name for the pod, by which it can be ended also where the answer was cut off
	Workspace string            `json:"workspace,omitempty"`         // name of a persistent workspace; empty: one that ends with the pod
	Transient bool              `json:"transient,omitempty"`         // the node ends it when no request has used it for a minute; never with an agent
	Driver    string            `json:"driver,omitempty"`            // empty: the strongest whose probe succeeds
	Require   Tier              `json:"require,omitempty"`           // fail closed below this
	Approvals string            `json:"require_approvals,omitempty"` // "other-user" or "passkey": fail closed where approvals are not as strong
	Mode      Mode              `json:"mode"`
	Policy    json.RawMessage   `json:"policy"` // a profile's name as a string, or a whole policy
	Image     Image             `json:"image"`
	Repos     []Repo            `json:"repos,omitempty"`
	Resources Resources         `json:"resources"`
	Watched   []string          `json:"allow_watched,omitempty"` // resources whose limit may be watched only
	Agent     *Agent            `json:"agent,omitempty"`
	Model     *Model            `json:"model,omitempty"`
	Env       map[string]string `json:"env,omitempty"` // handed to the tools by name
	Identity  Identity          `json:"identity"`
}

// Repo is a repository of the person that goes into the machine by git.
type Repo struct {
	Name    string `json:"name"`              // directory below ~/workspace
	Path    string `json:"path"`              // on the host
	Branch  string `json:"branch"`            // of the agent; made from Base
	Base    string `json:"base"`              // commit id that the person brought
	Trusted *bool  `json:"trusted,omitempty"` // the person's word; nil: decided by its remotes
}

// Resources limit the machine. 0 is the default of the node.
type Resources struct {
	CPU      int `json:"cpu,omitempty"`       // cores
	MemoryMB int `json:"memory_mb,omitempty"` // MiB
	Pids     int `json:"pids,omitempty"`
	DiskMB   int `json:"disk_mb,omitempty"` // MiB, of scratch and of a new workspace, each, where the machine has disks of its own
}

// Bound is one of Resources: as it is in JSON, what is stated, and what a machine can have.
type Bound struct {
	Name        string
	Stated      int
	Least, Most int
}

// Bounds are those of all Resources.
func (r Resources) Bounds() []Bound {
	return []Bound{{"cpu", r.CPU, 1, 32}, {"memory_mb", r.MemoryMB, 256, 65536}, {"pids", r.Pids, 64, 1 << 20}, {"disk_mb", r.DiskMB, 64, 512000}}
}

// Holds says whether a machine can have what is stated.
func (b Bound) Holds() bool { return b.Stated >= b.Least && b.Stated <= b.Most }

func (b Bound) String() string {
	return fmt.Sprintf("%d, want %d to %d; hint: leave it out for the default", b.Stated, b.Least, b.Most)
}

// Check holds limits to what a machine can have.
func (r Resources) Check() error {
	for _, b := range r.Bounds() {
		if b.Stated != 0 && !b.Holds() {
			return Errorf(KindInvalid, "resources.%s is %v", b.Name, b)
		}
	}
	return nil
}

// UnmarshalJSON refuses a limit of 0 that is stated: the default has who leaves it out.
func (r *Resources) UnmarshalJSON(raw []byte) error {
	if string(raw) == "null" {
		return nil
	}
	var stated struct {
		CPU      *int `json:"cpu"`
		MemoryMB *int `json:"memory_mb"`
		Pids     *int `json:"pids"`
		DiskMB   *int `json:"disk_mb"`
	}
	if err := Strict(raw, &stated); err != nil {
		return err
	}
	for i, limit := range []struct {
		stated *int
		to     *int
	}{{stated.CPU, &r.CPU}, {stated.MemoryMB, &r.MemoryMB}, {stated.Pids, &r.Pids}, {stated.DiskMB, &r.DiskMB}} {
		if limit.stated == nil {
			continue
		}
		if *limit.to = *limit.stated; *limit.to == 0 {
			b := r.Bounds()[i]
			return Errorf(KindInvalid, "resources.%s is %v", b.Name, b)
		}
	}
	return nil
}

// Agent is the program of a session.
type Agent struct {
	Name string            `json:"name"` // "claude-code", "codex", ...; "" for a plain command
	Root []Layer           `json:"root"` // files and directories of its own root, read-only
	Argv []string          `json:"argv"`
	Env  map[string]string `json:"env,omitempty"`
	Home map[string][]byte `json:"home,omitempty"` // files put into its empty HOME

	// Task is the argv by which it works on a task without a terminal, as a sub-agent: one
	// element, TaskHere, stands for the task. Empty: it cannot.
	Task []string `json:"task,omitempty"`

	// CallS is how many seconds its client waits for one tool call; 0 is CallSeconds. A call
	// that needs a person waits for nine tenths of it.
	CallS int `json:"call_s,omitempty"`
}

// Places are the layers of the agent's root where they lie in a machine.
func (a *Agent) Places() []Layer {
	if a == nil {
		return nil
	}
	var layers []Layer
	for _, l := range a.Root {
		layers = append(layers, Layer{Name: l.Guest, Host: l.Host, Guest: MachineAgent + l.Guest})
	}
	return layers
}

// CallSeconds is what a client of MCP waits for a call unless it is told otherwise.
const CallSeconds = 60

// WaitAsk is how many seconds a call of the agent waits for a person.
func (a Agent) WaitAsk() int {
	seconds := a.CallS
	if seconds == 0 {
		seconds = CallSeconds
	}
	return seconds * 9 / 10
}

// TaskHere is the element of Agent.Task that stands for the task.
const TaskHere = "{task}"

// ForTask is the argv that works on a task. A task that could be read as an option is an
// error unless "--" stands before its place.
func (a Agent) ForTask(task string) ([]string, error) {
	place := -1
	for i, arg := range a.Task {
		if arg == TaskHere && place < 0 {
			place = i
		} else if arg == TaskHere {
			return nil, Errorf(KindInvalid, "agent %s: the task has several places", a.Name)
		}
	}
	switch {
	case len(a.Task) == 0:
		return nil, Errorf(KindInvalid, "agent %s is not known to work on a task by itself", a.Name)
	case place < 1:
		return nil, Errorf(KindInvalid, "agent %s: the task has no place in its arguments", a.Name)
	case strings.HasPrefix(task, "-") && !slices.Contains(a.Task[:place], "--"):
		return nil, Errorf(KindInvalid, "the task begins with \"-\", which agent %s would read as an option", a.Name)
	}
	argv := slices.Clone(a.Task)
	argv[place] = task
	return argv, nil
}

// Model is the route to the agent's model. Key is a secret: the node keeps it
// from every log, entry and guest.
type Model struct {
	Protocol string `json:"protocol"` // "anthropic" or "openai"
	BaseURL  string `json:"base_url"`
	Key      string `json:"key,omitempty"`
	Bearer   bool   `json:"bearer,omitempty"` // an OAuth token, sent as Authorization
}

// Identity is written into commits.
type Identity struct {
	Name  string `json:"name,omitempty"`
	Email string `json:"email,omitempty"`
}

// PodStatus is what the API says of a pod.
type PodStatus struct {
	ID           string       `json:"id"`
	Workspace    string       `json:"workspace,omitempty"`
	State        string       `json:"state"` // "planned", "starting", "running", "paused", "stopped", "failed"
	Driver       string       `json:"driver"`
	Tier         Tier         `json:"tier"`
	Mode         Mode         `json:"mode"`
	Network      bool         `json:"network"` // the policy lets something be reached besides the model
	Session      string       `json:"session"`
	Parent       string       `json:"parent,omitempty"`       // the pod that asked for it
	RootSession  string       `json:"root_session,omitempty"` // the session whose exposure and budget it shares; empty: its own
	Boot         string       `json:"boot,omitempty"`
	Agent        string       `json:"agent,omitempty"`
	Image        string       `json:"image"`        // as Image.String
	Environments []string     `json:"environments"` // as Image.Environments
	Exposure     []string     `json:"exposure"`
	Limits       []Limit      `json:"limits,omitempty"`
	Repos        []RepoStatus `json:"repos,omitempty"`
	Approvals    string       `json:"approvals,omitempty"`   // who can approve: "same user", "other user", "passkey" or "none"
	Unconfirmed  []string     `json:"unconfirmed,omitempty"` // a line for each of them whose key the person has not confirmed
	Created      string       `json:"created"`
	Reason       string       `json:"reason,omitempty"` // why it failed or stopped
	Policy       string       `json:"policy,omitempty"` // its name, where it has one
	Budget       *Budget      `json:"budget,omitempty"`
	Asks         []string     `json:"asks,omitempty"` // ids of asks that wait for a person
}

// Budget is what a pod's session has used up. Where it has no limit of its own but a pod
// above it has, limit, spent and left are that one's.
type Budget struct {
	USD     Spending `json:"usd"`
	Tokens  Spending `json:"tokens"`
	Seconds Spending `json:"seconds"`

	Estimated int64    `json:"estimated_calls,omitempty"` // calls to the model that were charged by an estimate
	Unpriced  []string `json:"unpriced,omitempty"`        // models that were charged like the dearest, because they have no price
	Stopped   string   `json:"stopped,omitempty"`         // the rule by which the session was ended
}

// Spending is one dimension of a budget, in US dollars, tokens or seconds.
type Spending struct {
	Limit    *float64 `json:"limit,omitempty"` // absent: there is none
	Spent    float64  `json:"spent"`
	Reserved float64  `json:"reserved,omitempty"` // set aside for sub-pods
	Left     *float64 `json:"left,omitempty"`     // 0 where more was spent than there was
}

// Of returns the spending of one dimension.
func (b *Budget) Of(d Dimension) *Spending {
	switch d {
	case USD:
		return &b.USD
	case Tokens:
		return &b.Tokens
	}
	return &b.Seconds
}

// Limited reports whether anything is limited.
func (b *Budget) Limited() bool {
	return b != nil && (b.USD.Limit != nil || b.Tokens.Limit != nil || b.Seconds.Limit != nil)
}

// Live reports whether the pod has not come to its end.
func (s PodStatus) Live() bool { return s.State != "failed" && s.State != "stopped" }

// RepoStatus is a repository in a pod with its label.
type RepoStatus struct {
	Name    string `json:"name"`
	Branch  string `json:"branch"`
	Base    string `json:"base"`
	Trusted bool   `json:"trusted"`
	Why     string `json:"why"` // of the label
}

// Limit says how a resource's limit is kept: "enforced", "watched" or "none".
type Limit struct {
	Resource string `json:"resource"`
	Value    string `json:"value"`
	How      string `json:"how"`
}
