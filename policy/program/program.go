// Package program knows programs by their names: which of them run others.
//
// Claim: Runs reports true for every shell, interpreter and wrapper of its table,
// whatever directory of the system or version stands in its name, and for every
// file that is run by its path. Threat: an agent that asks for a harmless name and
// hands it the program that it means. It is a table of names, and no wall: a
// program may be a copy or a link of another. What holds an agent is the machine.
package program

import "strings"

// Name is what a program is called without a directory of the system and without a
// version: "/usr/bin/python3.11" is "python". A path to elsewhere stays a path.
func Name(arg string) string {
	for _, dir := range systemDirs {
		if rest, ok := strings.CutPrefix(arg, dir); ok && strings.IndexByte(rest, '/') < 0 {
			arg = rest
			break
		}
	}
	if trimmed := strings.TrimRight(arg, "0123456789.-"); kinds[trimmed] != 0 {
		return trimmed
	}
	return arg
}

var systemDirs = [...]string{"/usr/bin/", "/bin/", "/usr/local/bin/", "/usr/sbin/", "/sbin/", "/usr/local/sbin/"}

type kind uint8

const (
	shell kind = iota + 1
	interpreter
	wrapper
)

var kinds = func() map[string]kind {
	table := map[string]kind{}
	for k, names := range map[kind]string{
		shell: "sh bash rbash dash ash zsh ksh mksh fish csh tcsh elvish nu pwsh xonsh busybox toybox eval source .",
		interpreter: "python pypy ipython perl ruby irb node nodejs deno bun bunx npx tsx ts-node php lua luajit tclsh wish expect awk gawk mawk nawk " +
			"R Rscript julia ghci runghc racket guile sbcl clisp erl escript elixir iex groovy scala jshell java gdb lldb vi vim nvim view ex ed emacs osascript",
		wrapper: "env nice timeout xargs sudo doas su runuser nohup stdbuf time setsid chroot ionice chrt taskset flock watch strace ltrace unshare nsenter " +
			"command builtin exec parallel script systemd-run unbuffer fakeroot proot bwrap setarch prlimit numactl rlwrap xvfb-run dbus-run-session ssh-agent sg " +
			"entr hyperfine perf valgrind tmux screen at batch gosu tini dumb-init find ssh docker podman coproc",
	} {
		for name := range strings.FieldsSeq(names) {
			table[name] = k
		}
	}
	return table
}()

// Runs reports whether arg, as a program, runs other programs or code that it is
// handed; a path to anything but a directory of the system is code too.
func Runs(arg string) bool {
	name := Name(arg)
	return kinds[name] != 0 || strings.IndexByte(name, '/') >= 0
}

// Named reports whether the name of arg, whatever its directory, is in the table.
func Named(arg string) bool {
	return kinds[Name(arg[strings.LastIndexByte(arg, '/')+1:])] != 0
}

// Hands reports whether arg, behind the wrapper, may itself hold a command or open a
// shell: env -S, sudo -s, and the wrappers that take a command as one text.
func Hands(wrapper, arg string) bool {
	short := strings.HasPrefix(arg, "-") && !strings.HasPrefix(arg, "--")
	switch Name(wrapper) {
	case "env":
		return short && strings.Contains(arg, "S") || strings.HasPrefix(arg, "--s")
	case "sudo", "doas":
		return short && strings.ContainsAny(arg, "sie") || strings.HasPrefix(arg, "--s") || strings.HasPrefix(arg, "--l") || strings.HasPrefix(arg, "--e")
	case "su", "runuser", "flock", "watch", "script", "parallel", "systemd-run", "sg", "entr", "hyperfine", "tmux", "screen", "ssh", "xvfb-run", "unshare", "nsenter":
		return strings.ContainsAny(arg, " \t\n") || short && strings.Contains(arg, "c") || strings.HasPrefix(arg, "--c")
	}
	return false
}

// grammar is how a wrapper's own words are told from the program's: options that take the
// next word, or hold their value themselves; options without a value; and how many
// operands stand before the program. Options that take a value or leave it stand in
// neither: they are not known.
type grammar struct {
	valued, flags map[string]bool
	operands      int
	assigns       bool // NAME=value may stand before the program
}

func rules(operands int, valued, flags string) grammar {
	g := grammar{valued: map[string]bool{}, flags: map[string]bool{}, operands: operands}
	for option := range strings.FieldsSeq(valued) {
		g.valued[option] = true
	}
	for option := range strings.FieldsSeq(flags) {
		g.flags[option] = true
	}
	return g
}

var grammars = func() map[string]grammar {
	none := rules(0, "", "")
	table := map[string]grammar{
		"env":     rules(0, "-u --unset -C --chdir", "-i --ignore-environment -0 --null -v --debug"),
		"nice":    rules(0, "-n --adjustment", ""),
		"timeout": rules(1, "-s --signal -k --kill-after", "-v --verbose --foreground --preserve-status"),
		"xargs": rules(0, "-a --arg-file -d --delimiter -E -I -L -n --max-args -P --max-procs -s --max-chars",
			"-0 --null -r --no-run-if-empty -t --verbose -p --interactive -x --exit -o --open-tty"),
		"sudo":   rules(0, "-u --user -g --group -h --host -p --prompt -C -D --chdir -R --chroot -T -U -r -t", "-n --non-interactive -E -H --set-home -k -b --background -P -S --stdin -A"),
		"doas":   rules(0, "-u -C", "-n"),
		"stdbuf": rules(0, "-i -o -e --input --output --error", ""),
		"time":   rules(0, "-f --format -o --output", "-p --portability -v --verbose -a --append -q --quiet"),
		"setsid": rules(0, "", "-c --ctty -f --fork -w --wait"),
		"ionice": rules(0, "-c --class -n --classdata", "-t --ignore"),
		"chrt":   rules(1, "", "-b --batch -f --fifo -i --idle -o --other -r --rr"), "taskset": rules(1, "", "-c --cpu-list"),
		"command": rules(0, "", "-p -v -V"), "exec": rules(0, "-a", "-c -l"), "unbuffer": rules(0, "", "-p"),
		"gosu": rules(1, "", ""), "dumb-init": none, "tini": rules(0, "", "-s -g -v"), "nohup": none, "builtin": none,
	}
	for _, name := range []string{"env", "sudo"} {
		g := table[name]
		g.assigns = true
		table[name] = g
	}
	return table
}()

// Behind finds the program that a wrapper runs among args, of which the first is the
// wrapper. at is its index, len(args) where it runs none. Where sure is false the wrapper, or an
// option of it, is not known well enough: every word from at on may be the program.
func Behind(args []string) (at int, sure bool) {
	name := Name(args[0])
	if name == "find" {
		return behindFind(args)
	}
	g, ok := grammars[name]
	if !ok {
		return 1, false
	}
	at, sure = g.options(args)
	if !sure {
		return at, false
	}
	for g.assigns && at < len(args) && strings.IndexByte(args[at], '=') > 0 {
		at++
	}
	return min(at+g.operands, len(args)), true
}

// options skips the options behind the wrapper.
func (g *grammar) options(args []string) (at int, sure bool) {
	for at = 1; at < len(args); {
		option := args[at]
		name, _, joined := strings.Cut(option, "=")
		switch {
		case option == "--":
			return at + 1, true
		case option == "-": // env empties the environment; elsewhere it has no meaning
			return at, false
		case !strings.HasPrefix(option, "-"):
			return at, true
		case g.valued[option]:
			at += 2
		case g.flags[option], joined && strings.HasPrefix(name, "--") && g.valued[name], len(option) > 2 && option[1] != '-' && g.valued[option[:2]]:
			at++
		default:
			return at, false
		}
	}
	return len(args), true
}

// Executes reports whether arg is an option of find that runs the command behind it.
func Executes(arg string) bool {
	return arg == "-exec" || arg == "-execdir" || arg == "-ok" || arg == "-okdir"
}

// behindFind finds the only command of find; which words belong to one of several is not
// worked out.
func behindFind(args []string) (at int, sure bool) {
	at, sure = len(args), true
	for i := 1; i < len(args); i++ {
		if !Executes(args[i]) {
			continue
		}
		if at < len(args) {
			return at, false
		}
		at = i + 1
	}
	return at, sure
}

// Wraps reports whether arg, as a program, runs one that stands among its arguments.
func Wraps(arg string) bool { return kinds[Name(arg)] == wrapper }

// Shell reports whether arg, as a program, is a shell.
func Shell(arg string) bool { return kinds[Name(arg)] == shell }

// Interprets reports whether arg, as a program, is an interpreter.
func Interprets(arg string) bool { return kinds[Name(arg)] == interpreter }
