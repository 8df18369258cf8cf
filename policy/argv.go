package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"cal/nucleus"
)

// argv is a pattern for a whole argument vector: "*" is exactly one argument,
// "**" any number of them, only last. All else is compared byte by byte; nothing
// is split or joined.
type argv struct {
	head []string
	tail bool // ends with "**"
}

func (a argv) leq(b argv) bool {
	if len(a.head) < len(b.head) || !b.tail && (a.tail || len(a.head) > len(b.head)) {
		return false
	}
	for i, want := range b.head {
		if want != "*" && want != a.head[i] {
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
	return out, true
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
	for i, want := range a.head {
		if want != "*" && want != args[i] {
			return false
		}
	}
	return true
}

// allows judges one command. A shell with its script is arbitrary code: a
// wildcard in place of the program does not name it.
func (a argv) allows(c *nucleus.Command) bool {
	if c.Script && (len(a.head) == 0 || a.head[0] == "*") {
		return false
	}
	return a.matches(c.Argv)
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
