package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cal/image"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// TestHostUpgrades: what the host changes in a layer while the machine runs, the machine
// sees, whole. The sentry may keep in mind only what is the machine's alone.
func TestHostUpgrades(t *testing.T) {
	t.Parallel()
	h := host(t)
	spec := h.Spec(t)
	layer, err := os.MkdirTemp(h.Scratch, "layer")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(layer) })
	must(t, os.Chmod(layer, 0o755))
	write := func(name, text string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(layer, "new"), []byte(text), 0o644))
		must(t, os.Rename(filepath.Join(layer, "new"), filepath.Join(layer, name))) // as package managers do
	}
	write("library", "old")
	spec.Image.Layers = []nucleus.Layer{{Name: "layer", Host: layer, Guest: "/opt/layer"}}
	m, guest := h.Create(t, spec)
	read := func(name string) string {
		reply := guest.Try(script.Action{Do: "read", Path: "/opt/layer/" + name, UID: m.Facts().ToolsUID})
		return reply.Data + reply.Err
	}
	if got := read("library"); got != "old" {
		t.Fatalf("before: %q", got)
	}
	if got := read("added"); !strings.Contains(got, "no such file") {
		t.Fatalf("a file that is not there yet: %q", got)
	}
	write("library", "new and longer")
	write("added", "added")
	for name, want := range map[string]string{"library": "new and longer", "added": "added"} {
		if got := read(name); got != want {
			t.Errorf("after the host's upgrade %s is %q, want %q", name, got, want)
		}
	}
}

func TestSharedWithHost(t *testing.T) {
	hints := sharedWithHost([]image.Bind{{Host: "/usr", Guest: "/usr"}, {Host: "/m/empty/file", Guest: "/usr/a"}, {Host: "/m/empty/file", Guest: "/usr/b"}})
	want := map[string]string{}
	for name, source := range map[string]string{"bind0": "/usr", "bind1": "/m/empty/file"} {
		want["dev.gvisor.spec.mount."+name+".source"] = source
		want["dev.gvisor.spec.mount."+name+".type"] = "bind"
		want["dev.gvisor.spec.mount."+name+".share"] = "shared"
	}
	if len(hints) != len(want) {
		t.Errorf("hints %v, want %v", hints, want)
	}
	for key, value := range want {
		if hints[key] != value {
			t.Errorf("%s is %q, want %q", key, hints[key], value)
		}
	}
}

// TestRemembered: more files than the sentry keeps in mind, each seen as it is after it
// was written anew, and the sentry within its descriptors.
func TestRemembered(t *testing.T) {
	for descriptors, want := range map[uint64]uint64{0: 0, 1024: 0, 4000: 0, 20000: 5000, 524288: 65536, 1 << 63: 65536} {
		if got := remembered(descriptors); got != want {
			t.Errorf("of %d descriptors: %d, want %d", descriptors, got, want)
		}
	}
	t.Parallel()
	h := host(t)
	spec := h.Spec(t)
	m, guest := h.Create(t, spec)
	const command = `mkdir d; cd d; i=0; while [ $i -lt 6000 ]; do echo old > $i; i=$((i+1)); done
cat * | sort | uniq -c; i=0; while [ $i -lt 6000 ]; do echo newer > $i; i=$((i+1)); done; cat * | sort | uniq -c; ls -l | awk '{print $5}' | sort | uniq -c; echo exit $?`
	got := inside(guest, m, "", map[string]string{"PATH": image.DefaultPath}, command)
	if want := "6000 old 6000 newer 1 6000 6 exit 0"; strings.Join(strings.Fields(got), " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
	entries, err := os.ReadDir(filepath.Join(copyWorkspace(t, spec.Workspace), "d"))
	if err != nil || len(entries) != 6000 {
		t.Errorf("on the host %d files, %v", len(entries), err)
	}
}
