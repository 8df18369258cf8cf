package script

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// AlterDate is the time that Alter gives to a file.
var AlterDate = time.Date(2001, 2, 3, 4, 5, 6, 7000, time.UTC)

// Alter makes the directory dir and in it changes files in all the ways that programs do,
// each after it was read, so that a kernel which likes to keep things in mind
// has the old state there. The suite knows what has to come of it.
func Alter(dir string) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"overwritten", "appended", "patched", "write-only", "mapped", "cut", "before", "replaced", "first-name", "gone", "chmod", "dated"} {
		if err := os.WriteFile(at(name), []byte("old content\n"), 0o644); err != nil {
			return err
		}
		if _, err := os.ReadFile(at(name)); err != nil {
			return err
		}
		if err := mapped(at(name), os.O_RDONLY, func([]byte) {}); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(at("overwritten"), []byte("new"), 0o644),
		write(at("appended"), os.O_APPEND|os.O_WRONLY, 0, "new"),
		write(at("patched"), os.O_RDWR, 4, "NEW"),
		os.Chmod(at("write-only"), 0o200), write(at("write-only"), os.O_WRONLY, 4, "NEW"), os.Chmod(at("write-only"), 0o644),
		mapped(at("mapped"), os.O_RDWR, func(page []byte) { copy(page[4:], "NEW") }),
		os.Truncate(at("cut"), 3),
		os.Rename(at("before"), at("after")),
		os.WriteFile(at("replacing"), []byte("new"), 0o644), os.Rename(at("replacing"), at("replaced")),
		os.Link(at("first-name"), at("second-name")), write(at("second-name"), os.O_WRONLY, 4, "NEW"),
		os.Remove(at("gone")),
		os.Chmod(at("chmod"), 0o751),
		os.Chtimes(at("dated"), AlterDate, AlterDate),
		os.MkdirAll(at("dir/below"), 0o755), os.WriteFile(at("dir/below/file"), []byte("new"), 0o644), os.Symlink("after", at("symlink")),
	)
}

func write(name string, flags int, offset int64, text string) error {
	f, err := os.OpenFile(name, flags, 0)
	if err != nil {
		return err
	}
	if flags&os.O_APPEND != 0 {
		_, err = f.WriteString(text)
	} else {
		_, err = f.WriteAt([]byte(text), offset)
	}
	return errors.Join(err, f.Close())
}

// mapped does something with a shared mapping of a file's first page.
func mapped(name string, flags int, do func([]byte)) error {
	f, err := os.OpenFile(name, flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	protection := unix.PROT_READ
	if flags == os.O_RDWR {
		protection |= unix.PROT_WRITE
	}
	page, err := unix.Mmap(int(f.Fd()), 0, 12, protection, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	_ = page[0]
	do(page)
	return unix.Munmap(page)
}
