package main

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"
)

// A limit that no machine can have is refused before anything is made: there is no CAL_HOME
// afterwards.
func TestLimitsOfNothing(t *testing.T) {
	for _, given := range []string{"--cpu=0", "--memory=0", "--pids=0", "--disk=0", "--cpu=10000", "--cpu=-1", "--memory=1", "--disk=9999999"} {
		home := t.TempDir() + "/cal"
		t.Setenv("CAL_HOME", home)
		root := newRoot()
		root.SetArgs([]string{"run", given, "--", "true"})
		root.SetOut(io.Discard)
		err := root.ExecuteContext(t.Context())
		var usage usageError
		name, _, _ := strings.Cut(given, "=")
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), name+" is ") || !strings.Contains(err.Error(), "hint: ") {
			t.Errorf("%s: %v", given, err)
		}
		if _, err := os.Stat(home); !os.IsNotExist(err) {
			t.Errorf("%s: something was made in %s: %v", given, home, err)
		}
	}
}
