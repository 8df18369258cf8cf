package policy

import (
	"embed"
	"fmt"
	"slices"
	"strings"
)

//go:embed profiles/*.yaml
var profiles embed.FS

// The order is that of the documentation: from what a person starts with, over
// the narrow ones, to the loosest.
var profileNames = []string{
	"default", "read-only", "code-review", "edit-only", "local-dev", "fix-issue",
	"safe-pr-fixer", "release", "web-research", "network-only", "permissive",
}

// Profiles lists the built-in policies.
func Profiles() []string { return append([]string(nil), profileNames...) }

// Profile returns a built-in policy. A profile is a whole policy: none builds on
// another.
func Profile(name string) (*Policy, error) {
	file, data, err := ProfileFile(name)
	if err != nil {
		return nil, err
	}
	return Load(file, data)
}

// ProfileFile returns the source of a built-in policy.
func ProfileFile(name string) (file string, data []byte, err error) {
	if !slices.Contains(profileNames, name) {
		return "", nil, fmt.Errorf("unknown profile %q; want one of %s", name, strings.Join(profileNames, ", "))
	}
	file = "profiles/" + name + ".yaml"
	data, err = profiles.ReadFile(file)
	return file, data, err
}
