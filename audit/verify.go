package audit

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"cal/internal/durable"
	"cal/nucleus"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// ProblemKind says of what sort a problem is.
type ProblemKind string

// The kinds of problems.
const (
	Changed      ProblemKind = "changed"       // an entry, tile or file is not the one that was signed
	Missing      ProblemKind = "missing"       // an entry or file is not there
	Extra        ProblemKind = "extra"         // an entry or file is there that was never signed
	Reordered    ProblemKind = "reordered"     // entries changed places
	Truncated    ProblemKind = "truncated"     // the log ends before a checkpoint that was signed
	BadSignature ProblemKind = "bad signature" // a checkpoint is not signed by the log's key
	Fork         ProblemKind = "fork"          // the key signed two logs that contradict one another
	Torn         ProblemKind = "torn"          // an append did not finish; opening the log marks it
	WrongLink    ProblemKind = "wrong link"    // an entry names another than the one before it in its session
)

// maxProblems bounds a report; Report.More counts the rest.
const maxProblems = 100

// Problem is one thing that is wrong.
type Problem struct {
	Index  int64       `json:"index"` // of the entry, -1 where no single one is meant
	Kind   ProblemKind `json:"kind"`
	File   string      `json:"file,omitempty"`
	Detail string      `json:"detail"`
}

// String is one line of printable ASCII.
func (p Problem) String() string {
	text := string(p.Kind)
	if p.Index >= 0 {
		text += fmt.Sprintf(", entry %d", p.Index)
	}
	if p.File != "" {
		text += ", " + p.File
	}
	return Printable(text + ": " + p.Detail)
}

// Report is what Verify found. The log is as it was signed if there is no
// problem.
type Report struct {
	Origin     string    `json:"origin"`
	Size       int64     `json:"size"` // entries under the newest checkpoint
	Root       string    `json:"root"` // recomputed, base64
	Checkpoint string    `json:"checkpoint"`
	Published  int64     `json:"published"`      // entries in tiles, which other programs see
	Kept       int64     `json:"kept"`           // entries under the checkpoint kept elsewhere; -1 without one
	Problems   []Problem `json:"problems"`       // by place; at most 100
	More       int       `json:"more,omitempty"` // problems that are not listed
	Intents    []int64   `json:"intents_open"`   // intents without outcome

	// Cosigned says how many entries the newest cosigned checkpoint in the directory
	// is of, -1 without one; Cosignatures what the witnesses that were named say.
	Cosigned     int64       `json:"cosigned"`
	Cosignatures []Witnessed `json:"cosignatures"`

	Bytes int64 `json:"bytes"` // of all entries
}

// OK reports whether nothing is wrong.
func (r *Report) OK() bool { return len(r.Problems) == 0 }

func (r *Report) add(p Problem) {
	if len(r.Problems) >= maxProblems {
		r.More++
		return
	}
	r.Problems = append(r.Problems, p)
}

// VerifyOptions say what is believed. Key is required.
type VerifyOptions struct {
	Key        string // of the log: what VerifierKey returned
	Checkpoint []byte // a signed checkpoint kept elsewhere; nil: none

	// Witnesses are keys that WitnessKey returned: each must have cosigned a checkpoint
	// of this log that is in the directory.
	Witnesses []string
}

// Verify reads a whole log and recomputes its tree. It needs the directory and
// the key alone, and writes nothing; another process may have the log open. What
// is wrong with the log is in the report; the error says that it could not be
// verified: no log, an unusable key, a kept checkpoint that is not this log's.
func Verify(dir string, o VerifyOptions) (*Report, error) {
	return verify(dir, o, 20*time.Millisecond)
}

// verify gives a write that may be under way so long to come to its end.
func verify(dir string, o VerifyOptions, pause time.Duration) (*Report, error) {
	v, err := note.NewVerifier(strings.TrimSpace(o.Key))
	if err != nil {
		return nil, fmt.Errorf("verifier key %q: %w", o.Key, err)
	}
	c := &check{v: v, pause: pause, report: &Report{Origin: v.Name(), Kept: -1, Problems: []Problem{}, Intents: []int64{}, Cosigned: -1, Cosignatures: []Witnessed{}}}
	for _, key := range o.Witnesses {
		if err := CheckWitnessKey(key); err != nil {
			return nil, err
		}
		c.witnesses = append(c.witnesses, key)
	}
	if o.Checkpoint != nil {
		kept, err := openCheckpoint(o.Checkpoint, v)
		if err != nil {
			return nil, fmt.Errorf("the checkpoint kept elsewhere: %w", err)
		}
		c.kept, c.report.Kept = &kept, kept.Size
	}
	if c.dir, err = durable.OpenDir(dir); err != nil {
		return nil, err
	}
	defer c.dir.Close()
	if err := c.run(); err != nil {
		return nil, fmt.Errorf("log %s: %w", dir, err)
	}
	return c.report, nil
}

// check is one verification.
type check struct {
	dir    *durable.Dir
	v      note.Verifier
	report *Report
	kept   *Checkpoint
	pause  time.Duration

	witnesses []string
	cosigned  *Checkpoint // in the directory

	files  map[string]bool // the files below tile/, listed before anything was read
	starts []int64         // where they say that a bundle or a tile of level 0 begins, rising
	extent int64           // and where the last of them ends
	edge   map[string][]byte
	public Checkpoint // of the tiles
	// believed says that the key signed public, which else is only where to stop.
	believed bool
	journal  *journal

	roots map[int64][]claim
	main  *side // the tree of the entries
	other *side // the tree of the tiles of level 0, from where they differ on
	diffs []diff
	shift int64 // how far sequence numbers are from the index

	intents map[string]int64
	newest  map[uint64]int64 // by the hash of a session: its newest entry so far
	seed    maphash.Seed
	leaves  []tlog.Hash // from the journal's base on
}

// claim is a root that somebody signed for a size.
type claim struct {
	root tlog.Hash
	kind ProblemKind
	file string
	who  string
}

// side is a tree that may be the one that was signed, and what then is wrong.
type side struct {
	tree      *tree
	problems  []Problem
	confirmed bool // it has the root of the published checkpoint
}

func (s *side) add(p Problem) {
	if len(s.problems) <= maxProblems {
		s.problems = append(s.problems, p)
	}
}

// diff is a bundle whose entries do not fit the tile of level 0 beside it.
type diff struct {
	at      tlog.Tile
	entries []tlog.Hash
	tile    []tlog.Hash
}

func (c *check) run() error {
	if err := c.list(); err != nil {
		return err
	}
	if err := c.snapshot(); err != nil {
		return err
	}
	c.collectClaims()
	c.main = &side{tree: &tree{}}
	c.intents = map[string]int64{}
	c.newest, c.seed = map[uint64]int64{}, maphash.MakeSeed()
	c.check(c.main)
	c.checkOpen(0)
	if err := c.bundles(); err != nil {
		return err
	}
	for _, s := range c.sides() {
		c.uppers(s, true)
	}
	c.settle()
	c.records()
	c.conclude()
	return nil
}

// list walks the tiles. It comes first: whatever is on the disk now is under a
// checkpoint that is read later.
func (c *check) list() error {
	c.files = map[string]bool{}
	err := fs.WalkDir(c.dir.FS(), "tile", func(name string, entry fs.DirEntry, err error) error {
		if isMissing(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if !entry.IsDir() {
			c.files[name] = true
			c.reaches(name)
		}
		return nil
	})
	slices.Sort(c.starts)
	c.starts = slices.Compact(c.starts)
	return err
}

// reaches takes note of the entries that a file is about.
func (c *check) reaches(name string) {
	at, err := parseTilePath(name)
	if err != nil || at.L > 0 || at.N >= math.MaxInt64/tileWidth {
		return
	}
	c.starts = append(c.starts, at.N*tileWidth)
	c.extent = max(c.extent, at.N*tileWidth+int64(at.W))
}

// snapshot reads what changes while the log is written - checkpoint, partial
// tiles, journal - until they belong together.
func (c *check) snapshot() error {
	for range readTries {
		again, err := c.trySnapshot()
		if err != nil || !again {
			return err
		}
	}
	return fmt.Errorf("it was published %d times while it was being read", readTries)
}

func (c *check) trySnapshot() (again bool, err error) {
	cosigned, err := c.readNote(cosignedName) // never newer than the checkpoint read next
	if err != nil {
		return false, err
	}
	signed, err := c.readNote(checkpointName)
	if err != nil {
		return false, err
	}
	raw, err := c.readJournal()
	if err != nil {
		return false, err
	}
	if signed == nil && raw == nil {
		return false, fmt.Errorf("not a log: neither %s nor %s is there", checkpointName, journalName)
	}
	c.report.Problems, c.report.More = []Problem{}, 0
	if err := c.openJournal(raw); err != nil {
		return false, err
	}
	c.openCosigned(cosigned)
	if err := c.choose(signed); err != nil {
		return false, err
	}
	if err := c.readEdge(); err != nil {
		return false, err
	}
	now, err := c.readNote(checkpointName)
	return !bytes.Equal(now, signed), err
}

// readNote reads a signed checkpoint; nil if there is none.
func (c *check) readNote(name string) ([]byte, error) {
	signed, err := c.dir.ReadFile(name, MaxCheckpoint)
	if isMissing(err) {
		return nil, nil
	}
	return append([]byte{}, signed...), err
}

// openJournal parses the journal, as far as it can be.
func (c *check) openJournal(raw []byte) error {
	c.journal = nil
	if raw == nil {
		return nil
	}
	j, err := parseJournal(raw, c.v)
	switch {
	case errors.Is(err, errFormat):
		return fmt.Errorf("%s: %w", journalName, err) // it may be as it was written
	case errors.Is(err, errSignature):
		c.report.add(Problem{-1, BadSignature, journalName, err.Error()})
	case err != nil:
		c.report.add(Problem{-1, Changed, journalName, err.Error()})
	case len(j.tail) > 0:
		c.report.add(Problem{j.end(), Torn, journalName, fmt.Sprintf("%d bytes after the last record are no whole record", len(j.tail))})
	}
	c.journal = j
	return nil
}

// openCosigned reads what witnesses signed. Whoever names witnesses wants to see
// their word.
func (c *check) openCosigned(signed []byte) {
	c.cosigned = nil
	c.report.Cosigned, c.report.Cosignatures = -1, []Witnessed{}
	if signed == nil {
		if len(c.witnesses) > 0 {
			c.report.add(Problem{-1, Missing, cosignedName, "no checkpoint in the directory has cosignatures"})
		}
		return
	}
	cp, err := openCheckpoint(signed, c.v)
	if err != nil {
		kind := Changed
		if errors.Is(err, errSignature) {
			kind = BadSignature
		}
		c.report.add(Problem{-1, kind, cosignedName, err.Error()})
		return
	}
	c.cosigned, c.report.Cosigned = &cp, cp.Size
	for _, key := range c.witnesses {
		said, err := cosigned(signed, key)
		if err != nil {
			c.report.add(Problem{-1, NoCosignature, cosignedName, err.Error()})
			continue
		}
		c.report.Cosignatures = append(c.report.Cosignatures, said)
	}
}

// choose settles which checkpoint the tiles are compared with: the public one,
// or where that is of no use the first one of the journal.
func (c *check) choose(signed []byte) error {
	cp, err := openCheckpoint(signed, c.v)
	c.believed = err == nil
	switch {
	case signed == nil:
		c.report.add(Problem{-1, Missing, checkpointName, "there is none"})
	case errors.Is(err, errSignature):
		c.report.add(Problem{-1, BadSignature, checkpointName, err.Error()})
		err = nil
	case err != nil:
		c.report.add(Problem{-1, Changed, checkpointName, err.Error()})
	}
	if j := c.journal; j != nil && (!c.believed || cp.Size < j.base.Size) {
		if c.believed {
			c.report.add(Problem{-1, Changed, checkpointName, fmt.Sprintf("it is of %d entries, the journal begins at %d", cp.Size, j.base.Size)})
		}
		cp, signed, err, c.believed = j.base, j.note, nil, true
	}
	if !c.believed { // what nobody signed says nothing: the files do
		cp.Size = min(cp.Size, c.extent)
	}
	c.public = cp
	c.report.Checkpoint, c.report.Published = string(signed), cp.Size
	return err
}

// readJournal reads the journal; nil if there is none. What looks torn may be a
// write under way, so it is read until it stays as it is.
func (c *check) readJournal() ([]byte, error) {
	raw, err := c.dir.ReadFile(journalName, maxJournal)
	for range readTries {
		if err != nil {
			break
		}
		if j, broken := parseJournal(raw, nil); broken == nil && len(j.tail) == 0 {
			break
		}
		before := raw
		time.Sleep(c.pause)
		if raw, err = c.dir.ReadFile(journalName, maxJournal); bytes.Equal(raw, before) {
			break
		}
	}
	if isMissing(err) {
		return nil, nil
	}
	return raw, err
}

// readEdge reads the partial tiles of the published tree.
func (c *check) readEdge() error {
	c.edge = map[string][]byte{}
	for level := 0; c.public.Size>>(tileHeight*level) > 0 && level < 8; level++ {
		at, ok := partial(level, c.public.Size)
		if !ok {
			continue
		}
		tiles := []tlog.Tile{at}
		if level == 0 {
			tiles = append(tiles, bundleOf(at))
		}
		for _, at := range tiles {
			data, err := c.dir.ReadFile(tilePath(at), maxBundle)
			if err != nil && !isMissing(err) {
				return err
			}
			if err == nil {
				c.edge[tilePath(at)] = append([]byte{}, data...)
			}
		}
	}
	return nil
}

// tile reads one tile or bundle of the published tree; nil if it is missing,
// which is a problem of its own.
func (c *check) tile(at tlog.Tile) ([]byte, error) {
	name := tilePath(at)
	if at.W < tileWidth {
		return c.edge[name], nil
	}
	data, err := c.dir.ReadFile(name, maxBundle)
	if isMissing(err) {
		return nil, nil
	}
	return data, err
}

// collectClaims lists every root that a signed checkpoint states.
func (c *check) collectClaims() {
	c.roots = map[int64][]claim{}
	claims := func(cp Checkpoint, kind ProblemKind, file, who string) {
		c.roots[cp.Size] = append(c.roots[cp.Size], claim{cp.Root, kind, file, who})
	}
	if c.believed {
		claims(c.public, Changed, checkpointName, "the checkpoint")
	}
	if c.kept != nil {
		claims(*c.kept, Fork, "", "the checkpoint kept elsewhere")
	}
	if c.cosigned != nil {
		claims(*c.cosigned, Fork, cosignedName, "the cosigned checkpoint")
	}
	if c.journal == nil {
		return
	}
	claims(c.journal.base, Changed, journalName, "the journal's first checkpoint")
	for _, r := range c.journal.records {
		claims(r.says, Changed, journalName, "a checkpoint of the journal")
	}
}

// check compares a side with the roots that are signed for its size.
func (c *check) check(s *side) {
	for _, claim := range c.roots[s.tree.size] {
		if root := s.tree.root(); root != claim.root {
			s.add(Problem{-1, claim.kind, claim.file, fmt.Sprintf(
				"the tree of %d entries has root %s, %s says %s", s.tree.size, root, claim.who, claim.root)})
		} else if claim.file == checkpointName {
			s.confirmed = true
		}
	}
}

func (c *check) sides() []*side {
	if c.other == nil {
		return []*side{c.main}
	}
	return []*side{c.main, c.other}
}

// bundles checks all entries below the published size. What a checkpoint says of that may
// be any number, so where bundle and tile are missing it goes on at the next file.
func (c *check) bundles() error {
	for from, size := int64(0), c.public.Size; from < size; {
		there, err := c.bundle(from)
		if err != nil {
			return err
		}
		if size-from <= tileWidth {
			break
		}
		if from += tileWidth; there {
			continue
		}
		next := size
		if i, _ := slices.BinarySearch(c.starts, from); i < len(c.starts) {
			next = min(size, c.starts[i])
		}
		if from < next {
			c.report.add(Problem{from, Missing, "", fmt.Sprintf("entries %d to %d: neither bundles nor tiles are there", from, next-1)})
		}
		from = next
	}
	return nil
}

// bundle checks the entries from an index on, as many as one bundle holds, and
// the tiles that they complete. It reports whether there are any, or their hashes.
func (c *check) bundle(from int64) (there bool, err error) {
	at := tlog.Tile{H: tileHeight, L: 0, N: from / tileWidth, W: int(min(tileWidth, c.public.Size-from))}
	entries, err := c.readEntries(at)
	if err != nil {
		return false, err
	}
	tile, err := c.readHashes(at)
	if err != nil {
		return false, err
	}
	there = entries != nil || tile != nil
	if entries == nil {
		entries = tile // what is missing is reported; the tree goes on
	}
	if tile == nil {
		tile = entries
	}
	if !slices.Equal(entries, tile) {
		c.diffs = append(c.diffs, diff{at, entries, tile})
		if c.other == nil {
			c.other = &side{tree: c.main.tree.clone(), problems: slices.Clone(c.main.problems)}
		}
	}
	c.grow(c.main, entries)
	if c.other != nil {
		c.grow(c.other, tile)
	}
	for _, s := range c.sides() {
		c.uppers(s, false)
		s.tree.forget(s.tree.size)
	}
	return there, nil
}

func (c *check) grow(s *side, leaves []tlog.Hash) {
	for _, h := range leaves {
		s.tree.add(h)
		c.check(s)
	}
}

// readEntries returns the hashes of the entries in a bundle, nil if there is
// none.
func (c *check) readEntries(at tlog.Tile) ([]tlog.Hash, error) {
	name := tilePath(bundleOf(at))
	raw, err := c.tile(bundleOf(at))
	if err != nil {
		return nil, err
	}
	from := at.N * tileWidth
	if raw == nil {
		c.report.add(Problem{from, Missing, name, fmt.Sprintf("entries %d to %d", from, from+int64(at.W)-1)})
		return nil, nil
	}
	entries, err := splitBundle(raw, 2*at.W)
	if err != nil {
		c.report.add(Problem{from + int64(len(entries)), Changed, name, err.Error()})
	}
	c.report.Bytes += int64(len(raw) - 2*len(entries))
	c.numbers(name, from, entries)
	hashes := make([]tlog.Hash, len(entries))
	for i, raw := range entries {
		hashes[i] = tlog.RecordHash(raw)
	}
	if c.journal != nil && from+int64(len(hashes)) > c.journal.base.Size {
		c.leaves = append(c.leaves, hashes[min(int64(len(hashes)), max(0, c.journal.base.Size-from)):]...)
	}
	return hashes, nil
}

// readHashes returns the hashes of a tile of level 0, nil if it is missing.
func (c *check) readHashes(at tlog.Tile) ([]tlog.Hash, error) {
	data, err := c.tile(at)
	if err != nil {
		return nil, err
	}
	if data == nil {
		c.report.add(Problem{-1, Missing, tilePath(at), "there is none"})
		return nil, nil
	}
	if len(data) != at.W*tlog.HashSize {
		c.report.add(Problem{-1, Changed, tilePath(at), fmt.Sprintf("%d bytes, want %d", len(data), at.W*tlog.HashSize)})
		return nil, nil
	}
	return slices.Collect(func(yield func(tlog.Hash) bool) {
		for h := range slices.Chunk(data, tlog.HashSize) {
			if !yield(tlog.Hash(h)) {
				return
			}
		}
	}), nil
}

// uppers compares the tiles above level 0 that a side has completed, or, at the
// end, those that stay partial.
func (c *check) uppers(s *side, end bool) {
	for level := 1; level < len(s.tree.tiles); level++ {
		run := s.tree.tiles[level]
		at := tlog.Tile{H: tileHeight, L: level, N: run.first / tileWidth, W: len(run.hashes)}
		if at.W == 0 || !end && at.W < tileWidth {
			continue
		}
		data, err := c.tile(at)
		switch {
		case err != nil:
			s.add(Problem{-1, Changed, tilePath(at), err.Error()})
		case data == nil:
			s.add(Problem{-1, Missing, tilePath(at), "there is none"})
		case !bytes.Equal(data, s.tree.tile(at)):
			s.add(Problem{-1, Changed, tilePath(at), "its hashes are not those of the tiles below"})
		}
	}
}

// numbers checks that the entries count up, and follows the intents.
func (c *check) numbers(name string, from int64, entries [][]byte) {
	for i, raw := range entries {
		index := from + int64(i)
		g, err := look(raw)
		if err != nil {
			c.report.add(Problem{index, Changed, name, err.Error()})
			continue
		}
		if g.seq != index+c.shift {
			c.misnumbered(name, index, g.seq, entries[i+1:])
		}
		c.track(g, index)
		c.follow(name, g, index)
	}
}

// follow checks that an entry that names the one before it in its session names that one:
// what a receipt proves of a session rests on it.
func (c *check) follow(name string, g glance, index int64) {
	if len(g.session) == 0 {
		return
	}
	session := maphash.Bytes(c.seed, g.session)
	before, ok := c.newest[session]
	if !ok {
		before = -1
	}
	if g.prev >= 0 && g.prev != before {
		c.report.add(Problem{index, WrongLink, name, fmt.Sprintf("it says that entry %d was before it in session %s; that is %s", g.prev, g.session, entryOrNone(before))})
	}
	c.newest[session] = g.seq
}

func entryOrNone(seq int64) string {
	if seq < 0 {
		return "none"
	}
	return fmt.Sprintf("entry %d", seq)
}

// misnumbered reports an entry whose number is not its index, and lets those
// that follow be off by as much.
func (c *check) misnumbered(name string, index, seq int64, after [][]byte) {
	want := index + c.shift
	detail := fmt.Sprintf("the entry at %d is numbered %d", index, seq)
	next := int64(-1)
	if len(after) > 0 {
		if g, err := look(after[0]); err == nil {
			next = g.seq
		}
	}
	switch {
	case next == want+1:
		c.report.add(Problem{index, Changed, name, detail})
	case seq == want+1 && next == want, seq == want-1 && next == want+2:
		if seq > want {
			c.report.add(Problem{index, Reordered, name, detail})
		}
	case seq > want && (next == seq+1 || next < 0):
		c.report.add(Problem{index, Missing, name, detail})
		c.shift += seq - want
	case seq < want && (next == seq+1 || next < 0):
		c.report.add(Problem{index, Extra, name, detail})
		c.shift += seq - want
	default:
		c.report.add(Problem{index, Reordered, name, detail})
	}
}

func (c *check) track(g glance, index int64) {
	switch {
	case g.permit == "":
	case g.kind == nucleus.KindIntent:
		c.intents[g.permit] = index
	case g.kind == nucleus.KindOutcome:
		delete(c.intents, g.permit)
	}
	c.checkOpen(index + 1)
}

func (c *check) openNow() []int64 {
	return append([]int64{}, slices.Sorted(maps.Values(c.intents))...)
}

// checkOpen compares the journal's list of intents without outcome, which no
// signature covers.
func (c *check) checkOpen(size int64) {
	if c.journal == nil || c.journal.base.Size != size {
		return
	}
	if open := c.openNow(); !slices.Equal(open, c.journal.open) && !(len(open) == 0 && len(c.journal.open) == 0) {
		c.report.add(Problem{-1, Changed, journalName, fmt.Sprintf("it lists the open intents %d, the entries say %d", c.journal.open, open)})
	}
}

// settle decides whether entries or tiles are the ones that were signed, and
// reports the other.
func (c *check) settle() {
	right := c.main
	entriesWrong := c.other != nil && !c.main.confirmed
	if entriesWrong && c.other.confirmed {
		right = c.other
	}
	for _, d := range c.diffs {
		if entriesWrong {
			c.compare(d)
		} else {
			c.tileChanged(d)
		}
	}
	for _, p := range right.problems {
		c.report.add(p)
	}
	right.problems = nil
	c.main, c.other = right, nil
}

// tileChanged reports a tile that does not fit entries which do fit the root.
func (c *check) tileChanged(d diff) {
	for i := range d.tile {
		if i >= len(d.entries) || d.tile[i] != d.entries[i] {
			c.report.add(Problem{-1, Changed, tilePath(d.at), fmt.Sprintf("hash %d is not that of entry %d", i, d.at.N*tileWidth+int64(i))})
			return
		}
	}
	c.report.add(Problem{-1, Changed, tilePath(d.at), fmt.Sprintf("%d hashes for %d entries", len(d.tile), len(d.entries))})
}

// compare says how the entries of a bundle differ from the hashes that the tile
// has for them.
func (c *check) compare(d diff) {
	name, from := tilePath(bundleOf(d.at)), d.at.N*tileWidth
	have, want := d.entries, d.tile
	if sameHashes(have, want) {
		for i := range want {
			if have[i] != want[i] {
				c.report.add(Problem{from + int64(i), Reordered, name, "the same entries stand in another order from here on"})
				return
			}
		}
	}
	h, w := 0, 0
	for h < len(have) && w < len(want) {
		index := from + int64(w)
		switch {
		case have[h] == want[w]:
			h, w = h+1, w+1
		case h+1 < len(have) && w+1 < len(want) && have[h+1] == want[w] && have[h] == want[w+1]:
			c.report.add(Problem{index, Reordered, name, fmt.Sprintf("entries %d and %d changed places", index, index+1)})
			h, w = h+2, w+2
		case w+1 < len(want) && have[h] == want[w+1]:
			c.report.add(Problem{index, Missing, name, "the entry is not there"})
			w++
		case h+1 < len(have) && have[h+1] == want[w]:
			c.report.add(Problem{index, Extra, name, "an entry was put in before it"})
			h++
		default:
			c.report.add(Problem{index, Changed, name, "the entry is not the one in the tree"})
			h, w = h+1, w+1
		}
	}
	if n := len(want) - w; n > 0 {
		c.report.add(Problem{from + int64(w), Missing, name, fmt.Sprintf("%d entries at the end of the bundle", n)})
	}
	if n := len(have) - h; n > 0 {
		c.report.add(Problem{from + int64(w), Extra, name, fmt.Sprintf("%d entries at the end of the bundle", n)})
	}
}

func sameHashes(a, b []tlog.Hash) bool {
	if len(a) != len(b) {
		return false
	}
	count := map[tlog.Hash]int{}
	for i := range a {
		count[a[i]]++
		count[b[i]]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}

// records goes on with the journal, whose first entries may be in tiles already.
func (c *check) records() {
	if c.journal == nil {
		return
	}
	index := c.journal.base.Size
	for _, r := range c.journal.records {
		for _, raw := range r.entries {
			h := tlog.RecordHash(raw)
			at := int(index - c.journal.base.Size)
			switch {
			case index >= c.public.Size:
				c.numbers(journalName, index, [][]byte{raw})
				c.report.Bytes += int64(len(raw))
				c.grow(c.main, []tlog.Hash{h})
			case at < len(c.leaves) && c.leaves[at] != h:
				c.report.add(Problem{index, Changed, journalName, "journal and bundle have different entries"})
			}
			index++
		}
		c.report.Checkpoint = string(r.checkpoint)
	}
	for _, p := range c.main.problems {
		c.report.add(p)
	}
}

// conclude names sizes that were signed and not reached, and files that belong
// to no tree.
func (c *check) conclude() {
	size := c.main.tree.size
	c.report.Size, c.report.Root, c.report.Intents = size, c.main.tree.root().String(), c.openNow()
	if c.public.Size > size || c.journal != nil && c.public.Size > c.journal.end() {
		c.report.add(Problem{size, Truncated, "", fmt.Sprintf("the checkpoint is of %d entries, %d are there", c.public.Size, size)})
	}
	if c.kept != nil && c.kept.Size > size {
		c.report.add(Problem{size, Truncated, "", fmt.Sprintf("the checkpoint kept elsewhere is of %d entries, %d are there", c.kept.Size, size)})
	}
	if c.cosigned != nil && c.cosigned.Size > size {
		c.report.add(Problem{size, Truncated, cosignedName, fmt.Sprintf("the cosigned checkpoint is of %d entries, %d are there", c.cosigned.Size, size)})
	}
	for _, name := range slices.Sorted(maps.Keys(c.files)) {
		c.stray(name, size)
	}
}

// stray checks a file below tile/ that the published tree does not need.
func (c *check) stray(name string, size int64) {
	at, err := parseTilePath(name)
	if err != nil {
		c.report.add(Problem{-1, Extra, name, "it is neither tile nor bundle"})
		return
	}
	level := max(at.L, 0)
	if at.N*tileWidth+int64(at.W) > size>>(tileHeight*level) {
		c.report.add(Problem{-1, Extra, name, fmt.Sprintf("a log of %d entries has no such tile", size)})
		return
	}
	published := c.public.Size >> (tileHeight * level)
	wide := at
	wide.W = int(min(tileWidth, published-at.N*tileWidth))
	if wide.W <= at.W {
		return // checked already, or written after the checkpoint, for one to come
	}
	data, err := c.dir.ReadFile(name, maxBundle)
	if isMissing(err) {
		return // superseded meanwhile
	}
	whole, wideErr := c.tile(wide)
	if err != nil || wideErr != nil || !bytes.HasPrefix(whole, data) {
		c.report.add(Problem{-1, Changed, name, "it is not the beginning of " + tilePath(wide)})
	}
}
