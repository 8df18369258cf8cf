package audit

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// receiptMagic is the first line of a receipt. doc/log.md is the format.
const receiptMagic = "cal-receipt/v1"

// A receipt, and its body when it is unpacked, are no longer than this, in bytes.
const (
	MaxReceipt = 32 << 20
	maxBody    = 64 << 20

	maxHeader = 4 << 10
	maxLine   = len("o ") + nucleus.MaxEntry + len("\n")
)

// What is wrong with a receipt or a proof, beside the kinds of a log.
const (
	Malformed     ProblemKind = "malformed"      // it is not of the form
	TooLarge      ProblemKind = "too large"      // it is beyond the bounds
	Foreign       ProblemKind = "foreign"        // an entry is of another session
	NoCosignature ProblemKind = "no cosignature" // a witness that is asked for has not signed, or not this
	BadOutcome    ProblemKind = "bad outcome"    // the machine's signature over an outcome does not hold
)

// A ReceiptError says why a receipt or a proof is refused.
type ReceiptError struct {
	Kind   ProblemKind
	Detail string
}

// Error is one line of printable ASCII.
func (e *ReceiptError) Error() string { return Printable(string(e.Kind) + ": " + e.Detail) }

func refuse(kind ProblemKind, format string, args ...any) error {
	return &ReceiptError{kind, fmt.Sprintf(format, args...)}
}

func malformed(format string, args ...any) error { return refuse(Malformed, format, args...) }

// ReceiptOptions say how a receipt is made.
type ReceiptOptions struct {
	Key        string // of the log: what VerifierKey returned
	Session    string // whose entries it shows
	Checkpoint []byte // a signed checkpoint of this log to prove them under; nil: see NewReceipt
	Text       bool   // write the body as text, not packed
}

// NewReceipt makes the receipt of a session: all entries of it that lie under the
// checkpoint, the proof that they are in the log, and the checkpoint: the newest, or where
// it has all of them the one that witnesses have cosigned. It fails where
// there is none, where they are too many for one receipt, and where the log does not bear
// the proof out.
func NewReceipt(dir string, o ReceiptOptions) ([]byte, error) {
	if err := checkSession(o.Session); err != nil {
		return nil, err
	}
	w, err := openView(dir, o.Key, o.Checkpoint)
	if err != nil {
		return nil, err
	}
	defer w.close()
	r, err := w.receipt(dir, o.Session, o.Checkpoint == nil)
	if err != nil {
		return nil, fmt.Errorf("log %s: %w", dir, err)
	}
	raw, err := r.encode(o.Text)
	if err != nil {
		return nil, err
	}
	if _, err := VerifyReceipt(raw, VerifyReceiptOptions{Key: o.Key}); err != nil {
		return nil, fmt.Errorf("log %s: its entries under the checkpoint of %d do not bear a receipt out (cal audit verify looks at all of them): %w", dir, w.Size, err)
	}
	return raw, nil
}

func checkSession(session string) error {
	if session == "" || strings.ContainsFunc(session, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("%q is no session", session)
	}
	return nil
}

// receipt is a receipt in its parts.
type receipt struct {
	session string
	note    []byte // the signed checkpoint
	hashes  []tlog.Hash
	entries [][]byte
	indexes []int64 // of the entries, rising
}

func (w *view) receipt(dir, session string, choose bool) (*receipt, error) {
	r := &receipt{session: session}
	total := 0
	for raw, err := range Find(dir, 0, Filter{Session: session}) {
		if err != nil {
			return nil, err
		}
		g, err := look(raw)
		if err != nil {
			return nil, fmt.Errorf("an entry of session %s: %w", session, err)
		}
		if g.seq >= w.Size {
			break
		}
		if total += len(raw); total > maxBody/2 {
			return nil, fmt.Errorf("session %s has more than %d MiB of entries: too much for one receipt", session, maxBody/2>>20)
		}
		r.indexes, r.entries = append(r.indexes, g.seq), append(r.entries, bytes.Clone(raw))
	}
	if len(r.entries) == 0 {
		return nil, fmt.Errorf("no entry of session %s is among the %d under the checkpoint", session, w.Size)
	}
	if choose {
		w.preferCosigned(r.indexes[len(r.indexes)-1])
	}
	var err error
	r.note = w.signed
	r.hashes, err = w.prove(r.indexes)
	return r, err
}

// encode writes the file: a header, an empty line, the checkpoint, the body.
func (r *receipt) encode(text bool) ([]byte, error) {
	form, body := "text", r.body()
	if !text {
		form = "gzip"
		var packed bytes.Buffer
		z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if err == nil {
			_, err = z.Write(body)
		}
		if err = errors.Join(err, z.Close()); err != nil {
			return nil, err
		}
		body = packed.Bytes()
	}
	rest := append(bytes.Clone(r.note), body...)
	sum := sha256.Sum256(rest)
	head := fmt.Sprintf("%s\nsession %s\nentries %d from %d to %d\ncheckpoint %d\nbody %s %d\nsha256 %x\n\n",
		receiptMagic, r.session, len(r.entries), r.indexes[0], r.indexes[len(r.indexes)-1], len(r.note), form, len(body), sum)
	if n := len(head) + len(rest); n > MaxReceipt {
		return nil, fmt.Errorf("the receipt of session %s has %d bytes, at most %d are read", r.session, n, MaxReceipt)
	}
	return append([]byte(head), rest...), nil
}

// body is a line for each hash and each entry.
func (r *receipt) body() []byte {
	var b bytes.Buffer
	for _, h := range r.hashes {
		fmt.Fprintf(&b, "h %s\n", h)
	}
	for _, raw := range r.entries {
		b.Write(entryLine(raw))
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// What a machine signed lies in its entry as base64. A receipt shows it as it was
// signed: it can be read, and packs better.
var (
	payloadStart = []byte(`"outcome":{"payload_b64":`)
	payloadEnd   = []byte(`,"sig_b64":"`)
)

// entryLine is an entry as a line: "e " and its bytes, or "o " and the bytes in which
// the payload of the outcome is not encoded.
func entryLine(raw []byte) []byte {
	if before, rest, ok := bytes.Cut(raw, payloadStart); ok && len(rest) > 0 && rest[0] == '"' {
		encoded, after, ok := bytes.Cut(rest[1:], []byte(`"`))
		payload, err := base64.StdEncoding.DecodeString(string(encoded))
		if ok && err == nil && bytes.IndexByte(payload, '\n') < 0 {
			line := bytes.Join([][]byte{[]byte("o "), before, payloadStart, payload, after}, nil)
			if back, err := lineEntry(line); err == nil && bytes.Equal(back, raw) {
				return line
			}
		}
	}
	return append([]byte("e "), raw...)
}

// lineEntry is the inverse of entryLine.
func lineEntry(line []byte) ([]byte, error) {
	switch {
	case bytes.HasPrefix(line, []byte("e ")):
		return line[2:], nil
	case bytes.HasPrefix(line, []byte("o ")):
		before, rest, ok := bytes.Cut(line[2:], payloadStart)
		end := bytes.LastIndex(rest, payloadEnd)
		if !ok || end < 0 {
			return nil, malformed("a line of an outcome has no payload and signature: %.60q", line)
		}
		encoded := []byte(`"` + base64.StdEncoding.EncodeToString(rest[:end]) + `"`)
		return bytes.Join([][]byte{before, payloadStart, encoded, rest[end:]}, nil), nil
	}
	return nil, malformed("a line of the body is none of hash, entry and outcome: %.60q", line)
}

// header is what the first lines of a receipt say.
type header struct {
	session            string
	count, first, last int64
	note, body         int64 // bytes
	gzip               bool
	sum                string // 64 hex digits
}

// parseHeader reads a header in its one spelling.
func parseHeader(text string) (header, error) {
	var h header
	var form string
	if n := strings.Count(text, "\n"); n != 6 {
		return h, malformed("the header has %d lines, want 6", n)
	}
	_, err := fmt.Sscanf(text, receiptMagic+"\nsession %s\nentries %d from %d to %d\ncheckpoint %d\nbody %s %d\nsha256 %s\n",
		&h.session, &h.count, &h.first, &h.last, &h.note, &form, &h.body, &h.sum)
	if err != nil {
		return h, malformed("the header is not that of %s: %v", receiptMagic, err)
	}
	h.gzip = form == "gzip"
	again := fmt.Sprintf("%s\nsession %s\nentries %d from %d to %d\ncheckpoint %d\nbody %s %d\nsha256 %s\n",
		receiptMagic, h.session, h.count, h.first, h.last, h.note, form, h.body, h.sum)
	if again != text || form != "gzip" && form != "text" {
		return h, malformed("the header is not that of %s: %.300q", receiptMagic, text)
	}
	if err := checkSession(h.session); err != nil {
		return h, malformed("%v", err)
	}
	if sum, err := hex.DecodeString(h.sum); err != nil || len(sum) != sha256.Size || hex.EncodeToString(sum) != h.sum {
		return h, malformed("%.80q is no SHA-256", h.sum)
	}
	return h, nil
}

// sealed is a receipt whose body is not yet read: that is dear, and whoever asks for it
// should have shown a signature first.
type sealed struct {
	header
	note   []byte
	packed []byte // the body, as it is in the file
}

// openReceipt reads a receipt up to its body and checks that nothing is cut.
func openReceipt(raw []byte) (*sealed, error) {
	if len(raw) > MaxReceipt {
		return nil, refuse(TooLarge, "%d bytes, a receipt has at most %d", len(raw), MaxReceipt)
	}
	if !bytes.HasPrefix(raw, []byte(receiptMagic+"\n")) {
		return nil, malformed("neither a receipt nor a proof: it begins with %.40q", raw)
	}
	end := bytes.Index(raw[:min(len(raw), maxHeader)], []byte("\n\n"))
	if end < 0 {
		return nil, malformed("the header does not end within %d bytes", maxHeader)
	}
	h, err := parseHeader(string(raw[:end+1]))
	if err != nil {
		return nil, err
	}
	rest := raw[end+2:]
	if h.note < 0 || h.body < 0 || h.note > MaxCheckpoint || h.note+h.body != int64(len(rest)) {
		return nil, malformed("after the header are %d bytes, it says %d of the checkpoint and %d of the body", len(rest), h.note, h.body)
	}
	if sum := sha256.Sum256(rest); hex.EncodeToString(sum[:]) != h.sum {
		return nil, refuse(Changed, "what follows the header has the SHA-256 %x, the header says %s", sum, h.sum)
	}
	return &sealed{h, rest[:h.note], rest[h.note:]}, nil
}

// read reads the body. What it says is not yet believed.
func (s *sealed) read() (*receipt, error) {
	r := &receipt{session: s.session, note: s.note}
	in := bytes.NewReader(s.packed)
	if !s.gzip {
		return r, r.parseBody(in, s.header)
	}
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, malformed("the body is not packed with gzip: %v", err)
	}
	z.Multistream(false)
	if err := r.parseBody(z, s.header); err != nil {
		return nil, err
	}
	if in.Len() > 0 {
		return nil, malformed("%d bytes follow the packed body", in.Len())
	}
	return r, nil
}

// parseBody reads hashes, then entries, line by line: what is of no use ends it early.
func (r *receipt) parseBody(from io.Reader, h header) error {
	bounded := &io.LimitedReader{R: from, N: maxBody + 1}
	in := bufio.NewReaderSize(bounded, maxLine)
	for {
		line, err := in.ReadSlice('\n')
		switch {
		case bounded.N == 0:
			return refuse(TooLarge, "the body has more than %d bytes", maxBody)
		case errors.Is(err, bufio.ErrBufferFull):
			return refuse(TooLarge, "a line of the body has more than %d bytes: %.60q", maxLine, line)
		case err == io.EOF && len(line) == 0:
			return r.checkHeader(h)
		case err == io.EOF:
			return malformed("the last line of the body does not end")
		case err != nil:
			return malformed("the body cannot be unpacked: %v", err)
		}
		if err := r.addLine(line[:len(line)-1], h.count); err != nil {
			return err
		}
	}
}

// checkHeader compares the header with the whole body.
func (r *receipt) checkHeader(h header) error {
	n := len(r.indexes)
	if int64(n) != h.count || n > 0 && (r.indexes[0] != h.first || r.indexes[n-1] != h.last) {
		return malformed("the header says %d entries from %d to %d, the body has others", h.count, h.first, h.last)
	}
	if n == 0 {
		return malformed("it shows no entry")
	}
	return nil
}

// addLine takes in a line, which it does not keep, of a body of count entries.
func (r *receipt) addLine(line []byte, count int64) error {
	if text, ok := bytes.CutPrefix(line, []byte("h ")); ok && len(r.entries) == 0 {
		if int64(len(r.hashes)) >= 64*count {
			return refuse(Extra, "%d hashes and more for %d entries", len(r.hashes), count)
		}
		h, err := parseHash(string(text))
		if err != nil {
			return malformed("%v", err)
		}
		r.hashes = append(r.hashes, h)
		return nil
	}
	if int64(len(r.entries)) >= count {
		return malformed("the header says %d entries, the body has more", count)
	}
	return r.addEntry(bytes.Clone(line))
}

func (r *receipt) addEntry(line []byte) error {
	raw, err := lineEntry(line)
	if err != nil {
		return err
	}
	if len(raw) > nucleus.MaxEntry {
		return malformed("an entry has %d bytes, at most %d", len(raw), nucleus.MaxEntry)
	}
	if canonical, err := nucleus.CanonicalJSON(raw); err != nil || !bytes.Equal(canonical, raw) {
		return malformed("an entry is not canonical JSON: %.60q", raw)
	}
	g, err := look(raw)
	if err != nil {
		return malformed("%v: %.60q", err, raw)
	}
	if n := len(r.indexes); n > 0 && g.seq <= r.indexes[n-1] {
		return refuse(Reordered, "entry %d comes after entry %d", g.seq, r.indexes[n-1])
	}
	r.indexes, r.entries = append(r.indexes, g.seq), append(r.entries, raw)
	return nil
}
