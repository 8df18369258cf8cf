package audit

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"cal/nucleus"
)

// The kinds of what the node's log and the authority's tell differently, or what either tells of
// approvals that may not be.
const (
	Ungranted ProblemKind = "ungranted"    // a grant that was used and that the authority's log lacks, or an effect without a use
	TooFew    ProblemKind = "too few"      // a use by fewer approvers than the ask needs
	TooOften  ProblemKind = "too often"    // more uses than were granted
	Uncounted ProblemKind = "uncounted"    // a use that the authority did not count before
	Revoked   ProblemKind = "used revoked" // a use, or an effect through a passage, of what was taken back before
	Expired   ProblemKind = "used expired" // a use, or an effect through a passage, after its time
)

// lease is how long a passage may stand after it was taken back, or its time has passed, where the
// authority's word is late (doc/policy.md), and what lies between a decision and its entry.
const lease = 15 * time.Second

// Compare holds the node's log against the authority's, which another process writes
// under another key: what was used is what the authority gave, for that ask, by as many approvers as
// it needs, as often as they said and in its time, counted by the authority and not taken back before;
// what needed an approval was let through by such a use, or through a passage that one opened, before
// its time had passed or it was taken back (by the clocks of the two logs, which are one host's);
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
	closed, err := approvals(node, nucleus.KindApprovalRevoke)
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
	for _, e := range closed {
		book.closed(e)
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
	void    map[string]time.Time // grants, and when the authority took them back
	used    map[string]bool
	passage bool // a use of it opened one

	life   int64 // of the passage, in ms, as the authority has it; 0: not known
	until  int64 // when its task, or the passage, ends at the latest; 0: not known
	closed int64 // the node's entry that says so; 0: none
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
		b.asks[ask] = &askedFor{given: map[string]string{}, need: 1, most: 1, void: map[string]time.Time{}, used: map[string]bool{}}
	}
	return b.asks[ask]
}

// decided takes note of an entry of the authority's log.
func (b *approvalBook) decided(e nucleus.Entry) {
	a := b.of(e.Ask)
	switch e.Kind {
	case nucleus.KindApprovalGrant:
		var told struct {
			Need    int           `json:"need"`
			Task    *nucleus.Task `json:"task"`
			Passage int64         `json:"passage_ms"`
		}
		if json.Unmarshal(e.Data, &told) == nil {
			a.need, a.life = max(a.need, told.Need), told.Passage
			if told.Task != nil {
				a.most, a.until = told.Task.Uses, told.Task.Until
			}
		}
		for _, grant := range e.Grants {
			a.given[grant] = e.Actor
		}
	case nucleus.KindApprovalRevoke:
		for _, grant := range e.Grants {
			a.void[grant] = takenBack(e)
		}
	case nucleus.KindApprovalRefuse:
		var told struct{ Uncounted bool }
		if json.Unmarshal(e.Data, &told) == nil && told.Uncounted {
			a.counted = slices.DeleteFunc(a.counted, func(permit string) bool { return permit == e.Permit })
		}
	case nucleus.KindApprovalUse:
		a.counted = append(a.counted, e.Permit)
		at := timeIn(e)
		if a.life > 0 {
			a.until = at.UnixMilli() + a.life
		} else if a.until > 0 && at.After(time.UnixMilli(a.until).Add(lease)) {
			b.problem(-1, Expired, "the authority counted a use of ask %s (its entry %d) at %s, whose task ended at %s", e.Ask, e.Seq, e.Time, stamp(a.until))
		}
		if len(a.counted) > a.most {
			b.problem(-1, TooOften, "the authority counted use %d of ask %s (its entry %d), of %d that were granted", len(a.counted), e.Ask, e.Seq, a.most)
		}
		for _, grant := range e.Grants {
			if _, void := a.void[grant]; void {
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
		Passage *struct {
			Until int64 `json:"until_ms"`
		}
	}
	_ = json.Unmarshal(e.Data, &told) // a log of before uses were numbered: 0
	if told.Passage != nil {
		a.passage = true
		if until := told.Passage.Until; until > 0 && (a.until == 0 || until < a.until) {
			a.until = until
		}
	}
	if told.N > 0 && !slices.Contains(a.counted, e.Permit) {
		b.problem(e.Seq, Uncounted, "it uses what was granted for ask %s under permit %s, which the authority did not count", e.Ask, e.Permit)
	}
	if a.used[e.Permit] = true; len(a.used) > a.most {
		b.problem(e.Seq, TooOften, "it is use %d of ask %s, of %d that were granted", len(a.used), e.Ask, a.most)
	}
}

// closed takes note of the node's entry that something was taken back.
func (b *approvalBook) closed(e nucleus.Entry) {
	if a := b.of(e.Ask); a.closed == 0 {
		a.closed = e.Seq
	}
}

// let holds an effect that needed an approval, and was let through, against the uses: it is
// one of them, or goes through a passage that one of them opened and that still stood.
func (b *approvalBook) let(e nucleus.Entry) {
	a := b.of(e.Ask)
	permit := permitOf(e)
	switch at := timeIn(e); {
	case len(e.Grants) == 0 || !a.used[permit] && !a.passage:
		b.problem(e.Seq, Ungranted, "%s was let through under permit %s for ask %q, and no use of what was granted says so", e.Op, permit, e.Ask)
	case a.used[permit]: // it is held against its own counting
	case a.closed > 0 && e.Seq > a.closed:
		b.problem(e.Seq, Revoked, "%s went through the passage of ask %s, which entry %d says was taken back", e.Op, e.Ask, a.closed)
	case slices.ContainsFunc(e.Grants, func(grant string) bool { void, ok := a.void[grant]; return ok && at.After(void.Add(lease)) }):
		b.problem(e.Seq, Revoked, "%s went through the passage of ask %s at %s, which the authority had taken back before", e.Op, e.Ask, e.Time)
	case a.until > 0 && at.After(time.UnixMilli(a.until).Add(lease)):
		b.problem(e.Seq, Expired, "%s went through the passage of ask %s at %s, which ended at %s", e.Op, e.Ask, e.Time, stamp(a.until))
	}
}

// takenBack is when something was taken back: before its entry, where the log could not be written.
func takenBack(e nucleus.Entry) time.Time {
	var told struct {
		At int64 `json:"at_ms"`
	}
	if json.Unmarshal(e.Data, &told) == nil && told.At > 0 {
		return time.UnixMilli(told.At)
	}
	return timeIn(e)
}

// timeIn is the time of an entry; zero where it has none.
func timeIn(e nucleus.Entry) time.Time {
	at, _ := time.Parse(time.RFC3339Nano, e.Time)
	return at
}

func stamp(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }

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
