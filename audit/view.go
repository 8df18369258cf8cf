package audit

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"strings"

	"cal/internal/durable"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// view is a log as one of its signed checkpoints has it, for proofs. The log may
// grow meanwhile: what lies under a checkpoint never changes, only the files that
// hold it do.
type view struct {
	dir    *durable.Dir
	key    note.Verifier
	signed []byte // the checkpoint
	Checkpoint

	journal *journal
	leaves  []tlog.Hash            // of the entries in the journal's records
	tiles   map[string][]tlog.Hash // that were read
}

// openView opens the log at its newest checkpoint, or at an older one that is given. The
// signature is checked: a proof under a checkpoint that nobody believes is of no use.
func openView(dir, key string, at []byte) (*view, error) {
	v, err := note.NewVerifier(strings.TrimSpace(key))
	if err != nil {
		return nil, fmt.Errorf("verifier key %q: %w", key, err)
	}
	d, err := durable.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	w := &view{dir: d, key: v}
	if err := w.start(at); err != nil {
		return nil, fmt.Errorf("log %s: %w", dir, errors.Join(err, d.Close()))
	}
	return w, nil
}

func (w *view) start(at []byte) error {
	if err := w.reload(); err != nil {
		return err
	}
	if at == nil {
		at = w.journal.newest()
	}
	cp, err := openCheckpoint(at, w.key)
	if err != nil {
		return err
	}
	if cp.Size > w.journal.end() {
		return fmt.Errorf("the checkpoint is of %d entries, %d are there", cp.Size, w.journal.end())
	}
	w.signed, w.Checkpoint = at, cp
	return nil
}

// preferCosigned goes over to the checkpoint that witnesses have cosigned, where the log
// has one and it covers an entry. What is wrong with one Verify says; here it is as if
// there were none.
func (w *view) preferCosigned(last int64) {
	at, err := w.dir.ReadFile(cosignedName, MaxCheckpoint)
	if err != nil {
		return
	}
	if cp, err := openCheckpoint(at, w.key); err == nil && last < cp.Size && cp.Size <= w.Size {
		w.signed, w.Checkpoint = bytes.Clone(at), cp
	}
}

func (w *view) close() { _ = w.dir.Close() } // nothing was written

// newest is the signed checkpoint of the newest entry.
func (j *journal) newest() []byte {
	if n := len(j.records); n > 0 {
		return j.records[n-1].checkpoint
	}
	return j.note
}

// reload reads the journal anew and forgets what it has read of the tiles.
func (w *view) reload() error {
	j, err := readJournal(w.dir)
	if err != nil {
		return err
	}
	w.journal, w.tiles, w.leaves = j, map[string][]tlog.Hash{}, nil
	readRecords(j, j.base.Size, func(raw []byte) bool {
		w.leaves = append(w.leaves, tlog.RecordHash(raw))
		return true
	})
	return nil
}

// steady does something that reads tiles, anew when the writer published in between:
// partial tiles go when wider ones come.
func (w *view) steady(do func() error) error {
	for range readTries {
		err := do()
		if err == nil || !isMissing(err) {
			return err
		}
		before := w.journal.base
		if again := w.reload(); again != nil || w.journal.base == before {
			return err // nobody published: the tile is missing
		}
	}
	return fmt.Errorf("it was published %d times while it was being read", readTries)
}

// node is the hash of the perfect subtree over the leaves n<<level and on, as many as
// 1<<level.
func (w *view) node(level int, n int64) (tlog.Hash, error) {
	if (n+1)<<level > w.journal.base.Size {
		if level == 0 {
			at := n - w.journal.base.Size
			if at < 0 || at >= int64(len(w.leaves)) {
				return tlog.Hash{}, fmt.Errorf("there is no entry %d", n)
			}
			return w.leaves[at], nil
		}
		return w.join(level, n)
	}
	if level%tileHeight != 0 {
		return w.join(level, n)
	}
	hashes, err := w.tile(level/tileHeight, n/tileWidth)
	if err != nil {
		return tlog.Hash{}, err
	}
	return hashes[n%tileWidth], nil
}

func (w *view) join(level int, n int64) (tlog.Hash, error) {
	left, err := w.node(level-1, 2*n)
	if err != nil {
		return left, err
	}
	right, err := w.node(level-1, 2*n+1)
	return tlog.NodeHash(left, right), err
}

// tile reads the widest tile that the journal's base has at a place.
func (w *view) tile(level int, n int64) ([]tlog.Hash, error) {
	at := tlog.Tile{H: tileHeight, L: level, N: n}
	at.W = int(min(tileWidth, w.journal.base.Size>>(tileHeight*level)-n*tileWidth))
	name := tilePath(at)
	if hashes, ok := w.tiles[name]; ok {
		return hashes, nil
	}
	data, err := w.dir.ReadFile(name, tileWidth*tlog.HashSize)
	if err != nil {
		return nil, err
	}
	if len(data) != at.W*tlog.HashSize {
		return nil, fmt.Errorf("%s has %d bytes, want %d", name, len(data), at.W*tlog.HashSize)
	}
	hashes := make([]tlog.Hash, at.W)
	for i := range hashes {
		hashes[i] = tlog.Hash(data[i*tlog.HashSize:])
	}
	w.tiles[name] = hashes
	return hashes, nil
}

// subtree is the Merkle tree hash (RFC 6962) of the leaves from lo on, before hi.
func (w *view) subtree(lo, hi int64) (tlog.Hash, error) {
	if k := hi - lo; k&(k-1) == 0 && lo%k == 0 {
		return w.node(bits.TrailingZeros64(uint64(k)), lo/k)
	}
	mid := lo + split(hi-lo)
	left, err := w.subtree(lo, mid)
	if err != nil {
		return left, err
	}
	right, err := w.subtree(mid, hi)
	return tlog.NodeHash(left, right), err
}

// split is how many of n leaves, two at least, the left subtree has: the largest
// power of two below n.
func split(n int64) int64 { return 1 << (bits.Len64(uint64(n-1)) - 1) }

// entry is the stored bytes of one entry.
func (w *view) entry(n int64) (raw []byte, err error) {
	if n < 0 || n >= w.Size {
		return nil, fmt.Errorf("there is no entry %d: the checkpoint is of %d", n, w.Size)
	}
	err = w.steady(func() error {
		keep := func(r []byte) bool {
			raw = append([]byte{}, r...)
			return false
		}
		if n < w.journal.base.Size {
			if _, err := readTiles(w.dir, n, w.journal.base.Size, keep); err != nil && !errors.Is(err, errStopped) {
				return err
			}
			return nil
		}
		readRecords(w.journal, n, keep)
		return nil
	})
	return raw, err
}
