package nucleus

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
)

// Action is a request in its resolved form: what will happen, with every name
// turned into the thing it stands for. Policy judges an Action, permit, ask and
// grant bind its digest, and the effect uses exactly its values or is refused.
// Only the part that belongs to Op is present.
type Action struct {
	Op      Op       `json:"op"`
	Args    string   `json:"args_sha256"` // hex SHA-256 of the canonical arguments
	Files   []File   `json:"files,omitempty"`
	Command *Command `json:"command,omitempty"`
	Job     *Job     `json:"job,omitempty"`
	Fetch   *Fetch   `json:"fetch,omitempty"`
	Connect *Connect `json:"connect,omitempty"`
	Push    *Push    `json:"push,omitempty"`
	PR      *PR      `json:"pr,omitempty"`
	Commit  *Commit  `json:"commit,omitempty"`
	Sub     *Sub     `json:"sub,omitempty"`
}

// File is one path an operation touches. Path is relative to the workspace
// directory, slash-separated and clean ("." is the workspace itself). Before and
// After are hex SHA-256 of the content, empty where the file does not exist or
// is only read.
type File struct {
	Path   string `json:"path"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// Command is the argv that is executed, never a string that is split again.
type Command struct {
	Argv   []string          `json:"argv"`
	Script bool              `json:"script,omitempty"` // argv is a shell that was asked for, with its script
	Dir    string            `json:"dir"`              // relative to the workspace
	Env    map[string]string `json:"env,omitempty"`    // beyond the machine's own
	Stdin  string            `json:"stdin_sha256,omitempty"`
	Binary string            `json:"binary"`          // absolute path that argv[0] resolved to
	Files  []File            `json:"files,omitempty"` // workspace files that argv names
	TTY    bool              `json:"tty,omitempty"`
}

// Job is a command that run_bash started before, in the background: its output is
// read, or it is stopped.
type Job struct {
	ID   string `json:"id"`
	Stop bool   `json:"stop,omitempty"`
}

// Fetch is one HTTP request made by the node on the agent's behalf.
type Fetch struct {
	Method  string            `json:"method"`
	URL     string            `json:"url"`
	Host    string            `json:"host"` // lower case, no brackets, no trailing dot
	Port    int               `json:"port"`
	Path    string            `json:"path"`
	Headers map[string]string `json:"headers,omitempty"`
	Body    string            `json:"body_sha256,omitempty"`
	Bytes   int               `json:"body_bytes,omitempty"`
}

// Connect is one connection that a program in the machine opens.
type Connect struct {
	Host string `json:"host"`
	Port int    `json:"port"`
}

// Push moves one ref of a remote. Old is all zeros for a ref that does not exist.
type Push struct {
	Repo   string `json:"repo"`   // the workspace's record of it
	Remote string `json:"remote"` // URL, from the record on the host
	Ref    string `json:"ref"`
	Old    string `json:"old"`
	New    string `json:"new"`
	Drops  bool   `json:"drops,omitempty"` // no fast-forward: commits that the remote's branch has are dropped from it
}

// PR opens a pull request.
type PR struct {
	Repository string `json:"repository"` // OWNER/NAME
	API        string `json:"api"`        // base URL of the forge's API
	Base       string `json:"base"`
	Head       string `json:"head"`
	HeadID     string `json:"head_id"`
	Title      string `json:"title"`
	Body       string `json:"body"`
}

// Commit records staged or named paths of one repository.
type Commit struct {
	Repo    string   `json:"repo"`
	Message string   `json:"message"`
	Paths   []string `json:"paths,omitempty"`
	Name    string   `json:"name"`
	Email   string   `json:"email"`
}

// Sub is what spawn_agent and manage_pods do to the pods below the one that asks.
// A pod that is to be made is here whole: nothing of it is left to who makes it.
type Sub struct {
	Do        SubDo           `json:"do"`
	Pod       string          `json:"pod,omitempty"`       // which; empty for create, spawn and list
	Task      string          `json:"task,omitempty"`      // spawn: the sub-agent's, in full
	Agent     string          `json:"agent,omitempty"`     // spawn: the agent's name
	Policy    json.RawMessage `json:"policy,omitempty"`    // create, spawn: the policy of the new pod, canonical
	Driver    string          `json:"driver,omitempty"`    // create, spawn
	Tier      Tier            `json:"tier,omitempty"`      // create, spawn
	Mode      Mode            `json:"mode,omitempty"`      // create, spawn
	Resources *Resources      `json:"resources,omitempty"` // create, spawn: as they are stated
	Env       []string        `json:"env,omitempty"`       // create, spawn: names of what is handed to its tools
	Repo      string          `json:"repo,omitempty"`      // create, spawn: goes along; fetch: comes back
	Commit    string          `json:"commit,omitempty"`    // of Repo
	Branch    string          `json:"branch,omitempty"`    // create, spawn: whose commit it is; fetch: what it becomes here
	Keep      bool            `json:"keep,omitempty"`      // spawn, wait: the pod stays when its agent has ended
}

// SubDo says what is done to a pod below another.
type SubDo string

// What spawn_agent (spawn) and manage_pods (the others) do.
const (
	SubSpawn  SubDo = "spawn"
	SubCreate SubDo = "create"
	SubList   SubDo = "list"
	SubWait   SubDo = "wait"
	SubFetch  SubDo = "fetch"
	SubDelete SubDo = "delete"
)

// Makes reports whether a pod is made.
func (s SubDo) Makes() bool { return s == SubSpawn || s == SubCreate }

// Salted stands in an action that is shown in the place of the digest of a content. Such a
// digest has no salt: whoever has it can confirm a guess of the content.
const Salted = "[salted]"

// Shown is a with Salted in the place of every digest of a content, and what was left out,
// in order. Git object ids stay: they name what is on a remote.
func (a Action) Shown() (shown Action, left []string) {
	for _, digest := range a.contents() {
		if *digest != "" {
			left = append(left, *digest)
			*digest = Salted
		}
	}
	return a, left
}

// Whole puts back what Shown left out. It is false where left has more or fewer.
func (a Action) Whole(left []string) (whole Action, ok bool) {
	for _, digest := range a.contents() {
		if *digest != Salted {
			continue
		}
		if len(left) == 0 {
			return a, false
		}
		*digest, left = left[0], left[1:]
	}
	return a, len(left) == 0
}

// contents are the places of a, from here on no other action's, that hold the digest of a content.
func (a *Action) contents() []*string {
	places := []*string{&a.Args}
	files := func(list *[]File) {
		*list = slices.Clone(*list)
		for i := range *list {
			places = append(places, &(*list)[i].Before, &(*list)[i].After)
		}
	}
	files(&a.Files)
	if a.Command != nil {
		command := *a.Command
		a.Command = &command
		places = append(places, &command.Stdin)
		files(&command.Files)
	}
	if a.Fetch != nil {
		fetch := *a.Fetch
		a.Fetch = &fetch
		places = append(places, &fetch.Body)
	}
	return places
}

// Salt is the 32 random bytes that go into one request's digests, so that a
// digest shown in a receipt does not give away what it does not show.
type Salt [32]byte

// NewSalt returns fresh random bytes.
func NewSalt() Salt {
	var s Salt
	rand.Read(s[:]) // never fails: crypto/rand ends the program instead
	return s
}

// Digest is the hex SHA-256 of the salt followed by the canonical bytes of the
// action. It is what permit, ask, grant and log entry carry.
func (a Action) Digest(salt Salt) (string, error) {
	canonical, err := Canonical(a)
	if err != nil {
		return "", err
	}
	return ActionDigest(canonical, salt), nil
}

// ActionDigest is Digest of an action of which the canonical bytes are known.
func ActionDigest(canonical []byte, salt Salt) string {
	return SHA256(append(salt[:], canonical...))
}

// SHA256 returns the hex digest of data.
func SHA256(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// NewID returns prefix followed by 26 characters of base32, 130 random bits.
func NewID(prefix string) string { return prefix + rand.Text() }
