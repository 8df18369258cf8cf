// Package audit keeps the log: what was decided and what came of it, in an
// append-only Merkle tree on the host's disk.
//
// Claim: an entry that Append returned is on the disk and under a checkpoint
// signed by the log's key, and with the directory and the verifier key alone
// anyone detects a changed, inserted, dropped or reordered entry; against a
// checkpoint kept elsewhere, also truncation and a rewrite by the key's holder.
// Threat: who can write the directory; kill -9, power loss, a full disk, I/O
// errors; two writers. Promise: nothing acknowledged is lost, a write that a
// crash cut is marked by an entry, and a log that cannot be written says so at
// every append until it has been read anew from the disk.
//
// The directory is a C2SP tlog-tiles log (checkpoint, tile/, tile/entries/) at
// every moment, at the size that was last published, and a journal with what
// was appended since. doc/log.md is the format. The package starts no goroutine:
// the callers of Append write for one another, and the owner of a Log calls
// Publish now and then.
package audit

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"path"
	"slices"
	"sync"
	"time"

	"cal/internal/durable"
	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

const (
	checkpointName = "checkpoint"
	cosignedName   = "cosigned"
	lockName       = "lock"

	// A journal longer than this is published by the append that made it so.
	journalBytes   = 2 << 20
	journalEntries = 4096

	// maxGroup bounds the bytes of entries in one record.
	maxGroup = 4 << 20

	// tornShown is how much of a torn write its log.torn entry repeats.
	tornShown = 4 << 10
)

// Options are what a log is opened with. Origin and Key are required.
type Options struct {
	Origin string             // names the log in its checkpoints, without spaces and plus
	Key    ed25519.PrivateKey // signs the checkpoints
	Now    func() time.Time   // nil: time.Now
	FS     FS                 // nil: the files of the directory

	// Link makes every entry of a session name the one before it (Entry.Prev), so that
	// a receipt proves that it leaves none out. A session begins with pod.create.
	Link bool
}

// FS is the disk under a log. Names are slash-separated and relative. When a
// method returns nil its effect survives a power cut; when it fails, the effect
// may have taken place or not. A missing file is fs.ErrNotExist.
type FS interface {
	// Lock keeps other writers out until the result is closed; durable.ErrLocked.
	Lock(name string) (io.Closer, error)
	// Names lists the log's directory.
	Names() ([]string, error)
	// Partials lists the files in directories below tile/ whose names end with ".p".
	Partials() ([]string, error)
	ReadFile(name string, limit int64) ([]byte, error)
	// WriteFile replaces the file whole, and makes directories on the way.
	WriteFile(name string, data []byte) error
	// Append opens an existing file for writing at its end.
	Append(name string) (File, error)
	// Remove removes a file or an empty directory; a missing one is no error. It
	// may come back after a power cut.
	Remove(name string) error
	Close() error
}

// File is the journal. What Write wrote is on the disk after Sync.
type File interface {
	io.Writer
	Sync() error
	io.Closer
}

// ErrFailed is wrapped by the error of every append after one that could not be
// written, until Reopen succeeds.
var ErrFailed = errors.New("the log cannot be written")

// ErrClosed is wrapped by what is returned after Close.
var ErrClosed = errors.New("the log is closed")

// Log is an open log. Its methods may be called at the same time.
type Log struct {
	dir    string
	fs     FS
	lock   io.Closer
	signer *signer
	now    func() time.Time
	links  *links // nil: entries name no other

	// The locks are taken in this order. tiles is held while tiles are written,
	// which appends need not wait for.
	tiles sync.Mutex
	kept  int64 // size of the cosigned checkpoint

	// disk is held while the journal is written, one group at a time.
	disk      sync.Mutex
	tree      *tree
	recent    [][]byte // the entries from the first one of the newest bundle on that is not published whole
	first     int64    // the index of recent[0]
	published int64    // the size of the tree in tiles
	journal   File
	records   []byte // what the journal holds after its base

	mu    sync.Mutex
	next  int64 // sequence number of the next entry
	queue []*Pending
	err   error // why appends are refused
	note  []byte
	size  int64
	root  tlog.Hash
	// public is the checkpoint of the tiles, under the log's signature alone.
	public []byte
	open   map[string]nucleus.Entry // by permit: intents without outcome
}

// Pending is an entry on its way to the disk.
type Pending struct {
	log   *Log
	leads bool // Wait writes the queue
	entry nucleus.Entry
	raw   []byte
	err   error
	done  chan struct{}
}

// Seq is the place that the entry has in the log, if it comes to be there.
func (p *Pending) Seq() int64 { return p.entry.Seq }

// Open opens the log in a directory, or makes one if the directory is empty or
// missing. A write that was cut is marked by a log.torn entry; nothing else is
// appended. It fails when another process has the log open, when the directory
// holds something else, when the key is not the log's, and when the files
// contradict one another; then nothing is written.
func Open(dir string, o Options) (*Log, error) {
	s, err := newSigner(o.Origin, o.Key)
	if err != nil {
		return nil, err
	}
	l := &Log{dir: dir, fs: o.FS, signer: s, now: o.Now}
	if o.Link {
		l.links = &links{}
	}
	if l.now == nil {
		l.now = time.Now
	}
	if l.fs == nil {
		if l.fs, err = openFiles(dir); err != nil {
			return nil, fmt.Errorf("log %s: %w", dir, err)
		}
	}
	if err := l.start(); err != nil {
		if l.lock != nil {
			err = errors.Join(err, l.lock.Close())
		}
		return nil, fmt.Errorf("log %s: %w", dir, errors.Join(err, l.fs.Close()))
	}
	return l, nil
}

func (l *Log) start() (err error) {
	if l.lock, err = l.fs.Lock(lockName); err != nil {
		if errors.Is(err, durable.ErrLocked) {
			return fmt.Errorf("another process has it open for writing: %w", err)
		}
		return err
	}
	return l.load()
}

// Append writes one entry and returns it with its sequence number and time,
// when it is on the disk and under a signed checkpoint. Args pass through Shown, and Data loses
// its secrets as Args do.
// An entry without a kind, with text that is not UTF-8, or too large is refused
// and costs nothing; an entry that could not be written fails with ErrFailed,
// and so does every later one until Reopen. Such an entry may still turn up in
// the log.
//
// Callers that append at the same time share one sync. Append waits for the
// disk, without a deadline: nobody can take back a sync that was begun.
func (l *Log) Append(e nucleus.Entry) (nucleus.Entry, error) {
	p, err := l.Begin(e)
	if err != nil {
		return nucleus.Entry{}, err
	}
	return p.Wait()
}

// Begin gives an entry its place in the log and does not write it: that is up to
// Wait, which the caller must call soon, for others may wait for it to do so. So an
// order that a caller's lock fixes is the log's, and the lock is not held while
// the disk works.
func (l *Log) Begin(e nucleus.Entry) (*Pending, error) {
	if len(e.Args) > 0 {
		e.Args = Shown(e.Args)
	}
	e.Data = shownData(e.Kind, e.Data)
	earlier := l.lastOf(e)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return nil, l.err
	}
	e.Seq, e.Time, e.Prev = l.next, l.now().UTC().Format(time.RFC3339Nano), l.links.prev(e.Session, earlier)
	raw, err := encode(e)
	if err != nil {
		return nil, err
	}
	l.links.add(e.Session, e.Seq, l.size)
	// Whoever finds the queue empty writes it for all who join until the disk is
	// free.
	p := &Pending{log: l, leads: len(l.queue) == 0, entry: e, raw: raw, done: make(chan struct{})}
	l.next++
	l.queue = append(l.queue, p)
	return p, nil
}

// Wait returns as Append does. It is called once.
func (p *Pending) Wait() (nucleus.Entry, error) {
	if p.leads {
		p.log.write()
	}
	<-p.done
	if p.err != nil {
		return nucleus.Entry{}, p.err
	}
	return p.entry, nil
}

// write commits what is queued. Another leader may have done so already.
func (l *Log) write() {
	if l.commitAll() && l.tiles.TryLock() {
		defer l.tiles.Unlock()
		// Everything is acknowledged. An error refuses the appends to come.
		_ = l.publish()
	}
}

// commitAll writes the queue to the journal, and reports whether the journal has
// become too long.
func (l *Log) commitAll() (long bool) {
	l.disk.Lock()
	defer l.disk.Unlock()
	// Once: going on while others queue would never let this caller return.
	for group := range groups(l.take()) {
		l.finish(group, l.commit(group))
	}
	return l.failure() == nil && (len(l.records) > journalBytes || l.tree.size-l.published > journalEntries)
}

// take empties the queue.
func (l *Log) take() []*Pending {
	l.mu.Lock()
	defer l.mu.Unlock()
	queue := l.queue
	l.queue = nil
	return queue
}

// groups cuts a queue into what goes into one record each.
func groups(queue []*Pending) iter.Seq[[]*Pending] {
	return func(yield func([]*Pending) bool) {
		start, bytes := 0, 0
		for i, p := range queue {
			if i > start && bytes+len(p.raw) > maxGroup {
				if !yield(queue[start:i]) {
					return
				}
				start, bytes = i, 0
			}
			bytes += len(p.raw)
		}
		if start < len(queue) {
			yield(queue[start:])
		}
	}
}

// commit makes one journal record of a group: one write, one sync.
func (l *Log) commit(group []*Pending) error {
	if err := l.failure(); err != nil {
		return err
	}
	var bundle []byte
	for _, p := range group {
		l.grow(p.raw)
		bundle = appendBundle(bundle, p.raw)
	}
	signed, err := l.signer.checkpoint(l.tree)
	if err != nil {
		return l.fail(err)
	}
	rec := journalRecord(signed, bundle)
	if _, err := l.journal.Write(rec); err != nil {
		return l.fail(err)
	}
	if err := l.journal.Sync(); err != nil {
		return l.fail(err)
	}
	l.records = append(l.records, rec...)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.show(signed)
	for _, p := range group {
		trackIntent(l.open, p.entry)
	}
	return nil
}

// grow adds an entry to the tree in memory.
func (l *Log) grow(raw []byte) {
	l.tree.add(tlog.RecordHash(raw))
	l.recent = append(l.recent, raw)
}

// show makes the tree what the accessors answer. mu is held.
func (l *Log) show(signed []byte) {
	l.note, l.size, l.root = signed, l.tree.size, l.tree.root()
}

// trackIntent keeps the intents without outcome.
func trackIntent(open map[string]nucleus.Entry, e nucleus.Entry) {
	switch {
	case e.Permit == "":
	case e.Kind == nucleus.KindIntent:
		open[e.Permit] = e
	case e.Kind == nucleus.KindOutcome:
		delete(open, e.Permit)
	}
}

func (l *Log) finish(group []*Pending, err error) {
	for _, p := range group {
		p.err = err
		close(p.done)
	}
}

func (l *Log) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// fail refuses the appends to come, if err is an error, and returns the refusal.
func (l *Log) fail(err error) error {
	if err == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = fmt.Errorf("log %s: %w after entry %d: %w", l.dir, ErrFailed, l.size-1, err)
	return l.err
}

// Publish brings tiles and checkpoint up to the newest entry, so that other
// programs for tlog-tiles see it too, and shortens the journal. It costs some
// ten syncs when there is something to publish, nothing otherwise; appends go on
// meanwhile. The owner of the log calls it every second or so. Long journals are
// published by Append, and Close publishes.
func (l *Log) Publish() error {
	l.tiles.Lock()
	defer l.tiles.Unlock()
	return l.publish()
}

// publish holds tiles. The order keeps the directory whole at every step: tiles
// first, then the checkpoint that needs them, then the journal loses what they
// hold, then the tiles that nobody needs any more go.
func (l *Log) publish() error {
	e, err := l.edition()
	if e == nil || err != nil {
		return err
	}
	if err := l.writeTiles(e); err != nil {
		return l.fail(err)
	}
	l.disk.Lock()
	defer l.disk.Unlock()
	if err := l.failure(); err != nil {
		return err
	}
	return l.fail(l.rebase(e))
}

// edition is a state of the log on its way into tiles. Appends go on beside it.
type edition struct {
	from   int64 // size that is published already
	tree   *tree
	recent [][]byte
	first  int64
	note   []byte
	base   []byte // the start of the journal that goes on from it
	mark   int    // how much of the journal's records it holds
}

// edition is nil when everything is published.
func (l *Log) edition() (*edition, error) {
	l.disk.Lock()
	defer l.disk.Unlock()
	if err := l.failure(); err != nil {
		return nil, err
	}
	if l.published == l.tree.size {
		return nil, nil
	}
	return l.newEdition()
}

// newEdition holds disk.
func (l *Log) newEdition() (*edition, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := base{Checkpoint: string(l.note), Open: []int64{}}
	for _, e := range l.open {
		b.Open = append(b.Open, e.Seq)
	}
	slices.Sort(b.Open)
	start, err := journalStart(b)
	if err != nil {
		return nil, err
	}
	// Elements of recent never change, so sharing them is safe.
	return &edition{l.published, l.tree.clone(), l.recent[:len(l.recent):len(l.recent)], l.first, l.note, start, len(l.records)}, nil
}

// writeTiles writes the tiles that an edition adds, and its checkpoint.
func (l *Log) writeTiles(e *edition) error {
	for _, at := range tlog.NewTiles(tileHeight, e.from, e.tree.size) {
		if at.L == 0 {
			if err := l.fs.WriteFile(tilePath(bundleOf(at)), e.bundle(at)); err != nil {
				return err
			}
		}
		if err := l.fs.WriteFile(tilePath(at), e.tree.tile(at)); err != nil {
			return err
		}
	}
	return l.fs.WriteFile(checkpointName, e.note)
}

// bundle is the entry bundle beside a tile of level 0.
func (e *edition) bundle(at tlog.Tile) []byte {
	start := at.N*tileWidth - e.first
	var bundle []byte
	for _, raw := range e.recent[start : start+int64(at.W)] {
		bundle = appendBundle(bundle, raw)
	}
	return bundle
}

// rebase replaces the journal by one that goes on from an edition in tiles, and
// forgets what the tiles hold. disk is held.
func (l *Log) rebase(e *edition) error {
	rest := slices.Clone(l.records[e.mark:])
	if err := l.fs.WriteFile(journalName, append(e.base, rest...)); err != nil {
		return err
	}
	if err := l.resume(); err != nil {
		return err
	}
	l.records, l.published = rest, e.tree.size
	from := l.published / tileWidth * tileWidth
	l.recent = slices.Clone(l.recent[from-l.first:])
	l.first = from
	l.tree.forget(l.published)
	l.mu.Lock()
	l.public = e.note
	l.mu.Unlock()
	l.removePartials(e.from, e.tree.size)
	return nil
}

// resume opens the journal for appending.
func (l *Log) resume() error {
	f, err := l.fs.Append(journalName)
	if err != nil {
		return err
	}
	if l.journal != nil {
		_ = l.journal.Close() // replaced: nothing in it is needed any more
	}
	l.journal = f
	return nil
}

// removePartials removes the partial tiles of the tree published before. One
// that stays harms nobody, so errors are let pass.
func (l *Log) removePartials(before, size int64) {
	for level := 0; before>>(tileHeight*level) > 0; level++ {
		at, ok := partial(level, before)
		if now, still := partial(level, size); !ok || still && now == at {
			continue
		}
		tiles := []tlog.Tile{at}
		if level == 0 {
			tiles = append(tiles, bundleOf(at))
		}
		for _, at := range tiles {
			_ = l.fs.Remove(tilePath(at))
			if full := at; size>>(tileHeight*level)/tileWidth > at.N {
				full.W = tileWidth
				_ = l.fs.Remove(tilePath(full) + ".p")
			}
		}
	}
}

// removeStale removes the partial tiles that a crash kept from being removed: all for
// which the tree of size leaves, which is published, has a wider one. Errors are let
// pass, as above.
func (l *Log) removeStale(size int64) {
	names, _ := l.fs.Partials()
	for _, name := range names {
		at, err := parseTilePath(name)
		if err != nil || at.N >= math.MaxInt64/tileWidth {
			continue // Verify says so
		}
		if at.N*tileWidth+int64(at.W) < min(size>>(tileHeight*max(at.L, 0)), (at.N+1)*tileWidth) {
			_ = l.fs.Remove(name)
			_ = l.fs.Remove(path.Dir(name)) // which fails where something is left
		}
	}
}

// Reopen reads the log anew from the disk after a failure, keeping the lock.
// When it returns nil, everything that was ever acknowledged is there, a torn
// write is marked, and appends go on. It is harmless on a healthy log.
func (l *Log) Reopen() error {
	l.tiles.Lock()
	defer l.tiles.Unlock()
	l.disk.Lock()
	defer l.disk.Unlock()
	if err := l.failure(); errors.Is(err, ErrClosed) {
		return err
	}
	// What waits has sequence numbers of the state that is given up.
	waiting := l.fail(errors.New("it is being reopened"))
	l.finish(l.take(), waiting)
	if l.journal != nil {
		_ = l.journal.Close() // its state is unknown; load proves what is there
		l.journal = nil
	}
	if err := l.load(); err != nil {
		return l.fail(err)
	}
	return nil
}

// Close publishes and gives the log up. Appends that are under way are finished
// or refused. A second Close does nothing.
func (l *Log) Close() error {
	l.tiles.Lock()
	defer l.tiles.Unlock()
	err := l.publish()
	if errors.Is(err, ErrClosed) {
		return nil
	}
	l.disk.Lock()
	defer l.disk.Unlock()
	l.mu.Lock()
	l.err = fmt.Errorf("log %s: %w", l.dir, ErrClosed)
	l.mu.Unlock()
	if l.journal != nil {
		err = errors.Join(err, l.journal.Close())
	}
	return errors.Join(err, l.lock.Close(), l.fs.Close())
}

// Checkpoint is the newest signed checkpoint whose entries are all on the disk.
func (l *Log) Checkpoint() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.note)
}

// Next is the sequence number that the next entry gets.
func (l *Log) Next() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// Size is the number of entries on the disk.
func (l *Log) Size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size
}

// Root is the Merkle tree hash of the entries on the disk.
func (l *Log) Root() tlog.Hash {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.root
}

// OpenIntents returns, oldest first, the request.intent entries with a permit
// that no request.outcome entry names. Right after Open these are the requests
// that a crash cut off: the owner closes each with an outcome of status unknown.
// An intent without a permit was refused and waits for nothing. The journal
// carries the list, so the cost does not grow with the log.
func (l *Log) OpenIntents() []nucleus.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	open := []nucleus.Entry{}
	for _, e := range l.open {
		open = append(open, e)
	}
	slices.SortFunc(open, func(a, b nucleus.Entry) int { return int(a.Seq - b.Seq) })
	return open
}

// tornData is the Data of a log.torn entry: what was cut, whole or its head.
type tornData struct {
	Bytes  int    `json:"bytes"`
	SHA256 string `json:"sha256"`
	Head   []byte `json:"head_b64"`
}

func tornEntry(seq int64, now time.Time, tail []byte) (nucleus.Entry, error) {
	sum := sha256.Sum256(tail)
	data, err := json.Marshal(tornData{len(tail), hex.EncodeToString(sum[:]), tail[:min(len(tail), tornShown)]})
	return nucleus.Entry{
		Seq: seq, Time: now.UTC().Format(time.RFC3339Nano), Kind: nucleus.KindLogTorn, Data: data,
	}, err
}

// isMissing reports whether a file is not there.
func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
