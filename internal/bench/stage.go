package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cal/internal/idmap"
	"cal/internal/keyfile"
	"cal/node/client"
	"cal/nucleus"
)

// stage is a CAL_HOME of its own with a running node, and the peers that are found.
type stage struct {
	bin, dir, home string
	env            []string
	node           *client.Client
}

func newStage(ctx context.Context, bin string) (*stage, error) {
	dir, err := os.MkdirTemp("", "cal-bench-")
	if err != nil {
		return nil, err
	}
	s := &stage{bin: bin, dir: dir, home: filepath.Join(dir, "h")}
	s.env = append(os.Environ(), "CAL_HOME="+s.home)
	if out, err := s.cal(ctx, "run", "--", "true"); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	key, err := keyfile.Load(filepath.Join(s.home, "keys", "operator.key"))
	if err != nil {
		return nil, err
	}
	s.node = client.New(filepath.Join(s.home, "run", "node.sock"), "operator", key)
	return s, nil
}

func (s *stage) close() {
	s.cal(context.Background(), "node", "stop", "--all")
	_ = idmap.RemoveAll(context.Background(), s.dir)
}

func (s *stage) cal(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "cal"), args...)
	cmd.Env, cmd.Dir = s.env, s.dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (s *stage) calRun(args ...string) contender {
	return contender{name: "cal run", argv: append([]string{filepath.Join(s.bin, "cal"), "run"}, args...), env: s.env, dir: s.dir}
}

// awaitSpare lets the node come to rest, its spare machine made.
func (s *stage) awaitSpare() error {
	for range 200 {
		health, err := s.node.Health(context.Background())
		if err != nil {
			return err
		}
		if health.Spare == "ready" {
			time.Sleep(50 * time.Millisecond) // its proxy waits for the wire by then
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("the node makes no spare machine")
}

// fresh is a node without spare machines, with a CAL_HOME of its own.
func (s *stage) fresh(ctx context.Context) (contender, func(), error) {
	home := filepath.Join(s.dir, "f")
	node := exec.CommandContext(ctx, filepath.Join(s.bin, "nucleus-node"), "--home", home, "--spare", "0")
	if err := node.Start(); err != nil {
		return contender{}, nil, err
	}
	stop := func() {
		_ = node.Process.Signal(syscall.SIGTERM)
		_ = node.Wait()
	}
	c := s.calRun("--", "true")
	c.name, c.env = "cal run, no machine made ahead", append(os.Environ(), "CAL_HOME="+home)
	for range 500 {
		if _, err := os.Stat(filepath.Join(home, "run", "node.sock")); err == nil {
			return c, stop, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	return contender{}, nil, errors.New("the second node does not start")
}

// startTimes: from nothing to the end of `true`, the node running.
func startTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	raw, err := s.rawRunsc()
	if err != nil {
		return nil, err
	}
	fresh, stop, err := s.fresh(ctx)
	if err != nil {
		return nil, err
	}
	defer stop()
	contenders := append([]contender{raw, s.calRun("--", "true"), fresh}, s.peers()...)
	for i := range contenders { // no machine is made in the background while another is timed
		contenders[i].once = s.awaitSpare
	}
	medians, err := race(ctx, rounds, contenders...)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(contenders))
	for i, c := range contenders {
		names[i] = c.name
	}
	parts, err := s.startParts(ctx, rounds)
	return append(table("Start to exit of `true`, node running", names, medians), "", parts), err
}

// startParts says where the start of a machine spends its time, in the node.
func (s *stage) startParts(ctx context.Context, rounds int) (string, error) {
	parts := map[string][]float64{}
	for range rounds {
		if err := s.awaitSpare(); err != nil {
			return "", err
		}
		pod, timing, err := s.node.TimedPod(ctx, nucleus.PodSpec{Mode: nucleus.Mediated, Policy: []byte(`"default"`), Image: nucleus.Image{Kind: "host"}})
		if err != nil {
			return "", err
		}
		addParts(parts, timing)
		started := time.Now()
		if err := s.node.DeletePod(ctx, pod.ID); err != nil {
			return "", err
		}
		parts["delete"] = append(parts["delete"], float64(time.Since(started).Microseconds())/1000)
	}
	text := "Parts at the node (p50, ms):"
	for _, name := range []string{"plan", "log", "machine", "boot", "repos", "delete"} {
		text += fmt.Sprintf(" %s %.1f,", name, median(parts[name]))
	}
	return strings.TrimSuffix(text, ",") + ".", nil
}

// addParts reads a Server-Timing header.
func addParts(parts map[string][]float64, timing string) {
	for _, part := range strings.Split(timing, ", ") {
		var value float64
		name, rest, _ := strings.Cut(part, ";dur=")
		fmt.Sscan(rest, &value)
		parts[name] = append(parts[name], value)
	}
}

// rawRunsc is runsc by itself with a bundle of the same kind: the host's programs
// read-only, the same flags, /bin/true.
func (s *stage) rawRunsc() (contender, error) {
	bundle := filepath.Join(s.dir, "bundle")
	root := filepath.Join(bundle, "rootfs")
	mounts := []map[string]any{
		{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
		{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
	}
	for _, name := range []string{"usr", "bin", "sbin", "lib", "lib64"} {
		place := "/" + name
		info, err := os.Lstat(place)
		if err != nil {
			continue
		}
		if info.Mode()&os.ModeSymlink != 0 {
			target, err := os.Readlink(place)
			if err == nil {
				err = os.MkdirAll(root, 0o755)
			}
			if err == nil {
				err = os.Symlink(target, filepath.Join(root, name))
			}
			if err != nil {
				return contender{}, err
			}
			continue
		}
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			return contender{}, err
		}
		mounts = append(mounts, map[string]any{"destination": place, "type": "bind", "source": place, "options": []string{"rbind", "ro"}})
	}
	config := map[string]any{
		"ociVersion": "1.0.2", "root": map[string]any{"path": "rootfs", "readonly": true}, "mounts": mounts, "hostname": "bench",
		"process": map[string]any{"cwd": "/", "args": []string{"/bin/true"}, "env": []string{"PATH=/usr/bin:/bin"}, "user": map[string]any{"uid": 0, "gid": 0}},
		"linux":   map[string]any{"namespaces": []map[string]string{{"type": "pid"}, {"type": "mount"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}}},
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return contender{}, err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o644); err != nil {
		return contender{}, err
	}
	argv := []string{filepath.Join(s.bin, "runsc"), "--root=" + filepath.Join(s.dir, "r"), "--platform=systrap", "--network=none", "--host-uds=none", "--overlay2=none", "--ignore-cgroups"}
	if os.Geteuid() != 0 {
		argv = append(argv, "--rootless")
	}
	return contender{name: "raw `runsc run`, same kind of bundle", argv: append(argv, "run", "--bundle="+bundle, "bench"), env: os.Environ(), dir: s.dir}, nil
}

// peers are the other sandboxes that are installed.
func (s *stage) peers() []contender {
	var found []contender
	add := func(name, program string, argv ...string) {
		if path, err := exec.LookPath(program); err == nil {
			found = append(found, contender{name: name, argv: append([]string{path}, argv...), env: os.Environ(), dir: s.dir})
		}
	}
	add("bubblewrap", "bwrap", "--ro-bind", "/", "/", "--unshare-all", "true")
	add("Codex's sandbox", "codex", "sandbox", "true")
	add("Anthropic's sandbox-runtime", "srt", "true")
	return found
}

func (s *stage) repo(ctx context.Context, name string, files map[string]string) (string, error) {
	dir := filepath.Join(s.dir, name)
	for file, text := range files {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"-c", "user.name=b", "-c", "user.email=b@example.org", "commit", "-qm", "one"}} {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("git %s: %w: %s", args[0], err, strings.TrimSpace(string(out)))
		}
	}
	return dir, nil
}
