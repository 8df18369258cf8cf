package command

import (
	"strings"

	"cal/policy/program"
)

func (r *reader) wrapped(name string, words []word, depth int) {
	if name == "find" {
		r.find(words, depth)
		return
	}
	var args []string // as far as they are known
	for len(args) < len(words) && words[len(args)].known {
		args = append(args, words[len(args)].text)
	}
	at, sure := program.Behind(args)
	if !sure {
		r.add(words, Arbitrary, name+" runs another program, and which one is not understood")
		return
	}
	for _, arg := range args[1:at] {
		switch {
		case strings.HasPrefix(arg, "-") && program.Hands(name, arg):
			r.add(words, Arbitrary, name+": "+arg+" holds a command, or opens a shell")
			return
		case !strings.HasPrefix(arg, "-") && strings.Contains(arg, "=") && !harmlessExport(arg):
			r.add(words, Arbitrary, "sets "+before(arg)+", which can change what runs")
			return
		}
	}
	rest := words[at:]
	if name == "xargs" {
		if len(rest) == 0 {
			rest = []word{{"echo", true}}
		}
		rest = append(rest[:len(rest):len(rest)], word{}) // what it reads comes behind
	}
	if len(rest) == 0 {
		r.add(words, ReadOnly, name+" runs nothing")
		return
	}
	r.command(rest, depth+1)
}

// find runs what stands behind -exec and its kin.
func (r *reader) find(words []word, depth int) {
	class, why := ReadOnly, "reads names of files"
	for i := 1; i < len(words); i++ {
		w := words[i]
		if !w.known {
			class, why = Arbitrary, "an argument of find is not known, and may be -exec"
			continue
		}
		switch w.text {
		case "-delete", "-fprint", "-fprint0", "-fprintf", "-fls":
			class, why = max(class, Writes), "find "+w.text
		case "-exec", "-execdir", "-ok", "-okdir": // program.Executes
			end := i + 1
			for end < len(words) && !(words[end].known && (words[end].text == ";" || words[end].text == "+")) {
				end++
			}
			inner := append([]word{}, words[i+1:end]...)
			for j := range inner {
				if strings.Contains(inner[j].text, "{}") {
					inner[j] = word{}
				}
			}
			r.command(inner, depth+1)
			i = end
		}
	}
	r.add(words, class, why)
}

// harmlessExport reports whether NAME=value, in the environment of a program, is known
// to change nothing that runs. A variable that is not known may name a loader, a pager,
// a hook, a path.
func harmlessExport(assignment string) bool {
	name := before(assignment)
	if strings.HasPrefix(name, "LC_") {
		return true
	}
	switch name {
	case "LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CI", "DEBUG", "VERBOSE", "HOME", "TMPDIR",
		"CGO_ENABLED", "GOOS", "GOARCH", "RUST_BACKTRACE", "RUST_LOG", "NODE_ENV", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "GIT_TERMINAL_PROMPT",
		"GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE":
		return true
	}
	return false
}

// harmlessVariable is harmlessExport for a script, which has variables of its own, with
// names in lower case. Those that hold "config" are read by package managers.
func harmlessVariable(assignment string) bool {
	name := before(assignment)
	return harmlessExport(name) ||
		name == strings.ToLower(name) && !strings.Contains(name, "proxy") && !strings.Contains(name, "config") && !program.Named(name)
}

func before(assignment string) string {
	name, _, _ := strings.Cut(assignment, "=")
	return strings.TrimSuffix(name, "+")
}
