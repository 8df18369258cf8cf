package fileid

import (
	"os"
	"path/filepath"
	"testing"
)

func TestOf(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	id := func() ID {
		t.Helper()
		id, err := Of(file)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if id() != (ID{}) {
		t.Error("a path that leads nowhere has an identity")
	}
	write(file, "one")
	first := id()
	if first == (ID{}) || id() != first {
		t.Errorf("an untouched file: %+v, then %+v", first, id())
	}
	write(file, "longer")
	written := id()
	if written == first {
		t.Error("a file that was written to is the same")
	}
	write(file+".new", "longer")
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	if id() == written {
		t.Error("a file that was replaced is the same")
	}
	before, _ := Of(dir)
	write(filepath.Join(dir, "another"), "")
	if after, _ := Of(dir); after != before {
		t.Error("a directory is another once something is put into it")
	}
	if _, err := Of(filepath.Join(file, "below")); err == nil {
		t.Error("a path through a file has an identity")
	}
}
