package workspace

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"cal/image"
	"cal/internal/git"
	"cal/nucleus"
	"cal/policy"
	"cal/workspace/agents"
)

// RunOptions are what a person asks for. Zero values are the defaults.
type RunOptions struct {
	Repo, Agent, Prompt string
	Workspace, Branch   string
	Policy, Mode        string
	Driver, Require     string
	Approvals           string // required: "other-user", "passkey" or empty
	EnvFile, Image      string
	Trust, NoTTY        bool
	CPU, MemoryMB, Pids int
	DiskMB              int
	AllowWatched        []string
	Command             []string
}

// Plan is a run, worked out but not begun.
type Plan struct {
	Spec  nucleus.PodSpec
	Dir   string            // of the command, relative to the workspace
	Files map[string][]byte // instruction files for the agent's directory
	Notes []string          // what a person should know before, what is left out among it

	known     *Work  // what the workspace holds from before
	policy    string // as the person named it
	tightened bool   // by the repository's own
	envFile   string
	handed    []string // names of variables of envFile
	version   string   // of the agent
	keyFrom   string   // variable that holds the model's credential
}

// guest endpoints; package guest serves them.
const (
	mcpURL   = "http://127.0.0.1:7001/mcp"
	modelURL = "http://127.0.0.1:7002"
)

// Plan works out what a run needs. Nothing is started and nothing is changed.
func (h Home) Plan(ctx context.Context, o RunOptions) (*Plan, error) {
	p := &Plan{}
	env := environment()
	p.Spec.Mode = nucleus.Mediated
	if o.Mode != "" {
		p.Spec.Mode = nucleus.Mode(o.Mode)
	}
	p.Spec.Driver, p.Spec.Require = o.Driver, nucleus.Tier(o.Require)
	p.Spec.Resources = nucleus.Resources{CPU: o.CPU, MemoryMB: o.MemoryMB, Pids: o.Pids, DiskMB: o.DiskMB}
	p.Spec.Watched = o.AllowWatched
	var err error
	if p.Spec.Approvals, err = h.requires(o.Approvals); err != nil {
		return nil, err
	}
	if p.Spec.Policy, err = h.policyOf(o.Policy); err != nil {
		return nil, err
	}
	if p.policy = o.Policy; p.policy == "" {
		p.policy = "default"
	}
	if o.EnvFile != "" {
		if p.Spec.Env, err = readEnvFile(o.EnvFile); err != nil {
			return nil, err
		}
		p.envFile, p.handed = o.EnvFile, slices.Sorted(maps.Keys(p.Spec.Env))
	}
	if err := h.planRoot(ctx, p, o, env); err != nil {
		return nil, err
	}
	if o.Repo != "" {
		if err := h.planRepo(ctx, p, o); err != nil {
			return nil, err
		}
	} else if o.Workspace != "" {
		p.Spec.Workspace = o.Workspace
	}
	if o.Agent != "" {
		if err := h.planAgent(ctx, p, o, env); err != nil {
			return nil, err
		}
	}
	// Nobody comes back to a machine that is for one command.
	p.Spec.Transient = p.Spec.Agent == nil && p.Spec.Workspace == ""
	return p, nil
}

// requires is what a machine requires of approvals: what its flag says, else what is set for all. What
// is set for all the node requires beside it (Home.Node).
func (h Home) requires(flag string) (string, error) {
	if flag != "" {
		return requirement(flag)
	}
	config, err := h.Config()
	return config.Approvals.Require, err
}

// policyOf reads a profile's name, or a file of the person.
func (h Home) policyOf(name string) (json.RawMessage, error) {
	if name == "" {
		name = "default"
	}
	if _, err := policy.Profile(name); err == nil {
		return json.Marshal(name)
	}
	loaded, err := h.LoadPolicy(name)
	if err != nil {
		return nil, err
	}
	return loaded.Canonical()
}

// PolicyFiles lists the person's own policies that can be named: those that no profile goes
// before.
func (h Home) PolicyFiles() []string {
	files, _ := filepath.Glob(filepath.Join(h.Dir, "policies", "*.yaml")) // the pattern is well formed
	return slices.DeleteFunc(files, func(file string) bool {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		return strings.Contains(name, ".") || slices.Contains(policy.Profiles(), name)
	})
}

// LoadPolicy reads a policy file: a path, or a name below the person's policies.
func (h Home) LoadPolicy(name string) (*policy.Policy, error) {
	path, raw, err := h.PolicyFile(name)
	if err != nil {
		return nil, err
	}
	return policy.Load(path, raw)
}

// pipePatience is how long whoever writes into a pipe may take.
const pipePatience = 10 * time.Second

// ReadGiven reads a file that a person names, a regular one or a pipe, and waits for no
// other. Of one that has more than limit bytes it returns limit and one.
func ReadGiven(path string, limit int64) ([]byte, error) {
	// Not blocking: a pipe that nobody writes to is empty.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case info.Mode().IsRegular():
	case info.Mode()&os.ModeNamedPipe != 0: // what a shell makes of <(...)
		if err := file.SetReadDeadline(time.Now().Add(pipePatience)); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%s is no regular file and no pipe (%s)", path, info.Mode().Type())
	}
	return io.ReadAll(io.LimitReader(file, limit+1))
}

// PolicyFile returns the path and the bytes of the policy file that name stands
// for: of one that is too large, as many as tell.
func (h Home) PolicyFile(name string) (path string, raw []byte, err error) {
	path = name
	if !strings.ContainsAny(name, "/.") {
		path = filepath.Join(h.Dir, "policies", name+".yaml")
	}
	raw, err = ReadGiven(path, policy.MaxDocument)
	switch {
	case errors.Is(err, os.ErrNotExist):
		err = nucleus.Errorf(nucleus.KindInvalid, "policy %q is neither a profile (%s) nor the file %s", name, strings.Join(policy.Profiles(), ", "), path)
	case err != nil:
		err = fmt.Errorf("policy %w", err)
	}
	return path, raw, err
}

func (h Home) planRoot(ctx context.Context, p *Plan, o RunOptions, env map[string]string) error {
	home, err := os.UserHomeDir()
	if err != nil {
		return err
	}
	if p.Spec.Image, err = ParseImage(o.Image); err != nil {
		return err
	}
	if p.Spec.Image.Kind != "" && p.Spec.Image.Kind != nucleus.ImageHost {
		return nil
	}
	found, err := image.Find(ctx, image.Person{Home: home, Env: env, Scratch: filepath.Join(h.Dir, "cache"), Reaches: reaches(p.Spec.Policy)})
	if err != nil {
		return err
	}
	p.Spec.Image.Layers, p.Spec.Image.Env = found.Layers, found.Env
	if o.Agent != "" {
		p.Notes = append(p.Notes, found.Notes...)
	}
	return nil
}

// reaches says which hosts the policy opens, be it after an approval: whoever names a
// registry wants it asked, and a refusal then says what is missing.
func reaches(raw json.RawMessage) func(host string, port int) bool {
	effective, err := policyFrom(raw)
	return func(host string, port int) bool {
		if err != nil {
			return false
		}
		decision := effective.Decide(nucleus.Action{Op: nucleus.NetConnect, Connect: &nucleus.Connect{Host: host, Port: port}}, nucleus.Context{UnixMilli: time.Now().UnixMilli()})
		return decision.Verdict != nucleus.Deny
	}
}

// policyFrom reads what policyOf made.
func policyFrom(raw json.RawMessage) (*policy.Policy, error) {
	var name string
	if json.Unmarshal(raw, &name) == nil {
		return policy.Profile(name)
	}
	return policy.Load("policy", raw)
}

func (h Home) planRepo(ctx context.Context, p *Plan, o RunOptions) error {
	origin, err := git.Open(ctx, o.Repo)
	if err != nil {
		return err
	}
	base, err := origin.Head(ctx)
	if err != nil {
		return err
	}
	if err := p.leftOut(ctx, origin, base); err != nil {
		return err
	}
	if p.Spec.Workspace = o.Workspace; p.Spec.Workspace == "" {
		if p.Spec.Workspace, err = h.WorkspaceFor(origin.Dir); err != nil {
			return err
		}
	}
	branch, err := h.branch(p, o, origin, base)
	if err != nil {
		return err
	}
	repo := nucleus.Repo{Name: RepoName(origin.Dir), Path: origin.Dir, Branch: branch, Base: base}
	if o.Trust {
		repo.Trusted = &o.Trust
	}
	p.Spec.Repos = []nucleus.Repo{repo}
	p.Dir = repo.Name
	p.Spec.Identity = identity(ctx, origin)
	return p.instructions(ctx, origin, base, repo.Name)
}

// leftOut notes what of the working tree does not go in, and what goes in only in part.
func (p *Plan) leftOut(ctx context.Context, origin git.Repo, base string) error {
	bare, err := origin.Bare(ctx)
	if err != nil {
		return err
	}
	note := func(format string, args ...any) { p.Notes = append(p.Notes, fmt.Sprintf(format, args...)) }
	if !bare {
		dirty, err := origin.Run(ctx, "status", "--porcelain", "-z", "--no-renames")
		if err != nil {
			return err
		}
		if n := strings.Count(dirty, "\x00"); n > 0 {
			note("not committed, stays here: %d changed or new files of %s (git status)", n, origin.Dir)
		}
	}
	shallow, err := origin.Shallow(ctx, base)
	if err != nil {
		return err
	}
	if len(shallow) > 0 {
		note("a shallow clone: history before it is not here and does not go in (git fetch --unshallow)")
	}
	submodules, err := origin.Submodules(ctx, base)
	if err != nil {
		return err
	}
	var handed []string
	for _, sub := range submodules {
		if sub.Absent != "" {
			note("submodule %s stays out: %s", sub.Path, sub.Absent)
		} else {
			handed = append(handed, sub.Path)
		}
	}
	if len(handed) > 0 {
		note("submodules go in as they are recorded, and what is changed in them stays in the machine: %s", few(handed))
	}
	large, err := origin.LargeFiles(ctx, base)
	if err != nil {
		return err
	}
	if len(large) > 0 {
		note("files of Git LFS go in as pointers, without what they point to: %s", few(large))
	}
	listed, err := origin.Run(ctx, "ls-tree", "--name-only", base, "--", ".cal/policy.yaml")
	p.tightened = listed != ""
	return err
}

// few names some of many.
func few(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// branch is the agent's: the one that the workspace has already, or a new one.
func (h Home) branch(p *Plan, o RunOptions, origin git.Repo, base string) (string, error) {
	works, err := h.Works()
	if err != nil {
		return "", err
	}
	for _, w := range works {
		if w.Workspace != p.Spec.Workspace || w.Path != origin.Dir {
			continue
		}
		if o.Branch != "" && o.Branch != w.Branch {
			return "", fmt.Errorf("workspace %s works on branch %s, not %s (name another --workspace)", w.Workspace, w.Branch, o.Branch)
		}
		if w.Base != base {
			p.Notes = append(p.Notes, fmt.Sprintf("workspace %s goes on from %.12s; HEAD is at %.12s now (cal vm delete %s starts anew)", w.Workspace, w.Base, base, w.Workspace))
		}
		p.known = &w
		return w.Branch, nil
	}
	switch {
	case o.Branch != "":
		return o.Branch, nil
	case o.Agent != "":
		return "agent/" + o.Agent, nil
	}
	return "agent/work", nil
}

// identity is the person's name and address as git knows them: only these two.
func identity(ctx context.Context, origin git.Repo) nucleus.Identity {
	return nucleus.Identity{Name: git.PersonalSetting(ctx, origin.Dir, "user.name"), Email: git.PersonalSetting(ctx, origin.Dir, "user.email")}
}

// instructions takes CLAUDE.md and AGENTS.md from the commit that is handed over.
func (p *Plan) instructions(ctx context.Context, origin git.Repo, base, name string) error {
	for _, file := range []string{"CLAUDE.md", "AGENTS.md"} {
		listed, err := origin.Run(ctx, "ls-tree", base, "--", file)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(listed, "100") { // a regular file; no link, no directory
			continue
		}
		text, err := origin.Run(ctx, "cat-file", "blob", base+":"+file)
		if err != nil {
			return err
		}
		if p.Files == nil {
			p.Files = map[string][]byte{}
		}
		p.Files[filepath.Join(name, file)] = []byte(text)
	}
	return nil
}

func (h Home) planAgent(ctx context.Context, p *Plan, o RunOptions, env map[string]string) error {
	definition, install, err := h.locateAgent(ctx, o.Agent, env)
	if err != nil {
		return err
	}
	model, err := definition.Model(env)
	if err != nil {
		return err
	}
	launch := agents.Launch{
		Mode: p.Spec.Mode, Prompt: o.Prompt, Home: nucleus.MachineHome, Dir: nucleus.MachineHome + "/work",
		MCPURL: mcpURL, ModelURL: modelURL, Bearer: model.Bearer, Instructions: p.Files, Env: env,
	}
	if p.Spec.Mode == nucleus.Contained {
		launch.Dir = nucleus.MachineWorkspace + "/" + p.Dir
	}
	agent, err := definition.Agent(install, launch)
	if err != nil {
		return err
	}
	p.Spec.Agent, p.Spec.Model = &agent, &model
	p.version, p.keyFrom = install.Version, definition.KeyFrom(env)
	return nil
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// readEnvFile reads NAME=VALUE lines; blank lines and lines that begin with # are
// skipped.
func readEnvFile(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	env := map[string]string{}
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		name, value, ok := strings.Cut(text, "=")
		if !ok || !envName.MatchString(name) {
			return nil, fmt.Errorf("%s:%d: want NAME=VALUE", path, n)
		}
		env[name] = value
	}
	return env, lines.Err()
}

func environment() map[string]string {
	env := map[string]string{}
	for _, entry := range os.Environ() {
		if name, value, ok := strings.Cut(entry, "="); ok {
			env[name] = value
		}
	}
	return env
}

// AgentNames lists the agents that can be named: the person's own in the order of their
// names, and the built-in ones that none of these goes before.
func (h Home) AgentNames() []string {
	files, _ := filepath.Glob(filepath.Join(h.Dir, "agents", "*.yaml")) // the pattern is well formed
	var names []string
	for _, file := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(file), ".yaml"))
	}
	for _, name := range agents.Names() {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// LocateAgent finds the person's install of an agent.
func (h Home) LocateAgent(ctx context.Context, name string) (agents.Install, error) {
	_, install, err := h.locateAgent(ctx, name, environment())
	return install, err
}

// locateAgent takes the person's own definition before a built-in one.
func (h Home) locateAgent(ctx context.Context, name string, env map[string]string) (agents.Definition, agents.Install, error) {
	definition, install, err := agents.Own(filepath.Join(h.Dir, "agents", RepoName(name)+".yaml"))
	if !errors.Is(err, os.ErrNotExist) {
		return definition, install, err
	}
	if definition, err = agents.Find(name); err != nil {
		return definition, install, nucleus.Errorf(nucleus.KindInvalid, "unknown agent %q; known: %s", name, strings.Join(h.AgentNames(), ", "))
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return definition, install, err
	}
	install, err = definition.Locate(ctx, agents.Host{Home: home, Env: env})
	return definition, install, err
}
