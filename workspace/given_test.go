package workspace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A file that a person names is read, a pipe too, and nothing else: nobody waits for what does
// not come, or takes in what does not end.
func TestReadGiven(t *testing.T) {
	dir := t.TempDir()
	name := func(base string) string { return filepath.Join(dir, base) }
	err := errors.Join(
		os.WriteFile(name("ten"), []byte("0123456789"), 0o600), os.WriteFile(name("eleven"), []byte("0123456789a"), 0o600), os.WriteFile(name("empty"), nil, 0o600),
		os.Symlink("ten", name("link")), os.Symlink("/dev/zero", name("to a device")), syscall.Mkfifo(name("fifo"), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	large, err := os.Create(name("large"))
	if err == nil {
		err = errors.Join(large.Truncate(1<<40), large.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	for base, want := range map[string]string{"ten": "0123456789", "link": "0123456789", "empty": "", "fifo": "", "eleven": "0123456789a", "large": strings.Repeat("\x00", 11)} {
		if got, err := ReadGiven(name(base), 10); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v; want %q", base, got, err, want)
		}
	}
	for _, file := range []string{dir, "/dev/zero", "/dev/full", name("to a device")} {
		if got, err := ReadGiven(file, 10); err == nil || !strings.Contains(err.Error(), "is no regular file and no pipe") {
			t.Errorf("%s: got %q, %v", file, got, err)
		}
	}
	if _, err := ReadGiven(name("none"), 10); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	// What somebody writes into a pipe is read.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString("said"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := os.Stat("/dev/fd"); err == nil {
		if got, err := ReadGiven("/dev/fd/"+fmt.Sprint(r.Fd()), 10); err != nil || string(got) != "said" {
			t.Errorf("a pipe: got %q, %v", got, err)
		}
	}
}
