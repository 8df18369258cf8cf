package tools

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"sort"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/bmatcuk/doublestar/v4"

	"cal/nucleus"
)

// Caps of the searches.
const (
	maxGlobPaths   = 1000
	maxMatches     = 500
	maxMatchBytes  = 256 << 10
	maxLineShown   = 500 // bytes of one line in a result
	maxGrepFile    = 8 << 20
	maxWalkEntries = 1 << 20
	maxWalkDepth   = 128
	searchDeadline = 30 * time.Second
)

// GlobResult is what glob_search returns. Paths are relative to the workspace
// and sorted; Notice says what was left out.
type GlobResult struct {
	Paths  []string `json:"paths"`
	Total  int      `json:"total"`
	Notice string   `json:"notice,omitempty"`
}

// GrepResult is what grep_search returns, by path and line.
type GrepResult struct {
	Matches []Match `json:"matches"`
	Files   int     `json:"files"` // searched
	Notice  string  `json:"notice,omitempty"`
}

// Match is one line that matched.
type Match struct {
	Path   string   `json:"path"`
	Line   int      `json:"line"`
	Text   string   `json:"text"`
	Before []string `json:"before,omitempty"`
	After  []string `json:"after,omitempty"`
}

func validGlob(pattern string) bool { return doublestar.ValidatePattern(pattern) }

func compileGrep(pattern string) (*regexp.Regexp, error) { return regexp.Compile(pattern) }

// errEnough ends a walk whose result is full.
var errEnough = errors.New("enough")

// walk calls visit for every regular file below rel, in the order of names. It
// follows no link, leaves .git, blocked paths and other file systems out, and
// tells leftOut why.
func (s *Sandbox) walk(ctx context.Context, rel string, leftOut *tally, visit func(rel string) error) error {
	entries := 0
	var descend func(dir string, depth int) error
	descend = func(dir string, depth int) error {
		if depth > maxWalkDepth {
			leftOut.add("directory deeper than 128", "directories deeper than 128")
			return nil
		}
		list, err := s.list(dir)
		if err != nil {
			if depth == 0 {
				return err
			}
			leftOut.add("unreadable directory", "unreadable directories")
			return nil
		}
		for _, entry := range list {
			if err := ctx.Err(); err != nil {
				return err
			}
			if entries++; entries > maxWalkEntries {
				leftOut.add("entry after the first 1048576", "entries after the first 1048576")
				return errEnough
			}
			at := path.Join(dir, entry.Name())
			switch {
			case entry.Name() == ".git":
			case !utf8.ValidString(entry.Name()):
				leftOut.add("name that is not UTF-8", "names that are not UTF-8")
			case s.blocked(at):
				leftOut.add("blocked path", "blocked paths")
			case entry.IsDir():
				if err := descend(at, depth+1); err != nil {
					return err
				}
			case entry.Type().IsRegular():
				if err := visit(at); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return descend(rel, 0)
}

func (s *Sandbox) list(rel string) ([]fs.DirEntry, error) {
	dir, err := s.OpenDir(rel)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	list, err := dir.ReadDir(-1)
	if err != nil {
		return nil, s.refusal(rel, err)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name() < list[j].Name() })
	return list, nil
}

// tally counts what a search left out, by reason.
type tally struct {
	counts map[string]int
	plural map[string]string
	notes  []string
}

func (t *tally) add(one, many string) {
	if t.counts == nil {
		t.counts, t.plural = map[string]int{}, map[string]string{}
	}
	t.counts[one]++
	t.plural[one] = many
}

func (t *tally) note(format string, args ...any) {
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

func (t *tally) String() string {
	parts := t.notes
	var reasons []string
	for one, n := range t.counts {
		if n == 1 {
			reasons = append(reasons, "1 "+one)
		} else {
			reasons = append(reasons, fmt.Sprintf("%d %s", n, t.plural[one]))
		}
	}
	sort.Strings(reasons)
	if len(reasons) > 0 {
		parts = append(parts, "left out: "+strings.Join(reasons, ", "))
	}
	return strings.Join(parts, "; ")
}

// ended says how a walk ended: nil when its result can be shown, with a note
// where it is not whole.
func (t *tally) ended(parent context.Context, err error) error {
	switch {
	case err == nil, errors.Is(err, errEnough):
		return nil
	case errors.Is(err, context.DeadlineExceeded) && parent.Err() == nil:
		t.note("stopped after %v, the result is not complete", searchDeadline)
		return nil
	}
	return err
}

func (w *worker) planGlob(action nucleus.Action, args GlobArgs) (plan, error) {
	base, err := w.box.Resolve(searchBase(args.Path))
	if err != nil {
		return plan{}, err
	}
	action.Files = []nucleus.File{{Path: base}}
	return plan{action, func(ctx context.Context, _ *caller) (any, int, error) {
		result, err := w.glob(ctx, base, args.Pattern)
		return result, 0, err
	}}, nil
}

func (w *worker) glob(parent context.Context, base, pattern string) (GlobResult, error) {
	ctx, cancel := context.WithTimeout(parent, searchDeadline)
	defer cancel()
	result := GlobResult{Paths: []string{}}
	var leftOut tally
	from, rest := startOf(base, path.Clean(pattern))
	err := w.box.walk(ctx, from, &leftOut, func(rel string) error {
		if !doublestar.MatchUnvalidated(rest, below(from, rel)) {
			return nil
		}
		if result.Total++; len(result.Paths) < maxGlobPaths {
			result.Paths = append(result.Paths, rel)
		}
		return nil
	})
	var e *nucleus.Error
	if from != base && errors.As(err, &e) && (e.Kind == nucleus.KindNotFound || e.Kind == nucleus.KindInvalid || e.Kind == nucleus.KindConflict) {
		err = nil // a directory that the pattern names does not exist: nothing matches
	}
	if err = leftOut.ended(parent, err); err != nil {
		return result, err
	}
	if result.Total > len(result.Paths) {
		leftOut.note("%d of %d paths shown: narrow the pattern", len(result.Paths), result.Total)
	}
	sort.Strings(result.Paths)
	result.Notice = leftOut.String()
	return result, nil
}

// startOf takes the directories that a pattern names plainly out of it, so that
// only they are walked.
func startOf(base, pattern string) (string, string) {
	dir, rest := doublestar.SplitPattern(pattern)
	if dir == "." || strings.HasPrefix(dir, "..") || strings.Contains(dir, `\`) {
		return base, pattern
	}
	return path.Join(base, dir), rest
}

func below(base, rel string) string {
	if base == "." {
		return rel
	}
	return strings.TrimPrefix(rel, base+"/")
}

func (w *worker) planGrep(action nucleus.Action, args GrepArgs) (plan, error) {
	base, err := w.box.Resolve(searchBase(args.Path))
	if err != nil {
		return plan{}, err
	}
	expression, err := compileGrep(args.Pattern)
	if err != nil {
		return plan{}, invalid(action.Op, "%v", err)
	}
	action.Files = []nucleus.File{{Path: base}}
	return plan{action, func(ctx context.Context, _ *caller) (any, int, error) {
		result, err := w.grep(ctx, base, expression, args)
		return result, 0, err
	}}, nil
}

func (w *worker) grep(parent context.Context, base string, expression *regexp.Regexp, args GrepArgs) (GrepResult, error) {
	ctx, cancel := context.WithTimeout(parent, searchDeadline)
	defer cancel()
	g := grep{box: w.box, expression: expression, context: args.Context, result: GrepResult{Matches: []Match{}}}
	err := g.tree(ctx, base, args.Glob)
	if err = g.leftOut.ended(parent, err); err != nil {
		return g.result, err
	}
	g.result.Notice = g.leftOut.String()
	return g.result, nil
}

// grep is one search while it runs.
type grep struct {
	box        *Sandbox
	expression *regexp.Regexp
	context    int
	size       int // bytes shown
	leftOut    tally
	result     GrepResult
}

func (g *grep) tree(ctx context.Context, base, glob string) error {
	file, size, err := g.box.Open(base)
	if err == nil {
		defer file.Close()
		return g.file(ctx, base, file, size)
	}
	dir, dirErr := g.box.OpenDir(base)
	if dirErr != nil {
		return err
	}
	dir.Close()
	return g.box.walk(ctx, base, &g.leftOut, func(rel string) error {
		if !matchesGlob(glob, below(base, rel)) {
			return nil
		}
		file, size, err := g.box.Open(rel)
		if err != nil {
			g.leftOut.add("file that may not be opened", "files that may not be opened")
			return nil
		}
		defer file.Close()
		return g.file(ctx, rel, file, size)
	})
}

// matchesGlob matches by base name where the pattern holds no slash, as grep and
// ripgrep do.
func matchesGlob(glob, rel string) bool {
	if glob == "" {
		return true
	}
	if !strings.Contains(glob, "/") {
		rel = path.Base(rel)
	}
	return doublestar.MatchUnvalidated(glob, rel)
}

func (g *grep) file(ctx context.Context, rel string, r io.Reader, size int64) error {
	if size > maxGrepFile {
		g.leftOut.add("file over 8 MiB", "files over 8 MiB")
		return nil
	}
	reader := bufio.NewReaderSize(io.LimitReader(r, maxGrepFile), 16<<10)
	head, _ := reader.Peek(8000)
	if bytes.IndexByte(head, 0) >= 0 {
		g.leftOut.add("binary file", "binary files")
		return nil
	}
	data, err := io.ReadAll(reader)
	if err != nil {
		g.leftOut.add("unreadable file", "unreadable files")
		return nil
	}
	g.result.Files++
	if !g.expression.Match(data) && !anchored(g.expression) {
		return nil // most files: no need to cut them into lines
	}
	lines := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	for i, text := range lines {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !g.expression.MatchString(strings.TrimSuffix(text, "\r")) {
			continue
		}
		if err := g.add(rel, lines, i); err != nil {
			return err
		}
	}
	return nil
}

// anchored reports whether the expression may match a line without matching the
// text that the line stands in.
func anchored(expression *regexp.Regexp) bool {
	return strings.ContainsAny(expression.String(), `^$\`)
}

func (g *grep) add(rel string, lines []string, i int) error {
	m := Match{Path: rel, Line: i + 1, Text: g.show(lines[i])}
	for _, text := range lines[max(0, i-g.context):i] {
		m.Before = append(m.Before, g.show(text))
	}
	for _, text := range lines[i+1 : min(len(lines), i+1+g.context)] {
		m.After = append(m.After, g.show(text))
	}
	if len(g.result.Matches) == maxMatches || g.size > maxMatchBytes {
		g.leftOut.note("more than %d matches or %d bytes: only the first are shown", maxMatches, maxMatchBytes)
		return errEnough
	}
	g.result.Matches = append(g.result.Matches, m)
	return nil
}

func (g *grep) show(text string) string {
	text = strings.TrimSuffix(text, "\r")
	if len(text) > maxLineShown {
		text = fmt.Sprintf("%s... (%d bytes more)", trimRune(text[:maxLineShown]), len(text)-maxLineShown)
	}
	text = strings.ToValidUTF8(text, "\uFFFD")
	g.size += len(text)
	return text
}
