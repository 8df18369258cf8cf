package nucleus

import (
	"fmt"
	"math"
)

// Unlimited is an amount of a budget that nothing limits.
const Unlimited = math.MaxInt64

// Dimension is what a budget counts.
type Dimension int

// The dimensions.
const (
	USD Dimension = iota
	Tokens
	Seconds
)

// Dimensions lists them, in the order in which they are judged.
func Dimensions() [3]Dimension { return [3]Dimension{USD, Tokens, Seconds} }

// Rule names the dimension in decisions, and in policies.
func (d Dimension) Rule() string {
	return [...]string{"budget.usd", "budget.tokens", "budget.seconds"}[d]
}

func (d Dimension) String() string { return [...]string{"usd", "tokens", "seconds"}[d] }

// Amounts are an amount of each dimension: millionths of a US dollar, tokens as the
// providers of models count them, milliseconds.
type Amounts struct {
	MicroUSD int64 `json:"micro_usd,omitempty"`
	Tokens   int64 `json:"tokens,omitempty"`
	Millis   int64 `json:"ms,omitempty"`
}

// NoLimit is the budget that limits nothing.
func NoLimit() Amounts { return Amounts{Unlimited, Unlimited, Unlimited} }

// Of returns the amount of one dimension.
func (a *Amounts) Of(d Dimension) *int64 {
	switch d {
	case USD:
		return &a.MicroUSD
	case Tokens:
		return &a.Tokens
	}
	return &a.Millis
}

// Plus is the sum; a dimension that would overflow is Unlimited.
func (a Amounts) Plus(b Amounts) Amounts {
	return Amounts{AddAmounts(a.MicroUSD, b.MicroUSD), AddAmounts(a.Tokens, b.Tokens), AddAmounts(a.Millis, b.Millis)}
}

// AddAmounts adds two amounts that are not negative; what would overflow is Unlimited.
func AddAmounts(a, b int64) int64 {
	if a > Unlimited-b {
		return Unlimited
	}
	return a + b
}

// Over reports whether nothing is left of limit once used is used up. A limit of 0 in
// dollars or tokens is for a session that calls no model: it is not over before the first
// of them. One of 0 seconds is over from the start.
func (d Dimension) Over(used, limit int64) bool {
	return used >= limit && limit != Unlimited && (used > 0 || d == Seconds)
}

// Text writes an amount for a person, without its unit: "5.02", "1200", "12.5".
func (d Dimension) Text(amount int64) string {
	switch {
	case amount == Unlimited:
		return "unlimited"
	case d == USD:
		return decimal(amount, 1e6, 2)
	case d == Seconds:
		return decimal(amount, 1e3, 0)
	}
	return fmt.Sprint(amount)
}

// Unit is the word behind an amount.
func (d Dimension) Unit() string { return [...]string{"USD", "tokens", "seconds"}[d] }

// decimal writes n/scale exactly, with at least the given number of decimals.
func decimal(n, scale int64, least int) string {
	digits := len(fmt.Sprint(scale)) - 1
	fraction := fmt.Sprintf("%0*d", digits, n%scale)
	for len(fraction) > least && fraction[len(fraction)-1] == '0' {
		fraction = fraction[:len(fraction)-1]
	}
	if fraction == "" {
		return fmt.Sprint(n / scale)
	}
	return fmt.Sprintf("%d.%s", n/scale, fraction)
}

// Explain says how much of a limit is used up.
func (d Dimension) Explain(spent, reserved, limit int64) string {
	text := fmt.Sprintf("the budget is spent: %s of %s %s", d.Text(spent), d.Text(limit), d.Unit())
	if reserved > 0 {
		text += fmt.Sprintf(", and %s are set aside for sub-pods", d.Text(reserved))
	}
	return text
}

// Number is an amount in US dollars, tokens or seconds.
func (d Dimension) Number(amount int64) float64 {
	return float64(amount) / [...]float64{1e6, 1, 1e3}[d]
}

// Amount is Number undone.
func (d Dimension) Amount(number float64) int64 {
	return int64(math.Round(number * [...]float64{1e6, 1, 1e3}[d]))
}
