package main

import (
	"bytes"
	"strings"
	"testing"

	"cal/nucleus"
)

// What is said stands between what the agent sends, however that is cut into pieces.
func TestSplice(t *testing.T) {
	const said = "<said>"
	for _, c := range []struct{ what, sends string }{
		{"text", "abc"}, {"a sequence", "\x1b[38;5;1m"}, {"a title", "\x1b]0;x\x07"}, {"a title with ST", "\x1b]0;x\x1b\\"}, {"a string", "\x1bPq#0\x1b\\"},
		{"a charset", "\x1b(B"}, {"a letter", "\u00e9"}, {"a sign", "\u20ac"}, {"an emoji", "\U0001F512"}, {"cursor", "\x1b7\x1b8"},
		{"a sequence broken off by another", "\x1b[3\x1b[31m"}, {"a title broken off by a sequence", "\x1b]0;x\x1b[31m"},
	} {
		whole := "x" + c.sends + "y"
		// At every byte: it is either said there, or behind what has begun.
		for at := 0; at <= len(whole); at++ {
			var out bytes.Buffer
			b := &splice{out: &out}
			b.Write([]byte(whole[:at]))
			b.Say(said)
			b.Write([]byte(whole[at:]))
			got := out.String()
			place := strings.Index(got, said)
			if place < 0 || strings.Replace(got, said, "", 1) != whole {
				t.Fatalf("%s at %d: %q", c.what, at, got)
			}
			allowed := map[int]bool{0: true, 1: true, 1 + len(c.sends): true, len(whole): true}
			if c.what == "text" || c.what == "cursor" {
				allowed[2], allowed[3] = c.what == "text", true
			}
			if !allowed[place] {
				t.Errorf("%s at %d: said within: %q", c.what, at, got)
			}
		}
	}
	// A sequence that is broken off.
	var out bytes.Buffer
	b := &splice{out: &out}
	b.Write([]byte("\x1b]0;never ended"))
	b.Say(said)
	if strings.Contains(out.String(), said) {
		t.Error("said within a title")
	}
	b.Write([]byte("\x18"))
	if !strings.HasSuffix(out.String(), "\x18"+said) {
		t.Errorf("not said after all: %q", out.String())
	}
}

func TestTitle(t *testing.T) {
	pod := nucleus.PodStatus{ID: "p-1", Workspace: "w", Mode: nucleus.Mediated, Tier: "kernel", Driver: "gvisor"}
	for asks, want := range map[int]string{0: "\x1b]0;\U0001F512 CAL", 1: "\x1b]0;1 APPROVAL WAITS: cal approve | ", 2: "\x1b]0;2 APPROVALS WAIT: cal approve | "} {
		if got := titleFor(pod, asks); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "\x07") {
			t.Errorf("%d: %q", asks, got)
		}
	}
}
