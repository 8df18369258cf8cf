package agents

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pretend is what the test program does when it is asked for its version under
// another name.
func pretend(name string) {
	switch name {
	case "hang":
		forever := make(chan os.Signal, 1)
		signal.Notify(forever, os.Interrupt)
		<-forever
	case "old":
		fmt.Println("0.0.1 (Claude Code)")
	case "claude":
		home, err := os.ReadDir(os.Getenv("HOME"))
		if err != nil || len(home) > 0 || os.Getenv("ANTHROPIC_API_KEY") != "" || os.Getenv("PATH") != "" {
			fmt.Println("started with files or environment of the person")
			break
		}
		fmt.Println("99.1.2 (Claude Code)")
	}
	unix.Exit(0) // the race detector would take a second to end
}

// program copies the test program to dir/name.
func program(t *testing.T, path string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Link(self, path) == nil {
		return
	}
	in, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, to, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

// lonely is claude-code without the places of the system, which may hold a real
// one.
func lonely(t *testing.T) Definition {
	t.Helper()
	all := places
	places = slices.DeleteFunc(slices.Clone(places), filepath.IsAbs)
	t.Cleanup(func() { places = all })
	d, err := Find("claude-code")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestLocateFindsNone(t *testing.T) {
	d := lonely(t)
	for _, c := range []struct {
		name  string
		build func(t *testing.T, dir string)
		want  string
	}{
		{"nothing", func(*testing.T, string) {}, "is not installed"},
		{"dangling link", func(t *testing.T, dir string) { link(t, dir+"/gone", dir+"/bin/claude") }, "is not installed"},
		{"directory", func(t *testing.T, dir string) { write(t, dir+"/bin/claude/x", "") }, "is not installed"},
		{"unknown script", func(t *testing.T, dir string) { write(t, dir+"/bin/claude", "#!/bin/sh\nexec elsewhere\n") }, "script of a kind that is not known"},
		{"old", func(t *testing.T, dir string) {
			program(t, dir+"/versions/0.0.2")
			link(t, dir+"/versions/0.0.2", dir+"/bin/claude")
		}, "is version 0.0.2, older than " + d.MinVersion},
		{"old, asked", func(t *testing.T, dir string) {
			program(t, dir+"/x/old")
			link(t, dir+"/x/old", dir+"/bin/claude")
		}, "is version 0.0.1, older than " + d.MinVersion},
		{"another program", func(t *testing.T, dir string) {
			program(t, dir+"/x/other")
			link(t, dir+"/x/other", dir+"/bin/claude")
		}, "which is not how Claude Code says it"},
		{"package without its program", func(t *testing.T, dir string) {
			root := dir + "/lib/node_modules/@anthropic-ai/claude-code"
			write(t, root+"/package.json", `{"name":"@anthropic-ai/claude-code","version":"99.0.0"}`)
			write(t, root+"/bin/claude.exe", "echo placeholder")
			link(t, root+"/bin/claude.exe", dir+"/bin/claude")
		}, "without its native program for linux/" + runtime.GOARCH},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			c.build(t, dir)
			in, err := d.Locate(context.Background(), Host{Home: dir, Env: map[string]string{"PATH": dir + "/bin"}})
			var missing *Missing
			if !errors.As(err, &missing) || !strings.Contains(missing.Fact, c.want) || missing.Hint != "npm install -g @anthropic-ai/claude-code" {
				t.Fatalf("%+v, %v; want %q", in, err, c.want)
			}
			if strings.Contains(missing.Fact, "\n") {
				t.Errorf("more than a line: %q", missing.Fact)
			}
		})
	}
}

func TestLocateIgnoresRelativePath(t *testing.T) {
	d := lonely(t)
	dir := t.TempDir()
	program(t, dir+"/claude")
	t.Chdir(dir)
	for _, path := range []string{".", "", "./"} {
		in, err := d.Locate(context.Background(), Host{Env: map[string]string{"PATH": path}})
		if err == nil || !strings.Contains(err.Error(), "is not installed") {
			t.Errorf("PATH %q chose %s, %v", path, in.Path, err)
		}
	}
}

func TestLocateFinds(t *testing.T) {
	d := lonely(t)
	cpu := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	npm := func(t *testing.T, modules, version string) {
		root := modules + "/@anthropic-ai/claude-code"
		write(t, root+"/package.json", fmt.Sprintf(`{"name":"@anthropic-ai/claude-code","version":%q}`, version))
		write(t, root+"/bin/claude.exe", "echo placeholder")
		native := root + "/node_modules/@anthropic-ai/claude-code-linux-" + cpu
		write(t, native+"/package.json", fmt.Sprintf(`{"name":"@anthropic-ai/claude-code-linux-%s","version":%q}`, cpu, version))
		program(t, native+"/claude")
	}
	for _, c := range []struct {
		name, version, binary string
		build                 func(t *testing.T, dir string)
		env                   map[string]string
	}{
		{"native installer", "99.2.0", "/.local/share/claude/versions/99.2.0", func(t *testing.T, dir string) {
			program(t, dir+"/.local/share/claude/versions/99.2.0")
			link(t, dir+"/.local/share/claude/versions/99.2.0", dir+"/.local/bin/claude")
		}, nil},
		{"npm without its install script", "99.3.0", "/lib/node_modules/@anthropic-ai/claude-code/node_modules/@anthropic-ai/claude-code-linux-" + cpu + "/claude", func(t *testing.T, dir string) {
			npm(t, dir+"/lib/node_modules", "99.3.0")
			link(t, "../lib/node_modules/@anthropic-ai/claude-code/bin/claude.exe", dir+"/bin/claude")
		}, map[string]string{"PATH": "DIR/bin"}},
		{"newest of nvm, behind an unusable one in PATH", "99.10.0", "/.nvm/versions/node/v24.10.0/bin/claude", func(t *testing.T, dir string) {
			write(t, dir+"/bin/claude", "#!/bin/sh\n")
			for node, version := range map[string]string{"v24.9.0": "99.9.0", "v24.10.0": "99.10.0"} {
				root := dir + "/.nvm/versions/node/" + node
				write(t, root+"/package.json", fmt.Sprintf(`{"name":"@anthropic-ai/claude-code","version":%q}`, version))
				program(t, root+"/bin/claude")
			}
		}, map[string]string{"PATH": "DIR/bin"}},
		{"a program alone, asked with an empty HOME", "99.1.2", "/x/claude", func(t *testing.T, dir string) {
			t.Setenv("ANTHROPIC_API_KEY", "canary")
			program(t, dir+"/x/claude")
		}, map[string]string{"PATH": "DIR/x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			c.build(t, dir)
			env := map[string]string{}
			for name, value := range c.env {
				env[name] = strings.ReplaceAll(value, "DIR", dir)
			}
			in, err := d.Locate(context.Background(), Host{Home: dir, Env: env})
			if err != nil {
				t.Fatal(err)
			}
			if in.Version != c.version || in.Binary != dir+c.binary {
				t.Errorf("found %+v, want %s of version %s", in, dir+c.binary, c.version)
			}
		})
	}
}

func TestLocateEndsWithContext(t *testing.T) {
	d := lonely(t)
	dir := t.TempDir()
	program(t, dir+"/hang")
	link(t, dir+"/hang", dir+"/bin/claude")
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if in, err := d.Locate(ctx, Host{Env: map[string]string{"PATH": dir + "/bin"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%+v, %v; want the context's error", in, err)
	}
}

// TestVersionOfRealAgents: what the package says is what the program says.
func TestVersionOfRealAgents(t *testing.T) {
	for _, name := range all {
		t.Run(name, func(t *testing.T) {
			d, in := installed(t, name)
			asked, err := d.askVersion(context.Background(), in.Binary)
			if err != nil || asked != in.Version {
				t.Errorf("--version says %q, %v; the package says %q", asked, err, in.Version)
			}
		})
	}
}
