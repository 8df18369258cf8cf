package audit

import (
	"encoding/json"
	"fmt"
	"slices"

	"cal/nucleus"
)

// The kinds of what the node's log and the authority's tell differently, or what either tells of
// approvals that may not be.
const (
	Ungranted ProblemKind = "ungranted"    // a grant that was used and that the authority's log lacks, or an effect without a use
	TooFew    ProblemKind = "too few"      // a use by fewer approvers than the ask needs
	TooOften  ProblemKind = "too often"    // more uses than were granted
	Uncounted ProblemKind = "uncounted"    // a use that the authority did not count before
	Revoked   ProblemKind = "used revoked" // a use of what was taken back before
)

// Compare holds the node's log against the authority's, which another process writes
// under another key: what was used is what the authority gave, for that ask, by as many approvers as
// it needs, as often as they said, counted by the authority and not taken back before;
// what needed an approval was let through by such a use;
// and an ask that the authority was shown stands in the node's log, of the same digest.
// So a node's log that was cut or written anew by its key's holder is found out where it
// forgets what a person was asked. Both may be written meanwhile. Verify each first.
func Compare(node, authority string) ([]Problem, error) {
	// What is recorded first is read last.
	effects, err := approved(node)
	if err != nil {
		return nil, err
	}
	uses, err := approvals(node, nucleus.KindApprovalUse)
	if err != nil {
		return nil, err
	}
	decisions, err := approvals(authority, "approval.*")
	if err != nil {
		return nil, err
	}
	asks, err := approvals(node, nucleus.KindApprovalAsk)
	if err != nil {
		return nil, err
	}
	book := approvalBook{asks: map[string]*askedFor{}, problems: []Problem{}}
	for _, e := range decisions {
		book.decided(e)
	}
	for _, e := range uses {
		book.used(e)
	}
	for _, e := range effects {
		book.let(e)
	}
	asked := map[string]string{} // ask: digest
	for _, e := range asks {
		asked[e.Ask] = e.Digest
	}
	for _, e := range decisions {
		if e.Kind != nucleus.KindApprovalAsk {
			continue
		}
		switch digest, ok := asked[e.Ask]; {
		case !ok:
			book.problem(-1, Missing, "the authority was shown ask %s (its entry %d), which the node's log does not have", e.Ask, e.Seq)
		case digest != e.Digest:
			book.problem(-1, Changed, "ask %s has digest %s in the node's log, %s in the authority's (entry %d)", e.Ask, digest, e.Digest, e.Seq)
		}
	}
	return book.problems, nil
}

// askedFor is what both logs tell of one ask.
type askedFor struct {
	given   map[string]string // grant: approver
	need    int
	most    int // uses that were granted
	counted []string
	revoked []string // grants
	used    map[string]bool
	passage bool // a use of it opened one
}

type approvalBook struct {
	asks     map[string]*askedFor
	problems []Problem
}

func (b *approvalBook) problem(seq int64, kind ProblemKind, format string, args ...any) {
	b.problems = append(b.problems, Problem{seq, kind, "", fmt.Sprintf(format, args...)})
}

func (b *approvalBook) of(ask string) *askedFor {
	if b.asks[ask] == nil {
		b.asks[ask] = &askedFor{given: map[string]string{}, need: 1, most: 1, used: map[string]bool{}}
	}
	return b.asks[ask]
}

// decided takes note of an entry of the authority's log.
func (b *approvalBook) decided(e nucleus.Entry) {
	a := b.of(e.Ask)
	switch e.Kind {
	case nucleus.KindApprovalGrant:
		var told struct {
			Need int           `json:"need"`
			Task *nucleus.Task `json:"task"`
		}
		if json.Unmarshal(e.Data, &told) == nil {
			a.need = max(a.need, told.Need)
			if told.Task != nil {
				a.most = told.Task.Uses
			}
		}
		for _, grant := range e.Grants {
			a.given[grant] = e.Actor
		}
	case nucleus.KindApprovalRevoke:
		a.revoked = append(a.revoked, e.Grants...)
	case nucleus.KindApprovalUse:
		a.counted = append(a.counted, e.Permit)
		if len(a.counted) > a.most {
			b.problem(-1, TooOften, "the authority counted use %d of ask %s (its entry %d), of %d that were granted", len(a.counted), e.Ask, e.Seq, a.most)
		}
		for _, grant := range e.Grants {
			if slices.Contains(a.revoked, grant) {
				b.problem(-1, Revoked, "the authority counted a use of grant %s (its entry %d), which was taken back before", grant, e.Seq)
			}
		}
	}
}

// used holds a use in the node's log against what the authority's tells.
func (b *approvalBook) used(e nucleus.Entry) {
	a := b.of(e.Ask)
	by, known := map[string]bool{}, true
	for _, grant := range e.Grants {
		approver, ok := a.given[grant]
		if !ok {
			known = false
			b.problem(e.Seq, Ungranted, "it uses grant %s for ask %s, which the authority's log does not have", grant, e.Ask)
		}
		by[approver] = true
	}
	if !known {
		return
	}
	if len(by) < a.need {
		b.problem(e.Seq, TooFew, "it uses the grants of %d approvers for ask %s, which needs %d", len(by), e.Ask, a.need)
	}
	var told struct {
		N       int
		Passage json.RawMessage
	}
	_ = json.Unmarshal(e.Data, &told) // a log of before uses were numbered: 0
	a.passage = a.passage || told.Passage != nil
	if told.N > 0 && !slices.Contains(a.counted, e.Permit) {
		b.problem(e.Seq, Uncounted, "it uses what was granted for ask %s under permit %s, which the authority did not count", e.Ask, e.Permit)
	}
	if a.used[e.Permit] = true; len(a.used) > a.most {
		b.problem(e.Seq, TooOften, "it is use %d of ask %s, of %d that were granted", len(a.used), e.Ask, a.most)
	}
}

// let holds an effect that needed an approval, and was let through, against the uses: it is
// one of them, or goes through a passage that one of them opened.
func (b *approvalBook) let(e nucleus.Entry) {
	a := b.of(e.Ask)
	permit := permitOf(e)
	if len(e.Grants) > 0 && (a.used[permit] || a.passage) {
		return
	}
	b.problem(e.Seq, Ungranted, "%s was let through under permit %s for ask %q, and no use of what was granted says so", e.Op, permit, e.Ask)
}

// permitOf is the permit of an intent; a program's connection has the id of its attempt.
func permitOf(e nucleus.Entry) string {
	if e.Permit != "" {
		return e.Permit
	}
	var data struct{ Attempt string }
	_ = json.Unmarshal(e.Data, &data) // then it has none
	return data.Attempt
}

// approved are the intents that needed an approval and were let through.
func approved(dir string) (list []nucleus.Entry, err error) {
	for raw, err := range Find(dir, 0, Filter{Kind: nucleus.KindIntent, Verdict: nucleus.Ask}) {
		if err != nil {
			return nil, err
		}
		e, err := ParseEntry(raw)
		if err != nil {
			return nil, err
		}
		if e.Status == "" {
			list = append(list, e)
		}
	}
	return list, nil
}

func approvals(dir, kind string) (list []nucleus.Entry, err error) {
	for raw, err := range Find(dir, 0, Filter{Kind: kind}) {
		if err != nil {
			return nil, err
		}
		e, err := ParseEntry(raw)
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}
