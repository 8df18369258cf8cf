package audit

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"sort"
	"strconv"
	"strings"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// proofMagic is the first line of a C2SP tlog-proof.
const proofMagic = "c2sp.org/tlog-proof@v1"

// A proof has an entry in base64, at most maxPath hashes, and a checkpoint.
const (
	maxPath  = 64
	maxProof = 2*nucleus.MaxEntry + 64*maxPath + MaxCheckpoint
)

// prove returns what a stranger needs beside the leaves at the indexes, which rise, to
// compute the root of the view's tree: the hash of each largest subtree in which none of
// them lies, from left to right. For one index these are the hashes of its inclusion
// proof (RFC 6962, 2.1.1) in another order.
func (w *view) prove(indexes []int64) (hashes []tlog.Hash, err error) {
	err = w.steady(func() error {
		hashes = nil
		return walk(indexes, 0, w.Size, func(lo, hi int64) error {
			h, err := w.subtree(lo, hi)
			hashes = append(hashes, h)
			return err
		})
	})
	return hashes, err
}

// walk visits, from left to right, the largest subtrees of the leaves from lo on, before
// hi, in which none of the indexes lies.
func walk(indexes []int64, lo, hi int64, visit func(lo, hi int64) error) error {
	switch {
	case lo == hi:
		return nil
	case len(indexes) == 0:
		return visit(lo, hi)
	case hi-lo == 1:
		return nil
	}
	mid := lo + split(hi-lo)
	at := sort.Search(len(indexes), func(i int) bool { return indexes[i] >= mid })
	if err := walk(indexes[:at], lo, mid, visit); err != nil {
		return err
	}
	return walk(indexes[at:], mid, hi, visit)
}

// fold is the inverse of prove: the root of a tree of size leaves from the leaves at the
// indexes and the hashes of the subtrees between them. ok is false where the number of
// hashes is not the one that these indexes need.
func fold(indexes []int64, leaves, hashes []tlog.Hash, size int64) (root tlog.Hash, need int, ok bool) {
	_ = walk(indexes, 0, size, func(int64, int64) error { need++; return nil })
	if need != len(hashes) || len(indexes) == 0 {
		return tlog.Hash{}, need, false
	}
	f := folder{indexes, leaves, hashes}
	return f.fold(0, size), need, true
}

type folder struct {
	indexes        []int64
	leaves, hashes []tlog.Hash
}

func (f *folder) fold(lo, hi int64) (h tlog.Hash) {
	switch {
	case len(f.indexes) == 0 || f.indexes[0] >= hi:
		h, f.hashes = f.hashes[0], f.hashes[1:]
		return h
	case hi-lo == 1:
		h, f.leaves, f.indexes = f.leaves[0], f.leaves[1:], f.indexes[1:]
		return h
	}
	mid := lo + split(hi-lo)
	left := f.fold(lo, mid)
	return tlog.NodeHash(left, f.fold(mid, hi))
}

// Prove returns one entry as it is stored and the proof that it is in the log, as a C2SP
// tlog-proof, under the newest checkpoint that witnesses have cosigned and that covers it,
// else under the newest. Its extra data is the entry, so that
// VerifyProof needs nothing else but the key. An entry that is not there and a log that
// does not bear the proof out are errors; Verify says what is wrong with it.
func Prove(dir, key string, n int64) (entry, proof []byte, err error) {
	w, err := openView(dir, key, nil)
	if err != nil {
		return nil, nil, err
	}
	defer w.close()
	if entry, err = w.entry(n); err != nil {
		return nil, nil, fmt.Errorf("log %s: %w", dir, err)
	}
	w.preferCosigned(n)
	path, err := w.path(n)
	if err != nil {
		return nil, nil, fmt.Errorf("log %s: %w", dir, err)
	}
	if err := tlog.CheckRecord(path, w.Size, w.Root, n, tlog.RecordHash(entry)); err != nil {
		return nil, nil, fmt.Errorf("log %s: entry %d does not fit the checkpoint of %d entries (cal audit verify says why): %w", dir, n, w.Size, err)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\nextra %s\nindex %d\n", proofMagic, base64.StdEncoding.EncodeToString(entry), n)
	for _, h := range path {
		fmt.Fprintln(&b, h)
	}
	b.WriteByte('\n')
	b.Write(w.signed)
	return entry, b.Bytes(), nil
}

// path is the inclusion proof of one leaf, from its sibling up.
func (w *view) path(n int64) (path tlog.RecordProof, err error) {
	err = w.steady(func() error {
		path, err = tlog.ProveRecord(w.Size, n, tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
			hashes := make([]tlog.Hash, len(indexes))
			for i, index := range indexes {
				var err error
				if hashes[i], err = w.node(tlog.SplitStoredHashIndex(index)); err != nil {
					return nil, err
				}
			}
			return hashes, nil
		}))
		return err
	})
	return path, err
}

// IsProof reports whether a file is a tlog-proof by its first line.
func IsProof(raw []byte) bool { return bytes.HasPrefix(raw, []byte(proofMagic+"\n")) }

// parseProof reads a tlog-proof that carries its entry.
func parseProof(raw []byte) (entry []byte, index int64, path tlog.RecordProof, checkpoint []byte, err error) {
	head, checkpoint, ok := bytes.Cut(raw, []byte("\n\n"))
	lines := strings.SplitN(string(head), "\n", 3+maxPath+1)
	if !ok || len(lines) < 3 || lines[0] != proofMagic {
		return nil, 0, nil, nil, malformed("not a proof: want the lines %q, extra, index, hashes, an empty line and a checkpoint", proofMagic)
	}
	text, ok := strings.CutPrefix(lines[1], "extra ")
	entry, err = base64.StdEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(entry) == 0 || base64.StdEncoding.EncodeToString(entry) != text {
		return nil, 0, nil, nil, malformed("line 2 is not \"extra\" and an entry in base64: %.60q", lines[1])
	}
	text, ok = strings.CutPrefix(lines[2], "index ")
	if index, err = decimal(text); !ok || err != nil {
		return nil, 0, nil, nil, malformed("line 3 is not \"index\" and a number: %.60q", lines[2])
	}
	if len(lines) > 3+maxPath {
		return nil, 0, nil, nil, malformed("more than %d hashes, which make the longest path", maxPath)
	}
	for i, line := range lines[3:] {
		h, err := parseHash(line)
		if err != nil {
			return nil, 0, nil, nil, malformed("line %d: %v", 4+i, err)
		}
		path = append(path, h)
	}
	return entry, index, path, checkpoint, nil
}

// parseHash reads 32 bytes in base64, of which there is one spelling.
func parseHash(text string) (tlog.Hash, error) {
	h, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(h) != tlog.HashSize || len(text) != 44 {
		return tlog.Hash{}, fmt.Errorf("%.60q is no hash: want 32 bytes in base64", text)
	}
	return tlog.Hash(h), nil
}

// decimal reads a number that is not negative, in its one spelling.
func decimal(text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != text {
		return 0, fmt.Errorf("%.30q is no number", text)
	}
	return n, nil
}
