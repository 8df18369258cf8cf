package nucleus

import "fmt"

// Op names one operation. There are 14; a name that is not among them is an
// error wherever it is read, never ignored.
type Op string

// The operations.
const (
	ReadFiles  Op = "read_files"
	WriteFiles Op = "write_files"
	EditFiles  Op = "edit_files"
	RunBash    Op = "run_bash"
	GlobSearch Op = "glob_search"
	GrepSearch Op = "grep_search"
	WebSearch  Op = "web_search"
	WebFetch   Op = "web_fetch"
	NetConnect Op = "net_connect" // a connection that a program in the machine opens
	GitCommit  Op = "git_commit"
	GitPush    Op = "git_push"
	CreatePR   Op = "create_pr"
	ManagePods Op = "manage_pods"
	SpawnAgent Op = "spawn_agent"
)

// Ops lists every operation in the order of the documentation. The caller may
// keep and change the slice.
func Ops() []Op {
	return []Op{
		ReadFiles, WriteFiles, EditFiles, RunBash, GlobSearch, GrepSearch, WebSearch,
		WebFetch, NetConnect, GitCommit, GitPush, CreatePR, ManagePods, SpawnAgent,
	}
}

// Valid reports whether o is one of the 14 operations.
func (o Op) Valid() bool {
	for _, known := range Ops() {
		if o == known {
			return true
		}
	}
	return false
}

// OnHost reports whether o takes effect on the host: the machine admits it, and the
// node acts.
func (o Op) OnHost() bool {
	switch o {
	case GitPush, CreatePR, WebFetch, ManagePods, SpawnAgent:
		return true
	}
	return false
}

// Delegates reports whether o is about the pods below the one that asks.
func (o Op) Delegates() bool { return o == ManagePods || o == SpawnAgent }

// UnmarshalText refuses names that are not operations.
func (o *Op) UnmarshalText(text []byte) error {
	if !Op(text).Valid() {
		return fmt.Errorf("unknown operation %q", text)
	}
	*o = Op(text)
	return nil
}

// Legs is a set of legs of the lethal trifecta. It only ever grows within a
// session.
type Legs uint8

// The three legs.
const (
	Private   Legs = 1 << iota // data of the person has been read
	Untrusted                  // content that a stranger may have written has been read
	WayOut                     // something may have left the machine
)

var legNames = []struct {
	leg  Legs
	name string
}{{Private, "private"}, {Untrusted, "untrusted"}, {WayOut, "way_out"}}

// Has reports whether every leg of other is in l.
func (l Legs) Has(other Legs) bool { return l&other == other }

// Names lists the legs of l in fixed order; empty, never nil, for none.
func (l Legs) Names() []string {
	names := []string{}
	for _, n := range legNames {
		if l.Has(n.leg) {
			names = append(names, n.name)
		}
	}
	return names
}

// LegsOf is the inverse of Names.
func LegsOf(names []string) (Legs, error) {
	var l Legs
next:
	for _, name := range names {
		for _, n := range legNames {
			if n.name == name {
				l |= n.leg
				continue next
			}
		}
		return 0, fmt.Errorf("unknown leg %q; want private, untrusted or way_out", name)
	}
	return l, nil
}
