package prices

import (
	"math"
	"strings"
	"testing"

	"cal/egress"
)

func TestCost(t *testing.T) {
	table, err := Parse("t", []byte(`
checked: 2026-01-31
models:
  - names: [a, b]
    input: 3
    output: 15
    cache_read: 0.30
    cache_write: 3.75
    cache_write_1h: 6
    long: {above: 1000, input: 30, output: 150}
  - {names: [free], input: 0, output: 0}
  - {names: [dear], input: 10, output: 20}
surcharges: {standard: 1, priority: 2, fast: 6, us: 1.1}
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, model, service string
		tokens               egress.Tokens
		want                 int64 // millionths of a dollar
		known                bool
	}{
		{"input", "a", "", egress.Tokens{Input: 100}, 300, true},
		{"output", "b", "", egress.Tokens{Output: 100}, 1500, true},
		{"all", "a", "", egress.Tokens{Input: 100, Output: 10, CacheRead: 100, CacheWrite: 200, CacheHour: 100}, 300 + 150 + 30 + 375 + 600, true},
		{"rounded up", "a", "", egress.Tokens{CacheRead: 1}, 1, true},
		{"nothing", "a", "", egress.Tokens{}, 0, true},
		{"a snapshot", "a-20260131", "", egress.Tokens{Input: 100}, 300, true},
		{"another form of it", "a-2026-01-31", "", egress.Tokens{Input: 100}, 300, true},
		{"a larger context", "a[1m]", "", egress.Tokens{Input: 100}, 300, true},
		{"at the edge", "a", "", egress.Tokens{Input: 500, CacheRead: 500}, 1650, true},
		{"a long prompt", "a", "", egress.Tokens{Input: 1001, Output: 1}, 30030 + 150, true},
		{"a free model", "free", "", egress.Tokens{Input: 1e9, Output: 1e9}, 0, true},
		{"an unknown model is the dearest", "c", "", egress.Tokens{Input: 100, Output: 10}, 3000 + 1500, false},
		{"so is none", "", "", egress.Tokens{Input: 100}, 3000, false},
		{"a variant is another model", "a-pro", "", egress.Tokens{Input: 100}, 3000, false},
		{"a service", "a", "priority", egress.Tokens{Input: 100}, 600, true},
		{"several", "a", "standard+fast+us", egress.Tokens{Input: 100}, 1980, true},
		{"one of several is unknown", "a", "us+moon", egress.Tokens{Input: 100}, 1980, false},
		{"an unknown service is the dearest", "a", "express", egress.Tokens{Input: 100}, 1800, false},
	} {
		if got, known := table.Cost(c.model, c.service, c.tokens); got != c.want || known != c.known {
			t.Errorf("%s: %d, known %v; want %d, %v", c.name, got, known, c.want, c.known)
		}
	}
	own, err := Parse("own", []byte("models: [{names: [a], input: 1, output: 1}]"))
	if err != nil {
		t.Fatal(err)
	}
	whole := table.Over(own)
	if got, known := whole.Cost("a", "", egress.Tokens{Input: 100}); got != 100 || !known {
		t.Errorf("a person's own price: %d, %v", got, known)
	}
	if got, _ := whole.Cost("b", "priority", egress.Tokens{Input: 100}); got != 600 {
		t.Errorf("what it does not name: %d", got)
	}
}

// The largest that can be reported at the highest price does not overflow.
func TestCostIsBounded(t *testing.T) {
	table, err := Parse("t", []byte("models: [{names: [a], input: 1000, output: 1000, cache_read: 1000, cache_write: 1000, cache_write_1h: 1000}]\nsurcharges: {fast: 100}"))
	if err != nil {
		t.Fatal(err)
	}
	const most = egress.MaxTokens
	if got, _ := table.Cost("a", "fast", egress.Tokens{Input: most, Output: most, CacheRead: most, CacheWrite: most}); got != 4*most*1000*100 {
		t.Errorf("%d, want %d", got, int64(4*most*1000*100))
	}
	if got, _ := table.Cost("a", "fast+fast+fast+fast+fast", egress.Tokens{Input: most, Output: most}); got != math.MaxInt64 {
		t.Errorf("%d, want the most that there is", got)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "f:1: the file is empty"},
		{"[]", "f:1: the file is no mapping"},
		{"a: [", "f: yaml"},
		{"prices: []", `f:1: the file has the unknown key "prices"; want one of checked, models, surcharges`},
		{"models: {}", "f:1: models is no list"},
		{"models: []\nmodels: []", `f:2: the file has the key "models" twice`},
		{"models:\n- {input: 1, output: 1}", "f:2: a model has no names"},
		{"models:\n- {names: [], input: 1, output: 1}", "f:2: a model has no names"},
		{"models:\n- {names: [a], input: 1}", "f:2: model a has no price of input or of output"},
		{"models:\n- {names: [a], output: 1}", "f:2: model a has no price of input or of output"},
		{"models:\n- names: [a]\n  input: -1", `f:3: input is "-1"; want a number from 0 to 1000, with 6 decimals at most`},
		{"models:\n- names: [a]\n  input: 1001", `f:3: input is "1001"`},
		{"models:\n- names: [a]\n  input: 1e3", `f:3: input is "1e3"`},
		{"models:\n- names: [a]\n  input: .nan", `f:3: input is ".nan"`},
		{"models:\n- names: [a]\n  input: \"1\"", `f:3: input is "1"`},
		{"models:\n- names: [a]\n  input: 0.0000001", `f:3: input is`},
		{"models:\n- names: [a]\n  price: 1", `f:3: a model has the unknown key "price"`},
		{"models:\n- {names: [a], input: 1, output: 1}\n- {names: [a], input: 0, output: 0}", "f:3: model a is there twice"},
		{"models:\n- {names: [a], input: 1, output: 1, long: {input: 1, output: 1}}", "f:2: long of model a lacks above"},
		{"models:\n- {names: [a], input: 1, output: 1, long: {above: 0, input: 1, output: 1}}", `f:2: above is "0"`},
		{"surcharges: {fast: 101}", `f:1: surcharges.fast is "101"; want a number from 0 to 100, with 3 decimals at most`},
		{"checked: yesterday", `f:1: checked is "yesterday"`},
	} {
		if _, err := Parse("f", []byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q:\n got %v\nwant %s", c.text, err, c.want)
		}
	}
}

// The built-in table is whole, and knows the models that the agents use by themselves.
func TestBuiltin(t *testing.T) {
	table := Builtin()
	if table.Checked() == "" {
		t.Error("nobody says when it was checked")
	}
	for _, model := range []string{"claude-opus-4-8", "claude-sonnet-5-5", "claude-haiku-4-5-20251001", "claude-sonnet-4-5-20250929", "gpt-5.5", "gpt-5-codex", "gpt-6-sol"} {
		if _, known := table.Cost(model, "standard", egress.Tokens{Input: 1}); !known {
			t.Errorf("%s has no price", model)
		}
	}
	d := table.dearest()
	for name, p := range table.models {
		if p.input <= 0 || p.output < p.input || p.cacheRead > p.input || p.cacheWrite < p.input || p.output > d.output {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(builtin)
	f.Add([]byte("models: [{names: [a], input: 1, output: 1}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		table, err := Parse("f", data)
		if err != nil {
			return
		}
		if cost, _ := table.Cost("a", "b", egress.Tokens{Input: egress.MaxTokens, Output: egress.MaxTokens}); cost < 0 {
			t.Errorf("a call costs %d", cost)
		}
	})
}
