package e2e

import (
	"archive/zip"
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
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

	"cal/internal/testenv"
	"cal/nucleus"
)

// The projects below are built with the caches of the person's host and the network
// closed. What fills the caches is a registry on loopback that is gone by then.

// TestOfflineGo runs the tests of a module that depends on another.
func TestOfflineGo(t *testing.T) {
	t.Parallel()
	e := testenv.New(t)
	need(t, "go")
	proxy := goProxy(t, "example.org/dep", "v1.2.3", map[string]string{
		"go.mod": "module example.org/dep\n\ngo 1.21\n", "dep.go": "package dep\n\n// Answer is it.\nfunc Answer() int { return 42 }\n",
	})
	files := map[string]string{
		"go.mod":      "module example.org/app\n\ngo 1.21\n\nrequire example.org/dep v1.2.3\n",
		"app.go":      "package app\n\nimport \"example.org/dep\"\n\nfunc Twice() int { return 2 * dep.Answer() }\n",
		"app_test.go": "package app\n\nimport \"testing\"\n\nfunc TestTwice(t *testing.T) {\n\tif Twice() != 84 {\n\t\tt.Fatal(Twice())\n\t}\n}\n",
	}
	repo := e.Repo("app", files)
	e.Vars["GOFLAGS"] = "-modcacherw" // so that the test can remove it
	fill := e.Command("go", "mod", "tidy")
	fill.Dir = repo.Dir
	fill.Env = append(fill.Env, "GOPROXY="+proxy.URL, "GONOSUMDB=*", "GONOSUMCHECK=1", "GOFLAGS=-mod=mod -modcacherw", "GONOSUMDB=example.org", "GOTOOLCHAIN=local")
	if out, err := fill.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	proxy.Close()
	repo.Git("add", "-A")
	repo.Git("commit", "--quiet", "-m", "sums")
	// In one machine, so that the standard library is compiled once. Controls: the
	// test can fail, and what is not in the cache fails plainly and at once.
	run := e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c",
		"go test -vet=off ./... && echo FIRST-PASSED; sed -i s/84/85/ app_test.go; go test -vet=off ./... || echo THEN-FAILED; go get example.org/other@v1.0.0")
	run.Want(t, 1, "example.org/app", "FIRST-PASSED", "THEN-FAILED", "GOPROXY=off")
}

func need(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("no %s on this host", program)
	}
}

// goProxy serves one version of one module.
func goProxy(t *testing.T, module, version string, files map[string]string) *httptest.Server {
	t.Helper()
	var archive bytes.Buffer
	w := zip.NewWriter(&archive)
	for name, content := range files {
		f, err := w.Create(module + "@" + version + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	answers := map[string]string{
		"list": version + "\n", version + ".info": `{"Version":"` + version + `","Time":"2026-01-01T00:00:00Z"}`,
		version + ".mod": files["go.mod"], version + ".zip": archive.String(),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, ok := answers[strings.TrimPrefix(r.URL.Path, "/"+module+"/@v/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write([]byte(answer))
	}))
	t.Cleanup(server.Close)
	return server
}

// TestOfflineNpm installs by a lock file from the person's npm cache.
func TestOfflineNpm(t *testing.T) {
	t.Parallel()
	e := testenv.New(t)
	need(t, "npm")
	tarball := npmTarball(t, e, "dep", `{"name":"dep","version":"1.2.3","main":"index.js"}`, "module.exports = () => 42\n")
	repo := e.Repo("app", map[string]string{
		"package.json": `{"name":"app","version":"1.0.0","private":true,"scripts":{"test":"node test.js"},"dependencies":{"dep":"1.2.3"}}`,
		"test.js":      "if (require('dep')() !== 42) process.exit(1)\nconsole.log('PASSED')\n",
		".gitignore":   "node_modules\n",
	})
	registry := npmRegistry(t, "dep", "1.2.3", tarball)
	e.Write(filepath.Join(e.Home, ".npmrc"), "registry="+registry.URL+"/\n//"+strings.TrimPrefix(registry.URL, "http://")+"/:_authToken=canary-npm-token\naudit=false\nfund=false\n")
	fill := e.Command("npm", "install")
	fill.Dir = repo.Dir
	if out, err := fill.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	registry.Close()
	repo.Git("add", "-A")
	repo.Git("commit", "--quiet", "-m", "lock")
	run := e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "npm ci --offline && npm test; env; cat ~/.npmrc").Want(t, 1, "PASSED") // no .npmrc to cat
	if strings.Contains(run.Stdout+run.Stderr, "canary-npm-token") {
		t.Errorf("the registry's token is in the machine\n%v", run)
	}
	e.Cal("run", "--repo", repo.Dir, "--", "npm", "install", "--offline", "no-such-package-here").Want(t, 1, "ENOTCACHED")
}

func npmTarball(t *testing.T, e *testenv.Env, name, manifest, index string) []byte {
	t.Helper()
	dir := filepath.Join(e.Dir, "npm-"+name)
	e.Write(filepath.Join(dir, "package", "package.json"), manifest)
	e.Write(filepath.Join(dir, "package", "index.js"), index)
	out, err := exec.Command("tar", "-C", dir, "-czf", "-", "package").Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// npmRegistry serves one version of one package.
func npmRegistry(t *testing.T, name, version string, tarball []byte) *httptest.Server {
	t.Helper()
	sum := sha512.Sum512(tarball)
	integrity := "sha512-" + base64.StdEncoding.EncodeToString(sum[:])
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/" + name:
			w.Header().Set("Content-Type", "application/json")
			w.Write([]byte(`{"name":"` + name + `","dist-tags":{"latest":"` + version + `"},"versions":{"` + version + `":{"name":"` + name + `","version":"` + version +
				`","main":"index.js","dist":{"shasum":"` + fmt.Sprintf("%x", sha1.Sum(tarball)) + `","integrity":"` + integrity + `","tarball":"` + server.URL + "/" + name + "/-/" + name + ".tgz" + `"}}}}`))
		case "/" + name + "/-/" + name + ".tgz":
			w.Write(tarball)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server
}

// TestOfflinePython makes a venv and installs from the wheels that the person has.
func TestOfflinePython(t *testing.T) {
	t.Parallel()
	e := testenv.New(t)
	python, err := exec.LookPath("/usr/bin/python3")
	if err != nil {
		t.Skip("no /usr/bin/python3 on this host")
	}
	if out, err := exec.Command(python, "-c", "import venv, ensurepip").CombinedOutput(); err != nil {
		t.Skipf("python3 without venv: %s", out)
	}
	wheels := filepath.Join(e.Dir, "wheels")
	wheel(t, wheels)
	e.Vars["PIP_FIND_LINKS"] = wheels
	e.Vars["PATH"] = "/usr/local/bin:/usr/bin:/bin"
	repo := e.Repo("app", map[string]string{
		"requirements.txt": "dep==1.2.3\n", "test_app.py": "import dep\nassert dep.answer() == 42\nprint('PASSED')\n", ".gitignore": "venv\n",
	})
	if err := os.Chmod(e.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "python3 -m venv venv && venv/bin/pip install -q -r requirements.txt && venv/bin/python test_app.py").Want(t, 0, "PASSED")
	e.Cal("run", "--repo", repo.Dir, "--", "venv/bin/pip", "install", "no-such-package-here").Want(t, 1, "No matching distribution")
}

// wheel writes a package as pip installs it.
func wheel(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "dep-1.2.3-py3-none-any.whl"))
	if err != nil {
		t.Fatal(err)
	}
	w := zip.NewWriter(f)
	for name, content := range map[string]string{
		"dep.py":                       "def answer():\n    return 42\n",
		"dep-1.2.3.dist-info/WHEEL":    "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
		"dep-1.2.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: dep\nVersion: 1.2.3\n",
		"dep-1.2.3.dist-info/RECORD":   "dep.py,,\ndep-1.2.3.dist-info/WHEEL,,\ndep-1.2.3.dist-info/METADATA,,\ndep-1.2.3.dist-info/RECORD,,\n",
	} {
		part, err := w.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := part.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOfflineCargo builds and tests a crate that depends on another, with the real cargo.
func TestOfflineCargo(t *testing.T) {
	t.Parallel()
	e := testenv.New(t)
	need(t, "cargo")
	need(t, "cc")
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	e.Vars["RUSTUP_HOME"] = home + "/.rustup" // the toolchain; all else of cargo's is the test's own
	if set := os.Getenv("RUSTUP_HOME"); set != "" {
		e.Vars["RUSTUP_HOME"] = set
	}
	registry := crateRegistry(t, e)
	repo := e.Repo("app", map[string]string{
		"Cargo.toml":         "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\n\n[dependencies]\ndemo = \"1.2.3\"\n",
		"src/lib.rs":         "#[test]\nfn answer() {\n    assert_eq!(demo::answer(), 42);\n}\n",
		".cargo/config.toml": "[source.crates-io]\nreplace-with = \"here\"\n[source.here]\nregistry = \"sparse+" + registry.URL + "/\"\n",
		".gitignore":         "target\n",
	})
	e.Write(filepath.Join(e.Home, ".cargo", "credentials.toml"), "[registry]\ntoken = \"canary-cargo-token\"\n")
	fill := e.Command("cargo", "fetch")
	fill.Dir = repo.Dir
	if out, err := fill.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	registry.Close()
	repo.Git("add", "-A")
	repo.Git("commit", "--quiet", "-m", "lock")
	run := e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "cargo test --locked && echo TESTS-PASSED; cat $CARGO_HOME/credentials.toml; cargo add no-such-crate-here").Want(t, 101, "TESTS-PASSED", "no-such-crate-here` could not be found")
	if strings.Contains(run.Stdout+run.Stderr, "canary-cargo-token") {
		t.Errorf("the registry's token is in the machine\n%v", run)
	}
	// Control: what the layers' settings do not say does not work.
	e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "unset CARGO_HOME; CARGO_NET_OFFLINE=true cargo test --locked").Want(t, 101, "offline")
}

// crateRegistry is a sparse registry that holds one crate.
func crateRegistry(t *testing.T, e *testenv.Env) *httptest.Server {
	t.Helper()
	dir := filepath.Join(e.Dir, "crate")
	e.Write(filepath.Join(dir, "demo-1.2.3", "Cargo.toml"), "[package]\nname = \"demo\"\nversion = \"1.2.3\"\nedition = \"2021\"\n")
	e.Write(filepath.Join(dir, "demo-1.2.3", "src", "lib.rs"), "pub fn answer() -> i32 {\n    42\n}\n")
	crate, err := exec.Command("tar", "-C", dir, "-czf", "-", "demo-1.2.3").Output()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(crate)
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/config.json":
			fmt.Fprintf(w, `{"dl": "%s/dl"}`, server.URL)
		case "/de/mo/demo":
			fmt.Fprintf(w, `{"name":"demo","vers":"1.2.3","deps":[],"cksum":"%x","features":{},"yanked":false}`+"\n", sum)
		case "/dl/demo/1.2.3/download":
			w.Write(crate)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server
}

// TestOfflineYarn installs with both kinds of yarn, from the caches that they filled.
func TestOfflineYarn(t *testing.T) {
	t.Parallel()
	for name, kind := range map[string]struct {
		program, config, file, install, lock string
	}{
		"classic": {"yarn", ".yarnrc", "registry \"URL\"\n", "bin/yarn.js install --frozen-lockfile", ""},
		"modern pnp": {"@yarnpkg/cli-dist", ".yarnrc.yml", "npmRegistryServer: URL\nunsafeHttpWhitelist: [127.0.0.1]\nnodeLinker: node-modules\nnpmMinimalAgeGate: 0\n",
			"bin/yarn.js install --immutable", "__metadata:\n  version: 8\n  cacheKey: 10c0\n"},
		"modern node-modules": {"@yarnpkg/cli-dist", ".yarnrc.yml", "npmRegistryServer: URL\nunsafeHttpWhitelist: [127.0.0.1]\nnodeLinker: node-modules\nnpmMinimalAgeGate: 0\n",
			"bin/yarn.js install --immutable", "__metadata:\n  version: 8\n  cacheKey: 10c0\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := testenv.New(t)
			need(t, "node")
			yarn := e.Package(kind.program)
			tarball := npmTarball(t, e, "dep", `{"name":"dep","version":"1.2.3","main":"index.js"}`, "module.exports = () => 42\n")
			registry := npmRegistry(t, "dep", "1.2.3", tarball)
			repo := e.Repo("app", map[string]string{
				"package.json": `{"name":"app","version":"1.0.0","private":true,"dependencies":{"dep":"1.2.3"}}`, "yarn.lock": kind.lock,
				"test.js": "if (require('dep')() !== 42) process.exit(1)\nconsole.log('PASSED')\n", ".gitignore": "node_modules\n.yarn/install-state.gz\n",
				kind.config: strings.ReplaceAll(kind.file, "URL", registry.URL),
			})
			if out, err := exec.Command("cp", "-r", yarn, filepath.Join(repo.Dir, "yarn")).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			e.Vars["YARN_CACHE_FOLDER"] = filepath.Join(e.Home, ".cache", "yarn") // of root it lies elsewhere
			e.Write(filepath.Join(e.Home, kind.config), "# canary-yarn-token\n")
			fill := e.Command("node", filepath.Join(repo.Dir, "yarn", "bin", "yarn.js"), "install")
			fill.Dir = repo.Dir
			if out, err := fill.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			registry.Close()
			repo.Git("add", "-Af", "yarn")
			repo.Git("add", "-A")
			repo.Git("commit", "--quiet", "-m", "lock")
			run := e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "node yarn/"+kind.install+" && node yarn/bin/yarn.js node test.js; cat ~/"+kind.config).Want(t, 1, "PASSED")
			if strings.Contains(run.Stdout+run.Stderr, "canary-yarn-token") {
				t.Errorf("the person's settings are in the machine\n%v", run)
			}
			e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "unset YARN_CACHE_FOLDER YARN_GLOBAL_FOLDER; rm -rf node_modules; timeout 20 node yarn/"+kind.install+" || echo CONTROL-FAILED").Want(t, 0, "CONTROL-FAILED")
		})
	}
}

// TestOfflineByPolicy: a policy that names the registry is taken at its word: the
// package manager asks it, and the refusal is the gateway's.
func TestOfflineByPolicy(t *testing.T) {
	t.Parallel()
	e := testenv.New(t)
	need(t, "npm")
	e.Write(filepath.Join(e.Home, ".npm", "_cacache", "index-v5", "x"), "")
	e.Write(filepath.Join(e.CAL, "policies", "net.yaml"), "name: net\noperations: {run_bash: always, net_connect: always}\nhosts: {only: [{host: registry.npmjs.org, port: 443}]}\n")
	install := []string{"sh", "-c", "echo cache $npm_config_cache; npm view no-such-package-here --fetch-retries 0; true"}
	e.Cal(append([]string{"run", "--"}, install...)...).Want(t, 0, "cache /opt/caches/npm")
	r := e.Cal(append([]string{"run", "--policy", "net", "--"}, install...)...).Want(t, 0)
	if strings.Contains(r.Stdout, "/opt/caches") {
		t.Errorf("set to work offline\n%v", r)
	}
	asked := e.Entries(func(entry nucleus.Entry) bool {
		return entry.Op == nucleus.NetConnect && strings.Contains(string(entry.Args), "registry.npmjs.org") && entry.Rule == "trifecta"
	})
	if len(asked) == 0 {
		t.Error("the log holds no connection to the registry that was judged")
	}
}
