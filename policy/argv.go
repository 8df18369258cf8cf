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
// A wildcard stands for no program that runs others: as the program for no shell,
// interpreter, wrapper or path, and behind a wrapper for none of their names and no
// option that holds a command. Who allows arbitrary code has to name it.
type argv struct {
	head []string
	tail bool // ends with "**"
}

// mustBeNamed reports whether no wildcard stands for the argument i of a command
// with the given program, which is "*" where it is not known; a wildcard is
// already no wrapper.
func mustBeNamed(first string, i int, arg string) bool {
	switch {
	case arg == "*":
		return false
	case i == 0:
		return program.Runs(arg)
	}
	return first != "*" && program.Wraps(first) && (program.Named(arg) || program.Hands(first, arg))
}

func (a argv) leq(b argv) bool {
	if len(a.head) < len(b.head) || !b.tail && (a.tail || len(a.head) > len(b.head)) {
		return false
	}
	for i, arg := range a.head {
		if i < len(b.head) && b.head[i] == arg {
			continue
		}
		if i < len(b.head) && b.head[i] != "*" || mustBeNamed(a.head[0], i, arg) {
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
	for i, arg := range args {
		if (i >= len(a.head) || a.head[i] == "*") && mustBeNamed(args[0], i, arg) {
			return true
		}
	}
	return false
}

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
