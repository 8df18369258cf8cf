package microvm

import (
	"slices"
	"strings"

	"cal/machine/site"
)

// bland is what a guest's kernel says in each start, the machines having no PCI, and at each end.
var bland = []string{"PCI: Fatal: No config space access function found", "reboot: Restarting system", "reboot: machine restart"}

// LastWords is the last line of a guest's console that says something of this guest; "" where
// there is none.
func LastWords(console string) string {
	lines := slices.DeleteFunc(strings.Split(console, "\n"), func(line string) bool {
		return slices.ContainsFunc(bland, func(words string) bool { return strings.Contains(line, words) })
	})
	return site.LastLine(strings.Join(lines, "\n"))
}
