package image

import (
	"archive/zip"
	"bytes"
	"context"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// plant makes files below dir; a name that ends in "/" is a directory, content
// that begins with "-> " a link, with "#!" a program.
func plant(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path, content := filepath.Join(dir, name), files[name]
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		switch target, link := strings.CutPrefix(content, "-> "); {
		case strings.HasSuffix(name, "/"):
			must(t, os.MkdirAll(path, 0o755))
		case link:
			must(t, os.Symlink(target, path))
		case strings.HasPrefix(content, "#!"):
			must(t, os.WriteFile(path, []byte(content), 0o755))
		default:
			must(t, os.WriteFile(path, []byte(content), 0o644))
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func find(t *testing.T, person Person) Found {
	t.Helper()
	found, err := Find(context.Background(), person)
	must(t, err)
	return found
}

// homeDir returns a home that everybody may enter, as its layers must be.
func homeDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "cal-home-")
	must(t, err)
	// `go env` starts a child that writes to the home a moment after it has ended.
	t.Cleanup(func() {
		deadline := time.Now().Add(5 * time.Second)
		for os.RemoveAll(dir) != nil && time.Now().Before(deadline) {
			runtime.Gosched()
		}
	})
	dir, err = filepath.EvalSymlinks(dir)
	must(t, err)
	must(t, os.Chmod(dir, 0o755))
	return dir
}

func TestFind(t *testing.T) {
	for _, test := range []struct {
		name   string
		files  map[string]string
		env    map[string]string // HOME is replaced
		layers map[string]string // guest -> host below HOME
		want   map[string]string // of Env; "" means absent
		path   string            // begins with
		note   string
	}{
		{name: "nothing there"},
		{
			name: "credentials beside a cache stay behind",
			files: map[string]string{
				".cargo/credentials.toml": "secret", ".cargo/registry/index/x": "", ".npmrc": "registry=https://me:secret@npm.example/r/\n//npm.example/:_authToken=secret\n",
				".npm/_cacache/index-v5/a": "", ".npm/_logs/debug.log": "secret", ".netrc": "secret",
			},
			layers: map[string]string{"/opt/caches/cargo/registry": ".cargo/registry", "/opt/caches/npm/_cacache": ".npm/_cacache"},
			want: map[string]string{
				"CARGO_HOME": "/opt/caches/cargo", "CARGO_NET_OFFLINE": "true", "npm_config_cache": "/opt/caches/npm",
				"npm_config_registry": "https://npm.example/r/", "npm_config_prefer_offline": "true", "GOMODCACHE": "",
			},
		},
		{
			name:  "a cache that holds a credential",
			files: map[string]string{".npm/_cacache/.npmrc": "secret"},
			note:  "holds .npmrc",
		},
		{
			name:  "a variable that names the home",
			files: map[string]string{"versions/v1/bin/node": "#!"},
			env:   map[string]string{"FNM_MULTISHELL_PATH": "HOME"},
			note:  "holds the home directory",
		},
		{
			name:  "a variable that names what is above the home",
			env:   map[string]string{"FNM_MULTISHELL_PATH": "HOME/.."},
			files: map[string]string{"x": ""},
			note:  "node (fnm)",
		},
		{
			name: "a version that is a path",
			files: map[string]string{
				".pyenv/version": "../../.ssh\n", ".ssh/id": "secret", ".pyenv/versions/3.9.1/bin/python": "#!", ".pyenv/versions/3.12.1/bin/python": "#!",
				".tool-versions": "ruby ../../../.ssh\n", ".asdf/installs/ruby/3.3.0/bin/ruby": "#!",
			},
			layers: map[string]string{"/opt/toolchains/python": ".pyenv/versions/3.12.1", "/opt/toolchains/asdf-ruby": ".asdf/installs/ruby/3.3.0"},
			path:   "/opt/toolchains/python/bin:/opt/toolchains/asdf-ruby/bin:",
		},
		{
			name: "nvm: alias of an alias, beginning of a version",
			files: map[string]string{
				".nvm/alias/default": "lts/*\n", ".nvm/alias/lts/*": "lts/iron\n", ".nvm/alias/lts/iron": "v20.9\n",
				".nvm/versions/node/v20.9.0/bin/node": "#!", ".nvm/versions/node/v20.10.0/bin/node": "#!", ".nvm/versions/node/v22.0.0/bin/node": "#!",
			},
			layers: map[string]string{"/opt/toolchains/node": ".nvm/versions/node/v20.9.0"},
			path:   "/opt/toolchains/node/bin:",
		},
		{
			name:   "nvm: what is on PATH comes first",
			files:  map[string]string{".nvm/alias/default": "22", ".nvm/versions/node/v20.9.0/bin/node": "#!", ".nvm/versions/node/v22.0.0/bin/node": "#!"},
			env:    map[string]string{"PATH": "HOME/.nvm/versions/node/v20.9.0/bin:/usr/bin"},
			layers: map[string]string{"/opt/toolchains/node": ".nvm/versions/node/v20.9.0"},
		},
		{
			name:   "nvm: aliases in a circle",
			files:  map[string]string{".nvm/alias/default": "a", ".nvm/alias/a": "default", ".nvm/versions/node/v9.0.0/bin/node": "#!", ".nvm/versions/node/v10.0.0/bin/node": "#!"},
			layers: map[string]string{"/opt/toolchains/node": ".nvm/versions/node/v10.0.0"},
		},
		{
			name:   "fnm",
			files:  map[string]string{".local/share/fnm/node-versions/v21.1.0/installation/bin/node": "#!", ".local/share/fnm/aliases/default": "-> ../node-versions/v21.1.0/installation"},
			layers: map[string]string{"/opt/toolchains/node": ".local/share/fnm/node-versions/v21.1.0/installation"},
		},
		{
			name: "mise, and asdf's Go",
			files: map[string]string{
				".local/share/mise/installs/python/3.13.0/bin/python3": "#!", ".local/share/mise/installs/python/3.9.0/bin/python3": "#!", ".local/share/mise/installs/python/latest": "-> 3.13.0",
				".asdf/installs/golang/1.25.0/go/bin/go": "#!", ".asdf/installs/golang/1.26.0/go/bin/go": "#!", ".tool-versions": "# tools\ngolang 1.25.0\n",
			},
			layers: map[string]string{"/opt/toolchains/mise-python": ".local/share/mise/installs/python/3.13.0", "/opt/toolchains/asdf-golang": ".asdf/installs/golang/1.25.0/go"},
		},
		{
			name: "rustup",
			files: map[string]string{
				".rustup/settings.toml": "version = \"12\"\ndefault_toolchain = \"1.90-x86_64-unknown-linux-gnu\"\n",
				".rustup/toolchains/1.90-x86_64-unknown-linux-gnu/bin/cargo": "#!", ".rustup/toolchains/nightly/bin/cargo": "#!",
			},
			layers: map[string]string{"/opt/toolchains/rust": ".rustup/toolchains/1.90-x86_64-unknown-linux-gnu"},
		},
		{
			name:  "PATH keeps the host image's directories, in order, and nothing of the home",
			files: map[string]string{"bin/evil": "#!"},
			env:   map[string]string{"PATH": "HOME/bin:/usr/games:.:/usr/bin:/sbin/../usr/local/go/bin:/opt/x:/etc"},
			want:  map[string]string{"PATH": "/usr/games:/usr/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin:/bin"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			home := homeDir(t)
			plant(t, home, test.files)
			env := map[string]string{}
			for name, value := range test.env {
				env[name] = strings.ReplaceAll(value, "HOME", home)
			}
			found := find(t, Person{Home: home, Env: env})
			want := map[string]string{}
			for guest, host := range test.layers {
				want[guest] = filepath.Join(home, host)
			}
			got := map[string]string{}
			for _, layer := range found.Layers {
				got[layer.Guest] = layer.Host
			}
			if !maps.Equal(got, want) {
				t.Errorf("layers %v, want %v", got, want)
			}
			for name, value := range test.want {
				if found.Env[name] != value {
					t.Errorf("%s=%q, want %q", name, found.Env[name], value)
				}
			}
			if !strings.HasPrefix(found.Env["PATH"], test.path) {
				t.Errorf("PATH=%q, want %s...", found.Env["PATH"], test.path)
			}
			if !strings.Contains(strings.Join(found.Notes, "\n"), test.note) {
				t.Errorf("notes %q, want %q", found.Notes, test.note)
			}
			for name, value := range found.Env {
				if strings.Contains(value, "secret") {
					t.Errorf("%s=%q", name, value)
				}
			}
		})
	}
}

func TestFindLeavesOutPrivateDirectories(t *testing.T) {
	home := homeDir(t)
	plant(t, home, map[string]string{".npm/_cacache/x": ""})
	if found := find(t, Person{Home: home}); len(found.Layers) != 1 {
		t.Fatalf("control: layers %v", found.Layers)
	}
	must(t, os.Chmod(filepath.Join(home, ".npm/_cacache"), 0o700))
	found := find(t, Person{Home: home})
	if len(found.Layers) != 0 || len(found.Notes) != 1 || !strings.Contains(found.Notes[0], "0700") || found.Env["npm_config_cache"] != "" {
		t.Errorf("got %+v", found)
	}
}

// TestFindGo asks a program that answers as go does, and one that does not.
func TestFindGo(t *testing.T) {
	home := homeDir(t)
	plant(t, home, map[string]string{
		"sdk/bin/go": "#!/bin/sh\n[ \"$*\" = 'env -json GOROOT GOMODCACHE GOPROXY' ] && [ \"$GOTOOLCHAIN\" = local ] && [ -z \"$SECRET\" ] && echo '{\"GOROOT\": \"" + home + "/sdk\", \"GOPROXY\": \"https://ada:secret@go.example,direct\", \"GOMODCACHE\": \"" + home + "/mod\"}'\n",
		"mod/cache/": "", "broken/go": "#!/bin/sh\nexit 3\n",
	})
	found := find(t, Person{Home: home, Env: map[string]string{"PATH": home + "/sdk/bin:/usr/bin:/bin", "SECRET": "x"}})
	want := []nucleus.Layer{{Name: "go", Host: home + "/sdk", Guest: "/opt/toolchains/go"}, {Name: "go modules", Host: home + "/mod", Guest: "/opt/caches/go-mod"}}
	if !slices.Equal(found.Layers, want) || found.Env["GOPROXY"] != "off" || found.Env["GOMODCACHE"] != "/opt/caches/go-mod" || !strings.HasPrefix(found.Env["PATH"], "/opt/toolchains/go/bin:") {
		t.Errorf("got %+v", found)
	}
	open := func(host string, port int) bool { return host == "go.example" && port == 443 }
	found = find(t, Person{Home: home, Env: map[string]string{"PATH": home + "/sdk/bin"}, Reaches: open})
	if found.Env["GOPROXY"] != "file:///opt/caches/go-mod/cache/download,https://go.example,direct" || found.Env["GOMODCACHE"] != "" {
		t.Errorf("with its proxy reached: %+v", found)
	}
	found = find(t, Person{Home: home, Env: map[string]string{"PATH": home + "/broken"}})
	if len(found.Layers) != 0 || len(found.Notes) != 1 {
		t.Errorf("a go that fails: %+v", found)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Find(ctx, Person{Home: home, Env: map[string]string{"PATH": home + "/sdk/bin"}}); err == nil {
		t.Error("an ended context was ignored")
	}
}

// cachesOf is a home with every cache that Find knows, and a canary in every
// file beside them in which a tool keeps credentials.
func cachesOf(canary string) map[string]string {
	home := map[string]string{
		".npm/_cacache/index-v5/x": "", ".cache/yarn/v6/x": "", ".yarn/berry/cache/x.zip": "", ".cargo/registry/cache/x": "",
		".cargo/bin/cargo": "", ".cache/pip/http-v2/x.body": "", ".local/share/mise/installs/node/20.0.0/bin/node": "",
		".asdf/installs/ruby/3.3.0/bin/ruby": "", ".nvm/versions/node/v20.0.0/bin/node": "", ".pyenv/versions/3.12.1/bin/python": "",
		".rustup/toolchains/stable/bin/cargo": "", ".local/share/fnm/node-versions/v20.0.0/installation/bin/node": "",
	}
	for _, name := range []string{
		".npmrc", ".npm/_logs/debug.log", ".npm/_npx/x", ".yarnrc", ".yarnrc.yml", ".yarn/releases/x", ".netrc", ".pypirc", ".cargo/credentials",
		".cargo/credentials.toml", ".cargo/config.toml", ".cargo/env", ".config/pip/pip.conf", ".pip/pip.conf", ".cache/pip/selfcheck/x", ".config/go/env",
		".config/pypoetry/auth.toml", ".local/share/uv/credentials/credentials.toml", ".config/mise/config.toml", ".local/share/mise/state",
		".asdf/.asdfrc", ".nvm/.npmrc", ".pyenv/.env", ".rustup/settings.toml", ".git-credentials", ".ssh/id_ed25519", ".aws/credentials", ".docker/config.json",
	} {
		home[name] = canary
	}
	return home
}

// TestFindLeavesCredentials: nothing that Find layers or sets holds what lies
// in the files in which tools keep credentials, with the network closed or open.
func TestFindLeavesCredentials(t *testing.T) {
	const canary = "canary-6d1f"
	home := homeDir(t)
	plant(t, home, cachesOf("registry=https://ada:"+canary+"@npm.example/?x="+canary+"\n"))
	plant(t, home, map[string]string{"scratch/": "", "links/": "", "sdk/bin/go": "#!/bin/sh\necho '{\"GOROOT\": \"/nowhere\", \"GOMODCACHE\": \"" + home + "/go/pkg/mod\", \"GOPROXY\": \"https://ada:" + canary + "@go.example\"}'\n",
		"go/pkg/mod/cache/x": "", "go/pkg/auth": canary})
	env := map[string]string{
		"PATH": home + "/sdk/bin:/usr/bin", "PIP_INDEX_URL": "https://ada:" + canary + "@pip.example/simple", "PIP_FIND_LINKS": home + "/links https://ada:" + canary + "@links.example/",
		"NPM_TOKEN": canary, "GOAUTH": canary, "CARGO_REGISTRY_TOKEN": canary, "UV_INDEX_PYPI_PASSWORD": canary, "npm_config__authToken": canary,
	}
	looked := 0
	for _, reaches := range []func(string, int) bool{nil, func(string, int) bool { return true }} {
		found := find(t, Person{Home: home, Env: env, Scratch: home + "/scratch", Reaches: reaches})
		for name, value := range found.Env {
			if strings.Contains(value, canary) {
				t.Errorf("%s is %q", name, value)
			}
		}
		for _, layer := range found.Layers {
			if holds(t, layer.Host, canary) {
				t.Errorf("layer %q shows a credential", layer.Name)
			}
			looked++
		}
	}
	if looked < 14 {
		t.Errorf("only %d layers were looked at", looked)
	}
	// Control: the search finds what is there.
	plant(t, home, map[string]string{".npm/_cacache/content": canary})
	if !holds(t, filepath.Join(home, ".npm/_cacache"), canary) {
		t.Error("the search finds nothing")
	}
}

func holds(t *testing.T, dir, text string) (found bool) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(name string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		found = found || bytes.Contains(data, []byte(text))
		return err
	}))
	return found
}

// TestFindByRegistry: what is set to work offline is what has its registry closed.
func TestFindByRegistry(t *testing.T) {
	home := homeDir(t)
	plant(t, home, cachesOf(""))
	plant(t, home, map[string]string{"scratch/": "", "links/": ""})
	env := map[string]string{"PIP_FIND_LINKS": home + "/links"}
	offline := map[string]string{ // what each sets, by the hosts of its registry
		"registry.npmjs.org": "npm_config_cache", "registry.yarnpkg.com": "YARN_GLOBAL_FOLDER", "pypi.org files.pythonhosted.org": "PIP_NO_INDEX", "index.crates.io static.crates.io": "CARGO_NET_OFFLINE",
	}
	for open := range offline {
		found := find(t, Person{Home: home, Env: env, Reaches: func(host string, port int) bool { return port == 443 && slices.Contains(strings.Fields(open), host) }})
		for hosts, name := range offline {
			if _, set := found.Env[name]; set == (hosts == open) {
				t.Errorf("with %s open: %s is set: %t", open, name, set)
			}
		}
		if found.Env["PIP_FIND_LINKS"] == "" {
			t.Errorf("with %s open pip has no wheels", open)
		}
	}
	// Half a registry is none.
	if found := find(t, Person{Home: home, Env: env, Reaches: func(host string, _ int) bool { return host == "pypi.org" }}); found.Env["PIP_NO_INDEX"] == "" {
		t.Errorf("without the files' host: %v", found.Env)
	}
}

func wheel(t *testing.T, dir, content string) []byte {
	t.Helper()
	var out bytes.Buffer
	archive := zip.NewWriter(&out)
	must(t, archive.SetComment("a comment"))
	for name, text := range map[string]string{"demo.py": "x = 1\n", dir + "/WHEEL": content, dir + "/METADATA": "Name: demo\n"} {
		member, err := archive.Create(name)
		must(t, err)
		_, err = member.Write([]byte(text))
		must(t, err)
	}
	must(t, archive.Close())
	return out.Bytes()
}

func TestWheels(t *testing.T) {
	home := homeDir(t)
	good := wheel(t, "demo-1.0.dist-info", "Wheel-Version: 1.0\nBuild: 2\nTag: py2-none-any\nTag: py3-none-any\n")
	plant(t, home, map[string]string{
		"cache/http-v2/a/b/aaaa":      "headers",
		"cache/http-v2/a/b/aaaa.body": string(good),
		"cache/http/c/cccc":           "cc=4,\x82\xa8response" + string(wheel(t, "old-2.0.dist-info", "Tag: cp311-cp311-linux_x86_64\n")) + "\xa4vary\x80",
		"cache/http/d/html":           "<html>PK\x03\x04 no zip PK\x05\x06",
		"cache/http-v2/e.body":        string(wheel(t, "../../etc/x-1.dist-info", "Tag: py3-none-any\n")),
		"cache/http-v2/f.body":        string(wheel(t, "..-1.dist-info", "Tag: py3-none-../../x\n")),
		"cache/http-v2/g.body":        string(good[:len(good)-30]),
		"cache/http-v2/h.body":        string(wheel(t, "nothing.dist-info", "Wheel-Version: 1.0\n")),
		"scratch/":                    "", "links/": "",
	})
	person := Person{Home: home, Scratch: home + "/scratch", Env: map[string]string{"PIP_CACHE_DIR": home + "/cache", "PIP_FIND_LINKS": home + "/links https://index.example/simple"}}
	defer unix.Umask(unix.Umask(0o077))
	for range 2 { // the second time from markers
		found := find(t, person)
		if len(found.Layers) != 2 || found.Env["PIP_FIND_LINKS"] != "/opt/caches/wheels /opt/caches/links-a" || found.Env["PIP_NO_INDEX"] != "1" || len(found.Notes) != 0 {
			t.Errorf("got %+v", found)
		}
		files, err := filepath.Glob(home + "/scratch/wheels/*.whl")
		must(t, err)
		want := []string{home + "/scratch/wheels/demo-1.0-2-py2.py3-none-any.whl", home + "/scratch/wheels/old-2.0-cp311-cp311-linux_x86_64.whl"}
		if !slices.Equal(files, want) {
			t.Errorf("wheels %v, want %v", files, want)
		}
	}
	for _, name := range []string{"", "/demo-1.0-2-py2.py3-none-any.whl"} {
		if info, err := os.Stat(home + "/scratch/wheels" + name); err != nil || info.Mode().Perm()&0o004 == 0 {
			t.Errorf("the machine's users may not read %q: %v (%v)", name, info.Mode(), err)
		}
	}
	if content, err := os.ReadFile(home + "/scratch/wheels/demo-1.0-2-py2.py3-none-any.whl"); err != nil || !bytes.Equal(content, good) {
		t.Errorf("the wheel was changed: %v", err)
	}
}

func FuzzWheelName(f *testing.F) {
	f.Add([]byte("PK\x03\x04PK\x05\x06"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if name, err := wheelName(cutZip(data)); err == nil && (strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".")) {
			t.Errorf("name %q", name)
		}
	})
}

func TestLessVersion(t *testing.T) {
	for _, pair := range [][2]string{{"v9.0.0", "v10.0.0"}, {"3.9.1", "3.12"}, {"1.2", "1.2.1"}, {"008", "9"}, {"a", "b"}} {
		if !lessVersion(pair[0], pair[1]) || lessVersion(pair[1], pair[0]) {
			t.Errorf("%s is not below %s", pair[0], pair[1])
		}
	}
}
