package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cal/nucleus"
)

// requestTimes: read_files of 1 KiB, from signing to the reply, with intent and
// outcome durable.
func requestTimes(ctx context.Context, s *stage, _ int) ([]string, error) {
	repo, err := s.repo(ctx, "one", map[string]string{"f.txt": strings.Repeat("x", 1023) + "\n"})
	if err != nil {
		return nil, err
	}
	spec := nucleus.PodSpec{
		Workspace: "bench", Mode: nucleus.Mediated, Policy: []byte(`"default"`), Image: nucleus.Image{Kind: "host"},
		Repos: []nucleus.Repo{{Name: "one", Path: repo, Branch: "agent/bench"}},
	}
	pod, err := s.node.CreatePod(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer s.node.DeletePod(context.WithoutCancel(ctx), pod.ID)
	lines := []string{"## `read_files` of 1 KiB: signed request to reply, both entries durable", "", "| clients | p50 ms | p99 ms | requests/s |", "|---|---|---|---|"}
	names := []string{"verify", "resolve", "decide", "log", "act", "outcome"}
	rows := []string{}
	for _, clients := range []int{1, 16} {
		times, parts, elapsed, err := s.hammer(ctx, pod.ID, clients, 2000)
		if err != nil {
			return nil, err
		}
		lines = append(lines, fmt.Sprintf("| %d | %.2f | %.2f | %.0f |", clients, median(times), quantile(times, 0.99), float64(len(times))/elapsed.Seconds()))
		row := fmt.Sprintf("| %d |", clients)
		for _, name := range names {
			row += fmt.Sprintf(" %.3f |", median(parts[name]))
		}
		rows = append(rows, row)
	}
	lines = append(lines, "", "Parts at the node (p50, ms): verify the signature, resolve, decide, log (taking the legs and the durable intent), act (wire, machine, signed outcome), outcome (durable).", "",
		"| clients | "+strings.Join(names, " | ")+" |", "|---|---|---|---|---|---|---|")
	lines = append(lines, rows...)
	sync1, err := fdatasyncTime(s.dir)
	if err != nil {
		return nil, err
	}
	lines = append(lines, "", fmt.Sprintf("One fdatasync of a 400-byte append on the same disk: %.3f ms.", sync1), "", "Memory after these requests. An empty program in Go, one thread, has 2.2 MB by the host's count and 12.6 MB by the guest's, which sets memory aside in units of 2 MiB.", "")
	return append(lines, s.proxyMemory(ctx, pod.ID)...), nil
}

// hammer makes n requests from a number of clients.
func (s *stage) hammer(ctx context.Context, pod string, clients, n int) (times []float64, parts map[string][]float64, elapsed time.Duration, err error) {
	parts = map[string][]float64{}
	var mu sync.Mutex
	var group sync.WaitGroup
	one := func() error {
		started := time.Now()
		_, timing, err := s.node.TimedTool(ctx, pod, nucleus.ReadFiles, map[string]string{"path": "one/f.txt"})
		took := float64(time.Since(started).Microseconds()) / 1000
		mu.Lock()
		defer mu.Unlock()
		times = append(times, took)
		addParts(parts, timing)
		return err
	}
	for range 50 { // to warm up
		if err := one(); err != nil {
			return nil, nil, 0, err
		}
	}
	times, parts = nil, map[string][]float64{}
	started := time.Now()
	failed := make(chan error, clients)
	for range clients {
		group.Go(func() {
			for range n / clients {
				if err := one(); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	group.Wait()
	elapsed = time.Since(started)
	select {
	case err = <-failed:
	default:
	}
	return times, parts, elapsed, err
}

// fdatasyncTime is what one durable append costs here at least.
func fdatasyncTime(dir string) (float64, error) {
	f, err := os.Create(filepath.Join(dir, "sync"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var times []float64
	for range 300 {
		started := time.Now()
		if _, err := f.Write(make([]byte, 400)); err != nil {
			return 0, err
		}
		if err := datasync(f); err != nil {
			return 0, err
		}
		times = append(times, float64(time.Since(started).Microseconds())/1000)
	}
	return median(times), nil
}
