package audit

import (
	"fmt"

	"cal/nucleus"
)

// Ungranted is the kind of a grant that was used and that the authority's log lacks.
const Ungranted ProblemKind = "ungranted"

// Compare holds the node's log against the authority's, which another process writes
// under another key: a grant that was used is one that the authority gave, for that ask,
// and an ask that the authority was shown stands in the node's log, of the same digest.
// So a node's log that was cut or written anew by its key's holder is found out where it
// forgets what a person was asked. Both may be written meanwhile. Verify each first.
func Compare(node, authority string) ([]Problem, error) {
	// What is recorded first is read last.
	uses, err := approvals(node, nucleus.KindApprovalUse)
	if err != nil {
		return nil, err
	}
	grants, err := approvals(authority, nucleus.KindApprovalGrant)
	if err != nil {
		return nil, err
	}
	shown, err := approvals(authority, nucleus.KindApprovalAsk)
	if err != nil {
		return nil, err
	}
	asks, err := approvals(node, nucleus.KindApprovalAsk)
	if err != nil {
		return nil, err
	}
	problems := []Problem{}
	given := map[string]string{} // grant: ask
	for _, e := range grants {
		for _, grant := range e.Grants {
			given[grant] = e.Ask
		}
	}
	for _, e := range uses {
		for _, grant := range e.Grants {
			if ask, ok := given[grant]; !ok || ask != e.Ask {
				problems = append(problems, Problem{e.Seq, Ungranted, "", fmt.Sprintf("it uses grant %s for ask %s, which the authority's log does not have", grant, e.Ask)})
			}
		}
	}
	asked := map[string]string{} // ask: digest
	for _, e := range asks {
		asked[e.Ask] = e.Digest
	}
	for _, e := range shown {
		switch digest, ok := asked[e.Ask]; {
		case !ok:
			problems = append(problems, Problem{-1, Missing, "", fmt.Sprintf("the authority was shown ask %s (its entry %d), which the node's log does not have", e.Ask, e.Seq)})
		case digest != e.Digest:
			problems = append(problems, Problem{-1, Changed, "", fmt.Sprintf("ask %s has digest %s in the node's log, %s in the authority's (entry %d)", e.Ask, digest, e.Digest, e.Seq)})
		}
	}
	return problems, nil
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
