package tools

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"cal/nucleus"
	"cal/wire"
)

// TestSync: whatever may have changed the workspace is written out before its end is told, also
// where it failed, and what cannot be written out is no success.
func TestSync(t *testing.T) {
	var times atomic.Int64
	var broken atomic.Bool
	var content atomic.Value // of the file, when it was written out
	b := newBench(t, func(c *Config) {
		file := c.Workspace + "/file"
		c.Sync = func() error {
			times.Add(1)
			data, _ := os.ReadFile(file)
			content.Store(string(data))
			if broken.Load() {
				return errors.New("input/output error")
			}
			return nil
		}
	})
	newRepository(t, b.path("app"))
	for _, test := range []struct {
		name   string
		do     func() error
		writes bool
		want   string // content of the file
	}{
		{"write", func() error { return b.do(nucleus.WriteFiles, WriteArgs{Path: "file", Content: "written"}, nil) }, true, "written"},
		{"edit", func() error {
			return b.do(nucleus.EditFiles, EditArgs{Path: "file", Old: "written", New: "edited"}, nil)
		}, true, "edited"},
		{"command", func() error { return b.do(nucleus.RunBash, RunArgs{Script: "echo -n by a command >file"}, nil) }, true, "by a command"},
		{"commit", func() error {
			b.write("app/a.txt", "two\n")
			return b.do(nucleus.GitCommit, CommitArgs{Message: "m", Repo: "app"}, nil)
		}, true, "by a command"},
		{"repository in", func() error { return failure(b.bundleIn(Unbundle{Repo: "new", Branch: "b"}, []byte("no bundle"))) }, true, "by a command"},
		{"branch in", func() error {
			stream := b.open(StreamIncoming, Incoming{Repo: "app"})
			stream.Send(wire.FrameData, nil)
			return failure(b.finish(stream).result)
		}, true, "by a command"},
		{"read", func() error { return b.do(nucleus.ReadFiles, ReadArgs{Path: "file"}, nil) }, false, ""},
		{"search", func() error { return b.do(nucleus.GrepSearch, GrepArgs{Pattern: "by"}, nil) }, false, ""},
	} {
		before := times.Load()
		err := test.do()
		if strings.HasSuffix(test.name, " in") == (err == nil) { // what is brought in here is nothing
			t.Errorf("%s: %v", test.name, err)
		}
		if got := times.Load() - before; got != 0 != test.writes {
			t.Errorf("%s: written out %d times", test.name, got)
		}
		if got := content.Load(); test.writes && got != test.want {
			t.Errorf("%s: written out with %q, want %q", test.name, got, test.want)
		}
	}
	broken.Store(true)
	for _, err := range []error{
		b.do(nucleus.WriteFiles, WriteArgs{Path: "file", Content: "again"}, nil), b.do(nucleus.RunBash, RunArgs{Script: "true"}, nil),
	} {
		wantKind(t, err, nucleus.KindFailed, "did not take what was written: input/output error")
	}
}

func failure(r Result) error {
	if r.Error == nil {
		return nil
	}
	return r.Error
}
