package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"cal/internal/script"
	"cal/nucleus"
	"cal/workspace/agents"

	"golang.org/x/sys/unix"
)

func datasync(f *os.File) error { return unix.Fdatasync(int(f.Fd())) }

// work is a command that is timed on the host and in a machine, in the same project.
type work struct {
	key, name     string
	files         func(context.Context, *stage) (map[string]string, error)
	prepare, argv []string // prepare: before each run, not timed
	rounds        int      // at most
}

var works = []work{
	{
		key: "go", name: "`go build ./...`, cold cache, standard library packages", files: always(goModule),
		prepare: []string{"rm", "-rf", "/tmp/gocache"},
		argv:    []string{"env", "GOCACHE=/tmp/gocache", "GOFLAGS=-p=2", "go", "build", "./..."}, rounds: 3,
	},
	{
		key: "npm", name: "`npm ci`, 410 packages, npm's cache filled, offline", files: npmProject,
		prepare: []string{"rm", "-rf", "node_modules"},
		argv:    []string{"npm", "ci", "--offline", "--no-audit", "--no-fund"}, rounds: 5,
	},
	{key: "git", name: "`git status`, 50,000 files", files: always(manyFiles(50000)), argv: []string{"git", "status", "--short"}, rounds: 11},
}

// workTimes: ordinary work in a machine beside the same work on the host. A machine
// is started once; what is timed is the command in it. With a key only that work.
func workTimes(ctx context.Context, s *stage, rounds int, key string) ([]string, error) {
	lines := []string{"## Ordinary work, in a machine beside the host", "", "| | host ms | machine ms | ratio |", "|---|---|---|---|"}
	for _, w := range works {
		if key != "" && key != w.key {
			continue
		}
		files, err := w.files(ctx, s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		host, inside, err := s.compare(ctx, w, files, min(w.rounds, rounds))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		lines = append(lines, fmt.Sprintf("| %s | %.0f | %.0f | %.2f |", w.name, host, inside, inside/host))
	}
	return lines, nil
}

func always(files map[string]string) func(context.Context, *stage) (map[string]string, error) {
	return func(context.Context, *stage) (map[string]string, error) { return files, nil }
}

var goModule = map[string]string{
	"go.mod":  "module bench\n\ngo 1.26\n",
	"main.go": "package main\n\nimport (\n\t\"encoding/json\"\n\t\"fmt\"\n\t\"os\"\n\t\"regexp\"\n\t\"text/template\"\n)\n\nfunc main() {\n\tjson.NewEncoder(os.Stdout).Encode(fmt.Sprint(regexp.MustCompile(\"a\"), template.New(\"x\")))\n}\n",
}

const npmPackages = `{"name": "bench", "version": "1.0.0", "private": true,
 "dependencies": {"express": "4.21.2"},
 "devDependencies": {"eslint": "8.57.1", "jest": "29.7.0", "typescript": "5.7.3"}}
`

// npmProject asks the registry for the lock file and fills a cache of the stage's
// own, which host and machine then use without a network.
func npmProject(ctx context.Context, s *stage) (map[string]string, error) {
	cache, project := filepath.Join(s.dir, "npm"), filepath.Join(s.dir, "npm-fill")
	s.env = append(s.env, "npm_config_cache="+cache)
	if err := os.Mkdir(project, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(project, "package.json"), []byte(npmPackages), 0o644); err != nil {
		return nil, err
	}
	install := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--omit-lockfile-registry-resolved=false")
	install.Env, install.Dir = s.env, project
	if out, err := install.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("npm install: %w: %s", err, lastLine(string(out)))
	}
	lock, err := os.ReadFile(filepath.Join(project, "package-lock.json"))
	return map[string]string{"package.json": npmPackages, "package-lock.json": string(lock), ".gitignore": "node_modules\n"}, err
}

func manyFiles(n int) map[string]string {
	files := map[string]string{}
	for i := range n {
		files[fmt.Sprintf("d%03d/f%05d.txt", i/100, i)] = fmt.Sprintf("file %d\n", i)
	}
	return files
}

func (s *stage) compare(ctx context.Context, w work, files map[string]string, rounds int) (host, inside float64, err error) {
	id := w.key
	repo, err := s.repo(ctx, id, files)
	if err != nil {
		return 0, 0, err
	}
	pod, done, err := s.machine(ctx, id, repo)
	if err != nil {
		return 0, 0, err
	}
	defer done()
	var hostTimes, insideTimes []float64
	onHost := func(argv []string) error {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env, cmd.Dir = s.env, repo
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	inMachine := func(argv []string) error {
		value, err := s.node.Tool(ctx, pod, nucleus.RunBash, map[string]any{"argv": argv, "dir": id, "timeout_s": 600})
		if err != nil {
			return err
		}
		var result struct {
			ExitCode int    `json:"exit_code"`
			Stderr   string `json:"stderr"`
		}
		if err := json.Unmarshal(value, &result); err != nil {
			return err
		}
		if result.ExitCode != 0 {
			return fmt.Errorf("in the machine: exit code %d: %s", result.ExitCode, result.Stderr)
		}
		return nil
	}
	for round := range rounds + 1 {
		for _, side := range []struct {
			do    func([]string) error
			times *[]float64
		}{{onHost, &hostTimes}, {inMachine, &insideTimes}} {
			if w.prepare != nil {
				if err := side.do(w.prepare); err != nil {
					return 0, 0, err
				}
			}
			started := time.Now()
			if err := side.do(w.argv); err != nil {
				return 0, 0, err
			}
			if round > 0 {
				*side.times = append(*side.times, float64(time.Since(started).Microseconds())/1000)
			}
		}
	}
	return median(hostTimes), median(insideTimes), nil
}

// machine starts a pod through cal, so that toolchains are found as a person's are.
func (s *stage) machine(ctx context.Context, name, repo string) (pod string, done func(), err error) {
	hold := exec.CommandContext(ctx, filepath.Join(s.bin, "cal"), "run", "--repo", repo, "--workspace", name, "--no-tty", "--", "sh", "-c", "sleep 3600")
	hold.Env, hold.Dir = s.env, s.dir
	if err := hold.Start(); err != nil {
		return "", nil, err
	}
	done = func() {
		hold.Process.Signal(os.Interrupt)
		hold.Wait()
	}
	deadline := time.Now().Add(5 * time.Minute)
	for time.Now().Before(deadline) {
		pods, err := s.node.Pods(ctx)
		if err != nil {
			done()
			return "", nil, err
		}
		for _, p := range pods {
			if p.Workspace == name && p.State == "running" {
				return p.ID, done, nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	done()
	return "", nil, fmt.Errorf("the machine for %s did not start", name)
}

// agentTimes: Claude Code from its start to its first request to the model.
func agentTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	definition, err := agents.Find("claude-code")
	if err != nil {
		return nil, err
	}
	install, err := definition.Locate(ctx, agents.Host{Env: map[string]string{"PATH": os.Getenv("PATH")}})
	if err != nil {
		return nil, err
	}
	claude := install.Binary // npm's own command may be a wrapper
	repo, err := s.repo(ctx, "agent", map[string]string{"a.txt": "a\n"})
	if err != nil {
		return nil, err
	}
	var hostTimes, insideTimes []float64
	for round := range min(rounds, 5) + 1 {
		onHost, err := s.firstRequest(ctx, func(url string) *exec.Cmd {
			cmd := exec.CommandContext(ctx, claude, "-p", "hello")
			cmd.Dir = repo
			cmd.Env = append(os.Environ(), "HOME="+filepath.Join(s.dir, "agent-home"), "ANTHROPIC_BASE_URL="+url, "ANTHROPIC_API_KEY=x", "DISABLE_AUTOUPDATER=1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1", "IS_SANDBOX=1")
			return cmd
		})
		if err != nil {
			return nil, err
		}
		inside, err := s.firstRequest(ctx, func(url string) *exec.Cmd {
			cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "cal"), "run", "--repo", repo, "--workspace", "agent", "--agent", "claude-code", "--prompt", "hello")
			cmd.Env, cmd.Dir = append(s.env, "ANTHROPIC_BASE_URL="+url, "ANTHROPIC_API_KEY=x"), s.dir
			return cmd
		})
		if err != nil {
			return nil, err
		}
		if round > 0 {
			hostTimes, insideTimes = append(hostTimes, onHost), append(insideTimes, inside)
		}
	}
	host, inside := median(hostTimes), median(insideTimes)
	return []string{
		"## Claude Code: start to its first request to the model", "", "| host ms | cal run ms | later by ms |", "|---|---|---|",
		fmt.Sprintf("| %.0f | %.0f | %.0f |", host, inside, inside-host),
	}, nil
}

func (s *stage) firstRequest(ctx context.Context, command func(url string) *exec.Cmd) (float64, error) {
	first := make(chan time.Time, 1)
	model := script.Anthropic(func(script.Turn) script.Step {
		select {
		case first <- time.Now():
		default:
		}
		return script.Step{Text: "done"}
	})
	url, stop, err := model.Start()
	if err != nil {
		return 0, err
	}
	defer stop()
	cmd := command(url)
	started := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%w: %s", err, lastLine(string(out)))
	}
	select {
	case at := <-first:
		return float64(at.Sub(started).Microseconds()) / 1000, nil
	default:
		return 0, fmt.Errorf("%s never asked the model", cmd.Path)
	}
}
