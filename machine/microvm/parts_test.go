package microvm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cal/image"
	"cal/machine"
	"cal/machine/site"
	"cal/nucleus"
)

func TestShape(t *testing.T) {
	usual := nucleus.Resources{CPU: 2, MemoryMB: 1024, Pids: 100, DiskMB: 500}
	if got, want := ShapeOf(nucleus.Resources{}, usual), (Shape{2, 1024, 500, 100}); got != want {
		t.Errorf("nothing stated: %+v, want %+v", got, want)
	}
	stated := nucleus.Resources{CPU: 1, MemoryMB: 300, Pids: 64, DiskMB: 64}
	shape := ShapeOf(stated, usual)
	if want := (Shape{1, 300, 64, 64}); shape != want {
		t.Errorf("all stated: %+v, want %+v", shape, want)
	}
	must(t, machine.Spec{Resources: stated}.States(shape.Limits()))
	for i, limit := range shape.Limits() {
		if limit.Resource != machine.Resources[i] || limit.How != machine.Enforced {
			t.Errorf("limit %d: %+v, want %s enforced", i, limit, machine.Resources[i])
		}
	}
}

func parts() Parts {
	return Parts{
		Kernel: image.Kernel{Digest: "sha256:k"}, Initramfs: image.Disk{Digest: "sha256:i"},
		Disks: []Disk{{Root, "/r", "sha256:r", 1 << 30}, {Layers, "/l", "sha256:l", 1 << 31}, {Workspace, "/w", "", 300}, {Scratch, "/s", "", 200}},
	}
}

func TestParts(t *testing.T) {
	p := parts()
	if got := p.Longest(); got != 300 {
		t.Errorf("the longest file that may be written is %d, want the workspace's 300", got)
	}
	held := p.Held()
	slices.Sort(held)
	if want := []string{"sha256:i", "sha256:k", "sha256:l", "sha256:r"}; !slices.Equal(held, want) {
		t.Errorf("held %q, want %q", held, want)
	}
	if line := p.CommandLine("vsock", 7); !strings.Contains(line, "cal.disks=root,layers,workspace,scratch cal.wire=vsock cal.tasks=7 ") || strings.ContainsAny(line, "/\n\"") {
		t.Errorf("command line %q", line)
	}
	facts := Shape{Pids: 9}.Facts(p)
	if !facts.Sync || facts.OneID || facts.Tasks != 9 || facts.Digests["layers"] != "sha256:l" || facts.Digests["workspace"] != "" {
		t.Errorf("facts %+v", facts)
	}
}

func TestWorkspace(t *testing.T) {
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		if _, err := exec.LookPath("/sbin/mkfs.ext4"); err != nil {
			t.Skip("no mkfs.ext4 here (apt install e2fsprogs): no disk can be made")
		}
	}
	store, err := image.Open(t.TempDir())
	must(t, err)
	source := Source{Images: store}
	const size = 64 << 20
	dir := t.TempDir()
	disk := filepath.Join(dir, site.WorkspaceDisk)
	must(t, os.WriteFile(disk+unfinished, []byte("what a killed start left"), 0o600))
	first, err := source.workspace(t.Context(), dir, size)
	must(t, err)
	if want := (Disk{Workspace, disk, "", size}); first != want {
		t.Errorf("%+v, want %+v", first, want)
	}
	if left := entries(t, dir); !slices.Equal(left, []string{site.WorkspaceDisk}) {
		t.Errorf("beside the disk: %q", left)
	}
	var stat unix.Stat_t
	must(t, unix.Lstat(disk, &stat))
	if stat.Blocks*512 > size/4 || stat.Mode&0o077 != 0 {
		t.Errorf("a blank disk takes %d bytes, mode %o", stat.Blocks*512, stat.Mode)
	}
	again, err := source.workspace(t.Context(), dir, 2*size)
	must(t, err)
	if again != first {
		t.Errorf("a disk that is there became %+v", again)
	}

	for name, spoil := range map[string]func(dir, disk string) error{
		"files of the host": func(dir, _ string) error { return os.WriteFile(filepath.Join(dir, "main.go"), nil, 0o600) },
		"a link":            func(_, disk string) error { return os.Symlink("/etc/passwd", disk) },
		"a directory":       func(_, disk string) error { return os.Mkdir(disk, 0o700) },
		"a pipe":            func(_, disk string) error { return unix.Mkfifo(disk, 0o600) },
		"a second name": func(dir, disk string) error {
			return errors.Join(os.WriteFile(disk, make([]byte, size), 0o600), os.Link(disk, dir+"-second"))
		},
	} {
		dir := filepath.Join(t.TempDir(), "w")
		must(t, os.Mkdir(dir, 0o700))
		must(t, spoil(dir, filepath.Join(dir, site.WorkspaceDisk)))
		before := entries(t, dir)
		if _, err := source.workspace(t.Context(), dir, size); !errors.Is(err, machine.ErrRefused) {
			t.Errorf("%s: %v, want a refusal", name, err)
		}
		if after := entries(t, dir); !slices.Equal(before, after) {
			t.Errorf("%s: %q became %q", name, before, after)
		}
	}
}

func entries(t *testing.T, dir string) (names []string) {
	t.Helper()
	found, err := os.ReadDir(dir)
	must(t, err)
	for _, entry := range found {
		names = append(names, entry.Name())
	}
	return names
}

func TestTape(t *testing.T) {
	read, write := io.Pipe()
	var tape Tape
	ended := make(chan struct{})
	go func() { tape.Record(read); close(ended) }()
	for i := range 10_000 {
		_, err := fmt.Fprintf(write, "line %d\n", i)
		must(t, err)
	}
	write.Close()
	<-ended
	if text := tape.String(); len(text) != tapeMost || !strings.HasSuffix(text, "line 9998\nline 9999\n") {
		t.Errorf("%d bytes, ending in %q", len(text), text[max(0, len(text)-30):])
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
