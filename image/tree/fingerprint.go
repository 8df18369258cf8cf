package tree

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
)

// Fingerprint changes whenever the image may: it covers every name, link, mode and
// time, the data that was given, and of copied files, which are not read, what the
// host's file system says of them.
func (t *Tree) Fingerprint() string {
	sum, _ := t.sum(func(p printer, n *node) error {
		p.number(int64(n.seen.dev), int64(n.seen.ino), n.seen.size, n.seen.mtime, n.seen.ctime)
		return nil
	}) // reads nothing, so nothing fails
	return sum
}

// Digest is of the image's content: the same on every host and at every time. All files
// are read.
func (t *Tree) Digest(ctx context.Context) (string, error) {
	buffer := make([]byte, 128<<10)
	return t.sum(func(p printer, n *node) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		of := sha256.New()
		c := &content{n: n}
		defer c.Close()
		if n.size > 0 {
			if _, err := io.CopyBuffer(struct{ io.Writer }{of}, c, buffer); err != nil {
				return err
			}
		}
		p.text(string(of.Sum(nil)))
		return nil
	})
}

// sum covers all that an image shows, and of copied files what `copied` says.
func (t *Tree) sum(copied func(printer, *node) error) (string, error) {
	sum := sha256.New()
	p := printer{out: bufio.NewWriterSize(sum, 64<<10), copied: copied}
	p.text("cal tree 1")
	err := p.node(t.root)
	p.out.Flush() //nolint:errcheck // a hash takes all
	return hex.EncodeToString(sum.Sum(nil)), err
}

type printer struct {
	out    *bufio.Writer
	copied func(printer, *node) error
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

func (p printer) node(n *node) error {
	p.text(n.name)
	p.number(int64(n.mode), n.mtime, n.size, int64(len(n.children)))
	p.text(n.target)
	p.text(string(n.data))
	if n.source != "" {
		if err := p.copied(p, n); err != nil {
			return err
		}
	}
	for _, child := range n.sorted() {
		if err := p.node(child); err != nil {
			return err
		}
	}
	return nil
}
