package durable

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestWriteFileReplaces(t *testing.T) {
	name := filepath.Join(t.TempDir(), "record")
	for _, content := range []string{"first, longer", "second", ""} {
		if err := WriteFile(name, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil || string(got) != content {
			t.Fatalf("got %q, %v; want %q", got, err, content)
		}
	}
	info, err := os.Stat(name)
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Fatalf("mode %v, %v; want 0640", info.Mode(), err)
	}
	list, _ := os.ReadDir(filepath.Dir(name))
	if len(list) != 1 {
		t.Fatalf("directory holds %v, want the file alone", list)
	}
}

// A link at the name is replaced; what it pointed at stays as it was.
func TestWriteFileDoesNotFollowLink(t *testing.T) {
	dir := t.TempDir()
	victim, name := filepath.Join(dir, "victim"), filepath.Join(dir, "record")
	if err := os.WriteFile(victim, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, name); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(name, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(victim); string(got) != "mine" {
		t.Fatalf("victim is %q", got)
	}
	if got, err := ReadFile(name, 10); err != nil || string(got) != "new" {
		t.Fatalf("record is %q, %v", got, err)
	}
}

func TestReadFileRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "plain"), []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("plain", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		limit int64
		want  string
	}{
		{"link", 10, "not a regular file"},
		{"fifo", 10, "not a regular file"},
		{".", 10, "not a regular file"},
		{"plain", 4, "more than 4"},
		{"absent", 4, "no such file"},
	} {
		_, err := ReadFile(filepath.Join(dir, c.name), c.limit)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if got, err := ReadFile(filepath.Join(dir, "plain"), 5); err != nil || string(got) != "12345" {
		t.Errorf("plain: %q, %v", got, err)
	}
}

func TestDirCannotBeLeft(t *testing.T) {
	outside := t.TempDir()
	dir := filepath.Join(outside, "log")
	if err := MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, name := range []string{"out/x", "../x", "a/../../x", filepath.Join(outside, "x")} {
		if err := d.WriteFile(name, []byte("x"), 0o600); err == nil {
			t.Errorf("wrote %s", name)
		}
	}
	if _, err := os.Stat(filepath.Join(outside, "x")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made outside: %v", err)
	}
	if err := d.WriteFile("a/b/x", []byte("x"), 0o600); err != nil {
		t.Errorf("positive control: %v", err)
	}
}

func TestCleanRemovesWhatACrashLeft(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{temporary + "1", "kept"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Clean(); err != nil {
		t.Fatal(err)
	}
	list, _ := os.ReadDir(dir)
	if len(list) != 1 || list[0].Name() != "kept" {
		t.Fatalf("left: %v", list)
	}
}

func TestLockExcludes(t *testing.T) {
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	first, err := d.Lock("lock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Lock("lock"); !errors.Is(err, ErrLocked) {
		t.Fatalf("second: %v, want ErrLocked", err)
	}
	first.Close()
	second, err := d.Lock("lock")
	if err != nil {
		t.Fatalf("after release: %v", err)
	}
	second.Close()
}

func TestMkdirAll(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := MkdirAll(filepath.Join(dir, "file", "b"), 0o700); err == nil {
		t.Error("made a directory below a file")
	}
	if err := MkdirAll(filepath.Join(dir, "file"), 0o700); err == nil {
		t.Error("took a file for a directory")
	}
}

func TestStoreLoad(t *testing.T) {
	type record struct {
		Name string `json:"name"`
	}
	name := filepath.Join(t.TempDir(), "record.json")
	var got record
	if err := Load(name, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("absent: %v, want ErrNotExist", err)
	}
	if err := Store(name, record{"x"}); err != nil {
		t.Fatal(err)
	}
	if err := Load(name, &got); err != nil || got.Name != "x" {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, bad := range []string{``, `{`, `{"name":"x","nam":1}`, `{"name":"x"} {}`, `[]`} {
		if err := os.WriteFile(name, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Load(name, &got); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func TestAppend(t *testing.T) {
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.Append("journal"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("absent: %v", err)
	}
	if err := d.WriteFile("journal", []byte("a"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := d.Append("journal")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write([]byte("b")); err != nil {
		t.Fatal(err)
	}
	if err := Datasync(f); err != nil {
		t.Fatal(err)
	}
	if got, err := d.ReadFile("journal", 2); err != nil || !bytes.Equal(got, []byte("ab")) {
		t.Fatalf("%q, %v", got, err)
	}
}
