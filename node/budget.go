package node

import (
	"errors"
	"fmt"
	"io/fs"

	"cal/internal/durable"
	"cal/nucleus"
)

// The budget of a root session is a tree of accounts, one for each of its pods. A pod
// whose policy names a limit has an account with a limit of its own, which is set aside
// from what its parent has; one that names none draws on its parent as it spends. So
// neither can a pod spend what another was promised, nor can many small pods spend more
// than the one that made them has.
//
// What is spent is a session's: it lies with the pod's record, survives the node, and
// ends with the pod. (Exposure is a workspace's.) Spending cannot always be foreseen: the
// last spend of an account may go beyond its limit, and what goes beyond is its parent's
// at once.

// ledger holds the accounts. The mutex of the root session guards it.
type ledger struct {
	file     string              // "" once the session is over
	Accounts map[string]*account `json:"accounts"` // by pod
	Holds    map[string]hold     `json:"holds,omitempty"`
	unstored bool                // something was spent that is not in the file
}

// account is what one pod may spend and has spent. A dimension without a limit of its
// own is nucleus.Unlimited.
type account struct {
	Parent   string          `json:"parent,omitempty"`
	Limit    nucleus.Amounts `json:"limit"`
	Spent    nucleus.Amounts `json:"spent"`    // its own, what sub-pods drew on it, and what those that ended had spent
	Reserved nucleus.Amounts `json:"reserved"` // limits of its open sub-pods
	Beyond   nucleus.Amounts `json:"beyond"`   // of what is spent: beyond the limit, and charged above
	Closed   bool            `json:"closed,omitempty"`

	Since     int64    `json:"since_ms,omitempty"`  // while its clock runs: up to when that is in Spent, on the host's monotonic clock
	Estimated int64    `json:"estimated,omitempty"` // calls to the model that were charged by an estimate
	Unpriced  []string `json:"unpriced,omitempty"`  // models that were charged like the dearest
	Stopped   string   `json:"stopped,omitempty"`   // the rule by which its session was stopped

	running int   // what its clock runs for
	frozen  bool  // the machine stands still
	stored  int64 // Spent.Millis, as it was last stored
}

// hold is what something under way is taken to cost, until it is known.
type hold struct {
	Pod     string          `json:"pod"`
	Amounts nucleus.Amounts `json:"amounts"`
	Lost    nucleus.Amounts `json:"lost"` // charged when its node does not come to know
}

// openLedger reads what an earlier node left; what was under way there counts as spent.
func openLedger(file string) (*ledger, error) {
	l := &ledger{file: file, Accounts: map[string]*account{}, Holds: map[string]hold{}}
	err := durable.Load(file, l)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, err
	}
	if err := l.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for id, h := range l.Holds {
		l.charge(h.Pod, h.Lost)
		l.Accounts[h.Pod].Estimated++
		delete(l.Holds, id)
	}
	return l, nil
}

// check reports what no node can have written.
func (l *ledger) check() error {
	if l.Accounts == nil {
		return errors.New("there are no accounts")
	}
	if l.Holds == nil {
		l.Holds = map[string]hold{}
	}
	for pod, a := range l.Accounts {
		if a == nil {
			return fmt.Errorf("account %s is empty", pod)
		}
		for _, amounts := range []nucleus.Amounts{a.Limit, a.Spent, a.Reserved, a.Beyond} {
			if negative(amounts) {
				return fmt.Errorf("account %s has an amount below 0", pod)
			}
		}
	}
	for pod, a := range l.Accounts {
		for above := range len(l.Accounts) + 1 {
			if a.Parent == "" {
				break
			}
			if l.Accounts[a.Parent] == nil || above == len(l.Accounts) {
				return fmt.Errorf("account %s is below no root", pod)
			}
			a = l.Accounts[a.Parent]
		}
	}
	for id, h := range l.Holds {
		if l.Accounts[h.Pod] == nil || negative(h.Amounts) || negative(h.Lost) {
			return fmt.Errorf("what call %s holds is of no account, or below 0", id)
		}
	}
	return nil
}

func negative(a nucleus.Amounts) bool { return a.MicroUSD < 0 || a.Tokens < 0 || a.Millis < 0 }

// limited reports whether anything limits what the pod spends.
func (l *ledger) limited(pod string) bool {
	for _, d := range nucleus.Dimensions() {
		if l.payer(pod, d) != nil {
			return true
		}
	}
	return false
}

func (l *ledger) store() error {
	if l.file == "" {
		return nil // the session is over
	}
	if err := durable.Store(l.file, l); err != nil {
		return fmt.Errorf("recording the budget: %w", err)
	}
	l.unstored = false
	return nil
}

// payer is the account that pays for a pod in a dimension: the nearest, from the pod's own
// upwards, that is open and has a limit; nil where nothing limits.
func (l *ledger) payer(pod string, d nucleus.Dimension) *account {
	for a := l.Accounts[pod]; a != nil; a = l.Accounts[a.Parent] {
		if !a.Closed && *a.Limit.Of(d) != nucleus.Unlimited {
			return a
		}
	}
	return nil
}

// charge spends for a pod, on its account and those above: beyond one that pays, only what
// its limit does not cover. An account that was closed pays nothing any more.
func (l *ledger) charge(pod string, amounts nucleus.Amounts) {
	for _, d := range nucleus.Dimensions() {
		l.chargeOne(l.Accounts[pod], d, *amounts.Of(d))
	}
}

func (l *ledger) chargeOne(a *account, d nucleus.Dimension, amount int64) {
	for ; a != nil && amount > 0; a = l.Accounts[a.Parent] {
		if a.Closed {
			continue
		}
		spent, beyond, limit := a.Spent.Of(d), a.Beyond.Of(d), *a.Limit.Of(d)
		if limit != nucleus.Unlimited && l.payer(a.Parent, d) != nil {
			// What the limit covers was set aside above.
			covered := min(amount, max(0, limit-(*spent-*beyond)-*a.Reserved.Of(d)))
			*spent = nucleus.AddAmounts(*spent, amount)
			amount -= covered
			*beyond += amount
			continue
		}
		*spent = nucleus.AddAmounts(*spent, amount)
	}
}

// left is what a pod may still spend in each dimension, less what is held; below 0 when
// more was spent than there was.
func (l *ledger) left(pod string) nucleus.Amounts {
	seen := l
	if len(l.Holds) > 0 { // as if it were spent
		seen = &ledger{Accounts: make(map[string]*account, len(l.Accounts))}
		for id, a := range l.Accounts {
			copied := *a
			seen.Accounts[id] = &copied
		}
		for _, h := range l.Holds {
			seen.charge(h.Pod, h.Amounts)
		}
	}
	left := nucleus.NoLimit()
	for _, d := range nucleus.Dimensions() {
		if a := seen.payer(pod, d); a != nil {
			*left.Of(d) = *a.Limit.Of(d) - *a.Spent.Of(d) - *a.Reserved.Of(d)
		}
	}
	return left
}

// used is what stands against the limits that hold for a pod: of the account that pays
// where there is one, else of the pod's own.
func (l *ledger) used(pod string) (spent, reserved nucleus.Amounts) {
	own := l.Accounts[pod]
	if own == nil {
		return spent, reserved
	}
	for _, d := range nucleus.Dimensions() {
		a := l.payer(pod, d)
		if a == nil {
			a = own
		}
		*spent.Of(d), *reserved.Of(d) = *a.Spent.Of(d), *a.Reserved.Of(d)
	}
	return spent, reserved
}

// openAccount gives a pod its account, durably: below its parent's, or as the root where
// parent is "". limit is nucleus.Unlimited where the pod names none of its own. More than is
// left of what pays for the parent is refused, with rule budget.*. An account that is there
// already stays as it is. The caller holds the session's mutex.
func (s *rootSession) openAccount(pod, parent string, limit nucleus.Amounts) error {
	l := s.budget
	if l.Accounts[pod] != nil {
		return nil
	}
	above := l.Accounts[parent]
	if parent != "" && (above == nil || above.Closed) {
		return nucleus.Errorf(nucleus.KindUnavailable, "pod %s has no budget to take from: it has ended", parent)
	}
	left := l.left(parent)
	for _, d := range nucleus.Dimensions() {
		if want, have := *limit.Of(d), *left.Of(d); parent != "" && want != nucleus.Unlimited && want > max(0, have) {
			return &nucleus.Error{
				Kind: nucleus.KindDenied, Rule: d.Rule(),
				Message: fmt.Sprintf("a budget of %s %s was asked for, and %s %s are left", d.Text(want), d.Unit(), d.Text(max(0, have)), d.Unit()),
			}
		}
	}
	reserve := func(sign int64) {
		for _, d := range nucleus.Dimensions() {
			if from := l.payer(parent, d); from != nil && *limit.Of(d) != nucleus.Unlimited {
				*from.Reserved.Of(d) += sign * *limit.Of(d)
			}
		}
	}
	reserve(1)
	l.Accounts[pod] = &account{Parent: parent, Limit: limit}
	if err := l.store(); err != nil {
		delete(l.Accounts, pod)
		reserve(-1)
		return err
	}
	return nil
}

// closeAccount ends the account of a pod and of all pods below it: its parent has back what
// it did not spend. What comes later for the pod is its parent's. The root's account stays.
// The caller holds the session's mutex.
func (s *rootSession) closeAccount(pod string) error {
	l := s.budget
	a := l.Accounts[pod]
	if a == nil || a.Closed || a.Parent == "" {
		return nil
	}
	l.settle(pod, a)
	return l.store()
}

// renameAccount gives the account of a pod that was not there yet the name that the pod got. The
// caller holds the session's mutex.
func (s *rootSession) renameAccount(from, to string) error {
	l := s.budget
	if from == to {
		return nil
	}
	l.Accounts[to] = l.Accounts[from]
	delete(l.Accounts, from)
	if err := l.store(); err != nil {
		l.Accounts[from] = l.Accounts[to]
		delete(l.Accounts, to)
		return err
	}
	return nil
}

func (l *ledger) settle(pod string, a *account) {
	for id, below := range l.Accounts {
		if below.Parent == pod && !below.Closed {
			l.settle(id, below)
		}
	}
	a.Closed = true
	for _, d := range nucleus.Dimensions() {
		limit := *a.Limit.Of(d)
		from := l.payer(a.Parent, d)
		if limit != nucleus.Unlimited && from != nil { // else it was charged there as it spent
			*from.Reserved.Of(d) -= limit
			l.chargeOne(l.Accounts[a.Parent], d, *a.Spent.Of(d)-*a.Beyond.Of(d))
		}
	}
}

// spend charges a pod for what was used up, durably where that decides anything: what nothing
// limits is stored with the clocks. The caller holds the session's mutex.
func (s *rootSession) spend(pod string, amounts nucleus.Amounts) error {
	s.budget.charge(pod, amounts)
	if !s.budget.limited(pod) {
		s.budget.unstored = true
		return nil
	}
	return s.budget.store()
}

// left is what the pod may still spend. The caller holds the session's mutex.
func (s *rootSession) left(pod string) nucleus.Amounts { return s.budget.left(pod) }
