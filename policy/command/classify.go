package command

import (
	"cmp"
	"regexp"
	"strings"
)

func set(names string) map[string]bool {
	all := map[string]bool{}
	for name := range strings.FieldsSeq(names) {
		all[name] = true
	}
	return all
}

// readers have no option that runs or writes anything. careful are known with the
// options of dangerous, which are all that do more than their class; an argument
// that is not known may be one of them.
var (
	readers = set("cat ls head tail wc grep egrep fgrep stat du df echo printf test [ which whoami id uname basename dirname realpath readlink cmp cut tr nl tac rev " +
		"comm join paste fold column printenv sleep seq md5sum sha1sum sha256sum sha512sum b2sum cksum hexdump od strings nm ps free uptime jq true false " +
		"arch nproc tty locale getconf expr diff more cal")
	writers = set("touch mkdir cp mv rm rmdir ln chmod chown tee truncate dd patch unzip gzip gunzip bzip2 bunzip2 xz unxz zstd kill pkill gofmt goimports rustfmt " +
		"prettier black gcc cc g++ clang clang++ rustc tsc javac shred mktemp")
	networkers = set("curl ping dig nslookup host telnet ftp whois traceroute")
)

var careful = map[string]struct {
	class     Class
	dangerous []string // prefixes of options that make it arbitrary code; programs take beginnings of long ones
	writes    []string // and that make it write
}{
	"sort":  {ReadOnly, []string{"--co"}, []string{"-o", "--o"}},
	"rg":    {ReadOnly, []string{"--pre$", "--pre=", "--hostname-bin"}, nil},
	"split": {Writes, []string{"--f"}, nil}, "install": {Writes, []string{"--strip"}, nil}, "zip": {Writes, []string{"-T", "--u", "--te"}, nil},
	"wget": {Network, []string{"--use-a", "-e", "--exe", "--conf"}, nil},
	"date": {ReadOnly, nil, []string{"-s", "--s"}},
	"tree": {ReadOnly, nil, []string{"-o"}},
	"file": {ReadOnly, nil, []string{"-C", "--c"}},
	"less": {ReadOnly, []string{"+", "-k", "--lesskey"}, []string{"-o", "-O", "--log", "--LOG"}},
	"tar":  {Writes, []string{"--to-c", "--checkpoint-", "-I", "--use", "--rs", "--rm", "-F", "--inf", "--new"}, nil},
	"scp":  {Network, []string{"-S", "-o", "-F"}, nil}, "sftp": {Network, []string{"-S", "-o", "-F", "-b"}, nil},
	"rsync": {Network, []string{"-e", "--rs"}, nil},
	"nc":    {Network, []string{"-e", "-c"}, nil}, "ncat": {Network, []string{"-e", "-c", "--e", "--sh", "--lua"}, nil},
}

// clustered are letters that are dangerous in a cluster of options too, clusteredWrites
// those that write.
var (
	clustered       = map[string]string{"tar": "IF", "rsync": "e", "nc": "ec", "ncat": "ec", "less": "k"}
	clusteredWrites = map[string]string{"sort": "o", "date": "s", "tree": "o", "file": "C", "less": "oO"}
)

// compilers' options that run another program.
var compilerOptions = []string{"-wrapper", "-fplugin", "-B", "--plugin", "-Clinker", "-C"}

// classify judges a program that runs no other, by its name and arguments.
func classify(name string, args []word) (Class, string) {
	switch name {
	case "git":
		return git(args)
	case "gh":
		return gh(args)
	case "go":
		return goTool(args)
	case "cargo":
		return subcommand("cargo", args, []string{"--config", "-Z", "+"}, cargo)
	case "npm", "pnpm", "yarn":
		return subcommand(name, args, []string{"--script-shell", "--node-options", "--prefix", "-C"}, npm)
	case "pip", "uv", "pipx", "gem", "apt", "apt-get", "brew", "dnf", "apk", "twine":
		return subcommand(name, args, []string{"-o", "--config-settings"}, packages)
	case "sed":
		return sed(args)
	case "uniq", "xxd", "hostname":
		return byOperands(name, args)
	}
	switch {
	case readers[name]:
		return ReadOnly, name + " reads"
	case writers[name]:
		if option := found(args, compilerOptions); option != "" && compiles[name] {
			return Arbitrary, name + " " + option + " can run another program"
		}
		return Writes, name + " changes files or processes in the machine"
	case networkers[name]:
		return Network, name + " talks to other hosts"
	}
	if c, ok := careful[name]; ok {
		return options(name, args, c.class, c.dangerous, c.writes)
	}
	return Arbitrary, "the program " + name + " is not known"
}

var compiles = set("gcc cc g++ clang clang++ rustc")

func options(name string, args []word, class Class, dangerous, writes []string) (Class, string) {
	if unknown(args) {
		return Arbitrary, "an argument of " + name + " is not known, and may be an option that runs a program"
	}
	if option := found(args, dangerous); option != "" {
		return Arbitrary, name + " " + option + " can run another program"
	}
	if option := inCluster(name, args, clustered[name]); option != "" {
		return Arbitrary, name + " " + option + " can run another program"
	}
	if option := cmp.Or(found(args, writes), inCluster(name, args, clusteredWrites[name])); option != "" {
		return Writes, name + " " + option + " writes"
	}
	return class, name + " with options that are known"
}

// mostOperands is how many words that are no options programs may have, up to which they
// only read: the next one is the file that they write, or the name that they set.
var mostOperands = map[string]int{"uniq": 1, "xxd": 1, "hostname": 0}

func byOperands(name string, args []word) (Class, string) {
	operands := 0
	for _, a := range args {
		switch {
		case !a.known:
			operands = len(args) + 1
		case a.text == "-" || !strings.HasPrefix(a.text, "-"):
			operands++
		}
	}
	if operands > mostOperands[name] {
		return Writes, name + " may write what it is told"
	}
	return ReadOnly, name + " reads"
}

// inCluster returns the first cluster of options with one of letters in it.
func inCluster(name string, args []word, letters string) string {
	for i, a := range args {
		first := name == "tar" && i == 0 // tar takes its letters without a dash too
		if (first || strings.HasPrefix(a.text, "-")) && !strings.HasPrefix(a.text, "--") && strings.ContainsAny(a.text, letters) {
			return a.text
		}
	}
	return ""
}

func unknown(args []word) bool {
	for _, a := range args {
		if !a.known {
			return true
		}
	}
	return false
}

// found returns the option of prefixes that an argument begins with; one that ends
// with $ is the whole argument.
func found(args []word, prefixes []string) string {
	for _, a := range args {
		for _, p := range prefixes {
			if exact, ok := strings.CutSuffix(p, "$"); ok && a.text == exact {
				return exact
			}
			if strings.HasPrefix(a.text, p) && (strings.HasPrefix(p, "--") || len(p) > 2 || !strings.HasPrefix(a.text, "--")) {
				return p
			}
		}
	}
	return ""
}

// subcommand judges by the first argument that is no option. An option before it
// might take it as its value, so only known ones may stand there.
func subcommand(name string, args []word, dangerous []string, classes map[string]Class) (Class, string) {
	if option := found(args, dangerous); option != "" {
		return Arbitrary, name + " " + option + " can run another program"
	}
	for _, a := range args {
		switch {
		case !a.known:
			return Arbitrary, "the subcommand of " + name + " is not known"
		case a.text == "-v" || a.text == "-q" || a.text == "-y" || a.text == "--quiet" || a.text == "--verbose" || a.text == "--silent":
			continue
		case strings.HasPrefix(a.text, "-"):
			return Arbitrary, name + " " + a.text + " before the subcommand"
		}
		if class, ok := classes[a.text]; ok {
			return class, name + " " + a.text
		}
		return Arbitrary, name + " " + a.text + " is not known"
	}
	return ReadOnly, name + " prints its help"
}

func classes(of map[Class]string) map[string]Class {
	table := map[string]Class{}
	for class, names := range of {
		for name := range set(names) {
			table[name] = class
		}
	}
	return table
}

// What a language's own build and test commands run is the code of the workspace:
// they are called writes, and a program that is started by name of a script or a
// target is arbitrary code.
var (
	cargo = classes(map[Class]string{
		ReadOnly: "tree metadata version help locate-project", Writes: "build b check c test t bench clippy fmt doc clean init new vendor fix",
		Network: "add install fetch update search login", Push: "publish yank owner",
	})
	npm = classes(map[Class]string{
		ReadOnly: "ls list outdated config help why root prefix", Network: "ci install i add update up upgrade audit view info search remove uninstall dedupe ping login",
		Push: "publish unpublish deprecate dist-tag owner access",
	})
	packages = classes(map[Class]string{
		ReadOnly: "list show freeze check help info policy", Network: "install download sync add remove uninstall update upgrade search lock fetch", Push: "upload push publish yank",
	})
	goTools = classes(map[Class]string{
		ReadOnly: "list version env doc help", Writes: "build test vet fmt clean fix work", Network: "get install mod",
	})
)

func goTool(args []word) (Class, string) {
	if option := found(args, []string{"-exec", "--exec", "-toolexec", "--toolexec", "-vettool", "--vettool", "-overlay", "--overlay"}); option != "" {
		return Arbitrary, "go " + option + " can run another program"
	}
	if len(args) > 1 && args[0].known && args[0].text == "env" && found(args[1:], []string{"-w", "-u"}) != "" {
		return Arbitrary, "go env -w changes what go runs later"
	}
	if unknown(args) {
		return Arbitrary, "an argument of go is not known, and may be -exec"
	}
	return subcommand("go", args, []string{"-C"}, goTools)
}

var (
	sedPrint      = regexp.MustCompile(`^(\d+|\$)?(,(\d+|\$|\+\d+))?[pdq=]$`)
	sedSubstitute = regexp.MustCompile(`^(\d+|\$)?(,(\d+|\$))?s(/[^/\\\n]*(\\.[^/\\\n]*)*/[^/\\\n]*(\\.[^/\\\n]*)*/|\|[^|\\\n]*\|[^|\\\n]*\||#[^#\\\n]*#[^#\\\n]*#)[gpiI0-9]*$`)
)

// sed has commands that run programs and write files; two harmless forms are known.
func sed(args []word) (Class, string) {
	class, script := ReadOnly, false
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case !a.known && !script:
			return Arbitrary, "the script of sed is not known"
		case !a.known:
		case a.text == "-n" || a.text == "-E" || a.text == "-r" || a.text == "--sandbox":
		case a.text == "-i" || strings.HasPrefix(a.text, "-i") || strings.HasPrefix(a.text, "--in-place"):
			class = Writes
		case a.text == "-e" && i+1 < len(args):
			i++
			if !args[i].known || !harmlessSed(args[i].text) {
				return Arbitrary, "a script of sed that is not understood"
			}
			script = true
		case strings.HasPrefix(a.text, "-"):
			return Arbitrary, "sed " + a.text
		case !script:
			if !harmlessSed(a.text) {
				return Arbitrary, "a script of sed that is not understood"
			}
			script = true
		}
	}
	return class, "sed with a script that is understood"
}

func harmlessSed(script string) bool {
	return sedPrint.MatchString(script) || sedSubstitute.MatchString(script)
}
