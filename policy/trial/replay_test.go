package trial

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"testing"

	"cal/nucleus"
	"cal/policy"
)

// entries are a log in memory; each is numbered by its place.
func entries(t *testing.T, list ...nucleus.Entry) iter.Seq2[nucleus.Entry, error] {
	t.Helper()
	return func(yield func(nucleus.Entry, error) bool) {
		for i, e := range list {
			e.Seq, e.Time = int64(i), "2026-11-22T06:24:40.5Z"
			if !yield(e, nil) {
				return
			}
		}
	}
}

func raw(t *testing.T, v any) json.RawMessage {
	t.Helper()
	out, err := nucleus.Canonical(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func intent(t *testing.T, a nucleus.Action) nucleus.Entry {
	return nucleus.Entry{Pod: "p-1", Kind: nucleus.KindIntent, Op: a.Op, Verdict: nucleus.Allow, Rule: "x", Args: raw(t, a)}
}

// A log is judged by what would have happened under the new policy: what it denies
// does not expose.
func TestRun(t *testing.T) {
	read := func(name string) nucleus.Action {
		return nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: name}}}
	}
	push := nucleus.Action{Op: nucleus.GitPush, Push: &nucleus.Push{Repo: "app"}}
	p, err := policy.Load("p", []byte(`{"operations": {"read_files": "always", "git_push": "always"}, "paths": {"roots": {"only": ["app"]}, "blocked": ["*.pem"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	create := func(mode nucleus.Mode) nucleus.Entry {
		return nucleus.Entry{Pod: "p-1", Kind: nucleus.KindPodCreate, Data: raw(t, map[string]any{"mode": mode, "workspace": "w"})}
	}
	start := func(untrusted bool, exposure ...string) nucleus.Entry {
		return nucleus.Entry{Pod: "p-1", Kind: nucleus.KindPodStart, Exposure: exposure, Data: raw(t, map[string]any{"untrusted": untrusted})}
	}
	unresolved := intent(t, read("app/x"))
	unresolved.Rule = "resolve"
	cutList := intent(t, read("app/x"))
	cutList.Args = json.RawMessage(`{"op":"read_files","args_sha256":"","files":[{"path":"app/x"},"[cut: 3 more]"]}`)
	cutAll := intent(t, read("app/x"))
	cutAll.Args = json.RawMessage(`"[cut: 70000 bytes]"`)
	other := intent(t, read("app/x"))
	other.Op = nucleus.GitPush
	for _, c := range []struct {
		name    string
		entries []nucleus.Entry
		want    string // requests; denied; asked; unjudged
	}{
		{"nothing", nil, "0 [] [] []"},
		{"a denial does not expose", []nucleus.Entry{create(nucleus.Mediated), start(true), intent(t, read("other")), intent(t, push)}, "2 [2] [] []"},
		{"what goes ahead exposes", []nucleus.Entry{create(nucleus.Mediated), start(true), intent(t, read("app/x")), intent(t, push)}, "2 [] [3] []"},
		{"in a trusted repository it does not", []nucleus.Entry{create(nucleus.Mediated), start(false), intent(t, read("app/x")), intent(t, push)}, "2 [] [] []"},
		{"contained mode", []nucleus.Entry{create(nucleus.Contained), start(true), intent(t, push)}, "1 [] [2] []"},
		{"exposure that the workspace had", []nucleus.Entry{create(nucleus.Mediated), start(false, "private", "untrusted"), intent(t, push)}, "1 [] [2] []"},
		{"blocked", []nucleus.Entry{intent(t, read("app/x.pem"))}, "1 [0] [] []"},
		{"another pod of the workspace", []nucleus.Entry{
			create(nucleus.Mediated), start(true), intent(t, read("app/x")),
			{Pod: "p-2", Kind: nucleus.KindPodCreate, Data: raw(t, map[string]any{"mode": "mediated", "workspace": "w"})},
			{Pod: "p-2", Kind: nucleus.KindIntent, Op: nucleus.GitPush, Args: raw(t, push)},
		}, "2 [] [4] []"},
		{"another workspace", []nucleus.Entry{
			create(nucleus.Mediated), start(true), intent(t, read("app/x")),
			{Pod: "p-2", Kind: nucleus.KindIntent, Op: nucleus.GitPush, Args: raw(t, push)},
		}, "2 [] [] []"},
		{"a pod below", []nucleus.Entry{
			create(nucleus.Mediated), start(true), intent(t, read("app/x")),
			{Pod: "p-2", Kind: nucleus.KindPodCreate, Data: raw(t, map[string]any{"mode": "mediated", "workspace": "", "sub": map[string]any{"parent": "p-1"}})},
			{Pod: "p-2", Kind: nucleus.KindIntent, Op: nucleus.GitPush, Args: raw(t, push)},
		}, "2 [] [4] []"},
		{"a pod whose policy is cut", []nucleus.Entry{
			intent(t, nucleus.Action{Op: nucleus.SpawnAgent, Sub: &nucleus.Sub{Do: nucleus.SubSpawn, Policy: json.RawMessage(`{"hosts":{"only":["[cut: 9 more]"]}}`)}}),
		}, "1 [] [] [0]"},
		{"what the gateway refuses under any policy", []nucleus.Entry{
			{Pod: "p-1", Kind: nucleus.KindIntent, Op: nucleus.NetConnect, Verdict: nucleus.Deny, Rule: "egress.model", Args: raw(t, map[string]any{"via": "model", "host": "h", "port": 443})},
			{Pod: "p-1", Kind: nucleus.KindIntent, Op: nucleus.NetConnect, Verdict: nucleus.Deny, Rule: "hosts", Args: raw(t, map[string]any{"via": "http", "host": "h", "port": 443})},
		}, "1 [] [] [1]"},
		{"what the log does not show", []nucleus.Entry{
			intent(t, read("app/x[cut: 9 bytes]")), intent(t, read("app/[redacted]")), unresolved, cutList, cutAll, other, intent(t, read("app/ok")),
		}, "7 [] [] [0 1 2 3 4 5]"},
	} {
		r, err := Run(p, entries(t, c.entries...))
		if err != nil {
			t.Fatal(err)
		}
		seqs := func(list []Replayed) []int64 {
			out := []int64{}
			for _, d := range list {
				out = append(out, d.Seq)
			}
			return out
		}
		if got := fmt.Sprint(r.Requests, seqs(r.Denied), seqs(r.Asked), r.Unjudged); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
	broken := func(yield func(nucleus.Entry, error) bool) { yield(nucleus.Entry{}, errors.New("torn")) }
	if _, err := Run(p, broken); err == nil || !strings.Contains(err.Error(), "torn") {
		t.Errorf("a log that cannot be read: %v", err)
	}
}

// Any arguments that a log shows are judged, or counted as not judged.
func FuzzRecorded(f *testing.F) {
	f.Add("read_files", []byte(`{"op":"read_files","files":[{"path":"app/x"}]}`), []byte(`{"mode":"contained"}`))
	f.Add("run_bash", []byte(`{"op":"run_bash","command":{"argv":["git","[cut: 5 more]"],"dir":"."}}`), []byte(`{"untrusted":true}`))
	f.Add("net_connect", []byte(`{"op":"net_connect","connect":{"host":"a.b","port":1},"fetch":null}`), []byte(`{"workspace":"w"}`))
	p, err := policy.Profile("permissive")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, op string, args, data []byte) {
		entries := []nucleus.Entry{
			{Seq: 1, Pod: "p-1", Kind: nucleus.KindPodCreate, Data: data},
			{Seq: 2, Pod: "p-1", Kind: nucleus.KindPodStart, Data: data},
			{Seq: 3, Pod: "p-1", Kind: nucleus.KindIntent, Op: nucleus.Op(op), Args: args},
		}
		r, err := Run(p, func(yield func(nucleus.Entry, error) bool) {
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
		})
		if err != nil || r.Requests != 1 || len(r.Denied)+len(r.Asked)+len(r.Unjudged) > 1 {
			t.Fatalf("%+v, %v", r, err)
		}
	})
}
