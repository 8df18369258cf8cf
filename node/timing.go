package node

import (
	"fmt"
	"strings"
	"time"
)

// laps measures the parts of one request, for the answer's Server-Timing header
// (W3C Server Timing): verify, resolve, decide, log, act, outcome, in milliseconds.
type laps struct {
	last  time.Time
	parts []string
}

func (l *laps) begin() { l.last = time.Now() }

// lap ends a part. Without begin it does nothing.
func (l *laps) lap(name string) {
	if l == nil || l.last.IsZero() {
		return
	}
	now := time.Now()
	l.parts = append(l.parts, fmt.Sprintf("%s;dur=%.3f", name, float64(now.Sub(l.last).Microseconds())/1000))
	l.last = now
}

func (l *laps) String() string { return strings.Join(l.parts, ", ") }
