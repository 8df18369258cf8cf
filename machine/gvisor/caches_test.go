package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cal/image"
	"cal/machine/machinetest/script"
)

// TestHostileCache: a cache, on another file system and below a home with
// spaces, holds doors to a secret. Everything of the cache's own can be read, no door opens.
func TestHostileCache(t *testing.T) {
	t.Parallel()
	h := host(t)
	const secret = "canary-of-a-cache"
	elsewhere, err := os.MkdirTemp("/dev/shm", "cal caches ")
	if err != nil {
		t.Skipf("no other file system: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(elsewhere) })
	must(t, os.Chmod(elsewhere, 0o755))
	home := filepath.Join(elsewhere, "a home")
	cache := filepath.Join(home, ".npm", "_cacache")
	must(t, os.MkdirAll(filepath.Join(cache, "closed"), 0o755))
	for path, mode := range map[string]os.FileMode{
		home + "/token": 0o600, home + "/open": 0o644, cache + "/entry": 0o644, cache + "/private": 0o600, cache + "/closed/entry": 0o644,
	} {
		must(t, os.WriteFile(path, []byte(secret), 0o644))
		must(t, os.Chmod(path, mode))
	}
	must(t, os.Chmod(cache+"/closed", 0o700))
	must(t, os.Symlink(home+"/open", cache+"/absolute"))
	must(t, os.Symlink("../../open", cache+"/relative"))
	must(t, os.Symlink("../..", cache+"/up"))
	must(t, os.Symlink("/proc/self/root"+home, cache+"/proc"))
	must(t, os.Link(home+"/token", cache+"/second-name"))

	found, err := image.Find(t.Context(), image.Person{Home: home})
	must(t, err)
	if len(found.Layers) != 1 {
		t.Fatalf("%+v", found)
	}
	spec := h.Spec(t)
	spec.Image.Kind, spec.Image.Path, spec.Image.Layers = "directory", smallImage(t), found.Layers
	m, guest := h.Create(t, spec)
	at := found.Layers[0].Guest
	for _, uid := range []int{-1, m.Facts().ToolsUID, m.Facts().AgentUID} {
		if got := guest.Must(script.Action{Do: "read", Path: at + "/entry", UID: uid}); got != secret { // control
			t.Errorf("user %d: %q", uid, got)
		}
		for _, name := range []string{"/private", "/closed/entry", "/absolute", "/relative", "/up/open", "/up/token", "/proc/open", "/second-name"} {
			if reply := guest.Try(script.Action{Do: "read", Path: at + name, UID: uid}); strings.Contains(reply.Data, secret) {
				t.Errorf("user %d reads %s", uid, name)
			}
		}
		guest.MustFail(script.Action{Do: "write", Path: at + "/entry", Data: "poison", UID: uid})
		guest.MustFail(script.Action{Do: "remove", Path: at + "/entry", UID: uid})
	}
}
