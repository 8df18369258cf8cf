package audit

import (
	"iter"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// links knows the newest entry of each session, so that the next one can name it. Its
// methods do nothing on nil. Those that are called with Log.mu held say so.
type links struct{ last map[string]int64 }

// maxLinks bounds the sessions that are held in memory; of others the newest entry is
// looked for in the log.
const maxLinks = 4096

// prev is what an entry of a session names: the newest that was begun, else earlier, which
// lastOf found. mu is held.
func (k *links) prev(session string, earlier int64) *int64 {
	if k == nil || session == "" {
		return nil
	}
	if seq, ok := k.last[session]; ok {
		return &seq
	}
	if earlier < 0 {
		return nil
	}
	return &earlier
}

// add takes note of an entry; what lies below size is on the disk, and can be found there
// again. mu is held.
func (k *links) add(session string, seq, size int64) {
	if k == nil || session == "" {
		return
	}
	if k.last == nil {
		k.last = map[string]int64{}
	}
	if len(k.last) >= maxLinks {
		for session, seq := range k.last {
			if seq < size {
				delete(k.last, session)
			}
		}
	}
	k.last[session] = seq
}

// forget gives up what was begun: some of it may not have reached the disk. mu is held.
func (k *links) forget() {
	if k != nil {
		k.last = nil
	}
}

// lastOf looks for the newest entry of a session on the disk, where it is not known: after a
// start of the log. -1 where there is none, or it cannot be read; an entry that begins a
// session has none.
func (l *Log) lastOf(e nucleus.Entry) int64 {
	found, low := int64(-1), int64(0)
	if l.links == nil || e.Session == "" || e.Kind == nucleus.KindPodCreate {
		return found
	}
	for {
		l.mu.Lock()
		_, known := l.links.last[e.Session]
		size := l.size
		l.mu.Unlock()
		if known || size == low {
			return found
		}
		seq, err := l.findLast(e.Session, low, size)
		if err != nil {
			return -1
		}
		// What was written meanwhile is looked through too: it may be known no more.
		found, low = max(found, seq), size
	}
}

// findLast is the newest entry of a session in [low, size), -1 if there is none.
func (l *Log) findLast(session string, low, size int64) (int64, error) {
	quoted, err := nucleus.Canonical(session)
	if err != nil {
		return -1, err
	}
	for from := (size - 1) / tileWidth * tileWidth; from >= 0 && from+tileWidth > low; from -= tileWidth {
		entries, err := l.bundleFrom(from)
		if err != nil {
			return -1, err
		}
		entries = entries[:min(size-from, int64(len(entries)))]
		for i := len(entries) - 1; i >= 0; i-- {
			g, err := look(entries[i])
			if err != nil {
				return -1, err
			}
			if string(g.session) == string(quoted) {
				return g.seq, nil
			}
		}
	}
	return -1, nil
}

// bundleFrom returns the entries on the disk from a multiple of tileWidth on, a bundle at most.
func (l *Log) bundleFrom(from int64) ([][]byte, error) {
	l.disk.Lock()
	recent, first := l.recent, l.first
	l.disk.Unlock()
	if from < first {
		return l.loadBundle(tlog.Tile{H: tileHeight, L: 0, N: from / tileWidth, W: tileWidth})
	}
	recent = recent[min(from-first, int64(len(recent))):]
	return recent[:min(tileWidth, len(recent))], nil
}

// Backward goes through the entries of a session that are on the disk, from the newest on, as
// far as they name one another. It ends with an error.
func (l *Log) Backward(session string) iter.Seq2[nucleus.Entry, error] {
	return func(yield func(nucleus.Entry, error) bool) {
		seq, err := l.findLast(session, 0, l.Size())
		var entries [][]byte
		for from := int64(-1); seq >= 0 && err == nil; {
			if seq/tileWidth*tileWidth != from {
				from = seq / tileWidth * tileWidth
				if entries, err = l.bundleFrom(from); err != nil {
					break
				}
			}
			var e nucleus.Entry
			if e, err = decode(entries[seq-from]); err != nil || !yield(e, nil) || e.Prev == nil {
				break
			}
			seq = *e.Prev
		}
		if err != nil {
			yield(nucleus.Entry{}, err)
		}
	}
}
