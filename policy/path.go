package policy

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"
)

// root is a directory of the workspace with all that lies below it; "." is the
// workspace.
type root string

func (r root) holds(name string) bool { return r == "." || covers(string(r), name) }

func (r root) leq(s root) bool { return s.holds(string(r)) }

func (r root) meet(s root) (root, bool) {
	if r.leq(s) {
		return r, true
	}
	return s, s.leq(r)
}

func (r root) String() string { return string(r) }

func (r root) kin() string { return "" }

func parseRoot(text string) (root, error) {
	if !cleanPath(text) {
		return "", fmt.Errorf("root %q is not a clean path below the workspace; want for example \".\" or \"src/app\"", text)
	}
	if strings.ContainsAny(text, "*?") {
		return "", fmt.Errorf("root %q has a wildcard; a root is a directory", text)
	}
	return root(text), nil
}

// cleanPath reports whether name is a path relative to the workspace that two
// readers cannot understand differently.
func cleanPath(name string) bool {
	if name == "" || name[0] == '/' || strings.IndexByte(name, 0) >= 0 || !utf8.ValidString(name) {
		return false
	}
	if name == ".." || strings.HasPrefix(name, "../") {
		return false
	}
	return path.Clean(name) == name // allocates only when it is not
}

// blocked is a set of glob patterns. A pattern that matches a directory covers
// all below it, so "**/NAME" blocks a path iff one of its segments matches NAME.
type blocked struct {
	patterns []string            // sorted, no duplicates; "**" stands alone
	names    map[string]struct{} // NAME without wildcards, of "**/NAME"
	globs    map[byte][]glob     // NAME with wildcards, of "**/NAME", by its last byte; a wildcard is 0
	anchored [][]string          // all others, in segments
}

// everythingBlocked is the strictest pattern.
const everythingBlocked = "**"

func newBlocked(patterns []string) blocked {
	if slices.Contains(patterns, everythingBlocked) {
		patterns = []string{everythingBlocked}
	}
	b := blocked{patterns: slices.Clone(patterns), names: map[string]struct{}{}, globs: map[byte][]glob{}}
	slices.Sort(b.patterns)
	b.patterns = slices.Compact(b.patterns)
	for _, p := range b.patterns {
		segments := strings.Split(p, "/")
		if len(segments) != 2 || segments[0] != "**" || segments[1] == "**" {
			b.anchored = append(b.anchored, segments)
		} else if strings.ContainsAny(segments[1], "*?") {
			g := newGlob(segments[1])
			b.globs[g.last()] = append(b.globs[g.last()], g)
		} else {
			b.names[segments[1]] = struct{}{}
		}
	}
	return b
}

// parseBlocked returns the normal form of one pattern: without a slash it means
// every folder.
func parseBlocked(text string) (string, error) {
	if err := checkGlob(text); err != nil {
		return "", fmt.Errorf("blocked pattern %q %w", text, err)
	}
	if text != everythingBlocked && !strings.Contains(text, "/") {
		text = "**/" + text
	}
	// "**/a/**" blocks what "**/a" does, and "**/**" what "**" does: one value each.
	// "a/**" stays, because "a" alone means every folder.
	segments := slices.CompactFunc(strings.Split(text, "/"), func(a, b string) bool { return a == "**" && b == "**" })
	if len(segments) > 2 && segments[len(segments)-1] == "**" {
		segments = segments[:len(segments)-1]
	}
	return strings.Join(segments, "/"), nil
}

func checkGlob(text string) error {
	if !cleanPath(text) || text == "." {
		return errors.New("is not a clean path below the workspace; want for example \"**/*.pem\"")
	}
	if text[0] == '!' || strings.ContainsAny(text, `[]{}\`) {
		return errors.New(`has one of ! [ ] { } \ ; only *, ? and ** have a meaning`)
	}
	for segment := range strings.SplitSeq(text, "/") {
		if strings.Contains(segment, "**") && segment != "**" {
			return errors.New(`has ** beside other characters; ** is a whole segment`)
		}
	}
	return nil
}

func (b blocked) leq(c blocked) bool {
	if slices.Contains(b.patterns, everythingBlocked) {
		return true
	}
	return !slices.ContainsFunc(c.patterns, func(p string) bool { return !slices.Contains(b.patterns, p) })
}

func (b blocked) meet(c blocked) blocked {
	return newBlocked(slices.Concat(b.patterns, c.patterns))
}

func (b blocked) join(c blocked) blocked {
	if slices.Contains(b.patterns, everythingBlocked) {
		return c
	}
	if slices.Contains(c.patterns, everythingBlocked) {
		return b
	}
	return newBlocked(slices.DeleteFunc(slices.Clone(b.patterns), func(p string) bool {
		return !slices.Contains(c.patterns, p)
	}))
}

func (b blocked) matches(name string) bool {
	if len(b.patterns) == 0 {
		return false
	}
	if name == "." {
		return b.patterns[0] == everythingBlocked
	}
	for rest, more := name, true; more; {
		var segment string
		if segment, rest, more = strings.Cut(rest, "/"); segment == "" {
			continue // of no clean path
		}
		if _, ok := b.names[segment]; ok {
			return true
		}
		if anyMatches(b.globs[segment[len(segment)-1]], segment) || anyMatches(b.globs[0], segment) {
			return true
		}
	}
	for _, segments := range b.anchored {
		if matchBelow(segments, name) {
			return true
		}
	}
	return false
}

// matchBelow reports whether the segments match name or a directory above it.
// One point to return to is enough: a later ** can make up for all that an
// earlier one took.
func matchBelow(pattern []string, name string) bool {
	rest, more := name, true
	back, backRest := -1, ""
	i := 0
	for {
		if i == len(pattern) {
			return true // what is left lies below the match
		}
		if pattern[i] == "**" {
			back, backRest = i, rest
			i++
			if i == len(pattern) {
				return true
			}
			continue
		}
		if !more {
			return false // a longer part for ** leaves even less
		}
		segment, after, next := strings.Cut(rest, "/")
		if matchSegment(pattern[i], segment) {
			i, rest, more = i+1, after, next
			continue
		}
		if back < 0 {
			return false
		}
		_, backRest, more = strings.Cut(backRest, "/")
		i, rest = back+1, backRest
	}
}

// glob is a pattern for one segment with what stands before and after its
// wildcards, which is nearly always enough to tell that it does not match.
type glob struct {
	pattern, before, after string
}

func newGlob(pattern string) glob {
	return glob{pattern, pattern[:strings.IndexAny(pattern, "*?")], pattern[strings.LastIndexAny(pattern, "*?")+1:]}
}

// last is the byte that every match ends with, 0 where there is none.
func (g *glob) last() byte {
	if g.after == "" {
		return 0
	}
	return g.after[len(g.after)-1]
}

func anyMatches(globs []glob, s string) bool {
	for i := range globs {
		if globs[i].matches(s) {
			return true
		}
	}
	return false
}

func (g *glob) matches(s string) bool {
	return strings.HasSuffix(s, g.after) && strings.HasPrefix(s, g.before) && matchSegment(g.pattern, s)
}

// matchSegment matches one path segment: * is any run of characters, ? is one.
func matchSegment(pattern, s string) bool {
	star, mark := -1, 0
	p, i := 0, 0
	for i < len(s) {
		_, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && pattern[p] == '?':
			p, i = p+1, i+size
		case p < len(pattern) && pattern[p] == s[i]:
			p, i = p+1, i+1
		case star >= 0:
			_, size = utf8.DecodeRuneInString(s[mark:])
			mark += size
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
