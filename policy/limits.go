package policy

import (
	"math"
	"time"

	"cal/nucleus"
)

// unlimited is the budget of a policy that states none.
const unlimited = nucleus.Unlimited

// budget bounds what a session may use up. Its zero value is nothing.
type budget struct {
	microUSD, tokens, seconds int64
}

// Budget is what p lets a session use up; a dimension that it does not limit is
// nucleus.Unlimited.
func (p *Policy) Budget() nucleus.Amounts { return p.budget.amounts() }

func (b budget) amounts() nucleus.Amounts {
	a := nucleus.Amounts{MicroUSD: b.microUSD, Tokens: b.tokens, Millis: unlimited}
	if b.seconds <= unlimited/1000 {
		a.Millis = b.seconds * 1000
	}
	return a
}

// over names the first dimension of which nothing is left.
func (b budget) over(c *nucleus.Context) (nucleus.Dimension, bool) {
	limits := b.amounts()
	for _, d := range nucleus.Dimensions() {
		if d.Over(nucleus.AddAmounts(*c.Spent.Of(d), *c.Reserved.Of(d)), *limits.Of(d)) {
			return d, true
		}
	}
	return 0, false
}

func (b budget) explain(d nucleus.Dimension, c *nucleus.Context) string {
	limits := b.amounts()
	return d.Explain(*c.Spent.Of(d), *c.Reserved.Of(d), *limits.Of(d))
}

var noBudgetLimit = budget{unlimited, unlimited, unlimited}

func (b budget) leq(c budget) bool {
	return b.microUSD <= c.microUSD && b.tokens <= c.tokens && b.seconds <= c.seconds
}

func (b budget) meet(c budget) budget {
	return budget{min(b.microUSD, c.microUSD), min(b.tokens, c.tokens), min(b.seconds, c.seconds)}
}

func (b budget) join(c budget) budget {
	return budget{max(b.microUSD, c.microUSD), max(b.tokens, c.tokens), max(b.seconds, c.seconds)}
}

// window is the time from <= now < until, in milliseconds since 1970. Its zero
// value is the one empty window.
type window struct {
	from, until int64
}

var always = window{math.MinInt64, math.MaxInt64}

func (w window) contains(ms int64) bool { return w.from <= ms && ms < w.until }

func (w window) normal() window {
	if w.from >= w.until {
		return window{}
	}
	return w
}

func (w window) leq(v window) bool {
	return w == window{} || v.from <= w.from && w.until <= v.until
}

func (w window) meet(v window) window {
	return window{max(w.from, v.from), min(w.until, v.until)}.normal()
}

// join is the hull: the least window that holds both.
func (w window) join(v window) window {
	if (w == window{}) {
		return v
	}
	if (v == window{}) {
		return w
	}
	return window{min(w.from, v.from), max(w.until, v.until)}
}

func formatTime(ms int64) string {
	return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.999Z07:00")
}
