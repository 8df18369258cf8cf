package policy

import (
	"fmt"
	"strings"
)

// The patterns of rules, for who writes a bound that is no rule: the same text means the same
// there. An error says that the pattern is none.

// MatchArgv reports whether a pattern of arguments - "*" is one, "**" all that follow, only
// last - stands for args. A wildcard stands for no program that runs others.
func MatchArgv(pattern, args []string) (bool, error) {
	a, err := parseArgv(pattern)
	return err == nil && a.matches(args), err
}

// MatchRoot reports whether a clean path lies in the directory root of the workspace; "." is
// the workspace.
func MatchRoot(root, name string) (bool, error) {
	r, err := parseRoot(root)
	return err == nil && cleanPath(name) && r.holds(name), err
}

// MatchURLPath reports whether the path of a request is pattern, or lies below it where it ends
// in "/**". A path that a server could read as another one matches nothing.
func MatchURLPath(pattern, path string) (bool, error) {
	s, err := parseURLPath(pattern)
	return err == nil && cleanURLPath(path) && s.matches(path), err
}

// MatchRef reports whether a full name of a ref is pattern, or lies below it where it ends in
// "/**".
func MatchRef(pattern, ref string) (bool, error) {
	base, below := strings.CutSuffix(pattern, "/**")
	rest, ok := strings.CutPrefix(base, "refs/")
	if !ok || !strings.Contains(rest, "/") && !below || rest == "" || !cleanPath(base) || strings.ContainsAny(base, "*?[\\^:~ ") {
		return false, fmt.Errorf("ref %q is no pattern; want for example \"refs/heads/main\" or \"refs/heads/agent/**\"", pattern)
	}
	return cleanPath(ref) && span{base, below}.matches(ref), nil
}
