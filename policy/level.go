package policy

import "fmt"

// Level says how freely an operation may be used. Ask is an obligation: the
// operation needs a grant.
type Level uint8

// The levels, from strict to loose.
const (
	Never Level = iota
	Ask
	Always
)

var levelNames = [...]string{"never", "ask", "always"}

func (l Level) String() string {
	if int(l) < len(levelNames) {
		return levelNames[l]
	}
	return fmt.Sprintf("Level(%d)", uint8(l))
}

// MarshalText refuses values that are no level.
func (l Level) MarshalText() ([]byte, error) {
	if int(l) >= len(levelNames) {
		return nil, fmt.Errorf("no such level: %d", uint8(l))
	}
	return []byte(levelNames[l]), nil
}

// UnmarshalText refuses names that are no level.
func (l *Level) UnmarshalText(text []byte) error {
	for i, name := range levelNames {
		if string(text) == name {
			*l = Level(i)
			return nil
		}
	}
	return fmt.Errorf("unknown level %q; want never, ask or always", text)
}

// MaxApprovals is the largest quorum an operation may ask for.
const MaxApprovals = 16

// duty is what one operation costs. In normal form an operation that is never
// allowed has no approvals, every other at least one.
type duty struct {
	level     Level
	approvals uint8
}

func (d duty) leq(e duty) bool {
	return d.level == Never || d.level <= e.level && d.approvals >= e.approvals
}

func (d duty) meet(e duty) duty {
	if d.level == Never || e.level == Never {
		return duty{}
	}
	return duty{min(d.level, e.level), max(d.approvals, e.approvals)}
}

func (d duty) join(e duty) duty {
	if d.level == Never {
		return e
	}
	if e.level == Never {
		return d
	}
	return duty{max(d.level, e.level), min(d.approvals, e.approvals)}
}
