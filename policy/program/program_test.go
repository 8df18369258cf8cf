package program

import "testing"

func TestRuns(t *testing.T) {
	for arg, want := range map[string]bool{
		"bash": true, "/bin/bash": true, "/usr/local/bin/zsh": true, "python": true, "python3": true, "python3.11": true, "/usr/bin/perl5.36": true, "node20": true, ".": true,
		"env": true, "xargs": true, "find": true, "sudo": true, "./x": true, "x/y": true, "/tmp/ls": true, "/usr/bin/../../tmp/x": true, "/bin/x/y": true,

		"ls": false, "/bin/ls": false, "git": false, "go": false, "cargo": false, "shellcheck": false, "pythonic": false, "nodemon": false, "environment": false,
		"bashful": false, "b2sum": false, "sha256sum": false, "": false, "7z": false,
	} {
		if got := Runs(arg); got != want {
			t.Errorf("Runs(%q) = %v, want %v", arg, got, want)
		}
	}
}

func TestNamed(t *testing.T) {
	for arg, want := range map[string]bool{
		"sh": true, "/bin/sh": true, "/opt/x/bash": true, "python3.11": true, "A=sh": false, "./...": false, "a/shell": false, "tokenizer.go": false, "": false, "executor": false,
	} {
		if got := Named(arg); got != want {
			t.Errorf("Named(%q) = %v, want %v", arg, got, want)
		}
	}
	if !Wraps("/usr/bin/env") || Wraps("bash") || Wraps("ls") || !Shell("/bin/dash") || Shell("perl") || !Interprets("perl") {
		t.Error("shells, interpreters and wrappers are three kinds")
	}
}
