package image

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// npm's cache works read-only: what is in it is read without a write. The
// registry's address is part of every key in it, so it comes along, without a
// user or password; nothing else of .npmrc does.
func (s *search) npm(context.Context) error {
	at, ok := s.layer("npm cache", filepath.Join(s.dir("npm_config_cache", ".npm"), "_cacache"), caches+"/npm/_cacache")
	if !ok {
		return nil
	}
	s.env["npm_config_cache"] = filepath.Dir(at)
	for name, value := range map[string]string{
		"prefer_offline": "true", "logs_max": "0", "audit": "false", "fund": "false", "update_notifier": "false",
		// A closed network answers at once; waiting for a second answer does not open it.
		"fetch_retries": "0",
	} {
		s.env["npm_config_"+name] = value
	}
	if registry := npmRegistry(filepath.Join(s.person.Home, ".npmrc")); registry != "" {
		s.env["npm_config_registry"] = registry
	}
	return nil
}

func npmRegistry(npmrc string) string {
	data, err := os.ReadFile(npmrc)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		name, value, ok := strings.Cut(line, "=")
		if !ok || strings.TrimSpace(name) != "registry" {
			continue
		}
		address, err := url.Parse(strings.Trim(strings.TrimSpace(value), `"'`))
		if err != nil || address.Host == "" || strings.Contains(value, "${") {
			return ""
		}
		address.User, address.RawQuery, address.Fragment = nil, "", ""
		return address.String()
	}
	return ""
}

// cargo takes a home that it cannot write to for one that nobody else uses, and
// does without locks. Only the registry is shown: credentials lie beside it.
func (s *search) cargo(context.Context) error {
	at, ok := s.layer("cargo registry", filepath.Join(s.dir("CARGO_HOME", ".cargo"), "registry"), caches+"/cargo/registry")
	if ok {
		s.env["CARGO_HOME"], s.env["CARGO_NET_OFFLINE"] = filepath.Dir(at), "true"
	}
	return nil
}

// pip cannot install from its own cache without asking the index first, so the
// wheels are taken out of it into a directory that it can install from.
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
	if len(links) > 0 {
		s.env["PIP_FIND_LINKS"], s.env["PIP_NO_INDEX"] = strings.Join(links, " "), "1"
		s.env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
	}
	return nil
}
