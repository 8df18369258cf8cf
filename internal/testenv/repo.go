package testenv

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Repo is a repository of the person, with a bare remote that it was pushed to.
type Repo struct {
	Dir, Remote string
	env         *Env
}

// Repo makes a repository named name with one commit of these files.
func (e *Env) Repo(name string, files map[string]string) *Repo {
	e.t.Helper()
	r := &Repo{Dir: filepath.Join(e.Dir, name), Remote: filepath.Join(e.Dir, name+"-remote.git"), env: e}
	if err := os.MkdirAll(r.Dir, 0o755); err != nil {
		e.t.Fatal(err)
	}
	for path, content := range files {
		e.Write(filepath.Join(r.Dir, path), content)
	}
	e.Own()
	r.Git("init", "--quiet", "--bare", r.Remote)
	for _, step := range [][]string{
		{"init", "--quiet"}, {"add", "-A"}, {"commit", "--quiet", "-m", "first"},
		{"remote", "add", "origin", r.Remote}, {"push", "--quiet", "origin", "HEAD"}, {"fetch", "--quiet", "origin"},
	} {
		r.Git(step...)
	}
	return r
}

// Own gives everything of the person's to the user that commands run as.
func (e *Env) Own() {
	e.t.Helper()
	if e.Credential == nil {
		return
	}
	err := filepath.WalkDir(e.Dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(e.Credential.Uid), int(e.Credential.Gid))
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

// Git runs git in the repository as the person does.
func (r *Repo) Git(args ...string) string {
	r.env.t.Helper()
	cmd := r.env.Command("git", append([]string{"-C", r.Dir}, args...)...)
	result := r.env.Start(cmd).Wait()
	if result.Code != 0 {
		r.env.t.Fatal(result)
	}
	return strings.TrimRight(result.Stdout, "\n")
}

// State is everything that an agent must not change on the host: commit, branches,
// index, working tree and configuration of the repository, and the remote's refs.
func (r *Repo) State() string {
	r.env.t.Helper()
	parts := []string{r.Git("rev-parse", "HEAD"), r.Git("for-each-ref"), r.Git("status", "--porcelain"), r.Git("--git-dir="+r.Remote, "for-each-ref")}
	for _, dir := range []string{r.Dir, filepath.Join(r.Dir, ".git", "hooks")} {
		names, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			r.env.t.Fatal(err)
		}
		slices.Sort(names)
		for _, name := range names {
			if raw, err := os.ReadFile(name); err == nil {
				parts = append(parts, fmt.Sprintf("%s %x", name, sha256.Sum256(raw)))
			}
		}
	}
	config, err := os.ReadFile(filepath.Join(r.Dir, ".git", "config"))
	if err != nil {
		r.env.t.Fatal(err)
	}
	return strings.Join(append(parts, string(config)), "\n")
}
