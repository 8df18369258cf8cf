// Package tools is the hand of the machine: it reads and writes the files of
// the workspace and runs its commands.
//
// Who calls it is a model, and what lies in the workspace may have been written
// by a stranger: paths, links and commands are hostile. The package promises that a
// file operation touches nothing outside the workspace, that a command's argv is
// executed as given, and that output, time and processes of a command are
// bounded. It decides nothing: package guest has verified the permit before.
package tools

import (
	"encoding/json"

	"cal/nucleus"
)

// Stream kinds between proxy and tools worker. Each stream carries one call; what is
// brief (see Brief) goes without a stream.
//
//	"resolve"  header Call            -> FrameResult Resolved
//	"do"       header Call, FrameJSON args -> FrameStdout/FrameStderr*, FrameResult Result
//	"bundle"   header Bundle          -> FrameData*, FrameData empty, FrameResult Result    (repository out)
//	"jobs"     -> FrameJSON JobState at once and at each change; FrameSignal ends all background commands
//	"unbundle" header Unbundle, FrameData*, FrameData empty -> FrameResult Result          (repository in)
//	"incoming" header Incoming, FrameData*, FrameData empty -> FrameResult Result          (branch into a repository)
//
// The proxy is wire.Host of the session, the worker wire.Guest. For "resolve" the
// arguments follow as FrameJSON too. While a "do" of run_bash runs, the caller may send
// FrameSize, FrameSignal and, where Stdin or Terminal is set, FrameStdin; closing
// the stream ends the call and kills the command with all that it started, so a
// caller keeps it open until the result. A "bundle" that fails sends no empty
// FrameData.
//
// BUG: a caller that sends more input than the command takes is held back after
// 4 MiB, and what it sends behind that, signals and the stream's end too, is not
// seen before the command takes more or ends.
const (
	StreamResolve  = "resolve"
	StreamDo       = "do"
	StreamBundle   = "bundle"
	StreamJobs     = "jobs"
	StreamUnbundle = "unbundle"
	StreamIncoming = "incoming"
)

// JobState says whether a background command runs.
type JobState struct {
	Running bool `json:"running"`
}

// MaxArgs is the largest argument document in bytes: a request body's limit.
const MaxArgs = 16 << 20

// Call is the header of "resolve" and "do". For "do", Action is what was
// permitted; when the workspace no longer resolves to it, the call is refused
// with kind "conflict" and nothing happens.
type Call struct {
	Op       nucleus.Op       `json:"op"`
	Action   *nucleus.Action  `json:"-"`
	Terminal bool             `json:"terminal,omitempty"` // run_bash on a PTY
	Rows     uint16           `json:"rows,omitempty"`
	Cols     uint16           `json:"cols,omitempty"`
	Stream   bool             `json:"stream,omitempty"`   // run_bash: send output as it comes and do not keep it
	Stdin    bool             `json:"stdin,omitempty"`    // run_bash: stdin comes as FrameStdin
	Standing bool             `json:"standing,omitempty"` // "resolve" of write_files, edit_files: what the file holds is wanted too
	Identity nucleus.Identity `json:"identity"`           // for git_commit
}

// Args is the FrameJSON that follows a Call's header.
type Args struct {
	Args   json.RawMessage `json:"args"`
	Action *nucleus.Action `json:"action,omitempty"` // for "do"
}

// Resolved answers "resolve".
type Resolved struct {
	Action   *nucleus.Action `json:"action,omitempty"`
	Standing []byte          `json:"standing_b64,omitempty"` // what the file holds that would be changed; nil where it is too long
	Error    *nucleus.Error  `json:"error,omitempty"`
}

// Result ends a call. Exactly one of Value and Error is present. Value is the
// tool's own result document.
type Result struct {
	Value    json.RawMessage `json:"value,omitempty"`
	Error    *nucleus.Error  `json:"error,omitempty"`
	ExitCode int             `json:"exit_code,omitempty"`
}

// Bundle asks for a git bundle of Ref in Repo without what Base reaches (Base may be empty).
type Bundle struct {
	Repo string `json:"repo"`
	Ref  string `json:"ref"`
	Base string `json:"base,omitempty"`
}

// Unbundle puts a git bundle into Repo, which is not there or an empty directory, as that
// of a submodule is: a new repository is made, Branch is created at Commit and
// checked out. Remotes are written as names without credentials so that the agent
// sees where the code came from. Replace takes away what an Unbundle that was cut off
// has left there.
type Unbundle struct {
	Repo    string            `json:"repo"`
	Branch  string            `json:"branch"`
	Commit  string            `json:"commit"`
	Replace bool              `json:"replace,omitempty"`
	Shallow []string          `json:"shallow,omitempty"` // commits of its history whose parents are not in the bundle
	Remotes map[string]string `json:"remotes,omitempty"`
	Config  map[string]string `json:"config,omitempty"` // git settings to write, e.g. user.name
}

// Incoming puts a pack into Repo, which is there, and makes or moves Branch to Commit. The
// pack holds what Base does not reach. A branch that is checked out, or that would lose commits,
// is left alone.
type Incoming struct {
	Repo   string `json:"repo"`
	Branch string `json:"branch"`
	Commit string `json:"commit"`
	Base   string `json:"base"`
}
