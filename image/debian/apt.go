// Package debian fetches Debian's packages with the host's apt, into a directory of
// its own and without root's rights.
//
// What is fetched runs as a machine's kernel or in it, so a stranger on the way must
// not be able to put something else there: apt verifies the archive's signature and
// each package's digest, and unauthenticated packages are refused. No package is
// installed on the host, none of its scripts is run, and neither apt's nor dpkg's own
// state is touched; hooks that the host's apt runs after an update are not run.
package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoApt says that the host has no apt or no dpkg.
var ErrNoApt = errors.New("this host has no apt-get and dpkg-deb")

// Apt is a state of apt of its own.
type Apt struct {
	dir string
}

// deadline of one call of apt: whole toolchains are fetched over slow lines.
const deadline = 30 * time.Minute

// Open makes apt's state in dir, an empty directory, and fetches the lists of the
// host's sources, or of Debian's suite where one is named.
func Open(ctx context.Context, dir, suite string) (*Apt, error) {
	if suite == "" {
		return open(ctx, dir, "")
	}
	if _, err := os.Stat(keyring); err != nil {
		return nil, fmt.Errorf("suite %s: %w; hint: install debian-archive-keyring", suite, err)
	}
	return open(ctx, dir, sources(suite))
}

// open is Open with lines of a sources.list; "": the host's own.
func open(ctx context.Context, dir, list string) (*Apt, error) {
	for _, program := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, ErrNoApt
		}
	}
	a := &Apt{dir}
	for _, part := range []string{"lists/partial", "archives/partial", "debs"} {
		if err := os.MkdirAll(filepath.Join(dir, part), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "status"), nil, 0o644); err != nil {
		return nil, err
	}
	if list != "" {
		if err := os.WriteFile(a.sourcesFile(), []byte(list), 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(a.configFile(), []byte(a.config(list != "")), 0o644); err != nil {
		return nil, err
	}
	return a, a.update(ctx)
}

// update fetches the lists. apt takes it lightly where some, or all, cannot be had.
func (a *Apt) update(ctx context.Context) error {
	said, err := a.run(ctx, a.dir, "apt-get", "update")
	if err != nil {
		return err
	}
	lists, err := filepath.Glob(filepath.Join(a.dir, "lists", "*Packages*"))
	if err == nil && len(lists) == 0 {
		err = fmt.Errorf("no archive of packages could be reached; hint: sources and proxies are those of apt, or http_proxy: %s", lastLines(string(said), 3))
	}
	return err
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

func (a *Apt) configFile() string  { return filepath.Join(a.dir, "apt.conf") }
func (a *Apt) sourcesFile() string { return filepath.Join(a.dir, "sources.list") }

// config is read after the host's, of which proxies and mirrors stay.
func (a *Apt) config(ownSources bool) string {
	var c strings.Builder
	set := func(name, value string) { fmt.Fprintf(&c, "%s %q;\n", name, value) }
	for _, hook := range []string{"APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success", "DPkg", "APT::Install"} {
		fmt.Fprintf(&c, "#clear %s;\n", hook)
	}
	set("Dir::State", a.dir)
	set("Dir::State::lists", filepath.Join(a.dir, "lists"))
	set("Dir::State::status", filepath.Join(a.dir, "status"))
	set("Dir::State::extended_states", filepath.Join(a.dir, "extended_states"))
	set("Dir::Cache", a.dir)
	set("Dir::Cache::archives", filepath.Join(a.dir, "archives"))
	set("Dir::Log", a.dir)
	set("Debug::NoLocking", "true")
	set("Acquire::Languages", "none")
	set("Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled", "false")
	set("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false")
	set("Acquire::Retries", "3")
	set("APT::Architecture", "amd64")
	c.WriteString("#clear APT::Architectures;\n")
	set("APT::Get::AllowUnauthenticated", "false")
	set("APT::Install-Recommends", "false")
	set("APT::Install-Suggests", "false")
	if os.Geteuid() != 0 {
		set("APT::Sandbox::User", "")
	}
	if ownSources {
		set("Dir::Etc::sourcelist", a.sourcesFile())
		set("Dir::Etc::sourceparts", filepath.Join(a.dir, "none"))
	}
	return c.String()
}

// keyring is in Debian's package debian-archive-keyring, which others have too.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

func sources(suite string) string {
	line := func(host, name string) string {
		return fmt.Sprintf("deb [signed-by=%s] http://deb.debian.org/%s %s main\n", keyring, host, name)
	}
	if suite == "sid" || suite == "unstable" {
		return line("debian", suite)
	}
	return line("debian", suite) + line("debian", suite+"-updates") + line("debian-security", suite+"-security")
}

// Download fetches packages, each NAME or NAME=VERSION, without what they need, and
// returns their files in the same order.
func (a *Apt) Download(ctx context.Context, names ...string) ([]string, error) {
	var files []string
	for _, name := range names {
		dir, err := os.MkdirTemp(filepath.Join(a.dir, "debs"), "")
		if err != nil {
			return nil, err
		}
		// As root apt fetches as a user of its own, who must reach the directory.
		if err := os.Chmod(dir, 0o755); err != nil {
			return nil, err
		}
		if err := a.giveToApt(dir); err != nil {
			return nil, err
		}
		if _, err := a.run(ctx, dir, "apt-get", "download", name); err != nil {
			return nil, err
		}
		found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("apt-get download %s made %d files (%v)", name, len(found), err)
		}
		files = append(files, found[0])
	}
	return files, nil
}

// Field reads one field of a package's control file.
func Field(ctx context.Context, deb, name string) (string, error) {
	out, err := output(ctx, exec.CommandContext(ctx, "dpkg-deb", "--field", deb, name))
	return strings.TrimSpace(string(out)), err
}

// Unpack writes a package's files into dir. Owners and special bits are what tar gives to
// an ordinary user: none.
func Unpack(ctx context.Context, deb, dir string) error {
	_, err := output(ctx, exec.CommandContext(ctx, "dpkg-deb", "--extract", deb, dir))
	return err
}

func (a *Apt) run(ctx context.Context, dir, program string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{"--config-file", a.configFile()}, args...)...)
	cmd.Dir = dir
	return output(ctx, cmd)
}

// environment is all that the programs get of the environment: proxies that the person
// has set for apt stand in its configuration or in these.
func environment() []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// mostSaid bounds what is shown of a failed program.
const mostSaid = 1000

func output(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	said := bounded{most: mostSaid}
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &said, environment()
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) } // its fetchers too
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if err == nil {
		return out.Bytes(), nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return nil, fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, strings.TrimSpace(said.String()))
}

// bounded keeps the beginning of what a program says.
type bounded struct {
	bytes.Buffer
	most int
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.most - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
