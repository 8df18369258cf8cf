package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cal/egress"
	"cal/nucleus"
	"cal/policy"
	"cal/policy/trial"
	"cal/workspace"
)

func policyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Profiles and policy files: read, compare, try out", Example: "  cal policy show default"}
	cmd.AddCommand(policyList(), policyShow(), policyCheck(),
		combine("meet", "Print the loosest policy that allows nothing which A or B does not, as JSON", policy.Meet),
		combine("join", "Print the strictest policy of which A and B are both parts, as JSON", policy.Join),
		policyLeq(), policyEval(), policyWhy(), policyDiff(), policySimulate(), policyProve())
	return cmd
}

func policyList() *cobra.Command {
	type listed struct {
		Name string `json:"name"`
		File string `json:"file,omitempty"` // of the person's own
	}
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list", Short: "List the profiles, and the policies below ~/.cal/policies", Example: "  cal policy list", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			var all []listed
			for _, name := range policy.Profiles() {
				all = append(all, listed{Name: name})
			}
			for _, file := range home.PolicyFiles() {
				all = append(all, listed{strings.TrimSuffix(filepath.Base(file), ".yaml"), file})
			}
			return printList(all, asJSON, "POLICY\tFILE", func(p listed) string { return p.Name + "\t" + orWord(p.File, "built in") })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func policyShow() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "show NAME", Short: "Print a profile or file in full, as JSON, and on standard error what it assumes", Example: "  cal policy show fix-issue", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			p, err := readPolicy(given[0])
			if err != nil {
				return err
			}
			if !asJSON {
				for _, rule := range p.TrustedRules() {
					fmt.Fprintln(os.Stderr, "assumption: counts on no leg:", rule)
				}
			}
			return printPolicy(p)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "the JSON alone")
	return cmd
}

func policyCheck() *cobra.Command {
	type checked struct {
		File   string `json:"file"`
		Valid  bool   `json:"valid"`
		Error  string `json:"error,omitempty"`
		Name   string `json:"name,omitempty"`
		Digest string `json:"policy_sha256,omitempty"`
	}
	var asJSON bool
	cmd := &cobra.Command{
		Use: "check FILE", Short: "Say whether a policy file is valid", Example: "  cal policy check .cal/policy.yaml", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			result := checked{File: given[0]}
			_, raw, err := workspace.Home{}.PolicyFile(fileName(given[0]))
			var p *policy.Policy
			if err == nil {
				p, err = policy.Load(given[0], raw)
			}
			if err == nil {
				result.Valid, result.Name = true, p.Name()
				result.Digest, err = p.Digest()
			}
			if !asJSON {
				if err == nil {
					fmt.Printf("%s: valid\n", given[0])
				}
				return err
			}
			if err != nil {
				result.Error = err.Error()
			}
			return errors.Join(err, json.NewEncoder(os.Stdout).Encode(result))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// fileName makes a path of what is meant as one: "policy" is ./policy.
func fileName(given string) string {
	if given == "" || given[0] == '/' || strings.HasPrefix(given, "./") || strings.HasPrefix(given, "../") {
		return given
	}
	return "./" + given
}

func combine(name, short string, two func(a, b *policy.Policy) *policy.Policy) *cobra.Command {
	return &cobra.Command{
		Use: name + " A B", Short: short, Example: "  cal policy " + name + " fix-issue my-policy.yaml", Args: args(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, given []string) error {
			a, b, err := readTwo(given)
			if err != nil {
				return err
			}
			return printPolicy(two(a, b))
		},
	}
}

func policyLeq() *cobra.Command {
	return &cobra.Command{
		Use: "leq A B", Short: "Print true if A is equal to or stricter than B, else false with exit code 1", Example: "  cal policy leq read-only default",
		Args: args(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, given []string) error {
			a, b, err := readTwo(given)
			if err != nil {
				return err
			}
			below := policy.Leq(a, b)
			fmt.Println(below)
			if !below {
				return exitCode(exitFailed)
			}
			return nil
		},
	}
}

func policyEval() *cobra.Command {
	return &cobra.Command{
		Use: "eval", Short: "Judge sessions: one JSON line in, one out",
		Example: `  echo '{"policy": "default", "session": [{"op": "read_files", "path": "a"}, {"op": "git_push"}]}' | cal policy eval`,
		Args:    args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			e := trial.Evaluator{Policy: readPolicy, Fetch: newFetch, UnixMilli: time.Now().UnixMilli()}
			out := bufio.NewWriter(os.Stdout)
			return errors.Join(evalLines(&e, os.Stdin, out), out.Flush())
		},
	}
}

func newFetch(method, url string) (nucleus.Fetch, error) {
	return egress.NewFetch(method, url, nil, nil)
}

// evalLines answers each line with one line; of a line that is wrong it is
// {"error": ...}, and the first such error is returned at the end.
func evalLines(e *trial.Evaluator, in io.Reader, out *bufio.Writer) (first error) {
	lines := bufio.NewReaderSize(in, 64<<10)
	for n := 1; ; n++ {
		line, err := readSession(lines)
		if err == io.EOF {
			return first
		}
		if err != nil {
			return errors.Join(first, fmt.Errorf("standard input, line %d: %w", n, err))
		}
		if len(line) == 0 {
			continue
		}
		result, err := e.Line(line)
		if err != nil {
			err = fmt.Errorf("line %d: %w", n, err)
			if first == nil {
				first = err
			}
			if result, err = json.Marshal(map[string]string{"error": err.Error()}); err != nil {
				return err
			}
		}
		if _, err := out.Write(append(result, '\n')); err != nil {
			return err
		}
		if lines.Buffered() == 0 { // whoever writes one line waits for its answer
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
}

// readSession returns the next line without its end and without space around it. Of
// one that is too long it returns a byte more than is allowed, and skips the rest.
func readSession(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part[:min(len(part), trial.MaxLine+1-len(line))]...)
		switch {
		case err == bufio.ErrBufferFull:
			continue
		case err == io.EOF && len(line) == 0:
			return nil, io.EOF
		case err != nil && err != io.EOF:
			return nil, err
		}
		return bytes.TrimSpace(line), nil
	}
}

func printPolicy(p *policy.Policy) error {
	raw, err := p.Canonical()
	if err == nil {
		_, err = fmt.Println(string(raw))
	}
	return err
}

// readPolicy finds a profile or a file for a question about it.
func readPolicy(name string) (*policy.Policy, error) {
	p, _, _, err := sourceOf(name)
	return p, err
}

// sourceOf returns a policy with the file that it was read from.
func sourceOf(name string) (p *policy.Policy, path string, raw []byte, err error) {
	if path, raw, err = policy.ProfileFile(name); err != nil {
		home, err := workspace.OpenHome()
		if err != nil {
			return nil, "", nil, err
		}
		if path, raw, err = home.PolicyFile(name); err != nil {
			return nil, "", nil, err
		}
	}
	p, err = policy.Load(path, raw)
	return p, path, raw, err
}

func readTwo(given []string) (a, b *policy.Policy, err error) {
	if a, err = readPolicy(given[0]); err == nil {
		b, err = readPolicy(given[1])
	}
	return a, b, err
}
