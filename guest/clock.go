package guest

import (
	"fmt"
	"sync"
	"time"

	"cal/nucleus"
)

// nodeClock is what the machine knows of its node's clocks.
//
// The host's wall clock may be set, so the age of a permit is judged by ticks alone. A
// tick was read before it is heard: the greatest lead of the node's ticks over the
// machine's own monotonic clock that was ever heard is the least that the lead can be.
// Counted with it, a permit is never older than it says, and one that was kept back is as old
// as the machine's clock says that it is. Each node counts anew and proves its
// epoch; what an earlier one permitted is void.
//
// The wall clock, as the newest statement has it, is good for signing requests. Whether a grant
// has expired is judged by it too, but it does not go back: what time it was once, and has
// passed since by the machine's own clock, it is at least, but for what a host's clock is
// corrected by now and then.
type nodeClock struct {
	own func() time.Duration // the machine's monotonic clock

	mu    sync.Mutex
	epoch uint64
	lead  int64 // of the node's ticks over own, in milliseconds
	tick  int64 // the newest heard
	wall  int64 // what the node's wall clock showed at tick 0, by the newest statement
	least int64 // the greatest lead of the node's wall clock over own that was heard
}

// corrected is by how much a wall clock is set back without a word, in milliseconds.
const corrected = 5 * 60 * 1000

// judged is the time by which a grant is judged where the node says that it is unixMilli, and
// by how much that was set back.
func (c *nodeClock) judged(unixMilli int64) (now, back int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.least = max(c.least, unixMilli-c.now())
	if back = c.now() + c.least - unixMilli; back <= corrected {
		return unixMilli, 0
	}
	return unixMilli + back, back
}

func newNodeClock() *nodeClock {
	start := time.Now()
	return &nodeClock{own: func() time.Duration { return time.Since(start) }}
}

// begin takes a node's first statement, which it has proved to be its own and new.
func (c *nodeClock) begin(t nucleus.NodeTime) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case t.Epoch < c.epoch:
		return fmt.Errorf("node of epoch %d, but one of epoch %d was here", t.Epoch, c.epoch)
	case t.Epoch > c.epoch:
		c.epoch, c.tick = t.Epoch, t.Tick
		c.lead, c.wall = t.Tick-c.now(), t.UnixMilli-t.Tick
		c.least = max(c.least, t.UnixMilli-c.now())
	default:
		c.hear(t)
	}
	return nil
}

// age returns how many milliseconds ago the node said t, at least. ok is false for a
// node that is not the present one.
func (c *nodeClock) age(t nucleus.NodeTime) (milli int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.Epoch != c.epoch {
		return 0, false
	}
	c.hear(t)
	return c.now() + c.lead - t.Tick, true
}

func (c *nodeClock) hear(t nucleus.NodeTime) {
	c.lead = max(c.lead, t.Tick-c.now())
	c.least = max(c.least, t.UnixMilli-c.now())
	if t.Tick > c.tick {
		c.tick, c.wall = t.Tick, t.UnixMilli-t.Tick
	}
}

func (c *nodeClock) now() int64 { return c.own().Milliseconds() }

// time is the node's wall clock as it was last heard of.
func (c *nodeClock) time() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.UnixMilli(c.now() + c.lead + c.wall)
}

// set corrects the wall clock.
func (c *nodeClock) set(unixMilli int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall = unixMilli - c.lead - c.now()
}
