package policy

import (
	"testing"

	"pgregory.net/rapid"

	"cal/nucleus"
)

func TestBudget(t *testing.T) {
	const usd, s = 1_000_000, 1000
	for _, c := range []struct {
		budget          string
		spent, reserved nucleus.Amounts
		rule, why       string // empty: allowed
	}{
		{"{}", nucleus.Amounts{MicroUSD: 1 << 60, Tokens: 1 << 60, Millis: 1 << 60}, nucleus.Amounts{}, "", ""},
		{"{usd: 5}", nucleus.Amounts{MicroUSD: 5*usd - 1}, nucleus.Amounts{}, "", ""},
		{"{usd: 5}", nucleus.Amounts{MicroUSD: 5 * usd}, nucleus.Amounts{}, "budget.usd", "the budget is spent: 5.00 of 5.00 USD"},
		{"{usd: 5}", nucleus.Amounts{MicroUSD: 5*usd + 20_500}, nucleus.Amounts{}, "budget.usd", "the budget is spent: 5.0205 of 5.00 USD"},
		{"{usd: 5}", nucleus.Amounts{MicroUSD: 4 * usd}, nucleus.Amounts{MicroUSD: usd}, "budget.usd", "the budget is spent: 4.00 of 5.00 USD, and 1.00 are set aside for sub-pods"},
		{"{usd: 5}", nucleus.Amounts{Tokens: 1 << 60, Millis: 1 << 60}, nucleus.Amounts{}, "", ""},
		{"{usd: 0}", nucleus.Amounts{}, nucleus.Amounts{}, "", ""}, // calls no model
		{"{usd: 0}", nucleus.Amounts{MicroUSD: 1}, nucleus.Amounts{}, "budget.usd", "the budget is spent: 0.000001 of 0.00 USD"},
		{"{tokens: 100}", nucleus.Amounts{Tokens: 99}, nucleus.Amounts{}, "", ""},
		{"{tokens: 100}", nucleus.Amounts{Tokens: 120}, nucleus.Amounts{}, "budget.tokens", "the budget is spent: 120 of 100 tokens"},
		{"{tokens: 0}", nucleus.Amounts{}, nucleus.Amounts{}, "", ""},
		{"{seconds: 2}", nucleus.Amounts{Millis: 2*s - 1}, nucleus.Amounts{}, "", ""},
		{"{seconds: 2}", nucleus.Amounts{Millis: 2*s + 500}, nucleus.Amounts{}, "budget.seconds", "the budget is spent: 2.5 of 2 seconds"},
		{"{seconds: 0}", nucleus.Amounts{}, nucleus.Amounts{}, "budget.seconds", "the budget is spent: 0 of 0 seconds"},
		{"{seconds: 9007199254740991}", nucleus.Amounts{Millis: 1 << 60}, nucleus.Amounts{}, "", ""},
		{"{tokens: 100}", nucleus.Amounts{Tokens: nucleus.Unlimited}, nucleus.Amounts{Tokens: nucleus.Unlimited}, "budget.tokens", "the budget is spent: unlimited of 100 tokens, and unlimited are set aside for sub-pods"},
	} {
		p := load(t, "operations: {read_files: always}\nbudget: "+c.budget)
		d := p.Decide(sample(nucleus.ReadFiles), nucleus.Context{Spent: c.spent, Reserved: c.reserved})
		if want := map[bool]nucleus.Verdict{true: nucleus.Allow, false: nucleus.Deny}[c.rule == ""]; d.Verdict != want || c.rule != "" && (d.Rule != c.rule || d.Why != c.why || d.Takes != 0) {
			t.Errorf("budget %s, spent %+v, reserved %+v:\n got %+v\nwant %s %s %q", c.budget, c.spent, c.reserved, d, want, c.rule, c.why)
		}
	}
}

// A smaller budget never decides looser, and more that is spent neither.
func TestBudgetIsMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		amounts := func(label string) nucleus.Amounts {
			draw := func(of string) int64 {
				return rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, 3000), rapid.Just(int64(nucleus.Unlimited))).Draw(t, label+" "+of)
			}
			return nucleus.Amounts{MicroUSD: draw("usd"), Tokens: draw("tokens"), Millis: draw("ms")}
		}
		limit := func(label string) *Policy {
			p := Top()
			amount := rapid.OneOf(rapid.Int64Range(0, 3), rapid.Just(int64(unlimited)))
			p.budget = budget{amount.Draw(t, label+" usd"), amount.Draw(t, label+" tokens"), amount.Draw(t, label+" seconds")}
			return p
		}
		a, b := limit("a"), limit("b")
		met := Meet(a, b)
		spent, more := amounts("spent"), amounts("more")
		c := nucleus.Context{Spent: spent, Reserved: amounts("reserved")}
		after := c
		after.Spent = spent.Plus(more)
		action := sample(nucleus.ReadFiles)
		for _, p := range []*Policy{a, b} {
			if p.Decide(action, c).Verdict.StricterThan(met.Decide(action, c).Verdict) {
				t.Fatalf("the meet of %+v and %+v is looser with %+v", a.budget, b.budget, c)
			}
			if p.Decide(action, c).Verdict.StricterThan(p.Decide(action, after).Verdict) {
				t.Fatalf("%+v decides looser after more was spent: %+v, then %+v", p.budget, c, after)
			}
		}
		if denied := a.Decide(action, c).Verdict == nucleus.Deny || b.Decide(action, c).Verdict == nucleus.Deny; denied != (met.Decide(action, c).Verdict == nucleus.Deny) {
			t.Fatalf("the meet of %+v and %+v denies what neither does, or not what one does, with %+v", a.budget, b.budget, c)
		}
	})
}

func TestBudgetOfAPolicy(t *testing.T) {
	if got, want := load(t, "budget: {usd: 0.25, seconds: 3}").Budget(), (nucleus.Amounts{MicroUSD: 250_000, Tokens: nucleus.Unlimited, Millis: 3000}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := load(t, "{}").Budget(); got != nucleus.NoLimit() {
		t.Errorf("%+v, want no limit", got)
	}
}
