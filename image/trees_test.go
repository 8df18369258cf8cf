package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"cal/image/unpack"
	"cal/nucleus"
)

// tarOf is a tar of files by name; "-> target" is a link.
func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, content := range files {
		header := tar.Header{Name: name, Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			header.Typeflag, header.Linkname, header.Size = tar.TypeSymlink, target, 0
		}
		must(t, w.WriteHeader(&header))
		if header.Typeflag == tar.TypeReg {
			_, err := w.Write([]byte(content))
			must(t, err)
		}
	}
	must(t, w.Close())
	return out.Bytes()
}

func gzipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(data)
	must(t, errors.Join(err, w.Close()))
	return out.Bytes()
}

// testRegistry is a registry on loopback; corrupt, if it is set, changes blobs on the way.
type testRegistry struct {
	t       *testing.T
	address string
	asked   atomic.Int64
	corrupt atomic.Bool
}

func newRegistry(t *testing.T) *testRegistry {
	r := &testRegistry{t: t}
	serve := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.asked.Add(1)
		if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") && r.corrupt.Load() {
			w = &corrupting{ResponseWriter: w}
		}
		serve.ServeHTTP(w, q)
	}))
	t.Cleanup(server.Close)
	r.address = strings.TrimPrefix(server.URL, "http://")
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // nobody's logins
	return r
}

// corrupting changes a byte at the beginning of a layer, which nobody would see but by its
// digest: of a gzip stream the time, of a tar the name of its first file.
type corrupting struct {
	http.ResponseWriter
	done bool
}

func (c *corrupting) Write(p []byte) (int, error) {
	if !c.done && len(p) > 4 && p[0] != '{' { // no configuration
		c.done = true
		p = bytes.Clone(p)
		p[4] ^= 1
	}
	return c.ResponseWriter.Write(p)
}

type imageChange func(v1.Image) (v1.Image, error)

// push makes an image of layers, tars or whatever else, and returns it by digest.
func (r *testRegistry) push(tag string, layers [][]byte, changes ...imageChange) string {
	r.t.Helper()
	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	for _, layer := range layers {
		var err error
		image, err = mutate.AppendLayers(image, static.NewLayer(layer, types.OCILayer))
		must(r.t, err)
	}
	config, err := image.ConfigFile()
	must(r.t, err)
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Env = []string{"PATH=/app/bin:/usr/bin:/bin", "APP=1", "HOME=/root", "https_proxy=http://x", "bad name=x", "LINES=a\nb"}
	image, err = mutate.ConfigFile(image, config)
	must(r.t, err)
	for _, change := range changes {
		image, err = change(image)
		must(r.t, err)
	}
	ref, err := name.ParseReference(r.address + "/test/" + tag)
	must(r.t, err)
	must(r.t, remote.Write(ref, image))
	digest, err := image.Digest()
	must(r.t, err)
	return ref.Context().Name() + "@" + digest.String()
}

func content(t *testing.T, root Root, name string) string {
	t.Helper()
	for _, bind := range root.Binds {
		if rest, ok := strings.CutPrefix(name, bind.Guest); ok {
			data, err := os.ReadFile(bind.Host + rest)
			if err != nil {
				return err.Error()
			}
			return string(data)
		}
	}
	return "not there"
}

func TestOCI(t *testing.T) {
	s, r, ctx := testStore(t), newRegistry(t), context.Background()
	ref := r.push("app:1", [][]byte{
		gzipped(t, tarOf(t, map[string]string{"usr/bin/sh": "#!", "usr/old": "old", "bin": "-> usr/bin", "etc/passwd": "root:x:0:0::/:/bin/sh\n"})),
		gzipped(t, tarOf(t, map[string]string{"usr/bin/app": "app", "usr/.wh.old": ""})),
	})
	image := nucleus.Image{Kind: nucleus.ImageOCI, Ref: ref}
	root, err := s.Resolve(ctx, image, "/", nil)
	must(t, err)
	if content(t, root, "/usr/bin/app") != "app" || !strings.Contains(content(t, root, "/usr/old"), "no such file") || !isDigest(root.Digest) {
		t.Errorf("%+v", root)
	}
	if want := map[string]string{"PATH": "/app/bin:/usr/bin:/bin", "APP": "1"}; !maps.Equal(root.Env, want) {
		t.Errorf("env %v, want %v", root.Env, want)
	}
	disk, err := s.Root(ctx, image, "/", nil)
	must(t, err)
	asked := r.asked.Load()
	for range 2 {
		again, err := s.Root(ctx, image, "/", nil)
		if err != nil || again.Digest != disk.Digest || again.Env["APP"] != "1" {
			t.Errorf("%+v, %v", again, err)
		}
		if _, err := s.Resolve(ctx, image, "/", nil); err != nil {
			t.Error(err)
		}
	}
	if r.asked.Load() != asked {
		t.Errorf("the registry was asked %d times for what was there", r.asked.Load()-asked)
	}
	// Another store, at another time, gives the same bytes.
	other, err := testStore(t).Root(ctx, image, "/", nil)
	if err != nil || other.Digest != disk.Digest {
		t.Errorf("%s and %s, %v", other.Digest, disk.Digest, err)
	}
}

// Of an image for several machines that for this one is taken.
func TestOCIIndex(t *testing.T) {
	r := newRegistry(t)
	var index v1.ImageIndex = empty.Index
	for _, arch := range []string{"arm64", "amd64", "s390x"} {
		parsed, err := name.ParseReference(r.push(arch+":1", [][]byte{tarOf(t, map[string]string{"usr/arch": arch})}, func(image v1.Image) (v1.Image, error) {
			config, err := image.ConfigFile()
			if err != nil {
				return nil, err
			}
			config = config.DeepCopy()
			config.Architecture = arch
			return mutate.ConfigFile(image, config)
		}))
		must(t, err)
		image, err := remote.Image(parsed)
		must(t, err)
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	ref, err := name.ParseReference(r.address + "/test/all:1")
	must(t, err)
	must(t, remote.WriteIndex(ref, index))
	root, err := testStore(t).Resolve(context.Background(), nucleus.Image{Kind: nucleus.ImageOCI, Ref: ref.Name()}, "/", nil)
	if err != nil || content(t, root, "/usr/arch") != "amd64" {
		t.Errorf("%+v, %v", root.Binds, err)
	}
}

// A tag is resolved once, until somebody asks for it anew.
func TestTag(t *testing.T) {
	s, r, ctx := testStore(t), newRegistry(t), context.Background()
	image := nucleus.Image{Kind: nucleus.ImageOCI, Ref: r.address + "/test/app:1"}
	r.push("app:1", [][]byte{tarOf(t, map[string]string{"usr/x": "one"})})
	read := func() string {
		t.Helper()
		root, err := s.Resolve(ctx, image, "/", nil)
		must(t, err)
		recorded, err := s.Unpacked(image)
		if err != nil || recorded != root.Digest {
			t.Errorf("recorded %s, resolved %s, %v", recorded, root.Digest, err)
		}
		return content(t, root, "/usr/x")
	}
	if got := read(); got != "one" {
		t.Errorf("first %q", got)
	}
	r.push("app:1", [][]byte{tarOf(t, map[string]string{"usr/x": "two"})})
	if got := read(); got != "one" {
		t.Errorf("the tag moved by itself: %q", got)
	}
	_, err := s.Renew(ctx, image, nil)
	must(t, err)
	if got := read(); got != "two" {
		t.Errorf("after Renew %q", got)
	}
	r.corrupt.Store(true)
	r.push("app:1", [][]byte{tarOf(t, map[string]string{"usr/x": "three"})})
	if _, err := s.Renew(ctx, image, nil); err == nil {
		t.Error("a corrupt image was taken")
	}
	if got := read(); got != "two" {
		t.Errorf("after a Renew that failed %q", got)
	}
}

func TestOCIRefuses(t *testing.T) {
	r := newRegistry(t)
	good := gzipped(t, tarOf(t, map[string]string{"usr/x": "x"}))
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("another place was asked") }))
	t.Cleanup(elsewhere.Close)
	changeConfig := func(change func(*v1.ConfigFile)) imageChange {
		return func(image v1.Image) (v1.Image, error) {
			config, err := image.ConfigFile()
			if err != nil {
				return nil, err
			}
			config = config.DeepCopy()
			change(config)
			return mutate.ConfigFile(image, config)
		}
	}
	refs := map[string]string{
		"another machine":  r.push("arm:1", [][]byte{good}, changeConfig(func(c *v1.ConfigFile) { c.Architecture = "arm64" })),
		"another system":   r.push("windows:1", [][]byte{good}, changeConfig(func(c *v1.ConfigFile) { c.OS = "windows" })),
		"no layers":        r.push("none:1", nil),
		"too many layers":  doctored(t, r, "many", func(m *v1.Manifest) { m.Layers = slices.Repeat(m.Layers, 501) }),
		"no root":          r.push("empty:1", [][]byte{tarOf(t, map[string]string{"file": "x"})}),
		"no tar":           r.push("text:1", [][]byte{bytes.Repeat([]byte("text"), 1000)}),
		"upwards":          r.push("up:1", [][]byte{gzipped(t, tarOf(t, map[string]string{"usr/x": "x", "../../../../x": "x"}))}),
		"a bomb":           r.push("bomb:1", [][]byte{gzipped(t, tarOf(t, map[string]string{"usr/x": strings.Repeat("\x00", 2<<20)}))}),
		"a large config":   r.push("config:1", [][]byte{good}, changeConfig(func(c *v1.ConfigFile) { c.Author = strings.Repeat("x", 5<<20) })),
		"not there":        r.address + "/test/missing:1",
		"another's digest": r.address + "/test/app@sha256:" + strings.Repeat("0", 64),
		"no such registry": "127.0.0.1:1/test/app:1",
		"a foreign layer":  doctored(t, r, "foreign", func(m *v1.Manifest) { m.Layers[0].URLs = []string{elsewhere.URL + "/layer"} }),
	}
	old := unpackLimits
	unpackLimits = unpack.Limits{Bytes: 1 << 20, Entries: 1000}
	defer func() { unpackLimits = old }()
	for name, ref := range refs {
		s := testStore(t)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		if root, err := s.Resolve(ctx, nucleus.Image{Kind: nucleus.ImageOCI, Ref: ref}, "/", nil); err == nil {
			t.Errorf("%s: taken: %+v", name, root)
		} else if strings.Contains(err.Error(), "panic") {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		nothingLeft(t, s, name)
	}
	r.corrupt.Store(true)
	s := testStore(t)
	if _, err := s.Resolve(context.Background(), nucleus.Image{Kind: nucleus.ImageOCI, Ref: r.push("app:1", [][]byte{good})}, "/", nil); err == nil {
		t.Error("a changed layer was taken")
	}
	nothingLeft(t, s, "a changed layer")
	r.corrupt.Store(false)
	if _, err := testStore(t).Resolve(context.Background(), nucleus.Image{Kind: nucleus.ImageOCI, Ref: r.push("app:1", [][]byte{good})}, "/", nil); err != nil {
		t.Errorf("control: %v", err)
	}
}

// doctored pushes a manifest that was changed.
func doctored(t *testing.T, r *testRegistry, repository string, change func(*v1.Manifest)) string {
	t.Helper()
	ref := r.push(repository+":1", [][]byte{gzipped(t, tarOf(t, map[string]string{"usr/x": "x"}))})
	parsed, err := name.ParseReference(ref)
	must(t, err)
	image, err := remote.Image(parsed)
	must(t, err)
	manifest, err := image.Manifest()
	must(t, err)
	manifest = manifest.DeepCopy()
	change(manifest)
	raw, err := json.Marshal(manifest)
	must(t, err)
	q, err := http.NewRequest(http.MethodPut, "http://"+r.address+"/v2/test/"+repository+"/manifests/2", bytes.NewReader(raw))
	must(t, err)
	q.Header.Set("Content-Type", string(types.OCIManifestSchema1))
	answer, err := http.DefaultClient.Do(q)
	must(t, err)
	answer.Body.Close()
	if answer.StatusCode != http.StatusCreated {
		t.Fatal(answer.Status)
	}
	return r.address + "/test/" + repository + ":2"
}

// nothingLeft fails where a build that failed has left anything but locks.
func nothingLeft(t *testing.T, s *Store, what string) {
	t.Helper()
	for _, dir := range []string{s.objects(), s.inputs(), s.unfinished()} {
		entries, err := os.ReadDir(dir)
		must(t, err)
		for _, entry := range entries {
			t.Errorf("%s: left is %s", what, filepath.Join(dir, entry.Name()))
		}
	}
}

func TestTarball(t *testing.T) {
	s, ctx, dir := testStore(t), context.Background(), t.TempDir()
	file := filepath.Join(dir, "root.tar.gz")
	plain := tarOf(t, map[string]string{"usr/bin/sh": "#!", "bin": "-> usr/bin", "etc/conf": "c", ".wh.usr": "no whiteout", "etc/passwd": "root:x:0:0::/:/bin/sh\napp:x:77:77::/:/bin/sh\n"})
	must(t, os.WriteFile(file, gzipped(t, plain), 0o600))
	image := nucleus.Image{Kind: nucleus.ImageTarball, Path: file}
	root, err := s.Resolve(ctx, image, "/", nil)
	must(t, err)
	if content(t, root, "/usr/bin/sh") != "#!" || string(root.Files["/etc/conf"]) != "c" || !strings.Contains(string(root.Files["/etc/passwd"]), "app:x:77") {
		t.Errorf("%+v", root)
	}
	// The same content, packed otherwise and unpacked by a person who shares nothing: the same tree.
	must(t, os.WriteFile(dir+"/again.tar", plain, 0o600))
	defer unix.Umask(unix.Umask(0o077))
	again, err := s.Resolve(ctx, nucleus.Image{Kind: nucleus.ImageTarball, Path: dir + "/again.tar"}, "/", nil)
	if err != nil || again.Digest != root.Digest {
		t.Errorf("%s and %s, %v", again.Digest, root.Digest, err)
	}
	must(t, os.WriteFile(file, gzipped(t, tarOf(t, map[string]string{"usr/bin/sh": "other"})), 0o600))
	changed, err := s.Resolve(ctx, image, "/", nil)
	if err != nil || changed.Digest == root.Digest {
		t.Errorf("a changed tarball: %s, %v", changed.Digest, err)
	}
	for name, bad := range map[string]string{"missing": dir + "/none", "a directory": dir, "no archive": dir + "/text", "empty": dir + "/empty", "cut off": dir + "/cut", "its sum cut off": dir + "/sum", "a wrong sum": dir + "/wrong", "behind it too much": dir + "/behind"} {
		must(t, os.WriteFile(dir+"/text", bytes.Repeat([]byte("text"), 1000), 0o600))
		must(t, os.WriteFile(dir+"/empty", nil, 0o600))
		packed := gzipped(t, plain)
		must(t, os.WriteFile(dir+"/cut", packed[:100], 0o600))
		must(t, os.WriteFile(dir+"/sum", packed[:len(packed)-8], 0o600))
		packed[len(packed)-6] ^= 1
		must(t, os.WriteFile(dir+"/wrong", packed, 0o600))
		must(t, os.WriteFile(dir+"/behind", gzipped(t, append(plain[:len(plain):len(plain)], make([]byte, 65<<20)...)), 0o600))
		s := testStore(t)
		if root, err := s.Resolve(ctx, nucleus.Image{Kind: nucleus.ImageTarball, Path: bad}, "/", nil); err == nil {
			t.Errorf("%s: %+v", name, root)
		}
		nothingLeft(t, s, name)
	}
}

// A tree that is not as it was unpacked is not shown.
func TestCorruptTree(t *testing.T) {
	file := filepath.Join(t.TempDir(), "root.tar")
	must(t, os.WriteFile(file, tarOf(t, map[string]string{"usr/bin/sh": "#!/bin/x", "usr/y": "y"}), 0o600))
	image := nucleus.Image{Kind: nucleus.ImageTarball, Path: file}
	for name, corrupt := range map[string]func(tree string) error{
		"changed":  func(tree string) error { return os.WriteFile(tree+"/usr/bin/sh", []byte("#!/bin/y"), 0o755) },
		"gone":     func(tree string) error { return os.Remove(tree + "/usr/y") },
		"more":     func(tree string) error { return os.WriteFile(tree+"/usr/z", nil, 0o644) },
		"all gone": os.RemoveAll,
	} {
		s := testStore(t)
		root, err := s.Resolve(context.Background(), image, "/", nil)
		must(t, err)
		must(t, corrupt(filepath.Join(s.object(root.Digest), treeDir)))
		later, err := Open(s.dir) // as the next process
		must(t, err)
		if root, err := later.Resolve(context.Background(), image, "/", nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %+v, %v", name, root, err)
		}
	}
	s := testStore(t)
	root, err := s.Resolve(context.Background(), image, "/", nil)
	must(t, err)
	file = filepath.Join(s.object(root.Digest), treeDir, "usr/y")
	info, err := os.Stat(file)
	must(t, err)
	must(t, errors.Join(os.Remove(file), os.WriteFile(file, []byte("y"), 0o755), os.Chtimes(file, info.ModTime(), info.ModTime())))
	later, err := Open(s.dir)
	must(t, err)
	if _, err := later.Resolve(context.Background(), image, "/", nil); err != nil {
		t.Errorf("control: the same content in another inode: %v", err)
	}
}

func TestResolveChecksTheShape(t *testing.T) {
	for _, image := range []nucleus.Image{{}, {Kind: "vm"}, {Kind: nucleus.ImageOCI}, {Kind: nucleus.ImageDebian, Packages: []string{"-o"}}} {
		if root, err := testStore(t).Resolve(context.Background(), image, "/", nil); err == nil {
			t.Errorf("%+v: %+v", image, root)
		}
	}
	if fmt.Sprint(toolsEnv([]string{"A", "=x", "B=1=2", "NO_PROXY=x", strings.Repeat("n", 200) + "=x", "C=" + strings.Repeat("v", longestValue+1)})) != "map[A: B:1=2]" {
		t.Error("an environment that the tools must not get")
	}
}
