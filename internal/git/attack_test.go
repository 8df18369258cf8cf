package git

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
)

// hostile is a repository that a stranger wrote, with a program that leaves a mark
// when anything runs it.
type hostile struct {
	t         *testing.T
	dir, mark string
	program   string // a command line for the shell
	script    string // the same as an executable file
	home      string // of the plain git that is the control
}

func newHostile(t *testing.T) *hostile {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{t: t, dir: filepath.Join(base, "repo"), mark: filepath.Join(base, "mark"), script: filepath.Join(base, "evil"), home: filepath.Join(base, "home")}
	h.program = "touch " + h.mark
	h.write(h.script, "#!/bin/sh\ntouch "+h.mark+"\n")
	h.must(os.Chmod(h.script, 0o755))
	h.write(filepath.Join(h.home, ".gitconfig"), "[user]\n\tname = T\n\temail = t@example.org\n[init]\n\tdefaultBranch = main\n")
	h.must(os.MkdirAll(h.dir, 0o755))
	h.git("init", "--quiet")
	h.write("file.txt", "one\n")
	h.commit()
	h.write("file.txt", "two\n")
	h.commit()
	return h
}

func (h *hostile) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// write makes a file, below the repository where the path is relative.
func (h *hostile) write(path, content string) {
	h.t.Helper()
	if !filepath.IsAbs(path) {
		path = filepath.Join(h.dir, path)
	}
	h.must(os.MkdirAll(filepath.Dir(path), 0o755))
	h.must(os.WriteFile(path, []byte(content), 0o644))
}

func (h *hostile) commit() {
	h.t.Helper()
	h.git("add", "-A")
	h.git("commit", "--quiet", "-m", "a change")
}

func (h *hostile) config(settings ...string) {
	h.t.Helper()
	for i := 0; i < len(settings); i += 2 {
		h.git("config", settings[i], settings[i+1])
	}
}

// plain is git as a person has it.
func (h *hostile) plain(args ...string) *exec.Cmd {
	cmd := exec.Command("git", args...)
	cmd.Dir = h.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + h.home, "GIT_CONFIG_NOSYSTEM=1", "LC_ALL=C", "TERM=xterm", "GIT_TERMINAL_PROMPT=0"}
	return cmd
}

func (h *hostile) git(args ...string) string {
	h.t.Helper()
	out, err := h.plain(args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// ran reports whether the program was run, and forgets it.
func (h *hostile) ran() bool {
	return os.Remove(h.mark) == nil
}

// missing makes the repository a partial clone that lacks an object, and returns its id.
func (h *hostile) missing(url string) string {
	h.t.Helper()
	id := h.git("rev-parse", "HEAD:file.txt")
	h.must(os.Remove(filepath.Join(h.dir, ".git", "objects", id[:2], id[2:])))
	h.config("core.repositoryFormatVersion", "1", "extensions.partialClone", "origin", "remote.origin.promisor", "true", "remote.origin.url", url)
	return id
}

// sub puts a submodule with a commit of its own at sub, and returns its directory.
func (h *hostile) sub() string {
	h.t.Helper()
	dir := filepath.Join(h.dir, "sub")
	h.git("init", "--quiet", dir)
	h.write("sub/s.txt", "one\n")
	h.git("-C", dir, "add", "-A")
	h.git("-C", dir, "commit", "--quiet", "-m", "first")
	h.git("add", "-A")
	h.git("commit", "--quiet", "-m", "with sub")
	h.write("sub/s.txt", "two\n")
	h.git("-C", dir, "commit", "--quiet", "-am", "second")
	h.git("add", "-A")
	h.git("commit", "--quiet", "-m", "sub moved")
	return dir
}

// The walls, by the names that the attacks call them.
func lift(t *testing.T, wall string) {
	t.Helper()
	oldSettings, oldEnvironment, oldCommands, oldFiltering := settings, environment, maps.Clone(commands), maps.Clone(filtering)
	t.Cleanup(func() {
		settings, environment, commands, filtering = oldSettings, oldEnvironment, oldCommands, oldFiltering
	})
	kind, name, _ := strings.Cut(wall, " ")
	gone := func(list []string) []string {
		left := slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == name })
		if len(left) == len(list) {
			t.Fatalf("there is no wall %q", wall)
		}
		return left
	}
	switch kind {
	case "setting":
		settings = gone(settings)
	case "environment":
		environment = gone(environment)
	case "filters":
		if !filtering[name] {
			t.Fatalf("there is no wall %q", wall)
		}
		delete(filtering, name)
	case "command": // one that is not in the table
		if _, known := commands[name]; known {
			t.Fatalf("there is no wall %q", wall)
		}
		commands[name] = nil
	default: // an option of a command
		list := commands[kind]
		commands[kind] = slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == name })
		if len(commands[kind]) == len(list) {
			t.Fatalf("there is no wall %q", wall)
		}
	}
}

// walls lists all that stand in the code.
func walls() []string {
	var all []string
	for _, s := range settings {
		if s != "core.quotePath=false" {
			all = append(all, "setting "+s)
		}
	}
	for _, s := range environment {
		if s != "LC_ALL=C" {
			all = append(all, "environment "+s)
		}
	}
	for command, options := range commands {
		for _, o := range options {
			all = append(all, command+" "+o)
		}
	}
	for command := range filtering {
		all = append(all, "filters "+command)
	}
	return all
}

type attack struct {
	name string
	arm  func(h *hostile) (bait []string) // bait is the command that plain git falls for
	wall []string                         // what stands against it: without it, the program runs
	env  func(h *hostile) []string        // further environment, of the control too
}

// epoch makes a file older than any index entry of it.
var epoch = time.Unix(1, 0)

func hook(name string) func(*hostile) {
	return func(h *hostile) {
		h.write(".git/hooks/"+name, "#!/bin/sh\ntouch "+h.mark+"\n")
		h.must(os.Chmod(filepath.Join(h.dir, ".git/hooks", name), 0o755))
	}
}

// filter defines one whose attribute every text file has, and touches one.
func filter(name, key string) func(*hostile) {
	return func(h *hostile) {
		h.write(".gitattributes", "*.txt filter="+name+"\n")
		h.commit()
		h.config("filter."+name+"."+key, h.program)
		h.write("file.txt", "TWO\n")
	}
}

var attacks = []attack{
	{name: "hook of status", wall: []string{"setting core.hooksPath=/dev/null"}, arm: func(h *hostile) []string {
		hook("post-index-change")(h)
		// An index entry as old as its file is looked at again, and the index is written.
		h.must(os.Chtimes(filepath.Join(h.dir, "file.txt"), epoch, epoch))
		return []string{"status"}
	}},
	{name: "hook of update-ref", wall: []string{"setting core.hooksPath=/dev/null"}, arm: func(h *hostile) []string {
		hook("reference-transaction")(h)
		return []string{"update-ref", "refs/heads/other", "HEAD"}
	}},
	{name: "hooks in another directory", wall: []string{"setting core.hooksPath=/dev/null"}, arm: func(h *hostile) []string {
		h.write("hooks/reference-transaction", "#!/bin/sh\ntouch "+h.mark+"\n")
		h.must(os.Chmod(filepath.Join(h.dir, "hooks/reference-transaction"), 0o755))
		h.config("core.hooksPath", "hooks")
		return []string{"update-ref", "refs/heads/other", "HEAD"}
	}},
	{name: "fsmonitor", wall: []string{"setting core.fsmonitor=false"}, arm: func(h *hostile) []string {
		h.config("core.fsmonitor", h.script)
		return []string{"status"}
	}},
	{name: "clean filter of status", wall: []string{"filters status"}, arm: func(h *hostile) []string {
		filter("evil", "clean")(h)
		return []string{"status"}
	}},
	{name: "filter process of status", wall: []string{"filters status"}, arm: func(h *hostile) []string {
		filter("evil", "process")(h)
		h.config("filter.evil.required", "true")
		return []string{"status"}
	}},
	{name: "filter whose name holds an equals sign", wall: []string{"filters status"}, arm: func(h *hostile) []string {
		filter("a=b", "clean")(h)
		return []string{"status"}
	}},
	{name: "filter of a file that is included", wall: []string{"filters status"}, arm: func(h *hostile) []string {
		filter("evil", "clean")(h)
		h.git("config", "--unset", "filter.evil.clean")
		h.write(filepath.Join(filepath.Dir(h.dir), "further"), "[filter \"evil\"]\n\tclean = "+h.script+"\n")
		h.config("includeIf.gitdir:**.path", filepath.Join(filepath.Dir(h.dir), "further"))
		return []string{"status"}
	}},
	{name: "clean filter of diff", wall: []string{"filters diff"}, arm: func(h *hostile) []string {
		filter("evil", "clean")(h)
		return []string{"diff"}
	}},
	{name: "smudge filter of apply", wall: []string{"filters apply"}, arm: func(h *hostile) []string {
		filter("evil", "smudge")(h)
		h.write("file.txt", "two\n")
		h.write("patch", "--- a/file.txt\n+++ b/file.txt\n@@ -1 +1 @@\n-two\n+three\n")
		return []string{"apply", "patch"}
	}},
	{name: "external diff", wall: []string{"diff --no-ext-diff"}, arm: func(h *hostile) []string {
		h.config("diff.external", h.script)
		return []string{"diff", "HEAD~1", "HEAD"}
	}},
	{name: "diff driver", wall: []string{"diff --no-ext-diff"}, arm: func(h *hostile) []string {
		h.write(".git/info/attributes", "*.txt diff=evil\n")
		h.config("diff.evil.command", h.script)
		return []string{"diff", "HEAD~1", "HEAD"}
	}},
	{name: "textconv of diff", wall: []string{"diff --no-textconv"}, arm: func(h *hostile) []string {
		h.write(".git/info/attributes", "*.txt diff=evil\n")
		h.config("diff.evil.textconv", h.script)
		return []string{"diff", "HEAD~1", "HEAD"}
	}},
	{name: "textconv of log", wall: []string{"log --no-textconv"}, arm: func(h *hostile) []string {
		h.write(".git/info/attributes", "*.txt diff=evil\n")
		h.config("diff.evil.textconv", h.script)
		return []string{"log", "-p", "-1"}
	}},
	{name: "gpg program of log", wall: []string{"log --no-show-signature"}, arm: func(h *hostile) []string {
		h.write("signed", "tree "+h.git("rev-parse", "HEAD^{tree}")+"\nauthor T <t@e> 1 +0000\ncommitter T <t@e> 1 +0000\n"+
			"gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----\n\nsigned\n")
		id := h.git("hash-object", "-w", "-t", "commit", "signed")
		h.config("log.showSignature", "true", "gpg.program", h.script)
		return []string{"log", "-1", id}
	}},
	{name: "gpg program of commit", wall: []string{"command commit"}, arm: func(h *hostile) []string {
		h.config("commit.gpgSign", "true", "gpg.program", h.script, "user.name", "T", "user.email", "t@e")
		return []string{"commit", "--allow-empty", "-m", "x"}
	}},
	{name: "filter in a submodule", wall: []string{"status --ignore-submodules=all"}, arm: func(h *hostile) []string {
		dir := h.sub()
		h.write("sub/.git/info/attributes", "*.txt filter=evil\n")
		h.git("-C", dir, "config", "filter.evil.clean", h.program)
		h.write("sub/s.txt", "TWO\n")
		return []string{"status"}
	}},
	{name: "textconv in a submodule, of diff", wall: []string{"diff --submodule=short"}, arm: subTextconv("diff", "HEAD~1", "HEAD")},
	{name: "textconv in a submodule, of log", wall: []string{"log --submodule=short"}, arm: subTextconv("log", "-p", "-1")},
	{name: "update command of a submodule", wall: []string{"command submodule"}, arm: func(h *hostile) []string {
		dir := h.sub()
		h.write(".gitmodules", "[submodule \"sub\"]\n\tpath = sub\n\turl = ext::"+h.script+"\n")
		h.config("submodule.sub.url", dir, "submodule.sub.update", "!"+h.script)
		h.git("-C", dir, "checkout", "--quiet", "HEAD~1")
		return []string{"submodule", "update"}
	}},
	{name: "ext transport", wall: []string{"environment GIT_ALLOW_PROTOCOL=none"}, arm: func(h *hostile) []string {
		h.config("protocol.ext.allow", "always")
		return []string{"cat-file", "blob", h.missing("ext::" + h.script)}
	}},
	{name: "ssh command", wall: []string{"environment GIT_ALLOW_PROTOCOL=none"}, arm: func(h *hostile) []string {
		h.config("core.sshCommand", h.script)
		return []string{"cat-file", "blob", h.missing("ssh://host.invalid/x")}
	}},
	{name: "git proxy", wall: []string{"environment GIT_ALLOW_PROTOCOL=none"}, arm: func(h *hostile) []string {
		h.config("core.gitProxy", h.script)
		return []string{"cat-file", "blob", h.missing("git://host.invalid/x")}
	}},
	{name: "upload-pack", wall: []string{"environment GIT_ALLOW_PROTOCOL=none"}, arm: func(h *hostile) []string {
		h.config("remote.origin.uploadpack", h.script)
		return []string{"cat-file", "blob", h.missing(h.dir)}
	}},
	{name: "credential helper", wall: []string{"environment GIT_ALLOW_PROTOCOL=none"}, arm: func(h *hostile) []string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
		}))
		h.t.Cleanup(server.Close)
		h.config("credential.helper", "!"+h.program)
		return []string{"cat-file", "blob", h.missing(server.URL)}
	}},
	{name: "command for the refs of an alternate", wall: []string{"command fetch", "environment GIT_ALLOW_PROTOCOL=none"}, arm: func(h *hostile) []string {
		other := filepath.Join(filepath.Dir(h.dir), "other")
		h.git("clone", "--quiet", h.dir, other)
		h.git("-C", other, "commit", "--quiet", "--allow-empty", "-m", "more")
		h.write(".git/objects/info/alternates", filepath.Join(other, ".git", "objects")+"\n")
		h.config("core.alternateRefsCommand", h.program)
		return []string{"fetch", other, "HEAD"}
	}},
	{name: "the person's own configuration", wall: []string{"environment HOME=/nonexistent"}, arm: func(h *hostile) []string {
		h.write(filepath.Join(h.home, ".gitconfig"), "[diff]\n\texternal = "+h.script+"\n[core]\n\tattributesFile = ~/attributes\n[filter \"evil\"]\n\tclean = "+h.script+"\n")
		return []string{"config", "--get", "diff.external"}
	}},
	{name: "the system's configuration", wall: []string{"environment GIT_CONFIG_NOSYSTEM=1"}, arm: func(h *hostile) []string {
		h.write(filepath.Join(h.home, "system"), "[diff]\n\texternal = "+h.script+"\n")
		return []string{"config", "--get", "diff.external"}
	}, env: func(h *hostile) []string {
		return []string{"GIT_CONFIG_SYSTEM=" + filepath.Join(h.home, "system")}
	}},
	{name: "replaced objects", wall: []string{"environment GIT_NO_REPLACE_OBJECTS=1"}, arm: func(h *hostile) []string {
		h.git("replace", "HEAD", "HEAD~1")
		return []string{"rev-list", "--count", "HEAD"}
	}},
}

// shown are the attacks that run nothing: what plain git prints is their mark.
var shown = map[string]func(h *hostile, out string) bool{
	"the person's own configuration": func(h *hostile, out string) bool { return strings.Contains(out, h.script) },
	"the system's configuration":     func(h *hostile, out string) bool { return strings.Contains(out, h.script) },
	"replaced objects":               func(_ *hostile, out string) bool { return strings.HasPrefix(out, "1\n") },
}

func subTextconv(bait ...string) func(*hostile) []string {
	return func(h *hostile) []string {
		dir := h.sub()
		h.write("sub/.git/info/attributes", "*.txt diff=evil\n")
		h.git("-C", dir, "config", "diff.evil.textconv", h.script)
		h.config("diff.submodule", "diff")
		return bait
	}
}

// TestAttacks makes each attack three times: on plain git, which must fall for it; on this
// package, which must not; and on this package without the wall, which must fall for it again.
func TestAttacks(t *testing.T) {
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			fell := func(run func(h *hostile, bait []string) string) bool {
				t.Helper()
				h := newHostile(t)
				if a.env != nil {
					old := environment
					environment = append(slices.Clone(environment), a.env(h)...)
					defer func() { environment = old }()
				}
				bait := a.arm(h)
				h.ran()
				out := run(h, bait)
				if seen := shown[a.name]; seen != nil {
					return seen(h, out)
				}
				return h.ran()
			}
			ours := func(h *hostile, bait []string) string {
				out, err := Repo{h.dir}.Run(t.Context(), bait...)
				return fmt.Sprint(out, err)
			}
			if !fell(func(h *hostile, bait []string) string {
				cmd := h.plain(bait...)
				if a.env != nil {
					cmd.Env = append(slices.DeleteFunc(cmd.Env, func(s string) bool { return s == "GIT_CONFIG_NOSYSTEM=1" }), a.env(h)...)
				}
				out, _ := cmd.Output() // it may fail and have run the program all the same
				return string(out)
			}) {
				t.Fatal("plain git does not fall for it: the attack proves nothing")
			}
			if fell(ours) {
				t.Error("it succeeds")
			}
			for _, wall := range a.wall {
				lift(t, wall)
			}
			if slices.Contains(a.wall, "environment HOME=/nonexistent") {
				if !fell(func(h *hostile, bait []string) string {
					environment = append(environment, "HOME="+h.home)
					return ours(h, bait)
				}) {
					t.Errorf("without %q it does not succeed either: that is not the wall", a.wall)
				}
			} else if !fell(ours) {
				t.Errorf("without %q it does not succeed either: that is not the wall", a.wall)
			}
		})
	}
}

// TestEveryWallIsAttacked: a wall that nothing reaches is none.
func TestEveryWallIsAttacked(t *testing.T) {
	attacked := map[string]bool{}
	for _, a := range attacks {
		for _, w := range a.wall {
			attacked[w] = true
		}
	}
	for _, w := range walls() {
		if !attacked[w] {
			t.Errorf("no attack meets the wall %q", w)
		}
	}
}

// TestNoPager: whatever the output goes to, git has no terminal and starts no pager.
func TestNoPager(t *testing.T) {
	for _, setting := range []string{"core.pager", "pager.log"} {
		h := newHostile(t)
		h.config(setting, h.program)
		onTerminal := func(run func(tty *os.File)) {
			master, tty, err := pty.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer master.Close()
			go func() { _, _ = master.Read(make([]byte, 64<<10)) }()
			run(tty)
			tty.Close()
		}
		onTerminal(func(tty *os.File) {
			cmd := h.plain("log")
			cmd.Stdout = tty
			_ = cmd.Run() // only whether the pager ran counts
		})
		if !h.ran() {
			t.Fatalf("%s: plain git starts no pager: the attack proves nothing", setting)
		}
		onTerminal(func(tty *os.File) {
			if err := (Repo{h.dir}).Stream(t.Context(), nil, tty, "log"); err != nil {
				t.Error(err)
			}
		})
		if h.ran() {
			t.Errorf("%s was started", setting)
		}
	}
}

// TestNothingRuns takes a repository that is armed with everything through all that is done
// to a person's repository.
func TestNothingRuns(t *testing.T) {
	ctx := t.Context()
	h := newHostile(t)
	h.sub()
	for _, name := range []string{"post-index-change", "reference-transaction", "pre-auto-gc", "post-checkout", "pre-commit", "pre-push"} {
		hook(name)(h)
	}
	h.write(".gitattributes", "*.txt filter=a=b diff=evil merge=evil\n")
	h.git("-c", "core.hooksPath=/dev/null", "add", ".gitattributes")
	h.git("-c", "core.hooksPath=/dev/null", "commit", "--quiet", "-m", "attributes")
	base := h.git("-c", "core.hooksPath=/dev/null", "rev-parse", "HEAD")
	h.config("filter.a=b.clean", h.program, "filter.a=b.smudge", h.program, "diff.evil.textconv", h.script, "diff.evil.command", h.script,
		"merge.evil.driver", h.script, "diff.external", h.script, "core.pager", h.program, "core.sshCommand", h.script, "core.editor", h.script,
		"core.alternateRefsCommand", h.program, "gpg.program", h.script, "log.showSignature", "true", "credential.helper", "!"+h.program,
		"diff.submodule", "diff", "submodule.recurse", "true", "remote.origin.url", "ext::"+h.script, "remote.origin.uploadpack", h.script,
		"protocol.ext.allow", "always", "status.submoduleSummary", "true", "core.fsmonitor", h.script)
	h.write("file.txt", "TWO\n")
	h.ran()
	// The control: plain git runs it at the first look.
	if _, err := h.plain("status").Output(); err != nil || !h.ran() {
		t.Fatalf("plain git status: %v: the repository is not hostile", err)
	}

	repo, err := Open(ctx, h.dir)
	if err != nil {
		t.Fatal(err)
	}
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if h.ran() {
			t.Errorf("%s ran the program", what)
		}
	}
	_, err = repo.Resolve(ctx, "HEAD")
	step("Resolve", err)
	_, err = repo.Remotes(ctx)
	step("Remotes", err)
	_, err = repo.Run(ctx, "status", "--porcelain", "--untracked-files=normal")
	step("status", err)
	_, err = repo.Submodules(ctx, base)
	step("Submodules", err)
	_, err = repo.LargeFiles(ctx, base)
	step("LargeFiles", err)
	_, err = repo.Shallow(ctx, base)
	step("Shallow", err)
	var bundle strings.Builder
	step("WriteBundle", repo.WriteBundle(ctx, &bundle, base))
	q, err := MakeQuarantine(ctx, filepath.Join(h.home, "q.git"), repo)
	step("MakeQuarantine", err)
	work := workOn(t, h, bundle.String(), base)
	sent, err := os.Open(work)
	step("opening the bundle", err)
	defer sent.Close()
	commit, err := q.Take(ctx, sent, "refs/heads/agent/x", base)
	step("Take", err)
	_, err = q.Run(ctx, "diff", "--stat", base, commit)
	step("diff", err)
	step("Give", q.Give(ctx, repo, "agent/x", commit, base))
	if got, err := repo.Resolve(ctx, "refs/heads/agent/x"); err != nil || got != commit {
		t.Errorf("the branch is at %s, %v, want %s", got, err, commit)
	}
	h.write("file.txt", "two\n")
	patch := filepath.Join(h.home, "patch")
	h.write(patch, "--- a/file.txt\n+++ b/file.txt\n@@ -1 +1 @@\n-two\n+three\n")
	_, err = repo.Run(ctx, "apply", patch)
	step("apply", err)
}

// workOn does what a machine does: it unpacks the bundle, commits, and sends a bundle of its
// branch refs/heads/agent/x, whose path is returned.
func workOn(t *testing.T, h *hostile, bundle, base string) string {
	t.Helper()
	dir := filepath.Join(h.home, "guest")
	in, out := filepath.Join(h.home, "in.bundle"), filepath.Join(h.home, "out.bundle")
	h.write(in, bundle)
	h.git("init", "--quiet", "-b", "agent/x", dir)
	h.git("-C", dir, "bundle", "unbundle", in)
	h.git("-C", dir, "reset", "--quiet", "--hard", base)
	h.git("-C", dir, "commit", "--quiet", "--allow-empty", "-m", "the agent's")
	h.git("-C", dir, "bundle", "create", "--quiet", out, "refs/heads/agent/x", "^"+base)
	return out
}

// TestPush: the URL may be a stranger's, and the person's hooks are not run on names that
// the agent chose. The person's settings hold otherwise.
func TestPush(t *testing.T) {
	push := func(t *testing.T, arm func(h *hostile) (url string)) (h *hostile, pushed bool, err error) {
		h = newHostile(t)
		t.Setenv("HOME", h.home)
		t.Setenv("GIT_CONFIG_NOSYSTEM", "1")
		url := arm(h)
		commit := h.git("rev-parse", "HEAD")
		q, err := MakeQuarantine(t.Context(), filepath.Join(h.home, "q.git"), Repo{h.dir})
		if err != nil {
			t.Fatal(err)
		}
		err = q.Push(t.Context(), url, commit, "refs/heads/agent/x", strings.Repeat("0", 40))
		out, listErr := h.plain("--git-dir="+url, "rev-parse", "refs/heads/agent/x").Output()
		return h, listErr == nil && strings.TrimSpace(string(out)) == commit, err
	}
	remote := func(h *hostile) string {
		dir := filepath.Join(h.home, "remote.git")
		h.git("init", "--quiet", "--bare", dir)
		return dir
	}
	prePush := func(h *hostile) string {
		h.write(filepath.Join(h.home, "hooks", "pre-push"), "#!/bin/sh\ntouch "+h.mark+"\n")
		h.must(os.Chmod(filepath.Join(h.home, "hooks", "pre-push"), 0o755))
		h.write(filepath.Join(h.home, ".gitconfig"), "[core]\n\thooksPath = ~/hooks\n[user]\n\tname = T\n\temail = t@e\n")
		return remote(h)
	}
	ext := func(h *hostile) string {
		h.write(filepath.Join(h.home, ".gitconfig"), "[protocol \"ext\"]\n\tallow = always\n")
		return "ext::" + h.script
	}
	t.Run("works", func(t *testing.T) {
		if _, pushed, err := push(t, remote); !pushed || err != nil {
			t.Errorf("pushed %v, %v", pushed, err)
		}
	})
	t.Run("started from a hook or an alias of another repository", func(t *testing.T) {
		if _, pushed, err := push(t, func(h *hostile) string {
			url := remote(h)
			t.Setenv("GIT_DIR", filepath.Join(h.home, "another.git"))
			t.Setenv("GIT_NAMESPACE", "another")
			return url
		}); !pushed || err != nil {
			t.Errorf("pushed %v, %v", pushed, err)
		}
	})
	t.Run("hook", func(t *testing.T) {
		if h, pushed, err := push(t, prePush); h.ran() || !pushed {
			t.Errorf("the hook ran, or nothing was pushed: %v", err)
		}
		old := pushSettings
		defer func() { pushSettings = old }()
		pushSettings = nil
		if h, _, _ := push(t, prePush); !h.ran() {
			t.Error("without the wall the hook does not run either")
		}
	})
	t.Run("remote helper", func(t *testing.T) {
		if h, _, err := push(t, ext); h.ran() || err == nil {
			t.Errorf("the helper ran: %v", err)
		}
		old := pushProtocols
		defer func() { pushProtocols = old }()
		pushProtocols += ":ext"
		if h, _, _ := push(t, ext); !h.ran() {
			t.Error("without the wall the helper does not run either")
		}
	})
	t.Run("a ref that has moved", func(t *testing.T) {
		h := newHostile(t)
		t.Setenv("HOME", h.home)
		url := remote(h)
		h.git("push", "--quiet", url, "HEAD~1:refs/heads/agent/x")
		q, err := MakeQuarantine(t.Context(), filepath.Join(h.home, "q.git"), Repo{h.dir})
		if err != nil {
			t.Fatal(err)
		}
		if err := q.Push(t.Context(), url, h.git("rev-parse", "HEAD"), "refs/heads/agent/x", strings.Repeat("0", 40)); err == nil {
			t.Error("a branch that was not there when it was decided was overwritten")
		}
	})
}

func TestCancelledIsSaid(t *testing.T) {
	h := newHostile(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, h.dir); !errors.Is(err, context.Canceled) {
		t.Errorf("Open says %v, want that it was cancelled", err)
	}
	if _, err := (Repo{h.dir}).Resolve(ctx, "HEAD"); !errors.Is(err, context.Canceled) {
		t.Errorf("Resolve says %v, want that it was cancelled", err)
	}
}
