package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"sort"
	"strconv"
	"strings"
)

var (
	benchmark = regexp.MustCompile(`(?m)^BenchmarkStart/(\S+?)(?:-\d+)?\s+\d+\s+(\d+) ns/op\s+([0-9.]+) MB-beside-guest`)
	hostLine  = regexp.MustCompile(`(?m)^BenchmarkHost/(\S+?)(?:-\d+)?\s+\d+\s+(.*)$`)
	hostStep  = regexp.MustCompile(`([0-9.]+) (\w+)-ms`)
)

// firecrackerTimes takes what the driver's own benchmarks measure: whole starts on a host
// where it works, and what a host does for one wherever this is root.
func firecrackerTimes(ctx context.Context, _ *stage, rounds int) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^Benchmark(Start|Host)$", "-benchtime", fmt.Sprintf("%dx", rounds), "-v", "cal/machine/firecracker")
	output, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, lastLine(string(output)))
	}
	lines := hostTimes(string(output))
	found := benchmark.FindAllStringSubmatch(string(output), -1)
	if found == nil && lines == nil {
		return nil, errors.New(whySkipped(string(output)))
	}
	lines = append(lines, "## A machine of Firecracker's, to its first answer", "")
	if found == nil {
		return append(lines, fmt.Sprintf("Not measured (%s).", whySkipped(string(output)))), nil
	}
	lines = append(lines, "| | ms, mean | MB beside the guest's memory |", "|---|---|---|")
	for _, match := range found {
		nanoseconds, err := strconv.ParseFloat(match[2], 64)
		if err != nil {
			return nil, err
		}
		lines = append(lines, fmt.Sprintf("| %s | %.1f | %s |", match[1], nanoseconds/1e6, match[3]))
	}
	return lines, nil
}

// hostTimes are the steps of a start from a snapshot that need no KVM.
func hostTimes(output string) []string {
	found := hostLine.FindAllStringSubmatch(output, -1)
	if found == nil {
		return nil
	}
	lines := []string{
		"## What the host does for a start of Firecracker's from a snapshot", "",
		"With fakes of Firecracker, its jailer and the guest, which are five times as large as the real programs; `real`: with these, as far as they come without a guest.", "",
		"| | ms | of that, by step |", "|---|---|---|",
	}
	for _, match := range found {
		all, steps := "", []string(nil)
		for _, step := range hostStep.FindAllStringSubmatch(match[2], -1) {
			if step[2] == "all" {
				all = step[1]
				continue
			}
			steps = append(steps, step[2]+" "+step[1])
		}
		sort.Strings(steps)
		lines = append(lines, fmt.Sprintf("| %s | %s | %s |", match[1], all, strings.Join(steps, ", ")))
	}
	return append(lines, "")
}

// whySkipped is the line that a benchmark that was skipped has printed.
func whySkipped(output string) string {
	for line := range strings.Lines(output) {
		if _, reason, ok := strings.Cut(line, "_test.go:"); ok {
			_, reason, _ = strings.Cut(reason, ": ")
			return strings.TrimSpace(reason)
		}
	}
	return "it printed no figures"
}
