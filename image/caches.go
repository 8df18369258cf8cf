package image

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"strings"
)

// npm reads its cache without a write, but puts what it fetches there: with the
// registry reached it gets one of its own. The registry's address is part of every
// key, so it comes along, without a user or password; nothing else of .npmrc does.
func (s *search) npm(context.Context) error {
	registry := npmRegistry(filepath.Join(s.person.Home, ".npmrc"))
	if registry != "" {
		s.env["npm_config_registry"] = registry
	}
	for _, name := range []string{"audit", "fund", "update_notifier"} {
		s.env["npm_config_"+name] = "false"
	}
	if s.reaches(cmp.Or(registry, "https://registry.npmjs.org/")) {
		return nil
	}
	at, ok := s.layer("npm cache", filepath.Join(s.dir("npm_config_cache", ".npm"), "_cacache"), caches+"/npm/_cacache")
	if ok {
		s.env["npm_config_cache"] = filepath.Dir(at)
		s.env["npm_config_prefer_offline"], s.env["npm_config_logs_max"] = "true", "0"
		// A closed network answers at once; waiting for a second answer does not open it.
		s.env["npm_config_fetch_retries"] = "0"
	}
	return nil
}

func npmRegistry(npmrc string) string {
	data, err := os.ReadFile(npmrc)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, "="); ok && strings.TrimSpace(name) == "registry" {
			return withoutSecrets(strings.Trim(strings.TrimSpace(value), `"'`))
		}
	}
	return ""
}

// yarn, both the classic one and the modern, installs from a cache that it cannot
// write to, as long as all is there.
func (s *search) yarn(context.Context) error {
	if s.reaches("https://registry.yarnpkg.com/") {
		return nil
	}
	if at, ok := s.layer("yarn classic cache", s.dir("YARN_CACHE_FOLDER", ".cache", "yarn"), caches+"/yarn-classic"); ok {
		s.env["YARN_CACHE_FOLDER"] = at
	}
	// All of its folder: beside the cache lies an index, which has to be there.
	if at, ok := s.layer("yarn cache", s.dir("YARN_GLOBAL_FOLDER", ".yarn", "berry"), caches+"/yarn"); ok {
		s.env["YARN_GLOBAL_FOLDER"], s.env["YARN_ENABLE_NETWORK"], s.env["YARN_ENABLE_TELEMETRY"] = at, "false", "false"
	}
	return nil
}

// cargo takes a home that it cannot write to for one that nobody else uses, and
// does without locks. Only the registry is shown: credentials lie beside it. With
// crates.io reached cargo has to write, and gets a home of its own.
func (s *search) cargo(context.Context) error {
	if s.reaches("https://index.crates.io/", "https://static.crates.io/") {
		return nil
	}
	at, ok := s.layer("cargo registry", filepath.Join(s.dir("CARGO_HOME", ".cargo"), "registry"), caches+"/cargo/registry")
	if ok {
		s.env["CARGO_HOME"], s.env["CARGO_NET_OFFLINE"] = filepath.Dir(at), "true"
	}
	return nil
}

// pip cannot install from its own cache without asking the index first, so the
// wheels are taken out of it into a directory that it can install from; uv can, too.
func (s *search) pip(ctx context.Context) error {
	var links []string
	add := func(name, host, guest string) {
		if at, ok := s.layer(name, host, guest); ok {
			links = append(links, at)
		}
	}
	if s.person.Scratch != "" {
		cache := s.dir("PIP_CACHE_DIR", ".cache", "pip")
		if xdg := s.person.Env["XDG_CACHE_HOME"]; s.person.Env["PIP_CACHE_DIR"] == "" && filepath.IsAbs(xdg) {
			cache = filepath.Join(xdg, "pip")
		}
		house := filepath.Join(s.person.Scratch, "wheels")
		found, err := gatherWheels(ctx, cache, house)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			s.note("pip cache: %v", err)
		}
		if found {
			add("pip wheels", house, caches+"/wheels")
		}
	}
	for i, dir := range strings.Fields(s.person.Env["PIP_FIND_LINKS"]) {
		if filepath.IsAbs(dir) {
			add("pip links", dir, caches+"/links-"+string(rune('a'+i%26)))
		}
	}
	index := withoutSecrets(s.person.Env["PIP_INDEX_URL"])
	if index != "" {
		s.env["PIP_INDEX_URL"] = index
	}
	reached := s.reaches(cmp.Or(index, "https://pypi.org/simple/")) && (index != "" || s.reaches("https://files.pythonhosted.org/"))
	if len(links) > 0 {
		s.env["PIP_FIND_LINKS"], s.env["UV_FIND_LINKS"] = strings.Join(links, " "), strings.Join(links, ",")
	}
	if len(links) > 0 && !reached {
		s.env["PIP_NO_INDEX"], s.env["UV_NO_INDEX"], s.env["UV_OFFLINE"] = "1", "1", "1"
	}
	s.env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
	return nil
}
