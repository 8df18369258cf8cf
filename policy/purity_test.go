package policy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cal/nucleus"
)

// The package is pure: same inputs, same decision, on both sides of the wire.
func TestPure(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	banned := map[string]string{
		"os": "no files, no environment", "net": "no network", "os/exec": "no processes",
		"math/rand": "no chance", "math/rand/v2": "no chance", "crypto/rand": "no chance", "sync": "no shared state",
	}
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "Tick", "NewTimer", "NewTicker", "AfterFunc"}
	read := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		read++
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, imported := range parsed.Imports {
			if why, bad := banned[strings.Trim(imported.Path.Value, `"`)]; bad {
				t.Errorf("%s imports %s: %s", file, imported.Path.Value, why)
			}
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine", file)
			case *ast.SelectorExpr:
				if pkg, ok := n.X.(*ast.Ident); ok && pkg.Name == "time" && slices.Contains(clock, n.Sel.Name) {
					t.Errorf("%s reads the clock: time.%s", file, n.Sel.Name)
				}
			}
			return true
		})
	}
	if read < 10 {
		t.Errorf("only %d files were looked at", read)
	}
}

func TestDecideAllocatesNothingToAllow(t *testing.T) {
	p := Meet(load(t, attacked), load(t, "operations: {read_files: always, run_bash: always, web_fetch: always}\nhosts: any\nbudget: {usd: 1, tokens: 1, seconds: 1}"))
	for _, a := range []func(){
		func() { allowed(t, p, actionRead) },
		func() { allowed(t, p, actionRun) },
		func() { allowed(t, p, actionFetch) },
	} {
		if n := testing.AllocsPerRun(100, a); n != 0 {
			t.Errorf("%v allocations", n)
		}
	}
}

var (
	actionRead  = nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "app/a/b/main.go"}}}
	actionRun   = nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"go", "test", "./..."}, Dir: "app"}}
	actionFetch = nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", Host: "api.example", Port: 443, Path: "/repos/o/r"}}
)

func allowed(t *testing.T, p *Policy, a nucleus.Action) {
	if d := p.Decide(a, nucleus.Context{}); d.Verdict != nucleus.Allow {
		t.Fatal(d)
	}
}
