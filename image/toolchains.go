package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"cal/nucleus"
)

const askTimeout = 10 * time.Second

// golang asks go itself. Without a network the module cache is used in place:
// unpacking modules anew costs more than all else in a build. GOPROXY=off makes
// what is missing fail at once instead of after a wait. With one, new modules need a
// cache that can be written to, and the person's is the proxy that is asked first.
func (s *search) golang(ctx context.Context) error {
	program, ok := s.look("go")
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answer, err := s.goEnv(ctx, program)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		s.note("go: %s env: %v", program, err)
		return nil
	}
	s.program("go", answer.GOROOT, toolchains+"/go")
	at, ok := s.layer("go modules", answer.GOMODCACHE, caches+"/go-mod")
	reached := s.reaches(firstProxy(answer.GOPROXY))
	switch {
	case reached && ok:
		s.env["GOPROXY"] = "file://" + at + "/cache/download," + answer.GOPROXY
	case reached:
		s.env["GOPROXY"] = answer.GOPROXY
	case ok:
		s.env["GOMODCACHE"], s.env["GOPROXY"] = at, "off"
	}
	return nil
}

// cleanProxies is a list of the person's proxies without what is secret in it.
func cleanProxies(list string) string {
	var kept []string
	for entry := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' || r == '|' }) {
		if entry != "direct" && entry != "off" {
			entry = withoutSecrets(entry)
		}
		if entry != "" {
			kept = append(kept, entry)
		}
	}
	return strings.Join(kept, ",")
}

// firstProxy is the address in a clean list that is asked first; "" for none.
func firstProxy(list string) string {
	first, _, _ := strings.Cut(list, ",")
	return first
}

func (s *search) nvm(context.Context) error {
	root := s.dir("NVM_DIR", ".nvm")
	versions := filepath.Join(root, "versions", "node")
	version, ok := s.onPath(versions)
	if !ok {
		version, ok = s.nvmDefault(root, versions)
	}
	if !ok {
		version, ok = newest(versions)
	}
	if ok {
		s.program("node (nvm)", filepath.Join(versions, version), toolchains+"/node")
	}
	return nil
}

// nvmDefault follows the alias "default", which may name another alias, a whole
// version or the beginning of one.
func (s *search) nvmDefault(root, versions string) (string, bool) {
	want := "default"
	for range 8 {
		next := firstLine(filepath.Join(root, "alias", filepath.FromSlash(want)))
		if next == "" || strings.Contains(next, "..") {
			break
		}
		want = next
	}
	want = "v" + strings.TrimPrefix(want, "v")
	best, found := "", false
	entries, err := os.ReadDir(versions)
	if err != nil {
		return "", false
	}
	for _, entry := range entries {
		if name := entry.Name(); (name == want || strings.HasPrefix(name, want+".")) && (!found || lessVersion(best, name)) {
			best, found = name, true
		}
	}
	return best, found
}

func (s *search) fnm(context.Context) error {
	root := s.dir("FNM_DIR", ".local", "share", "fnm")
	if _, err := os.Stat(root); err != nil {
		root = filepath.Join(s.person.Home, ".fnm")
	}
	installed := filepath.Join(root, "aliases", "default")
	if active := s.person.Env["FNM_MULTISHELL_PATH"]; filepath.IsAbs(active) {
		installed = active
	}
	if _, err := os.Stat(installed); err != nil {
		version, ok := newest(filepath.Join(root, "node-versions"))
		if !ok {
			return nil
		}
		installed = filepath.Join(root, "node-versions", version, "installation")
	}
	s.program("node (fnm)", installed, toolchains+"/node")
	return nil
}

func (s *search) pyenv(context.Context) error {
	root := s.dir("PYENV_ROOT", ".pyenv")
	versions := filepath.Join(root, "versions")
	version := s.person.Env["PYENV_VERSION"]
	if version == "" {
		version = firstLine(filepath.Join(root, "version"))
	}
	version, _, _ = strings.Cut(version, ":")
	if version == "system" {
		return nil
	}
	if !plain(version) || !isDir(filepath.Join(versions, version)) {
		var ok bool
		if version, ok = newest(versions); !ok {
			return nil
		}
	}
	prefix := filepath.Join(versions, version)
	s.program("python "+version+" (pyenv)", prefix, samePlace(prefix, toolchains+"/python"))
	return nil
}

// samePlace keeps an installation where it lies on the host, because its scripts name their
// interpreter by its path; elsewhere where the machine has its own directory.
func samePlace(host, otherwise string) string {
	for _, own := range []string{"/tmp", "/run", "/dev", "/proc", "/sys", "/.nucleus", nucleus.MachineHome, "/etc"} {
		if below(host, own) {
			return otherwise
		}
	}
	return host
}

// versioned finds what mise and asdf have installed, both as installs/TOOL/VERSION.
func (s *search) versioned(context.Context) error {
	for _, manager := range []struct{ name, installs, chosen string }{
		{"mise", filepath.Join(s.dir("MISE_DATA_DIR", ".local", "share", "mise"), "installs"), ""},
		{"asdf", filepath.Join(s.dir("ASDF_DATA_DIR", ".asdf"), "installs"), filepath.Join(s.person.Home, ".tool-versions")},
	} {
		chosen := toolVersions(manager.chosen)
		tools, err := os.ReadDir(manager.installs)
		if err != nil {
			continue
		}
		for _, tool := range tools {
			versions := filepath.Join(manager.installs, tool.Name())
			version, ok := s.onPath(versions)
			if !ok {
				version = chosen[tool.Name()]
			}
			if !plain(version) || !isDir(filepath.Join(versions, version)) {
				if version, ok = newest(versions); !ok {
					continue
				}
			}
			prefix := filepath.Join(versions, version)
			if tool.Name() == "go" || tool.Name() == "golang" {
				prefix = goPrefix(prefix)
			}
			if isDir(filepath.Join(prefix, "bin")) {
				s.program(fmt.Sprintf("%s %s (%s)", tool.Name(), version, manager.name), prefix, samePlace(prefix, toolchains+"/"+manager.name+"-"+tool.Name()))
			}
		}
	}
	return nil
}

// goPrefix: asdf puts Go one directory deeper than the rest.
func goPrefix(prefix string) string {
	if isDir(filepath.Join(prefix, "go", "bin")) {
		return filepath.Join(prefix, "go")
	}
	return prefix
}

// toolVersions reads the lines `TOOL VERSION ...` of asdf.
func toolVersions(name string) map[string]string {
	chosen := map[string]string{}
	data, err := os.ReadFile(name)
	if err != nil {
		return chosen
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) >= 2 && !strings.HasPrefix(fields[0], "#") {
			chosen[fields[0]] = fields[1]
		}
	}
	return chosen
}

var defaultToolchain = regexp.MustCompile(`(?m)^default_toolchain\s*=\s*"([^"]+)"`)

// rust shows rustup's default toolchain itself: rustup's own programs would want
// to write to its home.
func (s *search) rust(context.Context) error {
	root := s.dir("RUSTUP_HOME", ".rustup")
	name := s.person.Env["RUSTUP_TOOLCHAIN"]
	if name == "" {
		settings, err := os.ReadFile(filepath.Join(root, "settings.toml"))
		if err != nil {
			return nil
		}
		if match := defaultToolchain.FindSubmatch(settings); match != nil {
			name = string(match[1])
		}
	}
	if !plain(name) || !isDir(filepath.Join(root, "toolchains", name)) {
		var ok bool
		if name, ok = newest(filepath.Join(root, "toolchains")); !ok {
			return nil
		}
	}
	s.program("rust "+name, filepath.Join(root, "toolchains", name), toolchains+"/rust")
	return nil
}

// plain refuses a version that is a path.
func plain(version string) bool {
	return version != "" && version != "." && version != ".." && !strings.ContainsAny(version, "/\x00")
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}
