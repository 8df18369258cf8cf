package node

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"cal/egress"
	"cal/nucleus"
)

func newSession(t interface{ Fatal(...any) }, dir string) *rootSession {
	s, err := openSession("s-1", dir, dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func usd(whole int64) nucleus.Amounts {
	a := nucleus.NoLimit()
	a.MicroUSD = whole * 1e6
	return a
}

// spentUSD is an amount to spend.
func spentUSD(whole int64) nucleus.Amounts { return nucleus.Amounts{MicroUSD: whole * 1e6} }

// A child's limit is debited from its parent when it is made, and what it did not spend
// comes back when it ends.
func TestBudgetIsDebitedFromTheParent(t *testing.T) {
	s := newSession(t, t.TempDir())
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	left := func(pod string, want int64) {
		t.Helper()
		if got := s.left(pod).MicroUSD; got != want*1e6 {
			t.Fatalf("%s has %d left, want %d", pod, got, want*1e6)
		}
	}
	must(s.openAccount("root", "", usd(10)))
	must(s.openAccount("child", "root", usd(6)))
	left("root", 4)
	var refused *nucleus.Error
	err := s.openAccount("greedy", "root", usd(5))
	if !errors.As(err, &refused) || refused.Kind != nucleus.KindDenied || refused.Rule != "budget.usd" || refused.Message != "a budget of 5.00 USD was asked for, and 4.00 USD are left" {
		t.Fatalf("more than is left was given: %v", err)
	}
	left("root", 4)
	must(s.openAccount("free", "root", nucleus.NoLimit())) // draws on root
	must(s.openAccount("grandchild", "child", usd(2)))
	must(s.spend("free", spentUSD(1)))
	left("root", 3)
	left("free", 3)
	left("child", 4)
	must(s.spend("grandchild", spentUSD(2)))
	must(s.spend("child", spentUSD(3)))
	left("child", 1)
	left("root", 3)
	must(s.closeAccount("child")) // and grandchild: 5 of 6 were spent
	left("root", 4)
	must(s.spend("grandchild", spentUSD(1))) // a call that ended late
	left("root", 3)
	left("grandchild", 3) // it draws on who is left
	if err := s.openAccount("orphan", "child", usd(0)); err == nil {
		t.Fatal("an ended pod has a new child")
	}
	must(s.closeAccount("free"))
	left("root", 3)

	again, err := openSession("s-1", filepath.Dir(s.file), filepath.Dir(s.file))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := again.left("root"), s.left("root"); got != want {
		t.Fatalf("another node finds %+v left, want %+v", got, want)
	}
	must(again.openAccount("root", "", usd(1000))) // what is there stays
	if got := again.left("root").MicroUSD; got != 3e6 {
		t.Fatalf("a session that was opened again has %d left", got)
	}
}

// What goes beyond a child's limit is its parent's at once: a parent cannot spend more
// than it has by children that each go beyond theirs.
func TestOvershootIsTheParents(t *testing.T) {
	s := newSession(t, t.TempDir())
	if err := s.openAccount("root", "", usd(10)); err != nil {
		t.Fatal(err)
	}
	var total int64
	for i := range 100 {
		child := fmt.Sprint("child", i)
		if err := s.openAccount(child, "root", usd(1)); err != nil {
			break
		}
		total += 4
		if err := s.spend(child, spentUSD(4)); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := s.closeAccount(child); err != nil {
				t.Fatal(err)
			}
		}
	}
	if total > 10+4 || total < 10 {
		t.Fatalf("children of 1 USD each spent %d USD of a budget of 10", total)
	}
}

func TestBudgetLaws(t *testing.T) {
	dir, err := os.MkdirTemp(memory(), "calb-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	rapid.Check(t, func(rt *rapid.T) {
		s := &rootSession{budget: &ledger{file: filepath.Join(dir, budgetFile), Accounts: map[string]*account{}, Holds: map[string]hold{}}}
		limit := func() nucleus.Amounts {
			amount := rapid.OneOf(rapid.Int64Range(0, 50), rapid.Just(int64(nucleus.Unlimited)))
			return nucleus.Amounts{MicroUSD: amount.Draw(rt, "usd"), Tokens: amount.Draw(rt, "tokens"), Millis: amount.Draw(rt, "ms")}
		}
		if err := s.openAccount("p0", "", limit()); err != nil {
			rt.Fatal(err)
		}
		l := s.budget
		pods := []string{"p0"}
		overshoot := map[*account]nucleus.Amounts{} // by the last spends of those below
		all := nucleus.Amounts{}
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			pod := rapid.SampledFrom(pods).Draw(rt, "pod")
			switch rapid.SampledFrom([]string{"open", "spend", "spend", "close"}).Draw(rt, "step") {
			case "open":
				child := fmt.Sprint("p", len(pods))
				if err := s.openAccount(child, pod, limit()); err == nil {
					pods = append(pods, child)
				}
			case "spend":
				left := s.left(pod)
				amounts := nucleus.Amounts{}
				for _, d := range nucleus.Dimensions() {
					if *left.Of(d) > 0 { // nobody begins to spend what is not there
						*amounts.Of(d) = rapid.Int64Range(0, 30).Draw(rt, d.String())
					}
				}
				before := map[*account]nucleus.Amounts{}
				for _, a := range l.Accounts {
					before[a] = a.Spent.Plus(a.Reserved)
				}
				payers := [3]*account{}
				for i, d := range nucleus.Dimensions() {
					payers[i] = l.payer(pod, d)
				}
				if err := s.spend(pod, amounts); err != nil {
					rt.Fatal(err)
				}
				all = all.Plus(amounts)
				for i, d := range nucleus.Dimensions() {
					if a := payers[i]; a != nil && *a.Limit.Of(d)-*a.Spent.Of(d)-*a.Reserved.Of(d) <= -*amounts.Of(d) && *amounts.Of(d) > 0 {
						rt.Fatalf("%s of the payer: more than the last spend, %d, is beyond: %+v", d, *amounts.Of(d), a)
					}
					for _, a := range l.Accounts {
						grown := overshoot[a]
						was, is := before[a], a.Spent.Plus(a.Reserved)
						limit := *a.Limit.Of(d)
						*grown.Of(d) += max(0, *is.Of(d)-max(limit, *was.Of(d)))
						overshoot[a] = grown
					}
				}
			case "close":
				if err := s.closeAccount(pod); err != nil {
					rt.Fatal(err)
				}
			}
			for id, a := range l.Accounts {
				for _, d := range nucleus.Dimensions() {
					var reserved int64
					for _, child := range l.Accounts {
						if !child.Closed && *child.Limit.Of(d) != nucleus.Unlimited && l.payer(child.Parent, d) == a {
							reserved += *child.Limit.Of(d)
						}
					}
					if got := *a.Reserved.Of(d); !a.Closed && got != reserved {
						rt.Fatalf("%s of %s: %d are reserved, its open children's limits are %d", d, id, got, reserved)
					}
					beyond := overshoot[a]
					if limit := *a.Limit.Of(d); limit != nucleus.Unlimited && !a.Closed && l.payer(a.Parent, d) != nil && *a.Spent.Of(d)-*a.Beyond.Of(d)+*a.Reserved.Of(d) > limit {
						rt.Fatalf("%s of %s: more than the limit is not charged above: %+v", d, id, a)
					}
					if limit := *a.Limit.Of(d); limit != nucleus.Unlimited && !a.Closed && *a.Spent.Of(d)+*a.Reserved.Of(d) > limit+*beyond.Of(d) {
						rt.Fatalf("%s of %s: spent %d and reserved %d of %d, and last spends went only %d beyond", d, id, *a.Spent.Of(d), *a.Reserved.Of(d), limit, *beyond.Of(d))
					}
				}
			}
		}
		for _, pod := range slices.Sorted(maps.Keys(l.Accounts)) {
			if err := s.closeAccount(pod); err != nil {
				rt.Fatal(err)
			}
		}
		if got := l.Accounts["p0"].Spent; got != all || l.Accounts["p0"].Reserved != (nucleus.Amounts{}) {
			rt.Fatalf("all was closed: the root has spent %+v and reserved %+v, want %+v and nothing", got, l.Accounts["p0"].Reserved, all)
		}
	})
}

func TestBudgetAtTheSameTime(t *testing.T) {
	s := newSession(t, t.TempDir())
	if err := s.openAccount("root", "", usd(20)); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	var spent int64
	for i := range 8 {
		work.Go(func() {
			for j := range 20 {
				child := fmt.Sprint("child", i, ".", j)
				s.mu.Lock()
				err := s.openAccount(child, "root", usd(2))
				s.mu.Unlock()
				if err != nil {
					continue
				}
				for range 2 {
					s.mu.Lock()
					if s.left(child).MicroUSD > 0 && s.spend(child, spentUSD(1)) == nil {
						mu.Lock()
						spent++
						mu.Unlock()
					}
					s.mu.Unlock()
				}
				s.mu.Lock()
				if err := s.closeAccount(child); err != nil {
					t.Error(err)
				}
				s.mu.Unlock()
			}
		})
	}
	work.Wait()
	if root := s.budget.Accounts["root"]; spent != 20 || root.Spent != spentUSD(20) || root.Reserved != (nucleus.Amounts{}) {
		t.Fatalf("children spent %d of 20 USD; the root has spent %+v, reserved %+v", spent, root.Spent, root.Reserved)
	}
}

// A request of a session whose budget is spent is denied, by both locks, and recorded; with
// something left it passes.
func TestSpentBudgetDenies(t *testing.T) {
	h := newHost(t)
	spec := specOf("w", []byte(`{"operations": {"read_files": "always"}, "budget": {"tokens": 100}}`))
	p := h.pod(spec, map[string]string{"a": "text"})
	spend := func(n int64) {
		p.root.mu.Lock()
		defer p.root.mu.Unlock()
		if err := p.root.spend(p.record.ID, nucleus.Amounts{Tokens: n}); err != nil {
			t.Fatal(err)
		}
	}
	read := func() answer { return h.tool(p, nucleus.ReadFiles, map[string]any{"path": "a"}) }
	spend(99)
	read().want(t, "")
	spend(5)
	e := read().want(t, nucleus.KindDenied, "the budget is spent: 104 of 100 tokens")
	if e.Rule != "budget.tokens" {
		t.Errorf("rule %q", e.Rule)
	}
	h.kill()
	h.start()
	if p = h.node.pods[p.record.ID]; p == nil {
		t.Fatal("the pod was not taken up again")
	}
	read().want(t, nucleus.KindDenied, "the budget is spent: 104 of 100 tokens")
	log := h.log()
	last := log[len(log)-1]
	if last.Kind != nucleus.KindIntent || last.Rule != "budget.tokens" || last.Status != nucleus.OutcomeRefused {
		t.Errorf("the log ends with %+v", last)
	}
}

// A pod whose budget is lost, or cannot be what a node wrote, does not go on with a new one.
func TestLostBudget(t *testing.T) {
	t.Parallel()
	account := func(s string) string {
		return `{"accounts": {"POD": {"limit": {}, "spent": {}, "reserved": {}, "beyond": {}` + s + `}}}`
	}
	for name, content := range map[string]string{
		"as it is":      "",
		"no file":       "-",
		"no accounts":   `{"accounts": {}}`,
		"null":          `{"accounts": null}`,
		"cut off":       `{"accounts": {"POD": {"li`,
		"empty":         `{"accounts": {"POD": null}}`,
		"of another":    strings.ReplaceAll(account(""), "POD", "p-other"),
		"below nothing": strings.Replace(account(""), `"spent": {}`, `"spent": {"tokens": -1000000}`, 1),
		"below itself":  account(`, "parent": "POD"`),
		"without above": account(`, "parent": "p-none"`),
		"held below":    strings.TrimSuffix(account(""), "}") + `, "holds": {"mc-1": {"pod": "POD", "amounts": {"tokens": -5}, "lost": {}}}}`,
		"held by none":  strings.TrimSuffix(account(""), "}") + `, "holds": {"mc-1": {"pod": "p-none", "amounts": {}, "lost": {}}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			p := h.budgetPod(`{"tokens": 1000}`)
			if err := h.callModel(p, callOf(p, "mc-1"), egress.Tokens{Input: 900}); err != nil {
				t.Fatal(err)
			}
			id, file := p.record.ID, filepath.Join(p.dir, budgetFile)
			h.kill()
			var err error
			switch content {
			case "":
			case "-":
				err = os.Remove(file)
			default:
				err = os.WriteFile(file, []byte(strings.ReplaceAll(content, "POD", id)), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			h.start()
			switch adopted := h.node.pods[id]; {
			case content == "" && (adopted == nil || h.spentOf(adopted).Tokens != 900):
				t.Errorf("the pod goes on as %+v, want 900 tokens spent", adopted)
			case content != "" && adopted != nil:
				t.Errorf("the pod goes on with %+v spent", h.spentOf(adopted))
			}
		})
	}
}
