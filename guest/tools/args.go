package tools

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"reflect"
	"regexp"
	"slices"
	"sort"
	"strings"
	"time"

	"cal/nucleus"
)

// Limits of arguments. All are stated in the tools' descriptions or in the error
// that names them.
const (
	maxArgv    = 1 << 20 // bytes of one command's argv
	maxPattern = 512     // bytes of a glob
	maxRegexp  = 4096    // bytes of a regular expression
	maxContext = 20      // lines around a match
)

// ReadArgs are the arguments of read_files. Offset is the first line to show,
// counted from 1; Limit is how many.
type ReadArgs struct {
	Path   string `json:"path"`
	Offset int    `json:"offset,omitempty"`
	Limit  int    `json:"limit,omitempty"`
}

// WriteArgs are the arguments of write_files. Mode is octal permission bits
// ("0755"); empty keeps those of the existing file.
type WriteArgs struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    string `json:"mode,omitempty"`
}

// EditArgs are the arguments of edit_files: Old, which must occur exactly once
// unless All is set, becomes New.
type EditArgs struct {
	Path string `json:"path"`
	Old  string `json:"old"`
	New  string `json:"new"`
	All  bool   `json:"all,omitempty"`
}

// GlobArgs are the arguments of glob_search. Pattern is relative to Path.
type GlobArgs struct {
	Pattern string `json:"pattern"`
	Path    string `json:"path,omitempty"`
}

// GrepArgs are the arguments of grep_search. Pattern is an RE2 expression; Glob
// filters files, by base name where it holds no slash.
type GrepArgs struct {
	Pattern string `json:"pattern"`
	Path    string `json:"path,omitempty"`
	Glob    string `json:"glob,omitempty"`
	Context int    `json:"context,omitempty"`
}

// RunArgs are the arguments of run_bash: exactly one of Argv (executed as
// given), Script (run by a shell), Output and Stop. The last two hold the id of a
// background command; they are what bash_output and bash_stop become.
type RunArgs struct {
	Argv       []string `json:"argv,omitempty"`
	Script     string   `json:"script,omitempty"`
	Dir        string   `json:"dir,omitempty"`
	Stdin      string   `json:"stdin,omitempty"`
	TimeoutS   int      `json:"timeout_s,omitempty"`
	Background bool     `json:"background,omitempty"`
	Output     string   `json:"output,omitempty"`
	Stop       string   `json:"stop,omitempty"`
}

// CommitArgs are the arguments of git_commit. Paths are relative to the
// workspace, as everywhere.
type CommitArgs struct {
	Message string   `json:"message"`
	Paths   []string `json:"paths,omitempty"`
	Repo    string   `json:"repo,omitempty"`
}

// PushArgs are the arguments of git_push; its effect is on the host.
type PushArgs struct {
	Branch string `json:"branch"`
	Repo   string `json:"repo,omitempty"`
}

// PRArgs are the arguments of create_pr; its effect is on the host.
type PRArgs struct {
	Title string `json:"title"`
	Body  string `json:"body"`
	Base  string `json:"base,omitempty"`
	Repo  string `json:"repo,omitempty"`
}

// FetchArgs are the arguments of web_fetch; its effect is on the host.
type FetchArgs struct {
	URL     string            `json:"url"`
	Method  string            `json:"method,omitempty"`
	Headers map[string]string `json:"headers,omitempty"`
	Body    string            `json:"body,omitempty"`
}

// NewPod says how the pod that spawn_agent or manage_pods asks for differs from the one that
// asks: it can only have less. There is no argument for image, network, credentials or a
// path of the host.
type NewPod struct {
	Policy    json.RawMessage `json:"policy,omitempty"`    // a profile's name or a whole policy; absent: all that the asking pod has
	Mode      string          `json:"mode,omitempty"`      // absent: as the asking pod
	Driver    string          `json:"driver,omitempty"`    // absent: as the asking pod
	Require   string          `json:"require,omitempty"`   // the tier that is wanted at least
	Resources json.RawMessage `json:"resources,omitempty"` // a nucleus.Resources; absent: as the asking pod
	Env       *[]string       `json:"env,omitempty"`       // names of what is handed on; absent: all
	Repo      string          `json:"repo,omitempty"`      // goes along; may be left out where there is one
}

// MaxTask is the longest task of a sub-agent, in bytes.
const MaxTask = 32 << 10

// MaxWait is the longest wait for a sub-agent in one call, in seconds: agents cut longer calls off.
const MaxWait = 50

// SpawnArgs are the arguments of spawn_agent; its effect is on the host.
type SpawnArgs struct {
	Task  string `json:"task"`
	WaitS *int   `json:"wait_s,omitempty"` // absent: MaxWait
	Keep  bool   `json:"keep,omitempty"`
	NewPod
}

// PodsArgs are the arguments of manage_pods; its effect is on the host. What a pod is made
// with belongs to "create" alone. "call" is never carried out as manage_pods: the machine's
// proxy asks the node for Operation in Pod.
type PodsArgs struct {
	Action    string          `json:"action"`
	Pod       string          `json:"pod,omitempty"`
	WaitS     *int            `json:"wait_s,omitempty"` // of "wait"; absent: MaxWait
	Keep      bool            `json:"keep,omitempty"`   // of "wait"
	Operation string          `json:"operation,omitempty"`
	Arguments json.RawMessage `json:"arguments,omitempty"`
	NewPod
}

// SubCall is the action of manage_pods by which an agent calls a tool in a pod below its own.
const SubCall = "call"

// Decode turns the argument document of an operation into its struct (ReadArgs,
// WriteArgs, ...). It refuses, naming the argument, what is unknown, missing, of
// the wrong type or out of range, and a document that has no canonical form. An
// optional argument that is null counts as absent. Every error is a
// *nucleus.Error.
func Decode(op nucleus.Op, raw json.RawMessage) (any, error) {
	switch op {
	case nucleus.ReadFiles:
		return decode[ReadArgs](op, raw)
	case nucleus.WriteFiles:
		return decode[WriteArgs](op, raw)
	case nucleus.EditFiles:
		return decode[EditArgs](op, raw)
	case nucleus.GlobSearch:
		return decode[GlobArgs](op, raw)
	case nucleus.GrepSearch:
		return decode[GrepArgs](op, raw)
	case nucleus.RunBash:
		return decode[RunArgs](op, raw)
	case nucleus.GitCommit:
		return decode[CommitArgs](op, raw)
	case nucleus.GitPush:
		return decode[PushArgs](op, raw)
	case nucleus.CreatePR:
		return decode[PRArgs](op, raw)
	case nucleus.WebFetch:
		return decode[FetchArgs](op, raw)
	case nucleus.SpawnAgent:
		return decode[SpawnArgs](op, raw)
	case nucleus.ManagePods:
		return decode[PodsArgs](op, raw)
	}
	return nil, invalid(op, "operation %q has no tool", op)
}

func invalid(op nucleus.Op, format string, args ...any) *nucleus.Error {
	e := nucleus.Errorf(nucleus.KindInvalid, format, args...)
	e.Operation = op
	return e
}

func decode[T interface{ check() error }](op nucleus.Op, raw json.RawMessage) (any, error) {
	var args T
	if len(raw) > MaxArgs {
		e := invalid(op, "arguments of %d bytes, at most %d", len(raw), MaxArgs)
		e.Kind = nucleus.KindTooLarge
		return nil, e
	}
	canonical, err := nucleus.CanonicalJSON(raw)
	if err != nil {
		return nil, invalid(op, "arguments: %v", err)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(canonical, &members); err != nil || members == nil {
		return nil, invalid(op, "arguments are not a JSON object")
	}
	if err := checkMembers(reflect.TypeFor[T](), members); err != nil {
		return nil, invalid(op, "%v", err)
	}
	if err := json.Unmarshal(canonical, &args); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return nil, invalid(op, "argument %q is a JSON %s, want %s", wrong.Field, wrong.Value, wrong.Type)
		}
		return nil, invalid(op, "arguments: %v", err)
	}
	if err := args.check(); err != nil {
		e := nucleus.AsError(err)
		if e.Kind == nucleus.KindInternal {
			e = invalid(op, "%v", err)
		}
		e.Operation = op
		return nil, e
	}
	return args, nil
}

// checkMembers compares names exactly: encoding/json would also take "Path" for
// "path".
func checkMembers(t reflect.Type, members map[string]json.RawMessage) error {
	known := map[string]bool{}
	for _, field := range reflect.VisibleFields(t) {
		if field.Anonymous { // its fields are visible themselves
			continue
		}
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		known[name] = true
		value, present := members[name]
		if present && !bytes.Equal(value, []byte("null")) {
			continue
		}
		if options != "omitempty" {
			return fmt.Errorf("argument %q is missing", name)
		}
	}
	var unknown []string
	for name := range members {
		if !known[name] {
			unknown = append(unknown, name)
		}
	}
	if len(unknown) > 0 {
		sort.Strings(unknown)
		return fmt.Errorf("unknown argument %q", unknown[0])
	}
	return nil
}

func (a ReadArgs) check() error {
	if a.Offset < 0 || a.Limit < 0 {
		return fmt.Errorf("offset %d, limit %d: want 1 or more", a.Offset, a.Limit)
	}
	return checkPath("path", a.Path)
}

func (a WriteArgs) check() error {
	if _, err := a.mode(); err != nil {
		return err
	}
	return checkPath("path", a.Path)
}

// mode returns the permission bits, or 0 where none are given.
func (a WriteArgs) mode() (uint32, error) {
	if a.Mode == "" {
		return 0, nil
	}
	var mode uint32
	for _, digit := range a.Mode {
		if digit < '0' || digit > '7' || len(a.Mode) > 4 {
			return 0, fmt.Errorf("mode %q is not an octal number such as 0644", a.Mode)
		}
		mode = mode<<3 | uint32(digit-'0')
	}
	if mode > 0o777 || mode&0o400 == 0 {
		return 0, fmt.Errorf("mode %q: want 0400 to 0777, readable by its owner", a.Mode)
	}
	return mode, nil
}

func (a EditArgs) check() error {
	switch a.Old {
	case "":
		return errors.New(`argument "old" is empty: use write_files for a new file`)
	case a.New:
		return errors.New(`arguments "old" and "new" are equal`)
	}
	return checkPath("path", a.Path)
}

func (a GlobArgs) check() error {
	if a.Pattern == "" {
		return errors.New(`argument "pattern" is empty`)
	}
	if err := checkGlob("pattern", a.Pattern); err != nil {
		return err
	}
	return checkOptionalPath("path", a.Path)
}

func (a GrepArgs) check() error {
	if a.Pattern == "" || len(a.Pattern) > maxRegexp {
		return fmt.Errorf(`argument "pattern" has %d bytes, want 1 to %d`, len(a.Pattern), maxRegexp)
	}
	if _, err := compileGrep(a.Pattern); err != nil {
		return fmt.Errorf(`argument "pattern": %v`, err)
	}
	if a.Context < 0 || a.Context > maxContext {
		return fmt.Errorf("context %d: want 0 to %d", a.Context, maxContext)
	}
	if err := checkGlob("glob", a.Glob); err != nil {
		return err
	}
	return checkOptionalPath("path", a.Path)
}

func (a RunArgs) check() error {
	forms := 0
	for _, given := range []bool{a.Argv != nil, a.Script != "", a.Output != "", a.Stop != ""} {
		if given {
			forms++
		}
	}
	if forms != 1 {
		return fmt.Errorf(`%d of "argv" and "script" are given, want exactly one`, forms)
	}
	if a.Output != "" || a.Stop != "" {
		if a.Dir != "" || a.Stdin != "" || a.TimeoutS != 0 || a.Background {
			return errors.New(`"output" and "stop" stand alone`)
		}
		return nil
	}
	if a.Argv != nil && (len(a.Argv) == 0 || a.Argv[0] == "") {
		return errors.New(`argument "argv" names no program`)
	}
	size := len(a.Script)
	for _, arg := range a.Argv {
		size += len(arg) + 1
	}
	if size > maxArgv {
		return nucleus.Errorf(nucleus.KindTooLarge, "command of %d bytes, at most %d: put the data into a file or stdin", size, maxArgv)
	}
	if strings.ContainsRune(a.Script+strings.Join(a.Argv, ""), 0) {
		return errors.New("command contains a NUL character")
	}
	if limit := int(MaxTimeout / time.Second); a.TimeoutS < 0 || a.TimeoutS > limit {
		return fmt.Errorf("timeout_s %d: want 1 to %d", a.TimeoutS, limit)
	}
	return checkOptionalPath("dir", a.Dir)
}

func (a CommitArgs) check() error {
	if strings.TrimSpace(a.Message) == "" {
		return errors.New(`argument "message" is empty`)
	}
	if strings.ContainsRune(a.Message, 0) {
		return errors.New("message contains a NUL character")
	}
	for _, p := range a.Paths {
		if err := checkPath("paths", p); err != nil {
			return err
		}
	}
	return checkOptionalPath("repo", a.Repo)
}

func (a PushArgs) check() error {
	if a.Branch == "" || strings.HasPrefix(a.Branch, "-") {
		return fmt.Errorf("branch %q is not a branch name", a.Branch)
	}
	return checkOptionalPath("repo", a.Repo)
}

func (a PRArgs) check() error {
	if strings.TrimSpace(a.Title) == "" {
		return errors.New(`argument "title" is empty`)
	}
	return checkOptionalPath("repo", a.Repo)
}

func (a FetchArgs) check() error {
	if a.URL == "" {
		return errors.New(`argument "url" is empty`)
	}
	return nil
}

func (a NewPod) check() error {
	if _, err := a.Limits(); err != nil {
		return err
	}
	return checkOptionalPath("repo", a.Repo)
}

// Limits are the resources that are asked for; nil: as the asking pod.
func (a NewPod) Limits() (*nucleus.Resources, error) {
	if len(a.Resources) == 0 || bytes.Equal(a.Resources, []byte("null")) {
		return nil, nil
	}
	var r nucleus.Resources
	if err := nucleus.Strict(a.Resources, &r); err != nil {
		return nil, fmt.Errorf("resources: %v", err)
	}
	return &r, nil
}

func (a NewPod) given() bool {
	return len(a.Policy)+len(a.Resources) > 0 || a.Env != nil || a.Mode+a.Driver+a.Require != ""
}

func checkWait(s *int) error {
	if s != nil && (*s < 0 || *s > MaxWait) {
		return fmt.Errorf("wait_s %d: want 0 to %d; manage_pods wait goes on waiting", *s, MaxWait)
	}
	return nil
}

// Seconds is how long to wait.
func Seconds(wait *int) int {
	if wait == nil {
		return MaxWait
	}
	return *wait
}

func (a SpawnArgs) check() error {
	switch {
	case strings.TrimSpace(a.Task) == "":
		return errors.New(`argument "task" is empty`)
	case len(a.Task) > MaxTask:
		return nucleus.Errorf(nucleus.KindTooLarge, "task of %d bytes, at most %d: put the rest into a file of the repository", len(a.Task), MaxTask)
	case strings.ContainsRune(a.Task, 0):
		return errors.New("task contains a NUL character")
	}
	return errors.Join(checkWait(a.WaitS), a.NewPod.check())
}

var podID = regexp.MustCompile(`^p-[a-z0-9]{1,40}$`)

func (a PodsArgs) check() error {
	has := map[string]bool{
		"pod": a.Pod != "", "wait_s": a.WaitS != nil, "keep": a.Keep, "repo": a.Repo != "", "operation": a.Operation != "",
		"arguments": len(a.Arguments) > 0, "policy, mode, driver, require, resources or env": a.NewPod.given(),
	}
	known, ok := map[string][]string{
		string(nucleus.SubCreate): {"repo", "policy, mode, driver, require, resources or env"},
		string(nucleus.SubList):   {},
		string(nucleus.SubWait):   {"pod", "wait_s", "keep"},
		string(nucleus.SubFetch):  {"pod", "repo"},
		string(nucleus.SubDelete): {"pod"},
		SubCall:                   {"pod", "operation", "arguments"},
	}[a.Action]
	if !ok {
		return fmt.Errorf("action %q: want create, list, call, wait, fetch or delete", a.Action)
	}
	for _, name := range slices.Sorted(maps.Keys(has)) {
		if has[name] && !slices.Contains(known, name) {
			return fmt.Errorf("action %s takes no %s", a.Action, name)
		}
	}
	if slices.Contains(known, "pod") && !podID.MatchString(a.Pod) {
		return fmt.Errorf("pod %q is not the id of a pod", a.Pod)
	}
	return errors.Join(checkWait(a.WaitS), a.NewPod.check())
}

func checkPath(name, p string) error {
	if p == "" {
		return fmt.Errorf("argument %q is empty", name)
	}
	_, err := lexical("/", p) // any absolute path may lie below the workspace; the guest knows
	return err
}

func checkOptionalPath(name, p string) error {
	if p == "" {
		return nil
	}
	return checkPath(name, p)
}

// checkGlob bounds what a matcher that backtracks can be made to do.
func checkGlob(name, pattern string) error {
	switch {
	case len(pattern) > maxPattern:
		return fmt.Errorf("argument %q has %d bytes, at most %d", name, len(pattern), maxPattern)
	case strings.HasPrefix(pattern, "/"):
		return fmt.Errorf("argument %q is absolute: name the directory in \"path\"", name)
	case strings.Count(pattern, "*") > 16 || strings.Count(pattern, "{") > 6:
		return fmt.Errorf("argument %q has more than 16 stars or 6 alternatives", name)
	case !validGlob(pattern):
		return fmt.Errorf("argument %q: %q is not a valid pattern", name, pattern)
	}
	return nil
}

// ResolveStatic resolves what needs no file system: reads and searches by a
// relative path, and the output and stop of a background command. False means
// that the guest has to be asked.
//
// A path that leads through a symbolic link is refused at "do" as a conflict
// whose message names the place it leads to, because the action then names another
// file than the one that would be read; the guest, when asked, resolves it.
func ResolveStatic(op nucleus.Op, raw json.RawMessage) (nucleus.Action, bool, error) {
	args, err := Decode(op, raw)
	if err != nil {
		return nucleus.Action{}, false, err
	}
	action, err := newAction(op, raw)
	if err != nil {
		return nucleus.Action{}, false, err
	}
	var name string
	switch a := args.(type) {
	case ReadArgs:
		name = a.Path
	case GlobArgs:
		name = searchBase(a.Path)
	case GrepArgs:
		name = searchBase(a.Path)
	case RunArgs:
		action.Job = a.job()
		return action, action.Job != nil, nil
	default:
		return nucleus.Action{}, false, nil
	}
	if path.IsAbs(name) {
		return nucleus.Action{}, false, nil
	}
	rel, err := lexical("/", name)
	if err != nil {
		return nucleus.Action{}, false, err
	}
	action.Files = []nucleus.File{{Path: rel}}
	return action, true, nil
}

// job is the background command that the arguments are about; nil: they start one.
func (a RunArgs) job() *nucleus.Job {
	switch {
	case a.Output != "":
		return &nucleus.Job{ID: a.Output}
	case a.Stop != "":
		return &nucleus.Job{ID: a.Stop, Stop: true}
	}
	return nil
}

func searchBase(p string) string {
	if p == "" {
		return "."
	}
	return p
}

// newAction is an action with the digest of its arguments.
func newAction(op nucleus.Op, raw json.RawMessage) (nucleus.Action, error) {
	canonical, err := nucleus.CanonicalJSON(raw)
	if err != nil {
		return nucleus.Action{}, invalid(op, "arguments: %v", err)
	}
	return nucleus.Action{Op: op, Args: nucleus.SHA256(canonical)}, nil
}

// lexical returns name relative to the workspace at root, clean and
// slash-separated. It looks at no file: links are Sandbox's matter.
func lexical(root, name string) (string, error) {
	switch {
	case name == "":
		return "", nucleus.Errorf(nucleus.KindInvalid, "empty path")
	case strings.ContainsRune(name, 0):
		return "", nucleus.Errorf(nucleus.KindInvalid, "path %q contains a NUL character", name)
	}
	for _, part := range strings.Split(name, "/") {
		if part == ".." {
			return "", nucleus.Errorf(nucleus.KindInvalid, `path %q: ".." is not allowed`, name)
		}
		if len(part) > 255 {
			return "", nucleus.Errorf(nucleus.KindInvalid, "path %.40q...: a name of %d bytes, at most 255", part, len(part))
		}
	}
	if len(name) > 4095 {
		return "", nucleus.Errorf(nucleus.KindInvalid, "path of %d bytes, at most 4095", len(name))
	}
	clean := path.Clean(name)
	if !path.IsAbs(clean) {
		return clean, nil
	}
	if clean == root {
		return ".", nil
	}
	below, ok := strings.CutPrefix(clean, strings.TrimSuffix(root, "/")+"/")
	if !ok {
		return "", nucleus.Errorf(nucleus.KindDenied, "path %q is outside the workspace %s", name, root)
	}
	return below, nil
}
