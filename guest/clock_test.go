package guest

import (
	"testing"
	"time"

	"cal/nucleus"
)

func (l *lock) admitted(what string, call Call, action *nucleus.Action) {
	l.t.Helper()
	if _, e := l.p.admit(call, action, nil); e != nil {
		l.t.Errorf("%s: %+v", what, e)
	}
}

// Whatever is done to the host's clock, work goes on, and the attack finds nothing: a
// permit that was kept back is as old as it is.
func TestClockIsSet(t *testing.T) {
	action := readAction("a")
	for name, jump := range map[string]time.Duration{
		"an hour back": -time.Hour, "a minute back": -time.Minute, "31 s back": -31 * time.Second, "a day ahead": 24 * time.Hour, "not at all": 0,
	} {
		t.Run(name, func(t *testing.T) {
			l := newLock(t)
			fresh := func() Call { return Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))} }
			l.admitted("before", fresh(), &action)
			kept := fresh() // nobody delivers it
			used := fresh()
			l.admitted("used", used, &action)
			l.wall += jump
			l.admitted("after", fresh(), &action)
			l.passed += 29 * time.Second
			l.admitted("later", fresh(), &action)
			l.passed += 2 * time.Second
			l.refused("kept back for 31 s", kept, &action, "ms old")
			l.refused("used before", used, &action, "ms old")
			l.admitted("still", fresh(), &action)
			// And where the clock comes back to where the permit was made.
			l.wall -= jump + 31*time.Second
			l.admitted("set back to the permit's time", fresh(), &action)
			l.refused("kept back, its time come again", kept, &action, "ms old")
		})
	}
}

// A permit that waited within its life is good: control of the above.
func TestPermitWaits(t *testing.T) {
	l := newLock(t)
	action := readAction("a")
	kept := Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}
	l.passed += 29 * time.Second
	l.admitted("after 29 s", kept, &action)
}

// The first permit of a node that nobody has heard of is not younger for it: the node's
// clock was heard when it proved itself.
func TestFirstPermitKeptBack(t *testing.T) {
	l := newLock(t)
	action := readAction("a")
	kept := Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}
	l.passed += 31 * time.Second
	l.refused("the first, after 31 s", kept, &action, "ms old")
}

// A node that follows counts anew; what the one before permitted is void, and it does
// not come back.
func TestEpochs(t *testing.T) {
	l := newLock(t)
	action := readAction("a")
	old := Call{Op: nucleus.ReadFiles, Permit: l.sign(l.permit(action))}
	next := func() Call {
		permit := l.permit(action)
		permit.Seq, permit.Issued.Epoch, permit.Issued.Tick = 2<<nucleus.EpochBits|l.seq, 2, permit.Issued.Tick-1000
		return Call{Op: nucleus.ReadFiles, Permit: l.sign(permit)}
	}
	l.refused("of a node that has not come", next(), &action, "epoch 2")
	if err := l.p.clock.begin(nucleus.NodeTime{Epoch: 2, Tick: 0, UnixMilli: time.Now().UnixMilli()}); err != nil {
		t.Fatal(err)
	}
	l.admitted("of the next node", next(), &action)
	l.refused("of the one before", old, &action, "epoch 1")
	if err := l.p.clock.begin(nucleus.NodeTime{Epoch: 1, Tick: 50_000}); err == nil {
		t.Error("the node before came back")
	}
	l.admitted("still", next(), &action)
}

// Requests are signed with the node's wall clock, as it was heard last; an old statement does
// not turn it back.
func TestWallClock(t *testing.T) {
	var passed time.Duration
	c := newNodeClock()
	c.own = func() time.Duration { return passed }
	want := func(what string, unixMilli int64) {
		t.Helper()
		if got := c.time().UnixMilli(); got != unixMilli {
			t.Errorf("%s: %d, want %d", what, got, unixMilli)
		}
	}
	if err := c.begin(nucleus.NodeTime{Epoch: 1, Tick: 5000, UnixMilli: 1_000_000}); err != nil {
		t.Fatal(err)
	}
	passed += time.Second
	want("carried on", 1_001_000)
	c.age(nucleus.NodeTime{Epoch: 1, Tick: 6000, UnixMilli: 501_000})
	want("set back", 501_000)
	c.age(nucleus.NodeTime{Epoch: 1, Tick: 5500, UnixMilli: 1_000_500})
	want("an old statement", 501_000)
	passed += time.Second
	c.set(9_000_000)
	want("asked for", 9_000_000)
	passed += time.Second
	want("and carried on", 9_001_000)
}
