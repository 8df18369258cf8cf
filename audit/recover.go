package audit

import (
	"bytes"
	"fmt"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// load makes the state in memory from the disk, and the disk whole. It trusts
// the tiles up to the journal's base, which were synced before the journal was
// begun, and writes everything after that anew: what a failed sync left in the
// page cache can be read, but need not be on the disk. disk is held, or the log
// not yet shared.
func (l *Log) load() error {
	raw, err := l.fs.ReadFile(journalName, maxJournal)
	if isMissing(err) {
		return l.create()
	}
	if err != nil {
		return err
	}
	j, err := parseJournal(raw, l.signer)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	s, err := l.replay(j)
	if err != nil {
		return err
	}
	public, stale, err := l.checkPublished(j, s)
	if err != nil {
		return err
	}
	if err := l.checkCosigned(j, s); err != nil {
		return err
	}
	l.tree, l.recent, l.first, l.published = s.tree, s.recent, s.first, j.base.Size
	l.records = nil // whatever the journal holds goes into tiles now
	signed := j.note
	if n := len(j.records); n > 0 {
		signed = j.records[n-1].checkpoint
	}
	if len(j.tail) > 0 {
		if signed, err = l.markTorn(raw[:j.whole], j.tail); err != nil {
			return fmt.Errorf("marking a torn write of %d bytes: %w", len(j.tail), err)
		}
	}
	l.mu.Lock()
	l.open = s.open
	l.links.forget()
	l.show(signed)
	l.next = l.size
	l.mu.Unlock()
	if stale || l.published != l.tree.size {
		err = l.renew()
	} else {
		signed = public // it says the same, and may have more signatures
		err = l.resume()
	}
	if err != nil {
		return err
	}
	own, err := l.signer.ownSignature(signed)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.note, l.public, l.err = signed, own, nil
	l.removeStale(l.published)
	return nil
}

// renew publishes while nobody appends.
func (l *Log) renew() error {
	e, err := l.newEdition()
	if err != nil {
		return err
	}
	if err := l.writeTiles(e); err != nil {
		return err
	}
	return l.rebase(e)
}

// create begins a log in a directory that holds nothing. The journal comes
// first: a directory with a journal is a log.
func (l *Log) create() error {
	names, err := l.fs.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name != lockName {
			return fmt.Errorf("not a log: it holds %s and no %s", Printable(name), journalName)
		}
	}
	l.tree, l.recent, l.first, l.published, l.records = &tree{}, nil, 0, 0, nil
	signed, err := l.signer.checkpoint(l.tree)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.open = map[string]nucleus.Entry{}
	l.show(signed)
	l.next = 0
	l.mu.Unlock()
	e, err := l.newEdition()
	if err != nil {
		return err
	}
	if err := l.rebase(e); err != nil {
		return err
	}
	if err := l.fs.WriteFile(checkpointName, signed); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = nil
	return nil
}

// state is what a journal leads to.
type state struct {
	tree   *tree
	recent [][]byte
	first  int64
	open   map[string]nucleus.Entry
	roots  map[int64]tlog.Hash // at the base and after each record
}

// replay loads the tree of the base and adds the records, comparing the root
// after each with its checkpoint.
func (l *Log) replay(j *journal) (*state, error) {
	s := &state{first: j.base.Size / tileWidth * tileWidth, open: map[string]nucleus.Entry{}}
	var err error
	s.tree, err = loadTree(j.base.Size, func(at tlog.Tile) ([]byte, error) {
		return l.fs.ReadFile(tilePath(at), tileWidth*tlog.HashSize)
	})
	if err != nil {
		return nil, err
	}
	if s.tree.root() != j.base.Root {
		return nil, fmt.Errorf("the tiles of %d entries have root %s, the journal's checkpoint says %s", j.base.Size, s.tree.root(), j.base.Root)
	}
	s.roots = map[int64]tlog.Hash{j.base.Size: j.base.Root}
	if at, ok := partial(0, j.base.Size); ok {
		if s.recent, err = l.loadBundle(at); err != nil {
			return nil, err
		}
		for i, raw := range s.recent {
			if tlog.RecordHash(raw) != s.tree.tiles[0].hashes[i] {
				return nil, fmt.Errorf("entry %d is not the one in the tree", s.first+int64(i))
			}
		}
	}
	if err := l.loadOpen(s, j); err != nil {
		return nil, err
	}
	for _, r := range j.records {
		for _, raw := range r.entries {
			e, err := decode(raw)
			if err != nil {
				return nil, fmt.Errorf("entry %d: %w", s.tree.size, err)
			}
			trackIntent(s.open, e)
			s.tree.add(tlog.RecordHash(raw))
			s.recent = append(s.recent, raw)
		}
		if s.tree.root() != r.says.Root {
			return nil, fmt.Errorf("the tree of %d entries has root %s, its checkpoint says %s", s.tree.size, s.tree.root(), r.says.Root)
		}
		s.roots[s.tree.size] = r.says.Root
	}
	return s, nil
}

// loadBundle reads the entries beside a tile of level 0.
func (l *Log) loadBundle(at tlog.Tile) ([][]byte, error) {
	name := tilePath(bundleOf(at))
	raw, err := l.fs.ReadFile(name, maxBundle)
	if err != nil {
		return nil, err
	}
	entries, err := splitBundle(raw, at.W)
	if err == nil && len(entries) != at.W {
		err = fmt.Errorf("%d entries, want %d", len(entries), at.W)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return entries, nil
}

// loadOpen reads the intents without outcome that the journal's base lists.
func (l *Log) loadOpen(s *state, j *journal) error {
	for _, seq := range j.open {
		if seq < 0 || seq >= j.base.Size {
			return fmt.Errorf("journal: open intent %d of %d entries", seq, j.base.Size)
		}
		at, _ := partial(0, seq)
		entries := s.recent
		if at.N*tileWidth < s.first {
			at.W = tileWidth
			var err error
			if entries, err = l.loadBundle(at); err != nil {
				return err
			}
		}
		e, err := decode(entries[seq%tileWidth])
		if err != nil || e.Seq != seq || e.Kind != nucleus.KindIntent {
			return fmt.Errorf("journal: entry %d is listed as an open intent and is none", seq)
		}
		trackIntent(s.open, e)
	}
	return nil
}

// checkPublished compares the public checkpoint with the journal. It may be
// older, after a crash; it is never newer.
func (l *Log) checkPublished(j *journal, s *state) (signed []byte, stale bool, err error) {
	signed, err = l.fs.ReadFile(checkpointName, MaxCheckpoint)
	if isMissing(err) {
		return nil, true, nil
	}
	if err != nil {
		return nil, false, err
	}
	cp, err := openCheckpoint(signed, l.signer)
	if err != nil {
		return nil, false, fmt.Errorf("checkpoint: %w", err)
	}
	if cp.Size > j.end() {
		return nil, false, fmt.Errorf("truncated: the checkpoint is of %d entries, the journal ends at %d", cp.Size, j.end())
	}
	if root, ok := s.roots[cp.Size]; cp.Size >= j.base.Size && (!ok || root != cp.Root) {
		return nil, false, fmt.Errorf("the checkpoint of %d entries has root %s, the journal's is %s", cp.Size, cp.Root, root)
	}
	return signed, cp.Size != j.end(), nil
}

// checkCosigned compares the cosigned checkpoint with the journal, or, where it is
// older, with the tiles below.
func (l *Log) checkCosigned(j *journal, s *state) error {
	l.kept = 0
	signed, err := l.fs.ReadFile(cosignedName, MaxCheckpoint)
	if isMissing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	cp, err := openCheckpoint(signed, l.signer)
	if err != nil {
		return fmt.Errorf("%s: %w", cosignedName, err)
	}
	if cp.Size > j.end() {
		return fmt.Errorf("truncated: the cosigned checkpoint is of %d entries, the journal ends at %d", cp.Size, j.end())
	}
	// One that was published lies at the end of a record.
	root := s.roots[cp.Size]
	if cp.Size < j.base.Size {
		if root, err = rootAt(cp.Size, j.base, l.fs.ReadFile); err != nil {
			return err
		}
	}
	if root != cp.Root {
		return fmt.Errorf("the cosigned checkpoint of %d entries has root %s, the log's is %s", cp.Size, cp.Root, root)
	}
	l.kept = cp.Size
	return nil
}

// markTorn appends an entry that tells of the bytes of an append that did not
// finish, and puts the journal with it in the place of the torn one.
func (l *Log) markTorn(whole, tail []byte) (signed []byte, err error) {
	e, err := tornEntry(l.tree.size, l.now(), tail)
	if err != nil {
		return nil, err
	}
	raw, err := encode(e)
	if err != nil {
		return nil, err
	}
	l.grow(raw)
	if signed, err = l.signer.checkpoint(l.tree); err != nil {
		return nil, err
	}
	mended := append(bytes.Clone(whole), journalRecord(signed, appendBundle(nil, raw))...)
	return signed, l.fs.WriteFile(journalName, mended)
}
