package guest

import (
	"fmt"
	"strings"

	"cal/nucleus"
)

// The loopback endpoints. SOCKS and HTTP proxy listen in the tools' network
// namespace, MCP and model in the agent's.
const (
	SOCKSAddr = "127.0.0.1:1080"
	ProxyAddr = "127.0.0.1:8080"
	MCPAddr   = "127.0.0.1:7001"
	ModelAddr = "127.0.0.1:7002"
	MCPURL    = "http://" + MCPAddr + "/mcp"
	ModelURL  = "http://" + ModelAddr
	dnsAddr   = "127.0.0.1:53"
)

// Config is Boot.Guest: what the proxy must know of its machine.
type Config struct {
	ToolsUID int               `json:"tools_uid"`
	ToolsGID int               `json:"tools_gid"`
	AgentUID int               `json:"agent_uid"`
	AgentGID int               `json:"agent_gid"`
	Mode     nucleus.Mode      `json:"mode"`
	Env      map[string]string `json:"env,omitempty"`    // of the tools
	Layers   []AgentLayer      `json:"layers,omitempty"` // of the agent's own root
	Identity nucleus.Identity  `json:"identity"`
	MaxPids  int               `json:"max_pids,omitempty"`   // tasks of each user
	Sync     bool              `json:"sync,omitempty"`       // the workspace after each call that may have changed it, before its outcome is signed
	WaitAsk  int               `json:"wait_ask_s,omitempty"` // how long an MCP call waits for a person
}

// AgentLayer shows Source, a place in the machine, read-only at Path of the
// agent's root.
type AgentLayer struct {
	Source string `json:"source"`
	Path   string `json:"path"`
}

func (c Config) check() error {
	if c.AgentUID == c.ToolsUID || c.AgentUID == 0 {
		return fmt.Errorf("agent uid %d is the tools' (%d) or root's", c.AgentUID, c.ToolsUID)
	}
	if c.Mode != nucleus.Mediated && c.Mode != nucleus.Contained {
		return fmt.Errorf("unknown mode %q", c.Mode)
	}
	for _, l := range c.Layers {
		if !strings.HasPrefix(l.Source, nucleus.MachineAgent+"/") || !strings.HasPrefix(l.Path, "/") || strings.Contains(l.Path, "/../") {
			return fmt.Errorf("layer %s at %s: outside %s", l.Source, l.Path, nucleus.MachineAgent)
		}
	}
	return nil
}

// Stream kinds between node and proxy.
const (
	StreamBoot   = "boot"   // node: FrameJSON nucleus.Boot -> FrameJSON nucleus.BootReply
	StreamCall   = "call"   // node: header Call; see call.go
	StreamRepo   = "repo"   // node: header RepoCall; spliced to the worker's bundle or unbundle
	StreamAgent  = "agent"  // node: header AgentStart; a terminal or pipes until FrameResult
	StreamAttach = "attach" // node: header AgentAttach; joins the running agent
	StreamWatch  = "watch"  // node: FrameJSON WorkState <- at once and at each change; FrameSignal -> the agent, and ends background commands
	StreamAPI    = "api"    // proxy: one HTTP connection to the node's API
	StreamSOCKS  = "socks"  // proxy: header Connection; one SOCKS5 connection
	StreamHTTP   = "http"   // proxy: header Connection; one HTTP proxy connection
	StreamSign   = "sign"   // node: header SignCall -> FrameResult SignReply; see witness.go
	StreamModel  = "model"  // proxy: one connection to the model route
	StreamProof  = "proof"  // proxy, first on a new wire: nonce -> node's signature
)

// AgentStart is the header of an agent stream; AgentProgram follows as FrameJSON.
type AgentStart struct {
	Start int64  `json:"start,omitempty"` // of the entry that recorded the start: names this run
	TTY   bool   `json:"tty,omitempty"`
	Rows  uint16 `json:"rows,omitempty"`
	Cols  uint16 `json:"cols,omitempty"`
}

// AgentProgram is what runs in the session. Home is what lies in the agent's HOME, by
// path below it; what lies in its working directory is a read-only copy.
type AgentProgram struct {
	Argv []string          `json:"argv"`
	Env  map[string]string `json:"env,omitempty"`
	Home map[string][]byte `json:"home,omitempty"`
}

// WorkState says what runs in the machine that no call of the node waits for.
type WorkState struct {
	Agent bool       `json:"agent"`
	Jobs  bool       `json:"jobs"`           // background commands
	Exit  *AgentExit `json:"exit,omitempty"` // of the agent that ran last
}

// WorkDir is the agent's working directory, below its HOME.
const WorkDir = "work"

// AgentExit is the FrameResult of an agent stream.
type AgentExit struct {
	Start    int64          `json:"start,omitempty"` // as in AgentStart, of a run that has ended
	ExitCode int            `json:"exit_code"`
	Error    *nucleus.Error `json:"error,omitempty"`
	Refused  bool           `json:"refused,omitempty"` // the stream asked for a start, and none was made
}
