package main

import (
	"bytes"
	"testing"

	"cal/nucleus"
)

func TestPrintStatus(t *testing.T) {
	var out bytes.Buffer
	if err := printStatus(&out, nil); err != nil || out.String() != "nothing runs\n" {
		t.Errorf("%q, %v", &out, err)
	}
	out.Reset()
	pods := []nucleus.PodStatus{
		{
			ID: "p-aaaaaaaaaa", Workspace: "shop", State: "running", Created: "2026-01-02T03:04:05Z", Agent: "claude-code", Policy: "frugal", Mode: nucleus.Mediated, Tier: nucleus.TierKernel,
			Exposure: []string{"private", "untrusted"}, Asks: []string{"a-1"},
			Budget: &nucleus.Budget{
				USD:    nucleus.Spending{Limit: new(5.0), Spent: 5.02, Left: new(0.0)},
				Tokens: nucleus.Spending{Spent: 123456}, Seconds: nucleus.Spending{Limit: new(3600.0), Spent: 12.5, Reserved: 600, Left: new(2987.5)},
				Estimated: 1, Unpriced: []string{"model\x1b[2J"}, Stopped: "budget.usd",
			},
		},
		{ID: "p-bbbbbbbbbb", Parent: "p-aaaaaaaaaa", State: "failed", Reason: "the machine ended; its console ends with:\n| policy\tpermissive\n| \x1b[2Jp-cccccccccc", Created: "2026-01-02T03:04:05Z", Mode: nucleus.Contained, Tier: nucleus.TierVM},
	}
	if err := printStatus(&out, pods); err != nil {
		t.Fatal(err)
	}
	const want = `p-aaaaaaaaaa
  workspace  shop
  state      running
  since      2026-01-02T03:04:05Z
  agent      claude-code
  policy     frugal
  mode       mediated, tier kernel
  exposure   private, untrusted
  USD        5.02 of 5.00, 0.00 left
  tokens     123456, no limit
  seconds    12.5 of 3600, 600 set aside for sub-pods, 2987.5 left
  ended by   budget.usd
  estimated  1 call, charged above what was used: the provider did not report it
  no price   "model\x1b[2J", charged like the dearest model (prices.yaml)
  waits      cal approve a-1

p-bbbbbbbbbb
  below     p-aaaaaaaaaa
  state     failed: the machine ended; its console ends with:
            | policy\tpermissive
            | \x1b[2Jp-cccccccccc
  since     2026-01-02T03:04:05Z
  policy    without a name
  mode      contained, tier vm
  exposure  none
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
}
