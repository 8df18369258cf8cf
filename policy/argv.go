package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"cal/policy/program"
)

// argv is a pattern for a whole argument vector: "*" is exactly one argument,
// "**" any number of them, only last. All else is compared byte by byte; nothing
// is split or joined.
//
// A wildcard stands for no program that runs others: as the program, and as the one
// behind a wrapper, for no shell, interpreter, wrapper or path, and for no option of a
// wrapper that holds a command. Who allows arbitrary code has to name it. An argument
// that is not run may be called as it likes.
//
// Where a program stands depends on the words before it, for which a wildcard may stand
// too. So the order takes every word behind a wrapper for one that may be run: it calls
// fewer rules below others than it could, and a meet may be stricter than both.
type argv struct {
	head []string
	tail bool // ends with "**"
}

// mayRun reports whether argument i of a pattern may be what a wildcard does not stand
// for, in any command that the pattern matches.
func (a argv) mayRun(i int) bool {
	arg, first := a.head[i], a.head[0]
	switch {
	case arg == "*":
		return false
	case i == 0:
		return program.Runs(arg)
	case first == "*" || !program.Wraps(first):
		return false
	case isProgram(arg):
		return true
	}
	for _, wrapper := range a.head[:i] {
		if program.Hands(wrapper, arg) {
			return true
		}
	}
	return false
}

// isProgram reports whether a word, where a program may stand, is one that must be named.
func isProgram(arg string) bool {
	return program.Named(arg) || program.Runs(arg) && arg[0] != '-'
}

func (a argv) leq(b argv) bool {
	if len(a.head) < len(b.head) || !b.tail && (a.tail || len(a.head) > len(b.head)) {
		return false
	}
	for i, arg := range a.head {
		if i < len(b.head) && b.head[i] == arg {
			continue
		}
		if i < len(b.head) && b.head[i] != "*" || a.mayRun(i) {
			return false
		}
	}
	return true
}

func (a argv) meet(b argv) (argv, bool) {
	if len(a.head) < len(b.head) {
		a, b = b, a
	}
	if len(a.head) > len(b.head) && !b.tail {
		return argv{}, false
	}
	out := argv{head: slices.Clone(a.head), tail: a.tail && b.tail}
	for i, arg := range b.head {
		switch {
		case arg == "*" || arg == out.head[i]:
		case out.head[i] == "*":
			out.head[i] = arg
		default:
			return argv{}, false
		}
	}
	return out, out.leq(a) && out.leq(b)
}

func (a argv) kin() string {
	if len(a.head) == 0 || a.head[0] == "*" {
		return ""
	}
	return a.head[0]
}

func (a argv) elements() []string {
	if a.tail {
		return append(slices.Clone(a.head), "**")
	}
	return a.head
}

// String quotes each argument, so that patterns with spaces stay apart.
func (a argv) String() string { return fmt.Sprintf("%q", a.elements()) }

func (a argv) matches(args []string) bool {
	if len(args) < len(a.head) || !a.tail && len(args) > len(a.head) {
		return false
	}
	for i := len(a.head) - 1; i >= 0; i-- { // rules of one program differ at the end
		if want := a.head[i]; want != args[i] && want != "*" {
			return false
		}
	}
	return !slices.ContainsFunc(a.head, isStar) && !a.tail || !a.hides(args)
}

func isStar(arg string) bool { return arg == "*" }

// hides reports whether a wildcard stands where args must be named.
func (a argv) hides(args []string) bool {
	if len(args) == 0 {
		return false
	}
	if a.wild(0) && program.Runs(args[0]) {
		return true
	}
	for at := 0; program.Wraps(args[at]); {
		next, sure := program.Behind(args[at:])
		next += at
		for i := at + 1; i < len(args); i++ {
			if i > next && sure {
				break // the program's own arguments
			}
			if a.wild(i) && (program.Hands(args[at], args[i]) || i >= next && isProgram(args[i]) || i < next && assignsProgram(args[i])) {
				return true
			}
		}
		if !sure || next >= len(args) {
			return false
		}
		at = next
	}
	return false
}

// assignsProgram reports whether a word before the program is a variable that holds the
// path of a shell or the like.
func assignsProgram(word string) bool {
	return strings.IndexByte(word, '=') > 0 && word[0] != '-' && program.Named(word)
}

// wild reports whether a wildcard stands for argument i.
func (a argv) wild(i int) bool { return i >= len(a.head) || a.head[i] == "*" }

func parseArgv(elements []string) (argv, error) {
	if len(elements) == 0 {
		return argv{}, errors.New("a command pattern without arguments matches nothing; want for example [git, status]")
	}
	var a argv
	for i, arg := range elements {
		switch {
		case arg == "**" && i == len(elements)-1:
			a.tail = true
			return a, nil
		case arg == "**":
			return argv{}, fmt.Errorf(`"**" is argument %d of %d; it may only be the last`, i+1, len(elements))
		case arg != "*" && strings.Contains(arg, "*"):
			return argv{}, fmt.Errorf(`argument %q has a wildcard in it; "*" is one whole argument, "**" all that follow`, arg)
		}
		a.head = append(a.head, arg)
	}
	return a, nil
}
