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

// Wraps reports whether arg, as a program, runs one that stands among its arguments.
func Wraps(arg string) bool { return kinds[Name(arg)] == wrapper }

// Shell reports whether arg, as a program, is a shell.
func Shell(arg string) bool { return kinds[Name(arg)] == shell }

// Interprets reports whether arg, as a program, is an interpreter.
func Interprets(arg string) bool { return kinds[Name(arg)] == interpreter }
