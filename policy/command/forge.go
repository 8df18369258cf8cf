package command

import "strings"

var gitCommands = classes(map[Class]string{
	ReadOnly: "status log show rev-parse ls-files ls-tree cat-file describe shortlog rev-list merge-base name-rev for-each-ref show-ref version help count-objects " +
		"diff diff-tree diff-index diff-files whatchanged cherry check-ignore check-attr blame annotate grep var fsck verify-pack show-branch",
	Writes: "add commit checkout switch restore reset merge rebase stash tag branch rm mv clean init apply am cherry-pick revert worktree gc notes update-ref reflog " +
		"bundle archive sparse-checkout prune repack symbolic-ref read-tree write-tree update-index commit-tree hash-object format-patch remote bisect maintenance",
	Network: "fetch pull clone ls-remote",
	Push:    "push send-pack",
})

// gitOptions are those before the subcommand that change only where git looks or how
// it prints; valued ones take the next word.
var (
	gitOptions = set("-p --paginate -P --no-pager --bare --no-replace-objects --literal-pathspecs --no-optional-locks --no-advice")
	gitValued  = set("-C --git-dir --work-tree --namespace")
	// gitSafeKeys are settings that name no program. All others might.
	gitSafeKeys = set("user.name user.email core.quotepath core.abbrev core.preloadindex core.untrackedcache core.autocrlf core.filemode color.ui color.status color.diff " +
		"advice.detachedhead init.defaultbranch commit.gpgsign tag.gpgsign pull.rebase pull.ff push.default log.date diff.renames merge.conflictstyle safe.directory")
)

// git finds the subcommand behind git's own options.
func git(args []word) (Class, string) {
	for len(args) > 0 {
		a := args[0]
		name, value, joined := strings.Cut(a.text, "=")
		switch {
		case !a.known:
			return Arbitrary, "the subcommand of git is not known"
		case a.text == "--version" || a.text == "--help":
			return ReadOnly, "git " + a.text
		case gitOptions[a.text], joined && gitValued[name] && strings.HasPrefix(name, "--"):
			args = args[1:]
		case gitValued[a.text] && len(args) > 1:
			args = args[2:]
		case a.text == "-c" && len(args) > 1:
			if key, _, _ := strings.Cut(args[1].text, "="); !args[1].known || !gitSafeKeys[strings.ToLower(key)] {
				return Arbitrary, "git -c " + args[1].text + " can make git run a program"
			}
			args = args[2:]
		case strings.HasPrefix(a.text, "-"):
			return Arbitrary, "git " + a.text + value + " before the subcommand"
		default:
			return gitCommand(a.text, args[1:])
		}
	}
	return ReadOnly, "git prints its help"
}

// gitRuns are options of subcommands that name a program, or make git run one that
// a repository names.
//
// git takes every beginning of a long option that is not ambiguous.
var gitRuns = map[string][]string{
	"fetch": {"--upl"}, "pull": {"--upl"}, "ls-remote": {"--upl", "--exec"}, "push": {"--rece", "--exe"}, "send-pack": {"--rece", "--exe"},
	"clone": {"-u", "--upl", "-c", "--conf", "--te"}, "init": {"--te"}, "grep": {"-O", "--open"}, "rebase": {"-x", "--exe"},
	"diff": {"--ext"}, "log": {"--ext"}, "show": {"--ext", "--textc"}, "cat-file": {"--textc", "--filters"}, "archive": {"--exe", "--remote"},
}

func gitCommand(name string, args []word) (Class, string) {
	class, ok := gitCommands[name]
	if !ok {
		return Arbitrary, "git " + name + " is not known, and may be an alias or a program"
	}
	if option := found(args, gitRuns[name]); option != "" {
		return Arbitrary, "git " + name + " " + option + " can run another program"
	}
	for _, a := range args {
		if class == Network || class == Push {
			if transport, _, ok := strings.Cut(a.text, "::"); ok && transport != "" {
				return Arbitrary, "a transport of git that runs a program"
			}
		}
	}
	if gitRuns[name] != nil && unknownOption(args) {
		return Arbitrary, "an argument of git " + name + " is not known, and may be an option that runs a program"
	}
	first := ""
	if len(args) > 0 {
		first = args[0].text
	}
	switch {
	case class == ReadOnly && found(args, []string{"--outp"}) != "":
		return Writes, "git " + name + " --output writes"
	case name == "bisect" && first == "run":
		return Arbitrary, "git bisect run runs a program"
	case name == "remote" && first == "update":
		return Network, "git remote update"
	case (name == "branch" || name == "tag" || name == "remote" || name == "stash" || name == "reflog" || name == "worktree" || name == "notes") && lists(name, args):
		return ReadOnly, "git " + name + " lists"
	}
	return class, "git " + name
}

// unknownOption reports whether an argument that is not known stands where options
// are read, which ends with "--".
func unknownOption(args []word) bool {
	for _, a := range args {
		if a.known && a.text == "--" {
			return false
		}
		if !a.known {
			return true
		}
	}
	return false
}

func lists(name string, args []word) bool {
	for _, a := range args {
		switch {
		case a.known && (a.text == "-a" || a.text == "-r" || a.text == "-v" || a.text == "-vv" || a.text == "-l" || a.text == "--list" || a.text == "--show-current"):
		case a.known && name != "branch" && name != "tag" && (a.text == "list" || a.text == "show" || a.text == "get-url"):
		default:
			return false
		}
	}
	return name != "stash" || len(args) > 0
}

var ghReads = set("list view status diff checks watch browse clone checkout download search verify")

var ghWrites = set("create edit merge close reopen comment review ready delete fork archive rename transfer lock unlock pin unpin run enable disable set rerun cancel upload sync add " +
	"remove import develop")

// gh tells reading from changing by the verb, and for gh api by method and fields.
func gh(args []word) (Class, string) {
	if unknownOption(args) {
		return Arbitrary, "an argument of gh is not known"
	}
	if len(args) == 0 {
		return ReadOnly, "gh prints its help"
	}
	switch args[0].text {
	case "api":
		return ghAPI(args[1:])
	case "search", "status":
		return Network, "gh " + args[0].text + " reads from the forge"
	case "pr", "issue", "repo", "release", "run", "workflow", "gist", "label", "secret", "variable", "project", "cache", "ruleset":
		if len(args) > 1 && ghReads[args[1].text] {
			return Network, "gh " + args[0].text + " " + args[1].text + " reads from the forge"
		}
		if len(args) > 1 && ghWrites[args[1].text] {
			return Push, "gh " + args[0].text + " " + args[1].text + " changes the forge"
		}
	}
	return Arbitrary, "gh " + args[0].text + " is not known, and may be an alias or an extension"
}

func ghAPI(args []word) (Class, string) {
	method, fields := "", false
	for i, a := range args {
		switch {
		case (a.text == "-X" || a.text == "--method") && i+1 < len(args):
			method = args[i+1].text
		case strings.HasPrefix(a.text, "--method="):
			method = strings.TrimPrefix(a.text, "--method=")
		case strings.HasPrefix(a.text, "-X"):
			method = strings.TrimPrefix(strings.TrimPrefix(a.text, "-X"), "=")
		case strings.HasPrefix(a.text, "-f"), strings.HasPrefix(a.text, "-F"), strings.HasPrefix(a.text, "--field"), strings.HasPrefix(a.text, "--raw-field"), strings.HasPrefix(a.text, "--input"):
			fields = true
		case a.text == "graphql":
			fields = true // a query and a mutation look alike
		}
	}
	switch strings.ToUpper(method) {
	case "GET", "HEAD":
		return Network, "gh api reads from the forge"
	case "":
		if !fields {
			return Network, "gh api reads from the forge"
		}
	}
	return Push, "gh api changes the forge"
}
