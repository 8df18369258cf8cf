package nucleus

// Places in a machine, the same for every driver: drivers mount them, the proxy
// relies on them.
const (
	MachineProxy     = "/.nucleus/nucleus-tool-proxy" // the tool-proxy's program
	MachineAgent     = "/.nucleus/agent"              // the agent's layers, read-only, by their path in its root
	MachineHome      = "/home/agent"                  // of the tools' user: scratch
	MachineWorkspace = "/home/agent/workspace"        // the only directory of the host that the machine can write
)

// MachineToolsID is the tools' user and group in a machine that has ids of its own.
const MachineToolsID = 1000
