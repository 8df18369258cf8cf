// Package command says what a command does, as far as its argv and the script in it
// tell, for a person who is asked or who asks why.
//
// Claim: what it calls read-only, writes, network or push is a program that it
// knows, with arguments that it understands; all else is arbitrary code. It reads
// the argv that is executed and splits nothing again, and scripts with a shell's own
// parser. Threat: an agent that dresses a command up, by wrappers, options before the
// subcommand, quotes, substitutions. Promise: a doubt makes the class stricter.
//
// Containment never rests on this. A program may be another than its name says, and
// what it reads may tell it anything; nothing is allowed because of a class.
package command

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"cal/nucleus"
	"cal/policy/program"
)

// Class is what a command may do, from harmless to unknown.
type Class uint8

// The classes. A command has the highest of all that it runs.
const (
	ReadOnly Class = iota
	Writes
	Network
	Push
	Arbitrary // a shell, an interpreter, or what cannot be known
)

var classNames = [...]string{"read-only", "writes", "network", "push", "arbitrary code"}

func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("Class(%d)", uint8(c))
}

// Says is the class in plain words.
func (c Class) Says() string {
	switch c {
	case ReadOnly:
		return "reads files and the machine's state"
	case Writes:
		return "changes files in the machine, or builds and tests what is there"
	case Network:
		return "talks to other hosts"
	case Push:
		return "publishes: a push, a pull request, a release"
	}
	return "may do anything a program in this machine can do"
}

// Reading is what was understood. Class is Arbitrary too where a shell runs; Parts
// are the programs that it would run, with the class of each.
type Reading struct {
	Class Class
	Why   string // what made the class
	Parts []Part
}

// Part is one program with its arguments. A word that is not known before the
// command runs stands as "?".
type Part struct {
	Argv  []string
	Class Class
	Why   string
}

const (
	maxDepth  = 6        // of shells and wrappers within each other
	maxScript = 64 << 10 // bytes of a script that is read
	maxParts  = 200
)

// Of reads a command as it was resolved: its argv, and whatever else of it can change
// what runs.
func Of(c nucleus.Command) Reading {
	r := reader{}
	if c.Script {
		r.raise(Arbitrary, "a shell runs a script")
	}
	r.argv(c.Argv)
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		if !harmlessExport(name) {
			r.raise(Arbitrary, "sets "+name+", which can change what runs")
		}
	}
	switch {
	case len(c.Argv) == 0 || c.Binary == "":
	case path.Base(c.Binary) != path.Base(c.Argv[0]):
		r.raise(Arbitrary, "the program that runs is "+c.Binary)
	case !installed(c.Binary):
		r.raise(Arbitrary, "the program that runs is "+c.Binary+", which is called as a known one and may be another")
	}
	return r.reading
}

// installed reports whether a program lies where the machine's own programs and toolchains
// do, read-only. Elsewhere whatever works in the machine may have put it there.
func installed(binary string) bool {
	for _, place := range []string{"/usr", "/bin", "/sbin", nucleus.Toolchains} {
		if strings.HasPrefix(path.Clean(binary), place+"/") {
			return true
		}
	}
	return false
}

// Read reads an argv.
func Read(argv []string) Reading {
	var r reader
	r.argv(argv)
	return r.reading
}

func (r *reader) argv(argv []string) {
	words := make([]word, len(argv))
	for i, arg := range argv {
		words[i] = word{arg, true}
	}
	r.command(words, 0)
}

// word is one argument; text is all of it where it is known.
type word struct {
	text  string
	known bool
}

type reader struct {
	reading   Reading
	functions map[string]bool // defined in the script: their bodies are read where they stand
}

func (r *reader) add(words []word, class Class, why string) {
	if len(r.reading.Parts) >= maxParts {
		class, why = Arbitrary, fmt.Sprintf("more than %d commands", maxParts)
	} else {
		argv := make([]string, len(words))
		for i, w := range words {
			argv[i] = w.text
			if !w.known {
				argv[i] = "?"
			}
		}
		r.reading.Parts = append(r.reading.Parts, Part{argv, class, why})
	}
	r.raise(class, why)
}

func (r *reader) raise(class Class, why string) {
	if class > r.reading.Class || r.reading.Why == "" {
		r.reading.Class, r.reading.Why = class, why
	}
}

// command reads one command, through its wrappers.
func (r *reader) command(words []word, depth int) {
	if len(words) == 0 {
		r.raise(ReadOnly, "runs nothing")
		return
	}
	if depth > maxDepth {
		r.add(words, Arbitrary, fmt.Sprintf("more than %d commands within each other", maxDepth))
		return
	}
	if !words[0].known {
		r.add(words, Arbitrary, "which program runs is not known")
		return
	}
	name := program.Name(words[0].text)
	switch {
	case r.functions[name]:
	case asksVersion(words):
		r.add(words, ReadOnly, "prints its version or help")
	case program.Shell(name):
		r.shell(name, words, depth)
	case program.Interprets(name):
		r.add(words, Arbitrary, name+" runs code")
	case program.Wraps(name):
		r.wrapped(name, words, depth)
	case strings.Contains(name, "/"):
		r.add(words, Arbitrary, "runs a file by its path")
	default:
		class, why := classify(name, words[1:])
		r.add(words, class, why)
	}
}

func asksVersion(words []word) bool {
	if len(words) != 2 || !words[1].known || strings.Contains(program.Name(words[0].text), "/") {
		return false
	}
	return words[1].text == "--version" || words[1].text == "--help"
}

// shell reads the script of -c, and calls the whole arbitrary code all the same.
func (r *reader) shell(name string, words []word, depth int) {
	r.raise(Arbitrary, name+" runs code")
	if name == "eval" {
		r.script(joined(words[1:]), depth)
		return
	}
	for i, w := range words[1:] {
		if !w.known || !strings.HasPrefix(w.text, "-") && !strings.HasPrefix(w.text, "+") {
			break // a script's file
		}
		if strings.HasPrefix(w.text, "-") && !strings.HasPrefix(w.text, "--") && strings.Contains(w.text, "c") {
			if i+2 < len(words) {
				r.script(words[i+2], depth)
				return
			}
		}
	}
	r.add(words, Arbitrary, name+" runs code that does not stand in the command")
}

func joined(words []word) word {
	all := word{known: true}
	for i, w := range words {
		if i > 0 {
			all.text += " "
		}
		all.text += w.text
		all.known = all.known && w.known
	}
	return all
}
