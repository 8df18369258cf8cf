package microvm

import (
	"slices"
	"strings"

	"cal/machine/site"
)

// bland is what a guest's kernel says in each start though nothing is wrong: the machines have no PCI.
const bland = "PCI: Fatal: No config space access function found"

// LastWords is the last line of a guest's console that says something of this guest; "" where
// there is none.
func LastWords(console string) string {
	lines := slices.DeleteFunc(strings.Split(console, "\n"), func(line string) bool { return strings.Contains(line, bland) })
	return site.LastLine(strings.Join(lines, "\n"))
}
