package audit

import (
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// tileReader gives x/mod's proofs the tiles of a directory.
type tileReader func(name string, limit int64) ([]byte, error)

func (read tileReader) Height() int                     { return tileHeight }
func (read tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

func (read tileReader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(tiles))
	for i, at := range tiles {
		raw, err := read(tilePath(at), tileWidth*tlog.HashSize)
		if err != nil {
			return nil, err
		}
		if len(raw) != at.W*tlog.HashSize {
			return nil, fmt.Errorf("%s has %d bytes, want %d", tilePath(at), len(raw), at.W*tlog.HashSize)
		}
		data[i] = append([]byte{}, raw...)
	}
	return data, nil
}

// rootAt is the root of the first size entries of a tree in tiles.
func rootAt(size int64, of Checkpoint, read tileReader) (tlog.Hash, error) {
	if size == 0 {
		return EmptyRoot, nil
	}
	return tlog.TreeHash(size, tlog.TileHashReader(tlog.Tree{N: of.Size, Hash: of.Root}, read))
}

// Published is the checkpoint of the tiles, under the log's signature alone.
func (l *Log) Published() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]byte{}, l.public...)
}

// Consistency is the RFC 6962 proof that the tree of the first old entries is the
// beginning of the tree of the first size. Both are at most what is published; old
// 0 needs no proof. What the tiles say is checked against the published checkpoint.
func (l *Log) Consistency(old, size int64) ([]tlog.Hash, error) {
	l.tiles.Lock() // no tile that is needed goes meanwhile
	defer l.tiles.Unlock()
	public, err := openCheckpoint(l.Published(), l.signer)
	if err != nil {
		return nil, err
	}
	if old < 0 || old > size || size > public.Size {
		return nil, fmt.Errorf("log %s: no proof from %d to %d entries, %d are published", l.dir, old, size, public.Size)
	}
	if old == 0 || old == size {
		return []tlog.Hash{}, nil
	}
	reader := tlog.TileHashReader(tlog.Tree{N: public.Size, Hash: public.Root}, tileReader(l.fs.ReadFile))
	proof, err := tlog.ProveTree(size, old, reader)
	if err != nil {
		return nil, fmt.Errorf("log %s: proof from %d to %d entries: %w", l.dir, old, size, err)
	}
	return proof, nil
}

// Keep stores a checkpoint of this log that witnesses have cosigned, in the place of
// an older one. A log that is opened later must hold what it says. The public
// checkpoint gets the cosignatures too, when it is of the same size.
func (l *Log) Keep(signed []byte) error {
	l.tiles.Lock()
	defer l.tiles.Unlock()
	if err := l.failure(); errors.Is(err, ErrClosed) {
		return err
	}
	public, err := openCheckpoint(l.Published(), l.signer)
	if err != nil {
		return err
	}
	cp, err := openCheckpoint(signed, l.signer)
	if err != nil {
		return fmt.Errorf("log %s: %w", l.dir, err)
	}
	if cp.Size < l.kept || cp.Size > public.Size {
		return fmt.Errorf("log %s: the cosigned checkpoint is of %d entries, want %d to %d", l.dir, cp.Size, l.kept, public.Size)
	}
	root, err := rootAt(cp.Size, public, l.fs.ReadFile)
	if err != nil {
		return fmt.Errorf("log %s: %w", l.dir, err)
	}
	if root != cp.Root {
		return fmt.Errorf("log %s: the cosigned checkpoint of %d entries has root %s, the log's is %s", l.dir, cp.Size, cp.Root, root)
	}
	if err := l.fs.WriteFile(cosignedName, signed); err != nil {
		return err
	}
	l.kept = cp.Size
	if cp.Size == public.Size {
		return l.fs.WriteFile(checkpointName, signed)
	}
	return nil
}

// ownSignature is a checkpoint without the signatures of others.
func (s *signer) ownSignature(signed []byte) ([]byte, error) {
	n, err := note.Open(signed, note.VerifierList(s))
	if err != nil {
		return nil, err
	}
	n.UnverifiedSigs = nil
	return note.Sign(n)
}

// EmptyRoot is the root of a log without entries (RFC 6962, 2.1).
var EmptyRoot = (&tree{}).root()
