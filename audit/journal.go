package audit

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/note"
)

// The journal holds what is durable but not yet in tiles. doc/log.md has the
// format; maxJournal bounds what a reader takes in.
const (
	journalName  = "journal"
	journalMagic = journalFormat + "1\n"
	// journalFormat is the beginning of every version.
	journalFormat = "cal-journal "
	frameHeader   = 12
	maxJournal    = 256 << 20

	// maxRecord is more than one record's payload has: its note, its entries and their lengths.
	maxRecord = MaxCheckpoint + 2*maxGroup
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frame puts a payload into its envelope. The header has a sum of
// its own, so that a damaged length is told from a cut file.
func frame(payload []byte) []byte {
	f := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	f = binary.BigEndian.AppendUint32(f, crc32.Checksum(payload, castagnoli))
	f = binary.BigEndian.AppendUint32(f, crc32.Checksum(f, castagnoli))
	return append(f, payload...)
}

// frameLength is how long the payload is of the frame that begins with raw; false
// where no frame begins.
func frameLength(raw []byte) (n int64, ok bool) {
	if len(raw) < frameHeader ||
		crc32.Checksum(raw[:8], castagnoli) != binary.BigEndian.Uint32(raw[8:]) {
		return 0, false
	}
	return int64(binary.BigEndian.Uint32(raw)), true
}

// unframe returns the payload of the whole, undamaged frame at the start of raw.
func unframe(raw []byte) (payload []byte, ok bool) {
	n, ok := frameLength(raw)
	if !ok || int64(len(raw)) < frameHeader+n {
		return nil, false
	}
	payload = raw[frameHeader : frameHeader+n]
	return payload, crc32.Checksum(payload, castagnoli) == binary.BigEndian.Uint32(raw[4:])
}

// base is the first frame: the tree that the tiles hold, and the sequence
// numbers of the intents in it that have no outcome.
type base struct {
	Checkpoint string  `json:"checkpoint"`
	Open       []int64 `json:"open"`
}

// record is one group commit.
type record struct {
	checkpoint []byte
	says       Checkpoint
	entries    [][]byte
}

func journalStart(b base) ([]byte, error) {
	payload, err := nucleus.Canonical(b)
	if err != nil {
		return nil, err
	}
	return append([]byte(journalMagic), frame(payload)...), nil
}

func journalRecord(checkpoint, bundle []byte) []byte {
	payload := binary.BigEndian.AppendUint32(nil, uint32(len(checkpoint)))
	payload = append(payload, checkpoint...)
	return frame(append(payload, bundle...))
}

// journal is a parsed journal file.
type journal struct {
	base    Checkpoint
	note    []byte // signed, of base
	open    []int64
	records []record
	whole   int    // bytes up to and with the last record
	tail    []byte // bytes after it: an append that did not finish
}

// errFormat says that a journal is of another version.
var errFormat = errors.New("a format of another version")

// errDamaged says that a journal does not only end early.
var errDamaged = errors.New("damaged")

// parseJournal reads a journal. A writer writes one record at a time and goes on
// only when it is on the disk, so only the last one can be torn: bytes that are
// no record but in which another begins, or that are longer than a record, are damage,
// and an error. The journal returned with an error holds the records before it; it is nil
// where the base does not hold. A bad signature is
// errSignature; v nil leaves signatures unchecked.
func parseJournal(raw []byte, v note.Verifier) (*journal, error) {
	if line, _, _ := bytes.Cut(raw[:min(len(raw), 40)], []byte("\n")); bytes.HasPrefix(line, []byte(journalFormat)) && string(line)+"\n" != journalMagic {
		return nil, fmt.Errorf("%w: it is %q, this program reads %q", errFormat, line, strings.TrimSpace(journalMagic))
	}
	if len(raw) < len(journalMagic) || string(raw[:len(journalMagic)]) != journalMagic {
		return nil, fmt.Errorf("%w: it begins with %q, want %q", errDamaged, raw[:min(len(raw), len(journalMagic))], journalMagic)
	}
	payload, ok := unframe(raw[len(journalMagic):])
	if !ok {
		return nil, fmt.Errorf("%w: its first frame does not match its checksum", errDamaged)
	}
	var b base
	if err := json.Unmarshal(payload, &b); err != nil {
		return nil, fmt.Errorf("%w: first frame: %w", errDamaged, err)
	}
	j := &journal{note: []byte(b.Checkpoint), open: b.Open, whole: len(journalMagic) + frameHeader + len(payload)}
	var err error
	if j.base, err = readNote(j.note, v); err != nil {
		return nil, fmt.Errorf("its base: %w", err)
	}
	size := j.base.Size
	for j.whole < len(raw) {
		payload, ok := unframe(raw[j.whole:])
		if !ok {
			break
		}
		r, err := parseRecord(payload, v)
		if err != nil {
			return j, fmt.Errorf("record at byte %d: %w", j.whole, err)
		}
		if size += int64(len(r.entries)); r.says.Size != size {
			return j, fmt.Errorf("%w: record at byte %d ends at entry %d, its checkpoint says %d", errDamaged, j.whole, size, r.says.Size)
		}
		j.records = append(j.records, r)
		j.whole += frameHeader + len(payload)
	}
	j.tail = raw[j.whole:]
	if len(j.tail) > frameHeader+maxRecord {
		return j, fmt.Errorf("%w: the record at byte %d, with %d bytes after it where one record has at most %d", errDamaged, j.whole, len(j.tail), frameHeader+maxRecord)
	}
	// Its header is enough: to sum what every header claims would be quadratic. An entry is
	// text, in which no length is so small.
	for i := 1; i < len(j.tail); i++ {
		if n, ok := frameLength(j.tail[i:]); ok && n <= maxRecord {
			return j, fmt.Errorf("%w: the record at byte %d, though another begins at byte %d", errDamaged, j.whole, j.whole+i)
		}
	}
	return j, nil
}

func parseRecord(payload []byte, v note.Verifier) (record, error) {
	if len(payload) < 4 || int64(len(payload)) < 4+int64(binary.BigEndian.Uint32(payload)) {
		return record{}, fmt.Errorf("%w: no room for its checkpoint", errDamaged)
	}
	end := 4 + binary.BigEndian.Uint32(payload)
	r := record{checkpoint: payload[4:end]}
	var err error
	if r.entries, err = splitBundle(payload[end:], len(payload)/(2+leastEntry)); err != nil {
		return record{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if len(r.entries) == 0 {
		return record{}, fmt.Errorf("%w: no entries", errDamaged)
	}
	r.says, err = readNote(r.checkpoint, v)
	return r, err
}

// readNote is openCheckpoint; without a verifier it takes the text as it is.
func readNote(signed []byte, v note.Verifier) (Checkpoint, error) {
	if v != nil {
		return openCheckpoint(signed, v)
	}
	return parseBody(string(signed))
}

// end is the size of the tree that the journal leads to.
func (j *journal) end() int64 {
	if n := len(j.records); n > 0 {
		return j.records[n-1].says.Size
	}
	return j.base.Size
}
