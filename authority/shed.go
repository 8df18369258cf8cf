package authority

import (
	"context"
	"log/slog"
	"time"

	"cal/nucleus"
)

// What an ask says may be long, and is worth keeping only while somebody could look it up. So the
// bytes of an ask that has ended are shed after a day, or sooner where there are too many of them.
// The row stays, with digest, summary, decisions and uses, and so does the log's entry.

const (
	keepFor   = 24 * time.Hour
	keepBytes = 64 << 20 // canonical, of all asks
	shedEvery = 10 * time.Minute

	shedAtOnce = 32 // rows in memory, and looked at while uses wait
)

// keepSmall sheds what is old until ctx ends.
func (a *Authority) keepSmall(ctx context.Context) {
	tick := time.NewTicker(shedEvery)
	defer tick.Stop()
	for {
		if n, err := a.shed(keepFor, keepBytes); err != nil {
			slog.Warn("what asks said that have ended could not be removed", "error", err)
		} else if n > 0 {
			slog.Info("what asks said that have ended was removed", "asks", n)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// shed forgets the bytes of asks that ended so long ago, or, oldest first, as many as are beyond
// so many bytes. It says of how many asks.
func (a *Authority) shed(keep time.Duration, bytes int64) (n int, err error) {
	for left, more := 0, true; more; {
		var shed, seen int
		if shed, seen, err = a.shedSome(left, keep, bytes); err != nil {
			return n, unavailable(err)
		}
		n, left, more = n+shed, left+seen-shed, seen == shedAtOnce
	}
	if n == 0 {
		return 0, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return n, unavailable(a.store.shrink())
}

// shedSome looks at some asks behind the first left that stay.
func (a *Authority) shedSome(left int, keep time.Duration, bytes int64) (shed, seen int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.millis()
	rows, err := a.store.sheddable(now, left)
	if err != nil {
		return 0, 0, err
	}
	kept, err := a.store.kept()
	if err != nil {
		return 0, 0, err
	}
	for _, row := range rows {
		switch {
		case a.living(row):
			continue
		case now-row.over() < keep.Milliseconds() && kept <= bytes:
			continue
		}
		if err := a.store.shed(row.id); err != nil {
			return shed, len(rows), err
		}
		kept -= row.length
		shed++
	}
	return shed, len(rows), nil
}

// gone is the error of whoever wants to see what an ask said whose bytes were shed.
func gone(row askRow, state string) *nucleus.Error {
	return nucleus.Errorf(nucleus.KindRefused, "ask %s is %s: %s; what it said was removed since, its digest %s stays, and so do its entries in the logs (cal audit log --pod %s)", row.id, state, row.summary, row.digest, row.pod)
}
