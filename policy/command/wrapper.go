package command

import (
	"strings"

	"cal/policy/program"
)

// grammar is how a wrapper's own arguments are skipped: options that take a value
// in the next word, and how many operands come before the program. Of a wrapper
// without a grammar it is not known which word is the program.
type grammar struct {
	valued   string // options, separated by spaces
	operands int
}

var grammars = map[string]grammar{
	"env": {"-u --unset -C --chdir", 0}, "nice": {"-n --adjustment", 0}, "timeout": {"-s --signal -k --kill-after", 1},
	"xargs": {"-a --arg-file -d --delimiter -E -I -L --max-lines -n --max-args -P --max-procs -s --max-chars", 0},
	"sudo":  {"-u --user -g --group -h --host -p --prompt -C -D --chdir -R --chroot -T -U -r -t", 0}, "doas": {"-u -C", 0},
	"nohup": {"", 0}, "stdbuf": {"-i -o -e --input --output --error", 0}, "time": {"-f --format -o --output", 0},
	"setsid": {"", 0}, "ionice": {"-c --class -n --classdata -p", 0}, "chrt": {"", 1}, "taskset": {"", 1}, "command": {"", 0},
	"builtin": {"", 0}, "exec": {"-a", 0}, "unbuffer": {"", 0}, "gosu": {"", 1}, "dumb-init": {"", 0}, "tini": {"", 0},
}

func (r *reader) wrapped(name string, words []word, depth int) {
	if name == "find" {
		r.find(words, depth)
		return
	}
	g, ok := grammars[name]
	if !ok {
		r.add(words, Arbitrary, name+" runs another program")
		return
	}
	rest, odd := g.skip(name, words[1:])
	if odd != "" {
		r.add(words, Arbitrary, name+": "+odd)
		return
	}
	for name == "env" && len(rest) > 0 && rest[0].known && strings.Contains(rest[0].text, "=") {
		if !harmlessExport(rest[0].text) {
			r.add(words, Arbitrary, "sets "+before(rest[0].text)+", which can change what runs")
			return
		}
		rest = rest[1:]
	}
	for range min(g.operands, len(rest)) {
		rest = rest[1:]
	}
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

// skip returns what follows the options.
func (g grammar) skip(name string, words []word) (rest []word, odd string) {
	valued := strings.Fields(g.valued)
	for len(words) > 0 {
		w := words[0]
		switch {
		case !w.known:
			return words, "" // no program is known
		case w.text == "--":
			return words[1:], ""
		case strings.HasPrefix(w.text, "-") && program.Hands(name, w.text):
			return nil, w.text + " holds a command, or opens a shell"
		case !strings.HasPrefix(w.text, "-") || w.text == "-":
			if w.text == "-" {
				return words[1:], ""
			}
			return words, ""
		}
		words = words[1:]
		for _, option := range valued {
			if w.text == option && len(words) > 0 {
				words = words[1:]
			}
		}
	}
	return nil, ""
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
		case "-exec", "-execdir", "-ok", "-okdir":
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
