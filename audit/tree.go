package audit

import (
	"crypto/sha256"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// C2SP tlog-tiles fixes the height of a tile.
const (
	tileHeight = 8
	tileWidth  = 1 << tileHeight
)

// entriesLevel is the level under which x/mod files the records themselves.
const entriesLevel = -1

// tree is the right edge of a Merkle tree (RFC 6962): enough to append, to
// name the root, and to write the tiles that are not yet written.
type tree struct {
	size  int64
	stack []tlog.Hash // roots of the perfect subtrees of size, largest first
	tiles []run       // by level
}

// run is hashes of one tile level from index first on, a multiple of tileWidth.
type run struct {
	first  int64
	hashes []tlog.Hash
}

// add appends a leaf.
func (t *tree) add(h tlog.Hash) {
	t.keep(0, h)
	height := 0
	for n := t.size; n&1 == 1; n >>= 1 {
		top := len(t.stack) - 1
		h = tlog.NodeHash(t.stack[top], h)
		t.stack = t.stack[:top]
		if height++; height%tileHeight == 0 {
			t.keep(height/tileHeight, h)
		}
	}
	t.stack = append(t.stack, h)
	t.size++
}

func (t *tree) keep(level int, h tlog.Hash) {
	if level == len(t.tiles) {
		t.tiles = append(t.tiles, run{})
	}
	t.tiles[level].hashes = append(t.tiles[level].hashes, h)
}

// root is the Merkle tree hash; of no leaves, the hash of nothing.
func (t *tree) root() tlog.Hash {
	if len(t.stack) == 0 {
		return sha256.Sum256(nil)
	}
	last := len(t.stack) - 1
	h := t.stack[last]
	for i := last - 1; i >= 0; i-- {
		h = tlog.NodeHash(t.stack[i], h)
	}
	return h
}

// tile is the content of one tile; it must not have been forgotten.
func (t *tree) tile(at tlog.Tile) []byte {
	level := t.tiles[at.L]
	start := at.N*tileWidth - level.first
	var data []byte
	for _, h := range level.hashes[start : start+int64(at.W)] {
		data = append(data, h[:]...)
	}
	return data
}

// forget drops the hashes of the tiles that are full in a tree of size leaves.
func (t *tree) forget(size int64) {
	for i := range t.tiles {
		level := &t.tiles[i]
		first := size >> (tileHeight * i) / tileWidth * tileWidth
		if first > level.first {
			level.hashes = append([]tlog.Hash(nil), level.hashes[first-level.first:]...)
			level.first = first
		}
	}
}

func (t *tree) clone() *tree {
	c := &tree{size: t.size, stack: append([]tlog.Hash(nil), t.stack...)}
	for _, level := range t.tiles {
		c.tiles = append(c.tiles, run{level.first, append([]tlog.Hash(nil), level.hashes...)})
	}
	return c
}

// loadTree rebuilds the edge of a tree of size leaves from its partial tiles.
func loadTree(size int64, read func(tlog.Tile) ([]byte, error)) (*tree, error) {
	t := &tree{size: size}
	for level := 0; size>>(tileHeight*level) > 0; level++ {
		t.tiles = append(t.tiles, run{first: size >> (tileHeight * level) / tileWidth * tileWidth})
	}
	for level := len(t.tiles) - 1; level >= 0; level-- {
		at, ok := partial(level, size)
		if !ok {
			continue
		}
		data, err := read(at)
		if err != nil {
			return nil, err
		}
		if len(data) != at.W*tlog.HashSize {
			return nil, fmt.Errorf("%s has %d bytes, want %d", tilePath(at), len(data), at.W*tlog.HashSize)
		}
		below := len(t.stack)
		for i := range at.W {
			h := tlog.Hash(data[i*tlog.HashSize:])
			t.tiles[level].hashes = append(t.tiles[level].hashes, h)
			for n := i; n&1 == 1 && len(t.stack) > below; n >>= 1 {
				top := len(t.stack) - 1
				h = tlog.NodeHash(t.stack[top], h)
				t.stack = t.stack[:top]
			}
			t.stack = append(t.stack, h)
		}
	}
	return t, nil
}

// partial is the tile at the right edge of a level of a tree of size leaves;
// false where the level ends with a full tile.
func partial(level int, size int64) (tlog.Tile, bool) {
	n := size
	if level > 0 {
		n >>= tileHeight * level
	}
	return tlog.Tile{H: tileHeight, L: level, N: n / tileWidth, W: int(n % tileWidth)}, n%tileWidth > 0
}

// bundleOf is the entry bundle beside a tile of level 0.
func bundleOf(at tlog.Tile) tlog.Tile {
	at.L = entriesLevel
	return at
}

// tilePath is the C2SP path: x/mod's without the height, "entries" for "data".
func tilePath(at tlog.Tile) string {
	p := strings.TrimPrefix(at.Path(), fmt.Sprintf("tile/%d/", tileHeight))
	if at.L == entriesLevel {
		p = "entries" + strings.TrimPrefix(p, "data")
	}
	return "tile/" + p
}

// parseTilePath is the inverse of tilePath.
func parseTilePath(p string) (tlog.Tile, error) {
	rest, ok := strings.CutPrefix(p, "tile/")
	if !ok {
		return tlog.Tile{}, fmt.Errorf("%s is not the path of a tile", p)
	}
	if tail, entries := strings.CutPrefix(rest, "entries/"); entries {
		rest = "data/" + tail
	}
	at, err := tlog.ParseTilePath(fmt.Sprintf("tile/%d/%s", tileHeight, rest))
	if err != nil || tilePath(at) != p {
		return tlog.Tile{}, fmt.Errorf("%s is not the path of a tile", p)
	}
	return at, nil
}
