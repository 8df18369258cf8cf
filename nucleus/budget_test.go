package nucleus

import "testing"

func TestAmountText(t *testing.T) {
	for _, c := range []struct {
		d      Dimension
		amount int64
		want   string
	}{
		{USD, 0, "0.00"}, {USD, 5_020_000, "5.02"}, {USD, 1, "0.000001"}, {USD, 1_500_000, "1.50"}, {USD, 12_345_600, "12.3456"},
		{Tokens, 1200, "1200"}, {Seconds, 60_000, "60"}, {Seconds, 1_250, "1.25"}, {Seconds, 7, "0.007"}, {USD, Unlimited, "unlimited"},
	} {
		if got := c.d.Text(c.amount); got != c.want {
			t.Errorf("%s of %d: %q, want %q", c.d, c.amount, got, c.want)
		}
	}
}

func TestAmountsDoNotOverflow(t *testing.T) {
	a := Amounts{Unlimited, Unlimited - 1, 5}
	if got, want := a.Plus(Amounts{1, 5, 6}), (Amounts{Unlimited, Unlimited, 11}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestOver(t *testing.T) {
	for _, c := range []struct {
		used, limit          int64
		usd, tokens, seconds bool
	}{
		{0, 0, false, false, true}, {1, 0, true, true, true}, {4, 5, false, false, false}, {5, 5, true, true, true}, {6, 5, true, true, true},
		{Unlimited, Unlimited, false, false, false}, {Unlimited, Unlimited - 1, true, true, true},
	} {
		for d, want := range map[Dimension]bool{USD: c.usd, Tokens: c.tokens, Seconds: c.seconds} {
			if got := d.Over(c.used, c.limit); got != want {
				t.Errorf("%s: %d of %d is over: %v, want %v", d, c.used, c.limit, got, want)
			}
		}
	}
}
