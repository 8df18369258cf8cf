// Command testreport reads `go test -json` on stdin and prints what a person
// wants of it: the output of what failed, what was skipped and why, the ten slowest
// tests, and one closing line. It exits 1 when anything failed or nothing ran.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
)

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type outcome struct {
	name    string
	seconds float64
	result  string
	output  []string
}

func main() {
	results := map[string]*outcome{}
	packages := []string{}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 64<<20)
	for in.Scan() {
		var e event
		if json.Unmarshal(in.Bytes(), &e) != nil {
			fmt.Println(in.Text()) // a compiler's word, not an event
			continue
		}
		key := e.Package + " " + e.Test
		o := results[key]
		if o == nil {
			o = &outcome{name: strings.TrimSpace(e.Package + "." + e.Test)}
			results[key] = o
		}
		switch e.Action {
		case "output":
			o.output = append(o.output, e.Output)
		case "pass", "fail", "skip":
			o.result, o.seconds = e.Action, e.Elapsed
			if e.Test == "" {
				packages = append(packages, fmt.Sprintf("%-5s %6.1f s  %s", e.Action, e.Elapsed, e.Package))
				fmt.Println(packages[len(packages)-1])
				if e.Action == "fail" {
					printFailures(results, e.Package)
				}
			}
		case "build-output":
			fmt.Print(e.Output)
		case "build-fail":
			o.result = "fail"
		}
	}
	os.Exit(summary(results))
}

func printFailures(results map[string]*outcome, pkg string) {
	for key, o := range results {
		if strings.HasPrefix(key, pkg+" ") && (o.result == "fail" || o.result == "") {
			fmt.Printf("--- %s\n%s", o.name, strings.Join(o.output, ""))
		}
	}
}

func summary(results map[string]*outcome) int {
	var tests []*outcome
	counts := map[string]int{}
	for key, o := range results {
		if o.result == "" && !strings.HasSuffix(key, " ") {
			o.result = "fail" // it began and never ended
		}
		if o.result == "fail" && strings.HasSuffix(key, " ") {
			counts["package"]++
		}
		if strings.HasSuffix(key, " ") || o.result == "" {
			continue
		}
		counts[o.result]++
		tests = append(tests, o)
	}
	sort.Slice(tests, func(i, j int) bool { return tests[i].seconds > tests[j].seconds })
	fmt.Println("\nthe ten slowest tests:")
	for _, o := range tests[:min(10, len(tests))] {
		fmt.Printf("  %6.1f s  %s\n", o.seconds, o.name)
	}
	skips(tests)
	fmt.Printf("\n%d passed, %d failed, %d skipped\n", counts["pass"], counts["fail"], counts["skip"])
	if counts["fail"] > 0 || counts["package"] > 0 || counts["pass"] == 0 {
		return 1
	}
	return 0
}

// skips says what did not run, with its reason: never a pass.
func skips(tests []*outcome) {
	for _, o := range tests {
		if o.result != "skip" {
			continue
		}
		reason := ""
		for _, line := range o.output {
			if trimmed := strings.TrimSpace(line); !strings.HasPrefix(trimmed, "===") && !strings.HasPrefix(trimmed, "---") {
				reason = trimmed
			}
		}
		fmt.Printf("skipped: %s: %s\n", o.name, reason)
	}
}
