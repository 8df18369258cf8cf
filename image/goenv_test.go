package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Go is asked once, and again as soon as anything that its answer hangs on has changed.
func TestGoIsAskedAnew(t *testing.T) {
	real, err := exec.LookPath("go")
	if err != nil {
		t.Skip("go is not installed")
	}
	home := homeDir(t)
	asked := filepath.Join(home, "asked")
	program := filepath.Join(home, "bin", "go")
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(t, os.WriteFile(name, []byte(text), mode))
	}
	script := func(comment string) {
		write(program, fmt.Sprintf("#!/bin/sh\n# %s\necho >>%s\nexec %s \"$@\"\n", comment, asked, real), 0o755)
	}
	script("one")
	person := Person{Home: home, Scratch: filepath.Join(home, "scratch"), Env: map[string]string{"PATH": filepath.Dir(program) + ":/usr/bin:/bin"}}
	times := func() int {
		raw, _ := os.ReadFile(asked)
		return strings.Count(string(raw), "\n")
	}
	places := func() goPlaces {
		t.Helper()
		s := &search{person: person, env: map[string]string{}}
		places, err := s.goEnv(t.Context(), program)
		must(t, err)
		return places
	}
	first := places()
	if first.GOROOT == "" || places() != first || times() != 1 {
		t.Fatalf("%+v, asked %d times for two answers", first, times())
	}
	for n, change := range []struct {
		what  string
		do    func()
		cache string // wanted; "" as before
	}{
		{"the person's settings", func() { write(filepath.Join(home, ".config", "go", "env"), "GOMODCACHE=/elsewhere\n", 0o644) }, "/elsewhere"},
		{"the program", func() { script("two") }, "/elsewhere"},
		{"a variable", func() { person.Env["GOMODCACHE"] = "/third" }, "/third"},
		{"a kept answer that is no JSON", func() { write(filepath.Join(person.Scratch, "go-env.json"), "{", 0o600) }, "/third"},
	} {
		change.do()
		if got := places(); got.GOMODCACHE != change.cache || times() != n+2 {
			t.Errorf("%s changed: %+v, asked %d times", change.what, got, times())
		}
	}
}
