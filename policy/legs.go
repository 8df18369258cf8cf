package policy

import "cal/nucleus"

// Condition says in which machines a row of the leg table holds.
type Condition uint8

// The conditions.
const (
	InAnyMachine  Condition = iota
	UntrustedRepo           // the machine holds a repository labelled untrusted
	DirectNetwork           // the machine has a network that does not pass the gateway
)

var conditionTexts = [...]string{
	"always",
	"in a machine that holds a repository labelled untrusted",
	"in a machine with a network that does not pass the gateway",
}

func (c Condition) String() string { return conditionTexts[c] }

// LegRow says that an operation takes a leg.
type LegRow struct {
	Leg  nucleus.Legs
	Op   nucleus.Op
	When Condition
}

// legTable is the one table of legs: nu, the exposure gate and the documentation
// read it. Beside it stand Start, for what a session has from its first moment,
// and trusted host rules, which count on no leg.
var legTable = []LegRow{
	{nucleus.Private, nucleus.ReadFiles, InAnyMachine},
	{nucleus.Private, nucleus.GlobSearch, InAnyMachine},
	{nucleus.Private, nucleus.GrepSearch, InAnyMachine},
	{nucleus.Private, nucleus.RunBash, InAnyMachine},

	{nucleus.Untrusted, nucleus.WebFetch, InAnyMachine},
	{nucleus.Untrusted, nucleus.WebSearch, InAnyMachine},
	{nucleus.Untrusted, nucleus.NetConnect, InAnyMachine},
	{nucleus.Untrusted, nucleus.ReadFiles, UntrustedRepo},
	{nucleus.Untrusted, nucleus.WriteFiles, UntrustedRepo},
	{nucleus.Untrusted, nucleus.EditFiles, UntrustedRepo},
	{nucleus.Untrusted, nucleus.GlobSearch, UntrustedRepo},
	{nucleus.Untrusted, nucleus.GrepSearch, UntrustedRepo},
	{nucleus.Untrusted, nucleus.RunBash, UntrustedRepo},

	{nucleus.WayOut, nucleus.GitPush, InAnyMachine},
	{nucleus.WayOut, nucleus.CreatePR, InAnyMachine},
	{nucleus.WayOut, nucleus.WebFetch, InAnyMachine},
	{nucleus.WayOut, nucleus.NetConnect, InAnyMachine},
	{nucleus.WayOut, nucleus.RunBash, DirectNetwork},
}

// LegTable returns a copy of the leg table.
func LegTable() []LegRow { return append([]LegRow(nil), legTable...) }

// Start returns the legs that a session has from its first moment. In contained
// mode the agent reads files and runs commands without asking anybody, so it has
// taken what those take.
func Start(c nucleus.Context) nucleus.Legs {
	switch {
	case !c.Contained:
		return 0
	case c.UntrustedRepo:
		return nucleus.Private | nucleus.Untrusted
	}
	return nucleus.Private
}

const ops = 14

// machine is what the leg table depends on beside the operation.
type machine struct{ untrustedRepo, directNetwork bool }

// legs are those that operation i takes in the machine.
func (m machine) legs(i int) nucleus.Legs {
	taken := legsByOp[i][InAnyMachine]
	if m.untrustedRepo {
		taken |= legsByOp[i][UntrustedRepo]
	}
	if m.directNetwork {
		taken |= legsByOp[i][DirectNetwork]
	}
	return taken
}

var legsByOp = func() (table [ops][3]nucleus.Legs) {
	for _, row := range legTable {
		table[opIndex(row.Op)][row.When] |= row.Leg
	}
	return table
}()

// opIndex is the place of an operation in nucleus.Ops, -1 for what is none. A
// switch, because it runs in every decision.
func opIndex(op nucleus.Op) int {
	switch op {
	case nucleus.ReadFiles:
		return 0
	case nucleus.WriteFiles:
		return 1
	case nucleus.EditFiles:
		return 2
	case nucleus.RunBash:
		return 3
	case nucleus.GlobSearch:
		return 4
	case nucleus.GrepSearch:
		return 5
	case nucleus.WebSearch:
		return 6
	case nucleus.WebFetch:
		return 7
	case nucleus.NetConnect:
		return 8
	case nucleus.GitCommit:
		return 9
	case nucleus.GitPush:
		return 10
	case nucleus.CreatePR:
		return 11
	case nucleus.ManagePods:
		return 12
	case nucleus.SpawnAgent:
		return 13
	}
	return -1
}
