package main

import (
	"context"
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

// workTimes: ordinary work in a machine beside the same work on the host. A machine
// is started once; what is timed is the command in it.
func workTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	lines := []string{"## Ordinary work, in a machine beside the host", "", "| | host ms | machine ms | ratio |", "|---|---|---|---|"}
	for _, w := range []struct {
		name    string
		files   map[string]string
		prepare []string
		argv    []string
		rounds  int
	}{
		{"`go build ./...`, cold cache, standard library packages", goModule, []string{"sh", "-c", "rm -rf /tmp/gocache"}, []string{"sh", "-c", "GOCACHE=/tmp/gocache GOFLAGS=-p=2 go build ./..."}, 3},
		{"`git status`, 50,000 files", manyFiles(50000), nil, []string{"git", "status", "--short"}, rounds},
	} {
		host, inside, err := s.compare(ctx, w.name, w.files, w.prepare, w.argv, min(w.rounds, rounds))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		lines = append(lines, fmt.Sprintf("| %s | %.0f | %.0f | %.2f |", w.name, host, inside, inside/host))
	}
	return lines, nil
}

var goModule = map[string]string{
	"go.mod":  "module bench\n\ngo 1.26\n",
	"main.go": "package main\n\nimport (\n\t\"encoding/json\"\n\t\"fmt\"\n\t\"os\"\n\t\"regexp\"\n\t\"text/template\"\n)\n\nfunc main() {\n\tjson.NewEncoder(os.Stdout).Encode(fmt.Sprint(regexp.MustCompile(\"a\"), template.New(\"x\")))\n}\n",
}

func manyFiles(n int) map[string]string {
	files := map[string]string{}
	for i := range n {
		files[fmt.Sprintf("d%03d/f%05d.txt", i/100, i)] = fmt.Sprintf("file %d\n", i)
	}
	return files
}

func (s *stage) compare(ctx context.Context, name string, files map[string]string, prepare, argv []string, rounds int) (host, inside float64, err error) {
	id := nucleus.SHA256([]byte(name))[:8]
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
		cmd.Dir = repo
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	inMachine := func(argv []string) error {
		_, err := s.node.Tool(ctx, pod, nucleus.RunBash, map[string]any{"argv": argv, "dir": id, "timeout_s": 600})
		return err
	}
	for round := range rounds + 1 {
		for _, side := range []struct {
			do    func([]string) error
			times *[]float64
		}{{onHost, &hostTimes}, {inMachine, &insideTimes}} {
			if prepare != nil {
				if err := side.do(prepare); err != nil {
					return 0, 0, err
				}
			}
			started := time.Now()
			if err := side.do(argv); err != nil {
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
