package tools

import (
	"encoding/json"
	"strings"

	"cal/nucleus"
)

// Tool is one tool as an agent sees it. InputSchema is a JSON Schema object
// that admits no other properties.
type Tool struct {
	Name        string
	Description string
	InputSchema json.RawMessage
}

// Names of the tools that are no operation of their own.
const (
	BashOutput = "bash_output"
	BashStop   = "bash_stop"
)

// Describe lists the tools in the order in which agents should see them.
func Describe() []Tool {
	return []Tool{
		{string(nucleus.ReadFiles), `Read a text file or an image (png, jpeg, gif, webp up to 3.75 MiB) of the workspace. Text comes as up to 2000 lines or 256 KiB; use offset (first line, from 1) and limit for the rest. Other binary files are refused.`,
			schema("path", `"path":{"type":"string","description":"relative to the workspace, or absolute below it"},"offset":{"type":"integer","minimum":0,"description":"first line to show, counted from 1"},"limit":{"type":"integer","minimum":0,"description":"number of lines"}`)},
		{string(nucleus.WriteFiles), `Create or replace a file of the workspace in one step. Missing directories are made. An existing file keeps its permissions unless mode is given.`,
			schema("path content", `"path":{"type":"string"},"content":{"type":"string","description":"the whole new content"},"mode":{"type":"string","pattern":"^[0-7]{3,4}$","description":"octal permissions such as 0755"}`)},
		{string(nucleus.EditFiles), `Replace text in a file of the workspace. "old" must match exactly, line ends and indentation included, and occur once; with "all" every occurrence is replaced.`,
			schema("path old new", `"path":{"type":"string"},"old":{"type":"string","description":"the exact text to replace"},"new":{"type":"string"},"all":{"type":"boolean"}`)},
		{string(nucleus.GlobSearch), `List files by pattern (*, **, ?, [...], {a,b}), sorted by path, at most 1000. The pattern is relative to path. .git is left out and links are not followed.`,
			schema("pattern", `"pattern":{"type":"string","description":"for example **/*.go"},"path":{"type":"string","description":"directory to search, default the workspace"}`)},
		{string(nucleus.GrepSearch), `Search file contents line by line with an RE2 regular expression; at most 500 matches. Binary files, files over 8 MiB and .git are left out; the result says how many.`,
			schema("pattern", `"pattern":{"type":"string","description":"RE2; (?i) ignores case"},"path":{"type":"string","description":"file or directory, default the workspace"},"glob":{"type":"string","description":"only files that match, for example *.go or src/**/*.ts"},"context":{"type":"integer","minimum":0,"maximum":20,"description":"lines shown before and after a match"}`)},
		{string(nucleus.RunBash), `Run a command in the machine: "argv" is executed as given, "script" is run by a shell; give exactly one. Output is kept up to 256 KiB per stream (start and end; the middle is cut and the cut is stated). The timeout is 120 s unless timeout_s is given. What the command leaves running is ended with it; use background for servers, then bash_output and bash_stop.`,
			schema("", `"argv":{"type":"array","items":{"type":"string"},"minItems":1},"script":{"type":"string"},"dir":{"type":"string","description":"working directory, default the workspace"},"stdin":{"type":"string"},"timeout_s":{"type":"integer","minimum":0,"maximum":86400},"background":{"type":"boolean","description":"return an id at once"}`)},
		{BashOutput, `Return what a background command has written since the last call, and whether it still runs.`,
			schema("id", `"id":{"type":"string","description":"from run_bash"}`)},
		{BashStop, `End a background command and everything it started, and return its last output.`,
			schema("id", `"id":{"type":"string","description":"from run_bash"}`)},
		{string(nucleus.GitCommit), `Commit in a repository of the workspace under the person's name. With paths (relative to the workspace) exactly these are committed; without, what is staged, or everything changed when nothing is staged.`,
			schema("message", `"message":{"type":"string"},"paths":{"type":"array","items":{"type":"string"}},"repo":{"type":"string","description":"directory of the repository; needed where the workspace has several"}`)},
		{string(nucleus.GitPush), `Push a local branch to the repository's remote. It takes place on the host and may need an approval.`,
			schema("branch", `"branch":{"type":"string"},"repo":{"type":"string","description":"directory of the repository; needed where the workspace has several"}`)},
		{string(nucleus.CreatePR), `Open a pull request for the pushed branch. It takes place on the host and may need an approval.`,
			schema("title body", `"title":{"type":"string"},"body":{"type":"string"},"base":{"type":"string","description":"branch to merge into, default the repository's"},"repo":{"type":"string","description":"directory of the repository; needed where the workspace has several"}`)},
		{string(nucleus.WebFetch), `Make one HTTP request from the host. Policy decides which addresses; it may need an approval.`,
			schema("url", `"url":{"type":"string"},"method":{"type":"string","description":"default GET"},"headers":{"type":"object","additionalProperties":{"type":"string"}},"body":{"type":"string"}`)},
		{string(nucleus.SpawnAgent), `Start a sub-agent of your own kind on a task, in a machine of its own, and wait for it. It gets the commits of your branch (not what is uncommitted), never more rights than you, and its budget out of yours. Its branch comes back into your repository as cal/sub/POD. If the state is "running", wait on with manage_pods.`,
			schema("task", `"task":{"type":"string","description":"all that it is told"},`+waitSchema+newPodSchema)},
		{string(nucleus.ManagePods), `Pods below your own: machines with the commits of your branch and never more rights than you have. create makes one without an agent, list shows them, call runs one of these tools in it, wait waits for a sub-agent, fetch brings a pod's branch into your repository as cal/sub/POD, delete ends it.`,
			schema("action", `"action":{"type":"string","enum":["create","list","call","wait","fetch","delete"]},"pod":{"type":"string","description":"id of the pod, for all but create and list"},"operation":{"type":"string","description":"call: the tool, for example run_bash"},"arguments":{"type":"object","description":"call: the tool's arguments"},`+waitSchema+newPodSchema)},
	}
}

// The arguments that spawn_agent and manage_pods share.
const (
	waitSchema   = `"wait_s":{"type":"integer","minimum":0,"maximum":50,"description":"how long to wait for the sub-agent, default 50"},"keep":{"type":"boolean","description":"keep the pod when its sub-agent has ended"},`
	newPodSchema = `"policy":{"description":"the new pod's policy: a profile's name, or a policy in which what is left out is not allowed; it is met with yours. Default: yours","type":["string","object"]},"mode":{"type":"string","enum":["mediated","contained"]},"driver":{"type":"string"},"require":{"type":"string","enum":["vm","kernel"]},"resources":{"type":"object","additionalProperties":false,"properties":{"cpu":{"type":"integer"},"memory_mb":{"type":"integer"},"pids":{"type":"integer"},"disk_mb":{"type":"integer"}},"description":"at most yours"},"env":{"type":"array","items":{"type":"string"},"description":"names of your variables to hand on, default all"},"repo":{"type":"string","description":"repository that goes along or comes back; needed where the workspace has several"}`
)

func schema(required, properties string) json.RawMessage {
	names, _ := json.Marshal(strings.Fields(required)) // strings marshal
	return json.RawMessage(`{"type":"object","additionalProperties":false,"required":` + string(names) + `,"properties":{` + properties + askSchema + `}}`)
}

// askSchema is an argument of every tool: any of them can need an approval.
const askSchema = `,"ask":{"type":"string","description":"only after approval_required: its ask id, with the same arguments, to wait on"}`

// Continued takes the id of the ask that a call goes on waiting for out of its arguments;
// empty where it names none. The rest are the arguments.
func Continued(args json.RawMessage) (ask string, rest json.RawMessage, err error) {
	var given map[string]json.RawMessage
	if json.Unmarshal(args, &given) != nil || given["ask"] == nil {
		return "", args, nil // what is wrong with it is said where it is read
	}
	// Two of a name would be one of them below.
	if _, err := nucleus.CanonicalJSON(args); err != nil {
		return "", nil, nucleus.Errorf(nucleus.KindInvalid, "arguments: %v", err)
	}
	if err := json.Unmarshal(given["ask"], &ask); err != nil {
		return "", nil, nucleus.Errorf(nucleus.KindInvalid, `argument "ask": want the id of an ask`)
	}
	delete(given, "ask")
	rest, err = json.Marshal(given)
	return ask, rest, err
}

// Operation turns a tool's name and arguments into the operation that policy
// knows and its arguments. bash_output and bash_stop {"id": ID} become run_bash
// {"output": ID} and {"stop": ID}; everything else stays as it is.
func Operation(tool string, args json.RawMessage) (nucleus.Op, json.RawMessage, error) {
	if len(args) == 0 {
		args = json.RawMessage("{}")
	}
	if tool != BashOutput && tool != BashStop {
		op := nucleus.Op(tool)
		if _, err := Decode(op, args); err != nil {
			return "", nil, err
		}
		return op, args, nil
	}
	decoded, err := decode[jobArgs](nucleus.RunBash, args)
	if err != nil {
		return "", nil, err
	}
	run := RunArgs{Output: decoded.(jobArgs).ID}
	if tool == BashStop {
		run = RunArgs{Stop: decoded.(jobArgs).ID}
	}
	args, err = json.Marshal(run)
	return nucleus.RunBash, args, err
}

type jobArgs struct {
	ID string `json:"id"`
}

func (a jobArgs) check() error {
	if a.ID == "" {
		return invalid(nucleus.RunBash, `argument "id" is empty`)
	}
	return nil
}
