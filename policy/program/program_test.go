package program

import (
	"strings"
	"testing"
)

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

func TestBehind(t *testing.T) {
	for command, want := range map[string]struct {
		at   int
		sure bool
	}{
		"env":                             {1, true},
		"env git status":                  {1, true},
		"env -i -u A B=c D=e git":         {6, true},
		"env -- git":                      {2, true},
		"/usr/bin/env git":                {1, true},
		"timeout 5 ls":                    {2, true},
		"timeout -k 1 --signal=KILL 5 ls": {5, true},
		"timeout 5":                       {2, true},
		"nice -n5 ls":                     {2, true},
		"xargs -I{} -n 2 rm":              {4, true},
		"sudo -u ada A=b ls":              {4, true},
		"nohup ls -l":                     {1, true},
		"find . -name sh":                 {4, true},
		"find . -exec ls ; -name x":       {3, true},
		"find . -exec":                    {3, true},

		"find . -exec ls ; -ok sh ;": {3, false},
		"env - git":                  {1, false},
		"env --odd git":              {1, false},
		"xargs --max-lines rm":       {1, false},
		"xargs -i rm":                {1, false},
		"timeout --sig KILL 5 ls":    {1, false},
		"flock x ls":                 {1, false},
		"nice -n 5 --odd x ls":       {3, false},
		"ionice -p 5":                {1, false},
	} {
		at, sure := Behind(strings.Fields(command))
		if at != want.at || sure != want.sure {
			t.Errorf("%s: %d, %v; want %d, %v", command, at, sure, want.at, want.sure)
		}
	}
}
