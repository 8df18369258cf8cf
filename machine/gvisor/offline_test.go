package gvisor

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cal/image"
	"cal/machine"
	"cal/machine/machinetest"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// TestOffline fills a person's caches on the host and uses them in a machine,
// which has no network.
func TestOffline(t *testing.T) {
	t.Parallel()
	h := host(t)
	spec := h.Spec(t)
	base, err := os.MkdirTemp(h.Scratch, "home")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(base) })
	must(t, os.Chmod(base, 0o755))
	env := map[string]string{"PATH": os.Getenv("PATH"), "GOMODCACHE": filepath.Join(base, "mod"), "GOFLAGS": "-modcacherw"}
	projects := map[string]func(*testing.T, string, string, map[string]string) bool{"go": fillGo, "npm": fillNpm, "pip": fillPip}
	ready := map[string]bool{}
	for name, fill := range projects {
		must(t, os.Mkdir(filepath.Join(spec.Workspace, name), 0o755))
		ready[name] = fill(t, base, filepath.Join(spec.Workspace, name), env)
	}
	found, err := image.Find(t.Context(), image.Person{Home: base, Env: env, Scratch: base})
	must(t, err)
	t.Logf("layers %v, notes %q", found.Layers, found.Notes)
	spec.Image.Layers = found.Layers
	m, guest := h.Create(t, spec)
	for name, command := range map[string]string{
		"go":  "go mod verify && go list -deps . >/dev/null && go list -m all",
		"npm": "npm ci && node -e 'console.log(require(\"demo-left\"))'",
		"pip": "python3 -m pip install --no-deps --break-system-packages --target /tmp/site demo && PYTHONPATH=/tmp/site python3 -c 'import demo; print(demo.x)'",
	} {
		t.Run(name, func(t *testing.T) {
			if !ready[name] {
				t.Skipf("%s is not on this host", name)
			}
			if output := inside(guest, m, name, found.Env, command); !strings.Contains(output, map[string]string{"go": "example.test/dep v1.0.0", "npm": "left it is", "pip": "42"}[name]) {
				t.Errorf("%s", output)
			}
			// Control: without what Find says the same fails, for there is no network.
			bare := map[string]string{"PATH": found.Env["PATH"], "npm_config_fetch_retries": "0", "PIP_RETRIES": "0"}
			first, _, _ := strings.Cut(strings.ReplaceAll(command, "verify", "download"), " &&")
			if output := inside(guest, m, name, bare, "rm -rf node_modules /tmp/site; "+first+" || echo FAILED"); !strings.Contains(output, "FAILED") {
				t.Errorf("without the layers' settings: %s", output)
			}
		})
	}
}

func inside(guest *machinetest.Guest, m machine.Machine, dir string, env map[string]string, command string) string {
	args := []string{"/usr/bin/env", "-i", "HOME=" + nucleus.MachineHome}
	for name, value := range env {
		args = append(args, name+"="+value)
	}
	reply := guest.Try(script.Action{Do: "run", Path: nucleus.MachineWorkspace + "/" + dir, Args: append(args, "sh", "-c", command), UID: m.Facts().ToolsUID})
	return reply.Data + reply.Err
}

func onHost(t *testing.T, dir string, env map[string]string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, output)
	}
}

// fillGo serves one module from a directory, as a proxy would.
func fillGo(t *testing.T, base, project string, env map[string]string) bool {
	if _, err := exec.LookPath("go"); err != nil {
		return false
	}
	var archive bytes.Buffer
	zipped := zip.NewWriter(&archive)
	for name, text := range map[string]string{"go.mod": "module example.test/dep\n", "dep.go": "package dep\n\nconst X = 1\n"} {
		member, err := zipped.Create("example.test/dep@v1.0.0/" + name)
		must(t, err)
		fmt.Fprint(member, text)
	}
	must(t, zipped.Close())
	proxy := filepath.Join(base, "proxy", "example.test/dep/@v")
	must(t, os.MkdirAll(proxy, 0o755))
	for name, text := range map[string]string{"list": "v1.0.0\n", "v1.0.0.info": `{"Version":"v1.0.0"}`, "v1.0.0.mod": "module example.test/dep\n", "v1.0.0.zip": archive.String()} {
		must(t, os.WriteFile(filepath.Join(proxy, name), []byte(text), 0o644))
	}
	must(t, os.WriteFile(filepath.Join(project, "go.mod"), []byte("module p\n\ngo 1.20\n\nrequire example.test/dep v1.0.0\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(project, "p.go"), []byte("package p\n\nimport _ \"example.test/dep\"\n"), 0o644))
	with := map[string]string{"GOPROXY": "file://" + base + "/proxy", "GONOSUMDB": "*", "GOFLAGS": "-mod=mod -modcacherw", "HOME": base, "GOCACHE": base + "/gocache", "GOTOOLCHAIN": "local"}
	for _, name := range []string{"PATH", "GOMODCACHE"} {
		with[name] = env[name]
	}
	onHost(t, project, with, "go", "list", "-deps", ".")
	return true
}

// fillNpm serves one package from a registry on loopback.
func fillNpm(t *testing.T, base, project string, env map[string]string) bool {
	if _, err := exec.LookPath("npm"); err != nil {
		return false
	}
	var pack bytes.Buffer
	zipped := gzip.NewWriter(&pack)
	archive := tar.NewWriter(zipped)
	for name, text := range map[string]string{"package/package.json": `{"name":"demo-left","version":"1.0.0"}`, "package/index.js": "module.exports = 'left it is'\n"} {
		must(t, archive.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}))
		fmt.Fprint(archive, text)
	}
	must(t, archive.Close())
	must(t, zipped.Close())
	sum := sha512.Sum512(pack.Bytes())
	var registry *httptest.Server
	registry = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".tgz") {
			w.Write(pack.Bytes())
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"name":"demo-left","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"demo-left","version":"1.0.0","dist":{"tarball":"%s/demo-left/-/demo-left-1.0.0.tgz","integrity":"sha512-%s"}}}}`,
			registry.URL, base64.StdEncoding.EncodeToString(sum[:]))
	}))
	defer registry.Close()
	must(t, os.WriteFile(filepath.Join(base, ".npmrc"), []byte("registry="+registry.URL+"/\nomit-lockfile-registry-resolved=false\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(project, "package.json"), []byte(`{"name":"p","version":"1.0.0","dependencies":{"demo-left":"1.0.0"}}`), 0o644))
	onHost(t, project, map[string]string{"PATH": env["PATH"], "HOME": base, "npm_config_audit": "false", "npm_config_update_notifier": "false"}, "npm", "install", "--no-fund")
	must(t, os.RemoveAll(filepath.Join(project, "node_modules")))
	return true
}

// fillPip puts a response into the cache as pip does.
func fillPip(t *testing.T, base, _ string, _ map[string]string) bool {
	if exec.Command("/usr/bin/python3", "-m", "pip", "--version").Run() != nil {
		return false
	}
	var wheel bytes.Buffer
	zipped := zip.NewWriter(&wheel)
	for name, text := range map[string]string{
		"demo.py": "x = 42\n", "demo-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
		"demo-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "demo-1.0.dist-info/RECORD": "demo.py,,\n",
	} {
		member, err := zipped.Create(name)
		must(t, err)
		fmt.Fprint(member, text)
	}
	must(t, zipped.Close())
	cache := filepath.Join(base, ".cache/pip/http-v2/a")
	must(t, os.MkdirAll(cache, 0o700))
	must(t, os.WriteFile(filepath.Join(cache, "0123.body"), wheel.Bytes(), 0o600))
	return true
}
