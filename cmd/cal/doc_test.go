package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// commands lists every command of the tree, parents first.
func commands(cmd *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{cmd}
	for _, sub := range cmd.Commands() {
		all = append(all, commands(sub)...)
	}
	return all
}

func TestEveryCommandExplainsItself(t *testing.T) {
	for _, cmd := range commands(newRoot()) {
		if cmd.Short == "" {
			t.Errorf("%s has no Short", cmd.CommandPath())
		}
		if !strings.Contains(cmd.Example, "cal ") {
			t.Errorf("%s has no Example that calls cal: %q", cmd.CommandPath(), cmd.Example)
		}
		if !cmd.Runnable() && !cmd.HasSubCommands() {
			t.Errorf("%s does nothing", cmd.CommandPath())
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s: flag --%s has no description", cmd.CommandPath(), f.Name)
			}
		})
	}
}

// section is what doc/cli.md says of one command.
func section(cmd *cobra.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "### `%s`\n\n%s.\n\n```sh\n%s\n```\n", cmd.UseLine(), cmd.Short, strings.ReplaceAll(strings.TrimPrefix(cmd.Example, "  "), "\n  ", "\n"))
	if flags := strings.TrimRight(cmd.LocalFlags().FlagUsages(), "\n"); flags != "" {
		fmt.Fprintf(&b, "\n```text\n%s\n```\n", flags)
	}
	return b.String()
}

// between returns what stands in a file behind the line that begins with mark, up to
// the next such mark or the end, and what stands around it.
func between(t *testing.T, file, mark string) (before, got, after string) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), "<!-- "+mark+" -->\n")
	if !ok {
		t.Fatalf("%s has no line <!-- %s -->", file, mark)
	}
	got, after, _ = strings.Cut(rest, "<!-- end -->")
	return before + "<!-- " + mark + " -->\n", got, "<!-- end -->" + after
}

// same compares a part of a document with what the code says; UPDATE_GOLDEN=1
// writes it.
func same(t *testing.T, file, mark, want string) {
	t.Helper()
	before, got, after := between(t, file, mark)
	if got == want {
		return
	}
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(before+want+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i, line := range wantLines {
		if i >= len(gotLines) || gotLines[i] != line {
			t.Fatalf("%s, part %q, line %d: got %q, want %q (UPDATE_GOLDEN=1 writes it)", file, mark, i+1, strings.Join(gotLines[min(i, len(gotLines)):min(i+1, len(gotLines))], ""), line)
		}
	}
	t.Fatalf("%s, part %q, says more than the code: %q", file, mark, gotLines[len(wantLines):])
}

func TestCommandReference(t *testing.T) {
	root := newRoot()
	root.InitDefaultHelpFlag()
	root.InitDefaultVersionFlag()
	var b strings.Builder
	for _, cmd := range commands(root) {
		b.WriteString("\n" + section(cmd))
	}
	same(t, "../../doc/cli.md", "commands", b.String()+"\n")
}

// The tables of package policy are held to its code by that package's own tests.
func TestPolicyTables(t *testing.T) {
	for mark, golden := range map[string]string{"legs": "legs.md", "profiles": "profiles.md"} {
		want, err := os.ReadFile("../../policy/testdata/" + golden)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "../../doc/policy.md", mark, string(want))
	}
}
