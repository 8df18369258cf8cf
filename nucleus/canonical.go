package nucleus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// maxInteger is the largest integer that every JSON implementation keeps exact
// (RFC 7493, 2.2; RFC 8785, 3.2.2.3).
const maxInteger = 1<<53 - 1

const maxDepth = 64

var (
	errNotUTF8 = errors.New("canonical JSON: text is not UTF-8")
	errEnds    = errors.New("the value ends too early")
)

// Canonical returns the RFC 8785 (JCS) bytes of v, which is first marshalled
// with encoding/json. It is the only form that is ever signed or hashed. A
// string that is not UTF-8 is refused, never replaced.
func Canonical(v any) ([]byte, error) {
	if !textIsUTF8(reflect.ValueOf(v), 0) {
		return nil, errNotUTF8
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return CanonicalJSON(buf.Bytes())
}

// CanonicalJSON returns the RFC 8785 bytes of one JSON value. It refuses what
// two readers could understand differently: text that is not UTF-8, lone
// surrogates, duplicate keys, integers beyond 2^53-1 and numbers that would be
// written as one, data after the value, nesting deeper than 64.
func CanonicalJSON(raw []byte) ([]byte, error) {
	if !utf8.Valid(raw) {
		return nil, errNotUTF8
	}
	c := canonicaliser{in: raw, out: make([]byte, 0, len(raw))}
	c.space()
	if err := c.value(0); err != nil {
		return nil, fmt.Errorf("canonical JSON: byte %d: %w", c.at, err)
	}
	c.space()
	if c.at < len(c.in) {
		return nil, fmt.Errorf("canonical JSON: byte %d: data after the value", c.at)
	}
	return c.out, nil
}

// canonicaliser reads in once from left to right and appends the canonical form
// to out. Members of objects are put in order inside out, so that each byte is
// moved at most once a level.
type canonicaliser struct {
	in      []byte
	at      int
	out     []byte
	members []member // of all open objects, the innermost last
	scratch []byte
}

// member is one "key":value of an open object, as a piece of out.
type member struct {
	key        []byte // decoded
	start, end int
}

func (c *canonicaliser) value(depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("nested deeper than %d", maxDepth)
	}
	if c.at >= len(c.in) {
		return errEnds
	}
	switch b := c.in[c.at]; {
	case b == '{':
		return c.object(depth)
	case b == '[':
		return c.array(depth)
	case b == '"':
		_, err := c.str(false)
		return err
	case b == '-' || isDigit(b):
		return c.number()
	case b == 't':
		return c.literal("true")
	case b == 'f':
		return c.literal("false")
	case b == 'n':
		return c.literal("null")
	}
	return c.unexpected("a value")
}

func (c *canonicaliser) array(depth int) error {
	c.copyByte() // [
	for first := true; ; first = false {
		if done, err := c.next(']', first); done || err != nil {
			return err
		}
		if err := c.value(depth + 1); err != nil {
			return err
		}
	}
}

func (c *canonicaliser) object(depth int) error {
	c.copyByte() // {
	base, begin := len(c.members), len(c.out)
	for first := true; ; first = false {
		done, err := c.next('}', first)
		if err != nil {
			return err
		}
		if done {
			break
		}
		m := member{start: len(c.out)}
		if c.at >= len(c.in) || c.in[c.at] != '"' {
			return c.unexpected("a key")
		}
		if m.key, err = c.str(true); err != nil {
			return err
		}
		c.space()
		if c.at >= len(c.in) || c.in[c.at] != ':' {
			return c.unexpected("':'")
		}
		c.copyByte()
		c.space()
		if err := c.value(depth + 1); err != nil {
			return err
		}
		m.end = len(c.out)
		c.members = append(c.members, m)
	}
	defer func() { c.members = c.members[:base] }()
	return c.order(c.members[base:], begin)
}

// order puts the members of one object, which fill out from begin to the closing
// brace, into the order of their keys.
func (c *canonicaliser) order(members []member, begin int) error {
	byKey := func(a, b member) int { return compareUTF16(a.key, b.key) }
	sorted := slices.IsSortedFunc(members, byKey)
	if !sorted {
		slices.SortFunc(members, byKey)
	}
	for i := 1; i < len(members); i++ {
		if bytes.Equal(members[i-1].key, members[i].key) {
			return fmt.Errorf("duplicate key %q", members[i].key)
		}
	}
	if sorted {
		return nil
	}
	c.scratch = append(c.scratch[:0], c.out[begin:]...)
	c.out = c.out[:begin]
	for i, m := range members {
		if i > 0 {
			c.out = append(c.out, ',')
		}
		c.out = append(c.out, c.scratch[m.start-begin:m.end-begin]...)
	}
	c.out = append(c.out, '}')
	return nil
}

// next goes to the next element of an array or object, or past its end.
func (c *canonicaliser) next(end byte, first bool) (done bool, err error) {
	c.space()
	if c.at >= len(c.in) {
		return false, errEnds
	}
	if c.in[c.at] == end {
		c.copyByte()
		return true, nil
	}
	if first {
		return false, nil
	}
	if c.in[c.at] != ',' {
		return false, c.unexpected("',' or '" + string(end) + "'")
	}
	c.copyByte()
	c.space()
	if c.at < len(c.in) && c.in[c.at] == end {
		return false, c.unexpected("another element")
	}
	return false, nil
}

// str copies one string in its canonical spelling and returns its text, which
// may be a piece of in, if it is asked for.
func (c *canonicaliser) str(wantText bool) ([]byte, error) {
	c.copyByte() // "
	var text []byte
	escaped := false
	from := c.at
	for c.at < len(c.in) {
		b := c.in[c.at]
		if b != '"' && b != '\\' && b >= 0x20 {
			c.at++
			continue
		}
		if b < 0x20 {
			return nil, fmt.Errorf("control character %#02x in a string", b)
		}
		run := c.in[from:c.at]
		c.out = append(c.out, run...)
		if b == '"' {
			c.copyByte()
			if escaped {
				return append(text, run...), nil
			}
			return run, nil
		}
		r, err := c.escape()
		if err != nil {
			return nil, err
		}
		if wantText {
			text = utf8.AppendRune(append(text, run...), r)
		}
		c.out = appendEscaped(c.out, r)
		escaped = true
		from = c.at
	}
	return nil, errEnds
}

// escape reads one escape sequence, a pair of surrogates as one.
func (c *canonicaliser) escape() (rune, error) {
	if c.at+1 >= len(c.in) {
		return 0, errEnds
	}
	b := c.in[c.at+1]
	if b != 'u' {
		i := bytes.IndexByte([]byte(`"\/bfnrt`), b)
		if i < 0 {
			return 0, fmt.Errorf(`unknown escape \%c`, b)
		}
		c.at += 2
		return rune("\"\\/\b\f\n\r\t"[i]), nil
	}
	unit, ok := escapedUnit(c.in[c.at:])
	if !ok {
		return 0, errors.New(`\u without four hexadecimal digits`)
	}
	if !utf16.IsSurrogate(unit) {
		c.at += 6
		return unit, nil
	}
	low, ok := escapedUnit(c.in[c.at+6:])
	r := utf16.DecodeRune(unit, low)
	if !ok || r == utf8.RuneError {
		return 0, errors.New("lone surrogate") // decoders replace it by U+FFFD without a word
	}
	c.at += 12
	return r, nil
}

func escapedUnit(raw []byte) (rune, bool) {
	if len(raw) < 6 || raw[0] != '\\' || raw[1] != 'u' {
		return 0, false
	}
	var unit rune
	for _, b := range raw[2:6] {
		switch {
		case isDigit(b):
			b -= '0'
		case b >= 'a' && b <= 'f':
			b -= 'a' - 10
		case b >= 'A' && b <= 'F':
			b -= 'A' - 10
		default:
			return 0, false
		}
		unit = unit<<4 | rune(b)
	}
	return unit, true
}

// appendEscaped writes a character that the input spelled as an escape (RFC
// 8785, 3.2.2.2).
func appendEscaped(out []byte, r rune) []byte {
	const hex = "0123456789abcdef"
	switch r {
	case '"', '\\':
		return append(out, '\\', byte(r))
	case '\b':
		return append(out, `\b`...)
	case '\t':
		return append(out, `\t`...)
	case '\n':
		return append(out, `\n`...)
	case '\f':
		return append(out, `\f`...)
	case '\r':
		return append(out, `\r`...)
	}
	if r < 0x20 {
		return append(out, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
	}
	return utf8.AppendRune(out, r)
}

func (c *canonicaliser) number() error {
	from := c.at
	if c.in[c.at] == '-' {
		c.at++
	}
	whole := c.at
	if c.digits() == 0 {
		return c.unexpected("a digit")
	}
	if c.in[whole] == '0' && c.at > whole+1 {
		c.at = whole + 1
		return c.unexpected("no digit after a leading zero")
	}
	integer := true
	if c.at < len(c.in) && c.in[c.at] == '.' {
		integer = false
		c.at++
		if c.digits() == 0 {
			return c.unexpected("a digit")
		}
	}
	if c.at < len(c.in) && (c.in[c.at] == 'e' || c.in[c.at] == 'E') {
		integer = false
		c.at++
		if c.at < len(c.in) && (c.in[c.at] == '+' || c.in[c.at] == '-') {
			c.at++
		}
		if c.digits() == 0 {
			return c.unexpected("a digit")
		}
	}
	text := string(c.in[from:c.at])
	if integer {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n > maxInteger || n < -maxInteger {
			return fmt.Errorf("integer %.40s is beyond 2^53-1", text)
		}
		c.out = strconv.AppendInt(c.out, n, 10)
		return nil
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return fmt.Errorf("number %.40s is out of range", text)
	}
	if size := math.Abs(f); size > maxInteger && size < 1e21 {
		// It would be written as an integer, which the next reader must refuse.
		return fmt.Errorf("number %.40s is an integer beyond 2^53-1", text)
	}
	c.out = appendNumber(c.out, f)
	return nil
}

// appendNumber writes f as ECMAScript does (RFC 8785, 3.2.2.3): the shortest
// digits that read back as f, with an exponent below 1e-6 and from 1e21 on.
func appendNumber(out []byte, f float64) []byte {
	if f == 0 {
		return append(out, '0') // minus zero too
	}
	if size := math.Abs(f); size >= 1e-6 && size < 1e21 {
		return strconv.AppendFloat(out, f, 'f', -1, 64)
	}
	out = strconv.AppendFloat(out, f, 'e', -1, 64)
	// Go writes e-09 where ECMAScript writes e-9.
	if n := len(out); out[n-4] == 'e' && out[n-2] == '0' {
		out[n-2] = out[n-1]
		out = out[:n-1]
	}
	return out
}

func (c *canonicaliser) digits() int {
	from := c.at
	for c.at < len(c.in) && isDigit(c.in[c.at]) {
		c.at++
	}
	return c.at - from
}

func (c *canonicaliser) literal(word string) error {
	if !bytes.HasPrefix(c.in[c.at:], []byte(word)) {
		return c.unexpected(word)
	}
	c.at += len(word)
	c.out = append(c.out, word...)
	return nil
}

func (c *canonicaliser) copyByte() {
	c.out = append(c.out, c.in[c.at])
	c.at++
}

func (c *canonicaliser) space() {
	for c.at < len(c.in) {
		switch c.in[c.at] {
		case ' ', '\t', '\n', '\r':
			c.at++
		default:
			return
		}
	}
}

func (c *canonicaliser) unexpected(want string) error {
	if c.at >= len(c.in) {
		return errEnds
	}
	r, _ := utf8.DecodeRune(c.in[c.at:])
	return fmt.Errorf("%q, want %s", r, want)
}

func isDigit(b byte) bool { return b >= '0' && b <= '9' }

// compareUTF16 compares two UTF-8 texts by their UTF-16 code units (RFC 8785,
// 3.2.3). The order differs from that of the bytes only where a character beyond
// U+FFFF meets one from U+E000 on.
func compareUTF16(a, b []byte) int {
	n := min(len(a), len(b))
	i := 0
	for i < n && a[i] == b[i] {
		i++
	}
	if i == n {
		return len(a) - len(b)
	}
	for i > 0 && !utf8.RuneStart(a[i]) {
		i--
	}
	x, _ := utf8.DecodeRune(a[i:])
	y, _ := utf8.DecodeRune(b[i:])
	if x >= 0x10000 != (y >= 0x10000) {
		// One of them is a pair, whose first unit lies in 0xD800-0xDBFF.
		x, y = firstUnit(x), firstUnit(y)
	}
	return int(x - y)
}

func firstUnit(r rune) rune {
	if r < 0x10000 {
		return r
	}
	high, _ := utf16.EncodeRune(r)
	return high
}

// textIsUTF8 reports whether every string that encoding/json would write for v
// is UTF-8. The package replaces what is not by U+FFFD, which would make one
// digest for different texts. Values that marshal themselves are left to the
// check of their output.
func textIsUTF8(v reflect.Value, depth int) bool {
	if !v.IsValid() || depth > 8*maxDepth { // a cycle or too deep: refused by what comes after
		return true
	}
	if v.CanInterface() {
		switch own := v.Interface().(type) {
		case json.Marshaler:
			return true
		case interface{ MarshalText() ([]byte, error) }:
			if v.Kind() == reflect.Pointer && v.IsNil() {
				return true
			}
			text, err := own.MarshalText()
			return err != nil || utf8.Valid(text) // the error comes back from Marshal
		}
	}
	switch v.Kind() {
	case reflect.String:
		return utf8.ValidString(v.String())
	case reflect.Pointer, reflect.Interface:
		return v.IsNil() || textIsUTF8(v.Elem(), depth+1)
	case reflect.Slice, reflect.Array:
		if !mayHoldText(v.Type().Elem()) {
			return true
		}
		for i := range v.Len() {
			if !textIsUTF8(v.Index(i), depth+1) {
				return false
			}
		}
	case reflect.Map:
		for it := v.MapRange(); it.Next(); {
			if !textIsUTF8(it.Key(), depth+1) || !textIsUTF8(it.Value(), depth+1) {
				return false
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if field := v.Type().Field(i); field.Tag.Get("json") != "-" && (field.IsExported() || field.Anonymous) && !textIsUTF8(v.Field(i), depth+1) {
				return false
			}
		}
	}
	return true
}

// mayHoldText spares the walk over long runs of numbers, above all []byte.
func mayHoldText(t reflect.Type) bool {
	return t.Kind() < reflect.Bool || t.Kind() > reflect.Complex128
}
