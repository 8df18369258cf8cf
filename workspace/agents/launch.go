package agents

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"cal/nucleus"
)

// Launch says how one session of an agent is to be started. Home, Dir, ModelURL
// and, in mediated mode, MCPURL are required.
type Launch struct {
	Mode     nucleus.Mode
	Prompt   string   // empty: the agent's own screen
	Args     []string // of the person, before the prompt
	Home     string   // HOME in the machine
	Dir      string   // where the agent starts; mediated: an empty directory below Home
	MCPURL   string   // CAL's tools
	ModelURL string   // the model route, without /v1
	Bearer   bool     // the credential is a token that goes as Authorization (nucleus.Model.Bearer)

	// Instructions are the repositories' instruction files by their path below
	// the workspace. Those that the agent reads lie, as one file, in Dir of a
	// mediated agent; a contained one finds them in the workspace itself.
	Instructions map[string][]byte

	// Env is the environment of the person. Only terminal, language and time
	// zone are taken from it.
	Env map[string]string

	// BuiltinTools leaves the agent's own tools on, and lets it use them unasked.
	// In mediated mode they find nothing to work with: tests show that the wall is
	// not the flags.
	BuiltinTools bool
}

// start is what a recipe adds.
type start struct {
	argv []string // after the program
	task []string // the same for nucleus.Agent.Task; empty: it cannot work on a task by itself
	env  map[string]string
	home map[string][]byte
}

// maxPrompt is below what the kernel takes as one argument (128 KiB).
const maxPrompt = 100_000

// note tells a mediated agent where its work is; nothing else does, because its
// own directory is empty.
const note = `The code you work on is in an isolated machine. You reach it only through the tools of the MCP server "cal" (mcp__cal__*): ` +
	`they read, search, edit and write files, run commands, commit, push, open pull requests and fetch pages. Their paths are relative to the workspace, ` +
	`which holds one directory for each repository; your own working directory is empty and you have no other tools. ` +
	`A refused call says which rule refused it: do not try another way to the same end, tell the user.`

// Agent is the program of the session: its root, arguments, environment and what
// lies in its HOME. In contained mode, where the agent runs in the machine's own
// root, Root is only its program.
func (d Definition) Agent(in Install, l Launch) (nucleus.Agent, error) {
	if err := l.check(); err != nil {
		return nucleus.Agent{}, fmt.Errorf("launching %s: %w", d.Name, err)
	}
	s, err := d.recipe(d, l)
	if err != nil {
		return nucleus.Agent{}, fmt.Errorf("launching %s: %w", d.Name, err)
	}
	programs, err := d.files(in)
	if err != nil {
		return nucleus.Agent{}, err
	}
	root := d.programLayers(in, programs)
	if l.Mode == nucleus.Mediated {
		if root, err = d.root(in, programs); err != nil {
			return nucleus.Agent{}, err
		}
	}
	for name, value := range l.Env {
		if _, ours := s.env[name]; !ours && ambient(name) {
			s.env[name] = value
		}
	}
	if l.Mode == nucleus.Mediated {
		if text := d.instructions(l.Instructions); text != nil {
			dir, err := filepath.Rel(l.Home, l.Dir)
			if err != nil {
				return nucleus.Agent{}, err
			}
			s.home[path.Join(dir, d.Instructions[0])] = text
		}
	}
	agent := nucleus.Agent{
		Name:  d.Name,
		Root:  root,
		Argv:  append([]string{d.guestPath(d.Program)}, s.argv...),
		Env:   s.env,
		Home:  s.home,
		CallS: int(d.CallTimeout.Seconds()),
	}
	if len(s.task) > 0 {
		agent.Task = append([]string{agent.Argv[0]}, s.task...)
	}
	return agent, nil
}

func (l Launch) check() error {
	switch {
	case l.Mode != nucleus.Mediated && l.Mode != nucleus.Contained:
		return fmt.Errorf("unknown mode %q", l.Mode)
	case l.Mode == nucleus.Mediated && l.MCPURL == "":
		return fmt.Errorf("no MCP endpoint for a mediated agent")
	case l.ModelURL == "":
		return fmt.Errorf("no model endpoint")
	case !path.IsAbs(l.Home) || path.Clean(l.Home) != l.Home:
		return fmt.Errorf("HOME %q is no clean absolute path", l.Home)
	case path.Clean(l.Dir) != l.Dir || !strings.HasPrefix(l.Dir, l.Home+"/"):
		return fmt.Errorf("directory %q is not below HOME %s", l.Dir, l.Home)
	case len(l.Prompt) > maxPrompt:
		return fmt.Errorf("the prompt has %d bytes, more than %d", len(l.Prompt), maxPrompt)
	}
	return nil
}

// ambient reports whether a variable of the person says how a terminal, a
// language or a clock looks, and nothing more.
func ambient(name string) bool {
	return slices.Contains([]string{"TERM", "COLORTERM", "LANG", "LANGUAGE", "TZ"}, name) || strings.HasPrefix(name, "LC_")
}

// instructions joins the files that the agent reads, those of the outermost
// directory first. A file alone is given as it is.
func (d Definition) instructions(files map[string][]byte) []byte {
	byDir := map[string]string{} // directory -> the file that wins there
	for name := range files {
		dir, base := path.Split(path.Clean(name))
		rank := slices.Index(d.Instructions, base)
		if rank < 0 {
			continue
		}
		if won, ok := byDir[dir]; !ok || rank < slices.Index(d.Instructions, path.Base(won)) {
			byDir[dir] = name
		}
	}
	names := slices.SortedFunc(maps.Values(byDir), func(a, b string) int {
		if n := strings.Count(a, "/") - strings.Count(b, "/"); n != 0 {
			return n
		}
		return strings.Compare(a, b)
	})
	if len(names) == 0 {
		return nil
	}
	if len(names) == 1 {
		return files[names[0]]
	}
	var text []byte
	for _, name := range names {
		text = fmt.Appendf(text, "# From %s\n\n%s\n\n", name, strings.TrimSpace(string(files[name])))
	}
	return text
}
