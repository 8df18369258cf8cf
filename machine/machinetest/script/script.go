// Package script is what a test and the test guest say to each other over the
// wire: one JSON value an action, one a reply.
package script

// Action is one thing that the guest shall try. UID is the user that tries it,
// without capabilities; -1 is the guest's init as it is.
type Action struct {
	Do   string   `json:"do"`
	Path string   `json:"path,omitempty"`
	Data string   `json:"data,omitempty"`
	Args []string `json:"args,omitempty"`
	N    int      `json:"n,omitempty"`
	UID  int      `json:"uid"`
}

// Reply says what came of it. Err is empty where it succeeded.
type Reply struct {
	Data string `json:"data,omitempty"`
	Err  string `json:"err,omitempty"`
}

// Proof is the Data of the first action on a wire that was handed in later.
const Proof = "it is I"
