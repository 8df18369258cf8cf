package nucleus

// RepoRecord is what a workspace has on record of one repository, a file on the
// host: what a name in a request stands for is looked up here, never in the
// machine's configuration. The node writes it; the person's side reads it.
type RepoRecord struct {
	Path       string            `json:"path"`                  // of the person's repository
	Branch     string            `json:"branch"`                // the agent's
	Base       string            `json:"base"`                  // commit it started from
	PersonBase string            `json:"person_base,omitempty"` // in a pod that an agent asked for: the commit that the person brought
	Trusted    bool              `json:"trusted"`
	BaseBranch string            `json:"base_branch"`          // the person's
	Remotes    map[string]string `json:"remotes"`              // name -> URL, with whatever credentials the person wrote
	Heads      map[string]string `json:"heads,omitempty"`      // branch -> commit of origin, as last known
	Worktree   string            `json:"worktree,omitempty"`   // commit that holds what was not committed, as last fetched
	Head       string            `json:"head,omitempty"`       // the branch, as last fetched
	Pending    bool              `json:"pending,omitempty"`    // it may not be in the machine, or not whole
	Quarantine string            `json:"quarantine,omitempty"` // the bare repository that holds both, beside the record; empty: nothing was fetched
}
