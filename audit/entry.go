package audit

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"cal/nucleus"
)

// maxBundle is the largest entry bundle, leastEntry less than an entry has.
const (
	maxBundle  = tileWidth * (2 + nucleus.MaxEntry)
	leastEntry = len(`{"seq":0}`)
)

// encode makes the stored bytes of an entry.
func encode(e nucleus.Entry) ([]byte, error) {
	if e.Kind == "" {
		return nil, errors.New("log entry without a kind")
	}
	if e.Op != "" && !e.Op.Valid() {
		return nil, fmt.Errorf("log entry %s: unknown operation %q", e.Kind, e.Op)
	}
	raw, err := nucleus.Canonical(e)
	if err != nil {
		return nil, fmt.Errorf("log entry %s: %w", e.Kind, err)
	}
	if len(raw) > nucleus.MaxEntry {
		return nil, fmt.Errorf("log entry %s has %d bytes, at most %d fit", e.Kind, len(raw), nucleus.MaxEntry)
	}
	return raw, nil
}

// decode takes an operation as it is written: a log may be of a version that knows more
// of them than this program does.
func decode(raw []byte) (nucleus.Entry, error) {
	var e struct {
		nucleus.Entry
		Op string `json:"op"` // in the place of Entry.Op, which refuses what it does not know
	}
	err := json.Unmarshal(raw, &e)
	e.Entry.Op = nucleus.Op(e.Op)
	return e.Entry, err
}

// appendBundle adds an entry to a bundle: a big-endian uint16 length before it.
func appendBundle(bundle, raw []byte) []byte {
	return append(binary.BigEndian.AppendUint16(bundle, uint16(len(raw))), raw...)
}

// splitBundle returns the entries of a bundle; with an error, those before it. One that
// has more than most is an error, and so is an entry that is hardly there: it is many times
// larger in memory.
func splitBundle(bundle []byte, most int) (entries [][]byte, err error) {
	for at := 0; at < len(bundle); {
		if len(entries) == most {
			return entries, fmt.Errorf("more than %d entries in %d bytes", most, len(bundle))
		}
		rest := bundle[at:]
		if len(rest) < 2 {
			return entries, fmt.Errorf("entry %d of the bundle: its length is cut", len(entries))
		}
		n := int(binary.BigEndian.Uint16(rest))
		if n < leastEntry {
			return entries, fmt.Errorf("entry %d of the bundle has %d bytes", len(entries), n)
		}
		if len(rest) < 2+n {
			return entries, fmt.Errorf("entry %d of the bundle: %d of %d bytes", len(entries), len(rest)-2, n)
		}
		entries = append(entries, rest[2:2+n])
		at += 2 + n
	}
	return entries, nil
}

// glance is what the checks need of an entry.
type glance struct {
	seq, prev    int64 // -1 where there is none
	kind, permit string
	session      []byte // as it is spelled in JSON
}

var errNotEntry = errors.New("not a JSON object with a sequence number")

// look reads the top-level keys that it knows from the stored bytes. Verifying
// a million entries leaves no time for a whole JSON decoder; the bytes
// themselves are proved by their hash.
func look(raw []byte) (glance, error) {
	g := glance{seq: -1, prev: -1}
	if len(raw) < 2 || raw[0] != '{' || raw[len(raw)-1] != '}' {
		return g, errNotEntry
	}
	for at := 1; at < len(raw)-1; {
		key, after, ok := jsonString(raw, at)
		if !ok || after >= len(raw) || raw[after] != ':' {
			return g, errNotEntry
		}
		end := skipValue(raw, after+1)
		if end < 0 {
			return g, errNotEntry
		}
		value := raw[after+1 : end]
		switch string(key) {
		case "seq", "prev":
			n, err := strconv.ParseInt(string(value), 10, 64)
			if err != nil || n < 0 {
				return g, errNotEntry
			}
			if string(key) == "seq" {
				g.seq = n
			} else {
				g.prev = n
			}
		case "session":
			g.session = value
		case "kind":
			g.kind = string(bytes.Trim(value, `"`))
		case "permit":
			g.permit = string(bytes.Trim(value, `"`))
		}
		if at = end; raw[at] == ',' {
			at++
		}
	}
	if g.seq < 0 {
		return g, errNotEntry
	}
	return g, nil
}

// jsonString returns the inside of the string that starts at, and the index
// after it.
func jsonString(raw []byte, at int) (inside []byte, after int, ok bool) {
	if at >= len(raw) || raw[at] != '"' {
		return nil, 0, false
	}
	for i := at + 1; ; {
		quote := bytes.IndexByte(raw[i:], '"')
		if quote < 0 {
			return nil, 0, false
		}
		i += quote
		slashes := 0
		for raw[i-1-slashes] == '\\' {
			slashes++
		}
		if slashes%2 == 0 {
			return raw[at+1 : i], i + 1, true
		}
		i++
	}
}

// skipValue returns the index after the JSON value that starts at; negative if
// it does not end before the object does.
func skipValue(raw []byte, at int) int {
	depth := 0
	for i := at; i < len(raw); {
		switch raw[i] {
		case '"':
			_, after, ok := jsonString(raw, i)
			if !ok {
				return -1
			}
			i = after
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i
			}
			depth--
		case ',':
			if depth == 0 {
				return i
			}
		}
		i++
	}
	return -1
}
