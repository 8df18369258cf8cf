package tools

import (
	"encoding/json"
	"testing"

	"cal/nucleus"
)

func TestText(t *testing.T) {
	for _, c := range []struct {
		op    nucleus.Op
		value any
		want  string
	}{
		{nucleus.ReadFiles, ReadResult{Path: "f", Content: "a\nb", Start: 9, Lines: 2, Total: 20, Notice: "lines 9 to 10 of 20"}, "     9\ta\n    10\tb\n[lines 9 to 10 of 20]"},
		{nucleus.ReadFiles, ReadResult{Path: "f"}, "[f is empty]"},
		{nucleus.GlobSearch, GlobResult{Paths: []string{"a", "b"}}, "a\nb"},
		{nucleus.GlobSearch, GlobResult{Paths: []string{}}, "[no file matches]"},
		{nucleus.GrepSearch, GrepResult{Matches: []Match{{Path: "f", Line: 2, Text: "x", Before: []string{"w"}, After: []string{"y"}}}}, "f-1-w\nf:2:x\nf-3-y"},
		{nucleus.GrepSearch, GrepResult{Files: 3, Notice: "left out: 1 binary file"}, "[no match in 3 files]\n[left out: 1 binary file]"},
		{nucleus.RunBash, RunResult{Stdout: "out\n"}, "out"},
		{nucleus.RunBash, RunResult{}, "[exit code 0]"},
		{nucleus.RunBash, RunResult{Stdout: "out", Stderr: "err\n", ExitCode: 2}, "out\n[stderr]\nerr\n[exit code 2]"},
		{nucleus.RunBash, RunResult{ID: "bash-1", Running: true}, "[running in the background as bash-1]"},
		{nucleus.RunBash, RunResult{StdoutB64: "/w=="}, "[stdout is not UTF-8; Base64:]\n/w=="},
		{nucleus.WriteFiles, json.RawMessage(`{"path":"f"}`), `{"path":"f"}`},
		{nucleus.RunBash, json.RawMessage(`{"unknown":1}`), `{"unknown":1}`},
	} {
		if got := Text(c.op, marshal(t, c.value)); got != c.want {
			t.Errorf("%s %+v:\n%s\nwant\n%s", c.op, c.value, got, c.want)
		}
	}
}
