// Command bench measures CAL beside its peers, in one run on one machine, and writes
// the table that stands in bench/README.md. Every figure is a median; a ratio is
// taken between medians of runs that alternate. It is never a test: nothing fails
// for being slow.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"time"
)

func main() {
	bin := flag.String("bin", "bin", "directory of the built programs")
	out := flag.String("out", "", "file to write; empty prints")
	rounds := flag.Int("rounds", 11, "runs of each command")
	only := flag.String("only", "", "one part: start, request, approve, log, work, image, qemu, agent or firecracker; work/go, work/npm, work/git: that work alone")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	dir, err := filepath.Abs(*bin)
	if err == nil {
		err = run(ctx, dir, *out, *only, *rounds)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// part measures one thing and returns its lines of the report.
type part struct {
	name string
	run  func(context.Context, *stage, int) ([]string, error)
}

func run(ctx context.Context, bin, out, only string, rounds int) error {
	s, err := newStage(ctx, bin)
	if err != nil {
		return err
	}
	defer s.close()
	report := []string{"# Measurements", "", "Made by `make bench`; the machine: " + machine() + ".", "Medians. A ratio compares medians of runs that alternate. The peers share the host's kernel unless said otherwise.", ""}
	only, key, _ := strings.Cut(only, "/")
	work := func(ctx context.Context, s *stage, rounds int) ([]string, error) {
		return workTimes(ctx, s, rounds, key)
	}
	for _, p := range []part{{"start", startTimes}, {"request", requestTimes}, {"approve", approveTimes}, {"log", logTimes}, {"work", work}, {"image", imageTimes}, {"qemu", qemuTimes}, {"agent", agentTimes}, {"firecracker", firecrackerTimes}} {
		if only != "" && only != p.name {
			continue
		}
		fmt.Fprintln(os.Stderr, "measuring:", p.name)
		lines, err := p.run(ctx, s, rounds)
		if err != nil {
			lines = append(lines, fmt.Sprintf("Not measured (%s): %v.", p.name, err))
		}
		report = append(append(report, lines...), "")
	}
	text := strings.Join(report, "\n")
	if out == "" {
		fmt.Print(text)
		return nil
	}
	return os.WriteFile(out, []byte(text), 0o644)
}

func machine() string {
	kernel, _ := exec.Command("uname", "-sr").Output()
	return fmt.Sprintf("%d cores, %s, %s, %s", runtime.NumCPU(), strings.TrimSpace(string(kernel)), runtime.Version(), time.Now().UTC().Format("2006-01-02"))
}

// contender is a command that is timed beside others.
type contender struct {
	name string
	argv []string
	env  []string
	dir  string
	once func() error // before each run, not timed
}

// runPatience is with one run of a contender: an emulator may hang.
const runPatience = 5 * time.Minute

// race runs the contenders in turn, once to warm up and then rounds times, and
// returns each one's median in milliseconds.
func race(ctx context.Context, rounds int, contenders ...contender) ([]float64, error) {
	times := make([][]float64, len(contenders))
	for round := range rounds + 1 {
		for i, c := range contenders {
			if c.once != nil {
				if err := c.once(); err != nil {
					return nil, fmt.Errorf("%s: %w", c.name, err)
				}
			}
			bounded, cancel := context.WithTimeout(ctx, runPatience)
			cmd := exec.CommandContext(bounded, c.argv[0], c.argv[1:]...)
			cmd.Env, cmd.Dir = c.env, c.dir
			started := time.Now()
			output, err := cmd.CombinedOutput()
			took := time.Since(started)
			cancel()
			if err != nil {
				return nil, fmt.Errorf("%s: %w: %s", c.name, err, lastLine(string(output)))
			}
			if round > 0 {
				times[i] = append(times[i], float64(took.Microseconds())/1000)
			}
		}
	}
	medians := make([]float64, len(contenders))
	for i := range times {
		medians[i] = median(times[i])
	}
	return medians, nil
}

func median(v []float64) float64 { return quantile(v, 0.5) }

func quantile(v []float64, q float64) float64 {
	sorted := append([]float64(nil), v...)
	sort.Float64s(sorted)
	return sorted[min(len(sorted)-1, int(float64(len(sorted))*q))]
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// table lays out contenders beside the first of them.
func table(title string, names []string, medians []float64) []string {
	lines := []string{"## " + title, "", "| | ms | ratio |", "|---|---|---|"}
	for i, name := range names {
		lines = append(lines, fmt.Sprintf("| %s | %.1f | %.2f |", name, medians[i], medians[i]/medians[0]))
	}
	return lines
}
