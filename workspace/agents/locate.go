package agents

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/semver"
)

// Host is where to look: the person's home directory and environment. Only PATH
// and NVM_DIR are read from Env.
type Host struct {
	Home string
	Env  map[string]string
}

// Install is an agent as it lies on the host.
type Install struct {
	Path    string // the command as it was found
	Binary  string // the native program behind it, without symbolic links
	Version string
}

// nativePackage is the npm package that holds an agent's program for one kind of
// machine.
type nativePackage struct {
	Package string
	Binary  string // path in the package
}

// places are where package managers put programs, below the home directory or
// absolute; a person's PATH often has them only in interactive shells. The newest
// of several matches is tried first.
var places = []string{
	".local/bin", ".claude/local/node_modules/.bin", ".npm-global/bin", ".npm-packages/bin", ".bun/bin",
	".nvm/versions/node/*/bin", ".local/share/fnm/node-versions/*/installation/bin",
	".local/share/mise/installs/node/*/bin", ".asdf/installs/nodejs/*/bin",
	".volta/tools/image/packages/*/bin", ".volta/tools/image/packages/*/*/bin",
	"/usr/local/bin", "/usr/bin", "/home/linuxbrew/.linuxbrew/bin",
}

const versionDeadline = 10 * time.Second

// Locate finds the person's install: the first in PATH, else in the usual places,
// that is a native program of this machine, not older than MinVersion. A wrapper
// that npm made is followed to the program that it starts; nothing is executed
// but, where no file says it, the program's own --version with an empty HOME and
// environment. The error is a *Missing when there is none.
func (d Definition) Locate(ctx context.Context, h Host) (Install, error) {
	var rejected []string
	seen := map[string]bool{}
	for _, path := range d.candidates(h) {
		real, err := filepath.EvalSymlinks(path)
		if err != nil || seen[real] {
			continue
		}
		seen[real] = true
		install, err := d.inspect(ctx, path, real)
		if ctx.Err() != nil {
			return Install{}, fmt.Errorf("looking for %s: %w", d.Title, ctx.Err())
		}
		if err == nil {
			return install, nil
		}
		rejected = append(rejected, err.Error())
	}
	if len(rejected) > 0 {
		return Install{}, &Missing{Fact: fmt.Sprintf("%s cannot be used: %s", d.Title, strings.Join(rejected, "; ")), Hint: d.InstallHint}
	}
	return Install{}, &Missing{Fact: fmt.Sprintf("%s is not installed: no %s in PATH", d.Title, d.Program), Hint: d.InstallHint}
}

// candidates are files with the program's name, in the order of preference.
func (d Definition) candidates(h Host) []string {
	dirs := filepath.SplitList(h.Env["PATH"])
	patterns := places
	if nvm := h.Env["NVM_DIR"]; nvm != "" {
		patterns = append([]string{filepath.Join(nvm, "versions/node/*/bin")}, patterns...)
	}
	for _, pattern := range patterns {
		if !filepath.IsAbs(pattern) {
			if h.Home == "" {
				continue
			}
			pattern = filepath.Join(h.Home, pattern)
		}
		matches, _ := filepath.Glob(pattern) // the patterns are well formed
		slices.SortFunc(matches, func(a, b string) int { return semver.Compare(versionIn(b), versionIn(a)) })
		dirs = append(dirs, matches...)
	}
	var files []string
	for _, dir := range dirs {
		if !filepath.IsAbs(dir) {
			continue // where the person happens to stand must not choose the program
		}
		path := filepath.Join(dir, d.Program)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			files = append(files, path)
		}
	}
	return files
}

var versionPattern = regexp.MustCompile(`\d+\.\d+\.\d+`)

// versionIn is the first version in s as semver writes it, or "".
func versionIn(s string) string {
	if v := versionPattern.FindString(s); v != "" {
		return "v" + v
	}
	return ""
}

// inspect turns one candidate into an install, or says why it is none.
func (d Definition) inspect(ctx context.Context, path, real string) (Install, error) {
	binary, err := d.program(real)
	if err != nil {
		return Install{}, fmt.Errorf("%s %w", path, err)
	}
	version := d.versionBeside(binary)
	if version == "" {
		if version, err = d.askVersion(ctx, binary); err != nil {
			return Install{}, fmt.Errorf("%s: %w", path, err)
		}
	}
	if semver.Compare("v"+version, "v"+d.MinVersion) < 0 {
		return Install{}, fmt.Errorf("%s is version %s, older than %s", path, version, d.MinVersion)
	}
	return Install{Path: path, Binary: binary, Version: version}, nil
}

// program is the native program behind a file without symbolic links: the file
// itself, or that of the npm package whose wrapper it is.
func (d Definition) program(real string) (string, error) {
	native, err := nativeHere(real)
	if err != nil {
		return "", err
	}
	if native {
		return real, nil
	}
	root := enclosing(real, d.Package)
	if root == "" {
		return "", errors.New("is a script of a kind that is not known")
	}
	for _, p := range d.native(runtime.GOARCH) {
		// As Node resolves a package: in the node_modules of each directory upwards.
		for dir := root; ; dir = filepath.Dir(dir) {
			file, err := filepath.EvalSymlinks(filepath.Join(dir, "node_modules", p.Package, p.Binary))
			if err == nil {
				if native, err := nativeHere(file); err == nil && native {
					return file, nil
				}
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", fmt.Errorf("is a package without its native program for linux/%s", runtime.GOARCH)
}

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// nativeHere says whether a file is an ELF program; one for another processor is
// an error.
func nativeHere(file string) (bool, error) {
	f, err := elf.Open(file)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) {
			return false, nil
		}
		return false, fmt.Errorf("cannot be read: %w", err)
	}
	defer f.Close()
	if f.Machine != machines[runtime.GOARCH] {
		return false, fmt.Errorf("is a program for %v, not for %s", f.Machine, runtime.GOARCH)
	}
	return true, nil
}

// manifest is what is read of a package.json.
type manifest struct{ Name, Version string }

func readManifest(dir string) (m manifest) {
	if raw, err := os.ReadFile(filepath.Join(dir, "package.json")); err == nil {
		_ = json.Unmarshal(raw, &m) // none, or none that says anything
	}
	return m
}

// enclosing is the directory of the package of a name that holds file, or "".
func enclosing(file, name string) string {
	for dir := filepath.Dir(file); dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if readManifest(dir).Name == name {
			return dir
		}
	}
	return ""
}

// versionBeside reads the version where the installer wrote it, which is a
// thousand times quicker than starting the program: in the package's manifest,
// or in the name of the file (.../versions/2.1.197).
func (d Definition) versionBeside(binary string) string {
	names := []string{d.Package}
	for _, p := range d.native(runtime.GOARCH) {
		names = append(names, p.Package)
	}
	for dir := filepath.Dir(binary); dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if m := readManifest(dir); slices.Contains(names, m.Name) {
			return versionPattern.FindString(m.Version)
		}
	}
	if base := filepath.Base(binary); filepath.Base(filepath.Dir(binary)) == "versions" && versionIn(base) == "v"+base {
		return base
	}
	return ""
}

// askVersion runs the program with an empty HOME and no environment of the
// person.
func (d Definition) askVersion(ctx context.Context, binary string) (string, error) {
	home, err := os.MkdirTemp("", "agent-version-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(home)
	ctx, cancel := context.WithTimeout(ctx, versionDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Dir = home
	cmd.Env = []string{"HOME=" + home, "LANG=C", "DISABLE_AUTOUPDATER=1"}
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("--version gave no answer in %v", versionDeadline)
		}
		return "", fmt.Errorf("--version: %w", err)
	}
	version := versionPattern.FindString(out.String())
	if version == "" || strings.TrimSpace(out.String()) != fmt.Sprintf(d.versions, version) {
		return "", fmt.Errorf("--version prints %.60q, which is not how %s says it", strings.TrimSpace(out.String()), d.Title)
	}
	return version, nil
}

// files lists the programs of an install, by the name that each has in the
// agent's root.
func (d Definition) files(in Install) (map[string]string, error) {
	files := map[string]string{d.Program: in.Binary}
	for _, name := range d.beside {
		path := filepath.Join(filepath.Dir(in.Binary), name)
		switch _, err := os.Stat(path); {
		case err == nil:
			files[name] = path
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	return files, nil
}
