package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"cal/nucleus"
)

// Person is whose toolchains and caches are looked for.
type Person struct {
	Home string            // absolute
	Env  map[string]string // PATH and the variables by which tools are told where their things lie

	// Reaches says whether a program in the machine may connect to a host. What a
	// package manager's registry is reached for is not set to work offline; nil: no
	// host is reached.
	Reaches func(host string, port int) bool

	// Scratch is a directory of CAL's own in which Find may keep what it takes out
	// of caches; empty: nothing is taken out.
	Scratch string
}

// Found is what goes into a machine besides the image.
type Found struct {
	Layers []nucleus.Layer
	Env    map[string]string // of the tools: PATH, and what makes package managers use the layers without a network
	Notes  []string          // what was left out, and why
}

// Where layers lie in a machine.
const (
	toolchains = nucleus.Toolchains
	caches     = "/opt/caches"
)

// Find looks for toolchains outside the directories that every host image shows
// and for package caches. Nothing is layered that is the person's home, holds a
// known credential file, or is not for everybody to read: Notes says so.
//
// The layers are read-only. Each package manager whose registry is not reached is
// set so that it works from them, and fails plainly for what is not there. One
// whose registry is reached asks that, and takes from the layers what it can take
// without writing to them: Go its modules, pip its wheels.
func Find(ctx context.Context, person Person) (Found, error) {
	if !filepath.IsAbs(person.Home) {
		return Found{}, fmt.Errorf("home %q is not absolute", person.Home)
	}
	s := &search{person: person, env: map[string]string{}}
	for _, find := range []func(context.Context) error{
		s.golang, s.nvm, s.fnm, s.pyenv, s.versioned, s.rust, s.npm, s.yarn, s.pip, s.cargo,
	} {
		if err := find(ctx); err != nil {
			return Found{}, err
		}
	}
	s.env["PATH"] = s.path()
	return Found{s.layers, s.env, s.notes}, nil
}

type search struct {
	person Person
	layers []nucleus.Layer
	first  []string // directories at the head of PATH
	last   []string // directories of the host image that PATH may lack
	env    map[string]string
	notes  []string
}

func (s *search) note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// reaches says whether all of these addresses, URLs, are reached.
func (s *search) reaches(addresses ...string) bool {
	for _, address := range addresses {
		parsed, err := url.Parse(address)
		if err != nil || s.person.Reaches == nil {
			return false
		}
		port := map[string]int{"https": 443, "http": 80}[parsed.Scheme]
		if given := parsed.Port(); given != "" {
			port, _ = strconv.Atoi(given)
		}
		if port == 0 || !s.person.Reaches(parsed.Hostname(), port) {
			return false
		}
	}
	return true
}

// withoutSecrets is an address of http or https without user, password and
// query; "" for anything else.
func withoutSecrets(address string) string {
	parsed, err := url.Parse(strings.TrimSpace(address))
	if err != nil || parsed.Host == "" || parsed.Scheme != "https" && parsed.Scheme != "http" || strings.Contains(address, "${") {
		return ""
	}
	parsed.User, parsed.RawQuery, parsed.Fragment = nil, "", ""
	return parsed.String()
}

// dir returns the directory that a variable names, or one of the person's home.
func (s *search) dir(variable string, home ...string) string {
	if dir := s.person.Env[variable]; variable != "" && filepath.IsAbs(dir) {
		return filepath.Clean(dir)
	}
	return filepath.Join(append([]string{s.person.Home}, home...)...)
}

// credentials are names that must not lie at the top of a layer.
var credentials = []string{
	".npmrc", ".netrc", ".pypirc", ".git-credentials", ".ssh", ".aws", ".gnupg", ".config", ".docker", ".kube",
	"credentials", "credentials.toml", "credentials.json", "auth.json", "_auth", "pip.conf",
}

// layer shows host at guest, or says why not. What the host image shows anyway
// needs no layer.
func (s *search) layer(name, host, guest string) (at string, ok bool) {
	real, err := filepath.EvalSymlinks(host)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false
	}
	if err != nil {
		s.note("%s: %v", name, err)
		return "", false
	}
	if shown(real) {
		return real, true
	}
	info, err := os.Stat(real)
	switch {
	case err != nil:
		s.note("%s: %v", name, err)
		return "", false
	case !info.IsDir():
		s.note("%s: %s is not a directory", name, real)
		return "", false
	case info.Mode().Perm()&0o005 != 0o005:
		s.note("%s: %s is not for everybody to read (mode %04o)", name, real, info.Mode().Perm())
		return "", false
	}
	if home, err := filepath.EvalSymlinks(s.person.Home); err == nil && below(home, real) {
		s.note("%s: %s holds the home directory", name, real)
		return "", false
	}
	for _, secret := range credentials {
		if _, err := os.Lstat(filepath.Join(real, secret)); err == nil {
			s.note("%s: %s holds %s", name, real, secret)
			return "", false
		}
	}
	for _, have := range s.layers {
		if have.Host == real {
			return have.Guest, true
		}
		if below(guest, have.Guest) || below(have.Guest, guest) {
			return "", false // another manager's of the same tool came first
		}
	}
	s.layers = append(s.layers, nucleus.Layer{Name: name, Host: real, Guest: guest})
	return guest, true
}

// program shows an installation with its bin directory in front of PATH.
func (s *search) program(name, prefix, guest string) {
	at, ok := s.layer(name, prefix, guest)
	switch {
	case ok && shown(at):
		s.last = append(s.last, at+"/bin")
	case ok:
		s.first = append(s.first, at+"/bin")
	}
}

// shown says whether a host image shows a path without a layer.
func shown(path string) bool {
	return slices.ContainsFunc([]string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"}, func(dir string) bool { return below(path, dir) })
}

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// path puts the found programs first, then what the person's own PATH has of the
// host image, then the usual.
func (s *search) path() string {
	var dirs []string
	add := func(dir string) {
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range s.first {
		add(dir)
	}
	for _, dir := range filepath.SplitList(s.person.Env["PATH"]) {
		if filepath.IsAbs(dir) && shown(filepath.Clean(dir)) {
			add(filepath.Clean(dir))
		}
	}
	for _, dir := range append(s.last, filepath.SplitList(DefaultPath)...) {
		add(dir)
	}
	return strings.Join(dirs, ":")
}

// look finds a program on the person's PATH.
func (s *search) look(name string) (string, bool) {
	for _, dir := range filepath.SplitList(s.person.Env["PATH"]) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && filepath.IsAbs(dir) && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return file, true
		}
	}
	return "", false
}

// onPath returns the version of a tool that lies in versions, a directory of
// installations, and whose bin directory is on the person's PATH.
func (s *search) onPath(versions string) (string, bool) {
	for _, dir := range filepath.SplitList(s.person.Env["PATH"]) {
		if rest, ok := strings.CutPrefix(filepath.Clean(dir), versions+"/"); ok {
			version, _, _ := strings.Cut(rest, "/")
			return version, true
		}
	}
	return "", false
}

// newest returns the highest version in a directory of installations.
func newest(versions string) (string, bool) {
	entries, err := os.ReadDir(versions)
	if err != nil {
		return "", false
	}
	best := ""
	for _, entry := range entries {
		if entry.IsDir() && !strings.HasPrefix(entry.Name(), ".") && (best == "" || lessVersion(best, entry.Name())) {
			best = entry.Name()
		}
	}
	return best, best != ""
}

// lessVersion compares runs of digits as numbers.
func lessVersion(a, b string) bool {
	for a != "" && b != "" {
		x, y := run(a), run(b)
		if x != y {
			if digit(x[0]) && digit(y[0]) {
				x, y := strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
				if len(x) != len(y) {
					return len(x) < len(y)
				}
				return x < y
			}
			return x < y
		}
		a, b = a[len(x):], b[len(y):]
	}
	return len(a) < len(b)
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// run is the longest prefix of digits, or of anything else.
func run(s string) string {
	i := 1
	for i < len(s) && digit(s[i]) == digit(s[0]) {
		i++
	}
	return s[:i]
}

// firstLine reads a small file's first line; "" where there is none.
func firstLine(name string) string {
	data, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(data)), "\n")
	return strings.TrimSpace(line)
}
