package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"

	"cal/nucleus"
	"cal/policy"
)

const rules = 100 // of each scope

// ours has 100 rules a scope. The questions match the last rule of each, which is
// the dearest to allow.
func ours(tb testing.TB) *policy.Policy {
	var hosts, commands, blocked, roots []string
	for i := range rules {
		hosts = append(hosts, fmt.Sprintf(`{host: h%02d.example.org, port: 443, methods: [GET], path: "/a%02d/**"}`, i, i))
		commands = append(commands, fmt.Sprintf(`[go, test, "./p%02d"]`, i))
		blocked = append(blocked, fmt.Sprintf(`"**/*.x%02d"`, i))
		roots = append(roots, fmt.Sprintf("p%02d", i))
	}
	p, err := policy.Load("bench", fmt.Appendf(nil, `
operations: {read_files: always, run_bash: always, web_fetch: always}
paths: {roots: {only: [%s]}, blocked: [%s]}
commands: {only: [%s]}
hosts: {only: [%s]}
`, strings.Join(roots, ","), strings.Join(blocked, ","), strings.Join(commands, ","), strings.Join(hosts, ",")))
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// theirs is the same policy in Cedar: a permit for each root, command and host, a
// forbid for each blocked pattern. Cedar has patterns on texts, so an argv is joined
// by a byte that no argument has; exposure and nu have no counterpart.
func theirs(tb testing.TB) *cedar.PolicySet {
	var text strings.Builder
	for i := range rules {
		fmt.Fprintf(&text, `permit(principal, action == Action::"read_files", resource) when { context.path == "p%02d" || context.path like "p%02d/*" };
permit(principal, action == Action::"run_bash", resource) when { context.argv == "go|test|./p%02d" && (context.dir == "p%02d" || context.dir like "p%02d/*") };
permit(principal, action == Action::"web_fetch", resource) when { context.host == "h%02d.example.org" && context.port == 443 && context.method == "GET" && (context.path == "/a%02d" || context.path like "/a%02d/*") };
forbid(principal, action == Action::"read_files", resource) when { context.path like "*.x%02d" || context.path like "*.x%02d/*" };
`, i, i, i, i, i, i, i, i, i, i)
	}
	set, err := cedar.NewPolicySetFromBytes("bench.cedar", []byte(text.String()))
	if err != nil {
		tb.Fatal(err)
	}
	return set
}

// question is one thing that is asked of both.
type question struct {
	name    string
	action  nucleus.Action
	context cedar.RecordMap
	allowed bool
}

var questions = []question{
	{"read", nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "p99/src/main.go"}}}, cedar.RecordMap{"path": cedar.String("p99/src/main.go")}, true},
	{"run", nucleus.Action{Op: nucleus.RunBash, Command: &nucleus.Command{Argv: []string{"go", "test", "./p99"}, Dir: "p99"}},
		cedar.RecordMap{"argv": cedar.String("go|test|./p99"), "dir": cedar.String("p99")}, true},
	{"fetch", nucleus.Action{Op: nucleus.WebFetch, Fetch: &nucleus.Fetch{Method: "GET", Host: "h99.example.org", Port: 443, Path: "/a99/x"}},
		cedar.RecordMap{"host": cedar.String("h99.example.org"), "port": cedar.Long(443), "method": cedar.String("GET"), "path": cedar.String("/a99/x")}, true},
	{"blocked", nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "p99/a.x99"}}}, cedar.RecordMap{"path": cedar.String("p99/a.x99")}, false},
	{"outside", nucleus.Action{Op: nucleus.ReadFiles, Files: []nucleus.File{{Path: "q/a"}}}, cedar.RecordMap{"path": cedar.String("q/a")}, false},
}

func (q question) request() cedar.Request {
	return cedar.Request{
		Principal: cedar.NewEntityUID("Agent", "a"), Action: cedar.NewEntityUID("Action", cedar.String(q.action.Op)),
		Resource: cedar.NewEntityUID("Machine", "m"), Context: cedar.NewRecord(q.context),
	}
}

// Both give the same answers, else the comparison says nothing.
func TestSameAnswers(t *testing.T) {
	p, set := ours(t), theirs(t)
	for _, q := range questions {
		ours := p.Decide(q.action, nucleus.Context{}).Verdict == nucleus.Allow
		theirs, _ := cedar.Authorize(set, cedar.EntityMap{}, q.request())
		if ours != q.allowed || bool(theirs) != q.allowed {
			t.Errorf("%s: ours %v, cedar %v, want %v", q.name, ours, theirs, q.allowed)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	p, set := ours(b), theirs(b)
	for _, q := range questions {
		b.Run(q.name+"/cal", func(b *testing.B) {
			measure(b, func() { p.Decide(q.action, nucleus.Context{}) })
		})
		request := q.request()
		b.Run(q.name+"/cedar", func(b *testing.B) {
			measure(b, func() { cedar.Authorize(set, cedar.EntityMap{}, request) })
		})
	}
}

// measure also reports the median, of batches that a clock can tell apart.
func measure(b *testing.B, do func()) {
	b.ReportAllocs()
	for b.Loop() {
		do()
	}
	const batches, batch = 2000, 32
	times := make([]time.Duration, batches)
	for i := range times {
		started := time.Now()
		for range batch {
			do()
		}
		times[i] = time.Since(started)
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[batches/2])/batch, "p50-ns/op")
}

func BenchmarkLoad1000(b *testing.B) {
	var text strings.Builder
	text.WriteString("hosts:\n  only:\n")
	for i := range 1000 {
		fmt.Fprintf(&text, "  - {host: h%d.example.org, port: 443, methods: [GET, POST], path: \"/a/%d/**\"}\n", i, i)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := policy.Load("bench", []byte(text.String())); err != nil {
			b.Fatal(err)
		}
	}
}
