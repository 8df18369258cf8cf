package trial

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"cal/nucleus"
	"cal/policy"
)

// arguments are those of the operations' tools that a decision depends on. The
// others of Arguments may stand in a step and are not looked at.
type arguments struct {
	Path   *string  `json:"path"`
	Argv   []string `json:"argv"`
	Script string   `json:"script"`
	Output string   `json:"output"`
	Stop   string   `json:"stop"`
	Dir    string   `json:"dir"`
	Paths  []string `json:"paths"`
	URL    string   `json:"url"`
	Method string   `json:"method"`
	Host   string   `json:"host"`
	Port   int      `json:"port"`
	Action string   `json:"action"`

	Policy json.RawMessage `json:"policy"`
}

// Arguments lists the arguments of each operation that has a tool, net_connect
// included. The list of an operation without one is nil: nothing of it is judged.
func Arguments(op nucleus.Op) []string {
	switch op {
	case nucleus.ReadFiles:
		return []string{"path", "offset", "limit"}
	case nucleus.WriteFiles:
		return []string{"path", "content", "mode"}
	case nucleus.EditFiles:
		return []string{"path", "old", "new", "all"}
	case nucleus.GlobSearch:
		return []string{"pattern", "path"}
	case nucleus.GrepSearch:
		return []string{"pattern", "path", "glob", "context"}
	case nucleus.RunBash:
		return []string{"argv", "script", "dir", "stdin", "timeout_s", "background", "output", "stop"}
	case nucleus.GitCommit:
		return []string{"message", "paths", "repo"}
	case nucleus.GitPush:
		return []string{"branch", "repo"}
	case nucleus.CreatePR:
		return []string{"title", "body", "base", "repo"}
	case nucleus.WebFetch:
		return []string{"url", "method", "headers", "body"}
	case nucleus.NetConnect:
		return []string{"host", "port", "method", "path"}
	case nucleus.SpawnAgent:
		return []string{"task", "wait_s", "keep", "policy", "mode", "driver", "require", "resources", "env", "repo"}
	case nucleus.ManagePods:
		return []string{"action", "pod", "operation", "arguments", "wait_s", "keep", "policy", "mode", "driver", "require", "resources", "env", "repo"}
	}
	return nil
}

// step is one request of a session.
type step struct {
	action     nucleus.Action
	asked      *policy.Policy // of the pod that is asked for; nil: all that the session's policy has
	untrusted  bool           // the machine holds a repository labelled untrusted
	unresolved error          // the arguments stand for nothing; a node denies that before it asks a policy
}

// readStep reads one step of a session. "repo" is the label of the machine's
// repositories where it is "trusted" or "untrusted", and else, for the git
// operations, the argument of that name.
func (e *Evaluator) readStep(raw json.RawMessage) (step, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(raw, &members); err != nil || members == nil {
		return step{}, errors.New("is no object; want for example {\"op\": \"read_files\", \"path\": \"a\"}")
	}
	var name string
	if err := json.Unmarshal(members["op"], &name); err != nil {
		return step{}, errors.New("has no op, or one that is no string")
	}
	s := step{action: nucleus.Action{Op: nucleus.Op(name)}}
	if !s.action.Op.Valid() {
		return s, fmt.Errorf("has the unknown operation %q; want one of %s", name, opNames())
	}
	delete(members, "op")
	known := Arguments(s.action.Op)
	repo, err := takeRepo(members, slices.Contains(known, "repo"))
	if err != nil {
		return s, err
	}
	if s.untrusted = repo == "untrusted"; s.untrusted || repo == "trusted" {
		repo = ""
	}
	for argument := range members {
		if known != nil && !slices.Contains(known, argument) {
			return s, fmt.Errorf("has the unknown argument %q of %s; want op, repo, %s", argument, name, strings.Join(known, ", "))
		}
		if known == nil || !judged[argument] {
			delete(members, argument)
		}
	}
	var args arguments
	rest, err := json.Marshal(members)
	if err == nil {
		err = json.Unmarshal(rest, &args)
	}
	if err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			err = fmt.Errorf("has the argument %q of %s as a JSON %s, want %s", wrong.Field, name, wrong.Value, wrong.Type)
		}
		return s, err
	}
	s.unresolved = e.resolve(&s.action, args, repo)
	if s.action.Op.Delegates() && s.unresolved == nil && len(args.Policy) > 0 && string(args.Policy) != "null" {
		s.asked, s.unresolved = e.policy(args.Policy)
	}
	return s, nil
}

// judged are the names in arguments, without those that no decision reads.
var judged = map[string]bool{
	"path": true, "argv": true, "script": true, "output": true, "stop": true, "dir": true, "paths": true,
	"url": true, "method": true, "host": true, "port": true, "action": true, "policy": true,
}

func takeRepo(members map[string]json.RawMessage, isArgument bool) (string, error) {
	raw, present := members["repo"]
	if !present {
		return "", nil
	}
	delete(members, "repo")
	var repo string
	err := json.Unmarshal(raw, &repo)
	if err != nil || !isArgument && repo != "untrusted" && repo != "trusted" {
		return "", fmt.Errorf("repo is %.80s; want \"untrusted\" or \"trusted\"", raw)
	}
	return repo, nil
}

func opNames() string {
	var names []string
	for _, op := range nucleus.Ops() {
		names = append(names, string(op))
	}
	return strings.Join(names, ", ")
}

// resolve fills in the part of the action that is judged, as far as that is
// possible without a workspace: names are cleaned, links are not followed, and the
// files that an argv names are not known.
func (e *Evaluator) resolve(a *nucleus.Action, args arguments, repo string) (err error) {
	switch a.Op {
	case nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles:
		if args.Path == nil {
			return errors.New("path is missing")
		}
		a.Files = []nucleus.File{{Path: clean(*args.Path)}}
	case nucleus.GlobSearch, nucleus.GrepSearch:
		base := "."
		if args.Path != nil {
			base = orWorkspace(*args.Path)
		}
		a.Files = []nucleus.File{{Path: clean(base)}}
	case nucleus.RunBash:
		return resolveRun(a, args)
	case nucleus.GitCommit:
		a.Commit = &nucleus.Commit{Repo: clean(orWorkspace(repo))}
		for _, name := range args.Paths { // relative to the workspace, as everywhere
			a.Commit.Repo, a.Commit.Paths = ".", append(a.Commit.Paths, clean(name))
		}
	case nucleus.WebFetch:
		var fetch nucleus.Fetch
		if fetch, err = e.Fetch(args.Method, args.URL); err == nil {
			a.Fetch = &fetch
		}
	case nucleus.NetConnect:
		a.Connect = &nucleus.Connect{Host: strings.ToLower(args.Host), Port: args.Port}
		if args.Method != "" || args.Path != nil { // one request in plain HTTP
			if args.Method == "" || args.Path == nil {
				return errors.New("a request in plain HTTP has a method and a path")
			}
			a.Fetch = &nucleus.Fetch{Method: args.Method, Host: a.Connect.Host, Port: args.Port, Path: *args.Path}
		}
	case nucleus.SpawnAgent:
		a.Sub = &nucleus.Sub{Do: nucleus.SubSpawn}
	case nucleus.ManagePods:
		switch do := nucleus.SubDo(args.Action); do {
		case nucleus.SubCreate, nucleus.SubList, nucleus.SubWait, nucleus.SubFetch, nucleus.SubDelete:
			a.Sub = &nucleus.Sub{Do: do}
		default:
			return fmt.Errorf("action %q: want create, list, wait, fetch or delete; what is called in a pod is judged by its own policy", args.Action)
		}
	}
	return err
}

func resolveRun(a *nucleus.Action, args arguments) error {
	forms := 0
	for _, given := range []bool{args.Argv != nil, args.Script != "", args.Output != "", args.Stop != ""} {
		if given {
			forms++
		}
	}
	switch {
	case forms != 1:
		return fmt.Errorf("%d of argv and script are given, want exactly one", forms)
	case args.Output != "" || args.Stop != "":
		a.Job = &nucleus.Job{ID: args.Output + args.Stop, Stop: args.Stop != ""}
	case args.Script != "":
		a.Command = &nucleus.Command{Argv: []string{"bash", "-c", args.Script}, Script: true, Dir: clean(orWorkspace(args.Dir))}
	default:
		a.Command = &nucleus.Command{Argv: args.Argv, Dir: clean(orWorkspace(args.Dir))}
	}
	return nil
}

// clean takes "./a" and "a//b" for what they name. What is absolute or leads out
// of the workspace stays so, and is denied.
func clean(name string) string {
	if name == "" {
		return name
	}
	return path.Clean(name)
}

func orWorkspace(dir string) string {
	if dir == "" {
		return "."
	}
	return dir
}

// judge decides a step on what the session has taken so far, and returns what it
// has taken afterwards: an ask counts as granted, a denial takes nothing.
func (s step) judge(p *policy.Policy, c nucleus.Context) (nucleus.Decision, nucleus.Legs) {
	if s.unresolved != nil && p.Level(s.action.Op) != policy.Never {
		return nucleus.Decision{Verdict: nucleus.Deny, Rule: "resolve", Why: s.unresolved.Error()}, c.Exposure
	}
	c.UntrustedRepo = s.untrusted
	d := p.Decide(s.actionUnder(p), c)
	return d, after(c.Exposure, d)
}

// actionUnder is the action with the policy that a pod asked for under p would get.
func (s step) actionUnder(p *policy.Policy) nucleus.Action {
	if s.action.Sub == nil || !s.action.Sub.Do.Makes() {
		return s.action
	}
	a, sub := s.action, *s.action.Sub
	var err error
	if sub.Policy, err = policy.Delegate(p, s.asked).Canonical(); err != nil {
		sub.Policy = nil // denied: what cannot be written cannot be had
	}
	a.Sub = &sub
	return a
}

// after is the exposure once a decision has been carried out.
func after(exposure nucleus.Legs, d nucleus.Decision) nucleus.Legs {
	if d.Verdict == nucleus.Allow || d.Verdict == nucleus.Ask {
		return exposure | d.Takes
	}
	return exposure
}
