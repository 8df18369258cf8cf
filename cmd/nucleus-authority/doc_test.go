package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Every command says what it does, with an example; every listing can be read by a program.
func TestEveryCommandExplainsItself(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			if sub.Short == "" || !strings.Contains(sub.Example, "nucleus-authority ") {
				t.Errorf("%s: short %q, example %q", sub.CommandPath(), sub.Short, sub.Example)
			}
			if sub.Name() == "list" && sub.Flags().Lookup("json") == nil {
				t.Errorf("%s has no --json", sub.CommandPath())
			}
			sub.Flags().VisitAll(func(f *pflag.Flag) {
				if f.Usage == "" {
					t.Errorf("%s: flag --%s has no description", sub.CommandPath(), f.Name)
				}
			})
			walk(sub)
		}
	}
	walk(root())
}
