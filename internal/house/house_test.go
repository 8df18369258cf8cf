// Package house keeps the order of the house: which package may import which.
// The rules stand in one table with the reason beside each; every rule carries an
// example that breaks it, so that it is seen to fail.
package house

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "cal"

// rule forbids direct imports. Packages and imports are patterns: a path, or
// path/... for it and all below. Paths of this module are relative to it, those of
// the standard library begin with "std:", other modules with "ext:".
type rule struct {
	packages []string
	except   []string // packages
	never    []string // imports
	but      []string // imports
	own      bool     // what lies below the package's own second folder is allowed
	reason   string
	breaks   [2]string // a package and an import, in the same notation
}

var rules = []rule{
	{
		packages: []string{"nucleus/..."}, never: []string{"...", "ext:..."},
		reason: "the vocabulary is read by node, authority, guest and offline verifier alike and must bring nothing with it",
		breaks: [2]string{"nucleus", "ext:golang.org/x/sys/unix"},
	},
	{
		packages: []string{"node/..."}, never: []string{"authority/..."},
		reason: "who may ask cannot grant: no line of the node can reach the approval key",
		breaks: [2]string{"node", "authority"},
	},
	{
		packages: []string{"guest/..."}, never: []string{"node/...", "authority/..."},
		reason: "the machine is hostile ground: nothing that decides or signs on the host is in its binary",
		breaks: [2]string{"guest/tools", "node/client"},
	},
	{
		packages: []string{"guest/..."}, never: []string{"machine/*/..."},
		reason: "a guest does not know what runs it; the driver's job ends at handing over the wire",
		breaks: [2]string{"guest", "machine/gvisor"},
	},
	{
		packages: []string{"policy/...", "approval"}, never: []string{"std:os/...", "std:net", "std:net/http/...", "std:syscall", "ext:golang.org/x/sys/..."},
		reason: "decisions and the check of a grant are pure: both locks get the same answer from the same inputs",
		breaks: [2]string{"policy", "std:os/exec"},
	},
	{
		packages: []string{"policy/...", "approval", "wire/..."}, never: []string{"..."}, but: []string{"nucleus", "policy/...", "approval", "wire/..."},
		reason: "imports point only downwards: these rest on the vocabulary alone",
		breaks: [2]string{"wire", "audit"},
	},
	{
		packages: []string{"audit/..."}, never: []string{"..."}, but: []string{"nucleus", "audit/...", "internal/durable", "internal/redact"},
		reason: "the log is usable alone and offline, by a stranger",
		breaks: [2]string{"audit", "node"},
	},
	{
		packages: []string{"audit"}, never: []string{"std:net", "std:net/http/..."},
		reason: "a log is written, proved and verified without any network; audit/witness speaks with others",
		breaks: [2]string{"audit", "std:net/http"},
	},
	{
		packages: []string{"machine/*/..."}, except: []string{"machine/machinetest/..."}, never: []string{"machine/*/..."}, but: []string{"machine/site", "machine/microvm/..."}, own: true,
		reason: "a driver knows no other, so that each can be taken out; site and microvm are what they share",
		breaks: [2]string{"machine/gvisor", "machine/fake"},
	},
	{
		packages: []string{"..."}, except: []string{"cmd/...", "internal/testenv/...", "machine/*/..."}, never: []string{"machine/*/..."}, but: []string{"machine/machinetest/..."},
		reason: "only cmd names concrete drivers: the rest sees the interface",
		breaks: [2]string{"workspace", "machine/gvisor"},
	},
	{
		packages: []string{"..."}, except: []string{"cmd/..."}, never: []string{"cmd/..."},
		reason: "mains are thin: flags, wiring, signals; what others need lies below",
		breaks: [2]string{"tui", "cmd/cal"},
	},
	{
		packages: []string{"..."}, except: []string{"internal/testenv/...", "machine/machinetest/...", "internal/chromium", "internal/passkeytest"}, never: []string{"internal/testenv/...", "internal/chromium", "internal/passkeytest", "std:testing/..."}, but: []string{"std:testing/fstest"},
		reason: "test scaffolding stays out of the programs",
		breaks: [2]string{"cmd/cal", "internal/testenv"},
	},
}

// matches reports whether a path fits a pattern: "..." at the end stands for any
// number of elements, "*" for one.
func matches(pattern, name string) bool {
	if kind, all := strings.CutSuffix(pattern, ":..."); all {
		return strings.HasPrefix(name, kind+":")
	}
	want, got := strings.Split(pattern, "/"), strings.Split(name, "/")
	for i, w := range want {
		if w == "..." {
			return true
		}
		if i >= len(got) || w != "*" && w != got[i] {
			return false
		}
		if i == len(want)-1 {
			return len(got) == len(want)
		}
	}
	return false
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) || matches(strings.TrimSuffix(p, "/..."), name) })
}

// forbids reports whether the rule forbids pkg to import name, both in the
// notation of the table.
func (r rule) forbids(pkg, name string) bool {
	if !matchesAny(r.packages, pkg) || matchesAny(r.except, pkg) || matchesAny(r.but, name) {
		return false
	}
	if r.own {
		own := strings.Join(strings.SplitN(pkg, "/", 3)[:2], "/")
		if matches(own+"/...", name) || name == own {
			return false
		}
	}
	for _, pattern := range r.never {
		// "..." alone is every package of this module.
		if pattern == "..." && strings.Contains(name, ":") {
			continue
		}
		if matches(pattern, name) || matches(strings.TrimSuffix(pattern, "/..."), name) {
			return true
		}
	}
	return false
}

// notation turns an import path into that of the table.
func notation(imported string) string {
	first, _, _ := strings.Cut(imported, "/")
	switch {
	case first == module:
		return strings.TrimPrefix(imported, module+"/")
	case strings.Contains(first, "."):
		return "ext:" + imported
	}
	return "std:" + imported
}

// violations reads the imports of every file of the module that is no test,
// whatever its build constraints, and says which rules they break.
func violations(root string) (found []string, files int, err error) {
	err = filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			name := entry.Name()
			if file != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || name == "vendor" || isModule(file)) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		files++
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		relative = filepath.ToSlash(relative)
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.forbids(path.Dir(relative), notation(imported)) {
					found = append(found, fmt.Sprintf("%s imports %s: %s", relative, imported, r.reason))
				}
			}
		}
		return nil
	})
	return found, files, err
}

func isModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}

func TestImports(t *testing.T) {
	root := "../.."
	if !isModule(root) {
		t.Fatalf("%s is not the module's root", root)
	}
	found, files, err := violations(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range found {
		t.Error(v)
	}
	if files < 20 {
		t.Errorf("only %d files were read", files)
	}
}

// TestRulesCanFail breaks each rule in a tree made for it, and no other rule says
// the same of a tree that keeps them all.
func TestRulesCanFail(t *testing.T) {
	for _, r := range rules {
		if r.reason == "" {
			t.Errorf("rule on %v has no reason", r.packages)
		}
		root := t.TempDir()
		write(t, root, "go.mod", "module cal\n")
		write(t, root, r.breaks[0]+"/x.go", source(r.breaks[1]))
		found, _, err := violations(root)
		if err != nil {
			t.Fatal(err)
		}
		want := r.breaks[0] + "/x.go imports " + importPath(r.breaks[1]) + ": " + r.reason
		if !slices.Contains(found, want) {
			t.Errorf("%v: not found; got %q", r.breaks, found)
		}
	}
}

func TestWhatIsAllowed(t *testing.T) {
	root := t.TempDir()
	write(t, root, "go.mod", "module cal\n")
	for pkg, imports := range map[string][]string{
		"nucleus":                 {"std:crypto/ed25519", "std:encoding/json"},
		"policy":                  {"nucleus", "std:net/url", "std:net/netip", "std:time"},
		"approval":                {"nucleus", "policy", "ext:aidanwoods.dev/go-paseto"},
		"audit":                   {"nucleus", "internal/durable", "std:os"},
		"wire":                    {"nucleus", "std:net", "ext:github.com/hashicorp/yamux"},
		"guest/tools":             {"nucleus", "policy", "wire", "guest", "std:os/exec"},
		"machine":                 {"nucleus", "wire"},
		"machine/gvisor":          {"machine", "machine/gvisor/bundle", "machine/site", "image"},
		"machine/qemu":            {"machine", "machine/microvm", "machine/site", "image", "wire"},
		"machine/microvm":         {"machine", "machine/site", "image", "wire"},
		"machine/gvisor/bundle":   {"machine", "machine/gvisor"},
		"machine/machinetest":     {"machine", "wire", "std:testing"},
		"approval/client":         {"approval", "wire", "std:net"},
		"node":                    {"policy", "audit", "wire", "machine", "egress", "node/client"},
		"authority":               {"approval", "wire", "audit"},
		"internal/testenv":        {"node", "authority", "machine/fake", "std:testing"},
		"cmd/nucleus-node":        {"node", "machine/gvisor", "machine/fake"},
		"cmd/nucleus-tool-proxy":  {"guest"},
		"nested/with/a/long/path": {"nucleus"},
	} {
		write(t, root, pkg+"/x.go", source(imports...))
	}
	// Tests, test data and other modules are not held to the rules.
	write(t, root, "node/x_test.go", source("authority", "machine/fake"))
	write(t, root, "node/testdata/x.go", source("authority"))
	write(t, root, "tools/go.mod", "module tools\n")
	write(t, root, "tools/x.go", source("cmd/cal"))
	found, files, err := violations(root)
	if err != nil || len(found) > 0 || files != 19 {
		t.Errorf("got %q in %d files, %v", found, files, err)
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"node", "node", true},
		{"node", "nodes", false},
		{"node", "node/client", false},
		{"node/...", "node/client", true},
		{"node/...", "nodes/client", false},
		{"machine/*/...", "machine/gvisor", true},
		{"machine/*/...", "machine/gvisor/a/b", true},
		{"machine/*/...", "machine", false},
		{"...", "anything/at/all", true},
		{"std:net", "std:net/url", false},
		{"std:net/http/...", "std:net/http", true},
		{"std:os/...", "std:os/exec", true},
		{"std:os/...", "std:ostrich", false},
		{"ext:...", "ext:golang.org/x/sys", true},
		{"ext:...", "node", false},
	} {
		if got := matchesAny([]string{c.pattern}, c.name); got != c.want {
			t.Errorf("%s, %s: got %v", c.pattern, c.name, got)
		}
	}
}

func write(t *testing.T, root, name, content string) {
	t.Helper()
	name = filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func source(imports ...string) string {
	text := "//go:build never\n\npackage x\n\n"
	for _, i := range imports {
		text += "import _ " + strconv.Quote(importPath(i)) + "\n"
	}
	return text
}

func importPath(name string) string {
	if kind, rest, ok := strings.Cut(name, ":"); ok && kind != "" {
		return rest
	}
	return module + "/" + name
}
