package tools

import (
	"bytes"
	"encoding/json"
	"fmt"
	"image"
	"image/png"
	"os"
	"strings"
	"sync"
	"testing"

	"cal/nucleus"
	"cal/wire"
)

func TestReadFiles(t *testing.T) {
	b := newBench(t, nil)
	var long strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&long, "line %d\n", i+1)
	}
	b.write("long", long.String())
	b.write("plain", "one\ntwo\r\nthree")
	b.write("empty", "")
	b.write("wide", strings.Repeat("é", 200_000)+"\nend\n")
	b.write("latin1", "caf\xe9\n")
	b.write("binary", "ab\x00cd")
	b.write("big", strings.Repeat("text ", 2000))
	check(t, os.Truncate(b.path("big"), maxReadFile+1))
	b.write("newlines", "\n\n\n")

	cases := []struct {
		args         ReadArgs
		start, lines int
		total        int
		content      string // prefix
		notice       string
	}{
		{ReadArgs{Path: "plain"}, 1, 3, 3, "one\ntwo\r\nthree", ""},
		{ReadArgs{Path: "plain", Offset: 2, Limit: 1}, 2, 1, 3, "two\r\n", "lines 2 to 2 of 3"},
		{ReadArgs{Path: "plain", Offset: 3}, 3, 1, 3, "three", ""},
		{ReadArgs{Path: "empty"}, 0, 0, 0, "", ""},
		{ReadArgs{Path: "newlines"}, 1, 3, 3, "\n\n\n", ""},
		{ReadArgs{Path: "long"}, 1, 2000, 5000, "line 1\n", "lines 1 to 2000 of 5000"},
		{ReadArgs{Path: "long", Offset: 4999, Limit: 9000}, 4999, 2, 5000, "line 4999\nline 5000\n", ""},
		{ReadArgs{Path: "wide"}, 1, 1, 2, "éé", "cut after 262144 bytes, in line 1 of 2"},
		{ReadArgs{Path: "wide", Offset: 2}, 2, 1, 2, "end\n", ""},
	}
	for _, c := range cases {
		var got ReadResult
		b.must(nucleus.ReadFiles, c.args, &got)
		if got.Start != c.start || got.Lines != c.lines || got.Total != c.total || !strings.HasPrefix(got.Content, c.content) || got.Notice != c.notice {
			t.Errorf("%+v: start %d lines %d total %d notice %q content %.40q", c.args, got.Start, got.Lines, got.Total, got.Notice, got.Content)
		}
	}
	for path, part := range map[string]string{
		"latin1": "not UTF-8", "binary": "binary file of 5 bytes", "big": "at most 67108864", "none": "does not exist", ".": "is a directory",
	} {
		err := b.do(nucleus.ReadFiles, ReadArgs{Path: path}, nil)
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", path, err, part)
		}
	}
	wantKind(t, b.do(nucleus.ReadFiles, ReadArgs{Path: "plain", Offset: 4}, nil), nucleus.KindInvalid, "has 3 lines")
}

func TestReadImage(t *testing.T) {
	b := newBench(t, nil)
	var buf bytes.Buffer
	check(t, png.Encode(&buf, image.NewGray(image.Rect(0, 0, 3, 3))))
	b.write("dot.png", buf.String())
	b.write("huge.png", buf.String()+strings.Repeat("x", MaxImage))
	b.write("svg.svg", "<svg/>")
	var raw json.RawMessage
	b.must(nucleus.ReadFiles, ReadArgs{Path: "dot.png"}, &raw)
	var got struct {
		Image struct {
			MIME string `json:"mime"`
			Data []byte `json:"data_b64"`
		} `json:"image"`
	}
	check(t, json.Unmarshal(raw, &got))
	if got.Image.MIME != "image/png" || !bytes.Equal(got.Image.Data, buf.Bytes()) {
		t.Errorf("got %s", raw)
	}
	wantKind(t, b.do(nucleus.ReadFiles, ReadArgs{Path: "huge.png"}, nil), nucleus.KindTooLarge, "at most 3932160")
	var svg ReadResult
	b.must(nucleus.ReadFiles, ReadArgs{Path: "svg.svg"}, &svg)
	if svg.Content != "<svg/>" {
		t.Errorf("svg as %+v", svg)
	}
}

func TestWriteAndEdit(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Blocked = func(p string) bool { return p == ".env" } })
	var w WriteResult
	b.must(nucleus.WriteFiles, WriteArgs{Path: "a/run.sh", Content: "#!/bin/sh\n", Mode: "0755"}, &w)
	if info, err := os.Stat(b.path("a/run.sh")); err != nil || info.Mode().Perm() != 0o755 || !w.Created || w.Bytes != 10 {
		t.Errorf("%v %v %+v", info, err, w)
	}
	b.must(nucleus.WriteFiles, WriteArgs{Path: b.path("a/run.sh"), Content: "x x x\r\ny"}, &w)
	if w.Created || w.Path != "a/run.sh" {
		t.Errorf("%+v", w)
	}
	for _, c := range []struct {
		args EditArgs
		kind nucleus.Kind
		part string
	}{
		{EditArgs{Path: "a/run.sh", Old: "z", New: "y"}, nucleus.KindNotFound, "not found"},
		{EditArgs{Path: "a/run.sh", Old: "x", New: "y"}, nucleus.KindInvalid, "3 times"},
		{EditArgs{Path: "a/run.sh", Old: "x\ny", New: "y"}, nucleus.KindNotFound, "other line ends"},
		{EditArgs{Path: "a/run.sh", Old: "x  x", New: "y"}, nucleus.KindNotFound, "other spaces"},
		{EditArgs{Path: "none", Old: "x", New: "y"}, nucleus.KindNotFound, "does not exist"},
		{EditArgs{Path: ".env", Old: "x", New: "y"}, nucleus.KindDenied, "blocked"},
	} {
		wantKind(t, b.do(nucleus.EditFiles, c.args, nil), c.kind, c.part)
	}
	wantKind(t, b.do(nucleus.WriteFiles, WriteArgs{Path: ".env", Content: "x"}, nil), nucleus.KindDenied, "blocked")
	var e EditResult
	b.must(nucleus.EditFiles, EditArgs{Path: "a/run.sh", Old: "x", New: "$1", All: true}, &e)
	if got := b.read("a/run.sh"); got != "$1 $1 $1\r\ny" || e.Replaced != 3 {
		t.Errorf("%q, %+v", got, e)
	}
	if info, _ := os.Stat(b.path("a/run.sh")); info.Mode().Perm() != 0o755 {
		t.Errorf("mode %o after two changes, want 755", info.Mode().Perm())
	}
}

// What was decided is what is done, or nothing.
func TestDoRefusesWhatHasChanged(t *testing.T) {
	b := newBench(t, nil)
	b.write("f", "before")
	b.write("script.sh", "exit 0")
	check(t, os.Symlink("f", b.path("link")))
	refuse := func(op nucleus.Op, args any, action nucleus.Action, part string) {
		t.Helper()
		out := b.finish(b.beginAs(Call{Op: op}, args, action))
		if out.result.Error == nil {
			t.Fatalf("%s was done: %s", op, out.result.Value)
		}
		wantKind(t, out.result.Error, nucleus.KindConflict, part)
	}
	write := WriteArgs{Path: "f", Content: "after"}
	action, err := b.resolve(Call{Op: nucleus.WriteFiles}, write)
	check(t, err)
	if action.Files[0].Before != nucleus.SHA256([]byte("before")) || action.Files[0].After != nucleus.SHA256([]byte("after")) {
		t.Errorf("files %+v", action.Files)
	}
	refuse(nucleus.WriteFiles, WriteArgs{Path: "f", Content: "other"}, action, "changed since")
	b.write("f", "meddled")
	refuse(nucleus.WriteFiles, write, action, "changed since")
	if got := b.read("f"); got != "meddled" {
		t.Errorf("file is %q", got)
	}
	b.write("f", "before")
	if out := b.finish(b.beginAs(Call{Op: nucleus.WriteFiles}, write, action)); out.result.Error != nil {
		t.Errorf("the unchanged call: %v", out.result.Error)
	}

	run := RunArgs{Argv: []string{"sh", "script.sh"}}
	action, err = b.resolve(Call{Op: nucleus.RunBash}, run)
	check(t, err)
	if len(action.Command.Files) != 1 || action.Command.Files[0].Before != nucleus.SHA256([]byte("exit 0")) || !strings.HasSuffix(action.Command.Binary, "/sh") {
		t.Errorf("command %+v", action.Command)
	}
	b.write("script.sh", "touch pwned")
	refuse(nucleus.RunBash, run, action, "the command, or a file that it names, has changed")
	if _, err := os.Stat(b.path("pwned")); err == nil {
		t.Error("the changed script ran")
	}

	// The static resolution of a link names the link; the guest reads what it names.
	static, ok, err := ResolveStatic(nucleus.ReadFiles, json.RawMessage(`{"path":"link"}`))
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	refuse(nucleus.ReadFiles, ReadArgs{Path: "link"}, static, `"link" leads to "f"`)
	asked, err := b.resolve(Call{Op: nucleus.ReadFiles}, ReadArgs{Path: "link"})
	check(t, err)
	if asked.Files[0].Path != "f" {
		t.Errorf("resolved to %+v", asked.Files)
	}

	stream := b.open(StreamDo, Call{Op: nucleus.ReadFiles})
	check(t, stream.SendJSON(wire.FrameJSON, Args{Args: json.RawMessage(`{"path":"f"}`)}))
	wantKind(t, b.finish(stream).result.Error, nucleus.KindInvalid, "no action")
}

// Of many edits at once none is lost.
func TestConcurrentEdits(t *testing.T) {
	b := newBench(t, nil)
	const edits = 24
	var text strings.Builder
	for i := range edits {
		fmt.Fprintf(&text, "<%d>\n", i)
	}
	b.write("f", text.String())
	var group sync.WaitGroup
	for i := range edits {
		group.Go(func() {
			for {
				err := b.do(nucleus.EditFiles, EditArgs{Path: "f", Old: fmt.Sprintf("<%d>", i), New: fmt.Sprintf("[%d]", i)}, nil)
				if err == nil {
					return
				}
				if nucleus.AsError(err).Kind != nucleus.KindConflict { // another one came between resolve and do
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if got := b.read("f"); strings.Contains(got, "<") {
		t.Errorf("edits were lost:\n%s", got)
	}
}

func TestGlob(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Blocked = func(p string) bool { return strings.HasSuffix(p, ".key") } })
	for _, p := range []string{"main.go", "a/x.go", "a/b/y.go", "a/b/z.txt", "c/x.ts", "a/s.key", ".git/x.go", "we ird/[1].go"} {
		b.write(p, "x")
	}
	check(t, os.Symlink("/etc", b.path("etc")))
	for _, c := range []struct {
		args GlobArgs
		want string
	}{
		{GlobArgs{Pattern: "*.go"}, "[main.go]"},
		{GlobArgs{Pattern: "**/*.go"}, "[a/b/y.go a/x.go main.go we ird/[1].go]"},
		{GlobArgs{Pattern: "*.go", Path: "a"}, "[a/x.go]"},
		{GlobArgs{Pattern: "a/**/*.{go,txt}"}, "[a/b/y.go a/b/z.txt a/x.go]"},
		{GlobArgs{Pattern: "a/x.go"}, "[a/x.go]"},
		{GlobArgs{Pattern: "none/*.go"}, "[]"},
		{GlobArgs{Pattern: "etc/*"}, "[]"},
		{GlobArgs{Pattern: "../*"}, "[]"},
		{GlobArgs{Pattern: "**/*.key"}, "[]"},
		{GlobArgs{Pattern: `we ird/\[1\].go`}, "[we ird/[1].go]"},
	} {
		var got GlobResult
		b.must(nucleus.GlobSearch, c.args, &got)
		if fmt.Sprint(got.Paths) != c.want {
			t.Errorf("%+v: %v, want %s", c.args, got.Paths, c.want)
		}
	}
	wantKind(t, b.do(nucleus.GlobSearch, GlobArgs{Pattern: "*", Path: "etc"}, nil), nucleus.KindDenied, "out of the workspace")
	wantKind(t, b.do(nucleus.GlobSearch, GlobArgs{Pattern: "*", Path: "none"}, nil), nucleus.KindNotFound, "does not exist")
	for i := range maxGlobPaths + 5 {
		b.write(fmt.Sprintf("many/%04d", i), "")
	}
	var got GlobResult
	b.must(nucleus.GlobSearch, GlobArgs{Pattern: "many/*"}, &got)
	if len(got.Paths) != maxGlobPaths || got.Total != maxGlobPaths+5 || !strings.Contains(got.Notice, "1000 of 1005 paths shown") {
		t.Errorf("%d paths of %d, notice %q", len(got.Paths), got.Total, got.Notice)
	}
}

func TestGrep(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Blocked = func(p string) bool { return p == "s.key" } })
	b.write("a.go", "package a\n\nfunc Foo() {}\r\n// end")
	b.write("sub/b.go", "var foo = 1\n")
	b.write("c.txt", "foo\n")
	b.write("s.key", "foo\n")
	b.write(".git/d.go", "foo\n")
	b.write("bin", "foo\x00")
	b.write("wide", "foo"+strings.Repeat("é", 1000)+"\n")
	b.write("big", "")
	check(t, os.Truncate(b.path("big"), maxGrepFile+1))
	check(t, os.Symlink("/etc", b.path("etc")))
	lines := func(args GrepArgs) (string, GrepResult) {
		var got GrepResult
		b.must(nucleus.GrepSearch, args, &got)
		var out []string
		for _, m := range got.Matches {
			out = append(out, fmt.Sprintf("%s:%d:%.12s", m.Path, m.Line, m.Text))
		}
		return strings.Join(out, " | "), got
	}
	for _, c := range []struct {
		args GrepArgs
		want string
	}{
		{GrepArgs{Pattern: "foo"}, "c.txt:1:foo | sub/b.go:1:var foo = 1 | wide:1:fooééééééééé"},
		{GrepArgs{Pattern: "(?i)foo", Glob: "*.go"}, "a.go:3:func Foo() { | sub/b.go:1:var foo = 1"},
		{GrepArgs{Pattern: "foo", Glob: "sub/*.go"}, "sub/b.go:1:var foo = 1"},
		{GrepArgs{Pattern: "foo", Path: "sub"}, "sub/b.go:1:var foo = 1"},
		{GrepArgs{Pattern: "^foo$", Path: "c.txt"}, "c.txt:1:foo"},
		{GrepArgs{Pattern: `\{\}$`}, "a.go:3:func Foo() {"},
		{GrepArgs{Pattern: "^// end$"}, "a.go:4:// end"},
		{GrepArgs{Pattern: "nowhere"}, ""},
	} {
		if got, _ := lines(c.args); got != c.want {
			t.Errorf("%+v: %s, want %s", c.args, got, c.want)
		}
	}
	_, result := lines(GrepArgs{Pattern: "foo"})
	if want := "left out: 1 binary file, 1 blocked path, 1 file over 8 MiB"; result.Notice != want {
		t.Errorf("notice %q, want %q", result.Notice, want)
	}
	_, result = lines(GrepArgs{Pattern: "Foo", Context: 1})
	if m := result.Matches[0]; fmt.Sprint(m.Before, m.After) != "[] [// end]" || len(m.Before) != 1 {
		t.Errorf("context %q %q", m.Before, m.After)
	}
	b.write("many", strings.Repeat("needle\n", 2000))
	_, result = lines(GrepArgs{Pattern: "needle"})
	if len(result.Matches) != maxMatches || !strings.Contains(result.Notice, "only the first are shown") {
		t.Errorf("%d matches, notice %q", len(result.Matches), result.Notice)
	}
	wantKind(t, b.do(nucleus.GrepSearch, GrepArgs{Pattern: "x", Path: "s.key"}, nil), nucleus.KindDenied, "blocked")
}

// A brief call does what is brief and nothing else: what runs needs a stream, so that
// its caller can stop it.
func TestBriefIsForWhatIsBrief(t *testing.T) {
	b := newBench(t, nil)
	b.write("f", "text\n")
	for _, c := range []struct {
		op   nucleus.Op
		args any
		want string
	}{
		{nucleus.ReadFiles, ReadArgs{Path: "f"}, ""}, // the control
		{nucleus.RunBash, RunArgs{Argv: []string{"touch", "ran"}}, "needs a stream"},
		{nucleus.GitCommit, CommitArgs{Message: "m"}, "needs a stream"},
	} {
		action := nucleus.Action{Op: c.op}
		if c.op != nucleus.GitCommit { // which has nothing to commit here
			var err error
			if action, err = b.resolve(Call{Op: c.op}, c.args); err != nil {
				t.Fatal(err)
			}
		}
		result, value := b.brief(Call{Op: c.op, Identity: b.identity}, &action, marshal(t, c.args))
		switch {
		case c.want == "" && (result.Error != nil || len(value) == 0):
			t.Errorf("%s: %+v, value %q", c.op, result.Error, value)
		case c.want != "" && (result.Error == nil || !strings.Contains(result.Error.Message, c.want)):
			t.Errorf("%s: %+v, value %q, want %q", c.op, result.Error, value, c.want)
		}
	}
	if _, err := os.Stat(b.path("ran")); err == nil {
		t.Error("a command ran")
	}
}
