package tree

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
)

// Fingerprint changes whenever the image may: it covers every name, link, mode and
// time, the data that was given, and of copied files, which are not read, what the
// host's file system says of them.
func (t *Tree) Fingerprint() string {
	sum := sha256.New()
	p := printer{out: bufio.NewWriterSize(sum, 64<<10), sum: sum}
	p.text("cal tree 1")
	p.node(t.root)
	p.out.Flush() //nolint:errcheck // a hash takes all
	return hex.EncodeToString(sum.Sum(nil))
}

type printer struct {
	out *bufio.Writer
	sum hash.Hash
}

func (p printer) number(numbers ...int64) {
	var raw [8]byte
	for _, n := range numbers {
		binary.LittleEndian.PutUint64(raw[:], uint64(n))
		p.out.Write(raw[:]) //nolint:errcheck // a hash takes all
	}
}

// text writes the length too, so that no two lists of texts look alike.
func (p printer) text(s string) {
	p.number(int64(len(s)))
	p.out.WriteString(s) //nolint:errcheck // a hash takes all
}

func (p printer) node(n *node) {
	p.text(n.name)
	p.number(int64(n.mode), n.mtime, n.size, int64(len(n.children)))
	p.text(n.target)
	p.text(string(n.data))
	if n.source != "" {
		p.number(int64(n.seen.dev), int64(n.seen.ino), n.seen.size, n.seen.mtime, n.seen.ctime)
	}
	for _, child := range n.sorted() {
		p.node(child)
	}
}
