package audit

import (
	"errors"
	"fmt"
	"iter"

	"cal/internal/durable"
	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// readTries is how often a reader begins anew because the writer published
// between two of its reads.
const readTries = 100

// Read yields the entries of a log from the sequence number on, to the newest
// one at the time of the call. Another process may write the log meanwhile. It
// proves nothing: Verify does. An error ends it.
func Read(dir string, from int64) iter.Seq2[nucleus.Entry, error] {
	return func(yield func(nucleus.Entry, error) bool) {
		at := from
		for raw, err := range ReadRaw(dir, from) {
			var e nucleus.Entry
			if err == nil {
				if e, err = decode(raw); err != nil {
					err = fmt.Errorf("log %s: entry %d: %w", dir, at, err)
				}
			}
			if !yield(e, err) || err != nil {
				return
			}
			at++
		}
	}
}

// ReadRaw is Read of the stored bytes, canonical JSON as it was hashed.
func ReadRaw(dir string, from int64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		err := readRaw(dir, from, func(raw []byte) bool { return yield(raw, nil) })
		if err != nil {
			yield(nil, fmt.Errorf("log %s: %w", dir, err))
		}
	}
}

// readRaw calls do with the entries from the index on until do returns false.
func readRaw(dir string, from int64, do func([]byte) bool) error {
	if from < 0 {
		return fmt.Errorf("there is no entry %d", from)
	}
	d, err := durable.OpenDir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	for range readTries {
		j, err := readJournal(d)
		if err != nil {
			return err
		}
		if from, err = readTiles(d, from, j.base.Size, do); err == nil {
			readRecords(j, from, do)
			return nil
		}
		if errors.Is(err, errStopped) {
			return nil
		}
		if !isMissing(err) {
			return err
		}
		now, again := readJournal(d)
		if again != nil || now.base == j.base {
			return err // nobody published: the tile is missing
		}
	}
	return fmt.Errorf("it was published %d times while it was being read", readTries)
}

// errStopped says that the reader wants no more.
var errStopped = errors.New("stopped")

func readJournal(d *durable.Dir) (*journal, error) {
	raw, err := d.ReadFile(journalName, maxJournal)
	if isMissing(err) {
		return publishedOnly(d)
	}
	if err != nil {
		return nil, err
	}
	j, err := parseJournal(raw, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", journalName, err)
	}
	return j, nil
}

// publishedOnly is the journal of a copy that was taken without it.
func publishedOnly(d *durable.Dir) (*journal, error) {
	signed, err := d.ReadFile(checkpointName, MaxCheckpoint)
	if isMissing(err) {
		return nil, fmt.Errorf("not a log: neither %s nor %s is there", journalName, checkpointName)
	}
	if err != nil {
		return nil, err
	}
	cp, err := parseBody(string(signed))
	return &journal{base: cp, note: signed}, err
}

// readTiles reads entries from the bundles of a tree of size, and returns the
// index of the next one.
func readTiles(d *durable.Dir, from, size int64, do func([]byte) bool) (int64, error) {
	for from < size {
		at := tlog.Tile{H: tileHeight, L: entriesLevel, N: from / tileWidth}
		at.W = int(min(tileWidth, size-at.N*tileWidth))
		raw, err := d.ReadFile(tilePath(at), maxBundle)
		if err != nil {
			return from, err
		}
		entries, err := splitBundle(raw, at.W)
		if err == nil && len(entries) != at.W {
			err = fmt.Errorf("%d entries, want %d", len(entries), at.W)
		}
		if err != nil {
			return from, fmt.Errorf("%s: %w", tilePath(at), err)
		}
		for _, entry := range entries[from%tileWidth:] {
			if !do(entry) {
				return from, errStopped
			}
			from++
		}
	}
	return from, nil
}

// readRecords reads entries from the journal.
func readRecords(j *journal, from int64, do func([]byte) bool) {
	at := j.base.Size
	for _, r := range j.records {
		for _, entry := range r.entries {
			if at >= from && !do(entry) {
				return
			}
			at++
		}
	}
}
