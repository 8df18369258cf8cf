package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

var benchmark = regexp.MustCompile(`(?m)^BenchmarkStart/(\S+?)(?:-\d+)?\s+\d+\s+(\d+) ns/op\s+([0-9.]+) MB-beside-guest`)

// firecrackerTimes takes what the driver's own benchmark measures, on a host where it works.
func firecrackerTimes(ctx context.Context, _ *stage, rounds int) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkStart$", "-benchtime", fmt.Sprintf("%dx", rounds), "-v", "cal/machine/firecracker")
	output, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, lastLine(string(output)))
	}
	found := benchmark.FindAllStringSubmatch(string(output), -1)
	if found == nil {
		return nil, errors.New(whySkipped(string(output)))
	}
	lines := []string{"## A machine of Firecracker's, to its first answer", "", "| | ms, mean | MB beside the guest's memory |", "|---|---|---|"}
	for _, match := range found {
		nanoseconds, err := strconv.ParseFloat(match[2], 64)
		if err != nil {
			return nil, err
		}
		lines = append(lines, fmt.Sprintf("| %s | %.1f | %s |", match[1], nanoseconds/1e6, match[3]))
	}
	return lines, nil
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
