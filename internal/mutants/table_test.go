package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Each mutant still finds its place and its test.
func TestTable(t *testing.T) {
	for _, m := range slices.Concat(mutants, logMutants, grantMutants, queueMutants, passkeyMutants, imageMutants) {
		file := filepath.Join("../..", m.file)
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(raw), m.old); n != 1 || m.old == m.new {
			t.Errorf("%s: %s holds %q %d times, want once", m.law, m.file, m.old, n)
		}
		tests, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, name := range tests {
			raw, err := os.ReadFile(name)
			found = found || err == nil && strings.Contains(string(raw), "func "+m.test+"(t *testing.T)")
		}
		if !found {
			t.Errorf("%s: no test %s beside %s", m.law, m.test, m.file)
		}
	}
}
