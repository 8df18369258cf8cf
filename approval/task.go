package approval

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"cal/nucleus"
	"cal/policy"
	"cal/policy/command"
)

// Narrowest is the pattern that describes what an ask is for, and as little else as a pattern
// can. An error says why there can be no task for it.
func Narrowest(ask nucleus.AskRequest) (nucleus.Match, error) {
	var m nucleus.Match
	a := ask.Action
	switch {
	case a.Push != nil:
		m.Push = &nucleus.PushMatch{Repo: a.Push.Repo, Remote: a.Push.Remote, Ref: a.Push.Ref}
	case a.Op == nucleus.NetConnect && a.Connect != nil:
		m.Connect = &nucleus.Connect{Host: a.Connect.Host, Port: a.Connect.Port}
	case a.Fetch != nil:
		scheme, _, _ := strings.Cut(a.Fetch.URL, "://")
		m.Fetch = &nucleus.FetchMatch{Method: a.Fetch.Method, Scheme: scheme, Host: a.Fetch.Host, Port: a.Fetch.Port, Path: a.Fetch.Path}
	case a.Command != nil:
		m.Command = &nucleus.CommandMatch{Argv: a.Command.Argv, Binary: a.Command.Binary, Dir: a.Command.Dir, Env: a.Command.Env}
	case len(a.Files) > 0:
		m.Files = &nucleus.FilesMatch{Root: a.Files[0].Path}
	}
	return m, Matches(m, a)
}

// Told is how far the session may have gone for a task: as far as the ask told, and what the
// action itself takes.
func Told(ask nucleus.AskRequest) nucleus.Legs {
	if ask.Passage != nil {
		return ask.Passage.Exposure
	}
	return ask.Context.Exposure | ask.Takes
}

// SameTask reports whether two grants are good for the same.
func SameTask(a, b *nucleus.Task) bool { return reflect.DeepEqual(a, b) }

// CheckTask says what is wrong with the bounds of a task that is given, or used for the first
// time, now.
func CheckTask(ask nucleus.AskRequest, task nucleus.Task, now int64) error {
	switch {
	case task.Uses < 1 || task.Uses > nucleus.MaxTaskUses:
		return fmt.Errorf("a task of %d uses, want 1 to %d", task.Uses, nucleus.MaxTaskUses)
	case task.Until <= now:
		return fmt.Errorf("the task ended %d ms ago", now-task.Until)
	case task.Until-now > nucleus.MaxTaskMillis:
		return fmt.Errorf("the task ends in %v, at most an hour is allowed", time.Duration(task.Until-now)*time.Millisecond)
	case task.Exposure != Told(ask):
		return fmt.Errorf("the task is for a session that has taken %s, the ask tells of %s", legs(task.Exposure), legs(Told(ask)))
	}
	if err := Matches(task.Match, ask.Action); err != nil {
		return fmt.Errorf("the task is not for what was asked: %w", err)
	}
	return nil
}

// Matches says why a pattern does not describe an action; nil where it does. A pattern that
// cannot be read describes nothing.
func Matches(m nucleus.Match, a nucleus.Action) error {
	if err := oneMatch(m, a.Op); err != nil {
		return err
	}
	switch {
	case m.Push != nil && a.Push != nil:
		return matchPush(*m.Push, *a.Push)
	case m.Fetch != nil && a.Fetch != nil:
		return matchFetch(*m.Fetch, *a.Fetch)
	case m.Connect != nil && a.Connect != nil:
		if *m.Connect != *a.Connect {
			return fmt.Errorf("it leads to %s port %d, not %s port %d", a.Connect.Host, a.Connect.Port, m.Connect.Host, m.Connect.Port)
		}
		return nil
	case m.Files != nil && len(a.Files) > 0:
		for _, f := range a.Files {
			if in, err := policy.MatchRoot(m.Files.Root, f.Path); err != nil || !in {
				return outside("file", f.Path, m.Files.Root, err)
			}
		}
		return nil
	case m.Command != nil && a.Command != nil:
		return matchCommand(*m.Command, *a.Command)
	}
	return fmt.Errorf("%s without what the pattern describes", a.Op)
}

// oneMatch refuses a pattern that is not the one of an operation.
func oneMatch(m nucleus.Match, op nucleus.Op) error {
	want := map[nucleus.Op]bool{}
	parts := 0
	for _, part := range []struct {
		there bool
		ops   []nucleus.Op
	}{
		{m.Push != nil, []nucleus.Op{nucleus.GitPush}},
		{m.Fetch != nil, []nucleus.Op{nucleus.WebFetch}},
		{m.Connect != nil, []nucleus.Op{nucleus.NetConnect}},
		{m.Files != nil, []nucleus.Op{nucleus.ReadFiles, nucleus.WriteFiles, nucleus.EditFiles, nucleus.GlobSearch, nucleus.GrepSearch}},
		{m.Command != nil, []nucleus.Op{nucleus.RunBash}},
	} {
		if part.there {
			parts++
			for _, o := range part.ops {
				want[o] = true
			}
		}
	}
	if parts != 1 || !want[op] {
		return fmt.Errorf("no task can be granted for this %s, only one use", op)
	}
	return nil
}

func outside(what, got, pattern string, err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("%s %q is not %q", what, got, pattern)
}

func matchPush(m nucleus.PushMatch, p nucleus.Push) error {
	switch in, err := policy.MatchRef(m.Ref, p.Ref); {
	case p.Repo != m.Repo:
		return outside("repository", p.Repo, m.Repo, nil)
	case p.Remote != m.Remote:
		return outside("remote", p.Remote, m.Remote, nil)
	case err != nil || !in:
		return outside("ref", p.Ref, m.Ref, err)
	case p.Drops || strings.Trim(p.New, "0") == "":
		return fmt.Errorf("the push drops what ref %q has on the remote", p.Ref)
	}
	return nil
}

func matchFetch(m nucleus.FetchMatch, f nucleus.Fetch) error {
	scheme, _, _ := strings.Cut(f.URL, "://")
	switch in, err := policy.MatchURLPath(m.Path, f.Path); {
	case f.Method != m.Method:
		return outside("method", f.Method, m.Method, nil)
	case scheme != m.Scheme:
		return outside("scheme", scheme, m.Scheme, nil)
	case f.Host != m.Host || f.Port != m.Port:
		return fmt.Errorf("it leads to %s port %d, not %s port %d", f.Host, f.Port, m.Host, m.Port)
	case err != nil || !in:
		return outside("path", f.Path, m.Path, err)
	}
	return nil
}

func matchCommand(m nucleus.CommandMatch, c nucleus.Command) error {
	reading := command.Of(c)
	switch in, err := policy.MatchArgv(m.Argv, c.Argv); {
	case c.Script || reading.Class >= command.Arbitrary:
		return fmt.Errorf("no task can be granted for arbitrary code: %s", reading.Why)
	case c.Stdin != "" || c.TTY:
		return fmt.Errorf("no task can be granted for a command with an input or a terminal")
	case c.Binary != m.Binary:
		return outside("program", c.Binary, m.Binary, nil)
	case c.Dir != m.Dir:
		return outside("directory", c.Dir, m.Dir, nil)
	case !maps.Equal(c.Env, m.Env):
		return fmt.Errorf("its environment is another")
	case err != nil || !in:
		return outside("command", fmt.Sprintf("%q", c.Argv), fmt.Sprintf("%q", m.Argv), err)
	}
	return nil
}

// DrawTask is a task as a person sees it, in the form of Draw: all that is signed beside the
// ask, and nothing that is not.
func DrawTask(op nucleus.Op, task nucleus.Task, view View) string {
	d := drawing{width: max(view.Width, 40), whole: true}
	if view.Width == 0 {
		d.width = 80
	}
	d.begin("what a grant for a task opens")
	d.field("operation", quote(string(op)))
	d.field("uses", fmt.Sprintf("at most %d, the one that is asked for among them", task.Uses))
	d.field("until", moment(task.Until))
	d.field("while", "no other operation takes more than: "+legs(task.Exposure))
	switch m := task.Match; {
	case m.Push != nil:
		d.field("repository", quote(m.Push.Repo))
		d.field("remote", quote(m.Push.Remote))
		d.field("ref", quote(m.Push.Ref))
		d.field("commits", "any, that drop nothing from the remote")
	case m.Fetch != nil:
		d.field("method", quote(m.Fetch.Method))
		d.field("to", fmt.Sprintf("%s %s port %d", quote(m.Fetch.Scheme), quote(m.Fetch.Host), m.Fetch.Port))
		d.field("path", quote(m.Fetch.Path))
		d.field("note", "any query, headers and body")
	case m.Connect != nil:
		d.field("to", fmt.Sprintf("%s port %d", quote(m.Connect.Host), m.Connect.Port))
		d.field("note", "what the connections will carry is not known")
	case m.Files != nil:
		d.field("files", "any below "+quote(m.Files.Root))
	case m.Command != nil:
		for i, arg := range m.Command.Argv {
			d.field(fmt.Sprintf("argv[%d]", i), quote(arg))
		}
		d.field("binary", quote(m.Command.Binary))
		d.field("directory", quote(m.Command.Dir))
		for _, name := range slices.Sorted(maps.Keys(m.Command.Env)) {
			d.field("env", quote(name)+" = "+quote(m.Command.Env[name]))
		}
		d.field("note", "files that an argument names may have changed")
	}
	d.write(d.section)
	return d.out.String()
}
