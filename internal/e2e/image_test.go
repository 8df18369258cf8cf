package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"cal/image"
	"cal/internal/testenv"
	"cal/internal/testenv/vm"
	"cal/nucleus"
)

// rootTar is a root file system with one program: cal itself, which is static.
func rootTar(t *testing.T, e *testenv.Env) []byte {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(e.Bin, "cal"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range []tar.Header{
		{Name: "app/bin/only-here", Mode: 0o6755, Size: int64(len(program))}, {Name: "bin", Linkname: "app/bin", Typeflag: tar.TypeSymlink},
		{Name: "app/secret", Mode: 0o600}, {Name: "app/disk", Typeflag: tar.TypeBlock, Devmajor: 8},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(program); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// pushed is an image of one layer in a registry on loopback.
func pushed(t *testing.T, layer []byte) (ref string) {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	made, err := mutate.AppendLayers(empty.Image, static.NewLayer(layer, types.DockerUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	config, err := made.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config.OS, config.Architecture, config.Config.Env = "linux", "amd64", []string{"PATH=/app/bin", "FROM_IMAGE=yes", "HOME=/elsewhere"}
	if made, err = mutate.ConfigFile(made, config); err != nil {
		t.Fatal(err)
	}
	to, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/test/app:1")
	if err == nil {
		err = remote.Write(to, made)
	}
	if err != nil {
		t.Fatal(err)
	}
	return to.Name()
}

// A machine's programs come from a tarball, or from a registry, and from nowhere else; what it
// was made of stands in the log; what it uses is not pruned.
func TestImages(t *testing.T) {
	e := testenv.New(t)
	layer := rootTar(t, e)
	tarball := filepath.Join(e.Dir, "root.tar")
	if err := os.WriteFile(tarball, layer, 0o600); err != nil {
		t.Fatal(err)
	}
	ref := pushed(t, layer)
	e.Cal("run", "--image", "oci:"+ref, "--", "only-here", "version").Want(t, 0, nucleus.Version, "fetching")
	second := e.Cal("run", "--image", "oci:"+ref, "--", "only-here", "version").Want(t, 0, nucleus.Version)
	if strings.Contains(second.Stderr, "fetching") {
		t.Errorf("fetched twice\n%v", second)
	}
	e.Cal("run", "--image", tarball, "--", "/app/bin/only-here", "version").Want(t, 0, nucleus.Version, "unpacking")
	e.Cal("run", "--image", "tarball:"+tarball, "--", "sh", "-c", "true").Want(t, 127)
	starts := e.Entries(func(entry nucleus.Entry) bool { return entry.Kind == nucleus.KindPodStart })
	digests := map[string]int{}
	for _, start := range starts {
		var data struct {
			Image   string            `json:"image"`
			Digests map[string]string `json:"image_digests"`
		}
		if err := json.Unmarshal(start.Data, &data); err != nil || data.Digests["root"] == "" || !strings.Contains(data.Image, ":") {
			t.Errorf("%s: %v", start.Data, err)
		}
		digests[data.Digests["root"]]++
	}
	// The layer and the tarball hold the same.
	if len(starts) != 4 || len(digests) != 1 {
		t.Errorf("%d machines were made of %v", len(starts), digests)
	}
	var list []image.Listed
	listed := e.Cal("image", "list", "--json").Want(t, 0)
	if err := json.Unmarshal([]byte(listed.Stdout), &list); err != nil || len(list) != 1 || digests[list[0].Digest] == 0 {
		t.Errorf("%v\n%v", err, listed)
	}
	inspected := e.Cal("image", "inspect", list[0].Digest[:20]).Want(t, 0, list[0].Digest, "tree")
	if strings.Contains(inspected.Stdout, "elsewhere") {
		t.Errorf("the image's HOME\n%v", inspected)
	}
	e.Cal("image", "prune", "--all").Want(t, 0, "0 objects")
	e.Cal("image", "inspect", "nothing").Want(t, 1, "nothing")
	e.Cal("image", "prune", "--unused", "-1s").Want(t, 2)
	e.Cal("image", "prune", "--all", "--unused", "5h").Want(t, 2)
	e.Cal("image", "build", "moon").Want(t, 2, "moon")
	e.Cal("image", "build").Want(t, 2)
	e.Cal("run", "--image", "oci:127.0.0.1:1/nowhere:1", "--", "true").Want(t, 1, "127.0.0.1:1")
	e.Cal("run", "--image", "debian:--allow-unauthenticated", "--", "true").Want(t, 2, "package")
}

// What is corrupt is not used; who follows the hint can go on, though a machine holds it.
func TestCorruptImage(t *testing.T) {
	e := testenv.New(t)
	tarball := filepath.Join(e.Dir, "root.tar")
	if err := os.WriteFile(tarball, rootTar(t, e), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func() testenv.Result { return e.Cal("run", "--image", tarball, "--", "only-here", "version") }
	run().Want(t, 0, nucleus.Version)
	list := func() (list []image.Listed) {
		t.Helper()
		got := e.Cal("image", "list", "--json").Want(t, 0)
		if err := json.Unmarshal([]byte(got.Stdout), &list); err != nil || len(list) != 1 {
			t.Fatalf("%v\n%v", err, got)
		}
		return list
	}
	held := func() {
		t.Helper()
		testenv.Eventually(t, time.Minute, "a machine that holds the image", func() bool { return len(list()[0].UsedBy) > 0 }) // a spare one
	}
	held()
	holder := list()[0].UsedBy[0]
	object := filepath.Join(e.CAL, "images", "objects", strings.TrimPrefix(list()[0].Digest, "sha256:"))
	if err := os.WriteFile(filepath.Join(object, "root/app/bin/only-here"), []byte("#!/bin/sh\necho no\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	run().Want(t, 1, "corrupt image", "hint: cal image prune removes it, and it is made again at the next start")
	pruned := e.Cal("image", "prune", "--json").Want(t, 0, "1 object removed")
	var done []image.Pruned
	if err := json.Unmarshal([]byte(pruned.Stdout), &done); err != nil || len(done) != 1 || !done[0].Removed || !strings.Contains(done[0].Why, holder) {
		t.Errorf("%v, want %s\n%v", err, holder, pruned)
	}
	run().Want(t, 0, nucleus.Version, "unpacking")
	held()
	e.Cal("image", "prune").Want(t, 0, "kept", "a machine uses it", "0 objects removed", "1 kept")
}

// An image of Debian's packages has what a day's work takes.
func TestDebianImage(t *testing.T) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("this host has no apt")
	}
	e := testenv.New(t)
	if said, err := e.Command("apt-get", "-qq", "--print-uris", "update").CombinedOutput(); err != nil {
		t.Skipf("apt knows no archive: %v: %s", err, said)
	}
	built := e.Cal("image", "build", "debian", "--json")
	if built.Code != 0 && strings.Contains(built.Stderr, "Temporary failure resolving") {
		t.Skipf("Debian's archive cannot be reached\n%v", built)
	}
	built.Want(t, 0, `"kind": "root"`)
	script := `set -e
git --version; curl --version | head -1; awk 'BEGIN { print "awk", 40+2 }'; sed --version | head -1; tar --version | head -1; ps -e >/dev/null; perl -e 'print "perl\n"'
git init -q r; cd r; echo a > a; git add a; git -c user.name=n -c user.email=e commit -qm one; git log --oneline | grep one
diff a a; find . -name a | xargs grep a; less --version | head -1; file a; which sh; test -s /etc/ssl/certs/ca-certificates.crt; openssl x509 -noout -in /usr/lib/ssl/cert.pem
test ! -e /usr/local/go; test -z "$(find / -xdev -perm /6000 2>/dev/null)"; id -un`
	e.Cal("run", "--image", "debian", "--", "bash", "-c", script).Want(t, 0, "git version", "curl ", "awk 42", "GNU sed", "tar (GNU tar)", "perl", "one", "less ", "ASCII text", "/sh")
}

// TestUmask: a person whose files are for nobody else has machines too, whose users read what is
// made for them.
func TestUmask(t *testing.T) {
	e := testenv.New(t)
	vm.StoreIn(t, filepath.Join(e.CAL, "images")) // or skip
	tarball := filepath.Join(e.Dir, "root.tar")
	if err := os.WriteFile(tarball, rootTar(t, e), 0o600); err != nil {
		t.Fatal(err)
	}
	careful := func(args ...string) testenv.Result {
		t.Helper()
		return e.Start(e.Command("sh", slices.Concat([]string{"-c", `umask 077; exec "$0" "$@"`, filepath.Join(e.Bin, "cal")}, args)...)).Wait()
	}
	careful("run", "--", "sh", "-c", "echo hello > f; cat f").Want(t, 0, "hello")
	careful("run", "--image", tarball, "--", "/app/bin/only-here", "version").Want(t, 0, nucleus.Version, "unpacking")
	careful("run", "--driver", "qemu", "--image", tarball, "--", "/app/bin/only-here", "version").Want(t, 0, nucleus.Version)
}
