package timeline

import (
	"fmt"
	"slices"
	"time"
)

// scale puts times on an axis of 100 percent. It is linear but for long pauses, which
// are drawn short and say how long they were.
type scale struct {
	start  time.Time
	pieces []piece
}

// piece is a stretch of the axis. Offsets are from the start, places in percent.
type piece struct {
	from, to   time.Duration
	left, wide float64
	pause      bool
}

const (
	longPause  = 6 // a pause longer than this part of the whole is drawn short
	pauseWidth = 4 // percent
)

func newScale(times []time.Time) scale {
	times = slices.Clone(times)
	slices.SortFunc(times, time.Time.Compare)
	s := scale{start: times[0]}
	whole := times[len(times)-1].Sub(times[0])
	active, from := whole, time.Duration(0)
	for i := 1; i < len(times); i++ {
		gap := times[i].Sub(times[i-1])
		if gap <= whole/longPause || gap < 5*time.Second {
			continue
		}
		begin := times[i-1].Sub(s.start)
		s.pieces = append(s.pieces, piece{from: from, to: begin}, piece{from: begin, to: begin + gap, pause: true})
		active, from = active-gap, begin+gap
	}
	s.pieces = append(s.pieces, piece{from: from, to: whole})
	room, left := 100-pauseWidth*float64(len(s.pieces)/2), 0.0
	for i := range s.pieces {
		p := &s.pieces[i]
		p.left = left
		switch {
		case p.pause:
			p.wide = pauseWidth
		case active > 0:
			p.wide = room * float64(p.to-p.from) / float64(active)
		default:
			p.wide = room / float64(len(s.pieces)/2+1)
		}
		left += p.wide
	}
	return s
}

// at is the place of a time in percent.
func (s scale) at(t time.Time) float64 {
	offset := t.Sub(s.start)
	for _, p := range s.pieces {
		if offset <= p.to {
			if p.to == p.from {
				return p.left
			}
			return p.left + p.wide*float64(offset-p.from)/float64(p.to-p.from)
		}
	}
	return 100
}

func percent(x float64) string { return fmt.Sprintf("%.2f%%", min(max(x, 0), 100)) }

func (s scale) gaps() (list []tick) {
	for _, p := range s.pieces {
		if p.pause {
			list = append(list, tick{At: percent(p.left), Width: percent(p.wide), Text: span(p.to - p.from)})
		}
	}
	return list
}

// steps are the distances that ticks may have.
var steps = []time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
	15 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 6 * time.Hour, 12 * time.Hour, 24 * time.Hour,
}

// ticks are round offsets from the start, some eight of them.
func (s scale) ticks(time.Time) (list []tick) {
	active := time.Duration(0)
	for _, p := range s.pieces {
		if !p.pause {
			active += p.to - p.from
		}
	}
	step := steps[len(steps)-1]
	for _, d := range steps {
		if active/d <= 8 {
			step = d
			break
		}
	}
	last := -100.0
	for _, p := range s.pieces {
		if p.pause {
			continue
		}
		for at := (p.from + step - 1).Truncate(step); at <= p.to; at += step {
			place := s.at(s.start.Add(at))
			if place-last < 5 || place > 97 { // no room for its text
				continue
			}
			last = place
			list = append(list, tick{At: percent(place), Text: "+" + tickText(at)})
		}
	}
	return list
}

func tickText(d time.Duration) string {
	switch {
	case d == 0:
		return "0"
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%g s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d:%02d min", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d:%02d h", int(d.Hours()), int(d.Minutes())%60)
}
