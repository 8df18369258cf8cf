// Command mutants breaks policy, approvals, log, images and greetings on purpose, one law or rule at a time, and
// fails unless the test that stands beside each notices. The source on disk is not
// touched: a mutant is an overlay.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	only := flag.String("only", "", "run the mutants whose law holds this text")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only string) error {
	dir, err := os.MkdirTemp("", "mutants-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var chosen []mutant
	for _, m := range slices.Concat(mutants, logMutants, grantMutants, queueMutants, passkeyMutants, imageMutants, bootMutants) {
		if strings.Contains(m.law, only) {
			chosen = append(chosen, m)
		}
	}
	const row = "%-48s  %-28s  %-28s  %s\n"
	fmt.Printf(row, "LAW OR RULE", "FILE", "TEST", "CAUGHT")
	caught, tried, started := 0, len(chosen), time.Now()
	results := tryAll(ctx, dir, chosen)
	for i, m := range chosen {
		how := <-results[i]
		if how == "yes" {
			caught++
		}
		fmt.Printf(row, m.law, m.file, m.test, how)
	}
	fmt.Printf("%d of %d mutants were caught in %s\n", caught, tried, time.Since(started).Round(time.Second))
	if caught != tried || tried == 0 {
		return fmt.Errorf("%d of %d mutants live", tried-caught, tried)
	}
	return nil
}

// tryAll tries as many mutants at a time as there are processors. Each has a channel
// that gets one answer.
func tryAll(ctx context.Context, dir string, all []mutant) []chan string {
	results := make([]chan string, len(all))
	for i := range results {
		results[i] = make(chan string, 1)
	}
	places := make(chan struct{}, runtime.NumCPU())
	go func() {
		for i, m := range all {
			places <- struct{}{}
			go func() {
				defer func() { <-places }()
				how, err := m.try(ctx, filepath.Join(dir, strconv.Itoa(i)))
				if err != nil {
					how = "NOT TRIED: " + err.Error()
				}
				results[i] <- how
			}()
		}
	}()
	return results
}

// try runs the named test of the file's package on the mutant. Caught means that the
// test itself failed: what does not compile, or has no such test, is an error.
func (m mutant) try(ctx context.Context, dir string) (string, error) {
	file, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(raw), m.old); n != 1 {
		return "", fmt.Errorf("%s holds %q %d times, want once", m.file, m.old, n)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	changed := filepath.Join(dir, "mutant.go")
	if err := os.WriteFile(changed, []byte(strings.Replace(string(raw), m.old, m.new, 1)), 0o600); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {file: changed}})
	if err != nil {
		return "", err
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	pkg := filepath.Dir(m.file)
	args := []string{"test", "-vet=off", "-count=1", "-overlay", overlayFile, "-run", "^" + m.test + "$", "./" + pkg}
	if pkg == "policy" {
		args = append(args, "-rapid.nofailfile", "-rapid.shrinktime=0s") // a mutant's failures are no regressions, and need no small example
	}
	out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput()
	failed := regexp.MustCompile(`(?m)^--- FAIL: ` + regexp.QuoteMeta(m.test) + `\b`).Match(out)
	switch {
	case err == nil && strings.Contains(string(out), "no tests to run"):
		return "", fmt.Errorf("there is no test %s", m.test)
	case err == nil:
		return "NO", nil
	case failed || strings.Contains(string(out), "panic: "):
		return "yes", nil
	}
	return "", fmt.Errorf("%w: %.2000s", err, out)
}
