package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// archive makes a tar of lines: "dir/", "file=content", "link->target", "hard=>target",
// each with a mode after a space where it is not the usual one.
func archive(t *testing.T, lines ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, line := range lines {
		header := tar.Header{ModTime: time.Unix(1e9, 0), Mode: 0o755, Uid: 1000, Gid: 1000}
		if text, mode, ok := strings.Cut(line, " "); ok {
			line = text
			_, err := fmt.Sscanf(mode, "%o", &header.Mode)
			must(t, err)
		}
		content := ""
		switch {
		case strings.Contains(line, "->"):
			header.Name, header.Linkname, _ = strings.Cut(line, "->")
			header.Typeflag = tar.TypeSymlink
		case strings.Contains(line, "=>"):
			header.Name, header.Linkname, _ = strings.Cut(line, "=>")
			header.Typeflag = tar.TypeLink
		case strings.HasSuffix(line, "/"):
			header.Name, header.Typeflag = line, tar.TypeDir
		case strings.HasPrefix(line, "device:"):
			header.Name, header.Typeflag, header.Devmajor, header.Devminor = strings.TrimPrefix(line, "device:"), tar.TypeBlock, 8, 0
		case strings.HasPrefix(line, "fifo:"):
			header.Name, header.Typeflag = strings.TrimPrefix(line, "fifo:"), tar.TypeFifo
		default:
			header.Name, content, _ = strings.Cut(line, "=")
			header.Typeflag, header.Size = tar.TypeReg, int64(len(content))
		}
		must(t, w.WriteHeader(&header))
		_, err := w.Write([]byte(content))
		must(t, err)
	}
	must(t, w.Close())
	return out.Bytes()
}

// box is a directory to unpack into, inside one that must stay as it is.
type box struct {
	t     *testing.T
	outer string
	dir   string
}

func newBox(t *testing.T) box {
	outer := t.TempDir()
	b := box{t, outer, filepath.Join(outer, "root")}
	must(t, os.Mkdir(b.dir, 0o755))
	must(t, os.Mkdir(outer+"/victim", 0o755))
	must(t, os.WriteFile(outer+"/victim/file", []byte("untouched"), 0o644))
	return b
}

var usual = Limits{Bytes: 1 << 20, Entries: 1000}

func (b box) add(way Way, archives ...[]byte) error {
	b.t.Helper()
	into, err := Open(b.dir, usual)
	must(b.t, err)
	for _, a := range archives {
		if err := into.Add(context.Background(), bytes.NewReader(a), way); err != nil {
			return errors.Join(err, into.Close())
		}
	}
	return into.Close()
}

// intact fails where anything outside of the directory has changed.
func (b box) intact(what string) {
	b.t.Helper()
	got := listing(b.t, b.outer, "root")
	if want := "victim drwxr-xr-x|victim/file -rw-r--r-- untouched"; got != want {
		b.t.Errorf("%s: outside there is %s, want %s", what, got, want)
	}
}

func listing(t *testing.T, dir, except string) string {
	t.Helper()
	var all []string
	must(t, filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		must(t, err)
		relative, _ := filepath.Rel(dir, name)
		if relative == "." || relative == except {
			if relative == except {
				return fs.SkipDir
			}
			return nil
		}
		info, err := entry.Info()
		must(t, err)
		text := relative + " " + info.Mode().String()
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			must(t, err)
			text = relative + "->" + target
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name)
			must(t, err)
			text += " " + string(data)
		}
		all = append(all, text)
		return nil
	}))
	return strings.Join(all, "|")
}

func TestAdd(t *testing.T) {
	for name, c := range map[string]struct {
		way      Way
		archives [][]byte
		want     string
	}{
		"files and links": {Plain, [][]byte{archive(t, "./", "./usr/", "./usr/bin/", "./usr/bin/a=A", "usr/bin/b->a", "bin->usr/bin", "usr/c=>usr/bin/a")},
			"bin->usr/bin|usr drwxr-xr-x|usr/bin drwxr-xr-x|usr/bin/a -rwxr-xr-x A|usr/bin/b->a|usr/c -rwxr-xr-x A"},
		"no parent named":            {Plain, [][]byte{archive(t, "a/b/c=C 644")}, "a drwxr-xr-x|a/b drwxr-xr-x|a/b/c -rw-r--r-- C"},
		"an absolute name":           {Plain, [][]byte{archive(t, "/etc/passwd=p 644")}, "etc drwxr-xr-x|etc/passwd -rw-r--r-- p"},
		"rights are not taken over":  {Plain, [][]byte{archive(t, "su=s 6755", "sticky/ 7777", "device:dev", "fifo:pipe")}, "sticky drwxr-xr-x|su -rwxr-xr-x s"},
		"what is not for everybody":  {Plain, [][]byte{archive(t, "shadow=s 640", "private/ 700", "private/key=k 644", "x/ 711")}, "private drwx------|private/key -rw-r--r-- k|shadow -rw------- s|x drwx------"},
		"the last of one name":       {Plain, [][]byte{archive(t, "a=1 644", "a=22 600", "b/", "b/x=1 644", "b=3 644", "c=1 644", "c/", "c/d=2 644")}, "a -rw------- 22|b -rw-r--r-- 3|c drwxr-xr-x|c/d -rw-r--r-- 2"},
		"a file instead of a secret": {Plain, [][]byte{archive(t, "d/ 700", "d->e", "e/")}, "d->e|e drwxr-xr-x"},
		"through a link to inside":   {Plain, [][]byte{archive(t, "run/", "var/", "var/run->/run", "var/run/x=X 644", "up->var/../run/../../../run", "up/y=Y 644")}, "run drwxr-xr-x|run/x -rw-r--r-- X|run/y -rw-r--r-- Y|up->var/../run/../../../run|var drwxr-xr-x|var/run->/run"},
		"a hard link to a link":      {Plain, [][]byte{archive(t, "l->/etc/shadow", "h=>l")}, "h->/etc/shadow|l->/etc/shadow"},
		"a hard link through a link": {Plain, [][]byte{archive(t, "d/", "d/f=F 644", "l->/d", "h=>l/f")}, "d drwxr-xr-x|d/f -rw-r--r-- F|h -rw-r--r-- F|l->/d"},
		"a directory over a link":    {Layer, [][]byte{archive(t, "lib->usr/lib", "usr/lib/x=X 644"), archive(t, "lib/", "lib/y=Y 644")}, "lib drwxr-xr-x|lib/y -rw-r--r-- Y|usr drwxr-xr-x|usr/lib drwxr-xr-x|usr/lib/x -rw-r--r-- X"},
		"as dpkg has it":             {Package, [][]byte{archive(t, "lib->usr/lib", "usr/lib/x=X 644"), archive(t, "lib/", "lib/y=Y 644", "usr->gone", ".wh.lib=")}, ".wh.lib -rwxr-xr-x |lib->usr/lib|usr drwxr-xr-x|usr/lib drwxr-xr-x|usr/lib/x -rw-r--r-- X|usr/lib/y -rw-r--r-- Y"},
		"whiteouts": {Layer, [][]byte{
			archive(t, "a=1 644", "d/", "d/x=1 644", "d/y/", "d/y/z=1 644", "e/", "e/old=1 644", "e/sub/old=1 644", "k=1 644"),
			archive(t, ".wh.a=", "d/.wh.y=", "e/new=2 644", "e/sub/new=2 644", "e/.wh..wh..opq=", ".wh..wh.plnk=", "k=2 644", ".wh.k=", ".wh.none="),
		}, "d drwxr-xr-x|d/x -rw-r--r-- 1|e drwxr-xr-x|e/new -rw-r--r-- 2|e/sub drwxr-xr-x|e/sub/new -rw-r--r-- 2|k -rw-r--r-- 2"},
		"a whiteout through a link": {Layer, [][]byte{archive(t, "d/", "d/x=1 644", "l->/d"), archive(t, "l/.wh.x=")}, "d drwxr-xr-x|l->/d"},
		"a whiteout of a link":      {Layer, [][]byte{archive(t, "d/", "d/x=1 644", "l->/d"), archive(t, ".wh.l=")}, "d drwxr-xr-x|d/x -rw-r--r-- 1"},
	} {
		b := newBox(t)
		if err := b.add(c.way, c.archives...); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := listing(t, b.dir, ""); got != c.want {
			t.Errorf("%s: got\n %s, want\n %s", name, got, c.want)
		}
		b.intact(name)
	}
}

// Each tries to write, remove or read something outside, or to fill the disk.
// A contiguous file, of systems that have them, is a file.
func TestContiguousFile(t *testing.T) {
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	must(t, w.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeCont, Mode: 0o644, Size: 4}))
	_, err := w.Write([]byte("text"))
	must(t, errors.Join(err, w.Close()))
	dir := t.TempDir()
	into, err := Open(dir, Limits{Bytes: 1 << 20, Entries: 10})
	must(t, err)
	must(t, errors.Join(into.Add(t.Context(), &packed, Plain), into.Close()))
	if got, err := os.ReadFile(filepath.Join(dir, "f")); string(got) != "text" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAddRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		way      Way
		archives [][]byte
	}{
		"upwards":                   {Plain, [][]byte{archive(t, "../victim/file=x")}},
		"upwards later":             {Plain, [][]byte{archive(t, "a/../../victim/file=x")}},
		"absolute and upwards":      {Plain, [][]byte{archive(t, "/../victim/file=x")}},
		"a hard link upwards":       {Plain, [][]byte{archive(t, "h=>../victim/file")}},
		"a hard link beside":        {Plain, [][]byte{archive(t, "f=x", "h=>../f")}},
		"a hard link to nothing":    {Plain, [][]byte{archive(t, "h=>victim/file")}},
		"a hard link to a dir":      {Plain, [][]byte{archive(t, "d/", "h=>d")}},
		"links in a circle":         {Plain, [][]byte{archive(t, "a->b", "b->a", "a/x=x")}},
		"a file as a directory":     {Plain, [][]byte{archive(t, "a=x", "a/b=x")}},
		"an empty link":             {Plain, [][]byte{archive(t, "l->")}},
		"a long element":            {Plain, [][]byte{archive(t, strings.Repeat("x", 256)+"=x")}},
		"a whiteout of ..":          {Layer, [][]byte{archive(t, "d/.wh...=")}},
		"a whiteout of .":           {Layer, [][]byte{archive(t, "d/.wh..=")}},
		"a whiteout of no name":     {Layer, [][]byte{archive(t, "d/.wh.=")}},
		"too large":                 {Plain, [][]byte{archive(t, "a="+strings.Repeat("x", 1<<20+1))}},
		"too large together":        {Plain, [][]byte{archive(t, "a="+strings.Repeat("x", 1<<19)), archive(t, "b="+strings.Repeat("x", 1<<19), "c=x")}},
		"too large by hard links":   {Plain, [][]byte{archive(t, "a="+strings.Repeat("x", 1<<19), "b=>a", "c=>a")}},
		"a size that is a lie":      {Plain, [][]byte{huge(t)}},
		"cut off":                   {Plain, [][]byte{archive(t, "a="+strings.Repeat("x", 5000))[:2000]}},
		"no archive":                {Plain, [][]byte{bytes.Repeat([]byte("no archive"), 1000)}},
		"too many entries":          {Plain, [][]byte{archive(t, many(1001)...)}},
		"too deep":                  {Plain, [][]byte{archive(t, strings.Repeat("d/", 130)+"f=x")}},
		"too deep by a link":        {Plain, [][]byte{archive(t, strings.Repeat("d/", 100)+"f=x", "l->"+strings.Repeat("d/", 100), "l/"+strings.Repeat("e/", 50)+"f=x")}},
		"too many by their parents": {Plain, [][]byte{archive(t, many(999)...), archive(t, "d/e=x")}},
	} {
		b := newBox(t)
		if err := b.add(c.way, c.archives...); err == nil {
			t.Errorf("%s: taken: %s", name, listing(t, b.dir, ""))
		}
		b.intact(name)
	}
}

func many(n int) (lines []string) {
	for i := range n {
		lines = append(lines, fmt.Sprintf("f%d=", i))
	}
	return lines
}

// huge is an archive of 1 KiB that says that it holds an exabyte.
func huge(t *testing.T) []byte {
	var out bytes.Buffer
	must(t, tar.NewWriter(&out).WriteHeader(&tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1 << 60}))
	return out.Bytes()
}

// Links that lead out are links of the machine: written, never followed.
func TestLinksOutAreNotFollowed(t *testing.T) {
	b := newBox(t)
	victim := b.outer + "/victim"
	must(t, b.add(Layer,
		archive(t, "abs->"+victim, "rel->../victim", "deep/rel->../../victim", "file->"+victim+"/file"),
		archive(t, "abs/new=x", "rel/new=x", "deep/rel/new=x", "file=x", "abs/.wh.file=", "rel/.wh..wh..opq=", "h=>abs/new"),
	))
	b.intact("links")
	if data, err := os.ReadFile(b.dir + "/victim/new"); err != nil || string(data) != "x" {
		t.Errorf("inside: %q, %v", data, err)
	}
}

// What is packed is known by its first bytes.
func TestPlainStream(t *testing.T) {
	text := strings.Repeat("plain text ", 1000)
	for name, command := range map[string][]string{"none": {"cat"}, "gzip": {"gzip", "-c"}, "zstd": {"zstd", "-c"}, "bzip2": {"bzip2", "-c"}, "xz": {"xz", "-c"}} {
		packed, ok := packed(t, text, command...)
		if !ok {
			t.Logf("%s is not installed", command[0])
			continue
		}
		r, err := PlainStream(context.Background(), bytes.NewReader(packed))
		must(t, err)
		got, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil || string(got) != text {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if name == "none" {
			continue
		}
		packed[len(packed)/2] ^= 0xff
		r, err = PlainStream(context.Background(), bytes.NewReader(packed))
		if err == nil {
			_, err = io.Copy(io.Discard, r)
			r.Close()
		}
		if err == nil {
			t.Errorf("%s: a changed byte was not seen", name)
		}
	}
	r, err := PlainStream(context.Background(), strings.NewReader(""))
	must(t, err)
	if got, err := io.ReadAll(r); err != nil || len(got) > 0 {
		t.Errorf("nothing: %q, %v", got, err)
	}
}

// A decompressor whose reader goes away ends.
func TestPlainStreamClosedEarly(t *testing.T) {
	packed, ok := packed(t, strings.Repeat("long ", 1<<20), "xz", "-0", "-c")
	if !ok {
		t.Skip("xz is not installed")
	}
	r, err := PlainStream(context.Background(), bytes.NewReader(packed))
	must(t, err)
	_, err = io.ReadFull(r, make([]byte, 10))
	must(t, err)
	pid := r.(*piped).cmd.Process.Pid
	must(t, r.Close())
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the decompressor lives: %v", err)
	}
}

func packed(t *testing.T, text string, command ...string) ([]byte, bool) {
	t.Helper()
	if _, err := exec.LookPath(command[0]); err != nil {
		return nil, false
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.Output()
	must(t, err)
	return out, true
}

// Whatever an archive holds, nothing outside changes, and nothing inside is more than
// directories, links and files without special bits, within the limits.
func FuzzAdd(f *testing.F) {
	t := &testing.T{}
	for _, lines := range [][]string{
		{"usr/", "usr/a=A", "l->/usr", "l/b=B", "h=>usr/a"}, {"../x=x"}, {"a->b", "b->a", "a/x=x"}, {"d/ 700", "d/.wh..wh..opq=", ".wh.d="}, {"abs->/etc", "abs/passwd=x", "device:d", "fifo:f"},
	} {
		f.Add(archive(t, lines...), 0)
		f.Add(archive(t, lines...), 1)
		f.Add(archive(t, lines...), 2)
	}
	f.Fuzz(func(t *testing.T, data []byte, way int) {
		b := newBox(t)
		b.add(Way((way%3+3)%3), data)
		b.intact("fuzzed")
		var size int64
		must(t, filepath.WalkDir(b.dir, func(name string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := entry.Info()
			must(t, err)
			if mode := info.Mode(); !mode.IsDir() && !mode.IsRegular() && mode.Type() != fs.ModeSymlink || mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0 {
				t.Errorf("%s is %v", name, mode)
			}
			if info.Mode().IsRegular() {
				size += info.Size()
			}
			return nil
		}))
		if size > usual.Bytes {
			t.Errorf("%d bytes", size)
		}
	})
}

// A way that an entry has changed is looked up again by the next one, also where both lie in
// the same directory.
func TestWayIsLookedUpAgain(t *testing.T) {
	lower := []string{"d/", "d/l->/d"}
	for name, c := range map[string]struct {
		way   Way
		upper []string
		want  string // where y is; "": an error
	}{
		"control":                    {Plain, []string{"d/l/x=1", "d/l/y=2"}, "d/y"},
		"a file in the link's place": {Plain, []string{"d/l/x=1", "d/l/l=file", "d/l/y=2"}, ""},
		"a directory":                {Plain, []string{"d/l/x=1", "d/l/l/", "d/l/y=2"}, "d/l/y"},
		"another link":               {Plain, []string{"d/l/x=1", "d/l/l->/e", "d/l/y=2"}, "e/y"},
		"a hard link":                {Plain, []string{"d/l/x=1", "d/l/l=>d/x", "d/l/y=2"}, ""},
		"a whiteout":                 {Layer, []string{"d/l/x=1", "d/l/.wh.l", "d/l/y=2"}, "d/l/y"},
	} {
		b := newBox(t)
		err := b.add(c.way, archive(t, lower...), archive(t, c.upper...))
		if (err != nil) != (c.want == "") {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := os.ReadFile(filepath.Join(b.dir, c.want)); c.want != "" && (err != nil || string(got) != "2") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		b.intact(name)
	}
}

func TestTell(t *testing.T) {
	b := newBox(t)
	into, err := Open(b.dir, usual)
	must(t, err)
	var entries, size int64
	into.Tell(func(e, s int64) { entries, size = e, s })
	into.since = into.since.Add(-time.Hour)
	must(t, into.Add(context.Background(), bytes.NewReader(archive(t, "d/", "d/f=1234", "d/g=5")), Plain))
	if entries != 1 || size != 0 {
		t.Errorf("told of %d entries and %d bytes, want the first alone", entries, size)
	}
	into.since = into.since.Add(-time.Hour)
	must(t, into.Add(context.Background(), bytes.NewReader(archive(t, "h=6")), Plain))
	if entries != 4 || size != 6 {
		t.Errorf("told of %d entries and %d bytes", entries, size)
	}
	must(t, into.Close())
}
