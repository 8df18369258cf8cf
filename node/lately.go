package node

import (
	"fmt"
	"slices"
	"strings"

	"cal/nucleus"
)

// maxLately is how many accesses of a session an ask shows.
const maxLately = 24

// lately is what a session has read and fetched, newest last: each thing once, with the entry
// of its newest access. It is for a person's eyes and lives in the node's memory; the log has
// all of it.
type lately struct {
	accesses []nucleus.Evidence
	before   int // accesses that are no longer among them
}

func (l *lately) add(seq int64, takes nucleus.Legs, what string) {
	takes &= bothLegs
	if takes == 0 {
		return
	}
	if i := slices.IndexFunc(l.accesses, func(e nucleus.Evidence) bool { return e.What == what }); i >= 0 {
		l.accesses = slices.Delete(l.accesses, i, i+1)
	} else if len(l.accesses) == maxLately {
		l.accesses = slices.Delete(l.accesses, 0, 1)
		l.before++
	}
	l.accesses = append(l.accesses, nucleus.Evidence{Seq: seq, Leg: strings.Join(takes.Names(), ", "), What: what})
}

// detail is the list as an ask shows it, or none.
func (l *lately) detail() []nucleus.Detail {
	if len(l.accesses) == 0 {
		return nil
	}
	var lines []string
	if l.before > 0 {
		lines = append(lines, fmt.Sprintf("(%d more before these)", l.before))
	}
	for _, e := range l.accesses {
		lines = append(lines, fmt.Sprintf("log entry %d takes %s: %s", e.Seq, e.Leg, e.What))
	}
	return []nucleus.Detail{{Title: nucleus.DetailLately, Text: strings.Join(lines, "\n")}}
}
