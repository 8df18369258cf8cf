package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// logTimes: the log beside tessera's driver and fsck. They are a module of their own,
// so the program that measures is one, too.
func logTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", "run", ".", "-dir", s.dir, "-rounds", fmt.Sprint(min(rounds, 5)))
	cmd.Dir = "bench/log"
	var failed bytes.Buffer
	cmd.Stderr = &failed
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("bench/log: %w: %s", err, lastLine(failed.String()))
	}
	return append([]string{"## The log", ""}, strings.Split(strings.TrimSpace(string(out)), "\n")...), nil
}
